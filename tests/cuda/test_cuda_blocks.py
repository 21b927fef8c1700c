"""Blocks of a larger problem on a GPU, in the emulator: dropout and mods count from the beginning of the whole."""

import numpy as np
import pytest

from cases import DTYPES, assert_close, grad_tolerance, tolerance
from dropout_mask import kept
from emulator import emulated
from numba_attention.cuda import tile_shapes
from numba_attention.options import Options
from numba_attention.problem.dense import Origin

tasks = pytest.importorskip("numba_attention.dask.tasks")

DROP = {"dropout_p": 0.3, "seed": 2**40 + 99}


@pytest.fixture
def driver(monkeypatch):
    with emulated(monkeypatch) as driver:
        yield driver


def score(s, batch, head, i, j, table, factor):
    return s + factor * table[head] * (i - 2 * j + batch)


def visible(batch, head, i, j, table, factor):
    return (i + 3 * j + 2 * head + batch) % 4 != 0


class Block:
    """Rows 80 .. 80 + L and keys 64 .. 64 + S of some heads of two sequences, numbers 7 and 3, and the textbook."""

    row, first_key, head, numbers = 80, 64, 2, (7, 3)

    def __init__(self, L, S, H, Hkv, E, Ev, dtype, options):
        rng = np.random.default_rng([L, S, E])
        shapes = (2, H, L, E), (2, Hkv, S, E), (2, Hkv, S, Ev), (2, H, L, Ev)
        *self.arrays, self.grad_out = (rng.standard_normal(shape).astype(DTYPES[dtype]) for shape in shapes)
        self.options = options
        self.table = rng.standard_normal(self.head + H)
        offset = self.row - self.first_key
        more = {"mod_args": (self.table, 0.01)} if "score_mod" in options or "mask_mod" in options else {}
        self.settings = Options(query_offset=offset, **options, **more)
        self.origin = Origin(np.array(self.numbers), self.head, self.first_key)
        self.run = tasks.Run("cuda", None)
        self.mods = tasks.mods_of(self.settings)
        self.i, self.j = np.arange(L)[:, None] + self.row, np.arange(S) + self.first_key

    def textbook(self):
        """Return out, lse, and a function of both gradients of `out` and the sums of everything."""
        q, k, v = (x.astype(np.float64) for x in self.arrays)
        H, group = q.shape[1], q.shape[1] // k.shape[1]
        k, v = k.repeat(group, 1), v.repeat(group, 1)
        scale = q.shape[-1] ** -0.5
        batch = np.array(self.numbers)[:, None, None, None]
        heads = np.arange(H)[:, None, None] + self.head
        s = scale * q @ k.swapaxes(-1, -2)
        distance = self.i - 2 * self.j + batch
        if "score_mod" in self.options:
            s = s + 0.01 * self.table[heads] * distance
        seen = np.ones(s.shape, bool)
        if "mask_mod" in self.options:
            seen &= (self.i + 3 * self.j + 2 * heads + batch) % 4 != 0
        if "is_causal" in self.options:
            seen &= self.j <= self.i
        s = np.where(seen, s, -np.inf)
        top = s.max(-1, keepdims=True, initial=-1e300)
        e = np.exp(s - top)
        total = e.sum(-1, keepdims=True)
        p = e / np.where(total == 0, 1, total)
        drop = np.ones(p.shape)
        if "dropout_p" in self.options:
            every = self.first_key + s.shape[-1]
            for n, number in enumerate(self.numbers):
                mask = kept(0.3, self.options["seed"], number, range(self.head, self.head + H), self.i[:, 0], every)
                drop[n] = mask[..., self.first_key :]
        with np.errstate(divide="ignore"):
            lse = np.where(total == 0, -np.inf, top + np.log(total))[..., 0]
        out = (p * drop) @ v

        def gradients(grad_out):
            g = grad_out.astype(np.float64)
            dp = drop * (g @ v.swapaxes(-1, -2))
            ds = p * (dp - (g * out).sum(-1, keepdims=True))
            summed = [x.reshape(2, -1, group, *x.shape[-2:]).sum(2) for x in
                      (scale * ds.swapaxes(-1, -2) @ q, (p * drop).swapaxes(-1, -2) @ g)]  # fmt: skip
            of_table = np.zeros(len(self.table))
            of_table[self.head :] = (0.01 * ds * distance).sum((0, 2, 3))
            return [scale * ds @ k, *summed], of_table

        return out, lse, gradients


