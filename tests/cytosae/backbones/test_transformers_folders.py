"""Folders of transformers: tokens equal those of transformers' own classes, and what the folder states is followed."""

import functools
import json
import re
from pathlib import Path

import pytest
import torch

from cytosae.backbones.backbone import describe_backbone, load_backbone
from cytosae.backbones.errors import BackboneError
from cytosae.backbones.preprocessing import StatedTransform

safetensors = pytest.importorskip("safetensors.torch")

SMALL = {
    "hidden_size": 24,
    "num_hidden_layers": 4,
    "num_attention_heads": 3,
    "patch_size": 56,
    "image_size": 224,
    "initializer_range": 0.3,
}
TEXT = {"hidden_size": 8, "intermediate_size": 8, "num_hidden_layers": 1, "num_attention_heads": 2, "vocab_size": 9}
TEXT |= {"bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 0}
STATED = {"size": {"height": 224, "width": 224}, "image_mean": [0.5, 0.5, 0.5], "image_std": [0.5, 0.25, 0.5]}


@functools.cache
def make_model(kind, image_size=224):
    """A full random model of transformers."""
    import transformers as t

    vision = {**SMALL, "image_size": image_size, "intermediate_size": 40}
    dino = {**SMALL, "image_size": image_size, "mlp_ratio": 2}
    dinov3 = {**vision, "hidden_size": 48, "num_register_tokens": 2}
    makers = {
        "clip": lambda: t.CLIPVisionModel(t.CLIPVisionConfig(**vision)),
        "clip_gelu": lambda: t.CLIPVisionModel(t.CLIPVisionConfig(**vision, hidden_act="gelu")),
        "clip_full": lambda: t.CLIPModel(t.CLIPConfig(text_config=TEXT, vision_config=vision, projection_dim=8)),
        "clip_projected": lambda: t.CLIPVisionModelWithProjection(t.CLIPVisionConfig(**vision)),
        "vit": lambda: t.ViTModel(t.ViTConfig(**vision)),
        "vit_classifier": lambda: t.ViTForImageClassification(t.ViTConfig(**vision)),
        "vit_without_bias": lambda: t.ViTModel(t.ViTConfig(**vision, qkv_bias=False)),
        "deit": lambda: t.DeiTModel(t.DeiTConfig(**vision)),
        "vit_mae": lambda: t.ViTMAEForPreTraining(
            t.ViTMAEConfig(**vision, decoder_num_hidden_layers=1, mask_ratio=0.0)
        ),
        "ijepa": lambda: t.IJepaModel(t.IJepaConfig(**vision)),
        "dinov2": lambda: t.Dinov2Model(t.Dinov2Config(**dino)),
        "dinov2_swiglu": lambda: t.Dinov2Model(t.Dinov2Config(**dino, use_swiglu_ffn=True)),
        "dinov2_classifier": lambda: t.Dinov2ForImageClassification(t.Dinov2Config(**dino)),
        "dinov2_reg": lambda: t.Dinov2WithRegistersModel(t.Dinov2WithRegistersConfig(**dino, num_register_tokens=3)),
        "dinov3": lambda: t.DINOv3ViTModel(t.DINOv3ViTConfig(**dinov3)),
        "dinov3_gated": lambda: t.DINOv3ViTModel(t.DINOv3ViTConfig(**dinov3, use_gated_mlp=True, hidden_act="silu")),
        "siglip": lambda: t.SiglipVisionModel(t.SiglipVisionConfig(**vision)),
        "siglip_full": lambda: t.SiglipModel(t.SiglipConfig(text_config=TEXT, vision_config=vision)),
    }
    with torch.random.fork_rng():
        torch.manual_seed(5)
        model = makers[kind]()
        for parameter in model.parameters():
            # New biases are 0 and gains 1; changed, so that each of them matters.
            parameter.data += 0.1 * torch.randn_like(parameter)
    return model.eval()


KINDS = (
    "clip", "clip_gelu", "clip_full", "clip_projected", "vit", "vit_classifier", "vit_without_bias", "deit", "vit_mae",
    "ijepa", "dinov2", "dinov2_swiglu", "dinov2_classifier", "dinov2_reg", "dinov3", "dinov3_gated", "siglip",
    "siglip_full",
)  # fmt: skip
PREFIX = {"siglip": 0, "siglip_full": 0, "ijepa": 0, "deit": 2, "dinov2_reg": 4, "dinov3": 3, "dinov3_gated": 3}


@pytest.fixture
def folder_of(tmp_path):
    """Creates a folder with a random model of a kind."""

    def make(kind, image_size=224, *, stated=STATED, **options):
        folder = tmp_path / f"hf_{kind}_{image_size}"
        make_model(kind, image_size).save_pretrained(folder, **options)
        if stated is not None:
            (folder / "preprocessor_config.json").write_text(json.dumps(stated))
        return folder

    return make


@pytest.fixture(scope="module")
def pixels():
    return torch.randn(2, 3, 224, 224, generator=torch.Generator().manual_seed(1))


def describe(folder, block=-2, **options):
    return describe_backbone(folder, name=None, block=block, **options)


def load(folder, block=-2, **options):
    return load_backbone(folder, describe(folder, block, **options))


def run_full(model, pixels, block):
    """The output of a block in the full model, with its own interpolation of positions where it has to be asked for."""
    for part in ("vision_model", "vit", "dinov2"):
        model = getattr(model, part, model)
    (blocks,) = [m for m in model.modules() if isinstance(m, torch.nn.ModuleList) and len(m) == 4]
    caught = []
    hook = blocks[block].register_forward_hook(lambda module, inputs, output: caught.append(output))
    asks = type(model).__name__ not in ("Dinov2Model", "Dinov2WithRegistersModel", "DINOv3ViTModel")
    arguments = {"interpolate_pos_encoding": True} if asks else {}
    if type(model).__name__ == "ViTMAEModel":
        # Unmasked, but shuffled unless the noise is in order.
        arguments["noise"] = torch.arange(16.0).expand(len(pixels), -1)
    with torch.no_grad():
        model(pixel_values=pixels, **arguments)
    hook.remove()
    (output,) = caught
    return output[0] if isinstance(output, tuple) else output


def relative_error(found, expected):
    return float((found - expected).norm() / expected.norm())


@pytest.mark.parametrize("image_size", [224, 336])
@pytest.mark.parametrize("kind", KINDS)
def test_tokens_equal_those_of_the_full_model(folder_of, pixels, kind, image_size):
    folder = folder_of(kind, image_size)
    for block in (-2, -1, 0):
        backbone = load(folder, block)
        assert relative_error(backbone(pixels), run_full(make_model(kind, image_size), pixels, block)) < 1e-5
        assert len(backbone.model.blocks) == block % 4 + 1
    info = backbone.info
    assert (info.name, info.n_blocks, info.patch_size) == (folder.name, 4, 56)
    assert info.n_cls + info.n_registers == PREFIX.get(kind, 1)
    assert info.n_tokens == PREFIX.get(kind, 1) + 16
    assert (info.image_size, info.image_mean, info.image_std) == (224, (0.5, 0.5, 0.5), (0.5, 0.25, 0.5))


@pytest.mark.parametrize("kind", ["vit", "dinov2", "dinov2_reg", "dinov3", "siglip"])
def test_another_size_of_images_has_another_grid(folder_of, kind):
    folder = folder_of(kind)
    backbone = load(folder, preprocessing=StatedTransform(size=336))
    assert (backbone.info.grid, backbone.info.image_size) == ((6, 6), 336)
    images = torch.randn(1, 3, 336, 336, generator=torch.Generator().manual_seed(2))
    assert relative_error(backbone(images), run_full(make_model(kind), images, -2)) < 1e-5


def test_transformers_is_not_imported(folder_of):
    import subprocess
    import sys

    folder = folder_of("vit")
    code = (
        "import sys; from pathlib import Path\n"
        "from cytosae.backbones.backbone import describe_backbone, load_backbone\n"
        "info = describe_backbone(Path(sys.argv[1]), name=None, block=-2); load_backbone(Path(sys.argv[1]), info)\n"
        "print({'transformers', 'torchvision', 'timm'} & set(sys.modules))"
    )
    done = subprocess.run(
        [sys.executable, "-c", code, str(folder)], cwd=Path(__file__).parents[3], capture_output=True, text=True,
        check=True,
    )  # fmt: skip
    assert done.stdout.strip() == "set()"


# --- Files of a folder ------------------------------------------------------------------------------------------------


def test_shards_bin_files_half_precision_and_a_file_of_the_folder_give_the_same(folder_of, pixels):
    folder = folder_of("vit")
    expected = load(folder)(pixels)
    make_model("vit").save_pretrained(folder.parent / "sharded", max_shard_size="20KB")
    (folder.parent / "sharded" / "preprocessor_config.json").write_text(json.dumps(STATED))
    assert len(list((folder.parent / "sharded").glob("model-*.safetensors"))) > 2
    assert torch.equal(load(folder.parent / "sharded")(pixels), expected)
    assert torch.equal(load(folder / "model.safetensors")(pixels), expected)
    state = safetensors.load_file(folder / "model.safetensors")
    (folder / "model.safetensors").unlink()
    torch.save(state, folder / "pytorch_model.bin")
    assert torch.equal(load(folder)(pixels), expected)
    torch.save({f"module.{name}": item.bfloat16() for name, item in state.items()}, folder / "pytorch_model.bin")
    backbone = load(folder)
    assert {item.dtype for item in backbone.parameters()} == {torch.float32}
    assert relative_error(backbone(pixels), expected) < 0.05


def test_a_missing_shard_is_named(folder_of):
    folder = folder_of("vit", max_shard_size="20KB")
    (folder / "model-00002-of-00003.safetensors").unlink(missing_ok=True)
    next(iter(folder.glob("model-00001*"))).unlink()
    with pytest.raises(BackboneError, match=r"names \d files, of which \d (are|is) missing: model-00001.*download"):
        describe(folder)


@pytest.mark.parametrize("name", ["../model.safetensors", "/etc/passwd", "..", 7, "a/b.safetensors"])
def test_an_index_cannot_lead_out_of_its_folder(folder_of, name):
    folder = folder_of("vit", max_shard_size="20KB")
    index = folder / "model.safetensors.index.json"
    index.write_text(json.dumps({"weight_map": {"embeddings.cls_token": name}}))
    with pytest.raises(BackboneError, match="has no weight_map from tensors to files in its folder"):
        describe(folder)


def test_no_code_of_a_folder_runs(folder_of, pixels):
    """A folder of Hibou's kind: DINOv2 by its type, registers, and code of its own."""
    folder = folder_of("dinov2_reg")
    config = json.loads((folder / "config.json").read_text())
    config |= {"model_type": "dinov2", "auto_map": {"AutoModel": "modeling.Model"}}
    (folder / "config.json").write_text(json.dumps(config))
    (folder / "modeling.py").write_text("raise SystemExit('executed')")
    assert relative_error(load(folder)(pixels), run_full(make_model("dinov2_reg"), pixels, -2)) < 1e-5
    (folder / "preprocessor_config.json").unlink()
    with pytest.raises(BackboneError, match=r"how its images are prepared.*--image-mean 0\.7068 0\.5755 0\.722"):
        describe(folder)


def change_weights(folder, change):
    state = safetensors.load_file(folder / "model.safetensors")
    change(state)
    safetensors.save_file(state, folder / "model.safetensors", metadata={"format": "pt"})


def test_a_mask_token_and_a_final_norm_may_be_missing(folder_of, pixels):
    folder = folder_of("dinov2")
    expected = load(folder)(pixels)
    change_weights(
        folder, lambda state: [state.pop(name) for name in list(state) if "mask" in name or "layernorm" in name]
    )
    assert torch.equal(load(folder)(pixels), expected)


@pytest.mark.parametrize("kind", KINDS)
def test_a_missing_weight_is_named(folder_of, kind):
    folder = folder_of(kind)
    missing = []

    def remove(state):
        missing.append(next(key for key in sorted(state) if "layer" in key and ".1." in key and "text" not in key))
        del state[missing[0]]

    change_weights(folder, remove)
    with pytest.raises(BackboneError, match=r"is not what its description says .*: missing .*\.1\.") as caught:
        describe(folder)
    assert len(str(caught.value)) < 800


@pytest.mark.parametrize("kind", KINDS)
def test_parts_of_a_joined_weight_have_the_names_of_the_file(folder_of, kind):
    folder = folder_of(kind)
    names = []

    def remove(state):
        names.extend(key for key in sorted(state) if "query.weight" in key or "q_proj.weight" in key)
        names[:] = [key for key in names if ".1." in key and "text" not in key]
        state.pop(names[0], None)

    change_weights(folder, remove)
    with pytest.raises(BackboneError) as caught:
        describe(folder)
    text = str(caught.value)
    assert "qkv" not in text
    assert "unknown" not in text
    missing = text.split(": missing ")[1]
    assert names[0].endswith(missing)

    def narrow(state):
        state[names[0]] = torch.ones(7, 5)

    change_weights(folder, narrow)
    with pytest.raises(BackboneError, match=r"has shape \(7, 5\), expected \(\d+, \d+\)") as caught:
        describe(folder)
    assert "qkv" not in str(caught.value)


def test_a_timm_name_that_contradicts_the_folder_is_only_a_label(folder_of):
    folder = folder_of("vit")
    info = describe_backbone(folder, name="dinov2_vitb14", block=-2)
    (note,) = (note for note in info.notes if "only a label" in note)
    assert note.startswith("model_name dinov2_vitb14 is only a label: the checkpoint is ")
    assert not any("label" in note for note in describe_backbone(folder, name="mine", block=-2).notes)


def test_unknown_and_misshapen_weights_are_named(folder_of):
    folder = folder_of("vit")
    change_weights(folder, lambda state: state.update({"encoder.layer.1.gate.weight": torch.ones(2)}))
    with pytest.raises(BackboneError, match=r"unknown encoder\.layer\.1\.gate\.weight"):
        describe(folder)
    change_weights(folder, lambda state: state.pop("encoder.layer.1.gate.weight"))
    change_weights(folder, lambda state: state.update({"embeddings.cls_token": torch.ones(1, 1, 23)}))
    with pytest.raises(BackboneError, match=r"embeddings\.cls_token has shape \(1, 1, 23\), expected \(1, 1, 24\)"):
        describe(folder)


def test_a_config_that_contradicts_the_weights_is_refused(folder_of):
    folder = folder_of("vit")
    config = json.loads((folder / "config.json").read_text())
    for change in ({"num_hidden_layers": 3}, {"num_hidden_layers": 5}, {"hidden_size": 48}, {"patch_size": 28}):
        (folder / "config.json").write_text(json.dumps(config | change))
        with pytest.raises(BackboneError, match="is not what its description says"):
            describe(folder)
    (folder / "config.json").write_text(json.dumps(config | {"num_attention_heads": 5}))
    with pytest.raises(BackboneError, match="cannot have 5 attention heads: its width 24"):
        describe(folder)


def test_parts_that_a_family_always_has_cannot_all_be_missing(folder_of):
    folder = folder_of("dinov2")
    change_weights(folder, lambda state: [state.pop(name) for name in list(state) if "layer_scale" in name])
    with pytest.raises(BackboneError, match=r"missing blocks\.0\.ls1"):
        describe(folder)
    folder = folder_of("vit")
    change_weights(
        folder, lambda state: [state.pop(name) for name in list(state) if re.search("(query|key|value).bias", name)]
    )
    with pytest.raises(BackboneError, match=r"missing blocks\.0\.attn\.qkv\.bias"):
        describe(folder)


def test_heads_are_named_as_left_out(folder_of):
    assert describe(folder_of("vit")).notes == ("left out, not part of the encoder: pooler",)
    (note,) = describe(folder_of("clip_full")).notes
    assert note.startswith("left out, not part of the encoder: logit_scale; text_model.")
    assert "classifier" in describe(folder_of("vit_classifier")).notes[0]


def test_weights_that_are_not_finite_are_refused(folder_of):
    folder = folder_of("vit")
    change_weights(folder, lambda state: state["embeddings.cls_token"].fill_(float("nan")))
    with pytest.raises(BackboneError, match="contain NaN or infinity: embeddings.cls_token"):
        load(folder)


def test_folders_without_weights_or_with_damaged_ones(folder_of, tmp_path):
    folder = folder_of("vit")
    (folder / "model.safetensors").write_bytes(b"\xff" * 100)
    with pytest.raises(BackboneError, match="is not a readable checkpoint"):
        describe(folder)
    (folder / "model.safetensors").unlink()
    with pytest.raises(BackboneError, match="has no weights under a usual name .*; found none"):
        describe(folder)
    for name in ("a.pth", "b.pth"):
        torch.save({}, folder / name)
    with pytest.raises(BackboneError, match=r"several could be meant: a\.pth, b\.pth"):
        describe(folder)


def test_heads_of_a_folder_are_those_of_its_config(folder_of, pixels):
    folder = folder_of("vit")
    expected = load(folder)(pixels)
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | {"num_attention_heads": 6}))
    assert relative_error(load(folder)(pixels), expected) > 1e-3


