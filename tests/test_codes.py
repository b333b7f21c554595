"""The family `codes`: definitions against independent formulas, every backend against the definition."""

import ctypes
import itertools

import numpy as np
import pytest
import torch
from helpers import assert_as_good_as_eager, guarded, interpreter_skip, kernel_rooms
from host_cuda import compile_on_host

from unifiedar import ops
from unifiedar.ops import _native, registry, residual_lookup, residual_quantize
from unifiedar.ops import codes as family

LOOKUP = registry["residual_lookup"]
BACKWARD = registry["residual_lookup_backward"]
STATISTICS = registry["code_statistics"]

# rows, depth, codes, channels
SHAPES = {
    "one of everything": (1, 1, 1, 1),
    "odd": (7, 3, 5, 33),  # no dimension divides a tile; elements one by one
    "packs": (40, 4, 20, 64),  # 16-byte packs, several rows a block, a ragged last one
    "deep": (3, 16, 2, 40),  # VILA-U 384's depth: several steps of levels
    "wide": (3, 2, 2, 1152),  # VILA-U 384's width: several tiles of channels, the last one ragged
    "one code": (90, 2, 1, 8),  # all rows choose one entry: segments longer than a chunk
    "no rows": (0, 4, 6, 16),
}


def inputs(rows, depth, num_codes, channels, *, shared, dtype, device, seed=0, unknown=True):
    generator = torch.Generator().manual_seed(seed)
    shape = (num_codes, channels) if shared else (depth, num_codes, channels)
    codebook = torch.randn(shape, generator=generator).to(dtype)
    codes = torch.randint(-1 if unknown else 0, num_codes, (rows, depth), generator=generator)
    return codes.to(device), codebook.to(device)


def oracle(codes, codebook, cumulative):
    """Sums in float64, one element of codes at a time."""
    book = codebook.double().cpu().numpy()
    flat = codes.reshape(-1, codes.shape[-1]).cpu().numpy()
    out = np.zeros((*flat.shape, book.shape[-1]))
    for n, row in enumerate(flat):
        for d, code in enumerate(row):
            if code >= 0:
                out[n, d:] += book[code] if book.ndim == 2 else book[d, code]
    out = out.reshape(*codes.shape, book.shape[-1])
    return torch.from_numpy(out if cumulative else out[..., -1, :]).to(codes.device)


def oracle_gradient(grad, codes, codebook, cumulative):
    """The chain rule in float64, one element of codes at a time."""
    out = np.zeros(codebook.shape)
    flat = codes.reshape(-1, codes.shape[-1]).cpu().numpy()
    grads = grad.double().cpu().numpy().reshape(len(flat), flat.shape[1] if cumulative else 1, codebook.shape[-1])
    for n, row in enumerate(flat):
        for d, code in enumerate(row):
            if code >= 0:
                share = grads[n, d:].sum(0) if cumulative else grads[n, 0]
                out[(code,) if codebook.ndim == 2 else (d, code)] += share
    return torch.from_numpy(out).to(codes.device)


