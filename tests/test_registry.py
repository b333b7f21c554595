"""How a backend is chosen: `backend=`, UNIFIEDAR_BACKEND, reasons, refusals; and what importing the package costs."""

import os
import subprocess
import sys
import threading
from dataclasses import replace

import pytest
import torch
from helpers import interpreter_skip

from unifiedar import info, ops
from unifiedar.ops import _native, _op, cut_logits, registry, residual_lookup
from unifiedar.ops._op import BACKENDS, Backend, Op

LOOKUP = registry["residual_lookup"]
CODES = torch.tensor([[0, 1], [2, -1]])
BOOK = torch.randn(3, 8)


def test_every_operator_ends_in_eager():
    assert {
        "residual_lookup",
        "residual_lookup_backward",
        "residual_quantize",
        "code_statistics",
        "sample_codes",
    } <= set(registry)
    for name, op in registry.items():
        names = [backend.name for backend in op.backends]
        assert op.name == name
        assert names[-1] == "eager"
        assert names == [backend for backend in BACKENDS if backend in names], "best first, in the order of BACKENDS"
        assert op.overload._schema.arguments[-1].name == "backend"


def test_auto_is_eager_on_the_cpu_even_where_the_interpreter_fits():
    assert LOOKUP.choose("auto", CODES, BOOK, False).name == "eager"


def test_environment_forces_and_the_argument_wins(monkeypatch):
    monkeypatch.setenv("UNIFIEDAR_BACKEND", "cuda")
    with pytest.raises(
        ValueError, match="residual_lookup: UNIFIEDAR_BACKEND must fit the call, got 'cuda', which needs"
    ):
        residual_lookup(CODES, BOOK)
    assert registry["cut_logits"].choose("auto", BOOK).name == "eager", "no such backend: the variable is a preference"
    assert torch.equal(residual_lookup(CODES, BOOK, backend="eager")[0], BOOK[0] + BOOK[1])
    monkeypatch.setenv("UNIFIEDAR_BACKEND", "eager")
    assert LOOKUP.choose("auto", CODES, BOOK, False).name == "eager"
    monkeypatch.setenv("UNIFIEDAR_BACKEND", "quick")
    with pytest.raises(ValueError, match="UNIFIEDAR_BACKEND must be one of auto, cuda, triton, eager, got 'quick'"):
        residual_lookup(CODES, BOOK)
    monkeypatch.setenv("UNIFIEDAR_BACKEND", "")
    residual_lookup(CODES, BOOK)


def test_refusals_name_operator_argument_and_reason():
    with pytest.raises(
        ValueError, match="residual_lookup: backend must fit the call, got 'cuda', which needs CUDA tens"
    ):
        residual_lookup(CODES, BOOK, backend="cuda")
    with pytest.raises(
        ValueError, match="residual_lookup: backend must be one of auto, cuda, triton, eager, got 'hip'"
    ):
        residual_lookup(CODES, BOOK, backend="hip")
    with pytest.raises(
        ValueError, match=r"cut_logits: backend must be one that this operator has \(eager\), got 'cuda'"
    ):
        cut_logits(BOOK, backend="cuda")


def test_explain_gives_every_backend_a_sentence():
    reasons = LOOKUP.explain(CODES, BOOK, False)
    assert list(reasons) == ["cuda", "triton", "eager"]
    assert reasons["cuda"] == "needs CUDA tensors, got cpu"
    assert reasons["eager"] == "fits"
    if interpreter_skip() is None:
        assert reasons["triton"] == "fits"
        assert "float64" in LOOKUP.explain(CODES, BOOK.double(), False)["triton"]
        assert "bfloat16" in LOOKUP.explain(CODES, BOOK.bfloat16(), False)["triton"]


@pytest.mark.gpu
def test_auto_takes_the_best_on_a_gpu():
    arguments = (CODES.cuda(), BOOK.cuda(), False)
    best = "triton" if _native.library_missing() else "cuda"
    assert LOOKUP.choose("auto", *arguments).name == best
    assert LOOKUP.choose("auto", arguments[0], BOOK.double().cuda(), False).name == "eager"


