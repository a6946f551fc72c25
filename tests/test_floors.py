"""The house's one rule: who may import whom (CONTRIBUTING.md has the table), and that importing mmkv does nothing."""

from __future__ import annotations

import ast
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]

# Longest prefix wins. A module imports from its own floor or from floors below.
FLOORS = {
    "mmkv": 4,  # the public names, imported on first use from floor 4 and below
    "mmkv.cli": 5,
    "mmkv._ask": 5,
    "mmkv._watch": 5,
    "mmkv._inputs": 5,
    "mmkv._look": 5,
    "mmkv._doctor": 5,
    "mmkv._paint": 5,
    "mmkv._paint_commands": 5,
    "mmkv._calibrate": 5,
    "mmkv.eval": 5,
    "mmkv.demos": 5,
    "mmkv._wrap": 4,
    "mmkv._presets": 4,
    "mmkv._report": 4,
    "mmkv._session": 4,
    "mmkv._graphs": 4,
    "mmkv._recorders": 4,
    "mmkv._scales": 4,
    "mmkv._chunks": 4,
    "mmkv._vision": 4,
    "mmkv.streaming": 4,
    "mmkv.agents": 4,
    "mmkv.models": 3,
    "mmkv.tokens": 2,
    "mmkv.cache": 2,
    "mmkv.layout": 1,
    "mmkv.parts": 1,
    "mmkv.video": 1,
    "mmkv.compat": 1,
    "mmkv.kernels": 0,
}
APART = [("mmkv.tokens", "mmkv.cache")]  # on one floor, yet neither knows the other
FOLDERS = {"mmkv": "mmkv", "mmkv.models": "models", "mmkv.eval": "eval", "mmkv.demos": "demos"}


def modules() -> dict[str, Path]:
    """Module name -> file, of everything that is installed."""
    found = {}
    for package, folder in FOLDERS.items():
        for path in (ROOT / folder).rglob("*.py"):
            parts = path.relative_to(ROOT / folder).with_suffix("").parts
            found[".".join([package, *(p for p in parts if p != "__init__")])] = path
    return found


MODULES = modules()


def room(name: str) -> str:
    parts = name.split(".")
    return next(p for i in range(len(parts), 0, -1) if (p := ".".join(parts[:i])) in FLOORS)


def imports(name: str, tree: ast.AST) -> set[str]:
    """Modules of mmkv that a module imports, at its top or inside functions."""
    is_package = MODULES[name].name == "__init__.py"
    found = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            names = [a.name for a in node.names]
        elif isinstance(node, ast.ImportFrom):
            base = node.module or ""
            if node.level:
                above = name.split(".")[: len(name.split(".")) - node.level + is_package]
                base = ".".join([*above, *([base] if base else [])])
            names = [f"{base}.{a.name}" if f"{base}.{a.name}" in MODULES else base for a in node.names]
        else:
            continue
        found |= {n for n in names if n == "mmkv" or n.startswith("mmkv.")}
    return found


@pytest.mark.parametrize("name", sorted(MODULES))
def test_arrows_point_down(name):
    here = room(name)
    assert here != "mmkv" or name == "mmkv", f"{name} has no floor: add it to FLOORS here and to CONTRIBUTING.md"
    for target in imports(name, ast.parse(MODULES[name].read_text())):
        there = room(target)
        assert FLOORS[there] <= FLOORS[here], f"{name} (floor {FLOORS[here]}) imports {target} (floor {FLOORS[there]})"
        assert not any({here, there} == set(pair) for pair in APART), f"{name} imports {target}: they are apart"


def run(code: str) -> str:
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd="/", timeout=300)
    assert done.returncode == 0, done.stderr
    return done.stdout.strip()


def test_importing_is_quick_and_touches_nothing():
    out = run(
        "import sys, os; env = dict(os.environ); import mmkv; assert env == dict(os.environ);"
        "print(*[m for m in ('torch', 'transformers', 'triton', 'cv2', 'decord', 'av', 'numpy') if m in sys.modules])"
    )
    assert out == "", f"import mmkv loads {out}"


def test_importing_leaves_transformers_alone():
    run(
        "from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS as a\n"
        "from transformers.masking_utils import ALL_MASK_ATTENTION_FUNCTIONS as m\n"
        "import transformers.cache_utils as c\n"
        "before = list(a), list(m), {k: dict(vars(v)) for k, v in vars(c).items() if isinstance(v, type)}\n"
        "import mmkv\n"
        "after = list(a), list(m), {k: dict(vars(v)) for k, v in vars(c).items() if isinstance(v, type)}\n"
        "assert before == after"
    )


def test_public_names():
    import mmkv

    assert set(mmkv.__all__) <= set(dir(mmkv))
    for name in mmkv.__all__:
        assert getattr(mmkv, name) is not None
    assert mmkv.cache.__name__ == "mmkv.cache"  # rooms need no import of their own
    with pytest.raises(AttributeError, match="no attribute 'rap'"):
        mmkv.rap  # noqa: B018
