"""The one schema of benchmark results, as JSON files in `bench/results/`.

A file holds one run of one family on one device:

    schema        1
    family        "codes"
    environment   device, kind ("cuda" or "cpu"), driver, python, torch, triton, cuda, unifiedar, commit, date,
                  copy_bytes_per_s, matmul_flops_per_s
    cases         a list of {name, shape, dtype, bytes, flops, floor_ms, floor, sets, backend, ours, backends, peers,
                  yardsticks, starts, launches}

`ours` is the timing of the public function with backend="auto", `backend` the backend that it chose, `backends` the
timings of single backends that were forced, `peers` those of everyone else, `yardsticks` ({timing, flops}) those of
what computes something else. A timing is {median_ms, p10_ms, p90_ms,
extra_memory_bytes, samples, method, error, differ} (see `bench._time.Timing`; `differ` may be absent). `floor_ms` is
the time that no implementation beats and `floor` says how it was computed; `bytes` and `flops` are what the work needs
at least. `starts` says what beginning costs some of the variants (see `bench._time.Start`), `launches` what a call of
some of them starts on the GPU (`bench._time.Launches`); both are empty unless asked for. These three may be absent.
"""

from __future__ import annotations

import datetime
import json
import math
import os
import platform
import re
import subprocess
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field, fields
from pathlib import Path
from typing import Any

import torch

from bench._time import Launches, Start, Timing

__all__ = [
    "SCHEMA",
    "CaseResult",
    "Environment",
    "ResultsError",
    "Run",
    "environment",
    "read",
    "read_all",
    "triton_version",
    "write",
]

SCHEMA = 1
ROOT = Path(__file__).resolve().parent.parent
RESULTS = ROOT / "bench" / "results"


class ResultsError(ValueError):
    """A results file that does not follow the schema: names the file, the field and what is wrong with it."""


@dataclass(frozen=True)
class Environment:
    """Where and when a run was made. `driver`, `triton`, `cuda`, `commit`, `matmul_flops_per_s` may be unknown (None);
    the two ceilings were measured in the same run, in bytes and operations per second; `date` is ISO 8601, UTC."""

    device: str
    kind: str
    driver: str | None
    python: str
    torch: str
    triton: str | None
    cuda: str | None
    unifiedar: str
    commit: str | None
    date: str
    copy_bytes_per_s: float
    matmul_flops_per_s: float | None


@dataclass(frozen=True)
class Yardstick:
    """The timing of what computes something else, and how many operations that is."""

    timing: Timing
    flops: int


@dataclass(frozen=True)
class CaseResult:
    """One row of a run; the module docstring explains the fields."""

    name: str
    shape: dict[str, int]
    dtype: str
    bytes: int
    flops: int
    floor_ms: float
    floor: str
    sets: int
    backend: str | None
    ours: Timing
    backends: dict[str, Timing] = field(default_factory=dict)
    peers: dict[str, Timing] = field(default_factory=dict)
    yardsticks: dict[str, Yardstick] = field(default_factory=dict)
    starts: dict[str, Start] = field(default_factory=dict)
    launches: dict[str, Launches] = field(default_factory=dict)

    def best_peer(self) -> tuple[str, float] | None:
        """Name and median milliseconds of the fastest peer that worked, or None."""
        timed = [(t.median_ms, name) for name, t in self.peers.items() if t.median_ms is not None]
        return (min(timed)[1], min(timed)[0]) if timed else None


@dataclass(frozen=True)
class Run:
    """One family measured on one device."""

    family: str
    environment: Environment
    cases: list[CaseResult]


def _git_commit(root: Path) -> str | None:
    try:
        found = subprocess.run(
            ["git", "-C", str(root), "describe", "--always", "--dirty", "--abbrev=12", "--exclude=*"],
            capture_output=True,
            text=True,
            timeout=10,
        )
    except (OSError, subprocess.TimeoutExpired):
        return None
    return found.stdout.strip() or None if found.returncode == 0 else None


def _driver() -> str | None:
    try:
        found = subprocess.run(
            ["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"],
            capture_output=True,
            text=True,
            timeout=20,
        )
    except (OSError, subprocess.TimeoutExpired):
        return None
    lines = found.stdout.split()
    return lines[0] if found.returncode == 0 and lines else None


def _cpu_name() -> str:
    try:
        text = Path("/proc/cpuinfo").read_text()
    except OSError:
        text = ""
    name = re.search(r"^model name\s*:\s*(.+)$", text, re.MULTILINE)
    return f"{name.group(1).strip() if name else platform.machine()}, {torch.get_num_threads()} threads"


def triton_version() -> str | None:
    """Of the Triton that is installed; None without one."""
    try:
        import triton
    except ImportError:
        return None
    return str(triton.__version__)


