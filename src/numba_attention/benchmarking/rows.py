"""The rows of the benchmark: shapes and options of the calls that are timed, and the bars they are held to."""

import math
from dataclasses import dataclass, field, replace
from functools import cache
from typing import Any

import numpy as np

from ..masks.blockmask import BlockMask
from ..options import Array

_SHARES = {"": 1, "tenth": 0.1, "causal": 0.5, "all": 1}
_SIZES = {"float32": 4, "float64": 8, "float16": 2, "bfloat16": 2}


# Calls of x, of shape (B, H, L, E), in a new process, in which nothing is compiled and no kernel is cached.
FIRST_CALLS = {
    "first call": "na.attention(x, x, x)",
    "first call of few queries": "na.attention(x[:, :, :1], x, x)",
    "first call of weights": "na.attention_weights(x, x)",
    "first call of the layer": "na.MultiHeadAttention(x.shape[-1], 2, rng=0)(x[0])",
    "first call of gradients": "na.attention_backward(x, x, x, x, x, np.ones(x.shape[:-1], x.dtype)).query",
}


@dataclass(frozen=True)
class Row:
    """One call by shape and options, in terms that every library understands."""

    name: str
    B: int = 1
    H: int = 8
    Hkv: int = 8
    L: int = 4096
    S: int = 4096
    E: int = 64
    Ev: int = 64
    dtype: str = "float32"
    is_causal: bool = False
    window: tuple[int, int] | None = None
    mask: bool = False  # (B, 1, 1, S); nine keys in ten are visible, at random, so that no tile can be skipped
    blocks: str = ""  # a `BlockMask`: a "tenth" of the blocks of 128 x 128, "causal", or "all"
    bias: bool = False  # (H, L, S)
    softcap: float | None = None
    alibi: bool = False
    dropout: float = 0.0
    mod: str = ""  # a `score_mod`, of `rules.mod_of`; its arrays get gradients too in "backward"
    # "backward", "both" one after the other, or second derivatives: "jvp", "double backward" without the forward pass,
    # and "hvp", a Hessian-vector product by PyTorch's bridge. Or one of FIRST_CALLS.
    task: str = "forward"
    bars: dict[str, float] = field(default_factory=dict)  # metric of `runner.Result`: its least value (us: its largest)
    baseline: "Row | None" = None  # the row whose rate the metric "own" is relative to

    @property
    def pairs(self) -> float:
        """Visible query-key pairs of a head; a causal call counts as half of all pairs, as is customary."""
        if self.window is not None:
            left, right = self.window
            i = np.arange(self.L)
            return float((np.minimum(i + right + 1, self.S) - np.maximum(i - left, 0)).clip(0).sum())
        return self.L * self.S * (_SHARES[self.blocks] / 2 if self.is_causal else _SHARES[self.blocks])

    @property
    def flops(self) -> float:
        """Floating-point operations of the products: two forward, five backward, the fewest of second derivatives."""
        E, Ev = self.E, self.Ev
        features = {
            "forward": E + Ev,
            "backward": 3 * E + 2 * Ev,
            "both": 4 * E + 3 * Ev,
            "jvp": 3 * E + 3 * Ev,
            "double backward": 7 * E + 5 * Ev,
            "hvp": 14 * E + 10 * Ev,
        }.get(self.task, 0)
        return 2 * self.B * self.H * self.pairs * features

    @property
    def bytes(self) -> int:
        """Bytes that must be read at least once: those of query, key, value and bias."""
        words = self.B * (self.H * self.L * self.E + self.Hkv * self.S * (self.E + self.Ev))
        return _SIZES[self.dtype] * words + (4 * self.H * self.L * self.S if self.bias else 0)

    @property
    def compute_dtype(self) -> str:
        """The precision in which the products accumulate, and in which NumPy's matrix product is measured."""
        return "float64" if self.dtype == "float64" else "float32"


@cache
def numpy_dtype(name: str) -> "np.dtype[Any]":
    """Return a dtype by name, bfloat16 included; without `ml_dtypes` that is a ModuleNotFoundError."""
    if name == "bfloat16":
        import ml_dtypes

        bfloat16: np.dtype[Any] = np.dtype(ml_dtypes.bfloat16)
        return bfloat16
    return np.dtype(name)


def inputs(row: Row) -> dict[str, Array]:
    """Make the arrays of a row, the same ones in every process."""
    rng = np.random.default_rng(0)
    dtype = numpy_dtype(row.dtype)

    def normal(*shape: int) -> Array:
        return rng.standard_normal(shape, dtype=np.float32).astype(dtype)

    arrays = {
        "query": normal(row.B, row.H, row.L, row.E),
        "key": normal(row.B, row.Hkv, row.S, row.E),
        "value": normal(row.B, row.Hkv, row.S, row.Ev),
    }
    if row.mask:
        arrays["mask"] = rng.random((row.B, 1, 1, row.S)) < 0.9
    if row.bias:
        arrays["bias"] = rng.standard_normal((row.H, row.L, row.S), dtype=np.float32)
    if row.alibi:
        arrays["alibi_slopes"] = (2.0 ** -np.arange(1, row.H + 1)).astype(np.float32)
    return arrays


