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
import shutil
import signal
import socket
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


# ------------------------------------------------------------- the first training step
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


def plain_energy(recon, imgs, kind):
    squares = (recon - imgs).square().flatten(1)
    return squares.mean(1) if kind == "mse" else squares.sum(1).sqrt()


def check_first_step(run, root, kind, weight=0, ranks=1):
    """Compare a run's first step with the equations on plain layers in float64.

    The margin lies between the energies of the generated images. Adam's mean of the
    gradients, exp_avg, is (1 - b1) times the gradient after the first step.
    """
    _, (plain_g, plain_d) = both_networks(8, 1)
    imgs = ebgan.load_images("folder", root, 8, None, 1)[0].double() / 127.5 - 1
    order = torch.randperm(len(imgs), generator=ebgan.rng(0, 0, 0))
    loss_d, loss_g, fakes, figures, pullaways = 0.0, 0.0, [], [], []
    sigma, margin = (0.4, 1.1) if kind == "norm" else (0, 0.008)
    for rank in range(ranks):
        draw = ebgan.rng(0, 1, 1, rank)
        z = torch.randn(4, 62, generator=draw).double()
        noise = sigma * torch.randn(4, 1, 8, 8, generator=draw).double()
        real, fake = imgs[order[4 * rank :][:4]], plain_g(z)
        fakes.append((fake, noise))
        energies = plain_energy(plain_d(real + noise), real, kind)
        image = fake.detach()
        fake_energies = plain_energy(plain_d(image + noise), image, kind)
        hinges = [margin - u for u in fake_energies if u < margin]
        assert 0 < len(hinges) < 4  # or a hinge on the mean would not be seen
        loss_d += energies.mean() + sum(hinges) / 4
        figures.append([energies.mean(), fake_energies.mean(), len(hinges) / 4])
    (loss_d / ranks).backward()
    torch.optim.Adam(plain_d.parameters(), lr=2e-4 / 1.0003).step()
    for fake, noise in fakes:
        embedding = plain_d[0](fake + noise)
        cosines = F.cosine_similarity(embedding[:, None], embedding, dim=2)
        loss_g += plain_energy(plain_d(fake + noise), fake, kind).mean()
        pullaway = (cosines.square().sum() - 4) / 12  # without i = j
        loss_g += weight * pullaway
        pullaways.append(pullaway)
    (loss_g / ranks).backward(inputs=list(plain_g.parameters()))
    for name, network in (("optimizer_d", plain_d), ("optimizer_g", plain_g)):
        state = load(run)[name]["state"]
        for i, p in enumerate(network.parameters()):
            size = p.grad.abs().max().item()
            if size > 1e-9:  # else it is 0, and float32 has its rounding alone
                moment = state[i]["exp_avg"].double()
                close(2 * moment, p.grad, rtol=1e-2, atol=1e-3 * size)
    row = list(read_log(run)[0].values())[2:6]  # real_energy to pullaway, of rank 0
    expected = [torch.as_tensor(x).item() for x in (*figures[0], pullaways[0])]
    assert [float(x) for x in row] == pytest.approx(expected, rel=1e-3)


def test_first_step_is_adam_on_the_equations(tiny):
    call(ebgan, *tiny, *NORM, *ONE_STEP, "plain")
    check_first_step("plain", tiny[3], "norm")
    call(ebgan_pt, *tiny, *MSE, *ONE_STEP, "pt")
    check_first_step("pt", tiny[3], "mse", weight=0.1)


# ---------------------------------------------------------------------------- networks
@pytest.mark.parametrize(("size", "channels"), [(8, 1), (12, 3)])
def test_networks_equal_upsampling_and_convolution(size, channels):
    ours, plain = both_networks(size, channels, 9)
    z, imgs = torch.randn(3, 9).double(), torch.rand(3, channels, size, size).double()
    outputs = ours[0].double()(z), *ours[1].double()(imgs)
    expected = plain[0](z), plain[1](imgs), plain[1][0](imgs)
    close(outputs, expected, rtol=0, atol=1e-10)


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


