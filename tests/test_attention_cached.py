"""`ops.cached_attention`: attention of a scale over a cache, against the two operators that it stands for."""

import math

import pytest
import torch
from helpers import assert_as_good_as_eager, interpreter_skip

from unifiedar.ops import attention_cached, block_causal_attention, cached_attention, qk_norm_rope, registry

OP = registry["cached_attention"]

ROOMS = [
    pytest.param("triton", "cpu", torch.float32, id="triton-cpu-float32"),
    pytest.param("triton", "cpu", torch.float16, id="triton-cpu-float16"),
    *(
        pytest.param(
            "triton", "cuda", dtype, id=f"triton-cuda-{str(dtype).removeprefix('torch.')}", marks=pytest.mark.gpu
        )
        for dtype in (torch.float32, torch.float16, torch.bfloat16)
    ),
]

# Batch, heads, key heads, tokens in the cache, new ones, head size: nothing before, one token, tiles that do not fit,
# several tiles of queries, of which each keeps a part of the new keys.
SHAPES = [
    (1, 2, 2, 0, 1, 32),
    (2, 2, 2, 1, 4, 64),
    (1, 4, 2, 70, 100, 64),
    (2, 1, 1, 64, 64, 40),
    (1, 3, 1, 33, 169, 96),
]


def made(shape, dtype, device, seed=0):
    """q, k and v as a projection's views, a cache that is poisoned where nothing is, and gains."""
    batch, heads, groups, begin, length, width = shape
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(batch, length, heads + 2 * groups, width, generator=generator).to(device, dtype)
    q, k, v = (one.transpose(1, 2) for one in x.split((heads, groups, groups), 2))
    cache = torch.full((2, batch, groups, begin + length + 3, width), torch.nan, dtype=dtype, device=device)
    old = torch.randn(2, batch, groups, begin, width, generator=generator)
    old[0] /= old[0].norm(dim=-1, keepdim=True)
    cache[:, :, :, :begin] = old.to(device)
    return q, k, v, cache, torch.rand(heads, generator=generator).to(device)


def in_two(q, k, v, cache, begin, norm, gain, softmax_scale, backend="eager"):
    end = begin + q.shape[2]
    q, k, v = qk_norm_rope(q, k, v, norm=norm, gain=gain, out=(torch.empty_like(q), *cache[:, :, :, begin:end]))
    return block_causal_attention(
        q, *cache[:, :, :, :end], [q.shape[2]], prefix=begin, softmax_scale=softmax_scale, backend=backend
    )


@pytest.mark.parametrize(("backend", "device", "dtype"), ROOMS)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("norm", ["l2", None])
def test_as_the_two_operators(backend, device, dtype, shape, norm):
    if device == "cpu" and (reason := interpreter_skip()):
        pytest.skip(reason)
    begin, width = shape[3], shape[5]
    *heads, cache, gain = made(shape, dtype, device)
    gain = gain if norm else None
    scale = 1.0 if norm else width**-0.5
    caches = [cache.clone() for _ in range(2)]
    got = cached_attention(*heads, caches[0], begin, norm=norm, gain=gain, backend=backend)
    want = in_two(*heads, caches[1], begin, norm, gain, scale)
    exact = in_two(*(one.double() for one in heads), cache.double(), begin, norm, gain, scale)
    assert_as_good_as_eager(got, want, exact)
    assert got.stride() == want.stride()
    # Kept is what the two keep; an ulp apart where a device's square root is another.
    torch.testing.assert_close(*caches, rtol=2 * torch.finfo(dtype).eps, atol=0, equal_nan=True)
    assert torch.equal(caches[0].isnan(), caches[1].isnan())
    assert torch.equal(caches[0][1].nan_to_num(), caches[1][1].nan_to_num())


def test_the_definition_is_the_two_operators():
    for norm in ("l2", None):
        q, k, v, cache, gain = made((2, 4, 2, 5, 6, 32), torch.float32, "cpu")
        other, scale = cache.clone(), 0.7
        gain = gain if norm else None
        got = cached_attention(q, k, v, cache, 5, norm=norm, gain=gain, softmax_scale=scale, backend="eager")
        assert torch.equal(got, in_two(q, k, v, other, 5, norm, gain, scale))
        assert torch.equal(cache.nan_to_num(), other.nan_to_num())
        again = cached_attention(q, k, v, other, 5, norm=norm, gain=gain, softmax_scale=scale)
        assert torch.equal(got, again)


def test_a_row_does_not_depend_on_others(monkeypatch):
    if reason := interpreter_skip():
        pytest.skip(reason)
    q, k, v, cache, gain = made((2, 2, 2, 9, 16, 32), torch.float32, "cpu")
    one = cache[:, 1:].clone()
    both = cached_attention(q, k, v, cache, 9, gain=gain, backend="triton")
    alone = cached_attention(q[1:], k[1:], v[1:], one, 9, gain=gain, backend="triton")
    assert torch.equal(both[1:], alone)


