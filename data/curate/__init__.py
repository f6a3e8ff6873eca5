"""From raw videos and images to a training set that can be explained: what is measured, and what that decides."""
