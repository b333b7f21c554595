"""The family `sample`: the draw against a float64 formula of its own, torch.multinomial and the exact distribution;
the kernel against the definition, code by code."""

import math
from fractions import Fraction

import numpy as np
import pytest
import torch
from helpers import kernel_rooms
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from unifiedar.ops import _native, cut_logits, registry, sample_codes


def rooms_of(*backends, dtypes=(torch.float32, torch.float16, torch.bfloat16), device=None):
    """Rooms of these backends, or all: `room` is (backend, device, dtype)."""
    chosen = [
        case
        for case in kernel_rooms()
        if case.values[0][0] in (backends or ("eager", "triton", "cuda"))
        and case.values[0][2] in dtypes
        and device in (None, case.values[0][1])
    ]
    return pytest.mark.parametrize("room", chosen, indirect=True)


rooms = rooms_of(dtypes=(torch.float32,))
kernels = rooms_of("triton", "cuda")
kernels_float32 = rooms_of("triton", "cuda", dtypes=(torch.float32,))
triton_float32 = rooms_of("triton", dtypes=(torch.float32,))
gpu_kernels = rooms_of("triton", "cuda", dtypes=(torch.float32,), device="cuda")


def probabilities(logits, *, guidance=None, temperature=1.0, top_k=0, top_p=0.0):
    """What the documentation says, in float64 and one row at a time; guidance is one number a row, or None."""
    logits = np.asarray(logits, dtype=np.float64)
    if guidance is not None:
        half = len(logits) // 2
        strength = np.reshape(guidance, (half, *(1,) * (logits.ndim - 1)))
        logits = logits[half:] + strength * (logits[:half] - logits[half:])
    out = np.zeros_like(logits)
    for where in np.ndindex(logits.shape[:-1]):
        scores = logits[where] / temperature
        if 0 < top_k < len(scores):
            scores = np.where(scores >= np.sort(scores)[-top_k], scores, -np.inf)
        p = np.exp(scores - scores.max())
        p /= p.sum()
        if 0 < top_p < 1:
            order = sorted(range(len(p)), key=lambda i: (-p[i], i))
            mass, kept = 0.0, []
            for i in order:
                kept.append(i)
                mass += p[i]
                if mass >= top_p:
                    break
            p = np.where(np.isin(np.arange(len(p)), kept), p, 0)
        out[where] = p
    return out


OPTIONS = {
    "plain": {},
    "temperature": {"temperature": 0.3},
    "top-k": {"top_k": 5},
    "top-k of all": {"top_k": 64},
    "top-k beyond": {"top_k": 1000},
    "top-p": {"top_p": 0.7},
    "top-p of one": {"top_p": 1e-9},
    "top-p off": {"top_p": 1.0},
    "all": {"temperature": 1.7, "top_k": 20, "top_p": 0.9},
}


