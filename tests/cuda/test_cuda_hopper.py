"""Kernels of sm_90a whose warpgroups have roles, in the emulator: right, in any order of roles, and what it finds.

Right values are the textbook's formula in float64, which shares no code with the package.
"""

import re
import subprocess
from itertools import combinations, pairwise
from itertools import product as every

import ml_dtypes
import numpy as np
import pytest

import emulator as emulator_module
import numba_attention as na
from emulator import emulated
from emulator_roles import Deadlock
from grid import THOROUGH, in_turn
from machine_code import disassembler
from numba_attention.cuda import hopper, hopper_backward, kernels, tile_shapes
from numba_attention.cuda.spec import Spec

F16, BF16 = np.dtype(np.float16), np.dtype(ml_dtypes.bfloat16)
LIMITS = {F16: 1.5e-3, BF16: 1.2e-2}


@pytest.fixture
def gpu(monkeypatch):
    with emulated(monkeypatch, multiprocessors=1) as driver:
        yield driver


def normal(seed, *shape, dtype):
    return np.random.default_rng(seed).standard_normal(shape).astype(dtype)


def visible(L, S, causal=False, window=None, keys=None):
    i, j = np.arange(L)[:, None], np.arange(S)[None, :]
    seen = np.ones((L, S), bool)
    if causal:
        seen &= j <= i
    if window is not None:
        seen &= (j >= i - window[0]) & (j <= i + window[1])
    return seen if keys is None else seen & (j < keys)


def textbook(q, k, v, seen, grad, softcap=None, slopes=None, sinks=None, offset=0):
    """Result, lse and gradients of (heads, rows, E), with grouped heads, in float64; empty rows are 0 and -inf.

    Softcap of Gemma 2, then slopes of ALiBi, by the positions of queries from `offset` on; a sink is a key more.
    """
    q, k, v, grad = (np.asarray(x, np.float64) for x in (q, k, v, grad))
    group, scale = len(q) // len(k), q.shape[-1] ** -0.5
    keys, values = (np.repeat(x, group, 0) for x in (k, v))
    scores, derivative = q @ keys.swapaxes(-1, -2) * scale, 1.0
    if softcap is not None:
        curve = np.tanh(scores / softcap)
        scores, derivative = softcap * curve, 1 - curve**2
    if slopes is not None:
        i, j = np.arange(q.shape[1])[:, None] + offset, np.arange(k.shape[1])
        scores = scores - np.reshape(slopes, (-1, 1, 1)) * np.abs(i - j)
    scores = np.where(seen, scores, -np.inf)
    sink = np.full((len(q), 1, 1), -np.inf) if sinks is None else np.reshape(sinks, (-1, 1, 1)).astype(np.float64)
    with np.errstate(divide="ignore"):
        top = np.maximum(np.maximum(scores.max(-1, keepdims=True), sink), -1e300)
        weights = np.exp(scores - top)
        total = weights.sum(-1, keepdims=True) + np.exp(sink - top)
        lse = (top + np.log(total))[..., 0]
    p = weights / np.where(total == 0, 1, total)
    dp = grad @ values.swapaxes(-1, -2)
    ds = p * (dp - (p * dp).sum(-1, keepdims=True)) * derivative
    dk, dv = ds.swapaxes(-1, -2) @ q * scale, p.swapaxes(-1, -2) @ grad
    shared = [x.reshape(len(k), group, *x.shape[1:]).sum(1) for x in (dk, dv)]
    return p @ values, lse, ds @ keys * scale, *shared


def close(got, want, limit):
    got = np.asarray(got, np.float64)
    assert np.array_equal(np.isfinite(got), np.isfinite(want))
    finite = np.isfinite(want)
    assert np.abs(np.where(finite, got, 0) - np.where(finite, want, 0)).max() <= limit * np.abs(want[finite]).max()


def products(driver):
    return {(c.task, c.product) for c in driver.configs.values() if c.task in ("forward", "key") and not c.nan_safe}


CASES = {
    "plain": {},
    "causal": {"is_causal": True},
    "window": {"window": (60, 20)},
    "keys": {"key_lengths": 170},
}


