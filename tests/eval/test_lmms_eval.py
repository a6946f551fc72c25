"""The lmms-eval plug-in: registration, the class contract, order and shape of requests, answers equal to plain `generate`."""

from __future__ import annotations

import importlib
import subprocess
import sys
import tomllib
from importlib.metadata import EntryPoint
from pathlib import Path

import lmms_stub
import numpy as np
import pytest
import torch
import videos
from PIL import Image

from mmkv._inputs import prepare
from mmkv.eval.lmms_chat import Request, cut, greedy, media_of, prompt_of, same_media
from mmkv.eval.media import Clip
from mmkv.eval.sampling import Sampling, read_clip

ROOT = Path(__file__).parents[2]


@pytest.fixture(scope="module")
def tiny():
    from mmkv.models import tiny

    return tiny.load("cpu", torch.float32)


@pytest.fixture
def stub(monkeypatch):
    found = lmms_stub.install(monkeypatch)
    yield found
    sys.modules.pop("mmkv.eval.lmms_model", None)  # it was built on the stand-in


@pytest.fixture
def model(stub, tiny):
    def make(**options):
        return importlib.import_module("mmkv.eval.lmms_model").MMKVChat(loaded=tiny, frames=4, **options)

    return make


def video(text, path):
    return [{"role": "user", "content": [{"type": "video", "url": str(path)}, {"type": "text", "text": text}]}]


def request(messages, doc_id, task="t", **options):
    return lmms_stub.Instance((f"context {doc_id}", lambda doc: messages(doc), options, doc_id, task, "test"))


def test_the_entry_point_is_declared_and_gives_a_manifest(stub):
    declared = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["entry-points"]["lmms_eval.models"]
    manifest = EntryPoint("mmkv", declared["mmkv"], "lmms_eval.models").load()()
    assert manifest.model_id == "mmkv" and manifest.simple_class_path is None
    module, name = manifest.chat_class_path.rsplit(".", 1)
    found = getattr(importlib.import_module(module), name)
    assert issubclass(found, lmms_stub.Lmms) and found.is_simple is False


def test_importing_the_plug_in_does_not_import_lmms_eval():
    code = "import sys, mmkv.eval.lmms_eval_plugin; print('lmms_eval' in sys.modules, 'torch' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, cwd="/")
    assert done.stdout.split() == ["False", "False"]


def test_answers_come_back_in_order_and_equal_plain_generate(tmp_path, stub, model, tiny):
    """Three documents with other options in mixed order; the dense method against the model's own `generate`."""
    files = {i: videos.write(tmp_path / f"{i}.mp4", count=8 + i) for i in range(3)}
    questions = {0: "what colour is the circle ?", 1: "how many squares ?", 2: "what colour is the square ?"}
    lm = model()
    lm.task_dict = {"t": {"test": {i: (questions[i], files[i]) for i in files}}}

    def messages(doc):
        return video(*doc)

    asked = [request(messages, 2, max_new_tokens=3), request(messages, 0, max_new_tokens=1, temperature=0),
             request(messages, 1, max_new_tokens=2, until=["zzz"], do_sample=False, num_beams=1)]  # fmt: skip
    found = lm.generate_until(asked)
    for one, answered in zip(asked, found):
        question, path = lm.task_dict["t"]["test"][one.args[3]]
        clip = read_clip(path, Sampling(4))
        inputs = prepare(*tiny, clip.frames, clip.fps, question)
        out = tiny[0].generate(**inputs, do_sample=False, max_new_tokens=one.args[2]["max_new_tokens"])
        new = out[0, inputs["input_ids"].shape[1] :]
        assert answered.text == tiny[1].tokenizer.decode(new, skip_special_tokens=True).strip()
        assert answered.token_counts.output_tokens == len(new)
        assert answered.token_counts.input_tokens == inputs["input_ids"].shape[1]
    assert [told[1][0] for told in lm.cache_hook.told] == ["context 0", "context 1", "context 2"]
    (logged,) = stub.logged
    assert logged["total_gen_tokens"] == sum(a.token_counts.output_tokens for a in found)
    assert logged["additional_metrics"]["kv_bytes"] == logged["additional_metrics"]["kv_bytes_dense"] > 0


def test_documents_about_one_video_share_it_and_others_do_not(tmp_path, model, monkeypatch):
    """Videos of equal length give equal prompts: what was read of one must not answer about another."""
    chat = importlib.import_module("mmkv.eval.lmms_model")
    read = []
    monkeypatch.setattr(
        chat, "read_clip", lambda path, sampling: read.append(Path(path).stem) or read_clip(path, sampling)
    )
    bright = videos.write(tmp_path / "bright.mp4", times=list(range(1000, 9000, 1000)), count=8)
    dark = videos.write(tmp_path / "dark.mp4", count=8)
    docs = {i: (f"what colour is the {thing} ?", path) for i, (thing, path) in enumerate(
        [("circle", bright), ("square", bright), ("circle", dark), ("circle", bright)])}  # fmt: skip

    def answers(order, **options):
        lm = model(method="kivi-2", **options)
        lm.task_dict = {"t": {"test": docs}}
        return [a.text for a in lm.generate_until([request(lambda d: video(*d), i, max_new_tokens=3) for i in order])]

    together = answers([0, 1, 2, 3])
    assert read == ["bright", "dark", "bright"]
    assert together == [answers([i])[0] for i in range(4)]


