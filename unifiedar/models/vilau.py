"""VILA-U (Wu et al., arXiv:2409.04429): one autoregressive model that draws pictures and describes them.

A SigLIP encoder turns a picture into a grid of features, a residual quantizer into D codes a position; a convolutional
decoder paints pixels from the sums of the code vectors. A LLaMA reads those sums through a projector, beside ordinary
text tokens; at a visual position its hidden state goes to a depth transformer that emits the D codes one by one.
One class for every size: `VILAU.configs` names the published ones and the small one that ships.
"""

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from unifiedar import checkpoints
from unifiedar.models.convolutional import Decoder, DecoderConfig
from unifiedar.models.llama import KeyValueCache, Llama, LlamaConfig
from unifiedar.models.siglip import SiglipConfig, SiglipModel
from unifiedar.nn import DepthTransformer, Quantized, ResidualQuantizer
from unifiedar.nn.depth import require_sound
from unifiedar.tokenizer import TextTokenizer, load

__all__ = ["VILAU", "Sampling", "VILAUConfig", "VisionTower"]

BOS, EOS = 1, 2
# The four tokens that the vocabulary ends with, counted from its end.
IM_START, IM_END = -4, -3


@dataclass(frozen=True)
class Sampling:
    """How `generate` draws codes unless told otherwise, as `unifiedar.ops.sample_codes` takes it."""

    guidance: float = 3.0
    temperature: float = 1.0
    top_k: int = 900
    top_p: float = 0.96


@dataclass(frozen=True)
class VILAUConfig:
    """Sizes of a VILA-U.

    Attributes:
        vision: SigLIP towers; the width of the code vectors is `vision.hidden_size`.
        decoder: pixel decoder.
        language: language model; its vocabulary ends with <im_start>, <im_end>, <vi_start>, <vi_end>.
        num_codes: K of the codebook.
        depth: D, codes per position.
        shared_codebook: one table for all depths.
        depth_dim, depth_layers, depth_heads: of the depth transformer.
        latent_grid: side the quantized grid is resized to (bilinear) before the decoder, or None.
        sampling: what `generate` does by default; what suits a model comes with its checkpoint.
    """

    vision: SiglipConfig
    decoder: DecoderConfig
    language: LlamaConfig
    num_codes: int
    depth: int
    shared_codebook: bool
    depth_dim: int
    depth_layers: int
    depth_heads: int
    depth_dropout: float = 0.1
    latent_grid: int | None = None
    sampling: Sampling = Sampling()

    def to_dict(self) -> dict[str, Any]:
        """As nested plain values, for a JSON file."""
        return {"model": "vilau", **asdict(self)}

    @classmethod
    def from_dict(cls, values: dict[str, Any]) -> "VILAUConfig":
        """Inverse of `to_dict`. Raises CheckpointError if the values are not those of a VILA-U."""
        values = dict(values)
        if values.pop("model", None) != "vilau":
            raise checkpoints.CheckpointError("config.json does not describe a VILA-U (its 'model' is not 'vilau')")
        try:
            decoder: dict[str, Any] = {k: tuple(v) if isinstance(v, list) else v for k, v in values["decoder"].items()}
            del values["decoder"]
            return cls(
                vision=SiglipConfig(**values.pop("vision")),
                decoder=DecoderConfig(**decoder),
                language=LlamaConfig(**values.pop("language")),
                sampling=Sampling(**values.pop("sampling", {})),
                **values,
            )
        except (KeyError, TypeError, AttributeError) as error:
            raise checkpoints.CheckpointError(f"config.json does not describe a VILA-U: {error}") from error


def _published(vision: SiglipConfig, resolution: int, depth: int, latent_grid: int | None) -> VILAUConfig:
    return VILAUConfig(
        vision=vision,
        decoder=DecoderConfig(128, (1, 1, 2, 2, 4), 2, 256, resolution, (16,)),
        language=LlamaConfig(32004, 4096, 11008, 32, 32, 8192, rope_scaling=2.0),
        num_codes=16384,
        depth=depth,
        shared_codebook=True,
        depth_dim=2560,
        depth_layers=6,
        depth_heads=40,
        latent_grid=latent_grid,
    )


