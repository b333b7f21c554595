"""RQ-Transformer (Lee et al., arXiv:2203.01941, section 3.2): draws the stacked codes of a picture one by one.

Every position of an RQ-VAE's grid holds D codes. A body transformer reads the condition and, for each position so far,
the sum of its codes' embeddings; its state before a position goes to a depth transformer that emits the D codes one by
one. The model works on codes alone: the embeddings are those of the RQ-VAE's codebook, which is passed in.
"""

import contextlib
import functools
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, ClassVar, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from unifiedar import checkpoints, engine
from unifiedar.nn import DepthTransformer, ResidualQuantizer
from unifiedar.nn.depth import Classifier, Stack, require_sound

__all__ = ["RQLogits", "RQTransformer", "RQTransformerConfig"]

# Names of the depth transformer's parts in ours and in the published state_dict, which lists them beside the body.
_PUBLISHED = {
    "head.pos_emb_d": "pos_emb_d",
    "head.in_mlp_1.": "head_mlp.",
    "head.head_transformer.": "head_transformer.",
    "head.classifier_mlp.": "classifier.",
}


@dataclass(frozen=True)
class RQTransformerConfig:
    """Sizes of an RQ-Transformer.

    Attributes:
        num_codes: K of the codebook.
        code_dim: C, width of a code vector.
        grid: (H, W), positions of a picture.
        depth: D, codes per position.
        dim: width of body and head.
        num_heads: of both.
        body_layers, head_layers: blocks of the body and of the depth transformer.
        num_conditions: classes, or size of the text's vocabulary; 1 is an unconditional model.
        condition_length: Tc, tokens of a condition; more than 1 is a text, which the model learns to predict too.
        dropout: after each attention projection and MLP, in training only.
        top_k, top_p: what `generate` draws with unless told otherwise.
    """

    num_codes: int
    code_dim: int
    grid: tuple[int, int]
    depth: int
    dim: int
    num_heads: int
    body_layers: int
    head_layers: int
    num_conditions: int = 1
    condition_length: int = 1
    dropout: float = 0.1
    top_k: int = 0
    top_p: float = 0.0

    def to_dict(self) -> dict[str, Any]:
        """As plain values, for a JSON file."""
        return {"model": "rqtransformer", **asdict(self)}

    @classmethod
    def from_dict(cls, values: dict[str, Any]) -> "RQTransformerConfig":
        """Inverse of `to_dict`. Raises CheckpointError if the values are not those of an RQ-Transformer."""
        values = dict(values)
        if values.pop("model", None) != "rqtransformer":
            raise checkpoints.CheckpointError(
                "config.json does not describe an RQ-Transformer (its 'model' is not 'rqtransformer')"
            )
        try:
            height, width = values.pop("grid")
            return cls(grid=(height, width), **values)
        except (KeyError, TypeError, ValueError) as error:
            raise checkpoints.CheckpointError(f"config.json does not describe an RQ-Transformer: {error}") from error


def _published(
    num_codes: int,
    num_conditions: int,
    condition_length: int,
    dim: int,
    body_layers: int,
    head_layers: int,
    top_k: int,
    top_p: float,
) -> RQTransformerConfig:
    return RQTransformerConfig(
        num_codes=num_codes,
        code_dim=256,
        grid=(8, 8),
        depth=4,
        dim=dim,
        num_heads=dim // 64,
        body_layers=body_layers,
        head_layers=head_layers,
        num_conditions=num_conditions,
        condition_length=condition_length,
        top_k=top_k,
        top_p=top_p,
    )


class RQLogits(NamedTuple):
    """Result of `RQTransformer.forward`."""

    codes: Tensor  # (B, H, W, D, K)
    text: Tensor | None  # (B, Tc - 1, V), of tokens 1 .. Tc - 1 of the condition; None if it is one token


