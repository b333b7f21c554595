"""The bench: the timer, the schema of results, the scoreboard and the command."""

import dataclasses
import functools
import importlib
import json
import os
import re
import sys
import threading
import time
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from helpers import interpreter_skip

ROOT = Path(__file__).resolve().parent.parent
# At the end: an installed unifiedar goes before the checkout's.
sys.path.append(str(ROOT))

from bench import _launches, _results, _scoreboard, _start, _time, _warm, certificate  # noqa: E402
from bench.__main__ import main  # noqa: E402
from bench._case import Case, Variant, against, families, family_cases, prepare, run_family  # noqa: E402
from bench._pytest import CLOCK, run  # noqa: E402
from bench._results import CaseResult, Environment, ResultsError, Run  # noqa: E402
from bench._time import Launches, Start, Timing, captured, measure  # noqa: E402
from bench.tune import KNOBS, tune  # noqa: E402
from unifiedar.ops import Backend, _native, registry, residual_quantize  # noqa: E402

CPU = torch.device("cpu")

# ---- the timer -------------------------------------------------------------------------------------------------------


def test_measure_orders_variants_by_their_time():
    result = measure({"slow": [lambda: time.sleep(0.004)], "fast": [lambda: time.sleep(0.001)]}, CPU, budget_s=0.2)
    slow, fast = result["slow"], result["fast"]
    assert list(result) == ["slow", "fast"]
    assert slow.median_ms >= 4
    assert 1 <= fast.median_ms < slow.median_ms
    for timing in (slow, fast):
        assert timing.p10_ms <= timing.median_ms <= timing.p90_ms
        assert timing.samples >= 20
        assert timing.error is None
        assert timing.extra_memory_bytes is None


def test_measure_divides_repeated_calls():
    timing = measure({"tiny": [lambda: None]}, CPU, budget_s=0.05)["tiny"]
    assert timing.method.startswith("wall, ")
    assert timing.median_ms < 0.05


def test_measure_walks_through_the_input_sets():
    counts = [0, 0, 0]

    def call(i):
        def one():
            counts[i] += 1
            time.sleep(0.0005)

        return one

    measure({"variant": [call(i) for i in range(3)]}, CPU, budget_s=0.1, rounds=(30, 30))
    assert min(counts) >= 10
    assert max(counts) - min(counts) <= 5


def test_measure_interleaves_and_turns_the_order():
    order = []
    variants = {name: [lambda name=name: (order.append(name), time.sleep(0.001))] for name in "abc"}
    measure(variants, CPU, rounds=(6, 6))
    rounds = ["".join(order[-18:][i : i + 3]) for i in range(0, 18, 3)]
    assert all(sorted(one) == ["a", "b", "c"] for one in rounds)
    assert {one[0] for one in rounds} == {"a", "b", "c"}


def test_measure_checks_before_it_times():
    calls = []
    seen = {}

    def check(name, output):
        seen[name] = (output, len(calls))
        if output != "right":
            raise ValueError("wrong result")

    variants = {"right": [lambda: "right"], "wrong": [lambda: calls.append(0) or "wrong"]}
    result = measure(variants, CPU, check=check, budget_s=0.01)
    assert seen["right"][0] == "right"
    assert seen["wrong"] == ("wrong", 1)
    assert len(calls) == 1, "a variant that fails its check is not called again"
    assert result["wrong"] == Timing(None, None, None, None, 0, "not timed", "ValueError: wrong result")
    assert result["right"].error is None


def test_measure_keeps_what_a_check_returns():
    shares = {"one": 0.25, "two": None}
    result = measure({name: [lambda: 0] for name in shares}, CPU, check=lambda name, _: shares[name], budget_s=0.01)
    assert {name: timing.differ for name, timing in result.items()} == shares
    assert measure({"alone": [lambda: 0]}, CPU, budget_s=0.01)["alone"].differ is None


def test_measure_keeps_a_variant_that_raises():
    def broken():
        raise RuntimeError("first line\nsecond line")

    result = measure({"broken": [broken], "fine": [lambda: None]}, CPU, budget_s=0.01)
    assert result["broken"].error == "RuntimeError: first line"
    assert result["fine"].median_ms is not None
    assert measure({"broken": [broken]}, CPU)["broken"].error == "RuntimeError: first line"


@pytest.mark.parametrize("after", [1, 3, 10, 40])
def test_measure_keeps_a_variant_that_raises_later(after):
    """At whatever stage: for lack of memory, say."""
    left = [after]

    def breaks():
        left[0] -= 1
        if left[0] < 0:
            raise RuntimeError("no more")
        time.sleep(1e-3)

    result = measure({"breaks": [breaks], "fine": [lambda: None]}, CPU, budget_s=0.2)
    assert result["breaks"].error == "RuntimeError: no more"
    assert result["breaks"].median_ms is None
    assert result["fine"].median_ms is not None
    assert result["fine"].samples >= 20


@pytest.mark.parametrize(
    ("variants", "options", "text"),
    [
        ({}, {}, "at least one variant"),
        ({"a": []}, {}, "at least one call, got none for 'a'"),
        ({"a": [lambda: None]}, {"rounds": (5, 4)}, r"rounds must be .*got \(5, 4\)"),
        ({"a": [lambda: None]}, {"rounds": (0, 4)}, "rounds must be"),
    ],
)
def test_measure_refuses(variants, options, text):
    with pytest.raises(ValueError, match=f"measure: .*{text}"):
        measure(variants, CPU, **options)


