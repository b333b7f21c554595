"""Modules: parameters, buffers and state around the ops; the arithmetic lives in `unifiedar.ops`."""

from unifiedar.nn.attention import NextScaleAttention, rope_table
from unifiedar.nn.codes import Codebook, Quantized, ResidualQuantizer
from unifiedar.nn.codes_bitwise import BitwiseOutput, BitwiseQuantizer, SignOutput, SignQuantizer
from unifiedar.nn.codes_multiscale import MultiScaleQuantized, MultiScaleQuantizer, ScaleBook
from unifiedar.nn.depth import DepthStyle, DepthTransformer
from unifiedar.nn.linear import Linear8bit
from unifiedar.nn.linear_few import gelu_of, in_parts, of_few
from unifiedar.nn.linear_wide import wide_linear
from unifiedar.nn.norm import ModulatedNorm
from unifiedar.nn.norm_group import GroupNorm, Summands, UpsampledConv2d
from unifiedar.nn.sample import CodeSampler

__all__ = [
    "BitwiseOutput",
    "BitwiseQuantizer",
    "CodeSampler",
    "Codebook",
    "DepthStyle",
    "DepthTransformer",
    "GroupNorm",
    "Linear8bit",
    "ModulatedNorm",
    "MultiScaleQuantized",
    "MultiScaleQuantizer",
    "NextScaleAttention",
    "Quantized",
    "ResidualQuantizer",
    "ScaleBook",
    "SignOutput",
    "SignQuantizer",
    "Summands",
    "UpsampledConv2d",
    "gelu_of",
    "in_parts",
    "of_few",
    "rope_table",
    "wide_linear",
]
