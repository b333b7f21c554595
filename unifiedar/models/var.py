"""VAR (Tian et al., arXiv:2404.02905): draws a picture scale by scale, all codes of a scale at once.

A transformer reads, before each scale, what the scales so far sum up to, averaged to the next one's size; every token
sees its own scale and all earlier ones. A class and its absence, mixed by classifier-free guidance that grows from
scale to scale, say what to draw. Codes, and pictures of them, are those of the tokenizer (`VQVAE`).

Every weight is read once a scale, but those that see the condition alone, which are read once a picture.
"""

import math
import os
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from unifiedar import checkpoints, engine
from unifiedar.models._autoencoder import to_bytes
from unifiedar.models._var_config import VARConfig, config_of, published
from unifiedar.models._var_drawing import Capture, Edit, Session
from unifiedar.models.vqvae import VQVAE
from unifiedar.nn import (
    CodeSampler,
    Linear8bit,
    ModulatedNorm,
    NextScaleAttention,
    ScaleBook,
    gelu_of,
    in_parts,
    of_few,
)

__all__ = ["VAR", "VARConfig", "config_of"]

_INSIDE = ("trainer", "var_wo_ddp")  # where a trainer's checkpoint has the model
_VAE = "vae."  # what the names of the tokenizer's tensors begin with in a folder that holds both
_SESSIONS = 4  # batches and ways of drawing whose graphs are kept


# ---- parts -----------------------------------------------------------------------------------------------------------


_Layer = nn.Linear | Linear8bit


def _cast(layer: _Layer, x: Tensor) -> Tensor:
    """x as a layer's product wants it: in its weights' dtype (for 8 bits, its bias's); under autocast as it is."""
    dtype = layer.dtype if isinstance(layer, Linear8bit) else layer.weight.dtype
    return x if torch.is_autocast_enabled(x.device.type) else x.to(dtype)


def _projection(layers: nn.Module) -> _Layer:
    """The one behind SiLU, as published: under the key 1."""
    found = layers.get_submodule("1")
    assert isinstance(found, _Layer)
    return found


class _MLP(nn.Module):
    def __init__(self, dim: int, hidden: int):
        super().__init__()
        self.fc1: _Layer = nn.Linear(dim, hidden)
        self.fc2: _Layer = nn.Linear(hidden, dim)

    def forward(self, x: Tensor) -> Tensor | tuple[Tensor, Tensor | None]:
        """For the norm that comes next: of few rows in parts, which that adds up."""
        return in_parts(self.fc2, self._hidden(x))

    def _hidden(self, x: Tensor) -> Tensor:
        return gelu_of(self.fc1, _cast(self.fc1, x))


class _Modulation(nn.Module):
    """Scale and shift of the norm before the classifier."""

    def __init__(self, dim: int):
        super().__init__()
        self.ada_lin = nn.Sequential(nn.SiLU(), nn.Linear(dim, 2 * dim))


class _Block(nn.Module):
    """Attention and an MLP, each behind a norm that the condition modulates and before a gate that it sets.

    `ada_lin` makes the six vectors of the condition or, with a projection that all blocks share, `ada_gss` is added to
    what that makes: two gates, two scales, two shifts.
    """

    def __init__(self, config: VARConfig):
        super().__init__()
        dim = config.dim
        softmax_scale = None if config.l2_norm else 0.25 / math.sqrt(dim / config.num_heads)
        self.attn = NextScaleAttention(dim, config.num_heads, l2_norm=config.l2_norm, softmax_scale=softmax_scale)
        self.ffn = _MLP(dim, round(dim * config.mlp_ratio))
        if config.shared_adaln:
            self.ada_gss = nn.Parameter(torch.randn(1, 1, 6, dim) / dim**0.5)
        else:
            self.ada_lin = nn.Sequential(nn.SiLU(), nn.Linear(dim, 6 * dim))


# ---- the model -------------------------------------------------------------------------------------------------------