@pytest.mark.parametrize(
    ("E", "name"), every((64, 128, 256), CASES) if THOROUGH else [*every((64, 128), CASES), (256, "causal")]
)
def test_both_passes(gpu, E, name):
    """Tiles at the ends of queries and keys, intervals that begin and end in tiles, heads in groups."""
    options, dtype = CASES[name], F16 if E == 128 else BF16
    L, S = (250, 250) if "is_causal" in options else (210, 290)
    q, grad = (normal(n, 1, 2, L, E, dtype=dtype) for n in (0, 1))
    k, v = (normal(n, 1, 1, S, E, dtype=dtype) for n in (2, 3))
    seen = visible(L, S, options.get("is_causal"), options.get("window"), options.get("key_lengths"))
    want = textbook(q[0], k[0], v[0], seen, grad[0])
    out, lse = na.attention(q, k, v, **options, return_lse=True, backend="cuda")
    close(out[0], want[0], LIMITS[dtype])
    close(lse[0], want[1], 1e-5)
    got = na.attention_backward(grad, q, k, v, out, lse, **options, backend="cuda")
    for made, right in zip((got.query, got.key, got.value), want[2:], strict=True):
        close(made[0], right, LIMITS[dtype])
    assert ("forward", "wgmma") in products(gpu)
    assert (("key", "wgmma") in products(gpu)) == (E <= 128)


# Without options, and with all that the forward kernel has.
EITHER = pytest.mark.parametrize("options", [{}, {"softcap": 3.0, "alibi_slopes": [0.1], "sinks": [1.5]}])
SLOPES = pytest.mark.parametrize("options", [{}, {"alibi_slopes": [0.1]}])
ALL = {"softcap": 3.0, "alibi_slopes": [0.1, -0.02], "sinks": [1.5, -np.inf]}


def of_textbook(options):
    names = {"softcap": "softcap", "alibi_slopes": "slopes", "sinks": "sinks", "query_offset": "offset"}
    return {names[name]: x for name, x in options.items() if name in names}


@pytest.mark.parametrize(("name", "E"), in_turn([*ALL, *3 * ["all"]], (64, 128, 256)))
def test_options(gpu, E, name):
    """Each option with grouped heads, with keys hidden in tiles at either end and rows that see nothing."""
    dtype, options = F16 if E == 128 else BF16, ALL if name == "all" else {name: ALL[name]}
    L = S = 250
    q, grad = (normal(n, 1, 2, L, E, dtype=dtype) for n in (0, 1))
    k, v = (normal(n, 1, 1, S, E, dtype=dtype) for n in (2, 3))
    for rule, seen in (
        ({"is_causal": True}, visible(L, S, True)),
        ({"window": (60, 20), "key_lengths": 150, "query_offset": 30}, visible(L + 30, S, False, (60, 20), 150)[30:]),
    ):
        want = textbook(q[0], k[0], v[0], seen, grad[0], **of_textbook(options | rule))
        out, lse = na.attention(q, k, v, **options, **rule, return_lse=True, backend="cuda")
        close(out[0], want[0], LIMITS[dtype])
        close(lse[0], want[1], 1e-5)
        assert products(gpu) == {("forward", "wgmma")}
        gpu.configs.clear()
        got = na.attention_backward(grad, q, k, v, out, lse, **options, **rule, backend="cuda")
        for made, right in zip((got.query, got.key, got.value), want[2:], strict=True):
            close(made[0], right, LIMITS[dtype])
        large = E <= 128 and "softcap" not in options
        assert {product for task, product in products(gpu) if task == "key"} == {"wgmma" if large else "tensor"}
        gpu.configs.clear()


@pytest.mark.parametrize("E", [40, 128, 256])
def test_options_of_packed_sequences(gpu, E):
    """Positions and heads are those of each sequence, of which one has no rows."""
    lengths = np.array([200, 0, 37, 130])
    ends = np.concatenate([[0], lengths.cumsum()]).astype(np.int64)
    q, k, v, grad = (normal(n, ends[-1], heads, E, dtype=BF16) for n, heads in enumerate((2, 1, 1, 2)))
    packed = {"cu_seqlens_q": ends, "cu_seqlens_k": ends, "is_causal": True, "backend": "cuda"}
    out, lse = na.attention_varlen(q, k, v, **packed, **ALL, return_lse=True)
    assert products(gpu) == {("forward", "wgmma")}
    of_gradients = {name: x for name, x in ALL.items() if name != "softcap"}
    own = na.attention_varlen(q, k, v, **packed, **of_gradients, return_lse=True)
    got = na.attention_varlen_backward(grad, q, k, v, *own, **packed, **of_gradients)
    assert (("key", "wgmma") in products(gpu)) == (E <= 128)
    for first, last in pairwise(ends):
        if first == last:
            continue
        parts = [np.swapaxes(x[first:last], 0, 1) for x in (q, k, v)]
        seen = visible(last - first, last - first, True)
        want = textbook(*parts, seen, np.zeros_like(parts[0]), **of_textbook(ALL))
        close(np.swapaxes(out[first:last], 0, 1), want[0], LIMITS[BF16])
        close(lse[:, first:last], want[1], 1e-5)
        want = textbook(*parts, seen, np.swapaxes(grad[first:last], 0, 1), **of_textbook(of_gradients))
        for made, right in zip((got.query, got.key, got.value), want[2:], strict=True):
            close(np.swapaxes(made[first:last], 0, 1), right, LIMITS[BF16])


