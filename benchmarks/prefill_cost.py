"""What choosing costs: the share of a prefill that each method spends on probing, deciding and storing, and the peak.

Each method reads the same random prompt on the same random-weight model. Time is taken around the layers' own work and
compared with the rest of that same prefill, so that a slow moment of the machine hits both. "Choosing" is probing, scoring
and deciding; "storing" is what follows: gathering, packing, freeing. Methods that look at a few probe rows may spend 5 %
on choosing; the others say at what they look. Nothing here is about quality.

    python benchmarks/prefill_cost.py                      # 8,192 tokens, small model, CPU
    python benchmarks/prefill_cost.py --device cuda        # shapes of a 7B model
"""

from __future__ import annotations

import argparse
import statistics
import time

import torch
import transformers
from common import environment, save
from rich.console import Console
from rich.progress import track
from rich.table import Table

import mmkv
from mmkv import _session
from mmkv.cache import KVLayer, pipeline, view

SMALL = dict(
    hidden_size=1024, intermediate_size=2816, num_hidden_layers=4, num_attention_heads=8, num_key_value_heads=2
)
LARGE = dict(
    hidden_size=3584, intermediate_size=18944, num_hidden_layers=28, num_attention_heads=28, num_key_value_heads=4
)
# what the rule of 5 % does not cover, and why
BEYOND = {
    "H2O": "all query rows",
    "PrefixKV": "all query rows",
    "KVMerger": "all query rows",
    "GEAR": "low-rank factors",
    "GUIKV": "subspace of a frame",
}
STORES = ("KIVI", "VidKV", "WaterfillKV", "GEAR")  # no choice among tokens: their cost is packing


def make(device: str, dtype: torch.dtype):
    shape = LARGE if device == "cuda" else SMALL
    config = transformers.Qwen2Config(vocab_size=1000, max_position_embeddings=1 << 18, **shape)
    torch.manual_seed(0)
    with torch.device(device):
        model = transformers.AutoModelForCausalLM.from_config(config, dtype=dtype)
    return model.eval(), shape


class Stopwatch:
    """Seconds inside the layers' own work: processor time on CPU, the clock on a GPU."""

    OWN = ((view, "attending"), (KVLayer, "settle"), (_session, "settle_jointly"))
    STORING = tuple((KVLayer, name) for name in ("apply", "_flush", "_free"))

    def __init__(self, device: str):
        self.device = device
        self.own = self.storing = 0.0
        self.depth = {"own": 0, "storing": 0}

    def now(self) -> float:
        if self.device == "cuda":
            torch.cuda.synchronize()
            return time.perf_counter()
        return time.process_time()

    def around(self, kind: str, function):
        def timed(*args, **kwargs):
            begun, outer = self.now(), not self.depth[kind]
            self.depth[kind] += 1
            try:
                return function(*args, **kwargs)
            finally:
                self.depth[kind] -= 1
                if outer:
                    setattr(self, kind, getattr(self, kind) + self.now() - begun)

        return timed

    def prefill(self, model, ids) -> tuple[float, float, float]:
        """Seconds of one prefill: of the model's own, of choosing and of storing."""
        places = [("own", *place) for place in self.OWN] + [("storing", *place) for place in self.STORING]
        stock = [getattr(owner, name) for _, owner, name in places]
        for (kind, owner, name), function in zip(places, stock):
            setattr(owner, name, self.around(kind, function))
        self.own = self.storing = 0.0
        begun = self.now()
        try:
            with torch.no_grad():
                model(ids, logits_to_keep=1, use_cache=True)
        finally:
            for (_, owner, name), function in zip(places, stock):
                setattr(owner, name, function)
        return self.now() - begun - self.own, self.own - self.storing, self.storing


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--tokens", type=int, default=8192)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--device", default="cpu", choices=["cpu", "cuda"])
    parser.add_argument("--only", nargs="*")
    parser.add_argument("--out", default=None)
    options = parser.parse_args()

    about = environment()
    model, shape = make(options.device, torch.bfloat16)
    ids = torch.randint(0, 1000, (1, options.tokens), device=options.device)
    methods = {
        entry.name: (entry.method(),)
        for entry in mmkv.methods()
        if entry.kind == "cache" and not entry.method.next_scale and (not options.only or entry.name in options.only)
    }
    times: dict[str, list[tuple[float, float, float]]] = {"dense": [], **{name: [] for name in methods}}
    watch = Stopwatch(options.device)
    peaks, bytes_ = {}, {}
    for _ in track(range(options.rounds), description="rounds"):  # in turn, so that a drift of the clock hits all alike
        for name in times:
            with mmkv.wrapped(model, cache=methods.get(name, ())):
                times[name].append(watch.prefill(model, ids))
                report = mmkv.report(model)
                peaks[name], bytes_[name] = report.kv_bytes_peak, report.kv_bytes
    table = Table(
        "method", "prefill s", "choosing", "storing", "KV bytes", "peak", "looks at", title=f"{options.tokens:,} tokens"
    )
    rows = []
    for name, taken in times.items():
        took = statistics.median(sum(parts) for parts in taken)
        choosing = statistics.median(chose / rest for rest, chose, _ in taken)
        storing = statistics.median(stored / rest for rest, _, stored in taken)
        decides = name != "dense" and pipeline(methods[name]).decides
        looks = BEYOND.get(name, "packs" if name in STORES else "probe rows" if decides else "-")
        rows.append(
            dict(method=name, seconds=took, choosing=choosing, storing=storing, looks_at=looks, kv_bytes=bytes_[name],
                 peak=peaks[name])
        )  # fmt: skip
        table.add_row(
            name, f"{took:.2f}", f"+{choosing:.1%}", f"+{storing:.1%}", f"{bytes_[name]:,}", f"{peaks[name]:,}", looks
        )
    Console().print(table)
    save(
        options.out or f"benchmarks/results/prefill-cost-{options.device}.json",
        dict(environment=about, tokens=options.tokens, model=shape, rounds=options.rounds, rows=rows),
    )


if __name__ == "__main__":
    main()
