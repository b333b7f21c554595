"""Depth transformer: a small causal transformer that emits the D codes of one position one after another.

RQ-Transformer (arXiv:2203.01941, section 3.2) introduced it; VILA-U (arXiv:2409.04429, section 3.2) puts it on a
language model's hidden state. The keys are VILA-U's `rqtransformer.*`. RQ-Transformer's body is a stack of the same
blocks, over the positions of a picture.
"""

from collections.abc import Sequence
from typing import Any, cast

import torch
from torch import Tensor, nn

from unifiedar.ops import DepthBlock, DepthCodes, DepthWeights, depth_decode, residual_lookup
from unifiedar.ops.depth import depth_block, depth_pack, wants_packed

__all__ = ["DepthTransformer", "require_sound"]


class _Attention(nn.Module):
    """Parameters of the attention, by their published names."""

    def __init__(self, dim: int):
        super().__init__()
        self.key, self.query, self.value, self.proj = (nn.Linear(dim, dim) for _ in range(4))


class _Block(nn.Module):
    def __init__(self, dim: int, num_heads: int, dropout: float):
        super().__init__()
        self.ln1, self.ln2 = nn.LayerNorm(dim), nn.LayerNorm(dim)
        self.attn = _Attention(dim)
        self.mlp = nn.Sequential(nn.Linear(dim, 4 * dim), nn.GELU(), nn.Linear(4 * dim, dim))
        self.num_heads, self.dropout = num_heads, dropout

    def weights(self) -> DepthBlock:
        attn, up, down = self.attn, self.mlp[0], self.mlp[2]
        modules = (self.ln1, attn.query, attn.key, attn.value, attn.proj, self.ln2, up, down)
        return DepthBlock(*(_pair(module) for module in modules))

    def forward(self, x: Tensor, cache: Tensor | None = None, begin: int = 0) -> Tensor:
        dropout = self.dropout if self.training else 0.0
        return depth_block(x, self.weights(), self.num_heads, cache, begin, dropout)


def _pair(module: nn.Module) -> tuple[Tensor, Tensor]:
    return cast(Tensor, module.weight), cast(Tensor, module.bias)


class Stack(nn.Module):
    """Causal pre-norm blocks without a final norm: LayerNorm, biases, GELU (erf), four times as wide inside the MLP."""

    def __init__(self, dim: int, num_layers: int, num_heads: int, dropout: float):
        super().__init__()
        self.blocks = nn.ModuleList(_Block(dim, num_heads, dropout) for _ in range(num_layers))
        self.num_heads = num_heads

    def cache(self, x: Tensor, length: int) -> Tensor:
        """Room for the keys and values of `length` tokens of rows like x (rows, ..., dim), not yet written."""
        head_dim = x.shape[-1] // self.num_heads
        return x.new_empty(len(self.blocks), 2, len(x), self.num_heads, length, head_dim)

    def forward(self, x: Tensor, cache: Tensor | None = None, begin: int = 0) -> Tensor:
        """States (rows, T, dim) of tokens begin .. begin + T - 1, those before them read from the cache, if any."""
        for i, block in enumerate(self.blocks):
            x = block(x, None if cache is None else cache[i], begin)
        return x


class Classifier(nn.Module):
    """LayerNorm and a linear layer: (..., dim) to logits (..., K)."""

    def __init__(self, dim: int, num_codes: int):
        super().__init__()
        self.layer_norm, self.linear = nn.LayerNorm(dim), nn.Linear(dim, num_codes)

    def forward(self, x: Tensor) -> Tensor:
        return self.linear(self.layer_norm(x))


