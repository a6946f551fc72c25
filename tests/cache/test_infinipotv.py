"""InfiniPot-V against the paper's two scores, by hand and worked out slowly, and the memory that does not grow."""

from __future__ import annotations

import dataclasses

import pytest
import random_models as rm
import torch
from cache_reference import Bare, checked_attention, held_by_head

import mmkv
from mmkv.cache import KIVI, InfiniPotV, pipeline
from mmkv.cache.fill import Fill, Plan
from mmkv.layout import TEXT, VIDEO, TokenLayout

ROWS, COLS = 2, 3


def video(frames: int, first: int = 0, rows: int = ROWS, cols: int = COLS, medium: int = 0) -> TokenLayout:
    """Frames `first` on of one video."""
    layout = TokenLayout.text(1, frames * rows * cols)
    cells = torch.cartesian_prod(torch.arange(first, first + frames), torch.arange(rows), torch.arange(cols))
    layout.modality[:], layout.medium[:] = VIDEO, medium
    for name, values in zip(("frame", "row", "col"), cells.view(-1, 3).unbind(1)):
        getattr(layout, name)[0] = values
    return layout


def fill_of(layout: TokenLayout, keys: torch.Tensor, values: torch.Tensor, old: int, **changes) -> Fill:
    n = len(layout)
    fill = Fill(
        layer=0, layers=1, columns=torch.arange(n), old=old, fresh=0, keys=keys, values=values, query=None, layout=layout,
        protected=torch.zeros(old, dtype=torch.bool), boundary=old, seen=n,
    )  # fmt: skip
    return dataclasses.replace(fill, **changes)


def kept(method, fill: Fill) -> torch.Tensor:
    plan = Plan.everything(fill, torch.full((fill.old,), -1, dtype=torch.int8))
    method.decide(fill, plan)
    return plan.keep


def test_by_hand():
    """Four frames of 1 x 2 tokens, then 32 words. The newest frame is compared with the three before it:

    place 0: cosines 1, 0, 1; place 1: cosines 1, -1, 0.8. TaR: frame 3 first, then 1 (place 1, score 1), then 1 (place 0, 0).
    Norms of the values: 9 1 | 2 3 | 8 4 | 5 6.
    """
    layout = video(4, rows=1, cols=2).cat(TokenLayout.text(1, 32))
    place0 = [[1.0, 0], [0, 2], [3, 0], [1, 0]]  # lengths do not matter
    place1 = [[0, 1.0], [0, -1], [0.6, 0.8], [0, 5]]
    keys = torch.tensor([pair for both in zip(place0, place1) for pair in both] + [[1.0, 1]] * 32)[None]
    norms = torch.tensor([9.0, 1, 2, 3, 8, 4, 5, 6] + [0.5] * 32)
    values = torch.stack([norms * 0.6, norms * 0.8], -1)[None]
    fill = fill_of(layout, keys, values, old=8)
    want = {  # (tokens that stay of the 8, alpha): which
        (4, 0.5): [0, 4, 6, 7],  # TaR: frame 3; VaN: 9 and 8
        (6, 0.5): [0, 3, 4, 6, 7, 5],  # TaR: frame 3 and token 3; VaN: 9, 8, 4
        (4, 1.0): [2, 3, 6, 7],
        (3, 0.0): [0, 4, 7],
    }
    for (count, alpha), stay in want.items():
        method = InfiniPotV(budget={"video": count}, alpha=alpha)
        assert kept(method, fill)[0].nonzero()[:, 0].tolist() == sorted(stay)
        assert torch.equal(kept(InfiniPotV(budget=count + 32, alpha=alpha), fill), kept(method, fill))
    assert kept(InfiniPotV(budget={"video": 2}, cap=39), fill).sum() == 2  # 40 are held
    assert kept(InfiniPotV(budget={"video": 2}, cap=40), fill).all()


# --- the recipe, slowly


def slow(method, keys, values, cells, held: list[int], new: list[int], budget: int) -> list[int]:
    """Positions that one head holds behind a chunk: `held` before it, `new` in it; keys and values fp64 [n, D]."""
    every = [*held, *new]
    old, newest = every[:-32], every[-32:]
    if len(every) <= budget:
        return every
    seen = [p for p in every if cells[p] is not None]
    frames = sorted({cells[p][0] for p in seen})
    r = max(int(method.recent * len(seen) / (ROWS * COLS)), 1)
    recent = frames[-r:]
    tar = {}
    for p in old:
        if cells[p] is None:
            continue
        frame, *place = cells[p]
        if frame in recent:
            tar[p] = 3 - (frames[-1] - frame) / r
            continue
        same = [q for q in seen if cells[q][0] in recent and list(cells[q][1:]) == place]
        cosines = [torch.nn.functional.cosine_similarity(keys[p], keys[q], 0) for q in same]
        tar[p] = -float(sum(cosines) / len(cosines)) if same else 0.0
    count = budget - len(newest)
    first = sorted(tar, key=lambda p: -tar[p])[: round(method.alpha * count)]
    rest = sorted((p for p in old if p not in first), key=lambda p: -float(values[p].norm()))
    return sorted(first + rest[: count - len(first)]) + newest


