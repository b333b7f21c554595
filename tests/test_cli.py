"""The command: what a person types, what comes back, and one line for everything that can go wrong.

A stand-in model answers at once, so that this is about the command; the last tests run the weights that ship.
"""

import io
import json
import os
import re
import subprocess
import sys
import types
import zlib
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

import unifiedar
from unifiedar import checkpoints, cli

SIZE = 16


class StandIn:
    """Draws one colour, a function of prompt and seed; names a picture after its mean; rounds it down as its codes."""

    image_size, image_tokens, max_prompt_tokens = SIZE, 4, 5
    fits = 10_000  # pictures at a time

    def __init__(self):
        self.tokenizer = types.SimpleNamespace(encode=str.split)
        self.calls = []

    def _call(self, count, **options):
        if count > self.fits:
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 20.00 GiB.\nGPU 0 has ...")
        self.calls.append((count, options))

    def generate(self, prompts, *, seed, progress, **options):
        self._call(len(prompts), seed=seed, **options)
        for _ in range(self.image_tokens):
            progress(1)
        colours = [zlib.crc32(f"{prompt} {s}".encode()) for prompt, s in zip(prompts, seed, strict=True)]
        rows = torch.tensor([[c & 255, c >> 8 & 255, c >> 16 & 255] for c in colours], dtype=torch.uint8)
        return rows[:, :, None, None].expand(-1, -1, SIZE, SIZE)

    def describe(self, images, *, answers, beams):
        self._call(len(images), answers=answers, beams=beams)
        names = [f"mean {image.float().mean():.0f}" for image in images]
        return [[(f"{name}, guess {i}", -0.5 - i) for i in range(answers)] for name in names]

    def reconstruct(self, images):
        self._call(len(images))
        return images // 4 * 4, images[:, 0, :2, :2, None].long().expand(-1, -1, -1, 3)


@pytest.fixture
def model(monkeypatch, tmp_path):
    """The stand-in, as the default model, in a working folder of its own."""
    standin = StandIn()
    (tmp_path / "weights").mkdir()
    (tmp_path / "work").mkdir()
    monkeypatch.setattr(cli, "DEFAULT_MODEL", str(tmp_path / "weights"))
    monkeypatch.setattr(cli, "_from_checkpoint", lambda path, device, dtype, vae: standin)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.chdir(tmp_path / "work")
    return standin


@pytest.fixture
def run(capsys):
    """Runs the command; (exit code, stdout, stderr)."""

    def run(*argv):
        code = cli.main([str(arg) for arg in argv])
        out, err = capsys.readouterr()
        assert "Traceback" not in err
        return code, out, err

    return run


@pytest.fixture
def pictures(tmp_path):
    """A folder of three pictures in the model's size, light, dark and red, and a text file."""
    folder = tmp_path / "pictures"
    folder.mkdir()
    for name, colour in (("dark", (10, 10, 10)), ("light", (201, 201, 201)), ("red", (255, 0, 3))):
        Image.new("RGB", (SIZE, SIZE), colour).save(folder / f"{name}.png")
    (folder / "notes.txt").write_text("not a picture")
    return folder


def error_lines(err):
    lines = err.splitlines()
    assert all(line.startswith(("unifiedar: error: ", "unifiedar: note: ")) for line in lines), err
    return [line.removeprefix("unifiedar: error: ") for line in lines if "error: " in line]


def expect_one_error(result, *words, code=1):
    assert result[0] == code
    (line,) = error_lines(result[2])
    assert len(line) < 400
    for word in words:
        assert str(word) in line


def expect_usage_error(result, *words):
    code, out, err = result
    assert code == 2
    assert out == ""
    assert err.startswith("usage: unifiedar")
    for word in words:
        assert str(word) in err.splitlines()[-1]


def files():
    return sorted(str(path) for path in Path().rglob("*") if path.is_file())


def pixel(path):
    with Image.open(path) as image:
        assert image.format == "PNG"
        assert image.mode == "RGB"
        return image.getpixel((0, 0))


def loaded(path):
    with Image.open(path) as image:
        return torch.from_numpy(np.array(image)).int()


def drawn(prompt, seed):
    colour = zlib.crc32(f"{prompt} {seed}".encode())
    return colour & 255, colour >> 8 & 255, colour >> 16 & 255


