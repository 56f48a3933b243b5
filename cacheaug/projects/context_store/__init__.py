"""Latents of stored contexts: deliberate once, answer many times."""
