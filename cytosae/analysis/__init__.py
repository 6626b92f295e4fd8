"""Analysis of statistics: specific latents, comparison and classification of groups, linear probes, masking."""
