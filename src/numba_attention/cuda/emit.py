"""The language of macros: registers with Python's operators, and one method per instruction.

A macro is a Python function that computes with the registers of one thread. `Emit` here makes LLVM IR of it, with
loops over registers unrolled by Python itself, whatever the compiler thinks of them. `emulator.Emit` in the tests has
the same methods and runs the same function on NumPy arrays, one element for each thread of a block.

Integers are signed and of 32 bits ("i"), or of 64 for addresses ("l"); ``//``, ``%`` and ``>>`` are those of numbers
that are not negative.
"""

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple, Protocol, TypeAlias, overload

from llvmlite import ir

from .emit_warpgroup import Warpgroup

TYPES = {
    "i": ir.IntType(32), "l": ir.IntType(64), "f": ir.FloatType(), "d": ir.DoubleType(), "p": ir.IntType(1),
    "h": ir.IntType(16), "b": ir.IntType(8),
}  # fmt: skip
SIZES = {"i": 4, "l": 8, "f": 4, "d": 8, "h": 2, "b": 1}
_PTX = {"i": "b32", "l": "b64", "f": "f32", "d": "f64", "h": "b16"}
_ZEROS = {"f": "0f00000000", "d": "0d0000000000000000"}


Operand: TypeAlias = "Value | float"


class Value:
    """A register: what LLVM knows as a value, and what it is ("i", "l", "f", "d", or "p" for a predicate)."""

    __slots__ = ("b", "kind", "llvm")

    def __init__(self, b: ir.IRBuilder, kind: str, llvm: Any) -> None:
        self.b, self.kind, self.llvm = b, kind, llvm

    def _other(self, other: Operand) -> Any:
        if isinstance(other, Value):
            if other.kind != self.kind:
                raise TypeError(f"{self.kind} and {other.kind} do not mix")
            return other.llvm
        return ir.Constant(TYPES[self.kind], other)

    def _apply(self, name: str, other: Operand) -> "Value":
        operation = getattr(self.b, ("f" if self.kind in "fd" else "") + name)
        return Value(self.b, self.kind, operation(self.llvm, self._other(other)))

    def _compare(self, sign: str, other: Operand) -> "Value":
        compare = self.b.fcmp_ordered if self.kind in "fd" else self.b.icmp_signed
        return Value(self.b, "p", compare(sign, self.llvm, self._other(other)))

    def _as(self, other: Operand) -> "Value":
        return Value(self.b, self.kind, self._other(other))

    def __add__(self, other: Operand) -> "Value":
        return self._apply("add", other)

    def __sub__(self, other: Operand) -> "Value":
        return self._apply("sub", other)

    def __rsub__(self, other: Operand) -> "Value":
        return self._as(other)._apply("sub", self)

    def __mul__(self, other: Operand) -> "Value":
        return self._apply("mul", other)

    def __truediv__(self, other: Operand) -> "Value":
        return self._apply("div", other)

    def __floordiv__(self, other: Operand) -> "Value":
        return self._apply("udiv", other)

    def __mod__(self, other: Operand) -> "Value":
        return self._apply("urem", other)

    def __and__(self, other: Operand) -> "Value":
        return self._apply("and_", other)

    def __or__(self, other: Operand) -> "Value":
        return self._apply("or_", other)

    def __xor__(self, other: Operand) -> "Value":
        return self._apply("xor", other)

    def __rshift__(self, other: Operand) -> "Value":
        return self._apply("lshr", other)

    def __lshift__(self, other: Operand) -> "Value":
        return self._apply("shl", other)

    def __lt__(self, other: Operand) -> "Value":
        return self._compare("<", other)

    def __le__(self, other: Operand) -> "Value":
        return self._compare("<=", other)

    def __gt__(self, other: Operand) -> "Value":
        return self._compare(">", other)

    def __ge__(self, other: Operand) -> "Value":
        return self._compare(">=", other)

    def equals(self, other: Operand) -> "Value":
        return self._compare("==", other)

    __radd__, __rmul__ = __add__, __mul__


