"""What a cache method is: a frozen dataclass that says which tokens are stored how."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar

import torch

from mmkv.cache.formats import PackFormat
from mmkv.cache.segment import PackedSegment
from mmkv.parts.probe_rows import everything

if TYPE_CHECKING:
    from mmkv.cache.fill import Fill, Plan
    from mmkv.layout import TokenLayout

DENSE = -1  # in marks: kept as it is, in a dense segment
MIN_RESIDUAL = 32  # newest tokens that always stay dense, so that a rejected draft is cut from the dense tail
MINMAX_BITS = (1, 2, 4, 8)


@dataclass(frozen=True)
class CacheMethod:
    """Base of the cache methods.

    A method that stores overrides `formats`, and where tokens differ `mark` (from embeddings, before the first layer) or
    `decide` (from attention, layer by layer); where a format depends on the keys, `adapt`. A method that evicts or merges
    leaves `formats` empty and overrides `decide`.

    Every method keeps the newest `residual` tokens dense; what leaves that window is stored in whole groups and never
    requantized.
    """

    decides: ClassVar[bool] = False  # whether `decide` does anything
    evicts: ClassVar[bool] = False  # whether `decide` may drop or merge tokens, which must come before any storing
    reads_hidden: ClassVar[str | None] = (
        None  # hidden states whose norms `decide` wants: "post" the layer norm, "residual"
    )
    accumulates: ClassVar[bool] = (
        False  # whether `decide` wants `Fill.scores`: attention mass summed over all rows so far
    )
    recalls: ClassVar[bool] = False  # whether `decide` chooses anew among the tokens that are stored dense, too
    next_scale: ClassVar[bool] = (
        False  # whether it is for visual autoregressive models alone, where a forward is a scale
    )
    keeps_last: ClassVar[bool] = False  # whether it wants to see an image's last scale, which nobody attends to again
    sparse_prefill: ClassVar[bool] = False  # whether `attends` may say anything
    joint: ClassVar[bool] = False  # whether all layers are decided upon together, when the forward ends
    segment_class: ClassVar[type[PackedSegment]] = PackedSegment  # what holds the tokens it stores

    def __post_init__(self) -> None:
        check_residual(self.residual_window, self.least_residual)
        check_sinks(self.dense_sinks)

    def formats(self) -> tuple[PackFormat, ...]:
        """The formats it stores tokens in; the first is the main one, which decoded tokens join. Empty: it stores nothing."""
        return ()

    @property
    def residual_window(self) -> int:
        """Newest tokens kept dense: the option `residual` where a method has one."""
        return getattr(self, "residual", MIN_RESIDUAL)

    @property
    def least_residual(self) -> int:
        """The smallest residual window that works: what a rejected draft may reach, or 0 where there are no drafts."""
        return MIN_RESIDUAL

    @property
    def interval(self) -> int | None:
        """Decoded tokens after which `decide` is called again (`Fill.decoding`); None: prompts alone are decided upon."""
        return None

    def packs_undecided(self, sliding: bool) -> bool:
        """Whether tokens that `decide` does not place are packed in the main format, group by group; else they stay dense.

        Those are decoded tokens where there is no `interval`, and where the layer is `sliding` (has a window) all of them.
        """
        return True

    def check(self, head_dim: int, value_dim: int) -> None:
        """Raise ValueError where a model's heads do not fit."""
        for form in self.formats():
            form.check(head_dim, value_dim)

    def check_model(self, layers: int, kv_heads: int) -> None:
        """Raise ValueError where options that name layers or heads are those of another model; by default nothing.

        Args:
            layers: decoder layers of the model.
            kv_heads: KV heads of each.
        """

    @property
    def dense_sinks(self) -> int:
        """First tokens of a sequence kept dense: attention sinks, whose keys are outliers that no group should share."""
        return getattr(self, "sinks", 0)

    def adapt(self, form: PackFormat, keys: torch.Tensor, queries: torch.Tensor | None = None) -> PackFormat:
        """The format a new segment gets for one batch element; by default `form` as it is.

        Args:
            form: one of `formats()`.
            keys: `[Hkv, T, D]`, the first tokens the segment will hold.
            queries: `[Hq, Tq, D]`, the prompt's; None where none are known.
        """
        return form

    @property
    def reads_embeddings(self) -> bool:
        """Whether `mark` looks at the embeddings; where not, they are not made for it."""
        return False

    def mark(self, embeds: torch.Tensor, chunk: TokenLayout) -> torch.Tensor | None:
        """Choose tokens from what the language model is fed, before its first layer.

        Args:
            embeds: `[B, T, C]`, the new tokens' embeddings, vision features in place.
            chunk: layout of the new tokens.

        Returns:
            int8 `[B, T]`: index into `formats()` for each token or `DENSE`; None for the main format throughout.
        """
        return None

    def counted_rows(self, length: int, first: int = 0) -> torch.Tensor:
        """Where the method `accumulates`: whose attention counts, of the new tokens at `first ... length - 1`; all of them."""
        return everything(length, first)

    def attends(self, fill: Fill) -> torch.Tensor | None:
        """Sparse prefill: bool `[n]`, the tokens that attend and are attended to in this layer; None for all of them."""
        return None

    def decide(self, fill: Fill, plan: Plan) -> None:
        """Change the plan for what one layer stores of one batch element; called where `decides` says so.

        Not called for layers with a sliding window, which hold little anyway.
        """

    def decide_jointly(self, fills: list[Fill], plans: list[Plan]) -> None:
        """The same for all layers of one batch element at once, where `joint` says so."""


