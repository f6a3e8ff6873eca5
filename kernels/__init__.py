"""What one GPU computes."""
