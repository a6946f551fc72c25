"""ToMe and DiffRate in a vision transformer that is trained here: accuracy at equal FLOPs, learned rates against uniform.

A timm ViT (6 blocks, 65 tokens) learns scikit-learn's digits on canvases, a few minutes on one core. Its weights then stay.
Every setting is cut to the same GFLOPs; accuracy is on canvases of digits that were never seen.

    python benchmarks/vit.py --work /tmp/vit --seeds 2
"""

from __future__ import annotations

import argparse
import statistics
import time
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context
from pathlib import Path

import timm
import torch
import torch.nn.functional as F
from common import environment, save

from mmkv._vision.tower import TowerHooks
from mmkv._vision.train_data import Batches, digit_canvases
from mmkv._vision.train_rates import gflops, train_rates
from mmkv.models.tower import timm_tower
from mmkv.tokens import DiffRate, ToMe

SIDE, TOKENS, DEPTH = 40, 65, 6
TARGETS = (0.75, 0.6, 0.45)  # shares of the whole model's GFLOPs
RESULTS = Path(__file__).parent / "results"


def make_model() -> torch.nn.Module:
    return timm.create_model(
        "vit_tiny_patch16_224",
        img_size=SIDE,
        patch_size=5,
        embed_dim=64,
        depth=DEPTH,
        num_heads=4,
        mlp_ratio=2,
        num_classes=10,
    )


def trained(seed: int, canvases: int, epochs: int, work: Path) -> tuple[torch.nn.Module, float]:
    """A trained model and the seconds it took; from the work folder where it is there already."""
    path = work / f"vit-{seed}-{canvases}-{epochs}.pt"
    torch.manual_seed(seed)
    model = make_model()
    if path.exists():
        held = torch.load(path)
        model.load_state_dict(held["weights"])
        return model.eval(), held["seconds"]
    started = time.perf_counter()
    batches = Batches(*digit_canvases(canvases, SIDE, seed=seed), 64, seed)
    optimizer = torch.optim.AdamW(model.parameters(), weight_decay=0.05)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, 2e-3, total_steps=epochs * len(batches), pct_start=0.15)
    for epoch in range(epochs):
        for images, labels in batches:
            loss = F.cross_entropy(model(images), labels, label_smoothing=0.05)
            optimizer.zero_grad()
            loss.backward()
            torch.nn.utils.clip_grad_norm_(model.parameters(), 1)
            optimizer.step()
            schedule.step()
        print(
            f"seed {seed}, epoch {epoch + 1}: loss {loss.item():.3f}, {time.perf_counter() - started:.0f} s", flush=True
        )
    seconds = time.perf_counter() - started
    work.mkdir(parents=True, exist_ok=True)
    torch.save(dict(weights=model.state_dict(), seconds=seconds), path)
    return model.eval(), seconds


@torch.no_grad()
def accuracy(
    model: torch.nn.Module, method, images: torch.Tensor, labels: torch.Tensor
) -> tuple[float, float, list[int]]:
    """Share of right answers with a method, GFLOPs of an image, and the tokens behind each block."""
    with TowerHooks(timm_tower(model), [] if method is None else [method]) as hooks:
        answers = torch.cat([model(part).argmax(1) for part in images.split(250)])
        behind = hooks.state.tokens_per_block if hooks.state else [TOKENS] * DEPTH
    return float((answers == labels).float().mean()), gflops(model, TOKENS, behind), behind


def fitted(model: torch.nn.Module, make, target: float):
    """The strength of a family of settings, 0 ... 1, whose GFLOPs come closest to a target; they fall with the strength."""
    low, high = 0.0, 1.0
    cost = lambda strength: gflops(model, TOKENS, [m for _, m in kept(make(strength))])  # noqa: E731
    for _ in range(30):
        middle = (low + high) / 2
        low, high = (low, middle) if cost(middle) < target else (middle, high)
    return make(min((low, high), key=lambda strength: abs(cost(strength) - target)))


