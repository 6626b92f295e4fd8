"""The tail of an encoder gives the embedding that the whole network gives, for every family, from any block on."""

import json

import pytest
import torch
from safetensors.torch import load_file, save_file

from cytosae.backbones.backbone import describe_backbone, load_backbone
from cytosae.backbones.errors import BackboneError
from cytosae.backbones.tail import make_tail, read_tail
from tests.cytosae.backbones.test_backbone import ALL, save_toy
from tests.cytosae.backbones.test_backbone import make_state as make_dinov2
from tests.cytosae.backbones.test_backbone import run_reference as run_dinov2
from tests.cytosae.backbones.test_encoder_files import TIMM, as_open_clip, save_timm
from tests.cytosae.backbones.test_transformers_folders import (  # noqa: F401 - a fixture
    KINDS,
    PREFIX,
    folder_of,
    make_model,
)
from tests.support.encoders import make_state, relative_error, run_reference


@pytest.fixture(scope="module")
def pixels():
    return torch.randn(2, 3, 224, 224, generator=torch.Generator().manual_seed(1))


def norm_of(state, x, name="norm", eps=1e-6):
    return torch.nn.functional.layer_norm(x, x.shape[-1:], state[f"{name}.weight"], state[f"{name}.bias"], eps)


def embed(path, pixels, block, name=None):
    """The embedding by way of the output of a block."""
    info = describe_backbone(path, name=name, block=block)
    tail = make_tail(*read_tail(path, info))
    with torch.no_grad():
        return tail(load_backbone(path, info)(pixels))


def check(path, pixels, expected, depth=3):
    for block in range(depth):
        found = embed(path, pixels, block)
        assert found.shape == expected.shape
        assert relative_error(found, expected) < 1e-5


@pytest.mark.parametrize("name", TIMM)
def test_encoders_of_timm(tmp_path, pixels, name):
    architecture, options, facts = TIMM[name]
    state = make_state(**options)
    saved = {key.replace("ls1.gamma", "gamma_1").replace("ls2.gamma", "gamma_2"): value for key, value in state.items()}
    path = save_timm(tmp_path / "m", saved if name == "dinov3" else state, architecture, num_heads=3)
    tokens = norm_of(state, run_reference(state, pixels, -1, heads=3, **facts), eps=facts.get("eps", 1e-6))
    check(path, pixels, tokens[:, 0] if "cls_token" in state else tokens.mean(dim=1))


@pytest.mark.parametrize("kind", ALL)
def test_checkpoints_that_state_their_architecture(tmp_path, pixels, kind):
    state = make_dinov2(ALL[kind])
    save_toy(tmp_path / "v.pth", ALL[kind], state=state)
    tokens = norm_of(state, run_dinov2(state, pixels, -1, heads=ALL[kind]["heads"]))
    check(tmp_path / "v.pth", pixels, tokens[:, 0], depth=4)


@pytest.mark.parametrize("kind", KINDS)
def test_folders_of_transformers(folder_of, pixels, kind):  # noqa: F811 - the fixture
    """Equal to what transformers' own classes return after their final norm."""
    model = make_model(kind)
    for part in ("vision_model", "vit", "dinov2"):
        model = getattr(model, part, model)
    arguments = {}
    if type(model).__name__ == "ViTMAEModel":
        arguments["noise"] = torch.arange(16.0).expand(len(pixels), -1)
    with torch.no_grad():
        output = model(pixel_values=pixels, **arguments)
    expected = output.last_hidden_state
    if kind.startswith("clip"):  # there the norm is applied to the CLS token alone, behind the last hidden state
        expected = model.post_layernorm(expected)
    expected = expected[:, 0] if PREFIX.get(kind, 1) else expected.mean(dim=1)
    check(folder_of(kind), pixels, expected.detach(), depth=4)


