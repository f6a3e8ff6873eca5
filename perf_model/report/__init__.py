"""A chosen plan, explained and drawn."""
