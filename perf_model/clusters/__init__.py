"""Cluster files, and how they are read: every constant that a price uses."""
