"""Run the tests that show what is supported, and write docs/models.md from what passed.

usage: python tools/support.py [pytest options]
"""

from __future__ import annotations

import json
import subprocess
import sys
import tempfile
from pathlib import Path

ROOT = Path(__file__).parents[1]


def main(options: list[str]) -> int:
    """Nothing is written where a declared place was not filled by a test that passed."""
    sys.path.insert(0, str(ROOT / "tests"))
    from support import Cell, declared
    from support_page import page

    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / "support.json"
        command = [sys.executable, "-m", "pytest", "-q", "-m", "support", "--support", str(file), *options]
        code = subprocess.run(command, cwd=ROOT).returncode
        if not file.exists():
            return code
        cells = [Cell(**{**cell, "modes": tuple(cell["modes"])}) for cell in json.loads(file.read_text())]
    known = declared()
    cells = [cell for cell in cells if (cell.kind, cell.family, cell.name) in known]
    shown = {(cell.kind, cell.family, cell.name): not cell.refused for cell in cells}
    open_places = sorted(key for key, works in known.items() if shown.get(key) is not works)
    if open_places:
        print(f"{len(open_places)} places without a test that passed: {open_places[:9]}; docs/models.md is as it was")
        return code or 1
    (ROOT / "docs" / "models.md").write_text(page(cells))
    print(f"docs/models.md: {sum(shown.values())} combinations work, {len(shown) - sum(shown.values())} are refused")
    return code


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
