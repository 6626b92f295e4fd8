"""How many images `explore` measures a latent on."""

PROFILE_IMAGES = 1000
"""Images, spread over the store, from which a latent's profile is computed."""

_MIN_PROFILE_IMAGES = 24
_PROFILE_OPERATIONS = 1e12
"""Multiplications and additions that a profile may take on a CPU: about ten seconds."""


def profile_images(n_tokens: int, encoder_size: int) -> int:
    """Images of a profile if a CPU must compute all latents to get one: fewer, so that it takes seconds, not minutes.

    Args:
        n_tokens: Tokens of an image.
        encoder_size: Numbers in the encoder's matrix.
    """
    affordable = int(_PROFILE_OPERATIONS / (2 * n_tokens * encoder_size))
    return min(PROFILE_IMAGES, max(_MIN_PROFILE_IMAGES, affordable))
