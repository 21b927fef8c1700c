"""The ONNX operators Attention (opset 23 to 25) and RotaryEmbedding: functions of arrays, and ops for its evaluator.

``onnx.reference.ReferenceEvaluator(model, new_ops=numba_attention.onnx.ops)`` runs a model with the kernels of this
package. The functions need no onnx.
"""

from __future__ import annotations  # short types in help()

from typing import Any, NamedTuple

import numpy as np
from numpy.typing import ArrayLike

from .api import attention as _attention
from .api import attention_weights
from .errors import kind_of
from .options import Array
from .rotary import Turn, rotate
from .validation import (
    advice_for,
    as_array,
    as_floats,
    as_ints,
    as_ndarray,
    as_real,
    as_size,
    broadcast_to,
    indices_within,
    is_supported,
    lengths_within,
)

_DOUBLE = 11  # the number of float64 in TensorProto
_PRECISIONS = {0: "UNDEFINED", 1: "FLOAT", 10: "FLOAT16", _DOUBLE: "DOUBLE", 16: "BFLOAT16"}
_PROBABILITIES = 3  # of the modes of qk_matmul_output


class Outputs(NamedTuple):
    """The outputs of the operator Attention, in its order."""

    Y: Array
    present_key: Array
    present_value: Array
    qk_matmul_output: Array | None


