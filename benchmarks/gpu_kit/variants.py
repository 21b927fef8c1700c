"""Shapes of the kernels of sm_90a beside one another, right or wrong, TFLOP/s of whole calls: python variants.py FILE

FILE is JSON: a name for each variant, and what it changes in `SHAPES`, as {"backward": {"64": [128, 3, 2, 1, 0, 40,
232]}} or {"forward": {"128": [2, 176, 2, 1, 40, 232]}}. ``--compile`` compiles them into the folder
NUMBA_ATTENTION_KERNELS, which needs no GPU. Give it a limit (``timeout 30``): a variant that hangs holds the GPU.
"""

import json
import os
import statistics
import sys
from pathlib import Path
from types import SimpleNamespace

import bench

import numba_attention as na
from numba_attention.cuda import hopper, hopper_backward, kernels, tile_shapes
from numba_attention.cuda.spec import Spec

DEVICE = SimpleNamespace(arch="sm_90a", compute_capability=(9, 0), shared_memory=232448, multiprocessors=132)
MODULES = {"forward": hopper, "backward": hopper_backward}
SIZES, LENGTHS = (64, 128), ((8192, False), (8192, True), (4096, False))
variant, name_of = [""], Spec.name.fget
Spec.name = property(lambda c: f"{name_of(c)}-{variant[0]}" if variant[0] and c.product == "wgmma" else name_of(c))


def use(name, changes):
    """Take the shapes of a variant; its kernels have names of their own."""
    variant[0] = name
    for which, shapes in changes.items():
        MODULES[which].SHAPES.update({int(E): tuple(shape) for E, shape in shapes.items()})
    for cached in (kernels.compiled, kernels.shared, tile_shapes.for_call, tile_shapes._fused_dq):
        cached.cache_clear()
    tile_shapes._changes += 1  # calls of earlier variants are not repeated


def specs():
    for E in SIZES:
        for flags in (False, True):
            forward, keys = (tile_shapes.base(task, "bfloat16", E, E, DEVICE) for task in ("forward", "key"))
            yield hopper.spec_of(forward.with_(flags=True))
            yield hopper_backward.spec_of(keys.with_(fused_dq=True, flags=flags))


def is_right(torch, E, causal):
    q, k, v, grad = (torch.randn(1, 4, 1100, E, device="cuda", dtype=torch.bfloat16) for _ in range(4))
    leaves = [x.float().requires_grad_() for x in (q, k, v)]
    want = torch.nn.functional.scaled_dot_product_attention(*leaves, is_causal=causal)
    wanted = [want.detach(), *torch.autograd.grad(want, leaves, grad.float())]
    out, lse = na.attention(q, k, v, is_causal=causal, return_lse=True)
    got = na.attention_backward(grad, q, k, v, out, lse, is_causal=causal)
    pairs = zip((out, got.query, got.key, got.value), wanted, strict=True)
    return all(float((x.float() - y).abs().max() / y.abs().max()) < 2e-2 for x, y in pairs)


def measure(machine, E, L, causal):
    """TFLOP/s forward and backward, of 16384 tokens and 2048 features."""
    B, H = 16384 // L, 2048 // E
    q, k, v, grad = (machine.normal(B, H, L, E) for _ in range(4))
    out, lse = na.attention(q, k, v, is_causal=causal, return_lse=True)
    found = []
    for products, call in (
        (4.0, lambda: na.attention(q, k, v, is_causal=causal)),
        (10.0, lambda: na.attention_backward(grad, q, k, v, out, lse, is_causal=causal)),
    ):
        times = max(2, int(0.02 / machine.seconds(call, 2)))
        taken = statistics.median(machine.seconds(call, times) for _ in range(5))
        found.append(f"{products * B * H * L * L * E * (0.5 if causal else 1) / taken / 1e12:.0f}")
    return " / ".join(found)


def main():
    variants = json.loads(Path(sys.argv[1]).read_text())
    if "--compile" in sys.argv:
        for name, changes in variants.items():
            use(name, changes)
            for c in specs():
                kernels.ship(c, Path(os.environ["NUMBA_ATTENTION_KERNELS"]))
        return
    import torch

    machine = bench.load().Machine(dry=False)
    columns = [f"E{E} L{L}{' causal' if causal else ''}" for E in SIZES for L, causal in LENGTHS]
    print(f"| TFLOP/s forward / backward | {' | '.join(columns)} |\n| --- |{' --- |' * len(columns)}")
    for name, changes in variants.items():
        use(name, changes)
        right = all(is_right(torch, E, causal) for E in SIZES for causal in (False, True))
        cells = [measure(machine, E, L, causal) for E in SIZES for L, causal in LENGTHS]
        print(f"| {name}{'' if right else ' WRONG'} | {' | '.join(cells)} |", flush=True)


if __name__ == "__main__":
    main()
