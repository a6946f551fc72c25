"""What every benchmark writes beside its numbers."""

from __future__ import annotations

import json
import platform
import subprocess
import sys
from pathlib import Path

import torch
import transformers

import mmkv


def environment() -> dict:
    """Versions, device and commit."""
    commit = subprocess.run(["git", "rev-parse", "--short", "HEAD"], capture_output=True, text=True).stdout.strip()
    dirty = bool(
        subprocess.run(["git", "status", "--porcelain", "-uno"], capture_output=True, text=True).stdout.strip()
    )
    return dict(
        mmkv=mmkv.__version__,
        commit=commit + ("+" if dirty else ""),
        python=platform.python_version(),
        torch=torch.__version__,
        transformers=transformers.__version__,
        device=torch.cuda.get_device_name() if torch.cuda.is_available() else f"cpu, {torch.get_num_threads()} threads",
        command=" ".join(sys.argv),
    )


def save(path: str, result: dict) -> None:
    """Write a result file, and say where."""
    Path(path).parent.mkdir(parents=True, exist_ok=True)
    Path(path).write_text(json.dumps(result, indent=1) + "\n")
    print(f"written to {path}")
