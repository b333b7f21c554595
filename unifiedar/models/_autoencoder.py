"""What the convolutional autoencoders with discrete codes share: pictures in and out, loading and saving."""

from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, ClassVar, TypeVar

import torch
from torch import Tensor, nn

from unifiedar import checkpoints
from unifiedar.models.convolutional import Decoder, DecoderConfig, Encoder

__all__ = ["Autoencoder", "AutoencoderConfig", "to_bytes"]

Model = TypeVar("Model", bound="Autoencoder")
Config = TypeVar("Config", bound="AutoencoderConfig")


def _tuples(value: Any) -> Any:
    """JSON's lists as the tuples they were."""
    return tuple(_tuples(one) for one in value) if isinstance(value, list) else value


@dataclass(frozen=True)
class AutoencoderConfig:
    """Sizes that every autoencoder has.

    Attributes:
        network: of encoder and decoder.
        num_codes: K of the codebook.
    """

    kind: ClassVar[str]
    network: DecoderConfig
    num_codes: int

    def to_dict(self) -> dict[str, Any]:
        """As nested plain values, for a JSON file."""
        return {"model": self.kind, **asdict(self)}

    @classmethod
    def from_dict(cls: type[Config], values: Mapping[str, Any]) -> Config:
        """Inverse of `to_dict`. Raises CheckpointError if the values are not those of this model."""
        if values.get("model") != cls.kind:
            raise checkpoints.CheckpointError(
                f"config.json must describe a {cls.kind!r} under 'model', got {values.get('model')!r}"
            )
        try:
            plain = {name: _tuples(value) for name, value in values.items() if name not in ("model", "network")}
            network = {name: _tuples(value) for name, value in values["network"].items()}
            return cls(network=DecoderConfig(**network), **plain)
        except (KeyError, TypeError, AttributeError, ValueError) as error:
            raise checkpoints.CheckpointError(f"config.json does not describe a {cls.kind!r}: {error}") from error


