"""Whatever is done to a cache in whatever order, it holds what a list of tokens for each sequence would hold.

And attention to it is attention to that: in the kernel for few queries, with 16 features, whose pages and splits it
finds by itself.
"""

import hypothesis.strategies as st
import numpy as np
import pytest
from hypothesis import settings
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule

import numba_attention as na
from caching import STORAGES, check_pages, read_back, state
from cases import DTYPES

HKV, E, EV = 2, 16, 20
SEQUENCES, CAPACITY = 4, 12
PAGES, PAGE_SIZE = 9, 4

seeds = st.integers(0, 2**32 - 1)
KINDS = [("float32", storage) for storage in STORAGES] + [(dtype, None) for dtype in DTYPES if dtype != "float32"]


class Machine(RuleBasedStateMachine):
    """What both caches have in common: `sequences` has for each id the key and value of every token, as float64."""

    def __init__(self):
        super().__init__()
        self.sequences = {}
        self.cache = None

    def begin(self, kind, make):
        self.dtype, self.storage = kind
        self.cache = make(dtype=DTYPES[self.dtype], storage=self.storage)

    def tokens(self, n, T, seed):
        """Draw keys and values, now and then with a row of zeros, infinity or NaN."""
        rng = np.random.default_rng(seed)
        made = []
        for features in (E, EV):
            x = rng.standard_normal((n, HKV, T, features)) * 2.0 ** rng.integers(-8, 8, (n, HKV, T, 1))
            x[rng.random(x.shape[:3]) < 0.1] = 0
            x[rng.random(x.shape) < 0.02] = rng.choice([np.nan, np.inf, -np.inf])
            made.append(x.astype(DTYPES[self.dtype]))
        return made

    def append(self, names, counts, T, seed, ragged):
        """Append to the cache and to the model, or to neither; `names` are those of the model."""
        key, value = self.tokens(len(names), T, seed)
        arguments = [key, value, counts] if ragged else [key, value]
        if isinstance(self.cache, na.PagedKVCache):
            arguments.insert(0, np.array(names, np.int64))
        if self.fits(names, counts):
            self.cache.append(*arguments)
            for i, (name, count) in enumerate(zip(names, counts, strict=True)):
                rows = zip(*(read_back(x[i].swapaxes(0, 1), self.storage) for x in (key, value)), strict=True)
                self.sequences[name].extend(list(rows)[:count])
        else:
            before = state(self.cache)
            with pytest.raises(na.CacheFullError):
                self.cache.append(*arguments)
            assert state(self.cache) == before

    def model(self):
        """Key and value (n, Hkv, max(lengths), E) in float64, zero past each length, and the lengths."""
        names = sorted(self.sequences)
        lengths = np.array([len(self.sequences[name]) for name in names], np.int64)
        dense = [np.zeros((len(names), HKV, max(lengths, default=0), features)) for features in (E, EV)]
        for i, name in enumerate(names):
            for t, token in enumerate(self.sequences[name]):
                for x, numbers in zip(dense, token, strict=True):
                    x[i, :, t] = numbers
        return *dense, lengths

    @precondition(lambda self: self.cache is not None)
    @invariant()
    def holds_what_the_model_holds(self):
        contents = self.cache._contents()
        for got, want in zip((*contents.dense(), contents.lengths), self.model(), strict=True):
            np.testing.assert_array_equal(got, want)

    @precondition(lambda self: self.sequences)
    @invariant()
    def attends_to_what_the_model_holds(self):
        key, value, lengths = self.model()
        query = (
            np.random.default_rng(len(lengths))
            .standard_normal((len(lengths), 2 * HKV, 1, E))
            .astype(DTYPES[self.dtype])
        )
        out, lse = na.attention_decode(query, self.cache, return_lse=True)
        for i, length in enumerate(lengths):
            own = key[i, :, :length], value[i, :, :length]
            if not all(np.isfinite(x).all() for x in own):
                continue
            want, of_lse = na.attention(query[i].astype(np.float64), *own, return_lse=True, backend="reference")
            # Scores reach some hundreds here, so that their rounding shows in the weights.
            size = np.abs(own[1]).max(initial=1) * (1e-10 if self.dtype == "float64" else 1e-3)
            half = 1e-2 if self.dtype in ("float16", "bfloat16") else 0
            np.testing.assert_allclose(out[i].astype(np.float64), want, atol=size, rtol=half)
            np.testing.assert_allclose(lse[i], of_lse, atol=1e-3, rtol=1e-5)