# tokens that the released code (aiha-lab/InfiniPot-V at 81a4dbe, process_kv_cache, method "infinipot-v") drops in its first
# compression, of 16 frames of 4 x 4 to 12, TaR half of the budget, a quarter of the frames recent, no pooling; by head
RELEASED = (
    "0 4 9 11 13 18 20 24 30 31 36 37 38 44 46 50 51 54 55 57 61 62 65 66 73 75 78 79 84 87 89 90 94 96 97 100 105 "
    "109 112 113 114 117 126 132 134 137 144 146 148 149 153 160 161 164 165 171 172 173 175 176 179 180 183 190 ",
    "13 19 21 22 23 25 27 31 33 35 43 46 47 51 61 62 63 65 66 72 76 77 78 79 81 82 83 88 95 98 101 102 104 108 109 "
    "111 118 120 121 122 124 129 131 132 134 136 141 142 151 154 157 159 163 172 174 176 177 178 180 184 187 188 "
    "189 190 ",
)


def test_the_first_compression_is_the_released_codes():
    generator = torch.Generator().manual_seed(7)
    keys, values = (torch.randn(2, 256, 8, generator=generator) for _ in range(2))
    fill = fill_of(video(16, rows=4, cols=4), keys, values, old=224)
    # half of all 192 tokens are TaR's there; here the newest 32 stay before the budget is shared
    stay = kept(InfiniPotV(budget=192, alpha=(96 - 32) / (192 - 32)), fill)
    for head, dropped in enumerate(RELEASED):
        assert (~stay[head]).nonzero()[:, 0].tolist() == [int(i) for i in dropped.split()]


@pytest.mark.parametrize("text", [0, 7])
@pytest.mark.parametrize(("alpha", "recent"), [(0.5, 0.25), (1.0, 0.5), (0.0, 0.25), (0.3, 0.1)])
def test_the_recipe_over_a_stream(alpha, recent, text):
    """Chunk after chunk, each head's survivors compete with what is new; frames seen by age, not by place in a list."""
    method = InfiniPotV(budget=80, alpha=alpha, recent=recent)
    bare = Bare(method, heads=2, dim=8)
    held, cells = [[], []], []
    for step in range(9):
        chunk = video(4, first=4 * step)
        if text:
            chunk = TokenLayout.text(1, text).cat(chunk)
        start = bare.state.seen
        bare.state.chunk_of = chunk  # a chunk of a longer prompt: it is decided upon whatever it holds
        bare.feed(len(chunk), chunk=chunk)
        rows = zip(chunk.modality[0], chunk.frame[0], chunk.row[0], chunk.col[0])
        cells += [None if m == TEXT else (int(f), int(a), int(b)) for m, f, a, b in rows]
        new = list(range(start, bare.state.seen))
        for head in range(2):
            keys, values = bare.keys[0][0, head].double(), bare.values[0][0, head].double()
            held[head] = slow(method, keys, values, cells, held[head], new, 80)
            assert held_by_head(bare.layer, 0, head)[0].tolist() == held[head]
    assert held[0] != held[1]


