"""Depth decoding: the definition, what the operator refuses, packed weights, and the kernel on a GPU."""

import copy
from dataclasses import replace

import pytest
import torch
from depth_small import drawn_from, small_case
from helpers import assert_as_good_as_eager

from unifiedar.nn import DepthStyle, DepthTransformer
from unifiedar.ops import DepthForm, _native, depth, depth_decode, residual_lookup
from unifiedar.ops.depth import _flatten, depth_pack, served_by, wants_packed

DTYPES = (torch.bfloat16, torch.float16)


# ---- the definition


@pytest.mark.parametrize("guidance", [None, 2.5, "rows"])
@pytest.mark.parametrize("shared", [True, False])
def test_logits_equal_teacher_forced_ones(guidance, shared, device):
    """A step at a time with a cache, against all depths at once without one."""
    case = small_case(rows=6, guidance=guidance, shared=shared, projected=shared, dtype=torch.float64).to(device)
    codes, total, _, logits = case.run("eager", return_logits=True)
    codes = torch.cat([codes, codes]) if guidance else codes
    sums = residual_lookup(codes, case.codebook, cumulative=True)
    torch.testing.assert_close(logits, case.module(case.hidden, sums), rtol=0, atol=1e-11)
    torch.testing.assert_close(total, sums[: len(total), -1], rtol=0, atol=1e-12)


@pytest.mark.parametrize("guidance", [None, 2.5, "rows"])
def test_draws_are_those_of_sample_codes(guidance, device):
    case = small_case(rows=8, guidance=guidance, dtype=torch.float32, depth=4).to(device)
    codes, _, _, logits = case.run("eager", return_logits=True)
    assert torch.equal(codes, drawn_from(logits, case))
    assert len(set(codes.flatten().tolist())) > 8


def test_noise_is_drawn_a_depth_at_a_time():
    case = small_case(rows=4, dtype=torch.float32)
    generator = torch.Generator().manual_seed(5)
    noise = torch.stack([torch.empty(4, 101).exponential_(generator=generator) for _ in range(3)], dim=1)
    want = replace(case, noise=noise).run("eager").codes
    got = case.run("eager", noise=None, generator=torch.Generator().manual_seed(5)).codes
    assert torch.equal(got, want)


def test_forced_codes_are_gone_through():
    case = small_case(rows=4, guidance=2.0, dtype=torch.float32)
    codes, total, _, logits = case.run("eager", return_logits=True)
    again = case.run("eager", forced=codes, return_logits=True)
    for one, other in zip((codes, total, logits), (again.codes, again.total, again.logits), strict=True):
        assert torch.equal(one, other)
    assert case.run("eager", forced=codes).logits is None
    unknown = case.run("eager", forced=torch.full_like(codes, -1))
    assert not unknown.total.any()


def test_no_rows(device):
    codes, total, _, logits = small_case(rows=0).to(device).run("eager", return_logits=True)
    assert (codes.shape, total.shape, logits.shape) == ((0, 3), (0, 40), (0, 3, 101))


def test_the_operator_is_well_defined():
    case = small_case(rows=2, guidance=2.0, dtype=torch.float32)
    temperature, top_k, top_p = case.settings
    arguments = (case.hidden, case.codebook, _flatten(case.weights), None, 3, 2.0, None, temperature, top_k, top_p)
    with torch.no_grad():
        torch.library.opcheck(
            torch.ops.unifiedar.depth_decode.default, (*arguments, case.noise, None, True, None, *DepthForm())
        )


def test_it_compiles_whole(fresh_compiler):
    case = small_case(rows=2, guidance=2.0, dtype=torch.float32)

    @torch.compile(fullgraph=True, backend="aot_eager")
    def call(hidden, noise):
        with torch.no_grad():
            return depth_decode(hidden, case.codebook, weights, guidance=2.0, top_k=7, noise=noise).codes

    weights = case.weights
    want = depth_decode(case.hidden, case.codebook, weights, guidance=2.0, top_k=7, noise=case.noise).codes
    assert torch.equal(call(case.hidden, case.noise), want)


