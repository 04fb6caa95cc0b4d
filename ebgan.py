# SPDX-License-Identifier: MIT
"""Energy-Based GAN (Zhao, Mathieu, LeCun, ICLR 2017, arXiv 1609.03126) in one file.

The discriminator is an auto-encoder; the energy of an image is its reconstruction error:

    U(x) = mean over C*H*W of (Dec(Enc(x)) - x)^2                images lie in [-1, 1]
    L_D  = E_x[ U(x) ] + E_z[ max(0, margin - U(G(z))) ]         eq. 1, hinge per sample
    L_G  = E_z[ U(G(z)) ]                                        eq. 2
    f_PT = mean over i != j of cos(S_i, S_j)^2,  S = Enc(G(z))   section 2.4

This is the plain variant: the generator minimises L_G; f_PT is logged, not trained on.
The variant that trains on it: `diff ebgan.py ebgan_pt.py`.

    python ebgan.py --n_epochs 200 --batch_size 64       train (MNIST, or built-in digits)
    python ebgan.py --amp --max_steps 1500               in bfloat16, and stop early
    python ebgan.py --dataset folder --data_root photos --img_size 64
    python ebgan.py --resume                             go on with the newest run
    python ebgan.py --resume runs/ebgan --generate 64    write pictures from a run
    torchrun --nproc_per_node=2 ebgan.py                 train on several devices
"""

import argparse
import ctypes
import functools
import glob
import hashlib
import io
import itertools
import math
import os
import shutil
import signal
import socket
import sys
import time
from datetime import timedelta
from multiprocessing.pool import ThreadPool
from pathlib import Path

import numpy as np
import torch
import torch.distributed as dist
import torch.nn as nn
import torch.nn.functional as F
from PIL import Image, ImageDraw, ImageFont, ImageOps
from torch.nn.parallel import DistributedDataParallel
from torchvision import datasets
from torchvision.transforms.v2 import functional as transforms
from torchvision.utils import save_image

CHECKPOINT = "checkpoint.pt"  # where it lies in a run's folder
LOG_EVERY = 20  # steps from one row of the log to the next
RUN_ONLY = (
    "device",
    "max_steps",
    "out_dir",
    "resume",
    "generate",
)  # not in a checkpoint
LOG_FIELDS = (
    *(
        "step",
        "epoch",
        "real_energy",
        "fake_energy",
        "hinge_active",
        "pullaway",
        "images_per_s",
    ),
    *("score", "frechet", "classes", "real_score", "real_frechet", "real_classes"),
)

# ---------------------------------------------------------------------------- flags


