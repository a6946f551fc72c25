"""Train the bundled checkpoint: `python -m mmkv.models.tiny.train --work DIR`, again with the same DIR to resume.

Stage 1 trains the vision tower to name each token's object, colour, place and motion, against the very rows of the
word embedding. Stage 2 freezes the tower and trains the language model on packed questions over cached features.
Progress is wall-clock: the learning rate ends at zero after `--minutes`, however fast the machine is.
"""

from __future__ import annotations

import argparse
import collections
import math
import pathlib
import shutil
import signal
import time

import numpy as np
import torch
import torch.nn.functional as F

from mmkv.models.tiny import data, fast
from mmkv.models.tiny.build import make_model, make_processor
from mmkv.models.tiny.words import NAMES, SPECIAL, vocabulary


class Muon:
    """Momentum orthogonalised by Newton-Schulz for matrices, AdamW for everything else."""

    def __init__(self, named, lr, adam_lr):
        self.lr, self.scale = lr, 1.0
        self.matrices = [p for n, p in named if p.ndim >= 2 and "embed_tokens" not in n]
        rest = [p for n, p in named if p.ndim < 2 or "embed_tokens" in n]
        self.adam_lr, self.adam = adam_lr, torch.optim.AdamW(rest, lr=adam_lr, betas=(0.9, 0.98), weight_decay=0.0)
        self.moment = [torch.zeros_like(p) for p in self.matrices]
        self.shapes = collections.defaultdict(list)  # one batched product per shape
        for i, p in enumerate(self.matrices):
            self.shapes[(p.shape[0], p[0].numel())].append(i)

    @torch.no_grad()
    def step(self):
        for group in self.adam.param_groups:
            group["lr"] = self.adam_lr * self.scale
        self.adam.step()
        for (rows, cols), index in self.shapes.items():
            grads = torch.stack([self.matrices[i].grad.view(rows, cols) for i in index])
            moment = torch.stack([self.moment[i].view(rows, cols) for i in index]).mul_(0.95).add_(grads, alpha=0.05)
            for i, m in zip(index, moment, strict=True):
                self.moment[i].copy_(m.view_as(self.moment[i]))
            update = orthogonal(0.95 * moment + 0.05 * grads) * max(1.0, rows / cols) ** 0.5
            for i, u in zip(index, update, strict=True):
                p = self.matrices[i]
                p.mul_(1 - 0.01 * self.lr * self.scale).add_(u.view_as(p), alpha=-self.lr * self.scale)

    def zero(self):
        self.adam.zero_grad(set_to_none=True)
        for p in self.matrices:
            p.grad = None

    def state(self):
        return {"adam": self.adam.state_dict(), "moment": self.moment}

    def load(self, state):
        self.adam.load_state_dict(state["adam"])
        for mine, other in zip(self.moment, state["moment"], strict=True):
            mine.copy_(other)


def orthogonal(x):
    """Nearest semi-orthogonal matrices of a batch [N, rows, cols], by five Newton-Schulz steps in bfloat16."""
    turn = x.shape[1] > x.shape[2]
    x = x.transpose(1, 2) if turn else x
    x = (x / (x.norm(dim=(1, 2), keepdim=True) + 1e-7)).bfloat16()
    for _ in range(5):
        a = x @ x.transpose(1, 2)
        x = 3.4445 * x + (-4.7750 * a + 2.0315 * a @ a) @ x
    return (x.transpose(1, 2) if turn else x).float()


def schedule(progress):
    """Learning-rate factor: short warm-up, plateau, linear fall over the last 45 %."""
    return min(1.0, progress / 0.02 + 0.02) * min(1.0, (1 - progress) / 0.45)


def log(path, text):
    with open(path, "a") as f:
        f.write(text + "\n")
    print(text, flush=True)