@pytest.mark.parametrize("capability", [(8, 0), (9, 0)])
def test_slopes_of_far_positions(monkeypatch, capability):
    """Distances that float32 rounds: to 2^-24 of themselves."""
    q, k, v = (normal(n, 1, 1, 200, 64, dtype=F16) for n in range(3))
    options = {"alibi_slopes": [1e-7], "query_offset": 2**28 + 77}
    want = textbook(q[0], k[0], v[0], visible(200, 200), q[0], **of_textbook(options))
    shared = 166912 if capability == (8, 0) else 232448
    with emulated(monkeypatch, multiprocessors=1, capability=capability, shared_memory=shared):
        out, lse = na.attention(q, k, v, **options, return_lse=True, backend="cuda")
        got = na.attention_backward(q, q, k, v, out, lse, **options, backend="cuda")
    close(out[0], want[0], LIMITS[F16])
    close(lse[0], want[1], 1e-5)
    for made, right in zip((got.query, got.key, got.value), want[2:], strict=True):
        close(made[0], right, LIMITS[F16])


@pytest.mark.parametrize(
    ("options", "product"),
    [
        ({"softcap": 3.0, "sinks": [1.0, 2.0]}, "wgmma"),
        ({"softcap": 3.0, "mask": np.ones((200, 200), bool)}, "tensor"),
        ({"alibi_slopes": [0.1, 0.2], "bias": np.zeros((200, 200), F16)}, "tensor"),
        ({"sinks": [1.0, 2.0], "dropout_p": 0.1, "seed": 0}, "tensor"),
        ({"softcap": 3.0, "score_mod": lambda s, batch, head, i, j: s + 1.0}, "tensor"),
    ],
)
def test_which_options_it_has(gpu, monkeypatch, options, product):
    """All else is left to mma.sync, as is everything where the kernels are turned off."""
    q, k, v = (normal(n, 1, 2, 200, 64, dtype=F16) for n in range(3))
    for setting, used in (("1", product), ("0", "tensor")):
        monkeypatch.setenv(tile_shapes.WGMMA, setting)
        gpu.configs.clear()
        na.attention(q, k, v, **options, backend="cuda")
        assert products(gpu) == {("forward", used)}


@pytest.mark.parametrize(("E", "Ev"), [(48, 56), (64, 40), (120, 128)])
def test_fewer_features_than_tiles_have(gpu, E, Ev):
    """Tiles are filled up with zeros, and not with the row that follows in memory."""
    q, k, v, grad = (normal(n, 1, 1, 230, e, dtype=F16) for n, e in enumerate((E, E, Ev, Ev)))
    want = textbook(q[0], k[0], v[0], visible(230, 230, True), grad[0])
    out, lse = na.attention(q, k, v, is_causal=True, return_lse=True, backend="cuda")
    got = na.attention_backward(grad, q, k, v, out, lse, is_causal=True, backend="cuda")
    for made, right in zip((out, lse, got.query, got.key, got.value), want, strict=True):
        close(made[0], right, LIMITS[F16])
    assert products(gpu) == {("forward", "wgmma"), ("key", "wgmma")}


