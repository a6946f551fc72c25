"""`Session`: what `wrap` leaves on a model: hooks that feed the cache its layout, and what they measured."""

from __future__ import annotations

import inspect

import torch

from mmkv._chunks import Pieces
from mmkv._graphs import Stepper
from mmkv._recorders import Recorder
from mmkv._report import Meter, Report
from mmkv._vision.dropping import Dropping
from mmkv._vision.looking import Looking
from mmkv.cache import NAME, Cache, CacheMethod, adopt, register, settle_jointly, state_of
from mmkv.cache.static import Stretch
from mmkv.layout import TokenLayout
from mmkv.models import Adapter
from mmkv.tokens.method import TokenMethod


class Session:
    """One wrapped model. Holds no cache and no tensor of any forward once that forward is over.

    Args:
        adapter: of the model.
        method: how tokens are stored, None to keep everything.
        positions: "stock" or "trained".
        max_bytes: what the cache may hold after a forward, None for no limit.
        prefill_chunk: tokens of a prompt that run through the decoder at a time, None for all.
        tokens: methods that drop or merge vision tokens.
        recorder: of decode steps, None to run each of them as it is.
    """

    def __init__(
        self,
        adapter: Adapter,
        method: CacheMethod | None,
        positions: str,
        max_bytes: int | None,
        prefill_chunk: int | None,
        tokens: tuple[TokenMethod, ...] = (),
        recorder: Recorder | None = None,
    ):
        self.adapter, self.method, self.positions = adapter, method, positions
        self.max_bytes, self.prefill_chunk = max_bytes, prefill_chunk
        self.text_config = adapter.text_config
        self.stock = self.text_config._attn_implementation
        self.meter = Meter()
        self.dropping = Dropping(adapter, tokens) if tokens else None
        self.looking = Looking(adapter, tokens, self.dropping.media.noted_in_tower) if tokens else None
        self.stepper = Stepper(adapter, recorder) if recorder is not None else None
        self._stretch: Stretch | None = None  # that the decoder's forward in progress is a step of
        self._uncached = False  # a cache was made for a forward that asked for none
        self._depth = 0  # of forwards within a forward
        self._inputs: dict = {}  # keywords of the forward in progress
        self._pieces: Pieces | None = None  # of a prompt that is being read in chunks
        self._hooks: list = []

    def attach(self) -> None:
        """Plug in. Undone by `detach`."""
        register()
        model, text_model = self.adapter.model, self.adapter.text_model
        for module in self.adapter.attention_modules():
            module._mmkv_stock = self.stock
        self.text_config._attn_implementation = NAME
        # one by one, so that `detach` finds those that were made before one failed
        for module in self._entrances():
            self._hooks.append(module.register_forward_pre_hook(self._before_model, with_kwargs=True))
            self._hooks.append(module.register_forward_hook(self._after_model, always_call=True))
        self._hooks.append(text_model.register_forward_pre_hook(self._before_text, with_kwargs=True))
        self._hooks.append(text_model.register_forward_hook(self._after_text, with_kwargs=True))
        if self.stepper is not None:
            self.stepper.attach()
        if self.dropping is not None:
            self._hooks += self.dropping.attach()
            self.looking.attach()
        if self.method is not None and self.method.reads_hidden:
            post = self.method.reads_hidden == "post"
            for module in self.adapter.attention_modules() if post else text_model.layers:
                self._hooks.append(module.register_forward_pre_hook(self._before_layer, with_kwargs=True))
        model._mmkv = self

    def _entrances(self) -> list[torch.nn.Module]:
        """The modules that are given images and prompts: the model, and a vision-language model without its head."""
        model, body = self.adapter.model, getattr(self.adapter.model, "model", None)
        return [model] if body is None or body is self.adapter.text_model else [model, body]

    def detach(self) -> None:
        """Leave the model as it was."""
        for hook in self._hooks:
            hook.remove()
        self._hooks = []
        if self.looking is not None:
            self.looking.detach()
        if self.stepper is not None:
            self.stepper.detach()
        if self.text_config._attn_implementation == NAME:  # else the user has set another one since
            self.text_config._attn_implementation = self.stock
        for module in self.adapter.attention_modules():
            module.__dict__.pop("_mmkv_stock", None)
        self.adapter.model.__dict__.pop("_mmkv", None)

    def report(self) -> Report:
        """The numbers of the last forward."""
        trace = self.dropping.trace if self.dropping is not None else None
        replayed = None if self.stepper is None else self.stepper.replayed
        return self.meter.report(() if trace is None else tuple(trace.computed()), replayed)

    def _before_layer(self, module, args, kwargs):
        """Keep the norms of the hidden states that enter a decoder layer, or its attention."""
        cache = kwargs.get("past_key_values")
        if state_of(cache) is None:
            return
        hidden = args[0] if args else kwargs["hidden_states"]
        index = getattr(module, "self_attn", module).layer_idx
        state = cache.layers[index].state
        if any(state.prompted):
            state.norms[index] = torch.linalg.vector_norm(hidden.detach(), dim=-1, dtype=torch.float32)

    def _before_model(self, module, args, kwargs):
        self._depth += 1
        if self._depth > 1:  # the model's own call of its body
            return None
        if self.text_config._attn_implementation != NAME:
            raise RuntimeError(
                f"the attention implementation was set to {self.text_config._attn_implementation!r} after mmkv.wrap; set it "
                "before, or call mmkv.unwrap(model) first"
            )
        self.meter.start(module)
        if args:
            kwargs = {**dict(zip(inspect.signature(module.forward).parameters, args)), **kwargs}
        if kwargs.get("output_attentions") or self.text_config.output_attentions:
            raise ValueError("output_attentions does not work with a wrapped model: attention weights are never formed")
        self._refuse_unmasked(kwargs)
        if self.dropping is not None:
            self._refuse_dropping(kwargs)
            self.dropping.media.begin()
        cache = kwargs.get("past_key_values")
        if cache is not None:
            adopt(cache, self.text_config, self.method, self.max_bytes)
        if self.positions == "trained":
            kwargs = self._with_trained_positions(kwargs, state_of(cache))
        self._inputs = kwargs
        return (), kwargs

    def _refuse_unmasked(self, kwargs: dict) -> None:
        """A padded batch without a mask would let padding into the statistics of every group."""
        ids, pad = kwargs.get("input_ids"), self.text_config.pad_token_id
        if self.method is None or pad is None or ids is None or kwargs.get("attention_mask") is not None:
            return
        if (
            ids.dim() == 2
            and ids.shape[0] > 1
            and ids.shape[1] > 1
            and bool((ids[:, 0] == pad).any() or (ids[:, -1] == pad).any())
        ):
            raise ValueError(
                f"this batch holds padding (id {pad}) but no attention_mask was given; pass attention_mask"
            )

    def _refuse_dropping(self, kwargs: dict) -> None:
        """What asks for something of every token cannot have it where some are dropped."""
        if kwargs.get("labels") is not None:
            raise ValueError(
                "labels with tokens=...: a dropped token has no loss; leave labels out or call mmkv.unwrap(model)"
            )
        if kwargs.get("output_hidden_states"):
            raise ValueError("output_hidden_states does not work with tokens=...: layers hold different tokens")
        if self.adapter.model.training and torch.is_grad_enabled():
            raise ValueError("tokens=... is for inference; call model.eval(), or mmkv.unwrap(model) to train")

    def _after_model(self, module, args, output):
        self._depth = max(self._depth - 1, 0)
        if self._depth:
            return
        if self._pieces is not None:
            self._pieces.state.chunk_of, self._pieces.state.more = None, False
        self._inputs, self._pieces, self._uncached = {}, None, False
        if self.dropping is not None:
            self.dropping.forget()
        self.meter.stop()

    def _before_text(self, module, args, kwargs):
        if self._pieces is not None:  # a chunk of a prompt, run by `Pieces`
            return args, self._dropped(kwargs, self._pieces.at)
        embeds, ids = kwargs.get("inputs_embeds"), kwargs.get("input_ids", args[0] if args else None)
        new = embeds if embeds is not None else ids
        use_cache = kwargs.get("use_cache")
        if use_cache is None:
            use_cache = self.text_config.use_cache
        cache = kwargs.get("past_key_values")
        if cache is None:
            uncached = not use_cache or (module.training and torch.is_grad_enabled())
            if uncached and self.dropping is None:
                return None  # nothing is cached: plain attention, as before
            self._uncached = uncached
            cache = kwargs["past_key_values"] = Cache(self.adapter.model)
        state = adopt(cache, self.text_config, self.method, self.max_bytes)
        if self.stepper is None:
            state.end_stretch()  # of a cache that another session, with graphs, filled
        else:
            self._stretch = self.stepper.takes(cache, new, kwargs, self._inputs.get("input_ids", ids))
            if self._stretch is not None:
                return args, kwargs
        if embeds is None and self.method is not None and self.method.reads_embeddings:
            embeds = module.get_input_embeddings()(ids)
        chunk = self._chunk(state, new, kwargs)
        if self.dropping is not None and embeds is not None:
            embeds = self.dropping.choose(chunk, embeds, self._inputs)
            kwargs["inputs_embeds"] = embeds
        if self.prefill_chunk is not None and len(chunk) > self.prefill_chunk:
            if ids is not None and args:
                args, kwargs = args[1:], {**kwargs, "input_ids": ids}
            self._pieces = Pieces(module, kwargs, chunk, self.prefill_chunk, self._inputs, state)
            kwargs = self._pieces.run(embeds)
            return args, self._dropped(kwargs, self._pieces.at)
        state.scales = self.adapter.scales(self._inputs)
        state.last = self.adapter.is_last(self._inputs) and not (self.method is not None and self.method.keeps_last)
        state.extend(chunk, embeds)
        return args, self._dropped(kwargs, 0)

    def _dropped(self, kwargs: dict, first: int) -> dict:
        """The keywords of the decoder's forward, of which token methods have taken what is theirs.

        Args:
            first: index of its first token in the prompt.
        """
        if self.dropping is None:
            return kwargs
        cache, embeds = kwargs["past_key_values"], kwargs.get("inputs_embeds")
        state = state_of(cache)
        new = state.seen - cache.get_seq_length()
        chunk = state.layout.take(slice(state.seen - new, None))
        return self.dropping.begin(cache, chunk, first, embeds, kwargs)

    def _chunk(self, state, new: torch.Tensor, kwargs: dict) -> TokenLayout:
        """Layout of the new tokens `[B, T, ...]` of this forward."""
        batch, length = new.shape[:2]
        chunk = self.adapter.layout(self._inputs, batch, length, state.layout)
        chunk.valid = _valid(kwargs.get("attention_mask"), batch, length, state.seen)
        ids = kwargs.get("position_ids")
        if ids is None:
            ids = torch.arange(state.seen, state.seen + length)
        ids = ids.reshape(-1, *ids.shape[-2:]) if ids.dim() > 1 else ids.view(1, 1, -1)
        ids = ids[-chunk.positions.shape[0] :].to(device="cpu", dtype=torch.int32)
        chunk.positions = ids.expand(chunk.positions.shape[0], batch, -1).clone()
        return chunk

    def _with_trained_positions(self, kwargs: dict, state) -> dict:
        ids, embeds = kwargs.get("input_ids"), kwargs.get("inputs_embeds")
        new = ids if ids is not None else embeds
        batch, length = new.shape[:2]
        past = None if state is None else state.layout
        chunk = self.adapter.layout(kwargs, batch, length, past)
        chunk.valid = _valid(kwargs.get("attention_mask"), batch, length, 0 if past is None else len(past))
        start = torch.zeros(batch, dtype=torch.int64)
        if past is not None and len(past):
            start = (past.positions.amax(0) * past.valid + past.valid - 1).amax(1).long() + 1
            if state.stretch is not None:  # whose tokens are not in the layout yet
                start += state.stretch.steps
        positions = self.adapter.trained_positions(chunk, start, kwargs)
        return kwargs if positions is None else {**kwargs, "position_ids": positions.to(new.device)}

    def _after_text(self, module, args, kwargs, output):
        cache = kwargs.get("past_key_values")
        state = state_of(cache)
        stretch, self._stretch = self._stretch, None
        if stretch is not None:
            self.meter.step(cache.layers, state, recount=stretch.steps == 1 or stretch.packed)
            return output
        if state is not None:
            new = output.last_hidden_state.shape[1]
            if self.dropping is not None:
                new, output.last_hidden_state = self.dropping.end(output.last_hidden_state)
            settle_jointly(cache.layers)
            for layer in cache.layers:
                layer.state.scratch, layer.state.norms = {}, {}
            if state.last:  # its layers have let go of them
                state.crop(state.seen - new)
            self.meter.read(cache.layers, state, new, gone=new if state.last else 0)
            if self._uncached:
                self._uncached, output.past_key_values = False, None
        return output if self._pieces is None else self._pieces.joined(output)


def _valid(mask, batch: int, length: int, seen: int) -> torch.Tensor:
    """bool `[B, T]` of the new tokens, from the 2-D padding mask of a forward (of all tokens, or of the new ones)."""
    if not isinstance(mask, torch.Tensor) or mask.dim() != 2:
        return torch.ones(batch, length, dtype=torch.bool)
    if mask.shape[1] < length:
        raise ValueError(f"attention_mask covers {mask.shape[1]} tokens, {length} new ones came after {seen}")
    return mask[:, -length:].to(device="cpu", dtype=torch.bool)
