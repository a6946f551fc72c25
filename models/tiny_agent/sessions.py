"""Sessions: screenshots, clauses, right answers; a seed gives a session, the same one on every machine.

Beside its shifting crowd every session has two reserved colours and perhaps one digit, each shown on exactly one screen, so
that "what was blue" and "the digit that was shown" are unambiguous later, when they can no longer be seen. What wore a
reserved colour is on all later screens, in another colour. No text of a session says what is asked from memory.
"""

from __future__ import annotations

import dataclasses

import numpy as np

from mmkv.models.tiny.words import DIGITS, DRAWN_WORDS, EASY_SHAPES
from mmkv.models.tiny_agent.screens import SIZES, Element, desktop, place_elements, render
from mmkv.models.tiny_agent.words import CLAUSES, COLOURS, DIRECTIONS, FIELD, RECALLS, SCROLL_AT, say

HELD_OUT = 2**41  # training seeds are below 2**40
THEN = ", then "  # between the clauses of a session's instruction


@dataclasses.dataclass(frozen=True)
class Task:
    """One thing to do on a screen.

    Args:
        kind: key of `CLAUSES`.
        clause: the instruction, "click the red circle".
        response: the right answer in the agent grammar.
        target: the element that must be hit, None where nothing is clicked.
        typed: what must be typed, "" where nothing is.
    """

    kind: str
    clause: str
    response: str
    target: Element | None = None
    typed: str = ""

    @property
    def thought(self) -> str:
        """The thought of the right answer, "the star is red"."""
        return self.response.split("\n")[0].removeprefix("Thought: ")


@dataclasses.dataclass(frozen=True)
class Step:
    """A screenshot, uint8 `[H, W, 3]`, its elements, and what to do on it."""

    image: np.ndarray
    elements: tuple[Element, ...]
    task: Task

    @property
    def actions(self) -> list[dict]:
        """The right actions: `type` and `params` in the words of `mmkv.agents.Action`, `box` x, y, width, height or None.

        All coordinates are relative to the screen, 0..1; a click's point is the middle of its element.
        """
        height, width = self.image.shape[:2]
        task, out = self.task, []
        if task.kind == "finish":
            return [dict(type="terminate", params={"status": "success"}, box=None)]
        if task.kind == "scroll":
            point = (SCROLL_AT[0] / width, SCROLL_AT[1] / height)
            return [dict(type="scroll", params={"direction": task.clause.split()[-1], "point": point}, box=None)]
        if task.target is not None:
            left, top, right, bottom = task.target.box
            box = (left / width, top / height, (right - left) / width, (bottom - top) / height)
            point = (task.target.x / width, task.target.y / height)
            out.append(dict(type="click", params={"point": point}, box=box))
        if task.typed:
            out.append(dict(type="write", params={"text": task.typed}, box=None))
        return out


@dataclasses.dataclass(frozen=True)
class Session:
    """Steps in order; `size` is the screens' width and height in px."""

    seed: int
    size: tuple[int, int]
    steps: tuple[Step, ...]

    @property
    def instruction(self) -> str:
        """All clauses: "click the red circle, then scroll down, then finish"."""
        return THEN.join(step.task.clause for step in self.steps)


@dataclasses.dataclass(frozen=True)
class Memory:
    """Element `name` wears the reserved `colour` on screen `holder` alone."""

    name: str
    colour: str
    holder: int


@dataclasses.dataclass(frozen=True)
class Plan:
    """The screens of a session, before anything is drawn or asked.

    Args:
        size: width and height, px.
        memories: the reserved colours.
        digit_on: screen that shows the session's only digit, -1 for none.
        screens: elements of each screen.
    """

    size: tuple[int, int]
    memories: tuple[Memory, ...]
    digit_on: int
    screens: tuple[tuple[Element, ...], ...]


def make_plan(rng: np.random.Generator, steps: int, size: tuple[int, int] | None = None) -> Plan:
    """Draw the screens of a session of `steps` steps."""
    size = size or SIZES[int(rng.integers(len(SIZES)))]
    names = [str(n) for n in rng.permutation([*EASY_SHAPES, *DRAWN_WORDS])]
    palette = [str(c) for c in rng.permutation(list(COLOURS))]
    memories = tuple(Memory(names.pop(), palette.pop(), int(rng.integers(max(1, steps - 1)))) for _ in range(2))
    digit_on = int(rng.integers(-1, steps))
    screens: list[tuple[Element, ...]] = []
    for k in range(steps):
        wanted = [(m.name, m.colour if k == m.holder else str(rng.choice(palette))) for m in memories if k >= m.holder]
        if k == digit_on:
            wanted.append((str(rng.choice(DIGITS)), str(rng.choice(palette))))
        if rng.random() < 0.5:
            wanted.append((FIELD, str(rng.choice(palette))))
        wanted += [(str(n), str(rng.choice(palette))) for n in rng.permutation(names)[: int(rng.integers(2, 5))]]
        screens.append(tuple(place_elements(wanted, size, rng)))
        if k == digit_on and not any(e.name in DIGITS for e in screens[k]):  # no room
            digit_on = -1
    return Plan(size, memories, digit_on, tuple(screens))


