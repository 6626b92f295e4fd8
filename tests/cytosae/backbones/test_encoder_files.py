"""Encoders of timm, facebookresearch and open_clip: tokens equal a second implementation in whatever file."""

import argparse
import dataclasses
import hashlib
import json
import re

import pytest
import torch

from cytosae.backbones.backbone import describe_backbone, load_backbone
from cytosae.backbones.errors import BackboneError
from cytosae.backbones.preprocessing import StatedTransform
from cytosae.backbones.registry import ARCHITECTURES, known_transform
from cytosae.backbones.weights import weights_sha256
from tests.support.encoders import make_state, relative_error, run_reference

STATED = {"mean": [0.4, 0.5, 0.6], "std": [0.2, 0.3, 0.4], "input_size": [3, 224, 224], "interpolation": "bicubic"}
USER = StatedTransform(size=224, mean=(0.4, 0.5, 0.6), std=(0.2, 0.3, 0.4))


@pytest.fixture(scope="module")
def pixels():
    return torch.randn(2, 3, 224, 224, generator=torch.Generator().manual_seed(1))


def save_timm(folder, state, architecture, **arguments):
    """A folder as timm pushes it to the hub."""
    from safetensors.torch import save_file

    folder.mkdir(exist_ok=True)
    config = {"architecture": architecture, "num_classes": 0, "num_features": 24, "pretrained_cfg": STATED}
    width, patch = state_size(state)
    depth = 1 + max(int(re.search(r"blocks\.(\d+)\.", key)[1]) for key in state if "blocks." in key)
    config["model_args"] = {"embed_dim": width, "depth": depth, "patch_size": patch} | arguments
    (folder / "config.json").write_text(json.dumps(config))
    save_file(state, folder / "model.safetensors")
    return folder


def state_size(state):
    """Width and patch size of a network."""
    weight = next(value for key, value in state.items() if key.endswith("patch_embed.proj.weight"))
    return weight.shape[0], weight.shape[-1]


def load(path, block=-2, name=None, preprocessing=None):
    return load_backbone(path, describe_backbone(path, name=name, block=block, preprocessing=preprocessing))


def refuse(path, match, **options):
    with pytest.raises(BackboneError, match=match) as caught:
        load(path, **options)
    assert len(str(caught.value)) < 1000
    assert "\n" not in str(caught.value)


# --- timm's folders --------------------------------------------------------------------------------------------------

