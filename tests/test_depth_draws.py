"""Depth decoding's draws and roundings: a chi-square test over a million positions, and what VILA-U rounds where."""

import math
from dataclasses import replace

import pytest
import torch
from small import small_config
from torch import Tensor

from unifiedar.models import VILAU
from unifiedar.nn import DepthStyle, DepthTransformer
from unifiedar.ops import depth_decode, residual_lookup

DRAWS, CODES = 10**6, 7


def kept(logits: Tensor, temperature: float, top_k: int, top_p: float) -> Tensor:
    """Probabilities (..., K), float64, entry by entry from the cuts' definitions."""
    rows = []
    for row in logits.double().flatten(0, -2) / temperature:
        order = row.argsort(descending=True).tolist()
        order = order[: top_k or len(order)]
        p = (row[order] - row.max()).exp()
        p /= p.sum()
        last = next((i for i in range(len(order)) if top_p and p[: i + 1].sum() >= top_p), len(order) - 1)
        rows.append(torch.zeros_like(row).index_put((torch.tensor(order[: last + 1]),), p[: last + 1]))
        rows[-1] /= rows[-1].sum()
    return torch.stack(rows).view(logits.shape)


def chi_square(counts: Tensor, probabilities: Tensor) -> tuple[float, float]:
    """The statistic, and what it exceeds once in 10^6 (Wilson and Hilferty); infinite if the impossible occurs."""
    if counts[probabilities == 0].any():
        return math.inf, 0.0
    counts, expected = counts[probabilities > 0], DRAWS * probabilities[probabilities > 0]
    assert expected.min() > 5
    freedom = len(expected) - 1
    limit = freedom * (1 - 2 / (9 * freedom) + 4.753 * (2 / (9 * freedom)) ** 0.5) ** 3
    return ((counts - expected) ** 2 / expected).sum().item(), limit


