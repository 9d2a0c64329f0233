# /// script
# requires-python = ">=3.11"
# dependencies = [
#   "torch>=2.11,<=2.13", "triton>=3.6; sys_platform == 'linux'", "matplotlib>=3.8", "numpy>=1.26",
# ]
# ///
r"""04 · FP8: eight bits a number, a scale for every 128 of them, and sums that stay in fp32.

An E4M3 number has three bits of mantissa: eight values from 1 up to 2, and none above 448. DeepSeek
multiplies all of V3's large matrices in it, forward and backward, and its loss stays within 0.25 %
of bf16's [1], on tensor cores that are twice as fast with it. Two things make that work: a scale
that reaches no further than 128 numbers, and sums that leave the tensor core before it rounds them.

    x (M,K) ─ amax of 1×128   ─► scales (M, K/128)       ─┐
              x / scale       ─► codes (M,K), E4M3 ───────┤   each 128 of K: product of codes,
    W (N,K) ─ amax of 128×128 ─► scales (N/128, K/128)   ─┤   times both scales, added in fp32
              W / scale       ─► codes (N,K), E4M3 ───────┴─► y (M,N)

    value    (−1)^S · 2^(E−7) · (1 + M/8), E > 0;  (−1)^S · 2^−6 · M/8, E = 0;  E=15, M=7: NaN
    scale    s = amax / 448, so that the largest becomes the largest code         [1] §3.3.2
             or the next power of two above it (UE8M0)                            V3.1's files
    forward  y = x Wᵀ         x by 1×128 along K, W by 128×128                    [1] fig. 7a
    dgrad    dx = dy W        dy by 1×128 along N, W the same blocks
    wgrad    dW = dyᵀ x       both again, by 128×1 along the tokens               [1] §3.5.2
    sum      Σₖ in the tensor core for 128 of K, then in fp32 registers           [1] fig. 7b

    axis  here                            [1] DeepSeek-V3, arXiv:2412.19437
    M     tokens                          [2] FP8 formats, Micikevicius et al., arXiv:2209.05433
    N, K  a weight's rows and columns

In a released checkpoint scales are called weight_scale_inv, and are multipliers all the same.

Run:  python 04_fp8_gemm.py [--bench]          6 s on two CPU cores
"""

import argparse
import math
import statistics
import time
from pathlib import Path

import torch
from torch import Tensor, nn
from torch.nn import functional as F

try:
    import triton
    from triton import language as tl
except ImportError:  # macOS, Windows: the PyTorch twins do it all
    triton = tl = None

# %% 1. The format and the equations, word for word ------------------------------------------


def e4m3_value(code: int) -> float:
    """[2] table 1: one byte, S EEEE MMM. No infinity, and one NaN of either sign."""
    sign, exponent, mantissa = code >> 7, code >> 3 & 15, code & 7
    if exponent == 15 and mantissa == 7:
        return math.nan
    if exponent == 0:  # subnormal: evenly spaced down to 0
        size = 2**-6 * mantissa / 8
    else:
        size = 2 ** (exponent - 7) * (1 + mantissa / 8)
    return -size if sign else size


def e4m3_nearest(x: float) -> float:
    """The value nearest to x, |x| <= 448; of two the one with the even code."""
    best = min(range(127), key=lambda code: (abs(e4m3_value(code) - abs(x)), code % 2))
    return math.copysign(e4m3_value(best), x)


def quantize_reference(x: Tensor, rows: int, columns: int, power_of_two=False) -> Tensor:
    """x: (M, K) -> what x becomes on its way through E4M3, tiles of rows × columns, in float64."""
    out = torch.empty(x.shape, dtype=torch.float64)
    for top in range(0, x.shape[0], rows):
        for left in range(0, x.shape[1], columns):
            tile = x[top : top + rows, left : left + columns]
            scale = tile.abs().max().float() / 448  # fp32, as it is stored
            scale = scale.item() or 1.0
            if power_of_two:
                scale = 2.0 ** math.ceil(math.log2(scale))
            for i, row in enumerate(tile.tolist()):
                for j, value in enumerate(row):
                    quotient = torch.tensor(value).div(scale).item()  # in fp32
                    out[top + i, left + j] = e4m3_nearest(quotient) * scale
    return out


# %% 2. The piece ----------------------------------------------------------------------------
# A kernel for a CUDA tensor, and for any other its PyTorch twin: the very same codes and scales,
# and their product summed in fp32 in another order.


