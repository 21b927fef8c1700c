"""Checks of arguments, whose messages name the argument and say what was expected and how to convert it."""

import math
import operator
from collections.abc import Sequence
from functools import cache
from typing import Any

import numpy as np
from numpy.typing import DTypeLike

from .device.arrays import on_device
from .errors import is_masked, kind_of
from .foreign import how_to_convert
from .intervals import FAR as UNBOUNDED
from .narrowing import largest_computed
from .options import Array, Options

_F32, _F64, _F16 = np.dtype(np.float32), np.dtype(np.float64), np.dtype(np.float16)
FAR = 2**40  # largest position or length: no sum of positions then overflows


@cache  # NumPy computes the name of a dtype at each access, which takes 2 us
def is_bfloat16(dtype: np.dtype[Any]) -> bool:
    """Recognise ``ml_dtypes.bfloat16`` without importing ml_dtypes."""
    return dtype.name == "bfloat16"


def is_supported(dtype: np.dtype[Any]) -> bool:
    # Identity is compared first: it holds for every array in native byte order, and comparing dtypes takes longer.
    if dtype is _F32 or dtype is _F64 or dtype is _F16:
        return True
    return dtype.isnative and (dtype in (_F32, _F64, _F16) or is_bfloat16(dtype))


def as_ndarray(name: str, x: Any) -> Array:
    """Check that x is an array, without converting anything else to one, and return a plain `numpy.ndarray` view.

    Subclasses in which operations mean something else are refused. For others (`numpy.memmap`, arrays with units), the
    view switches off the protocols ``__array_function__`` and ``__array_ufunc__``, which would run their code in the
    middle of a call.
    """
    if type(x) is np.ndarray:
        return x
    if is_masked(x):
        raise TypeError(
            f"{name} must be a numpy.ndarray, got {kind_of(x)}, a masked array whose mask would be lost; "
            "pass its .data and say what may be attended to with mask="
        )
    if not isinstance(x, np.ndarray) or isinstance(x, np.matrix):
        refuse_on_device(name, x)
        raise TypeError(f"{name} must be a numpy.ndarray, got {kind_of(x)}; convert it with {how_to_convert(name, x)}")
    return np.asarray(x)


def as_tensor(name: str, array: Any) -> Array:
    """Check one of query, key, value and give it a head axis."""
    if type(array) is not np.ndarray:
        array = as_ndarray(name, array)
    if not is_supported(array.dtype):
        raise TypeError(
            f"{name} must have dtype float32, float64, float16 or ml_dtypes.bfloat16 in native byte order, "
            f"got {array.dtype}; {advice_for(name, array.dtype)}"
        )
    if array.ndim < 3:
        if array.ndim < 2:
            raise ValueError(f"{name} must have shape (..., heads, length, features), got {array.shape}")
        array = array[None]
    result: Array = array
    return result


def refuse_on_device(name: str, x: Any) -> None:
    """Raise an error for an array on a GPU where one on the host was expected, which says what to do about it."""
    if on_device(x):
        raise TypeError(
            f"{name} is on a GPU ({kind_of(x)}), and this call runs on the host; copy it there, or use backend='cuda'"
        )


def advice_for(name: str, dtype: np.dtype[Any]) -> str:
    if not dtype.isnative and dtype.kind in "iufc":
        return f"convert it to native byte order with {name}.astype({name}.dtype.newbyteorder('='))"
    if dtype.kind == "c":
        return "complex attention is not defined here, pass real arrays"
    if dtype.kind in "iubf":
        return f"convert it with numpy.asarray({name}).astype(numpy.float32)"
    return "convert it to floating point"


def lse_dtype_of(q: Array) -> type[np.floating[Any]]:
    return np.float64 if q.dtype == _F64 else np.float32


def check_like(name: str, x: Any, shape: tuple[int, ...], dtype: Any) -> Array:
    """Check an array that must have a given shape and dtype: a result of a forward call, or its gradient."""
    x = as_ndarray(name, x)
    if x.dtype != dtype:
        raise TypeError(f"{name} must have dtype {np.dtype(dtype)}, got {x.dtype}; convert it with {name}.astype(...)")
    if x.shape != shape:
        raise ValueError(f"{name} must have shape {shape}, got {x.shape}")
    result: Array = x
    return result


def broadcast_batch(shapes: dict[str, tuple[int, ...]]) -> tuple[int, ...]:
    try:
        return np.broadcast_shapes(*shapes.values())
    except ValueError:
        said = ", ".join(f"{name} {shape}" for name, shape in shapes.items())
        raise ValueError(f"leading dimensions of {' and '.join(shapes)} do not broadcast: {said}") from None


