"""What is drawn: numbers of any magnitude in any layout, calls of every kind; and the script that repeats a call."""

import base64
import inspect
import math
import types
import zlib

import hypothesis.strategies as st
import ml_dtypes  # noqa: F401 - knows bfloat16
import numpy as np
from balls import PRECISIONS, computes_in
from rules import MASKS, POSITIONS, SCORES, WIDTH
from textbook import positions_and_visibility

import numba_attention as na
from dropout_mask import kept

DTYPES = {name: np.dtype(name) for name in ("float32", "float64", "float16", "bfloat16")}

# How an array is stored, as the code that stores it so.
LAYOUTS = {
    "C": "{}",
    "rows before heads": "np.ascontiguousarray({}.swapaxes(-3, -2)).swapaxes(-3, -2)",
    "columns before rows": "np.ascontiguousarray({}.swapaxes(-1, -2)).swapaxes(-1, -2)",
    "reversed": "np.flip(np.ascontiguousarray(np.flip({}, (-1, -2))), (-1, -2))",
    "every third": "np.repeat({}, 3, -1)[..., ::3]",
    "every second row": "np.repeat({}, 2, -2)[..., ::2, :]",
    "unaligned rows": "np.concatenate([{0}, {0}[..., :1]], -1)[..., :-1]",
}


class Call:
    """A call as text, and the arrays and numbers it is about: what runs is what the script would run."""

    def __init__(self, expression, **values):
        self.expression, self.values, self.layouts = expression, values, {}
        self.by_blocks = False  # whether the mask of the options is passed as a `BlockMask`

    def store(self, name, layout):
        self.layouts[name] = layout
        x = self.values[name]
        if x.ndim >= 3 or "-3" not in LAYOUTS[layout]:
            self.values[name] = eval(LAYOUTS[layout].format("x"), {"np": np, "x": x})

    def __call__(self):
        self.before = {name: x.copy() for name, x in self.values.items() if isinstance(x, np.ndarray)}
        with np.errstate(all="ignore"):
            result = eval(self.text(), {"np": np, "na": na, **self.values})
        for name, x in self.before.items():
            assert x.tobytes() == self.values[name].tobytes(), f"{name} was modified\n{self.script()}"
        return result

    def text(self):
        """The expression that runs."""
        if not self.by_blocks:
            return self.expression
        mask = '"mask": na.BlockMask.from_array(options["mask"])'
        return self.expression.replace("**options", f"**{{**options, {mask}}}")

    def script(self):
        lines = ["import base64, math, zlib, ml_dtypes, numpy as np, numba_attention as na"]
        rules = [x for x in self.values.get("options", {}).values() if isinstance(x, types.FunctionType)]
        lines += [inspect.getsource(rule) for rule in rules]
        for name, value in self.values.items():
            text = literal(value)
            layout = self.layouts.get(name, "C")
            if layout != "C":
                text = LAYOUTS[layout].format(f"({name} := {text})" if "{0}" not in LAYOUTS[layout] else text)
            lines.append(f"{name} = {text}")
        return "\n".join([*lines, f"print({self.text()})"])


def literal(x):
    """Return Python source that makes this value again, to the last bit."""
    if isinstance(x, dict):
        return "{" + ", ".join(f"{name!r}: {literal(value)}" for name, value in x.items()) + "}"
    if isinstance(x, list):
        return "[" + ", ".join(map(literal, x)) + "]"
    if isinstance(x, tuple):
        return "(" + "".join(f"{literal(value)}, " for value in x) + ")"
    if isinstance(x, types.FunctionType):
        return x.__name__
    if not isinstance(x, np.ndarray):
        return repr(float(x)) if isinstance(x, float) else repr(x)
    if x.dtype.kind == "f" or x.dtype.name == "bfloat16":
        if x.size <= 32 and np.isfinite(x.astype(np.float64)).all():
            values = x.astype(np.float64)
            if x.size and (values == values.flat[0]).all():
                return f"np.full({x.shape}, {float(values.flat[0])!r}).astype({x.dtype.name!r})"
            return f"np.array({values.tolist()}).reshape({x.shape}).astype({x.dtype.name!r})"
        data = base64.b64encode(zlib.compress(x.tobytes(), 9)).decode()
        dtype = f"np.dtype({x.dtype.name!r})"
        return f"np.frombuffer(zlib.decompress(base64.b64decode({data!r})), {dtype}).reshape({x.shape})"
    return f"np.array({x.tolist()}, {x.dtype.name!r}).reshape({x.shape})"


