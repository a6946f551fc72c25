"""The bundled tiny vision-language model: a real Qwen2.5-VL checkpoint of 4.5 M parameters, trained by `train.py`.

    model, processor = mmkv.models.tiny.load()
    video = mmkv.models.tiny.world.make_video(seed=1)
    mmkv.models.tiny.answer.ask(model, processor, video.frames, "which colour appears first?")

It understands only the questions that `answer.question_forms()` lists, about the videos of `world.py`.
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
