"""Training of the temporal autoencoder: its recipe, batches, networks, steps and checkpoints."""
