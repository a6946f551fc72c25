"""The page's own pieces of HTML: everything in them is escaped, and pictures are part of them, so no file is served."""

from __future__ import annotations

import base64
from collections.abc import Sequence
from html import escape

from mmkv.demos.page.memory import History
from mmkv.demos.page.session import Session
from mmkv.streaming.answer import Answer, Retrieved

SHOWN = 24  # frames in a gallery
TIERS = {"window": "#3b82f6", "index": "#f59e0b", "device": "#10b981", "ram": "#a855f7", "disk": "#94a3b8"}
WIDTH, HEIGHT = 320, 96  # of a chart's drawing
STATES = {
    "idle": "ready",
    "watching": "watching",
    "done": "watched",
    "stopped": "stopped; what was watched can be asked about",
    "failed": "ended early; what was watched can be asked about",
}


def clock(seconds: float) -> str:
    """75.5 -> "1:15.5"."""
    tenths = round(seconds * 10)
    minutes, rest = divmod(tenths, 600)
    hours, minutes = divmod(minutes, 60)
    return (f"{hours}:{minutes:02d}" if hours else f"{minutes}") + f":{rest // 10:02d}.{rest % 10}"


def size(count: float) -> str:
    """1536 -> "1.5 KiB"."""
    for unit in ("B", "KiB", "MiB", "GiB"):
        if count < 1024 or unit == "GiB":
            return f"{count:.0f} {unit}" if unit == "B" else f"{count:.1f} {unit}"
        count /= 1024
    raise AssertionError


def _image(data: bytes, alt: str) -> str:
    return f'<img alt="{escape(alt)}" src="data:image/jpeg;base64,{base64.b64encode(data).decode()}">'


def panel(session: Session | None) -> str:
    """What is being watched: the picture, a progress bar, the state in words, and an error if there was one."""
    if session is None:
        return '<div class="watch idle" data-state="idle"><div class="screen">Choose a video to watch</div></div>'
    now = session.status
    state = now.state if now.frames or now.state != "failed" else "broken"
    words = STATES.get(state, "could not be watched")
    share = now.done / now.total if now.total else (1.0 if now.state == "done" else 0.0)
    share = min(share, 1.0)
    screen = (
        _image(session.live, f"picture at {clock(now.seconds)}") if session.live else "waiting for the first picture"
    )
    count = f"{now.done} of {now.total} pictures" if now.total else f"{now.done} pictures"
    facts = [count, f"{now.frames} frames stored", clock(now.seconds)]
    if now.dropped:
        facts.append(f"{now.dropped} pictures skipped")
    bar = (
        f'<div class="bar" role="progressbar" aria-label="watched" aria-valuemin="0" aria-valuemax="100" '
        f'aria-valuenow="{share * 100:.0f}"><i style="width:{share * 100:.1f}%"></i></div>'
    )
    if not now.total and now.state == "watching":
        bar = '<div class="bar live" role="progressbar" aria-label="watching"><i></i></div>'
    wrong = f'<p class="wrong" role="alert">{escape(now.error)}</p>' if now.error else ""
    return (
        f'<div class="watch" data-state="{now.state}"><div class="screen">{screen}</div>{bar}'
        f'<p class="state"><b>{escape(now.name)}</b>: {words}</p><p class="facts">{" · ".join(facts)}</p>{wrong}</div>'
    )


def charts(history: History | None) -> str:
    """Memory by tier, stacked, and frames a second, over the frames that were watched."""
    points = history.points if history is not None else []
    total = [sum(p.bytes.get(t, 0) for t in TIERS) for p in points]
    speed = [p.fps for p in points]
    last = points[-1] if points else None
    legend = "".join(
        f'<span><i style="background:{colour}"></i>{tier} {size(last.bytes.get(tier, 0)) if last else "-"}</span>'
        for tier, colour in TIERS.items()
        if last is None or tier in last.bytes
    )
    frames = last.frames if last else 0
    memory = _chart("Memory held", size(total[-1]) if total else "-", _stacks(points, max(total, default=1)), frames)
    pace = _chart(
        "Encoding", f"{speed[-1]:.1f} frames/s" if speed else "-", _line(points, max(speed, default=1)), frames
    )
    return f'<div class="charts">{memory.replace("</figure>", f"<p class=legend>{legend}</p></figure>")}{pace}</div>'


