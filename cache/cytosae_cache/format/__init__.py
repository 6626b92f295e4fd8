"""The store format: what the files of a store contain, encoded and decoded in memory (`docs/store-format.md`)."""
