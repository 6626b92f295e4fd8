"""How a run's products are computed: measured where it is left open, recorded, and kept when it is resumed."""

import json

import pytest
import torch

from cytosae_pipeline.config import TrainConfig
from cytosae_pipeline.runtime.product_rates import ProductRates
from cytosae_pipeline.training import matmul
from cytosae_pipeline.training.matmul import (
    Products,
    choose_matmul,
    choose_products,
    choose_training_precision,
    fp32_matmul,
    read_products,
)
from cytosae_pipeline.training.runs import prepare_run

CPU = torch.device("cpu")
FAST_BF16 = ProductRates(fp32=2e9, bf16=6e9, sparse=3e8)
SLOW_BF16 = ProductRates(fp32=2e9, bf16=1e9, sparse=3e8)


@pytest.fixture
def rates(monkeypatch) -> list[ProductRates]:
    """What is found when the machine is measured; a processor that says that it multiplies bfloat16."""
    found = [FAST_BF16]
    monkeypatch.setattr(torch.cpu, "_is_avx512_bf16_supported", lambda: True, raising=False)
    monkeypatch.setattr(matmul, "find_rates", lambda d_in: found[0])
    return found


@pytest.mark.parametrize(("multiplies", "found"), [(True, "bf16"), (False, "fp32")])
def test_bfloat16_needs_hardware_that_multiplies_it(monkeypatch, multiplies, found):
    monkeypatch.setattr(torch.cpu, "_is_amx_tile_supported", lambda: False)
    monkeypatch.setattr(torch.cpu, "_is_avx512_bf16_supported", lambda: multiplies)
    assert choose_training_precision("auto", CPU) == found
    assert choose_training_precision("fp32", CPU) == "fp32"
    assert choose_training_precision("bf16", CPU) == "bf16"


def test_a_torch_that_does_not_say_what_the_processor_can_do_gets_float32(monkeypatch):
    monkeypatch.delattr(torch.cpu, "_is_amx_tile_supported", raising=False)
    monkeypatch.delattr(torch.cpu, "_is_avx512_bf16_supported", raising=False)
    assert choose_training_precision("auto", CPU) == "fp32"
    assert choose_training_precision("auto", torch.device("meta")) == "fp32"


def test_the_faster_type_is_taken_and_the_crossover_is_its_own(rates):
    fast = choose_products("auto", CPU, 24)
    assert (fast.precision, fast.sparse_below) == ("bf16", pytest.approx(0.05))
    rates[0] = SLOW_BF16
    slow = choose_products("auto", CPU, 24)
    assert (slow.precision, slow.sparse_below) == ("fp32", pytest.approx(0.15))
    assert slow.explain() == (
        "matrix products in fp32, over active latents alone below 15.0%: measured here in GFLOP/s: fp32 2, bf16 1, "
        "sparse 0"
    )


def test_nothing_is_measured_where_the_precision_is_given_or_on_a_gpu(monkeypatch):
    monkeypatch.setattr(matmul, "find_rates", lambda d_in: pytest.fail("measured"))
    monkeypatch.setattr(matmul, "has_kernels", lambda device: False)
    assert choose_products("bf16", CPU, 24).precision == "bf16"
    assert choose_products("fp32", CPU, 24).explain() == "matrix products in fp32"
    assert choose_products("fp32", torch.device("cuda"), 24) == Products("fp32", 0.0)


def test_a_gpu_uses_active_latents_alone_where_it_has_kernels(monkeypatch):
    monkeypatch.setattr(matmul, "has_kernels", lambda device: device.type == "cuda")
    gpu = torch.device("cuda")
    shares = [choose_products(precision, gpu, 24).sparse_below for precision in ("fp32", "bf16")]
    assert 0 == shares[1] < shares[0] < choose_products("fp32", CPU, 24).sparse_below
    assert fp32_matmul(gpu).sparse_below == shares[0]
    assert choose_products("fp32", torch.device("mps"), 24) == Products("fp32", 0.0)


def test_configurations_follow_products_device_and_budget(monkeypatch):
    monkeypatch.setattr(matmul, "has_kernels", lambda device: False)
    cpu = choose_matmul(Products("bf16", 0.03), CPU, None)
    assert (cpu.dtype, cpu.max_bytes, cpu.sparse_below) == (torch.bfloat16, 1 << 29, 0.03)
    gpu = fp32_matmul(torch.device("cuda"))
    assert (gpu.dtype, gpu.max_bytes, gpu.sparse_below) == (torch.float32, 1 << 32, 0.0)
    assert fp32_matmul(CPU).sparse_below > 0
    assert choose_matmul(Products("fp32", 0.1), CPU, 2.0).max_bytes == 1 << 31


@pytest.mark.parametrize("value", [3, {}, {"sparse_below": "x"}, {"sparse_below": True}, {"sparse_below": -0.1},
                                   {"sparse_below": float("nan")}])  # fmt: skip
def test_a_record_of_something_else_is_refused(value):
    with pytest.raises(ValueError, match=r"products\.sparse_below must be a number from 0 to 1, found"):
        read_products(value, Products("fp32", 0.12))


@pytest.mark.parametrize("unmeasured", [Products("bf16", 0.04), Products("fp32", 0.0)])
def test_what_an_older_version_began_goes_on_as_its_device_does(unmeasured):
    assert read_products(None, unmeasured) == unmeasured
    assert read_products({"sparse_below": 0.3}, unmeasured) == Products(unmeasured.precision, 0.3)


def make_config(with_store, **more) -> TrainConfig:
    return TrainConfig(
        root_dir=with_store.root, dataset_name="toy", model_path=with_store.vit, total_training_tokens=8, batch_size=4,
        expansion_factor=4, **more,
    )  # fmt: skip


@pytest.mark.parametrize("name", [None, "named"])
def test_a_run_keeps_its_products_whatever_is_measured_later(with_store, rates, name):
    from cytosae_pipeline.training.loop import train

    config = make_config(with_store, run_name=name)
    first = train(config)
    record = json.loads((first.folder / "config.json").read_text())
    assert record["products"]["precision"] == record["recipe"]["precision"] == "bf16"
    assert record["products"]["rates"]["fp32"] == 2e9
    for found in (SLOW_BF16, ProductRates(fp32=2e9, bf16=6e9, sparse=1e9)):
        rates[0] = found
        again = prepare_run(config)
        assert again.folder == first.folder
        assert (again.products.precision, again.products.sparse_below) == ("bf16", pytest.approx(0.05))
        assert train(config).status == "already trained"
    assert prepare_run(make_config(with_store, run_name="other")).products.sparse_below == pytest.approx(1 / 6)


def test_a_run_of_an_earlier_version_goes_on_with_what_that_version_did(with_store, rates):
    from cytosae_pipeline.training.loop import train

    config = make_config(with_store, run_name="old")
    path = train(config).folder / "config.json"
    record = json.loads(path.read_text())
    del record["products"]
    path.write_text(json.dumps(record))
    assert prepare_run(config).products == Products("bf16", 0.04)
