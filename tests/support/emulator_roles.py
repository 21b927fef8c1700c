"""What the emulator needs for kernels whose warpgroups have roles: turns, barriers in memory, products that come late.

Each warpgroup runs the whole kernel on NumPy arrays of its own 128 threads, as a coroutine: it goes on until it has to
wait for others. If all wait, the kernel has a deadlock, and the error says for what. Products read shared memory when
they are waited for (or at once), so whoever overwrites a tile too early is found, and so is a tile that nobody has said
`fence_proxy` for.
"""

import threading
import types
from collections import deque
from functools import cache

import numpy as np

GROUP = 128


class Abandoned(BaseException):
    """Ends the coroutines of a kernel that has failed."""


class Deadlock(AssertionError):
    pass


class Crew:
    """Runs one function for each role, one at a time, in turns.

    Parameters
    ----------
    first : int
        Role that begins, so that tests can try more than one order.
    """

    def __init__(self, count, first=0):
        self.count, self.first, self.role = count, first % count, None
        self.waiting = [None] * count  # (predicate, what for)
        self.turn = [threading.Semaphore(0) for _ in range(count)]
        self.back = threading.Semaphore(0)
        self.failed, self.done = None, [False] * count

    def run(self, function, enter):
        """Run ``function(role)`` for all; ``enter(role)`` is called whenever one gets its turn."""
        threads = [threading.Thread(target=self._body, args=(function, n), daemon=True) for n in range(self.count)]
        for thread in threads:
            thread.start()
        at = self.first
        while not all(self.done):
            order = [(at + n) % self.count for n in range(self.count)]
            able = [n for n in order if not self.done[n] and (self.waiting[n] is None or self.waiting[n][0]())]
            if not able:
                waits = "; ".join(f"warpgroup {n}: {w[1]}" for n, w in enumerate(self.waiting) if not self.done[n])
                self.failed = Deadlock(f"all wait: {waits}")
            if self.failed is not None:
                break
            self.role, at = able[0], able[0] + 1
            self.waiting[self.role] = None
            enter(self.role)
            self.turn[self.role].release()
            self.back.acquire()
            if self.failed is not None:
                break
        for n in range(self.count):  # whoever still waits ends
            if not self.done[n]:
                self.turn[n].release()
        for thread in threads:
            thread.join()
        if self.failed is not None:
            raise self.failed

    def _body(self, function, role):
        self.turn[role].acquire()
        try:
            if self.failed is None:
                function(role)
        except Abandoned:
            pass
        except BaseException as error:
            self.failed = error
        self.done[role] = True
        self.back.release()

    def wait_until(self, predicate, what):
        """Go on with others until a predicate holds."""
        if predicate():
            return
        role = self.role
        self.waiting[role] = predicate, what
        self.back.release()
        self.turn[role].acquire()
        if self.failed is not None:
            raise Abandoned


class Barrier:
    """An mbarrier: how many arrivals end a phase, and how many phases have ended."""

    def __init__(self, expected):
        self.expected = self.left = expected
        self.phase = 0

    def arrive(self, count):
        assert count <= self.left, "mbarrier: more arrivals than it expects"
        self.left -= count
        if self.left == 0:
            self.left, self.phase = self.expected, self.phase + 1


