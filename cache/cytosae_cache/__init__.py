"""The activation store: sharded Zarr arrays on disk, and fast, checked ways to write, read and stream them.

Shape letters: `N` images in a store, `T` tokens an image, `D` model width.
"""
