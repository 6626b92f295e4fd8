"""The store format: what its files hold, encoded and decoded in memory."""
