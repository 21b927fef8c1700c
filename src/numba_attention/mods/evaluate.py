"""Programs on NumPy arrays in float64: what the reference differentiates by."""

from typing import Any

import numpy as np

from .program import REAL, Instruction, Program

Array = np.ndarray[Any, Any]

_UFUNCS: dict[str, Any] = {
    "add": np.add, "sub": np.subtract, "mul": np.multiply, "div": np.divide, "neg": np.negative, "abs": np.abs,
    "floordiv": np.floor_divide, "mod": np.mod, "and": np.bitwise_and, "or": np.bitwise_or, "xor": np.bitwise_xor,
    "shl": np.left_shift, "shr": np.right_shift, "invert": np.invert, "not": np.logical_not,
    "lt": np.less, "le": np.less_equal, "gt": np.greater, "ge": np.greater_equal, "eq": np.equal, "ne": np.not_equal,
    "sqrt": np.sqrt, "exp": np.exp, "exp2": np.exp2, "log": np.log, "log2": np.log2, "tanh": np.tanh, "sin": np.sin,
    "cos": np.cos, "pow": np.power, "isnan": np.isnan, "floor": np.floor, "ceil": np.ceil, "trunc": np.trunc,
    "rint": np.rint, "select": np.where,
    "min": lambda x, y: np.where(y < x, y, x), "max": lambda x, y: np.where(y > x, y, x),
    "real": np.float64, "integer": lambda x: np.asarray(x).astype(np.int64), "widen": np.int64,
}  # fmt: skip


class Evaluation:
    """The results of all instructions of a program.

    Parameters
    ----------
    program : Program
    values : tuple
        `mod_args`.
    **arguments : array
        score, batch, head, i and j, which broadcast.
    """

    def __init__(self, program: Program, values: tuple[Any, ...], **arguments: Any) -> None:
        self._program, self._values, self._arguments = program, values, arguments
        self._shape = np.broadcast_shapes(*(np.shape(x) for x in arguments.values()))
        self._results: list[Any] = []
        with np.errstate(all="ignore"):
            for line in program.instructions:
                self._results.append(self._result(line))

    @property
    def outputs(self) -> list[Array]:
        """The outputs of the program, of the shape to which the arguments broadcast."""
        return [np.broadcast_to(self._results[n], self._shape) for n in self._program.outputs]

    def place(self, site: int) -> tuple[int, tuple[Array, ...]]:
        """Which array a site reads, and its indices."""
        line = self._program.instructions[site]
        return line.value[0], tuple(np.broadcast_to(x, self._shape) for x in self._indices(line))

    def _result(self, line: Instruction) -> Any:
        if line.op == "argument":
            return self._arguments[line.value]
        if line.op == "constant":
            return line.value
        if line.op == "scalar":
            return self._values[line.value]
        if line.op == "shape":
            return self._values[line.value[0]].shape[line.value[1]]
        if line.op == "load":
            x = self._values[line.value[0]][self._indices(line)]
            return x.astype(np.float64) if line.kind == REAL else x
        return _UFUNCS[line.op](*(self._results[x] for x in line.args))

    def _indices(self, line: Instruction) -> tuple[Any, ...]:
        """Indices within the array, from its beginning."""
        shape = self._values[line.value[0]].shape
        indices = []
        for x, n in zip(line.args, shape, strict=True):
            index = np.asarray(self._results[x])
            indices.append(np.clip(np.where(index < 0, index + n, index), 0, n - 1))
        return tuple(indices)