def test_mnist_on_disk_is_found_without_a_flag():
    raw = Path("data/MNIST/raw")
    raw.mkdir(parents=True)
    labels = np.arange(50, dtype=np.uint8) % 10
    imgs = np.repeat(10 * labels, 28 * 28)  # brightness 10 * label
    for part in ("train", "t10k"):  # the layout that torchvision reads
        head = np.array([2051, 50, 28, 28], dtype=">i4").tobytes()
        (raw / f"{part}-images-idx3-ubyte").write_bytes(head + imgs.tobytes())
        head = np.array([2049, 50], dtype=">i4").tobytes()
        (raw / f"{part}-labels-idx1-ubyte").write_bytes(head + labels.tobytes())
    assert ebgan.default_dataset("data") == "mnist"
    labels = torch.from_numpy(labels)
    imgs = (10 * labels).view(-1, 1, 1, 1).expand(-1, 1, 32, 32)
    data = ebgan.load_images("mnist", "data", 32, None, 1)
    close(data, [imgs, labels.long()] * 2)


def test_without_a_network_the_digits_are_taken_and_scored(monkeypatch):
    monkeypatch.setattr(socket, "getaddrinfo", mock.Mock(side_effect=OSError))
    Path("data/MNIST/raw").mkdir(parents=True)
    Path("data/MNIST/raw/mine.txt").write_text("mine")
    out, _ = call(ebgan, "--img_size", 8, "--max_steps", 1, "--out_dir", "x")
    assert "MNIST" in out.splitlines()[0]
    assert "digits: 20000 images" in out.splitlines()[1]
    assert float(re.search(r"classifier.* ([\d.]+)%", out)[1]) > 70
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


def test_pictures_keep_their_pixels():
    write_pictures(GREY, "in/grey")
    for strange in ("notes.txt", ".x.png", ".hidden/x.png", "deep/.hidden/x.png"):
        Path("in", strange).parent.mkdir(parents=True, exist_ok=True)
        Path("in", strange).write_text("not a picture")
    os.mkfifo("in/pipe.png")
    Path("in/deep/up").symlink_to("..")
    for channels in (None, 1, 3):
        imgs, labels = load_pictures(channels)
        assert imgs.shape == (30, channels or 1, 8, 8)
        assert pixels(imgs[:, -1]) == pixels(GREY)
        assert not labels.any()
    write_pictures(COLOUR, "in/colour")
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
    for name in ("float.tiff", "deep.png", "broken.png", "cut.png"):
        picture = Path(name).rename(f"in/{name}")
        assert name in refused(ebgan, *FOLDER)
        picture.unlink()


# ------------------------------------------------------------------------ the contract
def source(script):
    return Path(script.__file__).read_text()


def definitions(script):
    """Return {name: source} of a script's functions and classes, and of the rest."""
    head, *parts = source(script).split("\n\n\n")
    found = {re.search(r"(?:def|class|if) (\w+)", part)[1]: part for part in parts}
    name = f'SCRIPT = "{script.__name__}"'
    return found | {"head": head.split('"""')[2].replace(name, "")}


def test_scripts_differ_in_the_variant_alone():
    plain, pt, sweep = map(definitions, SCRIPTS)
    assert {x for x in plain if plain[x] != pt[x]} == {"parse_args", "train"}
    lines = set(plain["train"].splitlines()) ^ set(pt["train"].splitlines())
    assert {line.split()[0] for line in lines} == {"loss_g"}
    assert {x for x in pt if pt[x] != sweep[x]} == {"parse_args", "main"}
    assert (pt.keys() - plain.keys(), sweep.keys() - pt.keys()) == (set(), {"sweep"})
    for pair, limit in ((SCRIPTS[:2], 20), (SCRIPTS[1:], 90)):
        lines = difflib.unified_diff(*(source(x).splitlines() for x in pair), n=0)
        assert sum(line[0] in "+-" for line in list(lines)[2:]) <= limit


