"""Checkpoints: what is saved comes back, a folder is there whole or not at all, and no file can do more than fail."""

import ctypes
import json
import os
import pickle
from collections import OrderedDict
from contextlib import suppress
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import save_file

from unifiedar import checkpoints
from unifiedar.checkpoints import INDEX, CheckpointError, load_tensors, read_config, resolve, save


def tensors() -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    table = torch.randn(17, 8, generator=generator)
    matrix = torch.randn(40, 30, generator=generator)
    return {
        "matrix": matrix,
        "codebooks.0.weight": table,
        "codebooks.1.weight": table,
        "half": matrix.half(),
        "brain": matrix.bfloat16(),
        "rows": matrix[3:9],  # views of a larger tensor
        "columns": matrix[:, ::2],
        "turned": matrix.T,
        "expanded": torch.tensor(2.0).expand(3, 4),
        "count": torch.arange(5),
        "scalar": torch.tensor(3.0),
        "empty": torch.zeros(0, 4),
        "flags": torch.tensor([True, False]),
    }


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return save(tmp_path / "model", tensors(), {"width": 8})


def shards(folder: Path) -> list[Path]:
    return sorted(folder.glob("*.safetensors"))


def edit_index(folder: Path, change) -> None:
    index = json.loads((folder / INDEX).read_text())
    change(index)
    (folder / INDEX).write_text(json.dumps(index))


def refuse(path: Path, *words: str, read=load_tensors) -> None:
    """Reading fails with one line that holds the words."""
    with pytest.raises(CheckpointError) as error:
        read(path)
    text = str(error.value)
    assert "\n" not in text
    assert len(text) < 500
    for word in words:
        assert word in text


# --------------------------------------------------------------------------------------------- what is saved comes back


def test_round_trip(folder):
    expected, found = tensors(), load_tensors(folder)
    assert set(found) == set(expected)
    for name, tensor in expected.items():
        assert found[name].dtype == tensor.dtype, name
        assert torch.equal(found[name], tensor), name
    assert read_config(folder) == {"width": 8}
    assert read_config(shards(folder)[0]) == {"width": 8}


def test_names_of_one_tensor_are_stored_once_and_stay_one(folder):
    index = json.loads((folder / INDEX).read_text())
    assert index["metadata"]["aliases"] == {"codebooks.1.weight": "codebooks.0.weight"}
    assert "codebooks.1.weight" not in index["weight_map"]
    found = load_tensors(folder)
    assert found["codebooks.1.weight"] is found["codebooks.0.weight"]
    assert found["rows"].data_ptr() != found["matrix"].data_ptr()  # a view is a tensor of its own


def test_loaded_tensors_can_be_changed_without_changing_the_file(folder):
    load_tensors(folder)["matrix"].zero_()
    assert torch.equal(load_tensors(folder)["matrix"], tensors()["matrix"])


@pytest.mark.parametrize("limit", [6_000, 9_000, 30_000])
def test_every_shard_stays_under_the_limit(tmp_path, limit):
    folder = save(tmp_path / "model", tensors(), {}, max_shard_bytes=limit)
    names = [path.name for path in shards(folder)]
    assert names == [f"model-{i:05d}-of-{len(names):05d}.safetensors" for i in range(1, len(names) + 1)]
    assert all(path.stat().st_size < limit for path in shards(folder))
    assert (len(names) == 1) == (limit == 30_000)
    for name, tensor in tensors().items():
        assert torch.equal(load_tensors(folder)[name], tensor)


@given(sizes=st.lists(st.integers(0, 300), min_size=1, max_size=30), limit=st.integers(800, 3000))
@settings(deadline=None, max_examples=30)
def test_shard_limit_holds_for_any_sizes(tmp_path_factory, sizes, limit):
    many = {f'tensor "{i}" ü': torch.ones(size, dtype=torch.uint8).view(1, 1, -1) for i, size in enumerate(sizes)}
    folder = save(tmp_path_factory.mktemp("sizes") / "model", many, {}, max_shard_bytes=limit)
    assert all(path.stat().st_size < limit for path in shards(folder))
    assert set(load_tensors(folder)) == set(many)