class Roles:
    """Shared memory, barriers and pending products of one block whose warpgroups have roles."""

    def __init__(self, memory, count, landing, first):
        self.bytes = np.full(memory, 0xFF, np.uint8)
        self.landing = landing
        self.crew = Crew(count, first)
        self.barriers = {}
        self.named = {}  # number: [arrived, generation]
        self.copies = [deque([[]]) for _ in range(count)]  # groups of asynchronous copies
        self.products = [deque([[]]) for _ in range(count)]
        self.additions = [deque() for _ in range(count)]
        words = -(-memory // 4)
        self.coming = np.zeros(words, np.int8)  # 1 + the role whose copy is under way
        self.unfenced = np.zeros(words, np.int8)  # 1 + the role that wrote and has not said fence_proxy
        self.reading = np.zeros(words, np.int32)  # products that are still to read
        self.registers = [None] * count
        self.fenced = [False] * count  # whether products may begin: registers were not touched since fence_products
        self.results = {}  # of products: what stands for a sum until a wait names it, and the sum
        self.count, self.conflicts = False, {}

    @property
    def role(self):
        return self.crew.role

    def sync(self):
        """``__syncthreads``."""
        self.sync_named("all", self.crew.count * GROUP, GROUP)

    def sync_warp(self):
        pass

    def sync_named(self, number, threads, arriving, wait=True):
        state = self.named.setdefault(number, [0, 0])
        generation = state[1]
        state[0] += arriving
        assert state[0] <= threads, f"barrier {number}: more threads than it takes"
        if state[0] == threads:
            state[0], state[1] = 0, generation + 1
        if wait:
            self.crew.wait_until(lambda: state[1] > generation, f"named barrier {number}")

    # Ordinary reads and writes.

    def _index(self, address, width, where=None):
        address = address.astype(np.int64) if where is None else address[where].astype(np.int64)
        assert not (address % width).any(), "shared memory: misaligned"
        assert ((address >= 0) & (address + width <= self.bytes.size)).all(), "shared memory: out of bounds"
        return address

    @staticmethod
    def _words(address, width):
        return address[:, None] // 4 + np.arange(max(width // 4, 1))

    def read(self, address, width, matrices=False):
        address = self._index(address, width)
        assert not self.coming[self._words(address, width)].any(), "shared memory: read while a copy is under way"
        return self.bytes[address[:, None] + np.arange(width)]

    def _check_write(self, words):
        assert not self.coming[words].any(), "shared memory: written while a copy is under way"
        assert not self.reading[words].any(), "shared memory: overwritten while a product reads it"

    def write(self, address, data, where):
        width = data.shape[1]
        address = self._index(address, width, where)
        words = self._words(address, width)
        self._check_write(words)
        self.unfenced[words] = 1 + self.role
        self.bytes[address[:, None] + np.arange(width)] = data[where]

    def copy(self, address, fetch, width, where):
        address = self._index(address, width, where)
        index, words = address[:, None] + np.arange(width), self._words(address, width)
        self._check_write(words)
        role = self.role
        self.coming[words] = 1 + role
        if self.landing == "issue":
            self.bytes[index] = fetch()[where]

        def land():
            if self.landing == "wait":
                self.bytes[index] = fetch()[where]
            self.coming[words] = 0
            self.unfenced[words] = 1 + role

        self.copies[role][-1].append(land)

    @property
    def groups(self):
        return self.copies[self.role]

    def wait(self, groups):
        queue = self.copies[self.role]
        while len(queue) - 1 > groups:
            for land in queue.popleft():
                land()

    # The other path to shared memory.

    def fence_proxy(self):
        self.unfenced[self.unfenced == 1 + self.role] = 0

    def matrix(self, descriptor, rows, turned):
        """Where the 16-bit numbers of a matrix are, 16 summed indices for each of `rows`, and the words of them."""
        halves, words = _addresses(descriptor, rows, turned)
        assert 2 * int(halves.max()) + 2 <= self.bytes.size, "descriptor: out of bounds"
        assert not self.coming[words].any(), "product: reads what a copy is about to write"
        assert not self.unfenced[words].any(), "product: reads what was written without fence_proxy"
        return halves, words

    def numbers(self, halves, half):
        bits = self.bytes[: self.bytes.size & -2].view(np.uint16)[halves]
        if half == "f16":
            return bits.view(np.float16).astype(np.float64)
        return (bits.astype(np.uint32) << 16).view(np.float32).astype(np.float64)

    def begin(self, work, *words):
        """Queue a product of this role, which reads words of one matrix or of two."""
        self._read_late(self.products[self.role][-1], work, *words)

    def add_rows(self, start, size, add):
        """Queue an addition of float32 numbers to global memory, which reads shared memory by the path of products."""
        assert 0 <= start <= start + size <= self.bytes.size, "cp.reduce.async.bulk: out of bounds"
        words = np.arange(start // 4, (start + size) // 4)
        assert not self.coming[words].any(), "cp.reduce.async.bulk: reads what a copy is about to write"
        assert not self.unfenced[words].any(), "cp.reduce.async.bulk: reads what was written without fence_proxy"

        def work():
            add(self.bytes[start : start + size].view(np.float32).copy())

        self._read_late(self.additions[self.role], work, words)

    def _read_late(self, queue, work, *words):
        """Queue what reads words of shared memory, of one array or of two, when it is waited for, or do it at once."""
        if self.landing == "issue":
            return work()
        for some in words:
            self.reading[some] += 1

        def late():
            work()
            for some in words:
                self.reading[some] -= 1

        queue.append(late)

    def wait_added(self):
        additions = self.additions[self.role]
        while additions:
            additions.popleft()()

    def commit_products(self):
        self.products[self.role].append([])

    def wait_products(self, groups):
        queue = self.products[self.role]
        while len(queue) - 1 > groups:
            for work in queue.popleft():
                work()


@cache
def _addresses(descriptor, rows, turned):
    """Where a descriptor says that the numbers of a matrix are, in units of two bytes, and their words, once each."""
    start = (descriptor & 0x3FFF) << 4
    leading, stride = ((descriptor >> shift & 0x3FFF) << 4 for shift in (16, 32))
    assert descriptor >> 62 == 1, "descriptor: not swizzled by 128 bytes"
    assert descriptor >> 49 & 7 == 0, "descriptor: has a base offset"
    row, k = np.arange(rows)[:, None], np.arange(16)[None, :]
    if turned:  # 64 rows are a line, 8 summed indices are 8 lines
        address = start + row // 64 * leading + k // 8 * stride + k % 8 * 128 + row % 64 * 2
    else:  # 8 rows are 8 lines
        address = start + row // 8 * stride + row % 8 * 128 + k * 2
    address = address ^ (address >> 7 & 7) << 4
    return address // 2, np.unique(address // 4)


@cache
def _places(count):
    """Row and column of each register of each thread of a sum, as PTX has them."""
    n, warp, lane = np.arange(count)[:, None, None], np.arange(4)[:, None], np.arange(32)
    row = 16 * warp + (lane >> 2) + 8 * (n // 2 % 2)
    column = 8 * (n // 4) + 2 * (lane & 3) + n % 2
    return row.reshape(count, -1), np.broadcast_to(column, row.shape).reshape(count, -1)


class WarpgroupEmit:
    """The methods of `emit_warpgroup.Warpgroup`, on arrays of one element for each thread of a warpgroup."""

    def _one(self, value):
        x = self._all(value)
        assert (x == x[0]).all(), "not the same for all threads of a warpgroup"
        return int(x[0])

    def multiply_group(self, dtype, a, b, c, *, from_zero=False, turned=(False, False)):
        from emulator import Value

        assert self.n == GROUP
        assert self._shared.fenced[self._shared.role], "product: registers were written without fence_products"
        columns = 2 * len(c)
        right, of_right = self._shared.matrix(self._one(b), columns, turned[1])
        lane, warp = np.arange(32), np.arange(4)[:, None]
        g, t = lane >> 2, lane & 3
        words = [of_right]
        if isinstance(a, list):
            left = None
            given = [self._words(x).copy() for x in a]
        else:
            left, of_left = self._shared.matrix(self._one(a), 64, turned[0])
            words.append(of_left)
        results = self._shared.results
        sums = [results[id(x.x)][1] if id(x.x) in results else self._all(x) for x in c]
        # What stands for a sum is NaN for ever: the sum is what a wait that names it returns.
        standing, made = (list(np.full((len(c), self.n), np.nan, np.float32)) for _ in range(2))
        results |= {id(x): (x, y) for x, y in zip(standing, made, strict=True)}

        def work():
            if left is not None:
                A = self._shared.numbers(left, dtype)
            else:
                A = np.zeros((64, 16))
                for n, word in enumerate(given):
                    low, high = (y.x for y in self.unpack(dtype, Value("i", word.view(np.int32))))
                    row, k = 16 * warp + g + 8 * (n % 2), 2 * t + 8 * (n // 2)
                    A[row, k], A[row, k + 1] = low.reshape(4, 32), high.reshape(4, 32)
            C, places = np.zeros((64, columns)), _places(len(c))
            if not from_zero:
                C[places] = sums
            with np.errstate(all="ignore"):
                exact = A @ self._shared.numbers(right, dtype).T + C
                rounded = exact.astype(np.float32)
                over = np.isfinite(rounded) & (np.abs(rounded) > np.abs(exact))
                rounded = np.where(over, np.nextafter(rounded, np.float32(0)), rounded)
            for x, numbers in zip(made, rounded[places], strict=True):
                x[:] = numbers

        self._shared.begin(work, *words)
        return [Value("f", x) for x in standing]

    def fence_products(self):
        self._shared.fenced[self._shared.role] = True

    def commit_products(self):
        self._shared.commit_products()

    def wait_products(self, groups, *sums):
        from emulator import Value

        self._shared.wait_products(groups)
        self._shared.fenced[self._shared.role] = False
        results = self._shared.results
        return [[Value("f", results[id(x.x)][1].copy()) if id(x.x) in results else x for x in part] for part in sums]

    def fence_proxy(self):
        self._shared.fence_proxy()

    def init_barrier(self, address, count, where):
        if self._where(where).any():
            self._shared.barriers[self._one(address)] = Barrier(count)

    def arrive(self, address, where=None):
        where = self._where(where)
        if where.any():
            at = np.unique(self._all(address)[where])
            assert len(at) == 1
            self._shared.barriers[int(at[0])].arrive(int(where.sum()))

    def has_passed(self, address, parity):
        from emulator import Value

        at, parity = self._one(address), self._one(parity)
        barrier = self._shared.barriers[at]
        self._shared.crew.wait_until(lambda: barrier.phase % 2 != parity, f"mbarrier at {at}, parity {parity}")
        return Value("i", 1)

    def sync_named(self, barrier, threads):
        self._shared.sync_named(self._one(barrier), threads, self.n)

    def arrive_named(self, barrier, threads):
        self._shared.sync_named(self._one(barrier), threads, self.n, wait=False)

    def set_registers(self, count, more):
        assert count % 8 == 0
        assert 24 <= count <= 256
        self._shared.registers[self._shared.role] = count

    def copy_whole(self, shared, address, offset=0):
        from emulator import Value

        self.copy_async(shared + offset, address, Value("i", 16))

    def add_rows(self, address, shared, size, where):
        where = self._where(where)
        each = (self._all(x)[where].astype(np.int64).tolist() for x in (address, shared, size))
        for to, start, count in zip(*each, strict=True):
            assert count > 0, "cp.reduce.async.bulk: nothing is added"
            assert to % 16 == start % 16 == count % 16 == 0, "cp.reduce.async.bulk: misaligned"
            self._shared.add_rows(start, count, lambda x, to=to: self._memory.add(to + 4 * np.arange(len(x)), x))

    def wait_added(self, read):
        self._shared.wait_added()


def run_block(emulator, kernel, threads, shared, arguments, make_emit):
    """Run a block of a kernel whose `warpgroups` have roles."""
    count = kernel.warpgroups
    assert threads == count * GROUP
    roles = emulator.block_memory = Roles(shared, count, emulator.landing, emulator.first)
    emits = [make_emit() for _ in range(count)]

    def enter(role):
        emulator.emit = emits[role]
        numbers = np.arange(role * GROUP, (role + 1) * GROUP, dtype=np.int32)
        emulator.cuda.threadIdx = types.SimpleNamespace(x=numbers)

    roles.crew.run(lambda role: kernel(*arguments), enter)
    at_start = 65536 // threads // 8 * 8  # of each thread; setmaxnreg waits for ever for more than others give back
    assert sum(x or 0 for x in roles.registers) <= at_start * count, "setmaxnreg: more registers than the block has"
    assert not any(roles.additions), "an addition is never waited for"
    for copies, products in zip(roles.copies, roles.products, strict=True):
        assert not any(copies), "a copy is never waited for"
        assert not any(products), "a product is never waited for"
    for at, barrier in roles.barriers.items():
        assert barrier.left == barrier.expected, f"mbarrier at {at}: its last phase never ends"
