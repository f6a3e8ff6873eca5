"""Text encoders from a directory that transformers saved: their files, their weights, and how they run."""
