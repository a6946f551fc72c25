"""What a user installs: the wheel and the source archive hold everything, and nothing lands outside `mmkv`."""

from __future__ import annotations

import subprocess
import sys
import sysconfig
import tarfile
import tomllib
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
FOLDERS = {"mmkv": "mmkv", "mmkv.models": "models", "mmkv.eval": "eval", "mmkv.demos": "demos"}
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())


def run(*command, cwd: Path) -> str:
    done = subprocess.run([str(c) for c in command], cwd=cwd, capture_output=True, text=True, timeout=600)
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-4000:]
    return done.stdout


def packages() -> set[str]:
    """Every folder with an __init__.py, by the name that it installs as."""
    found = set()
    for package, folder in FOLDERS.items():
        for path in (ROOT / folder).rglob("__init__.py"):
            found.add(".".join([package, *path.parent.relative_to(ROOT / folder).parts]))
    return found


def test_every_package_is_listed():
    assert set(PROJECT["tool"]["setuptools"]["packages"]) == packages()


def test_version_has_one_source():
    import mmkv

    assert PROJECT["project"]["dynamic"] == ["version"] and "version" not in PROJECT["project"]
    assert f"## [{mmkv.__version__}]" in (ROOT / "CHANGELOG.md").read_text()


@pytest.fixture(scope="module")
def archives(tmp_path_factory) -> tuple[Path, Path]:
    """(sdist, wheel built from that sdist), from a copy of what is tracked or new, as a user's clone would have it."""
    out = tmp_path_factory.mktemp("dist")
    names = run("git", "ls-files", "-co", "--exclude-standard", "-z", cwd=ROOT).split("\0")
    clone = tmp_path_factory.mktemp("clone")
    for name in filter(None, names):
        if (ROOT / name).is_file():
            (clone / name).parent.mkdir(parents=True, exist_ok=True)
            (clone / name).write_bytes((ROOT / name).read_bytes())
    run(sys.executable, "-m", "build", "--no-isolation", "--skip-dependency-check", "-o", out, clone, cwd=out)
    return next(out.glob("*.tar.gz")), next(out.glob("*.whl"))


def data_files() -> set[str]:
    """Files beside the code that must travel with it, by their name inside the wheel."""
    tiny = ROOT / "models" / "tiny" / "checkpoint"
    return {f"mmkv/models/tiny/checkpoint/{p.name}" for p in tiny.iterdir()} if tiny.is_dir() else set()


def test_wheel_contents(archives):
    names = {n for n in zipfile.ZipFile(archives[1]).namelist() if ".dist-info/" not in n}
    assert {n.split("/")[0] for n in names} == {"mmkv"}
    code = set()
    for package, folder in FOLDERS.items():
        for path in (ROOT / folder).rglob("*.py"):
            code.add("/".join([*package.split("."), *path.relative_to(ROOT / folder).parts]))
    assert code <= names and "mmkv/py.typed" in names
    assert data_files() <= names
    assert any("licenses/LICENSE" in n for n in zipfile.ZipFile(archives[1]).namelist())


def test_sdist_builds_the_wheel(archives):
    """The wheel above was built from the sdist; the sdist also holds licence, readme and changelog."""
    with tarfile.open(archives[0]) as archive:
        names = {n.split("/", 1)[1] for n in archive.getnames() if "/" in n}
    assert {"LICENSE", "README.md", "pyproject.toml", "models/__init__.py", "eval/__init__.py"} <= names


def test_installed_wheel_imports(archives, tmp_path):
    """A clean environment that sees this one's packages, save our own editable install, through a .pth file."""
    run(sys.executable, "-m", "venv", tmp_path / "env", cwd=tmp_path)
    python = tmp_path / "env" / "bin" / "python"
    run(python, "-m", "pip", "install", "-q", "--no-deps", "--no-index", "--no-compile", archives[1], cwd=tmp_path)
    site = Path(run(python, "-c", "import sysconfig; print(sysconfig.get_paths()['purelib'])", cwd=tmp_path).strip())
    # A plain path line adds the packages but runs none of their .pth files, so our editable install stays unseen.
    (site / "others.pth").write_text(sysconfig.get_paths()["purelib"] + "\n")
    out = run(
        python,
        "-c",
        "import mmkv, mmkv.models, mmkv.eval, mmkv.demos, mmkv.models.tiny, mmkv.cache, mmkv.kernels, mmkv.cli;"
        "import importlib.util as u; assert not any(u.find_spec(n) for n in ('models', 'eval', 'demos'));"
        "print(*{m.__file__ for m in (mmkv, mmkv.models, mmkv.eval, mmkv.demos, mmkv.models.tiny)}, sep='\\n')",
        cwd=tmp_path,
    )
    assert all(str(site / "mmkv") in line for line in out.splitlines()), out
    for name in data_files():
        assert (site / name).is_file(), name
    assert run(python.parent / "mmkv", "--version", cwd=tmp_path).strip() == f"mmkv {version(archives[1])}"


def version(wheel: Path) -> str:
    return wheel.name.split("-")[1]