def test_percentile():
    assert [_time.percentile([1, 2, 3, 4, 5], share) for share in (0, 0.1, 0.5, 0.9, 1)] == [1, 1.4, 3, 4.6, 5]
    assert _time.percentile([7], 0.9) == 7


def test_input_sets_outgrow_the_cache():
    assert _time.input_sets(3 * _time.CPU_CACHE_BYTES, CPU) == 2
    assert _time.input_sets(_time.CPU_CACHE_BYTES, CPU) == 3
    assert _time.input_sets(1, CPU) == 4
    with pytest.raises(ValueError, match="set_bytes must be positive, got 0"):
        _time.input_sets(0, CPU)


def test_ceilings_are_plausible():
    assert 1e8 < _time.copy_rate(CPU) < 1e13
    assert 1e8 < _time.matmul_rate(CPU) < 1e15


@pytest.mark.gpu
def test_gpu_small_work_is_timed_in_a_graph():
    x = torch.randn(1 << 16, device="cuda")
    timing = measure({"add": [lambda: x + 1]}, "cuda", budget_s=0.1)["add"]
    assert timing.method.startswith("graph of ")
    assert timing.median_ms < 0.05
    assert timing.extra_memory_bytes == 0, "the output is not extra"


@pytest.mark.gpu
def test_gpu_work_that_cannot_be_captured_is_timed_by_events():
    x = torch.randn(1 << 16, device="cuda")
    result = measure({"sync": [lambda: x.sum().item()], "add": [lambda: x + 1]}, "cuda", budget_s=0.1)
    assert result["sync"].method.startswith("events around ")
    assert result["add"].method.startswith("graph of ")
    assert result["sync"].median_ms > result["add"].median_ms


@pytest.mark.gpu
def test_gpu_large_work_is_timed_by_events_and_its_memory_counted():
    x = torch.randn(1 << 28, device="cuda")

    def work():
        y = x + 1
        for _ in range(9):
            y = y.add(1)
        return y

    timing = measure({"work": [work]}, "cuda", budget_s=0.1)["work"]
    assert timing.method == "events"
    assert timing.extra_memory_bytes == x.nbytes
    # Twenty passes over 1 GiB can take no less than at 10 TB/s and hardly longer than at 0.2 TB/s.
    assert 2 < timing.median_ms < 110


# ---- results ---------------------------------------------------------------------------------------------------------


def timing(median, *, error=None, memory=None):
    if error:
        return Timing(None, None, None, None, 0, "not timed", error)
    return Timing(median, 0.9 * median, 1.1 * median, memory, 20, "events")


def environment(**changes):
    values = {
        "device": "Test GPU 9000",
        "kind": "cuda",
        "driver": "1.2",
        "python": "3.11.0",
        "torch": "2.14",
        "triton": None,
        "cuda": "13.0",
        "unifiedar": "0.1.0",
        "commit": "abc123",
        "date": "2026-01-02T03:04:05+00:00",
        "copy_bytes_per_s": 3e12,
        "matmul_flops_per_s": None,
    }
    return Environment(**{**values, **changes})


def row(name="model/forward", ours=1.0, peers=(("peer", 2.0),), **changes):
    values = {
        "name": name,
        "shape": {"N": 8, "C": 4},
        "dtype": "bfloat16",
        "bytes": 1000,
        "flops": 10,
        "floor_ms": 0.25,
        "floor": "1000 bytes at the copy rate",
        "sets": 2,
        "backend": "triton",
        "ours": timing(ours) if isinstance(ours, float) else ours,
        "backends": {"unifiedar eager": timing(3.0)},
        "peers": {name: timing(one) if isinstance(one, float) else one for name, one in peers},
    }
    return CaseResult(**{**values, **changes})


def test_results_survive_a_round_trip(tmp_path):
    failed = row("b/forward", peers=[("peer", timing(0, error="RuntimeError: no"))])
    wrote = Run("codes", environment(), [row(), failed])
    path = _results.write(wrote, tmp_path / "new")
    assert path.name == "codes-test-gpu-9000-abc123.json"
    assert _results.read(path) == wrote
    assert _results.read_all(tmp_path / "new") == [wrote]
    assert [one.name for one in path.parent.iterdir()] == [path.name], "no partial file stays behind"


def test_results_without_a_commit_are_named_by_date(tmp_path):
    path = _results.write(Run("codes", environment(commit=None), [row()]), tmp_path)
    assert path.name == "codes-test-gpu-9000-2026-01-02t03-04-05-00-00.json"


def test_an_absent_folder_holds_no_results(tmp_path):
    assert _results.read_all(tmp_path / "nothing") == []


def _set(path, value):
    def change(document):
        *parents, last = path
        for key in parents:
            document = document[key]
        document[last] = value

    return change


def _drop(*path):
    def change(document):
        *parents, last = path
        for key in parents:
            document = document[key]
        del document[last]

    return change


