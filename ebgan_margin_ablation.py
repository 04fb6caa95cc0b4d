# SPDX-License-Identifier: MIT
"""The margin of the Energy-Based GAN (arXiv 1609.03126): a sweep, in one file.

The discriminator is an auto-encoder; an image's energy is its reconstruction error:

    U(x) = || Dec(Enc(x)) - x ||,  images x in [-1, 1]           eq. 13
    L_D  = E_x[ U(x) ] + E_z[ max(0, margin - U(G(z))) ]         eq. 1, hinge per sample
    L_G  = E_z[ U(G(z)) ]                                        eq. 2
    f_PT = mean over i != j of cos(S_i, S_j)^2,  S = Enc(G(z))   section 2.4

In training Enc sees x + noise, and the error is still taken to x: a denoising
auto-encoder. Adam's rate falls with the steps. Both are ours, not the paper's:
--noise 0 --lr_decay 0 turns them off.
This trains ebgan_pt.py's L_G + lambda_pt * f_PT for every margin and every seed; a seed
fixes weights, noise and order of the images, so that only the margin differs.

    python ebgan_margin_ablation.py                    the default margins and seeds
    python ebgan_margin_ablation.py --margins 0 1 4 --seeds 0 --max_steps 300
    python ebgan_margin_ablation.py --resume           go on with the newest sweep
"""

import argparse
import atexit
import ctypes
import io
import math
import os
import signal
import socket
import sys
import time
import warnings
from multiprocessing.pool import ThreadPool
from pathlib import Path

import numpy as np
import torch
import torch.distributed as dist
import torch.nn.functional as F
from PIL import Image, ImageDraw, ImageFont, ImageOps
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel as DDP
from torch.optim.swa_utils import AveragedModel, update_bn
from torchvision import datasets
from torchvision.transforms.v2.functional import pil_to_tensor, resize, rgb_to_grayscale
from torchvision.utils import save_image

SCRIPT = "ebgan_margin_ablation"
LOG_HEADER = "step,epoch,real_energy,fake_energy,hinge_active,pullaway,images_per_s,"
LOG_HEADER += "tv_bound,score,frechet,classes,real_score,real_frechet,real_classes\n"
RANK, WORLD = int(os.getenv("RANK", "0")), int(os.getenv("WORLD_SIZE", "1"))  # torchrun


# ----------------------------------------------------------------------------- losses
def energy(recon: Tensor, imgs: Tensor, kind: str = "norm") -> Tensor:
    """U(x): norm (eq. 13) or mean square (mse) of each error, N x C x S x S -> N."""
    dtype = torch.promote_types(recon.dtype, torch.float32)  # bfloat16 is too coarse
    error = (recon.to(dtype) - imgs.to(dtype)).flatten(1)
    return error.norm(dim=1) if kind == "norm" else error.square().mean(1)


def discriminator_loss(real: Tensor, fake: Tensor, margin: float) -> Tensor:
    """L_D (eq. 1) from the energies, N each, of real and of generated images."""
    return real.mean() + (margin - fake).clamp(min=0).mean()


def pullaway_loss(embeddings: Tensor) -> Tensor:
    """f_PT (section 2.4): mean squared cosine of the pairs i != j, N x E -> [0, 1]."""
    n = len(embeddings)
    with torch.autocast(embeddings.device.type, enabled=False):  # never in bfloat16
        dtype = torch.promote_types(embeddings.dtype, torch.float32)
        unit = F.normalize(embeddings.to(dtype), dim=1)  # zero stays zero
        cosines = (unit @ unit.T).fill_diagonal_(0)
        return cosines.square().sum() / max(n * (n - 1), 1)


def tv_bound(real: Tensor, fake: Tensor, margin: float) -> float:
    """1 - L_D / margin, at least 0: a lower bound of TV(data, generator), in [0, 1].

    For densities p, q and any U >= 0: p U + q max(0, m - U) >= m min(p, q) everywhere,
    and min(p, q) integrates to 1 - TV. So L_D >= m (1 - TV), for m > 0.
    """
    loss = discriminator_loss(real, fake, margin).item()
    return max(0.0, 1 - loss / margin) if margin > 0 else 0.0


