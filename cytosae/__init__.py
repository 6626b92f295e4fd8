"""The science of cytosae-cache: backbones, sparse autoencoders and their statistics, in plain torch and numpy.

    sae = cytosae.load("out/checkpoints/RUN/final_sparse_autoencoder_....pt")
    acts = sae.encode(x)                     # latent activations, shape (..., S), of activations (..., D)
    again = sae.decode(acts)                 # reconstruction, shape (..., D)

Rooms, lowest first: `backbones` (images to tokens), `sae` (architectures), `statistics` (accumulators over images),
`analysis` (latents against labels). `training` (losses and steps) and `formats` (files) build on `sae` alone.

Shape letters used throughout: `B` images in a batch, `T` tokens per image (CLS, registers, patches row by row),
`D` model width, `S` latents of the sparse autoencoder, `k` entries kept by a top-k.
"""

import lazy_loader

__getattr__, __dir__, __all__ = lazy_loader.attach_stub(__name__, __file__)
