"""The scoreboard."""

import dataclasses

import torch
from bench_small import ROOT, environment, row, timing, toy_case

from bench import _results, _scoreboard
from bench._case import Variant, family_cases, run_family
from bench._results import Run

CPU = torch.device("cpu")


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
    variants = (*toy_case().variants[:1], Variant("dense", "yardstick", lambda inputs: lambda: inputs[0] + 1, 1000))
    run = run_family("toy", [toy_case(variants=variants)], CPU, budget_s=0.01, commit="c")
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