def test_packed_sequences(gpu):
    """Sequences of any length, one without rows, and one shorter than a tile."""
    lengths = np.array([200, 0, 37, 130])
    ends = np.concatenate([[0], lengths.cumsum()]).astype(np.int64)
    q, k, v, grad = (normal(n, ends[-1], 2, 64, dtype=BF16) for n in range(4))
    out, lse = na.attention_varlen(q, k, v, cu_seqlens_q=ends, cu_seqlens_k=ends, is_causal=True, return_lse=True,
                                   backend="cuda")  # fmt: skip
    got = na.attention_varlen_backward(grad, q, k, v, out, lse, cu_seqlens_q=ends, cu_seqlens_k=ends, is_causal=True,
                                       backend="cuda")  # fmt: skip
    assert products(gpu) == {("forward", "wgmma"), ("key", "wgmma")}
    for first, last in pairwise(ends):
        if first == last:
            continue
        parts = [np.swapaxes(x[first:last], 0, 1) for x in (q, k, v)]
        want = textbook(*parts, visible(last - first, last - first, True), np.swapaxes(grad[first:last], 0, 1))
        for made, right in zip((out, got.query, got.key, got.value), (want[0], *want[2:]), strict=True):
            close(np.swapaxes(made[first:last], 0, 1), right, LIMITS[BF16])


@pytest.mark.parametrize("first", [1, 2, 3])
@pytest.mark.parametrize("landing", ["wait", "issue"])
def test_roles_may_come_in_any_order(monkeypatch, first, landing):
    """The same bits, whichever warpgroup goes first, and whenever copies land and products read."""
    q, k, v, grad = (normal(n, 1, 1, 300, 64, dtype=F16) for n in range(4))
    made = []
    for begin, land in ((0, "wait"), (first, landing)):
        with emulated(monkeypatch, multiprocessors=1, landing=land, first=begin):
            out, lse = na.attention(q, k, v, is_causal=True, return_lse=True, backend="cuda")
            got = na.attention_backward(grad, q, k, v, out, lse, is_causal=True, backend="cuda")
        made.append([out, lse, got.key, got.value])
    for one, other in zip(*made, strict=True):
        assert np.array_equal(one, other)


@EITHER
def test_nothing_leaks_from_what_is_hidden(gpu, options):
    """NaN in keys and values that rows do not see: their tiles are multiplied, and a second kernel mends the rows."""
    q, k, v, grad = (normal(n, 1, 1, 250, 128, dtype=BF16) for n in range(4))
    seen = visible(250, 250, True)
    want = textbook(q[0], k[0], v[0], seen, grad[0], **of_textbook(options))
    k[0, 0, 200:], v[0, 0, 200:] = np.nan, np.inf
    out, lse = na.attention(q, k, v, is_causal=True, **options, return_lse=True, backend="cuda")
    assert products(gpu) == {("forward", "wgmma")}
    close(out[0, :, :200], want[0][:, :200], LIMITS[BF16])
    close(lse[0, :, :200], want[1][:, :200], 1e-5)
    assert np.isnan(out[0, :, 200:].astype(np.float32)).all()


@pytest.mark.parametrize("capability", [(8, 0), (9, 0)])
@pytest.mark.parametrize("S", [40, 140])
def test_keys_that_do_not_exist_reach_no_gradient(monkeypatch, capability, S):
    """Where all scores are about -500, the weight of a row of zeros behind the last key is exp(500)."""
    q, k = np.full((1, 1, 128, 64), 7.9, F16), np.full((1, 1, S, 64), -7.9, F16)
    v, grad = normal(0, 1, 1, S, 64, dtype=F16), normal(1, 1, 1, 128, 64, dtype=F16)
    shared = 166912 if capability == (8, 0) else 232448
    with emulated(monkeypatch, capability=capability, shared_memory=shared) as driver:
        out, lse = na.attention(q, k, v, return_lse=True, backend="cuda")
        got = na.attention_backward(grad, q, k, v, out, lse, backend="cuda")
    assert (("key", "wgmma") in products(driver)) == (capability == (9, 0))
    want = textbook(q[0], k[0], v[0], visible(128, S), grad[0])
    for made, right in zip((got.key, got.value), want[3:], strict=True):
        close(made[0], right, 2e-3)
    # Gradients of queries cancel: dS sums to 0 over equal keys. Their terms are of the size of dS K.
    assert np.abs(got.query.astype(np.float64)).max() < 2e-3


