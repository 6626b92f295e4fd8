"""Images to token vectors: reading pictures, and vision transformers cut after the wanted block."""
