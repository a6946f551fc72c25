"""The video reader: right frames at exact times by both readers, and one clear line for every broken file."""

from __future__ import annotations

import builtins
import subprocess
import sys
import tracemalloc

import numpy as np
import pytest
import videos

import mmkv
from mmkv.video import VideoError, open_video, readers


@pytest.fixture
def clip(tmp_path):
    return videos.write(tmp_path / "clip.mp4")


@pytest.fixture
def no_decord(monkeypatch):
    real = builtins.__import__

    def guarded(name, *args, **kwargs):
        if name == "decord" or name.startswith("decord."):
            raise ImportError(name)
        return real(name, *args, **kwargs)

    monkeypatch.setattr(builtins, "__import__", guarded)


def test_a_video_may_be_opened_before_torch_is_imported(clip):
    """decord's wheel would make the first matrix product crash."""
    code = f"import mmkv; len(mmkv.open_video({str(clip)!r})); import torch; a = torch.ones(300, 300); a @ a"
    assert subprocess.run([sys.executable, "-c", code]).returncode == 0


def test_all_frames(clip):
    with mmkv.open_video(clip) as video:
        frames = list(video)
        assert (len(video), video.frame_count, video.width, video.height) == (20, 20, 64, 48)
        assert video.reader == "decord"
        assert video.fps == pytest.approx(10) and video.duration == pytest.approx(2.0)
        assert [f.index for f in frames] == list(range(20))
        assert [f.timestamp for f in frames] == [i / 10 for i in range(20)]  # exact, no float32 on the way
        assert all(f.image.dtype == np.uint8 and f.image.shape == (48, 64, 3) for f in frames)
        for i, frame in enumerate(frames):  # RGB order, right picture
            assert np.abs(frame.image.astype(int) - videos.picture(i, 64, 48))[:, [0, 1, -2, -1]].max() < 24
        np.testing.assert_array_equal(video.array(), [f.image for f in frames])
        assert "20 of 20 frames" in repr(video)
    with pytest.raises(ValueError, match="closed"):
        next(iter(video))


@pytest.mark.parametrize("name", ["a.mp4", "a.mkv", "a.webm", "a.avi"])
@pytest.mark.parametrize("pick", [{}, {"fps": 2.5}, {"frames": 3}, {"frames": 1}])
def test_both_readers_agree(tmp_path, monkeypatch, name, pick):
    codec = {"a.webm": "libvpx-vp9", "a.avi": "mpeg4"}.get(name, "libx264")
    path = videos.write(tmp_path / name, count=30, codec=codec, gop=7)
    first = open_video(path, **pick)
    monkeypatch.setattr("mmkv.video._open_decord", lambda *_: None)
    second = open_video(path, **pick)
    assert second.reader == "pyav"
    assert first.timestamps == second.timestamps and first.indices == second.indices
    difference = np.abs(first.array().astype(int) - second.array())
    assert difference.max() <= 8 and difference.mean() < 1  # two builds of one decoder and colour converter


def test_pyav_where_decord_is_missing(clip, no_decord):
    video = open_video(clip)
    assert video.reader == "pyav" and len(list(video)) == 20
    assert readers()["decord"] is None and readers()["pyav"]


def test_pyav_where_decord_fails_to_open(clip, monkeypatch):
    import decord

    def fail(*_, **__):
        raise RuntimeError("cannot")

    monkeypatch.setattr(decord, "VideoReader", fail)
    assert open_video(clip).reader == "pyav"


def test_pyav_takes_over_where_decord_gives_up(clip, monkeypatch):
    import mmkv.video as module

    whole = open_video(clip).array()
    real, calls = module._decord_frame, []
    monkeypatch.setattr(module, "_decord_frame", lambda r, i: calls.append(i) or (real(r, i) if i < 5 else None))
    video = open_video(clip)
    assert video.reader == "decord"
    assert np.abs(video.array().astype(int) - whole).max() <= 8
    assert video.reader == "pyav"


@pytest.mark.parametrize("reader", ["decord", "pyav"])
def test_variable_frame_rate(tmp_path, monkeypatch, reader):
    times = [0, 100, 150, 400, 900, 1000]
    path = videos.write(tmp_path / "vfr.mp4", count=6, times=times)
    if reader == "pyav":
        monkeypatch.setattr("mmkv.video._open_decord", lambda *_: None)
    video = open_video(path)
    assert video.reader == reader
    assert [f.timestamp for f in video] == [t / 1000 for t in times]
    # What is on show at 0, 0.2, 0.4, 0.6, 0.8 and 1 s; the frame of 0.4 s is held.
    again = open_video(path, fps=5)
    assert [f.index for f in again][:6] == [0, 2, 3, 3, 3, 5] and again.sample_fps == 5
    assert np.abs(again.array()[2].astype(int) - video.array()[3]).max() == 0


def test_fps_and_frames(clip):
    assert open_video(clip, fps=2).indices == [0, 5, 10, 15]
    assert open_video(clip, fps=10).indices == list(range(20))
    assert open_video(clip, fps=3).indices == [0, 3, 6, 10, 13, 16]
    assert open_video(clip, frames=5).indices == [0, 5, 10, 14, 19]
    assert open_video(clip, frames=1).indices == [10]
    assert open_video(clip, frames=5).sample_fps == pytest.approx(4 / 1.9)


