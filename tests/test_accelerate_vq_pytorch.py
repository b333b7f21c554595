"""accelerate on vector-quantize-pytorch: the same outputs, codes, losses, gradients and buffers as its own."""

import copy
import os
import sys

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from torch import nn

from unifiedar import accelerate, restore

pytest.importorskip("vector_quantize_pytorch")
from vector_quantize_pytorch import GroupedResidualVQ, ResidualVQ, VectorQuantize

SOURCE = "unifiedar.accelerate._vector_quantize_pytorch"


def rich(module):
    """Codes of unit scale, apart from each other, and averages that differ: fresh codebooks are all but zero."""
    generator = torch.Generator().manual_seed(1234)  # not the numbers of any input
    books = dict.fromkeys(part._codebook for part in module.modules() if isinstance(part, VectorQuantize))
    with torch.no_grad():
        for book in books:
            book.embed.copy_(torch.randn(book.embed.shape, generator=generator))
            if book.use_cosine_sim:
                book.embed.copy_(nn.functional.normalize(book.embed, dim=-1))
            book.cluster_size.copy_(torch.rand(book.cluster_size.shape, generator=generator) * 3)
            book.embed_avg.copy_(book.embed * book.cluster_size.unsqueeze(-1))
    return module


def pair(cls=VectorQuantize, **options):
    """A module and its accelerated copy."""
    torch.manual_seed(0)
    module = rich(cls(**{"dim": 8, "codebook_size": 40, **options}))
    ours = copy.deepcopy(module)
    report = accelerate(ours, verbose=False)
    assert report.swapped
    assert not report.refused, report
    return module, ours


def both(modules, call):
    """The results of a call on each, with the same random numbers."""
    results = []
    for module in modules:
        torch.manual_seed(5)
        results.append(call(module))
    return results


def assert_equal(got, wanted, share=1e-5):
    """Integers equal; floats to a share of the largest: deep layers divide by what little is left of their input."""
    if not isinstance(wanted, torch.Tensor):
        assert len(got) == len(wanted)
        for one, other in zip(got, wanted, strict=True):
            assert_equal(one, other, share)
        return
    scale = float(wanted.detach().abs().max()) if wanted.is_floating_point() and wanted.numel() else 0.0
    torch.testing.assert_close(got, wanted, rtol=0, atol=share * scale)


def assert_same_state(ours, module):
    got, wanted = ours.state_dict(), module.state_dict()
    assert list(got) == list(wanted)
    for key, value in wanted.items():
        assert_equal(got[key], value)


def forbid_published(monkeypatch):
    """Makes the published matrices fail, so that what still works is ours."""
    import vector_quantize_pytorch.vector_quantize_pytorch as package

    def fail(*_args, **_kwargs):
        raise AssertionError("the published search ran")

    monkeypatch.setattr(package.Codebook, "forward", fail)


SHAPES = {
    "tokens": ({}, (3, 10, 8)),
    "one token": ({}, (3, 8)),
    "channels first": ({"channel_last": False}, (3, 8, 10)),
    "image": ({"accept_image_fmap": True}, (3, 8, 4, 5)),
    "volume": ({"accept_3d_fmap": True}, (3, 8, 2, 3, 4)),
    "one channel": ({"dim": 1}, (3, 10, 1)),
}
OPTIONS = {
    "plain": {},
    "cosine": {"use_cosine_sim": True},
    "straight-through": {"rotation_trick": False},
    "dead codes": {"threshold_ema_dead_code": 2},
    "cosine, dead codes": {"use_cosine_sim": True, "threshold_ema_dead_code": 2},
    "projected": {"codebook_dim": 5, "layernorm_after_project_in": True},
    "heads": {"heads": 2, "codebook_dim": 4},
    "a codebook a head": {"heads": 2, "codebook_dim": 6, "separate_codebook_per_head": True},
    "cosine, a codebook a head": {
        "heads": 2,
        "codebook_dim": 4,
        "separate_codebook_per_head": True,
        "use_cosine_sim": True,
    },
    "frozen": {"freeze_codebook": True},
    "no commitment": {"commitment_weight": 0.0},
    "no update": {"ema_update": False},
    "no update but dead codes": {"ema_update": False, "threshold_ema_dead_code": 2},
    "gradients elsewhere": {"route_gradients_to_input": False},
}


