"""Networks: weights and wiring; the arithmetic lives in ds.ops."""

from ds.nets.base import AbstractNetConfig
from ds.nets.fold import fold_attention
from ds.nets.unet import UNet, UNetConfig, recompute_norms

__all__ = ["AbstractNetConfig", "UNet", "UNetConfig", "fold_attention", "recompute_norms"]
