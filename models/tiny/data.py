"""Training batches: vision labels for the tower, then features with packed questions for the language model."""

from __future__ import annotations

import os
import queue
import random

import numpy as np
import torch
import torch.nn.functional as F

from mmkv.models.tiny import world
from mmkv.models.tiny.words import (
    COLUMNS,
    EASY_FORMS,
    MOVES,
    NAMES,
    ROWS,
    SIZES,
    STRESS_COLOURS,
    STRESS_FORMS,
    vocabulary,
)

SLOT = 16  # tokens of one question with its answer
GROUPS = {  # word groups that the tower learns to name, token by token
    "name": NAMES, "colour": list(STRESS_COLOURS), "row": ROWS, "column": COLUMNS, "move": MOVES, "size": SIZES,
}  # fmt: skip
# frames -> (videos per batch, questions per video)
SHAPES = {16: (32, 12), 32: (20, 16), 64: (10, 24), 128: (5, 36)}
TASKS = [*EASY_FORMS, *("s." + task for task in STRESS_FORMS)]  # stress tasks are counted apart
IDS = {w: i for i, w in enumerate(vocabulary())}


def resize_matrix() -> np.ndarray:
    """What enlarging 4x by pixel copies and the processor's bicubic reduction do to one axis, float32 [64, 64]."""
    eye = torch.eye(64).repeat_interleave(4, 0)[:, None, None, :].permute(1, 2, 0, 3).contiguous()  # [1, 1, 256, 64]
    small = F.interpolate(eye, size=(64, 64), mode="bicubic", antialias=True)
    return small[0, 0].numpy()


RESIZE = resize_matrix()


