"""Autoencoders on disk: our checkpoints, other programs' formats, and reading pickles without running them."""
