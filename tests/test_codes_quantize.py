"""`residual_quantize`: every backend against a float64 search, the bound of the search, adversarial inputs."""

import math
import threading

import numpy as np
import pytest
import torch
from helpers import guarded, interpreter_skip, kernel_rooms

from unifiedar.ops import _native, registry, residual_lookup, residual_quantize
from unifiedar.ops import codes as family

QUANTIZE = registry["residual_quantize"]

rooms = pytest.mark.parametrize(
    "room", [case for case in kernel_rooms() if case.values[0][0] != "cuda"], indirect=True
)  # fmt: skip
triton_rooms = pytest.mark.parametrize(
    "room", [case for case in kernel_rooms() if case.values[0][0] == "triton"], indirect=True
)
triton_float32 = pytest.mark.parametrize(
    "room",
    [case for case in kernel_rooms() if case.values[0][0] == "triton" and case.values[0][2] == torch.float32],
    indirect=True,
)
gpu_triton = pytest.mark.parametrize(
    "room", [case for case in kernel_rooms() if case.values[0][:2] == ("triton", "cuda")], indirect=True
)


@pytest.fixture
def kernels():
    """The module of Triton kernels, and its plans forgotten afterwards."""
    if not torch.cuda.is_available() and (reason := interpreter_skip()):
        pytest.skip(reason)
    module = _native.kernels("codes_quantize")
    module.plan.cache_clear()
    yield module
    module.plan.cache_clear()