TIMM = {
    # name: architecture, tensors, facts that the second implementation is told
    "uni": ("vit_large_patch16_224", {}, {}),
    "uni2_h": ("vit_giant_patch14_224", {"gated": True, "n_registers": 8, "table": "patches"}, {"activation": "silu"}),
    "virchow": ("vit_huge_patch14_224", {"gated": True}, {"activation": "silu"}),
    "virchow2": ("vit_huge_patch14_224", {"gated": True, "n_registers": 4}, {"activation": "silu"}),
    "h_optimus": (
        "vit_giant_patch14_reg4_dinov2", {"gated": True, "n_registers": 4, "table": "patches"}, {"activation": "silu"},
    ),
    "reddino": ("vit_small_patch14_dinov2", {}, {}),
    "dinov2_reg4": ("vit_small_patch14_reg4_dinov2", {"n_registers": 4, "table": "patches"}, {}),
    "kaiko": ("vit_small_patch8_224.dino", {"scale": False}, {}),
    "clip": (
        "vit_base_patch16_clip_224.openai", {"scale": False, "pre_norm": True, "patch_bias": False}, {"eps": 1e-5},
    ),
    "quickgelu": (
        "vit_base_patch16_clip_quickgelu_224", {"scale": False, "pre_norm": True, "patch_bias": False},
        {"eps": 1e-5, "activation": "quick_gelu"},
    ),
    "siglip": ("vit_base_patch16_siglip_224", {"scale": False, "cls": False}, {}),
    "siglip_tanh": ("vit_so400m_patch16_siglip_256", {"scale": False, "cls": False}, {"activation": "gelu_tanh"}),
    "deit3": ("deit3_small_patch16_224", {"table": "patches"}, {}),
    "dinov3": (
        "vit_small_patch16_dinov3", {"width": 48, "n_registers": 4, "table": None, "qkv_bias": False},
        {"eps": 1e-5, "theta": 100.0},
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", TIMM)
def test_folders_of_timm_equal_the_second_implementation(tmp_path, pixels, name):
    architecture, options, facts = TIMM[name]
    state = make_state(**options)
    saved = {key.replace("ls1.gamma", "gamma_1").replace("ls2.gamma", "gamma_2"): value for key, value in state.items()}
    folder = save_timm(tmp_path / name, saved if name == "dinov3" else state, architecture, num_heads=3)
    backbone = load(folder)
    assert relative_error(backbone(pixels), run_reference(state, pixels, -2, heads=3, **facts)) < 1e-5
    info = backbone.info
    assert (info.name, info.n_blocks, info.n_registers) == (name, 3, options.get("n_registers", 0))
    assert (info.image_mean, info.image_std, info.resample) == ((0.4, 0.5, 0.6), (0.2, 0.3, 0.4), "bicubic")


@pytest.mark.parametrize(
    "key", ["reg_token", "blocks.1.ls2.gamma", "blocks.0.mlp.fc1.bias", "pos_embed", "norm.weight"]
)
def test_every_tensor_of_the_second_implementation_matters(pixels, key):
    """The comparisons above would notice a tensor that is not read; the final norm alone is not."""
    state = make_state(n_registers=2)
    changed = {**state, key: state[key] * 1.5}
    difference = relative_error(*(run_reference(item, pixels, -1, heads=3) for item in (changed, state)))
    assert (difference > 1e-3) == (key != "norm.weight")


def test_the_distilled_deit_of_timm(tmp_path, pixels):
    state = make_state(n_registers=1, scale=False)
    saved = {"dist_token" if key == "reg_token" else key: value for key, value in state.items()}
    saved |= {"head_dist.weight": torch.ones(2, 24)}
    backbone = load(save_timm(tmp_path / "m", saved, "deit_small_distilled_patch16_224", num_heads=3))
    assert relative_error(backbone(pixels), run_reference(state, pixels, -2, heads=3)) < 1e-5
    assert (backbone.info.n_cls, backbone.info.n_registers) == (1, 1)


def test_split_gates_of_timms_dinov3(tmp_path, pixels):
    state = make_state(width=48, n_registers=4, table=None, gated=True, qkv_bias=False)
    saved = {}
    for key, value in state.items():
        if ".mlp.fc1." in key:
            saved[key.replace("fc1", "fc1_g")], saved[key.replace("fc1", "fc1_x")] = (x.clone() for x in value.chunk(2))
        else:
            saved[key] = value
    folder = save_timm(tmp_path / "m", saved, "vit_huge_plus_patch16_dinov3", num_heads=3)
    expected = run_reference(state, pixels, -1, heads=3, eps=1e-5, activation="silu", theta=100.0)
    assert relative_error(load(folder, -1)(pixels), expected) < 1e-5


def test_a_timm_wrapper_of_transformers(tmp_path, pixels):
    state = make_state()
    folder = save_timm(
        tmp_path / "m",
        {f"timm_model.{key}": value for key, value in state.items()},
        "vit_small_patch16_224",
        num_heads=3,
    )
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | {"model_type": "timm_wrapper"}))
    assert relative_error(load(folder)(pixels), run_reference(state, pixels, -2, heads=3)) < 1e-5


@pytest.mark.parametrize("old", [2, 7])
def test_timm_resamples_positions_with_antialiasing(tmp_path, pixels, old):
    state = make_state(side=old)
    folder = save_timm(tmp_path / "m", state, "vit_small_patch14_dinov2", num_heads=3)
    planes = state["pos_embed"][:, 1:].reshape(1, old, old, 24).permute(0, 3, 1, 2)
    planes = torch.nn.functional.interpolate(planes, size=(4, 4), mode="bicubic", antialias=True)
    table = torch.cat([state["pos_embed"][:, :1], planes.permute(0, 2, 3, 1).reshape(1, 16, 24)], dim=1)
    expected = run_reference({**state, "pos_embed": table}, pixels, -2, heads=3)
    assert relative_error(load(folder)(pixels), expected) < 1e-5


@pytest.mark.parametrize(
    ("architecture", "match"),
    [
        (
            "swin_tiny_patch4_window7_224",
            "timm architecture 'swin_tiny.*', which is not supported; supported are plain",
        ),
        ("eva02_base_patch14_224", "not supported"),
        ("vit_base_patch16_rope_224", "not supported"),
        ("vit_relpos_base_patch16_224", "not supported"),
        (7, "must name a timm architecture"),
    ],
)
def test_architectures_of_timm_that_compute_something_else_are_refused(tmp_path, architecture, match):
    refuse(save_timm(tmp_path / "m", make_state(), architecture), match)