# What a register holds; all are a `Value`, which knows its kind when a macro runs.
I32: TypeAlias = Value  # an integer, such as an index, a position or an address in shared memory
I64: TypeAlias = Value  # an integer, such as an address in global memory or the distance of two
Real: TypeAlias = Value  # a floating-point number of the kind that the kernel computes with
Pred: TypeAlias = Value  # a predicate
Regs: TypeAlias = list[Value]  # registers of one kind, such as the elements of a tile that a thread holds

KernelFunction: TypeAlias = Callable[..., None]  # the Python function of a kernel
Macro: TypeAlias = Callable[..., Any]  # what a kernel calls: a body that a `Target` has decorated


class Packed(NamedTuple):
    """Groups of registers that a macro has as one Python object, and a kernel as one tuple of tuples."""

    groups: tuple[str, ...]  # as "f8": 8 registers of float32
    unpack: Callable[..., Any]  # the object, from an `Emit` and the groups
    pack: Callable[[Any], Sequence[Any]]  # the groups of an object


Kind = str | Packed  # of an argument or a result of a macro: "i", "f8" or an object


def kinds_of(result: Kind | tuple[Kind, ...]) -> tuple[Kind, ...]:
    """The kinds of the results of a macro: a string names as many as it has words."""
    if isinstance(result, Packed):
        return (result,)
    return tuple(result.split()) if isinstance(result, str) else result


class Target(Protocol):
    """What a kernel is made for: `toolchain.Intrinsics`, or what runs its macros without a GPU."""

    @property
    def cuda(self) -> Any:
        """The module ``numba.cuda``, or what stands for it."""

    def macro(self, result: Kind | tuple[Kind, ...], *arguments: Kind) -> Callable[[Callable[..., Any]], Macro]:
        """Decorate the body of a macro: the kinds of its results, and of its arguments."""

    def shared(self) -> Any:
        """Make the function that gives the address of shared memory."""


