"""What --dask may name."""

from pathlib import Path

import pytest

from cytosae_pipeline.config.cluster import ClusterChoice, parse_dask
from cytosae_pipeline.errors import UserError


@pytest.mark.parametrize(
    ("text", "place"),
    [
        ("local:1", 1),
        ("local:1024", 1024),
        ("tcp://10.0.0.1:8786", "tcp://10.0.0.1:8786"),
        ("tls://node-1.cluster_a:40000", "tls://node-1.cluster_a:40000"),
        ("tcp://[fe80::1%eth0]:8786", "tcp://[fe80::1%eth0]:8786"),
        ("/scratch/scheduler.json", Path("/scratch/scheduler.json")),
    ],
)
def test_workers_here_an_address_and_a_file(text, place):
    assert parse_dask(text) == place
    assert ClusterChoice(dask=text).dask == text


@pytest.mark.parametrize(
    "text", ["", "local", "local:", "local:0", "local:-1", "local:1025", "locl:4", "10.0.0.1:8786", "tcp://host", "4"]
)
def test_anything_else_is_refused_with_what_is_expected(text):
    with pytest.raises(UserError, match=r"dask must be local:N with N from 1 to 1,024, .* found '" + text + "'"):
        ClusterChoice(dask=text)


def test_no_cluster_is_the_default():
    assert ClusterChoice().dask is None
