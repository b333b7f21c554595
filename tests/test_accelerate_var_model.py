"""accelerate on VAR's whole transformer: results stay, and so does everything that it cannot answer."""

import copy
import gc
import weakref

import pytest
import torch
from published_var import VAR, AdaLNSelfAttn, build, publish
from torch import nn

import unifiedar
from unifiedar.accelerate import _var_model

OPTIONS = [{}, {"shared": True}, {"normed": False, "drop": 0.0}, {"depth": 1}]
LABELS = torch.tensor([1, 5])


def swap(module):
    """The report's entry of the module itself."""
    return unifiedar.accelerate(module, verbose=False).entries[0]


def inputs():
    return torch.randn(2, 38, 6, generator=torch.Generator().manual_seed(2))


def everything(module):
    draws = [
        module.autoregressive_infer_cfg(2, LABELS, g_seed=3, cfg=2.0, top_k=9, top_p=0.9),
        module.autoregressive_infer_cfg(2, LABELS, 4, 3.0, 0, 0.95, True),
        module.autoregressive_infer_cfg(3, None, g_seed=1),
        module.autoregressive_infer_cfg(1, -1, g_seed=1, cfg=0),
        module.autoregressive_infer_cfg(1, 4, g_seed=1, cfg=1),
    ]
    torch.manual_seed(8)
    draws += [module.autoregressive_infer_cfg(2, 3, top_k=5), module(LABELS, inputs()), torch.rand(1)]
    return draws


@pytest.mark.parametrize("options", OPTIONS, ids=str)
def test_results_stay(options):
    module = build(**options)
    want, keys = everything(module), list(module.state_dict())
    pointers = [one.data_ptr() for one in module.parameters()]
    entry = swap(module)
    assert entry.status == "swapped", entry.text
    for one in (module, copy.deepcopy(module)):
        for got, expected in zip(everything(one), want, strict=True):
            torch.testing.assert_close(got, expected, rtol=0, atol=2e-4)
    assert list(module.state_dict()) == keys
    assert [one.data_ptr() for one in module.parameters()] == pointers
    assert unifiedar.restore(module)[0] == ""
    assert not {"forward", "autoregressive_infer_cfg"} & set(module.__dict__)
    for got, expected in zip(everything(module), want, strict=True):
        assert torch.equal(got, expected)


@pytest.mark.parametrize("options", OPTIONS[:2], ids=str)
def test_training_stays(options):
    def step(module):
        torch.manual_seed(4)
        module.train().zero_grad()
        x = inputs().requires_grad_()
        loss = module(LABELS, x).sin().mean()
        loss.backward()
        return [loss.detach(), x.grad, *(one.grad.clone() for one in module.parameters())]

    module = build(**options)
    want = step(module)
    assert swap(module).status == "swapped"
    for got, expected in zip(step(module), want, strict=True):
        torch.testing.assert_close(got, expected, rtol=1e-4, atol=1e-7)
    optimizer = torch.optim.SGD(module.parameters(), lr=0.1)
    optimizer.step()  # ours sees the new weights
    plain = copy.deepcopy(module)
    unifiedar.restore(plain)
    for got, expected in zip(everything(module.eval()), everything(plain.eval()), strict=True):
        torch.testing.assert_close(got, expected, rtol=0, atol=2e-4)


def test_autocast_casts_once():
    """Under autocast a copy in half precision draws; it follows the weights, and nothing of the module changes."""
    module = build()
    assert swap(module).status == "swapped"
    before = [one.detach().clone() for one in module.parameters()]

    def draw():
        with torch.autocast("cpu", dtype=torch.bfloat16):
            return module.autoregressive_infer_cfg(1, 2, g_seed=0, cfg=2.0)

    first = draw()
    twin = _var_model._TWINS[module]
    cast = twin.cast
    assert cast.dtype == torch.bfloat16
    assert torch.equal(draw(), first)
    assert twin.cast is cast
    assert all(torch.equal(one, other) for one, other in zip(module.parameters(), before, strict=True))
    assert {one.dtype for one in module.parameters()} == {torch.float32}
    with torch.no_grad():
        module.head.weight.neg_()
    assert not torch.equal(draw(), first)
    assert twin.cast is not cast
    with torch.no_grad():
        module.head.weight.neg_()
    assert torch.equal(draw(), first)