# ----------------------------------------------------------------------------- models
class UpsampleConv2d(nn.Conv2d):
    """Nearest x2 upsampling, 3x3 convolution: N x C x H x W -> N x C' x 2H x 2W."""

    def __init__(self, in_channels: int, out_channels: int):
        super().__init__(in_channels, out_channels, kernel_size=3, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        # taps that meet the same input pixel are summed: a transposed 4x4 convolution
        # with stride 2, 4 instead of 9 products, and no large input in memory
        sums = F.avg_pool2d(self.weight, 2, stride=1, padding=1, divisor_override=1)
        kernel = sums.flip(2, 3).transpose(0, 1)
        out = F.conv_transpose2d(x, kernel, stride=2, padding=1)
        return out.add_(self.bias.to(out.dtype).view(-1, 1, 1))  # faster than inside


class Generator(nn.Module):
    """G: noise N x latent_dim -> images N x C x S x S in [-1, 1], S a multiple of 4."""

    def __init__(self, img_size: int = 32, channels: int = 1, latent_dim: int = 62):
        super().__init__()
        if img_size % 4:
            raise ValueError(f"img_size {img_size} is not a multiple of 4")
        self.shape = (128, img_size // 4, img_size // 4)
        self.linear = nn.Linear(latent_dim, math.prod(self.shape))
        self.conv1 = UpsampleConv2d(128, 128)
        self.norm1 = nn.BatchNorm2d(128, 0.8)  # eps, as in the widely used listing
        self.conv2 = UpsampleConv2d(128, 64)
        self.norm2 = nn.BatchNorm2d(64, 0.8)
        self.conv3 = nn.Conv2d(64, channels, 3, padding=1)
        layers = self.conv1, self.norm1, self.conv2, self.norm2, self.conv3
        for layer, mean in zip(layers, (0, 1, 0, 1, 0)):
            nn.init.normal_(layer.weight, mean, 0.02)

    def forward(self, z: Tensor) -> Tensor:
        x = self.linear(z).unflatten(1, self.shape)
        x = x.contiguous(memory_format=torch.channels_last)  # 1.1 times the images/s
        x = F.leaky_relu(self.norm1(self.conv1(x)), 0.2, inplace=True)
        x = F.leaky_relu(self.norm2(self.conv2(x)), 0.2, inplace=True)
        return self.conv3(x).tanh()


class Discriminator(nn.Module):
    """D: images N x C x S x S -> (reconstruction N x C x S x S, embedding N x 32)."""

    def __init__(self, img_size: int = 32, channels: int = 1):
        super().__init__()
        if img_size % 4:
            raise ValueError(f"img_size {img_size} is not a multiple of 4")
        self.shape = (64, img_size // 2, img_size // 2)
        self.conv1 = nn.Conv2d(channels, 64, 3, stride=2, padding=1)
        self.linear1 = nn.Linear(math.prod(self.shape), 32)
        self.norm1 = nn.BatchNorm1d(32, 0.8)  # 0.8 is eps here too
        self.linear2 = nn.Linear(32, math.prod(self.shape))
        self.norm2 = nn.BatchNorm1d(math.prod(self.shape))
        self.conv2 = UpsampleConv2d(64, channels)
        nn.init.normal_(self.conv1.weight, 0, 0.02)
        nn.init.normal_(self.conv2.weight, 0, 0.02)

    def forward(self, imgs: Tensor) -> tuple[Tensor, Tensor]:
        embedding = self.linear1(self.conv1(imgs).relu_().flatten(1))
        x = self.linear2(self.norm1(embedding).relu_())
        x = self.norm2(x).relu_().unflatten(1, self.shape)
        return self.conv2(x), embedding


# ------------------------------------------------------------------------------- data
def rng(*key: int) -> torch.Generator:
    """Return a generator for a key such as (seed, purpose, step): no state is kept."""
    seed = np.random.SeedSequence(key).generate_state(1, np.uint64)[0]
    return torch.Generator().manual_seed(int(seed) >> 1)


def synthetic_digits(n: int, img_size: int, seed: int) -> tuple[Tensor, Tensor]:
    """Draw n digits: images n x 1 x S x S uint8, white on black, and labels n int64."""
    size = max(64, img_size)
    font = ImageFont.load_default(size=0.75 * size)
    glyphs = torch.empty(30, 1, size, size)
    for i in range(30):  # ten digits in three stroke widths
        glyph, text = Image.new("L", (size, size)), str(i // 3)
        style = {"anchor": "mm", "stroke_width": i % 3 * size // 64}
        ImageDraw.Draw(glyph).text((size / 2, size / 2), text, 255, font, **style)
        glyphs[i] = pil_to_tensor(glyph)
    glyphs = F.interpolate(glyphs, size=img_size, mode="area")
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


def load_picture(path: Path, img_size: int) -> Tensor:
    """Return a picture as it is shown, cropped to a square, uint8 3 x S x S."""
    try:
        img = ImageOps.exif_transpose(Image.open(path))  # as the camera was held
        if img.mode[0] in "FI":  # F, I or I;16
            raise ValueError("more than 8 bits a channel")
        img = ImageOps.fit(img.convert("RGBA"), (img_size, img_size))
        white = Image.new("RGBA", img.size, "white")  # shows where it is clear
        return pil_to_tensor(Image.alpha_composite(white, img).convert("RGB"))
    except Exception as error:  # Pillow raises many kinds
        raise ValueError(f"--data_root: can't show {path}: {error}") from error


def load_images(
    dataset: str, data_root: str, img_size: int, channels: int | None, n_cpu: int
) -> list[Tensor]:
    """Return images, uint8 N x C x S x S, and labels: to train on, then held out."""
    parts, size = [], [img_size, img_size]
    if dataset == "digits":
        parts += synthetic_digits(20000, img_size, seed=20000)
        parts += synthetic_digits(5000, img_size, seed=5000)
    elif dataset == "folder":
        paths = sorted(x for x in Path(data_root).rglob("*") if x.is_file())
        paths = [x for x in paths if "/." not in f"/{x.relative_to(data_root)}"]
        paths = [x for x in paths if x.suffix.lower() in datasets.folder.IMG_EXTENSIONS]
        if len(paths) < 20:
            raise ValueError(f"--data_root {data_root}: fewer than 20 pictures")
        paths = [paths[i] for i in torch.randperm(len(paths), generator=rng(0))]
        imgs = torch.empty(len(paths), 3, *size, dtype=torch.uint8)
        with ThreadPool(n_cpu) as pool:
            decoded = pool.imap(lambda path: load_picture(path, img_size), paths)
            for i, img in enumerate(decoded):
                imgs[i] = img
                if i % 1000 == 999:
                    print(f"decoded {i + 1} of {len(paths)} pictures", flush=True)
        if (imgs == imgs[:, :1]).all():
            imgs = imgs[:, :1].clone()  # all are grey
        classes = sorted({x.parent for x in paths})
        held = len(paths) // 10
        labels = torch.tensor([classes.index(x.parent) for x in paths])
        parts += [imgs[held:], labels[held:], imgs[:held], labels[:held]]
    else:
        name = "FashionMNIST" if dataset == "fashion-mnist" else dataset.upper()
        load = getattr(datasets, name)
        for split in ("train", "test") if name == "SVHN" else (True, False):
            try:
                data = load(data_root, split, pil_to_tensor, download=True)
            except Exception as error:  # torchvision raises many kinds
                raise ValueError(f"--dataset {dataset}: {error}") from error
            imgs, labels = zip(*data)
            imgs = [resize(part, size) for part in torch.stack(imgs).split(5000)]
            parts += [torch.cat(imgs), torch.tensor(labels)]
    for i in (0, 2):
        if channels == 1:
            parts[i] = rgb_to_grayscale(parts[i])
        parts[i] = parts[i].expand(-1, channels or -1, -1, -1)
    return parts


def default_dataset(data_root: str) -> str:
    """Return mnist where it is on disk or can be downloaded, else digits."""
    try:
        datasets.MNIST(data_root, download=True)
        return "mnist"
    except (OSError, RuntimeError, ValueError):
        print(f"no MNIST in {data_root} and none to download: the built-in digits")
        return "digits"


# ------------------------------------------------------------------------------ score
def train_classifier(imgs: Tensor, labels: Tensor, device: str) -> nn.Sequential:
    """Fit a small network to uint8 images: net(x) are logits, net[0](x) features."""
    layers = []
    with torch.random.fork_rng(devices=[]):  # the caller's random numbers stay
        torch.manual_seed(0)
        for before, after in (imgs.shape[1], 16), (16, 32), (32, 64):
            conv = nn.Conv2d(before, after, 3, stride=2, padding=1, bias=False)
            layers += [conv, nn.BatchNorm2d(after), nn.ReLU()]
        dense, last = nn.Linear(1024, 64), nn.Linear(64, int(labels.max()) + 1)
    layers += [nn.AdaptiveAvgPool2d(4), nn.Flatten(), dense, nn.ReLU()]
    classifier = nn.Sequential(nn.Sequential(*layers), last).to(device)
    adam = torch.optim.Adam(classifier.parameters(), fused=True)
    rate = torch.optim.lr_scheduler.OneCycleLR(adam, max_lr=0.01, total_steps=500)
    for step in range(500):
        batch = torch.randint(len(imgs), (128,), generator=rng(step))
        logits = classifier(imgs[batch].to(device) / 127.5 - 1)
        adam.zero_grad()
        F.cross_entropy(logits, labels[batch].to(device)).backward()
        adam.step()
        rate.step()
    return classifier.eval()


@torch.no_grad()
def in_parts(network: nn.Module, x: Tensor) -> Tensor:
    """Return a network's output for a large batch, 500 at a time, on the CPU."""
    device = next(network.parameters()).device
    return torch.cat([network(part.to(device)).cpu() for part in x.split(500)])


def evaluate(classifier: nn.Sequential, imgs: Tensor, real: Tensor) -> dict[str, float]:
    """Score images in [-1, 1] against real ones, by a classifier's p(y|x) and features.

    score: higher is better; frechet: lower; classes: those with at least 1 %.
    """
    features = in_parts(classifier[0], imgs)
    log_probs = in_parts(classifier[1], features).double().log_softmax(1)
    log_probs = log_probs.clamp(min=-20)  # or one sure image would outweigh the others
    marginal = log_probs.exp().mean(0)
    # I' of the paper: E_x KL(p(y) || p(y|x))
    score = (marginal * (marginal.log() - log_probs)).sum(1).mean()
    ours, theirs = features.double(), in_parts(classifier[0], real).double()
    shift = (ours.mean(0) - theirs.mean(0)).square().sum()
    cov, real_cov = ours.T.cov(), theirs.T.cov()
    roots = torch.linalg.eigvals(cov @ real_cov).real.clamp(min=0).sqrt()
    frechet = shift + cov.trace() + real_cov.trace() - 2 * roots.sum()
    classes = (log_probs.argmax(1).bincount() >= 0.01 * len(imgs)).sum()
    return {"score": score.item(), "frechet": frechet.item(), "classes": classes.item()}


# ------------------------------------------------------------------------------ flags
def parse_args(argv: list[str] | None = None) -> argparse.Namespace:
    """Read and check the flags; a bad one is one line on stderr and exit status 2."""

    def within(kind: type, low: float, high: float = 2**31):
        def number(text: str):
            if low <= kind(text) < high:
                return kind(text)
            raise argparse.ArgumentTypeError(f"{text} is not in [{low}, {high})")

        return number

    names = ["digits", "mnist", "fashion-mnist", "kmnist", "cifar10", "svhn", "folder"]
    parser = argparse.ArgumentParser(f"{SCRIPT}.py", allow_abbrev=False)
    parser.usage = argparse.SUPPRESS  # an error is one line
    positive, decay, amount = within(int, 1), within(float, 0, 1), within(float, 0)
    best = "mps" if torch.backends.mps.is_available() else "cpu"
    best = "cuda" if torch.cuda.is_available() else best
    new = time.strftime(f"runs/{SCRIPT}-%Y%m%d-%H%M%S")
    add = parser.add_argument
    margins = {"nargs": "+", "default": [0, 5, 7, 10, 14, 20]}
    seeds = {"nargs": "+", "default": [0, 1, 2]}
    add("--n_epochs", type=positive, default=200, help="passes over the data [200]")
    add("--batch_size", type=within(int, 2), default=64, help="images a step [64]")
    add("--lr", type=within(float, 1e-12), default=2e-3, help="Adam's rate [0.002]")
    add("--lr_decay", type=amount, default=3e-4, help="lr / (1 + this * step) [0.0003]")
    add("--b1", type=decay, default=0.5, help="Adam's decay of the mean [0.5]")
    add("--b2", type=decay, default=0.999, help="Adam's decay of the square [0.999]")
    add("--n_cpu", type=positive, default=8, help="threads that decode a folder [8]")
    add("--latent_dim", type=positive, default=62, help="numbers in the noise z [62]")
    add("--img_size", type=within(int, 8), default=32, help="a multiple of 4 [32]")
    add("--channels", type=int, choices=(1, 3), help="grey or colour [as the data]")
    add("--sample_interval", type=positive, default=400, help="steps to a save [400]")
    add("--energy", choices=("norm", "mse"), default="norm", help="U(x) [norm]")
    add("--margins", type=amount, **margins, help="for the norm [0 5 7 10 14 20]")
    add("--lambda_pt", type=amount, default=0.1, help="weight of f_PT [0.1]")
    add("--noise", type=amount, help="in D's input, to be removed [norm 0.3, mse 0]")
    add("--dataset", choices=names, help="[mnist if it can be had, else digits]")
    add("--data_root", default="data", help="folder of data sets or pictures [data]")
    add("--out_dir", default=new, help="a new folder [runs/<script>-<date>-<time>]")
    add("--seeds", type=within(int, 0), **seeds, help="one run each [0 1 2]")
    add("--device", default=best, help="cpu, cuda:1, mps [cuda, else mps, else cpu]")
    add("--amp", action="store_true", help="bfloat16; slower on most CPUs [off]")
    add("--max_steps", type=positive, default=1500, help="length of each run [1500]")
    add("--resume", nargs="?", const="", help="a run's folder or checkpoint [newest]")
    add("--generate", type=positive, help="write that many pictures of a run, and end")
    parser.set_defaults(script=SCRIPT, processes=WORLD)  # a run is resumed by the same
    opt = parser.parse_args(argv)
    try:
        if opt.resume is not None or opt.generate:
            path, flags, _ = load_checkpoint(opt.resume or "")
            flags["out_dir"] = str(Path(path).parents[0 if opt.generate else 2])
            flags["out_dir"] += "/generated" if opt.generate else ""
            # again: a flag that is not typed has the run's value instead of the default
            opt = parser.parse_args(argv, argparse.Namespace(**flags))
            opt.script, opt.processes, opt.resume = SCRIPT, WORLD, path
            free = {"n_epochs", "max_steps", "sample_interval", "n_cpu", "data_root"}
            free |= {"device", "resume", "generate"}
            free |= {"margins", "seeds"}
            free |= {"processes", "out_dir"} if opt.generate else set()
            for name in sorted(flags.keys() - free):
                if (now := getattr(opt, name)) != flags[name]:
                    raise ValueError(f"{name} {now}: {path} has {flags[name]}")
            # a flag that came in since has no value that the run was trained with
            if vars(opt).keys() > flags.keys() and not opt.generate:
                raise ValueError(f"--resume: {path} is not of this script's version")
        elif any(Path(opt.out_dir).glob("*")):
            raise ValueError(f"--out_dir '{opt.out_dir}' is no new or empty folder")
        if opt.img_size % 4:
            raise ValueError(f"--img_size {opt.img_size} is not a multiple of 4")
        if len({f"{abs(margin):g}" for margin in opt.margins}) < len(opt.margins):
            raise ValueError(f"--margins {opt.margins}: two are the same")
        if len(set(opt.seeds)) < len(opt.seeds):
            raise ValueError(f"--seeds {opt.seeds}: two are the same")
        torch.zeros(1, device=opt.device).item()
    except ValueError as error:
        parser.error(str(error))
    except (RuntimeError, AssertionError) as error:  # of torch.zeros
        parser.error(f"--device {opt.device}: {str(error).splitlines()[0]}")
    return opt


# --------------------------------------------------------------------------- training
def load_checkpoint(run: str) -> tuple[str, dict, dict]:
    """Return path, flags and contents of a run's checkpoint; "" is the newest run."""
    pattern = "**/checkpoint.pt" if run else f"{SCRIPT}-*/**/checkpoint.pt"
    path = Path(run or "runs")
    path = path if path.is_file() else max(path.glob(pattern), default=path)
    try:
        saved = torch.load(path, map_location="cpu", weights_only=True)  # runs no code
        return str(path), saved["flags"], saved
    except Exception as error:  # torch.load raises many kinds
        raise ValueError(f"--resume: no readable checkpoint in {path}") from error


def load_run(run: str) -> tuple[nn.Module, nn.Module]:
    """Return generator and discriminator of a folder or checkpoint, in eval mode."""
    _, flags, saved = load_checkpoint(run)
    size = flags["img_size"], flags["channels"]
    with torch.device("meta"):  # draws no random weights, which would be replaced
        averaged = AveragedModel(Generator(*size, flags["latent_dim"]))
        discriminator = Discriminator(*size)
    averaged.load_state_dict(saved["averaged"], assign=True)
    discriminator.load_state_dict(saved["discriminator"], assign=True)
    return averaged.module.eval(), discriminator.eval()


def running_mean(mean: Tensor, new: Tensor, n: Tensor) -> Tensor:
    """Return the mean moved to a new value by 9 / (10 + n), but by 0.001 at least."""
    return mean + (new - mean) * (9 / (10 + n)).clamp(min=0.001)


def train(opt: argparse.Namespace, data: list[Tensor]) -> dict[str, float]:
    """Train as the flags say, on load_images's tensors; return the log's last row."""
    imgs, labels, held_imgs, held_labels = data
    n = opt.batch_size * WORLD  # images a step
    epoch_steps = len(imgs) // n  # full batches only
    total = min(opt.n_epochs * epoch_steps, opt.max_steps or sys.maxsize)
    if total == 0:
        raise ValueError(f"--batch_size {opt.batch_size}: only {len(imgs)} images")
    with torch.random.fork_rng(devices=[]):  # the caller's random numbers stay
        torch.manual_seed(opt.seed)
        generator = Generator(opt.img_size, opt.channels, opt.latent_dim).to(opt.device)
        discriminator = Discriminator(opt.img_size, opt.channels).to(opt.device)
    adam = {"lr": opt.lr, "betas": (opt.b1, opt.b2), "fused": True}
    optimizer_g = torch.optim.Adam(generator.parameters(), **adam)
    optimizer_d = torch.optim.Adam(discriminator.parameters(), **adam)
    averaged = AveragedModel(generator, avg_fn=running_mean, use_buffers=True).eval()
    parts = {"generator": generator, "averaged": averaged, "optimizer_g": optimizer_g}
    parts |= {"discriminator": discriminator, "optimizer_d": optimizer_d}
    folder = Path(opt.out_dir)
    start, row = 0, {}
    if opt.resume:
        _, _, saved = load_checkpoint(opt.resume)
        try:
            for name, part in parts.items():
                part.load_state_dict(saved[name])
            start, row = saved["step"], saved["row"]
        except (KeyError, RuntimeError) as error:
            text = f"--resume: {opt.resume} is not of this script's version"
            raise ValueError(text) from error
        os.truncate(folder / "log.csv", saved["log_size"])  # later rows come again
    elif RANK == 0:
        (folder / "samples").mkdir(parents=True)  # fails where another run has begun
        (folder / "log.csv").write_text(LOG_HEADER)
    net_g, net_d = generator, discriminator
    if WORLD > 1:
        net_g = DDP(generator, broadcast_buffers=False)
        net_d = DDP(discriminator, broadcast_buffers=False)
    autocast = torch.autocast(opt.device.split(":")[0], torch.bfloat16, enabled=opt.amp)
    where = f"step {start} of {total} on {opt.device}, in {folder}"
    print(f"{opt.dataset}: {len(imgs)} images, {where}", flush=True)
    held, classifier = held_imgs / 127.5 - 1, None
    if RANK == 0 and start < total and labels.max() > 0:  # there are classes
        classifier = train_classifier(imgs, labels, opt.device)
        right = (in_parts(classifier, held).argmax(1) == held_labels).float().mean()
        print(f"classifier: {right:.2%} of the held-out images right")
        real = evaluate(classifier, imgs[:5000] / 127.5 - 1, held)
        ceiling = {f"real_{name}": value for name, value in real.items()}

    tick, tick_step = time.perf_counter(), start
    for epoch in range(start // epoch_steps, math.ceil(total / epoch_steps)):
        order = torch.randperm(len(imgs), generator=rng(opt.seed, 0, epoch))
        batches = order[: epoch_steps * n].view(epoch_steps, WORLD, -1)
        first, last = epoch * epoch_steps + 1, min((epoch + 1) * epoch_steps, total)
        for step in range(max(first, start + 1), last + 1):
            real_imgs = imgs[batches[step - first, RANK]].to(opt.device) / 127.5 - 1
            draw = rng(opt.seed, 1, step, RANK)
            z = torch.randn(opt.batch_size, opt.latent_dim, generator=draw)
            noise = torch.randn(real_imgs.shape, generator=draw).to(opt.device)
            noise *= opt.noise  # for the discriminator to remove
            for optimizer in (optimizer_d, optimizer_g):  # a constant rate ends worse
                optimizer.param_groups[0]["lr"] = opt.lr / (1 + opt.lr_decay * step)

            # discriminator: real images to low energy, generated ones to the margin
            with autocast:
                gen_imgs = net_g(z.to(opt.device))
                fake_imgs = gen_imgs.detach()
                real_recon, _ = net_d(real_imgs + noise)
                fake_recon, _ = net_d(fake_imgs + noise)
            real_energy = energy(real_recon, real_imgs, opt.energy)
            fake_energy = energy(fake_recon, fake_imgs, opt.energy)
            loss_d = discriminator_loss(real_energy, fake_energy, opt.margin)
            optimizer_d.zero_grad()
            loss_d.backward()
            optimizer_d.step()

            # generator: its images to low energy, gradient through recon and gen_imgs
            with autocast:  # not by net_d: DDP would wait for D's gradients
                recon, embedding = discriminator(gen_imgs + noise)
            loss_g = energy(recon, gen_imgs, opt.energy).mean()
            loss_g = loss_g + opt.lambda_pt * pullaway_loss(embedding)
            optimizer_g.zero_grad()
            loss_g.backward(inputs=list(generator.parameters()))
            optimizer_g.step()
            averaged.update_parameters(generator)

            save = step in (50, 100, 200, last) or step % opt.sample_interval == 0
            if RANK > 0 or not (save or step % 20 == 0):
                continue  # to read a figure would wait for the device
            weights = [*generator.parameters(), *discriminator.parameters()]
            if not all(x.isfinite().all() for x in weights):
                raise FloatingPointError(f"not finite at step {step}: see {folder}")
            row = {"step": step, "epoch": epoch + 1}
            row["real_energy"] = real_energy.mean().item()
            row["fake_energy"] = fake_energy.mean().item()
            row["hinge_active"] = (fake_energy < opt.margin).float().mean().item()
            row["pullaway"] = pullaway_loss(embedding).item()
            row["images_per_s"] = (step - tick_step) * n / (time.perf_counter() - tick)
            if save:  # batch statistics of real images alone, for D's eval mode
                some = imgs[:2000].tensor_split(4)
                update_bn((x.to(opt.device) / 127.5 - 1 for x in some), discriminator)
            if step == last:
                z = torch.randn(5000, opt.latent_dim, generator=rng(opt.seed, 3))
                made = in_parts(averaged, z)
                discriminator.eval()
                with torch.no_grad():
                    both = [x[:1000].to(opt.device) for x in (held, made)]
                    values = [energy(discriminator(x)[0], x, opt.energy) for x in both]
                discriminator.train()
                row["tv_bound"] = tv_bound(*values, opt.margin)
                if classifier:
                    row |= evaluate(classifier, made, held) | ceiling
            print(*(f"{name} {value:.5g}" for name, value in row.items()), flush=True)
            with open(folder / "log.csv", "a") as log:
                print(*row.values(), sep=",", file=log)
            if save:
                z = torch.randn(64, opt.latent_dim, generator=rng(opt.seed, 2))
                shown = in_parts(averaged, z) / 2 + 0.5
                save_image(shown, folder / f"samples/{step}.png")
                save_image(shown, folder / "samples.png")
                saved = {name: part.state_dict() for name, part in parts.items()}
                saved |= {"step": step, "row": row, "flags": vars(opt)}
                saved["log_size"] = (folder / "log.csv").stat().st_size
                buffer = io.BytesIO()  # torch.save to a full disk is no OSError
                torch.save(saved, buffer)
                (folder / "partial").write_bytes(buffer.getvalue())
                os.replace(folder / "partial", folder / "checkpoint.pt")
            tick, tick_step = time.perf_counter(), step
    return row


def sweep(opt: argparse.Namespace, data: list[Tensor]) -> None:
    """Train every margin with every seed; write results.csv, a table and margins.png.

    Runs that are complete are not trained again. margins.png has a row for each margin,
    by the first seed, and the same z down each column.
    """
    home, results, rows = Path(opt.out_dir), [], []
    for margin in opt.margins:
        for seed in opt.seeds:
            number = f"{len(results) + 1} of {len(opt.margins) * len(opt.seeds)}"
            print(f"run {number}: margin {margin:g}, seed {seed}")
            run = argparse.Namespace(**vars(opt))
            folder = home / f"margin_{margin:g}" / f"seed_{seed}"
            run.margin, run.seed, run.out_dir = margin, seed, str(folder)
            checkpoint = folder / "checkpoint.pt"
            run.resume = str(checkpoint) if checkpoint.exists() else None
            # a run that was stopped before its first checkpoint starts anew
            if RANK == 0 and folder.exists() and not run.resume:
                folder.rename(home / time.strftime(f"stopped_{seed}-%H%M%S"))
            results.append({"margin": f"{margin:g}", "seed": seed} | train(run, data))
        if RANK == 0:
            generator, _ = load_run(f"{home}/margin_{margin:g}/seed_{opt.seeds[0]}")
            z = torch.randn(64, opt.latent_dim, generator=rng(opt.seeds[0], 2))
            rows.append(in_parts(generator, z[:12]) / 2 + 0.5)
    if RANK > 0:
        return
    with open(home / "results.csv", "w") as file:
        for row in (results[0], *(result.values() for result in results)):
            print(*row, sep=",", file=file)
    table = torch.tensor([[float(x) for x in row.values()] for row in results])
    table = table.view(len(opt.margins), len(opt.seeds), -1)
    print(f"mean +- standard deviation over the seeds {opt.seeds}")
    for margin, runs in zip(opt.margins, table):
        figures = [*zip(results[0], runs.mean(0), runs.std(0, correction=0))]
        texts = (f"{name} {mean:.4g} +- {std:.2g}" for name, mean, std in figures[4:])
        print(f"margin {margin:g}:", *texts, sep="  ")
    save_image(torch.cat(rows), home / "margins.png", nrow=12)
    picture = ImageOps.expand(Image.open(home / "margins.png"), (100, 0, 0, 0))
    for i, margin in enumerate(opt.margins):
        place = (10, (i + 0.5) * (opt.img_size + 2))
        ImageDraw.Draw(picture).text(place, f"margin {margin:g}", "white", anchor="lm")
    picture.save(home / "margins.png")
    print(f"done: results.csv and margins.png in {home}")


# ------------------------------------------------------------------------------- main
def main(argv: list[str] | None = None) -> int:
    """Run the script and return its exit status; a fault is one line on stderr."""
    opt = parse_args(argv)
    try:
        if opt.generate:
            generator, _ = load_run(opt.resume)
            z = torch.randn(opt.generate, opt.latent_dim, generator=rng(opt.seed, 4))
            imgs = in_parts(generator.to(opt.device), z) / 2 + 0.5
            Path(opt.out_dir).mkdir(parents=True, exist_ok=True)
            save_image(imgs[:64], Path(opt.out_dir, "grid.png"))
            for i, img in enumerate(imgs):
                save_image(img, Path(opt.out_dir, f"{i:05d}.png"))
            print(f"wrote {len(imgs)} pictures and grid.png to {opt.out_dir}")
            return 0
        if RANK > 0:
            dist.barrier()  # until the first process has downloaded the data
        opt.dataset = opt.dataset or default_dataset(opt.data_root)
        source = (opt.dataset, opt.data_root, opt.img_size, opt.channels, opt.n_cpu)
        data = load_images(*source)
        if WORLD > 1 and RANK == 0:
            dist.barrier()
        opt.channels = data[0].shape[1]
        if opt.noise is None:
            opt.noise = 0.3 if opt.energy == "norm" else 0.0
        sweep(opt, data)
        return 0
    except KeyboardInterrupt:
        saved = any(Path(opt.out_dir).rglob("checkpoint.pt"))
        text = f"go on with: python {SCRIPT}.py --resume {opt.out_dir}"
        print("stopped,", text if saved else "nothing was saved", file=sys.stderr)
        return 130
    except (OSError, ValueError, FloatingPointError) as error:
        where = f"{opt.out_dir}: " if isinstance(error, OSError) else ""
        text = where + " ".join(str(error).split())
        print(f"{SCRIPT}.py: error: {text}", file=sys.stderr)
        return 2


if __name__ == "__main__":
    socket.setdefaulttimeout(5)  # seconds for each of torchvision's two mirrors
    if WORLD > 1:
        warnings.filterwarnings("ignore", ".*broadcast_buffers")  # renamed in new torch
        dist.init_process_group()
        atexit.register(dist.destroy_process_group)
        if torch.cuda.is_available():
            torch.cuda.set_device(RANK % torch.cuda.device_count())
    if RANK > 0:
        sys.stdout = None  # the first process prints
    if sys.platform == "linux":
        signal.signal(signal.SIGPIPE, signal.SIG_DFL)  # `| head` is no error
        # 1.2 times the images/s: glibc keeps freed memory
        libc = ctypes.CDLL(None)
        libc.mallopt(-1, 2**31 - 1)  # M_TRIM_THRESHOLD
        libc.mallopt(-3, 2**30)  # M_MMAP_THRESHOLD
    sys.exit(main())
