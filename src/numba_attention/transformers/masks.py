"""Masks of Hugging Face models as numbers: offset, window and a label for each key, instead of L x S truth values.

A model describes its mask by a function of indices, ``mask_function(batch, head, query, key)``, and by a padding mask
of shape (batch, keys). `attention_mask` calls the function once, with symbols for the indices, and learns from the
comparisons it makes which band of keys a query sees, and which lookups separate documents. What it learns travels as
one small tensor, because models pass masks on, slice them along the batch and save them as inputs of compiled graphs:

    int32 (batch, 1, 1, 3 + n):  offset, left, right, label of key 0 .. label of key n - 1

Query i sits at key position ``p = i + offset`` and sees the keys j with ``p - left <= j <= p + right`` (-1: unbounded)
whose label is not 0 and equals that of key p. Without labels (n = 0) all keys are alike. Any other function is answered
with the mask of truth values that PyTorch's own attention gets.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple, Protocol, TypeAlias

import torch
from transformers.masking_utils import causal_mask_function, prepare_padding_mask, sdpa_mask

Tensor: TypeAlias = torch.Tensor

HEADER = 3  # numbers before the labels
UNBOUNDED = -1


class Unknown(Exception):
    """A mask function does something that has no equivalent as a band of keys and labels."""


class Symbol:
    """What a mask function is called with and what it computes; an operation that is not defined below is `Unknown`."""

    device = "cpu"

    def _unknown(self, *_: Any) -> Any:
        raise Unknown

    __lt__ = __le__ = __gt__ = __ge__ = _unknown
    __add__ = __radd__ = __sub__ = __rsub__ = __mul__ = __rmul__ = __mod__ = __floordiv__ = __truediv__ = _unknown
    __and__ = __rand__ = __or__ = __ror__ = __xor__ = __rxor__ = __invert__ = __neg__ = __abs__ = __bool__ = _unknown

    def __eq__(self, other: object) -> Any:
        raise Unknown

    def __ne__(self, other: object) -> Any:
        raise Unknown

    __hash__ = None  # type: ignore[assignment]

    def to(self, *_: Any, **__: Any) -> Any:
        return self


class Band(Symbol):
    """A truth value for each pair: ``-right <= query - key <= left``, and equal labels."""

    def __init__(
        self,
        left: int | None = None,
        right: int | None = None,
        labels: Labels | None = None,
        positions: Tensor | None = None,  # the bounds are those of these positions instead of indices
    ) -> None:
        self.left, self.right, self.labels, self.positions = left, right, labels, positions

    def __and__(self, other: Any) -> Band:
        if not isinstance(other, Band) or (self.labels is not None and other.labels is not None):
            raise Unknown
        return Band(
            _least(self.left, other.left),
            _least(self.right, other.right),
            other.labels if self.labels is None else self.labels,
            other.positions if self.positions is None else self.positions,
        )


class Index(Symbol):
    """The index of a sequence, head, query or key, plus a number; or what a tensor (batch, n) has at that index."""

    def __init__(self, axis: str, plus: int = 0, values: Tensor | None = None) -> None:
        self.axis, self.plus, self.values = axis, plus, values

    def __add__(self, n: Any) -> Index:
        return Index(self.axis, self.plus + _integer(n), self.values)

    def __sub__(self, other: Any) -> Any:
        if isinstance(other, OfSequence):
            if self.values is not None or self.plus:
                raise Unknown
            return Shifted(self.axis, other.values)
        if isinstance(other, Index):
            key, query = self._facing(other)
            if key.plus or query.plus:
                raise Unknown
            return Difference(key.values)
        return self + -_integer(other)

    def __le__(self, other: Any) -> Band:
        key, query = self._facing(other)
        gap = query.plus - key.plus
        return Band(None, gap, None, key.values) if key is self else Band(-gap, None, None, key.values)

    def __ge__(self, other: Any) -> Band:
        if isinstance(other, int) and other <= 0 and self.plus == 0 and self.values is None:
            return Band()  # an index is never negative
        if not isinstance(other, Index):
            raise Unknown
        return other <= self

    def __lt__(self, other: Any) -> Band:
        if not isinstance(other, Index):
            raise Unknown
        return self <= Index(other.axis, other.plus - 1, other.values)

    def __gt__(self, other: Any) -> Band:
        if not isinstance(other, Index):
            raise Unknown
        return other < self

    def __eq__(self, other: object) -> Any:
        key, query = self._facing(other)
        if key.values is None or key.plus or query.plus:
            raise Unknown
        return Band(labels=OfTensor(key.values))

    __hash__ = None

    def new_ones(self, *_: Any, **__: Any) -> Band:
        return Band()

    def _facing(self, other: Any) -> tuple[Index, Index]:
        """Return the index of the key and that of the query, if there is one of each and both mean the same."""
        if (
            not isinstance(other, Index)
            or {self.axis, other.axis} != {"query", "key"}
            or self.values is not other.values
        ):
            raise Unknown
        return (self, other) if self.axis == "key" else (other, self)

    @classmethod
    def __torch_function__(cls, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Look something up in a tensor: ``labels[batch, query]`` or ``left_padding[batch]``."""
        if function is not torch.Tensor.__getitem__ or kwargs:
            raise Unknown
        values, index = args
        batch, *place = index if isinstance(index, tuple) else (index,)
        if batch.axis != "batch" or values.ndim != 1 + len(place):
            raise Unknown
        if not place:
            return OfSequence(values)
        (at,) = place
        if at.axis not in ("query", "key") or at.plus or at.values is not None:
            raise Unknown
        return Index(at.axis, 0, values)


