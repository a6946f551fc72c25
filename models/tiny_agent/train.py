"""Train the bundled agent: `python -m mmkv.models.tiny_agent.train --work DIR`, again with the same DIR to resume.

It starts from the weights of the bundled tiny model. Stage 1 trains the vision tower to name each token's element, colour
and place on a screen, against the very rows of the word embedding that the agent writes coordinates with. Stage 2 freezes
the tower and trains the language model on packed sessions. Seconds are counted in training steps alone, batches included.
"""

from __future__ import annotations

import argparse
import collections
import pathlib
import shutil
import signal
import time

import numpy as np
import torch
import torch.nn.functional as F

from mmkv.models import tiny
from mmkv.models.tiny.train import Muon, log, schedule
from mmkv.models.tiny.words import vocabulary as tiny_vocabulary
from mmkv.models.tiny_agent import fast, packing
from mmkv.models.tiny_agent.build import make_model, make_processor
from mmkv.models.tiny_agent.words import NAMES

STAGES = ((0.6, 4, 512), (1.0, 3, 768))  # of stage 2: until which progress, packed rows in a batch, tokens in a row
SHARE = (1.5, 1.0, 1.5, 1.5)  # of the loss, by entry of `packing.GROUPS`


def start_model():
    """The agent with the tiny model's weights; words that it lacks get rows as large as the others."""
    model, (source, _) = make_model(), tiny.load()
    old = {w: i for i, w in enumerate(tiny_vocabulary())}
    state = source.state_dict()
    table = state["model.language_model.embed_tokens.weight"]
    fresh = torch.randn(table.shape) * table[: len(old)].std()
    for word, i in packing.IDS.items():
        if word in old:
            fresh[i] = table[old[word]]
    state["model.language_model.embed_tokens.weight"] = state["lm_head.weight"] = fresh
    model.load_state_dict(state)
    return model


class Clock:
    """How far a stage is, in steps of training; saves now and then and stops on SIGTERM."""

    def __init__(self, minutes: float, spent: float = 0.0):
        self.total, self.spent, self.begun, self.stopped = 60 * minutes, spent, 0.0, False
        signal.signal(signal.SIGTERM, lambda *_: setattr(self, "stopped", True))

    @property
    def progress(self) -> float:
        """0..1."""
        return min(1.0, self.spent / self.total)

    def tick(self, counts: bool) -> None:
        """A step is over; one that compiled does not count."""
        now = time.monotonic()
        if self.begun and counts:
            self.spent += now - self.begun
        self.begun = now


def train_vision(args, model, path) -> None:
    """Stage 1."""
    visual, table = model.model.visual, model.model.language_model.embed_tokens.weight
    none_row = torch.nn.Parameter(torch.randn(1, fast.WIDTH) * table.std().item())
    named = [*visual.named_parameters(), ("embed_tokens", table), ("none", none_row)]
    optimizer, clock = Muon(named, args.vision_lr, 1e-3), Clock(args.vision_minutes)
    words = [torch.tensor([packing.IDS[w] for w in group]) for group in packing.GROUPS.values()]
    rng, step = np.random.default_rng(args.seed), 0
    right, seen = np.zeros(len(words)), np.zeros(len(words))
    while clock.progress < 1 and not clock.stopped:
        images, labels = packing.vision_batch(rng)
        unit = F.rms_norm(fast.see(visual, torch.from_numpy(images)), (fast.WIDTH,)).view(-1, fast.WIDTH)
        loss = torch.zeros(())
        for g, index in enumerate(words):
            heads = torch.cat((table[index], none_row)) if g == 0 else table[index]
            target = torch.from_numpy(labels[g]).reshape(-1)
            known = (target >= 0).nonzero()[:, 0]
            logits, target = unit[known] @ heads.T, target[known]
            loss = loss + SHARE[g] * F.cross_entropy(logits, target)
            there = target < len(NAMES) if g == 0 else target >= 0
            right[g] += ((logits.argmax(-1) == target) & there).sum().item()
            seen[g] += there.sum().item()
        optimizer.zero()
        loss.backward()
        optimizer.scale = schedule(clock.progress)
        optimizer.step()
        step += 1
        clock.tick(step > 1)
        if step % 50 == 0:
            parts = " ".join(f"{n} {r:.3f}" for n, r in zip(packing.GROUPS, right / seen, strict=True))
            log(path, f"vision step {step} {clock.spent / 60:.1f} min loss {loss.item():.3f} {parts}")
            right[:], seen[:] = 0, 0
    log(path, f"vision done: {step} steps, {clock.spent / 60:.1f} min")


