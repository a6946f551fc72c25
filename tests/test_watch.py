"""`mmkv watch` and `mmkv ask --store`: encoded in one process, asked in another, stopped and gone on with."""

from __future__ import annotations

import pytest
from typer.testing import CliRunner

from mmkv.cli import app
from mmkv.models import tiny
from mmkv.models.tiny import world

QUESTION = "which colour appears first?"


@pytest.fixture(scope="module")
def clip(tmp_path_factory):
    video = world.make_video(2**42, frames=64)
    path = tmp_path_factory.mktemp("videos") / "video.mp4"
    world.write_mp4(video.frames, path)
    return path, next(q.answer for q in video.questions if q.text == QUESTION)


def run(*words, code=0):
    found = CliRunner().invoke(app, [str(w) for w in words])
    assert found.exit_code == code, found.output + found.stderr
    return found


def test_watched_once_and_asked_twice(clip, tmp_path):
    path, answer = clip
    store = f"disk:{tmp_path / 'memory'}"
    said = run("watch", path, "--store", store).output
    assert "32 frames remembered" in said
    found = run("ask", "--store", store, QUESTION, "where is the circle?")
    assert found.output.splitlines()[0] == answer
    assert "first word after" in found.stderr
    again = run("watch", path, "--store", store)  # nothing is left to do
    assert again.output == said


def test_goes_on_where_it_was_stopped(clip, tmp_path, monkeypatch):
    from mmkv.streaming.stream import Stream

    path, answer = clip
    store = f"disk:{tmp_path / 'memory'}"
    whole = Stream.watch
    calls = []

    def stopping(self, *args, **kwargs):
        calls.append(1)
        if len(calls) == 3:
            raise ValueError("stopped")
        return whole(self, *args, **kwargs)

    monkeypatch.setattr(Stream, "watch", stopping)
    assert "stopped" in run("watch", path, "--store", store, code=2).stderr
    monkeypatch.setattr(Stream, "watch", whole)
    assert "32 frames remembered" in run("watch", path, "--store", store).output
    straight = f"disk:{tmp_path / 'straight'}"
    run("watch", path, "--store", straight)
    broken, whole = (run("ask", "--store", where, QUESTION) for where in (store, straight))
    assert broken.stdout == whole.stdout
    # the frames it came from, too; how long that took may differ
    assert broken.stderr.partition("first word")[0] == whole.stderr.partition("first word")[0]
    assert "most of all those at" in whole.stderr
    assert broken.stdout.splitlines()[0] == answer


def test_packed_frames_take_less_and_answer(clip, tmp_path):
    path, answer = clip
    run("watch", path, "--store", f"disk:{tmp_path / 'dense'}")
    run("watch", path, "--store", f"disk:{tmp_path / 'small'}", "--packed", "int4")
    size = {n: sum(f.stat().st_size for f in (tmp_path / n).rglob("*")) for n in ("dense", "small")}
    assert size["small"] < 0.6 * size["dense"]
    assert run("ask", "--store", f"disk:{tmp_path / 'small'}", QUESTION).output.splitlines()[0] == answer


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (("watch", "VIDEO", "--store", "ram"), "disk:FOLDER"),
        (("ask", "--store", "disk:NOWHERE", QUESTION), "holds no store"),
        (("ask", "VIDEO"), "a question is missing"),
        (("watch", "NOFILE", "--store", "disk:NOWHERE"), "NOFILE"),
        (("watch", "VIDEO", "--store", "disk:NOWHERE", "--packed", "int3"), "int3"),
    ],
)
def test_refused(clip, tmp_path, words, said):
    names = {"VIDEO": clip[0], "disk:NOWHERE": f"disk:{tmp_path / 'nowhere'}", "NOFILE": tmp_path / "NOFILE"}
    found = run(*(names.get(w, w) for w in words), code=2)
    assert said in found.stderr
    assert len(found.stderr.strip().splitlines()) == 1


def test_what_came_before_the_damage_is_kept(clip, tmp_path):
    """A file that ends in the middle: its error is raised, and all whole frames before it can be asked about."""
    import mmkv
    from mmkv._watch import watch
    from mmkv.video import VideoError

    whole = mmkv.open_video(clip[0], fps=2)

    class Broken:
        path, sample_fps = whole.path, whole.sample_fps

        def __iter__(self):
            for number, frame in enumerate(whole):
                if number == 21:
                    raise VideoError("damaged")
                yield frame

    model, processor = tiny.load()
    store = f"disk:{tmp_path / 'memory'}"
    with pytest.raises(VideoError, match="damaged"):
        watch(model, processor, Broken(), store, window=4000, packed=None, tick=lambda n: None)
    with mmkv.stream(model, processor, store=store, mode="read") as memory:
        assert memory.frames == 10  # the last picture makes no frame alone
        assert memory.answer(QUESTION).text
    assert watch(model, processor, whole, store, window=4000, packed=None, tick=lambda n: None)[0] == 32


def test_another_video_is_refused(clip, tmp_path):
    store = f"disk:{tmp_path / 'memory'}"
    run("watch", clip[0], "--store", store)
    other = tmp_path / "other.mp4"
    world.write_mp4(world.make_video(2**42 + 1, frames=64).frames, other)
    assert "another video" in run("watch", other, "--store", store, code=2).stderr
    model, processor = tiny.load()  # another dtype than the command's: another model
    import mmkv

    with pytest.raises(ValueError, match="another model"):
        mmkv.stream(model, processor, store=store, mode="read")
