"""The family `sample`: the draw against a float64 formula of its own, torch.multinomial and the exact distribution."""

import numpy as np
import pytest
import torch

from unifiedar.ops import registry, sample_codes


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


@pytest.mark.parametrize(
    "options", [{}, {"temperature": 0.5, "top_k": 6, "top_p": 0.9}, {"guidance": 2.5, "top_p": 0.95}], ids=str
)
def test_distribution(device, options):
    """Chi-square of 40,000 draws against the exact probabilities, at the 0.1 % level and a fixed seed."""
    draws, size = 40000, 8
    generator = torch.Generator().manual_seed(4)
    rows = torch.randn(2 if "guidance" in options else 1, size, generator=generator)
    guidance = options.get("guidance")
    p = probabilities(rows, **{**options, "guidance": None if guidance is None else [guidance]})[0]
    logits = rows.repeat_interleave(draws, 0).to(device)
    codes = sample_codes(logits, generator=torch.Generator(device).manual_seed(5), **options)
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


@pytest.mark.gpu
def test_no_host_sync_and_cuda_graph():
    logits = torch.randn(8, 1000, device="cuda")
    noise = torch.empty(4, 1000, device="cuda").exponential_()
    rows = torch.full((4,), 2.0, device="cuda")

    def run():
        return sample_codes(logits, guidance=rows, top_k=50, top_p=0.9, noise=noise)

    run()
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    try:
        run()
        sample_codes(logits, guidance=3.0, temperature=0)
        sample_codes(logits, top_p=0.5)
    finally:
        torch.cuda.set_sync_debug_mode("default")
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = run()
    logits.copy_(torch.randn_like(logits))
    noise.exponential_()
    graph.replay()
    assert torch.equal(captured, run())
