"""Mutated input files: the real command on each, in a child, and what must hold afterwards.

The command ends with exit code 0, 1 or 2 and at most one short error, without a traceback, in little memory and time.
If it ends with 0, its results are those of the valid file, or it names the file in a warning; where the file is data
without a checksum, such as a picture, the results may differ.
"""

import json
import random
import re
import shutil
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from tests.support.fault_trials import Snapshot, snapshot
from tests.support.mutations import WITH_CHECKSUMS, Form, mutate
from tests.support.nursery import Ended, Nursery

MAX_PEAK_BYTES = 1_500_000_000
MAX_CPU_S = 60.0
_MAX_ERROR_LINES = 10
_MAX_ERROR_CHARACTERS = 3_000
_CONTROL = re.compile(r"[\x00-\x08\x0b-\x1f\x7f\x9b\u202e\u2066]")
_PACE = re.compile(r"[\d,.]+( \w+/s| s\b)|\d\d:\d\d")

Prepare = Callable[[Path, Nursery], None]
Command = Callable[[Path], Sequence[object]]


@dataclass(frozen=True)
class Kind:
    """A kind of input file, and the commands that read it."""

    name: str
    """Name in the table."""
    form: Form
    """What the file consists of."""
    file: str
    """Pattern of the file below the root folder; the first one is mutated."""
    prepare: Prepare
    """Fills a root folder."""
    commands: Mapping[str, Command]
    """What is run, given the root folder, by the name in the table."""
    is_data: bool = False
    """Whether nothing else says what the file must contain, so that other results are right for other bytes."""
    amend: Callable[[Path], None] = lambda root: None
    """Run after the mutation, for example to make digests right again."""


@dataclass
class Tried:
    """What one mutation did."""

    kind: str
    """Name of the kind."""
    verb: str
    """Name of the command."""
    mutation: str
    """What was mutated."""
    seed: int
    """The seed it was made with."""
    ended: Ended
    """How the command ended."""
    verdict: str = "refused"
    """`refused`, `same` results, `told` that they differ, or `data`: they differ as the input does."""
    problems: list[str] = field(default_factory=list)
    """What was wrong; empty if nothing."""


class MutationTrials:
    """Runs commands on mutated files.

    Args:
        folder: An empty folder; all trials happen in the same place below it, which some files name.
        nursery: Runs the commands.
    """

    def __init__(self, folder: Path, nursery: Nursery) -> None:
        self._root, self._folder, self._nursery = folder / "root", folder, nursery
        self._pristine: dict[Prepare, Path] = {}

    def run(self, kind: Kind, seeds: Sequence[int]) -> Iterator[Tried]:
        """Try one kind of file, with its commands in turn.

        Raises:
            RuntimeError: If a command fails without any mutation.
        """
        pristine = self._prepare(kind.prepare)
        verbs = list(kind.commands)
        expected = {verb: self._expect(pristine, kind, kind.commands[verb]) for verb in verbs}
        path = sorted(pristine.glob(kind.file))[0].relative_to(pristine)
        data = (pristine / path).read_bytes()
        for seed in seeds:
            verb = random.Random(f"{kind.name} {seed}").choice(verbs)
            mutation, made = mutate(data, kind.form, seed)
            self._reset(pristine)
            (self._root / path).write_bytes(made)
            kind.amend(self._root)
            before = snapshot_without(self._root, path)
            ended = self._nursery.run(*kind.commands[verb](self._root))
            tried = Tried(kind.name, verb, mutation, seed, ended)
            self._judge(tried, kind, path, expected[verb], before)
            yield tried

    def _judge(self, tried: Tried, kind: Kind, path: Path, expected: tuple[Snapshot, str], before: Snapshot) -> None:
        ended = tried.ended
        tried.problems += find_faults(ended)
        if ended.code != 0:
            return
        wanted, text = expected
        after = snapshot_without(self._root, path)
        # What the amendment changed is not the command's doing.
        ours = {name: digest for name, digest in after.items() if before.get(name) != digest}
        theirs = {name: digest for name, digest in wanted.items() if name != path.as_posix()}
        if all(theirs.get(name) == digest for name, digest in ours.items()) and theirs.keys() <= after.keys():
            tried.verdict = "same"
            if not ours and _PACE.sub("", ended.output) != text:
                tried.verdict = "told"
            return
        differs = sorted(name for name in ours | theirs if ours.get(name, before.get(name)) != theirs.get(name))
        warns = any(word in ended.output and word not in text for word in (path.name, f"results of `{path.stem}` in "))
        tried.verdict = "told" if warns else "data"
        if not warns and not kind.is_data and tried.mutation not in WITH_CHECKSUMS:
            tried.problems.append(f"other results without a word: {differs[:5]}: {ended.output[-600:]}")

    def _expect(self, pristine: Path, kind: Kind, command: Command) -> tuple[Snapshot, str]:
        self._reset(pristine)
        kind.amend(self._root)
        ended = self._nursery.run(*command(self._root))
        if ended.code != 0:
            raise RuntimeError(f"{kind.name} does not even work: {ended.output[-2000:]}")
        return snapshot_without(self._root, None), _PACE.sub("", ended.output)

    def _prepare(self, prepare: Prepare) -> Path:
        if prepare not in self._pristine:
            shutil.rmtree(self._root, ignore_errors=True)
            self._root.mkdir(parents=True)
            prepare(self._root, self._nursery)
            place = self._folder / f"pristine-{len(self._pristine)}"
            self._root.rename(place)
            self._pristine[prepare] = place
        return self._pristine[prepare]

    def _reset(self, pristine: Path) -> None:
        shutil.rmtree(self._root, ignore_errors=True)
        shutil.copytree(pristine, self._root, symlinks=True)


