"""Code predictors of speech models as depth transformers: Moshi's depformer and Qwen3-TTS's.

Both emit the codes of one audio frame from the state of a larger model, which is not part of this package. Moshi:
Defossez et al., "Moshi: a speech-text foundation model for real-time dialogue" (arXiv:2410.00037), section 3.4.1.
"""

from collections.abc import Mapping, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from unifiedar.nn import DepthStyle, DepthTransformer

__all__ = ["CodePredictor", "moshi_depformer", "qwen3_tts_predictor"]


class CodePredictor(NamedTuple):
    """A code predictor out of a checkpoint; `module.decode(hidden, codebook, start=...)` emits a frame's codes.

    Fields:
        module: the depth transformer, in eval mode.
        codebook: (D, rows, C), embeddings of the codes; rows beyond the module's K are those of special tokens.
        start: (rows, C), embeddings of the token before the first code, whose row is the `start` that the module takes
            (a zero row for a token of -1); None if the larger model has them.
    """

    module: DepthTransformer
    codebook: Tensor
    start: Tensor | None


class _Weights:
    """Tensors of a checkpoint by name, below a prefix."""

    def __init__(self, function: str, weights: Mapping[str, Tensor], prefix: str):
        self.function, self.weights, self.prefix = function, weights, prefix

    def __contains__(self, key: str) -> bool:
        return self.prefix + key in self.weights

    def __getitem__(self, key: str) -> Tensor:
        if key not in self:
            raise ValueError(f"{self.function}: weights must have {self.prefix + key!r}, got none of that name")
        return self.weights[self.prefix + key]

    def count(self, pattern: str) -> int:
        """How many of pattern.format(0), pattern.format(1), ... there are."""
        count = 0
        while pattern.format(count) in self:
            count += 1
        return count

    def stack(self, pattern: str, count: int) -> Tensor:
        """The tensors pattern.format(0 .. count - 1), one after another."""
        tensors = [self[pattern.format(i)] for i in range(count)]
        shapes = {tuple(tensor.shape) for tensor in tensors}
        if len(shapes) != 1:
            raise ValueError(f"{self.function}: weights must have one shape for all {pattern!r}, got {sorted(shapes)}")
        return torch.stack(tensors)


def _filled(module: DepthTransformer, state: dict[str, Tensor]) -> DepthTransformer:
    module.load_state_dict(state, assign=True)
    return module.eval()


