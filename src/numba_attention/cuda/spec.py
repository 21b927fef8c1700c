"""What a kernel is compiled for, and which shape of tiles it has where."""

import re
from dataclasses import dataclass, fields, replace
from functools import cached_property
from typing import Any

from .codes import CodeProducts
from .formats import HALVES, SIZES
from .products import Product, Simt, TensorCores, TripleTF32
from .tiles import Tile
from .warpgroups import GROUP, Warpgroups

FEATURES = (32, 64, 96, 128, 192, 256)  # head dimensions that tiles have; others are filled up with zeros
SLICE = 64  # features that pass at a time where head dimensions are larger than those of tiles


@dataclass(frozen=True, eq=False)
class Mods:
    """Rules of a caller, which a kernel computes on registers; those with one digest are equal."""

    score: Any  # mods.program.Program: the score and, where it is wanted and not 1, its derivative; or None
    mask: Any  # whether a pair is visible; or None
    arguments: tuple[Any, ...]  # mods.language.Argument: kinds of what they are called with
    digest: str
    gradients: Any = None  # the derivatives of the score with respect to reads of arrays; or None

    @property
    def has_slope(self) -> bool:
        return self.score is not None and len(self.score.outputs) > 1

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Mods) and self.digest == other.digest

    def __hash__(self) -> int:
        return hash(self.digest)


