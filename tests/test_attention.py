"""`block_causal_attention`: every backend against a float64 oracle, forward, lse and every gradient."""

import functools
import math
import random
import subprocess
import sys

import pytest
import torch
from helpers import assert_as_good_as_eager, guarded, interpreter_skip, kernel_rooms
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from unifiedar.ops import _native, block_causal_attention, registry
from unifiedar.ops import attention as family

FORWARD, BACKWARD = registry["block_causal_attention"], registry["block_causal_attention_backward"]
NAMES = ("out", "lse", "grad q", "grad k", "grad v")
VAR_256 = [n * n for n in (1, 2, 3, 4, 5, 6, 8, 10, 13, 16)]
VAR_512 = [n * n for n in (1, 2, 3, 4, 6, 9, 13, 18, 24, 32)]
INFINITY = [n * n for n in (1, 2, 4, 6, 8, 12, 16, 20, 24, 32, 40, 48, 64)]


def chosen(accept):
    return pytest.mark.parametrize("room", [case for case in kernel_rooms() if accept(*case.values[0])], indirect=True)


def served(backend, device, dtype):
    """Whether a backend takes a dtype."""
    return backend != "cuda" or dtype != torch.float32


rooms = chosen(served)
every_kernel = chosen(lambda *room: room[0] != "eager" and served(*room))
triton_rooms = chosen(lambda backend, device, dtype: backend == "triton")
gpu_kernels = chosen(lambda *room: room[1] == "cuda" and room[0] != "eager" and served(*room))
gpu_cuda = chosen(lambda *room: room[0] == "cuda" and served(*room))


def tensors(room, seed, batch, heads, groups, queries, keys, width, scale=1.0):
    """q, k, v, and gradients of out and lse."""
    _, device, dtype = room
    generator = torch.Generator().manual_seed(seed)

    def normal(*shape):
        return torch.randn(shape, generator=generator)

    q = normal(batch, heads, queries, width) * scale
    k, v = normal(batch, groups, keys, width), normal(batch, groups, keys, width)
    grad, grad_lse = normal(*q.shape), normal(*q.shape[:3]).to(device)
    return *(x.to(device, dtype) for x in (q, k, v, grad)), grad_lse


def oracle(q, k, v, lengths, prefix, softmax_scale):
    """Without a mask: each scale attends to the keys up to its own end, in float64."""
    share = q.shape[1] // k.shape[1]
    k, v = (x.repeat_interleave(share, 1) for x in (k, v))
    missing = k.shape[2] - q.shape[2]
    outs, sums, begin = [], [], 0
    for length in (prefix, *lengths):
        end = begin + length
        part = q[:, :, max(begin - missing, 0) : max(end - missing, 0)]
        scores = part @ k[:, :, :end].mT * softmax_scale
        outs.append(scores.softmax(-1) @ v[:, :, :end])
        sums.append(scores.logsumexp(-1))
        begin = end
    return torch.cat(outs, 2), torch.cat(sums, 2)


def everything(function, inputs, grad, grad_lse):
    """out, lse and the gradients of q, k, v."""
    inputs = [x.detach().requires_grad_() for x in inputs]
    out, lse = function(*inputs)
    return out, lse, *torch.autograd.grad((out, lse), inputs, (grad.to(out.dtype), grad_lse.to(lse.dtype)))


def check(room, values, lengths, prefix=0, softmax_scale=None, schedule=None, drawn=False):
    """Holds a backend against the oracle by the tolerance rule; returns what it computed."""
    *inputs, grad, grad_lse = values
    factor = inputs[0].shape[3] ** -0.5 if softmax_scale is None else softmax_scale

    def ours(backend):
        return lambda *args: block_causal_attention(
            *args,
            lengths if schedule is None else schedule,
            prefix=prefix,
            softmax_scale=softmax_scale,
            return_lse=True,
            backend=backend,
        )

    exact = everything(
        lambda *args: oracle(*args, lengths, prefix, factor), [x.double() for x in inputs], grad.double(), grad_lse
    )
    got, eager = (everything(ours(backend), inputs, grad, grad_lse) for backend in (room[0], "eager"))
    for name, *triple in zip(NAMES, got, eager, exact, strict=True):
        try:
            assert_as_good_as_eager(*triple, drawn=drawn)
        except AssertionError as error:
            raise AssertionError(f"{name}, D {inputs[0].shape[3]}, {lengths}, prefix {prefix}: {error}") from error
    return got


# ---- every backend ---------------------------------------------------------------------------------------------------

# lengths, prefix, queries (None: all)
SCHEDULES = {
    "one token": ([1], 0, None),
    "one scale": ([67], 0, None),
    "tiny scales": ([1, 2, 3, 4, 5, 6, 7], 0, None),
    "crosses tiles": ([1, 4, 9, 16, 25, 36, 64], 0, None),
    "whole tiles": ([64, 64, 128], 0, None),
    "one past tiles": ([1, 64, 64, 64], 0, None),
    "prefix": ([3, 11, 40], 17, None),
    "prefix alone": ([0], 41, None),
    "empty scales": ([0, 5, 0, 0, 30, 0], 3, None),
    "32 scales": ([*range(32)], 0, None),
    "last queries": ([1, 4, 9, 16, 70], 5, 70),
    "last query": ([30, 100], 0, 1),
    "queries from within a scale": ([20, 30, 40, 50], 0, 77),
}


@rooms
@pytest.mark.parametrize("case", SCHEDULES.values(), ids=SCHEDULES)
def test_schedules(room, case):
    lengths, prefix, queries = case
    keys = sum(lengths) + prefix
    check(room, tensors(room, 1, 1, 2, 2, queries or keys, keys, 64), lengths, prefix)


