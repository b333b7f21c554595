"""`python -m bench certificate`: holds every backend of attention to a float64 oracle, and writes what came out.

A run draws random problems, as many for each operator, backend and dtype, and deals them to the head sizes in turn:
schedules with empty scales, prefixes, fewer queries than keys and grouped heads for `block_causal_attention`; packed
images, windows, causal blocks and arbitrary sets of blocks for `block_attention`. Each is computed by the backend, by
the eager formula in the same dtype and in float64, there from a dense boolean matrix made of the block numbers alone.

The page holds one section a device; a run replaces that of its own device.
"""

from __future__ import annotations

import itertools
import math
import multiprocessing
import platform
import random
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path

import torch
from torch import Tensor

from bench._results import ROOT
from unifiedar.ops import block_attention, block_causal_attention, masks, registry

__all__ = ["PAGE", "Problem", "Row", "certify", "expected", "problems", "write"]

PAGE = ROOT / "docs" / "attention-certificate.md"
OPERATORS = ("block_causal_attention", "block_attention")
WIDTHS = tuple(range(32, 129, 8))
DTYPES = (torch.float32, torch.bfloat16, torch.float16)
FLOOR = 1e-5
"""The rule: an error is at most twice that of the eager formula in the same dtype, plus this."""
EAGER = 1e-5
"""What the eager formula may be off by in float32, relative to the norm of a result: a wrong one would excuse all. (Not
asked in half precision, where rounded terms of a gradient may cancel; the formula is the same.)"""

_HEAD = """# Certificate of attention

Written by `python -m bench certificate`; do not edit. Each row holds random problems of one operator, backend, dtype
and head size against float64. *Forward* (output and logarithm of the sum) and *gradients* (of queries, keys and values)
are the largest error of any element, over the error of the eager formula in the same dtype on the same problem (plus
half of 1e-5, the rule's floor): **at most 2 is allowed**. The eager formula itself may be off by 1e-5 of a result's
norm in float32. *Errors* are the largest ones themselves. *Repeats* counts second runs that gave the same bits, forward
and backward. What is drawn is told in `bench/certificate.py`.
"""


@dataclass(frozen=True)
class Problem:
    """Blocks of tokens of one or more images, and who sees whom.

    Args:
        rows: for each image the tokens of its blocks.
        sees: for each block the blocks that it sees.
        causal: blocks whose tokens see, of their own block, only those up to themselves.
        prefix: tokens of block 0, given as `prefix` to `block_causal_attention`; None: a problem of `block_attention`.
        queries: the last tokens, which look.
        heads: query heads and key heads.
        width: of a head.
        seed: of the tensors.
    """

    rows: tuple[tuple[int, ...], ...]
    sees: tuple[frozenset[int], ...]
    causal: frozenset[int]
    prefix: int | None
    queries: int
    heads: tuple[int, int]
    width: int
    seed: int

    @property
    def tokens(self) -> int:
        """Of all images."""
        return sum(map(sum, self.rows))

    def seen(self, device: torch.device | str) -> Tensor:
        """(Lq, L) bool: whether a query sees a key."""
        sizes = torch.tensor(self.rows)
        count = sizes.shape[1]
        place = torch.arange(sizes.numel()).repeat_interleave(sizes.flatten())
        image, block = place // count, place % count
        table = torch.tensor([[j in some for j in range(count)] for some in self.sees])
        seen = table[block][:, block] & (image[:, None] == image)
        stepped = torch.tensor([j in self.causal for j in range(count)])[block]
        token = torch.arange(len(place))
        seen &= ~((place[:, None] == place) & stepped & (token > token[:, None]))
        return seen[len(place) - self.queries :].to(device)

    def call(self, device: torch.device | str, backend: str) -> Callable[..., tuple[Tensor, Tensor]]:
        """The operator as a function of q, k and v."""
        if self.prefix is not None:
            lengths = self.rows[0][1:]
            return lambda q, k, v: block_causal_attention(
                q, k, v, lengths, prefix=self.prefix or 0, return_lse=True, backend=backend
            )
        mask = masks.blocks(self.rows, self.sees, causal=self.causal, device=device)
        return lambda q, k, v: block_attention(q, k, v, mask, return_lse=True, backend=backend)


