"""accelerate on RQ-Transformer and VILA-U's depth head: same noise, same codes; the rest stays published."""

import copy
import gc
import sys
import types
import weakref

import pytest
import torch
from published_depth import AttentionBlock, BodyBlock, Head, Sampler, Tokenizer, head, sampler
from published_var import publish
from torch import nn

import unifiedar
from unifiedar.accelerate import _depth, _rqtransformer, _swap, _vilau
from unifiedar.models import RQTransformer

OPTIONS = [{}, {"classes": 1}, {"classes": 9, "length": 4}, {"depth": 1}, {"body": 1, "grid": (1, 1)}]
CALLS = [
    {},
    {"temperature": 0.8, "top_k": 7, "top_p": 0.9},
    {"top_k": [3, 10, 20, 40], "top_p": [0.9, 1, 0.5, 0.8], "start_loc": (0, 1)},
    {"top_k": [99], "top_p": [1.5], "start_loc": [0, 2], "amp": True},
    {"temperature": 2, "top_p": 1e-6},
]


def swap(module):
    """The report's entry of the module itself."""
    return unifiedar.accelerate(module, verbose=False).entries[0]


def tokenizer(module, shared=True):
    torch.manual_seed(5)
    size = module.classifier if isinstance(module, Sampler) else module.classifier_mlp
    return Tokenizer(module.pos_emb_d.shape[1], len(size.linear.weight), 6, shared)


def codes(module, count=3):
    shape = (count, *module.block_size)
    return torch.randint(module.vocab_size[0], shape, generator=torch.Generator().manual_seed(1))


def condition(module, count=3):
    shape = (count, module.block_size_cond)
    return torch.randint(module.vocab_size_cond, shape, generator=torch.Generator().manual_seed(2))


def calls(module):
    """Of CALLS those that this module's grid and depth can take, with a condition and without one."""
    width, depth = module.block_size[1:]
    for i, call in enumerate(CALLS):
        lists = [len(one) for one in (call.get("top_k"), call.get("top_p")) if isinstance(one, list)]
        if call.get("start_loc", (0, 0))[1] < width and all(length in (1, depth) for length in lists):
            yield call | ({} if i % 2 else {"cond": condition(module)})


def everything(module, aux):
    found, partial = [], codes(module)
    for seed, call in enumerate(calls(module)):
        torch.manual_seed(seed)
        found += [module.sample(partial, aux, **call), torch.rand(2)]
    return found


def same(got, want):
    return len(got) == len(want) and all(torch.equal(a, b) for a, b in zip(got, want, strict=True))


# ---- RQ-Transformer


@pytest.mark.parametrize("shared", [True, False], ids=["one codebook", "many"])
@pytest.mark.parametrize("options", OPTIONS, ids=str)
def test_same_noise_same_codes(options, shared):
    module = sampler(**options)
    aux = tokenizer(module, shared)
    want, keys = everything(module, aux), list(module.state_dict())
    pointers = [one.data_ptr() for one in (*module.parameters(), *aux.parameters())]
    entry = swap(module)
    assert entry.status == "swapped", entry.text
    module.steps = 0
    for one in (module, copy.deepcopy(module)):
        assert same(everything(one, aux), want)
    assert module.steps == 0
    assert list(module.state_dict()) == keys
    assert [one.data_ptr() for one in (*module.parameters(), *aux.parameters())] == pointers
    assert module._cache == {"spatial_ctx_hw": None}
    assert unifiedar.restore(module) == [""]
    assert "sample" not in module.__dict__
    assert module not in _rqtransformer._TWINS
    assert same(everything(module, aux), want)


def test_codebooks_side_by_side_are_read_in_place():
    """As the swapped quantizer keeps them."""
    module = sampler()
    aux = tokenizer(module, shared=False)
    want = everything(module, aux)
    assert swap(module).status == "swapped"
    _swap.pack([book.weight for book in aux.quantizer.codebooks])
    table = _depth.table_of(aux, 4, 40, 6, module.pos_emb_d)
    assert table.data_ptr() == aux.quantizer.codebooks[0].weight.data_ptr()
    assert same(everything(module, aux), want)