def arrays_among(options: Options) -> dict[str, Any]:
    """Return the arrays among the options by name, those in `mod_args` too."""
    named = options._asdict()
    if isinstance(options.mod_args, tuple | list):
        named |= {f"mod_args[{n}]": x for n, x in enumerate(options.mod_args)}
    return {name: np.asarray(x) for name, x in named.items() if isinstance(x, np.ndarray)}


def check_out(
    out: Any, shape: tuple[int, ...], dtype: np.dtype[Any], inputs: dict[str, Array], of: str = "query"
) -> Array:
    """Check an array for a result; return it as a plain `numpy.ndarray`."""
    out = as_ndarray("out", out)
    if out.dtype != dtype:
        raise TypeError(f"out must have the dtype of {of}, {dtype}, got {out.dtype}")
    if out.shape != shape:
        raise ValueError(f"out must have shape {shape}, got {out.shape}")
    if not out.flags.writeable:
        raise ValueError("out must be writeable, got a read-only array")
    if overlaps_itself(out):
        raise ValueError(f"out must not overlap itself, got shape {out.shape} with strides {out.strides}")
    for name, array in inputs.items():
        if np.may_share_memory(out, array) and overlap(out, array):
            raise ValueError(f"out must not overlap an input, it shares memory with {name}")
    result: Array = out
    return result


def overlap(a: Array, b: Array) -> bool:
    work: Any = 10_000  # candidate solutions to try, which takes well below a millisecond
    try:
        return bool(np.shares_memory(a, b, max_work=work))
    except np.exceptions.TooHardError:  # undecided after that work: count it as an overlap
        return True


_TRIED = 2**22  # elements of an array with unusual strides whose places are compared


def overlaps_itself(x: Array) -> bool:
    """Whether two elements of an array share memory."""
    if x.flags.c_contiguous or not x.size:
        return False
    axes = sorted((abs(stride), size) for stride, size in zip(x.strides, x.shape, strict=True) if size > 1)
    reach = x.itemsize  # of all axes with smaller strides: axes that step over it cannot overlap
    for stride, size in axes:
        if stride < reach:
            break
        reach += stride * (size - 1)
    else:
        return False
    if axes[0][0] < x.itemsize or x.size > _TRIED:  # too many to compare count as an overlap
        return True
    places = np.zeros(1, np.int64)
    for stride, size in axes:
        places = np.add.outer(places, stride * np.arange(size)).ravel()
    places.sort()
    return bool((np.diff(places) < x.itemsize).any())


def scale_of(scale: Any, E: int, dtype: np.dtype[Any]) -> float:
    """Check the scale of a call with arrays of this dtype; None is the default for E features."""
    if scale is None:
        return 1 / math.sqrt(E) if E else 1.0
    number = as_real("scale", scale)
    limit = largest_computed(dtype) * 0.693  # ln(2), rounded down: scale * log2(e) is finite in the compute type
    if abs(number) > limit:
        raise ValueError(f"scale must lie within +-{limit:.3g} for arrays of {dtype}, got {number}")
    return number


def as_real(name: str, x: Any) -> float:
    if type(x) is not float:
        if not _is_number(x):
            raise TypeError(f"{name} must be a real number, got {_shown(x)}")
        try:
            x = float(x)
        except OverflowError:
            x = math.inf
        except Exception:  # the conversion of another library's number may raise any exception
            raise TypeError(f"{name} must be a real number, got {kind_of(x)}") from None
    if not math.isfinite(x):
        raise ValueError(f"{name} must be finite, got {x}")
    return float(x)


def as_size(name: str, x: Any) -> int:
    """Check a size of a layer: an integer from 1."""
    if isinstance(x, bool) or not isinstance(x, int | np.integer):
        raise TypeError(f"{name} must be an integer, got {x!r}")
    if x < 1:
        raise ValueError(f"{name} must be positive, got {x}")
    if x > FAR:
        raise ValueError(f"{name} must be at most 2**40, got one of {int(x).bit_length()} bits")
    return int(x)


def as_real_dtype(dtype: DTypeLike) -> np.dtype[Any]:
    """Check the dtype of the parameters of a layer."""
    try:
        result = None if dtype is None else np.dtype(dtype)
    except Exception:  # TypeError, and ValueError, KeyError, SyntaxError for what looks like a description of fields
        result = None
    # None is compared by identity, because NumPy considers it equal to float64.
    if result is None or result not in (np.dtype(np.float32), np.dtype(np.float64)):
        raise TypeError(f"dtype must be float32 or float64, got {dtype!r}")
    return result


