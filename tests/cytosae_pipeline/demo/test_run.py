"""The demo: the whole program on the embedded network and a cohort whose groups are known."""

import json

import pytest
import torch
from click.testing import CliRunner

from cytosae_pipeline.cli.app import cli
from cytosae_pipeline.demo import run as demo
from cytosae_pipeline.errors import UserError


@pytest.mark.slow
def test_the_demo_recovers_the_planted_groups_and_names_everything(demo_run):
    output = demo_run.output
    assert "the planted groups are recovered" in output
    assert "With your own images" in output
    for line in output.splitlines():
        if line.startswith("  /"):
            assert (demo_run.root / line.strip()).exists()
    assert output.strip().endswith(f"in any browser: {demo_run.report / 'index.html'}")
    again = CliRunner().invoke(cli, ["demo", "--root_dir", str(demo_run.root), "--json"])
    facts = json.loads(again.stdout)
    assert facts["accuracy"] > facts["chance"] + 0.25
    page = (demo_run.report / "data" / "patients.js").read_text()
    assert f'"balanced_accuracy":{facts["accuracy"]}' in page, "one accuracy by one method"
    assert f"balanced accuracy {facts['accuracy']:.1%} (guessing: 33.3%)" in output
    assert facts["explained_variance"] > 0.8
    assert facts["n_specific"] > 0
    assert facts["n_images"] == 720


def test_a_negative_seed_is_refused(tmp_path):
    with pytest.raises(UserError, match="seed must be at least 0, found -1"):
        demo.run_demo(str(tmp_path), seed=-1)


def test_groups_that_are_not_recovered_fail_the_demo(tmp_path, monkeypatch):
    monkeypatch.setattr(demo, "_N_CELLS_PER_PATIENT", 1)
    monkeypatch.setattr(demo, "_N_PATIENTS_PER_GROUP", 2)
    monkeypatch.setattr(demo, "_MARGIN", 2.0)
    threads = torch.get_num_threads()
    result = CliRunner().invoke(cli, ["demo", "--root_dir", str(tmp_path)])
    assert result.exit_code == 1
    assert "the planted groups were NOT recovered" in result.output
    assert torch.get_num_threads() == threads
