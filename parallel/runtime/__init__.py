"""A program on ranks: processes, collectives, execution, capture; and who watches it."""
