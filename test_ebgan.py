# SPDX-License-Identifier: MIT
"""Tests of the three scripts against oracles that share no code with them.

pytest test_ebgan.py
"""

import ast
import csv
import difflib
import importlib
import itertools
import math
import multiprocessing
import os
import pickle
import platform
import random
import re
import resource
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from torch import nn

import ebgan
import ebgan_margin_ablation
import ebgan_pt

HERE = Path(__file__).parent
NAMES = ("ebgan", "ebgan_pt", "ebgan_margin_ablation")
MODULES = (ebgan, ebgan_pt, ebgan_margin_ablation)
each_module = pytest.mark.parametrize("module", MODULES, ids=NAMES)
each_script = pytest.mark.parametrize("script", NAMES)


# ------------------------------------------------------------------ running a script
# a server that has imported torch once forks a process for every run


def child(script, argv, folder, env, file_limit):
    os.chdir(folder)
    os.environ.update(env)
    torch.set_num_threads(int(env.get("OMP_NUM_THREADS", 1)))
    for name, stream in (("stdout", 1), ("stderr", 2)):
        file = f"{name}-{os.getpid()}.txt"
        os.dup2(os.open(file, os.O_CREAT | os.O_WRONLY | os.O_TRUNC), stream)
    if file_limit:
        resource.setrlimit(resource.RLIMIT_FSIZE, (file_limit, file_limit))
    sys.exit(importlib.import_module(script).main(argv))


context = multiprocessing.get_context("forkserver")
context.set_forkserver_preload([*NAMES, "test_ebgan"])


class Run:
    """A script that runs in a process of its own, in a folder of its own."""

    def __init__(self, script, *argv, cwd, env=None, file_limit=None):
        self.cwd = Path(cwd)
        args = (script, [str(x) for x in argv], str(cwd), env or {}, file_limit)
        self.process = context.Process(target=child, args=args)
        self.process.start()

    def wait(self, timeout=60):
        self.process.join(timeout)
        assert self.process.exitcode is not None, "the run hangs"
        self.out = self.read(f"stdout-{self.process.pid}.txt")
        self.err = self.read(f"stderr-{self.process.pid}.txt")
        return self

    def read(self, name):
        file = self.cwd / name
        text = file.read_text() if file.exists() else ""
        file.unlink(missing_ok=True)
        return text

    @property
    def status(self):
        return self.process.exitcode


def run(script, *argv, cwd, status=0, **kwargs):
    done = Run(script, *argv, cwd=cwd, **kwargs).wait()
    assert done.status == status, done.out + done.err
    return done


def draw_pictures(folder, n, size=(8, 8), mode="L", classes=("",), seed=0):
    """Write n noisy pictures, in turn into one folder for every class."""
    noise = np.random.default_rng(seed)
    for i in range(n):
        place = Path(folder, classes[i % len(classes)])
        place.mkdir(parents=True, exist_ok=True)
        shape = size[::-1] if mode == "L" else (*size[::-1], 3)
        pixels = noise.integers(0, 256, shape, dtype=np.uint8)
        Image.fromarray(pixels, mode).save(place / f"{i:03d}.png")


@pytest.fixture
def tiny(tmp_path):
    """Flags of a run that takes a tenth of a second: 40 grey 8 x 8 pictures, no classes."""
    draw_pictures(tmp_path / "pictures", 40)
    data = ["--dataset", "folder", "--data_root", tmp_path / "pictures"]
    return [*data, "--img_size", 8, "--batch_size", 4, "--sample_interval", 7]


def load(path):
    return torch.load(path, weights_only=True)


def tensors(tree, path=""):
    """Flatten a checkpoint into {path: tensor or number}, without the measured speed."""
    if isinstance(tree, dict):
        items = tree.items()
    elif isinstance(tree, list | tuple):
        items = enumerate(tree)
    else:
        return {path: tree}
    flat = {}
    for key, value in items:
        flat |= tensors(value, f"{path}/{key}")
    return flat


def assert_same_run(one, two):
    one, two = (load(path) for path in (one, two))
    for checkpoint in (one, two):
        rows = [row.split(",") for row in checkpoint["rows"]]
        checkpoint["rows"] = [row[:6] + row[7:] for row in rows]
        del checkpoint["options"]
    one, two = tensors(one), tensors(two)
    assert one.keys() == two.keys()
    for key, value in one.items():
        same = (
            torch.equal(value, two[key])
            if torch.is_tensor(value)
            else value == two[key]
        )
        assert same, key


def read_log(folder):
    with open(Path(folder, "log.csv"), newline="") as file:
        return list(csv.DictReader(file))


# ------------------------------------------------------------------------- equations


@pytest.mark.parametrize("shape", [(5, 1, 4, 4), (3, 3, 8, 4), (1, 1, 2, 2)])
def test_energy_is_the_mean_squared_error_of_each_image(shape):
    recon, imgs = torch.randn(2, *shape, dtype=torch.float64)
    values = ebgan.energy(recon, imgs)
    assert values.shape == shape[:1]
    for n in range(shape[0]):
        total = 0.0
        for c, h, w in itertools.product(*map(range, shape[1:])):
            total += (recon[n, c, h, w].item() - imgs[n, c, h, w].item()) ** 2
        assert values[n].item() == pytest.approx(
            total / math.prod(shape[1:]), rel=1e-12
        )


def test_energy_passes_the_gradient_to_reconstruction_and_image():
    recon, imgs = (torch.randn(3, 1, 4, 4, dtype=torch.float64) for _ in range(2))
    recon.requires_grad_()
    imgs.requires_grad_()
    ebgan.energy(recon, imgs).sum().backward()
    expected = 2 * (recon.detach() - imgs.detach()) / 16
    torch.testing.assert_close(recon.grad, expected)
    torch.testing.assert_close(imgs.grad, -expected)


def test_energy_of_bfloat16_is_taken_in_float32():
    recon, imgs = torch.rand(2, 4, 1, 8, 8).bfloat16()
    values = ebgan.energy(recon, imgs)
    assert values.dtype == torch.float32
    exact = (recon.double() - imgs.double()).square().mean((1, 2, 3))
    torch.testing.assert_close(values.double(), exact, rtol=1e-6, atol=0)


@pytest.mark.parametrize("margin", [0, 0.5, 1.0, 7.0])
def test_discriminator_loss_has_a_hinge_for_every_sample(margin):
    real, fake = torch.rand(2, 6, dtype=torch.float64) * 2
    loss = ebgan.discriminator_loss(real, fake, margin).item()
    total = 0.0
    for r, f in zip(real.tolist(), fake.tolist()):
        total += r / 6 + max(0.0, margin - f) / 6
    assert loss == pytest.approx(total, rel=1e-12)


def test_hinge_is_not_that_of_the_mean_energy():
    real, fake = (
        torch.zeros(2),
        torch.tensor([0.0, 2.0]),
    )  # mean 1: no hinge at margin 1
    assert ebgan.discriminator_loss(real, fake, 1.0).item() == 0.5


