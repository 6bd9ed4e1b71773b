"""What an encoder learns from, and the memory from its features."""

import math

import pytest
import torch
from torch import nn
from torch.testing import assert_close

from mann_fast.data import ClassImages, Dataset, generate_glyphs
from mann_fast.training import TrainConfig, trainer
from mann_fast.training.metric import SHARPNESS, pair_loss
from mann_fast.training.support import ways_of_step

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


def test_varied_features_are_as_alike_as_before_but_for_noise(monkeypatch):
    examples, queries = torch.randn(4, 3, 200), torch.randn(6, 3, 200)
    similar = torch.cosine_similarity(examples.unsqueeze(1), queries.unsqueeze(0), dim=3)
    noisy = trainer.varied(examples, queries)
    monkeypatch.setattr(trainer, "NOISE", 0.0)
    moved = trainer.varied(examples, queries)
    for found, exact in ((moved, True), (noisy, False)):
        for x in found:
            assert_close(x.square().mean(2), torch.ones(x.shape[:2]))
        a, b = found
        again = torch.cosine_similarity(a.unsqueeze(1), b.unsqueeze(0), dim=3)
        assert torch.allclose(again, similar, atol=1e-5) == exact
    unit = examples / examples.square().mean(2, keepdim=True).sqrt()
    for episode in range(3):  # the same numbers, in other places, with other signs; in each episode others
        assert_close(moved[0][:, episode].abs().sort(1).values, unit[:, episode].abs().sort(1).values)
        assert not torch.equal(moved[0][:, episode].abs(), unit[:, episode].abs())
    monkeypatch.setattr(trainer, "NOISE", 0.8)
    a, b = trainer.varied(examples.expand(4, 3, 200), examples)
    near = torch.cosine_similarity(a, b, dim=2)  # of an image with itself, each time with other noise
    assert_close(near.mean(), torch.tensor(1 / (1 + 0.8**2)), atol=0.05, rtol=0)


def test_each_of_two_parts_of_training_has_a_rise_and_a_fall():
    config = TrainConfig.of("conv4", "support", steps=60, encoder_steps=20, warmup=4, lr=1.0)
    rates = [config.learning_rate(step) for step in range(60)]
    alone = [TrainConfig(steps=n, warmup=4, lr=1.0) for n in (20, 40)]
    assert rates == [part.learning_rate(step) for part in alone for step in range(part.steps)]
    assert [ways_of_step(config, step) for step in (0, 19, 20)] == [5, 5, 5]
    many = TrainConfig.of("conv4", "support", ways=20, steps=2000, encoder_steps=1000)
    plain = TrainConfig.of("none", "support", ways=20, steps=1000)
    assert [ways_of_step(many, 1000 + step) for step in range(1000)] == [
        ways_of_step(plain, step) for step in range(1000)
    ]
    assert TrainConfig.of("conv4", "stream").encoder_steps == 2000
    assert [TrainConfig.of("conv4", "stream", steps=n).encoder_steps for n in (1, 2, 9, 20)] == [0, 1, 1, 2]
    for wrong, message in ((60, "from 0 to 59, below steps, got 60"), (-1, "from 0 to 59")):
        with pytest.raises(ValueError, match=f"encoder_steps must be {message}"):
            TrainConfig.of("conv4", "support", steps=60, encoder_steps=wrong)
    with pytest.raises(ValueError, match="encoder_steps must be 0 with encoder none, got 5"):
        TrainConfig(encoder_steps=5)


def test_an_encoder_without_parameters_is_taken_as_it_comes(monkeypatch):
    classes = generate_glyphs(8, 8, image_size=4)
    monkeypatch.setattr("mann_fast.training.checkpoint.make_own", lambda _: nn.Flatten())
    sizes = {"ways": 3, "shots": 2, "hidden_size": 8, "image_size": 4, "batch": 4, "steps": 8}
    data = Dataset(classes, classes, "glyphs")
    with pytest.raises(ValueError, match="own:Flat has nothing to learn: give encoder_steps 0"):
        trainer.Trainer(TrainConfig.of("own:Flat", "support", encoder_steps=1, **sizes), data)
    training = trainer.Trainer(TrainConfig.of("own:Flat", "support", encoder_steps=0, **sizes), data)
    monkeypatch.setattr(trainer, "STEPS_OF_COPY", 1)
    assert math.isfinite(training.train_step().loss)
    mean = classes.rotated().images.flatten(1).double().mean(0) / 255
    assert_close(training.model.feature_mean.double(), mean, atol=1e-6, rtol=1e-5)
    first = training.episodes
    training.train_step()
    assert training.episodes is not first
    for step in range(2, 6):
        training.train_step()
        assert len(training._seen) == min(step + 1, trainer.COPIES)  # made when they are needed
    seen = [episodes.classes.images for episodes in training._seen]
    assert not any(torch.equal(seen[0], x) for x in seen[1:])
    for x in seen[1:]:  # a little distorted
        assert 0.2 < torch.cosine_similarity(x, seen[0], dim=1).mean() < 0.999


def test_features_take_no_more_than_their_bound(monkeypatch):
    classes = generate_glyphs(8, 8, image_size=4)
    monkeypatch.setattr("mann_fast.training.checkpoint.make_own", lambda _: nn.Flatten())
    monkeypatch.setattr(trainer, "MOST_NUMBERS", 3 * 4 * 64 * 16)
    monkeypatch.setattr(trainer, "STEPS_OF_COPY", 1)
    sizes = {"ways": 3, "shots": 2, "hidden_size": 8, "image_size": 4, "batch": 4, "steps": 8}
    training = trainer.Trainer(
        TrainConfig.of("own:Flat", "stream", encoder_steps=0, **sizes), Dataset(classes, classes, "glyphs")
    )
    for _ in range(6):
        training.train_step()
    assert len(training._seen) == 3
