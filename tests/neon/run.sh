#!/usr/bin/env bash
# NEON kernels are right: compiled here for aarch64, run in an emulator with aarch64 wheels. See CONTRIBUTING.md.
# Usage: tests/neon/run.sh [FOLDER], which keeps what is downloaded (1 GB) for the next time. On Debian 12, x86-64.
set -euo pipefail
cd "$(dirname "$0")/../.."
checkout=$PWD
arm=$(realpath -m "${1:-${XDG_CACHE_HOME:-$HOME/.cache}/numba-attention-neon}")
case "$arm/" in "$checkout"/*) echo "choose a folder outside the checkout" >&2; exit 2 ;; esac
mkdir -p "$arm"

if [ ! -x "$arm/qemu/usr/bin/qemu-aarch64-static" ]; then
    (cd "$arm" && apt-get download -q qemu-user-static && dpkg -x qemu-user-static_*.deb qemu)
fi

if [ ! -x "$arm/root/usr/bin/python3.11" ]; then
    # apt with its own state: the machine's packages and architectures stay as they are.
    apt="$arm/apt"
    mkdir -p "$apt"/{state/lists/partial,cache/archives/partial,etc/preferences.d}
    : >"$apt/status"
    echo "deb [arch=arm64 signed-by=/usr/share/keyrings/debian-archive-keyring.gpg] http://deb.debian.org/debian bookworm main" >"$apt/sources.list"
    options=(-q -o "Dir::State=$apt/state" -o "Dir::State::status=$apt/status" -o "Dir::Cache=$apt/cache" -o "Dir::Etc=$apt/etc"
        -o "Dir::Etc::sourcelist=$apt/sources.list" -o Dir::Etc::sourceparts=- -o APT::Architecture=arm64 -o APT::Architectures=arm64
        -o APT::Install-Recommends=false)
    apt-get "${options[@]}" update
    apt-get "${options[@]}" install -y --download-only python3.11 libstdc++6
    for package in "$apt"/cache/archives/*.deb; do dpkg -x "$package" "$arm/root"; done
fi

if [ ! -d "$arm/site/ml_dtypes" ]; then
    pip install -q --target "$arm/site" --platform manylinux_2_28_aarch64 --platform manylinux_2_17_aarch64 --platform manylinux2014_aarch64 \
        --python-version 3.11 --implementation cp --abi cp311 --only-binary=:all: numba numpy scipy ml_dtypes platformdirs
fi

# The folder is made anew: kernels belong to these sources. Nobody else may write to it, or it is not used.
umask 022
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
only=launch,call,serve,addresses,match-three,match-six,recall,linear,rowwise
for dtype in float32 float64 float16 bfloat16; do
    for task in forward decode backward; do only+=,$task-$dtype-NEON; done
done
start=$SECONDS
PYTHONPATH=src python -m numba_attention kernels build "$work/kernels" --level aarch64 --only "$only" >"$work/log" || { cat "$work/log"; exit 1; }
echo "$(ls "$work/kernels" | wc -l) kernels compiled in $((SECONDS - start)) s"

NUMBA_ATTENTION_KERNELS="$work/kernels" NUMBA_ATTENTION_CACHE_DIR="$work/cache" NUMBA_NUM_THREADS=2 PYTHONDONTWRITEBYTECODE=1 \
    PYTHONPATH="$checkout/src:$arm/site" "$arm/qemu/usr/bin/qemu-aarch64-static" -L "$arm/root" "$arm/root/usr/bin/python3.11" tests/neon/suite.py
if [ -n "$(ls -A "$work/cache")" ]; then echo "FAILED: kernels were compiled" >&2; exit 1; fi
echo "passed, $SECONDS s"
