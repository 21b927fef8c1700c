"""The one table of tile shapes, none of which spills registers (test_cuda_codegen.py), and the kernels of a call."""

import os
from functools import lru_cache
from typing import Any

from ..device import runtime
from ..errors import BackendUnavailableError
from . import hopper, hopper_backward, kernels
from .formats import HALVES
from .spec import FEATURES, SLICE, Mods, Spec, padded, slab
from .visits import WIDTH

ASYNCHRONOUS = (8, 0)  # first compute capability with asynchronous copies, and m16n8k16 on tensor cores
TF32X3 = "NUMBA_ATTENTION_TF32X3"  # "1": float32 on tensor cores, with three products for each
DETERMINISTIC = "NUMBA_ATTENTION_DETERMINISTIC"  # "1": gradients of half types have the same bits every time
WGMMA = "NUMBA_ATTENTION_WGMMA"  # "0": half types on sm_90a by mma.sync, as on other GPUs
# Asked in every call. `os.environ.get` takes 1 us where a variable is not set; the dictionary behind it does not.
_variables: Any = getattr(os.environ, "_data", os.environ)
_TF32X3, _DETERMINISTIC, _WGMMA = (
    name if _variables is os.environ else os.environ.encodekey(name) for name in (TF32X3, DETERMINISTIC, WGMMA)
)

# Head dimension: slots, warps, columns. ("tensor": slots are tiles of 16 rows.)
_SHAPES: dict[tuple[str, str, str], dict[int, tuple[int, int, int]]] = {
    ("forward", "tensor", "half"): {
        32: (2, 4, 64), 64: (2, 4, 64), 96: (2, 4, 64), 128: (2, 4, 48), 192: (1, 8, 64), 256: (1, 8, 64),
    },
    ("query", "tensor", "half"): {
        32: (2, 4, 64), 64: (2, 4, 48), 96: (2, 4, 32), 128: (1, 8, 64), 192: (1, 8, 32), 256: (1, 8, 32),
    },
    ("key", "tensor", "half"): {
        32: (2, 4, 64), 64: (2, 4, 32), 96: (1, 8, 64), 128: (1, 8, 48), 192: (1, 8, 32), 256: (1, 8, 32),
    },
    ("fused_dq", "tensor", "half"): {32: (2, 4, 32), 64: (2, 4, 32), 96: (1, 8, 64), 128: (1, 8, 64)},
    ("forward", "tf32", "float32"): {
        32: (2, 4, 32), 64: (2, 4, 32), 96: (1, 4, 32), 128: (1, 4, 32),
    },
    ("query", "tf32", "float32"): dict.fromkeys((32, 64, 96, 128), (1, 4, 32)),
    ("key", "tf32", "float32"): {32: (1, 4, 32), 64: (1, 4, 32), 96: (1, 4, 16), 128: (1, 4, 16)},
    ("forward", "simt", "float32"): {
        32: (8, 4, 64), 64: (8, 4, 64), 96: (8, 4, 32), 128: (8, 4, 32), 192: (4, 4, 32), 256: (4, 4, 32),
    },
    ("query", "simt", "float32"): {
        32: (4, 4, 64), 64: (4, 4, 64), 96: (4, 4, 32), 128: (4, 4, 32), 192: (2, 4, 16), 256: (2, 4, 16),
    },
    ("key", "simt", "float32"): {
        32: (4, 4, 64), 64: (4, 4, 64), 96: (2, 4, 32), 128: (4, 4, 32), 192: (2, 4, 16), 256: (2, 4, 16),
    },
    ("forward", "simt", "float64"): {
        32: (4, 4, 64), 64: (4, 4, 64), 96: (2, 4, 32), 128: (2, 4, 32), 192: (1, 4, 32), 256: (1, 4, 32),
    },
    ("query", "simt", "float64"): {
        32: (2, 4, 32), 64: (2, 4, 32), 96: (2, 4, 16), 128: (1, 4, 16), 192: (1, 4, 16), 256: (1, 4, 16),
    },
    ("key", "simt", "float64"): {
        32: (2, 4, 32), 64: (2, 4, 32), 96: (1, 4, 16), 128: (1, 4, 16), 192: (1, 4, 16), 256: (1, 4, 16),
    },
}  # fmt: skip
_tuned: dict[tuple[str, str, int, int], Spec] = {}
_changes = 0


