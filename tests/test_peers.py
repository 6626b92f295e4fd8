"""The comparison with other programs: its plan, its batches, its table; their trainers run where they are installed."""

import itertools
import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch

from benchmarks import peers
from benchmarks.campaign import caching
from benchmarks.campaign.data import Data
from benchmarks.campaign.environments import RIVALS, make_environment, torch_pin
from benchmarks.campaign.plan import ARCHS, OURS, Campaign, Run, Setting, best_setting, table_runs, tuning_runs
from benchmarks.campaign.table import make_table
from benchmarks.campaign.training import RunFailedError, Sizes, adapter_command, own_python, train_and_evaluate
from cytosae_pipeline.config import TrainConfig
from cytosae_pipeline.training.batches import open_batches
from tests.support.stores import make_activations, make_spec, make_store

ROOT = Path(__file__).parents[1]
ENVIRONMENTS = os.environ.get("CYTOSAE_TEST_PEERS")
"""A folder for `--environments`."""

SIZES = Sizes(steps=12, batch_images=4, expansion=4, held_out=0.2, threads=1, device="cpu")


@pytest.fixture
def store(tmp_path):
    return make_store(tmp_path / "s.zarr", make_activations(40, make_spec(d_model=8, grid=(3, 3))))


@pytest.fixture
def data(store):
    with Data(store.path, SIZES.held_out, SIZES.batch_images) as data:
        yield data


def _campaign(**changes):
    values = {
        "programs": ("saelens", OURS), "archs": ("batchtopk", "topk"), "ks": (32, 16), "seeds": (0, 1), "rates": (),
        "given": {}, "tune_scaling": False,
    }  # fmt: skip
    return Campaign(**{**values, **changes})


def _run(**changes):
    values = {
        "program": OURS, "arch": "topk", "k": 3, "seed": 0, "precision": "fp32", "asked_rate": None, "scaled": False,
        "settings": "default",
    }  # fmt: skip
    return Run(**{**values, **changes})


def test_without_rates_only_the_defaults_are_run():
    campaign = _campaign()
    assert tuning_runs(campaign) == []
    runs = table_runs(campaign, dict.fromkeys(campaign.trained()))
    assert {run.settings for run in runs} == {"default"}
    assert len(runs) == 2 * 2 * 2 * (1 + 2)
    assert {run.precision for run in runs if run.program == OURS} == {"fp32", "auto"}


def test_tuned_settings_alone_leave_out_the_defaults_of_programs_that_have_them():
    campaign = _campaign(tuned_only=True, rates=(1e-3,))
    runs = table_runs(campaign, {pair: Setting(1e-3) if pair[0] == "saelens" else None for pair in campaign.trained()})
    assert {(run.program, run.settings) for run in runs} == {("saelens", "tuned"), (OURS, "default")}


def test_rates_are_tuned_at_the_first_k_and_seed_for_other_programs_alone():
    runs = tuning_runs(_campaign(rates=(1e-4, 1e-3), tune_scaling=True))
    assert {(run.program, run.k, run.seed) for run in runs} == {("saelens", 32, 0)}
    asked = [(run.asked_rate, run.scaled) for run in runs if run.arch == "topk"]
    assert asked == list(itertools.product((None, 1e-4, 1e-3), (False, True)))[::2] + [
        (rate, True) for rate in (None, 1e-4, 1e-3)
    ]


@pytest.mark.parametrize(
    ("found", "best"),
    [
        ({None: (0.2, 30), 1e-3: (0.6, 33), 1e-2: (None, None)}, 1e-3),
        # One that keeps too many latents explains more, and is no better for it.
        ({None: (0.2, 30), 1e-3: (0.9, 700)}, None),
        ({None: (0.9, 700), 1e-3: (0.6, 90), 1e-2: (0.7, 300)}, 1e-3),
        ({None: (None, None), 1e-3: (None, None)}, None),
    ],
)
def test_the_best_setting_explains_most_of_those_that_reach_k(found, best):
    lines = [
        {"asked_rate": rate, "scaled": False, "explained_variance": value, "l0": l0, "k": 32}
        for rate, (value, l0) in found.items()
    ]
    assert best_setting([Setting(), Setting(1e-3), Setting(1e-2)], lines) == Setting(best)


def test_a_single_setting_needs_no_lines():
    assert best_setting([Setting(5e-3)], []) == Setting(5e-3)
    assert best_setting([], []) is None