def test_pooling_by_quarters():
    """Averages over 7 frames, rows and columns, over 5 x 5 of a frame, over 3 of a row, and none, of the tokens there are."""
    layout = video(9)
    generator = torch.Generator().manual_seed(0)
    keys, values = torch.randn(2, 2, len(layout), 4, generator=generator)
    norms = values.norm(dim=-1).view(2, 9, ROWS, COLS)
    reach = ((3, 3, 3), (0, 2, 2), (0, 0, 1), (0, 0, 0))
    for place in range(8):
        f, a, b = reach[place // 2]
        fill = fill_of(layout, keys, values, old=40, place=place, places=8)
        got = InfiniPotV(pooling=True).score(fill)
        for i in (0, 5, 17, 39):
            t, y, x = i // 6, i // 3 % 2, i % 3
            near = norms[:, max(t - f, 0) : t + f + 1, max(y - a, 0) : y + a + 1, max(x - b, 0) : x + b + 1]
            assert torch.allclose(got[:, i], near.flatten(1).mean(1), atol=1e-5)
        assert torch.allclose(InfiniPotV().score(fill), norms.flatten(1)[:, :40])


# --- the memory does not grow


def test_a_cap_holds_however_long_the_video():
    """Compressed to |C| when more than |M| are held; between two compressions it grows."""
    bare = Bare(InfiniPotV(budget=64, cap=120), heads=2, dim=8)
    sizes = []
    for step in range(60):
        chunk = video(2, first=2 * step)
        bare.state.chunk_of = chunk
        bare.feed(len(chunk), chunk=chunk)
        sizes.append([held_by_head(bare.layer, 0, head)[0].numel() for head in range(2)])
    assert max(map(max, sizes)) <= 120
    assert all(a == b for a, b in sizes)
    assert {64, 120} <= {a for a, _ in sizes}


def test_chunked_prefill_keeps_to_the_cap_and_text_whole():
    model = rm.make("qwen2_5_vl")
    peaks, prompt = {}, rm.words(11)
    for frames in (40, 160):
        given = rm.inputs(model, [[*prompt, rm.Video(frames, 8, 8), *rm.words(9, 1)]])
        vision = int((given["input_ids"] == model.config.video_token_id).sum())
        with (
            mmkv.wrapped(model, cache=[InfiniPotV(budget={"video": 96})], prefill_chunk=64),
            checked_attention() as errors,
            torch.no_grad(),
        ):
            cache = model(**given).past_key_values
            peaks[frames] = mmkv.report(model).kv_bytes_peak
        assert errors and vision == frames * 16
        for layer in cache.layers:
            for head in range(2):
                at = held_by_head(layer, 0, head)[0].tolist()
                length = given["input_ids"].shape[1]
                words = set(range(length)) - set(
                    (given["input_ids"][0] == model.config.video_token_id).nonzero()[:, 0].tolist()
                )
                assert words <= set(at)
                assert len(set(at) - words) == 96
    assert peaks[160] <= 1.1 * peaks[40]


def test_a_batch_of_videos_holds_what_each_holds_alone():
    model = rm.make("qwen2_5_vl")
    prompts = [
        [*rm.words(9), rm.Video(40, 8, 8), *rm.words(9, 1)],
        [*rm.words(4, 2), rm.Video(24, 8, 8), *rm.words(5, 3)],
    ]
    with mmkv.wrapped(model, cache=[InfiniPotV(budget={"video": 100}, pooling=True)]), torch.no_grad():
        given = rm.inputs(model, prompts)
        both = model(**given).past_key_values
        pixels = given["pixel_values_videos"].split(given["video_grid_thw"].prod(1).tolist())
        for row, prompt in enumerate(prompts):
            mine = rm.inputs(model, [prompt]) | dict(pixel_values_videos=pixels[row])
            alone = model(**mine).past_key_values
            pad = both.get_seq_length() - alone.get_seq_length()
            for one, two in zip(alone.layers, both.layers):
                for head in range(2):
                    a, b = held_by_head(one, 0, head)[0], held_by_head(two, row, head)[0]
                    assert torch.equal(a, b - pad)


def test_several_videos_and_questions_between_them():
    """New media compete with what is held; a short question drops nothing."""
    model = rm.make("qwen2_5_vl")
    turns = [
        [*rm.words(5), rm.Video(20, 8, 8), *rm.words(5, 1)],
        rm.words(12, 2),
        [rm.Video(24, 8, 8), *rm.words(6, 3)],
    ]
    with mmkv.wrapped(model, cache=[InfiniPotV(budget={"video": 90})]), checked_attention(), torch.no_grad():
        cache, seen, held = mmkv.Cache(model), 0, []
        for turn in turns:
            given = rm.inputs(model, [turn])
            given.pop("attention_mask")
            length = given["input_ids"].shape[1]
            model(**given, position_ids=torch.arange(seen, seen + length).expand(3, 1, -1), past_key_values=cache)
            seen += length
            vision = cache.layers[0].state.layout.visual[0]
            held.append(int(vision[held_by_head(cache.layers[0], 0, 0)[0]].sum()))
    assert held == [90, 90, 90]


def test_before_a_method_that_packs():
    model = rm.make("qwen2_5_vl")
    method = pipeline((InfiniPotV(budget=0.5), KIVI(bits=4, group=32, residual=32)))
    with mmkv.wrapped(model, cache=list(method.methods)), checked_attention() as errors:
        rm.generate(model, rm.inputs(model, [[*rm.words(5), rm.Video(40, 8, 8), *rm.words(5, 1)]]), new=4)
    assert errors


@pytest.mark.parametrize(
    ("options", "said"),
    [
        (dict(alpha=1.5), "alpha 1.5"),
        (dict(alpha=True), "alpha True"),
        (dict(recent=-0.1), "recent -0.1"),
        (dict(pooling=1), "pooling 1"),
        (dict(budget=512, cap=511), "cap 511"),
        (dict(cap=1.5), "cap 1.5"),
        (dict(cap=True), "cap True"),
        (dict(budget={"video": 0.2}), "not ratios"),
        (dict(budget=16), "budget of 16"),
    ],
)
def test_impossible_settings(options, said):
    with pytest.raises(ValueError, match=said) as caught:
        InfiniPotV(**options)
    assert "\n" not in str(caught.value)