def snapshot_without(root: Path, path: Path | None) -> Snapshot:
    """Digests of all files but the mutated one; of records without the identity of an autoencoder's file."""
    found = {}
    for name, digest in _snapshot(root, path).items():
        record = root / name
        if path is not None and name == path.as_posix():
            continue
        if record.parent.parent.parent.parent.name == "feature_data" and record.suffix == ".json":
            digest = repr({key: value for key, value in _read_json(record).items() if key != "sae_sha256"})
        found[name] = digest
    return found


def _snapshot(root: Path, path: Path | None) -> Snapshot:
    """Digests of all files; metrics that were mutated are left out, as they may be anything."""
    if path is None or path.name != "metrics.jsonl" or not (root / path).is_file():
        return snapshot(root)
    aside = root.parent / "aside"
    (root / path).rename(aside)
    try:
        return snapshot(root)
    finally:
        aside.rename(root / path)


def _read_json(path: Path) -> dict[str, Any]:
    try:
        value = json.loads(path.read_bytes())
    except (ValueError, RecursionError):
        return {}
    return value if isinstance(value, dict) else {}


def find_faults(ended: Ended) -> list[str]:
    """What is wrong with the end of a command on hostile input, whatever its results are."""
    problems = []
    end = ended.output[-1500:]
    messages = re.split(r"^Error: ", ended.output, flags=re.MULTILINE)
    error = messages[1] if len(messages) > 1 else ""
    if ended.code not in (0, 1, 2):
        problems.append(f"exit code {ended.code}: {end}")
    if "Traceback (most recent call last)" in ended.output:
        problems.append(f"a traceback: {end}")
    if len(messages) > 2 or (ended.code and not ended.output.strip()):
        problems.append(f"no single message: {end}")
    if len(error.splitlines()) > _MAX_ERROR_LINES or len(error) > _MAX_ERROR_CHARACTERS:
        problems.append(f"a message of {len(error.splitlines())} lines and {len(error)} characters: {error[:600]}")
    if found := _CONTROL.search(ended.output):
        problems.append(f"{found[0]!r} reaches the terminal: {ended.output[found.start() - 100 : found.end() + 100]!r}")
    if ended.peak_bytes > MAX_PEAK_BYTES:
        problems.append(f"{ended.peak_bytes / 1e6:.0f} MB: {end}")
    if ended.cpu_s > MAX_CPU_S:
        problems.append(f"{ended.cpu_s:.0f} s of computing: {end}")
    if ended.left_over:
        problems.append(f"processes are left: {ended.left_over}")
    return problems
