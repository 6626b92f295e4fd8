"""The command line in a shell: environment variables and the Tab key."""

import errno
import os
import subprocess
import sys
from pathlib import Path

import click
import pytest
from click.testing import CliRunner

from cytosae_pipeline.cli.app import cli
from cytosae_pipeline.cli.output import messages

ROOT = Path(__file__).parents[3]


def _list(**variables: str) -> str:
    return CliRunner(env=variables).invoke(cli, ["list"]).output


def test_an_environment_variable_names_the_workspace_of_every_verb(with_store):
    root = str(with_store.root)
    assert str(with_store.store) in _list(CYTOSAE_ROOT_DIR=root)
    result = CliRunner(env={"CYTOSAE_ROOT_DIR": root}).invoke(cli, ["info", "--dataset_name", "toy"])
    assert "toy_vit" in result.output


def test_a_verbs_own_variable_comes_first_and_the_command_line_before_both(with_store, tmp_path):
    root, other = str(with_store.root), str(tmp_path / "other")
    assert str(with_store.store) in _list(CYTOSAE_ROOT_DIR=other, CYTOSAE_LIST_ROOT_DIR=root)
    result = CliRunner(env={"CYTOSAE_LIST_ROOT_DIR": other}).invoke(cli, ["list", "--root_dir", root])
    assert str(with_store.store) in result.output


def test_every_option_has_a_variable_with_the_same_checks(with_store):
    arguments = ["train", "--root_dir", str(with_store.root), "--dataset_name", "toy", "--expansion_factor", "2"]
    variables = {
        "CYTOSAE_TRAIN_TOTAL_TRAINING_TOKENS": "8", "CYTOSAE_TRAIN_PRESET": "modern", "CYTOSAE_TRAIN_K": "3",
        "CYTOSAE_TRAIN_RUN_NAME": "v",
    }  # fmt: skip
    result = CliRunner(env=variables).invoke(cli, arguments)
    assert result.exit_code == 0, result.output
    assert "L0 3" in result.output
    result = CliRunner(env={"CYTOSAE_TRAIN_K": "0"}).invoke(cli, arguments)
    assert result.exit_code == 2
    assert "k must be at least 1, found 0" in result.output


def test_messages_repeat_what_a_variable_said(with_store):
    result = CliRunner(env={"CYTOSAE_ROOT_DIR": str(with_store.root)}).invoke(
        cli, ["features", "--dataset_name", "toy", "--sae_path", "none.pt"]
    )
    assert f"cytosae-cache list --root_dir {with_store.root}" in result.output


@pytest.mark.skipif(not Path("/proc/self/mem").exists(), reason="needs /proc")
def test_a_file_that_cannot_be_read_is_one_message(with_sae, tmp_path):
    (tmp_path / "sae.pt").symlink_to("/proc/self/mem")  # reading its beginning fails
    output = with_sae.run("features", "--dataset_name", "toy", "--sae_path", tmp_path / "sae.pt", code=1).output
    assert f"Error: '{tmp_path / 'sae.pt'}' cannot be read: Input/output error" in output
    with_sae.features().mkdir(parents=True)
    notes = with_sae.features() / "latent_notes.json"
    notes.symlink_to("/proc/self/mem")
    output = with_sae.run("report", "--dataset_name", "toy", "--sae_path", with_sae.sae(), code=1).output
    assert f"Error: '{notes}' cannot be used: Input/output error" in output


def test_errors_of_the_system_name_the_file():
    """Where a part of the program does not explain them itself."""
    for code, message in (
        (errno.ESTALE, "'x/y' cannot be used: Stale file handle"),
        (
            errno.EROFS,
            "'x/y' cannot be written: Read-only file system. Make the folder writable, or use another --root",
        ),
    ):
        with pytest.raises(click.ClickException) as caught, messages():
            raise OSError(code, os.strerror(code), "x/y")
        assert caught.value.message.startswith(message)


def test_the_help_says_so():
    assert "CYTOSAE_ROOT_DIR" in CliRunner().invoke(cli, ["--help"]).output
    for verb in ("build", "import", "list", "verify"):
        assert "CYTOSAE_ROOT_DIR" in " ".join(CliRunner().invoke(cli, [verb, "--help"]).output.split())


def _complete(*words: str) -> list[str]:
    environment = {
        **os.environ, "_CYTOSAE_CACHE_COMPLETE": "bash_complete", "COMP_WORDS": " ".join(["cytosae-cache", *words]),
        "COMP_CWORD": str(len(words)),
        "PYTHONPATH": os.pathsep.join(str(ROOT / name) for name in (".", "cache", "pipeline")),
    }  # fmt: skip
    code = "import sys; from cytosae_pipeline.cli.app import main; main()"
    done = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True, check=True)
    return [line.partition(",")[2] for line in done.stdout.splitlines()]


@pytest.mark.parametrize(
    ("words", "completed"),
    [
        (("ev",), ["evaluate"]),
        (("train", "--root"), ["--root-dir"]),
        (("train", "--lr_w"), ["--lr_warm_up_steps", "--lr_warm_up_share"]),
        (("train", "--arch", "ju"), ["jumprelu"]),
        (("build", "--store-d"), ["--store-dtype"]),
    ],
)
def test_the_tab_key_completes(words, completed):
    assert _complete(*words) == completed
