"""What one record, one step and one rank's memory cost."""
