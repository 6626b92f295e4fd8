"""The science of cytosae-cache: backbones, sparse autoencoders and their statistics, in plain torch and numpy.

Shape letters used throughout: `B` images in a batch, `T` tokens an image (CLS, registers, patches row by row),
`D` model width, `S` latents of the sparse autoencoder, `K` entries kept by a top-k.
"""
