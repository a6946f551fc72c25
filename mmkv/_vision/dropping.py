"""`Dropping`: token methods at work on a decoder: asks them, and lets fewer tokens into the next layer."""

from __future__ import annotations

from dataclasses import replace
from functools import partial

import torch

from mmkv._vision.media import Media
from mmkv._vision.trace import Run, Trace
from mmkv.cache import KVLayer
from mmkv.cache.fill import Fill
from mmkv.cache.mask import LazyMask
from mmkv.cache.stage import Stage
from mmkv.kernels import Mass
from mmkv.layout import TokenLayout
from mmkv.models import Adapter
from mmkv.tokens.method import DecoderView, TokenMethod, overrides


class Dropping:
    """Token methods on one model's decoder, by hooks on its layers.

    Args:
        adapter: of the model.
        methods: in the order in which they are asked.
    """

    def __init__(self, adapter: Adapter, methods: tuple[TokenMethod, ...]):
        self.adapter, self.methods = adapter, methods
        self.layers = len(adapter.text_model.layers)
        self.media = Media(adapter, tuple(m for m in methods if overrides(m, "before_decoder")))
        self.after: dict[int, list[TokenMethod]] = {}
        for method in methods:
            for layer in method.decoder_layers(self.layers):
                self.after.setdefault(layer, []).append(method)
        self.renumbers = any(method.position_ids == "renumbered" for method in methods)
        self.trims = any(method.trims_cache for method in methods)
        self.edges = {0} | {layer + 1 for layer in self.after}
        self.trace: Trace | None = None
        self._run: Run | None = None

    def attach(self) -> list:
        """Hook the decoder's layers; returns the handles."""
        hooks = []
        for index, layer in enumerate(self.adapter.text_model.layers):
            # partials of bound methods, so that a deep copy of the model has hooks of its own
            hooks.append(layer.register_forward_pre_hook(partial(self._before_layer, index), with_kwargs=True))
            hooks.append(layer.register_forward_hook(partial(self._after_layer, index)))
        return hooks

    def choose(self, chunk: TokenLayout, embeds: torch.Tensor | None, inputs: dict) -> torch.Tensor | None:
        """Ask the methods that act before the decoder about a whole prompt; returns its embeddings, merged ones in place.

        Args:
            chunk: layout of its tokens.
            embeds: of them.
            inputs: keywords of the whole model's forward.
        """
        if not bool(chunk.visual.any()):
            return embeds
        self.trace = Trace(chunk, layers=self.layers)
        embeds, into = self.media.choose(chunk, embeds, inputs)
        if self.media.keep is not None:
            self.trace.into[0] = into
        return embeds

    def begin(self, cache, chunk: TokenLayout, first: int, embeds: torch.Tensor | None, kwargs: dict) -> dict:
        """A forward of the decoder begins; returns its keywords.

        Args:
            cache: whose state has been told of the new tokens.
            chunk: their layout.
            first: index of the first of them in the prompt.
            embeds: of the new tokens.
            kwargs: of the forward.
        """
        root = cache.layers[0].state.root
        visual = bool(chunk.visual.any())
        if not visual and root.seen == len(chunk):
            self.trace = None  # a new sequence, of text alone
        root.watched, root.looked = frozenset(self.after) if visual else frozenset(), {}
        if visual and self.trims and self.after:
            root.deferred = frozenset(range(max(self.after) + 1))
        keep = self.media.keep
        run = Run(cache, chunk, first, embeds, None if keep is None else keep[:, first : first + len(chunk)])
        if visual and kwargs.get("deepstack_visual_embeds") is not None:
            kwargs = {**kwargs}
            mask, deep = kwargs["visual_pos_masks"], kwargs["deepstack_visual_embeds"]
            mask = (mask if mask.dim() == 2 else mask[..., 0]).cpu()
            order = (mask.flatten().cumsum(0) - 1).view_as(mask).masked_fill(~mask, -1)
            run.deep = list(deep), order
            kwargs["deepstack_visual_embeds"] = kwargs["visual_pos_masks"] = None
        self._run = run
        return kwargs

    def end(self, hidden: torch.Tensor) -> tuple[int, torch.Tensor]:
        """The forward has ended: T, and its last hidden states `[B, T, C]`, zeros for tokens that were dropped on the way."""
        run, self._run = self._run, None
        if run is None:
            return hidden.shape[1], hidden
        root = run.cache.layers[0].state.root
        if root.deferred:
            if run.columns is not None:
                self._trim(run)
            if root.method is None or not root.method.joint:
                for layer in run.cache.layers:
                    if layer.waits:
                        layer.finish(layer.asked)
        root.watched, root.deferred, root.looked = frozenset(), frozenset(), {}
        if run.columns is None:
            return hidden.shape[1], hidden
        rows, places = (run.columns >= 0).nonzero(as_tuple=True)
        whole = hidden.new_zeros(run.chunk.batch, len(run.chunk), hidden.shape[-1])
        whole[rows, run.columns[rows, places]] = hidden[rows, places]
        return len(run.chunk), whole

    def forget(self) -> None:
        """The whole model's forward has ended, or failed."""
        self._run = None
        self.media.forget()

    def _before_layer(self, index: int, module, args: tuple, kwargs: dict):
        run = self._run
        if run is None:
            return None
        hidden = args[0] if args else kwargs["hidden_states"]
        columns = None
        if index == 0 and run.keep is not None:
            columns = chosen([(keep & valid).nonzero()[:, 0] for keep, valid in zip(run.keep, run.chunk.valid)])
        elif index - 1 in self.after:
            columns, hidden = self._ask(index, run, hidden)
        if index in self.edges:
            self._move(index, run, columns)
        if columns is not None:
            at = columns.clamp(min=0).to(hidden.device)[..., None]
            hidden = hidden.gather(1, at.expand(-1, -1, hidden.shape[-1]))
            run.narrow(columns)
            if self.trace is not None:
                self.trace.entered(index, run)
        stage = run.cache.layers[index].state
        if stage is stage.root:
            return None
        kwargs = self._narrowed(run, stage, hidden, kwargs)
        if args:
            return (hidden, *args[1:]), kwargs
        return args, {**kwargs, "hidden_states": hidden}

    def _after_layer(self, index: int, module, args: tuple, output):
        run = self._run
        if run is None or run.deep is None or index >= len(run.deep[0]):
            return None
        features, order = run.deep
        here = order.gather(1, run.here().clamp(min=0)).masked_fill(run.here() < 0, -1)
        rows, places = (here >= 0).nonzero(as_tuple=True)
        hidden = output[0] if isinstance(output, tuple) else output
        hidden = hidden.clone()
        mine = features[index][here[rows, places].to(features[index].device)]
        hidden[rows, places] = hidden[rows, places] + mine.to(hidden.device, hidden.dtype)
        return (hidden, *output[1:]) if isinstance(output, tuple) else hidden

    def _ask(self, index: int, run: Run, hidden: torch.Tensor) -> tuple[torch.Tensor | None, torch.Tensor]:
        """Ask the methods behind layer `index - 1`: which columns of the present tokens go on, None for all; hidden states."""
        layer: KVLayer = run.cache.layers[index - 1]
        fills = layer.state.root.looked.pop(index - 1, None)
        if fills is None:
            return None, hidden
        rows, dropped = [], False
        for row, fill in enumerate(fills):
            there = layer.state.layout.valid[row, -run.new :].nonzero()[:, 0]
            if fill is not None and bool(run.chunk.visual[row].any()):
                stay, hidden = self._ask_row(index, run, row, fill, hidden, there)
                dropped |= len(stay) < len(there)
                there = stay
            rows.append(there)
        return chosen(rows) if dropped else None, hidden

    def _ask_row(self, index: int, run: Run, row: int, fill: Fill, hidden, there: torch.Tensor):
        """The same for one prompt, whose real tokens stand at `there` int64 `[m]`; also returns the hidden states."""
        origin = run.here()[row, there]
        for method in self.after[index - 1]:
            at = there.to(hidden.device)
            view = self._view(index, run, row, fill, hidden[row, at], origin)
            with torch.no_grad():
                choice = method.in_decoder(view)
            if choice is None:
                continue
            keep = choice.keep.cpu() | ~view.visual
            if choice.features is not None:
                hidden = hidden.clone()
                hidden[row, at] = choice.features.to(hidden.dtype)
            self.media.add_notes(row, origin + run.first, choice.notes)
            if self.trace is not None:
                self.trace.went(index, run, row, origin, choice, keep)
            left = keep.nonzero()[:, 0]
            fill = _within(fill, left)
            there, origin = there[keep], origin[keep]
        return there, hidden

    def _view(self, index: int, run: Run, row: int, fill: Fill, hidden: torch.Tensor, origin) -> DecoderView:
        """What a method is told about the tokens `origin` of a prompt."""
        return DecoderView(
            layer=index - 1,
            layers=self.layers,
            hidden=hidden,
            embeds=run.embeds[row, origin.to(run.embeds.device)],
            layout=fill.layout.take(slice(fill.fresh, None)),
            mass=lambda rows: _fresh(fill.mass(rows.cpu() + fill.fresh), fill.fresh),
            head_mean=lambda rows: fill.head_mean(rows.cpu() + fill.fresh)[:, fill.fresh :],
            notes=self.media.notes_of(row, origin + run.first),
        )

    def _move(self, index: int, run: Run, columns: torch.Tensor | None) -> None:
        """Tell the state of layer `index` and those behind it what has come to them."""
        layers = run.cache.layers
        parent = layers[index - 1].state if index else layers[0].state.root
        mine = layers[index].state
        if mine is parent:
            if columns is None:
                return
            mine = Stage(parent, index, len(parent.layout) - run.new)
            for layer in layers[index:]:
                if layer.state is parent:
                    layer.state = mine
        if columns is None:
            columns = torch.arange(run.new).expand(run.chunk.batch, -1)
        mine.follow(parent, run.new, columns)

    def _narrowed(self, run: Run, stage: Stage, hidden: torch.Tensor, kwargs: dict) -> dict:
        """The keywords of a layer whose tokens are a part of all."""
        kwargs = dict(kwargs)
        key = id(kwargs.get("attention_mask"))  # layers of several kinds have masks of several kinds
        if key not in stage.scratch:
            mask = kwargs.get("attention_mask")
            if not isinstance(mask, LazyMask):
                raise ValueError("tokens=... takes the 2-D padding mask; another attention_mask was given")
            stage.scratch[key] = mask.within(stage.layout.valid, hidden.shape[1]), mask
        kwargs["attention_mask"] = stage.scratch[key][0]
        at = run.here().clamp(min=0).to(hidden.device)
        if self.renumbers:
            ids = (stage.layout.valid.cumsum(1) - 1).clamp(min=0)[:, -run.new :].to(hidden.device)
            kwargs["position_embeddings"] = self.adapter.text_model.rotary_emb(hidden, ids)
            kwargs["position_ids"] = ids
            return kwargs
        if run.columns is None:
            return kwargs
        given = kwargs.get("position_embeddings")
        if given is not None and given[0].shape[-2] != len(run.chunk):
            raise ValueError(
                f"position ids are {given[0].shape[-2]}, new tokens {len(run.chunk)}; pass position_ids for these"
            )
        if given is not None:
            kwargs["position_embeddings"] = tuple(_take(x, at, -2) for x in kwargs["position_embeddings"])
        if kwargs.get("position_ids") is not None:
            kwargs["position_ids"] = _take(kwargs["position_ids"][..., None], at, -2)[..., 0]
        return kwargs

    def _trim(self, run: Run) -> None:
        """Layers before the last drop let go of what did not survive it, as far as no cache method has stored it yet."""
        layers = run.cache.layers
        final = layers[-1].state
        index = 0
        while layers[index].state is not final:
            state = layers[index].state
            group = [layer for layer in layers[index:] if layer.state is state]
            index += len(group)
            if any(layer.segments or layer.start or layer.scores is not None for layer in group):
                continue
            places = state.places()
            columns = torch.stack([
                torch.searchsorted(mine.contiguous(), wanted.clamp(min=0).contiguous())
                for mine, wanted in zip(_ascending(places), final.places())
            ])  # fmt: skip
            columns = columns.masked_fill(final.places() < 0, -1)
            stage = Stage(state, group[0].index, 0)
            stage.follow(state, len(state.layout), columns)
            for layer in group:
                layer.narrow(stage, columns)


