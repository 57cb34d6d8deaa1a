"""The training loop shared by removal and pretraining, with its loss, optimizers, checkpoints and metrics."""