def ordered_gradient(grad, codes, num_codes):
    """The gradient of a shared codebook with every float32 addition where csrc/codes.h says that it happens."""
    flat = codes.flatten().cpu().numpy()
    grads = grad.float().cpu().numpy()
    order = np.argsort(flat, kind="stable")
    order = order[flat[order] >= 0]
    chunk = 1 << max(5, (flat.size - 1).bit_length() + 1 >> 1)
    out, part = np.zeros((2, num_codes, grads.shape[-1]), np.float32)
    for place, entry in enumerate(order):
        code = flat[entry]
        if place % chunk == 0:
            out[code] += part[code]
            part[code] = 0
        part[code] += grads[entry // codes.shape[-1]]
    return torch.from_numpy(out + part).to(grad.dtype).to(grad.device)


every_room = pytest.mark.parametrize("room", kernel_rooms(), indirect=True)
kernel_room = pytest.mark.parametrize(
    "room", [case for case in kernel_rooms() if case.values[0][0] != "eager"], indirect=True
)


# ---- residual_lookup -------------------------------------------------------------------------------------------------


@every_room
@pytest.mark.parametrize("shared", [True, False], ids=["shared", "per depth"])
@pytest.mark.parametrize("shape", SHAPES.values(), ids=SHAPES)
def test_lookup_and_gradient(room, shape, shared):
    backend, device, dtype = room
    codes, codebook = inputs(*shape, shared=shared, dtype=dtype, device=device)
    for cumulative in (False, True):
        got = residual_lookup(codes, codebook, cumulative=cumulative, backend=backend)
        exact = oracle(codes, codebook, cumulative)
        eager = residual_lookup(codes, codebook, cumulative=cumulative, backend="eager")
        assert got.is_contiguous()
        assert_as_good_as_eager(got, eager, exact)
        assert torch.equal(got, eager), "one order of summation, one rounding: equal on every backend"
        if dtype == torch.float32:
            torch.testing.assert_close(got.double(), exact, rtol=1e-5, atol=1e-5)

        grad = torch.randn(got.shape, device=device).to(dtype)
        arguments = (grad, codes, codebook.shape[-2], shared, cumulative)
        got = BACKWARD(*arguments, backend)
        exact = oracle_gradient(grad, codes, codebook, cumulative)
        assert_as_good_as_eager(got, BACKWARD(*arguments, "eager"), exact)
        if dtype == torch.float32:
            torch.testing.assert_close(got.double(), exact, rtol=1e-4, atol=1e-4)


@every_room
def test_strides_and_leading_dimensions(room):
    backend, device, dtype = room
    codes, codebook = inputs(24, 3, 11, 40, shared=False, dtype=dtype, device=device)
    want = residual_lookup(codes, codebook, backend="eager")
    many = residual_lookup(codes.view(2, 3, 4, 3), codebook, backend=backend)
    assert torch.equal(many, want.view(2, 3, 4, 40))
    one = residual_lookup(codes[0], codebook, backend=backend)
    assert torch.equal(one, want[0])
    transposed = codes.T.contiguous().T  # strides (1, 24)
    assert torch.equal(residual_lookup(transposed, codebook, backend=backend), want)
    padded = torch.full((3, 12, 44), torch.nan, dtype=dtype, device=device)
    padded[:, :11, :40] = codebook  # a table with a padding row and padded rows, as checkpoints have
    assert torch.equal(residual_lookup(codes, padded[:, :11, :40], backend=backend), want)
    padded[:, :11, 3:43] = codebook  # not aligned to 16 bytes
    assert torch.equal(residual_lookup(codes, padded[:, :11, 3:43], backend=backend), want)
    columns = codebook.transpose(1, 2).contiguous().transpose(1, 2)  # channels not contiguous
    assert torch.equal(residual_lookup(codes, columns, backend=backend), want)
    grad = torch.randn(24, 1, dtype=torch.float32, device=device).to(dtype).expand(24, 40)  # as a sum's backward gives
    got = BACKWARD(grad, transposed, 11, False, False, backend)
    exact = oracle_gradient(grad, codes, codebook, False)
    assert_as_good_as_eager(got, BACKWARD(grad, codes, 11, False, False, "eager"), exact)


@kernel_room
@pytest.mark.parametrize(("channels", "offset"), [(64, 64), (64, 3), (33, 64)], ids=["packs", "misaligned", "odd"])
def test_kernels_write_their_output_and_nothing_else(room, channels, offset):
    backend, device, dtype = room
    codes, codebook = inputs(19, 5, 7, channels, shared=True, dtype=dtype, device=device, unknown=False)
    fill = family._lookup_cuda if backend == "cuda" else _native.kernels("codes").residual_lookup
    for cumulative in (False, True):
        shape = (19, 5, channels) if cumulative else (19, channels)
        out, check = guarded(shape, dtype, device, offset)
        fill(codes, codebook, out, cumulative)
        check()
        assert torch.equal(out, residual_lookup(codes, codebook, cumulative=cumulative, backend="eager"))


@every_room
def test_gradient_of_a_skewed_choice(room):
    """Nearly all rows choose entry 3, so its segment spans many chunks; the others lie inside one."""
    backend, device, dtype = room
    rows = 300 if device == "cpu" else 20000
    codes, _ = inputs(rows, 2, 9, 24, shared=True, dtype=dtype, device=device)
    codes[torch.arange(rows, device=device) % 16 != 0] = 3
    for cumulative in (False, True):
        grad = torch.randn(rows, 2, 24, device=device).to(dtype)
        grad = grad if cumulative else grad[:, 0].contiguous()
        arguments = (grad, codes, 9, True, cumulative)
        exact = BACKWARD(grad.double(), codes, 9, True, cumulative, "eager")
        got = BACKWARD(*arguments, backend)
        if backend == "eager":
            # On a GPU its atomics add in another order every time, so one run is no measure of another. In whatever
            # order, n float32 additions are off by sqrt(n) 2^-24 of what the summands' sizes sum up to (Higham and
            # Mary, "A New Approach to Probabilistic Rounding Error Analysis", 2019). A row too few is more.
            sizes = BACKWARD(grad.double().abs(), *arguments[1:], "eager")
            terms = torch.stack([(codes == entry).sum() for entry in range(9)])[:, None]
            bound = terms.sqrt() * 2.0**-24 * sizes + torch.finfo(dtype).eps / 2 * exact.abs()
            assert ((got.double() - exact).abs() <= bound + 1e-5).all()
        else:
            assert_as_good_as_eager(got, BACKWARD(*arguments, "eager"), exact)
            assert torch.equal(got, BACKWARD(*arguments, backend)), "no atomics: bit-equal between runs"


@pytest.mark.gpu
@kernel_room
@pytest.mark.parametrize("shared", [True, False], ids=["shared", "per depth"])
def test_published_sizes(room, shared):
    """VILA-U 384's codes: large enough for channels in slices, and for a sort of several passes over several tiles."""
    backend, device, dtype = room
    codes, codebook = inputs(5832, 16, 16384, 1152 if shared else 72, shared=shared, dtype=dtype, device=device)
    for cumulative in (False, True):
        got = residual_lookup(codes, codebook, cumulative=cumulative, backend=backend)
        assert torch.equal(got, residual_lookup(codes, codebook, cumulative=cumulative, backend="eager"))
        grad = torch.randn(got.shape, device=device).to(dtype)
        arguments = (grad, codes, 16384, shared, cumulative)
        exact = BACKWARD(grad.double(), *arguments[1:], "eager")
        assert_as_good_as_eager(BACKWARD(*arguments, backend), BACKWARD(*arguments, "eager"), exact)


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("skewed", [False, True])
def test_the_compiled_backward_adds_in_the_documented_order(dtype, skewed):
    codes, _ = inputs(2000, 4, 600, 72, shared=True, dtype=dtype, device="cuda")
    if skewed:
        codes[::2] = 9
        codes[1::4, :2] = 599
    grad = torch.randn(2000, 72, device="cuda").to(dtype)
    assert torch.equal(BACKWARD(grad, codes, 600, True, False, "cuda"), ordered_gradient(grad, codes, 600))
    vectors, flat = grad.repeat_interleave(4, dim=0), codes.flatten()
    sums = STATISTICS(vectors, flat, 600, "cuda")[1]
    assert torch.equal(sums, ordered_gradient(vectors.float(), flat[:, None], 600))


@pytest.mark.gpu
@kernel_room
@pytest.mark.parametrize(
    "sizes", [(8192, 4, 16384, 256), (8192, 4, 2048, 256), (65536, 4, 16384, 64), (65537, 4, 300, 8)]
)
def test_gradient_at_training_sizes(room, sizes):
    """RQ-VAE's two codebooks, as many entries as clusters take, and one row more than that."""
    backend, device, dtype = room
    codes, _ = inputs(*sizes, shared=True, dtype=dtype, device=device)
    for skewed in (False, True):
        if skewed:
            codes[::3] = 7
        grad = torch.randn(sizes[0], sizes[3], device=device).to(dtype)
        arguments = (grad, codes, sizes[2], True, False)
        exact = BACKWARD(grad.double(), *arguments[1:], "eager")
        assert_as_good_as_eager(BACKWARD(*arguments, backend), BACKWARD(*arguments, "eager"), exact)


def test_compiled_backward_counts_codes_in_32_bits(monkeypatch):
    monkeypatch.setattr(_native, "cuda_unfit", lambda tensor: None)
    codes = torch.zeros(1, 1, dtype=torch.int64).expand(2**30, 2)
    reasons = BACKWARD.explain(torch.zeros(1, 8), codes, 4, True, False)
    assert reasons["cuda"] == "needs fewer than 2^31 codes, got 2147483648"
    assert BACKWARD.explain(torch.zeros(1, 8), codes[1:], 4, True, False)["cuda"] == "fits"


@pytest.mark.parametrize("cumulative", [False, True])
@pytest.mark.parametrize("shared", [True, False])
def test_gradcheck(shared, cumulative):
    codes, codebook = inputs(6, 3, 4, 2, shared=shared, dtype=torch.float64, device="cpu")
    codebook.requires_grad_()

    def function(book):
        return residual_lookup(codes, book, cumulative=cumulative)

    assert torch.autograd.gradcheck(function, (codebook,))
    assert torch.autograd.gradgradcheck(function, (codebook,))


@every_room
def test_gradient_reaches_the_backend_asked_for(room, monkeypatch):
    backend, device, dtype = room
    codes, codebook = inputs(5, 2, 3, 16, shared=True, dtype=dtype, device=device)
    codebook.requires_grad_()
    chosen = []
    choose = BACKWARD.choose
    monkeypatch.setattr(BACKWARD, "choose", lambda *args: chosen.append(choose(*args)) or chosen[-1])
    residual_lookup(codes, codebook, backend=backend).float().square().sum().backward()
    assert [b.name for b in chosen] == [backend]
    expected = oracle_gradient(2 * residual_lookup(codes, codebook.detach()), codes, codebook, False)
    torch.testing.assert_close(codebook.grad.double(), expected, rtol=1e-2, atol=1e-2)


def test_codes_out_of_range_raise_on_the_cpu():
    codebook = torch.randn(4, 8)
    for backend in ["eager"] if interpreter_skip() else ["eager", "triton"]:
        for bad in (4, -2, 2**62):
            codes = torch.tensor([[0, bad]])
            with pytest.raises(ValueError, match=rf"residual_lookup: codes must be -1 or in \[0, 4\), got {bad}"):
                residual_lookup(codes, codebook, backend=backend)
            with pytest.raises(ValueError, match="residual_lookup_backward: codes"):
                BACKWARD(torch.randn(1, 8), codes, 4, True, False, backend)
    with pytest.raises(ValueError, match="code_statistics: codes"):
        ops.code_statistics(torch.randn(1, 8), torch.tensor([9]), 4)


@pytest.mark.gpu
@pytest.mark.parametrize("backend", ["eager", "triton", "cuda"])
def test_codes_out_of_range_add_nothing_on_a_gpu(backend):
    codebook = torch.randn(4, 8, device="cuda")
    codes = torch.tensor([[0, 4], [-2, 1], [2**62, 2**32 + 1], [-(2**63), 3]], device="cuda")
    known = torch.tensor([[0, -1], [-1, 1], [-1, -1], [-1, 3]], device="cuda")
    assert torch.equal(residual_lookup(codes, codebook, backend=backend), residual_lookup(known, codebook))
    grad = torch.randn(4, 8, device="cuda")
    got, want = (BACKWARD(grad, c, 4, True, False, backend) for c in (codes, known))
    torch.testing.assert_close(got, want)


BAD_LOOKUP = {
    "codes float": (lambda: (torch.zeros(2, 3), torch.zeros(4, 5)), TypeError, "codes must be int64"),
    "codes int32": (lambda: (torch.zeros(2, 3, dtype=torch.int32), torch.zeros(4, 5)), TypeError, "got int32"),
    "codes a list": (lambda: ([[0]], torch.zeros(4, 5)), TypeError, "codes must be a tensor, got list"),
    "codes scalar": (lambda: (torch.tensor(0), torch.zeros(4, 5)), ValueError, "codes must be"),
    "no depth": (lambda: (torch.zeros(2, 0, dtype=torch.int64), torch.zeros(4, 5)), ValueError, "D at least 1"),
    "codebook int": (lambda: (torch.zeros(2, 3).long(), torch.zeros(4, 5).long()), TypeError, "codebook must be"),
    "codebook 1-d": (lambda: (torch.zeros(2, 3).long(), torch.zeros(4)), ValueError, r"got \(4,\)"),
    "codebook empty": (lambda: (torch.zeros(2, 3).long(), torch.zeros(0, 4)), ValueError, "no empty dimension"),
    "depths differ": (lambda: (torch.zeros(2, 3).long(), torch.zeros(2, 4, 5)), ValueError, r"\(\.\.\., 2\)"),
    "devices differ": (lambda: (torch.zeros(2, 3).long(), torch.zeros(4, 5, device="meta")), ValueError, "device"),
}


@pytest.mark.parametrize(("make", "error", "text"), BAD_LOOKUP.values(), ids=BAD_LOOKUP)
def test_lookup_refuses(make, error, text):
    with pytest.raises(error, match=text) as raised:
        residual_lookup(*make())
    assert str(raised.value).startswith("residual_lookup: ")


# ---- code_statistics -------------------------------------------------------------------------------------------------


# vectors, codes, channels
STATISTICS_SHAPES = {
    "one of everything": (1, 1, 1),
    "odd": (61, 5, 33),
    "packs": (300, 20, 64),
    "two codes": (200, 2, 8),
    "more codes than vectors": (40, 2**18, 8),
    "one vector": (1, 40, 1152),
    "no vectors": (0, 6, 16),
}


def statistics_oracle(residuals, codes, num_codes):
    known = codes.flatten() >= 0
    rows = codes.flatten()[known].cpu().numpy()
    sums = np.zeros((num_codes, residuals.shape[-1]))
    np.add.at(sums, rows, residuals.flatten(0, -2)[known].double().cpu().numpy())
    return np.bincount(rows, minlength=num_codes), torch.from_numpy(sums).to(residuals.device)


def check_statistics(residuals, codes, num_codes, backend):
    counts, sums = ops.code_statistics(residuals, codes, num_codes, backend=backend)
    want, exact = statistics_oracle(residuals, codes, num_codes)
    assert counts.tolist() == want.tolist()
    assert counts.dtype == sums.dtype == (torch.float64 if residuals.dtype == torch.float64 else torch.float32)
    # Eager on the CPU: on a GPU it adds with atomics, in another order every time, now better and now worse.
    _, eager = ops.code_statistics(residuals.cpu(), codes.cpu(), num_codes, backend="eager")
    if backend == "eager" and sums.is_cuda:
        torch.testing.assert_close(sums.double(), exact, rtol=1e-5, atol=1e-2)
    else:
        assert_as_good_as_eager(sums.cpu(), eager, exact.cpu())
    return counts, sums


@every_room
@pytest.mark.parametrize("shape", STATISTICS_SHAPES.values(), ids=STATISTICS_SHAPES)
def test_statistics(room, shape):
    backend, device, dtype = room
    rows, num_codes, channels = shape
    if backend == "triton" and device == "cpu" and num_codes > 1000:
        pytest.skip("takes the interpreter minutes")
    codes, residuals = inputs(rows, 1, max(rows, 1), channels, shared=True, dtype=dtype, device=device)
    codes = torch.randint(-1, num_codes, (rows,), generator=torch.Generator().manual_seed(7)).to(device)
    check_statistics(residuals[:rows], codes, num_codes, backend)


@every_room
def test_statistics_of_a_skewed_choice_with_strides(room):
    """Nearly all vectors chose code 3; the vectors are columns of a matrix, the codes every other element."""
    backend, device, dtype = room
    rows = 300 if device == "cpu" else 20000
    codes, _ = inputs(rows, 4, 9, 24, shared=True, dtype=dtype, device=device)
    codes[torch.arange(rows, device=device) % 16 != 0] = 3
    residuals = torch.randn(4, 24, rows, device=device).to(dtype).permute(2, 0, 1)
    first = check_statistics(residuals[:, ::2], codes[:, ::2], 9, backend)
    if backend != "eager":
        again = ops.code_statistics(residuals[:, ::2], codes[:, ::2], 9, backend=backend)
        assert torch.equal(first[1], again[1]), "no atomics: bit-equal between runs"


def test_statistics_in_float64(device):
    residuals = torch.randn(4, 60, 10, generator=torch.Generator().manual_seed(7)).double().to(device)
    codes = torch.randint(-1, 13, (4, 60), generator=torch.Generator().manual_seed(8)).to(device)
    check_statistics(residuals, codes, 13, "auto")
    counts, sums = ops.code_statistics(residuals[..., :0], codes, 13)
    assert counts.sum() == (codes >= 0).sum()
    assert sums.shape == (13, 0)


def test_statistics_backends_say_what_they_lack(monkeypatch):
    monkeypatch.setattr(_native, "cuda_unfit", lambda tensor: None)
    codes = torch.zeros(1, dtype=torch.int64)
    assert STATISTICS.explain(torch.zeros(1, 8), codes, 4)["cuda"] == "fits"
    assert STATISTICS.explain(torch.zeros(1, 0), codes, 4)["cuda"] == "needs at least one channel, got 0"
    assert "got float64" in STATISTICS.explain(torch.zeros(1, 8).double(), codes, 4)["cuda"]
    many = codes.expand(2**31)
    assert STATISTICS.explain(torch.zeros(1, 8), many, 4)["cuda"] == "needs fewer than 2^31 codes, got 2147483648"


@pytest.mark.gpu
@kernel_room
def test_statistics_at_published_sizes(room):
    """VILA-U 384 and RQ-VAE FFHQ: all depths of a step; the first takes shared memory that has to be asked for."""
    backend, device, dtype = room
    for rows, num_codes, channels in ((5832 * 16, 16384, 1152), (8192 * 4, 2048, 256)):
        residuals = torch.randn(rows, channels, device=device).to(dtype)
        codes = torch.randint(num_codes, (rows,), device=device)
        exact = STATISTICS(residuals.double(), codes, num_codes, "eager")
        got, eager = (STATISTICS(residuals, codes, num_codes, name) for name in (backend, "eager"))
        assert torch.equal(got[0].double(), exact[0])
        assert_as_good_as_eager(got[1], eager[1], exact[1])


@pytest.mark.gpu
@pytest.mark.parametrize("backend", ["eager", "triton", "cuda"])
def test_statistics_leave_out_codes_out_of_range_on_a_gpu(backend):
    residuals = torch.randn(8, 8, device="cuda")
    codes = torch.tensor([0, 4, -2, 1, 2**62, 2**32 + 1, -(2**63), 3], device="cuda")
    known = torch.tensor([0, -1, -1, 1, -1, -1, -1, 3], device="cuda")
    got, want = (STATISTICS(residuals, some, 4, backend) for some in (codes, known))
    assert torch.equal(got[0], want[0])
    torch.testing.assert_close(got[1], want[1])


BAD_STATISTICS = {
    "shapes differ": ((torch.zeros(4, 3), torch.zeros(5).long(), 2), ValueError, r"\(4,\), got \(5,\)"),
    "codes float": ((torch.zeros(4, 3), torch.zeros(4), 2), TypeError, "int64"),
    "no codes": ((torch.zeros(4, 3), torch.zeros(4).long(), 0), ValueError, "num_codes must be at least 1"),
    "num_codes float": ((torch.zeros(4, 3), torch.zeros(4).long(), 2.0), TypeError, "num_codes"),
}


@pytest.mark.parametrize(("args", "error", "text"), BAD_STATISTICS.values(), ids=BAD_STATISTICS)
def test_statistics_refuses(args, error, text):
    with pytest.raises(error, match=text) as raised:
        ops.code_statistics(*args)
    assert str(raised.value).startswith("code_statistics: ")


# ---- torch.library, torch.compile ------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "name", ["residual_lookup", "residual_lookup_backward", "residual_quantize", "code_statistics"]
)
def test_opcheck(name, device):
    codes, codebook = inputs(6, 3, 5, 8, shared=False, dtype=torch.float32, device=device, unknown=False)
    backend = "triton" if device == "cuda" or not interpreter_skip() else "eager"
    arguments = {
        "residual_lookup": (codes, codebook.requires_grad_(), True, "auto"),
        "residual_lookup_backward": (torch.randn(6, 8, device=device, requires_grad=True), codes, 5, False, False),
        "residual_quantize": (torch.randn(6, 8, device=device, requires_grad=True), codebook, 3, "l2", backend),
        "code_statistics": (torch.randn(6, 3, 8, device=device), codes, 5),
    }[name]
    torch.library.opcheck(registry[name].overload, arguments)