class Difference(Symbol):
    """The difference of the indices of a query and a key, of either sign."""

    def __init__(self, values: Tensor | None) -> None:
        self.values = values

    def __abs__(self) -> Distance:
        return Distance(self.values)


class Distance(Difference):
    """How far a key is from a query."""

    def __le__(self, reach: Any) -> Band:
        return Band(_integer(reach), _integer(reach), None, self.values)

    def __lt__(self, reach: Any) -> Band:
        return self <= _integer(reach) - 1


class OfSequence(Symbol):
    """An element of a tensor (batch,)."""

    def __init__(self, values: Tensor) -> None:
        self.values = values


class Shifted(Symbol):
    """An index less a number of its sequence, such as the left padding, divided by the size of a chunk."""

    def __init__(self, axis: str, shift: Tensor, size: int | None = None) -> None:
        self.axis, self.shift, self.size = axis, shift, size

    def __floordiv__(self, size: Any) -> Shifted:
        return Shifted(self.axis, self.shift, _integer(size)) if self.size is None else self._unknown()

    def __eq__(self, other: object) -> Any:
        if not isinstance(other, Shifted) or {self.axis, other.axis} != {"query", "key"} or self.size is None:
            raise Unknown
        if self.shift is not other.shift or self.size != other.size:
            raise Unknown
        return Band(labels=Chunks(self.shift, self.size))

    __hash__ = None


class Labels(Protocol):
    """Labels of keys; a query sees the keys that have the label of its own position."""

    def of(self, keys: int, first: int) -> Tensor:
        """Return the labels of the keys from `first` on, int32 (batch, keys), positive."""


class OfTensor(NamedTuple):
    """Labels that a tensor (batch, n) has, such as the numbers of documents."""

    values: Tensor

    def of(self, keys: int, first: int) -> Tensor:
        labels = self.values - self.values.min() + 1
        labels = torch.nn.functional.pad(labels, (0, max(0, first + keys - labels.shape[1])))
        return labels[:, first : first + keys].to(torch.int32)


