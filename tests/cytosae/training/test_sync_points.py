"""What a step does on a device that the host runs ahead of: the same, and the host seldom waits.

The branches for such devices run here on CPU tensors, and functions that make the host wait for a GPU are counted.
"""

import collections

import pytest
import torch
from torch.overrides import TorchFunctionMode

from cytosae.sae import coo
from cytosae.sae.coo import CooMatrix
from cytosae.sae.registry import ARCHITECTURES
from cytosae.sae.topk import find_nth_largest
from cytosae.training.encoder_blocks import EncoderProduct
from cytosae.training.matmul import MatmulConfig
from tests.cytosae.training.test_fused_loss import DEAD, D, largest_difference, make_case, make_step, make_tokens

WAITING = (
    "__bool__",
    "__float__",
    "__int__",
    "bincount",
    "cpu",
    "item",
    "masked_select",
    "nonzero",
    "tolist",
    "unique",
)
"""Functions that hand numbers to the host, or give a tensor whose shape depends on them."""
WAITS = {
    # The encoder's product is searched, after a sample of it was counted where few may be active; dead latents, and
    # their numbers whenever gradients are read; BatchTopK's threshold; parts of entries.
    "relu": {"__int__": 2, "nonzero": 2, "cpu": 2},
    "topk": {"nonzero": 2, "cpu": 2},
    "batchtopk": {"__bool__": 1, "nonzero": 2, "cpu": 2},
    "matryoshka": {"__bool__": 1, "nonzero": 2, "cpu": 2, "tolist": 2},
    "jumprelu": {"__int__": 2, "nonzero": 4},
    "gated": {"__int__": 2, "nonzero": 5},
}
"""Calls in a step of few active latents, once it has a threshold; clipped, so that gradients are read twice."""


class Waits(TorchFunctionMode):
    """Counts functions that make the host wait; to index with a mask is one of them."""

    def __init__(self) -> None:
        super().__init__()
        self.found: collections.Counter[str] = collections.Counter()

    def __torch_function__(self, function, types, arguments=(), more=None):
        name = getattr(function, "__name__", "")
        if name in WAITING:
            self.found[name] += 1
        elif name in ("__getitem__", "__setitem__"):
            at = arguments[1] if isinstance(arguments[1], tuple) else (arguments[1],)
            masks = [part for part in at if isinstance(part, torch.Tensor) and part.dtype == torch.bool]
            self.found["mask"] += len(masks)
        return function(*arguments, **(more or {}))


@pytest.fixture
def ahead(monkeypatch) -> None:
    """CPU tensors are handled like those of a device that the host runs ahead of."""
    for module in ("sae.masks", "sae.topk"):
        monkeypatch.setattr(f"cytosae.{module}.runs_ahead", lambda device: True)
    for module in ("block_search", "encoder_blocks", "fused_relu", "fused_topk"):
        monkeypatch.setattr(f"cytosae.training.{module}.runs_ahead", lambda device: True)
    monkeypatch.setattr("cytosae.training.encoder_blocks._SAMPLED_TOKENS", 16)


def take_steps(arch: str, dtype: torch.dtype, sparse_below: float) -> tuple[list[torch.Tensor], torch.nn.Module]:
    step = make_step(make_case(arch), MatmulConfig(dtype, sparse_below=sparse_below), max_gradient=0.05)
    return [step.step(make_tokens(seed)).n_fired for seed in range(4)], step.sae


@pytest.mark.parametrize("sparse_below", [0.0, 0.1, 0.9, 1.1])
@pytest.mark.parametrize("arch", ARCHITECTURES)
def test_steps_are_the_same(arch, sparse_below, request):
    expected, wanted = take_steps(arch, torch.float64, sparse_below)
    request.getfixturevalue("ahead")
    found, sae = take_steps(arch, torch.float64, sparse_below)
    assert all(torch.equal(one, other) for one, other in zip(found, expected, strict=True))
    assert largest_difference(sae, wanted) < 1e-9


