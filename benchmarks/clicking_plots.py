"""Pictures of `clicking.py`: accuracy over bytes, and the screens of one session with what was clicked. Needs matplotlib."""

from __future__ import annotations

from pathlib import Path

import matplotlib as mpl

from mmkv.models.tiny_agent.answer import POINT
from mmkv.models.tiny_agent.sessions import Session

TITLES = {
    "kept": "KV of earlier steps kept and compressed once",
    "whole": "all screenshots read and compressed at each step",
}
LINES = {"now": "-", "before": (0, (3, 1.5))}
MARKERS = {"dense": "*", "GUIKV": "o", "SnapKV": "s", "H2O": "^", "VidKV": "D", "GUIKV x VidKV": "P"}
COLOURS = ("tab:red", "tab:cyan", "tab:olive", "black")


def family(name: str) -> str:
    """The method of a row, without its budget: "GUIKV 40 % x VidKV" -> "GUIKV x VidKV"."""
    return " ".join(word for word in name.split() if not word.isdigit() and word != "%")


def draw(result: dict, path: Path) -> None:
    """Click accuracy over true bytes, a panel for each protocol.

    Args:
        result: what benchmarks/clicking.py writes.
        path: of a .png.
    """
    mpl.use("Agg")
    from matplotlib import pyplot as plt

    figure, panels = plt.subplots(1, len(TITLES), figsize=(12, 5), sharey=True)
    for panel, (protocol, title) in zip(panels, TITLES.items()):
        rows = result["protocols"][protocol]
        for i, name in enumerate(dict.fromkeys(family(row["method"]) for row in rows)):
            mine = sorted((r for r in rows if family(r["method"]) == name), key=lambda r: r["share"])
            for part, line in LINES.items():
                places = [row["parts"][part] for row in mine]
                panel.errorbar(
                    [row["share"] for row in mine], [p["accuracy"] for p in places], [p["error"] for p in places],
                    label=name if part == "now" else None, linestyle=line, marker=MARKERS[name], color=f"C{i}", capsize=2,
                )  # fmt: skip
        panel.set_title(title, fontsize=10)
        panel.set_xlabel("resident bytes of the KV cache, share of dense")
        panel.set_ylim(0, 1.02)
        panel.grid(color="0.92")
    panels[0].set_ylabel("click accuracy")
    panels[0].legend(frameon=False, loc="lower right")
    figure.suptitle(
        f"The bundled agent on {result['sessions']} sessions of {result['steps'] - 1} screenshots (dashed: an earlier one needed)"
    )
    figure.tight_layout()
    figure.savefig(path, dpi=110)
    plt.close(figure)


def draw_session(session: Session, answers: dict[str, list[str]], path: Path) -> None:
    """The screens of a session, what was asked, where each method clicked, and the right buttons framed.

    Args:
        session: what was played.
        answers: by method, the text of each step.
        path: of a .png.
    """
    mpl.use("Agg")
    from matplotlib import patches
    from matplotlib import pyplot as plt

    figure, panels = plt.subplots(1, len(session.steps) - 1, figsize=(3.4 * len(session.steps), 4))
    for k, (panel, step) in enumerate(zip(panels, session.steps[:-1])):
        panel.imshow(step.image)
        if step.task.target is not None:
            left, top, right, bottom = step.task.target.box
            panel.add_patch(
                patches.Rectangle((left, top), right - left, bottom - top, fill=False, edgecolor="lime", linewidth=2.5)
            )
        said = []
        for (name, texts), colour, mark in zip(answers.items(), COLOURS, "x+12"):
            for x, y in POINT.findall(texts[k])[:1]:
                panel.scatter([int(x)], [int(y)], s=130, marker=mark, color=colour, label=name, zorder=3)
            said.append(f"{name}: {texts[k].splitlines()[0].removeprefix('Thought: ')}")
        panel.set_title(step.task.clause, fontsize=11)
        panel.set_xlabel("\n".join(said), fontsize=8)
        panel.set_xticks([])
        panel.set_yticks([])
        if step.task.target is not None:
            panel.legend(fontsize=7, loc="lower left")
    figure.tight_layout()
    figure.savefig(path, dpi=100)
    plt.close(figure)