@every_room
def test_compiles_whole_with_dynamic_shapes(room, fresh_compiler):
    backend, device, dtype = room

    def function(codes, codebook):
        sums = residual_lookup(codes, codebook, cumulative=True, backend=backend)
        searched = residual_quantize(codebook, codebook, 2, backend="auto" if backend == "cuda" else backend)
        counts, totals = ops.code_statistics(sums.detach(), codes, 5, backend=backend)
        moved = (totals / counts[:, None].clamp(min=1)).sum() * 1e-3
        return (sums.float() * 2).sum() + moved + searched.quantized.float().sum()

    compiled = torch.compile(function, fullgraph=True, dynamic=True, backend="aot_eager")
    for rows in (3, 6):
        codes, codebook = inputs(rows, 2, 5, 16, shared=True, dtype=dtype, device=device, seed=rows)
        results = []
        for run in (function, compiled):
            book = codebook.clone().requires_grad_()
            out = run(codes, book)
            out.backward()
            results.append((out.detach(), book.grad))
        torch.testing.assert_close(results[1], results[0])


# ---- the CUDA source without a GPU -----------------------------------------------------------------------------------

EXPORTS = """
using namespace unifiedar;
extern "C" int lookup(const int64_t* codes, const void* book, void* out, int64_t rows, int num_codes, int depth,
                      int channels, int shared, int element, int dtype, int cumulative) {
  const int64_t entry = int64_t(channels) * element;
  const LookupArgs args{codes, book, out, rows, shared ? 0 : num_codes * entry, unsigned(num_codes), unsigned(entry),
                        depth, channels};
  return launch_residual_lookup(args, DType(dtype), cumulative, nullptr);
}
extern "C" int backward(const void* grad, const int64_t* codes, void* workspace, int64_t* bytes, void* out, int entries,
                        int num_codes, int depth, int channels, int shared, int dtype, int cumulative, float* counts) {
  size_t size = *bytes;
  const LookupBackwardArgs args{grad, codes, workspace, size, out, entries, num_codes, depth, channels, shared != 0,
                                counts};
  if (workspace != nullptr && counts != nullptr) return launch_code_statistics(args, DType(dtype), nullptr);
  if (workspace != nullptr) return launch_residual_lookup_backward(args, DType(dtype), cumulative, nullptr);
  const int error = workspace_residual_lookup_backward(args, &size);
  *bytes = size;
  return error;
}
"""


