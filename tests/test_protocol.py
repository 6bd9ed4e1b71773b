"""N-way K-shot with queries judged apart: the right examples, every query once, and what cannot be measured."""

import pytest
import torch
from torch import nn

from mann_fast.data import ClassImages
from mann_fast.training import TrainConfig
from mann_fast.training.protocol import QUERIES, Protocol, evaluate_protocol, obstacle


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
        (Protocol(5, 1), constant_images(4, 20), "there are 4 classes"),
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