@pytest.mark.parametrize(
    ("change", "text"),
    [
        (_set(["schema"], 2), "schema must be 1, got 2"),
        (_drop("schema"), "lacks schema"),
        (_drop("environment", "driver"), "environment: lacks driver"),
        (_set(["environment", "kind"], "tpu"), "kind must be cuda or cpu, got 'tpu'"),
        (_set(["environment", "date"], "yesterday"), "date must be ISO 8601"),
        (_set(["environment", "copy_bytes_per_s"], "fast"), "copy_bytes_per_s must be int or float, got 'fast'"),
        (_set(["cases"], {}), "cases must be list"),
        (_set(["cases", 0], 5), r"cases\[0\]: must be an object, got int"),
        (_set(["cases", 0, "extra"], 5), "has unknown fields extra"),
        (_set(["cases", 0, "bytes"], True), "bytes must be int, got True"),
        (_set(["cases", 0, "flops"], -1), "flops must be finite and not negative"),
        (_set(["cases", 0, "shape", "N"], "8"), r"\(model/forward\): shape: N must be int, got '8'"),
        (_set(["cases", 0, "ours", "median_ms"], None), "ours: has neither times nor an error"),
        (_set(["cases", 0, "ours", "p10_ms"], 5.0), "p10_ms <= median_ms <= p90_ms must hold"),
        (_set(["cases", 0, "ours", "error"], "no"), "ours: has both an error and times"),
        (_set(["cases", 0, "peers", "peer", "samples"], 1.5), "peers: peer: samples must be int, got 1.5"),
        (_set(["cases", 0, "ours", "differ"], 1.5), "ours: differ must be at most 1, got 1.5"),
        (_set(["cases", 0, "yardsticks"], {"dense": {"flops": 1}}), "yardsticks: dense: lacks timing"),
        (_set(["cases", 1, "name"], "model/forward"), "name occurs twice"),
    ],
)
def test_bad_results_are_rejected(tmp_path, change, text):
    path = _results.write(Run("codes", environment(), [row(), row("other")]), tmp_path)
    document = json.loads(path.read_text())
    change(document)
    path.write_text(json.dumps(document))
    with pytest.raises(ResultsError, match=text) as caught:
        _results.read(path)
    assert str(path) in str(caught.value)


def test_results_from_before_have_no_share_of_codes(tmp_path):
    path = _results.write(Run("codes", environment(), [row()]), tmp_path)
    document = json.loads(path.read_text())
    del document["cases"][0]["ours"]["differ"]
    path.write_text(json.dumps(document))
    assert _results.read(path).cases[0].ours.differ is None


def test_a_truncated_file_is_rejected(tmp_path):
    path = _results.write(Run("codes", environment(), [row()]), tmp_path)
    path.write_text(path.read_text()[:100])
    with pytest.raises(ResultsError, match="not a readable JSON file"):
        _results.read_all(tmp_path)


def test_an_unwritable_run_leaves_no_file(tmp_path):
    with pytest.raises(ResultsError, match="p10_ms <= median_ms"):
        _results.write(Run("codes", environment(), [row(ours=Timing(1.0, 2.0, 3.0, None, 5, "events"))]), tmp_path)
    assert list(tmp_path.iterdir()) == []


def test_the_environment_describes_this_machine(monkeypatch):
    monkeypatch.setenv("UNIFIEDAR_COMMIT", "feedbeef")
    here = _results.environment(CPU, copy_bytes_per_s=1e10)
    assert (here.kind, here.commit, here.torch) == ("cpu", "feedbeef", torch.__version__)
    assert here.driver is None
    assert _results.environment(CPU, copy_bytes_per_s=1e10, commit="given").commit == "given"


# ---- cases -----------------------------------------------------------------------------------------------------------


def test_outputs_are_held_against_the_oracle():
    oracle = [torch.tensor([1.0, -2.0], dtype=torch.float64)]
    eager = [torch.tensor([1.001, -2.0])]
    check = against(oracle, eager, peer_tolerance=1e-2)
    ours, peer = Variant("ours", "ours", None), Variant("peer", "peer", None)
    check(ours, torch.tensor([1.002, -2.0]))
    check(peer, torch.tensor([1.01, -2.0]))
    with pytest.raises(ValueError, match="wrong result: output 0 is off by"):
        check(ours, torch.tensor([1.0021, -2.0]))
    with pytest.raises(ValueError, match="wrong result"):
        check(peer, torch.tensor([1.1, -2.0]))
    with pytest.raises(ValueError, match="wrong result"):
        check(ours, torch.tensor([torch.nan, -2.0]))
    with pytest.raises(ValueError, match=r"wrong shapes: \[\(3,\)\]"):
        check(peer, torch.zeros(3))


def _case(**changes):
    def make(seed, device):
        return (torch.full((4,), float(seed + 1), device=device),)

    def slow(inputs):
        return lambda: (time.sleep(0.002), inputs[0] + 1)[1]

    values = {
        "name": "toy/add",
        "shape": {"N": 4},
        "dtype": torch.float32,
        "bytes": 32,
        "flops": 4,
        "make": make,
        "variants": (
            Variant("unifiedar", "ours", lambda inputs: lambda: inputs[0] + 1),
            Variant("unifiedar eager", "backend", lambda inputs: lambda: inputs[0] + 1),
            Variant("slow", "peer", slow),
            Variant("wrong", "peer", lambda inputs: lambda: inputs[0] + 2),
            Variant("absent", "peer", lambda inputs: 1 / 0),
        ),
        "check": lambda inputs: against([inputs[0].double() + 1], [inputs[0] + 1], peer_tolerance=1e-6),
        "backend": lambda inputs: "eager",
    }
    return Case(**{**values, **changes})


