"""Sparse autoencoders: the base class, six architectures, their registry, and products with sparse activations."""