# ------------------------------------------------------------------------------------------------------------- generate


def test_generate_one_file(model, run):
    code, out, err = run("generate", "red apple, noto style", "-o", "apple.png")
    assert (code, out, err) == (0, "apple.png\n", "")
    assert files() == ["apple.png"]
    assert pixel("apple.png") == drawn("red apple, noto style", 0)
    unset = {"guidance": None, "temperature": None, "top_k": None, "top_p": None}
    assert model.calls == [(1, {"seed": [0], **unset})]


def test_generate_replaces_a_file_and_makes_folders(model, run):
    Path("apple.png").write_text("old")
    assert run("generate", "a", "-o", "apple.png")[0] == 0
    assert pixel("apple.png") == drawn("a", 0)
    assert run("generate", "a", "-o", "deep/er/apple.png")[0] == 0
    assert files() == ["apple.png", "deep/er/apple.png"]


def test_generate_options_reach_the_model(model, run):
    options = ["--guidance", 1.5, "--temperature", 0, "--top-k", 900, "--top-p", 0.5, "--seed", 7]
    assert run("generate", *options, "a", "-o", "a.png")[0] == 0
    assert model.calls == [(1, {"seed": [7], "guidance": 1.5, "temperature": 0.0, "top_k": 900, "top_p": 0.5})]


def test_generate_many_into_a_folder(model, run):
    code, out, _ = run("generate", "Red apple!", "-o", "out", "dog", "dog", "--count", 2, "--seed", 5, "été", "???")
    names = ["red-apple", "red-apple-2", "dog", "dog-2", "dog-3", "dog-4", "été", "été-2", "prompt", "prompt-2"]
    assert code == 0
    assert out.splitlines() == [f"out/{name}.png" for name in names]
    prompts = ["Red apple!"] * 2 + ["dog"] * 4 + ["été"] * 2 + ["???"] * 2
    for i, (prompt, name) in enumerate(zip(prompts, names, strict=True)):
        assert pixel(f"out/{name}.png") == drawn(prompt, 5 + i)


def test_generate_in_batches_draws_the_same(model, run):
    prompts = [f"p{i}" for i in range(5)]
    assert run("generate", *prompts, "-o", "one", "--batch", 2)[0] == 0
    assert [count for count, _ in model.calls] == [2, 2, 1]
    assert run("generate", *prompts, "-o", "two")[0] == 0
    for prompt in prompts:
        assert Path(f"one/{prompt}.png").read_bytes() == Path(f"two/{prompt}.png").read_bytes()


def test_generate_into_an_existing_folder_with_a_png_name(model, run):
    Path("odd.png").mkdir()
    assert run("generate", "a", "-o", "odd.png")[0] == 0
    assert run("generate", "a", "-o", "new.png/")[0] == 0
    assert files() == ["new.png/a.png", "odd.png/a.png"]


def test_generate_from_a_file_and_stdin(model, run, monkeypatch):
    Path("prompts.txt").write_text("\ufeffred apple\r\n\n  dog  \n", encoding="utf-8")
    assert run("generate", "cat", "--prompts-file", "prompts.txt", "-o", "out")[0] == 0
    assert sorted(os.listdir("out")) == ["cat.png", "dog.png", "red-apple.png"]
    monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(b"from stdin\n")))
    assert run("generate", "--prompts-file", "-", "-o", "in.png")[0] == 0
    assert pixel("in.png") == drawn("from stdin", 0)


def test_generate_grid(model, run):
    code, out, _ = run("generate", "a", "b", "c", "--grid", "sheet.png")
    assert (code, out, files()) == (0, "sheet.png\n", ["sheet.png"])
    with Image.open("sheet.png") as sheet:
        colours = {colour for _, colour in sheet.getcolors(10_000)}
    assert {drawn("a", 0), drawn("b", 1), drawn("c", 2)} <= colours
    code, out, _ = run("generate", "a", "-o", "a.png", "--grid", "sheets/all.png")
    assert (code, out) == (0, "a.png\nsheets/all.png\n")


