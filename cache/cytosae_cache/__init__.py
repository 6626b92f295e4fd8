"""The activation store: sharded Zarr arrays on disk, and fast, verified ways to write, read and stream them.

Modules, lowest first, each importing only lower ones: `errors`, `storage/` (files), `format/` (what they contain),
`reading/` (rows into memory, in training order), `views` (dask, xarray), `store` (the facade that users open),
`writer`, `verify`.

Shape letters: `N` images in a store, `T` tokens per image, `D` model width.
"""
