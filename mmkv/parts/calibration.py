"""What is measured once per model for next-scale methods: which heads are structural, which layers draft; kept in JSON."""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import ClassVar, Self

import torch


@dataclass(frozen=True)
class Identity:
    """Which model something was measured on.

    Args:
        model_type: as its config says.
        layers: decoder layers.
        heads: KV heads of each.
    """

    model_type: str
    layers: int
    heads: int

    def __post_init__(self):
        numbers = (self.layers, self.heads)
        if not isinstance(self.model_type, str) or not all(type(number) is int and number > 0 for number in numbers):
            raise ValueError(f"{self!r} is no model: needed are its type, and how many layers and KV heads it has")

    @classmethod
    def of(cls, config) -> Identity:
        """From a model's config (transformers' names; a model without grouped-query attention has no number of KV heads)."""
        heads = getattr(config, "num_key_value_heads", None) or config.num_attention_heads
        return cls(config.model_type, config.num_hidden_layers, heads)

    def __str__(self) -> str:
        return f"{self.model_type} with {self.layers} layers of {self.heads} KV heads"


@dataclass(frozen=True)
class Calibration:
    """Base of results that are stored with the model they were measured on.

    Args:
        model: that model.
    """

    model: Identity

    each: ClassVar[str] = "layer"  # what there is a group of indices for
    file: ClassVar[str] = ""  # its name where it lies in the model's folder

    def __post_init__(self):
        for name, value in self._content().items():
            object.__setattr__(self, name, groups_of(name, value, self.each))

    def _content(self) -> dict[str, object]:
        return {f.name: getattr(self, f.name) for f in fields(self) if f.name != "model"}

    def save(self, path: str | Path) -> None:
        """Write it as JSON."""
        content = {"kind": type(self).__name__, "model": asdict(self.model), **self._content()}
        Path(path).write_text(json.dumps(content, indent=1) + "\n")

    @classmethod
    def load(cls, path: str | Path, model: Identity | None = None) -> Self:
        """Read what `save` wrote.

        Args:
            path: of the file.
            model: the one it is to be used with; None to take the file's word.

        Raises:
            ValueError: another kind of file, or another model's.
        """
        names = [f.name for f in fields(cls) if f.name != "model"]
        try:
            content = json.loads(Path(path).read_text())
            kind, found = content["kind"], Identity(**content["model"])
            groups = [content[name] for name in names] if kind == cls.__name__ else []
        except (json.JSONDecodeError, UnicodeDecodeError, KeyError, TypeError) as error:
            raise ValueError(
                f"{path} holds no {cls.__name__}: {type(error).__name__} {error}".splitlines()[0]
            ) from None
        if kind != cls.__name__:
            raise ValueError(f"{path} holds {kind}, not {cls.__name__}")
        if model is not None and found != model:
            raise ValueError(f"{path} was measured on {found}, this model is {model}; calibrate this one")
        return cls(found, *groups)


@dataclass(frozen=True)
class HeadClasses(Calibration):
    """Which KV heads are structural (they look at places near their own) and which contextual (they all look at the same keys).

    Args:
        model: they belong to.
        structural: for each layer the indices of its structural heads, ascending.
    """

    structural: tuple[tuple[int, ...], ...] = ()

    file: ClassVar[str] = "head_classes.json"

    def __post_init__(self):
        super().__post_init__()
        check_groups("structural", self.structural, self.model.layers, self.model.heads, "layer", "KV head")


@dataclass(frozen=True)
class LayerRoles(Calibration):
    """Which layers draft (they look widely over earlier scales) while each scale is made; the others refine.

    Args:
        model: they belong to.
        drafters: for each scale the indices of the drafting layers, ascending.
    """

    drafters: tuple[tuple[int, ...], ...] = ()

    each: ClassVar[str] = "scale"
    file: ClassVar[str] = "layer_roles.json"

    def __post_init__(self):
        super().__post_init__()
        check_groups("drafters", self.drafters, len(self.drafters), self.model.layers, "scale", "layer")


def check_groups(name: str, groups: tuple, count: int, size: int, where: str, what: str) -> None:
    """Raise ValueError unless there are `count` groups of different indices below `size`.

    Args:
        name: of the option.
        where, what: what there is a group for, and what an index counts.
    """
    if len(groups) != count:
        raise ValueError(f"{name} for {len(groups)} {where}s: this model has {count}, and each needs its own")
    for i, group in enumerate(groups):
        wrong = [index for index in group if index >= size]
        if wrong:
            raise ValueError(f"{name} of {where} {i}: there is no {what} {wrong[0]}, this model has {size}")


