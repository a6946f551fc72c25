"""Without a CUDA device the Triton twins run in Triton's interpreter."""

from __future__ import annotations

import os
import sys

import pytest
import torch

if not torch.cuda.is_available():
    os.environ["TRITON_INTERPRET"] = "1"  # read by triton.jit, so this must come before mmkv's kernels are imported


def interpreted() -> None:
    """Makes sure that the interpreter works, in whatever state earlier tests left Triton."""
    if torch.cuda.is_available():
        return
    import triton
    from triton.runtime import interpreter

    # Where something imported Triton before the variable was set, its own library is not interpreted yet.
    for module in [m for name, m in sys.modules.items() if name.startswith("triton.language")]:
        for name, f in list(vars(module).items()):
            if isinstance(f, triton.runtime.JITFunction):
                setattr(module, name, interpreter.InterpretedFunction(f.fn))
    # Triton 3.5's cannot convert loop bounds under NumPy >= 2.4.
    patch = interpreter._patch_lang_tensor
    if patch.__code__.co_varnames[: patch.__code__.co_argcount] == ("tensor",) and patch.__name__ != "mended":

        def mended(tensor):
            patch(tensor)
            tensor.__index__ = lambda self: int(self.handle.data.squeeze())

        interpreter._patch_lang_tensor = mended


@pytest.fixture
def nan_in_fresh_memory(monkeypatch):
    """Every element of a result must be written: memory comes filled with NaN or 255."""
    interpreted()
    empty = torch.empty

    def filled(*args, **kw):
        t = empty(*args, **kw)
        return t.fill_(torch.nan if t.is_floating_point() else 255 if t.dtype == torch.uint8 else -1)

    monkeypatch.setattr(torch, "empty", filled)
