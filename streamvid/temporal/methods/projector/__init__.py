"""Methods between tower and language model that compute new tokens."""
