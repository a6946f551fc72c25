"""Infinity's transformer against numbers of the released class, and against itself fed in other ways.

The numbers were made on the CPU in fp32 by the released class (FoundationVision/Infinity, 4c27bbb), its flash attention to the
text replaced by torch's own on operands rounded to bfloat16, its fused norm by the formula. The weights are those of
`infinity_tiny`. In a scratch folder random weights were compared as well: keys, values and all bits were equal to the bit, and
logits to 3e-5 of 86, sampled with seeds, in a batch of prompts of different lengths, with guidance of all kinds, with negative
prompts and with patchify; so were the logits of the training forward.
"""

from __future__ import annotations

import infinity_tiny as tiny
import pytest
import torch
from transformers import DynamicCache

from mmkv.models.infinity import rotary
from mmkv.models.infinity.conditioning import Text
from mmkv.models.infinity.configuration import InfinityConfig, named_config
from mmkv.models.infinity.model import InfinityForImageGeneration
from mmkv.models.infinity.sampling import Sampling
from mmkv.models.infinity.schedules import scale_schedule

GOLDEN = [  # bits set, logits of the first token of the conditional row, mean of all absolute logits
    (4, (0.19864, 1.74541, 0.14799, -1.78868), 0.692558),
    (17, (-0.90715, -1.06528, 0.59169, 1.12653), 0.798764),
    (48, (1.03690, -0.95727, -1.32692, 0.56657), 0.950817),
    (144, (1.45654, 0.93460, -1.30090, -1.31918), 1.074462),
    (256, (-0.12339, 1.40715, 0.39035, -1.39333), 0.853967),
    (720, (-1.09626, -0.38990, 0.93989, 0.53317), 0.677992),
    (1024, (0.34185, -1.08064, -0.66093, 0.84682), 0.671630),
]
GREEDY = dict(guidance=3.0, temperature=0.5, greedy=True)


@pytest.fixture(scope="module")
def painter():
    return tiny.model()


@pytest.fixture(scope="module")
def lively():
    return tiny.lively()


# --- the released class


def test_scale_by_scale(painter, monkeypatch):
    tiny.as_released(monkeypatch)
    painted, outputs = tiny.watched(painter, tiny.features(), **GREEDY)
    for (ones, first, mean), bits, output in zip(GOLDEN, painted.bits, outputs, strict=True):
        assert int(bits.sum()) == ones
        assert output.logits[0, 0].flatten()[:4].tolist() == pytest.approx(first, abs=6e-6)
        assert float(output.logits.abs().mean()) == pytest.approx(mean, abs=1e-6)
    assert outputs[0].logits[1, 0].flatten()[:2].tolist() == pytest.approx((0.12813, 0.48338), abs=6e-6)
    hidden = outputs[0].last_hidden_state
    assert float(hidden.mean()) == pytest.approx(0.019054, abs=1e-6)
    assert float(hidden.std()) == pytest.approx(1.229900, abs=1e-6)
    assert tuple(painted.latent.shape) == (1, 8, 16, 16)
    assert float(painted.latent.sum()) == pytest.approx(45.25482, abs=1e-4)
    assert float(painted.latent.abs().mean()) == pytest.approx(0.34356, abs=1e-5)


def test_fp32_throughout_gives_the_same_bits(painter):
    """We do not round to bfloat16 where the released code does; the least margin of a bit is 0.057."""
    painted, outputs = tiny.watched(painter, tiny.features(), **GREEDY)
    assert [int(bits.sum()) for bits in painted.bits] == [ones for ones, *_ in GOLDEN]
    for (_, first, _), output in zip(GOLDEN, outputs):
        assert output.logits[0, 0].flatten()[:4].tolist() == pytest.approx(first, abs=3e-4)


def test_the_place_of_a_scale_matters(painter, monkeypatch):
    """With every scale placed as the first, which a branch of the released code does, the sheet's other numbers come out."""
    tiny.as_released(monkeypatch)
    table = rotary.rotary_table

    def trapped(schedule, scales, head_dim, device=None):
        whole = table(schedule, range(len(schedule)), head_dim, device)
        return tuple(part[: schedule.tokens[scales.start]] for part in whole)

    monkeypatch.setattr("mmkv.models.infinity.transformer.rotary_table", trapped)
    painted, outputs = tiny.watched(painter, tiny.features(), **GREEDY)
    assert int(painted.bits[1].sum()) == 16
    assert float(outputs[1].logits.abs().mean()) == pytest.approx(0.804973, abs=1e-6)
    assert float(painted.latent.sum()) == pytest.approx(0, abs=1e-3)


