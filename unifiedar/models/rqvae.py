"""RQ-VAE (Lee et al., arXiv:2203.01941, section 3.1): pictures as grids of D codes a position, and back.

A convolutional encoder turns a picture into a grid of features; the quantizer approximates each as a sum of D rows of
one codebook, which the RQ-Transformer predicts; a decoder paints the sums. Keys and methods are the published ones.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar, Literal

import torch
import torch.nn.functional as F
from torch import Tensor

from unifiedar.models._autoencoder import Autoencoder, AutoencoderConfig, to_bytes
from unifiedar.models.convolutional import DecoderConfig
from unifiedar.nn import ResidualQuantizer
from unifiedar.nn.codes import search

__all__ = ["RQVAE", "RQVAEConfig"]


@dataclass(frozen=True)
class RQVAEConfig(AutoencoderConfig):
    """Sizes of an RQVAE.

    Attributes:
        network: of encoder and decoder.
        num_codes: K of the codebook.
        dim: C, width of a code vector.
        depth: D, codes per position. There is one position for each of the encoder's features (published
            `latent_shape` and `code_shape` agree in height and width).
        shared_codebook: one table for all depths.
        decay, restart: as `ResidualQuantizer` takes them; in training tables move after every depth, as published.
        loss: of the reconstruction, "mse" or "l1".
        latent_loss_weight: of the commitment loss.
    """

    kind: ClassVar[str] = "rqvae"
    kernel: ClassVar[int] = 1
    dim: int = 256
    depth: int = 4
    shared_codebook: bool = True
    decay: float = 0.99
    restart: bool = True
    loss: Literal["mse", "l1"] = "mse"
    latent_loss_weight: float = 0.25

    def __post_init__(self) -> None:
        if self.loss not in ("mse", "l1"):
            raise ValueError(f"RQVAEConfig: loss must be 'mse' or 'l1', got {self.loss!r}")


def _published(num_codes: int, attn_resolution: int) -> RQVAEConfig:
    return RQVAEConfig(DecoderConfig(128, (1, 1, 2, 2, 4, 4), 2, 256, 256, (attn_resolution,)), num_codes)


class RQVAE(Autoencoder):
    """The residual-quantized autoencoder.

    `encode_images`, `decode_codes` and `reconstruct` take pictures to codes and back. The rest are the methods of the
    published class: pictures there are floating point in [-1, 1], and not clamped on their way out.

    Args:
        config: sizes, one of `RQVAE.configs` or your own. "lsun" is that of cats, bedrooms and churches.
    """

    configs: ClassVar[Mapping[str, RQVAEConfig]] = {
        "imagenet": _published(16384, 8),
        "lsun": _published(16384, 8),
        "ffhq": _published(2048, 16),
    }
    config_class = RQVAEConfig
    config: RQVAEConfig

    def __init__(self, config: RQVAEConfig):
        super().__init__(config)
        self.quantizer = ResidualQuantizer(
            config.num_codes,
            config.dim,
            config.depth,
            shared=config.shared_codebook,
            decay=config.decay,
            update="depth",
            restart=config.restart,
        )

    # ---- pictures and codes

    @torch.no_grad()
    def encode_images(self, images: Tensor) -> Tensor:
        """Codes (N, h, w, D) int64 of pictures, on the model's device; moves no codebook, whatever the mode.

        Args:
            images: (N, 3, H, W), uint8 or floating point in [-1, 1], sides multiples of the downsampling.

        Raises:
            TypeError, ValueError: for another dtype or size.
        """
        features = self.encode(self._pixels(images, "encode_images")).float()
        return search(features, self.quantizer.table.float(), self.config.depth)[0]

    @torch.no_grad()
    def decode_codes(self, codes: Tensor) -> Tensor:
        """Pictures (N, 3, H, W) uint8 of codes (N, h, w, D) int64, on the model's device."""
        return to_bytes(self.decode_code(codes.to(self.device)))

    @torch.no_grad()
    def reconstruct(self, images: Tensor) -> tuple[Tensor, Tensor]:
        """Pictures through their codes: pictures (N, 3, H, W) uint8, and the codes of `encode_images`."""
        codes = self.encode_images(images)
        return self.decode_codes(codes), codes

    # ---- the published methods

    def forward(self, xs: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """For training: reconstructions, the commitment loss and codes; in training mode it moves the codebook.

        Args:
            xs: (B, 3, H, W).

        Returns:
            Pictures (B, 3, H, W), the loss () and codes (B, h, w, D) int64.
        """
        quantized = self.quantizer(self.encode(xs))
        return self.decode(quantized.features), quantized.commitment, quantized.codes

    def encode(self, x: Tensor) -> Tensor:
        """Features (B, h, w, C), not quantized, of pictures (B, 3, H, W)."""
        return self._latents(x, "encode").permute(0, 2, 3, 1).contiguous()

    def decode(self, z_q: Tensor) -> Tensor:
        """Pictures (B, 3, H, W), of the decoder's dtype, from features (B, h, w, C)."""
        if z_q.ndim != 4 or z_q.shape[-1] != self.config.dim:
            raise ValueError(f"decode: z_q must be (B, h, w, {self.config.dim}), got {tuple(z_q.shape)}")
        return self._paint(z_q.permute(0, 3, 1, 2))

    @torch.no_grad()
    def get_codes(self, xs: Tensor) -> Tensor:
        """Codes (B, h, w, D) int64 of pictures (B, 3, H, W); in training mode it moves the codebook, as published."""
        return self.quantizer(self.encode(xs)).codes

    @torch.no_grad()
    def get_soft_codes(self, xs: Tensor, temp: float = 1.0, stochastic: bool = False) -> tuple[Tensor, Tensor]:
        """Soft codes (B, h, w, D, K) of pictures (B, 3, H, W), and codes; see `ResidualQuantizer.get_soft_codes`."""
        return self.quantizer.get_soft_codes(self.encode(xs), temp=temp, stochastic=stochastic)

    @torch.no_grad()
    def get_code_emb_with_depth(self, code: Tensor) -> tuple[Tensor, None]:
        """The code vectors (B, h, w, D, C) of codes (B, h, w, D), not summed, and None."""
        return self.quantizer.embed_code_with_depth(code)

    @torch.no_grad()
    def decode_code(self, code: Tensor) -> Tensor:
        """Pictures (B, 3, H, W) of codes (B, h, w, D)."""
        return self.decode(self.quantizer.embed_code(self._grid(code, "decode_code")))

    @torch.no_grad()
    def decode_partial_code(self, code: Tensor, code_idx: int, decode_type: str = "select") -> Tensor:
        """Pictures of one depth's code vectors ("select"), or of the sums up to that depth ("add").

        Args:
            code: (B, h, w, D) int64.
            code_idx: the depth, in [0, D).
            decode_type: "select" or "add".
        """
        code = self._grid(code, "decode_partial_code")
        return self.decode(self.quantizer.embed_partial_code(code, code_idx, decode_type))

    @torch.no_grad()
    def forward_partial_code(self, xs: Tensor, code_idx: int, decode_type: str = "select") -> Tensor:
        """`decode_partial_code` of the codes of pictures (B, 3, H, W)."""
        return self.decode_partial_code(self.get_codes(xs), code_idx, decode_type)

    def get_recon_imgs(self, xs_real: Tensor, xs_recon: Tensor) -> tuple[Tensor, Tensor]:
        """Both from [-1, 1] to [0, 1], the second clamped."""
        return xs_real * 0.5 + 0.5, (xs_recon * 0.5 + 0.5).clamp(0, 1)

    def compute_loss(
        self, out: Tensor, quant_loss: Tensor, code: Tensor, xs: Tensor, valid: bool = False
    ) -> dict[str, Any]:
        """The losses of a training step, without the perceptual and adversarial ones.

        Args:
            out, quant_loss, code: as `forward` returns them.
            xs: the pictures (B, 3, H, W).
            valid: whether to sum over pictures (and, of the reconstruction, channels) instead of averaging, as the
                published evaluation counts. The total is of the sums, then.

        Returns:
            loss_total, which is loss_recon + latent_loss_weight * loss_latent; these two; and codes, [code].
        """
        loss_recon = F.mse_loss(out, xs) if self.config.loss == "mse" else F.l1_loss(out, xs)
        loss_latent = quant_loss
        if valid:
            loss_recon = loss_recon * (xs.shape[0] * xs.shape[1])
            loss_latent = loss_latent * xs.shape[0]
        total = loss_recon + self.config.latent_loss_weight * loss_latent
        return {"loss_total": total, "loss_recon": loss_recon, "loss_latent": loss_latent, "codes": [code]}

    def get_last_layer(self) -> Tensor:
        """The weight of the decoder's last convolution, which balances adversarial losses."""
        return self.decoder.conv_out.weight

    def _grid(self, code: Tensor, function: str) -> Tensor:
        if code.ndim != 4 or code.shape[-1] != self.config.depth:
            raise ValueError(f"{function}: codes must be (B, h, w, {self.config.depth}), got {tuple(code.shape)}")
        return code