@pytest.mark.parametrize("script", SCRIPTS)
def test_losses_come_first_and_help_names_every_default(script):
    functions = re.findall(r"\ndef (\w+)", "\n".join(source(script).splitlines()[:80]))
    assert functions[:3] == ["energy", "discriminator_loss", "pullaway_loss"]
    assert not re.search(r"\n *assert ", source(script))  # `python -O` has none
    assert max(len(line) for line in source(script).splitlines()) <= 88
    text = " ".join(call(script, "--help")[0].split()) + " --"
    defaults = vars(script.parse_args([]))
    flags = set(re.findall(r"(?<= --)\w+", text))
    assert flags >= defaults.keys() - {"script", "processes"}
    for flag in flags & defaults.keys():
        if type(defaults[flag]) in (int, float, list):
            shown = re.search(rf" --{flag} (.*?) --", text)[1]
            values = re.search(r"\[([-\d. ]+)\]", shown)[1].split()
            assert np.ravel(defaults[flag]).tolist() == [float(x) for x in values]
    assert (defaults["n_epochs"], defaults["batch_size"]) == (200, 64)


# ------------------------------------------------- processes that run beside the tests
TRAIN = "$PYTHON $HERE/ebgan.py $TINY --out_dir x --max_steps"
UNTIL_SAVED = "until [ -e x/checkpoint.pt ] || ! kill -0 $!; do sleep 0.01; done"
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
    for name in one.keys() - {"row", "flags", "log_size"}:
        close(one[name], two[name], rtol=0, atol=0)


def test_run_leaves_a_log_pictures_and_a_checkpoint(whole):
    log, saved = read_log(whole), load(whole)
    steps = [int(row["step"]) for row in log]
    assert steps == [7, 14, 20, 21, 24, 28, 35, 40, 42, 48, 49, 50, 52]
    for step, row in zip(steps, log):
        assert int(row["epoch"]) == math.ceil(step / 24)  # 4 of the 96 images a step
        assert bool(row["tv_bound"]) == (step in (24, 48, 52))
        assert 0 <= float(row["tv_bound"] or 0) <= 1
        assert not row["score"]  # no classes
    for name in ("samples", "samples/7", "samples/24", "samples/50", "samples/52"):
        assert Image.open(whole / f"{name}.png").size == (82, 82)
    assert saved["step"] == saved["row"]["step"] == 52
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
    close(discriminator.norm1.running_mean, embedding.mean(0), rtol=1e-4, atol=1e-5)
    close(discriminator.norm1.running_var, var.mean(0), rtol=1e-4, atol=1e-5)


def process_state():
    handlers = [signal.getsignal(x) for x in (signal.SIGINT, signal.SIGTERM)]
    numbers = torch.get_rng_state().tolist(), str(np.random.get_state())
    return handlers, numbers, torch.get_num_threads(), torch.is_grad_enabled()