def objective(quantized, loss):
    weight = torch.linspace(0.5, 2, quantized[0].numel()).view(quantized[0].shape)
    return (quantized * weight).square().sum() + 3 * loss.sum()


def train(modules, shape, steps=5, **arguments):
    """Steps of both; asserts that all that comes out is equal."""
    for step in range(steps):
        results = []
        for module in modules:
            torch.manual_seed(step)
            x = torch.randn(shape).requires_grad_()
            module.zero_grad()
            out = module(x, **arguments)
            total = objective(out[0], out[2])
            if total.requires_grad:
                total.backward()
            gradients = [x.grad, *(p.grad for p in module.parameters())]
            results.append((out[:3], [g for g in gradients if g is not None]))
        assert_equal(results[1], results[0])
    assert_same_state(modules[1], modules[0])


@pytest.mark.parametrize("option", OPTIONS)
@pytest.mark.parametrize("shape", ["tokens", "image"])
def test_vector_quantize(option, shape, monkeypatch):
    options, size = SHAPES[shape]
    module, ours = pair(**OPTIONS[option], **options)
    for one in (module.eval(), ours.eval()):
        one.requires_grad_(True)
    assert_equal(*both((ours, module), lambda m: m(torch.randn(size))))
    assert_equal(*both((ours, module), lambda m: tuple(m(torch.randn(size), return_loss_breakdown=True)[3])))
    before = copy.deepcopy(module.state_dict())
    train((module.train(), ours.train()), size)
    changed = not all(torch.equal(value, before[key]) for key, value in module.state_dict().items())
    assert changed == (option not in ("frozen", "no update"))
    assert_equal(*both((ours, module), lambda m: tuple(m(torch.randn(size), return_loss_breakdown=True)[3])))
    forbid_published(monkeypatch)
    ours(torch.randn(size))


@pytest.mark.parametrize("shape", SHAPES)
def test_every_shape(shape):
    options, size = SHAPES[shape]
    modules = pair(**options)
    for module in modules:
        module.eval()
    x = torch.randn(size)
    wanted, got = modules[0](x), modules[1](x)
    assert_equal(got, wanted)
    assert got[0].shape == size
    train([module.train() for module in modules], size)


@pytest.mark.parametrize("option", ["plain", "cosine", "straight-through", "dead codes", "projected", "heads"])
@pytest.mark.parametrize("zeros", [True, False])
@pytest.mark.parametrize("how", ["mask", "lens"])
def test_masks(option, zeros, how):
    modules = pair(**OPTIONS[option], return_zeros_for_masked_padding=zeros)
    lens = torch.tensor([10, 4, 7])
    arguments = {"lens": lens} if how == "lens" else {"mask": torch.arange(10) < lens[:, None]}
    for module in modules:
        module.eval()
    wanted, got = (module(torch.ones(3, 10, 8).cumsum(1), **arguments) for module in modules)
    assert_equal(got, wanted)
    assert (got[1][1, 4:] == -1).all()
    for module in modules:
        module.train()
    if option in ("projected", "heads"):  # the published forward fails there, and so does ours
        for module in modules:
            with pytest.raises(RuntimeError):
                module(torch.randn(3, 10, 8), **arguments)
        return
    train(modules, (3, 10, 8), **arguments)


RESIDUAL = {
    "plain": {},
    "shared": {"shared_codebook": True},
    "shared, cosine": {"shared_codebook": True, "use_cosine_sim": True},
    # Not more: codes that die in two layers of one step come back all but equal, and rounding decides between them.
    "shared, dead codes": {"shared_codebook": True, "threshold_ema_dead_code": 0.5},
    "cosine": {"use_cosine_sim": True},
    "dead codes": {"threshold_ema_dead_code": 2},
    "projected": {"codebook_dim": 5},
    "dropout": {"quantize_dropout": True},
    "dropout in twos, shared": {"quantize_dropout": True, "quantize_dropout_multiple_of": 2, "shared_codebook": True},
    "gradients between layers": {"quant_grad_frac": 0.5},
    "straight-through": {"rotation_trick": False},
    "frozen": {"freeze_codebook": True},
}