# --- Preprocessing ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("stated", "expected"),
    [
        ({}, (224, (0.5, 0.5, 0.5), (0.5, 0.25, 0.5), 1 / 255, "bilinear")),
        ({"do_normalize": False}, (224, (0.0, 0.0, 0.0), (1.0, 1.0, 1.0), 1 / 255, "bilinear")),
        ({"do_rescale": False}, (224, (0.5, 0.5, 0.5), (0.5, 0.25, 0.5), 1.0, "bilinear")),
        ({"rescale_factor": 0.5}, (224, (0.5, 0.5, 0.5), (0.5, 0.25, 0.5), 0.5, "bilinear")),
        ({"rescale_factor": 0.00392156862745098}, (224, (0.5, 0.5, 0.5), (0.5, 0.25, 0.5), 1 / 255, "bilinear")),
        ({"resample": 3}, (224, (0.5, 0.5, 0.5), (0.5, 0.25, 0.5), 1 / 255, "bicubic")),
        ({"size": 112}, (112, (0.5, 0.5, 0.5), (0.5, 0.25, 0.5), 1 / 255, "bilinear")),
        (
            {"size": {"shortest_edge": 256}, "do_center_crop": True, "crop_size": {"height": 280, "width": 280}},
            (280, (0.5, 0.5, 0.5), (0.5, 0.25, 0.5), 1 / 255, "bilinear"),
        ),
        (
            {"size": {"shortest_edge": 112}, "do_center_crop": False, "crop_size": 224},
            (112, (0.5, 0.5, 0.5), (0.5, 0.25, 0.5), 1 / 255, "bilinear"),
        ),
    ],
)
@pytest.mark.parametrize("file", ["preprocessor_config.json", "processor_config.json"])
def test_the_preprocessing_is_the_folders_own(folder_of, stated, expected, file):
    folder = folder_of("vit", stated=None)
    text = STATED | stated
    (folder / file).write_text(json.dumps({"image_processor": text} if file.startswith("processor") else text))
    info = describe(folder)
    assert (info.image_size, info.image_mean, info.image_std, info.image_scale, info.resample) == expected


