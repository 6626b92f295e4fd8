"""Images to token vectors: image decoding, and vision transformers cut after the requested block."""
