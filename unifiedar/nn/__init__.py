"""Modules: parameters, buffers and state around the ops; the arithmetic lives in `unifiedar.ops`."""

from unifiedar.nn.attention import NextScaleAttention, rope_table
from unifiedar.nn.codes import Codebook, Quantized, ResidualQuantizer
from unifiedar.nn.codes_bitwise import BitwiseOutput, BitwiseQuantizer, SignOutput, SignQuantizer
from unifiedar.nn.codes_multiscale import MultiScaleQuantized, MultiScaleQuantizer
from unifiedar.nn.depth import DepthTransformer
from unifiedar.nn.norm_group import GroupNorm

__all__ = [
    "BitwiseOutput",
    "BitwiseQuantizer",
    "Codebook",
    "DepthTransformer",
    "GroupNorm",
    "MultiScaleQuantized",
    "MultiScaleQuantizer",
    "NextScaleAttention",
    "Quantized",
    "ResidualQuantizer",
    "SignOutput",
    "SignQuantizer",
    "rope_table",
]
