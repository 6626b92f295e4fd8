"""The command line: quick help, both spellings, expected errors as one message, and a stage two without a ViT."""

import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import click
import numpy as np
import pytest
from click.testing import CliRunner

from cytosae_cache.creation import create_store
from cytosae_cache.reading.permutation import spread_rows
from cytosae_cache.reading.reader import StoreReader
from cytosae_cache.shard_data import ShardData
from cytosae_cache.store import ActivationStore
from cytosae_cache.verify import verify_store
from cytosae_cache.writer import StoreWriter
from cytosae_pipeline.cli.app import cli
from cytosae_pipeline.config import BuildConfig, CompareConfig, ExportConfig, StatisticsConfig, TrainConfig
from tests.support.pictures import write_vit

ENVIRONMENT = {**os.environ, "PYTHONPATH": os.pathsep.join([".", "cache", "pipeline"])}
VERBS = [
    "build",
    "import",
    "train",
    "evaluate",
    "compare",
    "features",
    "classes",
    "patients",
    "report",
    "explore",
    "export",
    "list",
    "info",
    "verify",
    "demo",
]


def _python(code: str, **options) -> subprocess.CompletedProcess[str]:
    return subprocess.run([sys.executable, "-c", code], env=ENVIRONMENT, capture_output=True, text=True, **options)


def test_help_needs_no_torch():
    code = (
        "import sys, cytosae_pipeline.cli.app as c; from click.testing import CliRunner\n"
        "for verb in ([], ['build'], ['train'], ['features'], ['demo']):\n"
        "    assert CliRunner().invoke(c.cli, [*verb, '--help']).exit_code == 0\n"
        "heavy = {'torch', 'zarr', 'wandb', 'dask', 'transformers', 'numpy', 'PIL'} & set(sys.modules)\n"
        "assert not heavy, heavy"
    )
    done = _python(code, check=False)
    assert done.returncode == 0, done.stderr


def test_the_help_of_train_begins_with_what_is_needed_most():
    text = CliRunner().invoke(cli, ["train", "--help"]).output
    places = [
        text.index(f"  --{name}") for name in ("dataset-name", "arch", "run-name", "aux-coefficient", "bandwidth")
    ]
    assert places == sorted(places)
    assert text.index("Options of arch jumprelu") < text.index("  --bandwidth") < text.index("Other options")
    command = cli.commands["train"]
    names = [name for section in command.sections.values() for name in section]
    known = {parameter.name for parameter in command.params}
    assert set(names) <= known
    assert len(names) == len(set(names))
    for parameter in command.params:
        assert f"{parameter.opts[0]} " in text or f"{parameter.opts[0]}," in text or f"{parameter.opts[0]}\n" in text


def test_names_cannot_control_the_terminal(with_images):
    first = next(with_images.images.rglob("*.png"), None) or next(with_images.images.rglob("*.jpg"))
    first.with_name("\x1b[2Jred.png").write_bytes(b"no picture")
    output = with_images.build("--strict-images", code=1).output
    assert "\\x1b[2Jred.png" in output
    assert "\x1b" not in output
    output = with_images.build().output + with_images.run("list").output
    assert "\x1b" not in output


def test_importing_the_command_line_does_not_import_torch():
    assert (
        _python("import sys, cytosae_pipeline.cli.app; assert 'torch' not in sys.modules", check=False).returncode == 0
    )


@pytest.mark.parametrize("verb", VERBS)
def test_every_verb_teaches(verb):
    result = CliRunner().invoke(cli, [verb, "--help"])
    assert result.exit_code == 0
    assert "--json" in result.output
    assert "Traceback" not in result.output
    for option in cli.commands[verb].params:
        if isinstance(option, click.Option):
            assert option.help, (verb, option.name)


def test_the_help_lists_every_verb():
    output = CliRunner().invoke(cli, ["--help"]).output
    for verb in VERBS:
        assert re.search(rf"^  {verb}\b", output, re.MULTILINE)
    assert "cytosae-cache demo" in output