def test_int8_is_within_half_a_step_of_each_row(tmp_path):
    values = tensors()
    values["zeros"] = torch.zeros(3, 2, 2)
    folder = save(tmp_path / "model", values, {}, int8=["matrix", "brain", "codebooks.1.weight", "zeros"])
    found = load_tensors(folder)
    assert set(found) == set(values)
    for name in ("matrix", "brain", "codebooks.0.weight"):
        step = values[name].float().abs().amax(1, keepdim=True) / 127
        assert found[name].dtype == torch.float32
        assert ((found[name] - values[name].float()).abs() <= step * 0.5001).all()
    assert torch.equal(found["zeros"], values["zeros"])
    assert found["codebooks.1.weight"] is found["codebooks.0.weight"]
    stored = sum(path.stat().st_size for path in shards(folder))
    assert stored < sum(path.stat().st_size for path in shards(save(tmp_path / "plain", values, {})))


def test_int8_without_scale_stays_int8(tmp_path):
    save(tmp_path / "model", {"steps": torch.tensor([1, 2], dtype=torch.int8)}, {})
    assert load_tensors(tmp_path / "model")["steps"].dtype == torch.int8


def test_further_files_are_part_of_the_folder(tmp_path):
    folder = save(tmp_path / "model", tensors(), {}, files={"tokenizer.json": b"{}"})
    assert (folder / "tokenizer.json").read_bytes() == b"{}"


def test_files_are_as_readable_as_any_other(folder):
    (folder / "other").touch()
    assert {path.stat().st_mode for path in folder.iterdir()} == {(folder / "other").stat().st_mode}


def test_same_tensors_same_bytes(tmp_path):
    one, two = (save(tmp_path / name, tensors(), {"a": 1}, int8=["matrix"]) for name in ("one", "two"))
    for path in one.iterdir():
        assert path.read_bytes() == (two / path.name).read_bytes()


@pytest.mark.parametrize("key", [None, "state_dict", "model"])
@pytest.mark.parametrize("zipped", [True, False])
@pytest.mark.parametrize("suffix", [".pth", ".pt", ".bin"])
def test_published_pickles(tmp_path, key, zipped, suffix):
    state = OrderedDict(a=torch.nn.Parameter(torch.ones(2, 3)), b=torch.arange(3))
    path = tmp_path / f"published{suffix}"
    torch.save({key: state, "epoch": 3} if key else state, path, _use_new_zipfile_serialization=zipped)
    found = load_tensors(path)
    assert list(found) == ["a", "b"]
    assert torch.equal(found["a"], torch.ones(2, 3))
    assert not found["a"].requires_grad


def test_single_file_of_another_tool(tmp_path):
    save_file({"a": torch.ones(2)}, tmp_path / "model.safetensors")
    assert torch.equal(load_tensors(tmp_path)["a"], torch.ones(2))
    assert torch.equal(load_tensors(tmp_path / "model.safetensors")["a"], torch.ones(2))


# -------------------------------------------------------------------------------------------------- whole or not at all


def test_existing_folder_is_kept_unless_told(folder):
    refuse(folder, "exists already", read=lambda path: save(path, {}, {}))
    save(folder, {"new": torch.ones(1)}, {"new": True}, overwrite=True)
    assert list(load_tensors(folder)) == ["new"]
    assert read_config(folder) == {"new": True}
    assert [path.name for path in folder.parent.iterdir()] == [folder.name]


def test_folder_of_something_else_is_never_overwritten(tmp_path):
    (tmp_path / "photos").mkdir()
    (tmp_path / "photos" / "cat.jpg").touch()
    refuse(tmp_path / "photos", "not a checkpoint", read=lambda path: save(path, {}, {}, overwrite=True))
    assert (tmp_path / "photos" / "cat.jpg").exists()
    (tmp_path / "file").touch()
    refuse(tmp_path / "file", "not a checkpoint", read=lambda path: save(path, {}, {}, overwrite=True))


