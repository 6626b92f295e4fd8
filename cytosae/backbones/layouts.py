"""Names of tensors: those of each program that saves vision transformers, onto one scheme.

A layout is a pure function from a program's name to ours. `find_encoder` finds where in a checkpoint the encoder lies.
The scheme is that of `VisionTransformer`, and before `join_parts` also `blocks.<i>.attn.{q,k,v}` and
`blocks.<i>.mlp.{gate,up}` for networks that keep these apart.
"""

import re
from collections.abc import Collection, Mapping
from dataclasses import dataclass

import torch

from cytosae.backbones.errors import BackboneError, listed, shown
from cytosae.backbones.weights import Checkpoint, State

LEFT_OUT = ""
"""What a layout says of a tensor behind the last block, or of one that only training uses."""

_BEHIND = re.compile(
    r"mask_token|(fc_|cls_|local_cls_|feature_?)?norm|post_layernorm|layernorm|ln_post|proj|visual_projection|"
    r"(\w*_)?(head|heads|classifier|classification|pooler|pool|attn_pool|decoder|projector|projection|predictor|logits?|"
    r"criterion|loss)s?(_\w+)?|fc\d?|linear|logit_scale|logit_bias|text\w*"
)
"""First part of names that no block and no embedding has: norms, heads, pools and decoders behind the last block."""


_ADAPTER = re.compile(
    r"(?<![^._])(?:lora(?:_[A-Za-z]+)?|w_[AB]s?|w_[ab]_\w+|adapters?\w*|adaptmlp|ia3_l|dora\w*|ssf_\w+|(?:deep_)?prompts?(?:_embeddings|_tokens|_pool)?)(?![^._])"
)
"""Names of what fine-tuning adds to a network; it changes every token."""

_USUAL = re.compile(r"(norm|layernorm|post_layernorm|ln_post|cls_norm|embeddings)\.\w+|mask_token")
"""Left out of nearly every encoder: a final norm, a mask token. Naming them would only worry."""


@dataclass(frozen=True)
class Layout:
    """How one program names the tensors of a vision transformer."""

    name: str
    """Name in messages."""
    marker: str
    """Name of the patch embedding's weight, which every encoder of this layout has."""
    top: Mapping[str, str]
    """Names outside the blocks."""
    block: re.Pattern[str]
    """Names inside a block: its number and the rest."""
    inside: Mapping[str, str]
    """Names inside a block without `.weight` or `.bias`."""
    bare_tokens: bool = False
    """Whether the CLS token is a vector and the position table a matrix, without a dimension for the batch."""

    def rename(self, name: str) -> str | None:
        """Our name of a tensor; `LEFT_OUT` if no token depends on it, None if it is unknown."""
        if name in self.top:
            return self.top[name]
        match = self.block.fullmatch(name)
        if match is None:
            return LEFT_OUT if _BEHIND.fullmatch(name.split(".")[0]) else None
        number, rest = match.groups()
        if rest in self.inside:
            return f"blocks.{number}.{self.inside[rest]}"
        module, _, kind = rest.rpartition(".")
        if kind in ("weight", "bias") and module in self.inside:
            return f"blocks.{number}.{self.inside[module]}.{kind}"
        return None


_PATCH = {"weight": "patch_embed.weight", "bias": "patch_embed.bias"}
_NORMS = {"norm1": "norm1", "norm2": "norm2"}

FACEBOOK_TIMM = Layout(
    "DINOv2 or timm",
    "patch_embed.proj.weight",
    {
        "cls_token": "cls_token",
        **dict.fromkeys(("register_tokens", "reg_token", "storage_tokens", "dist_token"), "registers"),
        "pos_embed": "positions",
        **{f"patch_embed.proj.{kind}": name for kind, name in _PATCH.items()},
        **{f"norm_pre.{kind}": f"norm_pre.{kind}" for kind in _PATCH},
        **dict.fromkeys(("rope_embed.periods", "rope.periods"), "rope_periods"),
    },
    # DINOv2 can save its blocks in chunks: blocks.<chunk>.<i>, i counted through the whole network.
    re.compile(r"blocks\.(?:\d+\.)?(\d+)\.([a-z].*)"),
    {
        **_NORMS,
        "attn.qkv": "attn.qkv",
        "attn.qkv.bias_mask": "attn.qkv.bias_mask",
        **{f"attn.{part}_proj": f"attn.{part}" for part in "qkv"},
        **{f"attn.{part}_bias": f"attn.{part}.bias" for part in "qkv"},
        "attn.proj": "attn.proj",
        **dict.fromkeys(("ls1.gamma", "gamma_1"), "ls1"),
        **dict.fromkeys(("ls2.gamma", "gamma_2"), "ls2"),
        **{"mlp.fc1": "mlp.fc1", "mlp.fc2": "mlp.fc2", "mlp.w12": "mlp.fc1", "mlp.w3": "mlp.fc2"},
        **{"mlp.w1": "mlp.gate", "mlp.w2": "mlp.up", "mlp.fc1_g": "mlp.gate", "mlp.fc1_x": "mlp.up"},
    },
)  # fmt: skip
"""facebookresearch's DINO, DINOv2, DINOv3 and MAE, and timm, which took over their names."""

