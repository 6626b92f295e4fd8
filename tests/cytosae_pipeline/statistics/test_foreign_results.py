"""Results that another program wrote are never replaced unasked; results of ours always are."""

import numpy as np
import pytest
import torch

from cytosae.analysis.latents import label_entropy
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


def test_files_of_a_run_that_was_killed_while_it_wrote_them_are_ours(with_sae, monkeypatch):
    options = ("--dataset_name", "toy", "--sae_path", with_sae.sae())
    for verb, module in (("features", "features"), ("patients", "counts")):
        with_sae.run(verb, *options)

        def killed(*_):
            raise KeyboardInterrupt

        with monkeypatch.context() as patch:
            patch.setattr(f"cytosae_pipeline.statistics.{module}.write_record", killed)
            with_sae.run(verb, *options, code=130)
        assert not (with_sae.features() / f"{verb}.json").exists()
        with_sae.run(verb, *options)
        assert (with_sae.features() / f"{verb}.json").exists()
        assert not list(with_sae.features().glob("*.unfinished"))


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
