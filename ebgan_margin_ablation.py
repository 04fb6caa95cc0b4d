# SPDX-License-Identifier: MIT
"""Sweep over the margin of the Energy-Based GAN (arXiv 1609.03126), in one file.

The discriminator is an auto-encoder; an image's energy is its reconstruction error:

    U(x) = || Dec(Enc(x)) - x ||,  images x in [-1, 1]           eq. 13
    L_D  = E_x[ U(x) ] + E_z[ max(0, margin - U(G(z))) ]         eq. 1, hinge per sample
    L_G  = E_z[ U(G(z)) ]                                        eq. 2
    f_PT = mean over i != j of cos(S_i, S_j)^2,  S = Enc(G(z))   section 2.4

Not in the paper: noise is added to the input of Enc, but not to the x that the error is
measured against (disable with --noise 0); the learning rate decays (disable with
--lr_decay 0); samples and scores use a running mean (EMA) of G's weights.
This trains ebgan_pt.py's L_G + lambda_pt * f_PT for each margin and seed. A seed fixes
the weights, the noise and the order of the images, so that only the margin differs.
To reuse a piece elsewhere, also copy what its docstring says it needs.

    python ebgan_margin_ablation.py                    the default margins and seeds
    python ebgan_margin_ablation.py --margins 0 1 4 --seeds 0 --max_steps 300
    python ebgan_margin_ablation.py --resume --margins 8    add a margin to the newest
"""

import argparse
import contextlib
import copy
import csv
import os
import shlex
import socket
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable, Iterator
from multiprocessing.pool import ThreadPool
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image, ImageDraw, ImageFont, ImageOps
from torch import Tensor, nn
from torchvision import datasets
from torchvision.ops import Conv2dNormActivation
from torchvision.transforms.v2.functional import center_crop, pil_to_tensor, resize
from torchvision.utils import save_image

SCRIPT = Path(__file__).stem
RANK = int(os.getenv("RANK", "0"))  # set by torchrun
WORLD_SIZE = int(os.getenv("WORLD_SIZE", "1"))


# ----------------------------------------------------------------------------- losses
def energy(recon: Tensor, imgs: Tensor, kind: str = "norm") -> Tensor:
    """U(x) of each image, N x C x H x W -> N: norm (eq. 13) or mean square (mse)."""
    if recon.shape != imgs.shape:
        raise ValueError(f"shapes differ: {list(recon.shape)}, {list(imgs.shape)}")
    error = (recon - imgs).flatten(1)
    if kind == "norm":
        return error.norm(dim=1)
    if kind == "mse":
        return error.square().mean(1)
    raise ValueError(f'kind must be "norm" or "mse", not {kind!r}')


def discriminator_loss(
    real_energy: Tensor, fake_energy: Tensor, margin: float | Tensor
) -> Tensor:
    """L_D (eq. 1), a scalar, from the energies of real and of generated images."""
    return real_energy.mean() + (margin - fake_energy).clamp(min=0).mean()


def pullaway_loss(embedding: Tensor) -> Tensor:
    """f_PT (section 2.4) of N x E embeddings: mean squared cosine over i != j."""
    n = len(embedding)
    # scale each row by a power of two, so that its squares don't overflow or vanish
    exponent = embedding.detach().abs().amax(1, keepdim=True).frexp().exponent
    unit = F.normalize(embedding.ldexp(-exponent), dim=1)  # a zero row stays zero
    cosines = (unit @ unit.T).fill_diagonal_(0)
    return cosines.square().sum() / max(n * (n - 1), 1)


# --------------------------------------------------------------------------- networks
class Generator(nn.Module):
    """G: z, N x latent_dim -> images, N x C x S x S in [-1, 1]; S is a multiple of 4.

    eps=0.8 is as in PyTorch-GAN. Needs UpsampleConv2d and init_weights.
    """

    def __init__(self, img_size: int = 32, channels: int = 1, latent_dim: int = 62):
        super().__init__()
        if img_size % 4:
            raise ValueError(f"img_size must be a multiple of 4, not {img_size}")
        size = img_size // 4
        self.project = nn.Sequential(
            nn.Linear(latent_dim, 128 * size * size),
            nn.Unflatten(1, (128, size, size)),  # 128 x S/4 x S/4
        )
        self.upsample = nn.Sequential(
            UpsampleConv2d(128, 128),  # 128 x S/2 x S/2
            nn.BatchNorm2d(128, eps=0.8),
            nn.LeakyReLU(0.2, inplace=True),
            UpsampleConv2d(128, 64),  # 64 x S x S
            nn.BatchNorm2d(64, eps=0.8),
            nn.LeakyReLU(0.2, inplace=True),
            nn.Conv2d(64, channels, kernel_size=3, padding=1),  # C x S x S
            nn.Tanh(),
        )
        self.apply(init_weights)

    def forward(self, z: Tensor) -> Tensor:
        x = self.project(z)
        if x.device.type != "mps":  # there, BatchNorm2d is wrong for channels_last
            x = x.contiguous(memory_format=torch.channels_last)  # faster on CPUs
        return self.upsample(x)


class Discriminator(nn.Module):
    """D: images, N x C x S x S -> reconstruction, N x C x S x S, and embedding, N x 32.

    S is even. Needs UpsampleConv2d and init_weights.
    """

    def __init__(self, img_size: int = 32, channels: int = 1):
        super().__init__()
        size = img_size // 2
        self.encoder = nn.Sequential(
            nn.Conv2d(channels, 64, kernel_size=3, stride=2, padding=1),
            nn.ReLU(inplace=True),  # 64 x S/2 x S/2
            nn.Flatten(),
            nn.Linear(64 * size * size, 32),  # the embedding
        )
        self.decoder = nn.Sequential(
            nn.BatchNorm1d(32, eps=0.8),
            nn.ReLU(inplace=True),
            nn.Linear(32, 64 * size * size),
            nn.BatchNorm1d(64 * size * size),
            nn.ReLU(inplace=True),
            nn.Unflatten(1, (64, size, size)),  # 64 x S/2 x S/2
            UpsampleConv2d(64, channels),  # C x S x S
        )
        self.apply(init_weights)

    def forward(self, imgs: Tensor) -> tuple[Tensor, Tensor]:
        embedding = self.encoder(imgs)
        return self.decoder(embedding), embedding