def test_codebooks_apart_are_copied_once():
    """And again when they change, whoever changes them."""
    module = sampler()
    aux = tokenizer(module, shared=False)
    assert swap(module).status == "swapped"

    def table():
        return _depth.table_of(aux, 4, 40, 6, module.pos_emb_d)

    first = table()
    everything(module, aux)
    assert table() is first
    book = aux.quantizer.codebooks[2]
    with torch.no_grad():
        book.weight.mul_(2)
    assert torch.equal(table()[2], book.weight[:40])
    book.weight.data = -book.weight.data
    assert torch.equal(table()[2], book.weight[:40])
    book.weight = nn.Parameter(book.weight + 1)
    assert torch.equal(table()[2], book.weight[:40])
    with torch.inference_mode():
        books = [nn.Parameter(torch.randn(41, 6), requires_grad=False) for _ in range(4)]
        for one, weight in zip(aux.quantizer.codebooks, books, strict=True):
            one.weight = weight
        assert torch.equal(table(), torch.stack(books)[:, :40])
        books[1].zero_()
        assert torch.equal(table(), torch.stack(books)[:, :40])
    assert module.steps == 0


def test_the_draw_of_a_kept_part():
    """Codes before the start stay, padding among them; what stands behind it does not matter."""
    module = sampler()
    aux, partial = tokenizer(module), codes(module)
    partial[:, 0, 0, 2] = 40
    options = {"cond": condition(module), "start_loc": (1, 0), "top_k": 9}

    def draw(partial):
        torch.manual_seed(0)
        return module.sample(partial, aux, **options)

    before = partial.clone()
    want = draw(partial)
    assert swap(module).status == "swapped"
    got = draw(partial)
    assert torch.equal(got, want)
    assert torch.equal(partial, before)
    assert torch.equal(got[:, 0], partial[:, 0])
    partial[:, 1] = 40
    assert torch.equal(draw(partial), want)


def test_distribution():
    """Without a common noise: the first code's shares against its exact probabilities, by chi-square."""
    module = sampler(grid=(1, 1), depth=1, count=12)
    aux = tokenizer(module)
    with torch.no_grad():
        exact = module(torch.zeros(1, 1, 1, 1, dtype=torch.int64), aux).flatten().softmax(-1)
    assert swap(module).status == "swapped"
    torch.manual_seed(1)
    drawn = module.sample(torch.zeros(20000, 1, 1, 1, dtype=torch.int64), aux).flatten().bincount(minlength=12)
    chi = ((drawn - 20000 * exact) ** 2 / (20000 * exact)).sum()
    assert chi < 31.3, chi  # 11 degrees of freedom, one in a thousand


def test_progress(monkeypatch):
    bars = []

    class Bar:
        def __init__(self, **options):
            self.options, self.done, self.closed = options, options["initial"], False
            bars.append(self)

        def update(self, count):
            self.done += count

        def close(self):
            self.closed = True

    monkeypatch.setitem(sys.modules, "tqdm", types.SimpleNamespace(tqdm=Bar))
    module = sampler()
    assert swap(module).status == "swapped"
    module.sample(codes(module), tokenizer(module), start_loc=(0, 2), is_tqdm=True, desc="drawing")
    (bar,) = bars
    assert bar.options == {"total": 24, "initial": 8, "desc": "drawing"}
    assert (bar.done, bar.closed) == (24, True)


