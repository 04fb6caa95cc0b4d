# SPDX-License-Identifier: MIT
"""Energy-Based GAN (Zhao, Mathieu, LeCun, ICLR 2017, arXiv 1609.03126) in one file.

The discriminator is an auto-encoder; the energy of an image is its reconstruction error:

    U(x) = mean over C*H*W of (Dec(Enc(x)) - x)^2                images lie in [-1, 1]
    L_D  = E_x[ U(x) ] + E_z[ max(0, margin - U(G(z))) ]         eq. 1, hinge per sample
    L_G  = E_z[ U(G(z)) ]                                        eq. 2
    f_PT = mean over i != j of cos(S_i, S_j)^2,  S = Enc(G(z))   section 2.4

This is the plain variant: the generator minimises L_G; f_PT is logged, not trained on.
The variant that trains on it: `diff ebgan.py ebgan_pt.py`.

    python ebgan.py --n_epochs 200 --batch_size 64     train on MNIST or built-in digits
    python ebgan.py --resume                           go on with the newest run
    python ebgan.py --generate 64                      write pictures from the newest run
    torchrun --nproc_per_node=2 ebgan.py               train on several devices
"""

import argparse
import contextlib
import ctypes
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
import warnings
from datetime import timedelta
from multiprocessing.pool import ThreadPool
from pathlib import Path

import numpy as np
import torch
import torch.distributed as dist
import torch.nn.functional as F
from PIL import Image, ImageDraw, ImageFont, ImageOps
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel
from torch.optim.swa_utils import AveragedModel
from torchvision import datasets
from torchvision.transforms.v2 import functional as transforms
from torchvision.utils import save_image

CHECKPOINT = "checkpoint.pt"  # where it lies in a run's folder
LOG_EVERY = 20  # steps from one row of the log to the next
LOG_HEADER = "step,epoch,real_energy,fake_energy,hinge_active,pullaway,images_per_s"
LOG_HEADER += ",score,frechet,classes,real_score,real_frechet,real_classes\n"


