"""The tables of figures in README and docs, from the files in benchmarks/measured: ``python -m benchmarks.tables``.

A figure is measured into a file, and the pages are written from the files, so that no page says what was not measured:

    numba-attention bench --rounds 3 --json benchmarks/measured/bench.json
    python benchmarks/encoder.py --json benchmarks/measured/encoder.json
    python benchmarks/transformers.py --memory --json benchmarks/measured/transformers.json
    python benchmarks/scaling.py --json benchmarks/measured/scaling.json
    python benchmarks/beside.py --json benchmarks/measured/beside.json
    python -m benchmarks.tables
"""

import json
from pathlib import Path

from benchmarks import beside, encoder, scaling, transformers
from numba_attention import benchmarking

ROOT = Path(__file__).parent.parent
MEASURED = ROOT / "benchmarks" / "measured"

# The rows of the README: one of each kind. All others are in docs/performance.md.
FEW = (
    "full 4096 E64",
    "full 4096 E128",
    "causal 4096 E64",
    "encoder B8 H12 L512 E64",
    "encoder B32 H12 L128 E32",
    "GQA causal H32 Hkv8 2048 E128",
    "bfloat16 4096 E64",
    "float16 4096 E64",
    "float64 4096 E64",
    "window 8192 E64",
    "bias (H,L,S) 2048 E64",
    "softcap 2048 E64",
    "tenth of blocks 8192 E64",
    "mod ALiBi 4096 E64",
    "tiny H8 64 E64",
    "short H8 80 E64",
    "smallest 1x1x1x64",
    "first call, empty kernel cache",
    "backward 4096 E64",
    "backward causal 2048 E64",
    "backward bfloat16 2048 E64",
    "double backward 2048 E64",
    "decode H32 Hkv8 L1 S8192 E128",
)


def tables():
    """Page, name of the markers, and text, of each table."""
    results, found = benchmarking.from_json((MEASURED / "bench.json").read_text(encoding="utf-8"))
    performance = ROOT / "docs" / "performance.md"
    few = [result for result in results if result.row.name in FEW]
    yield ROOT / "README.md", "bench", benchmarking.as_markdown(few, found)
    yield performance, "bench", benchmarking.as_markdown(results, found, bars=True)
    for page, script in (
        (ROOT / "README.md", encoder),
        (performance, scaling),
        (ROOT / "docs" / "transformers.md", transformers),
        (ROOT / "docs" / "threads.md", beside),
    ):
        name = Path(script.__file__).stem
        yield page, name, script.as_markdown(json.loads((MEASURED / f"{name}.json").read_text(encoding="utf-8")))


def main():
    for page, name, text in tables():
        benchmarking.insert(page, text, name)
        print(f"{page.relative_to(ROOT)}: {name}")


if __name__ == "__main__":
    main()
