"""The page of `mmkv demo` without a browser: uploads, sessions, visitors, and what its server shows."""

from __future__ import annotations

import sys
import threading
import urllib.error
import urllib.request

import numpy as np
import pytest
import videos

from mmkv.demos.page import memory, samples, serve, uploads, view
from mmkv.demos.page.options import FORMATS, Controls, Limits
from mmkv.demos.page.session import Session, one_line
from mmkv.demos.page.visitors import WEBCAM, Visitors
from mmkv.models import tiny
from mmkv.models.tiny import world
from mmkv.streaming.answer import Answer, Retrieved
from mmkv.streaming.stream import Stream

CONTROLS = Controls(window=512, retrieve=8)
LIMITS = Limits(minutes=2, megabytes=1, users=2, window=512, retrieve=8)


@pytest.fixture(scope="module")
def vlm():
    return tiny.load("cpu")


@pytest.fixture(scope="module")
def scene():
    return world.make_video(2**42, frames=32)


@pytest.fixture
def clip(tmp_path, scene):
    path = tmp_path / "clip.mp4"
    world.write_mp4(scene.frames, path)
    return path


@pytest.fixture
def stream(vlm):
    with Stream(*vlm, window=512, retrieve=8, fps=2.0, encode=4) as made:
        yield made


@pytest.fixture
def visitors(vlm, tmp_path):
    now = [0.0]
    root = tmp_path / "root"
    root.mkdir()
    made = Visitors(*vlm, LIMITS, root, clock=lambda: now[0])
    made.now = now
    yield made
    made.close()


def timed(frames, rate=2.0):
    return [(frame, k / rate) for k, frame in enumerate(frames)]


def reply(session, question="which colour appears first?"):
    *pieces, answer = session.ask(question, 8, "cosine")
    return pieces, answer


# --- options


@pytest.mark.parametrize(
    ("given", "name"),
    [
        (dict(minutes=0), "minutes=0"), (dict(minutes=True), "minutes=True"), (dict(megabytes=0), "megabytes=0"),
        (dict(users=1.5), "users=1.5"), (dict(store="tape"), "store='tape'"), (dict(store="disk:"), "store='disk:'"),
        (dict(fps=1000), "fps=1000"),
    ],
)  # fmt: skip
def test_limits_refuse(given, name):
    with pytest.raises(ValueError, match=f"^{name}.*possible are"):
        Limits(**given)


@pytest.mark.parametrize(
    "given", [dict(window=0), dict(retrieve=10**6), dict(method="x"), dict(packed="int3"), dict(store="disk:/etc")]
)
def test_controls_refuse(given):
    with pytest.raises(ValueError, match="possible are"):
        Controls(**{"window": 512, "retrieve": 8, **given})


# --- uploads


@pytest.mark.parametrize(
    "content",
    [b"#EXTM3U\n#EXTINF:1,\nfile:///etc/passwd\n", b"ffconcat version 1.0\nfile x.mp4\n", b"GIF89a" + bytes(99)],
)
def test_what_is_no_film_never_reaches_a_decoder(tmp_path, monkeypatch, content):
    path = tmp_path / "secret-folder.mp4"
    path.write_bytes(content)
    monkeypatch.setattr(uploads, "open_video", lambda *_, **__: pytest.fail("it was opened"))
    with pytest.raises(ValueError, match=r"^my\.mp4 is not a video that this page takes; possible are MP4"):
        uploads.open_upload(path, "my.mp4", LIMITS)


def test_large_long_and_empty_files(tmp_path, clip):
    large, empty = tmp_path / "large.mp4", tmp_path / "empty.mp4"
    large.write_bytes(bytes(2 * 2**20))
    empty.touch()
    with pytest.raises(ValueError, match=r"^a has 2 MB; this page takes up to 1 MB$"):
        uploads.open_upload(large, "a", LIMITS)
    with pytest.raises(ValueError, match=r"^b lasts 0\.3 min; this page takes up to 0\.1 min$"):
        uploads.open_upload(clip, "b", Limits(minutes=0.1))
    with pytest.raises(ValueError, match=r"^c is empty"):
        uploads.open_upload(empty, "c", LIMITS)


def test_errors_name_the_file_as_its_user_does(clip):
    videos.cut(clip, 0.5)
    with pytest.raises(ValueError, match=r"^cannot read my film\.mp4 as a video") as caught:
        uploads.open_upload(clip, "my film.mp4", LIMITS)
    assert str(clip.parent) not in str(caught.value)


