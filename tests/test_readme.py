"""The README's example is what runs, and its links lead somewhere."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parents[1]
README = (ROOT / "README.md").read_text()


def test_the_example_runs(tmp_path, monkeypatch, capsys):
    from mmkv.models.tiny import world

    video = world.make_video(2**42, frames=64)
    world.write_mp4(video.frames, tmp_path / "video.mp4")
    monkeypatch.chdir(tmp_path)
    examples = re.findall(r"<!-- example -->\s*```python\n(.*?)```", README, re.DOTALL)
    assert len(examples) == 4
    names: dict = {}
    for code in examples:  # a reader goes from one to the next
        exec(compile(code, "README.md", "exec"), names)
        assert not hasattr(names["model"], "_mmkv")
    out = capsys.readouterr().out
    assert out.count("KV cache, resident") == 2
    answer = next(q.answer for q in video.questions if q.text == "which colour appears first?")
    assert answer in out.splitlines()[0]
    assert len(re.findall(rf"^.*{answer}", out, re.MULTILINE)) == 4, "all examples answer"


def test_the_examples_of_the_pages_run():
    for page in sorted((ROOT / "docs").glob("*.md")):
        names: dict = {}
        for code in re.findall(r"<!-- example -->\s*```python\n(.*?)```", page.read_text(), re.DOTALL):
            exec(compile(code, page.name, "exec"), names)


def test_the_figures_are_those_of_the_result_files():
    """`python tools/readme.py` writes them; nothing in its marked parts is typed by hand."""
    done = subprocess.run([sys.executable, ROOT / "tools/readme.py", "--check"], cwd=ROOT)
    assert done.returncode == 0, "README.md is not what tools/readme.py would write; run it"


def test_links_to_files_exist():
    for page in (ROOT / "README.md", ROOT / "CONTRIBUTING.md", *(ROOT / "docs").glob("*.md")):
        for target in re.findall(r"\]\((?!https?:|#)([^)#]+)", page.read_text()):
            assert (page.parent / target).exists(), f"{page.name} links to {target}"
