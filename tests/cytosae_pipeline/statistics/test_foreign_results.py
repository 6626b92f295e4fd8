"""Results that another program wrote are never replaced without an option; results of ours are."""

import json
import os
import signal
import subprocess
import sys

import numpy as np
import pytest
import torch

from cytosae.analysis.latents import label_entropy
from cytosae.formats.checkpoint import save_sae
from cytosae.sae.registry import make_sae
from cytosae_pipeline.statistics.features import read_features
from tests.support.published import publish
from tests.support.stores import read_files


@pytest.fixture
def published(with_sae):
    """The workspace with published feature data and counts where those of the run belong."""
    options = ("--dataset_name", "toy", "--sae_path", with_sae.sae())
    with_sae.run("features", *options, "--vit_type", "ours")
    folder = with_sae.features()
    publish(read_features(folder.parents[1] / "ours" / "toy"), folder)
    np.save(folder / "cls_sae_cnt.npy", np.ones((4, 96)))
    return with_sae


def test_published_files_are_kept_and_the_message_says_what_to_type(published):
    options = ("--dataset_name", "toy", "--sae_path", published.sae())
    before = read_files(published.features())
    for verb, name in (("features", "max_activating_image_indices.pt"), ("patients", "cls_sae_cnt.npy")):
        output = published.run(verb, *options, code=1).output
        assert f"'{published.features() / name}' was not written by `cytosae-cache {verb}`" in output
        assert "Give another --vit_type or --root_dir, or --replace_foreign" in output
        assert len(output.splitlines()) <= 3
        assert read_files(published.features()) == before
        published.run(verb, *options, "--vit_type", "mine")
        assert read_files(published.features()) == before
    published.run("classes", *options)
    assert before.items() <= read_files(published.features()).items()


def test_published_files_are_replaced_if_told_so(published):
    options = ("--dataset_name", "toy", "--sae_path", published.sae())
    published.run("features", *options, "--replace_foreign")
    published.run("patients", *options, "--replace_foreign")
    assert read_features(published.features()).top_rows.dtype == np.int64
    # From now on they are ours.
    published.run("features", *options)
    published.run("patients", *options)


KILLED_AT_RENAME = """
import os, signal, sys
from pathlib import Path

n, real = 0, Path.rename

def killing(path, target):
    global n
    n += 1
    if n == int(os.environ["KILLED_AT"]):
        os.kill(os.getpid(), signal.SIGKILL)
    return real(path, target)

Path.rename = killing
from cytosae_pipeline.cli.app import main
sys.argv[0] = "cytosae-cache"
main()
"""


@pytest.mark.parametrize(
    ("verb", "other", "at"), [("features", ("--top_k", "3"), 14), ("patients", ("--threshold", "0.3"), 6)]
)
def test_files_of_a_run_that_was_killed_while_it_named_them_are_ours(with_sae, verb, other, at):
    options = ("--dataset_name", "toy", "--sae_path", with_sae.sae())
    with_sae.run(verb, *options)
    folder = with_sae.features()
    before = read_files(folder)
    command = [verb, "--root_dir", with_sae.root, *options, *other]
    killed = subprocess.run(
        [sys.executable, "-c", KILLED_AT_RENAME, *map(str, command)],
        env={**os.environ, "KILLED_AT": str(at)},
        check=False,
    )
    assert killed.returncode == -signal.SIGKILL
    assert not (folder / f"{verb}.json").exists()  # in the middle of the renames
    assert "there already" in with_sae.run(verb, *options).output
    assert read_files(folder) == before
    assert "wrote in" in with_sae.run(verb, *options, *other).output
    assert sorted(read_files(folder)) == sorted(before)