def environment(
    device: torch.device | str,
    *,
    copy_bytes_per_s: float,
    matmul_flops_per_s: float | None = None,
    commit: str | None = None,
) -> Environment:
    """Describe this machine and these versions.

    Args:
        device: the device that was measured.
        copy_bytes_per_s, matmul_flops_per_s: the ceilings measured in this run.
        commit: of the sources measured; None asks the environment variable UNIFIEDAR_COMMIT, then git.
    """
    import unifiedar

    device = torch.device(device)
    cuda = device.type == "cuda"
    return Environment(
        device=torch.cuda.get_device_name(device) if cuda else _cpu_name(),
        kind=device.type,
        driver=_driver() if cuda else None,
        python=platform.python_version(),
        torch=torch.__version__,
        triton=triton_version(),
        cuda=torch.version.cuda,
        unifiedar=unifiedar.__version__,
        commit=commit or os.environ.get("UNIFIEDAR_COMMIT") or _git_commit(ROOT),
        date=datetime.datetime.now(datetime.timezone.utc).isoformat(timespec="seconds"),
        copy_bytes_per_s=copy_bytes_per_s,
        matmul_flops_per_s=matmul_flops_per_s,
    )


def slug(text: str) -> str:
    """`text` as a part of a file name: lower case letters, digits and single hyphens."""
    return re.sub(r"[^a-z0-9]+", "-", text.lower()).strip("-")


def write(run: Run, folder: Path | str = RESULTS) -> Path:
    """Write a run as `<family>-<device>-<date or commit>.json` and return its path; the same commit on the same device
    replaces its earlier file."""
    environment = run.environment
    stamp = environment.commit or environment.date
    path = Path(folder) / f"{slug(run.family)}-{slug(environment.device)}-{slug(stamp)}.json"
    document = {"schema": SCHEMA, **asdict(run)}
    _check_run(document, path)
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_suffix(".partial")
    partial.write_text(json.dumps(document, indent=1, allow_nan=False) + "\n")
    partial.replace(path)
    return path


def read(path: Path | str) -> Run:
    """Read and validate one results file.

    Raises:
        ResultsError: if the file cannot be read, is not JSON, or breaks the schema.
    """
    path = Path(path)
    try:
        document = json.loads(path.read_text())
    except (OSError, UnicodeDecodeError, json.JSONDecodeError) as error:
        raise ResultsError(f"{path}: not a readable JSON file: {error}") from error
    _check_run(document, path)

    def timings(of: dict[str, Any]) -> dict[str, Timing]:
        return {name: Timing(**timing) for name, timing in of.items()}

    cases = [
        CaseResult(
            **{
                **case,
                "ours": Timing(**case["ours"]),
                "backends": timings(case["backends"]),
                "peers": timings(case["peers"]),
                "yardsticks": {
                    name: Yardstick(Timing(**one["timing"]), one["flops"])
                    for name, one in case.get("yardsticks", {}).items()
                },
                "starts": {name: Start(**start) for name, start in case.get("starts", {}).items()},
                "launches": {name: Launches(**count) for name, count in case.get("launches", {}).items()},
            }
        )
        for case in document["cases"]
    ]
    return Run(document["family"], Environment(**document["environment"]), cases)


def read_all(folder: Path | str = RESULTS) -> list[Run]:
    """Every run in a folder, oldest first; an absent folder holds none.

    Raises:
        ResultsError: if any .json file in it breaks the schema.
    """
    runs = [read(path) for path in sorted(Path(folder).glob("*.json"))]
    return sorted(runs, key=lambda run: run.environment.date)


# What a value must be, by field: (types, may be None). bool counts as no number.
_Rules = dict[str, tuple[tuple[type, ...], bool]]
_TEXT: tuple[type, ...] = (str,)
_INT: tuple[type, ...] = (int,)
_NUMBER: tuple[type, ...] = (int, float)
_RUN: _Rules = {
    "schema": (_INT, False),
    "family": (_TEXT, False),
    "environment": ((dict,), False),
    "cases": ((list,), False),
}
_ENVIRONMENT: _Rules = {
    **dict.fromkeys(("device", "kind", "python", "torch", "unifiedar", "date"), (_TEXT, False)),
    **dict.fromkeys(("driver", "triton", "cuda", "commit"), (_TEXT, True)),
    "copy_bytes_per_s": (_NUMBER, False),
    "matmul_flops_per_s": (_NUMBER, True),
}
_CASE: _Rules = {
    **dict.fromkeys(("name", "dtype", "floor"), (_TEXT, False)),
    **dict.fromkeys(("bytes", "flops", "sets"), (_INT, False)),
    "floor_ms": (_NUMBER, False),
    "backend": (_TEXT, True),
    **dict.fromkeys(("shape", "ours", "backends", "peers", "yardsticks", "starts", "launches"), ((dict,), False)),
}
_YARDSTICK: _Rules = {"timing": ((dict,), False), "flops": (_INT, False)}
_START: _Rules = {
    **dict.fromkeys(("cold_ms", "new_ms", "prepare_ms"), (_NUMBER, True)),
    "error": (_TEXT, True),
    "at_once": (_INT, False),
}
_LAUNCHES: _Rules = {
    **dict.fromkeys(("launches", "kernels"), (_INT, True)),
    "busy_ms": (_NUMBER, True),
    "error": (_TEXT, True),
}
_TIMING: _Rules = {
    **dict.fromkeys(("median_ms", "p10_ms", "p90_ms"), (_NUMBER, True)),
    "extra_memory_bytes": (_INT, True),
    "samples": (_INT, False),
    "method": (_TEXT, False),
    "error": (_TEXT, True),
    "differ": (_NUMBER, True),
}
for _record, _rules in (
    (Environment, _ENVIRONMENT), (CaseResult, _CASE), (Timing, _TIMING), (Start, _START), (Launches, _LAUNCHES),
    (Yardstick, _YARDSTICK),
):  # fmt: skip
    if {one.name for one in fields(_record)} != set(_rules):
        raise RuntimeError(f"{_record.__name__} and its rules name different fields")