def problems(operator: str, count: int, longest: int, seed: int) -> Iterator[Problem]:
    """Random problems of an operator, of at most `longest` tokens; every head size in turn."""
    draw = random.Random(f"{operator} {seed}")
    for i in range(count):
        heads = draw.choice([(1, 1), (2, 2), (2, 1), (3, 1)])
        size = draw.choice([draw.randint(1, min(70, longest)), draw.randint(1, longest)])
        width, key = WIDTHS[i % len(WIDTHS)], draw.randrange(2**31)
        if operator == "block_causal_attention":
            blocks = draw.randint(2, 33)  # the prefix, and up to 32 scales
            row = _split(draw, size, blocks)
            queries = draw.choice([size, draw.randint(1, size)])
            sees = tuple(frozenset(range(j + 1)) for j in range(blocks))
            yield Problem((row,), sees, frozenset(), row[0], queries, heads, width, key)
            continue
        images, blocks = draw.choice([1, draw.randint(1, 6)]), draw.randint(1, 7)  # 7 have at most 4 runs
        kind = draw.choice(["packed", "window", "any"])
        if kind == "packed":
            some = [set(range(j + 1)) for j in range(blocks)]
        elif kind == "window":
            window, sinks = draw.randint(0, 3), draw.randint(0, 2)
            some = [{*range(max(0, j - window), j + 1), *range(min(sinks, j))} for j in range(blocks)]
        else:
            some = [{j, *draw.sample(range(blocks), draw.randint(0, blocks))} for j in range(blocks)]
        stepped = frozenset(j for j in range(blocks) if draw.random() < 0.25)
        flat = _split(draw, size, images * blocks)
        rows = tuple(flat[at : at + blocks] for at in range(0, len(flat), blocks))
        queries = draw.choice([size, draw.randint(1, size)]) if images == 1 else size
        yield Problem(rows, tuple(map(frozenset, some)), stepped, None, queries, heads, width, key)


def _split(draw: random.Random, total: int, parts: int) -> tuple[int, ...]:
    """So many lengths that add up to a total, some of them perhaps 0."""
    cuts = sorted(draw.randint(0, total) for _ in range(parts - 1))
    return tuple(end - begin for begin, end in zip([0, *cuts], [*cuts, total], strict=True))


def expected(q: Tensor, k: Tensor, v: Tensor, seen: Tensor) -> tuple[Tensor, Tensor]:
    """out and lse, from the dense matrix of who sees whom."""
    share = q.shape[1] // k.shape[1]
    k, v = (x.repeat_interleave(share, 1) for x in (k, v))
    scores = (q @ k.mT * q.shape[3] ** -0.5).masked_fill(~seen, float("-inf"))
    return scores.softmax(-1) @ v, scores.logsumexp(-1)


@dataclass
class Row:
    """What came out for one operator, backend, dtype and head size: errors over eager's, and errors; the largest."""

    operator: str
    backend: str
    dtype: torch.dtype
    width: int
    cases: int = 0
    forward: float = 0.0
    backward: float = 0.0
    errors: tuple[float, float] = (0.0, 0.0)
    repeats: int = 0
    same: int = 0
    wrong: list[Problem] = field(default_factory=list)


def certify(
    device: torch.device | str,
    *,
    count: int = 200,
    longest: int = 700,
    repeats: int = 1,
    seed: int = 0,
    widths: Sequence[int] = WIDTHS,
    jobs: int = 1,
    report: Callable[[str], None] = print,
) -> list[Row]:
    """Runs the sweep.

    Args:
        device: "cpu" (with TRITON_INTERPRET=1 Triton's interpreter too) or "cuda".
        count: problems for each operator, backend and dtype.
        longest: tokens of a problem.
        repeats: further runs of each, which should give the same bits.
        seed: of the problems.
        widths: head sizes; those of others are left out.
        jobs: processes that take the head sizes in turn: most of a first run is compiling. What comes out is equal.
        report: called with a line of text for each operator, backend and dtype; of several processes by each, for each
            head size, and then it is `print`.

    Returns:
        A row for each of these and each head size.
    """
    if jobs > 1:
        options = {"count": count, "longest": longest, "repeats": repeats, "seed": seed}
        with ProcessPoolExecutor(jobs, multiprocessing.get_context("spawn")) as pool:
            parts = list(pool.map(_alone, itertools.repeat(str(device)), widths, itertools.repeat(options)))
        order = [
            (operator, one.name, dtype)
            for operator in OPERATORS
            for one in registry[operator].backends
            for dtype in DTYPES
        ]
        merged = [row for part in parts for row in part]
        return sorted(merged, key=lambda row: (order.index((row.operator, row.backend, row.dtype)), row.width))
    found: list[Row] = []
    for operator in OPERATORS:
        drawn = [one for one in problems(operator, count, longest, seed) if one.width in widths]
        for backend in (one.name for one in registry[operator].backends):
            for dtype in DTYPES:
                rows = {width: Row(operator, backend, dtype, width) for width in WIDTHS}
                for problem in drawn:
                    if _unfit(problem, device, backend, dtype) is None:
                        _hold(rows[problem.width], problem, device, repeats)
                rows = {width: row for width, row in rows.items() if row.cases}
                if rows:
                    worst = max(max(row.forward, row.backward) for row in rows.values())
                    report(f"{operator} {backend} {_name(dtype)}: {sum(r.cases for r in rows.values())}, {worst:.2f}")
                found += rows.values()
    return found


def _alone(device: str, width: int, options: dict[str, int]) -> list[Row]:
    """The rows of one head size, in a process of their own."""
    return certify(
        device,
        widths=[width],
        report=lambda line: print(f"{width}: {line}", flush=True),
        **options,  # type: ignore[arg-type]
    )


