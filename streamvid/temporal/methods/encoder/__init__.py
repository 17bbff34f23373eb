"""Methods inside the vision tower."""
