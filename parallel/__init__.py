"""What many GPUs do together: plans, programs, passes and the runtime."""
