"""What the CUDA kernels compile to: no spilled register, and of the instructions that count as many as there must be.

Needs no GPU, only NVIDIA's wheels. All 7000 kernels on all architectures take some two hours: here are about half
of their kinds, each for few data types and head dimensions; all of them with ``NUMBA_ATTENTION_THOROUGH=1``.
"""

import math
import os
import re
import struct
import subprocess
import sys
from collections import Counter
from itertools import product as every

import numpy as np
import pytest

pytest.importorskip("numba_cuda")
pytest.importorskip("cuda.core")

from grid import THOROUGH
from machine_code import disassembler
from numba_attention import BackendUnavailableError, mods, shipping
from numba_attention.backends import device_rules
from numba_attention.backends.cuda import common_kernels
from numba_attention.cuda import kernels, scoring, tile_shapes
from numba_attention.cuda.formats import HALVES
from numba_attention.cuda.spec import FEATURES, Spec, compute_capability
from numba_attention.device.cubins import entry
from numba_attention.device.driver import Device
from numba_attention.mods.rules import describe, find

# What a block may ask for: "CUDA C++ Programming Guide", table of technical specifications.
SHARED = {"sm_75": 65536, "sm_80": 166912, "sm_90a": 232448, "sm_120": 101376}
ARCHS = ("sm_80", "sm_90a", "sm_120")
STORAGES = ("float16", "bfloat16", "float32", "float64")
STORED = ("int8", "float8_e4m3fn", "bfloat16")
LARGE = [("sm_90a", "bfloat16", 576, 512), ("sm_80", "float16", 576, 512), ("sm_80", "float32", 320, 320),
         ("sm_90a", "float64", 512, 512), ("sm_120", "bfloat16", 1024, 1024)]  # fmt: skip
OPTIONS = {"softcap": True, "alibi": True, "bias": "float32", "mask": True}


def mods_of_all(with_slope, places=()):
    """Branches, a table, logarithms, integer division; what is visible by rows, keys and squares."""

    def visible(batch, head, i, j, table, width, documents):
        return mods.neighborhood(batch, head, i, j, width, width, 7) and documents[i] == documents[j]

    def score(s, batch, head, i, j, table, width, documents):
        return 20 * math.tanh(mods.t5_bias(s, batch, head, i, j, table) / 20)

    values = np.zeros((8, 32), np.float32), 64, np.zeros(4096, np.int32)
    arguments = describe(values)
    rules = device_rules.Rules(
        find("score_mod", score, arguments, values), find("mask_mod", visible, arguments, values), arguments
    )
    return device_rules.mods_of(rules, with_slope, places)


def device(arch):
    return Device(0, compute_capability(arch), arch, 132, SHARED[arch])


@pytest.fixture(scope="module")
def disassembled(tmp_path_factory):
    """A function that returns the instructions of machine code as text."""
    program, path = disassembler(), tmp_path_factory.mktemp("code") / "kernel.cubin"

    def disassemble(code):
        path.write_bytes(code)
        return subprocess.run([program, "-c", path], capture_output=True, text=True, check=True).stdout

    return disassemble


@pytest.fixture(scope="module")
def instructions(disassembled):
    """A function that counts the instructions of machine code by name."""

    def count(code):
        text = disassembled(code)
        return Counter(re.findall(r"^\s*/\*[0-9a-f]{4,}\*/\s+(?:@!?U?P\w+\s+)?([A-Z0-9]+)", text, re.MULTILINE))

    return count


