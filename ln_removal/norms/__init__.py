"""The freezable norms: what they compute, how they get in and out of a model, when each one freezes."""