def test_inference_mode():
    """As the published demonstrations call it, and without it afterwards."""
    module = build()

    def draw():
        with torch.autocast("cpu", dtype=torch.bfloat16):
            half = module.autoregressive_infer_cfg(1, 2, g_seed=0, cfg=2.0)
        return half, module.autoregressive_infer_cfg(1, 2, g_seed=0, cfg=2.0)

    want = draw()[1]
    with torch.inference_mode():
        assert swap(module).status == "swapped"
        first = draw()
    torch.testing.assert_close(first[1], want, rtol=0, atol=2e-4)
    second = draw()
    assert all(torch.equal(one, other) for one, other in zip(first, second, strict=True))
    module.train()(LABELS, inputs()).mean().backward()
    assert module.head.weight.grad.any()


def test_it_follows_replaced_weights():
    module = build()
    assert swap(module).status == "swapped"
    module(LABELS, inputs())
    other = build(seed=1)
    want = everything(other)
    module.load_state_dict(other.state_dict(), assign=True)
    module.vae_proxy, module.vae_quant_proxy = other.vae_proxy, other.vae_quant_proxy
    for got, expected in zip(everything(module), want, strict=True):
        torch.testing.assert_close(got, expected, rtol=0, atol=2e-4)


def test_what_the_published_methods_answer_themselves(monkeypatch):
    module = build()
    assert swap(module).status == "swapped"
    called = []
    monkeypatch.setattr(VAR, "forward", lambda *args: called.append("forward"))
    monkeypatch.setattr(VAR, "autoregressive_infer_cfg", lambda *args, **kwargs: called.append("draw"))
    module(LABELS, inputs())
    module.autoregressive_infer_cfg(2, LABELS)
    assert not called
    module.autoregressive_infer_cfg(2, LABELS, cfg=-1.0)
    module.autoregressive_infer_cfg(2, LABELS, top_k=41)
    module.autoregressive_infer_cfg(2, LABELS, top_p=1.5)
    module.autoregressive_infer_cfg(3, LABELS)
    assert called == ["draw"] * 4
    handle = module.blocks[1].register_forward_hook(lambda *args: None)
    module(LABELS, inputs())
    handle.remove()
    module.prog_si = 2
    module(LABELS, inputs())
    module.prog_si = -1
    module.double()
    module(LABELS, inputs())
    assert called[4:] == ["forward"] * 3


def test_nothing_of_ours_outlives_it():
    module = build()
    swap(module)
    module.autoregressive_infer_cfg(1, 2)
    alive = weakref.ref(module)
    unifiedar.restore(module)
    assert module not in _var_model._TWINS
    swap(module)
    module.autoregressive_infer_cfg(1, 2)
    del module
    gc.collect()
    assert alive() is None


class OtherGate(AdaLNSelfAttn):
    """A fork that answers something else under the same name."""

    def forward(self, x, cond_BD, attn_bias):
        return super().forward(x, cond_BD, attn_bias) * 1.01


class OtherTemperature(VAR):
    def get_logits(self, x, cond):
        return super().get_logits(x, cond) / 2


class Sorted(VAR):
    """A fork that draws otherwise."""

    def _draw(self, logits, top_k, top_p, rng):
        logits, codes = super()._draw(logits, top_k, top_p, rng)
        return logits, (codes + 1) % 40


publish(OtherGate, "AdaLNSelfAttn", "fork_of_var.basic_var")
publish(Sorted, "VAR", "fork_of_var.var")


def with_block(change):
    module = build()
    change(module.blocks)
    return module


def replace_block(blocks):
    new = OtherGate(64, 2, False, True, 0.0)
    new.load_state_dict(blocks[0].state_dict())
    blocks[0] = new


REFUSED = {
    "gates of a fork": (lambda: with_block(replace_block), "differs from what we compute"),
    "draws of a fork": (lambda: build(Sorted), "its autoregressive_infer_cfg differs"),
    "overridden": (lambda: build(OtherTemperature), "OtherTemperature overrides get_logits"),
    "half precision": (lambda: build().half(), "not float32"),
    "meta": (lambda: build().to("meta"), "on the meta device"),
    "another block": (lambda: with_block(lambda b: b.insert(1, nn.Identity())), "its block 1 is a Identity"),
    "dropout": (lambda: with_block(lambda b: setattr(b[0].ffn, "drop", nn.Dropout(0.1))), "has dropout"),
    "rates": (lambda: with_block(lambda b: setattr(b[1].drop_path, "drop_prob", 0.3)), "left out at another rate"),
    "more weights": (lambda: with_block(lambda b: b[0].register_buffer("more", torch.ones(1))), "published keys"),
    "no blocks": (lambda: with_block(lambda b: b.__delitem__(slice(0, 3))), "has no blocks"),
}


@pytest.mark.parametrize(("make", "text"), REFUSED.values(), ids=REFUSED)
def test_refusals(make, text):
    module = make()
    entry = swap(module)
    assert entry.status == "refused"
    assert text in entry.text
    assert "forward" not in module.__dict__