def test_generate_json(model, run):
    code, out, err = run("generate", "a", " ", "b", "-o", "out", "--grid", "all.png", "--json", "--seed", 3)
    document = json.loads(out)
    assert code == 1
    assert error_lines(err) == ["prompt is empty"]
    assert document == {
        "command": "generate",
        "model": cli.DEFAULT_MODEL,
        "device": "cpu",
        "results": [
            {"prompt": "a", "seed": 3, "output": "out/a.png"},
            {"prompt": "b", "seed": 5, "output": "out/b.png"},
        ],
        "errors": [{"input": " ", "error": "prompt is empty"}],
        "grid": "all.png",
    }


def test_quiet_prints_nothing_but_errors(model, run):
    assert run("generate", "a", "-o", "a.png", "--grid", "g.png", "--quiet") == (0, "", "")
    code, out, err = run("generate", "", "-o", "a.png", "--quiet")
    assert (code, out, error_lines(err)) == (1, "", ["prompt is empty"])


def test_bad_prompts_are_reported_and_the_others_drawn(model, run):
    code, out, err = run("generate", "", "good", "one two three four five six", "byte \udcff", "\t", "-o", "out")
    assert code == 1
    assert out == "out/good.png\n"
    expected = ["empty", "6 tokens; the model takes at most 5", "UTF-8", "empty"]
    for line, words in zip(error_lines(err), expected, strict=True):
        assert words in line
    assert pixel("out/good.png") == drawn("good", 1)


def test_no_good_prompt_does_not_load_the_model(model, run, monkeypatch):
    monkeypatch.setattr(cli, "_from_checkpoint", lambda *_: pytest.fail("loaded"))
    expect_one_error(run("generate", "  ", "-o", "a.png"), "empty")
    assert files() == []


def test_unknown_style_words_are_allowed(model, run):
    assert run("generate", "apple, cubist style", "-o", "a.png")[0] == 0


@pytest.mark.parametrize(
    ("content", "word"), [(b"", "no prompt"), (b"\n \n", "no prompt"), (b"caf\xe9\n", "UTF-8"), (None, "No such file")]
)
def test_bad_prompts_file(model, run, content, word):
    if content is not None:
        Path("prompts.txt").write_bytes(content)
    expect_one_error(run("generate", "--prompts-file", "prompts.txt", "-o", "out"), "prompts.txt", word)
    expect_one_error(run("generate", "--prompts-file", ".", "-o", "out"), "Is a directory")
    expect_one_error(run("generate", "--prompts-file", "zero\0", "-o", "out"), "no such file")


@pytest.mark.parametrize(
    ("argv", "words"),
    [
        ([], ["PROMPT", "--prompts-file"]),
        (["a"], ["-o OUT or --grid FILE"]),
        (["a", "b", "-o", "one.png"], ["-o", "folder", "2 pictures"]),
        (["a", "--count", "3", "-o", "one.png"], ["-o", "folder", "3 pictures"]),
        (["a", "-o", "a.jpg"], ["-o", "PNG", "a.jpg"]),
        (["a", "-o", ""], ["-o", "file or folder"]),
        (["a", "-o", "zero\0"], ["-o"]),
        (["a", "--grid", "sheet.webp"], ["--grid", "PNG"]),
        (["a", "--grid", "sheet"], ["--grid", ".png"]),
        (["a", "-o", "a.png", "--grid", "./a.png"], ["--grid", "another file"]),
        (["a", "b", "-o", "out", "--seed", str(2**32 - 1)], ["--seed", "4294967295"]),
        (["a", "-o", "a.png", "--sed", "3"], ["--sed"]),
    ],
)
def test_generate_usage(model, run, argv, words):
    expect_usage_error(run("generate", *argv), *words)
    assert files() == []


@pytest.mark.parametrize(
    ("option", "limits", "values"),
    [
        ("--guidance", "from 0 to 100", ["-1", "101", "nan", "inf", "much"]),
        ("--temperature", "from 0 to 100", ["-0.1", "1e9", "nan"]),
        ("--top-p", "from 0 to 1", ["-0.5", "1.01", "nan"]),
        ("--top-k", "from 0 to 1000000", ["-1", "1000001", "1.5"]),
        ("--batch", "from 1 to 4096", ["0", "-1", "4097", "x", ""]),
        ("--count", "from 1 to 10000", ["0", "10001", "2.0"]),
        ("--seed", "from 0 to 4294967295", ["-1", "4294967296", "1e3"]),
        ("--device", "auto, cpu, cuda or cuda:N", ["gpu", "cuda:", "cuda:x", "cpu:0", "mps", ""]),
    ],
)
def test_options_out_of_range(model, run, option, limits, values):
    for value in values:
        expect_usage_error(
            run("generate", "a", "-o", "a.png", option, value), f"argument {option}", limits, repr(value)
        )