def moshi_depformer(
    weights: Mapping[str, Tensor],
    *,
    num_heads: int,
    order: Sequence[int] = (),
    eps: float = 1e-8,
    prefix: str = "",
) -> CodePredictor:
    """Moshi's depformer out of the tensors of a checkpoint of the whole model.

        x_d = in_d(hidden) + e_d, e_0 the text token's embedding, e_d that of code d - 1;  blocks with RMSNorm, no
        biases, no positions, SiLU-gated MLP;  attention and MLP have weights for each depth, or for each set of depths

    Args:
        weights: by published names: `depformer_in.*`, `depformer_emb.*`, `depformer_text_emb.*`, `depformer.layers.*`,
            `depformer_norms.*` if there are any, `linears.*`. Attention either as `in_proj_weight` and
            `out_proj.weight` (all sets in one, as the 7B checkpoints have it) or as `in_projs.*` and `out_projs.*`.
        num_heads: `depformer_num_heads` of the configuration, 16 at 7B.
        order: `depformer_weights_per_step_schedule`, if there is one.
        eps: of the norms: 1e-8 for `rms_norm_f32`, 1e-5 for `rms_norm`.
        prefix: what the names begin with.

    Returns:
        `CodePredictor`. The codebook's last table is zero, as no token is made of the last code; row K is the initial
        token's.

    Raises:
        ValueError: for a tensor that is missing, shapes that do not match, or embeddings of a second text stream or
            with a norm, which are not taken.
    """
    function = "moshi_depformer"
    got = _Weights(function, weights, prefix)
    depth, layers = got.count("linears.{}.weight"), got.count("depformer.layers.{}.norm1.alpha")
    head = got.stack("linears.{}.weight", depth) if depth else got["linears.0.weight"]
    for part in ("out1.weight", "norm.weight"):
        if f"depformer_text_emb.{part}" in got:
            raise ValueError(f"{function}: weights must have plain or low-rank embeddings, got {part!r}")
    num_codes, dim = head.shape[1:]
    start, books = got["depformer_text_emb.weight"], [got[f"depformer_emb.{d}.weight"] for d in range(depth - 1)]
    last = start.new_zeros(num_codes + 1, start.shape[1])
    states = got.count("depformer_in.{}.weight")
    first = got["depformer_in.0.weight"]
    sets = max(order) + 1 if order else depth
    state = {"classifier_mlp.linear.weight": head}
    state["in_mlp_2.weight"] = got.stack("depformer_in.{}.weight", states) if states > 1 else first
    low_rank = "depformer_text_emb.low_rank.weight" in got
    if low_rank:
        projections = [got["depformer_text_emb.low_rank.weight"]]
        projections += [got[f"depformer_emb.{d}.low_rank.weight"] for d in range(depth - 1)]
        state["in_mlp_1.weight"] = torch.stack(projections)
    norms = "depformer_norms.0.alpha" in got
    if norms:
        state["classifier_mlp.layer_norm.weight"] = got.stack("depformer_norms.{}.alpha", depth).view(depth, dim)
    kv_dim = inner = dim
    for i in range(layers):
        theirs, ours = f"depformer.layers.{i}", f"head_transformer.blocks.{i}"
        gate, up = got.stack(f"{theirs}.gating.{{}}.linear_in.weight", sets).chunk(2, dim=1)
        if f"{theirs}.self_attn.in_proj_weight" in got:
            qkv, proj = (got[f"{theirs}.self_attn.{name}"] for name in ("in_proj_weight", "out_proj.weight"))
            if len(proj) != sets * dim or len(qkv) % sets:
                raise ValueError(
                    f"{function}: weights must have attention for each of {sets} sets, {dim} wide, got "
                    f"{tuple(qkv.shape)} and {tuple(proj.shape)}"
                )
            qkv, proj = qkv.view(sets, -1, dim), proj.view(sets, dim, dim)
        else:
            qkv = got.stack(f"{theirs}.self_attn.in_projs.{{}}.weight", sets)
            proj = got.stack(f"{theirs}.self_attn.out_projs.{{}}.weight", sets)
        kv_dim = (qkv.shape[1] - dim) // 2
        query, key, value = (part.contiguous() for part in qkv.split([dim, kv_dim, kv_dim], dim=1))
        inner = up.shape[1]
        state |= {
            f"{ours}.ln1.weight": got[f"{theirs}.norm1.alpha"].flatten(),
            f"{ours}.ln2.weight": got[f"{theirs}.norm2.alpha"].flatten(),
            f"{ours}.attn.query.weight": query,
            f"{ours}.attn.key.weight": key,
            f"{ours}.attn.value.weight": value,
            f"{ours}.attn.proj.weight": proj,
            f"{ours}.gate.weight": gate.contiguous(),
            f"{ours}.mlp.0.weight": up.contiguous(),
            f"{ours}.mlp.2.weight": got.stack(f"{theirs}.gating.{{}}.linear_out.weight", sets),
        }
    style = DepthStyle(
        norm="rms",
        eps=eps,
        bias=False,
        input_bias=False,
        activation="silu",
        gated=True,
        mlp_dim=inner,
        kv_heads=num_heads * kv_dim // dim,
        learned_positions=False,
        state="every",
        last_code=True,
        states_per_depth=states > 1,
        codes_per_depth=low_rank,
        blocks_per_depth=True,
        heads_per_depth=True,
        order=tuple(order),
        final_norm="per_depth" if norms else "none",
    )
    with torch.device("meta"):
        module = DepthTransformer(
            first.shape[1], start.shape[1] if low_rank else None, dim, layers, num_heads, depth, num_codes, 0.0, style
        )
    return CodePredictor(_filled(module, state), torch.stack([*books, last]), start)