class Autoencoder(nn.Module):
    """An encoder, a quantizer between two convolutions, and a decoder; see `VQVAE` and `RQVAE`.

    The decoder and `post_quant_conv` may be of another dtype than the rest (`fast_decoder`): codes decide everything
    that comes after them, pixels nothing.

    Args:
        config: sizes; its `dim` is the width of a code vector, its `kernel` the side of the two convolutions.
    """

    configs: ClassVar[Mapping[str, Any]]
    config_class: ClassVar[type[AutoencoderConfig]]
    inside: ClassVar[tuple[str, ...]] = ()  # where a trainer's checkpoint has this model

    def __init__(self, config: Any):
        super().__init__()
        latent, dim, kernel = config.network.z_channels, config.dim, config.kernel
        self.config = config
        self.encoder, self.decoder = Encoder(config.network), Decoder(config.network)
        self.quant_conv = nn.Conv2d(latent, dim, kernel, padding=kernel // 2)
        self.post_quant_conv = nn.Conv2d(dim, latent, kernel, padding=kernel // 2)

    @property
    def device(self) -> torch.device:
        """Where the weights are."""
        return self.quant_conv.weight.device

    @property
    def dtype(self) -> torch.dtype:
        """Of the encoder's weights."""
        return self.quant_conv.weight.dtype

    # ---- loading and saving

    @classmethod
    def from_checkpoint(
        cls: type[Model],
        path: str | Path,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
        *,
        decoder_dtype: torch.dtype | None = None,
        config: Any = None,
    ) -> Model:
        """Load a model in eval mode, without gradients.

        Args:
            path: a folder that `save` wrote, or a published weights file (.pth, .pt, .bin or .safetensors).
            device: where to put it, the CPU if None.
            dtype: of the convolutions, as stored if None. The quantizer is float32 in any case.
            decoder_dtype: of the decoder, as `dtype` if None; given, it is laid out by `fast_decoder`. float16 is what
                VAR's own code paints in on a GPU.
            config: sizes; if None, those of config.json in the folder or beside the file or, if there is none of this
                model, of the published configuration whose keys and shapes the file has.

        Raises:
            CheckpointError: one sentence with the file, what is wrong with it and the way out.
        """
        found = checkpoints.resolve(path)
        tensors = checkpoints.load_tensors(found, under=cls.inside)
        if config is None:
            config = cls._config_of(found, tensors)
        return cls.from_tensors(config, tensors, found, device, dtype, decoder_dtype=decoder_dtype)

    @classmethod
    def from_tensors(
        cls: type[Model],
        config: Any,
        tensors: Mapping[str, Tensor],
        path: str | Path,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
        *,
        decoder_dtype: torch.dtype | None = None,
    ) -> Model:
        """As `from_checkpoint`, of tensors that are read already; `path` is where they came from, for the error."""
        with torch.device("meta"):
            model = cls(config)
        checkpoints.assign(model, tensors, path)
        for module in model.modules():  # counters that no file holds, or that were of other scales, start at zero
            for name, buffer in module._buffers.items():
                if buffer is not None and buffer.is_meta:
                    module._buffers[name] = torch.zeros_like(buffer, device="cpu")
        model.to(device=device).eval().requires_grad_(False)
        convolutions = (model.encoder, model.quant_conv, model.post_quant_conv, model.decoder)
        stored = model.dtype
        for part in model.children():
            part.to(dtype=(dtype or stored) if part in convolutions else torch.float32)
        if decoder_dtype is not None:
            model.fast_decoder(decoder_dtype)
        return model

    @classmethod
    def _config_of(cls, path: Path, tensors: Mapping[str, Tensor]) -> Any:
        beside = path if path.is_dir() else path.with_name(checkpoints.CONFIG)
        if beside.exists():
            values = checkpoints.read_config(path)
            if path.is_dir() or values.get("model") == cls.config_class.kind:
                return cls.config_class.from_dict(values)
        for config in cls.configs.values():
            with torch.device("meta"):
                model = cls(config)
            shapes = {name: value.shape for name, value in model.named_parameters()}
            same_keys = tensors.keys() == model.state_dict().keys()
            if same_keys and all(tensors[name].shape == shape for name, shape in shapes.items()):
                return config
        names = ", ".join(cls.configs)
        raise checkpoints.CheckpointError(
            f"{path}: has not the keys and shapes of a published {cls.__name__} ({names}), and there is no config.json "
            "of one beside it; give config="
        )

    def save(self, folder: str | Path) -> Path:
        """Write weights and config to a folder that `from_checkpoint` reads, atomically; replaces such a folder."""
        tensors = self.state_dict()
        largest = max(t.numel() * t.element_size() for t in tensors.values())
        return checkpoints.save(
            folder,
            tensors,
            self.config.to_dict(),
            overwrite=True,
            max_shard_bytes=max(15_000_000, largest + 1_000_000),
        )

    # ---- pictures

    def fast_decoder(self: Model, dtype: torch.dtype = torch.float16) -> Model:
        """Put the decoder and `post_quant_conv` in this dtype and in channels-last layout, in place; for inference.

        What tensor cores read without a transposition, and what the fused group norm takes. float16 is nearer to
        float32 than bfloat16, and what VAR's own code paints in on a GPU, under autocast; it overflows beyond 65,504.

        Returns:
            The model itself.
        """
        if not dtype.is_floating_point:
            raise TypeError(f"fast_decoder: dtype must be floating point, got {dtype}")
        for part in (self.post_quant_conv, self.decoder):
            part.to(dtype).to(memory_format=torch.channels_last)
        return self

    def _latents(self, x: Tensor, function: str) -> Tensor:
        """What the quantizer reads (B, C, h, w) of pictures (B, 3, H, W), floating point."""
        if not isinstance(x, Tensor) or not x.is_floating_point():
            got = x.dtype if isinstance(x, Tensor) else type(x).__name__
            raise TypeError(f"{function}: pictures must be floating point in [-1, 1], got {got}")
        channels, least = self.config.network.out_ch, self.config.network.downsampling
        if x.ndim != 4 or x.shape[1] != channels or min(x.shape[2:]) < least:
            raise ValueError(
                f"{function}: pictures must be (B, {channels}, H, W) with sides of at least {least}, "
                f"got {tuple(x.shape)}"
            )
        return self.quant_conv(self.encoder(x.to(self.dtype)))

    def _paint(self, features: Tensor) -> Tensor:
        """Pictures (B, 3, H, W), nominally in [-1, 1], of features (B, C, h, w), in the decoder's dtype."""
        return self.decoder(self.post_quant_conv(features.to(self.post_quant_conv.weight.dtype)))

    def _pixels(self, images: Tensor, function: str) -> Tensor:
        """Pictures as the encoder reads them, from uint8 or floating point in [-1, 1]; sides are whole code maps'."""
        if not isinstance(images, Tensor) or not (images.dtype == torch.uint8 or images.is_floating_point()):
            got = images.dtype if isinstance(images, Tensor) else type(images).__name__
            raise TypeError(f"{function}: images must be uint8, or floating point in [-1, 1], got {got}")
        channels, step = self.config.network.out_ch, self.config.network.downsampling
        sides = images.shape[2:]
        if images.ndim != 4 or images.shape[1] != channels or any(side % step or not side for side in sides):
            raise ValueError(
                f"{function}: images must be (N, {channels}, H, W) with sides that are multiples of {step}, "
                f"got {tuple(images.shape)}"
            )
        images = images.to(self.device)
        return images.to(self.dtype) / 127.5 - 1 if images.dtype == torch.uint8 else images


def to_bytes(images: Tensor) -> Tensor:
    """Pictures in [-1, 1] as uint8, rounded to nearest."""
    return ((images.float() + 1) * 127.5).round().clamp(0, 255).to(torch.uint8)