def groups_of(name: str, value, each: str = "layer") -> tuple[tuple[int, ...], ...]:
    """Groups of indices, one for each `each`, as ascending tuples.

    Raises:
        ValueError: something else, or an index twice.
    """
    try:
        groups = tuple(tuple(group) for group in value)
    except TypeError:
        groups = ((None,),)
    good = all(type(index) is int and index >= 0 for group in groups for index in group)
    if not good or any(len(set(group)) < len(group) for group in groups):
        raise ValueError(
            f"{name} {value!r}: needed is for each {each} a group of different whole numbers from 0, as in ((0, 2), (), (1,))"
        )
    return tuple(tuple(sorted(group)) for group in groups)


def probabilities(query: torch.Tensor, key: torch.Tensor, scale: float, softcap: float | None = None) -> torch.Tensor:
    """Softmax over all keys: queries `[Hq, P, D]` and keys `[Hkv, n, D]` to fp32 `[Hq, P, n]`, which must fit in memory."""
    grouped = query.float().unflatten(0, (key.shape[0], -1)) * scale
    score = grouped @ key.float()[:, None].mT
    score = score if softcap is None else softcap * (score / softcap).tanh()
    return score.softmax(-1).flatten(0, 1)


def column_variance(attention: torch.Tensor) -> torch.Tensor:
    """How much queries differ in what they look at (HACK, arXiv 2504.09261): 0 where all rows are alike, at most 1.

    Args:
        attention: `[H, P, n]`, rows that sum to 1.

    Returns:
        fp32 `[H]`, variance over the queries of each key's weight, summed over the keys: so scales of any size weigh alike.
    """
    return attention.float().var(1, unbiased=False).sum(-1)


def attention_selectivity(attention: torch.Tensor, current: int, top: int) -> torch.Tensor:
    """Attention selectivity index (ScaleKV, arXiv 2505.19602): high where heads look at the map itself and at few earlier keys.

    Args:
        attention: `[H, P, n]`, rows that sum to 1, of queries of the current map.
        current: how many of the n keys, the newest, are of the current map.
        top: how many of the most attended earlier keys count.

    Returns:
        fp32 `[H]`: mean mass on the current map times mean mass on the `top` earlier keys of each query.
    """
    before = attention.shape[-1] - current
    own = attention[..., before:].float().sum(-1).mean(-1)
    most = attention[..., :before].float().topk(min(top, before)).values.sum(-1).mean(-1)
    return own * most


def structural_heads(variance: torch.Tensor, contextual: float) -> tuple[tuple[int, ...], ...]:
    """For each layer the heads that are not among the share of the model's heads with the least variance.

    Args:
        variance: `[layers, H]`.
        contextual: that share, 0 to 1; rounded to whole heads of the model.
    """
    if isinstance(contextual, bool) or not isinstance(contextual, int | float) or not 0 <= contextual <= 1:
        raise ValueError(f"contextual {contextual!r}: possible are 0 to 1 (share of all heads of the model)")
    order = variance.flatten().argsort(stable=True)[round(contextual * variance.numel()) :]
    chosen = torch.zeros(variance.numel(), dtype=torch.bool).index_fill(0, order.cpu(), True).view(variance.shape)
    return tuple(tuple(row.nonzero()[:, 0].tolist()) for row in chosen)


def drafting_layers(index: torch.Tensor, count: int) -> tuple[tuple[int, ...], ...]:
    """For each scale the layers that are among the `count` (layer, scale) pairs with the least standardized selectivity.

    Args:
        index: `[layers, scales]`, `attention_selectivity` of each layer while each scale is made; NaN for scales left out.
        count: pairs in all.
    """
    known = ~index.isnan().any(0)
    pairs = index.shape[0] * int(known.sum())
    if isinstance(count, bool) or not isinstance(count, int) or not 0 <= count <= pairs:
        raise ValueError(f"drafters {count!r}: possible are 0 to {pairs} pairs of a layer and a scale")
    z = (index - index.mean(0)) / (index.std(0, correction=0) + 1e-8)
    order = z.nan_to_num(nan=torch.inf).flatten().argsort(stable=True)[:count]
    chosen = torch.zeros(z.numel(), dtype=torch.bool).index_fill(0, order.cpu(), True).view(z.shape)
    return tuple(tuple(column.nonzero()[:, 0].tolist()) for column in chosen.T)
