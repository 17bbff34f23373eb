"""Memory for video language models."""
