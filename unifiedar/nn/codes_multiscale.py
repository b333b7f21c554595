"""VAR's multi-scale quantizer (Tian et al., arXiv:2404.02905, section 3.2), under the keys of its published weights.

The keys are those of `quantize.*` in VAR's tokenizer: `embedding.weight`, `ema_vocab_hit_SV`, and the convolutions as
`quant_resi.qresi_ls.{p}.*` (several, shared), `quant_resi.qresi.*` (one) or `quant_resi.{s}.*` (one a scale).
"""

from collections.abc import Sequence
from typing import Any, Literal, NamedTuple, cast

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn

from unifiedar.ops import Phi, _checks, multiscale_inputs, multiscale_lookup, multiscale_quantize, next_scale_input

__all__ = ["MultiScaleQuantized", "MultiScaleQuantizer", "ScaleBook", "phi_of"]

Scale = int | tuple[int, int]


class MultiScaleQuantized(NamedTuple):
    """Result of `MultiScaleQuantizer.forward`: features with a straight-through gradient, usages, loss."""

    features: Tensor  # (B, C, H, W) float32
    usages: list[float] | None  # percent of the codes in use, by scale
    loss: Tensor  # () float32


def phi_of(module: nn.Module, ratio: float, step: int | None = None, steps: int = 1) -> Phi | None:
    """The convolutions in a module as the ops take them, None if there are none.

    Args:
        module: holds the 3 x 3 convolutions, in VAR's order.
        ratio: share of the convolution in what follows upsampling.
        step, steps: ask for the one convolution of scale `step` of `steps`, uncopied; else all of them, stacked.
    """
    convs = [one for one in module.modules() if isinstance(one, nn.Conv2d)]
    if not convs:
        return None
    if step is not None:
        convs = [convs[Phi.indices_of(len(convs), steps)[step]]]
    pairs = [(one.weight, cast(Tensor, one.bias)) for one in convs]
    if len(pairs) == 1:
        return Phi(pairs[0][0][None], pairs[0][1][None], ratio)
    weight, bias = (torch.stack(tensors) for tensors in zip(*pairs, strict=True))
    return Phi(weight, bias, ratio)


class ScaleBook(NamedTuple):
    """What a next-scale transformer needs of a quantizer: code vectors, convolutions, and the scales of its own.

    The same codebook serves several schedules; a quantizer's scales are those that its tokenizer encodes with.
    """

    table: Tensor  # (K, C)
    convolutions: nn.Module  # in VAR's order
    ratio: float  # share of the convolution in what follows upsampling
    scales: tuple[Scale, ...]

    def inputs(self, codes: Sequence[Tensor]) -> Tensor:
        """What is read before each scale but the first, (B, L - h_0 w_0, C), of codes (B, h w) int64 of every scale."""
        return multiscale_inputs(codes, self.table, phi_of(self.convolutions, self.ratio), self.scales)

    def add(self, total: Tensor, drawn: Tensor, step: int) -> tuple[Tensor, Tensor | None]:
        """The sum (B, C, H, W) with one scale more, and its mean in the size of the next, (B, h' w', C), or None.

        Args:
            total: the sum of the scales before.
            drawn: (B, h w) int64 codes of scale `step`, or vectors (B, h w, C).
            step: the scale.
        """
        phi = phi_of(self.convolutions, self.ratio, step, len(self.scales))
        return next_scale_input(total, drawn, self.table, phi, self.scales, step)


