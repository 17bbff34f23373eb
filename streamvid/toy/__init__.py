"""A small world whose events are known, and the small model trained on it."""
