"""Gates: where an augmentation pays."""
