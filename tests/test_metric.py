"""What an encoder learns from beside the answers."""

import math

import pytest
import torch
from torch import nn
from torch.testing import assert_close

from mann_fast.data import ClassImages, Dataset
from mann_fast.training import TrainConfig, trainer
from mann_fast.training.metric import SHARPNESS, encoded, pair_loss

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
        return self.scale * images[:, 0, 0, :1]


@pytest.mark.parametrize("layout", ["stream", "support"])
def test_the_trainer_gives_the_features_of_each_image_with_its_class(layout, monkeypatch):
    grey = torch.arange(10, dtype=torch.uint8).repeat_interleave(8)
    classes = ClassImages(
        grey.view(80, 1, 1).repeat(1, 4, 4), 8 * torch.arange(11), tuple(map(str, range(10)))
    )
    monkeypatch.setattr("mann_fast.training.checkpoint.make_own", lambda _: Brightness())
    sizes = {"ways": 3, "shots": 3, "hidden_size": 8, "image_size": 4, "augment": False, "batch": 4}
    config = TrainConfig.of("own:Brightness", layout, data="greys", **sizes)
    training = trainer.Trainer(config, Dataset(classes, classes, "folder"))
    seen = []

    def watched(features, classes):
        seen.append((features.detach(), classes))
        return pair_loss(features, classes)

    monkeypatch.setattr(trainer, "pair_loss", watched)
    answers = []
    monkeypatch.setattr(trainer, "label_loss", lambda *x: answers.append(label_loss(*x)) or answers[-1])
    for _ in range(2):
        scale = training.model.encoder.scale.item()
        result = training.train_step()
        features, which = seen.pop()
        assert_close(features[:, 0] * 255 / scale, which.float())
        assert len(which.unique()) > 3  # of all episodes of the batch together
        assert_close(result.loss, answers.pop().item())  # of the answers alone
    assert not training.model.encoder._forward_hooks


label_loss = trainer.label_loss


def test_an_encoder_that_is_not_trained_has_no_such_loss():
    encoder = nn.Linear(3, 2).requires_grad_(False)
    with encoded(encoder) as features:
        encoder(torch.ones(4, 3))
    assert features == []
    with encoded(None) as features:
        pass
    assert features == []


def test_the_hook_goes_where_the_step_fails():
    encoder = nn.Linear(3, 2)
    with pytest.raises(RuntimeError, match="diverged"), encoded(encoder) as features:
        encoder(torch.ones(4, 3))
        raise RuntimeError("diverged")
    assert len(features) == 1 and not encoder._forward_hooks
