"""Recipes: how a method was trained on CIFAR-10 where it was published.

A preset has the settings of its teacher and of its own method. `settings` gives those of another
method. A recipe says whose numbers they are, and what is ours. None has been trained here at this
size yet. What no recipe does: turn and scale images as EDM does, and read a second average of the
weights.
"""

from collections.abc import Callable
from dataclasses import replace

from ds.methods import (
    AbstractMethod,
    CRectifiedFlow,
    DiscreteMeanFlow,
    MeanFlow,
    MixFlow,
    PosteriorMeanFlow,
    RectifiedFlow,
    Shortcut,
)
from ds.nets import SongConfig
from ds.system.config import tag
from ds.training.config import TrainConfig
from ds.training.presets import Preset

IMAGES = 50_000  # of CIFAR-10's training set
_ADAM = (0.9, 0.999)
# DDPM++ as score SDEs have it, and as MeanFlow has it.
_SCORE_SDE = SongConfig(channel_mult=(1, 2, 2, 2), dropout=0.15)
_SLOW = SongConfig(dropout=0.2, embed_channels=256, resample_filter=(1, 3, 3, 1), conditions=("h",))


def _epochs(steps: int, batch: int, rows: int = IMAGES) -> float:
    """Return as many epochs as a number of steps takes: the last, partial batch is left out."""
    return steps / (rows // batch)


def rectified_flow(p: Preset) -> Preset:
    """1-RF: DDPM++ of four levels. Liu et al. 2022, arXiv:2209.03003, and the released settings.

    A reflow and a distillation of its result have an average of 0.9999; theirs have a dropout of
    0.1 too, where ours keep 0.15.
    """
    train = TrainConfig(
        batch_size=128,
        epochs=_epochs(1_300_000, 128),
        betas=_ADAM,
        grad_clip_norm=1.0,
        ema_decay=0.999999,
    )
    method = RectifiedFlow(reflow=0, reflow_ema=0.9999, nfe=100, student=_SCORE_SDE)
    return replace(p, method=method, train=train)


def rectified_flow_again(p: Preset) -> Preset:
    """2-RF++: reflow of an EDM teacher. Lee et al. 2024, arXiv:2405.20320, and the released code.

    They add LPIPS of the image, which needs a file of weights: --method.lpips FILE.
    """
    pairs = replace(p.pairs, count=1_000_000)
    method = RectifiedFlow(
        feeds="pairs", reflow=1, converted=True, two_ended=True, loss_type="pseudo_huber"
    )
    train = TrainConfig(epochs=_epochs(800_000, 512, pairs.count), betas=_ADAM, ema_decay=0.9999)
    return replace(p, pairs=pairs, method=method, train=train)


def c_rectified_flow(p: Preset) -> Preset:
    """Ours, as 1-RF: the paper has no experiments. Liu 2022, arXiv:2209.14577."""
    return replace(rectified_flow(p), method=CRectifiedFlow(student=_SCORE_SDE))


def mix_flow(p: Preset) -> Preset:
    """DDPM++ of EDM. Nayal et al. 2026, arXiv:2604.09181, and the released settings."""
    train = TrainConfig(batch_size=128, epochs=_epochs(500_000, 128), betas=_ADAM, ema_decay=0.9999)
    return replace(p, method=MixFlow(kl_weight=1e-5, student=SongConfig(dropout=0.13)), train=train)


def shortcut(p: Preset) -> Preset:
    """Ours: the paper, arXiv:2410.12557, has no CIFAR-10. Its optimiser and its average."""
    net = SongConfig(dropout=0.13, conditions=("level",))
    train = TrainConfig(
        batch_size=128,
        epochs=_epochs(400_000, 128),
        lr=1e-4,
        betas=_ADAM,
        optimizer="adamw",
        weight_decay=0.1,
        ema_decay=0.999,
    )
    return replace(p, method=Shortcut(student=net), train=train)


def mean_flow(p: Preset) -> Preset:
    """As first published. Geng et al. 2025, arXiv:2505.13447, and the released settings."""
    train = TrainConfig(
        batch_size=1024,
        epochs=_epochs(800_000, 1024),
        lr=6e-4,
        warmup_steps=10_000,
        betas=_ADAM,
        ema_decay=0.9999,
    )
    return replace(p, method=MeanFlow(student=_SLOW), train=train)


def discrete_mean_flow(p: Preset) -> Preset:
    """MeanFlow's network and optimiser for 2000 epochs. Hsu & Wood 2026, arXiv:2604.08837.

    The number of stages, their ratio and the learning rate are ours. They start from a flow model.
    """
    base = mean_flow(p)
    return replace(
        base,
        method=DiscreteMeanFlow(last=MeanFlow(student=_SLOW), even_in="sigma"),
        train=replace(base.train, epochs=2000, warmup_steps=1000),
    )


def posterior_mean_flow(p: Preset) -> Preset:
    """Ours, as MeanFlow, with the average of Rapakoulias et al. 2026, arXiv:2605.07661."""
    base = mean_flow(p)
    net = replace(_SLOW, conditions=("h", "outer", "context"))
    return replace(
        base,
        method=PosteriorMeanFlow(student=net),
        train=replace(base.train, ema_decay=0.9995),
    )


RECIPES: dict[tuple[str, str], Callable[[Preset], Preset]] = {
    **{
        ("cifar10", f.__name__): f
        for f in (
            rectified_flow,
            c_rectified_flow,
            mix_flow,
            shortcut,
            mean_flow,
            discrete_mean_flow,
            posterior_mean_flow,
        )
    },
    ("edm_cifar10", "rectified_flow"): rectified_flow_again,
}


def settings(name: str, preset: Preset, method: AbstractMethod) -> Preset:
    """Return the settings for a method with the teacher of a preset, whose name is given.

    They are the preset's if it is the preset's method, else those of a recipe, if there is one,
    else the preset's with this method.
    """
    if type(preset.method) is type(method):
        return preset
    recipe = RECIPES.get((name, tag(type(method))))
    return recipe(preset) if recipe else replace(preset, method=method)