def test_patchified():
    """The late margins fall to 2e-4, so a few bits may differ."""
    painter = tiny.model(bits_per_token=16, patchify=True, pixels="0.25M")
    painted = painter.generate(tiny.features(), ratio=1.333, **GREEDY)
    ones = [int(bits.sum()) for bits in painted.bits]
    want = [9, 30, 93, 369, 852, 1517, 2343, 3380, 4669, 7785]
    assert ones[:6] == want[:6] and all(abs(a - b) <= 3 for a, b in zip(ones, want, strict=True))
    assert [tuple(bits.shape) for bits in painted.bits[:3]] == [(1, 2, 2, 4), (1, 4, 4, 4), (1, 8, 6, 4)]
    assert tuple(painted.latent.shape) == (1, 4, 72, 54)
    assert float(painted.latent.sum()) == pytest.approx(-658.33, abs=6)
    assert float(painted.latent.abs().mean()) == pytest.approx(0.93529, abs=2e-3)


OTHERS = {  # two prompts of 5 and 3 tokens: options, sums of the two latents, mean absolute logits of each scale
    "logits": (
        dict(greedy=True), (45.25484, -181.01932), (0.792207, 0.782789, 0.964438, 1.089609, 0.873988, 0.737349, 0.754341)
    ),
    "hidden": (
        dict(greedy=True, guidance_at=(-2,)), (-181.01932, -181.01932),
        (0.254379, 0.678530, 0.979540, 1.104108, 0.893080, 0.795500, 0.848299),
    ),
    "both": (
        dict(greedy=True, guidance_at=(-1, 0)), (90.50967, -181.01932),
        (0.251678, 0.575085, 0.963030, 1.077327, 0.827020, 0.694797, 0.751417),
    ),
    "sampled": (
        dict(seed=7), (-178.61626, -90.94332), (0.792207, 0.782789, 0.922572, 1.067603, 0.849446, 0.743607, 0.752088)
    ),
    "some scales": (
        dict(greedy=True, guidance=[1.0, 1.0, 2.0, 3.0, 1.0, 4.0, 2.0]), (0.0, -181.01932),
        (1.057672, 0.746313, 0.973291, 1.101621, 0.887587, 0.758796, 0.772470),
    ),
    "none": (
        dict(greedy=True, guidance=1.0), (-181.01932, -181.01932),
        (1.057672, 0.746313, 0.981711, 1.107556, 0.896326, 0.799012, 0.840361),
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", OTHERS)
def test_batches_seeds_and_kinds_of_guidance(painter, name, monkeypatch):
    tiny.as_released(monkeypatch)
    options, sums, means = OTHERS[name]
    options = dict(guidance=3.0, temperature=0.5) | options
    painted, outputs = tiny.watched(painter, tiny.features((5, 3)), **options)
    assert painted.latent.sum((1, 2, 3)).tolist() == pytest.approx(sums, abs=1e-3)
    strengths = options["guidance"] if isinstance(options["guidance"], list) else [options["guidance"]] * 7
    at = options.get("guidance_at", (0,))
    for output, mean, strength in zip(outputs, means, strengths, strict=True):
        logits = (
            output.logits if strength != 1 and 0 in at else output.logits[:2]
        )  # others the released code leaves out
        assert float(logits.abs().mean()) == pytest.approx(mean, abs=2e-6)


def test_all_scales_at_once(painter, monkeypatch):
    """The training forward."""
    tiny.as_released(monkeypatch)
    schedule = scale_schedule(1.0, "0.06M")
    inputs = 0.3 * torch.sin(0.11 * torch.arange(2 * 520 * 8, dtype=torch.float64)).float().view(2, 520, 8)
    with torch.no_grad():
        logits = painter(inputs, Text.of(tiny.features((5, 3))), schedule, use_cache=False).logits
    assert tuple(logits.shape) == (2, 521, 8, 2)
    assert float(logits.abs().mean()) == pytest.approx(0.722418, abs=1e-6)
    assert float(logits.std()) == pytest.approx(0.814974, abs=1e-6)
    assert logits[0, 0].flatten()[:4].tolist() == pytest.approx((0.198637, 1.745407, 0.147994, -1.788679), abs=2e-6)
    assert logits[1, 100].flatten()[:4].tolist() == pytest.approx((-0.093868, 1.019312, 0.269458, -1.033972), abs=2e-6)
    assert logits[1, 520].flatten()[12:].tolist() == pytest.approx((1.252098, 0.363586, -1.101207, -0.579795), abs=2e-6)


# --- itself


@pytest.mark.parametrize("implementation", ["sdpa", "eager"])
def test_at_once_as_scale_by_scale(lively, implementation):
    """Teacher forcing gives each scale the logits that it gets one after the other."""
    schedule, text = scale_schedule(0.571, "0.06M"), Text.of(tiny.features((4, 6), seed=1))
    inputs = torch.randn(2, sum(schedule.tokens) - 1, 8, generator=torch.Generator().manual_seed(2))
    lively.set_attn_implementation(implementation)
    try:
        with torch.no_grad():
            whole = lively(inputs, text, schedule, use_cache=False).logits
            cache, start = DynamicCache(config=lively.config), 0
            for scale, count in enumerate(schedule.tokens):
                mine = inputs[:, start - 1 : start - 1 + count] if scale else None
                one = lively(mine, text, schedule, scale=scale, past_key_values=cache).logits
                assert (one - whole[:, start : start + count]).abs().max() < 2e-4 * whole.abs().max()
                start += count
    finally:
        lively.set_attn_implementation("sdpa")
    assert cache.get_seq_length() == sum(schedule.tokens)


def test_text_that_is_kept_changes_no_bit(lively, monkeypatch):
    """Keys and values of the text made once, and made anew in each scale."""
    text = tiny.features((5, 3), seed=3)
    kept = lively.generate(text, seed=0)
    model = type(lively.model)
    monkeypatch.setattr(model, "condition", lambda self, text: self.conditioner(text))
    assert tiny.same(kept, lively.generate(text, seed=0))


def test_the_last_scale_is_not_kept_and_changes_no_bit(lively, monkeypatch):
    text = tiny.features((5, 3), seed=3)
    painted = lively.generate(text, seed=0)
    cache = painted.past_key_values
    assert cache.get_seq_length() == 265
    assert all(layer.keys.shape == (4, 4, 265, 16) for layer in cache.layers)
    assert all(layer.keys.untyped_storage().nbytes() == 4 * 4 * 265 * 16 * 4 for layer in cache.layers)
    forward = type(lively.model).forward
    monkeypatch.setattr(type(lively.model), "forward", lambda self, *a, last=False, **k: forward(self, *a, **k))
    whole = lively.generate(text, seed=0)
    assert whole.past_key_values.get_seq_length() == 521
    assert tiny.same(painted, whole)


@pytest.mark.parametrize("options", [dict(greedy=True), dict(seed=[11, 12]), dict(seed=[11, 12], guidance_at=(-2,)),
                                     dict(seed=[11, 12], guidance_at=(1,)), dict(guidance=1.0, seed=[11, 12])])  # fmt: skip
def test_a_batch_is_its_prompts_alone(lively, options):
    """Prompts of 7 and 3 tokens: padding is not seen."""
    text = tiny.features((7, 3), seed=4)
    both = lively.generate(text, **options)
    for row in range(2):
        mine = {name: [value[row]] if name == "seed" else value for name, value in options.items()}
        alone = lively.generate([text[row]], **mine)
        assert all(torch.equal(a[row : row + 1], b) for a, b in zip(both.bits, alone.bits, strict=True))


def test_seeds():
    painter, text = tiny.lively(), tiny.features(seed=5)
    once, again, other = (painter.generate(text, seed=seed, temperature=3.0) for seed in (1, 1, 2))
    assert tiny.same(once, again) and not tiny.same(once, other)


def test_padding_is_not_seen(lively):
    one = tiny.features((3,), seed=6)[0]
    padded = torch.cat([one, torch.full((4, 256), 9.0)])[None]
    mask = torch.tensor([[True] * 3 + [False] * 4])
    with torch.no_grad():
        a, b = (lively.model.condition(text) for text in (Text(one[None]), Text(padded, mask)))
    assert (a.condition - b.condition).abs().max() < 1e-5
    assert [x.shape for x in Text(padded, mask).split()] == [(3, 256)]


def test_a_negative_prompt_leads_away(lively):
    text, other = tiny.features((5, 3), seed=3), tiny.features((2, 8), seed=9)
    assert not tiny.same(lively.generate(text, seed=0), lively.generate(text, seed=0, negative=other))
    rows = lively.model.conditioner.unconditional.detach()
    mine = lively.generate(text, seed=0, negative=[rows[:5], rows[:3]])
    assert tiny.same(lively.generate(text, seed=0), mine)


def test_bits_and_latent_say_the_same(lively):
    """The latent is the sum of all codes, each at full size: +-1/sqrt(8), bilinear between the middles of the places."""
    painted = lively.generate(tiny.features(seed=5), seed=1)
    total = torch.zeros(1, 8, 16, 16, dtype=torch.float64)
    for bits in painted.bits:
        codes = (bits.double().movedim(-1, 1) * 2 - 1) / 8**0.5
        total += torch.nn.functional.interpolate(codes, (16, 16), mode="bilinear", align_corners=False)
    assert (painted.latent - total).abs().max() < 1e-5


def test_saved_and_loaded(lively, tmp_path):
    lively.save_pretrained(tmp_path)
    again = InfinityForImageGeneration.from_pretrained(tmp_path)
    text = tiny.features(seed=5)
    assert tiny.same(lively.generate(text, seed=1), again.generate(text, seed=1))
    assert again.config.pool_heads == 2 and again.name_or_path == str(tmp_path)


def test_half_precision_keeps_the_cache_small(lively, tmp_path):
    lively.save_pretrained(tmp_path)
    half = InfinityForImageGeneration.from_pretrained(tmp_path, dtype=torch.bfloat16)
    painted, outputs = tiny.watched(half, tiny.features(seed=5), greedy=True)
    assert painted.past_key_values.layers[0].keys.dtype == torch.bfloat16
    assert all(output.logits.dtype == output.last_hidden_state.dtype == torch.float32 for output in outputs)
    whole = lively.generate(tiny.features(seed=5), greedy=True)
    assert (painted.bits[0] == whole.bits[0]).float().mean() >= 0.75


def test_gradients_reach_everything():
    painter, schedule = tiny.model(), scale_schedule(1.0, "0.06M")
    inputs = torch.zeros(2, sum(schedule.tokens) - 1, 8)
    without = painter.model.conditioner.without_prompt([4])
    text = Text.of([*tiny.features(), *without.split()])
    painter(inputs, text, schedule, use_cache=False).logits.square().sum().backward()
    assert [name for name, p in painter.named_parameters() if p.grad is None] == []


# --- sampling, by hand


def test_sampling_by_hand():
    """Logits 0 and x: p(1) = 1 / (1 + exp(-x / temperature)), cut at 3 %."""
    x = torch.tensor([-4.0, -3.0, 0.0, 3.0, 4.0]).repeat(20_000)
    logits = torch.stack([torch.zeros_like(x), x], -1)[None, None]
    drawn = Sampling(seed=0).bits(logits, 1.0, 1.0, Sampling(seed=0).generators(1, "cpu"), both=False)
    share = drawn[0, 0].view(-1, 5).float().mean(0)
    want = torch.tensor([0.0, 1 / (1 + torch.e**3), 0.5, 1 / (1 + torch.e**-3), 1.0])  # 1.8 % is cut, 4.7 % is not
    assert (share - want).abs().max() < 0.01 and share[0] == 0 and share[4] == 1
    cold = Sampling(seed=0).bits(logits, 1.0, 0.5, Sampling(seed=0).generators(1, "cpu"), both=False)
    assert set(cold[0, 0].view(-1, 5)[:, 3].tolist()) == {1}  # 6 in place of 3: 0.25 % is cut
    assert Sampling(greedy=True).bits(logits, 1.0, 1.0, [None], both=False)[0, 0, :5].tolist() == [0, 0, 0, 1, 1]


def test_guidance_by_hand():
    conditional, unconditional = torch.tensor([[[[0.0, 0.2]]]]), torch.tensor([[[[0.0, 1.0]]]])
    both = torch.cat([conditional, unconditional])
    strength = 3.0  # 3 * 0.2 - 2 * 1.0 = -1.4
    for at, want in (((0,), 0), ((1,), 0), ((-1,), 1)):
        assert int(Sampling(greedy=True, guidance_at=at).bits(both, strength, 1.0, [None], both=True)) == want
    assert int(Sampling(greedy=True).bits(both, 1.0, 1.0, [None], both=True)) == 1
    # 3 * 0.55 - 2 * 0.73 = 0.19 of the probability
    draws = Sampling(seed=1, guidance_at=(1,), top_p=1.0).bits(
        both.expand(-1, 10_000, -1, -1), strength, 1.0, Sampling(seed=1).generators(1, "cpu"), both=True
    )
    assert abs(float(draws.float().mean()) - (3 * 0.549834 - 2 * 0.731059)) < 0.02


@pytest.mark.parametrize("options", [
    dict(guidance=-1), dict(guidance=True), dict(guidance="3"), dict(guidance=[3.0, None]), dict(temperature=0),
    dict(temperature=[0.5, -1]), dict(top_p=1.5), dict(top_p=True), dict(guidance_at=(0, 1)), dict(guidance_at=(2,)),
    dict(guidance_at=(-4,)), dict(guidance_at=(0.5,)), dict(guidance=[3.0] * 6), dict(temperature=[1.0]), dict(seed=[1, 2]),
    dict(ratio=1.1), dict(pixels="2M"), dict(negative=[torch.zeros(2, 256)] * 2),
])  # fmt: skip
def test_impossible_settings(painter, options):
    with pytest.raises(ValueError) as caught:
        painter.generate(tiny.features(), **options)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ([torch.zeros(17, 256)], "a prompt of 17 tokens: this model takes 16 at most"),
        ([], "no prompts"),
        ([torch.zeros(0, 256)], "a prompt without tokens"),
        ([torch.zeros(3, 255)], r"this model takes \[prompts, tokens, 256\]"),
    ],
)
def test_text_that_does_not_fit(painter, text, says):
    with pytest.raises(ValueError, match=says):
        painter.generate(text)


