"""The shared decoder architecture; knows nothing of augmentation."""
