"""`Stream`: a video that is watched as it comes and asked about at any time (ReKV, arXiv 2503.00540)."""

from __future__ import annotations

import threading
from collections.abc import Sequence
from dataclasses import replace

import numpy as np
import torch

from mmkv.cache import CacheMethod
from mmkv.models import adapter_for
from mmkv.parts.budget import bytes_of
from mmkv.parts.storage import storage_bytes
from mmkv.streaming.answer import Answer, Reply, clock
from mmkv.streaming.chooser import Choice, Chooser, Retriever
from mmkv.streaming.choosing import representatives
from mmkv.streaming.decoder import Decoder
from mmkv.streaming.hooks import StreamHooks
from mmkv.streaming.identity import content_after, fingerprint, preprocessing, told
from mmkv.streaming.options import check_options
from mmkv.streaming.pieces import Pieces
from mmkv.streaming.positions import Positions
from mmkv.streaming.reading import Answering, Retrieving
from mmkv.streaming.store import Chunk, Key, Store, open_store, packed_by, peek
from mmkv.streaming.store.opening import folder_of
from mmkv.streaming.writing import Writing


class Stream:
    """The memory of one video. Made by `mmkv.stream`.

    Args:
        model, processor: a Qwen2-VL, Qwen2.5-VL or LLaVA-OneVision model and its processor.
        window: tokens that a frame sees while it is written.
        retrieve: frames that each layer brings back for a question, unless `ask` is told otherwise.
        store: "ram", or "disk:PATH" for a folder that outlives the process.
        cache: how stored keys and values are packed: `[KIVI(bits=8)]`, `[KIVI(bits=4)]`, `[KIVI(bits=2)]` or `[VidKV()]`; with
            none they stay in the model's dtype.
        ram_bytes: most bytes of frames in RAM, or "2GiB"; over a folder of those used last. None: half of the memory, or 4 GiB.
        by: "cosine" (the paper's similarity) or "dot" (its code's), by which each layer chooses its frames; "uniform" or
            "recent" frames, for comparison; or a retriever with `see(pictures, times)` and `choose(question, count)`, one choice
            for all layers. Also unless `ask` is told otherwise, as is `group`.
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
        self, model, processor, *, window: int = 15000, retrieve: int = 64, store: str = "ram",
        cache: Sequence[CacheMethod] = (), ram_bytes: int | str | None = None, by: str | Retriever = "cosine", group: int = 1,
        fps: float = 1.0, encode: int = 8, resume: bool = True, video: str = "", mode: str = "write",
    ):  # fmt: skip
        check_options(window, encode, fps, mode)
        folder_of(store, mode)
        self.choice = Choice(retrieve, by, group)
        self._packed = packed_by(cache)
        self._ram_bytes = None if ram_bytes is None else bytes_of(ram_bytes, "ram_bytes")
        self.model, self.processor, self.adapter = model, processor, adapter_for(model)
        self.reader = self.adapter.frames_reader(processor)
        self.window, self.fps, self.encode = window, fps, encode
        self.decoder = Decoder(self.adapter, processor.tokenizer)
        self._store_at, self._resume, self._video, self.mode = store, resume, video, mode
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
        """Take in pictures; returns how many frames are safely stored. What makes no whole frame yet (of a Qwen model, which
        reads pictures in pairs) waits for the next call.

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

    def ask(
        self, question: str, *, retrieve: int | None = None, by: str | Retriever | None = None, group: int | None = None,
        max_new_tokens: int = 128, **options,
    ) -> Reply:  # fmt: skip
        """Ask about all that was watched so far; the memory is not changed by it.

        Args:
            question: plain text.
            retrieve, by, group: as for the stream, for this question alone; None for the stream's. A retriever has seen the
                frames only where it is the stream's.
            max_new_tokens: of the answer.
            options: of `generate` (`do_sample`, `temperature` ...); greedy without.

        Returns:
            a `Reply`: iterate over it for text as it comes, or call `answer()`.

        Raises:
            ValueError: nothing was watched yet, the question is longer than the window, or an option is out of range.
        """
        self._open()
        told = dict(retrieve=retrieve, by=by, group=group)
        choice = replace(self.choice, **{name: value for name, value in told.items() if value is not None})
        if not isinstance(choice.by, str) and choice.by is not self.choice.by:
            raise ValueError("by: this retriever has not seen the frames; give it to mmkv.stream(by=...)")
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
        return Reply(lambda put: self._answer(choice, question, ids, prompt, options, put))

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
            index = torch.stack([representatives(k, features.shape[1]) for k in keys])
            content = content_after(self.store.content, pictures, len(times))
            self.store.append(Chunk(list(keys), list(values), index, times), content)
        except BaseException:
            self._writing.seen, self._writing.held = before  # the window forgets what the store does not have
            raise
        finally:
            self._writing.written = [None] * self.decoder.layers
        if not isinstance(self.choice.by, str):
            self.choice.by.see(pictures, times)

    @torch.no_grad()
    def _begin(self, grid: tuple[int, int]) -> None:
        """The shape of frames is known: run the prompt before the video, and open the store."""
        init = self.reader.prompt("?")[0]
        positions = Positions(self.adapter.axes, len(init), grid, self.reader.step(self.reader.pictures / self.fps))
        if self.window < positions.per_frame + len(init):
            raise ValueError(
                f"window={self.window}; a frame has {positions.per_frame} tokens, the prompt before it {len(init)}: give more"
            )
        self._writing = Writing(self.decoder.rotary, self.decoder.layers, self.window)
        try:
            self._forward(self.decoder.embeds(init))
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
            self._store_at, key, layers=self.decoder.layers, heads=keys.shape[1], dim=keys.shape[3], value_dim=values.shape[3],
            tokens_per_frame=positions.per_frame, dtype=keys.dtype, device=keys.device, packed=self._packed,
            ram_bytes=self._ram_bytes, resume=self._resume, mode=self.mode,
        )  # fmt: skip

    @torch.no_grad()
    def _go_on(self) -> None:
        """Go on with what a folder holds: its frames can be asked about, and the window is as it was."""
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
        self._writing.seen += self.store.frames * self._writing.positions.per_frame
        if self.mode == "read" or not self.store.frames:
            return
        newest = self._writing.newest_frames()
        if set(newest) & set(self.store.damaged):
            raise ValueError(
                f"{self._store_at}: frames that the window needs are damaged; read it, or watch the video anew"
            )
        self._writing.refill(newest, self.store.fetch)
        self._pieces.go_on(self.store.times[-1])

    def refresh(self) -> int:
        """Take in what another process has written since; returns how many frames are new."""
        with self._lock:
            self._open()
            return 0 if self.store is None or self.mode == "write" else self.store.refresh()

    def _forward(self, embeds: torch.Tensor) -> None:
        """Run embeddings `[1, T, C]` through the decoder, which writes."""
        self.decoder.run(embeds, self._writing)
        self._writing.seen += embeds.shape[1]

    @torch.no_grad()
    def _answer(
        self, choice: Choice, question: str, ids: torch.Tensor, prompt: torch.Tensor, options: dict, put
    ) -> Answer:
        begun = clock()
        with self._lock:  # frames that come while it chooses wait
            chooser = Chooser(self.store, choice, question)
            rotary, positions = self.decoder.rotary, self._writing.positions
            retrieving = Retrieving(rotary, positions, chooser.bring, self._writing.init)
            self.decoder.run(self.decoder.embeds(ids), retrieving)
            held = self.bytes()
        seconds = {"retrieve": clock() - begun}
        answering = Answering(rotary, positions, retrieving.contexts, [len(f) for f in retrieving.frames])
        text, tokens, first = self.decoder.generate(prompt, answering, put, options)
        seconds |= {"first_token": first - begun, "answer": clock() - begun}
        return Answer(text, chooser.found(), seconds, held, tokens)


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
