"""wrap, unwrap, wrapped: what they refuse, what they leave, and what they work together with."""

from __future__ import annotations

import copy
import io
import json
import pickle

import pytest
import random_models as rm
import torch
import transformers as tf
from cache_reference import METHODS, checked_attention
from transformers import DynamicCache

import mmkv
from mmkv.cache import KIVI


@pytest.fixture
def model():
    return rm.make("qwen2")


def untouched(model) -> bool:
    every = [f for m in model.modules() for k, v in m.__dict__.items() if k.endswith("_hooks") for f in v.values()]
    hooks = [f for f in every if f.__module__.startswith("mmkv")]  # transformers' own towers hook themselves
    marks = [k for m in model.modules() for k in m.__dict__ if "mmkv" in k]
    text = model.config.get_text_config()
    return not hooks and not marks and text._attn_implementation != "mmkv"


def one_line(caught) -> str:
    message = str(caught.value)
    assert message
    assert "\n" not in message
    return message


# --- bad input


@pytest.mark.parametrize("thing", [5, None, "Qwen/Qwen2.5-VL-3B-Instruct", torch.nn.Linear(2, 2), {}], ids=str)
def test_wrong_type(thing):
    with pytest.raises(TypeError) as caught:
        mmkv.wrap(thing)
    assert type(thing).__name__ in one_line(caught)


def test_a_bare_decoder_cannot_generate(model):
    with pytest.raises(TypeError, match="Qwen2Model"):
        mmkv.wrap(model.model)


SMALL = dict(vocab_size=60, hidden_size=32, intermediate_size=32, num_hidden_layers=2, num_attention_heads=2)


def unsupported(kind):
    if kind == "gpt2":
        return tf.GPT2LMHeadModel(tf.GPT2Config(vocab_size=60, n_embd=32, n_layer=1, n_head=2))
    if kind == "t5":
        return tf.T5ForConditionalGeneration(
            tf.T5Config(vocab_size=60, d_model=32, d_kv=16, d_ff=32, num_layers=1, num_heads=2)
        )
    if kind == "deepseek_v3":
        more = dict(
            num_key_value_heads=2, q_lora_rank=8, kv_lora_rank=8, qk_rope_head_dim=8, qk_nope_head_dim=8, v_head_dim=16
        )
        more |= dict(
            n_routed_experts=2,
            num_experts_per_tok=1,
            n_group=1,
            topk_group=1,
            first_k_dense_replace=2,
            moe_intermediate_size=16,
        )
        return tf.DeepseekV3ForCausalLM(tf.DeepseekV3Config(**SMALL, **more))
    if kind == "gemma3n":
        with torch.device("meta"):
            return tf.Gemma3nForCausalLM(
                tf.Gemma3nTextConfig(
                    **(SMALL | dict(num_hidden_layers=4)),
                    num_kv_shared_layers=2,
                    head_dim=16,
                    layer_types=["full_attention"] * 4,
                    vocab_size_per_layer_input=60,
                    hidden_size_per_layer_input=8,
                    activation_sparsity_pattern=[0.0] * 4,
                )
            )
    more = dict(num_key_value_heads=2, cross_attention_layers=[1])
    text = SMALL | more | dict(pad_token_id=0)
    vision = dict(
        hidden_size=32,
        intermediate_size=32,
        num_hidden_layers=1,
        num_global_layers=1,
        attention_heads=2,
        image_size=28,
        patch_size=14,
        vision_output_dim=64,
        intermediate_layers_indices=[0],
        supported_aspect_ratios=[[1, 1]],
    )
    return tf.MllamaForConditionalGeneration(tf.MllamaConfig(text_config=text, vision_config=vision))


@pytest.mark.parametrize(
    ("kind", "why"),
    [
        ("gpt2", ""),
        ("t5", "cross-attention"),
        ("deepseek_v3", "MLA"),
        ("gemma3n", "shares KV"),
        ("mllama", "cross-attention"),
    ],
)
def test_unsupported_families(kind, why):
    other = unsupported(kind)
    with pytest.raises(ValueError) as caught:
        mmkv.wrap(other, "kivi-2")
    message = one_line(caught)
    assert why in message
    for family in ("qwen2_5_vl", "llava_onevision", "qwen2", "gpt_oss"):
        assert family in message
    assert untouched(other)


