"""Where a store's files are: one contract (`base`), a local folder or object storage behind it, and atomic writing."""
