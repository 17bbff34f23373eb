"""Watching live sources."""