def test_true_bytes_are_logged(tmp_path, stub, model):
    lm = model(method="vidkv")
    path = videos.write(tmp_path / "a.mp4", count=60)
    lm.sampling = Sampling(60)
    lm.task_dict = {"t": {"test": {0: None}}}
    lm.generate_until([request(lambda doc: video("what colour is the circle ?", path), 0, max_new_tokens=1)])
    told = stub.logged[0]["additional_metrics"]
    assert 0 < told["kv_bytes"] < 0.6 * told["kv_bytes_dense"] and told["rank"] == 0 and told["prefill_seconds"] > 0


def test_images_and_text_alone(model):
    lm = model()
    picture = Image.fromarray(np.full((64, 64, 3), 200, np.uint8))
    shown = [
        {
            "role": "user",
            "content": [{"type": "image", "url": picture}, {"type": "text", "text": "what colour is the circle ?"}],
        }
    ]
    bare = [{"role": "user", "content": [{"type": "text", "text": "what colour is the circle ?"}]}]
    lm.task_dict = {"t": {"test": {0: shown, 1: bare}}}
    found = lm.generate_until([request(lambda doc: doc, i, max_new_tokens=2) for i in (0, 1)])
    assert found[0].token_counts.input_tokens > found[1].token_counts.input_tokens + 3


@pytest.mark.parametrize(
    "args",
    [
        ("ctx", lambda d: d, {}, 0, "t"),  # five, as the guide of lmms-eval says it
        ("ctx", {}, lambda d: d, 0, "t", "test"),  # the order of simple models
    ],
)
def test_a_request_of_another_shape_is_refused(model, args):
    with pytest.raises(ValueError, match=r"ctx, doc_to_messages, gen_kwargs, doc_id, task, split"):
        model().generate_until([lmms_stub.Instance(args)])
    assert Request.of(("ctx", len, {"max_new_tokens": 3}, 7, "t", "s")).options == {"max_new_tokens": 3}


def test_generation_options():
    assert greedy({}) == (1024, ())
    assert greedy(dict(max_new_tokens=16, temperature=0, top_p=None, num_beams=1, do_sample=False)) == (16, ())
    assert greedy(dict(until="\n\n", temperature=0.7, do_sample=False)) == (1024, ("\n\n",))
    with pytest.raises(ValueError, match=r"temperature=0\.7"):
        greedy(dict(temperature=0.7))
    with pytest.raises(ValueError, match="num_beams=3"):
        greedy(dict(num_beams=3))
    with pytest.raises(ValueError, match="gen_kwargs penalty; possible are max_new_tokens"):
        greedy(dict(penalty=2))
    assert cut("a\n\nb", ("\n\n", "x")) == "a" and cut("abc", ("c", "b")) == "a" and cut("abc", ("", "z")) == "abc"


def test_chats():
    chat = lmms_stub.ChatMessages(
        [{"role": "system", "content": [{"type": "text", "text": "be brief"}]},
         {"role": "user", "content": [{"type": "video", "url": "a.mp4", "start_time": 2.0, "end_time": 5.0},
                                      {"type": "text", "text": "what ?"}]}]
    )  # fmt: skip
    prompt, parts = prompt_of(chat.messages)
    assert prompt.messages == [
        {"role": "system", "content": [{"type": "text", "text": "be brief"}]},
        {"role": "user", "content": [{"type": "video"}, {"type": "text", "text": "what ?"}]},
    ]
    read = []
    clip = Clip(np.zeros((1, 2, 2, 3), np.uint8), 1.0)
    assert media_of(parts, Sampling(4), lambda path, how: read.append((path, how)) or clip).clip is clip
    assert read == [("a.mp4", Sampling(4, start=2.0, end=5.0))]
    assert same_media(parts) == (("video", "a.mp4", 2.0, 5.0),)
    with pytest.raises(ValueError, match="2 videos"):
        prompt_of(lmms_stub.ChatMessages(video("", "a") + video("", "b")).messages)
    with pytest.raises(ValueError, match="type 'audio'"):
        prompt_of(lmms_stub.ChatMessages([{"role": "user", "content": [{"type": "audio", "url": "a"}]}]).messages)


def test_what_is_not_offered(model):
    lm = model()
    for call in (lm.loglikelihood, lm.generate_until_multi_round):
        with pytest.raises(NotImplementedError, match="mmkv"):
            call([])
    for options, message in [(dict(batch_size=4), "batch_size=4"), (dict(tensor=1), "model_args tensor; possible are")]:
        with pytest.raises(ValueError, match=message):
            model(**options)
    with pytest.raises(ValueError, match="no method 'bestkv'"):
        model(method="bestkv")
    assert (
        model(method='"SnapKV(budget=0.25,window=32)"', batch_size="1").method.name == "SnapKV(budget=0.25,window=32)"
    )
    lm.clean()
    with pytest.raises(RuntimeError, match="make a new MMKVChat"):
        lm.generate_until([])
