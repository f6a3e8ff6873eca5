"""A run as a job: on a scheduler, or by agents of this machine."""