def test_amp_casts_once():
    """On a GPU; here the copy is asked for by hand. Nothing of the module changes, and the copy follows the weights."""
    module = sampler()
    assert swap(module).status == "swapped"
    before = [one.detach().clone() for one in module.parameters()]
    twin = _rqtransformer._TWINS.of(module)
    cast = twin.in_dtype(torch.bfloat16)
    assert (cast.dtype, cast.products) == (torch.float32, torch.bfloat16)
    table = tokenizer(module).quantizer.codebooks[0].weight[:40].detach()
    options = {"cond": condition(module), "generator": torch.Generator().manual_seed(0)}
    assert cast.sample(codes(module), table, **options).shape == (3, 2, 3, 4)
    assert twin.in_dtype(torch.bfloat16) is cast
    assert all(torch.equal(one, other) for one, other in zip(module.parameters(), before, strict=True))
    with torch.no_grad():
        module.classifier.linear.weight.neg_()
    assert twin.in_dtype(torch.bfloat16) is not cast
    assert twin.in_dtype(torch.float32) is twin.model


@pytest.mark.gpu
def test_amp_on_a_gpu():
    """As exact as autocast: the share of codes that are those of float32."""
    module = sampler(grid=(8, 8), dim=128, heads=2, body=6, count=400).cuda()
    aux = tokenizer(module).cuda()
    partial, cond = codes(module, 32).cuda(), condition(module, 32).cuda()

    def draw(**options):
        torch.manual_seed(0)
        return module.sample(partial, aux, cond, top_k=50, start_loc=(7, 6), **options)

    exact = draw()
    published = draw(amp=True)
    assert swap(module).status == "swapped"
    assert torch.equal(draw(), exact)
    got = draw(amp=True)
    assert (got == exact).float().mean() >= (published == exact).float().mean() - 0.05


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_half_precision(dtype):
    """Of a whole module: codes are those of the published arithmetic but for a few near ties."""
    module = sampler(grid=(1, 1), dim=64).to(dtype)
    aux = tokenizer(module).to(dtype)
    partial, cond = codes(module, 200), condition(module, 200)

    def draw():
        torch.manual_seed(0)
        return module.sample(partial, aux, cond, top_k=10)

    want = draw()
    assert swap(module).status == "swapped"
    module.steps = 0
    assert (draw() == want).float().mean() > 0.9
    assert module.steps == 0


def test_inference_mode():
    module = sampler()
    aux = tokenizer(module)
    want = everything(module, aux)
    with torch.inference_mode():
        assert swap(module).status == "swapped"
        assert same(everything(module, aux), want)
    assert same(everything(module, aux), want)


def test_it_follows_its_weights():
    module, other = sampler(), sampler(seed=1)
    aux = tokenizer(module)
    want = everything(other, aux)
    assert swap(module).status == "swapped"
    everything(module, aux)
    module.load_state_dict(other.state_dict(), assign=True)
    assert same(everything(module, aux), want)
    with torch.no_grad():
        for one in module.parameters():
            one.copy_(other.get_parameter("pos_emb_d") if one is module.pos_emb_d else one)
        aux.quantizer.codebooks[0].weight[:40] = 0
    assert same(everything(module, aux), everything(other, aux))


def wrapped(*names):
    """Linear layers in a layer of another package, which adds something of its own."""

    def change(module):
        for name in names:
            path, _, last = name.rpartition(".")
            layer = nn.Module()
            layer.base, layer.more = module.get_submodule(name), nn.Parameter(torch.ones(1))
            setattr(module.get_submodule(path), last, layer)

    return change


def added_to(name):
    """A layer of another package in the place of one, with the same keys and one more."""

    def change(module):
        module.get_submodule(name).more = nn.Parameter(torch.ones(1))

    return change


