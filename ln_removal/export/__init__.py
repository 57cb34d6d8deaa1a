"""The trained model without its norms: folded, verified, written, converted, published."""
