"""ADM: the networks of "Diffusion Models Beat GANs on Image Synthesis", arXiv:2105.05233.

guided-diffusion's UNetModel, EDM's DhariwalUNet and the networks of consistency models for ImageNet
and LSUN are UNet with these fields:

    norm_eps=1e-5                   GroupNorms of 32 groups, with PyTorch's epsilon
    open_frequencies, cosine_first  the time as cosines, then sines, the lowest frequency left out
    head_channels=64, or heads=4    heads of a width, or a number of them
    scale_shift                     the time scales and shifts what the second norm returns
    resnet_down, resnet_up          all levels; what is resampled has no weights in its shortcut
    classes                         a row is added to the time embedding before the blocks' SiLU
    out_channels=2 * in_channels    a learned variance after the mean
    pad_all_sides                   where convolutions resample, as in improved-diffusion

EDM's network has min(32, C / 4) groups, which are 32 for its 192 channels and more. What differs
besides is the order in which files hold q, k and v, and from which weights training starts.
"""

from ds.nets.unet import UNetConfig


def adm_imagenet64(**fields) -> UNetConfig:
    """Return ADM for ImageNet 64 x 64, or with other fields: 295.9 million weights.

    As EDM and consistency models have it; ADM's own has out_channels=6.
    """
    return _adm(64, (1, 2, 3, 4), {"channels": 192, "num_res_blocks": 3, "dropout": 0.1, **fields})


def adm_imagenet128(**fields) -> UNetConfig:
    """Return ADM for ImageNet 128 x 128, or with other fields: 421.5 million weights."""
    fields = {"heads": 4, "head_channels": None, **_VARIANCE, **fields}
    return _adm(128, (1, 1, 2, 3, 4), fields)


def adm_imagenet256(**fields) -> UNetConfig:
    """Return ADM for ImageNet 256 x 256, or with other fields: 553.8 million weights.

    classes=0 is the unconditional one.
    """
    return _adm(256, (1, 1, 2, 2, 4, 4), {**_VARIANCE, **fields})


def adm_imagenet512(**fields) -> UNetConfig:
    """Return ADM for ImageNet 512 x 512, or with other fields: 559.0 million weights.

    Its first level is half as wide as the numbers that tell it the time.
    """
    narrow = {"channels": 128, "embed_channels": 256, "time_channels": 1024}
    return _adm(512, (1, 2, 2, 4, 4, 8, 8), {**narrow, **_VARIANCE, **fields})


def adm_lsun(**fields) -> UNetConfig:
    """Return ADM for LSUN 256 x 256, or with other fields: 552.8 million weights.

    Those of consistency models have scale_shift=False and out_channels=None: 526.3 million.
    """
    return adm_imagenet256(**{"classes": 0, "dropout": 0.1, **fields})


_VARIANCE = {"out_channels": 6}


def _adm(size: int, channel_mult: tuple[int, ...], fields: dict) -> UNetConfig:
    levels = len(channel_mult)
    return UNetConfig(
        **{
            "image_size": size,
            "channels": 256,
            "channel_mult": channel_mult,
            "attention_resolutions": (32, 16, 8),
            "norm_eps": 1e-5,
            "open_frequencies": True,
            "cosine_first": True,
            "head_channels": 64,
            "scale_shift": True,
            "resnet_down": tuple(range(levels - 1)),
            "resnet_up": tuple(range(1, levels)),
            "classes": 1000,
            **fields,
        }
    )
