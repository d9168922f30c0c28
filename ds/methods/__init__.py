"""Methods, one file each: ways to make a network that samples in few calls."""

from ds.methods.base import AbstractMethod
from ds.methods.denoising import Denoising
from ds.methods.denoising_student import DenoisingStudent

__all__ = ["AbstractMethod", "Denoising", "DenoisingStudent"]