def chosen(rows: list[torch.Tensor]) -> torch.Tensor:
    """int64 `[B, n]` from one list of columns a batch element, -1 on the left of shorter ones."""
    longest = max(map(len, rows))
    return torch.stack([torch.nn.functional.pad(row, (longest - len(row), 0), value=-1) for row in rows])


def _ascending(places: torch.Tensor) -> torch.Tensor:
    """Places with the -1 of padding in between made part of an ascending row."""
    return places.cummax(1).values


def _fresh(mass: Mass, fresh: int) -> Mass:
    return Mass(mass.sum[:, fresh:], mass.max[:, fresh:], mass.count[..., fresh:])


def _within(fill: Fill, left: torch.Tensor) -> Fill:
    """The fill seen by the next method behind the same layer, to which only the tokens `left` of the fresh ones exist."""
    at = torch.cat([torch.arange(fill.fresh), left + fill.fresh])
    device = fill.keys.device
    return replace(
        fill,
        columns=fill.columns[at],
        old=len(at),
        keys=fill.keys[:, at.to(device)],
        values=fill.values[:, at.to(device)],
        query=fill.query[:, left.to(device)],
        layout=fill.layout.take(at),
        protected=fill.protected[at],
        norms=None,
        scores=None,
    )


def _take(values: torch.Tensor, at: torch.Tensor, dim: int) -> torch.Tensor:
    """Tokens `at` int64 `[B, n]` of `[..., B or 1, T, D]`."""
    batch = at.shape[0]
    values = values.expand(*values.shape[: dim - 1], batch, *values.shape[dim:])
    index = at.view(*[1] * (values.dim() - 3), batch, -1, 1)
    return values.gather(dim, index.expand(*values.shape[:-3], batch, at.shape[1], values.shape[-1]))