class UpsampleConv2d(nn.Conv2d):
    """nn.Upsample(scale_factor=2), then nn.Conv2d(..., 3, padding=1), but faster.

    After upsampling, each output pixel sees only 2 x 2 different inputs, so the taps
    that share one are summed: a transposed 4 x 4 convolution with stride 2.
    """

    def __init__(self, in_channels: int, out_channels: int):
        super().__init__(in_channels, out_channels, kernel_size=3, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        sums = 4 * F.avg_pool2d(self.weight, 2, stride=1, padding=1)
        kernel = sums.flip(2, 3).transpose(0, 1)  # conv_transpose2d flips it back
        out = F.conv_transpose2d(x, kernel, stride=2, padding=1)
        return out.add_(self.bias.to(out.dtype).view(-1, 1, 1))


def init_weights(module: nn.Module) -> None:
    """Initialize the weights of Conv2d and BatchNorm2d as DCGAN does."""
    if isinstance(module, nn.Conv2d):
        nn.init.normal_(module.weight, 0, 0.02)
    elif isinstance(module, nn.BatchNorm2d):
        nn.init.normal_(module.weight, 1, 0.02)


# ---------------------------------------------------------------------- training step
def train_step(
    generator: nn.Module,
    discriminator: nn.Module,
    optimizer_g: torch.optim.Optimizer,
    optimizer_d: torch.optim.Optimizer,
    real_imgs: Tensor,
    z: Tensor,
    noise: Tensor | float,
    margin: float | Tensor,
    kind: str = "norm",
    amp: bool = False,
    lambda_pt: float = 0.1,
) -> tuple[Tensor, Tensor, Tensor]:
    """Update the discriminator, then the generator.

    Images are in [-1, 1]; noise (of their shape, or 0) is added to D's inputs; amp runs
    the networks in bfloat16. Return the energies of real and of generated images and
    the embedding of the generated images. Needs the losses above.
    """
    autocast = torch.autocast(real_imgs.device.type, torch.bfloat16, enabled=amp)

    # discriminator: low energy for real images, above the margin for generated ones
    with autocast:
        gen_imgs = generator(z).to(z.dtype)  # the losses are computed in float32
        fake_imgs = gen_imgs.detach()  # no gradient to the generator
        real_recon, _ = discriminator(real_imgs + noise)
        fake_recon, _ = discriminator(fake_imgs + noise)
    real_energy = energy(real_recon, real_imgs, kind)
    fake_energy = energy(fake_recon, fake_imgs, kind)
    loss_d = discriminator_loss(real_energy, fake_energy, margin)
    optimizer_d.zero_grad()
    loss_d.backward()
    optimizer_d.step()

    # generator: low energy for its images; gradients flow through recon and gen_imgs
    with autocast:
        recon, embedding = discriminator(gen_imgs + noise)
    embedding = embedding.to(z.dtype)
    loss_g = energy(recon, gen_imgs, kind).mean()
    loss_g = loss_g + lambda_pt * pullaway_loss(embedding)
    optimizer_g.zero_grad()
    parameters = [p for p in generator.parameters() if p.requires_grad]
    loss_g.backward(inputs=parameters)  # leave the discriminator's gradients untouched
    optimizer_g.step()
    return real_energy.detach(), fake_energy.detach(), embedding.detach()


# --------------------------------------------------------------------------- training
class Data(NamedTuple):
    imgs: Tensor  # for training, uint8 N x C x S x S
    labels: Tensor  # their classes, N, or zeros
    held_out: Tensor  # images for the scores


def train(opt: argparse.Namespace, data: Data) -> dict[str, float]:
    """Train with the flags that parse_args returns; return the last row of the log.

    data comes from load_images or is your own (uint8 images). In the log of a healthy
    run, fake_energy is near the margin and hinge_active, the share of generated images
    below the margin, well away from 0 and 1. In a collapse, frechet rises far above
    real_frechet, score and classes fall, and pullaway approaches 1.
    """
    # setup
    data = Data(*data)
    set_data_flags(opt, data)
    run = start_run(opt, data.imgs)
    device, imgs = opt.device, data.imgs.to(opt.device)
    global_batch = opt.batch_size * WORLD_SIZE
    epoch_steps = len(imgs) // global_batch  # full batches only
    last_step = min(opt.n_epochs * epoch_steps, opt.max_steps)
    # score at ends of epochs, about every sample_interval steps
    score_interval = max(1, round(opt.sample_interval / epoch_steps)) * epoch_steps
    classifier = None  # trained when scores are first needed

    parts = run.generator, run.discriminator, run.optimizer_g, run.optimizer_d

    def run_step(real_imgs, z, noise, margin, lr_g, lr_d):
        run.optimizer_g.param_groups[0]["lr"] = lr_g
        run.optimizer_d.param_groups[0]["lr"] = lr_d
        options = opt.energy, opt.amp, opt.lambda_pt
        return train_step(*parts, real_imgs, z, noise, margin, *options)

    if imgs.is_cuda and WORLD_SIZE == 1:  # use False to print or branch in a step
        run_step = GraphedStep(run_step)
    print(f"{opt.out_dir}: at step {run.step} of {last_step}", flush=True)
    first_step, log_step, log_time = run.step + 1, run.step, time.perf_counter()

    for step in range(first_step, last_step + 1):
        # data: random numbers depend only on seed, step and rank: runs resume exactly
        epoch, i = divmod(step - 1, epoch_steps)
        if i == 0 or step == first_step:
            rng = seeded_rng(opt.seed, "order", epoch, device=device)
            order = torch.randperm(len(imgs), generator=rng, device=device)
            batches = order.split(opt.batch_size)
        real_imgs = imgs[batches[i * WORLD_SIZE + RANK]] / 127.5 - 1
        rng = seeded_rng(opt.seed, "step", step, RANK, device)
        z = torch.randn(opt.batch_size, opt.latent_dim, generator=rng, device=device)
        noise = opt.noise * torch.randn(real_imgs.shape, generator=rng, device=device)

        # step; change the margin or a learning rate here
        margin = opt.margin
        lr_g = lr_d = opt.lr / (1 + opt.lr_decay * step)
        real_energy, fake_energy, embedding = run_step(
            real_imgs, z, noise, margin, lr_g, lr_d
        )
        # forget early steps quickly, later average over roughly the last 1,000
        update_average(run.averaged, run.generator, weight=max(9 / (9 + step), 0.001))
        run.step = step

        # log: not at every step, since .item() waits for the device
        scoring = step == last_step or step % score_interval == 0
        saving = scoring or step % opt.sample_interval == 0 or step in (50, 100, 200)
        if RANK > 0 or not (saving or step % 20 == 0):
            continue
        row = {"step": step, "epoch": epoch + 1}
        row["real_energy"] = real_energy.mean().item()
        row["fake_energy"] = fake_energy.mean().item()
        row["hinge_active"] = (fake_energy < margin).float().mean().item()
        row["pullaway"] = pullaway_loss(embedding).item()
        seconds = time.perf_counter() - log_time
        row["images_per_s"] = (step - log_step) * global_batch / seconds
        run.log.append(row)

        # score and save
        if saving:
            weights = [*run.generator.parameters(), *run.discriminator.parameters()]
            if not nn.utils.get_total_norm(weights).isfinite():
                raise FloatingPointError(f"not finite at step {step}: lower --lr")
        if scoring:
            if classifier is None:
                print("training a classifier for the scores", flush=True)
                classifier = train_classifier(data.imgs, data.labels, opt.device)
            row.update(compute_scores(opt, run.averaged, classifier, data))
        if saving:
            save(opt, run, data.imgs)
            minutes = (last_step - step) * global_batch / row["images_per_s"] / 60
            values = (f"{name} {value:.6g}" for name, value in row.items())
            print(*values, f"({minutes:.0f} min left)", flush=True)
        log_step, log_time = step, time.perf_counter()
    return run.log[-1] if run.log else {}


def set_data_flags(opt: argparse.Namespace, data: Data) -> None:
    """Set the flags that depend on the data; print counts and what is lowered."""
    if data.imgs.dtype != torch.uint8:
        raise ValueError(f"images must be uint8, not {data.imgs.dtype}")
    opt.images, opt.channels = data.imgs.shape[:2]
    opt.held_out = len(data.held_out)
    print(f"{opt.images} training images, {opt.held_out} held out; on {opt.device}")
    if opt.held_out < 500:
        print("fewer than 500 held-out images: frechet is only a rough guide")
    if opt.batch_size > opt.images // WORLD_SIZE:
        opt.batch_size = opt.images // WORLD_SIZE
        print(f"too few images for --batch_size: lowered to {opt.batch_size}")
    if opt.noise is None:
        opt.noise = 0.3 if opt.energy == "norm" else 0.0
    if opt.margin is None:
        opt.margin = default_margin(opt)


def start_run(opt: argparse.Namespace, imgs: Tensor) -> "Run":
    """Return a new or resumed run; a new one is saved before its first step."""
    torch.backends.cudnn.deterministic = True  # for an exact resume
    run = Run(opt)
    if opt.resume:
        saved = load_checkpoint(opt.resume)
        run.load(saved)
        old, new = saved["flags"], saved_flags(opt)
        changed = [name for name in new if new[name] != old.get(name)]
        changes = [f"{name} {old.get(name)} -> {new[name]}" for name in changed]
        print("changed since the run was saved:", ", ".join(changes) or "nothing")
    if WORLD_SIZE > 1:
        run.optimizer_g.register_step_pre_hook(average_gradients)
        run.optimizer_d.register_step_pre_hook(average_gradients)
    if RANK == 0 and Path(opt.resume or "") != Path(opt.out_dir, "checkpoint.pt"):
        Path(opt.out_dir).mkdir(parents=True)  # fails if the folder exists
        save(opt, run, imgs)
    return run


class Run:
    """What a checkpoint holds: networks, optimizers, the step and the log."""

    PARTS = "generator", "averaged", "discriminator", "optimizer_g", "optimizer_d"

    def __init__(self, opt: argparse.Namespace):
        torch.default_generator.manual_seed(opt.seed)
        generator = Generator(opt.img_size, opt.channels, opt.latent_dim)
        discriminator = Discriminator(opt.img_size, opt.channels)
        self.generator = generator.to(opt.device)
        self.discriminator = discriminator.to(opt.device)
        self.averaged = copy.deepcopy(self.generator).eval()
        adam = {"lr": opt.lr, "betas": (opt.b1, opt.b2), "fused": True}
        adam["capturable"] = "cuda" in opt.device  # works in a CUDA graph
        self.optimizer_g = torch.optim.Adam(self.generator.parameters(), **adam)
        self.optimizer_d = torch.optim.Adam(self.discriminator.parameters(), **adam)
        self.step, self.log = 0, []

    def load(self, saved: dict) -> None:
        """Load a checkpoint's contents; rates and betas stay as the flags say."""
        with error_note(saved["path"]):
            for name in self.PARTS:
                part = getattr(self, name)
                if "optimizer" in name:
                    saved[name]["param_groups"] = part.state_dict()["param_groups"]
                part.load_state_dict(saved[name])
        self.step, self.log = saved["step"], saved["log"]


@torch.no_grad()
def update_average(averaged: nn.Module, network: nn.Module, weight: float) -> None:
    """Move the floating-point values of averaged towards those of network."""
    old = [x for x in averaged.state_dict().values() if x.is_floating_point()]
    new = [x for x in network.state_dict().values() if x.is_floating_point()]
    torch._foreach_lerp_(old, new, weight)


def average_gradients(optimizer: torch.optim.Optimizer, *_) -> None:
    """Average the gradients over all processes, as a hook before optimizer.step()."""
    for parameter in optimizer.param_groups[0]["params"]:
        if parameter.grad is not None:  # else it is frozen
            torch.distributed.all_reduce(parameter.grad)
            parameter.grad /= WORLD_SIZE


class GraphedStep:
    """A step that is captured as a CUDA graph on its fourth call, then replayed.

    One launch for all kernels: 3.4 times the images/s at batch 64 on an H100. Arguments
    (tensors or numbers) may change from call to call; all else is fixed when captured.
    Python code, such as a print, isn't run again. Each replay overwrites the outputs.
    """

    def __init__(self, step: Callable):
        self.step, self.n_calls = step, 0
        self.graph, self.stream = torch.cuda.CUDAGraph(), torch.cuda.Stream()

    def __call__(self, *args: Tensor | float) -> tuple[Tensor, ...]:
        args = [
            x if torch.is_tensor(x) else torch.full((), float(x), device="cuda")
            for x in args
        ]
        self.n_calls += 1
        if self.n_calls < 4:  # CUDA graphs need warm-up steps, on another stream
            self.stream.wait_stream(torch.cuda.current_stream())
            with torch.cuda.stream(self.stream):
                outputs = self.step(*args)
            torch.cuda.current_stream().wait_stream(self.stream)
            return outputs
        if self.n_calls == 4:
            self.inputs = [x.clone() for x in args]
            with torch.cuda.graph(self.graph, stream=self.stream):
                self.outputs = self.step(*self.inputs)
        for captured, new in zip(self.inputs, args):
            captured.copy_(new)
        self.graph.replay()
        return self.outputs


# ------------------------------------------------------------------------------- data
DATASETS = "digits", "mnist", "fashion-mnist", "kmnist", "cifar10", "folder"
PURPOSES = "order", "step", "samples", "scores", "generate"
UNREADABLE = OSError, SyntaxError, ValueError, EOFError, Image.DecompressionBombError


def seeded_rng(
    seed: int, purpose: str, step: int = 0, rank: int = 0, device: str = "cpu"
) -> torch.Generator:
    """Return a torch.Generator seeded for one of PURPOSES, a step and a rank."""
    key = seed, PURPOSES.index(purpose), step, rank
    state = np.random.SeedSequence(key).generate_state(1, np.uint64)[0]
    return torch.Generator(device).manual_seed(int(state) >> 1)  # below 2^63


def synthetic_digits(n: int, img_size: int, seed: int) -> tuple[Tensor, Tensor]:
    """Draw n digits, white on black: images n x 1 x S x S uint8 and labels n int64."""
    size = max(64, img_size)
    font = ImageFont.load_default(size=0.75 * size)
    glyphs = torch.empty(30, 1, size, size)
    for i in range(30):  # ten digits in three stroke widths
        glyph = Image.new("L", (size, size))
        style = {"anchor": "mm", "stroke_width": i % 3 * size // 64}
        place = (size / 2, size / 2)
        ImageDraw.Draw(glyph).text(place, str(i // 3), 255, font, **style)
        glyphs[i] = pil_to_tensor(glyph)
    glyphs = F.interpolate(glyphs, size=img_size, mode="area")

    # rotate by up to 1/4 rad, shear by 1/4, shift by 1/20 of the size, scale by 1.2
    rng = torch.Generator().manual_seed(seed)
    labels = torch.randint(10, (n,), generator=rng)
    styles = 3 * labels + torch.randint(3, (n,), generator=rng)
    angle, zoom, shear, dx, dy = torch.rand(5, n, generator=rng) * 2 - 1
    cos, sin, shear = (angle / 4).cos(), (angle / 4).sin(), shear / 4
    rows = [cos, shear * cos - sin, dx / 10, sin, shear * sin + cos, dy / 10]
    maps = (torch.stack(rows) * 0.9 * 1.2**zoom).T.view(n, 2, 3)
    imgs = torch.empty(n, 1, img_size, img_size, dtype=torch.uint8)
    for chunk in torch.arange(n).split(1000):
        shape = [len(chunk), 1, img_size, img_size]
        grid = F.affine_grid(maps[chunk], shape, align_corners=False)
        warped = F.grid_sample(glyphs[styles[chunk]], grid, align_corners=False)
        imgs[chunk] = warped.round().byte()
    return imgs, labels


def load_picture(path: str | Path, img_size: int, channels: int = 3) -> Tensor:
    """Load a picture upright, cropped to a square, as uint8 C x S x S, grey or RGB.

    Transparent pixels become white. Raise one of UNREADABLE if the file is damaged,
    or grey with more than 8 bits. Needs error_note.
    """
    with error_note(path):
        img = Image.open(path)
        img.draft(None, (img_size, img_size))  # decodes a large JPEG at reduced size
        if img.mode.startswith(("F", "I")):  # F, I or I;16
            raise ValueError("more than 8 bits per channel")
        img = ImageOps.exif_transpose(img)
        if img.has_transparency_data:
            white = Image.new("RGBA", img.size, "white")
            img = Image.alpha_composite(white, img.convert("RGBA"))
        img = pil_to_tensor(img.convert("L" if channels == 1 else "RGB"))
    return resize(center_crop(img, [min(img.shape[1:])]), [img_size, img_size])


def load_folder(root: str, img_size: int, channels: int | None, n_cpu: int) -> Data:
    """Load all pictures below a folder, one class per folder; a tenth is held out.

    Print what is left out. Raise ValueError if fewer than 20 pictures remain. Needs
    Data, UNREADABLE, load_picture, seeded_rng and what they need.
    """
    paths, errors = [], []
    for folder, _, files in os.walk(root, onerror=errors.append, followlinks=True):
        paths += [Path(folder, name) for name in files]
    paths.sort()

    def load(path: Path) -> Tensor | str:
        """Return a picture, or the reason why it is left out."""
        if any(part[0] == "." for part in path.relative_to(root).parts):
            return "hidden"
        if path.suffix.lower() not in datasets.folder.IMG_EXTENSIONS:
            return path.suffix or "no extension"
        try:
            return load_picture(path, img_size, channels or 3)
        except UNREADABLE as error:
            print(f"skipped {path}: {error}")
            return "unreadable"

    with ThreadPool(n_cpu) as pool:
        results = pool.map(load, paths)
    left_out = Counter(x for x in results if isinstance(x, str))
    left_out.update(f"unreadable folder {error.filename}" for error in errors)
    loaded = [(x, path) for x, path in zip(results, paths) if torch.is_tensor(x)]
    reasons = ", ".join(f"{n} {x}" for x, n in left_out.items()) or "nothing"
    print(f"loaded {len(loaded)} pictures from {root}; left out: {reasons}")
    if len(loaded) < 20:
        raise ValueError(f"{root} has {len(loaded)} readable pictures, fewer than 20")
    order = torch.randperm(len(loaded), generator=seeded_rng(0, "order"))
    imgs = torch.stack([loaded[i][0] for i in order])
    if channels is None and (imgs == imgs[:, :1]).all():
        imgs = imgs[:, :1].clone()  # all are grey
    names = [str(path.parent.relative_to(root)) for _, path in loaded]
    classes = sorted(set(names))
    print(f"{len(classes)} classes, one per folder, first: {', '.join(classes[:5])}")
    labels = torch.tensor([classes.index(names[i]) for i in order])
    n = len(imgs) // 10
    return Data(imgs[n:], labels[n:], imgs[:n])


def load_images(
    dataset: str, data_root: str, img_size: int, channels: int | None, n_cpu: int = 8
) -> Data:
    """Load a dataset (see --dataset), downloading it if it is not in data_root.

    Needs Data, error_note and, by dataset, synthetic_digits or load_folder.
    """
    if dataset == "folder":
        return load_folder(data_root, img_size, channels, n_cpu)
    splits = []
    for is_train, n in ((True, 20_000), (False, 5_000)):
        if dataset == "digits":
            imgs, labels = synthetic_digits(n, img_size, seed=n)
        else:
            name = "FashionMNIST" if dataset == "fashion-mnist" else dataset.upper()
            with error_note(f"{data_root}: delete its {name} files if damaged"):
                split = getattr(datasets, name)(data_root, is_train, download=True)
                imgs, labels = split.data, torch.as_tensor(split.targets)
                if len(imgs) != len(labels):
                    raise ValueError(f"{len(imgs)} images, but {len(labels)} labels")
            if dataset == "cifar10" and channels == 1:
                imgs = np.stack([Image.fromarray(img).convert("L") for img in imgs])
            imgs = torch.as_tensor(imgs)
            imgs = imgs.unsqueeze(1) if imgs.ndim == 3 else imgs.movedim(3, 1)
            chunks = [resize(x, [img_size, img_size]) for x in imgs.split(1000)]
            imgs = torch.cat(chunks)
        splits.append((imgs.expand(-1, channels or -1, -1, -1), labels))
    (imgs, labels), (held_out, _) = splits
    return Data(imgs, labels, held_out)


def default_dataset(data_root: str) -> str:
    """Return mnist if it is in data_root or can be downloaded, else digits."""
    if any(Path(data_root).glob("MNIST/raw/*ubyte*")):
        return "mnist"
    print(f"MNIST is not in {data_root}: downloading it", flush=True)
    timeout = socket.getdefaulttimeout()
    socket.setdefaulttimeout(5)  # seconds for each of torchvision's mirrors
    try:
        datasets.MNIST(data_root, download=True)
        return "mnist"
    except (OSError, RuntimeError):
        print("MNIST can't be downloaded: using the built-in digits", flush=True)
        return "digits"
    finally:
        socket.setdefaulttimeout(timeout)


# ----------------------------------------------------------------------------- scores
@torch.no_grad()
def run_batched(function: Callable, x: Tensor, device: str, size: int = 64) -> Tensor:
    """Apply function to x in batches; uint8 images are scaled to [-1, 1] first."""
    outputs = []
    for chunk in x.split(size):
        chunk = chunk.to(device)
        if chunk.dtype == torch.uint8:
            chunk = chunk / 127.5 - 1
        outputs.append(function(chunk).cpu())
    return torch.cat(outputs)


def train_classifier(imgs: Tensor, labels: Tensor, device: str) -> nn.Sequential:
    """Fit c to uint8 images: for x in [-1, 1], c(x) are logits and c[0](x) features.

    It is trained on the CPU in float64, so that scores hardly depend on the machine.
    Larger images are downsampled to 32 x 32. With a single class, the features stay
    random. Needs seeded_rng.
    """
    with torch.random.fork_rng(devices=[]):  # leaves the caller's RNG state alone
        torch.default_generator.manual_seed(0)
        features = nn.Sequential(
            nn.AdaptiveAvgPool2d(min(imgs.shape[-1], 32)),
            Conv2dNormActivation(imgs.shape[1], 16, stride=2),  # 16 x 16 x 16
            Conv2dNormActivation(16, 32, stride=2),  # 32 x 8 x 8
            Conv2dNormActivation(32, 64, stride=2),  # 64 x 4 x 4
            nn.AdaptiveAvgPool2d(4),
            nn.Flatten(),
            nn.Linear(1024, 64),
            nn.ReLU(),
        )
        classifier = nn.Sequential(features, nn.Linear(64, int(labels.max()) + 1))
    classifier.double()
    optimizer = torch.optim.Adam(classifier.parameters(), fused=True)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, 0.01, total_steps=500)
    for step in range(500):
        batch = torch.randint(len(imgs), (64,), generator=seeded_rng(step, "order"))
        logits = classifier(imgs[batch].double() / 127.5 - 1)
        optimizer.zero_grad()
        F.cross_entropy(logits, labels[batch]).backward()
        optimizer.step()
        schedule.step()
    return classifier.float().to(device).eval()


def evaluate(classifier: nn.Sequential, imgs: Tensor, real: Tensor) -> dict[str, float]:
    """Score images against real ones, in [-1, 1] or uint8, at least 2 of each.

    score: I' of the paper, E_x KL(p(y) || p(y|x)), higher is better; frechet: distance
    between features, lower is better; classes: how many are predicted at least a tenth
    as often as for real images. Raise ValueError if images are too few or not finite.
    Needs run_batched.
    """
    device = next(classifier.parameters()).device
    features = run_batched(classifier[0], imgs, device)
    real_features = run_batched(classifier[0], real, device)
    finite = (features.sum() + real_features.sum()).isfinite()
    if min(len(imgs), len(real)) < 2 or not finite:
        raise ValueError("evaluate needs at least 2 images of each kind, all finite")

    logits = run_batched(classifier[1], features, device)
    log_probs = logits.double().log_softmax(1)
    log_probs = log_probs.clamp(min=-20)  # so that one confident image cannot dominate
    marginal = log_probs.exp().mean(0)
    score = (marginal * (marginal.log() - log_probs)).sum(1).mean()

    real_logits = run_batched(classifier[1], real_features, device)
    real_share = real_logits.argmax(1).bincount(minlength=logits.shape[1]) / len(real)
    share = logits.argmax(1).bincount(minlength=logits.shape[1]) / len(imgs)
    classes = ((share > 0) & (share >= 0.1 * real_share)).sum()

    features, real_features = features.double(), real_features.double()
    shift = (features.mean(0) - real_features.mean(0)).square().sum()
    cov, real_cov = features.T.cov(), real_features.T.cov()
    roots = torch.linalg.eigvals(cov @ real_cov).real.clamp(min=0).sqrt()
    frechet = shift + cov.trace() + real_cov.trace() - 2 * roots.sum()
    return {"score": score.item(), "frechet": frechet.item(), "classes": classes.item()}


def compute_scores(
    opt: argparse.Namespace, generator: nn.Module, classifier: nn.Sequential, data: Data
) -> dict[str, float]:
    """Score up to 5,000 generated images and, as real_..., as many training images."""
    n = min(5000, len(data.imgs), len(data.held_out))
    z = torch.randn(5000, opt.latent_dim, generator=seeded_rng(opt.seed, "scores"))[:n]
    gen_imgs = run_batched(generator, z, opt.device, opt.batch_size)
    scores = evaluate(classifier, gen_imgs, data.held_out)
    for name, value in evaluate(classifier, data.imgs[:n], data.held_out).items():
        scores[f"real_{name}"] = value
    return scores


# ------------------------------------------------------------------------ checkpoints
def save(opt: argparse.Namespace, run: Run, imgs: Tensor) -> None:
    """Write samples and log.csv, and replace checkpoint.pt atomically."""
    # BatchNorm's running statistics, for eval mode, are those of real images alone
    imgs = imgs[:2000]
    n_chunks = min(len(imgs) // 4, max(4, imgs.numel() // 512_000))
    batches = (x.to(opt.device) / 127.5 - 1 for x in imgs.tensor_split(n_chunks))
    torch.optim.swa_utils.update_bn(batches, run.discriminator)

    z = torch.randn(64, opt.latent_dim, generator=seeded_rng(opt.seed, "samples"))
    samples = run_batched(run.averaged, z, opt.device, opt.batch_size) / 2 + 0.5
    out_dir = Path(opt.out_dir)
    (out_dir / "samples").mkdir(exist_ok=True)
    save_image(samples, out_dir / "samples.png")
    save_image(samples, out_dir / f"samples/{run.step}.png")
    write_csv(out_dir / "log.csv", run.log)
    with error_note(out_dir), tempfile.TemporaryDirectory(dir=out_dir) as folder:
        new = Path(folder, "checkpoint.pt")
        state = {name: getattr(run, name).state_dict() for name in run.PARTS}
        state |= {"step": run.step, "log": run.log, "flags": saved_flags(opt)}
        torch.save(state, new)
        new.replace(out_dir / "checkpoint.pt")


def write_csv(path: Path, rows: list[dict]) -> None:
    """Write a table with a column for every name in any row."""
    with open(path, "w", newline="") as file:
        names = dict.fromkeys(name for row in rows for name in row)
        writer = csv.DictWriter(file, names, lineterminator="\n")
        writer.writeheader()
        writer.writerows(rows)


def saved_flags(opt: argparse.Namespace) -> dict:
    """Return the flags to save, with the script and the number of processes."""
    flags = vars(opt) | {"script": SCRIPT, "processes": WORLD_SIZE}
    for name in ("device", "generate", "out_dir", "resume"):
        flags.pop(name, None)
    return flags


@contextlib.contextmanager
def error_note(note: str | Path) -> Iterator[None]:
    """Add a note, such as a path, to any error raised inside."""
    try:
        yield
    except Exception as error:
        error.add_note(f"in {note}")
        raise


def load_checkpoint(path: str) -> dict:
    """Load a checkpoint with weights_only=True: a file, a run's folder or "newest"."""
    if path == "newest":
        path = max(Path("runs").glob(f"{SCRIPT}-[0-9]*/checkpoint.pt"), default=None)
        if path is None:
            raise FileNotFoundError(f"no run of {SCRIPT}.py in runs: use --resume RUN")
    path = full_path(path)
    if os.path.isdir(path):
        path = os.path.join(path, "checkpoint.pt")
    with error_note(path):
        saved = torch.load(path, map_location="cpu", weights_only=True)
        if "flags" not in saved:
            raise ValueError("not a checkpoint of these scripts")
    return saved | {"path": path}


def load_run(path: str) -> tuple[nn.Module, nn.Module]:
    """Load generator (averaged) and discriminator, on the CPU in eval mode.

    path is a run's folder or checkpoint. Needs the networks, Run and load_checkpoint.
    """
    saved = load_checkpoint(path)
    if "averaged" not in saved:
        raise ValueError(f"{saved['path']} has no networks: name one run of the sweep")
    with torch.random.fork_rng(devices=[]):  # leaves the caller's RNG state alone
        run = Run(argparse.Namespace(**saved["flags"], device="cpu"))
    run.load(saved)
    return run.averaged, run.discriminator.eval()


# ------------------------------------------------------------------------------ flags
def positive(text: str) -> int:
    """argparse type: an integer of at least 1."""
    if int(text) < 1:
        raise ValueError
    return int(text)


def amount(text: str) -> float:
    """argparse type: a finite number of at least 0."""
    if not 0 <= float(text) < float("inf"):
        raise ValueError
    return float(text)


def full_path(text: str) -> str:
    """argparse type: an absolute path, with ~ expanded."""
    return os.path.abspath(os.path.expanduser(text))


def default_margin(opt: argparse.Namespace) -> float:
    """Return the paper's 10, scaled to the image size, or PyTorch-GAN's 1 for mse."""
    if opt.energy == "mse":
        return max(1.0, opt.batch_size / 64)
    return 10 / 32 * (opt.channels * opt.img_size**2) ** 0.5


def parse_args(argv: list[str] | None = None) -> argparse.Namespace:
    """Parse the flags; with --resume or --generate, on top of those of a saved run."""
    now = f"{time.strftime('%Y%m%d-%H%M%S')}-{os.getpid()}"
    device = "cpu"
    if torch.accelerator.is_available():
        device = torch.accelerator.current_accelerator().type
    parser = argparse.ArgumentParser(f"{SCRIPT}.py", allow_abbrev=False)
    parser.usage = argparse.SUPPRESS  # an error is one line
    parser.description = "Train an Energy-Based GAN. Defaults are in brackets."
    flag = parser.add_argument
    flag("--n_epochs", type=positive, default=200, help="passes over the images [200]")
    flag("--batch_size", type=positive, default=64, help="per step and process [64]")
    flag("--lr", type=amount, default=2e-3, help="Adam's learning rate [0.002]")
    flag(
        "--lr_decay", type=amount, default=3e-4, help="lr / (1 + this * step) [0.0003]"
    )
    flag("--b1", type=amount, default=0.5, help="Adam's beta1 [0.5]")
    flag("--b2", type=amount, default=0.999, help="Adam's beta2 [0.999]")
    flag("--n_cpu", type=positive, default=8, help="threads that read pictures [8]")
    flag("--latent_dim", type=positive, default=62, help="dimension of z [62]")
    flag("--img_size", type=positive, default=32, help="a multiple of 4 [32]")
    flag("--channels", type=int, choices=(1, 3), help="grey or RGB [as in the data]")
    flag("--sample_interval", type=positive, default=400, help="steps per save [400]")
    text = "reconstruction error: norm (paper) or mean square (PyTorch-GAN) [norm]"
    flag("--energy", choices=("norm", "mse"), default="norm", help=text)
    text = "margins to compare [0 0.5 0.7 1 1.4 2 times the default of ebgan.py]"
    flag("--margins", type=amount, nargs="+", help=text)
    text = "weight of the pulling-away term [0.1]"
    flag("--lambda_pt", type=amount, default=0.1, help=text)
    flag("--noise", type=amount, help="std of noise on D's input [norm: 0.3; mse: 0]")
    flag("--dataset", choices=DATASETS, help="training data [mnist; digits if offline]")
    flag("--data_root", type=full_path, default="data", help="data or pictures [data]")
    text = "a new folder for the run [in runs]"
    flag("--out_dir", type=full_path, default=f"runs/{SCRIPT}-{now}", help=text)
    text = "random seeds for each margin [0 1 2]"
    flag("--seeds", type=int, nargs="+", default=[0, 1, 2], help=text)
    flag("--device", default=device, help="such as cuda:1 [an accelerator, else cpu]")
    flag("--max_steps", type=positive, default=1500, help="steps of each run [1500]")
    flag("--amp", action="store_true", help="compute in bfloat16 [off]")
    text = "resume, or generate from, a run: its folder or checkpoint [the newest]"
    flag("--resume", nargs="?", const="newest", metavar="RUN", help=text)
    flag("--generate", type=positive, metavar="N", help="write N images from that run")
    opt = parser.parse_args(argv)

    if opt.resume is not None or opt.generate:  # typed flags win over saved ones
        saved = load_checkpoint("newest" if opt.resume is None else opt.resume)
        run_dir, name = os.path.split(saved["path"])
        flags = argparse.Namespace(**saved["flags"])
        if opt.generate:
            flags.out_dir = f"{run_dir}/generated-{now}"
        elif name == "checkpoint.pt":  # any other file branches into a new folder
            flags.out_dir = run_dir
        opt = parser.parse_args(argv, flags)
        opt.resume = saved["path"]
        if "margin" in saved["flags"] and not opt.generate:
            parser.error(f"argument --resume: {run_dir} is a run: name its sweep")
        if not opt.generate:  # new margins and seeds are added to the old ones
            opt.margins = [*saved["flags"]["margins"], *(opt.margins or [])]
            opt.seeds = [*saved["flags"]["seeds"], *opt.seeds]
    if opt.img_size % 4:
        parser.error("argument --img_size: must be a multiple of 4")
    if opt.batch_size == 1:
        parser.error("argument --batch_size: batch normalization needs at least 2")
    in_place = opt.resume == os.path.join(opt.out_dir, "checkpoint.pt")
    if os.path.exists(opt.out_dir) and (opt.generate or not in_place):
        parser.error(f"argument --out_dir: {opt.out_dir} exists: name a new folder")
    return opt


# ------------------------------------------------------------------------------ sweep
def sweep(opt: argparse.Namespace, data: Data) -> None:
    """Train each margin with each seed; write results.csv, margins.png and a table."""
    opt.channels = data.imgs.shape[1]
    margins = opt.margins or [x * default_margin(opt) for x in (0, 0.5, 0.7, 1, 1.4, 2)]
    opt.margins, opt.seeds = sorted(set(margins)), sorted(set(opt.seeds))
    home = Path(opt.out_dir)
    if RANK == 0:
        if Path(opt.resume or "") != home / "checkpoint.pt":
            home.mkdir(parents=True)  # fails if another sweep has it
        torch.save({"flags": saved_flags(opt)}, home / f"new-{os.getpid()}")
        os.replace(home / f"new-{os.getpid()}", home / "checkpoint.pt")

    results, samples = [], []
    for margin in opt.margins:
        for seed in opt.seeds:
            print(f"margin {margin:g}, seed {seed}", flush=True)
            run_dir = home / f"margin_{margin:.10g}/seed_{seed}"
            run = argparse.Namespace(**vars(opt))
            run.margin, run.seed, run.out_dir = margin, seed, str(run_dir)
            checkpoint = run_dir / "checkpoint.pt"
            run.resume = str(checkpoint) if checkpoint.exists() else None
            if RANK == 0 and run_dir.exists() and not run.resume:
                run_dir.rename(f"{run_dir}-{os.getpid()}")  # stopped in its first save
            row = {"margin": margin, "seed": seed, "error": ""}
            try:
                results.append(row | train(run, data))
            except FloatingPointError as error:
                if WORLD_SIZE > 1:
                    raise  # the other processes are still training
                results.append(row | {"error": str(error)})
            if RANK == 0:
                write_csv(home / "results.csv", results)
        if RANK == 0:
            generator, _ = load_run(f"{home}/margin_{margin:.10g}/seed_{opt.seeds[0]}")
            z = torch.randn(12, opt.latent_dim, generator=seeded_rng(0, "samples"))
            samples.append(run_batched(generator, z, "cpu") / 2 + 0.5)
    if RANK == 0:
        save_image(torch.cat(samples), home / "margins.png", nrow=12)
        print_table(results)
        print(f"results.csv and margins.png (a row for each margin) are in {home}")


def print_table(results: list[dict]) -> None:
    """Print mean +- sample standard deviation over the seeds, a row for each margin."""
    columns = "score", "frechet", "classes", "real_energy", "fake_energy"
    print(f"{'margin':>7}  runs", *(f"{name:>14}" for name in columns))
    for margin in dict.fromkeys(row["margin"] for row in results):
        rows = [row for row in results if row["margin"] == margin]
        finite = [row for row in rows if not row["error"]]
        cells = []
        for name in columns:
            values = np.array([row[name] for row in finite])
            mean = f"{values.mean().round(4):.3g}" if finite else "not finite"
            sd = f" +- {values.std(ddof=1).round(4):.2g}" if len(finite) > 1 else ""
            cells.append(f"{mean + sd:>14}")
        print(f"{margin:7.4g}  {len(finite)}/{len(rows)} ", *cells)


# ------------------------------------------------------------------------------- main
def generate(opt: argparse.Namespace) -> None:
    """Write images from a run, and the first 64 of them as a grid."""
    generator = load_run(opt.resume)[0].to(opt.device)
    out_dir = Path(opt.out_dir)
    out_dir.mkdir(parents=True)
    for start in range(0, opt.generate, 64):
        rng = seeded_rng(opt.seed, "generate", start)
        z = torch.randn(64, opt.latent_dim, generator=rng)[: opt.generate - start]
        imgs = run_batched(generator, z, opt.device) / 2 + 0.5
        if start == 0:
            save_image(imgs, out_dir / "grid.png")
        for i, img in enumerate(imgs, start):
            save_image(img, out_dir / f"{i:05d}.png")
    print(f"wrote {opt.generate} images and grid.png to {out_dir}")


def main(argv: list[str] | None = None) -> int:
    """Run the script and return its exit status."""
    opt = parse_args(argv)
    device = torch.device(opt.device)
    if device.type == "cuda":
        local_rank = int(os.getenv("LOCAL_RANK", "0"))
        torch.cuda.set_device(local_rank if device.index is None else device.index)
    if opt.amp and device.type == "cpu" and not torch.cpu._is_avx512_bf16_supported():
        print("this CPU lacks AVX512_BF16: --amp may be much slower than float32")
    try:
        if opt.generate:
            if RANK == 0:
                generate(opt)
            return 0
        if WORLD_SIZE > 1:
            backend = "gloo" if device.type == "cpu" else None  # None: the device's own
            torch.distributed.init_process_group(backend)
        flags = [opt]
        if RANK > 0:  # wait for the flags of rank 0, which finds the data first
            torch.distributed.broadcast_object_list(flags)
            opt = flags[0]
        opt.dataset = opt.dataset or default_dataset(opt.data_root)
        print(f"reading {opt.dataset}", flush=True)
        data = load_images(
            opt.dataset, opt.data_root, opt.img_size, opt.channels, opt.n_cpu
        )
        if RANK == 0 and WORLD_SIZE > 1:
            torch.distributed.broadcast_object_list(flags)
        sweep(opt, data)
        if WORLD_SIZE > 1:
            torch.distributed.destroy_process_group()
        return 0
    except KeyboardInterrupt:
        if RANK == 0 and Path(opt.out_dir, "checkpoint.pt").exists():
            torchrun = f"torchrun --nproc_per_node={WORLD_SIZE}"
            launcher = "python" if WORLD_SIZE == 1 else torchrun
            command = shlex.join([sys.argv[0], "--resume", opt.out_dir])
            print(f"stopped; resume with: {launcher} {command}", file=sys.stderr)
        return 130


if __name__ == "__main__":
    if RANK > 0:
        sys.stdout = None  # only rank 0 prints
    sys.exit(main())
