"""The only code that knows how networks are wired."""
