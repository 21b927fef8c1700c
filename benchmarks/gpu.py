"""The CUDA backend on this machine's GPU: ``python benchmarks/gpu.py``.

Forward and backward passes with 16k tokens a batch beside PyTorch's (FlashAttention-2 and cuDNN), Triton's
(``flex_attention``) and a naive CuPy version; decoding beside the speed of copying memory; float32; what a call costs
the host. All contenders of a row take turns in one process, timed by the GPU's own events; ratios are of medians. FLOPs
are counted as everybody does: 4 B H L S E, half of it if causal, 2.5 times for the backward pass.

``--verify`` runs every test that needs a GPU, NVIDIA's compute-sanitizer among them: the first thing to do on a new
kind of GPU. ``--tune`` times shapes of tiles of `numba_attention.cuda.tile_shapes` and prints the fastest.
``--dry-run`` runs the script itself on small arrays of the host.
"""

import argparse
import os
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np

import numba_attention as na

TOKENS, HIDDEN = 16384, 2048
SECONDS = 0.05  # of a turn of one contender
L2 = 256 * 2**20  # more bytes than any cache on a GPU: what is read in turn from so many comes from memory
ROOT = Path(__file__).parents[1]


@dataclass
class Row:
    """One line of the table: contenders that compute the same, how much it is, and what the bars are."""

    name: str
    make: Callable[["Machine"], dict[str, Callable[[], object]]]
    flops: float = 0.0
    bytes: float = 0.0
    bars: dict[str, float] = field(default_factory=dict)  # "flash": ratio; "TFLOP/s", "% copy", "us": of our own
    alone: bool = False  # what the host takes for a call counts, and not the GPU