class VAR(nn.Module):
    """The whole model: `generate` draws, `edit` draws parts of pictures anew, `forward` and `teacher_forced` train.

    Weights may be of several dtypes: those of matrix products decide in which dtype they run (`cast_products`), while
    tokens are summed up, and codes drawn, in float32.

    Args:
        config: sizes, one of `VAR.configs` or your own.
        vae: the tokenizer, which is no part of the state_dict and does not move with the model. Without one there are
            neither codes nor pictures; `attach` takes one later.

    Attributes:
        class_names: what the classes are called, for models whose folder says so; else empty.

    Raises:
        TypeError: for a vae that is none.
        ValueError: for sizes below 1, heads that do not divide dim, a scale larger than the last, chances that are
            none, or a vae of other codes.
    """

    configs: ClassVar[dict[str, VARConfig]] = {
        "d16": published(16),
        "d20": published(20),
        "d24": published(24),
        "d30": published(30),
        "d36": published(36, (1, 2, 3, 4, 6, 9, 13, 18, 24, 32), shared=True),
        # Small enough to ship in 8 bits; its classes are those of the pictures that it is trained on.
        "emoji": VARConfig(8, 192, 3, (1, 2, 3, 4, 6, 8, 8), 2000, 2048, 16, shared_adaln=True, drop_path=0.1 * 8 / 24),
    }

    lvl_1L: Tensor
    attn_bias_for_masking: Tensor

    def __init__(self, config: VARConfig, vae: VQVAE | None = None):
        super().__init__()
        integers = [config.depth, config.dim, config.num_heads, config.num_classes, config.num_codes, config.code_dim]
        if not config.scales or min(*integers, *(side for size in config.sizes for side in size)) < 1:
            raise ValueError(f"VAR: sizes must be at least 1, got {config}")
        tall, wide = config.sizes[-1]
        if any(h > tall or w > wide for h, w in config.sizes):
            raise ValueError(f"VAR: scales must not be larger than the last, got {config.scales}")
        if not (0 <= config.drop_path < 1 and 0 <= config.cond_drop <= 1):
            raise ValueError(
                "VAR: drop_path and cond_drop must be chances, drop_path below 1, "
                f"got {config.drop_path} and {config.cond_drop}"
            )
        self.config = config
        dim, lengths = config.dim, config.lengths
        self.word_embed = nn.Linear(config.code_dim, dim)
        self.class_emb = nn.Embedding(config.num_classes + 1, dim)
        self.pos_start = nn.Parameter(torch.empty(1, lengths[0], dim))
        self.pos_1LC = nn.Parameter(torch.empty(1, sum(lengths), dim))
        self.lvl_embed = nn.Embedding(len(lengths), dim)
        self.shared_ada_lin: nn.Module = nn.Identity()
        if config.shared_adaln:
            self.shared_ada_lin = nn.Sequential(nn.SiLU(), nn.Linear(dim, 6 * dim))
        self.norm, self.sampler = ModulatedNorm(config.norm_eps), CodeSampler()
        self.blocks = nn.ModuleList([_Block(config) for _ in range(config.depth)])
        self.head_nm = _Modulation(dim)
        self.head = nn.Linear(dim, config.num_codes)
        level = torch.cat([torch.full((length,), i) for i, length in enumerate(lengths)])
        self.register_buffer("lvl_1L", level[None])
        # Of the published state_dict; attention here knows the scales by their lengths.
        mask = torch.where(level[:, None] >= level, 0.0, -math.inf)
        self.register_buffer("attn_bias_for_masking", mask[None, None])
        self._sessions = engine.Pool(_SESSIONS)
        self._vae: tuple[VQVAE, ...] = ()  # in a tuple it is no submodule
        self.class_names: tuple[str, ...] = ()
        if vae is not None:
            self.attach(vae)
        if not self.pos_1LC.is_meta:
            self.initialize()

    @torch.no_grad()
    def initialize(self, *, adaln: float = 0.5, gate: float = 1e-5, head: float = 0.02) -> None:
        """Random weights as the published training begins with.

        Normal of variance 1 / (3 C), biases 0; the projections at the end of each branch smaller by sqrt(2 depth).

        Args:
            adaln: factor on the weights that make scales and shifts.
            gate: factor on those that make gates (published `alng`).
            head: factor on the classifier's.
        """
        self._not_8bit("initialize")
        unit = math.sqrt(1 / self.config.dim / 3)

        for module in self.modules():
            if isinstance(module, (nn.Linear, nn.Embedding)):
                nn.init.normal_(module.weight, std=unit)
                if isinstance(module, nn.Linear) and module.bias is not None:
                    module.bias.zero_()
        nn.init.normal_(self.pos_start, std=unit)
        nn.init.normal_(self.pos_1LC, std=unit)
        self.head.weight.mul_(head)
        _projection(self.head_nm.ada_lin).weight.mul_(adaln)
        dim = self.config.dim
        for block in self._each():
            for layer in (block.attn.proj, block.ffn.fc2):
                layer.weight.div_(math.sqrt(2 * self.config.depth))
            six = (
                block.ada_gss[0, 0]
                if self.config.shared_adaln
                else _projection(block.ada_lin).weight.unflatten(0, (6, dim))
            )
            six[:2].mul_(gate)
            six[2:].mul_(adaln)

    def _each(self) -> Iterator[_Block]:
        for block in self.blocks:
            assert isinstance(block, _Block)
            yield block

    @property
    def device(self) -> torch.device:
        """Where the weights are."""
        return self.pos_1LC.device

    @property
    def dtype(self) -> torch.dtype:
        """Of the matrix products' weights."""
        return self.head.weight.dtype

    @property
    def wide(self) -> torch.dtype:
        """Of tokens and logits: float32, or float64 if the classes' embeddings are."""
        return torch.float64 if self.class_emb.weight.dtype == torch.float64 else torch.float32

    @property
    def vae(self) -> VQVAE | None:
        """The tokenizer, or None."""
        return self._vae[0] if self._vae else None

    def attach(self, vae: VQVAE) -> None:
        """Take a tokenizer, in place of the one there is; TypeError or ValueError if it does not go with the model."""
        if not isinstance(vae, VQVAE):
            raise TypeError(f"attach: vae must be a VQVAE, got {type(vae).__name__}")
        wanted, found = (self.config.num_codes, self.config.code_dim), (vae.config.num_codes, vae.config.dim)
        if wanted != found:
            raise ValueError(
                f"attach: vae must have the model's codebook {wanted}, got one of {found}: another tokenizer"
            )
        self._vae = (vae,)

    # ---- loading and saving

    @classmethod
    def from_checkpoint(
        cls,
        path: str | Path,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
        *,
        vae: VQVAE | str | Path | None = None,
        decoder_dtype: torch.dtype | None = None,
        config: VARConfig | None = None,
        weights: str | None = None,
    ) -> "VAR":
        """Load a model in eval mode, without gradients.

        Args:
            path: a folder that `save` wrote, a published `var_d*.pth`, or a checkpoint of the published trainer.
            device: where to put it, the CPU if None.
            dtype: of the matrix products, as stored if None (see `cast_products`).
            vae: the tokenizer: one that is loaded, or a path as `VQVAE.from_checkpoint` takes it, then put on the same
                device; the trainer's checkpoint holds one too. None takes that of the folder, if it has one.
            decoder_dtype: of the tokenizer's decoder, unless `vae` is loaded already.
            config: sizes. None takes those of config.json in the folder or, for a file, reads them off the tensors,
                with square scales, heads of 64 channels if there are no gains to count, and published settings.
            weights: None or, in 8 bits, "int8" or "fp8" (see `quantize_weights`), rounded before `dtype` rounds them.

        Raises:
            CheckpointError: one sentence with the file, what is wrong with it and the way out.
            ValueError, TypeError: for a vae that does not go with the model, or other weights.
        """
        found = checkpoints.resolve(path)
        own: Any = None
        names: tuple[str, ...] = ()
        if found.is_dir():
            values = checkpoints.read_config(found)
            own, names = values.pop("vae", None), _names(values.pop("class_names", []), found)
            if own is not None and not isinstance(own, dict):
                raise checkpoints.CheckpointError(f"{found}: vae in config.json must be an object, got {own!r:.40}")
            config = config or VARConfig.from_dict(values)
        tensors = checkpoints.load_tensors(found, under=_INSIDE)
        of_vae = {name[len(_VAE) :]: tensors.pop(name) for name in list(tensors) if own and name.startswith(_VAE)}
        if config is None:
            config = config_of(tensors, found)
        with torch.device("meta"):
            model = cls(config)
        level = tensors.get("lvl_1L")
        if level is not None and level.ndim == 2 and level.dtype == torch.int64:
            trained = level[0].bincount().tolist()
            if trained != config.lengths:
                raise checkpoints.CheckpointError(
                    f"{found}: was not trained with the scales {config.scales}, but with scales of {trained} codes"
                )
        checkpoints.assign(model, tensors, found)
        model.to(device=device).eval().requires_grad_(False)
        if weights is not None:
            model.quantize_weights(weights)
        model.cast_products(dtype or model.dtype)  # a small copy has vectors in another dtype than matrices
        if names and len(names) != config.num_classes:
            raise checkpoints.CheckpointError(
                f"{found}: class_names in config.json must name all {config.num_classes} classes, got {len(names)}"
            )
        model.class_names = names
        if isinstance(vae, (str, os.PathLike)):
            vae = VQVAE.from_checkpoint(vae, model.device, decoder_dtype=decoder_dtype)
        elif vae is None and own:
            sizes = VQVAE.config_class.from_dict(own)
            vae = VQVAE.from_tensors(sizes, of_vae, found, model.device, decoder_dtype=decoder_dtype)
        if vae is not None:
            model.attach(vae)
        return model

    def save(self, folder: str | Path) -> Path:
        """Write weights and config to a folder that `from_checkpoint` reads, atomically; replaces such a folder.

        The tokenizer is not written; `save_whole` does that too.
        """
        self._not_8bit("save")
        return self._write(folder, self.state_dict(), self.config.to_dict())

    def save_whole(
        self, folder: str | Path, tensors: Mapping[str, Tensor] | None = None, *, int8: Collection[str] = ()
    ) -> Path:
        """As `save`, together with the tokenizer: what `from_checkpoint` needs no `vae` for.

        Args:
            folder: to make or replace.
            tensors: in place of those of `whole` (other dtypes, say), by the same names.
            int8: names of those to store in 8 bits (see `checkpoints.save`).

        Raises:
            ValueError: without a tokenizer.
            CheckpointError: if the folder cannot be written.
        """
        whole = self.whole()
        assert self.vae is not None
        config = self.config.to_dict() | {"vae": self.vae.config.to_dict()}
        return self._write(folder, whole if tensors is None else tensors, config, int8)

    def whole(self) -> dict[str, Tensor]:
        """The state_dict and, under names that begin with "vae.", the tokenizer's; ValueError without one."""
        vae = self._tokenizer("whole")
        self._not_8bit("whole")
        return {**self.state_dict(), **{_VAE + name: value for name, value in vae.state_dict().items()}}

    def _write(
        self, folder: str | Path, tensors: Mapping[str, Tensor], config: dict[str, Any], int8: Collection[str] = ()
    ) -> Path:
        if self.class_names:
            config = config | {"class_names": list(self.class_names)}
        return checkpoints.save(folder, tensors, config, int8=int8, overwrite=True, max_shard_bytes=4_000_000_000)

    def export(self, path: str | Path) -> None:
        """Write the published layout: one file with the state_dict in float32, which VAR's own code loads."""
        self._not_8bit("export")
        path = Path(path)
        state = {
            name: (value.float() if value.is_floating_point() else value).cpu().contiguous()
            for name, value in self.state_dict().items()
        }
        part = path.with_name(f".{path.name}.tmp")
        try:
            with open(part, "wb") as file:
                torch.save(state, file)
            os.replace(part, path)
        except OSError as error:
            raise checkpoints.CheckpointError(f"{path}: cannot be written: {error.strerror or error}") from error
        finally:
            part.unlink(missing_ok=True)

    def cast_products(self, dtype: torch.dtype) -> "VAR":
        """Put the weights of all matrix products in a dtype, in place; embeddings, positions and gains stay.

        What autocast does at every use, done once. Keys and values are cached in it.

        Returns:
            The model itself.
        """
        if dtype not in (torch.float32, torch.bfloat16, torch.float16, torch.float64):
            raise TypeError(f"cast_products: dtype must be float32, bfloat16, float16 or float64, got {dtype}")
        self._let_go()
        for block in self._each():
            gain, six = block.attn.scale_mul_1H11, block._parameters.get("ada_gss")
            kept = [one.data for one in (gain, six) if one is not None]
            block.to(dtype)
            for one, data in zip((one for one in (gain, six) if one is not None), kept, strict=True):
                one.data = data
        for part in (self.shared_ada_lin, self.head_nm, self.head):
            part.to(dtype)
        return self

    def quantize_weights(self, form: str = "int8", *, backend: str = "auto") -> "VAR":
        """Put what the blocks multiply by, and what makes their vectors of the condition, into 8 bits, in place.

        Nearly all of a large model, for half the memory of half precision. Embeddings, norms and the classifier stay.
        What it costs in logits: `quality_drawn.logit_cost`. Products still run in half precision, with weights widened
        on the way (`ops.linear_8bit`): faster up to some 32 rows, slower above, most at some hundred; of thousands of
        rows it costs a few percent.

        Args:
            form: "int8" or "fp8" (e4m3), one scale an output (see `checkpoints.quantize_rows`). Weights that came from
                a folder in int8 are the stored ones again.
            backend: of `ops.linear_8bit`.

        Returns:
            The model itself. It cannot be trained or saved any more; `cast_products` keeps the 8 bits.

        Raises:
            ValueError: for another form, weights that are not finite, or a model that is in 8 bits already.
        """
        self._not_8bit("quantize_weights")
        found: list[tuple[nn.Module, str, nn.Linear]] = []
        for part in (self.blocks, self.shared_ada_lin):
            for module in part.modules():
                found += [(module, name, one) for name, one in module.named_children() if isinstance(one, nn.Linear)]
        if not all(layer.weight.isfinite().all() for _, _, layer in found):
            raise ValueError("quantize_weights: weights must be finite, got inf or nan")
        for module, name, layer in found:
            weight, scale = checkpoints.quantize_rows(layer.weight.detach(), form)
            setattr(module, name, Linear8bit(weight, scale, layer.bias, layer.weight.dtype, backend=backend))
        self.forget_captures()
        return self

    def _not_8bit(self, function: str) -> None:
        if any(isinstance(one, Linear8bit) for one in self.modules()):
            raise ValueError(f"{function}: weights must not be in 8 bits; do it before quantize_weights")

    # ---- the transformer

    def _modulations(self, condition: Tensor) -> list[Tensor]:
        """For every block gates, scales and shifts (B, 6, C), then scale and shift of the head (B, 2, C)."""
        dim = self.config.dim
        unit = F.silu(condition).to(self._dtype(condition))
        shared = None
        if self.config.shared_adaln:
            shared = self._six(self.shared_ada_lin, unit)
        found = []
        for block in self._each():
            found.append(self._six(block.ada_lin, unit) if shared is None else block.ada_gss[0] + shared)
        return [*found, self._of_condition(self.head_nm.ada_lin, unit).view(-1, 2, dim)]

    def _six(self, layer: nn.Module, unit: Tensor) -> Tensor:
        return self._of_condition(layer, unit).view(-1, 6, self.config.dim)

    def _of_condition(self, layer: nn.Module, unit: Tensor) -> Tensor:
        one = _projection(layer)
        return of_few(one, _cast(one, unit))

    def _biases(self) -> tuple[Tensor, ...]:
        """Every block's bias of queries, keys and values (3C), in one copy."""
        parts = [part for block in self._each() for part in block.attn.qkv_bias()]
        return torch.cat(parts).view(self.config.depth, -1).unbind()

    def _places(self) -> Tensor:
        """What tells positions and scales apart, (1, L, C)."""
        return (self.lvl_embed(self.lvl_1L) + self.pos_1LC).to(self.wide)

    def _first(self, condition: Tensor, places: Tensor) -> Tensor:
        """Tokens of the first scale (B, l, C)."""
        return condition[:, None].to(self.wide) + self.pos_start + places[:, : self.config.lengths[0]]

    def _logits(
        self,
        tokens: Tensor,
        modulations: Sequence[Tensor],
        lengths: Sequence[int] | None,
        memory: Sequence[tuple[Tensor, Tensor]] | None = None,
        begin: int = 0,
    ) -> Tensor:
        """(B, L, C) to (B, L, K), in `wide`: the tokens of scales of `lengths`, or of one over all before, with every
        block's memory: its cache, and its bias of queries, keys and values."""
        dtype = self._dtype(tokens)
        branch = gate = None
        for i, block in enumerate(self._each()):
            # One by one, not in pairs: the gradient puts them together once.
            *gates, scale, next_scale, shift, next_shift = modulations[i].unbind(1)
            if branch is None or gate is None:
                x = self.norm(tokens, scale, shift, dtype=dtype)
            else:
                x, tokens = self.norm.add(tokens, branch, gate, scale, shift, dtype=dtype)
            branch = (
                block.attn(x, lengths, to_norm=True)
                if memory is None
                else block.attn.before_norm(x, memory[i][0], begin, memory[i][1])
            )
            gate = self._gate(gates[0], i, memory is None)
            x, tokens = self.norm.add(tokens, branch, gate, next_scale, next_shift, dtype=dtype)
            branch, gate = block.ffn(x), self._gate(gates[1], i, memory is None)
        assert branch is not None  # depth is at least 1
        assert gate is not None
        scale, shift = modulations[-1].unbind(1)
        x, _ = self.norm.add(tokens, branch, gate, scale, shift, dtype=dtype)
        return of_few(self.head, _cast(self.head, x)).to(self.wide)

    def _dtype(self, x: Tensor) -> torch.dtype:
        """In which products of x run."""
        kind = x.device.type
        return torch.get_autocast_dtype(kind) if torch.is_autocast_enabled(kind) else self.dtype

    def _gate(self, gate: Tensor, i: int, learns: bool) -> Tensor:
        """(B, C); in training some pictures leave the branch out, but not while one is drawn."""
        drop = self.config.drop_path * i / max(self.config.depth - 1, 1)
        if not (learns and self.training and drop):
            return gate
        return gate * (gate.new_empty(len(gate), 1).bernoulli_(1 - drop) / (1 - drop))

    def forward(self, label_B: Tensor, x_BLCv_wo_first_l: Tensor) -> Tensor:
        """Teacher-forced logits, for training.

        In training mode a class is taken away with the chance `config.cond_drop`, and branches are left out; the
        published code takes classes away in eval mode too.

        Args:
            label_B: (B,) int64; num_classes is none.
            x_BLCv_wo_first_l: (B, L - l_0, code_dim), `vae.quantize.idxBl_to_var_input` of the codes; L counts those of
                all scales, or of the first few for these alone.

        Returns:
            (B, L, K) float32: for every code of every scale, given all earlier scales.

        Raises:
            TypeError, ValueError: for an argument of another dtype or shape or, on the CPU, a label out of range.
        """
        config, lengths = self.config, self.config.lengths
        sizes = [sum(lengths[1 : i + 1]) for i in range(len(lengths))]
        if not isinstance(x_BLCv_wo_first_l, Tensor) or not x_BLCv_wo_first_l.is_floating_point():
            found = getattr(x_BLCv_wo_first_l, "dtype", type(x_BLCv_wo_first_l).__name__)
            raise TypeError(f"forward: x_BLCv_wo_first_l must be a floating-point tensor, got {found}")
        shape = tuple(x_BLCv_wo_first_l.shape)
        if len(shape) != 3 or shape[1] not in sizes or shape[2] != config.code_dim:
            raise ValueError(
                f"forward: x_BLCv_wo_first_l must be (B, {sizes[-1]}, {config.code_dim}), or with codes of the first "
                f"scales alone one of {sizes[:-1]}, got {shape}"
            )
        lengths = lengths[: 1 + sizes.index(shape[1])]
        looks = not torch.compiler.is_compiling() and not (isinstance(label_B, Tensor) and label_B.is_cuda)
        labels = self._labels("forward", "label_B", label_B, values=looks)
        if len(labels) != len(x_BLCv_wo_first_l):
            raise ValueError(f"forward: label_B must be ({len(x_BLCv_wo_first_l)},), got {tuple(labels.shape)}")
        if self.training and config.cond_drop:
            gone = torch.rand(len(labels), device=labels.device) < config.cond_drop
            labels = labels.masked_fill(gone, config.num_classes)
        with torch.autocast(self.device.type, enabled=False):
            condition, places = self.class_emb(labels), self._places()
            rest = self.word_embed(x_BLCv_wo_first_l.to(self.word_embed.weight.dtype)).to(self.wide)
            tokens = torch.cat((self._first(condition, places), rest + places[:, lengths[0] : sum(lengths)]), 1)
        return self._logits(tokens, self._modulations(condition), lengths)

    # ---- codes and pictures

    def _tokenizer(self, function: str) -> VQVAE:
        if self.vae is None:
            raise ValueError(f"{function}: vae must be there: give one to from_checkpoint or to attach; got None")
        if self.vae.device != self.device:
            raise ValueError(f"{function}: vae must be on the model's device {self.device}, got {self.vae.device}")
        return self.vae

    @torch.no_grad()
    def encode(self, images: Tensor) -> list[Tensor]:
        """Codes of pictures: for every scale (N, h w) int64, on the model's device.

        Args:
            images: (N, 3, H, W), uint8 or floating point in [-1, 1], of the size of the last scale.

        Raises:
            TypeError, ValueError: for another dtype or size, or without a tokenizer.
        """
        vae = self._tokenizer("encode")
        pixels = vae._pixels(images, "encode")
        height, width = (vae.downsample * side for side in self.config.sizes[-1])
        if pixels.shape[2:] != (height, width):
            raise ValueError(
                f"encode: images must be (N, 3, {height}, {width}), the size of the last of the scales that the model "
                f"was trained with, got {tuple(images.shape)}"
            )
        return vae.img_to_idxBl(pixels, self.config.scales)

    def teacher_forced(self, labels: Tensor | Sequence[int] | int, codes: Sequence[Tensor]) -> Tensor:
        """Logits (N, L, K) float32 of every code given all earlier scales, of codes (N, h w) int64 of every scale.

        Args:
            labels: (N,) classes, num_classes being none, or one for all.
            codes: as `encode` returns them; the last scale's may be left out.

        Raises:
            TypeError, ValueError: for arguments of another type or shape, or without a tokenizer.
        """
        vae = self._tokenizer("teacher_forced")
        codes = [one.to(self.device) for one in codes]
        inputs = vae.quantize.book(self.config.scales).inputs(codes)
        if isinstance(labels, int):
            labels = [labels] * len(inputs)
        return self(self._labels("teacher_forced", "labels", labels), inputs)

    def _labels(self, function: str, argument: str, labels: Any, *, values: bool = True, stay: bool = False) -> Tensor:
        """(N,) int64 on the model's device, or with `stay` integers where they are; looks at them unless `values` is
        False."""
        if isinstance(labels, int) and not isinstance(labels, bool):
            labels = [labels]
        given = None if isinstance(labels, Tensor) else labels
        if not isinstance(labels, Tensor):
            if not isinstance(labels, Sequence) or not all(type(one) is int for one in labels):
                raise TypeError(f"{function}: {argument} must be integers or an int64 tensor, got {labels!r:.80}")
            labels = torch.tensor(labels, dtype=torch.int64)
        if labels.dtype not in (torch.int64, torch.int32):
            raise TypeError(f"{function}: {argument} must be integers or an int64 tensor, got {labels.dtype}")
        if labels.ndim != 1 or not len(labels):
            raise ValueError(f"{function}: {argument} must name one picture or more, (N,), got {tuple(labels.shape)}")
        if values:
            self._look_at(function, argument, labels if given is None else given)
        return labels if stay else labels.to(self.device, torch.int64)

    def _look_at(self, function: str, argument: str, labels: Tensor | Sequence[int]) -> None:
        # At a tensor in one step, lest a GPU is waited for twice.
        found = torch.stack(labels.aminmax()).tolist() if isinstance(labels, Tensor) else (min(labels), max(labels))
        low, high = found
        if low < 0 or high > self.config.num_classes:
            raise ValueError(
                f"{function}: {argument} must be classes from 0 to {self.config.num_classes - 1}, or "
                f"{self.config.num_classes} for none, got {low} to {high}"
            )

    # ---- drawing

    def generate(
        self,
        labels: Tensor | Sequence[int] | int,
        *,
        cfg: float = 1.5,
        top_k: int = 0,
        top_p: float = 0.0,
        seed: int | None = None,
        more_smooth: bool = False,
        images_per_call: int | None = None,
        graphs: bool = True,
    ) -> Tensor:
        """Draw pictures of classes.

        Args:
            labels: (N,) classes; num_classes is none.
            cfg: strength of the guidance at the last scale, at least 0: logits are c + t (c - u), of which t grows
                linearly from 0 at the first scale to cfg at the last. The published FID has 1.5, its demonstration 4.
            top_k, top_p: as `ops.sample_codes`; 0 is off. The published FID has 900 and 0.96.
            seed: of the random generator; None goes on with torch's default one.
            more_smooth: whether vectors are averaged over codes by a Gumbel softmax, for smoother pictures and worse
                FID.
            images_per_call: pictures that are drawn at once, all if None. Parts are drawn one after the other with one
                generator, so that it changes what a seed draws.
            graphs: whether a GPU replays CUDA graphs. The first call of a batch size captures them, see `captures`;
                sizes are rounded up, to multiples of 8 above 8.

        Returns:
            (N, 3, H, W) uint8, on the model's device.

        Raises:
            TypeError: for an argument of another type.
            ValueError: for labels out of range or none at all, a cfg below 0, a top_k above the number of codes, a
                top_p outside [0, 1], no tokenizer, or one on another device.
            torch.OutOfMemoryError: where the pictures do not fit; images_per_call is the way out.

        Note:
            Drawn with the noise of the published code, one exponential a code in its order, so that in float32 on one
            device the same seed gives the same codes. Autocast is ignored: products run in the weights' dtype. One
            call at a time.
        """
        return self._draw(
            "generate", labels, cfg, top_k, top_p, seed, more_smooth, images_per_call, graphs, paints=True
        )[1]

    def generate_codes(
        self,
        labels: Tensor | Sequence[int] | int,
        *,
        cfg: float = 1.5,
        top_k: int = 0,
        top_p: float = 0.0,
        seed: int | None = None,
        images_per_call: int | None = None,
        graphs: bool = True,
    ) -> list[Tensor]:
        """As `generate`, but the codes: for every scale (N, h w) int64, which `vae.decode_codes` paints."""
        codes = self._draw(
            "generate_codes", labels, cfg, top_k, top_p, seed, False, images_per_call, graphs, paints=False
        )[0]
        return [one.contiguous() for one in codes]

    def draw_features(
        self,
        labels: Tensor | Sequence[int] | int,
        book: ScaleBook,
        *,
        cfg: float = 1.5,
        top_k: int = 0,
        top_p: float = 0.0,
        seed: int | torch.Generator | None = None,
        more_smooth: bool = False,
        images_per_call: int | None = None,
        graphs: bool = True,
    ) -> Tensor:
        """As `generate`, for a tokenizer of another make: what its decoder paints, (N, code_dim, h, w).

        Args:
            labels: (N,) classes; num_classes is none.
            book: its code vectors and convolutions.
            seed: a number, or the generator itself.
            cfg, top_k, top_p, more_smooth, images_per_call, graphs: as `generate`.
        """
        return self._draw(
            "draw_features", labels, cfg, top_k, top_p, seed, more_smooth, images_per_call, graphs,
            paints=False, book=book,
        )[1]  # fmt: skip

    def edit(
        self,
        images: Tensor | Sequence[Tensor],
        mask: Tensor,
        labels: Tensor | Sequence[int] | int | None = None,
        *,
        cfg: float = 1.5,
        top_k: int = 0,
        top_p: float = 0.0,
        seed: int | None = None,
        more_smooth: bool = False,
        images_per_call: int | None = None,
        graphs: bool = True,
    ) -> Tensor:
        """Draw a part of pictures anew: in-painting, out-painting, or with labels a change of class there.

        The codes of all scales outside the part are kept, and so are those of the smallest scales whole (section 5.4).

        Args:
            images: (N, 3, H, W), uint8 or floating point in [-1, 1], or their codes, (N, h w) int64 for every scale.
            mask: (h, w) or (N, h, w) of the last scale's size, 1 (or True) where codes are kept; `box_mask` makes one.
            labels: (N,) classes, or one for all; None is none.
            cfg, top_k, top_p, seed, more_smooth, images_per_call, graphs: as `generate`.

        Returns:
            (N, 3, H, W) uint8, on the model's device.

        Raises:
            TypeError, ValueError: as `generate`, and for images, codes or a mask of another dtype or shape.
        """
        function = "edit"
        codes = self.encode(images) if isinstance(images, Tensor) else list(images)
        for i, one in enumerate(codes):
            shape = (len(codes[0]), self.config.lengths[min(i, len(self.config.lengths) - 1)])
            if not isinstance(one, Tensor) or one.dtype != torch.int64:
                raise TypeError(f"{function}: images must be pictures, or int64 codes of every scale, got {type(one)}")
            if tuple(one.shape) != shape:
                raise ValueError(f"{function}: images must have codes {shape} at scale {i}, got {tuple(one.shape)}")
        if len(codes) != len(self.config.lengths):
            raise ValueError(f"{function}: images must be codes of {len(self.config.lengths)} scales, got {len(codes)}")
        count, size = len(codes[0]), self.config.sizes[-1]
        if not isinstance(mask, Tensor):
            raise TypeError(f"{function}: mask must be a tensor, got {type(mask).__name__}")
        if tuple(mask.shape) not in (size, (count, *size)):
            raise ValueError(f"{function}: mask must be {size} or {(count, *size)}, got {tuple(mask.shape)}")
        if labels is None or isinstance(labels, int):
            labels = [self.config.num_classes if labels is None else labels] * count
        given = Edit([one.to(self.device) for one in codes], mask.to(self.device).float().expand(count, *size))
        return self._draw(
            function, labels, cfg, top_k, top_p, seed, more_smooth, images_per_call, graphs, paints=True, edit=given
        )[1]

    def box_mask(self, top: float, left: float, bottom: float, right: float, *, inpaint: bool = True) -> Tensor:
        """A mask for `edit` that draws a box anew, or with `inpaint` False all but the box.

        Args:
            top, left, bottom, right: of the box, shares of the picture's sides; codes are whole or not in it.
            inpaint: whether the inside is drawn.

        Returns:
            (h, w) float32 on the model's device, 1 where codes are kept.
        """
        height, width = self.config.sizes[-1]
        inside = torch.zeros(height, width, device=self.device)
        inside[round(top * height) : round(bottom * height), round(left * width) : round(right * width)] = 1
        return 1 - inside if inpaint else inside

    @property
    def captures(self) -> list[Capture]:
        """What is captured of batches and ways of drawing, the least recently used first; four at most."""
        found = []
        for one in self._sessions.values():
            found.append(Capture(one.batch, one.guided, one.smooth, one.edits, one.steps.seconds))
        return found

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Any:
        self._let_go()
        return super()._apply(fn, recurse)

    def _let_go(self) -> None:
        """Let sessions hold no weights, which are about to be others."""
        for session in self._sessions.values():
            session.held = None

    def forget_captures(self) -> None:
        """Let go of captured graphs and their memory; the next call captures anew."""
        self._sessions.clear()

    def _draw(
        self,
        function: str,
        labels: Any,
        cfg: float,
        top_k: int,
        top_p: float,
        seed: int | torch.Generator | None,
        more_smooth: bool,
        images_per_call: int | None,
        graphs: bool,
        *,
        paints: bool,
        edit: Edit | None = None,
        book: ScaleBook | None = None,
    ) -> tuple[list[Tensor], Tensor]:
        """Codes (N, h w) of every scale, and pictures (N, 3, H, W) uint8 or, unless it paints, the sums of all scales
        (N, code_dim, h, w). `book` stands in for that of the model's own tokenizer."""
        # Labels that are where the graphs run are looked at when these have begun, and do no harm until then.
        later = graphs and isinstance(labels, Tensor) and labels.is_cuda and labels.device == self.device
        labels = self._labels(function, "labels", labels, values=not later, stay=True)
        _check_settings(function, cfg, top_k, top_p, images_per_call, self.config.num_codes)
        if seed is not None and (isinstance(seed, bool) or not isinstance(seed, (int, torch.Generator))):
            raise TypeError(f"{function}: seed must be an integer or None, got {type(seed).__name__}")
        if edit is not None and len(labels) != len(edit.mask):
            raise ValueError(
                f"{function}: labels must be ({len(edit.mask)},), one a picture, got {tuple(labels.shape)}"
            )
        paint: Callable[[Tensor], Tensor] | None = None
        if book is None or paints:
            vae = self._tokenizer(function)
            book = vae.quantize.book(self.config.scales)
            paint = (lambda total: to_bytes(vae.fhat_to_img(total))) if paints else None
        generator = seed if isinstance(seed, torch.Generator) else None
        if isinstance(seed, int):
            generator = torch.Generator(self.device).manual_seed(seed)
        at_once = len(labels) if images_per_call is None else min(images_per_call, len(labels))
        # Tensors that last must not be inference tensors, which nobody could fill outside of that mode.
        with (
            torch.inference_mode(False),
            torch.no_grad(),
            torch.autocast(self.device.type, enabled=False),
            torch.cuda.device_of(self.pos_1LC),
        ):
            try:
                how = (at_once, cfg > 0, more_smooth, edit is not None, graphs and self.device.type == "cuda")
                parts: list[tuple[Tensor, Tensor]] = []
                aside = torch.cuda.Stream() if later else None
                if aside is not None:
                    aside.wait_stream(torch.cuda.current_stream())
                for begin in range(0, len(labels), at_once):
                    given = None if edit is None else edit.rows(begin, begin + at_once)
                    some = labels[begin : begin + at_once]
                    parts.append(self._part(how, book, paint, some, float(cfg), top_k, float(top_p), generator, given))
                    if aside is not None and len(parts) == 1:
                        with torch.cuda.stream(aside):  # which waits for none of the graphs
                            self._look_at(function, "labels", labels)
            except torch.OutOfMemoryError as error:
                self.forget_captures()
                raise torch.OutOfMemoryError(
                    f"{function}: {at_once} pictures at once do not fit into the memory of {self.device}; "
                    f"give an images_per_call below {at_once}"
                ) from error
        codes, found = (one[0] if len(one) == 1 else torch.cat(one) for one in zip(*parts, strict=True))
        return list(codes.split(self.config.lengths, 1)), found

    def _part(
        self,
        how: tuple[int, bool, bool, bool, bool],
        book: ScaleBook,
        paint: Callable[[Tensor], Tensor] | None,
        labels: Tensor,
        *settings: Any,
    ) -> tuple[Tensor, Tensor]:
        """As `Session.draw`. To look at all weights takes a host longer than the first scales take a GPU, so that it
        does when the GPU is at work, on the weights as they were before."""

        def right() -> Session:
            return self._session(*how, book, paint, len(labels))

        guess, drawn = None, None
        if how[-1]:
            kind = self._kind(*how, paint)
            guess = self._sessions.newest(lambda key: key[0] == kind)
        if guess is not None and guess.held is not None:
            drawn = guess.draw(labels, *settings, still=lambda: right() is guess)
        else:
            guess = None
        if drawn is None:
            drawn = right().draw(labels, *settings, after=guess)
        assert drawn is not None  # which only `still` can make it
        return drawn

    def _kind(
        self,
        at_once: int,
        guided: bool,
        smooth: bool,
        edits: bool,
        graphs: bool,
        paint: Callable[[Tensor], Tensor] | None,
    ) -> tuple:
        """What decides on a session beside the weights."""
        batch = at_once if at_once <= 8 or not graphs else -(-at_once // 8) * 8
        return batch, guided, smooth, edits, paint is None, self.device, engine.circumstances()

    def _session(
        self,
        at_once: int,
        guided: bool,
        smooth: bool,
        edits: bool,
        graphs: bool,
        book: ScaleBook,
        paint: Callable[[Tensor], Tensor] | None,
        count: int,
    ) -> Session:
        options = {"guided": guided, "smooth": smooth, "edits": edits}
        if not graphs:
            return Session(self, book, paint, count, **options, graphs=False)
        kind = self._kind(at_once, guided, smooth, edits, graphs, paint)
        modules = [self, book.convolutions]
        if paint is not None and self.vae is not None:
            modules += [self.vae.post_quant_conv, self.vae.decoder]
        # A graph knows weights by their addresses, which `.to` and the like change.
        places = (book.table.data_ptr(), *engine.addresses(*modules))
        made = self._sessions.get((kind, places), lambda: Session(self, book, paint, kind[0], **options, graphs=True))
        if made.held is None:
            made.held = [one.detach() for one in (book.table, *engine.tensors(*modules))]
        return made


def _names(values: Any, path: Path) -> tuple[str, ...]:
    if not isinstance(values, list) or not all(isinstance(one, str) for one in values):
        raise checkpoints.CheckpointError(f"{path}: class_names in config.json must be a list of names")
    return tuple(values)


def _check_settings(function: str, cfg: Any, top_k: Any, top_p: Any, images_per_call: Any, num_codes: int) -> None:
    for argument, value in (("cfg", cfg), ("top_p", top_p)):
        if isinstance(value, bool) or not isinstance(value, (int, float)):
            raise TypeError(f"{function}: {argument} must be a number, got {type(value).__name__}")
    for argument, value in (("top_k", top_k), ("images_per_call", images_per_call)):
        if isinstance(value, bool) or not isinstance(value, (int, type(None))):
            raise TypeError(f"{function}: {argument} must be an integer, got {type(value).__name__}")
    if not 0 <= cfg < math.inf:
        raise ValueError(f"{function}: cfg must be at least 0 and finite, got {cfg}")
    if top_k is None or not 0 <= top_k <= num_codes:
        raise ValueError(f"{function}: top_k must be from 0 to {num_codes}, the number of codes, got {top_k}")
    if not 0 <= top_p <= 1:
        raise ValueError(f"{function}: top_p must be from 0 to 1, got {top_p}")
    if images_per_call is not None and images_per_call < 1:
        raise ValueError(f"{function}: images_per_call must be at least 1, got {images_per_call}")
