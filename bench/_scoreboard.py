"""The scoreboard: `docs/scoreboard.md` and its plots, written from results files and nothing else."""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from bench._results import RESULTS, ROOT, CaseResult, Run, read_all, slug
from bench._time import Timing

__all__ = ["MissingMatplotlib", "latest", "render", "write"]

_HEAD = """# Scoreboard

Written by `python -m bench scoreboard` from the files in `{results}`; do not edit. How times are taken is described in
`bench/_time.py`, what each case does in `bench/cases_<family>.py`. All times are medians in milliseconds; compare only
within a row, which is one process on one device.
"""
_EMPTY = """
Nothing has been measured yet: `python -m bench <family>` writes a results file (`python -m bench list` shows the
families).
"""
_LEGEND = """
- **peer** in bold: that peer beats ours on this case.
- *ratio*: the best peer's time over ours; above 1 ours is faster.
- *of floor*: the floor's time over ours. The floor is the least time for the bytes (or operations) that the work needs
  at the ceilings measured in the same run.
- *extra memory*: peak device memory during a call beyond inputs and outputs, ours / best peer.
"""
_YARDSTICKS = """Beside what computes something else (attention without a mask: all scores, where ours are the visible
ones), in TFLOP/s of the operations that each has to do, and milliseconds:"""
_DIFFER = (
    """Codes that are not the ones that float64 chooses on the path taken, in a million; of a pyramid of bits, bits:"""
)
_STARTS = """What beginning costs, in milliseconds of wall time (`bench/_start.py`): the first call in a fresh process,
compiling included; the first call afterwards with another schedule; what is done once a schedule, such as making a
mask{beside}:"""


_LAUNCHES = """What a call launches (`bench/_launches.py`): calls of the host, a CUDA graph being one; what then ran on
the GPU; for how many milliseconds something ran there, and the share of the call's time that this is:"""


class MissingMatplotlib(RuntimeError):
    """Plots were asked for where matplotlib is not installed."""


def latest(runs: Sequence[Run]) -> list[Run]:
    """The runs to show: for each family and device, of every case the newest result that holds it.

    Results of one family and device that come from different runs stay apart, newest run first, since times are
    compared within a process only.
    """
    seen: set[tuple[str, str, str]] = set()
    shown = []
    for run in sorted(runs, key=lambda one: one.environment.date, reverse=True):
        key = (run.family, run.environment.device)
        fresh = [case for case in run.cases if (*key, case.name) not in seen]
        seen.update((*key, case.name) for case in fresh)
        if fresh:
            shown.append(Run(run.family, run.environment, fresh))
    return sorted(shown, key=lambda one: (one.family, one.environment.kind != "cuda", one.environment.device))


def _milliseconds(value: float | None) -> str:
    if value is None:
        return "failed"
    return f"{value:.4f}" if value < 1 else f"{value:.3f}" if value < 10 else f"{value:.1f}"


def _ours(timing: Timing, backend: str | None) -> str:
    if timing.median_ms is None:
        return f"failed: {timing.error}"
    spread = f"{_milliseconds(timing.p10_ms)}–{_milliseconds(timing.p90_ms)}"
    return f"{_milliseconds(timing.median_ms)} ({spread}, {backend or 'unknown backend'})"


def _memory(value: int | None) -> str:
    return "?" if value is None else f"{value / 1e6:.1f} MB"


def _cell(text: str) -> str:
    return text.replace("|", "\\|").replace("\n", " ")


def _row(case: CaseResult, peers: Sequence[str]) -> list[str]:
    ours, best = case.ours.median_ms, case.best_peer()
    cells = [case.name, " ".join(f"{k} {v}" for k, v in case.shape.items()), case.dtype, _ours(case.ours, case.backend)]
    for name in peers:
        timing = case.peers.get(name)
        text = "–" if timing is None else _milliseconds(timing.median_ms)
        wins = timing is not None and timing.median_ms is not None and (ours is None or timing.median_ms < ours)
        cells.append(f"**{text}**" if wins else text)
    if best is None:
        cells += ["–", "–"]
    else:
        name, time = best
        wins = ours is None or time < ours
        cells += [f"**{name}**" if wins else name, "–" if ours is None else f"{time / ours:.2f}×"]
    cells.append("–" if ours is None else f"{100 * case.floor_ms / ours:.0f} %")
    if best is not None:
        cells.append(f"{_memory(case.ours.extra_memory_bytes)} / {_memory(case.peers[best[0]].extra_memory_bytes)}")
    else:
        cells.append(_memory(case.ours.extra_memory_bytes))
    return [_cell(cell) for cell in cells]


def _wins(run: Run) -> list[str]:
    lines = []
    for case in run.cases:
        best = case.best_peer()
        if best is not None and (case.ours.median_ms is None or best[1] < case.ours.median_ms):
            by = "ours failed" if case.ours.median_ms is None else f"{case.ours.median_ms / best[1]:.2f}× faster"
            lines.append(f"- {case.name}: **{best[0]}** ({by})")
    return lines