_HF_SPLIT = {
    **{f"attention.attention.{old}": f"attn.{old[0]}" for old in ("query", "key", "value")},
    **{f"attention.{part}_proj": f"attn.{part}" for part in "qkv"},
}

TRANSFORMERS_VIT = Layout(
    "transformers ViT",
    "embeddings.patch_embeddings.projection.weight",
    {
        "embeddings.cls_token": "cls_token",
        **dict.fromkeys(("embeddings.register_tokens", "embeddings.distillation_token"), "registers"),
        "embeddings.position_embeddings": "positions",
        "embeddings.mask_token": LEFT_OUT,
        **{f"embeddings.patch_embeddings.projection.{kind}": name for kind, name in _PATCH.items()},
    },
    re.compile(r"(?:encoder\.layer|layers|layer)\.(\d+)\.(.+)"),
    {
        **_NORMS,
        **{"layernorm_before": "norm1", "layernorm_after": "norm2"},
        **_HF_SPLIT,
        **{"attention.output.dense": "attn.proj", "attention.o_proj": "attn.proj"},
        **{"layer_scale1.lambda1": "ls1", "layer_scale2.lambda1": "ls2"},
        **{"intermediate.dense": "mlp.fc1", "output.dense": "mlp.fc2", "mlp.fc1": "mlp.fc1", "mlp.fc2": "mlp.fc2"},
        **{"mlp.weights_in": "mlp.fc1", "mlp.weights_out": "mlp.fc2", "mlp.gate_proj": "mlp.gate"},
        **{"mlp.up_proj": "mlp.up", "mlp.down_proj": "mlp.fc2"},
    },
)
"""transformers' ViT, DeiT, ViTMAE, IJepa and Dinov2 with and without registers."""

TRANSFORMERS_DINOV3 = Layout(
    "transformers DINOv3",
    "embeddings.patch_embeddings.weight",
    {
        "embeddings.cls_token": "cls_token",
        "embeddings.register_tokens": "registers",
        "embeddings.mask_token": LEFT_OUT,
        **{f"embeddings.patch_embeddings.{kind}": name for kind, name in _PATCH.items()},
    },
    re.compile(r"(?:model\.)?layer\.(\d+)\.(.+)"),
    {
        **_NORMS,
        **_HF_SPLIT,
        "attention.o_proj": "attn.proj",
        **{"layer_scale1.lambda1": "ls1", "layer_scale2.lambda1": "ls2"},
        **{"mlp.up_proj": "mlp.up", "mlp.gate_proj": "mlp.gate", "mlp.down_proj": "mlp.fc2"},
    },
)

TRANSFORMERS_CLIP = Layout(
    "transformers CLIP or SigLIP",
    "embeddings.patch_embedding.weight",
    {
        "embeddings.class_embedding": "cls_token",
        "embeddings.position_embedding.weight": "positions",
        "embeddings.position_ids": LEFT_OUT,
        **{f"embeddings.patch_embedding.{kind}": name for kind, name in _PATCH.items()},
        **{f"{norm}.{kind}": f"norm_pre.{kind}" for norm in ("pre_layrnorm", "pre_layernorm") for kind in _PATCH},
    },
    re.compile(r"encoder\.layers\.(\d+)\.(.+)"),
    {
        **{"layer_norm1": "norm1", "layer_norm2": "norm2", "self_attn.out_proj": "attn.proj"},
        **{f"self_attn.{part}_proj": f"attn.{part}" for part in "qkv"},
        **{"mlp.fc1": "mlp.fc1", "mlp.fc2": "mlp.fc2"},
    },
    bare_tokens=True,
)