def test_answers_out_of_range(model, run, pictures):
    for value in ("0", "101", "many"):
        expect_usage_error(run("describe", pictures, "--answers", value), "argument --answers", "from 1 to 100", value)


# -------------------------------------------------------------------------------------------------- places and failures


def test_output_below_a_file(model, run):
    Path("file").touch()
    expect_one_error(run("generate", "a", "-o", "file"), "file", "a file, where a folder is needed")
    expect_one_error(run("generate", "a", "-o", "file/a.png"), "file", "a file, where a folder is needed")
    expect_one_error(run("generate", "a", "--grid", "file/a.png"), "file", "a file, where a folder is needed")
    assert model.calls == []  # told before any work


def test_output_that_may_not_be_written(model, run, monkeypatch):
    Path("out").mkdir()
    monkeypatch.setattr(os, "access", lambda path, mode: False)  # permissions do not bind the superuser
    expect_one_error(run("generate", "a", "-o", "out"), "out", "permission denied")
    assert model.calls == []


def test_one_output_that_fails_does_not_stop_the_others(model, run):
    Path("out/b.png").mkdir(parents=True)
    code, out, err = run("generate", "a", "b", "c", "-o", "out", "--json")
    document = json.loads(out)
    assert code == 1
    assert [result["prompt"] for result in document["results"]] == ["a", "c"]
    (error,) = document["errors"]
    assert error["input"] == "b"
    assert error["error"].startswith("out/b.png: cannot be written")
    assert error_lines(err) == [error["error"]]
    assert files() == ["out/a.png", "out/c.png"]


def test_gpu_out_of_memory(model, run):
    model.fits = 2
    expect_one_error(run("generate", "a", "b", "c", "-o", "out"), "--batch 16", "smaller --batch", "--device cpu")
    code, out, _ = run("generate", "a", "b", "c", "-o", "out", "--json")
    assert code == 1
    assert json.loads(out)["errors"][0]["input"] is None
    assert run("generate", "a", "b", "c", "-o", "out", "--batch", 2)[0] == 0


def test_memory_of_the_machine(model, run, monkeypatch):
    def full(*_, **__):
        raise RuntimeError(
            "[enforce fail at alloc_cpu.cpp:121] . DefaultCPUAllocator: can't allocate memory: you tried"
        )

    monkeypatch.setattr(model, "generate", full)
    expect_one_error(run("generate", "a", "-o", "a.png"), "out of memory", "smaller --batch")


def test_interrupt(model, run, monkeypatch):
    def interrupt(*_, **__):
        raise KeyboardInterrupt

    monkeypatch.setattr(model, "generate", interrupt)
    code, out, err = run("generate", "a", "-o", "out")
    assert (code, out, err) == (130, "", "unifiedar: interrupted\n")
    assert files() == []


def test_what_nobody_foresaw_is_one_line_too(model, run, monkeypatch, capsys):
    def crash(*_, **__):
        raise LookupError("first line\nsecond line")

    monkeypatch.setattr(model, "generate", crash)
    expect_one_error(run("generate", "a", "-o", "a.png"), "LookupError: first line second line", "UNIFIEDAR_DEBUG=1")
    monkeypatch.setenv("UNIFIEDAR_DEBUG", "1")
    assert cli.main(["generate", "a", "-o", "a.png"]) == 1
    assert "Traceback" in capsys.readouterr().err


def test_control_characters_do_not_reach_the_terminal(model, run):
    _, _, err = run("describe", "no\x1b[31m\nfile.png")
    assert "\x1b" not in err
    assert len(error_lines(err)) == 1


