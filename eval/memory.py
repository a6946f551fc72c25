"""The most memory that was in use, measured between two moments."""

from __future__ import annotations

from pathlib import Path


def reset_peak(device) -> None:
    """Begin to measure anew on the model's device."""
    if device.type == "cuda":
        import torch

        torch.cuda.reset_peak_memory_stats(device)
        return
    try:
        Path("/proc/self/clear_refs").write_text("5")  # Linux: the high-water mark falls to what is resident now
    except OSError:
        return


def peak(device) -> int | None:
    """Bytes: of the device's allocator on CUDA, else resident in this process (Linux alone; None elsewhere)."""
    if device.type == "cuda":
        import torch

        return torch.cuda.max_memory_allocated(device)
    try:
        status = Path("/proc/self/status").read_text()
    except OSError:
        return None
    found = [line for line in status.splitlines() if line.startswith("VmHWM:")]
    return int(found[0].split()[1]) * 1024 if found else None
