"""Miniature encoders under timm's names, and a second forward pass in plain torch to compare tokens with."""

import torch
from torch.nn import functional

ACTIVATIONS = {
    "gelu": lambda x: x * 0.5 * (1 + torch.erf(x / 2**0.5)),
    "gelu_tanh": lambda x: 0.5 * x * (1 + torch.tanh((2 / torch.pi) ** 0.5 * (x + 0.044715 * x**3))),
    "quick_gelu": lambda x: x * torch.sigmoid(1.702 * x),
    "silu": lambda x: x * torch.sigmoid(x),
}


def make_state(
    width=24, depth=3, patch=56, *, hidden=40, gated=False, n_registers=0, cls=True, table="prefix", scale=True,
    pre_norm=False, qkv_bias=True, patch_bias=True, side=None, seed=0,
):  # fmt: skip
    """Random tensors under timm's names; no value is zero or one, so that every missing tensor is noticed.

    `table` says which tokens the position table covers: `prefix` (all), `cls`, `patches`, or None for rotary positions.
    """
    generator = torch.Generator().manual_seed(seed)

    def make(*size, around=0.0, spread=0.2):
        return around + spread * torch.randn(size, generator=generator)

    state = {"patch_embed.proj.weight": make(width, 3, patch, patch, spread=0.02)}
    if patch_bias:
        state["patch_embed.proj.bias"] = make(width)
    if cls:
        state["cls_token"] = make(1, 1, width)
    if n_registers:
        state["reg_token"] = make(1, n_registers, width)
    rows = {"prefix": int(cls) + n_registers, "cls": int(cls), "patches": 0}
    side = side or 224 // patch
    if table is not None:
        state["pos_embed"] = make(1, rows[table] + side * side, width, spread=0.5)
    norms = ["norm_pre", "norm"] if pre_norm else ["norm"]
    for block in range(depth):
        norms += [f"blocks.{block}.norm1", f"blocks.{block}.norm2"]
        layers = {"attn.qkv": (3 * width, width), "attn.proj": (width, width)}
        layers |= {"mlp.fc1": (2 * hidden if gated else hidden, width), "mlp.fc2": (width, hidden)}
        for name, shape in layers.items():
            state[f"blocks.{block}.{name}.weight"] = make(*shape)
            if name != "attn.qkv" or qkv_bias:
                state[f"blocks.{block}.{name}.bias"] = make(shape[0])
        if scale:
            state |= {f"blocks.{block}.ls{i}.gamma": make(width, around=0.7) for i in (1, 2)}
    for norm in norms:
        state |= {f"{norm}.weight": make(width, around=1.0), f"{norm}.bias": make(width)}
    return state


def run_reference(state, pixels, block, *, heads, eps=1e-6, activation="gelu", theta=None):
    """Output of one block; a position table must fit the images already."""
    state = {key: value.double() for key, value in state.items()}
    n, width = len(pixels), state["patch_embed.proj.weight"].shape[0]
    depth = 1 + max(int(key.split(".")[1]) for key in state if key.startswith("blocks."))
    act = ACTIVATIONS[activation]

    def norm(x, name):
        centred = x - x.mean(-1, keepdim=True)
        x = centred / (centred.square().mean(-1, keepdim=True) + eps).sqrt()
        return x * state[f"{name}.weight"] + state[f"{name}.bias"]

    def linear(x, name):
        return x @ state[f"{name}.weight"].T + state.get(f"{name}.bias", 0)

    weight = state["patch_embed.proj.weight"]
    patches = functional.conv2d(pixels.double(), weight, state.get("patch_embed.proj.bias"), stride=weight.shape[-1])
    side = patches.shape[-1]
    patches = patches.flatten(2).transpose(1, 2)
    prefix = [state[name].expand(n, -1, -1) for name in ("cls_token", "reg_token") if name in state]
    table = state.get("pos_embed")
    n_prefix = sum(item.shape[1] for item in prefix)
    n_rows = 0 if table is None else table.shape[1] - patches.shape[1]
    x = torch.cat([*prefix, patches], dim=1)
    if table is not None:
        x = torch.cat(
            [x[:, :n_rows] + table[:, :n_rows], x[:, n_rows:n_prefix], x[:, n_prefix:] + table[:, n_rows:]], 1
        )
    if "norm_pre.weight" in state:
        x = norm(x, "norm_pre")
    for index in range(depth):
        name = f"blocks.{index}"
        qkv = linear(norm(x, f"{name}.norm1"), f"{name}.attn.qkv")
        q, k, v = qkv.reshape(n, -1, 3, heads, width // heads).permute(2, 0, 3, 1, 4)
        if theta is not None:
            q, k = (_turn(item, side, n_prefix, theta) for item in (q, k))
        attention = torch.softmax(q @ k.transpose(-1, -2) * (width // heads) ** -0.5, dim=-1)
        attended = linear((attention @ v).transpose(1, 2).reshape(n, -1, width), f"{name}.attn.proj")
        x = x + state.get(f"{name}.ls1.gamma", 1) * attended
        inner = linear(norm(x, f"{name}.norm2"), f"{name}.mlp.fc1")
        if inner.shape[-1] != state[f"{name}.mlp.fc2.weight"].shape[1]:
            gate, up = inner.chunk(2, dim=-1)
            inner = act(gate) * up
        else:
            inner = act(inner)
        x = x + state.get(f"{name}.ls2.gamma", 1) * linear(inner, f"{name}.mlp.fc2")
        if index == block % depth:
            break
    return x.float()


def _turn(x, side, n_prefix, theta):
    """Each patch's channels turned by its place, one pair of channels at a time."""
    quarter = x.shape[-1] // 4
    out = x.clone()
    for row in range(side):
        for column in range(side):
            token = n_prefix + row * side + column
            for i in range(2 * quarter):
                place = (row if i < quarter else column) + 0.5
                angle = torch.tensor(2 * torch.pi * (2 * place / side - 1) / theta ** ((i % quarter) / quarter))
                a, b = x[..., token, i], x[..., token, i + 2 * quarter]
                out[..., token, i] = a * angle.cos() - b * angle.sin()
                out[..., token, i + 2 * quarter] = b * angle.cos() + a * angle.sin()
    return out


def relative_error(found, expected):
    """Norm of the difference over the norm of what is expected."""
    return float((found - expected).norm() / expected.norm())