@torch.no_grad()
def match_scale(model) -> None:
    """Make features as large as word rows, as the language model is used to."""
    images, _ = packing.vision_batch(np.random.default_rng(1))
    size = model.model.language_model.embed_tokens.weight[: len(packing.IDS)].pow(2).mean().sqrt()
    factor = size / fast.see(model.model.visual, torch.from_numpy(images)).pow(2).mean().sqrt()
    last = model.model.visual.merger.mlp[2]
    last.weight.mul_(factor)
    last.bias.mul_(factor)


class Tally:
    """How often each kind of task was answered right, and which part of the answer was not."""

    def __init__(self):
        self.right, self.total, self.losses = collections.Counter(), collections.Counter(), []

    def add(self, batch: dict, spot: torch.Tensor, hits: torch.Tensor, loss: float) -> None:
        self.losses.append(loss)
        wrong = torch.zeros_like(spot)
        wrong[spot] = ~hits
        for row, query, kinds in zip(wrong, batch["query"], batch["kinds"], strict=True):
            missed = set(query[row].tolist())
            for i, kind in enumerate(kinds):
                self.total[kind] += 1
                self.right[kind] += i not in missed

    def rates(self) -> dict[str, float]:
        return {kind: self.right[kind] / self.total[kind] for kind in sorted(self.total)}


class Helper:
    """A head that is not exported: after layer 4, a word that names an element must know its colour, x and y."""

    def __init__(self):
        self.sizes = [len(packing.GROUPS[name]) for name in ("colour", "x", "y")]
        self.head = torch.nn.Linear(fast.WIDTH, sum(self.sizes))
        self.optimizer = torch.optim.AdamW(self.head.parameters(), lr=2e-3, weight_decay=0.0)
        self.hits: list[list[float]] = []

    def loss(self, middle: torch.Tensor, facts: torch.Tensor) -> torch.Tensor:
        """Cross-entropy over the words that have facts."""
        known = facts[..., 0] >= 0
        logits = self.head(F.rms_norm(middle[known], (fast.WIDTH,))).split(self.sizes, -1)
        wanted = facts[known].unbind(-1)
        self.hits.append([(x.argmax(-1) == t).float().mean().item() for x, t in zip(logits, wanted, strict=True)])
        return sum(F.cross_entropy(x, t) for x, t in zip(logits, wanted, strict=True)) / 3

    def state(self) -> dict:
        return dict(head=self.head.state_dict(), optimizer=self.optimizer.state_dict())

    def load(self, state: dict) -> None:
        self.head.load_state_dict(state["head"])
        self.optimizer.load_state_dict(state["optimizer"])


