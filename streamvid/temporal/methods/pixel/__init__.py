"""Methods that decide on pixels, before the vision tower."""
