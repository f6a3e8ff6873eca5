"""Movie Gen Video: configuration, reference, program builders, flow matching, codec."""
