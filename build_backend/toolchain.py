"""What this machine can build, and how that is written: the facts behind the build backend and setup.py.

Only the standard library is imported here, because everything else may be missing when a build starts.

UNIFIEDAR_BUILD       auto (default): the CUDA library where nvcc is found, else pure Python;
                      cuda: the CUDA library or an error; none: pure Python
UNIFIEDAR_INSPECT     1: also the pybind11 module behind `unifiedar info --kernels`, tied to this Python
UNIFIEDAR_WATCHDOG    1: for debugging: a kernel whose blocks wait for each other for more than about a second ends with
                      an error instead of hanging
TORCH_CUDA_ARCH_LIST  architectures as torch's own extensions read them, e.g. "8.0;9.0a+PTX"
MAX_JOBS              parallel compilations
"""

import importlib.util
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

CUDA_HOME_FALLBACK = Path("/usr/local/cuda")
DEFAULT_ARCHITECTURES = "80-real;90a-real;90-virtual"
MODES = ("auto", "cuda", "none")


def mode() -> str:
    """The value of UNIFIEDAR_BUILD; ends the process with one sentence if it is not one of MODES."""
    value = os.environ.get("UNIFIEDAR_BUILD") or "auto"
    if value not in MODES:
        raise SystemExit(f"unifiedar: UNIFIEDAR_BUILD must be auto, cuda or none, got {value!r}")
    return value


def inspect() -> bool:
    """Whether the pybind11 module is asked for."""
    return os.environ.get("UNIFIEDAR_INSPECT", "0") == "1"


def watchdog() -> bool:
    """Whether waits within kernels are to be bounded."""
    return os.environ.get("UNIFIEDAR_WATCHDOG", "0") == "1"


def find_nvcc() -> str | None:
    """Path of nvcc: CUDA_HOME, then CUDA_PATH, then PATH, then /usr/local/cuda; None if there is none."""
    for variable in ("CUDA_HOME", "CUDA_PATH"):
        home = os.environ.get(variable)
        if home and (nvcc := Path(home) / "bin" / "nvcc").is_file():
            return str(nvcc)
    fallback = CUDA_HOME_FALLBACK / "bin" / "nvcc"
    return shutil.which("nvcc") or (str(fallback) if fallback.is_file() else None)


def find_host_compiler() -> str | None:
    """Path of the C++ compiler that nvcc and CMake will use, or None."""
    return next((path for name in (os.environ.get("CXX"), "c++", "g++") if name and (path := shutil.which(name))), None)


def why_no_library() -> str | None:
    """Why no CUDA library can be built here, in one phrase; None if it can be tried."""
    if mode() == "none":
        return "UNIFIEDAR_BUILD=none"
    if not sys.platform.startswith("linux"):
        return f"the CUDA library is built on Linux only, not on {sys.platform}"
    if find_nvcc() is None:
        return f"no nvcc in CUDA_HOME, on PATH or in {CUDA_HOME_FALLBACK}"
    if find_host_compiler() is None:
        return "nvcc is here, but no C++ compiler (c++ or g++) on PATH"
    return None


def library_wanted() -> bool:
    """Whether this build is to make the CUDA library; under UNIFIEDAR_BUILD=cuda an impossibility ends the process."""
    reason = why_no_library()
    if reason and mode() == "cuda":
        raise SystemExit(f"unifiedar: UNIFIEDAR_BUILD=cuda, but {reason}")
    return reason is None


def requirements() -> list[str]:
    """What a build needs beside setuptools: nothing for a pure-Python one, else what is not importable yet."""
    if not library_wanted():
        return []
    needed = {"torch": "torch>=2.10", "cmake": "cmake>=3.24", "ninja": "ninja"}
    if inspect():
        needed["pybind11"] = "pybind11>=2.13"
    return [requirement for name, requirement in needed.items() if importlib.util.find_spec(name) is None]


def tool(name: str) -> str:
    """Path of `cmake` or `ninja`: the one installed as a Python package, else the one on PATH."""
    if importlib.util.find_spec(name) is not None:
        package = importlib.import_module(name)
        folder = getattr(package, "CMAKE_BIN_DIR" if name == "cmake" else "BIN_DIR", None)
        if folder and (path := Path(folder) / name).is_file():
            return str(path)
    if path_on_path := shutil.which(name):
        return path_on_path
    raise FileNotFoundError(f"{name} is not installed (pip install {name})")


def package_folder(name: str) -> Path:
    """Folder of an installed package, found without importing it (importing torch takes seconds)."""
    spec = importlib.util.find_spec(name)
    if spec is None or not spec.submodule_search_locations:
        raise FileNotFoundError(f"{name} is not importable in the build environment")
    return Path(next(iter(spec.submodule_search_locations)))


def cmake_architectures(arch_list: str) -> str:
    """CMake's spelling of a TORCH_CUDA_ARCH_LIST: "8.0;9.0a+PTX" -> "80-real;90a-real;90a-virtual"."""
    names = []
    for arch in re.split(r"[;,\s]+", arch_list.strip()):
        match = re.fullmatch(r"(\d+)\.(\d)([af]?)(\+PTX)?", arch)
        if match is None:
            raise SystemExit(
                f'unifiedar: TORCH_CUDA_ARCH_LIST must read like "8.0;9.0a+PTX", got {arch!r} in {arch_list!r}'
            )
        number = "".join(match.group(1, 2, 3))
        names.append(f"{number}-real")
        if match.group(4):
            names.append(f"{number}-virtual")
    return ";".join(names)


def architectures() -> str:
    """The architectures to build for, in CMake's spelling."""
    arch_list = os.environ.get("TORCH_CUDA_ARCH_LIST", "").strip()
    return cmake_architectures(arch_list) if arch_list else DEFAULT_ARCHITECTURES


def wheel_tag(platform: str, *, library: bool, inspect_tag: tuple[str, str] | None = None) -> tuple[str, str, str]:
    """(python, abi, platform) of the wheel: any platform without the library, any Python 3 with it;
    `inspect_tag` is this interpreter's (python, abi), given when the pybind11 module is inside."""
    platform = re.sub(r"[-. ]", "_", platform)
    if inspect_tag is not None:
        return (*inspect_tag, platform)
    return ("py3", "none", platform if library else "any")


def call(command: list[str]) -> None:
    """Runs a command, passing its output on; CalledProcessError.output is the line that names an error and the next."""
    lines = []
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True) as process:
        for line in process.stdout or ():
            sys.stdout.write(line)
            lines.append(line.strip())
    if process.returncode:
        lines = [line for line in lines if line]
        first = next((i for i, line in enumerate(lines) if re.search(r"\b(error|fatal)\b", line, re.IGNORECASE)), 0)
        raise subprocess.CalledProcessError(process.returncode, command, output=" ".join(lines[first : first + 2]))