class Contiguous(Machine):
    @initialize(kind=st.sampled_from(KINDS))
    def make(self, kind):
        self.begin(kind, lambda **kwargs: na.KVCache(SEQUENCES, HKV, CAPACITY, E, EV, **kwargs))
        self.sequences = {i: [] for i in range(SEQUENCES)}

    def fits(self, names, counts):
        return all(len(self.sequences[i]) + n <= CAPACITY for i, n in zip(names, counts, strict=True))

    @rule(T=st.integers(0, 5), seed=seeds)
    def append_to_all(self, T, seed):
        self.append(range(SEQUENCES), [T] * SEQUENCES, T, seed, False)

    @rule(counts=st.lists(st.integers(0, 5), min_size=SEQUENCES, max_size=SEQUENCES), seed=seeds)
    def append_some(self, counts, seed):
        self.append(range(SEQUENCES), counts, 5, seed, True)

    @rule(length=st.integers(0, CAPACITY))
    def truncate_all(self, length):
        length = min(length, *map(len, self.sequences.values()))
        self.cache.truncate(length)
        for tokens in self.sequences.values():
            del tokens[length:]

    @rule(data=st.data())
    def truncate_each(self, data):
        lengths = [data.draw(st.integers(0, len(self.sequences[i]))) for i in range(SEQUENCES)]
        self.cache.truncate(lengths)
        for i, length in enumerate(lengths):
            del self.sequences[i][length:]

    @rule(index=st.lists(st.integers(0, SEQUENCES - 1), min_size=SEQUENCES, max_size=SEQUENCES))
    def reorder(self, index):
        self.cache.reorder(index)
        self.sequences = {i: list(self.sequences[source]) for i, source in enumerate(index)}


class Paged(Machine):
    @initialize(kind=st.sampled_from(KINDS))
    def make(self, kind):
        self.begin(kind, lambda **kwargs: na.PagedKVCache(PAGES, PAGE_SIZE, HKV, E, EV, **kwargs))
        self.freed = set()

    def fits(self, names, counts):
        """Count pages from the block table alone."""
        holders = [*self.cache.block_table()[self.cache.block_table() >= 0]]
        needed, writers = 0, {}
        for name, count in zip(names, counts, strict=True):
            length = len(self.sequences[name])
            needed += -(-(length + count) // PAGE_SIZE) - -(-length // PAGE_SIZE)
            if count and length % PAGE_SIZE:
                page = self.cache.block_table([name])[0, -1]
                writers[page] = writers.get(page, 0) + 1
        # Everyone who writes to a page that others hold copies it, but for the last who holds it.
        needed += sum(min(n, holders.count(page) - 1) for page, n in writers.items())
        return needed <= PAGES - len(set(holders))

    def some(self, data, **kwargs):
        return data.draw(st.lists(st.sampled_from(sorted(self.sequences)), **kwargs))

    def one(self, data):
        return data.draw(st.sampled_from(sorted(self.sequences)))

    @precondition(lambda self: len(self.sequences) < SEQUENCES)
    @rule(n=st.integers(0, 2))
    def add(self, n):
        for name in self.cache.add(n):
            assert name not in self.sequences
            assert name not in self.freed
            self.sequences[int(name)] = []

    @precondition(lambda self: self.sequences)
    @rule(data=st.data(), T=st.integers(0, 9), seed=seeds)
    def append_alike(self, data, T, seed):
        names = self.some(data, unique=True)
        self.append(names, [T] * len(names), T, seed, False)

    @precondition(lambda self: self.sequences)
    @rule(data=st.data(), seed=seeds)
    def append_some(self, data, seed):
        names = self.some(data, unique=True)
        counts = data.draw(st.lists(st.integers(0, 5), min_size=len(names), max_size=len(names)))
        self.append(names, counts, 5, seed, True)

    @precondition(lambda self: 0 < len(self.sequences) < SEQUENCES)
    @rule(data=st.data())
    def fork(self, data):
        source = self.one(data)
        name = self.cache.fork(source)
        assert name not in self.sequences
        assert name not in self.freed
        self.sequences[name] = list(self.sequences[source])

    @precondition(lambda self: self.sequences)
    @rule(data=st.data())
    def truncate(self, data):
        name = self.one(data)
        length = data.draw(st.integers(0, len(self.sequences[name])))
        self.cache.truncate(name, length)
        del self.sequences[name][length:]

    @precondition(lambda self: self.sequences)
    @rule(data=st.data())
    def free(self, data):
        name = self.one(data)
        self.cache.free(name)
        del self.sequences[name]
        self.freed.add(name)
        with pytest.raises(KeyError, match=str(name)):
            self.cache.append([name], *self.tokens(1, 1, 0))

    @precondition(lambda self: self.sequences)
    @rule(data=st.data())
    def reorder(self, data):
        names = self.some(data, unique=True)
        sources = self.some(data, min_size=len(names), max_size=len(names))
        self.cache.reorder(names, sources)
        self.sequences |= {name: list(self.sequences[x]) for name, x in zip(names, sources, strict=True)}

    @precondition(lambda self: self.cache is not None)
    @invariant()
    def pages_add_up(self):
        check_pages(self.cache)
        np.testing.assert_array_equal(self.cache.ids, sorted(self.sequences))


TestContiguous = Contiguous.TestCase
TestPaged = Paged.TestCase
# Enough steps to fill a cache, and to share, copy and give back.
TestContiguous.settings = TestPaged.settings = settings(stateful_step_count=40)
