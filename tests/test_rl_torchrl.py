"""MemoryModule in TorchRL: its modes against each other and against the layer step by step, and that it learns.

Skipped where TorchRL is not installed: it is in the extra "torchrl".
"""

import warnings

import pytest
import torch
from cases import worst_error

from mann_fast import MemoryLayer

with warnings.catch_warnings():  # of TorchRL about itself
    warnings.simplefilter("ignore")
    pytest.importorskip("torchrl.collectors", exc_type=ImportError)

from tensordict import TensorDict
from tensordict.nn import TensorDictModule, TensorDictSequential
from torch import nn
from torchrl.collectors import Collector
from torchrl.data import Categorical, Composite, Unbounded
from torchrl.envs import EnvBase, InitTracker, TransformedEnv
from torchrl.modules import LSTMModule, ProbabilisticActor, set_recurrent_mode
from torchrl.modules.utils import get_primers_from_module
from torchrl.objectives import ClipPPOLoss
from torchrl.objectives.value import GAE

from mann_fast.rl.torchrl import MemoryModule

SIZES = {"num_slots": 6, "slot_size": 4, "num_heads": 2}
KINDS = {
    "lstm": {"controller": "lstm", "addressing": "lrua", "memory_start": "learned"},
    "gru": {"controller": "gru", "addressing": "ntm"},
    "dnc without links": {"addressing": "dnc", "link": False},
    "feedforward": {"controller": "feedforward", "addressing": "lrua", "output_size": 5},
}
# TorchRL's own module, too: these tests say what it does.
every_kind = pytest.mark.parametrize("kind", [*KINDS, "LSTMModule"])


def make_module(kind):
    keys = {"in_key": "observation", "out_key": "features"}
    if kind == "LSTMModule":
        return LSTMModule(3, 7, **keys).double()
    module = MemoryModule(3, 7, **keys, **SIZES, **KINDS[kind]).double()
    with torch.no_grad():
        for parameter in module.parameters():  # a learned start that is no longer the constant one
            parameter.add_(torch.randn_like(parameter), alpha=0.1)
    return module


def rollout(module, x, is_init):
    """Step by step, as a collector does: each step a call, the next state carried on, zeros where an episode begins."""
    batch, steps = x.shape[:2]
    primer = module.make_tensordict_primer()
    states = {key: x.new_zeros(batch, *spec.shape) for key, spec in primer.primers.items()}
    collected = []
    for t in range(steps):
        for key, state in states.items():
            begins = is_init[:, t].view(batch, *(1,) * (state.dim() - 1))
            states[key] = torch.where(begins, 0.0, state)
        data = TensorDict({"observation": x[:, t], "is_init": is_init[:, t], **states}, [batch])
        module(data)
        collected.append(data)
        states = {key: data["next", key] for key in states}
    return torch.stack(collected, 1)


def without_results(data):
    return data.detach().exclude("features", "next")


@every_kind
def test_a_whole_batch_is_its_steps(kind):
    module = make_module(kind)
    x = torch.randn(4, 9, 3, dtype=torch.float64, requires_grad=True)
    is_init = torch.rand(4, 9, 1) < 0.3
    is_init[0, 0], is_init[1, 0] = True, False
    by_steps = rollout(module, x, is_init)
    data = TensorDict({**without_results(by_steps).to_dict(), "observation": x}, by_steps.batch_size)
    with set_recurrent_mode(True):
        module(data)
    assert worst_error(data["features"], by_steps["features"]) < 1e-12
    for key in module.out_keys[1:]:
        assert worst_error(data[key][:, -1], by_steps[key][:, -1]) < 1e-12

    weights = torch.randn_like(data["features"])
    inputs = [x, *module.parameters()]
    expected = torch.autograd.grad((by_steps["features"] * weights).sum(), inputs)
    gradients = torch.autograd.grad((data["features"] * weights).sum(), inputs)
    for gradient, wanted in zip(gradients, expected, strict=True):
        assert wanted.abs().max() > 0
        assert worst_error(gradient[None], wanted[None]) < 1e-10


@every_kind
def test_from_the_middle_of_an_episode(kind):
    """Data that begin where an earlier batch of the collector has ended."""
    module = make_module(kind)
    x, is_init = torch.randn(3, 8, 3, dtype=torch.float64), torch.zeros(3, 8, 1, dtype=torch.bool)
    is_init[:, 0] = True
    is_init[1, 6] = True
    by_steps = rollout(module, x, is_init)
    later = without_results(by_steps)[:, 3:]
    with set_recurrent_mode(True):
        module(later)
    assert worst_error(later["features"], by_steps["features"][:, 3:]) < 1e-12


