"""The memory of docs/adding-a-memory.md, run as the page has it, and what the layer asks of any memory of a user's own."""

import copy
import pickle
import re
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import pytest
import torch
from torch import Tensor, nn
from torch._dynamo.testing import CompileCounterWithBackend

import mann_fast
from mann_fast import MANN, MemoryLayer
from mann_fast.data import Episodes, generate_glyphs
from mann_fast.layers import DNC, LRUA, NTM, Content, Memory, MemoryWeights
from mann_fast.training.plots import plot_episode
from mann_fast.training.trace import trace

PAGE = Path(__file__).parent.parent / "docs" / "adding-a-memory.md"
pytestmark = pytest.mark.skipif(not PAGE.exists(), reason="the tests run without the source tree's docs")
SIZES = {"num_slots": 7, "slot_size": 3, "num_heads": 2}


def blocks():
    return re.findall(r"```python\n(.*?)```", PAGE.read_text(), re.DOTALL)


@pytest.fixture(scope="module")
def page():
    """The page's first example alone: the memory."""
    namespace = {}
    exec(compile(blocks()[0], str(PAGE), "exec"), namespace)
    return namespace


def make_layer(page, **options):
    torch.manual_seed(0)
    return MemoryLayer(4, 5, addressing=page["Ring"](), **{**SIZES, "dtype": torch.float64, **options})


def test_the_page_runs(tmp_path, monkeypatch):
    """Trains, resets, shows, saves and exports; each example alone, but for the file that the first is saved as."""
    memory, *examples = blocks()
    assert len(examples) == 6 and memory.count("\n") < 80
    monkeypatch.chdir(tmp_path)
    (tmp_path / "ring.py").write_text(memory)
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.delitem(sys.modules, "ring", raising=False)
    found = {}
    for example in examples:
        namespace = {}
        exec(compile(example, str(PAGE), "exec"), namespace)
        found |= namespace
    monkeypatch.delitem(sys.modules, "ring")
    assert found["output"].shape == (7, 3, 28)
    losses = found["losses"]
    assert sum(losses[:20]) / 20 > 0.65 and sum(losses[-20:]) / 20 < 0.45  # ln 2 is a guess
    start = found["layer"].initial_state(1)
    assert torch.equal(found["state"].memory.memory[3], start.memory.memory[0])
    assert found["state"].memory.memory[2].abs().sum() > 0 and found["state"].reads[3].abs().sum() == 0
    assert found["weights"].read.shape == found["weights"].write.shape == (7, 16, 1, 8)
    assert (tmp_path / "ring.png").read_bytes()[:4] == b"\x89PNG"
    assert torch.equal(found["trace"].slots.written.argmax(1), torch.arange(8) % 8)
    inputs = found["inputs"]
    expected = found["model"](inputs)[0]
    assert torch.equal(found["again"](inputs)[0], expected)
    torch.testing.assert_close(found["exported"], expected)


def test_the_ring_is_attention_over_the_last_slots(page):
    """By the layer's own parameters, in a loop without mann_fast."""
    layer, x = make_layer(page), torch.randn(9, 2, 4, dtype=torch.float64)
    output, _, weights = layer(x, return_weights=True)
    slots, state, reads = [torch.zeros(2, 3).double()] * 7, None, torch.zeros(2, 6).double()
    for t, now in enumerate(x):
        state = layer.controller(torch.cat([now, reads], 1), state)
        key, vector = torch.tanh(layer.heads(state[0])).view(2, 2, 2, 3).unbind(1)
        for head in range(2):
            slots[(2 * t + head) % 7] = vector[:, head]
            assert (weights.write[t, :, head].argmax(1) == (2 * t + head) % 7).all()
        memory = torch.stack(slots, 1)
        dot, norms = key @ memory.mT, key.square().sum(2)[..., None] * memory.square().sum(2)[:, None]
        attention = torch.softmax(10 * dot / (norms + 1e-6).sqrt(), 2)
        reads = (attention @ memory).flatten(1)
        torch.testing.assert_close(output[t], torch.cat([state[0], reads], 1))
        torch.testing.assert_close(weights.read[t], attention)


