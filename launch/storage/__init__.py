"""Places where files lie, by path or by URL, and what is done with them there: one way for both."""
