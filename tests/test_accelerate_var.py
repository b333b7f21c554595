"""accelerate on VAR's multi-scale quantizer: a stand-in with the published names, written anew."""

import copy
import sys
import types

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import nn

import unifiedar

SIDES = (1, 2, 3, 5)


class Phi(nn.Conv2d):
    def __init__(self, channels, ratio):
        super().__init__(channels, channels, 3, padding=1)
        self.resi_ratio = abs(ratio)

    def forward(self, x):
        return (1 - self.resi_ratio) * x + self.resi_ratio * super().forward(x)


class Shared(nn.Module):
    def __init__(self, convs):
        super().__init__()
        self.qresi_ls = nn.ModuleList(convs)
        count = len(convs)
        margin = 1 / 3 / count if count == 4 else 1 / 2 / count
        self.ticks = np.linspace(margin, 1 - margin, count)

    def __getitem__(self, at):
        return self.qresi_ls[np.argmin(np.abs(self.ticks - at)).item()]


class VectorQuantizer2(nn.Module):
    def __init__(self, count=4, ratio=0.5, using_znorm=False):
        super().__init__()
        self.v_patch_nums, self.using_znorm, self.prog_si = SIDES, using_znorm, -1
        self.quant_resi = Shared([Phi(6, ratio) if ratio else nn.Identity() for _ in range(count)])
        self.embedding = nn.Embedding(40, 6)

    def _part(self, maps, step):
        maps = F.interpolate(maps, size=(SIDES[-1],) * 2, mode="bicubic") if step + 1 < len(SIDES) else maps
        return self.quant_resi[step / (len(SIDES) - 1)](maps)

    def _maps(self, codes, side):
        return self.embedding(codes).transpose(1, 2).reshape(len(codes), -1, side, side)

    def f_to_idxBl_or_fhat(self, f_BChw, to_fhat, v_patch_nums=None):
        rest, total, found = f_BChw.detach().clone(), torch.zeros_like(f_BChw), []
        assert v_patch_nums is None
        for step, side in enumerate(SIDES):
            rows = F.interpolate(rest, size=(side, side), mode="area").flatten(2).transpose(1, 2)
            table = self.embedding.weight
            if self.using_znorm:
                codes = (F.normalize(rows, dim=2) @ F.normalize(table, dim=1).T).argmax(2)
            else:
                codes = torch.cdist(rows, table).argmin(2)
            part = self._part(self._maps(codes, side), step)
            total, rest = total + part, rest - part
            found.append(total if to_fhat else codes)
        return found

    def idxBl_to_var_input(self, gt_ms_idx_Bl):
        total, found = 0, []
        for step, side in enumerate(SIDES[:-1]):
            total = total + self._part(self._maps(gt_ms_idx_Bl[step], side), step)
            found.append(F.interpolate(total, size=(SIDES[step + 1],) * 2, mode="area").flatten(2).transpose(1, 2))
        return torch.cat(found, 1)

    def get_next_autoregressive_input(self, si, SN, f_hat, h_BChw):
        f_hat.add_(self._part(h_BChw, si))
        if si + 1 == SN:
            return f_hat, f_hat
        return f_hat, F.interpolate(f_hat, size=(SIDES[si + 1],) * 2, mode="area")


class WithoutPooling(VectorQuantizer2):
    """A fork that answers something else under the same name."""

    def idxBl_to_var_input(self, gt_ms_idx_Bl):
        return super().idxBl_to_var_input(gt_ms_idx_Bl) * 2


class Farthest(VectorQuantizer2):
    def f_to_idxBl_or_fhat(self, f_BChw, to_fhat, v_patch_nums=None):
        return super().f_to_idxBl_or_fhat(-f_BChw, to_fhat)


class Patched(VectorQuantizer2):
    """A subclass of ours, not a fork."""

    def get_next_autoregressive_input(self, si, SN, f_hat, h_BChw):
        return super().get_next_autoregressive_input(si, SN, f_hat, h_BChw)


def _published(cls, module, name="VectorQuantizer2"):
    cls.__module__, cls.__name__, cls.__qualname__ = module, name, cls.__name__
    sys.modules.setdefault(module, types.ModuleType(module))


_published(WithoutPooling, "fork_stand_in.quant")
_published(Farthest, "fork_stand_in.quant")
_published(VectorQuantizer2, "var_stand_in.quant")


