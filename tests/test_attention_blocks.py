"""`block_attention` and `masks`: packed images and other masks, every backend against a float64 oracle."""

import math

import pytest
import torch
from helpers import assert_as_good_as_eager, guarded, interpreter_skip, kernel_rooms
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from test_attention import NAMES, everything, run_cuda, served, tensors

from unifiedar.ops import _native, block_attention, block_causal_attention, masks, registry
from unifiedar.ops import attention_blocks as family
from unifiedar.ops.attention import CHOSEN

FORWARD, BACKWARD = registry["block_attention"], registry["block_attention_backward"]
SCHEDULED = registry["block_causal_attention_backward"]


def chosen(accept):
    return pytest.mark.parametrize("room", [case for case in kernel_rooms() if accept(*case.values[0])], indirect=True)


rooms = chosen(served)
kernel = chosen(lambda *room: room[0] != "eager" and served(*room))
triton_rooms = chosen(lambda backend, device, dtype: backend == "triton")
gpu_kernels = chosen(lambda *room: room[1] == "cuda" and room[0] != "eager" and served(*room))
gpu_cuda = chosen(lambda *room: room[0] == "cuda" and served(*room))


# ---- who sees whom, said again in sets -------------------------------------------------------------------------------


def seen_by_sets(rows, sees, causal=(), queries=None):
    """bool (Lq, L) of images with these lengths of blocks, from what a block sees, token by token."""
    at = [(i, j) for i, row in enumerate(rows) for j, length in enumerate(row) for _ in range(length)]
    count = len(at)
    table = torch.zeros(count, count, dtype=torch.bool)
    for a, (image, block) in enumerate(at):
        for b, (other, key_block) in enumerate(at):
            own = key_block == block and block in causal
            table[a, b] = image == other and key_block in sees[block] and (not own or b <= a)
    return table[count - (count if queries is None else queries) :]


def oracle(q, k, v, seen, softmax_scale):
    """Row by row over the keys that are seen, in float64."""
    share = q.shape[1] // k.shape[1]
    k, v = (x.repeat_interleave(share, 1) for x in (k, v))
    outs, sums = [], []
    for row, keys in enumerate(seen):
        scores = q[:, :, row : row + 1] @ k[:, :, keys].mT * softmax_scale
        outs.append(scores.softmax(-1) @ v[:, :, keys])
        sums.append(scores.logsumexp(-1))
    return torch.cat(outs, 2), torch.cat(sums, 2)


def check(room, values, mask, seen, softmax_scale=None, drawn=False):
    """Holds a backend against the oracle by the tolerance rule; returns what it computed."""
    *inputs, grad, grad_lse = values
    factor = inputs[0].shape[3] ** -0.5 if softmax_scale is None else softmax_scale
    mask, seen = mask.to(room[1]), seen.to(room[1])

    def ours(backend):
        return lambda *args: block_attention(*args, mask, softmax_scale=softmax_scale, return_lse=True, backend=backend)

    wide = [x.double() for x in inputs]
    exact = everything(lambda *args: oracle(*args, seen, factor), wide, grad.double(), grad_lse)
    got, eager = (everything(ours(backend), inputs, grad, grad_lse) for backend in (room[0], "eager"))
    for name, *triple in zip(NAMES, got, eager, exact, strict=True):
        try:
            assert_as_good_as_eager(*triple, drawn=drawn)
        except AssertionError as error:
            raise AssertionError(f"{name}, D {inputs[0].shape[3]}: {error}") from error
    return got


def up_to(count):
    return [range(i + 1) for i in range(count)]


def near(count, window, sinks):
    return [{*range(max(0, i - window), i + 1), *range(min(i, sinks))} for i in range(count)]


