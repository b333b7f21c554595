"""Keeps what ptxas says of each kernel (registers, shared memory, stack, spills) and turns it into a table.

kernel_report.py run NVCC ARGUMENTS...    the compiler launcher that CMake puts in front of nvcc: the report goes
                                          to OBJECT.ptxas instead of the terminal
kernel_report.py table OUT OBJECTS...     all reports as one C++ initializer list, for csrc/inspect.cpp
"""

import re
import subprocess
import sys
from pathlib import Path


def run(command: list[str]) -> int:
    """Runs the compiler with -Xptxas=-v in its arguments; returns its exit code."""
    result = subprocess.run(command, stderr=subprocess.PIPE, text=True)
    report: list[str] = []
    rest: list[str] = []
    for line in result.stderr.splitlines(keepends=True):
        is_report = line.startswith("ptxas info") or "bytes stack frame" in line
        (report if is_report else rest).append(line)
    sys.stderr.writelines(rest)
    if result.returncode == 0 and "-o" in command and (output := command[command.index("-o") + 1]).endswith(".o"):
        Path(f"{output}.ptxas").write_text("".join(report), encoding="utf-8")
    return result.returncode


def _bytes(pattern: str, line: str) -> int:
    match = re.search(rf"(\d+) {pattern}", line)
    return int(match.group(1)) if match else 0


def parse(report: str) -> list[dict[str, str | int]]:
    """One dict per kernel and architecture: name (mangled), arch ("sm_80"), registers, shared (static bytes a block),
    stack, spill_stores, spill_loads (bytes a thread)."""
    kernels: list[dict[str, str | int]] = []
    kernel: dict[str, str | int] | None = None
    properties = ""
    for line in report.splitlines():
        if match := re.search(r"Compiling entry function '(\S+)' for '(sm_\w+)'", line):
            kernel = {"name": match.group(1), "arch": match.group(2)}
            properties = ""
        elif match := re.search(r"Function properties for (\S+)", line):
            properties = match.group(1)
        elif kernel is not None and "bytes stack frame" in line and properties == kernel["name"]:
            kernel["stack"] = _bytes("bytes stack frame", line)
            kernel["spill_stores"] = _bytes("bytes spill stores", line)
            kernel["spill_loads"] = _bytes("bytes spill loads", line)
        elif kernel is not None and (match := re.search(r"Used (\d+) registers", line)):
            kernel["registers"] = int(match.group(1))
            kernel["shared"] = _bytes("bytes smem", line)
            kernels.append(kernel)
            kernel = None
    return kernels


def table(out: str, objects: list[str]) -> int:
    """Writes `{"name", "arch", registers, shared, stack, spill_stores, spill_loads},` lines to `out`."""
    rows = []
    for path in objects:
        log = Path(f"{path}.ptxas")
        for kernel in parse(log.read_text(encoding="utf-8")) if log.exists() else ():
            numbers = [
                str(kernel.get(key, 0)) for key in ("registers", "shared", "stack", "spill_stores", "spill_loads")
            ]
            rows.append(f'{{"{kernel["name"]}", "{kernel["arch"]}", {", ".join(numbers)}}},\n')
    Path(out).write_text("".join(rows), encoding="utf-8")
    return 0


if __name__ == "__main__":
    action, *arguments = sys.argv[1:]
    sys.exit(run(arguments) if action == "run" else table(arguments[0], arguments[1:]))
