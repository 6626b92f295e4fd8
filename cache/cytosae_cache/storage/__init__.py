"""Where a store's files lie: a local folder or a remote file system."""
