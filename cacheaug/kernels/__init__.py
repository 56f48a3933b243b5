"""Kernels, each beside its plain reference."""
