"""Differentiable cache augmentation (arXiv 2412.17747) in JAX."""
