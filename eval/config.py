"""What a result says about how it came to be."""

from __future__ import annotations

import hashlib
import platform
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

from mmkv.eval.asker import POSITIONS
from mmkv.eval.methods import Method
from mmkv.eval.results import APART
from mmkv.eval.task import Task

SMALL = 2**25  # bytes of a file that is read for the digest of a checkpoint


def config_of(task: Task, methods: tuple[Method, ...], model: str, device: str | None, dtype: str | None) -> dict:
    """The configuration of a run: all that could change a row, then what tells runs apart for a person."""
    return dict(
        task=task.name,
        scorer=task.scorer,
        answer_mode=task.answer_mode,
        max_new_tokens=task.max_new_tokens,
        settings=task.settings(),
        prompt_hash=hashlib.sha256(task.template().encode()).hexdigest()[:12],
        model=model,
        weights=weights_of(model),
        dtype=dtype or "as stored",
        device=device_name(device),
        positions=POSITIONS,
        methods={method.name: str(method) for method in methods},
        versions=versions(),
        commit=commit(),
        command=" ".join(sys.argv),
        started=time.strftime("%Y-%m-%d %H:%M:%S %z"),
    )


def weights_of(model: str) -> str:
    """A digest of a checkpoint folder's file names, sizes and small files' content; the name itself for one from the hub."""
    from mmkv._inputs import TINY, TINY_AGENT
    from mmkv.models import tiny, tiny_agent

    bundled = {TINY: tiny.path, TINY_AGENT: tiny_agent.path}
    folder = Path(bundled[model]() if model in bundled else model)
    if not folder.is_dir():
        return model
    found = hashlib.sha256()
    for path in sorted(p for p in folder.iterdir() if p.is_file()):
        found.update(f"{path.name} {path.stat().st_size}\n".encode())
        if path.stat().st_size < SMALL:  # the bundled models trained anew are as large as before
            found.update(path.read_bytes())
    return found.hexdigest()[:12]


def versions() -> dict[str, str | None]:
    """Of everything between the weights and the answer."""
    import torch
    import transformers

    import mmkv
    from mmkv.video import readers

    return dict(
        mmkv=mmkv.__version__, torch=torch.__version__, transformers=transformers.__version__,
        python=platform.python_version(), **readers(),
    )  # fmt: skip


def device_name(device: str | None) -> str:
    """The device's own name."""
    import torch

    if torch.cuda.is_available() and (device or "cuda").startswith("cuda"):
        return torch.cuda.get_device_name(torch.device(device or "cuda"))
    return f"cpu, {torch.get_num_threads()} threads"


def commit() -> str | None:
    """The checkout's commit, + where files differ from it; None outside of one."""

    def git(*words: str) -> str:
        call = ["git", "-C", str(Path(__file__).parent), *words]
        return subprocess.run(call, capture_output=True, text=True, check=True).stdout.strip()

    try:
        return git("rev-parse", "--short", "HEAD") + ("+" if git("status", "--porcelain", "-uno") else "")
    except (OSError, subprocess.CalledProcessError):
        return None


def name_of(config: dict[str, Any]) -> str:
    """A folder's name for a configuration: the same again for the same one, whenever it is run."""
    import json

    told = {key: value for key, value in config.items() if key not in APART}
    digest = hashlib.sha256(json.dumps(told, sort_keys=True).encode()).hexdigest()[:8]
    model = Path(config["model"]).name or "model"
    return f"{config['task']}-{model}-{digest}"
