"""The command line: parses, calls a pipeline, renders."""
