# SPDX-License-Identifier: MIT
"""Tests of the three scripts against oracles that share no code with them.

pytest test_ebgan.py
"""

import ast
import contextlib
import csv
import difflib
import io
import itertools
import math
import os
import re
import resource
import shutil
import signal
import socket
import subprocess
import sys
import threading
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from torch import nn
from torch.nn import functional as F

import ebgan
import ebgan_margin_ablation
import ebgan_pt

HERE = Path(__file__).parent
NAMES = ["ebgan", "ebgan_pt", "ebgan_margin_ablation"]
torch.set_num_threads(1)  # as in the processes below: another number rounds otherwise
close = torch.testing.assert_close


# ----------------------------------------------------------------------------- losses
@pytest.mark.parametrize("kind", ["norm", "mse"])
@pytest.mark.parametrize("shape", [(5, 1, 4, 4), (3, 3, 8, 4), (1, 1, 2, 2)])
def test_energy_is_the_error_of_each_image(shape, kind):
    recon, imgs = torch.randn(2, *shape, dtype=torch.float64).requires_grad_()
    values, size = ebgan.energy(recon, imgs, kind), math.prod(shape[1:])
    assert values.shape == shape[:1]
    for n in range(shape[0]):
        total = 0.0
        for c, h, w in itertools.product(*map(range, shape[1:])):
            total += (recon[n, c, h, w].item() - imgs[n, c, h, w].item()) ** 2
        expected = math.sqrt(total) if kind == "norm" else total / size
        assert values[n].item() == pytest.approx(expected)
    # the gradient goes through the reconstruction and through the image
    gradients = torch.autograd.grad(values.sum(), [recon, imgs])
    steep = 1 / values if kind == "norm" else torch.full(shape[:1], 2 / size)
    expected = ((recon - imgs) * steep.view(-1, 1, 1, 1)).detach()
    close(gradients, (expected, -expected))
    (gradient,) = torch.autograd.grad(ebgan.energy(recon, recon, kind).sum(), recon)
    assert not gradient.any()  # finite where the reconstruction is exact


@pytest.mark.parametrize("margin", [0, 0.5, 1.0, 7.0])
def test_discriminator_loss_has_a_hinge_for_every_sample(margin):
    real, fake = torch.rand(2, 6, dtype=torch.float64) * 2
    total = 0.0
    for r, f in zip(real.tolist(), fake.tolist()):
        total += r / 6 + max(0.0, margin - f) / 6
    assert ebgan.discriminator_loss(real, fake, margin).item() == pytest.approx(total)
    fake = torch.tensor([0.2, 3.0, 0.9], requires_grad=True)  # their mean is beyond 1
    ebgan.discriminator_loss(torch.zeros(3), fake, 1.0).backward()
    close(fake.grad, torch.tensor([-1 / 3, 0, -1 / 3]))


def slow_pullaway(embeddings):
    rows, total = embeddings.tolist(), 0.0
    for i, j in itertools.permutations(range(len(rows)), 2):  # all pairs i != j
        dot = sum(a * b for a, b in zip(rows[i], rows[j]))
        squares = [sum(a * a for a in rows[k]) for k in (i, j)]
        total += dot**2 / math.prod(squares)
    return total / (len(rows) * (len(rows) - 1))


@pytest.mark.parametrize(("n", "width"), [(2, 1), (2, 7), (5, 3), (17, 32)])
def test_pullaway_loss_equals_the_double_loop(n, width):
    embeddings = torch.randn(n, width, dtype=torch.float64) + 0.3
    value = ebgan.pullaway_loss(embeddings).item()
    assert value == pytest.approx(slow_pullaway(embeddings), rel=1e-10)


@pytest.mark.parametrize(
    ("expected", "rows"),
    [
        (1, "12 24 36"),
        (1 / 3, "10 10 01"),
        (1 / 6, "00 10 11"),
        (0, "34"),
        (0, "00 00"),
    ],
)
def test_pullaway_loss_worked_out_by_hand_has_a_finite_gradient(expected, rows):
    embeddings = torch.tensor([[float(x) for x in row] for row in rows.split()])
    value = ebgan.pullaway_loss(embeddings.requires_grad_())
    value.backward()
    assert value.item() == pytest.approx(expected)
    assert embeddings.grad.isfinite().all()


def test_losses_of_bfloat16_are_taken_in_float32():
    recon, imgs = torch.rand(2, 4, 1, 8, 8).bfloat16()
    exact = (recon.double() - imgs.double()).square().mean((1, 2, 3))
    embeddings = torch.randn(8, 32).bfloat16()
    pullaway = torch.tensor(slow_pullaway(embeddings))
    with torch.autocast("cpu", torch.bfloat16):
        for kind, value in (("mse", exact), ("norm", (64 * exact).sqrt())):
            close(ebgan.energy(recon, imgs, kind), value.float(), rtol=1e-6, atol=0)
        close(ebgan.pullaway_loss(embeddings.float()), pullaway, rtol=1e-5, atol=0)
    close(ebgan.pullaway_loss(embeddings), pullaway, rtol=1e-5, atol=0)


@pytest.mark.parametrize("margin", [0.3, 10])
def test_bound_is_the_total_variation_for_the_best_energy_alone(margin):
    # densities of twelve points in fortieths, drawn as so many samples of each point
    p, q = (np.random.default_rng(k).multinomial(40, [1 / 12] * 12) for k in (0, 1))
    distance = sum(abs(a - b) for a, b in zip(p, q)) / 2 / 40
    best = torch.tensor([0.0 if a >= b else margin for a, b in zip(p, q)])
    samples = [torch.arange(12).repeat_interleave(torch.tensor(x)) for x in (p, q)]
    bound = ebgan.tv_bound(best[samples[0]], best[samples[1]], margin)
    assert bound == pytest.approx(distance)
    others = [*(torch.rand(200, 12) * 2 * margin), *(best + torch.rand(200, 12) / 99)]
    bounds = [ebgan.tv_bound(u[samples[0]], u[samples[1]], margin) for u in others]
    assert 0 == min(bounds) < max(bounds) < distance
    assert ebgan.tv_bound(best, best, 0) == 0


