"""The named cases that hold every backend against the reference, and the one place that says how close is close.

A case is sizes, a layout of the arrays and some options by name. `CASES` is what the tests go through; the tables
`OPTIONS` and `LAYOUTS` are its vocabulary, and a new option is one new line there.
"""

import itertools
import zlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import ml_dtypes
import numpy as np
import pytest

import numba_attention as na

DTYPES = {
    "float32": np.dtype(np.float32),
    "float64": np.dtype(np.float64),
    "float16": np.dtype(np.float16),
    "bfloat16": np.dtype(ml_dtypes.bfloat16),
}


@dataclass(frozen=True)
class Case:
    """Sizes, layout and option names; everything random in it follows from the name."""

    L: int = 17
    S: int = 33
    E: int = 8
    Ev: int | None = None
    H: int = 2
    Hkv: int | None = None
    batch: tuple[int, ...] = (2,)
    key_batch: tuple[int, ...] | None = None
    value_batch: tuple[int, ...] | None = None
    layout: str = "C"
    options: tuple[str, ...] = ()
    magnitude: float = 1.0

    def __str__(self) -> str:
        words = [f"L{self.L} S{self.S} E{self.E}"]
        words += [f"Ev{self.Ev}"] if self.Ev is not None else []
        words += [f"H{self.H}"] if self.H != 2 else []
        words += [f"Hkv{self.Hkv}"] if self.Hkv is not None else []
        words += [f"batch{self.batch}"] if self.batch != (2,) else []
        words += [f"keys{self.key_batch}"] if self.key_batch is not None else []
        words += [f"values{self.value_batch}"] if self.value_batch is not None else []
        words += [self.layout] if self.layout != "C" else []
        words += [f"x{self.magnitude:g}"] if self.magnitude != 1 else []
        return " ".join([*words, *self.options])

    @cached_property
    def shapes(self) -> tuple[tuple[int, ...], ...]:
        Hkv = self.H if self.Hkv is None else self.Hkv
        Ev = self.E if self.Ev is None else self.Ev
        key_batch = self.batch if self.key_batch is None else self.key_batch
        value_batch = key_batch if self.value_batch is None else self.value_batch
        return (
            (*self.batch, self.H, self.L, self.E),
            (*key_batch, Hkv, self.S, self.E),
            (*value_batch, Hkv, self.S, Ev),
        )

    @cached_property
    def full_batch(self) -> tuple[int, ...]:
        return np.broadcast_shapes(*(shape[:-3] for shape in self.shapes))

    @cached_property
    def scores_shape(self) -> tuple[int, ...]:
        return (*self.full_batch, self.H, self.L, self.S)

    @property
    def scores_magnitude(self) -> float:
        """Roughly the standard deviation of the scores, 1 for normal inputs."""
        aligned = self.E**0.5 if self.layout == "one feature for all" else 1.0
        return max(1.0, self.magnitude**2 * aligned)

    def rng(self) -> np.random.Generator:
        return np.random.default_rng(zlib.crc32(str(self).encode()))

    def arrays(self, dtype: str = "float32") -> list[np.ndarray]:
        """Build query, key and value."""
        rng = self.rng()
        made = [(self.magnitude * rng.standard_normal(shape)).astype(DTYPES[dtype]) for shape in self.shapes]
        return [LAYOUTS[self.layout](x) for x in made]

    def kwargs(self) -> dict[str, Any]:
        """Build the keyword arguments; of two options for one argument the later wins."""
        rng, made = self.rng(), {}
        for name in self.options:
            made |= OPTIONS[name](rng, self)
        return made


def oracle(query, key, value, **kwargs):
    """Out and lse by the reference in float64, however the inputs are stored."""
    wide = [x.astype(np.float64) for x in (query, key, value)]
    return na.attention(*wide, **kwargs, return_lse=True, backend="reference")


def tolerance(dtype: str, case: Case | None = None) -> tuple[float, float]:
    """How far from the oracle out (times its largest magnitude) and lse (times 1 + its largest) may be.

    The figures grow with the magnitude of the scores, whose rounding errors the exponential turns into relative ones;
    the half types add the rounding of the result, and bfloat16 that of the weights, which multiply as bfloat16.
    """
    growth = 1.0 if case is None else case.scores_magnitude
    out, lse = {
        "float64": (1e-13, 1e-13),
        "float32": (2e-6, 5e-7),
        "float16": (1e-3, 5e-7),
        "bfloat16": (1.2e-2, 5e-7),
    }[dtype]
    return out * growth, lse * growth


