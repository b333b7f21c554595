"""The operators: functions on tensors, each with an eager definition and the faster backends that serve it.

Conventions: the last dimension of features is channels (C), the last dimension of codes is depth (D), a codebook is (K,
C) shared by all depths or (D, K, C), codes are int64. Every function takes `backend="auto" | "cuda" | "triton" |
"eager"`, and is refused one that the operator lacks or that does not fit the call. "auto" takes the first that fits.
The environment variable UNIFIEDAR_BACKEND stands in for "auto" in operators that have the backend it names (one that
does not fit the call is refused then, too); the others stay with "auto", so that a whole model runs. `registry` lists
the operators beneath; its `explain(...)` says which backends fit a call and why the others do not.
"""

from unifiedar.ops import masks
from unifiedar.ops._op import BACKENDS, Backend, Op, registry
from unifiedar.ops.attention import block_causal_attention
from unifiedar.ops.attention_blocks import block_attention
from unifiedar.ops.attention_cached import cached_attention
from unifiedar.ops.codes import ResidualCodes, code_statistics, residual_lookup, residual_quantize
from unifiedar.ops.codes_bits import BitwiseLosses, bitwise_pack, bitwise_unpack
from unifiedar.ops.codes_bitwise import (
    BitwiseCodes,
    bitwise_inputs,
    bitwise_lookup,
    bitwise_quantize,
    next_bitwise_input,
)
from unifiedar.ops.codes_multiscale import (
    Phi,
    multiscale_inputs,
    multiscale_lookup,
    multiscale_quantize,
    next_scale_input,
)
from unifiedar.ops.depth import DepthBlock, DepthCodes, DepthForm, DepthWeights, depth_decode
from unifiedar.ops.linear import linear_8bit, widen_8bit
from unifiedar.ops.linear_few import few_linear, linear_parts, parts_norm
from unifiedar.ops.linear_gelu import bias_gelu
from unifiedar.ops.norm import modulated_norm, packed_norm_rope, qk_norm_rope
from unifiedar.ops.norm_group import add_group_norm, add_maps, group_norm, phase_weights
from unifiedar.ops.sample import cut_logits, sample_codes

__all__ = [
    "BACKENDS",
    "Backend",
    "BitwiseCodes",
    "BitwiseLosses",
    "DepthBlock",
    "DepthCodes",
    "DepthForm",
    "DepthWeights",
    "Op",
    "Phi",
    "ResidualCodes",
    "add_group_norm",
    "add_maps",
    "bias_gelu",
    "bitwise_inputs",
    "bitwise_lookup",
    "bitwise_pack",
    "bitwise_quantize",
    "bitwise_unpack",
    "block_attention",
    "block_causal_attention",
    "cached_attention",
    "code_statistics",
    "cut_logits",
    "depth_decode",
    "few_linear",
    "group_norm",
    "linear_8bit",
    "linear_parts",
    "masks",
    "modulated_norm",
    "multiscale_inputs",
    "multiscale_lookup",
    "multiscale_quantize",
    "next_bitwise_input",
    "next_scale_input",
    "packed_norm_rope",
    "parts_norm",
    "phase_weights",
    "qk_norm_rope",
    "registry",
    "residual_lookup",
    "residual_quantize",
    "sample_codes",
    "widen_8bit",
]
