"""Sparse autoencoders: the architectures, their registry, and products with sparse activations."""