@pytest.mark.parametrize("guided", [False, True], ids=["", "guided"])
@pytest.mark.parametrize("options", OPTIONS.values(), ids=OPTIONS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_draw_is_the_documented_one(device, dtype, options, guided):
    generator = torch.Generator().manual_seed(0)
    logits = (3 * torch.randn(8, 5, 64, generator=generator)).to(dtype)
    guidance = torch.tensor([0.0, 1.0, 3.0, 7.5]) if guided else None
    noise = torch.empty(4 if guided else 8, 5, 64, dtype=dtype).exponential_(generator=generator)
    p = probabilities(logits, guidance=None if guidance is None else guidance.numpy(), **options)
    want = torch.from_numpy((p / noise.double().numpy()).argmax(-1))
    got = sample_codes(
        logits.to(device), guidance=None if guidance is None else guidance.to(device), noise=noise.to(device), **options
    )
    assert got.dtype == torch.int64
    assert torch.equal(got.cpu(), want)


@pytest.mark.parametrize("options", [{}, {"top_k": 7}, {"top_p": 0.8}], ids=str)
def test_same_generator_same_draw_as_multinomial(device, options):
    logits = 2 * torch.randn(300, 50, device=device, generator=torch.Generator(device).manual_seed(1))
    p = torch.from_numpy(probabilities(logits.cpu(), **options)).float().to(device)
    want = torch.multinomial(p, 1, generator=torch.Generator(device).manual_seed(2))[:, 0]
    got = sample_codes(logits, generator=torch.Generator(device).manual_seed(2), **options)
    assert torch.equal(got, want)
    torch.manual_seed(3)
    default = sample_codes(logits, **options)
    torch.manual_seed(3)
    assert torch.equal(default, torch.multinomial(p, 1)[:, 0])


@rooms
@pytest.mark.parametrize(
    "options", [{}, {"temperature": 0.5, "top_k": 6, "top_p": 0.9}, {"guidance": 2.5, "top_p": 0.95}], ids=str
)
def test_distribution(room, options):
    """Chi-square against the exact probabilities, at the 0.1 % level and a fixed seed: of 40,000 draws, fewer where
    they are interpreted."""
    backend, device, _ = room
    draws, size = 150 if (backend, device) == ("triton", "cpu") else 40000, 8
    generator = torch.Generator().manual_seed(4)
    rows = torch.randn(2 if "guidance" in options else 1, size, generator=generator)
    guidance = options.get("guidance")
    p = probabilities(rows, **{**options, "guidance": None if guidance is None else [guidance]})[0]
    logits = rows.repeat_interleave(draws, 0).to(device)
    codes = sample_codes(logits, generator=torch.Generator(device).manual_seed(5), backend=backend, **options)
    counts = np.bincount(codes.cpu().numpy(), minlength=size)
    assert counts[p == 0].sum() == 0
    expected = draws * p[p > 0] / p.sum()
    statistic = ((counts[p > 0] - expected) ** 2 / expected).sum()
    limit = {1: 10.8, 2: 13.8, 3: 16.3, 4: 18.5, 5: 20.5, 6: 22.5, 7: 24.3}[len(expected) - 1]
    assert statistic < limit


def test_ties(device):
    tied = torch.tensor([[1.0, 2.0, 2.0, 0.0, 2.0]], device=device)
    generator = torch.Generator(device).manual_seed(6)

    def drawn(logits, **options):
        return set(sample_codes(logits.expand(400, -1), generator=generator, **options).tolist())

    assert drawn(tied, top_k=1) == {1, 2, 4}, "every tie with the k-th is kept"
    assert drawn(tied, top_k=2) == {1, 2, 4}
    flat = torch.zeros(1, 4, device=device)
    assert drawn(flat, top_p=0.5) == {0, 1}, "the crossing entry is kept, and the lower index first"
    assert drawn(flat, top_p=0.51) == {0, 1, 2}
    assert drawn(tied, temperature=0) == {1}, "greedy: the lowest index"
    assert sample_codes(flat, noise=torch.ones_like(flat)).item() == 0


def test_guidance_rows_and_rounding(device):
    generator = torch.Generator().manual_seed(7)
    logits = torch.randn(6, 2, 40, generator=generator).to(device, torch.bfloat16)
    noise = torch.empty(3, 2, 40).exponential_(generator=generator).to(device)
    conditional, unconditional = logits[:3], logits[3:]
    for g in (1.5, 3):
        # three operations, each rounded to bfloat16, before anything else
        mixed = unconditional + (conditional - unconditional) * g
        want = sample_codes(mixed, top_k=4, noise=noise)
        assert torch.equal(sample_codes(logits, guidance=g, top_k=4, noise=noise), want)
        rows = torch.full((3,), float(g), device=device)
        assert torch.equal(sample_codes(logits, guidance=rows, top_k=4, noise=noise), want)
    greedy = sample_codes(logits, guidance=1e4, temperature=0)
    assert torch.equal(greedy, (unconditional + (conditional - unconditional) * 1e4).argmax(-1))


def test_impossible_entries_never_win(device):
    logits = torch.tensor([[0.0, -torch.inf, 1.0]], device=device)
    noise = torch.tensor([[1.0, 0.0, 1.0]], device=device)
    assert sample_codes(logits, noise=noise).item() == 2
    assert sample_codes(torch.full((1, 3), -torch.inf, device=device)).item() == 0
    codes = sample_codes(logits.expand(1000, -1), generator=torch.Generator(device).manual_seed(8))
    assert set(codes.tolist()) == {0, 2}


def test_shapes(device):
    assert sample_codes(torch.zeros(5, device=device)).shape == ()
    assert sample_codes(torch.zeros(0, 5, device=device)).shape == (0,)
    assert sample_codes(torch.zeros(4, 3, 2, 5, device=device), guidance=1.0).shape == (2, 3, 2)
    strided = torch.randn(5, 4, device=device).T
    noise = torch.rand(4, 5, device=device) + 0.1
    assert torch.equal(sample_codes(strided, noise=noise), sample_codes(strided.contiguous(), noise=noise))


BAD = {
    "int logits": (torch.zeros(2, 3).long(), {}, TypeError, "logits must be"),
    "no entries": (torch.zeros(2, 0), {}, ValueError, "V at least 1"),
    "odd rows": (torch.zeros(3, 4), {"guidance": 2.0}, ValueError, "2N"),
    "one row": (torch.zeros(4), {"guidance": 2.0}, ValueError, "2N"),
    "guidance a string": (torch.zeros(2, 4), {"guidance": "3"}, TypeError, "guidance must be a number"),
    "guidance nan": (torch.zeros(2, 4), {"guidance": float("nan")}, ValueError, "finite"),
    "guidance shape": (torch.zeros(4, 4), {"guidance": torch.ones(4)}, ValueError, r"\(2,\), one a row"),
    "top_k rows": (torch.zeros(2, 4), {"top_k": torch.ones(3).long()}, ValueError, r"top_k must be a number or \(2,\)"),
    "top_k floats": (torch.zeros(2, 4), {"top_k": torch.ones(2)}, TypeError, "top_k must be int64"),
    "top_p rows": (torch.zeros(4, 4), {"top_p": torch.ones(4), "guidance": 2.0}, ValueError, r"top_p must .* \(2,\)"),
    "top_p of one row": (torch.zeros(4), {"top_p": torch.ones(1)}, ValueError, "a number for a single row"),
    "guidance int": (torch.zeros(4, 4), {"guidance": torch.ones(2).long()}, TypeError, "guidance must be"),
    "temperature": (torch.zeros(2, 4), {"temperature": -1}, ValueError, "temperature must be at least 0"),
    "temperature none": (torch.zeros(2, 4), {"temperature": None}, TypeError, "temperature must be a number"),
    "top_k negative": (torch.zeros(2, 4), {"top_k": -1}, ValueError, "top_k must be at least 0"),
    "top_k fraction": (torch.zeros(2, 4), {"top_k": 0.5}, TypeError, "top_k must be an integer"),
    "top_p negative": (torch.zeros(2, 4), {"top_p": -0.1}, ValueError, "top_p"),
    "top_p nan": (torch.zeros(2, 4), {"top_p": float("nan")}, ValueError, "top_p must be finite"),
    "noise shape": (torch.zeros(4, 4), {"guidance": 2.0, "noise": torch.ones(4, 4)}, ValueError, r"\(2, 4\)"),
    "noise int": (torch.zeros(2, 4), {"noise": torch.ones(2, 4).long()}, TypeError, "noise must be"),
    "noise and generator": (
        torch.zeros(2, 4),
        {"noise": torch.ones(2, 4), "generator": torch.Generator()},
        ValueError,
        "generator must be None",
    ),
    "backend": (torch.zeros(2, 4), {"backend": "numpy"}, ValueError, "got 'numpy'"),
}


@pytest.mark.parametrize(("logits", "options", "error", "text"), BAD.values(), ids=BAD)
def test_refuses(logits, options, error, text):
    with pytest.raises(error, match=text) as raised:
        sample_codes(logits, **options)
    assert str(raised.value).startswith("sample_codes: ")


def test_opcheck(device):
    logits, noise = torch.randn(4, 3, 9, device=device), torch.rand(2, 3, 9, device=device) + 0.1
    operator = registry["sample_codes"].overload
    torch.library.opcheck(operator, (logits, 2.0, None, 1.0, 4, None, 0.9, None, noise))
    rows = torch.tensor([1.0, 2.0], device=device)
    torch.library.opcheck(operator, (logits, None, rows, 1.0, 0, None, 0.0, None, noise, "eager"))


def test_compiles_whole(device):
    def draw(logits, noise):
        return sample_codes(logits, guidance=3.0, top_k=5, top_p=0.9, noise=noise) + 1

    compiled = torch.compile(draw, fullgraph=True, dynamic=True, backend="aot_eager")
    for rows in (2, 5):
        logits, noise = torch.randn(2 * rows, 20, device=device), torch.rand(rows, 20, device=device) + 0.1
        assert torch.equal(compiled(logits, noise), draw(logits, noise))
    free = torch.compile(lambda logits: sample_codes(logits, top_k=5), fullgraph=True, backend="aot_eager")
    assert free(logits).shape == (10,)


# ---- every backend ---------------------------------------------------------------------------------------------------


def exponential(*shape, seed=0):
    return torch.empty(shape).exponential_(generator=torch.Generator().manual_seed(seed))


def normal(*shape, seed=0, scale=3.0):
    return scale * torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def kept(logits, backend="eager", **options):
    """Which entries of one row (V,) can be drawn: those that win against a noise that all but hands them the race."""
    noise = torch.ones(len(logits), len(logits), device=logits.device).fill_diagonal_(1e-30)
    codes = sample_codes(logits.expand(len(logits), -1), noise=noise, backend=backend, **options)
    return [i for i, code in enumerate(codes.tolist()) if code == i]


@rooms
def test_options_one_a_row(room):
    """Each row as if it were alone with its numbers, those that are off among them."""
    backend, device, _ = room
    logits, noise = normal(16, 2, 40).to(device), exponential(8, 2, 40).to(device)
    guidance = torch.tensor([0.0, 1.0, 3.0, 7.5, -1.0, 2.0, 2.0, 2.0])
    top_k = torch.tensor([0, 1, 5, 40, 39, 1000, -3, 7])
    top_p = torch.tensor([0.5, 0.0, 1.0, 0.9, 1.5, -0.2, 1e-9, math.nan])
    got = sample_codes(
        logits, guidance=guidance.to(device), top_k=top_k.to(device), top_p=top_p.to(device), noise=noise,
        backend=backend,
    )  # fmt: skip
    for i in range(8):
        p = top_p[i].item()
        alone = sample_codes(
            logits[[i, 8 + i]],
            guidance=guidance[i].item(),
            top_k=max(top_k[i].item(), 0),
            top_p=p if p > 0 else 0.0,
            noise=noise[i : i + 1],
            backend="eager",
        )
        assert torch.equal(got[i : i + 1], alone)


@rooms
@pytest.mark.parametrize("size", [2, 10, 1000])
def test_top_p_of_equal_entries_is_that_of_fractions(room, size):
    """Of n equal entries the first ceil(p n) are kept: p = 0.3 of 10 are 3, not 4, whatever 1 / 10 rounds to."""
    backend, device, _ = room
    flat = torch.full((1, size), 0.7, device=device)
    for tenths in range(1, 10):
        count = math.ceil(Fraction(tenths, 10) * size)
        for code, offset in ((count - 1, 0), (0, 1)):
            noise = torch.ones(1, size, device=device)
            noise[0, count - 1 + offset if count - 1 + offset < size else 0] = 0.5
            got = sample_codes(flat, top_p=tenths / 10, noise=noise, backend=backend).item()
            assert got == (code if count < size or offset == 0 else 0)


@rooms
@pytest.mark.parametrize("levels", [3, 12, 0], ids=["three levels", "twelve levels", "random"])
def test_top_p_at_the_very_edge(room, levels):
    """At p = a running sum over the total the entry that reaches it is the last one; a bit more, and the next is in."""
    backend, device, _ = room
    row = normal(12, seed=levels + 1, scale=1.0)
    row = torch.round(row * levels / 3) / 2 if levels else row
    weights = (row.double() - row.max().double()).exp().float().double()
    order = sorted(range(12), key=lambda i: (-weights[i].item(), i))
    exact = [Fraction(weights[i].item()) for i in order]
    total = sum(exact)
    for count in (1, 2, 5, 11):
        edge = float(sum(exact[:count]) / total)
        # The product of p and the total is rounded, and so is p: two steps away is clearly on either side.
        for p, number in ((edge * (1 - 2**-50), count), (edge * (1 + 2**-50), count + 1)):
            assert kept(row.to(device), backend, top_p=p) == sorted(order[:number])
        assert kept(row.to(device), backend, top_p=edge) == kept(row.to(device), "eager", top_p=edge)


@rooms
def test_ties_of_a_kept_set(room):
    backend, device, _ = room
    row = torch.tensor([1.0, 2.0, 2.0, 0.0, 2.0, -torch.inf, -0.0], device=device)
    assert kept(row, backend, top_k=1) == [1, 2, 4]
    assert kept(row, backend, top_k=3) == [1, 2, 4]
    assert kept(row, backend, top_k=4) == [0, 1, 2, 4]
    assert kept(row, backend, top_k=5) == [0, 1, 2, 3, 4, 6], "both zeros are equal"
    assert kept(row, backend, top_k=6) == [0, 1, 2, 3, 4, 6]
    assert kept(row, backend, top_k=1, top_p=0.5) == [1, 2]
    assert kept(row, backend, top_p=1e-12) == [1]
    assert kept(row, backend, top_p=1 - 1e-12) == [0, 1, 2, 3, 4, 6]


@rooms
def test_rows_that_are_not_finite(room):
    backend, device, _ = room
    inf, nan = torch.inf, torch.nan
    rows = torch.tensor(
        [[1.0, nan, 3.0], [1.0, inf, 3.0], [-inf, -inf, -inf], [-inf, -inf, 2.0], [nan, nan, nan], [inf, nan, -inf]],
        device=device,
    )
    noise = torch.ones_like(rows)
    for options in ({}, {"top_k": 1}, {"top_k": 2}, {"top_p": 0.5}, {"top_k": 2, "top_p": 0.9}):
        assert sample_codes(rows, noise=noise, backend=backend, **options).tolist() == [0, 0, 0, 2, 0, 0]
    if backend != "cuda":
        assert sample_codes(rows, temperature=0, backend=backend).tolist() == [1, 1, 0, 2, 0, 1]


@rooms
def test_strides_and_bounds(room):
    backend, device, _ = room
    logits, noise = normal(5, 7, 130).to(device), exponential(5, 7, 128, seed=1).to(device)
    options = {"top_k": 20, "top_p": 0.9, "backend": backend}
    want = sample_codes(logits[..., 1:129].clone(), noise=noise, **options)
    poisoned = logits.clone()
    poisoned[..., 0], poisoned[..., 129] = torch.nan, torch.inf
    assert torch.equal(sample_codes(poisoned[..., 1:129], noise=noise, **options), want), "views between other values"
    swapped = logits[..., 1:129].transpose(0, 1)
    assert torch.equal(sample_codes(swapped, noise=noise.transpose(0, 1), **options), want.T)
    across = logits[0, :, 1:129].T.contiguous().T
    assert torch.equal(sample_codes(across, noise=noise[0].T.contiguous().T, **options), want[0])
    one = logits[0, 0, 1:129]
    assert sample_codes(one, noise=noise[0, 0], **options).item() == want[0, 0]
    assert torch.equal(
        sample_codes(one.expand(7, -1), noise=noise[0], **options),
        sample_codes(one.repeat(7, 1), noise=noise[0], **options),
    )


# ---- the kernel against the definition -------------------------------------------------------------------------------


def assert_same_draw(logits, noise, backend, **options):
    want = sample_codes(logits, noise=noise, backend="eager", **options)
    assert torch.equal(sample_codes(logits, noise=noise, backend=backend, **options), want)


@kernels
@pytest.mark.parametrize("size", [1, 2, 511, 512, 513, 1000, 4096, 16384, 16385, 40000])
def test_sizes(room, size):
    backend, device, dtype = room
    logits = normal(4, size, seed=size).to(device, dtype)
    noise = exponential(2, size, seed=size + 1).to(device)
    for options in ({}, {"top_k": 900}, {"top_k": 900, "top_p": 0.96}, {"top_p": 0.5, "temperature": 0.6}):
        assert_same_draw(logits, noise, backend, guidance=3.0, **options)
    if backend != "cuda":
        assert_same_draw(logits, noise, backend, guidance=1.5, temperature=0)


@triton_float32
def test_rows_in_memory_are_taken_in_turn(room, monkeypatch):
    """More rows than programs, blocks that end before and after a row: nothing of one row shows in the next."""
    backend, device, _ = room
    module = _native.kernels("sample")
    monkeypatch.setattr(module, "_PROGRAMS", 2)
    monkeypatch.setattr(module, "_RESIDENT", 100)
    monkeypatch.setattr(module, "_IN_MEMORY", 8192 if device == "cuda" else 64)
    logits = normal(7, 190, seed=3).to(device)
    logits[1::2] = torch.round(logits[1::2])
    noise = exponential(7, 190, seed=4).to(device)
    for options in ({}, {"top_k": 30}, {"top_p": 0.8}, {"top_k": 30, "top_p": 0.8}, {"temperature": 0}):
        assert_same_draw(logits, noise, backend, **options)


@kernels_float32
@pytest.mark.parametrize("levels", [0, 1, 2, 40], ids=["random", "ties at 1", "ties at halves", "near ties"])
def test_many_rows(room, levels):
    """Every combination of cuts; thousands of rows on a GPU."""
    backend, device, _ = room
    rows, size = (2000, 700) if device == "cuda" else (4, 40)
    logits = normal(rows, size, seed=levels)
    logits = (torch.round(logits * levels) / levels if levels else logits).to(device)
    noise = exponential(rows, size, seed=levels + 10).to(device)
    for top_k in (0, 1, 17, size - 1, size):
        for top_p in (0.0, 1e-6, 0.3, 0.96, 0.999999, 1.0):
            assert_same_draw(logits, noise, backend, top_k=top_k, top_p=top_p)


@kernels
@settings(deadline=None, max_examples=60, suppress_health_check=list(HealthCheck))
@given(data=st.data())
def test_same_noise_same_draw(room, data):
    backend, device, dtype = room
    groups, inner = data.draw(st.integers(1, 3)), data.draw(st.integers(1, 2))
    size = data.draw(st.one_of(st.integers(1, 40), st.sampled_from([100, 512, 600])))
    guided = data.draw(st.sampled_from(["", "number", "rows"]))
    shape = (groups, inner, size)
    logits = normal(
        groups * (2 if guided else 1), inner, size, seed=data.draw(st.integers(0, 2**30)),
        scale=data.draw(st.sampled_from([0.0, 1e-6, 0.01, 1.0, 5.0, 60.0])),
    )  # fmt: skip
    coarse = data.draw(st.sampled_from([0, 1, 4]))
    logits = torch.round(logits * coarse) / coarse if coarse else logits
    if data.draw(st.booleans()):
        logits = logits.masked_fill(
            normal(*logits.shape, seed=coarse) > 1.5, data.draw(st.sampled_from([-torch.inf, -1e4]))
        )
    kind = data.draw(st.sampled_from(["exponential", "ones", "halves"]))
    noise = exponential(*shape, seed=data.draw(st.integers(0, 2**30)))
    noise = {"exponential": noise, "ones": torch.ones(shape), "halves": torch.ceil(2 * noise) / 2}[kind]
    numbers = {
        "top_k": st.one_of(st.integers(0, size + 2), st.just(0)),
        "top_p": st.one_of(
            st.sampled_from([0.0, 1e-9, 0.1, 0.3, 0.5, 0.7, 0.9, 0.96, 1 - 1e-7, 1.0]), st.floats(0, 1.2)
        ),
    }
    options = {}
    for name, values in numbers.items():
        if data.draw(st.booleans()):
            rows = [data.draw(values) for _ in range(groups)]
            kind = torch.int64 if name == "top_k" else data.draw(st.sampled_from([torch.float32, torch.float64]))
            options[name] = torch.tensor(rows, dtype=kind, device=device)
        else:
            options[name] = data.draw(values)
    strengths = st.one_of(st.sampled_from([0.0, 1.0, 3.0]), st.floats(-2, 8))
    if guided == "number":
        options["guidance"] = data.draw(strengths)
    elif guided:
        options["guidance"] = torch.tensor([data.draw(strengths) for _ in range(groups)], device=device)
    options["temperature"] = data.draw(st.sampled_from([1.0, *([] if backend == "cuda" else [0.0]), 0.3, 1.7, 1e-3]))
    assert_same_draw(logits.to(device, dtype), noise.to(device), backend, **options)


@kernels
def test_noise_of_any_kernel_dtype_and_from_a_generator(room):
    backend, device, dtype = room
    logits = normal(6, 50, seed=5).to(device, dtype)
    for kind in (torch.float32, torch.float16) if backend == "triton" else (torch.float32,):
        assert_same_draw(logits, exponential(6, 50, seed=6).to(device, kind).clamp_min(1e-3), backend, top_k=9)
    drawn = [
        sample_codes(logits, top_p=0.9, generator=torch.Generator(device).manual_seed(7), backend=name)
        for name in (backend, "eager")
    ]
    assert torch.equal(*drawn)


@triton_float32
def test_why_the_kernel_is_unfit(room):
    backend, device, _ = room
    x = torch.zeros(2, 4, device=device)
    with pytest.raises(ValueError, match="needs logits of float32 or less, got float64"):
        sample_codes(x.double(), backend=backend)
    with pytest.raises(ValueError, match="needs noise of float32 or less, got float64"):
        sample_codes(x, noise=x.double() + 1, backend=backend)
    with pytest.raises(ValueError, match=r"at most 2\^18 entries a row, got 262145"):
        sample_codes(torch.zeros(1, 2**18 + 1, device=device), backend=backend)
    assert sample_codes(torch.zeros(0, 4, device=device), backend=backend).shape == (0,)
    assert registry["sample_codes"].choose_best(x, None, None, 1.0, 0, None, 0.0, None, x).name == "eager"


@rooms_of("cuda", dtypes=(torch.float32,))
def test_why_the_compiled_kernel_is_unfit(room):
    x = torch.zeros(2, 4, device="cuda")
    for options, reason in (
        ({"temperature": 0}, "needs a temperature above 0"),
        ({"noise": x.half() + 1}, "needs noise of float32, got float16"),
    ):
        with pytest.raises(ValueError, match=reason):
            sample_codes(x, backend="cuda", **options)
    with pytest.raises(ValueError, match="needs logits of float32 or less, got float64"):
        sample_codes(x.double(), backend="cuda")
    with pytest.raises(ValueError, match=r"at most 2\^18 entries a row, got 262145"):
        sample_codes(torch.zeros(1, 2**18 + 1, device="cuda"), backend="cuda")
    assert sample_codes(torch.zeros(0, 4, device="cuda"), backend="cuda").shape == (0,)


# ---- on a GPU --------------------------------------------------------------------------------------------------------

PUBLISHED = {
    "VAR, last scale": ((128, 256, 4096), {"guidance": 1.5, "top_k": 900, "top_p": 0.96}),
    "VAR, all": ((2, 680, 4096), {"guidance": 4.0, "top_k": 900, "top_p": 0.95}),
    "VILA-U": ((32, 16384), {"guidance": 3.0, "top_k": 900, "top_p": 0.96}),
    "RQ-Transformer": ((100, 16384), {"top_p": 0.92}),
    "65,536 entries": ((600, 65536), {"top_k": 2000, "top_p": 0.9}),
}


@pytest.mark.gpu
@gpu_kernels
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize(("shape", "options"), PUBLISHED.values(), ids=PUBLISHED)
def test_published_sizes(room, shape, options, dtype):
    """Half-precision logits tie at the k-th place more often than not."""
    generator = torch.Generator("cuda").manual_seed(8)
    logits = (4 * torch.randn(shape, generator=generator, device="cuda")).to(dtype)
    half = (shape[0] // 2, *shape[1:]) if "guidance" in options else shape
    noise = torch.empty(half, device="cuda").exponential_(generator=generator)
    assert_same_draw(logits, noise, room[0], **options)


@pytest.mark.gpu
@gpu_kernels
@pytest.mark.parametrize("size", [4096, 16384, 20000])
def test_two_thousand_launches_agree(room, size):
    backend = room[0]
    logits = torch.round(2 * normal(64, size, seed=9)).to("cuda") / 2
    noise = exponential(32, size, seed=10).to("cuda")

    def run():
        return sample_codes(logits, guidance=3.0, top_k=900, top_p=0.96, noise=noise, backend=backend)

    first, differ = run(), torch.zeros((), dtype=torch.int64, device="cuda")
    for _ in range(2000):
        differ += (run() != first).any()
    assert differ.item() == 0


@pytest.mark.gpu
@gpu_kernels
def test_current_stream(room):
    logits, noise = normal(64, 4096, seed=11).to("cuda"), exponential(64, 4096, seed=12).to("cuda")
    want = sample_codes(logits, top_p=0.9, noise=noise, backend=room[0])
    late = torch.zeros_like(logits)
    torch.cuda.synchronize()
    with torch.cuda.stream(torch.cuda.Stream()):
        torch.cuda._sleep(200_000_000)  # about 0.1 s: a launch on any other stream would see zeros
        late.copy_(logits)
        got = sample_codes(late, top_p=0.9, noise=noise, backend=room[0])
    torch.cuda.synchronize()
    assert torch.equal(got, want)


@pytest.mark.gpu
@pytest.mark.parametrize("backend", ["eager", "triton", "cuda"])
def test_no_host_sync_and_cuda_graph(backend):
    logits = torch.randn(8, 1000, device="cuda")
    noise = torch.empty(4, 1000, device="cuda").exponential_()
    rows = torch.full((4,), 2.0, device="cuda")
    top_k = torch.tensor([50, 3, 0, 999], device="cuda")

    def run():
        return sample_codes(logits, guidance=rows, top_k=top_k, top_p=0.9, noise=noise, backend=backend)

    run()
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    try:
        run()
        if backend != "cuda":
            sample_codes(logits, guidance=3.0, temperature=0, backend=backend)
        sample_codes(logits, top_p=0.5, backend=backend)
    finally:
        torch.cuda.set_sync_debug_mode("default")
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = run()
    logits.copy_(torch.randn_like(logits))
    noise.exponential_()
    graph.replay()
    assert torch.equal(captured, run())


# ---- what is drawn from ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("guided", [False, True], ids=["", "guided"])
@pytest.mark.parametrize("options", [{}, {"top_k": 5}, {"top_p": 0.7}, {"top_k": 20, "top_p": 0.9}], ids=str)
def test_cut_logits_are_what_is_drawn_from(device, options, guided):
    logits = normal(8, 5, 64)
    strength = np.array([0.0, 1.0, 2.5, -0.5]) if guided else None
    p = probabilities(logits, guidance=strength, **options)
    p /= p.sum(-1, keepdims=True)
    settings = {**options, "guidance": torch.from_numpy(strength).float().to(device)} if guided else options
    got = cut_logits(logits.to(device), **settings)
    assert got.dtype == torch.float32
    assert np.array_equal(torch.isfinite(got).cpu(), p > 0)
    np.testing.assert_allclose(got.double().softmax(-1).cpu(), p, rtol=0, atol=1e-6)
    noise = exponential(*got.shape).to(device)
    drawn = torch.where(got.isfinite(), got.softmax(-1) / noise, 0).argmax(-1)
    assert torch.equal(drawn, sample_codes(logits.to(device), **settings, noise=noise))
    rows = len(got)
    by_rows = {name: torch.full((rows,), value, device=device) for name, value in options.items()}
    again = cut_logits(logits.to(device), **{**settings, **by_rows})
    assert np.array_equal(torch.isfinite(again).cpu(), p > 0)


def test_cut_logits_in_other_dtypes_and_shapes():
    assert cut_logits(normal(3, 7).bfloat16(), top_k=2).dtype == torch.float32
    assert cut_logits(normal(3, 7).double()).dtype == torch.float64
    assert cut_logits(normal(7), top_k=2).isfinite().sum() == 2
    assert cut_logits(normal(0, 7), top_k=2).shape == (0, 7)
    torch.library.opcheck(registry["cut_logits"].overload, (normal(4, 9), 2.0, None, 3, None, 0.5, None, "auto"))
    compiled = torch.compile(cut_logits, fullgraph=True, backend="aot_eager")
    assert torch.equal(compiled(normal(4, 9), guidance=2.0, top_k=3), cut_logits(normal(4, 9), guidance=2.0, top_k=3))
    for options, text in (({"top_k": -1}, "cut_logits: top_k"), ({"guidance": 1.0}, "cut_logits: logits must be")):
        with pytest.raises(ValueError, match=text):
            cut_logits(normal(3, 7), **options)
