"""The bench's command, pytest-benchmark and tiles."""

import dataclasses
import functools
import importlib
import re
import sys

import pytest
import torch
from bench_small import environment, row, toy_case
from helpers import interpreter_skip

from bench import _results, _warm
from bench.__main__ import main
from bench._case import Case, Variant, family_cases
from bench._pytest import CLOCK, run
from bench._results import Run
from bench._time import measure
from bench.tune import KNOBS, tune
from unifiedar.ops import residual_quantize

CPU = torch.device("cpu")


def test_command_lists_the_cases(capsys):
    assert main(["list", "--device", "cpu"]) == 0
    out = capsys.readouterr().out
    found = [line for line in out.splitlines() if not line.startswith(" ")]
    assert found == ["attention", "codes", "depth", "models", "norm", "rqtransformer", "sample", "var"]
    assert "vila-u-384/cumulative" in out
    assert "F.embedding_bag" in out


def test_command_measures_and_writes_the_scoreboard(tmp_path, capsys, matplotlib):
    results, docs = tmp_path / "results", tmp_path / "docs"
    arguments = ["--device", "cpu", "--case", "rqvae-ffhq/*", "--commit", "me", "--budget", "0.02"]
    assert main(["codes", *arguments, "--out", str(results)]) == 0
    (run,) = _results.read_all(results)
    uses = {"forward", "cumulative", "backward", "statistics", "quantize"}
    assert {case.name for case in run.cases} == {f"rqvae-ffhq/{use}" for use in uses}
    assert run.environment.commit == "me"
    for case in run.cases:
        assert case.ours.error is None
        assert case.backend == "eager"
        assert {"published code"} < set(case.peers)
        assert {name: one.error for name, one in case.peers.items() if one.error} == {}
    assert main(["scoreboard", "--results", str(results), "--docs", str(docs)]) == 0
    assert "rqvae-ffhq/backward" in (docs / "scoreboard.md").read_text()
    assert capsys.readouterr().out.count("wrote ") == 2


def test_command_measures_several_families(tmp_path, capsys):
    arguments = ["--device", "cpu", "--case", "rqvae-ffhq/forward", "--case", "vila-u-r2", "--budget", "0.01"]
    assert main(["codes", "attention", "sample", *arguments, "--out", str(tmp_path)]) == 0
    assert {run.family for run in _results.read_all(tmp_path)} == {"codes", "sample"}
    assert "attention: no case of these names" in capsys.readouterr().out