def test_wrapping_twice(model):
    mmkv.wrap(model)
    with pytest.raises(ValueError, match="already wrapped") as caught:
        mmkv.wrap(model, "kivi-2")
    one_line(caught)
    rm.generate(model, rm.inputs(model, [rm.words(20)]), new=2)  # the first wrap still works
    mmkv.unwrap(model)
    assert untouched(model)


@pytest.mark.parametrize("call", [mmkv.unwrap, mmkv.report, mmkv.Cache], ids=["unwrap", "report", "Cache"])
def test_a_stranger(model, call):
    for thing in (model, torch.nn.Linear(1, 1)):
        with pytest.raises(ValueError, match="not wrapped") as caught:
            call(thing)
        one_line(caught)


def test_unwrapping_twice(model):
    mmkv.unwrap(mmkv.wrap(model))
    with pytest.raises(ValueError, match="not wrapped"):
        mmkv.unwrap(model)


@pytest.mark.parametrize(
    ("name", "near"), [("vidvk", "vidkv"), ("kivi2", "kivi-2"), ("kivi_4", "kivi-4"), ("vidkv_stp", "vidkv-stp")]
)
def test_unknown_preset_names_the_nearest(model, name, near):
    with pytest.raises(ValueError, match=f"did you mean '{near}'") as caught:
        mmkv.wrap(model, name)
    one_line(caught)
    assert untouched(model)


@pytest.mark.parametrize("name", ["snapkv", "SnapKV", "SNAPKV"])
def test_a_method_is_no_preset(model, name):
    with pytest.raises(ValueError) as caught:
        mmkv.wrap(model, name)
    message = one_line(caught)
    assert f"{name!r}: SnapKV is a method" in message
    assert "cache=[mmkv.cache.SnapKV(...)]" in message
    assert all(preset in message for preset in mmkv.presets())
    assert untouched(model)


def test_unknown_preset_lists_all(model):
    with pytest.raises(ValueError) as caught:
        mmkv.wrap(model, "zzzzzz")
    message = one_line(caught)
    assert all(name in message for name in mmkv.presets())
    assert "'zzzzzz' P" not in message  # sentences are kept apart


BAD_TYPES = [
    dict(cache=5),
    dict(cache=[5]),
    dict(cache="vidkv"),
    dict(cache=["vidkv"]),
    dict(cache=KIVI),
    dict(preset=KIVI()),
    dict(tokens=5),
]


@pytest.mark.parametrize("options", BAD_TYPES, ids=str)
def test_wrong_method_types(model, options):
    with pytest.raises((TypeError, NotImplementedError)) as caught:
        mmkv.wrap(model, **options)
    assert "not iterable" not in one_line(caught)
    assert "'v'" not in one_line(caught)
    assert untouched(model)


@pytest.mark.parametrize(
    "options", [dict(positions="paper"), dict(preset="vidkv", cache=[KIVI()]), dict(positions=None)], ids=str
)
def test_wrong_options(model, options):
    with pytest.raises(ValueError) as caught:
        mmkv.wrap(model, **options)
    one_line(caught)
    assert untouched(model)


def test_head_size_that_does_not_fit(model):
    with pytest.raises(ValueError, match="16") as caught:
        mmkv.wrap(model, cache=[KIVI(channel_group=7)])
    one_line(caught)
    assert untouched(model)


def test_one_method_without_a_list(model):
    with mmkv.wrapped(model, cache=KIVI(bits=4)):
        assert mmkv._wrap.session(model).method == KIVI(bits=4)


class Mine(DynamicCache):
    def update(self, *args, **kwargs):
        return super().update(*args, **kwargs)


def filled(model):
    cache = DynamicCache(config=model.config)
    with torch.no_grad():
        model(torch.tensor([[30, 31]]), past_key_values=cache)
    return cache


def offloaded(model):
    cache = DynamicCache(config=model.config)
    cache.offloading = True  # its constructor wants a GPU
    return cache


FOREIGN = {
    "static": lambda m: tf.StaticCache(config=m.config, max_cache_len=64),
    "not empty": filled,
    "offloaded": offloaded,
    "subclass": lambda m: Mine(config=m.config),
    "encoder-decoder": lambda m: tf.EncoderDecoderCache(DynamicCache(), DynamicCache()),
    "legacy tuple": lambda m: ((torch.zeros(1, 2, 3, 16), torch.zeros(1, 2, 3, 16)),) * 3,
    "a string": lambda m: "cache",
}