class RQTransformer(nn.Module):
    """The whole model: `forward` trains it, `generate` draws codes, `sample` completes a partial picture.

    Wherever embeddings are needed, `codebook` is the RQ-VAE's quantizer, or its table (K, C) or (D, K, C).

    Args:
        config: sizes, one of `RQTransformer.configs` or your own.

    Raises:
        ValueError: for a size that is not positive, a width that is no multiple of the number of heads, or a condition
            of several tokens out of a vocabulary of one.
    """

    configs: ClassVar[dict[str, RQTransformerConfig]] = {
        "ffhq": _published(2048, 1, 1, 1024, 24, 4, 250, 1.0),
        "lsun-church": _published(16384, 1, 1, 1024, 24, 4, 250, 1.0),
        "lsun-cat": _published(16384, 1, 1, 1280, 26, 4, 250, 1.0),  # and LSUN-bedroom
        "imagenet-480m": _published(16384, 1000, 1, 1536, 12, 4, 0, 0.92),
        "imagenet-821m": _published(16384, 1000, 1, 1536, 24, 4, 0, 0.92),
        "imagenet-1.4b": _published(16384, 1000, 1, 1536, 42, 6, 0, 0.92),
        "imagenet-3.8b": _published(16384, 1000, 1, 2560, 42, 6, 0, 0.92),
        "cc3m-654m": _published(16384, 16384, 32, 1280, 26, 4, 0, 0.7),
    }

    def __init__(self, config: RQTransformerConfig):
        super().__init__()
        sizes = [config.num_codes, config.code_dim, *config.grid, config.depth, config.dim, config.num_heads]
        if min(*sizes, config.num_conditions, config.condition_length) < 1:
            raise ValueError(f"RQTransformer: sizes must be at least 1, got {config}")
        if config.dim % config.num_heads:
            raise ValueError(f"RQTransformer: dim must be a multiple of num_heads {config.num_heads}, got {config.dim}")
        if config.condition_length > 1 and config.num_conditions == 1:
            raise ValueError(
                "RQTransformer: num_conditions must be at least 2 for a condition of several tokens, "
                f"got 1 for {config.condition_length}"
            )
        self.config = config
        dim, (height, width) = config.dim, config.grid
        self.pos_emb_cond = nn.Parameter(torch.zeros(1, config.condition_length, dim))
        self.pos_emb_hw = nn.Parameter(torch.zeros(1, height * width, dim))
        self.cond_emb = nn.Embedding(config.num_conditions, dim)
        self.input_mlp = nn.Linear(config.code_dim, dim)
        self.body_transformer = Stack(dim, config.body_layers, config.num_heads, config.dropout)
        self.head = DepthTransformer(
            None,
            config.code_dim,
            dim,
            config.head_layers,
            config.num_heads,
            config.depth,
            config.num_codes,
            config.dropout,
        )
        self.cond_classifier = Classifier(dim, config.num_conditions) if config.condition_length > 1 else None
        self._sessions = engine.Pool(4)
        nn.init.normal_(self.pos_emb_cond, std=0.02)
        nn.init.normal_(self.pos_emb_hw, std=0.02)
        self.register_state_dict_post_hook(_to_published)
        self.register_load_state_dict_pre_hook(_from_published)
        self.register_load_state_dict_post_hook(_name_missing)

    @property
    def device(self) -> torch.device:
        """Where the weights are."""
        return self.pos_emb_hw.device

    @property
    def dtype(self) -> torch.dtype:
        """Of the weights."""
        return self.pos_emb_hw.dtype

    @property
    def products(self) -> torch.dtype:
        """Of the weights of matrix products, see `cast_products`."""
        return self.head.classifier_mlp.linear.weight.dtype

    def cast_products(self, dtype: torch.dtype) -> "RQTransformer":
        """Put the head, and the body's weights of matrix products, in a dtype, in place; the body's states stay.

        What autocast does at every use, done once. Keys and values are cached in it. For drawing: `forward` wants one
        dtype for all.

        Args:
            dtype: float32, bfloat16 or float16.

        Returns:
            The model itself.

        Raises:
            TypeError: for another dtype.
        """
        if dtype not in (torch.float32, torch.bfloat16, torch.float16):
            raise TypeError(f"cast_products: dtype must be float32, bfloat16 or float16, got {dtype}")
        for part in self.body_transformer.modules():
            if isinstance(part, nn.Linear):
                part.to(dtype)
        self.head.to(dtype)
        return self

    # ---- loading and saving

    @classmethod
    def from_checkpoint(
        cls,
        path: str | Path,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
        *,
        config: RQTransformerConfig | None = None,
    ) -> "RQTransformer":
        """Load a model in eval mode.

        Args:
            path: a folder that `save` wrote, or a weights file; a published `model.pt` does.
            device: where to put it, the CPU if None.
            dtype: of the weights, as stored if None.
            config: sizes. None takes those of config.json in the folder or beside the file or, where there is none of
                this model, the published ones that have the file's keys and shapes.

        Raises:
            CheckpointError: one sentence with the file, what is wrong with it and the way out.
        """
        folder = checkpoints.resolve(path)
        beside = (folder if folder.is_dir() else folder.parent) / checkpoints.CONFIG
        if config is None and (folder.is_dir() or beside.is_file()):
            values = checkpoints.read_config(folder)
            if folder.is_dir() or values.get("model") == "rqtransformer":  # a file may lie beside another model's
                config = RQTransformerConfig.from_dict(values)
        tensors = checkpoints.load_tensors(folder)
        model = _on_meta(config) if config is not None else _find_published(tensors, folder)
        checkpoints.assign(model, tensors, folder)
        return model.to(device=device, dtype=dtype or model.dtype).eval().requires_grad_(False)

    def save(self, folder: str | Path) -> None:
        """Write weights and config to a folder for `from_checkpoint`, replacing one that is there, atomically."""
        checkpoints.save(
            folder, self.state_dict(), self.config.to_dict(), overwrite=True, max_shard_bytes=4_000_000_000
        )

    # ---- inputs

    def _table(self, function: str, codebook: Tensor | ResidualQuantizer) -> Tensor:
        """The codebook as (K, C) or (D, K, C)."""
        config = self.config
        table = codebook.table if isinstance(codebook, ResidualQuantizer) else codebook
        if not isinstance(table, Tensor):
            raise TypeError(
                f"{function}: codebook must be a tensor or a ResidualQuantizer, got {type(codebook).__name__}"
            )
        shape = (config.num_codes, config.code_dim)
        if table.shape not in (shape, (config.depth, *shape)):
            raise ValueError(
                f"{function}: codebook must be {shape} or {(config.depth, *shape)}, got {tuple(table.shape)}"
            )
        if table.device != self.device:
            raise ValueError(f"{function}: codebook must be on the model's device {self.device}, got {table.device}")
        return table

    def _check_codes(self, function: str, codes: Tensor) -> None:
        if not isinstance(codes, Tensor) or codes.dtype != torch.int64:
            got = codes.dtype if isinstance(codes, Tensor) else type(codes).__name__
            raise TypeError(f"{function}: codes must be an int64 tensor, got {got}")
        shape = (*self.config.grid, self.config.depth)
        if codes.ndim != 4 or codes.shape[1:] != shape:
            raise ValueError(f"{function}: codes must be (B, {', '.join(map(str, shape))}), got {tuple(codes.shape)}")

    def _condition(self, function: str, argument: str, cond: Tensor | None, batch: int, *, values: bool) -> Tensor:
        """The condition as (B, Tc); `values` looks into it, which waits for a GPU."""
        length, count = self.config.condition_length, self.config.num_conditions
        if cond is None:
            if count > 1:
                raise ValueError(f"{function}: {argument} must be given, the model has {count} conditions, got None")
            cond = torch.zeros(batch, 1, dtype=torch.int64, device=self.device)
        if not isinstance(cond, Tensor) or cond.dtype != torch.int64:
            got = cond.dtype if isinstance(cond, Tensor) else type(cond).__name__
            raise TypeError(f"{function}: {argument} must be an int64 tensor, got {got}")
        if cond.shape != (batch, length) and not (length == 1 and cond.shape == (batch,)):
            rule = f"({batch},)" if length == 1 else f"({batch}, {length})"
            raise ValueError(f"{function}: {argument} must be {rule}, got {tuple(cond.shape)}")
        cond = cond.to(self.device).view(batch, length)
        if values and batch:
            low, high = (int(value) for value in cond.aminmax())
            if low < 0 or high >= count:
                raise ValueError(f"{function}: {argument} must be from 0 to {count - 1}, got {low} to {high}")
        return cond

    def _prefix(self, cond: Tensor) -> Tensor:
        """What the body reads first: a condition (B, Tc) to (B, Tc, dim)."""
        return self.cond_emb(cond) + self.pos_emb_cond

    def _positions(self, sums: Tensor, begin: int) -> Tensor:
        """What the body reads at positions begin, begin + 1 ...: (B, L, C) sums over all depths to (B, L, dim).

        The paper's sum over depths of the projected embeddings, with the projection taken out of it: D biases remain.
        """
        bias = self.input_mlp.bias * self.config.depth
        places = self.pos_emb_hw[:, begin : begin + sums.shape[1]]
        return F.linear(sums.to(self.dtype), self.input_mlp.weight, bias) + places

    # ---- training

    def forward(self, codes: Tensor, codebook: Tensor | ResidualQuantizer, cond: Tensor | None = None) -> RQLogits:
        """Teacher-forced logits.

        Args:
            codes: (B, H, W, D) int64.
            codebook: whose rows the codes name.
            cond: (B,) int64 classes, (B, Tc) int64 text tokens, or None for an unconditional model.

        Returns:
            Logits (B, H, W, D, K) of every code given those before it, and those of the text, in the weights' dtype.

        Raises:
            TypeError, ValueError: for codes, codebook or cond of another dtype or shape or, on the CPU, a code or
                condition out of range.
        """
        self._check_codes("forward", codes)
        table = self._table("forward", codebook)
        batch, height, width, depth = codes.shape
        looks = self.device.type == "cpu" and not torch.compiler.is_compiling()
        prefix = self._prefix(self._condition("forward", "cond", cond, batch, values=looks))
        sums = self.head.running_sums(codes.flatten(1, 2), table)
        x = torch.cat([prefix, self._positions(sums[:, :-1, -1], 0)], dim=1)
        hidden = self.body_transformer(x)
        last = prefix.shape[1] - 1
        logits = self.head(hidden[:, last:].flatten(0, 1), sums.flatten(0, 1).to(self.dtype))
        text = None if self.cond_classifier is None else self.cond_classifier(hidden[:, :last])
        return RQLogits(logits.view(batch, height, width, depth, -1), text)

    def loss(
        self, logits: RQLogits, targets: Tensor, cond: Tensor | None = None, *, text_weight: float = 0.1
    ) -> Tensor:
        """Mean cross-entropy of codes and text, in nats.

        Args:
            logits: what `forward` returned.
            targets: (B, H, W, D) int64 codes or, as the published models were trained (section 3.2.3), soft ones: their
                probabilities (B, H, W, D, K), `ResidualQuantizer.get_soft_codes` at temperature 0.5.
            cond: (B, Tc) int64 text tokens; needed where there are logits of the text.
            text_weight: share of the text's loss where there is one, that of the codes is 1 - text_weight. 0.1 as
                published.

        Returns:
            () float32 (float64 for float64 logits). The published code adds 1e-7 inside the logarithm of the softmax,
            which moves the loss by less than that.

        Raises:
            ValueError: for targets or cond whose shape does not match the logits.
        """
        scores = logits.codes if logits.codes.dtype == torch.float64 else logits.codes.float()
        soft = targets.is_floating_point()
        if targets.shape != (scores.shape if soft else scores.shape[:-1]):
            raise ValueError(
                f"loss: targets must be {tuple(scores.shape[:-1])} codes or {tuple(scores.shape)} probabilities, "
                f"got {tuple(targets.shape)}"
            )
        target = targets.flatten(0, -2).to(scores.dtype) if soft else targets.flatten()
        loss = F.cross_entropy(scores.flatten(0, -2), target)
        if logits.text is None:
            return loss
        expected = (logits.text.shape[0], logits.text.shape[1] + 1)
        if cond is None or cond.shape != expected:
            got = None if cond is None else tuple(cond.shape)
            raise ValueError(f"loss: cond must be {expected} to match the logits of the text, got {got}")
        text = F.cross_entropy(logits.text.to(scores.dtype).flatten(0, 1), cond[:, 1:].flatten())
        return (1 - text_weight) * loss + text_weight * text

    # ---- inference

    @torch.no_grad()
    def generate(
        self,
        codebook: Tensor | ResidualQuantizer,
        *,
        count: int | None = None,
        cond: Tensor | None = None,
        guidance: float | Tensor | None = None,
        unconditional: Tensor | None = None,
        temperature: float | Sequence[float] = 1.0,
        top_k: int | Sequence[int] | None = None,
        top_p: float | Sequence[float] | None = None,
        seed: int | Sequence[int] = 0,
        progress: Callable[[int], object] | None = None,
        graphs: bool = False,
    ) -> Tensor:
        """Draw the codes of whole pictures.

        Args:
            codebook: whose rows the codes name.
            count: N, pictures; if None one for each row of cond, or one.
            cond: (N,) int64 classes, (N, Tc) int64 text tokens, or None for an unconditional model.
            guidance, unconditional, temperature, graphs: as `sample`.
            top_k, top_p: as `sample`; what is None is taken from `config`.
            seed: of picture i is seed + i, or seed[i] of a sequence. The noise is drawn on the CPU for each picture by
                itself, so that a picture does not depend on the others of its batch.
            progress: called with the number of positions finished since the last call.

        Returns:
            (N, H, W, D) int64 on the model's device.

        Raises:
            TypeError, ValueError: as `sample`, and for a count or number of seeds that does not match cond.
        """
        config, (height, width) = self.config, self.config.grid
        given = len(cond) if isinstance(cond, Tensor) and cond.ndim else None
        rows = count if count is not None else 1 if given is None else given
        if rows < 0 or given not in (None, rows):
            rule = "at least 0" if given is None else f"{given}, the rows of cond"
            raise ValueError(f"generate: count must be {rule}, got {count}")
        seeds = [seed + i for i in range(rows)] if isinstance(seed, int) else list(seed)
        if len(seeds) != rows:
            raise ValueError(f"generate: seed must be a number or one for each of {rows} pictures, got {len(seeds)}")
        generators = [torch.Generator().manual_seed(s) for s in seeds]
        shape = (config.depth, config.num_codes)

        def noise(position: int) -> Tensor:
            return torch.stack([torch.empty(shape).exponential_(generator=g) for g in generators]).to(self.device)

        return self._draw(
            "generate",
            torch.zeros(rows, height, width, config.depth, dtype=torch.int64, device=self.device),
            codebook,
            cond,
            (0, 0),
            guidance,
            unconditional,
            noise,
            progress,
            graphs,
            temperature=temperature,
            top_k=config.top_k if top_k is None else top_k,
            top_p=config.top_p if top_p is None else top_p,
        )

    @torch.no_grad()
    def sample(
        self,
        partial: Tensor,
        codebook: Tensor | ResidualQuantizer,
        *,
        cond: Tensor | None = None,
        start: tuple[int, int] = (0, 0),
        guidance: float | Tensor | None = None,
        unconditional: Tensor | None = None,
        temperature: float | Sequence[float] = 1.0,
        top_k: int | Sequence[int] = 0,
        top_p: float | Sequence[float] = 0.0,
        noise: Tensor | None = None,
        generator: torch.Generator | None = None,
        progress: Callable[[int], object] | None = None,
        graphs: bool = False,
    ) -> Tensor:
        """Keep the codes of a picture before a position, in reading order, and draw those from there on.

        Args:
            partial: (N, H, W, D) int64; what stands at `start` and after it is ignored.
            codebook: whose rows the codes name.
            cond: (N,) int64 classes, (N, Tc) int64 text tokens, or None for an unconditional model.
            start: (row, column) of the first position to draw.
            guidance: strength g of classifier-free guidance u + g (c - u) on the logits: a number, or (N,), one a
                picture; None is off. The published models know no empty condition: it is `unconditional` that says what
                to lead away from.
            unconditional: as cond, the condition of the logits u; given with guidance, and only then.
            temperature, top_k, top_p: as `unifiedar.ops.sample_codes`, each one number or one for each depth.
            noise: (N, H, W, D, K) float32 ~ Exp(1) that decides the draws, drawn from `generator` if None, depth by
                depth, as the published code draws its own.
            generator: on the model's device; torch's default one if None.
            progress: called with the number of positions finished since the last call.
            graphs: whether to capture a CUDA graph of each row of positions at the first call of a batch and its
                settings, and to replay it at later ones. What four such calls need is kept (`forget_captures` lets go).

        Returns:
            (N, H, W, D) int64 on the model's device.

        Raises:
            TypeError: for an argument of another type or dtype.
            ValueError: for a shape that does not match, a condition out of range or missing, a start outside the grid,
                guidance without `unconditional` or the other way round, and what `sample_codes` refuses.
            FloatingPointError: if logits are NaN, naming picture, position and depth.

        Note:
            Put the model in eval mode first. Keys and values of earlier positions and depths are kept in memory that is
            allocated once. The published code, top_p 1 or not, drops what lies behind a float32 sum of probabilities
            that reaches 1 early; here 1 is off.
        """
        self._check_codes("sample", partial)
        shape = (*partial.shape, self.config.num_codes)
        if noise is not None:
            if noise.shape != shape:
                raise ValueError(f"sample: noise must be {shape}, got {tuple(noise.shape)}")
            if generator is not None:
                raise ValueError(f"sample: generator must be None when noise is given, got {generator}")
        flat = None if noise is None else noise.flatten(1, 2)
        return self._draw(
            "sample",
            partial,
            codebook,
            cond,
            start,
            guidance,
            unconditional,
            generator if flat is None else lambda position: flat[:, position],
            progress,
            graphs,
            temperature=temperature,
            top_k=top_k,
            top_p=top_p,
        )

    def forget_captures(self) -> None:
        """Let go of captured graphs and their memory; the next call captures anew."""
        self._sessions.clear()

    def _draw(
        self,
        function: str,
        partial: Tensor,
        codebook: Tensor | ResidualQuantizer,
        cond: Tensor | None,
        start: tuple[int, int],
        guidance: float | Tensor | None,
        unconditional: Tensor | None,
        noise: Callable[[int], Tensor] | torch.Generator | None,
        progress: Callable[[int], object] | None,
        graphs: bool,
        **settings: Any,
    ) -> Tensor:
        """`sample`, with the noise (N, D, K) of each position asked for, or drawn; settings are those of the head."""
        config, (height, width) = self.config, self.config.grid
        table = self._table(function, codebook)
        if len(start) != 2 or not all(isinstance(s, int) for s in start):
            raise TypeError(f"{function}: start must be two integers, got {start}")
        if not (0 <= start[0] < height and 0 <= start[1] < width):
            raise ValueError(f"{function}: start must be inside the {height} x {width} grid, got {tuple(start)}")
        guided = guidance is not None
        if guided != (unconditional is not None):
            given, other = ("guidance", "unconditional") if guided else ("unconditional", "guidance")
            raise ValueError(f"{function}: {other} must be given with {given}, got None")
        if guided and config.num_conditions == 1:
            raise ValueError(f"{function}: guidance must be None for an unconditional model, got {guidance}")
        count, begin = len(partial), start[0] * width + start[1]
        condition = self._condition(function, "cond", cond, count, values=True)
        if guided:
            away = self._condition(function, "unconditional", unconditional, count, values=True)
            condition = torch.cat([condition, away])
        if not count:
            return partial.to(self.device).clone()
        kept = {name: tuple(one) if isinstance(one, Sequence) else one for name, one in settings.items()}
        # Tensors that last must not be inference tensors, which nobody could fill outside of that mode.
        with torch.inference_mode(False), torch.no_grad(), torch.cuda.device_of(self.pos_emb_hw):
            session = self._session(table, count, begin, guidance, kept, graphs and self.device.type == "cuda")
            session.codes.copy_(partial.flatten(1, 2))
            session.cond.copy_(condition)
            for i, (first, last) in enumerate(session.spans):
                for position in range(first, last):
                    session.fill(position, noise)
                session.steps.run(i)
                if progress is not None:
                    progress(last - first)
            require_sound(function, list(session.unsound), begin)
            return session.codes.view(partial.shape).clone()  # the next call writes to the same memory

    def _session(
        self,
        table: Tensor,
        count: int,
        begin: int,
        guidance: float | Tensor | None,
        settings: dict[str, Any],
        graphs: bool,
    ) -> "_Session":
        at_once = self.config.grid[1] if graphs else 1
        if not graphs:
            return _Session(self, table, count, begin, guidance, settings, at_once, graphs=False)
        # A graph knows weights by their addresses, which `.to` and the like change, and the head's by a packed copy.
        head = [0 if one.is_inference() else one._version for one in self.head.parameters()]
        places = (table.data_ptr(), table.shape, table.stride(), *engine.addresses(self), *head)
        # Strengths that are a tensor are copied into the session's own; a number is part of the graph.
        strength = (guidance.shape, guidance.dtype, guidance.device) if isinstance(guidance, Tensor) else guidance
        key = (count, begin, strength, tuple(settings.items()), places, table.dtype, engine.circumstances())
        session = self._sessions.get(
            key, lambda: _Session(self, table, count, begin, guidance, settings, at_once, graphs=True)
        )
        if isinstance(guidance, Tensor):
            session.guidance.copy_(guidance)
        return session


