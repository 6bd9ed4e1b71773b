"""Pretrained backbones by name, and their features, computed once. The libraries themselves are tried where they are installed;
a small network stands for them elsewhere."""

import importlib.util
from collections import OrderedDict

import numpy as np
import pytest
import torch
from PIL import Image
from torch import nn

from mann_fast import FewShotLearner
from mann_fast.cli import main
from mann_fast.data import ClassImages, Dataset, Episodes, load_folder
from mann_fast.models import backbones
from mann_fast.models.backbones import Backbone, Recipe
from mann_fast.training import TrainConfig, Trainer, load_checkpoint
from mann_fast.training.checkpoint import save_checkpoint
from mann_fast.training.features import LENGTH, encode_dataset, kept_features

pytestmark = pytest.mark.once

MEAN, STD = (0.4, 0.5, 0.6), (0.2, 0.3, 0.1)


class Toy(nn.Sequential):
    """Batch norm and dropout, which must not move or be drawn; counts the images that it is shown."""

    shown = 0

    def __init__(self, seed):
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            super().__init__(
                OrderedDict(
                    conv=nn.Conv2d(3, 8, 5, stride=4),
                    norm=nn.BatchNorm2d(8),
                    drop=nn.Dropout(),
                    pool=nn.AdaptiveAvgPool2d(2),
                )
            )

    def forward(self, images):
        assert not torch.is_grad_enabled() and not self.training
        Toy.shown += len(images)
        return super().forward(images)


@pytest.fixture(autouse=True)
def toy(monkeypatch, tmp_path):
    """The library "toy", whose network n starts from the seed n."""
    monkeypatch.setenv("MANN_FAST_CACHE", str(tmp_path / "cache"))
    monkeypatch.setitem(
        backbones.LIBRARIES, "toy", lambda name: Recipe(24, MEAN, STD, lambda: Toy(int(name)))
    )
    Toy.shown = 0


@pytest.fixture
def photos(tmp_path):
    """Eight classes, each of another colour."""
    draw = np.random.default_rng(0)
    for at in range(8):
        folder = tmp_path / "photos" / f"class{at}"
        folder.mkdir(parents=True)
        colour = draw.integers(40, 200, 3)
        for number in range(9):
            pixels = np.clip(colour + draw.integers(-30, 30, (24, 24, 3)), 0, 255)
            Image.fromarray(np.uint8(pixels)).save(folder / f"{number}.png")
    return tmp_path / "photos"


def test_features_are_those_of_the_network_alone():
    images = torch.randint(0, 256, (40, 3, 24, 24), dtype=torch.uint8)
    found = Backbone("toy/3").features(images)
    network, mean, std = Toy(3).double().eval(), torch.tensor(MEAN).double(), torch.tensor(STD).double()
    with torch.no_grad():
        plain = network((images.double() / 255 - mean.view(3, 1, 1)) / std.view(3, 1, 1)).flatten(1)
    torch.testing.assert_close(found.double(), plain, rtol=1e-4, atol=1e-5)
    grey = torch.randint(0, 256, (2, 24, 24), dtype=torch.uint8)
    colours = grey.unsqueeze(1).repeat(1, 3, 1, 1)
    assert torch.equal(Backbone("toy/3").features(grey), Backbone("toy/3").features(colours))
    assert torch.equal(Backbone("toy/3").features(images[:1]), Backbone("toy/3").features(images[:1]))


def test_features_are_computed_once(tmp_path):
    images = torch.randint(0, 256, (72, 3, 24, 24), dtype=torch.uint8)
    first = kept_features(images, Backbone("toy/1"))
    assert Toy.shown == 72 and torch.equal(first, Backbone("toy/1").features(images))
    assert Toy.shown == 144 and torch.equal(first, kept_features(images, Backbone("toy/1")))
    assert Toy.shown == 144
    assert not torch.equal(first, kept_features(images, Backbone("toy/2")))
    assert Toy.shown == 216
    images[0, 0, 0, 0] ^= 1
    changed = kept_features(images, Backbone("toy/1"))
    assert Toy.shown == 288 and not torch.equal(first[0], changed[0])
    for file in (tmp_path / "cache" / "features").iterdir():
        file.write_bytes(file.read_bytes()[:100])  # damaged
    assert torch.equal(kept_features(images, Backbone("toy/1")), changed)
    assert Toy.shown == 360