# ------------------------------------------------------------------------------ flags
def parse_args(argv: list[str] | None = None) -> argparse.Namespace:
    """Read and check the flags; a resumed run brings its own as defaults.

    Bad input ends the program with one line on stderr and exit status 2.
    """

    def at_least(least: float, kind: type = int, below: float = 2**31):
        def number(text: str):
            if least <= kind(text) < below:
                return kind(text)
            raise argparse.ArgumentTypeError(f"{text} is not in [{least}, {below})")

        return number

    brief = {"usage": argparse.SUPPRESS, "allow_abbrev": False}  # an error is one line
    parser = argparse.ArgumentParser("ebgan.py", **brief)
    parser.description = "Train an energy-based GAN. The defaults are in brackets."
    flag, count, decay = parser.add_argument, at_least(1), at_least(0, float, 1)
    names = ["digits", "mnist", "fashion-mnist", "kmnist", "cifar10", "svhn", "folder"]
    flag("--n_epochs", type=count, default=200, help="passes over the data [200]")
    flag("--batch_size", type=at_least(2), default=64, help="images a step [64]")
    flag("--lr", type=at_least(1e-12, float), default=1e-3, help="Adam's rate [0.001]")
    flag("--b1", type=decay, default=0.5, help="Adam's decay of the mean [0.5]")
    flag("--b2", type=decay, default=0.999, help="Adam's decay of the square [0.999]")
    flag("--n_cpu", type=count, default=8, help="threads that decode a folder [8]")
    flag("--latent_dim", type=count, default=62, help="numbers in the noise z [62]")
    flag("--img_size", type=at_least(8), default=32, help="a multiple of 4 [32]")
    flag("--channels", type=int, choices=(1, 3), help="grey or colour [as the data]")
    flag("--sample_interval", type=count, default=400, help="steps a checkpoint [400]")
    flag("--margin", type=at_least(0, float), help="energy [max(1, batch_size / 64)]")
    flag("--dataset", choices=names, help="[mnist if it can be had, else digits]")
    flag("--data_root", default="data", help="folder of data sets or pictures [data]")
    flag("--out_dir", help="the run's folder [runs/<script>, then <script>-2, -3 ...]")
    flag("--seed", type=at_least(0), default=0, help="of all random draws [0]")
    flag("--device", help="cpu, cuda, cuda:1, mps [cuda, else mps, else cpu]")
    flag("--amp", action="store_true", help="bfloat16, but energies float32 [off]")
    flag("--max_steps", type=count, help="stop after that many steps [no limit]")
    flag("--resume", nargs="?", const="", help="checkpoint or run's folder [newest]")
    flag("--generate", type=count, help="write that many pictures of a run, and end")
    flag("--n_eval", type=at_least(2), default=5000, help="images to score [5000]")
    flag("--eval_interval", type=count, default=1, help="epochs between scores [1]")
    processes = int(os.environ.get("WORLD_SIZE", "1"))
    parser.set_defaults(script="ebgan", nproc_per_node=processes)
    opt = given = parser.parse_args(argv)
    try:
        if opt.resume is not None or opt.generate:
            place = opt.resume or ("" if opt.generate else opt.out_dir)
            path = find_checkpoint(place or "", opt.script)
            saved = read_checkpoint(path)["options"]
            parser.set_defaults(**saved)
            opt = parser.parse_args(argv)
            vars(opt).update(script=given.script, nproc_per_node=given.nproc_per_node)
            opt.resume, home = path, Path(path).parent
            # a run can be made longer or shown otherwise; the rest makes it what it is
            fixed = saved.keys() - {"n_epochs", "max_steps", "n_cpu", "data_root"}
            fixed -= {"sample_interval", "n_eval", "eval_interval"}
            if opt.generate:
                fixed = {"script", "img_size", "channels", "latent_dim"}
                home /= "generated"
            elif not Path(path).match(CHECKPOINT):
                raise ValueError(f"--resume: {path} is not <run>/{CHECKPOINT}")
            else:
                home = Path(path).parents[CHECKPOINT.count("/")]
                if os.path.abspath(opt.out_dir or home) != str(home):
                    raise ValueError(f"--out_dir: a resumed run stays in {home}")
            for key in sorted(fixed):
                if (value := getattr(opt, key)) != saved[key]:
                    raise ValueError(f"--{key} {value}: {path} has {saved[key]}")
            opt.out_dir = opt.out_dir or str(home)
        elif opt.out_dir and any(Path(opt.out_dir).glob(CHECKPOINT)):
            text = "holds a run: name another folder, or go on with --resume"
            raise ValueError(f"--out_dir {opt.out_dir} {text} {opt.out_dir}")
        if opt.img_size % 4:
            raise ValueError(f"--img_size {opt.img_size} is not divisible by 4")
        folder = Path(opt.out_dir or "runs").absolute()
        folder = next(p for p in (folder, *folder.parents) if p.exists())
        if not folder.is_dir() or not os.access(folder, os.W_OK):
            raise ValueError(f"--out_dir: can't write to {folder}")
        best = "mps" if torch.backends.mps.is_available() else "cpu"
        opt.device = opt.device or ("cuda" if torch.cuda.is_available() else best)
        torch.zeros(1, device=opt.device).item()  # fails where nothing can be computed
        if opt.amp and not torch.amp.is_autocast_available(opt.device.split(":")[0]):
            raise ValueError(f"--amp: no bfloat16 on {opt.device}")
    except (RuntimeError, AssertionError, ImportError) as error:
        parser.error(f"--device {opt.device}: {str(error).splitlines()[0]}")
    except (OSError, ValueError) as error:
        parser.error(str(error))
    opt.margin = max(1.0, opt.batch_size / 64) if opt.margin is None else opt.margin
    opt.data_root = os.path.abspath(opt.data_root)  # a resumed run may start elsewhere
    return opt


def say(text: str, final: bool = True) -> None:
    """Print a line on rank 0; on a terminal the next one overwrites it, unless final."""
    if os.environ.get("RANK", "0") == "0":
        start, end = ("\r\033[K", "") if sys.stdout.isatty() else ("", "\n")
        if not final and not end:
            text = text[: shutil.get_terminal_size().columns - 1]
        print(start + text, end="\n" if final else end, flush=True)


# ------------------------------------------------------------------------------- data
def rng(*key: int) -> torch.Generator:
    """Return a generator seeded by its key: each random draw is a function of numbers."""
    seed = np.random.SeedSequence(key).generate_state(1, np.uint64)[0]
    return torch.Generator().manual_seed(int(seed) >> 1)


def synthetic_digits(n: int, img_size: int, seed: int) -> tuple[Tensor, Tensor]:
    """Draw n digits: images n x 1 x S x S uint8, white on black, and labels n int64.

    Pillow's font in three stroke widths, rotated, scaled, sheared and shifted at random.
    """
    size, glyphs = max(64, img_size), []
    font = ImageFont.load_default(size=0.75 * size)
    for digit, stroke in itertools.product("0123456789", (0, 1, 2)):
        glyph, width = Image.new("L", (size, size)), stroke * size // 64
        text = ImageDraw.Draw(glyph).text
        text((size / 2, size / 2), digit, 255, font, "mm", stroke_width=width)
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
        warped = F.grid_sample(glyphs[kinds[part]], grid, align_corners=False)
        imgs[part] = warped.round().to(torch.uint8)
    return imgs, labels