def lookup(module, codes):
    return module.get_output_from_indices(codes)


def rows(module, codes):
    return module.get_codes_from_indices(codes)


@pytest.mark.parametrize("option", RESIDUAL)
@pytest.mark.parametrize("cls", [ResidualVQ, GroupedResidualVQ])
def test_residual_vq(option, cls, monkeypatch):
    if cls is GroupedResidualVQ and option == "projected":
        option = {"codebook_dim": 3, "groups": 2}
    else:
        option = dict(RESIDUAL[option]) | ({"groups": 2} if cls is GroupedResidualVQ else {})
    module, ours = pair(cls, num_quantizers=4, **option)
    modules = (module.eval(), ours.eval())
    mask = torch.arange(10) < torch.tensor([10, 4, 7])[:, None]
    calls = [{}, {"mask": mask}, {"return_all_codes": True}, {"mask": mask, "return_all_codes": True}]
    for arguments in calls:
        if "return_all_codes" in arguments and "mask" in arguments and not option.get("quantize_dropout"):
            continue
        wanted, got = both(modules, lambda m, arguments=arguments: m(torch.randn(3, 10, 8), **arguments))
        assert_equal(got, wanted)
    wanted, got = both(modules, lambda m: m(torch.randn(3, 8)) if cls is ResidualVQ else m(torch.randn(3, 1, 8)))
    assert_equal(got, wanted)
    codes = module(torch.randn(3, 10, 8))[1]
    spread = codes.unflatten(-2, (5, 2))
    for one in (codes, spread):
        assert_equal(lookup(ours, one), lookup(module, one))
        assert_equal(rows(ours, one), rows(module, one))
    if option.get("quantize_dropout") and cls is ResidualVQ:
        dropped = codes.clone()
        dropped[..., 3] = -1
        for one in (codes[..., :2], dropped):
            assert_equal(lookup(ours, one), lookup(module, one))
            assert_equal(rows(ours, one), rows(module, one))
    with monkeypatch.context() as patched:
        forbid_published(patched)
        ours(torch.randn(3, 10, 8))
    train((module.train(), ours.train()), (3, 10, 8))
    train((module, ours), (3, 10, 8), steps=2, mask=mask)
    wanted, got = both((module.eval(), ours.eval()), lambda m: m(torch.randn(3, 10, 8)))
    assert_equal(got, wanted)


def test_all_depths_are_searched_at_once(monkeypatch):
    source, seen = sys.modules[SOURCE], []
    for shared in (True, False):
        _, ours = pair(ResidualVQ, num_quantizers=4, shared_codebook=shared)
        search = source.residual_quantize
        with monkeypatch.context() as patched:
            patched.setattr(source, "residual_quantize", lambda *a, f=search, **k: seen.append(a[1]) or f(*a, **k))
            ours.eval()(torch.randn(3, 10, 8))
            table = seen.pop()
            assert not seen
            assert table.shape == ((40, 8) if shared else (4, 40, 8))
            assert table.data_ptr() == ours.layers[0]._codebook.embed.data_ptr(), "the codebooks themselves, no copy"
            ours.train()(torch.randn(3, 10, 8))
            assert len(seen) == 4
            seen.clear()


@pytest.mark.parametrize("option", ["plain", "shared", "cosine", "dead codes"])
def test_on_every_device(option, device):
    """At a size that the kernels cut into tiles; float32's own rounding may decide a code in thousands otherwise."""
    modules = pair(ResidualVQ, dim=64, codebook_size=500, num_quantizers=4, **RESIDUAL[option])
    x = torch.randn(4, 250, 64).to(device)
    mask = (torch.arange(250) < torch.tensor([250, 100, 7, 30])[:, None]).to(device)
    for mode in (False, True):
        for arguments in ({}, {"mask": mask}):
            results = []
            for module in modules:
                torch.manual_seed(0)
                results.append(module.to(device).train(mode)(x.clone().requires_grad_(mode), **arguments))
            (wanted, codes, losses), (got, own, own_losses) = results
            same = (codes == own).all(-1)
            assert same.float().mean() > 0.99
            assert_equal(got[same], wanted[same], 1e-4)
            assert_equal(own_losses, losses, 1e-3)
    for key, value in modules[0].state_dict().items():
        close = torch.isclose(modules[1].state_dict()[key], value, rtol=1e-3, atol=1e-4)
        assert close.float().mean() > 0.97, key


