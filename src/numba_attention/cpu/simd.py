"""Vectors of any width as LLVM IR: what the host has, and the few operations the kernels are built from.

The kernels keep a register block of vectors alive across a loop, which no auto-vectoriser does reliably: the same loops
in plain Python reach 24-56 % of sgemm, these over 100 % (docs/performance.md). Everything here runs while Numba builds
IR.
"""

from collections.abc import Callable, Sequence
from itertools import pairwise, zip_longest
from typing import Any, NamedTuple

import llvmlite.binding as llvm
import numpy as np
from llvmlite import ir
from numba import types
from numba.core import cgutils
from numba.extending import intrinsic

from .target import target

I8, I16, I32, I64 = (ir.IntType(n) for n in (8, 16, 32, 64))
F16, F32, F64 = ir.HalfType(), ir.FloatType(), ir.DoubleType()
Value = Any  # llvmlite is untyped
Builder = Any


class Host(NamedTuple):
    """What the target of Numba's compiler can do."""

    name: str
    bits: int  # width of a vector register
    registers: int
    fma: bool
    f16: bool  # converts float16 in hardware
    bf16_dot: bool  # AVX512_BF16: dot products of bfloat16 pairs


def detect(triple: str, cpu: str, features: str) -> Host:
    """Ask the code generator itself what it emits for this CPU, so that NUMBA_CPU_NAME needs no table of names."""
    if not triple.startswith(("x86_64", "i686", "amd64")):
        neon = triple.startswith(("aarch64", "arm64"))
        return Host("NEON" if neon else "generic", 128, 32 if neon else 16, neon, neon, False)
    module = ir.Module()
    module.triple = triple
    vector, half = ir.VectorType(F32, 16), ir.VectorType(F16, 8)
    function = ir.Function(module, ir.FunctionType(vector, [vector] * 3), "fma")
    b = ir.IRBuilder(function.append_basic_block())
    b.ret(call(b, "llvm.fma.v16f32", vector, *function.args))
    function = ir.Function(module, ir.FunctionType(ir.VectorType(F32, 8), [half]), "widen")
    b = ir.IRBuilder(function.append_basic_block())
    b.ret(b.fpext(function.args[0], ir.VectorType(F32, 8)))
    llvm.initialize_all_targets()
    llvm.initialize_all_asmprinters()
    machine = llvm.Target.from_triple(triple).create_target_machine(cpu=cpu, features=features)
    assembly = machine.emit_assembly(llvm.parse_assembly(str(module)))
    bits = 512 if "zmm" in assembly else 256 if "ymm" in assembly else 128
    # AVX512_BF16 is read from the feature list: code generation of its intrinsic aborts the process on other CPUs.
    # LLVM 15 (llvmlite 0.44) has the intrinsic with other types.
    dot = bits == 512 and "+avx512bf16" in features.split(",") and llvm.llvm_version_info[0] >= 17
    name = {512: "AVX-512", 256: "AVX2", 128: "SSE"}[bits]
    has_fma = "vfmadd" in assembly
    return Host(name, bits, 32 if bits == 512 else 16, has_fma, "vcvtph2ps" in assembly, dot)


