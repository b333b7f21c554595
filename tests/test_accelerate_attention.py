"""accelerate on the self-attention of VAR and Infinity, by stand-ins with their names, settings and arithmetic."""

import copy
import math
import pickle
import types

import pytest
import torch
from published_attention import Infinity, Var, grid_of, mask_of, randomize
from torch import nn

from unifiedar import accelerate, restore
from unifiedar.accelerate import _attention

LENGTHS = [1, 4, 9, 16]
SCHEDULE = [(1, side, side) for side in (1, 2, 3, 4)]
GRID = grid_of(SCHEDULE, 32)

KINDS = {
    "VAR": Var,
    "VAR without its norm": lambda **settings: Var(normed=False, **settings),
    "Infinity": Infinity,
    "Infinity without its norm": lambda **settings: Infinity(normed=False, **settings),
}
kinds = pytest.mark.parametrize("kind", KINDS.values(), ids=KINDS)


@pytest.fixture(autouse=True)
def _no_masks_known():
    _attention._last = None


def pair(kind, device="cpu", **settings):
    """A published module and a swapped copy of it."""
    theirs = randomize(kind(**settings)).to(device)
    ours = copy.deepcopy(theirs)
    assert [entry.status for entry in accelerate(ours, verbose=False).entries] == ["swapped"]
    ours.calls = 0
    return theirs, ours


def extra(module, step=0, turned=True):
    """What Infinity's forward takes besides."""
    if isinstance(module, Var) or not turned:
        return ()
    device = module.proj.weight.device
    return None, SCHEDULE, {name: one.to(device) for name, one in GRID.items()}, step


TOTAL = sum(LENGTHS)


def tokens(length=TOTAL, device="cpu", seed=0):
    return torch.randn(2, length, 64, generator=torch.Generator().manual_seed(seed)).to(device)


def generate(module, x, lengths=LENGTHS, turned=True):
    outs = []
    module.kv_caching(True)
    for step, part in enumerate(x.split(lengths, 1)):
        outs.append(module(part, None, *extra(module, step, turned)))
    return torch.cat(outs, 1)


def close(got, want):
    """To float32's rounding of sums of many terms."""
    torch.testing.assert_close(got, want, rtol=0, atol=2e-5 * max(1.0, want.abs().max().item()))


def reason(module):
    (entry,) = accelerate(module, verbose=False).entries
    assert entry.status == "refused"
    assert not any("unifiedar" in name for name in vars(module))
    return entry.text


@kinds
@pytest.mark.parametrize("turned", [True, False])
def test_training_equals_the_published(device, kind, turned):
    theirs, ours = pair(kind, device)
    mask, results = mask_of(LENGTHS, device=device), []
    for module in (theirs, ours):
        leaf = tokens(device=device).requires_grad_()
        out = module(leaf, mask, *extra(module, 0, turned))
        results.append((out, *torch.autograd.grad(out.sin().sum(), [leaf, *module.parameters()])))
    assert ours.calls == 0, "the published forward did not run"
    for want, got in zip(*results, strict=True):
        close(got, want)


@kinds
def test_generation_equals_the_published(device, kind):
    theirs, ours = pair(kind, device)
    with torch.no_grad():
        for seed in range(3):
            x = tokens(device=device, seed=seed)
            close(generate(ours, x), generate(theirs, x))
            close(ours.cached_k, theirs.cached_k)
            close(ours.cached_v, theirs.cached_v)
            if seed:  # the size is known from the picture before, and nothing was copied
                assert ours.cached_k.untyped_storage().nbytes() == 2 * ours.cached_k.numel() * 4
                assert ours.cached_k.data_ptr() == vars(ours)["_unifiedar_cache"][0].data_ptr()
            for module in (theirs, ours):
                module.kv_caching(False)
            assert ours.cached_k is None
            assert "_unifiedar_cache" not in vars(ours)
    assert ours.calls == 0