def test_run_family_times_ours_backends_and_peers(tmp_path):
    lines = []
    run = run_family("toy", [_case()], CPU, budget_s=0.02, commit="c", report=lines.append)
    (case,) = run.cases
    assert case.best_peer() == ("slow", case.peers["slow"].median_ms)
    assert case.ours.median_ms < case.peers["slow"].median_ms
    assert case.backends["unifiedar eager"].error is None
    assert case.peers["wrong"].error.startswith("ValueError: wrong result")
    assert case.peers["absent"].error == "ZeroDivisionError: division by zero"
    assert case.floor_ms == pytest.approx(32 / run.environment.copy_bytes_per_s * 1e3)
    assert case.floor.startswith("32 bytes at the copy rate of this run")
    assert (case.sets, case.backend, case.dtype) == (4, "eager", "float32")
    assert len(lines) == 5
    assert _results.read(_results.write(run, tmp_path)) == run


def test_slow_cases_take_few_samples_and_say_what_a_time_means():
    calls, lines = [], []

    def slow(inputs):
        return lambda: (time.sleep(0.03), calls.append(None), inputs[0] + 1)[2]

    case = _case(variants=[Variant("unifiedar", "ours", slow)], rounds=(2, 3), rate=lambda ms: f"{ms:.0f} apples")
    run = run_family("toy", [case], CPU, budget_s=0.01, report=lines.append)
    assert run.cases[0].ours.samples == 2
    (line,) = lines
    assert re.search(r"\d ms, [3-9]\d apples  \(wall\)", line)


def test_a_slow_round_warms_up_enough(monkeypatch):
    monkeypatch.setattr(_time, "SLOW_S", 0.02)
    monkeypatch.setattr(_time, "WARM_UP_S", 0.01)
    turns = []
    for pause, expected in ((0.05, 1), (0.006, 2)):
        turns.clear()
        one = SimpleNamespace(sample=lambda pause=pause: (time.sleep(pause), turns.append(None)))
        assert _time._warm_up(iter([one.sample])) >= pause
        assert len(turns) == expected


def test_an_interrupt_keeps_what_was_measured(monkeypatch):
    cases = [_case(), dataclasses.replace(_case(), name="second")]

    def interrupted(case, device):
        if case.name == "second":
            raise KeyboardInterrupt
        return prepare(case, device)

    monkeypatch.setattr("bench._case.prepare", interrupted)
    lines, kept = [], []
    run = run_family("toy", cases, CPU, budget_s=0.02, commit="c", report=lines.append, keep=kept.append)
    assert [case.name for case in run.cases] == [cases[0].name]
    assert "second" in lines[-1]
    assert [[case.ours for case in one.cases] for one in kept] == [[run.cases[0].ours]], "what a killed run leaves"
    assert kept[0].cases[0].floor_ms > 0
    with pytest.raises(KeyboardInterrupt):
        run_family("toy", cases[1:], CPU)


def test_matrix_work_has_a_floor_by_operations():
    run = run_family("toy", [_case(on_matrix_units=True, flops=10**12)], CPU, budget_s=0.01)
    assert run.cases[0].floor_ms == pytest.approx(1e12 / run.environment.matmul_flops_per_s * 1e3)
    assert "FLOP at the matrix product rate" in run.cases[0].floor


@pytest.mark.parametrize("device", ["cpu", "cuda"])
@pytest.mark.parametrize("family", families())
def test_every_family_lists_cases(family, device):
    cases = family_cases(family, device)
    assert cases
    assert len({case.name for case in cases}) == len(cases)
    for case in cases:
        names = [variant.name for variant in case.variants]
        assert len(set(names)) == len(names)
        assert [variant.role for variant in case.variants].count("ours") == 1
        assert case.bytes > 0
        assert (ROOT / "bench" / f"test_{family}.py").is_file()


