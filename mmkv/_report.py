"""`Report`: what a wrapped model's cache really holds, and how long its forwards took."""

from __future__ import annotations

import time
import weakref
from dataclasses import dataclass, field

import torch

from mmkv.parts.storage import storage_bytes

PROMPT = 32  # a forward with more new tokens than this reads a prompt; drafts of assisted decoding are shorter


@dataclass(frozen=True)
class Report:
    """Numbers of the last forward's cache, counted from the storages that are held.

    Args:
        kv_bytes: resident bytes of all layers: dense tails, codes, scales, zero points, tables; spare capacity included.
        kv_bytes_peak: the most that was held at a time so far, a layer's whole prompt before it is compressed included.
        kv_bytes_dense: bytes of all tokens seen, uncompressed, in the model's dtype.
        kv_bits: 8 * kv_bytes over the key and value elements of the tokens held.
        packed_bits: the same for packed segments alone; None where nothing is packed.
        tail_bytes: bytes of all that is not packed: the newest tokens, sinks, survivors of an eviction and tokens that wait to be
            packed, all dense; summaries of dropped tokens, and scores.
        tokens_seen: valid tokens that entered the cache, summed over the batch; an image's last scale never does.
        tokens_held: those still stored, averaged over layers.
        tokens: valid tokens seen per modality.
        tokens_per_layer: tokens of the last prompt with images or video that each decoder layer computed, summed over the batch;
            empty where no token method is at work.
        prefill_seconds: duration of the forwards that read prompts (the first one, and those with more than 32 new
            tokens), vision tower included, since the cache was empty; of an image made scale by scale, of all its forwards.
        decode_tokens_per_second: growth of the sequence per second of all other forwards; None before the first.
        decode_tokens: tokens that speed was measured over; a handful says little.
        replayed_steps: with `wrap(graphs=True)`, forwards of this sequence that a CUDA graph ran; None without.

    The layout of the tokens (about 27 bytes each, on the CPU, once for all layers) is no part of the bytes.
    """

    kv_bytes: int = 0
    kv_bytes_peak: int = 0
    kv_bytes_dense: int = 0
    kv_bits: float = 0.0
    packed_bits: float | None = None
    tail_bytes: int = 0
    tokens_seen: int = 0
    tokens_held: float = 0
    tokens: dict[str, int] = field(default_factory=dict)
    tokens_per_layer: tuple[int, ...] = ()
    prefill_seconds: float | None = None
    decode_tokens_per_second: float | None = None
    decode_tokens: int = 0
    replayed_steps: int | None = None

    @property
    def ratio(self) -> float:
        """Dense bytes per resident byte."""
        return self.kv_bytes_dense / self.kv_bytes if self.kv_bytes else 1.0

    def rows(self) -> list[tuple[str, str]]:
        """Label and text of each number, for tables."""
        if not self.tokens_seen:
            return [("KV cache", "empty: no forward yet")]
        packed = "nothing packed" if self.packed_bits is None else f"{self.packed_bits:.2f} bits per element"
        modality = ", ".join(f"{count:,} {name}" for name, count in self.tokens.items() if count)
        prefill = "-" if self.prefill_seconds is None else f"{self.prefill_seconds:.3f} s"
        speed = "-"
        if self.decode_tokens_per_second is not None:
            speed = f"{self.decode_tokens_per_second:.1f} tokens/s, over {self.decode_tokens:,}"
        smaller = f" ({self.ratio:.1f}x smaller than dense)" if self.ratio > 1.05 else ""
        return [
            ("KV cache, resident", size(self.kv_bytes) + smaller),
            ("KV cache, at its peak", size(self.kv_bytes_peak)),
            ("KV cache, if dense", size(self.kv_bytes_dense)),
            ("bits, whole cache", f"{self.kv_bits:.2f} bits per element"),
            ("bits, packed part", packed),
            ("dense tail and sinks", size(self.tail_bytes)),
            ("tokens seen", f"{self.tokens_seen:,} ({modality})"),
            ("tokens held", f"{self.tokens_held:,.0f} per layer"),
            *self._computed(),
            ("prefill", prefill),
            ("decode", speed),
            *([] if self.replayed_steps is None else [("CUDA graphs", f"ran {self.replayed_steps:,} decode steps")]),
        ]

    def _computed(self) -> list[tuple[str, str]]:
        """Tokens that the layers computed, in runs of layers: "1,052 in layers 0-1, 540 in 2-27"."""
        counts, parts, first = self.tokens_per_layer, [], 0
        for layer in range(1, len(counts) + 1):
            if layer == len(counts) or counts[layer] != counts[first]:
                span = f"{first}-{layer - 1}" if layer - 1 > first else f"{first}"
                parts.append(f"{counts[first]:,} in layer{'s' * (layer - 1 > first)} {span}")
                first = layer
        return [("tokens computed", ", ".join(parts))] if parts else []

    def __rich__(self):
        from rich.table import Table

        table = Table("mmkv report", "", title_justify="left")
        for label, text in self.rows():
            table.add_row(label, text)
        return table

    def __str__(self) -> str:
        from rich.console import Console

        console = Console(width=100, no_color=True)
        with console.capture() as captured:
            console.print(self)
        return captured.get().rstrip()


