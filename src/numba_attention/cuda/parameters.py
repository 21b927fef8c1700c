"""Parameters of a kernel: integers and reals of a call, by name, and one record per sequence in device memory."""

from ..sequence_record import SEQUENCE
from .emit import I32, I64, Emit, Packed, Real, Regs

ARRAYS = ("query", "key", "value", "out", "lse", "bias", "mask", "grad_out", "grad_lse", "delta",
          "grad_query", "grad_key", "grad_value", "grad_bias", "sum_query", "key_scale", "value_scale")  # fmt: skip
LISTS = ("list_first", "list_starts", "list_runs", "list_words")  # of a block mask: `visits`
ADDRESSES = (
    *ARRAYS, "slopes", "sinks", "sequences", "work", "flags", "partial", "members", "far", "mods", *LISTS,
)  # fmt: skip
INTEGERS = (
    *ADDRESSES,
    *(f"{name}_{axis}" for name in ARRAYS for axis in ("head", "row", "column")),
    "heads", "group", "E", "Ev", "left", "right", "tiles", "together", "flag_rows", "splits", "number", "inner_tiles",
    "dropout", "seed", "first_key", "first_head",  # the last two of the whole problem, for dropout and mods
    "page_size", "key_page", "value_page", "key_scale_page", "value_scale_page",
    "list_heads",  # of a sequence
    # of the gradient of a bias: which sequences share its elements, how many heads, rows and keys do
    "bias_heads", "bias_rows", "bias_keys",
)  # fmt: skip
# prescale: what queries are multiplied by; rest: what makes natural scores of their products; unit: what makes them of
# the scores that the softmax sees, with 1 / unit and unit * log2(e).
REALS = ("prescale", "rest", "unit", "per_unit", "factor", "cap_inner", "cap_outer", "dropout_scale")
TYPES = (f"l{len(INTEGERS)}", f"d{len(REALS)}")  # of the two arguments of every kernel
AXES = 8  # that an array to be summed may have: kept ones, and summed ones
RECORD = SEQUENCE.itemsize
FAR = 2**30  # beyond every position that kernels count in 32 bits
MOST = 2**29  # rows or keys of a sequence, and positions

_FIELDS = {name: SEQUENCE.fields[name][1] for name in SEQUENCE.names or ()}  # type: ignore[index]
_INTEGERS = {name: n for n, name in enumerate(INTEGERS)}
_REALS = {name: n for n, name in enumerate(REALS)}


class Parameters:
    """Parameters by name, as values of a macro: addresses and strides of 64 bits, reals of the kind asked for."""

    def __init__(self, e: Emit, integers: Regs, reals: Regs) -> None:
        self._e, self.integers, self.reals = e, integers, reals

    def __getattr__(self, name: str) -> I64:
        return self.integers[_INTEGERS[name]]

    def int(self, name: str) -> I32:
        """An integer that fits into 32 bits."""
        return self._e.narrow(self.integers[_INTEGERS[name]])

    def with_(self, **integers: I64) -> "Parameters":
        """Other values of some integers."""
        others = list(self.integers)
        for name, x in integers.items():
            others[_INTEGERS[name]] = x
        return Parameters(self._e, others, self.reals)

    def real(self, name: str, kind: str) -> Real:
        return self._e.convert(kind, self.reals[_REALS[name]])


PARAMETERS = Packed(TYPES, Parameters, lambda p: (p.integers, p.reals))  # of a macro that takes `Parameters`


class Sequence:
    """The record of one sequence, read field by field."""

    def __init__(self, e: Emit, p: Parameters, index: I32) -> None:
        self._e, self._at = e, p.sequences + e.wide(index) * RECORD

    def __getattr__(self, name: str) -> I64:
        return self._e.load_constant("l", self._at + _FIELDS[name])

    def int(self, name: str) -> I32:
        return self._e.narrow(self._e.load_constant("l", self._at + _FIELDS[name]))


def clamp(e: Emit, x: I64) -> I32:
    """Narrow a position to 32 bits: one beyond every key is clamped to `FAR`."""
    return e.narrow(e.max(e.min(x, FAR), -FAR))
