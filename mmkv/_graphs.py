"""`Stepper`: decode steps recorded once and replayed, for `wrap(graphs=True)`.

While single tokens are decoded, the cache lends its layers buffers that do not move (`mmkv.cache.static`), so a step is the
same sequence of kernels each time. Two of them are recorded: a step, and a step that packs what left the residual
window. Each kind runs once as it is first, which compiles its kernels. Whatever else happens to the cache (a question, a
crop, beams that are reordered) ends the stretch, runs as ever, and a new one begins.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field

import torch

from mmkv import compat
from mmkv._recorders import Recorder, Recording
from mmkv.cache import CacheMethod, state_of
from mmkv.cache.static import LEAST, Stretch, possible, refusal
from mmkv.layout import TokenLayout
from mmkv.models import Adapter
from mmkv.tokens.method import TokenMethod

INPUTS = ("input_ids", "inputs_embeds", "position_ids")  # of the decoder, that differ from step to step
EXTRAS = ("output_hidden_states", "output_router_logits")  # what a recorded step does not give
IGNORED = ("attention_mask", "cache_position", "past_key_values")  # single tokens see all that is held


@dataclass(eq=False)
class Steps:
    """Of a stretch, what its steps have in common.

    Args:
        manner: how the decoder is called, what tensors hold apart; recordings know no other way.
        inputs: where they read what differs.
        recorded: steps by whether they pack; None for a kind that has only run.
    """

    manner: tuple
    inputs: dict[str, torch.Tensor] = field(default_factory=dict)
    recorded: dict[bool, Recording | None] = field(default_factory=dict)


class Recordings(weakref.WeakKeyDictionary):
    """`Steps` of each stretch. A copy of the model records its own."""

    def __deepcopy__(self, memo) -> Recordings:
        return Recordings()


class Stepper:
    """Stands in for the decoder's forward.

    Args:
        adapter: of the model.
        recorder: of steps.
    """

    def __init__(self, adapter: Adapter, recorder: Recorder):
        self.adapter, self.recorder = adapter, recorder
        self.forward: Callable = adapter.text_model.forward  # the decoder's own
        self._own = "forward" in adapter.text_model.__dict__  # whether it was set on the module, and not by its class
        self.recordings = Recordings()
        self.replayed = 0  # steps of the sequence in progress that a recording ran
        self._step: tuple[Stretch, dict[str, torch.Tensor]] | None = None  # the one that begins, and its token
        self._output: type | None = None  # what the decoder returns

    def attach(self) -> None:
        """Replace the decoder's forward."""
        self.adapter.text_model.forward = self._forward

    def detach(self) -> None:
        """Put it back. Caches are what they would be without graphs, whoever uses them next."""
        module = self.adapter.text_model
        if self._own:
            module.forward = self.forward
        else:
            module.__dict__.pop("forward", None)
        for stretch in list(self.recordings):
            if stretch.state.stretch is stretch and not stretch.failed:
                stretch.close()

    def takes(self, cache, new: torch.Tensor, kwargs: dict, ids: torch.Tensor | None) -> Stretch | None:
        """The stretch that the forward which begins is a step of; ends one where it is none, begins one where it can be.

        Args:
            cache: of the forward; its state has not been told of the new tokens.
            new: their ids `[B, T]` or embeddings `[B, T, C]`.
            kwargs: of the decoder.
            ids: the new tokens' ids `[B, T]`, None where the model was given embeddings.
        """
        self._step = None
        state = state_of(cache)
        if state is None:
            return None
        if state.layout is None:
            self.replayed = 0
        plain = _is_step(state, new, kwargs) and not self._wants_more(kwargs)
        stretch, manner = state.stretch, _manner(kwargs, ids)
        if stretch is not None and not (plain and self._goes_on(stretch, manner)):
            state.end_stretch()
            stretch = None
        if stretch is None:
            room = possible(cache.layers) if plain and state.steps else 0
            if room < LEAST:
                return None
            with _written_in_any_mode():
                stretch = Stretch(cache, room, Layouts(self.adapter))
            self.recordings[stretch] = Steps(manner)
        positions = kwargs.get("position_ids")
        if positions is None:
            positions = torch.full((1, 1), stretch.seen + stretch.steps, device=new.device)
        positions = positions.reshape(-1, *positions.shape[-2:]) if positions.dim() > 1 else positions.view(1, 1, -1)
        token = {"position_ids": positions.expand(-1, len(new), -1).clone()}
        self._step = stretch, token if ids is None else {**token, "input_ids": ids.clone()}
        return stretch

    def _wants_more(self, kwargs: dict) -> bool:
        """Whether the decoder is asked for more than its last hidden states."""
        config = self.adapter.text_config
        asked = (kwargs[name] if kwargs.get(name) is not None else getattr(config, name, False) for name in EXTRAS)
        return any(asked)

    def _goes_on(self, stretch: Stretch, manner: tuple) -> bool:
        known = self.recordings.get(stretch)
        return known is not None and known.manner == manner and stretch.steps < stretch.room and not stretch.failed

    def _forward(self, *args, **kwargs):
        if self._step is None:
            return self.forward(*args, **kwargs)
        (stretch, token), self._step = self._step, None
        cache = kwargs["past_key_values"]
        if args:
            kwargs["input_ids"] = args[0]
        if kwargs.get("position_ids") is None:
            kwargs["position_ids"] = token["position_ids"][0]
        inputs = self.recordings[stretch].inputs
        for name in INPUTS:
            given = kwargs.get(name)
            if given is not None and name not in inputs:
                with _written_in_any_mode():
                    inputs[name] = torch.empty_like(given)
            if given is not None:
                inputs[name].copy_(given)
        others = _others(kwargs)
        try:
            hidden = self._run(stretch, stretch.begin(token), weakref.ref(cache), others)
        except BaseException:
            stretch.failed = True
            raise
        return self._output(last_hidden_state=hidden, past_key_values=cache)

    def _run(self, stretch: Stretch, packs: bool, cache: weakref.ref, others: dict) -> torch.Tensor:
        """Last hidden states `[B, 1, C]` of a step."""

        steps = self.recordings[stretch]

        def step() -> torch.Tensor:
            output = self.forward(**steps.inputs, **others, past_key_values=cache())
            self._output = type(output)
            return output.last_hidden_state

        known = steps.recorded
        if packs not in known:
            known[packs] = None
            return step()
        self.replayed += 1
        recording, new = known[packs], known[packs] is None
        if new:
            known[packs] = recording = self._record(step)
        if not (new and recording.ran):
            recording.replay()
        return recording.out.clone()

    def _record(self, step: Callable[[], torch.Tensor]) -> Recording:
        try:
            return self.recorder.record(step)
        except RuntimeError as error:
            name, why = type(self.adapter.model).__name__, str(error).strip().partition("\n")[0]
            raise RuntimeError(
                f"graphs=True: a decode step of {name} cannot be recorded ({why}); leave graphs out"
            ) from error