@pytest.fixture(scope="module")
def on_host(tmp_path_factory):
    return compile_on_host(["codes.cu", "codes_sm90.cu"], EXPORTS, tmp_path_factory.mktemp("codes"))


def pointer(tensor):
    return ctypes.c_void_p(tensor.data_ptr())


NUMBER = {torch.float32: 0, torch.bfloat16: 1, torch.float16: 2}  # DType of csrc/


def backward_on_host(library, clusters, grad, codes, num_codes, shared, cumulative, *, statistics=False, offset=64):
    """The backward, or code_statistics, by the CUDA source, in guarded buffers, on a GPU that runs so many clusters.

    Returns:
        The gradient, or (counts, sums).
    """
    library.use_device(clusters)
    depth, channels = codes.shape[-1], grad.shape[-1]
    dtype = torch.float32 if statistics else grad.dtype
    result, check = guarded((num_codes, channels) if shared else (depth, num_codes, channels), dtype, "cpu", offset)
    counts, check_counts = guarded((num_codes,), torch.float32, "cpu", 3)
    size = ctypes.c_int64(0)
    head = pointer(grad), pointer(codes)
    tail = (pointer(result), codes.numel(), num_codes, depth, channels, int(shared), NUMBER[grad.dtype],
            int(cumulative), pointer(counts) if statistics else None)  # fmt: skip
    assert not library.backward(*head, None, ctypes.byref(size), *tail)
    workspace = torch.full((size.value + 256,), 7, dtype=torch.uint8)
    assert not library.backward(*head, pointer(workspace), ctypes.byref(size), *tail)
    check()
    assert (workspace[size.value :] == 7).all(), "wrote after the workspace"
    size.value -= 1
    assert library.backward(*head, pointer(workspace), ctypes.byref(size), *tail), "takes too small a workspace"
    if not statistics:
        return result
    check_counts()
    return counts, result


