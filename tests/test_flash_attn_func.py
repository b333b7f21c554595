"""`accelerate.flash_attn_func`: Infinity's vectors of integers against attention with the mask that they stand for."""

import pytest
import torch
from published_attention import mask_of

from unifiedar.accelerate import _flash_attention, flash_attn_func


def vectors(lengths, dtype=torch.int32, device="cpu"):
    """How many keys each query sees, and how many queries do not see each key."""
    ends = torch.tensor(lengths).cumsum(0)
    visible, invisible = (one.repeat_interleave(torch.tensor(lengths)) for one in (ends, ends - torch.tensor(lengths)))
    return visible.to(device, dtype), invisible.to(device, dtype)


def tensors(length, heads=2, device="cpu"):
    generator = torch.Generator().manual_seed(length)
    return [torch.randn(2, length, heads, 32, generator=generator).to(device).requires_grad_() for _ in "qkv"]


def masked(q, k, v, mask, scale):
    q, k, v = (x.transpose(1, 2) for x in (q, k, v))
    return torch.nn.functional.scaled_dot_product_attention(q, k, v, attn_mask=mask, scale=scale).transpose(1, 2)


@pytest.mark.parametrize("lengths", [[1], [40], [1, 4, 9, 16], [1] * 32, [3, 1, 1, 20]], ids=str)
@pytest.mark.parametrize("dtype", [torch.int32, torch.int64])
def test_vectors_stand_for_scales(device, lengths, dtype):
    inputs = tensors(sum(lengths), device=device)
    visible, invisible = vectors(lengths, dtype, device)
    got = flash_attn_func(
        *inputs, dropout_p=0, softmax_scale=1.0, VAR_visible_kvlen=visible, VAR_invisible_qlen=invisible
    )
    want = masked(*inputs, mask_of(lengths, device=device), 1.0)
    torch.testing.assert_close(got, want, rtol=1e-5, atol=1e-5)
    for one, other in zip(*(torch.autograd.grad(x.sin().sum(), inputs) for x in (got, want)), strict=True):
        torch.testing.assert_close(one, other, rtol=1e-5, atol=5e-5)
    named = flash_attn_func(
        *inputs, softmax_scale=1.0, Infinity_visible_kvlen=visible, Infinity_invisible_qlen=invisible
    )
    assert torch.equal(named, got)


def test_without_vectors_it_is_full_attention():
    q, k, v = tensors(20)
    want = masked(q, k, v, None, None)
    torch.testing.assert_close(flash_attn_func(q, k, v), want, rtol=0, atol=1e-5)
    torch.testing.assert_close(flash_attn_func(q[:, 12:], k, v), want[:, 12:], rtol=0, atol=1e-5)


def test_infinity_finds_it():
    assert any("Infinity" in name for name in flash_attn_func.__code__.co_varnames)


def test_a_vector_is_read_once_and_again_when_it_changes(monkeypatch):
    inputs = tensors(30)
    visible, _ = vectors([1, 4, 9, 16])
    first = flash_attn_func(*inputs, VAR_visible_kvlen=visible)
    kept = _flash_attention._last
    assert torch.equal(flash_attn_func(*inputs, VAR_visible_kvlen=visible), first)
    assert _flash_attention._last is kept
    visible.copy_(vectors([2, 28])[0])
    other = flash_attn_func(*inputs, VAR_visible_kvlen=visible)
    torch.testing.assert_close(other, masked(*inputs, mask_of([2, 28]), None), rtol=0, atol=1e-5)


def test_compiles_whole(fresh_compiler):
    inputs, (visible, _) = tensors(14), vectors([1, 4, 9])
    compiled = torch.compile(flash_attn_func, fullgraph=True, backend="aot_eager")
    got = compiled(*inputs, VAR_visible_kvlen=visible)
    torch.testing.assert_close(got, flash_attn_func(*inputs, VAR_visible_kvlen=visible))


@pytest.mark.gpu
def test_it_waits_for_nothing():
    inputs, (visible, _) = tensors(30, device="cuda"), vectors([1, 4, 9, 16], device="cuda")
    flash_attn_func(*inputs, VAR_visible_kvlen=visible)
    torch.cuda.set_sync_debug_mode("error")
    try:
        flash_attn_func(*inputs, VAR_visible_kvlen=visible.clone())
    finally:
        torch.cuda.set_sync_debug_mode("default")


X = torch.zeros(1, 5, 2, 32)
BAD = {
    "dropout": ({"dropout_p": 0.1}, ValueError, "dropout_p must be 0"),
    "both names": (
        {"VAR_visible_kvlen": torch.ones(5).int(), "Infinity_visible_kvlen": torch.ones(5).int()},
        ValueError,
        "got both",
    ),
    "floats": ({"VAR_visible_kvlen": torch.ones(5)}, TypeError, "VAR_visible_kvlen must be int32"),
    "too short": ({"VAR_visible_kvlen": torch.ones(4).int()}, ValueError, "must be \\(5,\\)"),
    "beyond the scale": ({"VAR_visible_kvlen": torch.tensor([1, 4, 4, 5, 5])}, ValueError, "must rise"),
    "falling": ({"VAR_visible_kvlen": torch.tensor([3, 3, 3, 2, 2])}, ValueError, "must rise"),
    "causal beyond 32": ({"length": 33}, ValueError, "at most 32"),
    "k of three dimensions": ({"k": X[0]}, ValueError, "k must be"),
}


@pytest.mark.parametrize("case", BAD.values(), ids=BAD)
def test_bad_input(case):
    settings, error, words = dict(case[0]), *case[1:]
    x, k = X, settings.pop("k", X)
    if "length" in settings:
        length = settings.pop("length")
        x = k = torch.zeros(1, length, 2, 32)
        settings["VAR_visible_kvlen"] = torch.arange(1, length + 1)
    with pytest.raises(error, match=f"^flash_attn_func: .*{words}"):
        flash_attn_func(x, k, x, **settings)
