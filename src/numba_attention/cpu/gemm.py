"""The micro-kernel: C[r, :] (+)= sum_k A[r, k] B[k, :] on a block that stays in registers.

Both products of attention are this one loop. Queries lie in the lanes, so that keys and values are only ever read one
number at a time and broadcast, from wherever they are: scores S^T = K Q^T has A = keys, B = packed queries; the output
O^T += V^T P^T has A = values with the two strides swapped, B = the weights.
"""

from typing import Any

from llvmlite import ir

from .simd import I32, I64, Builder, Value, at, call, load, loop, pointer, routine, splat
from .spec import Spec


class _BFloat(ir.Type):
    """llvmlite has no bfloat type; as a leaf of vector types its spelling is all that is needed."""

    null = "0.0"
    intrinsic_name = "bf16"

    def _to_string(self) -> str:
        return "bfloat"

    def __eq__(self, other: object) -> bool:
        return isinstance(other, _BFloat)

    def __hash__(self) -> int:
        return hash(_BFloat)


BF32 = ir.VectorType(_BFloat(), 32)


def narrow(b: Builder, low: Value, high: Value) -> Value:
    """Round two vectors to bfloat16, one after the other: NaN stays NaN, subnormal numbers become 0 (AVX512_BF16)."""
    return call(b, "llvm.x86.avx512bf16.cvtne2ps2bf16.512", BF32, high, low)


def pack_pairs(b: Builder, low: Value, high: Value) -> Value:
    """Round two vectors to bfloat16 and interleave them into 32-bit words."""
    both = narrow(b, low, high)
    order = ir.Constant(ir.VectorType(I32, 32), [i // 2 + 16 * (i % 2) for i in range(32)])
    return b.bitcast(b.shuffle_vector(both, both, order), ir.VectorType(I32, 16))


def micro_kernel(spec: Spec, role: str, block: tuple[int, int] | None = None) -> Any:
    """Make ``mm(c, c_stride, a, a_row, a_k, rows, b, b_stride, k, x)``; addresses and strides in bytes.

    Role "product": C = A B.
    Role "scores": C = A B, and the vectors at x become the maximum of themselves and of the rows of C.
    Role "output": C = C * (vectors at x) + A B.
    Role "first output": the same, or C = A B + 0 where x is 0.
    Role "sum": C = C + A B.

    With fewer than MR `rows` the last one stands in for the missing: C is computed whole (the scratch has room), and
    nothing beyond A is read. Where the spec has bfloat16 dot products, A and B hold pairs along k in 32-bit words.
    """
    bf16_dot, vector = spec.bf16_dot, spec.vector
    MR, NV = block or spec.block
    width = vector.bytes * vector.width

    def multiply_add(b: Builder, acc: Value, a: Value, row: Value) -> Value:
        if bf16_dot:
            args = (acc, b.bitcast(a, BF32), b.bitcast(row, BF32))
            return call(b, "llvm.x86.avx512bf16.dpbf16ps.512", vector.type, *args)
        return vector.fma(b, a, row, acc)

    operand = I32 if bf16_dot else vector.element
    operands = ir.VectorType(operand, vector.width)
    align = 2 if bf16_dot else vector.bytes

    def build(
        b: Builder, c: Value, c_stride: Value, a: Value, a_row: Value, a_k: Value, rows: Value,
        b_: Value, b_stride: Value, k: Value, x: Value,
    ) -> None:  # fmt: skip
        pc, pa, pb, px = (pointer(b, p) for p in (c, a, b_, x))
        last = b.sub(rows, I64(1))
        row_offset = []
        for r in range(MR):
            clamped = b.select(b.icmp_signed("<", I64(r), last), I64(r), last)
            row_offset.append(b.mul(clamped, a_row))
        c_row = [at(b, pc, b.mul(c_stride, I64(r))) for r in range(MR)]
        xs = [vector.load(b, px, v * width) for v in range(NV)] if role in ("scores", "output") else []
        begins = role == "first output"
        start = [vector.const(0.0)] * (MR * NV)

        def body(i: Value, carried: list[Value]) -> list[Value]:
            qa, qb, *acc = carried
            row = [load(b, operands, qb, v * width, align=align) for v in range(NV)]
            new = []
            for r in range(MR):
                scalar = splat(b, load(b, operand, qa, row_offset[r], align=align), vector.width)
                new += [multiply_add(b, acc[r * NV + v], scalar, row[v]) for v in range(NV)]
            return [at(b, qa, a_k), at(b, qb, b_stride), *new]

        _, _, *acc = loop(b, k, [pa, pb, *start], body)

        def finish(first: bool) -> None:
            factors = [vector.load(b, px, v * width) for v in range(NV)] if begins and not first else xs
            for r in range(MR):
                for v in range(NV):
                    c_new = acc[r * NV + v]
                    if first:
                        c_new = b.fadd(c_new, vector.const(0.0))  # -0.0 becomes 0.0, as where it is added
                    elif role in ("output", "first output"):
                        # Blocked summation: the accumulator starts at 0 and is added to C after the loop. Rounding
                        # errors then grow with the number of tiles, not of keys (a third of the error over 4096 keys),
                        # at no cost.
                        c_new = vector.fma(b, vector.load(b, c_row[r], v * width), factors[v], c_new)
                    elif role == "sum":
                        c_new = b.fadd(vector.load(b, c_row[r], v * width), c_new)
                    vector.store(b, c_new, c_row[r], v * width)

        if begins:
            with b.if_else(b.icmp_signed("==", x, I64(0))) as (then, otherwise):
                with then:
                    finish(True)
                with otherwise:
                    finish(False)
        else:
            finish(False)
        if role == "scores":
            for v in range(NV):
                highest = xs[v]
                for r in range(MR):
                    highest = vector.max(b, acc[r * NV + v], highest)
                vector.store(b, highest, px, v * width)

    return routine("c c_stride a a_row a_k rows b b_stride k x", build)
