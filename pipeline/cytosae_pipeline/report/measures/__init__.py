"""What a report measures of its latents beside the statistics: scores of all images, and what follows from them."""