UNUSUAL = {
    "no cache": (None, {"cached": False}),
    "training": (lambda m: m.train(), {}),
    "a hook": (lambda m: m.classifier.linear.register_forward_hook(lambda *a: None), {}),
    "float64": (lambda m: m.double(), {}),
    "mixed weights": (lambda m: m.classifier.half(), {}),
    "wrapped layers": (wrapped("input_mlp", "classifier.linear"), {}),
    "layers with more": (added_to("input_mlp"), {}),
    "temperature 0": (None, {"temperature": 0.0}),
    "negative temperature": (None, {"temperature": -1.0}),
    "a temperature that is a tensor": (None, {"temperature": torch.tensor(1.0)}),
    "top_k 0": (None, {"top_k": 0}),
    "top_p 0": (None, {"top_p": 0.0}),
    "top_p an integer": (None, {"top_p": 1}),
    "too few top_k": (None, {"top_k": [3, 4]}),
    "a start outside": (None, {"start_loc": (2, 0)}),
    "a negative start": (None, {"start_loc": (-1, 0)}),
    "codes outside": (None, {"partial_sample": torch.full((3, 2, 3, 4), 41), "start_loc": (1, 0)}),
    "another shape": (None, {"partial_sample": torch.zeros(3, 2, 2, 4, dtype=torch.int64)}),
    "float codes": (None, {"partial_sample": torch.zeros(3, 2, 3, 4)}),
    "no pictures": (None, {"partial_sample": torch.zeros(0, 2, 3, 4, dtype=torch.int64)}),
    "a condition outside": (None, {"cond": torch.full((3, 1), 5)}),
    "too many conditions": (None, {"cond": torch.zeros(4, 1, dtype=torch.int64)}),
    "no tokenizer": (None, {"model_aux": None}),
    "another tokenizer": (None, {"model_aux": nn.Identity()}),
}


@pytest.mark.parametrize(("change", "options"), UNUSUAL.values(), ids=UNUSUAL)
def test_what_the_published_sample_answers_itself(monkeypatch, change, options):
    module = sampler()
    arguments = {"partial_sample": codes(module), "model_aux": tokenizer(module)} | options
    assert swap(module).status == "swapped"
    module.sample(codes(module), tokenizer(module))
    seen = []
    monkeypatch.setattr(Sampler, "sample", lambda self, *args: seen.append(args))
    if change is not None:
        change(module)
    module.sample(**arguments)
    (args,) = seen
    assert len(args) == 12
    assert args[0] is arguments["partial_sample"]
    assert args[1] is arguments["model_aux"]


def test_a_tokenizer_that_answers_otherwise(monkeypatch):
    """Scaled embeddings are not rows of the codebook: the published code reads them."""

    class Scaled(Tokenizer):
        def get_code_emb_with_depth(self, code):
            return 2 * super().get_code_emb_with_depth(code)[0], None

    module, aux = sampler(), Scaled()
    want = everything(module, aux)
    assert swap(module).status == "swapped"
    module.steps = 0
    assert same(everything(module, aux), want)
    assert module.steps > 0
    plain = tokenizer(module)
    everything(module, plain)
    asked = plain.asked
    everything(module, plain)
    assert plain.asked == asked  # once for all calls


def test_not_a_number(capsys):
    """The published code warns, takes it for an impossible code and goes on; so does the swapped one."""
    module = sampler()
    with torch.no_grad():
        module.classifier.linear.bias[3] = torch.nan
    aux, partial = tokenizer(module), codes(module)

    def draw():
        torch.manual_seed(0)
        return module.sample(partial, aux), torch.rand(1)

    want = draw()
    assert swap(module).status == "swapped"
    capsys.readouterr()
    assert same(draw(), want)
    assert "NaN observed" in capsys.readouterr().out


def test_nothing_of_ours_outlives_it():
    module = sampler()
    swap(module)
    module.sample(codes(module), tokenizer(module))
    alive = weakref.ref(module)
    assert module in _rqtransformer._TWINS
    del module
    gc.collect()
    assert alive() is None


# ---- VILA-U's depth head

HEADS = [{}, {"depth": 16}, {"depth": 1}, {"layers": 1, "count": 900}]


def drawn(module, aux, dtype=torch.float32, count=6):
    hidden = torch.randn(count, 1, 20, generator=torch.Generator().manual_seed(3)).to(dtype)
    found = []
    for cfg in (3.0, 1.0, 0, -2.0):
        torch.manual_seed(4)
        with torch.no_grad():
            found.append((*module.generate(hidden, aux, cfg), torch.rand(2)))
    return found