def kept(method) -> list[tuple[int, int]]:
    """Tokens behind pruning and behind merging in each block."""
    if isinstance(method, DiffRate):
        return list(method.kept(TOKENS))
    left, out = TOKENS, []
    for r in method.schedule(DEPTH):
        left -= min(r, (left - 1) // 2)
        out.append((left, left))
    return out


def uniform(strength: float, pruned: float, ratio: bool = False) -> DiffRate:
    """The same number (or share) of tokens less in each block but the first, `pruned` of them pruned, the others merged."""
    counts = [TOKENS * (1 - strength) ** b if ratio else TOKENS - strength * b * (TOKENS - 2) for b in range(DEPTH)]
    counts = [max(round(count), 2) for count in counts]
    between = [before - round(pruned * (before - now)) for before, now in zip([TOKENS, *counts], counts)]
    return DiffRate(tuple(between), tuple(counts), TOKENS)


def once(strength: float) -> DiffRate:
    """All that goes, goes in block 1: half of it pruned, half merged."""
    left = max(round(TOKENS * (1 - strength)), 2)
    rest = (left,) * (DEPTH - 2)
    return DiffRate((TOKENS, (TOKENS + left) // 2, *rest), (TOKENS, left, *rest), TOKENS)


def tome(strength: float) -> ToMe:
    """ToMe with the same r in every block but for the rest of the division, which the first blocks take."""
    total = round(strength * DEPTH * 32)
    return ToMe(tuple(min(total // DEPTH + (b < total % DEPTH), 32) for b in range(DEPTH)))


UNIFORM = {
    "ToMe, uniform r": tome,
    "uniform, pruned": lambda s: uniform(s, 1.0),
    "uniform, merged": lambda s: uniform(s, 0.0),
    "uniform, half each": lambda s: uniform(s, 0.5),
    "uniform share, half each": lambda s: uniform(s, 0.5, ratio=True),
    "once in block 1, half each": once,
}


def measured(seed: int, canvases: int, epochs: int, work: Path) -> list[dict]:
    """All rows of one seed."""
    torch.set_num_threads(1)
    model, seconds = trained(seed, canvases, epochs, work)
    test = digit_canvases(2000, SIDE, seed=1000 + seed, train=False)
    right, whole, behind = accuracy(model, None, *test)
    rows = [dict(name="all tokens", seed=seed, target=1.0, accuracy=right, share=1.0, kept=behind, seconds=seconds)]
    images, labels = digit_canvases(2000, SIDE, seed=2000 + seed)
    for target in TARGETS:
        started = time.perf_counter()
        rates = train_rates(
            model, Batches(images, labels, 64, seed), target * whole, epochs=4, lr=0.05, granularity=2, loss="labels"
        )
        seconds = time.perf_counter() - started
        cost = gflops(model, TOKENS, [m for _, m in kept(rates)])
        methods = {"DiffRate, learned": rates, **{name: fitted(model, make, cost) for name, make in UNIFORM.items()}}
        for name, method in methods.items():
            right, cost, _ = accuracy(model, method, *test)
            row = dict(name=name, seed=seed, target=target, accuracy=right, share=cost / whole, kept=kept(method))
            rows.append(row | (dict(seconds=seconds) if method is rates else {}))
            print(f"seed {seed}: {name:28} {cost / whole:6.1%} of GFLOPs {right:7.1%}  {row['kept']}", flush=True)
    return rows


def table(rows: list[dict]) -> str:
    """Mean accuracy over the seeds, a row for each method and a column for each target."""
    names = list(dict.fromkeys(row["name"] for row in rows if row["name"] != "all tokens"))
    dense = statistics.mean(row["accuracy"] for row in rows if row["name"] == "all tokens")
    lines = [f"all tokens: {dense:.1%}", " " * 28 + "".join(f"{target:>18.0%}" for target in TARGETS)]
    for name in names:
        cells = []
        for target in TARGETS:
            found = [row for row in rows if (row["name"], row["target"]) == (name, target)]
            mean, share = (statistics.mean(row[key] for row in found) for key in ("accuracy", "share"))
            cells.append(f"{mean:>9.1%} ({share:.1%})")
        lines.append(f"{name:28}" + "".join(f"{cell:>18}" for cell in cells))
    return "\n".join(lines)


def plot(rows: list[dict], path: Path) -> None:
    """Accuracy over GFLOPs: the mean of the seeds as a line, each seed a point."""
    import matplotlib as mpl

    mpl.use("Agg")
    from matplotlib import pyplot as plt

    figure, panel = plt.subplots(figsize=(6.4, 4.2))
    dense = [row["accuracy"] for row in rows if row["name"] == "all tokens"]
    panel.axhline(statistics.mean(dense), color="gray", linewidth=1, linestyle=":", label="all tokens")
    for name in dict.fromkeys(row["name"] for row in rows if row["name"] != "all tokens"):
        mine = [row for row in rows if row["name"] == name]
        means = [
            [statistics.mean(row[key] for row in mine if row["target"] == target) for key in ("share", "accuracy")]
            for target in TARGETS
        ]
        (line,) = panel.plot(*zip(*means), marker="o", linewidth=2.5 if "learned" in name else 1.2, label=name)
        panel.scatter([r["share"] for r in mine], [r["accuracy"] for r in mine], s=8, color=line.get_color(), alpha=0.5)
    panel.set_xlabel("GFLOPs, share of the whole model")
    panel.set_ylabel("accuracy on unseen digits")
    panel.xaxis.set_major_formatter(lambda value, _: f"{value:.0%}")
    panel.yaxis.set_major_formatter(lambda value, _: f"{value:.0%}")
    panel.spines[["top", "right"]].set_visible(False)
    panel.legend(fontsize=8, frameon=False)
    figure.tight_layout()
    figure.savefig(path, dpi=150)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--work", type=Path, default=Path("/tmp/mmkv-vit"), help="folder for trained weights")
    parser.add_argument("--seeds", type=int, default=2)
    parser.add_argument("--jobs", type=int, default=1, help="seeds at a time, one core each")
    parser.add_argument("--canvases", type=int, default=8000)
    parser.add_argument("--epochs", type=int, default=9)
    parser.add_argument("--out", default=str(RESULTS / "vit.json"))
    args = parser.parse_args()
    with ProcessPoolExecutor(args.jobs, mp_context=get_context("spawn")) as pool:
        tasks = [pool.submit(measured, seed, args.canvases, args.epochs, args.work) for seed in range(args.seeds)]
        rows = [row for task in tasks for row in task.result()]
    print(table(rows))
    setting = dict(canvases=args.canvases, epochs=args.epochs, seeds=args.seeds, side=SIDE, tokens=TOKENS, depth=DEPTH)
    save(args.out, dict(environment=environment(), setting=setting, rows=rows))
    plot(rows, Path(args.out).with_suffix(".png"))


if __name__ == "__main__":
    main()
