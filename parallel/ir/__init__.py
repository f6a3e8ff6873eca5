"""The language of a step: what a program may say, and what is refused."""
