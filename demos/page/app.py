"""The Gradio page: what is where, and which call follows which click."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import wraps
from html import escape
from pathlib import Path
from typing import Any

import gradio as gr

from mmkv.demos.page import view
from mmkv.demos.page.options import FORMATS, METHODS, STORES, Controls, Limits
from mmkv.demos.page.samples import Sample, suggestions
from mmkv.demos.page.session import one_line
from mmkv.demos.page.uploads import TYPES
from mmkv.demos.page.visitors import Visitors
from mmkv.streaming.answer import Answer

# Gradio says so itself where a user forbids the webcam; other failures of it end in the browser's console alone.
WEBCAM_ERRORS = """() => {
  const words = {
    NotFoundError: "this machine has no webcam that the browser can see",
    NotReadableError: "the webcam cannot be read; is another program using it?",
    OverconstrainedError: "the webcam has no mode that fits",
    AbortError: "the webcam stopped answering",
  };
  window.addEventListener("unhandledrejection", (event) => {
    const text = words[event.reason && event.reason.name];
    const note = document.querySelector("#webcam-error .wrong");
    if (!text || !note) return;
    event.preventDefault();
    note.textContent = text;
    note.hidden = false;
  });
}"""
TICK = 0.5  # seconds between two looks at a video that is being watched


def _told(error: BaseException) -> gr.Error:
    """A toast of one line. Gradio shows it as HTML, hence the escape."""
    return gr.Error(escape(one_line(error)), print_exception=False, duration=8)


def _safely(handler: Callable) -> Callable:
    """What goes wrong in a handler becomes a toast, never a traceback."""

    @wraps(handler)
    def call(*args, **kwargs):
        try:
            return handler(*args, **kwargs)
        except gr.Error:
            raise
        except Exception as error:
            raise _told(error) from error

    return call


class Page:
    """The handlers of one page.

    Args:
        visitors: everybody's sessions.
        samples: videos to choose from.
        bundled: whether the model is the bundled one, which knows few words.
    """

    def __init__(self, visitors: Visitors, samples: list[Sample], bundled: bool):
        self.visitors, self.samples, self.bundled = visitors, samples, bundled

    def sample(self, which: int, request: gr.Request, *given):
        chosen = self.samples[which]
        self.visitors.watch_file(_user(request), chosen.path, _controls(*given), chosen.name, upload=False)
        return *self._fresh(request), _chips(
            [text for text, _ in chosen.questions] if self.bundled else suggestions(False)
        )

    def upload(self, request: gr.Request, path: str | None, *given):
        if path is None:
            raise ValueError("no file arrived; choose a video")
        name = Path(path).name
        self.visitors.watch_file(_user(request), Path(path), _controls(*given), name)
        return *self._fresh(request), _chips(suggestions(self.bundled))

    def webcam(self, request: gr.Request, picture, *given):
        if picture is None:
            return gr.skip()
        before = self.visitors.session(_user(request))
        session = self.visitors.watch_webcam(_user(request), picture, _controls(*given))
        if session is None or session is before:
            return gr.skip()
        return *self._fresh(request), _chips(suggestions(self.bundled))

    def stop(self, request: gr.Request):
        session = self.visitors.session(_user(request))
        if session is None:
            raise ValueError("nothing is being watched")
        session.stop()
        return gr.Timer(active=True), gr.Button(interactive=False)

    def tick(self, request: gr.Request):
        session = self.visitors.session(_user(request))
        if session is None:
            return view.panel(None), view.charts(None), gr.Timer(active=False), gr.Button(interactive=False)
        running = session.status.state == "watching"
        rest = (
            (gr.skip(), gr.Button(interactive=True))
            if running
            else (gr.Timer(active=False), gr.Button(interactive=False))
        )
        return view.panel(session), view.charts(session.history), *rest

    def ask(self, request: gr.Request, question: str | list[str], chat: list[dict], *given) -> Iterator[tuple]:
        """Yields (chat, chat to keep, question box, gallery) with every piece of the answer."""
        try:
            text = (question[0] if isinstance(question, list) else question) or ""
            yield from self._ask(text.strip(), chat, _controls(*given), _user(request))
        except gr.Error:
            raise
        except Exception as error:
            raise _told(error) from error

    def _ask(self, question: str, chat: list[dict], controls: Controls, user: str) -> Iterator[tuple]:
        if not question:
            raise ValueError("an empty question; ask something in words")
        if len(question) > 2000:
            raise ValueError(f"a question of {len(question)} characters; up to 2000 are possible")
        session = self.visitors.session(user)
        if session is None:
            raise ValueError("nothing is being watched yet; choose a sample, a file or the webcam first")
        self._known_words(question)
        text, number = "", 1 + sum(said["role"] == "assistant" for said in chat)
        asked = [*chat, {"role": "user", "content": question}]
        for piece in session.ask(question, controls.retrieve, controls.method):
            if isinstance(piece, Answer):
                asked.append({"role": "assistant", "content": piece.text or "(empty answer)"})
                layers = len(session.stream.adapter.text_model.layers)
                yield asked, asked[-200:], "", view.gallery(piece, session.thumbs, layers, number)
            else:
                # the frames of the answer before would be taken for this one's
                frames = gr.skip() if text else view.gallery(None, ())
                text += piece
                yield [*asked, {"role": "assistant", "content": text}], gr.skip(), "", frames

    def _known_words(self, question: str) -> None:
        if not self.bundled:
            return
        from mmkv.models.tiny.answer import unknown_words

        unknown = unknown_words(self.visitors.processor, question)
        if unknown:
            raise ValueError(
                f"the bundled model knows a small synthetic world and not {', '.join(map(repr, unknown[:5]))}; "
                "try one of the suggested questions"
            )

    def _fresh(self, request: gr.Request) -> tuple:
        """(panel, charts, timer, stop, chat, chat to keep, gallery) for a video that has just begun."""
        session = self.visitors.session(_user(request))
        live = view.panel(session), view.charts(None), gr.Timer(active=True), gr.Button(interactive=True)
        return *live, [], [], view.gallery(None, ())

    def leave(self, request: gr.Request) -> None:
        self.visitors.leave(_user(request))


def _user(request: gr.Request) -> str:
    """Who asks; a call without a session of its own would share one with all such calls."""
    if not request.session_hash:
        raise ValueError("this call has no session; open the page in a browser")
    return request.session_hash


def _controls(window, retrieve, method, packed, store) -> Controls:
    return Controls(int(window), int(retrieve), method, packed, store)


def _chips(questions: list[str]) -> gr.Dataset:
    return gr.Dataset(samples=[[q] for q in questions])


def _sample(page: Page, which: int) -> Callable:
    """A handler for one button; Gradio looks for the request's annotation, which `partial` would hide."""

    def call(request: gr.Request, *given):
        return page.sample(which, request, *given)

    return call