# >>> copy: quantize_tiles, quantize_blocks, fp8_gemm, FP8Linear (needs torch, triton, tl)
if triton is not None:

    @triton.jit
    def _to_e4m3(x, scale, BY_HAND: tl.constexpr):
        """x / scale as E4M3; BY_HAND: onto its grid first, where a cast is not to be trusted."""
        q = tl.math.div_rn(x, tl.broadcast_to(scale, x.shape))  # `/` is off by a bit or two
        if BY_HAND:
            exponent = tl.maximum(((q.to(tl.int32, bitcast=True) >> 23) & 255) - 127, -6)
            step = ((exponent - 3 + 127) << 23).to(tl.float32, bitcast=True)
            shift = step * 12582912.0  # 1.5 · 2^23: what is added to it loses all below a step
            grid = tl.minimum(tl.abs((q + shift) - shift), 448.0)
            sign = q.to(tl.int32, bitcast=True) & -2147483648
            q = (grid.to(tl.int32, bitcast=True) | sign).to(tl.float32, bitcast=True)
        return q.to(tl.float8e4nv)

    @triton.jit
    def _scale_of(amax, all_finite, POWER_OF_TWO: tl.constexpr):
        scale = tl.math.div_rn(tl.maximum(amax, 7.888609052210118e-31), 448.0)  # 2^-100
        if POWER_OF_TWO:
            bits = (scale.to(tl.int32, bitcast=True) + 0x007FFFFF) & 0x7F800000
            scale = bits.to(tl.float32, bitcast=True)
        return tl.where(all_finite, scale, float("nan"))

    @triton.jit
    def quantize_tiles_kernel(
        x, codes, scales, M, K, POWER_OF_TWO: tl.constexpr, BY_HAND: tl.constexpr,
        ROWS: tl.constexpr,
    ):  # fmt: skip
        """ROWS tiles of 1×128 below one another; x: (M, K)."""
        row, tile = tl.program_id(0) * ROWS + tl.arange(0, ROWS), tl.program_id(1)
        column = tile * 128 + tl.arange(0, 128)
        inside = (row[:, None] < M) & (column[None, :] < K)
        place = row[:, None].to(tl.int64) * K + column[None, :]
        value = tl.load(x + place, mask=inside, other=0.0).to(tl.float32)  # (ROWS, 128)
        finite = tl.min((tl.abs(value) < float("inf")).to(tl.int32), 1) == 1  # False for NaN too
        scale = _scale_of(tl.max(tl.abs(value), 1), finite, POWER_OF_TWO)  # (ROWS,)
        tl.store(codes + place, _to_e4m3(value, scale[:, None], BY_HAND), mask=inside)
        tl.store(scales + row.to(tl.int64) * tl.cdiv(K, 128) + tile, scale, mask=row < M)

    @triton.jit
    def quantize_blocks_kernel(
        w, codes, scales, N, K, POWER_OF_TWO: tl.constexpr, BY_HAND: tl.constexpr
    ):
        """One block of 128×128; w: (N, K)."""
        row = tl.program_id(0) * 128 + tl.arange(0, 128)
        column = tl.program_id(1) * 128 + tl.arange(0, 128)
        inside = (row[:, None] < N) & (column[None, :] < K)
        place = row[:, None].to(tl.int64) * K + column[None, :]
        value = tl.load(w + place, mask=inside, other=0.0).to(tl.float32)  # (128, 128)
        finite = tl.min(tl.min((tl.abs(value) < float("inf")).to(tl.int32), 1), 0) == 1
        scale = _scale_of(tl.max(tl.max(tl.abs(value), 1), 0), finite, POWER_OF_TWO)  # ()
        tl.store(codes + place, _to_e4m3(value, scale, BY_HAND), mask=inside)
        tl.store(scales + tl.program_id(0) * tl.cdiv(K, 128) + tl.program_id(1), scale)

    @triton.jit
    def fp8_gemm_kernel(
        a, a_scales, b, b_scales, out, M, N, K, A_BLOCKS: tl.constexpr, B_BLOCKS: tl.constexpr,
        BM: tl.constexpr, BN: tl.constexpr, GROUP: tl.constexpr,
    ):  # fmt: skip
        """One tile (BM, BN) of out = a bᵀ. GROUP rows of tiles follow one another: their a, and
        the b that they share, stay in L2."""
        pid, tiles_m, tiles_n = tl.program_id(0), tl.cdiv(M, BM), tl.cdiv(N, BN)
        first = pid // (GROUP * tiles_n) * GROUP
        height = tl.minimum(tiles_m - first, GROUP)
        m0 = (first + pid % (GROUP * tiles_n) % height) * BM
        n0 = pid % (GROUP * tiles_n) // height * BN
        m, n, k = m0 + tl.arange(0, BM), n0 + tl.arange(0, BN), tl.arange(0, 128)
        a_at = a + m[:, None].to(tl.int64) * K + k[None, :]
        b_at = b + n[None, :].to(tl.int64) * K + k[:, None]
        steps = tl.cdiv(K, 128)
        a_scale_at = a_scales + (m // 128 if A_BLOCKS else m).to(tl.int64) * steps
        ONE: tl.constexpr = B_BLOCKS and 128 % BN == 0  # one scale for all columns of the tile
        b_scale_at = b_scales + (n // 128 if B_BLOCKS else n).to(tl.int64) * steps
        b_one_at = b_scales + n0 // 128 * steps
        total = tl.zeros((BM, BN), tl.float32)
        for step in range(steps):
            inside = k < K - step * 128
            x = tl.load(a_at, mask=(m[:, None] < M) & inside[None, :], other=0.0)
            w = tl.load(b_at, mask=(n[None, :] < N) & inside[:, None], other=0.0)
            a_scale = tl.load(a_scale_at + step, mask=m < M, other=0.0)
            part = tl.dot(x, w)  # a fresh one: carried on, a Hopper would sum in 14 bits
            if ONE:
                total += part * (a_scale * tl.load(b_one_at + step))[:, None]
            else:
                b_scale = tl.load(b_scale_at + step, mask=n < N, other=0.0)
                total += part * a_scale[:, None] * b_scale[None, :]
            a_at += 128
            b_at += 128
        place = m[:, None].to(tl.int64) * N + n[None, :]
        inside = (m[:, None] < M) & (n[None, :] < N)
        tl.store(out + place, total.to(out.dtype.element_ty), mask=inside)


def has_kernels(x: Tensor) -> bool:
    """Cards before sm_89 multiply no FP8, and Triton casts none for them."""
    return x.is_cuda and triton is not None and torch.cuda.get_device_capability(x.device) >= (8, 9)


def gemm_config(M: int, b_blocks: bool, capability: tuple[int, int]) -> tuple[dict, dict]:
    """The tile, and how to launch it: none of these spills (the tests compile and look)."""
    if capability[0] not in (9, 10):  # 99 KB of shared memory, products by warps
        return {"BM": 64, "BN": 64, "GROUP": 8}, {"num_warps": 4, "num_stages": 3}
    if M > 64 and b_blocks:
        return {"BM": 128, "BN": 128, "GROUP": 8}, {"num_warps": 8, "num_stages": 3}
    # wgmma takes 64 rows at least; a scale for each column needs registers of its own
    return {"BM": 64, "BN": 128, "GROUP": 8}, {"num_warps": 4, "num_stages": 3}


def launch_quantize(x: Tensor, blocks: bool, power_of_two: bool) -> tuple[Tensor, Tensor]:
    """`quantize_tiles` or `quantize_blocks` of a matrix by their kernels."""
    (M, K), T = x.shape, -(-x.shape[1] // 128)
    codes = torch.empty(M, K, dtype=torch.float8_e4m3fn, device=x.device)
    scales = torch.empty(-(-M // 128) if blocks else M, T, dtype=torch.float32, device=x.device)
    by_hand = not x.is_cuda  # Triton's interpreter, whose cast loses a carry
    arguments = x.contiguous(), codes, scales, M, K, power_of_two, by_hand
    if blocks and codes.numel():
        quantize_blocks_kernel[(len(scales), T)](*arguments, num_warps=8)
    elif codes.numel():
        quantize_tiles_kernel[(-(-M // 32), T)](*arguments, ROWS=32)
    return codes, scales


def launch_gemm(a, a_scales, b, b_scales, out_dtype, config: tuple[dict, dict]) -> Tensor:
    """`fp8_gemm` by its kernel."""
    (M, K), N, (tile, launch) = a.shape, len(b), config
    out = torch.empty(M, N, dtype=out_dtype, device=a.device)
    by_blocks = [len(s) != len(x) for x, s in ((a, a_scales), (b, b_scales))]
    grid = (-(-M // tile["BM"]) * -(-N // tile["BN"]),)
    if out.numel():
        operands = a.contiguous(), a_scales, b.contiguous(), b_scales, out
        fp8_gemm_kernel[grid](*operands, M, N, K, *by_blocks, **tile, **launch)
    return out


def _scales_of(amax: Tensor, power_of_two: bool) -> Tensor:
    """amax / 448 in fp32; power_of_two: the next one at or above it."""
    scales = amax.float().clamp(min=2.0**-100) / 448  # of a tile of zeros: anything but 0
    finite = scales.isfinite()
    if power_of_two:  # one step past the mantissa carries into the exponent, unless it is 0
        scales = ((scales.view(torch.int32) + 0x007FFFFF) & 0x7F800000).view(torch.float32)
    return torch.where(finite, scales, float("nan"))


def quantize_tiles(x: Tensor, power_of_two: bool = False) -> tuple[Tensor, Tensor]:
    """Activations by tiles of 1×128 along the last axis, which a product will contract (V3 §3.3.2).

    x: (..., M, K), any float -> codes (..., M, K) float8_e4m3fn, scales (..., M, ceil(K/128)) fp32;
    x ≈ codes · scale. power_of_two: scales as UE8M0 holds them. A NaN or an infinity makes its
    whole tile NaN. DeepSeek's code treats amax below 1e-4 as 1e-4; gradients are often smaller.
    """
    if x.dim() < 2 or not x.is_floating_point():
        raise ValueError(f"want floats of (..., M, K), got {x.dtype} of {tuple(x.shape)}")
    K = x.shape[-1]
    if has_kernels(x):
        codes, scales = launch_quantize(x.reshape(-1, K), False, power_of_two)
        return codes.view(x.shape), scales.view(*x.shape[:-1], -(-K // 128))
    padded = F.pad(x.float(), (0, -K % 128)).unflatten(-1, (-1, 128))  # (..., K/128, 128)
    scales = _scales_of(padded.abs().amax(-1), power_of_two)
    codes = (padded / scales[..., None]).to(torch.float8_e4m3fn)
    return codes.flatten(-2)[..., :K].contiguous(), scales


def quantize_blocks(w: Tensor, power_of_two: bool = False) -> tuple[Tensor, Tensor]:
    """Weights by blocks of 128×128, ragged at the edges (V3 §3.3.2).

    w: (..., N, K) -> codes (..., N, K) float8_e4m3fn, scales (..., ceil(N/128), ceil(K/128)) fp32,
    which a released checkpoint keeps as weight_scale_inv. NaN as in quantize_tiles.
    """
    if w.dim() < 2 or not w.is_floating_point():
        raise ValueError(f"want floats of (..., N, K), got {w.dtype} of {tuple(w.shape)}")
    N, K = w.shape[-2:]
    if w.dim() == 2 and has_kernels(w):
        return launch_quantize(w, True, power_of_two)
    padded = F.pad(w.float(), (0, -K % 128, 0, -N % 128))
    blocks = padded.unflatten(-1, (-1, 128)).unflatten(-3, (-1, 128))  # (…, N/128, 128, K/128, 128)
    scales = _scales_of(blocks.abs().amax((-3, -1)), power_of_two)  # (…, N/128, K/128)
    codes = (blocks / scales[..., :, None, :, None]).to(torch.float8_e4m3fn)
    return codes.flatten(-4, -3).flatten(-2)[..., :N, :K].contiguous(), scales


def _check(name: str, codes: Tensor, scales: Tensor) -> bool:
    """True where scales (N, ceil(K/128)) are of tiles, False of blocks; ValueError of neither."""
    if codes.dtype != torch.float8_e4m3fn or scales.dtype != torch.float32:
        got = f"{codes.dtype}, {scales.dtype}"
        raise ValueError(f"{name}: want codes in float8_e4m3fn and fp32 scales, got {got}")
    if codes.dim() < 2:
        raise ValueError(f"{name}: want codes (..., N, K), got {tuple(codes.shape)}")
    *batch, N, K = codes.shape
    tiles, blocks = [*batch, N, -(-K // 128)], [*batch, -(-N // 128), -(-K // 128)]
    if list(scales.shape) not in (tiles, blocks):
        got = f"codes {tuple(codes.shape)} with scales {tuple(scales.shape)}"
        raise ValueError(f"{name}: {got}; tiles want {tuple(tiles)}, blocks {tuple(blocks)}")
    if not scales.is_contiguous():  # a square one that is transposed has the right shape
        raise ValueError(
            f"{name}: scales {tuple(scales.shape)} are a transposed view, not row-major"
        )
    return list(scales.shape) == tiles


def dequantize(codes: Tensor, scales: Tensor) -> Tensor:
    """codes · scale in fp32, for what quantize_tiles or quantize_blocks made: (..., N, K)."""
    if not _check("codes", codes, scales):
        scales = scales.repeat_interleave(128, -2)[..., : codes.shape[-2], :]
    return codes.float() * scales.repeat_interleave(128, -1)[..., : codes.shape[-1]]


def fp8_gemm(
    a: Tensor, a_scales: Tensor, b: Tensor, b_scales: Tensor, out_dtype=torch.bfloat16
) -> Tensor:
    """a bᵀ of two FP8 matrices, summed in fp32: (M, K), (N, K) -> (M, N).

    Either operand by tiles, (M, ceil(K/128)) scales, or by blocks, (ceil(M/128), ceil(K/128)).
    out_dtype: bf16 or fp32. ValueError gives the shapes that do not fit. Where there is no kernel
    (a CPU, a card older than sm_89) the twin multiplies what the codes stand for: it sums in
    another order, and nothing else differs.
    """
    for name, codes, scales in ("a", a, a_scales), ("b", b, b_scales):
        if codes.dim() != 2:
            raise ValueError(f"{name}: want a matrix, got {tuple(codes.shape)}")
        _check(name, codes, scales)
    if a.shape[1] != b.shape[1]:
        raise ValueError(f"K differs: a {tuple(a.shape)}, b {tuple(b.shape)}")
    if a.device != b.device:
        raise ValueError(f"a is on {a.device}, b on {b.device}")
    if has_kernels(a):
        b_blocks = len(b_scales) != len(b)
        config = gemm_config(len(a), b_blocks, torch.cuda.get_device_capability(a.device))
        return launch_gemm(a, a_scales, b, b_scales, out_dtype, config)
    with torch.autocast(a.device.type, enabled=False):
        return F.linear(dequantize(a, a_scales), dequantize(b, b_scales)).to(out_dtype)


class _FP8Product(torch.autograd.Function):
    """y = x wᵀ, all three products in FP8 (V3 §3.3.1): what is saved is FP8 too."""

    @staticmethod
    def forward(ctx, x, w, power_of_two, gradient_blocks):
        x_codes, x_scales = quantize_tiles(x, power_of_two)
        w_codes, w_scales = quantize_blocks(w, power_of_two)
        ctx.save_for_backward(x_codes, x_scales, w_codes, w_scales)
        ctx.settings, ctx.dtype = (power_of_two, gradient_blocks), w.dtype
        return fp8_gemm(x_codes, x_scales, w_codes, w_scales, x.dtype)

    @staticmethod
    def backward(ctx, dy):
        x_codes, x_scales, w_codes, w_scales = ctx.saved_tensors
        power_of_two, gradient_blocks = ctx.settings
        quantize = quantize_blocks if gradient_blocks else quantize_tiles
        w_turned = w_codes.T.contiguous(), w_scales.T.contiguous()
        dx = fp8_gemm(*quantize(dy, power_of_two), *w_turned, dy.dtype)
        # along the tokens: x goes back to fp32, is turned, and takes new scales
        x_turned = dequantize(x_codes, x_scales).T.contiguous()
        turned = (quantize_tiles(t, power_of_two) for t in (dy.T.contiguous(), x_turned))
        (dy_codes, dy_scales), (xt_codes, xt_scales) = turned
        dw = fp8_gemm(dy_codes, dy_scales, xt_codes, xt_scales, torch.float32)
        return dx, dw.to(ctx.dtype), None, None


class _FP8Grouped(torch.autograd.Function):
    """The same for rows sorted by expert; along the tokens each expert's rows begin a new tile."""

    @staticmethod
    def forward(ctx, x, weight, counts, power_of_two):
        x_fp8, w_fp8 = quantize_tiles(x, power_of_two), quantize_blocks(weight, power_of_two)
        ctx.save_for_backward(*x_fp8, *w_fp8)
        ctx.counts, ctx.power_of_two, ctx.dtype = counts, power_of_two, weight.dtype
        rows = dequantize(*x_fp8).split(counts)
        with torch.autocast(x.device.type, enabled=False):
            parts = [r @ w.T for r, w in zip(rows, dequantize(*w_fp8), strict=True)]
        return torch.cat(parts).to(x.dtype)

    @staticmethod
    def backward(ctx, dy):
        x_codes, x_scales, w_codes, w_scales = ctx.saved_tensors
        sizes = torch.tensor(ctx.counts)  # (E,)
        filled = (sizes + 127) // 128 * 128  # so that each expert has whole tiles of its own
        filling = (filled - sizes).cumsum(0) - (filled - sizes)  # (E,) that of the experts before
        slot = torch.arange(len(dy)) + filling.repeat_interleave(sizes)  # (M,)

        def along_tokens(t: Tensor) -> tuple[Tensor, ...]:  # (M, C) -> of each expert (C, rows)
            spread = t.new_zeros(int(filled.sum()), t.shape[1], dtype=torch.float32)
            spread[slot.to(t.device)] = t.float()
            codes = quantize_tiles(spread.T, ctx.power_of_two)
            return dequantize(*codes).split(filled.tolist(), -1)

        rows = dequantize(*quantize_tiles(dy, ctx.power_of_two)).split(ctx.counts)
        weight, x = dequantize(w_codes, w_scales), dequantize(x_codes, x_scales)
        with torch.autocast(dy.device.type, enabled=False):  # backward may be called within
            dx = torch.cat([r @ w for r, w in zip(rows, weight, strict=True)])
            dw = [g @ r.T for g, r in zip(along_tokens(dy), along_tokens(x), strict=True)]
        return dx.to(dy.dtype), torch.stack(dw).to(ctx.dtype), None, None


def fp8_grouped_gemm(x: Tensor, weight: Tensor, sizes: Tensor, power_of_two=False) -> Tensor:
    """Each expert's rows times its own matrix, transposed, as `grouped_gemm` of chapter 03 in FP8.

    x: (M, A) rows sorted by expert, weight: (E, B, A), sizes: (E,) rows of each -> (M, B). Under
    autocast in its dtype. Gradients are FP8 products too, and re-tile each expert's own rows. There
    is no kernel of it: on a GPU too, it multiplies in fp32 what the codes stand for.
    """
    counts = sizes.tolist()
    if len(counts) != len(weight) or sum(counts) != len(x) or x.shape[-1] != weight.shape[-1]:
        got = f"{tuple(x.shape)}, {tuple(weight.shape)}, sizes summing to {sum(counts)}"
        raise ValueError(f"want (M, A), (E, B, A), (E,) summing to M; got {got}")
    if torch.is_autocast_enabled(x.device.type):
        x = x.to(torch.get_autocast_dtype(x.device.type))
    return _FP8Grouped.apply(x, weight, counts, power_of_two)


class FP8Linear(nn.Linear):
    """nn.Linear with FP8 products; weight, its gradient and the optimizer see fp32 (V3 §3.3).

    x: (..., in_features) -> (..., out_features) in x's dtype, or autocast's. power_of_two: all
    scales are. gradient_blocks: dgrad takes dy by 128×128, with which a 16B model of DeepSeek's
    diverged (app. B.2).
    """

    def __init__(
        self, in_features: int, out_features: int, bias: bool = True, device=None, dtype=None,
        power_of_two: bool = False, gradient_blocks: bool = False,
    ):  # fmt: skip
        super().__init__(in_features, out_features, bias, device, dtype)
        self.settings = power_of_two, gradient_blocks

    def forward(self, x: Tensor) -> Tensor:
        if x.shape[-1] != self.in_features:
            raise ValueError(f"x is {tuple(x.shape)}, its last axis must be {self.in_features}")
        if torch.is_autocast_enabled(x.device.type):
            x = x.to(torch.get_autocast_dtype(x.device.type))
        rows = x.flatten(0, -2) if x.dim() > 1 else x[None]  # (M, K)
        y = _FP8Product.apply(rows, self.weight, *self.settings).view(*x.shape[:-1], -1)
        return y if self.bias is None else y + self.bias.to(y.dtype)


# <<< copy
# %% 3. Is it right? -------------------------------------------------------------------------


def check(name: str, got: Tensor, want: Tensor, tol: float) -> None:
    """Print the worst absolute error beside its tolerance; stop the chapter if it is over."""
    if got.shape != want.shape:  # broadcasting would hide the difference
        raise SystemExit(
            f"check    {name}: got {tuple(got.shape)}, want {tuple(want.shape)}   WRONG"
        )
    error = (got.double() - want.double()).abs().max().item()
    ok = error <= tol  # False for NaN too
    print(f"check    {name:<44} error {error:.1e}   tol {tol:.0e}   {'ok' if ok else 'WRONG'}")
    if not ok:
        raise SystemExit(1)


def measure(name: str, value: float, text: str = "") -> None:
    """Print one measured number: identifier, value, free text (unit, rival, paper's value)."""
    print(f"measure  {name:<44} {value:.5g} {text}".rstrip())


def verify_format(device: torch.device) -> None:
    """All 254 numbers of the format, then all of bf16's that it can hold."""
    codes = torch.tensor([code for code in range(256) if code % 128 != 127], dtype=torch.uint8)
    values = torch.tensor([e4m3_value(code) for code in codes.tolist()])
    cast = codes.to(device).view(torch.float8_e4m3fn).float().cpu()
    check("the 254 numbers of E4M3, from their bits", cast, values, 0)
    every = torch.arange(-(2**15), 2**15, dtype=torch.int32).to(torch.int16).view(torch.bfloat16)
    every = every[every.abs() <= 448].float()  # NaN is not
    gaps = (every.abs()[:, None] - values[values >= 0].unique()).abs()  # (bf16 numbers, 127)
    even = torch.arange(127) % 2
    nearest = gaps.min(-1).values[:, None]
    code = torch.where(gaps == nearest, even, 2).argmin(-1)  # of two as near, the even one
    want = values[values >= 0].unique()[code] * every.sign()
    got = every.to(device).to(torch.float8_e4m3fn).float().cpu()
    check(f"the cast of {len(every):,} bf16 numbers", got, want, 0)
    for name, dtype in ("e4m3", torch.float8_e4m3fn), ("e5m2", torch.float8_e5m2):
        info = torch.finfo(dtype)
        text = f"smallest normal {info.smallest_normal:.3g}, 1 + {info.eps} is the next after 1"
        measure(f"largest_{name}", info.max, text)


def verify_quantizers(device: torch.device) -> None:
    """Ragged at every edge, a tile of zeros among them, both kinds of scale."""
    x = torch.randn(3, 200) * torch.logspace(-3, 3, 200)
    w = torch.randn(130, 140) * torch.logspace(-2, 2, 140)
    x[1, :128], w[128:, 128:] = 0, 0
    for power_of_two, name in (False, "fp32 scales"), (True, "UE8M0 scales"):
        got = dequantize(*quantize_tiles(x.to(device), power_of_two)).cpu()
        want = quantize_reference(x, 1, 128, power_of_two).float()
        check(f"tiles = reference, {name}", got, want, 0)
        got = dequantize(*quantize_blocks(w.to(device), power_of_two)).cpu()
        want = quantize_reference(w, 128, 128, power_of_two).float()
        check(f"blocks = reference, {name}", got, want, 0)


def verify_products(device: torch.device) -> None:
    """Forward, dgrad and wgrad, each against the float64 product of what its codes stand for."""
    M, N, K = 200, 130, 300
    layer = FP8Linear(K, N, bias=False).to(device)
    x = torch.randn(M, K, device=device).requires_grad_()
    y, dy = layer(x), torch.randn(M, N, device=device)
    y.backward(dy)
    exact = lambda operand: dequantize(*operand).double()
    w = exact(quantize_blocks(layer.weight.detach()))
    x_tiles, dy_tiles = exact(quantize_tiles(x.detach())), exact(quantize_tiles(dy))
    x_along = exact(quantize_tiles(x_tiles.float().T.contiguous()))
    dy_along = exact(quantize_tiles(dy.T.contiguous()))
    fp32 = 1e-4  # sums of 300 terms of order 1, in fp32
    check("forward = float64 product of the codes", y, x_tiles @ w.T, fp32)
    check("dgrad", x.grad, dy_tiles @ w, fp32)
    check("wgrad, re-tiled along the tokens", layer.weight.grad, dy_along @ x_along.T, fp32)
    cosine = F.cosine_similarity(layer.weight.grad.flatten(), (dy.T @ x).flatten(), 0)
    measure("wgrad_cosine", cosine.item(), "with the gradient of fp32")


# %% 4. What does it buy? --------------------------------------------------------------------


def relative(got: Tensor, want: Tensor) -> float:
    """‖got − want‖ / ‖want‖"""
    return ((got.double() - want.double()).norm() / want.double().norm()).item()


def outliers() -> dict[str, list[tuple[float, float]]]:
    """Error of ordinary numbers while a few large ones share their scale: (size, error)."""
    x = torch.randn(256, 4096)
    large = torch.zeros(4096, dtype=torch.bool)
    large[torch.randperm(4096)[:4]] = True  # one channel in a thousand
    curves = {"scale a tensor": [], "scale a token": [], "scale a tile of 128": []}
    for size in 10.0 ** torch.arange(0, 5.5, 0.5):
        mixed = torch.where(large, x * size, x)
        for name, amax in (
            ("scale a tensor", mixed.abs().max()),
            ("scale a token", mixed.abs().amax(-1, keepdim=True)),
        ):
            back = (mixed / amax * 448).to(torch.float8_e4m3fn).float() * amax / 448
            curves[name].append((size.item(), relative(back[:, ~large], x[:, ~large])))
        back = dequantize(*quantize_tiles(mixed))
        curves["scale a tile of 128"].append((size.item(), relative(back[:, ~large], x[:, ~large])))
    return curves


def hopper_sum(a: Tensor, b: Tensor, promote: int | None = None, bits: int = 14) -> Tensor:
    """a bᵀ, (M, K), (N, K), as [1] §3.3.2 describes an H800's FP8 tensor core: 32 products at a
    time are shifted to the largest exponent among them and the sum so far, and cut to 14 bits.

    promote: every so many of K the sum moves on to fp32 and begins again at 0.
    """
    partial = torch.zeros(len(a), len(b), dtype=torch.float64)
    total = torch.zeros_like(partial)
    for k in range(0, a.shape[1], 32):
        products = a[:, None, k : k + 32].double() * b[None, :, k : k + 32].double()  # (M, N, 32)
        largest = torch.maximum(products.abs().amax(-1), partial.abs())
        step = torch.frexp(largest.clamp(min=1e-30)).exponent - bits
        unit = torch.ldexp(torch.ones_like(largest), step)  # what the last of the 14 bits counts
        cut = lambda t, unit: (t / unit).trunc() * unit
        partial = cut(partial, unit) + cut(products, unit[..., None]).sum(-1)
        if promote and (k + 32) % promote == 0:
            total, partial = (total + partial).float().double(), torch.zeros_like(partial)
    return total + partial


def accumulation() -> dict[str, list[tuple[int, float]]]:
    """Largest relative error against K, of products whose sum doesn't cancel."""
    curves = {"14 bits throughout": [], "to fp32 every 128": []}
    for K in 2 ** torch.arange(7, 14):
        a, b = (quantize_tiles(torch.rand(16, int(K)))[0].float() for _ in "ab")
        exact = a.double() @ b.double().T
        for name, promote in ("14 bits throughout", None), ("to fp32 every 128", 128):
            error = ((hopper_sum(a, b, promote) - exact).abs() / exact).max().item()
            curves[name].append((int(K), error))
    return curves


def experiment(out: Path) -> None:
    """Two reasons, two curves; then what is left of the error of a product."""
    by_outlier, by_sum = outliers(), accumulation()
    for name, curve in by_outlier.items():
        (_, small), (_, large) = curve[6], curve[9]
        text = f"error beside 31,623-fold channels; 1,000-fold: {small:.3f}"
        measure(f"outliers_{name.replace(' ', '_')}", large, text)
    worst = {name: dict(curve)[4096] for name, curve in by_sum.items()}
    text = "largest error, K = 4096, emulated   [1]: nearly 2 %"
    measure("sum_of_14_bits", worst["14 bits throughout"], text)
    measure("sum_promoted_every_128", worst["to fp32 every 128"], "the same, to fp32 every 128")
    a, b = torch.randn(256, 4096), torch.randn(512, 4096)
    got = fp8_gemm(*quantize_tiles(a), *quantize_blocks(b), torch.float32)
    want = (a.double() @ b.double().T).float()
    d = 1 - 2 * (got * want).sum() / (got.square() + want.square()).sum()
    measure("gemm_d_metric", d.item(), "1 − 2⟨x,y⟩/(‖x‖² + ‖y‖²), K = 4096   DeepGEMM: < 0.001")
    # 0.25 % is of a loss: what 3.7 % of noise, of either sign in every number, does to it
    measure("gemm_frobenius", relative(got, want), "‖error‖/‖product‖; [1]'s 0.25 % is of the loss")
    draw(by_outlier, by_sum, out)
    print(f"figure   {out}")


def draw(by_outlier: dict, by_sum: dict, out: Path) -> None:
    """Quantisation error against the size of outliers; error of a sum against its length."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot as plt

    figure, (left, right) = plt.subplots(1, 2, figsize=(11, 4.5), layout="constrained")
    for name, curve in by_outlier.items():
        left.loglog(*zip(*curve, strict=True), "o-", label=name)
    left.set(
        xlabel="size of 4 channels in 4,096 (the rest: 1)", ylabel="relative error of the rest"
    )
    left.set_title("Past 3,000 times, an outlier costs all that share its scale")
    left.legend()
    for name, curve in by_sum.items():
        right.loglog(*zip(*curve, strict=True), "o-", base=2, label=name)
    right.set_yscale("log")
    right.axhline(0.02, color="gray", ls="--", lw=0.8)
    right.annotate("[1]: nearly 2 % at K = 4096", (128, 0.021), va="bottom", color="gray")
    right.set(xlabel="K, terms of the sum", ylabel="largest relative error")
    right.set_title("A sum of 14 bits forgets small terms as it grows")
    right.legend()
    out.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(out, dpi=150)
    plt.close(figure)


# %% 5. How fast? ----------------------------------------------------------------------------


def bench(device: torch.device) -> None:
    """What the emulation costs: forward and backward of one layer, beside nn.Linear in bf16."""
    x = torch.randn(2048, 512, device=device).bfloat16()
    layers = {"bf16": nn.Linear(512, 512, bias=False), "fp8": FP8Linear(512, 512, bias=False)}
    times: dict[str, list[float]] = {name: [] for name in layers}
    for _ in range(10):
        for name, layer in layers.items():
            begin = time.perf_counter()
            with torch.autocast(device.type, torch.bfloat16):
                layer.to(device)(x).float().sum().backward()
            times[name].append(1e3 * (time.perf_counter() - begin))
    ms = {name: statistics.median(values[1:]) for name, values in times.items()}
    measure("linear_bf16_ms", ms["bf16"], "ms   2048 × 512 × 512, forward and backward")
    measure("linear_fp8_ms", ms["fp8"], f"ms   emulated: {ms['fp8'] / ms['bf16']:.1f}x the time")


# %% Exercises -------------------------------------------------------------------------------
# 1. Break it: read weight_scale_inv as a divisor. Which check stops the chapter? Then transpose the
#    scales of a square weight, .contiguous(): why can no check of shapes find that?
# 2. Quantise to E5M2 instead (largest 57344). Which curves of the left figure move, and where to?
#    Why does V3 take E4M3 for gradients too, where others take E5M2?
# 3. In hopper_sum, let the sum move on every 32, 256 and 1024. Where does the gain end, and what
#    does a smaller interval cost a GPU?


def main() -> None:
    cli = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    default = "cuda" if torch.cuda.is_available() else "cpu"
    cli.add_argument("--device", default=default, help="cpu, cuda, cuda:1, … (%(default)s)")
    cli.add_argument("--seed", type=int, default=0, help="of weights and inputs (%(default)s)")
    cli.add_argument("--bench", action="store_true", help="also what the emulation costs")
    cli.add_argument("--out", type=Path, default="runs", help="folder of the figure (%(default)s/)")
    args = cli.parse_args()
    try:
        device = torch.device(args.device)
        torch.zeros(1, device=device).to(torch.float8_e4m3fn).float().item()
    except Exception as error:  # each backend raises a type of its own
        cli.exit(2, f"cannot run on --device {args.device}: {str(error).splitlines()[0][:100]}\n")
    torch.manual_seed(args.seed)
    verify_format(device)
    verify_quantizers(device)
    verify_products(device)
    experiment(args.out / "04_fp8_gemm.png")
    if args.bench:
        bench(device)


if __name__ == "__main__":
    main()
