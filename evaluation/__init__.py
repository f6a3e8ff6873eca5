"""What people judge: bench prompts, pairs without names, votes, and what the votes say."""
