"""The build: what it asks for where, how it names what it makes, and what `unifiedar info` says of the result."""

import importlib.util
import json
import os
import shutil
import subprocess
import sys
import tarfile
import zipfile
from pathlib import Path

import pytest

from unifiedar import info

ROOT = Path(__file__).resolve().parent.parent
BACKEND = ROOT / "build_backend"


def load(name):
    spec = importlib.util.spec_from_file_location(name, BACKEND / f"{name}.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def executable(path, script="exit 0"):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(f"#!/bin/sh\n{script}\n")
    path.chmod(0o755)
    return path


@pytest.fixture
def toolchain(monkeypatch, tmp_path):
    """The module on a machine that has nothing: no nvcc, no compiler, no importable package."""
    module = load("toolchain")
    own = ("UNIFIEDAR_BUILD", "UNIFIEDAR_INSPECT", "UNIFIEDAR_WATCHDOG")
    for variable in ("CUDA_HOME", "CUDA_PATH", "CXX", "TORCH_CUDA_ARCH_LIST", *own):
        monkeypatch.delenv(variable, raising=False)
    monkeypatch.setenv("PATH", str(tmp_path / "bin"))
    monkeypatch.setattr(module, "CUDA_HOME_FALLBACK", tmp_path / "usr-local-cuda")
    monkeypatch.setattr(module.sys, "platform", "linux")
    monkeypatch.setattr(module.importlib.util, "find_spec", lambda name: None)
    return module


# --- what a build asks for


def test_without_nvcc_a_build_asks_for_nothing(toolchain):
    assert toolchain.requirements() == []
    assert "no nvcc" in toolchain.why_no_library()


def test_with_nvcc_a_build_asks_for_torch_cmake_and_ninja(toolchain, tmp_path):
    executable(tmp_path / "bin/nvcc")
    executable(tmp_path / "bin/c++")
    assert toolchain.requirements() == ["torch>=2.10", "cmake>=3.24", "ninja"]


def test_what_is_importable_is_not_asked_for(toolchain, tmp_path, monkeypatch):
    executable(tmp_path / "bin/nvcc")
    executable(tmp_path / "bin/c++")
    monkeypatch.setattr(toolchain.importlib.util, "find_spec", lambda name: object() if name == "torch" else None)
    assert toolchain.requirements() == ["cmake>=3.24", "ninja"]


def test_inspect_asks_for_pybind11_too(toolchain, tmp_path, monkeypatch):
    executable(tmp_path / "bin/nvcc")
    executable(tmp_path / "bin/c++")
    monkeypatch.setenv("UNIFIEDAR_INSPECT", "1")
    assert toolchain.requirements()[-1] == "pybind11>=2.13"


def test_nvcc_without_a_compiler_is_a_pure_build_with_the_reason(toolchain, tmp_path):
    executable(tmp_path / "bin/nvcc")
    assert toolchain.requirements() == []
    assert "C++ compiler" in toolchain.why_no_library()


def test_build_none_hides_nvcc(toolchain, tmp_path, monkeypatch):
    executable(tmp_path / "bin/nvcc")
    executable(tmp_path / "bin/c++")
    monkeypatch.setenv("UNIFIEDAR_BUILD", "none")
    assert toolchain.requirements() == []
    assert toolchain.why_no_library() == "UNIFIEDAR_BUILD=none"


def test_other_systems_get_a_pure_build(toolchain, tmp_path, monkeypatch):
    executable(tmp_path / "bin/nvcc")
    executable(tmp_path / "bin/c++")
    monkeypatch.setattr(toolchain.sys, "platform", "darwin")
    assert toolchain.requirements() == []


@pytest.mark.parametrize(
    ("mode", "words"), [("cuda", "UNIFIEDAR_BUILD=cuda, but no nvcc"), ("on", "must be auto, cuda or none, got 'on'")]
)
def test_what_cannot_be_done_ends_the_build_with_one_sentence(toolchain, monkeypatch, mode, words):
    monkeypatch.setenv("UNIFIEDAR_BUILD", mode)
    with pytest.raises(SystemExit) as ended:
        toolchain.requirements()
    assert words in ended.value.code
    assert "\n" not in ended.value.code


@pytest.mark.parametrize("place", ["CUDA_HOME", "CUDA_PATH", "PATH", "fallback"])
def test_nvcc_is_found_in(toolchain, tmp_path, monkeypatch, place):
    folder = {"PATH": tmp_path / "bin", "fallback": toolchain.CUDA_HOME_FALLBACK / "bin"}.get(
        place, tmp_path / "cuda/bin"
    )
    nvcc = executable(folder / "nvcc")
    if place.startswith("CUDA"):
        monkeypatch.setenv(place, str(tmp_path / "cuda"))
    assert toolchain.find_nvcc() == str(nvcc)


def test_cuda_home_wins_over_path(toolchain, tmp_path, monkeypatch):
    executable(tmp_path / "bin/nvcc")
    nvcc = executable(tmp_path / "cuda/bin/nvcc")
    monkeypatch.setenv("CUDA_HOME", str(tmp_path / "cuda"))
    assert toolchain.find_nvcc() == str(nvcc)


# --- how it is written


@pytest.mark.parametrize(
    ("torch_list", "cmake_list"),
    [
        ("8.0", "80-real"),
        ("8.0;9.0a+PTX", "80-real;90a-real;90a-virtual"),
        ("8.6 8.9, 12.0", "86-real;89-real;120-real"),
        ("10.0f", "100f-real"),
    ],
)
def test_architectures(toolchain, monkeypatch, torch_list, cmake_list):
    monkeypatch.setenv("TORCH_CUDA_ARCH_LIST", torch_list)
    assert toolchain.architectures() == cmake_list


def test_default_architectures(toolchain):
    assert toolchain.architectures() == "80-real;90a-real;90-virtual"


@pytest.mark.parametrize("arch_list", ["80", "sm_90", "Hopper", "9.0a+ptx"])
def test_architectures_that_do_not_read(toolchain, arch_list):
    with pytest.raises(SystemExit, match="TORCH_CUDA_ARCH_LIST must read like"):
        toolchain.cmake_architectures(arch_list)


def test_wheel_tags(toolchain):
    assert toolchain.wheel_tag("linux-x86_64", library=False) == ("py3", "none", "any")
    assert toolchain.wheel_tag("linux-x86_64", library=True) == ("py3", "none", "linux_x86_64")
    with_module = toolchain.wheel_tag("linux_aarch64", library=True, inspect_tag=("cp312", "cp312"))
    assert with_module == ("cp312", "cp312", "linux_aarch64")


def test_a_failed_command_names_its_error(capfd):
    script = "print('fine'); print('a.cu(3): error: no such thing'); print('1 error'); raise SystemExit(2)"
    with pytest.raises(subprocess.CalledProcessError) as failed:
        load("toolchain").call([sys.executable, "-c", script])
    assert failed.value.output == "a.cu(3): error: no such thing 1 error"
    assert "fine" in capfd.readouterr().out


REPORT = """\
ptxas info    : 0 bytes gmem, 16 bytes cmem[4]
ptxas info    : Compiling entry function '_Zfirst' for 'sm_80'
ptxas info    : Function properties for _Zhelper
    8 bytes stack frame, 8 bytes spill stores, 8 bytes spill loads
ptxas info    : Function properties for _Zfirst
    256 bytes stack frame, 12 bytes spill stores, 24 bytes spill loads
ptxas info    : Used 32 registers, used 1 barriers, 256 bytes cumulative stack size, 2048 bytes smem, 364 bytes cmem[0]
ptxas info    : Compile time = 15.967 ms
ptxas info    : Compiling entry function '_Zsecond' for 'sm_90a'
ptxas info    : Function properties for _Zsecond
    0 bytes stack frame, 0 bytes spill stores, 0 bytes spill loads
ptxas info    : Used 10 registers, used 0 barriers
"""


def test_kernel_report_reads_ptxas():
    keys = ("name", "arch", "registers", "shared", "stack", "spill_stores", "spill_loads")
    kernels = [tuple(kernel[key] for key in keys) for kernel in load("kernel_report").parse(REPORT)]
    assert kernels == [("_Zfirst", "sm_80", 32, 2048, 256, 12, 24), ("_Zsecond", "sm_90a", 10, 0, 0, 0, 0)]


def test_kernel_report_keeps_the_report_and_passes_the_rest_on(tmp_path, capfd):
    compiler = executable(tmp_path / "nvcc", "echo 'ptxas info    : Used 8 registers' >&2; echo 'a warning' >&2")
    report = load("kernel_report")
    assert report.run([str(compiler), "-c", "a.cu", "-o", str(tmp_path / "a.cu.o")]) == 0
    assert (tmp_path / "a.cu.o.ptxas").read_text() == "ptxas info    : Used 8 registers\n"
    assert capfd.readouterr().err == "a warning\n"
    assert report.run([str(executable(tmp_path / "bad", "exit 3")), "-o", str(tmp_path / "b.o")]) == 3
    assert not (tmp_path / "b.o.ptxas").exists()


def test_kernel_report_table(tmp_path):
    (tmp_path / "a.o.ptxas").write_text(REPORT)
    load("kernel_report").table(str(tmp_path / "kernels.inc"), [str(tmp_path / "a.o"), str(tmp_path / "host.o")])
    assert (tmp_path / "kernels.inc").read_text().splitlines()[0] == '{"_Zfirst", "sm_80", 32, 2048, 256, 12, 24},'


# --- a whole build, with a toolkit that is broken


@pytest.fixture
def checkout(tmp_path):
    """A copy of what the build reads, with a package of one file."""
    folder = tmp_path / "checkout"
    for name in ("build_backend", "csrc", "kernels"):
        shutil.copytree(ROOT / name, folder / name, ignore=shutil.ignore_patterns("__pycache__"))
    for name in ("pyproject.toml", "setup.py", "CMakeLists.txt", "MANIFEST.in", "LICENSE"):
        shutil.copy(ROOT / name, folder / name)
    (folder / "README.md").write_text("# unifiedar\n")
    (folder / "unifiedar").mkdir()
    (folder / "unifiedar/__init__.py").touch()
    return folder


def build(folder, kind="wheel", **environment):
    setuptools = pytest.importorskip("setuptools")
    if int(setuptools.__version__.split(".")[0]) < 77:
        pytest.skip("needs setuptools 77 or newer, as pyproject.toml asks of an isolated build")
    script = f"import unifiedar_build, sys; unifiedar_build.build_{kind}(sys.argv[1])"
    variables = {key: value for key, value in os.environ.items() if key not in ("CUDA_PATH", "TORCH_CUDA_ARCH_LIST")}
    return subprocess.run(
        [sys.executable, "-c", script, str(folder / "dist")],
        cwd=folder,
        env=variables | {"PYTHONPATH": str(folder / "build_backend"), "UNIFIEDAR_INSPECT": "0", **environment},
        capture_output=True,
        text=True,
    )


def test_a_broken_toolkit_gives_a_pure_wheel_that_says_so(checkout, tmp_path):
    executable(tmp_path / "cuda/bin/nvcc", "echo 'nvcc fatal : broken on purpose'; exit 1")
    done = build(checkout, CUDA_HOME=str(tmp_path / "cuda"), UNIFIEDAR_BUILD="auto")
    assert done.returncode == 0, done.stderr
    assert "WARNING: unifiedar installs without its CUDA library" in done.stderr
    (wheel,) = (checkout / "dist").glob("*.whl")
    assert wheel.name.endswith("-py3-none-any.whl")
    with zipfile.ZipFile(wheel) as archive:
        names = archive.namelist()
        record = json.loads(archive.read("unifiedar/_build.json"))
    assert record["library"] is False
    assert "its build failed" in record["reason"]
    assert not [name for name in names if name.endswith(".so") or name.startswith(("tests", "bench", "kernels"))]
    assert any(name.startswith("unifiedar/kernels/") for name in names)


def test_a_broken_toolkit_is_an_error_where_cuda_was_asked_for(checkout, tmp_path):
    executable(tmp_path / "cuda/bin/nvcc", "exit 1")
    done = build(checkout, CUDA_HOME=str(tmp_path / "cuda"), UNIFIEDAR_BUILD="cuda")
    assert done.returncode != 0
    assert "unifiedar: the CUDA library could not be built" in done.stderr


def test_a_pure_wheel_drops_what_an_earlier_build_left(checkout):
    stale = checkout / "build/lib/unifiedar/deleted_long_ago.py"
    stale.parent.mkdir(parents=True)
    stale.touch()
    (checkout / "unifiedar/_C.so").touch()  # an earlier editable build's
    done = build(checkout, UNIFIEDAR_BUILD="none")
    assert done.returncode == 0, done.stderr
    (wheel,) = (checkout / "dist").glob("*-py3-none-any.whl")
    with zipfile.ZipFile(wheel) as archive:
        assert not {"unifiedar/deleted_long_ago.py", "unifiedar/_C.so"} & set(archive.namelist())
        assert json.loads(archive.read("unifiedar/_build.json"))["reason"] == "UNIFIEDAR_BUILD=none"


def test_a_source_distribution_holds_what_a_build_reads(checkout):
    done = build(checkout, "sdist")
    assert done.returncode == 0, done.stderr
    (archive,) = (checkout / "dist").glob("*.tar.gz")
    with tarfile.open(archive) as tar:
        names = {name.partition("/")[2] for name in tar.getnames()}
    sources = [path.relative_to(ROOT) for folder in ("csrc", "kernels") for path in (ROOT / folder).rglob("*.[chp]*")]
    sources = [path for path in sources if path.suffix in (".cu", ".cuh", ".h", ".cpp", ".py")]
    assert sources
    assert {str(path) for path in sources} <= names
    assert {"CMakeLists.txt", "LICENSE", "setup.py", "build_backend/toolchain.py", "unifiedar/__init__.py"} <= names


# --- the watchdog


@pytest.mark.parametrize(("options", "on"), [((), False), (("-DUNIFIEDAR_WATCHDOG=ON",), True),
                                             (("-DCMAKE_BUILD_TYPE=Debug",), True)])  # fmt: skip
def test_the_watchdog_is_for_debugging(tmp_path, monkeypatch, options, on):
    """It is compiled in where it is asked for, and the facts of the build say so."""
    toolchain = load("toolchain")
    tools = {name: shutil.which(name) for name in ("cmake", "ninja")}
    if toolchain.find_nvcc() is None or None in tools.values():
        pytest.skip("needs nvcc, cmake and ninja")
    monkeypatch.delenv("NVCC_APPEND_FLAGS", raising=False)
    settings = [f"-DCMAKE_CUDA_COMPILER={toolchain.find_nvcc()}", f"-DTORCH_DIR={toolchain.package_folder('torch')}"]
    settings += [f"-DCMAKE_MAKE_PROGRAM={tools['ninja']}", f"-DPython_EXECUTABLE={sys.executable}", *options]
    done = subprocess.run(
        [tools["cmake"], "-S", ROOT, "-B", tmp_path, "-G", "Ninja", *settings], capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    commands = [line for line in (tmp_path / "build.ninja").read_text().splitlines() if " DEFINES = " in line]
    assert any("-DUNIFIEDAR_WATCHDOG" in line for line in commands) == on
    assert ("UNIFIEDAR_WATCHDOG" in json.loads((tmp_path / "_build.json").read_text())["cuda_flags"]) == on


def test_the_environment_asks_for_the_watchdog(toolchain, monkeypatch):
    assert not toolchain.watchdog()
    monkeypatch.setenv("UNIFIEDAR_WATCHDOG", "1")
    assert toolchain.watchdog()
    assert '"UNIFIEDAR_WATCHDOG": "ON" if toolchain.watchdog() else "OFF"' in (ROOT / "setup.py").read_text()


@pytest.mark.parametrize("on", [False, True])
def test_a_wait_for_all_blocks_is_bounded_by_the_watchdog(tmp_path, on):
    nvcc = load("toolchain").find_nvcc()
    if nvcc is None:
        pytest.skip("needs nvcc")
    source = tmp_path / "wait.cu"
    source.write_text(
        '#include "depth_device.cuh"\n'
        "__global__ void wait(unsigned* counter) {\n"
        "  unifiedar::grid_wait(counter, [] { return gridDim.x; }, [] {});\n"
        "}\n"
    )
    flags = ["-DUNIFIEDAR_WATCHDOG"] if on else []
    done = subprocess.run(
        [nvcc, "-ptx", "-std=c++17", "-arch=sm_90a", f"-I{ROOT / 'csrc'}", *flags, "-o", tmp_path / "wait.ptx", source],
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    text = (tmp_path / "wait.ptx").read_text()
    assert "ld.acquire.gpu.global.u32" in text
    assert ("trap" in text) == on


# --- unifiedar info


def test_info_names_every_operator_and_backend(capsys):
    assert info.main([]) == 0
    text = capsys.readouterr().out
    assert text.startswith("unifiedar 0.1.0  python 3.")
    for name in info.registry:
        assert f"\n{name} " in text


def test_info_json(capsys):
    assert info.main(["--json", "--kernels"]) == 0
    facts = json.loads(capsys.readouterr().out)
    assert facts["versions"]["torch"] == info.torch.__version__
    assert facts["devices"][0]["type"] == "cpu"
    for name, op in info.registry.items():
        assert list(facts["ops"][name]) == [backend.name for backend in op.backends]
        assert facts["ops"][name]["eager"] is None
    assert {"reason", "flags", "kernels"} == set(facts["kernel_report"])


def test_info_gives_the_reason_a_build_recorded(monkeypatch, tmp_path):
    (tmp_path / "_build.json").write_text(json.dumps({"library": False, "reason": "no nvcc on PATH"}))
    monkeypatch.setattr(info.unifiedar, "__file__", str(tmp_path / "__init__.py"))
    monkeypatch.setattr(info._native, "LIBRARY", tmp_path / "_C.so")
    monkeypatch.setattr(info._native, "library_missing", lambda: "needs the compiled library")
    facts = info.collect()
    assert facts["library"] == {"path": None, "usable": False, "reason": "needs the compiled library (no nvcc on PATH)"}
    assert facts["ops"]["residual_lookup"]["cuda"] == "needs the compiled library (no nvcc on PATH)"
    assert "needs the compiled library (no nvcc on PATH)" in info._text(facts)


def test_info_says_why_a_gpu_backend_cannot_be_used(monkeypatch):
    monkeypatch.setattr(info._native, "library_missing", lambda: None)
    monkeypatch.setattr(info._native, "triton_missing", lambda: None)
    monkeypatch.setattr(info._native, "_interpreted", lambda: False)
    monkeypatch.setattr(info.torch.version, "cuda", "13.0")
    monkeypatch.setattr(info.torch.cuda, "is_available", lambda: False)
    assert info.collect()["ops"]["residual_lookup"] == {
        "cuda": "needs a GPU, and torch finds none",
        "triton": "needs a GPU, and torch finds none",
        "eager": None,
    }


def test_info_says_a_backend_can_be_used_where_it_can(monkeypatch):
    monkeypatch.setattr(info._native, "library_missing", lambda: None)
    monkeypatch.setattr(info._native, "triton_missing", lambda: None)
    monkeypatch.setattr(info, "_no_gpu", lambda: None)
    assert set(info.collect()["ops"]["residual_lookup"].values()) == {None}


def test_info_kernels_says_how_to_get_the_module(monkeypatch, capsys):
    monkeypatch.setitem(sys.modules, "unifiedar._inspect", None)
    assert info.main(["--kernels"]) == 0
    assert "UNIFIEDAR_INSPECT=1 pip install --no-build-isolation -e ." in capsys.readouterr().out


def test_info_kernels_prints_the_module_s_table(monkeypatch, capsys):
    class Inspect:
        @staticmethod
        def kernels():
            facts = {
                "registers": 40,
                "shared": 1024,
                "stack": 0,
                "spill_stores": 4,
                "spill_loads": 8,
                "max_threads": 1024,
            }
            return [{"name": "lookup_kernel<float>", "symbol": "_Z", "arch": "sm_80", **facts}]

        @staticmethod
        def flags():
            return {"cuda": "13.0.88"}

        @staticmethod
        def occupancy(arch, registers, shared, threads):
            return {"share": threads / 1024}

    monkeypatch.setitem(sys.modules, "unifiedar._inspect", Inspect)
    info.main(["--kernels"])
    last = capsys.readouterr().out.splitlines()[-1]
    assert last.split() == ["lookup_kernel<float>", "sm_80", "40", "1024", "0", "12", "1024", "12%", "25%", "50%"]