class Vector:
    """Vectors of `width` float32 or float64, and the integer vectors of the same shape."""

    def __init__(self, bits: int, host: Host) -> None:
        self.bits = bits
        self.bytes = bits // 8
        self.width = host.bits // bits
        self.host = host
        self.element = F32 if bits == 32 else F64
        self.integer = I32 if bits == 32 else I64
        self.type = ir.VectorType(self.element, self.width)
        self.int_type = ir.VectorType(self.integer, self.width)
        self.numba_type = types.float32 if bits == 32 else types.float64
        self.dtype: type[np.floating[Any]] = np.float32 if bits == 32 else np.float64
        self.mantissa = 23 if bits == 32 else 52
        self.exponent_bias = 127 if bits == 32 else 1023

    def const(self, x: float) -> Value:
        return ir.Constant(self.type, [float(self.dtype(x))] * self.width)

    def iconst(self, x: int) -> Value:
        return ir.Constant(self.int_type, [x] * self.width)

    def load(self, b: Builder, p: Value, offset: int = 0) -> Value:
        return load(b, self.type, p, offset, align=self.bytes)

    def store(self, b: Builder, v: Value, p: Value, offset: int = 0) -> None:
        store(b, v, p, offset, align=self.bytes)

    def stream(self, b: Builder, v: Value, p: Value) -> None:
        """Store a whole vector past the caches: the memory is not read before, and nothing else leaves the caches.

        The address is a multiple of the vector's size. Other threads see the number after the next atomic operation of
        this one (`fetch_add`), and not by its order among other stores.
        """
        stored = b.store(v, b.bitcast(p, v.type.as_pointer()))
        stored.align = self.bytes * self.width
        stored.set_metadata("nontemporal", b.module.add_metadata([I32(1)]))

    def fma(self, b: Builder, x: Value, y: Value, z: Value) -> Value:
        if not self.host.fma:  # without hardware FMA, llvm.fma becomes a library call per lane
            return b.fadd(b.fmul(x, y), z)
        return call(b, f"llvm.fma.v{self.width}f{self.bits}", self.type, x, y, z)

    def max(self, b: Builder, x: Value, y: Value) -> Value:
        """The larger; y where either is NaN (this operand order is one maxps)."""
        return b.select(b.fcmp_ordered(">", x, y), x, y)

    def min(self, b: Builder, x: Value, y: Value) -> Value:
        """The smaller; y where either is NaN (this operand order is one minps)."""
        return b.select(b.fcmp_ordered("<", x, y), x, y)

    def abs(self, b: Builder, x: Value) -> Value:
        return call(b, f"llvm.fabs.v{self.width}f{self.bits}", self.type, x)

    def sum(self, b: Builder, x: Value) -> Value:
        """The sum of the lanes, by halves."""
        lanes = self.width
        while lanes > 1:
            lanes //= 2
            x = b.fadd(
                b.shuffle_vector(x, x, _indices(range(lanes))),
                b.shuffle_vector(x, x, _indices(range(lanes, 2 * lanes))),
            )
        return b.extract_element(x, I32(0))

    def splat(self, b: Builder, scalar: Value) -> Value:
        return splat(b, scalar, self.width)

    def bits_of(self, b: Builder, x: Value) -> Value:
        return b.bitcast(x, self.int_type)

    def from_bits(self, b: Builder, x: Value) -> Value:
        return b.bitcast(x, self.type)

    def transpose(self, b: Builder, rows: Sequence[Value]) -> list[Value]:
        """Transpose a width x width block held in `width` vectors, by butterflies of growing distance."""
        a = list(rows)
        n, step = self.width, 1
        while step < n:
            for i in range(n):
                if i & step:
                    continue
                x, y = a[i], a[i + step]
                a[i] = b.shuffle_vector(x, y, _indices([n + k - step if k & step else k for k in range(n)]))
                a[i + step] = b.shuffle_vector(x, y, _indices([n + k if k & step else k + step for k in range(n)]))
            step *= 2
        return a


def _indices(lanes: Sequence[int]) -> Value:
    return ir.Constant(ir.VectorType(I32, len(lanes)), list(lanes))


def splat(b: Builder, scalar: Value, width: int) -> Value:
    one = b.insert_element(ir.Constant(ir.VectorType(scalar.type, width), ir.Undefined), scalar, I32(0))
    return b.shuffle_vector(one, one, _indices([0] * width))


def pointer(b: Builder, address: Value) -> Value:
    return b.inttoptr(address, I8.as_pointer())


def at(b: Builder, p: Value, offset: int | Value) -> Value:
    """`offset` bytes past the byte pointer p."""
    return b.gep(p, [I64(offset) if isinstance(offset, int) else offset])


def load(b: Builder, ty: Value, p: Value, offset: int | Value = 0, align: int = 1) -> Value:
    # Explicit alignment: LLVM otherwise assumes that of the whole vector; arrays of callers are aligned to elements.
    value = b.load(b.bitcast(at(b, p, offset), ty.as_pointer()))
    value.align = align
    return value


