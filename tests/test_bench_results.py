"""The schema of the bench's results."""

import json

import pytest
import torch
from bench_small import environment, row, timing

from bench import _results
from bench._results import ResultsError, Run
from bench._time import Timing

CPU = torch.device("cpu")


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