def test_newest_run_goes_on_and_generates_without_a_trace_in_the_process(tiny, whole):
    torch.manual_seed(123)  # no number that a run could leave behind
    before = process_state()
    assert "runs" in refused(ebgan, "--generate", 5)
    for other in ("ebgan-20200101-000000", "ebgan_pt-99990101-000000"):
        shutil.copytree(whole, Path("runs", other))
    out, _ = call(ebgan, *tiny, "--max_steps", 1)
    _, new = sorted(Path("runs").glob("ebgan-*"))
    for fact in ("folder", " 96 ", "cpu", str(new)):  # a tenth of 106 is held out
        assert fact in out.splitlines()[0]
    Path("runs/ebgan-99990101-000000").mkdir()  # stopped before its first checkpoint
    for step in (99, 199):  # as if it had come that far
        torch.save(load(new) | {"step": step}, new / "checkpoint.pt")
        ThreadPool(1).apply(call, [ebgan, "--resume", "--max_steps", step + 2])
        assert (new / f"samples/{step + 1}.png").exists()
    call(ebgan, "--generate", 3)
    call(ebgan, "--generate", 3, "--seed", 1, "--out_dir", "pics")
    one, two = sorted(new.glob("generated/*")), sorted(Path("pics").iterdir())
    names = ["00000.png", "00001.png", "00002.png", "grid.png"]
    assert [x.name for x in one] == [x.name for x in two] == names
    assert one[0].read_bytes() != two[0].read_bytes()  # --seed
    assert process_state() == before


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
    generator, _ = ebgan_pt.load_run("x")
    for key, value in generator.named_parameters():
        mean = states[0][key]
        for n, state in enumerate(states[1:], 1):
            mean = mean + (1 - (1 + n) / (10 + n)) * (state[key] - mean)
        close(value.data, mean)
    late = ebgan.running_mean(torch.zeros(1), torch.ones(1), torch.tensor(10**6))
    assert late.item() == pytest.approx(0.001)
    call(ebgan_pt, "--generate", 64, "--resume", "x")
    for file, key in (("samples.png", 2), ("generated/grid.png", 4)):
        shown = np.asarray(Image.open(Path("x", file)))[2:10, 2:10, 0]
        z = torch.randn(64, 62, generator=ebgan.rng(0, key))[:1]
        expected = generator(z)[0, 0].detach().numpy() * 127.5 + 127.5
        assert np.abs(shown - expected).max() <= 1


def ctrl_c(script, n):
    """Press Ctrl-C at the n-th loss taken: of a step, or at the end of an epoch."""
    effects = [mock.DEFAULT] * (n - 1) + [KeyboardInterrupt]
    options = {"wraps": script.discriminator_loss, "side_effect": effects}
    return mock.patch.object(script, "discriminator_loss", **options)


def test_sweep_compares_margins_and_goes_on_where_it_stopped(tiny):
    sweep, flags = ebgan_margin_ablation, [*tiny, "--max_steps", 3, "--out_dir"]
    with ctrl_c(sweep, 10):  # in the third run, which has no checkpoint yet
        margins = ["--margins", 0, 0.5, "--seeds", 0, 5]
        call(sweep, *flags, "x", *margins, status=130)
    assert len(list(Path("x").glob("*/*/checkpoint.pt"))) == 2
    assert "run 4 of 4" in call(sweep, "--resume", "x")[0]
    with open("x/results.csv", newline="") as file:
        rows = [(row["margin"], row["seed"]) for row in csv.DictReader(file)]
    assert rows == [("0", "0"), ("0", "5"), ("0.5", "0"), ("0.5", "5")]
    assert Image.open("x/margins.png").size[1] == 2 * (8 + 2) + 2
    call(ebgan_pt, *flags, "alone", "--margin", 0.5, "--seed", 5)
    check_same("alone", "x/margin_0.5/seed_5")
    assert "\nstep " not in call(sweep, "--resume", "x")[0]  # no run is trained twice
    call(sweep, "--generate", 1, "--resume", "x/margin_0/seed_5", "--out_dir", "pics")
    assert Path("pics/00000.png").exists()