# mask, lengths of the blocks of each image, what a block sees, blocks that are causal
KINDS = {
    "packed": (masks.packed([[1, 4, 9], [5, 30, 2], [33]]), [[1, 4, 9], [5, 30, 2], [33]], up_to(3), ()),
    "packed, empty images": (masks.packed([[0], [7, 20], [], [0, 0], [1], []]), [[7, 20], [1]], up_to(2), ()),
    "packed, one image": (masks.packed([[1, 4, 9, 36]]), [[1, 4, 9, 36]], up_to(4), ()),
    "packed, 40 scales": (masks.packed([[1] * 40, [2] * 9]), [[1] * 40, [2] * 9], up_to(40), ()),
    "causal": (masks.causal(70), [[70]], [[0]], (0,)),
    "causal, one token": (masks.causal(1), [[1]], [[0]], (0,)),
    "causal, packed": (masks.causal([1, 33, 0, 40]), [[1], [33], [40]], [[0]], (0,)),
    "sliding": (masks.sliding([1, 4, 9, 16, 25, 36], 1), [[1, 4, 9, 16, 25, 36]], near(6, 1, 0), ()),
    "sliding, itself alone": (masks.sliding([3, 40, 20, 17], 0), [[3, 40, 20, 17]], near(4, 0, 0), ()),
    "sliding over a text": (
        masks.sliding([20, 4, 9, 0, 25, 36], 1, sinks=1),
        [[20, 4, 9, 0, 25, 36]],
        near(6, 1, 1),
        (),
    ),
    "sliding, packed": (
        masks.sliding([[1, 4, 9, 25], [30, 0, 7, 3]], 1, sinks=1),
        [[1, 4, 9, 25], [30, 0, 7, 3]],
        near(4, 1, 1),
        (),
    ),
    "skip-causal": (
        masks.skip_causal([10, 20, 15]),
        [[10, 20, 15] * 2],
        [[0], [0, 1], [0, 1, 2], [3], [0, 4], [0, 1, 5]],
        (),
    ),
    "spacetime": (
        masks.spacetime(13, [[1, 4, 16], [3, 12, 30], [5, 20]]),
        [[13, 1, 4, 16, 3, 12, 30, 5, 20]],
        [[0], [0, 1], [0, 2], [0, 3], [0, 3, 4], [0, 3, 5], [0, 3, 6], [0, 6, 7], [0, 6, 8]],
        (),
    ),
    "spacetime without a text": (
        masks.spacetime(0, [[1, 4], [3, 12, 40], [9]]),
        [[0, 1, 4, 3, 12, 40, 9]],
        [[0], [1], [2], [2, 3], [2, 4], [2, 5], [5, 6]],
        (),
    ),
    "causal text, then scales": (
        masks.blocks([21, 4, 9, 36], up_to(4), causal=[0]),
        [[21, 4, 9, 36]],
        up_to(4),
        (0,),
    ),
    "causal in the midst": (
        masks.blocks([9, 30, 11, 20], [[0, 2], [1, 0], [0, 1, 2, 3], [1, 3]], causal=[1, 2]),
        [[9, 30, 11, 20]],
        [[0, 2], [1, 0], [0, 1, 2, 3], [1, 3]],
        (1, 2),
    ),
    "four runs": (
        masks.blocks([5] * 8, [[0], [1], [0, 2], [3], [0, 2, 4], [5], [0, 2, 4, 6], [7]]),
        [[5] * 8],
        [[0], [1], [0, 2], [3], [0, 2, 4], [5], [0, 2, 4, 6], [7]],
        (),
    ),
}
kinds = pytest.mark.parametrize("kind", KINDS.values(), ids=KINDS)


@kinds
def test_ranges_are_what_the_sets_say(kind):
    """Both tables hold the same matrix, one by rows and one by columns; ranges do not meet."""
    mask, rows, sees, stepped = kind
    seen = seen_by_sets(rows, sees, stepped)
    token = torch.arange(mask.tokens)
    for table, want in ((mask.sees, seen), (mask.seen_by, seen.T)):
        assert table.dtype == torch.int32
        assert table.is_contiguous()
        begin, end = table[..., None].unbind(1)
        inside = (begin <= token) & (token < end)
        assert torch.equal(inside.sum(0), want.long())
        assert len(table) <= masks.MAX_RANGES
    images = [sum(row) for row in rows]
    if mask.offsets is None:
        assert len(images) == 1
    else:
        ends = [*mask.offsets.tolist()[1:], mask.tokens]
        assert [end - begin for begin, end in zip(mask.offsets.tolist(), ends, strict=True) if end > begin] == images


@rooms
@kinds
def test_masks(room, kind):
    mask, rows, sees, stepped = kind
    seen = seen_by_sets(rows, sees, stepped)
    check(room, tensors(room, 1, 1, 2, 2, len(seen), len(seen), 64), mask, seen)


@rooms
@pytest.mark.parametrize("width", range(32, 129, 8))
def test_every_head_size(room, width):
    for name in ("packed", "spacetime"):
        mask, rows, sees, stepped = KINDS[name]
        seen = seen_by_sets(rows, sees, stepped)
        check(room, tensors(room, 2, 1, 1, 1, len(seen), len(seen), width), mask, seen)


@rooms
@pytest.mark.parametrize("heads", [(4, 2), (6, 1)], ids=str)
@pytest.mark.parametrize("name", ["packed", "sliding, packed", "skip-causal"])
def test_grouped_queries_and_batches(room, name, heads):
    mask, rows, sees, stepped = KINDS[name]
    seen = seen_by_sets(rows, sees, stepped)
    check(room, tensors(room, 3, 2, *heads, len(seen), len(seen), 40), mask, seen, 0.3)


@rooms
@pytest.mark.parametrize("name", ["causal", "sliding over a text", "skip-causal", "spacetime", "four runs"])
@pytest.mark.parametrize("queries", [1, 37])
def test_last_queries(room, name, queries):
    """Fewer queries than keys: over a cache."""
    mask, rows, sees, stepped = KINDS[name]
    seen = seen_by_sets(rows, sees, stepped)[-queries:]
    check(room, tensors(room, 4, 1, 2, 1, queries, seen.shape[1], 32), mask, seen)


@rooms
def test_large_scores(room):
    """A row's first keys may all be hidden from it: no difference of infinities, whatever comes later."""
    scale = 2.5 if room[2] == torch.float32 else 20.0
    for name in ("sliding", "spacetime", "causal, packed"):
        mask, rows, sees, stepped = KINDS[name]
        seen = seen_by_sets(rows, sees, stepped)
        check(room, tensors(room, 5, 1, 2, 2, len(seen), len(seen), 32, scale=scale), mask, seen)


