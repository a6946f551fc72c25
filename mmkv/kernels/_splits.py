"""How many programs make a device busy, and how many share the keys of one row."""

from __future__ import annotations

import torch

PROGRAMS = 4  # per multiprocessor: while some wait for memory, others compute


def multiprocessors(device: torch.device) -> int:
    """Of a GPU; a CPU, where Triton's interpreter runs, counts as one."""
    return torch.cuda.get_device_properties(device).multi_processor_count if device.type == "cuda" else 1


def busy(device: torch.device) -> int:
    """Programs that make a device busy."""
    return PROGRAMS * multiprocessors(device)


def split_count(programs: int, steps: int, device: torch.device, least: int = 1) -> int:
    """Into how many runs to split `steps` turns of a kernel's loop, so that the device is busy.

    Args:
        programs: that there are without splitting.
        steps: turns of the longest row's loop, 0 or more.
        device: where the kernel runs.
        least: turns of a run.
    """
    return max(1, min(-(-busy(device) // max(programs, 1)), steps // least))
