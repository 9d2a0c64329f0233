# /// script
# requires-python = ">=3.11"
# dependencies = [
#   "torch>=2.11,<=2.13", "triton>=3.6; sys_platform == 'linux'", "matplotlib>=3.8", "numpy>=1.26",
# ]
# ///
r"""04 · FP8: eight bits a number, a scale for every 128 of them, and sums that stay in fp32.

An E4M3 number has three bits of mantissa: eight values from 1 up to 2, and none above 448. DeepSeek
multiplies V3's linear layers and experts in it, forward and backward (not gate, attention or output
head); in its trials with 16B and 230B the loss stayed within 0.25 % of bf16's [1]. Tensor cores are
twice as fast with it. Two things make that work: a scale that reaches no further than 128 numbers,
and sums that leave the tensor core before it rounds them.

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
    N, K  a weight's rows and columns     amax: the largest |x| of a tile or block
    E, T  experts, tiles along the tokens; in `value` S, E, M: bits of sign, exponent, mantissa

A released checkpoint calls its scales weight_scale_inv: despite the name, codes are multiplied by
them.

Run:  python 04_fp8_gemm.py [--bench]          6 s on two CPU cores
"""

import argparse
import math
import os
import statistics
import sys
import tempfile
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


# >>> copy: quantize_tiles, quantize_blocks, fp8_gemm, FP8Linear (needs torch, triton, tl, math)
from collections.abc import Callable
from functools import lru_cache, partial
from typing import NamedTuple

