"""04_fp8_gemm.py against the format's bits, loops over tiles, and float64 products of the codes."""

import importlib.util
import math
import shutil
from importlib import import_module

import pytest
import torch
from ahead import SHARED_LIMIT, compile_for, compile_gemm, compile_specialized, interpret, shipped
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn
from torch.nn import functional as F

fp8 = import_module("04_fp8_gemm")
chapter = import_module("06_train")
FP8Linear, dequantize = fp8.FP8Linear, fp8.dequantize
quantize_tiles, quantize_blocks = fp8.quantize_tiles, fp8.quantize_blocks


@pytest.fixture(autouse=True)
def seed():
    torch.manual_seed(0)


def exact(codes, scales):
    return dequantize(codes, scales).double()


# The format ----------------------------------------------------------------------------------


def test_every_code():
    for code in range(256):
        got = torch.tensor([code], dtype=torch.uint8).view(torch.float8_e4m3fn).float().item()
        want = fp8.e4m3_value(code)
        assert got == want or math.isnan(got) and math.isnan(want)
    assert sum(math.isnan(fp8.e4m3_value(code)) for code in range(256)) == 2
    assert fp8.e4m3_value(0x7E) == 448 and fp8.e4m3_value(1) == 2**-9


@given(st.floats(-448, 448, width=32))
@settings(max_examples=300, deadline=None)
def test_the_cast_is_to_the_nearest(x):
    assert torch.tensor(x).to(torch.float8_e4m3fn).float().item() == fp8.e4m3_nearest(x)


@pytest.mark.parametrize("power_of_two", [False, True])
def test_all_bf16_numbers_as_the_quantizer_casts_them(power_of_two):
    """Each of the finite ones in a tile of its own: one number is its own amax."""
    bits = torch.arange(-(2**15), 2**15, dtype=torch.int32).to(torch.int16)
    x = bits.view(torch.bfloat16)
    x = x[x.abs() <= 2.0**127]  # past it, rounding up to a power of two would leave fp32's range
    codes, scales = quantize_tiles(x[:, None], power_of_two)
    back = dequantize(codes, scales)[:, 0].double()
    wide = x.double()
    ordinary = wide.abs() >= 2.0**-100
    error = (back / wide - 1)[ordinary].abs().max()
    assert error <= (2**-4 if power_of_two else 2**-23)  # alone it becomes 448, or of its power
    assert (back[~ordinary].abs() <= 2.0**-100).all() and back[wide == 0].eq(0).all()
    if power_of_two:
        assert (torch.frexp(scales).mantissa == 0.5).all()
        assert (codes.float().abs() <= 448).all() and (codes.float().abs()[ordinary] > 223).all()


# Quantisers ----------------------------------------------------------------------------------