def as_seed(x: Any) -> int:
    try:
        if isinstance(x, bool | np.bool_):
            raise TypeError
        seed = operator.index(x)
    except Exception:  # `__index__` of another library's number may raise any exception
        raise TypeError(f"seed must be an integer, got {_shown(x)}") from None
    if not 0 <= seed < 2**64:
        raise ValueError(f"seed must be an integer of 64 bits, from 0 to 2**64 - 1, got {seed}")
    return seed


def _is_number(x: Any) -> bool:
    """Whether x can be used as one real number: it is neither a truth value nor complex, and has no axes.

    `float` is not strict enough: it drops the imaginary part of a NumPy scalar, parses text, and turns the masked
    constant into NaN.
    """
    if isinstance(x, str | bytes | bytearray | bool | complex) or is_masked(x):
        return False
    if isinstance(x, np.ndarray | np.generic):
        return x.ndim == 0 and (x.dtype.kind in "iuf" or is_bfloat16(x.dtype))
    dtype = str(getattr(x, "dtype", ""))
    return not getattr(x, "ndim", 0) and "complex" not in dtype and "bool" not in dtype


def _shown(x: Any) -> str:
    """Return how a value is shown in a message: by itself if that is short, else by its kind."""
    return repr(x) if isinstance(x, str | bytes | bool | complex | np.generic) else kind_of(x)


def as_flag(name: str, x: Any) -> bool:
    """Check an argument that must be true or false; an array of several elements is neither."""
    if x is True or x is False:
        return bool(x)
    try:
        return bool(x)
    except Exception:
        raise TypeError(f"{name} must be True or False, got {kind_of(x)}") from None


def is_bottom_right(causal: Any) -> bool:
    """Whether `is_causal` asks for alignment with the end. Other values are checked with the other options."""
    return isinstance(causal, str) and causal == "bottom-right"


def as_window(window: Any) -> tuple[int | None, int | None]:
    """Check a window; return how far it reaches to the left and to the right, None for without bound."""
    if window is None:
        return None, None
    # A set or a dict has no left and right, and an iterator would be empty where a call reads it a second time.
    try:
        if type(window) not in _SEQUENCES and not isinstance(window, Sequence) and not hasattr(window, "__array__"):
            raise TypeError
        left, right = window
    except (TypeError, ValueError):
        raise TypeError(f"window must be a pair (left, right) of int or None, got {window!r}") from None
    return _reach(left), _reach(right)


def _reach(x: Any) -> int | None:
    if x is None:
        return None
    try:
        if isinstance(x, bool | np.bool_):
            raise TypeError
        reach = operator.index(x)
    except Exception:  # as in `as_seed`
        raise TypeError(f"window must be a pair (left, right) of int or None, got {x!r}") from None
    if reach < 0:
        raise ValueError(f"window must not be negative, got {reach}")
    return min(reach, UNBOUNDED)


def as_array(name: str, x: Any) -> Array:
    """Convert an option that may be any array-like to an array."""
    if is_masked(x):
        raise TypeError(f"{name} is a masked array, whose mask would be lost; pass its .data")
    if type(x) is np.ndarray:
        return x
    refuse_on_device(name, x)
    try:
        array = np.asarray(x)
    except ValueError as error:
        raise ValueError(f"{name} is not an array: {error}") from None
    except Exception as error:  # the conversion of another library's array may raise any exception
        raise TypeError(f"{name} cannot be converted to an array: {error}") from None
    # NumPy does not look into iterators, sets and dicts; an integer beyond 64 bits is an object too.
    if array.dtype.kind == "O" and not array.ndim and not isinstance(x, int):
        raise TypeError(f"{name} must be an array, a number or a list, got {kind_of(x)}")
    if array.ndim and array.dtype.kind != "b" and _contains_bool(x):
        raise TypeError(f"{name} must not mix truth values with numbers")
    return array


_NUMBERS = frozenset((int, float))
_SEQUENCES = frozenset((list, tuple))  # compared first: asking whether something is a Sequence takes a microsecond


