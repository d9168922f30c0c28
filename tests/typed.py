"""A program that type checkers read and nobody runs: the types a user of ds gets.

`make lint` fails where a public name loses its type, or is not what stands here.
"""

from typing import Any

import torch
from torch import Tensor
from typing_extensions import assert_type

import ds
from ds.evaluation.features import Pixels


def types(net: torch.nn.Module, store: ds.PairStore, config: ds.TrainConfig) -> None:
    """Use every kind of public name."""
    z = assert_type(ds.noise(0, range(4), (3, 32, 32)), Tensor)
    teacher = assert_type(ds.load_teacher("teacher"), ds.Teacher)
    assert_type(teacher.sample(z), Tensor)
    assert_type(teacher.denoiser, ds.Denoiser)
    assert_type(teacher.denoiser(z, 800), ds.Estimate)
    denoiser = assert_type(ds.Denoiser(net, ds.schedule.LinearBeta()), ds.Denoiser)
    teacher = ds.Teacher(denoiser, ds.solvers.DDIM(), ds.grids.uniform(10))
    assert_type(ds.generate_pairs(teacher, "pairs", 64), ds.PairStore)
    assert_type(ds.Sampler(teacher)(seed=0, indices=range(4)), Tensor)
    method = ds.methods.DenoisingStudent()
    rows = ds.Pairs(store, range(8, 64)), ds.Pairs(store, range(8))
    trained = ds.Trainer(method, teacher, *rows, "run", config).fit()
    student = assert_type(ds.load_student("student"), ds.Student)
    assert_type(student.sample(z), Tensor)
    assert_type(trained, torch.nn.Module)
    figures = ds.evaluate(student, store.images(range(8)), Pixels())
    assert_type(figures["frechet_distance"], Any)