@pytest.mark.parametrize("times", [None, [*range(0, 2000, 100), 5000]])
def test_times_ascend_also_where_a_picture_is_held(tmp_path, times):
    count = 40 if times is None else len(times)
    path = videos.write(tmp_path / "held.mp4", count=count, fps=10, times=times)
    video = uploads.open_upload(path, "held", LIMITS)
    seen = [at for _, at in uploads.pictures(video, 32, "held")]
    assert len(seen) == len(video)
    assert all(a < b for a, b in zip(seen, seen[1:]))
    assert max(abs(b - a) for a, b in zip(seen, seen[1:])) < 1.1


def test_pictures_are_shrunk_to_the_longer_side():
    assert uploads.shrink(np.zeros((100, 400, 3), np.uint8), 200).shape == (50, 200, 3)
    assert uploads.shrink(np.zeros((10, 20, 3), np.uint8), 200).shape == (10, 20, 3)
    assert uploads.shrink(np.zeros((1, 4000, 3), np.uint8), 100).shape == (1, 100, 3)


# --- memory


def test_history_is_bounded_and_keeps_the_newest():
    history = memory.History()
    for k in range(1, 5001):
        history.add(4 * k, 0.5, {"ram": k})
    assert memory.POINTS / 2 <= len(history.points) <= memory.POINTS
    assert all(point.fps == pytest.approx(8) for point in history.points)
    assert history.points[-1].frames > 4 * 5000 - 4 * history.every
    assert [p.frames for p in history.points] == sorted(p.frames for p in history.points)


def test_thumbnails_are_small():
    picture = np.random.default_rng(0).integers(0, 256, (720, 1280, 3)).astype(np.uint8)
    assert len(memory.jpeg(picture)) < 10_000


# --- sessions


def test_watched_in_the_background_and_asked_meanwhile(stream, scene):
    session = Session(stream, "film")
    gate = threading.Event()

    def pictures():
        for k, item in enumerate(timed(scene.frames)):
            if k == 20:
                gate.wait(30)
            yield item

    session.watch(pictures(), 32)
    while session.status.frames < 8:  # 16 pictures; more cannot come before the gate opens
        session.wait(0.01)
    _, early = reply(session)
    assert session.status.state == "watching"
    assert all(f.frame < 8 for f in early.frames)
    gate.set()
    now = session.wait(30)
    assert (now.state, now.done, now.total, now.frames, now.error) == ("done", 32, 32, 16, "")
    assert len(session.thumbs) == 16
    pieces, answer = reply(session)
    assert "".join(pieces).strip() == answer.text == next(q.answer for q in scene.questions if q.task == "first")
    assert session.history.points[-1].frames == 16
    assert session.history.points[-1].bytes["window"] > 0


def test_what_came_before_damage_can_be_asked_about(stream, scene):
    session = Session(stream, "film")

    def pictures():
        yield from timed(scene.frames[:11])
        raise ValueError("film is damaged\nand a second line")

    session.watch(pictures(), 32)
    now = session.wait(30)
    assert (now.state, now.frames, now.error) == ("failed", 5, "film is damaged")
    assert reply(session)[1].text
    assert 'role="alert">film is damaged' in view.panel(session)


def test_questions_that_cannot_be(stream, scene):
    session = Session(stream, "film")
    with pytest.raises(ValueError, match="nothing was watched yet"):
        reply(session)
    session.watch(timed(scene.frames))
    session.wait(30)
    first = session.ask("which colour appears first?", 8, "cosine")
    next(first)
    with pytest.raises(ValueError, match="still being answered"):
        reply(session)
    first.close()  # its reader is gone
    assert reply(session)[1].frames
    with pytest.raises(ValueError, match="more than the window"):
        reply(session, "red " * 1000)
    assert reply(session)[1].frames


def test_a_webcam_that_is_too_quick_loses_old_pictures(stream, scene):
    session = Session(stream, WEBCAM)
    for k, (picture, at) in enumerate(timed(scene.frames[:10])):
        session.see(picture, 100 + at)
        assert session.status.dropped == max(k - 3, 0)
    session.watch_webcam(60)
    while session.status.frames < 2:
        session.wait(0.01)
    for picture, at in timed(scene.frames[10:14]):
        session.see(picture, 105 + at)
    while session.status.frames < 4:
        session.wait(0.01)
    session.stop()
    now = session.wait(30)
    assert (now.state, now.frames, now.dropped) == ("stopped", 4, 6)
    assert stream.times[0] == 0
    assert reply(session)[1].text


