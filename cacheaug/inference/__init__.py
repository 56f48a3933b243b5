"""Generation from plain and augmented caches."""