def tasks_on(plan: Plan, k: int, rng: np.random.Generator) -> dict[str, list[Task]]:
    """Every kind of task that screen `k` allows, without ambiguity."""
    here = plan.screens[k]
    out: dict[str, list[Task]] = {kind: [] for kind in CLAUSES}

    def add(kind: str, element: Element | None, typed: str = "", clicked: bool = True, asked: str = "") -> None:
        clause = CLAUSES[kind][int(rng.integers(len(CLAUSES[kind])))]
        name, colour = (element.name, element.colour) if element else ("", "")
        target = element if clicked else None
        response = say(kind, name, colour, target.at if target else None, typed)
        clause = clause.format(c=asked or colour, n=name, t=typed, d=typed)
        out[kind].append(Task(kind, clause, response, target, "" if kind == "scroll" else typed))

    for element in here:
        add("both", element)
        add("name", element)
        if element.name != FIELD and sum(e.colour == element.colour for e in here) == 1:
            add("colour", element)
        if element.name == FIELD:
            add("fill", element, str(rng.choice([*DIGITS, *DRAWN_WORDS])))
    if k == plan.digit_on:
        digit = _digit(here)
        add("read", digit, digit.name, clicked=False)
    if 0 <= plan.digit_on < k:
        digit = _digit(plan.screens[plan.digit_on])
        add("recall digit", digit, digit.name, clicked=False)
    for memory in plan.memories:
        holds = any(e.name == memory.name and e.colour == memory.colour for e in plan.screens[memory.holder])
        now = next((e for e in here if e.name == memory.name), None)
        if k > memory.holder and holds and now is not None:  # else there was no room for it
            add("recall", now, asked=memory.colour)
    add("scroll", None, str(rng.choice(DIRECTIONS)), clicked=False)
    add("finish", None, clicked=False)
    return {kind: tasks for kind, tasks in out.items() if tasks}


def _untold(tasks: list[Task], plan: Plan, before: list[Task]) -> list[Task]:
    """Those that neither say what a later step may ask from memory, nor ask again."""
    asked = {task.clause for task in before if task.kind in RECALLS}
    reserved = {memory.colour for memory in plan.memories}

    def tells(task: Task) -> bool:
        if task.kind in RECALLS:
            return task.clause in asked
        return task.kind == "read" or (task.target is not None and _secret(task.target, reserved))

    return [task for task in tasks if not tells(task)]


def _secret(element: Element, reserved: set[str]) -> bool:
    return element.colour in reserved or element.name in DIGITS


def _digit(elements: tuple[Element, ...]) -> Element:
    return next(e for e in elements if e.name in DIGITS)


def draw_plan(plan: Plan, rng: np.random.Generator) -> list[np.ndarray]:
    """Screenshots uint8 `[H, W, 3]` on one desktop."""
    back, shade = desktop(plan.size, rng), float(rng.uniform(-14, 30))
    return [render(screen, back, shade) for screen in plan.screens]


def make_session(seed: int, steps: int = 5) -> Session:
    """The session of a seed: direct tasks first, what needs memory as soon as it can be asked, finish at the end.

    Raises:
        ValueError: less than two steps.
    """
    if type(steps) is not int or steps < 2:
        raise ValueError(f"steps={steps!r}; possible are whole numbers from 2")
    rng = np.random.default_rng([seed, steps])
    plan = make_plan(rng, steps)
    chosen: list[Task] = []
    for k in range(steps):
        tasks = {kind: _untold(group, plan, chosen) for kind, group in tasks_on(plan, k, rng).items()}
        direct = [kind for kind, group in tasks.items() if group and kind not in (*RECALLS, "finish", "scroll")]
        memory = [kind for kind, group in tasks.items() if group and kind in RECALLS]
        if k == steps - 1:
            kind = "finish"
        elif memory and rng.random() < 0.8:
            kind = str(rng.choice(memory))
        else:
            kind = str(rng.choice(direct)) if direct and rng.random() < 0.9 else "scroll"
        chosen.append(tasks[kind][int(rng.integers(len(tasks[kind])))])
    images = draw_plan(plan, rng)
    parts = zip(images, plan.screens, chosen, strict=True)
    return Session(seed, plan.size, tuple(Step(image, screen, task) for image, screen, task in parts))