@rooms
def test_strides(room):
    """Out of a fused projection and out of a longer cache."""
    _, device, dtype = room
    mask, rows, sees, stepped = KINDS["sliding over a text"]
    seen = seen_by_sets(rows, sees, stepped)
    length = len(seen)
    fused = torch.randn(2, length, 3, 3, 32, generator=torch.Generator().manual_seed(6)).to(device, dtype)
    q, k, v = fused.permute(2, 0, 3, 1, 4).unbind()
    grad = torch.randn(2, 3, length, 32, generator=torch.Generator().manual_seed(7)).to(device, dtype)
    got = check(room, (q, k, v, grad, torch.zeros(2, 3, length, device=device)), mask, seen)
    assert got[0].transpose(1, 2).is_contiguous(), "as q's memory is ordered: B, L, H, D"
    cache = torch.full((2, 2, 3, length + 20, 32), torch.nan, dtype=dtype, device=device)
    cache[:, :, :, :length] = torch.stack((k, v))
    part = slice(length - 36, None)
    lse = torch.zeros(2, 3, 36, device=device)
    check(room, (q[:, :, part], *cache[:, :, :, :length], grad[:, :, part], lse), mask, seen[part])


# ---- packed images ---------------------------------------------------------------------------------------------------

PACKS = {
    "different schedules": [[1, 4, 9, 16, 40], [3, 5, 20], [64, 64], [130, 3]],
    "one token": [[1], [1], [1]],
    "empty ones": [[], [33], [0, 0], [70, 1], [0]],
    "forty": [[i % 7, i] for i in range(40)],
}


@triton_rooms
@pytest.mark.parametrize("rows", PACKS.values(), ids=PACKS)
@pytest.mark.parametrize("width", [32, 64, 128])
def test_an_image_comes_out_as_alone(room, rows, width):
    """Bit for bit: output, lse and every gradient."""
    device = room[1]
    total = sum(map(sum, rows))
    if device == "cpu" and width == 128 and total > 400:
        pytest.skip("slow in the interpreter")
    *inputs, grad, grad_lse = tensors(room, 8, 1, 2, 1, total, total, width)
    mask = masks.packed(rows, device=device)
    got = everything(
        lambda *args: block_attention(*args, mask, return_lse=True, backend="triton"), inputs, grad, grad_lse
    )
    begin = 0
    for row in rows:
        part = slice(begin, begin := begin + sum(row))
        if sum(row):
            alone = everything(
                lambda *args, row=row: block_causal_attention(*args, row, return_lse=True, backend="triton"),
                [x[:, :, part] for x in inputs], grad[:, :, part], grad_lse[:, :, part],
            )  # fmt: skip
            for name, one, other in zip(NAMES, got, alone, strict=True):
                assert torch.equal(one[:, :, part], other), f"{name} of {row}"


@triton_rooms
def test_any_mask_packed_comes_out_as_alone(room):
    rows = [[1, 4, 9, 25], [30, 0, 7, 3], [0, 0, 0, 70]]
    total = sum(map(sum, rows))
    *inputs, grad, grad_lse = tensors(room, 9, 1, 2, 2, total, total, 32)

    def run(lengths, part):
        mask = masks.sliding(lengths, 1, sinks=1, device=room[1])
        return everything(
            lambda *args: block_attention(*args, mask, return_lse=True, backend="triton"),
            [x[:, :, part] for x in inputs], grad[:, :, part], grad_lse[:, :, part],
        )  # fmt: skip

    got, begin = run(rows, slice(None)), 0
    for row in rows:
        part = slice(begin, begin := begin + sum(row))
        for one, other in zip(got, run(row, part), strict=True):
            assert torch.equal(one[:, :, part], other)


@rooms
def test_images_do_not_see_each_other(room):
    """Not even what is not a number."""
    rows = [[3, 30], [20], [5, 41]]
    *inputs, grad, grad_lse = tensors(room, 10, 1, 2, 2, 99, 99, 32)
    mask = masks.packed(rows, device=room[1])

    def run(values):
        return everything(
            lambda *args: block_attention(*args, mask, return_lse=True, backend=room[0]), values, grad, grad_lse
        )

    want = run(inputs)
    spoiled = [x.clone() for x in inputs]
    for x in spoiled[1:]:
        x[:, :, 33:53] = math.inf if room[0] == "triton" else 1000.0  # eager's product with a weight of 0 is not 0
    got = run(spoiled)
    for one, other in zip(got, want, strict=True):
        for part in (slice(0, 33), slice(53, 99)):
            assert torch.equal(one[:, :, part], other[:, :, part])
    assert not torch.equal(got[0][:, :, 33:53], want[0][:, :, 33:53])


@rooms
@pytest.mark.parametrize("dtype", [torch.int32, torch.int64])
def test_lengths_in_a_tensor(room, dtype):
    rows = [[4, 9, 16], [0, 20, 30], [1, 0, 0]]
    lengths = torch.tensor(rows, dtype=dtype, device=room[1])
    values = tensors(room, 11, 1, 1, 1, 80, 80, 32)
    for make in (masks.packed, lambda *args, **kw: masks.sliding(*args, 1, **kw), masks.skip_causal):
        tokens = 160 if make is masks.skip_causal else 80
        one, other = make(lengths, tokens=tokens), make(rows).to(room[1])
        assert one.device.type == room[1]
        assert torch.equal(one.sees, other.sees)
        assert torch.equal(one.seen_by, other.seen_by)
        assert torch.equal(one.offsets, other.offsets)
    check(room, values, masks.packed(lengths, tokens=80), seen_by_sets(rows, up_to(3)))
    single = masks.packed(lengths[0], tokens=29)
    assert single.offsets is None
    assert torch.equal(single.sees, masks.packed(rows[0]).sees.to(room[1]))


