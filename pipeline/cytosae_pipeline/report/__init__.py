"""What a person looks at: a page of cells, latents and patients, as a folder or served on this machine."""