@kinds
def test_a_shorter_and_a_longer_picture_after_it(kind):
    theirs, ours = pair(kind)
    with torch.no_grad():
        for lengths in (LENGTHS, LENGTHS[:2], LENGTHS):
            x = tokens(sum(lengths))
            close(generate(ours, x, lengths), generate(theirs, x, lengths))


def test_a_cache_that_somebody_keeps_is_not_written_over():
    """Two continuations of one beginning; one of a shortened cache; one from other memory."""
    theirs, ours = pair(Var)
    x, other = tokens(), tokens(seed=1)
    with torch.no_grad():
        kept = []
        for module in (theirs, ours):
            module.kv_caching(True)
            module(x[:, :5], None)
            start = module.cached_k, module.cached_v
            module(x[:, 5:14], None)
            first = module.cached_k, module.cached_v
            module.cached_k, module.cached_v = start
            second = module(other[:, 5:14], None)
            module.cached_k, module.cached_v = (one[:, :, :7] for one in first)
            third = module(x[:, 14:], None)
            module.cached_k, module.cached_v = (one.clone() for one in first)
            kept.append((second, third, module(x[:, 14:], None), *start, *first))
    for want, got in zip(*kept, strict=True):
        close(got, want)


def test_generation_with_gradients():
    theirs, ours = pair(Infinity)
    found = []
    for module in (theirs, ours):
        out = generate(module, tokens())
        found.append((out, *torch.autograd.grad(out.sin().sum(), list(module.parameters()))))
    for want, got in zip(*found, strict=True):
        close(got, want)


@pytest.mark.parametrize("half", [torch.bfloat16, torch.float16], ids=str)
def test_under_autocast(device, half):
    theirs, ours = pair(Var, device)
    for module in (theirs, ours):
        module.scale_mul_1H11.data.fill_(1.0)
    x = tokens(device=device)
    with torch.no_grad(), torch.autocast(device, dtype=half):
        for mask in (mask_of(LENGTHS, half, device), mask_of(LENGTHS, device=device)):
            torch.testing.assert_close(ours(x, mask), theirs(x, mask.to(half)), rtol=0, atol=0.05)
        torch.testing.assert_close(generate(ours, x), generate(theirs, x), rtol=0, atol=0.05)
    assert ours.cached_k.dtype == half
    assert ours.calls == 0


# ---- masks -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("lengths", [[1], [7], [1, 1], [1, 2, 1], [5, 1, 30], [1] * 32], ids=str)
@pytest.mark.parametrize("padding", [0, 1, 6])
def test_scales_are_read_off_a_mask(lengths, padding):
    mask = mask_of(lengths, padding=padding)
    assert _attention._scales_of(mask, sum(lengths) + padding, {}) == (lengths, padding)


def _spoiled(where, value):
    mask = mask_of(LENGTHS)
    mask[(0, 0, *where)] = value
    return mask


OTHERS = {
    "one key less": _spoiled((29, 3), -math.inf),
    "one key more": _spoiled((2, 9), 0.0),
    "another number": _spoiled((20, 3), 0.5),
    "not a number": _spoiled((20, 3), math.nan),
    "a query that sees nothing": _spoiled((0, 0), -math.inf),
    "a finite lowest value": mask_of(LENGTHS).clamp_min(-1e9),
    "33 scales": mask_of([1] * 33),
    "a window": mask_of([10, 10, 10]).masked_fill(torch.ones(30, 30).tril(-15).bool(), -math.inf),
    "padding that sees two keys": mask_of([2, 3], padding=2).index_fill(3, torch.tensor(1), 0.0),
}


@pytest.mark.parametrize("mask", OTHERS.values(), ids=OTHERS)
def test_other_masks_are_the_published_methods_business(mask):
    length = mask.shape[2]
    assert _attention._scales_of(mask, length, {}) is None
    theirs, ours = pair(Var)
    x = tokens(length)
    torch.testing.assert_close(ours(x, mask), theirs(x, mask), rtol=0, atol=0, equal_nan=True)
    assert ours.calls == 1


