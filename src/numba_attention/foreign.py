"""Arrays of other libraries on the host: recognising them, and calling a function with them.

`backends.select` returns a `Family` in place of a backend where the query is an array of another library; functions
then hand over to its `call`. A call with NumPy arrays asks nothing here. No library is imported for the question:
whoever passes an array of a library has imported it.
"""

from __future__ import annotations  # short types in help()

import sys
from collections.abc import Callable, Mapping, Sequence
from importlib import import_module
from typing import Any

import numpy as np

from .options import Array, Gradients


class Family:
    """How to use the arrays of one library. This base class is for any with DLPack or the array API standard."""

    name = "an array with __dlpack__"
    conversion = "numpy.from_dlpack(x)"  # for messages of functions that take NumPy arrays only
    bridge: str | None = None  # the module of this package that differentiates `attention` for these arrays
    on_device = True  # as backends whose functions take another way
    is_lazy = False  # whether arrays are not in memory

    def take(self, name: str, x: Any) -> Array:
        """View an array as one of NumPy."""
        try:
            return np.from_dlpack(x) if hasattr(x, "__dlpack__") else np.asarray(x)
        except Exception:  # a library may not export what it can convert, and the other way round
            return np.asarray(x)

    def give(self, result: Array, like: Any) -> Any:
        """Return a result as an array of the library."""
        if not hasattr(like, "__array_namespace__"):
            return result
        return like.__array_namespace__().asarray(result)

    def check(self, function: str, name: str, x: Any) -> None:
        """Refuse an array that would lose something here."""

    def call(self, function: Callable[..., Any], arguments: dict[str, Any], options: Mapping[str, Any]) -> Any:
        """Call a function with NumPy arrays, and convert its results."""
        arguments, name = arguments | dict(options), function.__name__
        if not name.endswith("_backward") and arguments.pop("out", None) is not None:
            raise TypeError(f"out must be None with {self.name}: the result is a new one")
        if self.bridge is not None and name == "attention":
            return import_module(f"numba_attention.{self.bridge}").attention(**arguments)
        families = {key: family_of(x) for key, x in arguments.items()}
        converted = {}
        for key, x in arguments.items():
            family = families[key]
            if family is not None:
                family.check(name, key, x)
            converted[key] = x if family is None else family.take(key, x)
        result = function(**converted)
        if isinstance(result, Gradients):
            pairs = ((field, grad) for field, grad in zip(result._fields, result, strict=True) if grad is not None)
            given = {field: self._like(grad, arguments.get(field)) for field, grad in pairs}
            return result._replace(**given)
        if isinstance(result, tuple):
            return tuple(self.result(part, n, name, arguments) for n, part in enumerate(result))
        return self.result(result, 0, name, arguments)

    def result(self, array: Array, n: int, function: str, arguments: Mapping[str, Any]) -> Any:
        """Return result number n (output or weights, log-sum-exp) of a function."""
        return self.give(array, arguments["query"])

    def _like(self, grad: Any, x: Any) -> Any:
        """Return a gradient in the kind of its input."""
        family = family_of(x)
        return grad if family is None or not isinstance(grad, np.ndarray) else family.give(grad, x)


class TorchFamily(Family):
    """Tensors of PyTorch on the CPU."""

    name, bridge = "tensors of PyTorch", "torch"
    conversion = "x.detach().numpy()"

    def take(self, name: str, x: Any) -> Array:
        array: Array = import_module("numba_attention.torch").to_array(x)
        return array

    def give(self, result: Array, like: Any) -> Any:
        return import_module("numba_attention.torch").to_tensor(result)

    def check(self, function: str, name: str, x: Any) -> None:
        if x.device.type != "cpu":
            raise ValueError(f"{name} must be on the CPU, got device {x.device}; move it with {name}.cpu()")
        if x.requires_grad and sys.modules["torch"].is_grad_enabled():
            raise TypeError(
                f"{name} requires a gradient, which {function} does not record; pass {name}.detach(), or use "
                "numba_attention.torch.attention, which does"
            )


class JaxFamily(Family):
    """Arrays of JAX on the CPU, and what stands for them while a function is traced."""

    name, bridge = "arrays of JAX", "jax"
    conversion = "numpy.asarray(x)"

    def take(self, name: str, x: Any) -> Array:
        return np.asarray(x)

    def give(self, result: Array, like: Any) -> Any:
        return import_module("jax.numpy").asarray(result)

    def check(self, function: str, name: str, x: Any) -> None:
        if isinstance(x, sys.modules["jax"].core.Tracer):
            raise TypeError(
                f"{name} is traced by JAX, and {function} needs its numbers; call it outside of jax.jit and jax.grad, "
                "or use numba_attention.jax.attention, which can be traced"
            )


class LabelledFamily(Family):
    """Arrays whose axes have labels: the result has those of the query, and of the value along the last axis."""

    conversion = "x.to_numpy()"

    def take(self, name: str, x: Any) -> Array:
        array: Array = x.to_numpy()
        return array

    def result(self, array: Array, n: int, function: str, arguments: Mapping[str, Any]) -> Any:
        query = arguments["query"]
        if function == "attention_weights":
            return self.weights(array, query, arguments["key"], arguments.get("heads"), arguments.get("rows"))
        return self.output(array, query, arguments["value"]) if n == 0 else self.per_row(array, query)

    def call(self, function: Callable[..., Any], arguments: dict[str, Any], options: Mapping[str, Any]) -> Any:
        if function.__name__ not in ("attention", "attention_weights", "attention_backward"):
            raise TypeError(
                f"query must be a numpy.ndarray in {function.__name__}, got {self.name}; pass query.to_numpy()"
            )
        for name in ("query", "key", "value"):
            if name in arguments and family_of(arguments[name]) is not self:
                raise TypeError(f"{name} must be {self.name}, as query is")
        return super().call(function, arguments, options)

    def output(self, array: Array, query: Any, value: Any) -> Any:
        raise NotImplementedError

    def per_row(self, array: Array, query: Any) -> Any:
        raise NotImplementedError

    def weights(self, array: Array, query: Any, key: Any, heads: Any, rows: Any) -> Any:
        raise NotImplementedError