@pytest.mark.parametrize("shared", [True, False], ids=["one codebook", "many"])
@pytest.mark.parametrize("options", HEADS, ids=str)
def test_head_same_noise_same_codes(options, shared):
    module = head(**options)
    aux = tokenizer(module, shared)
    want, keys = drawn(module, aux), list(module.state_dict())
    entry = swap(module)
    assert entry.status == "swapped", entry.text
    module.steps = 0
    for one in (module, copy.deepcopy(module)):
        for got, expected in zip(drawn(one, aux), want, strict=True):
            torch.testing.assert_close(got[0], expected[0], rtol=0, atol=1e-5)
            assert got[0].shape == (6, 1, 6)
            assert same(got[1:], expected[1:])
    assert module.steps == 0
    assert list(module.state_dict()) == keys
    assert unifiedar.restore(module) == [""]
    assert "generate" not in module.__dict__
    assert module not in _vilau._TWINS
    assert same(drawn(module, aux)[0], want[0])


def test_head_rounds_as_published_on_a_gpu():
    """bfloat16: sums rounded after each code, guidance mixed in bfloat16 before anything else."""
    module = head(depth=8).bfloat16()
    aux = tokenizer(module, False).bfloat16()
    published = drawn(module, aux, torch.bfloat16, 40)
    assert swap(module).status == "swapped"
    for (sums, found, _), (_, want, _) in zip(drawn(module, aux, torch.bfloat16, 40), published, strict=True):
        total = torch.zeros(40, 6, dtype=torch.bfloat16)
        for d, book in enumerate(aux.quantizer.codebooks):
            total = total + book.weight[found[:, 0, d]]
        assert sums.dtype == torch.bfloat16
        assert torch.equal(sums[:, 0], total)
        assert torch.equal(found[:20], found[20:])
        assert (found[:, 0, 0] == want[:, 0, 0]).float().mean() > 0.9


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_head_on_a_gpu(dtype):
    """There the published sums are rounded after each code, too: bits are equal."""
    module = head(depth=8, dim=128).to("cuda", dtype)
    aux = tokenizer(module, False).to("cuda", dtype)
    hidden = torch.randn(64, 1, 20, device="cuda").to(dtype)

    def draw():
        torch.manual_seed(0)
        with torch.no_grad():
            return (*module.generate(hidden, aux), torch.rand(3, device="cuda"))

    want = draw()
    assert swap(module).status == "swapped"
    module.steps = 0
    got = draw()
    assert module.steps == 0
    assert torch.equal(got[2], want[2])
    assert torch.equal(got[0], aux.get_code_emb_with_depth(got[1])[0].cumsum(-2)[:, :, -1])
    if dtype == torch.float32:
        assert torch.equal(got[1], want[1])
    else:
        assert (got[1][:, 0, 0] == want[1][:, 0, 0]).float().mean() > 0.9


def test_head_in_a_whole_model():
    """Found by its path, beside other parts; in training it stays published."""
    whole = nn.Module()
    whole.tower = nn.Sequential(nn.Linear(3, 3))
    whole.tower.rqtransformer = head()
    aux = tokenizer(whole.tower.rqtransformer)
    (entry,) = unifiedar.accelerate(whole, verbose=False).entries
    assert (entry.path, entry.adapter, entry.status) == ("tower.rqtransformer", "depth head of VILA-U", "swapped")
    assert "all 4 codes in one operator" in entry.text
    assert unifiedar.accelerate(whole, verbose=False).entries[0].status == "already"
    whole.train()
    module = whole.tower.rqtransformer
    drawn(module, aux)
    assert module.steps == 16
    whole.eval()
    drawn(module, aux)
    assert module.steps == 16


