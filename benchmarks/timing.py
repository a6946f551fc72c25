"""How long calls take: medians of graph replays on a GPU, of calls in turn on a CPU."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass

import torch

FLUSH = 256 << 20  # bytes that push everything out of an L2 cache (an H100's holds 50 MiB)
WARM = 3


@dataclass(frozen=True)
class Taken:
    """What one call takes.

    Args:
        seconds: of the device, caches cold; of a CPU, the call.
        launch: seconds more when the host launches its kernels one by one; 0 on a CPU.
        captured: whether a graph of it was replayed.
    """

    seconds: float
    launch: float = 0.0
    captured: bool = False


class CpuTimer:
    """Calls in turn, so that a slow moment of the machine hits all alike."""

    device = "cpu"

    def __init__(self, rounds: int):
        self.rounds = rounds

    def medians(self, calls: dict[str, Callable]) -> dict[str, Taken]:
        """The median of each call."""
        taken: dict[str, list[float]] = {name: [] for name in calls}
        for i in range(WARM + self.rounds):
            for name, call in calls.items():
                begun = time.perf_counter()
                call()
                if i >= WARM:
                    taken[name].append(time.perf_counter() - begun)
        return {name: Taken(statistics.median(t)) for name, t in taken.items()}


class GpuTimer:
    """Graph replays, the L2 cache flushed before each."""

    device = "cuda"

    def __init__(self, rounds: int):
        self.rounds = rounds
        self.flush = torch.empty(FLUSH, dtype=torch.uint8, device="cuda")

    def medians(self, calls: dict[str, Callable]) -> dict[str, Taken]:
        """The median of each call."""
        return {name: self._one(call) for name, call in calls.items()}

    def _one(self, call: Callable) -> Taken:
        stream = torch.cuda.Stream()
        with torch.cuda.stream(stream):
            for _ in range(WARM):
                call()
        torch.cuda.synchronize()
        eager = self._median(call)
        graph = torch.cuda.CUDAGraph()
        try:
            with torch.cuda.graph(graph):
                call()
        except RuntimeError:  # it waits for the device: what the host does counts
            torch.cuda.synchronize()
            return Taken(eager)
        replayed = self._median(graph.replay)
        return Taken(replayed, max(eager - replayed, 0.0), True)

    def _median(self, call: Callable) -> float:
        taken = []
        for _ in range(self.rounds):
            self.flush.zero_()
            first, last = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
            torch.cuda.synchronize()
            first.record()
            call()
            last.record()
            last.synchronize()
            taken.append(first.elapsed_time(last) / 1e3)
        return statistics.median(taken)


def timer_for(device: str, rounds: int) -> CpuTimer | GpuTimer:
    """The timer of a device."""
    return GpuTimer(rounds) if device == "cuda" else CpuTimer(rounds)


def copy_bandwidth(device: str) -> float:
    """Bytes per second, read and written, of a large copy."""
    size = (1 << 30) if device == "cuda" else (256 << 20)
    a, b = (torch.zeros(size, dtype=torch.uint8, device=device) for _ in range(2))
    return 2 * size / timer_for(device, 10).medians({"copy": lambda: b.copy_(a)})["copy"].seconds


def product_speed(device: str) -> float:
    """Operations (two per multiply-add) per second of a large product of bf16 matrices."""
    size = 8192 if device == "cuda" else 2048
    a, b = (torch.randn(size, size, device=device).bfloat16() for _ in range(2))
    return 2 * size**3 / timer_for(device, 5).medians({"product": lambda: a @ b})["product"].seconds
