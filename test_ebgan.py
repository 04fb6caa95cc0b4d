# SPDX-License-Identifier: MIT
"""Tests of the three scripts against oracles that share no code with them.

pytest test_ebgan.py
"""

import contextlib
import csv
import difflib
import io
import itertools
import math
import os
import re
import resource
import runpy
import shlex
import shutil
import signal
import socket
import statistics
import subprocess
import sys
from multiprocessing.pool import ThreadPool
from pathlib import Path
from unittest import mock

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
SCRIPTS = [ebgan, ebgan_pt, ebgan_margin_ablation]
NAMES = [script.__name__ for script in SCRIPTS]
torch.set_num_threads(1)  # as in the processes below: another number rounds otherwise
close = torch.testing.assert_close


# ----------------------------------------------------------------------------- losses
@pytest.mark.parametrize("kind", ["norm", "mse"])
def test_energy_is_the_error_of_each_image(kind):
    recon, imgs = torch.randn(2, 5, 3, 8, 4, dtype=torch.float64).requires_grad_()
    expected = []
    for n in range(5):
        total = 0.0
        for place in itertools.product(range(3), range(8), range(4)):
            total += (recon[n][place].item() - imgs[n][place].item()) ** 2
        expected.append(math.sqrt(total) if kind == "norm" else total / (3 * 8 * 4))
    assert ebgan.energy(recon, imgs, kind).tolist() == pytest.approx(expected)
    # the gradient goes through the reconstruction and through the image
    assert torch.autograd.gradcheck(ebgan.energy, (recon, imgs, kind))
    (gradient,) = torch.autograd.grad(ebgan.energy(recon, recon, kind).sum(), recon)
    assert not gradient.any()  # finite where the reconstruction is exact
    with pytest.raises(ValueError, match="l1"):
        ebgan.energy(recon, imgs, "l1")


@pytest.mark.parametrize("margin", [0, 1.0, 7.0])
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
    for one, two in itertools.permutations(rows, 2):  # all pairs i != j
        dot = sum(a * b for a, b in zip(one, two))
        total += dot**2 / sum(a * a for a in one) / sum(b * b for b in two)
    return total / (len(rows) * (len(rows) - 1))


def test_pullaway_loss_equals_the_double_loop():
    embeddings = torch.randn(17, 5, dtype=torch.float64) + 0.3
    value = ebgan.pullaway_loss(embeddings).item()
    assert value == pytest.approx(slow_pullaway(embeddings), rel=1e-10)
    # worked out by hand, with a finite gradient
    cases = {"12 24 36": 1, "10 10 01": 1 / 3, "00 10 11": 1 / 6, "34": 0}
    for rows, expected in cases.items():
        embeddings = torch.tensor([[float(x) for x in row] for row in rows.split()])
        value = ebgan.pullaway_loss(embeddings.requires_grad_())
        value.backward()
        assert value.item() == pytest.approx(expected)
        assert embeddings.grad.isfinite().all()


def test_losses_of_bfloat16_are_taken_in_float32():
    recon, imgs = torch.rand(2, 4, 1, 8, 8).bfloat16()
    mse = (recon.double() - imgs.double()).square().mean((1, 2, 3)).float()
    embeddings = torch.randn(8, 32).bfloat16()
    pullaway = torch.tensor(slow_pullaway(embeddings))
    with torch.autocast("cpu", torch.bfloat16):
        close(ebgan.energy(recon, imgs, "mse"), mse)
        close(ebgan.energy(recon, imgs, "norm"), (64 * mse).sqrt())
        for dtype in (torch.bfloat16, torch.float32):
            close(ebgan.pullaway_loss(embeddings.to(dtype)), pullaway)


def test_bound_is_the_total_variation_for_the_best_energy_alone():
    # densities of twelve points in fortieths, drawn as so many samples of each point
    p, q = (np.random.default_rng(k).multinomial(40, [1 / 12] * 12) for k in (0, 1))
    distance = sum(abs(a - b) for a, b in zip(p, q)) / 2 / 40
    best = torch.tensor(0.3 * (p < q))
    energies = [best, *(torch.rand(200, 12) * 0.6), *(best + torch.rand(200, 12) / 99)]
    p, q = torch.tensor(p), torch.tensor(q)
    samples = ((u.repeat_interleave(p), u.repeat_interleave(q)) for u in energies)
    bound, *others = (ebgan.tv_bound(*pair, 0.3) for pair in samples)
    assert bound == pytest.approx(distance)
    assert 0 == min(others) < max(others) < distance
    assert ebgan.tv_bound(best, best, 0) == 0
    for bad in (best / 0, best + math.inf):
        with pytest.raises(ValueError, match="finite"):
            ebgan.tv_bound(best, bad, 0.3)


