"""Rules of callers as passes over a tile of scores: programs become vector code, compiled apart from the kernels.

A kernel calls a pass by its address (`call_tile`), so no kernel is compiled for a rule. A pass is compiled in a tenth
of a second. A program is straight-line code (`mods.program`), of which one vector of query rows is computed at a time;
what does not depend on the key is computed once for all keys of a tile, what does not depend on the row once for all
rows.

Tasks: "score" replaces scores; "slope" also writes their derivatives, and "kept" also the scores as they were; "mask"
hides scores; "gradients" adds to the gradients of arrays; "bits" writes the bits of a mask, for lists of tiles.
"""

from collections.abc import Callable
from typing import Any

from llvmlite import ir
from numba import types
from numba.extending import intrinsic

from . import exp
from .cache import Kernel
from .simd import (
    F32,
    F64,
    HOST,
    I8,
    I32,
    I64,
    Builder,
    Host,
    Value,
    Vector,
    at,
    call,
    load,
    loop,
    pointer,
    routine,
    splat,
)

I1 = ir.IntType(1)
TASKS = ("score", "slope", "kept", "mask", "gradients", "bits")
# What a pass is called with. `data` is the record of the arguments (`backends.rules`). `tile` has n rows of scores, of
# keys from j0 on; "bits" writes n words there. `positions` and `heads` are the tables of the tile's rows, and for
# "bits" the first position and the number of rows; heads begin at `head`. `second` and `third` are tiles: of slopes
# and of kept scores ("slope", "kept"); the kept scores and the address of the sums ("gradients").
ARGUMENTS = "data tile n j0 batch head positions heads second third unit:f64"
TILE = (types.int64,) * 10 + (types.float64,)
BITS_ROWS = 64  # rows and keys of a tile of bits


@intrinsic
def call_tile(
    typing_context: Any, function: Any, data: Any, tile: Any, n: Any, j0: Any, batch: Any, head: Any, positions: Any,
    heads: Any, second: Any, third: Any, unit: Any,
) -> Any:  # fmt: skip
    """Call the pass whose machine code is at an address, with `ARGUMENTS`."""

    def codegen(context: Any, builder: Builder, signature: Any, args: Any) -> Value:
        convention = context.call_conv
        address = builder.inttoptr(args[0], convention.get_function_type(types.int64, TILE).as_pointer())
        _, result = convention.call_function(builder, address, types.int64, TILE, args[1:])
        return result

    return types.int64(types.int64, *TILE), codegen


def make_kernel(
    task: str, program: Any, arguments: tuple[Any, ...], digest: str, bits: int = 32, lanes: int = BITS_ROWS
) -> Kernel:
    """Return the pass for a task, compiled when it is first called.

    Parameters
    ----------
    task : str
        One of `TASKS`.
    program : mods.program.Program
    arguments : tuple of mods.language.Argument
        The kinds of `mod_args`.
    digest : str
        Of the program and the arguments: part of the key of the kernel cache.
    bits : {32, 64}
        Width of a score.
    lanes : int
        Rows of a tile.
    """
    name = f"mod-{task}-f{bits}x{lanes}-{HOST.name}-{digest}"

    def make() -> Callable[..., int]:
        stage = routine(ARGUMENTS, _Pass(task, program, arguments, bits, lanes, HOST).build)

        def mod(
            data: int, tile: int, n: int, j0: int, batch: int, head: int, positions: int, heads: int, second: int,
            third: int, unit: float,
        ) -> int:  # fmt: skip
            stage(data, tile, n, j0, batch, head, positions, heads, second, third, unit)
            return 0

        return mod

    return Kernel(name, make, types.int64(*TILE))


# Levels: what a number depends on, and so where it is computed.
_CALL, _ROW, _PAIR = range(3)
_SIGNED = {"lt": "<", "le": "<=", "gt": ">", "ge": ">=", "eq": "==", "ne": "!="}
_VECTORS_ONLY = ("exp", "exp2", "log", "log2", "tanh", "sin", "cos", "pow", "sqrt", "floor", "ceil", "trunc", "rint")