def _name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def _unfit(problem: Problem, device: torch.device | str, backend: str, dtype: torch.dtype) -> str | None:
    """Why a backend does not take a problem forward or backward."""
    q, k, v, grad, _ = _tensors(problem, device, dtype, empty=True)
    lse = torch.empty(q.shape[:3], device=device)
    if problem.prefix is not None:
        who: Sequence[object] = ([*problem.rows[0][1:]], None, problem.prefix, 1.0)
        names = ("block_causal_attention", "block_causal_attention_backward")
    else:
        mask = masks.blocks(problem.rows, problem.sees, causal=problem.causal, device=device)
        who, names = (mask.sees, mask.seen_by, mask.offsets, 1.0), ("block_attention", "block_attention_backward")
    for name, inputs in zip(names, ((q, k, v), (grad, None, q, k, v, q, lse)), strict=True):
        reason = registry[name].explain(*inputs, *who)[backend]
        if reason != "fits":
            return reason
    return None


def _tensors(problem: Problem, device: torch.device | str, dtype: torch.dtype, *, empty: bool = False) -> list[Tensor]:
    """q, k, v, and gradients of out and lse."""
    heads, groups = problem.heads
    asked = (1, heads, problem.queries, problem.width)
    given = (1, groups, problem.tokens, problem.width)
    shapes = (asked, given, given, asked, asked[:3])
    kinds = (*[dtype] * 4, torch.float32)
    if empty:
        return [torch.empty(shape, dtype=kind, device=device) for shape, kind in zip(shapes, kinds, strict=True)]
    generator = torch.Generator().manual_seed(problem.seed)
    drawn = [torch.randn(shape, generator=generator) for shape in shapes]
    return [x.to(device, kind) for x, kind in zip(drawn, kinds, strict=True)]


def _everything(function: Callable[..., tuple[Tensor, Tensor]], values: Sequence[Tensor]) -> list[Tensor]:
    """out, lse and the gradients of q, k and v."""
    *inputs, grad, grad_lse = values
    leaves = [x.detach().requires_grad_() for x in inputs]
    out, lse = function(*leaves)
    gradients = torch.autograd.grad((out, lse), leaves, (grad.to(out.dtype), grad_lse.to(lse.dtype)))
    return [out.detach(), lse.detach(), *gradients]


def _hold(row: Row, problem: Problem, device: torch.device | str, repeats: int) -> None:
    """Puts a problem into a row."""
    values = _tensors(problem, device, row.dtype)
    seen = problem.seen(device)
    exact = _everything(lambda q, k, v: expected(q, k, v, seen), [x.double() for x in values])
    eager = _everything(problem.call(device, "eager"), values)
    ours = problem.call(device, row.backend)
    got = _everything(ours, values)
    over, errors, holds = [], [], True
    for one, other, right in zip(got, eager, exact, strict=True):
        error, allowed = ((x.double() - right).abs().max().item() for x in (one, other))
        ratio = error / (allowed + FLOOR / 2)
        over.append(ratio if ratio >= 0 else math.inf)  # NaN is no small error
        errors.append(error if error >= 0 else math.inf)
        right_formula = row.dtype != torch.float32 or (other.double() - right).norm() <= EAGER * right.norm() + FLOOR
        holds = holds and over[-1] <= 2 and bool(right_formula)
    row.cases += 1
    row.forward, row.backward = max(row.forward, *over[:2]), max(row.backward, *over[2:])
    row.errors = max(row.errors[0], *errors[:2]), max(row.errors[1], *errors[2:])
    for _ in range(repeats):
        row.repeats += 1
        row.same += all(torch.equal(one, other) for one, other in zip(_everything(ours, values), got, strict=True))
    if not holds:
        row.wrong.append(problem)


def _device_name(device: torch.device | str) -> str:
    if torch.device(device).type == "cuda":
        return torch.cuda.get_device_name(device)
    return f"CPU ({platform.machine()}), Triton interpreted"


def write(rows: Sequence[Row], device: torch.device | str, note: str, page: Path = PAGE) -> Path:
    """Writes the section of a device into the page, and leaves those of other devices as they are.

    Args:
        rows: of one device.
        device: which.
        note: a line about the run.
        page: the file.

    Returns:
        The file.
    """
    title = _device_name(device)
    lines = [f"## {title}", "", note, ""]
    lines += ["| operator | backend | dtype | head size | cases | forward | gradients | errors | repeats | |"]
    lines += ["| --- | --- | --- | --- | --- | --- | --- | --- | --- | --- |"]
    for row in rows:
        over = ("", "") if row.backend == "eager" else (f"{row.forward:.2f}", f"{row.backward:.2f}")
        lines.append(
            f"| {row.operator} | {row.backend} | {_name(row.dtype)} | {row.width} | {row.cases} | "
            f"{over[0]} | {over[1]} | {row.errors[0]:.1e}, {row.errors[1]:.1e} | {row.same} of {row.repeats} | "
            f"{'**WRONG**' if row.wrong else 'holds'} |"
        )
    held = {}
    if page.is_file():
        for part in page.read_text(encoding="utf-8").split("\n## ")[1:]:
            held[part.split("\n", 1)[0]] = "## " + part.rstrip()
    held[title] = "\n".join(lines)
    page.parent.mkdir(parents=True, exist_ok=True)
    page.write_text("\n".join([_HEAD, *(held[name] + "\n" for name in sorted(held))]), encoding="utf-8")
    return page