class XarrayFamily(LabelledFamily):
    """DataArrays of xarray. Axes are told by their order, as everywhere in this package."""

    name = "a DataArray of xarray"

    def give(self, result: Array, like: Any) -> Any:
        return like.copy(data=result)

    def output(self, array: Array, query: Any, value: Any) -> Any:
        return self._named(array, query, query.dims[:-1], value, value.dims[-1], value.dims[-1])

    def per_row(self, array: Array, query: Any) -> Any:
        return self._named(array, query, query.dims[:-1])

    def weights(self, array: Array, query: Any, key: Any, heads: Any, rows: Any) -> Any:
        for axis, index in ((-3, heads), (-2, rows)):
            if index is not None:
                query = query.isel({query.dims[axis]: np.arange(query.shape[axis])[index]})
        of_keys = key.dims[-2]
        named = f"{of_keys}_key" if of_keys in query.dims else of_keys
        return self._named(array, query, query.dims[:-1], key, of_keys, named)

    def _named(
        self, array: Array, query: Any, dims: Any, other: Any = None, last: Any = None, named: Any = None
    ) -> Any:
        if array.ndim != len(dims) + (last is not None):
            raise ValueError(f"query must have every axis of the result, {array.ndim}, got {query.dims}")
        coordinates = {dim: query.coords[dim].to_numpy() for dim in dims if dim in query.coords}
        if last is not None and last in other.coords:
            coordinates[named] = other.coords[last].to_numpy()
        return type(query)(array, coordinates, (*dims, *(() if last is None else (named,))))


class PandasFamily(LabelledFamily):
    """DataFrames of pandas: one row for each position of one head."""

    name = "a DataFrame of pandas"

    def give(self, result: Array, like: Any) -> Any:
        return type(like)(result, like.index, like.columns)

    def output(self, array: Array, query: Any, value: Any) -> Any:
        return type(query)(array, query.index, value.columns)

    def per_row(self, array: Array, query: Any) -> Any:
        return sys.modules["pandas"].Series(array, query.index)

    def weights(self, array: Array, query: Any, key: Any, heads: Any, rows: Any) -> Any:
        index = query.index if rows is None else query.index[np.arange(len(query))[rows]]
        return type(query)(array.reshape(len(index), len(key)), index, key.index)


class DaskFamily(Family):
    """Arrays of Dask, which are not in memory: the module for them builds a graph."""

    name = "arrays of Dask"
    is_lazy = True
    conversion = "x.compute()"

    def call(self, function: Callable[..., Any], arguments: dict[str, Any], options: Mapping[str, Any]) -> Any:
        target = getattr(import_module("numba_attention.dask"), function.__name__, None)
        if target is None:
            raise TypeError(
                f"arrays must be numpy.ndarray in {function.__name__}, got {self.name}; pass query.compute()"
            )
        if not function.__name__.endswith("_backward") and arguments.pop("out", None) is not None:
            raise TypeError("out must be None for arrays of dask.array, whose results are lazy")
        return target(**arguments, **options)


_LIBRARIES = (
    ("torch", "Tensor", TorchFamily()),
    ("jax", "Array", JaxFamily()),
    ("xarray", "DataArray", XarrayFamily()),
    ("pandas", "DataFrame", PandasFamily()),
)
_ANY, _DASK = Family(), DaskFamily()
_NEVER = (np.ndarray, np.generic, int, float, complex, str, bytes, list, tuple, dict, type(None))


def family_of(x: Any) -> Family | None:
    """Return the family of an array of another library; None for NumPy's own and for anything that is no array."""
    if isinstance(x, _NEVER):
        return None
    for library, kind, family in _LIBRARIES:
        of_library = getattr(sys.modules.get(library), kind, None)  # missing while another thread imports the library
        if of_library is not None and isinstance(x, of_library):
            return family
    if f"{type(x).__module__}.".startswith("dask.array."):
        return _DASK
    return _ANY if hasattr(x, "__array_namespace__") or hasattr(x, "__dlpack__") else None


def family_for(arrays: Sequence[Any]) -> Family | None:
    """Return where a call with these arrays goes, as its first array says; one of Dask is enough, wherever it is."""
    families = [family_of(x) for x in arrays]
    return _DASK if _DASK in families else families[0]


def module_of_layer(arrays: Sequence[Any]) -> Any:
    """Return the module that applies layers to arrays of Dask, if one of these is; else None."""
    return import_module("numba_attention.dask.layer") if _DASK in [family_of(x) for x in arrays] else None


def how_to_convert(name: str, x: Any) -> str:
    """Return what converts an array of another library to one of NumPy."""
    family = family_of(x)
    if isinstance(family, TorchFamily):
        detached = f"{name}.detach()" if x.requires_grad else name
        if "bfloat16" in str(x.dtype):
            return f"{detached}.float().numpy()"
        return f"{detached}.numpy()" if x.requires_grad else f"numpy.asarray({name})"
    if isinstance(family, LabelledFamily):
        return f"{name}.to_numpy()"
    if family is _DASK:
        return f"{name}.compute()"
    if family is _ANY and not hasattr(x, "__array__"):
        return f"numpy.from_dlpack({name})"
    return f"numpy.asarray({name})"