def store(b: Builder, v: Value, p: Value, offset: int | Value = 0, align: int = 1) -> None:
    b.store(v, b.bitcast(at(b, p, offset), v.type.as_pointer())).align = align


def call(b: Builder, name: str, result: Value, *args: Value) -> Value:
    function = b.module.globals.get(name)
    if function is None:
        function = ir.Function(b.module, ir.FunctionType(result, [a.type for a in args]), name)
    return b.call(function, args)


def prefetch(b: Builder, p: Value) -> None:
    """Ask for the cache line at a byte pointer, which need not be valid, to be brought as near as the level 2 cache."""
    call(b, "llvm.prefetch.p0", ir.VoidType(), p, I32(0), I32(2), I32(1))


def keep_order(b: Builder) -> None:
    """Compiler barrier: no load moves across it, so that memory is read in the order of the source."""
    b.asm(ir.FunctionType(ir.VoidType(), []), "", "~{memory}", [], True)


def loop(
    b: Builder, n: Value, carried: Sequence[Value], body: Callable[[Value, list[Value]], Sequence[Value]]
) -> list[Value]:
    """Build ``for i in range(n): carried = body(i, carried)`` and return the last values; n may be 0."""
    before, block, after = b.block, b.append_basic_block("loop"), b.append_basic_block("done")
    b.cbranch(b.icmp_signed(">", n, I64(0)), block, after)
    b.position_at_end(block)
    i = b.phi(I64)
    i.add_incoming(I64(0), before)
    phis = [b.phi(c.type) for c in carried]
    new = body(i, phis)
    following = b.add(i, I64(1))
    i.add_incoming(following, b.block)
    for phi, first, later in zip(phis, carried, new, strict=True):
        phi.add_incoming(first, before)
        phi.add_incoming(later, b.block)
    last = b.block
    b.cbranch(b.icmp_signed("<", following, n), block, after)
    b.position_at_end(after)
    results = []
    for first, later in zip(carried, new, strict=True):
        phi = b.phi(first.type)
        phi.add_incoming(first, before)
        phi.add_incoming(later, last)
        results.append(phi)
    return results


def interleave(b: Builder, count: int, body: Callable[[int], Any]) -> list[Any]:
    """Build body(0) .. body(count - 1), which must not depend on one another, and let their instructions take turns.

    One after another, chains of 20 to 30 dependent instructions fill the scheduler of the processor before it sees the
    next chain (softcap: 11.7 cycles a vector on Zen 5 instead of 8.7); LLVM keeps the order.
    """
    block, marks, results = b.block, [len(b.block.instructions)], []
    for v in range(count):
        results.append(body(v))
        marks.append(len(block.instructions))
    assert b.block is block, "interleaved code has no branches"
    parts = [block.instructions[i:j] for i, j in pairwise(marks)]
    block.instructions[marks[0] :] = [x for turn in zip_longest(*parts) for x in turn if x is not None]
    return results


def in_two_stages(
    b: Builder, n: Value, row: Value, row_bytes: int, totals: Sequence[Value],
    begin: Callable[[Value, int], list[Value]], finish: Callable[[Value, int, list[Value], Value], Value],
    more: Value = None,
) -> list[Value]:  # fmt: skip
    """Build ``total[v] = finish(row, v, begin(row, v), total[v])`` for n rows of as many vectors as there are totals.

    The first stage of a row is computed beside the second one of the row before. A chain of instructions is then half
    as long, so that twice as much of what the processor's scheduler holds is ready (cycles a vector on Zen 5: softcap
    5.4 in place of 6.2, weights and their gradients 6.4 in place of 8.5). A single vector gains nothing by that, and
    its stages follow one another. If there is `more`, a row that lies there follows the others, of which there is at
    least one. `begin` reads the first row also where n is 0.
    """
    vectors = range(len(totals))
    is_staged = len(totals) > 1
    ahead = [x for v in vectors for x in begin(row, v)] if is_staged else []
    stages = len(ahead) // len(totals)

    def body(i: Value, carried: list[Value]) -> list[Value]:
        row, *rest = carried
        own, waiting = rest[: len(vectors)], rest[len(vectors) :]
        is_inside = b.icmp_signed("<", b.add(i, I64(1)), n)
        later = b.select(is_inside, at(b, row, row_bytes), row if more is None else more)

        def build(k: int) -> Any:
            v = k % len(vectors)
            if k >= len(vectors):
                return begin(later, v)
            values = waiting[v * stages : (v + 1) * stages] if is_staged else begin(row, v)
            return finish(row, v, values, own[v])

        built = interleave(b, (1 + is_staged) * len(vectors), build)
        return [later, *built[: len(vectors)], *(x for values in built[len(vectors) :] for x in values)]

    count = n if more is None else b.add(n, I64(1))
    return loop(b, count, [row, *totals, *ahead], body)[1 : 1 + len(vectors)]


