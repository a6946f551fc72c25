#!/usr/bin/env bash
# Makes .venv in the checkout and installs mmkv into it, editable. Usage: [VENV=folder] tools/setup.sh [extra,extra] [pin ...]
# uv does the work where it can be had (on PATH, or from the package index); else pip does.
set -euo pipefail
cd "$(dirname "$0")/.."

python=${PYTHON:-python3}
target=".${1:+[$1]}"
pins=("${@:2}")
folder=${VENV:-.venv}
venv=$folder/bin/python

say() { printf 'setup: %s\n' "$*"; }

if ! "$python" -c 'import sys; sys.exit(sys.version_info < (3, 11))' 2>/dev/null; then
    echo "setup: mmkv needs Python 3.11 or newer; '$python' is not. Name one: make PYTHON=/path/to/python3.11" >&2
    exit 1
fi

uv=""
if uv --version >/dev/null 2>&1; then uv=uv; fi

if [ ! -x "$venv" ]; then
    say "making $folder"
    if [ -n "$uv" ]; then
        "$uv" venv --quiet --python "$python" "$folder"
    elif ! "$python" -m venv "$folder"; then
        rm -rf "$folder"
        echo "setup: '$python -m venv' failed; on Debian and Ubuntu install python3-venv, or put uv on PATH" >&2
        exit 1
    fi
fi

if [ -z "$uv" ] && "$venv" -m pip --version >/dev/null 2>&1; then
    "$venv" -m pip install --quiet --disable-pip-version-check uv 2>/dev/null || true
    if "$folder/bin/uv" --version >/dev/null 2>&1; then uv=$folder/bin/uv; fi
fi

# torch and torchvision are resolved together, so that they fit each other; the index's build runs on CPU as well.
if [ -n "$uv" ]; then
    say "installing mmkv $target with uv"
    "$uv" pip install --quiet --python "$venv" -e "$target" ${pins[@]+"${pins[@]}"}
else
    say "installing mmkv $target with pip (uv is not to be had; this takes some minutes)"
    "$venv" -m pip install --quiet --disable-pip-version-check -e "$target" ${pins[@]+"${pins[@]}"}
fi
say "done"
