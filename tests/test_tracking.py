"""Metrics go to JSON lines always, to a real offline wandb run when asked, and no name of a person anywhere."""

import json

import pytest

from cytosae_pipeline.tracking import JsonLines, Trackers, WandbTracker


def test_json_lines_survive_a_half_written_line_and_drop_later_steps(tmp_path):
    path = tmp_path / "metrics.jsonl"
    with Trackers(JsonLines(path)) as tracker:
        for step in (1, 2, 3):
            tracker.log(step, {"loss": step / 2, "bad": float("nan")})
    with path.open("a") as file:
        file.write('{"step": 4, "lo')
    with Trackers(JsonLines(path, after_step=2)) as tracker:
        tracker.log(3, {"loss": 9.0})
    lines = [json.loads(line) for line in path.read_text().splitlines()]
    assert lines == [
        {"step": 1, "loss": 0.5, "bad": None},
        {"step": 2, "loss": 1.0, "bad": None},
        {"step": 3, "loss": 9.0},
    ]


@pytest.fixture
def no_login(tmp_path, monkeypatch):
    for name in ("WANDB_API_KEY", "WANDB_MODE"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("NETRC", str(tmp_path / "no-netrc"))


def test_wandb_runs_offline_without_a_login_and_says_so(with_store, no_login):
    result = with_store.train("--run_name", "r", "--log_to_wandb", "--wandb_project", "p", "--wandb_entity", "e")
    assert "wandb: no login found" in result.output
    assert "wandb sync" in result.output
    folder = with_store.root / "out" / "checkpoints" / "r" / "wandb"
    (log,) = folder.glob("offline-run-*/*.wandb")
    data = log.read_bytes()
    # The real file on its way to the server: metrics under the reference's names, and nothing that tells who or where.
    for name in (b"losses/overall_loss", b"metrics/explained_variance", b"sparsity/dead_features"):
        assert name in data
    everything = data + b"".join(path.read_bytes() for path in folder.rglob("*") if path.is_file() and path != log)
    for private in (b"neutrophil", b"blast", b"p0/", b".png", str(with_store.root / "dataset").encode(), b"vit.pth"):
        assert private not in everything, private


def test_wandb_can_be_switched_off_from_outside(tmp_path, monkeypatch):
    monkeypatch.setenv("WANDB_MODE", "disabled")
    tracker = WandbTracker(project="p", entity=None, run_id="a", folder=tmp_path, config={"lr": 1.0})
    tracker.log(1, {"loss": 1.0})
    tracker.close()
    assert not list(tmp_path.glob("wandb/*/*.wandb"))