def attention(
    Q: Array,
    K: Array,
    V: Array,
    attn_mask: Array | None = None,
    past_key: Array | None = None,
    past_value: Array | None = None,
    nonpad_kv_seqlen: ArrayLike | None = None,
    *,
    is_causal: int | bool = 0,
    kv_num_heads: int | None = None,
    left_window_size: int = -1,
    q_num_heads: int | None = None,
    qk_matmul_output_mode: int | None = None,
    right_window_size: int = -1,
    scale: float | None = None,
    softcap: float = 0.0,
    softmax_precision: int | None = None,
    backend: str | None = None,
) -> Outputs:
    r"""Compute the ONNX operator Attention, of opset 25 and those before.

    Parameters
    ----------
    Q : ndarray, shape (batch, q_num_heads, L, E) or (batch, L, q_num_heads * E)
        float32, float64, float16 or ``ml_dtypes.bfloat16``.
    K, V : ndarray, shape (batch, kv_num_heads, S, E or Ev) or (batch, S, kv_num_heads * (E or Ev))
        Keys and values; V may have another dtype than Q and K.
    attn_mask : ndarray, broadcastable to (batch, q_num_heads, L, past + S), optional
        True where a query may attend to a key, or numbers that are added to the scores. Keys past its last column are
        hidden.
    past_key, past_value : ndarray, shape (batch, kv_num_heads, past, E or Ev), optional
        Keys and values that come before K and V.
    nonpad_kv_seqlen : array of int, shape (batch,), optional
        How many keys of each sequence are valid, in a cache that the caller keeps outside; not with `past_key`.
    is_causal : bool, default False
        Query i sees the keys up to ``i + offset``, where `offset` is the number of past keys, or
        ``nonpad_kv_seqlen - L``, or 0.
    kv_num_heads, q_num_heads : int, optional
        Heads, for inputs with three axes.
    left_window_size, right_window_size : int, default -1
        How far a query sees from its position, ``i + offset``; -1 is without bound.
    qk_matmul_output_mode : {0, 1, 2, 3}, optional
        Return a matrix (L, past + S) for each head as the fourth output: scaled products of queries and keys, these
        after softcap, these with mask and bias added, or probabilities. None, the default, returns none.
    scale : float, optional
        By default ``1 / sqrt(E)``.
    softcap : float, default 0
        ``softcap * tanh(score / softcap)``; 0 is none.
    softmax_precision : int, optional
        A type of TensorProto. Softmax and sums are float32 or float64 whatever it is; DOUBLE (11) makes them float64.
    backend : str, optional
        As in `numba_attention.attention`.

    Returns
    -------
    Outputs
        Named tuple (Y, present_key, present_value, qk_matmul_output). `Y` has the axes of `Q`; the present keys and
        values are (batch, heads, past + S, features).

    Raises
    ------
    TypeError, ValueError
        An argument has the wrong type or shape, or does not fit the others.

    Notes
    -----
    Memory is linear in L and S unless a matrix of scores is asked for. A row that may attend to nothing is 0.

    References
    ----------
    .. [1] ONNX operators, "Attention", https://onnx.ai/onnx/operators/onnx__Attention.html.

    Examples
    --------
    >>> import numpy as np, numba_attention.onnx as nao
    >>> Q = np.random.default_rng(0).standard_normal((1, 5, 8), dtype=np.float32)
    >>> nao.attention(Q, Q, Q, q_num_heads=2, kv_num_heads=2, is_causal=1).Y.shape
    (1, 5, 8)
    """
    query, flat = _with_heads("Q", Q, "q_num_heads", q_num_heads)
    key, _ = _with_heads("K", K, "kv_num_heads", kv_num_heads)
    value, _ = _with_heads("V", V, "kv_num_heads", kv_num_heads)
    if not Q.ndim == K.ndim == V.ndim:
        raise ValueError(f"Q, K and V must have as many axes, got {Q.ndim}, {K.ndim} and {V.ndim}")
    _check_shapes(query, key, value)
    if (past_key is None) != (past_value is None):
        raise ValueError("past_key and past_value must be given together")
    if past_key is not None and nonpad_kv_seqlen is not None:
        raise ValueError("nonpad_kv_seqlen must be None with past_key")
    new = key.shape[2]
    key, value = _joined("past_key", past_key, key), _joined("past_value", past_value, value)
    if key.shape[2] != value.shape[2]:
        old = (present.shape[2] - new for present in (key, value))
        raise ValueError("past_value must be as long as past_key, {}, got {}".format(*old))
    present = key, value
    (B,), (_, _, L, _) = np.broadcast_shapes(query.shape[:1], key.shape[:1], value.shape[:1]), query.shape
    S, dtype = key.shape[2], query.dtype
    wide = _wide(query, key, value, softmax_precision)
    query, key, value = (x.astype(wide, copy=False) for x in (query, key, value))
    cap = 0.0 if softcap is None else as_real("softcap", softcap)
    options: dict[str, Any] = {
        "is_causal": _flag("is_causal", is_causal),
        "scale": scale,
        "softcap": cap if cap > 0 else None,
        "window": _window(left_window_size, right_window_size),
        "backend": backend,
    }
    if attn_mask is not None:
        mask = _padded(attn_mask, (B, query.shape[1], L, S))
        options["mask" if mask.dtype == np.bool_ else "bias"] = mask
    if nonpad_kv_seqlen is not None:
        given = as_ints("nonpad_kv_seqlen", nonpad_kv_seqlen).reshape(-1)
        lengths = lengths_within("nonpad_kv_seqlen", given, S, (B,))
        options |= {"key_lengths": lengths, "query_offset": lengths - L}
    elif past_key is not None:
        options["query_offset"] = np.asarray(past_key).shape[2]
    Y: Any
    if flat:  # written with heads beside each other, so that joining them takes no copy
        heads = np.empty((B, L, query.shape[1], value.shape[3]), wide)
        _attention(query, key, value, out=heads.swapaxes(1, 2), **options)
        Y = heads.reshape(B, L, heads.shape[2] * heads.shape[3])
    else:
        Y = _attention(query, key, value, **options)
    qk = None
    if qk_matmul_output_mode is not None:
        qk = _scores(query, key, qk_matmul_output_mode, options).astype(dtype, copy=False)
    return Outputs(Y.astype(dtype, copy=False), *present, qk)


