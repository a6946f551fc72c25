"""ToC3D on synthetic multi-camera scenes, from the detectors that `python -m mmkv.models.toc3d.train --work DIR` left.

    python benchmarks/toc3d.py --work DIR

Writes benchmarks/results/toc3d.json and the picture toc3d.png beside it.
"""

from __future__ import annotations

import argparse
from pathlib import Path

import torch
from common import environment, save

from mmkv.models.toc3d import evaluate, train

RESULTS = Path(__file__).parent / "results"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--work", type=Path, required=True, help="folder that train.py wrote")
    parser.add_argument("--scenes", type=int, default=100, help="never trained on")
    args = parser.parse_args()
    torch.set_num_threads(1)
    result = evaluate.evaluate(args.work, args.scenes)
    log = (args.work / "train.log").read_text().splitlines()
    save(str(RESULTS / "toc3d.json"), {"environment": environment(), "training": log} | result)
    scene = train.scenes(args.work / "picture.pt", range(train.TEST, train.TEST + 1))[0]
    evaluate.picture(args.work, scene, RESULTS / "toc3d.png")


if __name__ == "__main__":
    main()
