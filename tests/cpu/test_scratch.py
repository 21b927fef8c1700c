"""Scratch areas: where they lie, and that kernels see them where they are declared to be."""

import re
from pathlib import Path

import numpy as np
import pytest

from numba_attention.cpu import scratch
from numba_attention.cpu.cache import Function
from numba_attention.cpu.params import PARAMS
from numba_attention.cpu.scratch import areas_of, layout_of, views
from numba_attention.cpu.simd import HOST, void_pointer
from numba_attention.cpu.spec import Spec
from numba_attention.cpu.views import carray

SPECS = [
    Spec(storage, HOST, task, kv_storage)
    for task in ("forward", "weights", "backward", "decode")
    for storage in ("float32", "float64", "float16", "bfloat16")
    for kv_storage in (("", "int8", "float16") if task in ("forward", "decode") else ("",))
] + [Spec(storage, HOST, "second") for storage in ("float32", "float64")]


@pytest.mark.parametrize("spec", SPECS, ids=lambda spec: spec.name)
@pytest.mark.parametrize(("E", "Ev"), [(64, 64), (1, 33), (17, 0)])
def test_areas_are_disjoint_lines_with_names_of_the_record(spec, E, Ev):
    areas, offsets, total = layout_of(spec, E, Ev)
    end = 0
    for name, area in areas.items():
        assert offsets[name] % 64 == 0
        assert offsets[name] >= end
        end = offsets[name] + int(np.prod(area.shape)) * np.dtype(area.kind).itemsize
        assert f"at_{name}" in PARAMS.names
    assert end <= total
    assert list(areas) == list(areas_of(spec, 8, 8)), "the names of areas depend on the task alone"


def test_a_view_is_the_memory_at_its_offset():
    spec = Spec("float32", HOST)
    areas, offsets, total = layout_of(spec, 5, 6)
    state_of, extra_of, starts_of = views(areas_of(spec), "state extra starts")
    (bits_of,) = views(areas_of(spec), "state", np.int32)

    def make():
        def fill(params: int, at: int) -> int:
            p = carray(void_pointer(params), 1, PARAMS)[0]
            state, extra, starts, bits = state_of(p, at), extra_of(p, at), starts_of(p, at), bits_of(p, at)
            state[3, 2], extra[5, 1], starts[4], bits[4, 0] = 1.5, 2.5, 7, 9
            return state.shape[0] * 1000 + state.shape[1]

        return fill

    record = np.zeros(1, PARAMS)
    for name, offset in offsets.items():
        record[f"at_{name}"] = offset
    memory = np.zeros(total // 4 + 1, np.float32)
    shape = Function("fill", make, objects=0, integers=2).call(record.ctypes.data, memory.ctypes.data)
    BM = spec.query_tile
    assert shape == areas["state"].shape[0] * 1000 + BM
    want = np.zeros_like(memory)
    want[3 * BM + 2] = 1.5
    want[offsets["extra"] // 4 + 5 * BM + 1] = 2.5
    want.view(np.int32)[4 * BM] = 9
    want.view(np.int32)[offsets["starts"] // 4 + 2 * 4] = 7
    np.testing.assert_array_equal(memory.view(np.int32), want.view(np.int32))


def test_only_the_first_axis_may_be_unknown_to_a_kernel():
    area = scratch.Area((2, scratch.UNBOUNDED), np.float32)
    with pytest.raises(AssertionError, match="only the first axis"):
        views({"state": area}, "state")


def test_kernels_see_scratch_through_views_only():
    for path in Path(scratch.__file__).parent.glob("*.py"):
        assert not re.search(r"carray\(void_pointer\(at \+ p\.at_", path.read_text(encoding="utf-8")), path.name
