"""The search and the training step of RQ-VAE's quantizer, swapped: against the published code and stand-ins for it.

The stand-ins are written anew from the formulas and have the interface of the published classes; VILA-U's has no soft
codes. Where RQ-VAE's own package can be imported (`rqvae`, from kakaobrain/rq-vae-transformer, or VILA-U's
quantizations.py at that place) the same tests run on it.
"""

import copy
import importlib
import math
import os
import sys
import types

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from torch import nn

from unifiedar import accelerate, restore
from unifiedar.nn import ResidualQuantizer

# ---- the stand-in ----------------------------------------------------------------------------------------------------


class VQEmbedding(nn.Embedding):
    def __init__(self, n_embed, embed_dim, decay=0.99, restart_unused_codes=True, eps=1e-5):
        super().__init__(n_embed + 1, embed_dim, padding_idx=n_embed)
        self.ema, self.decay, self.eps = True, decay, eps
        self.restart_unused_codes, self.n_embed = restart_unused_codes, n_embed
        self.weight.requires_grad_(False)
        self.register_buffer("cluster_size_ema", torch.zeros(n_embed))
        self.register_buffer("embed_ema", self.weight[:-1].clone())

    @torch.no_grad()
    def compute_distances(self, inputs):
        flat, table = inputs.reshape(-1, inputs.shape[-1]), self.weight[:-1]
        norms = (flat * flat).sum(1, keepdim=True) + (table * table).sum(1)
        return torch.addmm(norms, flat, table.t(), alpha=-2).reshape(*inputs.shape[:-1], -1)

    @torch.no_grad()
    def find_nearest_embedding(self, inputs):
        return self.compute_distances(inputs).argmin(dim=-1)

    @torch.no_grad()
    def _step(self, vectors, codes):
        vectors, codes, size = vectors.reshape(-1, vectors.shape[-1]), codes.reshape(-1), self.n_embed
        chosen = nn.functional.one_hot(codes, size).to(vectors.dtype)
        counts, sums = chosen.sum(0), chosen.t() @ vectors
        if dist.is_initialized():
            dist.all_reduce(sums)
            dist.all_reduce(counts)
        self.cluster_size_ema.mul_(self.decay).add_(counts, alpha=1 - self.decay)
        self.embed_ema.mul_(self.decay).add_(sums, alpha=1 - self.decay)
        if not self.restart_unused_codes:
            return
        if len(vectors) < size:
            vectors = vectors.repeat(math.ceil(size / len(vectors)), 1)
            vectors = vectors + torch.rand_like(vectors) * (0.01 / math.sqrt(vectors.shape[1]))
        drawn = vectors[torch.randperm(len(vectors), device=vectors.device)][:size]
        if dist.is_initialized():
            dist.broadcast(drawn, 0)
        dead = self.cluster_size_ema < 1
        self.embed_ema[dead] = drawn[dead]
        self.cluster_size_ema[dead] = 1

    def forward(self, inputs):
        codes = self.find_nearest_embedding(inputs)
        if self.training:
            self._step(inputs, codes)
        rows = self.embed(codes)
        if self.training:
            with torch.no_grad():
                total = self.cluster_size_ema.sum()
                sizes = total * (self.cluster_size_ema + self.eps) / (total + self.n_embed * self.eps)
                self.weight[:-1] = self.embed_ema / sizes[:, None]
        return rows, codes

    def embed(self, idxs):
        return super().forward(idxs)


