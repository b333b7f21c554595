"""`python -m bench`: list the cases, measure families, try tiles, certify attention, write scoreboard and card."""

from __future__ import annotations

import argparse
import fnmatch
import functools
import sys
import time
from collections.abc import Sequence
from pathlib import Path

import torch

from bench import _results, _scoreboard, card, certificate
from bench._case import Case, families, family_cases, run_family
from bench._launches import counted
from bench._start import fresh
from bench._time import Start
from bench._warm import Task, share_caches, warm
from bench.tune import KNOBS, tune


class _Problem(Exception):
    """Something the user can put right; its text is printed as one line."""


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line; returns 0, or 2 after one line on stderr if it cannot do what was asked."""
    arguments = _parser().parse_args(argv)
    try:
        if arguments.command == "list":
            return _list(_device(arguments.device))
        if arguments.command == "scoreboard":
            print(f"wrote {_scoreboard.write(arguments.results, arguments.docs)}")
            return 0
        if arguments.command == "tune":
            return _tune(arguments)
        if arguments.command == "certificate":
            return _certify(arguments)
        if arguments.command == "card":
            if arguments.run is not None:
                card.take(arguments.run, arguments.docs)
            print(f"wrote {card.write(arguments.docs)}")
            return 0
        share_caches()
        return _measure(arguments) if arguments.warm is None else _warm(arguments)
    except (_Problem, _results.ResultsError, _scoreboard.MissingMatplotlib, card.CardError) as problem:
        print(f"bench: {problem}", file=sys.stderr)
        return 2


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="python -m bench", description="Time unifiedar against its peers.")
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")
    device = argparse.ArgumentParser(add_help=False)
    device.add_argument("--device", choices=("cuda", "cpu"), help="default: cuda if there is a GPU, else cpu")

    commands.add_parser("list", parents=[device], help="the families and their cases")
    board = commands.add_parser("scoreboard", help="write docs/scoreboard.md from measured results")
    board.add_argument("--results", type=Path, default=_results.RESULTS, metavar="DIR", help="default: bench/results")
    board.add_argument("--docs", type=Path, default=_results.ROOT / "docs", metavar="DIR", help="default: docs")
    page = commands.add_parser("card", help="write docs/model-card-var.md from measured figures")
    page.add_argument("run", nargs="?", type=Path, help="folder that docs/recipes/var.sh filled, taken into docs first")
    page.add_argument("--docs", type=Path, default=_results.ROOT / "docs", metavar="DIR", help="default: docs")
    turn = commands.add_parser("tune", help="try other tiles for the kernels of a family, on a GPU")
    turn.add_argument("family", choices=sorted(KNOBS))
    turn.add_argument("--case", action="append", metavar="PATTERN", help="only cases of this name; repeatable")
    turn.add_argument("--knob", action="append", metavar="NAME", help="only this function's tiles; repeatable")
    turn.add_argument("--budget", type=float, default=0.5, metavar="SECONDS", help="samples a case; default 0.5")
    proof = commands.add_parser("certificate", parents=[device], help="hold attention to float64, backend by backend")
    proof.add_argument("--cases", type=int, default=200, metavar="N", help="for each backend and dtype; default 200")
    proof.add_argument("--longest", type=int, metavar="TOKENS", help="of a case; default 700, on the CPU 100")
    proof.add_argument("--repeats", type=int, default=1, metavar="N", help="further runs of each case; default 1")
    proof.add_argument("--seed", type=int, default=0, help="of the cases; default 0")
    proof.add_argument("--jobs", type=int, default=1, metavar="N", help="processes; default 1")
    proof.add_argument(
        "--page", type=Path, default=certificate.PAGE, metavar="FILE", help="default: docs/attention-..."
    )
    proof.add_argument(
        "--head-size", type=int, action="append", choices=certificate.WIDTHS, help="only cases of this one; repeatable"
    )
    for family in families():
        measure = commands.add_parser(family, parents=[device], help=f"measure the family {family}")
        measure.add_argument("more", nargs="*", metavar="FAMILY", help="further families, one after another")
        measure.add_argument(
            "--case", action="append", metavar="PATTERN", help="only cases of this name, e.g. 'vila-u-*'; repeatable"
        )
        measure.add_argument("--out", type=Path, default=_results.RESULTS, metavar="DIR", help="default: bench/results")
        measure.add_argument("--commit", help="of the sources measured; default: $UNIFIEDAR_COMMIT, then git")
        measure.add_argument(
            "--budget",
            type=float,
            metavar="SECONDS",
            help="samples a case; default 1 (with --warm: further calls, none)",
        )
        measure.add_argument(
            "--starts",
            type=int,
            nargs="?",
            const=1,
            metavar="JOBS",
            help="also what beginning costs: one fresh process for each variant, JOBS of them side by side (default 1, "
            "which is the most exact)",
        )
        measure.add_argument(
            "--warm",
            type=int,
            metavar="JOBS",
            help="time nothing and write nothing: run every case once, in JOBS processes, so that the same command "
            "without --warm finds compiled what it needs",
        )
        measure.add_argument(
            "--launches", action="store_true", help="also what a call launches, and how long the GPU is busy with it"
        )
    return parser


def _device(name: str | None) -> torch.device:
    if name == "cuda" and not torch.cuda.is_available():
        raise _Problem("--device cuda: torch finds no usable GPU here")
    return torch.device(name or ("cuda" if torch.cuda.is_available() else "cpu"))


def _list(device: torch.device) -> int:
    for family in families():
        print(family)
        for case in family_cases(family, device):
            shape = " ".join(f"{letter} {size}" for letter, size in case.shape.items())
            peers = ", ".join(variant.name for variant in case.variants if variant.role == "peer")
            print(f"  {case.name:32} {shape} {str(case.dtype).removeprefix('torch.')}; peers: {peers}")
    return 0


def _check_budget(arguments: argparse.Namespace) -> None:
    if not arguments.budget > 0:
        raise _Problem(f"--budget must be positive, got {arguments.budget:g}")


def _tune(arguments: argparse.Namespace) -> int:
    _check_budget(arguments)
    knobs = KNOBS[arguments.family]
    known = [knob.function for knob in knobs]
    for name in arguments.knob or ():
        if name not in known:
            raise _Problem(f"--knob {name}: the family {arguments.family} has {', '.join(known)}")
    device = _device("cuda")
    cases = _chosen(family_cases(arguments.family, device), arguments.case)
    chosen = [knob for knob in knobs if knob.function in (arguments.knob or known)]
    tune(chosen, cases, device, budget_s=arguments.budget, report=lambda line: print(line, flush=True))
    return 0


def _certify(arguments: argparse.Namespace) -> int:
    device = _device(arguments.device)
    longest = arguments.longest or (700 if device.type == "cuda" else 100)
    for name, value, least in (
        ("cases", arguments.cases, 1),
        ("longest", longest, 1),
        ("repeats", arguments.repeats, 0),
        ("jobs", arguments.jobs, 1),
    ):
        if value < least:
            raise _Problem(f"--{name} must be at least {least}, got {value}")
    rows = certificate.certify(
        device,
        count=arguments.cases,
        longest=longest,
        repeats=arguments.repeats,
        seed=arguments.seed,
        widths=arguments.head_size or certificate.WIDTHS,
        jobs=arguments.jobs,
        report=lambda line: print(line, flush=True),
    )
    versions = f"torch {torch.__version__}, Triton {_results.triton_version() or 'absent'}"
    drawn = f"{arguments.cases} cases for each backend and dtype, up to {longest} tokens, seed {arguments.seed}"
    print(f"wrote {certificate.write(rows, device, f'{drawn}; {versions}.', arguments.page)}")
    wrong = [row for row in rows if row.wrong or (row.backend != "eager" and row.same < row.repeats)]
    for row in wrong:
        print(f"bench: {row.operator} {row.backend} {row.dtype} {row.width}: {row.wrong}", file=sys.stderr)
    return 1 if wrong else 0


def _measure(arguments: argparse.Namespace) -> int:
    device = _device(arguments.device)
    arguments.budget = 1.0 if arguments.budget is None else arguments.budget
    _check_budget(arguments)
    if arguments.starts is not None and arguments.starts < 1:
        raise _Problem(f"--starts must be at least 1, got {arguments.starts}")
    failed = []
    for family, cases in _by_family(arguments, device).items():
        begin = functools.partial(_begin, family, device) if arguments.starts else None
        run = run_family(
            family,
            cases,
            device,
            commit=arguments.commit,
            budget_s=arguments.budget,
            start=begin,
            starts_at_once=arguments.starts or 1,
            count=(lambda call: counted(call, device)) if arguments.launches else None,
            report=lambda line: print(line, flush=True),
            keep=lambda run: _results.write(run, arguments.out),
        )
        print(f"wrote {_results.write(run, arguments.out)}", flush=True)
        failed += [case for case in run.cases if case.ours.error]
        if len(run.cases) < len(cases):  # interrupted
            break
    for case in failed:
        print(f"bench: {case.name}: ours failed: {case.ours.error}", file=sys.stderr)
    return 1 if failed else 0


def _begin(family: str, device: torch.device, case: str, variant: str) -> Start:
    return fresh(family, case, variant, device)


def _warm(arguments: argparse.Namespace) -> int:
    device = _device(arguments.device)
    if arguments.warm < 1:
        raise _Problem(f"--warm must be at least 1, got {arguments.warm}")
    if arguments.starts is not None:
        raise _Problem("--starts times beginnings with empty caches, which --warm does nothing for: give one of them")
    if arguments.budget is not None:
        _check_budget(arguments)
    chosen = _by_family(arguments, device)
    tasks = [
        Task(family, one.name, str(device), arguments.budget or 0.0) for family in chosen for one in chosen[family]
    ]
    begun = time.perf_counter()
    try:
        outcomes = warm(tasks, arguments.warm, report=lambda line: print(line, flush=True))
    except KeyboardInterrupt:
        print("bench: interrupted; what was compiled before is kept", file=sys.stderr)
        return 1
    failed = [(task, outcome.failed) for task, outcome in zip(tasks, outcomes, strict=True) if outcome.failed]
    ran, raised = sum(outcome.ran for outcome in outcomes), sum(len(outcome.errors) for outcome in outcomes)
    print(
        f"{len(tasks)} cases in {time.perf_counter() - begun:.0f} s: {ran} variants ran, {raised} raised; "
        f"{len(failed)} cases failed"
    )
    for task, error in failed:
        print(f"bench: {task}: {error}", file=sys.stderr)
    return 1 if failed else 0


def _by_family(arguments: argparse.Namespace, device: torch.device) -> dict[str, list[Case]]:
    """The cases that were asked for, by the families that were."""
    asked = list(dict.fromkeys([arguments.command, *arguments.more]))
    for family in asked:
        if family not in families():
            raise _Problem(f"{family}: no family; there are {', '.join(families())}")
    found = {family: family_cases(family, device) for family in asked}
    named = {case.name for case in _chosen([case for cases in found.values() for case in cases], arguments.case)}
    found = {family: [case for case in cases if case.name in named] for family, cases in found.items()}
    for family, cases in found.items():
        if not cases:
            print(f"{family}: no case of these names", flush=True)
    return {family: cases for family, cases in found.items() if cases}


def _chosen(cases: Sequence[Case], patterns: Sequence[str] | None) -> list[Case]:
    if not patterns:
        return list(cases)
    for pattern in patterns:
        if not any(fnmatch.fnmatchcase(case.name, pattern) for case in cases):
            raise _Problem(f"--case {pattern}: matches no case; `python -m bench list` shows their names")
    return [case for case in cases if any(fnmatch.fnmatchcase(case.name, pattern) for pattern in patterns)]


if __name__ == "__main__":
    sys.exit(main())
