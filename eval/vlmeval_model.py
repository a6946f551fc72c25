"""mmkv as a model of VLMEvalKit, which has no plug-ins: models are entries of a dict that a launcher of two lines extends.

```python
from mmkv.eval.vlmeval_model import register
register("mmkv-vidkv", pretrained="Qwen/Qwen2.5-VL-7B-Instruct", method="vidkv")
import runpy; runpy.run_path("run.py", run_name="__main__")  # VLMEvalKit's own, with --model mmkv-vidkv
```

Spec: `vlmeval/vlm/base.py` and `vlmeval/config.py` of open-compass/VLMEvalKit at e8e78f0.
"""

from __future__ import annotations

from functools import partial
from types import SimpleNamespace
from typing import Any

from vlmeval.vlm.base import BaseModel

from mmkv._inputs import load
from mmkv.eval.asker import Asker
from mmkv.eval.lmms_chat import media_of
from mmkv.eval.methods import method_of
from mmkv.eval.sampling import Sampling, read_clip
from mmkv.eval.task import Prompt

KINDS = ("text", "image", "video")


class MMKVForVLMEval(BaseModel):
    """A chat model of VLMEvalKit: any model that mmkv loads, with one method, answering greedily.

    Args:
        pretrained: hub name, folder, "tiny" or "tiny-agent".
        method: one, as in `mmkv eval --method`.
        nframe: frames of a video; the kit overwrites it by the data set's own number, or by None where that has a rate.
        fps: frames a second, used where it is above 0; the kit overwrites it likewise.
        sampler: "vlmeval" (the kit's own rule) or "linspace".
        max_new_tokens: longest answer.
        device, dtype: as `mmkv ask` takes them.
        loaded: (model, processor) where they are there already.
        ignored: what the kit passes to models by their name (`use_vllm`).

    Raises:
        ValueError: an unknown method.
    """

    INTERLEAVE = True
    VIDEO_LLM = True

    def __init__(
        self,
        pretrained: str = "tiny",
        method: str = "dense",
        nframe: int | None = 32,
        fps: float | None = None,
        sampler: str = "vlmeval",
        max_new_tokens: int = 1024,
        device: str | None = None,
        dtype: str | None = None,
        loaded: tuple[Any, Any] | None = None,
        **ignored: Any,
    ):
        super().__init__()
        self.method = method_of(method)
        self.nframe, self.fps, self.sampler = nframe, fps, sampler
        self.max_new_tokens = max_new_tokens
        self.model, self.processor = loaded or load(pretrained, device, dtype)

    def generate_inner(self, message: list[dict[str, Any]], dataset: str | None = None) -> str:
        """The answer to a message of text, image and video parts, in their order.

        Args:
            message: parts `{"type": "text" | "image" | "video", "value": text or path}`.
            dataset: the data set's name; the answer does not depend on it.

        Raises:
            ValueError: a part of another type, or more than one video.
        """
        wrong = [part["type"] for part in message if part["type"] not in KINDS]
        videos = sum(part["type"] == "video" for part in message)
        if wrong or videos > 1:
            told = f"a part of type {wrong[0]!r}" if wrong else f"{videos} videos"
            raise ValueError(f"a message with {told}; possible are {', '.join(KINDS)}, and one video")
        content = [
            dict(type="text", text=part["value"]) if part["type"] == "text" else dict(type=part["type"])
            for part in message
        ]
        shown = [SimpleNamespace(type=part["type"], url=part["value"]) for part in message if part["type"] != "text"]
        media = media_of(shown, self._sampling(), read_clip)
        with Asker(self.model, self.processor, self.method, share=False) as asker:
            return asker.answer(Prompt([dict(role="user", content=content)]), media, False, self.max_new_tokens)[
                "response"
            ]

    def _sampling(self) -> Sampling:
        if self.fps is not None and self.fps > 0:
            return Sampling(fps=self.fps)
        return Sampling(self.nframe, sampler=self.sampler)


def register(name: str, **options: Any) -> None:
    """Enter a model into VLMEvalKit's dict of models.

    Args:
        name: as `run.py --model` names it. The kit treats names with Qwen2-VL, Qwen2.5-VL, Qwen2.5-Omni or Llama-4 in them apart.
        options: of `MMKVForVLMEval`.
    """
    from vlmeval.config import supported_VLM

    supported_VLM[name] = partial(MMKVForVLMEval, **options)
