"""The bound's instructions: renamed so that none waits for another, and timed."""

import klfast
import pytest

import bounds
from machine_code import Instruction
from suite import Work
from throughput import independent, seconds

needs_cycles = pytest.mark.skipif(bool(bounds.why_no_cycles()), reason=str(bounds.why_no_cycles()))


def instruction(text):
    return Instruction(0, *text.split(" ", 1))


@pytest.mark.parametrize(
    ("text", "renamed"),
    [
        ("vfmadd231ps zmm4,zmm5,zmm4", "vfmadd231ps zmm{v},zmm1,zmm0"),
        ("vaddpd zmm2{k3},zmm0,zmm1", "vaddpd zmm{v}{{k1}},zmm1,zmm0"),
        ("vmulpd zmm21{k2}{z},zmm2,zmm25", "vmulpd zmm{v}{{k1}}{{z}},zmm1,zmm0"),
        ("vsubpd zmm1,zmm2,ZMMWORD PTR [rax-0x48]", "vsubpd zmm{v},zmm1,ZMMWORD PTR [rsi]"),
        (
            "vmulpd zmm6,zmm6,QWORD BCST [rip+0x9f]        # 156c88 <_name@@Base+0x1469d7>",
            "vmulpd zmm{v},zmm1,QWORD BCST [rsi]",
        ),
        ("vaddps zmm1,zmm2,DWORD PTR [r8]{1to16}", "vaddps zmm{v},zmm1,DWORD PTR [rsi]{{1to16}}"),
        ("vcmpltpd k4{k2},zmm5,zmm1", "vcmpltpd k{k}{{k1}},zmm1,zmm0"),
        ("vpcmpnltq k1,zmm1,zmm21", "vpcmpnltq k{k},zmm1,zmm0"),
        ("vblendmpd zmm10{k7},zmm1,zmm5", "vblendmpd zmm{v}{{k1}},zmm1,zmm0"),
        ("vpblendvb ymm0,ymm3,ymm1,ymm0", "vpblendvb ymm{w},ymm2,ymm1,ymm0"),
        ("vcvtps2pd zmm2,ymm3", "vcvtps2pd zmm{v},ymm0"),
        ("vextractf32x8 ymm3,zmm9,0x1", "vextractf32x8 ymm{v},zmm1,0x1"),
        ("vpternlogq zmm1,zmm4,zmm5,0xfe", "vpternlogq zmm{v},zmm2,zmm1,0xfe"),
        ("vpinsrd xmm2,xmm5,r10d,0x1", "vpinsrd xmm{w},xmm2,edx,0x1"),
        ("vpextrq rcx,xmm0,0x1", "vpextrq rax,xmm1,0x1"),
        ("vcompresspd ZMMWORD PTR [rdi]{k2},zmm3", "vcompresspd ZMMWORD PTR [rsi+64]{{k1}},zmm0"),
        ("mulpd xmm0,xmm7", "mulpd xmm{w},xmm0"),
        ("blendvpd xmm5,xmm6,xmm0", "blendvpd xmm{w},xmm1,xmm0"),
    ],
)
def test_registers_are_others(text, renamed):
    """Of v from 3 to 31 where the instruction can name them, w from 3 to 15, k from 2 to 7."""
    for n in range(100):
        want = renamed.format(v=3 + n % 29, w=3 + n % 13, k=2 + n % 6)
        assert independent(instruction(text), n) == want


def test_what_counts():
    assert bounds.is_vector(instruction("vaddsd xmm0,xmm1,xmm2"))
    assert bounds.is_vector(instruction("vxorps zmm0,zmm0,zmm1"))
    for text in ("vxorps xmm0,xmm0,xmm0", "pxor xmm8,xmm8", "vmovupd zmm0,ZMMWORD PTR [rdi]",
                 "vmaskmovpd ymm4,ymm2,YMMWORD PTR [rdi]", "kandw k0,k1,k2",
                 "add rax,rdx"):  # fmt: skip
        assert not bounds.is_vector(instruction(text)), text


@needs_cycles
@pytest.mark.skipif("avx2" not in klfast.config.describe()["isa_available"], reason="needs AVX2")
def test_pipes_are_full():
    """A multiply-add takes four cycles or more, and processors with AVX2 begin one or more in each;
    divisions take more time."""
    texts = ("vfmadd231pd ymm4,ymm5,ymm6", "vdivpd ymm1,ymm1,ymm1")
    cycle, add, divide = seconds([(), *((instruction(text),) * 16 for text in texts)])
    assert 0.2 < add / 16 / cycle < 1.5
    assert divide > 2 * add


@needs_cycles
def test_what_cannot_be_assembled_is_named():
    with pytest.raises(ValueError, match="vnonsense"):
        seconds([(instruction("vnonsense xmm0,xmm1"),)])


@needs_cycles
def test_kernels_are_seen():
    entries = ("discrete", "categorical", "normal-scale", "mvn")
    cycles = bounds.cycles([Work(entry, "float32", 64, 2) for entry in entries])
    assert min(cycles) > 1, dict(zip(entries, cycles, strict=True))