@pytest.mark.parametrize(
    ("verb", "record", "left_out", "added"),
    [
        ("build", BuildConfig, set(), {"dry_run"}),
        ("train", TrainConfig, set(), {"sweep", "measure"}),
        ("compare", CompareConfig, set(), set()),
        ("features", StatisticsConfig, {"threshold", "normalize"}, set()),
        ("export", ExportConfig, {"model_path", "images", "layout", "top_k", "threshold", "normalize"}, set()),
    ],
)
def test_options_and_defaults_are_those_of_the_config(verb, record, left_out, added):
    options = {item.name: item for item in cli.commands[verb].params}
    fields = {name: field for name, field in record.__dataclass_fields__.items() if name not in left_out}
    assert set(options) == set(fields) | {"as_json"} | added
    for name, field in fields.items():
        assert options[name].default == field.default, name


def test_underscores_and_dashes_are_the_same(with_store):
    for spelling in ("--dataset_name", "--dataset-name", "--dataset"):
        assert "complete: True" in with_store.run("info", spelling, "toy").output


def test_a_subprocess_runs_a_verb(with_store):
    code = "from cytosae_pipeline.cli.app import main; main()"
    command = [sys.executable, "-c", code, "verify", str(with_store.store)]
    done = subprocess.run(command, env=ENVIRONMENT, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert done.stdout.startswith("sound: 5 shards")


def test_stage_two_runs_without_transformers_and_without_images(with_sae):
    shutil.rmtree(with_sae.images)
    with_sae.vit.unlink()
    block = (
        "import sys\n"
        "class Gone:\n"
        "    def find_spec(self, name, path=None, target=None):\n"
        "        if name.split('.')[0] == 'transformers': raise ImportError('transformers is not installed')\n"
        "sys.meta_path.insert(0, Gone())\n"
        "from cytosae_pipeline.cli.app import main; main()"
    )
    root = ["--root_dir", str(with_sae.root), "--dataset_name", "toy"]
    sae = ["--sae_path", str(with_sae.sae())]
    train = ["--expansion_factor", "2", "--total_training_tokens", "8"]
    for arguments in (
        ["train", *root, *train],
        ["features", *root, *sae],
        ["classes", *root, *sae],
        ["patients", *root, *sae],
    ):
        done = subprocess.run(
            [sys.executable, "-c", block, *arguments], env=ENVIRONMENT, capture_output=True, text=True, check=False
        )
        assert done.returncode == 0, done.stderr


def test_list_names_stores_and_runs(with_sae):
    output = with_sae.run("list").output
    assert re.search(rf"toy +toy_vit +block -2 +23 +5.5 kB float16 +complete +{with_sae.store}", output)
    assert re.search(rf"r +relu +96 .* trained +{with_sae.sae()}", output)
    (with_sae.store / "zarr.json").write_text("{}")
    assert "unusable: " in with_sae.run("list").output


def test_list_of_nothing_says_what_to_type(tmp_path):
    output = CliRunner().invoke(cli, ["list", "--root_dir", str(tmp_path)]).output
    assert "none; build one with: cytosae-cache build --help" in output
    assert "none; train one with: cytosae-cache train --help" in output


def test_verify_finds_damage_and_fails(with_store):
    assert "sound: 5 shards" in with_store.run("verify", "--dataset_name", "toy").output
    shard = with_store.store / "activations" / "c" / "2" / "0" / "0"
    data = bytearray(shard.read_bytes())
    data[77] ^= 4
    shard.write_bytes(data)
    output = with_store.run("verify", with_store.store, code=1).output
    assert "c/2/0/0" in output
    assert "problems in" in output
    assert "--overwrite" in output


def test_deep_verify_computes_again(with_store):
    arguments = ["--dataset_name", "toy", "--deep", "--model_path", with_store.vit]
    assert "sound: 5 shards" in with_store.run("verify", *arguments).output
    changed, vanished = with_store.images / "blast/p0/000.png", with_store.images / "blast/p1/009.png"
    changed.write_bytes((with_store.images / "blast/p2/006.png").read_bytes())
    vanished.unlink()
    output = with_store.run("verify", *arguments, code=1).output
    assert "('blast/p0/000.png'): the image file changed since the store was built" in output
    assert "('blast/p1/009.png'): the image can no longer be read: file not found" in output


def test_deep_verify_finds_numbers_that_the_network_does_not_give(with_store):
    # A store made by a faulty program: every checksum is right, one image's numbers are not.
    store = ActivationStore.open(with_store.store)
    with StoreReader(store) as reader:
        activations = reader.read(np.arange(store.n_images))
    activations[0] *= np.float16(1.1)
    digests, reasons = store.column("images/sha256"), store.column("images/reason")
    table, provenance = store.images, store.provenance
    shutil.rmtree(store.path)
    faulty = create_store(store.path, store.spec, table, provenance, shard_images=23)
    with StoreWriter(faulty) as writer:
        writer.submit(ShardData(0, activations, [bytes(digest) for digest in digests], [str(text) for text in reasons]))
        writer.finish()
    assert verify_store(ActivationStore.open(store.path)).sound
    output = with_store.run("verify", "--dataset_name", "toy", "--deep", "--model_path", with_store.vit, code=1).output
    row = spread_rows(22, 16)[0]
    assert f"row {row} (" in output
    assert "its activations differ from recomputed ones" in output


def test_deep_verify_needs_the_stores_own_network(with_store):
    vit = with_store.vit.rename(with_store.root / "moved.pth")
    output = with_store.run("verify", "--dataset_name", "toy", "--deep", code=1).output
    assert f"with the checkpoint '{with_store.vit}', which is not there any more: pass --model_path PATH" in output
    assert "--deep recomputes activations: pass the network with --model_path" in output
    other = write_vit(with_store.root / "other.pth", seed=1)
    output = with_store.run("verify", with_store.store, "--deep", "--model_path", other, code=1).output
    assert "is not what store" in output
    assert "weights_sha256" in output
    shutil.rmtree(with_store.images)
    output = with_store.run("verify", with_store.store, "--deep", "--model_path", vit, code=1).output
    assert "no images at" in output


def test_no_store_is_one_message(tmp_path):
    result = CliRunner().invoke(cli, ["info", str(tmp_path / "gone.zarr")])
    assert result.exit_code == 1
    assert result.output.startswith("Error: no activation store at")


def test_bugs_keep_their_traceback(with_store, monkeypatch):
    from cytosae_cache.store import ActivationStore

    def bug(self):
        raise ValueError("a bug")

    monkeypatch.setattr(ActivationStore, "describe", bug)
    result = CliRunner().invoke(cli, ["info", str(with_store.store)])
    assert isinstance(result.exception, ValueError)


def test_a_store_by_path_needs_no_name(with_sae):
    with_sae.run(
        "train", "--store", with_sae.store, "--expansion_factor", 2, "--total_training_tokens", 8, "--run_name", "p"
    )
    with_sae.run("features", "--store", with_sae.store, "--sae_path", with_sae.sae("p"))


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="needs /dev/full")
def test_a_result_that_cannot_be_printed_is_one_message(tmp_path):
    command = [
        sys.executable,
        "-c",
        "from cytosae_pipeline.cli.app import main; main()",
        "list",
        "--root_dir",
        tmp_path,
    ]
    with Path("/dev/full").open("w") as full:
        done = subprocess.run(command, stdout=full, stderr=subprocess.PIPE, text=True, check=False)
    assert done.returncode == 1
    assert done.stderr.splitlines() == [
        "Error: the result cannot be written to standard output: No space left on device"
    ]