def test_empty_folder_and_missing_parents_are_fine(tmp_path):
    (tmp_path / "empty").mkdir()
    save(tmp_path / "empty", tensors(), {})
    save(tmp_path / "a" / "b" / "model", tensors(), {})
    assert load_tensors(tmp_path / "a" / "b" / "model").keys() == load_tensors(tmp_path / "empty").keys()


def test_link_to_a_folder_stays_a_link(folder):
    link = folder.with_name("link")
    link.symlink_to(folder, target_is_directory=True)
    save(link, {"new": torch.ones(1)}, {}, overwrite=True)
    assert link.is_symlink()
    assert list(load_tensors(folder)) == ["new"]


def test_failure_midway_leaves_the_old_checkpoint_and_nothing_else(folder, monkeypatch):
    def full(path, content):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(checkpoints, "_write_bytes", full)
    with pytest.raises(CheckpointError, match="No space left on device"):
        save(folder, {"new": torch.ones(1)}, {}, overwrite=True)
    assert set(load_tensors(folder)) == set(tensors())
    assert [path.name for path in folder.parent.iterdir()] == [folder.name]


def test_interrupt_leaves_the_old_checkpoint_and_nothing_else(folder, monkeypatch):
    def interrupt(path, tensors):
        path.touch()
        raise KeyboardInterrupt

    monkeypatch.setattr(checkpoints, "_write_shard", interrupt)
    with pytest.raises(KeyboardInterrupt):
        save(folder, {"new": torch.ones(1)}, {}, overwrite=True)
    assert set(load_tensors(folder)) == set(tensors())
    assert [path.name for path in folder.parent.iterdir()] == [folder.name]


def test_replacing_never_removes_the_folder(folder, monkeypatch):
    """The one step that touches the existing folder is the exchange of two names: no plain rename, no removal."""
    real, seen = os.rename, []
    monkeypatch.setattr(os, "rename", lambda *names: (seen.append(names), real(*names)))
    if getattr(ctypes.CDLL(None), "renameat2", None) is None:
        pytest.skip("this C library has no renameat2")
    save(folder, {"new": torch.ones(1)}, {}, overwrite=True)
    assert seen == []
    assert list(load_tensors(folder)) == ["new"]


def test_file_system_without_exchange(folder, monkeypatch):
    monkeypatch.setattr(checkpoints, "_exchange", lambda one, other: False)
    save(folder, {"new": torch.ones(1)}, {}, overwrite=True)
    assert list(load_tensors(folder)) == ["new"]
    assert [path.name for path in folder.parent.iterdir()] == [folder.name]


def test_failed_rename_puts_the_old_folder_back(folder, monkeypatch):
    real, calls = os.rename, []

    def second_fails(source, target):
        calls.append(source)
        if len(calls) == 2:
            raise OSError(5, "Input/output error")
        real(source, target)

    monkeypatch.setattr(checkpoints, "_exchange", lambda one, other: False)
    monkeypatch.setattr(os, "rename", second_fails)
    with pytest.raises(CheckpointError, match="Input/output error"):
        save(folder, {"new": torch.ones(1)}, {}, overwrite=True)
    assert set(load_tensors(folder)) == set(tensors())


def test_parent_that_is_a_file(tmp_path):
    (tmp_path / "file").touch()
    refuse(tmp_path / "file" / "model", "cannot be written", read=lambda path: save(path, {}, {}))


