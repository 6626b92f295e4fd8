"""Fixtures shared by all tests: everything is small, made on the spot and CPU only."""

import os
from pathlib import Path

import pytest


@pytest.fixture
def test_data() -> Path:
    """The folder of real cell crops and the real ViT, or a skip that says how to provide it."""
    value = os.environ.get("CYTOSAE_TEST_DATA")
    if not value:
        pytest.skip("needs real data: set CYTOSAE_TEST_DATA to the folder with bccd_cells/ and vit/")
    return Path(value)
