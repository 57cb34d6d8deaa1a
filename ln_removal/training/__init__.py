"""The training loop shared by removal and pretraining, with its optimizers, checkpoints and metrics."""
