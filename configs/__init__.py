"""YAML recipes: one a stage of the paper's training, and the CPU quick start."""