# The last one is large enough for channels in slices and for two passes of the sort.
HOST_SHAPES = {
    **{name: shape for name, shape in SHAPES.items() if shape[0]},
    "many chunks": (700, 4, 300, 24),
    "slices": (4100, 8, 8200, 1032),
}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("shape", HOST_SHAPES.values(), ids=HOST_SHAPES)
def test_cuda_source_on_the_host(on_host, shape, dtype):
    rows, depth, num_codes, channels = shape
    large = rows * channels > 10**6
    cases = itertools.product(*([[True], [False], [0]] if large else [[True, False], [False, True], [0, 3]]))
    for shared, cumulative, offset in cases if not large or dtype == torch.bfloat16 else ():
        codes, codebook = inputs(*shape, shared=shared, dtype=dtype, device="cpu")
        if not large:
            codes[::3, 0] = num_codes - 1  # a segment of many chunks
        sums = (rows, depth, channels) if cumulative else (rows, channels)
        out, check = guarded(sums, dtype, "cpu", 64 + offset)
        assert not on_host.lookup(pointer(codes), pointer(codebook), pointer(out), ctypes.c_int64(rows), num_codes,
                                  depth, channels, int(shared), dtype.itemsize, NUMBER[dtype],
                                  int(cumulative))  # fmt: skip
        check()
        assert torch.equal(out, residual_lookup(codes, codebook, cumulative=cumulative))

        grad = torch.randn(sums).to(dtype)
        arguments = (grad, codes, num_codes, shared, cumulative)
        exact = BACKWARD(grad.double(), *arguments[1:], "eager")
        result = backward_on_host(on_host, 0, *arguments, offset=64 + offset)
        assert_as_good_as_eager(result, BACKWARD(*arguments, "eager"), exact)
        if not offset or dtype == torch.float32:
            clustered = backward_on_host(on_host, 3, *arguments, offset=64 + offset)
            assert torch.equal(clustered, result), "another order of summation"


