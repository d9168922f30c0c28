"""A student of a diffusers pipeline, written back so that a stock pipeline draws it in one call.

Without a teacher of yours, a small DDPM of scanned digits is made and trained with diffusers first.
The whole takes about two minutes on a CPU core (pip install diffusers):

    python examples/diffusers_teacher.py --out runs/diffusers

A teacher is a directory that diffusers wrote, or one on the hub. A real one wants a GPU, more pairs
and a longer training; `dstudent distill` has presets for both:

    python examples/diffusers_teacher.py hf://google/ddpm-cifar10-32 --out runs/cifar --count 50000
"""

import argparse
from pathlib import Path

import torch
import torch.nn.functional as F

import ds
from ds.models.images import save, to_float
from ds.pairs.sources import digits

HELD_OUT = 256  # pairs


def digits_pipeline(out: Path, steps: int) -> Path:
    """Train a DDPM of 8 x 8 digits as diffusers' own examples do, and save its pipeline."""
    from diffusers import DDPMPipeline, DDPMScheduler, UNet2DModel

    torch.manual_seed(0)
    net = UNet2DModel(
        sample_size=8, in_channels=1, out_channels=1, layers_per_block=1, norm_num_groups=8,
        block_out_channels=(32, 64), down_block_types=("DownBlock2D", "AttnDownBlock2D"),
        up_block_types=("AttnUpBlock2D", "UpBlock2D"),
    )  # fmt: skip
    scheduler, data = DDPMScheduler(), to_float(digits()[0])
    optimizer = torch.optim.Adam(net.parameters(), lr=2e-3)
    for _ in range(steps):
        x0 = data[torch.randint(len(data), (64,))]
        noise, t = torch.randn_like(x0), torch.randint(1000, (64,))
        loss = F.mse_loss(net(scheduler.add_noise(x0, noise, t), t).sample, noise)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    DDPMPipeline(net, scheduler).save_pretrained(out)
    return out


def distill(teacher: ds.Teacher, out: Path, count: int, epochs: float) -> ds.Student:
    """Make pairs with the teacher and train a student on them."""
    store = ds.generate_pairs(teacher, out / "pairs", count + HELD_OUT)
    train, held_out = ds.Pairs(store, range(HELD_OUT, len(store))), ds.Pairs(store, range(HELD_OUT))
    method = ds.methods.DenoisingStudent(loss_type="l1").on(teacher)
    config = ds.TrainConfig(
        batch_size=64, epochs=epochs, lr=1e-3, warmup_steps=50, lr_schedule="cosine", ema_decay=0.98
    )
    device = next(teacher.net.parameters()).device
    run = out / "student-run"
    trainer = ds.Trainer(method, teacher, train, held_out, run, config, device=device)
    return ds.Student(trainer.fit(), method)


def difference(student: ds.Student, folder: Path, count: int = 16) -> float:
    """Return how far a stock pipeline's images are from the student's at most, in [0, 1].

    Both start from the same noise. The pipeline knows nothing of this library.
    """
    from diffusers import DDPMPipeline

    pipeline = DDPMPipeline.from_pretrained(folder, low_cpu_mem_usage=False)
    drawn = pipeline(
        batch_size=count,
        generator=torch.Generator().manual_seed(0),
        num_inference_steps=1,
        output_type="np",
    ).images
    noise = torch.randn(count, *student.shape, generator=torch.Generator().manual_seed(0))
    student.net.cpu()
    ours = (student.sample(noise) / 2 + 0.5).clamp(0, 1)
    return (torch.from_numpy(drawn).movedim(-1, 1) - ours).abs().max().item()


def main(
    out: Path, source: str = "", count: int = 4096, epochs: float = 8, steps: int = 600
) -> float:
    """Do it all in the directory `out`, and return the difference to the stock pipeline."""
    source = source or str(digits_pipeline(out / "teacher", steps))
    device = "cuda" if torch.cuda.is_available() else "cpu"
    teacher = ds.load_teacher(source, device=device, grid=ds.grids.quadratic(12))
    print(f"teacher: {source}, images {[*teacher.shape]}, {teacher.nfe} network calls each")

    student = distill(teacher, out, count, epochs)
    images = [ds.Sampler(model)(seed=1, indices=range(16)) for model in (teacher, student)]
    save(torch.cat(images), out / "teacher-above-student.png", columns=16, scale=6, force=True)

    ds.export.to_diffusers(student, out / "student", force=True)
    found = difference(student, out / "student")
    print(f"student: {out / 'student'}, 1 network call; side by side: {out}/*.png")
    print(f"largest difference to diffusers.DDPMPipeline, in [0, 1]: {found:.1e}")
    return found


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("source", nargs="?", default="", help="a pipeline's directory, or hf://...")
    parser.add_argument("--out", type=Path, required=True, help="a directory for what is made")
    parser.add_argument("--count", type=int, default=4096, help="pairs to train on")
    parser.add_argument("--epochs", type=float, default=8, help="passes over them")
    main(**vars(parser.parse_args()))