def _check(document: object, rules: _Rules, where: str, absent: Sequence[str] = ()) -> dict[str, Any]:
    if not isinstance(document, dict):
        raise ResultsError(f"{where}: must be an object, got {type(document).__name__}")
    if missing := sorted(set(rules) - set(document) - set(absent)):
        raise ResultsError(f"{where}: lacks {', '.join(missing)}")
    if unknown := sorted(set(document) - set(rules)):
        raise ResultsError(f"{where}: has unknown fields {', '.join(unknown)}")
    for name, (types, optional) in rules.items():
        if name in absent and name not in document:
            continue
        value = document[name]
        if value is None and optional:
            continue
        if not isinstance(value, types) or isinstance(value, bool):
            wanted = " or ".join(one.__name__ for one in types) + (" or null" if optional else "")
            raise ResultsError(f"{where}: {name} must be {wanted}, got {value!r:.60}")
        if isinstance(value, int | float) and not (math.isfinite(value) and value >= 0):
            raise ResultsError(f"{where}: {name} must be finite and not negative, got {value!r}")
    return document


def _check_timing(document: object, where: str) -> None:
    timing = _check(document, _TIMING, where, absent=("differ",))
    times = [timing[name] for name in ("p10_ms", "median_ms", "p90_ms")]
    if timing["error"] is not None:
        if times != [None, None, None]:
            raise ResultsError(f"{where}: has both an error and times")
    elif None in times or timing["samples"] < 1:
        raise ResultsError(f"{where}: has neither times nor an error")
    elif times != sorted(times):
        raise ResultsError(f"{where}: p10_ms <= median_ms <= p90_ms must hold, got {times}")
    if (timing.get("differ") or 0) > 1:
        raise ResultsError(f"{where}: differ must be at most 1, got {timing['differ']}")


def _check_start(document: object, where: str) -> None:
    start = _check(document, _START, where, absent=("at_once",))
    times = [start[name] for name in ("cold_ms", "new_ms", "prepare_ms")]
    if start["error"] is not None:
        if times != [None, None, None]:
            raise ResultsError(f"{where}: has both an error and times")
    elif start["cold_ms"] is None or start["prepare_ms"] is None:
        raise ResultsError(f"{where}: has neither times nor an error")


def _check_launches(document: object, where: str) -> None:
    count = _check(document, _LAUNCHES, where)
    if (count["error"] is None) == (None in (count["launches"], count["kernels"], count["busy_ms"])):
        raise ResultsError(f"{where}: must have either all counts or an error")


def _check_run(document: object, path: Path) -> None:
    where = str(path)
    # The schema number goes first: with another one, any further complaint would mislead.
    if isinstance(document, dict) and document.get("schema", SCHEMA) != SCHEMA:
        raise ResultsError(f"{where}: schema must be {SCHEMA}, got {document['schema']!r}")
    run = _check(document, _RUN, where)
    environment = _check(run["environment"], _ENVIRONMENT, f"{where}: environment")
    if environment["kind"] not in ("cuda", "cpu"):
        raise ResultsError(f"{where}: environment: kind must be cuda or cpu, got {environment['kind']!r}")
    try:
        datetime.datetime.fromisoformat(environment["date"])
    except ValueError as error:
        raise ResultsError(f"{where}: environment: date must be ISO 8601, got {environment['date']!r}") from error
    names: set[str] = set()
    for i, entry in enumerate(run["cases"]):
        case = _check(entry, _CASE, f"{where}: cases[{i}]", absent=("yardsticks", "starts", "launches"))
        at = f"{where}: cases[{i}] ({case['name']})"
        if case["name"] in names:
            raise ResultsError(f"{at}: name occurs twice")
        names.add(case["name"])
        for size, value in case["shape"].items():
            if not isinstance(value, int) or isinstance(value, bool):
                raise ResultsError(f"{at}: shape: {size} must be int, got {value!r}")
        _check_timing(case["ours"], f"{at}: ours")
        for group in ("backends", "peers"):
            for name, timing in case[group].items():
                _check_timing(timing, f"{at}: {group}: {name}")
        for name, one in case.get("yardsticks", {}).items():
            _check_timing(_check(one, _YARDSTICK, f"{at}: yardsticks: {name}")["timing"], f"{at}: yardsticks: {name}")
        for name, start in case.get("starts", {}).items():
            _check_start(start, f"{at}: starts: {name}")
        for name, count in case.get("launches", {}).items():
            _check_launches(count, f"{at}: launches: {name}")
