"""The synthetic world: same seed, same video; every question has one answer; files keep their frames."""

import numpy as np
import pytest

from mmkv.models.tiny import world
from mmkv.models.tiny.words import EASY_FORMS, STRESS_FORMS, vocabulary


@pytest.mark.parametrize("split", ["easy", "stress"])
def test_seed_fixes_everything(split):
    a, b = (world.make_video(5, 32, split) for _ in range(2))
    assert np.array_equal(a.frames, b.frames) and a.questions == b.questions
    assert a.frames.shape == (32, 64, 64, 3) and a.frames.dtype == np.uint8
    assert not np.array_equal(a.frames, world.make_video(6, 32, split).frames)
    assert a.timestamps[1] == 0.5


@pytest.mark.parametrize("split", ["easy", "stress"])
def test_one_answer_per_question(split):
    for seed in range(40):
        answers = {}
        for q in world.make_video(seed, 64, split).questions:
            assert answers.setdefault(q.text, q.answer) == q.answer, q
            assert q.options.count(q.answer) == 1 and len(set(q.options)) == len(q.options)
            assert 1 <= len(q.answer.split()) <= 3


@pytest.mark.parametrize("split", ["easy", "stress"])
def test_every_word_is_known(split):
    known = set(vocabulary())
    for seed in range(20):
        for q in world.make_video(seed, 64, split).questions:
            assert set(q.text.replace("?", " ?").split()) | set(q.answer.split()) <= known


def test_every_task_occurs():
    for split, forms in (("easy", EASY_FORMS), ("stress", STRESS_FORMS)):
        tasks = {q.task for seed in range(20) for q in world.make_video(seed, 128, split).questions}
        assert tasks == set(forms)


def test_things_do_not_overlap_and_stay_visible():
    for seed in range(30):
        scene = world.make_scene(seed, 128, "stress")
        _, cover = world.render(scene, labels=True)
        assert (cover > 0.5).sum(0).max() <= 1
        for thing, area in zip(scene.things, cover, strict=True):
            shown = np.flatnonzero(area.max((1, 2)) > 0.5)
            assert shown[0] == thing.start and shown[-1] == thing.end - 1 and len(shown) >= 3


def test_starts_tell_the_order():
    for seed in range(60):
        starts = [o.start for o in world.make_scene(seed, 128, "easy").things]
        assert all(b - a >= 3 for a, b in zip(starts, starts[1:], strict=False))


def test_mp4_keeps_frames(tmp_path):
    video = world.make_video(1, 16, "easy")
    world.write_mp4(video.frames, tmp_path / "a.mp4")
    back = world.read_mp4(tmp_path / "a.mp4")
    assert back.shape == (16, 256, 256, 3)
    small = back.reshape(16, 64, 4, 64, 4, 3).mean((2, 4))
    assert np.abs(small - video.frames).mean() < 4


def test_unknown_split():
    with pytest.raises(ValueError, match="easy"):
        world.make_scene(0, 16, "hard")
