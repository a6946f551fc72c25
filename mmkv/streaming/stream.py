"""`Stream`: a video that is watched as it comes and asked about at any time (ReKV, arXiv 2503.00540)."""

from __future__ import annotations

import threading
from collections.abc import Sequence

import numpy as np
import torch

from mmkv.models import adapter_for
from mmkv.parts.storage import storage_bytes
from mmkv.streaming.answer import Answer, Reply, Retrieved, clock
from mmkv.streaming.cache import Pass, StreamCache
from mmkv.streaming.choosing import FIXED, SIMILARITIES, best, fixed, representatives, scores
from mmkv.streaming.hooks import StreamHooks
from mmkv.streaming.identity import fingerprint, preprocessing, told
from mmkv.streaming.pieces import Pieces
from mmkv.streaming.positions import Positions
from mmkv.streaming.reading import Answering, Retrieving
from mmkv.streaming.rotary import Rotary
from mmkv.streaming.store import Chunk, DamagedFrames, Key, Store, advance, open_store, peek
from mmkv.streaming.text import TextPieces
from mmkv.streaming.writing import Writing


class Stream:
    """The memory of one video. Made by `mmkv.stream`.

    Args:
        model, processor: a Qwen2-VL, Qwen2.5-VL or LLaVA-OneVision model and its processor.
        window: tokens that a frame sees while it is written.
        retrieve: frames that each layer brings back for a question.
        store: "ram", or "disk:PATH" for a folder that outlives the process.
        packed: format of stored keys and values: None (the model's dtype), "int8", "int4", "int2".
        by: "cosine" (the paper's similarity) or "dot" (its code's), by which each layer chooses its frames; "uniform" or
            "recent" frames, for comparison; or a retriever with `see(pictures, times)` and `choose(question, count)`, one choice
            for all layers.
        group: consecutive frames that are chosen together.
        fps: pictures per second, where `watch` is not told times.
        encode: frames that go through the model at a time.
        resume: whether a folder that holds frames of this same video and model already goes on; else it has to be empty.
        video: what is watched, for a folder: a hash of a file's content, so that no video goes on in another's memory; "" for
            a live stream.
        mode: "write", or "read" to ask a folder that this or another process writes, as it was written: `window` and `fps` are
            the folder's.

    Raises:
        ValueError: an option out of range, a model that cannot be streamed, a store of another model or video.
    """

    def __init__(
        self, model, processor, *, window: int = 15000, retrieve: int = 64, store: str = "ram", packed: str | None = None,
        by="cosine", group: int = 1, fps: float = 1.0, encode: int = 8, resume: bool = True, video: str = "",
        mode: str = "write",
    ):  # fmt: skip
        for name, value in (("window", window), ("retrieve", retrieve), ("group", group), ("encode", encode)):
            if type(value) is not int or value < 1:
                raise ValueError(f"{name}={value!r}; possible are whole numbers from 1")
        if not isinstance(fps, (int, float)) or not 0 < fps <= 1000:
            raise ValueError(f"fps={fps!r}; possible are numbers above 0, up to 1000")
        if isinstance(by, str) and by not in SIMILARITIES + FIXED:
            raise ValueError(f"by={by!r}; possible are {', '.join(SIMILARITIES + FIXED)}, or a retriever")
        if group > retrieve:
            raise ValueError(f"group={group} with retrieve={retrieve}; a group has to fit into what is brought back")
        self.model, self.processor, self.adapter = model, processor, adapter_for(model)
        self.reader = self.adapter.frames_reader(processor)
        self.window, self.retrieve, self.by, self.group = window, retrieve, by, group
        self.fps, self.encode = fps, encode
        self.rotary = Rotary(self.adapter)
        self._store_at, self._packed, self._resume, self._video, self.mode = store, packed, resume, video, mode
        self._layers = len(self.adapter.text_model.layers)
        self._writing: Writing | None = None
        self._pieces = Pieces(self.reader.pictures, fps)
        self._lock = threading.RLock()
        self.store: Store | None = None
        self._hooks: StreamHooks | None = StreamHooks.of(self.adapter)
        try:
            self._go_on()
        except BaseException:
            self.close()
            raise

    def __enter__(self) -> Stream:
        return self

    def __exit__(self, *_) -> None:
        self.close()

    def close(self) -> None:
        """Let go of the model and the memory; a folder stays."""
        with self._lock:
            if self._hooks is not None:
                self._hooks.release()
                self._hooks = None
            if self.store is not None:
                self.store.close()

    @property
    def frames(self) -> int:
        """Frames that are stored."""
        return 0 if self.store is None else self.store.frames

    @property
    def times(self) -> list[float]:
        """Seconds of each."""
        return [] if self.store is None else self.store.times

    def watch(self, pictures, times: Sequence[float] | float | None = None) -> int:
        """Take in one picture, several, or an iterable of them; returns how many frames are safely stored.

        What makes no whole frame yet (of a Qwen model, which reads pictures in pairs) waits for the next call.

        Args:
            pictures: uint8 `[H, W, 3]`, `[T, H, W, 3]`, or an iterable of either.
            times: seconds of each, ascending; None counts on at `fps`.

        Raises:
            ValueError: pictures of another size than before, times that do not ascend, no picture at all.
            OSError: the disk is full; what was stored is intact.
        """
        with self._lock:
            self._open()
            if self.mode == "read":
                raise ValueError("this stream only reads; watch with mode='write'")
            for batch, stamps in self._pieces.add(pictures, times, self.encode * self.reader.pictures):
                self._write(batch, stamps)
            return self.frames

    def ask(self, question: str, *, max_new_tokens: int = 128, **options) -> Reply:
        """Ask about all that was watched so far; the memory is not changed by it.

        Args:
            question: plain text.
            max_new_tokens: of the answer.
            options: of `generate` (`do_sample`, `temperature` ...); greedy without.

        Returns:
            a `Reply`: iterate over it for text as it comes, or call `answer()`.

        Raises:
            ValueError: nothing was watched yet, or the question is longer than the window.
        """
        self._open()
        if not self.frames:
            raise ValueError("ask before any frame is stored; call watch first")
        if not question.strip():
            raise ValueError("an empty question")
        ids, prompt = self.reader.ids(question), self.reader.prompt(question)[1]
        if max(len(ids), len(prompt)) > self.window:
            raise ValueError(
                f"the question has {len(prompt)} tokens, more than the window of {self.window}; shorten it"
            )
        options = {"do_sample": False, **options, "max_new_tokens": max_new_tokens}
        return Reply(lambda put: self._answer(question, ids, prompt, options, put))

    def answer(self, question: str, **options) -> Answer:
        """The whole answer to a question, as `ask(question).answer()`."""
        return self.ask(question, **options).answer()

    def bytes(self) -> dict[str, int]:
        """Bytes held: the "window" where the model is, and what the store holds on the "device", in "ram" and on "disk"."""
        out = {"window": 0, "device": 0, "ram": 0, "disk": 0}
        if self._writing is not None:
            held = [t for pair in (*self._writing.held, *self._writing.init) if pair is not None for t in pair]
            out["window"] = storage_bytes(held)
        if self.store is not None:
            out |= self.store.bytes()
        return out

    def _open(self) -> None:
        if self._hooks is None:
            raise ValueError("this stream is closed; make another with mmkv.stream")

    @torch.no_grad()
    def _write(self, pictures: np.ndarray, times: list[float]) -> None:
        features, grid = self.reader.encode(torch.from_numpy(np.ascontiguousarray(pictures)))
        if self._writing is None:
            self._begin(grid)
        if features.shape[1] != self._writing.positions.per_frame:
            raise ValueError(
                f"frames of {features.shape[1]} tokens after frames of {self._writing.positions.per_frame}"
            )
        before = self._writing.seen, list(self._writing.held)
        try:
            self._forward(features.flatten(0, 1)[None])
            keys, values = zip(*self._writing.written)
            n = self._writing.positions.per_frame
            index = torch.stack([representatives(k, n) for k in keys])
            content = self.store.content or ""
            for frame in np.split(pictures, len(times)):
                content = advance(content, np.ascontiguousarray(frame).data)
            self.store.append(Chunk(list(keys), list(values), index, times), content)
        except BaseException:
            self._writing.seen, self._writing.held = before  # the window forgets what the store does not have
            raise
        finally:
            self._writing.written = [None] * self._layers
        if not isinstance(self.by, str):
            self.by.see(pictures, times)

    @torch.no_grad()
    def _begin(self, grid: tuple[int, int]) -> None:
        """The shape of frames is known: run the prompt before the video, and open the store."""
        init = self.reader.prompt("?")[0]
        positions = Positions(self.adapter.axes, len(init), grid, self.reader.step(self.reader.pictures / self.fps))
        if self.window < positions.per_frame + len(init):
            raise ValueError(
                f"window={self.window}; a frame has {positions.per_frame} tokens, the prompt before it {len(init)}: give more"
            )
        self._writing = Writing(self.rotary, self._layers, self.window)
        try:
            self._forward(self._embeds(init))
            self._writing.positions = positions
            self.store = self._stored(positions, init)
        except BaseException:
            self._writing = None
            raise

    def _stored(self, positions: Positions, init: torch.Tensor) -> Store:
        """The store of this stream."""
        keys, values = self._writing.init[0]
        about = dict(grid=positions.grid, fps=self.fps, window=self.window, prompt=init.tolist())
        video = None if self.mode == "read" else self._video
        key = Key(fingerprint(self.model), preprocessing(self.processor, about), video)
        return open_store(
            self._store_at, key, layers=self._layers, heads=keys.shape[1], dim=keys.shape[3], value_dim=values.shape[3],
            tokens_per_frame=positions.per_frame, dtype=keys.dtype, device=keys.device, packed=self._packed,
            resume=self._resume, mode=self.mode,
        )  # fmt: skip

    @torch.no_grad()
    def _go_on(self) -> None:
        """Go on with what a folder holds: its frames can be asked about, and the window is as it was."""
        if self.mode not in ("write", "read"):
            raise ValueError(f"mode={self.mode!r}; possible are 'write', 'read'")
        if not self._store_at.startswith("disk:"):
            return
        try:
            found = peek(self._store_at)
        except ValueError:
            if self.mode == "read":
                raise
            return  # a new folder
        about = told(found["key"]["preprocessing"])
        if self.mode == "read":
            self.window, self.fps, self._packed = about["window"], about["fps"], found["shape"]["packed"]
        self._begin(tuple(about["grid"]))
        n, frames = self._writing.positions.per_frame, self.store.frames
        self._writing.seen += frames * n
        newest = range(max(frames - -(-self.window // n), 0), frames)
        if self.mode == "read" or not frames:
            return
        if set(newest) & set(self.store.damaged):
            raise ValueError(
                f"{self._store_at}: frames that the window needs are damaged; read it, or watch the video anew"
            )
        for layer, (init_keys, init_values) in enumerate(self._writing.init):
            keys, values = (x[None].to(init_keys.dtype) for x in self.store.fetch(layer, newest))
            keys, values = torch.cat([init_keys, keys], 2), torch.cat([init_values, values], 2)
            # the prompt stands before the first frame: it is in the window only where all frames are
            first = 0 if newest.start == 0 else init_keys.shape[2]
            keep = slice(max(keys.shape[2] - self.window, first), None)
            self._writing.held[layer] = keys[:, :, keep].clone(), values[:, :, keep].clone()
        self._pieces.go_on(self.store.times[-1])

    def refresh(self) -> int:
        """Take in what another process has written since; returns how many frames are new."""
        with self._lock:
            self._open()
            return 0 if self.store is None or self.mode == "write" else self.store.refresh()

    def _forward(self, embeds: torch.Tensor) -> None:
        """Run embeddings `[1, T, C]` through the decoder, which writes."""
        self._decode(embeds, self._writing)
        self._writing.seen += embeds.shape[1]

    def _decode(self, embeds: torch.Tensor, way: Pass) -> None:
        """Run embeddings `[1, T, C]` through the decoder, for what a pass makes of them."""
        ids = torch.arange(embeds.shape[1], device=embeds.device).expand(self.adapter.axes, 1, -1)
        self.adapter.text_model(
            inputs_embeds=embeds,
            position_ids=ids if self.adapter.axes > 1 else ids[0],  # nothing is rotated by them
            past_key_values=StreamCache(way, self._layers),
            use_cache=True,
        )

    def _embeds(self, ids: torch.Tensor) -> torch.Tensor:
        """Embeddings `[1, T, C]` of text."""
        return self.adapter.text_model.get_input_embeddings()(ids.to(self.model.device))[None]

    @torch.no_grad()
    def _answer(self, question: str, ids: torch.Tensor, prompt: torch.Tensor, options: dict, put) -> Answer:
        begun = clock()
        with self._lock:  # frames that come while it chooses wait
            chooser = _Chooser(self, question)
            positions = self._writing.positions
            retrieving = Retrieving(self.rotary, positions, chooser.bring, self._writing.init)
            self._decode(self._embeds(ids), retrieving)
            held = self.bytes()
        seconds = {"retrieve": clock() - begun}
        answering = Answering(self.rotary, positions, retrieving.contexts, [len(f) for f in retrieving.frames])
        prompt = prompt.to(self.model.device)[None]
        streamer = TextPieces(self.processor.tokenizer, put)
        out = self.model.generate(
            input_ids=prompt, attention_mask=torch.ones_like(prompt), past_key_values=StreamCache(answering, self._layers),
            streamer=streamer, **options,
        )  # fmt: skip
        new = out[0, prompt.shape[1] :]
        seconds |= {"first_token": streamer.first - begun, "answer": clock() - begun}
        text = self.processor.tokenizer.decode(new, skip_special_tokens=True).strip()
        return Answer(text, chooser.found(), seconds, held, len(new))


class _Chooser:
    """Chooses frames for one question and remembers them."""

    def __init__(self, stream: Stream, question: str):
        self.stream, self.question = stream, question
        self.without = set(stream.store.damaged)
        self._once: list[int] | None = None
        self._score: dict[int, list[float]] = {}

    def bring(self, layer: int, queries: torch.Tensor) -> tuple[list[int], torch.Tensor, torch.Tensor]:
        """The frames that a layer chooses, their keys and values; frames that turn out to be damaged are passed over."""
        store = self.stream.store
        while True:
            frames, values = self._choose(layer, queries)
            try:
                found = store.fetch(layer, frames)
            except DamagedFrames:
                self.without, self._once = set(store.damaged), None
                continue
            for frame, value in zip(frames, values):
                self._score.setdefault(frame, []).append(value)
            if self._once is not None and layer + 1 < store.layers:  # the next layer's frames are known before it runs
                store.prefetch(layer + 1, frames)
            return frames, *found

    def _choose(self, layer: int, queries: torch.Tensor) -> tuple[list[int], list[float]]:
        """Frames, ascending, and how well each answers."""
        stream, count = self.stream, self.stream.retrieve
        if stream.by in SIMILARITIES:
            found = scores(queries, stream.store.index[layer], stream.store.heads, stream.by)
            frames = best(found, count, stream.group, self.without)
            return frames, found[frames].tolist()
        if self._once is None:
            self._once = self._of_all_layers(count)
        return self._once, [0.0] * len(self._once)

    def _of_all_layers(self, count: int) -> list[int]:
        if self.stream.by in FIXED:
            return fixed(self.stream.by, self.stream.frames, count, self.without)
        chosen = sorted(set(self.stream.by.choose(self.question, count)))
        if not all(0 <= f < self.stream.frames for f in chosen):
            raise ValueError(f"the retriever chose frames {chosen}; there are 0 to {self.stream.frames - 1}")
        return [f for f in chosen if f not in self.without]

    def found(self) -> tuple[Retrieved, ...]:
        """All frames that any layer chose, in order of time."""
        times = self.stream.times
        return tuple(Retrieved(f, times[f], sum(s) / len(s), len(s)) for f, s in sorted(self._score.items()))


def stream(model, processor, **options) -> Stream:
    """Watch a video as it comes and ask about it at any time; options as for `Stream`.

    ```python
    with mmkv.stream(model, processor, window=4096, retrieve=16) as stream:
        stream.watch(frames)
        for piece in stream.ask("what is in the box?"):
            print(piece, end="")
    ```
    """
    return Stream(model, processor, **options)