def _contains_bool(x: Any) -> bool:
    """Whether nested sequences contain a truth value, which NumPy makes 0 or 1 if there are numbers beside it."""
    if type(x) not in _SEQUENCES and (
        not isinstance(x, Sequence) or isinstance(x, str | bytes | bytearray | memoryview | range)
    ):
        return isinstance(x, bool | np.bool_) or (isinstance(x, np.ndarray) and x.dtype.kind == "b")
    return not _NUMBERS.issuperset(map(type, x)) and any(map(_contains_bool, x))


def as_ints(name: str, x: Any, most: int = FAR) -> Array:
    """Convert integers to a new int64 array; they must lie within +-`most`, a power of two."""
    array = as_array(name, x)
    if array.dtype.kind not in "iu":
        if not array.size and not isinstance(x, np.ndarray):  # NumPy makes an empty list an array of float64
            return array.astype(np.int64)
        # NumPy makes integers of more than 64 bits an array of objects.
        if array.dtype.kind != "O" or type(x) is np.ndarray or not {int}.issuperset(map(type, array.flat)):
            raise TypeError(f"{name} must be integer, got {array.dtype}")
    if array.size and (int(array.max()) > most or int(array.min()) < -most):
        bits = most.bit_length() - 1
        raise ValueError(f"{name} must lie within +-2**{bits}, got values from {array.min()} to {array.max()}")
    return array.astype(np.int64)


def indices_within(name: str, x: Any, count: int) -> Array:
    """Check indices into an axis of `count` elements, none of which counts from the end."""
    indices = as_ints(name, x)
    if indices.size and (int(indices.min()) < 0 or int(indices.max()) >= count):
        raise ValueError(f"{name} must lie between 0 and {count - 1}, got {indices.min()} to {indices.max()}")
    return indices


def lengths_within(name: str, x: Any, limit: int, batch: tuple[int, ...]) -> Array:
    lengths = as_ints(name, x)
    if lengths.size and (int(lengths.min()) < 0 or int(lengths.max()) > limit):
        raise ValueError(f"{name} must lie between 0 and {limit}, got {lengths.min()} to {lengths.max()}")
    return broadcast_to(name, lengths, batch)


def as_bools(name: str, x: Any) -> Array:
    mask = as_array(name, x)
    if mask.dtype != np.bool_:
        hint = (
            "pass additive values as bias="
            if mask.dtype.kind == "f" or is_bfloat16(mask.dtype)
            else "compare or cast it"
        )
        raise TypeError(f"{name} must be boolean (True = may attend), got {mask.dtype}; {hint}")
    return mask


def as_few_floats(name: str, x: Any, dtype: np.dtype[Any]) -> Array:
    """Convert an option that is a few numbers to float64, for calls with arrays of `dtype`.

    Kernels use the numbers times log2(e) in their compute type. Finite numbers are clamped so that this product is
    finite: -1e300 must not become -inf, which hides a key.
    """
    array = as_array(name, x)
    if array.dtype.kind == "f" and not array.dtype.isnative:
        array = array.astype(array.dtype.newbyteorder("="))
    numbers: Array = as_floats(name, array).astype(np.float64)
    limit = largest_computed(dtype) * 0.693  # ln(2), rounded down
    return np.where(np.isfinite(numbers), np.clip(numbers, -limit, limit), numbers)


def as_floats(name: str, x: Any) -> Array:
    array = as_array(name, x)
    if not is_supported(array.dtype):
        hint = (
            "pass a boolean as mask=" if name == "bias" and array.dtype.kind == "b" else advice_for(name, array.dtype)
        )
        raise TypeError(f"{name} must be floating point, got {array.dtype}; {hint}")
    return array


def broadcast_to(name: str, array: Array, shape: tuple[int, ...]) -> Array:
    if array.shape == shape:
        return array
    try:
        return np.broadcast_to(array, shape)
    except ValueError:
        raise ValueError(f"{name} of shape {array.shape} does not broadcast to {shape}") from None


def as_index(name: str, index: Any, n: int) -> Array:
    """Convert an index array, boolean array or slice over n items to an int64 array."""
    every = np.arange(n)
    if index is None:
        return every
    if not isinstance(index, slice):
        index = np.atleast_1d(as_array(name, index))
        if index.size == 0:
            return every[:0]
        if index.ndim != 1 or index.dtype.kind not in "iub":
            raise TypeError(
                f"{name} must be a slice or a 1-D array of int or bool, got {index.dtype} of shape {index.shape}"
            )
    try:
        return np.ascontiguousarray(every[index])
    except (IndexError, TypeError, ValueError) as error:
        raise type(error)(f"{name}: {error}") from None
