"""What Triton's interpreter accepts must compile, for sm_80, sm_89 and sm_90, without a GPU."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from .compile_for_gpu import ROOMS


@pytest.mark.slow
@pytest.mark.parametrize("room", ROOMS)
def test_compiles_for_gpus(room):
    """In a process of its own, where nothing is interpreted."""
    script = Path(__file__).with_name("compile_for_gpu.py")
    env = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    env["PYTHONPATH"] = str(Path(__file__).parents[2])
    done = subprocess.run([sys.executable, script, room], capture_output=True, text=True, timeout=500, env=env)
    assert done.returncode == 0, done.stdout[-500:] + done.stderr[-3000:]
    assert done.stdout.count("variants") >= 2