def test_hinge_stops_the_gradient_of_samples_beyond_the_margin_only():
    fake = torch.tensor([0.2, 3.0, 0.9], requires_grad=True)
    ebgan.discriminator_loss(torch.zeros(3), fake, 1.0).backward()
    torch.testing.assert_close(fake.grad, torch.tensor([-1 / 3, 0, -1 / 3]))


def slow_pullaway(embeddings):
    rows, total = embeddings.tolist(), 0.0
    for i, j in itertools.product(range(len(rows)), repeat=2):
        if i != j:
            dot = sum(a * b for a, b in zip(rows[i], rows[j]))
            square = sum(a * a for a in rows[i]) * sum(b * b for b in rows[j])
            total += dot * dot / square
    return total / (len(rows) * (len(rows) - 1))


@pytest.mark.parametrize(("n", "width"), [(2, 1), (2, 7), (5, 3), (17, 32)])
def test_pullaway_loss_equals_the_double_loop(n, width):
    embeddings = torch.randn(n, width, dtype=torch.float64) + 0.3
    value = ebgan.pullaway_loss(embeddings).item()
    assert value == pytest.approx(slow_pullaway(embeddings), rel=1e-10)
    assert 0 <= value <= 1 + 1e-12


def test_pullaway_loss_does_not_depend_on_the_lengths():
    embeddings = torch.randn(6, 4, dtype=torch.float64)
    lengths = torch.rand(6, 1, dtype=torch.float64) * 100 + 0.01
    one, two = (
        ebgan.pullaway_loss(embeddings),
        ebgan.pullaway_loss(embeddings * lengths),
    )
    torch.testing.assert_close(one, two)


def test_pullaway_loss_of_orthogonal_and_of_parallel_embeddings():
    assert ebgan.pullaway_loss(torch.eye(5)).item() == 0
    line = torch.tensor([[1.0, 2.0], [2.0, 4.0], [-3.0, -6.0]])
    assert ebgan.pullaway_loss(line).item() == pytest.approx(1)
    # batch axis and embedding axis differ: two of three pairs are orthogonal
    assert ebgan.pullaway_loss(torch.eye(2)[[0, 0, 1]]).item() == pytest.approx(1 / 3)


def test_pullaway_loss_is_finite_for_zeros_and_for_one_embedding():
    embeddings = torch.tensor([[0.0, 0.0], [1.0, 0.0], [1.0, 1.0]], requires_grad=True)
    value = ebgan.pullaway_loss(embeddings)
    value.backward()
    assert value.item() == pytest.approx(0.5 / 3)
    assert embeddings.grad.isfinite().all()
    assert ebgan.pullaway_loss(torch.ones(1, 4)).item() == 0
    assert ebgan.pullaway_loss(torch.zeros(4, 4)).item() == 0


def test_pullaway_loss_stays_in_float32_under_autocast():
    embeddings = torch.randn(8, 32)
    with torch.autocast("cpu", torch.bfloat16):
        value = ebgan.pullaway_loss(embeddings)
    assert value.dtype == torch.float32
    assert value.item() == pytest.approx(slow_pullaway(embeddings.double()), rel=1e-5)


# -------------------------------------------------------------------------- networks


class PlainGenerator(nn.Module):
    def __init__(self, img_size, channels, latent_dim):
        super().__init__()
        self.size = img_size // 4
        self.first = nn.Linear(latent_dim, 128 * self.size**2)
        self.rest = nn.Sequential(
            nn.Upsample(scale_factor=2),
            nn.Conv2d(128, 128, 3, stride=1, padding=1),
            nn.BatchNorm2d(128, 0.8),
            nn.LeakyReLU(0.2),
            nn.Upsample(scale_factor=2),
            nn.Conv2d(128, 64, 3, stride=1, padding=1),
            nn.BatchNorm2d(64, 0.8),
            nn.LeakyReLU(0.2),
            nn.Conv2d(64, channels, 3, stride=1, padding=1),
            nn.Tanh(),
        )

    def forward(self, z):
        return self.rest(self.first(z).view(-1, 128, self.size, self.size))


class PlainDiscriminator(nn.Module):
    def __init__(self, img_size, channels):
        super().__init__()
        self.size = img_size // 2
        self.down = nn.Sequential(nn.Conv2d(channels, 64, 3, 2, 1), nn.ReLU())
        self.embed = nn.Linear(64 * self.size**2, 32)
        self.up = nn.Sequential(
            nn.BatchNorm1d(32, 0.8),
            nn.ReLU(),
            nn.Linear(32, 64 * self.size**2),
            nn.BatchNorm1d(64 * self.size**2),
            nn.ReLU(),
        )
        self.last = nn.Sequential(
            nn.Upsample(scale_factor=2), nn.Conv2d(64, channels, 3, 1, 1)
        )

    def forward(self, imgs):
        embedding = self.embed(self.down(imgs).flatten(1))
        recon = self.up(embedding).view(len(imgs), 64, self.size, self.size)
        return self.last(recon), embedding


def twins(ours, plain):
    """Return both networks in float64, with the weights of the first in the second."""
    ours, plain = ours.double(), plain.double()
    pairs = list(zip(ours.parameters(), plain.parameters(), strict=True))
    for mine, theirs in pairs:
        assert mine.shape == theirs.shape
        theirs.data.copy_(mine.data)
    return ours, plain, pairs


sizes = pytest.mark.parametrize(
    ("img_size", "channels"), [(8, 1), (12, 3), (32, 1), (64, 3)]
)


@sizes
def test_generator_equals_upsampling_and_convolution(img_size, channels):
    mine, plain, pairs = twins(
        ebgan.Generator(img_size, channels, 10), PlainGenerator(img_size, channels, 10)
    )
    z = torch.randn(3, 10, dtype=torch.float64)
    weights = torch.randn(3, channels, img_size, img_size, dtype=torch.float64)
    one, two = mine(z), plain(z)
    assert one.shape == (3, channels, img_size, img_size)
    assert one.abs().max() <= 1
    torch.testing.assert_close(one, two, rtol=0, atol=1e-10)
    (one * weights).sum().backward()
    (two * weights).sum().backward()
    for a, b in pairs:
        torch.testing.assert_close(a.grad, b.grad, rtol=1e-8, atol=1e-8)


@sizes
def test_discriminator_equals_the_plain_auto_encoder(img_size, channels):
    mine, plain, pairs = twins(
        ebgan.Discriminator(img_size, channels), PlainDiscriminator(img_size, channels)
    )
    imgs = torch.rand(4, channels, img_size, img_size, dtype=torch.float64) * 2 - 1
    copies = [imgs.clone().requires_grad_() for _ in range(2)]
    for network, x in zip((mine, plain), copies):
        recon, embedding = network(x)
        assert recon.shape == imgs.shape
        assert embedding.shape == (4, 32)
        ((recon - x).square().mean() + embedding.square().mean()).backward()
    torch.testing.assert_close(mine(imgs)[0], plain(imgs)[0], rtol=0, atol=1e-10)
    torch.testing.assert_close(mine(imgs)[1], plain(imgs)[1], rtol=0, atol=1e-10)
    torch.testing.assert_close(copies[0].grad, copies[1].grad, rtol=1e-8, atol=1e-10)
    for a, b in pairs:
        torch.testing.assert_close(a.grad, b.grad, rtol=1e-8, atol=1e-10)