class Chunks(NamedTuple):
    """Chunks of equal size, which begin after the left padding of each sequence."""

    shift: Tensor
    size: int

    def of(self, keys: int, first: int) -> Tensor:
        chunks = (torch.arange(keys) + first - self.shift[:, None]) // self.size
        return (chunks - chunks.min() + 1).to(torch.int32)


def recognise(mask_function: Callable[..., Any]) -> Band | None:
    """Return the band that a mask function describes, or None if it is no band."""
    try:
        band = mask_function(Index("batch"), Index("head"), Index("query"), Index("key"))
    except Exception:  # whatever a function of somebody else does to a symbol, it is then not recognised
        return None
    if not isinstance(band, Band):
        return None
    if band.positions is not None and not _consecutive(band):
        return None
    return band


def attention_mask(
    batch_size: int,
    q_length: int,
    kv_length: int,
    q_offset: Any = 0,
    kv_offset: Any = 0,
    mask_function: Callable[..., Any] = causal_mask_function,
    attention_mask: Tensor | None = None,
    allow_is_bidirectional_skip: bool = False,
    **settings: Any,
) -> Tensor | None:
    """Describe a mask by a few numbers (see the module), or by truth values where it is no band of keys.

    The interface is that of ``transformers.masking_utils.AttentionMaskInterface``.
    """
    compiling = torch.compiler.is_compiling()
    lookups = q_length == kv_length and not allow_is_bidirectional_skip
    band = None if compiling and not _traceable(lookups, settings) else recognise(mask_function)
    if band is None:
        dense: Tensor = sdpa_mask(
            batch_size, q_length, kv_length, q_offset, kv_offset, mask_function, attention_mask,
            **settings | {"allow_is_causal_skip": False, "allow_is_bidirectional_skip": False},
        )  # fmt: skip
        return dense
    labels = None if band.labels is None else band.labels.of(kv_length, kv_offset)
    if attention_mask is not None:
        padding = prepare_padding_mask(attention_mask, kv_length, kv_offset)
        seen = padding[:, kv_offset : kv_offset + kv_length].to(torch.bool)
        if labels is not None:
            labels = torch.where(seen, labels, 0)
        elif compiling or not bool(seen.all()):
            labels = seen.to(torch.int32)
    if allow_is_bidirectional_skip and labels is None and band.left is None and band.right is None:
        return None
    numbers = [
        torch.as_tensor(q_offset - kv_offset, dtype=torch.int32).reshape(1),
        torch.tensor([UNBOUNDED if reach is None else reach for reach in (band.left, band.right)], dtype=torch.int32),
    ]
    header = torch.cat(numbers).expand(batch_size, HEADER)
    whole = header if labels is None else torch.cat([header, labels.expand(batch_size, -1)], 1)
    return whole[:, None, None, :].contiguous()


def _traceable(may_look_up: bool, settings: dict[str, Any]) -> bool:
    """Whether Dynamo can call the mask function with symbols, which fails where it looks something up in a tensor.

    Packed sequences, chunks and blocks do. They are told from other masks by what they forbid or bring along.
    """
    chunk = getattr(settings.get("config"), "attention_chunk_size", None)
    if settings.get("use_vmap") or (chunk is not None and settings.get("local_size") == chunk):
        return False
    return settings.get("allow_is_causal_skip", True) or not may_look_up


def _consecutive(band: Band) -> bool:
    """Whether positions are indices plus a number that is constant within each document."""
    if band.positions is None or band.labels is None:
        return False
    positions = band.positions
    labels = band.labels.of(positions.shape[1], 0).expand(len(positions), -1)
    same = labels[:, 1:] == labels[:, :-1]
    return bool((torch.diff(positions, dim=1) == 1)[same].all())


def _integer(n: Any) -> int:
    if isinstance(n, bool) or not isinstance(n, int):
        raise Unknown
    return n


def _least(one: int | None, other: int | None) -> int | None:
    if one is None or other is None:
        return other if one is None else one
    return min(one, other)