@pytest.mark.parametrize(
    ("settings", "guidance", "style"),
    [
        pytest.param({}, None, DepthStyle(), id="plain"),
        pytest.param({"top_k": 4, "temperature": [1.3, 0.8]}, None, DepthStyle(), id="top-k, temperatures"),
        pytest.param({"top_p": 0.8, "top_k": [0, 6]}, 1.6, DepthStyle(), id="top-p, guided"),
        pytest.param({"top_p": 0.9}, None, DepthStyle(state="before", last_code=True, rope=10.0), id="speech"),
    ],
)
def test_a_million_draws(settings, guidance, style):
    """Pairs of codes come as often as the logits, teacher-forced through every first code, say."""
    torch.manual_seed(4)
    module = DepthTransformer(8, 6, 8, 1, 2, depth=2, num_codes=CODES, style=style).eval()
    with torch.no_grad():
        for parameter in module.parameters():
            parameter.normal_(std=0.45)
    codebook, sides = 1.5 * torch.randn(CODES, 6), 1 if guidance is None else 2
    hidden = torch.randn(sides, 8)
    start = None if style.state == "first" else torch.randn(1, 6)

    every = torch.stack([torch.arange(CODES), torch.zeros(CODES, dtype=torch.int64)], 1)
    logits = [
        module(
            side.expand(CODES, -1),
            module.running_sums(every, codebook),
            None if start is None else start.expand(CODES, -1),
        ).detach()
        for side in hidden
    ]
    mixed = logits[0] if guidance is None else logits[1] + guidance * (logits[0] - logits[1])
    lists = [settings.get(name, default) for name, default in (("temperature", 1.0), ("top_k", 0), ("top_p", 0.0))]
    (t0, k0, p0), (t1, k1, p1) = zip(*(x if isinstance(x, list) else [x, x] for x in lists), strict=True)
    joint = kept(mixed[:1, 0], t0, k0, p0).T * kept(mixed[:, 1], t1, k1, p1)

    counts, chunk = torch.zeros(CODES * CODES), 125_000
    generator = torch.Generator().manual_seed(0)
    for _ in range(DRAWS // chunk):
        rows = hidden.repeat_interleave(chunk, 0)
        begin = None if start is None else start.expand(chunk, -1)
        codes = module.decode(rows, codebook, guidance=guidance, generator=generator, start=begin, **settings).codes
        counts += torch.bincount(codes[:, 0] * CODES + codes[:, 1], minlength=CODES * CODES)
    statistic, limit = chi_square(counts.double(), joint.flatten())
    assert statistic < limit
    # What it would catch: a temperature one hundredth off, or a cut left out.
    warmer = kept(mixed[:1, 0], 1.01 * t0, k0, p0).T * kept(mixed[:, 1], 1.01 * t1, k1, p1)
    assert chi_square(counts.double(), warmer.flatten())[0] > limit


# ---- VILA-U's roundings


def test_sums_are_rounded_at_every_depth():
    """Decoding adds embeddings up in their own dtype; exact_reference_rounding says the same of `running_sums`."""
    torch.manual_seed(0)
    module = DepthTransformer(16, 24, 16, 1, 2, depth=16, num_codes=50).bfloat16().eval()
    codebook, hidden = torch.randn(16, 50, 24).bfloat16(), torch.randn(64, 16).bfloat16()
    found = module.decode(hidden, codebook, return_logits=True)
    want, total = [], torch.zeros(64, 24)
    for d in range(16):
        total = (total + codebook[d][found.codes[:, d]].float()).bfloat16().float()
        want.append(total)
    want = torch.stack(want, 1).bfloat16()
    exact = module.running_sums(found.codes, codebook, exact_reference_rounding=True)
    assert torch.equal(exact, want)
    assert torch.equal(found.total, want[:, -1])
    default = module.running_sums(found.codes, codebook)
    assert torch.equal(default, residual_lookup(found.codes, codebook, cumulative=True))
    assert (default != want).float().mean() > 0.2
    # Teacher-forced logits through exact sums are nearer to those of decoding.
    exact, default = ((module(hidden, sums) - found.logits).float().square().mean() for sums in (exact, default))
    assert exact < default


def test_guidance_is_mixed_in_the_dtype_of_logits():
    """u + g (c - u) in three roundings, before float32: other codes are the largest than without them."""
    torch.manual_seed(0)
    module = DepthTransformer(16, 24, 16, 1, 2, depth=2, num_codes=4000).bfloat16().eval()
    hidden, codebook = torch.randn(400, 16).bfloat16(), torch.randn(4000, 24).bfloat16()
    found = depth_decode(hidden, codebook, module.weights(), guidance=3.0, temperature=0, return_logits=True)
    conditional, unconditional = found.logits.chunk(2)
    difference = (conditional.float() - unconditional.float()).bfloat16()
    mixed = (unconditional.float() + (3 * difference.float()).bfloat16().float()).bfloat16()
    assert torch.equal(found.codes, mixed.argmax(-1))
    whole = unconditional.float() + 3 * (conditional.float() - unconditional.float())
    assert (found.codes != whole.argmax(-1)).any()


def test_vilau_rounds_as_published_where_asked():
    torch.manual_seed(0)
    model = VILAU(replace(small_config(), depth=8)).bfloat16().eval()
    length, depth = model.image_tokens, model.config.depth
    codes = torch.randint(0, model.config.num_codes, (2, length, depth))
    hidden = torch.randn(2, length + 3, model.config.language.hidden_size).bfloat16()
    begin = torch.tensor([1, 3])
    total, sums = 0, []
    table = model.tower.quantizer.table
    for d in range(depth):
        total = total + (table if table.ndim == 2 else table[d])[codes[..., d]]
        sums.append(total)
    places = begin[:, None] - 1 + torch.arange(length)
    states = torch.stack([hidden[b, places[b]] for b in range(2)])
    want = model.depth_transformer(states.flatten(0, 1), torch.stack(sums, -2).flatten(0, 1)).view(2, length, depth, -1)
    assert torch.equal(model.depth_logits(hidden, begin, codes, exact_reference_rounding=True), want)
    assert not torch.equal(model.depth_logits(hidden, begin, codes), want)
    images = model.tower.decode(total)
    want = ((images.float() + 1) * 127.5).round().clamp(0, 255).byte()
    assert torch.equal(model.decode_codes(codes, exact_reference_rounding=True), want)
    assert not torch.equal(model.decode_codes(codes), want)
