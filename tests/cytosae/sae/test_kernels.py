"""Where our kernels are used, and what of them can be tested without a GPU: numbers, machine code and launches."""

import gc
import os
import re
import subprocess
import sys
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest
import torch

from cytosae.sae import kernels
from cytosae.sae.coo import CooMatrix

ROOT = Path(__file__).parents[3]
NO_TRITON = "needs Triton: pip install -e '.[gpu-tests]'"
N_ROWS, N = 9, 5000


class AbsentDriver:
    """Takes the place of a GPU's driver: kernels are compiled for it, and their launches are recorded."""

    def __init__(self, capability: int) -> None:
        self.launched: list[tuple[str, tuple[int, ...], Any]] = []
        self._capability = capability
        self.utils = SimpleNamespace(
            get_device_properties=lambda device: {"max_shared_mem": 101_376},
            load_binary=lambda *arguments: (1, 2, 32, 0, 1024),
            unload_module=lambda module: None,
        )

    def get_current_device(self) -> int:
        return self._capability  # Triton keeps what it compiled by device

    def get_current_stream(self, device: int) -> int:
        return 0

    def get_current_target(self) -> Any:
        from triton.backends.compiler import GPUTarget

        return GPUTarget("cuda", self._capability, 32)

    def launcher_cls(self, source: Any, metadata: Any) -> Any:
        return lambda *arguments: self.launched.append((metadata.name, arguments[:3], metadata))


@pytest.fixture(params=[80, 90])
def driver(request, tmp_path, monkeypatch) -> AbsentDriver:
    pytest.importorskip("triton", reason=NO_TRITON)
    from triton.runtime.driver import driver as drivers

    from cytosae.sae import triton_kernels
    from cytosae.training import triton_activations, triton_adam, triton_topk

    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path))
    absent = AbsentDriver(request.param)
    monkeypatch.setattr(drivers, "_active", absent)
    yield absent
    # What was compiled goes with the driver that it was compiled for.
    for module in (triton_kernels, triton_activations, triton_adam, triton_topk):
        for kernel in vars(module).values():
            if hasattr(kernel, "device_caches"):
                kernel.device_caches.clear()
    absent.launched.clear()
    gc.collect()


