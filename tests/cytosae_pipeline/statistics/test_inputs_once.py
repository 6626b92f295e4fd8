"""What is loaded once is passed on: counted by recording what a report, a verb and a build really open."""

import shutil
import sys

import numpy as np
import pytest
import torch

from cytosae.backbones import backbone as backbone_module
from cytosae.statistics.block_encoder import BlockEncoder
from cytosae.statistics.histograms import LatentProfiles
from cytosae_cache.reading.reader import StoreReader
from cytosae_cache.store import ActivationStore
from cytosae_pipeline.config import ReportConfig, StatisticsConfig
from cytosae_pipeline.statistics import encode, inputs
from cytosae_pipeline.statistics.features import TENSORS
from cytosae_pipeline.statistics.results import compute_statistics, ensure_statistics
from tests.support.pictures import LAYOUT


class Recorder:
    """Counts calls of functions that do their work as before."""

    def __init__(self, monkeypatch) -> None:
        self._monkeypatch, self.calls = monkeypatch, {}

    def watch(self, owner, name, key=None) -> None:
        original, key = getattr(owner, name), key or name
        self.calls[key] = 0

        def counted(*args, **kwargs):
            self.calls[key] += 1
            return original(*args, **kwargs)

        self._monkeypatch.setattr(owner, name, counted)


@pytest.fixture
def recorder(monkeypatch) -> Recorder:
    return Recorder(monkeypatch)


def _record(recorder) -> None:
    recorder.watch(inputs, "load")
    recorder.watch(ActivationStore, "__init__", "stores opened")
    for name, module in list(sys.modules.items()):
        if name.startswith("cytosae_pipeline") and hasattr(module, "encode_shards"):
            recorder.watch(module, "encode_shards", f"passes by {name}")


def _passes(recorder) -> int:
    return max(count for name, count in recorder.calls.items() if name.startswith("passes"))


def test_a_report_on_a_fresh_store_loads_and_encodes_once(with_sae, recorder):
    from cytosae_pipeline.report import static

    _record(recorder)
    recorder.watch(static, "measure_all")
    arguments = ["--dataset_name", "toy", "--sae_path", with_sae.sae(), "--masking_images", 0]
    output = with_sae.run("report", *arguments).output
    assert "features + patients: " in output
    assert recorder.calls["load"] == 1
    assert recorder.calls["stores opened"] == 1
    assert _passes(recorder) == 1
    assert recorder.calls["measure_all"] == 1
    # Again: results are reused, and one cheap pass measures the featured latents alone.
    with_sae.run("report", *arguments)
    assert recorder.calls["load"] == recorder.calls["stores opened"] == 2
    assert _passes(recorder) == 1
    assert recorder.calls["measure_all"] == 2


def test_a_report_takes_what_is_open_and_computed(with_sae, recorder):
    from cytosae_pipeline.report import static

    config = ReportConfig(root_dir=with_sae.root, dataset_name="toy", sae_path=with_sae.sae(), top_k=3)
    opened = inputs.open_inputs(config, encoder_only=False)
    found = compute_statistics(opened, config, features=True, counts=["patient"], profiles=True, what="all")
    found.save(opened)
    _record(recorder)
    recorder.watch(static, "measure_all")
    page = static.write_report(config, inputs=opened, statistics=found)
    assert page.index.is_file()
    assert recorder.calls["measure_all"] == 1
    assert sum(recorder.calls.values()) == 1


def test_a_store_that_is_built_first_is_passed_on(with_sae, recorder):
    shutil.rmtree(with_sae.store)
    _record(recorder)
    recorder.watch(backbone_module, "weights_sha256")
    source = ["--images", with_sae.images, "--layout", LAYOUT, "--model_path", with_sae.vit]
    output = with_sae.run("features", "--dataset_name", "toy", "--sae_path", with_sae.sae(), *source).output
    assert "building it first" in output
    assert recorder.calls["stores opened"] == 2
    assert recorder.calls["weights_sha256"] == 0  # `ensure` hashed them and passed the digest on


@pytest.mark.parametrize(("verb", "more"), [("features", []), ("patients", []), ("classes", []), ("export", ["csv"])])
def test_every_verb_loads_and_opens_once(with_sae, recorder, verb, more):
    _record(recorder)
    options = ["--format", *more] if more else []
    with_sae.run(verb, "--dataset_name", "toy", "--sae_path", with_sae.sae(), *options)
    assert recorder.calls["load"] == 1
    assert recorder.calls["stores opened"] == 1


def test_a_build_hashes_the_weights_once(with_images, recorder):
    recorder.watch(backbone_module, "weights_sha256")
    with_images.build()
    assert recorder.calls["weights_sha256"] == 1


def _open(place, **more):
    config = StatisticsConfig(root_dir=place.root, dataset_name="toy", sae_path=place.sae(), top_k=3, **more)
    return inputs.open_inputs(config), config


def test_one_pass_gives_what_separate_passes_give(with_sae):
    opened, config = _open(with_sae, threshold=(0.1, 0.5))
    together = compute_statistics(
        opened, config, features=True, counts=["patient", "label"], profiles=True, what="together"
    )
    features = compute_statistics(opened, config, features=True, what="features").features
    for name in TENSORS:
        np.testing.assert_array_equal(getattr(together.features, name), getattr(features, name))
    for kind in ("patient", "label"):
        alone = compute_statistics(opened, config, counts=[kind], what=kind).counts[kind]
        np.testing.assert_array_equal(together.counts[kind].counts, alone.counts)
        np.testing.assert_array_equal(together.counts[kind].normalised, alone.normalised)
    assert not (opened.folder / "features.json").exists()


def test_profiles_of_a_pass_are_those_of_all_activations(with_sae):
    opened, config = _open(with_sae)
    found = compute_statistics(opened, config, profiles=True, what="profiles").profiles
    labels = torch.from_numpy(inputs_labels(opened.store))
    plain = LatentProfiles(opened.n_latents, 3)
    seen = []

    def collect(images, latents, acts):
        seen.append(acts)

    with StoreReader(opened.store) as reader:
        for row in opened.store.valid_rows.tolist():
            encoder = BlockEncoder(opened.sae)
            encoder.reduce(torch.from_numpy(reader.read(np.array([row]))), row, on_acts=collect)
            plain.update(torch.cat(seen, dim=2), labels[row : row + 1])
            seen.clear()
    for mine, theirs in zip(found, plain.result(), strict=True):
        assert torch.equal(mine, theirs)
    some = np.array([5, 0, 17])
    assert torch.equal(found.take(some).histogram, found.histogram[torch.from_numpy(some)])
    assert torch.equal(found.take(some).n_images, found.n_images)


def inputs_labels(store):
    names = sorted({name for name in store.images.label if name})
    return np.array([names.index(name) if name else -1 for name in store.images.label])


def test_what_was_saved_is_what_was_computed(with_sae):
    opened, config = _open(with_sae)
    computed = ensure_statistics(opened, config, counts=["patient"])
    reused = ensure_statistics(opened, config, counts=["patient"], profiles=True)
    assert reused.profiles is None
    pairs = [
        (computed.features, reused.features),
        (computed.features.specificity, reused.features.specificity),
        (computed.counts["patient"], reused.counts["patient"]),
    ]
    for mine, theirs in pairs:
        for name, value in vars(mine).items():
            if name != "specificity":
                np.testing.assert_array_equal(value, getattr(theirs, name))
    assert encode.rows_at_once(config) == 64
