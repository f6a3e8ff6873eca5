"""A training run: recipe, loop, checkpoints, what it reports and shows."""