def test_lengths_that_nobody_looks_at_stay_inside(device):
    """As on a GPU: what is beyond the tokens is cut off, and the last block goes on to the end."""
    for lengths in (
        [[4, 5], [6, 7]],
        [[40, 5], [6, 7]],
        [[1, 0], [0, 1]],
        [[2**63 - 1, 2**63 - 1], [-(2**63), 1]],
        [[-5, 9], [-1, 40]],
        [[0, 0], [0, 0]],
    ):
        sizes = torch.tensor(lengths, device=device)
        mask = masks._made(sizes, 30, [[(0, 1)], [(0, 2)]], [[(0, 2)], [(1, 2)]])
        token = torch.arange(30, device=device)
        for table in (mask.sees, mask.seen_by):
            begin, end = table[0]
            assert (begin <= token).all()
            assert (token < end).all()
            assert (begin >= 0).all()
            assert (end <= 30).all()
        assert mask.offsets[0] == 0
        assert (mask.offsets.diff() >= 0).all()
        assert (mask.offsets <= 30).all()


# ---- other equalities ------------------------------------------------------------------------------------------------


@rooms
@pytest.mark.parametrize("width", [32, 64, 96, 128])
def test_causal_is_causal_attention(room, width):
    values = tensors(room, 12, 1, 1, 1, 67, 67, width)
    got = check(room, values, masks.causal(67), torch.ones(67, 67, dtype=torch.bool).tril())
    wide = [x.double().requires_grad_() for x in values[:3]]
    out = torch.nn.functional.scaled_dot_product_attention(*wide, is_causal=True)
    want = out, *torch.autograd.grad(out, wide, values[3].double())
    tolerance = {torch.float32: 2e-5, torch.float16: 2e-2, torch.bfloat16: 2e-1}[room[2]]
    torch.testing.assert_close(got[0].double(), want[0], rtol=0, atol=tolerance)


@kernel
def test_one_image_is_the_schedule(room):
    """The table of a schedule, and the schedule itself: one range a row, begun at 0."""
    lengths = [1, 4, 9, 16, 100]
    *inputs, grad, grad_lse = tensors(room, 13, 2, 2, 1, 130, 130, 64)
    mask = masks.packed(lengths, device=room[1])
    got = everything(
        lambda *args: block_attention(*args, mask, return_lse=True, backend=room[0]), inputs, grad, grad_lse
    )
    want = everything(
        lambda *args: block_causal_attention(*args, lengths, return_lse=True, backend=room[0]), inputs, grad, grad_lse
    )
    for one, other in zip(got, want, strict=True):
        assert torch.equal(one, other)


@rooms
def test_nothing_to_do(room):
    for batch, heads, tokens in ((0, 2, 10), (1, 0, 10), (1, 2, 0)):
        values = tensors(room, 14, batch, heads, 2, tokens, tokens, 32)
        mask = masks.packed([[tokens], [0]], device=room[1])
        got = everything(
            lambda *args, mask=mask: block_attention(*args, mask, return_lse=True, backend=room[0]),
            values[:3], *values[3:],
        )  # fmt: skip
        assert not any(one.count_nonzero() for one in got)


@rooms
def test_one_output_alone(room):
    mask = KINDS["sliding, packed"][0].to(room[1])
    *inputs, grad, grad_lse = tensors(room, 15, 1, 2, 2, mask.tokens, mask.tokens, 32)

    def gradients(pick, *given):
        leaves = [x.clone().requires_grad_() for x in inputs]
        outputs = block_attention(*leaves, mask, return_lse=True, backend=room[0])
        return torch.autograd.grad([outputs[i] for i in pick], leaves, given, allow_unused=True)

    zero, zero_lse = torch.zeros_like(grad), torch.zeros_like(grad_lse)
    for one, other in zip(gradients((0,), grad), gradients((0, 1), grad, zero_lse), strict=True):
        assert torch.equal(one, other)
    for one, other in zip(gradients((1,), grad_lse), gradients((0, 1), zero, grad_lse), strict=True):
        assert torch.equal(one, other)
    out = block_attention(*inputs, mask, backend=room[0])
    assert torch.equal(out, block_attention(*inputs, mask, return_lse=True, backend=room[0])[0])