if triton is not None:
    from triton.tools.tensor_descriptor import TensorDescriptor

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
        """ROWS tiles of 1×128 below one another; x: (M, K), scales: (K/128, M) in memory."""
        row, tile = tl.program_id(0) * ROWS + tl.arange(0, ROWS), tl.program_id(1)
        column = tile * 128 + tl.arange(0, 128)
        inside = (row[:, None] < M) & (column[None, :] < K)
        place = row[:, None].to(tl.int64) * K + column[None, :]
        value = tl.load(x + place, mask=inside, other=0.0).to(tl.float32)  # (ROWS, 128)
        finite = tl.min((tl.abs(value) < float("inf")).to(tl.int32), 1) == 1  # False for NaN too
        scale = _scale_of(tl.max(tl.abs(value), 1), finite, POWER_OF_TWO)  # (ROWS,)
        tl.store(codes + place, _to_e4m3(value, scale[:, None], BY_HAND), mask=inside)
        tl.store(scales + tile.to(tl.int64) * M + row, scale, mask=row < M)

    @triton.jit
    def quantize_blocks_kernel(
        w, codes, scales, N, K, POWER_OF_TWO: tl.constexpr, BY_HAND: tl.constexpr
    ):
        """One block of 128×128; w: (E, N, K)."""
        expert = tl.program_id(2)
        row = tl.program_id(0) * 128 + tl.arange(0, 128)
        column = tl.program_id(1) * 128 + tl.arange(0, 128)
        inside = (row[:, None] < N) & (column[None, :] < K)
        place = (expert.to(tl.int64) * N + row[:, None]) * K + column[None, :]
        value = tl.load(w + place, mask=inside, other=0.0).to(tl.float32)  # (128, 128)
        finite = tl.min(tl.min((tl.abs(value) < float("inf")).to(tl.int32), 1), 0) == 1
        scale = _scale_of(tl.max(tl.max(tl.abs(value), 1), 0), finite, POWER_OF_TWO)  # ()
        tl.store(codes + place, _to_e4m3(value, scale, BY_HAND), mask=inside)
        block = expert * tl.num_programs(0) + tl.program_id(0)
        tl.store(scales + block * tl.num_programs(1) + tl.program_id(1), scale)

    # same as 03_moe_router.py
    @triton.jit
    def _tiles_up_to(ends, E, ROWS: tl.constexpr, EXPERTS: tl.constexpr):
        """Tiles of ROWS rows of the first expert, of the first two, …: (EXPERTS,)."""
        e = tl.arange(0, EXPERTS)
        end = tl.load(ends + e, mask=e < E, other=0)
        start = tl.load(ends + e - 1, mask=(e > 0) & (e < E), other=0)
        return tl.cumsum(tl.cdiv(end - start, ROWS), 0)

    @triton.jit
    def quantize_along_kernel(
        x, x_scales, codes, scales, ends, M, C, E, T, scale_m, scale_c, FROM_CODES: tl.constexpr,
        EXPERTS: tl.constexpr, POWER_OF_TWO: tl.constexpr, BY_HAND: tl.constexpr,
        COLUMNS: tl.constexpr,
    ):  # fmt: skip
        """128 rows of x (M, C) become a tile of 128 columns of codes (C, 128 T), scales (T, C)."""
        tile, c = tl.program_id(0), tl.program_id(1) * COLUMNS + tl.arange(0, COLUMNS)
        first, end = tile * 128, M
        if EXPERTS:
            up_to = _tiles_up_to(ends, E, 128, EXPERTS)
            expert = tl.minimum(tl.sum((up_to <= tile).to(tl.int32), 0), E)  # E: beyond the last
            before = tl.max(tl.where(up_to <= tile, up_to, 0), 0)
            start = tl.load(ends + expert - 1, mask=expert > 0, other=0)
            end = tl.load(ends + expert, mask=expert < E, other=0)
            first = start + (tile - before) * 128
        m = first + tl.arange(0, 128)
        inside = (m[:, None] < end) & (c[None, :] < C)
        place = m[:, None].to(tl.int64) * C + c[None, :]
        value = tl.load(x + place, mask=inside, other=0.0).to(tl.float32)  # (128, COLUMNS)
        if FROM_CODES:
            column = tl.program_id(1) * COLUMNS // 128 * scale_c
            at = x_scales + m.to(tl.int64) * scale_m + column
            value *= tl.load(at, mask=m < end, other=0.0)[:, None]
        finite = tl.min((tl.abs(value) < float("inf")).to(tl.int32), 0) == 1
        scale = _scale_of(tl.max(tl.abs(value), 0), finite, POWER_OF_TWO)  # (COLUMNS,)
        code = _to_e4m3(value, scale[None, :], BY_HAND)
        place = c[None, :].to(tl.int64) * T * 128 + (tile * 128 + tl.arange(0, 128))[:, None]
        tl.store(codes + place, code, mask=c[None, :] < C)
        tl.store(scales + tile.to(tl.int64) * C + c, scale, mask=c < C)

    @triton.jit
    def fp8_gemm_kernel(
        a, a_scales, b, b_scales, out, ends, M, N, K, E, a_m, a_k, b_n, b_k, out_m, out_n,
        A_BLOCKS: tl.constexpr, B_BLOCKS: tl.constexpr, EXPERTS: tl.constexpr,
        ALONG_K: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr, GROUP: tl.constexpr,
        TMA: tl.constexpr, FLATTEN: tl.constexpr,
    ):  # fmt: skip
        """Tiles (BM, BN) of out = a bᵀ, one after another: a program takes every num_programs-th.

        EXPERTS: rows of a (M, K) up to each of ends (E,) by a matrix of their own of b (E, N, K);
        ALONG_K: or by columns, an out (E, M, N) of each. a_m, …: strides of scales and of out.
        TMA: a and b are descriptors and not pointers. GROUP rows of tiles follow one another: their
        a, and the b that they share, stay in L2.
        """
        tiles_m, tiles_n, begin, end = tl.cdiv(M, BM), tl.cdiv(N, BN), 0, tl.cdiv(K, 128)
        tiles = tiles_m * tiles_n
        if EXPERTS:
            up_to = _tiles_up_to(ends, E, 128 if ALONG_K else BM, EXPERTS)
            tiles = tiles * E if ALONG_K else tl.max(up_to, 0) * tiles_n
        for tile in tl.range(tl.program_id(0), tiles, tl.num_programs(0), flatten=FLATTEN):
            expert, first_row, last_row, place = 0, 0, M, tile
            if ALONG_K:  # every expert has as many tiles, and sums over columns of its own
                expert, place = tile // (tiles_m * tiles_n), tile % (tiles_m * tiles_n)
                e = tl.arange(0, EXPERTS)
                begin = tl.sum(tl.where(e == expert - 1, up_to, 0), 0)
                end = tl.sum(tl.where(e == expert, up_to, 0), 0)
            elif EXPERTS:  # every expert has rows of its own, and tiles as many as they need
                expert = tl.sum((up_to * tiles_n <= tile).to(tl.int32), 0)
                place -= tl.max(tl.where(up_to * tiles_n <= tile, up_to, 0), 0) * tiles_n
                first_row = tl.load(ends + expert - 1, mask=expert > 0, other=0)
                last_row = tl.load(ends + expert)
                tiles_m = tl.cdiv(last_row - first_row, BM)
            top = place // (GROUP * tiles_n) * GROUP
            height = tl.minimum(tiles_m - top, GROUP)
            m0 = first_row + (top + place % (GROUP * tiles_n) % height) * BM
            n0 = place % (GROUP * tiles_n) // height * BN
            m, n, k = m0 + tl.arange(0, BM), n0 + tl.arange(0, BN), tl.arange(0, 128)
            b_expert = 0 if ALONG_K else expert
            b_scale_row = b_expert * (tl.cdiv(N, 128) if B_BLOCKS else N)
            a_scale_at = a_scales + (m // 128 if A_BLOCKS else m).to(tl.int64) * a_m
            b_scale_at = b_scales + (b_scale_row + (n // 128 if B_BLOCKS else n)) * b_n
            b_one_at = b_scales + (b_scale_row + n0 // 128) * b_n
            ONE: tl.constexpr = B_BLOCKS and 128 % BN == 0  # a scale for all columns of the tile
            if not TMA:
                a_at = a + m[:, None].to(tl.int64) * K + k[None, :]
                b_at = b + (b_expert * N + n)[None, :].to(tl.int64) * K + k[:, None]
            total = tl.zeros((BM, BN), tl.float32)
            for step in range(begin, end):
                if TMA:  # what is outside of the matrix comes as 0
                    x = a.load([m0, step * 128])
                    w = b.load([b_expert * N + n0, step * 128]).T
                else:
                    inside = k < K - step * 128
                    ours = (m[:, None] < last_row) & inside[None, :]
                    x = tl.load(a_at + step * 128, mask=ours, other=0.0)
                    ours = (n[None, :] < N) & inside[:, None]
                    w = tl.load(b_at + step * 128, mask=ours, other=0.0)
                a_scale = tl.load(a_scale_at + step * a_k, mask=m < last_row, other=0.0)
                part = tl.dot(x, w)  # a fresh one: carried on, a Hopper would sum in 14 bits
                if ONE:
                    total += part * (a_scale * tl.load(b_one_at + step * b_k))[:, None]
                else:
                    b_scale = tl.load(b_scale_at + step * b_k, mask=n < N, other=0.0)
                    total += part * a_scale[:, None] * b_scale[None, :]
            at = out + m[:, None].to(tl.int64) * out_m + n[None, :].to(tl.int64) * out_n
            if ALONG_K:
                at += expert.to(tl.int64) * M * N
            inside = (m[:, None] < last_row) & (n[None, :] < N)
            tl.store(at, total.to(out.dtype.element_ty), mask=inside)


# That kernel's warps do all in turn: load, multiply, scale. On a Hopper one warp can load for all,
# and of two or three groups of four warps one scales its sums while another has the tensor cores
# (--bench times both). Gluon is Triton with this left to us. The operands pass through a ring of
# buffers; full and empty are barriers, one of each for a stage.
#
#     producer    1 warp    for each 128 of K:  wait empty ─ TMA: a, b ─► full
#     consumer c  4 warps   for each 128 of K:  wait full ─ 4 wgmma ─► empty ─ scale, add
#                           rows 64 c to 64 c + 63 of a tile of (64 C, 128)
try:
    from triton.experimental import gluon
    from triton.experimental.gluon import language as gl
    from triton.experimental.gluon.language.nvidia.hopper import (
        fence_async_shared,
        mbarrier,
        tma,
        warpgroup_mma,
        warpgroup_mma_wait,
    )
    from triton.experimental.gluon.nvidia.hopper import TensorDescriptor as GluonDescriptor

    try:
        from triton.experimental.gluon.language.nvidia.hopper.tma import async_load, async_store
    except ImportError:  # Triton 3.6
        from triton.experimental.gluon.language.nvidia.hopper.tma import (
            async_copy_global_to_shared as async_load,
        )
        from triton.experimental.gluon.language.nvidia.hopper.tma import (
            async_copy_shared_to_global as async_store,
        )
except ImportError:  # no Triton, or one whose Gluon lacks some of it
    HAS_GLUON = False
else:
    HAS_GLUON = True

if HAS_GLUON:

    @gluon.jit
    def _place_of(tile, tiles_m, tiles_n):
        """8 rows of tiles follow one another, as GROUP rows do above."""
        top = tile // (8 * tiles_n) * 8
        height = gl.minimum(tiles_m - top, 8)
        inside = tile % (8 * tiles_n)
        return top + inside % height, inside // height

    @gluon.jit
    def _next(stage, phase, STAGES: gl.constexpr):
        """The next stage of the ring, and how often round: odd or even."""
        last = stage == STAGES - 1
        return gl.where(last, 0, stage + 1), gl.where(last, phase ^ 1, phase)

    @gluon.jit
    def _produce(loads, C: gl.constexpr, STAGES: gl.constexpr):
        """Fills the ring, tile after tile, as far ahead as it has stages."""
        a, b, shape, ring = loads
        tiles_m, tiles_n, steps = shape
        a_bufs, b_bufs, full, empty = ring
        stage, phase = gl.to_tensor(0), gl.to_tensor(0)
        for tile in range(gl.program_id(0), tiles_m * tiles_n, gl.num_programs(0)):
            tile_m, tile_n = _place_of(tile, tiles_m, tiles_n)
            for step in range(steps):
                mbarrier.wait(empty.index(stage), phase ^ 1)  # passes at once in the first round
                bar = full.index(stage)
                mbarrier.expect(bar, (64 * C + 128) * 128)  # zeros from beyond the edge count, too
                for c in gl.static_range(C):
                    at = [(tile_m * C + c) * 64, step * 128]
                    async_load(a, at, bar, a_bufs.index(stage * C + c))
                async_load(b, [tile_n * 128, step * 128], bar, b_bufs.index(stage))
                stage, phase = _next(stage, phase, STAGES)

    @gluon.jit
    def _multiply(ring, stage, phase, c: gl.constexpr, C: gl.constexpr, LAYOUT: gl.constexpr):
        """64 rows of a times 128 of b, once they are there, by wgmmas that nobody waits for yet."""
        a_bufs, b_bufs, full, _ = ring
        mbarrier.wait(full.index(stage), phase)
        x, w = a_bufs.index(stage * C + c), b_bufs.index(stage).permute((1, 0))
        zero = gl.zeros((64, 128), gl.float32, LAYOUT)  # a sum carried on would have 14 bits
        return warpgroup_mma(x, w, zero, use_acc=False, is_async=True)

    @gluon.jit
    def _load_scales(scales, m0, tile_n, step, ROWS: gl.constexpr):
        a_scales, b_scales, M, K, a_m, a_k, b_n, b_k = scales
        m, more = m0 + gl.arange(0, 64, layout=ROWS), step * 128 < K
        at = a_scales + m.to(gl.int64) * a_m + step * a_k
        a_scale = gl.load(at, mask=(m < M) & more, other=0.0)
        return a_scale, gl.load(b_scales + tile_n * b_n + step * b_k, mask=more, other=0.0)

    @gluon.jit
    def _consume(work, c: gl.constexpr, C: gl.constexpr, STAGES: gl.constexpr, ROUND: gl.constexpr):
        """Rows 64 c to 64 c + 63 of every tile, ROUND steps of 128 at a time."""
        LAYOUT: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, 128, 32])
        ROWS: gl.constexpr = gl.SliceLayout(1, LAYOUT)
        scales, out, out_bufs, shape, ring = work
        tiles_m, tiles_n, steps = shape
        _, _, _, empty = ring
        tiles, jump, out_buf = tiles_m * tiles_n, gl.num_programs(0), out_bufs.index(c)
        stage, phase = gl.to_tensor(0), gl.to_tensor(0)
        tile_m, tile_n = _place_of(gl.program_id(0), tiles_m, tiles_n)
        a_even, b_even = _load_scales(scales, (tile_m * C + c) * 64, tile_n, 0, ROWS)
        if ROUND == 2:
            a_odd, b_odd = _load_scales(scales, (tile_m * C + c) * 64, tile_n, 1, ROWS)
        for tile in range(gl.program_id(0), tiles, jump):
            # of the last tile there is none after it: any will do
            next_m, next_n = _place_of(gl.minimum(tile + jump, tiles - 1), tiles_m, tiles_n)
            total = gl.zeros((64, 128), gl.float32, LAYOUT)
            for step in range(0, steps, ROUND):
                even = _multiply(ring, stage, phase, c, C, LAYOUT)
                if ROUND == 2:  # in two sums: one is scaled while the other comes about
                    odd_stage, odd_phase = _next(stage, phase, STAGES)
                    odd = _multiply(ring, odd_stage, odd_phase, c, C, LAYOUT)
                # behind the wgmmas' back: the scales of the next round, or of the next tile's first
                last, even_scale = step + ROUND >= steps, a_even * b_even
                m0, n0 = gl.where(last, next_m, tile_m), gl.where(last, next_n, tile_n)
                k0 = gl.where(last, 0, step + ROUND)
                a_even, b_even = _load_scales(scales, (m0 * C + c) * 64, n0, k0, ROWS)
                if ROUND == 2:
                    odd_scale = a_odd * b_odd
                    a_odd, b_odd = _load_scales(scales, (m0 * C + c) * 64, n0, k0 + 1, ROWS)
                even = warpgroup_mma_wait(ROUND - 1, deps=(even,))
                mbarrier.arrive(empty.index(stage), count=1)
                total += even * even_scale[:, None]
                if ROUND == 2:
                    # total, too: lest the compiler have the tensor cores wait for its sum
                    odd, total = warpgroup_mma_wait(0, deps=(odd, total))
                    mbarrier.arrive(empty.index(odd_stage), count=1)
                    total += odd * odd_scale[:, None]
                    stage, phase = odd_stage, odd_phase
                stage, phase = _next(stage, phase, STAGES)
            tma.store_wait(0)  # the tile before this one has left the buffer
            out_buf.store(total.to(out.dtype))
            fence_async_shared()  # TMA will see it
            async_store(out, [(tile_m * C + c) * 64, tile_n * 128], out_buf)
            tile_m, tile_n = next_m, next_n
        tma.store_wait(0)

    @gluon.jit
    def specialized_gemm_kernel(
        a, a_scales, b, b_scales, out, M, N, K, a_m, a_k, b_n, b_k, C: gl.constexpr,
        STAGES: gl.constexpr,
    ):  # fmt: skip
        """out (M, N) = a bᵀ, a by tiles, b by blocks; a, b, out: descriptors. C consumers."""
        a_bufs = gl.allocate_shared_memory(a.dtype, [STAGES * C, 64, 128], a.layout)
        b_bufs = gl.allocate_shared_memory(b.dtype, [STAGES, 128, 128], b.layout)
        out_bufs = gl.allocate_shared_memory(out.dtype, [C, 64, 128], out.layout)
        full = gl.allocate_shared_memory(gl.int64, [STAGES, 1], mbarrier.MBarrierLayout())
        empty = gl.allocate_shared_memory(gl.int64, [STAGES, 1], mbarrier.MBarrierLayout())
        for stage in gl.static_range(STAGES):
            mbarrier.init(full.index(stage), count=1)
            mbarrier.init(empty.index(stage), count=C)
        fence_async_shared()  # TMA will see them initialised

        ROUND: gl.constexpr = 2 if C == 2 else 1  # two sums of each of three would spill
        # a step beyond the last, which makes a round whole, is all zeros
        shape = gl.cdiv(M, 64 * C), gl.cdiv(N, 128), gl.cdiv(K, 128 * ROUND) * ROUND
        scales = a_scales, b_scales, M, K, a_m, a_k, b_n, b_k
        ring = a_bufs, b_bufs, full, empty
        loads, work = (a, b, shape, ring), (scales, out, out_bufs, shape, ring)
        # then the warps and registers of all but the first, which has what they leave of 65,536
        if C == 2:
            gl.warp_specialize(
                [
                    (_consume, (work, 0, C, STAGES, ROUND)),
                    (_consume, (work, 1, C, STAGES, ROUND)),
                    (_produce, (loads, C, STAGES)),
                ],
                [4, 1],
                [240, 24],
            )
        else:
            gl.warp_specialize(
                [
                    (_consume, (work, 0, C, STAGES, ROUND)),
                    (_consume, (work, 1, C, STAGES, ROUND)),
                    (_consume, (work, 2, C, STAGES, ROUND)),
                    (_produce, (loads, C, STAGES)),
                ],
                [4, 4, 1],
                [160, 160, 24],
            )


class Config(NamedTuple):
    """How a product runs: its tile, the warps that multiply, and what moves the operands."""

    BM: int
    BN: int
    warps: int
    stages: int
    tma: bool = False  # descriptors, and no more programs than the GPU holds at a time
    each: int = 1  # of those, how many on an SM: one scales its sums while another multiplies
    flatten: bool = False  # the loads of a tile begin before the one before it is stored
    swap: bool = False  # outᵀ = b aᵀ: few rows are wgmma's free side, which may be as few as 8
    consumers: int = 0  # groups of 4 warps of `specialized_gemm_kernel`; 0: `fp8_gemm_kernel`


def gemm_configs(
    M: int, b_blocks: bool, grouped: bool, capability: tuple[int, int], a_tiles: bool = False
) -> list[Config]:
    """What may run, the first unless a timing says otherwise; the tests compile all of it for
    sm_89 to sm_120 and find nothing spilt. Larger tiles spill: two fp32 sums in registers."""
    if capability[0] not in (9, 10):  # 99 KB of shared memory, products by warps
        return [Config(64, 64, 4, 3)]
    three = b_blocks and capability[0] == 9  # more programs, fewer registers for each
    small = Config(64, 128, 4, 3, True, 3) if three else Config(64, 128, 4, 4, True, 2)
    pointers = Config(64, 128 if b_blocks else 64, 4, 3)  # for a K that is no multiple of 16 bytes
    if M <= 64 and not grouped:
        rows = max(16, 1 << (M - 1).bit_length())
        return [Config(64, rows, 4, 6, True, 2, swap=True), Config(64, rows, 4, 6, swap=True)]
    if grouped or not b_blocks:
        large = [Config(128, 128, 8, 4, tma=True)] if b_blocks else []
        return [*large, small, pointers]
    short = Config(64, 128, 4, 3, True, 2, flatten=True)  # a small K: to store takes as long
    may = [small, short, Config(128, 128, 8, 4, tma=True), Config(128, 128, 8, 3), pointers]
    if HAS_GLUON and a_tiles and M > 128 and capability == (9, 0):
        may[:0] = [Config(64 * C, 128, 4 * C, 5, tma=True, consumers=C) for C in (2, 3)]
    return may


# same as 01_attention.py
@lru_cache
def gpu(device: torch.device) -> tuple[tuple[int, int], int]:
    """Its compute capability and how many SMs it has, asked for once."""
    found = torch.cuda.get_device_properties(device)
    return (found.major, found.minor), found.multi_processor_count


def has_kernels(x: Tensor) -> bool:
    """Cards before sm_89 multiply no FP8, and Triton casts none for them."""
    return x.is_cuda and triton is not None and gpu(x.device)[0] >= (8, 9)


def launch_quantize(x: Tensor, blocks: bool, power_of_two: bool) -> tuple[Tensor, Tensor]:
    """`quantize_tiles` or `quantize_blocks` of x (..., M, K) by their kernels."""
    (*batch, M, K), T = x.shape, -(-x.shape[-1] // 128)
    x, rows = x.contiguous(), math.prod(batch) * M
    codes = torch.empty(x.shape, dtype=torch.float8_e4m3fn, device=x.device)
    # of tiles all first ones, then all second ones, …: as a product reads them
    shape = (*batch, -(-M // 128), T) if blocks else (T, rows)
    scales = torch.empty(shape, dtype=torch.float32, device=x.device)
    settings = power_of_two, not x.is_cuda  # Triton's interpreter has a cast that loses a carry
    with torch.cuda.device_of(x):  # Triton launches on the current GPU, whatever the operands say
        if blocks and codes.numel():
            grid = shape[-2], T, math.prod(batch)
            quantize_blocks_kernel[grid](x, codes, scales, M, K, *settings, num_warps=8)
        elif codes.numel():
            quantize_tiles_kernel[-(-rows // 32), T](x, codes, scales, rows, K, *settings, ROWS=32)
    return codes, scales if blocks else scales.T.view(*batch, M, T)


def launch_along(x: Tensor, x_scales: Tensor | None, ends: Tensor | None, power_of_two: bool):
    """`quantize_along` by its kernel."""
    (M, C), E = x.shape, 0 if ends is None else len(ends)
    T = -(-M // 128) if ends is None else M // 128 + E
    codes = torch.empty(C, 128 * T, dtype=torch.float8_e4m3fn, device=x.device)
    scales = torch.empty(T, C, dtype=torch.float32, device=x.device)
    strides = (0, 0) if x_scales is None else x_scales.stride()
    with torch.cuda.device_of(x):
        if codes.numel():
            quantize_along_kernel[T, -(-C // 64)](
                x.contiguous(), x_scales, codes, scales, ends, M, C, E, T, *strides,
                FROM_CODES=x_scales is not None, EXPERTS=E and triton.next_power_of_2(E),
                POWER_OF_TWO=power_of_two, BY_HAND=not x.is_cuda, COLUMNS=64, num_warps=4,
            )  # fmt: skip
    return codes, scales.T


def launch_gemm(
    a: Tensor, a_scales: Tensor, b: Tensor, b_scales: Tensor, out_dtype, config: Config,
    ends: Tensor | None = None, along_k: bool = False,
) -> Tensor:  # fmt: skip
    """`fp8_gemm`, or with ends `_gemm_by_rows` or (along_k) `_gemm_along_rows`, by its kernel."""
    if config.consumers and len(b):
        return launch_specialized(a, a_scales, b, b_scales, out_dtype, config)
    (M, K), N, E = a.shape, b.shape[-2], 0 if ends is None else len(ends)
    out = torch.empty(*((E,) if along_k else ()), M, N, dtype=out_dtype, device=a.device)
    if not out.numel():
        return out
    a, b, b_scales = a.contiguous(), b.contiguous().flatten(0, -2), b_scales.flatten(0, -2)
    sides, strides = [(a, a_scales), (b, b_scales)], out.stride()[-2:]
    if config.swap:
        sides, strides, M, N = sides[::-1], strides[::-1], N, M
    by_blocks = [scales.shape[-2] != len(codes) for codes, scales in sides]
    tiles = -(-M // config.BM) * -(-N // config.BN)
    if E:
        tiles = tiles * E if along_k else (M // config.BM + E) * -(-N // config.BN)  # at most
    if config.tma:
        boxes = zip(sides, ([config.BM, 128], [config.BN, 128]), strict=True)
        sides = [(TensorDescriptor.from_tensor(t, box), scales) for (t, scales), box in boxes]
        tiles = min(tiles, config.each * gpu(out.device)[1])
    (left, left_scales), (right, right_scales) = sides
    with torch.cuda.device_of(a):
        fp8_gemm_kernel[(tiles,)](
            left, left_scales, right, right_scales, out, ends, M, N, K, E,
            *left_scales.stride(), *right_scales.stride(), *strides, *by_blocks,
            EXPERTS=E and triton.next_power_of_2(E), ALONG_K=along_k, BM=config.BM, BN=config.BN,
            GROUP=8, TMA=config.tma, FLATTEN=config.flatten, num_warps=config.warps,
            num_stages=config.stages,
        )  # fmt: skip
    return out


def ring_stages(config: Config, out_dtype: torch.dtype) -> int:
    """As many as fit into 227 KB beside the tile of out, and no more than a config asks for."""
    out, stage = config.BM * config.BN * out_dtype.itemsize, (config.BM + config.BN) * 128
    return min(config.stages, (227 * 1024 - out) // stage)


def launch_specialized(
    a: Tensor, a_scales: Tensor, b: Tensor, b_scales: Tensor, out_dtype, config: Config
) -> Tensor:
    """`fp8_gemm` on a Hopper, a by tiles, b by blocks."""
    M, K, N = *a.shape, len(b)
    # TMA wants rows that begin at a multiple of 16 bytes
    out = torch.empty(M, -(-N // 16) * 16, dtype=out_dtype, device=a.device)[:, :N]
    boxes = [
        GluonDescriptor.from_tensor(t, [rows, 128], gl.NVMMASharedLayout(128, 8 * t.itemsize, 2))
        for t, rows in ((a.contiguous(), 64), (b.contiguous(), config.BN), (out, 64))
    ]
    tiles = -(-M // config.BM) * -(-N // config.BN)
    with torch.cuda.device_of(a):
        specialized_gemm_kernel[(min(tiles, gpu(a.device)[1]),)](
            boxes[0], a_scales, boxes[1], b_scales, boxes[2], M, N, K, *a_scales.stride(),
            *b_scales.stride(), C=config.consumers, STAGES=ring_stages(config, out_dtype),
            num_warps=4,
        )  # fmt: skip
    return out.contiguous()


@lru_cache
def tuned() -> dict[tuple, Config]:
    """The fastest for each kind of product that this process has timed."""
    return {}


def tuned_gemm(a, a_scales, b, b_scales, out_dtype, ends=None, along_k=False) -> Tensor:
    """`launch_gemm` by the fastest of `gemm_configs`, which the first product of its kind times;
    while a CUDA graph is recorded, by the first of them."""
    operands = a, a_scales, b, b_scales, out_dtype
    a_tiles, b_blocks = len(a_scales) == len(a), b_scales.shape[-2] != b.shape[-2]
    aligned = a.shape[1] % 16 == 0 < a.shape[1] and a.data_ptr() % 16 == b.data_ptr() % 16 == 0
    sizes = [(n - 1).bit_length() for n in a.shape]  # a power of two for all that round up to it
    key = a.device, *sizes, b.shape[:-1], a_tiles, b_blocks, out_dtype, aligned, along_k
    best = tuned().get(key)
    if best is None:
        may = gemm_configs(len(a), b_blocks, ends is not None, gpu(a.device)[0], a_tiles)
        may = [config for config in may if aligned or not config.tma]
        best = may[0]
        if len(may) > 1 and not torch.cuda.is_current_stream_capturing():
            run = [partial(launch_gemm, *operands, config, ends, along_k) for config in may]
            want = run[-1]()  # the plainest says what is right
            ms = [milliseconds(one, want) for one in run]
            if min(ms) == math.inf:  # NaN: nothing is said about any
                return want
            best = tuned()[key] = may[ms.index(min(ms))]
    return launch_gemm(*operands, best, ends, along_k)


# same as 03_moe_router.py
def milliseconds(run: Callable[[], Tensor], want: Tensor) -> float:
    """inf if it does not compile or gives another product: what was never seen on this GPU has to
    earn its place."""
    with torch.cuda.device_of(want):  # do_bench listens to the current GPU alone
        try:
            error = (run().float() - want.float()).norm()
        except (RuntimeError, triton.errors.TritonError):
            return math.inf
        right = error <= 1e-3 * want.float().norm()
        if not right:
            return math.inf
        return triton.testing.do_bench(run, warmup=5, rep=20, return_mode="median")


def _scales_of(amax: Tensor, power_of_two: bool) -> Tensor:
    """amax / 448 in fp32; power_of_two: the next one at or above it."""
    scales = amax.float().clamp(min=2.0**-100) / 448  # of a tile of zeros: anything but 0
    finite = scales.isfinite()
    if power_of_two:  # one step past the mantissa carries into the exponent, unless it is 0
        scales = ((scales.view(torch.int32) + 0x007FFFFF) & 0x7F800000).view(torch.float32)
    return torch.where(finite, scales, float("nan"))


def quantize_tiles(x: Tensor, power_of_two: bool = False) -> tuple[Tensor, Tensor]:
    """Activations by tiles of 1×128 along the last axis, which a product will contract (V3 §3.3.2).

    x: (..., M, K), any float -> codes (..., M, K) float8_e4m3fn, scales (..., M, ceil(K/128)) fp32
    (of a CUDA tensor, column after column in memory); x ≈ codes · scale. power_of_two: scales as
    UE8M0 holds them. A NaN or an infinity makes its whole tile NaN. DeepSeek's code treats amax
    below 1e-4 as 1e-4; gradients are often smaller.
    """
    if x.dim() < 2 or not x.is_floating_point():
        raise ValueError(f"want floats of (..., M, K), got {x.dtype} of {tuple(x.shape)}")
    if has_kernels(x):
        return launch_quantize(x, False, power_of_two)
    return _quantize_tiles(x, power_of_two)


# compiler.disable: inductor (2.11, 2.13) gets the last tile wrong where 128 does not divide K, even
# of a product in fp32
@torch.compiler.disable
@torch.no_grad()
def _quantize_tiles(x: Tensor, power_of_two: bool) -> tuple[Tensor, Tensor]:
    K = x.shape[-1]
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
    if has_kernels(w):
        return launch_quantize(w, True, power_of_two)
    return _quantize_blocks(w, power_of_two)


@torch.compiler.disable
@torch.no_grad()
def _quantize_blocks(w: Tensor, power_of_two: bool) -> tuple[Tensor, Tensor]:
    N, K = w.shape[-2:]
    padded = F.pad(w.float(), (0, -K % 128, 0, -N % 128))
    blocks = padded.unflatten(-1, (-1, 128)).unflatten(-3, (-1, 128))  # (…, N/128, 128, K/128, 128)
    scales = _scales_of(blocks.abs().amax((-3, -1)), power_of_two)  # (…, N/128, K/128)
    codes = (blocks / scales[..., :, None, :, None]).to(torch.float8_e4m3fn)
    return codes.flatten(-4, -3).flatten(-2)[..., :N, :K].contiguous(), scales


def quantize_along(
    x: Tensor, x_scales: Tensor | None = None, ends: Tensor | None = None, power_of_two=False
) -> tuple[Tensor, Tensor]:
    """A matrix by tiles of 128×1 and turned: what wgrad contracts are tokens (V3 §3.5.2).

    x: (M, C), floats, or codes by tiles with x_scales (M, ceil(C/128)), which take new scales ->
    codes (C, P), scales (C, P/128), P: M filled with zeros to whole tiles. ends: (E,) int32, M
    the last, the rows up to each expert's end: each begins a tile of its own, and P is
    128 (M // 128 + E), more or less of it unused. NaN as in quantize_tiles.
    """
    if x.dim() != 2 or (x_scales is None) == (x.dtype == torch.float8_e4m3fn):
        got = f"{x.dtype} of {tuple(x.shape)}, scales {x_scales is not None}"
        raise ValueError(f"want floats (M, C), or codes with their scales; got {got}")
    if has_kernels(x):
        return launch_along(x, x_scales, ends, power_of_two)
    values = x if x_scales is None else dequantize(x, x_scales)
    if ends is None:
        padded = F.pad(values, (0, 0, 0, -len(x) % 128))  # (P, C)
        return quantize_tiles(padded.T.contiguous(), power_of_two)
    sizes = ends.diff(prepend=ends.new_zeros(1))  # (E,)
    filled = (sizes + 127) // 128 * 128
    filling = (filled - sizes).cumsum(0) - (filled - sizes)  # (E,) that of the experts before
    slot = torch.arange(len(x), device=x.device) + filling.repeat_interleave(sizes)  # (M,)
    spread = values.new_zeros(128 * (len(x) // 128 + len(ends)), x.shape[1], dtype=torch.float32)
    spread[slot] = values.float()
    return quantize_tiles(spread.T.contiguous(), power_of_two)


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
    by_tiles = list(scales.shape) == tiles
    if not by_tiles and not scales.is_contiguous():  # a square one turned has the right shape
        got = tuple(scales.shape)
        raise ValueError(f"{name}: scales {got} by blocks must be contiguous, or are they turned?")
    return by_tiles


def dequantize(codes: Tensor, scales: Tensor) -> Tensor:
    """codes · scale in fp32, for what quantize_tiles or quantize_blocks made: (..., N, K)."""
    return _dequantize(codes, scales)


@torch.compiler.disable
def _dequantize(codes: Tensor, scales: Tensor) -> Tensor:
    if not _check("codes", codes, scales):
        scales = scales.repeat_interleave(128, -2)[..., : codes.shape[-2], :]
    if codes.device.type == "cpu":  # looked up, which is faster than a cast
        places = codes.view(torch.uint8).flatten().int()
        every = torch.arange(256, dtype=torch.uint8, device=codes.device)
        values = every.view(torch.float8_e4m3fn).float().index_select(0, places).view(codes.shape)
    else:
        values = codes.float()
    return values * scales.repeat_interleave(128, -1)[..., : codes.shape[-1]]


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
        return tuned_gemm(a, a_scales, b, b_scales, out_dtype)
    with torch.autocast(a.device.type, enabled=False):
        return F.linear(dequantize(a, a_scales), dequantize(b, b_scales)).to(out_dtype)


def _gemm_by_rows(a, a_scales, b, b_scales, ends: Tensor, out_dtype) -> Tensor:
    """Rows of a (M, K) up to each of ends (E,) times their own of b (E, N, K), turned -> (M, N)."""
    if has_kernels(a):
        return tuned_gemm(a, a_scales, b, b_scales, out_dtype, ends)
    sizes = ends.diff(prepend=ends.new_zeros(1)).tolist()
    pairs = zip(dequantize(a, a_scales).split(sizes), dequantize(b, b_scales), strict=True)
    with torch.autocast(a.device.type, enabled=False):
        return torch.cat([rows @ w.T for rows, w in pairs]).to(out_dtype)


def _gemm_along_rows(a, a_scales, b, b_scales, ends: Tensor, out_dtype) -> Tensor:
    """wgrad of each expert: a (M, P), b (N, P) by quantize_along with ends (E,) -> (E, M, N)."""
    if has_kernels(a):
        return tuned_gemm(a, a_scales, b, b_scales, out_dtype, ends, along_k=True)
    sizes = (ends.diff(prepend=ends.new_zeros(1)) + 127) // 128 * 128
    sizes = [*sizes.tolist(), a.shape[1] - int(sizes.sum())]  # the last: unused
    parts = (dequantize(*t).split(sizes, -1)[:-1] for t in ((a, a_scales), (b, b_scales)))
    with torch.autocast(a.device.type, enabled=False):
        return torch.stack([x @ y.T for x, y in zip(*parts, strict=True)]).to(out_dtype)


# same as 01_attention.py
def first_order(backward):
    """For a Function's backward: refuses create_graph, which asks for its own derivative too. Its
    steps are not recorded, and what depends on saved tensors alone would count as a constant."""

    def checked(ctx, *grads):
        if torch.is_grad_enabled():  # by create_graph
            raise RuntimeError("no second derivative of this: want create_graph=False")
        return backward(ctx, *grads)

    return checked


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
    @first_order
    def backward(ctx, dy):
        x_codes, x_scales, w_codes, w_scales = ctx.saved_tensors
        power_of_two, gradient_blocks = ctx.settings
        quantize = quantize_blocks if gradient_blocks else quantize_tiles
        dx = None
        if ctx.needs_input_grad[0]:
            w_turned = w_codes.T.contiguous(), w_scales.T.contiguous()
            dx = fp8_gemm(*quantize(dy, power_of_two), *w_turned, dy.dtype)
        if not ctx.needs_input_grad[1]:
            return dx, None, None, None
        dy_turned = quantize_along(dy, power_of_two=power_of_two)
        x_turned = quantize_along(x_codes, x_scales, power_of_two=power_of_two)
        dw = fp8_gemm(*dy_turned, *x_turned, torch.float32)
        return dx, dw.to(ctx.dtype), None, None


class _FP8Grouped(torch.autograd.Function):
    """The same for rows sorted by expert; along the tokens each expert's rows begin a new tile."""

    @staticmethod
    def forward(ctx, x, weight, ends, power_of_two):
        x_fp8, w_fp8 = quantize_tiles(x, power_of_two), quantize_blocks(weight, power_of_two)
        ctx.save_for_backward(*x_fp8, *w_fp8, ends)
        ctx.power_of_two, ctx.dtype = power_of_two, weight.dtype
        return _gemm_by_rows(*x_fp8, *w_fp8, ends, x.dtype)

    @staticmethod
    @first_order
    def backward(ctx, dy):
        x_codes, x_scales, w_codes, w_scales, ends = ctx.saved_tensors
        w_turned = w_codes.mT.contiguous(), w_scales.mT.contiguous()
        dx = _gemm_by_rows(*quantize_tiles(dy, ctx.power_of_two), *w_turned, ends, dy.dtype)
        if not ctx.needs_input_grad[1]:
            return dx, None, None, None
        dy_turned = quantize_along(dy, None, ends, ctx.power_of_two)
        x_turned = quantize_along(x_codes, x_scales, ends, ctx.power_of_two)
        dw = _gemm_along_rows(*dy_turned, *x_turned, ends, torch.float32)
        return dx, dw.to(ctx.dtype), None, None


def fp8_grouped_gemm(x: Tensor, weight: Tensor, sizes: Tensor, power_of_two=False) -> Tensor:
    """Each expert's rows times its own matrix, transposed, as `grouped_gemm` of chapter 03 in FP8.

    x: (M, A) rows sorted by expert, weight: (E, B, A), sizes: (E,) rows of each -> (M, B). Under
    autocast in its dtype. Gradients are FP8 products too, and re-tile each expert's own rows. That
    sizes sum to M is checked on a CPU; a GPU would have to be waited for.
    """
    shapes = len(sizes) == len(weight) and x.dim() == 2 and x.shape[-1] == weight.shape[-1]
    if not shapes or not sizes.is_cuda and (sizes.sum() != len(x) or (sizes < 0).any()):
        got = f"{tuple(x.shape)}, {tuple(weight.shape)}, sizes {tuple(sizes.shape)}"
        got += "" if sizes.is_cuda else f" summing to {sizes.sum()}"
        raise ValueError(f"want (M, A), (E, B, A), (E,) summing to M; got {got}")
    if torch.is_autocast_enabled(x.device.type):
        x = x.to(torch.get_autocast_dtype(x.device.type))
    ends = sizes.to(x.device).cumsum(0).to(torch.int32)
    return _FP8Grouped.apply(x, weight, ends, power_of_two)


class FP8Linear(nn.Linear):
    """nn.Linear with FP8 products; weight, its gradient and the optimizer see fp32 (V3 §3.3).

    x: (..., in_features) -> (..., out_features) in x's dtype, or autocast's. power_of_two: all
    scales are. gradient_blocks: dgrad takes dy by 128×128, with which a 16B model of DeepSeek's
    diverged (app. B.2). Compiled, it breaks the graph where there is no kernel for it.
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
        y = _FP8Product.apply(rows, self.weight, *self.settings)
        y = y.view(*x.shape[:-1], self.out_features)  # -1 could not be told of no rows
        return y if self.bias is None else y + self.bias.to(y.dtype)


# <<< copy
# %% 3. Is it right? -------------------------------------------------------------------------


def check(name: str, got: Tensor, want: Tensor, tol: float) -> None:
    """Print the worst absolute error beside its tolerance; stop the chapter if it is over."""
    if got.shape != want.shape:  # broadcasting would hide the difference
        raise SystemExit(
            f"check    {name}: got {tuple(got.shape)}, want {tuple(want.shape)}   WRONG"
        )
    error = (got.cpu().double() - want.cpu().double()).abs().max().item()
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
    M, N, K = 200, 144, 304
    layer = FP8Linear(K, N, bias=False).to(device)
    x = torch.randn(M, K, device=device).requires_grad_()
    y, dy = layer(x), torch.randn(M, N, device=device)
    y.backward(dy)
    exact = lambda operand: dequantize(*operand).double()
    w = exact(quantize_blocks(layer.weight.detach()))
    x_tiles, dy_tiles = exact(quantize_tiles(x.detach())), exact(quantize_tiles(dy))
    x_along = exact(quantize_tiles(x_tiles.float().T.contiguous()))
    dy_along = exact(quantize_tiles(dy.T.contiguous()))

    def tol(want: Tensor) -> float:
        """Sums of 300 terms of order 1, in fp32; of 128 of them in 14 bits on a Hopper or Ada."""
        narrow = has_kernels(x) and gpu(x.device)[0] < (10, 0)
        return 2**-11 * want.abs().max().item() if narrow else 1e-4

    for name, got, want in (
        ("forward = float64 product of the codes", y, x_tiles @ w.T),
        ("dgrad", x.grad, dy_tiles @ w),
        ("wgrad, re-tiled along the tokens", layer.weight.grad, dy_along @ x_along.T),
    ):
        check(name, got, want, tol(want))
    cosine = F.cosine_similarity(layer.weight.grad.flatten(), (dy.T @ x).flatten(), 0)
    measure("wgrad_cosine", cosine.item(), "with the gradient of fp32")
    sizes, weight = [90, 0, 110], torch.randn(3, N, K, device=device).requires_grad_()
    grouped = fp8_grouped_gemm(x, weight, torch.tensor(sizes, device=device))
    grouped.backward(dy)
    for e, rows in enumerate(
        zip(x.split(sizes), dy.split(sizes), grouped.split(sizes), strict=True)
    ):
        if sizes[e]:
            layer.weight.data, layer.weight.grad = weight.detach()[e], None
            alone = layer(rows[0])
            alone.backward(rows[1])
            check(f"expert {e}'s rows = a layer of its own", rows[2], alone, tol(alone))
            wgrad = layer.weight.grad
            check(f"expert {e}'s wgrad", weight.grad[e], wgrad, tol(wgrad))


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
    """a bᵀ, (M, K), (N, K), as [1] §3.5.2 describes an H800's FP8 tensor core: 32 products at a
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
    """Largest relative error against K, of positive products: each cut takes something off."""
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
        text = f"error of the rest, 4 channels x 31,623; x 1,000: {small:.3f}"
        measure(f"outliers_{name.replace(' ', '_')}", large, text)
    worst = {name: dict(curve)[4096] for name, curve in by_sum.items()}
    # of positive terms every cut takes something off, and no other gives it back
    text = "emulated, K = 4096, all terms positive   [1], random: 0.02"
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
    os.environ["MPLBACKEND"] = "Agg"  # a notebook hands down its own, which may be missing here
    from matplotlib import pyplot as plt

    figure, (left, right) = plt.subplots(1, 2, figsize=(11, 4.5), layout="constrained")
    for name, curve in by_outlier.items():
        left.loglog(*zip(*curve, strict=True), "o-", label=name)
    left.set(
        xlabel="size of 4 channels in 4,096 (the rest: 1)", ylabel="relative error of the rest"
    )
    left.set_title("An outlier costs all that share its scale: a tensor from 3,000 times")
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


# q_a and kv_a, q_b, kv_b, o of V3's attention; gate and up together, and down, of one expert
V3_SHAPES = (2112, 7168), (24576, 1536), (32768, 512), (7168, 16384), (4096, 7168), (7168, 2048)
PEAK = 1979e12  # FLOP/s of an H100 or H200 in FP8, by NVIDIA's sheet


def torch_scaled_mm(a: Tensor, b: Tensor, a_scales: Tensor, b_scales: Tensor) -> Tensor | None:
    """PyTorch's FP8 product, None where this build or GPU has no such one."""
    try:
        return torch._scaled_mm(a, b.T, a_scales, b_scales.T, out_dtype=torch.bfloat16)
    except (RuntimeError, ValueError):
        return None


def bench_products(device: torch.device) -> None:
    """The kernel beside bf16 and PyTorch's own FP8, V3's shapes, few rows and many."""
    ratios = []
    for M in 64, 128, 4096:
        for N, K in V3_SHAPES:
            x, w = torch.randn(M, K, device=device).bfloat16(), torch.randn(N, K, device=device)
            a, b, w = quantize_tiles(x), quantize_blocks(w), w.bfloat16()
            one = torch.ones(max(M, N), 1, device=device)
            tasks = {
                "fp8": lambda a=a, b=b: fp8_gemm(*a, *b),
                "and quantised": lambda x=x, b=b: fp8_gemm(*quantize_tiles(x), *b),
                "bf16": lambda x=x, w=w: x @ w.T,
                "torch by rows": partial(torch_scaled_mm, a[0], b[0], one[:M], one[:N]),
                "torch by blocks": partial(torch_scaled_mm, a[0], b[0], a[1], b[1]),
            }
            if M > 128 and gpu(device)[0] == (9, 0):
                plain = Config(64, 128, 4, 3, True, 3)
                tasks["fp8_gemm_kernel"] = partial(launch_gemm, *a, *b, torch.bfloat16, plain)
            known = {name: task for name, task in tasks.items() if task() is not None}
            # of few rows by CUDA graphs: what Python takes to launch it is longer than the product
            timer = triton.testing.do_bench if M > 128 else triton.testing.do_bench_cudagraph
            ms = {name: timer(task, rep=20, return_mode="median") for name, task in known.items()}
            flops, moved = 2e3 * M * N * K, 1e3 * (M * K + N * K + 2 * M * N)
            text = (
                f"TFLOP/s, {flops / ms['fp8'] / PEAK:.0%} of peak, {moved / ms['fp8'] / 1e9:,.0f}"
            )
            text += " GB/s; bf16 takes {:.2f}x".format(ms["bf16"] / ms["fp8"])
            rest = [name for name in ms if name not in ("fp8", "bf16")]
            text += "".join(f", {name} {ms[name] / ms['fp8']:.2f}x" for name in rest)
            measure(f"gemm_{M}x{N}x{K}", flops / ms["fp8"] / 1e12, text)
            ratios.append(ms["bf16"] / ms["fp8"])
    many = ratios[-len(V3_SHAPES) :]
    measure("gemm_speedup", math.prod(many) ** (1 / len(many)), "x bf16, geometric mean, M = 4096")
    M, (N, K) = 4096, V3_SHAPES[3]
    a = quantize_tiles(torch.randn(M, K, device=device))
    b = quantize_blocks(torch.randn(N, K, device=device))
    ms = triton.testing.do_bench_cudagraph(lambda: fp8_gemm(*a, *b), return_mode="median")
    text = f"TFLOP/s at {N} × {K}, M = {M}, one product after another, without a pause"
    measure("gemm_back_to_back", 2e3 * M * N * K / ms / 1e12, text)


def bench_layer(device: torch.device) -> None:
    """Forward and backward of a layer, quantised and turned as it goes, beside nn.Linear's."""
    M, N, K = (4096, 2048, 7168) if device.type == "cuda" else (2048, 512, 512)
    x = torch.randn(M, K, device=device).bfloat16().requires_grad_()
    kinds = {"bf16": nn.Linear, "fp8": FP8Linear}
    layers = {name: kind(K, N, bias=False, device=device) for name, kind in kinds.items()}

    def step(layer: nn.Linear) -> None:
        with torch.autocast(device.type, torch.bfloat16, cache_enabled=False):
            layer(x).float().sum().backward()

    times: dict[str, list[float]] = {name: [] for name in layers}
    for _ in range(10 if not has_kernels(x) else 3):
        for name, layer in layers.items():
            if has_kernels(x):
                step(layer)  # the first chooses its kernels, which can't be timed in a graph
                graphed = partial(triton.testing.do_bench_cudagraph, partial(step, layer))
                times[name].append(graphed(return_mode="median"))
            else:
                begin = time.perf_counter()
                step(layer)
                if device.type == "cuda":  # a card without FP8
                    torch.cuda.synchronize(device)
                times[name].append(1e3 * (time.perf_counter() - begin))
    ms = {name: statistics.median(values[1:]) for name, values in times.items()}
    measure("linear_bf16_ms", ms["bf16"], f"ms   {M} × {N} × {K}, forward and backward")
    kernels = "" if has_kernels(x) else "emulated: "
    measure("linear_fp8_ms", ms["fp8"], f"ms   {kernels}{ms['fp8'] / ms['bf16']:.1f}x the time")


# %% Exercises -------------------------------------------------------------------------------
# 1. Break it: take the scales for divisors, in `dequantize`. Which check stops the chapter? Then
#    transpose the scales of a square weight, .contiguous(): why can no check of shapes find that?
# 2. In `outliers` quantise to E5M2 instead (float8_e5m2, largest 57344; the tiles by hand, too:
#    `dequantize` knows E4M3 alone). Which curves of the left figure move, and where to?
#    Why does V3 take E4M3 for gradients too, where others take E5M2?
# 3. In hopper_sum, let the sum move on every 32, 256 and 1024. From which interval on is the error
#    small beside that of the codes (2.6 %), and what does a smaller interval cost a GPU?


def main() -> None:
    if hasattr(sys.stdout, "reconfigure"):  # a terminal may lack a character of a text
        sys.stdout.reconfigure(errors="replace")
    cli = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    default = "cuda" if torch.cuda.is_available() else "cpu"
    cli.add_argument("--device", default=default, help="cpu, cuda, cuda:1, … (%(default)s)")
    cli.add_argument("--seed", type=int, default=0, help="of weights and inputs (%(default)s)")
    cli.add_argument("--bench", action="store_true", help="also time it")
    cli.add_argument("--out", type=Path, default="runs", help="folder of the figure (%(default)s/)")
    args = cli.parse_args()
    if not 0 <= args.seed < 2**63:
        cli.error(f"--seed must be >= 0 and fit 63 bits, got {args.seed}")
    try:
        device = torch.device(args.device)
        torch.zeros(1, device=device).to(torch.float8_e4m3fn).float().item()
    except Exception as error:  # each backend raises a type of its own
        cli.exit(2, f"cannot run on --device {args.device}: {str(error).splitlines()[0][:100]}\n")
    try:
        args.out.mkdir(parents=True, exist_ok=True)
        tempfile.TemporaryFile(dir=args.out).close()
    except OSError as error:
        cli.error(f"--out {args.out}: {error.strerror}; want a folder that can be written to")
    if device.type == "cuda":
        torch.cuda.set_device(device.index or 0)  # graphs and timers are of the current one
    torch.manual_seed(args.seed)
    verify_format(device)
    verify_quantizers(device)
    verify_products(device)
    experiment(args.out / "04_fp8_gemm.png")
    if args.bench:
        if has_kernels(torch.empty(0, device=device)):
            bench_products(device)
        bench_layer(device)


if __name__ == "__main__":
    main()
