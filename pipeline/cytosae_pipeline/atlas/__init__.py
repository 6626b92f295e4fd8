"""An atlas: what an autoencoder found in a cohort, to pass on without its images, and to place new images in."""
