"""Data sets on disk: listing, reading and decoding images."""