def assert_close(got, want, relative: float, offset: float = 0.0) -> None:
    """NaN and infinity in the same places, and errors below relative * (offset + largest finite magnitude)."""
    got, want = np.asarray(got).astype(np.float64), np.asarray(want).astype(np.float64)
    assert got.shape == want.shape
    np.testing.assert_array_equal(np.isnan(got), np.isnan(want), err_msg="NaN")
    finite = np.isfinite(want)
    np.testing.assert_array_equal(got[~finite], want[~finite], err_msg="infinities")
    if finite.any():
        error = np.abs(got[finite] - want[finite]).max()
        limit = relative * (offset + np.abs(want[finite]).max())
        assert error <= limit, f"error {error:.3g} exceeds {limit:.3g}"


def check(query, key, value, kwargs, dtype, case=None, backend="cpu", many_keys=False) -> None:
    """Hold one call against the oracle.

    A sum of n rounded products w v is off by about sqrt(n) u times the sum of w |v|, u = 2**-24 for float32 (Higham and
    Mary, "A new approach to probabilistic rounding error analysis", 2019): 2e-6 of it for 1100 keys. The result is as
    large as that sum for few keys. With `many_keys` values cancel, and errors are held against the sum of w |v| itself.
    """
    out, lse = na.attention(query, key, value, **kwargs, return_lse=True, backend=backend)
    want, want_lse = oracle(query, key, value, **kwargs)
    assert out.dtype == query.dtype
    assert lse.dtype == (np.float64 if dtype == "float64" else np.float32)
    of_out, of_lse = tolerance(dtype, case)
    offset = 0.0
    if many_keys:
        offset = np.abs(oracle(query, key, np.abs(value), **kwargs)[0]).max() - np.abs(want).max()
    assert_close(out, want, of_out, offset=offset)
    assert_close(lse, want_lse, of_lse, offset=1)


def grad_tolerance(dtype: str, case: Case | None = None) -> float:
    """How far from the oracle gradients may be, times their largest magnitude."""
    growth = 1.0 if case is None else case.scores_magnitude
    return growth * {"float64": 2e-14, "float32": 7e-6, "float16": 1e-3, "bfloat16": 8e-3}[dtype]


def oracle_backward(grad_out, query, key, value, grad_lse=None, **kwargs):
    """Gradients by the reference in float64, however the inputs are stored."""
    wide = [x.astype(np.float64) for x in (query, key, value)]
    out, lse = na.attention(*wide, **kwargs, return_lse=True, backend="reference")
    grad_lse = None if grad_lse is None else grad_lse.astype(np.float64)
    grad_out = grad_out.astype(np.float64)
    return na.attention_backward(grad_out, *wide, out, lse, grad_lse=grad_lse, **kwargs, backend="reference")


def check_backward(case, dtype, backend="cpu") -> None:
    """Hold the gradients of one case against the oracle."""
    arrays, kwargs = case.arrays(dtype), case.kwargs()
    out, lse = na.attention(*arrays, **kwargs, return_lse=True, backend=backend)
    rng = np.random.default_rng(1)
    grad_out = LAYOUTS[case.layout](rng.standard_normal(out.shape).astype(out.dtype))
    grad_lse = rng.standard_normal(lse.shape).astype(lse.dtype)
    got = na.attention_backward(grad_out, *arrays, out, lse, grad_lse=grad_lse, **kwargs, backend=backend)
    want = oracle_backward(grad_out, *arrays, grad_lse, **kwargs)
    inputs = [*arrays, *(None if kwargs.get(n) is None else np.asarray(kwargs[n]) for n in ("bias", "sinks")), None]
    # What cancels in one gradient does so by parts of the size of the others.
    offset = max((np.abs(w).max() for w in want[:3] if w.size), default=0)
    for name, given, a, b in zip(na.Gradients._fields, inputs, got, want, strict=True):
        assert (a is None) == (given is None), name
        if given is not None:
            assert a.shape == given.shape, name
            assert a.dtype == given.dtype, name
            rounded = next((n for n, kept in DTYPES.items() if kept == given.dtype), dtype)
            assert_close(a, b, max(grad_tolerance(dtype, case), grad_tolerance(rounded)), offset)