def test_facebooks_dinov3_and_its_norm_of_the_cls_token(tmp_path, pixels):
    state = make_state(width=48, n_registers=4, table=None)
    tokens = run_reference(state, pixels, -1, heads=3, eps=1e-5, theta=100.0)
    path = save_timm(tmp_path / "m", state, "vit_small_patch16_dinov3", num_heads=3)
    check(path, pixels, norm_of(state, tokens, eps=1e-5)[:, 0])
    state |= {"cls_norm.weight": torch.full((48,), 2.0), "cls_norm.bias": torch.full((48,), 0.5)}
    save_file(state, path / "model.safetensors")
    check(path, pixels, norm_of(state, tokens, "cls_norm", eps=1e-5)[:, 0])


def test_open_clip(tmp_path, pixels):
    state = make_state(scale=False, pre_norm=True, patch_bias=False)
    torch.save(as_open_clip(state), tmp_path / "open_clip_pytorch_model.bin")
    vision = {"image_size": 224, "layers": 3, "width": 24, "head_width": 8, "patch_size": 56}
    config = {"model_cfg": {"vision_cfg": vision}, "preprocess_cfg": {"mean": [0.5] * 3, "std": [0.5] * 3}}
    (tmp_path / "open_clip_config.json").write_text(json.dumps(config))
    tokens = run_reference(state, pixels, -1, heads=3, eps=1e-5)
    check(tmp_path, pixels, norm_of(state, tokens, eps=1e-5)[:, 0])


def test_a_norm_of_the_mean_and_no_norm_at_all(tmp_path, pixels):
    state = make_state()
    tokens = run_reference(state, pixels, -1, heads=3)
    path = save_timm(tmp_path / "m", state, "vit_small_patch16_224", num_heads=3)
    saved = load_file(path / "model.safetensors")
    bare = {name: tensor for name, tensor in saved.items() if not name.startswith("norm.")}
    save_file(bare, path / "model.safetensors")
    check(path, pixels, tokens[:, 0])
    save_file(
        bare | {f"fc_norm.{kind}": saved[f"norm.{kind}"] for kind in ("weight", "bias")}, path / "model.safetensors"
    )
    check(path, pixels, norm_of(state, tokens[:, 1:].mean(dim=1)))


def test_weights_keep_their_type_and_lose_nothing(tmp_path, pixels):
    state = {name: tensor.half() for name, tensor in make_state().items()}
    path = save_timm(tmp_path / "m", state, "vit_small_patch16_224", num_heads=3)
    info = describe_backbone(path, name=None, block=-2)
    tail, tensors = read_tail(path, info)
    assert {tensor.dtype for tensor in tensors.values()} == {torch.float16}
    assert {name: tuple(tensor.shape) for name, tensor in tensors.items()} == tail.shapes()
    wide = {name: tensor.float() for name, tensor in state.items()}
    tokens = norm_of(wide, run_reference(wide, pixels, -1, heads=3))
    assert relative_error(embed(path, pixels, -2), tokens[:, 0]) < 1e-5


@pytest.mark.parametrize("name", ["norm.weight", "norm.bias"])
def test_a_final_norm_that_cannot_be_used_is_refused(tmp_path, name):
    state = make_state()
    path = save_timm(tmp_path / "m", state | {name: torch.full((24,), torch.nan)}, "vit_small_patch16_224", num_heads=3)
    info = describe_backbone(path, name=None, block=-2)
    with pytest.raises(BackboneError, match=f"must have a weight and a bias of 24 finite numbers: {name}"):
        read_tail(path, info)


def test_a_last_block_that_is_not_finite_is_found(tmp_path):
    state = make_state()
    state["blocks.2.mlp.fc1.bias"][0] = torch.inf
    path = save_timm(tmp_path / "m", state, "vit_small_patch16_224", num_heads=3)
    with pytest.raises(BackboneError, match=r"contain NaN or infinity: blocks\.2\.mlp\.fc1\.bias"):
        read_tail(path, describe_backbone(path, name=None, block=-2))


def test_tokens_of_another_shape_are_refused(tmp_path):
    path = save_timm(tmp_path / "m", make_state(), "vit_small_patch16_224", num_heads=3)
    tail = make_tail(*read_tail(path, describe_backbone(path, name=None, block=-2)))
    with pytest.raises(BackboneError, match=r"tokens have shape \(2, 16, 24\), expected \('B', 17, 24\)"):
        tail(torch.zeros(2, 16, 24))