def test_python_code_in_the_readme_runs(whole, monkeypatch, capsys):
    def load_images(name, *_):
        return [None, None, ebgan.synthetic_digits(50, 8, seed=len(name))[0], None]

    monkeypatch.setattr(ebgan, "load_images", load_images)
    shutil.copytree(whole, "runs/mnist-1")
    text = (HERE / "README.md").read_text()
    score, fold = re.findall(r"```python\n(.*?)```", text, re.DOTALL)
    Path("score.py").write_text(score)
    Path("fold.py").write_text(fold.replace("number=50", "number=1"))
    auroc = runpy.run_path("score.py")["auroc"]
    runpy.run_path("fold.py")
    printed = capsys.readouterr().out.split()
    assert len(printed) == 4 + 2 and all(float(x) > 0 for x in printed)
    normal, strange = load_images("digits")[2] / 127.5 - 1, torch.rand(20, 1, 8, 8)
    _, discriminator = ebgan.load_run(whole)
    one, two = (ebgan.energy(discriminator(x)[0], x) for x in (normal, strange))
    pairs = [float(b > a) for a in one for b in two]
    assert auroc(normal, strange).item() == pytest.approx(sum(pairs) / len(pairs))


# --------------------------------------------------------------- resuming and stopping
def test_stopped_and_killed_runs_go_on_as_if_nothing_had_been(tiny, whole, started):
    with ctrl_c(ebgan, 42):  # in step 41, after one at the end of the first epoch
        flags = ["--max_steps", 52, "--out_dir", "x"]
        _, err = call(ebgan, *tiny, *flags, status=130)
    assert (load("x")["step"], read_log("x")[-1]["step"]) == (35, "40")
    (line,) = err.splitlines()
    command = re.search(r"python ebgan\.py (--resume \S+)", line)[1]
    call(ebgan, *command.split())
    check_same("x", whole)
    with ctrl_c(ebgan, 1):
        _, err = call(ebgan, *tiny, "--out_dir", "y", status=130)
    assert "nothing was saved" in err
    folder, bash = started["killed"]
    assert "Traceback" not in bash.communicate()[1]
    call(ebgan, "--resume", folder / "x")
    check_same(folder / "x", whole)


def test_run_in_parts_is_the_whole_run_with_its_scores(monkeypatch):
    n = COLOUR[0].size
    monkeypatch.setattr(ebgan_pt, "train_classifier", lambda *_: pass_through(n))
    write_pictures(COLOUR[:10], "in/one")
    write_pictures(COLOUR[10:], "in/two")
    flags = [*FOLDER, "--amp", "--batch_size", 3, "--seed", 7, "--out_dir"]
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
    """A copy x of the whole run, whose checkpoint has to stay as it is."""
    shutil.copytree(whole, "x")
    before = Path("x/checkpoint.pt").read_bytes()
    yield before
    assert Path("x/checkpoint.pt").read_bytes() == before


def test_fault_in_a_step_keeps_the_last_checkpoint(kept):
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (len(kept) // 2, hard))  # a full disk
    try:
        assert "error: x: " in refused(ebgan, "--resume", "x", "--max_steps", 53)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    with mock.patch.object(ebgan, "energy", lambda recon, *_: recon * math.inf):
        line = refused(ebgan, "--resume", "x", "--max_steps", 60)
    assert "not finite at step 56" in line


class Evil:
    def __reduce__(self):
        return os.mkdir, ("evil",)


def test_foreign_checkpoints_and_contradicting_flags_are_refused(kept):
    saved = load("x")
    older = saved["flags"].keys() - {"lr_decay"}
    for name, content in {
        "foreign": {"model": torch.zeros(3)},
        "no_networks": {"flags": saved["flags"]},
        "other_network": saved | {"generator": saved["discriminator"]},
        "other_script": saved | {"flags": saved["flags"] | {"script": "ebgan_pt"}},
        "older": saved | {"flags": {k: saved["flags"][k] for k in older}},
        "evil": saved | {"flags": {"script": Evil()}},
    }.items():
        torch.save(content, f"{name}.pt")
    Path("cut.pt").write_bytes(kept[: len(kept) // 2])
    Path("empty.pt").touch()
    for file in Path().glob("*.pt"):
        assert file.name in refused(ebgan, "--resume", file, "--max_steps", 53)
    assert not Path("evil").exists()
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
    assert flag in line or (flag == "--out_dir" and values[-1] in line)
    assert sorted(Path().rglob("*")) == before
