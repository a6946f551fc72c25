"""`Recorder`: what records a decode step and replays it; on a GPU a CUDA graph."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import cache
from typing import Protocol

import torch


@dataclass(eq=False)
class Recording:
    """A recorded step.

    Args:
        replay: runs it again.
        out: what it computes, in the same place each time.
        ran: whether recording it ran it, too.
    """

    replay: Callable[[], None]
    out: torch.Tensor
    ran: bool = False


class Recorder(Protocol):
    """Records steps."""

    def record(self, step: Callable[[], torch.Tensor]) -> Recording:
        """Record what a function does on the device."""


class CudaRecorder:
    """Records CUDA graphs.

    Args:
        device: on which all of the decoder lies.
    """

    def __init__(self, device: torch.device):
        self.device = device

    def record(self, step: Callable[[], torch.Tensor]) -> Recording:
        graph = torch.cuda.CUDAGraph()
        # torch's own stream for this lies on the device on which a process records first; other threads (a stream's store, a
        # progress bar) may use the GPU meanwhile
        options = {"stream": _side_stream(self.device), "capture_error_mode": "thread_local"}
        with torch.cuda.device(self.device), torch.cuda.graph(graph, **options):
            out = step()
        if out.device != self.device:  # nothing was recorded
            raise RuntimeError(f"the model has moved from {self.device} to {out.device} since it was wrapped")
        return Recording(graph.replay, out)


@cache
def _side_stream(device: torch.device) -> torch.cuda.Stream:
    """One for all recordings on a device: torch's libraries keep a workspace for each stream."""
    return torch.cuda.Stream(device)


def recorder_for(model) -> Recorder:
    """The recorder of a model's device.

    Raises:
        ValueError: it does not lie on one CUDA device.
    """
    devices = {p.device for p in model.parameters()}
    if len(devices) != 1 or next(iter(devices)).type != "cuda":
        found = ", ".join(sorted(map(str, devices)))
        raise ValueError(
            f"graphs=True on {found}: CUDA graphs need the whole model on one CUDA device; leave graphs out"
        )
    return CudaRecorder(devices.pop())
