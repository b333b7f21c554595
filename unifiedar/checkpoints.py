"""Checkpoints on disk: read them without ever running what they hold, write them whole or not at all.

A checkpoint is a folder in the layout that Hugging Face made common::

    config.json                        the model's configuration
    model-00001-of-00002.safetensors   tensors, in shards of a bounded size
    model-00002-of-00002.safetensors
    model.safetensors.index.json       {"metadata": {...}, "weight_map": {tensor name: shard}}

with two additions. A tensor that has several names (a codebook that every depth shares) is stored once:
``metadata.aliases`` maps each further name to the stored one. And an int8 tensor ``name`` with a companion
``name.scale`` (float32, one entry a row) stands for ``int8 * scale[:, None, ...]`` and is read as that float32 tensor.

Published ``.pth``, ``.pt`` and ``.bin`` files are read with ``torch.load(weights_only=True)``, which builds tensors and
plain containers and refuses everything else. Whatever is wrong with a file becomes one `CheckpointError` of one line.

This module imports nothing of unifiedar, so that any other may import it.
"""

import ctypes
import errno
import json
import os
import re
import secrets
import shutil
import warnings
from collections.abc import Collection, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, TypeGuard

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor, nn

__all__ = [
    "CheckpointError", "assign", "load_tensors", "quantize_rows", "read_config", "resolve", "save", "shipped",
    "weights_folder",
]  # fmt: skip

CONFIG = "config.json"
INDEX = "model.safetensors.index.json"
SINGLE = "model.safetensors"
PICKLED = (".pth", ".pt", ".bin")

# A 7-billion-parameter model has headers of some 30 kB. Far larger ones come from damage or malice and cost memory.
MAX_HEADER_BYTES = 16_000_000


class CheckpointError(ValueError):
    """A checkpoint that cannot be read or written: one line with the file, the cause and, if any, a way out."""


def weights_folder() -> Path:
    """The folder of the checkpoints that ship inside the package; it may be absent in a checkout without weights."""
    return Path(__file__).resolve().parent / "weights"


def shipped() -> list[str]:
    """Names of the checkpoints that ship, sorted: the folders of `weights_folder` that hold a config.json."""
    folder = weights_folder()
    if not folder.is_dir():
        return []
    return sorted(entry.name for entry in folder.iterdir() if (entry / CONFIG).is_file())


def resolve(name_or_path: str | os.PathLike[str]) -> Path:
    """The path of a checkpoint: a shipped name, a folder or a file.

    Args:
        name_or_path: a name out of `shipped` (which wins over a folder of that name; write ``./name`` for the folder),
            or a path; a leading ``~`` is the home folder.

    Returns:
        Path of an existing folder or file.

    Raises:
        CheckpointError: there is neither such a name nor such a path; the text lists the names that ship.
    """
    name = os.fspath(name_or_path)
    names = shipped()
    if name in names:
        return weights_folder() / name
    way_out = f"names that ship: {', '.join(names) or 'none in this checkout'}"
    if not name or "\0" in name:
        raise CheckpointError(f"model must be a name, a folder or a file, got {name!r}; {way_out}")
    path = Path(name).expanduser()
    if not path.exists():
        raise CheckpointError(f"{name}: no such model, folder or file; {way_out}")
    return path


def read_config(path: str | os.PathLike[str]) -> dict[str, Any]:
    """The configuration of a checkpoint.

    Args:
        path: the checkpoint's folder, or any file inside it.

    Returns:
        The object in config.json.

    Raises:
        CheckpointError: config.json is missing, damaged or no JSON object.
    """
    path = Path(path)
    config = path / CONFIG if path.is_dir() else path.with_name(CONFIG)
    if path.exists() and not config.exists():
        where = "in it" if path.is_dir() else "beside it"
        raise CheckpointError(f"{path}: not a checkpoint of this package; there is no {CONFIG} {where}")
    return _read_json(config)


