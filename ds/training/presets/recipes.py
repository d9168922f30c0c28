"""Recipes: how a method was trained on CIFAR-10, or ImageNet 64 x 64, where it was published.

A preset has the settings of its teacher and of its own method. `settings` gives those of another
method. A recipe says whose numbers they are, and what is ours. None has been trained here at this
size yet. What no recipe does: turn, scale and mirror images, load the weights of LPIPS, and read a
second average of the weights.
"""

from collections.abc import Callable
from dataclasses import replace

from ds.methods import (
    AbstractMethod,
    ConsistencyDistillation,
    ConsistencyTraining,
    CRectifiedFlow,
    DiscreteMeanFlow,
    Drifting,
    EasyConsistencyTuning,
    ImprovedConsistencyTraining,
    MeanFlow,
    MixFlow,
    PosteriorMeanFlow,
    RectifiedFlow,
    RegularizedConsistencyModel,
    Shortcut,
    SimplifiedConsistencyModel,
)
from ds.nets import SongConfig
from ds.nets.adm import adm_imagenet64
from ds.nets.song import ncsnpp
from ds.system.config import tag
from ds.training.config import TrainConfig
from ds.training.presets import Preset, progressive_cifar10

IMAGES, IMAGENET = 50_000, 1_281_167  # of the training sets of CIFAR-10 and ImageNet
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


def consistency_distillation(p: Preset) -> Preset:
    """CD with Heun's step and L2. Song et al. 2023, arXiv:2303.01469, and the released JAX code.

    Their teacher is an NCSN++, and their best figure is with LPIPS: --method.lpips FILE. With L1
    they have a learning rate of 2e-4. The target is the student itself, whatever the loss.
    """
    return replace(p, method=ConsistencyDistillation(), train=_radam(800_000, 512, 4e-4, 0.9999))


def consistency_distillation_64(p: Preset) -> Preset:
    """CD on ImageNet, as the released PyTorch code. Its network is told 1000 times as much.

    Ours is a copy of a teacher that is told what EDM's is. Their loss is LPIPS.
    """
    method = ConsistencyDistillation(num_levels=40, target_decay=0.95, indices=(0, 22), clip=True)
    return replace(p, method=method, train=_radam(600_000, 2048, 8e-6, 0.999943, IMAGENET))


def consistency_training(p: Preset) -> Preset:
    """CT from scratch. Song et al. 2023, arXiv:2303.01469, and the released JAX code.

    They stopped at 740,000 steps. Their loss is LPIPS: --method.lpips FILE.
    """
    method = ConsistencyTraining(student=_ncsnpp(p))
    return replace(p, method=method, train=_radam(800_000, 512, 4e-4, 0.9999))


def consistency_training_64(p: Preset) -> Preset:
    """CT on ImageNet, as the released PyTorch code, whose command starts from EDM's weights.

    Ours starts from scratch, as the paper says. Their loss is LPIPS.
    """
    method = ConsistencyTraining(
        end_steps=200,
        target_decay=0.95,
        noise_scale=250.0,
        indices=(0, 106),
        clip=True,
        student=adm_imagenet64(dropout=0.0),
    )
    return replace(p, method=method, train=_radam(800_000, 2048, 1e-4, 0.999943, IMAGENET))


def improved_consistency_training(p: Preset) -> Preset:
    """iCT from scratch. Song & Dhariwal 2023, arXiv:2310.14189; there is no official code.

    The network is NCSN++, and its random frequencies have the paper's scale, 0.02.
    """
    method = ImprovedConsistencyTraining(noise_scale=0.25 * 0.02 / 16, student=_ncsnpp(p))
    return replace(p, method=method, train=_radam(400_000, 1024, 1e-4, 0.99993, dropout=0.3))


def easy_consistency_tuning(p: Preset) -> Preset:
    """ECT from a teacher of EDM. Geng et al. 2024, arXiv:2406.14548, and the released settings.

    They also give 100,000 and 400,000 steps. Their run of an hour: --method.ratio 256
    --method.num-stages 1 --train.ema-decay 0.9993 --train.epochs 20.5.
    """
    train = _radam(200_000, 128, 1e-4, 0.9999, dropout=0.2)
    return replace(p, method=EasyConsistencyTuning(), train=train)


