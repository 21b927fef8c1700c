"""The demo's encoder as a whole beside PyTorch's, on equal tokens: ``python benchmarks/encoder.py [--json FILE]``.

As ``numba-attention bench`` does it: a process for each contender, turns, rests between them, ratios within a round and
their median. PyTorch gets the batch size that is fastest for it. Reading text is left out; all use the same tokenizer.
"""

import argparse
import datetime
import json
import multiprocessing
import statistics
import sys
import time
from pathlib import Path

import numpy as np

ROOT = Path(__file__).parent.parent
REST = 0.15  # seconds; OpenBLAS's threads spin for 0.1 after a product
BATCHES = (8, 16, 32, 64, 128)  # sentences, tried by PyTorch


def ours(threads):
    import numba

    from numba_attention.models import SentenceEncoder

    numba.set_num_threads(threads)
    model = SentenceEncoder()
    return lambda sequences, _: model.encode_tokens(sequences)


def torch_sdpa(threads):
    sys.path.insert(0, str(ROOT / "tests" / "support"))
    import minilm_torch

    minilm_torch.torch.set_num_threads(threads)
    return minilm_torch.Encoder().embed_tokens


def torch_module(threads):
    torch_sdpa(threads)
    import minilm_torch

    return minilm_torch.ModuleEncoder().embed_tokens


CONTENDERS = {"ours": ours, "PyTorch SDPA": torch_sdpa, "TransformerEncoder": torch_module}


def works():
    """Name to lists of token ids."""
    from numba_attention.demo import sentences
    from numba_attention.models import SentenceEncoder

    encodings = SentenceEncoder().tokenize(sentences())
    rng = np.random.default_rng(0)
    return {
        "the demo's 300 sentences": [encoding.ids for encoding in encodings],
        "64 of 128 tokens": rng.integers(1000, 30000, (64, 128)).tolist(),
        "32 of 256 tokens": rng.integers(1000, 30000, (32, 256)).tolist(),
    }


def serve(name, threads, pipe):
    """Answer (sequences, batch) with the seconds it took and the embeddings, until told None."""
    embed = CONTENDERS[name](threads)
    while (order := pipe.recv()) is not None:
        start = time.perf_counter()
        embeddings = embed(*order)
        pipe.send((time.perf_counter() - start, embeddings))


def turns_of_works(threads, rounds):
    context = multiprocessing.get_context("spawn")
    pipes = {}
    for name in CONTENDERS:
        pipes[name], theirs = context.Pipe()
        context.Process(target=serve, args=(name, threads, theirs), daemon=True).start()

    def turn(name, sequences, batch):
        time.sleep(REST)
        pipes[name].send((sequences, batch))
        return pipes[name].recv()

    for work, sequences in works().items():
        best, results = {}, {}
        for name in pipes:
            tried = {batch: turn(name, sequences, batch)[0] for batch in BATCHES[:: 1 if name != "ours" else 5] * 2}
            best[name] = min(tried, key=tried.get)
            _, results[name] = turn(name, sequences, best[name])
            worst = abs(results[name] - results["ours"]).max()
            assert worst < 1e-5, f"{name} finds other embeddings: {worst}"
        seconds = {name: [] for name in pipes}
        names = list(pipes)
        for n in range(rounds):
            for name in names[n % len(names) :] + names[: n % len(names)]:
                seconds[name].append(turn(name, sequences, best[name])[0])
        yield work, sequences, seconds
    for pipe in pipes.values():
        pipe.send(None)


def measure(threads, rounds):
    """Return the seconds of every round, by work and contender, and the circumstances."""
    from importlib.metadata import version

    found = {"date": datetime.date.today().isoformat(), "threads": threads, "rounds": rounds, "works": {}}
    found["versions"] = {name: version(name) for name in ("numba-attention", "numpy", "torch")}
    for work, sequences, seconds in turns_of_works(threads, rounds):
        found["works"][work] = {"tokens": sum(map(len, sequences)), "seconds": seconds}
        print(work, {name: f"{min(times):.3f}-{max(times):.3f} s" for name, times in seconds.items()}, file=sys.stderr)
    return found


def as_markdown(found):
    names = list(CONTENDERS)
    lines = ["| encoder, float32 | tokens/s | " + " | ".join(f"x {name}" for name in names[1:]) + " |"]
    lines += ["| --- |" + " ---: |" * len(names)]
    for work, measured in found["works"].items():
        seconds = measured["seconds"]
        cells = [work, f"{measured['tokens'] / statistics.median(seconds['ours']):.0f}"]
        for name in names[1:]:
            ratios = [other / own for other, own in zip(seconds[name], seconds["ours"], strict=True)]
            cells.append(f"{statistics.median(ratios):.2f}")
        lines.append("| " + " | ".join(cells) + " |")
    versions = ", ".join(f"{name} {version}" for name, version in found["versions"].items())
    lines += ["", f"{found['threads']} threads; {versions}; {found['date']}; medians of {found['rounds']} rounds."]
    return "\n".join(lines)


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--threads", type=int, default=multiprocessing.cpu_count())
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--json", type=Path, help="write every measured number to this file")
    arguments = parser.parse_args()
    found = measure(arguments.threads, arguments.rounds)
    print(as_markdown(found))
    if arguments.json is not None:
        arguments.json.write_text(json.dumps(found, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
