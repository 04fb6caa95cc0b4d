# SPDX-License-Identifier: MIT
"""Tests of the scripts against oracles that share no code with them.

pytest test_ebgan.py                               all
pytest test_ebgan.py -k "energy or loss or shape"  a quick check
"""

import ast
import csv
import importlib
import itertools
import math
import os
import re
import runpy
import shlex
import shutil
import socket
import statistics
import subprocess
import sys
import time
from argparse import Namespace
from pathlib import Path
from unittest import mock

import numpy as np
import pytest
import torch
from PIL import Image
from torch import nn
from torch.nn import functional as F

import ebgan

HERE = Path(__file__).parent
ALL_NAMES = "ebgan", "ebgan_pt", "ebgan_margin_ablation"
NAMES = [name for name in ALL_NAMES if (HERE / f"{name}.py").exists()]
SCRIPTS = [importlib.import_module(name) for name in NAMES]
torch.set_num_threads(1)  # as in the processes below: another number rounds otherwise
close = torch.testing.assert_close
parametrize = pytest.mark.parametrize
each_script = parametrize("script", SCRIPTS, ids=NAMES)
train_classifier = ebgan.train_classifier


def untrained_classifier(imgs, labels, device):
    """Stand in for train_classifier, which takes seconds."""
    features = nn.Linear(imgs[0].numel(), 6, bias=False)
    logits = nn.Linear(6, int(labels.max()) + 1, bias=False)
    for layer in (features, logits):
        nn.init.normal_(layer.weight, generator=torch.Generator().manual_seed(0))
    return nn.Sequential(nn.Sequential(nn.Flatten(), features), logits)