@pytest.mark.gpu
@pytest.mark.parametrize("option", ["plain", "shared", "cosine"])
@pytest.mark.parametrize("training", [False, True])
def test_a_forward_does_not_wait_for_the_gpu(option, training):
    """The published one asks the GPU in every layer whether its codebook is filled."""
    ours = pair(ResidualVQ, num_quantizers=3, **RESIDUAL[option])[1].cuda().train(training)
    x = torch.randn(3, 10, 8, device="cuda", requires_grad=training)
    ours(x)
    torch.cuda.set_sync_debug_mode("error")
    try:
        ours(x)
    finally:
        torch.cuda.set_sync_debug_mode("default")


def test_made_in_inference_mode():
    with torch.inference_mode():
        module, ours = pair(ResidualVQ, num_quantizers=2)
        x = torch.randn(3, 10, 8)
        assert_equal(ours.eval()(x), module.eval()(x))
    assert_equal(ours(torch.ones(1, 2, 8)), module(torch.ones(1, 2, 8)))
    assert len(restore(ours)) == 3
    assert_equal(ours(torch.ones(1, 2, 8)), module(torch.ones(1, 2, 8)))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64])
@pytest.mark.parametrize("cls", [VectorQuantize, ResidualVQ])
def test_other_dtypes(cls, dtype):
    """Input of another dtype than the codebook's: searched in float32 and returned as it came."""
    modules = pair(cls, **({"num_quantizers": 3} if cls is ResidualVQ else {}))
    for module in modules:
        module.eval()
    x = torch.randn(3, 10, 8).to(dtype)
    wanted, got = modules[0](x), modules[1](x)
    assert got[0].dtype == wanted[0].dtype == dtype
    same = (got[1] == wanted[1]).flatten(2).all(-1) if cls is ResidualVQ else got[1] == wanted[1]
    assert same.float().mean() > 0.9  # the published rest is rounded to the dtype after every depth
    assert_equal(got[0][same], wanted[0][same], max(1e-5, 4 * torch.finfo(dtype).eps))
    results = []
    for module in modules:
        torch.manual_seed(1)
        module.train()
        y = x.clone().requires_grad_()
        out = module(y)
        objective(out[0].float(), out[2]).backward()
        results.append((out[0].dtype, out[2].dtype, y.grad.dtype))
    assert results[0] == results[1]


@pytest.mark.parametrize("option", ["plain", "cosine", "projected", "straight-through"])
def test_autocast(option):
    modules = pair(ResidualVQ, num_quantizers=2, **RESIDUAL[option])
    for mode in (False, True):
        results = []
        for module in modules:
            module.train(mode)
            torch.manual_seed(1)
            x = torch.randn(3, 10, 8).requires_grad_(mode)
            with torch.autocast("cpu", dtype=torch.bfloat16):
                quantized, codes, loss = module(x)
            if mode:
                objective(quantized.float(), loss).backward()
                assert x.grad.isfinite().all()
            results.append((quantized, codes, loss))
        (wanted, codes, loss), (got, own_codes, own_loss) = results
        assert (got.dtype, own_loss.dtype, own_codes.dtype) == (wanted.dtype, loss.dtype, codes.dtype)
        # bfloat16's rounding of the published products decides codes too.
        assert (own_codes == codes).float().mean() > 0.85
        assert_equal(own_loss, loss, 0.1)
    for part in modules[1].modules():
        if isinstance(part, VectorQuantize):
            assert part._codebook.embed.isfinite().all()


