"""From video to batches."""
