"""A run's files and its process: checkpoints, metrics, heartbeat, flags."""
