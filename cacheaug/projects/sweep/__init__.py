"""Sweeps: many runs from one file, and one report over them."""