class Emit(Warpgroup):
    """Emits LLVM IR for one thread; see the module."""

    def __init__(self, context: Any, builder: ir.IRBuilder) -> None:
        self._context, self._b = context, builder

    # Numbers.

    def const(self, kind: str, x: float) -> Value:
        return Value(self._b, kind, ir.Constant(TYPES[kind], x))

    def select(self, condition: Value, a: Value, b: Value) -> Value:
        return Value(self._b, a.kind, self._b.select(condition.llvm, a.llvm, b.llvm))

    def min(self, a: Value, b: Operand) -> Value:
        other = a._as(b)
        return self.select(a < other, a, other)

    def max(self, a: Value, b: Operand) -> Value:
        """The larger of two; of floating-point numbers the one that is not NaN."""
        other = a._as(b)
        if a.kind == "f":
            return self._asm("max.f32 $0, $1, $2;", "=f,f,f", [a, other], "f")
        if a.kind == "d":
            return self._asm("max.f64 $0, $1, $2;", "=d,d,d", [a, other], "d")
        return self.select(a > other, a, other)

    def at_most(self, x: Value, limit: float, native: bool) -> Value:
        """The number or, if it is larger, a limit; NaN stays NaN. `native`: in one instruction, from sm_80 on."""
        most = self.const(x.kind, limit)
        if native and x.kind == "f":
            return self._asm("min.NaN.f32 $0, $1, $2;", "=f,f,f", [x, most], "f")
        return self.select(x > most, most, x)

    def wide(self, x: Value) -> Value:
        """64 bits, of 32 with their sign."""
        return Value(self._b, "l", self._b.sext(x.llvm, TYPES["l"]))

    def narrow(self, x: Value) -> Value:
        return Value(self._b, "i", self._b.trunc(x.llvm, TYPES["i"]))

    def convert(self, kind: str, x: Value) -> Value:
        """Between integers, "f" and "d", by value; to 32 bits towards zero, as near as they come, and 0 for NaN."""
        if kind == x.kind:
            return x
        if x.kind in "il":
            return Value(self._b, kind, self._b.sitofp(x.llvm, TYPES[kind]))
        if kind == "i":
            whole = self._asm(f"cvt.rzi.s32.{_PTX[x.kind]} $0, $1;", f"=r,{x.kind}", [x], "i")
            return self.select(self.is_nan(x), self.const("i", 0), whole)
        step = self._b.fpext if kind == "d" else self._b.fptrunc
        return Value(self._b, kind, step(x.llvm, TYPES[kind]))

    def multiply_wide(self, x: Value, constant: int) -> tuple[Value, Value]:
        """The high and the low half of the product of two integers of 32 bits without sign."""
        wide = [self._b.zext(y, TYPES["l"]) for y in (x.llvm, x._other(constant))]
        product = self._b.mul(*wide)
        high = self._b.lshr(product, ir.Constant(TYPES["l"], 32))
        return tuple(Value(self._b, "i", self._b.trunc(half, TYPES["i"])) for half in (high, product))  # type: ignore[return-value]

    def bits(self, kind: str, x: Value) -> Value:
        """The same bits as another kind of the same size."""
        return Value(self._b, kind, self._b.bitcast(x.llvm, TYPES[kind]))

    def fma(self, a: Value, b: Value, c: Value) -> Value:
        suffix, letter = ("f32", "f") if a.kind == "f" else ("f64", "d")
        code = f"fma.rn.{suffix} $0, $1, $2, $3;"
        return self._asm(code, f"={letter},{letter},{letter},{letter}", [a, b, c], a.kind)

    def times(self, a: Value, b: Value) -> Value:
        """The product, kept in program order: the compiler would sink that of float32 below the next barrier."""
        return self._asm("mul.rn.f32 $0, $1, $2;", "=f,f,f", [a, b], "f", effect=True) if a.kind == "f" else a * b

    def exp2(self, x: Value) -> Value:
        if x.kind == "f":
            return self._asm("ex2.approx.ftz.f32 $0, $1;", "=f,f", [x], "f")
        return self._library("exp2", x)

    def log2(self, x: Value) -> Value:
        return self._library("log2", x)

    def tanh(self, x: Value) -> Value:
        return self._library("tanh", x)

    def abs(self, x: Value) -> Value:
        return self._library("fabs", x)

    def library(self, name: str, x: Value) -> Value:
        """A function of one real number by its name in NumPy: sqrt, exp, exp2, log, log2, tanh, floor, ceil, ...."""
        return self._library(name, x)

    def opaque(self, x: Value) -> Value:
        """Optimization barrier: hides the value so that what depends on it is rematerialized, not kept in registers."""
        return self._asm("mov.b32 $0, $1;", "=r,r", [x], x.kind, effect=True)

    # Half types, two in 32 bits.

    def pack(self, dtype: str, low: Value, high: Value) -> Value:
        """Round two float32 to "f16" or "bf16"."""
        if dtype == "bf16":
            return self._asm("cvt.rn.bf16x2.f32 $0, $2, $1;", "=r,f,f", [low, high], "i")
        code = "{ .reg .b16 l, h; cvt.rn.f16.f32 l, $1; cvt.rn.f16.f32 h, $2; mov.b32 $0, {l, h}; }"
        return self._asm(code, "=r,f,f", [low, high], "i")  # becomes cvt.rn.f16x2.f32 from sm_80 on

    def unpack(self, dtype: str, x: Value) -> tuple[Value, Value]:
        if dtype == "bf16":
            return self.bits("f", x << 16), self.bits("f", x & -65536)
        code = "{ .reg .b16 l, h; mov.b32 {l, h}, $2; cvt.f32.f16 $0, l; cvt.f32.f16 $1, h; }"
        low, high = self._asm_many(code, "=f,=f,r", [x], "ff")
        return low, high

    def to_half(self, dtype: str, x: Value) -> Value:
        """The 16 bits of a rounded float32 (f16: or float64), in 32; bf16 by integers, which need no sm_80."""
        if dtype == "f16":
            code = f"{{ .reg .b16 l; cvt.rn.f16.{_PTX[x.kind]} l, $1; cvt.u32.u16 $0, l; }}"
            return self._asm(code, f"=r,{x.kind}", [x], "i")
        bits = self.bits("i", x)
        rounded = (bits + 0x7FFF + ((bits >> 16) & 1)) >> 16
        return self.select(self.is_nan(x), self.const("i", 0x7FC0), rounded)

    def subtract_pair(self, dtype: str, a: Value, b: Value) -> Value:
        """Subtract two half types in 32 bits from two others."""
        if dtype == "f16":
            return self._asm("sub.rn.f16x2 $0, $1, $2;", "=r,r,r", [a, b], "i")
        return self._asm("fma.rn.bf16x2 $0, $1, $3, $2;", "=r,r,r,r", [b, a, self.const("i", -0x407F4080)], "i")

    def multiply_pair(self, dtype: str, a: Value, b: Value) -> Value:
        """Multiply two half types in 32 bits by two others."""
        if dtype == "f16":
            return self._asm("mul.rn.f16x2 $0, $1, $2;", "=r,r,r", [a, b], "i")
        return self._asm("fma.rn.bf16x2 $0, $1, $2, $3;", "=r,r,r,r", [a, b, self.const("i", -0x7FFF8000)], "i")

    def is_nan(self, x: Value) -> Value:
        return Value(self._b, "p", self._b.fcmp_unordered("uno", x.llvm, x.llvm))

    def is_finite(self, x: Value) -> Value:
        """Tests the exponent in integers, which holds under fast-math assumptions about NaN too."""
        if x.kind == "f":
            return (self.bits("i", x) & 0x7F800000) < 0x7F800000
        return (self.bits("l", x) & 0x7FF0000000000000) < 0x7FF0000000000000

    # Memory. Addresses are of 64 bits in global memory and of 32 in shared memory.

    @overload
    def load(self, kind: str, address: I64, *, where: Pred | None = None) -> Value: ...

    @overload
    def load(self, kind: str, address: I64, count: int, where: Pred | None = None) -> Regs: ...

    def load(self, kind: str, address: I64, count: int | None = None, where: Pred | None = None) -> Value | Regs:
        """Read one number, or a list of 1, 2 or 4 neighbours; "h" (16 bits) and "b" (8) come as 32.

        Where a predicate does not hold they are zeros, and memory is not read.
        """
        return self._load("global", "l", kind, address, count, where)

    def load_constant(self, kind: str, address: Value) -> Value:
        """Read through the read-only cache what no kernel writes; the compiler may drop or move the load."""
        register = {"i": "r", "l": "l", "f": "f", "d": "d", "b": "r"}[kind]
        unit = "u8" if kind == "b" else _PTX[kind]
        result = "i" if kind == "b" else kind
        return self._asm(f"ld.global.nc.{unit} $0, [$1];", f"={register},l", [address], result)

    @overload
    def load_shared(self, kind: str, address: I32) -> Value: ...

    @overload
    def load_shared(self, kind: str, address: I32, count: int) -> Regs: ...

    def load_shared(self, kind: str, address: I32, count: int | None = None) -> Value | Regs:
        return self._load("shared", "r", kind, address, count, None)

    def store(self, kind: str, address: Value, values: Sequence[Value], where: Value) -> None:
        """Write 1, 2 or 4 neighbours where a predicate holds; "h" takes the low 16 bits of 32, and "b" the low 8."""
        self._store("global", "l", kind, address, values, where)

    def store_shared(self, kind: str, address: Value, values: Sequence[Value], where: Value | None = None) -> None:
        self._store("shared", "r", kind, address, values, where)

    def add(self, address: Value, values: Sequence[Value], where: Value | None, together: bool) -> None:
        """Atomically add float32 to neighbours in global memory; two `together`, in one instruction, from sm_90 on."""
        if together and len(values) == 2:
            return self._predicated("red.global.add.v2.f32 [$0], {$1,$2};", "l,f,f", [address, *values], where)
        for n, x in enumerate(values):
            self._predicated("red.global.add.f32 [$0], $1;", "l,f", [address + 4 * n, x], where)

    def add_anywhere(self, address: Value, x: Value, where: Value) -> None:
        """Atomically add a number in global memory, where others may add to the same one."""
        suffix, letter = ("f32", "f") if x.kind == "f" else ("f64", "d")
        self._predicated(f"red.global.add.{suffix} [$0], $1;", f"l,{letter}", [address, x], where)

    def copy_async(
        self, shared: Value, address: Value, size: Value, where: Value | None = None, width: int = 16
    ) -> None:
        """Copy `size` (0 to `width`) bytes of 4, 8 or 16 from global memory to shared memory, zeros for the rest."""
        level = "cg" if width == 16 else "ca"
        code = f"cp.async.{level}.shared.global [$0], [$1], {width}, $2;"
        self._predicated(code, "r,l,r", [shared, address, size], where)

    def commit(self) -> None:
        self._effect("cp.async.commit_group;", "", [])

    def wait(self, groups: int) -> None:
        """Wait until all but the newest groups of asynchronous copies of this thread, so many of them, have landed."""
        self._effect(f"cp.async.wait_group {groups};", "", [])

    # What the threads of a warp do together.

    def shuffle_xor(self, x: Value, distance: int) -> Value:
        if x.kind == "d":
            code = (
                "{ .reg .b32 l, h; mov.b64 {l, h}, $1; shfl.sync.bfly.b32 l, l, %d, 31, -1;"
                " shfl.sync.bfly.b32 h, h, %d, 31, -1; mov.b64 $0, {l, h}; }" % (distance, distance)
            )
            return self._asm(code, "=d,d", [x], "d", effect=True, together=True)
        letter = "f" if x.kind == "f" else "r"
        code = f"shfl.sync.bfly.b32 $0, $1, {distance}, 31, -1;"
        return self._asm(code, f"={letter},{letter}", [x], x.kind, effect=True, together=True)

    def shuffle(self, x: Value, lane: Value) -> Value:
        """An integer of another lane."""
        if x.kind == "l":
            code = (
                "{ .reg .b32 l, h; mov.b64 {l, h}, $1; shfl.sync.idx.b32 l, l, $2, 31, -1;"
                " shfl.sync.idx.b32 h, h, $2, 31, -1; mov.b64 $0, {l, h}; }"
            )
            return self._asm(code, "=l,l,r", [x, lane], "l", effect=True, together=True)
        return self._asm("shfl.sync.idx.b32 $0, $1, $2, 31, -1;", "=r,r,r", [x, lane], "i", effect=True, together=True)

    def any_lane(self, condition: Pred) -> I32:
        """Whether a condition holds for any thread of the warp, 1 or 0: all of them may take one branch by it."""
        code = "{ .reg .pred p; setp.ne.s32 p, $1, 0; vote.sync.any.pred p, p, -1; selp.s32 $0, 1, 0, p; }"
        return self._asm(code, "=r,r", [self._flag(condition)], "i", effect=True, together=True)

    def sync_block(self) -> None:
        """Wait for all threads of the block, in a macro; kernels say ``cuda.syncthreads``."""
        self._effect("bar.sync 0;", "", [], together=True)

    def sync_warp(self) -> None:
        self._effect("bar.warp.sync -1;", "", [], together=True)

    def load_matrices(self, address: Value, transposed: bool) -> list[Value]:
        """Four 8x8 matrices of 16 bits; lane n gives the address of row n % 8 of matrix n // 8."""
        code = "ldmatrix.sync.aligned.m8n8.x4%s.shared.b16 {$0,$1,$2,$3}, [$4];" % (".trans" if transposed else "")
        return self._asm_many(code, "=r,=r,=r,=r,r,~{memory}", [address], "iiii", effect=True, together=True)

    def multiply(self, dtype: str, a: Sequence[Value], b: Sequence[Value], c: Sequence[Value]) -> list[Value]:
        """C + A B on the tensor cores, in float32: m16n8k16 for "f16" and "bf16", m16n8k8 for "tf32"."""
        shape = "m16n8k8" if dtype == "tf32" else "m16n8k16"
        n = len(b)
        registers = [f"${i}" for i in range(8 + 3 * n)]
        groups = (registers[:4], registers[4 : 4 + 2 * n], registers[4 + 2 * n : 4 + 3 * n], registers[4 + 3 * n :])
        listed = ", ".join("{" + ",".join(group) + "}" for group in groups)
        code = f"mma.sync.aligned.{shape}.row.col.f32.{dtype}.{dtype}.f32 {listed};"
        constraints = "=f,=f,=f,=f," + "r," * (3 * n) + "f,f,f,f"
        return self._asm_many(code, constraints, [*a, *b, *c], "ffff", together=True)

    # Loops that are the same for all threads of a warp.

    def loop(
        self, count: int | Value, state: Sequence[Value], body: Callable[[Value, list[Value]], list[Value]]
    ) -> list[Value]:
        """Run ``state = body(n, state)`` for n in range(count), at least once, as a loop of the machine.

        The compiler unrolls it if it likes to, unless the count is a register.
        """
        b = self._b
        before = b.block
        block, after = b.append_basic_block("loop"), b.append_basic_block("after")
        b.branch(block)
        b.position_at_end(block)
        n = b.phi(TYPES["i"])
        phis = [b.phi(TYPES[x.kind]) for x in state]
        results = body(Value(b, "i", n), [Value(b, x.kind, phi) for x, phi in zip(state, phis, strict=True)])
        following = b.add(n, ir.Constant(TYPES["i"], 1))
        last = b.block
        for phi, start, result in zip([n, *phis], [ir.Constant(TYPES["i"], 0), *(x.llvm for x in state)],
                                      [following, *(x.llvm for x in results)], strict=True):  # fmt: skip
            phi.add_incoming(start, before)
            phi.add_incoming(result, last)
        end = count.llvm if isinstance(count, Value) else ir.Constant(TYPES["i"], count)
        b.cbranch(b.icmp_signed("<", following, end), block, after)
        b.position_at_end(after)
        return results

    def when(self, condition: Value, state: Sequence[Value], body: Callable[[list[Value]], list[Value]]) -> list[Value]:
        """Replace ``state`` by ``body(state)`` where a condition holds: a branch that is predicted not to be taken.

        The threads of a warp may disagree, so a body has no instruction that they execute together.
        """
        b = self._b
        before = b.block
        block, after = b.append_basic_block("when"), b.append_basic_block("after")
        b.cbranch(condition.llvm, block, after).set_weights([1, 1000])
        b.position_at_end(block)
        results, last = body(list(state)), b.block
        b.branch(after)
        b.position_at_end(after)
        merged = []
        for x, result in zip(state, results, strict=True):
            phi = b.phi(TYPES[x.kind])
            phi.add_incoming(x.llvm, before)
            phi.add_incoming(result.llvm, last)
            merged.append(Value(b, x.kind, phi))
        return merged

    # Inline PTX. An instruction with an `effect` is volatile: neither removed nor reordered with others that have one.
    # One that the threads of a warp execute `together` is convergent: never moved into divergent code.

    def _call(
        self, code: str, constraints: str, operands: Sequence[Value], result: Any, effect: bool, together: bool
    ) -> Any:
        function = ir.FunctionType(result, [x.llvm.type for x in operands])
        attributes = ("convergent",) if together else ()
        return self._b.call(
            ir.InlineAsm(function, code, constraints, effect), [x.llvm for x in operands], attrs=attributes
        )

    def _asm(
        self, code: str, constraints: str, operands: Sequence[Value], kind: str, effect: bool = False,
        together: bool = False,
    ) -> Value:  # fmt: skip
        return Value(self._b, kind, self._call(code, constraints, operands, TYPES[kind], effect, together))

    def _asm_many(
        self, code: str, constraints: str, operands: Sequence[Value], kinds: str, effect: bool = False,
        together: bool = False,
    ) -> list[Value]:  # fmt: skip
        result = ir.LiteralStructType([TYPES[kind] for kind in kinds])
        aggregate = self._call(code, constraints, operands, result, effect, together)
        return [Value(self._b, kind, self._b.extract_value(aggregate, n)) for n, kind in enumerate(kinds)]

    def _effect(self, code: str, constraints: str, operands: Sequence[Value], together: bool = False) -> None:
        listed = f"{constraints},~{{memory}}" if constraints else "~{memory}"
        self._call(code, listed, operands, ir.VoidType(), True, together)

    def _load(
        self, space: str, letter: str, kind: str, address: Value, neighbours: int | None, where: Pred | None
    ) -> Value | Regs:
        count = neighbours or 1
        register = {"i": "r", "l": "l", "f": "f", "d": "d", "h": "r", "b": "r"}[kind]
        outputs = [f"${n}" for n in range(count)]
        unit = {"h": "u16", "b": "u8"}.get(kind) or _PTX[kind]
        names = ["x"] if kind in "hb" else outputs
        target = f"v{count}.{unit} {{{','.join(names)}}}" if count > 1 else f"{unit} {names[0]}"
        code = f"ld.{space}.{target}, [${count}];"
        constraints = ",".join([f"=&{register}" if where is not None else f"={register}"] * count) + f",{letter}"
        operands = [address]
        if where is not None:
            zeros = "".join(
                f"mov.{'b16' if kind in 'hb' else _PTX[kind]} {name}, {_ZEROS.get(kind, '0')}; " for name in names
            )
            code = "%ssetp.ne.s32 p, $%d, 0; @p %s" % (zeros, count + 1, code)
            constraints += ",r"
            operands.append(self._flag(where))
        if kind in "hb":
            code += " cvt.u32.u16 $0, x;"
        code = "{ .reg .b16 x; .reg .pred p; %s }" % code
        result_kind = "i" if kind in "hb" else kind
        constraints += ",~{memory}"
        if count == 1:
            x = self._asm(code, constraints, operands, result_kind, effect=True)
            return x if neighbours is None else [x]
        return self._asm_many(code, constraints, operands, result_kind * count, effect=True)

    def _store(
        self, space: str, letter: str, kind: str, address: Value, values: Sequence[Value], where: Value | None
    ) -> None:
        operands = list(values)
        if kind == "h":
            operands = [Value(self._b, "h", self._b.trunc(x.llvm, TYPES["h"])) for x in values]
        register = {"i": "r", "l": "l", "f": "f", "d": "d", "h": "h", "b": "r"}[kind]
        count = len(operands)
        names = ",".join(f"${n}" for n in range(1, count + 1))
        target = f"st.{space}{f'.v{count}' if count > 1 else ''}.{_PTX.get(kind, 'b8')} [$0], "
        target += f"{{{names}}};" if count > 1 else f"{names};"
        self._predicated(target, ",".join([letter] + [register] * count), [address, *operands], where)

    def _predicated(self, code: str, constraints: str, operands: Sequence[Value], where: Value | None) -> None:
        if where is None:
            return self._effect(code, constraints, operands)
        code = "{ .reg .pred p; setp.ne.s32 p, $%d, 0; @p %s }" % (len(operands), code)
        self._effect(code, constraints + ",r", [*operands, self._flag(where)])

    def _flag(self, where: Value) -> Value:
        return Value(self._b, "i", self._b.zext(where.llvm, TYPES["i"]))

    def _library(self, name: str, x: Value) -> Value:
        """A function of libdevice."""
        full = f"__nv_{name}{'f' if x.kind == 'f' else ''}"
        module = self._b.module
        function = module.globals.get(full)
        if function is None:
            function = ir.Function(module, ir.FunctionType(x.llvm.type, [x.llvm.type]), full)
        return Value(self._b, x.kind, self._b.call(function, [x.llvm]))