def test_a_mask_that_changes_in_place_is_read_again():
    theirs, ours = pair(Var)
    mask, x = mask_of(LENGTHS), tokens()
    close(ours(x, mask), theirs(x, mask))
    mask.copy_(mask_of([2, 3, 25]))
    close(ours(x, mask), theirs(x, mask))
    assert ours.calls == 0
    mask[0, 0, 29, 3] = -math.inf
    close(ours(x, mask), theirs(x, mask))
    assert ours.calls == 1
    with torch.inference_mode():  # its tensors do not say whether they changed
        mask = mask_of(LENGTHS)
        close(ours(x, mask), theirs(x, mask))
        mask.copy_(mask_of([2, 3, 25]))
        close(ours(x, mask), theirs(x, mask))


def test_a_mask_is_read_once_for_all_layers(monkeypatch):
    _, ours = pair(Var)
    mask, reads = mask_of(LENGTHS), []
    read = _attention._read
    monkeypatch.setattr(_attention, "_read", lambda bias: reads.append(1) or read(bias))
    for _ in range(3):
        ours(tokens(), mask)
    assert len(reads) == 1


def test_a_later_mask_of_the_size_of_another_is_asserted():
    """What a GPU does, which must not be waited for."""
    mask = mask_of(LENGTHS)
    sees, _ = _attention._read(mask)
    _attention._assert_same(mask.clone(), sees)
    with pytest.raises(RuntimeError, match="must be the same mask"):
        _attention._assert_same(mask_of([2, 3, 25]), sees)


def test_masks_of_one_size_but_two_schedules(device, monkeypatch):
    """Pictures of two aspect ratios, padded to one length; and a second model. As on a GPU, also on the CPU."""
    monkeypatch.setattr(_attention, "_waits", lambda bias: True)
    theirs, ours = pair(Infinity, device)
    x, reads, read = tokens(32, device), [], _attention._read
    monkeypatch.setattr(_attention, "_read", lambda bias: reads.append(1) or read(bias))
    for _ in range(2):
        for lengths, schedule in (([1, 4, 16], [(1, 1, 1), (1, 2, 2), (1, 4, 4)]), ([1, 6], [(1, 1, 1), (1, 3, 2)])):
            mask = mask_of(lengths, device=device, padding=32 - sum(lengths))
            close(ours(x, mask, None, schedule), theirs(x, mask, None, schedule))
    assert len(reads) == 2
    theirs, ours = pair(Infinity, device)
    mask = mask_of([10, 22], device=device)
    close(ours(x, mask, None, schedule), theirs(x, mask, None, schedule))
    assert ours.calls == 0
    if device == "cpu":  # a GPU would be lost with it
        with pytest.raises(RuntimeError, match="must be the same mask"):
            ours(x, mask_of([9, 23]), None, schedule)


@pytest.mark.gpu
def test_a_known_mask_costs_no_wait():
    theirs, ours = pair(Var, "cuda")
    x = tokens(device="cuda")
    ours(x, mask_of(LENGTHS, device="cuda"))
    mask = mask_of(LENGTHS, device="cuda")
    torch.cuda.set_sync_debug_mode("error")
    try:
        out = ours(x, mask)
    finally:
        torch.cuda.set_sync_debug_mode("default")
    close(out, theirs(x, mask))
    assert ours.calls == 0


def test_padded_training_of_infinity():
    """Rows of padding see the first key alone, and so they answer."""
    theirs, ours = pair(Infinity)
    x, mask = tokens(sum(LENGTHS) + 2), mask_of(LENGTHS, padding=2)
    found = []
    for module in (theirs, ours):
        leaf = x.clone().requires_grad_()
        out = module(leaf, mask, *extra(module))
        found.append((out, torch.autograd.grad(out.sin().sum(), leaf)[0]))
    assert ours.calls == 0
    for want, got in zip(*found, strict=True):
        close(got, want)


# ---- left to the published method, refused, put back -----------------------------------------------------------------