class DepthTransformer(nn.Module):
    """Predicts code d of a position from the body's hidden state and the sum of the embeddings of codes 0..d-1.

    Args:
        hidden_dim: width of the body's hidden state (`input_embed_dim_2`), or None if the state is as wide as the stack
            and enters as it is, without a projection (RQ-Transformer).
        code_dim: C, width of a code vector (`input_embed_dim_1`).
        dim, num_layers, num_heads: of the stack; heads are dim // num_heads wide.
        depth: D, codes per position.
        num_codes: K.
        dropout: after the attention projection and the MLP, in training only.
    """

    def __init__(
        self,
        hidden_dim: int | None,
        code_dim: int,
        dim: int,
        num_layers: int,
        num_heads: int,
        depth: int,
        num_codes: int,
        dropout: float = 0.1,
    ):
        super().__init__()
        if dim % num_heads:
            raise ValueError(f"DepthTransformer: dim must be a multiple of num_heads {num_heads}, got {dim}")
        self.pos_emb_d = nn.Parameter(torch.zeros(1, depth, dim))
        self.in_mlp_1 = nn.Linear(code_dim, dim)
        self.in_mlp_2 = nn.Identity() if hidden_dim is None else nn.Linear(hidden_dim, dim)
        self.head_transformer = Stack(dim, num_layers, num_heads, dropout)
        self.classifier_mlp = Classifier(dim, num_codes)
        self.depth, self.num_codes = depth, num_codes
        self._kept: tuple[list[tuple[int, int, int]], Tensor, list[nn.Parameter]] | None = None
        nn.init.normal_(self.pos_emb_d, std=0.02)

    def running_sums(self, codes: Tensor, codebook: Tensor) -> Tensor:
        """Sums (..., D, C) of the embeddings of codes 0..d, in the codebook's dtype, as `forward` takes them.

        Args:
            codes: (..., D) int64.
            codebook: (K, C) or (D, K, C).

        Returns:
            (..., D, C); `unifiedar.ops.residual_lookup` says what bad input raises.
        """
        return residual_lookup(codes, codebook, cumulative=True)

    def forward(self, hidden: Tensor, running_sums: Tensor) -> Tensor:
        """Teacher-forced logits.

        Args:
            hidden: (N, hidden_dim), the body's state at each of N positions.
            running_sums: (N, D, C), sums of the embeddings of codes 0..d (the last is not used).

        Returns:
            (N, D, K) logits of every code given the ones before it.
        """
        x = torch.cat([self.in_mlp_2(hidden).unsqueeze(1), self.in_mlp_1(running_sums[:, :-1])], dim=1) + self.pos_emb_d
        return self.classifier_mlp(self.head_transformer(x))

    def weights(self) -> DepthWeights:
        """The parameters as `unifiedar.ops.depth_decode` takes them."""
        hidden = None if isinstance(self.in_mlp_2, nn.Identity) else _pair(self.in_mlp_2)
        blocks = tuple(cast(_Block, block).weights() for block in self.head_transformer.blocks)
        head = self.classifier_mlp
        norm, linear = _pair(head.layer_norm), _pair(head.linear)
        heads = self.head_transformer.num_heads
        return DepthWeights(self.pos_emb_d, _pair(self.in_mlp_1), hidden, blocks, norm, linear, heads)

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_kept": None}  # a copy or a file of the module has no use for packed weights

    def _packed(self, weights: DepthWeights) -> Tensor:
        """The packed weights, made anew when a parameter was replaced, moved or written to."""
        parameters = list(self.parameters())
        state = [(id(p), p._version, p.data_ptr()) for p in parameters]
        if self._kept is None or self._kept[0] != state:
            self._kept = None  # its memory is free while the new ones are made
            self._kept = (state, depth_pack(weights), parameters)  # parameters are held: their ids stay theirs
        return self._kept[1]

    @torch.no_grad()
    def decode(
        self,
        hidden: Tensor,
        codebook: Tensor,
        *,
        guidance: float | Tensor | None = None,
        temperature: float | Sequence[float] = 1.0,
        top_k: int | Sequence[int] = 0,
        top_p: float | Sequence[float] = 0.0,
        noise: Tensor | None = None,
        generator: torch.Generator | None = None,
        forced: Tensor | None = None,
        return_logits: bool = False,
        backend: str = "auto",
    ) -> DepthCodes:
        """Emit the D codes of each position; keys and values of earlier depths are kept, so that no work is repeated.

        Args:
            hidden: (N, hidden_dim); with `guidance` (2N, hidden_dim), conditional rows first.
            codebook: (K, C) or (D, K, C), as `unifiedar.ops.residual_lookup` takes it.
            guidance, temperature, top_k, top_p, generator: as `unifiedar.ops.sample_codes`; temperature, top_k and
                top_p may be one number for each depth.
            noise: (N, D, K) ~ Exp(1) that decides the draws, drawn from `generator` if None.
            forced: (N, D) int64 codes to go through instead of drawing any, for a look at the logits.
            return_logits: whether to return the logits of every depth, too.
            backend: "auto", "cuda" or "eager". The CUDA kernel reads a packed copy of the weights, which is made at the
                first call, kept beside them and made anew when they change.

        Returns:
            `DepthCodes`: codes (N, D) int64, the sum of their embeddings (N, C) in the codebook's dtype, at which depth
            logits were NaN (`require_sound` looks), and the logits (rows, D, K) before guidance or None.

        Raises:
            TypeError, ValueError: as `unifiedar.ops.depth_decode` says.
        """
        weights = self.weights()
        packed = self._packed(weights) if wants_packed(hidden, codebook, weights, backend) else None
        return depth_decode(
            hidden,
            codebook,
            weights,
            guidance=guidance,
            temperature=temperature,
            top_k=top_k,
            top_p=top_p,
            noise=noise,
            generator=generator,
            forced=forced,
            return_logits=return_logits,
            packed=packed,
            backend=backend,
        )


def require_sound(function: str, unsound: Sequence[Tensor], first: int = 0) -> None:
    """Raises FloatingPointError if logits of any position were NaN; waits for the GPU to look.

    Args:
        function: whose error it is.
        unsound: for each position in turn (N,), as `DepthCodes` has it.
        first: number of the first of these positions.
    """
    found = torch.stack(list(unsound)).cpu() if unsound else torch.empty(0, 0)
    if (found >= 0).any():
        position, row = (found >= 0).nonzero()[0].tolist()
        raise FloatingPointError(
            f"{function}: logits must not be NaN, got some in picture {row} at position {first + position}, "
            f"depth {int(found[position, row])}"
        )
