"""What a rater answers about an item, and all answers of a rater."""

from dataclasses import dataclass, field
from typing import Any, Literal, TypedDict, get_args

Concept = Literal["no", "partly", "yes"]

CONCEPTS: tuple[Concept, ...] = get_args(Concept)
"""Answers to "is it one concept?", in their order."""

MAX_NAME = 200
"""Characters of the name that a rater gives."""

MOST_CONFIDENT = 5
"""Confidence is a whole number from 1 to this."""

MOST_IN_ROW = 100
"""Largest row of an intruder test that is read from a file."""


class Answer(TypedDict):
    """What a rater answered about one item."""

    item: str
    """Digest of the images that were shown."""
    name: str
    """A few words."""
    concept: Concept
    """Whether it is one concept."""
    confidence: int
    """1 to 5."""
    clicked: int
    """Place of the image that was taken for the intruder, from 0."""
    n_row: int
    """Images of that row."""
    found: bool
    """Whether it was the intruder; False for a decoy, which has none."""


@dataclass(frozen=True)
class Ratings:
    """All answers of one rater."""

    rater: str
    """The rater's short name."""
    latents: dict[int, Answer] = field(default_factory=dict)
    """Answers about latents."""
    decoys: dict[str, Answer] = field(default_factory=dict)
    """Answers about decoys, by the digest of their images."""

    def __len__(self) -> int:
        return len(self.latents) + len(self.decoys)


def check_answer(value: Any) -> Answer:  # noqa: ANN401 - any JSON
    """Check the types and ranges of an answer.

    Raises:
        ValueError: If it is not an answer.
    """
    if not isinstance(value, dict):
        raise ValueError("an answer must be an object with name, concept, confidence and clicked")
    name, item, found = value.get("name"), value.get("item"), value.get("found")
    if not isinstance(name, str) or len(name) > MAX_NAME:
        raise ValueError(f"name must be text of at most {MAX_NAME} characters")
    try:
        name.encode()
    except UnicodeEncodeError as error:
        raise ValueError("name must be valid Unicode, found half of a surrogate pair") from error
    concept = value.get("concept")
    if concept not in CONCEPTS:
        raise ValueError(f"concept must be {', '.join(CONCEPTS[:-1])} or {CONCEPTS[-1]}")
    if concept != "no" and not name.strip():
        raise ValueError("a concept needs a name: name it, or answer no")
    if not isinstance(item, str) or len(item) > 64 or not item.isascii() or not item.isalnum():
        raise ValueError("item must be a digest")
    if not isinstance(found, bool):
        raise ValueError("found must be true or false")
    n_row = _whole(value, "n_row", 2, MOST_IN_ROW)
    return Answer(
        item=item, name=name, concept=concept, confidence=_whole(value, "confidence", 1, MOST_CONFIDENT),
        clicked=_whole(value, "clicked", 0, n_row - 1), n_row=n_row, found=found,
    )  # fmt: skip


def _whole(value: dict[str, Any], name: str, low: int, high: int) -> int:
    """A whole number in a closed range."""
    found = value.get(name)
    if type(found) is not int or not low <= found <= high:
        raise ValueError(f"{name} must be a whole number from {low} to {high}")
    return found
