"""`nn.NextScaleAttention` against the published modules' arithmetic: training, generation over a cache, tables."""

import math

import pytest
import torch
from helpers import assert_as_good_as_eager
from published_attention import Infinity, Var, grid_of, mask_of, randomize
from torch import nn

from unifiedar.nn import NextScaleAttention, rope_table
from unifiedar.ops import masks

LENGTHS = [1, 4, 9, 16]
SCHEDULE = [(1, side, side) for side in (1, 2, 3, 4)]
GRID = grid_of(SCHEDULE, 32)
TABLE = GRID[str(tuple(SCHEDULE))][:, 0, 0, 0, : sum(LENGTHS)]

KINDS = {
    "VAR": (lambda: Var(), {}, None),
    "VAR without its norm": (
        lambda: Var(normed=False),
        {"l2_norm": False, "softmax_scale": 0.25 / math.sqrt(32)},
        None,
    ),
    "Infinity": (lambda: Infinity(), {}, TABLE),
    "Infinity without its norm": (lambda: Infinity(normed=False), {"l2_norm": False}, TABLE),
}
kinds = pytest.mark.parametrize("kind", KINDS.values(), ids=KINDS)


def pair(kind, device="cpu"):
    """A published module, ours with its weights, and ours' table."""
    published, settings, table = kind
    theirs = randomize(published()).to(device)
    ours = NextScaleAttention(64, 2, **settings, device=device)
    ours.load_state_dict(theirs.state_dict(), strict=True)
    return theirs, ours, None if table is None else table.to(device)


def calm(*modules):
    """Gains of e: a score of 100 is off by .5 in bfloat16, in whatever way it is made."""
    for module in modules:
        if getattr(module, "scale_mul_1H11", None) is not None:
            module.scale_mul_1H11.data.fill_(1.0)


def call(module, x, mask, rope, step=0):
    if isinstance(module, Var):
        return module(x, mask)
    grid = {
        name: one.to(x.device, x.dtype if x.dtype == torch.float64 else torch.float32) for name, one in GRID.items()
    }
    return module(x, mask, None, SCHEDULE, grid, step)


def tokens(device="cpu", seed=0):
    return torch.randn(2, sum(LENGTHS), 64, generator=torch.Generator().manual_seed(seed)).to(device)


def gradients(module, out, x):
    named = dict(module.named_parameters())
    names = sorted(named)
    return out, *torch.autograd.grad(out.float().sin().sum(), [x, *(named[name] for name in names)])


@kinds
def test_keys_and_shapes_are_the_published_ones(kind):
    theirs, ours, _ = pair(kind)
    want, got = ({name: one.shape for name, one in module.state_dict().items()} for module in (theirs, ours))
    assert got == want
    named = [{name for name, _ in module.named_parameters()} for module in (theirs, ours)]
    assert named[0] == named[1]


@kinds
@pytest.mark.parametrize("half", [None, torch.bfloat16, torch.float16], ids=str)
def test_training_is_as_exact_as_published(device, kind, half):
    """Forward and every gradient, in float32 and under autocast."""
    theirs, ours, rope = pair(kind, device)
    if half is not None:
        theirs.by_products = True  # as our attention's definition does it
        calm(theirs, ours)

    def run(module, dtype, forward):
        """For several inputs, for the gains are few, and the error of one may be small by luck."""
        found = []
        for seed in range(6):
            leaf = tokens(device, seed).to(dtype).requires_grad_()
            found.append(gradients(module, forward(leaf), leaf))
        return [torch.stack(some) for some in zip(*found, strict=True)]

    with torch.autocast(device, dtype=half or torch.bfloat16, enabled=half is not None):
        mask = mask_of(LENGTHS, half or torch.float32, device)
        want = run(theirs, torch.float32, lambda leaf: call(theirs, leaf, mask, rope))
        got = run(ours, torch.float32, lambda leaf: ours(leaf, LENGTHS, rope=rope))
    theirs.double()
    mask = mask_of(LENGTHS, torch.float64, device)
    exact = run(theirs, torch.float64, lambda leaf: call(theirs, leaf, mask, rope))
    for one, other, truth in zip(got, want, exact, strict=True):
        floor = 1e-5 * truth.abs().max().clamp_min(1)  # both are sums of many terms
        if (one.double() - truth).abs().max() > floor:
            assert_as_good_as_eager(one, other, truth)


