"""Token reduction: methods, and the hosts that carry them out."""