def check(compiled, c):
    """A kernel has the registers that its blocks need, and none of them in memory."""
    assert compiled.spills == 0, compiled.log
    registers = -(-compiled.registers // 8) * 8  # a warp takes them by eights
    assert registers * c.threads * c.blocks <= 65536
    assert kernels.shared(c) <= SHARED[c.arch]


def plain(arch, storage, E, Ev=None):
    """The kernels without options for one head dimension."""
    for task in ("forward", "query", "key"):
        yield from tile_shapes.parts(tile_shapes.base(task, storage, E, Ev or E, device(arch)))
    single = tile_shapes.fused_dq(tile_shapes.base("key", storage, E, Ev or E, device(arch)), device(arch))
    if single is not None:
        yield single


def products(c):
    """How many instructions of the tensor cores, and loads for them, a kernel has where nothing is written twice.

    By the sizes of its products: scores and, backward, dP, of a tile of 16 rows with all columns; sums with features.
    """
    steps = {"forward": (1, 1), "query": (2, 1), "key": (2, 2)}[c.task]
    if c.only:
        steps = {"key": (2, 1), "value": (1, 1)}[c.only]
    scores, sums = steps
    multiplied = c.slots * (scores * c.columns // 8 * (c.E // 16) + sums * c.E // 8 * (c.columns // 16))
    loaded = scores * c.E // 16 * (c.slots + c.columns // 16) + sums * c.columns // 16 * (c.E // 16)
    if c.fused_dq:  # dQ, of which each warp has a part of the features
        of_warp = c.E // c.make_product().shares(c.columns, c.E, c.warps)[1]
        multiplied += of_warp // 8 * (c.rows // 16)
        loaded += (1 + of_warp // 16) * (c.rows // 16)
    return multiplied, loaded


@pytest.mark.parametrize("E", FEATURES)
def test_tensor_cores(instructions, monkeypatch, E):
    """float16 and bfloat16 by mma.sync: every product is there once, and nothing of it goes through local memory."""
    monkeypatch.setenv(tile_shapes.WGMMA, "0")
    common = E in (64, 128)
    pairs = [(arch, "bfloat16" if n % 2 else "float16") for n, arch in enumerate(ARCHS) if common or n % 2]
    for arch, storage in every(ARCHS, STORAGES[:2]) if THOROUGH else pairs:
        for c in plain(arch, storage, E):
            compiled = kernels.compile_(c)
            check(compiled, c)
            found = instructions(compiled.code)
            assert (found["HMMA"], found["LDSM"]) == products(c), c.name
            assert found["LDGSTS"] > 0, "tiles come by asynchronous copies"
            assert not found["LDL"] + found["STL"]
            assert found["FFMA"] + found["FMUL"] < 6 * found["HMMA"]


def test_tanh_of_small_scores_is_that_of_the_library():
    """The coefficients of `scoring.tanh` in the order of CUDA's function, and the limit below which it takes them."""
    from llvmlite import binding
    from numba.cuda.cudadrv.libs import open_libdevice

    code = str(binding.parse_bitcode(open_libdevice()).get_function("__nv_tanhf"))
    found = re.findall(r"0x[0-9A-F]{16}", code)
    numbers = [struct.unpack(">d", bytes.fromhex(x[2:]))[0] for x in found]
    own = [x for x in dict.fromkeys(numbers) if x in (*scoring.TANH, scoring.SMALL)]
    assert own == [*scoring.TANH, scoring.SMALL]


@pytest.mark.parametrize("E", FEATURES)
@pytest.mark.parametrize("storage", STORAGES[2:])
def test_fma(instructions, storage, E):
    """float32 and float64: many multiplications for each read of shared memory."""
    for arch in ARCHS if THOROUGH else (ARCHS[FEATURES.index(E) % 3],):
        for c in plain(arch, storage, E):
            compiled = kernels.compile_(c)
            check(compiled, c)
            found = instructions(compiled.code)
            multiplied = found["FFMA" if storage == "float32" else "DFMA"]
            assert multiplied > (4 if storage == "float32" and E <= 128 else 1) * found["LDS"], c.name
            assert found["LDGSTS"] > 0
            assert not found["LDL"] + found["STL"] + found["HMMA"]


@pytest.mark.parametrize("E", [32, 64, 128])
def test_float32_on_tensor_cores(instructions, monkeypatch, E):
    monkeypatch.setenv(tile_shapes.TF32X3, "1")
    for arch in ARCHS if THOROUGH else (ARCHS[(32, 64, 128).index(E)],):
        for c in plain(arch, "float32", E):
            assert c.product == "tf32"
            compiled = kernels.compile_(c)
            check(compiled, c)
            found = instructions(compiled.code)
            assert found["HMMA"] % 3 == 0
            assert found["HMMA"] > 0


@pytest.mark.parametrize(("arch", "storage", "E"), [("sm_80", "bfloat16", 64), ("sm_90a", "float16", 64)])
def test_results_in_float32(instructions, arch, storage, E):
    """Parts of rows that are merged later: tensor cores as without, no register in memory, no conversion of results."""
    found = {}
    for c in common_kernels(device(arch), wide=True):
        if c.to == "float32" and (c.storage, c.E) == (storage, E) and c.aligned and not (c.nan_safe or c.pack_gqa):
            compiled = kernels.compile_(c)
            check(compiled, c)
            found[c.task] = instructions(compiled.code)
            assert c.product != "wgmma"
    assert set(found) == {"forward", "key", "combine", "round"}
    assert found["forward"]["HMMA"] > 0
    assert not {"F2F", "F2FP"} & set(found["round"])


def rest(arch, storage, E, Ev=None):
    """Every other kernel for one head dimension, with most that it can be asked for."""
    of, Ev = device(arch), Ev or E
    for task in ("forward", "query", "key"):  # of calls that are causal and no more
        causal = tile_shapes.with_options(tile_shapes.base(task, storage, E, Ev, of), flags=True)
        yield from tile_shapes.parts(causal)
    single = tile_shapes.fused_dq(causal, of)
    if single is not None:
        yield single
    forward = tile_shapes.base("forward", storage, E, Ev, of)
    full = tile_shapes.with_options(forward, **OPTIONS)
    yield full.with_(sinks=True, flags=True)
    if forward.product != "simt":  # the threads of tensor cores have pairs of keys
        in_pairs = tile_shapes.with_options(tile_shapes.base("query", storage, E, Ev, of), **OPTIONS, flags=True)
        yield full.with_(sinks=True, flags=True, pairs=True)
        yield in_pairs.with_(pairs=True)
        yield tile_shapes.bias(in_pairs.with_(pairs=True), of)
    yield tile_shapes.with_options(forward, mask=True, aligned=False)
    yield tile_shapes.nan_safe(full, of)
    steps = tile_shapes.few(full.with_(pack_gqa=True, paged=True, sinks=True), 4, of)
    yield steps.with_(split_kv=True)
    yield tile_shapes.few(forward.with_(pack_gqa=True), 16, of).with_(split_kv=True)
    packed = full.with_(pack_gqa=True, paged=True, sinks=True)
    yield tile_shapes.no_more_rows(packed, 20).with_(split_kv=True)
    yield packed.with_(flags=True)
    for rows in (20, 64, 128):
        yield tile_shapes.no_more_rows(forward.with_(pack_gqa=True, split_kv=True), rows)
    yield tile_shapes.nan_safe(steps, of)
    held = STORED[FEATURES.index(min(E, FEATURES[-1])) % 3]
    if held != storage:
        yield tile_shapes.fitted(tile_shapes.with_options(forward, kv_storage=held), of)
        of_codes = tile_shapes.with_options(forward, **OPTIONS, kv_storage=held, paged=True).with_(
            sinks=True, flags=True
        )
        of_codes = tile_shapes.fitted(of_codes, of)
        yield of_codes
        yield tile_shapes.nan_safe(of_codes, of)
        yield tile_shapes.few(
            tile_shapes.with_options(forward, kv_storage=held, paged=True).with_(pack_gqa=True), 4, of
        )
    yield tile_shapes.weights(full, of)
    yield tile_shapes.normalizers(full, of)
    yield tile_shapes.bias(tile_shapes.with_options(tile_shapes.base("query", storage, E, Ev, of), **OPTIONS), of)
    for task in ("query", "key"):
        c = tile_shapes.with_options(tile_shapes.base(task, storage, E, Ev, of), **OPTIONS, flags=True)
        for part in tile_shapes.parts(c):
            yield part
            yield tile_shapes.nan_safe(part, of)
    single = tile_shapes.fused_dq(
        tile_shapes.with_options(tile_shapes.base("key", storage, E, Ev, of), **OPTIONS, flags=True), of
    )
    if single is not None:
        yield single
        yield Spec("round", storage, E, E, warps=4, flags=True, arch=arch)
    if forward.product == "tensor":  # a bias as tiles, and its gradient beside the others
        for dropout in (False, True):
            tiled = {"alibi": True, "mask": True, "bias": storage, "bias_tile": True, "dropout": dropout, "flags": True}
            yield tile_shapes.fitted(tile_shapes.with_options(forward, **tiled), of)
            of_queries, of_keys = (
                tile_shapes.fitted(tile_shapes.with_options(tile_shapes.base(task, storage, E, Ev, of), **tiled), of)
                for task in ("query", "key")
            )
            yield of_queries if of_queries.is_sliced else of_queries.with_(grad_bias="elements")
            yield from tile_shapes.parts(of_keys)
            single = tile_shapes.fused_dq(of_keys, of)
            if single is not None:
                for how in ("tiles", "elements", "sums", "sums_of_rows", "sums_of_keys", "sums_of_all"):
                    yield single.with_(grad_bias=how)
    # Dropout, alone and with all else.
    for options in ({}, OPTIONS):
        dropped = tile_shapes.with_options(forward, **options, dropout=True, flags=True)
        yield tile_shapes.fitted(dropped, of)
        yield tile_shapes.nan_safe(dropped, of)
        yield tile_shapes.few(dropped.with_(pack_gqa=True, sinks=True), 4, of).with_(split_kv=True)
        yield tile_shapes.weights(dropped, of)
        for task in ("query", "key"):
            c = tile_shapes.with_options(
                tile_shapes.base(task, storage, E, Ev, of), **options, dropout=True, flags=True
            )
            for part in tile_shapes.parts(tile_shapes.fitted(c, of)):
                yield part
                yield tile_shapes.nan_safe(part, of)
        single = tile_shapes.fused_dq(c, of)
        if single is not None:
            yield single
        of_queries = tile_shapes.base("query", storage, E, Ev, of)
        yield tile_shapes.bias(tile_shapes.with_options(of_queries, **{**OPTIONS, **options}, dropout=True), of)
    # Lists of a block mask, alone and with all else.
    for options in ({}, OPTIONS):
        listed = tile_shapes.with_options(forward, **options, lists=True, flags=True)
        yield tile_shapes.fitted(listed, of)
        yield tile_shapes.no_more_rows(tile_shapes.fitted(listed, of), 64)
        yield tile_shapes.nan_safe(listed, of)
        yield tile_shapes.few(listed.with_(pack_gqa=True, sinks=True), 4, of).with_(split_kv=True)
        yield tile_shapes.normalizers(listed, of)
        for task in ("query", "key"):
            shape = tile_shapes.base(task, storage, E, Ev, of)
            c = tile_shapes.with_options(shape, **options, lists=True, flags=True)
            for part in tile_shapes.parts(tile_shapes.fitted(c, of)):
                yield part
                yield tile_shapes.no_more_rows(part, 64)
                yield tile_shapes.nan_safe(part, of)
        single = tile_shapes.fused_dq(c, of)
        if single is not None:
            yield single
            yield tile_shapes.no_more_rows(single, 64)
    # Rules of callers, alone and with all else.
    for options in ({}, OPTIONS):
        ruled = tile_shapes.with_options(forward, **options, mods=mods_of_all(False), flags=True)
        yield tile_shapes.fitted(ruled, of)
        yield tile_shapes.nan_safe(ruled, of)
        yield tile_shapes.few(ruled.with_(pack_gqa=True, sinks=True), 4, of).with_(split_kv=True)
        yield tile_shapes.weights(ruled, of)
        yield tile_shapes.normalizers(ruled, of)
        for task in ("query", "key"):
            shape = tile_shapes.base(task, storage, E, Ev, of)
            c = tile_shapes.with_options(shape, **options, mods=mods_of_all(True), flags=True)
            for part in tile_shapes.parts(tile_shapes.fitted(c, of)):
                yield part
                yield tile_shapes.nan_safe(part, of)
        single = tile_shapes.fused_dq(c, of)
        if single is not None:
            yield single
        of_queries = tile_shapes.base("query", storage, E, Ev, of)
        summed = tile_shapes.with_options(forward, **options, mods=mods_of_all(False, (0,)))
        yield tile_shapes.bias(summed, of, "mods")
        with_bias = {**OPTIONS, **options}
        yield tile_shapes.bias(tile_shapes.with_options(of_queries, **with_bias, mods=mods_of_all(True)), of)
    yield Spec(
        "combine", storage, forward.E, forward.Ev, warps=4, pack_gqa=True, flags=True, arch=arch,
        E_slices=forward.E_slices, Ev_slices=forward.Ev_slices,
    )  # fmt: skip
    yield Spec("delta", storage, E, Ev, warps=4, fused_dq=single is not None, arch=arch)


def shares():
    """Every combination of architecture, storage and head dimension; unless thorough, each of the latter once."""
    pairs = list(every(STORAGES, FEATURES))
    if THOROUGH:
        return [(arch, *pair) for arch in ARCHS for pair in pairs]
    return [(ARCHS[n % 3], *pair) for n, pair in enumerate(pairs) if pair[0] != "bfloat16" or pair[1] == 128]


@pytest.mark.parametrize(("arch", "storage", "E"), shares())
def test_nothing_spills(arch, storage, E):
    found = list(rest(arch, storage, E))
    if not THOROUGH:  # half of the kinds for one of the combinations with 16 bits, and half for one with 32 or 64
        alike = [share for share in shares() if (share[1] in HALVES) == (storage in HALVES)]
        found = found[alike.index((arch, storage, E)) :: 2 * len(alike)]
    for c in found:
        check(kernels.compile_(c), c)


@pytest.mark.parametrize("of_bias", ["float32", "bfloat16", "float64"])
@pytest.mark.parametrize("task", ["forward", "query"])
def test_bias_and_mask_in_pairs(disassembled, task, of_bias):
    """A thread has two neighbours of a row: each pair is one load of twice the size."""
    of, counts = device("sm_80"), []
    for pairs in (False, True):
        c = tile_shapes.with_options(tile_shapes.base(task, "float16", 64, 64, of), bias=of_bias, mask=True)
        c = c.with_(pairs=pairs)
        compiled = kernels.compile_(c)
        check(compiled, c)
        loads = re.findall(r"\bLDG\.E(?:\.CONSTANT)?((?:\.(?:64|128|U16|U8))?) ", disassembled(compiled.code))
        counts.append(Counter(loads))
    one, two = counts
    single, double = {"float32": ("", ".64"), "bfloat16": (".U16", ""), "float64": (".64", ".128")}[of_bias]
    elements = c.slots * 2 * c.columns // 4  # of a thread
    assert (one[".U8"], two[".U8"]) == (elements, 0)
    assert two[double] - one[double] == elements // 2
    assert two[".U16"] == elements // 2
    if single != ".U16":
        assert one[single] - two[single] == elements


@pytest.mark.parametrize("storage", STORAGES[:2])
def test_gradients_of_keys_with_every_option_at_once(storage):
    """The kernel that needs most registers; it alone has narrower tiles."""
    of = device("sm_90a")
    for n, columns in ((4, 16), (3, 32)):
        options = dict(list(OPTIONS.items())[-n:])
        c = tile_shapes.with_options(tile_shapes.base("key", storage, 256, 256, of), **options, flags=True)
        of_keys, _ = tile_shapes.parts(c)
        assert of_keys.columns == columns
        check(kernels.compile_(of_keys), of_keys)


def sliced_products(c):
    """As `products`, where features pass in slices: a loop over all but the last, which stands after it."""
    of_scores, steps = c.columns // 8 * (c.E // 16), 2 if c.task == "query" or c.only == "key" else 1
    reads = c.E // 16 * (1 + c.columns // 16)
    return (
        2 * steps * of_scores + c.Ev // 8 * (c.columns // 16),
        2 * steps * reads + c.columns // 16 * (c.Ev // 16),
    )


@pytest.mark.parametrize(("arch", "storage", "E", "Ev"), LARGE if THOROUGH else LARGE[::2])
def test_large_heads(instructions, arch, storage, E, Ev):
    """Features in slices, whatever their number: nothing spills, and no loop over slices is unrolled."""
    for c in plain(arch, storage, E, Ev):
        assert c.is_sliced
        compiled = kernels.compile_(c)
        check(compiled, c)
        found = instructions(compiled.code)
        assert not found["LDL"] + found["STL"]
        if c.product == "tensor":
            assert (found["HMMA"], found["LDSM"]) == sliced_products(c), c.name
    found = list(rest(arch, storage, E, Ev))
    if not THOROUGH:  # a tenth of them, other ones for each
        found = found[LARGE.index((arch, storage, E, Ev)) :: 10]
    for c in found:
        check(kernels.compile_(c), c)


@pytest.mark.parametrize("storage", STORAGES)
def test_old_gpus(storage):
    """Before sm_80 there are neither asynchronous copies nor matrices of these types, and less shared memory.

    (CUDA 13 compiles for sm_75 and later, CUDA 12 for sm_70 too.)
    """
    for task in ("forward", "query", "key") if THOROUGH else ("forward",):
        c = tile_shapes.with_options(tile_shapes.base(task, storage, 64, 64, device("sm_75")), aligned=False)
        assert c.product == "simt"
        check(kernels.compile_(c), c)


@pytest.mark.parametrize(("of", "to"), [("float32", "bfloat16"), ("float64", "float64"), ("float16", "float32")])
def test_sums(of, to):
    c = Spec("reduce", of, 32, 32, to=to, aligned=False, arch="sm_90a")
    check(kernels.compile_(c), c)


def test_conversion_reads_sixteen_bytes_at_a_time(disassembled):
    c = Spec("reduce", "float32", 32, 32, to="bfloat16", arch="sm_90a")
    compiled = kernels.compile_(c)
    check(compiled, c)
    assert re.findall(r"\b(?:LDG|STG)\.E\S* ", disassembled(compiled.code)) == ["LDG.E.128 ", "STG.E.64 "]


@pytest.mark.parametrize(("of", "to"), [("float32", "int8"), ("float64", "float8_e4m3fn"), ("float64", "float16"),
                                        ("float16", "bfloat16"), ("int8", "int8")])  # fmt: skip
def test_append(of, to):
    for arch in ARCHS if THOROUGH else ARCHS[:1]:
        c = Spec("append", of, 32, 32, aligned=False, to=to, arch=arch)
        check(kernels.compile_(c), c)


def test_append_copies_sixteen_bytes_at_a_time(disassembled):
    c = Spec("append", "float32", 32, 32, to="float32", arch="sm_90a")
    compiled = kernels.compile_(c)
    check(compiled, c)
    loads, stores = (re.findall(rf"{name}\S*", disassembled(compiled.code)) for name in ("LDG", "STG"))
    assert all(".128" in each for each in loads + stores)
    assert len(loads) == len(stores) + 1, "an entry of the list too"


@pytest.mark.parametrize("task", ["merge", "merge_backward"])
@pytest.mark.parametrize(("of", "to"), [("float32", "float32"), ("float16", "float64"), ("bfloat16", "float32")])
def test_merge(of, to, task):
    for arch in ARCHS if THOROUGH else ARCHS[:1]:
        for shape in (
            {"slots": 2, "across": 16, "columns": 1},
            {"slots": 2, "across": 32, "columns": 3, "paged": True},
        ):
            c = Spec(task, of, 32, 32, aligned=shape["columns"] == 1, to=to, arch=arch, **shape)
            check(kernels.compile_(c), c)


@pytest.mark.parametrize("task", ["merge", "merge_backward"])
def test_merge_reads_sixteen_bytes_of_two_parts_before_it_waits(disassembled, task):
    c = Spec(task, "bfloat16", 32, 32, slots=2, across=16, columns=1, to="float32", arch="sm_90a")
    code = disassembled(kernels.compile_(c).code)
    before, _, _ = code.partition("BRA")
    assert before.count("LDG.E.128") == (2 if task == "merge" else 3)
    assert all(".128" in each or each in ("LDG.E", "STG.E") for each in re.findall(r"(?:LDG|STG)\S*", code))


def test_a_kernel_compiles_to_the_same_code():
    """What the cache on disk counts on: the code of a kernel follows from its name."""
    c = Spec("combine", "float16", 64, 64, warps=4, arch="sm_80")
    one, two = kernels.compile_(c), kernels.compile_(c)
    assert len(one.code) == len(two.code)
    assert (one.registers, one.spills) == (two.registers, two.spills)


def test_what_does_not_compile_is_said(monkeypatch):
    """Releases of numba and numba-cuda that do not belong together fail in many ways."""
    from numba_attention.cuda import toolchain

    def fail(*arguments):
        raise AttributeError("no attribute 'NPDatetime'")

    monkeypatch.setattr(toolchain, "compile_kernel", fail)
    with pytest.raises(
        BackendUnavailableError, match=r"numba-cuda [\d.]+ with numba .*'NPDatetime'; releases that belong"
    ):
        kernels.compile_(Spec("combine", "float16", 64, 64, arch="sm_80"))


def test_kernels_compile_where_numpy_has_no_row_stack():
    """As since NumPy 2.5, without which numba-cuda's functions of arrays cannot be imported; NumPy is left alone."""
    code = """
import numpy as np
if hasattr(np, "row_stack"):
    del np.row_stack
    np.__all__.remove("row_stack")
from numba_attention.cuda import kernels
from numba_attention.cuda.spec import Spec
print(len(kernels.compile_(Spec("combine", "float32", 64, 64, arch="sm_90a")).code) > 1000, hasattr(np, "row_stack"))
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.stdout == "True False\n", done.stderr


def test_a_folder_for_every_architecture(tmp_path):
    """Of machine code for GPUs of that architecture, which nothing compiles again."""
    command = ["-m", "numba_attention", "kernels", "build", str(tmp_path), "--arch", "all"]
    said = []
    for _ in range(2):
        run = [sys.executable, *command, "--only", "delta-float32-64x64"]
        done = subprocess.run(run, capture_output=True, text=True)
        assert done.returncode == 0, done.stdout + done.stderr
        said.append(sorted(done.stdout.split()))
    assert said[0] == said[1] == sorted(path.name for path in tmp_path.iterdir())
    assert len(said[0]) == len(shipping.GPUS)
    for arch in shipping.GPUS:
        (path,) = tmp_path.glob(f"{arch}-*.cubin")
        code = path.read_bytes()[32:]
        assert code[:4] == b"\x7fELF"
        assert struct.unpack_from("<H", code, 18) == (190,), "machine code for CUDA"
        assert entry(code)
        assert arch.encode() in code, "what the assembler was asked for"


def test_a_wheel_of_kernels_is_installed_and_found(tmp_path):
    """By pip, into a folder of its own; a process then compiles nothing, neither for a GPU nor for the CPU."""
    folder, wheels, site = (tmp_path / name for name in ("kernels", "wheels", "site"))
    only = "delta-float32-64x64"
    command = ["-m", "numba_attention", "kernels", "build", str(folder), "--arch", "sm_80", "--only", only]
    done = subprocess.run([sys.executable, *command, "--wheel", str(wheels)], capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    (wheel,) = wheels.iterdir()
    assert wheel.name in done.stdout.split()
    assert shipping.pack(folder, tmp_path / "again").read_bytes() == wheel.read_bytes()
    pip = [sys.executable, "-m", "pip", "install", "--no-deps", "--no-index", "--target", str(site), str(wheel)]
    subprocess.run(pip, capture_output=True, check=True)
    (name,) = (path.name for path in folder.iterdir())
    assert (site / "numba_attention_kernels" / name).read_bytes() == (folder / name).read_bytes()
    code = f"""
from numba_attention import shipping
from numba_attention.backends.cuda import common_kernels
from numba_attention.cuda import kernels
kernels.compile_ = None
(c,) = (c for c in common_kernels(shipping.gpu_of("sm_80")) if {only!r} in c.name)
print(kernels.compiled(c).name)
"""
    variables = os.environ | {"NUMBA_ATTENTION_CACHE_DIR": str(tmp_path / "cache")}
    for path, returncode in ((f"{site}{os.pathsep}{os.environ.get('PYTHONPATH', '')}", 0), (None, 1)):
        env = variables if path is None else variables | {"PYTHONPATH": path}
        done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env=env)
        assert done.returncode == returncode, done.stdout + done.stderr
    empty = tmp_path / "empty"
    empty.mkdir()
    with pytest.raises(RuntimeError, match="no kernels in"):
        shipping.pack(empty, wheels)


def test_command_knows_architectures(tmp_path):
    command = [sys.executable, "-m", "numba_attention", "kernels", "build", str(tmp_path), "--arch", "sm_90"]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode != 0
    said = " ".join((done.stdout + done.stderr).split())
    assert "unknown architecture 'sm_90', expected all or some of sm_80, sm_86, sm_89, sm_90a, sm_100, sm_120" in said


def test_kernels_that_ship_are_those_that_calls_use():
    """Of an H100: decoding with and without grouped heads, in one part and in several, gradients, masks."""
    names = {c.name for c in common_kernels(shipping.gpu_of("sm_90a"))}
    words = [set(name.split("-")) for name in names]
    assert all("sm_90a" in of for of in words)
    for task in ("forward", "combine", "delta", "key", "round", "normalizers"):
        assert any({task, "bfloat16"} <= of for of in words), task
    for more in ({"pack_gqa"}, {"pack_gqa", "split_kv"}, {"split_kv"}, {"flags"}, {"nan_safe"}):
        assert any({"forward", "float16", "128x128", *more} <= of for of in words), more