def test_sizes_without_known_heads_are_refused_unless_the_config_says_them(tmp_path):
    refuse(
        save_timm(tmp_path / "m", make_state(), "vit_small_patch16_224"),
        r"do not say how many attention heads there are: pass a folder whose config.json states them",
    )
    refuse(save_timm(tmp_path / "n", make_state(), "vit_small_patch16_224", num_heads="x"), "impossible model_args")


def test_dinov2_in_timms_form_may_leave_out_numbers(tmp_path):
    folder = save_timm(tmp_path / "m", make_state(), "vit_small_patch14_dinov2", num_heads=3)
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, "pretrained_cfg": {"mean": [0.485, 0.456, 0.406]}}))
    info = describe_backbone(folder, name=None, block=-2)
    assert (info.image_std, info.image_size) == ((0.229, 0.224, 0.225), 224)
    assert "does not say how its images are normalised" in info.notes[0]


# --- Bare files ------------------------------------------------------------------------------------------------------


def _shapes(item, side, table):
    """Zeros that take no memory."""
    from cytosae.backbones.dinov2 import expected_shapes

    shapes = expected_shapes(item)
    rename = {"register_tokens": "reg_token"}
    out = {}
    for key, shape in shapes.items():
        key = rename.get(key, key).replace("mlp.w12", "mlp.fc1").replace("mlp.w3", "mlp.fc2")
        if item.layer_scale or "gamma" not in key:
            out[key] = torch.zeros(1).expand(shape)
    rows = {"prefix": 1 + item.n_registers, "cls": 1, "patches": 0}[table]
    side = side or 224 // item.patch_size
    out["pos_embed"] = torch.zeros(1).expand(1, rows + side * side, item.width)
    return out


@pytest.mark.parametrize(
    ("name", "table", "side"),
    [
        ("uni", "prefix", None),
        ("uni2_h", "patches", None),
        ("virchow", "prefix", None),
        ("virchow2", "prefix", None),
        ("gigapath", "prefix", None),
        ("dino_vitt16", "prefix", None),
    ],
)
def test_encoders_with_shapes_of_their_own_are_recognised_with_a_note(tmp_path, name, table, side):
    torch.save(_shapes(ARCHITECTURES[name], side, table), tmp_path / "pytorch_model.bin")
    info = describe_backbone(tmp_path / "pytorch_model.bin", name=None, block=-2)
    wanted = known_transform(name)
    assert (info.name, info.n_blocks, info.n_registers) == (
        name,
        ARCHITECTURES[name].depth,
        ARCHITECTURES[name].n_registers,
    )
    assert (info.image_mean, info.image_std, info.image_size) == (wanted.mean, wanted.std, wanted.size)
    assert info.notes == (f"recognised as {name} by its shapes; if it is another encoder, say how it wants its images",)


@pytest.mark.parametrize(
    ("name", "table", "others"),
    [
        ("h_optimus_0", "patches", "dinov2_vitg14_reg, h_optimus_0, h_optimus_1"),
        ("h0_mini", "patches", None),
        ("kaiko_vits8", "prefix", "dino_vits8, lunit_vits8, kaiko_vits8"),
        ("kaiko_vitb16", "prefix", "dino_vitb16, mae_vitb16, kaiko_vitb16"),
    ],
)
def test_shapes_of_several_encoders_have_to_be_named(tmp_path, name, table, others):
    path = tmp_path / "v.pth"
    torch.save(_shapes(ARCHITECTURES[name], None, table), path)
    if others is not None:
        with pytest.raises(BackboneError, match=f"has the shapes of several encoders.* known are {others}. Say which"):
            describe_backbone(path, name=None, block=-2)
    info = describe_backbone(path, name=name, block=-2)
    assert (info.name, info.image_mean) == (name, known_transform(name).mean)
    stated = describe_backbone(path, name=None, block=-2, preprocessing=USER)
    assert stated.image_mean == (0.4, 0.5, 0.6)


