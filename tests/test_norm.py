"""`qk_norm_rope`: every backend against a float64 oracle, forward and every gradient."""

import math

import pytest
import torch
from helpers import assert_as_good_as_eager, guarded, interpreter_skip, kernel_rooms

from unifiedar.ops import _native, packed_norm_rope, qk_norm_rope, registry

FORWARD, BACKWARD, INTO = (registry[f"qk_norm_rope{end}"] for end in ("", "_backward", "_out"))


def chosen(accept):
    return pytest.mark.parametrize("room", [case for case in kernel_rooms() if accept(*case.values[0])], indirect=True)


rooms = chosen(lambda backend, device, dtype: backend != "cuda")
triton_rooms = chosen(lambda backend, device, dtype: backend == "triton")
gpu_triton = chosen(lambda backend, device, dtype: backend == "triton" and device == "cuda")


def table(length, width, device="cpu"):
    """Angles without a pattern."""
    angle = torch.randn(length, width // 2, generator=torch.Generator().manual_seed(99)) * 3
    return torch.stack((angle.cos(), angle.sin())).to(device)


def arguments(room, batch, heads, groups, length, width, norm="l2", scaled=True, turned=True, seed=0):
    """q, k and the settings: float32 parameters, as they are under autocast."""
    _, device, dtype = room
    generator = torch.Generator().manual_seed(seed)

    def normal(*shape):
        return torch.randn(shape, generator=generator)

    q, k = normal(batch, heads, length, width) * 2, normal(batch, groups, length, width)
    settings = {"norm": norm}
    if scaled and norm == "l2":
        settings["gain"] = (normal(heads) * 0.5 + math.log(4)).to(device)
    if scaled and norm == "rms":
        settings["weights"] = tuple((1 + normal(width) / 3).to(device) for _ in "qk")
    if turned:
        settings["rope"] = table(length, width, device)
    return q.to(device, dtype), k.to(device, dtype), settings


def oracle(q, k, norm, gain=None, weights=(None, None), rope=None, eps=None):
    """In other words: roots of sums, and complex numbers."""
    found = []
    for x, weight in ((q, weights[0]), (k, weights[1])):
        if norm == "l2":
            root = x.pow(2).sum(-1, keepdim=True).sqrt()
            x = x / torch.where(root > (1e-12 if eps is None else eps), root, 1e-12 if eps is None else eps)
            if x.shape == q.shape and not found and gain is not None:
                x = torch.where(gain > math.log(100), 100.0, gain.exp())[None, :, None, None] * x
        elif norm == "rms":
            x = x / (x.pow(2).sum(-1, keepdim=True) / x.shape[-1] + (1e-6 if eps is None else eps)).sqrt()
            x = x if weight is None else x * weight
        if rope is not None:
            number = torch.view_as_complex(x.unflatten(-1, (-1, 2)).contiguous())
            x = torch.view_as_real(number * torch.complex(*rope)).flatten(-2)
        found.append(x)
    return tuple(found)


def everything(function, q, k, settings, grads):
    """Outputs, and the gradients of q, k and the parameters."""
    q, k = (x.detach().requires_grad_() for x in (q, k))
    settings, leaves = dict(settings), [q, k]
    if settings.get("gain") is not None:
        settings["gain"] = settings["gain"].detach().requires_grad_()
        leaves.append(settings["gain"])
    if settings.get("weights") is not None:
        settings["weights"] = tuple(weight.detach().requires_grad_() for weight in settings["weights"])
        leaves += settings["weights"]
    out = function(q, k, **settings)
    return *out, *torch.autograd.grad(out, leaves, [grad.to(out[0].dtype) for grad in grads])


def widened(settings):
    def wide(value):
        if isinstance(value, tuple):
            return tuple(map(wide, value))
        return value.double() if isinstance(value, torch.Tensor) else value

    return {name: wide(value) for name, value in settings.items()}


def check(room, q, k, settings):
    """Holds a backend against the oracle by the tolerance rule; returns what it computed."""
    generator = torch.Generator().manual_seed(7)
    grads = [torch.randn(x.shape, generator=generator).to(x) for x in (q, k)]
    exact = everything(oracle, q.double(), k.double(), widened(settings), grads)

    def ours(backend):
        return lambda q, k, **settings: qk_norm_rope(q, k, **settings, backend=backend)

    got, eager = (everything(ours(backend), q, k, settings, grads) for backend in (room[0], "eager"))
    names = ("q", "k", "grad q", "grad k", "grad of the first parameter", "of the second")
    for i, (name, *triple) in enumerate(zip(names, got, eager, exact, strict=False)):
        # A parameter's gradient is a few sums of many terms: eager's largest error among so few may be small by luck,
        # so what rounding n terms of this size comes to is allowed too.
        spread = 2**-23 * math.sqrt(q.numel()) * exact[0].abs().max().item() if i >= 4 and q.numel() else 0.0
        try:
            if i < 4 or (triple[0].double() - triple[2]).abs().max().item() > spread:
                assert_as_good_as_eager(*triple)
        except AssertionError as error:
            raise AssertionError(f"{name}: {error}") from error
    return got


# ---- every backend ---------------------------------------------------------------------------------------------------


@rooms
@pytest.mark.parametrize("turned", [False, True], ids=["flat", "turned"])
@pytest.mark.parametrize("scaled", [False, True], ids=["plain", "scaled"])
@pytest.mark.parametrize("norm", ["l2", "rms", None])
def test_every_norm(room, norm, scaled, turned):
    q, k, settings = arguments(room, 2, 3, 3, 35, 64, norm, scaled, turned)
    check(room, q, k, settings)


@rooms
@pytest.mark.parametrize("width", [8, 24, 40, 96, 104, 128, 136])
def test_every_head_size(room, width):
    for norm in ("l2", "rms"):
        check(room, *arguments(room, 1, 2, 1, 33, width, norm))


@rooms
@pytest.mark.parametrize("length", [1, 2, 31, 32, 33, 64, 65, 131])
def test_every_length(room, length):
    check(room, *arguments(room, 1, 2, 2, length, 64))


@rooms
@pytest.mark.parametrize("heads", [(4, 2), (6, 1), (1, 3)], ids=str)
def test_heads_of_queries_and_keys_may_differ(room, heads):
    check(room, *arguments(room, 2, *heads, 20, 32))
    check(room, *arguments(room, 2, *heads, 20, 32, "rms"))


@rooms
def test_the_gain_is_cut(room):
    """At the limit it counts and learns, beyond it is 100 and learns nothing."""
    q, k, settings = arguments(room, 1, 6, 1, 40, 32)
    limit = math.log(100)
    gains = torch.tensor([-30.0, 0.0, limit - 1e-3, limit, limit + 1e-3, 50.0]).to(q.device)
    settings["gain"] = gains
    got = check(room, q, k, settings)
    assert (got[4][4:] == 0).all()
    assert (got[4][1:4] != 0).all()
    row = got[0].double().norm(dim=-1)[0, -1]
    torch.testing.assert_close(row, torch.full_like(row, 100), rtol=2e-3 if q.dtype != torch.float32 else 1e-5, atol=0)


@chosen(lambda backend, device, dtype: backend != "cuda" and (device == "cuda" or backend == "eager"))
def test_a_gain_in_bfloat16_is_cut_at_the_limit_as_rounded(room):
    """4.59375, as a model in bfloat16 has it."""
    q, k, settings = arguments(room, 1, 2, 1, 10, 32, turned=False)
    settings["gain"] = torch.tensor([4.59375, 9.0], dtype=torch.bfloat16, device=q.device)
    got = everything(lambda *args, **kw: qk_norm_rope(*args, **kw, backend=room[0]), q, k, settings, (q, k))
    norms = got[0].double().norm(dim=-1)
    torch.testing.assert_close(norms, torch.full_like(norms, math.exp(4.59375)), rtol=5e-3, atol=0)
    assert got[4].dtype == torch.bfloat16
    assert got[4][0] != 0
    assert got[4][1] == 0


@rooms
@pytest.mark.parametrize("eps", [1e-3, 5.0])
def test_rows_shorter_than_eps(room, eps):
    for norm in ("l2", "rms"):
        q, k, settings = arguments(room, 1, 2, 2, 20, 32, norm)
        q, k = q.clone(), k.clone()
        k[:, :, ::2] *= 0.1
        check(room, q, k, {**settings, "eps": eps})


@rooms
def test_rows_of_zeros(room):
    """They stay zeros, and their gradient is the incoming one over eps."""
    q, k, _ = arguments(room, 1, 1, 1, 5, 32)
    q = torch.zeros_like(q)
    got = everything(lambda *args, **kw: qk_norm_rope(*args, **kw, backend=room[0]), q, k, {"eps": 0.5}, (k, k))
    assert not got[0].any()
    torch.testing.assert_close(got[2], 2 * k)


@rooms
def test_strides(room):
    """Out of a fused projection and transposed: read in place, and laid out like q."""
    _, device, dtype = room
    fused = torch.randn(2, 37, 3, 3, 40, generator=torch.Generator().manual_seed(1)).to(device, dtype)
    q, k, _ = fused.permute(2, 0, 3, 1, 4).unbind()
    settings = arguments(room, 2, 3, 3, 37, 40)[2]
    wide = torch.cat((table(5, 40), settings["rope"].cpu(), table(3, 40)), 1).to(device)
    settings["rope"] = wide[:, 5:42]
    got = check(room, q, k, settings)
    plain = check(room, q.contiguous(), k.contiguous(), {**settings, "rope": wide[:, 5:42].contiguous()})
    for one, other in zip(got[:4], plain[:4], strict=True):
        torch.testing.assert_close(one, other, rtol=0, atol=0 if room[0] == "triton" else 1e-2)
    assert got[0].transpose(1, 2).is_contiguous(), "as q's memory is ordered: B, L, H, D"
    assert got[2].transpose(1, 2).is_contiguous()
    odd = torch.randn(2, 3, 40, 37, generator=torch.Generator().manual_seed(2)).to(device, dtype).mT
    check(room, odd, odd[:, :1], settings)
    apart = torch.randn(2, 3, 37, 43, generator=torch.Generator().manual_seed(3)).to(device, dtype)[..., 2:42]
    check(room, apart, k, settings)
    check(room, q[:1].expand(2, -1, -1, -1), k, settings)


@rooms
def test_into_a_cache(room):
    """Keys and values go to their place in a preallocated cache, whose rest stays as it is."""
    backend, device, dtype = room
    fused = torch.randn(2, 9, 3, 2, 64, generator=torch.Generator().manual_seed(4)).to(device, dtype)
    q, k, v = fused.permute(2, 0, 3, 1, 4).unbind()
    settings = arguments(room, 2, 2, 2, 9, 64)[2]
    want = qk_norm_rope(q, k, **settings, backend=backend)
    cache = torch.full((2, 2, 2, 30, 64), -7.0, dtype=dtype, device=device)
    place = cache[:, :, :, 11:20]
    new_q = torch.empty_like(q)
    got = qk_norm_rope(q, k, v, **settings, out=(new_q, *place), backend=backend)
    assert [one.data_ptr() for one in got] == [new_q.data_ptr(), place[0].data_ptr(), place[1].data_ptr()]
    for one, other in zip((new_q, *place), (*want, v), strict=True):
        assert torch.equal(one, other)
    assert (cache[:, :, :, :11] == -7).all()
    assert (cache[:, :, :, 20:] == -7).all()
    assert qk_norm_rope(q, k, **settings, out=[q, k], backend=backend)[0] is q
    for one, other in zip((q, k), want, strict=True):  # in place
        assert torch.equal(one, other)


@rooms
def test_one_gradient_alone(room):
    q, k, settings = arguments(room, 1, 2, 2, 12, 32)
    for norm in ("l2", "rms"):
        q, k, settings = arguments(room, 1, 2, 2, 12, 32, norm)
        parameters = [settings["gain"]] if norm == "l2" else list(settings["weights"])
        leaves = [x.requires_grad_() for x in (q, k, *parameters)]
        out = qk_norm_rope(q, k, **settings, backend=room[0])
        zero = torch.zeros_like(out[0])
        for i in (0, 1):
            alone = torch.autograd.grad(out[i], leaves, torch.ones_like(zero), retain_graph=True, allow_unused=True)
            pair = [zero, zero]
            pair[i] = torch.ones_like(zero)
            for one, other in zip(alone, torch.autograd.grad(out, leaves, pair, retain_graph=True), strict=True):
                assert torch.equal(one, other)


@rooms
def test_nothing_to_do(room):
    for batch, heads, groups, length in ((0, 2, 2, 5), (1, 2, 2, 0), (1, 2, 0, 3)):
        for norm in ("l2", "rms"):
            q, k, settings = arguments(room, batch, heads, groups, length, 32, norm)
            got = everything(lambda *args, **kw: qk_norm_rope(*args, **kw, backend=room[0]), q, k, settings, (q, k))
            assert got[0].shape == got[2].shape == q.shape
            assert got[1].shape == got[3].shape == k.shape
            if not q.numel():
                assert not any(one.count_nonzero() for one in got)


@rooms
def test_autocast_changes_nothing(room):
    backend, device, _ = room
    q, k, settings = arguments(room, 1, 2, 2, 12, 32)
    want = qk_norm_rope(q, k, **settings, backend=backend)
    with torch.autocast(device, dtype=torch.bfloat16):
        got = qk_norm_rope(q, k, **settings, backend=backend)
    for one, other in zip(got, want, strict=True):
        assert torch.equal(one, other)


def test_equals_what_var_and_infinity_write_out():
    """The modules' own formulas: torch's normalize, a gain (1, H, 1, 1), and pairs turned with a padded table."""
    q, k, settings = arguments(("eager", "cpu", torch.float32), 2, 3, 3, 21, 96)
    gain, rope = settings["gain"].view(1, 3, 1, 1), settings["rope"]
    want_q = torch.nn.functional.normalize(q, dim=-1) * gain.clamp_max(math.log(100)).exp()
    want_k = torch.nn.functional.normalize(k, dim=-1)
    both = torch.stack((want_q, want_k)).reshape(2, 2, 3, 21, 48, 2)
    both = torch.stack(
        (rope[0] * both[..., 0] - rope[1] * both[..., 1], rope[1] * both[..., 0] + rope[0] * both[..., 1]), -1
    ).reshape(2, 2, 3, 21, 96)
    got = qk_norm_rope(q, k, **settings)
    torch.testing.assert_close(torch.stack(got), both, rtol=1e-6, atol=1e-6)


def test_gradients_are_those_of_the_definition():
    """Numerically, in float64."""
    for norm in ("l2", "rms", None):
        q, k, settings = arguments(("eager", "cpu", torch.float64), 1, 2, 1, 3, 8, norm)
        settings = widened(settings)
        rope = settings.pop("rope")
        names = sorted(set(settings) - {"norm"})
        parameters = [one for name in names for one in ([settings[name]] if name == "gain" else settings[name])]

        def function(q, k, *parameters, norm=norm, rope=rope):
            given = {} if norm is None else {"gain": parameters[0]} if norm == "l2" else {"weights": parameters}
            return qk_norm_rope(q, k, norm=norm, rope=rope, **given)

        assert torch.autograd.gradcheck(function, [x.requires_grad_() for x in (q, k, *parameters)])


# ---- kernels ---------------------------------------------------------------------------------------------------------


@triton_rooms
@pytest.mark.parametrize("width", [40, 64])
@pytest.mark.parametrize("norm", ["l2", "rms"])
def test_writes_what_it_should_and_nothing_else(room, norm, width):
    _, device, dtype = room
    q, k, settings = arguments(room, 2, 3, 2, 67, width, norm)
    v, kernels = k.clone(), _native.kernels("norm")
    gain, (q_weight, k_weight) = settings.get("gain"), settings.get("weights", (None, None))
    where = (norm, 1e-6, gain, q_weight, k_weight, settings["rope"])
    filled = [guarded(x.shape, dtype, device) for x in (q, k, v)]
    kernels.qk_norm_rope(q, k, v, *where, *[buffer for buffer, _ in filled])
    tiles = kernels.tiles(q)
    shapes = [(2, 3, tiles)] if norm == "l2" else [(2 * 3 * tiles, width), (2 * 2 * tiles, width)]
    parts = [guarded(shape, torch.float32, device) for shape in shapes]
    given = [buffer for buffer, _ in parts]
    given = [*given, None, None] if norm == "l2" else [None, *given]
    filled += [guarded(x.shape, dtype, device) for x in (q, k)]
    kernels.qk_norm_rope_backward(q, k, q, k, *where, *[buffer for buffer, _ in filled[3:]], *given)
    for _, ok in (*filled, *parts):
        ok()


@rooms
def test_runs_are_bit_equal(room):
    q, k, settings = arguments(room, 3, 2, 2, 150, 64)
    first, second = (check(room, q, k, settings) for _ in range(2))
    for one, other in zip(first, second, strict=True):
        assert torch.equal(one, other)


@gpu_triton
def test_2000_launches_are_bit_equal(room):
    for norm in ("l2", "rms"):
        q, k, settings = arguments(room, 4, 16, 16, 680, 64, norm)

        def run(q=q, k=k, settings=settings):
            ours = lambda *args, **kw: qk_norm_rope(*args, **kw, backend="triton")  # noqa: E731
            return everything(ours, q, k, settings, (q, k))

        first = run()
        same = torch.stack([torch.stack([(a == b).all() for a, b in zip(run(), first, strict=True)]).all()
                            for _ in range(2000)])  # fmt: skip
        assert same.all()


@gpu_triton
def test_in_a_cuda_graph(room):
    q, k, settings = arguments(room, 2, 4, 4, 100, 64)
    cache = torch.zeros(2, 2, 4, 200, 64, dtype=q.dtype, device="cuda")
    new_q = torch.empty_like(q)

    def run():
        qk_norm_rope(q, k, k, **settings, out=(new_q, *cache[:, :, :, 50:150]), backend="triton")

    run()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        run()
    q.mul_(-1), k.add_(1)
    graph.replay()
    want = qk_norm_rope(q, k, **settings, backend="triton")
    for one, other in zip((new_q, *cache[:, :, :, 50:150]), (*want, k), strict=True):
        assert torch.equal(one, other)


# ---- torch's tools ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("backend", ["eager", "triton"])
@pytest.mark.parametrize("norm", ["l2", "rms"])
def test_opcheck(device, backend, norm):
    if backend == "triton" and device == "cpu" and (reason := interpreter_skip()):
        pytest.skip(reason)
    q, k, settings = arguments((backend, device, torch.float32), 1, 2, 1, 5, 32, norm)
    q = q.transpose(1, 2).contiguous().transpose(1, 2)
    weights = settings.get("weights", (None, None))
    given = (norm, 1e-6, settings.get("gain"), *weights, settings["rope"])
    leaves = [x.clone(memory_format=torch.preserve_format).requires_grad_() for x in (q, k)]
    trained = [x if x is None else x.clone().requires_grad_() for x in given[2:5]]
    torch.library.opcheck(FORWARD.overload, (*leaves, *given[:2], *trained, given[5], backend))
    torch.library.opcheck(BACKWARD.overload, (q, k, q, k, *given, backend))
    torch.library.opcheck(BACKWARD.overload, (None, k, q, k, *given, backend))
    outs = [torch.empty_like(x) for x in (q, k, k)]
    torch.library.opcheck(INTO.overload, (q, k, k, *given, *outs, backend))
    torch.library.opcheck(INTO.overload, (q, k, None, *given, *outs[:2], None, backend))


@rooms
def test_compiles_whole_with_dynamic_shapes(room, fresh_compiler):
    backend, device, dtype = room

    def trained(q, k, gain, rope):
        new_q, new_k = qk_norm_rope(q, k, gain=gain, rope=rope, backend=backend)
        return (new_q * 2).sum() + new_k.float().square().sum()

    def cached(q, k, cache, rope, begin):
        place = cache[:, :, :, begin : begin + q.shape[2]]
        new_q, *_ = qk_norm_rope(q, k, k, rope=rope, out=(torch.empty_like(q), *place), backend=backend)
        return new_q + 1

    compiled = [torch.compile(one, fullgraph=True, dynamic=True, backend="aot_eager") for one in (trained, cached)]
    for length, begin in ((7, 2), (12, 5)):
        q, k, settings = arguments(room, 1, 2, 2, length, 32)
        gain, rope = settings["gain"].requires_grad_(), settings["rope"]
        want, got = (
            torch.autograd.grad(one(q, k.requires_grad_(), gain, rope), (k, gain)) for one in (trained, compiled[0])
        )
        for one, other in zip(want, got, strict=True):
            torch.testing.assert_close(one, other)
        caches = [torch.zeros(2, 1, 2, 30, 32, dtype=dtype, device=device) for _ in range(2)]
        with torch.no_grad():
            want, got = (
                one(q, k.detach(), cache, rope, begin) for one, cache in zip((cached, compiled[1]), caches, strict=True)
            )
        assert torch.equal(want, got)
        assert torch.equal(*caches)
        assert caches[0].any()


def test_explain_says_why_not():
    q = torch.zeros(1, 1, 3, 36)
    reasons = FORWARD.explain(q, q, "none", 0.0, None, None, None, None)
    assert reasons["eager"] == "fits"
    assert "multiple of 8" in reasons["triton"] or "needs" in reasons["triton"]
    wide = torch.zeros(1, 1, 3, 36, dtype=torch.float64)
    with pytest.raises(ValueError, match="must fit the call"):
        qk_norm_rope(wide, wide, backend="triton")


Q = torch.zeros(1, 2, 3, 8)
PAIR = (torch.ones(8), torch.ones(8))
BAD = {
    "q no tensor": ((1, Q), {}, TypeError, "q must be a tensor"),
    "k of integers": ((Q, Q.long()), {}, TypeError, "k must be"),
    "other dtype": ((Q, Q.half()), {}, TypeError, "dtype of q"),
    "three dimensions": ((Q[0], Q), {}, ValueError, "q must be \\(batch"),
    "k shorter": ((Q, Q[:, :, :2]), {}, ValueError, "k must be"),
    "v without out": ((Q, Q, Q), {}, ValueError, "v must be None"),
    "v like no k": ((Q, Q, Q[:, :1]), {"out": (Q, Q, Q)}, ValueError, "shape of k"),
    "unknown norm": ((Q, Q), {"norm": "layer"}, ValueError, "norm must be"),
    "none in letters": ((Q, Q), {"norm": "none"}, ValueError, "norm must be"),
    "gain of rms": ((Q, Q), {"norm": "rms", "gain": torch.ones(2)}, ValueError, "gain must be None"),
    "gain of other size": ((Q, Q), {"gain": torch.ones(1, 2, 1, 1)}, ValueError, "gain must be \\(2,\\)"),
    "gain of integers": ((Q, Q), {"gain": torch.ones(2).int()}, TypeError, "gain must be"),
    "weights of l2": ((Q, Q), {"weights": PAIR}, ValueError, "weights must be None"),
    "one weight": ((Q, Q), {"norm": "rms", "weights": PAIR[:1]}, ValueError, "pair"),
    "a tensor of weights": ((Q, Q), {"norm": "rms", "weights": torch.ones(2, 8)}, TypeError, "pair"),
    "narrow weight": ((Q, Q), {"norm": "rms", "weights": (PAIR[0], torch.ones(4))}, ValueError, "weights\\[1\\]"),
    "rope of other length": ((Q, Q), {"rope": torch.ones(2, 4, 4)}, ValueError, "rope must be \\(2, 3, 4\\)"),
    "rope in half": ((Q, Q), {"rope": torch.ones(2, 3, 4).half()}, TypeError, "rope must be"),
    "rope that learns": ((Q, Q), {"rope": torch.ones(2, 3, 4).requires_grad_()}, ValueError, "rope must not"),
    "odd width": ((Q[..., :7], Q[..., :7]), {"rope": torch.ones(2, 3, 3)}, ValueError, "even number"),
    "eps below 0": ((Q, Q), {"eps": -1.0}, ValueError, "eps must be at least"),
    "eps without a norm": ((Q, Q), {"norm": None, "eps": 1e-6}, ValueError, "eps must be None"),
    "out no tuple": ((Q, Q), {"out": Q}, TypeError, "out must be a tuple"),
    "one out": ((Q, Q), {"out": (Q,)}, ValueError, "out must be 2"),
    "out for v": ((Q, Q), {"out": (Q, Q, Q)}, ValueError, "out must be 2"),
    "out of other shape": ((Q, Q), {"out": (Q, Q[:, :1])}, ValueError, "out\\[1\\]"),
    "out of other dtype": ((Q, Q), {"out": (Q, Q.half())}, TypeError, "out\\[1\\]"),
    "out with gradients": ((Q, Q), {"gain": torch.ones(2).requires_grad_(), "out": (Q, Q)}, ValueError, "no_grad"),
    "unknown backend": ((Q, Q), {"backend": "fast"}, ValueError, "backend must be"),
}


@pytest.mark.parametrize("case", BAD.values(), ids=BAD)
def test_bad_input(case):
    inputs, settings, error, words = case
    with pytest.raises(error, match=f"^qk_norm_rope(_out)?: .*{words}"):
        qk_norm_rope(*inputs, **settings)


# ---- packed projections ----------------------------------------------------------------------------------------------


def packed(room, batch, heads, length, width, norm, turned):
    q, _, settings = arguments(room, batch, heads, heads, length, width, norm, turned=turned)
    rest = torch.randn(2, *q.shape, generator=torch.Generator().manual_seed(5)).to(q)
    return torch.stack((q, *rest)).permute(1, 3, 0, 2, 4).contiguous(), settings


def sliced(qkv, **settings):
    """The same, of views."""
    q, k, v = qkv.permute(2, 0, 3, 1, 4).unbind()
    return *qk_norm_rope(q, k, **settings), v


@rooms
@pytest.mark.parametrize(("norm", "turned"), [("l2", False), ("l2", True), ("rms", True), (None, True)])
def test_packed_equals_slices(room, norm, turned):
    for shape in ((2, 3, 37, 64), (1, 2, 70, 40), (2, 1, 1, 8)):
        qkv, settings = packed(room, *shape, norm, turned)
        generator, found = torch.Generator().manual_seed(3), []
        grads = [torch.randn(shape, generator=generator).to(qkv) for _ in "qkv"]
        given = (settings.get("gain"), *settings.get("weights", ()))
        parameters = [one.requires_grad_() for one in given if one is not None]
        for function in (packed_norm_rope, sliced):
            leaf = qkv.clone().requires_grad_()
            out = function(leaf, **settings, backend=room[0])
            found.append((*out, *torch.autograd.grad(out, [leaf, *parameters], grads)))
        for one, other in zip(*found, strict=True):
            assert torch.equal(one, other)
        assert found[0][3].is_contiguous()


@rooms
def test_packed_gradients_alone_and_none(room):
    qkv, settings = packed(room, 2, 2, 5, 16, "l2", False)
    for i in range(3):
        found = []
        for function in (packed_norm_rope, sliced):
            leaf = qkv.clone().requires_grad_()
            loss = function(leaf, **settings, backend=room[0])[i].float().square().sum()
            found.append(torch.autograd.grad(loss, leaf)[0])
        assert torch.equal(*found)
    assert not any(one.requires_grad for one in packed_norm_rope(qkv, norm="l2", backend=room[0]))
    empty = qkv[:, :0].clone().requires_grad_()
    q, k, v = packed_norm_rope(empty, norm="l2", backend=room[0])
    (q.sum() + k.sum() + v.sum()).backward()
    assert empty.grad.shape == empty.shape


@pytest.mark.parametrize("norm", ["l2", "rms"])
def test_packed_opcheck(norm):
    qkv, settings = packed(("eager", "cpu", torch.float32), 2, 2, 5, 16, norm, True)
    grads = torch.randn(3, 2, 2, 5, 16).unbind()
    weights = settings.get("weights", (None, None))
    given = (*grads, qkv, norm, 1e-6, settings.get("gain"), *weights, settings["rope"], "auto")
    torch.library.opcheck(registry["packed_norm_rope_backward"].overload, given)


@pytest.mark.usefixtures("fresh_compiler")
def test_packed_compiles_whole():
    qkv, settings = packed(("eager", "cpu", torch.float32), 2, 2, 5, 16, "l2", False)

    def function(one):
        q, k, v = packed_norm_rope(one, **settings)
        return q * k + v

    found = []
    for one in (function, torch.compile(function, fullgraph=True, backend="aot_eager")):
        leaf = qkv.clone().requires_grad_()
        found.append(torch.autograd.grad(one(leaf).square().sum(), leaf)[0])
    assert torch.allclose(*found, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("qkv", [torch.zeros(2, 3, 4, 5), torch.zeros(2, 3, 2, 4, 8), torch.zeros(2, 3, 3, 4, 0)])
def test_packed_bad_input(qkv):
    with pytest.raises(ValueError, match="packed_norm_rope: qkv must be"):
        packed_norm_rope(qkv)
