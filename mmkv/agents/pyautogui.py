"""Actions as pyautogui source: text for a person or an executor of the user's own; mmkv runs none of it."""

from __future__ import annotations

from collections.abc import Callable, Iterable

from mmkv.agents.action import Action
from mmkv.agents.coordinates import to_screen

SCROLL = 5  # clicks, where the model gave none (as UI-TARS' own rendering)
WAIT = 5  # seconds, where the model gave none (what UI-TARS' prompt promises)
_ARROWS = {f"arrow{way}": way for way in ("up", "down", "left", "right")}


def to_pyautogui(actions: Iterable[Action], size: tuple[int, int]) -> str:
    """Lines of pyautogui code for a screen of `size` (width, height), one action after another.

    Coordinates are whole pixels of the screen. What pyautogui cannot do (openApp, home, back, longPress of a phone) becomes a
    comment; terminate becomes `# terminate: success`. Every string is a Python literal, so nothing in it can run.
    """
    return "\n".join(line for action in actions for line in _lines(action, size))


def _lines(action: Action, size: tuple[int, int]) -> list[str]:
    render: Callable | None = _RENDER.get(action.type)
    return [f"# {action.type}: {_words(action)}"] if render is None else render(action, size)


def _words(action: Action) -> str:
    params = action.params
    said = params.get("status") or params.get("app") or ", ".join(f"{k}={v!r}" for k, v in params.items())
    return ascii(said)[1:-1] if isinstance(said, str) else ascii(said)  # one line, whatever the model wrote


def _place(point, size) -> str:
    x, y = to_screen(point, size)
    return f"{x}, {y}"


def _pointed(action: Action, size) -> list[str]:
    point = action.params.get("point")
    more = [] if point is None else [_place(point, size)]
    button = action.params.get("button")
    if action.type in ("click", "dragTo") and button in ("left", "right", "middle"):
        more.append(f"button={button!r}")
    if action.type == "dragTo":
        more.append("duration=1.0")
    return [f"pyautogui.{action.type}({', '.join(more)})"]


def _drag(action: Action, size) -> list[str]:
    start, end = _place(action.params["start"], size), _place(action.params["end"], size)
    return [f"pyautogui.moveTo({start})", f"pyautogui.dragTo({end}, duration=1.0)"]


def _scroll(action: Action, size) -> list[str]:
    direction, amount = action.params["direction"], action.params.get("amount", SCROLL)
    point = action.params.get("point")
    clicks = amount if direction in ("up", "right") else -amount
    name = "scroll" if direction in ("up", "down") else "hscroll"
    at = ""
    if point is not None:
        x, y = to_screen(point, size)
        at = f", x={x}, y={y}"
    return [f"pyautogui.{name}({clicks}{at})"]


def _write(action: Action, size) -> list[str]:
    """Typed key by key; a newline at the end is a press of enter."""
    text = action.params["text"]
    body = text.removesuffix("\n")
    lines = [f"pyautogui.write({body!r}, interval=0.1)"] if body else []
    return lines + (["pyautogui.press('enter')"] if body != text else [])


def _keyed(action: Action, size) -> list[str]:
    keys = [_ARROWS.get(key, key) for key in action.params["keys"]]
    if action.type == "hotkey":
        return [f"pyautogui.hotkey({', '.join(map(repr, keys))})"]
    if action.type == "press":
        presses = action.params.get("presses")
        more = f", presses={presses}" if isinstance(presses, int) else ""
        return [f"pyautogui.press({keys if len(keys) > 1 else keys[0]!r}{more})"]
    return [f"pyautogui.{action.type}({key!r})" for key in keys]


def _wait(action: Action, size) -> list[str]:
    seconds = action.params.get("seconds")
    return [f"pyautogui.sleep({seconds if isinstance(seconds, (int, float)) else WAIT})"]


_RENDER: dict[str, Callable] = {
    **dict.fromkeys(("click", "doubleClick", "rightClick", "middleClick", "tripleClick", "moveTo", "dragTo"), _pointed),
    **dict.fromkeys(("press", "hotkey", "keyDown", "keyUp"), _keyed),
    "drag": _drag,
    "scroll": _scroll,
    "write": _write,
    "wait": _wait,
}
