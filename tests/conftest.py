"""What every test file may rely on: the marker `gpu`, fixtures `device` and `room`, Triton interpreted where no GPU is.

`pytest -m gpu` runs what needs a GPU; without one those tests are skipped, and Triton kernels are interpreted.
"""

import os

import pytest
import torch

if not torch.cuda.is_available():
    # Triton looks when a kernel is defined, so this comes before anything imports one.
    os.environ.setdefault("TRITON_INTERPRET", "1")


def pytest_configure(config):
    config.addinivalue_line("markers", "gpu: needs a CUDA GPU; skipped where torch finds none")


def pytest_collection_modifyitems(items):
    if torch.cuda.is_available():
        return
    skip = pytest.mark.skip(reason="needs a CUDA GPU, and torch finds none")
    for item in items:
        if item.get_closest_marker("gpu"):
            item.add_marker(skip)


@pytest.fixture(params=["cpu", pytest.param("cuda", marks=pytest.mark.gpu)])
def device(request) -> str:
    """The CPU, and the GPU where there is one."""
    return request.param


@pytest.fixture
def room(request) -> tuple[str, str, torch.dtype]:
    """A (backend, device, dtype) of `helpers.kernel_rooms`, if this process can run it."""
    from helpers import interpreter_skip

    from unifiedar.ops._native import library_missing

    backend, device, _ = request.param
    if backend == "triton" and device == "cpu" and (reason := interpreter_skip()):
        pytest.skip(reason)
    if backend == "cuda" and (reason := library_missing()):
        pytest.skip(reason)
    return request.param


@pytest.fixture(autouse=True)
def _no_forced_backend(monkeypatch):
    """Tests say themselves which backend they mean."""
    monkeypatch.delenv("UNIFIEDAR_BACKEND", raising=False)


@pytest.fixture
def matplotlib():
    """The library of pictures, which not every installation has."""
    return pytest.importorskip("matplotlib")


@pytest.fixture
def fresh_compiler():
    """Forgets what torch.compile compiled: the cases of a test share its code, and dynamo stops at eight versions."""
    torch.compiler.reset()
    yield
    torch.compiler.reset()