@rooms
@pytest.mark.parametrize("width", range(32, 129, 8))
def test_every_head_size(room, width):
    check(room, tensors(room, 2, 1, 1, 1, 90, 90, width), [1, 4, 9, 16, 60])


@rooms
@pytest.mark.parametrize("heads", [(4, 2), (6, 1), (3, 3)], ids=str)
def test_grouped_queries(room, heads):
    check(room, tensors(room, 3, 2, *heads, 50, 70, 40), [1, 2, 3, 14, 43], 7)


@rooms
@pytest.mark.parametrize("softmax_scale", [0.0, 0.01, 1.0, 3.0])
def test_softmax_scale(room, softmax_scale):
    check(room, tensors(room, 4, 1, 1, 1, 70, 70, 32), [10, 20, 40], 0, softmax_scale)


@rooms
def test_lengths_1_to_70(room):
    generator = random.Random(5)
    for length in (*range(1, 71), 97, 127, 131, 191, 257):
        if room[1] == "cpu" and length > 8 and length % 3 and length not in (31, 32, 64, 65, 127, 257):
            continue
        cuts = sorted(generator.sample(range(1, length), min(length - 1, generator.randrange(6))))
        lengths = [end - begin for begin, end in zip([0, *cuts], [*cuts, length], strict=True)]
        check(room, tensors(room, length, 1, 1, 1, length, length, 32), lengths)


@rooms
@pytest.mark.parametrize("length", [1, 31, 32])
def test_scales_of_one_token_are_causal(room, length):
    """The prefix takes the rest: one token more, which is a scale of one."""
    values = tensors(room, 6, 1, 2, 2, length + 1, length + 1, 64)
    got = check(room, values, [1] * length, 1)
    mask = torch.ones(length + 1, length + 1, dtype=torch.bool, device=room[1]).tril()
    _agrees(got, values, mask)


@rooms
@pytest.mark.parametrize("width", [32, 64, 96, 128])
@pytest.mark.parametrize("length", [1, 67, 129])
def test_one_scale_is_full_attention(room, length, width):
    values = tensors(room, 7, 1, 1, 1, length, length, width)
    _agrees(check(room, values, [length]), values, None)


def _agrees(got, values, mask):
    """With torch's own attention, in float64."""
    *inputs, grad, grad_lse = values
    wide = [x.double().requires_grad_() for x in inputs]
    out = torch.nn.functional.scaled_dot_product_attention(*wide, attn_mask=mask)
    scores = wide[0] @ wide[1].mT / wide[0].shape[3] ** 0.5
    lse = scores.logsumexp(-1) if mask is None else scores.masked_fill(~mask, -math.inf).logsumexp(-1)
    want = out, lse, *torch.autograd.grad((out, lse), wide, (grad.double(), grad_lse.double()))
    tolerance = {torch.float32: 2e-5, torch.float16: 2e-2, torch.bfloat16: 2e-1}[inputs[0].dtype]
    for one, other in zip(got, want, strict=True):
        torch.testing.assert_close(one.double(), other, rtol=0, atol=tolerance)


@rooms
def test_rows_that_see_one_key(room):
    values = tensors(room, 8, 1, 2, 2, 40, 40, 32)
    out, lse, *_ = check(room, values, [1, 39])
    # On a GPU float32 is multiplied as two TF32 numbers, which hold 22 of its 24 bits.
    split = room[0] == "triton" and room[1] == "cuda" and room[2] == torch.float32
    torch.testing.assert_close(out[:, :, 0], values[2][:, :, 0], rtol=2**-21 if split else 0, atol=0)
    score = (values[0][:, :, 0].double() * values[1][:, :, 0].double()).sum(-1) / 32**0.5
    torch.testing.assert_close(lse[:, :, 0].double(), score, rtol=0, atol=5e-3 if room[0] == "eager" else 2e-5)


@rooms
def test_large_scores(room):
    """One key takes nearly all the weight, and the largest score comes late or early.

    Smaller in float32: the kernels' backward forms the scores again, in another order, so that what rounding does
    to them (1e-7 of a score) does not cancel against lse, as it does in the eager formula.
    """
    scale = 5.0 if room[2] == torch.float32 else 20.0
    check(room, tensors(room, 9, 1, 2, 2, 150, 150, 32, scale=scale), [5, 25, 40, 80])


@rooms
def test_strides(room):
    """Out of a fused projection, transposed, and a part of a longer cache: read in place, and laid out like q."""
    backend, device, dtype = room
    batch, heads, length, width = 2, 3, 45, 32
    lengths = [4, 11, 30]
    fused = torch.randn(batch, length, 3, heads, width, generator=torch.Generator().manual_seed(10)).to(device, dtype)
    q, k, v = fused.permute(2, 0, 3, 1, 4).unbind()
    grad = torch.randn(batch, heads, length, width, generator=torch.Generator().manual_seed(11)).to(device, dtype)
    grad_lse = torch.zeros(batch, heads, length, device=device)
    got = check(room, (q, k, v, grad, grad_lse), lengths)
    plain = check(room, (q.contiguous(), k.contiguous(), v.contiguous(), grad, grad_lse), lengths)
    if backend != "eager":  # whose products may take another way with other strides
        for one, other in zip(got, plain, strict=True):
            assert torch.equal(one, other)
    assert got[0].transpose(1, 2).is_contiguous(), "as q's memory is ordered: B, L, H, D"
    assert plain[0].is_contiguous()
    cache = torch.full((2, batch, heads, 64, width), torch.nan, dtype=dtype, device=device)
    cache[0, :, :, :length], cache[1, :, :, :length] = k, v
    check(room, (q[:, :, 15:], *cache[:, :, :, :length], grad[:, :, 15:], grad_lse[:, :, 15:]), lengths)
    odd = torch.randn(batch, heads, width, length, generator=torch.Generator().manual_seed(12)).to(device, dtype).mT
    check(room, (odd, odd, odd, grad.expand_as(grad), grad_lse), lengths)
    one = torch.ones((), device=device, dtype=dtype).expand(batch, heads, length, width)
    check(room, (q, k, v, one, grad_lse), lengths)


