"""Decoder: make pictures of latents with an autoencoder of diffusers, imported on use."""

import hashlib
import json
import logging
import math
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save
from torch import Tensor, nn

from ds.models import pretrained
from ds.models.convert.diffusers import files
from ds.models.convert.imported import named
from ds.models.images import GREY_OR_RGB
from ds.models.pretrained import DECODER_CONFIG as CONFIG
from ds.models.pretrained import DECODER_WEIGHTS as WEIGHTS
from ds.system.ambient import tf32, without_ambient
from ds.system.files import by_name, first_line, present, read_json

KINDS = ("AutoencoderKL", "VQModel")
AT_ONCE = 2**25  # elements of the widest map that is decoded at a time
# Attention has other names in old files.
_OLD = {".query.": ".to_q.", ".key.": ".to_k.", ".value.": ".to_v.", ".proj_attn.": ".to_out.0."}
log = logging.getLogger("ds")


@dataclass(frozen=True, eq=False)
class Decoder:
    """The autoencoder whose latents a network draws: decoder(latents) -> pictures.

    `net` is an AutoencoderKL or a VQModel of diffusers. It runs in float32, on the device of the
    latents, to which a call moves it. Raises ValueError for another network, and for one whose
    pictures are neither grey nor RGB.
    """

    net: nn.Module

    def __post_init__(self):
        kind, channels = type(self.net).__name__, self._config.get("out_channels")
        if kind not in KINDS:
            raise ValueError(f"Decoder: net must be of the kind {' or '.join(KINDS)}, not {kind}")
        if channels not in GREY_OR_RGB:
            raise ValueError(f"Decoder: out_channels must be 1 or 3, not {channels!r}")
        # nn.Module's own: that of diffusers warns where nothing is lost.
        nn.Module.to(self.net, torch.float32).eval().requires_grad_(False)

    @classmethod
    def read(cls, folder: Path) -> "Decoder":
        """Read an autoencoder's directory as diffusers writes it.

        Raises ValueError, naming the file, for what is missing, damaged or not accepted, and
        RuntimeError without diffusers.
        """
        file = folder / CONFIG
        if not present(file):
            raise ValueError(f"{folder}: the decoder's {CONFIG} is missing")
        fields = by_name(read_json(file), file)
        net, (where, said) = _built(fields, file), files.find(folder)
        for sentence in said:
            log.info("%s", sentence)
        weights = {_current(name): w for name, w in named(files.read(where), where).items()}
        pretrained.check_weights(net, weights, str(where))
        net.load_state_dict(weights, assign=True)
        with pretrained.naming(folder):
            decoder = cls(net)
        if "scaling_factor" not in fields:
            factor = decoder._config["scaling_factor"]
            log.warning(
                "%s: gives no scaling_factor, so %g is taken, as in diffusers", file, factor
            )
        return decoder

    def fingerprint(self) -> str:
        """Return the SHA-256, in hex, of the configuration and the weights."""
        digest = hashlib.sha256()
        for content in self.files().values():
            digest.update(content)
        return digest.hexdigest()

    def files(self) -> dict[str, bytes]:
        """Return the content of the files that `read` needs, by name."""
        fields = {name: v for name, v in self._config.items() if not name.startswith("_")}
        text = json.dumps({"_class_name": type(self.net).__name__, **fields}, indent=2)
        weights = {name: w.cpu().contiguous() for name, w in self.net.state_dict().items()}
        pretrained.check_finite(weights, "decoder")
        return {CONFIG: text.encode(), WEIGHTS: save(weights, metadata={"format": "pt"})}

    def image_shape(self, latent: tuple[int, ...]) -> tuple[int, int, int]:
        """Return the shape (C, H, W) of the picture of a latent; ValueError for another latent."""
        channels, fields = self._config["latent_channels"], self._config
        if len(latent) != 3 or latent[0] != channels:
            raise ValueError(
                f"the decoder reads latents [{channels}, H, W], and the network draws "
                f"{list(latent)}"
            )
        scale = 2 ** (len(fields["block_out_channels"]) - 1)
        return fields["out_channels"], scale * latent[1], scale * latent[2]

    def memory(self, latent: tuple[int, ...], count: int) -> int:
        """Return a lower bound on the bytes that decoding so many latents takes.

        Pictures are float32, and there once more while they are put together. The last block reads
        two maps of its width, float32, and writes one.
        """
        pictures = 2 * 4 * count * math.prod(self.image_shape(latent))
        return pictures + 3 * 4 * min(count, self._many(latent)) * self._widest(latent)

    @without_ambient()
    def __call__(self, latents: Tensor) -> Tensor:
        """Return the pictures of latents [N, C, h, w]: float32 [N, C, H, W], about [-1, 1].

        Rombach et al. 2022, "High-Resolution Image Synthesis with Latent Diffusion Models",
        section D.1: latents are the autoencoder's, shifted and scaled to a standard deviation of 1.
        """
        shape = self.image_shape(tuple(latents.shape[1:]))
        nn.Module.to(self.net, latents.device)
        many = self._many(tuple(latents.shape[1:]))
        with tf32(False):
            parts = [self._decode(self._unscaled(z)) for z in latents.float().split(many)]
        images = torch.cat([latents.new_empty(0, *shape, dtype=torch.float32), *parts])
        if not images.isfinite().all():  # which waits for a GPU; decoding takes far longer
            raise RuntimeError("Decoder: pictures are not finite; look at the weights in decoder/")
        return images

    def _decode(self, z: Tensor) -> Tensor:
        net: Any = self.net
        return net.decode(z).sample

    def _unscaled(self, z: Tensor) -> Tensor:
        """Return latents as the autoencoder made them, with the factors of its configuration."""
        fields = self._config
        z = z / fields["scaling_factor"]
        mean, std = fields.get("latents_mean"), fields.get("latents_std")
        if mean and std:  # of each channel
            mean, std = (z.new_tensor(values).reshape(-1, 1, 1) for values in (mean, std))
            return z * std + mean
        return z + (fields.get("shift_factor") or 0.0)

    def _many(self, latent: tuple[int, ...]) -> int:
        """Return how many latents are decoded at a time."""
        return max(1, AT_ONCE // self._widest(latent))

    def _widest(self, latent: tuple[int, ...]) -> int:
        _, h, w = self.image_shape(latent)
        return self._config["block_out_channels"][0] * h * w

    @property
    def _config(self) -> Mapping[str, Any]:
        """The fields of diffusers' configuration, those that the file left out among them."""
        return getattr(self.net, "config", {})


def _built(fields: dict[str, Any], file: Path) -> nn.Module:
    """Return the network of a configuration, without weights."""
    if (kind := fields.get("_class_name")) not in KINDS:
        raise ValueError(f"{file}: _class_name is {kind!r}; accepted is {' or '.join(KINDS)}")
    try:
        import diffusers
    except ImportError:
        raise RuntimeError(
            f"{file}: decoding latents needs diffusers: pip install 'denoising-student[latents]'"
        ) from None
    try:
        with without_ambient(), torch.device("meta"):
            return getattr(diffusers, kind).from_config(fields)
    except Exception as error:  # of whatever kind a wrong field leads to
        raise ValueError(
            f"{file}: diffusers builds no {kind} from it ({first_line(error)})"
        ) from None


def _current(name: str) -> str:
    """Return the name that diffusers gives a weight today."""
    for old, new in _OLD.items():
        name = name.replace(old, new)
    return name
