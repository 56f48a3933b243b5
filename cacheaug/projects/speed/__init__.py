"""The training step beside the loss as most would write it first."""
