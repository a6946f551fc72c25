"""`Session`: the video of one user, watched in the background while questions come."""

from __future__ import annotations

import logging
import queue
import shutil
import threading
import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import suppress
from dataclasses import dataclass, field, replace
from pathlib import Path

import numpy as np

from mmkv.demos.page.memory import History, jpeg
from mmkv.streaming.answer import Answer
from mmkv.streaming.pieces import batches
from mmkv.streaming.stream import Stream

LOG = logging.getLogger("mmkv.demos.page")
BATCH = 4  # frames that are watched between two looks at what else there is to do
LIVE = 320  # pixels of the picture that is shown while it is watched
WAITING = 4  # pictures of a webcam that may wait; older ones are let go


@dataclass(frozen=True)
class Status:
    """What the page shows of a session.

    Args:
        state: "idle", "watching", "done", "stopped" or "failed".
        name: of the video, as its user calls it.
        done, total: pictures; total is 0 where nobody knows (a webcam).
        frames: that are stored.
        seconds: of the video, watched so far.
        error: one line, "" where there is none.
        dropped: pictures of a webcam that came too quickly.
    """

    state: str = "idle"
    name: str = ""
    done: int = 0
    total: int = 0
    frames: int = 0
    seconds: float = 0.0
    error: str = ""
    dropped: int = 0


@dataclass
class _Asking:
    """Questions that have no first piece of their answer yet: watching waits for them."""

    count: int = 0
    news: threading.Condition = field(default_factory=threading.Condition)

    def enter(self) -> None:
        with self.news:
            self.count += 1

    def leave(self) -> None:
        with self.news:
            self.count -= 1
            self.news.notify_all()

    def wait(self, seconds: float = 60) -> None:
        with self.news:
            self.news.wait_for(lambda: self.count == 0, timeout=seconds)


