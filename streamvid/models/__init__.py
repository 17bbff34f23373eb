"""Adapters: one per model family, over transformers."""
