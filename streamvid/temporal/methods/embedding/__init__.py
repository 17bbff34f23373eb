"""Methods on projected tokens, before the language model."""
