"""Scores in a file without a name: what is written is read, and nothing is left behind."""

import errno

import numpy as np
import pytest

from cytosae_cache.errors import WriteError
from cytosae_pipeline.report.measures.score_file import ScoreFile


@pytest.mark.parametrize("size", [1, 4, 100])
def test_columns_are_those_that_were_written(tmp_path, size):
    scores = np.random.default_rng(0).random((23, 5)).astype(np.float32)
    with ScoreFile(tmp_path, 23, 5) as file:
        for first in range(0, 23, size):
            file.write(first, scores[first : first + size])
        for latent in (3, 0, 4, 1, 2):
            assert np.array_equal(file.column(latent), scores[:, latent])
        assert list(tmp_path.iterdir()) == []
    assert list(tmp_path.iterdir()) == []


def test_a_store_without_images_has_empty_columns(tmp_path):
    with ScoreFile(tmp_path, 0, 2) as file:
        assert len(file.column(1)) == 0


def test_scores_that_were_not_written_are_no_zeros(tmp_path):
    with ScoreFile(tmp_path, 4, 2) as file:
        file.write(0, np.ones((2, 2), np.float32))
        with pytest.raises(EOFError, match="scores of latent 1 were not written for all 4 images"):
            file.column(1)


def test_a_full_disk_is_named(tmp_path, monkeypatch):
    with ScoreFile(tmp_path, 4, 2) as file:

        class Full:
            def seek(self, at):
                pass

            def write(self, data):
                raise OSError(errno.ENOSPC, "No space left on device")

        whole, file._file = file._file, Full()
        with pytest.raises(WriteError, match="No space left on device"):
            file.write(0, np.ones((2, 2), np.float32))
        file._file = whole
