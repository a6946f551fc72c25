"""Which frames are shown, and the cache that keeps them."""

from __future__ import annotations

import os

import numpy as np
import pytest
from videos import cut, write

from mmkv.eval.frames_cache import FramesCache, key
from mmkv.eval.sampling import Sampling, linspace, read_clip, vlmeval
from mmkv.video import VideoError


def test_golden_indices():
    assert linspace(300, 8) == [0, 42, 85, 128, 170, 213, 256, 299]
    assert vlmeval(300, 8) == [33, 66, 100, 133, 166, 200, 233, 266]


def brightness(clip):
    """The number that each frame of tests/videos.py tells by its right side."""
    return [round(float(frame[:, 40:].mean()) / 12) for frame in clip.frames]


def test_frames_are_those_of_the_indices(tmp_path):
    path = write(tmp_path / "a.mp4", count=20, fps=10)
    clip = read_clip(path, Sampling(frames=4))
    assert brightness(clip) == [0, 6, 12, 19]  # 0, 6.33, 12.67, 19
    assert clip.timestamps == pytest.approx((0.0, 0.6, 1.2, 1.9))
    assert clip.fps == pytest.approx(3 / 1.9)
    assert (clip.frame_count, clip.asked, clip.short) == (20, 4, False)
    assert brightness(read_clip(path, Sampling(frames=4, sampler="vlmeval"))) == [4, 8, 12, 16]


def test_short_video_gives_all_it_has_once(tmp_path):
    clip = read_clip(write(tmp_path / "a.mp4", count=5), Sampling(frames=32))
    assert brightness(clip) == [0, 1, 2, 3, 4]
    assert clip.short and clip.asked == 32


def test_rate(tmp_path):
    path = write(tmp_path / "a.mp4", count=20, fps=10)
    assert brightness(read_clip(path, Sampling(fps=2))) == [0, 5, 10, 15]
    assert len(read_clip(path, Sampling(fps=30)).frames) == 20  # no faster than the file, no frame twice


def test_window(tmp_path):
    path = write(tmp_path / "a.mp4", count=20, fps=10)
    assert brightness(read_clip(path, Sampling(frames=3, start=0.5, end=1.0))) == [5, 7, 10]
    with pytest.raises(ValueError, match="no frame between 5 and 6 s"):
        read_clip(path, Sampling(frames=3, start=5, end=6))


def test_large_frames_shrink(tmp_path):
    clip = read_clip(write(tmp_path / "a.mp4", count=3, size=(64, 48)), Sampling(frames=2, max_pixels=800))
    assert clip.frames.shape == (2, 24, 32, 3)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (dict(), "give one of the two"),
        (dict(frames=4, fps=1.0), "give one of the two"),
        (dict(frames=0), "whole numbers from 1"),
        (dict(frames=True), "whole numbers from 1"),
        (dict(fps=0.0), "above 0"),
        (dict(frames=4, sampler="random"), "possible are linspace, vlmeval"),
        (dict(frames=4, max_pixels=1), "possible are areas from"),
    ],
)
def test_refusals(options, message):
    with pytest.raises(ValueError, match=message):
        Sampling(**options)


def test_second_reading_comes_from_the_cache(tmp_path):
    path, cache = write(tmp_path / "a.mp4"), FramesCache(tmp_path / "frames")
    first, second = cache.read(path, Sampling(frames=4)), cache.read(path, Sampling(frames=4))
    assert np.array_equal(first.frames, second.frames)
    assert vars(first) | dict(frames=None) == vars(second) | dict(frames=None)
    assert (cache.throughput.decoded, cache.throughput.cached, cache.throughput.frames) == (1, 1, 4)
    assert "1 videos decoded, 4 frames" in str(cache.throughput) and "1 from the cache" in str(cache.throughput)


def test_key_is_of_the_content_and_of_the_choice(tmp_path):
    one, other = write(tmp_path / "a.mp4"), write(tmp_path / "b.mp4")
    assert key(one, Sampling(frames=4)) == key(other, Sampling(frames=4))  # the same bytes under two names
    assert key(one, Sampling(frames=4)) != key(one, Sampling(frames=5))
    assert key(one, Sampling(frames=4)) != key(one, Sampling(frames=4, max_pixels=800))
    write(one, count=19)
    assert key(one, Sampling(frames=4)) != key(other, Sampling(frames=4))


def test_least_recently_used_go_first(tmp_path):
    paths = [write(tmp_path / f"{n}.mp4", count=n) for n in (10, 11, 12)]
    # four frames of 64 x 48 x 3 bytes are 36,864 and some hundred bytes of file around them: two entries fit
    cache = FramesCache(tmp_path / "frames", limit=80_000)
    for age, path in enumerate(paths[:2]):
        cache.read(path, Sampling(frames=4))
        os.utime(cache.folder / (key(path, Sampling(frames=4)) + ".npz"), (age, age))
    cache.read(paths[0], Sampling(frames=4))  # used again: the other one is older now
    cache.read(paths[2], Sampling(frames=4))
    there = {entry.stem for entry in cache.folder.glob("*.npz")}
    assert there == {key(paths[0], Sampling(frames=4)), key(paths[2], Sampling(frames=4))}


def test_damaged_entry_is_read_anew(tmp_path):
    path, cache = write(tmp_path / "a.mp4"), FramesCache(tmp_path / "frames")
    cache.read(path, Sampling(frames=4))
    (entry,) = cache.folder.glob("*.npz")
    entry.write_bytes(entry.read_bytes()[:1000])
    assert len(cache.read(path, Sampling(frames=4)).frames) == 4
    assert cache.throughput.decoded == 2


def test_no_folder_keeps_nothing(tmp_path):
    path, cache = write(tmp_path / "a.mp4"), FramesCache(None)
    cache.read(path, Sampling(frames=2))
    cache.read(path, Sampling(frames=2))
    assert cache.throughput.decoded == 2
    with pytest.raises(FileNotFoundError):
        cache.read(tmp_path / "nowhere.mp4", Sampling(frames=2))
    with pytest.raises(VideoError):
        FramesCache(tmp_path / "frames").read(cut(path, 0.5), Sampling(frames=2))
