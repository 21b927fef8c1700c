"""Rotary position embeddings: pairs of features are rotated by an angle that is proportional to the position."""

import math
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import ArrayLike

from .frequencies import Frequencies, Scaling, scaled
from .options import Array
from .validation import as_array, as_ndarray, as_real, check_out, is_supported

_F32, _F64 = np.dtype(np.float32), np.dtype(np.float64)


class Rotation(NamedTuple):
    """How much each pair of features turns with the position, and which features are pairs."""

    frequencies: Frequencies
    interleaved: bool

    def of_length(self, *positions: Array) -> "Rotation":
        """Return the rotation for sequences that reach to the last of these positions."""
        own = self.frequencies
        if own.beyond is None:
            return self
        length = max((float(x.max()) + 1 for x in positions if x.size), default=0.0)
        return self._replace(frequencies=own._replace(frequencies=own.of_length(length), beyond=None))

    def turn(self, positions: Array, dtype: np.dtype[Any], along_axes: bool = False) -> "Turn":
        """Return the turn at each position (...), for arrays of this dtype.

        With `along_axes`, positions are (3, ...), and each pair turns with that of its axis.
        """
        own = self.of_length(positions).frequencies
        frequencies, positions = own.frequencies, positions.astype(np.float64, copy=False)
        # Angles are float64 for all arrays: at position 100,000 a float32 angle is off by up to 0.004.
        if along_axes:
            angles = np.moveaxis(positions[own.axes], 0, -1) * frequencies
        else:
            angles = positions[..., None] * frequencies
        cos, sin = np.cos(angles), np.sin(angles)
        if own.attention_factor != 1:
            cos, sin = cos * own.attention_factor, sin * own.attention_factor
        return Turn.of_pairs(cos, sin, self.interleaved, dtype)


class Turn(NamedTuple):
    """The rotation for every position (...), which `rotate` applies as ``x * cos + partner(x) * sin``."""

    cos: Array  # float32 or float64 (..., dim)
    sin: Array  # negative for the first feature of each pair
    interleaved: bool

    @classmethod
    def of_pairs(cls, cos: Array, sin: Array, interleaved: bool, dtype: Any = _F32) -> "Turn":
        """Return the turn for the cosine and sine of every pair, (..., dim / 2), for arrays of this dtype."""
        table = np.empty((2, *cos.shape[:-1], 2 * cos.shape[-1]), dtype if dtype in (_F32, _F64) else _F32)
        first, second = _pairs(table.shape[-1], interleaved)
        table[0, ..., first] = table[0, ..., second] = cos
        table[1, ..., second] = sin
        np.negative(table[1, ..., second], out=table[1, ..., first])
        return cls(table[0], table[1], interleaved)

    def back(self) -> "Turn":
        """Return the rotation of gradients: the transposed one, which is the inverse but for the attention factor."""
        return self._replace(sin=-self.sin)


