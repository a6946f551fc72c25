"""The page of `mmkv demo` in a real browser: Debian's Chromium, driven by Playwright. Nothing is downloaded."""

from __future__ import annotations

import re
import shutil

import pytest

from mmkv.demos.page import serve
from mmkv.demos.page.options import Limits
from mmkv.models import tiny
from mmkv.models.tiny import world

pytest.importorskip("gradio", reason=serve.INSTALL)
api = pytest.importorskip("playwright.sync_api", reason="needs Playwright: pip install playwright")
CHROMIUM = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
pytestmark = pytest.mark.skipif(CHROMIUM is None, reason="needs Chromium: apt-get install chromium")

SOMETHING = re.compile(r"\w")
FAKE_WEBCAM = ["--use-fake-device-for-media-stream", "--use-fake-ui-for-media-stream"]


@pytest.fixture(scope="module")
def site():
    """(address, visitors) of a page over the bundled model."""
    limits = Limits(minutes=3, megabytes=1, users=3, window=512, retrieve=32)
    with serve.served(*tiny.load("cpu"), "tiny", limits, True) as served:
        yield served


@pytest.fixture(scope="module")
def playwright():
    with api.sync_playwright() as made:
        yield made


@pytest.fixture(scope="module")
def browser(playwright):
    made = playwright.chromium.launch(executable_path=CHROMIUM, args=["--no-sandbox", *FAKE_WEBCAM])
    yield made
    made.close()


@pytest.fixture
def enter(site, browser):
    """Call for a new user's page. Behind the test: no page asked for anything outside, and none had an error of its own."""
    contexts, outside, broken = [], [], []

    def call(**options):
        context = browser.new_context(**options)
        contexts.append(context)
        page = context.new_page()
        page.set_default_timeout(60_000)
        own = (site[0], "data:", "blob:", site[0].replace("http", "ws"))
        page.on("request", lambda r: None if r.url.startswith(own) else outside.append(r.url))
        page.on("pageerror", lambda error: broken.append(str(error)))
        page.goto(site[0])
        page.locator("#ask").wait_for()
        return page

    yield call
    for context in contexts:
        context.close()
    assert not outside
    assert not broken


@pytest.fixture(scope="module")
def film(tmp_path_factory):
    """(file, video) of which the right answers are known."""
    video = world.make_video(2**42, frames=64)
    path = tmp_path_factory.mktemp("film") / "film.mp4"
    world.write_mp4(video.frames, path)
    return path.rename(path.with_name("my <b>film.mp4")), video


def right(video, task):
    return next((q.text, q.answer) for q in video.questions if q.task == task)


def upload(page, path):
    page.get_by_role("tab", name="Upload").click()
    page.locator("#upload input[type=file]").set_input_files(path)


def watched(page, state="done"):
    page.locator(f'#panel [data-state="{state}"]').wait_for()


def ask(page, question):
    """Ask in words and wait for the whole answer; its message."""
    before = page.locator("#chat .bot.message").count()
    page.locator("#question textarea").fill(question)
    page.locator("#ask").click()
    return answer(page, before)


def answer(page, before):
    """What the page says once the frames of that very answer are shown: they come with its end."""
    page.locator(f'#gallery [data-answer="{before + 1}"] .frames img').first.wait_for()
    return page.locator("#chat .bot.message").nth(before)


def says(message, wanted):
    """Gradio draws the parts of one update one after the other, hence an assertion that waits."""
    api.expect(message).to_have_text(wanted, use_inner_text=True)


def toast(page):
    found = page.locator(".toast-body").last
    found.wait_for()
    text = found.inner_text()
    assert "Traceback" not in text
    return text


def test_upload_watch_ask_and_a_broken_file(enter, film, tmp_path):
    page = enter(viewport={"width": 1280, "height": 900})
    path, video = film
    upload(page, path)
    watched(page)
    text = page.locator("#panel").inner_text()
    assert "film.mp4: watched" in text
    assert page.locator("#panel b").count() == 1  # the name is text, not markup
    assert "64 of 64 pictures · 32 frames stored" in text
    assert page.get_by_role("progressbar").get_attribute("aria-valuenow") == "100"
    page.locator("#charts svg polygon").nth(1).wait_for(state="attached")
    assert page.locator("#charts svg polyline").count() == 1

    question, wanted = right(video, "first")
    says(ask(page, question), wanted)
    frames = page.locator("#gallery figure")
    assert frames.count() >= 4
    assert re.match(r"\d+:\d\d\.\d", frames.first.inner_text())
    first = page.locator("#gallery").inner_text()
    question, wanted = right(video, "last")
    says(ask(page, question), wanted)
    assert page.locator("#gallery").inner_text() != first

    broken = tmp_path / "broken.mp4"
    broken.write_bytes(path.read_bytes()[:-2000])
    upload(page, broken)
    told = toast(page)
    assert "broken.mp4" in told
    assert "/" not in told.replace("and/or", "")
    question, wanted = right(video, "first")
    says(ask(page, question), wanted)  # what was watched before is still there


