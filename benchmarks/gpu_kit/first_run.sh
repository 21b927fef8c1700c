#!/usr/bin/env bash
# The first run of the CUDA backend on a real GPU, in stages, the most informative first. See README.md.
#
#   on the GPU machine, in the root of the project's checkout:
#     bash benchmarks/gpu_kit/first_run.sh          all stages, seven and a half minutes at most
#     bash benchmarks/gpu_kit/first_run.sh 01 03    only these
#     DRY=1 bash benchmarks/gpu_kit/first_run.sh    a rehearsal without a GPU, on the stub of a driver and the emulator
#
# Each stage has a limit of its own, and none stops the others. $OUT gets summary.txt and at most seven logs.
set -u
kit=$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)
root=$(cd "$kit/../.." && pwd)
carried=$root/.gpu
out=${OUT:-$PWD/gpu-out}
dry=${DRY:-}
mkdir -p "$out"
out=$(cd "$out" && pwd)
summary=$out/summary.txt
python=${PYTHON:-python3}
work=$(mktemp -d)
: >"$summary"

# What was carried: machine code, and wheels if there are any. Kernels must be this user's, as no others are loaded.
export NUMBA_ATTENTION_CACHE_DIR=$work/cache NUMBA_ATTENTION_KERNELS=$work/kernels
(umask 077 && mkdir "$work/kernels" && [ -f "$carried/kernels.tar.gz" ] &&
    tar -xzf "$carried/kernels.tar.gz" -C "$work/kernels" -m --no-same-owner --no-same-permissions)
site=
wheels=$("$python" "$kit/versions.py" --wheels "$carried/whl")
if [ -n "$wheels" ]; then
    # shellcheck disable=SC2086  (a word for each wheel)
    "$python" -m pip install -q --no-index --no-deps --no-compile --no-cache-dir --upgrade --target "$work/site" $wheels \
        >"$work/pip.log" 2>&1 && site=$work/site: || cat "$work/pip.log"
fi

export PYTHONPATH="$kit/site:$kit:$site$root/src:$root/tests/support:$root/tests/cuda${PYTHONPATH:+:$PYTHONPATH}"
export PYTHONUNBUFFERED=1 PYTHONDONTWRITEBYTECODE=1
export NA_KIT=1 NA_KIT_CARRIED=$carried NA_KIT_NOTES=$work/notes.txt NA_KIT_LENIENT=1
export XLA_PYTHON_CLIENT_PREALLOCATE=false NUMBA_CUDA_LOW_OCCUPANCY_WARNINGS=0
cores=$(env -u OMP_NUM_THREADS nproc) # nproc obeys that variable
jobs=$cores; [ "$jobs" -gt 12 ] && jobs=12
export OMP_NUM_THREADS=2 OPENBLAS_NUM_THREADS=2 MKL_NUM_THREADS=2
: >"$NA_KIT_NOTES"
# numba-cuda looks for libNVVM in wheels, in CUDA_HOME, and where the loader does.
if [ -z "${CUDA_HOME:-}" ]; then
    nvcc=$(command -v nvcc || ls /usr/local/cuda*/bin/nvcc 2>/dev/null | head -1)
    [ -n "$nvcc" ] && CUDA_HOME=$(dirname "$(dirname "$(readlink -f "$nvcc")")") && export CUDA_HOME
fi
if [ -n "$dry" ]; then
    cc -shared -fPIC -w -o "$work/libcuda.so.1" "$root/tests/support/libcuda.c" || exit 1
    export LD_LIBRARY_PATH=$work${LD_LIBRARY_PATH:+:$LD_LIBRARY_PATH} NA_KIT_EMULATE=1
fi

say() { printf '%s\n' "$*" | tee -a "$summary"; }

# stage NUMBER NAME SECONDS COMMAND...: its log, and one line of what came of it.
stage() {
    local number=$1 name=$2 limit=$3 begin=$SECONDS status log
    shift 3
    if [ ${#wanted[@]} -gt 0 ] && [[ " ${wanted[*]} " != *" $number "* ]]; then return 0; fi
    log=$out/$number-$name.log
    (cd "$root" && exec timeout -k 5 "$limit" "$@") >"$log" 2>&1
    status=$?
    truncate -s '<15000000' "$log"
    local last
    last=$(grep -E '^(versions|smoke|primitives|bench|sanitizer|grid):' "$log" | tail -1 | cut -c1-400)
    case $status in 0) status=ok ;; 124 | 137) status="STOPPED at its $limit s" ;; *) status="exit $status" ;; esac
    say "$number $name: $status, $((SECONDS - begin)) s: ${last:-$(grep . "$log" | tail -1 | cut -c1-300)}"
}

