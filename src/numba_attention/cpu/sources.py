"""Where the keys and values of a tile are: in an array, in the pages of a cache, as they are or with scales.

A page holds the keys (or values) of `page_size` positions for all heads. Everything that differs between an array and
pages is decided here; what is computed from the rows is the same, and so are its bits.
"""

import math
from typing import Any, NamedTuple

import numpy as np

from .elements import ELEMENTS
from .scratch import areas_of, views
from .simd import void_pointer
from .softmax import multiply_tile
from .spec import Spec
from .tiles import copy_bytes, gather_tile
from .views import UNBOUNDED, carray


class Sources(NamedTuple):
    """Compiled functions; p and s are the records of `params`, `at` is the thread's scratch."""

    locate: Any
    find_keys: Any
    find_values: Any
    scale: Any


def make_sources(spec: Spec) -> Sources:
    """Make the functions for one kind of kernel."""
    BM, item_size = spec.query_tile, spec.kv_element.size
    row_bytes = BM * spec.vector.bytes
    real: Any = spec.vector.dtype
    copy, gather = copy_bytes(spec), gather_tile(spec, ELEMENTS["float32"])
    multiply = multiply_tile(spec)
    key_rows_of, value_rows_of, scales_of, hidden_of = views(areas_of(spec), "key_rows value_rows scales hidden")

    @spec.jit
    def locate(p: Any, s: Any, at: int, j0: int, n: int) -> None:
        """Fill the tables of the rows j0 .. j0 + n of head 0."""
        keys = key_rows_of(p, at)
        values = value_rows_of(p, at)
        if p.page_size == 0:
            for j in range(n):
                keys[j] = p.key + s.key + (j0 + j) * p.key_row
                values[j] = p.value + s.value + (j0 + j) * p.value_row
            return
        pages = carray(void_pointer(s.pages), UNBOUNDED, np.int64)
        block, slot = divmod(j0, p.page_size)
        for j in range(n):
            page = pages[block]
            keys[j] = p.key + page * p.key_page + slot * p.key_row
            values[j] = p.value + page * p.value_page + slot * p.value_row
            slot += 1
            if slot == p.page_size:
                slot = 0
                block += 1

    @spec.jit
    def find_keys(p: Any, s: Any, at: int, head: int, j0: int, n: int) -> tuple[int, int, int]:
        """Address, row stride and column stride of keys j0 .. j0 + n; those in pages are copied together."""
        if p.page_size == 0:
            return p.key + s.key + head * p.key_head + j0 * p.key_row, p.key_row, p.key_column
        locate(p, s, at, j0, n)
        copy(at + p.at_raw_keys, at + p.at_key_rows, head * p.key_head, n, p.E * item_size)
        return at + p.at_raw_keys, p.E * item_size, item_size

    @spec.jit
    def find_values(p: Any, s: Any, at: int, head: int, j0: int, n: int) -> tuple[int, int, int]:
        """Address, row stride and column stride of values j0 .. j0 + n; those in pages are copied together."""
        if p.page_size == 0:
            return p.value + s.value + head * p.value_head + j0 * p.value_row, p.value_row, p.value_column
        locate(p, s, at, j0, n)
        copy(at + p.at_raw_values, at + p.at_value_rows, head * p.value_head, n, p.Ev * item_size)
        return at + p.at_raw_values, p.Ev * item_size, item_size

    @spec.jit
    def scale(p: Any, s: Any, at: int, tile: int, rows: int, page_stride: int, j0: int, n: int, nan_safe: bool) -> None:
        """Multiply tile[j, lane] by the scale of key (or value) j0 + j in the row of scales that a table tells.

        A scale is NaN where a number was NaN or infinite. If `nan_safe`, such a scale counts as 0; the scratch area
        `hidden` tells which keys a lane does not see, and its first row then which lanes saw such a scale.
        """
        scales = at + p.at_scales
        if p.page_size == 0:
            gather(scales, rows, j0 * 4, np.int64(4), n, real(1))
        else:
            pages = carray(void_pointer(s.pages), UNBOUNDED, np.int64)
            j = 0
            while j < n:
                block, slot = divmod(j0 + j, p.page_size)
                m = min(p.page_size - slot, n - j)
                offset = pages[block] * page_stride + slot * 4
                gather(scales + j * row_bytes, rows, offset, np.int64(4), m, real(1))
                j += m
        if nan_safe:
            hidden, factors = hidden_of(p, at), scales_of(p, at)
            for lane in range(BM):
                saw = False
                for j in range(n):
                    if not math.isfinite(factors[j, lane]):
                        factors[j, lane] = 0
                        saw = saw or hidden[j, lane] == 0
                hidden[0, lane] = saw
        multiply(tile, n, scales)

    return Sources(locate, find_keys, find_values, scale)