def routine(arguments: str, build: Callable[..., Any], result: Any = types.void) -> Any:
    """Make a Numba intrinsic of int64 (and, written as ``name:f32``, other) arguments from an IR-building function."""
    kinds = {"f32": types.float32, "f64": types.float64}
    names = [a.partition(":") for a in arguments.split()]
    signature = result(*[kinds[kind] if kind else types.int64 for _, _, kind in names])

    def codegen(context: Any, builder: Builder, sig: Any, args: Sequence[Value]) -> Value:
        value = build(builder, *args)
        return context.get_dummy_value() if result is types.void else value

    listed = ", ".join(name for name, _, _ in names)
    scope = {"signature": signature, "codegen": codegen}
    exec(f"def op(typing_context, {listed}):\n    return signature, codegen", scope)
    op = intrinsic(scope["op"])
    op.build, op.signature = build, signature  # for tests that look at the code for other hosts
    return op


@intrinsic
def void_pointer(typing_context: Any, address: Any) -> Any:
    """The address as a pointer that `numba.carray` takes."""

    def codegen(context: Any, builder: Builder, sig: Any, args: Sequence[Value]) -> Value:
        return builder.inttoptr(args[0], cgutils.voidptr_t)

    return types.voidptr(types.int64), codegen


@intrinsic
def fetch_add(typing_context: Any, address: Any, n: Any) -> Any:
    """Atomically add n to the int64 at an address and return its previous value: the counter of work items.

    What a thread wrote before is seen by those that add after it.
    """

    def codegen(context: Any, builder: Builder, sig: Any, args: Sequence[Value]) -> Value:
        counter = builder.inttoptr(args[0], I64.as_pointer())
        return builder.atomic_rmw("add", counter, args[1], "seq_cst")

    return types.int64(types.int64, types.int64), codegen


@intrinsic
def compare_exchange(typing_context: Any, address: Any, old: Any, new: Any) -> Any:
    """Atomically replace the int64 at an address if it is `old`; whether it was."""

    def codegen(context: Any, builder: Builder, sig: Any, args: Sequence[Value]) -> Value:
        pointer = builder.inttoptr(args[0], I64.as_pointer())
        return builder.extract_value(builder.cmpxchg(pointer, args[1], args[2], "seq_cst", "seq_cst"), 1)

    return types.boolean(types.int64, types.int64, types.int64), codegen


@intrinsic
def fetch(typing_context: Any, address: Any) -> Any:
    """The int64 at an address, which others may change at any time."""

    def codegen(context: Any, builder: Builder, sig: Any, args: Sequence[Value]) -> Value:
        return builder.load_atomic(builder.inttoptr(args[0], I64.as_pointer()), "monotonic", 8)

    return types.int64(types.int64), codegen


@intrinsic
def pause(typing_context: Any) -> Any:
    """Tell the processor that this thread looks at a word again and again."""

    def codegen(context: Any, builder: Builder, sig: Any, args: Sequence[Value]) -> Value:
        if HOST.name == "NEON":
            call(builder, "llvm.aarch64.isb", ir.VoidType(), I32(15))
        elif HOST.name != "generic":
            call(builder, "llvm.x86.sse2.pause", ir.VoidType())
        return context.get_dummy_value()

    return types.void(), codegen


HOST = detect(*target())