def _neighbours(weight: Tensor, head_dim: int) -> Tensor:
    """Outputs of each head reordered, so that channels i and i + head_dim / 2, which are turned together, meet."""
    return weight.unflatten(0, (-1, 2, head_dim // 2)).transpose(1, 2).reshape(weight.shape)


def qwen3_tts_predictor(
    weights: Mapping[str, Tensor], *, rope_base: float = 1e6, eps: float = 1e-6, prefix: str = "talker.code_predictor."
) -> CodePredictor:
    """Qwen3-TTS's code predictor: codes 1 to 15 of a frame from the talker's state and its code 0.

        tokens: hidden, embedding of code 0, embeddings of codes 1, 2, ... each projected;  blocks of Qwen3: RMSNorm, no
        biases, grouped queries with norms of queries and keys, rotary positions, SiLU-gated MLP;  a head for each code

    Args:
        weights: by published names: `model.codec_embedding.*`, `model.layers.*`, `model.norm.weight`, `lm_head.*`, and
            `small_to_mtp_projection.*` where the talker is wider.
        rope_base: `rope_theta` of the predictor's configuration.
        eps: `rms_norm_eps` of it.
        prefix: what the names begin with.

    Returns:
        `CodePredictor`; `start` is None, as embeddings of code 0 are the talker's.

    Raises:
        ValueError: for a tensor that is missing, or shapes that do not match.
    """
    got = _Weights("qwen3_tts_predictor", weights, prefix)
    depth, layers = got.count("lm_head.{}.weight"), got.count("model.layers.{}.input_layernorm.weight")
    head = got.stack("lm_head.{}.weight", depth) if depth else got["lm_head.0.weight"]
    num_codes, dim = head.shape[1:]
    codebook = got.stack("model.codec_embedding.{}.weight", depth)
    state = {"classifier_mlp.linear.weight": head, "classifier_mlp.layer_norm.weight": got["model.norm.weight"]}
    projected = "small_to_mtp_projection.weight" in got
    if projected:
        for part in ("weight", "bias"):
            for ours in ("in_mlp_1", "in_mlp_2"):
                state[f"{ours}.{part}"] = got[f"small_to_mtp_projection.{part}"].clone()
    width = codebook.shape[-1] if projected else None
    head_dim = len(got["model.layers.0.self_attn.q_norm.weight"])
    num_heads, kv_heads = (len(got[f"model.layers.0.self_attn.{p}_proj.weight"]) // head_dim for p in "qk")
    for i in range(layers):
        theirs, ours = f"model.layers.{i}", f"head_transformer.blocks.{i}"
        attn = f"{theirs}.self_attn"
        state |= {
            f"{ours}.ln1.weight": got[f"{theirs}.input_layernorm.weight"],
            f"{ours}.ln2.weight": got[f"{theirs}.post_attention_layernorm.weight"],
            f"{ours}.attn.query.weight": _neighbours(got[f"{attn}.q_proj.weight"], head_dim),
            f"{ours}.attn.key.weight": _neighbours(got[f"{attn}.k_proj.weight"], head_dim),
            f"{ours}.attn.query_norm": _neighbours(got[f"{attn}.q_norm.weight"], head_dim),
            f"{ours}.attn.key_norm": _neighbours(got[f"{attn}.k_norm.weight"], head_dim),
            f"{ours}.attn.value.weight": got[f"{attn}.v_proj.weight"],
            f"{ours}.attn.proj.weight": got[f"{attn}.o_proj.weight"],
            f"{ours}.gate.weight": got[f"{theirs}.mlp.gate_proj.weight"],
            f"{ours}.mlp.0.weight": got[f"{theirs}.mlp.up_proj.weight"],
            f"{ours}.mlp.2.weight": got[f"{theirs}.mlp.down_proj.weight"],
        }
    style = DepthStyle(
        norm="rms",
        eps=eps,
        bias=False,
        activation="silu",
        gated=True,
        mlp_dim=len(got["model.layers.0.mlp.up_proj.weight"]),
        head_dim=head_dim,
        kv_heads=kv_heads,
        qk_norm=True,
        learned_positions=False,
        rope=rope_base,
        state="before",
        last_code=True,
        heads_per_depth=True,
    )
    with torch.device("meta"):
        module = DepthTransformer(width, width, dim, layers, num_heads, depth, num_codes, 0.0, style)
    return CodePredictor(_filled(module, state), codebook, None)