@dataclass(frozen=True)
class Part:
    """Tokens of one batch element that go to one format (index, or `DENSE`): logical positions, ascending, on the CPU."""

    form: int
    columns: torch.Tensor


def split(columns: torch.Tensor, marks: torch.Tensor | None, forms: tuple[PackFormat, ...]) -> tuple[list[Part], int]:
    """Decide which of the tokens that have left the residual window are packed now.

    The main format takes whole groups only. What a mark sends elsewhere is packed with it up to the last token of those
    groups; a marked part may end in a partial group.

    Args:
        columns: int64 `[n]`, logical positions of valid tokens not yet packed and older than the residual window.
        marks: int8 `[n]` or None, as `CacheMethod.mark` returns them.
        forms: the method's formats.

    Returns:
        parts, and the logical position up to which everything is packed now (0 where nothing is).
    """
    main = columns if marks is None else columns[marks == 0]
    take = main.numel() // forms[0].group * forms[0].group
    if take == 0:
        return [], 0
    # all tokens before the first main token that has to wait
    cut = int(main[take]) if take < main.numel() else int(columns[-1]) + 1
    parts = [Part(0, main[:take])]
    if marks is not None:
        for form in (DENSE, *range(1, len(forms))):
            chosen = columns[(marks == form) & (columns < cut)]
            if chosen.numel():
                parts.append(Part(form, chosen))
    return parts, cut


def check_residual(residual: int, least: int = MIN_RESIDUAL) -> None:
    """Raise ValueError for a residual window below the floor that rollback needs."""
    if isinstance(residual, bool) or not isinstance(residual, int):
        raise ValueError(f"residual {residual!r}: possible are whole numbers of tokens from {least}")
    if residual < least:
        raise ValueError(f"residual {residual}: at least {least} tokens stay dense, so that drafts can be rolled back")


def check_numbers(**options) -> None:
    """Raise ValueError for an option that is not a number."""
    for name, value in options.items():
        if isinstance(value, bool) or not isinstance(value, int | float):
            raise ValueError(f"{name} {value!r}: a number is needed")


def check_bools(**options) -> None:
    """Raise ValueError for an option that is neither True nor False."""
    for name, value in options.items():
        if not isinstance(value, bool):
            raise ValueError(f"{name} {value!r}: possible are True and False")


def check_bits(bits: int) -> None:
    """Raise ValueError for bits that the min-max quantizer does not have."""
    if isinstance(bits, bool) or not isinstance(bits, int) or bits not in MINMAX_BITS:
        raise ValueError(f"bits {bits!r}: possible are {', '.join(map(str, MINMAX_BITS))}")


def check_sinks(sinks: int) -> None:
    """Raise ValueError for an impossible number of sink tokens."""
    if isinstance(sinks, bool) or not isinstance(sinks, int) or not 0 <= sinks <= 1024:
        raise ValueError(f"sinks {sinks!r}: possible are 0 to 1024 tokens")