def test_backend_on_request(monkeypatch):
    """Auto passes over it, its name gets it, and the report says so."""
    kept, eager = replace(LOOKUP.backends[0], unfit=lambda *_: None, on_request="is young"), LOOKUP.backends[-1]
    monkeypatch.setattr(LOOKUP, "backends", (kept, eager))
    monkeypatch.setattr(LOOKUP, "_by_name", {kept.name: kept, "eager": eager})
    monkeypatch.setattr(_op, "_on_cuda", lambda args: True)
    assert LOOKUP.choose("auto", CODES, BOOK, False) is eager
    assert LOOKUP.choose(kept.name, CODES, BOOK, False) is kept
    monkeypatch.setenv("UNIFIEDAR_BACKEND", kept.name)
    assert LOOKUP.choose("auto", CODES, BOOK, False) is kept
    monkeypatch.delenv("UNIFIEDAR_BACKEND")
    facts = info.collect()
    facts["ops"]["residual_lookup"][kept.name] = None  # usable, wherever this runs
    assert "asked [" in info._text(facts)
    assert "used where asked for by name: is young" in info._text(facts)


def test_missing_pieces_are_sentences_not_exceptions(monkeypatch, tmp_path):
    for check in (_native.library_missing, _native.triton_missing):
        check.cache_clear()
    try:
        monkeypatch.setattr(_native, "LIBRARY", tmp_path / "_C.so")
        assert _native.library_missing() == "needs the compiled library, which this installation was built without"
        _native.library_missing.cache_clear()
        (tmp_path / "_C.so").write_bytes(b"not a library")
        reason = _native.library_missing()
        assert reason is not None
        assert reason.startswith("needs ")
        monkeypatch.setattr(_native.importlib.util, "find_spec", lambda name: None)
        assert _native.triton_missing() == "needs Triton, which is not installed"
        assert _native.triton_unfit(BOOK) == "needs Triton, which is not installed"
    finally:
        monkeypatch.undo()
        for check in (_native.library_missing, _native.triton_missing):
            check.cache_clear()


def test_backend_reaches_the_operator_under_compile(monkeypatch):
    chosen = []
    choose = LOOKUP.choose
    monkeypatch.setattr(LOOKUP, "choose", lambda *args: chosen.append(args[0]) or choose(*args))
    for backend in ("auto", "eager"):
        compiled = torch.compile(
            lambda codes, book, backend=backend: residual_lookup(codes, book, backend=backend) * 2,
            fullgraph=True,
            backend="aot_eager",
        )
        assert torch.equal(compiled(CODES, BOOK), residual_lookup(CODES, BOOK) * 2)
        assert chosen[0] == backend
        chosen.clear()
    refused = torch.compile(lambda c, b: residual_lookup(c, b, backend="cuda"), fullgraph=True, backend="aot_eager")
    with pytest.raises(ValueError, match="got 'cuda', which needs CUDA tensors"):
        refused(CODES, BOOK)


class Recorder(torch.utils._python_dispatch.TorchDispatchMode):
    """Names of the operators that reach the dispatcher."""

    def __init__(self):
        super().__init__()
        self.names = []

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        self.names.append(function.__name__)
        return function(*args, **(kwargs or {}))


def test_whoever_watches_sees_the_operator():
    """A plain call skips the dispatcher; modes, profilers, meta tensors and subclasses get the operator itself."""
    book = BOOK.clone().requires_grad_()
    want = residual_lookup(CODES, BOOK)
    with Recorder() as mode:
        out = residual_lookup(CODES, book)
        out.sum().backward()
    assert torch.equal(out, want)
    assert {"residual_lookup.default", "residual_lookup_backward.default"} <= set(mode.names)
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]) as profile:
        residual_lookup(CODES, BOOK)
    assert "unifiedar::residual_lookup" in {event.key for event in profile.key_averages()}
    assert residual_lookup(CODES.to("meta"), BOOK.to("meta")).is_meta
    assert type(residual_lookup(CODES, BOOK.as_subclass(Marked))) is Marked


class Marked(torch.Tensor):
    """A subclass that changes nothing."""


