"""N-way K-shot with queries judged apart: the right examples, every query once, and what cannot be measured."""

import pytest
import torch
from torch import nn

from mann_fast.data import ClassImages
from mann_fast.training import TrainConfig
from mann_fast.training.protocol import (
    INSTANCES,
    QUERIES,
    Protocol,
    evaluate_protocol,
    evaluate_streams,
    obstacle,
    obstacle_to_streams,
)


def constant_images(num_classes, each):
    """Every image of a class is of one grey, which no other class has."""
    grey = torch.arange(num_classes, dtype=torch.uint8).repeat_interleave(each) * 10
    images = grey[:, None, None].expand(-1, 2, 2).contiguous()
    starts = torch.arange(num_classes + 1) * each
    return ClassImages(images, starts, tuple(f"class{at}" for at in range(num_classes)))


class Remembers(nn.Module):
    """Answers with the label that the same image had before, else with none; its state is (grey, label) so far."""

    def __init__(self, ways, labels):
        super().__init__()
        self.width, self.labels, self.seen = 25 if labels == "string" else ways, labels, []

    def forward(self, x, state=None):
        images, before = x[..., 0], x[..., -self.width :]
        if state is not None:  # a query: one step, after which nobody may use the state
            greys = torch.cat([state[0], images])
            labels = torch.cat([state[1][1:], before])  # one step late
            same = (greys[:-1] == images).float()
            self.seen.append(len(greys) - 1)
            return torch.einsum("tb,tbl->bl", same, labels).unsqueeze(0) * 9, state
        return torch.zeros(*x.shape[:2], self.width), (images, before)


@pytest.mark.parametrize("labels", ["onehot", "string"])
@pytest.mark.parametrize(
    ("ways", "shots", "orders"), [(2, 1, 1), (3, 2, 1), (5, 5, 1), (3, 2, 4), (2, 1, 60)]
)
def test_a_perfect_memory_is_always_right(labels, ways, shots, orders):
    config = TrainConfig(ways=5, labels=labels, image_size=2)
    model = Remembers(5, labels)
    found = evaluate_protocol(model, config, constant_images(8, 20), Protocol(ways, shots), 3, orders=orders)
    assert (found["mean"], found["episodes"], found["protocol"]) == (1.0, 3, f"{ways}-way-{shots}-shot")
    assert found["orders"] == orders
    batches = 3 if orders == 60 else 1
    assert model.seen == [ways * shots] * ways * QUERIES * batches  # each from the memory after the examples
    assert found["low"] < 1 <= found["high"] + 1e-9


def test_a_model_that_knows_nothing_is_right_once_in_ways():
    class Guess(nn.Module):
        def forward(self, x, state=None):
            return torch.randn(*x.shape[:2], 5), state

    config = TrainConfig(ways=5, image_size=2)
    found = evaluate_protocol(Guess(), config, constant_images(8, 20), Protocol(4, 1), 200)
    assert found["low"] < 0.25 < found["high"] and found["high"] - found["low"] < 0.05


def test_an_answer_is_the_mean_over_the_orders():
    class Unsure(Remembers):
        def forward(self, x, state=None):
            logits, state = super().forward(x, state)
            return logits / 9 + torch.randn(logits.shape), state

    torch.manual_seed(0)
    config, shown = TrainConfig(ways=5, image_size=2), (constant_images(8, 20), Protocol(5, 1), 30)
    once, often = (evaluate_protocol(Unsure(5, "onehot"), config, *shown, orders=n) for n in (1, 32))
    assert once["mean"] < 0.6 and often["mean"] > 0.95
    with pytest.raises(ValueError, match="orders must be at least 1, got 0"):
        evaluate_protocol(Unsure(5, "onehot"), config, *shown, orders=0)


def test_what_cannot_be_measured_is_said():
    config = TrainConfig(ways=5, image_size=2)
    for protocol, classes, why in (
        (Protocol(20, 1), constant_images(25, 20), "trained to tell 5 classes apart"),
        (Protocol(5, 1), constant_images(4, 20), "it takes 5 classes, and there are 4"),
        (
            Protocol(5, 6),
            constant_images(8, 20),
            "a class needs 21 images, 15 of them queries, and one has 20",
        ),
    ):
        assert why in obstacle(protocol, config, classes)
        with pytest.raises(ValueError, match=f"{protocol} cannot be measured: .*{why}"):
            evaluate_protocol(Remembers(5, "onehot"), config, classes, protocol, 2)
    assert not obstacle(Protocol(20, 1), TrainConfig(labels="string"), constant_images(25, 20))
    for text in ("5-way", "1-way-1-shot", "5-way-0-shot", "five-way-1-shot"):
        with pytest.raises(ValueError, match="a protocol must be such as 5-way-1-shot"):
            Protocol.parse(text)


