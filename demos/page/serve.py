"""Start the page: model, samples, limits, and a server that shows nothing but the page."""

from __future__ import annotations

import socket
import tempfile
import threading
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from mmkv.demos.page.options import Limits

INSTALL = 'the page needs Gradio, which is not installed: pip install "mmkv[demo]"'


def check_installed() -> None:
    """Raise ValueError where Gradio is missing or too old."""
    try:
        import gradio
    except ImportError as error:
        raise ValueError(INSTALL) from error
    if int(gradio.__version__.split(".")[0]) < 6:
        raise ValueError(
            f'the page needs Gradio 6 or newer, not {gradio.__version__}: pip install --upgrade "mmkv[demo]"'
        )


def _check_place(host: str, port: int | None) -> None:
    """Raise ValueError where nobody can listen; Gradio would write a log of its own about it."""
    try:
        where = socket.getaddrinfo(host, port or 0, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE)[0]
        with socket.socket(*where[:3]) as probe:
            probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            probe.bind(where[4])
    except OSError as error:
        raise ValueError(f"cannot listen on {host} port {port or '7860 and on'}: {error.strerror or error}") from error


@contextmanager
def served(
    model: Any, processor: Any, model_name: str, limits: Limits, bundled: bool,
    host: str = "127.0.0.1", port: int | None = None, share: bool = False,
) -> Iterator[Any]:  # fmt: skip
    """Serve the page inside a `with`; yields (address, visitors). Everything is freed behind it.

    Args:
        model, processor: to answer with.
        model_name: as the page shows it.
        limits: for users.
        bundled: whether it is the bundled model.
        host: address to listen on; other machines reach the page if it is none of the loopback's.
        port: None takes the first free one from 7860 on.
        share: whether Gradio opens a public tunnel to the page.

    Raises:
        ValueError: Gradio is missing, or the port is taken.
    """
    check_installed()
    _check_place(host, port)
    import gradio as gr

    from mmkv.demos.page.app import Page, build
    from mmkv.demos.page.samples import write_samples
    from mmkv.demos.page.style import CSS
    from mmkv.demos.page.visitors import Visitors

    with tempfile.TemporaryDirectory(prefix="mmkv-page-") as folder:
        root = Path(folder)
        visitors = Visitors(model, processor, limits, root)
        blocks = build(Page(visitors, write_samples(root), bundled), model_name, limits)
        fonts = ["system-ui", "sans-serif"], ["ui-monospace", "monospace"]  # of the reader's machine, none from the net
        try:
            _, address, public = blocks.queue(max_size=8 * limits.users).launch(
                server_name=host, server_port=port, share=share, prevent_thread_lock=True, quiet=True, inbrowser=False,
                show_error=False, allowed_paths=[], blocked_paths=[str(root)], max_file_size=f"{limits.megabytes}mb",
                footer_links=[], run_history=False, enable_monitoring=False, mcp_server=False, ssr_mode=False, pwa=False,
                state_session_capacity=16 * limits.users, css=CSS,
                theme=gr.themes.Default(font=fonts[0], font_mono=fonts[1]),
            )  # fmt: skip
        except OSError as error:
            raise ValueError(
                f"cannot listen on {host} port {port or '7860 to 7959'}: is it taken? choose another --port"
            ) from error
        try:
            yield public or address, visitors
        finally:
            blocks.close(verbose=False)
            visitors.close()


def wait() -> None:
    """Until Ctrl-C."""
    with suppress(KeyboardInterrupt):
        threading.Event().wait()
