"""Training batches: screens with a label for every token, and packed rows of sessions with branches."""

from __future__ import annotations

import numpy as np
import torch

from mmkv.models.tiny_agent import screens, sessions
from mmkv.models.tiny_agent.words import COLOURS, NAMES, XS, YS, vocabulary, words_of

IDS = {w: i for i, w in enumerate(vocabulary())}
GROUPS = {"name": NAMES, "colour": list(COLOURS), "x": [str(x) for x in XS], "y": [f"{y}</point>" for y in YS]}
IGNORE = -100  # a target that is not learned
AFTER = [IDS[w] for w in ("<|im_end|>", "<|im_start|>", "assistant")]
UNKNOWN = (IGNORE, IGNORE, IGNORE)
BEFORE = [IDS[w] for w in ("<|im_start|>", "user", "<|vision_start|>")]


def blurred(images: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    """uint8 `[N, H, W, 3]` -> float32 in -1..1 with a little noise and colour shift."""
    x = images.astype(np.float32) / 127.5 - 1
    x += rng.uniform(0, 0.02) * np.roll(rng.standard_normal(x.shape[1:], dtype=np.float32), int(rng.integers(99)), 0)
    shift = rng.uniform(-0.02, 0.02, (2, len(x), 1, 1, 3)).astype(np.float32)
    return x * (1 + shift[0]) + shift[1]


def vision_batch(rng: np.random.Generator, plans: int = 8, steps: int = 4):
    """float32 `[N, H, W, 3]` screens of one size and labels int64 `[4, N, tokens]`, one row per entry of `GROUPS`."""
    size = screens.SIZES[int(rng.integers(len(screens.SIZES)))]
    images, labels = [], []
    for _ in range(plans):
        plan = sessions.make_plan(rng, steps, size)
        images += sessions.draw_plan(plan, rng)
        labels += [cell_labels(elements, size) for elements in plan.screens]
    return blurred(np.stack(images), rng), np.stack(labels, 1)


def cell_labels(elements, size: tuple[int, int]) -> np.ndarray:
    """int64 `[4, tokens]`: name, colour, x and y of the element whose ink covers a token most; no name is `len(NAMES)`."""
    rows, columns = size[1] // 16, size[0] // 16
    area = np.zeros((len(elements), rows * columns), np.float32)
    for i, element in enumerate(elements):
        cover = np.zeros((size[1], size[0]), np.float32)
        ys, xs, alpha = screens.ink(element)
        cover[ys, xs] = alpha
        area[i] = cover.reshape(rows, 16, columns, 16).sum((1, 3)).reshape(-1)
    best, most = area.argmax(0), area.max(0)
    enough = most >= np.minimum(36, 0.4 * area.sum(1))[best]
    labels = np.full((4, rows * columns), IGNORE)
    labels[0, most <= 6] = len(NAMES)  # "nothing here" is a name too; a sliver is neither
    for cell in enough.nonzero()[0]:
        element = elements[best[cell]]
        x, y = element.at
        labels[:, cell] = (
            NAMES.index(element.name), GROUPS["colour"].index(element.colour), XS.index(x), YS.index(y),
        )  # fmt: skip
    return labels


def encode(task) -> tuple[list[int], list[int], list[tuple[int, int, int]]]:
    """Ids of "clause <|im_end|> <|im_start|> assistant answer <|im_end|>", targets (the answer and its end), facts.

    Facts: indices of colour, x and y of the element to click, at the words that name it; elsewhere `UNKNOWN`.
    """
    clause, response = words_of(task.clause), words_of(task.response)
    asked = [IDS[w] for w in clause] + AFTER
    said = [IDS[w] for w in response] + [IDS["<|im_end|>"]]
    facts = [UNKNOWN] * (len(asked) + len(said))
    if task.target is not None:
        x, y = task.target.at
        known = (GROUPS["colour"].index(task.target.colour), XS.index(x), YS.index(y))
        facts[len(asked) + response.index(task.target.name)] = known
        if clause[-1] == task.target.name:
            facts[len(clause) - 1] = known
    return asked + said, [IGNORE] * (len(asked) - 1) + said + [IGNORE], facts


class Row:
    """A packed row in the making: sessions one after another, at most `length` tokens.

    Lists of one entry per token: ids, targets, positions (time, row, column), facts (see `encode`), session, branch (0: on the
    trunk) and query (index into `kinds`, -1 for none); `images` are the screens in order, `places` the indices of their tokens.
    """

    def __init__(self, length: int):
        self.length = length
        self.ids, self.targets, self.positions, self.facts = [], [], [], []
        self.session, self.branch, self.query = [], [], []
        self.kinds: list[str] = []
        self.images: list[np.ndarray] = []
        self.places: list[int] = []
        self.sessions = self.branches = 0

    def add_session(self, rng: np.random.Generator, steps: int, branches: int, weights: dict[str, float]) -> bool:
        """Append a session with `branches` instructions at every step; False, and nothing done, where there is no room."""
        mark = len(self.ids)
        plan = sessions.make_plan(rng, steps)
        start, kinds, used = 0, [], 0
        columns, rows = plan.size[0] // 16, plan.size[1] // 16
        work: list[tuple] = []
        for k in range(steps):
            head = [(start + i,) * 3 for i in range(3)]
            cells = [(start + 3, start + 3 + r, start + 3 + c) for r in range(rows) for c in range(columns)]
            begin = start + 3 + max(rows, columns)
            work.append(("screen", head + cells + [(begin,) * 3]))
            used += len(head) + len(cells) + 1
            tasks = pick(sessions.tasks_on(plan, k, rng), branches, rng, weights)
            for i, task in enumerate(tasks):
                ids, targets, facts = encode(task)
                work.append(("trunk" if i == len(tasks) - 1 else "leaf", ids, targets, facts, begin + 1))
                kinds.append(task.kind)
                used += len(ids)
            start = begin + 1 + len(ids)
        if mark + used > self.length:
            return False
        for part in work:
            self._add_part(part, rows * columns)
        self.kinds += kinds
        self.images += sessions.draw_plan(plan, rng)
        self.sessions += 1
        return True

    def _add_part(self, part: tuple, cells: int) -> None:
        if part[0] == "screen":
            self.places += range(len(self.ids) + 3, len(self.ids) + 3 + cells)
            ids, targets, positions = [*BEFORE, *[IDS["<|image_pad|>"]] * cells, IDS["<|vision_end|>"]], None, part[1]
            facts, branch, query = [UNKNOWN] * len(ids), -1, -1
        else:
            _, ids, targets, facts, begin = part
            positions = [(begin + i,) * 3 for i in range(len(ids))]
            self.branches += 1
            branch, query = self.branches, self.branches - 1
        self.ids += ids
        self.targets += targets or [IGNORE] * len(ids)
        self.positions += positions
        self.facts += facts
        self.session += [self.sessions] * len(ids)
        self.branch += [branch if part[0] == "leaf" else 0] * len(ids)
        self.query += [query] * len(ids)


def pick(tasks: dict[str, list], count: int, rng: np.random.Generator, weights: dict[str, float]) -> list:
    """`count` different tasks: a kind by its weight, then one of that kind; fewer where there are fewer."""
    pool = [(weights.get(kind, 1.0) / len(group), task) for kind, group in tasks.items() for task in group]
    p = np.array([w for w, _ in pool])
    chosen = rng.choice(len(pool), min(count, len(pool)), replace=False, p=p / p.sum())
    return [pool[i][1] for i in chosen]


def text_batch(visual, rows: int, length: int, rng: np.random.Generator, weights: dict[str, float]) -> dict:
    """Packed rows of `length` tokens as `fast.read` wants them.

    With targets `[B, L]`, facts `[B, L, 3]`, query `[B, L]` and kinds `[B][queries]`.
    """
    packed = []
    for _ in range(rows):
        row = Row(length)
        for _ in range(TRIES):
            row.add_session(rng, int(rng.choice([1, 2, 3, 4, 5], p=STEPS)), int(rng.integers(2, 6)), weights)
        packed.append(row)
    features = look(visual, [image for row in packed for image in row.images], rng)
    places = [i * length + place for i, row in enumerate(packed) for place in row.places]
    out = {name: padded([getattr(row, name) for row in packed], fill, length) for name, fill in FILLS.items()}
    out["positions"] = out["positions"].permute(2, 0, 1)
    out["bias"] = visible(out.pop("session"), out.pop("branch"))
    return out | dict(features=features, places=torch.tensor(places), kinds=[row.kinds for row in packed])


STEPS = [0.2, 0.25, 0.25, 0.2, 0.1]  # how often a training session has 1, 2 ... steps
TRIES = 8  # sessions that a row is offered; those that do not fit are passed over
FILLS = {"ids": 0, "targets": IGNORE, "positions": (0, 0, 0), "facts": UNKNOWN, "session": -1, "branch": 0, "query": -1}


def padded(lists: list[list], fill, length: int) -> torch.Tensor:
    """int64 `[B, length]` (and what follows)."""
    return torch.tensor([entries + [fill] * (length - len(entries)) for entries in lists])


def visible(session: torch.Tensor, branch: torch.Tensor) -> torch.Tensor:
    """float `[B, 1, L, L]`: 0 where a token may look: earlier ones of its session that are on the trunk or in its branch."""
    same = (branch[:, None] == branch[:, :, None]) | (branch[:, None] == 0)
    allowed = (same & (session[:, None] == session[:, :, None])).tril()
    return torch.zeros(allowed.shape).masked_fill(~allowed, -1e9)[:, None]


@torch.no_grad()
def look(visual, images: list[np.ndarray], rng: np.random.Generator) -> torch.Tensor:
    """Features `[V, C]` of screens of any sizes, in order."""
    from mmkv.models.tiny_agent import fast

    out: list[torch.Tensor] = [torch.empty(0)] * len(images)
    for shape in {image.shape for image in images}:
        index = [i for i, image in enumerate(images) if image.shape == shape]
        seen = fast.see(visual, torch.from_numpy(blurred(np.stack([images[i] for i in index]), rng)))
        for i, features in zip(index, seen, strict=True):
            out[i] = features
    return torch.cat(out)
