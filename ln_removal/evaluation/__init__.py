"""What a model is worth: losses, questions, samples, comparisons."""
