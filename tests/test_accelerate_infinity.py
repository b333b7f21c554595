"""accelerate on Infinity's bitwise quantizer, by stand-ins with its names, settings and arithmetic."""

import copy
import math
import sys
import types
from collections import namedtuple

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from unifiedar import accelerate, restore
from unifiedar.accelerate import _infinity

Return = namedtuple("Return", ["quantized", "indices", "bit_indices", "entropy_aux_loss"])


class BSQ(nn.Module):
    """One scale, as published: normalized, signs passed straight through, codes normalized once more."""

    def __init__(self, dim, **settings):
        super().__init__()
        self.codebook_dim, self.codebook_scale = dim, dim**-0.5
        self.has_projections, self.new_quant, self.num_codebooks = False, True, 1
        self.keep_num_codebooks_dim, self.channel_first, self.force_quantization_f32 = False, None, True
        self.register_buffer("mask", 2 ** torch.arange(dim - 1, -1, -1))
        self.register_buffer("zero", torch.tensor(0.0), persistent=False)
        self.calls = 0
        vars(self).update(settings)

    def forward(self, x, return_loss_breakdown=False, mask=None, entropy_weight=0.1):
        self.calls += 1
        tokens = F.normalize(x.movedim(1, -1) if x.ndim >= 4 else x, dim=-1)
        signs = torch.where(tokens > 0, 1.0, -1.0) * (1.0 / math.sqrt(self.codebook_dim))
        codes = tokens + (signs - tokens).detach()
        bits = (codes > 0).int()
        out = Return(codes.movedim(-1, 1) if x.ndim >= 4 else codes, None, bits, self.zero * 0.1)
        return (out, "breakdown") if return_loss_breakdown else out

    def indices_to_codes(self, indices, label_type="int_label", project_out=True):
        self.calls += 1
        bits = (indices[..., None] & self.mask != 0).float() if label_type == "int_label" else indices
        codes = F.normalize(bits * self.codebook_scale * 2 - self.codebook_scale, dim=-1)
        return codes.movedim(-1, 1) if indices.ndim >= 3 else codes


class MultiScaleBSQ(nn.Module):
    """All scales, as published."""

    def __init__(self, dim, sign=BSQ, **settings):
        super().__init__()
        self.lfq = sign(dim)
        self.layernorm = nn.Identity()
        for name, value in _infinity._SETTINGS.items():
            setattr(self, name, value)
        self.use_stochastic_depth, self.drop_rate, self.calls = False, 0.0, 0
        for name, value in settings.items():
            setattr(self, name, value)

    def forward(self, x, scale_schedule=None, mask=None, return_all_codes=False, return_residual_norm_per_scale=False):
        self.calls += 1
        x = x if x.ndim == 5 else x.unsqueeze(2)
        size = tuple(x.shape[2:])
        scales = scale_schedule or [(1, 1, 1), size]
        rest, total, bits, inputs, norms, losses = x, 0.0, [], [], [], []
        for s, scale in enumerate(scales):
            pooled = F.interpolate(rest, scale, mode="area") if tuple(scale) != size else rest
            if return_residual_norm_per_scale:
                norms.append((pooled.abs() < 0.05 * self.lfq.codebook_scale).sum() / pooled.numel())
            codes, _, own, loss = self.lfq(pooled)
            codes = F.interpolate(codes, size, mode="trilinear") if tuple(scale) != size else codes
            rest, total = rest - codes.detach(), total + codes
            bits.append(own)
            losses.append(loss)
            if s + 1 < len(scales):
                inputs.append(F.interpolate(total, scales[s + 1], mode="area"))
        total = total.squeeze(2) if size[0] == 1 else total
        out = total, [None] * len(scales), bits, norms, torch.stack(losses), inputs
        return (*out, "all codes") if return_all_codes else out


class Doubled(MultiScaleBSQ):
    """A fork with other arithmetic under the same name."""

    def forward(self, *args, **kwargs):
        total, *rest = super().forward(*args, **kwargs)
        return 2 * total, *rest


