"""Methods on the key-value cache."""
