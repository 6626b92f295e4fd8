"""Devices and number types are chosen as promised."""

import pytest
import torch

from cytosae_pipeline.errors import UserError
from cytosae_pipeline.runtime.devices import accumulator_device, autocast, choose_device, choose_precision
from cytosae_pipeline.training.matmul import choose_matmul, choose_training_precision


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


@pytest.mark.parametrize(("multiplies", "found"), [(True, "bf16"), (False, "fp32")])
def test_training_takes_bfloat16_where_the_hardware_multiplies_it(monkeypatch, multiplies, found):
    cpu = torch.device("cpu")
    monkeypatch.setattr(torch.cpu, "_is_amx_tile_supported", lambda: False)
    monkeypatch.setattr(torch.cpu, "_is_avx512_bf16_supported", lambda: multiplies)
    assert choose_training_precision("auto", cpu) == found
    assert choose_training_precision("fp32", cpu) == "fp32"
    assert choose_training_precision("bf16", cpu) == "bf16"


def test_a_torch_that_does_not_say_what_the_processor_can_do_gets_float32(monkeypatch):
    monkeypatch.delattr(torch.cpu, "_is_amx_tile_supported", raising=False)
    monkeypatch.delattr(torch.cpu, "_is_avx512_bf16_supported", raising=False)
    assert choose_training_precision("auto", torch.device("cpu")) == "fp32"
    assert choose_training_precision("auto", torch.device("meta")) == "fp32"


def test_products_follow_precision_device_and_budget():
    cpu = choose_matmul("bf16", torch.device("cpu"), None)
    assert (cpu.dtype, cpu.max_bytes) == (torch.bfloat16, 1 << 29)
    assert cpu.sparse_below > 0
    gpu = choose_matmul("fp32", torch.device("cuda"), None)
    assert (gpu.dtype, gpu.max_bytes, gpu.sparse_below) == (torch.float32, 1 << 32, 0.0)
    assert choose_matmul("fp32", torch.device("cpu"), 2.0).max_bytes == 1 << 31