@pytest.mark.parametrize("kind", FOREIGN)
@pytest.mark.parametrize("how", ["generate", "forward"])
def test_foreign_caches(model, kind, how):
    if kind == "a string" and how == "generate":
        pytest.skip("generate itself stumbles over it first")
    cache = FOREIGN[kind](model)
    given = rm.inputs(model, [rm.words(9)])
    stock = rm.generate(model, given)
    with mmkv.wrapped(model, "kivi-2"):
        with pytest.raises((TypeError, ValueError)) as caught:
            rm.generate(model, given, past_key_values=cache) if how == "generate" else model(
                **given, past_key_values=cache
            )
        one_line(caught)
        assert mmkv._wrap.session(model)._inputs == {}
        rm.generate(model, given)
    assert torch.equal(stock, rm.generate(model, given))


def test_static_cache_by_name(model):
    with mmkv.wrapped(model), pytest.raises(TypeError, match="StaticCache"):
        rm.generate(model, rm.inputs(model, [rm.words(9)]), cache_implementation="static")


def test_padded_batch_without_a_mask(model):
    ids = torch.tensor([[rm.PAD] * 3 + rm.words(5), rm.words(8)])
    with mmkv.wrapped(model, "kivi-2"), torch.no_grad():
        for bad in (ids, ids.flip(1)):
            with pytest.raises(ValueError, match="attention_mask") as caught:
                model(input_ids=bad)
            one_line(caught)
        model(input_ids=ids, attention_mask=(ids != rm.PAD).long())
        model(input_ids=ids[1:])


def test_a_mask_that_is_too_short(model):
    with mmkv.wrapped(model, cache=[METHODS["kivi-2"]]), torch.no_grad(), pytest.raises(ValueError) as caught:
        model(input_ids=torch.tensor([rm.words(8)]), attention_mask=torch.ones(1, 5, dtype=torch.long))
    one_line(caught)


def test_four_dimensional_masks(model):
    """Honoured while everything is dense, refused on a compressed cache."""
    given = rm.inputs(model, [rm.words(100)])
    mask = torch.full((100, 100), torch.finfo(torch.float32).min).triu(1)[None, None]
    mask[..., 60:, 3] = torch.finfo(torch.float32).min
    with torch.no_grad():
        stock = model(given["input_ids"], attention_mask=mask).logits
        with mmkv.wrapped(model):
            assert torch.equal(stock, model(given["input_ids"], attention_mask=mask).logits)
        with mmkv.wrapped(model, cache=[METHODS["kivi-2"]]):
            cache = model(**given).past_key_values
            with pytest.raises(ValueError, match="4-D") as caught:
                model(torch.tensor([[30]]), attention_mask=torch.zeros(1, 1, 1, 101), past_key_values=cache)
            one_line(caught)


def test_output_attentions(model):
    given = rm.inputs(model, [rm.words(9)])
    with mmkv.wrapped(model):
        with pytest.raises(ValueError, match="output_attentions") as caught:
            model(**given, output_attentions=True)
        one_line(caught)
        with pytest.raises(ValueError, match="output_attentions"):
            rm.generate(model, given, output_attentions=True, return_dict_in_generate=True)


@pytest.mark.parametrize("where", ["mlp", "lm_head", "self_attn"])
def test_an_error_inside_a_forward_leaves_no_state(model, where):
    """The next call on the same wrapped model, with a fresh cache, is as if nothing had happened."""
    given = rm.inputs(model, [rm.words(100)])
    with mmkv.wrapped(model, cache=[METHODS["kivi-2"]]):
        want = rm.generate(model, given)
        module = model.lm_head if where == "lm_head" else getattr(model.model.layers[1], where)

        def fail(*_):
            raise KeyError("boom")

        hook = module.register_forward_pre_hook(fail)
        with pytest.raises(KeyError, match="boom"):
            rm.generate(model, given)
        hook.remove()
        assert mmkv._wrap.session(model)._inputs == {}
        assert torch.equal(want, rm.generate(model, given))
    assert untouched(model)


def test_wrapped_unwraps_after_an_error(model):
    with pytest.raises(KeyError, match="boom"), mmkv.wrapped(model, "vidkv"):
        raise KeyError("boom")
    assert untouched(model)


