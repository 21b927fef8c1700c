"""Writes rows of numbers to a cache: as they are, rounded to a half type, or as 8-bit codes with a scale for each row.

A warp owns a row, the features of one token and head. What is stored has the bits that a cache on the host has:
`caches.storage.Storage.encode` says what they are.
"""

import numpy as np

from .emit import I32, I64, Emit, KernelFunction, Real, Regs, Target
from .formats import HALVES, KINDS, SIZES, read
from .spec import Spec

LIMITS = {"int8": 127.0, "float8_e4m3fn": 448.0}  # largest codes
_LARGEST = {"float16": 65504.0, "bfloat16": float.fromhex("0x1.fep127")}
_MOST = float(np.finfo(np.float32).max) * (1 - 2**-22)  # that limit times scale may be
_TINY = float(np.finfo(np.float32).tiny)
_SIGNS = {"i": 0x7FFFFFFF, "l": 0x7FFFFFFFFFFFFFFF}  # all bits but the sign

# Of keys and of values: addresses of the source, of the target and of its scales, their strides, and how many features.
SIDE = (
    "source", "target", "scale", "source_sequence", "source_head", "source_token", "source_column", "target_row",
    "target_head", "target_place", "target_column", "scale_row", "scale_head", "scale_place", "features",
)  # fmt: skip
# Of both: the address of a list of (sequence, token, row, place) as int32, or 0; then token t of sequence n goes to
# place t of row n, and each sequence has `each` tokens.
COMMON = ("list", "heads", "tokens", "each")
INTEGERS = (*(f"{side}_{name}" for side in ("key", "value") for name in SIDE), *COMMON)
ADDRESSES = tuple(n for n, name in enumerate(INTEGERS) if name.endswith(("_source", "_target", "_scale", "list")))
INTS = f"l{len(INTEGERS)}"
AT_ONCE = 4  # elements of a lane in flight