def test_a_size_that_is_not_stated_is_that_of_the_position_table(folder_of):
    folder = folder_of("vit", 336, stated={key: STATED[key] for key in ("image_mean", "image_std")})
    assert describe(folder).image_size == 336
    assert describe(folder, preprocessing=StatedTransform(size=224)).image_size == 224


@pytest.mark.parametrize(
    ("kind", "options"),
    [
        ("clip", r"--image-size 224 --image-mean 0\.48145466 0\.4578275 0\.40821073 --image-std 0\.26862954 0\.26"),
        ("vit", r"--image-size 224 --image-mean 0\.5 0\.5 0\.5 --image-std 0\.5 0\.5 0\.5"),
        ("siglip", r"--image-mean 0\.5 0\.5 0\.5"),
        ("ijepa", r"--image-mean 0\.485 0\.456 0\.406 --image-std 0\.229 0\.224 0\.225"),
        ("dinov3", r"--image-mean 0\.485 0\.456 0\.406 --image-std 0\.229 0\.224 0\.225"),
    ],
)
def test_where_nothing_states_the_preprocessing_options_are_suggested(folder_of, kind, options):
    folder = folder_of(kind, stated=None)
    with pytest.raises(BackboneError, match=f"does not say how its images are prepared .*usually wants: .*{options}"):
        describe(folder)
    stated = StatedTransform(size=224, mean=(0.1, 0.2, 0.3), std=(1, 1, 1))
    assert describe(folder, preprocessing=stated).image_mean == (0.1, 0.2, 0.3)