@pytest.mark.parametrize("num_codes", [2500, 2**14 - 1, 2**14, 2**18 - 3])
def test_clusters_with_many_rows_on_the_host(on_host, num_codes):
    """More rows than a cluster's threads, as many as it can name, and more, which are sorted instead."""
    codes, _ = inputs(500, 1, 1, 8, shared=True, dtype=torch.float32, device="cpu")
    codes = torch.randint(-1, num_codes, codes.shape, generator=torch.Generator().manual_seed(3))
    codes[100:300] = num_codes - 1
    grad = torch.randn(500, 8)
    got = backward_on_host(on_host, 1, grad, codes, num_codes, True, False)
    assert torch.equal(got, ordered_gradient(grad, codes, num_codes))


def test_clusters_with_many_entries_on_the_host(on_host):
    """More entries than a thread keeps in registers, and rows of up to two chunks of them, or more."""
    codes = torch.randint(-1, 3000, (12000, 4), generator=torch.Generator().manual_seed(4))
    codes[::13, 0], codes[::70, 3] = 2999, 7
    grad = torch.randn(12000, 5)
    for shared in (True, False):
        want = backward_on_host(on_host, 0, grad, codes, 3000, shared, False)
        assert torch.equal(backward_on_host(on_host, 3, grad, codes, 3000, shared, False), want)