def parse_args(argv: list[str] | None = None) -> argparse.Namespace:
    """Read and check the flags; a resumed run brings its own as defaults.

    Bad input ends the program with one line on stderr and exit status 2.
    """

    def number(kind: type, least: float, below: float = math.inf):
        def parse(text: str):
            if least <= kind(text) < below:
                return kind(text)
            raise argparse.ArgumentTypeError(f"{text} is not in [{least}, {below})")

        return parse

    parser = argparse.ArgumentParser("ebgan.py", argparse.SUPPRESS, allow_abbrev=False)
    flag, count, decay = parser.add_argument, number(int, 1), number(float, 0, 1)
    names = "digits mnist fashion-mnist kmnist cifar10 svhn folder".split()
    flag("--n_epochs", type=count, default=200, help="passes over the data [200]")
    flag("--batch_size", type=number(int, 2), default=64, help="images a step [64]")
    flag("--lr", type=number(float, 1e-12), default=2e-4, help="Adam's rate [0.0002]")
    flag("--b1", type=decay, default=0.5, help="Adam's decay of the mean [0.5]")
    flag("--b2", type=decay, default=0.999, help="Adam's decay of the square [0.999]")
    flag("--n_cpu", type=count, default=8, help="threads that decode a folder [8]")
    flag("--latent_dim", type=count, default=62, help="numbers in the noise z [62]")
    flag(
        "--img_size", type=number(int, 8), default=32, help="pixels, 4 divides it [32]"
    )
    flag("--channels", type=int, choices=(1, 3), help="grey or colour [as the data]")
    flag("--sample_interval", type=count, default=400, help="steps a checkpoint [400]")
    flag("--margin", type=number(float, 0), help="energy [max(1, batch_size / 64)]")
    flag("--dataset", choices=names, help="[mnist if it can be had, else digits]")
    flag("--data_root", default="data", help="folder of data sets or pictures [data]")
    flag("--out_dir", help="the run's folder [runs/<script>, then <script>-2, -3 ...]")
    flag("--seed", type=number(int, 0), default=0, help="of all random draws [0]")
    flag("--device", help="cpu, cuda, cuda:1, mps [cuda, else mps, else cpu]")
    flag("--amp", action="store_true", help="bfloat16, but energies float32 [off]")
    flag("--max_steps", type=count, default=math.inf, help="stop early [no limit]")
    flag("--resume", nargs="?", const="", help="checkpoint or run's folder [newest]")
    flag("--generate", type=count, help="write that many pictures of a run, and end")
    flag("--n_eval", type=number(int, 2), default=5000, help="images to score [5000]")
    flag("--eval_interval", type=count, default=1, help="epochs between scores [1]")
    parser.set_defaults(script="ebgan", world=int(os.environ.get("WORLD_SIZE", 1)))
    opt = given = parser.parse_args(argv)
    try:
        if opt.resume is not None or opt.generate:
            path = find_checkpoint(opt.resume or opt.out_dir or "", opt.script)
            saved = read_checkpoint(path)["options"]
            parser.set_defaults(**saved)
            opt = parser.parse_args(argv)
            opt.script, opt.world, opt.resume = given.script, given.world, path
            # a run can be made longer or shown otherwise; the rest makes it what it is
            free = (
                "n_epochs sample_interval n_cpu data_root n_eval eval_interval".split()
            )
            for key in ["script"] if opt.generate else sorted(saved.keys() - {*free}):
                if (value := getattr(opt, key)) != saved[key]:
                    raise ValueError(f"--{key} {value}: {path} has {saved[key]}")
            home = Path(path).parents[CHECKPOINT.count("/")]
            if opt.generate:
                home /= "generated"
            elif opt.out_dir and not home.samefile(opt.out_dir):
                raise ValueError(f"--out_dir: a resumed run stays in {home}")
            opt.out_dir = opt.out_dir or str(home)
        elif opt.out_dir and any(Path(opt.out_dir).glob(CHECKPOINT)):
            text = f"--out_dir {opt.out_dir} holds a run: choose another folder,"
            raise ValueError(f"{text} or go on with --resume {opt.out_dir}")
        if opt.img_size % 4:
            raise ValueError(f"--img_size {opt.img_size} is not divisible by 4")
        folder = Path(opt.out_dir or "runs").absolute()
        folder = next(p for p in (folder, *folder.parents) if p.exists())
        if not folder.is_dir() or not os.access(folder, os.W_OK):
            raise ValueError(f"--out_dir: can't write to {folder}")
        opt.device = check_device(opt.device, opt.amp)
    except (OSError, ValueError) as error:
        parser.error(str(error))
    if opt.margin is None:
        opt.margin = max(1.0, opt.batch_size / 64)
    return opt


def check_device(name: str | None, amp: bool) -> str:
    """Return the name of a device that works, the best for None; raise ValueError."""
    best = "mps" if torch.backends.mps.is_available() else "cpu"
    name = name or ("cuda" if torch.cuda.is_available() else best)
    try:
        torch.zeros(1, device=name).item()  # "meta" holds no numbers, and fails here
    except (RuntimeError, AssertionError, NotImplementedError) as error:
        raise ValueError(f"--device {name}: {str(error).splitlines()[0]}") from error
    cuda = name.startswith("cuda") and torch.cuda.is_bf16_supported()
    if amp and not (cuda or name.startswith("cpu")):
        raise ValueError(f"--amp: no bfloat16 on {name}")
    return name


def say(text: str, final: bool = True) -> None:
    """Print a line (rank 0); on a terminal, the next one overwrites it unless final."""
    if os.environ.get("RANK", "0") == "0":
        if terminal := sys.stdout.isatty():
            text = "\r\033[K" + (
                text if final else text[: os.get_terminal_size()[0] - 1]
            )
        print(text, end="\n" if final or not terminal else "", flush=True)


# ----------------------------------------------------------------------------- data


def rng(*key: int) -> torch.Generator:
    """Return a generator seeded by its key: each random draw is a function of numbers."""
    seed = np.random.SeedSequence(key).generate_state(1, np.uint64)[0]
    return torch.Generator().manual_seed(int(seed) >> 1)


def synthetic_digits(
    n: int, img_size: int, seed: int
) -> tuple[torch.Tensor, torch.Tensor]:
    """Draw n digits: images n x 1 x S x S uint8, white on black, and labels n int64.

    Pillow's font in three stroke widths, rotated, scaled, sheared and shifted at random.
    """
    size, glyphs = max(64, img_size), []
    font = ImageFont.load_default(size=0.75 * size)
    for digit, stroke in itertools.product("0123456789", (0, 1, 2)):
        glyph, width = Image.new("L", (size, size)), stroke * size // 64
        draw = ImageDraw.Draw(glyph)
        draw.text((size / 2, size / 2), digit, 255, font, "mm", stroke_width=width)
        glyphs.append(torch.from_numpy(np.array(glyph, dtype=np.float32)))
    glyphs = F.interpolate(torch.stack(glyphs)[:, None], size=img_size, mode="area")
    draw = torch.Generator().manual_seed(seed)
    labels = torch.randint(10, (n,), generator=draw)
    kinds = 3 * labels + torch.randint(3, (n,), generator=draw)
    angle, zoom, shear, dx, dy = torch.rand(5, n, generator=draw) * 2 - 1
    cos, sin, shear = (angle / 4).cos(), (angle / 4).sin(), shear / 4
    rows = [cos, shear * cos - sin, dx / 10, sin, shear * sin + cos, dy / 10]
    maps = (torch.stack(rows) * 0.9 * 1.2**zoom).T.view(n, 2, 3)
    imgs = torch.empty(n, 1, img_size, img_size, dtype=torch.uint8)
    for part in torch.arange(n).split(1000):  # bounds the memory of the grid
        grid = F.affine_grid(maps[part], [len(part), 1, img_size, img_size], False)
        imgs[part] = F.grid_sample(
            glyphs[kinds[part]], grid, align_corners=False
        ).byte()
    return imgs, labels


