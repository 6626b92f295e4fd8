"""The layout of `<root>/dataset` and `<root>/out`, and finding stores and runs there."""
