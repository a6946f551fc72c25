"""The bundled tiny GUI agent: a real Qwen2.5-VL checkpoint of 4.5 M parameters, trained by `train.py`.

    model, processor = mmkv.models.tiny_agent.load()
    session = mmkv.models.tiny_agent.sessions.make_session(seed=1)

It knows the screens of `screens.py` and the clauses of `words.py`, and answers in UI-TARS' grammar (agent format "tiny").
"""

from __future__ import annotations

import pathlib


def path() -> str:
    """Folder of the checkpoint, for `from_pretrained`."""
    return str(pathlib.Path(__file__).parent / "checkpoint")


def load(device=None, dtype=None):
    """(model, processor) through plain `from_pretrained`, offline, in eval mode; float32 on the CPU by default."""
    import torch
    from transformers import AutoProcessor, Qwen2_5_VLForConditionalGeneration

    model = Qwen2_5_VLForConditionalGeneration.from_pretrained(
        path(), dtype=dtype or torch.float32, local_files_only=True
    )
    processor = AutoProcessor.from_pretrained(path(), local_files_only=True)
    return model.to(device or "cpu").eval(), processor
