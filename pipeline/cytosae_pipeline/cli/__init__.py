"""The command line: options to one call, and its result for people or as JSON."""