@every_kind
def test_next_observations_go_on_from_the_states_that_came_before_them(kind):
    """Value estimators call the module on "next", where the first step of an episode is marked but is not its first."""
    module = make_module(kind)
    x, is_init = torch.randn(3, 8, 3, dtype=torch.float64), torch.zeros(3, 8, 1, dtype=torch.bool)
    is_init[:, 0] = True
    is_init[0, 4] = is_init[1, 2] = is_init[1, 3] = True
    by_steps = rollout(module, x, is_init).detach()
    follows = torch.randn(3, 8, 3, dtype=torch.float64)  # what an environment shows after each step
    follows[:, :-1] = torch.where(is_init[:, 1:], follows[:, :-1], x[:, 1:])
    states = {key[1]: by_steps[key] for key in module.out_keys[1:]}
    expected = module(
        TensorDict({"observation": follows, "is_init": torch.zeros_like(is_init), **states}, [3, 8])
    )
    data = TensorDict({"observation": follows, "is_init": is_init, **states}, [3, 8])
    with set_recurrent_mode(True):
        module(data)
    assert worst_error(data["features"], expected["features"]) < 1e-12
    for key in module.out_keys[1:]:
        assert worst_error(data[key][:, -1], expected[key][:, -1]) < 1e-12


@every_kind
def test_a_step_that_begins_an_episode_forgets_the_state_it_is_given(kind):
    module = make_module(kind)
    x, begins = torch.randn(2, 6, 3, dtype=torch.float64), torch.zeros(2, 6, 1, dtype=torch.bool)
    begins[:, 0] = True
    last = rollout(module, x, begins)[:, -1]
    step = {"observation": torch.randn(2, 3, dtype=torch.float64), "is_init": torch.tensor([[True], [False]])}
    fresh = module(TensorDict(step, [2]))["features"]
    kept = {key[1]: last[key] for key in module.out_keys[1:]}
    given = module(TensorDict({**step, **kept}, [2]))["features"]
    assert worst_error(given[:1], fresh[:1]) < 1e-12
    assert worst_error(given[1:], fresh[1:]) > 1e-3


@pytest.mark.parametrize("shape", [(5,), (2, 5), (2, 3, 5)], ids=str)
def test_any_batch_size_as_the_lstm_module(shape):
    lstm = LSTMModule(3, 7, in_key="observation", out_key="features")
    memory = MemoryModule(3, 7, output_size=7, in_key="observation", out_key="features", **SIZES)
    for module in (lstm, memory):
        data = TensorDict(
            {"observation": torch.randn(*shape, 3), "is_init": torch.rand(*shape, 1) < 0.3}, shape
        )
        for recurrent in (False, True):
            with set_recurrent_mode(recurrent):
                assert module(data.clone())["features"].shape == (*shape, 7)
        assert module.in_keys[0] == "observation" and module.in_keys[-1] == "is_init"
    with pytest.raises(KeyError, match="lacks .*recurrent_state_cell"):
        memory(data.set("recurrent_state_hidden", torch.zeros(*shape, 7)))
    first, *_ = memory(observation=torch.randn(1, 3), is_init=torch.ones(1, 1, dtype=torch.bool))
    assert first.shape == (1, 7)


def test_keys_modes_and_what_is_refused():
    layer = MemoryLayer(3, 7, batch_first=True, controller="gru", **SIZES)
    names = ["recurrent_state_" + name for name in ("hidden", "memory", "read_weights", "usage", "reads")]
    module = MemoryModule(layer=layer, in_key="x", out_key="y", default_recurrent_mode=True)
    assert module.in_keys == ["x", *names, "is_init"]
    assert module.out_keys == ["y", *(("next", name) for name in names)]
    assert module.recurrent_mode
    with set_recurrent_mode(False):
        assert not module.recurrent_mode
    keys = [("agent", name) for name in "abcde"]
    own = MemoryModule(
        layer=layer, in_keys=["x", *keys, "first"], out_keys=["y", *(("next", *key) for key in keys)]
    )
    assert own.in_keys == ["x", *keys, "first"]
    assert set(own.make_tensordict_primer().primers.keys(True, True)) == set(keys)
    elsewhere = MemoryModule(layer=layer, in_key="x", out_keys=["y", *keys])
    with pytest.raises(RuntimeError, match="make_tensordict_primer"):
        elsewhere.make_tensordict_primer()
    with pytest.raises(KeyError, match="lacks .*is_init"):
        module(TensorDict({"x": torch.zeros(2, 4, 3)}, [2, 4]))
    with pytest.raises(ValueError, match=r"\[\*, T\]"):
        module(TensorDict({"x": torch.zeros(3), "is_init": torch.ones(1, dtype=torch.bool)}, []))

    for arguments, message in (
        ({"layer": layer, "out_key": "y"}, "one of in_key and in_keys"),
        ({"layer": layer, "in_key": "x", "out_key": "y", "out_keys": ["y"]}, "one of out_key and out_keys"),
        ({"layer": layer, "in_keys": ["x", "h", "c"], "out_key": "y"}, "in_keys must be one value and 5"),
        ({"in_key": "x", "out_key": "y"}, "input_size and hidden_size"),
        ({"layer": layer, "num_slots": 3, "in_key": "x", "out_key": "y"}, "without the arguments"),
        ({"layer": MemoryLayer(3, 7), "in_key": "x", "out_key": "y"}, "batch_first=True"),
        (
            {
                "layer": MemoryLayer(3, 7, controller=nn.Identity(), batch_first=True),
                "in_key": "x",
                "out_key": "y",
            },
            "built in",
        ),
    ):
        with pytest.raises(ValueError, match=message):
            MemoryModule(**arguments)
    with pytest.raises(TypeError, match="MemoryLayer"):
        MemoryModule(layer=nn.LSTM(3, 7), in_key="x", out_key="y")