@pytest.mark.parametrize("power_of_two", [False, True], ids=["fp32", "ue8m0"])
@pytest.mark.parametrize("shape", [(1, 1), (3, 127), (2, 128), (2, 129), (5, 300)])
def test_tiles_are_the_loops(shape, power_of_two):
    x = torch.randn(shape) * torch.logspace(-4, 4, shape[1])
    codes, scales = quantize_tiles(x, power_of_two)
    assert codes.shape == shape and codes.dtype == torch.float8_e4m3fn
    assert scales.shape == (shape[0], -(-shape[1] // 128)) and scales.dtype == torch.float32
    want = fp8.quantize_reference(x, 1, 128, power_of_two)
    assert torch.equal(dequantize(codes, scales), want.float())


@pytest.mark.parametrize("power_of_two", [False, True], ids=["fp32", "ue8m0"])
@pytest.mark.parametrize("shape", [(1, 1), (127, 2), (129, 130), (3, 257)])
def test_blocks_are_the_loops(shape, power_of_two):
    w = torch.randn(shape) * torch.logspace(-4, 4, shape[1])
    codes, scales = quantize_blocks(w, power_of_two)
    assert codes.shape == shape and scales.shape == tuple(-(-n // 128) for n in shape)
    want = fp8.quantize_reference(w, 128, 128, power_of_two)
    assert torch.equal(dequantize(codes, scales), want.float())


def test_576_rows_make_five_blocks():
    """kv_a_proj_with_mqa of V3: floor would give four, and lose the rotary rows."""
    assert quantize_blocks(torch.randn(576, 256))[1].shape == (5, 2)


def test_leading_axes_are_only_many():
    x, w = torch.randn(2, 3, 200), torch.randn(4, 130, 140)
    codes, scales = quantize_tiles(x)
    one_codes, one_scales = quantize_tiles(x[1, 2][None])
    assert torch.equal(codes[1, 2].float(), one_codes[0].float())
    assert torch.equal(scales[1, 2], one_scales[0])
    codes, scales = quantize_blocks(w)
    one_codes, one_scales = quantize_blocks(w[3])
    assert torch.equal(codes[3].float(), one_codes.float()) and torch.equal(scales[3], one_scales)
    assert torch.equal(dequantize(codes, scales)[3], dequantize(one_codes, one_scales))


def test_all_256_codes_mean_what_the_cast_makes_of_them():
    codes = torch.arange(256, dtype=torch.uint8).view(torch.float8_e4m3fn)
    for some in codes[None], codes[::3][None], codes.view(16, 16).T, codes[None, :0]:
        got = dequantize(some, torch.full((len(some), -(-some.shape[1] // 128)), 2.0))
        torch.testing.assert_close(got, 2 * some.float(), rtol=0, atol=0, equal_nan=True)
    scales, want = torch.ones(1, 2), codes[None].float()
    with torch.device("meta"):  # a table that was made here would be of no use
        got = dequantize(codes[None], scales)
    torch.testing.assert_close(got, want, equal_nan=True)


@pytest.mark.slow  # compiles C++
@pytest.mark.skipif(shutil.which("g++") is None, reason="no C++ compiler")
def test_compiled_it_gives_the_eager_numbers():
    """inductor's own twins were wrong where 128 does not divide K."""
    layer, x = FP8Linear(300, 70), torch.randn(9, 300, requires_grad=True)
    inputs = [x, *layer.parameters()]

    def all_of(call) -> list:
        y = call(layer)(x)
        found = [y, *torch.autograd.grad((y**2).sum(), inputs)]
        for quantize in quantize_tiles, quantize_blocks:
            codes, scales = call(quantize)(x)
            found += [codes.float(), scales, call(dequantize)(codes, scales)]
        assert not any(t.requires_grad for t in found[1:])
        return found

    torch.compiler.reset()
    for mine, other in zip(all_of(torch.compile), all_of(lambda f: f), strict=True):
        assert 0 < other.abs().max() and (mine - other).abs().max() <= 1e-6 * other.abs().max()


def test_zeros_stay_zeros_and_small_numbers_survive():
    x = torch.zeros(2, 256)
    x[1, :128] = 1e-8 * torch.randn(128)  # a gradient
    back = dequantize(*quantize_tiles(x))
    assert torch.equal(back[0], x[0]) and torch.equal(back[1, 128:], x[1, 128:])
    assert fp8.relative(back[1], x[1]) < 0.03


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("power_of_two", [False, True])
def test_what_is_no_number_spoils_its_whole_tile_and_no_other(bad, power_of_two):
    x = torch.randn(2, 256)
    x[0, 5] = bad
    back = dequantize(*quantize_tiles(x, power_of_two))
    assert back[0, :128].isnan().all() and back[0, 128:].isfinite().all()
    assert back[1].isfinite().all()
    w = torch.randn(256, 256)
    w[200, 5] = bad
    spoilt = dequantize(*quantize_blocks(w, power_of_two)).isnan()
    assert spoilt[128:, :128].all() and spoilt.sum() == 128 * 128


def test_gaussian_error_is_the_known_one():
    """2.57 % with fp32 scales, 2.65 % with powers of two."""
    x = torch.randn(512, 4096)
    assert fp8.relative(dequantize(*quantize_tiles(x)), x) == pytest.approx(0.0257, abs=3e-4)
    assert fp8.relative(dequantize(*quantize_tiles(x, True)), x) == pytest.approx(0.0265, abs=3e-4)


# Products ------------------------------------------------------------------------------------


@pytest.mark.parametrize("M, N, K", [(1, 1, 1), (5, 130, 127), (128, 128, 128), (33, 257, 384)])
@pytest.mark.parametrize("b_by", [quantize_blocks, quantize_tiles], ids=["blocks", "tiles"])
def test_product_is_that_of_the_codes(M, N, K, b_by):
    a, b = quantize_tiles(torch.randn(M, K)), b_by(torch.randn(N, K))
    want = exact(*a) @ exact(*b).T
    got = fp8.fp8_gemm(*a, *b, torch.float32)
    assert got.dtype == torch.float32 and (got - want).abs().max() <= 1e-6 * K
    got = fp8.fp8_gemm(*a, *b)
    assert got.dtype == torch.bfloat16
    assert (got.double() - want).abs().max() <= 2**-8 * want.abs().max()


def test_product_ignores_autocast():
    a, b = quantize_tiles(torch.randn(40, 256)), quantize_blocks(torch.randn(50, 256))
    want = fp8.fp8_gemm(*a, *b, torch.float32)
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(fp8.fp8_gemm(*a, *b, torch.float32), want)


def operands(M=200, N=256, K=256):
    return [*quantize_tiles(torch.randn(M, K)), *quantize_blocks(torch.randn(N, K))]


@pytest.mark.parametrize(
    "place, change, message",
    [
        (0, lambda t: t[:, :128].contiguous(), r"\(200, 1\)"),
        (0, lambda t: t.float(), "torch.float32"),
        (1, lambda t: t.double(), "torch.float64"),
        (1, lambda t: t[:, :1].contiguous(), r"\(200, 1\)"),
        (2, lambda t: t[:, :100].contiguous(), r"b: codes \(256, 100\)"),
        (3, lambda t: t.T, "must be contiguous"),  # square: the shapes fit
        (3, lambda t: t[:1].contiguous(), r"\(1, 2\)"),
        (2, lambda t: t[0], "want a matrix"),
    ],
)
def test_product_refuses(place, change, message):
    bad = operands()
    bad[place] = change(bad[place])
    with pytest.raises(ValueError, match=message):
        fp8.fp8_gemm(*bad)


def test_product_refuses_another_K():
    a, b = operands(K=128), operands(K=256)
    with pytest.raises(ValueError, match=r"K differs: a \(200, 128\), b \(256, 256\)"):
        fp8.fp8_gemm(*a[:2], *b[2:])


# Kernels -------------------------------------------------------------------------------------

TRITON = pytest.mark.skipif(importlib.util.find_spec("triton") is None, reason="no Triton here")
KERNEL_START = """
import math, random
from importlib import import_module
import torch
fp8 = import_module("04_fp8_gemm")
torch.manual_seed(0)
random.seed(0)
fp8.gpu = lambda device: ((9, 0), 2)
"""
QUANTIZERS = """
shapes = [(1, 1), (3, 127), (33, 129), (130, 256)]
shapes += [(random.randint(1, 150), random.randint(1, 300)) for _ in range(4)]
for M, K in shapes:
    for power_of_two in False, True:
        for dtype in torch.float32, torch.float16:
            x = torch.randn(M, K) * torch.logspace(-3, 3, K)
            x[M // 2, : K // 2] = 0
            if M > 2 and dtype == torch.float32:
                x[2, 0], x[1, -1] = math.nan, -math.inf
            x = x.to(dtype)
            for blocks, twin in (False, fp8.quantize_tiles), (True, fp8.quantize_blocks):
                codes, scales = fp8.launch_quantize(x, blocks, power_of_two)
                want_codes, want_scales = twin(x, power_of_two)
                ok = ~want_scales.isnan()
                assert torch.equal(scales[ok], want_scales[ok]), (M, K, blocks)
                assert torch.equal(scales.isnan(), ~ok), (M, K, blocks)
                wide = ok.repeat_interleave(128, 1)[:, :K]
                wide = wide.repeat_interleave(128, 0)[:M] if blocks else wide
                same = codes.view(torch.uint8) == want_codes.view(torch.uint8)
                assert same[wide].all(), (M, K, blocks, power_of_two)
"""
PRODUCTS = """
plain = fp8.Config(16, 32, 4, 2), fp8.Config(32, 64, 4, 2), fp8.Config(16, 256, 4, 2)
configs = *plain, fp8.Config(32, 64, 4, 2, tma=True), fp8.Config(32, 16, 4, 2, swap=True)
configs += fp8.Config(64, 16, 4, 2, tma=True, swap=True),
shapes = [(1, 1, 1), (33, 70, 300), (64, 128, 128), (5, 257, 144), (20, 300, 208)]
shapes += [tuple(random.randint(1, n) for n in (60, 200, 300)) for _ in range(3)]
for M, N, K in shapes:
    for a_by in fp8.quantize_tiles, fp8.quantize_blocks:
        for b_by in fp8.quantize_blocks, fp8.quantize_tiles:
            a, b = a_by(torch.randn(M, K)), b_by(torch.randn(N, K))
            if 1 in (M, N) and a_by != fp8.quantize_tiles:
                continue
            a_columns = a[0], a[1].T.contiguous().T if a_by == fp8.quantize_tiles else a[1]
            want = fp8.dequantize(*a).double() @ fp8.dequantize(*b).double().T
            for config in configs:
                if config.tma and K % 16:
                    continue
                for a_side in a, a_columns:
                    got = fp8.launch_gemm(*a_side, *b, torch.float32, config)
                    assert (got - want).abs().max() <= 1e-6 * K, (M, N, K, config)
"""
ALONG = """
for M, C in (1, 1), (128, 64), (130, 70), (300, 130):
    for sizes in None, [M], [0, M // 2, 0, M - M // 2, 0], [M - 1, 1, 0]:
        for power_of_two in False, True:
            x = torch.randn(M, C) * torch.logspace(-3, 3, M)[:, None]
            x[M // 2, C // 2] = math.nan if power_of_two else 0
            ends = None if sizes is None else torch.tensor(sizes).cumsum(0).int()
            for operand in (x, None), fp8.quantize_tiles(x, power_of_two):
                codes, scales = fp8.launch_along(*operand, ends, power_of_two)
                want_codes, want_scales = fp8.quantize_along(*operand, ends, power_of_two)
                assert codes.shape == want_codes.shape and scales.shape == want_scales.shape
                ok = ~want_scales.isnan()
                assert torch.equal(scales[ok], want_scales[ok]), (M, C, sizes)
                assert torch.equal(scales.isnan(), ~ok), (M, C, sizes)
                same = codes.view(torch.uint8) == want_codes.view(torch.uint8)
                assert same[ok.repeat_interleave(128, 1)].all(), (M, C, sizes)
"""
GROUPED = """
plain, tma = fp8.Config(16, 32, 4, 2), fp8.Config(32, 64, 4, 2, tma=True)
cases = [([3, 0, 50, 1], 70, 144), ([0, 0, 40], 130, 130), ([17], 33, 128), ([0, 0], 5, 16)]
for sizes, N, K in cases:
    M, E = sum(sizes), len(sizes)
    ends = torch.tensor(sizes).cumsum(0).int()
    a, b = fp8.quantize_tiles(torch.randn(M, K)), fp8.quantize_blocks(torch.randn(E, N, K))
    want = fp8._gemm_by_rows(*a, *b, ends, torch.float32)
    x, y = (fp8.quantize_along(torch.randn(M, n), ends=ends) for n in (N, K))
    want_along = fp8._gemm_along_rows(*x, *y, ends, torch.float32)
    for config in plain, tma:
        if K % 16 == 0 or not config.tma:
            got = fp8.launch_gemm(*a, *b, torch.float32, config, ends)
            assert got.shape == want.shape
            assert M == 0 or (got - want).abs().max() <= 1e-6 * K
        got = fp8.launch_gemm(*x, *y, torch.float32, config, ends, along_k=True)
        assert got.shape == want_along.shape
        assert (got - want_along).abs().max() <= 1e-4, (sizes, config)
"""


LAYERS = """
# the same layers by kernels and by twins; the second candidate of each product is the fastest
import triton
from unittest.mock import patch

def gradients():
    torch.manual_seed(0)
    layer, x = fp8.FP8Linear(144, 50, bias=False), torch.randn(70, 144).requires_grad_()
    dy, weight = torch.randn(70, 50), torch.randn(3, 50, 144).requires_grad_()
    y = layer(x)
    grouped = fp8.fp8_grouped_gemm(x, weight, torch.tensor([30, 0, 40]))
    few = layer(x[:3])
    (y * dy + grouped * dy).sum().backward()
    return y, few, grouped, x.grad, layer.weight.grad, weight.grad

want = gradients()
times = iter([2.0, 1.0, 3.0, 3.0, 3.0, 3.0] * 100)
with patch.object(fp8, "has_kernels", lambda x: True), \
        patch.object(torch.cuda, "is_current_stream_capturing", lambda: False), \
        patch.object(fp8, "milliseconds", lambda run, want: next(times) + 0 * run().sum()):
    got = gradients()
for g, w in zip(got, want, strict=True):
    assert g.shape == w.shape and (g - w).abs().max() <= 1e-4
assert len(fp8.tuned()) == 6 and any(config.swap for config in fp8.tuned().values())

run = lambda: torch.ones(2)
with patch.object(triton.testing, "do_bench", lambda run, **_: 1.5):
    assert fp8.milliseconds(run, torch.ones(2)) == 1.5
    assert fp8.milliseconds(run, torch.zeros(2)) == math.inf
    assert fp8.milliseconds(lambda: 1 / torch.zeros(2, 3) @ run(), run()) == math.inf
"""


@TRITON
@pytest.mark.parametrize(
    "body",
    [QUANTIZERS, PRODUCTS, ALONG, GROUPED, LAYERS],
    ids=["quantizers", "products", "along", "grouped", "layers"],
)
def test_kernels_in_the_interpreter(body):
    """Codes and scales bit for bit; the product against that of the codes in float64."""
    interpret(KERNEL_START + body)


TENSOR_CORE = {89: r"mma.sync", 90: r"wgmma.mma_async", 100: r"tcgen05.mma", 120: r"mma.sync"}
CONFIGS = [
    pytest.param(capability, kind, config, id=f"sm_{capability}-{rows}-{kind}-{config}")
    for capability in TENSOR_CORE
    for rows, kind, config in shipped(fp8, capability)
]


@TRITON
@pytest.mark.parametrize("capability, kind, config", CONFIGS)
def test_gemm_compiles_without_a_spill(capability, kind, config):
    """Every config that is shipped, for every kind of operand: FP8 tensor cores, shared memory."""
    got = compile_gemm(fp8, capability, config, **kind)
    assert got.spilled == 0
    assert got.shared <= 1024 * SHARED_LIMIT[capability]
    lines = [line for line in got.ptx.splitlines() if TENSOR_CORE[capability] in line]
    assert lines and all("e4m3" in line or "f8f6f4" in line for line in lines)
    if capability == 90:
        assert "QGMMA" in got.sass and "HGMMA" not in got.sass
    if capability in (90, 100):
        assert ("UTMALDG" in got.sass) == config.tma
    if config.tma:  # a program that waits for a place would double the time
        assert config.each * (got.shared + 1024) <= 228 * 1024  # 1 KB of each is the system's
        assert config.each * -(-got.registers // 8) * 8 * 32 * config.warps <= 2**16


HOPPER = fp8.gemm_configs(4096, True, False, (9, 0), a_tiles=True)
SPECIALIZED = [config for config in HOPPER if config.consumers]


@pytest.mark.parametrize("out", ["bf16", "fp32"])
@pytest.mark.parametrize("config", SPECIALIZED, ids=lambda config: f"{config.consumers}-consumers")
def test_specialized_gemm_compiles_without_a_spill(config, out):
    """Registers move from the warp that loads to those that multiply, 64 rows of a tile each."""
    got = compile_specialized(fp8, config, out)
    assert got.spilled == 0 and got.shared <= 1024 * SHARED_LIMIT[90]
    for instruction in "QGMMA.64x128x32", "UTMALDG", "UTMASTG", "USETMAXREG":
        assert instruction in got.sass
    assert "HGMMA" not in got.sass


@TRITON
def test_who_specializes():
    """A Hopper, for many rows by tiles times blocks; it comes first, and no other kind has any."""
    assert [config.consumers for config in HOPPER[:3]] == [2, 3, 0]
    assert HOPPER[2:] == fp8.gemm_configs(4096, True, False, (9, 0))
    others = [(128, True, False, (9, 0)), (4096, False, False, (9, 0)), (4096, True, True, (9, 0))]
    others += [(4096, True, False, capability) for capability in ((8, 9), (10, 0), (12, 0))]
    for kind in others:
        assert not any(config.consumers for config in fp8.gemm_configs(*kind, a_tiles=True))


@TRITON
@pytest.mark.parametrize("capturing", [False, True])
def test_a_product_finds_its_kernel(monkeypatch, capturing):
    """On what says it is a Hopper: the candidates that `tuned_gemm` times, or the first of them."""
    launched = []

    def launch(a, a_scales, b, b_scales, out_dtype, config, ends, along_k):
        launched.append(config)
        return torch.ones(1)

    monkeypatch.setattr(fp8, "launch_gemm", launch)
    monkeypatch.setattr(fp8, "gpu", lambda device: ((9, 0), 132))
    monkeypatch.setattr(fp8, "milliseconds", lambda run, want: float(run()))
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: capturing)
    fp8.tuned.cache_clear()
    for by in quantize_blocks, quantize_tiles:  # of the same sizes: neither takes the other's
        for K, has_tma in (256, True), (250, False):
            launched.clear()
            a, b = by(torch.randn(300, K)), quantize_blocks(torch.randn(256, K))
            fp8.tuned_gemm(*a, *b, torch.float32)
            may = has_tma and by == quantize_tiles
            assert {config.consumers for config in launched} >= ({2} if may else {0})
            assert may or not any(config.consumers for config in launched)
            assert capturing or len(launched) > 2 and not launched[0].consumers
            assert not capturing or len(launched) == 1
    fp8.tuned.cache_clear()


@TRITON
def test_nan_chooses_no_kernel(monkeypatch):
    """Every candidate's product differs from NaN: the next product of its kind is timed."""
    monkeypatch.setattr(fp8, "gpu", lambda device: ((9, 0), 132))
    monkeypatch.setattr(fp8, "launch_gemm", lambda *_: torch.full((1,), math.nan))
    monkeypatch.setattr(fp8, "milliseconds", lambda run, want: math.inf)
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: False)
    fp8.tuned.cache_clear()
    a, b = quantize_tiles(torch.randn(300, 256)), quantize_blocks(torch.randn(256, 256))
    assert fp8.tuned_gemm(*a, *b, torch.float32).isnan().all() and not fp8.tuned()


@TRITON
@pytest.mark.parametrize("config", SPECIALIZED, ids=lambda config: f"{config.consumers}-consumers")
def test_specialized_gemm_of_no_columns(config):
    a, b = quantize_tiles(torch.randn(200, 128)), quantize_blocks(torch.randn(0, 128))
    assert fp8.launch_gemm(*a, *b, torch.bfloat16, config).shape == (200, 0)


@TRITON
@pytest.mark.parametrize("power_of_two", [False, True])
@pytest.mark.parametrize("blocks", [False, True], ids=["tiles", "blocks"])
@pytest.mark.parametrize("capability", [89, 90, 100, 120])
def test_quantizers_compile_without_a_spill(capability, blocks, power_of_two):
    kernel = fp8.quantize_blocks_kernel if blocks else fp8.quantize_tiles_kernel
    first, second = ("w", "N") if blocks else ("x", "M")
    types = {first: "*bf16", "codes": "*fp8e4nv", "scales": "*fp32", second: "i32", "K": "i32"}
    constants = {"POWER_OF_TWO": power_of_two, "BY_HAND": False}
    constants |= {} if blocks else {"ROWS": 32}
    aligned = (first, "codes", "scales", "K")
    got = compile_for(capability, kernel, types, constants, aligned, num_warps=8 if blocks else 4)
    assert got.spilled == 0
    assert "e4m3x2" in got.ptx  # the cast is the hardware's


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
@pytest.mark.parametrize("M, N, K", [(1, 130, 200), (64, 576, 7168), (300, 257, 384)])
def test_kernels_on_a_gpu(M, N, K):
    x, w = torch.randn(M, K).bfloat16(), torch.randn(N, K)
    for power_of_two in False, True:
        a, b = quantize_tiles(x.cuda(), power_of_two), quantize_blocks(w.cuda(), power_of_two)
        pairs = [(a, quantize_tiles(x, power_of_two)), (b, quantize_blocks(w, power_of_two))]
        for (codes, scales), (want_codes, want_scales) in pairs:
            assert torch.equal(codes.cpu().view(torch.uint8), want_codes.view(torch.uint8))
            assert torch.equal(scales.cpu(), want_scales)
        want = exact(*a) @ exact(*b).T
        # before a Blackwell 128 terms are summed in 14 bits: 1.2e-4 by hopper_sum, 1.3e-4 measured
        tol = 1e-6 if torch.cuda.get_device_capability()[0] >= 10 else 3e-4
        assert fp8.relative(fp8.fp8_gemm(*a, *b, torch.float32), want) <= tol
    layer = FP8Linear(K, N, bias=False).cuda()
    y = layer(x.cuda().requires_grad_())
    y.backward(torch.randn_like(y))
    assert layer.weight.grad.isfinite().all()


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
@pytest.mark.parametrize("config", SPECIALIZED, ids=lambda config: f"{config.consumers}-consumers")
@pytest.mark.parametrize(
    "M, N, K",
    [(1, 16, 16), (64, 128, 128), (200, 136, 384), (300, 257, 272), (1000, 1000, 1040)]
    + [(4096, 2112, 2048)],
)
def test_specialized_gemm_on_a_hopper(M, N, K, config):
    if torch.cuda.get_device_capability() != (9, 0):
        pytest.skip("no Hopper")
    a = quantize_tiles(torch.randn(M, K, device="cuda"))
    b = quantize_blocks(torch.randn(N, K, device="cuda"))
    want = exact(*a) @ exact(*b).T
    by_rows = a[0], a[1].contiguous()  # scales row after row in memory do as well
    for a_side in a, by_rows:
        for dtype, tol in (torch.float32, 3e-4), (torch.bfloat16, 3e-3):  # sums of 14 bits
            got = fp8.launch_gemm(*a_side, *b, dtype, config)
            assert got.dtype == dtype and got.shape == (M, N) and got.is_contiguous()
            assert fp8.relative(got, want) <= tol


# Layers --------------------------------------------------------------------------------------


@pytest.mark.parametrize("power_of_two", [False, True])
@pytest.mark.parametrize("blocks", [False, True])
@pytest.mark.parametrize("shape", [(7,), (200,), (2, 65)])
def test_layer_multiplies_codes_in_all_three_products(shape, blocks, power_of_two):
    N, K = 130, 150
    layer = FP8Linear(K, N, False, power_of_two=power_of_two, gradient_blocks=blocks)
    x = torch.randn(*shape, K).requires_grad_()
    y, dy = layer(x), torch.randn(*shape, N)
    y.backward(dy)
    rows, grads = x.detach().flatten(0, -2), dy.flatten(0, -2)
    w = exact(*quantize_blocks(layer.weight.detach(), power_of_two))
    x_tiles = exact(*quantize_tiles(rows, power_of_two))
    by = quantize_blocks if blocks else quantize_tiles
    x_along = exact(*quantize_tiles(x_tiles.float().T.contiguous(), power_of_two))
    dy_along = exact(*quantize_tiles(grads.T.contiguous(), power_of_two))
    pairs = [
        (y.flatten(0, -2), x_tiles @ w.T),
        (x.grad.flatten(0, -2), exact(*by(grads, power_of_two)) @ w),
    ]
    pairs.append((layer.weight.grad, dy_along @ x_along.T))
    for got, want in pairs:
        assert got.shape == want.shape and (got - want).abs().max() <= 1e-4


def test_layer_is_near_a_linear_layer():
    layer, plain = FP8Linear(256, 192), nn.Linear(256, 192)
    plain.load_state_dict(layer.state_dict())  # the same names
    x = torch.randn(300, 256)
    inputs = [x.clone().requires_grad_() for _ in "ab"]
    dy = torch.randn(300, 192)
    for module, one in zip((layer, plain), inputs, strict=True):
        module(one).backward(dy)
    pairs = [(inputs[0].grad, inputs[1].grad), (layer.weight.grad, plain.weight.grad)]
    pairs.append((layer(x), plain(x)))
    for got, want in pairs:
        assert F.cosine_similarity(got.flatten(), want.flatten(), 0) > 0.998
        assert 0.01 < fp8.relative(got, want) < 0.06  # quantised, and no more than that
    assert torch.equal(layer.bias.grad, plain.bias.grad)


@pytest.mark.parametrize("shape", [(0, 130), (2, 0, 130), (130,)], ids=str)
def test_layer_of_no_rows_or_of_a_vector(shape):
    layer, x = FP8Linear(130, 70), torch.randn(shape, requires_grad=True)
    y = layer(x)
    assert y.shape == nn.Linear(130, 70)(x).shape
    y.sum().backward()
    assert x.grad.shape == x.shape and layer.weight.grad.shape == (70, 130)
    if not x.numel():
        assert not layer.weight.grad.any()


def test_layer_under_autocast():
    layer = FP8Linear(128, 64, bias=False)
    with torch.autocast("cpu", torch.bfloat16):
        y = layer(torch.randn(4, 128))
    assert y.dtype == torch.bfloat16
    y.float().sum().backward()
    assert layer.weight.grad.dtype == torch.float32


def test_layer_refuses():
    with pytest.raises(ValueError, match=r"\(4, 100\), its last axis must be 128"):
        FP8Linear(128, 64)(torch.randn(4, 100))


@pytest.mark.parametrize("sizes", [[3, 0, 150, 1], [0, 0, 5, 0], [128, 128, 1, 0], [0, 0, 0, 0]])
@pytest.mark.parametrize("power_of_two", [False, True])
def test_grouped_is_each_expert_alone(sizes, power_of_two):
    weight = torch.randn(4, 130, 140).requires_grad_()
    x, dy = torch.randn(sum(sizes), 140).requires_grad_(), torch.randn(sum(sizes), 130)
    y = fp8.fp8_grouped_gemm(x, weight, torch.tensor(sizes), power_of_two)
    y.backward(dy)
    parts = zip(x.detach().split(sizes), dy.split(sizes), weight.detach(), range(4), strict=True)
    start = 0
    for rows, grads, w, e in parts:
        layer = FP8Linear(140, 130, False, power_of_two=power_of_two)
        layer.weight.data = w
        place = slice(start, start := start + len(rows))
        if len(rows) == 0:
            assert weight.grad[e].abs().max() == 0
            continue
        one = rows.clone().requires_grad_()
        want = layer(one)
        want.backward(grads)
        assert (y[place] - want).abs().max() <= 1e-4
        assert (x.grad[place] - one.grad).abs().max() <= 1e-4
        assert (weight.grad[e] - layer.weight.grad).abs().max() <= 1e-4


def test_grouped_backward_ignores_autocast():
    """Called within it, as in a user's own loop: products of bf16 would be off by 2^-9."""
    gradients = []
    weight, x = torch.randn(2, 64, 200), torch.randn(150, 200)
    sizes, dy = torch.tensor([100, 50]), torch.randn(150, 64)
    for inside in False, True:
        operands = x.clone().requires_grad_(), weight.clone().requires_grad_()
        y = fp8.fp8_grouped_gemm(*operands, sizes)
        with torch.autocast("cpu", torch.bfloat16, enabled=inside):
            y.backward(dy)
        gradients.append([t.grad for t in operands])
    assert all(torch.equal(a, b) for a, b in zip(*gradients, strict=True))


@pytest.mark.parametrize("quantize", [quantize_tiles, quantize_blocks])
def test_quantizers_refuse(quantize):
    with pytest.raises(ValueError, match=r"torch.int64 of \(2, 3\)"):
        quantize(torch.zeros(2, 3, dtype=torch.int64))
    with pytest.raises(ValueError, match=r"torch.float32 of \(7,\)"):
        quantize(torch.zeros(7))
    with pytest.raises(ValueError, match=r"want codes \(..., N, K\), got \(7,\)"):
        dequantize(torch.zeros(7).to(torch.float8_e4m3fn), torch.ones(1))


def test_grouped_refuses():
    with pytest.raises(ValueError, match=r"\(2,\) summing to 5"):
        fp8.fp8_grouped_gemm(torch.randn(6, 8), torch.randn(2, 4, 8), torch.tensor([2, 3]))


# The experiments -----------------------------------------------------------------------------


def test_hopper_sum():
    """By hand: 14 bits beside 2^13 hold whole numbers, and halves are cut."""
    a = torch.tensor([[2.0**13] + [0.5] * 31])
    b = torch.ones(1, 32)
    assert fp8.hopper_sum(a, b).item() == 2**13
    assert fp8.hopper_sum(a, b, bits=15).item() == 2**13 + 15.5
    a = torch.cat((a, torch.full((1, 96), 0.5), torch.full((1, 32), 0.5)), 1)
    b = torch.ones(1, 160)
    assert fp8.hopper_sum(a, b).item() == 2**13
    assert fp8.hopper_sum(a, b, promote=128).item() == 2**13 + 16


def test_a_large_product_cuts_what_was_summed_before_it():
    """32 ones, then 2^20: what lies below 2^20 / 2^13 = 128 is lost."""
    a = torch.tensor([[1.0] * 32 + [2.0**20] + [0.0] * 31])
    assert fp8.hopper_sum(a, torch.ones(1, 64)).item() == 2**20
    a[0, :32] = 5
    assert fp8.hopper_sum(a, torch.ones(1, 64)).item() == 2**20 + 128


def test_a_wide_sum_is_exact():
    a, b = torch.randn(5, 256), torch.randn(7, 256)
    want = a.double() @ b.double().T
    assert (fp8.hopper_sum(a, b, bits=40) - want).abs().max() <= 1e-8


# In 06 ---------------------------------------------------------------------------------------


def test_model_in_fp8():
    """Linears of MLA, FFN and experts; embedding, head, router, norms and kv_b_proj stay."""
    config = chapter.QUICK
    model, plain = chapter.DeepSeek(config, "fp8"), chapter.DeepSeek(config)
    plain.load_state_dict(model.state_dict())
    kinds = {n.rpartition(".")[2] for n, m in model.named_modules() if isinstance(m, FP8Linear)}
    assert kinds == {"q_proj", "kv_a_proj_with_mqa", "o_proj", "gate_proj", "up_proj", "down_proj"}
    grouped = [m.experts.grouped_gemm for m in model.mixtures() + model.mtp_mixtures()]
    assert set(grouped) == {fp8.fp8_grouped_gemm} and len(grouped) == 2
    rows = torch.randint(config.vocab_size, (2, 33))
    losses = []
    for one in model, plain:
        loss, further = one.train().losses(rows, 0.3)
        (loss + further).backward()
        losses.append(loss.item())
    assert 0 < abs(losses[0] / losses[1] - 1) < 1e-2
    gradients = [torch.cat([p.grad.flatten() for p in m.parameters()]) for m in (model, plain)]
    assert F.cosine_similarity(*gradients, 0) > 0.95


def test_precision_is_one_of_two():
    with pytest.raises(ValueError, match="bf16, fp8, not 'fp4'"):
        chapter.DeepSeek(chapter.QUICK, "fp4")


@pytest.mark.parametrize("which", ["weight", "input"])
def test_what_wants_no_gradient_gets_no_product(which, monkeypatch):
    layer, x = fp8.FP8Linear(64, 32, bias=False), torch.randn(5, 64, requires_grad=True)
    layer(x).sum().backward()
    want = x.grad if which == "weight" else layer.weight.grad
    x.grad = layer.weight.grad = None
    (layer.weight if which == "weight" else x).requires_grad_(False)
    products, gemm = [], fp8.fp8_gemm
    monkeypatch.setattr(fp8, "fp8_gemm", lambda *a, **k: products.append(1) or gemm(*a, **k))
    layer(x).sum().backward()
    assert len(products) == 2  # forward, and one of the two gradients
    assert torch.equal(x.grad if which == "weight" else layer.weight.grad, want)


def test_layer_with_a_bias_stays_in_its_input_s_dtype():
    layer = FP8Linear(130, 20)
    assert layer(torch.randn(3, 130).bfloat16()).dtype == torch.bfloat16


def test_grouped_under_autocast_is_in_its_dtype():
    x, weight, sizes = torch.randn(5, 130), torch.randn(2, 20, 130), torch.tensor([2, 3])
    with torch.autocast("cpu", torch.bfloat16):
        got = fp8.fp8_grouped_gemm(x, weight, sizes)
    want = fp8.fp8_grouped_gemm(x.bfloat16(), weight, sizes)
    assert got.dtype == torch.bfloat16 and torch.equal(got, want)


def test_no_second_derivative():
    x, layer = torch.randn(3, 130, requires_grad=True), FP8Linear(130, 20)
    with pytest.raises(RuntimeError, match="no second derivative"):
        torch.autograd.grad(layer(x).sum(), x, create_graph=True)


def test_grouped_sizes_below_zero_are_refused():
    with pytest.raises(ValueError, match="summing to 5"):
        fp8.fp8_grouped_gemm(torch.randn(5, 8), torch.randn(2, 4, 8), torch.tensor([7, -2]))
