"""Compile a Triton kernel for a GPU that isn't there, and read what came out."""

import re
import subprocess
import tempfile
from pathlib import Path
from typing import NamedTuple

SHARED_LIMIT = {80: 163, 86: 99, 89: 99, 90: 227, 100: 227, 120: 99}  # KB a block may use


class Compiled(NamedTuple):
    registers: int
    spilled: int  # bytes of stack and local memory
    shared: int  # bytes
    ptx: str
    sass: str


def compile_for(
    capability, kernel, types: dict, constants: dict, aligned=(), **options
) -> Compiled:
    """types: argument -> "*bf16", "i32", …; constants: of the constexpr arguments, which follow."""
    import triton
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    signature = types | dict.fromkeys(constants, "constexpr")
    names = list(signature)
    source = ASTSource(
        fn=kernel,
        signature=signature,
        constexprs={(names.index(name),): value for name, value in constants.items()},
        attrs={(names.index(name),): [["tt.divisibility", 16]] for name in aligned},
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
