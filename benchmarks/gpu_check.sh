#!/usr/bin/env bash
# The core tests, the checks on the accelerator and the comparisons with peers, within 9 minutes, on a machine that has
# only PyTorch, timm and a GPU: no network, no installation.
#
#   benchmarks/gpu_check.sh OUT_DIR
#
# Writes into OUT_DIR: doctor.json, tests.log, checks.log and .json, peers_*.log and .json, dense.log and .json,
# video.log and .json, summary.txt.
# Exit status: 0 all passed, 1 something failed or ran out of its time, 2 bad input.
#
# PYTHON             the interpreter that has PyTorch (python3)
# HVT_CHECK_DEVICE   cuda, npu or cpu (cuda)
# HVT_CHECK_PARTS    of "tests checks float32 bfloat16 dense video", those to run (all)
# HVT_CHECK_PEERS    arguments of benchmarks.peers (--batch 64 --rounds 10)
# HVT_CHECK_DENSE    arguments of benchmarks.dense (--dtype bfloat16 --batch 2 --rounds 5)
# HVT_CHECK_VIDEO    arguments of benchmarks.video (--dtype bfloat16 --batch 4 --rounds 5)
# HVT_CHECK_PATIENCE how many times the time that a part usually has, for a busy machine (1)
# HVT_REFERENCE_DIR  the folder of reference cases (shared/reference in or beside the checkout, where there is one)
set -u -o pipefail

if [ $# -ne 1 ] || [ -z "$1" ]; then
    echo "error: usage: benchmarks/gpu_check.sh OUT_DIR" >&2
    exit 2
fi
if ! mkdir -p "$1" || ! [ -w "$1" ]; then
    echo "error: $1 is not a folder that can be written: name another" >&2
    exit 2
fi
parts=${HVT_CHECK_PARTS:-tests checks float32 bfloat16 dense video}
for name in $parts; do
    case $name in
        tests | checks | float32 | bfloat16 | dense | video) ;;
        *)
            echo "error: HVT_CHECK_PARTS has no part $name: choose from tests checks float32 bfloat16 dense video" >&2
            exit 2
            ;;
    esac
done
patience=${HVT_CHECK_PATIENCE:-1}
case $patience in
    *[!0-9]* | 0*)
        echo "error: HVT_CHECK_PATIENCE is $patience: give a whole number from 1" >&2
        exit 2
        ;;
esac
out=$(cd "$1" && pwd)
python=${PYTHON:-python3}
case $python in
    /*) ;;
    */*) python=$PWD/$python ;;
esac
cd "$(dirname "${BASH_SOURCE[0]}")/.." || exit 2
export PYTHONPATH="$PWD${PYTHONPATH:+:$PYTHONPATH}" PYTHONUNBUFFERED=1
device=${HVT_CHECK_DEVICE:-cuda}
read -r -a peers <<<"${HVT_CHECK_PEERS:---batch 64 --rounds 10}"
read -r -a dense <<<"${HVT_CHECK_DENSE:---dtype bfloat16 --batch 2 --rounds 5}"
read -r -a video <<<"${HVT_CHECK_VIDEO:---dtype bfloat16 --batch 4 --rounds 5}"
if [ -z "${HVT_REFERENCE_DIR:-}" ] && [ -d shared/reference ]; then
    export HVT_REFERENCE_DIR="$PWD/shared/reference"
fi
: >"$out/summary.txt"
failed=0

say() {
    echo "$*" | tee -a "$out/summary.txt"
}

has() {
    "$python" -c "import importlib.util as u, sys; sys.exit(not all(map(u.find_spec, sys.argv[1:])))" "$@"
}

# part NAME SECONDS COMMAND...: run it for so long at most, keep its output, note how it ended
part() {
    local name=$1 limit=$(($2 * patience)) start=$SECONDS status
    shift 2
    echo "== $name: $*"
    timeout --kill-after=5 "$limit" "$@" >"$out/$name.log" 2>&1
    status=$?
    tail -n 25 "$out/$name.log"
    case $status in
        0) say "passed  $name ($((SECONDS - start)) s)" ;;
        124 | 137) say "FAILED  $name: not done after $limit s, see $name.log" && failed=1 ;;
        *) say "FAILED  $name: exit status $status after $((SECONDS - start)) s, see $name.log" && failed=1 ;;
    esac
}

if ! has torch timm torchvision safetensors; then
    say "FAILED  $python lacks torch, timm, torchvision or safetensors: name another interpreter with PYTHON="
    exit 1
fi
timeout $((25 * patience)) "$python" -m hvt_backbones doctor --json >"$out/doctor.json" 2>&1 ||
    say "note    hvt doctor did not succeed"

for name in $parts; do
    case $name in
        tests)
            if ! has pytest; then
                say "left out  tests: $python has no pytest; the checks need none"
                continue
            fi
            # of the library alone: those in folders need the applications' packages or other libraries
            arguments=(-q -rfE -m "not slow" -p no:cacheprovider tests/test_*.py --ignore=tests/test_soak.py)
            if has xdist; then
                arguments+=(-n 8)
            fi
            if ! has hypothesis; then
                for file in $(grep -lE "^(import|from) hypothesis" tests/*.py); do
                    say "left out  $file: $python has no hypothesis"
                    arguments+=("--ignore=$file")
                done
            fi
            if ! has transformers; then
                say "left out  tests of the huggingface layout: $python has no transformers"
                arguments+=(-k "not test_transformers and not (test_peer_and_back and huggingface) and not companion")
            fi
            part tests 100 "$python" -m pytest "${arguments[@]}"
            ;;
        checks)
            part checks 110 "$python" -m benchmarks.gpu_checks --device "$device" --out "$out/checks.json"
            ;;
        float32 | bfloat16)
            part "peers_$name" 85 "$python" -m benchmarks.peers --device "$device" --dtype "$name" \
                --out "$out/peers_$name.json" "${peers[@]}"
            ;;
        dense)
            part dense 120 "$python" -m benchmarks.dense --device "$device" --out "$out/dense.json" "${dense[@]}"
            ;;
        video)
            part video 40 "$python" -m benchmarks.video --device "$device" --out "$out/video.json" "${video[@]}"
            ;;
    esac
done

echo
echo "== summary, in $out"
cat "$out/summary.txt"
exit "$failed"