@pytest.mark.parametrize(
    ("arguments", "error", "word"),
    [
        ({"tensors": {"a": 3}}, TypeError, "int"),
        ({"tensors": {3: torch.ones(1)}}, TypeError, "3"),
        ({"tensors": {"a": torch.ones(1, device="meta")}}, ValueError, "meta"),
        ({"tensors": {"a": torch.ones(2, 2).to_sparse()}}, ValueError, "sparse"),
        ({"tensors": {"a": torch.ones(2, dtype=torch.complex128)}}, TypeError, "complex128"),
        ({"int8": ["b"]}, ValueError, "'b'"),
        ({"tensors": {"a": torch.ones(3)}, "int8": ["a"]}, ValueError, "2 dimensions"),
        ({"tensors": {"a": torch.ones(3, 3).long()}, "int8": ["a"]}, ValueError, "floating point"),
        ({"tensors": {"a": torch.full((2, 2), float("nan"))}, "int8": ["a"]}, ValueError, "nan"),
        ({"tensors": {"a": torch.ones(2, 2), "a.scale": torch.ones(2)}, "int8": ["a"]}, ValueError, "taken"),
        ({"tensors": {"a": torch.ones(2).char(), "a.scale": torch.ones(2)}}, ValueError, "product"),
        ({"max_shard_bytes": 100}, ValueError, "max_shard_bytes"),
        ({"config": {"a": torch.ones(1)}}, TypeError, "config"),
        ({"config": {"a": float("nan")}}, TypeError, "config"),
        ({"files": {"../a": b""}}, ValueError, "'../a'"),
        ({"files": {"config.json": b""}}, ValueError, "config.json"),
    ],
)
def test_arguments_of_save(tmp_path, arguments, error, word):
    defaults = {"tensors": {"a": torch.ones(20, 20)}, "config": {}}
    with pytest.raises(error, match=r"^save: ") as caught:
        save(tmp_path / "model", **{**defaults, **arguments})
    assert word in str(caught.value)
    assert list(tmp_path.iterdir()) == []


# ---------------------------------------------------------------------------------------- no file can do more than fail


class Touch:
    """Unpickled, it would make a file."""

    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return (open, (str(self.path), "w"))


@pytest.mark.parametrize("wrap", [lambda bad: bad, lambda bad: {"a": bad}, lambda bad: {"state_dict": {"a": bad}}])
@pytest.mark.parametrize("form", ["zip", "legacy", "pickle"])
def test_malicious_pickle_does_not_run(tmp_path, form, wrap):
    path, proof = tmp_path / "bad.pth", tmp_path / "proof"
    if form == "pickle":
        path.write_bytes(pickle.dumps(wrap(Touch(proof)), protocol=2))
    else:
        torch.save(wrap(Touch(proof)), path, _use_new_zipfile_serialization=form == "zip")
    refuse(path, "bad.pth", "io.open", "could run code")
    assert not proof.exists()


@pytest.mark.parametrize(
    ("state", "word"),
    [
        ({"a": 3, "b": torch.ones(1)}, "int"),
        ({"a": {"b": torch.ones(1)}}, "dict"),
        ({3: torch.ones(1)}, "3"),
        ([torch.ones(1)], "list"),
        (torch.ones(1), "Tensor"),
        ({}, "expected names"),
        ({"a": torch.ones(2, 2).to_sparse()}, "sparse"),
    ],
)
def test_pickles_of_something_else(tmp_path, state, word):
    torch.save(state, tmp_path / "other.pt")
    refuse(tmp_path / "other.pt", "other.pt", word)


@pytest.mark.parametrize("content", [b"", b"x", b"hello world" * 20, b"PK\x03\x04" + b"\0" * 50, bytes(range(256)) * 9])
@pytest.mark.parametrize("name", ["a.pth", "a.bin", "a.safetensors"])
def test_garbage(tmp_path, name, content):
    (tmp_path / name).write_bytes(content)
    refuse(tmp_path / name, name)


@pytest.mark.parametrize("name", ["a.pth", "a.safetensors", "config.json"])
def test_git_lfs_pointer_says_so(tmp_path, name):
    (tmp_path / name).write_text("version https://git-lfs.github.com/spec/v1\noid sha256:00\nsize 3\n")
    refuse(tmp_path / name, "git lfs pull", read=read_config if name == "config.json" else load_tensors)