def easy_consistency_tuning_64(p: Preset) -> Preset:
    """ECT on ImageNet. Theirs starts from EDM2-S, whose network is not here: its numbers, ours.

    The batch, the number of steps and the average are ours too.
    """
    method = EasyConsistencyTuning(
        ratio=4.0,
        most=0.9961,
        log_sigma=(-0.8, 1.6),
        width=0.06,
        weight="output",
        mid=(1.526,),
    )
    train = replace(
        _radam(200_000, 128, 1e-3, 0.9999, IMAGENET),
        optimizer="adam",
        betas=(0.9, 0.99),
        lr_schedule="inverse_sqrt",
        warmup_steps=2000,
    )
    return replace(p, method=method, train=train)


def simplified_consistency_model(p: Preset) -> Preset:
    """sCD from a teacher of EDM: the settings of NVIDIA's FastGen for arXiv:2410.11081, Lu & Song.

    They give 350,000 to 500,000 steps. The average is ours: EDM's, half of it of half a million
    images. sCT: --method.flow data --method.log-sigma -1 1.8 --method.sigma-max 800.
    """
    train = replace(_radam(400_000, 512, 1e-4, 0.99929, dropout=0.2), betas=(0.9, 0.99))
    return replace(p, method=SimplifiedConsistencyModel(converted=True), train=train)


def regularized_consistency_model(p: Preset) -> Preset:
    """Ours: the paper, arXiv:2510.08431, has large models alone. sCM's optimiser, and their times.

    100,000 steps of the student take five batches each, four of them for the critic. They have a
    smaller learning rate for the critic, where ours has the student's.
    """
    scm = SimplifiedConsistencyModel(converted=True, log_sigma=(-0.8, 1.6), warmup=1000)
    method = RegularizedConsistencyModel(consistency=scm)
    train = replace(_radam(500_000, 512, 1e-4, 0.99929, dropout=0.2), betas=(0.9, 0.99))
    return replace(p, method=method, train=train)


def drifting(p: Preset) -> Preset:
    """Ours: the paper, arXiv:2602.04770, has ImageNet in latents. Its optimiser and its average.

    They compare features. --method.features FILE compares those of LPIPS, beside pixels.
    """
    train = TrainConfig(
        batch_size=1024,
        epochs=_epochs(100_000, 1024),
        betas=(0.9, 0.95),
        optimizer="adamw",
        weight_decay=0.01,
        grad_clip_norm=2.0,
        ema_decay=0.999,
    )
    return replace(p, method=Drifting(memory=4096), train=train)


def progressive_distillation(p: Preset) -> Preset:
    """From 8192 steps to 1, as the preset progressive_cifar10, whose teacher predicts x0.

    Each of the 13 stages has 50,000 steps; the paper doubles the last ones: --method.last-length 2.
    """
    made = progressive_cifar10()
    return replace(p, method=made.method, train=made.train)


def _ncsnpp(p: Preset) -> SongConfig:
    """Return the network that consistency models train from scratch, without dropout of its own."""
    return ncsnpp(augment_channels=0, dropout=0.0, classes=p.net.classes)


def _radam(
    steps: int, batch: int, lr: float, ema: float, rows: int = IMAGES, dropout: float = 0.0
) -> TrainConfig:
    """Return what consistency models are trained with: RAdam at a constant rate, at once."""
    return TrainConfig(
        batch_size=batch,
        epochs=_epochs(steps, batch, rows),
        lr=lr,
        warmup_steps=0,
        betas=_ADAM,
        optimizer="radam",
        ema_decay=ema,
        dropout=dropout,
    )


_EDM = "edm_cifar10", "edm_cifar10_conditional"
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
    **{
        (preset, f.__name__): f
        for preset in _EDM
        for f in (
            consistency_distillation,
            easy_consistency_tuning,
            simplified_consistency_model,
            regularized_consistency_model,
        )
    },
    **{
        (preset, f.__name__): f
        for preset in ("cifar10", *_EDM)
        for f in (
            consistency_training,
            improved_consistency_training,
            progressive_distillation,
            drifting,
        )
    },
    **{
        ("imagenet64", f.__name__.removesuffix("_64")): f
        for f in (consistency_distillation_64, consistency_training_64, easy_consistency_tuning_64)
    },
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
