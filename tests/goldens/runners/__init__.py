"""One file a method: what the arrays of its cases mean."""