class Looks(nn.Module):
    """Answers a grey with the label that came with it, of a stream one step late; its state is all of both so far."""

    def __init__(self, config):
        super().__init__()
        self.config, self.width = config, 25 if config.labels == "string" else config.ways

    def forward(self, x, state=None):
        greys, labels = x[..., 0], x[..., -self.width :]
        if state is not None:
            greys, labels = torch.cat([state[0], greys]), torch.cat([state[1], labels])
        if self.config.late == "pair":
            assert torch.equal(x[..., 4], greys[-2:-1] if len(greys) > 1 else torch.zeros_like(x[..., 4]))
        shown, known = greys[:-1], labels[1:]
        if self.config.layout == "support":
            assert labels[:-1].any(2).all()  # what is remembered came with its label
            shown, known = greys, labels
        same = (shown == x[..., 0]).float()
        return torch.einsum("tb,tbl->bl", same, known).clamp(max=1).unsqueeze(0) * 9, (greys, labels)


@pytest.mark.parametrize("labels", ["onehot", "string"])
@pytest.mark.parametrize("layout, late", [("stream", "label"), ("stream", "pair"), ("support", "label")])
@pytest.mark.parametrize("ways, orders", [(2, 1), (4, 3)])
def test_along_a_stream_a_perfect_memory_knows_what_it_has_seen(layout, late, labels, ways, orders):
    """Of every image after the first of its class, and of no first one more than a guess."""
    config = TrainConfig.of("none", layout, ways=5, labels=labels, late=late, image_size=2)
    found = evaluate_streams(Looks(config), config, constant_images(8, 10), ways, 80, orders=orders)
    assert found.episodes == 80 and len(found.mean) == INSTANCES
    assert found.mean[1:] == (1,) * (INSTANCES - 1)
    assert found.mean[0] < 1


def test_along_a_stream_an_answer_is_the_mean_over_the_deals():
    class Unsure(Looks):
        def forward(self, x, state=None):
            logits, state = super().forward(x, state)
            return logits / 9 + torch.randn(logits.shape), state

    torch.manual_seed(0)
    config = TrainConfig.of("none", "support", ways=5, image_size=2)
    once, often = (
        evaluate_streams(Unsure(config), config, constant_images(8, 10), 5, 20, orders=n) for n in (1, 32)
    )
    assert once.mean[4] < 0.7 and often.mean[4] > 0.95
    with pytest.raises(ValueError, match="orders must be at least 1, got 0"):
        evaluate_streams(Unsure(config), config, constant_images(8, 10), 5, 20, orders=0)


class Sees(nn.Module):
    """Guesses, and keeps what it was shown."""

    def __init__(self):
        super().__init__()
        self.calls = []

    def forward(self, x, state=None):
        self.calls.append(x)
        return torch.randn(*x.shape[:2], 5), state or ()


def measured_by(what, model, classes, **averages):
    config = TrainConfig(ways=5, image_size=6)
    if what == "streams":
        return evaluate_streams(model, config, classes, 3, 2, **averages)
    return evaluate_protocol(model, config, classes, Protocol(3, 2), 2, **averages)


@pytest.mark.parametrize("what", ["streams", "protocol"])
def test_views_of_a_model_without_an_encoder_are_images_distorted_anew(what):
    images = torch.randint(0, 256, (4 * 17, 6, 6), dtype=torch.uint8)
    classes = ClassImages(images, torch.arange(5) * 17, tuple("abcd"))
    model = Sees()
    measured_by(what, model, classes, orders=2, views=3)
    known = {tuple(image) for image in (images.flatten(1).float() / 255).tolist()}
    for (
        call
    ) in model.calls:  # [T, 2 episodes * 2 orders * 3 views, ...], of a query also those of all queries
        pixels = call[..., :36]
        as_it_is = torch.tensor([[tuple(image) in known for image in step] for step in pixels.tolist()])
        assert as_it_is[:, ::3].all() and not as_it_is[:, 1::3].any() and not as_it_is[:, 2::3].any()
        assert pixels.shape[1] % 12 == 0 and 0 <= pixels.min() and pixels.max() <= 1
        assert not torch.equal(pixels[:, 1::3], pixels[:, 2::3])
    with pytest.raises(ValueError, match="views must be at least 1, got 0"):
        measured_by(what, model, classes, views=0)


def test_streams_that_cannot_be_measured():
    config = TrainConfig(ways=5, image_size=2)
    for ways, classes, why in (
        (6, constant_images(8, 10), "the model was trained to tell 5 classes apart"),
        (5, constant_images(4, 10), "it takes 5 classes, and there are 4 to measure on"),
        (5, constant_images(8, 9), "a class needs 10 images and one has 9"),
    ):
        assert obstacle_to_streams(ways, config, classes) == why
        with pytest.raises(ValueError, match=f"streams of {ways} classes cannot be measured: {why}"):
            evaluate_streams(Looks(config), config, classes, ways, 3)