@triton_rooms
@pytest.mark.parametrize("name", ["packed, empty images", "spacetime"])
def test_writes_what_it_should_and_nothing_else(room, name):
    _, device, dtype = room
    mask = KINDS[name][0].to(device)
    q, k, v, grad, grad_lse = tensors(room, 16, 1, 4, 2, mask.tokens, mask.tokens, 40)
    kernels, where = _native.kernels("attention"), (None, 0, 40**-0.5, _native.capability(q))
    (out, out_ok), (lse, lse_ok) = guarded(q.shape, dtype, device), guarded(q.shape[:3], torch.float32, device)
    kernels.attention_forward(q, k, v, *where, out, lse, sees=mask.sees, offsets=mask.offsets)
    out_ok(), lse_ok()
    delta, *filled = [guarded(x.shape, x.dtype, device) for x in (lse, q, k, v)]
    kernels.attention_backward(
        grad, q, k, v, out, grad_lse, lse, *where, delta[0], *[buffer for buffer, _ in filled],
        sees=mask.sees, seen_by=mask.seen_by, offsets=mask.offsets,
    )  # fmt: skip
    for _, ok in (delta, *filled):
        ok()


@triton_rooms
def test_runs_are_bit_equal_in_any_order_of_heads(room, monkeypatch):
    mask, rows, sees, stepped = KINDS["sliding, packed"]
    seen = seen_by_sets(rows, sees, stepped)
    values = tensors(room, 17, 3, 2, 1, len(seen), len(seen), 32)
    want = check(room, values, mask, seen)
    for size in (1, 2, 6):
        monkeypatch.setattr(_native.kernels("attention"), "_group", lambda rows, _, size=size: min(rows, size))
        for one, other in zip(check(room, values, mask, seen), want, strict=True):
            assert torch.equal(one, other)


# ---- random masks ----------------------------------------------------------------------------------------------------


@st.composite
def problems(draw):
    """(rows of lengths, what a block sees, causal blocks, queries, width, heads, groups, seed)"""
    count = draw(st.integers(1, 7))
    row = st.lists(st.integers(0, 20), min_size=count, max_size=count)
    rows = draw(st.lists(row, min_size=1, max_size=4).filter(lambda rows: 0 < sum(map(sum, rows)) <= 110))
    sees = [draw(st.sets(st.integers(0, count - 1))) | {i} for i in range(count)]
    stepped = draw(st.sets(st.integers(0, count - 1)))
    total = sum(map(sum, rows))
    queries = draw(st.integers(1, total)) if len(rows) == 1 else total
    heads = draw(st.sampled_from([(1, 1), (2, 1)]))
    return rows, sees, stepped, queries, draw(st.sampled_from(range(32, 129, 8))), *heads, draw(st.integers(0, 2**31))


@rooms
@settings(max_examples=60, deadline=None, suppress_health_check=list(HealthCheck))
@given(problem=problems())
def test_random_masks(room, problem):
    rows, sees, stepped, queries, width, heads, groups, seed = problem
    mask = masks.blocks(rows, sees, causal=stepped)  # 7 blocks have at most 4 runs
    seen = seen_by_sets(rows, sees, stepped, queries)
    check(room, tensors(room, seed, 1, heads, groups, queries, mask.tokens, width), mask, seen, drawn=True)


# ---- the operator ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["packed", "skip-causal", "causal"])
def test_gradcheck_of_the_definition(device, name):
    mask = {"packed": masks.packed([[1, 3], [4]]), "skip-causal": masks.skip_causal([2, 3]), "causal": masks.causal(7)}
    mask = mask[name].to(device)
    q, k, v, _, _ = tensors(("eager", device, torch.float64), 18, 1, 2, 1, mask.tokens, mask.tokens, 32)
    inputs = [x.requires_grad_() for x in (q, k, v)]
    torch.autograd.gradcheck(lambda *args: block_attention(*args, mask, return_lse=True), inputs)


@pytest.mark.parametrize("backend", ["eager", "triton"])
@pytest.mark.parametrize("name", ["packed", "skip-causal"])
def test_opcheck(device, backend, name):
    if backend == "triton" and device == "cpu" and (reason := interpreter_skip()):
        pytest.skip(reason)
    mask = {"packed": masks.packed([[1, 4], [5]]), "skip-causal": masks.skip_causal([2, 3])}[name].to(device)
    q, k, v, grad, grad_lse = tensors((backend, device, torch.float32), 19, 1, 2, 1, 10, 10, 32)
    leaves = [x.clone().requires_grad_() for x in (q, k, v)]
    who = mask.sees, mask.seen_by, mask.offsets
    torch.library.opcheck(FORWARD.overload, (*leaves, *who, 0.2, backend))
    out, lse = FORWARD(q, k, v, *who, 0.2, backend)
    torch.library.opcheck(BACKWARD.overload, (grad, None, q, k, v, out, lse, *who, 0.2, backend))
    torch.library.opcheck(BACKWARD.overload, (grad, grad_lse, q, k, v, out, lse, *who, 0.2, backend))


@rooms
@pytest.mark.parametrize("make", [masks.packed, masks.skip_causal], ids=["packed", "skip-causal"])
def test_compiles_whole_with_dynamic_shapes(room, make, fresh_compiler):
    backend, device, _ = room

    def function(q, k, v, mask):
        out, lse = block_attention(q, k, v, mask, return_lse=True, backend=backend)
        return (out.float() * 2).sum() + lse.sum()

    compiled = torch.compile(function, fullgraph=True, dynamic=True, backend="aot_eager")
    for rows in ([[3, 5], [12, 2]], [[4, 9], [20, 3]]):
        mask = make(rows, device=device)
        inputs = tensors(room, 20, 2, 2, 2, mask.tokens, mask.tokens, 32)[:3]
        results = []
        for run in (function, compiled):
            leaves = [x.clone().requires_grad_() for x in inputs]
            out = run(*leaves, mask)
            results.append((out.detach(), *torch.autograd.grad(out, leaves)))
        torch.testing.assert_close(results[1], results[0])