def test_what_auto_takes(monkeypatch):
    """The kernel for one tile of queries, or few; two operators for more, and wherever there is no kernel."""
    if reason := interpreter_skip():
        pytest.skip(reason)
    heads = [torch.randn(1, 2, 65, 32) for _ in range(3)]
    one_tile = [x[:, :, 1:] for x in heads]
    cache = torch.zeros(2, 1, 2, 65, 32)
    taken = []
    monkeypatch.setattr(attention_cached, "_cached_attention", lambda *args: taken.append(args))
    monkeypatch.setattr(attention_cached._cached_attention, "choose", OP.choose, raising=False)
    cached_attention(*heads, cache, 0)
    assert not taken
    monkeypatch.setenv("UNIFIEDAR_BACKEND", "triton")
    cached_attention(*heads, cache, 0)
    assert len(taken) == 1
    monkeypatch.delenv("UNIFIEDAR_BACKEND")
    fast = OP.backends[0]
    monkeypatch.setattr(attention_cached._cached_attention, "choose", lambda *args: fast, raising=False)
    cached_attention(*heads, cache, 0)
    assert len(taken) == 2
    monkeypatch.setattr(attention_cached, "FEW_PROGRAMS", 3)  # two heads of two tiles are four
    cached_attention(*heads, cache, 0)
    assert len(taken) == 2
    cached_attention(*one_tile, cache, 0)
    assert len(taken) == 3


Q = torch.zeros(1, 4, 3, 32)
K = Q[:, :2]
CACHE = torch.zeros(2, 1, 2, 8, 32)
BAD = {
    "norm": (lambda: cached_attention(Q, K, K, CACHE, 0, norm="rms"), ValueError, "norm must be 'l2' or None"),
    "width": (lambda: cached_attention(*(Q[..., :24],) * 3, CACHE, 0), ValueError, "q must have a head size"),
    "heads": (lambda: cached_attention(Q[:, :3], K, K, CACHE, 0), ValueError, "multiple of the 2 heads"),
    "no token": (lambda: cached_attention(*(Q[:, :, :0],) * 3, CACHE, 0), ValueError, "at least one token"),
    "values": (lambda: cached_attention(Q, K, Q, CACHE, 0), ValueError, "v must have the shape of k"),
    "begin": (lambda: cached_attention(Q, K, K, CACHE, -1), ValueError, "begin must be at least 0"),
    "cache dtype": (lambda: cached_attention(Q, K, K, CACHE.half(), 0), TypeError, "cache must be float32"),
    "cache shape": (lambda: cached_attention(Q, K, K, CACHE[:, :, :1], 0), ValueError, "cache must be"),
    "cache room": (lambda: cached_attention(Q, K, K, CACHE, 6), ValueError, "room for 6 \\+ 3 tokens"),
    "gain": (lambda: cached_attention(Q, K, K, CACHE, 0, gain=torch.zeros(2)), ValueError, "gain must be"),
    "gain alone": (
        lambda: cached_attention(Q, K, K, CACHE, 0, norm=None, gain=torch.zeros(4)),
        ValueError,
        "gain must",
    ),
    "scale": (lambda: cached_attention(Q, K, K, CACHE, 0, softmax_scale=math.nan), ValueError, "softmax_scale"),
    "gradient": (lambda: cached_attention(Q.clone().requires_grad_(), K, K, CACHE, 0), ValueError, "no_grad"),
    "backend": (lambda: cached_attention(Q, K, K, CACHE, 0, backend="cuda"), ValueError, "backend must be one"),
}


@pytest.mark.parametrize("case", BAD.values(), ids=BAD)
def test_bad_input(case):
    function, error, words = case
    with pytest.raises(error, match=words):
        function()


def test_what_the_kernel_does_not_take(monkeypatch):
    monkeypatch.setattr(attention_cached._native, "triton_unfit", lambda tensor: None)
    assert OP.explain(Q, K, K, CACHE, 0, "l2", None, 1.0)["triton"] == "fits"
    turned = torch.zeros(2, 1, 2, 32, 8).mT
    assert "aligned to 16 bytes" in OP.explain(Q, K, K, turned, 0, "l2", None, 1.0)["triton"]
    doubled = [one.double() for one in (Q, K, K, CACHE)]
    assert "got float64" in OP.explain(*doubled, 0, "l2", None, 1.0)["triton"]


# ---- on a GPU only ---------------------------------------------------------------------------------------------------


@pytest.mark.gpu
@pytest.mark.parametrize(("begin", "length"), [(0, 1), (91, 64), (255, 169), (424, 256)])
def test_races_and_graphs(begin, length):
    q, k, v, cache, gain = made((2, 16, 16, begin, length, 64), torch.float16, "cuda")

    def run():
        return cached_attention(q, k, v, cache, begin, gain=gain, backend="triton")

    first = run().clone()
    kept = cache.nan_to_num()
    for _ in range(2000):
        assert torch.equal(run(), first)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        got = run()
    cache[:, :, :, begin:] = torch.nan
    graph.replay()
    assert torch.equal(got, first)
    assert torch.equal(cache.nan_to_num(), kept)