def build(page: Page, model_name: str, limits: Limits) -> gr.Blocks:
    """The page itself, not yet served."""
    with gr.Blocks(title="mmkv demo", analytics_enabled=False, delete_cache=(3600, 3600), fill_width=True) as blocks:
        about = (
            "the bundled model: small, knows a world of coloured shapes, sometimes wrong"
            if page.bundled
            else model_name
        )
        gr.Markdown(f"# Watch a video, ask at any time\nAnswers: {about}. Memory: mmkv.")
        with gr.Row():
            with gr.Column(scale=5, min_width=320):
                with gr.Tabs():
                    with gr.Tab("Samples"), gr.Row():
                        buttons = [
                            gr.Button(s.name, size="sm", min_width=90, elem_id=f"sample-{k}")
                            for k, s in enumerate(page.samples)
                        ]
                    with gr.Tab("Upload"):
                        file = gr.File(
                            label=f"Video, up to {limits.megabytes} MB and {limits.minutes:g} min",
                            file_types=list(TYPES), height=130, elem_id="upload",
                        )  # fmt: skip
                    with gr.Tab("Webcam"):
                        cam = gr.Image(
                            sources=["webcam"], streaming=True, type="numpy", height=220, label="Webcam",
                            show_label=False, elem_id="webcam", buttons=[],
                        )  # fmt: skip
                        gr.HTML('<p class="wrong" role="alert" hidden></p>', elem_id="webcam-error")
                panel = gr.HTML(view.panel(None), elem_id="panel")
                stop = gr.Button("Stop watching", size="sm", elem_id="stop", interactive=False)
                with gr.Accordion("Settings", open=False):
                    retrieve = gr.Slider(
                        1, max(128, limits.retrieve), limits.retrieve, step=1, label="Frames retrieved, per layer"
                    )
                    method = gr.Radio(list(METHODS), value="cosine", label="Frames are chosen by")
                    gr.Markdown("For the next video:")
                    low, high = min(256, limits.window), max(32768, limits.window)
                    window = gr.Slider(low, high, limits.window, step=1, label="Window, tokens")
                    packed = gr.Radio(list(FORMATS), value="none", label="Stored keys and values are packed to")
                    store = gr.Radio(list(STORES), value=limits.store.partition(":")[0], label="Store")
            with gr.Column(scale=6, min_width=320):
                chat = gr.Chatbot(
                    label="Questions", height=340, render_markdown=False, buttons=[], feedback_options=None,
                    elem_id="chat", placeholder="Ask while the video is watched, as often as you like.",
                    allow_file_downloads=False,
                )  # fmt: skip
                with gr.Row():
                    question = gr.Textbox(
                        show_label=False, placeholder="Ask about what was watched so far", scale=5, max_lines=3,
                        max_length=2000, elem_id="question", container=False, min_width=180,
                    )  # fmt: skip
                    send = gr.Button("Ask", variant="primary", scale=1, min_width=70, elem_id="ask")
                chips = gr.Dataset(
                    components=[gr.Textbox(visible=False)], samples=[[q] for q in suggestions(page.bundled)],
                    label="Suggestions", elem_id="suggestions", samples_per_page=12, type="values",
                )  # fmt: skip
                gallery = gr.HTML(view.gallery(None, ()), elem_id="gallery")
        charts = gr.HTML(view.charts(None), elem_id="charts")
        kept, timer = gr.State([]), gr.Timer(TICK, active=False)

        controls = [window, retrieve, method, packed, store]
        live = [panel, charts, timer, stop]
        fresh = [*live, chat, kept, gallery, chips]
        quiet: dict[str, Any] = dict(api_visibility="private", show_progress="hidden")
        begins: dict[str, Any] = dict(quiet, concurrency_limit=limits.users, concurrency_id="begin")
        for k, button in enumerate(buttons):
            button.click(_safely(_sample(page, k)), controls, fresh, **begins)
        file.upload(_safely(page.upload), [file, *controls], fresh, **begins).then(lambda: None, None, file, **quiet)
        cam.stream(
            _safely(page.webcam), [cam, *controls], fresh, stream_every=1 / limits.fps,
            time_limit=limits.minutes * 60 + 60, concurrency_limit=limits.users, **quiet,
        )  # fmt: skip
        stop.click(_safely(page.stop), None, [timer, stop], **quiet)
        timer.tick(_safely(page.tick), None, live, concurrency_limit=None, **quiet)
        answers: dict[str, Any] = dict(
            outputs=[chat, kept, question, gallery], concurrency_limit=limits.users, concurrency_id="ask", **quiet
        )
        gr.on([question.submit, send.click], page.ask, [question, kept, *controls], **answers)
        chips.click(page.ask, [chips, kept, *controls], **answers)
        chat.clear(list, None, kept, **quiet)
        blocks.load(None, None, None, js=WEBCAM_ERRORS)
        blocks.unload(page.leave)
    return blocks
