"""What is split by hand: tensor and sequence parallel, context parallel, FSDP."""
