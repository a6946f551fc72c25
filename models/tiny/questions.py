"""Questions about a scene: every one has exactly one right answer of one or two words."""

from __future__ import annotations

import dataclasses

import numpy as np

from mmkv.models.tiny.words import (
    COLUMNS,
    COUNTS,
    DIGITS,
    DRAWN_WORDS,
    EASY_COLOURS,
    EASY_FORMS,
    EASY_SHAPES,
    MOVES,
    ROWS,
    SIZES,
    STRESS_COLOURS,
    STRESS_FORMS,
    STRESS_SHAPES,
)


@dataclasses.dataclass(frozen=True)
class Question:
    """`options`: the right answer and up to three wrong ones, in a seeded order.

    about: index of the object that the question names, -1 for none; only training uses it.
    """

    task: str
    text: str
    answer: str
    options: tuple[str, ...]
    about: int = -1


def spoken(name: str) -> str:
    """How a question names an object: a shape by itself, "digit 7", "word cat"."""
    return f"digit {name}" if name in DIGITS else f"word {name}" if name in DRAWN_WORDS else name


def _only(things, **facts):
    """The one thing with these facts, or None."""
    found = [o for o in things if all(getattr(o, k) == v for k, v in facts.items())]
    return found[0] if len(found) == 1 else None


def all_questions(scene) -> list[Question]:
    """Every question that the scene answers without doubt, in a fixed order."""
    rng = np.random.default_rng([scene.seed, scene.frames, 11])
    easy = scene.split == "easy"
    facts = list(_easy(scene, rng)) if easy else list(_stress(scene, rng))
    wheres = [f"{r} {c}" for r in ROWS for c in COLUMNS]
    colours = list(EASY_COLOURS if easy else STRESS_COLOURS)
    shapes = EASY_SHAPES if easy else STRESS_SHAPES
    questions = []
    for task, text, answer, about in facts:
        families = (
            colours,
            shapes,
            wheres,
            MOVES[1:],
            SIZES,
            DIGITS if task == "read" else COUNTS,
            DRAWN_WORDS,
            ["yes", "no"],
        )
        pool = next((p for p in families if answer in p), None)
        if pool is None:  # "red circle": keep a wrong colour or a wrong name near the right one
            pool = [f"{o.colour} {spoken(o.name)}" for o in scene.things]
            pool += [f"{c} {spoken(str(rng.choice(shapes)))}" for c in rng.permutation(colours)[:3]]
        wrong = [w for w in dict.fromkeys(rng.permutation(pool).tolist()) if w != answer][:3]
        text = text.replace(" a orange", " an orange")
        questions.append(Question(task, text, answer, tuple(rng.permutation([answer, *wrong]).tolist()), about))
    return questions


def _easy(scene, rng):
    things, forms = scene.things, EASY_FORMS
    for i, o in enumerate(things):
        words = {"n": o.name, "c": o.colour}
        yield "colour", forms["colour"][0].format(**words), o.colour, i
        yield "shape", forms["shape"][0].format(**words), o.name, i
        for form in forms["where"] if o.move == "still" else []:
            yield "where", form.format(**words), o.where, i
        for form in forms["moves"]:
            yield "moves", form.format(**words), "no" if o.move == "still" else "yes", i
        for form in forms["way"] if o.move != "still" else []:
            yield "way", form.format(**words), o.move, i
        yield "exist", forms["exist"][0].format(**words), "yes", i
        yield "exist", forms["exist"][1].format(**words), "yes", i
    for task, i in (("first", 0), ("last", len(things) - 1)):
        o = things[i]
        yield task, forms[task][0], o.colour, i
        yield task, forms[task][1], o.name, i
    yield "count", forms["count"][0], str(len(things)), -1
    absent_c = [c for c in EASY_COLOURS if c not in {o.colour for o in things}]
    absent_n = [n for n in EASY_SHAPES if n not in {o.name for o in things}]
    for c, n in zip(rng.permutation(absent_c)[: len(things)], rng.permutation(absent_n)[: len(things)], strict=False):
        yield "exist", forms["exist"][0].format(c=c), "no", -1
        yield "exist", forms["exist"][1].format(n=n), "no", -1
    for i, (a, b) in enumerate(zip(things, things[1:], strict=False)):
        yield "after", forms["after"][0].format(n=a.name), b.name, i
        yield "after", forms["after"][1].format(c=a.colour), b.colour, i
        yield "before", forms["before"][0].format(n=b.name), a.name, i + 1
        yield "before", forms["before"][1].format(c=b.colour), a.colour, i + 1


def _stress(scene, rng):
    things, forms = scene.things, STRESS_FORMS
    pairs = {(o.colour, o.name) for o in things}
    for i, o in enumerate(things):
        words = {"n": spoken(o.name), "c": o.colour, "s": o.size}
        shape = o.name not in DIGITS and o.name not in DRAWN_WORDS
        if _only(things, name=o.name):
            yield "colour", forms["colour"][0].format(**words), o.colour, i
        elif shape and _only(things, name=o.name, size=o.size):
            yield "colour", forms["colour"][1].format(**words), o.colour, i
        if shape and _only(things, colour=o.colour):
            yield "shape", forms["shape"][0].format(**words), o.name, i
        kin = DIGITS if o.name in DIGITS else DRAWN_WORDS
        if not shape and _only([p for p in things if p.name in kin], colour=o.colour):
            yield "read", forms["read"][kin is DRAWN_WORDS].format(**words), o.name, i
        if o.move == "still":
            yield "where", forms["where"][0].format(**words), o.where, i
        else:
            yield "way", forms["way"][0].format(**words), o.move, i
        if shape:
            yield "size", forms["size"][0].format(**words), o.size, i
        yield "exist", forms["exist"][0].format(**words), "yes", i
        others = [p for p in things if p.colour != o.colour and (p.colour, o.name) not in pairs]
        if others:  # both facts occur in the video, but not on one object
            other = others[int(rng.integers(len(others)))]
            yield "exist", forms["exist"][0].format(c=other.colour, n=spoken(o.name)), "no", -1
    yield "first", forms["first"][0], things[0].colour, 0
    yield "last", forms["last"][0], things[-1].colour, len(things) - 1
    yield "count", forms["count"][0], str(len(things)), -1
    for c in dict.fromkeys(o.colour for o in things):
        yield "count", forms["count"][1].format(c=c), str(sum(o.colour == c for o in things)), -1
    for i, (a, b) in enumerate(zip(things, things[1:], strict=False)):
        first, second = f"{a.colour} {spoken(a.name)}", f"{b.colour} {spoken(b.name)}"
        if b.name in STRESS_SHAPES:
            yield "after", forms["after"][0].format(c=a.colour, n=spoken(a.name)), second, i
        if a.name in STRESS_SHAPES:
            yield "before", forms["before"][0].format(c=b.colour, n=spoken(b.name)), first, i + 1
    shapes = [o for o in things if o.name in STRESS_SHAPES]
    for _ in range(len(shapes) - 1):
        a, b = (shapes[j] for j in rng.choice(len(shapes), 2, replace=False))
        text = forms["order"][0].format(c=a.colour, n=a.name, c2=b.colour, n2=b.name)
        yield "order", text, "yes" if a.start < b.start else "no", things.index(b)
