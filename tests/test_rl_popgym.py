"""MemoryModel as RLlib calls a memory model of POPGym's baselines: fragments of episodes, padded, against single steps.

Skipped where POPGym or RLlib is not installed: they are in the extra "popgym".
"""

import warnings

import pytest
import torch
from cases import worst_error

with warnings.catch_warnings():  # of RLlib about itself
    warnings.simplefilter("ignore")
    pytest.importorskip("popgym.baselines.ray_models.base_model", exc_type=ImportError)
    from mann_fast.rl.popgym import MemoryModel

import numpy as np
from gymnasium import spaces
from torch import nn

WIDTH = 12


@pytest.fixture
def model():
    config = {
        "preprocessor_input_size": 8,
        "preprocessor": nn.Identity(),
        "preprocessor_output_size": 8,
        "hidden_size": WIDTH,
        "postprocessor": nn.Identity(),
        "postprocessor_output_size": WIDTH,
        "actor": nn.Identity(),
        "critic": nn.Identity(),
        "memory": {"num_slots": 6, "slot_size": 4, "num_heads": 2, "memory_start": "learned"},
    }
    observations, actions = spaces.Box(-1, 1, (3,), np.float32), spaces.Discrete(4)
    return MemoryModel(observations, actions, 4, {"max_seq_len": 9, "custom_model_config": config}, "memory")


def test_padded_fragments_are_their_steps(model):
    with torch.no_grad():
        model.core.start.add_(torch.randn_like(model.core.start), alpha=0.1)
    model.double()
    lengths = torch.tensor([9, 4, 1])
    observations = torch.randn(3, 9, 3, dtype=torch.float64)
    for b, length in enumerate(lengths):
        observations[b, length:] = float("nan")
    begin = [part.double().expand(3, *part.shape) for part in model.get_initial_state()]

    output, last = model({"obs": observations.flatten(0, 1)}, list(begin), lengths)
    output, values = output.unflatten(0, (3, 9)), model.value_function().view(3, 9)
    for b, length in enumerate(lengths):
        state = [part[b : b + 1] for part in begin]
        for t in range(length):
            step, state = model({"obs": observations[b : b + 1, t]}, state, torch.tensor([1]))
            assert worst_error(output[b, t][None], step) < 1e-12
            assert worst_error(values[b, t].view(1, 1), model.value_function()[None]) < 1e-12
        for part, want in zip(last, state, strict=True):
            assert worst_error(part[b : b + 1], want) < 1e-12

    # A fragment from the middle of an episode goes on from the state that is given.
    state = [part[:1] for part in begin]
    _, state = model({"obs": observations[0, :5]}, state, torch.tensor([5]))
    fragment, _ = model({"obs": observations[0, 5:]}, state, torch.tensor([4]))
    assert worst_error(fragment, output[0, 5:]) < 1e-12

    output[0].sum().backward()
    assert model.core.start.grad.abs().sum() > 0