@pytest.mark.parametrize("controller", ["lstm", "gru", "feedforward"])
@pytest.mark.parametrize("memory_start", ["constant", "learned"])
def test_it_is_a_layer_like_the_others(page, controller, memory_start):
    layer = make_layer(page, controller=controller, memory_start=memory_start)
    x = torch.randn(4, 2, 4, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(lambda x: layer(x)[0], x)
    whole, last = layer(x)
    first, state = layer(x[:1])
    second, state = layer(x[1:], state)
    torch.testing.assert_close(torch.cat([first, second]), whole)
    torch.testing.assert_close(state.memory, last.memory)
    whole.sum().backward()
    assert all(parameter.grad.abs().sum() > 0 for parameter in layer.parameters())
    if memory_start == "learned":
        assert layer.start.shape == (7, 3)
    alone, of_one = layer(x[:, 1])
    torch.testing.assert_close(alone, whole[:, 1])
    assert of_one.memory.place.shape == (2, 7)
    start = layer.initial_state(1)
    assert torch.equal(of_one.reset(torch.tensor(True), start).memory.place, start.memory.place[0])
    assert "addressing='Ring'" in repr(layer) and "sharpness=10" not in repr(layer)
    nothing, _, weights = layer(x[:0], return_weights=True)
    assert nothing.shape == (0, 2, 11) and weights.read.shape == weights.write.shape == (0, 2, 2, 7)
    assert weights.usage is None


def test_backends_compile_half_precision_and_autocast(page):
    layer, x = make_layer(page, dtype=torch.float32), torch.randn(3, 2, 4)
    expected, _ = layer(x)
    with mann_fast.backend("reference"):
        torch.testing.assert_close(layer(x)[0], expected)
    torch.compiler.reset()
    compiled = torch.compile(layer, fullgraph=True, backend="aot_eager")
    for given in (None, layer.initial_state(2)):
        torch.testing.assert_close(compiled(x, given)[0], expected)
    with torch.autocast("cpu", torch.bfloat16):
        output, state = layer(x)
    assert output.dtype == torch.bfloat16 and state.memory.memory.dtype == torch.float32
    assert (output.float() - expected).abs().max() < 0.1
    assert state.detach().to(torch.float64).memory.place.dtype == torch.float64


def test_options_are_those_of_the_memory(page):
    Ring = page["Ring"]
    layer = make_layer(page, sharpness=4.0)
    assert layer.memory == Ring(**SIZES, sharpness=4.0) == MemoryLayer(4, addressing=layer.memory).memory
    assert (layer.sharpness, layer.num_slots, layer.addressing) == (4.0, 7, "Ring")
    x = torch.randn(5, 2, 4, dtype=torch.float64)
    before = layer(x)[0]
    layer.sharpness = 40.0
    assert layer.memory.sharpness == 40.0 and not torch.equal(layer(x)[0], before)
    with pytest.raises(ValueError, match="num_heads must be at most num_slots = 7, got 8"):
        layer.num_heads = 8
    with pytest.raises(
        TypeError, match="usage_decay is no option here, got 0.95; addressing 'Ring' has num_s"
    ):
        make_layer(page, usage_decay=0.95)
    with pytest.raises(
        ValueError, match="addressing must be one of 'lrua', 'ntm', 'content', 'dnc', 'sparse', got <class"
    ):
        MemoryLayer(4, addressing=Ring)
    with pytest.raises(AttributeError, match="no attribute 'usage_decay'"):
        _ = layer.usage_decay


def test_a_subclass_of_a_memory_has_a_name_of_its_own():
    """Else its config would make the memory that it came from."""

    @dataclass(frozen=True)
    class Shared(LRUA):
        write_target: str = "shared"

    model = MANN(4, 3, 5, addressing=Shared(), **SIZES)
    assert model.config["addressing"] == "Shared" and model.config["write_target"] == "shared"
    with pytest.raises(ValueError, match="addressing must be one of .* got 'Shared'"):
        MANN(**model.config)
    again = MANN(**{**model.config, "addressing": Shared()})
    again.load_state_dict(model.state_dict())
    x = torch.randn(5, 2, 4)
    assert again.config == model.config and torch.equal(again(x)[0], model(x)[0])


@pytest.mark.parametrize("base", [LRUA, Content, NTM])
@pytest.mark.parametrize("mixed_in", [False, True])
def test_a_subclass_with_a_step_of_its_own_goes_by_it(base, mixed_in):
    def step(self, state, heads, record=False):
        reads, state, weights = base.step(self, state, heads, record)
        return torch.zeros_like(reads), state, weights

    blind = type("Blind", (), {"step": step})
    blind = type("Blind", (blind, base), {}) if mixed_in else type("Blind", (base,), {"step": step})
    layer = MemoryLayer(4, 5, addressing=blind(**SIZES))
    output, state = layer(torch.randn(3, 2, 4))
    assert (output[..., 5:] == 0).all() and (output[..., :5] != 0).all()
    with torch.no_grad():
        output, _ = layer(torch.randn(3, 2, 4), state)
    assert (output[..., 5:] == 0).all()


def test_a_subclass_with_nothing_of_its_own_keeps_the_one_call():
    assert all(type("Same", (kind,), {})(**SIZES).fused for kind in (NTM, DNC))


def test_a_reset_needs_a_start_or_a_state_that_knows_it(page):
    layer = make_layer(page)
    state = layer.initial_state(2)
    with pytest.raises(TypeError, match=r"start must be given, layer.initial_state\(1\): RingState has no"):
        state.reset(torch.tensor([True, False]))


class Counter(NamedTuple):
    slots: Tensor
    count: Tensor

    def initial_like(self):
        return Counter(self.slots.new_zeros(1, *self.slots.shape[-2:]), self.count.new_zeros(1))


@dataclass(frozen=True)
class Counting(Memory):
    """A state with integers, which knows its start; ``wrong`` is what its step gives amiss."""

    wrong: str = ""

    def __post_init__(self):
        super().__post_init__()
        object.__setattr__(self, "sizes", [self.num_heads * self.slot_size])

    def head_sizes(self):
        return self.sizes

    def initial_state(self, batch, *, dtype, device):
        slots = torch.zeros(batch, self.num_slots, self.slot_size, dtype=dtype, device=device)
        return Counter(slots, torch.zeros(batch, dtype=torch.int64, device=device))

    def split(self, values):
        return values.unflatten(1, (self.num_heads, self.slot_size))

    def step(self, state, heads, record=False):
        where = torch.zeros(*heads.shape[:2], self.num_slots, dtype=heads.dtype, device=heads.device)
        reads = heads + state.count[:, None, None]
        reads = {"shape": reads[:, 0], "dtype": reads.to(torch.float16)}.get(self.wrong, reads)
        state = Counter(state.slots, state.count + 1)
        weights = None if self.wrong == "weights" else MemoryWeights(where, where, None)
        return reads, tuple(state) if self.wrong == "state" else state, weights


def test_a_state_may_hold_integers_and_know_its_start():
    layer = MemoryLayer(4, 5, addressing=Counting(**SIZES))
    x = torch.randn(6, 2, 4)
    _, state = layer(x)
    assert state.memory.count.tolist() == [6, 6]
    assert state.reset(torch.tensor([False, True])).memory.count.tolist() == [6, 0]
    assert state.to(torch.bfloat16).memory.count.dtype == torch.int64
    assert layer(x, state)[1].memory.count.tolist() == [12, 12]
    floats = state._replace(memory=state.memory._replace(count=state.memory.count.float()))
    with pytest.raises(TypeError, match="state.memory.count must have dtype torch.int64, got torch.float32"):
        layer(x, floats)
    with pytest.raises(ValueError, match=r"state.memory.count must have shape \[2\], got \[2, 1\]"):
        layer(x, state._replace(memory=state.memory._replace(count=state.memory.count[:, None])))
    with pytest.raises(
        TypeError, match=r"state must be a MemoryState of \(hidden, cell\), an Counter and reads"
    ):
        layer(x, MemoryLayer(4, 5, **SIZES).initial_state(2))


def test_copies_keep_what_a_memory_made_of_its_options():
    layer = MemoryLayer(4, 5, addressing=Counting(**SIZES))
    x = torch.randn(3, 2, 4)
    for other in (copy.deepcopy(layer), pickle.loads(pickle.dumps(layer))):
        assert torch.equal(other(x)[0], layer(x)[0])


def test_what_is_no_state_or_no_name_of_an_option_is_refused():
    @dataclass(frozen=True)
    class Unnamed(Counting):
        def initial_state(self, batch, *, dtype, device):
            return tuple(super().initial_state(batch, dtype=dtype, device=device))

    @dataclass(frozen=True)
    class Clash(Counting):
        hidden_size: int = 3

    @dataclass(frozen=True)
    class Device(Counting):
        device: str = "disk"

    with pytest.raises(
        TypeError, match=r"Unnamed.initial_state must return a NamedTuple of tensors \[B, ...\]"
    ):
        MemoryLayer(4, 5, addressing=Unnamed())
    with pytest.raises(
        ValueError, match="hidden_size cannot be an option of Clash: every MemoryLayer has it"
    ):
        MemoryLayer(4, 5, addressing=Clash())
    with pytest.raises(ValueError, match="device cannot be an option of Device: every MemoryLayer has it"):
        MemoryLayer(4, 5, addressing=Device())


@pytest.mark.parametrize(
    ("wrong", "error", "message"),
    [
        (
            "shape",
            ValueError,
            r"reads \[B, R, D\] = \[2, 2, 3\] in torch.float32, got \[2, 3\] in torch.float32",
        ),
        ("dtype", ValueError, r"reads .* in torch.float32, got \[2, 2, 3\] in torch.float16"),
        ("state", TypeError, "a state of type Counter, got tuple"),
        ("weights", TypeError, "MemoryWeights where they are asked for"),
    ],
)
def test_a_step_that_gives_something_else_is_refused(wrong, error, message):
    layer = MemoryLayer(4, 5, addressing=Counting(**SIZES, wrong=wrong))
    with pytest.raises(error, match=f"Counting.step must give {message}"):
        layer(torch.randn(1, 2, 4), return_weights=True)


def test_a_memory_says_all_that_is_asked_of_it():
    @dataclass(frozen=True)
    class Silent(Memory):
        pass

    with pytest.raises(TypeError, match="head_sizes.*initial_state.*split.*step"):
        Silent()
    with pytest.raises(TypeError, match="num_slots must be an int, got float"):
        Counting(num_slots=2.0)


def test_an_episode_of_images_is_drawn_with_and_without_usage(page, tmp_path):
    glyphs = generate_glyphs(4, 3, image_size=8, seed=0)
    episodes = Episodes(glyphs, ways=2, shots=3, labels="onehot", seed=0)
    episode = episodes.sample(1)
    images = episode.inputs[:, 0, :64].unflatten(1, (1, 8, 8))
    for addressing, name in ((page["Ring"](), "ring.png"), ("lrua", "lrua.png"), ("dnc", "dnc.png")):
        model = MANN(episodes.input_size, episodes.num_outputs, 5, addressing=addressing, **SIZES)
        found = trace(model, episode, "onehot")
        assert found.slots.written.shape == found.slots.read.shape == (6, 7) and (
            found.slots.usage is None
        ) == (name == "ring.png")
        plot_episode(tmp_path / name, images, episode.instance[:, 0], found, "an episode")
        assert (tmp_path / name).stat().st_size > 0


def test_a_controller_of_one_s_own_with_a_memory_of_one_s_own(page):
    class Own(nn.Module):
        def __init__(self):
            super().__init__()
            self.layer = nn.Linear(4 + 6, 5).double()

        def forward(self, z, state):
            return torch.tanh(self.layer(z)), ()

    layer, plain = make_layer(page, controller=Own()), make_layer(page, controller="feedforward")
    plain.controller.load_state_dict(layer.controller.layer.state_dict())
    plain.heads.load_state_dict(layer.heads.state_dict())
    x = torch.randn(5, 2, 4, dtype=torch.float64)
    assert torch.equal(layer(x)[0], plain(x)[0])


def test_a_memory_that_scans_compiles_for_any_number_of_steps(page):
    class Scanned(page["Ring"]):
        scans = True

    torch.compiler.reset()
    layer = MemoryLayer(4, 5, addressing=Scanned(), **SIZES, dtype=torch.float64)
    counter = CompileCounterWithBackend("aot_eager")
    compiled = torch.compile(layer, fullgraph=True, backend=counter)
    for steps in (3, 4, 6, 2):
        x = torch.randn(steps, 2, 4, dtype=torch.float64)
        torch.testing.assert_close(compiled(x)[0], layer(x)[0], rtol=1e-10, atol=1e-10)
    assert counter.frame_count == 2