@pytest.mark.parametrize("argv", [["generate", "a", "-o", "a.png"], ["describe", "PICTURES"]])
def test_devices(model, run, monkeypatch, pictures, argv):
    argv = [str(pictures) if arg == "PICTURES" else arg for arg in argv]
    expect_one_error(run(*argv, "--device", "cuda"), "--device cuda", "use --device cpu")
    assert run(*argv, "--device", "cpu")[0] == 0
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    expect_one_error(run(*argv, "--device", "cuda:2"), "--device cuda:2", "2 GPUs")
    for name, device in (("auto", "cuda:0"), ("cuda", "cuda:0"), ("cuda:1", "cuda:1"), ("cpu", "cpu")):
        code, out, _ = run(*argv, "--json", "--device", name)
        assert code == 0
        assert json.loads(out)["device"] == device


def test_models_that_cannot_be_loaded(model, run, monkeypatch, tmp_path):
    monkeypatch.setattr(checkpoints, "weights_folder", lambda: tmp_path / "ships")
    checkpoints.save(tmp_path / "ships" / "emoji", {"a": torch.ones(1)}, {})
    expect_one_error(run("generate", "a", "-o", "a.png", "--model", "emjoi"), "emjoi", "names that ship: emoji")
    code, out, _ = run("generate", "a", "-o", "a.png", "--model", "emjoi", "--json")
    document = json.loads(out)
    assert (code, document["device"], document["results"]) == (1, None, [])
    assert "names that ship: emoji" in document["errors"][0]["error"]

    def odd(*_):
        raise KeyError("width\nheight")

    monkeypatch.setattr(cli, "_from_checkpoint", odd)
    expect_one_error(run("generate", "a", "-o", "a.png"), "not a checkpoint that can be loaded", "width")


def test_large_checkpoints_take_half_the_memory(model, run, monkeypatch, tmp_path):
    dtypes = []
    monkeypatch.setattr(cli, "_from_checkpoint", lambda path, device, dtype, vae: dtypes.append(dtype) or model)
    (tmp_path / "weights" / "a.safetensors").write_bytes(b"0123456789")
    for limit in (11, 10):
        monkeypatch.setattr(cli, "LARGE_CHECKPOINT_BYTES", limit)
        for name in (tmp_path / "weights", tmp_path / "weights" / "a.safetensors"):
            assert run("generate", "a", "-o", "a.png", "--model", name)[0] == 0
    assert dtypes == [torch.float32] * 2 + [torch.bfloat16] * 2


def test_model_without_tokenizer(model, run, pictures):
    model.tokenizer = None
    expect_one_error(run("generate", "a", "-o", "a.png"), "tokenizer.json", "generate")
    expect_one_error(run("describe", pictures), "tokenizer.json", "describe")
    assert run("reconstruct", pictures, "-o", "out")[0] == 0


def test_checkpoints_that_are_not_ours(run, tmp_path, monkeypatch):
    """With the real loader: each of these ends before a model is built."""
    monkeypatch.chdir(tmp_path)
    ours = checkpoints.save(tmp_path / "other", {"a": torch.ones(1)}, {"model": "something else"})
    torch.save({"a": torch.ones(1)}, "published.pth")
    Path("empty").mkdir()
    Path("notes.txt").write_text("hello")
    for model, word in (
        (ours, "VILA-U"),
        ("published.pth", "no config.json beside it"),
        ("empty", "no config.json in it"),
        ("notes.txt", "no config.json beside it"),
        ("missing/model", "no such model, folder or file"),
    ):
        expect_one_error(run("generate", "a", "-o", "a.png", "--model", model, "--device", "cpu"), word)
    assert not Path("a.png").exists()


# ----------------------------------------------------------------------------------------------- describe, and pictures


def test_describe_one(model, run, pictures):
    assert run("describe", pictures / "dark.png") == (0, "mean 10, guess 0\n", "")
    assert model.calls == [(1, {"answers": 1, "beams": 5})]


def test_describe_a_folder_and_files(model, run, pictures):
    code, out, err = run("describe", pictures, pictures / "red.png", "--batch", 2)
    assert (code, err) == (0, "")
    assert out.splitlines() == [
        f"{pictures}/dark.png: mean 10, guess 0",
        f"{pictures}/light.png: mean 201, guess 0",
        f"{pictures}/red.png: mean 86, guess 0",
    ]
    assert [count for count, _ in model.calls] == [2, 1]


def test_describe_several_answers(model, run, pictures):
    code, out, _ = run("describe", pictures / "dark.png", "--answers", 7)
    assert code == 0
    assert out.splitlines()[:2] == [" 60.7%  mean 10, guess 0", " 22.3%  mean 10, guess 1"]
    assert model.calls == [(1, {"answers": 7, "beams": 7})]