# ------------------------------------------------------------- the first training step
class PlainDiscriminator(nn.Sequential):
    def forward(self, imgs):
        embedding = self[0](imgs)
        return self[1](embedding), embedding


def plain_networks(generator, discriminator, size, channels):
    """Return the networks in plain layers and float64, with the weights of the given."""
    wide, half = (128, size // 4, size // 4), (64, size // 2, size // 2)
    layers = [nn.Linear(next(generator.parameters()).shape[1], math.prod(wide))]
    layers += [nn.Unflatten(1, wide)]
    for width in (128, 64):
        layers += [nn.Upsample(scale_factor=2), nn.Conv2d(128, width, 3, padding=1)]
        layers += [nn.BatchNorm2d(width, 0.8), nn.LeakyReLU(0.2)]
    plain_g = nn.Sequential(*layers, nn.Conv2d(64, channels, 3, padding=1), nn.Tanh())
    encode = [nn.Conv2d(channels, 64, 3, stride=2, padding=1), nn.ReLU(), nn.Flatten()]
    encode += [nn.Linear(math.prod(half), 32)]
    decode = [nn.BatchNorm1d(32, 0.8), nn.ReLU(), nn.Linear(32, math.prod(half))]
    decode += [nn.BatchNorm1d(math.prod(half)), nn.ReLU(), nn.Unflatten(1, half)]
    decode += [nn.Upsample(scale_factor=2), nn.Conv2d(64, channels, 3, padding=1)]
    plain_d = PlainDiscriminator(nn.Sequential(*encode), nn.Sequential(*decode))
    for ours, plain in ((generator, plain_g), (discriminator, plain_d)):
        pairs = zip(ours.parameters(), plain.double().parameters(), strict=True)
        for one, two in pairs:
            assert one.shape == two.shape
            two.data.copy_(one.data)
    return plain_g, plain_d


@pytest.fixture(scope="session")
def tiny(tmp_path_factory):
    """Flags of a run that takes a moment: 40 grey digits of 8 x 8, without classes."""
    folder = tmp_path_factory.mktemp("pictures")
    for i, img in enumerate(ebgan.synthetic_digits(40, 8, seed=0)[0]):
        Image.fromarray(img[0].numpy()).save(folder / f"{i}.png")
    data = ["--dataset", "folder", "--data_root", folder, "--img_size", 8]
    return [*data, "--batch_size", 4, "--sample_interval", 7]


@pytest.fixture(autouse=True)
def own_folder(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)


def call(script, *argv, status=0):
    """Run a script's main in this process; return its stdout and its stderr."""
    out, err = io.StringIO(), io.StringIO()
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
        try:
            result = script.main([str(x) for x in argv])
        except SystemExit as end:  # of argparse
            result = end.code
    assert result == status, err.getvalue()
    return out.getvalue(), err.getvalue()


def refused(script, *argv):
    """Return the line that a call prints to stderr before it ends with status 2."""
    (line,) = call(script, *argv, status=2)[1].splitlines()
    assert line.startswith(f"{script.__name__}.py: error: ")
    return line


def load(run):
    return torch.load(Path(run, "checkpoint.pt"), weights_only=True)


# a small rate: where a gradient is rounding, float32 and float64 step apart by it
ONE_STEP = ["--max_steps", 1, "--lr", 2e-4, "--out_dir", "x"]
MSE = ["--energy", "mse", "--margin", 0.008, "--margin_ratio", 0]
NORM = ["--margin_ratio", 0.093]


def plain_energy(recon, imgs, kind):
    squares = (recon - imgs).square().flatten(1)
    return squares.mean(1) if kind == "mse" else squares.sum(1).sqrt()


def check_first_step(run, root, weight, ranks, kind):
    """Compare a run's first step with the equations on plain layers in float64.

    The margin lies between the energies of the generated images. Adam's mean of the
    gradients, exp_avg, is (1 - b1) times the gradient after the first step.
    """
    torch.manual_seed(0)
    networks = ebgan.Generator(8), ebgan.Discriminator(8)
    plain_g, plain_d = plain_networks(*networks, 8, 1)
    imgs = ebgan.load_images("folder", root, 8, None, 1)[0].double() / 127.5 - 1
    order = torch.randperm(len(imgs), generator=ebgan.rng(0, 0, 0))
    loss, fakes, active = 0.0, [], 0
    for rank in range(ranks):
        z = torch.randn(4, 62, generator=ebgan.rng(0, 1, 1, rank)).double()
        real, fake = imgs[order[4 * rank :][:4]], plain_g(z)
        fakes.append(fake)
        energies = plain_energy(plain_d(real)[0], real, kind)
        margin = 0.008 if kind == "mse" else 0.093 * energies.mean().item()
        loss += energies.mean() / ranks
        for u in plain_energy(plain_d(fake.detach())[0], fake.detach(), kind):
            if u < margin:
                loss += (margin - u) / 4 / ranks
                active += 1
    assert 0 < active < 4 * ranks  # or a hinge on the mean would not be seen
    gradients = {"optimizer_d": torch.autograd.grad(loss, plain_d.parameters())}
    with torch.no_grad():  # Adam's first step is lr * sign of the gradient
        for p, gradient in zip(plain_d.parameters(), gradients["optimizer_d"]):
            p -= 2e-4 * gradient / (gradient.abs() + 1e-8)
    loss = 0.0
    for fake in fakes:
        recon, embedding = plain_d(fake)
        cos = F.cosine_similarity(embedding[:, None], embedding, dim=2)
        loss += plain_energy(recon, fake, kind).mean() / ranks
        loss += weight * (cos.square().sum() - 4) / 12 / ranks
    gradients["optimizer_g"] = torch.autograd.grad(loss, plain_g.parameters())
    for name, expected in gradients.items():
        state = load(run)[name]["state"]
        for i, gradient in enumerate(expected):
            size = gradient.abs().max().item()
            if size > 1e-9:  # else it is 0, and float32 has its rounding alone
                moment = state[i]["exp_avg"].double()
                close(2 * moment, gradient, rtol=1e-2, atol=1e-3 * size)


@pytest.mark.parametrize(("script", "weight"), [(ebgan, 0.0), (ebgan_pt, 0.1)])
@pytest.mark.parametrize(("kind", "flags"), [("mse", MSE), ("norm", NORM)])
def test_first_step_is_adam_on_the_equations(script, weight, kind, flags, tiny):
    call(script, *tiny, *ONE_STEP, *flags)
    check_first_step("x", tiny[3], weight, 1, kind)


# ---------------------------------------------------------------------------- networks
@pytest.mark.parametrize(("size", "channels"), [(8, 1), (12, 3), (20, 1)])
def test_networks_equal_upsampling_and_convolution(size, channels):
    ours = ebgan.Generator(size, channels, 9), ebgan.Discriminator(size, channels)
    plain = plain_networks(*(network.double() for network in ours), size, channels)
    z = torch.randn(3, 9, dtype=torch.float64, requires_grad=True)
    imgs = torch.rand(3, channels, size, size, dtype=torch.float64, requires_grad=True)
    outputs, gradients = [], []
    for generator, discriminator in (ours, plain):
        out = (generator(z), *discriminator(imgs))
        outputs.append(out)
        loss = (out[0] - imgs).square().sum() + (out[1] - imgs).square().sum()
        leaves = [z, imgs, *generator.parameters(), *discriminator.parameters()]
        gradients.append(torch.autograd.grad(loss + out[2].square().sum(), leaves))
    assert [x.shape for x in outputs[0]] == [imgs.shape, imgs.shape, (3, 32)]
    close(*outputs, rtol=0, atol=1e-10)
    close(*gradients, rtol=1e-8, atol=1e-8)


def test_upsample_conv_does_one_thing_and_bad_sizes_are_refused():
    layer, x = ebgan.UpsampleConv2d(5, 3).double(), torch.randn(2, 5, 3, 7).double()
    large = F.interpolate(x, scale_factor=2, mode="nearest")
    close(layer(x), F.conv2d(large, layer.weight, layer.bias, padding=1))
    with pytest.raises(TypeError):
        ebgan.UpsampleConv2d(3, 5, kernel_size=5)
    with pytest.raises(ValueError, match="18"):
        ebgan.Generator(img_size=18)


def test_weights_start_as_the_listing_has_them():
    torch.manual_seed(0)
    networks = nn.ModuleList([ebgan.Generator(), ebgan.Discriminator()])
    for layer in networks.modules():
        if isinstance(layer, (nn.Conv2d, nn.BatchNorm2d)):
            mean = 0 if isinstance(layer, nn.Conv2d) else 1
            assert layer.weight.mean().item() == pytest.approx(mean, abs=0.01)
            assert layer.weight.std().item() == pytest.approx(0.02, rel=0.3)
        if isinstance(layer, nn.BatchNorm2d):
            assert layer.bias.abs().max().item() == 0


# ------------------------------------------------------------------------------- score
def pass_through(n):
    """Return a classifier that has an image's n numbers as features and as logits."""
    classifier = nn.Sequential(nn.Sequential(nn.Flatten(), nn.Linear(n, n)))
    classifier.append(nn.Linear(n, n))
    for layer in (classifier[0][1], classifier[1]):
        layer.load_state_dict({"weight": torch.eye(n), "bias": torch.zeros(n)})
    return classifier


def evaluate(imgs, real):
    return ebgan.evaluate(
        pass_through(imgs.shape[1]).double(), imgs.double(), real.double()
    )


def test_score_of_a_case_worked_out_by_hand():
    # two images, two classes: p(y|x) = (0.9, 0.1) and (0.3, 0.7), so p(y) = (0.6, 0.4)
    logits = torch.tensor([[0.9, 0.1], [0.3, 0.7]], dtype=torch.float64).log() + 3
    scores = evaluate(logits, logits)
    one = 0.6 * math.log(0.6 / 0.9) + 0.4 * math.log(0.4 / 0.1)
    two = 0.6 * math.log(0.6 / 0.3) + 0.4 * math.log(0.4 / 0.7)
    expected = {"score": (one + two) / 2, "frechet": 0, "classes": 2}
    assert scores == pytest.approx(expected, abs=1e-6)


def test_frechet_distance_of_gaussians_with_diagonal_covariance():
    # then it is |m - m'|^2 + sum (s - s')^2; the points have exactly these moments
    signs = torch.tensor(list(itertools.product((-1, 1), repeat=3))) * (7 / 8) ** 0.5
    one = signs * torch.tensor([1.0, 0.5, 2.0]) + torch.tensor([1.0, 2.0, 3.0])
    two = signs * torch.tensor([0.2, 0.5, 1.0]) + torch.tensor([0.0, 2.5, 3.0])
    expected = pytest.approx(1 + 0.25 + 0.8**2 + 0 + 1)
    assert evaluate(one, two)["frechet"] == evaluate(two, one)["frechet"] == expected


@pytest.mark.parametrize(("few", "classes"), [(9, 1), (10, 2)])
def test_classes_below_one_percent_of_the_images_do_not_count(few, classes):
    logits = torch.tensor([[0.0, 30, 0]] * few + [[30, 0, 0]] * (1000 - few))
    scores = evaluate(logits, logits)
    assert scores["classes"] == classes
    assert 0 < scores["score"] < 1  # a collapse to one class scores next to nothing


# -------------------------------------------------------------------------------- data
def test_digits_are_ten_classes_and_a_function_of_the_seed():
    imgs, labels = ebgan.synthetic_digits(500, 32, seed=3)
    assert imgs.shape == (500, 1, 32, 32)
    assert (imgs.dtype, labels.dtype) == (torch.uint8, torch.int64)
    assert len(labels.bincount()) == 10
    assert labels.bincount().min() > 20
    assert (imgs.flatten(1).amax(1) > 150).all()  # no picture is empty
    assert (imgs[:, :, [0, -1]] < 128).all()  # and no digit is cut off
    assert torch.equal(imgs, ebgan.synthetic_digits(500, 32, seed=3)[0])
    assert not torch.equal(imgs, ebgan.synthetic_digits(500, 32, seed=4)[0])


@pytest.fixture
def data(monkeypatch):
    """What main hands to train, which does not run."""
    seen = []
    monkeypatch.setattr(ebgan, "train", lambda opt, data: seen.extend(data))
    return seen


@pytest.mark.parametrize("channels", [1, 3])
def test_mnist_on_disk_is_found_without_a_flag(channels, data):
    Path("data/MNIST/raw").mkdir(parents=True)
    labels = np.arange(50, dtype=np.uint8) % 10
    imgs = np.repeat(10 * labels, 28 * 28)  # brightness 10 * label
    for part in ("train", "t10k"):  # the layout that torchvision reads
        for name, head, numbers in (
            ("images-idx3", [2051, 50, 28, 28], imgs),
            ("labels-idx1", [2049, 50], labels),
        ):
            content = np.array(head, dtype=">i4").tobytes() + numbers.tobytes()
            Path(f"data/MNIST/raw/{part}-{name}-ubyte").write_bytes(content)
    call(ebgan, "--channels", channels)
    labels = torch.from_numpy(labels)
    imgs = (10 * labels).view(-1, 1, 1, 1).expand(-1, channels, 32, 32)
    close(data, [imgs, labels.long()] * 2)


def test_without_a_network_the_digits_are_taken(data, monkeypatch):
    def refuse(*_args, **_kwargs):
        raise OSError("no network")

    monkeypatch.setattr(socket, "getaddrinfo", refuse)
    Path("data/MNIST/raw").mkdir(parents=True)
    Path("data/MNIST/raw/mine.txt").write_text("mine")
    out, _ = call(ebgan, "--img_size", 8)
    imgs, labels, held_imgs, held_labels = data
    assert len(imgs) == len(labels) > len(held_imgs) == len(held_labels)
    assert torch.equal(labels.unique(), torch.arange(10))
    (line,) = [line for line in out.splitlines() if "MNIST" in line]
    assert "digits" in line
    assert len(line) <= 88
    assert socket.getdefaulttimeout() is None
    for name in ("mnist", "kmnist", "cifar10", "svhn"):
        refused(ebgan, "--dataset", name)
    assert Path("data/MNIST/raw/mine.txt").read_text() == "mine"


def test_failed_load_keeps_what_was_downloaded(monkeypatch):
    def download(self):
        Path("data").mkdir()
        Path("data/train_32x32.mat").write_text("big")

    monkeypatch.setattr(ebgan.datasets.SVHN, "download", download)
    monkeypatch.setattr(ebgan.datasets.SVHN, "_check_integrity", lambda self: True)
    monkeypatch.setitem(sys.modules, "scipy", None)  # as if it were not installed
    assert "scipy" in refused(ebgan, "--dataset", "svhn")
    assert Path("data/train_32x32.mat").read_text() == "big"


noise = np.random.default_rng(0)
GREY = noise.integers(0, 256, (30, 8, 8), dtype=np.uint8)
COLOUR = noise.integers(0, 256, (30, 8, 8, 3), dtype=np.uint8)


def write_pictures(arrays, folder="in", **options):
    Path(folder).mkdir(parents=True, exist_ok=True)
    for i, pixels in enumerate(arrays):
        Image.fromarray(pixels).save(f"{folder}/{i}.png", **options)


def load_pictures(channels=None):
    parts = ebgan.load_images("folder", "in", 8, channels, 2)
    assert len(parts[2]) == (len(parts[0]) + len(parts[2])) // 10  # a tenth is held out
    return torch.cat(parts[::2]), torch.cat(parts[1::2])


def pixels(imgs):
    return sorted(np.asarray(img).tobytes() for img in imgs)


@pytest.mark.parametrize("channels", [None, 1, 3])
def test_grey_pictures_keep_their_pixels(channels):
    write_pictures(GREY)
    for strange in ("notes.txt", ".x.png", ".hidden/x.png", "deep/.hidden/x.png"):
        Path("in", strange).parent.mkdir(parents=True, exist_ok=True)
        Path("in", strange).write_text("not a picture")
    os.mkfifo("in/pipe.png")
    Path("in/deep/up").symlink_to("..")
    imgs, labels = load_pictures(channels)
    assert imgs.shape == (30, channels or 1, 8, 8)
    assert pixels(imgs[:, -1]) == pixels(GREY)
    assert labels.max() == 0


def test_grey_and_colour_pictures_mixed_are_colour():
    write_pictures(GREY, "in/grey")
    write_pictures(COLOUR, "in/colour")
    imgs, labels = load_pictures()
    assert imgs.shape == (60, 3, 8, 8)
    grey = (imgs == imgs[:, :1]).flatten(1).all(1)
    assert torch.equal(grey.long(), labels)  # sub-folders are classes, by the alphabet
    assert pixels(imgs[grey, 0]) == pixels(GREY)
    assert pixels(imgs[~grey].permute(0, 2, 3, 1).contiguous()) == pixels(COLOUR)


def test_pictures_are_read_as_they_look():
    upside_down = Image.Exif()
    upside_down[274] = 3
    clear = np.zeros((8, 8, 4), dtype=np.uint8)  # black, and clear but for one pixel
    clear[0, 0, 3] = 255
    wide = np.pad(COLOUR[0], ((0, 0), (8, 8), (0, 0)))
    for img, expected, options in (
        (GREY[0], GREY[0, ::-1, ::-1], {"exif": upside_down}),
        (clear, 255 - clear[:, :, 3], {}),
        (wide, COLOUR[0].transpose(2, 0, 1), {}),
    ):
        write_pictures([img] * 20, **options)
        assert (load_pictures()[0] == torch.from_numpy(expected.copy())).all()


@pytest.mark.parametrize("name", ["float.tiff", "deep.tiff", "broken.png", "cut.png"])
def test_picture_that_cannot_be_shown_right_is_refused_by_name(name):
    write_pictures(GREY)
    content = {
        "broken.png": b"no picture",
        "cut.png": Path("in/0.png").read_bytes()[:60],
    }
    if name in content:
        Path("in", name).write_bytes(content[name])
    else:
        kind = np.float32 if name == "float.tiff" else np.int32
        Image.fromarray(GREY[0].astype(kind)).save(f"in/{name}")
    assert name in refused(ebgan, "--dataset", "folder", "--data_root", "in")


# ------------------------------------------------------------------------ the contract
def statements(script):
    """Return {name: source} of all at the top level but docstring and imports."""
    lines, found = (HERE / f"{script}.py").read_text().splitlines(), {}
    for node in ast.parse("\n".join(lines)).body[1:]:
        decorators = getattr(node, "decorator_list", [])
        first = min(x.lineno for x in [node, *decorators]) - 1
        name = getattr(node, "name", lines[first].split(" =")[0])
        if "import " not in name:
            found[name] = lines[first : node.end_lineno]
    return found


@pytest.mark.parametrize(("first", "limit"), [(0, 20), (1, 90)])
def test_scripts_differ_in_the_variant_alone(first, limit):
    one, two = (statements(name) for name in NAMES[first : first + 2])
    if first == 0:  # the loss of the generator is the only difference of the training
        lines = set(one["train"]) ^ set(two["train"])
        assert {line.split()[0] for line in lines} == {"loss_g"}
    changed = {name for name in one if one[name] != two.get(name)}
    assert changed == {"SCRIPT", "parse_args", ("train", "main")[first]}
    assert two.keys() - one.keys() <= ({"sweep"} if first else set())
    texts = [(HERE / f"{name}.py").read_text().splitlines() for name in NAMES[first:]]
    lines = difflib.unified_diff(*texts[:2], n=0, lineterm="")
    assert sum(line[0] in "+-" for line in list(lines)[2:]) <= limit


@pytest.mark.parametrize("script", NAMES)
def test_losses_come_first(script):
    text = (HERE / f"{script}.py").read_text()
    nodes = [x for x in ast.parse(text).body if isinstance(x, ast.FunctionDef)]
    losses = ["energy", "discriminator_loss", "pullaway_loss"]
    assert [node.name for node in nodes[:3]] == losses
    assert nodes[2].lineno <= 80
    assert not re.search(r"^ *assert ", text, re.MULTILINE)  # `python -O` has none


@pytest.mark.parametrize("script", [ebgan, ebgan_pt, ebgan_margin_ablation])
def test_help_names_every_flag_with_its_default(script):
    text = " ".join(call(script, "--help")[0].split()) + " --"
    defaults = vars(script.parse_args([]))
    flags = re.findall(r"(?<= --)\w+", text)
    assert {*flags} >= defaults.keys() - {"margin", "script", "processes"}
    for flag in {*flags} & defaults.keys():
        shown = re.search(rf" --{flag} (.*?) --", text)[1]
        if number := re.search(r"\[([-\d. ]+)\]", shown):
            values = [float(x) for x in number[1].split()]
            assert np.ravel(defaults[flag]).tolist() == values
    assert (defaults["n_epochs"], defaults["batch_size"]) == (200, 64)
    assert defaults.get("margins", 1) in (1, [0, 5, 7, 10, 14, 20])


# ------------------------------------------------- processes that run beside the tests
@pytest.fixture(scope="session", autouse=True)
def started(tiny, tmp_path_factory):
    """Start all at once, as torch is imported slowly, each in a folder of its own.

    Return {name: (folder, process)}.
    """
    train = " ".join(map(str, tiny))
    first_step = " ".join(map(str, [*tiny, *ONE_STEP, *NORM]))
    torchrun = "torch.distributed.run --nproc_per_node=2 --standalone --redirects 3"
    imports = "import sys; sys.argv[1:] = ['--bad']; import " + ", ".join(NAMES)
    until = "until [ -e x/checkpoint.pt ] || ! kill -0 $!; do sleep 0.01; done"
    ebgan_x = f"$PYTHON $HERE/ebgan.py {train} --out_dir x --max_steps"
    commands = {
        "killed": f"{ebgan_x} 52 & {until}; kill -9 $!",
        "torchrun": f"$PYTHON -m {torchrun} --log-dir y $HERE/ebgan_pt.py {first_step}",
        "head": f"{ebgan_x} 60 | head -1",
        "closed": f"{ebgan_x} 20 >&-",
        "import": f'$PYTHON -Bc "{imports}"',
    }
    env = {"PYTHON": sys.executable, "HERE": str(HERE), "PYTHONPATH": str(HERE)}
    options = {"env": os.environ | env | {"OMP_NUM_THREADS": "1"}, "text": True}
    options |= {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE}
    running = {}
    for name, command in commands.items():
        folder = tmp_path_factory.mktemp(name)
        bash = subprocess.Popen(["bash", "-c", command], cwd=folder, **options)
        running[name] = folder, bash
    yield running
    for _, bash in running.values():
        bash.kill()


# ------------------------------------------------------------------------- whole runs
@pytest.fixture(scope="session")
def whole(tiny, tmp_path_factory):
    """The folder of a run of 52 steps that nothing has stopped."""
    folder = tmp_path_factory.mktemp("whole") / "x"
    call(ebgan, *tiny, "--max_steps", 52, "--out_dir", folder)
    return folder


def read_log(folder):
    """Return the log's rows by step, without the speed."""
    with open(Path(folder, "log.csv"), newline="") as file:
        rows = list(csv.DictReader(file))
    assert all(float(row.pop("images_per_s")) > 0 for row in rows)
    assert len({row["step"] for row in rows}) == len(rows)
    return {int(row["step"]): row for row in rows}


PLACES = {"max_steps", "out_dir", "resume"}


def same(one, two):
    """Say whether two checkpoints agree to the bit, but for speed and place."""
    if torch.is_tensor(one):
        return torch.equal(one, two)
    if isinstance(one, dict):
        keys = one.keys() - {"images_per_s", "log_size", *PLACES}
        return one.keys() == two.keys() and all(same(one[x], two[x]) for x in keys)
    if isinstance(one, list):
        return len(one) == len(two) and all(map(same, one, two))
    return one == two


def test_run_leaves_a_log_pictures_and_a_checkpoint(whole):
    log, saved = read_log(whole), load(whole)
    assert {20, 40, *range(9, 52, 9), 52} <= log.keys()  # 4 of the 36 images a step
    assert all(int(row["epoch"]) == math.ceil(step / 9) for step, row in log.items())
    for name in ("samples", "samples/7", "samples/9", "samples/50", "samples/52"):
        assert Image.open(whole / f"{name}.png").size == (82, 82)
    parts = "generator discriminator averaged optimizer_g optimizer_d step row flags"
    assert saved.keys() >= set(parts.split())
    assert saved["step"] == saved["row"]["step"] == 52
    assert saved["flags"]["margin"] == pytest.approx(10 * 8 / 32)  # the paper's
    counts = [x for key, x in saved["generator"].items() if "num_batches" in key]
    assert [count.item() for count in counts] == [52] * 2  # always in training mode
    assert 0 <= float(log[9]["tv_bound"]) <= 1 and not log[9]["score"]  # no classes
    assert not log[20]["tv_bound"]


def test_discriminator_of_a_run_is_an_energy_of_one_image(whole, tiny):
    imgs = ebgan.load_images("folder", tiny[3], 8, None, 1)[0] / 127.5 - 1
    generator, discriminator = ebgan.load_run(whole)
    assert not any(x.training for x in [*generator.modules(), *discriminator.modules()])
    energies = ebgan.energy(discriminator(imgs)[0], imgs)
    for i in range(3):
        (alone,) = ebgan.energy(discriminator(imgs[i : i + 1])[0], imgs[i : i + 1])
        close(alone, energies[i])
    embedding = discriminator(imgs)[1]  # what the first normalisation sees
    var = torch.stack([part.var(0) for part in embedding.split(9)])  # four batches
    close(discriminator.norm1.running_mean, embedding.mean(0), rtol=1e-4, atol=1e-5)
    close(discriminator.norm1.running_var, var.mean(0), rtol=1e-4, atol=1e-5)


def test_newest_run_goes_on_and_generates(tiny):
    assert "runs" in refused(ebgan, "--generate", 5)
    call(ebgan, *tiny, "--max_steps", 1, "--out_dir", "runs/ebgan-20200101-000000")
    out, _ = call(ebgan, *tiny, "--max_steps", 1)
    old, new = sorted(Path("runs").iterdir())
    assert re.fullmatch(r"ebgan-\d{8}-\d{6}", new.name)
    for fact in ("folder", " 36 ", "cpu", str(new)):  # a tenth of 40 is held out
        assert fact in out.splitlines()[0]
    Path("runs/ebgan-99990101-000000").mkdir()  # stopped before its first checkpoint
    shutil.copytree(old, "runs/ebgan_pt-99990101-000000")  # another script's
    for step in (99, 199):  # as if it had come that far
        torch.save(load(new) | {"step": step}, new / "checkpoint.pt")
        call(ebgan, "--resume", "--max_steps", step + 2)
        assert (new / f"samples/{step + 1}.png").exists()
    call(ebgan, "--generate", 3)
    call(ebgan, "--generate", 3, "--seed", 1, "--out_dir", "pics")
    names = ["00000.png", "00001.png", "00002.png", "grid.png"]
    folders = [new / "generated", Path("pics")]
    assert [sorted(x.name for x in folder.iterdir()) for folder in folders] == [
        names
    ] * 2
    one, two = ((folder / names[0]).read_bytes() for folder in folders)
    assert one != two  # --seed


def test_digits_are_scored_by_a_classifier_that_knows_them():
    flags = ["--dataset", "digits", "--img_size", 8, "--max_steps", 1]
    out, _ = call(ebgan, *flags, "--out_dir", "x")
    scores = {name: float(x) for name, x in read_log("x")[1].items()}
    assert 0 < scores["score"] < scores["real_score"]
    assert 0 <= scores["real_frechet"] < scores["frechet"]
    assert 1 <= scores["classes"] <= scores["real_classes"] == 10
    assert float(re.search(r"classifier.* ([\d.]+)%", out)[1]) > 70


def test_pictures_are_those_of_the_running_mean(tiny):
    """As in TensorFlow with num_updates: decay min(0.999, (1 + n) / (10 + n))."""
    states, argv = [], [*tiny, "--lr", 0.01, "--out_dir", "x"]
    for step in (1, 2, 3, 4):
        call(ebgan_pt, *argv, "--max_steps", step)
        states.append(load("x")["generator"])
        argv = ["--resume", "x"]
    mean = states[0]
    for n, state in enumerate(states[1:], 1):
        decay = (1 + n) / (10 + n)
        mean = {key: decay * mean[key] + (1 - decay) * x for key, x in state.items()}
    for key, value in mean.items():
        if "num_batches" not in key:
            close(load("x")["averaged"]["module." + key], value)
    call(ebgan_pt, "--generate", 64, "--resume", "x")
    generator, _ = ebgan_pt.load_run("x")
    for file, corner, key in (("samples.png", 2, 2), ("generated/00000.png", 0, 4)):
        shown = np.asarray(Image.open(Path("x", file)))[corner:, corner:, 0][:8, :8]
        z = torch.randn(64, 62, generator=ebgan.rng(0, key))[:1]
        expected = generator(z)[0, 0].detach().numpy() * 127.5 + 127.5
        assert np.abs(shown - expected).max() <= 1
    late = ebgan.running_mean(torch.zeros(1), torch.ones(1), torch.tensor(10**6))
    assert late.item() == pytest.approx(0.001)


def test_main_leaves_the_process_as_it_was_and_works_in_a_thread(tiny):
    def state():
        handlers = [signal.getsignal(x) for x in (signal.SIGINT, signal.SIGTERM)]
        numbers = torch.get_rng_state().tolist(), str(np.random.get_state())
        return handlers, numbers, torch.get_num_threads(), torch.is_grad_enabled()

    before, flags = state(), ["--resume", "x", "--max_steps", 3]
    call(ebgan, *tiny, "--max_steps", 2, "--out_dir", "x")
    call(ebgan, "--generate", 1, "--resume", "x")
    assert state() == before
    thread = threading.Thread(target=call, args=(ebgan, *flags))
    thread.start()
    thread.join()
    assert load("x")["step"] == 3


def press_ctrl_c(monkeypatch, script, n):
    """Press Ctrl-C in the middle of the n-th step from now on."""
    loss, steps = script.discriminator_loss, itertools.count(1)

    def pressed(*args):
        if next(steps) == n:
            raise KeyboardInterrupt
        return loss(*args)

    monkeypatch.setattr(script, "discriminator_loss", pressed)


def test_sweep_compares_margins_and_goes_on_where_it_stopped(tiny, monkeypatch):
    sweep, flags = ebgan_margin_ablation, [*tiny, "--max_steps", 4, "--out_dir"]
    with monkeypatch.context() as patch:
        press_ctrl_c(patch, sweep, 10)  # in the third run, which has no checkpoint yet
        margins = ["--margins", 0, 0.5, "--seeds", 0, 5]
        call(sweep, *flags, "x", *margins, status=130)
    assert "run 4 of 4" in call(sweep, "--resume", "x")[0]
    with open("x/results.csv", newline="") as file:
        rows = [(row["margin"], row["seed"]) for row in csv.DictReader(file)]
    assert rows == [("0", "0"), ("0", "5"), ("0.5", "0"), ("0.5", "5")]
    assert Image.open("x/margins.png").size[1] == 2 * (8 + 2) + 2
    call(ebgan_pt, *flags, "alone", "--margin", 0.5, "--seed", 5)
    alone, in_sweep = load("alone"), load("x/margin_0.5/seed_5")
    assert same(alone["generator"], in_sweep["generator"])
    assert same(alone["discriminator"], in_sweep["discriminator"])
    files = {path: path.stat().st_mtime_ns for path in Path("x").rglob("checkpoint.pt")}
    call(sweep, "--resume", "x")
    assert {path: path.stat().st_mtime_ns for path in files} == files  # trained once
    call(sweep, "--generate", 1, "--resume", "x/margin_0/seed_5", "--out_dir", "pics")
    assert Path("pics/00000.png").exists()


# --------------------------------------------------------------- resuming and stopping
def test_ctrl_c_gives_the_command_that_goes_on(tiny, whole, monkeypatch):
    with monkeypatch.context() as patch:
        press_ctrl_c(patch, ebgan, 21)  # the log has step 20, the checkpoint 18
        flags = ["--max_steps", 52, "--out_dir", "x"]
        _, err = call(ebgan, *tiny, *flags, status=130)
    assert load("x")["step"] == 18
    (line,) = err.splitlines()
    command = re.search(r"python ebgan\.py (--resume \S+)", line)[1]
    call(ebgan, *command.split())
    assert same(load("x"), load(whole))
    assert read_log("x") == read_log(whole)


def test_killed_run_goes_on_from_its_checkpoint(started, whole):
    folder, bash = started["killed"]
    bash.wait()
    call(ebgan, "--resume", folder / "x")
    assert same(load(folder / "x"), load(whole))
    assert read_log(folder / "x") == read_log(whole)


@pytest.mark.parametrize(("pictures", "amp"), [(GREY, []), (COLOUR, ["--amp"])])
def test_run_in_parts_is_the_whole_run_with_its_scores(pictures, amp, monkeypatch):
    n = pictures[0].size
    monkeypatch.setattr(ebgan_pt, "train_classifier", lambda *_: pass_through(n))
    write_pictures(pictures[:10], "in/one")
    write_pictures(pictures[10:], "in/two")
    flags = ["--dataset", "folder", "--data_root", "in", "--img_size", 8, *amp]
    flags += ["--batch_size", 3, "--seed", 7, "--out_dir"]
    call(ebgan_pt, *flags, "whole", "--max_steps", 11)
    call(ebgan_pt, *flags, "parts", "--max_steps", 5)
    call(ebgan_pt, "--resume", "parts", "--max_steps", 9)  # the end of an epoch
    call(ebgan_pt, "--resume", "parts/checkpoint.pt", "--max_steps", 11)
    assert same(load("whole"), load("parts"))
    whole, parts = read_log("whole"), read_log("parts")
    assert whole == {9: parts[9], 11: parts[11]}
    assert all(float(row["frechet"]) > 0 for row in whole.values())
    kinds = {x.dtype for x in load("whole")["generator"].values()}
    assert kinds == {torch.float32, torch.int64}  # in spite of --amp


@pytest.fixture
def kept(tiny):
    """Make a run x of two steps, whose checkpoint has to stay as it is."""
    call(ebgan, *tiny, "--max_steps", 2, "--out_dir", "x")
    before = Path("x/checkpoint.pt").read_bytes()
    yield before
    assert Path("x/checkpoint.pt").read_bytes() == before


def test_loss_that_is_not_finite_ends_the_run(kept, monkeypatch):
    loss = ebgan.discriminator_loss
    monkeypatch.setattr(ebgan, "discriminator_loss", lambda *x: loss(*x) * math.inf)
    line = refused(ebgan, "--resume", "x", "--max_steps", 60)
    assert re.search(r"not finite at step \d+", line)


def test_full_disk_keeps_the_last_checkpoint(kept):
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (len(kept) // 2, hard))
    try:
        assert "error: x: " in refused(ebgan, "--resume", "x", "--max_steps", 3)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


class Evil:
    def __reduce__(self):
        return os.mkdir, ("evil",)


def test_checkpoint_that_is_not_this_scripts_is_refused(kept):
    saved = load("x")
    for name, content in {
        "foreign": {"model": torch.zeros(3)},
        "no_networks": {"flags": saved["flags"]},
        "other_network": saved | {"generator": saved["discriminator"]},
        "other_script": saved | {"flags": saved["flags"] | {"script": "ebgan_pt"}},
        "evil": saved | {"flags": {"script": Evil()}},
    }.items():
        torch.save(content, f"{name}.pt")
    Path("cut.pt").write_bytes(kept[: len(kept) // 2])
    Path("empty.pt").touch()
    for file in Path().glob("*.pt"):
        before = file.read_bytes()
        assert file.name in refused(ebgan, "--resume", file, "--max_steps", 3)
        assert file.read_bytes() == before
    assert not Path("evil").exists()


def test_flag_that_contradicts_the_checkpoint_is_named(kept):
    flags = {
        "energy": "mse",
        "margin_ratio": 0,
        "img_size": 16,
        "channels": 3,
        "latent_dim": 5,
        "batch_size": 8,
        "b1": 0,
    }
    flags |= {"dataset": "digits", "lr": 0.5, "seed": 9, "margin": 3.0, "out_dir": "y"}
    for flag, value in flags.items():
        assert flag in refused(ebgan, "--resume", "x", f"--{flag}", value)


# --------------------------------------------------------------------- other processes
def test_two_processes_average_the_gradients_of_their_halves(started, tiny):
    folder, bash = started["torchrun"]
    _, err = bash.communicate()
    assert bash.returncode == 0, err
    check_first_step(folder / "x", tiny[3], 0.1, 2, "norm")
    said = [next(folder.glob(f"y/**/{i}/stdout.log")).read_text() for i in (0, 1)]
    assert said[0].count("step 1 ") == 1
    assert said[1] == ""  # the first process alone writes
    assert read_log(folder / "x").keys() == {1}


@pytest.mark.parametrize("name", ["head", "closed"])
def test_output_that_nobody_reads_leaves_no_traceback(name, started):
    folder, bash = started[name]
    _, err = bash.communicate()
    assert not re.search("Traceback|Exception|Broken pipe", err)
    if name == "closed":
        assert bash.returncode == 0, err
        assert load(folder / "x")["step"] == 20


def test_import_has_no_effect_whatever_argv_holds(started):
    folder, bash = started["import"]
    assert bash.communicate() == ("", "")
    assert bash.returncode == 0
    assert not any(folder.iterdir())


# --------------------------------------------------------------------------- bad input
BAD = """
--batch_size 1 | --batch_size 0 | --batch_size 41 | --batch_size many | --n_epochs 0
--img_size 30 | --img_size 4 | --img_size -32 | --channels 2 | --latent_dim 0
--energy sum | --margin -1 | --margin nan | --margin inf | --margin_ratio -1 | --lr 0 | --lr -1e-3 | --lr nan
--b1 1 | --b2 -0.1 | --n_cpu -1 | --sample_interval 0 | --max_steps 0 | --max_steps 1.5
--generate 0 | --seed -1 | --seed 99999999999999999999
--dataset imagenet | --device gpu | --device cuda:99 | --device meta
--data_root nowhere | --data_root text | --data_root broken
--out_dir text/readme.txt/run | --out_dir text/readme.txt | --out_dir text | --out_dir=
--resume nowhere | --resume text | --resume text/readme.txt
--resum x | --n_epoch 3 | surplus
"""
BAD_PT = "--lambda_pt -0.1 | --lambda_pt inf"
BAD_SWEEP = """
--margins | --margins 1 -1 | --margins 1 2 1.0 | --margins 0 -0 | --margin 1
--seeds 0 0 | --seeds 0 x | --seeds -1
"""
CALLS = [(ebgan, BAD), (ebgan_pt, BAD_PT), (ebgan_margin_ablation, BAD_SWEEP)]
CALLS = [(x, bad.strip()) for x, text in CALLS for bad in re.split(r"[|\n]", text)]


@pytest.mark.parametrize(("script", "bad"), [x for x in CALLS if x[1]])
def test_bad_input_is_one_line_and_status_2(script, bad, tiny):
    for file in (Path("text/readme.txt"), Path("broken/x.png")):
        file.parent.mkdir()
        file.write_text("no picture")
    before = sorted(Path().rglob("*"))
    line = refused(script, *tiny, *bad.split())
    flag, *values = re.split("[ =]", bad)
    assert flag in line or (values and values[-1] in line)
    assert sorted(Path().rglob("*")) == before
