"""Sources, tokenizers, packing; every batch is a function of (seed, step)."""