@pytest.mark.parametrize("shape", [(2, 5, 1, 1), (2, 5, 3, 7), (1, 5, 8, 8)])
def test_upsample_conv_equals_upsampling_then_convolution(shape):
    layer = ebgan.UpsampleConv2d(5, 3).double()
    x = torch.randn(shape, dtype=torch.float64)
    large = nn.functional.interpolate(x, scale_factor=2, mode="nearest")
    expected = nn.functional.conv2d(large, layer.weight, layer.bias, padding=1)
    torch.testing.assert_close(layer(x), expected, rtol=0, atol=1e-12)


def test_weights_start_as_the_listing_has_them():
    torch.manual_seed(0)
    for network in (ebgan.Generator(), ebgan.Discriminator()):
        for module in network.modules():
            if isinstance(module, nn.Conv2d):
                assert module.weight.std().item() == pytest.approx(0.02, rel=0.2)
                assert abs(module.weight.mean().item()) < 0.005
            elif isinstance(module, nn.BatchNorm2d):
                assert module.weight.mean().item() == pytest.approx(1, abs=0.01)
                assert module.weight.std().item() == pytest.approx(0.02, rel=0.3)
                assert module.bias.abs().max().item() == 0
            elif isinstance(module, nn.Linear):  # torch's default: uniform
                bound = module.in_features**-0.5
                assert module.weight.abs().max().item() <= bound
                assert module.weight.std().item() == pytest.approx(
                    bound / 3**0.5, rel=0.1
                )


# ------------------------------------------------------------------------ evaluation


def test_score_of_a_case_worked_out_by_hand():
    # two images, two classes: p(y|x) = (0.9, 0.1) and (0.3, 0.7), so p(y) = (0.6, 0.4)
    probs = torch.tensor([[0.9, 0.1], [0.3, 0.7]], dtype=torch.float64)
    features = torch.zeros(2, 3, dtype=torch.float64)
    score, frechet, classes = ebgan.evaluate(probs.log(), features, features)
    one = 0.6 * math.log(0.6 / 0.9) + 0.4 * math.log(0.4 / 0.1)
    two = 0.6 * math.log(0.6 / 0.3) + 0.4 * math.log(0.4 / 0.7)
    assert score == pytest.approx((one + two) / 2, rel=1e-9)
    assert frechet == pytest.approx(0, abs=1e-9)
    assert classes == 2


def test_frechet_distance_of_gaussians_with_diagonal_covariance():
    # then it is |m - m'|^2 + sum (s - s')^2; the points have exactly these moments
    def points(means, stds):
        signs = itertools.product((-1, 1), repeat=3)
        points = torch.tensor(list(signs), dtype=torch.float64) * (7 / 8) ** 0.5
        return points * torch.tensor(stds) + torch.tensor(means)

    one = points([1.0, 2.0, 3.0], [1.0, 0.5, 2.0])
    two = points([0.0, 2.5, 3.0], [0.2, 0.5, 1.0])
    probs = torch.full((8, 2), 0.5, dtype=torch.float64).log()
    expected = 1 + 0.25 + 0.8**2 + 0 + 1
    assert ebgan.evaluate(probs, one, two)[1] == pytest.approx(expected, rel=1e-6)
    assert ebgan.evaluate(probs, two, one)[1] == pytest.approx(expected, rel=1e-6)


def test_classes_below_one_percent_do_not_count():
    log_probs = torch.full((1000, 3), -30.0, dtype=torch.float64)
    log_probs[:, 0] = -1e-12
    log_probs[:9, 0], log_probs[:9, 1] = -30, -1e-12
    features = torch.randn(1000, 2, dtype=torch.float64)
    assert ebgan.evaluate(log_probs, features, features)[2] == 1
    log_probs[9, 0], log_probs[9, 1] = -30, -1e-12
    score, _, classes = ebgan.evaluate(log_probs, features, features)
    assert classes == 2
    assert 0 < score < 1  # a collapse to one class scores next to nothing


# ---------------------------------------------------------------------------- data


def test_digits_are_ten_classes_and_a_function_of_the_seed():
    imgs, labels = ebgan.synthetic_digits(500, 32, seed=3)
    assert imgs.shape == (500, 1, 32, 32)
    assert imgs.dtype == torch.uint8
    assert labels.dtype == torch.int64
    assert labels.bincount().min() > 20
    assert len(labels.bincount()) == 10
    assert (imgs.flatten(1).amax(1) > 150).all()  # no picture is empty
    assert (imgs[:, :, [0, -1]] < 128).all()  # and no digit is cut off
    again, _ = ebgan.synthetic_digits(500, 32, seed=3)
    other, _ = ebgan.synthetic_digits(500, 32, seed=4)
    assert torch.equal(imgs, again)
    assert not torch.equal(imgs, other)
    for size in (8, 20, 128):
        assert ebgan.synthetic_digits(3, size, seed=0)[0].shape == (3, 1, size, size)


def options(*argv):
    return ebgan.parse_args([str(x) for x in argv])


def write_mnist(root, n):
    """Write n images of brightness 10 * label, in the layout that torchvision reads."""
    raw = Path(root, "MNIST", "raw")
    raw.mkdir(parents=True)
    for part in ("train", "t10k"):
        labels = np.arange(n, dtype=np.uint8) % 10
        imgs = np.repeat(10 * labels, 28 * 28).astype(np.uint8)
        head = np.array([2051, n, 28, 28], dtype=">i4").tobytes()
        (raw / f"{part}-images-idx3-ubyte").write_bytes(head + imgs.tobytes())
        head = np.array([2049, n], dtype=">i4").tobytes()
        (raw / f"{part}-labels-idx1-ubyte").write_bytes(head + labels.tobytes())


@pytest.mark.parametrize("channels", [1, 3])
def test_mnist_on_disk_is_found_without_a_flag(tmp_path, channels):
    write_mnist(tmp_path / "data", 50)
    opt = options("--data_root", tmp_path / "data", "--channels", channels)
    imgs, labels, held_imgs, _ = ebgan.load_images(opt)
    assert opt.dataset == "mnist"
    assert imgs.shape == held_imgs.shape == (50, channels, 32, 32)
    assert imgs.dtype == torch.uint8
    assert torch.equal(labels, torch.arange(50) % 10)
    assert torch.equal(imgs, (10 * labels).view(-1, 1, 1, 1).expand_as(imgs))


def test_without_mnist_the_digits_are_taken_and_nothing_is_left(
    tmp_path, monkeypatch, capsys
):
    monkeypatch.chdir(tmp_path)

    def refuse(*_args):
        raise OSError("no network")

    monkeypatch.setattr(socket, "getaddrinfo", refuse)
    opt = options()
    imgs, labels, held_imgs, held_labels = ebgan.load_images(opt)
    assert opt.dataset == "digits"
    assert opt.channels == 1
    assert len(imgs) == len(labels) > len(held_imgs) == len(held_labels)
    assert "built-in digits" in capsys.readouterr().out
    assert not any(tmp_path.iterdir())
    with pytest.raises(ValueError, match="kmnist"):
        ebgan.load_images(options("--dataset", "kmnist"))