def test_features_are_centred_by_the_training_images(photos):
    classes = load_folder(photos, image_size=24, colour=True)
    images = Dataset(classes.select(range(5)), classes.select(range(5, 8)), "folder")
    found = encode_dataset(images, Backbone("toy/1"))
    raw = [Backbone("toy/1").features(part.images).double() for part in (images.train, images.test)]
    mean = raw[0].mean(0)
    assert found.features["mean"] == pytest.approx(mean.tolist(), rel=1e-5, abs=1e-6)
    for part, features in zip((found.train, found.test), raw, strict=True):
        plain = (features - mean) * (255 * LENGTH) / (features - mean).norm(dim=1, keepdim=True)
        torch.testing.assert_close(part.images.double(), plain, rtol=1e-3, atol=0.1)
    assert (found.test.names, found.kind) == (images.test.names, "folder")
    inputs = Episodes(found.test, ways=2, shots=3).sample(4).inputs
    assert inputs.shape == (6, 4, 32 + 2)
    torch.testing.assert_close(inputs[..., :32].norm(dim=-1), torch.full((6, 4), LENGTH))


def train_arguments(photos, out, *more):
    small = (
        "--ways 3 --shots 3 --hidden-size 16 --slots 8 --slot-size 8 --heads 2 --batch 4 --eval-episodes 8"
    )
    return ["train", "--data", str(photos), "--out", str(out), *small.split(), *more]


