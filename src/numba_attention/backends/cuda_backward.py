"""The backward pass of the CUDA backend: the launches of its kernels, one after the other."""

import math

import numpy as np

from ..cuda import rowwise, tile_shapes
from ..cuda.blocks import FACTS, HEAD
from ..cuda.spec import Spec, padded
from ..device import runtime
from ..device.constants import upload
from ..device.driver import Device
from ..options import Array
from ..problem.dense import BackwardProblem, spread_bias
from .cuda_launch import Work, is_aligned, work_list
from .device_masks import with_block_mask, with_fitting_rows, with_whole_mask
from .device_rules import offsets_of
from .device_sums import add_up

WARPS = 4  # of a block in kernels of rows


def run(g: BackwardProblem) -> None:
    """Write the gradients of query, key and value, and make those of bias and sinks."""
    p = g.forward = with_block_mask(g.forward)
    stream = runtime.stream()
    if g.mod_grads and tile_shapes.is_deterministic():
        raise NotImplementedError(
            f"mod_grads are summed by atomics in any order on the backend 'cuda', and {tile_shapes.DETERMINISTIC} is "
            "set; use backend='cpu' with arrays on the host"
        )
    if g.bias_shape is not None or g.mod_grads:
        p = g.forward = with_whole_mask(p)
    real = np.float64 if p.query.dtype == np.float64 else np.float32
    of_rows = p.out.shape[-3:-1] if p.packing else p.out.shape[:-1]  # all packed sequences share one array
    delta = runtime.empty((*of_rows, len(FACTS)), real, stream)[..., 0]
    delta = np.broadcast_to(delta, p.out.shape[:-1])
    work = Work(
        p, grad_out=g.grad_out, grad_lse=g.grad_lse, grad_query=g.query, grad_key=g.key, grad_value=g.value,
        delta=delta,
    )  # fmt: skip
    number = len(work.sequences)
    if not number or not p.H:
        return _without_work(g, work)
    aligned = is_aligned(p.query, p.key, p.value, g.grad_out, g.query, g.key, g.value)
    of_queries, of_keys = work.spec("query", aligned, g.query), work.spec("key", aligned, g.key)
    single = None if tile_shapes.is_deterministic() else tile_shapes.fused_dq(of_keys, work.device)
    if single is not None:
        work.locate("sum_query", np.broadcast_to(_empty_sums(single, of_rows, stream), (*p.out.shape[:-1], 1)))
        work.set(sum_query_head=of_rows[-1] * single.E * 4)  # (broadcasting forgets the stride of a single head)
    of_bias = ""
    if g.bias_shape is not None:
        of_bias = _prepare_bias(g, work, single or of_queries)
        if single is not None:
            single = single.with_(grad_bias=of_bias)
        elif of_bias:
            of_queries = of_queries.with_(grad_bias=of_bias)
    work.upload_sequences()
    work.put("far", runtime.empty((HEAD,), np.int32, stream, cleared=4 * HEAD))
    if p.L:
        c = _delta(_small("delta", work), single).with_(aligned=is_aligned(p.out, g.grad_out))
        tiles = -(-p.L // rowwise.rows_of(c))
        work.launch(c, (number * tiles, p.H, 1), tiles=tiles)
        c = tile_shapes.normalizers(work.spec("forward", is_aligned(p.query, p.key)), work.device)
        c = c.with_(sinks=p.sinks is not None, dropout=False)
        tiles = -(-p.L // c.rows)
        work.launch(c, (number * tiles, p.H, 1), tiles=tiles)
    if p.S:
        for c in tile_shapes.parts(of_keys) if single is None else [single]:
            c = with_fitting_rows(p, c)
            _own(work, c, c, p.Hkv, p.S, c.rows)
    if p.L:
        c = (
            with_fitting_rows(p, of_queries)
            if single is None
            else _round(_small("round", work), single).with_(aligned=aligned)
        )
        _own(work, c, of_queries, p.H, p.L, c.rows if single is None else rowwise.rows_of(c))
    if g.bias_shape is not None and not of_bias and p.L and p.S:
        _of_bias(g, work, is_aligned(p.query, p.key, p.value, g.grad_out))
    if p.sinks is not None:
        _of_sinks(g, work)
    if g.mod_grads:
        _of_mods(g, work, is_aligned(p.query, p.key, p.value, g.grad_out))


def _empty_sums(single: Spec, of_rows: tuple[int, ...], stream: int) -> Array:
    """Return room for the sums of dQ, one element of each row, in the order that a kernel adds them in."""
    if not _is_in_parts(single):
        return runtime.empty((*of_rows, single.E), np.float32, stream)[..., :1]
    *heads, rows = of_rows
    return runtime.empty((*heads, single.E // rowwise.PART, rows, rowwise.PART), np.float32, stream)[..., 0, :, :1]


def _is_in_parts(single: Spec) -> bool:
    return single.product == "wgmma"


def kernels_of(c: Spec, device: Device) -> list[Spec]:
    """Return the gradient kernels of a call with plain options whose forward pass runs the kernel `c`."""
    queries, keys = (
        tile_shapes.with_options(
            tile_shapes.base(task, c.storage, c.E, c.Ev, device), flags=c.flags, aligned=c.aligned
        ).with_(to=c.to)
        for task in ("query", "key")
    )
    single = None if tile_shapes.is_deterministic() else tile_shapes.fused_dq(keys, device)
    small = Spec("delta", c.storage, c.E, c.Ev, warps=WARPS, arch=c.arch)
    delta = _delta(small, single)
    specs = [delta, *tile_shapes.parts(keys), queries] if single is None else [delta, single]
    specs.append(tile_shapes.normalizers(c.with_(to=""), device))
    if single is not None:
        specs.append(_round(small.with_(task="round"), single))
    repeat = [tile_shapes.nan_safe(x, device) for x in (queries, *tile_shapes.parts(keys))] if c.flags else []
    return [*specs, *repeat]


def _delta(c: Spec, single: Spec | None) -> Spec:
    """Return the kernel of delta, which clears the sums of dQ of another kernel."""
    return c if single is None else c.with_(fused_dq=True, in_parts=_is_in_parts(single))


def _round(c: Spec, single: Spec) -> Spec:
    """Return the kernel that rounds the sums of dQ of another kernel."""
    return c.with_(flags=single.flags, to=single.to, in_parts=_is_in_parts(single))


def _small(task: str, work: Work) -> Spec:
    p = work.p
    return Spec(task, work.storage, padded(p.E), padded(p.Ev), warps=WARPS, arch=work.device.arch)


def _own(work: Work, c: Spec, repeat: Spec, heads: int, length: int, rows: int) -> None:
    """Launch a kernel whose blocks own `rows` of `length` rows each, and then the one that repeats marked rows."""
    number = len(work.sequences)
    tiles = -(-length // rows)
    listed = None if c.task == "round" else work_list(work.p, work.sequences, rows, c.task == "key")
    items = number * tiles if listed is None else len(listed)
    if not items:
        return
    work.put("work", None if listed is None else upload(listed))
    if work.hides:
        work.mark_rows(c, number * heads * tiles * rows)
    if c.task == "round":
        work.launch(c, (items, heads, 1), tiles=tiles, flag_rows=tiles * rows, number=number)
    else:
        work.launch_tiles(c, tiles, items, heads, flag_rows=tiles * rows, number=number)
    if work.hides:
        repeat = tile_shapes.nan_safe(repeat, work.device)
        work.put("work", None)
        tiles = -(-length // repeat.rows)
        work.launch(repeat, (number * tiles, heads, repeat.slabs), tiles=tiles)


def _prepare_bias(g: BackwardProblem, work: Work, beside: Spec) -> str:
    """Allocate the gradient of the bias, cleared where not all of it is written.

    Returns what the kernel that has dS anyway does for it (`Spec.grad_bias`): "" if a pass of its own computes it. That
    is so where dS is not its gradient, and where a sum needs an order, because it must not depend on that of atomics.
    """
    p, shape = g.forward, g.bias_shape
    assert shape is not None
    sizes = (math.prod(shape[:-3]), *shape[-3:])
    has_own = p.packing is None and sizes == (len(work.sequences), p.H, p.L, p.S)  # each score its element
    how = ""
    if p.L and p.S and not (beside.has_slopes or beside.is_sliced):
        if has_own:
            how = "elements"
        elif beside.fused_dq:
            axes = tuple(name for name, n in (("rows", shape[-2]), ("keys", shape[-1])) if n == 1)
            how = {0: "sums", 1: "sums_of_" + "".join(axes), 2: "sums_of_all"}[len(axes)]
    of_bias = None
    if how == "elements" and beside.fused_dq and p.bias is not None and p.bias.dtype == p.query.dtype:
        as_given = g.empty(shape, p.bias.dtype)
        if is_aligned(as_given):
            of_bias, how = as_given, "tiles"
    cleared = how.startswith("sums") or p.packing is not None or not (p.L and p.S) or (how and not _visits_all(work))
    if of_bias is None and np.asarray(g.options.bias).dtype != work.real:  # scratch memory, to be converted
        g.bias = runtime.empty(shape, work.real, work.stream, math.prod(shape) * work.real.itemsize * bool(cleared))
    else:
        g.bias = g.empty(shape, work.real) if of_bias is None else of_bias
        if cleared:
            runtime.clear(g.bias, work.stream)
    work.locate("grad_bias", spread_bias(g.bias, p))
    return how


def _visits_all(work: Work) -> bool:
    """Whether every row sees every key, and all of them exist."""
    p, s = work.p, work.sequences
    return p.left is None and p.right is None and bool(((s["queries"] >= p.L) & (s["keys"] >= p.S)).all())


def _of_bias(g: BackwardProblem, work: Work, aligned: bool) -> None:
    p, shape = g.forward, g.bias_shape
    assert shape is not None
    c = tile_shapes.bias(work.spec("query", aligned), work.device)
    owners, of_members = _owners(work)
    packed = (False, False) if p.packing is None else p.packing.bias
    sizes = [0 if is_packed and n != 1 else n for n, is_packed in zip(shape[-2:], packed, strict=True)]
    tiles = 1 if shape[-2] == 1 else -(-p.L // c.rows)
    inner = 1 if shape[-1] == 1 else -(-p.S // c.columns)
    if not owners:
        return
    work.put("members", upload(of_members))
    more = {"bias_heads": shape[-3], "bias_rows": sizes[0], "bias_keys": sizes[1]}
    work.launch(c, (owners * tiles * inner, shape[-3], 1), tiles=tiles, inner_tiles=inner, number=owners, **more)


def _owners(work: Work) -> tuple[int, Array]:
    """Group the sequences that share elements of the bias.

    Returns the number of groups, and an array with the offset of each group followed by the numbers of its sequences.
    """
    used = np.flatnonzero((work.sequences["rows"] > 0) & (work.sequences["key_rows"] > 0))
    offsets = work.sequences["grad_bias"][used]
    order = np.argsort(offsets, kind="stable")
    _, starts = np.unique(offsets[order], return_index=True)
    return len(starts), np.concatenate([starts, [len(used)], used[order]]).astype(np.int64)


def _of_sinks(g: BackwardProblem, work: Work) -> None:
    p = work.p
    g.sinks = g.empty((p.H,), work.real)
    work.put("partial", g.sinks)
    c = _small("sinks", work).with_(warps=8)
    work.launch(c, (p.H, 1, 1), number=len(work.sequences), inner_tiles=-(-p.L // c.threads))


def _of_mods(g: BackwardProblem, work: Work, aligned: bool) -> None:
    """Add up the gradients of `mod_args` by atomics, and convert each to the dtype of its array."""
    p, places = g.forward, g.mod_grads
    assert places is not None
    offsets = offsets_of(p.mod_args)
    size = max(offsets[-1], 1)
    sums = runtime.empty((size,), work.real, work.stream, cleared=size * work.real.itemsize)
    mods = work.gradients_of_mods(places)
    if p.L and p.S and mods is not None and mods.gradients.sites:
        c = tile_shapes.bias(work.spec("forward", aligned).with_(mods=mods), work.device, "mods")
        work.put("partial", sums)
        tiles = -(-p.L // c.rows)
        work.put("work", None)
        work.launch(c, (len(work.sequences) * tiles, p.H, 1), tiles=tiles)
    g.mod_args = []
    for place in places:
        x = p.mod_args[place]
        part = sums[offsets[place] : offsets[place + 1]].reshape(x.shape)
        total = g.empty(x.shape, x.dtype)
        add_up(part, total, work.device.arch, work.stream)
        g.mod_args.append(total)


def _without_work(g: BackwardProblem, work: Work) -> None:
    """Write zeros where there are no heads or no sequences."""
    if g.bias_shape is not None:
        g.bias = g.empty(g.bias_shape, work.real)
    if g.forward.sinks is not None:
        g.sinks = g.empty((g.forward.H,), work.real)
    if g.mod_grads:
        g.mod_args = [g.empty(x.shape, x.dtype) for x in (g.forward.mod_args[place] for place in g.mod_grads)]
    for x in (g.query, g.key, g.value, g.bias, g.sinks, *(g.mod_args or ())):
        if x is not None:
            add_up(x, x, work.device.arch, work.stream, terms=False)