def base(task: str, storage: str, E: int, Ev: int, device: Any) -> Spec:
    """The kernel of a task without options: what multiplies, and its tiles, so that they fit into the device."""
    tuned = _tuned.get((task, storage, padded(E), padded(Ev)))
    product = product_of(storage, device, max(E, Ev))
    if tuned is not None and tuned.product == product:
        return tuned.with_(arch=device.arch)
    return shaped(task, storage, E, Ev, product, device)


def product_of(storage: str, device: Any, E: int) -> str:
    """What multiplies: tensor cores of sm_80 and later, or FMA."""
    if device.compute_capability < ASYNCHRONOUS:
        return "simt"
    if storage in HALVES:
        return "tensor"
    # With more than 128 features the sums of a tile, beside the accumulators, would spill.
    return "tf32" if storage == "float32" and E <= 128 and os.environ.get(TF32X3) == "1" else "simt"


def shaped(task: str, storage: str, E: int, Ev: int, product: str, device: Any) -> Spec:
    kind = "half" if product == "tensor" else "float64" if storage == "float64" else "float32"
    of_E = of_Ev = 0
    if max(E, Ev) > FEATURES[-1]:
        width = SLICE // 2 if kind == "float64" else SLICE
        of_E, of_Ev = max(-(-E // width), 1), max(-(-Ev // width), 1)
        E, Ev = width, slab(max(Ev if task == "forward" else E, 1))
    E, Ev = padded(E), padded(Ev)
    slots, warps, columns = _SHAPES[task, product, kind][max(E, Ev)]
    if of_E and task == "forward" and product == "tensor":
        columns = min(columns, 48)  # sums of a slice are apart from the scores: with 64 columns they would spill
    c = Spec(task, storage, E, Ev, product, slots, 8, warps, columns, arch=device.arch, E_slices=of_E, Ev_slices=of_Ev)
    return fitted(c, device)


def fitted(c: Spec, device: Any) -> Spec:
    """Fewer rows of a thread, warps or columns until the tiles fit into shared memory."""
    least = c.across if c.product == "simt" else 16
    while kernels.shared(c) > device.shared_memory:
        if c.has_bias_tile:
            c = c.with_(bias_tile=False)
            continue
        if c.is_sliced and c.warps == 1 and c.slots > 1:
            c = c.with_(slots=c.slots // 2)
            continue
        if c.warps == 1 and c.columns <= least:
            other = "float32, or " if c.storage == "float64" else ""
            raise BackendUnavailableError(
                f"head dimensions {_features(c)} of {c.storage} need {kernels.shared(c):,} bytes of shared memory "
                f"for a block, and this GPU has {device.shared_memory:,}; use {other}backend='cpu'"
            )
        if c.product == "simt" and c.slots == 8:  # two warps of 8 rows a thread would spill
            c = c.with_(slots=4)
            continue
        c = c.with_(warps=c.warps // 2) if c.warps > 1 else c.with_(columns=max(c.columns // 32 * 16, least))
    return c


def _features(c: Spec) -> str:
    return f"{c.E * (c.E_slices or 1)} and {c.E * c.Ev_slices if c.is_sliced else c.Ev}"


@lru_cache(maxsize=1024)
def for_call(
    task: str, storage: str, E: int, Ev: int, product: str, device: Any, softcap: bool, alibi: bool, bias: str,
    mask: bool, dropout: bool, paged: bool, flags: bool, aligned: bool, kv_storage: str = "",
    mods: Mods | None = None, lists: bool = False, pairs: bool = False, bias_tile: bool = False,
) -> Spec:  # fmt: skip
    """The kernel of a task with the options of a call.

    `pairs`: bias and mask can be read in pairs, which the threads of tensor cores have, of keys where rows are queries.
    `bias_tile`: the bias can be copied to tiles.
    """
    c = base(task, storage, E, Ev, device)
    assert c.product == product
    c = with_options(
        c, softcap=softcap, alibi=alibi, bias=bias, mask=mask, dropout=dropout, paged=paged, flags=flags,
        kv_storage=kv_storage, mods=mods, lists=lists, pairs=pairs and product != "simt" and task != "key",
        bias_tile=bias_tile and product == "tensor",
        aligned=aligned and device.compute_capability >= ASYNCHRONOUS,
    )  # fmt: skip
    return fitted(c, device)  # codes of a cache need shared memory beside the tiles


def resident(c: Spec, device: Any) -> int:
    """How many blocks of a kernel a device has at a time, if it uses all registers that it may."""
    by_registers = 65536 // (256 * c.threads)
    by_memory = device.shared_memory // max(kernels.shared(c) + 1024, 1)
    return int(device.multiprocessors * max(1, min(by_registers, by_memory, 16)))


def heads_together(heads: int, tiles: int, resident: int) -> int:
    """How many heads, as a power of two, take turns in the order of blocks: as many as have room on the device at once.

    So the blocks that begin last are short ones of many heads, and what those read together fits in the level 2 cache.
    """
    bits = 0
    while heads % (2 << bits) == 0 and (2 << bits) * tiles <= resident:
        bits += 1
    return bits


def by_warpgroups(c: Spec, rows: int, keys: int, heads: int, device: Any) -> Spec:
    """The kernel of `hopper` in place of one of `forward`, where there is one and its large tiles have enough work.

    `heads` counts those of all sequences. With fewer blocks than multiprocessors, keys are divided, which it does not.
    """
    is_tuned = (c.task, c.storage, c.E, c.Ev) in _tuned
    large = hopper.spec_of(c) if is_on_warpgroups() and not is_tuned else None
    if large is None or rows < large.rows or keys < large.columns or kernels.shared(large) > device.shared_memory:
        return c
    return large if 4 * -(-rows // large.rows) * heads > 3 * resident(large, device) else c


def with_options(c: Spec, **options: Any) -> Spec:
    """Say what a kernel does on the way; what needs registers for it gets smaller tiles."""
    c = c.with_(**options)
    if c.lists:  # columns that divide a tile of a list
        c = c.with_(columns=1 << min(c.columns, WIDTH).bit_length() - 1)
    only_lists = c.lists and not c.is_staged and not c.dropout
    if (c.is_large and not (only_lists and c.task == "forward" and c.product == "tensor")) or c.kv_storage:
        if c.product == "simt":
            share = 4 if c.dropout and (c.is_staged or c.task == "key") else 2
            columns = min(c.columns, 16) if c.is_sliced and c.slots == 1 else c.columns
            return c.with_(slots=max(c.slots // share, 1), columns=columns)
        warps = c.warps * c.slots  # as many rows
        if c.kv_storage and c.is_large and max(c.E, c.Ev) > 128:
            warps = 4
        columns = min(c.columns, 32)
        if c.is_largest and (c.is_sliced or max(c.E, c.Ev) >= {"key": 128, "query": 256}.get(c.task, 512)):
            columns = 16
        if c.mods is not None and c.task == "query" and max(c.E, c.Ev) >= 256:
            columns = 16  # 32 would spill 8 bytes on sm_120
        if c.lists and c.is_largest and c.is_sliced and c.task == "key":
            c = c.with_(aligned=False)  # asynchronous copies of 1024 features would spill 4 bytes on sm_120
        return c.with_(slots=1, warps=warps, columns=columns)
    if c.flags and c.task == "key" and c.product == "tensor" and max(c.E, c.Ev) == 64:
        return c.with_(slots=1, warps=8, columns=64)  # two tiles of rows and their marks would spill on sm_80
    return c


def few(c: Spec, rows: int, device: Any) -> Spec:
    """The kernel for few rows and many keys: one warp a block, so that many blocks read at the same time."""
    if c.product != "simt":
        columns = 64 if c.product == "tensor" and c.E <= 128 and not c.is_large and not c.is_sliced else 32
        if c.is_large and max(c.E, c.Ev) == 256:
            columns = 16
        return fitted(c.with_(slots=1, warps=1, columns=columns), device)
    slots = 1 if rows <= 4 else 2 if rows <= 8 or c.is_sliced else min(4, c.slots)
    return fitted(c.with_(slots=slots, warps=1, columns=32), device)


def no_more_rows(c: Spec, rows: int) -> Spec:
    """The kernel with as few warps as a tile of so many rows needs."""
    while c.warps > 1 and c.rows >= 2 * rows:
        # Two warps of 8 rows a thread would spill.
        c = c.with_(slots=4) if c.product == "simt" and c.slots == 8 else c.with_(warps=c.warps // 2)
    if c.product == "tensor" and c.has_all_options and c.warps < 4 and (c.is_sliced or max(c.E, c.Ev) > 128):
        return c.with_(columns=min(c.columns, 16))  # 32 would spill 4 bytes on sm_120 (E 192), 16 on sm_80 (slices)
    return c


def nan_safe(c: Spec, device: Any) -> Spec:
    """The kernel that recomputes the flagged rows of `c`, by FMA and without multiplying hidden weights."""
    c = c.with_(fused_dq=False, grad_bias="", bias_tile=False)
    slots = 2 if c.storage != "float64" else 1
    if c.task == "forward" and c.Ev <= 128 and not c.is_large:
        slots *= 2
    if (c.dropout and c.is_staged) or c.is_sliced:
        slots = 1
    columns = 32 if c.task == "forward" else 8 if c.is_sliced and c.is_staged else 16
    product = c.with_(
        product="simt", slots=slots, across=8, warps=4, columns=columns, nan_safe=True,
        flags=False, split_kv=False, aligned=c.aligned and c.storage not in HALVES, pairs=False,
    )  # fmt: skip
    return fitted(product, device)


def candidates(task: str, storage: str, E: int, Ev: int) -> list[Spec]:
    """Shapes worth trying on a device (``benchmarks/gpu.py --tune``)."""
    device = runtime.current_device()
    c = base(task, storage, E, Ev, device)
    simt = c.product == "simt"
    shapes = [
        (slots, warps, columns)
        for slots in ((1, 2, 4, 8) if simt else (1, 2)) for warps in (4, 8) for columns in (16, 32, 64, 128)
    ]  # fmt: skip
    candidates = [c.with_(slots=slots, warps=warps, columns=columns) for slots, warps, columns in shapes]
    return [x for x in candidates if kernels.shared(x) <= device.shared_memory]


def use(task: str, storage: str, E: int, Ev: int, config: Spec | None) -> None:
    """Take a shape from now on in this process; None for that of the table."""
    key = task, storage, padded(E), padded(Ev)
    global _changes
    _changes += 1
    for_call.cache_clear()
    _fused_dq.cache_clear()
    if config is None:
        _tuned.pop(key, None)
    else:
        _tuned[key] = config


def state() -> tuple[Any, ...]:
    """All that decides on kernels beside a call and its device."""
    return _changes, _variables.get(_TF32X3), _variables.get(_DETERMINISTIC), _variables.get(_WGMMA)


def is_on_warpgroups() -> bool:
    return os.environ.get(WGMMA) != "0"


def is_deterministic() -> bool:
    return os.environ.get(DETERMINISTIC) == "1"


def fused_dq(c: Spec, device: Any) -> Spec | None:
    """The kernel of a tile of keys that adds gradients of queries too; None where it does not exist or does not fit."""
    return _fused_dq(c, device, is_on_warpgroups())


@lru_cache(maxsize=256)
def _fused_dq(c: Spec, device: Any, on_warpgroups: bool) -> Spec | None:
    shapes = _SHAPES["fused_dq", "tensor", "half"]
    E = max(c.E, c.Ev)
    if c.product != "tensor" or E not in shapes or c.is_sliced or (c.is_largest and E == 128):
        return None
    slots, warps, columns = shapes[E]
    tuned = _tuned.get(("fused_dq", c.storage, c.E, c.Ev))
    if tuned is not None:
        slots, warps, columns = tuned.slots, tuned.warps, tuned.columns
    c = c.with_(fused_dq=True, slots=slots, warps=warps, columns=columns)
    large = hopper_backward.spec_of(c) if on_warpgroups and tuned is None else None
    if large is not None and kernels.shared(large) <= device.shared_memory:
        return large
    if c.is_large:
        c = c.with_(slots=1, warps=warps * slots, columns=32)  # the tile of dS has rows of at least four chunks
    if c.has_bias_tile and kernels.shared(c) > device.shared_memory:
        c = c.with_(bias_tile=False)
    return c if kernels.shared(c) <= device.shared_memory else None


def parts(c: Spec) -> list[Spec]:
    """The kernels of a tile of keys: one for both gradients, or one for each where two sums need too many registers."""
    if c.task != "key" or (max(c.E, c.Ev) <= 128 and not c.is_sliced):
        return [c]
    of_keys = c.with_(only="key")
    if c.product == "tensor" and max(c.E, c.Ev) > 192 and c.has_all_options:
        of_keys = of_keys.with_(columns=16)  # 32 would spill 28 bytes on sm_90a
    of_values = c.with_(only="value")
    return [of_keys, of_values.with_(Ev=slab(c.Ev_slices * c.E)) if c.is_sliced else of_values]


def weights(c: Spec, device: Any) -> Spec:
    """The kernel of probabilities. It multiplies no weights, so that what is hidden needs no kernel of its own."""
    if c.product == "tensor" and not c.is_sliced:
        spec = c.with_(
            task="weights", slots=1, warps=4, columns=32, flags=False, pairs=False, bias_tile=False, gather_rows=True,
            Ev=32,
        )  # fmt: skip
        return fitted(spec, device)
    slots = 4 if c.storage != "float64" and not c.is_large else 2
    spec = c.with_(
        task="weights", product="simt", slots=slots, across=8, warps=4, columns=32, nan_safe=True, flags=False,
        pairs=False, bias_tile=False, gather_rows=True, aligned=c.aligned and c.storage not in HALVES, Ev=32,
    )  # fmt: skip
    return fitted(spec, device)


def normalizers(c: Spec, device: Any) -> Spec:
    """The kernel of `normalizers`; its products are those of the gradients, so that scores have the same bits."""
    slots = 1 if c.product != "simt" else min(c.slots, 4 if c.storage != "float64" else 2)
    return fitted(
        c.with_(task="normalizers", slots=slots, warps=4, columns=32, flags=False, pairs=False, bias_tile=False, Ev=32),
        device,
    )


def bias(c: Spec, device: Any, task: str = "bias") -> Spec:
    """The kernel of the gradient of a bias, or of `mod_args`."""
    spec = c.with_(task=task, flags=False, nan_safe=False, pairs=c.pairs and task == "bias", bias_tile=False)
    small = max(c.E, c.Ev) <= 64
    if spec.product == "simt":
        slots = (
            1
            if c.dropout or c.mods is not None or c.is_sliced
            else (4 if small else 2) // (2 if c.storage == "float64" else 1)
        )
        spec = spec.with_(slots=slots, columns=32 if small else 16, nan_safe=True)
    else:
        spec = spec.with_(slots=1, warps=4 if max(c.E, c.Ev) <= 128 else 2, columns=32 if small else 16)
    return fitted(spec, device)