def test_folder_of_colour_pictures_with_classes(tmp_path):
    draw_pictures(tmp_path, 40, (20, 12), "RGB", ("cat", "dog"))
    Path(tmp_path, ".hidden").mkdir()
    Path(tmp_path, ".hidden", "x.png").write_text("not a picture")
    opt = options("--dataset", "folder", "--data_root", tmp_path, "--img_size", 8)
    imgs, labels, held_imgs, held_labels = ebgan.load_images(opt)
    assert opt.channels == 3
    assert imgs.shape == (36, 3, 8, 8)
    assert held_imgs.shape == (4, 3, 8, 8)
    assert torch.cat([labels, held_labels]).bincount().tolist() == [20, 20]


def test_folder_keeps_the_pixels_of_grey_pictures_and_is_decoded_once(tmp_path):
    draw_pictures(tmp_path, 12)
    flags = ("--dataset", "folder", "--data_root", tmp_path, "--img_size", 8)
    imgs, *rest = ebgan.load_images(options(*flags))
    assert imgs.shape == (12, 1, 8, 8)
    assert rest == [None, None, None]
    files = [np.asarray(Image.open(file)) for file in tmp_path.glob("*.png")]
    assert sorted(x.tobytes() for x in files) == sorted(
        x.numpy().tobytes() for x in imgs
    )
    cache = next(tmp_path.glob(".ebgan_cache/*"))
    stamp = cache.stat().st_mtime_ns
    ebgan.load_images(options(*flags))
    assert cache.stat().st_mtime_ns == stamp
    draw_pictures(tmp_path, 13)  # another picture: another cache
    assert len(ebgan.load_images(options(*flags))[0]) == 13