def load_images(opt: argparse.Namespace) -> tuple[Tensor | None, ...]:
    """Return train images, train labels, held-out images, held-out labels.

    Images are uint8 N x C x S x S, labels int64 N; data without classes has None for all
    but the first. Fills in ``opt.dataset`` and ``opt.channels`` where they are None.
    Raises ValueError or OSError for data that is missing or damaged.
    """
    if opt.dataset == "folder":
        return load_folder(opt)
    name, root, parts = opt.dataset or "mnist", opt.data_root, []
    new, size = not os.path.exists(root), [opt.img_size, opt.img_size]
    socket.setdefaulttimeout(10)  # seconds until a download gives up
    try:
        for split, n in ("train", 20000), ("test", 5000):
            if name == "digits":
                imgs, labels = synthetic_digits(n, opt.img_size, seed=n)
            else:
                which = {"split": split} if name == "svhn" else {"train": n == 20000}
                kind = {"fashion-mnist": "FashionMNIST"}.get(name, name.upper())
                data = getattr(datasets, kind)(root, download=True, **which)
                imgs, labels = zip(*((transforms.pil_to_tensor(x), y) for x, y in data))
                imgs, labels = torch.stack(imgs), torch.tensor(labels)
            imgs = torch.cat([transforms.resize(x, size) for x in imgs.split(5000)])
            opt.channels = opt.channels or imgs.shape[1]
            if opt.channels < imgs.shape[1]:
                imgs = transforms.rgb_to_grayscale(imgs)
            parts += [imgs.expand(-1, opt.channels, -1, -1), labels]
    except Exception as error:  # torchvision raises whatever it meets
        if new:
            shutil.rmtree(root, ignore_errors=True)  # what a failed download leaves
        reason = f"{type(error).__name__}: {' '.join(str(error).split())}"
        if opt.dataset:
            raise ValueError(f"--dataset {name} in {root}: {reason}") from error
        say(f"MNIST can't be read from {root}, nor downloaded ({reason}).")
        say("Training on the built-in digits instead (--dataset digits).")
        opt.dataset = "digits"
        return load_images(opt)
    finally:
        socket.setdefaulttimeout(None)
    opt.dataset = name
    return tuple(parts)


