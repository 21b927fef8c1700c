"""Instructions of programs (`mods.program`) as vector code.

A number that is the same for all query rows of a vector is a scalar, and becomes a vector where one is needed. What is
read in a row of memory is read at once, and gathered otherwise.
"""

from typing import Any

from llvmlite import ir

from . import exp
from .simd import F32, F64, HOST, I8, I32, I64, Builder, Value, Vector, call, load, pointer, splat

I1 = ir.IntType(1)
SIGNED = {"lt": "<", "le": "<=", "gt": ">", "ge": ">=", "eq": "==", "ne": "!="}
# What is computed by vectors, also of a number that is the same for all rows.
VECTORS_ONLY = ("exp", "exp2", "log", "log2", "tanh", "sin", "cos", "pow", "sqrt", "floor", "ceil", "trunc", "rint")


class Instructions:
    """Writes the code of the instructions of one program.

    Parameters
    ----------
    program : mods.program.Program
    arguments : tuple of mods.values.Argument
        The kinds of `mod_args`.
    bits : {32, 64}
        Width of a score.
    host : Host
    """

    def __init__(self, program: Any, arguments: tuple[Any, ...], bits: int, host: Any = HOST) -> None:
        self.program, self.arguments, self.lines = program, arguments, program.instructions
        self.vector = Vector(bits, host)
        self.W = self.vector.width
        self.values: dict[int, Value] = {}  # results so far
        self.wide: list[bool] = []  # which results are vectors
        self.words: list[list[Value]] = []  # of each argument: a number, or an address and the lengths of the axes
        self.is_run = False  # whether the rows are at consecutive positions, of one head
        self.begin: Value = None  # position of the first row of the vector, if they are

    def all_equal(self, b: Builder, x: Value, lanes: list[int]) -> Value:
        equal = b.icmp_signed("==", x, ir.Constant(ir.VectorType(I32, self.W), lanes))
        word = b.bitcast(equal, ir.IntType(self.W))
        return b.icmp_signed("==", word, ir.Constant(word.type, -1))

    def get(self, b: Builder, n: int, wide: bool) -> Value:
        x = self.values[n]
        return splat(b, x, self.W) if wide and not self.wide[n] else x

    def _type(self, kind: str, wide: bool) -> Any:
        element = {"b": I1, "i": I32, "l": I64, "r": self.vector.element}[kind]
        return ir.VectorType(element, self.W) if wide else element

    def _constant(self, kind: str, x: Any, wide: bool) -> Value:
        if kind == "r":
            x = float(x)
            with_range = float(self.vector.dtype(x))
            x = with_range
        ty = self._type(kind, wide)
        return ir.Constant(ty, [x] * self.W if wide else x)

    def compute(self, b: Builder, n: int) -> Value:
        op, kind, args, value = self.lines[n]
        wide = self.wide[n]
        if op == "constant":
            return self._constant(kind, value, False)
        if op == "scalar":
            return self._scalar(b, value, kind)
        if op == "shape":
            return b.trunc(self.words[value[0]][1 + value[1]], I32)
        if op == "load":
            return self._load(b, n)
        operands = [self.get(b, x, wide) for x in args]
        own = self.lines[args[0]].kind
        if op in SIGNED:
            if own == "r":
                compare = b.fcmp_unordered if op == "ne" else b.fcmp_ordered
                return compare(SIGNED[op], *operands)
            return (b.icmp_unsigned if own == "b" else b.icmp_signed)(SIGNED[op], *operands)
        if op == "select":
            return b.select(self.get(b, args[0], wide), *operands[1:])
        if op == "isnan":
            return b.fcmp_unordered("uno", operands[0], operands[0])
        if op in ("real", "integer", "widen"):
            return self._convert(b, op, own, kind, operands[0], wide)
        if kind == "r":
            return self._real(b, op, operands, self._known(args[-1]))
        if kind == "b":
            return {"and": b.and_, "or": b.or_}[op](*operands) if op != "not" else b.not_(operands[0])
        return self._integer(b, op, kind, args, operands, wide)

    def _scalar(self, b: Builder, place: int, kind: str) -> Value:
        word = self.words[place][0]
        if kind == "b":
            return b.icmp_signed("!=", word, I64(0))
        if kind == "i":
            return b.trunc(word, I32)
        if kind == "l":
            return word
        x = b.bitcast(word, F64)
        return x if self.vector.bits == 64 else b.fptrunc(x, F32)

    def _convert(self, b: Builder, op: str, own: str, kind: str, x: Value, wide: bool) -> Value:
        ty = self._type(kind, wide)
        if op == "real":
            return b.uitofp(x, ty) if own == "b" else b.sitofp(x, ty)
        if op == "widen":
            return b.zext(x, ty) if own == "b" else b.sext(x, ty)
        # Saturating: the conversion of a number beyond the integers is undefined otherwise; NaN gives 0.
        shape = f"v{self.W}" if wide else ""
        return call(b, f"llvm.fptosi.sat.{shape}i32.{shape}f{self.vector.bits}", ty, x)

    def _known(self, n: int) -> Any:
        """The value of a constant, or None."""
        return self.lines[n].value if self.lines[n].op == "constant" else None

    def _real(self, b: Builder, op: str, operands: list[Value], known: float | None) -> Value:
        vector = self.vector
        x = operands[0]
        match op:
            case "add" | "sub" | "mul" | "div":
                return getattr(b, f"f{op}")(*operands)
            case "neg":
                return b.fneg(x)
            case "min":
                return b.select(b.fcmp_ordered("<", operands[1], x), operands[1], x)
            case "max":
                return b.select(b.fcmp_ordered(">", operands[1], x), operands[1], x)
            case "abs":
                shape = f"v{self.W}" if isinstance(x.type, ir.VectorType) else ""
                return call(b, f"llvm.fabs.{shape}f{vector.bits}", x.type, x)
            case "exp":
                return exp.exp2_anywhere(vector, b, x, *exp.LOG2E)
            case "exp2":
                return exp.exp2_anywhere(vector, b, x, 1.0)
            case "log":
                return exp.log(vector, b, x)
            case "log2":
                return exp.log2(vector, b, x)
            case "tanh":
                return exp.tanh(vector, b, x)
            case "sin" | "cos":
                return exp.sin(vector, b, x, op == "cos")
            case "pow":
                return exp.power(vector, b, x, operands[1], known)
        return exp.rounded(vector, b, op, x)  # also sqrt

    def _integer(
        self, b: Builder, op: str, kind: str, args: tuple[int, ...], operands: list[Value], wide: bool
    ) -> Value:
        x, y = operands[0], operands[-1]
        zero = self._constant(kind, 0, wide)
        match op:
            case "add" | "sub" | "mul" | "xor":
                return getattr(b, op)(x, y)
            case "and":
                return b.and_(x, y)
            case "or":
                return b.or_(x, y)
            case "shl" | "shr":
                bits = 64 if kind == "l" else 32
                y = b.select(
                    b.icmp_unsigned("<", y, self._constant(kind, bits, wide)), y, self._constant(kind, bits - 1, wide)
                )
                return b.shl(x, y) if op == "shl" else b.ashr(x, y)
            case "neg":
                return b.neg(x)
            case "invert":
                return b.not_(x)
            case "abs":
                return b.select(b.icmp_signed("<", x, zero), b.neg(x), x)
            case "min":
                return b.select(b.icmp_signed("<", y, x), y, x)
            case "max":
                return b.select(b.icmp_signed(">", y, x), y, x)
        known = self._known(args[1])
        result = self._floor_divide(b, kind, x, y, known, wide)
        if op == "mod":
            result = b.sub(x, b.mul(result, y))
        return result if known else b.select(b.icmp_signed("==", y, zero), zero, result)

    def _floor_divide(self, b: Builder, kind: str, x: Value, y: Value, known: int | None, wide: bool) -> Value:
        """X // y rounded down; by 0 it is any number."""
        zero, one = self._constant(kind, 0, wide), self._constant(kind, 1, wide)
        if known is not None and known > 0 and known & (known - 1) == 0:
            return b.ashr(x, self._constant(kind, known.bit_length() - 1, wide))
        if kind == "i" and known is None:
            # The quotient of two int32 in float64, rounded down, is exact; CPUs have no vectors of integer division.
            real = ir.VectorType(F64, self.W) if wide else F64
            quotient = b.fdiv(b.sitofp(x, real), b.sitofp(y, real))
            shape = f"v{self.W}" if wide else ""
            quotient = call(b, f"llvm.floor.{shape}f64", real, quotient)
            return call(b, f"llvm.fptosi.sat.{shape}i32.{shape}f64", self._type("i", wide), quotient)
        if not known:  # a CPU traps where it divides by 0, and the lowest number by -1
            is_minus_one = b.icmp_signed("==", y, b.not_(zero))
            quotient = b.sdiv(x, b.select(b.or_(b.icmp_signed("==", y, zero), is_minus_one), one, y))
            quotient = b.select(is_minus_one, b.neg(quotient), quotient)
        else:
            quotient = b.sdiv(x, y)
        rest = b.sub(x, b.mul(quotient, y))
        below = b.and_(b.icmp_signed("!=", rest, zero), b.icmp_signed("<", b.xor(rest, y), zero))
        return b.select(below, b.sub(quotient, one), quotient)

    # Arrays

    def flat_index(self, b: Builder, n: int) -> tuple[Value, bool]:
        """The number of the element that a load reads, within the array, and whether it differs between lanes."""
        _, _, args, (place, checked) = self.lines[n]
        wide = any(self.wide[x] for x in args)
        flat = None
        for axis, (x, is_checked) in enumerate(zip(args, checked, strict=True)):
            size = b.trunc(self.words[place][1 + axis], I32)
            size = splat(b, size, self.W) if wide else size
            index = self.get(b, x, wide)
            if not is_checked:
                index = self._inside(b, index, size, self.lines[x].kind, wide)
            flat = index if flat is None else b.add(b.mul(flat, size), index)
        assert flat is not None
        return flat, wide

    def _inside(self, b: Builder, index: Value, size: Value, kind: str, wide: bool) -> Value:
        """An index as Python has it, counted from the end where it is negative, and kept within the axis."""
        if kind == "l":
            size = b.sext(size, index.type)
        zero, one = self._constant(kind, 0, wide), self._constant(kind, 1, wide)
        index = b.select(b.icmp_signed("<", index, zero), b.add(index, size), index)
        index = b.select(b.icmp_signed("<", index, zero), zero, index)
        last = b.sub(size, one)
        index = b.select(b.icmp_signed(">", index, last), last, index)
        return b.trunc(index, self._type("i", wide)) if kind == "l" else index

    def _load(self, b: Builder, n: int) -> Value:
        _, _, args, (place, checked) = self.lines[n]
        dtype = self.arguments[place].dtype
        element = {"bool": I8, "int32": I32, "int64": I64, "float32": F32, "float64": F64}[dtype]
        size = {"bool": 1, "int64": 8, "float64": 8}.get(dtype, 4)
        base = pointer(b, self.words[place][0])
        last = self.lines[args[-1]]
        W = self.W
        many = ir.VectorType(element, W)

        def one(index: Value) -> Value:
            return load(b, element, base, b.mul(b.sext(index, I64), I64(size)), align=size)

        def run(index: Value) -> Value:
            return load(b, many, base, b.mul(b.sext(index, I64), I64(size)), align=size)

        if self.is_run and last.op == "argument" and last.value == "i" and checked[-1] and not any(
            self.wide[x] for x in args[:-1]
        ):  # fmt: skip
            flat = self.begin
            if len(args) > 1:
                rows, _ = self._flat_part(b, n)
                flat = b.add(b.mul(rows, b.trunc(self.words[place][len(args)], I32)), self.begin)
            return self._as_kind(b, run(flat), dtype, True)
        index, wide = self.flat_index(b, n)
        if not wide:
            return self._as_kind(b, one(index), dtype, False)
        if not self.is_run:
            return self._as_kind(b, self._gather(b, base, index, element, size), dtype, True)
        # Rows in a run read most often in a row (i - j) or one place (a distance that was cut off): a gather of 16
        # numbers takes as long as 10 loads.
        first = b.extract_element(index, I32(0))
        distance = b.sub(index, splat(b, first, W))
        with b.if_else(self.all_equal(b, distance, list(range(W)))) as (then, otherwise):
            with then:
                in_a_row, from_row = run(first), b.block
            with otherwise:
                with b.if_else(self.all_equal(b, distance, [0] * W)) as (same, different):
                    with same:
                        single, from_one = splat(b, one(first), W), b.block
                    with different:
                        gathered, from_many = self._gather(b, base, index, element, size), b.block
                other = b.phi(many)
                other.add_incoming(single, from_one)
                other.add_incoming(gathered, from_many)
                from_other = b.block
        result = b.phi(many)
        result.add_incoming(in_a_row, from_row)
        result.add_incoming(other, from_other)
        return self._as_kind(b, result, dtype, True)

    def _flat_part(self, b: Builder, n: int) -> tuple[Value, bool]:
        """As `flat_index`, without the last axis."""
        _, _, args, (place, checked) = self.lines[n]
        flat = None
        for axis, (x, is_checked) in enumerate(zip(args[:-1], checked[:-1], strict=True)):
            size = b.trunc(self.words[place][1 + axis], I32)
            index = self.get(b, x, False)
            if not is_checked:
                index = self._inside(b, index, size, self.lines[x].kind, False)
            flat = index if flat is None else b.add(b.mul(flat, size), index)
        assert flat is not None
        return flat, False

    def _gather(self, b: Builder, base: Value, index: Value, element: Any, size: int) -> Value:
        W = self.W
        many, pointers = ir.VectorType(element, W), ir.VectorType(element.as_pointer(), W)
        places = _addresses(b, pointers, b.bitcast(base, element.as_pointer()), index, element)
        name = f"llvm.masked.gather.v{W}{'f' if element in (F32, F64) else 'i'}{8 * size}.v{W}p0"
        everything = ir.Constant(ir.VectorType(I1, W), [1] * W)
        return call(b, name, many, places, I32(size), everything, ir.Constant(many, None))

    def _as_kind(self, b: Builder, x: Value, dtype: str, wide: bool) -> Value:
        if dtype == "bool":
            return b.icmp_signed("!=", x, ir.Constant(x.type, [0] * self.W if wide else 0))
        if dtype == "float32" and self.vector.bits == 64:
            return b.fpext(x, self._type("r", wide))
        if dtype == "float64" and self.vector.bits == 32:
            return b.fptrunc(x, self._type("r", wide))
        return x


class _Addresses(ir.Instruction):
    """Addresses of many elements, for which llvmlite has no word."""

    def __init__(self, block: Any, ty: Any, base: Value, index: Value, element: Any) -> None:
        super().__init__(block, ty, "getelementptr", [base, index])
        self._element = element

    def descr(self, buffer: list[str]) -> None:
        base, index = self.operands
        buffer.append(
            f"getelementptr {self._element}, {base.type} {base.get_reference()}, {index.type} {index.get_reference()}\n"
        )


def _addresses(b: Builder, ty: Any, base: Value, index: Value, element: Any) -> Value:
    """The addresses of the elements at the indices."""
    instruction = _Addresses(b.block, ty, base, index, element)
    b._insert(instruction)
    return instruction