def load_images(opt: argparse.Namespace) -> tuple[torch.Tensor | None, ...]:
    """Return train images, train labels, held-out images, held-out labels.

    Images are uint8 N x C x S x S, labels int64 N; data without classes has None for all
    but the first. Fills in ``opt.dataset`` and ``opt.channels`` where they are None.
    Raises ValueError or OSError for data that is missing or damaged.
    """
    if opt.dataset == "folder":
        return load_folder(opt)
    try:
        sets = [
            load_split(opt.dataset or "mnist", opt, part) for part in ("train", "test")
        ]
    except Exception as error:  # torchvision raises whatever it meets
        reason = f"{type(error).__name__}: {' '.join(str(error).split())}"
        if opt.dataset:
            raise ValueError(
                f"--dataset {opt.dataset} in {opt.data_root}: {reason}"
            ) from error
        say(f"MNIST is not in {opt.data_root} and can't be downloaded ({reason}).")
        say("Training on the built-in digits instead (--dataset digits).")
        opt.dataset = "digits"
        return load_images(opt)
    opt.dataset = opt.dataset or "mnist"
    opt.channels = opt.channels or sets[0][0].shape[1]
    if opt.channels < sets[0][0].shape[1]:
        sets = [(transforms.rgb_to_grayscale(imgs), labels) for imgs, labels in sets]
    (imgs, labels), (held_imgs, held_labels) = sets
    shape = (-1, opt.channels, -1, -1)
    return imgs.expand(shape), labels, held_imgs.expand(shape), held_labels


def load_split(
    name: str, opt: argparse.Namespace, split: str
) -> tuple[torch.Tensor, torch.Tensor]:
    """Return the "train" or "test" images, uint8 N x C x S x S, and their labels."""
    size, root, train = opt.img_size, opt.data_root, split == "train"
    if name == "digits":
        return synthetic_digits(20000 if train else 5000, size, seed=int(train))
    kind = getattr(datasets, {"fashion-mnist": "FashionMNIST"}.get(name, name.upper()))
    new = not os.path.exists(root)
    socket.setdefaulttimeout(10)  # seconds until a download gives up
    try:
        which = {"split": split} if name == "svhn" else {"train": train}
        data = kind(root, download=True, **which)
    except Exception:
        if new:  # what a failed download leaves
            shutil.rmtree(root, ignore_errors=True)
        raise
    finally:
        socket.setdefaulttimeout(None)
    imgs, labels = zip(*((transforms.pil_to_tensor(img), label) for img, label in data))
    parts = [
        transforms.resize(part, [size, size]) for part in torch.stack(imgs).split(5000)
    ]
    return torch.cat(parts), torch.tensor(labels)


