"""Networks: weights and wiring; the arithmetic lives in ds.ops."""

from ds.nets.base import AbstractNetConfig
from ds.nets.blocks import recompute_norms
from ds.nets.classifier import Classifier, ClassifierConfig, adm_classifier
from ds.nets.fold import fold_attention
from ds.nets.mlp import MLP, MLPConfig
from ds.nets.potential import Potential, PotentialConfig
from ds.nets.song import SongConfig, SongUNet, ddpmpp, ncsnpp
from ds.nets.unet import UNet, UNetConfig

__all__ = [
    "MLP",
    "AbstractNetConfig",
    "Classifier",
    "ClassifierConfig",
    "MLPConfig",
    "Potential",
    "PotentialConfig",
    "SongConfig",
    "SongUNet",
    "UNet",
    "UNetConfig",
    "adm_classifier",
    "ddpmpp",
    "fold_attention",
    "ncsnpp",
    "recompute_norms",
]
