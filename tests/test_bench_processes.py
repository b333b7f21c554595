"""Cases of the bench in processes of their own: what beginning costs, and running every case once."""

import dataclasses
import json
import os
import re
import threading
import time
from pathlib import Path

import pytest
import torch
from bench_small import environment, row, toy_case

from bench import _results, _scoreboard, _start, _warm
from bench._case import Variant, family_cases, run_family
from bench._results import ResultsError, Run
from bench._time import Start

CPU = torch.device("cpu")

# ---- what beginning costs --------------------------------------------------------------------------------------------


def test_beginning_is_timed_in_a_process_of_its_own():
    start = _start.fresh("attention", "var-256-d16/forward", "SDPA + mask", "cpu", timeout_s=200)
    assert start.error is None
    assert start.cold_ms > start.prepare_ms > 0
    assert start.new_ms > 0


@pytest.mark.parametrize(
    ("variant", "timeout_s", "text"),
    [("nobody", 200, "variant must be one of .*SDPA"), ("SDPA + mask", 0.01, "took more than 0.01 s")],
)
def test_beginning_says_what_went_wrong(variant, timeout_s, text):
    start = _start.fresh("attention", "var-256-d16/forward", variant, "cpu", timeout_s=timeout_s)
    assert (start.cold_ms, start.new_ms, start.prepare_ms) == (None, None, None)
    assert re.search(text, start.error)


def test_beginning_binds_and_calls():
    """The first call, that of the other case, and binding alone."""
    done = []

    def variant(name, seconds):
        def bind(inputs):
            done.append(f"bind {name}")
            time.sleep(seconds)
            return lambda: done.append(f"call {name}") or time.sleep(0.02)

        return Variant("unifiedar", "ours", bind)

    other = dataclasses.replace(toy_case(), variants=(variant("other", 0.5),))
    case = dataclasses.replace(toy_case(), variants=(variant("one", 0.01),), other=lambda: other)
    start = _start.begin(case, "unifiedar", CPU)
    assert done == ["bind one", "call one", "bind other", "call other"] + ["bind one"] * _start.REPEATS
    assert 30 <= start.cold_ms < 500 <= start.new_ms
    assert 10 <= start.prepare_ms < 500
    alone = _start.begin(dataclasses.replace(case, other=None), "unifiedar", CPU)
    assert alone.new_ms is None


def test_run_family_asks_for_beginnings(tmp_path, matplotlib):
    asked = []

    def start(case, name):
        asked.append((case, name))
        return Start(1234.5, None, 0.25) if name == "unifiedar" else Start(None, None, None, "ImportError: no | such")

    lines = []
    run = run_family("toy", [toy_case()], CPU, budget_s=0.02, commit="c", start=start, report=lines.append)
    names = [variant.name for variant in toy_case().variants]
    assert asked == [("toy/add", name) for name in names]
    assert any("cold 1234 ms, preparing 0.25 ms" in line for line in lines)
    assert _results.read(_results.write(run, tmp_path / "results")).cases[0].starts == run.cases[0].starts
    text = _scoreboard.write(tmp_path / "results", tmp_path / "docs").read_text()
    assert "| toy/add | unifiedar | 1234.5 | – | 0.2500 |" in text
    assert "ImportError: no \\| such" in text


def test_beginnings_side_by_side(tmp_path, matplotlib):
    """All of them are under way before one ends, and the file and the scoreboard say so."""
    names = {variant.name for variant in toy_case().variants}
    together = threading.Barrier(len(names), timeout=60)

    def start(case, name):
        together.wait()
        return Start(1.0, None, float(len(name)))

    run = run_family("toy", [toy_case()], CPU, budget_s=0.02, commit="c", start=start, starts_at_once=99)
    starts = run.cases[0].starts
    assert {name: (one.prepare_ms, one.at_once) for name, one in starts.items()} == {
        name: (len(name), len(names)) for name in names
    }
    assert _results.read(_results.write(run, tmp_path / "results")) == run
    text = _scoreboard.write(tmp_path / "results", tmp_path / "docs").read_text()
    assert f"such as making a\nmask (up to {len(names)} processes at once):" in text