def _section(run: Run, plot: str | None) -> str:
    where = run.environment
    versions = [f"torch {where.torch}", f"triton {where.triton}" if where.triton else "no triton"]
    versions += [f"CUDA {where.cuda}"] if where.cuda else []
    versions += [f"driver {where.driver}"] if where.driver else []
    versions.append(f"unifiedar {where.unifiedar} at {where.commit or 'an unknown commit'}")
    ceilings = f"copy {where.copy_bytes_per_s / 1e9:,.0f} GB/s"
    if where.matmul_flops_per_s is not None:
        ceilings += f", matrix product {where.matmul_flops_per_s / 1e12:,.1f} TFLOP/s"
    peers = sorted({name for case in run.cases for name in case.peers})
    head = ["case", "shape", "dtype", "ours (p10–p90, backend)", *peers]
    head += ["best peer", "ratio", "of floor", "extra memory"]
    table = [head, ["---"] * len(head), *(_row(case, peers) for case in run.cases)]
    clock = "GPU time" if where.kind == "cuda" else "wall time"
    lines = [f"\n## {run.family} on {where.device}", ""]
    lines += [f"{clock}; {where.date[:10]}; {', '.join(versions)}. Ceilings of this run: {ceilings}.", ""]
    if plot:
        lines += [f"![{run.family} on {where.device}: the best peer's time over ours]({plot})", ""]
    lines += ["| " + " | ".join(row) + " |" for row in table]
    wins = _wins(run)
    lines += ["", "Peers that win:", "", *wins] if wins else ["", "No peer wins on any of these cases."]
    failures = [
        f"- {case.name}, {name}: {_cell(timing.error)}"
        for case in run.cases
        for name, timing in {"ours": case.ours, **case.peers}.items()
        if timing.error
    ]
    if failures:
        lines += ["", "Not timed:", "", *failures]
    backends = _backends(run)
    if backends:
        lines += ["", "Our backends one by one:", "", *backends]
    lines += ["", "Of the floor, by everyone:", "", *_shares(run)]
    yardsticks = _yardsticks(run)
    if yardsticks:
        lines += ["", _YARDSTICKS, "", *yardsticks]
    differ = _differ(run)
    if differ:
        lines += ["", _DIFFER, "", *differ]
    starts = _starts(run)
    if starts:
        at_once = max(start.at_once for case in run.cases for start in case.starts.values())
        beside = f" (up to {at_once} processes at once)" if at_once > 1 else ""
        lines += ["", _STARTS.format(beside=beside), "", *starts]
    launches = _launches(run)
    if launches:
        lines += ["", _LAUNCHES, "", *launches]
    return "\n".join(lines) + "\n"


def _shares(run: Run) -> list[str]:
    """The floor's time over that of ours, of each of our backends, of each peer."""
    backends = list(dict.fromkeys(name for case in run.cases for name in case.backends))
    peers = sorted({name for case in run.cases for name in case.peers})
    head = ["case", "floor, ms", "ours", *backends, *peers]
    rows = [head, ["---"] * len(head)]
    for case in run.cases:
        others = {**case.backends, **case.peers}
        cells = [case.name, _milliseconds(case.floor_ms)]
        for timing in (case.ours, *(others.get(name) for name in (*backends, *peers))):
            time = None if timing is None else timing.median_ms
            cells.append("–" if time is None else f"{100 * case.floor_ms / time:.0f} %")
        rows.append(cells)
    return ["| " + " | ".join(row) + " |" for row in rows]


def _starts(run: Run) -> list[str]:
    rows = []
    for case in run.cases:
        for name, start in case.starts.items():
            times = [start.cold_ms, start.new_ms, start.prepare_ms]
            cells = [start.error, "", ""] if start.error else ["–" if x is None else _milliseconds(x) for x in times]
            rows.append([_cell(cell or "") for cell in (case.name, name, *cells)])
    if not rows:
        return []
    head = ["case", "variant", "first call, fresh process", "first call, another schedule", "preparing"]
    return ["| " + " | ".join(row) + " |" for row in (head, ["---"] * len(head), *rows)]


def _yardsticks(run: Run) -> list[str]:
    names = list(dict.fromkeys(name for case in run.cases for name in case.yardsticks))
    if not names:
        return []

    def cell(timing: Timing, flops: int) -> str:
        if timing.median_ms is None:
            return "failed"
        return f"{flops / timing.median_ms / 1e9:.1f} ({_milliseconds(timing.median_ms)})"

    rows = [["case", "ours", *names], ["---"] * (2 + len(names))]
    for case in run.cases:
        if case.yardsticks:
            found = [case.yardsticks.get(name) for name in names]
            cells = ["–" if one is None else cell(one.timing, one.flops) for one in found]
            rows.append([_cell(case.name), cell(case.ours, case.flops), *cells])
    return ["| " + " | ".join(row) + " |" for row in rows]


