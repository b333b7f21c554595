"""Two small VILA-U whose weights and inputs follow from names by a fixed rule, so that goldens need hold outputs only.

numpy keeps the stream of `RandomState.random_sample` for ever; all else in a weight is correctly rounded arithmetic, so
that they are the same bits on every machine.
"""

import math
import re
import zlib
from collections.abc import Mapping
from dataclasses import replace

import numpy as np
import torch
from torch import Tensor

from unifiedar.models import VILAUConfig
from unifiedar.models.convolutional import DecoderConfig
from unifiedar.models.llama import LlamaConfig
from unifiedar.models.siglip import SiglipConfig

SEED = 20240906
# More codes than the 900 that the published sampler keeps.
SHARED = VILAUConfig(
    vision=SiglipConfig(16, 4, 32, 64, 3, 2, 2, 2, 64, 64, 8),
    decoder=DecoderConfig(32, (1, 1, 2), 1, 32, 16, (4,)),
    language=LlamaConfig(68, 48, 96, 2, 3, 128, rope_scaling=2.0),
    num_codes=1024,
    depth=4,
    shared_codebook=True,
    depth_dim=48,
    depth_layers=2,
    depth_heads=3,
)
# As the 384 model: two pixels of a side fill no patch, and the 5 x 5 grid is resized to 4 x 4 for the decoder.
SEPARATE = replace(SHARED, vision=replace(SHARED.vision, image_size=22), shared_codebook=False, latent_grid=4)


def uniform(name: str, *shape: int) -> Tensor:
    """Float32 numbers from -1 to 1."""
    random = np.random.RandomState(zlib.crc32(name.encode()) ^ SEED)
    return torch.from_numpy((random.random_sample(shape) * 2 - 1).astype(np.float32))


def integers(name: str, high: int, *shape: int) -> Tensor:
    """Int64 numbers from 0 to high - 1."""
    return ((uniform(name, *shape).double() + 1) / 2 * high).long().clamp(max=high - 1)


def exponential(name: str, *shape: int) -> Tensor:
    """Float32 samples of Exp(1)."""
    return -((1 - uniform(name, *shape).double()) / 2 + 1e-9).log().float()


def weight(name: str, shape: tuple[int, ...], shared: bool) -> Tensor:
    """The weight of a key of the state_dict."""
    # One tensor has several names: a codebook that depths share, and the loss's scale and bias.
    name = name.replace("siglip_model.logit", "logit")
    if shared:
        name = re.sub(r"codebooks\.\d+", "codebooks.0", name)
    u = uniform(name, *shape)
    if ".codebooks." in name:
        book = name.rsplit(".", 1)[0]
        sizes = 2 + uniform(book + ".cluster_size_ema", shape[0])
        if name.endswith("cluster_size_ema"):
            return sizes
        # Rows of many lengths, so that later depths still find something near what is left.
        lengths = torch.arange(shape[0], 0, -1) / shape[0] * 3
        table = uniform(book + ".weight", *shape) * lengths[:, None]
        if name.endswith("embed_ema"):
            return table * sizes[:, None]
        table[-1] = 0
        return table
    if len(shape) == 1:
        return 1 + u / 4 if name.endswith("weight") else u / 4
    if ("embed" in name and "patch" not in name) or "pos_emb" in name or "probe" in name:
        return u
    return u * math.sqrt(3 / math.prod(shape[1:]))


def weights(state: Mapping[str, Tensor], shared: bool) -> dict[str, Tensor]:
    """A whole state_dict for a model with these keys and shapes."""
    return {name: weight(name, tuple(value.shape), shared) for name, value in state.items()}


def fingerprint(state: Mapping[str, Tensor]) -> int:
    """Of names, shapes and values."""
    crc = 0
    for name in sorted(state):
        value = state[name].detach().contiguous()
        crc = zlib.crc32(f"{name}{tuple(value.shape)}".encode() + value.numpy().tobytes(), crc)
    return crc