@pytest.mark.parametrize("arch", ["batchtopk", "matryoshka"])
def test_ties_at_the_threshold_go_to_the_first(arch, request):
    x = make_tokens(dtype=torch.float32)[0].repeat(6, 1)[None]
    results = []
    for _ in range(2):
        step = make_step(make_case(arch, torch.float32), MatmulConfig(torch.bfloat16))
        results.append([step.step(x).n_fired for _ in range(3)])
        request.getfixturevalue("ahead")
    assert all(torch.equal(one, other) for one, other in zip(*results, strict=True))


def test_the_nth_largest_is_that_of_a_sort(request):
    values = torch.tensor([2.0, 5.0, 2.0, -1.0, torch.nan, 5.0, torch.inf])
    ordered = values.sort(descending=True).values
    for _ in range(2):
        for n in range(1, len(values) + 1):
            torch.testing.assert_close(find_nth_largest(values, n), ordered[n - 1], rtol=0, atol=0, equal_nan=True)
        request.getfixturevalue("ahead")


def test_a_sample_is_of_the_whole_batch(ahead, monkeypatch):
    monkeypatch.setattr("cytosae.training.encoder_blocks._SAMPLED_TOKENS", 8)
    sae = make_case("relu", torch.float64)
    x = torch.zeros(64, D, dtype=torch.float64)
    with torch.no_grad():
        sae.b_enc.fill_(-1.0)
        sae.b_dec.zero_()
        x[8:] = 100 * sae.W_enc.detach().t()[:56]  # all but the first tokens have active latents
    product = EncoderProduct(sae, x, MatmulConfig(torch.float64))
    assert product._sample_exceeds(torch.zeros((), dtype=torch.float64), 0.05)


def test_a_batch_may_have_many_active_latents_that_no_sample_shows(ahead, monkeypatch):
    monkeypatch.setattr(EncoderProduct, "_sample_exceeds", lambda self, bound, most: False)
    sae, x = make_case("relu"), make_tokens()[0]
    product = EncoderProduct(sae, (x - sae.b_dec).detach(), MatmulConfig(torch.float64))
    assert product.above_if_few(torch.zeros((), dtype=torch.float64), 0.01) is None


@pytest.mark.parametrize("sampled", [8, 1 << 20])
def test_a_sample_shows_that_many_are_active_before_all_are_encoded(ahead, sampled, monkeypatch):
    monkeypatch.setattr("cytosae.training.encoder_blocks._SAMPLED_LATENTS", sampled)
    sae, x = make_case("relu"), make_tokens()[0]
    product = EncoderProduct(sae, (x - sae.b_dec).detach(), MatmulConfig(torch.float64))
    with monkeypatch.context() as patch:
        patch.setattr(EncoderProduct, "__iter__", lambda self: pytest.fail("all tokens were encoded"))
        for bound in (torch.zeros(()), torch.zeros(len(sae.b_enc))):
            assert product.above_if_few(bound.double(), 0.01) is None
    few = product.above_if_few(torch.full((), 1.0, dtype=torch.float64), 0.5)
    assert few is not None
    assert len(few.values) == (sae.pre_activations(x) > 1.0).sum()


@pytest.mark.parametrize("arch", ARCHITECTURES)
def test_the_host_waits_where_a_number_decides_a_shape_and_nowhere_else(ahead, arch, monkeypatch):
    # A CPU counts its rows otherwise, and need not wait for itself.
    monkeypatch.setattr(CooMatrix, "row_sums", lambda self: coo._sum_segments(self.values.double(), self.bounds()))
    step = make_step(make_case(arch), MatmulConfig(torch.float64, sparse_below=0.9), max_gradient=0.05)
    step.step(make_tokens(0))
    step.tracker.n_steps_since_fired[:DEAD] = 10
    waits, x = Waits(), make_tokens(1)
    with waits:
        step.step(x)
    assert {name: n for name, n in waits.found.items() if n} == WAITS[arch]


def test_what_makes_the_host_wait_is_counted():
    x, waits = torch.arange(4.0), Waits()
    with waits:
        x[x > 1], x[:2], bool(x[0] > 0), x.nonzero(), x.tolist(), torch.bincount(x.long()), int(x[1])
    expected = {"mask": 1, "__bool__": 1, "nonzero": 1, "tolist": 1, "bincount": 1, "__int__": 1}
    assert {name: n for name, n in waits.found.items() if n} == expected
