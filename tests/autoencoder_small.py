"""Small tokenizers whose weights and pictures follow from names by the rule of `vilau_small`, for parity tests."""

import json
from pathlib import Path

from safetensors import safe_open
from torch import Tensor
from vilau_small import uniform, weights

from unifiedar.models import RQVAE, VQVAE, RQVAEConfig, VQVAEConfig
from unifiedar.models.convolutional import DecoderConfig

# VAR's encoder and decoder are fixed but for their first width, of which 32 is the least; 48 pixels make a 3 x 3 map.
VQ = VQVAEConfig(DecoderConfig(32, (1, 1, 2, 2, 4), 2, 8, 48, (3,), fused_qkv=True), 96, scales=(1, 2, 3))
RQ = RQVAEConfig(DecoderConfig(32, (1, 2), 1, 16, 16, (8,)), 50, dim=24, depth=3, restart=False)


def goldens() -> tuple[dict[str, Tensor], dict[str, dict]]:
    """What the published code made of these weights and pictures, by name, and the file's metadata."""
    with safe_open(Path(__file__).parent / "goldens" / "autoencoders-small.safetensors", "pt") as file:
        tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 (it is no mapping)
        return tensors, {key: json.loads(value) for key, value in file.metadata().items()}


def vqvae(config: VQVAEConfig = VQ) -> VQVAE:
    """In eval mode."""
    model = VQVAE(config).eval()
    model.load_state_dict(weights(model.state_dict(), True))
    return model


def rqvae(config: RQVAEConfig = RQ) -> RQVAE:
    """In eval mode."""
    model = RQVAE(config).eval()
    model.load_state_dict(weights(model.state_dict(), config.shared_codebook))
    return model


def pictures(name: str, batch: int, height: int, width: int) -> Tensor:
    """Float32 in [-1, 1]: coarse structure with some noise, so that pictures differ at every scale."""
    coarse = uniform(f"{name}.coarse", batch, 3, height // 4, width // 4)
    coarse = coarse.repeat_interleave(4, 2).repeat_interleave(4, 3)
    return 0.75 * coarse + 0.25 * uniform(f"{name}.fine", batch, 3, height, width)