# ------------------------------------------------------------------ the training step
def both_networks(size, channels, latent=62):
    """Return both networks of a script, and in plain layers and float64.

    The first half of the plain discriminator returns the embedding.
    """
    torch.manual_seed(0)
    ours = ebgan.Generator(size, channels, latent), ebgan.Discriminator(size, channels)
    wide, half = (128, size // 4, size // 4), (64, size // 2, size // 2)
    layers = [nn.Linear(latent, math.prod(wide)), nn.Unflatten(1, wide)]
    for width in (128, 64):
        layers += [nn.Upsample(scale_factor=2), nn.Conv2d(128, width, 3, padding=1)]
        layers += [nn.BatchNorm2d(width, 0.8), nn.LeakyReLU(0.2)]
    generator = *layers, nn.Conv2d(64, channels, 3, padding=1), nn.Tanh()
    encode = [nn.Conv2d(channels, 64, 3, stride=2, padding=1), nn.ReLU(), nn.Flatten()]
    encode += [nn.Linear(math.prod(half), 32)]
    decode = [nn.BatchNorm1d(32, 0.8), nn.ReLU(), nn.Linear(32, math.prod(half))]
    decode += [nn.BatchNorm1d(math.prod(half)), nn.ReLU(), nn.Unflatten(1, half)]
    decode += [nn.Upsample(scale_factor=2), nn.Conv2d(64, channels, 3, padding=1)]
    discriminator = nn.Sequential(*encode), nn.Sequential(*decode)
    plain = nn.Sequential(*generator).double(), nn.Sequential(*discriminator).double()
    for one, two in zip(ours, plain):
        weights = zip(two.state_dict(), one.state_dict().values(), strict=True)
        two.load_state_dict(dict(weights))
    return ours, plain


def plain_energy(recon, imgs, kind):
    squares = (recon - imgs).square().flatten(1)
    return squares.mean(1) if kind == "mse" else squares.sum(1).sqrt()


def plain_step(plain, optimizer_d, batches, kind, margin, weight):
    """Do a step by the equations; return what a run logs of the first batch.

    Leave the gradients of the generator to the caller's optimizer. Each of the batches,
    (real images, z, noise), is that of one process: gradients are averaged.
    """
    plain_g, plain_d = plain
    loss_d, loss_g, fakes, logged = 0.0, 0.0, [], []
    for real, z, noise in batches:
        fakes.append((plain_g(z), noise))
        image = fakes[-1][0].detach()
        real_energy = plain_energy(plain_d(real + noise), real, kind)
        fake_energy = plain_energy(plain_d(image + noise), image, kind)
        hinges = [margin - u for u in fake_energy if u < margin]
        assert 0 < len(hinges) < len(z)  # or a hinge on the mean would not be seen
        loss_d += real_energy.mean() + sum(hinges) / len(z)
        active = torch.tensor(len(hinges) / len(z))
        logged.append([real_energy.mean(), fake_energy.mean(), active])
    optimizer_d.zero_grad()
    (loss_d / len(batches)).backward()
    optimizer_d.step()
    for fake, noise in fakes:
        embedding = plain_d[0](fake + noise)
        cosines = F.cosine_similarity(embedding[:, None], embedding, dim=2)
        n = len(fake)
        pullaway = (cosines.square().sum() - n) / (n * (n - 1))  # without i = j
        loss_g += plain_energy(plain_d(fake + noise), fake, kind).mean()
        loss_g += weight * pullaway
        logged[0].append(pullaway)
    plain_g.zero_grad()
    (loss_g / len(batches)).backward(inputs=list(plain_g.parameters()))
    return [x.item() for x in logged[0][:4]]


@pytest.mark.parametrize(("kind", "margin"), [("norm", 3.7), ("mse", 0.073)])
@pytest.mark.parametrize("script", SCRIPTS)
def test_train_step_is_the_equations_on_plain_layers(script, kind, margin):
    ours, plain = both_networks(8, 3)
    ours = [network.double() for network in ours]
    optimizers = [torch.optim.SGD(network.parameters(), 1e-3) for network in ours]
    plain_g, plain_d = (torch.optim.SGD(x.parameters(), 1e-3) for x in plain)
    weight = 0 if script is ebgan else 0.7
    options = {"margin": margin, "kind": kind} | ({"lambda_pt": 0.7} if weight else {})
    for _ in range(2):
        batch = (
            torch.rand(6, 3, 8, 8) * 2 - 1,
            torch.randn(6, 62),
            torch.randn(6, 3, 8, 8),
        )
        batch = [x.double() for x in batch]
        result = script.train_step(*ours, *optimizers, *batch, **options)
        logged = plain_step(plain, plain_d, [batch], kind, margin, weight)
        plain_g.step()
        means = result[0].mean().item(), result[1].mean().item()
        assert means == pytest.approx(logged[:2], rel=1e-9)
        assert script.pullaway_loss(result[2]).item() == pytest.approx(logged[3])
    for one, two in zip(ours, plain):
        for p, q in zip(one.parameters(), two.parameters(), strict=True):
            close(p, q, rtol=1e-7, atol=1e-9)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_graphed_step_is_train_step():
    ends = []
    for wrap in (lambda step: step, ebgan.GraphedStep):
        torch.manual_seed(0)
        networks = [ebgan.Generator().cuda(), ebgan.Discriminator().cuda()]
        options = {"betas": (0.5, 0.999), "fused": True}
        adam = [torch.optim.Adam(x.parameters(), **options) for x in networks]
        step, shape = wrap(ebgan.train_step), (64, 1, 32, 32)
        with torch.backends.cudnn.flags(enabled=True, deterministic=True):
            for i in range(8):
                batch = torch.rand(shape), torch.randn(64, 62), torch.randn(shape)
                for optimizer in adam:
                    optimizer.param_groups[0]["lr"] = 2**-13 * (16 - i)
                batch = [x.cuda() for x in batch]
                outputs = step(*networks, *adam, *batch, 10.0)
        ends.append([*outputs, *networks[0].parameters(), *networks[1].parameters()])
    for one, two in zip(*ends, strict=True):
        assert torch.equal(one, two)


def test_classifier_is_trained_in_float64_on_32_pixels_at_most(monkeypatch):
    dtypes, cross_entropy = [], F.cross_entropy

    def recorded(logits, labels):
        dtypes.append(logits.dtype)
        return cross_entropy(logits, labels)

    monkeypatch.setattr(F, "cross_entropy", recorded)
    monkeypatch.setattr(ebgan, "range", lambda n: [0], raising=False)  # one step
    imgs = torch.randint(256, (9, 1, 64, 64), dtype=torch.uint8)
    classifier = ebgan.train_classifier(imgs, torch.arange(9), "cpu")
    assert dtypes == [torch.float64]
    imgs = imgs / 127.5 - 1
    close(classifier(imgs), classifier(F.avg_pool2d(imgs, 2)))


@pytest.fixture(scope="session")
def tiny(tmp_path_factory):
    """Flags of a run that takes a moment: 106 grey digits of 8 x 8, without classes."""
    folder = tmp_path_factory.mktemp("pictures")
    for i, img in enumerate(ebgan.synthetic_digits(106, 8, seed=0)[0]):
        Image.fromarray(img[0].numpy()).save(folder / f"{i}.png")
    data = ["--dataset", "folder", "--data_root", folder, "--img_size", 8]
    return [*data, "--batch_size", 4, "--sample_interval", 7, "--device", "cpu"]


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
ONE_STEP = ["--max_steps", 1, "--lr", 2e-4, "--out_dir"]
MSE = ["--energy", "mse", "--margin", 0.008]
NORM = ["--noise", 0.4, "--margin", 1.1]


def check_first_step(run, root, kind, weight=0, ranks=1):
    """Compare a run's first step with the equations on plain layers in float64.

    Adam's mean of the gradients, exp_avg, is (1 - b1) times the gradient after a step.
    """
    _, plain = both_networks(8, 1)
    imgs = ebgan.load_images("folder", root, 8, None, 1)[0].double() / 127.5 - 1
    order = torch.randperm(len(imgs), generator=ebgan.seeded_generator(0, 0, 0))
    sigma, margin = (0.4, 1.1) if kind == "norm" else (0, 0.008)
    batches = []
    for rank in range(ranks):
        draw = ebgan.seeded_generator(0, 1, 1, rank)
        z = torch.randn(4, 62, generator=draw).double()
        noise = sigma * torch.randn(4, 1, 8, 8, generator=draw).double()
        batches.append((imgs[order[4 * rank :][:4]], z, noise))
    adam = torch.optim.Adam(plain[1].parameters(), lr=2e-4 / 1.0003)
    logged = plain_step(plain, adam, batches, kind, margin, weight)
    for name, network in (("optimizer_g", plain[0]), ("optimizer_d", plain[1])):
        state = load(run)[name]["state"]
        for i, p in enumerate(network.parameters()):
            size = p.grad.abs().max().item()
            if size > 1e-9:  # else it is 0, and float32 has its rounding alone
                moment = state[i]["exp_avg"].double()
                close(2 * moment, p.grad, rtol=1e-2, atol=1e-3 * size)
    row = list(read_log(run)[0].values())[2:6]  # real_energy to pullaway, of rank 0
    assert [float(x) for x in row] == pytest.approx(logged, rel=1e-3)


def test_first_step_is_adam_on_the_equations(tiny):
    call(ebgan_pt, *tiny, *MSE, *ONE_STEP, "pt")
    check_first_step("pt", tiny[3], "mse", weight=0.1)


# ---------------------------------------------------------------------------- networks
@pytest.mark.filterwarnings("ignore:.*torch.jit")  # deprecated, but in use
@pytest.mark.parametrize(("size", "channels"), [(8, 1), (12, 3)])
def test_networks_equal_upsampling_and_convolution(size, channels):
    ours, plain = both_networks(size, channels, 9)
    z, imgs = torch.randn(3, 9).double(), torch.rand(3, channels, size, size).double()
    outputs = ours[0].double()(z), *ours[1].double()(imgs)
    expected = plain[0](z), plain[1](imgs), plain[1][0](imgs)
    close(outputs, expected, rtol=0, atol=1e-10)
    for network, x in zip(ours, (z, imgs) if channels == 1 else ()):  # exported
        expected = network.eval()(x)
        close(torch.jit.trace(network, x)(x), expected, rtol=0, atol=1e-10)
        exported = torch.export.export(network, (x,)).module()
        close(exported(x), expected, rtol=0, atol=1e-10)


def test_networks_start_as_the_listing_has_them():
    for layer in nn.ModuleList(both_networks(32, 1)[0]).modules():
        if isinstance(layer, (nn.Conv2d, nn.BatchNorm2d)):
            mean = 0 if isinstance(layer, nn.Conv2d) else 1
            assert layer.weight.mean().item() == pytest.approx(mean, abs=0.01)
            assert layer.weight.std().item() == pytest.approx(0.02, rel=0.3)
    for network in (ebgan.Generator, ebgan.Discriminator):
        with pytest.raises(ValueError, match="18"):
            network(img_size=18)


# ------------------------------------------------------------------------------- score
def pass_through(n):
    """Return a classifier that has an image's n numbers as features and as logits."""
    layer = nn.Linear(n, n, bias=False)
    nn.init.eye_(layer.weight)
    return nn.Sequential(nn.Sequential(nn.Flatten(), layer), layer)


def evaluate(imgs, real):
    classifier = pass_through(imgs.shape[1]).double()
    return ebgan.evaluate(classifier, imgs.double(), real.double())


def test_score_and_classes_worked_out_by_hand():
    # two images, two classes: p(y|x) = (0.9, 0.1) and (0.3, 0.7), so p(y) = (0.6, 0.4)
    logits = torch.tensor([[0.9, 0.1], [0.3, 0.7]], dtype=torch.float64).log() + 3
    one = 0.6 * math.log(0.6 / 0.9) + 0.4 * math.log(0.4 / 0.1)
    two = 0.6 * math.log(0.6 / 0.3) + 0.4 * math.log(0.4 / 0.7)
    expected = {"score": (one + two) / 2, "frechet": 0, "classes": 2}
    assert evaluate(logits, logits) == pytest.approx(expected, abs=1e-6)
    counts = torch.tensor([981, 10, 9])  # below one percent a class does not count
    logits = 300 * torch.eye(3).repeat_interleave(counts, dim=0)
    scores = evaluate(logits, logits)
    assert scores["classes"] == 2
    assert 0 < scores["score"] < 1  # a collapse to one class scores next to nothing


def test_frechet_distance_of_gaussians_with_diagonal_covariance():
    # then it is |m - m'|^2 + sum (s - s')^2; the points have exactly these moments
    signs = torch.tensor(list(itertools.product((-1, 1), repeat=3))) * (7 / 8) ** 0.5
    one = signs * torch.tensor([1.0, 0.5, 2.0]) + torch.tensor([1.0, 2.0, 3.0])
    two = signs * torch.tensor([0.2, 0.5, 1.0]) + torch.tensor([0.0, 2.5, 3.0])
    expected = pytest.approx(1 + 0.25 + 0.8**2 + 0 + 1)
    assert evaluate(one, two)["frechet"] == expected
    assert evaluate(two, one)["frechet"] == expected
    for bad in (one[:0], one[:1], one / 0):
        with pytest.raises(ValueError):
            evaluate(bad, one)
        with pytest.raises(ValueError):
            evaluate(one, bad)


def test_chunks_have_few_values_and_change_nothing():
    x, sizes = torch.rand(7, 1, 400, 400), []

    def double(chunk):
        sizes.append(chunk.numel())
        return 2 * chunk

    close(ebgan.run_batched(double, x, "cpu"), 2 * x)
    assert max(sizes) <= 512_000
    z = torch.rand(5, 2)  # the output counts as well
    wide = ebgan.run_batched(lambda z: double(z).repeat(1, 10**5), z, "cpu")
    close(wide, (2 * z).repeat(1, 10**5))
    assert max(sizes[-3:]) <= 4


# -------------------------------------------------------------------------------- data
def test_digits_are_ten_classes_and_a_function_of_the_seed():
    imgs, labels = ebgan.synthetic_digits(500, 32, seed=3)
    assert imgs.shape == (500, 1, 32, 32)
    assert len(labels.bincount()) == 10
    assert labels.bincount().min() > 20
    assert (imgs.flatten(1).amax(1) > 150).all()  # no picture is empty
    assert (imgs[:, :, [0, -1]] < 128).all()  # and no digit is cut off
    assert torch.equal(imgs, ebgan.synthetic_digits(500, 32, seed=3)[0])
    assert not torch.equal(imgs, ebgan.synthetic_digits(500, 32, seed=4)[0])


def idx(array):
    """Return an array in the format of MNIST's files."""
    head = np.array([2048 + array.ndim, *array.shape], dtype=">i4")
    return head.tobytes() + array.tobytes()


def write_mnist(folder):
    """Write 50 images of brightness 10 * label twice, as torchvision reads them."""
    labels = np.arange(50, dtype=np.uint8) % 10
    imgs = np.full((50, 28, 28), 10 * labels[:, None, None], dtype=np.uint8)
    Path(folder).mkdir(parents=True)
    for part in ("train", "t10k"):
        Path(folder, f"{part}-images-idx3-ubyte").write_bytes(idx(imgs))
        Path(folder, f"{part}-labels-idx1-ubyte").write_bytes(idx(labels))
    return labels


def test_mnist_on_disk_is_found_without_a_flag():
    labels = torch.from_numpy(write_mnist("data/MNIST/raw"))
    assert ebgan.default_dataset("data") == "mnist"
    imgs = (10 * labels).view(-1, 1, 1, 1).expand(-1, 1, 32, 32)
    data = ebgan.load_images("mnist", "data", 32, None, 1)
    close(data, [imgs, labels.long()] * 2)


@pytest.fixture
def no_network(monkeypatch):
    monkeypatch.setattr(socket, "getaddrinfo", mock.Mock(side_effect=OSError))


def test_damaged_mnist_is_named_and_never_replaced(no_network):
    write_mnist("data/MNIST/raw")
    raw = Path("data/MNIST/raw").absolute()
    imgs, labels = raw / "train-images-idx3-ubyte", raw / "train-labels-idx1-ubyte"
    test_labels = raw / "t10k-labels-idx1-ubyte"
    for path, content in (
        (imgs, b"<html>not found</html>"),
        (imgs, imgs.read_bytes()[:9999]),
        (labels, idx(np.arange(40, dtype=np.uint8))),  # of other images
        (test_labels, idx(np.arange(60, dtype=np.uint8))),
        (test_labels, None),
    ):
        before = path.read_bytes()
        path.write_bytes(content) if content else path.unlink()
        for flags in ([], ["--dataset", "mnist"]):
            assert str(raw) in refused(ebgan, "--max_steps", 1, *flags)
        path.write_bytes(before)
    assert not Path("runs").exists()


def test_without_a_network_the_digits_are_taken_and_scored(no_network, monkeypatch):
    def fewer(n, *args, seed, draw=ebgan.synthetic_digits):
        return draw(n // 8, *args, seed)

    monkeypatch.setattr(ebgan, "synthetic_digits", fewer)
    Path("data/MNIST/raw").mkdir(parents=True)
    Path("data/MNIST/raw/mine.txt").write_text("mine")
    out, _ = call(ebgan, "--img_size", 8, "--max_steps", 1, "--out_dir", "x")
    assert "using the built-in digits" in out
    assert "2500 training images, 625 held out" in out
    scores = {name: float(x) for name, x in read_log("x")[0].items()}
    assert 0 < scores["score"] < scores["real_score"]
    assert 0 <= scores["real_frechet"] < scores["frechet"]
    assert 1 <= scores["classes"] <= scores["real_classes"] == 10
    for name in ("mnist", "kmnist", "cifar10", "svhn"):
        refused(ebgan, "--dataset", name)
    assert Path("data/MNIST/raw/mine.txt").read_text() == "mine"
    assert socket.getdefaulttimeout() is None
    for name in ("download", "_check_integrity"):
        monkeypatch.setattr(ebgan.datasets.SVHN, name, lambda self: True)
    monkeypatch.setitem(sys.modules, "scipy", None)  # as if it were not installed
    assert "scipy" in refused(ebgan, "--dataset", "svhn")
    Image.new("L", (8, 8)).save(
        "data/picture.png"
    )  # digits are not what is wanted then
    assert "--dataset folder" in refused(ebgan, "--img_size", 8, "--max_steps", 1)
    monkeypatch.setattr(ebgan.ImageFont, "load_default", lambda: None)  # Pillow 10.0
    assert "Pillow" in refused(ebgan, "--dataset", "digits", "--max_steps", 1)


noise = np.random.default_rng(0)
GREY = noise.integers(0, 256, (30, 8, 8), dtype=np.uint8)
COLOUR = noise.integers(0, 256, (30, 8, 8, 3), dtype=np.uint8)
FOLDER = ["--dataset", "folder", "--data_root", "in", "--img_size", 8]


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


def test_pictures_keep_their_pixels_and_what_is_left_out_is_counted(capsys):
    write_pictures(GREY, "in/grey")
    for left_out in ("a.gif", "b.GIF", ".x.png", ".hidden/x.png", "new/00000.png"):
        Path("in", left_out).parent.mkdir(parents=True, exist_ok=True)
        Path("in", left_out).write_text("not a picture")
    Path("in/new/generated_from.txt").touch()
    os.mkfifo("in/pipe.png")
    Path("in/grey/up").symlink_to("..")
    for channels in (None, 1, 3):
        imgs, labels = load_pictures(channels)
        assert imgs.shape == (30, channels or 1, 8, 8)
        assert pixels(imgs[:, -1]) == pixels(GREY)
        assert not labels.any()
    line, *_ = capsys.readouterr().out.splitlines()
    for count in ("2 .gif", "2 hidden", "1 .png"):
        assert count in line
    assert "run" in line
    write_pictures(COLOUR, "elsewhere")
    Path("in/colour").symlink_to("../elsewhere")
    imgs, labels = load_pictures()
    assert imgs.shape == (60, 3, 8, 8)
    assert pixels(imgs[labels == 0].movedim(1, 3).contiguous()) == pixels(COLOUR)
    assert pixels(imgs[labels == 1, 0]) == pixels(GREY)


def test_pictures_are_read_as_they_look_or_refused_by_name():
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
    Image.fromarray(GREY[0].astype(np.float32)).save("float.tiff")
    Image.fromarray(GREY[0].astype(np.uint16)).save("deep.png")
    Path("broken.png").write_text("no picture")
    Path("cut.png").write_bytes(Path("in/0.png").read_bytes()[:60])
    names = ("broken.png", "cut.png", "deep.png", "float.tiff")
    for name in names:
        Path(name).rename(f"in/{name}")
    with mock.patch.object(ebgan.ImageOps, "fit", side_effect=MemoryError):
        assert "out of memory" in refused(ebgan, *FOLDER)
    line = refused(ebgan, *FOLDER)  # all at once
    assert "4 " in line and all(name in line for name in names[:3])


# ------------------------------------------------------------------------ the contract
def source(script):
    return Path(script.__file__).read_text()


def definitions(script):
    """Return {name: source} of a script's functions and classes, and of the rest."""
    head, *parts = source(script).split("\n\n\n")
    found = {re.search(r"(?:def|class|if) (\w+)", part)[1]: part for part in parts}
    return found | {"head": head.split('"""')[2]}


def test_scripts_differ_in_the_variant_alone():
    plain, pt, sweep = map(definitions, SCRIPTS)
    changed = {"train_step", "train", "parse_args"}
    assert {x for x in plain if plain[x] != pt[x]} == changed
    lines = set(plain["train_step"].splitlines()) ^ set(pt["train_step"].splitlines())
    assert {line.split()[0] for line in lines} == {"lambda_pt:", "loss_g"}
    changed = {"parse_args", "load_data", "main"}
    assert {x for x in pt if pt[x] != sweep[x]} == changed
    assert (pt.keys() - plain.keys(), sweep.keys() - pt.keys()) == (set(), {"sweep"})
    for pair, limit in ((SCRIPTS[:2], 20), (SCRIPTS[1:], 90)):
        lines = difflib.unified_diff(*(source(x).splitlines() for x in pair), n=0)
        assert sum(line[0] in "+-" for line in list(lines)[2:]) <= limit


@pytest.mark.parametrize("script", SCRIPTS)
def test_losses_come_first_and_help_names_every_default(script):
    lines = source(script).splitlines()
    names = [x[1] for x in map(re.compile(r"(?:class|def) (\w+)").match, lines) if x]
    order = "energy discriminator_loss pullaway_loss UpsampleConv2d init_weights"
    order += " Generator Discriminator train_step train"
    assert names[:9] == order.split()
    assert [x[:10] for x in lines].index("def energy") < 70
    method = [x[:10] for x in lines].index("def train(") - 3  # where train_step ends
    assert method <= (215 if script is ebgan else 217)
    assert not re.search(r"\n *assert ", source(script))  # `python -O` has none
    assert max(len(line) for line in source(script).splitlines()) <= 88
    text = " ".join(call(script, "--help")[0].split()) + " --"
    defaults = vars(script.parse_args([]))
    flags = set(re.findall(r"(?<= --)\w+", text))
    assert flags >= defaults.keys() - {"script", "processes", "images"}
    for flag in flags & defaults.keys():
        if type(defaults[flag]) in (int, float, list):
            shown = re.search(rf" --{flag} (.*?) --", text)[1]
            values = re.search(r"\[([-\d. ]+)\]", shown)[1].split()
            assert np.ravel(defaults[flag]).tolist() == [float(x) for x in values]
    assert (defaults["n_epochs"], defaults["batch_size"]) == (200, 64)


# ------------------------------------------------- processes that run beside the tests
TRAIN = "$PYTHON $HERE/ebgan.py $TINY --out_dir x --max_steps"
UNTIL_SAVED = "until [ -e x/samples/7.png ] || ! kill -0 $!; do sleep 0.01; done"
TORCHRUN = "torch.distributed.run --nproc_per_node=2 --standalone --redirects 3"
IMPORT = "import sys; sys.argv[1:] = ['--bad']; import " + ", ".join(NAMES)
COMMANDS = {
    "killed": f"{TRAIN} 52 >&- & {UNTIL_SAVED}; kill -9 $!",  # and nobody reads it
    "torchrun": f"$PYTHON -m {TORCHRUN} --log-dir y $HERE/ebgan_pt.py $TINY $FIRST x",
    "broken_pipe": f"{TRAIN} 1 | true",
    "import": f'$PYTHON -Bc "{IMPORT}"',
}


@pytest.fixture(scope="session", autouse=True)
def started(tiny, tmp_path_factory):
    """Start all at once, as torch is imported slowly; {name: (folder, process)}."""
    env = os.environ | {"PYTHON": sys.executable, "OMP_NUM_THREADS": "1"}
    env |= {"HERE": str(HERE), "PYTHONPATH": str(HERE)}
    env["TINY"] = " ".join(map(str, tiny))
    env["FIRST"] = " ".join(map(str, NORM + ONE_STEP))
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
    running = {}
    for name, command in COMMANDS.items():
        folder = tmp_path_factory.mktemp(name)
        bash = subprocess.Popen(["bash", "-c", command], cwd=folder, env=env, **pipes)
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
    """Return the log's rows without the speed."""
    with open(Path(folder, "log.csv"), newline="") as file:
        rows = list(csv.DictReader(file))
    assert all(float(row.pop("images_per_s")) > 0 for row in rows)
    return rows


def check_same(one, two):
    """Compare two runs: the logs, and to the bit what the checkpoints hold."""
    assert read_log(one) == read_log(two)
    one, two = load(one), load(two)
    for name in one.keys() - {"rows", "flags"}:
        close(one[name], two[name], rtol=0, atol=0)


def test_run_leaves_a_log_pictures_and_a_checkpoint(whole):
    log, saved = read_log(whole), load(whole)
    assert b"\r" not in Path(whole, "log.csv").read_bytes()
    steps = [int(row["step"]) for row in log]
    assert steps == [7, 14, 20, 21, 24, 28, 35, 40, 42, 48, 49, 50, 52]
    for step, row in zip(steps, log):
        assert int(row["epoch"]) == math.ceil(step / 24)  # 4 of the 96 images a step
        assert bool(row["tv_bound"]) == (step in (24, 48, 52))
        assert 0 <= float(row["tv_bound"] or 0) <= 1
        assert "score" not in row  # no classes
    for name in ("samples", "samples/7", "samples/24", "samples/50", "samples/52"):
        assert Image.open(whole / f"{name}.png").size == (82, 82)
    assert saved["step"] == saved["rows"][-1]["step"] == 52
    assert saved["flags"]["margin"] == pytest.approx(10 * 8 / 32)  # the paper's
    assert saved["flags"]["noise"] == 0.3
    counts = [x for key, x in saved["generator"].items() if "num_batches" in key]
    assert [count.item() for count in counts] == [52] * 2  # always in training mode


def test_discriminator_of_a_run_is_an_energy_of_one_image(whole, tiny):
    imgs = ebgan.load_images("folder", tiny[3], 8, None, 1)[0] / 127.5 - 1
    _, discriminator = ebgan.load_run(whole)
    energies = ebgan.energy(discriminator(imgs)[0], imgs)
    close(ebgan.energy(discriminator(imgs[:1])[0], imgs[:1]), energies[:1])
    embedding = discriminator(imgs)[1]  # what the first normalisation sees
    var = torch.stack([part.var(0) for part in embedding.split(24)])  # four batches
    close(
        discriminator.decoder[0].running_mean, embedding.mean(0), rtol=1e-4, atol=1e-5
    )
    close(discriminator.decoder[0].running_var, var.mean(0), rtol=1e-4, atol=1e-5)


def test_batch_statistics_are_never_those_of_one_image(tiny, monkeypatch):
    opt = ebgan.parse_args([str(x) for x in (*tiny, "--channels", 3, "--out_dir", "x")])
    Path("x/samples").mkdir(parents=True)
    chunks = []
    swa, record = torch.optim.swa_utils, lambda x, _: chunks.extend(map(len, x))
    monkeypatch.setattr(swa, "update_bn", record)
    state, _, _ = ebgan.build(opt)
    for n, size in ((18, 8), (18, 512), (35, 1024)):
        imgs = torch.zeros(n, 3, size, size, dtype=torch.uint8)
        ebgan.save(opt, state, imgs, 0, [])
        assert sum(chunks) == n and 2 <= min(chunks) and max(chunks) <= 8
        chunks.clear()


def test_devices_suffice_and_cudnn_is_deterministic_in_main_alone(tiny, monkeypatch):
    def train(*_):
        states.append(torch.backends.cudnn.deterministic)
        try:
            raise torch.OutOfMemoryError("CUDA out of memory")
        finally:
            raise RuntimeError("as when a graph is being recorded")

    monkeypatch.setenv("LOCAL_WORLD_SIZE", "2")
    assert ebgan.parse_args(["--device", "cpu:0"]).device == "cpu:0"
    states, backends = [], []
    monkeypatch.setattr(ebgan, "load_data", lambda opt: None)
    monkeypatch.setattr(ebgan, "train", train)
    monkeypatch.setattr(ebgan, "WORLD_SIZE", 2)
    monkeypatch.setattr(ebgan.atexit, "register", lambda _: None)
    monkeypatch.setattr(torch.distributed, "init_process_group", backends.append)
    assert "out of memory" in refused(ebgan, *tiny)
    assert [*states, torch.backends.cudnn.deterministic] == [True, False]
    assert backends == ["gloo"]  # NCCL would need a device for each process
    monkeypatch.setattr(torch, "zeros", lambda *_, **__: torch.ones(1))
    monkeypatch.setattr(torch.accelerator, "is_available", lambda: False)
    for device, n in (("cuda", 1), ("cuda:1", 2)):
        monkeypatch.setattr(torch.accelerator, "device_count", lambda n=n: n)
        assert "2 processes need" in refused(ebgan, "--device", device)


def process_state():
    handlers = [signal.getsignal(x) for x in (signal.SIGINT, signal.SIGTERM)]
    numbers = torch.get_rng_state().tolist(), str(np.random.get_state())
    return handlers, numbers, torch.get_num_threads(), torch.is_grad_enabled()


def test_newest_run_is_resumed_and_generates_without_a_trace_in_the_process(tiny):
    torch.manual_seed(123)  # no number that a run could leave behind
    before = process_state()
    assert "runs/" in refused(ebgan, "--generate", 5)
    with torch.inference_mode():  # whatever the caller's mode
        out, _ = call(ebgan, *tiny, "--max_steps", 1)
    (new,) = Path("runs").glob("ebgan-*")
    for fact in ("96 training images", "10 held out", "cpu", str(new)):
        assert fact in out
    shutil.copytree(new, "runs/ebgan-20200101-000000")
    for other in ("ebgan_pt-99990101-000000", "ebgan-copy-99990101-000000"):
        shutil.copytree(new, Path("runs", other))
    for step in (99, 199):  # as if it had come that far
        torch.save(load(new) | {"step": step}, new / "checkpoint.pt")
        ThreadPool(1).apply(call, [ebgan, "--resume", "--max_steps", step + 2])
        assert (new / f"samples/{step + 1}.png").exists()
    assert "nothing to do" in call(ebgan, "--resume", "--max_steps", 5)[0]
    call(ebgan, "--generate", 3)
    call(ebgan, "--generate", 3, "--seed", 1, "--out_dir", "pics")
    assert "pics" in refused(
        ebgan, "--generate", 2, "--out_dir", "pics"
    )  # not stale ones
    one, two = sorted(new.glob("generated-*/*")), sorted(Path("pics").iterdir())
    names = ["00000.png", "00001.png", "00002.png", "generated_from.txt", "grid.png"]
    assert [x.name for x in one] == [x.name for x in two] == names
    assert one[0].read_bytes() != two[0].read_bytes()  # --seed
    assert process_state() == before
    Path("runs/ebgan-99990101-000000").mkdir()  # no older one is taken in its place
    assert "ebgan-99990101-000000" in refused(ebgan, "--resume")


def test_rate_falls_and_pictures_are_those_of_the_running_mean(tiny):
    """As in TensorFlow with num_updates: decay min(0.999, (1 + n) / (10 + n))."""
    states, argv = [], [*tiny, "--lr", 0.01, "--lr_decay", 0.5, "--out_dir", "x"]
    for step, rate in ((1, 0.01 / 1.5), (2, 0.01 / 2), (3, 0.01 / 2.5)):
        call(ebgan_pt, *argv, "--max_steps", step)
        states.append(load("x")["generator"])
        for name in ("optimizer_d", "optimizer_g"):
            group = load("x")[name]["param_groups"][0]
            assert group["lr"] == pytest.approx(rate)
        argv = ["--resume", "x"]
    with torch.random.fork_rng():
        torch.manual_seed(0)
        start = ebgan_pt.Generator(8, 1).state_dict()
    generator, _ = ebgan_pt.load_run("x")
    for key, value in generator.named_parameters():
        mean = start[key]
        for n, state in enumerate(states):
            mean = mean + (1 - (1 + n) / (10 + n)) * (state[key] - mean)
        close(value.data, mean)
    before = load("x")
    torch.save(before | {"step": 10**5}, "x/checkpoint.pt")
    call(ebgan_pt, "--resume", "x", "--n_epochs", 10**5, "--max_steps", 10**5 + 1)
    for key, mean in before["averaged"].items():
        if mean.is_floating_point():
            mean = 0.999 * mean + 0.001 * load("x")["generator"][key]
            close(load("x")["averaged"][key], mean)
    call(ebgan_pt, "--generate", 64, "--resume", "x")
    (grid,) = Path("x").glob("generated-*/grid.png")
    for file, key in ((Path("x/samples.png"), 2), (grid, 4)):
        shown = np.asarray(Image.open(file))[2:10, 2:10, 0]
        z = torch.randn(64, 62, generator=ebgan.seeded_generator(0, key))[:1]
        expected = generator(z)[0, 0].detach().numpy() * 127.5 + 127.5
        assert np.abs(shown - expected).max() <= 1


def ctrl_c(script, n):
    """Press Ctrl-C at the n-th loss taken: of a step, or at the end of an epoch."""
    effects = [mock.DEFAULT] * (n - 1) + [KeyboardInterrupt]
    options = {"wraps": script.discriminator_loss, "side_effect": effects}
    return mock.patch.object(script, "discriminator_loss", **options)


def test_sweep_compares_margins_and_is_resumed_with_its_newest_flags(tiny):
    sweep, flags = ebgan_margin_ablation, [*tiny, "--out_dir"]
    margins = ["--margins", 0, 0.5, "--seeds", 0, 5, "--max_steps", 2]
    with ctrl_c(sweep, 8):  # in the third run
        call(sweep, *flags, "x", *margins, status=130)
    with ctrl_c(sweep, 2):
        more = ["--max_steps", 3, "--margins", 0, 0.5, 1]
        _, err = call(sweep, "--resume", "x/margin_0/seed_0", *more, status=130)
    out, _ = call(sweep, *resume_command(err))
    assert "run 6 of 6" in out
    with open("x/results.csv", newline="") as file:
        results = list(csv.DictReader(file))
    values = [float(x["real_energy"]) for x in results[:2]]
    mean, sd = statistics.mean(values), statistics.stdev(values)
    assert f"real_energy {mean:.4g} +- {sd:.2g}" in out
    rows = [(x["margin"], x["seed"], x["step"]) for x in results]
    runs = itertools.product(("0", "0.5", "1"), ("0", "5"), ("3",))
    assert rows == list(runs)
    assert Image.open("x/margins.png").size[1] == 3 * (8 + 2) + 2
    call(ebgan_pt, *flags, "alone", "--margin", 0.5, "--seed", 5, "--max_steps", 3)
    check_same("alone", "x/margin_0.5/seed_5")
    assert "\nstep " not in call(sweep, "--resume", "x")[0]  # no run is trained twice
    assert "3" in refused(sweep, "--resume", "x", "--max_steps", 2)
    with pytest.raises(ValueError, match="no networks"):
        sweep.load_run("x")
    call(sweep, "--generate", 1, "--resume", "x/margin_0/seed_5", "--out_dir", "pics")
    assert Path("pics/00000.png").exists()


def test_sweep_goes_on_after_a_run_that_is_not_finite(tiny):
    sweep, flags = ebgan_margin_ablation, [*tiny, "--max_steps", 1, "--seeds", 0]

    def loss(real_energy, fake_energy, margin):
        return real_energy.mean() * (math.inf if margin == 7 else 1)

    with mock.patch.object(sweep, "discriminator_loss", loss):
        call(sweep, *flags, "--margins", 7, 1, "--out_dir", "x")
    with open("x/results.csv", newline="") as file:
        one, two = csv.DictReader(file)
    assert "not finite" in one["error"] and not two["error"] and two["step"] == "1"
    stop = mock.patch.object(sweep, "save", side_effect=KeyboardInterrupt)
    with stop:  # before the first checkpoint of a run
        call(sweep, *flags, "--margins", 1, "--out_dir", "y", status=130)
    call(sweep, "--resume", "y")
    opt = sweep.parse_args([str(x) for x in (*flags, "--out_dir", "z")])
    Path("z").mkdir()
    Path("z/checkpoint.pt").touch()  # by another sweep, begun at the same time
    with pytest.raises(FileExistsError):
        sweep.sweep(opt, [])


def test_python_code_in_readme_and_results_runs(whole, monkeypatch, capsys):
    def load_images(name, *_):
        return [None, None, ebgan.synthetic_digits(50, 8, seed=len(name))[0], None]

    monkeypatch.setattr(ebgan, "load_images", load_images)
    for name in ("mnist", "default-mnist-0"):
        shutil.copytree(whole, f"runs/{name}")
    text = "".join((HERE / x).read_text() for x in ("README.md", ".github/RESULTS.md"))
    score, auroc, fold = re.findall(r"```python\n(.*?)```", text, re.DOTALL)
    Path("score.py").write_text(score.replace("32, 1)", "8, 1)"))
    Path("auroc.py").write_text(auroc)
    Path("fold.py").write_text(fold.replace("number=50", "number=1"))
    Image.fromarray(GREY[0]).save("strange.png")
    Image.fromarray(load_images("mnist")[2][0, 0].numpy()).save("normal.png")
    monkeypatch.setattr(sys, "argv", ["score.py", "strange.png", "normal.png"])
    runpy.run_path("score.py")
    assert re.findall(r"\w+\.png", capsys.readouterr().out) == ["strange.png"]
    auroc = runpy.run_path("auroc.py")["auroc"]
    runpy.run_path("fold.py")
    printed = capsys.readouterr().out.split()
    assert len(printed) == 4 + 2 and all(float(x) > 0 for x in printed)
    normal, strange = load_images("digits")[2] / 127.5 - 1, torch.rand(20, 1, 8, 8)
    _, discriminator = ebgan.load_run(whole)
    one, two = (ebgan.energy(discriminator(x)[0], x) for x in (normal, strange))
    pairs = [float(b > a) for a in one for b in two]
    assert auroc(normal, strange).item() == pytest.approx(sum(pairs) / len(pairs))


# --------------------------------------------------------------- resuming and stopping
def resume_command(err):
    """Return the flags of the command that Ctrl-C has printed."""
    (line,) = err.splitlines()
    python, script, *argv = shlex.split(line.split(": ")[-1])
    assert python == "python" and Path(script).is_file()
    return argv


def test_stopped_and_killed_runs_are_resumed_as_if_never_interrupted(
    tiny, whole, started
):
    flags = ["--max_steps", 52, "--out_dir", "x y"]
    with ctrl_c(ebgan, 1):  # when nothing but the first weights is saved
        _, err = call(ebgan, *tiny, *flags, status=130)
    with ctrl_c(ebgan, 42):  # in step 41, after one at the end of the first epoch
        _, err = call(ebgan, *resume_command(err), status=130)
    assert load("x y")["step"] == 35
    for n in (14, 2):  # while step 48 is scored, and after that
        with ctrl_c(ebgan, n):
            _, err = call(ebgan, *resume_command(err), status=130)
        assert load("x y")["step"] == 48
    call(ebgan, *resume_command(err))
    check_same("x y", whole)
    loading = mock.patch.object(ebgan, "load_images", side_effect=KeyboardInterrupt)
    with loading:
        _, err = call(ebgan, "--resume", "x y", "--max_steps", 53, status=130)
    assert resume_command(err)[-2:] == ["--resume", str(Path("x y").absolute())]
    assert "--max_steps 53" in err
    folder, bash = started["killed"]
    assert "Traceback" not in bash.communicate()[1]
    call(ebgan, "--resume", folder / "x")
    check_same(folder / "x", whole)


def test_run_is_not_resumed_on_other_data(tiny):
    shutil.copytree(tiny[3], "in")
    call(ebgan, *tiny, "--data_root", "in", "--max_steps", 1, "--out_dir", "x")
    call(ebgan, "--resume", "x", "--max_steps", 2, "--data_root", tiny[3])  # the same
    flags = ["--max_steps", 3, "--data_root", "in"]
    before = Path("x/checkpoint.pt").read_bytes()
    shutil.copy("in/0.png", "in/new.png")
    assert "--data_root" in refused(ebgan, "--resume", "x", *flags)
    Path("in/new.png").unlink()
    Path("in/0.png").unlink()
    Path("in/1.png").rename("in/0.png")
    shutil.copy("in/2.png", "in/1.png")  # as many
    assert "--data_root" in refused(ebgan, "--resume", "x", *flags)
    assert Path("x/checkpoint.pt").read_bytes() == before
    shutil.copy("x/checkpoint.pt", "x/other.pt")  # which would overwrite the newer one
    assert "other.pt" in refused(ebgan, "--resume", "x/other.pt", "--max_steps", 3)


def test_few_pictures_are_not_scored_after_each_epoch(tiny):
    flags = ["--batch_size", 48, "--max_steps", 9, "--out_dir", "x"]
    call(ebgan, *tiny, *flags)  # 2 steps an epoch, a save every 7
    scored = [int(row["step"]) for row in read_log("x") if row["tv_bound"]]
    assert scored == [8, 9]


def test_lines_between_saves_are_written_over_on_a_terminal(tiny):
    class Terminal(io.StringIO):
        def isatty(self):
            return True

    with mock.patch.object(sys, "stdout", Terminal()):
        flags = ["--sample_interval", 100, "--max_steps", 21, "--out_dir", "x"]
        ebgan.main([str(x) for x in (*tiny, *flags)])
        lines = sys.stdout.getvalue().split("\n")
    *written_over, kept = lines[-2].split("\r")
    assert [line.split(" epoch")[0][-2:] for line in written_over] == ["20"]
    assert "step 21 " in kept
    assert all("left" in line for line in (*written_over, kept))


def test_run_in_parts_is_the_whole_run_with_its_scores(monkeypatch):
    n = COLOUR[0].size
    monkeypatch.setattr(ebgan_pt, "train_classifier", lambda *_: pass_through(n))
    write_pictures(COLOUR[:10], "in/one")
    write_pictures(COLOUR[10:], "in/two")
    flags = [*FOLDER, "--amp", "--batch_size", 3, "--seed", 7, "--sample_interval", 9]
    flags += ["--out_dir"]
    call(ebgan_pt, *flags, "whole", "--max_steps", 11)
    call(ebgan_pt, *flags, "parts", "--max_steps", 9)  # the end of an epoch
    call(ebgan_pt, "--resume", "parts/checkpoint.pt", "--max_steps", 11)
    check_same("whole", "parts")
    scores = {int(row["step"]): float(row["frechet"]) for row in read_log("whole")}
    assert list(scores) == [9, 11]
    assert min(scores.values()) > 0
    kinds = {x.dtype for x in load("whole")["generator"].values()}
    assert kinds == {torch.float32, torch.int64}  # in spite of --amp


@pytest.fixture
def kept(whole):
    """A copy x of the whole run, which has to stay as it is but for its flags."""
    shutil.copytree(whole, "x")
    yield
    check_same("x", whole)


def test_fault_in_a_step_keeps_the_last_checkpoint(kept):
    more, size = ["--max_steps", 53], Path("x/checkpoint.pt").stat().st_size
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size // 2, hard))  # a full disk
    try:
        assert str(Path("x").absolute()) in refused(ebgan, "--resume", "x", *more)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    with mock.patch.object(ebgan, "energy", lambda recon, *_: recon * math.inf):
        line = refused(ebgan, "--resume", "x", "--max_steps", 60)
    assert "not finite at step 56" in line
    assert len(list(Path("x").iterdir())) == 4  # nothing half-written


class Evil:
    def __reduce__(self):
        return os.mkdir, ("evil",)


def test_foreign_checkpoints_and_contradicting_flags_are_refused(kept):
    saved = load("x")
    older = saved["flags"].keys() - {"lr_decay"}
    for name, content in {
        "foreign": {"model": torch.zeros(3)},
        "other_flags": {"flags": {"x": 1}},
        "no_networks": {"flags": saved["flags"]},
        "other_network": saved | {"generator": saved["discriminator"]},
        "sed_variant": saved | {"flags": saved["flags"] | {"script": "variant"}},
        "other_script": saved | {"flags": saved["flags"] | {"script": "ebgan_pt"}},
        "older": saved | {"flags": {k: saved["flags"][k] for k in older}},
        "evil": saved | {"flags": {"script": Evil()}},
    }.items():
        torch.save(content, f"{name}.pt")
    content = Path("x/checkpoint.pt").read_bytes()
    Path("cut.pt").write_bytes(content[: len(content) // 2])
    Path("empty.pt").touch()
    for file in Path().glob("*.pt"):
        assert file.name in refused(ebgan, "--resume", file, "--max_steps", 53)
    assert not Path("evil").exists()
    line = refused(ebgan, "--resume", "other_script.pt", "--max_steps", 53)
    assert line.endswith(" is from ebgan_pt.py")
    flags = "energy=mse noise=0 margin=3.0 img_size=16 channels=3 latent_dim=5"
    flags += " batch_size=8 b1=0 dataset=digits lr=0.5 lr_decay=0 seed=9 out_dir=y"
    for flag in flags.split():
        assert flag.split("=")[0] in refused(ebgan, "--resume", "x", f"--{flag}")


# --------------------------------------------------------------------- other processes
def test_two_processes_average_the_gradients_of_their_halves(started, tiny):
    folder, bash = started["torchrun"]
    _, err = bash.communicate()
    assert bash.returncode == 0, err
    check_first_step(folder / "x", tiny[3], "norm", weight=0.1, ranks=2)
    said = [next(folder.glob(f"y/**/{i}/stdout.log")).read_text() for i in (0, 1)]
    assert said[0].count("step 1 ") == 1
    assert said[1] == ""  # the first process alone writes
    assert len(read_log(folder / "x")) == 1


def test_output_that_nobody_reads_and_import_leave_no_traceback(started):
    for name in ("broken_pipe", "import"):
        folder, bash = started[name]
        assert bash.communicate() == ("", "")
        assert bash.returncode == 0
    assert not list(folder.iterdir())  # import has no effect


# --------------------------------------------------------------------------- bad input
BAD = {
    ebgan: """
--batch_size 1 | --batch_size 97 | --batch_size many | --n_epochs 0 | --n_cpu -1 |
--img_size 30 | --img_size 4 | --channels 2 | --latent_dim 0 | --energy sum |
--margin -1 | --margin nan | --margin inf | --noise -1 | --lr 0 | --lr_decay -1 |
--b1 1 | --b2 -0.1 | --sample_interval 0 | --max_steps 0 | --max_steps 1.5 |
--generate 0 | --lr nan | --data_root text |
--seed -1 | --seed 99999999999999999999 | --dataset imagenet |
--device gpu | --device cuda:99 | --device meta | --data_root nowhere |
--out_dir text/readme.txt/run | --out_dir text/readme.txt | --out_dir text |
--out_dir= | --resume nowhere | --resume text | --resume text/readme.txt |
--resum x | --n_epoch 3 | surplus""",
    ebgan_pt: "--lambda_pt -0.1 | --lambda_pt inf",
    ebgan_margin_ablation: """
--margins | --margins 1 -1 | --margins 1 2 1.0 | --margins 0 -0 | --margin 1 |
--seeds 0 0 | --seeds 0 x | --seeds -1""",
}
CALLS = [(script, bad.strip()) for script in BAD for bad in BAD[script].split("|")]


@pytest.mark.parametrize(("script", "bad"), CALLS)
def test_bad_input_is_one_line_and_status_2(script, bad, tiny):
    Path("text").mkdir()
    Path("text/readme.txt").write_text("no picture")
    before = sorted(Path().rglob("*"))
    line = refused(script, *tiny, "--max_steps", 1, *bad.split())
    flag, *values = re.split("[ =]", bad)
    assert flag in line or values[-1] in line
    assert sorted(Path().rglob("*")) == before