def apply_rotary(
    x: Array,
    positions: ArrayLike,
    *,
    base: float = 10000.0,
    dim: int | None = None,
    interleaved: bool = False,
    scaling: Scaling | None = None,
    out: Array | None = None,
) -> Array:
    r"""Rotate pairs of features by an angle proportional to the position: rotary position embedding.

    Parameters
    ----------
    x : ndarray, shape (..., L, E)
        Queries or keys, in float32, float64, float16 or ``ml_dtypes.bfloat16``. Any strides.
    positions : array of int or float, broadcastable to (..., L)
        Position of each row: typically ``numpy.arange(L)``, plus the number of keys in a cache if there is one. For
        x of shape (B, H, L, E), positions that differ between sequences have shape (B, 1, L). With a scaling that has
        ``mrope_section``, also (3, ..., L), with as many axes behind the first as `x` has rows: time, height and width.
    base : float, default 10000
        Pair i is rotated by ``base ** (-2 * i / dim)`` radians from one position to the next.
    dim : int, optional
        How many leading features are rotated, an even number; the others are copied. By default all E features.
    interleaved : bool, default False
        Which features are pairs: i and ``i + dim // 2`` as in GPT-NeoX and Llama checkpoints converted for
        Transformers, or with True ``2 * i`` and ``2 * i + 1`` as in the paper, GPT-J and Meta's own checkpoints.
    scaling : float or dict, optional
        For sequences that are longer than those of the training. A factor divides the positions; a dict is what configs
        of models have as ``rope_scaling`` or ``rope_parameters``, with its ``type`` or ``rope_type``: "linear", "ntk",
        "dynamic", "llama3", "yarn", "longrope", "mrope" or "default", with the keys that the kind needs (a message says
        which). ``{"frequencies": ..., "attention_factor": 1.0}`` has the angles themselves, one for each pair.
    out : ndarray, shape (..., L, E), optional
        Array for the result, in the dtype of `x`. It may be `x` itself.

    Returns
    -------
    ndarray, shape (..., L, E)
        dtype of `x`; `out` if that was given.

    Raises
    ------
    TypeError, ValueError
        An argument has the wrong type, dtype or shape, or is out of range; the message names it.

    See Also
    --------
    MultiHeadAttention : takes these options as `rotary` and rotates its queries and keys.

    Notes
    -----
    With ``theta_i = position * base ** (-2 * i / dim)``, the pair (a, b) becomes
    ``(a cos(theta_i) - b sin(theta_i), b cos(theta_i) + a sin(theta_i))``. Products of a rotated query with a rotated
    key depend on the difference of their positions only. Angles are computed in float64, the rotation in the precision
    of `x`, that of half types in float32. The inverse, and the derivative, is the rotation by ``-positions``. Memory
    besides the result: the cosines and sines of the positions, and a few MB.

    References
    ----------
    .. [1] Su et al., "RoFormer: Enhanced Transformer with Rotary Position Embedding", 2021, section 3.2.2.
    .. [2] Chen et al., "Extending Context Window of Large Language Models via Positional Interpolation", 2023,
       section 2.2 (linear scaling).
    .. [3] bloc97, "NTK-Aware Scaled RoPE", r/LocalLLaMA, 2023.
    .. [4] Peng et al., "YaRN: Efficient Context Window Extension of Large Language Models", 2023.
    .. [5] Ding et al., "LongRoPE: Extending LLM Context Window Beyond 2 Million Tokens", 2024.
    .. [6] Wang et al., "Qwen2-VL", 2024, section 2.1 (multimodal rotary embedding, mrope).

    Examples
    --------
    >>> import numpy as np, numba_attention as na
    >>> rng = np.random.default_rng(0)
    >>> q, k = rng.standard_normal((2, 1, 8))
    >>> early = na.apply_rotary(q, 3) @ na.apply_rotary(k, 1).T
    >>> late = na.apply_rotary(q, 1003) @ na.apply_rotary(k, 1001).T
    >>> bool(np.allclose(early, late))
    True
    >>> x = rng.standard_normal((2, 4, 10, 64), dtype=np.float32)
    >>> turned = na.apply_rotary(x, np.arange(10))
    >>> bool(np.allclose(na.apply_rotary(turned, -np.arange(10), out=turned), x, atol=1e-6))
    True
    """
    x = _features(x)
    resolved = rotation(x.shape[-1], base=base, dim=dim, interleaved=interleaved, scaling=scaling)
    turn = resolved.turn(*check_positions(positions, x.shape[:-1], resolved, x.dtype))
    if out is None:
        out = np.empty_like(x)  # same memory layout as x, so that rows are read and written in the same order
        rotate(x, turn, out)
        return out
    target = check_out(out, x.shape, x.dtype, {}, of="x")
    if np.may_share_memory(target, x) and not _same_elements(target, x):
        x = x.copy()  # x overlaps out: as in NumPy's functions, the result is that of the input before writing
    rotate(x, turn, target)
    return out