def test_dinov2_without_a_statement_is_normalised_as_defined_with_a_note(folder_of):
    info = describe(folder_of("dinov2", stated=None))
    assert (info.image_size, info.image_mean) == (224, (0.485, 0.456, 0.406))
    assert "does not say how its images are normalised; assuming DINOv2's --image-size 224" in info.notes[0]


@pytest.mark.parametrize(
    "wrong",
    [
        {"image_mean": [0.1, 0.2]},
        {"image_mean": "red"},
        {"image_std": 1},
        {"image_std": [0.5, 0.5, 0]},
        {"image_mean": [0, 0, float("nan")]},
        {"size": {"height": 224, "width": 112}},
        {"size": 0},
        {"size": 10**9},
        {"size": {"max_patches": 3}},
        {"rescale_factor": -1},
        {"resample": 9},
        {"resample": "blurry"},
    ],
)
def test_an_impossible_preprocessing_is_refused(folder_of, wrong):
    folder = folder_of("vit", stated=STATED | wrong)
    with pytest.raises(BackboneError, match=r"preprocessor_config.json' states an impossible preprocessing: "):
        describe(folder)


def test_patches_must_tile_the_image_unless_the_table_says_otherwise(folder_of):
    folder = folder_of("vit")
    with pytest.raises(BackboneError, match=r"patches of 56 pixels do not tile .*--image-size 280 or 336"):
        describe(folder, preprocessing=StatedTransform(size=300))
    with pytest.raises(BackboneError, match=r"--image-size 224 or 280"):
        describe(folder, preprocessing=StatedTransform(size=240))
    # As SigLIP so400m at 384 with patches of 14: 27 rows, and 6 pixels that nothing sees.
    (folder / "preprocessor_config.json").write_text(json.dumps(STATED | {"size": 240}))
    assert load(folder).info.grid == (4, 4)
    with pytest.raises(BackboneError, match="images of 40 pixels are smaller than a patch"):
        describe(folder, preprocessing=StatedTransform(size=40))


