"""The rows of benchmarks/gpu.py that matter most, first; then those of others as time permits: python bench.py SECONDS

Without Triton's flex_attention and CuPy, which take half a minute to compile or say little. `--all` measures them too.
"""

import importlib.util
import sys
import time
from pathlib import Path

FIRST = (
    "forward bfloat16 E128 L8192", "forward bfloat16 E64 L8192", "forward bfloat16 E128 L8192 causal",
    "backward bfloat16 E128 L8192", "decode B64 H32/8 S8192 E128", "host, a call with L128",
    "forward float32 E64 L4096", "forward float32 3xTF32 E64 L4096", "backward bfloat16 E64 L8192 causal",
    "decode B1 H32/8 S65536 E128", "decode B64 H32/8 S8192 E128 pages of 16", "decode B64 H32/8 S8192 E128 int8",
    "forward bfloat16 E256 L4096", "decode B64 H64/1 S8192 E128",
    "forward bfloat16 E64 L4096, plain", "forward bfloat16 E64 L4096, softcap", "forward bfloat16 E64 L4096, ALiBi",
    "forward bfloat16 E64 L4096, sinks", "forward bfloat16 E128 L4096, softcap", "forward bfloat16 E128 L4096, ALiBi",
    "forward bfloat16 E128 L4096, plain", "forward bfloat16 E64 L4096, softcap of large scores",
    "backward bfloat16 E64 L4096, ALiBi",
)  # fmt: skip


def load():
    """Return benchmarks/gpu.py as a module."""
    spec = importlib.util.spec_from_file_location("gpu", Path(__file__).resolve().parents[1] / "gpu.py")
    gpu = sys.modules["gpu"] = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(gpu)
    return gpu


def main():
    arguments = [x for x in sys.argv[1:] if not x.startswith("-")]
    limit = float(arguments[0]) if arguments else 1e9
    begin, dry = time.perf_counter(), "--dry-run" in sys.argv
    gpu = load()
    m = gpu.Machine(dry)
    if "--all" not in sys.argv and not dry:

        def _peers(self, q, k, v, causal, gqa=False):
            torch = self.torch
            attend = torch.nn.functional.scaled_dot_product_attention

            def of(backend):
                def call():
                    with torch.nn.attention.sdpa_kernel(backend):
                        return attend(q, k, v, is_causal=causal, enable_gqa=gqa)

                return call

            kinds = torch.nn.attention.SDPBackend
            return {"flash": of(kinds.FLASH_ATTENTION), "cuDNN": of(kinds.CUDNN_ATTENTION)}

        gpu.Machine.peers = _peers

        def naive(*_):
            raise RuntimeError("left out")

        gpu._naive = lambda *_: naive
    rows = {row.name: row for row in gpu.rows()}
    names = [name for name in FIRST if name in rows] + [name for name in rows if name not in FIRST]
    only = [x.removeprefix("--rows=") for x in sys.argv if x.startswith("--rows=")]
    names = [name for name in names if all(x in name for x in only)]
    for name in FIRST:
        if name not in rows:
            print(f"(no row is named {name!r} now)")
    product, copy = m.ceilings()
    print(f"matmul 8192 bfloat16: {product / 1e12:.0f} TFLOP/s; copy: {copy / 1e9:.0f} GB/s, read and written")
    columns = ["work", "time", "TFLOP/s", "% matmul", "% copy", *(f"x {name}" for name in gpu.PEERS), "verdict (bars)"]
    print(f"| {' | '.join(columns)} |\n| {' | '.join(['---'] * len(columns))} |", flush=True)
    done = 0
    for name in names:
        if time.perf_counter() - begin > limit:
            print(f"{len(names) - done} rows are left: no time")
            break
        at = time.perf_counter()
        try:
            print(gpu.line(m, rows[name], gpu.measure(m, rows[name], 3), product, copy),
                  f"({time.perf_counter() - at:.1f} s)", flush=True)  # fmt: skip
            done += 1
        except Exception as error:
            print(f"| {name} | {type(error).__name__}: {str(error)[:300]} |", flush=True)
        if not dry:
            m.torch.cuda.empty_cache()
    print(f"bench: {done} rows")
    return 0 if done else 1


if __name__ == "__main__":
    sys.exit(main())
