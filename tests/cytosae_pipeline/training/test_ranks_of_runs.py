"""Ranks that see other stores or folders than rank 0 are refused, and so are weights that differ."""

import shutil
from dataclasses import replace

import pytest
import torch

from cytosae_cache.reading.concat import ConcatReader
from cytosae_cache.reading.reader import StoreReader
from cytosae_pipeline.config import TrainConfig
from cytosae_pipeline.training.init import DataInit
from cytosae_pipeline.training.runs import TrainingError, prepare_together
from cytosae_pipeline.training.trainer import Trainer
from tests.support.stores import make_activations, make_store
from tests.support.worlds import run_ranks

_OPTIONS = {"run_name": "r", "expansion_factor": 2, "batch_size": 4, "total_training_tokens": 40, "precision": "fp32"}


def _config(root, store, **more):
    return TrainConfig(root_dir=root, store=str(store), device="cpu", **_OPTIONS, **more)


def _make_trainer(run):
    with StoreReader(run.store) as reader:
        return Trainer(run, DataInit(ConcatReader([reader]), run.stores, choice="all"), None)


def test_ranks_must_read_the_same_activations(tmp_path):
    stores = [make_store(tmp_path / f"{seed}" / "s.zarr", make_activations(11, seed=seed)).path for seed in (1, 2)]
    same = run_ranks(2, lambda world: prepare_together(_config(tmp_path, stores[0]), world).folder)
    assert same[0] == same[1]
    with pytest.raises(TrainingError, match=r"rank 1 finds other activations in .* than rank 0: all processes must"):
        run_ranks(2, lambda world: prepare_together(_config(tmp_path, stores[world.rank]), world))


def test_ranks_must_see_the_same_folder(tmp_path):
    store = make_store(tmp_path / "s.zarr", make_activations(11)).path
    run = run_ranks(1, lambda world: prepare_together(_config(tmp_path, store), world))[0]
    run.folder.mkdir(parents=True)
    trainer = _make_trainer(run)
    trainer.train_on(torch.randn(4, *run.store.spec.image_shape), 4, {})
    trainer.save_state()
    elsewhere = tmp_path / "elsewhere"
    shutil.copytree(run.folder, elsewhere)
    resumed = run_ranks(2, lambda world: _make_trainer(replace(run, world=world)).samples_seen)
    assert resumed == [4, 4]
    for path in replace(run, folder=elsewhere).state_paths:
        path.unlink()
    folders = [run.folder, elsewhere]
    with pytest.raises(TrainingError, match=r"rank 1 resumes run 'elsewhere' after 0 images, and rank 0 after 4: all"):
        run_ranks(2, lambda world: _make_trainer(replace(run, world=world, folder=folders[world.rank])))


def test_weights_that_differ_between_ranks_are_not_saved(tmp_path):
    store = make_store(tmp_path / "s.zarr", make_activations(11)).path
    run = run_ranks(1, lambda world: prepare_together(_config(tmp_path, store), world))[0]
    run.folder.mkdir(parents=True)
    x = torch.randn(4, *run.store.spec.image_shape)

    def work(world):
        trainer = _make_trainer(replace(run, world=world))
        with torch.no_grad():
            trainer.step.sae.b_enc[1] += world.rank
        trainer.train_on(x[world.share(4)], 4, {}, True)

    with pytest.raises(TrainingError, match="no longer have the same weights: rank 1 differs from rank 0"):
        run_ranks(2, work)
    assert not list(run.folder.glob("*.pt"))