class Session:
    """One stream, the thread that feeds it, and what was seen.

    Args:
        stream: empty.
        name: of the video.
        release: closes the stream, when nobody uses it any more.
        folder: removed then; None for none.
        most: bytes of memory, with which watching ends.
    """

    def __init__(
        self, stream: Stream, name: str, release: Callable[[], None] | None = None, folder: Path | None = None,
        most: float = float("inf"),
    ):  # fmt: skip
        self.stream, self.name = stream, name
        self.thumbs: list[bytes] = []
        self.history = History()
        self.live = b""
        self._status, self._mutex = Status(name=name), threading.Lock()
        self._release, self._folder = release or stream.close, folder
        self._most = most
        self._stop = threading.Event()
        self._asking, self._one = _Asking(), threading.Lock()
        self._thread: threading.Thread | None = None
        self._cam: queue.Queue = queue.Queue(WAITING)
        self._closing: threading.Thread | None = None

    @property
    def status(self) -> Status:
        return self._status

    def _now(self, **changed) -> None:
        with self._mutex:
            self._status = replace(self._status, **changed)

    def watch(self, pictures: Iterable[tuple[np.ndarray, float]], total: int = 0, batch: int = BATCH) -> None:
        """Begin to watch pictures uint8 `[H, W, 3]` with their seconds, `batch` frames at a time; returns at once."""
        if self._thread is not None:
            raise ValueError("this video is being watched already")
        self._now(state="watching", total=total)
        self._thread = threading.Thread(target=self._run, args=(pictures, batch), daemon=True)
        self._thread.start()

    def watch_webcam(self, most: float) -> None:
        """Begin to watch what `see` brings, for at most that many seconds."""
        self.watch(self._from_webcam(most), batch=1)

    def see(self, picture: np.ndarray, at: float) -> None:
        """A picture of a webcam; where watching is slower than the webcam, the oldest that waits is let go."""
        while True:
            try:
                return self._cam.put_nowait((picture, at))
            except queue.Full:
                try:
                    self._cam.get_nowait()
                    self._now(dropped=self._status.dropped + 1)
                except queue.Empty:
                    continue

    def _from_webcam(self, most: float) -> Iterator[tuple[np.ndarray, float]]:
        first = last = None
        while not self._stop.is_set():
            try:
                picture, at = self._cam.get(timeout=0.2)
            except queue.Empty:
                continue
            first = at if first is None else first
            if last is not None and at <= last:
                continue
            last = at
            if at - first > most:
                raise ValueError(f"the webcam was watched for {most / 60:g} min, the most that this page takes")
            yield picture, at - first

    def _run(self, pictures: Iterable[tuple[np.ndarray, float]], size: int) -> None:
        state, error = "done", ""
        try:
            for batch in batches(pictures, size * self.stream.reader.pictures):
                self._asking.wait()
                if self._stop.is_set():
                    state = "stopped"
                    break
                self._take(batch)
            if self._stop.is_set():
                state = "stopped"
        except Exception as caught:
            state, error = "failed", self.one_line(caught)
        self._now(state=state, error=error)

    def _take(self, batch: list[tuple[np.ndarray, float]]) -> None:
        per_frame = self.stream.reader.pictures
        begun = time.perf_counter()
        frames = self.stream.watch([picture for picture, _ in batch], [at for _, at in batch])
        spent = time.perf_counter() - begun
        done = self._status.done
        for k, (picture, _) in enumerate(batch, done):
            if k % per_frame == 0:
                self.thumbs.append(jpeg(picture))
        self.live = jpeg(batch[-1][0], LIVE)
        held = self.stream.bytes()
        self.history.add(frames, spent, held)
        self._now(done=done + len(batch), frames=frames, seconds=batch[-1][1])
        if sum(held.values()) >= self._most:
            raise ValueError(
                f"the memory of this video has reached {self._most / 2**30:.3g} GiB, the most for this page; "
                "what was watched can be asked about"
            )

    def stop(self) -> None:
        """Watch no further; what was seen can still be asked about."""
        self._stop.set()

    def wait(self, seconds: float | None = None) -> Status:
        """Until all is watched, or stopped."""
        if self._thread is not None:
            self._thread.join(seconds)
        return self._status

    def ask(self, question: str, retrieve: int, method: str) -> Iterator[str | Answer]:
        """Pieces of text, then the `Answer`.

        Raises:
            ValueError: nothing seen yet, an empty question, or one that is still being answered.
        """
        if not self._one.acquire(blocking=False):
            raise ValueError("the question before is still being answered; wait for it")
        waiting, reply = True, None
        self._asking.enter()
        try:
            if self._closing is not None:
                raise ValueError("this video was closed; choose another")
            if not self.stream.frames:
                raise ValueError("nothing was watched yet; ask when the first frame is there")
            reply = self.stream.ask(question, retrieve=retrieve, by=method)
            for piece in reply:
                if waiting:
                    waiting = False
                    self._asking.leave()
                yield piece
            yield reply.answer()
        finally:
            if waiting:
                self._asking.leave()
            if reply is not None:  # its reader may be gone; the model is not to be closed under it
                with suppress(Exception):
                    reply.answer()
            self._one.release()

    def one_line(self, error: BaseException) -> str:
        """What a user may read of an error, without this machine's paths."""
        text = one_line(error)
        return text if self._folder is None else text.replace(str(self._folder), "the store")

    def close(self) -> threading.Thread:
        """Let go of everything, in the background: a batch and an answer that are under way end first."""
        if self._closing is None:
            self._stop.set()
            self._closing = threading.Thread(target=self._close, daemon=True)
            self._closing.start()
        return self._closing

    def _close(self) -> None:
        if self._thread is not None:
            self._thread.join()
        with self._one:
            try:
                self._release()
            finally:
                self.thumbs.clear()
                if self._folder is not None:
                    shutil.rmtree(self._folder, ignore_errors=True)


def one_line(error: BaseException) -> str:
    """What a user may read of an error. What nobody foresaw goes to the server's log, and only there."""
    if isinstance(error, ValueError) or (isinstance(error, OSError) and error.errno is not None):
        text = str(error) if isinstance(error, ValueError) else (error.strerror or "the disk could not be used")
        return (text.strip().splitlines() or ["something was wrong with that"])[0]
    LOG.error("unforeseen", exc_info=error)
    return "something went wrong on the server; its log says what"
