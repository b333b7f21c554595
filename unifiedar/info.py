"""What this installation has and can use: the command `unifiedar info`.

It answers, without running a kernel: which versions, which devices, whether the compiled library is there and what it
was built for, and for every operator which backends can be used on this machine, with the reason where one cannot.
"""

import argparse
import importlib
import importlib.util
import json
import os
import platform
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

import unifiedar
import unifiedar.ops
from unifiedar.ops import _native
from unifiedar.ops._op import BACKENDS, VARIABLE, registry

__all__ = ["collect", "kernel_report", "main"]

MINIMUM_CAPABILITY = (8, 0)
BLOCKS = (128, 256, 512)
NO_INSPECT = "needs the inspect module; in a checkout: UNIFIEDAR_INSPECT=1 pip install --no-build-isolation -e ."


def collect() -> dict[str, Any]:
    """Facts about this installation and machine, ready for JSON.

    Returns:
        versions: name -> version (None if not installed); devices: one dict each with type, name and, for a GPU,
        capability ("9.0") and memory (bytes); library: path, usable, reason and the recorded facts of its build;
        ops: operator -> backend -> None if usable on this machine, else the reason; on_request: operator -> backend
        -> why "auto" leaves it alone; forced: UNIFIEDAR_BACKEND, or None.
    """
    library = _library()
    no_gpu = _no_gpu()
    reasons = {
        "cuda": library["reason"] or no_gpu,
        "triton": _native.triton_missing() or (None if _native._interpreted() else no_gpu),
        "eager": None,
    }
    return {
        "versions": _versions(),
        "devices": _devices(),
        "library": library,
        "ops": {
            name: {backend.name: reasons[backend.name] for backend in op.backends} for name, op in registry.items()
        },
        "on_request": {
            name: {backend.name: backend.on_request for backend in op.backends if backend.on_request}
            for name, op in registry.items()
        },
        "forced": os.environ.get(VARIABLE) or None,
    }


def kernel_report() -> dict[str, Any]:
    """Build flags and the resources of every CUDA kernel in the compiled library, from the optional inspect module.

    Returns:
        flags: name -> value; kernels: one dict per kernel and architecture (name, symbol, arch, registers, shared,
        stack, spill_stores, spill_loads, max_threads, and occupancy: block size -> share of a multiprocessor's warps,
        0 to 1, with static shared memory only). Without the module both are empty and reason says how to get it.
    """
    try:
        inspect = importlib.import_module("unifiedar._inspect")
    except ImportError:
        return {"reason": NO_INSPECT, "flags": {}, "kernels": []}
    kernels = sorted(inspect.kernels(), key=lambda kernel: (kernel["name"], kernel["arch"]))
    for kernel in kernels:
        resources = kernel["arch"], kernel["registers"], kernel["shared"]
        kernel["occupancy"] = {threads: inspect.occupancy(*resources, threads)["share"] for threads in BLOCKS}
    return {"reason": None, "flags": inspect.flags(), "kernels": kernels}


def _versions() -> dict[str, str | None]:
    triton = importlib.import_module("triton").__version__ if importlib.util.find_spec("triton") else None
    return {
        "unifiedar": unifiedar.__version__,
        "python": platform.python_version(),
        "torch": torch.__version__,
        "triton": triton,
        "cuda": torch.version.cuda,
    }


def _devices() -> list[dict[str, Any]]:
    devices: list[dict[str, Any]] = [{"type": "cpu", "name": platform.machine(), "threads": torch.get_num_threads()}]
    for index in range(torch.cuda.device_count()):
        properties = torch.cuda.get_device_properties(index)
        devices.append(
            {
                "type": f"cuda:{index}",
                "name": properties.name,
                "capability": f"{properties.major}.{properties.minor}",
                "memory": properties.total_memory,
            }
        )
    return devices


def _library() -> dict[str, Any]:
    record = Path(unifiedar.__file__).with_name("_build.json")
    build = json.loads(record.read_text(encoding="utf-8")) if record.is_file() else {}
    build_reason = build.pop("reason", None)
    build.pop("library", None)
    present = _native.LIBRARY.is_file()
    reason = _native.library_missing()
    if reason and not present and build_reason:
        reason = f"{reason} ({build_reason})"
    return {"path": str(_native.LIBRARY) if present else None, "usable": reason is None, "reason": reason, **build}