def load_tensors(path: str | os.PathLike[str], *, under: Sequence[str] = ()) -> dict[str, Tensor]:
    """Every tensor of a checkpoint, on the CPU.

    Args:
        path: a folder (``model.safetensors.index.json`` with its shards, or one ``model.safetensors``), a
            ``.safetensors`` file, or a ``.pth``, ``.pt`` or ``.bin`` file whose state is at the top or under
            "state_dict" or "model".
        under: where else such a file may have its state, key by key from the top: a trainer's checkpoint, which holds
            other things beside it. Read there if it is there.

    Returns:
        Name to tensor. int8 weights with scales come back as float32, all others in the dtype that was stored; names
        saved as aliases of one tensor come back as one object. Tensors read from safetensors are private, copy-on-write
        maps of the file.

    Raises:
        CheckpointError: a file is missing, truncated, damaged, tampered with or holds something else than tensors.

    Note:
        Nothing is unpickled beyond what ``torch.load(weights_only=True)`` allows: no code of a file runs.
    """
    path = Path(path)
    if path.is_dir():
        return _load_folder(path)
    _require_file(path)
    if path.suffix == ".safetensors":
        return _dequantize(_load_safetensors(path), path)
    if path.suffix in PICKLED:
        return _dequantize(_load_pickled(path, under), path)
    raise CheckpointError(f"{path}: not a checkpoint; expected a folder, .safetensors, {', '.join(PICKLED)}")


def assign(model: nn.Module, tensors: Mapping[str, Tensor], path: str | os.PathLike[str]) -> None:
    """Makes the tensors of a checkpoint a model's parameters and buffers: each key once, none missing.

    Args:
        model: of the checkpoint's configuration, on the meta device or any other.
        tensors: as `load_tensors` returns them.
        path: where they came from, for the error.

    Raises:
        CheckpointError: if a key is missing, unknown, or of another shape.
    """
    try:
        model.load_state_dict(tensors, strict=True, assign=True)
    except RuntimeError as error:
        detail = " ".join(str(error).split())[:300]
        raise CheckpointError(f"{path}: weights do not fit the configuration: {detail}") from error


def save(
    folder: str | os.PathLike[str],
    tensors: Mapping[str, Tensor],
    config: Mapping[str, Any],
    *,
    int8: Iterable[str] = (),
    max_shard_bytes: int = 15_000_000,
    files: Mapping[str, bytes] | None = None,
    overwrite: bool = False,
) -> Path:
    """Writes a checkpoint folder, whole or not at all.

    Everything is written to a temporary sibling of `folder`, flushed to the disk and then renamed. With `overwrite` the
    two folders are exchanged in one step (Linux ``renameat2``), so that a reader finds the old or the new checkpoint at
    any time, and so does a restart after a kill. A file system without that step gets two renames, with a moment
    between them.

    Args:
        folder: the folder to make; missing parents are made too.
        tensors: name to dense tensor, any device and strides. Names of one and the same tensor are stored once.
        config: what config.json will hold; JSON types only.
        int8: names of floating-point tensors of two dimensions or more to store as int8 with one float32 scale a row:
            scale = max|row| / 127, rounded to nearest. Lossy: an entry moves by at most half its row's scale.
        max_shard_bytes: no safetensors file reaches this size, its header included.
        files: further files of the folder, plain name to content (a tokenizer, a licence).
        overwrite: replace `folder` if it holds a checkpoint. Nothing of the old folder is kept.

    Returns:
        Path of the folder.

    Raises:
        ValueError, TypeError: an argument breaks a rule above; one tensor alone reaches `max_shard_bytes`, say.
        CheckpointError: `folder` exists (without `overwrite`, or as something else than a checkpoint), or it cannot be
            written.
    """
    target = Path(folder).resolve()  # through a link, so that the link stays
    stored, aliases = _stored_tensors(tensors, frozenset(int8))
    shards = _plan_shards(stored, max_shard_bytes)
    shard_names = [f"model-{i:05d}-of-{len(shards):05d}.safetensors" for i in range(1, len(shards) + 1)]
    total = sum(_nbytes(tensor) for tensor in stored.values())
    index = {
        "metadata": {"total_size": total, "aliases": aliases},
        "weight_map": {name: shard for shard, names in zip(shard_names, shards, strict=True) for name in names},
    }
    texts = {CONFIG: _json_bytes(config, "config"), INDEX: _json_bytes(index, "tensors")}
    for name, content in (files or {}).items():
        if not _is_plain_name(name) or name in texts or name in shard_names:
            raise ValueError(f"save: files must have plain names other than the checkpoint's own, got {name!r}")
        texts[name] = content

    temporary = target.with_name(f".{target.name}.{secrets.token_hex(4)}.tmp")
    try:
        _require_free(target, overwrite)
        target.parent.mkdir(parents=True, exist_ok=True)
        temporary.mkdir()
        for shard, names in zip(shard_names, shards, strict=True):
            _write_shard(temporary / shard, {name: stored[name] for name in names})
        for name, content in texts.items():
            _write_bytes(temporary / name, content)
        _sync(temporary)
        _rename_over(temporary, target)
        _sync(target.parent)
    except OSError as error:
        raise CheckpointError(f"{target}: cannot be written: {error.strerror or error}") from error
    finally:  # what is left there is a half-written checkpoint after an error, or the one that was replaced
        shutil.rmtree(temporary, ignore_errors=True)
    return target


