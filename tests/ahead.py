"""Compile a Triton kernel for a GPU that isn't there, and read what came out."""

import os
import re
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import NamedTuple

SHARED_LIMIT = {80: 163, 86: 99, 89: 99, 90: 227, 100: 227, 120: 99}  # KB a block may use


def interpret(source: str) -> None:
    """Run it in a process of its own, in the repository, by Triton's interpreter."""
    root = Path(__file__).resolve().parents[1]
    env = os.environ | {"TRITON_INTERPRET": "1", "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-c", source]
    done = subprocess.run(command, cwd=root, env=env, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr[-2000:]


class Compiled(NamedTuple):
    registers: int
    spilled: int  # bytes of stack and local memory
    shared: int  # bytes
    ptx: str
    sass: str


def compile_for(
    capability, kernel, types: dict, constants: dict, aligned=(), source=None, **options
) -> Compiled:
    """types: argument -> "*bf16", "i32", …, in order; constants: of those that a launch makes so (a
    stride of 1), then of the constexpr arguments, which follow. source: Gluon's, of such a kernel.
    """
    import triton
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    signature = types | dict.fromkeys(constants, "constexpr")
    names = list(signature)
    source = (source or ASTSource)(
        fn=kernel,
        signature=signature,
        constexprs={(names.index(name),): value for name, value in constants.items()},
        attrs={
            (names.index(name),): [["tt.divisibility", 16]]
            for name in aligned
            if name not in constants
        },
    )
    built = triton.compile(source, target=GPUTarget("cuda", capability, 32), options=options)
    tools = Path(triton.__file__).parent / "backends/nvidia/bin"
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(built.asm["cubin"])
        file.flush()

        def ask(*command: str) -> str:
            done = subprocess.run([*command, file.name], capture_output=True, text=True, check=True)
            return done.stdout

        usage = ask(str(tools / "cuobjdump"), "--dump-resource-usage")
        sass = ask(str(tools / "nvdisasm"), "-c")
    number = lambda name: int(re.search(rf"{name}:(\d+)", usage)[1])
    spilled = number("STACK") + number("LOCAL")
    return Compiled(number("REG"), spilled, built.metadata.shared, built.asm["ptx"], sass)


def compile_gemm(fp8, capability: int, config, a_blocks=False, b_blocks=True, out="bf16", group=""):
    """A kernel of 04's as `launch_gemm` would have it; group: "", "rows" or "along"."""
    kinds = [(config.BM, a_blocks), (config.BN, b_blocks)]
    if config.swap:
        kinds = [(config.BM, b_blocks), (config.BN, a_blocks)]
    codes = [f"tensordesc<fp8e4nv[{n},128]>" if config.tma else "*fp8e4nv" for n, _ in kinds]
    types = {"a": codes[0], "a_scales": "*fp32", "b": codes[1], "b_scales": "*fp32"}
    types |= {"out": f"*{out}", "ends": "*i32"}
    types |= dict.fromkeys(
        ("M", "N", "K", "E", "a_m", "a_k", "b_n", "b_k", "out_m", "out_n"), "i32"
    )
    ones = [("a_k" if kinds[0][1] else "a_m"), ("b_k" if kinds[1][1] else "b_n")]
    ones.append("out_m" if config.swap else "out_n")
    constants = dict.fromkeys(ones, 1) | ({} if group else {"ends": None})
    constants |= {"A_BLOCKS": kinds[0][1], "B_BLOCKS": kinds[1][1], "EXPERTS": 64 if group else 0}
    constants |= {"ALONG_K": group == "along", "BM": config.BM, "BN": config.BN, "GROUP": 8}
    constants |= {"TMA": config.tma, "FLATTEN": config.flatten}
    aligned = [name for name, kind in types.items() if kind[0] == "*"]
    aligned += ["N", "K", "out_m", "out_n", *(name for name in ("a_k", "b_n") if name not in ones)]
    launch = {"num_warps": config.warps, "num_stages": config.stages}
    return compile_for(capability, fp8.fp8_gemm_kernel, types, constants, aligned, **launch)


def shipped(fp8, capability: int):
    """Every kind of product and every config that it may run with on this GPU."""
    kinds = [(16, {}), (64, {"b_blocks": False}), (4096, {}), (4096, {"out": "fp32"})]
    kinds += [(4096, {"b_blocks": False, "out": "fp32"}), (4096, {"a_blocks": True})]
    kinds += [
        (4096, {"group": "rows"}),
        (4096, {"group": "along", "b_blocks": False, "out": "fp32"}),
    ]
    for rows, kind in kinds:
        grouped = "group" in kind
        limits = rows, kind.get("b_blocks", True), grouped, divmod(capability, 10)
        for config in fp8.gemm_configs(*limits):
            yield rows, kind, config


def compile_flash(
    attn, capability: int, which: str, D: int, V: int, kind="bf16", causal=True, S=4096
):
    """A kernel of 01's as `_FlashAttention.launch` would have it."""
    import triton

    width = 4 if kind == "fp32" else 2
    config = attn.flash_configs(D, V, width, divmod(capability, 10), S)[which]
    BM, BN, warps, stages = config
    kernel = getattr(attn, f"flash_{which}_kernel")
    pointers = {"forward": ("out", "lse"), "keys": ("do", "lse", "delta", "dk", "dv")}
    pointers["queries"] = ("do", "lse", "delta", "dq")
    names = ["q", "k", "v", *pointers[which]]
    types = {name: "*fp32" if name in ("lse", "delta") else f"*{kind}" for name in names}
    strides = "q_b", "q_h", "q_t", "k_b", "k_g", "k_s", "v_b", "v_g", "v_s"
    numbers = *strides, "G" if which == "keys" else "H", "PER_GROUP", "T", "S"
    types |= dict.fromkeys(numbers, "i32") | {"scale": "fp32"}
    types |= {} if which == "forward" else {"natural_scale": "fp32"}
    D1 = max(16, 1 << (D.bit_length() - 1))
    constants = {"CAUSAL": causal, "D": D, "V": V, "D1": D1}
    constants |= {"D2": 0 if D <= D1 else max(16, triton.next_power_of_2(D - D1))}
    constants |= {"VP": max(16, triton.next_power_of_2(V)), "BM": BM, "BN": BN}
    constants |= {"PRECISION": "ieee"}
    launch = {"num_warps": warps, "num_stages": stages}
    return compile_for(capability, kernel, types, constants, [*names, *strides], **launch)


def compile_decode(mla, capability: int, rows: int, kind="bf16", L=512, R=64, page=64):
    """The kernel of 02's as `launch_decode` would have it."""
    width = 4 if kind == "fp32" else 2
    config = mla.decode_config(rows, L, width, divmod(capability, 10), bool(page))
    BM, BN, warps, stages, parts, _ = config
    types = {"q": f"*{kind}", "entries": f"*{kind}", "out": "*fp32", "lse": "*fp32"}
    types |= {"lengths": "*i64", "pages": "*i32"}
    types |= dict.fromkeys(("q_b", "e_b", "e_s", "p_b", "ROWS", "T", "chunk"), "i32")
    types |= {"scale": "fp32"}
    constants = ({} if page else {"pages": None}) | {"PAGE": page, "L": L, "R": R, "PARTS": parts}
    constants |= {"LP": max(16, (1 << (L - 1).bit_length()) // parts)}
    constants |= {"RP": max(16, 1 << (R - 1).bit_length()), "BM": BM, "BN": BN, "PRECISION": "ieee"}
    aligned = [name for name, kind in types.items() if kind[0] == "*"]
    aligned += ["q_b", "e_b", "e_s", "chunk"]
    launch = {"num_warps": warps, "num_stages": stages}
    return compile_for(capability, mla.mla_decode_kernel, types, constants, aligned, **launch)


def compile_by_head(mla, capability: int, turned: bool, kind="bf16") -> Compiled:
    """The kernel of 02's as `by_head` would have it; turned: the weight's other axis is dense."""
    strides = [
        f"{t}_{axis}" for t, axes in (("x", "bht"), ("w", "hoi"), ("out", "bht")) for axis in axes
    ]
    types = dict.fromkeys(("x", "weight", "out"), f"*{kind}")
    types |= dict.fromkeys((*strides, "T", "O", "I"), "i32")
    one = "w_o" if turned else "w_i"
    constants = {one: 1, "T": 1, "BO": 32, "BI": 32}
    aligned = ["x", "weight", "out", "O", "I", *(name for name in strides if name != one)]
    return compile_for(capability, mla.by_head_kernel, types, constants, aligned)


def compile_grouped(
    moe, capability: int, which: str, config, kind="bf16", turned=False, gather=False
):
    """A kernel of 03's as `grouped_launches` would have it."""
    tile, warps, stages, by = config
    if by == "Gluon":
        return compile_grouped_hopper(moe, which, stages, kind, turned)
    tma = by == "TMA"
    numbers = dict.fromkeys(("N", "K", "E") if which == "rows" else ("N", "K"), "i32")
    constants = {} if gather else {"source": None}
    if which == "rows":
        BM, BN, BK = tile
        types = {"x": f"*{kind}", "weight": f"*{kind}", "out": f"*{kind}"}
        if tma:
            box = (BK, BN) if turned else (BN, BK)
            types["weight"] = f"tensordesc<{kind}[{box[0]},{box[1]}]>"
            types |= {} if gather else {"x": f"tensordesc<{kind}[{BM},{BK}]>"}
        constants |= {"EXPERTS": 64, "TURNED": turned, "TMA": tma}
        constants |= {"BM": BM, "BN": BN, "BK": BK, "GROUP": 8}
    else:
        types = {"grad": f"*{kind}", "x": f"*{kind}", "out": "*fp32"}
    types |= {"ends": "*i32", "source": "*i64"}
    if which == "weights":
        BN, BK, BR = tile
        boxes = [f"tensordesc<{kind}[{BR},{n}]>" for n in (BN, BK)] if tma else ["*i8"] * 2
        types |= dict(zip(("grad_box", "x_box"), boxes, strict=True))
        constants |= {} if tma else {"grad_box": None, "x_box": None}
        constants |= {"source": None} if tma else {}
        constants |= {"TMA": tma, "BN": BN, "BK": BK, "BR": BR}
    types |= numbers
    aligned = [name for name, kind in types.items() if kind[0] == "*"] + ["N", "K"]
    kernel = getattr(moe, f"grouped_{which}_kernel")
    launch = {"num_warps": warps, "num_stages": stages}
    return compile_for(capability, kernel, types, constants, aligned, **launch)


def compile_grouped_hopper(moe, which: str, stages: int, kind="bf16", turned=False, out=""):
    """The Gluon kernel of 03's as `launch_hopper` would have it; out: another dtype."""
    from triton.experimental.gluon._runtime import GluonASTSource

    weights, out = which == "weights", out or kind
    boxes = (64, 64), (64, 256) if weights or turned else (256, 64), (64, 256)
    swizzled = moe.gl.NVMMASharedLayout(128, 16, 2)
    a, b, box = (f"tensordesc<{kind}[{r},{c}],{swizzled!r}>" for r, c in boxes)
    types = {"a": a, "b": b, "out": f"*{out}", "out_box": box, "ends": "*i32"}
    types |= dict.fromkeys(("height", "N", "K", "E"), "i32")
    constants = {"WEIGHTS": weights, "TURNED": turned, "STAGES": stages + (out == "fp32")}
    constants |= {"out_box": None} if out == "fp32" else {}
    aligned, kernel = ["out", "ends", "height", "N", "K"], moe.grouped_hopper_kernel
    return compile_for(90, kernel, types, constants, aligned, GluonASTSource, num_warps=4)


def compile_specialized(fp8, config, out="bf16") -> Compiled:
    """The Gluon kernel of 04's as `launch_specialized` would have it."""
    import torch
    from triton.experimental.gluon import language as gl
    from triton.experimental.gluon._runtime import GluonASTSource

    dtype = torch.float32 if out == "fp32" else torch.bfloat16
    boxes = [("fp8e4nv", 64, 8), ("fp8e4nv", config.BN, 8), (out, 64, 8 * dtype.itemsize)]
    a, b, c = (
        f"tensordesc<{kind}[{rows},128],{gl.NVMMASharedLayout(128, bits, 2)!r}>"
        for kind, rows, bits in boxes
    )
    types = {"a": a, "a_scales": "*fp32", "b": b, "b_scales": "*fp32", "out": c}
    types |= dict.fromkeys(("M", "N", "K", "a_m", "a_k", "b_n", "b_k"), "i32")
    constants = {"a_m": 1, "b_k": 1, "C": config.consumers}
    constants |= {"STAGES": fp8.ring_stages(config, dtype)}
    aligned = "a_scales", "b_scales", "M", "N", "K", "a_k"
    kernel = fp8.specialized_gemm_kernel
    return compile_for(90, kernel, types, constants, aligned, GluonASTSource, num_warps=4)


def compile_hopper(mla, kind="bf16", split=False, page=0, T=1) -> Compiled:
    """The Gluon kernel of 02's as `launch_decode` would have it; split: into several chunks."""
    from triton.experimental.gluon._runtime import GluonASTSource

    swizzled = mla.gl.NVMMASharedLayout(128, 16, 2)
    wide, narrow = (f"tensordesc<{kind}[64,{n}],{swizzled!r}>" for n in (256, 64))
    types = {"q_wide": wide, "q_narrow": narrow, "e_wide": wide, "e_narrow": narrow}
    types |= {"out": "*fp32" if split else f"*{kind}", "lse": "*fp32", "lengths": "*i64"}
    types |= {"pages": "*i32" if page else "*i64"}
    types |= dict.fromkeys(("p_b", "e_rows", "ROWS", "T", "chunk"), "i32") | {"scale": "fp32"}
    constants = ({"T": 1} if T == 1 else {}) | {"PAGE": page}  # a launch makes a constant of T = 1
    aligned = ["out", "lse", "lengths", "pages", "e_rows", "ROWS", "chunk"]
    kernel = mla.mla_hopper_kernel
    return compile_for(90, kernel, types, constants, aligned, GluonASTSource, num_warps=4)


def compile_swiglu(moe, capability: int, kind="bf16") -> dict[str, Compiled]:
    """03's kernels between its products: forward, backward, combine."""
    names = {
        "swiglu": ("gate_up", "weights", "out"),
        "swiglu_backward": ("grad", "gate_up", "weights", "d_gate_up", "d_weights"),
    }
    built = {}
    for name, tensors in names.items():
        types, kernel = dict.fromkeys(tensors, f"*{kind}"), getattr(moe, f"{name}_kernel")
        aligned = [*tensors, "I"]
        built[name] = compile_for(
            capability, kernel, types | {"I": "i32"}, {"BLOCK": 2048}, aligned
        )
    types = {"rows": f"*{kind}", "rows_of_token": "*i64", "out": f"*{kind}", "D": "i32", "K": "i32"}
    aligned = ["rows", "rows_of_token", "out", "D"]
    built["combine"] = compile_for(capability, moe.combine_kernel, types, {"BLOCK": 1024}, aligned)
    return built


def compile_few(moe, capability: int, kind="bf16") -> dict[str, Compiled]:
    """03's kernels for a few rows: of one matrix, of the chosen experts, their first halves."""
    BO, BI, warps = moe.FEW
    blocks, options = {"BO": BO, "BI": BI}, {"num_warps": warps}
    tensors = dict.fromkeys(("x", "weight", "out"), f"*{kind}") | {"chosen": "*i64"}
    types, aligned = tensors | {"O": "i32", "I": "i32"}, [*tensors, "O", "I"]
    rows = moe.few_rows_kernel
    built = {
        name: compile_for(capability, rows, types, constants | blocks, aligned, **options)
        for name, constants in (
            ("one", {"chosen": None, "TOP": 1, "PAIR": False}),
            ("two", {"chosen": None, "TOP": 1, "PAIR": True}),
            ("chosen", {"TOP": 8, "PAIR": False}),
        )
    }
    tensors = dict.fromkeys(("x", "gate_up", "out"), f"*{kind}")
    tensors |= {"chosen": "*i64", "weights": "*fp32"}
    types, aligned = tensors | {"I": "i32", "D": "i32"}, [*tensors, "I", "D"]
    built["gate_up"] = compile_for(
        capability, moe.few_gate_up_kernel, types, {"TOP": 8} | blocks, aligned, **options
    )
    return built
