"""A user's prompt in the words of training captions: guidelines, who rewrites, what is checked, kept and taught."""