@every_kernel
def test_a_preallocated_cache_is_read_in_place(room):
    """Scale by scale: queries of one, keys and values of all earlier ones where they lie, nothing behind them."""
    _, device, dtype = room
    lengths, width = [1, 4, 9, 30], 64
    q, k, v = tensors(room, 25, 2, 4, 2, 44, 44, width)[:3]
    cache = torch.full((2, 2, 2, 64, width), torch.nan, dtype=dtype, device=device)
    readable = family._in_boxes if room[0] == "cuda" else lambda x: family._readable(x)[0]
    begin = 0
    for length in lengths:
        end = begin + length
        cache[:, :, :, begin:end] = torch.stack((k, v))[:, :, :, begin:end]
        keys, values = cache[:, :, :, :end]
        assert readable(keys) is keys
        assert readable(values) is values
        got, want = (
            block_causal_attention(q[:, :, begin:end], *pair, [length], prefix=begin, return_lse=True, backend=room[0])
            for pair in ((keys, values), (k[:, :, :end].contiguous(), v[:, :, :end].contiguous()))
        )
        for one, other in zip(got, want, strict=True):
            assert torch.equal(one, other)
        begin = end


@rooms
@pytest.mark.parametrize("dtype", [torch.int32, torch.int64])
def test_lengths_in_a_tensor(room, dtype):
    for lengths, prefix in (([1, 4, 9, 16, 40], 0), ([0, 0, 7, 30], 6)):
        keys = sum(lengths) + prefix
        values = tensors(room, 13, 1, 2, 1, keys, keys, 32)
        schedule = torch.tensor([lengths, lengths], dtype=dtype, device=room[1]).T[:, 0]  # strided
        got = check(room, values, lengths, prefix, schedule=schedule)
        for one, other in zip(got, check(room, values, lengths, prefix), strict=True):
            assert torch.equal(one, other)


@every_kernel
def test_lengths_that_do_not_add_up_stay_inside(room):
    """A GPU does not look: the last scale goes on to the end, and nothing outside is read or written."""
    q, k, v, grad, grad_lse = tensors(room, 14, 1, 1, 1, 40, 40, 32)
    want = FORWARD(q, k, v, [10, 30], None, 0, 0.2, room[0])
    atol = 2e-2 if room[2] == torch.bfloat16 else 5e-3
    for lengths in ([10, 2], [10, 300]):
        schedule = torch.tensor(lengths, device=room[1])
        for backend in (room[0], "eager"):
            for one, other in zip(FORWARD(q, k, v, [], schedule, 0, 0.2, backend), want, strict=True):
                torch.testing.assert_close(one, other, rtol=0, atol=atol)
    for lengths in ([-5, 60, -40, 25], [-1, -1], [2**31 - 1, 5]):
        schedule = torch.tensor(lengths, device=room[1])
        out, lse = FORWARD(q, k, v, [], schedule, 0, 0.2, room[0])
        BACKWARD(grad, grad_lse, q, k, v, out, lse, [], schedule, 0, 0.2, room[0])


@rooms
def test_one_output_alone(room):
    *inputs, grad, grad_lse = tensors(room, 15, 1, 2, 2, 30, 30, 32)

    def gradients(pick, *given):
        leaves = [x.clone().requires_grad_() for x in inputs]
        outputs = block_causal_attention(*leaves, [10, 20], return_lse=True, backend=room[0])
        return torch.autograd.grad([outputs[i] for i in pick], leaves, given, allow_unused=True)

    zero, zero_lse = torch.zeros_like(grad), torch.zeros_like(grad_lse)
    for one, other in zip(gradients((0,), grad), gradients((0, 1), grad, zero_lse), strict=True):
        assert torch.equal(one, other)
    for one, other in zip(gradients((1,), grad_lse), gradients((0, 1), zero, grad_lse), strict=True):
        assert torch.equal(one, other)
    out = block_causal_attention(*inputs, [10, 20], backend=room[0])
    assert torch.equal(out, block_causal_attention(*inputs, [10, 20], return_lse=True, backend=room[0])[0])


@rooms
def test_nothing_to_do(room):
    for batch, heads, queries in ((0, 2, 10), (1, 2, 0), (1, 0, 10)):
        values = tensors(room, 16, batch, heads, 2, queries, 10, 32)
        got = everything(
            lambda *args: block_causal_attention(*args, [10], return_lse=True, backend=room[0]), values[:3], *values[3:]
        )
        assert [one.shape for one in got] == [values[i].shape for i in (0, 4, 0, 1, 2)]
        assert not any(one.count_nonzero() for one in got)


@rooms
def test_autocast_changes_nothing(room):
    backend, device, _ = room
    inputs = tensors(room, 17, 1, 1, 1, 30, 30, 32)[:3]
    want = block_causal_attention(*inputs, [10, 20], backend=backend)
    with torch.autocast(device, dtype=torch.bfloat16):
        got = block_causal_attention(*inputs, [10, 20], backend=backend)
    assert torch.equal(got, want)


