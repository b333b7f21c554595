"""Drawing with a VAR: the tensors of a generation at fixed places and its steps, which a GPU replays as graphs."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from unifiedar import engine
from unifiedar.nn import ScaleBook

if TYPE_CHECKING:
    from unifiedar.models.var import VAR

__all__ = ["Capture", "Edit", "Session"]

AHEAD = 2**28  # bytes of noise, up to which every scale's has a place of its own, and is drawn beside other work


class Edit(NamedTuple):
    """Codes to keep, and where: a mask (N, h, w) of the last scale's size, 1 where they stay."""

    codes: list[Tensor]
    mask: Tensor

    def rows(self, begin: int, end: int) -> Edit:
        """Of some of the pictures."""
        return Edit([one[begin:end] for one in self.codes], self.mask[begin:end])


class Capture(NamedTuple):
    """What `VAR.captures` says of one session on a GPU."""

    batch: int  # pictures that it draws at once
    guided: bool
    more_smooth: bool
    edits: bool
    seconds: float  # that capturing it took


class Session:
    """The tensors of a generation of so many pictures, at fixed places, and its steps: begin, every scale, paint.

    `held`: the weights that its graphs read, so that they may run before anyone looks whether the model still has
    these; None where nobody holds them, and nobody may.

    What a caller fills in place: `labels` and what settings there are, one a picture; before each scale `noise` (and
    `gumbel`), samples of Exp(1); to edit, `given` and `mask`. What is there afterwards: `drawn`, `total`, `pictures`.
    """

    def __init__(
        self,
        model: VAR,
        book: ScaleBook,
        paint: Callable[[Tensor], Tensor] | None,
        batch: int,
        *,
        guided: bool,
        smooth: bool,
        edits: bool,
        graphs: bool,
    ):
        config, device = model.config, model.device
        self.model, self.book, self.batch, self.guided, self.smooth = model, book, batch, guided, smooth
        self.lengths, self.rows = config.lengths, batch * (2 if guided else 1)
        self.labels = torch.zeros(batch, dtype=torch.int64, device=device)
        self.cfg = torch.zeros(batch, dtype=torch.float32, device=device)
        self.top_k = torch.zeros(batch, dtype=torch.int64, device=device)
        self.top_p = torch.zeros(batch, dtype=torch.float64, device=device)
        self._settings: tuple[float, int, float] | None = None  # that these three hold
        noise = batch * sum(self.lengths) * config.num_codes * (2 if smooth else 1) * model.wide.itemsize
        self._ahead = graphs and noise <= AHEAD
        self._aside = torch.cuda.Stream(device) if self._ahead and device.type == "cuda" else None
        draws = batch * config.num_codes * (sum(self.lengths) if self._ahead else max(self.lengths))
        self._noise = torch.ones(draws, dtype=model.wide, device=device)
        self._gumbel = torch.ones(draws, dtype=model.wide, device=device) if smooth else self._noise
        self.given = [torch.zeros(batch, n, dtype=torch.int64, device=device) for n in self.lengths if edits]
        self.mask = torch.zeros(batch, *config.sizes[-1], device=device)
        self.edits = edits
        # What is cached of the last scale is read at that scale alone, in its own block. It lies where the block before
        # keeps the scales before, which nobody reads any more by then: a head's tokens of all blocks are one row, the
        # last block's first, and a block's reach into the next in it.
        before, last, depth = sum(self.lengths[:-1]), self.lengths[-1], model.config.depth
        first = next(model._each()).attn
        self.cache = first.new_cache(self.rows, depth * before + last, dtype=model.dtype)
        begins = [(depth - 1 - i) * before for i in range(depth)]
        self.caches = [self.cache[:, :, :, begin : begin + before + last] for begin in begins]
        self.codes: list[Tensor] = [torch.empty(0)] * len(self.lengths)
        # Not one graph of it all: it begins when the host has put all launches down, half a millisecond for the 1,650
        # of a picture, which for all graphs but the first passes while the GPU is at the one before. From one to the
        # next takes that two microseconds.
        steps: list[Callable[[], None]] = [self._begin, *(self._step(i) for i in range(len(self.lengths)))]
        self.paints = paint is not None
        if paint is not None:
            steps.append(lambda: self._paint(paint))
        self.steps = engine.Steps(steps, graphs=graphs)
        self.held: list[Tensor] | None = None

    def draw(
        self,
        labels: Tensor,
        cfg: float,
        top_k: int,
        top_p: float,
        generator: torch.Generator | None,
        edit: Edit | None,
        *,
        still: Callable[[], bool] | None = None,
        after: Session | None = None,
    ) -> tuple[Tensor, Tensor] | None:
        """Codes (N, L) of all scales, and pictures or, unless it paints, the sums of all scales, of N labels, which may
        be on the CPU.

        Args:
            still: whether this session is right for the model as it is now. It is asked when a GPU has work already,
                all of it where there is noise for that, and if not, None comes back.
            after: the session that this has just happened to, whose noise is used as far as it was drawn.
        """
        count = len(labels)
        if labels.device == self.labels.device:  # by now nobody may have looked at them
            torch.clamp(labels.long(), 0, self.model.config.num_classes, out=self.labels[:count])
        else:
            self.labels[:count].copy_(labels, non_blocking=True)  # what is not pinned is read before this returns
        if (cfg, top_k, top_p) != self._settings:  # every launch before the first graph is waited for
            self._settings = None
            self.cfg.fill_(cfg)
            self.top_k.fill_(top_k)
            self.top_p.fill_(top_p)
            self._settings = (cfg, top_k, top_p)
        if edit is not None:
            self.mask[:count] = edit.mask
            for place, one in zip(self.given, edit.codes, strict=True):
                place[:count] = one
        self.steps.run(0)
        if self._aside is not None:
            self._aside.wait_stream(torch.cuda.current_stream())
        for step in range(len(self.lengths)):
            if step == 0 or not self._ahead:
                self._fill_noise(step, count, generator, after if step == 0 else None)
            self.steps.run(1 + step)
            if step == 0 and self._ahead:
                with torch.cuda.stream(self._aside):  # beside the first scale the noise of all others
                    for later in range(1, len(self.lengths)):
                        self._fill_noise(later, count, generator, after)
                if self._aside is not None:
                    torch.cuda.current_stream().wait_stream(self._aside)
            if step == 0 and not self._ahead and self._gone(still):
                return None
        if self.paints:
            self.steps.run(len(self.steps) - 1)
        if self._ahead and self._gone(still):
            return None
        result = self.pictures if self.paints else self.total
        # The next call writes to the same memory.
        return self.drawn[:count].clone(), result[:count].clone()

    def _gone(self, still: Callable[[], bool] | None) -> bool:
        """Whether the model has other weights by now, so that nobody holds these any more."""
        if still is None or still():
            return False
        self.held = None
        return True

    def _fill_noise(self, step: int, count: int, generator: torch.Generator | None, after: Session | None) -> None:
        """With new samples, or with those of another session."""
        for gumbel in (False, True) if self.smooth else (False,):
            noise = self.noise(step, count, gumbel=gumbel)
            if after is None:
                noise.exponential_(generator=generator)
            else:
                noise.copy_(after.noise(step, count, gumbel=gumbel))

    def noise(self, step: int, count: int, *, gumbel: bool = False) -> Tensor:
        """Where samples for the first `count` pictures belong, (count, l, K), contiguous: rows as the published code
        draws them, whatever the size of the session."""
        return self._samples(step, self._gumbel if gumbel else self._noise)[:count]

    def _samples(self, step: int, memory: Tensor) -> Tensor:
        shape = (self.batch, self.lengths[step], self.model.config.num_codes)
        begin = self.batch * sum(self.lengths[:step]) * shape[2] if self._ahead else 0
        return memory[begin : begin + math.prod(shape)].view(shape)

    def _begin(self) -> None:
        model = self.model
        empty = model.config.num_classes
        labels = torch.cat((self.labels, torch.full_like(self.labels, empty))) if self.guided else self.labels
        condition = model.class_emb(labels)
        self.modulations, self.biases = model._modulations(condition), model._biases()
        self.places = model._places()
        self.tokens = model._first(condition, self.places)
        self.total = condition.new_zeros((self.batch, model.config.code_dim, *model.config.sizes[-1]), dtype=model.wide)
        self.kept = [self._kept_at(step) for step in range(len(self.lengths))] if self.edits else []

    def _kept_at(self, step: int) -> Tensor:
        """Which codes of a scale are to stay, (B, l): the mask resized, above a half; at the smallest all."""
        size = self.model.config.sizes[step]
        found = F.interpolate(self.mask[:, None], size=size, mode="bilinear").flatten(1) > 0.5
        return torch.ones_like(found) if self.lengths[step] <= 3 else found

    def _step(self, step: int) -> Callable[[], None]:
        return lambda: self._scale(step)

    def _scale(self, step: int) -> None:
        model, last = self.model, len(self.lengths) - 1
        begin = sum(self.lengths[:step])
        ratio = step / max(last, 1)
        memory = list(zip(self.caches, self.biases, strict=True))
        logits = model._logits(self.tokens, self.modulations, None, memory, begin)
        cuts: dict[str, Any] = {"top_k": self.top_k, "top_p": self.top_p}
        if self.guided:
            cuts["guidance"] = 1 + self.cfg * ratio
        drawn = codes = model.sampler(logits, self._samples(step, self._noise), **cuts)
        if self.smooth:  # ever sharper, by MaskGIT's temperatures as published
            drawn = model.sampler.average(
                logits,
                self.book.table,
                self._samples(step, self._gumbel),
                sharpness=1 + ratio,
                temperature=max(0.27 * (1 - ratio * 0.95), 0.005),
                **cuts,
            )
        if self.edits:
            keep, given = self.kept[step], self.given[step]
            codes = torch.where(keep, given, codes)
            drawn = torch.where(keep[..., None], self.book.table[given], drawn) if self.smooth else codes
        self.codes[step] = codes
        self.total, following = self.book.add(self.total, drawn, step)
        if following is not None:
            end = begin + self.lengths[step]
            tokens = model.word_embed(following.to(model.word_embed.weight.dtype)).to(model.wide)
            tokens = tokens + self.places[:, end : end + self.lengths[step + 1]]
            self.tokens = torch.cat((tokens, tokens)) if self.guided else tokens
        else:
            self.drawn = torch.cat(self.codes, 1)

    def _paint(self, paint: Callable[[Tensor], Tensor]) -> None:
        self.pictures = paint(self.total)