def test_a_webcam_ends_with_its_time(stream, scene):
    session = Session(stream, WEBCAM)
    session.watch_webcam(2)
    for at in (0.0, 1.0, 2.5):
        session.see(scene.frames[0], at)
    now = session.wait(30)
    assert now.state == "failed"
    assert "the most that this page takes" in now.error
    assert now.frames == 1


def test_memory_has_an_end(stream, scene):
    session = Session(stream, "film", most=100_000)
    session.watch(timed(scene.frames), 32)
    now = session.wait(30)
    assert now.state == "failed"
    assert "the most for this page" in now.error
    assert 0 < now.frames < 16
    assert reply(session)[1].text


def test_pictures_of_another_size_are_an_error_in_words(stream, scene):
    session = Session(stream, "film")
    session.watch([*timed(scene.frames[:8]), (np.zeros((32, 32, 3), np.uint8), 9.0)])
    now = session.wait(30)
    assert (now.state, now.frames) == ("failed", 4)
    assert "picture of (32, 32)" in now.error


def test_the_unforeseen_is_logged_and_not_shown(caplog):
    assert one_line(RuntimeError("/srv/secret")) == "something went wrong on the server; its log says what"
    assert "/srv/secret" in caplog.text
    assert one_line(OSError(28, "No space left on device", "/srv/secret")) == "No space left on device"


# --- visitors


def test_everybody_has_a_stream_of_their_own(visitors, vlm, clip):
    one = visitors.watch_file("one", clip, CONTROLS, "film", upload=False)
    two = visitors.watch_file("two", clip, CONTROLS, "film", upload=False)
    assert one.stream is not two.stream
    with pytest.raises(ValueError, match=r"^2 videos are being held"):
        visitors.watch_file("three", clip, CONTROLS, "film", upload=False)
    again = visitors.watch_file("one", clip, CONTROLS, "film", upload=False)  # in place of their first
    assert visitors.session("one") is again
    one.close().join()
    visitors.leave("two")
    two.close().join()
    three = visitors.watch_file("three", clip, CONTROLS, "film", upload=False)
    assert three.wait(30).state == "done"
    visitors.close()
    assert not hasattr(vlm[0], "_mmkv")
    assert visitors._open == 0
    assert not list(visitors.root.iterdir())


def test_who_left_without_a_word_is_forgotten(visitors, clip):
    for user in ("one", "two"):
        visitors.watch_file(user, clip, CONTROLS, "film", upload=False)
    visitors.now[0] = 1000.0
    assert visitors.session("two") is not None  # heard of again
    visitors.watch_file("three", clip, CONTROLS, "film", upload=False)
    assert visitors.session("one") is None
    assert visitors.session("two") is not None


def test_uploads_are_moved_away_and_removed(visitors, clip, tmp_path):
    session = visitors.watch_file("one", clip, CONTROLS, "clip.mp4")
    assert not clip.exists()
    assert session.wait(30).state == "done"
    broken = tmp_path / "broken.mp4"
    broken.write_bytes(b"\0\0\0\x18ftypisom" + bytes(500))
    with pytest.raises(ValueError, match=r"broken\.mp4"):
        visitors.watch_file("one", broken, CONTROLS, "broken.mp4")
    assert not broken.exists()
    assert visitors.session("one") is session  # what was watched stays
    assert reply(session)[1].text
    assert visitors.leave("one") is None
    session.close().join()
    assert not list(visitors.root.iterdir())


@pytest.mark.parametrize("packed", FORMATS)
def test_a_memory_on_disk_goes_with_its_user(visitors, clip, packed):
    controls = Controls(512, 8, packed=packed, store="disk")
    session = visitors.watch_file("one", clip, controls, "film", upload=False)
    assert session.wait(30).state == "done"
    assert session.history.points[-1].bytes["disk"] > 0
    assert reply(session)[1].text
    visitors.close()
    assert not list(visitors.root.iterdir())