def test_files_say_the_same_wherever_a_training_script_put_the_encoder(tmp_path, pixels):
    shape = {"width": 24, "depth": 3, "heads": 3, "patch_size": 56}
    state = make_state(hidden=96)
    expected = run_reference(state, pixels, -2, heads=3)
    other = {key: value + 1 for key, value in state.items()}

    def put(prefix, tensors=state):
        return {prefix + key: value for key, value in tensors.items()}

    files = {
        "bare": state,
        "backbone": put("backbone."),
        "module": {"state_dict": put("module.")},
        "model": {"model": state, "epoch": 3, "args": argparse.Namespace(lr=0.1)},
        "encoder": put("model.encoder.") | {"model.mil.attention.weight": torch.ones(2), "head.weight": torch.ones(2)},
        "teacher": {
            "teacher": put("backbone."),
            "student": put("module.backbone.", other),
            "optimizer": {"state": {0: 1}},
        },
        "ranks": {"model": put("teacher.backbone.") | put("student.backbone.", other), "iteration": 1},
        "deep": {"a": {"b": {"c": state}}},
        "ijepa": {"target_encoder": put("module."), "encoder": put("module.", other)},
        "heads": state
        | {"head.weight": torch.ones(2), "fc_norm.weight": torch.ones(2), "decoder_blocks.0.x": torch.ones(1)},
    }
    for name, value in files.items():
        torch.save({"architecture": shape | {"name": "toy"}, **value}, tmp_path / f"{name}.pth")
        backbone = load(tmp_path / f"{name}.pth")
        assert relative_error(backbone(pixels), expected) < 1e-5, name
    notes = describe_backbone(tmp_path / "encoder.pth", name=None, block=-2).notes
    assert notes == ("left out, not part of the encoder: head.weight; model.mil",)
    assert "decoder_blocks; fc_norm; head" in describe_backbone(tmp_path / "heads.pth", name=None, block=-2).notes[0]


def test_two_encoders_without_a_preferred_one_are_refused(tmp_path):
    state = make_state()
    value = {f"{prefix}.{key}": item for prefix in ("left", "right") for key, item in state.items()}
    torch.save(value, tmp_path / "v.pth")
    refuse(
        tmp_path / "v.pth", r"contains several encoders; their keys begin with 'left\.'; 'right\.'\. Save the wanted"
    )


def test_files_without_an_encoder_are_refused(tmp_path):
    torch.save({"conv1.weight": torch.ones(4, 3, 7, 7), "fc.weight": torch.ones(2)}, tmp_path / "resnet.pth")
    refuse(tmp_path / "resnet.pth", "fits no known network: no tensor is a patch embedding. Known are .*conv1.weight")
    torch.save({"patch_embed.proj.weight": torch.ones(4, 3, 7, 7)}, tmp_path / "v.pth")
    refuse(
        tmp_path / "v.pth", "is not a vision transformer as DINOv2 or timm saves them: missing blocks.0.mlp.fc1.weight"
    )
    torch.save(make_state(), tmp_path / "small.pth")
    refuse(
        tmp_path / "small.pth",
        r"fits no known network: 3 blocks of width 24 .* nearest is dino_vitt16 .* how many attention heads",
    )


def test_a_fine_tuned_network_of_usual_size_needs_only_its_preprocessing(tmp_path):
    """A ViT-L with 2 registers: no known encoder has these shapes."""
    item = dataclasses.replace(ARCHITECTURES["uni"], n_registers=2)
    torch.save(_shapes(item, None, "prefix"), tmp_path / "mine.pth")
    refuse(tmp_path / "mine.pth", r"does not say how its images are prepared .* --image-size 224 --image-mean 0\.485")
    info = describe_backbone(tmp_path / "mine.pth", name=None, block=-1, preprocessing=USER)
    assert (info.name, info.n_registers, info.image_std) == ("vit_1024x24_patch16", 2, (0.2, 0.3, 0.4))


# --- facebookresearch's DINOv3, open_clip, CONCH ---------------------------------------------------------------------


def as_facebook_dinov3(state, heads, *, periods=True):
    """Names of DINOv3's own code, with its masked bias of queries, keys and values."""
    saved = {"storage_tokens" if key == "reg_token" else key: value for key, value in state.items()}
    for key in [key for key in saved if key.endswith("attn.qkv.bias")]:
        width = len(saved[key]) // 3
        mask = torch.ones(3 * width)
        mask[width : 2 * width] = 0
        saved[f"{key}_mask"] = mask
        saved[key][width : 2 * width] = float("nan")  # as it is where nothing ever set it
    if periods:
        quarter = len(saved["norm.weight"]) // heads // 4
        saved["rope_embed.periods"] = 100.0 ** (torch.arange(quarter) / quarter)
    return saved | {"mask_token": torch.ones(1, 48), "local_cls_norm.weight": torch.ones(48)}