@pytest.mark.parametrize("verb", ["features", "patients", "classes"])
def test_results_of_another_activation_function_are_kept(with_store, verb, messages):
    path = with_store.root / "plain.pt"
    torch.save(make_sae("relu", 24, 96).state_dict(), path)
    options, folder = ("--dataset_name", "toy", "--sae_path", path), with_store.features("plain")
    topk = (*options, "--sae_arch", "topk", "--sae_k", 3)
    with_store.run(verb, *topk)
    with_store.run(verb, *topk)
    before = read_files(folder)
    output = with_store.run(verb, *options, "--sae_arch", "relu", code=1).output
    assert (
        f"'{folder}' contains results of `{verb}` for --sae_arch topk --sae_k 3; those for --sae_arch relu do "
        "not belong beside them. Give another --vit_type or --root_dir, or --replace_foreign to replace them"
    ) in output
    for other in ("report", "features", "classes"):
        output = with_store.run(other, *options, "--sae_arch", "topk", "--sae_k", 4, code=1).output
        assert f"`{verb}` for --sae_arch topk --sae_k 3; those for --sae_arch topk --sae_k 4 do" in output
    with_store.run(verb, *options, "--sae_arch", "relu", "--vit_type", "second")
    assert before.items() <= read_files(folder).items()
    with_store.run(verb, *options, "--sae_arch", "batchtopk", "--sae_threshold", 0.5, "--replace_foreign")
    output = with_store.run(verb, *topk, code=1).output
    assert "for --sae_arch batchtopk --sae_threshold 0.5; those for --sae_arch topk --sae_k 3 do" in output
    # A file under the same name that contains its activation function.
    save_sae(path, make_sae("relu", 24, 96), {})
    output = with_store.run(verb, *options, code=1).output
    assert "0.5; those for an autoencoder without --sae_arch do" in output
    with_store.run(verb, *options, "--replace_foreign")
    save_sae(path, make_sae("relu", 24, 96, seed=1), {})
    messages()
    with_store.run(verb, *options)
    assert f"the results of `{verb}` in '{folder}' belong to another autoencoder: replacing them" in messages()


def test_records_of_older_versions_do_not_name_the_activation_function(with_store):
    path = with_store.root / "plain.pt"
    torch.save(make_sae("relu", 24, 96).state_dict(), path)
    options = ("features", "--dataset_name", "toy", "--sae_path", path, "--sae_arch", "topk", "--sae_k")
    with_store.run(*options, 3)
    record = with_store.features("plain") / "features.json"
    found = json.loads(record.read_text())
    del found["sae_activation"]
    record.write_text(json.dumps(found))
    assert "for another autoencoder or --sae_arch; those" in with_store.run(*options, 4, code=1).output
    with_store.run(*options, 3)
    assert json.loads(record.read_text())["sae_activation"] == {"architecture": "topk", "k": 3, "threshold": None}


def test_the_next_command_repeats_the_activation_function(with_store):
    path = with_store.root / "plain.pt"
    torch.save(make_sae("relu", 24, 96).state_dict(), path)
    output = with_store.run(
        "features", "--dataset_name", "toy", "--sae_path", path, "--sae_arch", "topk", "--sae_k", 3
    ).output
    assert "--sae_arch topk --sae_k 3" in output.split("look at it")[1]


def test_the_label_entropy_is_written_for_notebooks(with_sae):
    with_sae.run("features", "--dataset_name", "toy", "--sae_path", with_sae.sae(), "--top_k", 3)
    found = read_features(with_sae.features())
    entropy = torch.load(with_sae.features() / "top_entropy.pt", weights_only=True)
    expected = label_entropy(found.top_values, found.top_labels, len(found.labels))
    assert entropy.dtype == torch.float32
    np.testing.assert_array_equal(entropy.numpy(), expected.astype(np.float32))
    assert (entropy >= -1e-6).any()
    # No latent has as many images.
    with_sae.run("features", "--dataset_name", "toy", "--sae_path", with_sae.sae(), "--top_k", 30)
    assert (torch.load(with_sae.features() / "top_entropy.pt", weights_only=True) == -1).all()
