"""The class for VLMEvalKit on a stand-in for it: registration, frames as the data set says, answers as plain `generate`."""

from __future__ import annotations

import importlib
import sys
from types import ModuleType

import numpy as np
import pytest
import torch
import videos
from PIL import Image

from mmkv._inputs import prepare, prepare_image
from mmkv.eval.sampling import Sampling, read_clip


@pytest.fixture(scope="module")
def tiny():
    from mmkv.models import tiny

    return tiny.load("cpu", torch.float32)


@pytest.fixture
def kit(monkeypatch):
    """The two modules of the kit that are touched."""
    base, config = ModuleType("vlmeval.vlm.base"), ModuleType("vlmeval.config")
    base.BaseModel = type("BaseModel", (), {})
    config.supported_VLM = {}
    for name, module in {"vlmeval": ModuleType("vlmeval"), "vlmeval.vlm": ModuleType("vlmeval.vlm"),
                         "vlmeval.vlm.base": base, "vlmeval.config": config}.items():  # fmt: skip
        monkeypatch.setitem(sys.modules, name, module)
    monkeypatch.delitem(sys.modules, "mmkv.eval.vlmeval_model", raising=False)
    yield config.supported_VLM
    sys.modules.pop("mmkv.eval.vlmeval_model", None)


def text(value):
    return {"type": "text", "value": value}


def test_registered_and_answers_as_plain_generate(tmp_path, kit, tiny):
    module = importlib.import_module("mmkv.eval.vlmeval_model")
    module.register("mmkv-dense", loaded=tiny, max_new_tokens=3, use_vllm=False)
    model = kit["mmkv-dense"]()
    assert isinstance(model, sys.modules["vlmeval.vlm.base"].BaseModel) and model.VIDEO_LLM and model.INTERLEAVE
    path = videos.write(tmp_path / "a.mp4", count=20)
    question = "what colour is the circle ?"

    def plain(inputs):
        out = tiny[0].generate(**inputs, do_sample=False, max_new_tokens=3)
        return tiny[1].tokenizer.decode(out[0, inputs["input_ids"].shape[1] :], skip_special_tokens=True).strip()

    for nframe, fps, sampling in [(8, None, Sampling(8, sampler="vlmeval")), (None, 2.0, Sampling(fps=2.0))]:
        model.nframe, model.fps = nframe, fps  # as the kit's runner does with the data set's numbers
        clip = read_clip(path, sampling)
        answer = model.generate_inner([{"type": "video", "value": str(path)}, text(question)], dataset="Video-MME")
        assert answer == plain(prepare(*tiny, clip.frames, clip.fps, question))
    picture = np.full((64, 64, 3), 200, np.uint8)
    Image.fromarray(picture).save(tmp_path / "a.png")
    answer = model.generate_inner([{"type": "image", "value": str(tmp_path / "a.png")}, text(question)])
    assert answer == plain(prepare_image(*tiny, picture, question))


def test_refusals(kit, tiny):
    module = importlib.import_module("mmkv.eval.vlmeval_model")
    model = module.MMKVForVLMEval(loaded=tiny)
    with pytest.raises(ValueError, match="2 videos"):
        model.generate_inner([{"type": "video", "value": "a"}, {"type": "video", "value": "b"}])
    with pytest.raises(ValueError, match="type 'audio'; possible are text, image, video"):
        model.generate_inner([{"type": "audio", "value": "a"}])
    with pytest.raises(ValueError, match="no method 'bestkv'"):
        module.MMKVForVLMEval(loaded=tiny, method="bestkv")