# Layouts: the same values (or, where strides are 0, the first of them) in other places of memory.


def _stored_as(order: tuple[int, ...]) -> Callable[[np.ndarray], np.ndarray]:
    """Store the last three axes in this order and view them in the old one."""

    def layout(x: np.ndarray) -> np.ndarray:
        lead = tuple(range(x.ndim - 3))
        forth = (*lead, *(x.ndim - 3 + axis for axis in order))
        return np.ascontiguousarray(x.transpose(forth)).transpose(np.argsort(forth))

    return layout


def _reversed(*axes: int) -> Callable[[np.ndarray], np.ndarray]:
    def layout(x: np.ndarray) -> np.ndarray:
        return np.flip(np.ascontiguousarray(np.flip(x, axes)), axes)

    return layout


def _every_second_feature(x: np.ndarray) -> np.ndarray:
    wide = np.full((*x.shape[:-1], 2 * x.shape[-1]), np.nan, x.dtype)
    wide[..., ::2] = x
    return wide[..., ::2]


def _island(x: np.ndarray) -> np.ndarray:
    """Inside a larger array full of NaN: reading one element too many shows."""
    sea = np.full([n + 2 for n in x.shape], np.nan, x.dtype)
    inside = sea[(slice(1, -1),) * x.ndim]
    inside[...] = x
    return inside


def _unaligned(x: np.ndarray) -> np.ndarray:
    buffer = np.zeros(x.nbytes + 1, np.uint8)
    view = buffer[1:].view(x.dtype).reshape(x.shape) if x.size else x
    view[...] = x
    return view


def _readonly(x: np.ndarray) -> np.ndarray:
    x.flags.writeable = False
    return x


def _one_for_all(axis: int) -> Callable[[np.ndarray], np.ndarray]:
    def layout(x: np.ndarray) -> np.ndarray:
        return np.broadcast_to(x.take([0], axis), x.shape)

    return layout


LAYOUTS: dict[str, Callable[[np.ndarray], np.ndarray]] = {
    "C": lambda x: x,
    "fortran": np.asfortranarray,
    "length-head-feature": _stored_as((1, 0, 2)),
    "head-feature-length": _stored_as((0, 2, 1)),
    "feature-length-head": _stored_as((2, 1, 0)),
    "rows reversed": _reversed(-2),
    "features reversed": _reversed(-1),
    "all reversed": _reversed(-1, -2, -3),
    "every second feature": _every_second_feature,
    "island": _island,
    "unaligned": _unaligned,
    "readonly": _readonly,
    "one head for all": _one_for_all(-3),
    "one row for all": _one_for_all(-2),
    "one feature for all": _one_for_all(-1),
}


# Options: name -> keyword arguments for a case. Half of the masks and biases come as views with strides of their own.


def _normal(rng: np.random.Generator, shape: tuple[int, ...], dtype: Any = np.float32) -> np.ndarray:
    return rng.standard_normal(shape).astype(dtype)


def _lengths(rng: np.random.Generator, c: Case, n: int) -> np.ndarray:
    lengths = rng.integers(0, n, c.full_batch, endpoint=True)
    if lengths.size > 1:
        lengths.flat[0], lengths.flat[-1] = n, 0
    return lengths


def _hide(rng: np.random.Generator, bias: np.ndarray) -> np.ndarray:
    bias[rng.random(bias.shape) < 0.3] = -np.inf
    return bias


def _some(rng: np.random.Generator, shape: tuple[int, ...], share: float = 0.7) -> np.ndarray:
    return rng.random(shape) < share


def _rows_of_nothing(rng: np.random.Generator, c: Case) -> np.ndarray:
    mask = _some(rng, (c.L, c.S))
    mask[::3] = False
    return mask


def _of_mods(rng: np.random.Generator, c: Case) -> tuple[Any, ...]:
    """A slope for each head, and a table by distance."""
    return rng.random(c.H), rng.standard_normal((c.H, 21)).astype(np.float32), 3


def _score_mod(score, batch, head, i, j, slopes, table, step):
    x = 0.75 * score - slopes[head] * abs(i - j) / 50
    if (batch + j) % step == 0:
        return x + table[head, min(max(i - j + 10, 0), 20)]
    return x


