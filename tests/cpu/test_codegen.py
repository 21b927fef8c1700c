"""The machine code of the micro-kernel, for this host and for others: registers used, nothing spilled in the loop."""

import re

import llvmlite.binding as llvm
import pytest
from llvmlite import ir

from assembly import innermost
from numba_attention.backends.cpu_widths import narrows_of
from numba_attention.cpu import features
from numba_attention.cpu.gemm import micro_kernel
from numba_attention.cpu.simd import HOST, I64, Host, detect
from numba_attention.cpu.spec import Spec
from numba_attention.cpu.sums import sum_blocks

HOSTS = {
    "AVX-512": ("x86_64-unknown-linux-gnu", "znver4", "+avx512bf16"),
    "AVX2": ("x86_64-unknown-linux-gnu", "haswell", ""),
    "SSE": ("x86_64-unknown-linux-gnu", "nehalem", ""),
    "NEON": ("aarch64-unknown-linux-gnu", "apple-m1", ""),
}


@pytest.fixture(scope="module", autouse=True)
def targets():
    llvm.initialize_all_targets()
    llvm.initialize_all_asmprinters()


def assembly(routine, target):
    """Compile the body of a routine for a target that need not be this machine."""
    triple, cpu, features = target
    module = ir.Module()
    module.triple = triple
    arguments = [I64] * len(routine.signature.args)
    function = ir.Function(module, ir.FunctionType(ir.VoidType(), arguments), "routine")
    b = ir.IRBuilder(function.append_basic_block())
    routine.build(b, *function.args)
    b.ret_void()
    machine = llvm.Target.from_triple(triple).create_target_machine(cpu=cpu, features=features, opt=3)
    return machine.emit_assembly(llvm.parse_assembly(str(module)))


@pytest.mark.parametrize("name", HOSTS)
def test_detection(name):
    host = detect(*HOSTS[name])
    assert host.name == name
    assert host.bits == {"AVX-512": 512, "AVX2": 256}.get(name, 128)
    assert host.bf16_dot == (name == "AVX-512")


def test_this_host_is_one_of_them():
    assert HOST.name in (*HOSTS, "generic")


@pytest.mark.parametrize("role", ["scores", "output", "first output"])
@pytest.mark.parametrize("storage", ["float32", "float64"])
@pytest.mark.parametrize("narrow", [0, 1, 2, 3, 5])
@pytest.mark.parametrize(
    ("name", "fma", "register"),
    [("AVX-512", "vfmadd", "%zmm"), ("AVX2", "vfmadd", "%ymm"), ("NEON", r"fmla", r"v\d+\.")],
)
def test_loop_keeps_its_block_in_registers(name, fma, register, narrow, storage, role):
    host: Host = detect(*HOSTS[name])
    if narrow and narrow not in narrows_of(host):
        pytest.skip("no such tiles")
    spec = Spec(storage, host, vectors=narrow)
    rows, vectors = spec.block
    loop = innermost(assembly(micro_kernel(spec, role), HOSTS[name]), fma)
    number = len(re.findall(rf"\b{fma}\w*\b.*{register}", loop))
    assert number % (rows * vectors) == 0
    assert number > 0
    stack = r"\(%rsp\)|\[sp"
    # Addresses may be reloaded; the block may not.
    assert not [line for line in loop.splitlines() if re.search(stack, line) and re.search(register, line)], loop


@pytest.mark.parametrize("storage", ["float32", "float64", "bfloat16"])
@pytest.mark.parametrize("which", range(3))
@pytest.mark.parametrize(("name", "fma", "register"), [("AVX-512", "vfmadd", "%zmm"), ("AVX2", "vfmadd", "%ymm")])
def test_sums_of_the_backward_pass(name, fma, register, storage, which):
    spec = Spec(storage, detect(*HOSTS[name]), "backward")
    rows, vectors = sum_blocks(spec)[which]
    fma = "vdpbf16ps" if spec.bf16_dot else fma
    loop = innermost(assembly(micro_kernel(spec, "sum", (rows, vectors)), HOSTS[name]), fma)
    number = len(re.findall(rf"\b{fma}\w*\b.*{register}", loop))
    assert number > 0
    assert number % (rows * vectors) == 0
    assert not [line for line in loop.splitlines() if "(%rsp)" in line and register in line], loop


def test_bfloat16_dot_products():
    host = detect(*HOSTS["AVX-512"])
    loop = innermost(assembly(micro_kernel(Spec("bfloat16", host), "scores"), HOSTS["AVX-512"]), "vdpbf16ps")
    assert len(re.findall("vdpbf16ps", loop)) % 16 == 0
    assert "(%rsp)" not in loop


@pytest.mark.parametrize("stored", ["", "bfloat16", "int8", "float8_e4m3fn"])
@pytest.mark.parametrize(("name", "register"), [("AVX-512", "%zmm"), ("AVX2", "%ymm")])
@pytest.mark.parametrize("height", [1, 2, 4])
def test_products_of_few_queries(name, register, height, stored):
    """One multiply-add for each vector of a key (value) and each query, and nothing spilled."""
    spec = Spec("float32", detect(*HOSTS[name]), "decode", stored)
    wide = 8 // height if name == "AVX-512" else 4 // height
    dots, add = features._dot_products(spec, height), features._weighted_rows(spec, height, max(1, wide))
    for routine, number in ((dots, height), (add, height * max(1, wide))):
        loop = innermost(assembly(routine, HOSTS[name]), "vfmadd")
        found = len(re.findall(rf"\bvfmadd\w*\b.*{register}", loop))
        assert found > 0
        assert found % number == 0
        assert not [line for line in loop.splitlines() if "(%rsp)" in line and register in line], loop