def test_k_means_fills_the_codebook_as_published():
    torch.manual_seed(0)
    module = ResidualVQ(dim=8, codebook_size=12, num_quantizers=2, kmeans_init=True)
    ours = copy.deepcopy(module)
    accelerate(ours, verbose=False)
    assert not ours.layers[0]._codebook.initted, "a rehearsal leaves no trace"
    assert not ours.layers[0]._codebook.embed.any()
    train((module.train(), ours.train()), (3, 10, 8), steps=3)
    assert ours.layers[0]._codebook.initted
    fresh = ResidualVQ(dim=8, codebook_size=12, num_quantizers=2, kmeans_init=True).state_dict()
    for one in (module, ours):
        one.load_state_dict(fresh)
    train((module, ours), (3, 10, 8), steps=3)


def test_calls_that_the_published_forward_answers():
    module, ours = pair(codebook_size=16)
    x, codes = torch.randn(3, 10, 8), torch.randint(16, (3, 10))
    modules = (module.eval(), ours.eval())
    calls = [
        lambda m: m(x, indices=codes),
        lambda m: m.train()(x, topk=3),
        lambda m: m.train()(x, accum_ema_update=True),
    ]
    for call in calls:
        wanted, got = both(modules, call)
        assert_equal(got, wanted)
    train([one.train() for one in modules], (3, 10, 8))  # takes in what was accumulated
    weight = torch.rand(1, 16)
    wanted, got = both(modules, lambda m: m(x, ema_update_weight=weight))
    assert_equal(got, wanted)
    assert_same_state(ours, module)

    module, ours = pair(ResidualVQ, num_quantizers=3, codebook_size=16, beam_size=2)
    codes = torch.randint(16, (1, 10, 3))
    wanted, got = both((module.train(), ours.train()), lambda m: m(x[:1]))
    assert_equal(got, wanted)
    with pytest.raises(AssertionError, match="quantize dropout must be greater than 0"):
        ours.get_output_from_indices(codes[..., :2])


def test_freezing_in_the_call_overrides_the_module():
    for frozen in (True, False):
        modules = pair(freeze_codebook=frozen)
        train([module.train() for module in modules], (3, 10, 8), steps=2, freeze_codebook=not frozen)
        before = modules[1]._codebook.embed.clone()
        modules[1](torch.randn(3, 10, 8), freeze_codebook=not frozen)
        assert torch.equal(modules[1]._codebook.embed, before) == (not frozen)


def test_training_leaves_no_gradient_in_the_loss_of_eval():
    """As published before 1.32, whose training marks a buffer that evaluation returns."""
    _, ours = pair(commitment_weight=0.0)
    loss = ours.train()(torch.randn(3, 10, 8))[2]
    loss.backward()  # it has no terms, but can be differentiated
    assert not ours.zero.requires_grad
    assert not ours.eval()(torch.randn(3, 10, 8))[2].requires_grad


def test_near_ties_are_decided_exactly():
    """A fresh codebook is small beside its input: float32 distances from the published formula run together."""
    torch.manual_seed(0)
    module = VectorQuantize(dim=32, codebook_size=4096).eval()
    ours = copy.deepcopy(module)
    accelerate(ours, verbose=False)
    x = torch.randn(1, 200, 32) * 4
    distances = torch.cdist(x[0].double(), module.codebook.double())
    best = distances.amin(1)
    excess = [distances.gather(1, one(x)[1][0][:, None])[:, 0] / best - 1 for one in (module, ours)]
    assert excess[1].max() <= 1e-6
    assert (excess[1] > 0).sum() <= (excess[0] > 0).sum()


# ---- what stays, and what comes back ---------------------------------------------------------------------------------


