"""Each instruction of the kernels alone against the emulator, as tests/cuda/test_cuda_gpu.py has them.

``--compile`` makes their machine code ahead, into the cache of kernels, for a machine where nothing compiles. One
process a group, since a fault of one ends its context.
"""

import argparse
import hashlib
import os
import subprocess
import sys
from pathlib import Path

import numpy as np

ARCH = os.environ.get("NA_KIT_ARCH", "sm_90a")


def groups():
    import test_cuda_gpu as t

    made = {name: (*t.EXACT[name], True) for name in t.EXACT}
    made |= {f"functions of {kind}": (t.of_functions(kind), np.dtype(kind), False) for kind in ("f", "d")}
    return t, made


def key_of(t, name, arch):
    """The name of machine code in the folder of kernels, with the file of the instructions in it."""
    source = hashlib.sha256(Path(t.__file__).read_bytes()).hexdigest()
    return f"instructions {name} {arch} {source}"


def code_of(t, name, body, arch):
    from numba_attention.device import cubins

    make = t.compiled
    return cubins.cubin(key_of(t, name, arch), lambda: make(body, arch).cubin)


def compile_all():
    """Compile all into the folder NUMBA_ATTENTION_KERNELS, and say the names of the files."""
    from numba_attention.device import cubins

    t, found = groups()
    folder = Path(os.environ["NUMBA_ATTENTION_KERNELS"])
    for name, (body, _, _) in found.items():
        print(cubins.ship(folder, key_of(t, name, ARCH), lambda body=body: t.compiled(body, ARCH).cubin, "").name)


def run(name):
    from numba_attention.device import runtime
    from numba_attention.device.cubins import entry

    t, found = groups()
    body, dtype, exact = found[name]
    if os.environ.get("NA_KIT_EMULATE"):
        import gpukit

        gpukit.EXTRA[name] = 4, lambda emulator: t.make(body, emulator)
        code, symbol = b"\x7fELF" + name.encode(), name
    else:
        code = code_of(t, name, body, runtime.driver.device(0).arch)
        symbol = entry(code)
    t.compiled = lambda *_: runtime.Kernel(symbol, code, t.THREADS, t.SHARED, (0, 1, 2, 3))
    got, want = t.run(body, dtype), t.emulate(body, dtype)
    try:
        if exact:
            t.same_bits(got, want)
        else:
            np.testing.assert_array_equal(np.isnan(got), np.isnan(want))
            np.testing.assert_allclose(got, want, rtol=4e-7 if dtype == np.float32 else 1e-15,
                                       atol=2.0**-126 if dtype == np.float32 else 0)  # fmt: skip
    except AssertionError:
        # Which results of the body, in the order of its `store`s, and on which threads.
        a, b = (x.reshape(-1, t.THREADS) for x in (got, want))
        kind = np.uint64 if a.itemsize == 8 else np.uint32
        floats = np.float64 if a.itemsize == 8 else np.float32
        off = a.view(kind) != b.view(kind)
        off &= ~(np.isnan(a.view(floats)) & np.isnan(b.view(floats)))
        if not exact:
            with np.errstate(all="ignore"):
                off &= ~(np.abs(a - b) <= 4e-7 * np.abs(b))
        for n in np.flatnonzero(off.any(1)):
            i = np.flatnonzero(off[n])
            print(f"    result {n}: {len(i)} threads differ, {i[:8].tolist()}: got {a[n, i[:3]].tolist()} "
                  f"({[hex(x) for x in a.view(kind)[n, i[:3]]]}), wanted {b[n, i[:3]].tolist()} "
                  f"({[hex(x) for x in b.view(kind)[n, i[:3]]]})", flush=True)  # fmt: skip
        return 1
    return 0


def main():
    parser = argparse.ArgumentParser()
    parser.add_argument("--compile", action="store_true")
    parser.add_argument("--only", default="")
    options = parser.parse_args()
    if options.compile:
        return compile_all()
    if options.only:
        return run(options.only)
    _, found = groups()
    started = {name: subprocess.Popen([sys.executable, "-u", __file__, "--only", name],
                                      stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
               for name in found}  # fmt: skip
    failed = []
    for name, child in started.items():
        said, _ = child.communicate()
        if child.returncode:
            failed.append(name)
        print(f"  {'FAIL' if child.returncode else 'ok  '} {name}", flush=True)
        if child.returncode:
            print(said[-1500:], flush=True)
    said = f": FAILED {', '.join(failed)}" if failed else ""
    print(f"primitives: {len(found) - len(failed)} of {len(found)} right{said}")
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