def _chart(title: str, now: str, drawing: str, frames: int) -> str:
    return (
        f'<figure class="chart"><figcaption>{title} <b>{now}</b></figcaption>'
        f'<svg viewBox="0 0 {WIDTH} {HEIGHT}" preserveAspectRatio="none" role="img" aria-label="{title}: {now}">{drawing}</svg>'
        f'<div class="axis"><span>0</span><span>{frames} frames</span></div></figure>'
    )


def _xs(points: Sequence) -> list[float]:
    most = points[-1].frames or 1
    return [p.frames / most * WIDTH for p in points]


def _stacks(points: Sequence, most: float) -> str:
    if not points:
        return ""
    xs, below, drawn = _xs(points), [0.0] * len(points), []
    for tier, colour in TIERS.items():
        above = [b + p.bytes.get(tier, 0) for b, p in zip(below, points)]
        if above != below:
            edge = list(zip(xs, above)) + list(zip(reversed(xs), reversed(below)))
            if len(points) == 1:
                edge = [(0, above[0]), (WIDTH, above[0]), (WIDTH, below[0]), (0, below[0])]
            drawn.append(f'<polygon fill="{colour}" points="{_path(edge, most)}"/>')
        below = above
    return "".join(drawn)


def _line(points: Sequence, most: float) -> str:
    if not points:
        return ""
    places = [(x, p.fps) for x, p in zip(_xs(points), points)]
    if len(points) == 1:
        places = [(0, points[0].fps), (WIDTH, points[0].fps)]
    return f'<polyline class="pace" points="{_path(places, most)}"/>'


def _path(places: Sequence[tuple[float, float]], most: float) -> str:
    high = HEIGHT - 6
    return " ".join(f"{x:.1f},{HEIGHT - 2 - y / (most or 1) * high:.1f}" for x, y in places)


def gallery(answer: Answer | None, thumbs: Sequence[bytes], layers: int = 0, number: int = 0) -> str:
    """The frames that an answer was made from, with their times; the most wanted ones where there are many.

    Args:
        number: which answer of the conversation it is; a script of the page's own waits for it.
    """
    if answer is None:
        return '<div class="gallery empty"><p>The frames that an answer is made from appear here.</p></div>'
    chosen = sorted(sorted(answer.frames, key=lambda f: (-f.layers, -f.score))[:SHOWN], key=lambda f: f.frame)
    best = max(chosen, key=lambda f: (f.score, f.layers), default=None)
    figures = "".join(_figure(f, thumbs, layers, f is best and f.score != 0) for f in chosen)
    facts = [
        f"{len(answer.frames)} frames retrieved"
        + (f", {len(chosen)} shown" if len(chosen) < len(answer.frames) else "")
    ]
    for stage, words in (("first_token", "first token"), ("answer", "whole answer")):
        if stage in answer.seconds:
            facts.append(f"{words} {answer.seconds[stage]:.2f} s")
    facts.append(f"{size(sum(answer.bytes.values()))} held")
    told = f'<p class="facts">{" · ".join(facts)}</p>'
    return f'<div class="gallery" data-answer="{number}">{told}<div class="frames">{figures}</div></div>'


def _figure(frame: Retrieved, thumbs: Sequence[bytes], layers: int, best: bool) -> str:
    at = clock(frame.time)
    known = frame.frame < len(thumbs)
    picture = _image(thumbs[frame.frame], f"frame {frame.frame} at {at}") if known else '<span class="none"></span>'
    of = f" of {layers}" if layers else ""
    told = f"frame {frame.frame}, {frame.time:.1f} s, score {frame.score:.3f}, chosen by {frame.layers}{of} layers"
    score = f" · {frame.score:.2f}" if frame.score else ""
    kind = ' class="best"' if best else ""
    return f'<figure{kind} title="{told}">{picture}<figcaption><b>{at}</b>{score}</figcaption></figure>'