def load_folder(opt: argparse.Namespace) -> tuple[torch.Tensor | None, ...]:
    """Decode the pictures below ``opt.data_root`` once, into a memory map; see load_images.

    Two or more sub-folders become classes, and a tenth of the pictures is held out.
    """
    root, size, endings = opt.data_root, opt.img_size, datasets.folder.IMG_EXTENSIONS
    paths = glob.glob(os.path.join(glob.escape(root), "**", "*"), recursive=True)
    paths = sorted(path for path in paths if path.lower().endswith(endings))
    if not paths:
        raise ValueError(f"--data_root {root} holds no pictures ({' '.join(endings)})")
    paths = [paths[i] for i in torch.randperm(len(paths), generator=rng(0))]

    def decode(path: str) -> bytes:
        try:
            with Image.open(path) as img:
                if opt.channels is None:
                    opt.channels = (
                        1 if img.mode in ("1", "L", "LA", "I", "I;16", "F") else 3
                    )
                img = img.convert("L" if opt.channels == 1 else "RGB")
            return ImageOps.fit(img, (size, size)).tobytes()  # cropped to a square
        except Exception as error:  # Pillow raises many kinds
            raise ValueError(f"{path} cannot be decoded: {error}") from error

    decode(paths[0])
    stats = [(path, os.path.getsize(path), os.path.getmtime(path)) for path in paths]
    digest = hashlib.sha256(repr(stats).encode()).hexdigest()[:16]
    name = f".ebgan_cache/{size}x{size}x{opt.channels}-{digest}.uint8"
    file = Path(root, name)
    if not file.exists() and not os.access(root, os.W_OK):
        file = Path(claim_out_dir(opt), name)
    if not file.exists():
        partial = file.with_suffix(f".{os.getpid()}")
        file.parent.mkdir(exist_ok=True)
        try:
            with open(partial, "wb") as f, ThreadPool(opt.n_cpu) as pool:
                for i, pixels in enumerate(pool.imap(decode, paths, chunksize=16)):
                    f.write(pixels)
                    if i % 500 == 499:
                        say(f"decoded {i + 1} of {len(paths)} pictures", final=False)
            os.replace(partial, file)
        finally:
            partial.unlink(missing_ok=True)
            if not any(file.parent.iterdir()):
                file.parent.rmdir()
    shape = (len(paths), size, size, opt.channels)
    imgs = torch.from_file(str(file), size=math.prod(shape), dtype=torch.uint8)
    imgs = imgs.view(shape).permute(0, 3, 1, 2)
    tops = [Path(path).relative_to(root).parts[:-1][:1] for path in paths]
    classes, held = sorted(set(tops)), len(paths) // 10
    if () in classes or len(classes) < 2 or held < 2:
        return imgs, None, None, None
    labels = torch.tensor([classes.index(top) for top in tops])
    return imgs[held:], labels[held:], imgs[:held], labels[:held]


def to_float(imgs: torch.Tensor, index: torch.Tensor, device: str) -> torch.Tensor:
    """Return the indexed uint8 images as float32 in [-1, 1] on the device."""
    batch = imgs[index.to(imgs.device)].to(device, non_blocking=True)
    return batch.float().div_(127.5).sub_(1)


# --------------------------------------------------------------------------- models


class UpsampleConv2d(nn.Conv2d):
    """Nearest x2 upsampling followed by a 3x3 convolution with padding 1, as one operation.

    N x C x H x W -> N x C' x 2H x 2W. Of the nine taps, those that meet the same input
    pixel are summed first: a transposed convolution with a 4x4 kernel, stride 2, which
    needs 4 instead of 9 products per output pixel and never stores the large input.
    """

    def __init__(self, in_channels, out_channels, kernel_size=3, stride=1, padding=1):
        super().__init__(in_channels, out_channels, kernel_size, stride, padding)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        kernel = self.weight.flip(2, 3).transpose(0, 1)
        kernel = F.avg_pool2d(
            kernel, 2, stride=1, padding=1, divisor_override=1
        )  # sums
        out = F.conv_transpose2d(x, kernel, stride=2, padding=1)
        return out.add_(
            self.bias.to(out.dtype).view(-1, 1, 1)
        )  # faster than in the conv


class Generator(nn.Module):
    """G: noise z, N x latent_dim -> images N x channels x img_size x img_size in [-1, 1]."""

    def __init__(self, img_size: int = 32, channels: int = 1, latent_dim: int = 62):
        super().__init__()
        self.size = img_size // 4
        self.linear = nn.Linear(latent_dim, 128 * self.size**2)
        self.blocks = nn.Sequential(
            UpsampleConv2d(128, 128),
            nn.BatchNorm2d(128, 0.8),  # eps: as in the widely used listing
            nn.LeakyReLU(0.2, inplace=True),
            UpsampleConv2d(128, 64),
            nn.BatchNorm2d(64, 0.8),
            nn.LeakyReLU(0.2, inplace=True),
            nn.Conv2d(64, channels, 3, padding=1),
            nn.Tanh(),
        )
        for layer in self.blocks:
            if isinstance(layer, nn.Conv2d):
                nn.init.normal_(layer.weight, 0, 0.02)
            elif isinstance(layer, nn.BatchNorm2d):
                nn.init.normal_(layer.weight, 1, 0.02)

    def forward(self, z: torch.Tensor) -> torch.Tensor:
        x = self.linear(z).view(-1, 128, self.size, self.size)
        return self.blocks(x.contiguous(memory_format=torch.channels_last))


