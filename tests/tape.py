"""What a CUDA graph is, on a CPU: the operations of a step, run again on the very same memory. Python runs once."""

from __future__ import annotations

import dataclasses
from contextlib import contextmanager

import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from mmkv._recorders import Recording

WAITS = {"_local_scalar_dense", "nonzero", "is_nonzero", "equal", "masked_select", "_unique2", "unique_dim", "item"}
KERNELS = {  # where they are called from; each counts as one operation, as a Triton kernel would
    "mmkv.cache.static.tail": ["attend_ragged"],
    "mmkv.cache.view": ["merge"],
    "mmkv.cache.segment": ["attend_packed", "merge"],
    "mmkv.cache.dense": ["attend_ragged", "merge"],
    "mmkv.cache.summary": ["attend_dense", "merge"],
    "mmkv.cache.formats": ["pack_blocks"],
}


class Tape(TorchDispatchMode):
    """Writes down operations and where their results lie.

    Raises (while recording):
        AssertionError: an operation makes the host wait for what a tensor holds.
    """

    def __init__(self):
        super().__init__()
        self.operations: list = []
        self.paused = False

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        out = func(*args, **kwargs)
        if not self.paused:
            name = func._schema.name.partition("::")[2]
            assert name not in WAITS, f"{name} waits for the device"
            self.operations.append((func, args, kwargs, out, func._schema.is_mutable))
        return out

    def replay(self) -> None:
        for func, args, kwargs, out, in_place in self.operations:
            new = func(*args, **kwargs)
            if in_place:
                continue
            for there, result in zip(tensors(out), tensors(new)):
                if there.untyped_storage().data_ptr() != result.untyped_storage().data_ptr():  # else a view
                    there.copy_(result)


def tensors(found) -> list[torch.Tensor]:
    """All tensors in what an operation returns."""
    leaves = tree_leaves(found)
    inner = [getattr(x, f.name) for x in leaves if dataclasses.is_dataclass(x) for f in dataclasses.fields(x)]
    return [x for x in [*leaves, *inner] if isinstance(x, torch.Tensor)]


class TapeRecorder:
    """As `CudaRecorder`; recording runs the step, too."""

    def __init__(self):
        self.tapes: list[Tape] = []

    def record(self, step):
        with Tape() as tape:
            _TAPES.append(tape)
            try:
                out = step()
            finally:
                _TAPES.pop()
        self.tapes.append(tape)
        return Recording(tape.replay, out, ran=True)

    def __deepcopy__(self, memo):
        return TapeRecorder()


_TAPES: list[Tape] = []


def _as_one(kernel):
    """A kernel that a tape sees as one operation."""

    def call(*args, **kwargs):
        tape = _TAPES[-1] if _TAPES else None
        if tape is None or tape.paused:
            return kernel(*args, **kwargs)
        tape.paused = True
        try:
            out = kernel(*args, **kwargs)
        finally:
            tape.paused = False
        tape.operations.append((kernel, args, kwargs, out, False))
        return out

    return call


@contextmanager
def taped(monkeypatch):
    """`wrap(graphs=True)` works on a CPU; gives the recorder."""
    import importlib

    recorder = TapeRecorder()
    for module, names in KERNELS.items():
        there = importlib.import_module(module)
        for name in names:
            if hasattr(there, name):
                monkeypatch.setattr(there, name, _as_one(getattr(there, name)))
    monkeypatch.setattr("mmkv._wrap.recorder_for", lambda model: recorder)
    yield recorder