def test_a_given_rate_is_not_tuned():
    options = peers.parse(
        ["--store", "s", "--rates", "1e-3", "--rate", "saelens:topk=3e-4", "dictionary_learning=1e-4,scaled"]
    )
    campaign = peers.make_campaign(options)
    assert campaign.candidates("saelens", "topk") == [Setting(3e-4)]
    assert len(campaign.candidates("saelens", "jumprelu")) == 2
    for arch in ARCHS:
        assert campaign.candidates("dictionary_learning", arch) == [Setting(1e-4, scaled=True)]


@pytest.mark.parametrize("text", ["nobody=1", "saelens:relu=1", "saelens=1,wider", "saelens=many"])
def test_a_rate_of_an_unknown_program_is_refused(text):
    with pytest.raises(SystemExit, match=r"give a program \(saelens, .*\) and a rate, as in saelens=3e-4 or"):
        peers.make_campaign(peers.parse(["--store", "s", "--rate", text]))


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ([], "give --store, or --table"),
        (["--store", "s", "--held-out", "0"], "share of images to evaluate on, above 0 and below 1, found 0"),
        (["--store", "s", "--k", "32", "0"], "--expansion and --k must be at least 1"),
    ],
)
def test_options_that_nothing_can_be_done_with_are_refused(capsys, arguments, message):
    with pytest.raises(SystemExit):
        peers.parse(arguments)
    assert message in capsys.readouterr().err


def test_batches_are_those_of_our_own_training(store, data):
    config = TrainConfig(
        store=str(store.path), batch_size=4, total_training_tokens=48, batch_of="tokens", seed=7, held_out=0.2
    )
    ours = open_batches(data.trained, config, lambda x: x, samples_seen=0, device=torch.device("cpu"), place="none")
    for sent, batch in zip(data.iter_batches(7, 12), ours, strict=True):
        np.testing.assert_array_equal(sent, batch.activations.float().numpy())


def test_ours_is_trained_and_evaluated_and_a_line_names_no_path(data, tmp_path):
    line = train_and_evaluate(_run(), SIZES, data, adapter_command(OURS, own_python()))
    assert line["forward_difference"] == 0
    assert line["explained_variance"] + line["unexplained"] == pytest.approx(1)
    assert line["images_trained_on"] + line["images_held_out"] == 40
    assert line["cpu_s"] > 0
    assert str(tmp_path) not in json.dumps(line)


def test_peak_memory_is_that_of_the_process_alone():
    big = np.ones(60_000_000)
    program = "from benchmarks.rivals.job import measure_peak_mb; print(measure_peak_mb())"
    alone = float(subprocess.run([sys.executable, "-c", program], cwd=ROOT, capture_output=True, check=True).stdout)
    grown = "import numpy; x = numpy.ones(60_000_000); " + program
    grown_mb = float(subprocess.run([sys.executable, "-c", grown], cwd=ROOT, capture_output=True, check=True).stdout)
    assert 450 < grown_mb - alone < 520
    assert big.nbytes == 480_000_000


def test_an_adapter_that_fails_is_reported_with_its_last_lines(data):
    command = [sys.executable, "-c", "import sys; sys.exit('no such option: k')"]
    with pytest.raises(RunFailedError, match=r"saelens failed to train topk \(exit code 1\):\n  no such option: k"):
        train_and_evaluate(_run(program="saelens"), SIZES, data, command)


def test_a_diverged_autoencoder_has_a_line_without_metrics(data):
    program = """
import torch
from pathlib import Path
from benchmarks.rivals.job import Trained, run

def train(job, batches):
    print("the program prints what it likes")
    assert [batch.shape for batch in batches.take(job.n_steps)] == [(40, 8)] * 12
    return Trained(Path(job.folder) / "none", lambda x: x * torch.nan, 1.0, {}, {"warmup": 3})

run("1.2", train)
"""
    line = train_and_evaluate(_run(program="saelens"), SIZES, data, [sys.executable, "-c", program])
    assert (line["explained_variance"], line["version"], line["changed"]) == (None, "1.2", {"warmup": 3})


