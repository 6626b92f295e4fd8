"""What devices have and have not."""

import torch


def widest_type(device: torch.device | str | None) -> torch.dtype:
    """float64, or float32 on Apple's GPUs, which have no float64; None is torch's default device, a CPU."""
    kind = "cpu" if device is None else torch.device(device).type
    return torch.float32 if kind == "mps" else torch.float64


def runs_ahead(device: torch.device) -> bool:
    """Whether the host runs ahead of a device, and waits for it where a number decides what comes next."""
    return device.type != "cpu"