def load_folder(opt: argparse.Namespace) -> tuple[Tensor | None, ...]:
    """Decode the pictures below ``opt.data_root`` once, into a memory map; see load_images.

    Two or more sub-folders become classes, and a tenth of the pictures is held out.
    """
    root, size, endings = opt.data_root, opt.img_size, datasets.folder.IMG_EXTENSIONS
    paths = glob.glob(os.path.join(glob.escape(root), "**", "*"), recursive=True)
    paths = sorted(path for path in paths if path.lower().endswith(endings))
    paths = [
        *{os.path.realpath(path): path for path in paths}.values()
    ]  # each file once
    if not paths:
        raise ValueError(f"--data_root {root} holds no pictures ({' '.join(endings)})")
    paths = [paths[i] for i in torch.randperm(len(paths), generator=rng(0))]

    def decode(path: str) -> bytes:
        try:
            with Image.open(path) as img:
                grey = img.mode[0] in "1LI"
                opt.channels = opt.channels or (1 if grey else 3)
                img = ImageOps.exif_transpose(img)
            if img.mode[0] == "I":  # 16 bits a pixel, which convert() would clip
                img = Image.fromarray((np.asarray(img) // 257).astype(np.uint8))
            if img.has_transparency_data:
                img = img.convert("RGBA")
                img = Image.alpha_composite(Image.new("RGBA", img.size, "white"), img)
            img = img.convert("L" if opt.channels == 1 else "RGB")
            return ImageOps.fit(img, (size, size)).tobytes()  # cropped to a square
        except Exception as error:  # Pillow raises many kinds
            raise ValueError(f"{path} cannot be decoded: {error}") from error

    decode(paths[0])  # settles the channels
    stats = [(path, os.path.getsize(path), os.path.getmtime(path)) for path in paths]
    digest = hashlib.sha256(repr(stats).encode()).hexdigest()[:16]
    name = f".ebgan_cache/{size}x{size}x{opt.channels}-{digest}.uint8"
    shape = (len(paths), size, size, opt.channels)
    file = Path(root, name)
    if not file.exists() and not os.access(root, os.W_OK):
        file = Path("runs", name)
    if not file.exists() or file.stat().st_size != math.prod(shape):
        file.parent.parent.mkdir(exist_ok=True)
        partial = Path(f"{file.parent}.{os.getpid()}")
        try:
            with open(partial, "wb") as f, ThreadPool(opt.n_cpu) as pool:
                for i, pixels in enumerate(pool.imap(decode, paths, chunksize=16), 1):
                    f.write(pixels)
                    if i % 500 == 0:
                        say(f"decoded {i} of {len(paths)} pictures", final=False)
            file.parent.mkdir(exist_ok=True)
            os.replace(partial, file)
        except OSError as error:
            raise OSError(f"{file}: {error.strerror}") from error
        finally:
            partial.unlink(missing_ok=True)
    imgs = torch.from_file(str(file), size=math.prod(shape), dtype=torch.uint8)
    imgs = imgs.view(shape).permute(0, 3, 1, 2)
    tops = [Path(path).relative_to(root).parts[:-1][:1] for path in paths]
    classes, held = sorted(set(tops)), len(paths) // 10
    if () in classes or len(classes) < 2 or held < 2:
        say(
            "fewer than 2 classes (sub-folders) or 20 pictures: the samples get no score"
        )
        return imgs, None, None, None
    labels = torch.tensor([classes.index(top) for top in tops])
    return imgs[held:], labels[held:], imgs[:held], labels[:held]


def to_float(imgs: Tensor, index: Tensor, device: str) -> Tensor:
    """Return the indexed uint8 images as float32 in [-1, 1] on the device."""
    batch = imgs[index.to(imgs.device)].to(device, non_blocking=True)
    return batch.float().div_(127.5).sub_(1)


# ----------------------------------------------------------------------------- models
class UpsampleConv2d(nn.Conv2d):
    """Nearest x2 upsampling, then a 3x3 convolution: N x C x H x W -> N x C' x 2H x 2W.

    The taps that meet the same input pixel are summed first, which makes it a transposed
    convolution, 4x4 with stride 2: 4 instead of 9 products, and no large input in memory.
    """

    def __init__(self, in_channels, out_channels, kernel_size=3, stride=1, padding=1):
        super().__init__(in_channels, out_channels, kernel_size, stride, padding)

    def forward(self, x: Tensor) -> Tensor:
        sums = F.avg_pool2d(self.weight, 2, stride=1, padding=1, divisor_override=1)
        kernel = sums.flip(2, 3).transpose(0, 1)
        out = F.conv_transpose2d(x, kernel, stride=2, padding=1)
        return out.add_(self.bias.to(out.dtype).view(-1, 1, 1))  # faster than inside


class Generator(nn.Module):
    """G: noise N x latent_dim -> images N x channels x img_size x img_size in [-1, 1]."""

    def __init__(self, img_size: int = 32, channels: int = 1, latent_dim: int = 62):
        super().__init__()
        self.shape = (128, img_size // 4, img_size // 4)
        self.linear = nn.Linear(latent_dim, math.prod(self.shape))
        self.blocks = nn.Sequential(
            UpsampleConv2d(128, 128),
            nn.BatchNorm2d(128, 0.8),  # 0.8 is eps, as in the widely used listing
            nn.LeakyReLU(0.2, inplace=True),
            UpsampleConv2d(128, 64),
            nn.BatchNorm2d(64, 0.8),
            nn.LeakyReLU(0.2, inplace=True),
            nn.Conv2d(64, channels, 3, padding=1),
            nn.Tanh(),
        )
        for i, mean in {0: 0, 1: 1, 3: 0, 4: 1, 6: 0}.items():
            nn.init.normal_(self.blocks[i].weight, mean, 0.02)

    def forward(self, z: Tensor) -> Tensor:
        x = self.linear(z).unflatten(1, self.shape)
        return self.blocks(x.contiguous(memory_format=torch.channels_last))


class Discriminator(nn.Module):
    """D: images N x C x S x S -> (reconstruction N x C x S x S, embedding N x 32)."""

    def __init__(self, img_size: int = 32, channels: int = 1):
        super().__init__()
        shape = (64, img_size // 2, img_size // 2)
        down, code = nn.Conv2d(channels, 64, 3, 2, 1), nn.Linear(math.prod(shape), 32)
        self.encoder = nn.Sequential(down, nn.ReLU(inplace=True), nn.Flatten(), code)
        self.decoder = nn.Sequential(
            nn.BatchNorm1d(32, 0.8),
            nn.ReLU(inplace=True),
            nn.Linear(32, math.prod(shape)),
            nn.BatchNorm1d(math.prod(shape)),
            nn.ReLU(inplace=True),
            nn.Unflatten(1, shape),
            UpsampleConv2d(64, channels),
        )
        nn.init.normal_(down.weight, 0, 0.02)
        nn.init.normal_(self.decoder[-1].weight, 0, 0.02)

    def forward(self, imgs: Tensor) -> tuple[Tensor, Tensor]:
        embedding = self.encoder(imgs)
        return self.decoder(embedding), embedding


# ----------------------------------------------------------------------------- losses
def energy(recon: Tensor, imgs: Tensor) -> Tensor:
    """U(x): each image's mean squared error of reconstruction, N x C x S x S -> N."""
    dtype = torch.promote_types(recon.dtype, torch.float32)  # bfloat16 is too coarse
    return (recon.to(dtype) - imgs.to(dtype)).square().flatten(1).mean(1)


def discriminator_loss(
    real_energy: Tensor, fake_energy: Tensor, margin: float
) -> Tensor:
    """L_D (eq. 1) from the energies, N each, of real and generated images, and m >= 0."""
    return real_energy.mean() + (margin - fake_energy).clamp(min=0).mean()


def pullaway_loss(embeddings: Tensor) -> Tensor:
    """f_PT (section 2.4): mean squared cosine of the pairs i != j, N x E -> [0, 1].

    A zero embedding is orthogonal to all; a single embedding has no pair and gives 0.
    """
    n = len(embeddings)
    with torch.autocast(embeddings.device.type, enabled=False):  # never in bfloat16
        dtype = torch.promote_types(embeddings.dtype, torch.float32)
        unit = F.normalize(embeddings.to(dtype), dim=1)
        cosines = (unit @ unit.T).masked_fill(torch.eye(n, device=unit.device) > 0, 0)
        return cosines.square().sum() / max(n * (n - 1), 1)


# ------------------------------------------------------------------------- evaluation
def train_classifier(imgs: Tensor, labels: Tensor, device: str) -> nn.Sequential:
    """Fit a small network to uint8 images; it returns logits, its first part features."""
    layers, widths = [], (imgs.shape[1], 16, 32, 64)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        for before, after in itertools.pairwise(widths):
            conv = nn.Conv2d(before, after, 3, stride=2, padding=1, bias=False)
            layers += [conv, nn.BatchNorm2d(after), nn.ReLU()]
        layers += [nn.AdaptiveAvgPool2d(4), nn.Flatten()]
        layers += [nn.Linear(16 * widths[-1], 64), nn.ReLU()]
        logits = nn.Linear(64, int(labels.max()) + 1)
    classifier = nn.Sequential(nn.Sequential(*layers), logits).to(device)
    adam = torch.optim.Adam(classifier.parameters(), fused=True)
    rate = torch.optim.lr_scheduler.OneCycleLR(adam, max_lr=0.01, total_steps=500)
    for step in range(500):
        batch = torch.randint(len(imgs), (128,), generator=rng(step))
        logits = classifier(to_float(imgs, batch, device))
        adam.zero_grad()
        F.cross_entropy(logits, labels[batch].to(device)).backward()
        adam.step()
        rate.step()
    return classifier.eval()


def evaluate(log_probs: Tensor, features: Tensor, real_features: Tensor) -> list[float]:
    """Score N images by a classifier's log p(y|x), N x K, and features, N x F (float64).

    Returns I' = E_x KL(p(y) || p(y|x)), higher is better; the Frechet distance to the
    features of real images, lower is better; the classes that get 1 % of the images.
    """
    log_probs = log_probs.clamp(min=-20)  # or one sure image would outweigh the others
    marginal = log_probs.exp().mean(0)
    score = (marginal * (marginal.log() - log_probs)).sum(1).mean()
    shift = (features.mean(0) - real_features.mean(0)).square().sum()
    cov, real_cov = features.T.cov(), real_features.T.cov()
    values, vectors = torch.linalg.eigh(cov)
    root = vectors * values.clamp(min=0).sqrt() @ vectors.T
    cross = torch.linalg.eigvalsh(root @ real_cov @ root).clamp(min=0).sqrt().sum()
    frechet = shift + cov.trace() + real_cov.trace() - 2 * cross
    classes = (log_probs.argmax(1).bincount() >= 0.01 * len(log_probs)).sum()
    return [score.item(), frechet.item(), classes.item()]


class Scorer:
    """Scores generators with a classifier that the first call trains on the real images."""

    def __init__(self, opt: argparse.Namespace, data: tuple[Tensor | None, ...]):
        self.opt, self.data, self.classifier = opt, data, None

    @torch.no_grad()
    def judge(self, batches) -> tuple[Tensor, Tensor]:
        """Return log p(y|x) and features (float64) of batches of images in [-1, 1]."""
        features = torch.cat([self.classifier[0](imgs) for imgs in batches])
        logits = self.classifier[1](features)
        return logits.cpu().double().log_softmax(1), features.cpu().double()

    def __call__(self, generator: nn.Module, seed: int) -> list[float]:
        """Return ``evaluate`` of generated images and of real ones; [] without classes."""
        imgs, labels, held_imgs, held_labels = self.data
        n, device = self.opt.n_eval, self.opt.device
        if labels is None:
            return []
        if self.classifier is None:
            self.classifier = train_classifier(imgs, labels, device)
            parts = torch.arange(min(n, len(imgs))).split(500)
            real = self.judge(to_float(imgs, part, device) for part in parts)
            parts = torch.arange(len(held_imgs)).split(500)
            held = self.judge(to_float(held_imgs, part, device) for part in parts)
            self.features, self.real = held[1], evaluate(*real, held[1])
            right = (held[0].argmax(1) == held_labels).double().mean()
            say(f"classifier: {right:.2%} of the held-out images right")
        z = torch.randn(n, self.opt.latent_dim, generator=rng(seed, 3))
        fake = self.judge(sample(generator, part) for part in z.split(500))
        return evaluate(*fake, self.features) + self.real


@torch.no_grad()
def sample(generator: nn.Module, z: Tensor) -> Tensor:
    """Return G(z) by the running batch statistics: a picture depends on its z alone."""
    imgs = generator.eval()(z.to(next(generator.parameters()).device))
    generator.train()
    return imgs


# ------------------------------------------------------------------------ checkpoints
def find_checkpoint(where: str, script: str) -> str:
    """Return the checkpoint at a path: a file, or the newest of a folder, of "" any run."""
    runs = [p for p in Path("runs").glob("*") if p.name.rstrip("-0123456789") == script]
    folders = [Path(where)] if where else runs
    names = {CHECKPOINT, "checkpoint.pt"}
    files = [file for folder in folders for name in names for file in folder.glob(name)]
    files = [where] if os.path.isfile(where) else files
    if not files:
        text = f"no {CHECKPOINT} in {where or f'runs/{script}'}"
        raise ValueError(f"--resume or --generate: {text}")
    return os.path.abspath(max(files, key=os.path.getmtime))


def read_checkpoint(path: str) -> dict:
    """Load a checkpoint, running no code from it; ValueError unless it is a whole one."""
    try:
        with warnings.catch_warnings(action="ignore"):
            checkpoint = torch.load(path, map_location="cpu", weights_only=True)
        assert checkpoint.keys() >= {"options", "step", "sums", "rows", "averaged"}
        assert checkpoint["options"].keys() >= {"script", "img_size", "nproc_per_node"}
        return checkpoint
    except OSError:
        raise
    except Exception as error:  # torch.load raises many kinds
        text = f"--resume: {path} is damaged, or no checkpoint of these scripts"
        raise ValueError(text) from error


def write_checkpoint(path: Path, checkpoint: dict) -> None:
    """Replace the file in one step: a whole checkpoint lies there at any moment."""
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
        raise OSError(f"{path}: {error.strerror}; what was there is kept") from error


# --------------------------------------------------------------------------- training
def running_mean(mean: Tensor, new: Tensor, n: Tensor) -> Tensor:
    """Return the mean of n values and a new one: about the last tenth, at most 1000."""
    decay = ((1 + n) / (10 + n)).clamp(max=0.999)
    return decay * mean + (1 - decay) * new


def prepare(opt: argparse.Namespace) -> tuple[tuple[Tensor | None, ...], Scorer, list]:
    """Set up device and process group, load the data, claim the run's folder.

    Returns the data, its scorer, and a list that takes SIGINT and SIGTERM from now on.
    """
    cuda, rank = opt.device.startswith("cuda"), int(os.environ.get("RANK", "0"))
    if cuda:
        if opt.nproc_per_node > 1:
            opt.device = f"cuda:{os.environ['LOCAL_RANK']}"
        torch.cuda.set_device(opt.device)
        torch.backends.cudnn.benchmark = True
        torch.set_float32_matmul_precision("high")  # TF32
    elif sys.platform == "linux":  # 1.2 times the images/s: else glibc gives each large
        # tensor back to the system and gets it anew, page by page, in the next step
        mallopt = getattr(ctypes.CDLL(None), "mallopt", lambda *_: None)
        mallopt(-1, 2**31 - 1)  # M_TRIM_THRESHOLD
        mallopt(-3, 2**30)  # M_MMAP_THRESHOLD
    slow = opt.amp and opt.device == "cpu" and torch.backends.mkldnn.is_available()
    if slow and not torch.ops.mkldnn._is_mkldnn_bf16_supported():
        say("--amp: this CPU computes no bfloat16; it is far slower than without")
    if opt.nproc_per_node > 1:
        # a day: the others wait while rank 0 decodes pictures or takes a score
        backend = "cpu:gloo,cuda:nccl" if cuda else "gloo"
        dist.init_process_group(backend, timeout=timedelta(days=1))
    if rank == 0:  # first: it may download or decode what the others then read
        data = load_images(opt)
        n = len(data[0])
        if n < opt.batch_size * opt.nproc_per_node:
            raise ValueError(f"--batch_size {opt.batch_size}: only {n} images")
        if vars(opt).setdefault("n_images", n) != n:
            raise ValueError(f"--data_root: {n} images, the run has {opt.n_images}")
        for i in itertools.count(1) if opt.out_dir is None else ():
            folder = f"runs/{opt.script}-{i}" if i > 1 else f"runs/{opt.script}"
            with contextlib.suppress(FileExistsError):
                os.makedirs(folder)
                opt.out_dir = folder
                break
    if opt.nproc_per_node > 1:
        shared = [opt.out_dir]
        dist.broadcast_object_list(shared, device=torch.device("cpu"))
        opt.out_dir = shared[0]
    if rank > 0:
        data = load_images(opt)
    if cuda and data[0].nbytes < torch.cuda.mem_get_info()[0] / 2:
        data = (data[0].to(opt.device), *data[1:])
    caught = []

    def catch(signum, _frame):
        caught.append(signum)
        signal.signal(signum, signal.SIG_DFL)  # a second one ends the program at once

    signal.signal(signal.SIGINT, catch)
    signal.signal(signal.SIGTERM, catch)
    return data, Scorer(opt, data), caught


def train(opt: argparse.Namespace, prepared=None) -> str:
    """Train as the flags say and return the last row of the log.

    ``prepared`` is what ``prepare(opt)`` returned, where several runs share it. Raises
    FloatingPointError for a loss that is not finite, SystemExit after a signal.
    """
    (imgs, *_), scorer, caught = prepared or prepare(opt)
    device, world = opt.device, opt.nproc_per_node
    rank = int(os.environ.get("RANK", "0"))
    epoch_steps = len(imgs) // (opt.batch_size * world)  # full batches only
    total = min(opt.n_epochs * epoch_steps, opt.max_steps or sys.maxsize)
    torch.manual_seed(opt.seed)
    generator = Generator(opt.img_size, opt.channels, opt.latent_dim).to(device)
    discriminator = Discriminator(opt.img_size, opt.channels).to(device)
    adam = {"lr": opt.lr, "betas": (opt.b1, opt.b2), "fused": True}
    optimizer_g = torch.optim.Adam(generator.parameters(), **adam)
    optimizer_d = torch.optim.Adam(discriminator.parameters(), **adam)
    # the mean of the generator's late steps: what is sampled, scored and shown
    averaged = AveragedModel(generator, avg_fn=running_mean, use_buffers=True)
    parts = {"generator": generator, "discriminator": discriminator}
    parts |= {"optimizer_g": optimizer_g, "optimizer_d": optimizer_d}
    parts |= {"averaged": averaged}
    step, sums, rows = 0, torch.zeros(5), []  # sums: of the figures since the last row
    if opt.resume:
        checkpoint = read_checkpoint(opt.resume)
        step, sums, rows = (checkpoint[key] for key in ("step", "sums", "rows"))
        try:
            for name, part in parts.items():
                part.load_state_dict(checkpoint[name])
        except (KeyError, RuntimeError, ValueError) as error:
            raise ValueError(f"--resume: {opt.resume} has other networks") from error
    logged, sums = step - int(sums[-1]), sums.to(device)
    net_g, net_d = generator, discriminator
    if world > 1:
        with warnings.catch_warnings(action="ignore"):  # newer torch renames the flag
            net_g = DistributedDataParallel(generator, broadcast_buffers=False)
            net_d = DistributedDataParallel(discriminator, broadcast_buffers=False)
    autocast = torch.autocast(device.split(":")[0], torch.bfloat16, enabled=opt.amp)
    sample_z = torch.randn(64, opt.latent_dim, generator=rng(opt.seed, 2))

    def due(step: int) -> bool:
        return step % LOG_EVERY == 0 or step % epoch_steps == 0

    def write_run() -> None:
        pictures, style = sample(averaged, sample_z), {"value_range": (-1, 1)}
        for name in ("samples.png", f"samples/{step}.png"):
            save_image(pictures, folder / name, normalize=True, **style)
        here = ("device", "out_dir", "resume", "generate")  # a resumed run has its own
        options = {key: x for key, x in vars(opt).items() if key not in here}
        state = {name: part.state_dict() for name, part in parts.items()}
        state |= {"step": step, "sums": sums, "rows": rows, "options": options}
        write_checkpoint(folder / "checkpoint.pt", state)

    folder = Path(opt.out_dir)
    if step < total:  # the row that ended a run is none of a longer run
        rows = [row for row in rows if due(int(row.split(",")[0]))]
    if rank == 0:
        (folder / "samples").mkdir(parents=True, exist_ok=True)
        (folder / "log.csv").write_text("".join([LOG_HEADER, *rows]))
        if not opt.resume:
            write_run()  # from now on the folder is taken, and the run can be resumed
    tick, tick_step, order = time.perf_counter(), step, None
    while step < total:
        epoch, i = divmod(step, epoch_steps)
        if order is None or i == 0:
            order = torch.randperm(len(imgs), generator=rng(opt.seed, 0, epoch))
        step += 1
        batch = order[(i * world + rank) * opt.batch_size :][: opt.batch_size]
        real_imgs = to_float(imgs, batch, device)
        noise = rng(opt.seed, 1, step, rank)
        z = torch.randn(opt.batch_size, opt.latent_dim, generator=noise).to(device)

        # discriminator: real images to low energy, generated ones to the margin (eq. 1)
        with autocast:
            gen_imgs = net_g(z)
            real_recon, _ = net_d(real_imgs)
            fake_recon, _ = net_d(gen_imgs.detach())
        real_energy = energy(real_recon, real_imgs)
        fake_energy = energy(fake_recon, gen_imgs.detach())
        loss_d = discriminator_loss(real_energy, fake_energy, opt.margin)
        optimizer_d.zero_grad()
        loss_d.backward()
        optimizer_d.step()

        # generator: its images to low energy, by reconstruction and by image (eq. 2)
        discriminator.requires_grad_(False)
        with autocast:
            recon, embedding = discriminator(gen_imgs)
        pullaway = pullaway_loss(embedding)
        loss_g = energy(recon, gen_imgs).mean()
        optimizer_g.zero_grad()
        loss_g.backward()
        optimizer_g.step()
        averaged.update_parameters(generator)
        discriminator.requires_grad_(True)

        with torch.no_grad():  # the figures stay on the device until a row is due
            active = (fake_energy < opt.margin).float().mean()
            finite = (loss_d + loss_g).isfinite().float()
            figures = [real_energy.mean(), fake_energy.mean(), active, pullaway, finite]
            sums += torch.stack(figures)
        stop = torch.tensor(caught[0] if caught else 0)
        if world > 1:
            dist.all_reduce(stop, op=dist.ReduceOp.MAX)  # all stop at the same step
        save = step == total or step % opt.sample_interval == 0 or stop > 0
        if rank == 0 and (due(step) or save):
            *means, n = sums.tolist()
            weights = [*generator.parameters(), *discriminator.parameters()]
            if n < step - logged or not all(w.isfinite().all() for w in weights):
                text = f"loss not finite at step {min(logged + int(n) + 1, step)}"
                raise FloatingPointError(f"{text}; {folder} keeps the last checkpoint")
            if due(step) or step == total:
                means, size, score = [x / n for x in means], opt.batch_size * world, []
                rate = (step - tick_step) * size / (time.perf_counter() - tick)
                left = timedelta(seconds=round((total - step) * size / rate))
                text = f"epoch {epoch + 1}/{opt.n_epochs} step {step}/{total}"
                text += f" {rate:.0f} images/s {left} left"  # a narrow terminal cuts the rest
                text += " real {:.3f} fake {:.3f} active {:.0%} pt {:.3f}".format(
                    *means
                )
                say(text, final=False)
                if step == total or step % (epoch_steps * opt.eval_interval) == 0:
                    score = scorer(averaged, opt.seed)
                    text = "score {:.3f} frechet {:.2f} classes {}"
                    text = f"step {step}: {text} (real images: {text})"
                    if score:
                        say(text.format(*score))
                cells = [f"{x:.9g}" for x in (step, epoch + 1, *means, rate, *score)]
                rows.append(",".join(cells) + "," * (0 if score else 6) + "\n")
                with open(folder / "log.csv", "a") as log:
                    log.write(rows[-1])
            if due(step):
                sums, logged = torch.zeros_like(sums), step
            if save:
                write_run()
            tick, tick_step = time.perf_counter(), step
        if stop:
            say(f"stopped at step {step}, go on: --resume {folder / 'checkpoint.pt'}")
            raise SystemExit(128 + int(stop))
    say(f"step {step} of {total}: see samples.png and log.csv in {folder}")
    return rows[-1] if rows else ""  # rank 0 alone keeps the log


def generate(opt: argparse.Namespace) -> None:
    """Write ``opt.generate`` pictures from a checkpoint, and a grid of the first 64."""
    generator = Generator(opt.img_size, opt.channels, opt.latent_dim).to(opt.device)
    generator = AveragedModel(generator)
    generator.load_state_dict(read_checkpoint(opt.resume)["averaged"])
    z = torch.randn(opt.generate, opt.latent_dim, generator=rng(opt.seed, 4))
    folder, style = Path(opt.out_dir), {"normalize": True, "value_range": (-1, 1)}
    folder.mkdir(parents=True, exist_ok=True)
    save_image(sample(generator, z[:64]), folder / "grid.png", **style)
    for i, part in enumerate(z.split(64)):
        for j, img in enumerate(sample(generator, part), 64 * i):
            save_image(img, folder / f"{j:05d}.png", **style)
    say(f"wrote {opt.generate} pictures and grid.png to {folder}")


# ------------------------------------------------------------------------------- main
def main(argv: list[str] | None = None) -> int:
    """Run the script and return its exit status; an error is one line on stderr."""
    opt = parse_args(argv)
    try:
        generate(opt) if opt.generate else train(opt)
    except (OSError, ValueError, FloatingPointError) as error:
        line = "\n" if sys.stdout.isatty() else ""  # below the progress line
        print(f"{line}{opt.script}.py: error: {error}", file=sys.stderr)
        return 2
    except RuntimeError:
        if os.environ.get("RANK", "0") == "0":
            raise
        return 2  # rank 0 has failed, and says why
    except KeyboardInterrupt:  # before training: nothing to save
        return 130
    finally:
        if dist.is_initialized():
            dist.destroy_process_group()
    return 0


if __name__ == "__main__":
    sys.exit(main())