def zeros(*shape, dtype=torch.float32):
    return torch.zeros(shape, dtype=dtype)


Q, K, M = zeros(1, 4, 10, 32), zeros(1, 2, 10, 32), masks.packed([[4, 6]])
TWO = masks.packed([[4], [6]])
BAD = {
    "q a list": (([1.0], K, K, M), {}, TypeError, "q must be a tensor"),
    "k dtype": ((Q, K.half(), K, M), {}, TypeError, "k must have the dtype of q"),
    "head size 24": ((zeros(1, 4, 10, 24), K, K, M), {}, ValueError, "got 24"),
    "heads": ((zeros(1, 3, 10, 32), K, K, M), {}, ValueError, "multiple of k's 2 heads, got 3"),
    "lengths": ((Q, K, K, [4, 6]), {}, TypeError, "mask must be a mask of ops.masks, got list"),
    "tokens": ((Q, K, K, masks.packed([[4, 5]])), {}, ValueError, "mask must be of the 10 tokens of k, got one of 9"),
    "device": ((Q, K, K, M.to("meta")), {}, ValueError, "mask must be on the device of q"),
    "fewer queries": ((Q[:, :, 3:], K, K, TWO), {}, ValueError, "q must have the 10 tokens of k where images are"),
    "softmax_scale": ((Q, K, K, M), {"softmax_scale": -1.0}, ValueError, "softmax_scale must be at least 0"),
    "backend": ((Q, K, K, M), {"backend": "cuda"}, ValueError, "got 'cuda'"),
}


@pytest.mark.parametrize(("args", "kwargs", "error", "text"), BAD.values(), ids=BAD)
def test_refuses(args, kwargs, error, text):
    with pytest.raises(error, match=text) as raised:
        block_attention(*args, **kwargs)
    assert str(raised.value).startswith("block_attention: ")


BAD_MASKS = {
    "an integer": (masks.packed, (5,), {}, TypeError, "packed: lengths must be integers or a tensor, got int"),
    "text": (masks.packed, ("55",), {}, TypeError, "packed: lengths must be integers"),
    "float": (masks.packed, ([1.0],), {}, TypeError, "packed: lengths must be an integer"),
    "negative": (masks.packed, ([[1], [-1]],), {}, ValueError, "packed: lengths must be at least 0, got -1"),
    "negative in a tensor": (masks.packed, (torch.tensor([-1, 3]),), {}, ValueError, "at least 0, got -1"),
    "float tensor": (masks.packed, (torch.tensor([1.0]),), {}, TypeError, "lengths must be int32, int64"),
    "3-D tensor": (masks.packed, (torch.ones(1, 1, 1, dtype=torch.int32),), {}, ValueError, r"must be \(S,\) or"),
    "no images": (masks.packed, (torch.ones(0, 2, dtype=torch.int32),), {}, ValueError, "one or more images"),
    "no blocks": (masks.packed, ([],), {}, ValueError, "one or more blocks, got 0"),
    "tokens": (masks.packed, ([3, 4],), {"tokens": 8}, ValueError, "tokens must be the sum of lengths, 7, got 8"),
    "tokens unknown": (
        masks.packed, (torch.ones(2, device="meta", dtype=torch.int32),), {}, ValueError, "tokens must be given",
    ),
    "ragged": (masks.blocks, ([[1], [1, 2]], [[0], [1]]), {}, ValueError, r"for each image, got \[1, 2\]"),
    "sees too few": (masks.blocks, ([1, 2], [[0]]), {}, ValueError, "what each of 2 blocks sees, got 1"),
    "sees beyond": (masks.blocks, ([1, 2], [[0], [1, 2]]), {}, ValueError, r"must name blocks below 2, got 2"),
    "sees a float": (masks.blocks, ([1], [[0.0]]), {}, TypeError, r"sees\[0\] must be an integer"),
    "not itself": (masks.blocks, ([1, 2], [[0], [0]]), {}, ValueError, r"sees\[1\] must hold 1"),
    "causal beyond": (masks.blocks, ([1], [[0]]), {"causal": [1]}, ValueError, "causal must name blocks below 1"),
    "five runs": (
        masks.blocks, ([1] * 9, [[i] for i in range(8)] + [[0, 2, 4, 6, 8]]), {}, ValueError,
        "see at most 4 runs of blocks, got 5 for block 8",
    ),
    "seen by five runs": (
        masks.blocks, ([1] * 9, [[i, 8] if i % 2 == 0 else [i] for i in range(9)]), {}, ValueError,
        "be seen by at most 4 runs of blocks, got 5 for block 8",
    ),
    "window": (masks.sliding, ([1, 2], -1), {}, ValueError, "sliding: window must be at least 0"),
    "sinks": (masks.sliding, ([1, 2], 1), {"sinks": 0.5}, TypeError, "sliding: sinks must be an integer"),
    "text below 0": (masks.spacetime, (-1, [[1]]), {}, ValueError, "spacetime: text must be at least 0"),
    "clip without scales": (masks.spacetime, (1, [[1], []]), {}, ValueError, r"clips\[1\] must have one or more"),
}  # fmt: skip