def train_language(args, model, path, work) -> None:
    """Stage 2, resumable."""
    language = model.model.language_model
    named = list(language.named_parameters())
    optimizer, clock = Muon(named, args.lr, 5e-4), Clock(args.minutes)
    average, step, weights, helper = {n: p.detach().clone() for n, p in named}, 0, {}, Helper()
    if (work / "language.pt").exists():
        saved = torch.load(work / "language.pt", weights_only=False)
        model.load_state_dict(saved["model"])
        optimizer.load(saved["optimizer"])
        if "helper" in saved:
            helper.load(saved["helper"])
        average, step, clock.spent, weights = saved["average"], saved["step"], saved["spent"], saved["weights"]
        log(path, f"resumed at step {step}, {clock.spent / 60:.1f} min")
    block = torch.compile(fast.text_block, dynamic=False)
    tally, logged, kept, compiled = Tally(), time.monotonic(), time.monotonic(), set()
    while clock.progress < 1 and not clock.stopped:
        _, rows, length = next(stage for stage in STAGES if clock.progress < stage[0])
        batch = packing.text_batch(model.model.visual, rows, length, np.random.default_rng([args.seed, step]), weights)
        inputs = (batch[name] for name in ("ids", "features", "places", "positions", "bias"))
        (hidden, middle), spot = fast.read(language, *inputs, block), batch["targets"] >= 0
        logits, target = fast.linear(hidden[spot], language.embed_tokens.weight).float(), batch["targets"][spot]
        loss = F.cross_entropy(logits, target)
        optimizer.zero()
        helper.optimizer.zero_grad()
        (loss + helper.loss(middle, batch["facts"])).backward()
        helper.optimizer.step()
        norm = torch.nn.utils.clip_grad_norm_([p for _, p in named], 1.0)
        optimizer.scale = schedule(clock.progress)
        if torch.isfinite(norm):
            optimizer.step()
        with torch.no_grad():
            for n, p in named:
                average[n].lerp_(p, 1 - min(0.99, (step + 1) / (step + 20)))
        tally.add(batch, spot, logits.argmax(-1) == target, loss.item())
        step += 1
        clock.tick(length in compiled)
        compiled.add(length)
        if time.monotonic() - logged > 60:
            rates = tally.rates()
            parts = " ".join(f"{kind} {rate:.3f}" for kind, rate in rates.items())
            log(path, f"text step {step} {clock.spent / 60:.1f} min | loss {np.mean(tally.losses):.4f} | {parts}")
            known = " ".join(f"{n} {r:.2f}" for n, r in zip(("colour", "x", "y"), np.mean(helper.hits, 0), strict=True))
            log(path, f"  helper {known}")
            weights = {kind: max(0.1, 1 - rate) for kind, rate in rates.items()}  # ask most what is known least
            tally, logged, helper.hits = Tally(), time.monotonic(), []
        if time.monotonic() - kept > 150:
            save(model, average, optimizer, helper, step, clock.spent, weights, work)
            kept = time.monotonic()
    save(model, average, optimizer, helper, step, clock.spent, weights, work)
    log(
        path, f"{'stopped' if clock.stopped else 'done'}: {step} steps, {clock.spent / 60:.1f} min of language training"
    )


def save(model, average, optimizer, helper, step, spent, weights, work) -> None:
    """The state to resume from, and the averaged weights as a checkpoint folder."""
    state = dict(model=model.state_dict(), optimizer=optimizer.state(), average=average, helper=helper.state())
    torch.save(state | dict(step=step, spent=spent, weights=weights), work / "language.part")
    (work / "language.part").rename(work / "language.pt")
    export(model, average, work / "checkpoint")


def export(model, average, folder) -> None:
    """Write bfloat16 weights, processor and generation settings where `from_pretrained` finds them."""
    clean = make_model()
    clean.load_state_dict(model.state_dict())
    clean.model.language_model.load_state_dict(average, strict=False)
    end, pad = packing.IDS["<|im_end|>"], packing.IDS["<|endoftext|>"]
    clean.generation_config.update(
        do_sample=False, max_new_tokens=24, eos_token_id=end, pad_token_id=pad, bos_token_id=pad
    )
    fresh = folder.with_suffix(".part")
    shutil.rmtree(fresh, ignore_errors=True)
    clean.bfloat16().save_pretrained(fresh)
    make_processor().save_pretrained(fresh)
    shutil.rmtree(folder, ignore_errors=True)
    fresh.rename(folder)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--work", type=pathlib.Path, required=True, help="folder for state, log and checkpoint")
    parser.add_argument("--vision-minutes", type=float, default=8)
    parser.add_argument("--minutes", type=float, default=35, help="language training")
    parser.add_argument("--vision-lr", type=float, default=0.01)
    parser.add_argument("--lr", type=float, default=0.008)
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    args.work.mkdir(parents=True, exist_ok=True)
    torch.manual_seed(args.seed)
    torch.set_flush_denormal(True)
    path, stage1 = args.work / "train.log", args.work / "vision.pt"
    model = start_model()
    if stage1.exists():
        model.load_state_dict(torch.load(stage1))
    else:
        log(path, f"{sum(p.numel() for p in model.parameters())} parameters, torch {torch.__version__}, {args}")
        train_vision(args, model, path)
        match_scale(model)
        torch.save(model.state_dict(), stage1)
    train_language(args, model, path, args.work)


if __name__ == "__main__":
    main()
