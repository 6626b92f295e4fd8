"""The activation store: sharded Zarr arrays on disk, and fast, verified ways to write, read and stream them.

    store = cytosae_cache.open("out/activations/mll23/0123456789ab.zarr")
    store[0]                                 # activations of the first image, shape (T, D)
    store.images.label                       # one entry per image
    store.torch_batches(batch_size=64)       # shuffled batches for a trainer of your own

Modules, lowest first, each importing only lower ones: `errors`, `storage/` (files), `format/` (what they contain),
`reading/` (rows into memory, in training order), `views` (dask, xarray, notebooks) and `torch_views`, `store` (the
facade that users open), `joined_store` (several as one), `writer`, `verify`.

Shape letters: `N` images in a store, `T` tokens per image, `D` model width.
"""

import lazy_loader

__getattr__, __dir__, __all__ = lazy_loader.attach_stub(__name__, __file__)
