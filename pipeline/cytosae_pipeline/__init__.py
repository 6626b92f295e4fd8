"""The stages and the command line: composes `cytosae` (science) and `cytosae_cache` (storage)."""

__version__ = "0.1.0"