def test_facebooks_dinov3_equals_the_second_implementation(tmp_path, pixels):
    state = make_state(width=48, n_registers=4, table=None)
    expected = {key: value.clone() for key, value in state.items()}
    for key in expected:
        if key.endswith("attn.qkv.bias"):
            expected[key][48:96] = 0
    torch.save(as_facebook_dinov3(state, 3), tmp_path / "v.pth")
    found = load(tmp_path / "v.pth", preprocessing=USER)(pixels)
    assert relative_error(found, run_reference(expected, pixels, -2, heads=3, eps=1e-5, theta=100.0)) < 1e-5


def test_known_sizes_of_dinov3_are_recognised(tmp_path):
    item = ARCHITECTURES["dinov3_vits16"]
    state = _shapes(item, None, "patches")
    del state["pos_embed"]
    state = {re.sub(r"ls(\d)\.gamma", r"gamma_\1", key): value for key, value in state.items()}
    torch.save({key: value for key, value in state.items() if not key.endswith("qkv.bias")}, tmp_path / "v.pth")
    info = describe_backbone(tmp_path / "v.pth", name=None, block=-2)
    assert (info.name, info.n_tokens, info.image_size) == ("dinov3_vits16", 1 + 4 + 14 * 14, 224)


def as_open_clip(state, prefix="visual."):
    """Names of open_clip's own vision tower."""
    renames = (
        (r"^cls_token$", "class_embedding"), (r"^pos_embed$", "positional_embedding"),
        (r"^patch_embed\.proj\.", "conv1."), (r"^norm_pre\.", "ln_pre."), (r"^norm\.", "ln_post."),
        (r"^blocks\.", "transformer.resblocks."), (r"norm(\d)", r"ln_\1"), (r"attn\.qkv\.", "attn.in_proj_"),
        (r"attn\.proj\.", "attn.out_proj."), (r"mlp\.fc1", "mlp.c_fc"), (r"mlp\.fc2", "mlp.c_proj"),
    )  # fmt: skip
    saved = {}
    for key, value in state.items():
        for pattern, replacement in renames:
            key = re.sub(pattern, replacement, key)
        saved[prefix + key] = (
            value.flatten() if key == "class_embedding" else value[0] if "positional" in key else value
        )
    return saved | {"logit_scale": torch.ones(()), "transformer.resblocks.0.ln_1.weight": torch.ones(4)}


def test_options_of_open_clips_vision_tower_are_followed(tmp_path, pixels):
    state = make_state(scale=False, patch_bias=False)
    torch.save(as_open_clip(state), tmp_path / "open_clip_pytorch_model.bin")
    vision = {
        "width": 24,
        "head_width": 8,
        "no_ln_pre": True,
        "norm_kwargs": {"eps": 1e-3},
        "act_kwargs": {"approximate": "tanh"},
    }
    config = {"model_cfg": {"vision_cfg": vision}, "preprocess_cfg": STATED}
    (tmp_path / "open_clip_config.json").write_text(json.dumps(config))
    expected = run_reference(state, pixels, -2, heads=3, eps=1e-3, activation="gelu_tanh")
    assert relative_error(load(tmp_path)(pixels), expected) < 1e-5
    vision["act_kwargs"] = {"negative_slope": 0.1}
    (tmp_path / "open_clip_config.json").write_text(json.dumps(config))
    refuse(tmp_path, "unknown act_kwargs")


@pytest.mark.parametrize("quick", [False, True])
def test_folders_of_open_clip_equal_the_second_implementation(tmp_path, pixels, quick):
    state = make_state(scale=False, pre_norm=True, patch_bias=False)
    torch.save(as_open_clip(state), tmp_path / "open_clip_pytorch_model.bin")
    vision = {"image_size": 224, "layers": 3, "width": 24, "head_width": 8, "patch_size": 56}
    config = {"model_cfg": {"embed_dim": 8, "vision_cfg": vision, "quick_gelu": quick}, "preprocess_cfg": STATED}
    (tmp_path / "open_clip_config.json").write_text(json.dumps(config))
    expected = run_reference(state, pixels, -2, heads=3, eps=1e-5, activation="quick_gelu" if quick else "gelu")
    backbone = load(tmp_path)
    assert relative_error(backbone(pixels), expected) < 1e-5
    assert relative_error(load(tmp_path / "open_clip_pytorch_model.bin")(pixels), expected) < 1e-5
    assert backbone.info.notes == ("left out, not part of the encoder: logit_scale; transformer.resblocks",)
    (tmp_path / "open_clip_config.json").write_text(
        json.dumps({"model_cfg": {"vision_cfg": {"width": 24, "head_width": 0}}})
    )
    refuse(tmp_path, "open_clip_config.json' states impossible sizes")