def test_an_error_while_wrapping_leaves_nothing(model, monkeypatch):
    monkeypatch.setattr(type(model.model), "register_forward_hook", lambda *a, **k: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        mmkv.wrap(model)
    monkeypatch.undo()
    assert untouched(model)


# --- together with others


@pytest.mark.parametrize("family", ["qwen2", "qwen2_5_vl"])
def test_peft(family):
    peft = pytest.importorskip("peft")
    base = rm.make(family)
    lora = peft.get_peft_model(
        base, peft.LoraConfig(target_modules=["q_proj", "v_proj"], r=2, init_lora_weights=False)
    ).eval()
    given = rm.inputs(lora.get_base_model(), [rm.default_prompt(base, 160)])
    stock = rm.generate(lora, given)
    with torch.no_grad():
        logits = lora(**given).logits
    assert mmkv.wrap(lora) is lora
    assert torch.equal(stock, rm.generate(lora, given))
    with torch.no_grad():
        out = lora(**given)
        assert torch.equal(logits, out.logits)
    layout = out.past_key_values.layers[0].state.layout
    assert bool(layout.visual.any()) == (family == "qwen2_5_vl")
    assert mmkv.report(lora).prefill_seconds > 0
    with pytest.raises(ValueError, match="already"):
        mmkv.wrap(base)
    mmkv.unwrap(lora)
    assert untouched(lora.get_base_model())
    with mmkv.wrapped(lora, cache=[METHODS["vidkv-stp"]]), checked_attention() as errors:
        rm.generate(lora, given, past_key_values=mmkv.Cache(lora))
    assert errors


def test_subclassed_model():
    class Custom(tf.Qwen2ForCausalLM):
        def forward(self, *args, **kwargs):
            return super().forward(*args, **kwargs)

    torch.manual_seed(0)
    custom = Custom(rm.make("qwen2").config).eval()
    given = rm.inputs(custom, [rm.words(40)])
    stock = rm.generate(custom, given)
    with mmkv.wrapped(custom):
        assert torch.equal(stock, rm.generate(custom, given))


@pytest.mark.parametrize("family", ["qwen2_5_vl", "llava_onevision", "qwen2"])
def test_deepcopy_while_wrapped(family):
    """Both work by themselves; unwrapping one leaves the other."""
    one = rm.make(family)
    given = rm.inputs(one, [rm.default_prompt(one, 160)])
    stock = rm.generate(one, given)
    mmkv.wrap(one, cache=[METHODS["kivi-2"]])
    packed = rm.generate(one, given)
    two = copy.deepcopy(one)
    assert mmkv._wrap.session(two) is not mmkv._wrap.session(one)
    assert mmkv._wrap.session(two).adapter.model is two
    assert torch.equal(packed, rm.generate(two, given))
    with torch.no_grad():
        for p in two.parameters():
            p.mul_(0.5)
    assert torch.equal(packed, rm.generate(one, given))
    mmkv.unwrap(one)
    assert untouched(one)
    assert torch.equal(stock, rm.generate(one, given))
    before = mmkv.report(two).kv_bytes
    rm.generate(two, given)
    assert mmkv.report(two).kv_bytes == before
    mmkv.unwrap(two)
    assert untouched(two)


def test_pickle_while_wrapped(model):
    given = rm.inputs(model, [rm.words(100)])
    mmkv.wrap(model, cache=[METHODS["vidkv"]])
    other = pickle.loads(pickle.dumps(model))
    assert torch.equal(rm.generate(model, given), rm.generate(other, given))
    mmkv.unwrap(other)
    assert untouched(other)


@pytest.mark.parametrize("family", ["qwen2_5_vl", "llava_onevision", "qwen2", "gpt_oss"])
def test_save_pretrained_while_wrapped(family, tmp_path):
    one = rm.make(family)
    given = rm.inputs(one, [rm.default_prompt(one)])
    stock = rm.generate(one, given)
    with mmkv.wrapped(one, "vidkv"):
        one.save_pretrained(tmp_path)
    for file in tmp_path.glob("*.json"):
        assert "mmkv" not in file.read_text()
    json.loads((tmp_path / "config.json").read_text())
    again = type(one).from_pretrained(tmp_path).eval()
    assert untouched(again)
    assert torch.equal(stock, rm.generate(again, given))


class Letters:
    """A tokenizer of one letter per id, for streaming."""

    def decode(self, ids, **_):
        return "".join(chr(0x4E00 + int(i)) for i in ids)


def test_text_streamer(model):
    given = rm.inputs(model, [rm.words(100)])
    texts = []
    for preset in (None, "stock"):
        out = io.StringIO()

        class Streamer(tf.TextStreamer):
            def on_finalized_text(self, text, stream_end=False, out=out):
                out.write(text)

        def run(Streamer=Streamer):
            return rm.generate(model, given, streamer=Streamer(Letters(), skip_prompt=True))

        if preset is None:
            with mmkv.wrapped(model):
                tokens = run()
        else:
            tokens = run()
        assert out.getvalue() == Letters().decode(tokens[0, 100:])
        texts.append(out.getvalue())
    assert texts[0] == texts[1]


def test_text_generation_pipeline(model):
    tokenizers = pytest.importorskip("tokenizers")
    vocab = {f"w{i}": i for i in range(rm.VOCAB)}
    raw = tokenizers.Tokenizer(tokenizers.models.WordLevel(vocab, unk_token="w3"))
    raw.pre_tokenizer = tokenizers.pre_tokenizers.Whitespace()
    tokenizer = tf.PreTrainedTokenizerFast(
        tokenizer_object=raw, pad_token="w0", eos_token="w2", bos_token="w1", padding_side="left"
    )
    model.generation_config.eos_token_id = 2
    pipe = tf.pipeline("text-generation", model=model, tokenizer=tokenizer, device="cpu")
    prompts = [" ".join(f"w{i}" for i in rm.words(n, n)) for n in (80, 20)]
    options = dict(max_new_tokens=5, do_sample=False, batch_size=2)
    stock = pipe(prompts, **options)
    with mmkv.wrapped(model):
        assert pipe(prompts, **options) == stock
    with mmkv.wrapped(model, cache=[METHODS["kivi-2"]]), checked_attention() as errors:
        pipe(prompts, **options)
    assert errors


def test_image_text_to_text_pipeline():
    """The bundled model through transformers' own multimodal pipeline, stock, wrapped and compressed."""
    from PIL import Image

    from mmkv.models import tiny

    vlm, processor = tiny.load()
    pipe = tf.pipeline("image-text-to-text", model=vlm, processor=processor, device="cpu")
    picture = Image.effect_noise((160, 128), 60).convert("RGB")
    chat = [
        {
            "role": "user",
            "content": [{"type": "image", "image": picture}, {"type": "text", "text": "what color is the ball ?"}],
        }
    ]
    options = dict(text=chat, generate_kwargs=dict(max_new_tokens=5, do_sample=False), return_full_text=False)
    stock = pipe(**options)
    with mmkv.wrapped(vlm):
        assert pipe(**options) == stock
        assert mmkv.report(vlm).tokens["image"] > 0
    with mmkv.wrapped(vlm, cache=[METHODS["kivi-4"]]):
        assert pipe(**options)[0]["generated_text"]


@pytest.mark.parametrize("family", ["qwen2", "qwen2_5_vl"])
@pytest.mark.parametrize("parts", [1, 2])
def test_device_map(family, parts):
    """accelerate's dispatch, in one part and in two."""
    accelerate = pytest.importorskip("accelerate")
    model = rm.make(family)
    given = rm.inputs(model, [rm.default_prompt(model, 160)])
    stock = rm.generate(model, given)
    layers = "model.language_model.layers" if family == "qwen2_5_vl" else "model.layers"
    split = {"": "cpu"}
    if parts == 2:
        split = {f"{layers}.{i}": "cpu" for i in range(3)} | _rest(model, layers)
    accelerate.dispatch_model(model, split, force_hooks=True)
    with mmkv.wrapped(model):
        assert torch.equal(stock, rm.generate(model, given))
    with mmkv.wrapped(model, cache=[METHODS["vidkv"]]), checked_attention() as errors:
        rm.generate(model, given)
    assert errors
    assert torch.equal(stock, rm.generate(model, given))


def _rest(model, layers) -> dict:
    """Every module beside the decoder layers, as whole as possible."""
    rest = {}
    for name, _ in model.named_modules():
        inside = name.startswith(layers) or layers.startswith(name + ".") or not name
        if not inside and not any(name.startswith(r + ".") for r in rest):
            rest[name] = "cpu"
    return rest


@pytest.mark.parametrize("family", ["qwen2", "qwen2_5_vl", "gemma2"])
def test_training_step(family):
    """Loss and gradients of a training step are stock's, and nothing is cached."""
    model = rm.make(family)
    given = rm.inputs(model, [rm.default_prompt(model), rm.second_prompt(model)])
    given["labels"] = given["input_ids"]

    def step():
        model.train()
        model.zero_grad()
        loss = model(**given).loss
        loss.backward()
        model.eval()
        return loss.item(), {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}

    loss, grads = step()
    with mmkv.wrapped(model, "vidkv"):
        loss2, grads2 = step()
    assert loss == loss2
    assert grads.keys() == grads2.keys()
    assert all(torch.equal(grads[n], grads2[n]) for n in grads)


def test_gradient_checkpointing(model):
    given = rm.inputs(model, [rm.words(30)])
    model.gradient_checkpointing_enable()

    def step():
        model.train()
        model.zero_grad()
        model(**given, labels=given["input_ids"]).loss.backward()
        model.eval()
        return model.lm_head.weight.grad.clone()

    grad = step()
    with mmkv.wrapped(model, "kivi-2"):
        assert torch.equal(grad, step())


@pytest.mark.parametrize("name", ["kivi-2", "vidkv-stp"])
def test_two_streams_on_one_model(name):
    """Two caches used in turns give what each gives alone."""
    model = rm.make("qwen2_5_vl")
    prompts = [rm.default_prompt(model, 160), rm.second_prompt(model) + rm.words(90, 9)]
    given = [rm.inputs(model, [p]) for p in prompts]

    def step(cache, token):
        positions = torch.full((3, 1, 1), cache.get_seq_length())
        return model(input_ids=torch.tensor([[token]]), position_ids=positions, past_key_values=cache).logits

    with mmkv.wrapped(model, cache=[METHODS[name]]), torch.no_grad():
        alone = []
        for inputs in given:
            cache = model(**inputs).past_key_values
            alone.append([step(cache, 30 + i) for i in range(40)])
        caches = [model(**inputs).past_key_values for inputs in given]
        for i in range(40):
            for stream in range(2):
                assert torch.equal(step(caches[stream], 30 + i), alone[stream][i])


def test_two_wrapped_models_at_once():
    one, two = rm.make("qwen2"), rm.make("gemma3_text")
    given = rm.inputs(one, [rm.words(120)])
    with mmkv.wrapped(one, cache=[METHODS["kivi-2"]]), mmkv.wrapped(two, cache=[METHODS["vidkv"]]):
        a, b = rm.generate(one, given), rm.generate(two, given)
        assert torch.equal(a, rm.generate(one, given))
        assert torch.equal(b, rm.generate(two, given))
        assert mmkv.report(one).kv_bytes != mmkv.report(two).kv_bytes


def test_dtype_and_device_moves_while_wrapped(model):
    given = rm.inputs(model, [rm.words(100)])
    with mmkv.wrapped(model, cache=[METHODS["vidkv"]]):
        rm.generate(model, given)
        model.to(torch.bfloat16)
        out = rm.generate(model, given, return_dict_in_generate=True)
        assert out.past_key_values.layers[0].keys.dtype == torch.bfloat16
        assert mmkv.report(model).kv_bytes_dense == 107 * 3 * 2 * 2 * 16 * 2


def test_rewrapping_with_another_method(model):
    given = rm.inputs(model, [rm.words(150)])
    sizes = []
    for name in ("kivi-4", "kivi-2", "vidkv"):
        with mmkv.wrapped(model, cache=[METHODS[name]]):
            rm.generate(model, given)
            sizes.append(mmkv.report(model).packed_bits)
    assert sizes[0] > sizes[1] > sizes[2]


def test_importing_touches_nothing():
    """`import mmkv` registers nothing with transformers."""
    import subprocess
    import sys

    code = (
        "import sys, mmkv; assert 'torch' not in sys.modules; import mmkv.cache, mmkv.models; "
        "from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS as A; assert 'mmkv' not in A.valid_keys()"
    )
    subprocess.run([sys.executable, "-W", "ignore", "-c", code], check=True)