def magnitudes(low, high):
    """Powers of 10 between two numbers, with any digits: powers of two alone multiply without rounding."""
    return st.floats(math.log10(low), math.log10(high)).map(lambda e: min(max(10.0 ** min(e, 308.25), low), high))


KINDS = ["normal", "equal", "of each row", "wide", "sparse", "extreme", "integers"]


def numbers(draw, shape, dtype, magnitude, kinds=KINDS):
    """Numbers about as large as `magnitude`, in one of the ways that data comes."""
    kind, rng = draw(st.sampled_from(kinds)), np.random.default_rng(draw(st.integers(0, 2**16)))
    own = PRECISIONS[dtype]
    if kind == "equal":
        x = np.full(shape, rng.uniform(0.5, 2) * rng.choice([-1, 1]))
    elif kind == "of each row":
        x = rng.standard_normal(shape) * 10 ** rng.uniform(-3, 0, (*shape[:-1], 1))
    elif kind == "wide":
        x = rng.standard_normal(shape) * 10 ** rng.uniform(-12, 0, shape)
    elif kind == "sparse":
        x = rng.standard_normal(shape) * (rng.random(shape) < 0.2)
    elif kind == "integers":
        x = rng.integers(-2, 3, shape).astype(np.float64)
    else:
        x = rng.standard_normal(shape)
    with np.errstate(all="ignore"):
        x = x * np.float64(magnitude)
    if kind == "extreme":
        ends = [own.largest, own.largest / 3, 1.0, own.normal, own.tiny, 0.0]
        x = rng.choice(ends, shape) * rng.choice([-1.0, 1.0], shape)
    return np.clip(x, -own.largest, own.largest).astype(DTYPES[dtype])


def values_like(draw, shape, dtype):
    own = PRECISIONS[dtype]
    magnitude = draw(st.one_of(magnitudes(0.1, 10), magnitudes(own.tiny, own.largest)))
    return numbers(draw, shape, dtype, magnitude)


def query_and_key(draw, of_query, of_key, dtype, scale):
    """So that their scores have a magnitude that was drawn: of interest are 1, 10**9, and the largest there is."""
    own, t, E = PRECISIONS[dtype], computes_in(dtype), of_query[-1]
    kinds = [kind for kind in KINDS if kind != "extreme"]
    factor = abs(1 / math.sqrt(max(1, E)) if scale is None else scale) * math.sqrt(max(1, E))
    goal = draw(st.one_of(magnitudes(0.1, 30), magnitudes(1e-6, 1e6), magnitudes(1e-30, t.largest)))
    query = draw(magnitudes(own.tiny, own.largest) if draw(st.integers(0, 3)) == 0 else magnitudes(0.01, 100))
    with np.errstate(all="ignore"):
        key = float(np.float64(goal) / np.float64(query) / np.float64(factor or 1.0))
    if draw(st.integers(0, 9)) == 0:
        key, kinds = draw(magnitudes(own.tiny, own.largest)), KINDS
    key = min(max(key, own.tiny), own.largest / 8)
    return numbers(draw, of_query, dtype, min(query, own.largest / 8), kinds), numbers(draw, of_key, dtype, key, kinds)


