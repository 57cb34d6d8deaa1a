"""What attention does, step by step and head by head."""
