"""The bundled tiny Infinity: paints 64 x 64 px pictures of coloured shapes from captions, trained by `train.py`.

    model = mmkv.models.tiny_infinity.load()
    image = model.generate_image("a red circle left of a blue square on grey", seed=1)

It understands only captions like `PROMPTS`; of which words, `words.py` says.
"""

from __future__ import annotations

import pathlib

PROMPTS: tuple[str, ...] = (
    "a large red circle on grey",
    "a small blue triangle on white",
    "a large purple square on black",
    "a small yellow circle on black",
    "a red circle left of a blue square on grey",
    "a green triangle above a yellow circle on black",
    "a cyan square right of a purple triangle on white",
    "a blue circle below a red square on white",
    "a yellow square above a green square on grey",
    "a purple triangle left of a cyan circle on black",
    "two red triangles on white",
    "three green triangles on white",
    "four blue squares on grey",
    "three yellow circles on black",
)


def path() -> str:
    """Folder of the checkpoint, for `from_pretrained`."""
    return str(pathlib.Path(__file__).parent / "checkpoint")


def load(folder=None, device=None, dtype=None):
    """The model, offline, in eval mode, with autoencoder and text encoder.

    Args:
        folder: of a checkpoint that `train.py` wrote; the bundled one where None.
        device: where it runs; the CPU where None.
        dtype: of its weights; float32 where None.
    """
    import torch

    from mmkv.models.tiny_infinity.model import TinyInfinity

    model = TinyInfinity.from_pretrained(folder or path(), dtype=dtype or torch.float32, local_files_only=True)
    return model.to(device or "cpu").eval()