@pytest.mark.parametrize("width", [768, 100, 1])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_kernels_compile_to_machine_code_without_a_gpu(driver, tmp_path, dtype, width):
    from cytosae.sae import triton_kernels

    at, table = torch.zeros(N, dtype=torch.int64), torch.zeros(N_ROWS - 1, width, dtype=dtype)
    assert triton_kernels.sum_rows(at, at, torch.zeros(N), at[:N_ROWS], table).shape == (N_ROWS - 1, width)
    assert triton_kernels.multiply_sampled(at, at, table, table).shape == (N,)
    n_blocks, n_marks = -(-width // 512), 4
    assert [launched[:2] for launched in driver.launched] == [
        ("sum_pieces", (N_ROWS - 1 + n_marks, n_blocks, 1)),
        ("join_pieces", (n_marks, n_blocks, 1)),
        ("sample_products", (1250, 1, 1)),
    ]
    assert all(launched[2].enable_fp_fusion for launched in driver.launched)
    code = {path.stem: path.read_text() for path in tmp_path.rglob("*.ptx")}
    assert (
        code.keys() == {"sum_pieces", "join_pieces", "sample_products"} == {p.stem for p in tmp_path.rglob("*.cubin")}
    )
    for name, text in code.items():
        assert not re.search(r"\b(mma|wgmma|atom|red)\b|tf32", text), f"{name} is not plain float32 in a fixed order"
        assert "fma.rn.f32" in text or name == "join_pieces"
        wide = "ld.global.v4.b32" if dtype == torch.float32 else r"ld\.global\.v[24]\.b32"
        assert name == "join_pieces" or width % 16 or re.search(wide, text), f"{name} reads one number at a time"


@pytest.mark.parametrize("m", [49152, 4097, 1])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("shape_of_bound", [(), ("m",), (N_ROWS, 1)])
def test_searches_compile_to_machine_code_without_a_gpu(driver, tmp_path, dtype, m, shape_of_bound):
    from cytosae.sae import triton_kernels

    pre = torch.zeros(N_ROWS, m, dtype=dtype)
    bound = torch.zeros([m if size == "m" else size for size in shape_of_bound], dtype=dtype)
    ends = triton_kernels.count_above(pre, bound)
    rows, columns, values = triton_kernels.take_above(pre, bound, ends, 5)
    assert rows.shape == columns.shape == values.shape == (5,)
    assert ends.shape == (N_ROWS * -(-m // 256),)
    n = N_ROWS * -(-m // 4096)
    assert [launched[:2] for launched in driver.launched] == [("count_chunks", (n, 1, 1)), ("take_chunks", (n, 1, 1))]
    code = {path.stem: path.read_text() for path in tmp_path.rglob("*.ptx")}
    assert code.keys() == {"count_chunks", "take_chunks"} == {path.stem for path in tmp_path.rglob("*.cubin")}
    for name, text in code.items():
        assert not re.search(r"\b(atom|red)\b|\.ftz", text), f"{name} adds in any order, or loses small numbers"
        assert m % 16 or "ld.global.v4.b32" in text, f"{name} reads fewer than 16 bytes at once"


@pytest.mark.parametrize("m", [49152, 4097, 1])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(("rule", "n_vectors"), [("relu", 0), ("jumprelu", 1), ("gated", 3)])
def test_activation_functions_compile_to_machine_code_without_a_gpu(driver, tmp_path, rule, n_vectors, dtype, m):
    from cytosae.training import triton_activations

    matrices, vectors = [torch.zeros(N_ROWS, m, dtype=dtype) for _ in range(4)], [torch.zeros(m)] * n_vectors
    n_decoded = 2 if rule == "gated" else 1
    sums = triton_activations.activate(rule, matrices[0], matrices[1:][:n_decoded], vectors)
    assert sums.shape == (1 + n_decoded, m)
    n_summed = {"relu": 1, "jumprelu": 3, "gated": 4}[rule]
    sums = triton_activations.differentiate(
        rule, matrices[0], matrices[1], matrices[2:][:n_decoded], (vectors, 0.5), n_summed
    )
    assert sums.shape == (n_summed, m)
    names = ["activate_columns", "differentiate_columns"]
    assert [launched[:2] for launched in driver.launched] == [(name, (-(-m // 128), 1, 1)) for name in names]
    code = {path.stem: path.read_text() for path in tmp_path.rglob("*.ptx")}
    assert sorted(code) == names == sorted(path.stem for path in tmp_path.rglob("*.cubin"))
    for name, text in code.items():
        assert not re.search(r"\b(atom|red)\b|\.ftz", text), f"{name} adds in any order, or loses small numbers"
        assert m % 16 or "ld.global.v4.b32" in text, f"{name} reads fewer than 16 bytes at once"


@pytest.mark.parametrize("width", [768, 100, 1])
@pytest.mark.parametrize(
    "options",
    [
        {"on_sphere": False, "scale": None, "kept": None},
        {"on_sphere": True, "scale": torch.ones(()), "kept": torch.ones(N_ROWS)},
    ],
)
def test_adam_compiles_to_machine_code_without_a_gpu(driver, tmp_path, width, options):
    from cytosae.training import triton_adam

    parts = [torch.zeros(N_ROWS, width) for _ in range(4)]
    triton_adam.update_rows(*parts, n_steps=1, lr=0.1, beta1=0.9, beta2=0.999, eps=1e-8, **options)
    assert [launched[:2] for launched in driver.launched] == [("update_row", (N_ROWS, 1, 1))]
    (code,) = (path.read_text() for path in tmp_path.rglob("*.ptx"))
    assert not re.search(r"\b(atom|red)\b|\.ftz", code), "it adds in any order, or loses small numbers"
    assert width % 16 or "ld.global.v4.b32" in code, "it reads fewer than 16 bytes at once"


@pytest.mark.parametrize(("m", "k"), [(49152, 32), (4097, 1), (1, 1)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_searches_for_the_largest_compile_to_machine_code_without_a_gpu(driver, tmp_path, dtype, m, k):
    from cytosae.training import triton_topk

    assert triton_topk.can_find(m, k)
    values, columns = triton_topk.find_largest(torch.zeros(N_ROWS, m, dtype=dtype), k)
    assert (values.shape, values.dtype, columns.shape, columns.dtype) == ((9, k), dtype, (9, k), torch.int64)
    names = ["bound_rows", "take_candidates", "keep_largest"]
    assert [launched[:2] for launched in driver.launched] == [(name, (N_ROWS, 1, 1)) for name in names]
    code = {path.stem: path.read_text() for path in tmp_path.rglob("*.ptx")}
    assert sorted(code) == sorted(names) == sorted(path.stem for path in tmp_path.rglob("*.cubin"))
    for name, text in code.items():
        assert not re.search(r"\b(atom|red)\b|\.ftz", text), f"{name} adds in any order, or loses small numbers"
        assert name == "keep_largest" or m % 16 or "ld.global.v4.b32" in text, f"{name} reads few bytes at once"


def test_normalising_compiles_to_machine_code_without_a_gpu(driver, tmp_path):
    from cytosae.sae import triton_kernels

    triton_kernels.normalise_rows_(torch.ones(N_ROWS, 768), 1e-30)
    assert [launched[:2] for launched in driver.launched] == [("normalise_row", (N_ROWS, 1, 1))]
    (code,) = (path.read_text() for path in tmp_path.rglob("*.ptx"))
    assert not re.search(r"\b(atom|red)\b|\.ftz", code), "it adds in any order, or loses small numbers"
    assert "ld.global.v4.b32" in code, "it reads fewer than 16 bytes at once"


@pytest.mark.slow
def test_numbers_are_right_in_tritons_interpreter():
    pytest.importorskip("triton", reason=NO_TRITON)
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "-m", "not gpu"]
    environment = {**os.environ, "TRITON_INTERPRET": "1"}
    environment.pop("PYTEST_XDIST_WORKER", None)
    done = subprocess.run(
        [*command, "tests/gpu/test_triton_kernels.py", "tests/gpu/test_step_kernels.py"], cwd=ROOT, env=environment,
        capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stdout + done.stderr
    assert re.search(r"\d\d passed", done.stdout), done.stdout
    assert "skipped" not in done.stdout, done.stdout


def test_no_kernel_is_used_or_imported_on_a_cpu():
    matrix = CooMatrix.from_dense(torch.eye(3))
    assert kernels.find_kernels(torch.ones(3, 2), matrix.values) is None
    assert not kernels.has_kernels(torch.device("cpu"))
    assert not kernels.has_kernels(torch.device("mps"))
    code = (
        "import sys, torch\n"
        "from cytosae.sae.loss import LossWeights\n"
        "from cytosae.sae.registry import make_sae\n"
        "from cytosae.training.matmul import MatmulConfig\n"
        "from cytosae.training.step import TrainStep\n"
        "options = dict(lr=1e-3, weights=LossWeights(), use_ghost_grads=False, dead_feature_window=1)\n"
        "TrainStep(make_sae('topk', 8, 32, k=3), matmul=MatmulConfig(), **options).step(torch.randn(1, 9, 8))\n"
        "assert 'cytosae.sae.kernels' in sys.modules\n"
        "assert not [name for name in sys.modules if name.startswith('cytosae') and 'triton_' in name]\n"
    )
    subprocess.run([sys.executable, "-c", code], cwd=ROOT, check=True)


@pytest.mark.skipif(torch.cuda.is_available(), reason="this machine has a CUDA device")
def test_no_kernel_is_used_without_a_gpu():
    assert not kernels.has_kernels(torch.device("cuda"))


def fake_tensor(dtype: torch.dtype = torch.float32, requires_grad: bool = False) -> Any:
    """As much of a tensor on a GPU as a choice of kernels looks at."""
    return SimpleNamespace(device=torch.device("cuda", 0), dtype=dtype, requires_grad=requires_grad)


def test_kernels_are_for_float32_and_bfloat16_without_autograd(monkeypatch):
    mine = ModuleType("mine")
    monkeypatch.setattr(kernels, "_load", lambda number, name: mine)
    plain, wide = fake_tensor(), fake_tensor(torch.float64)
    assert kernels.find_kernels(plain, fake_tensor(torch.bfloat16)) is mine
    assert kernels.find_kernels(wide, plain) is None
    assert kernels.find_kernels(plain, wide) is None
    learned = fake_tensor(requires_grad=True)
    for pair in ((learned, plain), (plain, learned)):
        assert kernels.find_kernels(*pair) is None
        with torch.no_grad():
            assert kernels.find_kernels(*pair) is mine
    with kernels.without_kernels():
        assert kernels.find_kernels(plain, plain) is None
        assert not kernels.has_kernels(torch.device("cuda", 0))
    assert kernels.find_kernels(plain, plain) is mine


@pytest.fixture
def new_gpu(monkeypatch) -> None:
    """This machine seems to have a GPU that Triton supports."""
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda number: (9, 0))
    monkeypatch.setattr(torch.version, "hip", None)
    monkeypatch.setattr(kernels, "_said", set())
    monkeypatch.setattr(kernels.importlib.util, "find_spec", lambda name: object())


def test_a_triton_that_does_not_work_is_one_warning(new_gpu, monkeypatch, caplog):
    def fail(name: str) -> None:
        raise RuntimeError("Failed to find C compiler.\nPlease specify via CC")

    monkeypatch.setattr(kernels.importlib, "import_module", fail)
    assert kernels._load.__wrapped__(0, kernels.PRODUCTS) is None
    assert caplog.messages == [
        "Triton kernels of cytosae.sae.triton_kernels do not work here, so torch's own functions are used: "
        "RuntimeError: Failed to find C compiler."
    ]
    assert kernels._load.__wrapped__(0, "cytosae.training.triton_adam") is None
    assert len(caplog.messages) == 1


def test_kernels_that_compute_something_else_are_not_used(new_gpu, monkeypatch, caplog):
    wrong = SimpleNamespace(find_problem=lambda device: f"its sums differ on {device}")
    monkeypatch.setattr(kernels.importlib, "import_module", lambda name: wrong)
    assert kernels._load.__wrapped__(0, kernels.PRODUCTS) is None
    assert caplog.messages == [
        "Triton kernels of cytosae.sae.triton_kernels do not work here, so torch's own functions are used: its sums "
        "differ on cuda:0"
    ]
    wrong.find_problem = lambda device: None
    assert kernels._load.__wrapped__(0, kernels.PRODUCTS) is wrong


def test_wrong_products_and_searches_are_found_when_they_are_tried_out(monkeypatch):
    pytest.importorskip("triton", reason=NO_TRITON)
    from cytosae.sae import triton_kernels

    right = {
        "sum_rows": lambda rows, columns, values, bounds, table: CooMatrix(rows, columns, values, (40, 40)).matmul(
            table
        ),
        "multiply_sampled": lambda rows, columns, left, right: (left[rows] * right[columns]).sum(1),
        "normalise_rows_": lambda matrix, smallest: matrix.div_(matrix.norm(dim=1, keepdim=True)),
        "count_above": lambda pre, bound: (pre > bound).flatten().cumsum(0),
        "take_above": lambda pre, bound, *more: (*(pre > bound).nonzero(as_tuple=True), pre[pre > bound]),
    }
    for name, function in right.items():
        monkeypatch.setattr(triton_kernels, name, function)
    assert triton_kernels.find_problem(torch.device("cpu")) is None
    for name, fault, message in (
        (
            "sum_rows",
            lambda *parts: 1.001 * right["sum_rows"](*parts),
            "its matrix product differs from torch's by 1.0e-03, more than 1e-05",
        ),
        (
            "multiply_sampled",
            lambda *parts: torch.full((len(parts[0]),), torch.nan),
            "sampled product differs from torch's by nan",
        ),
        ("normalise_rows_", lambda matrix, smallest: matrix.div_(1.5), "its row of norm 1 differs from torch's by"),
        ("count_above", lambda pre, bound: torch.tensor([3]), "counts 3 positive entries, torch 272"),
        ("take_above", lambda pre, *more: [pre.t()[pre.t() > 0]] * 3, "finds other positive entries than torch"),
    ):
        monkeypatch.setattr(triton_kernels, name, fault)
        assert message in (triton_kernels.find_problem(torch.device("cpu")) or "")
        monkeypatch.setattr(triton_kernels, name, right[name])


def test_wrong_largest_entries_are_found_when_they_are_tried_out(monkeypatch):
    pytest.importorskip("triton", reason=NO_TRITON)
    from cytosae.training import triton_topk

    def unordered(pre, k):
        values, columns = pre.topk(k, dim=1)
        return values.relu(), columns

    def right(pre, k):
        values, columns = unordered(pre, k)
        order = torch.where(values > 0, columns, pre.shape[1]).argsort(dim=1, stable=True)
        return values.gather(1, order), columns.gather(1, order)

    cpu = torch.device("cpu")
    monkeypatch.setattr(triton_topk, "find_largest", right)
    assert triton_topk.find_problem(cpu) is None
    monkeypatch.setattr(triton_topk, "find_largest", lambda pre, k: right(pre.abs(), k))
    assert triton_topk.find_problem(cpu) == "its largest entries of a row differ from torch's"
    monkeypatch.setattr(triton_topk, "find_largest", lambda pre, k: (right(pre, k)[0], right(pre, k)[1].flip(1)))
    assert triton_topk.find_problem(cpu) == "its largest entries of a row are in other columns"
    monkeypatch.setattr(triton_topk, "find_largest", unordered)
    assert triton_topk.find_problem(cpu) == "its largest entries of a row are not by column"


@pytest.mark.parametrize("architecture", ["relu", "jumprelu", "gated"])
@pytest.mark.parametrize("wrong", ["acts", "counts", "sums", "acts again", "gradient", "further sums", "gate"])
def test_a_wrong_activation_function_is_found_when_it_is_tried_out(monkeypatch, architecture, wrong):
    pytest.importorskip("triton", reason=NO_TRITON)
    from cytosae.training import triton_activations

    if wrong == "gate":
        architecture = "gated"  # the only one that has it
    products = []

    def spoil(name: str, tensor: torch.Tensor, kind: str) -> torch.Tensor:
        return tensor * 1.001 if (name, kind) == (wrong, architecture) else tensor

    def activate(kind, pre, decoded, vectors):
        m = torch.arange(pre.numel(), device="cpu").view(pre.shape)
        products[:] = [m.mul(step).sin() for step in (2, 3)]
        outputs = triton_activations.compute_by_torch(kind, pre, products)[0]
        for name, to, one in zip(("acts", "gate"), decoded, outputs, strict=False):
            to.copy_(spoil(name, one, kind))
        counts = spoil("counts", (outputs[0] > 0).sum(dim=0).double(), kind)
        return torch.stack([counts, *(spoil("sums", one.sum(dim=0), kind) for one in outputs)])

    def differentiate(kind, pre, acts, changed, constants, n_summed):
        decoded, backward, _ = triton_activations.compute_by_torch(kind, pre, products)
        acts.copy_(spoil("acts again", decoded[0], kind))
        changed[0].copy_(spoil("gradient", backward[0], kind))
        return torch.stack([spoil("further sums", one.sum(dim=0), kind) for one in backward])

    monkeypatch.setattr(triton_activations, "activate", activate)
    monkeypatch.setattr(triton_activations, "differentiate", differentiate)
    problem = triton_activations.find_problem(torch.device("cpu"))
    assert problem is not None
    assert re.fullmatch(rf"its activation function of {architecture} differs from torch's by 1\.0e-03", problem)


def test_a_wrong_adam_is_found_when_it_is_tried_out(monkeypatch):
    pytest.importorskip("triton", reason=NO_TRITON)
    from cytosae.training import triton_adam

    monkeypatch.setattr(triton_adam, "update_rows", lambda *parts, **options: None)
    assert triton_adam.find_problem(torch.device("cpu")) == "its Adam differs from torch's by 1.0e+00"


@pytest.mark.parametrize(("name", "value"), [("capability", (7, 5)), ("hip", "6.2"), ("triton", None)])
def test_old_gpus_and_those_of_others_keep_torchs_products(new_gpu, monkeypatch, caplog, name, value):
    monkeypatch.setattr(kernels.importlib, "import_module", lambda name: pytest.fail("imported"))
    if name == "capability":
        monkeypatch.setattr(torch.cuda, "get_device_capability", lambda number: value)
    elif name == "hip":
        monkeypatch.setattr(torch.version, "hip", value)
    else:
        monkeypatch.setattr(kernels.importlib.util, "find_spec", lambda name: value)
    assert kernels._load.__wrapped__(0, kernels.PRODUCTS) is None
    assert not caplog.messages


def test_nothing_is_handed_to_torchs_compiler():
    sources = [path for folder in ("cytosae", "cache", "pipeline") for path in (ROOT / folder).rglob("*.py")]
    assert len(sources) > 200
    for path in sources:
        assert not re.search(r"torch\s*\.\s*(compile|_dynamo|_inductor)\b|import compile\b", path.read_text()), path