def test_huge_scores(gpu):
    """Rows whose lse does not determine the denominator: scores of -1e9."""
    rng = np.random.default_rng(0)
    q, k = np.full((1, 1, 130, 64), 2.0**15, BF16), np.full((1, 1, 150, 64), -(2.0**12), BF16)
    v, grad = (rng.standard_normal((1, 1, n, 64)).astype(BF16) for n in (150, 130))
    out, lse = na.attention(q, k, v, return_lse=True, backend="cuda")
    got = na.attention_backward(grad, q, k, v, out, lse, backend="cuda")
    want = textbook(q[0], k[0], v[0], visible(130, 150), grad[0])
    close(out[0], want[0], LIMITS[BF16])
    close(got.value[0], want[4], LIMITS[BF16])


def test_it_can_be_turned_off(gpu, monkeypatch):
    """At any time within a process."""
    q, k, v = (normal(n, 1, 2, 200, 64, dtype=F16) for n in range(3))
    for setting, product in (("1", "wgmma"), ("0", "tensor"), ("1", "wgmma")):
        monkeypatch.setenv(tile_shapes.WGMMA, setting)
        gpu.configs.clear()
        out, lse = na.attention(q, k, v, return_lse=True, backend="cuda")
        na.attention_backward(out, q, k, v, out, lse, backend="cuda")
        assert products(gpu) == {("forward", product), ("key", product)}


@pytest.mark.parametrize("task", ["forward", "fused_dq"])
def test_shapes_that_are_tried_are_used(gpu, task):
    """``benchmarks/gpu.py --tune`` times the tiles that it asks for."""
    q, k, v = (normal(n, 1, 2, 200, 64, dtype=F16) for n in range(3))
    config = Spec(task, "float16", 64, 64, "tensor", 1, 8, 4, 32, arch="sm_90a")
    tile_shapes.use(task, "float16", 64, 64, config)
    try:
        out, lse = na.attention(q, k, v, return_lse=True, backend="cuda")
        na.attention_backward(out, q, k, v, out, lse, backend="cuda")
    finally:
        tile_shapes.use(task, "float16", 64, 64, None)
    assert ("forward" if task == "forward" else "key", "tensor") in products(gpu)


def attend(**options):
    q, k, v = (normal(n, 1, 1, 700, 64, dtype=F16) for n in range(3))
    return na.attention(q, k, v, **options, backend="cuda")


def differentiate(**options):
    q, k, v, grad = (normal(n, 1, 1, 300, 64, dtype=F16) for n in range(4))
    out, lse = na.attention(q, k, v, **options, return_lse=True, backend="cuda")
    return na.attention_backward(grad, q, k, v, out, lse, **options, backend="cuda")