@pytest.mark.parametrize("shared", [True, False])
def test_state_optimizer_copies_and_restore(shared):
    model = nn.Sequential(
        nn.Linear(8, 8), ResidualVQ(dim=8, codebook_size=16, num_quantizers=3, codebook_dim=4, shared_codebook=shared)
    )
    rich(model)
    attributes = [dict(part.__dict__) for part in model.modules()]
    parameters, state = dict(model.named_parameters()), copy.deepcopy(model.state_dict())
    optimizer = torch.optim.Adam(model.parameters())
    assert len(accelerate(model, verbose=False).swapped) == 4
    assert {entry.status for entry in accelerate(model, verbose=False).entries} == {"already"}
    twin = copy.deepcopy(model)
    assert all(new is parameters[name] for name, new in model.named_parameters())
    quantized, _, loss = model(torch.randn(3, 10, 8))
    (quantized.square().mean() + loss.sum()).backward()
    optimizer.step()
    after = model.state_dict()
    assert list(after) == list(state)
    changed = [key for key in state if not torch.equal(after[key], state[key])]
    assert any("project_in" in key for key in changed)
    assert any("embed_avg" in key for key in changed)
    assert all(torch.equal(twin.state_dict()[key], state[key]) for key in state), "a copy is independent"
    x = torch.randn(3, 10, 8)
    wanted = model.eval()(x)
    assert restore(model) == ["1", "1.layers.0", "1.layers.1", "1.layers.2"]
    assert [set(part.__dict__) for part in model.modules()] == [set(one) for one in attributes]
    assert_equal(model(x)[:2], wanted[:2])
    books = {layer._codebook for layer in model[1].layers}
    assert len({book.embed.untyped_storage().data_ptr() for book in books}) == len(books)
    model.load_state_dict(state)
    assert_equal(twin.eval()(x)[1], model.eval()(x)[1])


def test_moved_and_loaded_codebooks_are_seen():
    module, ours = pair(ResidualVQ, num_quantizers=3)
    module.eval(), ours.eval()
    other = {key: torch.randn_like(value) if "embed" in key else value for key, value in module.state_dict().items()}
    x = torch.randn(3, 10, 8)
    ours(x)
    for one in (module, ours):
        one.load_state_dict(other)
    assert_equal(ours(x), module(x))
    for one in (module, ours):
        one.half().float()
    assert_equal(ours(x), module(x))
    for one in (module, ours):
        for d, layer in enumerate(one.layers):
            layer.codebook = other[f"layers.{d}._codebook.embed"][0].flip(0)
    assert_equal(ours(x), module(x))


# ---- refusals --------------------------------------------------------------------------------------------------------


class Shifted(VectorQuantize):
    def forward(self, x, *args, **kwargs):
        return super().forward(x + 1, *args, **kwargs)


def _unnormed():
    module = VectorQuantize(dim=8, codebook_size=16, use_cosine_sim=True)
    module._codebook.embed.mul_(3)
    return module


def _own_choice():
    module = VectorQuantize(dim=8, codebook_size=16)
    module._codebook.gumbel_sample = lambda logits, **_: (logits.argmin(-1), None)
    return module


def _changed_update():
    module = VectorQuantize(dim=8, codebook_size=16)
    book = module._codebook
    track = type(book).track_cluster_size_and_embed_avg
    book.__class__ = type(
        "Codebook",
        (type(book),),
        {"track_cluster_size_and_embed_avg": lambda self, *a, **k: track(self, *a, **k) or self.cluster_size.mul_(0.5)},
    )
    return module


def vq(**options):
    return lambda: VectorQuantize(**{"dim": 8, "codebook_size": 16, **options})


def rvq(**options):
    return lambda: ResidualVQ(**{"dim": 8, "codebook_size": 16, "num_quantizers": 2, **options})


