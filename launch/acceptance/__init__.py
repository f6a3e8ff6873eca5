"""The first thirty minutes on several GPUs: one command under torchrun that finds out whether a job can be trusted."""