@kinds
@pytest.mark.parametrize("half", [None, torch.bfloat16], ids=str)
def test_generation_over_a_cache(device, kind, half):
    theirs, ours, rope = pair(kind, device)
    if half is not None:
        calm(theirs, ours)
    x = tokens(device)
    with torch.no_grad(), torch.autocast(device, dtype=half or torch.bfloat16, enabled=half is not None):
        cache = ours.new_cache(2, sum(LENGTHS) + 3)
        assert cache.dtype == (half or torch.float32)
        cache.fill_(torch.nan)  # what is not there yet must not be read
        whole, begin = ours(x, LENGTHS, rope=rope), 0
        theirs.kv_caching(True)
        for step, length in enumerate(LENGTHS):
            part = x[:, begin : begin + length]
            angles = None if rope is None else rope[:, begin : begin + length]
            got = ours(part, rope=angles, cache=cache, begin=begin)
            want = call(theirs, part, None, rope, step)
            tolerance = 1e-5 if half is None else 0.06
            torch.testing.assert_close(got, want, rtol=0, atol=tolerance)
            torch.testing.assert_close(got, whole[:, begin : begin + length], rtol=0, atol=tolerance)
            begin += length
        assert cache[:, :, :, begin:].isnan().all()
        torch.testing.assert_close(cache[0, :, :, :begin], theirs.cached_k.to(cache.dtype), rtol=0, atol=tolerance)


def test_several_scales_at_once_over_a_cache():
    """As many tokens of whole scales as one likes; also from lengths in a tensor."""
    _, ours, rope = pair(KINDS["Infinity"])
    x = tokens()
    with torch.no_grad():
        want = ours(x, LENGTHS, rope=rope)
        cache = ours.new_cache(2, sum(LENGTHS))
        first = ours(x[:, :5], LENGTHS[:2], rope=rope[:, :5], cache=cache)
        rest = ours(x[:, 5:], torch.tensor(LENGTHS[2:]), rope=rope[:, 5:], cache=cache, begin=5)
    torch.testing.assert_close(torch.cat((first, rest), 1), want, rtol=0, atol=1e-5)


def test_packed_images_and_other_masks():
    """Two images in one sequence, each with its angles; then scales that see the one before, also over a cache."""
    _, ours, rope = pair(KINDS["Infinity"])
    x = tokens()
    small = sum(LENGTHS[:3])
    packed = torch.cat((x, x[:, :small]), 1)
    got = ours(packed, masks.packed([LENGTHS, LENGTHS[:3]]), rope=torch.cat((rope, rope[:, :small]), 1))
    torch.testing.assert_close(got[:, : sum(LENGTHS)], ours(x, LENGTHS, rope=rope), rtol=0, atol=1e-5)
    want = ours(x[:, :small], LENGTHS[:3], rope=rope[:, :small])
    torch.testing.assert_close(got[:, sum(LENGTHS) :], want, rtol=0, atol=1e-5)
    with torch.no_grad():
        mask = masks.sliding(LENGTHS, 1)
        want = ours(x, mask, rope=rope)
        assert not torch.allclose(want, ours(x, LENGTHS, rope=rope), rtol=0, atol=1e-3)
        cache = ours.new_cache(2, sum(LENGTHS))
        first = ours(x[:, :5], masks.sliding(LENGTHS[:2], 1), rope=rope[:, :5], cache=cache)
        rest = ours(x[:, 5:], mask, rope=rope[:, 5:], cache=cache, begin=5)
    torch.testing.assert_close(torch.cat((first, rest), 1), want, rtol=0, atol=1e-5)


def test_one_scale_is_full_attention():
    theirs, ours, _ = pair(KINDS["VAR"])
    x = tokens()
    torch.testing.assert_close(ours(x), theirs(x, None), rtol=0, atol=1e-5)


