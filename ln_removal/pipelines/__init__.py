"""What a command does, from its recipe to its results."""