@triton_rooms
@pytest.mark.parametrize("width", [40, 64])
def test_writes_what_it_should_and_nothing_else(room, width):
    _, device, dtype = room
    q, k, v, grad, grad_lse = tensors(room, 18, 1, 4, 2, 33, 70, width)
    kernels, lengths = _native.kernels("attention"), torch.tensor([5, 30, 35], dtype=torch.int32, device=device)
    where = (lengths, 0, width**-0.5, _native.capability(q))
    (out, out_ok), (lse, lse_ok) = guarded(q.shape, dtype, device), guarded(q.shape[:3], torch.float32, device)
    kernels.attention_forward(q, k, v, *where, out, lse)
    out_ok(), lse_ok()
    delta, *filled = [guarded(x.shape, x.dtype, device) for x in (lse, q, k, v)]
    kernels.attention_backward(grad, q, k, v, out, grad_lse, lse, *where, delta[0], *[buffer for buffer, _ in filled])
    for _, ok in (delta, *filled):
        ok()


@every_kernel
def test_runs_are_bit_equal(room):
    values = tensors(room, 19, 2, 2, 1, 130, 130, 64)
    first, second = (check(room, values, [1, 4, 25, 100]) for _ in range(2))
    for one, other in zip(first, second, strict=True):
        assert torch.equal(one, other)


@triton_rooms
def test_order_of_heads_changes_nothing(room, monkeypatch):
    """Programs find their tile and heads whatever the size of a group is, the last group smaller."""
    values = tensors(room, 20, 5, 2, 1, 70, 70, 32)
    want = check(room, values, [10, 60])
    for size in (1, 3, 4, 10):
        monkeypatch.setattr(_native.kernels("attention"), "_group", lambda rows, _, size=size: min(rows, size))
        for one, other in zip(check(room, values, [10, 60]), want, strict=True):
            assert torch.equal(one, other)


# ---- random schedules ------------------------------------------------------------------------------------------------


@st.composite
def problems(draw, longest=150):
    """(lengths, prefix, queries, width, heads, groups, seed)"""
    lengths = draw(st.lists(st.integers(0, 40), min_size=1, max_size=32).filter(lambda n: sum(n) <= longest))
    prefix = draw(st.integers(0, 40))
    keys = sum(lengths) + prefix
    if not keys:
        lengths, keys = [1], 1
    queries = draw(st.one_of(st.just(keys), st.integers(1, keys)))
    heads = draw(st.sampled_from([(1, 1), (2, 2), (2, 1), (3, 1)]))
    return lengths, prefix, queries, draw(st.sampled_from(range(32, 129, 8))), *heads, draw(st.integers(0, 2**31))


def check_problem(room, problem):
    lengths, prefix, queries, width, heads, groups, seed = problem
    values = tensors(room, seed, 1, heads, groups, queries, sum(lengths) + prefix, width)
    check(room, values, lengths, prefix, drawn=True)


@rooms
@settings(max_examples=100, deadline=None, suppress_health_check=list(HealthCheck))
@given(problem=problems())
def test_random_schedules(room, problem):
    if room[1] == "cuda":
        pytest.skip("has its own sweep")
    check_problem(room, problem)


# ---- the definition --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("grouped", [False, True])
def test_gradcheck_of_the_definition(device, grouped):
    room = ("eager", device, torch.float64)
    q, k, v, _, _ = tensors(room, 21, 1, 2, 1 if grouped else 2, 9, 12, 32)
    inputs = [x.requires_grad_() for x in (q, k, v)]
    for lengths, prefix in (([1, 4, 5], 2), ([12], 0)):
        torch.autograd.gradcheck(
            lambda *args, a=lengths, b=prefix: block_causal_attention(*args, a, prefix=b, return_lse=True), inputs
        )


def test_float64(device):
    room = ("auto", device, torch.float64)
    q, k, v, grad, grad_lse = tensors(room, 22, 2, 4, 2, 60, 80, 40)
    lengths, prefix = [3, 27, 40], 10

    def ours(*args):
        return block_causal_attention(*args, lengths, prefix=prefix, return_lse=True)

    got = everything(ours, (q, k, v), grad, grad_lse)
    want = everything(lambda *args: oracle(*args, lengths, prefix, 40**-0.5), (q, k, v), grad, grad_lse)
    for one, other in zip(got, want, strict=True):
        assert one.dtype == torch.float64
        torch.testing.assert_close(one, other)


# ---- the operator ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("in_tensor", [False, True], ids=["integers", "tensor"])
@pytest.mark.parametrize("backend", ["eager", "triton"])
def test_opcheck(device, backend, in_tensor):
    if backend == "triton" and device == "cpu" and (reason := interpreter_skip()):
        pytest.skip(reason)
    room = (backend, device, torch.float32)
    q, k, v, grad, grad_lse = tensors(room, 23, 1, 2, 1, 9, 12, 32)
    q = q.transpose(1, 2).contiguous().transpose(1, 2)
    lengths = ([], torch.tensor([1, 4, 5], device=device)) if in_tensor else ([1, 4, 5], None)
    leaves = [x.clone(memory_format=torch.preserve_format).requires_grad_() for x in (q, k, v)]
    torch.library.opcheck(FORWARD.overload, (*leaves, *lengths, 2, 0.2, backend))
    out, lse = FORWARD(q, k, v, *lengths, 2, 0.2, backend)
    torch.library.opcheck(BACKWARD.overload, (grad, None, q, k, v, out, lse, *lengths, 2, 0.2, backend))
    torch.library.opcheck(BACKWARD.overload, (grad, grad_lse, q, k, v, out, lse, *lengths, 2, 0.2, backend))


