"""Every word the tiny Infinity knows, and the captions made of them."""

from __future__ import annotations

import dataclasses

COLOURS = {
    "red": (220, 40, 40), "green": (40, 170, 60), "blue": (50, 80, 230),
    "yellow": (240, 220, 50), "purple": (160, 60, 200), "cyan": (60, 210, 220),
}  # fmt: skip
BACKGROUNDS = {"black": (15, 15, 15), "grey": (120, 120, 120), "white": (240, 240, 240)}
SHAPES = ["circle", "square", "triangle"]
SIZES = ["large", "small"]
RELATIONS = ["left of", "right of", "above", "below"]
COUNTS = {"two": 2, "three": 3, "four": 4}
KINDS = ["single", "pair", "count"]
PAD = "<pad>"
LONGEST = 12  # words of the longest caption


@dataclasses.dataclass(frozen=True)
class Facts:
    """What a caption says.

    Args:
        background: one of `BACKGROUNDS`.
        things: (colour, shape) of each object.
        size: of a single object, one of `SIZES`; "" where there are several.
        relation: of the first object to the second, one of `RELATIONS`; "" where there are not two different ones.
    """

    background: str
    things: tuple[tuple[str, str], ...]
    size: str = ""
    relation: str = ""

    @property
    def kind(self) -> str:
        """One of `KINDS`."""
        return "single" if self.size else "pair" if self.relation else "count"


def caption_of(facts: Facts) -> str:
    """The sentence, e.g. "a red circle left of a blue square on grey"."""
    colour, shape = facts.things[0]
    if facts.kind == "single":
        what = f"a {facts.size} {colour} {shape}"
    elif facts.kind == "pair":
        other, second = facts.things[1]
        what = f"a {colour} {shape} {facts.relation} a {other} {second}"
    else:
        word = next(word for word, count in COUNTS.items() if count == len(facts.things))
        what = f"{word} {colour} {shape}s"
    return f"{what} on {facts.background}"


def facts_of(caption: str) -> Facts:
    """What a sentence says; the reverse of `caption_of`.

    Raises:
        ValueError: no sentence of this world.
    """
    words = caption.lower().split()
    try:
        if words[-2] != "on" or words[-1] not in BACKGROUNDS:
            raise KeyError(words[-1])
        if words[0] in COUNTS:
            count, colour, shapes = words[:-2]
            facts = Facts(words[-1], ((colour, shapes.removesuffix("s")),) * COUNTS[count])
        elif words[1] in SIZES:
            _, size, colour, shape = words[:-2]
            facts = Facts(words[-1], ((colour, shape),), size=size)
        else:
            first, second = (words[1], words[2]), (words[-4], words[-3])
            facts = Facts(words[-1], (first, second), relation=" ".join(words[3:-5]))
    except (KeyError, IndexError, ValueError):
        facts = None
    if facts is None or caption_of(facts) != " ".join(words) or not _known(facts):
        raise ValueError(
            f'caption {caption!r}: possible are "a large red circle on grey", "a red circle left of a blue square on black" '
            f'and "three green triangles on white", of {", ".join(COLOURS)}; {", ".join(SHAPES)}; {", ".join(SIZES)}; '
            f"{', '.join(RELATIONS)}; {', '.join(COUNTS)}; {', '.join(BACKGROUNDS)}"
        )
    return facts


def _known(facts: Facts) -> bool:
    right = all(colour in COLOURS and shape in SHAPES for colour, shape in facts.things)
    return right and facts.relation in ("", *RELATIONS)


def vocabulary() -> list[str]:
    """All words in id order, padding first."""
    words = [PAD, "a", "of", "on", *COLOURS, *SHAPES, *(shape + "s" for shape in SHAPES), *SIZES]
    words += [relation.split()[0] for relation in RELATIONS] + [*COUNTS, *BACKGROUNDS]
    return words
