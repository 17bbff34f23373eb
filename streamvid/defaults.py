"""What is done when nothing is said; here, so that a command can tell it without loading what does it."""

REDUCE = "rlt,fastvid"
"""Static cells are left out before the tower, then dense regions become few tokens."""

CODEC = "sq8"
"""How features and layers are stored: see docs/codecs.md for what it was chosen by."""
