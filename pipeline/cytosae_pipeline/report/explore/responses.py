"""Responses of the servers of pages, and the numbers in the addresses that they answer."""

import re
from http import HTTPStatus

from flask import Response

from cytosae_pipeline.report.explore.errors import MissingError

CONTENT_TYPES = {
    "html": "text/html; charset=utf-8",
    "js": "text/javascript; charset=utf-8",
    "css": "text/css; charset=utf-8",
    "jpg": "image/jpeg",
    "json": "application/json",
    "txt": "text/plain; charset=utf-8",
}
"""Content type by the ending of a file."""


def parse_number(name: str, ending: str = "") -> int:
    """The number in a name such as `12.js`, in its one canonical spelling.

    Raises:
        MissingError: If it is another name.
    """
    found = re.fullmatch(r"(0|[1-9][0-9]{0,8})" + re.escape(ending), name, re.ASCII)
    if found is None:
        raise MissingError
    return int(found[1])


def respond(kind: str, data: bytes | str, status: HTTPStatus = HTTPStatus.OK) -> Response:
    """A response.

    Args:
        kind: Ending of a file of this type.
        data: The contents.
        status: The status.
    """
    return Response(data, status=status, content_type=CONTENT_TYPES[kind])