HIDDEN = torch.zeros(4, 1, 20)
HEAD_UNUSUAL = {
    "wrapped layers": (wrapped("in_mlp_1", "classifier_mlp.linear"), {}),
    "layers with more": (added_to("head_transformer.blocks.1.attn.key"), {}),
    "a hook": (lambda m: m.in_mlp_1.register_forward_hook(lambda *a: None), {}),
    "float64": (lambda m: m.double(), {"embed_from_body": HIDDEN.double()}),
    "another dtype": (None, {"embed_from_body": HIDDEN.half()}),
    "another width": (None, {"embed_from_body": torch.zeros(4, 1, 21)}),
    "several positions": (None, {"embed_from_body": torch.zeros(4, 2, 20)}),
    "an odd number of rows": (None, {"embed_from_body": torch.zeros(3, 1, 20)}),
    "no rows": (None, {"embed_from_body": torch.zeros(0, 1, 20)}),
    "no state": (None, {"embed_from_body": None}),
    "guidance of no size": (None, {"cfg": float("inf")}),
    "guidance that is a tensor": (None, {"cfg": torch.tensor(3.0)}),
    "no tokenizer": (None, {"model_aux": None}),
    "a tokenizer of another width": (None, {"model_aux": Tokenizer(4, 920, 7)}),
    "a tokenizer of fewer codes": (None, {"model_aux": Tokenizer(4, 918, 6)}),
    "a tokenizer of fewer depths": (None, {"model_aux": Tokenizer(3, 920, 6)}),
    "a tokenizer in half precision": (None, {"model_aux": Tokenizer(4, 920, 6).half()}),
}


@pytest.mark.parametrize(("change", "options"), HEAD_UNUSUAL.values(), ids=HEAD_UNUSUAL)
def test_what_the_published_generate_answers_itself(monkeypatch, change, options):
    module = head()
    arguments = {"embed_from_body": HIDDEN, "model_aux": tokenizer(module), "cfg": 3.0} | options
    assert swap(module).status == "swapped"
    seen = []
    monkeypatch.setattr(Head, "generate", lambda self, *args: seen.append(args))
    module.generate(HIDDEN, tokenizer(module))
    assert not seen
    if change is not None:
        change(module)
    module.generate(**arguments)
    assert [id(one) for one in seen[0]] == [id(one) for one in arguments.values()]


@pytest.mark.parametrize("make", [sampler, head])
def test_the_default_dtype_does_not_matter(make):
    """Some loaders build a model under another one."""
    torch.set_default_dtype(torch.bfloat16)
    try:
        module = make()
        assert module.pos_emb_d.dtype == torch.bfloat16
        assert swap(module).status == "swapped"
    finally:
        torch.set_default_dtype(torch.float32)


def test_head_under_autocast():
    module = head()
    aux = tokenizer(module)
    assert swap(module).status == "swapped"
    with torch.autocast("cpu", torch.bfloat16):
        drawn(module, aux)
    assert module.steps == 16


def test_head_not_a_number(capsys):
    module = head()
    with torch.no_grad():
        module.classifier_mlp.linear.bias[3] = torch.nan
    aux = tokenizer(module)
    want = drawn(module, aux)
    assert swap(module).status == "swapped"
    capsys.readouterr()
    for got, expected in zip(drawn(module, aux), want, strict=True):
        assert same(got, expected)
    assert "NaN observed" in capsys.readouterr().out


# ---- refusals


class OtherGate(BodyBlock):
    """A fork that answers something else under the same name."""

    def forward(self, x, cached=False):
        return super().forward(x, cached) * 1.01


class OtherHeadGate(AttentionBlock):
    def forward(self, x, cached=False):
        return super().forward(x, cached) * 1.01


class Overridden(Sampler):
    def cached_forward(self, *args, **kwargs):
        return 2 * super().cached_forward(*args, **kwargs)


class OtherDraw(Sampler):
    """A fork that draws the code after the one that was drawn."""

    def sample(self, partial_sample, *args, **kwargs):
        return (Sampler.sample(self, partial_sample, *args, **kwargs) + 1) % 40