def test_calls_that_the_published_forward_answers():
    _, ours = pair(lambda: Var(attn_drop=0.5))
    ours.train()
    ours(tokens(), mask_of(LENGTHS))
    assert ours.calls == 1, "dropout"
    ours.eval()
    ours(tokens(), mask_of(LENGTHS))
    assert ours.calls == 1
    _, ours = pair(Infinity)
    ours.use_flex_attn = True

    def flex(q, k, v, scale):
        return nn.functional.scaled_dot_product_attention(q, k, v, scale=scale)

    ours(tokens(), None, flex)
    assert ours.calls == 1, "FlexAttention"


class Patched(Var):
    def forward(self, x, attn_bias):
        return super().forward(x, attn_bias) * 2


def _changed(**attributes):
    module = randomize(Var())
    for name, value in attributes.items():
        setattr(module, name, value)
    return module


class Half(Var):
    """A fork with another scale under the same name."""

    def _attend(self, *args):
        return super()._attend(*args) / 2


def _failing():
    module = randomize(Var())
    module.num_heads = 3
    return module


def _without(name):
    module = randomize(Var())
    delattr(module, name)
    return module


REFUSALS = {
    "a subclass": (lambda: randomize(Patched()), "Patched overrides forward"),
    "a patched instance": (lambda: _changed(forward=lambda *args: None), "was replaced on the instance"),
    "another limit": (lambda: _changed(max_scale_mul=1.0), "differs from what we compute"),
    "another scale": (lambda: randomize(Half()), "differs from what we compute"),
    "a lost attribute": (lambda: _without("zero_k_bias"), "lacks zero_k_bias"),
    "another projection": (lambda: _changed(mat_qkv=nn.Linear(64, 192)), "mat_qkv is not an nn.Linear without a bias"),
    "narrow heads": (lambda: randomize(Var(64, 4)), "head size is 16"),
    "in the middle": (lambda: _changed(caching=True), "middle of a generation"),
    "on the meta device": (lambda: Var().to("meta"), "meta device"),
    "broken": (_failing, "fails when tried on a copy"),
    "its own FlashAttention": (lambda: vars(m := Infinity()).update(using_flash=True) or m, "customized_flash_attn"),
}


@pytest.mark.parametrize("case", REFUSALS.values(), ids=REFUSALS)
def test_refusals(case):
    make, words = case
    module = make()
    assert words in reason(module)


def test_others_of_the_name_are_not_touched():
    other = type("SelfAttention", (nn.Module,), {"__module__": "diffusion.attention"})()
    assert not accelerate(other, verbose=False).entries


def test_whole_models_and_back():
    model = nn.Sequential(randomize(Var()), nn.Linear(2, 2), randomize(Infinity()))
    before = {name: one.clone() for name, one in model.state_dict().items()}
    report = accelerate(model, verbose=False)
    assert [(entry.path, entry.status) for entry in report.entries] == [("0", "swapped"), ("2", "swapped")]
    assert [entry.status for entry in accelerate(model, verbose=False).entries] == ["already", "already"]
    after = model.state_dict()
    assert list(after) == list(before)
    assert all(torch.equal(after[name], one) for name, one in before.items())
    with torch.no_grad():
        generate(model[0], tokens()[:, :5], [1, 4])
        twin = copy.deepcopy(model)
        want = model[0](tokens()[:, 5:14], None)
        close(twin[0](tokens()[:, 5:14], None), want)
        loaded = pickle.loads(pickle.dumps(twin))
        assert restore(model) == ["0", "2"]
        for part in model:
            assert not any("unifiedar" in name or isinstance(one, types.MethodType) for name, one in vars(part).items())
        # The published method goes on from where ours was.
        rest = model[0](tokens()[:, 14:], None)
        close(rest, twin[0](tokens()[:, 14:], None))
        close(loaded[0](tokens()[:, 14:], None), rest)


def test_under_compile(fresh_compiler):
    """Without a mask in one graph; a mask cannot be read there, and so the published forward takes it."""
    theirs, ours = pair(Infinity)
    x, mask = tokens(), mask_of(LENGTHS)
    compiled = torch.compile(lambda x, mask: ours(x, mask), backend="aot_eager")
    close(compiled(x, None), theirs(x, None))
    close(compiled(x, mask), theirs(x, mask))
