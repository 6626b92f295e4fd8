"""Embeddings that other programs computed, as activation stores."""