class Machine:
    """A GPU and its ceilings or, for a dry run, the host."""

    def __init__(self, dry: bool) -> None:
        import torch

        self.torch, self.dry = torch, dry
        self.device = "cpu" if dry else "cuda"
        self.short = 16 if dry else 1  # by how much sequences are shorter
        self.missing: dict[str, str] = {}

    def normal(self, *shape: int, dtype: str = "bfloat16"):
        return self.torch.randn(shape, device=self.device, dtype=getattr(self.torch, dtype))

    def synchronize(self) -> None:
        if not self.dry:
            self.torch.cuda.synchronize()

    def seconds(self, call: Callable[[], object], times: int) -> float:
        """Seconds of one of so many calls in a row."""
        if self.dry:
            start = time.perf_counter()
            for _ in range(times):
                call()
            return (time.perf_counter() - start) / times
        first, last = (self.torch.cuda.Event(enable_timing=True) for _ in range(2))
        first.record()
        for _ in range(times):
            call()
        last.record()
        last.synchronize()
        return first.elapsed_time(last) / 1e3 / times

    def of_host(self, call: Callable[[], object], times: int = 200) -> float:
        """Seconds until a call returns, whenever its work is done."""
        self.synchronize()
        start = time.perf_counter()
        for _ in range(times):
            call()
        found = (time.perf_counter() - start) / times
        self.synchronize()
        return found

    def ceilings(self) -> tuple[float, float]:
        """FLOP/s of a large bfloat16 product, and bytes a second of a copy, read and written."""
        n = 8192 // self.short
        a, b = self.normal(n, n), self.normal(n, n)
        product = min(self.seconds(lambda: self.torch.matmul(a, b), 5) for _ in range(5))
        source = self.torch.empty(2**30 // self.short**2, dtype=self.torch.uint8, device=self.device)
        target = self.torch.empty_like(source)
        copy = min(self.seconds(lambda: target.copy_(source), 5) for _ in range(5))
        return 2.0 * n**3 / product, 2.0 * source.numel() / copy

    def peers(self, q, k, v, causal: bool, gqa: bool = False) -> dict[str, Callable[[], object]]:
        """PyTorch's and Triton's attention of the same arrays, as far as they are to be had."""
        torch = self.torch
        attend = torch.nn.functional.scaled_dot_product_attention

        def of(backend):
            def call():
                with torch.nn.attention.sdpa_kernel(backend):
                    return attend(q, k, v, is_causal=causal, enable_gqa=gqa)

            return call

        kinds = torch.nn.attention.SDPBackend
        if self.dry:
            return {"flash": of(kinds.MATH)}
        found = {"flash": of(kinds.FLASH_ATTENTION), "cuDNN": of(kinds.CUDNN_ATTENTION)}
        from torch.nn.attention.flex_attention import create_block_mask, flex_attention

        compiled = torch.compile(flex_attention)
        rows, columns = q.shape[-2], k.shape[-2]
        mask = (
            create_block_mask(lambda b, h, i, j: i >= j, None, None, rows, columns, device="cuda") if causal else None
        )
        found["Triton"] = lambda: compiled(q, k, v, block_mask=mask, enable_gqa=gqa)
        return found

    def usable(self, calls: dict[str, Callable[[], object]]) -> dict[str, Callable[[], object]]:
        """The contenders that work here; why the others do not is said at the end."""
        found = {}
        for name, call in calls.items():
            try:
                call()
                self.synchronize()
                found[name] = call
            except Exception as error:
                if name == "ours":
                    raise
                self.missing[name] = f"{type(error).__name__}: {str(error).splitlines()[0][:120]}"
        return found


def forward(
    E: int, L: int, causal: bool, dtype: str = "bfloat16", tf32: bool = False, bars=None, B: int = 0, Ev: int = 0
) -> Row:
    H, B, Ev = max(1, HIDDEN // E), B or TOKENS // L, Ev or E

    def make(m: Machine) -> dict[str, Callable[[], object]]:
        q, k, v = (m.normal(B, H, L // m.short, n, dtype=dtype) for n in (E, E, Ev))
        calls = {"ours": _with_tf32(tf32, lambda: na.attention(*_given(m, q, k, v), is_causal=causal))}
        if dtype.endswith("float16") and E == Ev <= 256:
            calls |= m.peers(q, k, v, causal)
        if not m.dry and L <= 4096 and not causal and not tf32 and E == Ev and dtype != "float64":
            calls["CuPy"] = _naive(q, k, v)
        return calls

    name = f"forward {dtype}{' 3xTF32' if tf32 else ''} E{E}{f' Ev{Ev}' if Ev != E else ''} L{L}"
    name += " causal" if causal else ""
    flops = 2.0 * B * H * L * L * (E + Ev) * (0.5 if causal else 1)
    return Row(name, make, flops, bars={"flash": 0.8} if bars is None else bars)


def backward(E: int, L: int, causal: bool, dtype: str = "bfloat16", B: int = 0) -> Row:
    H, B = HIDDEN // E, B or TOKENS // L

    def make(m: Machine) -> dict[str, Callable[[], object]]:
        q, k, v, grad = (m.normal(B, H, L // m.short, E, dtype=dtype) for _ in range(4))
        given = _given(m, grad, q, k, v)
        out, lse = na.attention(*given[1:], is_causal=causal, return_lse=True)
        calls = {"ours": lambda: na.attention_backward(*given, out, lse, is_causal=causal)}
        if not dtype.endswith("float16"):
            return calls
        leaves = [x.detach().requires_grad_() for x in (q, k, v)]
        for name, call in m.peers(*leaves, causal).items():
            try:
                result = call()
            except Exception as error:
                m.missing[name] = f"{type(error).__name__}: {str(error).splitlines()[0][:120]}"
                continue
            calls[name] = lambda result=result: m.torch.autograd.grad(result, leaves, grad, retain_graph=True)
        return calls

    flops = 2.5 * 4.0 * B * H * L * L * E * (0.5 if causal else 1)
    bars = {"flash": 0.7} if dtype.endswith("float16") else {}
    return Row(f"backward {dtype} E{E} L{L}{' causal' if causal else ''}", make, flops, bars=bars)


# Options of the kernels of sm_90a.
ON_WARPGROUPS = {
    "forward": ("plain", "softcap", "softcap of large scores", "softcap, causal", "ALiBi", "ALiBi, causal", "sinks"),
    "backward": ("plain", "ALiBi", "ALiBi, causal"),
}


def optional(name: str, E: int = 64, L: int = 4096, B: int = 1, task: str = "forward") -> Row:
    """A call with one option; bfloat16. Options that the kernels of sm_90a have are measured by mma.sync too."""
    H = HIDDEN // E

    def make(m: Machine) -> dict[str, Callable[[], object]]:
        n = L // m.short
        q, k, v, grad = (m.normal(B, H, n, E) for _ in range(4))
        slopes = np.float32(2.0) ** np.linspace(-1, -8, H, dtype=np.float32)
        options = {
            "plain": dict, "dropout": lambda: {"dropout_p": 0.1, "seed": 1}, "softcap": lambda: {"softcap": 30.0},
            "softcap of large scores": lambda: {"softcap": 1.0},
            "sinks": lambda: {"sinks": np.ones(H)},
            "softcap, causal": lambda: {"softcap": 30.0, "is_causal": True},
            "ALiBi, causal": lambda: {"alibi_slopes": slopes, "is_causal": True},
            "ALiBi": lambda: {"alibi_slopes": slopes},
            "bias": lambda: {"bias": _given(m, m.normal(H, n, n))[0]},
            "a score_mod with a slope": lambda: {"score_mod": na.mods.alibi, "mod_args": (slopes,)},
            "gradient of slopes": lambda: {"score_mod": na.mods.alibi, "mod_args": (slopes,), "mod_grads": "all"},
            "a tenth of all blocks": lambda: {"mask": na.BlockMask.from_array(_tenth(n))},
        }[name]()  # fmt: skip
        given = _given(m, grad, q, k, v)
        if task == "attention_weights":
            return {"ours": lambda: na.attention_weights(*given[1:3], **options)}
        if task == "forward":
            return beside(lambda: na.attention(*given[1:], **options))
        forward = {name: x for name, x in options.items() if name != "mod_grads"}
        out, lse = na.attention(*given[1:], return_lse=True, **forward)
        return beside(lambda: na.attention_backward(*given, out, lse, **options))

    def beside(call: Callable[[], object]) -> dict[str, Callable[[], object]]:
        return {"ours": call} | ({"mma.sync": _with_mma_sync(call)} if name in ON_WARPGROUPS[task] else {})

    flops = {"forward": 4.0, "backward": 10.0, "attention_weights": 4.0}[task] * B * H * L * L * E
    flops *= 0.5 if "causal" in name else 1.0
    return Row(f"{task} bfloat16 E{E} L{L}, {name}", make, flops)


def _tenth(n: int):
    """Visible blocks of a mask: the diagonal, and others at random, a tenth of all."""
    tiles = -(-n // 64)
    visible = np.random.default_rng(0).random((tiles, tiles)) < 0.1
    np.fill_diagonal(visible, True)
    return visible.repeat(64, 0)[:n].repeat(64, 1)[:, :n]


def latent(B: int, S: int, H: int = 128) -> Row:
    """A step of decoding with multi-head latent attention: values are a view of the keys."""

    def make(m: Machine) -> dict[str, Callable[[], object]]:
        q, keys = m.normal(B, H, 1, 576), m.normal(B, 1, S // m.short, 576)
        query, key = _given(m, q, keys)
        return {"ours": lambda: na.attention(query, key, key[..., :512], scale=192**-0.5)}

    flops, size = 2.0 * B * H * S * (576 + 512), 2.0 * B * S * 576
    return Row(f"latent attention B{B} H{H}/1 S{S} E576 Ev512, one query", make, flops, size)


def merge(task: str) -> Row:
    """Two parts of 16384 tokens, 16 heads, 128 features."""
    H, E = 16, 128

    def make(m: Machine) -> dict[str, Callable[[], object]]:
        n = TOKENS // m.short
        outs = _given(m, *(m.normal(1, H, n, E) for _ in range(2)))
        lses = _given(m, *(m.normal(1, H, n, dtype="float32") for _ in range(2)))
        (grad,) = _given(m, m.normal(1, H, n, E))
        if task == "merge_attention":
            return {"ours": lambda: na.merge_attention(outs, lses)}
        return {"ours": lambda: na.merge_attention_backward(grad, None, outs, lses)}

    arrays = 3 if task == "merge_attention" else 5
    return Row(f"{task} of two parts, 16384 tokens, 16 heads, 128 features", make, bytes=2.0 * arrays * TOKENS * H * E)


def append(B: int) -> Row:
    """One new token for each sequence, on the host's clock."""

    def make(m: Machine) -> dict[str, Callable[[], object]]:
        capacity = 8192 // m.short
        pair = _given(m, *(m.normal(B, 8, capacity, 128) for _ in range(2)))
        new = _given(m, *(m.normal(B, 8, 1, 128) for _ in range(2)))
        cache = na.KVCache.from_arrays(*pair, lengths=0)

        def call():
            if cache.lengths[0] == capacity:
                cache.truncate(np.zeros(B, np.int64))
            cache.append(*new)

        return {"ours": call}

    return Row(f"host, append of a token to {B} sequences", make, alone=True)


def decode(B: int, S: int, page_size: int = 0, int8: bool = False, H: int = 32, Hkv: int = 8, E: int = 128) -> Row:
    size = 2.0 * B * Hkv * S * (E + 4 if int8 else 2 * E)

    def make(m: Machine) -> dict[str, Callable[[], object]]:
        n, copies = S // m.short, 1 if m.dry else max(1, int(-(-L2 // size)))
        q = m.normal(B, H, 1, E)
        caches, tensors = [], []
        for _ in range(copies):
            k, v = (m.normal(B, Hkv, n, E) for _ in range(2))
            tensors.append((k, v))
            if int8:
                scales = [x.float().abs().amax(-1, keepdim=True) / 127 for x in (k, v)]
                codes = [(x / scale).round().to(m.torch.int8) for x, scale in zip((k, v), scales, strict=True)]
                key_scale, value_scale = _given(m, *(x[..., 0] for x in scales))
                caches.append(na.KVCache.from_arrays(*_given(m, *codes), key_scale=key_scale, value_scale=value_scale,
                                                     dtype="bfloat16"))  # fmt: skip
                continue
            key, value = _given(m, k, v)
            if not page_size:
                caches.append(na.KVCache.from_arrays(key, value))
                continue
            blocks = n // page_size
            table = np.random.default_rng(0).permutation(B * blocks).reshape(B, blocks)
            pages = [x.reshape(B, Hkv, blocks, page_size, E).swapaxes(1, 2).reshape(-1, Hkv, page_size, E)
                     for x in (k, v)]  # fmt: skip
            order = m.torch.from_numpy(np.argsort(table.ravel())).to(m.device)
            key, value = _given(m, *(x[order].contiguous() for x in pages))
            caches.append(na.PagedKVCache.from_arrays(key, value, table, np.full(B, n)))
        (query,) = _given(m, q)
        calls = {"ours": _in_turn(lambda cache: na.attention_decode(query, cache), caches)}
        found = m.peers(q, *tensors[0], False, gqa=True)
        if "flash" in found and not page_size:  # (of bfloat16 caches, beside int8 too)
            attend = m.torch.nn.functional.scaled_dot_product_attention
            calls["flash"] = _in_turn(lambda pair: attend(q, *pair, enable_gqa=True), tensors)
        return calls

    name = f"decode B{B} H{H}/{Hkv} S{S} E{E}{f' pages of {page_size}' if page_size else ''}{' int8' if int8 else ''}"
    return Row(name, make, bytes=size, bars={} if int8 else {"% copy": 70})


def overhead() -> Row:
    def make(m: Machine) -> dict[str, Callable[[], object]]:
        q, k, v = (m.normal(1, 8, 128, 64) for _ in range(3))
        attend = m.torch.nn.functional.scaled_dot_product_attention
        given = _given(m, q, k, v)
        return {"ours": lambda: na.attention(*given), "flash": lambda: attend(q, k, v)}

    return Row("host, a call with L128", make, bars={"us": 60}, alone=True)


def _given(m: Machine, *tensors):
    """Tensors as our functions take them: on the host they are arrays of NumPy."""
    if not m.dry:
        return tensors
    import ml_dtypes

    return tuple(
        x.view(m.torch.int16).numpy().view(ml_dtypes.bfloat16) if x.dtype == m.torch.bfloat16 else x.numpy()
        for x in tensors
    )


def _with_tf32(tf32: bool, call: Callable[[], object]) -> Callable[[], object]:
    from numba_attention.cuda.tile_shapes import TF32X3

    def called():
        os.environ[TF32X3] = "1" if tf32 else "0"
        return call()

    return called


def _with_mma_sync(call: Callable[[], object]) -> Callable[[], object]:
    from numba_attention.cuda.tile_shapes import WGMMA

    def called():
        os.environ[WGMMA] = "0"
        try:
            return call()
        finally:
            del os.environ[WGMMA]

    return called


def _in_turn(call: Callable[..., object], arguments: list) -> Callable[[], object]:
    turn = [0]

    def called():
        turn[0] += 1
        return call(arguments[turn[0] % len(arguments)])

    return called


def _naive(q, k, v):
    """What one writes in CuPy, which has no bfloat16: all scores in memory."""
    given = []

    def call():
        import cupy

        if not given:
            given.extend(cupy.from_dlpack(x.half() if x.dtype.itemsize == 2 else x) for x in (q, k, v))
        a, b, c = given
        scores = cupy.matmul(a, b.swapaxes(-1, -2)) * a.dtype.type(a.shape[-1] ** -0.5)
        scores = cupy.exp(scores - scores.max(-1, keepdims=True))
        return cupy.matmul(scores / scores.sum(-1, keepdims=True), c)

    return call


def rows() -> list[Row]:
    made = [forward(E, L, causal) for causal in (False, True) for E in (64, 128) for L in (4096, 8192, 16384)]
    made += [forward(128, 4096, False, "float16"), forward(256, 4096, False), forward(32, 4096, False)]
    made += [backward(E, L, causal) for causal in (False, True) for E in (64, 128) for L in (4096, 8192, 16384)]
    made += [decode(1, 8192), decode(1, 65536), decode(64, 8192), decode(64, 32768), decode(64, 8192, page_size=16)]
    made += [decode(1, 65536, int8=True), decode(64, 8192, int8=True), decode(64, 8192, H=64, Hkv=1)]
    made += [forward(64, 4096, False, "float32", bars={"TFLOP/s": 20})]
    made += [forward(64, 4096, False, "float32", tf32=True, bars={"TFLOP/s": 30})]
    made += [forward(128, 4096, False, "float32", bars={}, B=1), forward(64, 2048, False, "float64", bars={}, B=1)]
    made += [backward(64, 4096, False, "float32", B=1), backward(64, 2048, False, "float64", B=1)]
    names = ("plain", "dropout", "softcap", "ALiBi", "bias", "a score_mod with a slope", "a tenth of all blocks")
    made += [optional(name, task=task) for task in ("forward", "backward") for name in names]
    made += [
        optional(name, E, task=task)
        for task, sizes in (("forward", (64, 128, 256)), ("backward", (64, 128)))
        for name in ON_WARPGROUPS[task] for E in sizes if (name, E) not in {(name, 64) for name in names}
    ]  # fmt: skip
    made += [optional("gradient of slopes", task="backward"), optional("plain", L=2048, task="attention_weights")]
    made += [forward(576, 4096, False, bars={}, B=4, Ev=512), latent(64, 8192), latent(64, 8192, H=16)]
    made += [merge("merge_attention"), merge("merge_attention_backward"), append(64)]
    return [*made, overhead()]


PEERS = ("flash", "cuDNN", "Triton", "CuPy", "mma.sync")


def measure(m: Machine, row: Row, rounds: int) -> dict[str, float]:
    """Median seconds of each contender."""
    calls = m.usable(row.make(m))
    if row.alone:
        return {name: min(m.of_host(call) for _ in range(rounds * 3)) for name, call in calls.items()}
    once = {name: m.seconds(call, 2) for name, call in calls.items()}
    seconds: dict[str, list[float]] = {name: [] for name in calls}
    for _ in range(rounds):
        for name, call in calls.items():
            times = 1 if m.dry else max(1, min(500, int(SECONDS / max(once[name], 1e-6))))
            seconds[name].append(m.seconds(call, times))
    return {name: statistics.median(found) for name, found in seconds.items()}


def line(m: Machine, row: Row, seconds: dict[str, float], product: float, copy: float) -> str:
    ours = seconds["ours"]
    found = {name: seconds[name] / ours for name in PEERS if name in seconds}
    found |= {"TFLOP/s": row.flops / ours / 1e12, "% copy": 100 * row.bytes / ours / copy, "us": 1e6 * ours}
    passed = all(
        found.get(name, 0) <= bar if name == "us" else found.get(name, 0) >= bar for name, bar in row.bars.items()
    )
    cells = [row.name, f"{1e6 * ours:.1f} us" if ours < 1e-3 else f"{1e3 * ours:.2f} ms"]
    cells.append(f"{found['TFLOP/s']:.1f}" if row.flops else "-")
    cells.append(f"{100 * row.flops / ours / product:.0f}%" if row.flops else "-")
    cells.append(f"{found['% copy']:.0f}%" if row.bytes else "-")
    cells += [f"{found[name]:.2f}" if name in found else "-" for name in PEERS]
    said = ", ".join(f"{name} {bar:g}" for name, bar in row.bars.items())
    cells.append("" if m.dry or not row.bars else f"{'pass' if passed else 'FAIL'} ({said})")
    return f"| {' | '.join(cells)} |"


def report(m: Machine, chosen: list[Row], rounds: int) -> None:
    product, copy = m.ceilings()
    if m.dry:
        print("dry run, on the host: no figure below means anything")
    else:
        facts = na.show_config("dicts")
        print(", ".join(facts["GPUs"].values()))
        print(", ".join(f"{name} {facts['Versions'].get(name)}" for name in ("numba-attention", "numba-cuda", "torch")))
    print(f"matmul 8192 bfloat16: {product / 1e12:.0f} TFLOP/s; copy: {copy / 1e9:.0f} GB/s, read and written\n")
    names = ["work", "time", "TFLOP/s", "% matmul", "% copy", *(f"x {name}" for name in PEERS), "verdict (bars)"]
    print(f"| {' | '.join(names)} |\n| {' | '.join(['---'] * len(names))} |")
    for row in chosen:
        try:
            print(line(m, row, measure(m, row, rounds), product, copy), flush=True)
        except Exception as error:  # the other rows are worth having all the same
            print(f"| {row.name} | {type(error).__name__}: {error} |", flush=True)
        if not m.dry:
            m.torch.cuda.empty_cache()
    for name, why in m.missing.items():
        print(f"\n{name} is left out where it fails: {why}")


def verify() -> int:
    """Run all that needs a GPU."""
    na.show_config()
    command = [sys.executable, "-m", "pytest", "-m", "gpu", "-ra", "--durations=10", os.fspath(ROOT / "tests")]
    return subprocess.run(command, check=False, cwd=ROOT).returncode


def tune(m: Machine, wanted: str, rounds: int) -> None:
    """Time every shape of tiles, and print those of the table beside the fastest."""
    from numba_attention.cuda import kernels, tile_shapes
    from numba_attention.cuda.spec import FEATURES
    from numba_attention.device import runtime

    with runtime.using(0, runtime.DEFAULT_STREAM):
        device = runtime.current_device()
    for storage in ("bfloat16", "float32"):
        for E in FEATURES:
            L = 4096 if storage == "bfloat16" else 2048
            q, k, v, grad = (m.normal(TOKENS // L, HIDDEN // E, L, E, dtype=storage) for _ in range(4))
            out, lse = na.attention(q, k, v, return_lse=True)
            for task in ("forward", "query", "key"):
                name = f"{task} {storage} E{E}"
                if wanted not in name:
                    continue
                if task == "forward":
                    call = lambda q=q, k=k, v=v: na.attention(q, k, v)  # noqa: E731
                else:
                    call = lambda a=(grad, q, k, v, out, lse): na.attention_backward(*a)  # noqa: E731
                found = []
                with runtime.using(0, runtime.DEFAULT_STREAM):
                    tried = tile_shapes.candidates(task, storage, E, E)
                for c in [None, *tried]:
                    if c is not None and any(kernels.compile_(part).spills for part in tile_shapes.parts(c)):
                        continue
                    tile_shapes.use(task, storage, E, E, c)
                    call()
                    shape = None if c is None else (c.slots, c.warps, c.columns)
                    found.append((statistics.median(m.seconds(call, 5) for _ in range(rounds)), shape))
                tile_shapes.use(task, storage, E, E, None)
                (table, _), *others = found
                base = tile_shapes.base(task, storage, E, E, device)
                print(f"{name}: {(base.slots, base.warps, base.columns)} of the table {table * 1e3:.3f} ms;", end=" ")
                print(", ".join(f"{shape} {seconds / table:.3f}" for seconds, shape in sorted(others)[:4]), flush=True)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--verify", action="store_true", help="run every test that needs a GPU")
    parser.add_argument("--tune", action="store_true", help="time shapes of tiles")
    parser.add_argument("--dry-run", action="store_true", help="run the script on the host")
    parser.add_argument("--rows", default="", help="only rows whose name contains this")
    parser.add_argument("--rounds", type=int, default=7)
    options = parser.parse_args()
    status = na.backends()["cuda"]
    if not status and not options.dry_run:
        print(f"no GPU to measure: {status.reason}", file=sys.stderr)
        return 2
    if options.verify:
        return verify()
    m = Machine(options.dry_run)
    if options.tune:
        tune(m, options.rows, options.rounds)
    else:
        report(m, [row for row in rows() if options.rows in row.name], options.rounds)
    return 0


if __name__ == "__main__":
    sys.exit(main())
