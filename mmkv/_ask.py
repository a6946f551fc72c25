"""What `mmkv ask` does: a video and a question in, an answer and measured numbers out."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

from mmkv._inputs import prepare

if TYPE_CHECKING:
    from mmkv._report import Report

WARM_FRAMES = 2


@dataclass(frozen=True)
class Answer:
    """One answer: the text, and the numbers measured while it was made."""

    text: str
    report: Report


def check_preset(name: str) -> str:
    """The preset's name as given; before any model is loaded, ValueError with the nearest name where there is none."""
    from mmkv._presets import preset

    return preset(name).name


def answer(model: Any, processor: Any, inputs: dict[str, Any], method: str | None, max_new_tokens: int) -> Answer:
    """Greedy answer with one preset (None: the stock cache), the model left as it was found."""
    import mmkv

    with mmkv.wrapped(model, method) as wrapped:
        out = wrapped.generate(**inputs, max_new_tokens=max_new_tokens, do_sample=False)
        numbers = mmkv.report(wrapped)
    new = out[:, inputs["input_ids"].shape[1] :]
    return Answer(processor.batch_decode(new, skip_special_tokens=True)[0].strip(), numbers)


def warm_up(
    model: Any, processor: Any, frames: np.ndarray, fps: float, question: str, methods: list[str | None]
) -> None:
    """Answer once about the first frames, so that start-up costs of the process are in nobody's times."""
    inputs = prepare(model, processor, frames[:WARM_FRAMES], fps, question)
    for method in methods:
        answer(model, processor, inputs, method, 2)