def test_webcam_of_a_visitor(visitors, scene, clip):
    first = visitors.watch_webcam("one", scene.frames[0], CONTROLS)
    visitors.now[0] = 0.5
    assert visitors.watch_webcam("one", scene.frames[1], CONTROLS) is first
    first.stop()
    first.wait(30)
    visitors.now[0] = 1.0
    assert visitors.watch_webcam("one", scene.frames[2], CONTROLS) is None  # stopped, and the webcam is still on
    visitors.now[0] = 9.0
    second = visitors.watch_webcam("one", scene.frames[2], CONTROLS)  # switched off and on
    assert second is not first
    film = visitors.watch_file("one", clip, CONTROLS, "film", upload=False)
    visitors.now[0] = 9.5
    assert visitors.watch_webcam("one", scene.frames[3], CONTROLS) is None
    assert visitors.session("one") is film


# --- what is shown


def test_names_are_escaped(stream):
    html = view.panel(Session(stream, "<script>alert(1)</script>"))
    assert "<script>" not in html
    assert "&lt;script&gt;" in html


def test_gallery_shows_the_most_wanted_in_order_of_time():
    frames = tuple(Retrieved(f, f / 2, 0.5 if f == 7 else 0.1, 4 if f % 2 else 1) for f in range(100))
    answer = Answer("red", frames, {"first_token": 0.1, "answer": 0.2}, {"ram": 2048})
    html = view.gallery(answer, [b"x"] * 90, 4)
    assert html.count("<figure") == view.SHOWN
    assert html.count('class="best" title="frame 7, 3.5 s, score 0.500, chosen by 4 of 4 layers"') == 1
    assert "100 frames retrieved, 24 shown" in html and "2.0 KiB held" in html
    assert html.index("0:03.5") < html.index("0:04.5")


def test_charts_and_clock():
    history = memory.History()
    assert "<polygon" not in view.charts(history)
    for k in (4, 8):
        history.add(k, 1.0, {"window": 10 * k, "ram": 100 * k, "disk": 0})
    html = view.charts(history)
    assert html.count("<polygon") == 2 and html.count("<polyline") == 1
    assert "880 B" in html and "4.0 frames/s" in html and "device" not in html
    assert [view.clock(s) for s in (0, 59.97, 75.5, 3725)] == ["0:00.0", "1:00.0", "1:15.5", "1:02:05.0"]
    assert [view.size(s) for s in (0, 1536, 3 * 2**30)] == ["0 B", "1.5 KiB", "3.0 GiB"]


def test_samples_and_suggestions_are_in_the_models_words(vlm, tmp_path):
    from mmkv.models.tiny.answer import unknown_words

    made = samples.write_samples(tmp_path)
    asked = [text for sample in made for text, _ in sample.questions] + samples.suggestions(True)
    assert len(asked) > 15
    assert not [text for text in asked if unknown_words(vlm[1], text)]
    assert samples.suggestions(False)


# --- the server and the command


def test_without_gradio_one_line_says_how(monkeypatch, capsys):
    from mmkv import cli

    monkeypatch.setitem(sys.modules, "gradio", None)
    monkeypatch.setattr(sys, "argv", ["mmkv", "demo"])
    with pytest.raises(SystemExit) as stopped:
        cli.main()
    assert stopped.value.code == 2
    assert capsys.readouterr().err == f"mmkv: {serve.INSTALL}\n"


def test_the_server_shows_no_file_and_no_interface(vlm, tmp_path):
    pytest.importorskip("gradio", reason=serve.INSTALL)
    secret = tmp_path / "secret.txt"
    secret.write_text("secret")
    with serve.served(*vlm, "tiny", LIMITS, True) as (address, visitors):
        assert address.startswith("http://127.0.0.1:")
        sample = visitors.root / "sample-1.mp4"
        assert sample.exists()
        for path in (secret, sample, "/etc/hostname", "pyproject.toml", "../../etc/hostname", serve.__file__):
            with pytest.raises(urllib.error.HTTPError) as refused:
                urllib.request.urlopen(f"{address}gradio_api/file={path}", timeout=30)
            assert refused.value.code in (403, 404), path
        with urllib.request.urlopen(address, timeout=30) as page:
            text = page.read().decode()
        assert str(visitors.root) not in text
        with urllib.request.urlopen(f"{address}gradio_api/info", timeout=30) as info:
            assert b'"named_endpoints":{}' in info.read().replace(b" ", b"")
        with (
            pytest.raises(ValueError, match="cannot listen on 127"),
            serve.served(*vlm, "tiny", LIMITS, True, port=int(address.rstrip("/").rsplit(":", 1)[1])),
        ):
            pass
    assert not sample.exists()