def scales(draw, dtype):
    largest = computes_in(dtype).largest
    return draw(
        st.one_of(
            st.none(),
            st.none(),
            st.sampled_from([0.0, -0.0, 1.0, -1.0, 0.125]),
            magnitudes(1e-3, 1e3),
            magnitudes(1e-3, 1e3).map(lambda x: -x),
            magnitudes(1e-45, min(1e300, largest)),
            magnitudes(1e-300, 1e300),
        )
    )


def biases(draw, shape, dtype):
    """Additive masks as people write them, in their own precision, mixed with numbers."""
    name = draw(st.sampled_from([dtype, "float32", "float64"]))
    own = PRECISIONS[name]
    lowest = draw(
        st.sampled_from([-np.inf, -own.largest, -1e4, -1e9, -3e38 if name != "float16" else -6e4, own.largest / 2])
    )
    x = numbers(draw, shape, name, draw(st.one_of(magnitudes(0.1, 10), magnitudes(1e-10, min(1e30, own.largest)))))
    x = x.astype(np.float64)
    rng, share = np.random.default_rng(draw(st.integers(0, 99))), draw(st.sampled_from([0.0, 0.3, 0.7, 1.0]))
    x[rng.random(shape) < share] = lowest
    return x.astype(DTYPES[name])


@st.composite
def sizes(draw):
    length = st.one_of(st.integers(0, 6), st.integers(1, 6), st.integers(7, 40), st.sampled_from([64, 65, 64, 65, 130]))
    feature = st.sampled_from([1, 2, 5, 8, 16, 17, 32, 33])
    Hkv = draw(st.sampled_from([1, 1, 2]))
    E, Ev = draw(feature), draw(feature)
    if draw(st.integers(0, 30)) == 0:
        E = 0
    return Hkv * draw(st.sampled_from([1, 1, 2, 3])), Hkv, draw(length), draw(length), E, Ev


def options_for(draw, batch, H, L, S, dtype, allow=()):
    """Options of a call over `batch` sequences, and none at all in a third of the cases."""
    options = {}
    if draw(st.integers(0, 2)) == 0:
        return options
    chance = lambda: draw(st.integers(0, 3)) == 0  # noqa: E731
    lengths = lambda n: np.array([draw(st.integers(0, n)) for _ in range(batch)], np.int64)  # noqa: E731
    if chance():
        options["is_causal"] = draw(st.sampled_from([True, "top-left", "bottom-right"]))
    if chance():
        reach = st.one_of(st.none(), st.integers(0, 8), st.sampled_from([2**31, 2**62]))
        options["window"] = (draw(reach), draw(reach))
    if chance():
        options["query_offset"] = draw(st.sampled_from([-3, 0, 5, 70, -(2**33), 2**33]))
    if chance():
        options["softcap"] = draw(st.one_of(magnitudes(0.5, 50), magnitudes(1e-20, 1e20)))
    if chance():
        options["alibi_slopes"] = numbers(draw, (H,), "float32", draw(magnitudes(1e-4, 1e4)))
    if chance():
        options["sinks"] = numbers(draw, (H,), "float32", draw(st.one_of(magnitudes(0.1, 10), magnitudes(1e-3, 1e30))))
    if chance() and "query_lengths" in allow:
        options["query_lengths"] = lengths(L)
    if chance() and "key_lengths" in allow:
        options["key_lengths"] = lengths(S)
    shape = (batch, H, L, S)
    shape = tuple(1 if draw(st.integers(0, 3)) == 0 else n for n in shape)
    if chance():
        options["bias"] = biases(draw, shape, dtype)
    if chance():
        options["mask"] = masks(draw, shape)
    rules_for(draw, options, H, chance)
    if chance():
        p = draw(st.one_of(st.sampled_from([0.0, 1e-5, 0.5, 0.999, 1 - 2**-16]), st.floats(0, 0.99)))
        options |= {"dropout_p": p, "seed": draw(st.integers(0, 2**64 - 1))}
    return options