def _no_gpu() -> str | None:
    """Why no GPU here can run our kernels; None if one can."""
    if torch.version.cuda is None:
        return "needs a GPU and a torch built with CUDA"
    if not torch.cuda.is_available():
        return "needs a GPU, and torch finds none"
    if all(torch.cuda.get_device_capability(i) < MINIMUM_CAPABILITY for i in range(torch.cuda.device_count())):
        return "needs a GPU of compute capability 8.0 or newer"
    return None


def _table(rows: Sequence[Sequence[str]], numbers_from: int) -> str:
    """Aligned columns; those from `numbers_from` on are right-aligned."""
    widths = [max(len(row[i]) for row in rows) for i in range(len(rows[0]))]
    lines = []
    for row in rows:
        cells = [
            cell.ljust(w) if i < numbers_from else cell.rjust(w)
            for i, (cell, w) in enumerate(zip(row, widths, strict=True))
        ]
        lines.append("  ".join(cells).rstrip())
    return "\n".join(lines)


def _text(facts: dict[str, Any]) -> str:
    versions, library = facts["versions"], facts["library"]
    lines = ["  ".join(f"{name} {version or '-'}" for name, version in versions.items())]
    for device in facts["devices"]:
        if device["type"] == "cpu":
            lines.append(f"device   cpu: {device['name']}, {device['threads']} threads")
        else:
            memory = f"{device['memory'] / 2**30:.0f} GiB"
            lines.append(f"device   {device['type']}: {device['name']}, capability {device['capability']}, {memory}")
    if library["path"]:
        built = f"{library.get('architectures', '?')}, CUDA {library.get('cuda', '?')}"
        lines.append(f"library  {library['path']} ({built})")
    if library["reason"]:
        lines.append(f"library  not usable: {library['reason']}")
    if facts["forced"]:
        lines.append(f"wanted   {VARIABLE}={facts['forced']} (by operators that have it)")

    reasons: list[str] = []
    backends = [name for name in BACKENDS if name != "auto"]
    rows = [["operator", *backends]]
    for name, by_backend in facts["ops"].items():
        row = [name]
        for backend in backends:
            if backend not in by_backend:
                row.append("-")
                continue
            reason, word = by_backend[backend], "no"
            if reason is None and backend in facts["on_request"][name]:
                reason, word = f"used where asked for by name: {facts['on_request'][name][backend]}", "asked"
            if reason is not None and reason not in reasons:
                reasons.append(reason)
            row.append("yes" if reason is None else f"{word} [{reasons.index(reason) + 1}]")
        rows.append(row)
    lines += ["", _table(rows, numbers_from=len(rows[0]))]
    lines += [f"[{number}] {reason}" for number, reason in enumerate(reasons, start=1)]
    return "\n".join(lines)


def _kernel_text(report: dict[str, Any]) -> str:
    if report["reason"]:
        return f"kernels  {report['reason']}"
    flags = "\n".join(f"{name:<15}{value}" for name, value in report["flags"].items())
    head = ["kernel", "arch", "registers", "shared B", "stack B", "spilled B", "max threads"]
    rows = [[*head, *(f"occ @{threads}" for threads in BLOCKS)]]
    for kernel in report["kernels"]:
        numbers = [kernel["registers"], kernel["shared"], kernel["stack"]]
        numbers += [kernel["spill_stores"] + kernel["spill_loads"], kernel["max_threads"]]
        shares = [f"{kernel['occupancy'][threads]:.0%}" for threads in BLOCKS]
        rows.append([kernel["name"], kernel["arch"], *map(str, numbers), *shares])
    return f"{flags}\n\n{_table(rows, numbers_from=2)}"


def main(argv: Sequence[str] | None = None) -> int:
    """Runs `unifiedar info`: prints the facts of `collect` as text or JSON.

    Args:
        argv: the arguments after `info`; None takes the process's own.

    Returns:
        The exit code, 0.
    """
    parser = argparse.ArgumentParser(
        prog="unifiedar info", description="Versions, devices, and which backends can be used here, with reasons."
    )
    parser.add_argument(
        "--kernels", action="store_true", help="also the registers, memory and occupancy of CUDA kernels"
    )
    parser.add_argument("--json", action="store_true", help="print one JSON object")
    arguments = parser.parse_args(argv)
    facts = collect()
    if arguments.kernels:
        facts["kernel_report"] = kernel_report()
    if arguments.json:
        print(json.dumps(facts, indent=2))
        return 0
    print(_text(facts))
    if arguments.kernels:
        print(f"\n{_kernel_text(facts['kernel_report'])}")
    return 0