@rooms
@pytest.mark.parametrize("in_tensor", [False, True], ids=["integers", "tensor"])
def test_compiles_whole_with_dynamic_shapes(room, in_tensor, fresh_compiler):
    backend, device, _ = room

    def function(q, k, v, lengths, prefix):
        out, lse = block_causal_attention(q, k, v, lengths, prefix=prefix, return_lse=True, backend=backend)
        return (out.float() * 2).sum() + lse.sum()

    compiled = torch.compile(function, fullgraph=True, dynamic=True, backend="aot_eager")
    for lengths, prefix in (([3, 5, 12], 2), ([4, 9, 20], 3)):
        keys = sum(lengths) + prefix
        inputs = tensors(room, 24, 2, 2, 2, keys, keys, 32)[:3]
        given = torch.tensor(lengths, device=device) if in_tensor else lengths
        results = []
        for run in (function, compiled):
            leaves = [x.clone().requires_grad_() for x in inputs]
            out = run(*leaves, given, prefix)
            results.append((out.detach(), *torch.autograd.grad(out, leaves)))
        torch.testing.assert_close(results[1], results[0])


def zeros(*shape, dtype=torch.float32):
    return torch.zeros(shape, dtype=dtype)


Q, K = zeros(1, 4, 6, 32), zeros(1, 2, 10, 32)
BAD = {
    "q a list": (([1.0], K, K, [10]), {}, TypeError, "q must be a tensor"),
    "q int": ((Q.long(), K, K, [10]), {}, TypeError, "q must be float32"),
    "q 3-D": ((Q[0], K, K, [10]), {}, ValueError, r"q must be \(batch, heads, length, D\)"),
    "k dtype": ((Q, K.half(), K, [10]), {}, TypeError, "k must have the dtype of q"),
    "head size 24": ((zeros(1, 4, 6, 24), zeros(1, 2, 10, 24), zeros(1, 2, 10, 24), [10]), {}, ValueError, "got 24"),
    "head size 36": ((zeros(1, 4, 6, 36), zeros(1, 2, 10, 36), zeros(1, 2, 10, 36), [10]), {}, ValueError, "got 36"),
    "head size 136": ((zeros(1, 4, 6, 136), K, K, [10]), {}, ValueError, "got 136"),
    "batch": ((Q, zeros(2, 2, 10, 32), K, [10]), {}, ValueError, r"k must be \(1, heads, length, 32\)"),
    "v": ((Q, K, K[:, :, :9], [10]), {}, ValueError, "v must have the shape of k"),
    "heads": ((zeros(1, 3, 6, 32), K, K, [10]), {}, ValueError, "multiple of k's 2 heads, got 3"),
    "more queries": ((zeros(1, 4, 11, 32), K, K, [10]), {}, ValueError, "at most the 10 tokens of k, got 11"),
    "sum": ((Q, K, K, [4, 5]), {}, ValueError, r"add up to the 10 tokens of k, got 9 \+ 0"),
    "sum with prefix": ((Q, K, K, [4, 6]), {"prefix": 1}, ValueError, r"got 10 \+ 1"),
    "sum of a tensor": ((Q, K, K, torch.tensor([4, 5])), {}, ValueError, r"got 9 \+ 0"),
    "negative": ((Q, K, K, [-1, 11]), {}, ValueError, r"scale_lengths\[0\] must be at least 0, got -1"),
    "negative in a tensor": ((Q, K, K, torch.tensor([-1, 11])), {}, ValueError, "at least 0, got -1"),
    "no scales": ((Q, K, K, []), {"prefix": 10}, ValueError, "1 to 32 scales, got 0"),
    "33 scales": ((Q, K, K, [0] * 32 + [10]), {}, ValueError, "1 to 32 scales, got 33"),
    "33 scales in a tensor": ((Q, K, K, torch.zeros(33, dtype=torch.int32)), {}, ValueError, "got 33"),
    "2-D tensor": ((Q, K, K, torch.tensor([[10]])), {}, ValueError, r"scale_lengths must be \(S,\)"),
    "float tensor": ((Q, K, K, torch.tensor([10.0])), {}, TypeError, "scale_lengths must be int32, int64"),
    "an integer": ((Q, K, K, 10), {}, TypeError, "a sequence of integers or a tensor, got int"),
    "float length": ((Q, K, K, [10.0]), {}, TypeError, r"scale_lengths\[0\] must be an integer"),
    "prefix -1": ((Q, K, K, [11]), {"prefix": -1}, ValueError, "prefix must be at least 0"),
    "prefix 0.5": ((Q, K, K, [10]), {"prefix": 0.5}, TypeError, "prefix must be an integer"),
    "softmax_scale -1": ((Q, K, K, [10]), {"softmax_scale": -1.0}, ValueError, "softmax_scale must be at least 0"),
    "softmax_scale nan": ((Q, K, K, [10]), {"softmax_scale": math.nan}, ValueError, "softmax_scale must be finite"),
    "backend": ((Q, K, K, [10]), {"backend": "fast"}, ValueError, "got 'fast'"),
}


@pytest.mark.parametrize(("args", "kwargs", "error", "text"), BAD.values(), ids=BAD)
def test_refuses(args, kwargs, error, text):
    with pytest.raises(error, match=text) as raised:
        block_causal_attention(*args, **kwargs)
    assert str(raised.value).startswith("block_causal_attention: ")


def test_what_the_kernels_do_not_take(monkeypatch):
    monkeypatch.setattr(_native, "triton_unfit", lambda tensor: None)
    assert FORWARD.explain(Q, K, K, [10], None, 0, 1.0)["triton"] == "fits"
    wide = Q.double(), K.double(), K.double()
    reason = FORWARD.explain(*wide, [10], None, 0, 1.0)["triton"]
    assert reason == "needs float32, bfloat16 or float16, got float64"
    narrow = (zeros(1, 1, 2, 24),) * 3
    assert "needs a head size" in FORWARD.explain(*narrow, [2], None, 0, 1.0)["triton"]