def test_tokens_that_are_not_the_scales(painter):
    schedule, text = scale_schedule(1.0, "0.06M"), Text.of(tiny.features())
    with pytest.raises(ValueError, match="3 tokens for scales 1-1, which have 4"):
        painter(torch.zeros(1, 3, 8), text, schedule, scale=1)
    small = InfinityForImageGeneration(InfinityConfig(**{**tiny.TINY, "max_scales": 4}))
    with pytest.raises(ValueError, match="levels for 4 scales"):
        small.generate(tiny.features())


# --- configurations


@pytest.mark.parametrize("options", [
    dict(hidden_size=66), dict(num_attention_heads=3), dict(num_hidden_layers=0), dict(block_chunks=3), dict(pixels="3M"),
    dict(bits_per_token=6, patchify=True), dict(hidden_size=72, num_attention_heads=12), dict(pool_heads=5),
    dict(bits_per_token=True), dict(vae_config=dict(latent_channels=16)),
])  # fmt: skip
def test_impossible_configurations(options):
    with pytest.raises(ValueError) as caught:
        InfinityConfig(**{**tiny.TINY, **options})
    assert "\n" not in str(caught.value)


def test_named_configurations():
    two, eight = named_config("2b"), named_config("8b-512")
    assert (two.head_dim, two.intermediate_size, two.pool_heads, two.latent_channels) == (128, 8192, 16, 32)
    assert (eight.head_dim, eight.intermediate_size, eight.latent_channels, eight.pixels) == (128, 14336, 14, "0.25M")
    assert eight.vae_config.patch_size == 8 and two.vae_config.patch_size == 16
    assert [named_config(f"layer{n}").head_dim for n in (16, 24, 32, 40, 48)] == [96, 96, 104, 112, 120]
    with pytest.raises(ValueError, match="model '20b': possible are '125m', '2b'"):
        named_config("20b")
