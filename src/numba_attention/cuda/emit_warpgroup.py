"""Instructions of sm_90a for `emit.Emit`: products of warpgroups (wgmma), barriers in memory, shares of registers.

A warpgroup is four warps, the first of which has a number that is a multiple of four. Its products are asynchronous:
their sums are not to be touched before `wait_products` has named them. They read shared memory through another path
than stores and asynchronous copies (the "async proxy"), so whoever wrote a tile says `fence_proxy` before it says that
the tile is there. PTX ISA 8.0, sections "Asynchronous Warpgroup Level Matrix Multiply-Accumulate" and "mbarrier".
"""

from typing import Any, TypeAlias

# Registers of `emit`, which imports this module.
I32: TypeAlias = Any
I64: TypeAlias = Any
Pred: TypeAlias = Any
Regs: TypeAlias = list[Any]


class Warpgroup:
    """The part of `emit.Emit` that only sm_90a has."""

    const: Any
    _asm: Any
    _asm_many: Any
    _effect: Any
    _predicated: Any

    def multiply_group(
        self, dtype: str, a: I64 | Regs, b: I64, c: Regs, *, from_zero: bool = False,
        turned: tuple[bool, bool] = (False, False),
    ) -> Regs:  # fmt: skip
        """C + A B of 64 rows, asynchronously: A is a descriptor or four registers, B a descriptor.

        ``from_zero``: C is not read. ``turned``: whether A and B lie in shared memory with the summed index first.
        """
        n = len(c)
        in_registers = isinstance(a, list)
        operands = [*c, *(a if isinstance(a, list) else [a]), b]
        at = 2 * n
        left = "{" + ",".join(f"${at + i}" for i in range(4)) + "}" if in_registers else f"${at}"
        flags = f"{int(turned[1])}" if in_registers else f"{int(turned[0])}, {int(turned[1])}"
        code = (
            f"wgmma.mma_async.sync.aligned.m64n{2 * n}k16.f32.{dtype}.{dtype} "
            f"{{{','.join(f'${i}' for i in range(n))}}}, {left}, ${len(operands) + n - 1}, "
            f"{int(not from_zero)}, 1, 1, {flags};"
        )
        tied = [str(i) for i in range(n)]
        constraints = ",".join(["=f"] * n + tied + (["r"] * 4 if in_registers else ["l"]) + ["l"])
        sums: Regs = self._asm_many(code, constraints, operands, "f" * n, effect=True, together=True)
        return sums

    def fence_products(self) -> None:
        """Order writes of registers before the products that follow."""
        self._effect("wgmma.fence.sync.aligned;", "", [], together=True)

    def commit_products(self) -> None:
        """Close a group of products, for `wait_products`."""
        self._effect("wgmma.commit_group.sync.aligned;", "", [], together=True)

    def wait_products(self, groups: int, *sums: Regs) -> list[Regs]:
        """Wait until all but the newest groups of products, so many of them, are done; what is given is tied to it."""
        flat = [x for part in sums for x in part]
        count = len(flat)
        constraints = ",".join(["=f"] * count + [str(i) for i in range(count)] + ["~{memory}"])
        code = f"wgmma.wait_group.sync.aligned {groups};"
        done = iter(self._asm_many(code, constraints, flat, "f" * count, effect=True, together=True))
        return [[next(done) for _ in part] for part in sums]

    def fence_proxy(self) -> None:
        """Let products see what this thread wrote to shared memory, by stores and by copies that have landed."""
        self._effect("fence.proxy.async.shared::cta;", "", [])

    def init_barrier(self, address: I32, count: int, where: Pred) -> None:
        """Make a barrier of 8 bytes in shared memory whose phase ends after so many arrivals."""
        number = self.const("i", count)
        self._predicated("mbarrier.init.shared::cta.b64 [$0], $1;", "r,r", [address, number], where)

    def arrive(self, address: I32, where: Pred | None = None) -> None:
        self._predicated("mbarrier.arrive.shared::cta.b64 _, [$0];", "r", [address], where)

    def has_passed(self, address: I32, parity: I32) -> I32:
        """Whether the phase of a parity has ended; waits for a while, and the caller asks again."""
        code = "{ .reg .pred p; mbarrier.try_wait.parity.shared::cta.b64 p, [$1], $2; selp.u32 $0, 1, 0, p; }"
        passed: I32 = self._asm(code, "=r,r,r,~{memory}", [address, parity], "i", effect=True)
        return passed

    def sync_named(self, barrier: I32, threads: int) -> None:
        """Wait at one of the 16 barriers of a block until so many threads have come or arrived."""
        self._effect(f"bar.sync $0, {threads};", "r", [barrier], together=True)

    def arrive_named(self, barrier: I32, threads: int) -> None:
        self._effect(f"bar.arrive $0, {threads};", "r", [barrier], together=True)

    def set_registers(self, count: int, more: bool) -> None:
        """Give back registers of this warpgroup, or wait for those that others give back."""
        self._effect(f"setmaxnreg.{'inc' if more else 'dec'}.sync.aligned.u32 {count};", "", [], together=True)

    def copy_whole(self, shared: I32, address: I64, offset: int = 0) -> None:
        """Copy 16 bytes asynchronously, to a constant offset."""
        self._effect(f"cp.async.cg.shared.global [$0+{offset}], [$1], 16;", "r,l", [shared, address])

    def add_rows(self, address: I64, shared: I32, size: I32, where: Pred) -> None:
        """Add float32 numbers in shared memory to those in global memory, asynchronously, by the threads in `where`.

        Both begin at multiples of 16 bytes, as many as `size` is a multiple of. It reads by the path of products.
        """
        code = "cp.reduce.async.bulk.global.shared::cta.bulk_group.add.f32 [$0], [$1], $2;"
        self._predicated(code, "l,r,r", [address, shared, size], where)
        self._effect("cp.async.bulk.commit_group;", "", [])

    def wait_added(self, read: bool) -> None:
        """Wait until all additions of this thread have read shared memory, or are done."""
        self._effect(f"cp.async.bulk.wait_group{'.read' if read else ''} 0;", "", [])
