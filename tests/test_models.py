"""MANN and its baseline: one interface, rebuilt from their config, and MANN learns what needs a memory."""

import inspect
import re

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from mann_fast import MANN, MemoryLayer, MemoryState
from mann_fast.layers.registry import options_of
from mann_fast.models import LSTMClassifier
from mann_fast.training import SequenceConfig
from mann_fast.training.run import Run

SMALL = {
    "mann": (MANN, {"num_slots": 7, "slot_size": 5, "num_heads": 3}),
    "lstm": (LSTMClassifier, {}),
}
both = pytest.mark.parametrize("kind", SMALL)


def make(kind, **options):
    model_class, sizes = SMALL[kind]
    return model_class(6, 3, 8, **{**sizes, **options})


def flat(state):
    return torch.cat([part.flatten() for part in torch.utils._pytree.tree_leaves(state)])


def test_paper_sizes_by_default():
    model = MANN(405, 5)
    layer = model.layer
    sizes = (layer.hidden_size, layer.num_slots, layer.slot_size, layer.num_heads)
    assert sizes == (200, 128, 40, 4)
    assert model.classifier.weight.shape == (5, 360)
    assert LSTMClassifier(405, 5).layer.hidden_size == 200


def test_mann_has_the_options_of_its_layer():
    options = inspect.signature(MANN).parameters
    expected = dict(inspect.signature(MemoryLayer).parameters)
    del expected["output_size"]
    of_images = ("encoder", "image_shape", "num_images", "normalize_features")
    options = {name: p for name, p in options.items() if name not in of_images}
    assert {name: p.default for name, p in options.items() if name != "num_classes"} == {
        name: p.default for name, p in expected.items()
    }


@both
def test_logits_are_the_classifier_of_the_layer(kind):
    model = make(kind)
    x = torch.randn(4, 2, 6)
    logits, state = model(x)
    output, expected = model.layer(x)
    assert logits.shape == (4, 2, 3)
    assert torch.equal(logits, F.linear(output, model.classifier.weight, model.classifier.bias))
    assert torch.equal(flat(state), flat(expected))
    assert isinstance(state, MemoryState) == (kind == "mann")


@both
def test_interface(kind):
    model, other = make(kind, dtype=torch.float64), make(kind, dtype=torch.float64, batch_first=True)
    other.load_state_dict(model.state_dict())
    x = torch.randn(6, 2, 6, dtype=torch.float64)
    logits, end = model(x)
    first, state = model(x[:2])
    second, state = model(x[2:], state)
    assert torch.allclose(torch.cat([first, second]), logits, rtol=1e-10, atol=1e-12)
    assert torch.allclose(flat(state), flat(end), rtol=1e-10, atol=1e-12)
    transposed, _ = other(x.transpose(0, 1))
    assert torch.allclose(transposed.transpose(0, 1), logits, rtol=1e-10, atol=1e-12)
    single, _ = model(x[:, 1])
    assert torch.allclose(single, logits[:, 1], rtol=1e-10, atol=1e-12)


@both
def test_config_makes_the_same_model_again(kind, tmp_path):
    options = {"batch_first": True}
    if kind == "mann":
        options |= {"sharpness": 3.5, "write_vector": "key", "order": "read_first", "write_target": "shared"}
        options |= {"usage_decay": 0.9, "eps": 1e-4}
    model = make(kind, **options)
    torch.save({"config": model.config, "weights": model.state_dict()}, tmp_path / "model.pt")
    saved = torch.load(tmp_path / "model.pt", weights_only=True)
    again = type(model)(**saved["config"])
    again.load_state_dict(saved["weights"])
    assert again.config == model.config
    assert repr(again) == repr(model)
    x = torch.randn(2, 5, 6)
    assert torch.equal(again(x)[0], model(x)[0])
    arguments = set(inspect.signature(type(model)).parameters) - {"device", "dtype", "options"}
    if kind == "mann":
        arguments |= set(options_of(model.layer.memory))
    assert set(model.config) == arguments  # the defaults too, which may change


@pytest.mark.parametrize("addressing", ["lrua", "ntm", "content"])
def test_a_config_of_an_earlier_version_makes_the_same_model(addressing):
    """It held the options of every memory, and no order where none was given."""
    sizes = {"num_slots": 7, "slot_size": 5, "num_heads": 3}
    of_lrua = {
        "sharpness": "learned",
        "write_vector": "separate",
        "write_target": "per_head",
        "usage_decay": 0.95,
    }
    saved = {"num_classes": 3, "input_size": 6, "hidden_size": 8, **sizes, **of_lrua, "controller": "lstm"}
    saved |= {"max_shift": 1, "order": None, "eps": 1e-6, "memory_start": "constant", "batch_first": False}
    saved["addressing"] = addressing
    model = MANN(**saved)
    assert model.config == make("mann", addressing=addressing).config
    assert model.layer.order == ("write_first" if addressing == "lrua" else "read_first")

    run = Run(SequenceConfig(), model)  # and a run that it began goes on
    state = run.state_dict()
    run.load_state_dict({**state, "model": {**state["model"], "config": saved}})
    for changed in ({"eps": 1e-3}, {"usage_decay": 0.5}, {"num_reads": 2}):
        state["model"]["config"] = {**saved, **changed}
        with pytest.raises(
            ValueError, match="the checkpoint's model was made with .*, this version of mann_fast makes"
        ):
            run.load_state_dict(state)


@both
def test_converts_and_places(kind):
    assert make(kind).double()(torch.randn(3, 2, 6, dtype=torch.float64))[0].dtype == torch.float64
    assert make(kind, dtype=torch.bfloat16)(torch.randn(3, 2, 6).bfloat16())[0].dtype == torch.bfloat16
    assert all(p.device.type == "meta" for p in make(kind, device="meta").parameters())


@both
@pytest.mark.parametrize(
    "sizes, error, message",
    [
        ((6, 0, 8), ValueError, "num_classes must be at least 1, got 0"),
        ((6, 3.0, 8), TypeError, "num_classes must be an int, got float"),
        ((0, 3, 8), ValueError, "input_size must be at least 1, got 0"),
        ((6, 3, -1), ValueError, "hidden_size must be at least 1, got -1"),
    ],
)
def test_refuses_sizes(kind, sizes, error, message):
    with pytest.raises(error, match=re.escape(message)):
        SMALL[kind][0](*sizes)


def test_refuses_unknown_options():
    with pytest.raises(TypeError, match="output_size"):
        MANN(6, 3, output_size=4)


def recall_episodes(batch, ways=3, steps=12, width=6):
    """Random vectors as classes, drawn anew at each step, with the label of the step before."""
    classes = torch.randn(batch, ways, width)
    targets = torch.randint(ways, (steps, batch))
    shown = classes[torch.arange(batch), targets]
    before = F.one_hot(targets, ways).float().roll(1, 0)
    before[0] = 0
    return torch.cat([shown, before], 2), targets


def test_mann_learns_to_recall():
    """Classes and their labels are new in every episode, so only remembering helps."""
    model = MANN(9, 3, 32, num_slots=16, slot_size=12, num_heads=2)
    optimizer = torch.optim.Adam(model.parameters(), lr=1e-2)
    for _ in range(400):
        x, targets = recall_episodes(32)
        loss = F.cross_entropy(model(x)[0].flatten(0, 1), targets.flatten())
        optimizer.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(model.parameters(), 5)
        optimizer.step()
    x, targets = recall_episodes(200)
    with torch.no_grad():
        right = model(x)[0].argmax(2) == targets
    assert right[-4:].double().mean() > 0.6  # chance is 1/3
