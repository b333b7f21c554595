"""Every Triton kernel compiles to machine code for sm_80 and sm_90, without a GPU, and fits there.

A family's file lists what to compile as COMPILE_CASES: (kernel, signature, constexprs, options[, divisors[, archs]])
with signature a dict of argument name -> type ("*fp32", "i32", "constexpr"), constexprs a dict of argument name ->
value, options Triton's (num_warps, num_stages), divisors a dict of argument name -> what its value (or address) is a
multiple of, as a launch would find out, and archs those that the options are for, by default both. A case with divisors
must load 16 bytes at a time, and a matrix product of half precision must use wgmma on sm_90. It all runs in a process
of its own, because this one may hold interpreted kernels.
"""

import importlib
import json
import os
import re
import subprocess
import sys
import tempfile
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
FAMILIES = sorted(path.stem for path in (ROOT / "kernels").glob("[!_]*.py"))
PRODUCT = re.compile(r"tt\.dot .* : tensor<\w+xb?f16>")  # of half precision, in Triton's language
PACK = re.compile(r"ld\.global\S*\.v4\.b32|cp\.async\.cg\S* [^;]*, 0x10, ")  # a load of 16 bytes, in PTX
SHARED_LIMIT = {80: 163 * 1024, 90: 227 * 1024}  # bytes a block may have


def resources(cubin: bytes) -> dict[str, int]:
    """What cuobjdump, which comes with Triton, says of the one kernel in a cubin: REG, STACK, LOCAL, ..."""
    import triton

    cuobjdump = Path(triton.__file__).parent / "backends/nvidia/bin/cuobjdump"
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        command = [str(cuobjdump), "--dump-resource-usage", file.name]
        text = subprocess.run(command, check=True, capture_output=True, text=True).stdout
    usage = next(line for line in text.splitlines() if "REG:" in line)
    return {key: int(value) for key, value in (item.rsplit(":", 1) for item in usage.split())}


def compile_family(family: str) -> dict[str, object]:
    """Compiles a family's cases for every architecture; returns facts ready for JSON."""
    import triton
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource
    from triton.runtime import JITFunction

    module = importlib.import_module(f"unifiedar.kernels.{family}")
    results = []
    for kernel, signature, constexprs, options, *rest in module.COMPILE_CASES:
        divisors = rest[0] if rest else {}
        attributes = {(kernel.arg_names.index(name),): [["tt.divisibility", n]] for name, n in divisors.items()}
        for arch in rest[1] if len(rest) > 1 else SHARED_LIMIT:
            source = ASTSource(fn=kernel, signature=signature, constexprs=constexprs, attrs=attributes)
            compiled = triton.compile(source, target=GPUTarget("cuda", arch, 32), options=options)
            cubin = compiled.asm["cubin"]
            facts = {"kernel": kernel.__name__, "constexprs": str(constexprs), "arch": arch, "cubin": len(cubin)}
            results.append(
                {
                    **facts,
                    "shared": compiled.metadata.shared,
                    "target": f".target sm_{arch}" in compiled.asm["ptx"],
                    "divisors": divisors,
                    "packs": PACK.search(compiled.asm["ptx"]) is not None,
                    "product": PRODUCT.search(compiled.asm["ttir"]) is not None,
                    "wgmma": "wgmma.mma_async" in compiled.asm["ptx"],
                    **resources(cubin),
                }
            )
    written = [
        name for name, value in vars(module).items() if isinstance(value, JITFunction) and name.endswith("_kernel")
    ]
    return {"results": results, "written": written}


@pytest.mark.parametrize("family", FAMILIES)
def test_kernels_compile_for_sm_80_and_sm_90(family, tmp_path):
    pytest.importorskip("triton")
    environment = {key: value for key, value in os.environ.items() if key != "TRITON_INTERPRET"}
    environment["TRITON_CACHE_DIR"] = str(tmp_path)  # compile here and now, whatever was compiled before
    command = [sys.executable, __file__, family]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=600)
    assert done.returncode == 0, done.stderr
    facts = json.loads(done.stdout.splitlines()[-1])
    assert {result["kernel"] for result in facts["results"]} == set(facts["written"]), (
        "COMPILE_CASES must name every kernel"
    )
    for result in facts["results"]:
        assert result["cubin"] > 0
        assert result["target"], f"compiled for another architecture: {result}"
        assert result["shared"] <= SHARED_LIMIT[result["arch"]], f"too much shared memory: {result}"
        assert result["packs"] or not result["divisors"], f"loads less than 16 bytes at a time: {result}"
        assert result["wgmma"] or not (result["product"] and result["arch"] == 90), (
            f"not Hopper's matrix products: {result}"
        )
        assert result["STACK"] == 0, f"spills, or indexes registers: {result}"
        assert result["LOCAL"] == 0, f"spills, or indexes registers: {result}"


def test_there_are_kernels_to_compile():
    assert FAMILIES


if __name__ == "__main__":
    print(json.dumps(compile_family(sys.argv[1])))