def test_the_vision_half_of_an_open_clip_model_with_a_timm_trunk(tmp_path, pixels):
    state = make_state(scale=False)
    saved = {f"visual.trunk.{key}": value for key, value in state.items()}
    saved |= {"visual.head.proj.weight": torch.ones(2, 24), "text.transformer.embeddings.weight": torch.ones(2, 2)}
    torch.save(saved, tmp_path / "open_clip_pytorch_model.bin")
    refuse(tmp_path / "open_clip_pytorch_model.bin", "fits no known network")
    config = {"model_cfg": {"vision_cfg": {"timm_model_name": "vit_base_patch16_224"}}, "preprocess_cfg": STATED}
    (tmp_path / "open_clip_config.json").write_text(json.dumps(config))
    refuse(tmp_path, r"is not what its description says \(DINOv2 or timm\): .*blocks\.3")


@pytest.mark.parametrize(("name", "side", "size"), [("conch", 28, 448), ("biomedclip", 14, 224)])
def test_conch_and_biomedclip_are_recognised(tmp_path, name, side, size):
    state = _shapes(ARCHITECTURES[name], side, "prefix")
    torch.save({f"visual.trunk.{key}": value for key, value in state.items()}, tmp_path / "pytorch_model.bin")
    info = describe_backbone(tmp_path / "pytorch_model.bin", name=None, block=-2)
    assert (info.name, info.image_size, info.grid) == (name, size, (side, side))
    assert info.image_mean == (0.48145466, 0.4578275, 0.40821073)


def test_clip_from_a_bare_file_needs_its_name(tmp_path):
    """OpenAI's weights want QuickGELU, others GELU; no tensor tells."""
    item = ARCHITECTURES["clip_vitb32"]
    state = _shapes(item, None, "prefix") | {"norm_pre.weight": torch.ones(768), "norm_pre.bias": torch.ones(768)}
    del state["patch_embed.proj.bias"]
    torch.save(as_open_clip(state), tmp_path / "v.bin")
    refuse(tmp_path / "v.bin", "several encoders.*activation function; known are clip_vitb32, clip_vitb32_quickgelu")
    for name in ("clip_vitb32", "clip_vitb32_quickgelu"):
        assert describe_backbone(tmp_path / "v.bin", name=name, block=-2).name == name


# --- The registry ----------------------------------------------------------------------------------------------------


def test_the_registry_is_consistent():
    for name, item in ARCHITECTURES.items():
        assert name == item.name
        assert item.width % item.heads == 0
        assert known_transform(name).size % item.patch_size == 0
    assert ARCHITECTURES["virchow"].width // ARCHITECTURES["virchow"].heads == 80
    assert 2 * ARCHITECTURES["virchow2"].hidden == 6832
    assert 2 * ARCHITECTURES["uni2_h"].hidden == 2 * ARCHITECTURES["h_optimus_0"].hidden == 8192
    assert known_transform("h_optimus_0").mean == (0.707223, 0.578729, 0.703617)
    assert known_transform("kaiko_vitl14").std == (0.5, 0.5, 0.5)


# --- What would change tokens without a word -------------------------------------------------------------------------


def test_a_register_network_without_its_position_table_is_not_taken_for_dinov3(tmp_path):
    state = make_state(n_registers=4, table=None)
    refuse(save_timm(tmp_path / "m", state, "vit_small_patch14_reg4_dinov2", num_heads=3), "missing pos_embed")
    torch.save(state, tmp_path / "v.pth")
    refuse(tmp_path / "v.pth", "heads|missing pos_embed", preprocessing=USER)