def test_describe_leaves_out_impossible_answers(model, run, pictures, monkeypatch):
    monkeypatch.setattr(model, "describe", lambda *_, **__: [[("apple", -0.5), ("", float("-inf"))]])
    code, out, _ = run("describe", pictures / "dark.png", "--answers", 2, "--json")
    assert code == 0
    assert json.loads(out)["results"][0]["answers"] == [{"text": "apple", "log_probability": -0.5}]


def test_describe_json(model, run, pictures):
    Image.new("L", (40, 30), 99).save(pictures / "grey.png")
    code, out, err = run("describe", pictures / "grey.png", pictures / "none.png", "--json")
    assert code == 1
    assert json.loads(out) == {
        "command": "describe",
        "model": cli.DEFAULT_MODEL,
        "device": "cpu",
        "results": [
            {
                "input": f"{pictures}/grey.png",
                "notes": [
                    "L converted to RGB",
                    "40 x 30 cropped to the centre square",
                    f"resized from 30 to {SIZE} pixels",
                ],
                "answers": [{"text": "mean 99, guess 0", "log_probability": -0.5}],
            }
        ],
        "errors": [{"input": f"{pictures}/none.png", "error": f"{pictures}/none.png: no such file or folder"}],
        "grid": None,
    }
    assert len(err.splitlines()) == 2


def test_bad_pictures_are_reported_and_the_others_done(model, run, pictures):
    (pictures / "a_text.png").write_text("hello")
    (pictures / "b_cut.png").write_bytes((pictures / "red.png").read_bytes()[:60])
    Image.new("RGB", (100, 7)).save(pictures / "c_thin.png")
    (pictures / "d_folder.png").mkdir()
    code, out, err = run("describe", "nowhere", pictures, "--batch", 1)
    assert code == 1
    assert len(out.splitlines()) == 3
    expected = [
        ["nowhere: no such"],
        ["a_text.png", "PNG, JPEG"],
        ["b_cut.png", "truncated"],
        ["c_thin.png", "100 x 7"],
        ["d_folder.png", "a folder"],
    ]
    for line, words in zip(error_lines(err), expected, strict=True):
        assert all(word in line for word in words), line


def test_nothing_to_describe(model, run, tmp_path, monkeypatch):
    monkeypatch.setattr(cli, "_from_checkpoint", lambda *_: pytest.fail("loaded"))
    expect_one_error(run("describe", "none.png"), "none.png: no such file or folder")
    expect_one_error(run("describe", "."), "holds no pictures", ".png")
    expect_one_error(run("describe", "zero\0.png"), "no such file or folder")
    expect_one_error(run("describe", "x" * 300), "name too long")
    expect_usage_error(run("describe"), "PATH")


# ---------------------------------------------------------------------------------------------------------- reconstruct


def test_reconstruct_one(model, run, pictures):
    code, out, err = run("reconstruct", pictures / "light.png", "-o", "light.png")
    assert (code, out, err) == (0, "light.png\n", "")
    assert pixel("light.png") == (200, 200, 200)


def test_reconstruct_json(model, run, pictures):
    code, out, _ = run("reconstruct", pictures, "-o", "out", "--json", "--grid", "pairs.png")
    document = json.loads(out)
    assert code == 0
    assert document["grid"] == "pairs.png"
    results = {Path(result["input"]).stem: result for result in document["results"]}
    assert list(results) == ["dark", "light", "red"]
    assert results["light"]["output"] == "out/light.png"
    assert results["light"]["psnr"] == pytest.approx(48.131)  # one level off everywhere: 20 log10(255)
    assert results["light"]["codes"] == [[[201] * 3] * 2] * 2
    assert results["dark"]["notes"] == []


def test_reconstruct_that_changes_nothing_has_no_psnr(model, run, pictures, monkeypatch):
    Image.new("RGB", (SIZE, SIZE), (8, 8, 8)).save(pictures / "even.png")
    _, out, _ = run("reconstruct", pictures / "even.png", "--grid", "g.png", "--json")
    assert json.loads(out)["results"][0]["psnr"] is None
    assert json.loads(out)["results"][0]["output"] is None