def test_a_campaign_prints_lines_and_a_table_and_goes_on_where_it_stopped(store, tmp_path):
    out = tmp_path / "lines.jsonl"
    command = [
        sys.executable, "-m", "benchmarks.peers", "--store", store.path, "--programs", OURS, "--arch", "batchtopk",
        "--k", "3", "--steps", "12", "--batch-images", "4", "--expansion", "4", "--out", out,
    ]  # fmt: skip
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join([".", "cache", "pipeline"])}
    first, second = (
        subprocess.run([*map(str, command)], cwd=ROOT, env=environment, capture_output=True, text=True, check=True)
        for _ in range(2)
    )
    lines, table = first.stdout.split("\n\n", 1)
    assert [json.loads(line)["precision"] for line in lines.splitlines()] == ["fp32", "auto"]
    assert lines == out.read_text().strip()
    assert second.stdout.strip() == table.strip()
    done = subprocess.run(
        [sys.executable, "-m", "benchmarks.peers", "--table", str(out)],
        cwd=ROOT, env=environment, capture_output=True, text=True, check=True,
    )  # fmt: skip
    assert done.stdout.strip() == table.strip()


def test_caches_are_written_and_read_by_the_same_number_of_tokens(store, data, tmp_path, capsys):
    arguments = ["--cache-images", "9", "--cache-rounds", "1", "--cache-folder", str(tmp_path)]
    peers.run(
        peers.parse(["--cache", "--store", str(store.path), "--batch-images", "4", "--programs", OURS, *arguments])
    )
    lines, table = capsys.readouterr().out.split("\n\n")
    for line, dtype in zip(map(json.loads, lines.splitlines()), ("float16", "float32"), strict=True):
        assert (line["dtype"], line["images"], line["tokens_read"]) == (dtype, 8, 80)
        assert line["bytes"] > line["activation_bytes"] == 80 * 8 * np.dtype(dtype).itemsize
        assert min(line["write_s"], line["read_s"]) >= 0
    assert len(table.strip().splitlines()) == 4
    assert [item.name for item in tmp_path.iterdir()] == ["s.zarr"]


def test_a_cache_that_cannot_be_written_is_reported(data, tmp_path, monkeypatch):
    monkeypatch.setitem(caching.CACHES, OURS, "no_such_adapter")
    with pytest.raises(RunFailedError, match=r"cytosae-cache failed to write and read a cache \(exit code 1\):\n"):
        caching.measure_caches(data, (OURS,), tmp_path, n_images=4, rounds=1, n_threads=1, folder=tmp_path)


def test_an_environment_that_cannot_be_made_ends_the_program(store, tmp_path, monkeypatch):
    monkeypatch.setitem(RIVALS, "saelens", RIVALS["saelens"]._replace(requirements=("./no-such-wheel.whl",)))
    place = ["--environments", str(tmp_path / "environments")]
    monkeypatch.setattr(sys, "argv", ["peers", "--store", str(store.path), "--programs", "saelens", *place])
    with pytest.raises(SystemExit, match=r"cannot install saelens in '.*'; the reason is above"):
        peers.main()


def test_a_missing_store_is_one_message(tmp_path, monkeypatch):
    monkeypatch.setattr(sys, "argv", ["peers", "--store", str(tmp_path / "none.zarr")])
    with pytest.raises(SystemExit, match="none.zarr"):
        peers.main()


def _line(**changes):
    values = {
        **_run(program="saelens")._asdict(), "version": "6", "rate": 3e-4, "store": "ab", "latents": 32, "steps": 12,
        "device": "cpu", "batch_images": 4, "encoder": "toy", "images_trained_on": 1000, "images_held_out": 100,
        "tokens_per_image": 10, "d_model": 8, "explained_variance": 0.5, "unexplained": 0.5, "l0": 3.0,
        "dead_share": 0.25, "cpu_s": 10.0, "wall_s": 12.0, "peak_mb": 500.0, "forward_difference": 2e-7,
    }  # fmt: skip
    return {**values, **changes}