# -------------------------------------------------------------------------------------------------------------- reading


def _load_folder(folder: Path) -> dict[str, Tensor]:
    index_path = folder / INDEX
    if not index_path.exists():
        if (folder / SINGLE).exists():
            return load_tensors(folder / SINGLE)
        raise CheckpointError(f"{folder}: not a checkpoint; it has neither {INDEX} nor {SINGLE}")
    index = _read_json(index_path)
    weight_map, metadata = index.get("weight_map"), index.get("metadata", {})
    aliases = metadata.get("aliases", {}) if isinstance(metadata, dict) else None
    if not (_is_str_dict(weight_map) and _is_str_dict(aliases)):
        raise CheckpointError(f"{index_path}: damaged; weight_map and metadata.aliases must map names to names")

    names_of: dict[str, list[str]] = {}
    for name, shard in weight_map.items():
        names_of.setdefault(shard, []).append(name)
    for shard in names_of:  # all names before the first file is opened
        if not _is_plain_name(shard) or not shard.endswith(".safetensors"):
            raise CheckpointError(
                f"{index_path}: tampered; a shard must be a .safetensors file beside it, got {shard!r}"
            )

    tensors: dict[str, Tensor] = {}
    for shard, names in names_of.items():
        shard_path = folder / shard
        _require_file(shard_path)
        found = _load_safetensors(shard_path)
        for name in names:
            if name not in found:
                raise CheckpointError(f"{shard_path}: damaged; {name} is missing, which {INDEX} places here")
            tensors[name] = found[name]
    tensors = _dequantize(tensors, folder)
    for name, original in aliases.items():
        if name in tensors or original not in weight_map or original not in tensors:
            raise CheckpointError(f"{index_path}: damaged; {name} cannot be an alias of {original}")
    for name, original in aliases.items():
        tensors[name] = tensors[original]
    return tensors


