"""The certificate of attention."""

import dataclasses

import pytest
import torch

from bench import certificate
from bench.__main__ import main
from unifiedar.ops import Backend, _native, registry


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