BLOCKS = {
    "dropout": (40, 70, 4, 2, 24, 24, DROP),
    "dropout, causal": (70, 60, 2, 2, 32, 40, DROP | {"is_causal": True}),
    "mods": (40, 70, 4, 2, 24, 24, {"score_mod": score, "mask_mod": visible}),
    "all": (40, 75, 4, 2, 64, 40, DROP | {"score_mod": score, "mask_mod": visible, "is_causal": True}),
    "few rows": (3, 150, 4, 2, 64, 64, DROP | {"score_mod": score}),
    "large heads": (17, 40, 2, 1, 160, 32, DROP | {"mask_mod": visible}),
}


def check(block, dtype, deterministic=False):
    options = block.settings
    out, lse = tasks.part(*block.arrays, None, None, options, block.run, block.origin, block.mods)
    want, want_lse, gradients = block.textbook()
    assert_close(out, want, tolerance(dtype)[0])
    assert_close(lse, want_lse, tolerance(dtype)[1])
    of_table = "score_mod" in block.options and not deterministic
    grads = tasks.pair_gradients(
        block.grad_out, *block.arrays, want.astype(block.grad_out.dtype), lse, None, None, None, options, block.run,
        block.origin, block.mods, [0] if of_table else None,
    )  # fmt: skip
    wanted, table = gradients(block.grad_out)
    for got, right in zip(grads[:3], wanted, strict=True):
        assert_close(got, right, grad_tolerance(dtype), 1)
    if of_table:
        assert_close(grads.mod_args[0], table, 3 * grad_tolerance(dtype), 1)


CASES = [
    *(("all", dtype) for dtype in DTYPES), ("dropout", "float32"), ("dropout, causal", "float16"), ("mods", "float32"),
    ("few rows", "bfloat16"), ("large heads", "bfloat16"),
]  # fmt: skip


@pytest.mark.parametrize(("name", "dtype"), CASES)
def test_against_the_textbook(driver, name, dtype):
    check(Block(*BLOCKS[name][:-1], dtype, BLOCKS[name][-1]), dtype)


@pytest.mark.gpu
@pytest.mark.parametrize(("name", "dtype"), CASES)
def test_on_a_gpu(name, dtype):
    check(Block(*BLOCKS[name][:-1], dtype, BLOCKS[name][-1]), dtype)


def test_gradients_in_two_passes(driver, monkeypatch):
    monkeypatch.setenv(tile_shapes.DETERMINISTIC, "1")
    check(Block(*BLOCKS["all"][:-1], "bfloat16", BLOCKS["all"][-1]), "bfloat16", deterministic=True)
    assert {"query", "key"} <= {c.task for c in driver.configs.values()}


@pytest.mark.usefixtures("synchronous")
@pytest.mark.parametrize(("seed", "dtype"), [(0, "float32"), (1, "float16"), (2, "bfloat16")])
def test_chunks_that_cut_everything(driver, seed, dtype):
    """Calls of random options over Dask arrays of random chunks, with dropout and mods, whose tasks use the backend."""
    blocks, rng = pytest.importorskip("dask_blocks"), np.random.default_rng(seed)
    shapes = (2, 4, 37, 8), (2, 2, 70, 8), (2, 2, 70, 5)
    arrays = [rng.standard_normal(shape).astype(DTYPES[dtype]) for shape in shapes]
    options = DROP | {
        "score_mod": blocks.tilt, "mask_mod": blocks.sieve, "mod_args": (rng.standard_normal(4), 0.25),
        "sinks": rng.standard_normal(4), "is_causal": "bottom-right", "query_lengths": [37, 20],
    }  # fmt: skip
    blocks.check(rng, "attention", arrays, [], options, "cuda", blocks.LIMITS[dtype])


@pytest.mark.usefixtures("synchronous")
def test_chunks_that_cut_packed_sequences(driver):
    blocks, rng = pytest.importorskip("dask_blocks"), np.random.default_rng(0)
    arrays = [rng.standard_normal((90, heads, 8)).astype(np.float32) for heads in (4, 2, 2)]
    starts = np.array([0, 7, 7, 60, 90])
    options = DROP | {"score_mod": blocks.tilt, "mask_mod": blocks.sieve, "mod_args": (rng.standard_normal(4), 0.25)}
    blocks.check(
        rng, "attention_varlen", arrays, [starts, starts], options | {"window": (20, 5)}, "cuda",
        blocks.LIMITS["float32"],
    )  # fmt: skip


def test_keys_beyond_what_kernels_count(driver):
    block = Block(*BLOCKS["dropout"][:-1], "float32", DROP)
    far = block.origin._replace(key=2**29)
    with pytest.raises(ValueError, match="keys up to number 536870912, got 70 from number 536870912 on"):
        tasks.part(*block.arrays, None, None, block.settings, block.run, far, block.mods)
