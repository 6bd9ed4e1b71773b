"""What an encoder learns from beside the answers."""

import math

import pytest
import torch
from torch import nn
from torch.testing import assert_close

from mann_fast.data import ClassImages, Dataset
from mann_fast.training import TrainConfig, trainer
from mann_fast.training.metric import SHARPNESS, pair_loss

pytestmark = [pytest.mark.once, pytest.mark.filterwarnings("ignore:only .* classes to train on")]


def plain(features, classes):
    """Pair by pair, in float64."""
    unit = [row / row.norm() for row in features.double()]
    terms = []
    for i, anchor in enumerate(unit):
        wrong = [
            math.exp(SHARPNESS * (anchor @ x)) for x, c in zip(unit, classes, strict=True) if c != classes[i]
        ]
        for j, x in enumerate(unit):
            if j != i and classes[j] == classes[i]:
                right = math.exp(SHARPNESS * (anchor @ x))
                terms.append(-math.log(right / (right + sum(wrong))))
    return sum(terms) / len(terms)


@pytest.mark.parametrize("classes", [[0, 0, 1, 1], [3, 0, 3, 0, 3, 7], [5, 9, 5]])
def test_every_pair_of_a_class_against_all_images_of_others(classes):
    features = torch.randn(len(classes), 7, generator=torch.Generator().manual_seed(1))
    found = pair_loss(features, torch.tensor(classes))
    assert_close(found.item(), plain(features, classes), atol=1e-5, rtol=1e-5)
    assert_close(pair_loss(3 * features, torch.tensor(classes)), found)  # of cosines


@pytest.mark.parametrize("classes", [[0, 1, 2], [4, 4, 4], [0]], ids=["no pair", "no other", "one"])
def test_nothing_to_tell_apart_is_no_loss_and_no_gradient(classes):
    features = torch.randn(len(classes), 5, requires_grad=True)
    loss = pair_loss(features, torch.tensor(classes))
    loss.backward()
    assert loss.item() == 0
    assert torch.equal(features.grad, torch.zeros_like(features))


def test_images_of_a_class_come_together():
    features = torch.randn(12, 4, generator=torch.Generator().manual_seed(0)).requires_grad_()
    classes = torch.arange(12) % 3
    optimizer = torch.optim.SGD([features], lr=0.5)
    for _ in range(200):
        optimizer.zero_grad()
        pair_loss(features, classes).backward()
        optimizer.step()
    similarity = torch.cosine_similarity(features.unsqueeze(0), features.unsqueeze(1), dim=2)
    same = classes.unsqueeze(0) == classes.unsqueeze(1)
    assert similarity[same].min() > similarity[~same].max()


class Brightness(nn.Module):
    """Of images that are all of one grey."""

    def __init__(self):
        super().__init__()
        self.scale = nn.Parameter(torch.ones(()))

    def forward(self, images):
        return torch.cat([50 * self.scale * images[:, 0, 0, :1], torch.ones(len(images), 1)], 1)


@pytest.mark.parametrize("layout", ["stream", "support"])
def test_an_encoder_learns_alone_and_the_memory_from_its_features(layout, monkeypatch):
    """Class c is as bright as c: an image's features say which it is, and with them what the memory is shown."""
    grey = torch.arange(10, dtype=torch.uint8).repeat_interleave(8)
    classes = ClassImages(
        grey.view(80, 1, 1).repeat(1, 4, 4), 8 * torch.arange(11), tuple(map(str, range(10)))
    )
    monkeypatch.setattr("mann_fast.training.checkpoint.make_own", lambda _: Brightness())
    sizes = {"ways": 3, "shots": 3, "hidden_size": 8, "image_size": 4, "augment": False, "batch": 4}
    config = TrainConfig.of("own:Brightness", layout, data="greys", steps=4, encoder_steps=2, **sizes)
    training = trainer.Trainer(config, Dataset(classes, classes, "folder"))
    encoder, memory = training.model.encoder, training.model.layer
    pairs, answers = [], []

    def watched(features, classes):
        pairs.append((features.detach(), classes, pair_loss(features, classes)))
        return pairs[-1][-1]

    monkeypatch.setattr(trainer, "pair_loss", watched)
    monkeypatch.setattr(trainer, "label_loss", lambda *x: answers.append(label_loss(*x)) or answers[-1])
    before = [x.clone() for x in memory.parameters()]
    for _ in range(2):
        encoder.scale.data.fill_(2.0)
        result = training.train_step()
        features, which, loss = pairs.pop()
        assert_close(features.norm(dim=1), torch.full((len(which),), 2**0.5))  # of one length
        assert len(which.unique()) > 3 and which.bincount().max() > 1
        assert_close(result.loss, loss.item())
        assert result.accuracy.isnan().all() and training.metrics()["pair_loss"] == result.loss
        assert encoder.scale != 2.0
    assert all(torch.equal(a, b) for a, b in zip(before, memory.parameters(), strict=True))
    assert not answers
    learned = encoder.scale.clone()
    seen = []
    hook = encoder.register_forward_hook(lambda _, images, __: seen.append(len(images[0])))
    for _ in range(2):
        result = training.train_step()
        assert_close(result.loss, answers.pop().item())
        assert result.accuracy.isfinite().any() and "heldout_accuracy" in training.metrics()
    hook.remove()
    assert sum(seen) == 3 * len(grey)  # for their mean, to learn from, and held out
    assert torch.equal(encoder.scale, learned) and not pairs
    assert not any(torch.equal(a, b) for a, b in zip(before, memory.parameters(), strict=True))


label_loss = trainer.label_loss