def test_the_table_shows_medians_their_spread_and_what_diverged():
    lines = [
        *(_line(seed=seed, explained_variance=value) for seed, value in enumerate((0.5, 0.7, 0.6))),
        _line(settings="tuning", rate=1.0),
        *(_line(settings="tuned", seed=seed, scaled=True, explained_variance=[0.8, None][seed]) for seed in range(2)),
        _line(program=OURS, version="1", precision="auto"),
    ]
    text = make_table(lines)
    assert text.startswith(
        "**topk, k = 3**: toy, 1,000 images of 10 x 8 to train on, 100 held out; 32 latents, 12 steps"
    )
    assert text.endswith("differs from what was read by at most 2.0e-07 of the largest value.")
    rows = [line for line in text.splitlines() if line.startswith("| ")][2:]
    assert rows == [
        "| saelens 6 | default | 0.0003 | 3 | 0.6000 (0.5000 to 0.7000) | 0.5000 | 3.0 | 25.0% | 10 | 12 | 500 |",
        "| saelens 6 | tuned, activations scaled | 0.0003 | 2 | 0.8000, 1 diverged | 0.5000 | 3.0 | 25.0% | 10 | 12 "
        "| 500 |",
        "| cytosae-cache 1 | default --precision auto | 0.0003 | 1 | 0.5000 | 0.5000 | 3.0 | 25.0% | 10 | 12 | 500 |",
    ]


def test_the_table_marks_autoencoders_that_are_not_as_sparse_as_asked():
    text = make_table([_line(l0=3.7), _line(settings="tuned", l0=3.8)])
    assert "| 3.7 | 25.0%" in text
    assert "| 3.8 (\\*) | 25.0%" in text
    assert "(\\*) More latents are active than asked for" in text


def test_the_table_keeps_learning_rates_apart():
    text = make_table([_line(settings="tuned", asked_rate=rate, rate=rate, seed=0) for rate in (1e-3, 1e-4)])
    assert [line.split(" | ")[2:4] for line in text.splitlines() if "tuned" in line] == [
        ["0.0001", "1"],
        ["0.001", "1"],
    ]


def test_the_table_names_programs_without_an_architecture():
    text = make_table([_line(arch="jumprelu", explained_variance=None, forward_difference=None)])
    assert "| 1 diverged | 0.5000 |" in text
    assert (
        "Not in the table: sparsify: its activations are topk and groupmax; overcomplete: it has no matryoshka" in text
    )


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (None, "does not exist: give --table the file"),
        ('{"a": 1}\n{"a":', "line 2 of '.*' is not a whole line of JSON"),
    ],
)
def test_lines_that_cannot_be_read_are_one_message(tmp_path, monkeypatch, text, message):
    path = tmp_path / "lines.jsonl"
    if text is not None:
        path.write_text(text)
    monkeypatch.setattr(sys, "argv", ["peers", "--table", str(path)])
    with pytest.raises(SystemExit, match=message):
        peers.main()


def test_an_interrupted_campaign_says_how_to_go_on(monkeypatch):
    def interrupt(options):
        raise KeyboardInterrupt

    monkeypatch.setattr(peers, "run", interrupt)
    monkeypatch.setattr(sys, "argv", ["peers", "--store", "s"])
    with pytest.raises(SystemExit, match="with --out, the same command goes on where it stopped"):
        peers.main()


def test_environments_have_the_torch_of_our_own_tests():
    assert torch_pin() in (ROOT / "constraints.txt").read_text().splitlines()
    assert torch.__version__.startswith(torch_pin().removeprefix("torch=="))


@pytest.mark.slow
@pytest.mark.skipif(not ENVIRONMENTS, reason="CYTOSAE_TEST_PEERS names no folder of environments")
@pytest.mark.parametrize("scaled", [False, True])
@pytest.mark.parametrize(("program", "arch"), [(name, arch) for name, rival in RIVALS.items() for arch in rival.archs])
def test_other_programs_train_and_are_read_as_they_compute(data, program, arch, scaled):
    if scaled and not RIVALS[program].can_scale:
        pytest.skip("it has no such option")
    command = adapter_command(program, make_environment(program, Path(ENVIRONMENTS)))
    line = train_and_evaluate(_run(program=program, arch=arch, scaled=scaled), SIZES, data, command)
    assert line["forward_difference"] < 1e-5
    assert np.isfinite(line["explained_variance"])
    assert line["rate"] > 0
    assert line["version"] in " ".join(RIVALS[program].requirements)


@pytest.mark.slow
@pytest.mark.skipif(not ENVIRONMENTS, reason="CYTOSAE_TEST_PEERS names no folder of environments")
def test_other_programs_caches_are_written_and_read(data, tmp_path):
    lines = caching.measure_caches(
        data, ("saelens",), Path(ENVIRONMENTS), n_images=8, rounds=1, n_threads=1, folder=tmp_path
    )
    assert [(line["program"], line["tokens_read"]) for line in lines] == [("saelens", 80)] * 2
