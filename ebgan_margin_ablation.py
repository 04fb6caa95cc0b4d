# SPDX-License-Identifier: MIT
"""Sweep over the margin of the Energy-Based GAN (arXiv 1609.03126), in one file.

The discriminator is an auto-encoder; an image's energy is its reconstruction error:

    U(x) = || Dec(Enc(x)) - x ||,  images x in [-1, 1]           eq. 13
    L_D  = E_x[ U(x) ] + E_z[ max(0, margin - U(G(z))) ]         eq. 1, hinge per sample
    L_G  = E_z[ U(G(z)) ]                                        eq. 2
    f_PT = mean over i != j of cos(S_i, S_j)^2,  S = Enc(G(z))   section 2.4

Not in the paper: noise is added to the input of Enc, but not to the x that the error is
measured against (disable with --noise 0); the learning rate decays (disable with
--lr_decay 0); samples come from a running mean of G.
This trains ebgan_pt.py's L_G + lambda_pt * f_PT for each margin and seed. A seed fixes
the weights, the noise and the order of the images, so that only the margin differs.

    python ebgan_margin_ablation.py                    the default margins and seeds
    python ebgan_margin_ablation.py --margins 0 1 4 --seeds 0 --max_steps 300
    python ebgan_margin_ablation.py --resume           resume the newest sweep
"""

import argparse
import atexit
import copy
import csv
import ctypes
import io
import os
import shlex
import signal
import socket
import sys
import tempfile
import time
import warnings
import zlib
from collections import Counter
from multiprocessing.pool import ThreadPool
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image, ImageDraw, ImageFont, ImageOps
from torch import Tensor, nn
from torchvision import datasets
from torchvision.ops import Conv2dNormActivation
from torchvision.transforms.v2.functional import pil_to_tensor, resize, rgb_to_grayscale
from torchvision.utils import save_image

SCRIPT = Path(__file__).stem
RANK, WORLD_SIZE = int(os.getenv("RANK", "0")), int(os.getenv("WORLD_SIZE", "1"))


# ----------------------------------------------------------------------------- losses
def energy(recon: Tensor, imgs: Tensor, kind: str = "norm") -> Tensor:
    """U(x) of each image, N x C x H x W -> N: norm (eq. 13) or mean square (mse)."""
    if kind not in ("norm", "mse"):
        raise ValueError(f'kind must be "norm" or "mse", not {kind!r}')
    dtype = torch.promote_types(recon.dtype, torch.float32)  # bfloat16 is too coarse
    error = (recon.to(dtype) - imgs.to(dtype)).flatten(1)
    return error.norm(dim=1) if kind == "norm" else error.square().mean(1)


def discriminator_loss(
    real_energy: Tensor, fake_energy: Tensor, margin: float
) -> Tensor:
    """L_D (eq. 1), a scalar, from the energies of real and of generated images."""
    return real_energy.mean() + (margin - fake_energy).clamp(min=0).mean()


def pullaway_loss(embedding: Tensor) -> Tensor:
    """f_PT (section 2.4) of N x E embeddings: mean squared cosine over i != j."""
    n = len(embedding)
    with torch.autocast(embedding.device.type, enabled=False):  # never in bfloat16
        dtype = torch.promote_types(embedding.dtype, torch.float32)
        unit = F.normalize(embedding.to(dtype), dim=1)  # a zero embedding stays zero
        cosines = (unit @ unit.T).fill_diagonal_(0)
        return cosines.square().sum() / max(n * (n - 1), 1)


