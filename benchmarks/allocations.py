"""What a call makes the allocator hold: the allocator's own figures, on a CPU and on a GPU."""

from __future__ import annotations

import os
from collections.abc import Callable
from dataclasses import dataclass

import torch

os.environ.setdefault("KINETO_LOG_LEVEL", "99")  # the profiler's own remarks, an error for want of a GPU among them


@dataclass(frozen=True)
class Allocated:
    """Bytes above what was held before a call.

    Args:
        peak: the most at a time during the call.
        left: what is still held after it.
    """

    peak: int
    left: int


def allocated(device: str, call: Callable) -> Allocated:
    """Runs a call and says what it allocated. On a CPU it runs under torch's profiler, so do not take its time.

    What math libraries allocate by themselves does not go through torch's allocator and is not seen.
    """
    if device != "cpu":
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        call()
        torch.cuda.synchronize()
        return Allocated(torch.cuda.max_memory_allocated() - before, torch.cuda.memory_allocated() - before)
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True) as profile:
        call()
    held = peak = 0
    for event in profile.profiler.kineto_results.events():
        if event.name() == "[memory]" and event.device_type() == torch.autograd.DeviceType.CPU:
            held += event.nbytes()
            peak = max(peak, held)
    return Allocated(peak, held)
