"""The blinded rating of latents: its server, what it shows, and its page."""
