"""MemoryPolicy in RecurrentPPO: its one call against single steps, saving and loading, and that it learns.

Skipped where sb3-contrib is not installed: it is in the extra "sb3".
"""

import pytest
import torch
from cases import worst_error

pytest.importorskip("sb3_contrib", exc_type=ImportError)

import gymnasium
import numpy as np
from gymnasium import spaces
from sb3_contrib import RecurrentPPO
from stable_baselines3.common.torch_layers import CombinedExtractor
from torch import nn

from mann_fast import MemoryLayer
from mann_fast.rl.sb3 import MemoryPolicy, PackedMemory

MEMORY = {"hidden_size": 16, "num_slots": 8, "slot_size": 8, "num_heads": 1}


class Recall(gymnasium.Env):
    """Episodes of 4 steps. The first observation is one of 3 marks, the others are blank; each later action that is the mark
    earns 1. Chance earns 1 in an episode, and a policy that remembers 3."""

    action_space = spaces.Discrete(3)
    observation_space = spaces.Box(0, 1, (3,), np.float32)

    def reset(self, *, seed=None, options=None):
        super().reset(seed=seed)
        self.mark, self.age = self.np_random.integers(3), 0
        return np.eye(3, dtype=np.float32)[self.mark], {}

    def step(self, action):
        self.age += 1
        earned = float(action == self.mark) if self.age > 1 else 0.0
        return np.zeros(3, np.float32), earned, self.age == 4, False, {}


class Named(gymnasium.ObservationWrapper):
    observation_space = spaces.Dict(mark=Recall.observation_space)

    def observation(self, observation):
        return {"mark": observation}


@pytest.mark.parametrize("kind", [{"memory_start": "learned"}, {"controller": "gru", "addressing": "ntm"}])
def test_one_call_is_its_steps(kind):
    """In float64, each step a call as RecurrentPPO collects them; the first from its zeros."""
    memory = PackedMemory(MemoryLayer(3, batch_first=True, **MEMORY, **kind)).double()
    with torch.no_grad():
        for parameter in memory.parameters():
            parameter.add_(torch.randn_like(parameter), alpha=0.1)
    x = torch.randn(4, 9, 3, dtype=torch.float64, requires_grad=True)
    starts = torch.rand(4, 9) < 0.3
    starts[:, 0] = torch.tensor([True, True, False, False])
    zeros = x.new_zeros(1, 4, memory.hidden_size)

    def policy_call(x, states, starts):
        return MemoryPolicy._process_sequence(x.flatten(0, 1), states, starts.flatten().double(), memory)

    output, last = policy_call(x, (zeros, zeros), starts)
    states, steps = (zeros, zeros), []
    for t in range(9):
        assert all(part.shape == zeros.shape for part in states)
        step, states = policy_call(x[:, t : t + 1], states, starts[:, t : t + 1])
        steps.append(step)
    expected = torch.stack(steps, 1).flatten(0, 1)
    assert worst_error(output, expected) < 1e-12
    for part, wanted in zip(last, states, strict=True):
        assert worst_error(part[0], wanted[0]) < 1e-12

    direct, _ = memory.layer(x, resets=starts)
    assert worst_error(output, direct.flatten(0, 1)) < 1e-12

    weights = torch.randn_like(output)
    inputs = [x, *memory.parameters()]
    wanted = torch.autograd.grad((expected * weights).sum(), inputs)
    for gradient, want in zip(torch.autograd.grad((output * weights).sum(), inputs), wanted, strict=True):
        assert want.abs().max() > 0
        assert worst_error(gradient[None], want[None]) < 1e-10


def make(env, **policy_kwargs):
    return RecurrentPPO(
        MemoryPolicy, env, n_steps=16, batch_size=16, n_epochs=1, seed=0, device="cpu",
        policy_kwargs={"memory_kwargs": MEMORY, "net_arch": [], **policy_kwargs},
    )  # fmt: skip


@pytest.mark.parametrize(
    "critic", [{}, {"enable_critic_lstm": False}, {"shared_lstm": True, "enable_critic_lstm": False}]
)
def test_learns_saves_loads_and_predicts(critic, tmp_path):
    model = make(Recall(), **critic)
    before = {name: value.clone() for name, value in model.policy.state_dict().items()}
    model.learn(32)
    moved = [
        name for name, value in model.policy.state_dict().items() if not torch.equal(value, before[name])
    ]
    assert {name.split(".")[0] for name in moved} >= {"lstm_actor", "action_net", "value_net"}
    assert ("lstm_critic" in {name.split(".")[0] for name in moved}) == (critic == {})
    model.save(tmp_path / "model.zip")
    model.policy.save(tmp_path / "policy.pth")
    again = RecurrentPPO.load(tmp_path / "model.zip", env=Recall(), device="cpu")
    policy = MemoryPolicy.load(tmp_path / "policy.pth", device="cpu")
    assert policy.memory_kwargs == MEMORY

    observations = np.random.default_rng(0).random((6, 2, 3), np.float32)
    states = [None, None, None]
    for t, observation in enumerate(observations):
        starts = np.array([t == 0, t == 3])
        results = []
        for i, one in enumerate((model, again, policy)):
            action, states[i] = one.predict(observation, states[i], starts if t else None, deterministic=True)
            results.append(action)
        assert (results[0] == results[1]).all() and (results[0] == results[2]).all()
        for state in states[1:]:
            assert all((part == kept).all() for part, kept in zip(state, states[0], strict=True))
    again.learn(16, reset_num_timesteps=False)


def test_predict_begins_at_the_start_of_a_memory():
    policy = make(Recall()).policy
    observation = np.eye(3, dtype=np.float32)[:2]
    _, state = policy.predict(observation)
    features = policy.extract_features(torch.tensor(observation))
    _, expected = policy.lstm_actor.layer(features.unsqueeze(1))
    for part, want in zip(state, policy.lstm_actor._pack(expected), strict=True):
        assert worst_error(torch.tensor(part)[0], want[0]) < 1e-6


def test_dictionaries():
    model = make(Named(Recall()), features_extractor_class=CombinedExtractor)
    model.learn(16)
    action, _ = model.predict({"mark": np.zeros((2, 3), np.float32)})
    assert action.shape == (2,)


def test_what_is_refused():
    for name in ("lstm_hidden_size", "n_lstm_layers", "lstm_kwargs"):
        with pytest.raises(TypeError, match=f"{name} is no argument of MemoryPolicy"):
            make(Recall(), **{name: 1})
    with pytest.raises(ValueError, match="built in"):
        PackedMemory(MemoryLayer(3, batch_first=True, controller=nn.Identity()))
    with pytest.raises(TypeError, match="float32"):
        PackedMemory(MemoryLayer(3, batch_first=True, dtype=torch.float64))


@pytest.mark.thorough
def test_ppo_remembers():
    """Chance earns 1 in an episode, and a policy without a memory no more."""
    torch.manual_seed(0)
    from stable_baselines3.common.env_util import make_vec_env

    model = RecurrentPPO(
        MemoryPolicy, make_vec_env(Recall, 16), n_steps=20, batch_size=320, n_epochs=5, learning_rate=1e-2, gamma=0.9,
        ent_coef=0.01, seed=0, device="cpu", policy_kwargs={"memory_kwargs": MEMORY, "net_arch": []},
    )  # fmt: skip
    model.learn(320 * 12)
    assert np.mean([episode["r"] for episode in model.ep_info_buffer]) > 2.2