@given(data=st.data())
@settings(deadline=None, max_examples=150)
def test_truncated_or_changed_safetensors(tmp_path_factory, data):
    folder = tmp_path_factory.mktemp("fuzz")
    path = folder / "model.safetensors"
    save_file({"a": torch.ones(3, 4).char(), "a.scale": torch.ones(3), "b": torch.arange(7)}, path)
    whole = path.read_bytes()
    content = bytearray(whole[: data.draw(st.integers(0, len(whole) - 1))]) if data.draw(st.booleans()) else None
    if content is None:
        content = bytearray(whole)
        header = 8 + int.from_bytes(whole[:8], "little")
        for position in data.draw(st.lists(st.integers(0, header - 1), min_size=1, max_size=4)):
            content[position] = data.draw(st.integers(0, 255))
    path.write_bytes(content)
    if len(content) < len(whole):
        refuse(path, "model.safetensors")
        return
    with suppress(CheckpointError):  # and nothing else
        # Another name, dtype or offset may still make a valid file: then of tensors within it, int8 as float32.
        assert sum(t.numel() * t.element_size() for t in load_tensors(path).values()) <= 4 * len(whole)


@given(data=st.data())
@settings(deadline=None, max_examples=60)
def test_truncated_or_changed_pickle(tmp_path_factory, data):
    path = tmp_path_factory.mktemp("fuzz") / "model.pth"
    torch.save({"a": torch.ones(3, 4)}, path, _use_new_zipfile_serialization=data.draw(st.booleans()))
    content = bytearray(path.read_bytes())
    for position in data.draw(st.lists(st.integers(0, len(content) - 1), max_size=3)):
        content[position] = data.draw(st.integers(0, 255))
    path.write_bytes(content[: data.draw(st.integers(0, len(content)))])
    with suppress(CheckpointError):  # and nothing else
        assert all(isinstance(tensor, torch.Tensor) for tensor in load_tensors(path).values())


@pytest.mark.parametrize(
    ("header", "data"),
    [
        ({"a": {"dtype": "F32", "shape": [2**62, 4], "data_offsets": [0, 16]}}, 16),
        ({"a": {"dtype": "F32", "shape": [4], "data_offsets": [16, 32]}}, 16),
        ({"a": {"dtype": "F32", "shape": [4], "data_offsets": [0, 16]}}, 15),
        ({"a": {"dtype": "F32", "shape": [4], "data_offsets": [0, 16]}}, 17),
        ({"a": {"dtype": "F99", "shape": [4], "data_offsets": [0, 16]}}, 16),
        ({"a": {"dtype": "F32", "shape": [-4], "data_offsets": [0, 16]}}, 16),
        ({"a": 3}, 16),
        ([], 16),
    ],
)
def test_tampered_header(tmp_path, header, data):
    text = json.dumps(header).encode()
    (tmp_path / "a.safetensors").write_bytes(len(text).to_bytes(8, "little") + text + b"\0" * data)
    refuse(tmp_path / "a.safetensors", "a.safetensors", "damaged")


@pytest.mark.parametrize("claimed", [checkpoints.MAX_HEADER_BYTES + 1, 2**63, 2**64 - 1])
def test_huge_header_is_refused_before_it_is_read(tmp_path, claimed):
    path = tmp_path / "a.safetensors"
    path.write_bytes(claimed.to_bytes(8, "little") + b"{}")
    os.truncate(path, checkpoints.MAX_HEADER_BYTES + 100)  # a hole: takes no room on the disk
    refuse(path, "a.safetensors: not a safetensors file")


@pytest.mark.parametrize(
    "scale", [torch.ones(3).half(), torch.ones(4), torch.ones(3, 1), torch.ones(3).long(), torch.tensor(1.0)]
)
def test_scale_of_another_dtype_or_shape(tmp_path, scale):
    save_file({"a": torch.ones(3, 4).char(), "a.scale": scale}, tmp_path / "a.safetensors")
    refuse(tmp_path / "a.safetensors", "a.scale must be float32")


@pytest.mark.parametrize(
    "shard",
    ["../secret.safetensors", "/etc/secret.safetensors", "a/b.safetensors", "a\\b.safetensors", "..", "", "model.pth"],
)
def test_index_cannot_name_files_elsewhere(folder, shard):
    save_file({"matrix": torch.ones(1)}, folder.parent / "secret.safetensors")
    edit_index(folder, lambda index: index["weight_map"].update(matrix=shard))
    refuse(folder, INDEX, "tampered")