def masks(draw, shape):
    """Bits, or tiles of bits."""
    rng, share = np.random.default_rng(draw(st.integers(0, 99))), draw(st.sampled_from([0.0, 0.5, 0.9]))
    tile = draw(st.sampled_from([1, 1, 16, 64]))
    x = rng.random((*shape[:2], *(-(-n // tile) for n in shape[2:]))) < share
    return x.repeat(tile, 2).repeat(tile, 3)[:, :, : shape[2], : shape[3]]


def rules_for(draw, options, H, chance):
    """A score_mod, a mask_mod, or both."""
    if chance():
        options["score_mod"] = draw(st.sampled_from(SCORES))
    if chance():
        options["mask_mod"] = draw(st.sampled_from(MASKS))
    if "score_mod" in options or "mask_mod" in options:
        own = draw(st.sampled_from(["float32", "float64"]))  # read in the compute type, which must hold them
        values = numbers(draw, (H,), own, draw(magnitudes(1e-3, 1e3)), [kind for kind in KINDS if kind != "extreme"])
        table = numbers(draw, (H, WIDTH), "float32", draw(st.one_of(magnitudes(0.1, 10), magnitudes(1e-10, 1e30))))
        rng = np.random.default_rng(draw(st.integers(0, 99)))
        groups = np.sort(rng.integers(0, 4, POSITIONS)).astype(draw(st.sampled_from(["int32", "int64"])))
        options["mod_args"] = values, table, groups, draw(st.integers(0, 3))


def pass_by_blocks(draw, call, B, H, L, S):
    """Pass the mask as a `BlockMask`, whose last axes do not broadcast, in half of the cases."""
    options = call.values["options"]
    if "mask" in options and draw(st.booleans()):
        x = options["mask"]
        options["mask"] = np.ascontiguousarray(np.broadcast_to(x, (*x.shape[:2], L, S)))
        call.by_blocks = True


def of_sequence(options, b, H, L, S):
    """What options say of sequence b, as the fields of `textbook.Sequence`."""
    rows, columns = _own(options.get("query_lengths", L), b), _own(options.get("key_lengths", S), b)
    left, right = options.get("window") or (None, None)
    causal = options.get("is_causal", False)
    if causal:
        right = 0
    offset = options.get("query_offset")
    if offset is None:
        offset = columns - rows if causal == "bottom-right" else 0
    else:
        offset = _own(offset, b)
    seen, distance = positions_and_visibility(L, S, offset, left, right, rows, columns)
    visible, fields = np.broadcast_to(seen, (H, L, S)).copy(), {}
    of = lambda x: np.broadcast_to(x, (max(b + 1, x.shape[0]), H, L, S))[b]  # noqa: E731
    if "mask" in options:
        visible &= of(options["mask"])
    if "bias" in options:
        fields["bias"] = of(options["bias"]).astype(np.float64)
        visible &= ~np.isneginf(fields["bias"])
    if "alibi_slopes" in options:
        fields |= {"slopes": options["alibi_slopes"], "distance": distance.astype(np.float64)}
    if "sinks" in options:
        fields["sinks"] = options["sinks"]
    i = np.arange(L) + offset
    if "mask_mod" in options:
        sees = np.vectorize(lambda h, i, j: options["mask_mod"](b, h, i, j, *options["mod_args"]), otypes=[bool])
        shown = sees(*np.ix_(np.arange(H), i, np.arange(S))) if visible.size else visible
        visible &= shown
    if "score_mod" in options:
        fields["rule"] = options["score_mod"], options["mod_args"], b, i
    if "dropout_p" in options:
        fields["kept"] = kept(options["dropout_p"], options["seed"], b, range(H), i, S)
    return {"visible": visible, "softcap": options.get("softcap"), "rows": np.arange(L) < rows, **fields}


def _own(x, b):
    """Return the number of sequence b, of one for all or one for each."""
    return int(x[b]) if np.ndim(x) else int(x)


def scale_of(scale, E):
    """The default as a caller computes it."""
    return scale if scale is not None else (1 / math.sqrt(E) if E else 1.0)
