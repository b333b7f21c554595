"""accelerate and restore, on stand-ins with the names and interface of the published residual quantizer."""

import copy
import io
import pickle
import sys
import types

import pytest
import torch
from torch import nn

import unifiedar
from unifiedar import accelerate, restore
from unifiedar.accelerate import ADAPTERS, Adapter, Report, Swap

ADAPTER = "residual quantizer of RQ-VAE and VILA-U"


class VQEmbedding(nn.Embedding):
    """A codebook of n_embed rows and a zero row behind them; EMA training, so its weight takes no gradient."""

    def __init__(self, n_embed, embed_dim):
        super().__init__(n_embed + 1, embed_dim, padding_idx=n_embed)
        self.n_embed = n_embed
        self.weight.requires_grad_(False)
        self.register_buffer("cluster_size_ema", torch.zeros(n_embed))
        self.register_buffer("embed_ema", self.weight[:-1].clone())

    def embed(self, idxs):
        return super().forward(idxs)


class Quantizer(nn.Module):
    """What RQ-VAE's and VILA-U's quantizers have in common, written anew: one lookup a depth, then the sum."""

    def __init__(self, latent_shape=(4, 4, 8), code_shape=(4, 4, 3), n_embed=32, shared_codebook=True):
        super().__init__()
        depth = code_shape[-1]
        factor = (latent_shape[0] // code_shape[0]) * (latent_shape[1] // code_shape[1])
        sizes = n_embed if isinstance(n_embed, list) else [n_embed] * depth
        books = [VQEmbedding(size, factor * latent_shape[2]) for size in sizes]
        self.codebooks = nn.ModuleList([books[0]] * depth if shared_codebook else books)
        self.latent_shape, self.code_shape = torch.Size(latent_shape), torch.Size(code_shape)
        self.shared_codebook = shared_codebook

    def to_latent_shape(self, x):
        (b, h, w, _), (height, width, c) = x.shape, self.latent_shape
        x = x.reshape(b, h, w, height // h, width // w, c).transpose(2, 3)
        return x.reshape(b, height, width, c)

    def _rows(self, code):
        return [
            self.codebooks[0 if self.shared_codebook else d].embed(code[..., d : d + 1]) for d in range(code.shape[-1])
        ]

    def _embed(self, code):
        assert code.shape[1:] == self.code_shape
        return self.to_latent_shape(torch.cat(self._rows(code), dim=-2).sum(-2))

    @torch.no_grad()
    def embed_code_with_depth(self, code, to_latent_shape=False):
        return torch.cat(self._rows(code), dim=-2), None


class RQBottleneck(Quantizer):
    @torch.no_grad()
    def embed_code(self, code):
        return self._embed(code)

    @torch.no_grad()
    def embed_partial_code(self, code, code_idx, decode_type="select"):
        assert code_idx < self.code_shape[-1]
        rows = self._rows(code)
        if decode_type == "select":
            return self.to_latent_shape(rows[code_idx].squeeze(-2))
        if decode_type == "add":
            return self.to_latent_shape(torch.cat(rows[: code_idx + 1], dim=-2).sum(-2))
        raise NotImplementedError(decode_type)


class RQBottleneckWithoutPartialCodes(Quantizer):
    """VILA-U's has no embed_partial_code."""

    @torch.no_grad()
    def embed_code(self, code):
        return self._embed(code)


class RQBottleneckWithGradient(Quantizer):
    """A fork whose codebook is trained by gradient."""

    def embed_code(self, code):
        return self._embed(code)


class RQBottleneckOfProducts(Quantizer):
    """A fork that answers something else under the same name."""

    @torch.no_grad()
    def embed_code(self, code):
        return self.to_latent_shape(torch.cat(self._rows(code), dim=-2).prod(-2))


def _published(cls, name, module):
    cls.__module__, cls.__name__, cls.__qualname__ = module, "RQBottleneck", name
    for path in (module.partition(".")[0], module):  # pickle imports the parent first
        sys.modules.setdefault(path, types.ModuleType(path))
    setattr(sys.modules[module], name, cls)


_published(RQBottleneck, "RQBottleneck", "rqvae_stand_in.quantizations")
_published(RQBottleneckWithoutPartialCodes, "RQBottleneck", "vila_u_stand_in.quantizations")
_published(RQBottleneckWithGradient, "RQBottleneckWithGradient", "fork_stand_in.quantizations")
_published(RQBottleneckOfProducts, "RQBottleneckOfProducts", "fork_stand_in.quantizations")


class Model(nn.Module):
    """A whole model around a quantizer."""

    def __init__(self, quantizer):
        super().__init__()
        self.encoder = nn.Conv2d(3, 4, 1)
        self.quantizer = quantizer

    def decode_code(self, code):
        return self.quantizer.embed_code(code) * 2


def quantizer(cls=RQBottleneck, *, dtype=torch.float32, **sizes):
    torch.manual_seed(0)
    return cls(**sizes).to(dtype)


def codes_for(module, batch=2, dtype=torch.int64):
    generator = torch.Generator().manual_seed(1)
    # n_embed, the padding, is a valid code as well.
    size = min(book.n_embed for book in module.codebooks) + 1
    return torch.randint(size, (batch, *module.code_shape), generator=generator, dtype=dtype)


def assert_as_exact_as(got, wanted, oracle):
    """DESIGN: at most twice the error of the eager formula."""
    assert got.shape == wanted.shape
    assert got.dtype == wanted.dtype
    assert (got.double() - oracle).abs().max() <= 2 * (wanted.double() - oracle).abs().max() + 1e-5


LAYOUTS = [
    pytest.param({}, id="shared"),
    pytest.param({"shared_codebook": False}, id="distinct"),
    pytest.param({"latent_shape": (4, 4, 8), "code_shape": (2, 2, 5)}, id="shared, regrouped"),
    pytest.param(
        {"latent_shape": (6, 3, 8), "code_shape": (2, 3, 5), "shared_codebook": False}, id="distinct, regrouped"
    ),
    pytest.param({"code_shape": (4, 4, 1), "shared_codebook": False}, id="one depth"),
]
DTYPES = [torch.float32, torch.bfloat16, torch.float16, torch.float64]


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("sizes", LAYOUTS)
def test_the_swapped_sum_equals_the_published_one(sizes, dtype):
    module = quantizer(dtype=dtype, **sizes)
    codes = codes_for(module)
    oracle = copy.deepcopy(module).double()
    depth = module.code_shape[-1]
    calls = [("embed_code", ())]
    calls += [("embed_partial_code", (d, how)) for d in range(depth) for how in ("select", "add")]
    wanted = [getattr(module, name)(codes, *arguments) for name, arguments in calls]
    report = accelerate(module, verbose=False)
    assert [entry.status for entry in report.entries] == ["swapped"]
    for (name, arguments), expected in zip(calls, wanted, strict=True):
        got = getattr(module, name)(codes, *arguments)
        assert_as_exact_as(got, expected, getattr(oracle, name)(codes, *arguments))


def test_the_swap_runs_on_residual_lookup(monkeypatch):
    module = quantizer()
    accelerate(module, verbose=False)
    seen = []
    source = sys.modules["unifiedar.accelerate._rqvae"]
    original = source.residual_lookup
    monkeypatch.setattr(source, "residual_lookup", lambda *args: seen.append(args) or original(*args))
    codes = codes_for(module)
    module.embed_code(codes)
    module.embed_partial_code(codes, 1, "add")
    (whole, table), (part, _) = seen
    assert table.data_ptr() == module.codebooks[0].weight.data_ptr(), "the weight itself, not a copy"
    assert torch.equal(whole, codes)
    assert torch.equal(part, codes[..., :2])


@pytest.mark.parametrize("sizes", LAYOUTS)
def test_weights_and_state_dict_are_untouched(sizes):
    module = quantizer(**sizes)
    parameters = dict(module.named_parameters())
    before = {name: tensor.clone() for name, tensor in module.state_dict().items()}
    for change in (accelerate, restore):
        change(module)
        after = module.state_dict()
        assert list(after) == list(before)
        assert all(torch.equal(after[name], before[name]) for name in before)
        assert all(new is parameters[name] for name, new in module.named_parameters())


@pytest.mark.parametrize("sizes", LAYOUTS)
def test_restore_leaves_nothing_behind(sizes):
    module = quantizer(**sizes)
    attributes, codes = dict(module.__dict__), codes_for(module)
    wanted = module.embed_code(codes)
    accelerate(module, verbose=False)
    assert "embed_code" in module.__dict__
    assert restore(module) == [""]
    assert module.__dict__ == attributes
    assert torch.equal(module.embed_code(codes), wanted)
    pointers = [book.weight.untyped_storage().data_ptr() for book in module.codebooks]
    assert len(set(pointers)) == len({id(book) for book in module.codebooks}), (
        "each codebook has memory of its own again"
    )
    assert restore(module) == []


def test_accelerate_twice_changes_nothing():
    model = Model(quantizer(shared_codebook=False))
    first = accelerate(model, verbose=False)
    attributes = dict(model.quantizer.__dict__)
    pointers = [book.weight.data_ptr() for book in model.quantizer.codebooks]
    second = accelerate(model, verbose=False)
    assert model.quantizer.__dict__ == attributes
    assert [book.weight.data_ptr() for book in model.quantizer.codebooks] == pointers
    assert [(entry.path, entry.status) for entry in second.entries] == [("quantizer", "already")]
    assert second.swapped[0].text == first.swapped[0].text
    assert restore(model) == ["quantizer"]


def test_a_model_around_the_quantizer_uses_it():
    model = Model(quantizer(RQBottleneckWithoutPartialCodes, shared_codebook=False))
    codes = codes_for(model.quantizer)
    wanted = model.decode_code(codes)
    report = accelerate(model, verbose=False)
    assert [entry.path for entry in report.swapped] == ["quantizer"]
    assert "embed_partial_code" not in model.quantizer.__dict__
    torch.testing.assert_close(model.decode_code(codes), wanted)


def test_the_rows_by_depth_stay_the_published_method():
    module = quantizer()
    codes = codes_for(module)
    wanted, _ = module.embed_code_with_depth(codes)
    accelerate(module, verbose=False)
    assert "embed_code_with_depth" not in module.__dict__
    assert torch.equal(module.embed_code_with_depth(codes)[0], wanted)


# ---- the weights live on ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("sizes", LAYOUTS)
def test_later_changes_of_the_weights_are_seen(sizes):
    module = quantizer(**sizes)
    accelerate(module, verbose=False)
    codes = codes_for(module)
    plain = type(module).embed_code

    def check():
        torch.testing.assert_close(module.embed_code(codes), plain(module, codes))

    for book in module.codebooks:  # as an EMA step writes them
        book.weight[:-1] = torch.randn_like(book.weight[:-1])
    check()
    torch.manual_seed(7)
    module.load_state_dict(type(module)(**sizes).state_dict())
    check()
    module.to(torch.float64)
    check()
    assert module.embed_code(codes).dtype == torch.float64
    module.codebooks[0].weight.data = torch.randn_like(module.codebooks[0].weight)
    check()


def test_distinct_codebooks_lie_in_one_storage_and_move_with_the_model():
    module = quantizer(shared_codebook=False)
    accelerate(module, verbose=False)
    rows, channels = module.codebooks[0].weight.shape

    def storages():
        return {book.weight.untyped_storage().data_ptr() for book in module.codebooks}

    assert len(storages()) == 1
    assert module.codebooks[0].weight.untyped_storage().nbytes() == 3 * rows * channels * 4, "no second copy"
    module.double()
    assert len(storages()) == 3
    module.embed_code(codes_for(module))
    assert len(storages()) == 1
    module.float()
    with torch.inference_mode():
        module.embed_code(codes_for(module))
    assert len(storages()) == 1
    assert not module.codebooks[0].weight.is_inference()


def test_distinct_codebooks_that_share_memory_keep_sharing_it():
    module = quantizer(shared_codebook=False)
    for book in module.codebooks[1:]:
        book.weight.data = module.codebooks[0].weight.data
    codes = codes_for(module)
    wanted = module.embed_code(codes)
    accelerate(module, verbose=False)
    assert len({book.weight.data_ptr() for book in module.codebooks}) == 1
    torch.testing.assert_close(module.embed_code(codes), wanted)
    restore(module)
    assert len({book.weight.data_ptr() for book in module.codebooks}) == 1


@pytest.mark.parametrize("shared", [True, False])
def test_a_deep_copy_is_swapped_and_independent(shared):
    module = quantizer(shared_codebook=shared)
    accelerate(module, verbose=False)
    twin, codes = copy.deepcopy(module), codes_for(module)
    wanted = module.embed_code(codes)
    assert torch.equal(twin.embed_code(codes), wanted)
    for book in module.codebooks:
        book.weight.zero_()
    assert not module.embed_code(codes).any()
    assert torch.equal(twin.embed_code(codes), wanted)
    assert restore(twin) == [""]
    assert "embed_code" in module.__dict__
    assert "embed_code" not in twin.__dict__


@pytest.mark.parametrize("shared", [True, False])
def test_a_pickled_module_comes_back_whole(shared):
    module = quantizer(shared_codebook=shared)
    codes = codes_for(module)
    wanted = module.embed_code(codes)
    accelerate(module, verbose=False)
    text = pickle.dumps(module)
    assert b"unifiedar.accelerate" not in text, "readable where this package is not installed"
    loaded = pickle.loads(text)
    torch.testing.assert_close(loaded.embed_code(codes), wanted)
    assert accelerate(loaded, verbose=False).entries[0].status == "swapped"
    torch.testing.assert_close(loaded.embed_code(codes), wanted)
    restore(loaded)
    assert not [name for name in loaded.__dict__ if "unifiedar" in name or name.startswith("embed")]


def test_a_saved_state_is_no_larger():
    module = quantizer(shared_codebook=False)

    def saved():
        file = io.BytesIO()
        torch.save(module.state_dict(), file)
        return len(file.getvalue())

    before = saved()
    accelerate(module, verbose=False)
    assert saved() <= before + 1024


# ---- gradients -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("shared", [True, False])
def test_the_published_method_gives_no_gradient_and_neither_does_ours(shared):
    module = quantizer(shared_codebook=shared)
    for book in module.codebooks:
        book.weight.requires_grad_(True)
    codes = codes_for(module)
    assert not module.embed_code(codes).requires_grad
    accelerate(module, verbose=False)
    assert not module.embed_code(codes).requires_grad


@pytest.mark.parametrize("sizes", LAYOUTS)
def test_a_differentiable_fork_stays_differentiable(sizes):
    module = quantizer(RQBottleneckWithGradient, dtype=torch.float64, **sizes)
    weights = [book.weight.requires_grad_(True) for book in dict.fromkeys(module.codebooks)]
    codes = codes_for(module)
    assert (codes == len(weights[0]) - 1).any(), "the padding row must get no gradient"
    weighting = torch.randn(module.embed_code(codes).shape, dtype=torch.float64)

    def gradients():
        return torch.autograd.grad((module.embed_code(codes) * weighting).sum(), weights)

    wanted = gradients()
    accelerate(module, verbose=False)
    for got, expected in zip(gradients(), wanted, strict=True):
        torch.testing.assert_close(got, expected, rtol=0, atol=1e-12)
    with torch.no_grad():
        assert not module.embed_code(codes).requires_grad
    assert [weight.grad for weight in weights] == [None] * len(weights)


# ---- calls that the published method answers -------------------------------------------------------------------------


def test_int32_codes_are_taken():
    module = quantizer()
    wanted = module.embed_code(codes_for(module))
    accelerate(module, verbose=False)
    torch.testing.assert_close(module.embed_code(codes_for(module, dtype=torch.int32)), wanted)


def test_wrong_calls_fail_as_published():
    module = quantizer()
    codes = codes_for(module)
    accelerate(module, verbose=False)
    with pytest.raises(AssertionError):
        module.embed_code(codes[:, :2])
    with pytest.raises(NotImplementedError, match="mean"):
        module.embed_partial_code(codes, 0, "mean")
    with pytest.raises(AssertionError):
        module.embed_partial_code(codes, 3, "add")


def test_autocast_gives_the_published_dtype():
    module = quantizer(dtype=torch.bfloat16)
    codes = codes_for(module)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        wanted = module.embed_code(codes)
        accelerate(module, verbose=False)
        got = module.embed_code(codes)
    assert got.dtype == wanted.dtype
    assert torch.equal(got, wanted)


# ---- refusals --------------------------------------------------------------------------------------------------------


class Overridden(RQBottleneck):
    def embed_code(self, code):
        return super().embed_code(code) + 1


class Inherited(RQBottleneck):
    def extra(self):
        return 1


class Reshaped(RQBottleneck):
    def to_latent_shape(self, x):
        return super().to_latent_shape(x).flip(1)


class Failing(Quantizer):
    @torch.no_grad()
    def embed_code(self, code):
        raise RuntimeError("needs a server")


class Foreign(Quantizer):
    @torch.no_grad()
    def embed_code(self, code):
        return self._embed(code)


_published(Failing, "Failing", "fork_stand_in.quantizations")
_published(Foreign, "Foreign", "somewhere.else")


def _patched():
    module = quantizer()
    module.embed_code = lambda code: code
    return module


def _tied():
    module = quantizer(shared_codebook=False)
    module.codebooks[1] = module.codebooks[0]
    return module


def _renormed():
    module = quantizer()
    module.codebooks[0].max_norm = 1.0
    return module


def _mixed():
    module = quantizer(shared_codebook=False)
    module.codebooks[1].half()
    return module


def _short():
    module = quantizer()
    module.code_shape = torch.Size((4, 4, 5))
    return module


def _without():
    module = quantizer()
    del module.shared_codebook
    return module


def _computed():
    module = quantizer(shared_codebook=False)
    nn.utils.parametrize.register_parametrization(module.codebooks[1], "weight", nn.Identity())
    return module


def _integer():
    module = quantizer()
    module.codebooks[0].weight.data = module.codebooks[0].weight.data.to(torch.int8)
    return module


REFUSALS = {
    "a subclass that overrides": (lambda: quantizer(Overridden), "Overridden overrides embed_code"),
    "another shape": (lambda: quantizer(Reshaped), "Reshaped overrides to_latent_shape"),
    "patched instance": (_patched, "its embed_code was replaced on the instance"),
    "another formula": (
        lambda: quantizer(RQBottleneckOfProducts),
        "its embed_code does not return the sum of its codebooks' rows",
    ),
    "fails": (lambda: quantizer(Failing), "RuntimeError: needs a server"),
    "another module": (lambda: quantizer(Foreign), "comes from somewhere.else, not from a module quantizations"),
    "sizes differ": (
        lambda: quantizer(shared_codebook=False, n_embed=[32, 16, 8]),
        "its codebooks differ in size (32, 16, 8 codes)",
    ),
    "dtypes differ": (_mixed, "its codebooks differ in dtype or device"),
    "some are one": (_tied, "some of its codebooks are one tensor and others are not"),
    "max_norm": (_renormed, "its codebooks use max_norm"),
    "meta": (lambda: quantizer().to("meta"), "on the meta device: load the weights first"),
    "too few codebooks": (_short, "has 3 codebooks for 5 depths"),
    "an attribute missing": (_without, "lacks shared_codebook"),
    "computed weights": (_computed, "weights are computed"),
    "integer weights": (_integer, "its codebooks are int8"),
}


@pytest.mark.parametrize("name", REFUSALS)
def test_refusals_say_why_and_leave_the_module_alone(name):
    make, reason = REFUSALS[name]
    model = Model(make())
    attributes = dict(model.quantizer.__dict__)
    report = accelerate(model, verbose=False)
    assert report.swapped == []
    (entry,) = report.refused
    assert (entry.path, entry.adapter, entry.status) == ("quantizer", ADAPTER, "refused")
    assert reason in entry.text
    assert model.quantizer.__dict__ == attributes
    assert restore(model) == []


def test_a_subclass_that_adds_only_is_swapped():
    assert accelerate(quantizer(Inherited), verbose=False).entries[0].status == "swapped"


def test_a_patch_on_top_of_ours_stays():
    module = quantizer()
    accelerate(module, verbose=False)
    ours = module.embed_code

    def patch(code):
        return ours(code) + 1

    module.embed_code = patch
    restore(module)
    assert module.__dict__["embed_code"] is patch
    assert "embed_partial_code" not in module.__dict__


def test_codebooks_under_training_are_swapped():
    module = quantizer().train()
    assert accelerate(module, verbose=False).entries[0].status == "swapped"


# ---- the report ------------------------------------------------------------------------------------------------------


def test_the_report_is_printed_and_says_everything(capsys):
    model = nn.ModuleDict(
        {
            "good": quantizer(),
            "own": quantizer(RQBottleneckWithoutPartialCodes, shared_codebook=False),
            "bad": quantizer(Overridden),
            "rest": nn.Linear(2, 2),
        }
    )
    report = accelerate(model)
    printed = capsys.readouterr().out
    assert printed == f"{report}\n"
    assert printed.splitlines() == [
        "unifiedar.accelerate: 2 swapped, 1 refused",
        f"  swapped  good (RQBottleneck), {ADAPTER}: embed_code and embed_partial_code by residual_lookup "
        "(one codebook for all depths, read in place)",
        f"  swapped  own (RQBottleneck), {ADAPTER}: embed_code by residual_lookup "
        "(3 codebooks, moved side by side in one storage and shared)",
        f"  refused  bad (Overridden), {ADAPTER}: Overridden overrides embed_code",
    ]
    assert accelerate(model, verbose=False).entries[0].status == "already"
    assert capsys.readouterr().out == ""


def test_the_report_of_a_model_without_known_parts(capsys):
    report = accelerate(nn.Linear(2, 2))
    assert report == Report(())
    known = "; ".join(adapter.name for adapter in ADAPTERS)
    assert ADAPTER in known
    assert capsys.readouterr().out == f"unifiedar.accelerate: nothing to swap, no module is one of: {known}\n"


def test_the_module_itself_has_no_path():
    assert "swapped  (the module itself) (RQBottleneck)" in str(accelerate(quantizer(), verbose=False))


@pytest.mark.parametrize("function", [accelerate, restore])
def test_only_modules_are_taken(function):
    with pytest.raises(TypeError, match=rf"{function.__name__}: module must be a torch.nn.Module, got dict"):
        function({})


def test_an_adapter_is_one_row(monkeypatch):
    def doubled(self, x):
        return nn.functional.linear(x, self.weight, self.bias) * 2

    row = Adapter(
        "doubled Linear",
        matches=lambda module: type(module) is nn.Linear,
        why_not=lambda module: None if module.bias is None else "has a bias",
        swap=lambda module: Swap("doubled", {"forward": doubled}),
    )
    # A swapped method must come from this package for restore to take it back.
    doubled.__module__ = "unifiedar.accelerate"
    monkeypatch.setattr(sys.modules["unifiedar.accelerate"], "ADAPTERS", (*ADAPTERS, row))
    model = nn.Sequential(nn.Linear(2, 2, bias=False), nn.Linear(2, 2))
    x = torch.randn(3, 2)
    wanted = model[0](x)
    report = accelerate(model, verbose=False)
    assert [(entry.path, entry.status, entry.text) for entry in report.entries] == [
        ("0", "swapped", "doubled"),
        ("1", "refused", "has a bias"),
    ]
    assert torch.equal(model[0](x), 2 * wanted)
    assert restore(model) == ["0"]
    assert torch.equal(model[0](x), wanted)


def test_adapters_have_names_of_their_own():
    names = [adapter.name for adapter in ADAPTERS]
    assert len(set(names)) == len(names)
    assert unifiedar.accelerate is accelerate