# --- Descriptions that are refused ------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("config", "match"),
    [
        (None, r"fits no known network: 4 blocks of width 24 .* do not say how many attention heads"),
        ("{", "is not JSON"),
        ("[" * 100_000, "is not JSON"),
        ("[]", "must contain a JSON object"),
        ('{"model_type": "bert"}', "contains a model of type 'bert'; known are clip, .* and folders of timm"),
        ('{"model_type": ["vit"]}', r"contains a model of type \['vit'\]; known are clip, "),
        ('{"model_type": "siglip2_vision_model"}', r"variable resolution \(naflex\): its tokens have no fixed grid"),
        ('{"model_type": "siglip2"}', r"variable resolution \(naflex\)"),
        ('{"model_type": "vit", "num_hidden_layers": 0}', "states impossible sizes: expected a whole number of 1 to"),
        ('{"model_type": "vit", "hidden_size": "x"}', "states impossible sizes"),
        ('{"model_type": "vit", "hidden_size": 100000000}', "states impossible sizes"),
        ('{"model_type": "vit", "layer_norm_eps": 0}', "states impossible sizes: expected a number above 0"),
        ('{"model_type": "vit", "hidden_act": "mish"}', "states impossible sizes: unknown activation 'mish'"),
        ('{"model_type": "clip", "vision_config": null}', "states impossible sizes"),
    ],
)
def test_folders_that_are_not_models(folder_of, config, match):
    folder = folder_of("vit")
    (folder / "config.json").unlink()
    if config is not None:
        (folder / "config.json").write_text(config)
    with pytest.raises(BackboneError, match=match) as caught:
        describe(folder)
    assert len(str(caught.value)) < 800