# --------------------------------------------------------------------------- networks
class UpsampleConv2d(nn.Conv2d):
    """Nearest x2 upsampling, then a 3x3 convolution: N x C x H x W -> N x C' x 2H x 2W.

    As one transposed 4x4 convolution, this takes 4 multiplications instead of 9.
    """

    def __init__(self, in_channels: int, out_channels: int):
        super().__init__(in_channels, out_channels, kernel_size=3, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        # sum the taps that hit the same pixel; ONNX export ignores divisor_override=1
        sums = 4 * F.avg_pool2d(self.weight, 2, stride=1, padding=1)
        kernel = sums.flip(2, 3).transpose(0, 1)
        out = F.conv_transpose2d(x, kernel, stride=2, padding=1)
        return out.add_(self.bias.to(out.dtype).view(-1, 1, 1))  # faster than bias=


def init_weights(module: nn.Module) -> None:
    """Initialize the weights of Conv2d and BatchNorm2d as DCGAN does."""
    if isinstance(module, nn.Conv2d):
        nn.init.normal_(module.weight, 0, 0.02)
    elif isinstance(module, nn.BatchNorm2d):
        nn.init.normal_(module.weight, 1, 0.02)


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
        x = self.project(z).contiguous(memory_format=torch.channels_last)  # faster
        return self.upsample(x)


class Discriminator(nn.Module):
    """D: images, N x C x S x S -> reconstruction, N x C x S x S, and embedding, N x 32.

    S is a multiple of 4, as in the generator. Needs UpsampleConv2d and init_weights.
    """

    def __init__(self, img_size: int = 32, channels: int = 1):
        super().__init__()
        if img_size % 4:
            raise ValueError(f"img_size must be a multiple of 4, not {img_size}")
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


# ---------------------------------------------------------------------- training step
def train_step(
    generator: nn.Module,
    discriminator: nn.Module,
    optimizer_g: torch.optim.Optimizer,
    optimizer_d: torch.optim.Optimizer,
    real_imgs: Tensor,
    z: Tensor,
    noise: Tensor | float,
    margin: float,
    kind: str = "norm",
    amp: bool = False,
    lambda_pt: float = 0.1,
) -> tuple[Tensor, Tensor, Tensor]:
    """Update the discriminator, then the generator (either may be wrapped in DDP).

    Images are in [-1, 1]; noise (of their shape, or 0) is added to those that D sees;
    amp runs the networks in bfloat16. Needs the losses above.
    Return the energies of real and generated images and the embedding of the latter.
    """
    autocast = torch.autocast(real_imgs.device.type, torch.bfloat16, enabled=amp)

    # discriminator: low energy for real images, at least the margin for generated ones
    with autocast:
        gen_imgs = generator(z)
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
    unwrapped = getattr(discriminator, "module", discriminator)  # DDP would wait for D
    with autocast:
        recon, embedding = unwrapped(gen_imgs + noise)
    loss_g = energy(recon, gen_imgs, kind).mean()
    loss_g = loss_g + lambda_pt * pullaway_loss(embedding)
    optimizer_g.zero_grad()
    loss_g.backward(inputs=list(generator.parameters()))  # none for the discriminator
    optimizer_g.step()
    return real_energy.detach(), fake_energy.detach(), embedding.detach()


# --------------------------------------------------------------------------- training
def train(opt: argparse.Namespace, data: list[Tensor]) -> dict[str, float]:
    """Train on the tensors from load_images; return the last log row (rank 0)."""
    # setup
    imgs, labels, held_out, _ = data
    global_batch = opt.batch_size * WORLD_SIZE
    epoch_steps = len(imgs) // global_batch  # full batches only
    total = min(opt.n_epochs * epoch_steps, opt.max_steps or sys.maxsize)
    if epoch_steps == 0:
        have = f"{len(imgs)} training images ({len(held_out)} are held out)"
        raise ValueError(f"--batch_size {opt.batch_size} exceeds the {have}")
    state, start, rows = build(opt)
    generator, averaged, discriminator, *optimizers = state.values()
    unscored = rows and rows[-1].get("tv_bound", 0) is None  # stopped while scoring
    if start >= total and not unscored:
        hint = "to continue, raise --n_epochs or --max_steps"
        print(f"nothing to do: {opt.out_dir} has {start} steps; {hint}", flush=True)
        return rows[-1]
    if RANK == 0:
        if not opt.resume and Path(opt.out_dir, "checkpoint.pt").exists():
            raise ValueError(f"--out_dir {opt.out_dir}: another run has begun there")
        Path(opt.out_dir, "samples").mkdir(parents=True, exist_ok=True)
        save(opt, state, imgs, start, rows)  # from here on the run can be resumed
        classifier = None
        if labels.max() > 0:  # there are classes
            print("training a classifier for the scores", flush=True)
            classifier = train_classifier(imgs, labels, opt.device)
        if unscored:
            rows[-1] |= score_run(opt, state, data, classifier)
            save(opt, state, imgs, start, rows)
    networks = generator, discriminator
    if WORLD_SIZE > 1:
        # without find_unused_parameters DDP regroups gradients after its first step,
        # and a resumed run would sum them in another order
        ddp = {"broadcast_buffers": False, "find_unused_parameters": True}
        networks = [nn.parallel.DistributedDataParallel(net, **ddp) for net in networks]
    options = opt.margin, opt.energy, opt.amp, opt.lambda_pt
    graphed = opt.device.startswith("cuda") and WORLD_SIZE == 1
    run_step = GraphedStep(train_step) if graphed else train_step
    # score at ends of epochs, but hardly more often than every sample_interval steps
    score_interval = max(1, round(opt.sample_interval / epoch_steps)) * epoch_steps
    print(f"training from step {start} to {total} in {opt.out_dir}", flush=True)
    start_time = log_time = time.perf_counter()
    log_step = start

    for step in range(start + 1, total + 1):
        # data: draws depend only on seed, step and rank, so that runs resume exactly
        epoch, i = divmod(step - 1, epoch_steps)
        if i == 0 or step == start + 1:
            rng = seeded_generator(opt.seed, 0, epoch)
            batches = torch.randperm(len(imgs), generator=rng).split(opt.batch_size)
        real_imgs = imgs[batches[i * WORLD_SIZE + RANK]].to(opt.device) / 127.5 - 1
        rng = seeded_generator(opt.seed, 1, step, RANK)
        z = torch.randn(opt.batch_size, opt.latent_dim, generator=rng).to(opt.device)
        noise = torch.randn(real_imgs.shape, generator=rng).to(opt.device) * opt.noise

        # step
        for optimizer in optimizers:
            optimizer.param_groups[0]["lr"] = opt.lr / (1 + opt.lr_decay * step)
        real_energy, fake_energy, embedding = run_step(
            *networks, *optimizers, real_imgs, z, noise, *options
        )
        # running mean of the generator, for samples and scores
        weight = max(9 / (9 + step), 0.001)
        values = generator.state_dict().values()
        for mean, value in zip(averaged.state_dict().values(), values, strict=True):
            if mean.is_floating_point():
                mean.lerp_(value, weight)

        # log: not at every step, since .item() waits for the device
        scoring = step == total or step % score_interval == 0
        saving = scoring or step % opt.sample_interval == 0 or step in (50, 100, 200)
        if RANK > 0 or not (saving or step % 20 == 0):
            continue
        if not all(x.isfinite().all() for net in networks for x in net.parameters()):
            raise FloatingPointError(f"weights not finite at step {step}: lower --lr")
        row = {"step": step, "epoch": epoch + 1}
        row["real_energy"] = real_energy.mean().item()
        row["fake_energy"] = fake_energy.mean().item()
        row["hinge_active"] = (fake_energy < opt.margin).float().mean().item()
        row["pullaway"] = pullaway_loss(embedding).item()
        seconds = time.perf_counter() - log_time
        row["images_per_s"] = (step - log_step) * global_batch / seconds
        rows.append(row)

        # save, then score, which takes the most memory
        if scoring:
            row["tv_bound"] = None  # until it is scored
        if saving:
            save(opt, state, imgs, step, rows)
        if scoring:
            row |= score_run(opt, state, data, classifier)
            save(opt, state, imgs, step, rows)
        log_step, log_time = step, time.perf_counter()
        if saving or sys.stdout.isatty():  # there, lines between saves are overwritten
            minutes = (log_time - start_time) / (step - start) * (total - step) / 60
            values = " ".join(f"{name} {value:.5g}" for name, value in row.items())
            line = f"{minutes:.0f} min left, {values}"
            print(line + "\n" if saving else f"{line[:79]:79}\r", end="", flush=True)
    return rows[-1] if rows else {}


def build(opt: argparse.Namespace) -> tuple[dict, int, list[dict]]:
    """Return networks and optimizers by name, step and log rows, new or resumed."""
    with torch.random.fork_rng(devices=[]):  # leaves the caller's RNG state alone
        torch.default_generator.manual_seed(opt.seed)
        generator = Generator(opt.img_size, opt.channels, opt.latent_dim).to(opt.device)
        discriminator = Discriminator(opt.img_size, opt.channels).to(opt.device)
    state = {"generator": generator, "averaged": copy.deepcopy(generator).eval()}
    state["discriminator"] = discriminator
    adam = {"lr": opt.lr, "betas": (opt.b1, opt.b2), "fused": True}
    state["optimizer_g"] = torch.optim.Adam(generator.parameters(), **adam)
    state["optimizer_d"] = torch.optim.Adam(discriminator.parameters(), **adam)
    saved = load_checkpoint(opt.resume, state) if opt.resume else {}
    return state, saved.get("step", 0), saved.get("rows", [])


class GraphedStep:
    """A train_step that is recorded as a CUDA graph in its fourth call, then replayed.

    All kernels in one launch: 3.4 times the images/s at batch 64 on an H100. The
    tensors that it returns are overwritten by the next call.
    """

    def __init__(self, function):
        self.function, self.n_calls = function, 0
        self.stream = torch.cuda.Stream()

    def __call__(self, *args) -> tuple[Tensor, Tensor, Tensor]:
        groups = [optimizer.param_groups[0] for optimizer in args[2:4]]
        lrs = [args[4].new_tensor(group["lr"]) for group in groups]
        self.n_calls += 1
        if self.n_calls < 4:  # CUDA graphs need warm-up steps, on another stream
            for group, lr in zip(groups, lrs):
                group["lr"] = lr.item()  # in float32, as in the graph
            self.stream.wait_stream(torch.cuda.current_stream())
            with torch.cuda.stream(self.stream):
                outputs = self.function(*args)
            torch.cuda.current_stream().wait_stream(self.stream)
            return outputs
        if self.n_calls == 4:
            self.inputs = [x.clone() for x in (*args[4:7], *lrs)]
            for group, lr in zip(groups, self.inputs[3:]):
                group |= {"lr": lr, "capturable": True}
            self.graph = torch.cuda.CUDAGraph()
            with torch.cuda.graph(self.graph, stream=self.stream):
                self.outputs = self.function(*args[:4], *self.inputs[:3], *args[7:])
            for group, lr in zip(groups, lrs):
                group |= {"lr": lr.item(), "capturable": False}
        for old, new in zip(self.inputs, (*args[4:7], *lrs)):
            old.copy_(new)
        self.graph.replay()
        return self.outputs


# ------------------------------------------------------------------------------- data
def seeded_generator(*key: int) -> torch.Generator:
    """Return a generator for a key: seed, a number for the purpose, step, rank."""
    seed = np.random.SeedSequence(key).generate_state(1, np.uint64)[0]
    return torch.Generator().manual_seed(int(seed) >> 1)


def synthetic_digits(n: int, img_size: int, seed: int) -> tuple[Tensor, Tensor]:
    """Draw n digits, white on black: images n x 1 x S x S uint8 and labels n int64."""
    size = max(64, img_size)
    try:
        font = ImageFont.load_default(size=0.75 * size)
    except TypeError as error:
        raise ValueError("the built-in digits need Pillow 10.1 or newer") from error
    glyphs = torch.empty(30, 1, size, size)
    for i in range(30):  # ten digits in three stroke widths
        glyph, text = Image.new("L", (size, size)), str(i // 3)
        style = {"anchor": "mm", "stroke_width": i % 3 * size // 64}
        ImageDraw.Draw(glyph).text((size / 2, size / 2), text, 255, font, **style)
        glyphs[i] = pil_to_tensor(glyph)
    glyphs = F.interpolate(glyphs, size=img_size, mode="area")
    rng = torch.Generator().manual_seed(seed)
    labels = torch.randint(10, (n,), generator=rng)
    styles = 3 * labels + torch.randint(3, (n,), generator=rng)
    angle, zoom, shear, dx, dy = torch.rand(5, n, generator=rng) * 2 - 1
    cos, sin, shear = (angle / 4).cos(), (angle / 4).sin(), shear / 4
    rows = [cos, shear * cos - sin, dx / 10, sin, shear * sin + cos, dy / 10]
    maps = (torch.stack(rows) * 0.9 * 1.2**zoom).T.view(n, 2, 3)
    imgs = torch.empty(n, 1, img_size, img_size, dtype=torch.uint8)
    for i in torch.arange(n).split(max(1, 1_024_000 // img_size**2)):
        grid = F.affine_grid(maps[i], [len(i), 1, img_size, img_size], False)
        warped = F.grid_sample(glyphs[styles[i]], grid, align_corners=False)
        imgs[i] = warped.round().byte()
    return imgs, labels


def load_picture(path: str | Path, img_size: int, channels: int = 3) -> Tensor:
    """Load a picture upright, cropped to a square, as uint8 C x S x S, grey or RGB.

    Transparent pixels become white. Raise ValueError if the picture is unusable.
    """
    try:
        img = Image.open(path)
        img.draft(None, (img_size, img_size))  # decodes a large JPEG at a reduced size
        if img.mode[0] in "FI":  # F, I or I;16
            raise ValueError("more than 8 bits per channel")
        img = ImageOps.exif_transpose(img).convert("RGBA")
        img = ImageOps.fit(img, (img_size, img_size))
        img = Image.alpha_composite(Image.new("RGBA", img.size, "white"), img)
        return pil_to_tensor(img.convert("L" if channels == 1 else "RGB"))
    except Exception as error:  # Pillow raises many exception types
        raise ValueError(f"{path}: {error}") from error


def load_folder(root: str, img_size: int, channels: int | None, n_cpu: int) -> list:
    """Load all pictures below a folder for load_images; each subfolder is a class."""
    paths, left_out, visited, unusable = [], Counter(), set(), []
    for folder, subfolders, files in os.walk(root, followlinks=True):
        skip = "linked twice" if os.path.realpath(folder) in visited else ""
        if {"checkpoint.pt", "generated_from.txt"} & set(files):
            skip = "from a training run"
        visited.add(os.path.realpath(folder))
        subfolders[:] = [] if skip else sorted(subfolders)
        for path in (Path(folder, name) for name in files):
            hidden = any(part[0] == "." for part in path.relative_to(root).parts)
            reason = skip or ("hidden" if hidden else path.suffix.lower())
            if reason in datasets.folder.IMG_EXTENSIONS and path.is_file():
                paths.append(path)
            else:
                left_out[reason or "without a suffix"] += 1
    reasons = ", ".join(f"{n} {reason}" for reason, n in left_out.items())
    print(f"{len(paths)} pictures in {root}; left out: {reasons or 'none'}", flush=True)
    if len(paths) < 20:
        raise ValueError(f"--data_root {root} has {len(paths)} pictures, fewer than 20")
    paths.sort()
    order = torch.randperm(len(paths), generator=seeded_generator(0))
    paths = [paths[i] for i in order]
    imgs = torch.empty(len(paths), channels or 3, img_size, img_size, dtype=torch.uint8)

    def load_into(i: int) -> None:
        try:
            imgs[i] = load_picture(paths[i], img_size, channels or 3)
        except ValueError as error:
            unusable.append(error)

    with ThreadPool(n_cpu) as pool:
        pool.map(load_into, range(len(paths)))
    if unusable:
        first = "; ".join(sorted(map(str, unusable))[:3])
        text = f"--data_root: {len(unusable)} pictures are unusable: {first}"
        raise ValueError(text) from unusable[0]
    if channels is None and (imgs == imgs[:, :1]).all():
        imgs = imgs[:, :1].clone()  # all are grey
    classes = sorted({path.parent for path in paths})
    labels = torch.tensor([classes.index(path.parent) for path in paths])
    n = len(paths) // 10
    return [imgs[n:], labels[n:], imgs[:n], labels[:n]]


def load_images(
    dataset: str, data_root: str, img_size: int, channels: int | None, n_cpu: int
) -> list[Tensor]:
    """Return training images, uint8 N x C x S x S, labels N; the same of held-out ones.

    Raise ValueError if files are damaged, or missing and not downloadable.
    """
    if dataset == "folder":
        return load_folder(data_root, img_size, channels, n_cpu)
    name = "FashionMNIST" if dataset == "fashion-mnist" else dataset.upper()
    files = f"{data_root}/{name}/raw" if "MNIST" in name else data_root
    splits = []
    for split, n in (("train", 20000), ("test", 5000)):
        if dataset == "digits":
            imgs, labels = synthetic_digits(n, img_size, seed=n)
        else:
            which = split if name == "SVHN" else split == "train"
            try:
                load = getattr(datasets, name)
                data = load(data_root, which, pil_to_tensor, download=True)
                labels = data.labels if name == "SVHN" else data.targets
                n = max(len(data), len(labels))  # IndexError if one is cut short
                imgs = torch.stack([resize(data[i][0], [img_size]) for i in range(n)])
            except Exception as error:  # torchvision raises many exception types
                cause = str(error) or repr(error)
                text = f"{files} is damaged, or missing and not downloadable: {cause}"
                raise ValueError(f"--dataset {dataset}: {text}") from error
        imgs = rgb_to_grayscale(imgs) if channels == 1 else imgs
        splits += [imgs.expand(-1, channels or -1, -1, -1), torch.as_tensor(labels)]
    return splits


def default_dataset(data_root: str) -> str:
    """Return mnist if it is on disk or can be downloaded, else digits."""
    root, suffixes = Path(data_root), datasets.folder.IMG_EXTENSIONS
    if any(root.glob("MNIST/raw/*ubyte*")):
        return "mnist"
    if any(path.suffix.lower() in suffixes for path in root.rglob("*")):
        raise ValueError(f"--data_root {root} holds pictures: add --dataset folder")
    print(f"MNIST is not in {root}: downloading it", flush=True)
    try:
        datasets.MNIST(data_root, download=True)
        return "mnist"
    except (OSError, RuntimeError, ValueError):
        print("MNIST can't be downloaded: using the built-in digits", flush=True)
        return "digits"


# ----------------------------------------------------------------------------- scores
@torch.no_grad()
def run_batched(function, x: Tensor, device: str) -> Tensor:
    """Apply function to x in small chunks; uint8 images are scaled to [-1, 1] first."""

    def run(chunk: Tensor) -> Tensor:
        chunk = chunk.to(device)
        chunk = chunk / 127.5 - 1 if chunk.dtype == torch.uint8 else chunk
        return function(chunk).cpu()

    size = max(x[:1].numel(), run(x[:1]).numel(), 1)  # of one input or output
    return torch.cat([run(chunk) for chunk in x.split(max(1, 512_000 // size))])


def train_classifier(imgs: Tensor, labels: Tensor, device: str) -> nn.Sequential:
    """Return a network c fit to uint8 images: c(x) gives logits, c[0](x) features.

    It is trained on the CPU in float64, so that scores hardly depend on the machine,
    and sees images of more than 32 x 32 at that size. Needs seeded_generator.
    """
    with torch.random.fork_rng(devices=[]):  # leaves the caller's RNG state alone
        torch.default_generator.manual_seed(0)
        sizes = ((imgs.shape[1], 16), (16, 32), (32, 64))
        layers = [nn.AdaptiveAvgPool2d(min(imgs.shape[-1], 32))]
        layers += [Conv2dNormActivation(*size, stride=2) for size in sizes]
        layers += [nn.AdaptiveAvgPool2d(4), nn.Flatten()]
        layers += [nn.Linear(1024, 64), nn.ReLU()]
        last = nn.Linear(64, int(labels.max()) + 1)
    classifier = nn.Sequential(nn.Sequential(*layers), last).double()
    optimizer = torch.optim.Adam(classifier.parameters(), fused=True)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, 0.01, total_steps=500)
    for step in range(500):
        batch = torch.randint(len(imgs), (64,), generator=seeded_generator(step))
        logits = classifier(imgs[batch].double() / 127.5 - 1)
        optimizer.zero_grad()
        F.cross_entropy(logits, labels[batch]).backward()
        optimizer.step()
        schedule.step()
    return classifier.float().to(device).eval()


def evaluate(classifier: nn.Sequential, imgs: Tensor, real: Tensor) -> dict[str, float]:
    """Score images against real ones, in [-1, 1] or uint8, at least 2 of each.

    score: I' of the paper, E_x KL(p(y) || p(y|x)), higher is better; frechet: distance
    of the features, lower is better; classes: those predicted for at least 1 %.
    Raise ValueError if images are too few or not finite. Needs run_batched.
    """
    device = next(classifier.parameters()).device
    features = run_batched(classifier[0], imgs, device)
    log_probs = run_batched(classifier[1], features, device).double().log_softmax(1)
    log_probs = log_probs.clamp(min=-20)  # so that one confident image cannot dominate
    marginal = log_probs.exp().mean(0)
    score = (marginal * (marginal.log() - log_probs)).sum(1).mean()
    real_features = run_batched(classifier[0], real, device).double()
    features = features.double()
    shift = (features.mean(0) - real_features.mean(0)).square().sum()
    finite = (features.sum() + real_features.sum()).isfinite()
    if min(len(imgs), len(real)) < 2 or not finite:
        raise ValueError("evaluate needs at least 2 images of each kind, all finite")
    cov, real_cov = features.T.cov(), real_features.T.cov()
    roots = torch.linalg.eigvals(cov @ real_cov).real.clamp(min=0).sqrt()
    frechet = shift + cov.trace() + real_cov.trace() - 2 * roots.sum()
    classes = (log_probs.argmax(1).bincount() >= 0.01 * len(imgs)).sum()
    return {"score": score.item(), "frechet": frechet.item(), "classes": classes.item()}


def tv_bound(real_energy: Tensor, fake_energy: Tensor, margin: float) -> float:
    """Estimate a lower bound on TV(data, generator): 1 - L_D / margin, at least 0.

    For densities p, q and U >= 0: p U + q max(0, m - U) >= m min(p, q) everywhere, and
    min(p, q) integrates to 1 - TV. So L_D >= m (1 - TV). Needs discriminator_loss.
    """
    loss = discriminator_loss(real_energy, fake_energy, margin)
    if not (loss + fake_energy.sum()).isfinite():
        raise ValueError("tv_bound needs finite energies")
    return max(0.0, 1 - loss.item() / margin) if margin > 0 else 0.0


def score_run(opt, state: dict, data: list[Tensor], classifier) -> dict[str, float]:
    """Return tv_bound and, with a classifier, scores of generated and of real images.

    Call it after save, which sets the discriminator's batch statistics.
    """
    imgs, _, held_out, _ = data
    z = torch.randn(5000, opt.latent_dim, generator=seeded_generator(opt.seed, 3))
    gen_imgs = run_batched(state["averaged"], z if classifier else z[:1000], opt.device)
    discriminator = state["discriminator"].eval()

    def image_energy(x: Tensor) -> Tensor:
        return energy(discriminator(x)[0], x, opt.energy)

    real_energy = run_batched(image_energy, held_out[:1000], opt.device)
    fake_energy = run_batched(image_energy, gen_imgs[:1000], opt.device)
    discriminator.train()
    if not (real_energy.sum() + fake_energy.sum()).isfinite():
        raise FloatingPointError("energies not finite: lower --lr")
    scores = {"tv_bound": tv_bound(real_energy, fake_energy, opt.margin)}
    if classifier:
        scores |= evaluate(classifier, gen_imgs, held_out)
        real_scores = evaluate(classifier, imgs[:5000], held_out)
        scores |= {f"real_{name}": value for name, value in real_scores.items()}
    return scores


# ------------------------------------------------------------------------ checkpoints
def save(opt, state: dict, imgs: Tensor, step: int, rows: list[dict]) -> None:
    """Replace samples, log.csv and checkpoint.pt, each file atomically."""
    # for the discriminator's eval mode: batch statistics of real images alone
    imgs = imgs[:2000]
    n_chunks = min(len(imgs) // 4, max(4, imgs.numel() // 512_000))
    chunks = (x.to(opt.device) / 127.5 - 1 for x in imgs.tensor_split(n_chunks))
    torch.optim.swa_utils.update_bn(chunks, state["discriminator"])
    z = torch.randn(64, opt.latent_dim, generator=seeded_generator(opt.seed, 2))
    samples = run_batched(state["averaged"], z, opt.device) / 2 + 0.5
    saved = {name: part.state_dict() for name, part in state.items()}
    checkpoint = io.BytesIO()  # torch.save raises no OSError on a full disk
    torch.save(saved | {"step": step, "rows": rows, "flags": vars(opt)}, checkpoint)
    with tempfile.TemporaryDirectory(dir=opt.out_dir) as folder:
        new = Path(folder)
        (new / "samples").mkdir()
        save_image(samples, new / "samples.png")
        save_image(samples, new / f"samples/{step}.png")
        write_csv(new / "log.csv", rows)
        (new / "checkpoint.pt").write_bytes(checkpoint.getvalue())
        for path in new.rglob("*.*"):
            path.replace(opt.out_dir / path.relative_to(new))


def write_csv(path: Path, rows: list[dict]) -> None:
    """Write a log or table, with a column for every name in any row."""
    with open(path, "w", newline="") as file:
        names = dict.fromkeys(name for row in rows for name in row)
        writer = csv.DictWriter(file, names, lineterminator="\n")
        writer.writeheader()
        writer.writerows(rows)


def load_checkpoint(run: str, state: dict) -> dict:
    """Load a checkpoint ("" for the newest run's) into state; return its contents."""
    newest = max(
        Path("runs").glob(f"{SCRIPT}-[0-9]???????-[0-9]?????"), default="runs/?"
    )
    path = Path(os.path.abspath(run or newest))
    path = path if path.is_file() else path / "checkpoint.pt"
    try:
        # weights_only: executes no code
        saved = torch.load(path, map_location="cpu", weights_only=True)
        if not {"script", "images"} <= saved["flags"].keys():
            raise ValueError("not a checkpoint of this version")
        for name, part in state.items():
            part.load_state_dict(saved[name])
        saved["flags"] |= {"resume": str(path), "out_dir": str(path.parent)}
        return saved
    except Exception as error:  # torch.load raises many exception types
        raise ValueError(f"{path} is missing or incompatible") from error


def load_run(run: str) -> tuple[nn.Module, nn.Module]:
    """Load generator (averaged) and discriminator, on the CPU in eval mode.

    run: a folder or checkpoint; ValueError if it is missing or incompatible.
    """
    saved = load_checkpoint(run, {})
    if "generator" not in saved:  # as in the checkpoint of a sweep
        raise ValueError(f"{run} has no networks")
    state, _, _ = build(argparse.Namespace(**saved["flags"] | {"device": "cpu"}))
    return state["averaged"], state["discriminator"].eval()


# ------------------------------------------------------------------------------ flags
def default_margin(opt: argparse.Namespace) -> float:
    """Return the paper's 10, scaled to the image size, or for mse PyTorch-GAN's."""
    if opt.energy == "mse":
        return max(1.0, opt.batch_size / 64)
    return 10 / 32 * (opt.channels * opt.img_size**2) ** 0.5


def parse_args(argv: list[str] | None = None) -> argparse.Namespace:
    """Parse and check the flags; on an error print one line and exit with status 2."""

    def number(kind: type, low: float, high: float = 2**31):
        def number(text: str) -> float:
            if low <= kind(text) < high:
                return kind(text)
            raise argparse.ArgumentTypeError(f"{text} is not in [{low}, {high})")

        return number

    parser = argparse.ArgumentParser(f"{SCRIPT}.py", allow_abbrev=False)
    parser.usage = argparse.SUPPRESS  # an error is one line
    parser.description = "Train an Energy-Based GAN. Defaults are in brackets."
    if RANK > 0:
        parser.error = lambda message: sys.exit(2)  # rank 0 prints it
    names = ("digits", "mnist", "fashion-mnist", "kmnist", "cifar10", "svhn", "folder")
    has_accelerator = torch.accelerator.is_available()
    best = torch.accelerator.current_accelerator().type if has_accelerator else "cpu"
    date = time.strftime("%Y%m%d-%H%M%S")
    margin = "energy up to which generated images are pushed, and no further"
    margin += " [norm: 10 at 1 x 32 x 32, scaled to other sizes; mse: 1 at batch 64]"
    positive, fraction, amount = number(int, 1), number(float, 0, 1), number(float, 0)
    for name, convert, default, text in (
        ("n_epochs", positive, 200, "passes over the training images [200]"),
        ("batch_size", number(int, 2), 64, "images per step and process [64]"),
        ("lr", number(float, 1e-12), 2e-3, "Adam's learning rate [0.002]"),
        ("lr_decay", amount, 3e-4, "the rate is lr / (1 + lr_decay * step) [0.0003]"),
        ("b1", fraction, 0.5, "Adam's beta1 [0.5]"),
        ("b2", fraction, 0.999, "Adam's beta2 [0.999]"),
        ("n_cpu", number(int, 1, 129), 8, "threads for decoding pictures [8]"),
        ("latent_dim", positive, 62, "dimension of z [62]"),
        ("img_size", number(int, 8, 1025), 32, "height = width, divisible by 4 [32]"),
        ("channels", (1, 3), None, "grey or colour [as in the data]"),
        ("sample_interval", positive, 400, "steps between saves of the run [400]"),
        ("energy", ("norm", "mse"), "norm", "norm of the error, or mean square [norm]"),
        ("lambda_pt", amount, 0.1, "weight of the pulling-away term [0.1]"),
        ("noise", amount, None, "sd, at the discriminator's input [norm: 0.3; mse: 0]"),
        ("dataset", names, None, "training data [mnist if on disk or downloadable]"),
        ("data_root", os.path.abspath, "data", "folder of data or pictures [data]"),
        ("out_dir", os.path.abspath, f"runs/{SCRIPT}-{date}", "a new folder [in runs]"),
        ("device", str, best, "such as cpu or cuda:1 [an accelerator, else cpu]"),
        ("max_steps", positive, 1500, "length of each run [1500]"),
        ("generate", positive, None, "write this many images from a run and exit"),
    ):
        choices = convert if isinstance(convert, tuple) else None
        convert = type(choices[0]) if choices else convert
        options = {"type": convert, "choices": choices, "default": default}
        parser.add_argument(f"--{name}", **options, help=text)
    text = margin.replace("[", "[0 0.5 0.7 1 1.4 2 times ")
    seeds = {"type": number(int, 0), "nargs": "+", "default": [0, 1, 2]}
    parser.add_argument("--margins", type=amount, nargs="+", help=text)
    parser.add_argument("--seeds", **seeds, help="seeds for each margin [0 1 2]")
    parser.add_argument("--amp", action="store_true", help="compute in bfloat16 [off]")
    text = "resume a run: its folder or checkpoint [the newest]"
    parser.add_argument("--resume", nargs="?", const="", metavar="RUN", help=text)
    parser.set_defaults(script=SCRIPT, processes=WORLD_SIZE, images=None)
    opt = parser.parse_args(argv)
    try:
        may_change = "margins seeds max_steps sample_interval data_root n_cpu device"
        if opt.resume is not None or opt.generate:
            flags = load_checkpoint(opt.resume or "", {})["flags"]
            if opt.generate and "margin" not in flags:
                raise ValueError("--generate needs --resume with the folder of one run")
            if not opt.generate and "margin" in flags:  # a run: its sweep is resumed
                flags = load_checkpoint(f"{flags['out_dir']}/../..", {})["flags"]
            if opt.generate:
                flags["out_dir"] += f"/generated-{date}"
                may_change += " seed processes out_dir generate"
            parser.set_defaults(**flags | {"script": SCRIPT, "processes": WORLD_SIZE})
            opt = parser.parse_args(argv)
            opt.resume = flags["resume"]
            if opt.max_steps < flags["max_steps"]:
                raise ValueError(f"--max_steps must be at least {flags['max_steps']}")
            current = os.path.join(os.path.dirname(opt.resume), "checkpoint.pt")
            if opt.resume != current and os.path.exists(current) and not opt.generate:
                raise ValueError(
                    f"{opt.resume} would overwrite {current}: move it first"
                )
            if flags["script"] != SCRIPT:
                raise ValueError(f"{opt.resume} is from {flags['script']}.py")
            for name in sorted(vars(opt).keys() - may_change.split()):
                if (value := getattr(opt, name)) != flags.get(name):
                    trained = f"{opt.resume}, which was trained with {flags.get(name)}"
                    raise ValueError(f"{name} {value} contradicts {trained}")
        if (opt.generate or not opt.resume) and any(Path(opt.out_dir).glob("*")):
            raise ValueError(f"--out_dir {opt.out_dir} is not a new or empty folder")
        margins = [f"{abs(margin):g}" for margin in opt.margins or []]
        if len({*margins}) < len(margins) or len({*opt.seeds}) < len(opt.seeds):
            raise ValueError("--margins and --seeds must not have the same value twice")
        if opt.img_size % 4:
            raise ValueError(f"--img_size {opt.img_size} is not a multiple of 4")
        torch.zeros(1, device=opt.device).item()
        n_local = int(os.getenv("LOCAL_WORLD_SIZE", "1"))
        n_devices = 1 if ":" in opt.device else torch.accelerator.device_count()
        if "cpu" not in opt.device and n_local > n_devices:
            what = f"{n_local} processes need as many devices, not {n_devices}"
            raise ValueError(f"--device {opt.device}: {what}")
    except ValueError as error:
        parser.error(str(error))
    except (RuntimeError, AssertionError) as error:  # from torch.zeros
        parser.error(f"--device {opt.device}: {str(error).splitlines()[0]}")
    return opt


# ------------------------------------------------------------------------------- main
def sweep(opt: argparse.Namespace, data: list[Tensor]) -> None:
    """Train every margin with every seed; write results.csv, a table and pictures."""
    home, results, samples = Path(opt.out_dir), [], []
    if RANK == 0:  # the sweep's flags, which a resume replaces
        home.mkdir(parents=True, exist_ok=True)
        path = home / "checkpoint.pt"
        if not opt.resume:
            path.touch(exist_ok=False)  # fails if another sweep has begun here
        torch.save({"flags": vars(opt)}, f"{path}.{os.getpid()}")
        os.replace(f"{path}.{os.getpid()}", path)
    for margin in opt.margins:
        for seed in opt.seeds:
            number = f"{len(results) + 1} of {len(opt.margins) * len(opt.seeds)}"
            print(f"run {number}: margin {margin:g}, seed {seed}", flush=True)
            folder = home / f"margin_{margin:g}" / f"seed_{seed}"
            run = argparse.Namespace(**vars(opt))
            run.margin, run.seed, run.out_dir = margin, seed, str(folder)
            run.resume = str(folder) if (folder / "checkpoint.pt").exists() else None
            results.append({"margin": f"{margin:g}", "seed": seed})
            try:
                results[-1] |= train(run, data)
            except FloatingPointError as error:
                if WORLD_SIZE > 1:
                    raise
                results[-1]["error"] = str(error)
        if RANK == 0:
            generator, _ = load_run(f"{home}/margin_{margin:g}/seed_{opt.seeds[0]}")
            rng = seeded_generator(opt.seeds[0], 2)
            z = torch.randn(64, opt.latent_dim, generator=rng)
            samples.append(run_batched(generator, z[:12], "cpu") / 2 + 0.5)
    if RANK > 0:
        return
    write_csv(home / "results.csv", results)
    for i, margin in enumerate(opt.margins):
        runs = results[i * len(opt.seeds) :][: len(opt.seeds)]
        runs = [run for run in runs if "error" not in run]
        print(f"margin {margin:g}, mean +- sd of {len(runs)} finite runs:", end="")
        for name in list(runs[0])[4:] if runs else []:
            values = np.array([run[name] for run in runs], float)
            sd = values.std(ddof=len(runs) > 1)
            print(f"  {name} {values.mean():.4g} +- {sd:.2g}", end="")
        print()
    save_image(torch.cat(samples), home / "margins.png", nrow=12)
    picture = ImageOps.expand(Image.open(home / "margins.png"), (100, 0, 0, 0))
    for i, margin in enumerate(opt.margins):
        place = (10, (i + 0.5) * (opt.img_size + 2) - 4)
        ImageDraw.Draw(picture).text(place, f"margin {margin:g}", "white")
    picture.save(home / "margins.png")
    print(f"done: results.csv and margins.png in {home}")


def load_data(opt: argparse.Namespace) -> list[Tensor]:
    """Return load_images's tensors, and set the flags that depend on them."""
    if RANK > 0:
        torch.distributed.barrier()  # wait until rank 0 has downloaded the data
    must_exist = opt.dataset == "folder" or os.path.exists(opt.data_root)
    if must_exist and not os.path.isdir(opt.data_root):
        raise ValueError(f"--data_root {opt.data_root} is not a folder")
    opt.dataset = opt.dataset or default_dataset(opt.data_root)
    print(f"reading {opt.dataset}", flush=True)
    source = opt.dataset, opt.data_root, opt.img_size, opt.channels, opt.n_cpu
    data = load_images(*source)
    if RANK == 0 and WORLD_SIZE > 1:
        torch.distributed.barrier()
    images = f"{len(data[0])} training images, {len(data[2])} held out, checksum "
    images += "-".join(f"{zlib.crc32(np.ascontiguousarray(x)):x}" for x in data)
    if opt.resume and images != opt.images:
        raise ValueError(f"--data_root: {images}; {opt.resume} had {opt.images}")
    print(f"{images}; on {opt.device}", flush=True)
    opt.images, opt.channels = images, data[0].shape[1]
    if opt.noise is None:
        opt.noise = 0.3 if opt.energy == "norm" else 0.0
    if opt.margins is None:
        opt.margins = [x * default_margin(opt) for x in (0, 0.5, 0.7, 1, 1.4, 2)]
    return data


def generate(opt: argparse.Namespace) -> None:
    """Write images from a run, and the first 64 of them as a grid."""
    generator = load_run(opt.resume)[0].to(opt.device)
    rng = seeded_generator(opt.seed, 4)
    z = torch.randn(opt.generate, opt.latent_dim, generator=rng)
    Path(opt.out_dir).mkdir(parents=True, exist_ok=True)
    Path(opt.out_dir, "generated_from.txt").write_text(f"{opt.resume}\n")
    for start in range(0, len(z), 64):
        imgs = run_batched(generator, z[start : start + 64], opt.device) / 2 + 0.5
        if start == 0:
            save_image(imgs, f"{opt.out_dir}/grid.png")
        for i, img in enumerate(imgs, start):
            save_image(img, f"{opt.out_dir}/{i:05d}.png")
    print(f"wrote {len(z)} images and grid.png to {opt.out_dir}")


def main(argv: list[str] | None = None) -> int:
    """Run the script and return its exit status; an error is one line on stderr."""
    opt = parse_args(argv)
    if WORLD_SIZE > 1 and not torch.distributed.is_initialized():
        backend = "gloo" if "cpu" in opt.device else None  # None: the device's own
        torch.distributed.init_process_group(backend)
        atexit.register(torch.distributed.destroy_process_group)
    deterministic = torch.backends.cudnn.deterministic
    torch.backends.cudnn.deterministic = True  # for an exact resume
    try:
        device = torch.cuda.device(opt.device if "cuda" in opt.device else -1)
        with torch.inference_mode(False), torch.enable_grad(), device:
            if opt.generate and RANK == 0:
                generate(opt)
            elif not opt.generate:
                sweep(opt, load_data(opt))
        return 0
    except KeyboardInterrupt:
        status, text = 130, "stopped"
        if Path(opt.out_dir, "checkpoint.pt").exists():
            launcher = f"torchrun --nproc_per_node={WORLD_SIZE}"
            typed = [*(sys.argv[1:] if argv is None else argv)]
            resume = ["--resume", opt.out_dir]
            command = shlex.join([__file__, *typed, *(resume * (typed[-2:] != resume))])
            text += f"; to resume: {launcher if WORLD_SIZE > 1 else 'python'} {command}"
    except Exception as error:
        cause, phrases = error, ("allocate memory", "out of memory", "overflow")
        while cause.__cause__ or cause.__context__:
            cause = cause.__cause__ or cause.__context__
        status, text = 2, f"error: {' '.join(str(error).split())}"
        if isinstance(cause, MemoryError) or any(x in str(cause) for x in phrases):
            flags = "--batch_size, --img_size, --latent_dim, --n_cpu or --generate"
            text = f"error: out of memory; lower {flags}"
        elif isinstance(error, OSError) and not error.filename:
            text += f" (in {opt.out_dir})"
        elif not isinstance(error, OSError | ValueError | FloatingPointError):
            raise
    finally:
        torch.backends.cudnn.deterministic = deterministic
    if RANK == 0 or "out of memory" in text:
        newline = "\n" if sys.stdout.isatty() else ""  # ends an overwritten line
        print(f"{newline}{SCRIPT}.py: {text}", file=sys.stderr)
    return status


if __name__ == "__main__":
    socket.setdefaulttimeout(5)  # seconds for each of torchvision's two mirrors
    if WORLD_SIZE > 1:
        warnings.filterwarnings("ignore", ".*broadcast_buffers")  # renamed in new torch
        if torch.cuda.is_available():
            local_rank = int(os.environ["LOCAL_RANK"])
            torch.cuda.set_device(local_rank % torch.cuda.device_count())
    if RANK > 0 or sys.stdout is None:
        sys.stdout = io.StringIO()  # only rank 0 prints
    if sys.platform == "linux":
        signal.signal(signal.SIGPIPE, signal.SIG_DFL)  # exit quietly under `| head`
        libc = ctypes.CDLL(None)  # 1.1 times the images/s: glibc keeps freed memory
        libc.mallopt(-1, 2**31 - 1)  # M_TRIM_THRESHOLD
        libc.mallopt(-3, 2**30)  # M_MMAP_THRESHOLD
    sys.exit(main())
