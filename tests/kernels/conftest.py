"""Without a CUDA device the Triton twins run in Triton's interpreter, chosen before Triton is imported."""

from __future__ import annotations

import os
import sys

import torch

if not torch.cuda.is_available() and "triton" not in sys.modules:
    os.environ["TRITON_INTERPRET"] = "1"


def interpreted() -> None:
    """Raises unless the interpreter is on; mends Triton 3.5's, whose loop bounds NumPy >= 2.4 refuses to convert."""
    if torch.cuda.is_available():
        return
    import triton
    from triton.runtime import interpreter

    if isinstance(triton.language.sum, triton.runtime.JITFunction):
        raise RuntimeError("Triton was imported before TRITON_INTERPRET was set: set it in tests/conftest.py")
    patch = interpreter._patch_lang_tensor
    if patch.__code__.co_argcount == 1:

        def mended(tensor):
            patch(tensor)
            tensor.__index__ = lambda self: int(self.handle.data.squeeze())

        interpreter._patch_lang_tensor = mended