@pytest.mark.parametrize(("make", "args", "kwargs", "error", "text"), BAD_MASKS.values(), ids=BAD_MASKS)
def test_masks_refuse(make, args, kwargs, error, text):
    with pytest.raises(error, match=text):
        make(*args, **kwargs)


# ---- on a GPU only ---------------------------------------------------------------------------------------------------

VAR_256 = [n * n for n in (1, 2, 3, 4, 5, 6, 8, 10, 13, 16)]
WIDE = [1, 4, 9, 24, 60, 160, 384, 600]


def run_blocks_cuda(q, k, v, mask, group=None, tile=CHOSEN, counted=True):
    """(out, lse) of the CUDA version by a plan (a tile, heads in groups, tiles counted or not), in guarded buffers."""
    (out, out_ok), (lse, lse_ok) = guarded(q.shape, q.dtype, "cuda"), guarded(q.shape[:3], torch.float32, "cuda")
    taken = torch.full((1,), 77, dtype=torch.int32, device="cuda") if counted else None
    family._blocks_cuda(
        q, k, v, mask.sees, mask.offsets, out, lse, taken, q.shape[3] ** -0.5, group or q.shape[0] * q.shape[1], tile
    )
    out_ok(), lse_ok()
    return out, lse


every_tile = pytest.mark.parametrize(("width", "tile"), [(64, 0), (64, 1), (96, 2), (128, 2), (40, 0), (104, 2)])


@pytest.mark.gpu
@gpu_cuda
@every_tile
@kinds
def test_every_mask_in_every_tile(room, kind, width, tile):
    mask, rows, sees, stepped = kind
    mask, seen = mask.to("cuda"), seen_by_sets(rows, sees, stepped).to("cuda")
    q, k, v = tensors(room, 24, 1, 2, 1, len(seen), len(seen), width)[:3]
    exact = oracle(q.double(), k.double(), v.double(), seen, width**-0.5)
    eager = block_attention(q, k, v, mask, return_lse=True, backend="eager")
    for triple in zip(run_blocks_cuda(q, k, v, mask, tile=tile), eager, exact, strict=True):
        assert_as_good_as_eager(*triple)