def rotation(
    features: int,
    *,
    base: float = 10000.0,
    dim: int | None = None,
    interleaved: bool = False,
    scaling: Scaling | None = None,
) -> Rotation:
    """Check the options of `apply_rotary` for arrays with `features` features, and resolve them."""
    base = _positive("base", base)
    if dim is None:
        dim = features
        if dim < 2 or dim % 2:
            raise ValueError(f"dim must be given, an even number, where the number of features is {features}")
    elif isinstance(dim, bool | np.bool_) or not isinstance(dim, int | np.integer):
        raise TypeError(f"dim must be an integer, got {dim!r}")
    elif dim < 2 or dim % 2 or dim > features:
        raise ValueError(f"dim must be even and between 2 and the number of features, {features}, got {dim}")
    if not isinstance(interleaved, bool | np.bool_):
        raise TypeError(f"interleaved must be True or False, got {interleaved!r}")
    return Rotation(scaled(scaling, base, dim), bool(interleaved))


def rotate(x: Array, turn: Turn, out: Array) -> None:
    """Write the rotated x (..., L, E) to `out`, which is x itself or does not overlap it."""
    dim, L = turn.cos.shape[-1], x.shape[-2]
    first, second = _pairs(dim, turn.interleaved)
    cos, sin = (np.broadcast_to(part, (*x.shape[:-1], dim)) for part in (turn.cos, turn.sin))
    heads = math.prod(x.shape[:-2])
    block = max(1, _IN_CACHE // max(1, heads * dim))
    scratch = np.empty((2, *x.shape[:-2], min(block, L), dim), cos.dtype)
    with np.errstate(all="ignore"):  # infinities and NaNs in the input are no error
        for start in range(0, L, block):
            rows = slice(start, start + block)
            features = x[..., rows, :dim].astype(cos.dtype, copy=False)
            own, partners = scratch[..., : features.shape[-2], :]
            np.multiply(features, cos[..., rows, :], out=own)
            np.multiply(features[..., second], sin[..., rows, first], out=partners[..., first])
            np.multiply(features[..., first], sin[..., rows, second], out=partners[..., second])
            # Written last, because `out` may be x, and these rows are not read after this. "unsafe" allows rounding
            # float32 to a half type.
            np.add(own, partners, out=out[..., rows, :dim], casting="unsafe")
    if dim < x.shape[-1] and not _same_elements(out, x):
        out[..., dim:] = x[..., dim:]


# Elements of each temporary array, which then stays in the cache: 12 heads x 4096 positions x 64 features take 3 ms
# instead of 5, and memory is constant.
_IN_CACHE = 2**18


def _pairs(dim: int, interleaved: bool) -> tuple[slice, slice]:
    """Return slices of the first and of the second feature of every pair."""
    if interleaved:
        return slice(0, dim, 2), slice(1, dim, 2)
    return slice(0, dim // 2), slice(dim // 2, dim)


def _features(x: Any) -> Array:
    x = as_ndarray("x", x)
    if not is_supported(x.dtype):
        raise TypeError(f"x must be native float32, float64, float16 or ml_dtypes.bfloat16, got {x.dtype}")
    if x.ndim < 2:
        raise ValueError(f"x must have shape (..., length, features), got {x.shape}")
    result: Array = x
    return result


def check_positions(
    positions: Any, rows: tuple[int, ...], of: Rotation, dtype: np.dtype[Any]
) -> tuple[Array, np.dtype[Any], bool]:
    """Check positions of rows; return what `Rotation.turn` takes: positions, the dtype, and whether they are three."""
    array = as_array("positions", positions)
    if array.dtype.kind not in "iuf":
        raise TypeError(f"positions must be integers or floating point, got {array.dtype}")
    if array.dtype.kind == "f" and not np.isfinite(array).all():
        raise ValueError("positions must be finite")
    along_axes = of.frequencies.axes is not None and array.ndim == len(rows) + 1 and array.shape[0] == 3
    try:
        np.broadcast_to(array[0] if along_axes else array, rows)
    except ValueError:
        raise ValueError(f"positions of shape {array.shape} does not broadcast to {rows}, the rows of x") from None
    return array, dtype, along_axes


def _same_elements(a: Array, b: Array) -> bool:
    """Whether two arrays of one shape and dtype occupy the same memory."""
    return a.strides == b.strides and a.ctypes.data == b.ctypes.data


def _positive(name: str, x: Any) -> float:
    number = as_real(name, x)
    if number <= 0:
        raise ValueError(f"{name} must be positive and finite, got {number}")
    return number


__all__ = ["apply_rotary"]
