"""A whole layer's attention over segments and tail by the Triton kernels, against the torch references, as a model decodes."""

import pytest
import random_models as rm
import torch

import mmkv
from mmkv.cache import GEAR, KIVI, RazorAttention, SnapKV, VidKV
from mmkv.cache.view import View

from .naive import rms
from .pretend import as_if_on_a_gpu

pytest.importorskip("triton")

SMALL = {"group": 32, "residual": 32}
PLAIN = [rm.BOS, *rm.words(110)]


def run(monkeypatch, family: str, method, prompts: list[list], tol: float = 1e-4, new: int = 3, **more) -> list[str]:
    """Decode, every merged attention twice; the names of the twins that ran."""
    model = mmkv.wrap(rm.make(family, **more), cache=method)
    merged, seen = View._merged, []

    def both(view, *args, **kw):
        want = merged(view, *args, **kw)
        scratch, view.layer.state.scratch = view.layer.state.scratch, {}
        with monkeypatch.context() as gpu:
            twins = [as_if_on_a_gpu(gpu, module, module) for module in TWINS]
            have = merged(view, *args, **kw)
        view.layer.state.scratch = scratch
        assert have.shape == want.shape
        assert rms(have, want) < tol
        seen.extend(name for names in twins for name in names)
        return want

    monkeypatch.setattr(View, "_merged", both)
    given = rm.inputs(model, prompts)
    out = model.generate(**given, max_new_tokens=new, min_new_tokens=new, do_sample=False)
    # a second turn: several queries at once, over what the first has left
    more = rm.words(9, seed=1)
    again = torch.cat([out, torch.tensor([more] * len(out))], 1)
    cache = model(**given, use_cache=True).past_key_values
    model(input_ids=again[:, given["input_ids"].shape[1] :], past_key_values=cache)
    return seen


TWINS = ("attend_packed_triton", "attend_dense_triton", "attend_ragged_triton", "merge_triton")


@pytest.mark.parametrize(
    ("method", "twin"),
    [
        (KIVI(bits=2, **SMALL), "attend_packed_triton"),
        (VidKV(sinks=4, **SMALL), "attend_packed_triton"),
        (GEAR(rank=2, **SMALL), "attend_dense_triton"),
        (SnapKV(budget=0.5), "attend_ragged_triton"),
        (RazorAttention(heads=((0, 1),), least=32), "attend_ragged_triton"),
    ],
    ids=lambda x: type(x).__name__ if not isinstance(x, str) else "",
)
@torch.no_grad()
def test_segments_of_each_kind(monkeypatch, method, twin):
    seen = run(monkeypatch, "qwen2", method, [PLAIN])
    assert {twin, "attend_dense_triton", "merge_triton"} <= set(seen)


@torch.no_grad()
def test_padding(monkeypatch):
    run(monkeypatch, "qwen2", KIVI(bits=4, **SMALL), [PLAIN, PLAIN[:70], PLAIN[:20]])


@pytest.mark.parametrize("family", ["gemma2", "gemma3_text", "gpt_oss"])
@torch.no_grad()
def test_windows_softcap_and_sinks(monkeypatch, family):
    run(monkeypatch, family, KIVI(bits=4, **SMALL), [PLAIN, PLAIN[:75]])


@torch.no_grad()
def test_16_bits(monkeypatch):
    monkeypatch.setattr(rm, "make", lambda family, make=rm.make: make(family).to(torch.bfloat16))
    run(monkeypatch, "qwen2", VidKV(sinks=4, **SMALL), [PLAIN], tol=2e-2)