class _Pass:
    """Builds the code of one pass."""

    def __init__(self, task: str, program: Any, arguments: tuple[Any, ...], bits: int, lanes: int, host: Host) -> None:
        if task == "bits" and host.bits < 256:
            host = host._replace(bits=256)  # so that the flags of a vector are whole bytes
        self.task, self.program, self.arguments, self.lanes = task, program, arguments, lanes
        self.lines = program.instructions
        self.vector = Vector(bits, host)
        self.W, self.vectors = self.vector.width, lanes // self.vector.width
        self.names = {line.value for line in self.lines if line.op == "argument"}

    def build(
        self, b: Builder, data: Value, tile: Value, n: Value, j0: Value, batch: Value, head: Value, positions: Value,
        heads: Value, second: Value, third: Value, unit: Value,
    ) -> None:  # fmt: skip
        vector = self.vector
        self.data, self.tile, self.n, self.j0 = pointer(b, data), pointer(b, tile), n, j0
        self.second, self.third = pointer(b, second), pointer(b, third)
        self.batch, self.head = b.trunc(batch, I32), b.trunc(head, I32)
        self.unit = vector.splat(b, unit if vector.bits == 64 else b.fptrunc(unit, F32))
        self.words = self._read_record(b)
        if self.task == "bits":
            self.first, self.rows, self.at_heads = b.trunc(positions, I32), heads, None
            is_run = b.icmp_signed(">=", heads, I64(self.lanes))
        else:
            self.at_positions, self.at_heads = pointer(b, positions), pointer(b, heads)
            self.first = b.trunc(load(b, I64, self.at_positions, align=8), I32)
            is_run = self._is_run(b)
        if not self.names & {"i", "head"}:
            self._variant(b, True)
            return
        with b.if_else(is_run) as (then, otherwise):
            with then:
                self._variant(b, True)
            with otherwise:
                self._variant(b, False)

    def _read_record(self, b: Builder) -> list[list[Value]]:
        """The words of each argument: a number, or an address and the lengths of the axes; last, of sums."""
        words, place = [], 0
        for argument in self.arguments:
            count = 1 + argument.ndim
            words.append([load(b, I64, self.data, 8 * (place + k), align=8) for k in range(count)])
            place += count
        self.offsets = [load(b, I64, self.data, 8 * (place + k), align=8) for k in range(len(self.arguments))]
        return words

    def _is_run(self, b: Builder) -> Value:
        """Whether the rows are those of one head, at consecutive positions: whole vectors are then read at once."""
        four = ir.VectorType(I64, 4)
        first, head = (load(b, I64, p, align=8) for p in (self.at_positions, self.at_heads))
        different: Value = ir.Constant(four, [0] * 4)
        for lane in range(0, self.lanes, 4):
            steps = ir.Constant(four, list(range(lane, lane + 4)))
            position = load(b, four, self.at_positions, 8 * lane, align=8)
            different = b.or_(different, b.xor(position, b.add(splat(b, first, 4), steps)))
            own = load(b, four, self.at_heads, 8 * lane, align=8)
            different = b.or_(different, b.xor(own, splat(b, head, 4)))
        parts = [b.extract_element(different, I32(k)) for k in range(4)]
        return b.icmp_signed("==", b.or_(b.or_(parts[0], parts[1]), b.or_(parts[2], parts[3])), I64(0))

    def _variant(self, b: Builder, is_run: bool) -> None:
        """All vectors of the tile, for rows that are a run or in any order."""
        self.is_run = is_run
        self.levels, self.wide = self._levels(is_run)
        self.values: dict[int, Value] = {}
        for name in ("batch", "head"):
            self._set_argument(b, name, _CALL, lambda name: self._narrow_argument(b, name))
        self._emit(b, _CALL)

        def rows(v: Value, _: list[Value]) -> list[Value]:
            kept = dict(self.values)
            self._row_arguments(b, v)
            self._emit(b, _ROW)
            width = self.vector.bytes * self.W
            finish = self._begin(b)

            def pair(j: Value, _: list[Value]) -> list[Value]:
                kept = dict(self.values)
                offset = b.add(b.mul(j, I64(self.vectors * width)), b.mul(v, I64(width)))
                self._set_argument(b, "j", _PAIR, lambda _: b.trunc(b.add(self.j0, j), I32))
                self._pair(b, j, v, offset)
                self.values = kept
                return []

            loop(b, self.n, [], pair)
            finish()
            self.values = kept
            return []

        loop(b, I64(self.vectors), [], rows)

    def _levels(self, is_run: bool) -> tuple[list[int], list[bool]]:
        levels: list[int] = []
        wide: list[bool] = []
        for op, _, args, value in self.lines:
            level = max((levels[x] for x in args), default=_CALL)
            is_wide = any(wide[x] for x in args) or op in _VECTORS_ONLY
            if op == "argument":
                level = {"score": _PAIR, "j": _PAIR, "i": _ROW, "batch": _CALL}.get(value, _CALL if is_run else _ROW)
                if self.task == "bits" and value == "head":
                    level = _CALL
                is_wide = value in ("score", "i") or (value == "head" and level == _ROW)
            levels.append(level)
            wide.append(is_wide)
        return levels, wide

    # Arguments

    def _set_argument(self, b: Builder, name: str, level: int, value: Callable[[str], Value]) -> None:
        for n, line in enumerate(self.lines):
            if line.op == "argument" and line.value == name and self.levels[n] == level:
                self.values[n] = value(name)

    def _narrow_argument(self, b: Builder, name: str) -> Value:
        if name == "batch":
            return self.batch
        if self.at_heads is None:
            return self.head
        return b.add(self.head, b.trunc(load(b, I64, self.at_heads, align=8), I32))

    def _row_arguments(self, b: Builder, v: Value) -> None:
        W, first_lane = self.W, b.mul(v, I64(self.W))
        steps = ir.Constant(ir.VectorType(I32, W), list(range(W)))
        self.begin = b.add(self.first, b.trunc(first_lane, I32))
        if self.is_run:
            self._set_argument(b, "i", _ROW, lambda _: b.add(splat(b, self.begin, W), steps))
        elif self.at_heads is None:  # a tile of bits: rows past the end repeat the last
            lane = b.add(splat(b, b.trunc(first_lane, I32), W), steps)
            last = splat(b, b.trunc(b.sub(self.rows, I64(1)), I32), W)
            lane = b.select(b.icmp_signed(">", lane, last), last, lane)
            self._set_argument(b, "i", _ROW, lambda _: b.add(splat(b, self.first, W), lane))
        else:
            table = ir.VectorType(I64, W)
            offset, narrow = b.mul(first_lane, I64(8)), ir.VectorType(I32, W)
            if "i" in self.names:
                i = b.trunc(load(b, table, self.at_positions, offset, align=8), narrow)
                self._set_argument(b, "i", _ROW, lambda _: i)
            if "head" in self.names:
                h = b.trunc(load(b, table, self.at_heads, offset, align=8), narrow)
                self._set_argument(b, "head", _ROW, lambda _: b.add(h, splat(b, self.head, W)))

    # What is done with the program's results

    def _begin(self, b: Builder) -> Callable[[], None]:
        """Prepare the sums of gradients whose places do not depend on the key; the result adds them."""
        self.sums: dict[int, Value] = {}
        if self.task != "gradients":
            return lambda: None
        for site in self.program.sites:
            if all(self.levels[x] < _PAIR for x in self.lines[site].args):
                entry = b.function.entry_basic_block
                with b.goto_block(entry):
                    slot = b.alloca(self.vector.type)
                b.store(self.vector.const(0.0), slot)
                self.sums[site] = slot

        def finish() -> None:
            for site, slot in self.sums.items():
                self._scatter(b, site, b.load(slot))

        return finish

    def _pair(self, b: Builder, j: Value, v: Value, offset: Value) -> None:
        vector, width = self.vector, self.vector.bytes

        def tile(p: Value) -> Value:
            return load(b, vector.type, p, offset, align=width)

        def put(x: Value, p: Value) -> None:
            slot = b.bitcast(at(b, p, offset), vector.type.as_pointer())
            b.store(x, slot).align = width

        if self.task == "bits":
            self._emit(b, _PAIR)
            self._write_bits(b, j, v)
            return
        score = tile(self.tile)
        if self.task == "gradients":
            self._set_argument(b, "score", _PAIR, lambda _: tile(self.second))
            self._emit(b, _PAIR)
            zero = vector.const(0.0)
            is_zero = b.fcmp_ordered("==", score, zero)
            for site, output in zip(self.program.sites, self.program.outputs, strict=True):
                x = b.select(is_zero, zero, b.fmul(score, self._get(b, output, True)))
                if site in self.sums:
                    b.store(b.fadd(b.load(self.sums[site]), x), self.sums[site])
                else:
                    self._scatter(b, site, x)
            return
        score = b.fmul(score, self.unit)
        self._set_argument(b, "score", _PAIR, lambda _: score)
        self._emit(b, _PAIR)
        results = [self._get(b, output, True) for output in self.program.outputs]
        if self.task == "mask":
            put(b.select(results[0], score, vector.const(float("-inf"))), self.tile)
            return
        put(results[0], self.tile)
        if self.task != "score":
            put(results[1], self.second)
        if self.task == "kept":
            put(score, self.third)

    def _write_bits(self, b: Builder, j: Value, v: Value) -> None:
        W = self.W
        flags = self._get(b, self.program.outputs[0], True)
        if not self.is_run or not self.names & {"i", "head"}:
            lane = b.add(splat(b, b.mul(v, I64(W)), W), ir.Constant(ir.VectorType(I64, W), list(range(W))))
            flags = b.and_(flags, b.icmp_signed("<", lane, splat(b, self.rows, W)))
        word = b.bitcast(flags, ir.IntType(W))
        where = at(b, self.tile, b.add(b.mul(j, I64(8)), b.mul(v, I64(W // 8))))
        b.store(word, b.bitcast(where, word.type.as_pointer())).align = 1

    def _scatter(self, b: Builder, site: int, x: Value) -> None:
        """Add a vector to the sums of the elements that a site reads."""
        W, place = self.W, self.lines[site].value[0]
        index, is_wide = self._flat_index(b, site)
        base = at(b, self.third, self.offsets[place])
        many = ir.VectorType(F64, W)
        x = x if self.vector.bits == 64 else b.fpext(x, many)

        def add(p: Value, y: Value) -> None:
            slot = b.bitcast(p, y.type.as_pointer())
            old = b.load(slot)
            old.align = 8
            b.store(b.fadd(old, y), slot).align = 8

        def element(k: Value) -> Value:
            return at(b, base, b.mul(b.sext(k, I64), I64(8)))

        def total(y: Value) -> Value:
            lanes = W
            while lanes > 1:
                lanes //= 2
                halves = [ir.Constant(ir.VectorType(I32, lanes), list(range(k, k + lanes))) for k in (0, lanes)]
                y = b.fadd(b.shuffle_vector(y, y, halves[0]), b.shuffle_vector(y, y, halves[1]))
            return b.extract_element(y, I32(0))

        if not is_wide:
            add(element(index), total(x))
            return
        # Places of a vector are most often in a row (i - j) or the same (a distance that was cut off).
        first = b.extract_element(index, I32(0))
        distance = b.sub(index, splat(b, first, W))
        with b.if_else(self._all_equal(b, distance, list(range(W)))) as (then, otherwise):
            with then:
                add(element(first), x)
            with otherwise, b.if_else(self._all_equal(b, distance, [0] * W)) as (same, different):
                with same:
                    add(element(first), total(x))
                with different:
                    for lane in range(W):
                        add(element(b.extract_element(index, I32(lane))), b.extract_element(x, I32(lane)))

    def _all_equal(self, b: Builder, x: Value, lanes: list[int]) -> Value:
        equal = b.icmp_signed("==", x, ir.Constant(ir.VectorType(I32, self.W), lanes))
        word = b.bitcast(equal, ir.IntType(self.W))
        return b.icmp_signed("==", word, ir.Constant(word.type, -1))

    # Instructions

    def _emit(self, b: Builder, level: int) -> None:
        for n in range(len(self.lines)):
            if self.levels[n] == level and n not in self.values:
                self.values[n] = self._compute(b, n)

    def _get(self, b: Builder, n: int, wide: bool) -> Value:
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

    def _compute(self, b: Builder, n: int) -> Value:
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
        operands = [self._get(b, x, wide) for x in args]
        own = self.lines[args[0]].kind
        if op in _SIGNED:
            if own == "r":
                compare = b.fcmp_unordered if op == "ne" else b.fcmp_ordered
                return compare(_SIGNED[op], *operands)
            return (b.icmp_unsigned if own == "b" else b.icmp_signed)(_SIGNED[op], *operands)
        if op == "select":
            return b.select(self._get(b, args[0], wide), *operands[1:])
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
        table = exp.EXP2_F64 if vector.bits == 64 else exp.EXP2_F32
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
                return exp.tanh(vector, b, x, table)
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
        quotient = self._floor_divide(b, kind, x, y, self._known(args[1]), wide)
        return quotient if op == "floordiv" else b.sub(x, b.mul(quotient, y))

    def _floor_divide(self, b: Builder, kind: str, x: Value, y: Value, known: int | None, wide: bool) -> Value:
        """X // y rounded down; by 0 it is 0."""
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
        if known is None or known == 0:
            y = b.select(b.icmp_signed("==", y, zero), one, y)
        quotient = b.sdiv(x, y)
        rest = b.sub(x, b.mul(quotient, y))
        below = b.and_(b.icmp_signed("!=", rest, zero), b.icmp_signed("<", b.xor(rest, y), zero))
        return b.select(below, b.sub(quotient, one), quotient)

    # Arrays

    def _flat_index(self, b: Builder, n: int) -> tuple[Value, bool]:
        """The number of the element that a load reads, within the array, and whether it differs between lanes."""
        _, _, args, (place, checked) = self.lines[n]
        wide = any(self.wide[x] for x in args)
        flat = None
        for axis, (x, is_checked) in enumerate(zip(args, checked, strict=True)):
            size = b.trunc(self.words[place][1 + axis], I32)
            size = splat(b, size, self.W) if wide else size
            index = self._get(b, x, wide)
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
        index, wide = self._flat_index(b, n)
        if not wide:
            return self._as_kind(b, one(index), dtype, False)
        if not self.is_run:
            return self._as_kind(b, self._gather(b, base, index, element, size), dtype, True)
        # Rows in a run read most often in a row (i - j) or one place (a distance that was cut off): a gather of 16
        # numbers takes as long as 10 loads.
        first = b.extract_element(index, I32(0))
        distance = b.sub(index, splat(b, first, W))
        with b.if_else(self._all_equal(b, distance, list(range(W)))) as (then, otherwise):
            with then:
                in_a_row, from_row = run(first), b.block
            with otherwise:
                with b.if_else(self._all_equal(b, distance, [0] * W)) as (same, different):
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
        """As `_flat_index`, without the last axis."""
        _, _, args, (place, checked) = self.lines[n]
        flat = None
        for axis, (x, is_checked) in enumerate(zip(args[:-1], checked[:-1], strict=True)):
            size = b.trunc(self.words[place][1 + axis], I32)
            index = self._get(b, x, False)
            if not is_checked:
                index = self._inside(b, index, size, self.lines[x].kind, False)
            flat = index if flat is None else b.add(b.mul(flat, size), index)
        assert flat is not None
        return flat, False

    def _gather(self, b: Builder, base: Value, index: Value, element: Any, size: int) -> Value:
        W = self.W
        many, pointers = ir.VectorType(element, W), ir.VectorType(element.as_pointer(), W)
        places = _Gep(b, pointers, b.bitcast(base, element.as_pointer()), index, element)
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


class _GepInstruction(ir.Instruction):
    """Addresses of many elements, for which llvmlite has no word."""

    def __init__(self, block: Any, ty: Any, base: Value, index: Value, element: Any) -> None:
        super().__init__(block, ty, "getelementptr", [base, index])
        self._element = element

    def descr(self, buffer: list[str]) -> None:
        base, index = self.operands
        buffer.append(
            f"getelementptr {self._element}, {base.type} {base.get_reference()}, {index.type} {index.get_reference()}\n"
        )


def _Gep(b: Builder, ty: Any, base: Value, index: Value, element: Any) -> Value:
    instruction = _GepInstruction(b.block, ty, base, index, element)
    b._insert(instruction)
    return instruction
