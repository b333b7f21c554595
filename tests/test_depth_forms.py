"""Depth transformers of other forms: cached decoding against the teacher-forced forward, gradients, what is refused."""

import pytest
import torch

from unifiedar.nn import DepthStyle, DepthTransformer
from unifiedar.ops import DepthForm, depth_decode
from unifiedar.ops.depth import _flatten, _unfit_form, _unflatten, depth_block, depth_pack, depth_rope

DEPTH, CODES, DIM, HIDDEN, WIDTH = 4, 37, 48, 24, 20

STYLES = {
    "rms, no biases": DepthStyle(norm="rms", bias=False, input_bias=False),
    "LayerNorm without biases, tanh-GELU": DepthStyle(bias=False, activation="gelu_tanh", eps=1e-3),
    "SiLU gate, narrow": DepthStyle(activation="silu", gated=True, mlp_dim=40),
    "gate with biases": DepthStyle(gated=True),
    "grouped queries": DepthStyle(kv_heads=2),
    "one kv head, wide heads": DepthStyle(kv_heads=1, head_dim=20),
    "rotary": DepthStyle(rope=50.0, learned_positions=False),
    "rotary, with norms of queries and keys": DepthStyle(rope=50.0, qk_norm=True, norm="rms"),
    "norms of queries and keys alone": DepthStyle(qk_norm=True, kv_heads=2),
    "last code": DepthStyle(last_code=True),
    "state at every depth": DepthStyle(state="every"),
    "state before": DepthStyle(state="before", rope=50.0),
    "state before, last code": DepthStyle(state="before", last_code=True),
    "weights for each depth": DepthStyle(
        codes_per_depth=True, blocks_per_depth=True, heads_per_depth=True, final_norm="per_depth", gated=True
    ),
    "weights for each token, state before": DepthStyle(
        state="before", codes_per_depth=True, blocks_per_depth=True, heads_per_depth=True
    ),
    "weights for some depths": DepthStyle(
        state="every", states_per_depth=True, blocks_per_depth=True, order=(0, 1, 1, 2), bias=False
    ),
    "no norm before the head": DepthStyle(final_norm="none"),
    "a norm of its own for each depth, without biases": DepthStyle(norm="rms", final_norm="per_depth"),
}


def built(style: DepthStyle, projected: bool = True, depth: int = DEPTH, layers: int = 2) -> DepthTransformer:
    torch.manual_seed(0)
    widths = (HIDDEN, WIDTH) if projected else (None, None)
    module = DepthTransformer(*widths, DIM, layers, 4, depth, CODES, style=style).double().eval()
    with torch.no_grad():
        for name, parameter in module.named_parameters():
            if "norm" in name or ".ln" in name:
                parameter.add_(torch.randn_like(parameter), alpha=0.2)
            elif parameter.ndim > 1 and "pos" not in name:
                parameter.normal_(std=1.5 / parameter.shape[-1] ** 0.5)
            else:
                parameter.normal_(std=0.3)
    return module


def inputs(module: DepthTransformer, rows: int, shared: bool = False):
    weights = module.weights()
    hidden = torch.randn(rows, DIM if weights.hidden is None else HIDDEN, dtype=torch.float64)
    width = DIM if weights.code is None else WIDTH
    codebook = torch.randn(*(() if shared else (module.depth,)), CODES, width, dtype=torch.float64)
    start = None if module.form.state == "first" else torch.randn(rows, width, dtype=torch.float64)
    return hidden, codebook, start