def block_mask(row: Row) -> BlockMask:
    """Make the block mask of a row."""
    if row.blocks == "causal":
        return BlockMask.causal(row.L, row.S)
    height, width = row.L // 128, row.S // 128
    shown = np.random.default_rng(1).permutation(height * width) < _SHARES[row.blocks] * height * width
    return BlockMask.from_array(shown.reshape(height, width).repeat(128, 0).repeat(128, 1))


def gradient_of_out(row: Row) -> Array:
    """Make the gradient that the backward pass of a row begins with."""
    rng = np.random.default_rng(2)
    gradient = rng.standard_normal((row.B, row.H, row.L, row.Ev), dtype=np.float32)
    return gradient.astype(numpy_dtype(row.dtype))


def directions(row: Row) -> list[Array]:
    """Make the tangents of query, key and value, for second derivatives."""
    rng = np.random.default_rng(3)
    shapes = (row.B, row.H, row.L, row.E), (row.B, row.Hkv, row.S, row.E), (row.B, row.Hkv, row.S, row.Ev)
    return [rng.standard_normal(shape, dtype=np.float32).astype(numpy_dtype(row.dtype)) for shape in shapes]


def _plain(L: int, E: int) -> Row:
    return Row(f"plain {L} E{E}", L=L, S=L, E=E, Ev=E)