@pytest.fixture(autouse=True)
def own_folder(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for script in SCRIPTS:
        monkeypatch.setattr(script, "train_classifier", untrained_classifier)


# ----------------------------------------------------------------------------- losses
@parametrize("kind", ["norm", "mse"])
def test_energy_equals_the_loop_over_pixels(kind):
    recon, imgs = torch.randn(2, 5, 3, 8, 4, dtype=torch.float64).requires_grad_()
    expected = []
    for one, two in zip(recon.flatten(1).tolist(), imgs.flatten(1).tolist()):
        total = sum((a - b) ** 2 for a, b in zip(one, two))
        expected.append(math.sqrt(total) if kind == "norm" else total / (3 * 8 * 4))
    assert ebgan.energy(recon, imgs, kind).tolist() == pytest.approx(expected)
    # the gradient goes through both, and is finite where the reconstruction is exact
    assert torch.autograd.gradcheck(ebgan.energy, (recon, imgs, kind))
    (gradient,) = torch.autograd.grad(ebgan.energy(recon, recon, kind).sum(), recon)
    assert not gradient.any()


@parametrize("shape", [(4, 8, 8), (4, 3, 8, 8), (1, 1, 8, 8)])
def test_energy_of_other_shapes_or_of_unknown_kind_is_an_error(shape):
    one, two = torch.zeros(shape), torch.zeros(4, 1, 8, 8)
    for args in ((one, two), (two, one), (two, two, "l1")):
        with pytest.raises(ValueError, match="differ|l1"):
            ebgan.energy(*args)


@parametrize("margin", [0, 1.0, torch.tensor(7.0)])
def test_discriminator_loss_has_a_hinge_for_each_image(margin):
    real, fake = torch.rand(2, 6, dtype=torch.float64) * 2
    hinges = [max(0.0, float(margin) - u) for u in fake.tolist()]
    expected = statistics.mean(real.tolist()) + statistics.mean(hinges)
    loss = ebgan.discriminator_loss(real, fake, margin)
    assert loss.item() == pytest.approx(expected)


def test_pullaway_loss_equals_the_double_loop():
    embedding = torch.randn(9, 5, dtype=torch.float64) + 0.3
    total = 0.0
    for one, two in itertools.permutations(embedding.tolist(), 2):  # all pairs i != j
        dot = sum(a * b for a, b in zip(one, two))
        total += dot**2 / sum(a * a for a in one) / sum(b * b for b in two)
    value = ebgan.pullaway_loss(embedding).item()
    assert value == pytest.approx(total / (9 * 8), rel=1e-10)
    assert torch.autograd.gradcheck(ebgan.pullaway_loss, embedding.requires_grad_())


def test_pullaway_loss_worked_out_by_hand():
    for rows, expected in (
        ([[1, 2], [2, 4], [-3, -6]], 1),
        ([[1, 0], [1, 0], [0, 1]], 1 / 3),
        ([[0, 0], [1, 0], [1, 1]], 1 / 6),
        ([[0, 0], [0, 0]], 0),
        ([[3, 4]], 0),
        ([[1e20, 1e20], [1e20, 1e20]], 1),
        ([[1e-13, 1e-13], [1e-13, 1e-13]], 1),
    ):
        embedding = torch.tensor(rows, dtype=torch.float32, requires_grad=True)
        loss = ebgan.pullaway_loss(embedding)
        loss.backward()
        assert loss.item() == pytest.approx(expected)
        assert embedding.grad.isfinite().all()


# ---------------------------------------------------------------------------- networks
def test_network_shapes():
    assert ebgan.Generator()(torch.randn(5, 62)).shape == (5, 1, 32, 32)
    assert ebgan.Generator(64, 3, 10)(torch.randn(2, 10)).shape == (2, 3, 64, 64)
    for size, channels in ((32, 1), (64, 3)):
        imgs = torch.zeros(5, channels, size, size)
        recon, embedding = ebgan.Discriminator(size, channels)(imgs)
        assert recon.shape == (5, channels, size, size) and embedding.shape == (5, 32)
    with pytest.raises(ValueError, match="18"):
        ebgan.Generator(img_size=18)


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


@pytest.mark.filterwarnings("ignore:.*torch.jit")  # deprecated, but in use
@parametrize(("size", "channels"), [(8, 1), (12, 3)])
def test_networks_equal_upsampling_and_convolution(size, channels):
    ours, plain = both_networks(size, channels, 9)
    z, imgs = torch.randn(3, 9).double(), torch.rand(3, channels, size, size).double()
    outputs = ours[0].double()(z), *ours[1].double()(imgs)
    expected = plain[0](z), plain[1](imgs), plain[1][0](imgs)
    close(outputs, expected, rtol=0, atol=1e-10)
    for network, x in zip(ours, (z, imgs)):
        expected = network.eval()(x)
        close(torch.jit.trace(network, x)(x), expected)
        close(torch.export.export(network, (x,)).module()(x), expected)


def test_weights_start_as_in_dcgan():
    for layer in nn.ModuleList(both_networks(32, 1)[0]).modules():
        if isinstance(layer, (nn.Conv2d, nn.BatchNorm2d)):
            mean = 0 if isinstance(layer, nn.Conv2d) else 1
            assert layer.weight.mean().item() == pytest.approx(mean, abs=0.01)
            assert layer.weight.std().item() == pytest.approx(0.02, rel=0.3)


# ------------------------------------------------------------------- the training step
def plain_energy(recon, imgs, kind):
    squares = (recon - imgs).square().flatten(1)
    return squares.mean(1) if kind == "mse" else squares.sum(1).sqrt()


def plain_step(plain, optimizer_d, batches, kind, margin, weight):
    """Do a step by the equations, but leave the generator's gradients to the caller.

    Gradients are averaged over the batches, (real images, z, noise), of all processes.
    Return what a run logs of the first batch.
    """
    plain_g, plain_d = plain
    fakes = [plain_g(z) for _, z, _ in batches]
    loss_d, loss_g, logged, cosine_means = 0.0, 0.0, [], []
    for fake, (real, _, noise) in zip(fakes, batches):
        real_energy = plain_energy(plain_d(real + noise), real, kind)
        fake_energy = plain_energy(plain_d(fake.detach() + noise), fake.detach(), kind)
        hinges = [margin - u for u in fake_energy if u < margin]
        assert 0 < len(hinges) < len(real)  # or a hinge on the mean would not be seen
        loss_d += (real_energy.mean() + sum(hinges) / len(real)) / len(batches)
        means = real_energy.mean().item(), fake_energy.mean().item()
        logged += [*means, len(hinges) / len(real)]
    optimizer_d.zero_grad()
    loss_d.backward()
    optimizer_d.step()
    for fake, (_, _, noise) in zip(fakes, batches):
        embedding, n = plain_d[0](fake + noise), len(fake)
        cosines = F.cosine_similarity(embedding[:, None], embedding, dim=2)
        pullaway = (cosines.square().sum() - n) / (n * (n - 1))  # without i = j
        cosine_means.append(pullaway.item())
        fake_energy = plain_energy(plain_d(fake + noise), fake, kind)
        loss_g += (fake_energy.mean() + weight * pullaway) / len(batches)
    plain_g.zero_grad()
    loss_g.backward(inputs=[p for p in plain_g.parameters() if p.requires_grad])
    return [*logged[:3], cosine_means[0]]


def random_batch(n, channels=1):
    imgs = torch.rand(n, channels, 8, 8) * 2 - 1
    return imgs, torch.randn(n, 62), torch.randn_like(imgs)


@parametrize("frozen", [False, True], ids=["all", "some"])
@parametrize(("kind", "margin"), [("norm", 3.7), ("mse", 0.073)])
@each_script
def test_train_step_is_the_equations_on_plain_layers(script, kind, margin, frozen):
    ours, plain = both_networks(8, 3)
    for layers in (ours[0].double().project, plain[0][0]):
        layers.requires_grad_(not frozen)
    optimizers = [torch.optim.SGD(x.double().parameters(), 1e-3) for x in ours]
    plain_g, plain_d = (torch.optim.SGD(x.parameters(), 1e-3) for x in plain)
    weight = {} if script is ebgan else {"lambda_pt": 0.7}
    for _ in range(2):
        batch = [x.double() for x in random_batch(6, 3)]
        result = script.train_step(*ours, *optimizers, *batch, margin, kind, **weight)
        logged = plain_step(plain, plain_d, [batch], kind, margin, sum(weight.values()))
        plain_g.step()
        means = result[0].mean().item(), result[1].mean().item()
        assert means == pytest.approx(logged[:2], rel=1e-9)
        assert script.pullaway_loss(result[2]).item() == pytest.approx(logged[3])
    for one, two in zip(ours, plain):
        for p, q in zip(one.parameters(), two.parameters(), strict=True):
            close(p, q, rtol=1e-7, atol=1e-9)


def one_step(script, networks, **options):
    """Do a step with SGD; return what it returns and the new weights."""
    torch.manual_seed(1)
    optimizers = [torch.optim.SGD(network.parameters(), 0.01) for network in networks]
    batch = random_batch(6)
    outputs = script.train_step(*networks, *optimizers, *batch, 1.5, **options)
    return outputs, [p.data for network in networks for p in network.parameters()]


@each_script
def test_train_step_with_amp_runs_the_networks_in_bfloat16(script):
    networks, dtypes = both_networks(8, 1)[0], set()
    for layer in (networks[0].upsample[0], networks[1].encoder[0], networks[1].decoder):
        layer.register_forward_hook(lambda *args: dtypes.add(args[2].dtype))
    outputs, weights = one_step(script, networks, amp=True)
    assert dtypes == {torch.bfloat16}
    assert {x.dtype for x in (*outputs, *weights)} == {torch.float32}
    close(
        outputs[:2], one_step(script, both_networks(8, 1)[0])[0][:2], rtol=0.02, atol=0
    )


def test_graphed_step_passes_new_tensors_and_numbers(monkeypatch):
    def step(x, factor):
        return (x * factor,)

    def replay():  # what the device would do with the recorded tensors
        graphed.outputs[0].copy_(step(*graphed.inputs)[0])

    monkeypatch.setattr(torch, "cuda", mock.MagicMock())
    monkeypatch.setattr(torch, "full", lambda shape, x, device: torch.tensor(x))
    graphed = ebgan.GraphedStep(step)
    graphed.graph.replay = replay
    for i in range(7):
        x = torch.arange(3.0) + i
        close(graphed(x, 0.5 + i)[0], x * (0.5 + i))


# -------------------------------------------------------------------------------- data
def test_data_shapes():
    imgs, labels, held_out = ebgan.load_images("digits", "", 8, 3)
    assert imgs.shape == (20_000, 3, 8, 8) and labels.shape == (20_000,)
    assert held_out.shape == (5_000, 3, 8, 8)
    assert not (held_out[:100] == imgs[:100]).flatten(1).all(1).any()


def test_digits_are_ten_classes_and_depend_on_the_seed_alone():
    imgs, labels = ebgan.synthetic_digits(500, 32, seed=3)
    assert imgs.shape == (500, 1, 32, 32) and imgs.dtype == torch.uint8
    assert len(labels.bincount()) == 10 and labels.bincount().min() > 20
    assert (imgs.flatten(1).amax(1) > 150).all()  # no picture is empty
    assert (imgs[:, :, [0, -1]] < 128).all()  # and no digit is cut off
    one, two, three = (ebgan.synthetic_digits(9, 32, seed)[0] for seed in (3, 3, 4))
    assert torch.equal(one, two) and not torch.equal(one, three)


GREY = np.random.default_rng(0).integers(0, 256, (50, 28, 28), dtype=np.uint8)
LABELS = (np.arange(50) % 10).astype(np.uint8)


def idx(array):
    """Return an array in the format of MNIST's files."""
    head = np.array([2048 + array.ndim, *array.shape], dtype=">i4")
    return head.tobytes() + array.tobytes()


@pytest.fixture
def mnist(monkeypatch):
    """Its folder, with 30 images for training and 20 for tests; and no network."""
    monkeypatch.setattr(socket, "getaddrinfo", mock.Mock(side_effect=OSError))
    raw = Path("data/MNIST/raw").absolute()
    raw.mkdir(parents=True)
    for part, chosen in (("train", slice(30)), ("t10k", slice(30, 50))):
        (raw / f"{part}-images-idx3-ubyte").write_bytes(idx(GREY[chosen]))
        (raw / f"{part}-labels-idx1-ubyte").write_bytes(idx(LABELS[chosen]))
    return raw


def test_mnist_on_disk_is_found_without_a_flag_or_else_digits_are_used(mnist, capsys):
    assert ebgan.default_dataset("data") == "mnist"
    imgs, labels, held_out = ebgan.load_images("mnist", "data", 28, None)
    assert torch.equal(torch.cat([imgs, held_out])[:, 0], torch.from_numpy(GREY))
    assert labels.tolist() == LABELS[:30].tolist()
    timeout = socket.getdefaulttimeout()
    assert ebgan.default_dataset("elsewhere") == "digits"
    assert "using the built-in digits" in capsys.readouterr().out
    assert socket.getdefaulttimeout() == timeout


def explain(error):
    """Return the text and the notes of an exception, as a traceback shows them."""
    return "\n".join([str(error.value), *getattr(error.value, "__notes__", [])])


@parametrize("flags", [{}, {"dataset": "mnist"}], ids=["default", "typed"])
@parametrize("name", ["train-images-idx3-ubyte", "t10k-labels-idx1-ubyte"])
def test_damaged_mnist_is_named_and_never_replaced(name, flags, mnist):
    content = idx(LABELS[:29]) if "labels" in name else idx(GREY[:30])[:9999]
    (mnist / name).write_bytes(content)
    with pytest.raises(Exception) as error:
        call(ebgan, flags | {"max_steps": 1})
    assert str(Path("data").absolute()) in explain(error)
    assert (mnist / name).read_bytes() == content
    assert not Path("runs").exists()


def write_pictures(arrays, folder="in"):
    Path(folder).mkdir(parents=True, exist_ok=True)
    for i, array in enumerate(arrays):
        Image.fromarray(np.asarray(array)).save(Path(folder, f"{i:03d}.png"))


def pixels(imgs):
    return sorted(np.ascontiguousarray(img).tobytes() for img in imgs)


@parametrize("channels", [1, 3])
def test_picture_has_the_same_pixels_by_every_way_in(channels, mnist):
    write_pictures(GREY[:30])
    imgs = ebgan.load_images("mnist", "data", 32, channels).imgs
    paths = sorted(Path("in").iterdir())
    read = torch.stack([ebgan.load_picture(path, 32, channels) for path in paths])
    assert torch.equal(read, imgs)
    data = ebgan.load_images("folder", "in", 32, channels)
    assert pixels([*data.imgs, *data.held_out]) == pixels(imgs)
    digits, _ = ebgan.synthetic_digits(1, 32, seed=0)
    write_pictures(digits[0])
    digit = ebgan.load_picture("in/000.png", 32, channels)
    assert torch.equal(digit, digits[0].expand(channels, -1, -1))


def test_folder_is_shuffled_labelled_and_split_without_overlap():
    write_pictures(GREY[:25], "in/one")
    write_pictures(GREY[25:], "in/two")
    imgs, labels, held_out = ebgan.load_images("folder", "in", 28, None)
    assert imgs.shape == (45, 1, 28, 28) and len(labels) == 45  # all are grey
    assert pixels([*imgs, *held_out]) == pixels(GREY)  # all differ
    for label, group in ((0, GREY[:25]), (1, GREY[25:])):
        assert set(pixels(imgs[labels == label])) < set(pixels(group))
    assert labels.tolist() != sorted(labels.tolist())


def test_folder_says_what_it_leaves_out(capsys):
    write_pictures(GREY[:20], "in/grey")
    write_pictures(GREY[20:30], "in/.hidden")
    write_pictures([np.dstack([GREY[0], GREY[1], GREY[2]])])
    for name in ("a.gif", "list", "broken.png"):
        Path("in", name).write_text("no picture")
    for channels, expected in ((None, 3), (1, 1), (3, 3)):
        data = ebgan.load_images("folder", "in", 28, channels)
        assert data.imgs.shape == (19, expected, 28, 28)
    out = capsys.readouterr().out
    assert f"skipped {Path('in/broken.png')}" in out
    assert "21 pictures" in out and "2 classes, one per folder, first: ., grey" in out
    for count in ("1 .gif", "1 no extension", "1 unreadable", "10 hidden"):
        assert count in out


def test_folder_with_fewer_than_20_pictures_is_an_error(capsys):
    write_pictures(GREY[:19])
    for name in ("in has 19", "nowhere has 0"):
        with pytest.raises(ValueError, match=name):
            ebgan.load_images("folder", name.split()[0], 28, None)
    assert "1 unreadable folder nowhere" in capsys.readouterr().out


def read_picture(array, path="x.png", **options):
    Image.fromarray(array).save(path, **options)
    return ebgan.load_picture(path, 28)[0].numpy()


def test_picture_is_read_as_it_looks():
    upside_down = Image.Exif()
    upside_down[274] = 3  # the tag Orientation
    assert (read_picture(GREY[0], exif=upside_down) == GREY[0, ::-1, ::-1]).all()
    clear = np.dstack([0 * GREY[0]] * 3 + [GREY[0] // 128 * 255])  # black, or clear
    assert (read_picture(clear) == 255 - clear[:, :, 3]).all()
    wide = np.pad(GREY[0], ((0, 0), (8, 8)))
    assert (read_picture(wide) == GREY[0]).all()
    for path, dtype in (("x.png", np.uint16), ("x.tiff", np.float32)):
        with pytest.raises(ValueError, match="8 bits") as error:
            read_picture(GREY[0].astype(dtype), path)
        assert path in explain(error)


def test_seeded_rng_depends_on_each_of_its_arguments():
    keys = [(0, "order", 0, 0), (1, "order", 0, 0), (0, "step", 0, 0)]
    keys += [(0, "order", 1, 0), (0, "order", 0, 1)]
    draws = [torch.randn(3, generator=ebgan.seeded_rng(*key)) for key in keys * 2]
    assert len({tuple(draw.tolist()) for draw in draws}) == len(keys)


# ------------------------------------------------------------------------------ scores
def evaluate(imgs, real):
    """Score vectors that are their own features and logits."""
    identity = nn.Linear(imgs.shape[1], imgs.shape[1], bias=False).double()
    nn.init.eye_(identity.weight)
    classifier = nn.Sequential(nn.Sequential(nn.Flatten(), identity), identity)
    return ebgan.evaluate(classifier, imgs.double(), real.double())


def test_score_worked_out_by_hand():
    # two images, two classes: p(y|x) = (0.9, 0.1) and (0.3, 0.7), so p(y) = (0.6, 0.4)
    logits = torch.tensor([[0.9, 0.1], [0.3, 0.7]], dtype=torch.float64).log() + 3
    one = 0.6 * math.log(0.6 / 0.9) + 0.4 * math.log(0.4 / 0.1)
    two = 0.6 * math.log(0.6 / 0.3) + 0.4 * math.log(0.4 / 0.7)
    assert evaluate(logits, logits)["score"] == pytest.approx((one + two) / 2)
    logits = 300 * torch.eye(2)[[0] * 999 + [1]]  # one image does not dominate
    assert 0 < evaluate(logits, logits)["score"] < 0.1


def test_classes_are_those_predicted_a_tenth_as_often():
    logits = 9 * torch.eye(4)[:3]  # nothing is of the fourth class
    real = logits.repeat_interleave(torch.tensor([500, 400, 100]), 0)
    for counts, expected in (
        ([501, 397, 102], 3),
        ([951, 42, 7], 2),
        ([961, 39, 0], 1),
    ):
        imgs = logits.repeat_interleave(torch.tensor(counts), 0)
        assert evaluate(imgs, real)["classes"] == expected


def test_frechet_distance_of_gaussians_with_diagonal_covariance():
    # then it is |m - m'|^2 + sum (s - s')^2; the points have exactly these moments
    signs = torch.tensor(list(itertools.product((-1, 1), repeat=3))) * (7 / 8) ** 0.5
    one = signs * torch.tensor([1.0, 0.5, 2.0]) + torch.tensor([1.0, 2.0, 3.0])
    two = signs * torch.tensor([0.2, 0.5, 1.0]) + torch.tensor([0.0, 2.5, 3.0])
    for pair in ((one, two), (two, one)):
        expected = pytest.approx(1 + 0.25 + 0.8**2 + 0 + 1)
        assert evaluate(*pair)["frechet"] == expected
    for bad in (one[:1], one * math.nan):
        for pair in ((bad, one), (one, bad)):
            with pytest.raises(ValueError, match="at least 2"):
                evaluate(*pair)


def test_classifier_is_fit_and_leaves_the_random_state_alone():
    before = torch.get_rng_state()
    classifier = train_classifier(*ebgan.synthetic_digits(2000, 8, seed=0), "cpu")
    imgs, labels = ebgan.synthetic_digits(500, 8, seed=1)
    predicted = ebgan.run_batched(classifier, imgs, "cpu").argmax(1)
    assert (predicted == labels).float().mean() > 0.8
    assert torch.equal(torch.get_rng_state(), before)


# ------------------------------------------------------------------------- whole runs
@pytest.fixture(scope="session")
def tiny(tmp_path_factory):
    """Flags of a run that takes a moment: 106 grey digits of 8 x 8 in two classes."""
    folder = tmp_path_factory.mktemp("pictures")
    imgs, _ = ebgan.synthetic_digits(106, 8, seed=0)
    write_pictures(imgs[:50, 0], folder / "a")
    write_pictures(imgs[50:, 0], folder / "b")
    flags = {"dataset": "folder", "data_root": folder, "img_size": 8, "batch_size": 4}
    return flags | {"sample_interval": 7, "device": "cpu", "out_dir": "x"}


@pytest.fixture(scope="session")
def data(tiny):
    return ebgan.load_images("folder", tiny["data_root"], 8, None)


def argv(flags):
    """Return flags as they are typed; True stands for one without a value."""
    words = []
    for name, value in flags.items():
        values = value if isinstance(value, list) else [value]
        words += [f"--{name}", *(str(x) for x in values if x is not True)]
    return words


def call(script, flags, status=0):
    assert script.main(argv(flags)) == status


def load(run):
    return torch.load(Path(run, "checkpoint.pt"), weights_only=True)


def read_csv(path):
    """Return the rows of a table without the speed."""
    with open(path, newline="") as file:
        return [row | {"images_per_s": None} for row in csv.DictReader(file)]


def check_same(one, two):
    """Compare two runs: the logs, and to the bit what the checkpoints hold."""
    assert read_csv(Path(one, "log.csv")) == read_csv(Path(two, "log.csv"))
    one, two = load(one), load(two)
    for name in one.keys() - {"log", "flags"}:
        close(one[name], two[name], rtol=0, atol=0)


@pytest.fixture(scope="session")
def whole(tiny, tmp_path_factory):
    """The folder of a run of 30 steps that nothing has stopped."""
    folder = tmp_path_factory.mktemp("whole") / "x"
    with mock.patch.object(ebgan, "train_classifier", untrained_classifier):
        call(ebgan, tiny | {"max_steps": 30, "out_dir": folder})
    return folder


@pytest.fixture
def copy(whole):
    """A copy x of the whole run."""
    return shutil.copytree(whole, Path("x").absolute())


@each_script
def test_script_runs_from_end_to_end(script, tiny, capsys):
    sweep = script.__name__ == "ebgan_margin_ablation"
    call(script, tiny | (ONE_RUN if sweep else {"max_steps": 3}))
    out = capsys.readouterr().out
    assert "96 training images, 10 held out" in out and "step 3 epoch 1 " in out
    generator, _ = script.load_run("x/margin_1/seed_0" if sweep else "x")
    assert generator(torch.randn(5, 62)).shape == (5, 1, 8, 8)


def test_run_leaves_a_log_pictures_and_a_checkpoint(whole, tiny):
    rows, saved = read_csv(whole / "log.csv"), load(whole)
    assert [int(row["step"]) for row in rows] == [7, 14, 20, 21, 24, 28, 30]
    assert [int(row["epoch"]) for row in rows] == [1, 1, 1, 1, 1, 2, 2]  # of 24 steps
    assert [bool(row["score"]) for row in rows] == [0, 0, 0, 0, 1, 0, 1]
    for name in ("samples", "samples/0", "samples/7", "samples/24", "samples/30"):
        assert Image.open(whole / f"{name}.png").size == (82, 82)
    flags = vars(ebgan.parse_args(argv(tiny))) | {"script": "ebgan", "processes": 1}
    for name in ("device", "generate", "max_steps", "out_dir", "resume"):
        del flags[name]
    flags |= {"images": 96, "held_out": 10, "channels": 1, "margin": 2.5, "noise": 0.3}
    assert saved["flags"] == flags and saved["step"] == 30


def test_margin_is_scaled_to_the_image_or_the_batch():
    for energy, batch_size, channels, img_size, margin in (
        ("norm", 64, 1, 32, 10),
        ("norm", 128, 3, 64, 20 * 3**0.5),
        ("mse", 16, 1, 32, 1),
        ("mse", 128, 3, 64, 2),
    ):
        flags = {"energy": energy, "batch_size": batch_size, "channels": channels}
        opt = Namespace(**flags, img_size=img_size)
        assert ebgan.default_margin(opt) == pytest.approx(margin)


NORM, MSE = {"noise": 0.4, "margin": 1.1}, {"energy": "mse", "margin": 0.008}
# a small rate: where a gradient is rounding, float32 and float64 step apart by it
ONE_STEP = {"max_steps": 1, "lr": 1e-5}


def check_first_step(data, flags, weight, ranks=1):
    """Compare the first step of the run x with the equations on plain layers.

    Adam's exp_avg and exp_avg_sq are then 1 - beta times the gradient and its square.
    """
    _, plain = both_networks(8, 1)
    imgs = data.imgs.double() / 127.5 - 1
    order = torch.randperm(len(imgs), generator=ebgan.seeded_rng(0, "order"))
    batches = []
    for rank in range(ranks):
        rng = ebgan.seeded_rng(0, "step", 1, rank)
        z = torch.randn(4, 62, generator=rng).double()
        noise = torch.randn(4, 1, 8, 8, generator=rng).double() * flags.get("noise", 0)
        batches.append((imgs[order[4 * rank :][:4]], z, noise))
    adam = torch.optim.Adam(plain[1].parameters(), lr=1e-5 / 1.0003)
    kind = flags.get("energy", "norm")
    logged = plain_step(plain, adam, batches, kind, flags["margin"], weight)
    for name, network in (("optimizer_g", plain[0]), ("optimizer_d", plain[1])):
        state = load("x")[name]["state"]
        for i, p in enumerate(network.parameters()):
            size = p.grad.abs().max().item()
            if size > 1e-9:  # else it is 0, and float32 has its rounding alone
                mean, square = (state[i][x].double() for x in ("exp_avg", "exp_avg_sq"))
                close(2 * mean, p.grad, rtol=1e-2, atol=1e-3 * size)
                close(1000 * square, 4 * mean**2, rtol=1e-3, atol=1e-6 * size**2)
    row = [float(x) for x in list(read_csv("x/log.csv")[0].values())[2:6]]
    assert row == pytest.approx(logged, rel=1e-3)  # energies to pullaway of rank 0


@parametrize("flags", [NORM, MSE], ids=["norm", "mse"])
@parametrize(("name", "weight"), [("ebgan", 0), ("ebgan_pt", 0.1)])
def test_first_step_of_a_run_is_adam_on_the_equations(name, weight, flags, tiny, data):
    call(pytest.importorskip(name), tiny | flags | ONE_STEP)
    check_first_step(data, flags, weight)


@pytest.fixture
def steps(monkeypatch):
    """What train_step is given in each step; nothing is trained."""
    calls = []

    def spy(generator, discriminator, optimizer_g, optimizer_d, *rest):
        names = "real_imgs", "z", "noise", "margin", "kind", "amp"
        rates = [x.param_groups[0]["lr"] for x in (optimizer_g, optimizer_d)]
        calls.append(dict(zip(names, rest)) | {"rates": rates})
        energies = torch.tensor([0.0, 2, 6, 9])
        return energies + 1, energies, torch.tensor([[1.0, 0], [1, 0], [0, 1]])

    monkeypatch.setattr(ebgan, "train_step", spy)
    return calls


def test_each_step_has_other_images_and_draws(steps, tiny, data):
    for seed in (0, 1):
        call(ebgan, tiny | {"n_epochs": 2, "seed": seed, "out_dir": seed})
    imgs = torch.cat([step["real_imgs"] for step in steps])
    epochs = ((imgs + 1) * 127.5).round().byte().split(96)
    for epoch in epochs:  # has every image once
        assert pixels(epoch) == pixels(data.imgs)
    assert len(torch.stack(epochs).unique(dim=0)) == 4  # in another order
    for name, sd in (("z", 1), ("noise", 0.3)):
        draws = torch.stack([step[name] for step in steps])
        assert len(draws.flatten(1).unique(dim=0)) == len(steps) == 4 * 24
        assert draws.std().item() == pytest.approx(sd, rel=0.05)


def test_flags_reach_the_step_and_its_means_the_log(steps, tiny):
    flags = {"energy": "mse", "margin": 6, "amp": True, "lr": 0.01, "lr_decay": 0.5}
    call(ebgan, tiny | flags | {"max_steps": 2})
    assert (steps[0]["kind"], steps[0]["margin"], steps[0]["amp"]) == ("mse", 6, True)
    assert not steps[0]["noise"].any()  # the default for mse
    rates = steps[0]["rates"] + steps[1]["rates"]
    assert rates == pytest.approx([0.01 / 1.5] * 2 + [0.01 / 2] * 2)
    row = [float(x) for x in list(read_csv("x/log.csv")[0].values())[2:6]]
    # real_energy, fake_energy, hinge_active (below the margin, not at it), pullaway
    assert row == pytest.approx([5.25, 4.25, 0.5, 1 / 3])


@parametrize("n", [65, 501])
def test_any_number_of_pictures_trains(n, tiny, capsys):
    write_pictures(ebgan.synthetic_digits(n, 8, seed=0)[0][:, 0])
    call(ebgan, tiny | {"data_root": "in", "batch_size": 64, "max_steps": 2})
    assert (load("x")["step"], load("x")["flags"]["images"]) == (2, n - n // 10)
    assert ("lowered to 59" in capsys.readouterr().out) == (n == 65)


def test_scores_compare_the_running_mean_with_held_out_images(tiny, data, monkeypatch):
    classifier = mock.Mock(wraps=untrained_classifier)
    monkeypatch.setattr(ebgan, "train_classifier", classifier)
    call(ebgan, tiny | {"max_steps": 3})
    close(classifier.call_args.args[:2], (data.imgs, data.labels))
    z = torch.randn(5000, 62, generator=ebgan.seeded_rng(0, "scores"))[:10]
    generated, row = ebgan.load_run("x")[0](z).detach(), read_csv("x/log.csv")[-1]
    classifier = untrained_classifier(data.imgs, data.labels, "cpu")
    for prefix, imgs in (("", generated), ("real_", data.imgs[:10])):
        for name, value in ebgan.evaluate(classifier, imgs, data.held_out).items():
            assert float(row[prefix + name]) == pytest.approx(value, rel=1e-4)


@parametrize(("step", "weight"), [(1, 0.9), (2, 9 / 11), (10**5, 0.001)])
def test_running_mean_forgets_early_steps_quickly(step, weight, copy):
    before = load("x")
    torch.save(before | {"step": step - 1}, "x/checkpoint.pt")
    call(ebgan, {"resume": "x", "n_epochs": 10**5, "max_steps": step})
    after = load("x")
    for name, mean in before["averaged"].items():
        if mean.is_floating_point():
            expected = mean + weight * (after["generator"][name] - mean)
            close(after["averaged"][name], expected)


def check_picture(path, place, run, purpose):
    """Compare the picture at a place of a file with the first of a run's generator."""
    z = torch.randn(64, 62, generator=ebgan.seeded_rng(0, purpose))[:1]
    expected = ebgan.load_run(run)[0](z)[0, 0].detach().numpy() * 127.5 + 127.5
    picture = np.asarray(Image.open(path))[place : place + 8, place : place + 8, 0]
    assert np.abs(picture - expected).max() <= 1


def test_run_is_loaded_for_eval_mode(whole, data):
    before = torch.get_rng_state()
    generator, discriminator = ebgan.load_run(whole)
    assert torch.equal(torch.get_rng_state(), before)
    assert not any(x.training for x in (*generator.modules(), *discriminator.modules()))
    check_picture(whole / "samples.png", 2, whole, "samples")
    # the discriminator's statistics are those of real images, in four batches
    _, embedding = discriminator(data.imgs / 127.5 - 1)
    variance = torch.stack([part.var(0) for part in embedding.split(24)]).mean(0)
    layer = discriminator.decoder[0]
    close(layer.running_mean, embedding.mean(0), rtol=1e-4, atol=1e-5)
    close(layer.running_var, variance, rtol=1e-4, atol=1e-5)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_recorded_steps_equal_plain_ones(tiny, monkeypatch):
    call(ebgan, tiny | {"device": "cuda", "max_steps": 9})
    monkeypatch.setattr(ebgan, "GraphedStep", lambda step: step)
    call(ebgan, tiny | {"device": "cuda", "max_steps": 9, "out_dir": "y"})
    check_same("x", "y")


# --------------------------------------------------------------- resuming and stopping
def stop_at(script, step, error=KeyboardInterrupt):
    """Raise an exception in the step-th training step."""
    effects = [mock.DEFAULT] * (step - 1) + [error]
    options = {"wraps": script.train_step, "side_effect": effects}
    return mock.patch.object(script, "train_step", **options)


@parametrize(("step", "saved"), [(1, 0), (10, 7)])
def test_stopped_run_is_resumed_as_if_never_stopped(step, saved, tiny, whole, capsys):
    with stop_at(ebgan, step):
        call(ebgan, tiny | {"max_steps": 30, "out_dir": "x y"}, status=130)
    command = capsys.readouterr().err.split("resume with: ")[1]
    assert load("x y")["step"] == saved
    assert ebgan.main([*shlex.split(command)[2:], "--max_steps", "30"]) == 0
    assert "changed since the run was saved: nothing" in capsys.readouterr().out
    check_same("x y", whole)


def test_killed_run_is_resumed_as_if_never_stopped(tiny, whole):
    command = [sys.executable, HERE / "ebgan.py", *argv(tiny)]
    env = os.environ | {"OMP_NUM_THREADS": "1"}
    with subprocess.Popen(command, env=env, stdout=subprocess.DEVNULL) as process:
        while not Path("x/samples/7.png").exists():
            assert process.poll() is None
            time.sleep(0.01)
        process.kill()
    call(ebgan, {"resume": "x", "max_steps": 30})
    check_same("x", whole)


def test_two_processes_average_their_gradients(tiny, data):
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone"]
    command += ["--nproc_per_node=2", HERE / "ebgan.py", *argv(tiny | NORM | ONE_STEP)]
    env = os.environ | {"OMP_NUM_THREADS": "1"}
    out = subprocess.check_output(command, env=env, text=True)
    assert out.count("step 1 epoch 1") == 1  # the first process alone writes
    check_first_step(data, NORM, 0, ranks=2)
    assert load("x")["flags"]["processes"] == 2


def test_typed_flags_win_on_resume_and_max_steps_is_not_kept(copy, capsys):
    call(ebgan, {"resume": "x", "n_epochs": 2, "b1": 0.25})
    changes = "changed since the run was saved: n_epochs 200 -> 2, b1 0.5 -> 0.25\n"
    assert changes in capsys.readouterr().out
    assert load("x")["step"] == 2 * 24 and load("x")["flags"]["n_epochs"] == 2
    assert load("x")["optimizer_g"]["param_groups"][0]["betas"] == (0.25, 0.999)


def test_run_goes_on_where_it_lies_or_in_a_branch(copy, whole):
    shutil.copy("x/checkpoint.pt", "x/old.pt")
    call(ebgan, {"resume": "x", "out_dir": "y", "max_steps": 31})
    call(ebgan, {"resume": "x/old.pt", "max_steps": 31})
    check_same(copy, whole)
    (new,) = Path("runs").iterdir()
    copy.rename("z")
    call(ebgan, {"resume": "z", "max_steps": 31})
    assert [load(run)["step"] for run in ("y", new, "z")] == [31, 31, 31]
    assert not copy.exists()


def test_newest_run_is_resumed(copy):
    with pytest.raises(FileNotFoundError, match="no run of ebgan.py"):
        call(ebgan, {"resume": True})
    for name in ("ebgan-20200101", "ebgan-20300101", "ebgan_pt-99990101"):
        shutil.copytree(copy, Path("runs", name))
    call(ebgan, {"resume": True, "max_steps": 31})
    assert load("runs/ebgan-20300101")["step"] == 31


def test_existing_folder_is_refused_before_data_are_read(copy, monkeypatch):
    before = (copy / "checkpoint.pt").read_bytes()
    monkeypatch.setattr(ebgan, "load_images", mock.Mock(side_effect=AssertionError))
    with pytest.raises(SystemExit):
        ebgan.main(argv({"dataset": "digits", "out_dir": copy}))
    with pytest.raises(SystemExit):
        ebgan.main(argv({"generate": 1, "resume": copy, "out_dir": copy}))
    assert (copy / "checkpoint.pt").read_bytes() == before


@parametrize("default", [False, True], ids=["named", "default"])
def test_two_runs_begun_at_once_never_share_a_folder(default, tiny, data, monkeypatch):
    monkeypatch.setattr(time, "strftime", lambda _: "20260101-000000")
    flags = tiny | {"max_steps": 1}
    if default:  # the same second, and as if it were the same process number
        del flags["out_dir"]
    one, two = (ebgan.parse_args(argv(flags | {"seed": seed})) for seed in (0, 1))
    ebgan.train(one, data)
    before = Path(one.out_dir, "checkpoint.pt").read_bytes()
    with pytest.raises(FileExistsError):
        ebgan.train(two, data)
    assert Path(one.out_dir, "checkpoint.pt").read_bytes() == before


def test_fault_leaves_the_last_checkpoint(copy, whole, monkeypatch):
    def save(state, path):
        Path(path).write_bytes(b"half a checkpoint")
        raise OSError("No space left on device")

    before, error = sorted(copy.iterdir()), RuntimeError("mine")
    with stop_at(ebgan, 2, error), pytest.raises(RuntimeError) as raised:
        call(ebgan, {"resume": "x", "max_steps": 60})
    assert raised.value is error  # comes out unchanged
    with monkeypatch.context() as patch, pytest.raises(FloatingPointError, match="35"):
        patch.setattr(ebgan, "energy", lambda x, *_: x.flatten(1).sum(1) * math.nan)
        call(ebgan, {"resume": "x", "max_steps": 60})
    check_same(copy, whole)
    monkeypatch.setattr(torch, "save", save)
    with pytest.raises(OSError, match="No space"):
        call(ebgan, {"resume": "x", "max_steps": 31})
    assert sorted(copy.iterdir()) == before and load("x")["step"] == 30


def test_foreign_checkpoints_are_named(copy):
    saved, content = load("x"), Path("x/checkpoint.pt").read_bytes()
    Path("cut.pt").write_bytes(content[: len(content) // 2])
    torch.save(saved | {"generator": saved["discriminator"]}, "other.pt")
    torch.save({"flags": Namespace()}, "code.pt")  # which could run code
    for name in ("cut.pt", "other.pt", "code.pt"):
        with pytest.raises(Exception) as error:
            call(ebgan, {"resume": name, "max_steps": 31})
        assert name in explain(error)


def test_generate_gives_the_same_first_pictures_for_any_number(copy):
    for n in (3, 70):
        call(ebgan, {"generate": n, "resume": "x", "out_dir": n})
        names = [f"{i:05d}.png" for i in range(n)]
        assert sorted(x.name for x in Path(f"{n}").iterdir()) == [*names, "grid.png"]
    for name in names[:3]:
        assert Path("3", name).read_bytes() == Path("70", name).read_bytes()
    assert len({Path("70", name).read_bytes() for name in names}) == 70
    check_picture("3/00000.png", 0, copy, "generate")
    call(ebgan, {"generate": 1, "resume": "x", "seed": 1})
    (other,) = copy.glob("generated-*/00000.png")
    assert other.read_bytes() != Path("3/00000.png").read_bytes()


# ------------------------------------------------------------------------------- flags
COUNTS = itertools.product(("n_epochs", "batch_size", "generate"), ("0", "1.5", "x"))
AMOUNTS = itertools.product(("lr", "noise", "b1"), ("-1", "nan", "inf"))
CHOICES = ("batch_size", "1"), ("img_size", "30"), ("channels", "2"), ("energy", "sum")
OTHERS = ("seed", "x"), ("dataset", "imagenet"), ("n_epoch", "3"), ("surplus", "3")


@parametrize(("name", "value"), [*COUNTS, *AMOUNTS, *CHOICES, *OTHERS])
def test_bad_flag_is_one_line_and_status_2(name, value, capsys):
    for script in SCRIPTS:
        with pytest.raises(SystemExit) as end:
            script.main([f"--{name}", value])
        (line,) = capsys.readouterr().err.splitlines()
        assert line.startswith(f"{script.__name__}.py: error: ") and name in line
        assert end.value.code == 2 and not list(Path().iterdir())


def test_home_is_expanded(monkeypatch):
    for name in ("HOME", "USERPROFILE"):
        monkeypatch.setenv(name, str(Path("home").absolute()))
    opt = ebgan.parse_args(["--out_dir=~/x", "--data_root=~/y"])
    paths = [str(Path("home", name).absolute()) for name in ("x", "y")]
    assert [opt.out_dir, opt.data_root] == paths


# ------------------------------------------------------------------------------- sweep
ONE_RUN = {"margins": [1], "seeds": [0], "max_steps": 3}


@pytest.fixture
def sweep():
    return pytest.importorskip("ebgan_margin_ablation")


def test_sweep_compares_margins_over_seeds(tiny, sweep, capsys):
    call(sweep, tiny | ONE_RUN | {"margins": [0.5, 0], "seeds": [5, 0]})
    rows = read_csv("x/results.csv")
    keys = [(row["margin"], row["seed"], row["step"]) for row in rows]
    assert keys == list(itertools.product(("0.0", "0.5"), ("0", "5"), ("3",)))
    energies = [float(row["real_energy"]) for row in rows[:2]]
    mean, sd = statistics.mean(energies), statistics.stdev(energies)
    assert f"{mean:.3g} +- {sd:.2g}" in capsys.readouterr().out
    alone = {"margin": 0.5, "seed": 5, "max_steps": 3, "out_dir": "y"}
    call(pytest.importorskip("ebgan_pt"), tiny | alone)
    check_same("y", "x/margin_0.5/seed_5")


def test_sweep_adds_margins_on_resume(tiny, sweep, capsys):
    call(sweep, tiny | ONE_RUN)
    first = read_csv("x/results.csv")
    call(sweep, {"resume": "x", "margins": [2]})
    rows = read_csv("x/results.csv")
    assert rows[:1] == first and rows[1]["margin"] == "2.0"
    out = capsys.readouterr().out
    assert out.count("\nstep 3 ") == 2  # no run is trained twice
    assert "+-" not in out  # of a single seed
    assert Image.open("x/margins.png").size == (12 * 10 + 2, 2 * 10 + 2)
    call(sweep, {"generate": 1, "resume": "x/margin_1/seed_0", "out_dir": "y"})
    with pytest.raises(SystemExit):  # a run alone isn't resumed
        call(sweep, {"resume": "x/margin_1/seed_0"})
    with pytest.raises(ValueError, match="sweep"):
        sweep.load_run("x")


@parametrize("name", ["save", "train_step"])
def test_sweep_is_resumed_after_ctrl_c(name, tiny, sweep):
    with mock.patch.object(sweep, name, side_effect=KeyboardInterrupt):
        call(sweep, tiny | ONE_RUN, status=130)
    call(sweep, {"resume": "x"})
    assert [row["step"] for row in read_csv("x/results.csv")] == ["3"]


def test_sweep_goes_on_after_a_run_that_is_not_finite(tiny, sweep, monkeypatch, capsys):
    train = mock.Mock(side_effect=FloatingPointError("not finite at step 1"))
    monkeypatch.setattr(sweep, "train", train)
    monkeypatch.setattr(sweep, "load_run", lambda run: (nn.Flatten(), None))
    call(sweep, tiny)
    runs = [(args[0].margin, args[0].seed) for args, _ in train.call_args_list]
    margins = [pytest.approx(2.5 * x) for x in (0, 0.5, 0.7, 1, 1.4, 2)]
    assert runs == list(itertools.product(margins, (0, 1, 2)))
    rows = read_csv("x/results.csv")
    assert [row["error"] for row in rows] == ["not finite at step 1"] * 18
    assert re.search(r"\n +2.5 +0/3 +not finite", capsys.readouterr().out)


def test_sweep_table_fits_a_terminal(sweep, capsys):
    names = "score", "frechet", "classes", "real_energy", "fake_energy"
    rows = []
    for seed, values in enumerate(
        [(1.87, 61.3, 9, 4.12, 10.3), (1.94, 48, 10, 4.31, 9)]
    ):
        row = dict(zip(names, values)) | {"margin": 10.0, "seed": seed, "error": ""}
        rows += [row, row | {"margin": 14.0, "error": "not finite"}]
    sweep.print_table(rows)
    assert max(map(len, capsys.readouterr().out.splitlines())) <= 88


# ------------------------------------------------------------------------ the contract
VARIANT = {"train_step", "train", "parse_args"}
SWEEP = {"saved_flags", "parse_args", "main", "sweep", "print_table"}


@parametrize(("first", "names", "limit"), [(0, VARIANT, 20), (1, SWEEP, 90)])
def test_scripts_differ_in_what_they_are_for_alone(first, names, limit):
    paths, found = [HERE / f"{name}.py" for name in ALL_NAMES[first : first + 2]], []
    if not (shutil.which("diff") and all(path.exists() for path in paths)):
        pytest.skip("needs diff and the three scripts")
    for path in paths:
        body = ast.parse(path.read_text()).body[1:]  # without the docstring
        named = {x.name: ast.unparse(x) for x in body if hasattr(x, "name")}
        rest = [ast.unparse(x) for x in body if not hasattr(x, "name")]
        found.append(named | {"rest": rest})
    one, two = found
    assert {x for x in one.keys() | two if one.get(x) != two.get(x)} == names
    diff = subprocess.run(["diff", *paths], check=False, capture_output=True, text=True)
    assert len(re.findall("^[<>]", diff.stdout, re.MULTILINE)) <= limit


@each_script
def test_import_has_no_side_effects(script, monkeypatch):
    monkeypatch.setattr(sys, "argv", ["other.py", "--bad"])
    before = torch.get_rng_state(), str(np.random.get_state())
    runpy.run_path(script.__file__, run_name="imported")
    assert torch.equal(torch.get_rng_state(), before[0])
    assert str(np.random.get_state()) == before[1] and not list(Path().iterdir())


def test_python_code_in_readme_runs(whole, data, monkeypatch, capsys):
    readme = HERE / "README.md"
    text = readme.read_text(encoding="utf-8") if readme.exists() else ""
    blocks = re.findall(r"```python\n(.*?)```", text, re.DOTALL)
    if not blocks or "import ebgan" not in blocks[0]:
        pytest.skip("README.md has no such code")
    monkeypatch.setattr(ebgan, "load_images", lambda *_: data)
    shutil.copytree(whole, "runs/mnist")
    write_pictures(GREY[:1], "strange")
    Path("score.py").write_text(blocks[0].replace("32, 1)", "8, 1)"))
    monkeypatch.setattr(sys, "argv", ["score.py", "strange/000.png"])
    runpy.run_path("score.py")
    assert "000.png" in capsys.readouterr().out
