"""Training from scratch, on the same loop as removal."""