@pytest.mark.parametrize("guidance", [None, 2.5])
@pytest.mark.parametrize("style", STYLES.values(), ids=STYLES)
def test_logits_equal_teacher_forced_ones(style, guidance):
    """A step at a time with a cache, against all depths at once; guided rows share codes, not states."""
    module = built(style)
    hidden, codebook, start = inputs(module, 6)
    found = module.decode(hidden, codebook, guidance=guidance, start=start, top_k=20, return_logits=True)
    codes = torch.cat([found.codes] * (6 // len(found.codes)))
    sums = module.running_sums(codes, codebook)
    torch.testing.assert_close(found.logits, module(hidden, sums, start), rtol=0, atol=1e-11)
    want = sum(codebook[d][found.codes[:, d]] for d in range(DEPTH))
    torch.testing.assert_close(found.total, want, rtol=0, atol=1e-12)


@pytest.mark.parametrize("style", STYLES.values(), ids=STYLES)
def test_each_part_of_the_style_counts(style):
    """No setting is without effect: the plain transformer with the same parameters, where it can have them, differs."""
    module, plain = built(style), DepthStyle()
    hidden, codebook, start = inputs(module, 3)
    codes = torch.randint(CODES, (3, DEPTH))
    want = module(hidden, module.running_sums(codes, codebook), start)
    weights = module.weights()
    for name in ("norm", "eps", "activation", "rope", "last"):
        form = weights.form._replace(**{name: getattr(plain.form(0), name)})
        if form == weights.form:
            continue
        other = depth_decode(
            hidden, codebook, weights._replace(form=form), start=start, forced=codes, return_logits=True
        )
        assert (other.logits - want).abs().max() > 1e-6, name


@pytest.mark.parametrize("style", STYLES.values(), ids=STYLES)
def test_every_parameter_decides(style):
    """Each gets a gradient from the logits, in every set of it."""
    module = built(style).train()
    hidden, codebook, start = inputs(module, 3)
    codes = torch.randint(CODES, (3, DEPTH))
    module(hidden, module.running_sums(codes, codebook), start).square().sum().backward()
    for name, parameter in module.named_parameters():
        if name.endswith("attn.key.bias") and not module.form.rope:
            continue  # the same is added to all scores of a query (with a norm or turned it is not, then it counts)
        several = parameter.ndim == 3 or (parameter.ndim == 2 and name.endswith(("bias", "layer_norm.weight")))
        sets = parameter.grad.flatten(1) if several else parameter.grad.flatten()[None]
        # The first token sees itself alone, whatever its query; before the codes the last block has no use for it.
        if several and ("attn.query" in name or (module.form.state == "before" and "blocks.1" in name)):
            sets = sets[1:]
        assert (sets.abs().amax(1) > 1e-9).all(), name


def test_parts_of_the_last_code_are_not_summed():
    module = built(DepthStyle(last_code=True))
    codes, codebook = torch.randint(CODES, (2, 3, DEPTH)), torch.randn(DEPTH, CODES, WIDTH)
    got = module.running_sums(codes, codebook)
    assert torch.equal(got, torch.stack([codebook[d][codes[..., d]] for d in range(DEPTH)], -2))
    assert torch.equal(module.running_sums(codes, codebook[0])[..., 1, :], codebook[0][codes[..., 1]])


def test_as_wide_as_the_stack():
    module = built(DepthStyle(state="before", last_code=True), projected=False)
    assert not any(name.startswith("in_mlp") for name, _ in module.named_parameters())
    hidden, codebook, start = inputs(module, 2, shared=True)
    found = module.decode(hidden, codebook, start=start, temperature=0, return_logits=True)
    want = module(hidden, module.running_sums(found.codes, codebook), start)
    torch.testing.assert_close(found.logits, want, rtol=0, atol=1e-11)


def test_one_depth_and_no_layer():
    for style in (DepthStyle(state="before"), DepthStyle(rope=10.0), DepthStyle(state="every")):
        module = built(style, depth=1, layers=0)
        hidden, codebook, start = inputs(module, 3)
        found = module.decode(hidden, codebook, start=start, return_logits=True)
        want = module(hidden, module.running_sums(found.codes, codebook), start)
        torch.testing.assert_close(found.logits, want, rtol=0, atol=1e-11)


def test_rotary_positions_are_relative():
    """Scores turned by the places of query and key depend on their distance: a stack may begin anywhere."""
    stack = built(DepthStyle(rope=100.0, learned_positions=False)).head_transformer
    x = torch.randn(2, 3, DIM, dtype=torch.float64)
    want = stack(x)
    shifted = _shifted(stack, x, 5)
    torch.testing.assert_close(shifted, want, rtol=0, atol=1e-11)


def _shifted(stack, x, begin):
    """The stack over x as tokens begin, begin + 1, ..., none before them."""
    for block in stack.blocks:
        weights = block.weights()
        rope = depth_rope(x, weights, stack.num_heads, stack.form, begin, x.shape[1])
        x = depth_block(x, weights, stack.num_heads, None, 0, 0.0, stack.form, rope)
    return x


def test_the_operator_is_well_defined():
    module = built(STYLES["weights for some depths"])
    hidden, codebook, start = inputs(module, 2)
    form = DepthForm(*module.form)
    lists = ([1.0] * DEPTH, [5] * DEPTH, [0.0] * DEPTH, torch.ones(2, DEPTH, CODES, dtype=torch.float64))
    arguments = (hidden, codebook, _flatten(module.weights()), None, 4, None, None, *lists, None, True, start, *form)
    with torch.no_grad():
        torch.library.opcheck(torch.ops.unifiedar.depth_decode.default, arguments)


@pytest.mark.parametrize("style", STYLES.values(), ids=STYLES)
def test_weights_come_back_as_they_went(style):
    weights = built(style).weights()
    again = _unflatten(_flatten(weights), weights.num_heads, weights.form)
    assert [id(t) for t in _flatten(again)] == [id(t) for t in _flatten(weights)]
    assert again.depth == weights.depth == DEPTH


FULLEST = DepthStyle(
    norm="rms", activation="silu", gated=True, kv_heads=2, qk_norm=True, learned_positions=False, rope=100.0,
    state="every", last_code=True, states_per_depth=True, blocks_per_depth=True, heads_per_depth=True,
    order=(0, 1, 1, 0), final_norm="per_depth",
)  # fmt: skip


def test_forward_and_decode_are_one_graph(fresh_compiler):
    module = built(FULLEST)
    hidden, codebook, start = inputs(module, 2)
    codes = torch.randint(CODES, (2, DEPTH))
    sums = module.running_sums(codes, codebook)
    whole = torch.compile(module, fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(whole(hidden, sums, start), module(hidden, sums, start), rtol=0, atol=1e-12)
    weights = module.weights()

    @torch.compile(fullgraph=True, backend="aot_eager")
    def call(hidden, start):
        with torch.no_grad():
            return depth_decode(hidden, codebook, weights, start=start, forced=codes, return_logits=True).logits

    torch.testing.assert_close(call(hidden, start), module(hidden, sums, start), rtol=0, atol=1e-12)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize(
    "style", [FULLEST, DepthStyle(state="before", rope=10.0, norm="rms")], ids=["fullest", "before"]
)
def test_half_precision(style, dtype, device):
    """As near to float64 as the teacher-forced forward in the same dtype."""
    module = built(style).to(device)
    hidden, codebook, start = (x.to(device, dtype).double() for x in inputs(module, 16))
    module.to(dtype).double()
    codes = torch.randint(CODES, (16, DEPTH), device=device)
    exact = module(hidden, module.running_sums(codes, codebook), start)
    module.to(dtype)
    hidden, codebook, start = (x.to(dtype) for x in (hidden, codebook, start))
    forced = module(hidden, module.running_sums(codes, codebook, exact_reference_rounding=True), start)
    logits = module.decode(hidden, codebook, start=start, forced=codes, return_logits=True).logits
    assert logits.dtype == dtype
    error, allowed = ((one.double() - exact).square().mean().sqrt() for one in (logits, forced))
    assert error <= 1.5 * allowed


# ---- what the kernel does not take


@pytest.mark.parametrize(
    ("style", "reason"),
    [
        (DepthStyle(norm="rms"), "needs LayerNorm, got 'rms'"),
        (DepthStyle(eps=1e-6), "needs an eps of 1e-5, got 1e-06"),
        (DepthStyle(activation="gelu_tanh"), "exact GELU without a gate, got 'gelu_tanh'"),
        (DepthStyle(gated=True), "exact GELU without a gate"),
        (DepthStyle(state="every"), "the hidden state at the first depth alone, got 'every'"),
        (DepthStyle(last_code=True), "needs the running sum"),
        (DepthStyle(rope=10.0), "learned positions and no others"),
        (DepthStyle(learned_positions=False), "learned positions and no others"),
        (DepthStyle(kv_heads=2), "keys and values for each of 4 heads, got 2"),
        (DepthStyle(qk_norm=True), "queries and keys as they are"),
        (DepthStyle(final_norm="none"), "a norm before the head"),
        (DepthStyle(bias=False), "needs biases"),
        (DepthStyle(input_bias=False), "needs biases"),
        (DepthStyle(heads_per_depth=True), "the same weights at all depths"),
        (DepthStyle(final_norm="per_depth"), "the same weights at all depths"),
        (DepthStyle(blocks_per_depth=True), "the same weights at all depths"),
        (DepthStyle(codes_per_depth=True), "the same weights at all depths"),
        (DepthStyle(mlp_dim=100), "an MLP 4 times as wide"),
        (DepthStyle(head_dim=8), "heads that are 48 wide together"),
    ],
)
def test_the_kernel_names_what_it_does_not_take(style, reason):
    weights = built(style).weights()
    assert reason in _unfit_form(weights)
    with pytest.raises(ValueError, match=r"depth_pack: weights must be of a form that the CUDA kernel takes"):
        depth_pack(built(style).bfloat16().weights())


def test_the_kernel_takes_the_plain_form():
    assert _unfit_form(built(DepthStyle()).weights()) is None
    assert _unfit_form(built(DepthStyle(head_dim=12, kv_heads=4, mlp_dim=4 * DIM)).weights()) is None


# ---- bad input


@pytest.mark.parametrize(
    ("style", "text"),
    [
        (DepthStyle(norm="batch"), "style.norm must be one of layer, rms, got 'batch'"),
        (DepthStyle(activation="relu"), "style.activation must be one of"),
        (DepthStyle(state="last"), "style.state must be one of first, every, before"),
        (DepthStyle(final_norm="some"), "style.final_norm must be one of"),
        (DepthStyle(kv_heads=3), "style.kv_heads must divide num_heads 4, got 3"),
        (DepthStyle(rope=10.0, head_dim=7), "heads must be of even width"),
        (DepthStyle(states_per_depth=True), "enters at every depth, got state 'first'"),
        (DepthStyle(order=(0, 0, 1, 1)), "style.order needs weights for each depth"),
        (DepthStyle(order=(0, 0, 1), blocks_per_depth=True), "style.order must have 4 entries"),
        (DepthStyle(order=(0, 0, 2, 2), blocks_per_depth=True), "that use every set"),
    ],
)
def test_bad_styles(style, text):
    with pytest.raises(ValueError, match=text):
        built(style)


@pytest.mark.parametrize(
    ("change", "error", "text"),
    [
        ({"start": None}, ValueError, "start must be given where the hidden state enters 'every', got None"),
        ({"start": torch.zeros(2, 19).double()}, ValueError, r"start must be \(2, 20\), got \(2, 19\)"),
        ({"start": torch.zeros(2, 20)}, TypeError, "start must be float64"),
        ({"codebook": torch.zeros(4, 36, 20).double()}, ValueError, r"codebook must be \(37, 20\) or \(4, 37, 20\)"),
        ({"form": {"norm": "batch"}}, ValueError, "form.norm must be one of layer, rms"),
        ({"form": {"state": "never"}}, ValueError, "form.state must be one of"),
        ({"form": {"order": (0, 1)}}, ValueError, "form.order must have 4 entries, got 2"),
        ({"form": {"order": (0, 1, 1, 1)}}, ValueError, "weights.hidden must have 2 sets, got 3"),
        ({"form": {"depth": 3}}, ValueError, "a position for each token, got 3, 4"),
        ({"form": {"kv_heads": 3}}, ValueError, "heads that divide"),
        ({"form": {"state": "first"}}, ValueError, "start must be None|must have 0 sets"),
    ],
)
def test_bad_input(change, error, text):
    module = built(STYLES["weights for some depths"])
    hidden, codebook, start = inputs(module, 2)
    weights = module.weights()
    weights = weights._replace(form=weights.form._replace(**change.pop("form", {})))
    arguments = {"hidden": hidden, "codebook": codebook, "start": start} | change
    with pytest.raises(error, match=text):
        depth_decode(weights=weights, **arguments)


def test_start_belongs_to_some_forms():
    module = built(DepthStyle())
    hidden, codebook, _ = inputs(module, 2)
    start = torch.zeros(2, WIDTH, dtype=torch.float64)
    with pytest.raises(ValueError, match="start must be None where the hidden state enters first"):
        module.decode(hidden, codebook, start=start)
    sums = module.running_sums(torch.zeros(2, DEPTH, dtype=torch.int64), codebook)
    with pytest.raises(ValueError, match="start must be given unless the state enters first, got a tensor"):
        module(hidden, sums, start)
    with pytest.raises(ValueError, match="start must be given unless the state enters first, got None"):
        built(DepthStyle(state="every"))(hidden, sums)


def test_weights_without_a_depth():
    module = built(DepthStyle(learned_positions=False))
    hidden, codebook, _ = inputs(module, 2)
    weights = module.weights()
    weights = weights._replace(form=weights.form._replace(depth=0))
    with pytest.raises(ValueError, match="must have a depth, and a position for each token, got 0, none"):
        depth_decode(hidden, codebook, weights)
