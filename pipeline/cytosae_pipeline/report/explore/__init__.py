"""The explorer: the report's page served on this machine, with every latent and image computed on request."""
