"""Decoders and coprocessors on disk: Hugging Face, Google, our exports."""