def like_decoded(frames: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    """uint8 frames -> float32 in -1..1 with the softening, noise and colour shift of a decoded file."""
    x = frames.astype(np.float32) / 127.5 - 1
    t = len(x)
    x = np.matmul(RESIZE, x.reshape(t, 64, 192)).reshape(t, 64, 64, 3)
    x = np.matmul(RESIZE, x.reshape(t * 64, 64, 3))
    x = x.reshape(t, 64, 64, 3)
    noise = rng.standard_normal((64, 64, 3), dtype=np.float32)
    strength = rng.uniform(0, 0.03)
    for i in range(t):  # one draw, rolled: fresh normals for every frame would cost more than the rest
        x[i] += strength * np.roll(noise, int(rng.integers(4096)), axis=0 if i % 2 else 1)
    return x * (1 + rng.uniform(-0.04, 0.04, 3).astype(np.float32)) + rng.uniform(-0.03, 0.03, 3).astype(np.float32)


def vision_batch(rng: np.random.Generator, scenes: int = 40):
    """float16 frame pairs [N, 2, 64, 64, 3] and labels int64 [groups, N, 16] (-100: nothing to learn)."""
    pairs, labels = [], []
    for _ in range(scenes):
        split = "easy" if rng.random() < 0.4 else "stress"
        scene = world.make_scene(int(rng.integers(2**40)), 6, split, crowded=True)
        frames, cover = world.render(scene, labels=True)
        x = like_decoded(frames, rng)
        for t in range(0, 6, 2):
            pairs.append(x[t : t + 2])
            labels.append(cell_labels(scene, cover[:, t : t + 2], t))
    return np.stack(pairs).astype(np.float16), np.stack(labels, 1)


def cell_labels(scene, cover, t):
    """int64 [groups, 16]: for each token, the attributes of the object that covers it most in frames t and t + 1."""
    area = cover.reshape(len(cover), 2, 4, 16, 4, 16).sum((1, 3, 5)).reshape(len(cover), 16)
    labels = np.full((len(GROUPS), 16), -100)
    labels[0] = len(NAMES)  # "nothing here" is a name too
    total = area.sum(1, keepdims=True)
    best = area.argmax(0)
    for cell in range(16):
        i = best[cell]
        if area[i, cell] < min(36, 0.4 * total[i, 0]) or area[i, cell] <= 0:
            if area[i, cell] > 6:
                labels[0, cell] = -100  # a sliver of an object: neither
            continue
        thing = scene.things[i]
        x, y = thing.at(min(max(t + 0.5, thing.start), thing.end - 1))
        labels[0, cell] = NAMES.index(thing.name)
        labels[1, cell] = GROUPS["colour"].index(thing.colour)
        labels[2, cell], labels[3, cell] = world.nearest(y), world.nearest(x)
        if thing.start <= t and thing.end >= t + 2:  # motion needs both frames
            labels[4, cell] = MOVES.index(thing.move)
        if scene.split == "stress" and thing.name in GROUPS["name"][:12]:
            labels[5, cell] = SIZES.index(thing.size)
    return labels


# what the helper heads read at the word that names an object: its attributes, its place in the order, its neighbours
RECALL = {
    "name": len(NAMES), "colour": len(STRESS_COLOURS), "row": 3, "column": 3, "move": len(MOVES), "size": 2, "turn": 9,
    "next name": len(NAMES) + 1, "next colour": len(STRESS_COLOURS) + 1,
    "last name": len(NAMES) + 1, "last colour": len(STRESS_COLOURS) + 1,
}  # fmt: skip


def recall(scene, question) -> tuple[int, list[int]]:
    """Token index of the word that completes an object's name in a question (-1: none) and its RECALL labels."""
    if question.about < 0:
        return -1, [-100] * len(RECALL)
    things, i = scene.things, question.about
    thing, colours = things[i], GROUPS["colour"]
    words = question.text.replace("?", " ?").split()
    marks = {thing.name, thing.colour, "object", "first", "last"}
    spot = max(k for k, w in enumerate(words) if w in marks)
    still = thing.move == "still"
    labels = [
        NAMES.index(thing.name), colours.index(thing.colour),
        world.nearest(thing.y) if still else -100, world.nearest(thing.x) if still else -100,
        MOVES.index(thing.move), SIZES.index(thing.size) if scene.split == "stress" else -100, i,
    ]  # fmt: skip
    for other in (things[i + 1] if i + 1 < len(things) else None, things[i - 1] if i else None):
        labels += [NAMES.index(other.name), colours.index(other.colour)] if other else [len(NAMES), len(colours)]
    return spot, labels


def encode(question) -> tuple[list[int], list[int]]:
    """Token ids of "question <|im_end|> <|im_start|> assistant answer" and targets (-100 outside the answer)."""
    words = question.text.replace("?", " ?").split() + ["<|im_end|>", "<|im_start|>", "assistant"]
    answer = question.answer.split()
    ids = [IDS[w] for w in words + answer]
    targets = [-100] * (len(words) - 1) + [IDS[w] for w in answer] + [IDS["<|im_end|>"]]
    if len(ids) > SLOT:
        raise ValueError(f"{question.text!r} is longer than {SLOT} tokens")
    pad = SLOT - len(ids)
    return ids + [0] * pad, targets + [-100] * pad


def pick(questions, count, rng, weights=None):
    """`count` questions: a task by its weight (default: all alike), then a question of that task."""
    by_task: dict[str, list] = {}
    for q in questions:
        by_task.setdefault(q.task, []).append(q)
    tasks = list(by_task)
    p = np.array([(weights or {}).get(t, 1.0) for t in tasks])
    quota = rng.multinomial(count, p / p.sum())
    chosen = []
    for task, n in zip(tasks, quota, strict=True):
        pool = by_task[task]
        chosen += [
            pool[i] for i in (rng.permutation(len(pool))[:n] if n <= len(pool) else rng.integers(len(pool), size=n))
        ]
    return chosen


def text_batch(visual, frames: int, stress: float, rng: np.random.Generator, weights=None):
    """features float16 [B, V, 256], ids and targets [B, N, SLOT], spots [B, N], labels [B, N, RECALL], tasks [B][N].

    `stress`: share of stress scenes; `weights`: how often each of TASKS is asked.
    """
    from mmkv.models.tiny import fast

    batch, count = SHAPES[frames]
    pixels, ids, targets, helps, tasks = [], [], [], [], []
    for _ in range(batch):
        split = "stress" if rng.random() < stress else "easy"
        scene = world.make_scene(int(rng.integers(2**40)), frames, split)
        pixels.append(like_decoded(world.render(scene), rng))
        mark = "s." if split == "stress" else ""
        mine = {t.removeprefix("s."): w for t, w in (weights or {}).items() if t.startswith("s.") == bool(mark)}
        chosen = pick(world.all_questions(scene), count, rng, mine)
        coded = [encode(q) for q in chosen]
        ids.append([c[0] for c in coded])
        targets.append([c[1] for c in coded])
        helps.append([recall(scene, q) for q in chosen])
        tasks.append([mark + q.task for q in chosen])
    with torch.no_grad():
        x = torch.from_numpy(np.stack(pixels)).view(-1, 2, 64, 64, 3)
        features = torch.cat([fast.see(visual, part) for part in x.split(64)]).view(batch, frames * 8, 256)
    spots = np.array([[h[0] for h in row] for row in helps])
    labels = np.array([[h[1] for h in row] for row in helps])
    return features.half().numpy(), np.array(ids), np.array(targets), spots, labels, tasks


def stage_choice(progress: float, rng) -> tuple[int, float]:
    """(frames, share of stress scenes) at a point of the language training: short and easy first."""
    if progress < 0.22:
        return 16, 0.0
    if progress < 0.57:
        return int(rng.choice([16, 32, 64], p=[0.6, 0.3, 0.1])), 0.15
    return int(rng.choice([16, 32, 64, 128], p=[0.15, 0.15, 0.2, 0.5])), 0.3


def produce(out, progress, weights, kind: str, seed: int, core: int | None, state):
    """Body of the data process: fill a queue for ever.

    progress: shared float; weights: shared floats, one per task; state: tower weights, or None for vision batches.
    """
    if core is not None:
        os.sched_setaffinity(0, {core})
    else:
        os.sched_setaffinity(0, range(os.cpu_count()))
    os.nice(5)
    torch.set_num_threads(1)
    torch.set_flush_denormal(True)
    rng = np.random.default_rng(seed)
    if kind == "vision":
        while True:
            out.put(vision_batch(rng))
    from mmkv.models.tiny.build import make_model

    visual = make_model().model.visual
    visual.load_state_dict(state)
    while True:
        frames, stress = stage_choice(progress.value, rng)
        out.put((frames, text_batch(visual, frames, stress, rng, dict(zip(TASKS, weights, strict=True)))))


class Feed:
    """Batches from a producer process; when it falls behind, a random earlier batch is used again."""

    def __init__(self, kind, seed, core, state=None, keep=400, depth=12):
        import torch.multiprocessing as mp

        context = mp.get_context("spawn")
        self.queue, self.progress = context.Queue(depth), context.Value("d", 0.0)
        self.weights = context.Array("d", [1.0] * len(TASKS))
        args = (self.queue, self.progress, self.weights, kind, seed, core, state)
        self.process = context.Process(target=produce, args=args, daemon=True)
        self.process.start()
        self.kept, self.keep, self.fresh, self.reused, self.random = [], keep, 0, 0, random.Random(seed)

    def next(self):
        """The next batch."""
        try:
            item = self.queue.get(block=not self.kept or self.reused > 2 * self.fresh, timeout=300)
            self.fresh += 1
            self.kept.append(item)
            if len(self.kept) > self.keep:
                self.kept.pop(0)
            return item
        except queue.Empty:
            self.reused += 1
            return self.kept[self.random.randrange(len(self.kept))]

    def close(self):
        """Stop the producer."""
        self.process.terminate()
        self.process.join()