class DoubledSign(BSQ):
    def indices_to_codes(self, *args, **kwargs):
        return 2 * super().indices_to_codes(*args, **kwargs)


def _published(cls, name, module="infinity_stand_in.multiscale_bsq"):
    cls.__module__, cls.__name__, cls.__qualname__ = module, name, name
    for path in (module.partition(".")[0], module):
        sys.modules.setdefault(path, types.ModuleType(path))
    setattr(sys.modules[module], name, cls)


_published(BSQ, "BSQ")
_published(MultiScaleBSQ, "MultiScaleBSQ")

SCALES = [(1, 1, 1), (1, 2, 3), (1, 3, 3), (1, 4, 5)]


def quantizer(dim=14, **settings):
    return MultiScaleBSQ(dim, **settings)


def statuses(module):
    return [(entry.path, entry.status) for entry in accelerate(module, verbose=False).entries]


@pytest.mark.parametrize("dim", [2, 14, 32, 64])
@pytest.mark.parametrize("frames", [False, True])
def test_the_swapped_quantizer_equals_the_published_one(dim, frames):
    theirs, ours = quantizer(dim), quantizer(dim)
    assert statuses(ours) == [("", "swapped"), ("lfq", "swapped")]
    ours.calls = ours.lfq.calls = 0
    generator = torch.Generator().manual_seed(dim)
    x = torch.randn((2, dim, *((2, 4, 5) if frames else (4, 5))), generator=generator)
    scales = [(min(t + s // 2, 2), h, w) for s, (t, h, w) in enumerate(SCALES)] if frames else SCALES
    leaves = [x.clone().requires_grad_() for _ in range(2)]
    want, got = (
        module(leaf, scales, return_residual_norm_per_scale=True)
        for module, leaf in zip((theirs, ours), leaves, strict=True)
    )
    assert (ours.calls, ours.lfq.calls) == (0, 0), "none of the published methods ran"
    torch.testing.assert_close(got[0], want[0], rtol=0, atol=1e-6)
    assert got[1] == want[1]
    assert all(torch.equal(*pair) for pair in zip(got[2], want[2], strict=True))
    torch.testing.assert_close(got[3], want[3])
    assert torch.equal(got[4], want[4])
    torch.testing.assert_close(got[5], [one.detach() for one in want[5]], rtol=0, atol=1e-6)
    for out in (want, got):
        out[0].square().sum().backward()
    torch.testing.assert_close(leaves[1].grad, leaves[0].grad, rtol=1e-4, atol=1e-5)


def test_the_swapped_signs_equal_the_published_ones():
    theirs, ours = BSQ(14), BSQ(14)
    assert statuses(ours) == [("", "swapped")]
    ours.calls = 0
    for shape in ((2, 5, 14), (2, 14, 3, 4), (2, 14, 1, 3, 4)):
        x = torch.randn(shape, generator=torch.Generator().manual_seed(0))
        want, got = theirs(x), ours(x)
        torch.testing.assert_close(got.quantized, want.quantized, rtol=0, atol=1e-7)
        assert torch.equal(got.bit_indices, want.bit_indices)
        assert (got.indices, got.entropy_aux_loss.item()) == (None, 0.0)
        for kind in (torch.int32, torch.int64, torch.uint8):
            bits = want.bit_indices.to(kind)
            got, right = (one.indices_to_codes(bits, label_type="bit_label") for one in (ours, theirs))
            assert torch.equal(got, right)
    assert ours.calls == 0


def test_unusual_calls_are_the_published_methods_to_answer():
    module = quantizer()
    accelerate(module, verbose=False)
    module.calls = 0
    x = torch.randn(1, 14, 4, 5)
    module(x)  # a schedule of its own
    assert module(x, SCALES, return_all_codes=True)[-1] == "all codes"
    module(x.double(), SCALES)
    module(x, SCALES[:-1])
    assert module.calls == 4
    module.lfq.calls = 0
    assert module.lfq(x, return_loss_breakdown=True)[1] == "breakdown"
    module.lfq(x.half())
    module.lfq.indices_to_codes(torch.zeros(2, 3, dtype=torch.int64))
    module.lfq.indices_to_codes(torch.zeros(2, 3, 14), label_type="bit_label")
    assert module.lfq.calls == 4


def test_restore_state_and_copies():
    model = nn.ModuleDict({"quantizer": quantizer()})
    model["quantize"] = model["quantizer"]  # Infinity lists it twice
    before = {name: value.clone() for name, value in model.state_dict().items()}
    assert statuses(model) == [("quantizer", "swapped"), ("quantizer.lfq", "swapped")]
    assert statuses(model) == [("quantizer", "already"), ("quantizer.lfq", "already")]
    assert list(model.state_dict()) == list(before)
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    twin = copy.deepcopy(model)["quantizer"]
    x = torch.randn(1, 14, 4, 5)
    twin.calls = 0
    wanted = twin(x, SCALES)[0]
    assert twin.calls == 0
    assert restore(model) == ["quantizer", "quantizer.lfq"]
    assert not [name for name in (*vars(model["quantizer"]), *vars(model["quantizer"].lfq)) if "unifiedar" in name]
    torch.testing.assert_close(model["quantizer"](x, SCALES)[0], wanted, rtol=0, atol=1e-6)


def _foreign():
    class MultiScaleBSQ(nn.Module):
        pass

    return MultiScaleBSQ()


def _patched():
    module = quantizer()
    module.forward = module.forward
    return module


def _normalizing():
    return quantizer(layernorm=nn.LayerNorm(14))


def _otherwise():
    module = quantizer()
    module.lfq = nn.Identity()
    return module


def _without():
    module = quantizer()
    del module.use_decay_factor
    return module


REFUSED = {
    "foreign": (_foreign, "comes from test_accelerate_infinity, not from a module multiscale_bsq"),
    "patched": (_patched, "its forward was replaced on the instance"),
    "overridden": (lambda: Doubled(14), "Doubled overrides forward"),
    "random flips": (lambda: quantizer(random_flip=True), "its random_flip is True, and ours knows False only"),
    "bicubic": (lambda: quantizer(z_interplote_up="bicubic"), "its z_interplote_up is 'bicubic'"),
    "scales left out": (lambda: quantizer(use_stochastic_depth=True, drop_rate=0.1), "leaves scales out at random"),
    "layer norm": (_normalizing, "it normalizes layers before it quantizes"),
    "no signs": (_otherwise, "its lfq is a Identity, not a BSQ of multiscale_bsq"),
    "no setting": (_without, "lacks use_decay_factor"),
    "other signs": (lambda: quantizer(sign=lambda dim: BSQ(dim, new_quant=False)), "its new_quant is False"),
    "another threshold": (lambda: quantizer(sign=lambda dim: Shifted(dim)), "its forward differs from what we compute"),
    "failing": (lambda: quantizer(sign=lambda dim: Failing(dim)), "it fails when tried on a copy: RuntimeError: no"),
    "too many bits": (
        lambda: quantizer(sign=lambda dim: BSQ(dim, codebook_dim=65)),
        "has 65 bits, and ours takes 1 to",
    ),
}


class Shifted(BSQ):
    """Other bits, and nothing that tells but what comes out."""

    def forward(self, x, *args, **kwargs):
        return super().forward(x + 0.3, *args, **kwargs)


class Failing(BSQ):
    def forward(self, x, *args, **kwargs):
        raise RuntimeError("no")


@pytest.mark.parametrize("name", REFUSED)
def test_refusals_say_why_and_leave_the_module_alone(name):
    make, text = REFUSED[name]
    module = make()
    entry = accelerate(module, verbose=False).entries[0]
    assert entry.status == "refused"
    assert text in entry.text
    assert not [key for key in vars(module) if "unifiedar" in key]


def test_signs_are_refused_on_their_own():
    for module, text in (
        (DoubledSign(14), "DoubledSign overrides indices_to_codes"),
        (BSQ(14, channel_first=True), "its channel_first is True"),
    ):
        (entry,) = accelerate(module, verbose=False).entries
        assert entry.status == "refused"
        assert text in entry.text
