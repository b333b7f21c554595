"""Draws from logits."""

from torch import Tensor, nn

from unifiedar.ops import cut_logits, sample_codes

__all__ = ["CodeSampler"]


class CodeSampler(nn.Module):
    """Codes, or averages of code vectors, drawn from logits with classifier-free guidance; it has no state.

    Guidance, top-k and top-p are as `ops.sample_codes` takes them; as tensors, one a row, they may be changed in place
    between replays of a CUDA graph.
    """

    def forward(
        self,
        logits: Tensor,
        noise: Tensor,
        *,
        guidance: float | Tensor | None = None,
        top_k: int | Tensor = 0,
        top_p: float | Tensor = 0.0,
    ) -> Tensor:
        """Codes (N, ...) int64 of logits (N, ..., K), or (2N, ..., K) with guidance, and noise (N, ..., K) ~ Exp(1)."""
        return sample_codes(logits, guidance=guidance, top_k=top_k, top_p=top_p, noise=noise)

    def average(
        self,
        logits: Tensor,
        table: Tensor,
        noise: Tensor,
        *,
        sharpness: float,
        temperature: float,
        guidance: float | Tensor | None = None,
        top_k: int | Tensor = 0,
        top_p: float | Tensor = 0.0,
    ) -> Tensor:
        """Averages of code vectors, weighted by a Gumbel softmax over what could have been drawn.

        Args:
            logits: (N, ..., K), or (2N, ..., K) with guidance.
            table: (K, C), the code vectors.
            noise: (N, ..., K) ~ Exp(1), whose negative logarithm is Gumbel's noise.
            sharpness: factor on the logits after the cuts.
            temperature: of the softmax; near 0 it picks one code.
            guidance, top_k, top_p: of the logits.

        Returns:
            (N, ..., C), in float32 (float64 for float64 logits).
        """
        scores = cut_logits(logits, guidance=guidance, top_k=top_k, top_p=top_p) * sharpness - noise.log()
        shares = (scores / temperature).softmax(-1)
        return shares @ table.to(shares.dtype)
