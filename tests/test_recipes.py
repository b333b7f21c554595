"""The training recipes: every command they would run is one that the package understands, in an order that works."""

import os
import subprocess
from pathlib import Path

import pytest

from unifiedar import data
from unifiedar.train import tower, unified, vae, var

RECIPES = Path(__file__).parent.parent / "docs" / "recipes"
# Stands for python3 and torchrun: notes what was asked for, and makes the index that later commands look for.
RECORDER = """#!/usr/bin/env bash
printf '%s\\x1f' "$(basename "$0")" "$@" >> "$RECORD"; printf '\\n' >> "$RECORD"
mkdir -p "$OUT"/{all,data}; touch "$OUT/all/tokenizer.json"
"""


@pytest.mark.skipif(not RECIPES.is_dir(), reason="recipes are in a checkout, not in a source distribution")
@pytest.mark.parametrize("recipe", ["emoji.sh", "food.sh", "var.sh"])
def test_recipe(tmp_path, monkeypatch, recipe):
    first, second = ("vae", "var") if recipe == "var.sh" else ("tower", "unified")
    for name in ("python3", "torchrun"):
        (tmp_path / name).write_text(RECORDER)
        (tmp_path / name).chmod(0o755)
    record, out = tmp_path / "record", tmp_path / "out"
    (out / first).mkdir(parents=True)
    (out / second).mkdir()
    environment = os.environ | {"PATH": f"{tmp_path}:{os.environ['PATH']}", "RECORD": str(record), "OUT": str(out)}
    command = ["bash", str(RECIPES / recipe), str(tmp_path / "packages"), str(out)]
    done = subprocess.run(command, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr

    calls = [line.split("\x1f")[:-1] for line in record.read_text().splitlines()]
    ours = [call[call.index("unifiedar") + 1 :] for call in calls if "unifiedar" in call]
    kinds = [call[:2] if call[0] in ("train", "data", "bench") else call[:1] for call in ours]
    steps = [["train", first], ["train", second], ["train", "export"], ["bench", "quality"]]
    assert kinds[-len(steps) :] == steps
    assert ["data", "emoji"] in kinds
    monkeypatch.setattr(data.emoji, "build", _enough)
    for _, word, *rest in ours:
        if word in (first, second):
            args = {"tower": tower, "unified": unified, "vae": vae, "var": var}[word].parse(rest)
            assert args.out == out / word
            if word == second:
                assert getattr(args, first) == out / first / "model"
        elif word == "export":
            assert rest == ["--model", str(out / second / "model"), "--out", str(out / "model")]
        elif word == "quality":
            assert rest[:4] == ["--data", str(out / "data"), "--model", str(out / "model")]
        else:
            with pytest.raises(_Enough):
                data.emoji.main(rest)


class _Enough(Exception):
    """Options were understood; nothing is to be rendered."""


def _enough(*_args: object, **_options: object) -> None:
    raise _Enough
