"""MANN and the LSTM that it is compared with."""

import pytest
import torch

from mann_fast import MANN
from mann_fast.models import LSTMClassifier

MODELS = [
    (MANN, {"hidden_size": 7, "num_slots": 6, "slot_size": 3, "num_heads": 2, "write_target": "shared"}),
    (LSTMClassifier, {"hidden_size": 7}),
]


@pytest.mark.parametrize("model_class, options", MODELS)
def test_interface(model_class, options):
    model = model_class(4, 3, **options)
    x = torch.randn(5, 2, 4)
    logits, state = model(x)
    assert logits.shape == (5, 2, 3)
    first, middle = model(x[:2])
    second, _ = model(x[2:], middle)
    assert torch.allclose(torch.cat([first, second]), logits, atol=1e-5)
    logits.square().sum().backward()
    assert all(p.grad.abs().max() > 0 for p in model.parameters())


@pytest.mark.parametrize("model_class, options", MODELS)
def test_config_makes_the_same_model_again(model_class, options):
    model = model_class(4, 3, **options)
    again = model_class(**model.config)
    again.load_state_dict(model.state_dict())
    x = torch.randn(5, 2, 4)
    assert torch.equal(model(x)[0], again(x)[0])


def test_mann_has_the_sizes_of_the_paper_by_default():
    layer = MANN(405, 5).layer
    assert (layer.hidden_size, layer.num_slots, layer.slot_size, layer.num_heads) == (200, 128, 40, 4)


def test_mann_takes_no_output_size():
    with pytest.raises(TypeError, match="output_size"):
        MANN(4, 3, output_size=5)
