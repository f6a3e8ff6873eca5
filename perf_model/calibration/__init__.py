"""From measurements to a cluster file."""
