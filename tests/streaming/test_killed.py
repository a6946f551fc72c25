"""A process is killed while it watches; another opens the folder, asks, and goes on."""

from __future__ import annotations

import signal
import subprocess
import sys

import mmkv
from mmkv.models import tiny
from mmkv.models.tiny import answer, world

OPTIONS = dict(window=4000, fps=2.0, video="the one", encode=2)
CHILD = f"""
import sys, mmkv
from mmkv.models import tiny
from mmkv.models.tiny import world
video = world.make_video(2**42, frames=32)
stream = mmkv.stream(*tiny.load(), store=sys.argv[1], **{OPTIONS!r})
for at in range(0, 32, 2):
    print(stream.watch(video.frames[at : at + 2]), flush=True)
"""


def test_nothing_acknowledged_is_lost(tmp_path):
    store = f"disk:{tmp_path / 'memory'}"
    child = subprocess.Popen([sys.executable, "-c", CHILD, store], stdout=subprocess.PIPE, text=True)
    acknowledged = 0
    while acknowledged < 5:
        acknowledged = int(child.stdout.readline())
    child.send_signal(signal.SIGKILL)
    child.wait()
    acknowledged = max([acknowledged, *map(int, child.stdout.read().split())])

    model, processor = tiny.load()
    video = world.make_video(2**42, frames=32)
    with mmkv.stream(model, processor, store=store, **OPTIONS) as stream:
        assert stream.frames >= acknowledged
        part = stream.frames * 2
        question = "which colour appears first?"
        seen = answer.ask(model, processor, video.frames[:part], question)
        assert stream.answer(question, max_new_tokens=4).text == seen
        assert stream.watch(video.frames[part:]) == 16
        assert stream.answer(question, max_new_tokens=4).text == answer.ask(model, processor, video.frames, question)
