"""Rules of callers as passes over a tile of scores: programs become vector code, compiled apart from the kernels.

A kernel calls a pass by its address (`call_tile`), so no kernel is compiled for a rule. A pass is compiled in a tenth
of a second. A program is straight-line code (`mods.program`), of which one vector of query rows is computed at a time;
what does not depend on the key is computed once for all keys of a tile, what does not depend on the row once for all
rows.

Tasks: "score" replaces scores; "slope" also writes their derivatives, "kept" also the scores as they were, and "curve"
also their second derivatives; "mask" hides scores; "gradients" adds to the gradients of arrays; "bits" writes the bits
of a mask, for lists of tiles.
"""

from collections.abc import Callable
from typing import Any

from llvmlite import ir
from numba import types
from numba.extending import intrinsic

from .cache import Kernel
from .instructions import VECTORS_ONLY, Instructions
from .simd import (
    F32,
    F64,
    HOST,
    I32,
    I64,
    Builder,
    Host,
    Value,
    at,
    interleave,
    load,
    loop,
    pointer,
    routine,
    splat,
)

TASKS = ("score", "slope", "kept", "curve", "mask", "gradients", "bits")
# What a pass is called with. `data` is the record of the arguments (`backends.rules`). `tile` has n rows of scores, of
# keys from j0 on; "bits" writes n words there. `positions` and `heads` are the tables of the tile's rows, and for
# "bits" the first position and the number of rows; heads begin at `head`. `second` and `third` are tiles: of slopes
# and of kept scores or second slopes ("slope", "kept", "curve"); the kept scores and the address of the sums
# ("gradients").
ARGUMENTS = "data tile n j0 batch head positions heads second third unit:f64"
TILE = (types.int64,) * 10 + (types.float64,)
# Operations of long chains of instructions, and the keys whose scores are then computed in turns: cycles a vector on
# Zen 5 with four and with eight are 5.1 and 5.4 for exp, 6.4 and 7.1 for log, 9.3 and 8.2 for c * tanh(score / c), 11.0
# and 10.1 for sin, 15.6 and 12.5 for pow.
TOGETHER = {"exp": 4, "exp2": 4, "log": 4, "log2": 4, "tanh": 8, "sin": 8, "cos": 8, "pow": 8}
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
    arguments : tuple of mods.values.Argument
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


class _Pass(Instructions):
    """Builds the code of one pass."""

    def __init__(self, task: str, program: Any, arguments: tuple[Any, ...], bits: int, lanes: int, host: Host) -> None:
        if task == "bits" and host.bits < 256:
            host = host._replace(bits=256)  # so that the flags of a vector are whole bytes
        super().__init__(program, arguments, bits, host)
        self.task, self.lanes, self.vectors = task, lanes, lanes // self.W
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
        self.values = {}
        for name in ("batch", "head"):
            self._set_argument(b, name, _CALL, lambda name: self._narrow_argument(b, name))
        self._emit(b, _CALL)

        def rows(v: Value, _: list[Value]) -> list[Value]:
            kept = dict(self.values)
            self._row_arguments(b, v)
            self._emit(b, _ROW)
            width = self.vector.bytes * self.W
            finish = self._begin(b)

            def pair(j: Value) -> None:
                kept = dict(self.values)
                offset = b.add(b.mul(j, I64(self.vectors * width)), b.mul(v, I64(width)))
                self._set_argument(b, "j", _PAIR, lambda _: b.trunc(b.add(self.j0, j), I32))
                self._pair(b, j, v, offset)
                self.values = kept

            def one(j: Value, _: list[Value]) -> list[Value]:
                pair(b.add(done, j))
                return []

            def several(group: Value, _: list[Value]) -> list[Value]:
                interleave(b, together, lambda k: pair(b.add(b.mul(group, I64(together)), I64(k))))
                return []

            done, together = I64(0), self._together()
            if together > 1:
                groups = b.udiv(self.n, I64(together))
                loop(b, groups, [], several)
                done = b.mul(groups, I64(together))
            loop(b, b.sub(self.n, done), [], one)
            finish()
            self.values = kept
            return []

        loop(b, I64(self.vectors), [], rows)

    def _together(self) -> int:
        """How many keys have their scores computed in turns, as a score takes a long chain of instructions; 1 for none.

        None where instructions have branches, and where so many numbers are needed that registers do not suffice: with
        16 those of two keys do not.
        """
        ops = [line.op for n, line in enumerate(self.lines) if self.levels[n] == _PAIR]
        chains = [TOGETHER[op] for op in ops if op in TOGETHER]
        takes_turns = self.task in ("score", "slope", "kept", "curve") and self.vector.host.registers == 32
        return max(chains) if takes_turns and 0 < len(chains) <= 2 and "load" not in ops else 1

    def _levels(self, is_run: bool) -> tuple[list[int], list[bool]]:
        levels: list[int] = []
        wide: list[bool] = []
        for op, _, args, value in self.lines:
            level = max((levels[x] for x in args), default=_CALL)
            is_wide = any(wide[x] for x in args) or op in VECTORS_ONLY
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
                x = b.select(is_zero, zero, b.fmul(score, self.get(b, output, True)))
                if site in self.sums:
                    b.store(b.fadd(b.load(self.sums[site]), x), self.sums[site])
                else:
                    self._scatter(b, site, x)
            return
        score = b.fmul(score, self.unit)
        self._set_argument(b, "score", _PAIR, lambda _: score)
        self._emit(b, _PAIR)
        results = [self.get(b, output, True) for output in self.program.outputs]
        if self.task == "mask":
            put(b.select(results[0], score, vector.const(float("-inf"))), self.tile)
            return
        put(results[0], self.tile)
        if self.task != "score":
            put(results[1], self.second)
        if self.task == "kept":
            put(score, self.third)
        if self.task == "curve":
            put(results[2], self.third)

    def _write_bits(self, b: Builder, j: Value, v: Value) -> None:
        W = self.W
        flags = self.get(b, self.program.outputs[0], True)
        if not self.is_run or not self.names & {"i", "head"}:
            lane = b.add(splat(b, b.mul(v, I64(W)), W), ir.Constant(ir.VectorType(I64, W), list(range(W))))
            flags = b.and_(flags, b.icmp_signed("<", lane, splat(b, self.rows, W)))
        word = b.bitcast(flags, ir.IntType(W))
        where = at(b, self.tile, b.add(b.mul(j, I64(8)), b.mul(v, I64(W // 8))))
        b.store(word, b.bitcast(where, word.type.as_pointer())).align = 1

    def _scatter(self, b: Builder, site: int, x: Value) -> None:
        """Add a vector to the sums of the elements that a site reads."""
        W, place = self.W, self.lines[site].value[0]
        index, is_wide = self.flat_index(b, site)
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
        with b.if_else(self.all_equal(b, distance, list(range(W)))) as (then, otherwise):
            with then:
                add(element(first), x)
            with otherwise, b.if_else(self.all_equal(b, distance, [0] * W)) as (same, different):
                with same:
                    add(element(first), total(x))
                with different:
                    for lane in range(W):
                        add(element(b.extract_element(index, I32(lane))), b.extract_element(x, I32(lane)))

    # Instructions

    def _emit(self, b: Builder, level: int) -> None:
        for n in range(len(self.lines)):
            if self.levels[n] == level and n not in self.values:
                self.values[n] = self.compute(b, n)
