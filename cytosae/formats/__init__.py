"""Autoencoders in files: our checkpoints, the formats of other programs, and reading pickles without running them."""
