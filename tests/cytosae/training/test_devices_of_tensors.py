"""Every tensor is made on a device that the code names, which shows without a GPU.

On `meta` tensors the closed forms also run at full size, in no time. Those of architectures that choose latents cannot,
nor the others where few are active: how many depends on numbers, which `meta` tensors do not have. Of the sparse
products, torch has none at given entries for `meta`.
"""

import pytest
import torch
from torch.overrides import TorchFunctionMode

from cytosae.sae.coo import CooMatrix
from cytosae.sae.loss import LossInputs, LossWeights
from cytosae.sae.registry import ARCHITECTURES, make_sae
from cytosae.statistics.accumulators import FeatureStatistics, GroupCounts
from cytosae.statistics.block_encoder import BlockEncoder
from cytosae.statistics.fidelity import FidelityStatistics
from cytosae.statistics.label_activity import LabelActivity
from cytosae.training.fused_loss import find_fused_loss
from cytosae.training.geometric_median import geometric_median
from cytosae.training.gradients import blocks_of_latents
from cytosae.training.matmul import MatmulConfig
from cytosae.training.metrics import explained_variance
from tests.cytosae.training.test_fused_loss import make_case, make_step, make_tokens

OF_ALL_LATENTS = ("relu", "jumprelu", "gated")


MAKERS = {
    getattr(torch, name)
    for name in (
        "arange", "empty", "empty_strided", "eye", "full", "linspace", "logspace", "ones", "rand", "randint", "randn",
        "randperm", "scalar_tensor", "sparse_coo_tensor", "sparse_csr_tensor", "tensor", "zeros",
    )
}  # fmt: skip
"""Functions that make a tensor on the default device unless one is given."""


class NamedDevices(TorchFunctionMode):
    """Within it, to make a tensor without naming a device is an error."""

    def __torch_function__(self, function, types, arguments=(), more=None):
        more = more or {}
        assert function not in MAKERS or more.get("device") is not None, f"{function.__name__} without a device"
        return function(*arguments, **more)


def test_a_tensor_without_a_device_is_noticed():
    x = torch.ones(3)
    with NamedDevices():
        assert len(x.new_zeros(2) + torch.arange(2, device="cpu")) == 2
        with pytest.raises(AssertionError, match="arange without a device"):
            torch.arange(2)


@pytest.mark.parametrize("sparse_below", [0.0, 1.1])
@pytest.mark.parametrize("fused", [True, False])
@pytest.mark.parametrize("arch", ARCHITECTURES)
def test_steps_name_the_device_of_every_tensor(arch, fused, sparse_below):
    matmul = MatmulConfig(torch.float64, sparse_below=sparse_below) if fused else None
    step = make_step(make_case(arch), matmul, max_gradient=0.05)
    for x in [make_tokens(seed) for seed in range(3)]:
        with NamedDevices():
            step.step(x)


@pytest.mark.parametrize("arch", ARCHITECTURES)
def test_what_inference_and_initialisation_make_is_on_their_device(arch):
    sae = make_case(arch)
    x = make_tokens()[0]
    with NamedDevices(), torch.no_grad():
        sae.fit_to_tokens_(x)
        sae.calibrate_(x)
        found = sae(x)
        explained_variance(x, found.reconstruction)
        geometric_median(x)
        sae.normalise_decoder_()
    assert {part.device.type for part in (*sae.state_dict().values(), *found)} == {"cpu"}


def test_statistics_name_the_device_of_every_tensor():
    sae, x = make_sae("relu", 16, 96, device="cpu"), torch.randn(11, 5, 16)
    rows, labels = torch.arange(11), torch.arange(11) % 3 - 1
    cpu = torch.device("cpu")
    with NamedDevices():
        pooled = BlockEncoder(sae, (0.1,)).reduce(x, 3)
        features, groups = FeatureStatistics(96, 4, device=cpu), GroupCounts(2, 96, 1, device=cpu)
        activity, fidelity = LabelActivity(96, 2, device=cpu), FidelityStatistics(16, 96, 2, device=cpu)
        features.update(rows, pooled.scores)
        groups.update(labels, pooled.counts)
        activity.update(labels, pooled.scores)
        acts = sae.encode(x.flatten(0, 1))
        fidelity.update(x.flatten(0, 1), torch.count_nonzero(acts, dim=0), sae.decode(acts), 1)
        results = [*features.result(), *activity.result(), groups.counts, groups.n_images]
        assert fidelity.overall().n_tokens == 55
    assert {part.device.type for part in results} == {"cpu"}


def test_sparse_matrices_name_the_device_of_every_tensor():
    matrix = torch.relu(torch.randn(20, 30, dtype=torch.float64))
    left, right = torch.randn(20, 6, dtype=torch.float64), torch.randn(30, 6, dtype=torch.float64)
    with NamedDevices():
        entries = CooMatrix.from_dense(matrix).sort().drop_zeros()
        results = [
            entries.matmul(right), entries.transpose().matmul(left), entries.sampled_matmul(left, right),
            entries.row_sums(), entries.split_rows([2, 9])[0].values, entries.split_columns([0, 2, 30])[1].values,
        ]  # fmt: skip
    torch.testing.assert_close(results[0], matrix @ right)
    assert {part.device.type for part in results} == {"cpu"}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("arch", OF_ALL_LATENTS)
def test_closed_forms_of_all_latents_fit_together_at_full_size(arch, dtype):
    n, d, s = 4112, 768, 49_152
    sae = make_sae(arch, d, s, device="meta")
    x = torch.empty(n, d, device="meta")
    inputs = LossInputs(torch.empty((), device="meta"), LossWeights(l1_coefficient=1e-3), dtype)
    loss, gradients = find_fused_loss(sae)(sae, x, inputs, MatmulConfig(dtype, 1 << 28, sparse_below=0.0))
    gradients.store_(sae)
    assert loss.n_fired.shape == (s,)
    assert (loss.reconstruction.shape, loss.reconstruction.dtype) == ((n, d), torch.float32)
    for parameter in sae.parameters():
        assert parameter.grad is not None
        assert (parameter.grad.shape, parameter.grad.dtype) == (parameter.shape, torch.float32)


def test_sparse_products_have_their_shapes_at_full_size():
    n, d, s, n_active = 4112, 768, 49_152, 32 * 4112
    at = torch.empty(n_active, dtype=torch.int64, device="meta")
    left, right = torch.empty(n, d, device="meta"), torch.empty(s, d, device="meta")
    entries = CooMatrix(at, at, torch.empty(n_active, device="meta"), (n, s)).sort()
    assert entries.matmul(right).shape == (n, d)
    assert entries.transpose().matmul(left).shape == (s, d)
    assert entries.row_lengths().shape == (n,)


@pytest.mark.parametrize("n_latents", [1, 1024, 49_152, 50_001])
def test_blocks_of_latents_cover_all_and_are_few_on_a_gpu(n_latents):
    counts = []
    for name in ("cpu", "cuda"):
        blocks = list(blocks_of_latents(n_latents, torch.device(name)))
        assert [at for block in blocks for at in range(block.start, block.stop)] == list(range(n_latents))
        counts.append(len(blocks))
    assert counts[1] <= 4
    assert counts[1] <= counts[0]