@pytest.mark.parametrize(
    ("start", "text"),
    [
        ({"cold_ms": 1.0, "new_ms": None, "prepare_ms": None, "error": None}, "neither times nor an error"),
        ({"cold_ms": 1.0, "new_ms": None, "prepare_ms": 1.0, "error": "no"}, "both an error and times"),
        ({"cold_ms": 1.0, "new_ms": None, "prepare_ms": 1.0}, "lacks error"),
    ],
)
def test_results_refuse_wrong_beginnings(tmp_path, start, text):
    path = _results.write(Run("codes", environment(), [row()]), tmp_path)
    document = json.loads(path.read_text())
    document["cases"][0]["starts"] = {"ours": start}
    path.write_text(json.dumps(document))
    with pytest.raises(ResultsError, match=text):
        _results.read(path)
    del document["cases"][0]["starts"]
    path.write_text(json.dumps(document))
    assert _results.read(path).cases[0].starts == {}, "files from before have none"


def test_the_share_of_codes_unlike_float64_is_counted():
    """Three of the last codes of a search, and one of a pyramid's last scale, are made the next ones."""
    (case,) = (one for one in family_cases("codes", CPU) if one.name == "rqvae-ffhq/quantize")
    x, codebook = case.make(0, CPU)
    ours, peer = case.variants[0], next(one for one in case.variants if one.role == "peer")
    check, depth = case.check((x, codebook)), case.shape["D"]
    codes, quantized = (one.clone() for one in ours.bind((x, codebook))())
    assert check(ours, (codes, quantized)) == 0
    codes[5:8, -1] = (codes[5:8, -1] + 1) % len(codebook)
    assert check(peer, (codes, quantized)) == 3 / (len(x) * depth)
    with pytest.raises(ValueError, match="3 codes are not the nearest, allowed 0"):
        check(ours, (codes, quantized))
    (case,) = (one for one in family_cases("codes", CPU) if one.name == "var/encode-b1")
    inputs = case.make(0, CPU)
    check, found = case.check(inputs), [one.clone() for one in case.variants[0].bind(inputs)()]
    before = check(peer, found)
    found[-1][0, 7] = (found[-1][0, 7] + 1) % case.shape["K"]
    assert check(peer, found) - before == pytest.approx(1 / case.shape["L"])
    (case,) = (one for one in family_cases("codes", CPU) if one.name == "infinity-2b-b1/encode")
    inputs = case.make(0, CPU)
    assert case.check(inputs)(ours, case.variants[0].bind(inputs)()) <= 1e-3


# ---- running every case once -----------------------------------------------------------------------------------------


def _work(task):
    """A task's case says what happens in its process, which notes down its id; family is a folder."""
    folder = Path(task.family)
    tried = folder / f"{task.case}-{os.getpid()}"
    others = len(list(folder.glob(f"{task.case}-*")))
    tried.touch()
    if task.case == "dies" or (task.case == "dies once" and not others):
        os._exit(3)
    if task.case == "raises":
        raise RuntimeError("no inputs")
    if task.case == "sleeps":
        time.sleep(60)
    if task.case.startswith("meets"):  # ends when another case is under way beside it
        end = time.monotonic() + 60
        while len({path.name[:6] for path in folder.glob("meets*")}) < 2 and time.monotonic() < end:
            time.sleep(0.01)
    if task.case == "short" and not others:
        errors = {"peer": "RuntimeError: CUDA error: CUBLAS_STATUS_ALLOC_FAILED", "absent": "ImportError: no"}
        return _warm.Outcome(1, errors, None, 1.0)
    if task.case == "short":
        assert task.only == ("peer",)
        return _warm.Outcome(1, {}, None, 1.0)
    if task.case == "wrong":
        assert task.only == (("unifiedar",) if others else ())
        return _warm.Outcome(0, {"unifiedar": "ValueError: no"}, "ours failed: ValueError: no", 1.0)
    return _warm.Outcome(2, {"absent": "ImportError: no"}, None, 1.0)