def size(count: float) -> str:
    """Bytes in the unit a person would use."""
    for unit in ("B", "KiB", "MiB"):
        if count < 1024:
            return f"{count:.0f} {unit}" if unit == "B" else f"{count:.1f} {unit}"
        count /= 1024
    return f"{count:.2f} GiB"


def report(model) -> Report:
    """The numbers of a wrapped model's last forward; for a timm model a `VitReport` of tokens.

    Raises:
        ValueError: the model is not wrapped.
    """
    from mmkv._wrap import session

    return session(model).report()


class Meter:
    """Measures a session: bytes after each forward of the decoder, seconds of each forward of the model."""

    def __init__(self) -> None:
        self._held: _Held | None = None
        self._cuda = False
        self._begun: float | None = None
        self._stream = None  # weak reference to the state of the cache that the last forward used
        self._before = self._seen = 0  # its logical length before and after that forward
        self._scales = False  # whether each forward is a scale of an image, and none a decode step
        self._prefill: float | None = None
        self._decode_tokens, self._decode_seconds = 0, 0.0

    def _clock(self) -> float:
        if self._cuda:
            torch.cuda.synchronize()
        return time.perf_counter()

    def start(self, model: torch.nn.Module) -> None:
        """A forward of the model begins."""
        self._cuda = next(model.parameters()).is_cuda
        self._begun = self._clock()

    def stop(self) -> None:
        """It has ended, or failed."""
        begun, self._begun = self._begun, None
        grown, self._before = self._seen - self._before, self._seen
        if begun is None or grown <= 0:
            return
        seconds = self._clock() - begun
        if grown == self._seen:  # the first tokens of a sequence
            self._prefill, self._decode_tokens, self._decode_seconds = seconds, 0, 0.0
        elif (grown > PROMPT or self._scales) and self._prefill is not None:
            self._prefill += seconds
        else:
            self._decode_tokens += grown
            self._decode_seconds += seconds

    def read(self, layers, state, new: int | None = None, gone: int = 0) -> None:
        """Count what the layers hold, after a forward of the decoder that brought `new` tokens; None for those of a layer.

        Args:
            layers, state: of the cache.
            new: tokens of the forward.
            gone: how many of them are not there any more, since nobody will ask for them.
        """
        new = layers[0].new if new is None else new
        self._scales = bool(state.scales)
        layout = state.layout
        if self._stream is None or self._stream() is not state:
            self._stream, self._before = weakref.ref(state), len(layout) + gone - new
        self._seen = len(layout) + gone
        self._held = _count(layers, state)

    def step(self, layers, state, recount: bool) -> None:
        """Count after a decode step in static buffers, of which the layout does not know yet.

        Args:
            recount: whether what the layers hold has changed by more than one token of each sequence.
        """
        self._seen = state.stretch.seen + state.stretch.steps
        if self._stream is None or self._stream() is not state:  # another cache than that of the last forward
            self._stream, self._before, recount = weakref.ref(state), self._seen - 1, True
        if recount or self._held is None:
            self._held = _count(layers, state)
        else:
            self._held.grow(state.layout.batch)

    def report(self, tokens_per_layer: tuple[int, ...] = (), replayed: int | None = None) -> Report:
        speed = self._decode_tokens / self._decode_seconds if self._decode_seconds else None
        return Report(
            **({} if self._held is None else self._held.numbers()),
            tokens_per_layer=tokens_per_layer,
            prefill_seconds=self._prefill,
            decode_tokens_per_second=speed,
            decode_tokens=self._decode_tokens,
            replayed_steps=replayed,
        )