def test_a_file_that_breaks_midway_stays_askable(enter, film, tmp_path):
    page = enter()
    path, video = film
    data = bytearray(path.read_bytes())
    start = data.find(b"mdat")
    size = int.from_bytes(data[start - 4 : start], "big")
    data[start + size // 2 : start + size - 8] = bytes(size - 8 - size // 2)
    damaged = tmp_path / "damaged.mp4"
    damaged.write_bytes(data)
    upload(page, damaged)
    page.locator('#panel [data-state="failed"]').wait_for()
    assert "damaged.mp4" in page.locator("#panel [role=alert]").inner_text()
    assert str(tmp_path) not in page.locator("body").inner_text()
    question, wanted = right(video, "first")
    says(ask(page, question), wanted)


def test_samples_suggestions_and_words_it_does_not_know(enter):
    page = enter()
    page.locator("#question textarea").fill("which colour appears first?")
    page.locator("#ask").click()
    assert "nothing is being watched yet" in toast(page)
    page.locator("#sample-0").click()
    watched(page)
    page.locator("#suggestions button.gallery-item").first.click()
    says(answer(page, 0), SOMETHING)
    page.locator("#question textarea").fill("who is the president?")
    page.locator("#ask").click()
    page.get_by_text("try one of the suggested questions").wait_for()
    page.locator("#sample-1").click()  # a new video begins with an empty chat
    page.locator("#chat .bot.message").first.wait_for(state="detached")
    page.locator("#gallery .empty").wait_for()


def test_two_users_have_separate_videos(enter, site):
    one, two = enter(), enter()
    one.locator("#sample-0").click()
    watched(one)
    assert two.locator('#panel [data-state="idle"]').count() == 1
    two.locator("#sample-1").click()
    watched(two)
    assert "64 frames stored" in two.locator("#panel").inner_text()
    assert "32 frames stored" in one.locator("#panel").inner_text()


def test_a_file_that_is_too_large_and_one_that_is_no_video(enter, tmp_path):
    page = enter()
    large = tmp_path / "large.mp4"
    large.write_bytes(bytes(2 * 2**20))
    upload(page, large)
    toast(page)
    assert page.locator('#panel [data-state="idle"]').count() == 1
    page = enter()
    listed = tmp_path / "list.mp4"
    listed.write_text("#EXTM3U\n#EXTINF:1,\nfile:///etc/passwd\n")
    upload(page, listed)
    assert "list.mp4 is not a video that this page takes" in toast(page)


def test_webcam(enter):
    page = enter(permissions=["camera"])
    page.get_by_role("tab", name="Webcam").click()
    page.get_by_role("button", name="Click to Access Webcam").click()
    page.locator("#webcam").get_by_role("button", name="capture photo").click()  # in a stream it records
    watched(page, "watching")
    page.get_by_text(re.compile(r"[1-9]\d* frames stored")).wait_for()
    says(ask(page, "how many objects are there?"), SOMETHING)
    page.locator("#stop").click()
    watched(page, "stopped")
    says(ask(page, "which colour appears first?"), SOMETHING)


def test_a_webcam_that_is_not_there(playwright, site):
    bare = playwright.chromium.launch(executable_path=CHROMIUM, args=["--no-sandbox"])
    page = bare.new_page()
    page.goto(site[0])
    page.get_by_role("tab", name="Webcam").click()
    page.get_by_role("button", name="Click to Access Webcam").click()
    page.get_by_text("this machine has no webcam that the browser can see").wait_for()
    bare.close()


def test_narrow_and_dark(enter):
    page = enter(viewport={"width": 400, "height": 800}, color_scheme="dark")
    page.locator("#sample-0").click()
    watched(page)
    ask(page, "which colour appears first?")
    assert page.evaluate("document.documentElement.scrollWidth") <= 400
    light, dark = (page.locator(s).first.evaluate("e => getComputedStyle(e).color") for s in ("#panel p", "#gallery p"))
    assert light == dark != "rgb(0, 0, 0)"
