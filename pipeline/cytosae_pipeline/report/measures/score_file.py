"""Scores of some latents on all images, in a file without a name: memory does not grow with the images."""

import tempfile
from pathlib import Path
from types import TracebackType
from typing import IO, Self

import numpy as np
import numpy.typing as npt

from cytosae_cache.storage.disk import writing


class ScoreFile:
    """Written a few images at a time, read a latent at a time; use as a context manager.

    It takes 4 bytes per image and latent of the disk until it is closed, even if the process is killed.

    Args:
        folder: Where the file lies.
        n_images: Images N.
        n_latents: Latents M.
    """

    def __init__(self, folder: Path, n_images: int, n_latents: int) -> None:
        self._folder, self._n_images, self._n_latents = folder, n_images, n_latents
        with writing(folder):
            self._file: IO[bytes] = tempfile.TemporaryFile(dir=folder, buffering=0)  # noqa: SIM115 - closed by `close`

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._file.close()

    def write(self, first: int, scores: npt.NDArray[np.float32]) -> None:
        """Write the scores of consecutive images, shape `(n, M)`, of which the first has the place `first`.

        Raises:
            WriteError: If the disk is full or fails.
        """
        columns = np.ascontiguousarray(scores.T, dtype=np.float32)
        with writing(self._folder):
            for latent, column in enumerate(columns):
                self._file.seek(4 * (latent * self._n_images + first))
                self._write_all(memoryview(column).cast("B"))

    def column(self, latent: int) -> npt.NDArray[np.float32]:
        """Scores of one latent, by its place among the M, on all images, shape `(N,)`."""
        self._file.seek(4 * latent * self._n_images)
        data = bytearray()
        while len(data) < 4 * self._n_images:
            part = self._file.read(4 * self._n_images - len(data))
            if not part:
                raise EOFError(f"scores of latent {latent} were not written for all {self._n_images} images")
            data += part
        return np.frombuffer(bytes(data), dtype=np.float32)

    def _write_all(self, data: memoryview) -> None:
        """Write everything: an unbuffered file may take less at once."""
        while data:
            data = data[self._file.write(data) :]
