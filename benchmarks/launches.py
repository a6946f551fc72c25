"""What the attention of one decoded token launches in a layer on a GPU, counted without one.

The torch references fill the cache. Then each layer's attention of a decoded token is called once more as if its tensors lay on
an H100, with Triton's launches caught and torch's operators counted; those that only make views, or reserve memory, do not count.
Appending the token to the tail is not counted, nor is what the first layer makes for all (positions, a mask).

    python benchmarks/launches.py
"""

from __future__ import annotations

import argparse
import contextlib
from collections import Counter
from unittest import mock

import shapes
import torch
from common import environment, save
from rich.console import Console
from rich.table import Table
from torch.utils._python_dispatch import TorchDispatchMode

import mmkv
from mmkv.cache.view import View
from mmkv.kernels import _splits, attend_dense_triton, attend_packed_triton, merge_triton

PRESETS = ("kivi-4", "kivi-2", "vidkv", "vidkv-stp", "waterfill", "waterfill-1")
KERNELS = (
    (attend_packed_triton, "_attend"),
    (attend_packed_triton, "attend_planes"),
    (attend_dense_triton, "attend"),
    (merge_triton, "merge_parts"),
)
SHAPE = dict(hidden_size=256, intermediate_size=256, num_hidden_layers=3, num_attention_heads=4, num_key_value_heads=2)
VISION = 512  # tokens of the prompt, which has 66 of text besides
RUN_NOTHING = {"aten::_unsafe_view", "aten::empty", "aten::empty_like", "aten::empty_strided", "aten::new_empty"}


class Launches(TorchDispatchMode):
    """Counts torch's operators that run a kernel, by name."""

    def __init__(self):
        super().__init__()
        self.found: Counter[str] = Counter()

    def __torch_dispatch__(self, operator, types, args=(), kwargs=None):
        name = operator._schema.name
        if not operator.is_view and name not in RUN_NOTHING:
            self.found[name] += 1
        return operator(*args, **(kwargs or {}))


class Caught:
    """Stands in for a Triton kernel: a launch is counted, and nothing runs."""

    def __init__(self, name: str, found: Counter[str]):
        self.name, self.found = f"triton::{name}", found

    def __getitem__(self, grid):
        return lambda *args, **options: self.found.update([self.name])


def launched(call, *args, **kwargs) -> dict[str, int]:
    """What `call` launches on a GPU of 132 multiprocessors, by name, if tensors of the CPU lie there."""
    counting = Launches()
    with contextlib.ExitStack() as stack:
        for module, name in KERNELS:
            stack.enter_context(mock.patch.object(module, name, Caught(name, counting.found)))
        stack.enter_context(mock.patch.object(_splits, "multiprocessors", return_value=132))
        stack.enter_context(mock.patch.object(torch.cuda, "device", return_value=contextlib.nullcontext()))
        stack.enter_context(mock.patch.object(torch.Tensor, "is_cuda", property(lambda tensor: True)))
        stack.enter_context(counting)
        call(*args, **kwargs)
    return dict(counting.found)


def count(name: str) -> dict:
    """Launches of a layer in a preset's decode step."""
    model = mmkv.wrap(shapes.make("Qwen2.5-VL", SHAPE, "cpu", torch.bfloat16), name)
    merged, layers = View._merged, []

    def both(view, *args, **kwargs):
        layers.append((len(view.layer.segments), launched(merged, view, *args, **kwargs)))
        return merged(view, *args, **kwargs)

    with mock.patch.object(View, "_merged", both), torch.no_grad():
        model.generate(**shapes.video(model, VISION), max_new_tokens=3, min_new_tokens=3, do_sample=False)
    others = layers[1 - SHAPE["num_hidden_layers"] :]  # of the last token, all but the first
    assert all(other == others[0] for other in others), f"layers of {name} differ: {others}"
    segments, found = others[0]
    total, triton = sum(found.values()), sum(n for which, n in found.items() if which.startswith("triton::"))
    return dict(preset=name, segments=segments, triton=triton, torch=total - triton, total=total, by_name=found)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--presets", nargs="+", default=list(PRESETS))
    parser.add_argument("--out", default="benchmarks/results/launches.json")
    options = parser.parse_args()
    table = Table(title="launches of a layer's attention, one decoded token")
    for name in ("preset", "segments", "Triton's", "torch's", "together", "torch's operators"):
        table.add_column(name, justify="left" if name in ("preset", "torch's operators") else "right")
    rows = []
    for name in options.presets:
        row = count(name)
        rows.append(row)
        others = ", ".join(f"{n} {which[6:]}" for which, n in row["by_name"].items() if which.startswith("aten::"))
        numbers = (str(row[column]) for column in ("segments", "triton", "torch", "total"))
        table.add_row(name, *numbers, others)
    Console().print(table)
    save(options.out, dict(environment=environment(), rows=rows))


if __name__ == "__main__":
    main()