def _score_mod_that_hides(score, batch, head, i, j, slopes, table, step):
    return score if (i + j * 3 + head) % step != 1 else float("-inf")


def _mask_mod(batch, head, i, j, slopes, table, step):
    return (i - 2 * j + head + batch) % step != 0


OPTIONS: dict[str, Callable[[np.random.Generator, Case], dict[str, Any]]] = {
    "causal": lambda rng, c: {"is_causal": True},
    "top-left": lambda rng, c: {"is_causal": "top-left"},
    "bottom-right": lambda rng, c: {"is_causal": "bottom-right"},
    "window": lambda rng, c: {"window": (13, 5)},
    "window left": lambda rng, c: {"window": (7, None)},
    "window right": lambda rng, c: {"window": (None, 2)},
    "window of one": lambda rng, c: {"window": (0, 0)},
    "window of all": lambda rng, c: {"window": [1000, 1000]},
    "window beyond numbers": lambda rng, c: {"window": (2**70, 2**63)},
    "window none": lambda rng, c: {"window": (None, None)},
    "offset": lambda rng, c: {"query_offset": 9},
    "offset negative": lambda rng, c: {"query_offset": -6},
    "offset each": lambda rng, c: {"query_offset": rng.integers(-c.L - 1, c.S + 1, c.full_batch)},
    "offset beyond": lambda rng, c: {"query_offset": 10**9},
    "scale": lambda rng, c: {"scale": 0.7},
    "scale negative": lambda rng, c: {"scale": -0.3},
    "scale zero": lambda rng, c: {"scale": 0},
    "softcap": lambda rng, c: {"softcap": 1.5},
    "softcap wide": lambda rng, c: {"softcap": 50.0},
    "alibi": lambda rng, c: {"alibi_slopes": [2.0 ** -(h + 3) for h in range(c.H)]},
    "alibi each": lambda rng, c: {"alibi_slopes": 0.1 * _normal(rng, (*c.full_batch, c.H))},
    "sinks": lambda rng, c: {"sinks": _normal(rng, (c.H,), np.float64)},
    "sinks extreme": lambda rng, c: {"sinks": np.resize([60.0, -np.inf, -60.0], c.H)},
    "query lengths": lambda rng, c: {"query_lengths": _lengths(rng, c, c.L)},
    "key lengths": lambda rng, c: {"key_lengths": _lengths(rng, c, c.S)},
    "length for all": lambda rng, c: {"query_lengths": c.L - c.L // 3, "key_lengths": np.uint8(c.S // 2)},
    "prefix": lambda rng, c: {"is_causal": True, "prefix_lengths": _lengths(rng, c, c.S)},
    "prefix for all": lambda rng, c: {"window": (None, 2), "prefix_lengths": c.S // 2, "query_offset": -3},
    "mask": lambda rng, c: {"mask": _some(rng, c.scores_shape)},
    "mask sparse": lambda rng, c: {"mask": _some(rng, (c.L, c.S), 0.02)},
    "mask of keys": lambda rng, c: {"mask": _some(rng, (c.S,))},
    "mask of rows": lambda rng, c: {"mask": _some(rng, (c.L, 1))},
    "mask of heads": lambda rng, c: {"mask": _some(rng, (c.H, 1, 1))},
    "mask of sequences": lambda rng, c: {"mask": _some(rng, (*c.full_batch, 1, 1, c.S))},
    "mask of one": lambda rng, c: {"mask": True},
    "mask of nothing": lambda rng, c: {"mask": False},
    "mask of some rows": lambda rng, c: {"mask": _rows_of_nothing(rng, c)},
    "mask transposed": lambda rng, c: {"mask": _some(rng, (c.S, c.L)).T},
    "mask reversed": lambda rng, c: {"mask": np.flip(_some(rng, (c.L, c.S)))},
    "mask strided": lambda rng, c: {"mask": _some(rng, (c.L, 3 * c.S))[:, ::3]},
    "mask of lists": lambda rng, c: {"mask": _some(rng, (c.L, c.S)).tolist()},
    "bias": lambda rng, c: {"bias": _normal(rng, c.scores_shape)},
    "bias float64": lambda rng, c: {"bias": _normal(rng, (c.L, c.S), np.float64)},
    "bias float16": lambda rng, c: {"bias": _normal(rng, (c.H, c.L, c.S), np.float16)},
    "bias bfloat16": lambda rng, c: {"bias": _normal(rng, (c.H, c.L, c.S), ml_dtypes.bfloat16)},
    "bias of keys": lambda rng, c: {"bias": _normal(rng, (c.S,))},
    "bias of rows": lambda rng, c: {"bias": _normal(rng, (c.L, 1))},
    "bias of heads": lambda rng, c: {"bias": _normal(rng, (c.H, 1, 1))},
    "bias of sequences": lambda rng, c: {"bias": _normal(rng, (*c.full_batch, 1, 1, c.S))},
    "bias of one": lambda rng, c: {"bias": 0.25},
    "bias that hides": lambda rng, c: {"bias": _hide(rng, _normal(rng, (c.H, c.L, c.S)))},
    "bias hides all": lambda rng, c: {"bias": np.float32(-np.inf)},
    "bias transposed": lambda rng, c: {"bias": _hide(rng, _normal(rng, (c.H, c.S, c.L))).swapaxes(-1, -2)},
    "bias reversed": lambda rng, c: {"bias": np.flip(_normal(rng, (c.L, c.S)))},
    "bias strided": lambda rng, c: {"bias": _normal(rng, (2 * c.L, 3 * c.S))[::2, ::3]},
    "dropout": lambda rng, c: {"dropout_p": 0.4, "seed": int(rng.integers(2**64, dtype=np.uint64))},
    "score mod": lambda rng, c: {"score_mod": _score_mod, "mod_args": _of_mods(rng, c)},
    "score mod hides": lambda rng, c: {"score_mod": _score_mod_that_hides, "mod_args": _of_mods(rng, c)},
    "mask mod": lambda rng, c: {"mask_mod": _mask_mod, "mod_args": _of_mods(rng, c)},
    "dropout few": lambda rng, c: {"dropout_p": 0.03, "seed": 7},
    "bias of lists": lambda rng, c: {"bias": rng.standard_normal((c.L, c.S)).tolist()},
}

# One of each argument, for the pairs and the sum of all.
VARIED = (
    "causal", "window", "offset each", "scale", "softcap", "alibi", "sinks", "query lengths", "key lengths",
    "mask", "bias that hides",
)  # fmt: skip

# Query tiles are 64 rows (float32, AVX-512), 32 (float64), 24 and 12 (AVX2); key tiles are 64.
EDGES = (1, 2, 3, 5, 11, 12, 13, 15, 16, 17, 23, 24, 25, 63, 64, 65, 127, 128, 129, 130, 200)
FEATURES = (1, 2, 3, 4, 5, 8, 15, 16, 17, 20, 31, 32, 33, 64, 80, 128, 160, 256, 300)


def _lengths_cases() -> list[Case]:
    pairs = {(L, S) for L in EDGES for S in (1, 17, 65, 130)} | {(L, S) for L in (1, 5, 64) for S in EDGES}
    return [Case(L, S, 16, H=1, batch=()) for L, S in sorted(pairs)]


def _features_cases() -> list[Case]:
    same = [Case(18, 70, E) for E in FEATURES]
    values = [Case(18, 70, 16, Ev) for Ev in FEATURES if Ev != 16]
    return same + values + [Case(18, 70, 64, 3), Case(18, 70, 3, 128), Case(1, 130, 33, 65), Case(66, 66, 300, 1)]


def _heads_cases() -> list[Case]:
    heads = [(1, 1), (4, 4), (4, 2), (4, 1), (6, 2), (12, 4), (7, 1), (5, 5)]
    return [
        Case(L, S, 16, H=H, Hkv=Hkv, options=options)
        for H, Hkv in heads
        for L, S, options in [(1, 65, ()), (5, 70, ("bottom-right",)), (33, 64, ("window", "alibi", "sinks"))]
    ]


def _batch_cases() -> list[Case]:
    batches: list[tuple[tuple[int, ...], tuple[int, ...] | None, tuple[int, ...] | None]] = [
        ((), None, None), ((1,), None, None), ((5,), None, None), ((2, 3), None, None), ((2, 1, 2), None, None),
        ((3,), (), None), ((), (3,), None), ((3,), (1,), None), ((2, 1), (3,), None), ((3,), (), (2, 1)),
        ((2, 3), (1, 3), (2, 1)),
    ]  # fmt: skip
    several = ("key lengths", "query lengths", "bottom-right", "alibi each", "mask of sequences", "bias")
    return [
        Case(13, 20, batch=batch, key_batch=key_batch, value_batch=value_batch, options=options)
        for batch, key_batch, value_batch in batches
        for options in [(), several]
    ]


def _layout_cases() -> list[Case]:
    cases = [Case(20, 70, 20, Hkv=1, layout=layout, options=("causal", "offset")) for layout in LAYOUTS]
    cases += [Case(66, 66, 64, layout=layout) for layout in LAYOUTS]
    return cases + [Case(18, 3, 5, 3, layout=layout) for layout in LAYOUTS]


def _option_cases() -> list[Case]:
    alone = [Case(*sizes, options=(name,)) for name in OPTIONS for sizes in [(70, 130), (18, 7), (1, 65)]]
    # Not "offset beyond" with ALiBi: at a distance of 10**9 its differences are lost in rounding, in the oracle too.
    positions = [name for name in OPTIONS if name.startswith(("offset", "bottom", "window")) and "beyond" not in name]
    placed = [
        Case(*sizes, options=("causal", name, "alibi"))
        for name in positions
        for sizes in [(70, 130), (130, 70), (1, 65)]
    ]
    pairs = [Case(40, 70, options=pair) for pair in itertools.combinations(VARIED, 2)]
    return alone + placed + pairs


def _together_cases() -> list[Case]:
    sizes = [(1, 1), (1, 200), (65, 130), (130, 65), (129, 129)]
    layouts = ["C", "length-head-feature", "head-feature-length", "features reversed", "island"]
    return [
        Case(L, S, 20, 33, H=4, Hkv=2, layout=layout, options=(*VARIED, *more))
        for (L, S), layout in zip(sizes, layouts, strict=True)
        for more in [
            (),
            ("bottom-right", "mask of keys", "bias transposed", "dropout"),
            ("window of all", "mask transposed", "bias", "score mod", "mask mod"),
        ]
    ]


def _empty_cases() -> list[Case]:
    empty = [
        Case(S=0),
        Case(L=0),
        Case(E=0),
        Case(E=0, Ev=4),
        Case(Ev=0),
        Case(H=0),
        Case(batch=(0,)),
        Case(batch=(2, 0)),
    ]
    empty += [Case(L=0, S=0), Case(H=0, Hkv=1), Case(batch=(0,), key_batch=(1,)), Case(L=0, S=0, E=0, Ev=0)]
    options = ("causal", "key lengths", "query lengths", "alibi", "sinks", "mask", "bias")
    return empty + [
        Case(case.L, case.S, case.E, case.Ev, case.H, case.Hkv, case.batch, case.key_batch, options=options)
        for case in empty
    ]


def _magnitude_cases() -> list[Case]:
    return [Case(33, 70, 16, magnitude=m, options=o) for m in (1e-4, 4.0) for o in [(), ("softcap", "causal", "bias")]]


GROUPS: dict[str, list[Case]] = {
    "lengths": _lengths_cases(),
    "features": _features_cases(),
    "heads": _heads_cases(),
    "batch": _batch_cases(),
    "layout": _layout_cases(),
    "option": _option_cases(),
    "together": _together_cases(),
    "empty": _empty_cases(),
    "magnitude": _magnitude_cases(),
}
CASES = list(dict.fromkeys(itertools.chain.from_iterable(GROUPS.values())))
# Every third, with all of the combinations, where the whole list is more than a test can use.
SOME = list(dict.fromkeys(CASES[::3] + GROUPS["together"] + GROUPS["empty"]))


def graded(cases: list[Case], dtypes: Sequence[str], step: int = 4) -> list[Any]:
    """Parameters (case, dtype): of each dtype every `step`-th case, another one for each; the others marked slow."""
    return [
        pytest.param(case, dtype, id=f"{case}-{dtype}", marks=() if (n + shift) % step == 0 else pytest.mark.slow)
        for shift, dtype in enumerate(dtypes)
        for n, case in enumerate(cases)
    ]
