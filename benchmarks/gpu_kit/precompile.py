"""Compile kernels into the folder NUMBA_ATTENTION_KERNELS: python precompile.py LIST [LIST ...] [--jobs N]

A LIST is a file of NA_KIT_COLLECT. What the folder has already is left alone, so this can be stopped and go on.
"""

import argparse
import os
import sys
import time
from concurrent.futures import ProcessPoolExecutor, as_completed
from pathlib import Path

import gpukit

gpukit.install()


def make(c):
    """Compile one kernel, in a process of the pool: CPU seconds, registers, bytes spilled, bytes of code."""
    from numba_attention.cuda import kernels
    from numba_attention.device import cubins

    begin, said, folder = time.process_time(), [], Path(os.environ["NUMBA_ATTENTION_KERNELS"])

    def compiled():
        made = kernels.compile_(c)
        said.extend((made.registers, made.spills))
        return made.code

    path = cubins.ship(folder, c.name, compiled, kernels.sources(c))
    return time.process_time() - begin, *(said or (0, 0)), path.stat().st_size


def main():
    parser = argparse.ArgumentParser()
    parser.add_argument("lists", nargs="+")
    parser.add_argument("--jobs", type=int, default=os.cpu_count())
    parser.add_argument("--seconds", type=float, default=1e9, help="begin no kernel after so long")
    parser.add_argument("--count", action="store_true", help="only say how many are there")
    parser.add_argument("--names", type=Path, help="write the names of the files that are there to this file")
    options = parser.parse_args()
    from numba_attention.cuda import kernels
    from numba_attention.device import cubins

    wanted, folder = {}, Path(os.environ["NUMBA_ATTENTION_KERNELS"])
    for name in options.lists:
        for c in gpukit.collected(name):
            wanted[c.name] = c, folder / cubins.shipped_place(c.name, kernels.sources(c))[0]
    missing = [c for c, path in wanted.values() if not path.exists()]
    print(f"{len(wanted)} kernels, {len(missing)} to be compiled", flush=True)
    if options.count:
        return 0
    begin, total, failed = time.perf_counter(), 0.0, 0
    log_path = folder / "made.txt"
    with ProcessPoolExecutor(options.jobs) as pool, open(log_path, "a") as log:
        queue, running = iter(missing), {}
        for _ in range(len(missing)):
            while len(running) < options.jobs and time.perf_counter() - begin < options.seconds:
                c = next(queue, None)
                if c is None:
                    break
                running[pool.submit(make, c)] = c
            if not running:
                break
            done = next(as_completed(running))
            c = running.pop(done)
            try:
                seconds, registers, spills, size = done.result()
                total += seconds
                said = f"{seconds:5.1f} CPU s {registers:3d} registers {spills:3d} spilled {size:6d} B {c.name}"
                print(said, file=log, flush=True)
            except Exception as error:
                failed += 1
                for where in (log, sys.stdout):
                    print(f"FAILED {c.name}: {str(error)[:300]}", file=where, flush=True)
    left = sum(not path.exists() for _, path in wanted.values())
    if options.names is not None:
        options.names.write_text("".join(f"{path.name}\n" for _, path in wanted.values() if path.exists()))
    print(f"{time.perf_counter() - begin:.0f} s, {total:.0f} CPU s, {failed} failed, {left} left", flush=True)
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
