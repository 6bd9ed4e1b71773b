"""Episodes of support and queries: what is shown, what is asked, and that every query is judged apart."""

from dataclasses import replace

import pytest
import torch
from torch.testing import assert_close

from mann_fast.data import encode_inputs, generate_glyphs
from mann_fast.training import TrainConfig
from mann_fast.training.checkpoint import build_model
from mann_fast.training.config import config_from_dict
from mann_fast.training.prediction import logits_apart
from mann_fast.training.support import make_episodes, sample_support, size_of_step

pytestmark = pytest.mark.once

CONFIG = TrainConfig.of("none", "support", data="glyphs", ways=6, shots=2, hidden_size=16, image_size=8)


@pytest.fixture(scope="module")
def episodes():
    return make_episodes(CONFIG, generate_glyphs(12, 7, image_size=8), seed=0)


@pytest.fixture
def model(episodes):
    torch.manual_seed(0)
    return build_model(CONFIG, episodes.input_size, episodes.num_outputs)


def test_every_class_has_its_examples_and_queries_and_no_image_is_both(episodes):
    drawn = sample_support(episodes, 3, ways=4, shots=2, queries=5)
    for b in range(3):
        labels, counts = drawn.shown[:, b].unique(return_counts=True)
        assert counts.tolist() == [2] * 4
        assert torch.equal(labels, drawn.targets[:, b].unique())
        assert drawn.targets[:, b].bincount()[labels].tolist() == [5] * 4
        images = torch.cat([drawn.examples[:, b], drawn.queries[:, b]]).flatten(1)
        # Glyphs are drawn differently every time, so an image that came twice would be one fewer.
        assert len(images.unique(dim=0)) == 4 * 7


def test_fewer_classes_have_any_of_the_labels(episodes):
    # With always the same few, a new model learns only how many there are, and a query could not tell them apart by memory.
    drawn = sample_support(episodes, 100, ways=2, shots=1)
    assert drawn.shown.unique().tolist() == list(range(6))


@pytest.mark.parametrize("training", [False, True])
def test_a_query_is_one_step_from_the_memory_after_examples_with_their_labels(episodes, model, training):
    model.train(training)
    drawn = sample_support(episodes, 3, ways=6, shots=2)
    found = logits_apart(model, CONFIG, drawn.examples, drawn.shown, drawn.queries)
    options = {"ways": 6, "labels": "onehot"}
    _, state = model(encode_inputs(drawn.examples, drawn.shown, **options))
    for image, logits in zip(drawn.queries, found, strict=True):
        asked, _ = model(encode_inputs(image.unsqueeze(0), torch.full((1, 3), -1), **options), state)
        assert_close(logits, asked[0], atol=1e-5, rtol=1e-5)
    assert (found[0] - found[1]).abs().max() > 1e-4  # or the images would not matter


def test_examples_of_a_stream_have_their_labels_a_step_late(episodes, model):
    drawn = sample_support(episodes, 3, ways=6, shots=2)
    stream = replace(CONFIG, episodes="stream")
    found = logits_apart(model, stream, drawn.examples, drawn.shown, drawn.queries[:1])
    late = torch.cat([torch.full((1, 3), -1), drawn.shown])
    images = torch.cat([drawn.examples, drawn.queries[:1]])
    logits, _ = model(encode_inputs(images, late, ways=6, labels="onehot"))
    assert_close(found[0], logits[-1], atol=1e-5, rtol=1e-5)


def test_steps_start_with_few_classes_and_come_to_all():
    config = replace(CONFIG, ways=20)
    sizes = [size_of_step(config, step) for step in range(2000)]
    ways = [way for way, _, _ in sizes]
    assert ways[0] == 5 and ways[-1] == 20 and ways == sorted(ways)
    assert {shots for _, shots, _ in sizes} == {1, 2}
    assert all(way * batch <= 20 * config.batch for way, _, batch in sizes)


def test_checkpoints_from_before_are_of_a_stream():
    old = replace(CONFIG, episodes="stream").to_dict()
    del old["episodes"]
    assert config_from_dict(old).episodes == "stream"
