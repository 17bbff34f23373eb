"""Methods that say what an answer may read from memory."""