wanted=("$@")
say "first_run on $(hostname), $(date -u +%H:%M:%S), $cores cores${dry:+, DRY RUN}"
stage 00 versions 40 "$python" "$kit/versions.py"
grep -E '^(PROBLEM|note|GPU)' "$out/00-versions.log" 2>/dev/null | cut -c1-300 | tee -a "$summary"
if grep -q '^PROBLEM backend' "$out/00-versions.log" 2>/dev/null && [ -z "${ANYWAY:-}" ]; then
    say "the backend cannot run here: nothing else is tried (ANYWAY=1 tries)"
    rm -rf "$work"
    exit 1
fi
stage 01 smoke "${SMOKE:-75}" "$python" "$kit/smoke.py"
if grep -q "could not be loaded" "$out/01-smoke.log" 2>/dev/null && ls "$carried"/lists/*.list >/dev/null 2>&1; then
    # The driver refuses what the carried compilers made: make it anew with the compilers that are here.
    say "the driver does not load carried cubins: $(grep -m1 -o 'could not be loaded.*' "$out/01-smoke.log" | cut -c1-200)"
    mv "$work/kernels" "$work/refused" && mkdir -m 700 "$work/kernels"
    (cd "$root" && "$python" "$kit/primitives.py" --compile; timeout 70 "$python" "$kit/precompile.py" \
        "$carried"/lists/[1-3]*.list --seconds 60) >"$work/precompile.log" 2>&1
    say "compiled here: $(tail -1 "$work/precompile.log")"
    stage 01 smoke "${SMOKE:-75}" "$python" "$kit/smoke.py"
fi
stage 02 primitives 40 "$python" "$kit/primitives.py"
share=8; [ -n "$dry" ] && share=60
grid=${GRID:-70} rest=${REST:-100}
stage 03 grid "$grid" "$python" -m pytest -q -m gpu -p no:cacheprovider -p gpukit_pytest --kit-share $share --kit-seconds $((grid - 10)) -n "$jobs" \
    --tb=short --maxfail 60 tests/cuda/test_cuda_kernels.py
if [ -n "$dry" ]; then
    stage 04 bench 100 "$python" "$kit/bench.py" 30 --dry-run --rows=B1
else
    stage 04 bench "${BENCH:-80}" "$python" "$kit/bench.py" "$((${BENCH:-80} - 10))"
fi
# The sanitizer and the rest do not disturb one another: no time is taken in them.
stage 05 sanitizer "${SANITIZER:-100}" "$python" "$kit/sanitize.py" "$((${SANITIZER:-100} - 5))" &
more=(tests/cuda/test_cuda_gpu.py tests/device/test_cuda_interop.py); [ -n "$dry" ] && more=()
stage 06 rest "$rest" "$python" -m pytest -q -m gpu -k "not test_sanitizer" -p no:cacheprovider -p gpukit_pytest -n "$jobs" --tb=short --maxfail 100 \
    --kit-seconds $((rest - 10)) --kit-share "$([ -n "$dry" ] && echo 80 || echo 1)" "${more[@]}" tests/cuda/test_cuda_kernels.py
wait
# Threads of the CPU, alone on the machine: how the time of a call falls with their number.
counts=(1 4 8 "$cores") repeats=3; [ -n "$dry" ] && counts=(1) repeats=1
stage 07 threads "${THREADS:-60}" env -u OMP_NUM_THREADS -u OPENBLAS_NUM_THREADS -u MKL_NUM_THREADS "$python" benchmarks/scaling.py \
    --threads "${counts[@]}" --repeats $repeats
[ -f "$out/07-threads.log" ] && cat "$out/07-threads.log" >>"$summary" && rm "$out/07-threads.log" # no more than 8 files come back
sort "$NA_KIT_NOTES" | uniq -c | sort -rn | head -20 >"$work/most.txt"
say "kernels that had to be compiled here: $(grep -c '^made' "$NA_KIT_NOTES"); processes that a fault ended: $(grep -c '^fault' "$NA_KIT_NOTES"); $SECONDS s in all"
grep -vE '^ *[0-9]+ (made|there)' "$work/most.txt" | cut -c1-300 | tee -a "$summary"
echo "--- all notes" >>"$out/00-versions.log"
cat "$NA_KIT_NOTES" >>"$out/00-versions.log" 2>/dev/null
rm -rf "$work"
exit 0