def _tasks(folder, *names):
    return [_warm.Task(str(folder), name, "cpu") for name in names]


def test_warming_survives_what_happens_to_a_process(tmp_path):
    names = ["one", "dies", "dies once", "raises", "short", "wrong", "last"]
    lines = []
    outcomes = _warm.warm(_tasks(tmp_path, *names), 1, work=_work, report=lines.append)
    found = dict(zip(names, outcomes, strict=True))
    for name in ("one", "dies once", "short", "last"):
        assert (found[name].ran, found[name].failed) == (2, None)
    assert found["dies"].failed == "its process ended with 3"
    assert found["raises"].failed == "its process ended with 1"
    assert found["wrong"].failed == "ours failed: ValueError: no"
    tries = {name: len(list(tmp_path.glob(f"{name}-*"))) for name in names}
    assert tries == {"one": 1, "dies": 2, "dies once": 2, "raises": 2, "short": 2, "wrong": 2, "last": 1}
    text = "\n".join(lines)
    assert text.count("once more, alone, at the end") == 5
    assert text.count("absent: ImportError: no") == 4
    assert lines.index(next(line for line in lines if "dies once" in line and "2 ran" in line)) > lines.index(
        next(line for line in lines if "last" in line and "2 ran" in line)
    )


def test_warming_runs_cases_side_by_side(tmp_path):
    outcomes = _warm.warm(_tasks(tmp_path, "meets1", "meets2"), 2, work=_work)
    assert [one.failed for one in outcomes] == [None, None]
    pids = {path.name.split("-")[1] for path in tmp_path.glob("meets*")}
    assert len(pids) == 2


def test_warming_gives_up_a_case_that_takes_too_long(tmp_path):
    begun = time.monotonic()
    outcomes = _warm.warm(_tasks(tmp_path, "sleeps"), 1, work=_work, limit_s=0.5)
    assert outcomes[0].failed == "took more than 0.5 s"
    assert time.monotonic() - begun < 40
    assert len(list(tmp_path.glob("sleeps-*"))) <= 1


def test_warming_calls_every_variant_once_and_longer_if_asked(monkeypatch):
    calls = []

    def bind(inputs):
        return lambda: (time.sleep(0.01), calls.append(inputs[0][0].item()))

    variants = (Variant("unifiedar", "ours", bind), Variant("absent", "peer", lambda inputs: 1 / 0))
    case = toy_case(variants=variants)
    monkeypatch.setattr(_warm, "family_cases", lambda family, device: [case])
    outcome = _warm.run_once(_warm.Task("toy", case.name, "cpu"))
    assert calls == [1.0]
    assert (outcome.ran, outcome.failed) == (1, None)
    assert outcome.errors == {"absent": "ZeroDivisionError: division by zero"}
    assert _warm.run_once(_warm.Task("toy", case.name, "cpu", only=("absent",))).ran == 0
    assert len(calls) == 1
    _warm.run_once(_warm.Task("toy", case.name, "cpu", 0.2))
    assert 4 <= len(calls) <= 12
    case = toy_case(variants=(Variant("unifiedar", "ours", lambda inputs: 1 / 0),))
    assert (
        _warm.run_once(_warm.Task("toy", case.name, "cpu")).failed == "ours failed: ZeroDivisionError: division by zero"
    )


def test_warming_forgets_what_was_chosen_by_timing(tmp_path, monkeypatch):
    monkeypatch.setenv("TORCHINDUCTOR_CACHE_DIR", str(tmp_path))
    (tmp_path / "ab").mkdir()
    for name in ("old.best_config", "new.best_config", "new.py"):
        (tmp_path / "ab" / name).touch()
    os.utime(tmp_path / "ab" / "old.best_config", (1, 1))
    _warm._forget_choices(time.time() - 60)
    assert sorted(path.name for path in (tmp_path / "ab").iterdir()) == ["new.py", "old.best_config"]