def _load_safetensors(path: Path) -> dict[str, Tensor]:
    """The file's tensors; its first bytes are checked before the library maps and parses it."""
    try:
        size = path.stat().st_size
        with open(path, "rb") as file:
            start = file.read(8)
        _refuse_pointer(path, start)
        header = int.from_bytes(start, "little")
        if size < 8 or header > MAX_HEADER_BYTES:
            raise CheckpointError(f"{path}: not a safetensors file, or damaged; fetch it again")
        if header + 8 > size:
            raise CheckpointError(f"{path}: truncated; its header ends at byte {header + 8}, the file at {size}")
        with safe_open(path, framework="pt", device="cpu") as file:
            return {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 (no mapping)
    except OSError as error:
        raise CheckpointError(f"{path}: cannot be read: {error.strerror or error}") from error
    except (SafetensorError, RuntimeError, ValueError, KeyError, TypeError, AttributeError) as error:
        if isinstance(error, CheckpointError):
            raise
        raise CheckpointError(f"{path}: truncated or damaged ({_first_line(error)}); fetch it again") from error


def _load_pickled(path: Path, under: Sequence[str]) -> dict[str, Tensor]:
    try:
        with open(path, "rb") as file:
            _refuse_pointer(path, file.read(8))
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # old files make torch warn about its own past
            state = torch.load(path, map_location="cpu", weights_only=True)
    except CheckpointError:
        raise
    except OSError as error:
        raise CheckpointError(f"{path}: cannot be read: {error.strerror or error}") from error
    except Exception as error:  # on garbage the restricted unpickler raises whatever its opcodes stumble on
        # The restricted unpickler's first line is advice to drop the restriction.
        text = "unreadable opcodes" if "weights_only" in str(error) else _first_line(error)
        foreign = re.search(r"GLOBAL ([\w.]+)", str(error))
        if foreign is not None:
            cause = f"asks for {foreign[1]} and not only for tensors; it is not unpickled, since that could run code"
        elif isinstance(error, MemoryError) or "can't allocate memory" in str(error):
            cause = "does not fit into memory"
        else:
            cause = f"truncated, or not a PyTorch file ({text}); fetch it again"
        raise CheckpointError(f"{path}: {cause}") from error
    for path_of_keys in (under, ("state_dict",), ("model",)):
        found = state
        for key in path_of_keys:
            found = found.get(key) if isinstance(found, dict) else None
        if path_of_keys and isinstance(found, dict):
            state = found
            break
    if not isinstance(state, dict) or not state:
        raise CheckpointError(f"{path}: not a checkpoint; expected names and tensors, got {type(state).__name__}")
    for name, tensor in state.items():
        if not isinstance(name, str) or not isinstance(tensor, Tensor):
            raise CheckpointError(f"{path}: not a state dict; entry {name!r:.80} is a {type(tensor).__name__}")
        if tensor.layout != torch.strided or tensor.device.type != "cpu" or tensor.is_quantized:
            raise CheckpointError(f"{path}: {name} is no dense CPU tensor but {tensor.layout}, {tensor.device}")
    return {name: tensor.detach() for name, tensor in state.items()}


def _dequantize(tensors: dict[str, Tensor], path: Path) -> dict[str, Tensor]:
    """`tensors` with every pair of int8 `name` and `name.scale` replaced by its float32 product."""
    scales = {
        f"{name}.scale" for name, tensor in tensors.items() if tensor.dtype == torch.int8 and f"{name}.scale" in tensors
    }
    result = {}
    for name, tensor in tensors.items():
        if name in scales:
            continue
        if f"{name}.scale" in scales:
            scale = tensors[f"{name}.scale"]
            if scale.dtype != torch.float32 or tensor.dim() == 0 or scale.shape != tensor.shape[:1]:
                raise CheckpointError(
                    f"{path}: {name}.scale must be float32 with one entry a row of {tuple(tensor.shape)}, "
                    f"got {scale.dtype} {tuple(scale.shape)}"
                )
            tensor = tensor.float() * scale.view(-1, *[1] * (tensor.dim() - 1))
        result[name] = tensor
    return result


def _read_json(path: Path) -> dict[str, Any]:
    _require_file(path)
    try:
        if path.stat().st_size > MAX_HEADER_BYTES:
            raise CheckpointError(f"{path}: larger than {MAX_HEADER_BYTES} bytes, which no checkpoint needs")
        content = path.read_bytes()
        _refuse_pointer(path, content)
        value = json.loads(content)
    except OSError as error:
        raise CheckpointError(f"{path}: cannot be read: {error.strerror or error}") from error
    except (ValueError, RecursionError) as error:
        if isinstance(error, CheckpointError):
            raise
        raise CheckpointError(f"{path}: damaged, not JSON ({_first_line(error)})") from error
    if not isinstance(value, dict):
        raise CheckpointError(f"{path}: damaged; expected a JSON object, got {type(value).__name__}")
    return value


def _require_file(path: Path) -> None:
    """Only regular files are opened: a pipe would wait for ever."""
    try:
        if path.is_file():
            return
        cause = "is not a regular file" if path.exists() else "no such file"
    except ValueError:  # a zero byte in the name
        cause = "no such file"
    raise CheckpointError(f"{path}: {cause}")


def _refuse_pointer(path: Path, start: bytes) -> None:
    if start.startswith(b"version "):
        raise CheckpointError(f"{path}: a Git LFS pointer, not the file itself; run `git lfs pull`")


def _is_plain_name(name: str) -> bool:
    return bool(name) and name not in (".", "..") and not set(name) & {"/", "\\", "\0", ":"}


def _is_str_dict(value: object) -> TypeGuard[dict[str, str]]:
    return isinstance(value, dict) and all(isinstance(entry, str) for entry in value.values())


def _first_line(error: BaseException) -> str:
    text = (str(error).strip().splitlines() or [""])[0][:160]
    return text if " " in text else f"{type(error).__name__} {text}".strip()  # a KeyError's text is a bare key


# -------------------------------------------------------------------------------------------------------------- writing


def _stored_tensors(tensors: Mapping[str, Tensor], int8: Collection[str]) -> tuple[dict[str, Tensor], dict[str, str]]:
    """What goes to the disk (each tensor under its first name, int8 with scales), and further names to first names."""
    unknown = sorted(set(int8) - set(tensors))
    if unknown:
        raise ValueError(f"save: int8 must name tensors of the checkpoint, got {unknown[0]!r}")
    stored: dict[str, Tensor] = {}
    aliases: dict[str, str] = {}
    first: dict[tuple, str] = {}
    for name, tensor in tensors.items():
        if not isinstance(name, str) or not isinstance(tensor, Tensor):
            raise TypeError(f"save: tensors must map names to tensors, got {name!r} -> {type(tensor).__name__}")
        if tensor.layout != torch.strided or tensor.is_quantized or tensor.is_meta:
            raise ValueError(f"save: tensors must be dense, with data, got {name} ({tensor.layout}, {tensor.device})")
        if tensor.dtype == torch.int8 and f"{name}.scale" in tensors:
            raise ValueError(f"save: int8 tensor {name} next to {name}.scale would be read back as their product")
        tensor = tensor.detach()
        key = (tensor.device, tensor.data_ptr(), tensor.dtype, tuple(tensor.shape), tensor.stride())
        if tensor.numel() and first.setdefault(key, name) != name:
            aliases[name] = first[key]
        else:
            stored[name] = tensor
    for name in dict.fromkeys(aliases.get(name, name) for name in int8):
        tensor = stored[name]
        if tensor.dim() < 2 or not tensor.is_floating_point():
            raise ValueError(f"save: int8 needs floating point and 2 dimensions or more, got {name} {tensor.dtype}")
        if f"{name}.scale" in tensors:
            raise ValueError(f"save: int8 would store {name}.scale, a name that is taken")
        if not torch.isfinite(tensor).all():
            raise ValueError(f"save: int8 takes finite tensors, got inf or nan in {name}")
        stored[name], stored[f"{name}.scale"] = quantize_rows(tensor)
    return stored, aliases


def quantize_rows(tensor: Tensor, form: str = "int8") -> tuple[Tensor, Tensor]:
    """A tensor in 8 bits with one scale a row, rounded to nearest: tensor is about entries * scale[:, None, ...].

    Args:
        tensor: (rows, ...), floating point and finite.
        form: "int8", from -127 to 127, or "fp8", e4m3: 3 bits of mantissa, up to 448.

    Returns:
        Entries of the same shape, int8 or float8_e4m3fn, and scales (rows,) float32, such that the largest entry of a
        row is the largest that the form has.

    Raises:
        ValueError: for another form.
    """
    largest = {"int8": 127.0, "fp8": 448.0}.get(form)
    if largest is None:
        raise ValueError(f"quantize_rows: form must be 'int8' or 'fp8', got {form!r}")
    rows = tensor.float().flatten(1)
    peak = rows.abs().amax(1) if rows.shape[1] else rows.new_zeros(rows.shape[0])
    scale = torch.where(peak > 0, peak / largest, 1.0)  # a row of zeros has no scale of its own
    entries = (rows / scale[:, None]).clamp(-largest, largest)
    entries = entries.round().to(torch.int8) if form == "int8" else entries.to(torch.float8_e4m3fn)
    return entries.view(tensor.shape), scale


def _plan_shards(tensors: Mapping[str, Tensor], max_shard_bytes: int) -> list[list[str]]:
    """Names of each shard: in order, a new one whenever the next tensor would bring the file to `max_shard_bytes`."""
    # Per tensor: its bytes, its name as JSON, and at most 80 bytes of dtype and offsets and 20 a dimension. Per file:
    # the length field, {"__metadata__": {"format": "pt"}}, and padding.
    overhead = 64
    shards: list[list[str]] = [[]]
    size = overhead
    for name, tensor in tensors.items():
        need = _nbytes(tensor) + len(json.dumps(name)) + 80 + 20 * tensor.dim()
        if overhead + need >= max_shard_bytes:
            size = _nbytes(tensor)
            raise ValueError(
                f"save: max_shard_bytes must exceed each tensor, got {max_shard_bytes} for {name} of {size}"
            )
        if size + need >= max_shard_bytes:
            shards.append([])
            size = overhead
        shards[-1].append(name)
        size += need
    return shards


def _nbytes(tensor: Tensor) -> int:
    return tensor.numel() * tensor.element_size()


def _json_bytes(value: Mapping[str, Any], argument: str) -> bytes:
    try:
        text = json.dumps(dict(value), indent=2, allow_nan=False)
    except (TypeError, ValueError) as error:
        raise TypeError(f"save: {argument} must hold JSON types only: {_first_line(error)}") from error
    return text.encode() + b"\n"


def _write_shard(path: Path, tensors: Mapping[str, Tensor]) -> None:
    storages = set()
    ready = {}
    for name, tensor in tensors.items():
        tensor = tensor.cpu().contiguous()
        storage = tensor.untyped_storage()
        # safetensors takes no two tensors of one storage: views of a larger tensor are stored as tensors of their own.
        if storage.nbytes() != _nbytes(tensor) or storage.data_ptr() in storages:
            tensor = tensor.clone()
        storages.add(tensor.untyped_storage().data_ptr())
        ready[name] = tensor
    try:
        save_file(ready, path, metadata={"format": "pt"})
    except KeyError as error:
        raise TypeError(f"save: tensors must have a dtype that safetensors knows, got {_first_line(error)}") from error
    except SafetensorError as error:
        raise OSError(errno.EIO, _first_line(error)) from error
    path.chmod(path.parent.stat().st_mode & 0o666)  # safetensors makes files that only their owner may read
    _sync(path)


def _write_bytes(path: Path, content: bytes) -> None:
    with open(path, "wb") as file:
        file.write(content)
        file.flush()
        os.fsync(file.fileno())


def _sync(path: Path) -> None:
    """Flushes a file's data, or a folder's entries, to the disk."""
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def _require_free(target: Path, overwrite: bool) -> None:
    if not target.exists() or (target.is_dir() and not any(target.iterdir())):
        return
    if not overwrite:
        raise CheckpointError(f"{target}: exists already; choose another name, or allow it to be overwritten")
    if not (target / CONFIG).is_file():
        raise CheckpointError(f"{target}: is not a checkpoint and is not overwritten; choose another name")


def _rename_over(source: Path, target: Path) -> None:
    """Puts the folder `source` at `target`; a checkpoint that stood there is left at `source`."""
    if not target.exists():
        os.rename(source, target)
        return
    if _exchange(source, target):
        return
    parked = source.with_suffix(".old")
    os.rename(target, parked)
    try:
        os.rename(source, target)
    except OSError:
        os.rename(parked, target)
        raise
    os.rename(parked, source)


def _exchange(one: Path, other: Path) -> bool:
    """Swaps two paths in one step; False where the kernel or the file system cannot."""
    renameat2 = getattr(ctypes.CDLL(None, use_errno=True), "renameat2", None)
    if renameat2 is None:
        return False
    at_cwd, exchange = -100, 2  # AT_FDCWD and RENAME_EXCHANGE of Linux
    if renameat2(at_cwd, os.fsencode(one), at_cwd, os.fsencode(other), exchange) == 0:
        return True
    code = ctypes.get_errno()
    if code in (errno.EINVAL, errno.ENOSYS, errno.EOPNOTSUPP):
        return False
    raise OSError(code, os.strerror(code))