def test_compiles_whole(fresh_compiler):
    _, ours, rope = pair(KINDS["Infinity"])
    x = tokens()
    compiled = torch.compile(lambda x: ours(x, LENGTHS, rope=rope), fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(compiled(x), ours(x, LENGTHS, rope=rope))

    def step(x, cache, begin):
        return ours(x, rope=rope[:, begin : begin + x.shape[1]], cache=cache, begin=begin)

    with torch.no_grad():
        caches = [ours.new_cache(2, sum(LENGTHS)).zero_() for _ in range(2)]
        fast = torch.compile(step, fullgraph=True, backend="aot_eager", dynamic=False)
        for begin, end in ((0, 5), (5, 14)):
            want, got = (one(x[:, begin:end], cache, begin) for one, cache in zip((step, fast), caches, strict=True))
            torch.testing.assert_close(got, want)
        torch.testing.assert_close(*caches)
        assert caches[1].any()


def test_on_the_meta_device():
    assert all(one.is_meta for one in NextScaleAttention(64, 2, device="meta").state_dict().values())


def test_it_starts_as_published():
    ours = NextScaleAttention(96, 3)
    assert torch.equal(ours.scale_mul_1H11, torch.full((1, 3, 1, 1), math.log(4)))
    assert not ours.q_bias.any()
    assert not ours.v_bias.any()
    assert isinstance(ours.scale_mul_1H11, nn.Parameter)
    assert "l2_norm=True" in repr(ours)


BAD = {
    "heads do not divide": (lambda: NextScaleAttention(64, 3), ValueError, "heads must divide"),
    "no heads": (lambda: NextScaleAttention(64, 0), ValueError, "heads must be at least 1"),
    "dim of text": (lambda: NextScaleAttention("64", 2), TypeError, "dim must be an integer"),
    "negative scale": (lambda: NextScaleAttention(64, 2, softmax_scale=-1), ValueError, "softmax_scale"),
    "x no tensor": (lambda: OURS([1]), TypeError, "x must be a tensor"),
    "x of other width": (lambda: OURS(torch.zeros(1, 2, 32)), ValueError, "x must be"),
    "begin without a cache": (lambda: OURS(X, begin=1), ValueError, "begin must be 0"),
    "short cache": (lambda: OURS(X, cache=OURS.new_cache(1, 4), begin=3), ValueError, "cache must have room"),
    "cache of another batch": (lambda: OURS(X, cache=OURS.new_cache(2, 4)), ValueError, "cache must be"),
    "cache in half": (lambda: OURS(X, cache=OURS.new_cache(1, 4).half()), TypeError, "cache must be float32"),
    "cache with gradients": (lambda: OURS(X, cache=OURS.new_cache(1, 4)), ValueError, "no_grad"),
    "lengths": (lambda: OURS(X, [3]), ValueError, "add up"),
    "table": (lambda: OURS(X, rope=TABLE), ValueError, "rope must be"),
    "no scales": (lambda: rope_table([], 32), ValueError, "scales must be"),
    "head size": (lambda: rope_table([(1, 1)], 30), ValueError, "head_dim must be a multiple of 4"),
    "empty scale": (lambda: rope_table([(1, 1), (0, 2)], 32), ValueError, "scales\\[1\\]"),
    "empty grid": (lambda: rope_table([(1, 1)], 32, grid=(4, 0)), ValueError, "grid"),
}
OURS = NextScaleAttention(64, 2)
X = torch.zeros(1, 2, 64)


@pytest.mark.parametrize("case", BAD.values(), ids=BAD)
def test_bad_input(case):
    function, error, words = case
    with pytest.raises(error, match=words):
        function()


# ---- the table -------------------------------------------------------------------------------------------------------


def test_table_by_hand():
    """Token by token, in Python's own floats; halves go to the even number."""
    scales, grid, width = [(1, 1), (2, 4), (16, 12)], (78, 56), 16
    got = rope_table(scales, width, grid=grid)
    want = []
    for height, wide in scales:
        for i in range(height):
            for j in range(wide):
                y, x = round(i * grid[0] / height), round(j * grid[1] / wide)
                angles = [at * 10000 ** (-4 * m / width) for at in (y, x) for m in range(width // 4)]
                want.append([[math.cos(angle) for angle in angles], [math.sin(angle) for angle in angles]])
    assert got.shape == (2, 1 + 8 + 192, width // 2)
    torch.testing.assert_close(got.double(), torch.tensor(want, dtype=torch.float64).transpose(0, 1), rtol=0, atol=2e-5)


def test_table_of_the_last_scale():
    scales = [(1, 1), (2, 3), (4, 6)]
    assert torch.equal(rope_table(scales, 32), rope_table(scales, 32, grid=(4, 6)))
    assert torch.equal(rope_table(scales, 32)[:, :7], rope_table(scales[:2], 32, grid=(4, 6)))