@pytest.mark.parametrize("guidance", [None, 2.0])
def test_nan_is_told_by_its_depth(guidance, device):
    """Where a code's embedding brings it: the depth after the first that can draw another code."""
    case = small_case(rows=2, guidance=guidance, dtype=torch.float32, depth=4).to(device)
    codes = case.run("eager").codes
    case.codebook[codes[0, 1]] = torch.nan
    first = 1 + int((codes[0] == codes[0, 1]).nonzero()[0])
    assert case.run("eager").unsound[0] == first


# ---- bad input


@pytest.mark.parametrize(
    ("change", "error", "text"),
    [
        ({"hidden": torch.zeros(2, 127)}, ValueError, r"hidden must be \(rows, 128\)"),
        ({"hidden": torch.zeros(2, 128, dtype=torch.float64)}, TypeError, "dtype of the weights"),
        ({"hidden": torch.zeros(3, 128), "guidance": 2.0}, ValueError, "conditional rows first"),
        ({"codebook": torch.zeros(100, 40)}, ValueError, r"codebook must be \(101, 40\) or \(3, 101, 40\)"),
        ({"codebook": torch.zeros(2, 101, 40)}, ValueError, r"codebook must be \(101, 40\) or \(3, 101, 40\)"),
        ({"guidance": torch.ones(2)}, ValueError, r"guidance must be a number or \(1,\)"),
        ({"guidance": float("nan")}, ValueError, "guidance must be finite"),
        ({"temperature": [1.0, 1.0]}, ValueError, "temperature must be one number or 3, got 2"),
        ({"temperature": -1.0}, ValueError, "temperature must be at least 0"),
        ({"top_k": [5, 5, -1]}, ValueError, "top_k must be at least 0"),
        ({"top_k": 1.5}, TypeError, "top_k must be an integer"),
        ({"top_p": "half"}, ValueError, "top_p must be one number or 3, got 4"),
        ({"noise": torch.ones(2, 3, 100)}, ValueError, r"noise must be \(2, 3, 101\)"),
        ({"noise": torch.ones(2, 3, 101), "generator": torch.Generator()}, ValueError, "generator must be None"),
        ({"forced": torch.zeros(2, 2, dtype=torch.int64)}, ValueError, r"forced must be \(2, 3\)"),
        ({"forced": torch.zeros(2, 3)}, TypeError, "forced must be int64"),
        ({"packed": torch.zeros(5, dtype=torch.float16)}, TypeError, "packed must be float32"),
        ({"backend": "flash"}, ValueError, "backend must be one of auto, cuda, triton, eager"),
        ({"backend": "cuda"}, ValueError, "needs CUDA tensors"),
    ],
)
def test_bad_input(change, error, text):
    case = small_case(rows=2, dtype=torch.float32)
    arguments = {"hidden": case.hidden, "codebook": case.codebook, "weights": case.weights} | change
    with pytest.raises(error, match=text):
        depth_decode(**arguments)


SIZES = {"hidden_dim": 12, "code_dim": 6, "dim": 8, "num_layers": 1, "num_heads": 2, "depth": 3, "num_codes": 9}


@pytest.mark.parametrize("name", ["dim", "num_heads", "depth", "num_codes"])
def test_sizes_that_are_not(name):
    with pytest.raises(ValueError, match=f"DepthTransformer: {name} must be at least 1, got 0"):
        DepthTransformer(**SIZES | {name: 0})