OPEN_CLIP = Layout(
    "open_clip",
    "conv1.weight",
    {
        "class_embedding": "cls_token",
        "positional_embedding": "positions",
        "conv1.weight": "patch_embed.weight",
        **{f"ln_pre.{kind}": f"norm_pre.{kind}" for kind in _PATCH},
    },
    re.compile(r"transformer\.resblocks\.(\d+)\.(.+)"),
    {
        **{"ln_1": "norm1", "ln_2": "norm2", "attn.out_proj": "attn.proj"},
        **{"attn.in_proj_weight": "attn.qkv.weight", "attn.in_proj_bias": "attn.qkv.bias"},
        **{"ls_1.gamma": "ls1", "ls_2.gamma": "ls2", "mlp.c_fc": "mlp.fc1", "mlp.c_proj": "mlp.fc2"},
    },
    bare_tokens=True,
)

LAYOUTS = (FACEBOOK_TIMM, TRANSFORMERS_VIT, TRANSFORMERS_DINOV3, TRANSFORMERS_CLIP, OPEN_CLIP)
"""All known layouts."""

_PREFERRED = ("teacher", "target_encoder", "state_dict_ema", "model_ema", "ema")
"""Of several copies of an encoder that a training script saved, the ones that its authors evaluate."""


@dataclass(frozen=True)
class FoundEncoder:
    """An encoder inside a checkpoint."""

    layout: Layout
    """How its tensors are named."""
    prefix: str
    """What stands before every name."""
    tensors: dict[str, torch.Tensor]
    """Its tensors by our names."""
    names: dict[str, str]
    """Their names in the file, without the prefix."""
    unknown: tuple[str, ...]
    """Names under the prefix that the layout does not know, without the prefix."""
    left_out: tuple[str, ...]
    """Parts of the checkpoint that are not the encoder's, such as heads, each by the start of its names."""
    n_encoders: int = 1
    """Encoders in the checkpoint, of which this one is preferred."""

    @property
    def is_open_clip_trunk(self) -> bool:
        """Whether it is the vision half of an open_clip model with timm's names."""
        return self.prefix.endswith("visual.trunk.")

    @property
    def has_own_names(self) -> bool:
        """Whether its registers are named as DINOv2's own code names them, and no other program."""
        return self.names.get("registers") == "register_tokens" and self.layout is FACEBOOK_TIMM


def find_encoder(checkpoint: Checkpoint) -> FoundEncoder:
    """Find the one vision transformer in a checkpoint.

    Raises:
        BackboneError: If there is none, or if several could be meant.
    """
    places = [
        (layout, name.removesuffix(layout.marker))
        for layout in LAYOUTS
        for name in checkpoint.tensors
        if name.endswith(layout.marker) and (name == layout.marker or name[: -len(layout.marker)].endswith("."))
    ]
    places = [
        (layout, prefix) for layout, prefix in places if layout is not OPEN_CLIP or _has_blocks(checkpoint, prefix)
    ]
    n_encoders = len(places)
    for word in _PREFERRED if len(places) > 1 else ():
        preferred = [place for place in places if word in place[1].split(".")]
        if preferred:
            places = preferred
            break
    if not places:
        known = ", ".join(layout.name for layout in LAYOUTS)
        raise BackboneError(
            f"'{checkpoint.path}' fits no known network: no tensor is a patch embedding. Known are vision transformers "
            f"as saved by {known}; found keys {listed(sorted(checkpoint.tensors))}"
        )
    if len(places) > 1:
        prefixes = listed([repr(prefix) for _, prefix in places])
        raise BackboneError(
            f"'{checkpoint.path}' contains several encoders; their keys begin with {prefixes}. Save the wanted one "
            "alone: torch.save(model.state_dict(), PATH)"
        )
    return _take(checkpoint, *places[0], n_encoders)


def _has_blocks(checkpoint: Checkpoint, prefix: str) -> bool:
    """Whether open_clip's blocks are there: convolutional networks have a `conv1`, too."""
    return f"{prefix}transformer.resblocks.0.ln_1.weight" in checkpoint.tensors


