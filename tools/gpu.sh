#!/usr/bin/env bash
# Everything that wants a GPU, one command a step, each within ten minutes. Usage: tools/gpu.sh [--smoke] [step ...]
#
#   tests      the tests of the kernels, and all files with tests that need a CUDA device
#   kernels    single kernels beside their torch references and floors      benchmarks/kernels.py
#   attention  attention over packed codes beside the best dense one        benchmarks/decode_attention.py
#   generate   whole models of 7B and 3B shapes, CUDA graphs too            benchmarks/generate.py
#   tokens     token methods: speed of decoders and towers                  benchmarks/tokens.py
#   prefill    what choosing costs in a prefill                             benchmarks/prefill_cost.py
#   store      what a stream's archive costs                                benchmarks/archive.py
#
# Without a step all of them, in this order. Results go to benchmarks/results/*-cuda.json, and to $OUT as well where it is set.
# --smoke runs the steps on a CPU, very small, and leaves no results: it shows that the commands work. LIMIT: seconds a step.
# mmkv need not be installed. Wheels in a folder .whl are installed first, for machines that reach no package index.
set -euo pipefail
cd "$(dirname "$0")/.."

STEPS=(tests kernels attention generate tokens prefill store)
LIMIT=${LIMIT:-570}
results=benchmarks/results device=cuda smoke=""

help() { sed -n '2,/^set /{/^set /d;s/^# \{0,1\}//;p}' "$0"; }

chosen=()
for word in "$@"; do
    case $word in
        -h | --help) help && exit 0 ;;
        --smoke) smoke=1 device=cpu results=$(mktemp -d) ;;
        *)
            if [[ " ${STEPS[*]} " != *" $word "* ]]; then
                echo "gpu: no step '$word'; there are ${STEPS[*]}" >&2
                exit 2
            fi
            chosen+=("$word")
            ;;
    esac
done
[ ${#chosen[@]} -gt 0 ] || chosen=("${STEPS[@]}")

python=${PYTHON:-python3}
[ -n "${PYTHON:-}" ] || [ ! -x .venv/bin/python ] || python=.venv/bin/python
if [ -d .whl ]; then "$python" -m pip install --quiet --no-index --no-deps .whl/*.whl; fi

# The package as an installation would lay it out, so that nothing has to be installed.
package=$(mktemp -d)
trap 'rm -rf "$package" ${smoke:+"$results"}' EXIT
mkdir "$package/mmkv"
for entry in mmkv/* models eval demos; do
    [ "$entry" = mmkv/__pycache__ ] || ln -s "$PWD/$entry" "$package/mmkv/"
done
export PYTHONPATH=$package${PYTHONPATH:+:$PYTHONPATH} PYTHONUNBUFFERED=1 HF_HUB_OFFLINE=1

# Runs a script with the options of a GPU, or in a smoke run with those behind the word "smoke".
bench() {
    local script=$1 out=$results/$2-$device.json
    shift 2
    local options=()
    for word in "$@"; do
        if [ "$word" != smoke ]; then options+=("$word"); elif [ -n "$smoke" ]; then options=(); else break; fi
    done
    local code=0
    timeout "$LIMIT" "$python" "benchmarks/$script" --device "$device" --out "$out" "${options[@]}" || code=$?
    if [ -n "${OUT:-}" ] && [ -z "$smoke" ] && [ -f "$out" ]; then cp "$out" "$OUT/"; fi # what was done before time ran out
    return $code
}

step() {
    case $1 in
        tests)
            if [ -n "$smoke" ]; then
                "$python" -P -m pytest -q tests/kernels/test_merge.py
            else
                mapfile -t others < <(grep -rlE 'mark\.gpu' --include='test_*.py' tests | grep -v '^tests/kernels/')
                timeout "$LIMIT" "$python" -P -m pytest -q tests/kernels "${others[@]}"
            fi
            ;;
        kernels) bench kernels.py kernels smoke --tokens 256 --rounds 1 ;;
        attention)
            bench decode_attention.py decode-attention --rounds 20 --limit $((LIMIT - 150)) \
                smoke --lengths 256 --presets kivi-2 --rounds 1
            ;;
        generate)
            bench generate.py generate --graphs --presets kivi-2 vidkv waterfill --limit $((LIMIT - 250)) \
                smoke --lengths 128 --layers 2 --presets kivi-2 --tokens 2 --rounds 1
            ;;
        tokens)
            bench tokens.py tokens --rounds 1 --budget 0 \
                smoke --parts decoders --models Qwen2.5-VL --sizes 64 --hidden 128 --layers 2 --rounds 1 --budget 0 --only Uniform
            ;;
        prefill) bench prefill_cost.py prefill-cost --rounds 2 smoke --tokens 128 --rounds 1 --only KIVI ;;
        store) bench archive.py archive smoke --frames 12 --formats dense ;;
    esac
}

failed=()
for name in "${chosen[@]}"; do
    printf 'gpu: %s\n' "$name"
    step "$name" || failed+=("$name")
done
if [ ${#failed[@]} -gt 0 ]; then
    echo "gpu: failed or out of time: ${failed[*]}" >&2
    exit 1
fi