def _rows() -> dict[str, Row]:
    dense = Row("full 4096 E64")
    wide = Row("full 4096 E128", E=128, Ev=128)
    medium = _plain(2048, 64)
    option = replace(medium, bars={"own": 0.85}, baseline=medium)
    encoder = {"torch": 1.3, "onnxruntime": 1.1}
    back = replace(medium, name="backward 2048 E64", task="backward", bars={"torch": 1.5, "gemm": 0.95})
    long_back = replace(back, name="backward 4096 E64", L=4096, S=4096)
    causal_back = replace(back, name="backward causal 2048 E64", is_causal=True, bars={"torch": 1.7, "gemm": 0.95})
    blocks = replace(_plain(8192, 64), baseline=_plain(8192, 64))
    blocks_back = replace(blocks, task="backward", baseline=replace(_plain(8192, 64), task="backward"))
    causal, causal_8192_back = (
        replace(row, is_causal=True) for row in (_plain(8192, 64), blocks_back.baseline or back)
    )
    smallest = replace(_plain(1, 64), name="smallest 1x1x1x64", H=1, Hkv=1, bars={"us": 2.5})
    wide_bars = {"torch": 1.25, "gemm": 0.95}
    both = replace(medium, name="forward and backward 2048 E64", task="both")
    rows = [
        replace(dense, bars={"torch": 1.4, "gemm": 1.0}),
        replace(wide, bars={"torch": 1.4, "gemm": 0.95}),
        replace(dense, name="causal 4096 E64", is_causal=True, bars={"torch": 1.4, "gemm": 1.0}),
        replace(wide, name="causal 4096 E128", is_causal=True, bars={"torch": 1.4, "gemm": 0.95}),
        Row("encoder B1 H16 L1024 E64", 1, 16, 16, 1024, 1024, bars=encoder),
        Row("encoder B8 H12 L512 E64", 8, 12, 12, 512, 512, bars=encoder),
        Row("encoder B32 H12 L128 E32", 32, 12, 12, 128, 128, 32, 32, bars=encoder),
        Row("GQA causal H32 Hkv8 2048 E128", 1, 32, 8, 2048, 2048, 128, 128, is_causal=True, bars={"torch": 1.3}),
        replace(dense, name="bfloat16 4096 E64", dtype="bfloat16", bars={"torch": 2.0, "own": 1.7}, baseline=dense),
        replace(wide, name="bfloat16 4096 E128", dtype="bfloat16", bars={"torch": 2.0, "own": 1.7}, baseline=wide),
        replace(dense, name="float16 4096 E64", dtype="float16", bars={"torch": 1.0, "own": 0.9}, baseline=dense),
        replace(dense, name="float64 4096 E64", dtype="float64", bars={"torch": 1.2, "gemm": 0.95}),
        replace(_plain(8192, 64), name="window 8192 E64", window=(256, 256), bars={"own": 1 / 1.3}, baseline=dense),
        replace(option, name="bias (H,L,S) 2048 E64", bias=True, bars={"own": 0.75, "torch": 2.0}),
        replace(option, name="Ev 128, 2048 E64", Ev=128),
        replace(option, name="mask (B,1,1,S) 2048 E64", mask=True),
        replace(option, name="softcap 2048 E64", softcap=30.0),
        replace(option, name="ALiBi 2048 E64", alibi=True),
        replace(blocks, name="tenth of blocks 8192 E64", blocks="tenth", bars={"own": 0.9}),
        replace(blocks, name="causal blocks 8192 E64", blocks="causal", bars={"own": 1 / 1.02}, baseline=causal),
        replace(blocks, name="all blocks 8192 E64", blocks="all", bars={"own": 0.98}),
        replace(dense, name="dropout 4096 E64", dropout=0.1, bars={"own": 1 / 1.15}, baseline=dense),
        replace(dense, name="mod identity 4096 E64", mod="identity", bars={"own": 1 / 1.05}, baseline=dense),
        replace(
            dense,
            name="mod ALiBi 4096 E64",
            mod="ALiBi",
            bars={"own": 1 / 1.05, "torch": 3.0},
            baseline=replace(dense, name="ALiBi 4096 E64", alibi=True),
        ),
        replace(
            dense,
            name="mod softcap 4096 E64",
            mod="softcap",
            bars={"own": 1 / 1.05},
            baseline=replace(dense, name="softcap 4096 E64", softcap=30.0),
        ),
        replace(dense, name="mod table 4096 E64", mod="table", bars={"own": 1 / 1.2}, baseline=dense),
        *(
            replace(dense, name=f"mod {name} 4096 E64", mod=name, bars={"own": 1 / 1.3}, baseline=dense)
            for name in ("exp", "log", "pow")
        ),
        replace(_plain(64, 64), name="tiny H8 64 E64", bars={"torch": 1.5}),
        Row("short B4 H12 L32 E32", 4, 12, 12, 32, 32, 32, 32, bars={"torch": 1.6}),
        replace(_plain(16, 64), name="short H8 16 E64", bars={"torch": 1.6}),
        replace(_plain(80, 64), name="short H8 80 E64"),
        smallest,
        replace(smallest, name="backward 1x1x1x64", task="backward", bars={"us": 6.0}),
        replace(_plain(16, 64), name="backward H8 16 E64", task="backward", bars={"torch": 2.0}),
        *(
            replace(_plain(64, 64), name=f"{task}, empty kernel cache", task=task, bars={"us": bar})
            for task, bar in zip(FIRST_CALLS, (4e6, 4e6, 4e6, 5e6, 5e6), strict=True)
        ),
        back,
        long_back,
        causal_back,
        replace(causal_back, name="backward causal 4096 E64", L=4096, S=4096),
        replace(back, name="backward 2048 E128", E=128, Ev=128, bars=wide_bars),
        replace(causal_back, name="backward causal 2048 E128", E=128, Ev=128, bars=wide_bars),
        Row("forward and backward B8 H12 L512 E64", 8, 12, 12, 512, 512, task="both", bars={"torch": 1.4}),
        replace(back, name="backward bfloat16 2048 E64", dtype="bfloat16", bars={"own": 1.6}, baseline=back),
        replace(back, name="backward float64 2048 E64", dtype="float64", bars={}),
        replace(back, name="backward bias (H,L,S) 2048 E64", bias=True, bars={"own": 0.75}, baseline=back),
        replace(long_back, name="backward dropout 4096 E64", dropout=0.1, bars={"own": 1 / 1.25}, baseline=long_back),
        replace(
            long_back,
            name="backward mod ALiBi 4096 E64",
            mod="ALiBi",
            bars={"own": 1 / 1.05},
            baseline=replace(long_back, name="backward ALiBi 4096 E64", alibi=True),
        ),
        replace(
            long_back,
            name="backward mod softcap 4096 E64",
            mod="softcap",
            bars={"own": 1 / 1.05},
            baseline=replace(long_back, name="backward softcap 4096 E64", softcap=30.0),
        ),
        replace(long_back, name="backward mod table 4096 E64", mod="table", bars={"own": 1 / 1.3}, baseline=long_back),
        replace(blocks_back, name="backward tenth of blocks 8192 E64", blocks="tenth", bars={"own": 0.8}),
        replace(
            blocks_back,
            name="backward causal blocks 8192 E64",
            blocks="causal",
            bars={"own": 1 / 1.1},
            baseline=causal_8192_back,
        ),
        replace(medium, name="jvp 2048 E64", task="jvp", bars={"own": 3 / 3.2, "torch": 2.0}, baseline=medium),
        replace(
            back,
            name="double backward 2048 E64",
            task="double backward",
            bars={"own": 2.4 / 2.6, "torch": 2.0},
            baseline=back,
        ),
        replace(
            both,
            name="Hessian-vector product 2048 E64",
            task="hvp",
            bars={"own": 24 / 7 / 3.8, "torch": 2.0},
            baseline=both,
        ),
        Row("decode H32 Hkv8 L1 S8192 E128", 1, 32, 8, 1, 8192, 128, 128),  # bound by memory: see benchmarks/decode.py
    ]
    return {row.name: row for row in rows}


ROWS = _rows()


def scale(row: Row) -> float:
    """Return the factor of the scores, for libraries that have no default for it."""
    return 1 / math.sqrt(row.E)


__all__ = [
    "FIRST_CALLS",
    "ROWS",
    "Row",
    "block_mask",
    "directions",
    "gradient_of_out",
    "inputs",
    "numpy_dtype",
    "scale",
]