# What clusters do with codes that are not even. Rows of `codes` as (times, code).
SKEWS = {
    "all one code": [(3000, 5)],
    "two codes, far apart": [(900, 0), (1, 6), (1100, 399)],
    "rows of every kind": [(8, 1), (9, 2), (70, 3), (300, 4), (1500, 5), (1, 6), (40, 7), (700, 8), (2, 250)],
    "rows of one cluster": [(15, code) for code in range(200)],
    "nothing but unknown": [(50, -1), (20, 400), (20, 2**32 + 1), (9, -(2**63))],
    "one": [(1, 17)],
}


@pytest.mark.parametrize("skew", SKEWS.values(), ids=SKEWS)
def test_clusters_with_uneven_codes_on_the_host(on_host, skew):
    codes = torch.cat([torch.full((times,), code) for times, code in skew])
    for seed, depth in enumerate((1, 4)):
        generator = torch.Generator().manual_seed(seed)
        chosen = codes[torch.randperm(len(codes), generator=generator)]
        chosen = torch.cat([chosen, torch.full((-len(codes) % depth,), -1)]).view(-1, depth)
        for dtype, channels in ((torch.float32, 40), (torch.bfloat16, 136), (torch.float16, 7)):
            for cumulative in (False, True):
                shape = (*chosen.shape, channels) if cumulative else (len(chosen), channels)
                grad = torch.randn(shape, generator=generator).to(dtype)
                arguments = (grad, chosen, 400, True, cumulative)
                want = backward_on_host(on_host, 0, *arguments)
                assert torch.equal(backward_on_host(on_host, 2, *arguments), want)
                known = chosen.where((chosen >= 0) & (chosen < 400), -1)
                exact = BACKWARD(grad.double(), known, *arguments[2:], "eager")
                assert_as_good_as_eager(want, BACKWARD(grad, known, *arguments[2:], "eager"), exact)
            if depth == 1:
                vectors = torch.randn(len(chosen), channels, generator=generator).to(dtype)
                for clusters in (0, 2):
                    arguments = (vectors, chosen, 400, True, False)
                    counts, sums = backward_on_host(on_host, clusters, *arguments, statistics=True)
                    right = STATISTICS(vectors, known[:, 0], 400, "eager")
                    exact = STATISTICS(vectors.double(), known[:, 0], 400, "eager")
                    assert torch.equal(counts, right[0])
                    assert_as_good_as_eager(sums, right[1], exact[1])