def test_lengths_are_copied_once():
    _native._kept_integers.clear()
    block_causal_attention(Q, K, K, [4, 6])
    (kept,) = _native._kept_integers.values()
    assert kept.tolist() == [4, 6]
    block_causal_attention(Q, K, K, (4, 6))
    assert [one is kept for one in _native._kept_integers.values()] == [True]


# ---- on a GPU only ---------------------------------------------------------------------------------------------------


def run_cuda(q, k, v, lengths, prefix=0, group=None, tile=family.CHOSEN, counted=True):
    """(out, lse) of the CUDA version by a plan (a tile, heads in groups, tiles counted or not), in guarded buffers."""
    (out, out_ok), (lse, lse_ok) = guarded(q.shape, q.dtype, "cuda"), guarded(q.shape[:3], torch.float32, "cuda")
    schedule = torch.tensor(lengths, dtype=torch.int32, device="cuda")
    rows = q.shape[0] * q.shape[1]
    taken = torch.full((1,), 77, dtype=torch.int32, device="cuda")
    family._attention_cuda(
        q, k, v, schedule, out, lse, taken if counted else None, prefix, q.shape[3] ** -0.5, group or rows, tile
    )
    out_ok(), lse_ok()
    return out, lse


def check_cuda(room, values, lengths, prefix=0, **where):
    q, k, v = values[:3]
    exact = oracle(q.double(), k.double(), v.double(), lengths, prefix, q.shape[3] ** -0.5)
    eager = block_causal_attention(q, k, v, lengths, prefix=prefix, return_lse=True, backend="eager")
    for triple in zip(run_cuda(q, k, v, lengths, prefix, **where), eager, exact, strict=True):
        assert_as_good_as_eager(*triple)