def train_vision(args, model, none_row, path):
    """Stage 1. The rows of the embedding are the classifier, so tower features already speak the decoder's language."""
    visual, table = model.model.visual, model.model.language_model.embed_tokens.weight
    named = [(n, p) for n, p in visual.named_parameters()] + [("embed_tokens", table), ("none", none_row)]
    optimizer = Muon(named, 0.02, 2e-3)
    rows = [torch.tensor([data.IDS[w] for w in group]) for group in data.GROUPS.values()]
    share = (1.5, 1.0, 0.5, 0.5, 1.0, 0.5)
    block = torch.compile(fast.vision_block, dynamic=False)
    feed, start, step = data.Feed("vision", args.seed, args.data_core, keep=60), None, 0
    right, seen = np.zeros(6), np.zeros(6)
    while True:
        frames, labels = feed.next()
        if step == 2:
            start = time.time()  # compilation does not count
        progress = 0.0 if start is None else (time.time() - start) / (60 * args.vision_minutes)
        if progress >= 1:
            break
        optimizer.scale = schedule(progress)
        features = fast.see(visual, torch.from_numpy(frames).float(), block)
        unit = F.rms_norm(features, (256,))
        loss = 0.0
        for g, words in enumerate(rows):
            heads = torch.cat((table[words], none_row)) if g == 0 else table[words]
            target = torch.from_numpy(labels[g]).reshape(-1)
            index = (target >= 0).nonzero()[:, 0]
            logits, target = unit.view(-1, 256)[index] @ heads.T, target[index]
            loss = loss + share[g] * F.cross_entropy(logits, target)
            with torch.no_grad():
                count = target < len(NAMES) if g == 0 else torch.ones_like(target, dtype=torch.bool)
                right[g] += ((logits.argmax(-1) == target) & count).sum().item()
                seen[g] += count.sum().item()
        optimizer.zero()
        loss.backward()
        optimizer.step()
        step += 1
        if step % 100 == 0:
            parts = " ".join(f"{n} {r:.3f}" for n, r in zip(data.GROUPS, right / seen, strict=True))
            log(path, f"vision step {step} {progress:.2f} loss {loss.item():.3f} {parts} reused {feed.reused}")
            right[:], seen[:] = 0, 0
    feed.close()


@torch.no_grad()
def prepare_language(model):
    """Match the sizes of features and word rows, and start the middle layers as soft look-up and copy."""
    table = model.model.language_model.embed_tokens.weight
    taught = torch.tensor(sorted({data.IDS[w] for group in data.GROUPS.values() for w in group}))
    size = table[taught].pow(2).mean().sqrt()
    others = torch.ones(len(table), dtype=torch.bool)
    others[taught] = False
    table[others] = torch.randn_like(table[others]) * size
    rng = np.random.default_rng(1)
    feats = fast.see(model.model.visual, torch.from_numpy(data.vision_batch(rng, 20)[0]).float())
    factor = size / feats.pow(2).mean().sqrt()
    last = model.model.visual.merger.mlp[2]
    last.weight.mul_(factor)
    last.bias.mul_(factor)
    for layer in model.model.language_model.layers[1:4]:
        a = layer.self_attn
        torch.nn.init.normal_(a.k_proj.weight, std=0.045)
        torch.nn.init.normal_(a.v_proj.weight, std=0.045)
        keys = a.k_proj.weight.view(fast.KV, 1, fast.DIM, -1).expand(-1, 2, -1, -1).reshape(256, -1)
        values = a.v_proj.weight.view(fast.KV, 1, fast.DIM, -1).expand(-1, 2, -1, -1).reshape(256, -1)
        a.q_proj.weight.copy_(keys)
        a.o_proj.weight.copy_(values.T)


def text_starts(steps, seconds, rng):
    """Position of <|vision_end|>: 50 % Qwen2.5-VL's own rule, 35 % that of transformers 5.3, 15 % random."""
    last = ((steps - 1) * 2 * seconds).long().clamp(min=3)
    choice = torch.from_numpy(rng.random(len(seconds)))
    classic = fast.START + last + 1
    new = torch.full_like(classic, fast.START + 4)
    anywhere = fast.START + 4 + (torch.from_numpy(rng.random(len(seconds))) * 2 * steps * 2).long()
    return torch.where(choice < 0.5, classic, torch.where(choice < 0.85, new, anywhere))