@pytest.mark.parametrize(
    ("hidden", "sums", "text"),
    [
        ((2, 11), (2, 3, 6), r"hidden must be \(2, 12\), got \(2, 11\)"),
        ((2, 12), (2, 3, 5), r"running_sums must be \(2, 3, 6\), got \(2, 3, 5\)"),
        ((2, 12), (2, 4, 6), r"running_sums must be \(2, 3, 6\)"),
        ((2, 12), (1, 3, 6), r"running_sums must be \(2, 3, 6\)"),
        ((2, 1, 12), (2, 3, 6), r"hidden must be \(2, 12\)"),
    ],
)
def test_teacher_forcing_refuses_other_shapes(hidden, sums, text):
    module = DepthTransformer(**SIZES).eval()
    assert module(torch.randn(2, 12), torch.randn(2, 3, 6)).shape == (2, 3, 9)
    with pytest.raises(ValueError, match=text):
        module(torch.randn(hidden), torch.randn(sums))
    module = DepthTransformer(12, None, 8, 1, 2, 3, 9, style=DepthStyle(state="every"))
    with pytest.raises(ValueError, match=r"start must be \(2, 8\), got \(2, 6\)"):
        module(torch.randn(2, 12), torch.randn(2, 3, 8), torch.randn(2, 6))


def test_a_greedy_depth_needs_no_noise():
    case = replace(small_case(rows=2, dtype=torch.float32, greedy=True), noise=None)
    generator = torch.Generator().manual_seed(0)
    before = generator.get_state()
    codes = case.run("eager", generator=generator).codes
    assert torch.equal(generator.get_state(), before)
    assert torch.equal(codes, drawn_from(case.run("eager", return_logits=True).logits, case))


def test_a_row_with_nan_draws_zero_and_leaves_the_others_alone(device):
    case = small_case(rows=3, dtype=torch.float32).to(device)
    want = case.run("eager").codes
    case.run("eager").check()
    case.hidden[1, 5] = torch.nan
    result = case.run("eager")
    codes = result.codes
    assert result.unsound.tolist() == [-1, 0, -1]
    with pytest.raises(FloatingPointError, match="row 1 at depth 0"):
        result.check()
    assert torch.equal(codes[1], torch.zeros_like(codes[1]))
    assert torch.equal(codes[[0, 2]], want[[0, 2]])


# ---- packed weights