def _differ(run: Run) -> list[str]:
    found = {case.name: {"ours": case.ours, **case.backends, **case.peers} for case in run.cases}
    names = [
        name
        for name in dict.fromkeys(name for timings in found.values() for name in timings)
        if any(name in timings and timings[name].differ is not None for timings in found.values())
    ]
    if not names:
        return []
    rows = [["case", *names], ["---"] * (1 + len(names))]
    for case, timings in found.items():
        shares = [timings[name].differ if name in timings else None for name in names]
        if any(share is not None for share in shares):
            rows.append([_cell(case), *("–" if share is None else f"{1e6 * share:,.1f}" for share in shares)])
    return ["| " + " | ".join(row) + " |" for row in rows]


def _launches(run: Run) -> list[str]:
    rows = []
    for case in run.cases:
        others = {**case.backends, **case.peers, **{name: one.timing for name, one in case.yardsticks.items()}}
        for name, count in case.launches.items():
            if count.busy_ms is None:
                cells = [count.error or "", "", "", ""]
            else:
                whole = others.get(name, case.ours).median_ms
                share = "–" if not whole else f"{100 * count.busy_ms / whole:.0f} %"
                cells = [f"{count.launches:,}", f"{count.kernels:,}", _milliseconds(count.busy_ms), share]
            rows.append([_cell(cell) for cell in (case.name, name, *cells)])
    if not rows:
        return []
    head = ["case", "variant", "launches", "kernels", "GPU busy, ms", "share"]
    return ["| " + " | ".join(row) + " |" for row in (head, ["---"] * len(head), *rows)]


def _backends(run: Run) -> list[str]:
    names = list(dict.fromkeys(name for case in run.cases for name in case.backends))
    if not names:
        return []
    rows = [["case", *names], ["---"] * (1 + len(names))]
    for case in run.cases:
        cells = [case.name]
        for name in names:
            timing = case.backends.get(name)
            cells.append("–" if timing is None else _cell(timing.error or _milliseconds(timing.median_ms)))
        rows.append(cells)
    return ["| " + " | ".join(row) + " |" for row in rows]


def _plot(run: Run, path: Path) -> bool:
    """Bars of the best peer's time over ours, one per case; False if no case has both."""
    bars = []
    for case in run.cases:
        best = case.best_peer()
        if best is not None and case.ours.median_ms is not None:
            bars.append((case.name, best[1] / case.ours.median_ms, best[0]))
    if not bars:
        return False
    try:
        import matplotlib
        from matplotlib.figure import Figure
    except ImportError as error:
        raise MissingMatplotlib("the plots need matplotlib: pip install 'unifiedar-kernels[bench]'") from error

    # A fixed salt and no date: the same results give the same bytes.
    with matplotlib.rc_context({"svg.hashsalt": "unifiedar", "svg.fonttype": "none", "font.size": 9}):
        figure = Figure(figsize=(8, 1.1 + 0.28 * len(bars)), layout="constrained")
        axes: Any = figure.subplots()
        names, ratios, peers = zip(*reversed(bars), strict=True)
        drawn = axes.barh(names, ratios, color=["#2a7f62" if ratio >= 1 else "#c0504d" for ratio in ratios])
        labels = [f" {ratio:.2f}× ({peer})" for ratio, peer in zip(ratios, peers, strict=True)]
        axes.bar_label(drawn, labels=labels, fontsize=8)
        axes.axvline(1, color="black", linewidth=0.8)
        axes.set_xlim(0, 1.45 * max(1.0, *ratios))
        axes.set_xlabel("best peer's time / ours (right of the line: ours is faster)")
        axes.set_title(f"{run.family} on {run.environment.device}")
        axes.spines[["top", "right"]].set_visible(False)
        figure.savefig(path, format="svg", metadata={"Date": None})
    return True


def render(runs: Sequence[Run], docs: Path, results: str = "bench/results") -> str:
    """The scoreboard's text; its plots are written into `docs`.

    Args:
        runs: as read from results files.
        docs: an existing folder.
        results: what the text calls the folder of results.

    Raises:
        MissingMatplotlib: if there is something to plot and matplotlib is not installed.
    """
    shown = latest(runs)
    text = _HEAD.format(results=results)
    if not shown:
        return text + _EMPTY
    text += _LEGEND
    used: set[str] = set()
    for run in shown:
        stem = f"scoreboard-{slug(run.family)}-{slug(run.environment.device)}"
        name, turn = f"{stem}.svg", 1
        while name in used:
            turn += 1
            name = f"{stem}-{turn}.svg"
        used.add(name)
        text += _section(run, name if _plot(run, docs / name) else None)
    return text


def write(results: Path | str = RESULTS, docs: Path | str = ROOT / "docs") -> Path:
    """Write `scoreboard.md` and its plots into `docs` from all files in `results`; returns the path of the text.

    Raises:
        ResultsError: if a results file breaks the schema.
        MissingMatplotlib: if there is something to plot and matplotlib is not installed.
    """
    runs = read_all(results)
    docs = Path(docs)
    docs.mkdir(parents=True, exist_ok=True)
    shown = Path(os.path.relpath(results, docs.parent)).as_posix()
    text = render(runs, docs, "the results folder" if shown.startswith("..") else shown)
    path = docs / "scoreboard.md"
    path.write_text(text)
    return path