@pytest.mark.parametrize(
    "change",
    [
        lambda index: index.pop("weight_map"),
        lambda index: index.update(weight_map=[1]),
        lambda index: index["weight_map"].update(matrix=3),
        lambda index: index.update(metadata=3),
        lambda index: index["metadata"].update(aliases=[]),
        lambda index: index["metadata"]["aliases"].update(extra="nothing"),
        lambda index: index["metadata"]["aliases"].update(matrix="half"),
        lambda index: index["metadata"]["aliases"].update(one="two", two="one"),
        lambda index: index["weight_map"].update(extra=index["weight_map"]["matrix"]),
    ],
)
def test_damaged_index(folder, change):
    edit_index(folder, change)
    refuse(folder, "damaged")


def test_missing_shard(tmp_path):
    folder = save(tmp_path / "model", tensors(), {}, max_shard_bytes=9_000)
    shards(folder)[1].unlink()
    refuse(folder, "model-00002", "no such file")


def test_truncated_shard(folder):
    content = shards(folder)[0].read_bytes()
    shards(folder)[0].write_bytes(content[:-10])
    refuse(folder, shards(folder)[0].name, "truncated")


@pytest.mark.parametrize("content", ["", "{", "[1]", '"a"', "[" * 100_000, "\xff"])
def test_damaged_json(folder, content):
    (folder / "config.json").write_bytes(content.encode("latin-1"))
    refuse(folder, "config.json", "damaged", read=read_config)


def test_oversized_json(folder, monkeypatch):
    monkeypatch.setattr(checkpoints, "MAX_HEADER_BYTES", 5)
    refuse(folder, "config.json", "larger", read=read_config)


def test_missing_files(tmp_path):
    refuse(tmp_path / "none.safetensors", "no such file")
    refuse(tmp_path / "zero\0byte.pth", "no such file")
    refuse(tmp_path, "neither")
    refuse(tmp_path, "no config.json in it", read=read_config)
    (tmp_path / "a.safetensors").touch()
    refuse(tmp_path / "a.safetensors", "no config.json beside it", read=read_config)
    refuse(tmp_path / "none.safetensors", "config.json: no such file", read=read_config)
    (tmp_path / "notes.txt").touch()
    refuse(tmp_path / "notes.txt", "notes.txt", "expected")


def test_pipe_is_not_waited_for(tmp_path):
    os.mkfifo(tmp_path / "pipe.safetensors")
    refuse(tmp_path / "pipe.safetensors", "not a regular file")


# ---------------------------------------------------------------------------------------------------------------- names


def test_names_that_ship(tmp_path, monkeypatch):
    monkeypatch.setattr(checkpoints, "weights_folder", lambda: tmp_path / "weights")
    assert checkpoints.shipped() == []
    refuse("none", "none in this checkout", read=resolve)
    for name in ("small", "large"):
        save(tmp_path / "weights" / name, tensors(), {})
    (tmp_path / "weights" / "notes").mkdir()
    assert checkpoints.shipped() == ["large", "small"]
    assert resolve("small") == tmp_path / "weights" / "small"
    monkeypatch.chdir(tmp_path)
    save("small", {"mine": torch.ones(1)}, {})
    assert resolve("small") == tmp_path / "weights" / "small"
    assert list(load_tensors(resolve("./small"))) == ["mine"]
    assert resolve(tmp_path / "small") == tmp_path / "small"
    for name in ("", "medium", "zero\0byte", "../weights/none"):
        refuse(name, "large, small", read=resolve)


def test_home_folder(folder, monkeypatch):
    monkeypatch.setenv("HOME", str(folder.parent))
    assert resolve("~/model") == folder


def test_weights_folder_is_inside_the_package():
    assert checkpoints.weights_folder() == Path(checkpoints.__file__).resolve().parent / "weights"