class OtherHeadDraw(Head):
    def generate(self, embed_from_body, model_aux=None, cfg=3.0):
        return Head.generate(self, embed_from_body, model_aux, cfg + 1)


class OverriddenHead(Head):
    def forward(self, *args):
        return super().forward(*args)


publish(OtherGate, "AttentionBlock", "rq_fork.attentions")
publish(OtherHeadGate, "AttentionBlock", "vilau_fork.attention")
publish(OtherDraw, "RQTransformer", "rq_fork.transformers")
publish(OtherHeadDraw, "RQTransformer", "vilau_fork.modeling_rqtransformer")


def changed(make, change):
    module = make()
    change(module)
    return module


def replace_block(stack, kind):
    block = kind(32, 2)
    block.load_state_dict(stack.blocks[0].state_dict())
    stack.blocks[0] = block.eval()


def frozen(module):
    module.half().classifier.float()


REFUSED = {
    "block of a fork": (
        lambda: changed(sampler, lambda m: replace_block(m.body_transformer, OtherGate)), "its forward differs"
    ),
    "block of another file": (
        lambda: changed(sampler, lambda m: replace_block(m.body_transformer, AttentionBlock)),
        "block 0 of its body_transformer is a AttentionBlock of attention, not an AttentionBlock of attentions",
    ),
    "overridden": (lambda: sampler(Overridden), "Overridden overrides cached_forward"),
    "draws of a fork": (lambda: sampler(OtherDraw), "its sample differs"),
    "no sums": (
        lambda: changed(sampler, lambda m: setattr(m.config, "cumsum_depth_ctx", False)), "its cumsum_depth_ctx is off"
    ),
    "tanh": (
        lambda: changed(sampler, lambda m: m.body_transformer.blocks[0].mlp.__setitem__(1, nn.Tanh())),
        "its forward differs",
    ),
    "meta": (lambda: sampler().to("meta"), "on the meta device"),
    "float64": (lambda: sampler().double(), "its weights are float64"),
    "two dtypes": (lambda: changed(sampler, frozen), "of several dtypes"),
    "more weights": (
        lambda: changed(sampler, lambda m: m.register_buffer("more", torch.ones(1))), "not the published keys"
    ),
    "other heads": (
        lambda: changed(sampler, lambda m: setattr(m.body_transformer.blocks[0].attn, "n_head", 4)),
        "its blocks have [2, 4] heads",
    ),
    "lacks": (lambda: changed(sampler, lambda m: delattr(m, "embed_drop")), "lacks embed_drop"),
    "replaced": (lambda: changed(sampler, lambda m: setattr(m, "sample", print)), "was replaced on the instance"),
    "head: block of a fork": (
        lambda: changed(head, lambda m: replace_block(m.head_transformer, OtherHeadGate)), "its forward differs"
    ),
    "head: draws of a fork": (lambda: head(OtherHeadDraw), "its generate differs"),
    "head: overridden": (lambda: head(OverriddenHead), "OverriddenHead overrides forward"),
    "head: few codes": (lambda: head(count=899), "has 899 codes, fewer than the 900"),
    "head: no blocks": (lambda: head(layers=0), "cannot be rebuilt"),
    "head: lacks": (lambda: changed(head, lambda m: delattr(m, "in_mlp_2")), "lacks in_mlp_2"),
}  # fmt: skip


@pytest.mark.parametrize(("make", "text"), REFUSED.values(), ids=REFUSED)
def test_refusals(make, text):
    module = make()
    before = {name for name in module.__dict__ if name in ("sample", "generate")}
    state = torch.get_rng_state()
    entry = swap(module)
    assert torch.equal(torch.get_rng_state(), state)
    assert entry.status == "refused"
    assert text in entry.text
    assert {name for name in module.__dict__ if name in ("sample", "generate")} == before


def test_other_classes_of_that_name():
    """Ours is one."""
    with torch.device("meta"):
        model = RQTransformer(RQTransformer.configs["ffhq"])
    assert not unifiedar.accelerate(model, verbose=False).entries
