"""The coprocessor works in a thread while the decoder goes on."""
