"""From a question and a memory to an answer."""