@pytest.mark.parametrize("model", ["width-1024", "vila-u-256", "vila-u-384", "rq-1.4b", "rq-3.8b", "qwen3-tts-0.6b"])
def test_depth_decoding_has_cases_of_few_and_many_rows(model):
    """And the way without a kernel of its own, in a graph, is a peer in each; one row has no unconditional partner."""
    cases = {case.name: case for case in family_cases("depth", "cuda") if case.name.startswith(f"{model}/")}
    assert {f"{model}/r{rows}" for rows in (1, 2, 8, 16, 64)} <= set(cases)
    for case in cases.values():
        peers = [variant.name for variant in case.variants if variant.role == "peer"]
        assert {"depth cache", "depth cache, CUDA graph", "depth cache, torch.compile"} <= set(peers)
        positions = case.shape["R"] if model.startswith("qwen") else max(case.shape["R"] // 2, 1)
        noise = 4 * positions * case.shape["D"] * case.shape["K"]
        assert (case.bytes - noise) % 2 == 0
        assert case.bytes - noise == cases[f"{model}/r2"].bytes - 4 * case.shape["D"] * case.shape["K"] * (
            2 if model.startswith("qwen") else 1
        ), "weights are read once, however many rows there are"


@pytest.mark.parametrize(
    ("model", "batches", "trained"), [("d16", (1, 8, 64), 64), ("d30", (1, 8, 32), 16), ("d36", (1, 8), 4)]
)
def test_var_has_cases_of_drawing_and_training(model, batches, trained):
    """Beside the published code as it is, with compiled blocks, and with ours swapped in."""
    cases = {case.name: case for case in family_cases("var", "cuda")}
    names = [f"var-{model}/generate-b{batch}" for batch in batches] + [f"var-{model}/train-b{trained}"]
    for name in names:
        roles = {variant.name: variant.role for variant in cases[name].variants}
        assert roles["published"] == roles["published, blocks under torch.compile"] == "peer"
        assert roles["published, accelerated"] == "backend"
        assert cases[name].on_matrix_units
    # 310 M weights at depth 16; every weight once forward, twice backward, for each of 680 tokens of 64 pictures.
    if model == "d16":
        case = cases["var-d16/train-b64"]
        assert 2.9e8 < case.bytes / 12 < 3.3e8
        assert 0.5 < case.flops / (6 * 64 * 680 * 2.05e8) < 1.5


def test_published_var_is_what_ours_is_held_against():
    """All ways of drawing and training pass their checks; a wrong gradient, codes or pictures do not."""
    cases = {case.name: case for case in family_cases("var", CPU)}
    drawing, training = (prepare(cases[f"var-small/{what}"], CPU) for what in ("generate-b1", "train-b2"))
    for one in (drawing, training):
        outputs = {name: calls[0]() for name, calls in one.calls.items()}
        for name, output in outputs.items():
            one.check(name, output)
    assert list(outputs) == ["unifiedar", "published, accelerated", "published"]
    for key in ("loss", "blocks.0.attn.mat_qkv.weight"):
        with pytest.raises(ValueError, match=f"wrong result: {key} is off"):
            training.check("unifiedar", {**outputs["unifiedar"], key: outputs["unifiedar"][key] * 1.001})
    *codes, pictures = drawing.calls["published"][0]()
    with pytest.raises(ValueError, match="wrong codes"):
        drawing.check("published", (*((one + 1) % 4096 for one in codes), pictures))
    with pytest.raises(ValueError, match="wrong pictures"):
        drawing.check("published, accelerated", (pictures.flip(2),))


def test_depth_cases_decode_as_defined():
    """Ours and all peers, with guidance and, of one row, without."""
    for case in family_cases("depth", CPU):
        prepared = prepare(case, CPU)
        for name, calls in prepared.calls.items():
            prepared.check(name, calls[0]())


def test_least_traffic_of_the_code_embedding():
    cases = {case.name: case for case in family_cases("codes", "cuda")}
    # 8192 x 4 codes of 16384 touch 16384 (1 - (1 - 1/16384)^32768) = 14166.6 distinct rows of 2 KiB.
    n, k, c, d = 8192, 16384, 1024, 4
    rows = k * (1 - (1 - 1 / k) ** (n * d))
    forward = 8 * n * d + 2 * rows * c + 2 * n * c
    assert cases["vila-u-256/forward"].shape == {"N": n, "K": k, "C": c, "D": d, "tables": 1}
    assert cases["vila-u-256/forward"].bytes == round(forward)
    assert cases["vila-u-256/cumulative"].bytes == round(forward + 2 * n * c * (d - 1))
    assert cases["vila-u-256/backward"].bytes == round(forward + 2 * n * c + 2 * k * c)
    assert cases["vila-u-256-large/forward"].shape["N"] == 65536


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

    other = dataclasses.replace(_case(), variants=(variant("other", 0.5),))
    case = dataclasses.replace(_case(), variants=(variant("one", 0.01),), other=lambda: other)
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
    run = run_family("toy", [_case()], CPU, budget_s=0.02, commit="c", start=start, report=lines.append)
    names = [variant.name for variant in _case().variants]
    assert asked == [("toy/add", name) for name in names]
    assert any("cold 1234 ms, preparing 0.25 ms" in line for line in lines)
    assert _results.read(_results.write(run, tmp_path / "results")).cases[0].starts == run.cases[0].starts
    text = _scoreboard.write(tmp_path / "results", tmp_path / "docs").read_text()
    assert "| toy/add | unifiedar | 1234.5 | – | 0.2500 |" in text
    assert "ImportError: no \\| such" in text


def test_beginnings_side_by_side(tmp_path, matplotlib):
    """All of them are under way before one ends, and the file and the scoreboard say so."""
    names = {variant.name for variant in _case().variants}
    together = threading.Barrier(len(names), timeout=60)

    def start(case, name):
        together.wait()
        return Start(1.0, None, float(len(name)))

    run = run_family("toy", [_case()], CPU, budget_s=0.02, commit="c", start=start, starts_at_once=99)
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
    case = _case(variants=variants)
    monkeypatch.setattr(_warm, "family_cases", lambda family, device: [case])
    outcome = _warm.run_once(_warm.Task("toy", case.name, "cpu"))
    assert calls == [1.0]
    assert (outcome.ran, outcome.failed) == (1, None)
    assert outcome.errors == {"absent": "ZeroDivisionError: division by zero"}
    assert _warm.run_once(_warm.Task("toy", case.name, "cpu", only=("absent",))).ran == 0
    assert len(calls) == 1
    _warm.run_once(_warm.Task("toy", case.name, "cpu", 0.2))
    assert 4 <= len(calls) <= 12
    case = _case(variants=(Variant("unifiedar", "ours", lambda inputs: 1 / 0),))
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


# ---- what a call launches --------------------------------------------------------------------------------------------


def test_launches_are_tallied_from_events():
    """Host calls that start something, kernels one by one, and the union of their times."""
    events = [
        ("cudaGraphLaunch", False, 0, 10), ("cudaLaunchKernelExC", False, 10, 20), ("cuLaunchKernel", False, 20, 30),
        ("cudaMemcpyAsync", False, 30, 40), ("cudaStreamSynchronize", False, 40, 990), ("aten::add", False, 5, 900),
        ("inner", True, 300, 400), ("one", True, 100, 300), ("over", True, 200, 500), ("later", True, 900, 1000),
    ]  # fmt: skip
    found = _launches.tally(_launches.Seen(on, name, begin, end) for name, on, begin, end in events)
    assert found == Launches(4, 4, 500 / 1e6)
    assert _launches.tally([]) == Launches(0, 0, 0.0)


def test_launches_want_a_gpu():
    called = []
    assert _launches.counted(lambda: called.append(1), "cpu").error == "needs a GPU"
    assert not called


@pytest.mark.gpu
def test_gpu_launches_of_single_kernels_and_of_a_graph():
    x = torch.ones(1 << 24, device="cuda")

    def call():
        return (x + 1) * 2

    def fails():
        raise RuntimeError("no way")

    call()
    alone, graph = _launches.counted(call, "cuda"), _launches.counted(captured(call), "cuda")
    assert (alone.launches, alone.kernels, alone.error) == (2, 2, None)
    assert (graph.launches, graph.kernels, graph.error) == (1, 2, None)
    assert 0.02 < alone.busy_ms < 5
    assert 0.5 < graph.busy_ms / alone.busy_ms < 2
    assert _launches.counted(fails, "cuda").error == "RuntimeError: no way"
    assert "saw nothing" in _launches.counted(lambda: None, "cuda").error


def test_run_family_counts_launches(tmp_path, matplotlib):
    """Of what could be timed; the share is that of the time of the same variant."""
    called = []

    def count(call):
        called.append(call())
        return Launches(12, 3456, 0.5) if len(called) == 1 else Launches(None, None, None, "RuntimeError: no | such")

    lines = []
    run = run_family("toy", [_case()], CPU, budget_s=0.02, commit="c", count=count, report=lines.append)
    assert list(run.cases[0].launches) == ["unifiedar", "unifiedar eager", "slow"]
    assert any("12 launches, 3456 kernels, busy for 0.500 ms" in line for line in lines)
    case = dataclasses.replace(run.cases[0], ours=timing(2.0))
    run = dataclasses.replace(run, cases=[case])
    assert _results.read(_results.write(run, tmp_path / "results")).cases[0].launches == case.launches
    text = _scoreboard.write(tmp_path / "results", tmp_path / "docs").read_text()
    assert "| toy/add | unifiedar | 12 | 3,456 | 0.5000 | 25 % |" in text
    assert "RuntimeError: no \\| such" in text


@pytest.mark.parametrize(
    ("count", "text"),
    [
        ({"launches": 1, "kernels": None, "busy_ms": 1.0, "error": None}, "either all counts or an error"),
        ({"launches": 1, "kernels": 1, "busy_ms": 1.0, "error": "no"}, "either all counts or an error"),
        ({"launches": 1, "kernels": 1, "busy_ms": -1.0, "error": None}, "finite and not negative"),
        ({"launches": 1, "kernels": 1, "busy_ms": 1.0}, "lacks error"),
    ],
)
def test_results_refuse_wrong_counts(tmp_path, count, text):
    path = _results.write(Run("codes", environment(), [row()]), tmp_path)
    document = json.loads(path.read_text())
    document["cases"][0]["launches"] = {"ours": count}
    path.write_text(json.dumps(document))
    with pytest.raises(ResultsError, match=text):
        _results.read(path)
    del document["cases"][0]["launches"]
    path.write_text(json.dumps(document))
    assert _results.read(path).cases[0].launches == {}, "files from before have none"


def test_command_counts_launches(tmp_path, capsys):
    arguments = ["norm", "--device", "cpu", "--launches", "--budget", "0.01", "--commit", "me", "--out", str(tmp_path)]
    assert main(arguments) == 0
    (run,) = _results.read_all(tmp_path)
    assert {one.error for case in run.cases for one in case.launches.values()} == {"needs a GPU"}


def test_peers_of_attention_agree_with_the_definition():
    """Those that the CPU can run: every backend of SDPA takes the mask that the math one takes here."""
    from torch.nn.attention import SDPBackend

    from bench import cases_attention as cases

    model = cases.Model("small", 2, 3, 32, ((1, 4, 9), (5, 16)))
    q, k, v = (torch.randn(2, 3, 35, 32, generator=torch.Generator().manual_seed(i)) for i in range(3))
    want = cases._ours(model, q, "eager")(q, k, v)
    for backend in (None, SDPBackend.MATH):
        torch.testing.assert_close(cases._masked(model, q, backend)(q, k, v), want)
    assert cases._bias(model, q).stride(0) % 8 == 0
    on_gpu = [variant.name for variant in cases._variants(model, "forward", False)]
    assert {"SDPA + mask, efficient", "SDPA + mask, cuDNN", "SDPA + mask, math", "cuDNN, no mask"} < set(on_gpu)
    assert len(set(on_gpu)) == len(on_gpu)
    assert not cases._found("no.such.module")


# ---- the scoreboard --------------------------------------------------------------------------------------------------


@pytest.fixture
def matplotlib():
    return pytest.importorskip("matplotlib")


def _board(tmp_path, *runs):
    for one in runs:
        _results.write(one, tmp_path / "results")
    return _scoreboard.write(tmp_path / "results", tmp_path / "docs").read_text()


def _line(text, start):
    return next(line for line in text.splitlines() if line.startswith(start))


def test_scoreboard_of_nothing_says_so(tmp_path):
    text = _board(tmp_path)
    assert "Nothing has been measured yet" in text
    assert "|" not in text
    assert [path.name for path in (tmp_path / "docs").iterdir()] == ["scoreboard.md"]


def test_scoreboard_names_winners_and_losers(tmp_path, matplotlib):
    wins = row("a/forward", ours=1.0, peers=[("fast peer", 2.0), ("slow peer", 4.0)])
    loses = row("b/forward", ours=1.0, peers=[("fast peer", 0.5), ("slow peer", 4.0)])
    alone = row("c/forward", ours=2.0, peers=[("fast peer", timing(0, error="RuntimeError: a | b"))])
    failed = row("d/forward", ours=timing(0, error="ValueError: broken"), peers=[("slow peer", 4.0)])
    text = _board(tmp_path, Run("codes", environment(), [wins, loses, alone, failed]))

    head = [cell.strip() for cell in _line(text, "| case |").strip("|").split("|")]
    cells = {name: dict(zip(head, (c.strip() for c in _line(text, f"| {name}").strip("|").split("|")), strict=False))
             for name in ("a/forward", "b/forward", "d/forward")}  # fmt: skip
    a, b, d = cells["a/forward"], cells["b/forward"], cells["d/forward"]
    assert (a["fast peer"], a["slow peer"], a["best peer"], a["ratio"]) == ("2.000", "4.000", "fast peer", "2.00×")
    assert a["of floor"] == "25 %"
    assert a["ours (p10–p90, backend)"] == "1.000 (0.9000–1.100, triton)"
    assert (b["fast peer"], b["slow peer"]) == ("**0.5000**", "4.000")
    assert (b["best peer"], b["ratio"]) == ("**fast peer**", "0.50×")
    assert (d["best peer"], d["ratio"], d["of floor"]) == ("**slow peer**", "–", "–")
    assert "- b/forward: **fast peer** (2.00× faster)" in text
    assert "- d/forward: **slow peer** (ours failed)" in text
    assert "- c/forward, fast peer: RuntimeError: a \\| b" in text
    assert "- a/forward:" not in text
    assert "copy 3,000 GB/s" in text
    assert "no triton" in text
    assert "| a/forward | 3.000 |" in text, "the table of backends"
    assert "| case | floor, ms | ours | unifiedar eager | fast peer | slow peer |" in text
    assert "| a/forward | 0.2500 | 25 % | 8 % | 12 % | 6 % |" in text, "the floor over everyone's time"
    assert "| c/forward | 0.2500 | 12 % | 8 % | – | – |" in text
    assert "| d/forward | 0.2500 | – | 8 % | – | 6 % |" in text

    svg = (tmp_path / "docs" / "scoreboard-codes-test-gpu-9000.svg").read_text()
    assert "(scoreboard-codes-test-gpu-9000.svg)" in text
    assert "2.00× (fast peer)" in svg
    assert "0.50× (fast peer)" in svg
    assert "d/forward" not in svg


def test_scoreboard_sets_ours_beside_yardsticks(tmp_path, matplotlib):
    dense = _results.Yardstick(timing(4.0), 8 * 10**9)
    one = row("a/forward", ours=2.0, flops=10**9, yardsticks={"dense": dense})
    bad = row("b/forward", yardsticks={"dense": _results.Yardstick(timing(0, error="RuntimeError: no"), 1)})
    run = Run("attention", environment(), [one, bad, row("c/forward")])
    assert _results.read(_results.write(run, tmp_path / "results")) == run
    text = _scoreboard.write(tmp_path / "results", tmp_path / "docs").read_text()
    lines = text[text.index("Beside what computes something else") :].splitlines()
    assert lines[3:7] == [
        "| case | ours | dense |",
        "| --- | --- | --- |",
        "| a/forward | 0.5 (2.000) | 2.0 (4.000) |",
        "| b/forward | 0.0 (1.000) | failed |",
    ]
    assert not any(line.startswith("| c/forward") for line in lines)
    assert "dense" not in _line(text, "| a/forward | N")


def test_run_family_keeps_yardsticks_with_their_operations(tmp_path):
    variants = (*_case().variants[:1], Variant("dense", "yardstick", lambda inputs: lambda: inputs[0] + 1, 1000))
    run = run_family("toy", [_case(variants=variants)], CPU, budget_s=0.01, commit="c")
    (found,) = run.cases[0].yardsticks.items()
    assert found == ("dense", _results.Yardstick(found[1].timing, 1000))
    assert found[1].timing.median_ms > 0
    assert run.cases[0].peers == {}
    for case in family_cases("attention", "cuda"):
        for variant in case.variants:
            assert (variant.flops is not None) == (variant.role == "yardstick")
            assert variant.flops is None or variant.flops >= case.flops


def test_scoreboard_shows_codes_unlike_float64(tmp_path, matplotlib):
    def chosen(share):
        return dataclasses.replace(timing(1.0), differ=share)

    one = row("a/quantize", ours=chosen(0.0), peers=[("TF32", chosen(0.0125)), ("other", 2.0)])
    text = _board(tmp_path, Run("codes", environment(), [one, row("b/forward")]))
    lines = text[text.index("Codes that are not the ones that float64 chooses") :].splitlines()
    assert lines[2:] == ["| case | ours | TF32 |", "| --- | --- | --- |", "| a/quantize | 0.0 | 12,500.0 |"]
    assert "float64 chooses" not in _board(tmp_path / "none", Run("codes", environment(), [row("b/forward")]))


def test_scoreboard_says_when_no_peer_wins(tmp_path, matplotlib):
    text = _board(tmp_path, Run("codes", environment(), [row()]))
    assert "No peer wins on any of these cases." in text
    assert "Peers that win" not in text


def test_scoreboard_shows_the_newest_result_of_each_case(tmp_path, matplotlib):
    old = Run("codes", environment(commit="old"), [row("a", ours=9.0), row("b", ours=8.0)])
    new = Run("codes", environment(commit="new", date="2026-02-02T03:04:05+00:00"), [row("a", ours=1.0)])
    other = Run("codes", environment(device="Other", commit="old"), [row("a", ours=7.0)])
    text = _board(tmp_path, old, new, other)
    sections = text.split("\n## ")[1:]
    assert [one.splitlines()[0] for one in sections] == [
        "codes on Other",
        "codes on Test GPU 9000",
        "codes on Test GPU 9000",
    ]
    assert [("| a | N" in one, "| b | N" in one) for one in sections] == [(True, False), (True, False), (False, True)]
    assert "| 1.000 (" in sections[1]
    assert "9.000" not in text
    plots = {path.name for path in (tmp_path / "docs").glob("*.svg")}
    assert len(plots) == 3
    assert all(f"({name})" in text for name in plots)


def test_scoreboard_is_the_same_every_time(tmp_path, matplotlib):
    text = _board(tmp_path, Run("codes", environment(), [row()]))
    svg = tmp_path / "docs" / "scoreboard-codes-test-gpu-9000.svg"
    before = svg.read_bytes()
    assert _board(tmp_path) == text
    assert svg.read_bytes() == before


def test_the_committed_scoreboard_is_what_the_committed_results_give(tmp_path, matplotlib):
    docs = tmp_path / "docs"
    docs.mkdir()
    text = _scoreboard.render(_results.read_all(), docs)
    assert (ROOT / "docs" / "scoreboard.md").read_text() == text
    for plot in docs.glob("*.svg"):
        assert (ROOT / "docs" / plot.name).is_file()


# ---- the command and pytest-benchmark --------------------------------------------------------------------------------


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
        run(_case(), "wrong", None)
    broken = Variant("unifiedar", "ours", lambda inputs: lambda: inputs[0] + 2)
    with pytest.raises(ValueError, match="wrong result"):
        run(dataclasses.replace(_case(), variants=(broken,)), "unifiedar", None)


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


# ---- the certificate of attention ------------------------------------------------------------------------------------


def _certificate(tmp_path, *arguments):
    page = tmp_path / "page.md"
    given = ["--device", "cpu", "--cases", "13", "--longest", "30", "--page", str(page), *arguments]
    return main(["certificate", *given]), page.read_text() if page.is_file() else ""


def test_certificate_holds_and_keeps_other_devices(tmp_path, monkeypatch):
    monkeypatch.setattr(certificate, "DTYPES", (torch.float32,))
    monkeypatch.setattr(_native, "triton_unfit", lambda tensor: "not here")
    (tmp_path / "page.md").write_text("# old head\n\n## Another GPU\n\n| a | row |\n")
    done, text = _certificate(tmp_path)
    assert done == 0
    assert "## Another GPU\n\n| a | row |\n" in text
    assert "old head" not in text
    rows = [line for line in text.splitlines() if "| eager |" in line]
    assert len(rows) == 2 * 13
    assert all("| 1 of 1 | holds |" in row for row in rows)
    assert _certificate(tmp_path) == (0, text), "the same cases every time"


@pytest.mark.parametrize("what", ["forward", "gradient", "repeat", "eager"])
def test_certificate_finds_what_is_wrong(tmp_path, monkeypatch, what, capsys):
    """A backend that is off by little, in one element, or once; or a definition that is wrong itself."""
    monkeypatch.setattr(certificate, "DTYPES", (torch.float32,))
    op, back = (registry[name] for name in ("block_causal_attention", "block_causal_attention_backward"))
    calls = []

    def run(*args):
        out, lse = op._eager.run(*args)
        calls.append(None)
        if what == "forward" or (what == "repeat" and len(calls) == 2):
            out.view(-1)[-1] += 1e-4 if what == "forward" else 1e-6
        return out, lse

    def run_back(*args):
        gradients = back._eager.run(*args)
        if what == "gradient":
            gradients[2].view(-1)[0] += 1e-4
        return gradients

    def fits(*args):
        return None

    if what == "eager":
        wrong = dataclasses.replace(op._eager, run=lambda q, k, v, *rest: op._eager.run(q, k, v.flip(2), *rest))
        monkeypatch.setitem(op._by_name, "eager", wrong)
    else:
        for one, runs in ((op, run), (back, run_back)):
            fake = Backend("triton", runs, fits)
            monkeypatch.setattr(one, "backends", (fake, one._eager))
            monkeypatch.setitem(one._by_name, "triton", fake)
    done, text = _certificate(tmp_path)
    assert done == 1
    assert ("**WRONG**" in text) == (what != "repeat")
    assert ("| 0 of 1 |" in text) == (what == "repeat")
    assert "block_causal_attention" in capsys.readouterr().err


def test_certificate_of_several_processes_is_that_of_one(tmp_path, monkeypatch):
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)  # so that processes of their own find no Triton either
    monkeypatch.setattr(_native, "triton_unfit", lambda tensor: "not here")
    sizes = ("--head-size", "128", "--head-size", "32")
    one, several = _certificate(tmp_path, *sizes), _certificate(tmp_path, *sizes, "--jobs", "2")
    assert one[0] == 0
    assert one[1].count("| eager |") == 2 * 3 * 2
    assert several == one


def test_certificate_refuses_no_cases(capsys):
    assert main(["certificate", "--device", "cpu", "--cases", "0"]) == 2
    assert "--cases must be at least 1, got 0" in capsys.readouterr().err
