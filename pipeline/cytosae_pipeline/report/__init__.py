"""The report: a page of cells, latents and patients, written as a folder or served on this machine."""