@pytest.mark.parametrize(
    ("pick", "says"),
    [
        ({"fps": 1, "frames": 2}, "not both"),
        ({"fps": 0}, "positive"),
        ({"fps": -1.0}, "positive"),
        ({"fps": float("nan")}, "positive"),
        ({"frames": 0}, "positive"),
        ({"frames": 2.0}, "whole"),
        ({"frames": 21}, r"21 frames.*20"),
        ({"fps": 30}, r"30 frames a second.*10"),
    ],
)
def test_impossible_sampling(clip, pick, says):
    with pytest.raises(ValueError, match=says):
        open_video(clip, **pick)


@pytest.mark.parametrize("size", [(64, 48), (66, 50)])  # the first is one that decord2 3.4 gets wrong
def test_turned_upright(tmp_path, monkeypatch, size):
    path = videos.turn(videos.write(tmp_path / "turned.mp4", count=4, size=size), size[1])
    video = open_video(path)
    assert (video.height, video.width) == size
    monkeypatch.setattr("mmkv.video._open_decord", lambda *_: None)
    np.testing.assert_allclose(open_video(path).array().astype(int), video.array(), atol=8)
    assert video.array()[0, 0, 0, 0] > 150 > video.array()[0, -1, 0, 0]  # red has gone from the left to the top


def test_sound_beside_the_picture(tmp_path):
    assert len(open_video(videos.write(tmp_path / "both.mp4", sound=True))) == 20


def broken(kind, folder):
    path = folder / f"{kind}.mp4"
    if kind == "empty":
        path.write_bytes(b"")
    elif kind == "text":
        path.write_text("hello\n" * 100)
    elif kind == "directory":
        path.mkdir()
    elif kind == "audio":
        videos.write(path, count=0, sound=True)
    elif kind == "header only":
        videos.cut(videos.write(path), 0.02)
    elif kind == "truncated":
        videos.cut(videos.write(path), 0.6)
    elif kind == "truncated after its index":
        videos.cut(videos.write(path, faststart=True), 0.7)
    elif kind == "truncated matroska":
        path = videos.cut(videos.write(folder / "cut.mkv", count=60), 0.5)
    elif kind == "image":
        import cv2

        path = folder / "image.png"
        cv2.imwrite(str(path), np.zeros((8, 8, 3), np.uint8))
    elif kind == "note":
        path = folder / "note.txt"
        path.write_text("hello\n" * 100)
    return path


@pytest.mark.parametrize(
    ("kind", "says"),
    [
        ("empty", "0 bytes"),
        ("text", "not a video"),
        ("note", "not a video"),
        ("image", "not a video"),
        ("directory", "directory"),
        ("audio", "no picture track"),
        ("header only", "not a video"),
        ("truncated", "truncated"),
        ("truncated after its index", "truncated"),
        ("truncated matroska", "truncated"),
    ],
)
def test_broken_files(tmp_path, kind, says):
    path = broken(kind, tmp_path)
    with pytest.raises(VideoError, match=says) as caught:
        open_video(path)
    assert "\n" not in str(caught.value) and path.name in str(caught.value)


def damaged(path):
    """A file whose second half of pictures is garbage."""
    videos.write(path, count=60, faststart=True)
    data = bytearray(path.read_bytes())
    start = data.find(b"mdat")
    for i in range(start + (len(data) - start) // 2, len(data)):
        data[i] = (data[i] * 7 + 13) % 256
    path.write_bytes(data)
    return path


def test_damaged_in_the_middle(tmp_path):
    path = damaged(tmp_path / "damaged.mp4")
    with pytest.raises(VideoError, match="damaged"):
        open_video(path).array()


def test_damaged_with_logging_on(tmp_path):
    """PyAV's logging, which older torchvision turns on, calls Python from decoder threads: freeing one must not wait for it."""
    path = damaged(tmp_path / "damaged.mp4")
    code = f"""
import av
av.logging.set_level(av.logging.ERROR)
from mmkv import video
from mmkv.video import VideoError, open_video
video._open_decord = lambda *_: None
for _ in range(30):
    try:
        open_video({str(path)!r}).array()
    except VideoError as error:
        assert "damaged" in str(error)
    else:
        raise SystemExit("not noticed")
"""
    done = subprocess.run([sys.executable, "-c", code], timeout=120, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


def test_missing_file(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"no such video file: .*gone\.mp4"):
        open_video(tmp_path / "gone.mp4")


@pytest.mark.parametrize("reader", ["decord", "pyav"])
def test_memory_is_bounded(tmp_path, monkeypatch, reader):
    path = videos.write(tmp_path / "long.mp4", count=150, size=(320, 240))
    if reader == "pyav":
        monkeypatch.setattr("mmkv.video._open_decord", lambda *_: None)
    video = open_video(path)
    tracemalloc.start()
    assert sum(1 for _ in video) == 150
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 10 * 320 * 240 * 3  # all frames would be 150 of them