# For models that know their few thousand pictures by heart: guidance, or a bold draw, leads away from what is known.
_BY_HEART = Sampling(guidance=1.0, temperature=0.25, top_k=0, top_p=0.9)


class VisionTower(nn.Module):
    """The unified foundation vision tower (`rqvaesiglip.*`): encoder, quantizer, pixel decoder, text encoder."""

    def __init__(self, config: VILAUConfig):
        super().__init__()
        self.grid, self.latent_grid = config.vision.grid, config.latent_grid
        width = config.vision.hidden_size
        self.siglip_model = SiglipModel(config.vision)
        self.quantizer = ResidualQuantizer(config.num_codes, width, config.depth, shared=config.shared_codebook)
        self.post_quant_conv = nn.Conv2d(width, config.decoder.z_channels, 1)
        self.decoder = Decoder(config.decoder)
        self.tie()

    def tie(self) -> None:
        """The published state lists the loss's scale and bias under two names: make them one parameter each."""
        self.logit_scale, self.logit_bias = self.siglip_model.logit_scale, self.siglip_model.logit_bias

    def encode(self, images: Tensor) -> Quantized:
        """Images (B, 3, S, S) in [-1, 1] to quantized features (B, L, C), codes (B, L, D) and the commitment loss."""
        return self.quantizer(self.siglip_model.features(images))

    def decode(self, features: Tensor) -> Tensor:
        """Features (B, L, C) to images (B, 3, S, S), nominally in [-1, 1]."""
        z = features.transpose(1, 2).unflatten(2, (self.grid, self.grid))
        if self.latent_grid is not None:
            z = F.interpolate(z.float(), size=(self.latent_grid, self.latent_grid), mode="bilinear").to(features.dtype)
        return self.decoder(self.post_quant_conv(z))


class _TowerAndHead(nn.Module):
    """The two parts that the published checkpoint keeps in one folder, `vision_tower`."""

    def __init__(self, config: VILAUConfig):
        super().__init__()
        self.rqvaesiglip = VisionTower(config)
        self.rqtransformer = DepthTransformer(
            config.language.hidden_size,
            config.vision.hidden_size,
            config.depth_dim,
            config.depth_layers,
            config.depth_heads,
            config.depth,
            config.num_codes,
            config.depth_dropout,
        )


class _Wrapper(nn.Module):
    def __init__(self, config: VILAUConfig):
        super().__init__()
        self.vision_tower = _TowerAndHead(config)


class _Projector(nn.Module):
    def __init__(self, in_dim: int, out_dim: int):
        super().__init__()
        self.layers = nn.Sequential(nn.Linear(in_dim, out_dim), nn.GELU(), nn.Linear(out_dim, out_dim))

    def forward(self, x: Tensor) -> Tensor:
        return self.layers(x)


