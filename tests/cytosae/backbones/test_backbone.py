import os
import pickle
import random
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from torch.nn import functional as F

from cytosae.backbones.backbone import describe_backbone, describe_blocks, load_backbone
from cytosae.backbones.dinov2 import expected_shapes
from cytosae.backbones.errors import BackboneError, BackboneNotFoundError
from cytosae.backbones.positions import fit_positions
from cytosae.backbones.registry import DINOV2
from cytosae.backbones.weights import weights_sha256

ROOT = Path(__file__).parents[3]
MLP = {"width": 24, "depth": 4, "heads": 3, "patch_size": 56}
SWIGLU = {**MLP, "swiglu": True}
REGISTERS = {**MLP, "n_registers": 2}
ALL = {"mlp": MLP, "swiglu": SWIGLU, "registers": REGISTERS, "ratio": {**MLP, "mlp_ratio": 3}}


# --- A second implementation, from DINOv2's description -------------------------------------------------------------


def load(path: Path, *, name: str | None, block: int, **options):
    """Describe and load."""
    return load_backbone(path, describe_backbone(path, name=name, block=block), **options)


def make_state(shape, side=None, seed=0):
    """Random tensors under DINOv2's names; no value is zero or one, so that every missing tensor is noticed."""
    width, patch, n_registers = shape["width"], shape["patch_size"], shape.get("n_registers", 0)
    side = side or 224 // patch
    hidden = width * shape.get("mlp_ratio", 4)
    generator = torch.Generator().manual_seed(seed)

    def make(*size, around=0.0, scale=0.2):
        return around + scale * torch.randn(size, generator=generator)

    def linear(name, n_in, n_out):
        return {f"{name}.weight": make(n_out, n_in), f"{name}.bias": make(n_out)}

    def norm(name):
        return {f"{name}.weight": make(width, around=1.0), f"{name}.bias": make(width)}

    state = {
        "cls_token": make(1, 1, width),
        "pos_embed": make(1, 1 + side * side, width, scale=0.5),
        "mask_token": make(1, width),
        "patch_embed.proj.weight": make(width, 3, patch, patch, scale=0.02),
        "patch_embed.proj.bias": make(width),
        **norm("norm"),
    }
    if n_registers:
        state["register_tokens"] = make(1, n_registers, width)
    for block in range(shape["depth"]):
        prefix = f"blocks.{block}."
        state |= norm(f"{prefix}norm1") | norm(f"{prefix}norm2")
        state |= linear(f"{prefix}attn.qkv", width, 3 * width) | linear(f"{prefix}attn.proj", width, width)
        state |= {f"{prefix}ls1.gamma": make(width, around=0.7), f"{prefix}ls2.gamma": make(width, around=0.7)}
        if shape.get("swiglu"):
            inner = -(-int(hidden * 2 / 3) // 8) * 8
            state |= linear(f"{prefix}mlp.w12", width, 2 * inner) | linear(f"{prefix}mlp.w3", inner, width)
        else:
            state |= linear(f"{prefix}mlp.fc1", width, hidden) | linear(f"{prefix}mlp.fc2", hidden, width)
    return state


def run_reference(state, pixels, block, *, heads):
    """Output of one block; the position table must fit already."""
    depth = 1 + max(int(key.split(".")[1]) for key in state if key.startswith("blocks."))
    state = {key: value.float() for key, value in state.items()}
    n, width = len(pixels), state["cls_token"].shape[-1]

    def norm(x, name):
        centred = x - x.mean(-1, keepdim=True)
        x = centred / (centred.square().mean(-1, keepdim=True) + 1e-6).sqrt()
        return x * state[f"{name}.weight"] + state[f"{name}.bias"]

    def linear(x, name):
        return x @ state[f"{name}.weight"].T + state[f"{name}.bias"]

    patch = state["patch_embed.proj.weight"].shape[-1]
    x = F.conv2d(pixels, state["patch_embed.proj.weight"], state["patch_embed.proj.bias"], stride=patch)
    x = x.flatten(2).transpose(1, 2)
    x = torch.cat([state["cls_token"].expand(n, 1, width), x], dim=1) + state["pos_embed"]
    if "register_tokens" in state:
        x = torch.cat([x[:, :1], state["register_tokens"].expand(n, -1, width), x[:, 1:]], dim=1)
    for index in range(depth):
        name = f"blocks.{index}"
        qkv = linear(norm(x, f"{name}.norm1"), f"{name}.attn.qkv")
        q, k, v = qkv.reshape(n, -1, 3, heads, width // heads).permute(2, 0, 3, 1, 4)
        attention = torch.softmax(q @ k.transpose(-1, -2) * (width // heads) ** -0.5, dim=-1)
        attended = (attention @ v).transpose(1, 2).reshape(n, -1, width)
        x = x + state[f"{name}.ls1.gamma"] * linear(attended, f"{name}.attn.proj")
        inner = norm(x, f"{name}.norm2")
        if f"{name}.mlp.w12.weight" in state:
            gate, up = linear(inner, f"{name}.mlp.w12").chunk(2, dim=-1)
            inner = linear(gate * torch.sigmoid(gate) * up, f"{name}.mlp.w3")
        else:
            inner = linear(inner, f"{name}.mlp.fc1")
            inner = linear(inner * 0.5 * (1 + torch.erf(inner / 2**0.5)), f"{name}.mlp.fc2")
        x = x + state[f"{name}.ls2.gamma"] * inner
        if index == block % depth:
            break
    return x


def fit_by_hand(table, side):
    """DINOv2's position table without registers for `side` x `side` patches: cubic convolution written out."""
    n, old = table.shape[2], round((table.shape[1] - 1) ** 0.5)
    scale = (side + 0.1) / old
    weights = np.zeros((side, old))
    for row in range(side):
        centre = (row + 0.5) / scale - 0.5
        for near in range(int(np.floor(centre)) - 1, int(np.floor(centre)) + 3):
            t, a = abs(centre - near), -0.75
            weight = (a + 2) * t**3 - (a + 3) * t**2 + 1 if t <= 1 else a * (t**3 - 5 * t**2 + 8 * t - 4)
            weights[row, min(max(near, 0), old - 1)] += weight
    patches = table[0, 1:].double().numpy().reshape(old, old, n)
    patches = np.einsum("ai,bj,ijn->abn", weights, weights, patches).reshape(1, -1, n)
    return torch.cat([table[:, :1], torch.from_numpy(patches).float()], dim=1)


# --- Checkpoint files -----------------------------------------------------------------------------------------------


def save_toy(path, shape=MLP, *, state=None, key="state_dict", **stated):
    """A checkpoint that states its own small architecture."""
    state = make_state(shape) if state is None else state
    if key == "teacher":
        state = {f"backbone.{name}": tensor for name, tensor in state.items()}
        state |= {"dino_head.last_layer.weight": torch.ones(3, 2), "ibot_head.mlp.0.bias": torch.ones(1)}
    torch.save({"architecture": {"name": "toy", **shape, **stated}, key: state}, path)
    return path


@pytest.fixture(scope="module", autouse=True)
def _one_thread():
    """Networks this small are slower with threads."""
    n_threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(n_threads)


@pytest.fixture
def toy(tmp_path):
    return save_toy(tmp_path / "toy.pth")


@pytest.fixture(scope="module")
def pixels():
    return torch.randn(2, 3, 224, 224, generator=torch.Generator().manual_seed(1))


@pytest.fixture(scope="module")
def vits14_state():
    """Random numbers in the full shape of ViT-S/14, float16, a position table of 37 x 37."""
    shape = {"width": 384, "depth": 12, "heads": 6, "patch_size": 14}
    return {key: (value * 0.3).half() for key, value in make_state(shape, side=37).items()}


def assert_close(found, expected, atol=1e-5):
    torch.testing.assert_close(found, expected, atol=atol, rtol=1e-5)


@pytest.mark.parametrize("block", [0, 1, -1, -2])
@pytest.mark.parametrize("kind", ALL)
def test_output_equals_the_second_implementation(tmp_path, pixels, kind, block):
    shape = ALL[kind]
    state = make_state(shape)
    backbone = load(save_toy(tmp_path / "v.pth", shape, state=state), name=None, block=block)
    tokens = backbone(pixels)
    assert tokens.shape == (2, 17 + shape.get("n_registers", 0), 24)
    assert tokens.dtype == torch.float32
    assert_close(tokens, run_reference(state, pixels, block, heads=3))


def test_every_tensor_of_the_reference_matters(pixels):
    """The comparison above would notice a tensor that is not read."""
    state = make_state(REGISTERS)
    base = run_reference(state, pixels, -1, heads=3)
    for key in state.keys() - {"mask_token", "norm.weight", "norm.bias"}:
        changed = {**state, key: state[key] * 1.5}
        assert (run_reference(changed, pixels, -1, heads=3) - base).abs().max() > 1e-4, key


def test_final_norm_is_not_applied(tmp_path, pixels):
    state = make_state(MLP)
    other = {**state, "norm.weight": state["norm.weight"] * 3, "norm.bias": state["norm.bias"] - 1}
    outputs = [load(save_toy(tmp_path / "v.pth", state=each), name=None, block=-1)(pixels) for each in (state, other)]
    assert torch.equal(*outputs)


@pytest.mark.parametrize("layout", ["teacher", "state_dict", "chunked", "float64", "legacy", "no_mask_token"])
def test_layouts_of_a_file_give_the_same(tmp_path, pixels, layout):
    state = make_state(MLP)
    expected = run_reference(state, pixels, -2, heads=3)
    if layout == "chunked":
        state = {
            key.replace(f"blocks.{i}.", f"blocks.{i // 2}.{i}.") if key.startswith(f"blocks.{i}.") else key: value
            for key, value in state.items()
            for i in [int(key.split(".")[1]) if key.startswith("blocks.") else 0]
        }
        assert "blocks.1.3.attn.qkv.weight" in state
    if layout == "float64":
        state = {key: value.double() for key, value in state.items()}
    if layout == "no_mask_token":
        del state["mask_token"]
    path = save_toy(tmp_path / "v.pth", state=state, key="teacher" if layout == "teacher" else "state_dict")
    if layout == "legacy":
        torch.save(torch.load(path), path, _use_new_zipfile_serialization=False)
    assert_close(load(path, name=None, block=-2)(pixels), expected)


def test_bare_state_of_a_known_network(tmp_path, pixels, vits14_state):
    path = tmp_path / "s.pth"
    torch.save(vits14_state, path)
    info = describe_backbone(path, name=None, block=-2)
    assert (info.name, info.n_tokens, info.d_model, info.grid) == ("dinov2_vits14", 257, 384, (16, 16))
    tokens = load(path, name="dinov2_vits14", block=1)(pixels[:1])
    fitted = {**vits14_state, "pos_embed": fit_by_hand(vits14_state["pos_embed"].float(), 16)}
    assert_close(tokens, run_reference(fitted, pixels[:1], 1, heads=6), atol=5e-5)

    with pytest.raises(
        BackboneError,
        match=r"is not dinov2_vitb14 .*--model_name dinov2_vits14\b.*: patch_embed.proj.weight has shape ",
    ):
        describe_backbone(path, name="dinov2_vitb14", block=-2)
    with pytest.raises(
        BackboneError, match=r"is not dinov2_vits14_reg .*--model_name dinov2_vits14\).*: missing register_tokens"
    ):
        describe_backbone(path, name="dinov2_vits14_reg4", block=-2)
    with pytest.raises(BackboneError, match="model_name 'vit_huge' is unknown; known are dinov2_vits14, "):
        describe_backbone(path, name="vit_huge", block=-2)
    with pytest.raises(BackboneError, match=r"--block_layer 12 was given, but .* has 12 blocks: -12 to 11"):
        describe_backbone(path, name=None, block=12)


def test_registers_identify_the_network(tmp_path, vits14_state):
    """Keys and shapes decide: a network with registers is recognised by them, also in safetensors."""
    safetensors = pytest.importorskip("safetensors.torch")
    path = tmp_path / "s.safetensors"
    state = {**vits14_state, "register_tokens": torch.full((1, 4, 384), 0.25, dtype=torch.float16)}
    safetensors.save_file(state, path)
    info = describe_backbone(path, name=None, block=-2)
    assert (info.name, info.n_tokens, info.n_registers) == ("dinov2_vits14_reg", 261, 4)
    assert describe_backbone(path, name="dinov2_vits14_reg4", block=-2).name == "dinov2_vits14_reg4"


def test_safetensors_equals_pth(tmp_path, pixels, vits14_state):
    safetensors = pytest.importorskip("safetensors.torch")
    safetensors.save_file(vits14_state, tmp_path / "s.safetensors")
    torch.save({"teacher": {f"backbone.{key}": value for key, value in vits14_state.items()}}, tmp_path / "s.pth")
    outputs = [load(tmp_path / name, name=None, block=0)(pixels[:1]) for name in ("s.safetensors", "s.pth")]
    assert torch.equal(*outputs)


@pytest.mark.parametrize(("name", "base"), [(f"{n}{r}", n) for n in list(DINOV2)[:4] for r in ("", "_reg")])
def test_known_networks_have_their_published_sizes(name, base):
    published = {
        "dinov2_vits14": (22_056_576, 384, 12, 6),
        "dinov2_vitb14": (86_580_480, 768, 12, 12),
        "dinov2_vitl14": (304_368_640, 1024, 24, 16),
        "dinov2_vitg14": (1_136_480_768, 1536, 40, 24),
    }
    n_parameters, width, depth, heads = published[base]
    architecture = DINOV2[name]
    n_registers = 4 if name.endswith("_reg") else 0
    assert (architecture.width, architecture.depth, architecture.heads) == (width, depth, heads)
    assert (architecture.patch_size, architecture.n_registers) == (14, n_registers)
    assert architecture.swiglu == (base == "dinov2_vitg14")
    shapes = expected_shapes(architecture)
    pos_embed, mask_token = 1370 * width, width
    assert sum(map(np.prod, shapes.values())) + pos_embed + mask_token == n_parameters + n_registers * width
    assert max(int(key.split(".")[1]) for key in shapes if key.startswith("blocks.")) == depth - 1


def test_there_are_eight_networks_of_dinov2():
    assert len(DINOV2) == 8
    assert all(name == architecture.name for name, architecture in DINOV2.items())


# --- Position tables ------------------------------------------------------------------------------------------------


def fit(table, side, rule):
    """The fitted table as one, CLS first."""
    return torch.cat(fit_positions(table, (side, side), n_prefix=1, rule=rule))[None]


@pytest.mark.parametrize(("old", "side"), [(37, 16), (5, 4), (4, 5), (3, 16), (2, 1)])
def test_positions_by_the_rule_of_dinov2(old, side):
    table = torch.randn(1, 1 + old * old, 6, generator=torch.Generator().manual_seed(2))
    fitted = fit(table, side, "dinov2")
    grid = table[:, 1:].reshape(1, old, old, 6).permute(0, 3, 1, 2)
    scale = (float(side + 0.1) / old,) * 2
    patches = F.interpolate(grid, scale_factor=scale, mode="bicubic", antialias=False)
    assert_close(fitted[:, 1:], patches.permute(0, 2, 3, 1).reshape(1, -1, 6))
    assert_close(fitted, fit_by_hand(table, side))


@pytest.mark.parametrize(("old", "side"), [(37, 16), (5, 4), (4, 5), (3, 16)])
def test_antialiased_positions(old, side):
    """Pillow's bicubic is the antialiased one."""
    table = torch.randn(1, 1 + old * old, 3, generator=torch.Generator().manual_seed(3))
    fitted = fit(table, side, "antialias")
    planes = table[0, 1:].reshape(old, old, 3).numpy()
    by_pillow = [
        np.asarray(Image.fromarray(planes[:, :, c].copy()).resize((side, side), Image.Resampling.BICUBIC))
        for c in range(3)
    ]
    assert torch.equal(fitted[:, 0], table[:, 0])
    torch.testing.assert_close(
        fitted[0, 1:].reshape(side, side, 3), torch.from_numpy(np.stack(by_pillow, -1)), atol=1e-5, rtol=1e-5
    )


@pytest.mark.parametrize("rule", ["dinov2", "antialias", "plain"])
def test_positions_that_fit_are_kept(rule):
    table = torch.randn(1, 17, 5).half()
    fitted = fit(table, 4, rule)
    assert fitted.dtype == torch.float32
    assert torch.equal(fitted, table.float())


@pytest.mark.parametrize("kind", ["mlp", "registers"])
def test_network_uses_the_interpolated_positions(tmp_path, pixels, kind):
    shape = ALL[kind]
    state = make_state(shape, side=7)
    tokens = load(save_toy(tmp_path / "v.pth", shape, state=state), name=None, block=-2)(pixels)
    fitted = fit(state["pos_embed"], 4, "antialias" if kind == "registers" else "dinov2")
    if kind == "mlp":
        assert_close(fitted, fit_by_hand(state["pos_embed"], 4))
    assert_close(tokens, run_reference({**state, "pos_embed": fitted}, pixels, -2, heads=3))


# --- Strictness -----------------------------------------------------------------------------------------------------


def refuse(path, match, *, name=None, block=-2):
    with pytest.raises(BackboneError, match=match) as caught:
        load(path, name=name, block=block)
    assert "\n" not in str(caught.value)
    return str(caught.value)


def test_several_problems_are_listed_at_once(tmp_path):
    state = make_state(MLP)
    del state["blocks.3.attn.proj.bias"]
    state["blocks.2.gate.weight"] = torch.ones(2)
    state["blocks.4.norm1.weight"] = torch.ones(24)
    state["blocks.0.mlp.fc1.weight"] = torch.ones(96, 23)
    state["pos_embed"] = torch.ones(1, 19, 24)
    message = refuse(save_toy(tmp_path / "v.pth", state=state), "is not toy: ")
    for part in (
        f"'{tmp_path / 'v.pth'}'",
        "missing blocks.3.attn.proj.bias",
        "unknown blocks.2.gate.weight",
        "unknown blocks.4.norm1.weight",
        "blocks.0.mlp.fc1.weight has shape (96, 23), expected (96, 24)",
        "pos_embed has shape (1, 19, 24), expected (1, 1 + a square, 24)",
    ):
        assert part in message, part


def test_hundreds_of_problems_are_summarised(tmp_path):
    state = {key: value for key, value in make_state(MLP).items() if not key.startswith("blocks.") or "fc" in key}
    message = refuse(save_toy(tmp_path / "v.pth", state=state), r"missing blocks\.0\..* and \d\d more$")
    assert len(message) < 800


@pytest.mark.parametrize(
    "key", [key for key in make_state(REGISTERS) if not key.startswith(("blocks.0", "blocks.1", "blocks.2"))]
)
def test_any_missing_tensor_or_wrong_shape_is_an_error(tmp_path, key):
    state = make_state(REGISTERS)
    if not key.startswith(("mask_token", "norm.")):
        rest = {name: tensor for name, tensor in state.items() if name != key}
        missing = "no tensor is a patch embedding" if key == "patch_embed.proj.weight" else "missing "
        refuse(save_toy(tmp_path / "v.pth", REGISTERS, state=rest), missing)
        for wrong in (state[key][..., :-1], state[key].flatten()[0], state[key][None]):
            refuse(
                save_toy(tmp_path / "v.pth", REGISTERS, state={**state, key: wrong.clone()}),
                f"{key} has shape|its patch embedding has",
            )
        whole = {**state, key: state[key].to(torch.int32)}
        refuse(save_toy(tmp_path / "v.pth", REGISTERS, state=whole), f"{key} is a torch.strided tensor of torch.int32")


@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
@pytest.mark.parametrize("key", ["blocks.2.mlp.fc2.bias", "pos_embed", "blocks.0.attn.qkv.weight"])
def test_weights_that_are_not_finite(tmp_path, key, value):
    state = make_state(MLP)
    state[key].flatten()[-1] = value
    refuse(save_toy(tmp_path / "v.pth", state=state), rf"weights in '.*v.pth' contain NaN or infinity: {key}$")
    with pytest.raises(BackboneError, match="contain NaN or infinity"):
        describe_backbone(tmp_path / "v.pth", name=None, block=-2)


def test_blocks_that_are_not_used_may_be_anything(tmp_path):
    state = make_state(MLP)
    last = max(int(key.split(".")[1]) for key in state if key.startswith("blocks."))
    state[f"blocks.{last}.mlp.fc2.bias"][0] = float("nan")
    path = save_toy(tmp_path / "v.pth", state=state)
    describe_blocks(path, name=None, blocks=(0, last - 1))
    with pytest.raises(BackboneError, match=f"infinity: blocks.{last}.mlp.fc2.bias"):
        describe_blocks(path, name=None, blocks=(0, last))


def test_a_name_that_the_checkpoint_contradicts_is_only_a_label(tmp_path):
    path = save_toy(tmp_path / "v.pth")
    own = describe_backbone(path, name=None, block=0)
    assert describe_backbone(path, name=own.name, block=0).notes == own.notes
    info = describe_backbone(path, name="dinov2_vitb14", block=0)
    assert f"model_name dinov2_vitb14 is only a label: the checkpoint is {own.name}" in info.notes


def test_positions_that_are_not_finite(tmp_path):
    state = make_state(MLP, side=7)
    state["pos_embed"][0, 20, 3] = float("nan")
    refuse(save_toy(tmp_path / "v.pth", state=state), "contain NaN or infinity: pos_embed")


def test_bare_files_that_are_no_network(tmp_path):
    for state in ({"cls_token": torch.tensor(1.0)}, {"cls_token": torch.ones(1, 1, 5)}, {"x": torch.ones(1)}):
        torch.save(state, tmp_path / "v.pth")
        refuse(tmp_path / "v.pth", "fits no known network")


class Foreign:
    """Any class of a user."""


class Harmful:
    """Its pickle creates a folder when it is executed."""

    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return os.mkdir, (str(self.path),)


@pytest.mark.parametrize("nested", [True, False])
@pytest.mark.parametrize("save", [torch.save, lambda value, path: path.write_bytes(pickle.dumps(value, protocol=2))])
def test_objects_are_refused_and_not_executed(tmp_path, save, nested):
    trap = tmp_path / "executed"
    for item in (Foreign(), Harmful(trap)):
        value = {"teacher": {"backbone.cls_token": torch.ones(1, 1, 384)}, "config": item} if nested else item
        save(value, tmp_path / "v.pth")
        refuse(tmp_path / "v.pth", "contains Python objects .*or is not a torch checkpoint; nothing in it was executed")
        assert not trap.exists()
    with (tmp_path / "v.pth").open("rb") as file:
        # The attack works: plain unpickling creates the folder.
        torch.load(file, weights_only=False) if save is torch.save else pickle.load(file)
    assert trap.exists()


def test_damaged_files(tmp_path, toy):
    whole = toy.read_bytes()
    for data in (b"", b"PK", b"hello world", whole[: len(whole) // 2], whole[:100], b"\x80\x02"):
        toy.write_bytes(data)
        refuse(toy, r"toy.pth' (is not a readable checkpoint|contains Python objects .*or is not a torch checkpoint)")
    for data in (b"", b"\xff" * 40, whole):
        (tmp_path / "v.safetensors").write_bytes(data)
        refuse(tmp_path / "v.safetensors", "v.safetensors' is not a readable checkpoint: ")


def test_missing_path(tmp_path):
    path = tmp_path / "none.pth"
    for call in (describe_backbone, load):
        with pytest.raises(FileNotFoundError, match=r"no vision transformer at '.*none.pth'. .* --model_path embedded"):
            call(path, name=None, block=-2)
    assert issubclass(BackboneNotFoundError, BackboneError)


@pytest.mark.parametrize(
    ("value", "match"),
    [
        (
            {"teacher": {"dino_head.weight": torch.ones(1)}},
            r"no tensor is a patch embedding.* teacher.dino_head.weight$",
        ),
        ({"teacher": {}}, "does not contain a state dict of tensors; found teacher"),
        ({"state_dict": {"cls_token": 3}}, "does not contain a state dict of tensors; found state_dict"),
        ({"epoch": 3, "model": {}}, "does not contain a state dict of tensors; found epoch; model"),
        ({1: torch.ones(1)}, "fits no known network"),
        ([torch.ones(1)], "does not contain a state dict of tensors; found list"),
        (torch.ones(1), "does not contain a state dict of tensors; found Tensor"),
    ],
)
def test_files_of_another_layout(tmp_path, value, match):
    torch.save(value, tmp_path / "v.pth")
    refuse(tmp_path / "v.pth", match)


def test_keys_that_collide_once_unchunked(tmp_path):
    state = make_state(MLP)
    state["blocks.0.0.norm1.bias"] = torch.zeros(24)
    refuse(
        save_toy(tmp_path / "v.pth", state=state),
        "contains two tensors for one place: blocks.0.norm1.bias and blocks.0.0",
    )


@pytest.mark.parametrize(
    ("stated", "match"),
    [
        ({"width": 0}, "states an impossible architecture"),
        ({"width": -24, "heads": -3}, "states an impossible architecture"),
        ({"width": 25}, "states an impossible architecture"),
        ({"width": "24"}, "states an impossible architecture: width='24'"),
        ({"width": 24.0}, "states an impossible architecture: width=24.0"),
        ({"depth": 0}, "states an impossible architecture"),
        ({"depth": True}, "states an impossible architecture: depth=True"),
        ({"depth": 10**9}, "states an impossible architecture"),
        ({"heads": 0}, "states an impossible architecture"),
        ({"heads": None}, "states an impossible architecture: heads=None"),
        ({"patch_size": 0}, "states an impossible architecture"),
        ({"patch_size": 225}, "states an impossible architecture"),
        ({"mlp_ratio": 0}, "states an impossible architecture"),
        ({"mlp_ratio": 4.0}, "states an impossible architecture: mlp_ratio=4.0"),
        ({"n_registers": -1}, "states an impossible architecture"),
        ({"n_registers": 10**9}, "states an impossible architecture"),
        ({"swiglu": 1}, "states an impossible architecture: swiglu=1"),
        ({"name": 7}, "states an impossible architecture: name=7"),
        ({"colour": 7}, r"states the architecture .*; expected name, width, depth, heads, "),
    ],
)
def test_impossible_stated_architectures(tmp_path, stated, match):
    refuse(save_toy(tmp_path / "v.pth", **stated), match)


def test_patches_must_tile_the_image(tmp_path):
    shape = {**MLP, "patch_size": 50}
    path = save_toy(tmp_path / "v.pth", shape, state=make_state(shape, side=5))
    refuse(path, r"patches of 50 pixels do not tile images of 224 pixels .* --image-size 200 or 250")


def test_incomplete_stated_architecture(tmp_path):
    torch.save({"architecture": {"width": 24}, "state_dict": make_state(MLP)}, tmp_path / "v.pth")
    refuse(tmp_path / "v.pth", r"states the architecture \{'width': 24\}; expected name, width, depth")


def test_stated_architecture_decides(tmp_path):
    """A wrong statement is detected by the shapes; a name is only a label."""
    refuse(save_toy(tmp_path / "v.pth", depth=3), "unknown blocks.3.")
    refuse(save_toy(tmp_path / "v.pth", depth=5), "missing blocks.4.")
    refuse(save_toy(tmp_path / "v.pth", mlp_ratio=3), "fc1.weight has shape")
    assert describe_backbone(save_toy(tmp_path / "v.pth"), name="mine", block=0).name == "mine"
    torch.save({"architecture": MLP, "state_dict": make_state(MLP)}, tmp_path / "nameless.pth")
    assert describe_backbone(tmp_path / "nameless.pth", name=None, block=0).name == "nameless"


@pytest.mark.parametrize("block", [4, -5, 100])
def test_blocks_out_of_range(toy, block):
    refuse(toy, rf"--block_layer {block} was given, but '.*toy.pth' has 4 blocks: -4 to 3", block=block)


# --- Loaded backbones -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ALL)
def test_description_equals_the_loaded_network(tmp_path, kind):
    shape = ALL[kind]
    path = save_toy(tmp_path / "v.pth", shape)
    info = describe_backbone(path, name=None, block=-3)
    assert info == load(path, name=None, block=-3).info
    assert (info.name, info.block, info.n_blocks, info.d_model, info.patch_size) == ("toy", -3, 4, 24, 56)
    assert (info.n_cls, info.n_registers, info.grid, info.image_size) == (1, shape.get("n_registers", 0), (4, 4), 224)
    assert info.n_tokens == 17 + shape.get("n_registers", 0)
    assert (info.image_mean, info.image_std) == ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225))
    assert info.weights_sha256 == weights_sha256(path)
    assert len(info.weights_sha256) == 64


def test_describing_does_not_import_transformers(toy, tmp_path):
    code = (
        "import sys; from pathlib import Path; from cytosae.backbones.backbone import describe_backbone\n"
        "infos = [describe_backbone(Path(path), name=None, block=-2) for path in sys.argv[1:]]\n"
        "print([info.n_tokens for info in infos], 'transformers' in sys.modules)"
    )
    command = [sys.executable, "-c", code, str(toy)]
    environment = {**os.environ, "PYTHONPATH": "."}
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[17] False"


@pytest.mark.parametrize(("block", "n_kept"), [(0, 1), (2, 3), (-1, 4), (-2, 3), (-4, 1)])
def test_only_the_needed_blocks_are_built(toy, block, n_kept):
    backbone = load(toy, name=None, block=block)
    assert len(backbone.model.blocks) == n_kept
    blocks = {name.split(".blocks.")[1].split(".")[0] for name, _ in backbone.named_parameters() if ".blocks." in name}
    assert blocks == set(map(str, range(n_kept)))


def test_network_is_independent_of_later_changes_to_its_file(toy, pixels):
    backbone = load(toy, name=None, block=-2)
    with toy.open("r+b") as file:
        file.write(bytes(toy.stat().st_size))
    assert_close(backbone(pixels), run_reference(make_state(MLP), pixels, -2, heads=3))


def test_parts_beside_the_backbone_are_named(tmp_path):
    path = save_toy(tmp_path / "v.pth", key="teacher")
    value = torch.load(path)
    value["teacher"]["decoder.weight"] = torch.ones(1)
    torch.save(value, path)
    left_out = "left out, not part of the encoder: teacher.decoder; teacher.dino_head; teacher.ibot_head"
    assert describe_backbone(path, name=None, block=-2).notes == (left_out,)


def test_later_blocks_are_not_read(tmp_path, pixels):
    state = make_state(MLP)
    expected = run_reference(state, pixels, 1, heads=3)
    for key in state:
        if key.startswith(("blocks.2", "blocks.3")):
            state[key].fill_(float("nan"))
    assert_close(load(save_toy(tmp_path / "v.pth", state=state), name=None, block=1)(pixels), expected)


def test_loading_does_not_touch_the_random_state(toy):
    load(toy, name=None, block=-2)  # imports may use random numbers
    before = torch.get_rng_state(), np.random.get_state()[1].copy(), random.getstate()
    load(toy, name=None, block=-2)
    assert torch.equal(torch.get_rng_state(), before[0])
    assert np.array_equal(np.random.get_state()[1], before[1])
    assert random.getstate() == before[2]


def test_networks_are_frozen(toy):
    backbone = load(toy, name=None, block=-2)
    assert not any(parameter.requires_grad for parameter in backbone.parameters())
    assert not any(module.training for module in backbone.modules())
    assert all(parameter.dtype == torch.float32 for parameter in backbone.parameters())


def test_requested_dtype(toy, pixels):
    backbone = load(toy, name=None, block=-2, dtype=torch.bfloat16)
    tokens = backbone(pixels.bfloat16())
    assert tokens.dtype == torch.bfloat16
    full = load(toy, name=None, block=-2)(pixels)
    assert (tokens.float() - full).abs().mean() < 0.05 * full.abs().mean()


def test_images_do_not_affect_each_other(toy, pixels):
    backbone = load(toy, name=None, block=-2)
    together = backbone(pixels)
    assert_close(together, torch.cat([backbone(pixels[:1]), backbone(pixels[1:])]))


def test_images_of_another_size_are_refused(toy):
    backbone = load(toy, name=None, block=-2)
    with pytest.raises(BackboneError, match=r"pixels have shape \(1, 3, 280, 280\), expected \('B', 3, 224, 224\)"):
        backbone(torch.zeros(1, 3, 280, 280))


def test_several_blocks_come_from_one_pass(toy, pixels):
    info = describe_backbone(toy, name=None, block=-2)
    backbone = load_backbone(toy, info, blocks=(-1, 0, -2))
    outputs = backbone.compute_blocks(pixels)
    assert len(outputs) == 3
    for block, tokens in zip((-1, 0, -2), outputs, strict=True):
        assert torch.equal(tokens, load(toy, name=None, block=block)(pixels))
    assert torch.equal(backbone(pixels), outputs[0])


def test_digest_follows_the_contents(tmp_path, toy):
    first = weights_sha256(toy)
    (tmp_path / "copy.pth").write_bytes(toy.read_bytes())
    assert weights_sha256(tmp_path / "copy.pth") == first
    save_toy(toy, state=make_state(MLP, seed=1))
    assert weights_sha256(toy) != first

    folder = tmp_path / "hf"
    folder.mkdir()
    digests = set()
    for name, text in (
        ("model.safetensors", "a"),
        ("model.safetensors", "b"),
        ("config.json", "a"),
        ("pytorch_model.bin", "a"),
    ):
        (folder / name).write_text(text)
        digests.add(weights_sha256(folder))
    assert len(digests) == 4
    (folder / "README.md").write_text("not weights")
    assert weights_sha256(folder) in digests


# --- Real files -----------------------------------------------------------------------------------------------------


def test_real_vits14(test_data, pixels):
    path = test_data / "vit" / "dinov2_vits14.pth"
    backbone = load(path, name=None, block=-2)
    assert (backbone.info.name, backbone.info.n_tokens) == ("dinov2_vits14", 257)
    state = torch.load(path, weights_only=True)
    state = {**state, "pos_embed": fit_by_hand(state["pos_embed"].float(), 16)}
    expected = run_reference(state, pixels, -2, heads=6)
    torch.testing.assert_close(backbone(pixels), expected, atol=1e-3, rtol=1e-4)


def test_embedded_network(pixels):
    path = ROOT / "pipeline" / "cytosae_pipeline" / "assets" / "cytosae_tiny14.pth"
    backbone = load(path, name=None, block=-2)
    assert (backbone.info.name, backbone.info.n_blocks, backbone.info.n_tokens) == ("cytosae_tiny14", 6, 257)
    state = torch.load(path, weights_only=True)["state_dict"]
    assert_close(backbone(pixels[:1]), run_reference(state, pixels[:1], -2, heads=4), atol=1e-4)


# --- Loading twice ---------------------------------------------------------------------------------------------------


def test_loading_does_not_hash_the_checkpoint_again(toy, monkeypatch):
    info = describe_backbone(toy, name=None, block=-2)
    monkeypatch.setattr("cytosae.backbones.backbone.weights_sha256", lambda path: pytest.fail("hashed again"))
    assert load_backbone(toy, info).info is info


def test_another_checkpoint_under_a_described_path_is_refused(toy):
    info = describe_backbone(toy, name=None, block=-2)
    state = torch.load(toy, weights_only=True)
    state["state_dict"].pop("cls_token")
    torch.save(state, toy)
    with pytest.raises(BackboneError, match="missing cls_token"):
        load_backbone(toy, info)