@pytest.mark.parametrize(
    ("architecture", "arguments", "state", "match"),
    [
        ("vit_small_patch16_224", {"depth": 4}, {}, r"missing blocks\.3"),
        ("vit_small_patch16_224", {"depth": 2}, {}, r"unknown blocks\.2"),
        ("vit_small_patch16_224", {"embed_dim": 48}, {}, "has shape"),
        ("vit_small_patch16_224", {"init_values": 1e-5}, {"scale": False}, r"missing blocks\.0\.ls1"),
        ("vit_small_patch14_dinov2", {}, {"scale": False}, r"missing blocks\.0\.ls1"),
        ("vit_small_patch16_224", {"reg_tokens": 4}, {}, "missing register_tokens"),
        ("vit_small_patch16_224", {}, {"cls": False}, "missing cls_token"),
        ("vit_small_patch16_siglip_224", {}, {}, "unknown cls_token"),
        ("vit_small_patch16_224", {}, {"qkv_bias": False}, "qkv.bias"),
        ("vit_small_patch16_224", {}, {"patch_bias": False}, "missing patch_embed.bias"),
        ("vit_small_patch16_clip_224", {}, {"patch_bias": False}, "missing norm_pre"),
        ("vit_small_patch16_224", {"mlp_layer": "glu"}, {}, "unknown mlp_layer glu"),
        ("vit_small_patch16_224", {"act_layer": "mish"}, {}, "unknown activation 'mish'"),
        ("vit_small_patch16_224", {"depth": 10**9}, {}, "expected a whole number of 1 to 1000"),
    ],
)
def test_a_timm_description_that_contradicts_the_weights_is_refused(tmp_path, architecture, arguments, state, match):
    refuse(save_timm(tmp_path / "m", make_state(**state), architecture, **{"num_heads": 3} | arguments), match)


@pytest.mark.parametrize(
    "name",
    ["blocks.0.attn.qkv.lora_A.default.weight", "lora.0.weight", "w_As.0.weight", "adapters.0.weight",
     "prompt_embeddings", "blocks.1.adaptmlp.down.weight", "head.lora_B.weight", "prompt_pool"],
)  # fmt: skip
def test_adapters_that_are_not_merged_are_refused(tmp_path, name):
    torch.save(
        {f"model.{key}": value for key, value in make_state().items()} | {name: torch.ones(2)}, tmp_path / "v.pth"
    )
    refuse(tmp_path / "v.pth", "contains adapters that are not merged into the weights, such as .*merge_and_unload")


@pytest.mark.parametrize(("name", "side"), [("uni", 24), ("dino_vitt16", 24), ("virchow2", 27)])
def test_the_size_of_a_bare_file_is_that_of_its_position_table(tmp_path, name, side):
    torch.save(_shapes(ARCHITECTURES[name], side, "prefix"), tmp_path / "v.pth")
    for given in (None, name):
        info = describe_backbone(tmp_path / "v.pth", name=given, block=-2)
        assert (info.name, info.grid, info.image_size) == (name, (side, side), side * ARCHITECTURES[name].patch_size)


@pytest.mark.parametrize(("side", "key"), [(37, "register_tokens"), (16, "register_tokens"), (37, "reg_token")])
def test_registers_of_dinov2_are_recognised(tmp_path, side, key):
    state = _shapes(ARCHITECTURES["dinov2_vitl14_reg"], side, "cls" if key == "register_tokens" else "patches")
    state[key] = state.pop("reg_token")
    torch.save(state, tmp_path / "v.pth")
    assert describe_backbone(tmp_path / "v.pth", name=None, block=-2).name == "dinov2_vitl14_reg"


def test_what_describes_a_network_is_part_of_its_hash(tmp_path):
    torch.save(as_open_clip(make_state()), tmp_path / "open_clip_pytorch_model.bin")
    digests = []
    for quick in (False, True):
        config = {"model_cfg": {"vision_cfg": {}, "quick_gelu": quick}}
        (tmp_path / "open_clip_config.json").write_text(json.dumps(config))
        digests += [weights_sha256(tmp_path), weights_sha256(tmp_path / "open_clip_pytorch_model.bin")]
    assert len(set(digests)) == 2  # the folder and its file are the same network
    folder = save_timm(tmp_path / "m", make_state(), "vit_small_patch16_224", num_heads=3)
    before = weights_sha256(folder / "model.safetensors")
    save_timm(folder, make_state(), "vit_small_patch16_224", num_heads=6)
    assert weights_sha256(folder / "model.safetensors") != before
    dinov2 = save_timm(tmp_path / "d", make_state(), "vit_small_patch14_dinov2", num_heads=3)
    plain = hashlib.sha256((dinov2 / "model.safetensors").read_bytes()).hexdigest()
    assert weights_sha256(dinov2 / "model.safetensors") == plain


