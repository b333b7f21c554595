"""VAR's tokenizer (Tian et al., arXiv:2404.02905, section 3.2): pictures as codes of ten scales, and back.

A convolutional encoder turns a picture into a map of features; the quantizer approximates it as a sum of maps of
growing size, whose codes are what VAR predicts; a decoder paints the sum. Keys and methods are the published ones.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import ClassVar, Literal

import torch
from torch import Tensor

from unifiedar.models._autoencoder import Autoencoder, AutoencoderConfig, to_bytes
from unifiedar.models.convolutional import DecoderConfig
from unifiedar.nn import MultiScaleQuantizer

__all__ = ["VQVAE", "VQVAEConfig"]

Scale = int | tuple[int, int]


@dataclass(frozen=True)
class VQVAEConfig(AutoencoderConfig):
    """Sizes of a VQVAE.

    Attributes:
        network: of encoder and decoder; its `z_channels` are the width of the code vectors too.
        num_codes: K of the codebook.
        scales: of the code maps, integers (square) or (h, w); the last is the picture's size over
            `network.downsampling`. The published weights serve others as well, 512 pixels with the ten that end in 32.
        kernel: side of the convolutions around the quantizer (published `quant_conv_ks`).
        convolutions, ratio, metric, beta: as `MultiScaleQuantizer` takes them.
    """

    kind: ClassVar[str] = "vqvae"
    scales: tuple[Scale, ...] = (1, 2, 3, 4, 5, 6, 8, 10, 13, 16)
    kernel: int = 3
    convolutions: int = 4
    ratio: float = 0.5
    metric: Literal["l2", "cosine"] = "l2"
    beta: float = 0.25

    @property
    def dim(self) -> int:
        """C, width of a code vector."""
        return self.network.z_channels


class VQVAE(Autoencoder):
    """VAR's multi-scale tokenizer.

    `encode_images` and `decode_codes` take pictures to codes and back. The rest are the methods that VAR's models,
    trainers and notebooks call: pictures there are floating point in [-1, 1].

    Args:
        config: sizes, one of `VQVAE.configs` or your own.
    """

    configs: ClassVar[Mapping[str, VQVAEConfig]] = {
        "vae_ch160v4096z32": VQVAEConfig(DecoderConfig(160, (1, 1, 2, 2, 4), 2, 32, 256, (16,), fused_qkv=True), 4096),
        # The last size twice: what one map of 2,048 vectors leaves of a picture is most of its lines.
        "emoji": VQVAEConfig(
            DecoderConfig(32, (1, 2, 2, 3), 1, 16, 64, (), fused_qkv=True), 2048, scales=(1, 2, 3, 4, 6, 8, 8)
        ),
    }
    config_class = VQVAEConfig
    inside = ("trainer", "vae_local")
    config: VQVAEConfig

    def __init__(self, config: VQVAEConfig):
        super().__init__(config)
        self.quantize = MultiScaleQuantizer(
            config.num_codes,
            config.dim,
            config.scales,
            convolutions=config.convolutions,
            ratio=config.ratio,
            metric=config.metric,
            beta=config.beta,
        )

    @property
    def vocab_size(self) -> int:
        """K, the number of codes."""
        return self.config.num_codes

    V = vocab_size

    @property
    def Cvae(self) -> int:
        """C, width of a code vector."""
        return self.config.dim

    @property
    def downsample(self) -> int:
        """Pixels of a side for one of the code map's."""
        return self.config.network.downsampling

    # ---- pictures and codes

    @torch.no_grad()
    def encode_images(self, images: Tensor) -> list[Tensor]:
        """Codes of pictures: for every scale (N, h w) int64, on the model's device.

        Args:
            images: (N, 3, H, W), uint8 or floating point in [-1, 1], of the size of the last scale.

        Raises:
            TypeError, ValueError: for another dtype or size.
        """
        return self.img_to_idxBl(self._pixels_of_last_scale(images, "encode_images"))

    @torch.no_grad()
    def decode_codes(self, codes: Sequence[Tensor]) -> Tensor:
        """Pictures (N, 3, H, W) uint8 of codes (N, h w) int64 of the first scales, or of all; on the model's device."""
        return to_bytes(self.fhat_to_img(self.quantize.embed([one.to(self.device) for one in codes])))

    @torch.no_grad()
    def reconstruct(self, images: Tensor) -> tuple[Tensor, list[Tensor]]:
        """Pictures through their codes: pictures (N, 3, H, W) uint8, and the codes of `encode_images`."""
        codes = self.img_to_idxBl(self._pixels_of_last_scale(images, "reconstruct"))
        return self.decode_codes(codes), codes

    def _pixels_of_last_scale(self, images: Tensor, function: str) -> Tensor:
        pixels = self._pixels(images, function)
        height, width = (self.downsample * side for side in self._size(-1))
        if pixels.shape[2:] != (height, width):
            raise ValueError(
                f"{function}: images must be (N, 3, {height}, {width}), the size of the last scale, "
                f"got {tuple(images.shape)}"
            )
        return pixels

    def _size(self, step: int) -> tuple[int, int]:
        scale = self.config.scales[step]
        return (scale, scale) if isinstance(scale, int) else (scale[0], scale[1])

    # ---- the published methods

    def forward(self, inp: Tensor, ret_usages: bool = False) -> tuple[Tensor, list[float] | None, Tensor]:
        """For training the tokenizer.

        Args:
            inp: (B, 3, H, W).
            ret_usages: whether to look up how many codes are in use, which waits for a GPU.

        Returns:
            Pictures (B, 3, H, W), not clamped; percent of codes in use by scale, or None; the quantizer's loss ().
        """
        features, usages, loss = self.quantize(self._latents(inp, "forward"), ret_usages=ret_usages)
        return self._paint(features), usages, loss

    def fhat_to_img(self, f_hat: Tensor) -> Tensor:
        """Pictures (B, 3, H, W) in [-1, 1], of the decoder's dtype, from sums (B, C, h, w)."""
        return self._paint(f_hat).clamp(-1, 1)

    def img_to_idxBl(self, inp_img_no_grad: Tensor, v_patch_nums: Sequence[Scale] | None = None) -> list[Tensor]:
        """Codes (B, h w) int64 of every scale.

        Args:
            inp_img_no_grad: (B, 3, H, W) in [-1, 1].
            v_patch_nums: other scales than the configuration's.
        """
        features = self._latents(inp_img_no_grad, "img_to_idxBl")
        return self.quantize.f_to_idxBl_or_fhat(features, to_fhat=False, v_patch_nums=v_patch_nums)

    def idxBl_to_img(
        self, ms_idx_Bl: Sequence[Tensor], same_shape: bool, last_one: bool = False
    ) -> list[Tensor] | Tensor:
        """Pictures of codes, as `embed_to_img` has them of the codes' vectors.

        Args:
            ms_idx_Bl: (B, h w) int64 of the configuration's scales, all or the first few.
            same_shape: whether all pictures are of the last scale's size, or each of its own scale's.
            last_one: whether to return the last picture alone.
        """
        if same_shape and last_one:
            return self.fhat_to_img(self.quantize.embed(ms_idx_Bl))
        if same_shape:
            return [self.fhat_to_img(one) for one in self.quantize.embed(ms_idx_Bl, cumulative=True)]
        if not 1 <= len(ms_idx_Bl) <= len(self.config.scales):
            raise ValueError(
                f"idxBl_to_img: ms_idx_Bl must hold 1 to {len(self.config.scales)} tensors, got {len(ms_idx_Bl)}"
            )
        maps = []
        for step, codes in enumerate(ms_idx_Bl):
            height, width = self._size(step)
            if codes.ndim != 2 or codes.shape[1] != height * width:
                raise ValueError(
                    f"idxBl_to_img: ms_idx_Bl[{step}] must be (B, {height * width}), got {tuple(codes.shape)}"
                )
            maps.append(self.quantize.embedding(codes).transpose(1, 2).unflatten(2, (height, width)))
        return self.embed_to_img(maps, all_to_max_scale=False, last_one=last_one)

    def embed_to_img(
        self, ms_h_BChw: Sequence[Tensor], all_to_max_scale: bool, last_one: bool = False
    ) -> list[Tensor] | Tensor:
        """Pictures after each scale, (B, 3, H, W) in [-1, 1], or with `last_one` after all.

        Args:
            ms_h_BChw: maps of vectors (B, C, h, w), one a scale.
            all_to_max_scale: whether all pictures are of the last scale's size, or each of its own scale's.
            last_one: whether to return the last picture alone.
        """
        sums = self.quantize.embed_to_fhat(ms_h_BChw, all_to_max_scale=all_to_max_scale, last_one=last_one)
        return self.fhat_to_img(sums) if isinstance(sums, Tensor) else [self.fhat_to_img(one) for one in sums]

    def img_to_reconstructed_img(
        self, x: Tensor, v_patch_nums: Sequence[Scale] | None = None, last_one: bool = False
    ) -> list[Tensor] | Tensor:
        """Pictures (B, 3, H, W) in [-1, 1] through their codes: after each scale, or with `last_one` after all."""
        features = self._latents(x, "img_to_reconstructed_img")
        sums = self.quantize.f_to_idxBl_or_fhat(features, to_fhat=True, v_patch_nums=v_patch_nums)
        return self.fhat_to_img(sums[-1]) if last_one else [self.fhat_to_img(one) for one in sums]
