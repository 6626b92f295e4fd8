"""Devices and number types are chosen as promised."""

import pytest
import torch

from cytosae_pipeline.errors import UserError
from cytosae_pipeline.runtime.devices import accumulator_device, autocast, choose_device, choose_precision


def test_auto_takes_the_best_there_is(monkeypatch):
    for cuda, mps, expected in ((True, True, "cuda"), (False, True, "mps"), (False, False, "cpu")):
        monkeypatch.setattr(torch.cuda, "is_available", lambda there=cuda: there)
        monkeypatch.setattr(torch.backends.mps, "is_available", lambda there=mps: there)
        assert choose_device("auto").type == expected


def test_a_device_that_is_not_there_is_named(monkeypatch):
    monkeypatch.setattr(torch.backends.mps, "is_available", lambda: False)
    with pytest.raises(UserError, match="--device mps was given, but this machine has: .*cpu.* Try --device auto"):
        choose_device("mps")


def test_auto_precision():
    assert choose_precision("auto", torch.device("cuda")) == "fp16"
    assert choose_precision("auto", torch.device("cpu")) == "fp32"
    assert choose_precision("bf16", torch.device("cpu")) == "bf16"


def test_float64_sums_are_kept_off_apples_gpus():
    assert accumulator_device(torch.device("mps")).type == "cpu"
    assert accumulator_device(torch.device("cuda")).type == "cuda"


def test_autocast_changes_the_products_type():
    x = torch.ones(2, 2)
    with autocast("bf16", torch.device("cpu")):
        assert (x @ x).dtype == torch.bfloat16
    with autocast("fp32", torch.device("cpu")):
        assert (x @ x).dtype == torch.float32
