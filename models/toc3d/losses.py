"""The detector's loss: queries matched to objects one to one, focal loss on classes, L1 on boxes."""

from __future__ import annotations

import numpy as np
import torch
import torch.nn.functional as F

from mmkv.models.toc3d.detector import Found
from mmkv.models.toc3d.proposals import proposal_loss
from mmkv.models.toc3d.scenes import Frame

WEIGHTS = (0.5, 0.5, 0.5, 0.2, 0.2, 0.2, 0.2, 0.2, 0.2, 0.2)  # of a box code's L1, centre first, in m


def match(cost: np.ndarray) -> np.ndarray:
    """For each row of `[n, m]`, n <= m, its column in the one-to-one assignment of least total cost.

    Shortest augmenting paths with potentials (the Hungarian method, O(n^2 m)).
    """
    rows, cols = cost.shape
    if rows > cols:
        raise ValueError(f"{rows} rows for {cols} columns; give at least as many columns")
    row_price, col_price = np.zeros(rows + 1), np.zeros(cols + 1)
    owner = np.full(cols + 1, rows)  # row that holds a column; the last column is where a search starts
    for row in range(rows):
        owner[cols], here = row, cols
        reach, came = np.full(cols, np.inf), np.full(cols, cols)
        done = np.zeros(cols + 1, dtype=bool)
        while owner[here] != rows:
            done[here] = True
            step = cost[owner[here]] - row_price[owner[here]] - col_price[:cols]
            better = (step < reach) & ~done[:cols]
            reach[better], came[better] = step[better], here
            nearest = np.where(done[:cols], np.inf, reach).argmin()
            by = reach[nearest]
            row_price[owner[done]] += by
            col_price[done] -= by
            reach[~done[:cols]] -= by
            here = nearest
        while here != cols:
            owner[here], here = owner[came[here]], came[here]
        owner[cols] = rows
    found = np.empty(rows, dtype=np.int64)
    held = np.flatnonzero(owner[:cols] < rows)
    found[owner[held]] = held
    return found


def code(boxes: torch.Tensor) -> torch.Tensor:
    """`[n, 10]` of ground truth `[n, 9]`; see `Found.boxes`."""
    yaw = boxes[:, 6:7]
    return torch.cat([boxes[:, :3], boxes[:, 3:6].log(), yaw.sin(), yaw.cos(), boxes[:, 7:]], 1)


def focal(logits: torch.Tensor, target: torch.Tensor) -> torch.Tensor:
    """Sigmoid focal loss, alpha 0.25, gamma 2 (arXiv 1708.02002), of each element."""
    p = logits.sigmoid()
    loss = F.binary_cross_entropy_with_logits(logits, target, reduction="none")
    return loss * torch.where(target > 0, 0.25 * (1 - p) ** 2, 0.75 * p**2)


def detection_loss(found: Found, frame: Frame) -> torch.Tensor:
    """Sum over decoder layers of 2 x focal + L1, per object, and the proposals' loss."""
    weights = found.boxes.new_tensor(WEIGHTS)
    objects = max(1, sum(len(b) for b in frame.boxes))
    total = proposal_loss(found.proposed, frame, focal)
    for logits, boxes in zip(found.logits, found.boxes):
        target = torch.zeros_like(logits)
        for i, (truth, labels) in enumerate(zip(frame.boxes, frame.labels)):
            if not len(truth):
                continue
            truth = code(truth)
            with torch.no_grad():
                likely = focal(logits[i], torch.ones_like(logits[i])) - focal(logits[i], torch.zeros_like(logits[i]))
                cost = 2 * likely[:, labels].T + ((truth[:, None] - boxes[i]).abs() * weights)[..., :3].sum(-1)
            query = torch.as_tensor(match(cost.cpu().numpy()), device=logits.device)
            target[i, query, labels] = 1
            total = total + ((boxes[i, query] - truth).abs() * weights).sum() / objects
        total = total + 2 * focal(logits, target).sum() / objects
    return total