# ---- on a GPU: races, graphs, streams, syncs, large offsets ----------------------------------------------------------

gpu_kernels = pytest.mark.parametrize("room", [("triton", "cuda", torch.bfloat16), ("cuda", "cuda", torch.bfloat16)],
                                      indirect=True, ids=["triton", "cuda"])  # fmt: skip


@pytest.mark.gpu
@gpu_kernels
@pytest.mark.parametrize("skewed", [False, True])
def test_two_thousand_launches_agree(room, skewed):
    backend, device, dtype = room
    codes, codebook = inputs(3000, 4, 500, 264, shared=True, dtype=dtype, device=device)
    if skewed:
        codes[::3] = 7
    grad = torch.randn(3000, 264, device=device).to(dtype)

    def run():
        return (
            residual_lookup(codes, codebook, backend=backend),
            BACKWARD(grad, codes, 500, True, False, backend),
            *STATISTICS(grad, codes[:, 0], 500, backend),
        )

    first = run()
    differ = torch.zeros((), dtype=torch.int64, device=device)
    for _ in range(2000):
        for got, want in zip(run(), first, strict=True):
            differ += (got != want).any()
    assert differ.item() == 0


@pytest.mark.gpu
@gpu_kernels
def test_cuda_graph(room):
    backend, device, dtype = room
    codes, codebook = inputs(200, 4, 50, 64, shared=True, dtype=dtype, device=device)
    grad = torch.randn(200, 4, 64, device=device).to(dtype)

    def run():
        return (
            residual_lookup(codes, codebook, cumulative=True, backend=backend),
            BACKWARD(grad, codes, 50, True, True, backend),
            *STATISTICS(grad[:, 0], codes[:, 0], 50, backend),
        )

    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        run()
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = run()
    for seed in (1, 2):
        fresh, book = inputs(200, 4, 50, 64, shared=True, dtype=dtype, device=device, seed=seed)
        codes.copy_(fresh)
        codebook.copy_(book)
        graph.replay()
        for got, want in zip(captured, run(), strict=True):
            assert torch.equal(got, want)


@pytest.mark.gpu
@gpu_kernels
def test_current_stream(room):
    backend, device, dtype = room
    codes, codebook = inputs(4096, 4, 50, 256, shared=True, dtype=dtype, device=device)
    want = residual_lookup(codes, codebook, backend=backend)
    late = torch.zeros_like(codes)
    torch.cuda.synchronize()
    with torch.cuda.stream(torch.cuda.Stream()):
        torch.cuda._sleep(200_000_000)  # about 0.1 s: a launch on any other stream would see zeros
        late.copy_(codes)
        got = residual_lookup(late, codebook, backend=backend)
        counts, _ = STATISTICS(got, late[:, 0], 50, backend)
    torch.cuda.synchronize()
    assert torch.equal(got, want)
    assert counts.tolist() == torch.bincount(codes[codes[:, 0] >= 0, 0], minlength=50).tolist()


@pytest.mark.gpu
@pytest.mark.parametrize("backend", ["eager", "triton", "cuda"])
def test_no_host_sync(backend):
    codes, codebook = inputs(64, 4, 50, 64, shared=True, dtype=torch.float32, device="cuda")
    x = torch.randn(64, 64, device="cuda")

    def run():
        residual_lookup(codes, codebook, backend=backend)
        BACKWARD(x, codes, 50, True, False, backend)
        residual_quantize(x, codebook, 4)
        ops.code_statistics(x, codes[:, 0], 50, backend=backend)

    run()
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    try:
        run()
    finally:
        torch.cuda.set_sync_debug_mode("default")


@pytest.mark.gpu
@gpu_kernels
def test_more_than_two_to_the_31_elements(room):
    backend, device, dtype = room
    rows, channels = 2**21 + 8, 1024
    if torch.cuda.get_device_properties(0).total_memory < 24 << 30:
        pytest.skip("needs 24 GiB of GPU memory")
    table = torch.arange(channels, device=device).to(dtype)
    codebook = table.repeat(8, 1) + torch.arange(8, device=device)[:, None].to(dtype)
    codes = (torch.arange(rows, device=device) % 8)[:, None]
    out = residual_lookup(codes, codebook, backend=backend)  # a large output
    assert torch.equal(out[-8:], codebook)
    assert torch.equal(out[: rows // 2], residual_lookup(codes[: rows // 2], codebook, backend=backend))
    gradient = BACKWARD(out, codes, 8, True, False, backend)  # a large gradient
    exact = codebook.double() * (rows // 8)
    torch.testing.assert_close(gradient.double(), exact, rtol=1e-2, atol=0)
    last = torch.arange(rows - 8, rows, device=device)[:, None]
    assert torch.equal(residual_lookup(last, out, backend=backend), codebook)  # a large codebook
    gradient = BACKWARD(codebook, last, rows, True, False, backend)  # and its gradient
    assert torch.equal(gradient[-8:], codebook)
    assert not gradient[:-8].any()