@dataclass
class _Held:
    """What the layers of a cache hold.

    Args:
        total, packed, peak: bytes of all, of packed segments, the most so far.
        seen: valid tokens that entered, summed over the batch; counts: of each modality.
        tokens: tokens held, summed over layers; of those, packed_tokens.
        per_token: numbers of one token, by layer; sizes: bytes of each number.
        held_numbers, packed_numbers: of all tokens that are held, of those that are packed.
    """

    total: int
    packed: int
    peak: int
    seen: int
    counts: dict[str, int]
    per_token: list[int]
    sizes: list[int]
    tokens: float = 0
    held_numbers: float = 0
    packed_numbers: float = 0

    def grow(self, count: int) -> None:
        """As many tokens of text more, in every layer."""
        self.seen += count
        self.counts["text"] += count
        self.tokens += count * len(self.per_token)
        self.held_numbers += count * sum(self.per_token)

    def numbers(self) -> dict:
        """Keywords of a `Report`."""
        return dict(
            kv_bytes=self.total,
            kv_bytes_peak=max(self.peak, self.total),
            kv_bytes_dense=self.seen * sum(n * size for n, size in zip(self.per_token, self.sizes)),
            kv_bits=8 * self.total / self.held_numbers if self.held_numbers else 0.0,
            packed_bits=8 * self.packed / self.packed_numbers if self.packed_numbers else None,
            tail_bytes=self.total - self.packed,
            tokens_seen=self.seen,
            tokens_held=self.tokens / len(self.per_token),
            tokens=dict(self.counts),
        )


def _count(layers, state) -> _Held:
    """Count what the layers hold; tokens of a stretch included."""
    late = 0 if state.stretch is None else state.stretch.steps * state.layout.batch
    held = _Held(
        total=storage_bytes(t for layer in layers for t in layer.tensors()),
        packed=storage_bytes(t for layer in layers for segment in layer.packed for t in segment.tensors()),
        peak=state.peak,
        seen=int(state.layout.valid.sum()),
        counts=state.layout.counts(),
        per_token=[layer.keys.shape[1] * (layer.keys.shape[3] + layer.values.shape[3]) for layer in layers],
        sizes=[layer.keys.element_size() for layer in layers],
    )
    in_tails: dict = {}
    for layer, per_token in zip(layers, held.per_token):
        apart = sum(sum(segment.tokens) for segment in layer.segments)
        packed = sum(sum(segment.tokens) for segment in layer.packed)
        split = (id(layer.state), layer.start, *layer.packed_to)  # alike in most layers
        if split not in in_tails:
            there = layer.state.layout.valid
            in_tails[split] = sum(int(there[row, max(layer.start, p) :].sum()) for row, p in enumerate(layer.packed_to))
        moved = 0 if layer.static is None else layer.static.packed_tokens(state.stretch.steps)
        held.tokens += apart + in_tails[split]
        held.held_numbers += (apart + in_tails[split]) * per_token
        held.packed_numbers += (packed + moved) * per_token
    if late:
        held.grow(late)
    return held