class MultiScaleQuantizer(nn.Module):
    """Quantizes a feature map as a sum of upsampled maps of code vectors, coarse scales first.

    Beside `forward` it has the four methods that VAR's models and trainer call, under their names.

    Args:
        num_codes: K.
        dim: C, width of a code vector.
        scales: of the maps, integers (square) or (h, w), none larger than the last.
        convolutions: P, how many 3 x 3 convolutions the scales share (VAR's `share_quant_resi`), or 0 for one a scale.
        ratio: share of the convolution in what follows upsampling (VAR's `quant_resi`); at 1e-6 or below, whatever the
            sign, there are none.
        metric: of the search, "l2" or "cosine" (VAR's `using_znorm`).
        beta: weight of the commitment loss.

    Buffers:
        ema_vocab_hit_SV (S, K) float32: running number of vectors per code and step, by scale.
        record_hit () int64, not saved: how many scales of how many steps that average has seen.
    """

    ema_vocab_hit_SV: Tensor
    record_hit: Tensor

    def __init__(
        self,
        num_codes: int,
        dim: int,
        scales: Sequence[Scale],
        *,
        convolutions: int = 4,
        ratio: float = 0.5,
        metric: Literal["l2", "cosine"] = "l2",
        beta: float = 0.25,
    ):
        super().__init__()
        if metric not in ("l2", "cosine"):
            raise ValueError(f"MultiScaleQuantizer: metric must be 'l2' or 'cosine', got {metric!r}")
        for name, value, least in (("num_codes", num_codes, 1), ("dim", dim, 1), ("convolutions", convolutions, 0)):
            _checks.check_integer("MultiScaleQuantizer", name, value, least)
        for name, number in (("ratio", ratio), ("beta", beta)):
            _checks.check_number("MultiScaleQuantizer", name, number)
        if not scales:
            raise ValueError("MultiScaleQuantizer: scales must name at least one, got none")
        self.num_codes, self.dim, self.scales, self.metric, self.beta = num_codes, dim, tuple(scales), metric, beta
        self.ratio = abs(ratio) if abs(ratio) > 1e-6 else 0.0
        count = (convolutions or len(scales)) if self.ratio else 0
        convs = nn.ModuleList([nn.Conv2d(dim, dim, 3, padding=1) for _ in range(count)])
        self.quant_resi: nn.Module = convs
        if count and convolutions == 1:
            self.quant_resi = nn.ModuleDict({"qresi": convs[0]})
        elif count and convolutions:
            self.quant_resi = nn.ModuleDict({"qresi_ls": convs})
        self.embedding = nn.Embedding(num_codes, dim)
        self.register_buffer("ema_vocab_hit_SV", torch.zeros(len(scales), num_codes))
        self.register_buffer("record_hit", torch.zeros((), dtype=torch.int64), persistent=False)

    def extra_repr(self) -> str:
        return f"scales={self.scales}, metric={self.metric}, ratio={self.ratio}, beta={self.beta}"

    @property
    def phi(self) -> Phi | None:
        """The convolutions as the ops take them: stacked, so one copy of them."""
        return phi_of(self.quant_resi, self.ratio)

    def book(self, scales: Sequence[Scale] | None = None) -> ScaleBook:
        """Its code vectors and convolutions for a transformer of these scales; None is the quantizer's own."""
        return ScaleBook(self.embedding.weight, self.quant_resi, self.ratio, tuple(scales or self.scales))

    def _phi_of(self, step: int) -> Phi | None:
        return phi_of(self.quant_resi, self.ratio, step, len(self.scales))

    def forward(self, x: Tensor, ret_usages: bool = False) -> MultiScaleQuantized:
        """Quantize x (B, C, H, W) float for training the tokenizer; in float32 whatever the dtype of x, or autocast.

        In training mode it also counts code usage, over all ranks of the default process group if there is one (the
        published code counts only if there is).

        Args:
            x: the features.
            ret_usages: whether to look up the usages, which waits for a GPU.

        Returns:
            MultiScaleQuantized(features float32, of the value of all scales' sum, gradient passed straight to x;
            usages or None: by scale, percent of the codes that are chosen at least .08 B H W / K times a step and rank
            on average; loss (): mean over scales of mse(sum so far, stop_gradient(x)), which trains codebook and
            convolutions, plus beta mse(stop_gradient(sum so far), x)).
        """
        _checks.check_tensor("MultiScaleQuantizer", "x", x)
        x = x.float()
        table, phi = self.embedding.weight, self.phi
        codes = multiscale_quantize(x.detach(), table, phi, self.scales, metric=self.metric)
        if self.training:
            self._count(codes)
        with torch.autocast(x.device.type, enabled=False):
            sums = multiscale_lookup(codes, table, phi, self.scales, cumulative=True)
            target = x.detach()
            loss = self.beta * (sums.detach() - x).square().mean() + (sums - target).square().mean()
        usages = self._usages(x) if ret_usages else None
        return MultiScaleQuantized((sums[-1].detach() - target) + x, usages, loss)

    @torch.no_grad()
    def _count(self, codes: list[Tensor]) -> None:
        steps, num_codes = self.ema_vocab_hit_SV.shape
        keys = torch.cat([one.reshape(-1) + s * num_codes for s, one in enumerate(codes)])
        hits = torch.zeros(steps * num_codes, device=keys.device).index_add_(0, keys, torch.ones_like(keys).float())
        if dist.is_available() and dist.is_initialized():
            dist.all_reduce(hits)
        # As published: a scale of a step counts as one, so that only the very first row starts from a copy.
        seen = self.record_hit + torch.arange(steps, device=keys.device)
        weight = torch.where(seen < 100, 0.1, 0.01).masked_fill(seen == 0, 1)
        hits = hits.to(self.ema_vocab_hit_SV.dtype)  # a whole model may have been cast
        self.ema_vocab_hit_SV.lerp_(hits.view(steps, num_codes), weight.to(hits.dtype)[:, None])
        self.record_hit += steps

    def _usages(self, x: Tensor) -> list[float]:
        ranks = dist.get_world_size() if dist.is_available() and dist.is_initialized() else 1
        margin = ranks * (x.numel() / x.shape[1]) / self.num_codes * 0.08
        return cast(list[float], ((self.ema_vocab_hit_SV >= margin).float().mean(1) * 100).tolist())

    def embed(self, codes: Sequence[Tensor], *, cumulative: bool = False) -> Tensor:
        """The map (B, C, H, W) of codes (B, h w) of the first n scales, or all running sums (n, B, C, H, W).

        Differentiable in codebook and convolutions.
        """
        return multiscale_lookup(codes, self.embedding.weight, self.phi, self.scales, cumulative=cumulative)

    def f_to_idxBl_or_fhat(self, f: Tensor, to_fhat: bool, v_patch_nums: Sequence[Scale] | None = None) -> list[Tensor]:
        """Codes of f (B, C, H, W) at every scale, (B, h w) int64 each, or the sums after each scale, (B, C, H, W).

        Args:
            f: the features.
            to_fhat: whether to return the sums.
            v_patch_nums: other scales than the module's; the last must be (H, W).
        """
        scales, table, phi = v_patch_nums or self.scales, self.embedding.weight, self.phi
        codes = multiscale_quantize(f.detach(), table, phi, scales, metric=self.metric)
        return list(multiscale_lookup(codes, table, phi, scales, cumulative=True)) if to_fhat else codes

    def idxBl_to_var_input(self, gt_ms_idx_Bl: Sequence[Tensor]) -> Tensor:
        """What VAR reads before each scale but the first, (B, L - h_0 w_0, C), from codes (B, h w) of every scale."""
        return multiscale_inputs(gt_ms_idx_Bl, self.embedding.weight, self.phi, self.scales)

    @torch.no_grad()
    def embed_to_fhat(
        self,
        ms_h_BChw: Sequence[Tensor],
        all_to_max_scale: bool = True,
        last_one: bool = False,
    ) -> list[Tensor] | Tensor:
        """Sums of maps of vectors (B, C, h, w), one a scale: after each scale, or with `last_one` after all.

        Each sum has the size of the last scale or, with `all_to_max_scale` False, that of its own scale: then what was
        summed is upsampled instead of what is added (VAR keeps that for experiments).
        """
        batch = ms_h_BChw[0].shape[0]
        size = self._size(-1 if all_to_max_scale else 0)
        total = ms_h_BChw[0].new_zeros((batch, self.dim, *size), dtype=torch.float32)
        sums = []
        for step, maps in enumerate(ms_h_BChw):
            rows, scales, at = maps.flatten(2).transpose(1, 2), self.scales, step
            if not all_to_max_scale:
                total = F.interpolate(total, size=self._size(step), mode="bicubic")
                scales, at = (self._size(step),), 0
            total, _ = next_scale_input(total, rows, self.embedding.weight, self._phi_of(step), scales, at)
            sums.append(total)
        return total if last_one else sums

    @torch.no_grad()
    def get_next_autoregressive_input(self, si: int, SN: int, f_hat: Tensor, h_BChw: Tensor) -> tuple[Tensor, Tensor]:
        """Adds scale si to f_hat (B, C, H, W), in place.

        Args:
            si: the scale.
            SN: the number of scales, which must be the module's.
            f_hat: the sum so far.
            h_BChw: (B, C, h, w), vectors of that scale.

        Returns:
            f_hat and its mean in the size of the next scale, (B, C, h', w'); after the last scale f_hat twice.
        """
        if len(self.scales) != SN:
            raise ValueError(
                f"get_next_autoregressive_input: SN must be the number of scales, {len(self.scales)}, got {SN}"
            )
        rows = h_BChw.flatten(2).transpose(1, 2)
        total, following = next_scale_input(f_hat, rows, self.embedding.weight, self._phi_of(si), self.scales, si)
        f_hat.copy_(total)
        if following is None:
            return f_hat, f_hat
        return f_hat, following.transpose(1, 2).reshape(*f_hat.shape[:2], *self._size(si + 1))

    def _size(self, step: int) -> tuple[int, int]:
        scale = self.scales[step]
        return (scale, scale) if isinstance(scale, int) else (scale[0], scale[1])

    def _load_from_state_dict(self, state_dict: Any, prefix: str, *args: Any) -> None:
        # As published: counts for another number of scales (the same weights serve 256 and 512 pixels) are dropped.
        key = prefix + "ema_vocab_hit_SV"
        found = state_dict.get(key)
        if found is not None and found.shape[0] != len(self.scales):
            state_dict[key] = self.ema_vocab_hit_SV
        super()._load_from_state_dict(state_dict, prefix, *args)
