"""Remembered tokens on disk."""
