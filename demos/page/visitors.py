"""`Visitors`: who watches what. Every user has a stream of their own, freed when they go."""

from __future__ import annotations

import shutil
import tempfile
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from mmkv.demos.page.options import Controls, Limits, disk_folder
from mmkv.demos.page.session import BATCH, Session
from mmkv.demos.page.uploads import open_upload, pictures, shrink
from mmkv.streaming.store import cache_of
from mmkv.streaming.stream import Stream

IDLE = 15 * 60  # seconds after which a user who left without a word is forgotten
PAUSE = 3.0  # seconds without a picture, after which a webcam's next one begins a new video
WEBCAM = "webcam"


@dataclass
class Visitor:
    """A user's session, and when they were heard of last; `webcam`: when their webcam was."""

    session: Session | None = None
    seen: float = 0.0
    webcam: float = float("-inf")


class Visitors:
    """Sessions of all users over one model.

    Args:
        model, processor: shared by all streams.
        limits: of the page.
        root: folder for uploads, and for disk stores where `limits` names none.
        clock: seconds.
    """

    def __init__(self, model, processor, limits: Limits, root: Path, clock: Callable[[], float] = time.monotonic):
        self.model, self.processor, self.limits, self.root, self.clock = model, processor, limits, root, clock
        self._known: dict[str, Visitor] = {}
        self._open = 0  # streams that hold memory, those that are being closed included
        self._lock = threading.RLock()

    def session(self, user: str) -> Session | None:
        """What the user watches; None if nothing."""
        with self._lock:
            visitor = self._known.get(user)
            if visitor is None:
                return None
            visitor.seen = self.clock()
            return visitor.session

    def watch_file(self, user: str, path: Path, controls: Controls, name: str, upload: bool = True) -> Session:
        """Begin to watch a video; a broken one leaves the user's last one as it was.

        Args:
            user: who.
            path: of the file.
            controls: as the user set them.
            name: of the video.
            upload: the file is moved to where the page serves nothing from, and removed with the session.
        """
        try:
            open_upload(path, name, self.limits).close()
        except ValueError:
            if upload:
                path.unlink(missing_ok=True)
            raise
        folder = self._folder(controls)
        try:
            if upload:
                path = Path(shutil.move(path, folder / f"upload{path.suffix.lower()}"))
            video = open_upload(path, name, self.limits)
            session = self._begin(user, controls, name, folder)
        except BaseException:
            shutil.rmtree(folder, ignore_errors=True)
            raise
        session.watch(pictures(video, self.limits.side, name), len(video))
        return session

    def watch_webcam(self, user: str, picture: np.ndarray, controls: Controls) -> Session | None:
        """A picture of a webcam. It begins a new video where none came for a while; else it is one more of the same, or,
        where the user stopped it or chose another video meanwhile, of no interest (None)."""
        with self._lock:
            visitor = self._known.setdefault(user, Visitor())
            now = visitor.seen = self.clock()
            fresh, visitor.webcam = now - visitor.webcam > PAUSE, now
            session = visitor.session
        if fresh and (session is None or session.name != WEBCAM or session.status.state != "watching"):
            session = self._begin(user, controls, WEBCAM, self._folder(controls))
            session.watch_webcam(self.limits.minutes * 60)
        if session is None or session.name != WEBCAM or session.status.state != "watching":
            return None
        session.see(shrink(picture, self.limits.side), now)
        return session

    def _begin(self, user: str, controls: Controls, name: str, folder: Path) -> Session:
        with self._lock:
            self._sweep()
            holders = [u for u, v in self._known.items() if v.session is not None and u != user]
            if len(holders) >= self.limits.users or self._open >= 2 * self.limits.users:
                raise ValueError(f"{self.limits.users} videos are being held, the most for this page; try again later")
            store = f"disk:{folder / 'store'}" if controls.store == "disk" else "ram"
            stream = Stream(
                self.model, self.processor, window=controls.window, retrieve=controls.retrieve, by=controls.method,
                cache=cache_of(None if controls.packed == "none" else controls.packed), store=store,
                fps=self.limits.fps, encode=BATCH,
            )  # fmt: skip
            self._open += 1
            session = Session(stream, name, lambda: self._released(stream), folder, self.limits.gibibytes * 2**30)
            visitor = self._known.setdefault(user, Visitor())
            before, visitor.session, visitor.seen = visitor.session, session, self.clock()
        if before is not None:
            before.close()
        return session

    def _released(self, stream: Stream) -> None:
        with self._lock:  # streams share what they leave on the model
            stream.close()
            self._open -= 1

    def _folder(self, controls: Controls) -> Path:
        base = (disk_folder(self.limits.store) if controls.store == "disk" else None) or self.root
        base.mkdir(parents=True, exist_ok=True)
        return Path(tempfile.mkdtemp(prefix="video-", dir=base))

    def leave(self, user: str) -> None:
        """The user is gone: free what they held."""
        with self._lock:
            visitor = self._known.pop(user, None)
        if visitor is not None and visitor.session is not None:
            visitor.session.close()

    def _sweep(self) -> None:
        for user in [u for u, v in self._known.items() if self.clock() - v.seen > IDLE]:
            self.leave(user)

    def close(self) -> None:
        """Free everything; returns when it is done."""
        with self._lock:
            sessions = [v.session for v in self._known.values() if v.session is not None]
            self._known.clear()
        for thread in [session.close() for session in sessions]:
            thread.join()
