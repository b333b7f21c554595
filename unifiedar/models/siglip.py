"""SigLIP's vision and text encoders (Zhai et al., arXiv:2303.15343), in the layout of the published checkpoints.

Pre-norm blocks, LayerNorm eps 1e-6, tanh GELU, biases everywhere, no class token; attention pooling over the patches
on the image side, the last token on the text side.
"""

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

__all__ = ["SiglipConfig", "SiglipModel"]


@dataclass(frozen=True)
class SiglipConfig:
    """Sizes of both towers. `hidden_size` is the width they share, in pixels are `image_size` and `patch_size`."""

    image_size: int
    patch_size: int
    hidden_size: int
    intermediate_size: int
    num_layers: int
    num_heads: int
    text_layers: int
    text_heads: int
    text_intermediate_size: int
    vocab_size: int
    text_positions: int

    @property
    def grid(self) -> int:
        """Patches along one side; pixels that do not fill a patch are dropped."""
        return self.image_size // self.patch_size


class _Attention(nn.Module):
    def __init__(self, dim: int, num_heads: int):
        super().__init__()
        self.k_proj, self.v_proj, self.q_proj, self.out_proj = (nn.Linear(dim, dim) for _ in range(4))
        self.num_heads = num_heads

    def forward(self, x: Tensor) -> Tensor:
        rows, length, dim = x.shape
        q, k, v = (
            f(x).view(rows, length, self.num_heads, -1).transpose(1, 2) for f in (self.q_proj, self.k_proj, self.v_proj)
        )
        y = F.scaled_dot_product_attention(q, k, v)
        return self.out_proj(y.transpose(1, 2).reshape(rows, length, dim))


class _MLP(nn.Module):
    def __init__(self, dim: int, hidden: int):
        super().__init__()
        self.fc1, self.fc2 = nn.Linear(dim, hidden), nn.Linear(hidden, dim)

    def forward(self, x: Tensor) -> Tensor:
        return self.fc2(F.gelu(self.fc1(x), approximate="tanh"))


class _Block(nn.Module):
    def __init__(self, dim: int, num_heads: int, hidden: int):
        super().__init__()
        self.self_attn = _Attention(dim, num_heads)
        self.layer_norm1, self.layer_norm2 = nn.LayerNorm(dim, eps=1e-6), nn.LayerNorm(dim, eps=1e-6)
        self.mlp = _MLP(dim, hidden)

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.self_attn(self.layer_norm1(x))
        return x + self.mlp(self.layer_norm2(x))


class _Encoder(nn.Module):
    def __init__(self, num_layers: int, dim: int, num_heads: int, hidden: int):
        super().__init__()
        self.layers = nn.ModuleList(_Block(dim, num_heads, hidden) for _ in range(num_layers))

    def forward(self, x: Tensor) -> Tensor:
        for layer in self.layers:
            x = layer(x)
        return x


class _PatchEmbeddings(nn.Module):
    def __init__(self, config: SiglipConfig):
        super().__init__()
        dim, patch = config.hidden_size, config.patch_size
        self.patch_embedding = nn.Conv2d(3, dim, patch, stride=patch)
        self.position_embedding = nn.Embedding(config.grid**2, dim)

    def forward(self, images: Tensor) -> Tensor:
        return self.patch_embedding(images).flatten(2).transpose(1, 2) + self.position_embedding.weight


class _AttentionPool(nn.Module):
    """A learned query attends to all patches (`head` of the published model)."""

    def __init__(self, config: SiglipConfig):
        super().__init__()
        dim = config.hidden_size
        self.probe = nn.Parameter(torch.randn(1, 1, dim))
        self.attention = nn.MultiheadAttention(dim, config.num_heads, batch_first=True)
        self.layernorm = nn.LayerNorm(dim, eps=1e-6)
        self.mlp = _MLP(dim, config.intermediate_size)

    def forward(self, x: Tensor) -> Tensor:
        pooled = self.attention(self.probe.expand(len(x), -1, -1), x, x, need_weights=False)[0]
        return (pooled + self.mlp(self.layernorm(pooled)))[:, 0]


class _VisionModel(nn.Module):
    def __init__(self, config: SiglipConfig):
        super().__init__()
        self.embeddings = _PatchEmbeddings(config)
        self.encoder = _Encoder(config.num_layers, config.hidden_size, config.num_heads, config.intermediate_size)
        self.post_layernorm = nn.LayerNorm(config.hidden_size, eps=1e-6)
        self.head = _AttentionPool(config)


class _TokenEmbeddings(nn.Module):
    def __init__(self, config: SiglipConfig):
        super().__init__()
        self.token_embedding = nn.Embedding(config.vocab_size, config.hidden_size)
        self.position_embedding = nn.Embedding(config.text_positions, config.hidden_size)

    def forward(self, ids: Tensor) -> Tensor:
        return self.token_embedding(ids) + self.position_embedding.weight[: ids.shape[1]]


class _TextModel(nn.Module):
    def __init__(self, config: SiglipConfig):
        super().__init__()
        dim = config.hidden_size
        self.embeddings = _TokenEmbeddings(config)
        self.encoder = _Encoder(config.text_layers, dim, config.text_heads, config.text_intermediate_size)
        self.final_layer_norm = nn.LayerNorm(dim, eps=1e-6)
        self.head = nn.Linear(dim, dim)


class SiglipModel(nn.Module):
    """Both towers and the scale and bias of the pairwise sigmoid loss (`siglip_model.*`).

    VILA-U quantizes the output of the last block but one, so the vision side is offered in two parts:
    `features` up to there, `pool` from there to one vector an image.
    """

    def __init__(self, config: SiglipConfig):
        super().__init__()
        self.config = config
        self.vision_model, self.text_model = _VisionModel(config), _TextModel(config)
        self.logit_scale = nn.Parameter(torch.tensor([2.3025851]))  # log 10, the paper's start
        self.logit_bias = nn.Parameter(torch.tensor([-10.0]))

    def features(self, images: Tensor) -> Tensor:
        """Images (B, 3, S, S) in [-1, 1] to patch features (B, L, C): the output of the last block but one."""
        x = self.vision_model.embeddings(images)
        for layer in self.vision_model.encoder.layers[:-1]:
            x = layer(x)
        return x

    def pool(self, features: Tensor) -> Tensor:
        """Patch features (B, L, C) to one unit vector (B, C) each, through the last block and the attention pool."""
        vision = self.vision_model
        x = vision.head(vision.post_layernorm(vision.encoder.layers[-1](features)))
        return F.normalize(x.float(), dim=-1)

    def embed_text(self, ids: Tensor) -> Tensor:
        """Token ids (B, T), padded to `text_positions`, to unit vectors (B, C): the last position's state."""
        text = self.text_model
        x = text.final_layer_norm(text.encoder(text.embeddings(ids)))
        return F.normalize(text.head(x[:, -1]).float(), dim=-1)