def test_filters_that_nothing_states_are_those_of_the_program(tmp_path):
    folder = save_timm(tmp_path / "m", make_state(), "vit_small_patch16_224", num_heads=3)
    config = json.loads((folder / "config.json").read_text())
    del config["pretrained_cfg"]["interpolation"]
    (folder / "config.json").write_text(json.dumps(config))
    assert describe_backbone(folder, name=None, block=-2).resample == "bicubic"
    torch.save(
        as_open_clip(make_state(scale=False, pre_norm=True, patch_bias=False)), tmp_path / "open_clip_pytorch_model.bin"
    )
    vision = {"image_size": 224, "width": 24, "head_width": 8, "patch_size": 56}
    config = {"model_cfg": {"vision_cfg": vision}, "preprocess_cfg": {"mean": [0.5] * 3, "std": [0.5] * 3}}
    (tmp_path / "open_clip_config.json").write_text(json.dumps(config))
    assert describe_backbone(tmp_path, name=None, block=-2).resample == "bicubic"


# --- Files that are not what they seem -------------------------------------------------------------------------------


def test_names_of_tensors_cannot_steer_a_terminal(tmp_path):
    evil = "crit\x1b[31m.\nstore '/tmp/evil'"
    shape = {"name": "toy", "width": 24, "depth": 3, "heads": 3, "patch_size": 56}
    state = {f"model.{key}": value for key, value in make_state(hidden=96).items()}
    torch.save({"architecture": shape, "s": state | {evil: torch.ones(1)}}, tmp_path / "v.pth")
    (note,) = describe_backbone(tmp_path / "v.pth", name=None, block=-2).notes
    assert note.isprintable()
    assert r"\x1b[31m" in note
    torch.save({"architecture": shape, "s": state | {"model.blocks.0.\x1b]0;x\x07": torch.ones(1)}}, tmp_path / "v.pth")
    with pytest.raises(BackboneError, match=r"unknown blocks\.0\.\\x1b\]0;x\\x07$"):
        describe_backbone(tmp_path / "v.pth", name=None, block=-2)


def test_messages_stay_short_whatever_a_file_says(tmp_path):
    huge = "x" * 10**6
    torch.save({huge: torch.ones(1)}, tmp_path / "v.pth")
    refuse(tmp_path / "v.pth", "fits no known network")
    folder = save_timm(tmp_path / "m", make_state(), huge)
    refuse(folder, "which is not supported")
    for key in ("input_size", "mean", "interpolation"):
        config = {"architecture": "vit_small_patch16_224", "pretrained_cfg": STATED | {key: huge}}
        (folder / "config.json").write_text(json.dumps(config))
        refuse(folder, "states an impossible preprocessing")


def test_sizes_are_checked_before_memory_is_taken(tmp_path):
    state = make_state()
    state["blocks.0.mlp.fc1.weight"] = torch.zeros(1).expand(1 << 36, 24)
    torch.save(state, tmp_path / "v.pth")
    refuse(tmp_path / "v.pth", "states 1,649,267,.* parameters, more than")


def test_a_part_of_a_split_checkpoint_names_its_folder(tmp_path):
    for name in ("model-00001-of-00002.safetensors", "model.safetensors.index.json"):
        (tmp_path / name).write_bytes(b"")
        refuse(tmp_path / name, "is one of several files of a checkpoint: pass their folder")


def test_a_folder_with_nothing_but_weights_is_read_like_the_file(tmp_path):
    state = _shapes(ARCHITECTURES["conch"], 28, "prefix")
    torch.save({f"visual.trunk.{key}": value for key, value in state.items()}, tmp_path / "pytorch_model.bin")
    info = describe_backbone(tmp_path, name=None, block=-2)
    assert (info.name, info.image_size) == ("conch", 448)


def test_wrappers_of_torch_and_moving_averages_of_timm(tmp_path, pixels):
    state = make_state(hidden=96)
    shape = {"name": "toy", "width": 24, "depth": 3, "heads": 3, "patch_size": 56}
    other = {key: value + 1 for key, value in state.items()}
    torch.save({"architecture": shape, "state_dict": other, "state_dict_ema": state}, tmp_path / "timm.pth")
    wrapped = {f"_orig_mod._fsdp_wrapped_module.{key}": value for key, value in state.items()}
    torch.save({"architecture": shape, "model": wrapped}, tmp_path / "fsdp.pth")
    for name in ("timm", "fsdp"):
        backbone = load(tmp_path / f"{name}.pth")
        assert relative_error(backbone(pixels), run_reference(state, pixels, -2, heads=3)) < 1e-5
    notes = describe_backbone(tmp_path / "timm.pth", name=None, block=-2).notes
    assert notes[-1] == "of 2 encoders in the file, 'state_dict_ema.' is used"
