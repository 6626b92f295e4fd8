"""Reading the statistics: specific latents, groups compared, classification, probes, masking."""
