"""What a plan will cost, and which one to run."""