class Layouts:
    """Gives the layouts of decoded tokens; a copy of a cache that holds it has the same adapter.

    Args:
        adapter: of the model.
    """

    def __init__(self, adapter: Adapter):
        self._adapter = weakref.ref(adapter)

    def __call__(self, token: dict[str, torch.Tensor], count: int, past: TokenLayout) -> TokenLayout:
        """Layout of `count` tokens behind `past`.

        Args:
            token: their `position_ids` int `[A, B, count]` and, where known, `input_ids` int `[B, count]`.
        """
        positions, adapter = token["position_ids"].to("cpu", torch.int32), self._adapter()
        chunk = TokenLayout.text(past.batch, count, past.positions.shape[0])
        if adapter is not None and "input_ids" in token:
            chunk = adapter.layout({"input_ids": token["input_ids"]}, past.batch, count, past)
        axes = chunk.positions.shape[0]
        chunk.positions = positions[-axes:].expand(axes, past.batch, -1).clone()
        return chunk


def check_graphs(
    adapter: Adapter, method: CacheMethod | None, tokens: tuple[TokenMethod, ...], max_bytes: int | None
) -> None:
    """Raise ValueError where decode steps cannot be recorded; arguments as `Session`."""
    name = type(adapter.model).__name__
    if max_bytes is not None:
        raise ValueError("graphs=True with max_bytes, which is looked after at every step; leave one of the two out")
    renumbering = next((type(method).__name__ for method in tokens if method.position_ids == "renumbered"), None)
    if renumbering is not None:
        raise ValueError(f"graphs=True with {renumbering}(position_ids='renumbered'): possible is 'original'")
    if adapter.next_scale:
        raise ValueError(
            f"graphs=True on {name}, which paints scale by scale and decodes no single tokens; leave graphs out"
        )
    if any(window is not None for window in compat.layer_windows(adapter.text_config)):
        raise ValueError(f"graphs=True on {name}, whose sliding windows move at every step; leave graphs out")
    why = refusal(method)
    if why is not None:
        raise ValueError(f"graphs=True with {method}, which {why}; leave graphs out or choose another method")


@contextmanager
def _written_in_any_mode() -> Iterator[None]:
    """Tensors that are made here may be written to outside `torch.inference_mode`, too."""
    with torch.inference_mode(False), torch.no_grad():  # the first turns gradients on
        yield


def _others(kwargs: dict) -> dict:
    """What the decoder is given beside its inputs and the cache, and heeds."""
    return {name: value for name, value in kwargs.items() if name not in (*INPUTS, *IGNORED)}


def _manner(kwargs: dict, ids: torch.Tensor | None) -> tuple:
    """How the decoder is called, what tensors hold apart."""
    embeds, positions = kwargs.get("inputs_embeds"), kwargs.get("position_ids")
    return ids is None, embeds is None, None if positions is None else positions.shape, _others(kwargs)


def _is_step(state, new: torch.Tensor, kwargs: dict) -> bool:
    """Whether a forward decodes one token of each sequence, and nothing else."""
    mask = kwargs.get("attention_mask")
    tensors = [n for n, v in kwargs.items() if isinstance(v, torch.Tensor) and n not in (*INPUTS, *IGNORED)]
    plain = new.shape[1] == 1 and state.layout is not None and len(new) == state.layout.batch and not tensors
    if not plain or torch.is_grad_enabled() or kwargs.get("use_cache") is False:
        return False
    if torch.is_autocast_enabled(new.device.type):  # it keeps copies of weights that are gone when its block ends
        return False
    if state.chunk_of is not None:
        return False
    if mask is None:  # stock attention would see padding
        return bool(state.layout.valid.all())
    return isinstance(mask, torch.Tensor) and mask.dim() == 2 and bool(mask[:, -1].all())