@pytest.mark.parametrize(
    "name", ["CLIPVisionConfig", "SiglipVisionConfig", "ViTConfig", "DeiTConfig", "ViTMAEConfig", "IJepaConfig",
             "Dinov2Config", "Dinov2WithRegistersConfig", "DINOv3ViTConfig"],
)  # fmt: skip
def test_sizes_left_out_are_the_defaults_of_transformers(tmp_path, name):
    """A config may omit the defaults of transformers."""
    import transformers

    from cytosae.backbones.huggingface import FAMILIES
    from cytosae.backbones.statement import activation_name

    default = getattr(transformers, name)()
    family = FAMILIES[default.model_type]
    found = (family.width, family.depth, family.heads, family.patch_size, family.eps, family.activation)
    activation = activation_name(default.hidden_act)
    sizes = (default.hidden_size, default.num_hidden_layers, default.num_attention_heads, default.patch_size)
    assert found == (*sizes, default.layer_norm_eps, activation)
    assert (family.n_registers or 0) == getattr(default, "num_register_tokens", 0)


def test_a_bare_file_of_a_folder_follows_the_rules_of_transformers(folder_of, pixels, monkeypatch):
    """Heads are known by the size for real files; here the table of sizes is extended by the toy's."""
    monkeypatch.setattr("cytosae.backbones.shapes.usual_heads", lambda width, depth, *, rotary: 3)
    stated = StatedTransform(size=224, mean=(0.5, 0.5, 0.5), std=(0.5, 0.25, 0.5))
    for kind, image_size in (("siglip", 224), ("vit", 336), ("dinov2", 336), ("dinov2_reg", 336)):
        folder = folder_of(kind, image_size)
        bare = folder.parent / f"{kind}.safetensors"
        (folder / "model.safetensors").rename(bare)
        found = load(bare, preprocessing=stated)(pixels)
        assert relative_error(found, run_full(make_model(kind, image_size), pixels, -2)) < 1e-5, kind


@pytest.mark.parametrize(
    ("kind", "change", "expected"),
    [
        ("clip", {}, "bicubic"),
        ("siglip", {}, "bicubic"),
        ("deit", {}, "bicubic"),
        ("vit", {}, "bilinear"),
        ("dinov2", {}, "bilinear"),
        ("dinov2", {"image_processor_type": "BitImageProcessor"}, "bicubic"),
        ("vit", {"image_processor_type": "CLIPImageProcessor"}, "bicubic"),
        ("clip", {"resample": 2}, "bilinear"),
    ],
)
def test_a_filter_that_is_not_stated_is_that_of_the_processor(folder_of, kind, change, expected):
    assert describe(folder_of(kind, stated=STATED | change)).resample == expected
