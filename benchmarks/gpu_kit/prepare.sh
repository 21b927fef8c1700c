#!/usr/bin/env bash
# Lay out what the first run on a GPU takes along:  bash benchmarks/gpu_kit/prepare.sh
#
# Makes .gpu/ in the root of the checkout, which git ignores: which kernels the stages ask for, and their machine code.
# Can be stopped and run again: what is compiled stays in $KERNELS. `SECONDS_OF_COMPILING=60` stops early; what is
# missing is compiled on the GPU machine, if it has the compilers.
set -eu
umask 077 # nothing that others can write is loaded from a cache of kernels
kit=$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)
root=$(cd "$kit/../.." && pwd)
python=${PYTHON:-python3}
kernels=${KERNELS:-${XDG_CACHE_HOME:-$HOME/.cache}/numba-attention-gpu-kit}
carried=$root/.gpu
mkdir -p "$carried" "$kernels"
export PYTHONPATH="$kit/site:$kit:$root/src:$root/tests/support:$root/tests/cuda" PYTHONDONTWRITEBYTECODE=1 NA_KIT=1
sources=$("$python" -c "from numba_attention.device import cubins as c; print(c.digest_of(c.sources()))")
export NUMBA_ATTENTION_KERNELS=$kernels/cubins
mkdir -p "$NUMBA_ATTENTION_KERNELS"
if [ ! -d "$carried/lists" ] || [ "$(cat "$carried/sources.txt" 2>/dev/null)" != "$sources" ]; then
    echo "which kernels the stages ask for:"
    cc -shared -fPIC -w -o "$kernels/libcuda.so.1" "$root/tests/support/libcuda.c"
    LD_LIBRARY_PATH=$kernels "$python" "$kit/collect.py" "$kernels/lists"
    rm -rf "$carried/lists" && mkdir "$carried/lists" && cp "$kernels"/lists/*.list "$carried/lists/"
    echo "$sources" >"$carried/sources.txt"
fi
"$python" "$kit/primitives.py" --compile >"$kernels/primitives.txt"
nice -n 5 "$python" "$kit/precompile.py" "$carried"/lists/*.list --seconds "${SECONDS_OF_COMPILING:-100000}" \
    --names "$kernels/names.txt" || true
cat "$kernels/primitives.txt" "$kernels/names.txt" | tar -czf "$carried/kernels.tar.gz" -C "$NUMBA_ATTENTION_KERNELS" -T -
du -sh "$carried" | sed 's/$/ are to be carried/'
echo 'next, where the GPU is, with .gpu/ beside the sources and a limit of 480 s: bash benchmarks/gpu_kit/first_run.sh'