def test_reconstruct_same_names_from_two_folders(model, run, pictures, tmp_path):
    (tmp_path / "more").mkdir()
    Image.new("RGB", (SIZE, SIZE), (40, 40, 40)).save(tmp_path / "more" / "red.jpg")
    code, out, _ = run("reconstruct", pictures, tmp_path / "more", "-o", "out")
    assert (code, out.splitlines()[-1]) == (0, "out/red-2.png")


def test_reconstruct_never_replaces_what_it_reads(model, run, pictures):
    before = (pictures / "light.png").read_bytes()
    expect_usage_error(run("reconstruct", pictures, "-o", pictures), "would replace a picture that is read")
    light = pictures / "light.png"
    expect_usage_error(run("reconstruct", light, "-o", light), "would replace")
    expect_usage_error(run("reconstruct", light, "--grid", light), "would replace")
    Path("link.png").symlink_to(light)
    expect_usage_error(run("reconstruct", "link.png", "-o", light), "would replace")
    assert light.read_bytes() == before


def test_reconstruct_needs_a_place(model, run, pictures):
    expect_usage_error(run("reconstruct", pictures), "-o OUT or --grid FILE")
    expect_usage_error(run("reconstruct", pictures, "-o", "one.png"), "3 pictures")


# ------------------------------------------------------------------------------------------------- progress and streams


@pytest.mark.parametrize(
    ("tty", "argv", "shown"),
    [
        (True, ["a", "b"], True),
        (False, ["a", "b"], False),
        (True, ["a"], False),
        (True, ["a", "b", "--json"], False),
        (True, ["a", "b", "--quiet"], False),
    ],
)
def test_progress_is_for_people_with_more_than_one_picture(model, run, monkeypatch, tty, argv, shown):
    monkeypatch.setattr(sys.stderr, "isatty", lambda: tty, raising=False)
    code, out, err = run("generate", *argv, "-o", "out")
    assert code == 0
    assert ("2/2" in err) == shown
    assert "pictures/s" not in out


def test_progress_counts_pictures_that_fail(model, run, monkeypatch, pictures):
    (pictures / "a.png").write_text("hello")
    monkeypatch.setattr(sys.stderr, "isatty", lambda: True, raising=False)
    code, out, err = run("describe", pictures)
    assert code == 1
    assert "4/4" in err
    assert len(out.splitlines()) == 3


def test_file_names_that_are_no_text(model, run, pictures):
    name = os.fsdecode(b"caf\xe9.png")
    (pictures / "red.png").rename(pictures / name)
    code, out, _ = run("describe", pictures)
    assert code == 0
    assert "caf .png: mean 86" in out
    assert run("reconstruct", pictures / name, "-o", name)[:2] == (0, "caf\\udce9.png\n")


# --------------------------------------------------------------------------------------------------- the command itself


@pytest.mark.parametrize("command", ["info", "train", "data"])
def test_commands_with_their_own_parsers(run, monkeypatch, command):
    seen = []
    module = types.SimpleNamespace(main=lambda argv: seen.append(argv) or 3)
    monkeypatch.setitem(sys.modules, f"unifiedar.{command}", module)
    monkeypatch.setattr(unifiedar, command, module, raising=False)
    assert run(command, "--help", "-x", "y")[0] == 3
    assert seen == [["--help", "-x", "y"]]


def test_bench(run, monkeypatch):
    seen = []
    module = types.SimpleNamespace(main=lambda argv: seen.append(argv) or 0)
    monkeypatch.setitem(sys.modules, "unifiedar.quality", module)
    monkeypatch.setattr(unifiedar, "quality", module, raising=False)
    assert run("bench", "quality", "--data", "x")[0] == 0
    assert seen == [["--data", "x"]]
    expect_usage_error(run("bench", "codes", "--json"), "'codes'", "checkout", "python -m bench")
    expect_usage_error(run("bench"), "NAME")
    assert run("bench", "--help")[0] == 0


def test_errors_of_other_commands_are_one_line(run, monkeypatch):
    def main(argv):
        raise checkpoints.CheckpointError("model.safetensors: truncated")

    module = types.SimpleNamespace(main=main)
    monkeypatch.setitem(sys.modules, "unifiedar.train", module)
    monkeypatch.setattr(unifiedar, "train", module, raising=False)
    expect_one_error(run("train"), "model.safetensors: truncated")
    module.main = lambda argv: sys.exit("a last word")
    assert run("train") == (1, "", "a last word\n")