def fragments(weight):
    """A matrix packed element by element, after csrc/depth.cu's description."""
    outputs, inputs = weight.shape
    tiles, chunks = -(-outputs // 16), -(-inputs // 64)
    packed = torch.zeros(tiles, chunks, 4, 32, 8, dtype=weight.dtype)
    for o in range(outputs):
        for i in range(inputs):
            inside = i % 64
            half, eight, place = inside // 32, inside % 32 // 8, inside % 8
            lane = o % 8 * 4 + eight
            word = place % 4 // 2 * 2 + o % 16 // 8
            packed[o // 16, i // 64, 2 * half + place // 4, lane, 2 * word + place % 2] = weight[o, i]
    return packed.flatten()


def test_packed_matrices_are_as_the_matrix_units_take_them():
    case = small_case(dim=64, layers=1, depth=2, num_codes=21, code_dim=72, hidden_dim=64)
    weights = case.weights
    (block,) = weights.blocks
    qkv = torch.cat([block.query[0], block.key[0], block.value[0]])
    matrices = (weights.code[0], weights.hidden[0], qkv, block.proj[0], block.up[0], block.down[0], weights.head[0])
    vectors = [weights.position, weights.code[1], weights.hidden[1], *block.norm1]
    vectors += [pair[1] for pair in (block.query, block.key, block.value, block.proj)]
    vectors += [*block.norm2, block.up[1], block.down[1], *weights.norm, weights.head[1]]
    want = torch.cat([*(fragments(m.detach()) for m in matrices), *(v.detach().flatten() for v in vectors)])
    assert torch.equal(depth_pack(weights), want)
    with pytest.raises(TypeError, match="weights must be bfloat16, float16"):
        depth_pack(case.to(torch.float32).weights)


class Doubled(torch.nn.Module):
    def forward(self, weight):
        return 2 * weight


def test_packed_weights_are_kept_while_parameters_stay():
    module = small_case(layers=1).module
    packed = module._held().packed()
    assert module._held().packed() is packed
    assert not any("packed" in key or "kept" in key for key in module.state_dict())
    assert copy.deepcopy(module)._kept is None

    def changed():
        nonlocal packed
        before, packed = packed, module._held().packed()
        assert torch.equal(packed, depth_pack(module.weights()))
        return packed is not before

    with torch.no_grad():
        module.in_mlp_1.weight.mul_(2)
    assert changed()
    module.load_state_dict({key: value.clone() for key, value in module.state_dict().items()}, assign=True)
    assert changed()
    module.in_mlp_1.weight = torch.nn.Parameter(module.in_mlp_1.weight.detach() * 2)
    assert changed()
    module.to(torch.float16)
    assert changed()
    assert packed.dtype == torch.float16
    assert not changed()
    head = module.classifier_mlp.linear
    module.classifier_mlp.linear = torch.nn.Linear(head.in_features, head.out_features, dtype=torch.float16)
    assert changed()
    torch.nn.utils.parametrize.register_parametrization(module.in_mlp_1, "weight", Doubled(), unsafe=True)
    assert changed()
    with torch.no_grad():
        module.in_mlp_1.parametrizations.weight.original.mul_(3)
    assert changed()


# ---- the kernel


def on_gpu(case):
    """A case on the GPU, and how to run the kernel there."""
    if reason := _native.library_missing():
        pytest.skip(reason)
    case = case.to("cuda")
    packed = depth_pack(case.weights)
    return case, lambda **options: case.run("cuda", packed=packed, **options)


def check_kernel(case):
    case, kernel = on_gpu(case)
    codes, total, _, logits = kernel(return_logits=True)
    exact = case.to(torch.float64).run("eager", forced=codes, return_logits=True).logits
    eager = case.run("eager", forced=codes, return_logits=True)
    assert_as_good_as_eager(logits, eager.logits, exact)
    cosine = torch.nn.functional.cosine_similarity(logits.double(), exact, dim=-1)
    assert cosine.min() >= 0.9999
    assert torch.equal(codes, drawn_from(logits, case))
    assert torch.equal(total, eager.total)
    forced = kernel(forced=codes, return_logits=True)
    assert torch.equal(forced.logits, logits)
    assert torch.equal(forced.codes, codes)


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(
    "options",
    [
        pytest.param({}, id="one row"),
        *(pytest.param({"rows": rows}, id=f"{rows} rows") for rows in (2, 3, 7, 8, 9, 16, 17, 31, 32)),
        *(pytest.param({"rows": 2 * n, "guidance": 3.0}, id=f"{n} guided") for n in (1, 4, 5, 16)),
        pytest.param({"rows": 10, "guidance": "rows"}, id="guidance a row"),
        pytest.param({"rows": 70, "guidance": "rows"}, id="several launches"),
        pytest.param({"depth": 1}, id="one depth"),
        pytest.param({"depth": 16, "rows": 6, "guidance": 2.0, "num_codes": 777}, id="sixteen depths"),
        pytest.param({"depth": 64, "layers": 1, "rows": 2, "guidance": 2.0}, id="sixty-four depths"),
        pytest.param({"rows": 128, "layers": 1}, id="a hundred and twenty-eight rows"),
        *(pytest.param({"dim": 4096, "layers": 1, "rows": n}, id=f"width 4096, {n}") for n in (1, 18)),
        pytest.param({"dim": 256, "rows": 3}, id="width 256"),
        pytest.param({"projected": False, "rows": 5}, id="not projected"),
        pytest.param({"shared": False, "book_dtype": torch.float32, "rows": 5}, id="a float32 codebook a depth"),
        pytest.param({"layers": 0}, id="no layer"),
        pytest.param({"greedy": True, "rows": 8, "guidance": 1.5}, id="greedy"),
        pytest.param({"dim": 1024, "layers": 1, "num_codes": 16384, "rows": 2, "guidance": 3.0}, id="width 1024"),
        *(
            pytest.param(
                {"dim": 2560, "layers": 1, "num_codes": 4001, "rows": n, "guidance": 3.0}, id=f"width 2560, {n}"
            )
            for n in (2, 16, 32)
        ),
        pytest.param({"dim": 64, "num_codes": 65536, "layers": 1, "rows": 3}, id="codes beyond shared memory"),
    ],
)
def test_kernel(options, dtype):
    check_kernel(small_case(dtype=dtype, **options))


@pytest.mark.gpu
@pytest.mark.parametrize("num_codes", [16384, 32768])
def test_kernel_draws_from_few_of_many(num_codes):
    """What is kept makes a list, of keys in shared memory or, where there are too many, in global memory."""
    case = small_case(rows=4, guidance=3.0, dim=64, layers=1, num_codes=num_codes)
    check_kernel(replace(case, settings=([1.0] * 3, [900, 1, 2000], [0.96, 0.0, 0.5])))


@pytest.mark.gpu
@pytest.mark.parametrize(
    ("options", "times"),
    [
        pytest.param({"rows": 4}, 10_000, id="small"),
        pytest.param({"rows": 2, "dim": 1024, "layers": 2}, 3_000, id="width 1024"),
        *(pytest.param({"rows": n, "dim": 2560, "layers": 1}, 300, id=f"width 2560, {n}") for n in (2, 16, 32)),
    ],
)
def test_kernel_repeats_bit_for_bit(options, times):
    """Many positions in a row: no race, no wait that is left too early."""
    _, kernel = on_gpu(small_case(guidance=2.0, **options))
    want = kernel(return_logits=True)
    wrong = torch.zeros((), dtype=torch.int64, device="cuda")
    for _ in range(times):
        for one, other in zip(kernel(return_logits=True), want, strict=True):
            wrong += (one != other).sum()
    assert wrong.item() == 0


@pytest.mark.gpu
def test_kernel_in_a_graph():
    case, kernel = on_gpu(small_case(rows=4, guidance=2.0))
    kernel()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = kernel(return_logits=True)
    case.hidden.copy_(torch.randn_like(case.hidden))
    case.noise.exponential_()
    graph.replay()
    for one, other in zip(captured, kernel(return_logits=True), strict=True):
        assert torch.equal(one, other)


@pytest.mark.gpu
def test_kernel_on_another_stream_and_of_strided_inputs():
    case, kernel = on_gpu(small_case(rows=4, guidance=2.0, shared=False))
    want = kernel(return_logits=True)
    wide = replace(
        case,
        codebook=torch.cat([case.codebook, case.codebook], dim=-1)[..., :40],
        noise=case.noise.transpose(0, 1).contiguous().transpose(0, 1),
        hidden=torch.cat([case.hidden, case.hidden], dim=-1)[:, :128],
    )
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        got = wide.run("cuda", packed=depth_pack(wide.weights), return_logits=True)
    stream.synchronize()
    for one, other in zip(got, want, strict=True):
        assert torch.equal(one, other)


@pytest.mark.gpu
def test_kernel_draws_zero_where_logits_are_nan():
    case, kernel = on_gpu(small_case(rows=3))
    want = kernel().codes
    case.hidden[1, 5] = torch.nan
    result = kernel()
    codes = result.codes
    assert result.unsound.tolist() == [-1, 0, -1]
    assert torch.equal(codes[1], torch.zeros_like(codes[1]))
    assert torch.equal(codes[[0, 2]], want[[0, 2]])


@pytest.mark.gpu
def test_module_uses_the_kernel_when_asked():
    case, kernel = on_gpu(small_case(rows=4, guidance=2.0))
    temperature, top_k, top_p = case.settings
    settings = {"guidance": 2.0, "temperature": temperature, "top_k": top_k, "top_p": top_p, "noise": case.noise}
    codes, total, *_ = case.module.decode(case.hidden, case.codebook, backend="cuda", **settings)
    want = kernel()
    assert torch.equal(codes, want.codes)
    assert torch.equal(total, want.total)


@pytest.mark.gpu
def test_module_leaves_many_rows_to_triton():
    """Nothing is packed for them; with packed weights the operator itself stays with the kernel."""
    case, kernel = on_gpu(small_case(rows=34, guidance=2.0))
    arguments = (case.hidden, case.codebook, case.weights)
    assert wants_packed(case.hidden[:24], *arguments[1:])
    assert not wants_packed(*arguments)
    assert served_by(*arguments) == "triton"
    temperature, top_k, top_p = case.settings
    settings = {"guidance": 2.0, "temperature": temperature, "top_k": top_k, "top_p": top_p, "noise": case.noise}
    found = case.module.decode(case.hidden, case.codebook, return_logits=True, **settings)
    for one, other in zip(found, case.run("triton", return_logits=True), strict=True):
        assert torch.equal(one, other)
    packed = case.run("auto", packed=depth_pack(case.weights), return_logits=True)
    assert torch.equal(packed.logits, kernel(return_logits=True).logits)


@pytest.mark.gpu
@pytest.mark.parametrize(
    ("change", "reason"),
    [
        ({"dtype": torch.float32}, "needs bfloat16 or float16"),
        ({"hidden_dim": 100}, "a multiple of 64, got 100"),
        ({"depth": 65}, "needs at most 64 codes"),
    ],
)
def test_what_the_kernel_cannot_do(change, reason):
    if missing := _native.library_missing():
        pytest.skip(missing)
    case = small_case(**change).to("cuda")
    with pytest.raises(ValueError, match=reason):
        case.run("cuda")
    assert case.run("auto").codes.shape == (1, case.module.depth)


def without_room(monkeypatch):
    """As on a GPU that cannot hold the kernel's grid, or two rows of it."""
    monkeypatch.setattr(depth, "_plan", lambda *sizes: {"limit": 0})


def test_a_device_without_room_for_the_grid_is_told(monkeypatch):
    """Such tensors, and only for that reason, are not for the kernel: nothing is packed for it."""
    case = small_case(rows=4)
    monkeypatch.setattr(_native, "cuda_unfit", lambda *tensors: None)
    monkeypatch.setattr(depth, "_plan", lambda *sizes: {"limit": 2})
    arguments = (case.hidden, case.codebook, case.weights)
    assert depth._unfit_here(*arguments) is None
    assert wants_packed(*arguments, backend="cuda")
    many = (case.hidden.repeat(9, 1), *arguments[1:])
    assert wants_packed(*many, backend="cuda")
    without_room(monkeypatch)
    assert "needs a device that holds all blocks of a grid at once" in depth._unfit_here(*arguments)
    assert not wants_packed(*arguments, backend="cuda")


@pytest.mark.gpu
def test_without_room_for_the_grid_others_decode(monkeypatch):
    case, kernel = on_gpu(small_case(rows=4, guidance=2.0))
    want = kernel()
    without_room(monkeypatch)
    with pytest.raises(ValueError, match="holds all blocks of a grid at once"):
        kernel()
    temperature, top_k, top_p = case.settings
    settings = {"guidance": 2.0, "temperature": temperature, "top_k": top_k, "top_p": top_p, "noise": case.noise}
    found = case.module.decode(case.hidden, case.codebook, **settings)
    assert found.codes.shape == want.codes.shape
    assert torch.equal(found.codes, drawn_from(case.run("auto", forced=found.codes, return_logits=True).logits, case))


@pytest.mark.gpu
def test_heads_of_another_width_are_left_to_the_definition():
    module = DepthTransformer(64, 16, 64, 1, 2, depth=2, num_codes=9).to("cuda", torch.bfloat16).eval()
    hidden, codebook = torch.randn(2, 64, device="cuda").bfloat16(), torch.randn(9, 16, device="cuda").bfloat16()
    with pytest.raises(ValueError, match="needs heads 64 wide, got 32"):
        module.decode(hidden, codebook, backend="cuda", temperature=0)
    codes, *_ = module.decode(hidden, codebook, temperature=0)
    assert codes.shape == (2, 2)
