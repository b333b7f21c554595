"""Small depth transformers with inputs, for the tests of their decoding."""

import copy
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from unifiedar.nn import DepthTransformer
from unifiedar.ops import DepthCodes, DepthWeights, depth_decode, sample_codes

__all__ = ["Case", "drawn_from", "small_case"]


@dataclass(frozen=True)
class Case:
    """What `depth_decode` takes; settings are temperature, top_k and top_p, one for each depth."""

    module: DepthTransformer
    hidden: Tensor
    codebook: Tensor
    noise: Tensor
    guidance: float | Tensor | None
    settings: tuple[list[float], list[int], list[float]]

    @property
    def weights(self) -> DepthWeights:
        return self.module.weights()

    def to(self, where: torch.dtype | str) -> "Case":
        """The same in another dtype, or on another device; noise and guidance keep their dtype."""
        moved = self.guidance
        if isinstance(where, str) and isinstance(moved, Tensor):
            moved = moved.to(where)
        return replace(
            self,
            module=copy.deepcopy(self.module).to(where),
            hidden=self.hidden.to(where),
            codebook=self.codebook.to(where),
            noise=self.noise.to(where) if isinstance(where, str) else self.noise,
            guidance=moved,
        )

    def run(self, backend: str, **options) -> DepthCodes:
        temperature, top_k, top_p = self.settings
        options = {"noise": None if "forced" in options else self.noise} | options
        return depth_decode(
            self.hidden,
            self.codebook,
            self.weights,
            guidance=self.guidance,
            temperature=temperature,
            top_k=top_k,
            top_p=top_p,
            backend=backend,
            **options,
        )


def small_case(
    rows: int = 1,
    guidance: float | str | None = None,
    dim: int = 192,
    layers: int = 2,
    depth: int = 3,
    num_codes: int = 101,
    code_dim: int = 40,
    hidden_dim: int = 128,
    projected: bool = True,
    shared: bool = True,
    dtype: torch.dtype = torch.bfloat16,
    book_dtype: torch.dtype | None = None,
    greedy: bool = False,
    seed: int = 0,
) -> Case:
    """A case with weights large enough that codes depend on all that is before them; with guidance "rows" one a row."""
    torch.manual_seed(seed)
    module = DepthTransformer(hidden_dim if projected else None, code_dim, dim, layers, dim // 64, depth, num_codes)
    with torch.no_grad():
        for name, parameter in module.named_parameters():
            if "ln" in name or "norm" in name:
                parameter.add_(torch.randn_like(parameter), alpha=0.2)
            elif parameter.ndim == 2:
                parameter.normal_(std=1.5 / parameter.shape[1] ** 0.5)
            else:
                parameter.normal_(std=0.3)
    count = rows // 2 if guidance is not None else rows
    cut = [(1.0, 0, 0.0), (0.8, num_codes // 3, 0.9), (1.3, num_codes // 2, 0.0), (1.0, 0, 0.7)]
    settings = [(0.0, 0, 0.0) if greedy else cut[(d + seed) % len(cut)] for d in range(depth)]
    return Case(
        module.to(dtype).eval(),
        torch.randn(rows, hidden_dim if projected else dim).to(dtype),
        torch.randn(*(() if shared else (depth,)), num_codes, code_dim).to(book_dtype or dtype),
        torch.empty(count, depth, num_codes).exponential_(),
        torch.linspace(1, 4, count) if guidance == "rows" else guidance,
        tuple(map(list, zip(*settings, strict=True))),
    )


def drawn_from(logits: Tensor, case: Case) -> Tensor:
    """The codes (N, D) that the definition of the draw makes of these logits."""
    drawn = [
        sample_codes(
            logits[:, d],
            guidance=case.guidance,
            temperature=temperature,
            top_k=top_k,
            top_p=top_p,
            noise=case.noise[:, d] if temperature else None,
            backend="eager",
        )
        for d, (temperature, top_k, top_p) in enumerate(zip(*case.settings, strict=True))
    ]
    return torch.stack(drawn, dim=1)
