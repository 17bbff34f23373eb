"""Methods: each says what becomes of tokens, and moves nothing itself."""
