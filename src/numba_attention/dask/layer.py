"""`MultiHeadAttention` over Dask arrays: projections of blocks of rows, and attention over all blocks between them.

A block of rows has all heads, or blocks of heads have parameters of their own (`heads_per_block`), as in tensor
parallelism [1]_: each projects to its heads, and what they project back is summed. Gradients of parameters are sums
over the blocks of rows. Sums are added up in a tree.

References
----------
.. [1] Shoeybi et al., "Megatron-LM", 2019, section 3 (self-attention divided by heads).
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from itertools import product
from typing import Any, NamedTuple

import dask.array as da
import numpy as np
from dask.base import tokenize

from ..layer.heads import as_features
from ..layer.inputs import check_inputs, hide_padding
from ..layer.lazy import LazyContext
from ..layer.parameters import INPUTS
from ..layer.positions import Places, default_places, packed_places, places_of, turn_at, turned
from ..layer.projection import linear, linear_backward, without_idle_rows
from ..options import Array, Gradients
from ..rotary import Rotation, Turn, rotate
from ..validation import as_ints, check_like
from .arguments import FAN, headers
from .dense import attention, attention_backward
from .graph import Key, List, Task, TaskRef, array, device_meta, is_dask, lowered, on_chunks, tree
from .layout import Chunks, Heads, Index, blocks_of_heads
from .tasks import add, kernel_threads
from .varlen import attention_varlen, attention_varlen_backward, heads_first


class Rows(NamedTuple):
    """A lazy array with blocks of rows, whose axes are (in front, batch, heads, L, features), some of them missing.

    There is one block along all axes but the batch, the heads and the rows.
    """

    array: Any
    front: int = 0
    heads: int = 0
    features: int = 1

    @property
    def batch(self) -> int:
        """Number of axes of the batch."""
        n: int = self.array.ndim - self.front - self.heads - 1 - self.features
        return n

    @property
    def chunks(self) -> tuple[tuple[int, ...], ...]:
        """The blocks of batch and rows."""
        of_array = self.array.chunks[self.front :]
        return *of_array[: self.batch], of_array[self.batch + self.heads]

    def block(self, index: Index, h: int) -> TaskRef:
        """Return the block at an index (*batch, row), of a block of heads; axes of size 1 are broadcast."""
        *batch, row = index
        of_batch = batch[len(batch) - self.batch :]
        where = (*(0,) * self.front, *of_batch, *(h,) * self.heads, row, *(0,) * self.features)
        one_block = (len(chunks) == 1 for chunks in self.array.chunks)
        return TaskRef((self.array.name, *(0 if one else i for one, i in zip(one_block, where, strict=True))))


class Side(NamedTuple):
    """One projection of an input: of queries, keys or values."""

    name: str
    x: Rows
    places: Rows | None  # where rows are rotated to
    rotation: tuple[Rotation, bool] | None  # and whether places have three axes


class Context(LazyContext):
    """What the backward pass needs: lazy arrays, and copies of the parameters, which may change before it is computed.

    Parameters
    ----------
    layer : MultiHeadAttention
    inputs : tuple
        query, key and value as the caller passed them, or None.
    sides : list of Side
    options : dict
        Those of `attention`.
    starts : ndarray, optional
        cu_seqlens of packed sequences.
    heads : Heads
        The blocks of heads.
    """

    def __init__(
        self, layer: Any, inputs: tuple[Any, Any, Any], sides: list[Side], options: Any, starts: Any, heads: Heads
    ) -> None:
        self.layer, self.inputs, self.sides, self.options, self.starts = layer, inputs, sides, options, starts
        self.splits = dict(zip(INPUTS, ((heads.query, 0), (heads.key, 0), (heads.key, 0)), strict=True))
        self.splits["out_proj"] = heads.query, 1
        self.parameters = {name: self._in_blocks(name, x.copy()) for name, x in layer.parameters().items()}
        projected = [
            self._to_heads(_project, [side.x, side.places], side.name, (side.rotation, layer.head_dim))
            for side in sides
        ]
        if starts is None:
            self.projected = projected
            self.attended, self.lse = attention(*projected, return_lse=True, **options)
            self.heads = Rows(self.attended, heads=1)
        else:
            q, k, v = self.projected = [heads_first(x) for x in projected]
            self.attended, self.lse = attention_varlen(q, k, v, starts, starts, return_lse=True, **options)
            self.heads = Rows(lowered(heads_first(self.attended)), heads=1)

    def _in_blocks(self, name: str, x: Array) -> Any:
        """Return a parameter as a lazy array in blocks of heads."""
        heads, axis = self.splits[name.partition(".")[0]]
        features = tuple(n * self.layer.head_dim for n in heads)
        return on_chunks(x, tuple(features if n == axis else (size,) for n, size in enumerate(x.shape)))

    def result(self) -> Any:
        """Project the heads back."""
        return self._from_heads(_project_back, [self.heads], "out_proj", self.layer.embed_dim)

    def backward(self, grad_out: Any, mod_grads: Any) -> tuple[Gradients, dict[str, Any]]:
        """Return the gradients of the inputs, and of the parameters by name."""
        heads, E = self.heads, self.layer.head_dim
        shape = (*heads.array.shape[:-3], heads.array.shape[-2], self.layer.embed_dim)
        check_like("grad_out", headers({"grad_out": grad_out})["grad_out"], shape, self.layer.dtype)
        grad_rows = Rows(on_chunks(grad_out, (*heads.chunks, shape[-1:])))
        grads = self._of_parameters("out_proj", [grad_rows, heads, None])
        grad = self._to_heads(_back_to_heads, [grad_rows], "out_proj", (E,))
        if self.starts is None:
            of_rows = grad, *self.projected, self.attended, self.lse
            of_heads = attention_backward(*of_rows, mod_grads=mod_grads, **self.options)
        else:
            of_rows = heads_first(grad), *self.projected, self.attended, self.lse, self.starts, self.starts
            of_heads = attention_varlen_backward(*of_rows, mod_grads=mod_grads, **self.options)
        of_inputs: list[Any] = [None, None, None]
        source_of_key = 0 if self.inputs[1] is None else 1
        sources = 0, source_of_key, source_of_key if self.inputs[2] is None else 2
        for side, source, of_side in zip(self.sides, sources, of_heads[:3], strict=True):
            own = Rows(of_side if self.starts is None else lowered(heads_first(of_side)), heads=1)
            x = Rows(on_chunks(side.x.array, (*own.chunks, side.x.array.shape[-1:])))
            places = None if side.places is None or side.rotation is None else _in_blocks(side.places, own)
            grads |= self._of_parameters(side.name, [own, x, places], side.rotation)
            grad = self._from_heads(_to_input, [own, places], side.name, x.array.shape[-1], (side.rotation,))
            grad = _sum_to(grad, self.inputs[source].shape)
            so_far = of_inputs[source]
            of_inputs[source] = grad if so_far is None else so_far + grad.rechunk(so_far.chunks)
        by_name = {name: grads[name] for name in self.parameters}
        return Gradients(of_inputs[0], of_inputs[1], of_inputs[2], *of_heads[3:]), by_name

    def _work(
        self, function: Callable[..., Any], rows: Sequence[Rows | None], name: str, constants: tuple[Any, ...]
    ) -> Work:
        own = [self.parameters.get(f"{name}.{kind}") for kind in ("weight", "bias")]
        inputs = [x.array for x in rows if x is not None] + [x for x in own if x is not None]
        label = f"attention-layer{function.__name__.replace('_', '-')}-"
        label += tokenize([None if x is None else x.array.name for x in rows], [x.name for x in inputs], constants)
        return Work(function, rows, own[0], own[1], self.splits[name], constants, label, inputs)

    def _to_heads(
        self, function: Callable[..., Any], rows: Sequence[Rows | None], name: str, constants: tuple[Any, ...]
    ) -> Any:
        """Return the lazy array (..., heads, L, E) of a function of blocks of rows, and of the parameters of heads."""
        work = self._work(function, rows, name, constants)
        graph: dict[Key, Task] = {}
        for index, h in product(work.indices, range(len(work.heads))):
            key = (work.label, *index[:-1], h, index[-1], 0)
            graph[key] = work.task(key, index, h)
        *batch, lengths = work.chunks
        chunks = (*batch, work.heads, lengths, (self.layer.head_dim,))
        return array(work.label, graph, work.inputs, self.layer.dtype, chunks)

    def _from_heads(
        self, function: Callable[..., Any], rows: Sequence[Rows | None], name: str, size: int,
        constants: tuple[Any, ...] = (),
    ) -> Any:  # fmt: skip
        """Return the lazy array (..., L, size) of a function of blocks of rows, summed over the blocks of heads."""
        work = self._work(function, rows, name, constants)
        graph: dict[Key, Task] = {}
        one = len(work.heads) == 1
        for index in work.indices:
            key = (work.label, *index, 0)
            parts = [key if one else (f"{work.label}-part", *index, h) for h in range(len(work.heads))]
            graph |= {part: work.task(part, index, h) for h, part in enumerate(parts)}
            if not one:
                last = tree(graph, (f"{work.label}-sum", *index), parts, add, FAN)
                graph[key] = Task(key, add, List(TaskRef(last)))
        return array(work.label, graph, work.inputs, self.layer.dtype, (*work.chunks, (size,)))

    def _of_parameters(
        self, name: str, rows: Sequence[Rows | None], rotation: tuple[Rotation, bool] | None = None
    ) -> dict[str, Any]:
        """Return the gradients of the parameters of a projection, in the blocks of heads of the parameters.

        Each block has a matrix, whose last column is the gradient of the bias.
        """
        work = self._work(_to_parameters, rows, name, (rotation,))
        weight, bias, dtype = self.parameters[f"{name}.weight"], self.parameters.get(f"{name}.bias"), self.layer.dtype
        graph: dict[Key, Task] = {}
        weights: dict[Key, Task] = {}
        biases: dict[Key, Task] = {}
        for h in range(len(work.heads)):
            parts = {(work.label, h, *index): index for index in work.indices}
            graph |= {key: work.task(key, index, h) for key, index in parts.items()}
            total = TaskRef(tree(graph, (f"{work.label}-sum", h), list(parts), add, FAN))
            key: Key = (f"{work.label}-weight", *work.place(h))
            weights[key] = Task(key, _weight_of, total)
            if bias is not None and h < len(bias.chunks[0]):
                key = (f"{work.label}-bias", h)
                biases[key] = Task(key, _bias_of, total)
        grads = {f"{name}.weight": array(f"{work.label}-weight", graph | weights, work.inputs, dtype, weight.chunks)}
        if bias is not None:
            grads[f"{name}.bias"] = array(f"{work.label}-bias", graph | biases, work.inputs, dtype, bias.chunks)
        return grads


class Work(NamedTuple):
    """A function of each block of rows and each block of heads."""

    function: Callable[..., Any]
    rows: Sequence[Rows | None]
    weight: Any
    bias: Any
    split: tuple[Chunks, int]  # the blocks of heads, and the axis of the weight that they divide
    constants: tuple[Any, ...]
    label: str
    inputs: list[Any]

    @property
    def heads(self) -> Chunks:
        return self.split[0]

    @property
    def chunks(self) -> tuple[Chunks, ...]:
        """The blocks of batch and rows."""
        assert self.rows[0] is not None
        return self.rows[0].chunks

    @property
    def indices(self) -> list[Index]:
        """Those of the blocks of rows, (*batch, row)."""
        return list(product(*(range(len(c)) for c in self.chunks)))

    def place(self, h: int) -> tuple[int, int]:
        """Return which block of the weight belongs to a block of heads."""
        return (h, 0) if self.split[1] == 0 else (0, h)

    def task(self, key: Key, index: Index, h: int) -> Task:
        """Return the task of a block of rows and a block of heads; a bias that has no heads is that of the first."""
        blocks = [None if x is None else x.block(index, h) for x in self.rows]
        has_bias = self.bias is not None and h < len(self.bias.chunks[0])
        bias = TaskRef((self.bias.name, h)) if has_bias else None
        return Task(key, self.function, *blocks, TaskRef((self.weight.name, *self.place(h))), bias, *self.constants)


def attend(
    layer: Any, query: Any, key: Any, value: Any, padding: Any, cu_seqlens: Any, positions: Any, options: dict[str, Any]
) -> Context:
    """Project the inputs and attend, lazily; see `MultiHeadAttention`."""
    for name, x in (("key_padding_mask", padding), ("positions", positions), ("cu_seqlens", cu_seqlens)):
        if any(map(is_dask, x if isinstance(x, tuple | list) else [x])):
            raise TypeError(f"{name} is needed to build the graph and must be a NumPy array; pass {name}.compute()")
    given = {"query": query, "key": key, "value": value}
    for name, x in given.items():
        if device_meta(x) is not None:
            raise TypeError(f"{name} has blocks on a GPU; the parameters of a layer are on the host, as blocks must be")
    inputs = query, key, value
    empties = headers(given)
    for name, x in given.items():  # the same array is the same header
        first = next(n for n, other in given.items() if other is x)
        empties[name] = empties[first]
    features = layer.embed_dim, layer.kdim, layer.vdim
    q, k, _, batch = check_inputs(empties["query"], empties["key"], empties["value"], features, layer.dtype)
    options["backend"] = layer.backend
    rotation, starts, places = layer._rotation, None, None
    if cu_seqlens is not None:
        if query.ndim != 2:
            raise ValueError(f"query must have shape (tokens, {layer.embed_dim}) with cu_seqlens, got {query.shape}")
        if padding is not None:
            raise ValueError("key_padding_mask must be None with cu_seqlens, where there is no padding")
        starts = as_ints("cu_seqlens", cu_seqlens)
    elif padding is not None:
        hide_padding(options, padding, k.shape[-2])
    if positions is not None and rotation is None:
        raise ValueError("positions must be None for a layer without rotary=")
    if positions is not None:
        rows = (*batch, q.shape[-2]), (*batch, k.shape[-2])
        places = places_of(rotation, positions, *rows, key is None, layer.dtype)
    elif rotation is not None and starts is not None:
        places = packed_places(rotation, len(q), starts, options)
    elif rotation is not None:
        places = default_places(rotation, q.shape[-2], k.shape[-2], batch, options)
    arrays = query, query if key is None else key, (query if key is None else key) if value is None else value
    sides = [_side(n, x, places) for n, x in enumerate(arrays)]
    size = layer.num_heads if _heads.get() is None else _heads.get()
    heads = blocks_of_heads(da.core.normalize_chunks(size, (layer.num_heads,))[0], layer.num_kv_heads)
    return Context(layer, inputs, sides, options, starts, heads)


_heads: ContextVar[int | None] = ContextVar("numba_attention_heads_per_block", default=None)


@contextmanager
def heads_per_block(number: int) -> Iterator[None]:
    """Divide the heads of layers, and their parameters, in the calls inside a ``with`` block.

    Parameters
    ----------
    number : int
        Query heads of a block. With grouped queries, a block contains whole groups or lies inside one.

    Raises
    ------
    TypeError, ValueError
        If the number is no int, or less than 1.

    Notes
    -----
    A task needs the parameters of the heads of one block only, so that none holds those of all heads, and rows are
    projected by several tasks. What the blocks of heads project back is summed, which adds to each position a part for
    each block [1]_. Gradients of parameters are lazy arrays with a chunk for each block.

    References
    ----------
    .. [1] Shoeybi et al., "Megatron-LM", 2019, section 3 (self-attention divided by heads).

    Examples
    --------
    >>> import dask.array as da, numpy as np, numba_attention as na
    >>> layer = na.MultiHeadAttention(64, 8, rng=0)
    >>> x = da.ones((1, 100, 64), chunks=(1, 30, 64), dtype=np.float32)
    >>> with na.dask.heads_per_block(2):
    ...     y, ctx = layer.forward(x)
    >>> _ = layer.backward(y, ctx)
    >>> layer.grads["q_proj.weight"].chunks
    ((16, 16, 16, 16), (64,))
    """
    if isinstance(number, bool) or not isinstance(number, int | np.integer):
        raise TypeError(f"number must be an int, got {type(number).__qualname__}")
    if number < 1:
        raise ValueError(f"number must be at least 1, got {number}")
    token = _heads.set(int(number))
    try:
        yield
    finally:
        _heads.reset(token)


def _side(n: int, x: Any, places: Places | None) -> Side:
    """Return projection n of an input."""
    if places is None or n == 2:
        return Side(INPUTS[n], _whole_features(x), None, None)
    own, along_axes = (places.queries, places.keys)[n], places.along_axes[n]
    of_batch = own.shape[1:-1] if along_axes else own.shape[:-1]
    shape = *np.broadcast_shapes(of_batch, x.shape[:-2]), *x.shape[-2:]
    rows = _whole_features(x if shape == x.shape else _broadcast(x, shape))
    lazy = _in_blocks(Rows(own, int(along_axes), features=0), rows)
    return Side(INPUTS[n], rows, lazy, (places.rotation, along_axes))


def _whole_features(x: Any) -> Rows:
    chunks = x.chunks if is_dask(x) else tuple((n,) for n in x.shape)
    return Rows(on_chunks(x, (*chunks[:-1], x.shape[-1:])))


def _broadcast(x: Any, shape: tuple[int, ...]) -> Any:
    return da.broadcast_to(x if is_dask(x) else da.from_array(x, chunks=-1), shape)


def _in_blocks(places: Rows, rows: Rows) -> Rows:
    """Return places on the blocks of rows; they are broadcast along axes of size 1."""
    x = places.array
    if x.shape[-1] == 1 != sum(rows.chunks[-1]):
        x = da.broadcast_to(x, (*x.shape[:-1], sum(rows.chunks[-1])))
    front = ((3,),) * places.front
    own = rows.chunks[len(rows.chunks) - (x.ndim - places.front) :]
    return places._replace(array=on_chunks(x, (*front, *own)))


def _sum_to(x: Any, shape: tuple[int, ...]) -> Any:
    """Sum a lazy array over the axes along which an input of this shape was broadcast."""
    extra = x.ndim - len(shape)
    axes = tuple(n for n in range(x.ndim) if n < extra or shape[n - extra] == 1 != x.shape[n])
    return x.sum(axis=axes, keepdims=True)[(0,) * extra] if axes else x


# What tasks compute.


def _project(x: Array, places: Any, weight: Array, bias: Any, rotation: Any, E: int) -> Array:
    """(..., L, D) -> (..., heads, L, E)."""
    with kernel_threads(None):
        y = linear(x, weight, bias)
        heads = y.reshape(*y.shape[:-1], len(weight) // E, E).swapaxes(-3, -2)
        return heads if rotation is None else turned(heads, _turn(places, rotation, x.dtype))


def _project_back(heads: Array, weight: Array, bias: Any) -> Array:
    """(..., H, L, E) -> (..., L, D)."""
    with kernel_threads(None):
        return linear(_joined(heads), weight, bias)


def _back_to_heads(grad: Array, weight: Array, bias: Any, E: int) -> Array:
    """Return the gradient of the heads, (..., H, L, E), by that of the result."""
    return _project(grad, None, weight.T, None, None, E)


def _to_input(grad: Array, places: Any, weight: Array, bias: Any, rotation: Any) -> Array:
    """Return the gradient of the input of a projection, (..., L, D), by that of its heads."""
    with kernel_threads(None):
        return linear(_joined(_turned_back(grad, places, rotation)), weight.T)


def _to_parameters(grad: Array, x: Array, places: Any, weight: Array, bias: Any, rotation: Any) -> Array:
    """Return the gradients of a weight and, in the last column, of its bias."""
    grad = _joined(_turned_back(grad, places, rotation)) if grad.ndim == x.ndim + 1 else grad
    x = x if x.ndim == grad.ndim else _joined(x)
    with kernel_threads(None):
        _, of_weight, of_bias = linear_backward(grad, without_idle_rows(x, grad), weight, need_input=False)
    assert of_bias is not None
    return np.concatenate([of_weight, of_bias[:, None]], axis=1)


def _weight_of(total: Array) -> Array:
    return np.ascontiguousarray(total[:, :-1])


def _bias_of(total: Array) -> Array:
    return total[:, -1].copy()


def _turned_back(grad: Array, places: Any, rotation: Any) -> Array:
    if rotation is None:
        return grad
    result = np.empty_like(grad)
    rotate(grad, _turn(places, rotation, grad.dtype).back(), result)
    return result


def _turn(places: Array, rotation: tuple[Rotation, bool], dtype: Any) -> Turn:
    return turn_at(rotation[0], places, rotation[1], dtype)


def _joined(heads: Array) -> Array:
    """(..., heads, L, E) -> (..., L, heads * E)."""
    return as_features(heads.swapaxes(-3, -2))


__all__ = ["Context", "attend", "heads_per_block"]
