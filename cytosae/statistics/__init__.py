"""Accumulators of statistics over images: top-k, means, counts, histograms, heat maps."""