class Recall(EnvBase):
    """Episodes of 4 steps. The first observation is one of 3 marks, the others are blank; each later action that is the mark
    earns 1. Chance earns 1 in an episode, and a policy that remembers 3."""

    MARKS, LENGTH = 3, 4

    def __init__(self, num_envs):
        super().__init__(batch_size=[num_envs])
        self.observation_spec = Composite(observation=Unbounded((num_envs, self.MARKS)), shape=[num_envs])
        self.action_spec = Categorical(self.MARKS, shape=[num_envs])
        self.reward_spec = Unbounded((num_envs, 1))
        self.mark = torch.zeros(num_envs, dtype=torch.long)
        self.age = torch.zeros(num_envs, dtype=torch.long)

    def _set_seed(self, seed):
        torch.manual_seed(seed)

    def _observe(self):
        marks = nn.functional.one_hot(self.mark, self.MARKS).float()
        return torch.where(self.age.unsqueeze(1) == 0, marks, 0.0)

    def _reset(self, data):
        begins = torch.ones(self.batch_size, dtype=torch.bool)
        if data is not None and "_reset" in data.keys():
            begins = data["_reset"].view(self.batch_size)
        drawn = torch.randint(self.MARKS, self.batch_size)
        self.mark, self.age = torch.where(begins, drawn, self.mark), torch.where(begins, 0, self.age)
        return TensorDict({"observation": self._observe()}, self.batch_size)

    def _step(self, data):
        reward = (data["action"] == self.mark) & (self.age > 0)
        self.age = self.age + 1
        done = (self.age == self.LENGTH).unsqueeze(1)
        results = {"observation": self._observe(), "reward": reward.float().unsqueeze(1), "done": done}
        return TensorDict({**results, "terminated": done.clone()}, self.batch_size)


@pytest.mark.thorough
@pytest.mark.parametrize("shifted", [False, True])
@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::UserWarning", "ignore::FutureWarning")
def test_ppo_remembers(shifted):
    """With the collector, the value estimator and the loss of TorchRL; chance earns 0.25 a step, and memory alone 0.75."""
    memory = MemoryModule(
        3, 16, in_key="observation", out_key="features", num_slots=8, slot_size=8, num_heads=1
    )
    width = memory.layer.output_size
    actor = ProbabilisticActor(
        TensorDictSequential(memory, TensorDictModule(nn.Linear(width, 3), ["features"], ["logits"])),
        in_keys=["logits"],
        distribution_class=torch.distributions.Categorical,
        return_log_prob=True,
    )
    value = TensorDictSequential(memory, TensorDictModule(nn.Linear(width, 1), ["features"], ["state_value"]))
    env = TransformedEnv(Recall(32), InitTracker())
    env.append_transform(get_primers_from_module(actor))
    loss_module = ClipPPOLoss(actor, value, entropy_coeff=0.01, critic_coeff=0.5)
    estimator = GAE(gamma=0.9, lmbda=0.9, value_network=value, shifted=shifted, deactivate_vmap=True)
    optimizer = torch.optim.Adam(loss_module.parameters(), 1e-2)
    collector = Collector(env, actor, frames_per_batch=32 * 10, total_frames=32 * 10 * 15)
    earned = []
    for data in collector:
        estimator(data)
        for _ in range(4):
            losses = loss_module(data.clone())
            loss = losses["loss_objective"] + losses["loss_critic"] + losses["loss_entropy"]
            optimizer.zero_grad()
            loss.backward()
            nn.utils.clip_grad_norm_(loss_module.parameters(), 1.0)
            optimizer.step()
        earned.append(data["next", "reward"].mean().item())
    collector.shutdown()
    assert earned[0] < 0.4
    assert sum(earned[-2:]) / 2 > 0.6