class Discriminator(nn.Module):
    """D: images N x C x S x S -> (reconstruction N x C x S x S, embedding N x 32)."""

    def __init__(self, img_size: int = 32, channels: int = 1):
        super().__init__()
        shape = (64, img_size // 2, img_size // 2)
        self.down = nn.Sequential(
            nn.Conv2d(channels, 64, 3, 2, 1), nn.ReLU(inplace=True)
        )
        self.embed = nn.Linear(math.prod(shape), 32)
        self.decode = nn.Sequential(
            nn.BatchNorm1d(32, 0.8),
            nn.ReLU(inplace=True),
            nn.Linear(32, math.prod(shape)),
            nn.BatchNorm1d(math.prod(shape)),
            nn.ReLU(inplace=True),
            nn.Unflatten(1, shape),
            UpsampleConv2d(64, channels),
        )
        for conv in (self.down[0], self.decode[-1]):
            nn.init.normal_(conv.weight, 0, 0.02)

    def forward(self, imgs: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        embedding = self.embed(self.down(imgs).flatten(1))
        return self.decode(embedding), embedding


# --------------------------------------------------------------------------- losses


def energy(recon: torch.Tensor, imgs: torch.Tensor) -> torch.Tensor:
    """U(x): mean squared error of each image's reconstruction, N x C x S x S -> N."""
    dtype = torch.promote_types(recon.dtype, torch.float32)  # bfloat16 is too coarse
    return (recon.to(dtype) - imgs.to(dtype)).square().flatten(1).mean(1)


def discriminator_loss(
    real_energy: torch.Tensor, fake_energy: torch.Tensor, margin: float
) -> torch.Tensor:
    """L_D (eq. 1) from the energies of N real and N generated images; hinge per sample."""
    return real_energy.mean() + (margin - fake_energy).clamp(min=0).mean()


def pullaway_loss(embeddings: torch.Tensor) -> torch.Tensor:
    """f_PT (section 2.4): mean squared cosine of the pairs i != j, N x E -> [0, 1].

    A zero embedding is orthogonal to all; a single embedding has no pair and gives 0.
    """
    n = len(embeddings)
    with torch.autocast(embeddings.device.type, enabled=False):
        dtype = torch.promote_types(embeddings.dtype, torch.float32)
        unit = F.normalize(embeddings.to(dtype), dim=1)
        cosines = (unit @ unit.T).masked_fill(torch.eye(n, device=unit.device) > 0, 0)
        return cosines.square().sum() / max(n * (n - 1), 1)


# ----------------------------------------------------------------------- evaluation


def train_classifier(
    imgs: torch.Tensor, labels: torch.Tensor, device: str
) -> nn.Sequential:
    """Fit a small network to uint8 images; it returns logits, its [0] 64 features."""
    layers, widths = [], (imgs.shape[1], 32, 64, 64)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        for before, after in itertools.pairwise(widths):
            conv = nn.Conv2d(before, after, 3, stride=2, padding=1, bias=False)
            layers += [conv, nn.BatchNorm2d(after), nn.ReLU()]
        layers += [
            nn.AdaptiveAvgPool2d(4),
            nn.Flatten(),
            nn.Linear(1024, 64),
            nn.ReLU(),
        ]
        head = nn.Linear(64, int(labels.max()) + 1)
    classifier = nn.Sequential(nn.Sequential(*layers), head).to(device)
    adam = torch.optim.Adam(classifier.parameters(), fused=True)
    rate = torch.optim.lr_scheduler.OneCycleLR(adam, max_lr=5e-3, total_steps=500)
    draw = rng(0)
    for _ in range(500):
        index = torch.randint(len(imgs), (256,), generator=draw)
        logits = classifier(to_float(imgs, index, device))
        adam.zero_grad()
        F.cross_entropy(logits, labels[index].to(device)).backward()
        adam.step()
        rate.step()
    return classifier.eval()


def evaluate(
    log_probs: torch.Tensor, features: torch.Tensor, real_features: torch.Tensor
) -> dict[str, float]:
    """Score images by a classifier's log p(y|x), N x K, and features, N x F (float64).

    score: I' = E_x KL(p(y) || p(y|x)), higher is better. frechet: Frechet distance to the
    features of real images, lower is better. classes: those with 1 % of the images.
    """
    log_probs = log_probs.clamp(min=-20)  # else one sure image outweighs all the others
    marginal = log_probs.exp().mean(0)
    score = (marginal * (marginal.log() - log_probs)).sum(1).mean()
    shift = (features.mean(0) - real_features.mean(0)).square().sum()
    cov, real_cov = features.T.cov(), real_features.T.cov()
    values, vectors = torch.linalg.eigh(cov)
    root = vectors * values.clamp(min=0).sqrt() @ vectors.T
    cross = torch.linalg.eigvalsh(root @ real_cov @ root).clamp(min=0).sqrt().sum()
    frechet = shift + cov.trace() + real_cov.trace() - 2 * cross
    classes = (log_probs.argmax(1).bincount() >= 0.01 * len(log_probs)).sum()
    return {"score": score.item(), "frechet": frechet.item(), "classes": classes.item()}


class Scorer:
    """Scores a generator with a classifier that its first call trains on the real images."""

    def __init__(self, opt: argparse.Namespace, data: tuple[torch.Tensor | None, ...]):
        self.opt, self.data, self.classifier = opt, data, None

    @torch.no_grad()
    def look(self, batches) -> tuple[torch.Tensor, torch.Tensor]:
        """Return log p(y|x) and features, in float64, of batches of images in [-1, 1]."""
        features = torch.cat([self.classifier[0](imgs) for imgs in batches])
        logits = self.classifier[1](features)
        return logits.double().log_softmax(1).cpu(), features.double().cpu()

    def __call__(self, generator: Generator, seed: int) -> dict[str, float]:
        """Return the figures of ``evaluate``, and those of real images as real_*."""
        imgs, labels, held_imgs, held_labels = self.data
        device, places = self.opt.device, torch.arange(self.opt.n_eval)
        if self.classifier is None:
            with torch.enable_grad():
                self.classifier = train_classifier(imgs, labels, device)
            real, held = (
                self.look(to_float(x, i, device) for i in places[: len(x)].split(500))
                for x in (imgs, held_imgs)
            )
            self.features, self.real = held[1], evaluate(*real, held[1])
            right = held[0].argmax(1) == held_labels[: len(places)]
            text = " ".join(f"{key} {value:.4g}" for key, value in self.real.items())
            say(
                f"classifier: {right.double().mean():.2%} of held-out right; real: {text}"
            )
        z = torch.randn(len(places), self.opt.latent_dim, generator=rng(seed, 3))
        fakes = evaluate(
            *self.look(sample(generator, part) for part in z.split(500)), self.features
        )
        return fakes | {f"real_{key}": value for key, value in self.real.items()}


@torch.no_grad()
def sample(generator: Generator, z: torch.Tensor) -> torch.Tensor:
    """Return G(z) under the running batch statistics: z alone decides the picture."""
    imgs = generator.eval()(z.to(next(generator.parameters()).device))
    generator.train()
    return imgs


# ---------------------------------------------------------------------- checkpoints


def claim_out_dir(opt: argparse.Namespace) -> str:
    """Create the run's folder and return it; the default name counts up to a free one."""
    for i in itertools.count(1):
        folder = opt.out_dir or f"runs/{opt.script}" + f"-{i}" * (i > 1)
        try:
            os.makedirs(folder, exist_ok=opt.out_dir is not None)
            opt.out_dir = folder
            return folder
        except FileExistsError:
            if opt.out_dir:
                raise


def find_checkpoint(where: str, script: str) -> str:
    """Return the checkpoint at a path: a file, or a folder's newest; "" is any run's."""
    if os.path.isfile(where):
        return where
    runs = [
        run
        for run in Path("runs").glob("*")
        if run.name.rstrip("-0123456789") == script
    ]
    folders = [Path(where)] if where else runs
    files = [file for folder in folders for file in folder.glob(CHECKPOINT)]
    if not files:
        raise ValueError(f"--resume: no {CHECKPOINT} in {where or 'runs/' + script}")
    return str(max(files, key=os.path.getmtime))


def read_checkpoint(path: str) -> dict:
    """Load a checkpoint, running no code from it; ValueError if it isn't a whole one."""
    try:
        checkpoint = torch.load(path, map_location="cpu", weights_only=True)
        assert {"script", "seed"} <= checkpoint["options"].keys() and checkpoint[
            "step"
        ] > 0
        return checkpoint
    except OSError:
        raise
    except Exception as error:  # torch.load raises many kinds
        text = f"--resume: {path} is damaged, or no checkpoint of these scripts"
        raise ValueError(text) from error


def write_checkpoint(path: Path, checkpoint: dict) -> None:
    """Replace the file in one step, so that a whole checkpoint lies there at any time."""
    buffer, partial = io.BytesIO(), path.with_suffix(".partial")
    torch.save(checkpoint, buffer)
    try:
        with open(partial, "wb") as file:
            file.write(buffer.getbuffer())
            file.flush()
            os.fsync(file.fileno())
        os.replace(partial, path)
    except OSError as error:
        partial.unlink(missing_ok=True)
        raise OSError(
            f"can't write {path}: {error.strerror}; the last one is kept"
        ) from error


# ------------------------------------------------------------------------- training


def prepare(opt: argparse.Namespace) -> tuple[tuple[torch.Tensor | None, ...], Scorer]:
    """Set up the device and the process group, load the data and claim the run's folder."""
    cuda = opt.device.startswith("cuda")
    if cuda:
        opt.device = f"cuda:{os.environ['LOCAL_RANK']}" if opt.world > 1 else opt.device
        torch.cuda.set_device(opt.device)
        torch.backends.cudnn.benchmark = True
        torch.set_float32_matmul_precision("high")  # TF32
    elif sys.platform == "linux":
        # glibc hands large tensors back to the system and gets them anew each step, page
        # fault by page fault: let it keep them (1.2 times the images/s)
        mallopt = getattr(ctypes.CDLL(None), "mallopt", lambda *_: None)
        mallopt(-1, 2**31 - 1)  # M_TRIM_THRESHOLD
        mallopt(-3, 2**30)  # M_MMAP_THRESHOLD
    rank = int(os.environ.get("RANK", 0))
    if opt.world > 1:  # a day: the others wait while rank 0 decodes pictures or scores
        backend = "cpu:gloo,cuda:nccl" if cuda else "gloo"
        dist.init_process_group(backend, timeout=timedelta(days=1))
    if rank == 0:
        data = load_images(opt)
        n = len(data[0])
        if n < opt.batch_size * opt.world:
            raise ValueError(
                f"--batch_size {opt.batch_size}: there are only {n} images"
            )
        if vars(opt).setdefault("n_images", n) != n:
            raise ValueError(f"--data_root: {n} images, but the run has {opt.n_images}")
        claim_out_dir(opt)
    if opt.world > 1:
        shared = [vars(opt) | {"device": None}]
        dist.broadcast_object_list(shared, device=torch.device("cpu"))
        vars(opt).update(shared[0] | {"device": opt.device})
        data = data if rank == 0 else load_images(opt)
    if cuda and data[0].nbytes < torch.cuda.mem_get_info()[0] / 2:
        data = (data[0].to(opt.device), *data[1:])
    return data, Scorer(opt, data)


def log_line(row: dict[str, float]) -> str:
    """Return a row of the log as a line of CSV."""
    cells = (row.get(name, "") for name in LOG_FIELDS)
    return (
        ",".join(f"{x:.6g}" if isinstance(x, float) else str(x) for x in cells) + "\n"
    )


def train(opt: argparse.Namespace, prepared=None) -> dict[str, str]:
    """Train as the flags say and return the last row of the log.

    ``prepared`` is what ``prepare(opt)`` returned, where several runs share it. Raises
    FloatingPointError for a loss that is not finite, SystemExit after a signal.
    """
    (imgs, *_), scorer = prepared or prepare(opt)
    device, world, batch_size = torch.device(opt.device), opt.world, opt.batch_size
    rank = int(os.environ.get("RANK", 0))
    epoch_steps = len(imgs) // (batch_size * world)  # full batches only
    total = int(min(opt.n_epochs * epoch_steps, opt.max_steps))

    torch.manual_seed(opt.seed)
    generator = Generator(opt.img_size, opt.channels, opt.latent_dim).to(device)
    discriminator = Discriminator(opt.img_size, opt.channels).to(device)
    adam = {"lr": opt.lr, "betas": (opt.b1, opt.b2), "fused": True}
    optimizer_g = torch.optim.Adam(generator.parameters(), **adam)
    optimizer_d = torch.optim.Adam(discriminator.parameters(), **adam)
    parts = {"generator": generator, "discriminator": discriminator}
    parts |= {"optimizer_g": optimizer_g, "optimizer_d": optimizer_d}
    checkpoint = read_checkpoint(opt.resume) if opt.resume else {}
    for name, part in parts.items() if opt.resume else ():
        part.load_state_dict(checkpoint[name])
    start = checkpoint.get("step", 0)
    sums = checkpoint.get("sums", torch.zeros(5)).to(
        device
    )  # over the steps since a row
    step_g, step_d = generator, discriminator
    if world > 1:
        step_g = DistributedDataParallel(generator, broadcast_buffers=False)
        step_d = DistributedDataParallel(discriminator, broadcast_buffers=False)
    autocast = torch.autocast(device.type, torch.bfloat16, enabled=opt.amp)
    sample_z = torch.randn(64, opt.latent_dim, generator=rng(opt.seed, 2))

    def due(step: int) -> bool:
        return step % LOG_EVERY == 0 or step % epoch_steps == 0

    folder, rows, caught = Path(opt.out_dir), checkpoint.get("rows", []), []
    if start < total:  # a run that goes on has no last row yet
        rows = [row for row in rows if due(row["step"])]
    if rank == 0:
        (folder / "samples").mkdir(parents=True, exist_ok=True)
        text = "".join(log_line(row) for row in rows)
        (folder / "log.csv").write_text(",".join(LOG_FIELDS) + "\n" + text)
    for signum in (signal.SIGINT, signal.SIGTERM):
        signal.signal(signum, lambda signum, frame: caught.append(signum))
    logged, tick_step, tick = start - int(sums[-1]), start, time.perf_counter()
    for step in range(start + 1, total + 1):
        epoch, i = divmod(step - 1, epoch_steps)
        if i == 0 or step == start + 1:
            order = torch.randperm(len(imgs), generator=rng(opt.seed, 0, epoch))
        first = (i * world + rank) * batch_size  # every rank takes its own images
        real_imgs = to_float(imgs, order[first : first + batch_size], device)
        noise = rng(opt.seed, 1, step, rank)
        z = torch.randn(batch_size, opt.latent_dim, generator=noise).to(device)

        # discriminator: real images to low energy, generated ones to the margin (eq. 1)
        with autocast:
            gen_imgs = step_g(z)
            real_recon, _ = step_d(real_imgs)
            fake_recon, _ = step_d(gen_imgs.detach())
        real_energy = energy(real_recon, real_imgs)
        fake_energy = energy(fake_recon, gen_imgs.detach())
        loss_d = discriminator_loss(real_energy, fake_energy, opt.margin)
        optimizer_d.zero_grad()
        loss_d.backward()
        optimizer_d.step()

        # generator: its images to low energy, through reconstruction and image (eq. 2)
        discriminator.requires_grad_(False)
        with autocast:
            recon, embedding = discriminator(gen_imgs)
        pullaway = pullaway_loss(embedding)
        loss_g = energy(recon, gen_imgs).mean()
        optimizer_g.zero_grad()
        loss_g.backward()
        optimizer_g.step()
        discriminator.requires_grad_(True)

        with torch.no_grad():  # the figures stay on the device until a row is due
            active = (fake_energy < opt.margin).float().mean()
            figures = [real_energy.mean(), fake_energy.mean(), active, pullaway]
            sums += torch.stack([*figures, (loss_d + loss_g).isfinite().float()])
        stop = torch.tensor(caught[0] if caught else 0)
        if world > 1:
            dist.all_reduce(stop, op=dist.ReduceOp.MAX)  # all stop at the same step
        last = step == total
        save = last or bool(stop) or step % opt.sample_interval == 0
        if rank == 0 and (due(step) or save):
            *means, n = sums.tolist()
            weights = [*generator.parameters(), *discriminator.parameters()]
            if n < step - logged or not all(w.isfinite().all() for w in weights):
                text = (
                    f"the loss is not finite at step {min(logged + int(n) + 1, step)}"
                )
                raise FloatingPointError(
                    f"{text}; {folder} keeps the last good checkpoint"
                )
        if rank == 0 and (due(step) or last):
            rate = (
                (step - tick_step) * batch_size * world / (time.perf_counter() - tick)
            )
            row = dict(
                zip(LOG_FIELDS, (step, epoch + 1, *(x / n for x in means), rate))
            )
            left = timedelta(seconds=round((total - step) * batch_size * world / rate))
            energies = "real {real_energy:.4f} fake {fake_energy:.4f}".format_map(row)
            figures = "active {hinge_active:.0%} pull-away {pullaway:.3f}".format_map(
                row
            )
            text = f"epoch {epoch + 1}/{opt.n_epochs} step {step}/{total} {energies}"
            say(f"{text} {figures} {rate:.0f} images/s, {left} left", final=last)
            if last or step % (epoch_steps * opt.eval_interval) == 0:
                row |= scorer(generator, opt.seed)
            rows.append(row)
            with open(folder / "log.csv", "a") as log:
                log.write(log_line(row))
        if rank == 0 and save:
            imgs_now = sample(generator, sample_z)
            for path in (folder / f"samples/{step}.png", folder / "samples.png"):
                save_image(imgs_now, path, normalize=True, value_range=(-1, 1))
            state = {name: part.state_dict() for name, part in parts.items()}
            options = {k: v for k, v in vars(opt).items() if k not in RUN_ONLY}
            state |= {"step": step, "sums": sums, "rows": rows, "options": options}
            write_checkpoint(folder / "checkpoint.pt", state)
        if due(step):
            sums.zero_()
            logged = step
        if due(step) or save:
            tick, tick_step = time.perf_counter(), step
        if stop:
            say(f"stopped at step {step}; go on with --resume {folder}")
            raise SystemExit(128 + int(stop))
    say(f"done: {folder}/samples.png, {folder}/log.csv, {folder}/checkpoint.pt")
    return rows[-1]


def generate(opt: argparse.Namespace) -> None:
    """Write ``opt.generate`` pictures and a grid of the first 64 from a checkpoint."""
    os.makedirs(opt.out_dir, exist_ok=True)
    generator = Generator(opt.img_size, opt.channels, opt.latent_dim).to(opt.device)
    generator.load_state_dict(read_checkpoint(opt.resume)["generator"])
    z = torch.randn(opt.generate, opt.latent_dim, generator=rng(opt.seed, 4))
    save = functools.partial(save_image, normalize=True, value_range=(-1, 1))
    for i, img in enumerate(
        itertools.chain(*(sample(generator, part) for part in z.split(64)))
    ):
        save(img, f"{opt.out_dir}/{i:05d}.png")
    save(sample(generator, z[:64]), f"{opt.out_dir}/grid.png")
    say(f"{opt.generate} pictures and grid.png in {opt.out_dir}")


# ----------------------------------------------------------------------------- main


def main(argv: list[str] | None = None) -> int:
    """Run the script and return its exit status; errors are one line on stderr."""
    opt = parse_args(argv)
    try:
        generate(opt) if opt.generate else train(opt)
        return 0
    except (OSError, ValueError, FloatingPointError) as error:
        print(f"ebgan.py: error: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        return 130
    finally:
        if dist.is_initialized():
            dist.destroy_process_group()


if __name__ == "__main__":
    sys.exit(main())