@pytest.mark.gpu
@gpu_cuda
@pytest.mark.parametrize(
    ("width", "tile"), [(64, 0), (64, 1), (64, 3), (64, 4), (96, 2), (128, 2), (40, 0), (32, 1), (72, 2), (104, 2)]
)
def test_one_product_of_the_matrix_units(room, width, tile):
    """Every element of queries, keys and values has one place where it counts, so a wrong layout cannot hide.

    With one-hot queries the scores are elements of the keys; with scores of 0 and one value at a time that is not 0
    the output is its share.
    """
    _, device, dtype = room
    length = 200
    k = torch.randn(1, 1, length, width, generator=torch.Generator().manual_seed(31)).to(device, dtype)
    v = torch.randn(1, 1, length, width, generator=torch.Generator().manual_seed(32)).to(device, dtype)
    hot = torch.eye(width, device=device, dtype=dtype).repeat(-(-length // width), 1)[None, None, :length] * 8
    check_cuda(room, (hot.contiguous(), k, v), [length], tile=tile)
    for token in (0, 1, 7, 8, 15, 16, 63, 64, 111, 112, 127, 128, 143, 144, length - 1):
        one = torch.zeros_like(v)
        one[:, :, token] = v[:, :, token]
        out, _ = run_cuda(torch.zeros_like(k), k, one, [length], tile=tile)
        want = (v[:, :, token].double() / length)[:, :, None].expand_as(out)
        torch.testing.assert_close(out.double(), want, rtol=1e-2, atol=1e-6, msg=f"token {token}")


@pytest.mark.gpu
@gpu_cuda
@pytest.mark.parametrize("tile", [0, 1, 3, 4])
def test_every_tile(room, tile):
    """One row more or less than so many tiles, and groups of heads of every size."""
    for length in (1, 63, 64, 65, 111, 112, 113, 127, 129, 143, 144, 145, 191, 192, 193, 385, 680):
        lengths = [length // 3, length - length // 3]
        check_cuda(room, tensors(room, length, 2, 3, 3, length, length, 64), lengths, tile=tile)
    values = tensors(room, 33, 5, 4, 2, 300, 680, 64)
    want = run_cuda(*values[:3], VAR_256, tile=tile)
    for group in (1, 3, 19, 20):
        for one, other in zip(run_cuda(*values[:3], VAR_256, group=group, tile=tile), want, strict=True):
            assert torch.equal(one, other)


@pytest.mark.gpu
@gpu_cuda
@pytest.mark.parametrize(("width", "tile"), [(64, 0), (64, 1), (64, 3), (64, 4), (96, 2), (128, 2)])
def test_blocks_take_many_tiles(room, width, tile):
    """By a counter who has which tile differs from launch to launch, and nothing else does."""
    lengths = [5, 35, 60, 100]
    q, k, v = tensors(room, 34, 16, 40, 20, 200, 200, width)[:3]
    check_cuda(room, (q, k, v), lengths, tile=tile)
    want = run_cuda(q, k, v, lengths, tile=tile, counted=False)
    for one, other in zip(run_cuda(q[:1], k[:1], v[:1], lengths, tile=tile), want, strict=True):
        assert torch.equal(one, other[:1])
    for group in (None, 7, 16, *[None] * 50):
        for one, other in zip(run_cuda(q, k, v, lengths, group=group, tile=tile), want, strict=True):
            assert torch.equal(one, other)


def gradients_cuda(values, lengths, prefix=0, groups=(None, None), tile=family.CHOSEN):
    """Gradients of the CUDA version by a tile, heads in groups of that many, in guarded buffers, from its own out, lse.

    (Eager's lse is of scores rounded to half precision; weights that do not add up to one would come of it.)
    """
    q, k, v, grad, grad_lse = values
    out, lse = block_causal_attention(q, k, v, lengths, prefix=prefix, return_lse=True, backend="cuda")
    batch, heads, queries, width = q.shape
    needed = batch * heads * 2 * (queries + 127)
    workspace = torch.full((needed + 64,), torch.nan, device="cuda")
    filled = [guarded(x.shape, x.dtype, "cuda") for x in (q, k, v)]
    schedule = torch.tensor(lengths, dtype=torch.int32, device="cuda")
    family._attention_backward_cuda(
        grad, grad_lse, q, k, v, out, lse, schedule, workspace[:needed], *[buffer for buffer, _ in filled],
        prefix, width**-0.5, groups[0] or batch * heads, groups[1] or batch * k.shape[1], tile,
    )  # fmt: skip
    assert workspace[needed:].isnan().all(), "wrote behind the workspace"
    for _, ok in filled:
        ok()
    return [buffer for buffer, _ in filled]


def check_gradients_cuda(room, values, lengths, prefix=0, **where):
    *inputs, grad, grad_lse = values

    def eager(*args):
        return block_causal_attention(*args, lengths, prefix=prefix, return_lse=True, backend="eager")

    wide = [x.double() for x in inputs]
    exact = everything(
        lambda *args: oracle(*args, lengths, prefix, inputs[0].shape[3] ** -0.5), wide, grad.double(), grad_lse
    )
    peer = everything(eager, inputs, grad, grad_lse)
    for name, *triple in zip(
        NAMES[2:], gradients_cuda(values, lengths, prefix, **where), peer[2:], exact[2:], strict=True
    ):
        try:
            assert_as_good_as_eager(*triple)
        except AssertionError as error:
            raise AssertionError(f"{name}, D {inputs[0].shape[3]}, {lengths}: {error}") from error


@pytest.mark.gpu
@gpu_cuda
@pytest.mark.parametrize(("width", "tile"), [(64, 0), (64, 1), (96, 0), (128, 0), (32, 0), (32, 1), (72, 0), (104, 0)])
def test_gradients_of_every_tile(room, width, tile):
    """One row more or less than so many tiles of rows held (64, 128, 192) and passed by (64, 80, 96)."""
    for length in (1, 47, 63, 64, 65, 79, 80, 81, 95, 96, 97, 127, 128, 129, 160, 191, 192, 193, 257, 385):
        lengths = [length // 3, length - length // 3]
        check_gradients_cuda(room, tensors(room, length, 2, 2, 2, length, length, width), lengths, tile=tile)
    values = tensors(room, 33, 5, 4, 2, 300, 680, width)
    want = gradients_cuda(values, VAR_256, tile=tile)
    for groups in ((1, 1), (3, 2), (19, 9), (20, 3)):
        for one, other in zip(gradients_cuda(values, VAR_256, groups=groups, tile=tile), want, strict=True):
            assert torch.equal(one, other)


@pytest.mark.gpu
@gpu_cuda
@pytest.mark.parametrize("key_heads", [20, 40])
@pytest.mark.parametrize(("width", "tile"), [(64, 0), (64, 1), (96, 0), (128, 0)])
def test_gradients_where_blocks_take_many_tiles(room, width, tile, key_heads):
    """Blocks take tiles as they become free; who has which differs from launch to launch, and nothing else does."""
    lengths = [5, 35, 60, 100]
    values = tensors(room, 35, 8, 40, key_heads, 200, 200, width)
    check_gradients_cuda(room, values, lengths, tile=tile)
    want = gradients_cuda(values, lengths, tile=tile)
    for _ in range(50):
        for one, other in zip(gradients_cuda(values, lengths, tile=tile), want, strict=True):
            assert torch.equal(one, other)


@pytest.mark.gpu
@gpu_cuda
@pytest.mark.parametrize("queries", [680, 256, 37])
@pytest.mark.parametrize("width", [64, 40])
def test_tiles_of_one_warpgroup_change_no_bit(room, width, queries):
    """Few heads are cut in smaller tiles than many, and a picture comes out the same in any batch."""
    values = tensors(room, 36, 12, 16, 8, queries, 680, width)
    q, k, v = values[:3]
    tile = 1 if queries <= 256 else 0
    want = run_cuda(q, k, v, VAR_256, tile=tile)
    gradients = gradients_cuda(values, VAR_256, tile=0)
    for same in (tile + 3, family.CHOSEN):
        for one, other in zip(run_cuda(q, k, v, VAR_256, tile=same), want, strict=True):
            assert torch.equal(one, other)
    for same in (1, family.CHOSEN):
        for one, other in zip(gradients_cuda(values, VAR_256, tile=same), gradients, strict=True):
            assert torch.equal(one, other)
    for batch in (1, 2, 4, 5, 6):  # from one tile a block on to where the larger ones are chosen
        part = [x[:batch] for x in values]
        for one, other in zip(run_cuda(*part[:3], VAR_256), want, strict=True):
            assert torch.equal(one, other[:batch])
        for one, other in zip(gradients_cuda(part, VAR_256), gradients, strict=True):
            assert torch.equal(one, other[:batch])


@pytest.mark.gpu
@gpu_cuda
def test_tiles_that_there_are_not_are_refused(room):
    q, k, v, grad, grad_lse = tensors(room, 37, 1, 2, 2, 70, 70, 128)
    for tile in (0, 1, 3, 4, 9):
        with pytest.raises(RuntimeError, match="not supported"):
            run_cuda(q, k, v, [70], tile=tile)
    with pytest.raises(RuntimeError, match="not supported"):
        gradients_cuda((q, k, v, grad, grad_lse), [70], tile=1)


@pytest.mark.gpu
@gpu_kernels
def test_sweep_of_schedules(room):
    """Longer ones than an interpreter can, 200 a dtype."""
    generator = random.Random(25)
    for seed in range(200):
        lengths = [generator.randrange(1 << generator.randrange(1, 9)) for _ in range(generator.randrange(1, 33))]
        prefix = generator.choice((0, 0, generator.randrange(300)))
        keys = sum(lengths) + prefix
        if not keys:
            lengths, keys = [1], 1
        queries = generator.choice((keys, keys, generator.randrange(1, keys + 1)))
        heads = generator.choice(((1, 1), (4, 2), (6, 1)))
        width = generator.choice((64, 64, 96, 128, *range(32, 129, 8)))
        check(room, tensors(room, seed, 2, *heads, queries, keys, width), lengths, prefix)


@pytest.mark.gpu
@gpu_kernels
@pytest.mark.parametrize("width", [64, 96, 128])
def test_two_thousand_launches_are_equal(room, width):
    q, k, v, grad, grad_lse = tensors(room, 26, 4, 4, 2, 680, 680, width)

    def run():
        out, lse = FORWARD(q, k, v, VAR_256, None, 0, 0.125, room[0])
        return out, lse, *BACKWARD(grad, grad_lse, q, k, v, out, lse, VAR_256, None, 0, 0.125, room[0])

    first = run()
    differ = torch.zeros((), dtype=torch.int64, device=room[1])
    for _ in range(2000):
        for got, want in zip(run(), first, strict=True):
            differ += (got != want).any()
    assert differ.item() == 0


@pytest.mark.gpu
@gpu_kernels
def test_cuda_graph_with_a_schedule_that_changes(room):
    *inputs, grad, grad_lse = tensors(room, 27, 2, 2, 2, 680, 680, 64)
    schedule = torch.tensor(VAR_256, device=room[1])

    def run(lengths):
        out, lse = FORWARD(*inputs, *lengths, 0, 0.125, room[0])
        return out, lse, *BACKWARD(grad, grad_lse, *inputs, out, lse, *lengths, 0, 0.125, room[0])

    run(([], schedule))
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = run(([], schedule))
    for lengths in (VAR_256, [680], [1] * 9 + [671], [0, 5, 0, 100, 0, 200, 0, 0, 300, 75]):
        schedule.copy_(torch.tensor(lengths))
        graph.replay()
        for got, want in zip(captured, run((lengths, None)), strict=True):
            assert torch.equal(got, want)


@pytest.mark.gpu
@gpu_kernels
def test_cuda_graph_with_integers(room):
    """Also those that no call had before."""
    inputs = tensors(room, 28, 1, 2, 2, 100, 100, 64)[:3]
    run = functools.partial(block_causal_attention, *inputs, backend=room[0])
    run([100])
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = run([100]), run([17, 28, 55])
    graph.replay()
    for got, lengths in zip(captured, ([100], [17, 28, 55]), strict=True):
        assert torch.equal(got, run(lengths))


@pytest.mark.gpu
@gpu_kernels
@pytest.mark.parametrize("in_tensor", [False, True], ids=["integers", "tensor"])
def test_no_host_sync(room, in_tensor):
    *inputs, grad, _ = tensors(room, 29, 1, 2, 2, 100, 100, 64)
    leaves = [x.requires_grad_() for x in inputs]
    lengths = torch.tensor([20, 80], device=room[1]) if in_tensor else [20, 80]

    def run():
        out = block_causal_attention(*leaves, lengths, backend=room[0])
        torch.autograd.grad(out, leaves, grad)

    run()
    torch.cuda.set_sync_debug_mode("error")
    try:
        run()
    finally:
        torch.cuda.set_sync_debug_mode("default")


FRESH = """
import threading, torch
from unifiedar.ops import block_causal_attention

leaves = [torch.randn(1, 2, 100, 64, device="cuda", dtype={dtype}, requires_grad=True) for _ in range(3)]
run = lambda: block_causal_attention(*leaves, [40, 60], backend="cuda")
out = run()
if {forward}:
    thread = threading.Thread(target=lambda: found.append(run()))
    found = []
    thread.start()
    thread.join()
    assert torch.equal(found[0], out)
else:
    assert all(x.isfinite().all() for x in torch.autograd.grad(out, leaves, out.detach()))
"""


@pytest.mark.gpu
@gpu_cuda
@pytest.mark.parametrize("forward", [True, False], ids=["forward", "gradients"])
def test_first_work_of_a_thread(room, forward):
    """A thread that has launched nothing yet has no context, which the driver wants where tensors are described."""
    script = FRESH.format(dtype=room[2], forward=forward)
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, timeout=300, check=False)
    assert done.returncode == 0, done.stderr


@pytest.mark.gpu
@gpu_kernels
def test_current_stream(room):
    inputs = tensors(room, 30, 2, 2, 2, 680, 680, 64)[:3]
    want = block_causal_attention(*inputs, VAR_256, backend=room[0])
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        torch.cuda._sleep(20_000_000)
        late = [x * 1 for x in inputs]
        got = block_causal_attention(*late, VAR_256, backend=room[0])
    stream.synchronize()
    assert torch.equal(got, want)


@pytest.mark.gpu
@gpu_kernels
@pytest.mark.parametrize(
    ("lengths", "heads", "width"),
    [(VAR_256, 16, 64), (VAR_512, 4, 64), (INFINITY[:7], 4, 96), (INFINITY, 1, 128)],
    ids=["VAR-256", "VAR-512", "Infinity 0.06M", "Infinity"],
)
def test_published_sizes(room, lengths, heads, width):
    keys = sum(lengths)
    check(room, tensors(room, 31, 1, heads, heads, keys, keys, width), lengths)
