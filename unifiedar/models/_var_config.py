"""Sizes of a VAR: as given, as published, as a state_dict has them."""

import math
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from torch import Tensor

from unifiedar import checkpoints

__all__ = ["VARConfig", "config_of", "published"]

Scale = int | tuple[int, int]


@dataclass(frozen=True)
class VARConfig:
    """Sizes of a VAR.

    Attributes:
        depth: blocks.
        dim: C, width of a token.
        num_heads: of attention; C / heads is a multiple of 8 from 32 to 128.
        scales: of the code maps, integers (square) or (h, w), none larger than the last.
        num_classes: classes; one embedding more is that of no class.
        num_codes: K of the tokenizer's codebook.
        code_dim: width of a code vector.
        shared_adaln: whether one projection of the condition serves all blocks, each adding six vectors of its own.
        l2_norm: whether attention is a cosine's with a learned gain; else scores are scaled by 1 / (4 sqrt(D)).
        mlp_ratio: width of the MLP over that of a token.
        norm_eps: of the layer norms.
        drop_path: in training, the chance that the last block leaves a branch out; less before, in proportion.
        cond_drop: in training, the chance that a picture's class is taken away.
    """

    depth: int
    dim: int
    num_heads: int
    scales: tuple[Scale, ...] = (1, 2, 3, 4, 5, 6, 8, 10, 13, 16)
    num_classes: int = 1000
    num_codes: int = 4096
    code_dim: int = 32
    shared_adaln: bool = False
    l2_norm: bool = True
    mlp_ratio: float = 4.0
    norm_eps: float = 1e-6
    drop_path: float = 0.0
    cond_drop: float = 0.1

    @property
    def sizes(self) -> list[tuple[int, int]]:
        """Height and width of every scale, in codes."""
        return [(one, one) if isinstance(one, int) else (one[0], one[1]) for one in self.scales]

    @property
    def lengths(self) -> list[int]:
        """Codes of every scale."""
        return [height * width for height, width in self.sizes]

    def to_dict(self) -> dict[str, Any]:
        """As plain values, for a JSON file."""
        return {"model": "var", **asdict(self)}

    @classmethod
    def from_dict(cls, values: dict[str, Any]) -> "VARConfig":
        """Inverse of `to_dict`. Raises CheckpointError if the values are not those of a VAR."""
        values = dict(values)
        if values.pop("model", None) != "var":
            raise checkpoints.CheckpointError("config.json does not describe a VAR (its 'model' is not 'var')")
        try:
            scales = tuple(one if isinstance(one, int) else (one[0], one[1]) for one in values.pop("scales"))
            return cls(scales=scales, **values)
        except (KeyError, TypeError, ValueError, IndexError) as error:
            raise checkpoints.CheckpointError(f"config.json does not describe a VAR: {error}") from error


def published(depth: int, scales: tuple[int, ...] = VARConfig.scales, shared: bool = False) -> VARConfig:  # type: ignore[assignment]
    """As published: heads of 64 channels, as many as blocks."""
    return VARConfig(depth, 64 * depth, depth, scales, shared_adaln=shared, drop_path=0.1 * depth / 24)


def config_of(tensors: Mapping[str, Tensor], path: str | Path = "state_dict") -> VARConfig:
    """Sizes read off a published state_dict, with square scales and heads of 64 channels where there are no gains.

    Raises CheckpointError, which names the path, if it is none.
    """
    try:
        depth = len({name.split(".")[1] for name in tensors if name.startswith("blocks.")})
        dim = tensors["pos_1LC"].shape[2]
        gain = tensors.get("blocks.0.attn.scale_mul_1H11")
        sides = [math.isqrt(length) for length in tensors["lvl_1L"][0].bincount().tolist()]
        config = VARConfig(
            depth=depth,
            dim=dim,
            num_heads=dim // 64 if gain is None else gain.shape[1],
            scales=tuple(sides),
            num_classes=len(tensors["class_emb.weight"]) - 1,
            num_codes=len(tensors["head.weight"]),
            code_dim=tensors["word_embed.weight"].shape[1],
            shared_adaln="shared_ada_lin.1.weight" in tensors,
            l2_norm=gain is not None,
            mlp_ratio=len(tensors["blocks.0.ffn.fc1.weight"]) / dim,
            drop_path=0.1 * depth / 24,
        )
    except (KeyError, IndexError, RuntimeError) as error:
        raise checkpoints.CheckpointError(
            f"{path}: has not the keys of a VAR ({error} is missing or misshapen)"
        ) from error
    if sum(config.lengths) != tensors["lvl_1L"].shape[1]:
        raise checkpoints.CheckpointError(f"{path}: its scales are not squares; give config=")
    return config