def rotary_embedding(
    X: Array,
    cos_cache: Array,
    sin_cache: Array,
    position_ids: ArrayLike | None = None,
    *,
    interleaved: int | bool = 0,
    num_heads: int = 0,
    rotary_embedding_dim: int = 0,
) -> Array:
    """Compute the ONNX operator RotaryEmbedding.

    Parameters
    ----------
    X : ndarray, shape (batch, heads, L, E) or (batch, L, heads * E)
    cos_cache, sin_cache : ndarray, shape (positions, dim / 2), or (batch, L, dim / 2) without `position_ids`
        Cosines and sines of the angle of each pair of features.
    position_ids : array of int, shape (batch, L), optional
        Rows of the caches.
    interleaved : bool, default False
        Whether pairs are neighbours, or are half of the features apart.
    num_heads : int, optional
        Heads, where X has three axes.
    rotary_embedding_dim : int, optional
        Features that are rotated, by default all.

    Returns
    -------
    ndarray
        Shape and dtype of `X`.

    Raises
    ------
    TypeError, ValueError
        An argument has the wrong type or shape, or does not fit the others.

    References
    ----------
    .. [1] ONNX operators, "RotaryEmbedding", https://onnx.ai/onnx/operators/onnx__RotaryEmbedding.html.

    Examples
    --------
    >>> import numpy as np, numba_attention.onnx as nao
    >>> X = np.ones((1, 2, 3, 4), np.float32)
    >>> angles = np.arange(3, dtype=np.float32)[:, None] * [1, 0.1]
    >>> nao.rotary_embedding(X, np.cos(angles), np.sin(angles), np.arange(3)[None]).shape
    (1, 2, 3, 4)
    """
    x, _ = _with_heads("X", X, "num_heads", num_heads)
    dim = x.shape[3] if _is_zero(rotary_embedding_dim) else as_size("rotary_embedding_dim", rotary_embedding_dim)
    if dim % 2 or dim > x.shape[3]:
        raise ValueError(
            f"rotary_embedding_dim must be even and at most the {x.shape[3]} features of X, or 0 for all if they are "
            f"even, got {rotary_embedding_dim}"
        )
    half = dim // 2
    wide = np.dtype(np.float64 if x.dtype == np.float64 else np.float32)
    tables: list[Array] = []
    for name, array in (("cos_cache", cos_cache), ("sin_cache", sin_cache)):
        table = as_floats(name, as_ndarray(name, array))
        if position_ids is not None:
            places = indices_within("position_ids", position_ids, table.shape[0] if table.ndim else 0)
            if places.shape != (x.shape[0], x.shape[2]):
                raise ValueError(f"position_ids must have shape {(x.shape[0], x.shape[2])}, got {places.shape}")
            table = table[places]
        if table.shape != (x.shape[0], x.shape[2], half):
            raise ValueError(
                f"{name} must have a row of {half} numbers for each of {x.shape[:1] + x.shape[2:3]} positions, half of "
                f"the {dim} features that are rotated, got shape {np.shape(array)}"
            )
        tables.append(table.astype(wide)[:, None])
    cos, sin = tables
    turn = Turn.of_pairs(cos, sin, _flag("interleaved", interleaved), wide)
    if np.ndim(X) == 4:
        result = np.empty_like(x)
        rotate(x, turn, result)
        return result
    joined = np.empty_like(X, order="C")
    rotate(x, turn, _with_heads("X", joined, "num_heads", num_heads)[0])
    return joined