class Quantizer(nn.Module):
    def __init__(self, latent_shape, code_shape, n_embed, decay=0.99, shared_codebook=False, restart_unused_codes=True):
        super().__init__()
        self.latent_shape, self.code_shape = torch.Size(latent_shape), torch.Size(code_shape)
        self.ratio = (latent_shape[0] // code_shape[0], latent_shape[1] // code_shape[1])
        self.shared_codebook, depth = shared_codebook, code_shape[-1]
        width = self.ratio[0] * self.ratio[1] * latent_shape[2]
        books = [
            VQEmbedding(n_embed, width, decay, restart_unused_codes) for _ in range(1 if shared_codebook else depth)
        ]
        self.codebooks = nn.ModuleList(books * depth if shared_codebook else books)

    def to_code_shape(self, x):
        b, height, width, c = x.shape
        (rh, rw) = self.ratio
        x = x.reshape(b, height // rh, rh, width // rw, rw, c).transpose(2, 3)
        return x.reshape(b, height // rh, width // rw, rh * rw * c)

    def to_latent_shape(self, x):
        b, h, w, _ = x.shape
        (rh, rw), c = self.ratio, self.latent_shape[2]
        return x.reshape(b, h, w, rh, rw, c).transpose(2, 3).reshape(b, h * rh, w * rw, c)

    def quantize(self, x):
        rest, total, sums, codes = x.detach().clone(), torch.zeros_like(x), [], []
        for book in self.codebooks:
            row, code = book(rest)
            rest -= row
            total += row
            sums.append(total.clone())
            codes.append(code)
        return sums, torch.stack(codes, dim=-1)

    def forward(self, x):
        grouped = self.to_code_shape(x)
        sums, codes = self.quantize(grouped)
        loss = torch.stack([((grouped - one.detach()) ** 2).mean() for one in sums]).mean()
        out = self.to_latent_shape(sums[-1])
        return x + (out - x).detach(), loss, codes

    @torch.no_grad()
    def embed_code(self, code):
        assert code.shape[1:] == self.code_shape
        rows = [book.embed(code[..., d]) for d, book in enumerate(self.codebooks)]
        return self.to_latent_shape(torch.stack(rows, dim=-2).sum(-2))


class WithoutSoftCodes(Quantizer):
    """VILA-U's."""


class RQBottleneck(Quantizer):
    """RQ-VAE's."""

    @torch.no_grad()
    def get_soft_codes(self, x, temp=1.0, stochastic=False):
        rest, soft, codes = self.to_code_shape(x).detach().clone(), [], []
        for book in self.codebooks:
            distances = book.compute_distances(rest)
            soft.append(torch.softmax(-distances / temp, dim=-1))
            code = distances.argmin(-1)
            if stochastic:
                code = torch.multinomial(soft[-1].flatten(0, -2), 1).view(code.shape)
            rest -= book.embed(code)
            codes.append(code)
        return torch.stack(soft, -2), torch.stack(codes, -1)


def _published(cls, name, module):
    cls.__module__, cls.__name__ = module, name
    for path in (module.partition(".")[0], module):
        sys.modules.setdefault(path, types.ModuleType(path))


_published(VQEmbedding, "VQEmbedding", "rqvae_trained_stand_in.quantizations")
_published(RQBottleneck, "RQBottleneck", "rqvae_trained_stand_in.quantizations")
_published(WithoutSoftCodes, "RQBottleneck", "vila_u_trained_stand_in.quantizations")


PACKAGES = ["stand-in", "stand-in without soft codes", "published"]


def _package(name):
    if name == "published":
        return pytest.importorskip("rqvae.models.rqvae.quantizations").RQBottleneck
    return RQBottleneck if name == "stand-in" else WithoutSoftCodes


@pytest.fixture(params=PACKAGES)
def bottleneck(request):
    """The class to accelerate."""
    return _package(request.param)


LAYOUTS = [
    pytest.param({"shared_codebook": True}, id="shared"),
    pytest.param({"shared_codebook": False}, id="distinct"),
    pytest.param({"shared_codebook": True, "latent_shape": (4, 6, 8), "code_shape": (2, 2, 3)}, id="shared, regrouped"),
    pytest.param({"shared_codebook": False, "code_shape": (4, 4, 1)}, id="one depth"),
]


def make(cls, *, latent_shape=(4, 4, 8), code_shape=(4, 4, 3), n_embed=24, dtype=torch.float32, **options):
    torch.manual_seed(0)
    return cls(latent_shape, code_shape, n_embed, **options).to(dtype)


def lived(module):
    """Averages as after some training: some codes live on, some are about to die.

    Where all die at once they come back in pairs, equal but for rounding, and any of a pair may be chosen.
    """
    for book in dict.fromkeys(module.codebooks):
        book.cluster_size_ema.uniform_(0.5, 3)
        book.embed_ema.copy_(book.weight[:-1] * book.cluster_size_ema[:, None])
    return module


def features(module, seed, batch=3, dtype=torch.float32):
    generator = torch.Generator().manual_seed(seed)
    return torch.randn((batch, *module.latent_shape), generator=generator, dtype=dtype)


def swapped(module):
    twin = copy.deepcopy(module)
    report = accelerate(twin, verbose=False)
    assert not report.refused, report
    searches = "quantize and get_soft_codes" if hasattr(module, "get_soft_codes") else "; quantize"
    assert f"{searches} by residual_quantize" in report.entries[0].text, report
    return twin


def assert_same_state(got, wanted):
    got, wanted = got.state_dict(), wanted.state_dict()
    assert list(got) == list(wanted)
    for key, value in wanted.items():
        torch.testing.assert_close(got[key], value, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_eval_equals_the_published_one(bottleneck, layout, dtype):
    module = make(bottleneck, dtype=dtype, **layout).eval()
    ours, x = swapped(module), features(module, 1, dtype=dtype)
    calls = {
        "forward": lambda m: m(x),
        "quantize": lambda m: m.quantize(m.to_code_shape(x)),
        "codebook": lambda m: m.codebooks[0](m.to_code_shape(x)),
        "nearest": lambda m: m.codebooks[-1].find_nearest_embedding(m.to_code_shape(x)),
    }
    if hasattr(module, "get_soft_codes"):
        calls["soft"] = lambda m: m.get_soft_codes(x, temp=0.5)
        calls["drawn"] = lambda m: m.get_soft_codes(x, temp=2.0, stochastic=True)
    for call in calls.values():
        results = []
        for one in (module, ours):
            torch.manual_seed(3)
            results.append(call(one))
        torch.testing.assert_close(results[1], results[0])
    assert_same_state(ours, module)


@pytest.mark.parametrize("restart", [True, False])
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("n_embed", [24, 200])
def test_training_equals_the_published_one(bottleneck, layout, restart, n_embed):
    """24 codes for 48 vectors, and 200: more codes than vectors, so that those drawn for restarts are tiled."""
    module = make(bottleneck, n_embed=n_embed, decay=0.8, restart_unused_codes=restart, **layout).train()
    ours = swapped(lived(module))
    for step in range(5):
        results = []
        for one in (module, ours):
            torch.manual_seed(step)
            x = features(module, step).requires_grad_()
            out, loss, codes = one(x)
            (out.square().sum() + loss).backward()
            results.append((out, loss, codes, x.grad))
        torch.testing.assert_close(results[1], results[0], rtol=1e-5, atol=1e-6)
    assert_same_state(ours, module)
    assert not torch.equal(module.codebooks[0].weight, make(bottleneck, n_embed=n_embed, **layout).codebooks[0].weight)
    assert not module.codebooks[0].weight[-1].any()


@pytest.mark.parametrize("shared", [True, False])
def test_on_every_device(bottleneck, shared, device):
    """At a size that the kernels cut into tiles; float32's own rounding may decide a code in thousands otherwise."""
    module = make(bottleneck, latent_shape=(8, 8, 64), code_shape=(8, 8, 4), n_embed=500, shared_codebook=shared)
    module = lived(module).to(device).eval()
    ours, x = swapped(module), features(module, 1, batch=16).to(device)
    wanted, got = module(x), ours(x)
    same = (got[2] == wanted[2]).all(-1)
    assert same.float().mean() > 0.995
    torch.testing.assert_close(got[0][same], wanted[0][same])
    torch.testing.assert_close(got[1], wanted[1], rtol=1e-4, atol=0)
    results = []
    for one in (module.train(), ours.train()):
        torch.manual_seed(0)
        results.append(one(x))
    assert (results[1][2] == results[0][2]).float().mean() > 0.99
    torch.testing.assert_close(results[1][1], results[0][1], rtol=1e-3, atol=0)
    for key, value in module.state_dict().items():
        close = torch.isclose(ours.state_dict()[key], value, rtol=1e-4, atol=1e-5)
        assert close.float().mean() > 0.98, key


@pytest.mark.gpu
@pytest.mark.parametrize("shared", [True, False])
@pytest.mark.parametrize("training", [False, True])
def test_a_forward_does_not_wait_for_the_gpu(bottleneck, shared, training):
    ours = swapped(make(bottleneck, shared_codebook=shared).cuda().train(training))
    x = features(ours, 1).cuda()
    ours(x)
    torch.cuda.set_sync_debug_mode("error")
    try:
        ours(x)
    finally:
        torch.cuda.set_sync_debug_mode("default")


@pytest.mark.parametrize("shared", [True, False])
def test_training_a_codebook_alone(bottleneck, shared):
    module = make(bottleneck, shared_codebook=shared).codebooks[0].train()
    ours = copy.deepcopy(module)
    report = accelerate(ours, verbose=False)
    assert [(entry.path, entry.status) for entry in report.entries] == [("", "swapped")]
    for step in range(3):
        results = []
        for one in (module, ours):
            torch.manual_seed(step)
            results.append(one(torch.randn(5, 6, 8)))
        torch.testing.assert_close(results[1], results[0])
    assert_same_state(ours, module)
    assert restore(ours) == [""]


def test_the_parts_that_search_are_ours(bottleneck, monkeypatch):
    import unifiedar.nn.codes

    ours, seen = swapped(make(bottleneck, shared_codebook=True)), []
    for name in ("residual_quantize", "code_statistics"):
        function = getattr(unifiedar.nn.codes, name)
        monkeypatch.setattr(
            unifiedar.nn.codes, name, lambda *a, f=function, n=name: seen.append((n, len(a[0]))) or f(*a)
        )
    ours.eval()(features(ours, 1))
    assert seen == [("residual_quantize", 3)], "all depths at once"
    ours.train()(features(ours, 1))
    assert seen[1:] == [("residual_quantize", 3), ("code_statistics", 48)] * 3, "a depth at a time"


def test_half_precision_is_no_further_off_than_the_published_one(bottleneck):
    """The published one rounds distances and rests to the dtype; ours only the sums."""
    module = make(bottleneck, shared_codebook=True, n_embed=64).eval()
    x = features(module, 1, batch=16)
    exact = copy.deepcopy(module).double()(x.double())[0]
    error = []
    for one in (module, swapped(module)):
        one = one.to(torch.bfloat16)
        out, loss, _ = one(x.to(torch.bfloat16))
        assert out.dtype == loss.dtype == torch.bfloat16
        error.append((out.double() - x.double()).square().mean())
    assert (exact - x.double()).square().mean() < 1.01 * error[1] < 1.02 * 1.01 * error[0]


def test_autocast_searches_exactly(bottleneck):
    module = make(bottleneck, shared_codebook=True, n_embed=64).train()
    ours, plain = swapped(module), copy.deepcopy(module)
    x = features(module, 1)
    torch.manual_seed(0)
    wanted = plain(x)
    torch.manual_seed(0)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        got = ours(x)
    torch.testing.assert_close(got[2], wanted[2])
    torch.testing.assert_close(got[0], wanted[0])
    assert_same_state(ours, plain)
    with torch.autocast("cpu", dtype=torch.bfloat16):  # features as a layer before leaves them
        wanted, got = (one.eval().quantize(x.bfloat16()) for one in (plain, ours))
    assert [one.dtype for one in got[0]] == [one.dtype for one in wanted[0]] == [torch.bfloat16] * 3
    assert (got[1] == wanted[1]).float().mean() > 0.9


@pytest.mark.parametrize("training", [False, True])
@pytest.mark.parametrize("shared", [True, False])
def test_it_compiles_whole_as_the_published_one_does(bottleneck, shared, training, fresh_compiler):
    module = lived(make(bottleneck, shared_codebook=shared)).train(training)
    ours = swapped(module)
    compiled = torch.compile(ours, fullgraph=True, backend="eager")
    for step in range(2):
        results = []
        for one in (module, compiled):
            torch.manual_seed(step)
            results.append(one(torch.randn(3, 4, 4, 8)))
        torch.testing.assert_close(results[1], results[0], rtol=1e-5, atol=1e-6)
    assert_same_state(ours, module)


def test_state_optimizer_and_restore(bottleneck):
    module = nn.ModuleDict({"encoder": nn.Linear(8, 8), "quantizer": make(bottleneck, shared_codebook=False)}).train()
    parameters = dict(module.named_parameters())
    state = {key: value.clone() for key, value in module.state_dict().items()}
    optimizer = torch.optim.Adam(p for p in module.parameters() if p.requires_grad)
    accelerate(module, verbose=False)
    assert all(new is parameters[name] for name, new in module.named_parameters())
    out, loss, _ = module["quantizer"](module["encoder"](features(module["quantizer"], 1)))
    (out.square().mean() + loss).backward()
    optimizer.step()
    trained = {key: value.clone() for key, value in module.state_dict().items()}
    assert list(trained) == list(state)
    assert not torch.equal(trained["quantizer.codebooks.1.embed_ema"], state["quantizer.codebooks.1.embed_ema"])
    assert restore(module) == ["quantizer", *(f"quantizer.codebooks.{d}" for d in range(3))]
    assert not [name for part in module.modules() for name in part.__dict__ if "unifiedar" in name]
    assert "quantize" not in module["quantizer"].__dict__
    assert "forward" not in module["quantizer"].codebooks[0].__dict__
    assert all(torch.equal(value, trained[key]) for key, value in module.state_dict().items())
    module.load_state_dict(state)


def test_calls_that_stay_the_published_ones(bottleneck):
    module = make(bottleneck, shared_codebook=True).eval()
    ours = swapped(module)
    with pytest.raises(Exception):  # noqa: B017 - whatever the published code raises
        ours.quantize(features(ours, 1)[..., :5])
    module.codebooks[0].weight.requires_grad_(True)
    assert swapped(module).quantize(features(module, 1))[0][0].requires_grad


# ---- refusals --------------------------------------------------------------------------------------------------------


class Farthest(VQEmbedding):
    def find_nearest_embedding(self, inputs):
        return self.compute_distances(inputs).argmax(dim=-1)


def test_what_searches_otherwise_is_left_alone():
    module = make(RQBottleneck, shared_codebook=True)
    far = Farthest(24, 8)
    module.codebooks = nn.ModuleList([far] * 3)
    report = accelerate(module, verbose=False)
    quantizer, book = report.entries
    assert quantizer.status == "swapped"
    assert "quantize and get_soft_codes left alone: its quantize differs from what we compute" in quantizer.text
    assert (book.status, book.text) == ("refused", "Farthest overrides find_nearest_embedding")
    assert "quantize" not in module.__dict__


def test_what_trains_otherwise_is_left_alone():
    class Slower(VQEmbedding):
        def _step(self, vectors, codes):
            super()._step(vectors, codes)
            self.embed_ema.mul_(0.5)

    module = make(RQBottleneck, shared_codebook=True)
    module.codebooks = nn.ModuleList([Slower(24, 8)] * 3)
    quantizer, book = accelerate(module, verbose=False).entries
    assert "left alone: its codebooks.0.weight afterwards differs" in quantizer.text or "in training" in quantizer.text
    assert book.status == "refused"


def test_codebooks_trained_by_gradient_are_left_alone():
    module = make(RQBottleneck, shared_codebook=True)
    module.codebooks[0].ema = False
    quantizer, book = accelerate(module, verbose=False).entries
    assert "left alone: its codebook is trained by gradient" in quantizer.text
    assert "trained by gradient" in book.text


def test_a_rehearsal_leaves_no_trace():
    module = make(RQBottleneck, shared_codebook=False).train()
    before = copy.deepcopy(module.state_dict())
    generator = torch.get_rng_state()
    accelerate(module, verbose=False)
    assert torch.equal(torch.get_rng_state(), generator)
    assert all(torch.equal(value, before[key]) for key, value in module.state_dict().items())
    assert module.training


# ---- two ranks -------------------------------------------------------------------------------------------------------


def _rank(rank, folder, name):
    os.environ.update(RANK=str(rank), WORLD_SIZE="2")
    torch.set_num_threads(1)
    module = make(_package(name), shared_codebook=True, decay=0.8).train()
    ours = swapped(module)
    dist.init_process_group("gloo", init_method=f"file://{folder}/meeting", rank=rank, world_size=2)
    for step in range(3):
        for one in (module, ours):
            torch.manual_seed(10 * step + rank)
            one(features(one, 10 * step + rank))
    assert_same_state(ours, module)
    torch.save(ours.state_dict(), f"{folder}/{rank}.pt")
    dist.destroy_process_group()


@pytest.mark.parametrize("name", ["stand-in", "published"])
def test_two_ranks_move_together(tmp_path, name):
    _package(name)
    mp.start_processes(_rank, args=(str(tmp_path), name), nprocs=2, start_method="spawn")
    first, second = (torch.load(tmp_path / f"{rank}.pt") for rank in range(2))
    assert all(torch.equal(first[key], second[key]) for key in first)


# ---- the module of ours ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("shared", [True, False])
@pytest.mark.parametrize("restart", [True, False])
def test_residual_quantizer_loads_the_keys_and_answers_the_same(bottleneck, shared, restart):
    published = make(bottleneck, shared_codebook=shared, decay=0.8, restart_unused_codes=restart)
    module = ResidualQuantizer(24, 8, 3, shared=shared, decay=0.8, update="depth", restart=restart)
    module.load_state_dict(published.state_dict(), strict=True)
    assert list(module.state_dict()) == list(published.state_dict())
    x = features(published, 1)

    published.eval(), module.eval()
    out, loss, codes = published(x)
    got = module(x)
    torch.testing.assert_close((got.features, got.commitment, got.codes), (out, loss, codes))
    sums, codes = module.quantize(x)
    torch.testing.assert_close((sums, codes), published.quantize(x))
    torch.testing.assert_close(module.compute_commitment_loss(x, sums), loss)
    codes[0, 0, 0, 0] = 24  # the padding
    torch.testing.assert_close(module.embed_code(codes), published.embed_code(codes))
    rows, _ = module.embed_code_with_depth(codes)
    torch.testing.assert_close(rows.sum(-2), module.embed_code(codes))
    if hasattr(published, "embed_code_with_depth"):
        torch.testing.assert_close(rows, published.embed_code_with_depth(codes)[0])
    torch.testing.assert_close(module.embed_partial_code(codes, 1), rows[..., 1, :])
    torch.testing.assert_close(module.embed_partial_code(codes, 1, "add"), rows[..., :2, :].sum(-2))
    for stochastic in (False, True) if hasattr(published, "get_soft_codes") else ():
        results = []
        for one in (module, published):
            torch.manual_seed(2)
            results.append(one.get_soft_codes(x, 0.7, stochastic))
        torch.testing.assert_close(*results)
    assert not module.embed_code(codes).requires_grad

    if restart:
        return  # ours draws its restarts otherwise
    published.train(), module.train()
    for book in (*published.codebooks, *module.codebooks):
        book.cluster_size_ema.fill_(2)
    for step in range(3):
        x = features(published, step)
        torch.testing.assert_close(module(x).codes, published(x)[2])
    assert_same_state(module, published)


def test_different_tables_are_not_loaded_into_a_shared_one():
    own = ResidualQuantizer(8, 4, 3, shared=False)
    shared = ResidualQuantizer(8, 4, 3)
    with pytest.raises(RuntimeError, match="the depths' tables differ"):
        nn.Sequential(shared).load_state_dict(nn.Sequential(own).state_dict())
    state = own.state_dict()
    equal = {key: state[key.replace(".2.", ".0.").replace(".1.", ".0.")].clone() for key in state}
    shared.load_state_dict(equal, strict=True)
    own.load_state_dict(equal, strict=True)
    assert torch.equal(shared.table, own.table[1])
    copy.deepcopy(shared).load_state_dict(shared.state_dict())


def test_dead_codes_stay_without_restarts():
    module = ResidualQuantizer(8, 4, 2, restart=False, decay=0.5).train()
    table, size = module.table.clone(), module.codebooks[0].cluster_size_ema
    size.fill_(1)
    module.codebooks[0].embed_ema.copy_(table)
    module._move(torch.randn(10, 2, 4), torch.zeros(10, 2, dtype=torch.int64))
    assert torch.equal(size, torch.tensor([10.5] + [0.5] * 7))
    torch.testing.assert_close(module.table[1:], table[1:], rtol=1e-3, atol=0)


@pytest.mark.parametrize(
    ("call", "text"),
    [
        (lambda m: m.get_soft_codes(torch.zeros(2, 4), 0.0), "temp must be above 0, got 0.0"),
        (lambda m: m.embed_partial_code(torch.zeros(1, 2).long(), 2), r"code_idx must be in \[0, 2\), got 2"),
        (lambda m: m.embed_partial_code(torch.zeros(1, 2).long(), 0, "mean"), "decode_type must be .* got 'mean'"),
        (lambda m: m(torch.zeros(2, 3)), r"x must be \(..., 4\)"),
        (lambda m: m.train()(torch.zeros(0, 3, 4)), r"at least one vector in training mode, got \(0, 3, 4\)"),
        (lambda m: m.train().quantize(torch.zeros(0, 4)), "at least one vector"),
        (lambda m: m(torch.zeros(2, 4).long()), "ResidualQuantizer: x must be float32, .* got int64"),
        (lambda m: m.get_soft_codes([1.0]), "get_soft_codes: x must be a tensor, got list"),
        (lambda m: ResidualQuantizer(0, 4, 2), "ResidualQuantizer: num_codes must be at least 1, got 0"),
        (lambda m: ResidualQuantizer(8, 4.0, 2), "ResidualQuantizer: dim must be an integer, got float"),
        (lambda m: ResidualQuantizer(8, 4, -1), "ResidualQuantizer: depth must be at least 1, got -1"),
        (lambda m: ResidualQuantizer(8, 4, 2, decay=1.5), "ResidualQuantizer: decay must be at most 1, got 1.5"),
        (lambda m: ResidualQuantizer(8, 4, 2, update="never"), "update must be 'step' or 'depth', got 'never'"),
    ],
)
def test_bad_arguments(call, text):
    with pytest.raises((ValueError, TypeError), match=text):
        call(ResidualQuantizer(8, 4, 2))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64])
@pytest.mark.parametrize("options", [{}, {"shared": False}, {"update": "depth"}], ids=str)
def test_a_cast_module_trains(dtype, options):
    torch.manual_seed(6)  # of draws without a near tie
    module = ResidualQuantizer(8, 4, 2, decay=0.5, **options).train()
    x = torch.randn(40, 4).to(dtype)
    state, seed = module.state_dict(), torch.get_rng_state()
    cast = ResidualQuantizer(8, 4, 2, decay=0.5, **options).train()
    cast.load_state_dict({name: one.to(dtype).float() for name, one in state.items()})
    module.load_state_dict(cast.state_dict())
    module.to(dtype)
    outcomes = []
    for one in (cast, module):
        torch.set_rng_state(seed)
        outcomes.append(one(x))
    assert torch.equal(outcomes[0].codes, outcomes[1].codes)
    assert outcomes[1].features.dtype == dtype
    for name, moved in module.state_dict().items():
        assert moved.dtype == dtype
        torch.testing.assert_close(moved.float(), cast.state_dict()[name], rtol=0.02, atol=0.02)


def test_no_vectors_are_quantized_to_none():
    module = ResidualQuantizer(8, 4, 2).eval()
    found = module(torch.zeros(0, 3, 4))
    assert (found.features.shape, found.codes.shape) == ((0, 3, 4), (0, 3, 2))


def test_the_published_package_is_found_or_skipped():
    """So that a typing error in its name cannot hide that nothing ran against it."""
    try:
        importlib.import_module("rqvae")
    except ImportError:
        pytest.skip("rqvae is not installed")
    assert _package("published").__module__ == "rqvae.models.rqvae.quantizations"
