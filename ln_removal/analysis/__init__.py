"""Looking into a model and its training: attention entropy by head, NaN by layer, slopes, over steps and side by side."""
