"""Speech models' code predictors against their published formulas, written out on the checkpoint's tensors."""

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from unifiedar.models import CodePredictor, moshi_depformer, qwen3_tts_predictor

HEADS, DIM, HIDDEN, CARD = 4, 32, 48, 23


def drawn(*shape: int) -> Tensor:
    return torch.randn(*shape, dtype=torch.float64) / shape[-1] ** 0.5


def rms(x: Tensor, gain: Tensor, eps: float) -> Tensor:
    return x / (x.square().mean(-1, keepdim=True) + eps).sqrt() * gain.flatten()


def attend(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """Causal softmax attention of (rows, T, heads, head_dim), keys and values repeated for the queries they serve."""
    k, v = (x.repeat_interleave(q.shape[2] // k.shape[2], 2) for x in (k, v))
    scores = torch.einsum("nqhd,nkhd->nhqk", q, k) * q.shape[-1] ** -0.5
    future = torch.ones(scores.shape[-2:]).triu(1).bool()
    return torch.einsum("nhqk,nkhd->nqhd", scores.masked_fill(future, -torch.inf).softmax(-1), v).flatten(2)


def check_decoding(predictor: CodePredictor, hidden: Tensor, start: Tensor, logits_of) -> None:
    """Drawn codes, the logits they were drawn from, and the teacher-forced ones are those of the formula."""
    module, codebook, _ = predictor
    depth, num_codes = module.depth, module.num_codes
    noise = torch.empty(len(hidden), depth, num_codes, dtype=torch.float64).exponential_()
    found = module.decode(hidden, codebook, start=start, noise=noise, return_logits=True)
    want = logits_of(found.codes)
    torch.testing.assert_close(found.logits, want, rtol=0, atol=1e-10)
    assert torch.equal(found.codes, (want.softmax(-1) / noise).argmax(-1))
    assert len(set(found.codes.flatten().tolist())) > 5
    forced = module(hidden, module.running_sums(found.codes, codebook), start)
    torch.testing.assert_close(forced, want, rtol=0, atol=1e-10)


# ---- Moshi


def moshi_weights(
    depth: int, order: tuple[int, ...] = (), low_rank: int | None = None, norms: bool = False, split: bool = False
) -> dict[str, Tensor]:
    sets, inner, layers, width = max(order, default=depth - 1) + 1, 40, 2, low_rank or DIM
    found = {"depformer_text_emb.weight": drawn(12, width), "text_linear.weight": drawn(11, HIDDEN)}
    for d in range(depth):
        found[f"linears.{d}.weight"] = 4 * drawn(CARD, DIM)
        if norms:
            found[f"depformer_norms.{d}.alpha"] = 1 + 0.2 * torch.randn(1, 1, DIM, dtype=torch.float64)
        if d + 1 < depth:
            found[f"depformer_emb.{d}.weight"] = 3 * drawn(CARD + 1, width)
    if low_rank:
        for name in ["text_emb", *(f"emb.{d}" for d in range(depth - 1))]:
            found[f"depformer_{name}.low_rank.weight"] = drawn(DIM, low_rank)
    for s in range(sets):
        found[f"depformer_in.{s}.weight"] = drawn(DIM, HIDDEN)
    for i in range(layers):
        at = f"depformer.layers.{i}"
        for name in ("norm1", "norm2"):
            found[f"{at}.{name}.alpha"] = 1 + 0.2 * torch.randn(1, 1, DIM, dtype=torch.float64)
        qkv, proj = drawn(sets, 3 * DIM, DIM), drawn(sets, DIM, DIM)
        if split:
            found |= {f"{at}.self_attn.in_projs.{s}.weight": qkv[s] for s in range(sets)}
            found |= {f"{at}.self_attn.out_projs.{s}.weight": proj[s] for s in range(sets)}
        else:
            found[f"{at}.self_attn.in_proj_weight"] = qkv.flatten(0, 1)
            found[f"{at}.self_attn.out_proj.weight"] = proj.flatten(0, 1)
        for s in range(sets):
            found[f"{at}.gating.{s}.linear_in.weight"] = drawn(2 * inner, DIM)
            found[f"{at}.gating.{s}.linear_out.weight"] = drawn(DIM, inner)
    return found


def moshi_logits(weights: dict[str, Tensor], order: tuple[int, ...], hidden: Tensor, text: Tensor, codes: Tensor):
    """(N, D, K) logits of each code given text token, state and the codes before it."""
    depth = codes.shape[1]
    sets = order or tuple(range(depth))

    def embedded(name: str, ids: Tensor) -> Tensor:
        rows = weights[f"{name}.weight"][ids]
        low = weights.get(f"{name}.low_rank.weight")
        return rows if low is None else rows @ low.T

    def attention(name: str, s: int, rows: int) -> Tensor:
        stacked = weights.get(f"{name}_proj_weight", weights.get(f"{name}_proj.weight"))
        return weights[f"{name}_projs.{s}.weight"] if stacked is None else stacked[s * rows : (s + 1) * rows]

    x = torch.stack(
        [
            hidden @ weights[f"depformer_in.{s}.weight"].T
            + (embedded("depformer_text_emb", text) if d == 0 else embedded(f"depformer_emb.{d - 1}", codes[:, d - 1]))
            for d, s in enumerate(sets)
        ],
        1,
    )
    for i in range(2):
        at = f"depformer.layers.{i}"
        y = rms(x, weights[f"{at}.norm1.alpha"], 1e-8)
        qkv = torch.stack([y[:, d] @ attention(f"{at}.self_attn.in", s, 3 * DIM).T for d, s in enumerate(sets)], 1)
        y = attend(*(part.unflatten(-1, (HEADS, -1)) for part in qkv.chunk(3, -1)))
        x = x + torch.stack([y[:, d] @ attention(f"{at}.self_attn.out", s, DIM).T for d, s in enumerate(sets)], 1)
        y = rms(x, weights[f"{at}.norm2.alpha"], 1e-8)
        out = []
        for d, s in enumerate(sets):
            gate, up = (y[:, d] @ weights[f"{at}.gating.{s}.linear_in.weight"].T).chunk(2, -1)
            out.append((F.silu(gate) * up) @ weights[f"{at}.gating.{s}.linear_out.weight"].T)
        x = x + torch.stack(out, 1)
    logits = []
    for d in range(depth):
        gain = weights.get(f"depformer_norms.{d}.alpha")
        y = x[:, d] if gain is None else rms(x[:, d], gain, 1e-8)
        logits.append(y @ weights[f"linears.{d}.weight"].T)
    return torch.stack(logits, 1)


@pytest.mark.parametrize(
    "options",
    [
        pytest.param({}, id="7b"),
        pytest.param({"split": True, "norms": True}, id="split, with norms"),
        pytest.param({"order": (0, 1, 2, 2, 2, 3)}, id="depths that share weights"),
        pytest.param({"low_rank": 10}, id="low-rank embeddings"),
    ],
)
def test_moshi_is_its_formula(options):
    torch.manual_seed(0)
    depth, order = 6, options.get("order", ())
    weights = moshi_weights(depth, **options)
    predictor = moshi_depformer(weights, num_heads=HEADS, order=order)
    hidden, text = torch.randn(5, HIDDEN, dtype=torch.float64), torch.randint(12, (5,))
    assert predictor.codebook.shape[:2] == (depth, CARD + 1)
    assert not predictor.codebook[-1].any()
    check_decoding(
        predictor, hidden, predictor.start[text], lambda codes: moshi_logits(weights, order, hidden, text, codes)
    )


def test_moshi_goes_through_its_initial_token():
    """Code K is the one before a stream begins: it may be forced, and -1 adds nothing."""
    torch.manual_seed(1)
    weights = moshi_weights(4)
    module, codebook, start = moshi_depformer(weights, num_heads=HEADS)
    hidden, text = torch.randn(3, HIDDEN, dtype=torch.float64), torch.tensor([11, 0, 3])
    forced = torch.tensor([[CARD, CARD, 1, 2], [0, 1, 2, 3], [5, 5, 5, 5]])
    found = module.decode(hidden, codebook, start=start[text], forced=forced, return_logits=True)
    torch.testing.assert_close(found.logits, moshi_logits(weights, (), hidden, text, forced), rtol=0, atol=1e-10)
    nothing = module.decode(hidden, codebook, start=start[text], forced=torch.full_like(forced, -1), return_logits=True)
    zeroed = weights | {f"depformer_emb.{d}.weight": torch.zeros(CARD + 1, DIM).double() for d in range(3)}
    torch.testing.assert_close(nothing.logits, moshi_logits(zeroed, (), hidden, text, forced), rtol=0, atol=1e-10)


def test_moshi_has_the_published_size():
    """depformer_dim 1024, 6 layers, 8 codes, inner width 2816: parameters by the formula's own count."""
    depth, dim, hidden, inner, card = 8, 1024, 4096, 2816, 2048
    with torch.device("meta"):
        weights = {"depformer_text_emb.weight": torch.empty(32001, dim)}
        for d in range(depth):
            weights |= {
                f"linears.{d}.weight": torch.empty(card, dim),
                f"depformer_in.{d}.weight": torch.empty(dim, hidden),
            }
            weights |= {f"depformer_emb.{d}.weight": torch.empty(card + 1, dim)} if d < depth - 1 else {}
        for i in range(6):
            at = f"depformer.layers.{i}"
            weights |= {f"{at}.norm{n}.alpha": torch.empty(1, 1, dim) for n in (1, 2)}
            weights[f"{at}.self_attn.in_proj_weight"] = torch.empty(depth * 3 * dim, dim)
            weights[f"{at}.self_attn.out_proj.weight"] = torch.empty(depth * dim, dim)
            for d in range(depth):
                weights[f"{at}.gating.{d}.linear_in.weight"] = torch.empty(2 * inner, dim)
                weights[f"{at}.gating.{d}.linear_out.weight"] = torch.empty(dim, inner)
    module = moshi_depformer(weights, num_heads=16).module
    each = hidden * dim + card * dim + 6 * (4 * dim * dim + 3 * inner * dim)
    assert sum(p.numel() for p in module.parameters()) == depth * each + 6 * 2 * dim


@pytest.mark.parametrize(
    ("change", "text"),
    [
        ({"depformer_emb.1.weight": None}, "must have 'depformer_emb.1.weight', got none"),
        ({"linears.0.weight": None}, "must have 'linears.0.weight', got none"),
        ({"linears.2.weight": drawn(5, DIM)}, "one shape for all 'linears"),
        ({"depformer_text_emb.out1.weight": drawn(DIM, DIM)}, "plain or low-rank embeddings"),
        ({"depformer.layers.1.gating.2.linear_in.weight": None}, "must have 'depformer.layers.1.gating.2"),
        ({"depformer.layers.0.self_attn.out_proj.weight": drawn(3 * DIM, DIM)}, "each of 4 sets"),
    ],
)
def test_moshi_weights_that_are_not(change, text):
    weights = {key: value for key, value in (moshi_weights(4) | change).items() if value is not None}
    with pytest.raises(ValueError, match=text):
        moshi_depformer(weights, num_heads=HEADS)


# ---- Qwen3-TTS


def qwen_weights(layers: int, depth: int, talker: int, kv_heads: int, head_dim: int, prefix: str) -> dict[str, Tensor]:
    inner, found = 72, {"model.norm.weight": 1 + 0.2 * torch.randn(DIM, dtype=torch.float64)}
    for d in range(depth):
        found[f"lm_head.{d}.weight"] = 4 * drawn(CARD, DIM)
        found[f"model.codec_embedding.{d}.weight"] = 3 * drawn(CARD, talker)
    if talker != DIM:
        found["small_to_mtp_projection.weight"] = drawn(DIM, talker)
        found["small_to_mtp_projection.bias"] = torch.randn(DIM, dtype=torch.float64)
    for i in range(layers):
        at = f"model.layers.{i}"
        for name, size in (
            ("input_layernorm", DIM),
            ("post_attention_layernorm", DIM),
            ("self_attn.q_norm", head_dim),
            ("self_attn.k_norm", head_dim),
        ):
            found[f"{at}.{name}.weight"] = 1 + 0.3 * torch.randn(size, dtype=torch.float64)
        for name, out, into in (
            ("self_attn.q_proj", HEADS * head_dim, DIM),
            ("self_attn.k_proj", kv_heads * head_dim, DIM),
            ("self_attn.v_proj", kv_heads * head_dim, DIM),
            ("self_attn.o_proj", DIM, HEADS * head_dim),
            ("mlp.gate_proj", inner, DIM),
            ("mlp.up_proj", inner, DIM),
            ("mlp.down_proj", DIM, inner),
        ):
            found[f"{at}.{name}.weight"] = drawn(out, into)
    return {prefix + key: value for key, value in found.items()}


def qwen_logits(weights: dict[str, Tensor], base: float, hidden: Tensor, start: Tensor, codes: Tensor) -> Tensor:
    """(N, D, K) logits of codes 1, 2, ... given the talker's state, the embedding of code 0 and the codes before."""
    depth = codes.shape[1]
    entered = [weights[f"model.codec_embedding.{d}.weight"][codes[:, d]] for d in range(depth - 1)]
    x = torch.stack([hidden, start, *entered], 1)
    if "small_to_mtp_projection.weight" in weights:
        x = F.linear(x, weights["small_to_mtp_projection.weight"], weights["small_to_mtp_projection.bias"])
    head_dim = len(weights["model.layers.0.self_attn.q_norm.weight"])
    angle = torch.arange(depth + 1)[:, None] / base ** (torch.arange(0, head_dim, 2, dtype=torch.float64) / head_dim)
    cosine, sine = angle.cos()[:, None], angle.sin()[:, None]

    def turned(y: Tensor) -> Tensor:
        low, high = y.chunk(2, -1)
        return torch.cat([low * cosine - high * sine, high * cosine + low * sine], -1)

    for i in range(5):
        of = {key.removeprefix(f"model.layers.{i}."): value for key, value in weights.items()}
        y = rms(x, of["input_layernorm.weight"], 1e-6)
        q, k, v = ((y @ of[f"self_attn.{n}_proj.weight"].T).unflatten(-1, (-1, head_dim)) for n in "qkv")
        q, k = (turned(rms(y, of[f"self_attn.{n}_norm.weight"], 1e-6)) for n, y in (("q", q), ("k", k)))
        x = x + attend(q, k, v) @ of["self_attn.o_proj.weight"].T
        y = rms(x, of["post_attention_layernorm.weight"], 1e-6)
        inner = F.silu(y @ of["mlp.gate_proj.weight"].T) * (y @ of["mlp.up_proj.weight"].T)
        x = x + inner @ of["mlp.down_proj.weight"].T
    x = rms(x, weights["model.norm.weight"], 1e-6)
    return torch.stack([x[:, d + 1] @ weights[f"lm_head.{d}.weight"].T for d in range(depth)], 1)


@pytest.mark.parametrize(
    ("talker", "kv_heads", "head_dim"),
    [
        pytest.param(DIM, 2, 16, id="0.6b"),
        pytest.param(56, 2, 16, id="1.7b"),
        pytest.param(DIM, 1, 6, id="one kv head"),
    ],
)
def test_qwen3_tts_is_its_formula(talker, kv_heads, head_dim):
    """Five layers and 15 codes, as published; heads wider than their share of the width."""
    torch.manual_seed(0)
    weights = qwen_weights(5, 15, talker, kv_heads, head_dim, "")
    predictor = qwen3_tts_predictor(weights, rope_base=100.0, prefix="")
    hidden, start = (torch.randn(4, talker, dtype=torch.float64) for _ in range(2))
    check_decoding(predictor, hidden, start, lambda codes: qwen_logits(weights, 100.0, hidden, start, codes))
    prefixed = {f"talker.code_predictor.{key}": value for key, value in weights.items()}
    again = qwen3_tts_predictor(prefixed, rope_base=100.0).module.state_dict()
    assert all(torch.equal(value, again[key]) for key, value in predictor.module.state_dict().items())


def test_qwen3_tts_sums_the_embeddings_for_the_talker():
    torch.manual_seed(0)
    module, codebook, _ = qwen3_tts_predictor(qwen_weights(5, 15, DIM, 2, 16, ""), prefix="")
    found = module.decode(drawn(2, DIM), codebook, start=drawn(2, DIM), temperature=0.9, top_k=5)
    want = sum(codebook[d][found.codes[:, d]] for d in range(15))
    torch.testing.assert_close(found.total, want, rtol=0, atol=1e-12)


def test_qwen3_tts_weights_that_are_not():
    weights = qwen_weights(5, 15, DIM, 2, 16, "")
    del weights["model.layers.3.self_attn.k_norm.weight"]
    with pytest.raises(ValueError, match=r"must have 'model.layers.3.self_attn.k_norm.weight', got none"):
        qwen3_tts_predictor(weights, prefix="")
    with pytest.raises(ValueError, match=r"'talker.code_predictor.lm_head.0.weight', got none"):
        qwen3_tts_predictor(weights)
