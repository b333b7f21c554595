"""The bench's timer."""

import time

import pytest
import torch

from bench import _time
from bench._time import Timing, measure

CPU = torch.device("cpu")


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
    assert _time.input_sets(_time.CPU_CACHE_BYTES // 2, CPU) == 4
    assert _time.input_sets(_time.CPU_CACHE_BYTES // 4, CPU) == 2  # four of them fit
    assert _time.input_sets(1, CPU) == 2
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