def _with_heads(name: str, x: Any, name_of_heads: str, heads: int | None) -> tuple[Array, bool]:
    """Return x as (batch, heads, length, features), and whether the heads were side by side."""
    x = as_ndarray(name, x)
    if not is_supported(x.dtype):
        raise TypeError(
            f"{name} must have dtype float32, float64, float16 or ml_dtypes.bfloat16 in native byte order, "
            f"got {x.dtype}; {advice_for(name, x.dtype)}"
        )
    if x.ndim == 4:
        return x, False
    if x.ndim != 3:
        raise ValueError(f"{name} must have three or four axes, got shape {x.shape}")
    if heads is None or _is_zero(heads) or x.shape[2] % (heads := as_size(name_of_heads, heads)):
        raise ValueError(f"{name_of_heads} must divide the {x.shape[2]} features of {name}, got {heads}")
    return x.reshape(*x.shape[:2], heads, x.shape[2] // heads).swapaxes(1, 2), True


def _check_shapes(query: Array, key: Array, value: Array) -> None:
    """Check shapes in the words of the operator: `numba_attention.attention` would name its own arguments."""
    heads, size = query.shape[1], query.shape[3]
    of_keys, S = key.shape[1:3]
    if key.shape[3] != size:
        raise ValueError(f"K must have as many features in a head as Q, {size}, got {key.shape[3]}")
    if value.shape[1:3] != (of_keys, S):
        raise ValueError(f"V must have as many heads and keys as K, {(of_keys, S)}, got {value.shape[1:3]}")
    if heads != of_keys and (not of_keys or heads % of_keys):
        raise ValueError(f"K must have a number of heads that divides those of Q, {heads}, got {of_keys}")
    sizes = len(query), len(key), len(value)
    if len({size for size in sizes if size != 1}) > 1:
        raise ValueError("Q, K and V must have one batch size, got {}, {} and {}".format(*sizes))


def _is_zero(x: Any) -> bool:
    """Whether an attribute is 0, which stands for an attribute that is not there."""
    return isinstance(x, int | np.integer) and not isinstance(x, bool) and x == 0


def _flag(name: str, x: Any) -> bool:
    """Check an attribute that is an integer and means a truth value."""
    if not isinstance(x, bool | np.bool_ | int | np.integer):
        raise TypeError(f"{name} must be 0 or 1, got {kind_of(x)}")
    return bool(x)


def _joined(name: str, past: Any, new: Array) -> Array:
    if past is None:
        return new
    past = as_ndarray(name, past)
    if past.ndim != 4 or (*past.shape[:2], past.shape[3]) != (*new.shape[:2], new.shape[3]):
        raise ValueError(
            f"{name} must have shape ({new.shape[0]}, {new.shape[1]}, past, {new.shape[3]}), got {past.shape}"
        )
    return np.concatenate([past, new], axis=2)


def _wide(query: Array, key: Array, value: Array, precision: int | None) -> np.dtype[Any]:
    """Return the dtype to compute in: that of the inputs if they share one that is precise enough."""
    if precision is not None and (not isinstance(precision, int | np.integer) or precision not in _PRECISIONS):
        known = ", ".join(f"{number} ({name})" for number, name in _PRECISIONS.items())
        raise ValueError(f"softmax_precision must be one of {known}, got {precision!r}")
    if precision == _DOUBLE or np.float64 in (query.dtype, key.dtype, value.dtype):
        return np.dtype(np.float64)
    if query.dtype == key.dtype == value.dtype:
        shared: np.dtype[Any] = query.dtype
        return shared
    return np.dtype(np.float32)


def _window(left: int | None, right: int | None) -> tuple[int | None, int | None] | None:
    sizes = []
    for name, size in (("left_window_size", left), ("right_window_size", right)):
        if size is not None and (isinstance(size, bool) or not isinstance(size, int | np.integer)):
            raise TypeError(f"{name} must be an integer, got {kind_of(size)}")
        if size is not None and size < -1:
            raise ValueError(f"{name} must be -1 or not negative, got {size}")
        sizes.append(None if size is None or size < 0 else int(size))
    return None if sizes == [None, None] else (sizes[0], sizes[1])


def _padded(mask: Any, shape: tuple[int, ...]) -> Array:
    """Hide the keys past the last column of a mask; integers are added as numbers."""
    array = as_array("attn_mask", mask)
    if array.dtype.kind in "iu":
        array = array.astype(np.float32)
    if array.dtype != np.bool_:
        array = as_floats("attn_mask", array)
    missing = shape[-1] - array.shape[-1] if array.ndim else 0
    if missing > 0:
        hidden = np.full((*array.shape[:-1], missing), False if array.dtype == np.bool_ else -np.inf, array.dtype)
        array = np.concatenate([array, hidden], axis=-1)
    broadcast_to("attn_mask", array, shape)
    return array


def _scores(query: Array, key: Array, mode: int, options: dict[str, Any]) -> Array:
    """Return the matrix of scores of each head, at one stage of the operator."""
    if mode == _PROBABILITIES:
        return attention_weights(query, key, **options)
    if mode not in (0, 1, 2):
        raise ValueError(f"qk_matmul_output_mode must be 0, 1, 2 or 3, got {mode}")
    wide = np.dtype(np.float64 if query.dtype == np.float64 else np.float32)
    scale = query.shape[-1] ** -0.5 if options["scale"] is None else options["scale"]
    (B, H, L, _), S = query.shape, key.shape[2]
    repeated = np.repeat(key.astype(wide), H // key.shape[1], axis=1)
    with np.errstate(all="ignore"):  # infinities and NaNs in the input are no error
        scores: Array = np.matmul(query.astype(wide) * wide.type(scale), repeated.swapaxes(2, 3))
        cap = options["softcap"]
        if mode >= 1 and cap is not None:
            scores = cap * np.tanh(scores / cap)
        if mode == 2:
            bias = options.get("bias")
            scores = scores + (0 if bias is None else bias.astype(wide))
            scores = np.where(_visible(B, L, S, options) & options.get("mask", True), scores, -np.inf)
    return scores


def _visible(B: int, L: int, S: int, options: dict[str, Any]) -> Array:
    """Return what causality, window and lengths let a query see, as a matrix (batch, 1, L, S)."""
    i, j = np.arange(L)[:, None], np.arange(S)
    position = i + np.broadcast_to(options.get("query_offset", 0), (B,))[:, None, None, None]
    left, right = options["window"] or (None, None)
    visible = np.broadcast_to(j < np.reshape(options.get("key_lengths", S), (-1, 1, 1, 1)), (B, 1, L, S))
    if options["is_causal"]:
        right = 0
    if left is not None:
        visible = visible & (position - j <= left)
    if right is not None:
        visible = visible & (j - position <= right)
    return visible


def __getattr__(name: str) -> Any:
    """Make the classes of the operators when they are asked for: they need onnx."""
    if name not in ("ops", "Attention", "RotaryEmbedding"):
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    try:
        from onnx.reference.op_run import OpRun
    except ImportError as error:
        raise ImportError(f"numba_attention.onnx.{name} needs onnx: pip install 'numba-attention[onnx]'") from error

    class Attention(OpRun):
        op_domain = ""

        def _run(self, *inputs: Any, qk_matmul_output_mode: int | None = None, **attributes: Any) -> tuple[Any, ...]:
            count = len(self.onnx_node.output)
            mode = (qk_matmul_output_mode or 0) if count == 4 and self.onnx_node.output[3] else None
            given = {name: x for name, x in attributes.items() if x is not None}
            return attention(*inputs, qk_matmul_output_mode=mode, **given)[:count]

    class RotaryEmbedding(OpRun):
        op_domain = ""

        def _run(self, *inputs: Any, **attributes: Any) -> tuple[Array]:
            return (rotary_embedding(*inputs, **{name: x for name, x in attributes.items() if x is not None}),)

    globals().update(Attention=Attention, RotaryEmbedding=RotaryEmbedding, ops=[Attention, RotaryEmbedding])
    return globals()[name]


__all__ = ["Attention", "Outputs", "RotaryEmbedding", "attention", "ops", "rotary_embedding"]  # noqa: F822