class TestWhatIsFound:
    """Mistakes in such kernels that the emulator reports."""

    @EITHER
    def test_a_deadlock(self, gpu, monkeypatch, options):
        """With two slots and three loads in flight, a slot is waited for that only an unpublished load would free."""
        groups, columns, _, _, few, many = hopper.SHAPES[64]
        monkeypatch.setitem(hopper.SHAPES, 64, (groups, columns, 2, 3, few, many))
        kernels.shared.cache_clear()
        with pytest.raises(Deadlock, match="mbarrier"):
            attend(**options)
        kernels.shared.cache_clear()

    @EITHER
    def test_a_missing_fence(self, gpu, monkeypatch, options):
        monkeypatch.setattr(emulator_module.Emit, "fence_proxy", lambda self: None)
        with pytest.raises(AssertionError, match="without fence_proxy"):
            attend(**options)

    @EITHER
    def test_a_missing_fence_of_registers(self, gpu, monkeypatch, options):
        monkeypatch.setattr(emulator_module.Emit, "fence_products", lambda self: None)
        with pytest.raises(AssertionError, match="fence_products"):
            attend(**options)

    @EITHER
    def test_a_sum_that_no_wait_names(self, gpu, monkeypatch, options):
        """Its registers may still be written, whatever the compiler makes of it."""
        wait = emulator_module.Emit.wait_products

        def forgetful(self, groups, *sums):
            named = wait(self, groups, *sums[1:]) if len(sums) == 2 else wait(self, groups, *sums)
            return [sums[0], *named] if len(sums) == 2 else named

        monkeypatch.setattr(emulator_module.Emit, "wait_products", forgetful)
        assert not np.isfinite(attend(**options).astype(np.float32)).all()

    @EITHER
    def test_a_slot_that_is_freed_too_early(self, gpu, monkeypatch, options):
        """Products read when they are waited for: what is published as empty before that is overwritten."""
        wait = emulator_module.Emit.wait_products
        monkeypatch.setattr(emulator_module.Emit, "wait_products", lambda self, n, *sums: wait(self, n + 1, *sums))
        with pytest.raises(AssertionError):
            attend(**options)

    @SLOPES
    def test_rows_that_are_overwritten_while_they_are_added(self, gpu, monkeypatch, options):
        """The sums of dQ of a tile are read late, so the next tile must wait for that."""
        monkeypatch.setattr(emulator_module.Emit, "wait_added", lambda self, read: None)
        with pytest.raises(AssertionError, match="overwritten"):
            differentiate(**options)

    @SLOPES
    def test_rows_that_are_added_without_a_fence(self, gpu, monkeypatch, options):
        add, unfenced = emulator_module.Emit.add_rows, []

        def forgetful(self, address, shared, size, where):
            start = int(self._all(shared)[0])
            self._shared.unfenced[start // 4] = 1
            unfenced.append(start)
            add(self, address, shared, size, where)

        monkeypatch.setattr(emulator_module.Emit, "add_rows", forgetful)
        with pytest.raises(AssertionError, match="without fence_proxy"):
            differentiate(**options)
        assert unfenced

    @SLOPES
    def test_more_registers_than_a_block_has(self, gpu, monkeypatch, options):
        """A warpgroup waits for ever for registers that no other gives back: each of 384 threads begins with 168."""
        monkeypatch.setitem(hopper_backward.SHAPES, 64, (*hopper_backward.SHAPES[64][:-2], 32, 240))
        with pytest.raises(AssertionError, match="setmaxnreg"):
            differentiate(**options)

    @EITHER
    def test_a_wrong_descriptor(self, gpu, monkeypatch, options):
        step = hopper.Slabs.step
        monkeypatch.setattr(hopper.Slabs, "step", lambda self, n, turned: step(self, n, turned) + (n == 1 and turned))
        q, k, v = (normal(n, 1, 1, 200, 64, dtype=F16) for n in range(3))
        want = textbook(q[0], k[0], v[0], visible(200, 200), q[0], **of_textbook(options))[0]
        with pytest.raises(AssertionError):
            close(na.attention(q, k, v, **options, backend="cuda")[0], want, LIMITS[F16])


def sets_of_options():
    """All sets of what the kernels have."""
    return [
        (task, names)
        for task, options in (("forward", hopper.OPTIONS), ("key", hopper_backward.OPTIONS))
        for n in range(len(options) + 1)
        for names in combinations(options, n)
    ]


@pytest.mark.parametrize(("kernel", "E"), in_turn(every(sets_of_options(), (False, True)), (64, 128, 256)), ids=str)
def test_machine_code(tmp_path, kernel, E):
    """No register spills, every product is there once, and the assembler ignores nothing (`toolchain.IGNORED`)."""
    pytest.importorskip("numba_cuda")
    pytest.importorskip("cuda.core")
    (task, options), flags = kernel
    of = hopper.spec_of if task == "forward" else hopper_backward.spec_of
    c = of(Spec(task, "float16", E, E, "tensor", fused_dq=task == "key", flags=flags, arch="sm_90a"))
    c = c if c is None else c.with_(**dict.fromkeys(options, True))
    if c is None:
        assert (task, E) == ("key", 256)
        return
    compiled = kernels.compile_(c)
    assert compiled.spills == 0, compiled.log
    assert compiled.registers * c.threads <= 65536
    assert kernels.shared(c) <= 232448
    program, path = disassembler(), tmp_path / "kernel.cubin"
    path.write_bytes(compiled.code)
    text = subprocess.run([program, "-c", path], capture_output=True, text=True, check=True).stdout
    names = re.findall(r"^\s*/\*[0-9a-f]{4,}\*/\s+(?:@!?U?P\w+\s+)?([A-Z0-9]+)", text, re.MULTILINE)
    scores, sums = E // 16, c.columns // 16
    # The gradients of the last tile of queries, and the scores of the first, stand beside the loop.
    expected = 2 * (scores + sums) if task == "forward" else 2 * (2 * scores + 2 * sums + c.rows // 16)
    assert names.count("HGMMA") == expected
    assert names.count("USETMAXREG") == 2
    assert names.count("UBLKRED") == (0 if task == "forward" else 2)
    assert not names.count("LDL") + names.count("STL")