def test_command_warms_and_writes_nothing(tmp_path, capsys):
    arguments = ["--device", "cpu", "--case", "rqvae-ffhq/quantize", "--case", "var-256-d16/forward"]
    assert main(["codes", "attention", *arguments, "--out", str(tmp_path), "--warm", "2"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert re.fullmatch(r"2 cases in \d+ s: [5-9] variants ran, 0 raised; 0 cases failed", lines[-1])
    assert sorted(line.split()[1] for line in lines[:-1]) == ["rqvae-ffhq/quantize", "var-256-d16/forward"]
    assert list(tmp_path.iterdir()) == []


def test_command_says_what_failed_while_warming(capsys, monkeypatch):
    def warm(tasks, processes, *, report):
        assert processes == 3
        assert {task.further_s for task in tasks} == {0.5}
        return [_warm.Outcome(1, {}, "its process ended with -9") for _ in tasks]

    monkeypatch.setattr("bench.__main__.warm", warm)
    arguments = ["--device", "cpu", "--case", "rqvae-ffhq/quantize", "--budget", "0.5", "--warm", "3"]
    assert main(["codes", *arguments]) == 1
    assert capsys.readouterr().err == "bench: codes rqvae-ffhq/quantize: its process ended with -9\n"


@pytest.mark.parametrize(
    ("arguments", "text"),
    [
        (["codes", "--device", "cpu", "--case", "nope*"], "--case nope*: matches no case"),
        (["codes", "--device", "cpu", "--budget", "0"], "--budget must be positive, got 0"),
        (["codes", "nope", "--device", "cpu"], "nope: no family; there are attention, codes"),
        (["codes", "--device", "cpu", "--warm", "0"], "--warm must be at least 1, got 0"),
        (["codes", "--device", "cpu", "--starts", "0"], "--starts must be at least 1, got 0"),
        (["codes", "--device", "cpu", "--warm", "1", "--starts"], "--starts times beginnings with empty caches"),
        (["codes", "--device", "cpu", "--warm", "1", "--budget", "-1"], "--budget must be positive, got -1"),
    ],
)
def test_command_says_what_is_wrong(arguments, text, capsys):
    assert main(arguments) == 2
    error = capsys.readouterr().err
    assert text in error
    assert error.count("\n") == 1


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_command_says_when_there_is_no_gpu(capsys):
    assert main(["list", "--device", "cuda"]) == 2
    assert capsys.readouterr().err == "bench: --device cuda: torch finds no usable GPU here\n"


def test_command_says_which_results_are_bad(tmp_path, capsys):
    (tmp_path / "bad.json").write_text("{}")
    assert main(["scoreboard", "--results", str(tmp_path), "--docs", str(tmp_path / "docs")]) == 2
    assert f"bench: {tmp_path / 'bad.json'}: lacks cases" in capsys.readouterr().err
    assert not (tmp_path / "docs").exists()


def test_command_says_when_matplotlib_is_missing(tmp_path, capsys, monkeypatch):
    _results.write(Run("codes", environment(), [row()]), tmp_path)
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    assert main(["scoreboard", "--results", str(tmp_path), "--docs", str(tmp_path / "docs")]) == 2
    assert "the plots need matplotlib: pip install" in capsys.readouterr().err
    assert not (tmp_path / "docs" / "scoreboard.md").exists()


@pytest.mark.parametrize("arguments", [[], ["nope"], ["codes", "--device", "tpu"]])
def test_command_rejects_unknown_words(arguments):
    with pytest.raises(SystemExit) as caught:
        main(arguments)
    assert caught.value.code == 2


@pytest.mark.benchmark(timer=CLOCK)
def test_pytest_benchmark_shows_the_timer_s_figures(benchmark):
    case = next(case for case in family_cases("codes", CPU) if case.name == "rqvae-ffhq/forward")
    before = CLOCK.now
    run(case, "published code", benchmark)
    assert {"shape", "dtype", "method", "bytes", "extra_memory_bytes", "differ"} == set(benchmark.extra_info)
    if benchmark.enabled:
        stats = benchmark.stats.stats
        assert benchmark.group == case.name
        assert stats.rounds == 20
        # Two warm-up rounds move the clock too.
        assert 0 < stats.total < CLOCK.now - before
        assert 1e-6 < stats.median < 0.1


def test_pytest_skips_a_peer_that_fails_and_fails_on_ours(monkeypatch):
    with pytest.raises(pytest.skip.Exception, match="wrong: ValueError: wrong result"):
        run(toy_case(), "wrong", None)
    broken = Variant("unifiedar", "ours", lambda inputs: lambda: inputs[0] + 2)
    with pytest.raises(ValueError, match="wrong result"):
        run(dataclasses.replace(toy_case(), variants=(broken,)), "unifiedar", None)


def test_tune_tries_tiles_and_puts_the_table_back(monkeypatch):
    """One case in the interpreter: a tile that serves, one that cannot be compiled, and the table as it was after."""
    if reason := interpreter_skip():
        pytest.skip(reason)
    from unifiedar.kernels import codes_quantize

    def triton_as(backend):
        return lambda inputs: lambda: residual_quantize(*inputs, 2, backend=backend)

    def make(seed, device):
        generator = torch.Generator().manual_seed(seed)
        return torch.randn(9, 8, generator=generator), torch.randn(20, 8, generator=generator)

    def check(inputs):
        codes = residual_quantize(*inputs, 2, backend="eager").codes

        def same(variant, output):
            if not torch.equal(output.codes, codes):
                raise ValueError("other codes")

        return same

    case = Case(
        name="small/quantize", shape={}, dtype=torch.float32, bytes=1, flops=1, make=make, check=check,
        variants=[Variant("unifiedar triton", "backend", triton_as("triton"))], backend=lambda inputs: "triton",
    )  # fmt: skip
    other = dataclasses.replace(case, name="small/forward")
    monkeypatch.setattr("bench.tune.measure", functools.partial(measure, rounds=(1, 1)))
    used = codes_quantize.search_tile
    knob = dataclasses.replace(KNOBS["codes"][0], tiles=((64, 64, 64, 4, 2, 4), (100, 64, 64, 4, 2, 4)))
    lines = []
    tune([knob], [other, case], torch.device("cpu"), budget_s=0.01, report=lines.append)
    assert codes_quantize.search_tile is used
    assert codes_quantize.plan(40, 20, 8, False, True, 90).tile == used(8, 90)
    assert len(lines) == 3
    assert all(line.startswith("small/quantize") for line in lines)
    assert " ms" in lines[0]
    assert " ms" in lines[1]
    assert "Error" in lines[2]
    assert sum(line.endswith("*") for line in lines) == 1


@pytest.mark.parametrize("knob", [pytest.param(one, id=one.function) for some in KNOBS.values() for one in some])
def test_every_knob_turns_what_is_there(knob):
    """Each of its tiles can be made by the class that its function's annotation names."""
    if "kernels" in knob.module:
        pytest.importorskip("triton")
    module = importlib.import_module(knob.module)
    tile = getattr(module, knob.function).__annotations__["return"]
    assert len({repr(tile(*fields)) for fields in knob.tiles}) == len(knob.tiles)
    for name in knob.cached:
        getattr(module, name).cache_clear()


def test_tune_refuses_what_it_does_not_know(capsys):
    assert main(["tune", "codes", "--knob", "wheel"]) == 2
    assert "the family codes has search_tile, finish_tile" in capsys.readouterr().err
