"""DPC-kNN: clusters around tokens that lie dense and far from any denser one."""

from __future__ import annotations

import torch

from mmkv.parts.tower_attention import TILE


@torch.no_grad()
def dpc_knn(x: torch.Tensor, clusters: int, neighbours: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Density peaks (Rodriguez and Laio, Science 2014) by k nearest neighbours (Du et al., 2016), as SparseVLM's code has it.

    A token's density is exp(-mean of its squared distances to its `neighbours` nearest tokens, itself among them); its
    separation is the distance to the nearest denser token (the largest distance there is, for the densest). The tokens with
    the largest product of both are centres; every other token joins the nearest centre. Distances are divided by sqrt(C).
    Of equally dense tokens the earlier counts as denser, so that no noise is needed. A tile of the distances exists at a time.

    Args:
        x: `[n, C]`.
        clusters: k, from 1 to n.
        neighbours: from 1 to n.

    Returns:
        The centres, int64 `[k]`, indices into the n tokens, best first; and the cluster of each token, int64 `[n]`.

    Raises:
        ValueError: there are fewer tokens than clusters or neighbours.
    """
    n = len(x)
    for name, value in (("clusters", clusters), ("neighbours", neighbours)):
        if not 1 <= value <= n:
            raise ValueError(f"{name}={value} of {n} tokens; possible are 1 to {n}")
    x = x.float() / x.shape[1] ** 0.5
    tiles = torch.arange(n, device=x.device).split(max(1, TILE // n))
    log_density, furthest = [], x.new_zeros(())
    for rows in tiles:
        distance = torch.cdist(x[rows], x)
        log_density.append(-distance.topk(neighbours, largest=False).values.square().mean(1))
        furthest = torch.maximum(furthest, distance.max())
    log_density = torch.cat(log_density)
    rank = log_density.argsort(descending=True, stable=True).argsort()
    separation = []
    for rows in tiles:
        distance = torch.cdist(x[rows], x)
        separation.append(distance.where(rank < rank[rows, None], furthest).amin(1))
    # the product's logarithm: densities of a language model's hidden states are too small for fp32
    score = log_density + torch.cat(separation).log()
    centres = score.argsort(descending=True, stable=True)[:clusters]
    member = torch.cat([torch.cdist(x[rows], x[centres]).argmin(1) for rows in tiles])
    member[centres] = torch.arange(clusters, device=x.device)
    return centres, member