def losses(rows, table, metric):
    """(N, K) float64: squared distances, or negative cosines times |row|; a bounded number of rows at a time."""
    rows, table = rows.double(), table.double()
    if metric == "cosine":
        return -(rows @ table.T) / table.norm(dim=1).clamp_min(1e-12)
    step = max(1, 2**24 // table.numel())
    return torch.cat([(part[:, None] - table).square().sum(-1) for part in rows.split(step)])


def check(x, codebook, got, metric="l2"):
    """Along the path that the codes took: each within 1e-6 of the best. Returns how many are not the float64 argmin.

    The residuals are float32, as the definition has them.
    """
    codes, quantized = got
    depth = codes.shape[-1]
    assert codes.dtype == torch.int64
    assert codes.shape == (*x.shape[:-1], depth)
    assert (quantized.dtype, quantized.shape) == (x.dtype, x.shape)
    assert quantized.is_contiguous()
    if not codes.numel():
        return 0
    assert codes.min() >= 0
    assert codes.max() < codebook.shape[-2]
    residual, flat, differ = x.float().reshape(-1, x.shape[-1]), codes.reshape(-1, depth), 0
    for d in range(depth):
        table = family._level(codebook, d).float()
        loss = losses(residual, table, metric)
        best, chosen = loss.min(1).values, loss.gather(1, flat[:, d : d + 1])[:, 0]
        assert (chosen <= best + 1e-6 * best.abs()).all()
        differ += (flat[:, d] != loss.argmin(1)).sum().item()
        residual = residual - table[flat[:, d]]
    total = residual_lookup(codes, codebook.float(), backend="eager").to(x.dtype)
    assert torch.equal(quantized, total), "one order of summation, one rounding: equal on every backend"
    return differ


def normal(*shape, seed, room, scale=1.0):
    _, device, dtype = room
    return (torch.randn(shape, generator=torch.Generator().manual_seed(seed)) * scale).to(device, dtype)


# ---- every backend ---------------------------------------------------------------------------------------------------

# rows, codes, channels, depth; few rows, because the interpreter takes 10 ms for one
SHAPES = {
    "one of everything": (1, 1, 1, 1),
    "two codes": (5, 2, 4, 2),
    "one past a subtile": (6, 65, 4, 3),
    "one past two tiles of codes": (3, 513, 33, 2),
    "one past four blocks of channels": (3, 30, 257, 2),
    "wide": (2, 200, 1152, 2),  # VILA-U 384's width
    "widest": (2, 70, 2048, 1),
    "deep": (1, 17, 24, 16),  # VILA-U 384's depth
    "no rows": (0, 17, 24, 3),
}


@rooms
@pytest.mark.parametrize(
    ("metric", "shared"), [("l2", True), ("l2", False), ("cosine", True)], ids=["l2", "l2, per depth", "cosine"]
)
@pytest.mark.parametrize("shape", SHAPES.values(), ids=SHAPES)
def test_every_code_is_the_nearest(room, shape, metric, shared):
    rows, num_codes, channels, depth = shape
    x = normal(rows, channels, seed=1, room=room)
    codebook = normal(*(() if shared else (depth,)), num_codes, channels, seed=2, room=room, scale=0.7)
    got = residual_quantize(x, codebook, depth, metric=metric, backend=room[0])
    differ = check(x, codebook, got, metric)
    if room[0] == "triton":
        assert differ == 0


@rooms
def test_one_row_past_a_tile(room):
    x, codebook = normal(129, 16, seed=36, room=room), normal(70, 16, seed=37, room=room)
    assert check(x, codebook, residual_quantize(x, codebook, 1, backend=room[0])) == 0


@rooms
def test_leading_dimensions_and_strides(room):
    backend = room[0]
    x = normal(12, 24, seed=3, room=room)
    codebook = normal(2, 40, 24, seed=4, room=room)
    want = residual_quantize(x, codebook, backend="eager")
    many = residual_quantize(x.view(3, 4, 24), codebook, backend=backend)
    assert torch.equal(many.codes, want.codes.view(3, 4, 2))
    assert torch.equal(many.quantized, want.quantized.view(3, 4, 24))
    assert torch.equal(residual_quantize(x[7], codebook, backend=backend).codes, want.codes[7])
    for strided in (
        x.T.contiguous().T,  # strides (1, 12)
        torch.stack([x, x], 1)[:, 0],  # every other row
        x.view(3, 4, 24).transpose(0, 1).contiguous().transpose(0, 1),  # rows that no one stride reaches
    ):
        got = residual_quantize(strided, codebook, backend=backend)
        assert torch.equal(got.codes.reshape(12, 2), want.codes)
        assert torch.equal(got.quantized.reshape(12, 24), want.quantized)
    padded = torch.full((2, 41, 29), torch.nan, dtype=x.dtype, device=x.device)
    padded[:, :40, 3:27] = codebook  # a padding row, padded rows, not aligned
    for strided in (padded[:, :40, 3:27], codebook.transpose(1, 2).contiguous().transpose(1, 2)):
        assert torch.equal(residual_quantize(x, strided, backend=backend).codes, want.codes)


@rooms
def test_dtypes_may_differ(room):
    backend, device, _ = room
    x = normal(8, 20, seed=5, room=room)
    for other in (torch.float32, torch.float16) if device == "cpu" else (torch.float32, torch.float16, torch.bfloat16):
        codebook = normal(50, 20, seed=6, room=(backend, device, other))
        assert check(x, codebook, residual_quantize(x, codebook, 2, backend=backend)) == 0


@rooms
def test_ties_go_to_the_lowest_index(room):
    backend, device, dtype = room
    generator = torch.Generator().manual_seed(7)
    whole = torch.randint(-3, 4, (97, 6), generator=generator).to(device, dtype)  # every sum is exact
    codebook = torch.cat([whole, whole, whole])
    x = (torch.randint(-6, 7, (10, 6), generator=generator) / 2).to(device, dtype)
    got = residual_quantize(x, codebook, 2, backend=backend)
    assert check(x, codebook, got) == 0
    assert got.codes.max() < 97
    repeated = normal(97, 33, seed=8, room=room).repeat(3, 1)
    x = normal(10, 33, seed=9, room=room)
    assert residual_quantize(x, repeated, 2, backend=backend).codes.max() < 97
    scaled = torch.cat([repeated[:97], 4 * repeated[:97]])  # the same directions
    assert residual_quantize(x, scaled, 1, metric="cosine", backend=backend).codes.max() < 97
    if backend != "eager":  # where a matrix product may round equal columns differently
        assert residual_quantize(x, x[:1].expand(70, 33), 2, backend=backend).codes.max() == 0


@rooms
def test_zeros(room):
    backend = room[0]
    x, codebook = normal(6, 12, seed=10, room=room), normal(66, 12, seed=11, room=room)
    x[::2] = 0
    codebook[65] = 0
    got = residual_quantize(x, codebook, 2, backend=backend)
    assert check(x, codebook, got) == 0
    assert (got.codes[::2] == 65).all()
    got = residual_quantize(x, codebook, 1, metric="cosine", backend=backend)
    assert check(x, codebook, got, "cosine") == 0
    assert (got.codes[::2] == 0).all(), "all cosines are equal"
    exact = residual_quantize(codebook, codebook, 2, backend=backend)  # nothing is left after the first depth
    assert torch.equal(exact.codes[:, 0], torch.arange(66, device=x.device))
    assert (exact.codes[:, 1] == 65).all()


@rooms
@pytest.mark.filterwarnings("ignore:invalid value:RuntimeWarning")  # the interpreter's
def test_rows_that_are_not_finite(room):
    """NaN takes code 0; what infinity takes differs between backends, but is a code. Other rows do not notice."""
    backend = room[0]
    x, codebook = normal(9, 12, seed=12, room=room), normal(80, 12, seed=13, room=room)
    want = residual_quantize(x, codebook, 2, backend=backend).codes
    x[2, 5], x[4, 0], x[6] = torch.nan, torch.inf, -torch.inf
    for metric in ("l2", "cosine"):
        got = residual_quantize(x, codebook, 2, metric=metric, backend=backend).codes
        assert (got[2] == 0).all()
        assert ((got >= 0) & (got < 80)).all()
        if backend == "triton":
            assert (got[[4, 6]] == 0).all()
        if metric == "l2":
            assert torch.equal(got[[0, 1, 3, 5, 7, 8]], want[[0, 1, 3, 5, 7, 8]])
    for bad in (torch.nan, torch.inf):
        codebook[3, 3] = bad
        got = residual_quantize(x, codebook, 2, backend=backend).codes
        assert ((got >= 0) & (got < 80)).all()


@rooms
def test_autocast_and_tf32_change_nothing_and_are_restored(room):
    backend, device, _ = room
    x, codebook = normal(8, 64, seed=14, room=room), normal(512, 64, seed=15, room=room)
    before = torch.get_float32_matmul_precision()
    settings = (torch.backends.cuda.matmul, torch.backends.mkldnn.matmul)
    try:
        torch.set_float32_matmul_precision("medium")  # TF32 on a GPU, bfloat16 on CPUs that have it
        precisions = [setting.fp32_precision for setting in settings]
        results = []

        def work():
            with torch.autocast(device, dtype=torch.bfloat16):
                results.append(residual_quantize(x, codebook, 2, backend=backend))

        # Triton's interpreter is not for several threads.
        threads = [threading.Thread(target=work) for _ in range(1 if (backend, device) == ("triton", "cpu") else 4)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        assert [setting.fp32_precision for setting in settings] == precisions
        assert len(results) == len(threads)
        for got in results:
            assert check(x, codebook, got) == 0
    finally:
        torch.set_float32_matmul_precision(before)


def test_eager_in_pieces(device, monkeypatch):
    generator = torch.Generator().manual_seed(5)
    x = torch.randint(-4, 5, (8, 50), generator=generator).float().to(device).T  # (50, 8), not contiguous
    codebook = torch.randint(-4, 5, (9, 16), generator=generator).float().to(device).T[:, :8]
    whole = residual_quantize(x, codebook, 3, backend="eager")
    monkeypatch.setattr(family, "_SEARCH_BYTES", 7 * 16 * 4)  # 7 rows at a time
    pieces = residual_quantize(x, codebook, 3, backend="eager")
    assert torch.equal(whole.codes, pieces.codes)
    assert torch.equal(whole.quantized, pieces.quantized)
    assert check(x, codebook, pieces) == 0


@pytest.mark.parametrize("backend", ["auto", "eager"])
def test_float64(device, backend):
    generator = torch.Generator().manual_seed(16)
    x = torch.randn(30, 12, generator=generator, dtype=torch.float64).to(device)
    codebook = torch.randn(40, 12, generator=generator, dtype=torch.float64).to(device)
    codes, quantized = residual_quantize(x, codebook, 3, backend=backend)
    residual = x.clone()
    for d in range(3):
        assert torch.equal(codes[:, d], losses(residual, codebook, "l2").argmin(1))
        residual -= codebook[codes[:, d]]
    torch.testing.assert_close(quantized, x - residual)


def test_quantize_gives_no_gradient():
    x, codebook = torch.randn(5, 4, requires_grad=True), torch.randn(3, 4, requires_grad=True)
    codes, quantized = residual_quantize(x, codebook, 2)
    assert not codes.requires_grad
    assert not quantized.requires_grad


def test_what_the_kernels_do_not_take(monkeypatch):
    monkeypatch.setattr(_native, "triton_unfit", lambda tensor: None)
    x, codebook = torch.zeros(1, 4), torch.zeros(3, 4)
    assert QUANTIZE.explain(x, codebook, 1, "l2")["triton"] == "fits"
    wide = torch.zeros(1, 2049), torch.zeros(3, 2049)
    assert QUANTIZE.explain(*wide, 1, "l2")["triton"] == "needs at most 2048 channels, got 2049"
    many = torch.zeros(1, 4).expand(2**18 + 1, 4)
    assert QUANTIZE.explain(x, many, 1, "l2")["triton"] == "needs at most 2^18 codes, got 262145"
    for pair in ((x.double(), codebook), (x, codebook.double())):
        assert QUANTIZE.explain(*pair, 1, "l2")["triton"] == "needs float32, bfloat16 or float16, got float64"


BAD_QUANTIZE = {
    "x int": ((torch.zeros(2, 4).long(), torch.zeros(3, 4), 1), {}, TypeError, "x must be"),
    "channels differ": ((torch.zeros(2, 4), torch.zeros(3, 5), 1), {}, ValueError, r"x must be \(\.\.\., 5\)"),
    "no depth": ((torch.zeros(2, 4), torch.zeros(3, 4)), {}, ValueError, "depth must be given"),
    "depth 0": ((torch.zeros(2, 4), torch.zeros(3, 4), 0), {}, ValueError, "at least 1, got 0"),
    "depth 1.5": ((torch.zeros(2, 4), torch.zeros(3, 4), 1.5), {}, TypeError, "depth must be an integer"),
    "depth differs": ((torch.zeros(2, 4), torch.zeros(2, 3, 4), 3), {}, ValueError, "depth must be None or 2"),
    "metric": ((torch.zeros(2, 4), torch.zeros(3, 4), 1), {"metric": "l1"}, ValueError, "got 'l1'"),
    "empty codebook": ((torch.zeros(2, 4), torch.zeros(0, 4), 1), {}, ValueError, "no empty dimension"),
    "backend": ((torch.zeros(2, 4), torch.zeros(3, 4), 1), {"backend": "fast"}, ValueError, "got 'fast'"),
}


@pytest.mark.parametrize(("args", "kwargs", "error", "text"), BAD_QUANTIZE.values(), ids=BAD_QUANTIZE)
def test_quantize_refuses(args, kwargs, error, text):
    with pytest.raises(error, match=text) as raised:
        residual_quantize(*args, **kwargs)
    assert str(raised.value).startswith("residual_quantize: ")


# ---- adversaries of the search ---------------------------------------------------------------------------------------


def misleading(rows, num_codes, channels, generator):
    """x is one of the codes, and float16 rounds both down; the last code lies 2^-14 higher and is rounded up.

    So to the search the last code's score seems higher by C 2^-10, nearly the whole bound. The others are far away.
    """
    middle = 1 + 2.0**-11  # of two float16 numbers
    codebook = torch.rand(num_codes, channels, generator=generator) - 1
    codebook[-1] = middle + 2.0**-15
    codebook[3] = middle - 2.0**-15
    return codebook[3].repeat(rows, 1), codebook


def near_ties(rows, num_codes, channels, generator):
    """Codes around one point, at distances from the rows that differ by less than the bound, in all sizes down to 0."""
    centre = torch.randn(channels, generator=generator)
    offset = torch.randn(num_codes, channels, generator=generator)
    spread = 2.0 ** -torch.randint(8, 24, (num_codes, 1), generator=generator).float()
    return centre + 0.5 * torch.randn(rows, channels, generator=generator), centre + offset * spread


def norms_far_apart(rows, num_codes, channels, generator):
    scale = 10.0 ** (12 * torch.rand(num_codes, 1, generator=generator) - 6)
    x = torch.randn(rows, channels, generator=generator) * 10.0 ** (12 * torch.rand(rows, 1, generator=generator) - 6)
    return x, torch.randn(num_codes, channels, generator=generator) * scale


def one_huge_code(rows, num_codes, channels, generator):
    x, codebook = (torch.randn(n, channels, generator=generator) for n in (rows, num_codes))
    codebook[num_codes // 2] *= 1e9
    return x, codebook


def times(size):
    def make(rows, num_codes, channels, generator):
        return tuple(torch.randn(n, channels, generator=generator) * size for n in (rows, num_codes))

    return make


def apart(size):
    def make(rows, num_codes, channels, generator):
        x, codebook = (torch.randn(n, channels, generator=generator) for n in (rows, num_codes))
        return x * size, codebook / size

    return make


ADVERSARIES = {
    "misleading": misleading,
    "near ties": near_ties,
    "norms far apart": norms_far_apart,
    "one huge code": one_huge_code,
    "huge": times(1e30),
    "tiny": times(1e-30),
    "denormal": times(1e-41),
    "huge rows, tiny codes": apart(1e18),
    "tiny rows, huge codes": apart(1e-18),
    "denormal rows, huge codes": apart(1e-36),
}


@triton_float32
@pytest.mark.parametrize(("metric", "channels"), [("l2", 4), ("l2", 72), ("l2", 2048), ("cosine", 72)])
@pytest.mark.parametrize("adversary", ADVERSARIES)
def test_adversaries(room, adversary, channels, metric):
    backend, device, _ = room
    generator = torch.Generator().manual_seed(17)
    sizes = (2, 70, channels) if channels == 2048 else (3, 140, channels)
    x, codebook = (part.to(device) for part in ADVERSARIES[adversary](*sizes, generator))
    got = residual_quantize(x, codebook, 2, metric=metric, backend=backend)
    differ = check(x, codebook, got, metric)
    # Where even float64 distances are equal, or codes parallel, the argmin is one of many.
    if (adversary, metric) not in (("huge rows, tiny codes", "l2"), ("misleading", "cosine")):
        assert differ == 0, "decided in float64, so never another code"


@triton_float32
@pytest.mark.parametrize(("channels", "num_codes"), [(136, 2048), (256, 2048), (32, 4096), (256, 16384), (1024, 16384)])
@pytest.mark.parametrize("adversary", ["near ties", "plain", "misleading"])
def test_many_codes_at_a_time(room, kernels, monkeypatch, adversary, channels, num_codes):
    """The finish with Hopper's tiles, where every subtile is crowded and the last one short. Each code is there twice:
    the lower index has to win."""
    backend, device, _ = room
    wide = kernels.finish_tile(channels, num_codes, False, 90)
    assert wide != kernels.finish_tile(channels, num_codes, True, 90)
    assert wide != kernels.finish_tile(channels, num_codes, False, 80)
    monkeypatch.setattr(kernels, "finish_tile", lambda *_: wide)
    make = {**ADVERSARIES, "plain": times(1.0)}[adversary]
    x, codebook = (part.to(device) for part in make(3, 70, channels, torch.Generator().manual_seed(31)))
    codebook = codebook.repeat_interleave(2, 0)
    got = residual_quantize(x, codebook, 2, backend=backend)
    assert check(x, codebook, got) == 0
    assert (got.codes % 2 == 0).all()


@triton_float32
def test_the_adversary_bites(room, kernels, monkeypatch):
    """Without the bound the search alone decides, and `misleading` makes it wrong: so the tests above can fail."""
    backend, device, _ = room
    x, codebook = (part.to(device) for part in misleading(2, 140, 64, torch.Generator().manual_seed(17)))
    assert check(x, codebook, residual_quantize(x, codebook, 1, backend=backend)) == 0
    monkeypatch.setattr(kernels, "bound", lambda channels: (0.0, 0.0))
    got = residual_quantize(x, codebook, 1, backend=backend).codes
    assert (got[:, 0] != losses(x, codebook, "l2").argmin(1)).any()


# ---- the bound -------------------------------------------------------------------------------------------------------


def chopped_product(left, right):
    """Dot products of float16 rows as a tensor core that cuts everything off might form them: (N,) from (N, C) twice.

    Groups of 16 products and the running sum are aligned to the largest of them, cut off below 2^-23 of it, and added.
    """
    products = left.astype(np.float64) * right.astype(np.float64)  # exact
    total = np.zeros(len(products))
    for begin in range(0, products.shape[1], 16):
        group = np.concatenate([total[:, None], products[:, begin : begin + 16]], axis=1)
        largest = np.abs(group).max(1, keepdims=True)
        unit = np.exp2(np.floor(np.log2(np.where(largest > 0, largest, 1.0))) - 23)
        total = (np.trunc(group / unit) * unit).sum(1)
    return total


def scaled(vectors):
    """Rows with their largest element in [2^14, 2^15), as the search scales them."""
    largest = np.abs(vectors).max(1, keepdims=True)
    return np.ldexp(vectors, 14 - np.floor(np.log2(largest)).astype(int))


@pytest.mark.parametrize("channels", [1, 4, 64, 1024, 2048])
def test_the_bound_holds_and_is_not_loose(kernels, channels):
    """The product of float16 copies, on random, misleading and underflowing vectors; the worst is over half of it."""
    generator = np.random.default_rng(18)
    slope, floor = kernels.bound(channels)
    below = np.full((1, channels), 1 + 2.0**-11 - 2.0**-20)  # both rounded down: errors of one sign
    pairs = [
        (generator.standard_normal((200, channels)), generator.standard_normal((200, channels))),
        (below, below),
        (below, -below),
        (np.exp2(generator.uniform(-40, 0, (200, channels))), np.exp2(generator.uniform(-40, 0, (200, channels)))),
        (np.exp2(generator.uniform(-40, 0, (200, channels))), generator.standard_normal((200, channels))),
    ]
    worst = 0.0
    for left, right in pairs:
        left, right = (
            scaled(left.astype(np.float32).astype(np.float64)),
            scaled(right.astype(np.float32).astype(np.float64)),
        )
        got = chopped_product(left.astype(np.float16), right.astype(np.float16))
        error = np.abs(got - (left * right).sum(1))
        norms = np.linalg.norm(left, axis=1), np.linalg.norm(right, axis=1)
        bound = slope * (norms[0] + floor) * (norms[1] + floor)
        assert (error <= bound).all()
        worst = max(worst, (error / bound).max())
    assert worst > 0.5, f"only {worst:.2f} of the bound is ever used"
    assert slope < 2.0**-9.3, "beside the products' own 2^-10, little is set aside"


@triton_float32
@pytest.mark.parametrize("adversary", ["plain", "near ties", "norms far apart", "huge rows, tiny codes"])
@pytest.mark.parametrize("channels", [8, 100])
def test_every_score_lies_in_its_interval(room, kernels, adversary, channels):
    """The words that the search leaves: no code of a subtile scores above, and the one named is the best if alone."""
    _, device, _ = room
    rows, num_codes = 7, 150
    make = {**ADVERSARIES, "plain": times(1.0)}[adversary]
    x, codebook = (part.to(device) for part in make(rows, num_codes, channels, torch.Generator().manual_seed(19)))
    cut = kernels.plan(rows, num_codes, channels, False, True, _native.capability(x))
    whole = torch.full((cut.size + 512,), 7, dtype=torch.uint8, device=device)
    workspace = whole[256:-256]
    codes, check_codes = guarded((rows, 1), torch.int64, device)
    held = torch.empty_like(x)
    peak = codebook.abs().max().view(1)
    kernels.residual_quantize(x, codebook, peak, False, cut, workspace, held, codes)
    check_codes()
    assert (whole[:256] == 7).all(), "wrote before the workspace"
    assert (whole[-256:] == 7).all(), "wrote after the workspace"
    assert torch.equal(held, x), "the last depth leaves the residual as it is"

    def piece(name):
        begin, dtype, shape = cut.places[name]
        return workspace[begin : begin + math.prod(shape) * dtype.itemsize].view(dtype).view(shape).cpu()

    words = piece("words")
    scale, width, half, norm = (piece(name).double() for name in ("row_scale", "row_width", "code_half", "code_norm"))
    book = 14 - math.floor(math.log2(peak.item()))
    left = torch.ldexp(x.double().cpu(), torch.round(torch.log2(scale) + book)[:, None])
    right = torch.ldexp(codebook.double().cpu(), torch.tensor(book))
    true = left @ right.T - scale[:, None] * right.square().sum(1) / 2
    radius = width[:, None] * norm + 2.0**-15 * scale[:, None] * half * (1 + 2.0**-10)
    decided = 0
    for n in range(rows):
        for t in range(words.shape[1]):
            top = words[n, t].view(torch.float32).double().item()
            named = min(64 * t + (words[n, t].item() >> 1 & 63), num_codes - 1)
            here = slice(64 * t, min(64 * t + 64, num_codes))
            assert (true[n, here] <= top).all()
            assert true[n, named] >= top - 2 * radius[n, named]
            if not words[n, t] & 1:
                decided += 1
                assert named == 64 * t + true[n, here].argmax()
    assert adversary != "plain" or decided > rows * words.shape[1] // 2, "the bound decides most of an ordinary search"


# ---- how a call is cut up --------------------------------------------------------------------------------------------


@triton_rooms
@pytest.mark.parametrize("shared", [True, False], ids=["shared", "per depth"])
def test_rows_in_chunks(room, kernels, monkeypatch, shared):
    backend = room[0]
    x = normal(140, 8, seed=20, room=room)
    codebook = normal(*(() if shared else (2,)), 30, 8, seed=21, room=room)
    monkeypatch.setattr(kernels, "ROW_BYTES", 1)
    plan = kernels.plan(140, 30, 8, False, x.dtype == torch.float32, _native.capability(x))
    assert plan.rows == 128
    assert check(x, codebook, residual_quantize(x, codebook, 2, backend=backend)) == 0


@pytest.mark.parametrize("in_place", [True, False], ids=["float32", "half precision"])
@pytest.mark.parametrize(
    ("rows", "num_codes", "channels"),
    [(8192, 16384, 1024), (5832, 16384, 1152), (2**20, 16384, 256), (8192, 2048, 256)],
)
def test_workspace_does_not_grow_with_rows_times_codes(kernels, rows, num_codes, channels, in_place):
    plan = kernels.plan(rows, num_codes, channels, False, in_place, 90)
    assert plan.size < (64e6 if channels <= 1024 else 68e6)
    assert plan.rows % 128 == 0 or plan.rows == rows
    ends = [begin + math.prod(shape) * dtype.itemsize for begin, dtype, shape in plan.places.values()]
    begins = [begin for begin, _, _ in plan.places.values()]
    assert all(end <= begin for end, begin in zip(ends, [*begins[1:], plan.size], strict=True)), "pieces overlap"


# ---- on a GPU --------------------------------------------------------------------------------------------------------

PUBLISHED = {
    "vila-u-256": (8192, 16384, 1024, 4),
    "vila-u-384": (5832, 16384, 1152, 16),
    "rqvae-imagenet": (8192, 16384, 256, 4),
    "rqvae-ffhq": (8192, 2048, 256, 4),
    "llamagen": (65536, 16384, 8, 1),
    "var": (21760, 4096, 32, 1),
}


@pytest.mark.gpu
@gpu_triton
@pytest.mark.parametrize("shape", PUBLISHED.values(), ids=PUBLISHED)
def test_published_sizes(room, shape):
    """Along the path taken, in float64; and no more codes than eager's differ from the float64 argmin (none does)."""
    rows, num_codes, channels, depth = shape
    x = normal(rows, channels, seed=22, room=room)
    codebook = normal(num_codes, channels, seed=23, room=room, scale=0.5)
    codes, quantized = residual_quantize(x, codebook, depth, backend="triton")
    assert torch.equal(quantized, residual_lookup(codes, codebook.float(), backend="eager").to(x.dtype))
    residual, book = x.float(), codebook.double()
    for d in range(depth):
        for part, chosen in zip(residual.split(2048), codes[:, d].split(2048), strict=True):
            # The squared distance from norms is exact enough in float64 unless two are as near as this.
            loss = book.square().sum(1) - 2 * part.double() @ book.T + part.double().square().sum(1, keepdim=True)
            best = loss.min(1)
            got = loss.gather(1, chosen[:, None])[:, 0]
            assert (got <= best.values * (1 + 1e-12)).all()
        residual = residual - codebook.float()[codes[:, d]]


@pytest.mark.gpu
@gpu_triton
@pytest.mark.parametrize("depth", [1, 4])
def test_extra_memory(room, depth):
    """VILA-U 256: beside the outputs, less than 64 MB, where a matrix of distances takes 537."""
    x = normal(8192, 1024, seed=24, room=room)
    codebook = normal(16384, 1024, seed=25, room=room)
    residual_quantize(x, codebook, depth, backend="triton")
    torch.cuda.synchronize()
    before = torch.cuda.memory_allocated()
    torch.cuda.reset_peak_memory_stats()
    kept = residual_quantize(x, codebook, depth, backend="triton")
    torch.cuda.synchronize()
    outputs = sum(part.nbytes for part in kept)
    assert torch.cuda.max_memory_allocated() - before - outputs < 64e6


@pytest.mark.gpu
@gpu_triton
@pytest.mark.parametrize("crowded", [False, True], ids=["plain", "all codes twice"])
def test_two_thousand_launches_agree(room, crowded):
    x = normal(1500, 264, seed=26, room=room)
    codebook = normal(500, 264, seed=27, room=room)
    if crowded:
        codebook = torch.cat([codebook, codebook])
    first = residual_quantize(x, codebook, 3, backend="triton")
    differ = torch.zeros((), dtype=torch.int64, device="cuda")
    for _ in range(2000):
        for got, want in zip(residual_quantize(x, codebook, 3, backend="triton"), first, strict=True):
            differ += (got != want).any()
    assert differ.item() == 0
    assert first.codes.max() < 500


@pytest.mark.gpu
@gpu_triton
@pytest.mark.parametrize("shared", [True, False], ids=["shared", "per depth"])
def test_cuda_graph(room, shared):
    x = normal(200, 64, seed=28, room=room)
    codebook = normal(*(() if shared else (3,)), 100, 64, seed=29, room=room)

    def run():
        return residual_quantize(x, codebook, 3, backend="triton")

    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        run()
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = run()
    for seed in (30, 31):
        x.copy_(normal(200, 64, seed=seed, room=room))
        codebook.copy_(normal(*codebook.shape, seed=seed + 10, room=room))
        graph.replay()
        for got, want in zip(captured, run(), strict=True):
            assert torch.equal(got, want)


@pytest.mark.gpu
@gpu_triton
def test_no_host_sync(room):
    x, codebook = normal(64, 40, seed=32, room=room), normal(50, 40, seed=33, room=room)
    residual_quantize(x, codebook, 2, backend="triton")
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    try:
        residual_quantize(x, codebook, 2, backend="triton")
    finally:
        torch.cuda.set_sync_debug_mode("default")


@pytest.mark.gpu
@gpu_triton
@pytest.mark.parametrize(
    ("rows", "num_codes", "channels", "depth"),
    [(300, 2**18, 16, 2), (300, 300, 40, 64), (1, 2, 4, 64), (700, 1000, 2048, 3), (70000, 5, 4, 2)],
    ids=["most codes", "deepest", "smallest", "widest", "more rows than a grid's second axis"],
)
@pytest.mark.parametrize("metric", ["l2", "cosine"])
def test_limits(room, rows, num_codes, channels, depth, metric):
    x, codebook = normal(rows, channels, seed=34, room=room), normal(num_codes, channels, seed=35, room=room)
    got = residual_quantize(x, codebook, depth, metric=metric, backend="triton")
    assert check(x, codebook, got, metric) == 0