@dataclass(frozen=True)
class Spec:
    """The settings of one kernel: its task, storage, options and tile shape."""

    task: str  # as in `kernels`: "forward", "query", "key", "weights", "combine" and so on
    storage: str  # of query, key, value and out
    E: int  # head dimensions of tiles; where features pass in slices, those of a slice
    Ev: int  # and of the slab of a result that a block owns
    product: str = "simt"  # or "tensor", "tf32", "wgmma"
    slots: int = 8  # rows of a thread ("simt"), or 16 times of a warp
    across: int = 8
    warps: int = 4
    columns: int = 64  # of a tile of scores
    blocks: int = 1  # that are to fit on a multiprocessor
    aligned: bool = True  # rows of arrays begin at multiples of 16 bytes and have no gaps
    softcap: bool = False
    alibi: bool = False
    bias: str = ""  # its storage
    mask: bool = False
    mods: Mods | None = None
    lists: bool = False  # visits the tiles in the lists of a block mask
    pairs: bool = False  # neighbours of bias and mask are read at once: rows of both begin at even elements
    bias_tile: bool = False  # rows of the bias, of a half type, begin at multiples of 16 bytes and have no gaps
    # What becomes of dS beside the other gradients (`bias_tiles`): "" if nothing, "tiles" or "elements" if each element
    # of the bias has one, in the type of queries or of sums; "sums" by atomics, "sums_of_rows" of a bias that all
    # queries share, "sums_of_keys" of one that all keys share, "sums_of_all".
    grad_bias: str = ""
    dropout: bool = False
    sinks: bool = False
    paged: bool = False
    kv_storage: str = ""  # storage of keys and values in a cache, if not that of queries
    gather_rows: bool = False  # gathers the rows of a list
    pack_gqa: bool = False  # the query heads of a key head are rows of one tile
    split_kv: bool = False  # several blocks share the keys of a row, and `combine` joins them
    flags: bool = False  # rows whose result is not finite are flagged for the NaN-safe kernel
    nan_safe: bool = False  # recomputes flagged rows without multiplying what they do not see
    to: str = ""  # storage of the results, if not `storage`; of lse in "merge"
    only: str = ""  # the one gradient of a tile of keys, "key" or "value", where registers do not suffice for both
    fused_dq: bool = False  # the kernel of a tile of keys adds dQ too, by atomics in any order
    in_parts: bool = False  # sums of dQ lie in memory as wgmma adds them: `rowwise.PART`
    arch: str = ""
    # Head dimensions beyond those of tiles (`operands`): slices of query and key, and of value and the gradient of out.
    E_slices: int = 0
    Ev_slices: int = 0

    @cached_property
    def _hash(self) -> int:
        return hash(tuple(getattr(self, f.name) for f in fields(self)))

    def __hash__(self) -> int:  # of some 40 fields, asked for several times in every call
        return self._hash

    def __reduce__(self) -> Any:
        """Fields alone: what is cached beside them, such as a hash of strings, holds in this process only."""
        return Spec, tuple(getattr(self, f.name) for f in fields(self))

    @property
    def result(self) -> str:
        """What the output or the gradients are stored as."""
        return self.to or self.storage

    @property
    def is_staged(self) -> bool:
        """Whether scores go through any stage between the product and the softmax."""
        return self._has_options or self.mods is not None

    @property
    def _has_options(self) -> bool:
        return self.softcap or self.alibi or bool(self.bias) or self.mask

    @property
    def has_all_options(self) -> bool:
        return self.softcap and self.alibi and bool(self.bias) and self.mask

    @property
    def is_largest(self) -> bool:
        """Whether dropout, lists or rules of a caller come beside other stages, which takes yet more registers."""
        beside = self.mods is not None or self.lists
        return (self.dropout and self.is_staged) or (beside and self._has_options)

    @property
    def has_score_mod(self) -> bool:
        return self.mods is not None and self.mods.score is not None

    @property
    def has_slopes(self) -> bool:
        """Whether a stage has a derivative other than 1."""
        return self.softcap or (self.mods is not None and self.mods.has_slope)

    @property
    def is_large(self) -> bool:
        """Whether what happens between the products takes so many registers that tiles must be smaller."""
        return self.is_staged or self.dropout or self.lists

    @property
    def has_bias_tile(self) -> bool:
        """Whether tiles of the bias are copied to shared memory (`bias_tiles`): those of at least four chunks a row."""
        whole = self.bias_tile and self.aligned and self.product == "tensor"
        whole = whole and not (self.is_sliced or self.pack_gqa or self.kv_storage)
        return whole and self.task in ("forward", "query", "key") and self.columns % 32 == 0

    @property
    def copies_codes(self) -> bool:
        """Whether keys and values are copied as codes, and converted from shared memory."""
        return bool(self.kv_storage) and self.aligned and not self.is_sliced

    @property
    def multiplies_codes(self) -> bool:
        """Whether products convert the codes that they read; several warps would each convert all codes of a tile."""
        one_byte = bool(self.kv_storage) and SIZES[self.kv_storage] == 1
        return (
            self.copies_codes and one_byte and self.task == "forward" and self.product == "tensor" and self.warps == 1
        )

    @property
    def is_sliced(self) -> bool:
        """Whether features pass through shared memory in slices."""
        return self.E_slices > 0

    @property
    def slabs(self) -> int:
        """How many blocks share out the columns of a result, each of which computes the scores."""
        if not self.is_sliced:
            return 1
        of_values = self.task in ("forward", "combine") or self.only == "value"
        return -(-(self.Ev_slices if of_values else self.E_slices) * self.E // self.Ev)

    @property
    def threads(self) -> int:
        loading = GROUP if self.product == "wgmma" else 0  # threads that copy tiles for the others
        return 32 * self.warps + loading

    def make_product(self) -> Product:
        if self.multiplies_codes:
            return CodeProducts(self.storage, self.kv_storage, self.slots)
        if self.product == "tensor":
            return TensorCores(self.storage, self.slots)
        if self.product == "wgmma":
            return Warpgroups(self.storage)
        if self.product == "tf32":
            return TripleTF32(self.storage, self.slots)
        return Simt(self.storage, self.slots, self.across, self.nan_safe)

    @cached_property
    def compute(self) -> str:
        """How tiles hold numbers."""
        return str(self.make_product().storage)

    @cached_property
    def rows(self) -> int:
        """Rows of a tile of scores."""
        return int(self.make_product().rows) * self.warps

    @property
    def name(self) -> str:
        """All that distinguishes this kernel from others."""
        options = [n for n in ("aligned", "softcap", "alibi", "mask", "pairs", "bias_tile", "lists", "dropout", "sinks",
                               "paged", "pack_gqa", "split_kv", "flags", "nan_safe", "gather_rows", "fused_dq",
                               "in_parts")
                   if getattr(self, n)]  # fmt: skip
        words = [self.task, self.storage, f"{self.E}x{self.Ev}", f"{self.product}{self.slots}x{self.across}",
                 f"{self.warps}w{self.columns}c{self.blocks}b{self.only}{self.to}", *options]  # fmt: skip
        if self.is_sliced:
            words.append(f"{self.E_slices}x{self.Ev_slices}slices")
        named = [f"{n}_{getattr(self, n)}" for n in ("bias", "grad_bias", "kv_storage") if getattr(self, n)]
        if self.mods is not None:
            named.append(f"mods_{self.mods.digest}")
        return "-".join([*words, *named, self.arch])

    def is_plain_but(self, *options: str) -> bool:
        """Whether the kernel has no option but `aligned`, `flags` and these, beside what says which kernel it is."""
        plain = Spec(
            self.task, self.storage, self.E, self.Ev, self.product, self.slots, self.across, self.warps, self.columns,
            self.blocks, flags=self.flags, fused_dq=self.fused_dq, arch=self.arch,
            **{name: getattr(self, name) for name in options},
        )  # fmt: skip
        return self == plain

    @property
    def has_nan_minimum(self) -> bool:
        """Whether one instruction finds the smaller of two numbers, and NaN if either is."""
        return compute_capability(self.arch) >= (8, 0)

    def suits_warpgroups(self, *options: str) -> bool:
        """Whether a kernel of sm_90a whose warpgroups have roles, and these options, may do what this one does."""
        on_warpgroups = self.arch == "sm_90a" and self.product == "tensor" and self.E == self.Ev
        return on_warpgroups and self.is_plain_but(*options)

    def with_(self, **changes: Any) -> "Spec":
        return replace(self, **changes)


def padded(features: int) -> int:
    """The tile that a head dimension fits into, or the slices."""
    for most in FEATURES:
        if features <= most:
            return most
    return -(-features // SLICE) * SLICE


def slab(features: int) -> int:
    """The columns of a result that a block has registers for: as few slabs as possible, each as narrow as possible."""
    return padded(-(-features // -(-features // FEATURES[-1])))


def compute_capability(arch: str) -> tuple[int, int]:
    digits = re.sub(r"\D", "", arch)
    return int(digits[:-1]), int(digits[-1])


def lay_out(*tiles: tuple[int, int, str]) -> list[Tile]:
    """Tiles (rows, columns, storage) one after the other."""
    placed: list[Tile] = []
    for rows, columns, storage in tiles:
        placed.append(Tile(rows, columns, storage, placed[-1].end if placed else 0))
    return placed


__all__ = ["FEATURES", "HALVES", "SIZES", "SLICE", "Spec", "compute_capability", "lay_out", "padded", "slab"]