@pytest.mark.filterwarnings("ignore:only .* to train on")
@pytest.mark.parametrize("layout", ["stream", "support"])
def test_the_whole_way(layout, photos, tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    run = tmp_path / "run"
    more = ("--encoder", "toy/1", "--steps", "4", "--layout", layout)
    assert main(train_arguments(photos, run, *more)) == 0, capsys.readouterr().err
    said = capsys.readouterr()
    assert "features of 72 images by toy/1, computed once" in said.err and "toy/1, 24 x 24" in said.err
    assert Toy.shown == 72  # no step, and no held-out episode, asks the network
    content = load_checkpoint(run)
    config = content["config"]
    assert (config.encoder, config.image_size, config.colour, config.augment) == ("toy/1", 24, True, False)
    assert content["data"]["features"]["weights"] == Backbone("toy/1").weights
    assert not any(name.startswith("encoder") for name in content["model"]["state"])

    assert main(["evaluate", "--checkpoint", str(run), "--episodes", "4"]) == 0, capsys.readouterr().err
    assert main(["show", "--checkpoint", str(run), "--out", "shown.png"]) == 0, capsys.readouterr().err
    assert Toy.shown == 72 and (tmp_path / "shown.png").is_file()
    resumed = ["train", "--out", str(run), "--resume", "--steps", "6"]
    assert main(resumed) == 0, capsys.readouterr().err
    assert Toy.shown == 72

    learner = FewShotLearner.load(run, orders=2)
    files = [photos / f"class{at}" / f"{number}.png" for at in range(3) for number in range(3)]
    learner.learn(files, [at for at in range(3) for _ in range(3)])
    assert learner.predict_proba(files).shape == (9, 3)
    learner.save_pretrained(tmp_path / "saved")
    same = FewShotLearner.from_pretrained(tmp_path / "saved").learn(files[:2], ["a", "b"])
    assert same.predict(files[:2]).shape == (2,)

    for damage, message in (
        ({"mean": content["data"]["features"]["mean"][1:]}, "model.config must have input_size = 34"),
        ({"mean": [float("nan")] * 32}, "data.features.mean must be finite numbers"),
        ({"weights": 5}, "data.features.weights must be of type str"),
    ):
        features = {**content["data"]["features"], **damage}
        plain = {**content, "config": config.to_dict(), "data": {**content["data"], "features": features}}
        save_checkpoint(tmp_path / "damaged.pt", plain)
        with pytest.raises(ValueError, match=message):
            load_checkpoint(tmp_path / "damaged.pt")

    # The same name with other weights is another network.
    monkeypatch.setitem(backbones.LIBRARIES, "toy", lambda name: Recipe(24, MEAN, STD, lambda: Toy(2)))
    with pytest.raises(ValueError, match="weights of toy/1 here are not those"):
        FewShotLearner.load(run)
    capsys.readouterr()
    assert main(["train", "--out", str(run), "--resume", "--steps", "8"]) == 2
    assert "weights of toy/1 are not those" in capsys.readouterr().err


def test_what_cannot_be(photos, tmp_path, capsys):
    arguments = train_arguments(photos, tmp_path / "run", "--encoder", "toy/1", "--augment")
    assert main(arguments) == 2
    assert "augment must be False with a backbone" in capsys.readouterr().err
    assert not backbones.is_backbone("timm/hf_hub:somebody") and not backbones.is_backbone(
        "torchvision:resnet18"
    )
    with pytest.raises(ValueError, match="torchvision/NAME"):
        TrainConfig(encoder="torchvision/")
    classes = load_folder(photos, image_size=24, colour=True)
    features = encode_dataset(Dataset(classes, classes, "folder"), Backbone("toy/1"))
    with pytest.raises(ValueError, match="augment must be False for features"):
        Episodes(features.train, ways=3, shots=3, augment=True)
    with pytest.raises(TypeError, match="images must be a uint8 tensor, got torch.float32"):
        ClassImages(torch.zeros(2, 3, 4), torch.tensor([0, 2]), ("a",))
    config = TrainConfig(encoder="toy/1", augment=False, ways=3, shots=3)
    with pytest.raises(ValueError, match="dataset must hold features"):
        Trainer(config, Dataset(classes, classes, "folder"))
    with pytest.raises(ValueError, match="dataset must hold images"):
        Trainer(TrainConfig(ways=3, shots=3, augment=False), features)


def test_without_a_connection_one_line_says_what_to_do(photos, tmp_path, capsys, monkeypatch):
    def offline():
        raise RuntimeError("Name or service not known")

    monkeypatch.setitem(backbones.LIBRARIES, "toy", lambda name: Recipe(24, MEAN, STD, offline))
    assert main(train_arguments(photos, tmp_path / "run", "--encoder", "toy/1")) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert "the weights of toy/1 cannot be had" in line and "with a connection" in line


@pytest.mark.parametrize("library", ["torchvision", "timm"])
def test_a_library_that_is_missing_is_named(library, monkeypatch):
    monkeypatch.setitem(__import__("sys").modules, library, None)
    with pytest.raises(
        ModuleNotFoundError, match=rf"needs {library} \(pip install 'mann_fast\[backbones\]'\)"
    ):
        Backbone(f"{library}/resnet18")


def test_torchvision(tmp_path, monkeypatch):
    models = pytest.importorskip("torchvision.models", reason="torchvision is not there", exc_type=Exception)
    weights = models.ResNet18_Weights.DEFAULT
    monkeypatch.setenv("TORCH_HOME", str(tmp_path))
    network = models.resnet18().eval()
    file = tmp_path / "hub" / "checkpoints" / weights.url.rpartition("/")[2]
    file.parent.mkdir(parents=True)
    torch.save(network.state_dict(), file)
    assert TrainConfig.of("torchvision/resnet18", "stream").image_size == 224
    backbone = Backbone("torchvision/resnet18")
    assert backbone.weights == Backbone("torchvision/resnet18.IMAGENET1K_V1").weights
    images = torch.randint(0, 256, (2, 3, 64, 64), dtype=torch.uint8)
    transforms = weights.transforms()
    seen = {}
    network.avgpool.register_forward_hook(lambda _, __, out: seen.update(pooled=out.flatten(1)))
    with torch.no_grad():
        mean, std = (torch.tensor(x).view(3, 1, 1) for x in (transforms.mean, transforms.std))
        network((images / 255 - mean) / std)
    torch.testing.assert_close(backbone.features(images), seen["pooled"], rtol=1e-4, atol=1e-5)
    with pytest.raises(ValueError, match="must name a classifier of torchvision"):
        Backbone("torchvision/resnet17")
    for other in (
        "fasterrcnn_resnet50_fpn",
        "squeezenet1_0",
    ):  # a detector; a classifier without a linear layer
        with pytest.raises(ValueError, match="must name a classifier of torchvision"):
            Backbone(f"torchvision/{other}")


@pytest.mark.skipif(importlib.util.find_spec("timm") is None, reason="timm is not there")
def test_timm(monkeypatch):
    timm = pytest.importorskip("timm", reason="timm cannot be imported beside this torch", exc_type=Exception)
    make = timm.create_model

    def untrained(name, pretrained, **options):
        assert pretrained
        torch.manual_seed(0)
        return make(name, pretrained=False, **options)

    monkeypatch.setattr(timm, "create_model", untrained)
    assert TrainConfig.of("timm/resnet18.a1_in1k", "stream").image_size == 224
    images = torch.randint(0, 256, (2, 3, 64, 64), dtype=torch.uint8)
    assert Backbone("timm/resnet18.a1_in1k").features(images).shape == (2, 512)
    with pytest.raises(ValueError, match="must name a classifier of timm"):
        Backbone("timm/resnet17")
