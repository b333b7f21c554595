"""The bench's cases: what is timed, from whose oracle, and what a call launches."""

import dataclasses
import json
import re
import time
from types import SimpleNamespace

import pytest
import torch
from bench_small import ROOT, environment, row, timing, toy_case

from bench import _launches, _results, _scoreboard, _time
from bench.__main__ import main
from bench._case import Variant, against, families, family_cases, prepare, run_family
from bench._results import ResultsError, Run
from bench._time import Launches, captured

CPU = torch.device("cpu")

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


def test_run_family_times_ours_backends_and_peers(tmp_path):
    lines = []
    run = run_family("toy", [toy_case()], CPU, budget_s=0.02, commit="c", report=lines.append)
    (case,) = run.cases
    assert case.best_peer() == ("slow", case.peers["slow"].median_ms)
    assert case.ours.median_ms < case.peers["slow"].median_ms
    assert case.backends["unifiedar eager"].error is None
    assert case.peers["wrong"].error.startswith("ValueError: wrong result")
    assert case.peers["absent"].error == "ZeroDivisionError: division by zero"
    assert case.floor_ms == pytest.approx(32 / run.environment.copy_bytes_per_s * 1e3)
    assert case.floor.startswith("32 bytes at the copy rate of this run")
    assert (case.sets, case.backend, case.dtype) == (2, "eager", "float32")
    assert len(lines) == 5
    assert _results.read(_results.write(run, tmp_path)) == run


def test_slow_cases_take_few_samples_and_say_what_a_time_means():
    calls, lines = [], []

    def slow(inputs):
        return lambda: (time.sleep(0.03), calls.append(None), inputs[0] + 1)[2]

    case = toy_case(variants=[Variant("unifiedar", "ours", slow)], rounds=(2, 3), rate=lambda ms: f"{ms:.0f} apples")
    run = run_family("toy", [case], CPU, budget_s=0.01, report=lines.append)
    assert run.cases[0].ours.samples == 2
    (line,) = lines
    assert re.search(r"\d ms, [3-9]\d apples  \(wall\)", line)


@pytest.mark.parametrize("apart", [False, True])
def test_what_variants_keep_is_released(apart):
    """After each of them, one that fails too, where they are timed apart; else when the case is done."""
    kept, seen = [], []

    def bind(name):
        def call(inputs):
            seen.append((name, [one for one in kept if one != name]))
            if name == "c":
                raise torch.OutOfMemoryError("too large")
            return inputs[0] + 1

        return lambda inputs: (kept.append(name), lambda: call(inputs))[1]

    variants = [Variant(name, "peer" if name != "a" else "ours", bind(name)) for name in "abcd"]
    case = toy_case(variants=variants, apart=apart, release=kept.clear, rounds=(2, 2))
    lines = []
    counted = Launches(1, 1, 0.1)
    run = run_family("toy", [case], CPU, budget_s=0.01, commit="c", count=lambda call: (call(), counted)[1],
                     report=lines.append)  # fmt: skip
    (row,) = run.cases
    assert not kept
    assert {name for name, others in seen if others} == (set() if apart else set("abcd"))
    assert [row.ours.error, row.peers["b"].error, row.peers["d"].error] == [None] * 3
    assert row.peers["c"].error == "OutOfMemoryError: too large"
    assert list(row.launches) == ["a", "b", "d"]

    def unfit(inputs):
        kept.append("check")
        raise ValueError("no oracle")

    run = run_family("toy", [dataclasses.replace(case, check=unfit)], CPU, budget_s=0.01, commit="c")
    assert run.cases[0].ours.error == "ValueError: no oracle"
    assert not kept


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
    cases = [toy_case(), dataclasses.replace(toy_case(), name="second")]

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
    run = run_family("toy", [toy_case(on_matrix_units=True, flops=10**12)], CPU, budget_s=0.01)
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
    """And the way without a kernel of its own, in a graph, is a peer in each, the compiled one where it does not take
    minutes; one row has no unconditional partner."""
    cases = {case.name: case for case in family_cases("depth", "cuda") if case.name.startswith(f"{model}/")}
    assert {f"{model}/r{rows}" for rows in (1, 2, 8, 16, 64)} <= set(cases)
    for case in cases.values():
        peers = [variant.name for variant in case.variants if variant.role == "peer"]
        assert {"depth cache", "depth cache, CUDA graph"} <= set(peers)
        assert ("depth cache, torch.compile" in peers) == (case.shape["D"] == 4 or case.shape["R"] <= 2)
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
    run = run_family("toy", [toy_case()], CPU, budget_s=0.02, commit="c", count=count, report=lines.append)
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
