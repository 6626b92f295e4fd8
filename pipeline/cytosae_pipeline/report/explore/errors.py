"""What a request can ask for in vain."""


class MissingError(LookupError):
    """There is no such latent, image, patient view or picture."""


class RefusedError(ValueError):
    """A request cannot be served; the message is short and may be shown in the browser."""