class _Session:
    """What drawing so many pictures from a position on needs, at fixed places, and its steps, `at_once` positions each.

    A caller fills in `cond` and `codes`, and before each step `fill`s the noise of its positions. Afterwards `codes`
    are drawn, and `unsound` says of each position what `DepthCodes` does.
    """

    def __init__(
        self,
        model: RQTransformer,
        table: Tensor,
        count: int,
        begin: int,
        guidance: float | Tensor | None,
        settings: dict[str, Any],
        at_once: int,
        *,
        graphs: bool,
    ):
        config, device = model.config, model.device
        self.model, self.table, self.begin, self.settings, self.graphs = model, table, begin, settings, graphs
        end = config.grid[0] * config.grid[1]
        self.twice = 1 if guidance is None else 2
        self.guidance: Any = guidance.clone() if isinstance(guidance, Tensor) else guidance
        rows = self.twice * count
        self.cond = torch.zeros(rows, config.condition_length, dtype=torch.int64, device=device)
        self.codes = torch.zeros(count, end, config.depth, dtype=torch.int64, device=device)
        self.unsound = torch.full((end - begin, count), -1, dtype=torch.int32, device=device)
        dtype = torch.float64 if model.products == torch.float64 else torch.float32
        self._noise = torch.ones(at_once, config.depth, count, config.num_codes, dtype=dtype, device=device)
        like = torch.empty(rows, 0, config.dim, dtype=model.products, device=device)
        self.cache = model.body_transformer.cache(like, config.condition_length + end - 1)
        self.total = table.new_empty(0)
        self.spans = [(first, min(first + at_once, end)) for first in range(begin, end, at_once)]
        self.steps = engine.Steps([functools.partial(self._step, *span) for span in self.spans], graphs=graphs)

    def fill(self, position: int, noise: Callable[[int], Tensor] | torch.Generator | None) -> None:
        """Put the noise of a position in its place: what is given, or samples drawn depth by depth."""
        place = self._noise[(position - self.begin) % len(self._noise)]
        if callable(noise):
            place.copy_(noise(position).transpose(0, 1))
            return
        temperatures = self.settings["temperature"]
        for d, one in enumerate(place):
            # A greedy depth draws nothing. A list that is too short is the head's to complain of.
            if not isinstance(temperatures, tuple) or any(temperatures[d : d + 1]):
                one.exponential_(generator=noise)

    def _step(self, first: int, last: int) -> None:
        for position in range(first, last):
            x = self._prefix() if position == self.begin else self._read(self.total.unsqueeze(1), position - 1)
            found = self.model.head.decode(
                self._body(x, position),
                self.table,
                guidance=self.guidance,
                noise=self._noise[position - first].transpose(0, 1),
                graphs=not self.graphs,
                **self.settings,
            )
            self.codes[:, position] = found.codes
            self.unsound[position - self.begin] = found.unsound
            self.total = found.total

    def _prefix(self) -> Tensor:
        """What the body reads before the first position that is drawn."""
        model, begin = self.model, self.begin
        x = model._prefix(self.cond)
        if begin:
            sums = model.head.running_sums(self.codes[:, :begin], self.table)[:, :, -1]
            x = torch.cat([x, self._read(sums, 0)], dim=1)
        return x

    def _read(self, sums: Tensor, position: int) -> Tensor:
        places = self.model._positions(sums, position)
        return torch.cat([places] * self.twice)

    def _body(self, x: Tensor, position: int) -> Tensor:
        """The state that `position` is drawn from, after the tokens x, in the dtype of the head."""
        model = self.model
        cast = model.products != model.dtype
        how = torch.autocast(model.device.type, model.products) if cast else contextlib.nullcontext()
        with how:
            begin = model.config.condition_length + position - x.shape[1]
            return model.body_transformer(x, self.cache, begin)[:, -1].to(model.products)