def _take(checkpoint: Checkpoint, layout: Layout, prefix: str, n_encoders: int) -> FoundEncoder:
    """The tensors under a prefix, renamed."""
    tensors: dict[str, torch.Tensor] = {}
    names: dict[str, str] = {}
    unknown, left_out = [], []
    for key, tensor in checkpoint.tensors.items():
        if not key.startswith(prefix):
            left_out.append(".".join(key.split(".")[:2]))
            continue
        name = key.removeprefix(prefix)
        ours = layout.rename(name)
        if ours is None:
            unknown.append(name)
        elif ours == LEFT_OUT and not _USUAL.fullmatch(name):
            left_out.append(prefix + name.split(".")[0])
        elif ours == LEFT_OUT:
            continue
        elif ours in tensors:
            raise BackboneError(
                f"'{checkpoint.path}' contains two tensors for one place: {shown(names[ours])} and {shown(name)}. "
                "Save it with plain names, blocks.<i>."
            )
        else:
            tensors[ours], names[ours] = tensor, name
    adapters = [name for name in checkpoint.tensors if _ADAPTER.search(name)]
    if adapters:
        raise BackboneError(
            f"'{checkpoint.path}' contains adapters that are not merged into the weights, such as "
            f"{listed(adapters, 3)}. Merge them first (merge_and_unload in peft), and save the network alone"
        )
    return FoundEncoder(layout, prefix, tensors, names, tuple(unknown), tuple(sorted(set(left_out))), n_encoders)


_JOINED = ((("attn.q", "attn.k", "attn.v"), "attn.qkv"), (("mlp.gate", "mlp.up"), "mlp.fc1"))
"""Parts, and the layer that computes them in one product."""


def join_parts(tensors: State) -> dict[str, torch.Tensor]:
    """Tensors by our names, with queries, keys and values, and gate and up, each joined to one.

    Networks with rotary positions have no bias of the keys, which is zero then. DINOv3 stores it and a mask, which is
    applied. Parts that are not complete stay as they are.
    """
    joined = dict(tensors)
    for block in sorted({".".join(name.split(".")[:2]) for name in tensors if name.startswith("blocks.")}):
        for parts, whole in _JOINED:
            _join(joined, [f"{block}.{part}" for part in parts], f"{block}.{whole}")
        mask, bias = joined.pop(f"{block}.attn.qkv.bias_mask", None), joined.get(f"{block}.attn.qkv.bias")
        if mask is not None and bias is not None and mask.shape == bias.shape:
            joined[f"{block}.attn.qkv.bias"] = masked_bias(bias, mask)
    return joined


def masked_bias(bias: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
    """DINOv3's bias of queries, keys and values under its mask; a masked value may be anything, NaN too."""
    return torch.where(mask == 0, torch.zeros_like(bias), bias * mask)


def saved_parts(whole: str, names: Collection[str]) -> list[str]:
    """The parts that a checkpoint saves instead of a joined tensor, in any of its blocks; empty if it does not.

    Args:
        whole: Our name of the joined tensor.
        names: Our names of the tensors that there are, before `join_parts`.
    """
    inside = {name.split(".", 2)[2] for name in names if name.startswith("blocks.")}
    for parts, layer in _JOINED:
        if f".{layer}." in whole:
            split = [whole.replace(layer, part) for part in parts]
            used = [name for name in split if name.split(".", 2)[2] in inside]
            # A key's bias may not exist in any block; its weight does.
            return split if used and len(parts) == 3 and whole.endswith(".weight") else used
    return []


def _join(joined: dict[str, torch.Tensor], parts: list[str], whole: str) -> None:
    """Replace the parts of a layer by one weight and one bias."""
    if len(parts) == 2 and f"{parts[0]}.weight" not in joined:
        # transformers' DINOv3 calls the first layer of an MLP without a gate `up_proj`.
        parts = parts[1:]
    found = [joined.get(f"{part}.weight") for part in parts]
    if len({None if item is None else item.shape[1:] for item in found} - {None}) > 1:
        return
    if all(f"{part}.weight" in joined for part in parts):
        joined[f"{whole}.weight"] = torch.cat([joined.pop(f"{part}.weight") for part in parts])
    biases = [joined.get(f"{part}.bias") for part in parts]
    weight = joined.get(f"{whole}.weight")
    if len(parts) == 3 and "positions" not in joined and biases[0] is not None and biases[1] is None:
        biases[1] = torch.zeros_like(biases[0])
    if weight is not None and all(bias is not None for bias in biases):
        joined[f"{whole}.bias"] = torch.cat([bias for bias in biases if bias is not None])
        for part in parts:
            joined.pop(f"{part}.bias", None)