@pytest.mark.gpu
@gpu_cuda
@every_tile
def test_an_image_comes_out_of_a_tile_as_alone(room, width, tile):
    """Bit for bit, however tiles are dealt out; one row more or less than a tile, empty images, forty of them."""
    for rows in (*PACKS.values(), [[n // 3, n - n // 3] for n in (63, 64, 65, 127, 128, 129, 191, 192, 193, 680)]):
        total = sum(map(sum, rows))
        q, k, v = tensors(room, 25, 2, 4, 2, total, total, width)[:3]
        mask = masks.packed(rows, device="cuda")
        want = run_blocks_cuda(q, k, v, mask, tile=tile, counted=False)
        for group in (None, 1, 3):
            for one, other in zip(run_blocks_cuda(q, k, v, mask, group, tile), want, strict=True):
                assert torch.equal(one, other)
        begin = 0
        for row in rows:
            part = slice(begin, begin := begin + sum(row))
            if sum(row):
                alone = run_cuda(*(x[:, :, part].contiguous() for x in (q, k, v)), row, tile=tile)
                for one, other in zip(want, alone, strict=True):
                    assert torch.equal(one[:, :, part], other), row


def gradients_blocks_cuda(values, mask, groups=(None, None)):
    """Gradients of the CUDA version, heads in groups of that many, in guarded buffers, from its own out and lse."""
    q, k, v, grad, grad_lse = values
    out, lse = block_attention(q, k, v, mask, return_lse=True, backend="cuda")
    batch, heads, queries, width = q.shape
    images = 1 if mask.offsets is None else len(mask.offsets)
    sizes = batch * heads * 2 * (queries + 127 * images), family._plan_size(q, k, mask.sees, mask.seen_by, mask.offsets)
    workspace = torch.full((sizes[0] + 64,), torch.nan, device="cuda")
    plan = torch.full((sizes[1] + 64,), -12345, dtype=torch.int32, device="cuda")
    filled = [guarded(x.shape, x.dtype, "cuda") for x in (q, k, v)]
    family._blocks_backward_cuda(
        grad, grad_lse, q, k, v, out, lse, mask.sees, mask.seen_by, mask.offsets, workspace[: sizes[0]],
        plan[: sizes[1]], *[buffer for buffer, _ in filled], width**-0.5,
        groups[0] or batch * heads, groups[1] or batch * k.shape[1],
    )  # fmt: skip
    assert workspace[sizes[0] :].isnan().all(), "wrote behind the workspace"
    assert (plan[sizes[1] :] == -12345).all(), "wrote behind the plan"
    for _, ok in filled:
        ok()
    return [buffer for buffer, _ in filled]


@pytest.mark.gpu
@gpu_cuda
@pytest.mark.parametrize("width", [64, 96, 128, 40])
@kinds
def test_gradients_of_every_mask(room, kind, width):
    """Held against the definition, and the same in any order of heads and in every launch."""
    mask, rows, sees, stepped = kind
    mask, seen = mask.to("cuda"), seen_by_sets(rows, sees, stepped).to("cuda")
    values = tensors(room, 26, 2, 4, 2, len(seen), len(seen), width)
    *inputs, grad, grad_lse = values
    exact = everything(
        lambda *args: oracle(*args, seen, width**-0.5), [x.double() for x in inputs], grad.double(), grad_lse
    )
    eager = everything(
        lambda *args: block_attention(*args, mask, return_lse=True, backend="eager"), inputs, grad, grad_lse
    )
    got = gradients_blocks_cuda(values, mask)
    for name, *triple in zip(NAMES[2:], got, eager[2:], exact[2:], strict=True):
        try:
            assert_as_good_as_eager(*triple)
        except AssertionError as error:
            raise AssertionError(f"{name}, D {width}: {error}") from error
    for groups in ((1, 1), (3, 2), (8, 3)):
        for one, other in zip(gradients_blocks_cuda(values, mask, groups), got, strict=True):
            assert torch.equal(one, other)


@pytest.mark.gpu
@gpu_cuda
@pytest.mark.parametrize("key_heads", [2, 4])
@pytest.mark.parametrize("width", [64, 96, 128])
def test_gradients_of_an_image_come_out_as_alone(room, width, key_heads):
    """Bit for bit, from the same out and lse; one row more or less than a tile, empty images, forty of them."""
    for rows in (*PACKS.values(), [[n // 3, n - n // 3] for n in (63, 64, 65, 95, 96, 97, 127, 128, 129, 193, 680)]):
        total = sum(map(sum, rows))
        values = tensors(room, 27, 2, 4, key_heads, total, total, width)
        *inputs, grad, grad_lse = values
        mask = masks.packed(rows, device="cuda")
        out, lse = block_attention(*inputs, mask, return_lse=True, backend="cuda")
        got = gradients_blocks_cuda(values, mask)
        begin = 0
        for row in rows:
            part = slice(begin, begin := begin + sum(row))
            if not sum(row):
                continue
            alone = [x[:, :, part].contiguous() for x in (grad, grad_lse, *inputs, out, lse)]
            schedule = torch.tensor(row, dtype=torch.int32, device="cuda")
            want = SCHEDULED(*alone, [], schedule, 0, width**-0.5, "cuda")
            for name, one, other in zip(NAMES[2:], got, want, strict=True):
                assert torch.equal(one[:, :, part], other), f"{name} of {row}"


@pytest.mark.gpu
@gpu_kernels
@pytest.mark.parametrize("width", [64, 96, 128, 40])
def test_real_sizes(room, width):
    if room[2] == torch.float32 and width == 96:
        pytest.skip("compiled for 64 and 128")
    packs = [VAR_256, WIDE, [7, 30], VAR_256]
    total = sum(map(sum, packs))
    *inputs, grad, grad_lse = tensors(room, 21, 1, 2, 1, total, total, width)
    for mask in (
        masks.packed(packs, device="cuda"),
        masks.sliding([77, *VAR_256, *VAR_256, total - 77 - 2 * 680], 2, sinks=1, device="cuda"),
        masks.causal([total - 5, 5], device="cuda"),
    ):
        runs = [
            everything(
                lambda *args, mask=mask, b=backend: block_attention(*args, mask, return_lse=True, backend=b),
                values,
                grad.to(values[0].dtype),
                grad_lse,
            )
            for backend, values in ((room[0], inputs), ("eager", inputs), ("eager", [x.double() for x in inputs]))
        ]
        for name, *triple in zip(NAMES, *runs, strict=True):
            try:
                assert_as_good_as_eager(*triple)
            except AssertionError as error:
                raise AssertionError(f"{name}, D {width}: {error}") from error


@pytest.mark.gpu
@gpu_kernels
def test_no_races(room):
    """2,000 launches on the same inputs."""
    mask = masks.sliding([[20, 4, 9, 160, 300], [0, 1, 64, 64, 7]], 1, sinks=1, device="cuda")
    *inputs, grad, grad_lse = tensors(room, 22, 2, 4, 2, mask.tokens, mask.tokens, 64)

    def run():
        return everything(
            lambda *args: block_attention(*args, mask, return_lse=True, backend=room[0]), inputs, grad, grad_lse
        )

    want = run()
    differ = torch.zeros((), dtype=torch.int64, device="cuda")
    for _ in range(2000):
        for one, other in zip(run(), want, strict=True):
            differ += (one != other).sum()
    assert differ.item() == 0


@pytest.mark.gpu
@gpu_kernels
def test_graph_makes_the_mask_of_lengths_that_change(room):
    lengths = torch.tensor([[20, 44, 100], [1, 4, 31]], device="cuda")
    q, k, v = tensors(room, 23, 1, 2, 1, 200, 200, 64)[:3]

    def run():
        return block_attention(q, k, v, masks.packed(lengths, tokens=200), return_lse=True, backend=room[0])

    run()
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        held = run()
    for rows in ([[20, 44, 100], [1, 4, 31]], [[5, 0, 3], [92, 50, 50]], [[200, 0, 0], [0, 0, 0]]):
        lengths.copy_(torch.tensor(rows))
        graph.replay()
        for one, other in zip(held, run(), strict=True):
            assert torch.equal(one, other)
