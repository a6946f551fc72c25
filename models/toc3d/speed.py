"""Time of the backbone alone, dense and with ToC3D."""

from __future__ import annotations

import time

import numpy as np
import torch

from mmkv.models.toc3d.backbone import Backbone
from mmkv.models.toc3d.scenes import PC_RANGE
from mmkv.tokens.toc3d import ToC3D
from mmkv.tokens.toc3d_selector import History

TIMED = dict(image=(320, 800), patch=16, dim=192, depth=24, heads=3, query_dim=64, pc_range=PC_RANGE)


def fake_history(count: int) -> History:
    """Random objects, for timing."""
    eye = torch.eye(4).expand(1, count, 4, 4)
    parts = torch.randn(1, count, 64), torch.randn(1, count, 3) * 5, torch.randn(1, count, 2)
    return History(*parts, torch.zeros(1, count), eye, torch.ones(1, dtype=torch.bool))


@torch.no_grad()
def times(repeats: int = 15) -> list[dict]:
    """The backbone alone at 20 x 50 tokens, 2 views, 24 blocks of width 192, selection included.

    CPU seconds of this process (of one thread, if torch has one), since others may share the machine. Each turn runs all
    backbones; a ratio is the median over turns of its time over the dense one's, and its quartiles.
    """
    settings = {
        "dense": None,
        "fast": ToC3D.fast(),
        "faster": ToC3D.faster(),
        "fast, padded": ToC3D.fast(select="padded"),
        "faster, padded": ToC3D.faster(select="padded"),
    }
    torch.manual_seed(0)
    backbones = {name: Backbone(**TIMED, toc3d=toc3d).eval() for name, toc3d in settings.items()}
    told = fake_history(64), torch.ones(1), torch.eye(4)[None]
    images, spent = torch.randn(2, 3, *TIMED["image"]), {name: [] for name in settings}
    for turn in range(repeats + 1):
        for name, backbone in backbones.items():
            start = time.process_time()
            backbone(images, *told)
            if turn:
                spent[name].append(time.process_time() - start)
    rows = []
    for name, backbone in backbones.items():
        low, ratio, high = np.quantile(np.array(spent[name]) / spent["dense"], (0.25, 0.5, 0.75)).round(3).tolist()
        tokens = np.array(backbone.mlp_tokens(20, 50)).sum(0)
        rows.append(
            {
                "backbone": name,
                "time, dense = 1": ratio,
                "quartiles": [low, high],
                "seconds": round(float(np.median(spent[name])), 4),
                "tokens in MLPs, of 24000": int(tokens[0]),
                "real ones": int(tokens[1]),
            }
        )
        print(rows[-1], flush=True)
    return rows