def quantizer(cls=VectorQuantizer2, **options):
    torch.manual_seed(0)
    module = cls(**options)
    nn.init.normal_(module.embedding.weight, std=0.7)
    return module.requires_grad_(False)


def everything(module, x):
    codes = module.f_to_idxBl_or_fhat(x, False)
    sums = module.f_to_idxBl_or_fhat(x, True)
    total, steps = torch.zeros_like(x), []
    for step, (one, side) in enumerate(zip(codes, SIDES, strict=True)):
        maps = module.embedding(one).transpose(1, 2).reshape(len(x), -1, side, side)
        returned, following = module.get_next_autoregressive_input(step, len(SIDES), total, maps)
        assert returned is total
        steps.append(following.clone())
    assert following is total
    return codes, [*sums, module.idxBl_to_var_input(codes), *steps]


@pytest.mark.parametrize(
    "options", [{}, {"count": 2, "ratio": -0.3}, {"ratio": 0}, {"using_znorm": True}], ids=lambda options: str(options)
)
def test_outputs_stay(options):
    module = quantizer(**options)
    x = torch.randn(2, 6, 5, 5)
    want_codes, want = everything(module, x)
    keys, pointers = list(module.state_dict()), [one.data_ptr() for one in module.parameters()]
    report = unifiedar.accelerate(module, verbose=False)
    assert [entry.status for entry in report.entries] == ["swapped"]
    for one in (module, copy.deepcopy(module)):
        codes, got = everything(one, x)
        assert all(map(torch.equal, codes, want_codes))
        torch.testing.assert_close(got, want)
    assert list(module.state_dict()) == keys
    assert [one.data_ptr() for one in module.parameters()] == pointers
    assert unifiedar.restore(module) == [""]
    assert "f_to_idxBl_or_fhat" not in module.__dict__


def test_what_the_published_methods_answer_themselves(monkeypatch):
    module = quantizer()
    unifiedar.accelerate(module, verbose=False)
    called = []
    for name in ("f_to_idxBl_or_fhat", "idxBl_to_var_input", "get_next_autoregressive_input"):
        monkeypatch.setattr(VectorQuantizer2, name, lambda *_args, name=name: called.append(name))
    codes = [torch.zeros(1, side * side, dtype=torch.int64) for side in SIDES]
    maps = torch.zeros(1, 6, 1, 1)
    module.idxBl_to_var_input(codes)
    assert not called
    module.embedding.weight.requires_grad_(True)  # then the published ones have gradients
    module.idxBl_to_var_input(codes)
    with torch.no_grad():
        module.idxBl_to_var_input(codes)
    module.embedding.weight.requires_grad_(False)
    module.get_next_autoregressive_input(0, 9, torch.zeros(1, 6, 5, 5), maps)
    module.f_to_idxBl_or_fhat(torch.zeros(1, 6, 5, 5).half(), False)
    module.prog_si = 2
    module.idxBl_to_var_input(codes)
    assert called == [
        "idxBl_to_var_input",
        "get_next_autoregressive_input",
        "f_to_idxBl_or_fhat",
        "idxBl_to_var_input",
    ]


def elsewhere():
    class VectorQuantizer2(nn.Module):
        pass

    return VectorQuantizer2()


def with_meta():
    return quantizer().to("meta")


def with_other_ratio():
    module = quantizer()
    module.quant_resi.qresi_ls[1].resi_ratio = 0.4
    return module


REFUSED = {
    "another file": (elsewhere, "not from a module quant as in VAR"),
    "inputs of a fork": (lambda: quantizer(WithoutPooling), "its idxBl_to_var_input does not return"),
    "codes of a fork": (lambda: quantizer(Farthest), "its f_to_idxBl_or_fhat does not choose the nearest"),
    "overridden": (lambda: quantizer(Patched), "Patched overrides get_next_autoregressive_input"),
    "half precision": (lambda: quantizer().half(), "not float32"),
    "meta": (with_meta, "on the meta device"),
    "ratios": (with_other_ratio, "differ in resi_ratio"),
}


@pytest.mark.parametrize(("make", "text"), REFUSED.values(), ids=REFUSED)
def test_refusals(make, text):
    module = make()
    report = unifiedar.accelerate(module, verbose=False)
    (entry,) = report.refused
    assert text in entry.text
    assert "f_to_idxBl_or_fhat" not in module.__dict__