REFUSALS = {
    "learned": (vq(learnable_codebook=True, ema_update=False), "learned by gradient (learnable_codebook)"),
    "orthogonal": (vq(orthogonal_reg_weight=1.0), "orthogonal_reg_weight"),
    "affine": (vq(affine_param=True), "affine_param"),
    "sampled": (vq(stochastic_sample_codes=True), "stochastic_sample_codes"),
    "gumbel": (vq(straight_through=True, rotation_trick=False), "straight_through"),
    "diversity": (vq(codebook_diversity_loss_weight=1.0), "codebook_diversity_loss_weight"),
    "cross entropy": (vq(commitment_use_cross_entropy_loss=True), "commitment_use_cross_entropy_loss"),
    "directional": (vq(directional_reparam=True, threshold_ema_dead_code=2), "directional_reparam"),
    "optimizer": (
        vq(learnable_codebook=True, ema_update=False, in_place_codebook_optimizer=torch.optim.Adam),
        "in_place_codebook_optimizer",
    ),
    "bridge": (vq(vq_bridge=nn.Linear(8, 8)), "vq_bridge"),
    "own choice": (_own_choice, "chooses codes by a function of its own"),
    "unit length": (_unnormed, "not of unit length"),
    "overridden": (lambda: Shifted(dim=8, codebook_size=16), "Shifted overrides forward"),
    "another update": (_changed_update, "differs from what we compute"),
    "meta": (lambda: vq()().to("meta"), "on the meta device"),
    "qinco": (rvq(implicit_neural_codebook=True), "implicit_neural_codebook"),
    "diveq": (rvq(diveq=True, threshold_ema_dead_code=2), "diveq"),
    "sizes": (rvq(codebook_size=(16, 8)), "differ in size"),
    "images": (rvq(accept_image_fmap=True), "accept_image_fmap"),
    "layers": (rvq(affine_param=True), "layer 0: it fits its codebook"),
}


@pytest.mark.parametrize("name", REFUSALS)
def test_refusals_say_why_and_leave_the_module_alone(name):
    make, reason = REFUSALS[name]
    module = make()
    attributes = dict(module.__dict__)
    report = accelerate(module, verbose=False)
    assert report.refused
    assert reason in report.refused[0].text, report
    assert module.__dict__ == attributes
    if name in ("sizes", "images"):
        assert len(report.swapped) == 2, "the layers run on ours"
    else:
        assert not report.swapped


@pytest.mark.parametrize("name", ["_rotate", "_commitment", "_vq_move"])
def test_a_rehearsal_finds_what_differs(name, monkeypatch):
    """Were one of our formulas wrong for a version of the package, nothing would be swapped."""
    source = sys.modules[SOURCE]
    right = getattr(source, name)
    monkeypatch.setattr(
        source,
        name,
        lambda *args: right(*(a * 1.01 if torch.is_tensor(a) and a.is_floating_point() else a for a in args)),
    )
    report = accelerate(vq()(), verbose=False)
    assert "differs from what we compute" in report.refused[0].text


def test_accelerate_under_autocast():
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert accelerate(rvq()(), verbose=False).refused == []


def test_the_random_generator_is_left_as_it_was():
    module, generator = rich(vq(threshold_ema_dead_code=2)()), torch.get_rng_state()
    state = copy.deepcopy(module.state_dict())
    accelerate(module, verbose=False)
    assert torch.equal(torch.get_rng_state(), generator)
    assert all(torch.equal(value, state[key]) for key, value in module.state_dict().items())


# ---- two ranks -------------------------------------------------------------------------------------------------------


def _rank(rank, folder):
    os.environ.update(RANK=str(rank), WORLD_SIZE="2")
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{folder}/meeting", rank=rank, world_size=2)
    options = {"num_quantizers": 3, "sync_codebook": True, "threshold_ema_dead_code": 1, "quantize_dropout": True}
    torch.manual_seed(0)
    module = rich(ResidualVQ(dim=8, codebook_size=16, **options)).train()
    ours = copy.deepcopy(module)
    assert len(accelerate(ours, verbose=False).swapped) == 4
    for step in range(3):
        results = []
        for one in (module, ours):
            torch.manual_seed(10 * step + rank)
            results.append(one(torch.randn(2, 9, 8, requires_grad=True)))
        assert_equal(results[1], results[0])
    assert_same_state(ours, module)
    torch.save(ours.state_dict(), f"{folder}/{rank}.pt")
    dist.destroy_process_group()


def test_two_ranks_move_together(tmp_path):
    mp.start_processes(_rank, args=(str(tmp_path),), nprocs=2, start_method="spawn")
    first, second = (torch.load(tmp_path / f"{rank}.pt") for rank in range(2))
    assert all(torch.equal(first[key], second[key]) for key in first if "embed" in key)
