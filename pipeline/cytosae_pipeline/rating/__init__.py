"""Ratings of latents by people: what they are asked, what they answered, and which latents passed."""