@pytest.mark.parametrize("argv", [["--help"], ["generate", "--help"], ["describe", "-h"], ["reconstruct", "-h"]])
def test_help(run, argv):
    code, out, err = run(*argv)
    assert (code, err) == (0, "")
    assert out.startswith("usage: unifiedar")


def test_version(run):
    assert run("--version") == (0, f"unifiedar {unifiedar.__version__}\n", "")


@pytest.mark.parametrize("argv", [[], ["draw"], ["--model", "x"], ["--generate"]])
def test_no_such_command(run, argv):
    expect_usage_error(run(*argv))


def python(*argv, **options):
    path = os.pathsep.join([str(Path(unifiedar.__file__).parents[1]), os.environ.get("PYTHONPATH", "")])
    options = {
        "stdout": subprocess.PIPE,
        "stderr": subprocess.PIPE,
        "env": {**os.environ, "PYTHONPATH": path},
        **options,
    }
    return subprocess.run([sys.executable, *argv], text=True, **options)


def test_help_imports_nothing_heavy():
    code = "import sys; from unifiedar import cli; cli.main(['--help']); print(sorted(sys.modules), file=sys.stderr)"
    modules = python("-c", code).stderr
    assert "argparse" in modules
    assert not re.search(r"'(torch|numpy|PIL|safetensors|tokenizers|tqdm)'", modules)


def test_as_a_process(tmp_path):
    result = python("-m", "unifiedar", "describe", "none.png", "--json", cwd=tmp_path)
    assert result.returncode == 1
    assert json.loads(result.stdout)["errors"] == [{"input": "none.png", "error": "none.png: no such file or folder"}]
    assert result.stderr == "unifiedar: error: none.png: no such file or folder\n"


@pytest.mark.parametrize("argv", [["--help"], ["describe", "none.png", "--json"]])
def test_closed_pipe_is_no_crash(tmp_path, argv):
    reader, writer = os.pipe()
    os.close(reader)
    result = python("-m", "unifiedar", *argv, cwd=tmp_path, stdout=writer)
    os.close(writer)
    assert result.returncode in (0, 1)  # Python itself would exit with 120 and a complaint
    assert "Broken" not in result.stderr
    assert "Exception" not in result.stderr


# ------------------------------------------------------------------------------------------------ the weights that ship

ships = pytest.mark.skipif(cli.DEFAULT_MODEL not in checkpoints.shipped(), reason="no weights in this checkout")


@ships
def test_shipped_model_draws_describes_and_reconstructs(run, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    code, out, err = run("generate", "red apple, noto style", "rocket, twemoji style", "-o", "out", "--device", "cpu")
    assert (code, err) == (0, "")
    assert out.splitlines() == ["out/red-apple-noto-style.png", "out/rocket-twemoji-style.png"]
    assert run("generate", "rocket, twemoji style", "-o", "alone.png", "--seed", 1, "--device", "cpu")[0] == 0
    apart = loaded("alone.png") - loaded("out/rocket-twemoji-style.png")
    assert apart.abs().float().mean() < 2  # the same picture whatever is drawn beside it

    code, out, _ = run("describe", "out", "--answers", 3, "--json", "--device", "cpu")
    assert code == 0
    for result in json.loads(out)["results"]:
        values = [answer["log_probability"] for answer in result["answers"]]
        assert len(values) == 3
        assert values == sorted(values, reverse=True)
        assert values[0] <= 0
    code, out, _ = run("reconstruct", "out", "-o", "again", "--json", "--grid", "pairs.png", "--device", "cpu")
    assert code == 0
    assert all(result["psnr"] > 20 for result in json.loads(out)["results"])


@ships
def test_shipped_model_refuses_long_prompts(run, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    expect_one_error(run("generate", "word " * 300, "-o", "a.png", "--device", "cpu"), "tokens", "at most")


@ships
def test_shipped_weights_stay_small():
    folder = checkpoints.weights_folder()
    sizes = [path.stat().st_size for path in folder.rglob("*") if path.is_file()]
    assert max(sizes) < 15 * 2**20
    assert sum(sizes) < 44 * 2**20
