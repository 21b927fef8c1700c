"""Code in a process of its own, and arrays between pages that cannot be read."""

import os
import subprocess
import sys
from pathlib import Path

HERE = Path(__file__).parent


def run(code, **environment):
    path = os.pathsep.join([*map(str, (HERE, HERE.parent, *HERE.parent.glob("*/"))), *sys.path])
    env = {**os.environ, "PYTHONPATH": path, **environment}
    done = subprocess.run([sys.executable, "-c", code], env=env, capture_output=True, text=True, cwd=HERE)
    assert done.returncode == 0, f"ended with {done.returncode}\n{done.stdout[-2000:]}\n{done.stderr[-2000:]}"
    assert done.stdout.splitlines()[-1] == "done"


GUARDED = """
import ctypes, mmap, itertools
import numpy as np
import numba_attention as na
import cases

libc = ctypes.CDLL(None, use_errno=True)
PAGE = mmap.PAGESIZE
kept = []

def guarded(x, at_end):
    "A copy that ends where an unreadable page begins, or begins where one ends."
    pages = -(-max(x.nbytes, 1) // PAGE)
    area = mmap.mmap(-1, (pages + 2) * PAGE)
    kept.append(area)
    start = ctypes.addressof(ctypes.c_char.from_buffer(area))
    for page in (0, pages + 1):
        assert libc.mprotect(ctypes.c_void_p(start + page * PAGE), PAGE, 0) == 0
    offset = PAGE + (pages * PAGE - x.nbytes if at_end else 0)
    copy = np.frombuffer(area, np.uint8, x.nbytes, offset).view(x.dtype).reshape(x.shape)
    copy[...] = x
    return copy

def like(x, at_end):
    "The same with the axes in the order of x in memory."
    order = np.argsort([-abs(s) for s in x.strides], kind="stable")
    return guarded(x.transpose(order), at_end).transpose(np.argsort(order)) if x.ndim else x

features = [(1, 1), (2, 3), (3, 2), (5, 7), (8, 8), (16, 16), (17, 15), (33, 31), (64, 64), (20, 100)]
lengths = [(1, 1), (2, 3), (5, 7), (16, 17), (63, 65), (65, 63), (13, 130)]
options = [(), cases.VARIED, ("bottom-right", "mask transposed", "bias transposed"),
           ("window", "bias float16", "mask of keys")]
for dtype in cases.DTYPES:
    n = 0
    for ((L, S), (E, Ev)), at_end in itertools.product(itertools.product(lengths, features), (False, True)):
        n += 1
        case = cases.Case(L, S, E, Ev, H=2, Hkv=1, batch=(), options=options[n % 4],
                          layout=("C", "head-feature-length", "length-head-feature")[n % 3])
        arrays = [like(x, at_end) for x in case.arrays(dtype)]
        kwargs = {k: like(x, at_end) if isinstance(x, np.ndarray) else x for k, x in case.kwargs().items()}
        out = like(np.zeros((2, L, Ev), arrays[0].dtype), at_end)
        na.attention(*arrays, **kwargs, out=out)
        want = cases.oracle(*arrays, **kwargs)[0]
        cases.assert_close(out, want, cases.tolerance(dtype, case)[0])
        if n % 10 == 0:
            na.attention_weights(*arrays[:2], **kwargs)
        if n % 3 == 0:
            lse = na.attention(*arrays, **kwargs, return_lse=True)[1]
            grad_out = like(np.ones((2, L, Ev), arrays[0].dtype), not at_end)
            grads = na.attention_backward(grad_out, *arrays, out, lse, **kwargs)
            want = cases.oracle_backward(grad_out, *arrays, **kwargs)
            offset = max(np.abs(w).max() for w in want[:3])
            for a, b in zip(grads[:3], want[:3]):
                cases.assert_close(a, b, cases.grad_tolerance(dtype, case), offset)
        kept.clear()
print("done")
"""
