"""How numbers lie in memory: loads widen to the compute type, stores round back, by vector or one by one."""

from typing import Any, NamedTuple

from llvmlite import ir

from .simd import F16, I8, I16, I32, Builder, Value, Vector, load, splat, store


class Element(NamedTuple):
    """One storage type: a floating one, "bool" (False reads as -inf, True as 0), or one that a cache quantises to."""

    name: str
    size: int  # bytes

    def load(self, vector: Vector, b: Builder, p: Value) -> Value:
        """Load `vector.width` consecutive elements as compute values."""
        return self._widen(vector, b, load(b, self._type(vector.width), p, align=self.size), vector.width)

    def load_one(self, vector: Vector, b: Builder, p: Value) -> Value:
        return self._widen(vector, b, load(b, self._type(None), p, align=self.size), None)

    def store(self, vector: Vector, b: Builder, v: Value, p: Value) -> None:
        store(b, self._narrow(vector, b, v, vector.width), p, align=self.size)

    def store_one(self, vector: Vector, b: Builder, x: Value, p: Value) -> None:
        # Same rounding: a lone value is rounded by the vector instructions, which scalar code need not agree with.
        rounded = self._narrow(vector, b, splat(b, x, vector.width), vector.width)
        store(b, b.extract_element(rounded, I32(0)), p, align=self.size)

    def _type(self, width: int | None) -> Any:
        ty = {
            "float32": ir.FloatType(), "float64": ir.DoubleType(), "float16": F16, "bfloat16": I16,
            "bool": I8, "int8": I8, "float8_e4m3fn": I8,
        }[self.name]  # fmt: skip
        return ty if width is None else ir.VectorType(ty, width)

    def _widen(self, vector: Vector, b: Builder, x: Value, width: int | None) -> Value:
        target = vector.element if width is None else vector.type
        if self.name == "bool":
            hidden = ir.Constant(target, float("-inf") if width is None else [float("-inf")] * width)
            seen = ir.Constant(target, 0.0 if width is None else [0.0] * width)
            return b.select(b.icmp_signed("!=", x, ir.Constant(x.type, None)), seen, hidden)
        if self.name == "int8":
            return b.sitofp(x, target)
        if self.name in ("bfloat16", "float8_e4m3fn"):
            single = ir.FloatType() if width is None else ir.VectorType(ir.FloatType(), width)
            bits = bfloat16_bits(b, x, width) if self.name == "bfloat16" else float8_bits(b, x, width)
            x = b.bitcast(bits, single)
            if self.name == "float8_e4m3fn":
                rebias = 2.0**120  # exponent bias 7 (float8) to 127 (float32); makes subnormal numbers normal
                x = b.fmul(x, ir.Constant(single, rebias if width is None else [rebias] * width))
        return x if x.type == target else b.fpext(x, target)

    def _narrow(self, vector: Vector, b: Builder, x: Value, width: int) -> Value:
        if self.name == "bfloat16":
            return round_bfloat16(vector, b, x, width)
        target = self._type(width)
        return x if x.type == target else b.fptrunc(x, target)


def bfloat16_bits(b: Builder, x: Value, width: int | None) -> Value:
    """The float32 bit patterns of bfloat16 ones: 16 more zero bits below."""
    ty = I32 if width is None else ir.VectorType(I32, width)
    shift = ir.Constant(ty, 16 if width is None else [16] * width)
    return b.shl(b.zext(x, ty), shift)


def float8_bits(b: Builder, x: Value, width: int | None) -> Value:
    """Bit patterns of float32 numbers that are 2**-120 times float8_e4m3fn ones; caches store no NaN in this format."""
    ty = I32 if width is None else ir.VectorType(I32, width)

    def const(n: int) -> Value:
        return ir.Constant(ty, n if width is None else [n] * width)

    signs_and_rest = b.ashr(b.shl(b.zext(x, ty), const(24)), const(4))
    return b.and_(signs_and_rest, const(0x87F00000 - 2**32))


def round_bfloat16(vector: Vector, b: Builder, x: Value, width: int) -> Value:
    """Round float32 to nearest even on the upper 16 bits; NaN stays NaN."""
    ty = ir.VectorType(I32, width)

    def const(n: int) -> Value:
        return ir.Constant(ty, [n] * width)

    bits = b.bitcast(x, ty)
    odd = b.and_(b.lshr(bits, const(16)), const(1))
    rounded = b.lshr(b.add(bits, b.add(odd, const(0x7FFF))), const(16))
    result = b.select(b.fcmp_unordered("uno", x, x), const(0x7FC0), rounded)
    return b.trunc(result, ir.VectorType(I16, width))


_SIZES = {"float32": 4, "float64": 8, "float16": 2, "bfloat16": 2, "bool": 1, "int8": 1, "float8_e4m3fn": 1}
ELEMENTS = {name: Element(name, size) for name, size in _SIZES.items()}