def make_append(c: Spec, on: Target) -> KernelFunction:
    """Make the kernel: from numbers of ``c.storage`` to ``c.to``; its grid is rows by warps, and keys and values.

    ``c.aligned``: rows begin at multiples of 16 bytes, have no gaps, and are copied as they are, four words at a time.
    """
    cuda, macro = on.cuda, on.macro
    of, to, warps = c.storage, c.to, c.warps
    kind = "d" if of == "float64" else "f"
    scaled, wide = to in LIMITS and of != to, c.aligned
    each = 4 if wide else 1  # elements of one load
    per_turn = 32 * AT_ONCE * each
    bits = {"f": "i", "d": "l"}[kind]

    def number(n: Regs, name: str, e: Emit, side: I32) -> I64:
        of_keys, of_values = (n[INTEGERS.index(f"{which}_{name}")] for which in ("key", "value"))
        return e.select(side > 0, of_values, of_keys)

    def places(e: Emit, lane: I32, turn: I32) -> list[I32]:
        """The features that a lane has in a turn."""
        return [(turn * (32 * AT_ONCE) + (lane + 32 * m)) * each for m in range(AT_ONCE)]

    @macro("i", INTS, "i")
    def turns(e: Emit, n: Regs, side: I32) -> I32:
        return (e.narrow(number(n, "features", e, side)) + (per_turn - 1)) // per_turn

    @macro("l l l i", INTS, "i", "i", "i")
    def find(e: Emit, n: Regs, x: I32, side: I32, thread: I32) -> tuple[I64, I64, I64, I32]:
        """Where the row is read, where it and its scale are written, and its features: none where there is no row."""
        listed, heads, tokens, of_each = (n[INTEGERS.index(name)] for name in COMMON)
        index = x * warps + (thread >> 5)
        token, head = index // e.narrow(heads), index % e.narrow(heads)
        inside = token < e.narrow(tokens)
        token = e.select(inside, token, token - token)
        entry = e.load("i", listed + e.wide(token) * 16, 4, where=listed > 0)
        per = e.narrow(of_each)
        plain = [token // per, token % per, token // per, token % per]
        sequence, t, row, place = (e.wide(e.select(listed > 0, a, b)) for a, b in zip(entry, plain, strict=True))

        def at(name: str, *terms: tuple[str, I64]) -> I64:
            address = number(n, name, e, side)
            for axis, index in terms:
                address = address + index * number(n, f"{name}_{axis}", e, side)
            return address

        of_head, features = e.wide(head), e.narrow(number(n, "features", e, side))
        source = at("source", ("sequence", sequence), ("head", of_head), ("token", t))
        target = at("target", ("row", row), ("head", of_head), ("place", place))
        scale = at("scale", ("row", row), ("head", of_head), ("place", place))
        return source, target, scale, e.select(inside, features, features - features)

    @macro("", INTS, "i", "l", "l", "i", "i", "i")
    def copy(e: Emit, n: Regs, side: I32, source: I64, target: I64, features: I32, thread: I32, turn: I32) -> None:
        """Store numbers of a row, of a type that has no scale."""
        columns = [number(n, f"{name}_column", e, side) for name in ("source", "target")]
        found = []
        for place in places(e, thread & 31, turn):
            inside, (a, b) = place < features, (address + e.wide(place) * step for address, step in
                                                zip((source, target), columns, strict=True))  # fmt: skip
            if wide:
                found.append((inside, b, e.load("i", a, 4, where=inside)))
            elif of == to:
                found.append((inside, b, [e.load(KINDS[of], a, where=inside)]))
            else:
                found.append((inside, b, [read(e, of, a, inside)]))
        for inside, b, x in found:
            if wide:
                e.store("i", b, x, inside)
            else:
                e.store(KINDS[to], b, x if of == to else [rounded(e, x[0])], inside)

    def rounded(e: Emit, x: Real) -> I32:
        """The bits of a number in a half type; finite numbers beyond its range become its largest one."""
        most = _LARGEST[to]
        clipped = e.max(e.min(x, most), e.const(x.kind, -most))
        x = e.select(e.is_finite(x), clipped, x)
        return e.to_half(HALVES[to], e.convert("f", x) if to == "bfloat16" else x)

    @macro(bits, INTS, "i", "l", "i", "i", "i", bits)
    def largest(
        e: Emit, n: Regs, side: I32, source: I64, features: I32, thread: I32, turn: I32, most: I64
    ) -> I64:  # fmt: skip
        """The largest magnitude of a row so far, as bits, of which those of NaN are the largest."""
        step, found = number(n, "source_column", e, side), []
        for place in places(e, thread & 31, turn):
            inside = place < features
            found.append(read(e, of, source + e.wide(place) * step, inside))
        for x in found:
            most = e.max(most, e.bits(bits, x) & _SIGNS[bits])
        return most

    @macro(f"{kind} i", "l", "i", "i", bits)
    def find_scale(e: Emit, scale: I64, features: I32, thread: I32, most: I64) -> tuple[Real, I32]:
        """Store the scale of a row; return what to divide by, and whether the row can be read again."""
        for distance in (16, 8, 4, 2, 1):
            if bits == "l":  # doubles are what a warp exchanges in 64 bits
                most = e.max(most, e.bits("l", e.shuffle_xor(e.bits("d", most), distance)))
            else:
                most = e.max(most, e.shuffle_xor(most, distance))
        top, limit = e.bits(kind, most), e.const(kind, LIMITS[to])
        found = e.min(e.max(top / limit, e.const(kind, _TINY)), e.const(kind, float(np.float32(_MOST / LIMITS[to]))))
        factor, finite, some = e.convert("f", found), e.is_finite(top), top > 0.0
        zero, one = e.const("f", 0.0), e.const(kind, 1.0)
        stored = e.select(finite, e.select(some, factor, zero), e.const("f", float("nan")))
        e.store("f", scale, [stored], (features > 0) & (thread & 31).equals(0))
        divisor = e.select(some & finite, e.convert(kind, factor), one)
        return divisor, e.select(finite, e.const("i", 1), e.const("i", 0))

    @macro("", INTS, "i", "l", "l", "i", "i", "i", kind, "i")
    def encode(
        e: Emit, n: Regs, side: I32, source: I64, target: I64, features: I32, thread: I32, turn: I32, scale: Real,
        finite: I32,
    ) -> None:  # fmt: skip
        """Store the codes of numbers of a row."""
        columns, limit = [number(n, f"{name}_column", e, side) for name in ("source", "target")], LIMITS[to]
        found = []
        for place in places(e, thread & 31, turn):
            inside = place < features
            found.append((place, inside, read(e, of, source + e.wide(place) * columns[0], inside)))
        for place, inside, x in found:
            x = e.max(e.min(x / scale, limit), e.const(kind, -limit))
            if to == "int8":
                code = e.convert("i", e.library("rint", x))
            else:
                code = to_float8(e, e.convert("f", x))
            code = e.select(finite > 0, code, code - code)
            e.store("b", target + e.wide(place) * columns[1], [code], inside)

    @macro(bits)
    def zero(e: Emit) -> I64:
        return e.const(bits, 0)

    if scaled:

        def kernel(integers, reals):  # type: ignore[no-untyped-def]
            thread, side = np.int32(cuda.threadIdx.x), np.int32(cuda.blockIdx.y)
            source, target, scale, features = find(integers, np.int32(cuda.blockIdx.x), side, thread)
            count = turns(integers, side)
            most = zero()
            for turn in range(count):
                most = largest(integers, side, source, features, thread, np.int32(turn), most)
            factor, finite = find_scale(scale, features, thread, most)
            for turn in range(count):
                encode(integers, side, source, target, features, thread, np.int32(turn), factor, finite)
    else:

        def kernel(integers, reals):  # type: ignore[no-untyped-def]
            thread, side = np.int32(cuda.threadIdx.x), np.int32(cuda.blockIdx.y)
            source, target, _, features = find(integers, np.int32(cuda.blockIdx.x), side, thread)
            for turn in range(turns(integers, side)):
                copy(integers, side, source, target, features, thread, np.int32(turn))

    return kernel


def to_float8(e: Emit, x: Real) -> I32:
    """The 8 bits of e4m3fn of a float32 of at most 448, rounded to nearest even.

    A number of at least 2^-6 has 4 significant bits, and smaller ones are multiples of 2^-9. The sum with 1.5 x 2^23
    times the last bit rounds to it. Times the ratio of the exponent biases, the bits are those of the code.
    """
    exponent = e.max(e.bits("i", x) & 0x7F800000, 121 << 23)  # of 2^-6 at least
    magic = e.bits("f", exponent + (20 << 23)) * 1.5
    rounded = (x + magic) - magic
    word = e.bits("i", rounded * 2.0**-120)
    return ((e.bits("i", x) >> 24) & 0x80) | ((word >> 20) & 0x7F)


def element_storage(size: int) -> str:
    """The type as which numbers of a size are copied as they are."""
    return {SIZES[name]: name for name in ("int8", "float16", "float32", "float64")}[size]


__all__ = ["ADDRESSES", "COMMON", "INTEGERS", "LIMITS", "SIDE", "element_storage", "make_append"]
