"""Whether machines are fit to train: what each is, what is wrong with it, which of them is slow."""