def test_gradient_of_a_plain_call_equals_the_operators():
    gradients = []
    for call in (LOOKUP, LOOKUP.overload):
        book = BOOK.clone().requires_grad_()
        out = call(CODES, book, True, "auto")
        (grad,) = torch.autograd.grad(out.square().sum(), book, create_graph=True)
        (second,) = torch.autograd.grad(grad.square().sum(), book)
        gradients.append((out.detach(), grad.detach(), second))
    for direct, dispatched in zip(*gradients, strict=True):
        assert torch.equal(direct, dispatched)


def test_without_gradients():
    book = BOOK.clone().requires_grad_()
    want = residual_lookup(CODES, book).detach()

    def function(codes, book):
        return residual_lookup(codes, book)

    for context in (torch.no_grad, torch.inference_mode):
        with context():
            got = residual_lookup(CODES, book)
            compiled = torch.compile(function, fullgraph=True, backend="aot_eager")(CODES, book)
        assert not got.requires_grad
        assert torch.equal(got, want)
        assert torch.equal(compiled, want)


def test_threads_choose_independently():
    wrong = []

    def work(backend):
        for _ in range(50):
            try:
                residual_lookup(CODES, BOOK, backend=backend)
                served = backend == "eager"
            except ValueError:
                served = backend != "eager"
            if not served:
                wrong.append(backend)

    threads = [threading.Thread(target=work, args=(backend,)) for backend in ("eager", "cuda") * 2]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not wrong


def test_an_operator_of_three_lines():
    """What a new operator needs: a schema, its definition, its shapes. Nothing is differentiable by accident."""
    op = Op(
        "test_double(Tensor x, int times) -> Tensor",
        eager=lambda x, times: x * 2**times,
        fake=lambda x, times: torch.empty_like(x),
        backends=[Backend("triton", lambda x, times: x, lambda x, times: f"needs times 0, got {times}")],
    )
    try:
        x = torch.ones(3, requires_grad=True)
        out = op(x, 3, "auto")
        assert out.tolist() == [8.0] * 3
        assert not out.requires_grad
        assert op.explain(x, 3) == {"triton": "needs times 0, got 3", "eager": "fits"}
        torch.library.opcheck(op.overload, (x, 2, "eager"))
    finally:
        del registry["test_double"]


def run_python(code, **environment):
    return subprocess.run(
        [sys.executable, "-c", code],
        env={**os.environ, **environment},
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )


def test_import_is_light():
    code = (
        "import sys, unifiedar\n"
        "assert 'torch' not in sys.modules, 'unifiedar imports torch'\n"
        "unifiedar.ops.residual_lookup\n"
        "loaded = {'triton', 'unifiedar.kernels', 'unifiedar.nn', 'unifiedar.models'} & set(sys.modules)\n"
        "assert loaded <= {'triton'}, loaded\n"
        "assert set(unifiedar.__all__) <= set(dir(unifiedar))\n"
    )
    done = run_python(code)
    assert done.returncode == 0, done.stderr


def test_works_without_triton_and_without_the_library():
    code = (
        "import sys\n"
        "sys.modules['triton'] = None\n"
        "import importlib.util as u\n"
        "find = u.find_spec\n"
        "u.find_spec = lambda name, *a: None if name.split('.')[0] == 'triton' else find(name, *a)\n"
        "import torch\n"
        "from pathlib import Path\n"
        "from unifiedar import ops\n"
        "from unifiedar.ops import _native\n"
        "_native.LIBRARY = Path('absent')\n"
        "x = torch.randn(4, 3)\n"
        "codes, quantized = ops.residual_quantize(x, torch.randn(5, 3), 2)\n"
        "book = torch.randn(5, 3, requires_grad=True)\n"
        "ops.residual_lookup(codes, book).sum().backward()\n"
        "print(ops.registry['residual_lookup'].explain(codes, book, False))\n"
    )
    done = run_python(code)
    assert done.returncode == 0, done.stderr
    assert "needs Triton, which is not installed" in done.stdout


def test_accelerate_is_the_function_whatever_was_imported_first():
    code = (
        "import unifiedar, unifiedar.accelerate\n"
        "from unifiedar.accelerate import accelerate\n"
        "assert unifiedar.accelerate is accelerate and callable(unifiedar.restore)\n"
    )
    done = run_python(code)
    assert done.returncode == 0, done.stderr


def test_ops_documents_its_names():
    for name in ops.__all__:
        assert hasattr(ops, name)