def test_pictures_of_other_kinds_are_read_as_they_look(tmp_path):
    ramp = np.arange(0, 65536, 1024, dtype=np.uint16).reshape(8, 8)
    clear = np.zeros((8, 8, 4), dtype=np.uint8)  # black, and clear but for one pixel
    clear[0, 0, 3] = 255
    turned = Image.fromarray((ramp >> 8).astype(np.uint8))
    exif = turned.getexif()
    exif[274] = 3  # to be shown upside down
    for name, img, expected in (
        ("deep", Image.fromarray(ramp), ramp // 257),
        ("clear", Image.fromarray(clear), 255 - clear[:, :, 3]),
        ("turned", turned, (ramp >> 8)[::-1, ::-1]),
    ):
        (tmp_path / name).mkdir()
        img.save(tmp_path / name / "x.png", exif=exif if name == "turned" else b"")
        (tmp_path / name / "loop").symlink_to(".")
        flags = ("--data_root", tmp_path / name, "--img_size", 8, "--channels", 1)
        imgs = ebgan.load_images(options("--dataset", "folder", *flags))[0]
        assert len(imgs) == 1
        assert np.array_equal(imgs[0, 0].numpy(), expected), name


def test_to_float_maps_bytes_to_minus_one_to_one():
    imgs = torch.tensor([0, 255, 51], dtype=torch.uint8).view(3, 1, 1, 1)
    values = ebgan.to_float(imgs, torch.tensor([2, 0, 1]), "cpu")
    torch.testing.assert_close(values.flatten(), torch.tensor([-0.6, -1.0, 1.0]))


# --------------------------------------------------------------------- the contract


def definitions(script):
    """Return {name: source} of every function, class and constant at the top level."""
    source = (HERE / f"{script}.py").read_text()
    found = {}
    for node in ast.parse(source).body:
        if isinstance(node, ast.FunctionDef | ast.ClassDef):
            found[node.name] = ast.get_source_segment(source, node)
        elif isinstance(node, ast.Assign):
            found[node.targets[0].id] = ast.get_source_segment(source, node)
    return found


@pytest.mark.parametrize(
    ("one", "two", "differ"),
    [
        ("ebgan", "ebgan_pt", {"parse_args", "train"}),
        ("ebgan_pt", "ebgan_margin_ablation", {"parse_args", "main", "CHECKPOINT"}),
    ],
)
def test_shared_definitions_are_identical_to_the_letter(one, two, differ):
    first, second = definitions(one), definitions(two)
    assert first.keys() - second.keys() == set()
    assert second.keys() - first.keys() <= {"sweep", "SHOWN"}
    assert {name for name in first if first[name] != second[name]} == differ
    public = (
        "synthetic_digits load_images UpsampleConv2d Generator Discriminator energy"
    )
    public += " discriminator_loss pullaway_loss evaluate train main parse_args"
    assert set(public.split()) <= first.keys()


@pytest.mark.parametrize(
    ("one", "two", "limit"),
    [("ebgan", "ebgan_pt", 24), ("ebgan_pt", "ebgan_margin_ablation", 110)],
)
def test_diff_shows_the_variant_and_little_else(one, two, limit):
    texts = [(HERE / f"{x}.py").read_text().splitlines() for x in (one, two)]
    lines = list(difflib.unified_diff(*texts, n=0, lineterm=""))[2:]
    changed = [line for line in lines if not line.startswith("@@")]
    assert len(changed) <= limit, "\n".join(changed)


def test_generator_loss_is_the_only_difference_of_the_training():
    one, two = definitions("ebgan")["train"], definitions("ebgan_pt")["train"]
    plain = "loss_g = energy(recon, gen_imgs).mean()\n"
    assert one.count(plain) == 1
    expected = one.replace(plain, plain[:-1] + " + opt.lambda_pt * pullaway\n")
    assert two == expected


def test_import_has_no_effect_whatever_argv_holds(tmp_path):
    script = "; ".join(f"import {name}" for name in NAMES)
    code = f"import sys; sys.path.insert(0, {str(HERE)!r}); sys.argv[:] = []; {script}"
    env = os.environ | {"PYTHONDONTWRITEBYTECODE": "1"}
    done = subprocess.run(
        [sys.executable, "-c", code],
        check=False,
        cwd=tmp_path,
        env=env,
        capture_output=True,
    )
    assert (done.returncode, done.stdout, done.stderr) == (0, b"", b"")
    assert not any(tmp_path.iterdir())


@each_module
def test_help_names_every_flag_with_its_default(module, capsys):
    with pytest.raises(SystemExit) as end:
        module.main(["--help"])
    assert end.value.code == 0
    text = " ".join(capsys.readouterr().out.split())
    for flag in vars(module.parse_args([])).keys() - {"script", "nproc_per_node"}:
        if flag not in ("margin", "seed") or module is not ebgan_margin_ablation:
            assert f"--{flag} " in text
    defaults = {"n_epochs": 200, "batch_size": 64, "lr": 1e-3, "b1": 0.5, "b2": 0.999}
    defaults |= {"img_size": 32, "sample_interval": 400, "latent_dim": 62}
    for name, default in defaults.items():
        assert getattr(module.parse_args([]), name) == default
        assert re.search(rf"--{name} {name.upper()} [^\[]*\[{default:g}\]", text)


# ------------------------------------------------------------------------ whole runs


@each_script
def test_script_trains_on_the_built_in_digits(script, tmp_path):
    flags = ["--n_epochs", 200, "--batch_size", 64, "--max_steps", 2, "--n_eval", 100]
    margins = ["--margins", 0.5, "--seeds", 3] if script == NAMES[2] else []
    size = 16 if script == "ebgan" else 8  # small images: the classifier is quicker
    flags += ["--img_size", size]
    env = {"http_proxy": "http://127.0.0.1:9", "OMP_NUM_THREADS": "2"}
    done = run(script, *flags, *margins, cwd=tmp_path, env=env)
    assert "built-in digits" in done.out
    assert "images/s" in done.out
    assert "left" in done.out
    assert "held-out images right" in done.out
    home = tmp_path / "runs" / script
    folder = home / "margin_0.5/seed_3" if margins else home
    row = read_log(folder)[-1]
    assert row["step"] == "2"
    for name in ("real_energy", "fake_energy", "score", "real_frechet"):
        assert math.isfinite(float(row[name]))
    assert float(row["real_classes"]) == 10
    for name in ("samples.png", "samples/2.png"):
        assert Image.open(folder / name).size == (8 * size + 18, 8 * size + 18)
    assert load(folder / "checkpoint.pt")["step"] == 2

    run(script, "--generate", 3, "--resume", home, "--out_dir", "pics", cwd=tmp_path)
    assert sorted(file.name for file in (tmp_path / "pics").iterdir()) == [
        *("00000.png", "00001.png", "00002.png", "grid.png")
    ]
    assert Image.open(tmp_path / "pics/00001.png").size == (size, size)


def test_it_learns(tmp_path):
    (tmp_path / "digits").mkdir()
    for i, img in enumerate(ebgan.synthetic_digits(640, 16, seed=0)[0]):
        Image.fromarray(img[0].numpy()).save(tmp_path / f"digits/{i}.png")
    flags = ["--dataset", "folder", "--data_root", "digits", "--img_size", 16]
    flags += ["--batch_size", 32, "--lr", 1e-3, "--max_steps", 160]
    run("ebgan_pt", *flags, cwd=tmp_path, env={"OMP_NUM_THREADS": "2"})
    log = read_log(tmp_path / "runs/ebgan_pt")
    energies = [float(row["real_energy"]) for row in log]
    assert energies[-1] < 0.8 * energies[0]
    torch.manual_seed(0)
    start = ebgan.Generator(16)
    trained = ebgan.Generator(16)
    trained.load_state_dict(load(tmp_path / "runs/ebgan_pt/checkpoint.pt")["generator"])
    z = torch.randn(64, 62)
    before, after = ebgan.sample(start, z), ebgan.sample(trained, z)
    assert (before - after).abs().mean() > 0.2
    assert after.std(0).mean() > 0.05  # the pictures differ from each other
    assert torch.equal(ebgan.sample(trained, z[:1]), ebgan.sample(trained, z[:1]))


def test_first_step_is_adam_on_the_equations(tmp_path, tiny):
    """One step of the script against the same step on plain layers in float64."""
    for script, weight in (("ebgan", 0.0), ("ebgan_pt", 0.1)):
        # a small rate: where a gradient is rounding, float32 and float64 step apart by it
        flags = ["--max_steps", 1, "--margin", 0.7, "--lr", 2e-4]
        run(script, *tiny, *flags, cwd=tmp_path)
        saved = load(tmp_path / f"runs/{script}/checkpoint.pt")
        torch.manual_seed(0)
        networks = ebgan.Generator(8), ebgan.Discriminator(8)
        _, plain_g, pairs_g = twins(networks[0], PlainGenerator(8, 1, 62))
        _, plain_d, pairs_d = twins(networks[1], PlainDiscriminator(8, 1))
        opt = options(*tiny)
        imgs = ebgan.load_images(opt)[0]
        order = torch.randperm(40, generator=ebgan.rng(0, 0, 0))
        real = imgs[order[:4]].double() / 127.5 - 1
        z = torch.randn(4, 62, generator=ebgan.rng(0, 1, 1, 0)).double()
        fake = plain_g(z)
        loss = 0.0
        for x, sign in ((real, 1), (fake.detach(), -1)):
            recon, _ = plain_d(x)
            for u in (recon - x).square().mean((1, 2, 3)):
                loss = loss + (u if sign > 0 else (0.7 - u).clamp(min=0)) / 4
        loss.backward()
        with torch.no_grad():  # Adam's first step is lr * sign of the gradient
            for _, p in pairs_d:
                p -= 2e-4 * p.grad / (p.grad.abs() + 1e-8)
        recon, embedding = plain_d(fake)
        loss = (recon - fake).square().mean()
        cos = torch.nn.functional.cosine_similarity(
            embedding[:, None], embedding, dim=2
        )
        loss = loss + weight * (cos.square().sum() - 4) / 12
        plain_g.zero_grad()
        loss.backward()
        state = saved["optimizer_g"]["state"]
        for i, (_, p) in enumerate(pairs_g):  # exp_avg is (1 - b1) times the gradient
            moment = state[i]["exp_avg"].double()
            atol = 1e-3 * p.grad.abs().max().item() + 1e-7
            torch.testing.assert_close(2 * moment, p.grad, rtol=1e-2, atol=atol)


def test_running_mean_is_that_of_tensorflow_with_num_updates():
    values = torch.randn(9500, 2, generator=torch.Generator().manual_seed(0)).double()
    mean, shares = values[0], np.ones(1)
    for n in range(1, len(values)):
        mean = ebgan.running_mean(mean, values[n], torch.tensor(n))
        decay = min(0.999, (1 + n) / (10 + n))
        shares = np.append(shares * decay, 1 - decay)
        if n in (1, 100, 8000, 9499):
            expected = torch.from_numpy(shares) @ values[: n + 1]
            torch.testing.assert_close(mean, expected, rtol=1e-4, atol=1e-5)


def test_what_is_shown_is_the_mean_of_the_generator(tmp_path, tiny):
    states, argv = [], [*tiny, "--lr", 0.01]
    for step in (1, 2, 3, 4):
        run("ebgan_pt", *argv, "--max_steps", step, cwd=tmp_path)
        saved, argv = load(tmp_path / "runs/ebgan_pt/checkpoint.pt"), ["--resume"]
        states.append(saved["generator"])
    generator = ebgan.Generator(8)
    shares = (
        2 / 11 * 3 / 12 * 4 / 13,
        9 / 11 * 3 / 12 * 4 / 13,
        9 / 12 * 4 / 13,
        9 / 13,
    )
    mean = {
        key: sum(a * x[key].double() for a, x in zip(shares, states, strict=True))
        for key in states[0]
    }
    generator.load_state_dict(mean)
    for key, value in generator.state_dict().items():
        if value.is_floating_point():  # all but batch norm's count of the steps
            torch.testing.assert_close(saved["averaged"]["module." + key], value)
    run("ebgan_pt", "--generate", 64, "--out_dir", "pics", cwd=tmp_path)
    for name, place, key in (("runs/ebgan_pt/samples", 2, 2), ("pics/00000", 0, 4)):
        with Image.open(tmp_path / f"{name}.png") as picture:
            shown = np.asarray(picture)[place:, place:, 0][:8, :8]
        z = torch.randn(64, 62, generator=ebgan.rng(0, key))[:1]
        expected = ebgan.sample(generator, z)[0, 0] * 127.5 + 127.5
        assert np.abs(shown - expected.numpy()).max() <= 1


def test_amp_trains_in_colour_at_another_size(tmp_path):
    draw_pictures(tmp_path / "in", 20, (30, 40), "RGB")
    flags = ["--dataset", "folder", "--data_root", "in", "--img_size", 12, "--amp"]
    done = run("ebgan_pt", *flags, "--batch_size", 5, "--max_steps", 3, cwd=tmp_path)
    if platform.machine() == "x86_64":
        slow = torch.backends.cpu.get_cpu_capability() in ("DEFAULT", "AVX2")
        assert ("far slower" in done.out) == slow
    saved = load(tmp_path / "runs/ebgan_pt/checkpoint.pt")
    floats = [x for x in tensors(saved).values() if torch.is_tensor(x)]
    assert all(x.isfinite().all() for x in floats)
    assert {x.dtype for x in floats} == {torch.float32, torch.int64}
    done = run("ebgan_pt", "--resume", "--max_steps", 4, cwd=tmp_path)
    assert "no score" in done.out


def test_sweep_compares_margins_from_one_start(tmp_path, tiny):
    flags = ["--margins", 0, 0.1, 9, "--seeds", 0, 5, "--max_steps", 12, "--lr", 0.01]
    done = run("ebgan_margin_ablation", *tiny, *flags, cwd=tmp_path)
    home = tmp_path / "runs/ebgan_margin_ablation"
    with open(home / "results.csv", newline="") as file:
        rows = list(csv.DictReader(file))
    assert [(row["margin"], row["seed"]) for row in rows] == [
        (margin, seed) for margin in ("0", "0.1", "9") for seed in ("0", "5")
    ]
    for row in rows:
        last = read_log(home / f"margin_{row['margin']}/seed_{row['seed']}")[-1]
        assert row["real_energy"] == last["real_energy"]
    firsts = [
        float(read_log(home / f"margin_{margin}/seed_0")[0]["real_energy"])
        for margin in ("0", "0.1", "9")
    ]
    assert len(set(firsts)) > 1  # the margin matters
    # the table holds mean and standard deviation over the seeds
    pair = [float(row["real_energy"]) for row in rows[:2]]
    text = f"{np.mean(pair):.4g} +- {np.std(pair):.2g}"
    assert text.split()[0] in done.out
    sheet = Image.open(home / "margins.png")
    assert sheet.size == (100 + 12 * 10 + 2, 3 * 10 + 2)
    labels = np.asarray(sheet)[:, :100]
    assert (labels > 128).any(axis=(1, 2))[:10].any()

    stamps = {path: path.stat().st_mtime_ns for path in home.glob("*/*/checkpoint.pt")}
    run("ebgan_margin_ablation", "--resume", "--margins", 0, 9, 1, cwd=tmp_path)
    assert all(path.stat().st_mtime_ns == stamp for path, stamp in stamps.items())
    assert (home / "margin_1/seed_5/checkpoint.pt").exists()


# ------------------------------------------------------------- resuming and failing


@each_script
def test_resumed_run_is_the_uninterrupted_run_bit_for_bit(script, tmp_path, tiny):
    one = ["--margins", 1, "--seeds", 0] if script == NAMES[2] else []
    part = "margin_1/seed_0/checkpoint.pt" if one else "checkpoint.pt"
    tiny = [*tiny, *one, "--out_dir"]
    whole = Run(script, *tiny, "whole", "--max_steps", 33, cwd=tmp_path)
    run(script, *tiny, "parts", "--max_steps", 13, cwd=tmp_path)
    run(script, "--resume", "parts", "--max_steps", 24, cwd=tmp_path)
    run(script, "--resume", f"parts/{part}", "--max_steps", 33, cwd=tmp_path)
    assert whole.wait().status == 0
    assert_same_run(tmp_path / "whole" / part, tmp_path / "parts" / part)
    logs = [(tmp_path / x / part).parent for x in ("whole", "parts")]
    steps = [[row["step"] for row in read_log(folder)] for folder in logs]
    assert steps[0] == steps[1] == ["10", "20", "30", "33"]


def test_resumed_run_has_the_scores_of_the_uninterrupted_run(tmp_path):
    draw_pictures(tmp_path / "in", 60, classes=("cat", "dog"))
    flags = ["--dataset", "folder", "--data_root", "in", "--img_size", 8]
    flags += ["--batch_size", 10, "--n_eval", 50, "--out_dir"]
    whole = Run("ebgan_pt", *flags, "whole", "--max_steps", 12, cwd=tmp_path)
    run("ebgan_pt", *flags, "parts", "--max_steps", 7, cwd=tmp_path)
    run("ebgan_pt", "--resume", "parts", "--max_steps", 12, cwd=tmp_path)
    assert whole.wait().status == 0
    assert_same_run(tmp_path / "whole/checkpoint.pt", tmp_path / "parts/checkpoint.pt")
    log = read_log(tmp_path / "parts")
    assert [row["step"] for row in log] == ["5", "10", "12"]
    assert all(float(row["frechet"]) > 0 for row in log)


@pytest.mark.parametrize("seed", [0, 1, 2])
def test_killed_at_any_moment_the_run_ends_the_same(seed, tmp_path, tiny):
    moments = random.Random(seed)
    flags = [*tiny, "--sample_interval", 1, "--max_steps", 40, "--out_dir"]
    whole = Run("ebgan", *flags, "whole", cwd=tmp_path)
    killed, argv = 0, [*flags, "killed"]
    while True:
        part = Run("ebgan", *argv, cwd=tmp_path)
        if killed < 3:
            while not (tmp_path / "killed/checkpoint.pt").exists():
                time.sleep(0.001)
            time.sleep(moments.uniform(0.05, 0.6) if killed else 0.02)
            os.kill(part.process.pid, signal.SIGKILL)
        part.wait()
        if part.status != -signal.SIGKILL:
            break
        killed, argv = killed + 1, ["--resume", "killed"]
    assert part.status == 0, part.err
    assert whole.wait().status == 0
    assert killed >= 2
    assert_same_run(tmp_path / "whole/checkpoint.pt", tmp_path / "killed/checkpoint.pt")


@pytest.mark.parametrize("signum", [signal.SIGINT, signal.SIGTERM])
@each_script
def test_signal_ends_the_run_with_a_checkpoint(script, signum, tmp_path, tiny):
    one = ["--margins", 1, "--seeds", 0] if script == NAMES[2] else []
    part = "margin_1/seed_0/checkpoint.pt" if one else "checkpoint.pt"
    flags = [*tiny, *one, "--sample_interval", 100000, "--max_steps", 100000]
    going = Run(script, *flags, "--out_dir", "run", cwd=tmp_path)
    log = (tmp_path / "run" / part).with_name("log.csv")
    while not log.exists() or len(log.read_text().splitlines()) < 2:
        assert going.process.is_alive(), going.wait().err
        time.sleep(0.01)
    os.kill(going.process.pid, signum)
    going.wait()
    assert going.status == 128 + signum, going.err
    assert going.err == ""
    saved = load(tmp_path / "run" / part)
    assert f"stopped at step {saved['step']}" in going.out
    run(script, "--resume", "run", "--max_steps", saved["step"] + 1, cwd=tmp_path)
    assert load(tmp_path / "run" / part)["step"] == saved["step"] + 1


def test_no_run_is_overwritten(tmp_path, tiny):
    for _ in range(3):
        run("ebgan", *tiny, "--max_steps", 1, cwd=tmp_path)
    names = sorted(path.name for path in (tmp_path / "runs").iterdir())
    assert names == ["ebgan", "ebgan-2", "ebgan-3"]
    done = run("ebgan", *tiny, "--out_dir", "runs/ebgan", cwd=tmp_path, status=2)
    assert "--resume runs/ebgan" in done.err
    run("ebgan", "--resume", "--max_steps", 2, cwd=tmp_path)  # the newest
    steps = [load(tmp_path / f"runs/{x}/checkpoint.pt")["step"] for x in names]
    assert steps == [1, 1, 2]
    Path(tmp_path, "runs/ebgan_pt").mkdir()
    done = run("ebgan_pt", "--resume", cwd=tmp_path, status=2)  # not ebgan's run
    assert "no checkpoint.pt" in done.err


@each_script
def test_only_the_checkpoint_of_a_run_is_resumed(script, tmp_path, tiny):
    one = ["--margins", 1, "--seeds", 0] if script == NAMES[2] else []
    part = "margin_1/seed_0/checkpoint.pt" if one else "checkpoint.pt"
    run(script, *tiny, *one, "--out_dir", "x", "--max_steps", 1, cwd=tmp_path)
    copy = tmp_path / "x" / part.replace("checkpoint", "copy")
    copy.write_bytes((tmp_path / "x" / part).read_bytes())
    done = run(script, "--resume", copy, cwd=tmp_path, status=2)
    assert str(copy) in done.err
    run(script, "--resume", copy, "--generate", 1, cwd=tmp_path)
    assert (copy.parent / "generated/grid.png").exists()
    run(script, "--resume", copy.parent, "--max_steps", 2, cwd=tmp_path)
    assert load(tmp_path / "x" / part)["step"] == 2


def test_run_can_be_resumed_before_its_first_step(tmp_path, tiny):
    going = Run("ebgan", *tiny, "--out_dir", "x", "--max_steps", 5, cwd=tmp_path)
    while not (tmp_path / "x/checkpoint.pt").exists():
        time.sleep(0.001)
    os.kill(going.process.pid, signal.SIGKILL)
    going.wait()
    run("ebgan", "--resume", "x", cwd=tmp_path)
    run("ebgan", *tiny, "--out_dir", "y", "--max_steps", 5, cwd=tmp_path)
    assert_same_run(tmp_path / "x/checkpoint.pt", tmp_path / "y/checkpoint.pt")


def test_loss_that_is_not_finite_names_its_step(tmp_path, tiny):
    run("ebgan", *tiny, "--out_dir", "x", "--max_steps", 4, cwd=tmp_path)
    saved = load(tmp_path / "x/checkpoint.pt")
    saved["optimizer_g"]["param_groups"][0]["lr"] = 1e38
    saved["optimizer_d"]["param_groups"][0]["lr"] = 1e38
    torch.save(saved, tmp_path / "x/checkpoint.pt")
    before = (tmp_path / "x/checkpoint.pt").read_bytes()
    done = run("ebgan", "--resume", "x", "--max_steps", 90, cwd=tmp_path, status=2)
    assert len(done.err.splitlines()) == 1
    assert "not finite at step 5" in done.err or "not finite at step 6" in done.err
    assert (tmp_path / "x/checkpoint.pt").read_bytes() == before


def test_full_disk_keeps_the_last_checkpoint(tmp_path, tiny):
    run("ebgan", *tiny, "--out_dir", "x", "--max_steps", 7, cwd=tmp_path)
    before = (tmp_path / "x/checkpoint.pt").read_bytes()
    flags = ["--resume", "x", "--max_steps", 20]
    done = run("ebgan", *flags, cwd=tmp_path, status=2, file_limit=len(before) // 2)
    assert len(done.err.splitlines()) == 1
    assert "checkpoint.pt" in done.err
    assert (tmp_path / "x/checkpoint.pt").read_bytes() == before
    assert not list((tmp_path / "x").glob("*.partial"))
    run("ebgan", *flags, cwd=tmp_path)


class Evil:
    def __reduce__(self):
        return (os.mkdir, ("evil",))


def test_damaged_and_foreign_checkpoints_are_refused(tmp_path, tiny):
    run("ebgan", *tiny, "--out_dir", "x", "--max_steps", 1, cwd=tmp_path)
    whole = (tmp_path / "x/checkpoint.pt").read_bytes()
    cases = {
        "cut": whole[: len(whole) // 2],
        "empty": b"",
        "text": b"hello",
        "evil": pickle.dumps({"options": Evil()}),
    }
    for name, content in cases.items():
        file = tmp_path / f"{name}.pt"
        file.write_bytes(content)
        done = run("ebgan", "--resume", file, cwd=tmp_path, status=2)
        assert len(done.err.splitlines()) == 1
        assert str(file) in done.err
        assert file.read_bytes() == content
    torch.save({"model": torch.zeros(3)}, tmp_path / "foreign.pt")
    torch.save({"options": {"script": Evil()}}, tmp_path / "evil2.pt")
    for name in ("foreign", "evil2"):
        run("ebgan", "--resume", f"{name}.pt", cwd=tmp_path, status=2)
    assert not (tmp_path / "evil").exists()


def test_resume_with_other_flags_names_what_differs(tmp_path, tiny):
    run("ebgan", *tiny, "--out_dir", "x", "--max_steps", 1, cwd=tmp_path)
    before = (tmp_path / "x/checkpoint.pt").read_bytes()
    flags = {"--img_size": 16, "--channels": 3, "--latent_dim": 5, "--batch_size": 8}
    flags |= {"--dataset": "digits", "--lr": 0.5, "--seed": 9, "--margin": 3.0}
    for flag, value in flags.items():
        done = run("ebgan", "--resume", "x", flag, value, cwd=tmp_path, status=2)
        assert len(done.err.splitlines()) == 1
        assert f"{flag} {value}" in done.err
    done = run("ebgan_pt", "--resume", "x", cwd=tmp_path, status=2)
    assert "--script ebgan_pt" in done.err
    assert (tmp_path / "x/checkpoint.pt").read_bytes() == before


# ------------------------------------------------------------------------- bad input

BAD = [
    ("--batch_size", "1"),
    ("--batch_size", "0"),
    ("--batch_size", "41"),
    ("--batch_size", "many"),
    ("--img_size", "30"),
    ("--img_size", "4"),
    ("--img_size", "-32"),
    ("--channels", "2"),
    ("--margin", "-1"),
    ("--margin", "nan"),
    ("--margin", "inf"),
    ("--lr", "0"),
    ("--lr", "-1e-3"),
    ("--lr", "nan"),
    ("--b1", "1"),
    ("--b2", "-0.1"),
    ("--n_epochs", "0"),
    ("--n_cpu", "-1"),
    ("--latent_dim", "0"),
    ("--sample_interval", "0"),
    ("--max_steps", "0"),
    ("--max_steps", "1.5"),
    ("--n_eval", "0"),
    ("--eval_interval", "-2"),
    ("--generate", "0"),
    ("--generate", "5"),
    ("--seed", "-1"),
    ("--seed", "99999999999999999999"),
    ("--dataset", "imagenet"),
    ("--device", "gpu"),
    ("--device", "cuda:99"),
    ("--device", "meta"),
    ("--data_root", "nowhere"),
    ("--data_root", "text"),
    ("--data_root", "broken"),
    ("--out_dir", "text/readme.txt/run"),
    ("--out_dir", "text/readme.txt"),
    ("--resume", "nowhere"),
    ("--resume", "text"),
    ("--resume", "text/readme.txt"),
    ("--resum", "x"),
    ("--n_epoch", "3"),
    ("surplus", ""),
]


@pytest.mark.parametrize(("flag", "value"), BAD, ids=[" ".join(bad) for bad in BAD])
def test_bad_input_is_one_line_and_status_2(flag, value, tmp_path, tiny):
    check_bad("ebgan", flag, [value], tmp_path, tiny)


@pytest.mark.parametrize(
    ("script", "flag", "values"),
    [
        ("ebgan_pt", "--lambda_pt", ["-0.1"]),
        ("ebgan_pt", "--lambda_pt", ["inf"]),
        ("ebgan_margin_ablation", "--margins", ["1", "-1"]),
        ("ebgan_margin_ablation", "--margins", []),
        ("ebgan_margin_ablation", "--margins", ["1", "2", "1.0"]),
        ("ebgan_margin_ablation", "--seeds", ["0", "x"]),
        ("ebgan_margin_ablation", "--margin", ["1"]),
    ],
)
def test_bad_input_of_the_variants(script, flag, values, tmp_path, tiny):
    check_bad(script, flag, values, tmp_path, tiny)


def check_bad(script, flag, values, tmp_path, tiny):
    Path(tmp_path, "text").mkdir()
    Path(tmp_path, "text/readme.txt").write_text("no picture")
    Path(tmp_path, "broken").mkdir()
    Path(tmp_path, "broken/x.png").write_text("no picture")
    before = sorted(tmp_path.rglob("*"))
    argv = [*tiny, flag, *values] if flag != "surplus" else [*tiny, flag]
    done = run(script, *argv, cwd=tmp_path, status=2)
    assert done.out == "" or values == ["41"]  # that takes a look at the data
    (line,) = done.err.splitlines()
    assert line.startswith(f"{script}.py: error: ")
    assert flag.lstrip("-") in line or "x.png" in line
    after = [path for path in sorted(tmp_path.rglob("*")) if "cache" not in str(path)]
    assert after == before


# -------------------------------------------------------------------- several devices


def ranks(script, *argv, cwd, world=2):
    """Start a script on several ranks, as torchrun does, and return the runs."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    env = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port, "WORLD_SIZE": world}
    runs = []
    for rank in range(world):
        folder = Path(cwd, f"rank{rank}")
        folder.mkdir(exist_ok=True)
        place = {"RANK": rank, "LOCAL_RANK": rank}
        env_here = {key: str(x) for key, x in (env | place).items()}
        runs.append(Run(script, *argv, cwd=folder, env=env_here))
    return runs


def test_two_ranks_average_the_gradients_of_their_halves(tmp_path, tiny):
    tiny = [*tiny, "--margin", 0.6, "--max_steps", 1]
    for rank in ranks("ebgan_pt", *tiny, "--out_dir", tmp_path / "x", cwd=tmp_path):
        assert rank.wait().status == 0, rank.err
        assert bool(rank.out) == (rank.cwd.name == "rank0")
    saved = load(tmp_path / "x/checkpoint.pt")
    imgs = ebgan.load_images(options(*tiny))[0]
    order = torch.randperm(40, generator=ebgan.rng(0, 0, 0))
    gradients = []
    for rank in range(2):
        torch.manual_seed(0)
        generator, discriminator = ebgan.Generator(8), ebgan.Discriminator(8)
        z = torch.randn(4, 62, generator=ebgan.rng(0, 1, 1, rank))
        real = ebgan.to_float(imgs, order[4 * rank : 4 * rank + 4], "cpu")
        fake = generator(z).detach()
        real_u = (discriminator(real)[0] - real).square().mean((1, 2, 3))
        fake_u = (discriminator(fake)[0] - fake).square().mean((1, 2, 3))
        (real_u.mean() + torch.relu(0.6 - fake_u).mean()).backward()
        gradients.append([p.grad for p in discriminator.parameters()])
    for i, (one, two) in enumerate(zip(*gradients)):
        moment = saved["optimizer_d"]["state"][i]["exp_avg"]
        torch.testing.assert_close(2 * moment, (one + two) / 2, rtol=1e-4, atol=1e-6)


def test_signal_ends_all_ranks_and_they_resume(tmp_path, tiny):
    flags = [*tiny, "--out_dir", tmp_path / "x"]
    both = ranks("ebgan", *flags, "--max_steps", 100000, cwd=tmp_path)
    log = tmp_path / "x/log.csv"
    while not log.exists() or len(log.read_text().splitlines()) < 2:
        assert all(rank.process.is_alive() for rank in both)
        time.sleep(0.01)
    os.kill(both[1].process.pid, signal.SIGTERM)  # one of them is enough
    assert [rank.wait().status for rank in both] == [143, 143]
    step = load(tmp_path / "x/checkpoint.pt")["step"]
    argv = ["--resume", tmp_path / "x", "--max_steps", step + 5]
    both = ranks("ebgan", *argv, cwd=tmp_path)
    assert [rank.wait().status for rank in both] == [0, 0]
    run("ebgan", *argv, cwd=tmp_path, status=2)  # one process would take other steps
    whole = ranks("ebgan", *tiny, "--max_steps", step + 5, "--out_dir", tmp_path / "y",
                  cwd=tmp_path)  # fmt: skip
    assert [rank.wait().status for rank in whole] == [0, 0]
    assert_same_run(tmp_path / "x/checkpoint.pt", tmp_path / "y/checkpoint.pt")


def test_torchrun_trains_on_two_processes(tmp_path, tiny):
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--nproc_per_node=2"]
    torchrun += ["--standalone", str(HERE / "ebgan.py")]
    argv = [*tiny, "--max_steps", 3, "--out_dir", tmp_path / "x"]
    env = os.environ | {"OMP_NUM_THREADS": "1"}
    done = subprocess.run(
        [*torchrun, *map(str, argv)],
        check=False,
        cwd=tmp_path,
        env=env,
        capture_output=True,
        timeout=120,
    )
    assert done.returncode == 0, done.stderr.decode()
    assert load(tmp_path / "x/checkpoint.pt")["step"] == 3
    assert load(tmp_path / "x/checkpoint.pt")["options"]["nproc_per_node"] == 2