# ---- the published keys ----------------------------------------------------------------------------------------------


def _renamed(key: str, prefix: str, names: dict[str, str]) -> str:
    """The key with what follows `prefix` renamed, if it has a name there."""
    for old, new in names.items():
        if key.startswith(prefix + old):
            return prefix + new + key[len(prefix + old) :]
    return key


def _rename(state: dict[str, Tensor], prefix: str, names: dict[str, str]) -> None:
    for key in list(state):
        state[_renamed(key, prefix, names)] = state.pop(key)


def _to_published(module: nn.Module, state: dict[str, Tensor], prefix: str, metadata: Any) -> None:
    _rename(state, prefix, _PUBLISHED)


def _from_published(module: nn.Module, state: dict[str, Tensor], prefix: str, *rest: Any) -> None:
    _rename(state, prefix, {published: ours for ours, published in _PUBLISHED.items()})


def _name_missing(module: nn.Module, incompatible: Any) -> None:
    """What load_state_dict misses is reported under the published name."""
    incompatible.missing_keys[:] = [_renamed(key, "", _PUBLISHED) for key in incompatible.missing_keys]


def _on_meta(config: RQTransformerConfig) -> RQTransformer:
    with torch.device("meta"):
        return RQTransformer(config)


def _find_published(tensors: dict[str, Tensor], path: Path) -> RQTransformer:
    """A model on the meta device whose state_dict has these keys and shapes."""
    shapes = {key: value.shape for key, value in tensors.items()}
    for config in RQTransformer.configs.values():
        if shapes.get("pos_emb_cond") != (1, config.condition_length, config.dim):
            continue  # built for nothing
        model = _on_meta(config)
        if {key: value.shape for key, value in model.state_dict().items()} == shapes:
            return model
    names = ", ".join(RQTransformer.configs)
    raise checkpoints.CheckpointError(
        f"{path}: no config.json of an RQ-Transformer beside it, and not the keys and shapes of {names}; pass config="
    )
