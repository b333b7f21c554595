"""Drives the CMake build of unifiedar/_C.so and tags the wheel; metadata is in pyproject.toml.

build_backend/toolchain.py documents the environment variables and decides what is built.
"""

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

from setuptools import Extension, find_packages, setup
from setuptools.command.bdist_wheel import bdist_wheel
from setuptools.command.build_ext import build_ext
from setuptools.command.build_py import build_py

ROOT = Path(__file__).resolve().parent
sys.path.insert(0, str(ROOT / "build_backend"))
import toolchain  # noqa: E402


def remove_libraries(package: Path, keep: tuple[str, ...] = ()) -> None:
    """Deletes what an earlier build left in the package: in an editable install it would still be loaded."""
    for old in [*package.glob("_C.so"), *package.glob("_inspect*.so")]:
        if old.name not in keep:
            old.unlink()


def record_no_library(package: Path, reason: str | None) -> None:
    """Leaves the reason for a missing library where `unifiedar info` reads it."""
    (package / "_build.json").write_text(json.dumps({"library": False, "reason": reason}, indent=1) + "\n")


class BuildPackage(build_py):
    def run(self) -> None:
        if not self.editable_mode:
            shutil.rmtree(self.build_lib, ignore_errors=True)  # what was deleted since the last build must not ship
        super().run()
        package = (ROOT if self.editable_mode else Path(self.build_lib)) / "unifiedar"
        if not toolchain.library_wanted():
            remove_libraries(package)
            record_no_library(package, toolchain.why_no_library())


class BuildLibrary(build_ext):
    """Runs CMake in build/cmake and copies what it made into the package."""

    def get_ext_filename(self, fullname: str) -> str:
        if fullname == "unifiedar._C":
            return os.path.join("unifiedar", "_C.so")  # no cpython suffix: it holds nothing of Python
        return super().get_ext_filename(fullname)

    def run(self) -> None:
        package = (ROOT if self.inplace else Path(self.build_lib).resolve()) / "unifiedar"
        package.mkdir(parents=True, exist_ok=True)
        try:
            build = self.cmake()
        except (OSError, subprocess.CalledProcessError) as error:
            reason = getattr(error, "output", None) or error
            if toolchain.mode() == "cuda":
                sys.exit(f"unifiedar: the CUDA library could not be built: {reason}")
            remove_libraries(package)
            record_no_library(package, f"its build failed: {reason}")
            print(
                f"WARNING: unifiedar installs without its CUDA library, whose build failed: {reason}", file=sys.stderr
            )
        else:
            made = [build / "_C.so", build / "_build.json", *build.glob("_inspect*.so")]
            remove_libraries(package, keep=tuple(path.name for path in made))
            for path in made:  # renamed into place: a process that has the old one open keeps it
                os.replace(shutil.copyfile(path, package / f"{path.name}.new"), package / path.name)

    def cmake(self) -> Path:
        """Configures and builds; returns the build folder. A later build compiles only what has changed."""
        build, nvcc, cmake = ROOT / "build" / "cmake", toolchain.find_nvcc(), toolchain.tool("cmake")
        options = {
            "CMAKE_MAKE_PROGRAM": toolchain.tool("ninja"),
            "CMAKE_CUDA_COMPILER": nvcc,
            "CMAKE_CUDA_ARCHITECTURES": toolchain.architectures(),
            "TORCH_DIR": toolchain.package_folder("torch"),
            "Python_EXECUTABLE": sys.executable,
            "UNIFIEDAR_INSPECT": "ON" if toolchain.inspect() else "OFF",
            "UNIFIEDAR_WATCHDOG": "ON" if toolchain.watchdog() else "OFF",
        }
        if toolchain.inspect():
            options["pybind11_DIR"] = toolchain.package_folder("pybind11") / "share/cmake/pybind11"
        stamp, origin = build / "origin.txt", f"{ROOT}\n{nvcc}\n"
        if build.exists() and not (stamp.is_file() and stamp.read_text() == origin):
            shutil.rmtree(build)  # a copied checkout or another toolkit: CMake's cache would be wrong
        build.mkdir(parents=True, exist_ok=True)
        stamp.write_text(origin)
        for old in build.glob("_inspect*.so"):
            old.unlink()
        settings = [f"-D{name}={value}" for name, value in options.items()]
        toolchain.call([cmake, "-S", str(ROOT), "-B", str(build), "-G", "Ninja", *settings])
        jobs = os.environ.get("MAX_JOBS") or str(os.cpu_count())
        toolchain.call([cmake, "--build", str(build), "--parallel", jobs])
        return build


class TaggedWheel(bdist_wheel):
    """py3-none-<platform> with the library, py3-none-any without: it is known after the build only."""

    def get_tag(self) -> tuple[str, str, str]:
        package = Path(self.get_finalized_command("build").build_lib) / "unifiedar"
        library = (package / "_C.so").exists() or (self.get_finalized_command("build_ext").inplace and bool(extensions))
        inspect_tag = super().get_tag()[:2] if [*package.glob("_inspect*.so")] else None
        self.root_is_pure = not library
        return toolchain.wheel_tag(self.plat_name, library=library, inspect_tag=inspect_tag)


extensions = [Extension("unifiedar._C", [])] if toolchain.library_wanted() else []
setup(
    packages=[*find_packages(include=["unifiedar", "unifiedar.*"]), "unifiedar.kernels"],
    package_dir={"unifiedar.kernels": "kernels"},  # a top-level package `kernels` would be somebody else's
    ext_modules=extensions,
    cmdclass={"build_py": BuildPackage, "build_ext": BuildLibrary, "bdist_wheel": TaggedWheel},
)