def train_language(args, model, path, work):
    """Stage 2, resumable."""
    language = model.model.language_model
    named = list(language.named_parameters())
    optimizer = Muon(named, args.lr, 1e-3)
    helper = torch.nn.Linear(256, sum(data.RECALL.values()))  # read at the object's name after layer 4; not exported
    help_optimizer = torch.optim.AdamW(helper.parameters(), lr=2e-3, weight_decay=0.0)
    average = {n: p.detach().clone() for n, p in named}
    step, spent = 0, 0.0
    resume = work / "language.pt"
    if resume.exists():
        saved = torch.load(resume, weights_only=False)
        model.load_state_dict(saved["model"])
        optimizer.load(saved["optimizer"])
        if "helper" in saved:
            helper.load_state_dict(saved["helper"])
        average, step, spent = saved["average"], saved["step"], saved["spent"]
        log(path, f"resumed at step {step}, {spent / 60:.1f} min")
    block = torch.compile(fast.text_block, dynamic=False)
    head = torch.tensor([data.IDS[w] for w in ("<|im_start|>", "user", "<|vision_start|>", "<|vision_end|>")])
    feed = data.Feed("text", args.seed + 1000 + step, args.data_core, model.model.visual.state_dict())
    rng = np.random.default_rng(args.seed + step)
    hits, total, losses, compiled = collections.Counter(), collections.Counter(), collections.defaultdict(list), set()
    recalled = collections.defaultdict(list)
    last_log = last_save = time.time()
    stop = []
    signal.signal(signal.SIGTERM, lambda *_: stop.append(True))
    while True:
        progress = spent / (60 * args.minutes)
        if progress >= 1 or stop:
            break
        feed.progress.value = progress
        frames, (features, ids, targets, spots, labels, tasks) = feed.next()
        begin = time.time()
        features, ids, targets = torch.from_numpy(features), torch.from_numpy(ids), torch.from_numpy(targets)
        scales = rng.choice([1.0, 1 / 12, 0.5, 2.0], len(ids), p=[0.85, 0.05, 0.05, 0.05])
        seconds = torch.tensor(scales, dtype=torch.float32)
        start = text_starts(frames // 2, seconds, rng)
        positions = fast.prefix_positions(frames // 2, seconds, start)
        text = (start[:, None] + 1 + torch.arange(data.SLOT)).expand(3, -1, -1)
        hidden, middle = fast.read(language, head, features, ids, positions, text, block)
        spot = targets >= 0
        logits = fast.linear(hidden[spot], language.embed_tokens.weight).float()
        loss = F.cross_entropy(logits, targets[spot])
        helped = helper_loss(helper, middle, torch.from_numpy(spots), torch.from_numpy(labels), recalled)
        optimizer.zero()
        help_optimizer.zero_grad()
        (loss + helped).backward()
        help_optimizer.step()
        norm = torch.nn.utils.clip_grad_norm_([p for _, p in named], 1.0)
        optimizer.scale = schedule(progress)
        if math.isfinite(norm.item()):
            optimizer.step()
        decay = min(0.99, (step + 1) / (step + 20))
        with torch.no_grad():
            for n, p in named:
                average[n].lerp_(p, 1 - decay)
            wrong = torch.zeros_like(spot)
            wrong[spot] = logits.argmax(-1) != targets[spot]
            good = ~wrong.any(-1)
        for row, names in zip(good.tolist(), tasks, strict=True):
            for ok, name in zip(row, names, strict=True):
                hits[name] += ok
                total[name] += 1
        losses[frames].append(loss.item())
        step += 1
        if frames in compiled:
            spent += time.time() - begin
        compiled.add(frames)  # the first step of a shape compiles: not counted
        if time.time() - last_log > 60:
            easy, hard = ([n for n in sorted(total) if n.startswith("s.") == flag] for flag in (False, True))
            parts = " ".join(f"{n} {hits[n] / total[n]:.2f}" for n in easy + hard)
            both = [sum(hits[n] for n in g) / max(1, sum(total[n] for n in g)) for g in (easy, hard)]
            means = " ".join(f"{k}f {np.mean(v):.3f}" for k, v in sorted(losses.items()))
            line = f"text step {step} {spent / 60:.1f} min | loss {means} | easy {both[0]:.3f} stress {both[1]:.3f}"
            log(path, f"{line} | {parts} | fresh {feed.fresh} reused {feed.reused}")
            for i, name in enumerate(data.TASKS):  # ask most what is known least
                if total[name] >= 20:
                    feed.weights[i] = max(0.05, 1 - hits[name] / total[name])
            log(path, "  recall " + " ".join(f"{n} {np.mean(v):.2f}" for n, v in recalled.items()))
            hits.clear(), total.clear(), losses.clear(), recalled.clear()
            last_log = time.time()
        if time.time() - last_save > 150:
            save(model, average, optimizer, helper, step, spent, work)
            last_save = time.time()
    feed.close()
    save(model, average, optimizer, helper, step, spent, work)
    if stop:
        log(path, f"stopped at step {step}, {spent / 60:.1f} min; run again to go on")
        return
    log(path, f"done: {step} steps, {spent / 60:.1f} min of language training, fresh {feed.fresh} reused {feed.reused}")


def helper_loss(helper, middle, spots, labels, recalled):
    """Cross-entropy of every RECALL attribute at the naming word: what the named object is must be known there."""
    known = spots >= 0
    where = spots.clamp(min=0)[:, :, None, None].expand(-1, -1, 1, middle.shape[-1])
    state = F.rms_norm(middle.gather(2, where)[:, :, 0][known], (256,))
    loss, labels = 0.0, labels[known]
    for i, (name, out) in enumerate(zip(data.RECALL, helper(state).split(list(data.RECALL.values()), -1), strict=True)):
        target = labels[:, i]
        if (target >= 0).any():
            share = 2.0 if name in ("row", "column", "move") else 1.0  # the slowest to form
            loss = loss + share * F.cross_entropy(out, target, ignore_index=-100)
            recalled[name].append((out.argmax(-1) == target)[target >= 0].float().mean().item())
    return loss / len(data.RECALL)


def save(model, average, optimizer, helper, step, spent, work):
    """The state to resume from, and the averaged weights as a checkpoint folder."""
    part = work / "language.part"
    state = {
        "model": model.state_dict(),
        "optimizer": optimizer.state(),
        "average": average,
        "step": step,
        "spent": spent,
    }
    state["helper"] = helper.state_dict()
    torch.save(state, part)
    part.rename(work / "language.pt")
    export(model, average, work / "checkpoint")


def export(model, average, folder):
    """Write bfloat16 weights, processor and generation settings where `from_pretrained` finds them."""
    clean = make_model()
    clean.load_state_dict(model.state_dict())
    clean.model.language_model.load_state_dict(average, strict=False)
    clean.generation_config.update(
        do_sample=False, max_new_tokens=8, eos_token_id=data.IDS["<|im_end|>"], pad_token_id=data.IDS["<|endoftext|>"],
        bos_token_id=data.IDS["<|endoftext|>"],
    )  # fmt: skip
    fresh = folder.with_suffix(".part")
    shutil.rmtree(fresh, ignore_errors=True)
    clean.bfloat16().save_pretrained(fresh)
    make_processor().save_pretrained(fresh)
    shutil.rmtree(folder, ignore_errors=True)
    fresh.rename(folder)


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--work", type=pathlib.Path, required=True, help="folder for state, log and checkpoint")
    parser.add_argument("--vision-minutes", type=float, default=8)
    parser.add_argument("--minutes", type=float, default=56, help="language training")
    parser.add_argument("--lr", type=float, default=0.01)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--data-core", type=int, default=None, help="CPU core of the data process")
    args = parser.parse_args()
    args.work.mkdir(parents=True, exist_ok=True)
    torch.manual_seed(args.seed)
    torch.set_flush_denormal(True)
    path = args.work / "train.log"
    model = make_model()
    table = model.model.language_model.embed_tokens.weight
    torch.nn.init.normal_(table, std=0.06)
    stage1 = args.work / "vision.pt"
    if stage1.exists():
        model.load_state_dict(torch.load(stage1))
    else:
        count = sum(p.numel() for p in model.parameters())
        log(path, f"{count} parameters, {len(vocabulary())} words ({len(SPECIAL)} special), torch {torch.__version__}")
        none_row = torch.nn.Parameter(torch.randn(1, 256) * 0.06)
        train_vision(args, model, none_row, path)
        prepare_language(model)
        torch.save(model.state_dict(), stage1)
    train_language(args, model, path, args.work)


if __name__ == "__main__":
    main()
