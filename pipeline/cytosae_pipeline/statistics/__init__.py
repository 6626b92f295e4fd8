"""Stage two's statistics: one pass of the encoder that feeds accumulators, and its results on disk."""
