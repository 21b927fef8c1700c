"""How numbers are held in memory: sizes, the kinds they are read as, and what their bits say."""

from .emit import I32, I64, Emit, Pred, Regs, Value

KINDS = {
    "bool": "b", "float32": "f", "float64": "d", "float16": "h", "bfloat16": "h", "int8": "b", "float8_e4m3fn": "b",
}  # fmt: skip
SIZES = {"bool": 1, "float32": 4, "float64": 8, "float16": 2, "bfloat16": 2, "int8": 1, "float8_e4m3fn": 1}
HALVES = {"float16": "f16", "bfloat16": "bf16"}


def read(e: Emit, storage: str, address: I64, in_bounds: Pred) -> Value:
    """Load an element of an array in global memory where it is in bounds; one of less than 32 bits becomes float32."""
    return number(e, storage, e.load(KINDS[storage], address, where=in_bounds))


def read_pair(e: Emit, storage: str, address: I64, in_bounds: Pred) -> Regs:
    """Load an element and its neighbour as `read` does, in one instruction; the first is at an even element."""
    if storage in HALVES:
        return list(e.unpack(HALVES[storage], e.load("i", address, where=in_bounds)))
    if SIZES[storage] == 1:
        word = e.load("h", address, where=in_bounds)
        return [number(e, storage, x) for x in (word & 0xFF, word >> 8)]
    return e.load(KINDS[storage], address, 2, where=in_bounds)


def number(e: Emit, storage: str, x: Value) -> Value:
    """The value of an element that was loaded as its kind."""
    if storage in HALVES:
        return e.unpack(HALVES[storage], x)[0]
    if storage == "int8":
        # As the low bits of 2**23, less 2**23 + 128: conversions of integers are a quarter as fast as additions.
        return e.bits("f", x ^ 0x4B000080) - (2.0**23 + 128)
    if storage == "float8_e4m3fn":  # as bits of a float32, times the ratio of the exponent biases
        return e.bits("f", ((x & 0x80) << 24) | ((x & 0x7F) << 20)) * 2.0**120  # caches store no NaN
    return x


def numbers(e: Emit, storage: str, word: I32) -> Regs:
    """The numbers in 32 bits: two of 16, or four of 8."""
    if storage in HALVES:
        return list(e.unpack(HALVES[storage], word))
    return [number(e, storage, (word >> shift) & 0xFF) for shift in (0, 8, 16, 24)]