class VILAU(nn.Module):
    """The whole model. `generate` draws, `describe` names, `reconstruct` passes a picture through its codes.

    Args:
        config: sizes, one of `VILAU.configs` or your own.
        tokenizer: what `generate` and `describe` read and write text with; `from_checkpoint` brings it along.
    """

    configs: ClassVar[dict[str, VILAUConfig]] = {
        "7b-256": _published(
            SiglipConfig(256, 16, 1024, 4096, 24, 16, 24, 16, 4096, 32000, 64), 256, depth=4, latent_grid=None
        ),
        "7b-384": _published(
            SiglipConfig(384, 14, 1152, 4304, 27, 16, 27, 16, 4304, 32000, 64), 384, depth=16, latent_grid=24
        ),
        "emoji": VILAUConfig(
            vision=SiglipConfig(64, 8, 256, 1024, 8, 4, 2, 4, 1024, 1024, 24),
            decoder=DecoderConfig(64, (1, 2, 2, 3), 1, 128, 64, (8,)),
            language=LlamaConfig(1024, 320, 896, 7, 5, 128, dropout=0.1),
            num_codes=2048,
            depth=6,
            shared_codebook=True,
            depth_dim=256,
            depth_layers=4,
            depth_heads=4,
            sampling=_BY_HEART,
        ),
        # Trains on a processor in an hour, on a few hundred pictures.
        "emoji-tiny": VILAUConfig(
            vision=SiglipConfig(64, 8, 128, 512, 5, 2, 2, 2, 512, 1024, 24),
            decoder=DecoderConfig(32, (1, 2, 2, 4), 1, 64, 64, (8,)),
            language=LlamaConfig(1024, 192, 512, 4, 3, 128, dropout=0.1),
            num_codes=512,
            depth=4,
            shared_codebook=True,
            depth_dim=128,
            depth_layers=2,
            depth_heads=2,
            sampling=_BY_HEART,
        ),
    }

    def __init__(self, config: VILAUConfig, tokenizer: TextTokenizer | None = None):
        super().__init__()
        self.config, self.tokenizer = config, tokenizer
        self.llm = Llama(config.language)
        self.mm_projector = _Projector(config.vision.hidden_size, config.language.hidden_size)
        self.vision_tower = _Wrapper(config)

    # ---- parts, by the names of the paper

    @property
    def tower(self) -> VisionTower:
        """The unified vision tower."""
        return self.vision_tower.vision_tower.rqvaesiglip

    @property
    def depth_transformer(self) -> DepthTransformer:
        """The depth transformer."""
        return self.vision_tower.vision_tower.rqtransformer

    @property
    def image_size(self) -> int:
        """Side of the pictures, pixels."""
        return self.config.vision.image_size

    @property
    def image_tokens(self) -> int:
        """L, visual positions a picture takes."""
        return self.config.vision.grid**2

    @property
    def max_prompt_tokens(self) -> int:
        """Longest prompt that leaves room for a picture and the special tokens."""
        return self.config.language.max_positions - self.image_tokens - 4

    @property
    def device(self) -> torch.device:
        """Where the weights are."""
        return next(self.mm_projector.parameters()).device

    @property
    def dtype(self) -> torch.dtype:
        """Of the weights."""
        return next(self.mm_projector.parameters()).dtype

    def special(self, token: int) -> int:
        """Id of a special token counted from the vocabulary's end (IM_START, IM_END)."""
        return self.config.language.vocab_size + token

    # ---- loading and saving

    @classmethod
    def from_checkpoint(
        cls, path: str | Path, device: torch.device | str | None = None, dtype: torch.dtype | None = None
    ) -> "VILAU":
        """Load a model in eval mode.

        Args:
            path: name of a model that ships, a folder, or a weights file with config.json beside it.
            device: where to put it, the CPU if None.
            dtype: of the weights, as stored if None (8-bit weights become float32).

        Raises:
            CheckpointError: one sentence with the file, what is wrong with it and the way out.
        """
        folder = checkpoints.resolve(path)
        config = VILAUConfig.from_dict(checkpoints.read_config(folder))
        with torch.device("meta"):
            model = cls(config)
        tensors = checkpoints.load_tensors(folder)
        checkpoints.assign(model, tensors, folder)
        model.tower.tie()
        vocabulary = (folder if folder.is_dir() else folder.parent) / "tokenizer.json"
        if vocabulary.is_file():
            model.tokenizer = load(vocabulary)
        # One dtype throughout: a checkpoint may keep some weights in 8 bits and others in 16.
        return model.to(device=device, dtype=dtype or model.dtype).eval().requires_grad_(False)

    def save(self, folder: str | Path, *, int8: Iterable[str] = ()) -> None:
        """Write weights, config and tokenizer to a folder that `from_checkpoint` reads, atomically.

        Args:
            folder: made, or replaced.
            int8: names of weights to store in 8 bits with one scale a row.
        """
        self.write(folder, self.state_dict(), int8=int8)

    def write(self, folder: str | Path, tensors: Mapping[str, Tensor], *, int8: Iterable[str] = ()) -> Path:
        """As `save`, with tensors of these names in place of the model's own (other dtypes, say)."""
        files = {} if self.tokenizer is None else {"tokenizer.json": self.tokenizer.inner.to_str(pretty=True).encode()}
        largest = max(t.numel() * t.element_size() for t in tensors.values())
        return checkpoints.save(
            folder,
            tensors,
            self.config.to_dict(),
            int8=int8,
            files=files,
            overwrite=True,
            # Small shards suit a repository; one tensor of a 7B model is larger than that.
            max_shard_bytes=15_000_000 if largest < 14_000_000 else 4_000_000_000,
        )

    # ---- training

    def forward(self, ids: Tensor, features: Tensor, begin: Tensor) -> Tensor:
        """Hidden states of sequences that hold one picture each.

        Args:
            ids: (B, T) int64 token ids, padded at the right; what stands in the picture's L places is ignored.
            features: (B, L, C) quantized features, placed at begin[b] .. begin[b] + L - 1.
            begin: (B,) int64.

        Returns:
            (B, T, hidden_size); state i predicts token i + 1, text through `llm.lm_head`, codes through `depth_logits`.
        """
        x = self.llm.embed(ids)
        visual = self.mm_projector(features.to(x.dtype)).to(x.dtype)
        places = begin[:, None] + torch.arange(features.shape[1], device=ids.device)
        return self.llm(x.scatter(1, places[..., None].expand_as(visual), visual))

    def depth_logits(
        self, hidden: Tensor, begin: Tensor, codes: Tensor, *, exact_reference_rounding: bool = False
    ) -> Tensor:
        """Teacher-forced logits (B, L, D, K) of the pictures' codes (B, L, D) from `forward`'s hidden states (B, T, h).

        The state before each visual position predicts that position's codes. exact_reference_rounding adds up the
        codes' embeddings in the weights' dtype, as the published code does on a GPU and `generate` does; without it
        they are added up in float32.
        """
        batch, length, depth = codes.shape
        places = begin[:, None] - 1 + torch.arange(length, device=hidden.device)
        states = hidden.gather(1, places[..., None].expand(-1, -1, hidden.shape[-1]))
        sums = self.depth_transformer.running_sums(
            codes, self.tower.quantizer.table, exact_reference_rounding=exact_reference_rounding
        ).to(hidden.dtype)
        logits = self.depth_transformer(states.flatten(0, 1), sums.flatten(0, 1))
        return logits.view(batch, length, depth, -1)

    # ---- inference

    def _require_tokenizer(self) -> TextTokenizer:
        if self.tokenizer is None:
            raise ValueError("VILAU: no tokenizer; load with from_checkpoint or pass one to VILAU(config, tokenizer)")
        return self.tokenizer

    def token_ids(self, text: str) -> list[int]:
        """Token ids of any text, special tokens spelled out in it read as plain characters."""
        return self._require_tokenizer().encode(text)

    def prompt_ids(self, prompt: str) -> list[int]:
        """Token ids of a prompt for `generate`.

        Raises:
            ValueError: if the prompt is longer than `max_prompt_tokens`.
        """
        ids = self.token_ids(prompt)
        if len(ids) > self.max_prompt_tokens:
            raise ValueError(f"generate: prompt must have at most {self.max_prompt_tokens} tokens, got {len(ids)}")
        return ids

    @torch.no_grad()
    def generate(
        self,
        prompts: Sequence[str],
        *,
        guidance: float | None = None,
        temperature: float | Sequence[float] | None = None,
        top_k: int | None = None,
        top_p: float | None = None,
        seed: int | Sequence[int] = 0,
        progress: Callable[[int], object] | None = None,
        exact_reference_rounding: bool = False,
    ) -> Tensor:
        """Draw one picture for each prompt.

        Args:
            prompts: N texts.
            guidance: strength of classifier-free guidance on the code logits; 1 is none.
            temperature, top_k, top_p: as `unifiedar.ops.sample_codes`; temperature may be one number for each depth.
                What is None is taken from `config.sampling`.
            seed: of picture i is seed + i, or seed[i] of a sequence. The noise is drawn on the CPU for each picture by
                itself, so that a picture does not depend on the others of its batch.
            progress: called with the number of visual positions finished since the last call.
            exact_reference_rounding: as `decode_codes` takes it. Guidance, and the sums that go from one code to the
                next and to the next position, are rounded as the published code does in any case: logits are mixed in
                their own dtype before they become float32, sums are those of the codebook's dtype.

        Returns:
            (N, 3, S, S) uint8 RGB on the CPU.

        Raises:
            FloatingPointError: if logits are NaN, naming picture, position and depth.
        """
        codes = self.generate_codes(
            prompts, guidance=guidance, temperature=temperature, top_k=top_k, top_p=top_p, seed=seed, progress=progress
        )
        return self.decode_codes(codes, exact_reference_rounding=exact_reference_rounding)

    @torch.no_grad()
    def generate_codes(
        self,
        prompts: Sequence[str],
        *,
        guidance: float | None = None,
        temperature: float | Sequence[float] | None = None,
        top_k: int | None = None,
        top_p: float | None = None,
        seed: int | Sequence[int] = 0,
        progress: Callable[[int], object] | None = None,
    ) -> Tensor:
        """As `generate`, but the codes (N, L, D) int64, on the model's device."""
        default = self.config.sampling
        guidance = default.guidance if guidance is None else guidance
        temperature = default.temperature if temperature is None else temperature
        top_k = default.top_k if top_k is None else top_k
        top_p = default.top_p if top_p is None else top_p
        rows, count, device = [self.prompt_ids(p) for p in prompts], len(prompts), self.device
        seeds = [seed + i for i in range(count)] if isinstance(seed, int) else list(seed)
        if len(seeds) != count:
            raise ValueError(f"generate: seed must be a number or one for each of {count} prompts, got {len(seeds)}")
        if not count:
            return torch.empty(0, self.image_tokens, self.config.depth, dtype=torch.int64, device=device)
        generators = [torch.Generator().manual_seed(s) for s in seeds]
        guided = guidance != 1.0
        rows = [[BOS, *row, self.special(IM_START)] for row in rows]
        if guided:
            rows += [[BOS, self.special(IM_START)]] * count
        longest = max(map(len, rows))
        pad = torch.tensor([longest - len(row) for row in rows], device=device)
        ids = torch.tensor([[0] * (longest - len(row)) + row for row in rows], device=device)
        cache = KeyValueCache(
            self.config.language, len(rows), longest + self.image_tokens, device=device, dtype=self.dtype
        )
        hidden = self.llm(self.llm.embed(ids), cache, pad)[:, -1]
        codes: list[Tensor] = []
        unsound: list[Tensor] = []
        codebook = self.tower.quantizer.table
        for step in range(self.image_tokens):
            noise = torch.stack(
                [torch.empty(self.config.depth, self.config.num_codes).exponential_(generator=g) for g in generators]
            )
            found = self.depth_transformer.decode(
                hidden,
                codebook,
                guidance=guidance if guided else None,
                temperature=temperature,
                top_k=top_k,
                top_p=top_p,
                noise=noise.to(device, non_blocking=True),
            )
            codes.append(found.codes)
            unsound.append(found.unsound)
            if step + 1 < self.image_tokens:
                x = self.mm_projector(found.total.to(self.dtype)).unsqueeze(1)
                hidden = self.llm(torch.cat([x, x]) if guided else x, cache, pad)[:, -1]
            if progress is not None:
                progress(1)
        require_sound("generate", unsound)
        return torch.stack(codes, dim=1)

    @torch.no_grad()
    def decode_codes(self, codes: Tensor, *, exact_reference_rounding: bool = False) -> Tensor:
        """Codes (N, L, D) or (N, h, w, D) int64 to pictures (N, 3, S, S) uint8 on the CPU.

        The codes' embeddings are added up in float32; with exact_reference_rounding in the weights' dtype, one after
        another, as the published code does on a GPU.
        """
        codes = codes.to(self.device).flatten(1, -2)
        if exact_reference_rounding:
            table = self.tower.quantizer.table
            features = self.depth_transformer.running_sums(codes, table, exact_reference_rounding=True)[..., -1, :]
        else:
            features = self.tower.quantizer.embed(codes)
        images = self.tower.decode(features.to(self.dtype))
        return ((images.float() + 1) * 127.5).round().clamp(0, 255).to(torch.uint8).cpu()

    def _pixels(self, images: Tensor, function: str) -> Tensor:
        size = self.image_size
        if images.dtype != torch.uint8:
            raise TypeError(f"{function}: images must be uint8, got {images.dtype}")
        if images.ndim != 4 or images.shape[1:] != (3, size, size):
            raise ValueError(f"{function}: images must be (N, 3, {size}, {size}), got {tuple(images.shape)}")
        return images.to(self.device).to(self.dtype) / 127.5 - 1

    @torch.no_grad()
    def pool(self, images: Tensor) -> Tensor:
        """Pictures (N, 3, S, S) uint8 to unit vectors (N, C) float32, comparable to `tower.siglip_model.embed_text`."""
        features = self.tower.encode(self._pixels(images, "pool")).features
        return self.tower.siglip_model.pool(features)

    @torch.no_grad()
    def encode(self, images: Tensor) -> Tensor:
        """Codes (N, h, w, D) int64 of pictures (N, 3, S, S) uint8."""
        codes = self.tower.encode(self._pixels(images, "encode")).codes
        return codes.unflatten(1, (self.config.vision.grid, -1)).cpu()

    @torch.no_grad()
    def reconstruct(self, images: Tensor) -> tuple[Tensor, Tensor]:
        """Pictures (N, 3, S, S) uint8 through their codes: pictures (N, 3, S, S) uint8, codes (N, h, w, D) int64."""
        codes = self.tower.encode(self._pixels(images, "reconstruct")).codes
        return self.decode_codes(codes), codes.unflatten(1, (self.config.vision.grid, -1)).cpu()

    @torch.no_grad()
    def describe(
        self, images: Tensor, *, answers: int = 1, beams: int = 5, max_tokens: int = 32
    ) -> list[list[tuple[str, float]]]:
        """Name what is on each picture, in at least one token.

        Args:
            images: (N, 3, S, S) uint8.
            answers: how many texts for each picture, best first.
            beams: width of the beam search, at least `answers`; 1 is greedy.
            max_tokens: longest text.

        Returns:
            For each picture a list of (text, log-probability in nats).
        """
        if not 1 <= answers <= beams:
            raise ValueError(f"describe: answers must be from 1 to beams ({beams}), got {answers}")
        tokenizer = self._require_tokenizer()
        found = self.beam_search(images, beams=beams, max_tokens=max_tokens)
        return [[(tokenizer.decode(ids), value) for ids, value in texts[:answers]] for texts in found]

    @torch.no_grad()
    def beam_search(
        self, images: Tensor, *, beams: int = 5, max_tokens: int = 32
    ) -> list[list[tuple[list[int], float]]]:
        """As `describe`, but all beams, and token ids without the end in place of texts."""
        pixels, count, device = self._pixels(images, "describe"), len(images), self.device
        if not count:
            return []
        features = self.tower.encode(pixels).features
        first = torch.tensor([[BOS, self.special(IM_START)]], device=device).expand(count, -1)
        last = torch.tensor([[self.special(IM_END)]], device=device).expand(count, -1)
        x = torch.cat([self.llm.embed(first), self.mm_projector(features), self.llm.embed(last)], dim=1)
        length = x.shape[1]
        room = self.config.language.max_positions - length
        cache = KeyValueCache(
            self.config.language, count, length + min(max_tokens, room), device=device, dtype=self.dtype
        )
        logits = self.llm.lm_head(self.llm(x, cache)[:, -1]).float().log_softmax(-1)
        vocab = logits.shape[-1]
        logits[:, EOS] = float("-inf")  # an answer has words
        scores, tokens = logits.topk(min(beams, vocab))  # (N, beams)
        width = scores.shape[1]
        texts = tokens.unsqueeze(-1)
        cache = cache.select(torch.arange(count, device=device).repeat_interleave(width))
        base = torch.arange(count, device=device)[:, None] * width
        ended = torch.full((vocab,), float("-inf"), device=device)
        ended[EOS] = 0.0  # a finished text goes on with nothing but its end, at no cost
        for _ in range(min(max_tokens, room) - 1):
            done = tokens == EOS
            if bool(done.all()):
                break
            hidden = self.llm(self.llm.embed(tokens.reshape(-1, 1)), cache)[:, -1]
            step = self.llm.lm_head(hidden).float().log_softmax(-1).view(count, width, vocab)
            step = torch.where(done[..., None], ended, step)
            scores, flat = (scores[..., None] + step).flatten(1).topk(width)
            parent, tokens = flat // vocab, flat % vocab
            texts = torch.cat([texts.gather(1, parent[..., None].expand_as(texts)), tokens[..., None]], dim=-1)
            if width > 1:
                cache = cache.select((base + parent).flatten())
        found = []
        for rows, values in zip(texts.tolist(), scores.tolist(), strict=True):
            cut = [row[: row.index(EOS)] if EOS in row else row for row in rows]
            found.append(list(zip(cut, values, strict=True)))
        return found
