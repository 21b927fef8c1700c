"""Whole models of Hugging Face with our attention beside their own: ``python benchmarks/transformers.py``.

Four layers, 512 features and random weights; no language head. The implementations take turns in one process, so that a
busy machine slows all of them, and each ratio is one of times of the same round; the median of the rounds is printed.
The extra memory is that of Gemma 2's attention at 16k tokens: the peak of a forward pass less that of the same model
with attention that computes nothing.
"""

import argparse
import datetime
import json
import resource
import statistics
import subprocess
import sys
import time
from pathlib import Path
from typing import NamedTuple

if __name__ == "__main__":  # the folder of a script is the first to be searched, and this file has the library's name
    sys.path[:] = [folder for folder in sys.path if Path(folder).resolve() != Path(__file__).resolve().parent]

SIZES = {
    "hidden_size": 512, "intermediate_size": 1024, "num_hidden_layers": 4, "num_attention_heads": 8, "vocab_size": 1000,
}  # fmt: skip
GROUPED = SIZES | {"num_key_value_heads": 4, "head_dim": 64, "max_position_embeddings": 32768}


class Row(NamedTuple):
    """A model, its input, the implementation it is compared with, and the speed-up that is asked for."""

    model: str
    settings: dict
    batch: int
    length: int
    peer: str
    bar: float


ROWS = {
    "Llama L2048": Row("LlamaModel", GROUPED, 1, 2048, "sdpa", 1.1),
    "Mistral L4096 window 256": Row("MistralModel", GROUPED | {"sliding_window": 256}, 1, 4096, "sdpa", 3.0),
    "Gemma 2 L4096": Row("Gemma2Model", GROUPED | {"sliding_window": 512}, 1, 4096, "eager", 6.0),
    "gpt-oss L4096": Row(
        "GptOssModel",
        GROUPED | {"sliding_window": 128, "num_local_experts": 4, "num_experts_per_tok": 1, "intermediate_size": 512},
        1, 4096, "eager", 6.0,
    ),
    "BERT B8 L512": Row("BertModel", SIZES | {"intermediate_size": 2048}, 8, 512, "sdpa", 1.1),
}  # fmt: skip
MEMORY = Row("Gemma2Model", GROUPED | {"sliding_window": 4096}, 1, 16384, "", 100.0)  # MiB


def build(row, implementation):
    import torch

    import numba_attention.transformers
    import transformers

    numba_attention.transformers.register()
    transformers.AttentionInterface.register("nothing", _nothing)
    transformers.AttentionMaskInterface.register("nothing", lambda *arguments, **options: None)
    kind = getattr(transformers, row.model)
    config = kind.config_class(**row.settings)
    config._attn_implementation = implementation
    torch.manual_seed(0)
    model = kind(config).eval()
    tokens = torch.randint(0, 1000, (row.batch, row.length))

    def call():
        with torch.inference_mode():
            model(input_ids=tokens, **({} if row.model == "BertModel" else {"use_cache": False}))

    return call


def _nothing(module, query, key, value, *arguments, **options):
    return query.transpose(1, 2).contiguous(), None


def measure(row, rounds, threads, clock):
    """Seconds of each round, by implementation, in turns."""
    import numba
    import torch

    torch.set_num_threads(threads)
    numba.set_num_threads(threads)
    names = (row.peer, "numba_attention")
    calls = {name: build(row, name) for name in names}
    for call in calls.values():
        call()
    times = {name: [] for name in names}
    for turn in range(rounds):
        for name in names if turn % 2 else names[::-1]:
            begin = clock()
            calls[name]()
            times[name].append(clock() - begin)
    return times


def peak(implementation, threads):
    """Peak of the resident memory of a process that runs the model once, in MiB."""
    import numba
    import torch

    torch.set_num_threads(threads)
    numba.set_num_threads(threads)
    build(MEMORY._replace(length=64), implementation)()  # compiles, imports
    build(MEMORY, implementation)()
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024


def as_markdown(found):
    lines = ["| model | ours | theirs | x |", "| --- | ---: | ---: | ---: |"]
    for name, times in found["models"].items():
        row = ROWS[name]
        ours, theirs = times["numba_attention"], times[row.peer]
        ratio = statistics.median(b / a for a, b in zip(ours, theirs, strict=True))
        lines.append(f"| {name} | {min(ours) * 1e3:.0f} ms | `{row.peer}` {min(theirs) * 1e3:.0f} ms | {ratio:.2f} |")
    if "extra MiB" in found:
        lines.append(f"| Gemma 2 L16384, extra memory | {found['extra MiB']:.0f} MiB | | |")
    kind = "Processor time" if found["cpu"] else "Time"
    lines += ["", f"{kind} with {found['threads']} threads, float32, {found['rounds']} rounds; {found['date']}."]
    return "\n".join(lines)


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rows", default="", help="only rows whose name contains this")
    parser.add_argument("--rounds", type=int, default=9)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--memory", action="store_true", help="measure the memory too, which takes a minute")
    parser.add_argument("--cpu", action="store_true", help="processor time of one thread, for a busy machine")
    parser.add_argument("--json", type=Path, help="write every measured number to this file")
    parser.add_argument("--peak", help=argparse.SUPPRESS)
    parser.add_argument("--one", help=argparse.SUPPRESS)
    settings = parser.parse_args()
    if settings.cpu:
        settings.threads = 1
    if settings.peak:
        print(json.dumps(peak(settings.peak, settings.threads)))
        return
    if settings.one:
        clock = time.process_time if settings.cpu else time.perf_counter
        print(json.dumps(measure(ROWS[settings.one], settings.rounds, settings.threads, clock)))
        return

    def child(*arguments):
        command = [sys.executable, __file__, "--threads", str(settings.threads), *arguments]
        return json.loads(subprocess.run(command, check=True, capture_output=True, text=True).stdout.splitlines()[-1])

    found = {"date": datetime.date.today().isoformat(), "threads": settings.threads, "cpu": settings.cpu}
    found |= {"rounds": settings.rounds, "models": {}}
    for name in ROWS:
        if settings.rows.lower() in name.lower():
            clock = ["--cpu"] if settings.cpu else []
            found["models"][name] = child("--rounds", str(settings.rounds), "--one", name, *clock)
    if settings.memory:
        found["extra MiB"] = child("--peak", "numba_attention") - child("--peak", "nothing")
    print(as_markdown(found))
    print("asked for:", ", ".join(f"{name} {row.bar}" for name, row in ROWS.items()), f"; below {MEMORY.bar:.0f} MiB")
    if settings.json is not None:
        settings.json.write_text(json.dumps(found, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
