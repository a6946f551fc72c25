"""Tensors in, tensors out: packing, attention over packed codes, and what attention scores are made of."""

from .attend_dense import attend_dense
from .attend_packed import attend_packed
from .attend_ragged import attend_ragged
from .basis import hadamard, real_fft
from .blocks import Blocks
from .codes import code, gaussian, lloyd, mean_only, minmax, sign, symmetric, ternary
from .dispatch import which_kernels
from .group_mean import Members, group_mean, group_members, group_total
from .merge import merge, merge_sinks
from .most_similar import most_similar
from .no_gradient import without_gradient
from .pack import pack_blocks, unpack_blocks
from .prefill_sparse import prefill_sparse
from .probe import Mass, probe
from .rotary_tables import rotary_tables
from .rotate import rotate
from .spec import Code, Spec
from .table import Table

__all__ = [
    "Blocks", "Code", "Mass", "Members", "Spec", "Table", "attend_dense", "attend_packed", "attend_ragged", "code",
    "gaussian", "group_mean", "group_members", "group_total", "hadamard", "lloyd", "mean_only", "merge",
    "merge_sinks", "minmax", "most_similar", "pack_blocks", "prefill_sparse", "probe", "real_fft", "rotary_tables",
    "rotate", "sign", "symmetric", "ternary", "unpack_blocks", "which_kernels", "without_gradient",
]  # fmt: skip
