"""Programs written for nn.LSTM, small, with the edits of docs/migrating.md and no others.

Those of a package are skipped where it is not installed: it is in the extra "clients".
"""

import re
import sys
import warnings
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from cases import worst_error
from torch import nn
from torch.nn import functional as F
from torch.nn.utils.rnn import pack_padded_sequence, pad_sequence
from torch.utils.data import DataLoader, TensorDataset

from mann_fast import MemoryLayer, MemoryStack
from mann_fast.layers import LRUA

ROOT = Path(__file__).parent.parent
PAGE = ROOT / "docs" / "migrating.md"


@pytest.mark.skipif(not PAGE.exists(), reason="the tests run without the source tree's docs")
def test_the_edits_of_the_page_are_those_of_these_programs():
    """Between blank lines: what an edit makes is in this file, what it found there is not."""
    here = "".join(Path(__file__).read_text(encoding="utf-8").split())
    edits = re.findall(r"```diff\n(.*?)```", PAGE.read_text(encoding="utf-8"), re.DOTALL)
    assert len(edits) == 9
    for edit in "\n".join(edits).split("\n\n"):
        lines = edit.splitlines()
        made = "".join("".join(line[1:] for line in lines if line[0] != "-").split())
        gone = "".join("".join(line[1:] for line in lines if line[0] == "-").split())
        assert made in here, edit
        assert not gone or gone not in here, edit


# The language model of PyTorch's examples: layers with dropout, a state cut between chunks, tied weights.


class LanguageModel(nn.Module):
    def __init__(self, ntoken, ninp, nhid, nlayers, dropout=0.0, tie_weights=False):
        super().__init__()
        self.drop = nn.Dropout(dropout)
        self.encoder = nn.Embedding(ntoken, ninp)
        self.rnn = MemoryStack(ninp, nhid, nlayers, dropout=dropout, output_size=nhid)
        self.decoder = nn.Linear(nhid, ntoken)
        if tie_weights:
            self.decoder.weight = self.encoder.weight

    def forward(self, tokens, hidden):
        output, hidden = self.rnn(self.drop(self.encoder(tokens)), hidden)
        logits = self.decoder(self.drop(output))
        return F.log_softmax(logits.view(-1, logits.shape[-1]), dim=1), hidden

    def init_hidden(self, bsz):
        return self.rnn.initial_state(bsz)


def repackage_hidden(hidden):
    """Cut from their history the tensors of a state, whatever tuples they are in."""
    if isinstance(hidden, torch.Tensor):
        return hidden.detach()
    return tuple(repackage_hidden(part) for part in hidden)


def chunks(text, size):
    """Inputs [size, B] and targets, in order; the last may be shorter."""
    for i in range(0, len(text) - 1, size):
        length = min(size, len(text) - 1 - i)
        yield text[i : i + length], text[i + 1 : i + 1 + length].reshape(-1)


def evaluate(model, text, size):
    """Mean loss per token, the state carried from chunk to chunk."""
    model.eval()
    hidden, total = model.init_hidden(text.shape[1]), 0.0
    with torch.no_grad():
        for tokens, targets in chunks(text, size):
            output, hidden = model(tokens, hidden)
            hidden = repackage_hidden(hidden)
            total += len(tokens) * F.nll_loss(output, targets).item()
    return total / (len(text) - 1)


def test_language_model(tmp_path):
    period = torch.tensor([0, 1, 0, 2, 0, 0, 3, 1, 4])
    text = period.repeat(8)[:64].view(4, 16).t().contiguous()  # [T, B]
    model = LanguageModel(5, 16, 16, 2, dropout=0.1, tie_weights=True)
    assert evaluate(model, text, 7) > 1.2
    for _ in range(100):
        model.train()
        hidden = model.init_hidden(text.shape[1])
        for tokens, targets in chunks(text, 7):
            model.zero_grad()
            hidden = repackage_hidden(hidden)
            output, hidden = model(tokens, hidden)
            loss = F.nll_loss(output, targets)
            loss.backward()
            nn.utils.clip_grad_norm_(model.parameters(), 0.25)
            for parameter in model.parameters():
                parameter.data.add_(parameter.grad, alpha=-2.0)
    trained = evaluate(model, text, 7)
    assert trained < 0.3
    assert abs(evaluate(model.double(), text, 16) - trained) < 1e-4  # the whole in one chunk

    torch.save(model, tmp_path / "model.pt")
    allowed = [LanguageModel, nn.Dropout, nn.Embedding, nn.Linear]
    allowed += [MemoryStack, MemoryLayer, LRUA, nn.ModuleList, nn.LSTMCell]
    with torch.serialization.safe_globals(allowed):
        loaded = torch.load(tmp_path / "model.pt")
    loaded.rnn.flatten_parameters()
    assert evaluate(loaded, text, 7) == evaluate(model, text, 7)


# CleanRL's PPO with an LSTM: a call for every step, whose state is masked where an episode has ended; minibatches of whole
# environments, each from the state at the start of the rollout.


class Frames:
    """Environments whose frames are bright on the left or on the right. The right action is the side of the frame before; an
    episode lasts 4 frames, and its first action earns nothing."""

    def __init__(self, num_envs, seed=0):
        self.generator, self.num_envs = torch.Generator().manual_seed(seed), num_envs
        self.age = torch.arange(num_envs) % 4

    def _frame(self):
        self.side = torch.randint(2, (self.num_envs,), generator=self.generator)
        frames = torch.zeros(self.num_envs, 1, 8, 8)
        frames[..., :4] = 255 * (1 - self.side).view(-1, 1, 1, 1)
        frames[..., 4:] = 255 * self.side.view(-1, 1, 1, 1)
        return frames

    def reset(self):
        self.before = torch.zeros(self.num_envs, dtype=torch.long)
        return self._frame()

    def step(self, action):
        reward = ((action == self.before) & (self.age > 0)).float()
        self.before, self.age = self.side, (self.age + 1) % 4
        return self._frame(), reward, (self.age == 0).float()


class Agent(nn.Module):
    def __init__(self):
        super().__init__()
        self.network = nn.Sequential(
            nn.Conv2d(1, 4, 4, stride=4), nn.Flatten(), nn.Linear(16, 512), nn.ReLU()
        )
        self.lstm = MemoryLayer(512, 128, output_size=128)
        for name, param in self.lstm.controller.named_parameters():
            if "bias" in name:
                nn.init.constant_(param, 0)
            elif "weight" in name:
                nn.init.orthogonal_(param, 1.0)
        self.actor = nn.Linear(128, 2)
        self.critic = nn.Linear(128, 1)

    def get_states(self, x, lstm_state, done):
        hidden = self.network(x / 255.0)
        batch_size = lstm_state.reads.shape[0]
        hidden = hidden.reshape((-1, batch_size, self.lstm.input_size))
        done = done.reshape((-1, batch_size))
        new_hidden = []
        for h, d in zip(hidden, done, strict=True):
            h, lstm_state = self.lstm(h.unsqueeze(0), lstm_state.reset(d.bool()))
            new_hidden += [h]
        return torch.flatten(torch.cat(new_hidden), 0, 1), lstm_state

    def get_action_and_value(self, x, lstm_state, done, action=None):
        hidden, lstm_state = self.get_states(x, lstm_state, done)
        chances = torch.distributions.Categorical(logits=self.actor(hidden))
        action = chances.sample() if action is None else action
        return action, chances.log_prob(action), chances.entropy(), self.critic(hidden)[:, 0], lstm_state


def advantages(rewards, values, dones, next_value, next_done, gamma=0.5, decay=0.9):
    """Generalised advantage estimates [T, B]; dones[t] says that frame t is the first of an episode."""
    result, last = torch.zeros_like(rewards), 0.0
    for t in reversed(range(len(rewards))):
        alive = 1.0 - (next_done if t == len(rewards) - 1 else dones[t + 1])
        after = next_value if t == len(rewards) - 1 else values[t + 1]
        last = rewards[t] + gamma * alive * after - values[t] + gamma * decay * alive * last
        result[t] = last
    return result


def test_ppo():
    args = SimpleNamespace(num_envs=8, num_steps=10, num_minibatches=2, update_epochs=3, updates=12)
    agent, envs, shuffler = Agent(), Frames(8), np.random.default_rng(0)
    optimizer = torch.optim.Adam(agent.parameters(), lr=1e-3)
    next_obs, next_done = envs.reset(), torch.zeros(args.num_envs)
    next_lstm_state = agent.lstm.initial_state(args.num_envs)
    earned = []
    for _ in range(args.updates):
        initial_lstm_state = next_lstm_state.clone()
        rollout = []
        for _ in range(args.num_steps):
            obs, done = next_obs, next_done
            with torch.no_grad():
                action, logprob, _, value, next_lstm_state = agent.get_action_and_value(
                    obs, next_lstm_state, done
                )
            next_obs, reward, next_done = envs.step(action)
            rollout.append((obs, done, action, logprob, value, reward))
        obs, dones, actions, logprobs, values, rewards = map(torch.stack, zip(*rollout, strict=True))
        earned.append(rewards.mean().item() / 0.75)  # one action of four earns nothing
        with torch.no_grad():
            next_value = agent.get_action_and_value(next_obs, next_lstm_state, next_done)[3]
        gains = advantages(rewards, values, dones, next_value, next_done)
        returns = (gains + values).view(-1)
        b_obs, b_dones, b_actions = obs.flatten(0, 1), dones.view(-1), actions.view(-1)
        b_logprobs, b_gains = logprobs.view(-1), gains.view(-1)
        flatinds = np.arange(args.num_steps * args.num_envs).reshape(args.num_steps, args.num_envs)
        envinds = np.arange(args.num_envs)
        for epoch in range(args.update_epochs):
            shuffler.shuffle(envinds)
            for number, mbenvinds in enumerate(np.split(envinds, args.num_minibatches)):
                mb_inds = torch.from_numpy(flatinds[:, mbenvinds].ravel())
                _, newlogprob, entropy, newvalue, _ = agent.get_action_and_value(
                    b_obs[mb_inds],
                    initial_lstm_state.select(mbenvinds.tolist()),
                    b_dones[mb_inds],
                    b_actions[mb_inds],
                )
                ratio = (newlogprob - b_logprobs[mb_inds]).exp()
                if epoch == number == 0:  # nothing is learned since: the rollout again
                    assert (ratio - 1).abs().max() < 1e-4
                gain = b_gains[mb_inds]
                gain = (gain - gain.mean()) / (gain.std() + 1e-8)
                of_policy = torch.max(-gain * ratio, -gain * ratio.clamp(0.8, 1.2)).mean()
                of_value = (newvalue - returns[mb_inds]).square().mean()
                optimizer.zero_grad()
                (of_policy + 0.5 * of_value - 0.01 * entropy.mean()).backward()
                nn.utils.clip_grad_norm_(agent.parameters(), 0.5)
                optimizer.step()
    assert earned[0] < 0.7 and sum(earned[-3:]) / 3 > 0.85


def test_an_episode_of_the_agent_starts_anew():
    """A rollout over the end of an episode equals the episodes one after the other."""
    agent = Agent().double()
    frames = 255 * torch.rand(5, 3, 1, 8, 8, dtype=torch.float64)
    dones = torch.zeros(5, 3)
    dones[2, 0] = dones[4, 1] = 1
    start = agent.lstm.initial_state(3)
    together = agent.get_states(frames.flatten(0, 1), start, dones.view(-1))[0].view(5, 3, 128)
    for env, ends in enumerate(([2], [4], [])):
        first, *rest = torch.tensor_split(frames[:, env], ends)
        episodes = [agent.lstm(agent.network(frames / 255).unsqueeze(1))[0] for frames in (first, *rest)]
        assert worst_error(together[:, env], torch.cat(episodes)[:, 0]) < 1e-9


# An image captioner that packs its captions.


class Captioner(nn.Module):
    def __init__(self, vocab_size, embed_size, hidden_size, num_layers):
        super().__init__()
        self.image = nn.Sequential(
            nn.Conv2d(1, 3, 4, stride=2), nn.ReLU(), nn.Flatten(), nn.LazyLinear(embed_size)
        )
        self.embed = nn.Embedding(vocab_size, embed_size)
        self.lstm = MemoryStack(
            embed_size, hidden_size, num_layers, batch_first=True, output_size=hidden_size
        )
        self.linear = nn.Linear(hidden_size, vocab_size)

    def forward(self, images, captions, lengths):
        embeddings = torch.cat((self.image(images).unsqueeze(1), self.embed(captions)), 1)
        packed = pack_padded_sequence(embeddings, lengths, batch_first=True)
        hiddens, _ = self.lstm(packed)
        outputs = self.linear(hiddens[0])
        return outputs

    def sample(self, images, steps):
        """The likeliest next word of each image, ``steps`` times."""
        words, inputs, states = [], self.image(images).unsqueeze(1), None
        for _ in range(steps):
            hiddens, states = self.lstm(inputs, states)
            words.append(self.linear(hiddens.squeeze(1)).argmax(1))
            inputs = self.embed(words[-1]).unsqueeze(1)
        return torch.stack(words, 1)


def test_captioner():
    images = torch.randn(4, 1, 8, 8)
    sentences = [[2, 3, 4, 2, 5, 1], [3, 3, 2, 1], [4, 2, 1], [5, 1]]  # 1 is the end
    lengths = [len(words) for words in sentences]
    captions = pad_sequence([torch.tensor(words) for words in sentences], batch_first=True)
    targets = pack_padded_sequence(captions, lengths, batch_first=True)[0]
    model = Captioner(6, 16, 16, 2)
    model(images, captions, lengths)  # LazyLinear learns its size

    model.double()
    outputs = model(images.double(), captions, lengths)
    alone = [
        model(images[i : i + 1].double(), captions[i : i + 1, :length], [length])
        for i, length in enumerate(lengths)
    ]
    alone = pack_padded_sequence(pad_sequence(alone, batch_first=True), lengths, batch_first=True)[0]
    assert worst_error(outputs, alone) < 1e-9  # as if each caption were a batch of its own
    gradients = [
        torch.autograd.grad(F.cross_entropy(scores, targets), list(model.parameters()))
        for scores in (outputs, alone)
    ]
    for a, b in zip(*gradients, strict=True):
        assert (a - b).abs().max() <= 1e-8 * b.abs().max()

    model.float()
    optimizer = torch.optim.Adam(model.parameters(), lr=2e-2)
    for _ in range(100):
        loss = F.cross_entropy(model(images, captions, lengths), targets)
        model.zero_grad()
        loss.backward()
        optimizer.step()
    assert loss < 0.1
    for words, expected in zip(model.sample(images, max(lengths)).tolist(), sentences, strict=True):
        assert words[: len(expected)] == expected


# Packages.


@pytest.fixture
def package(monkeypatch):
    """Imports one, or skips. Without the root of the repository in sys.path, whose folder kernels would be taken for a package
    of Hugging Face's; and with whatever it warns of."""
    monkeypatch.setattr(sys, "path", [path for path in sys.path if Path(path or ".").resolve() != ROOT])
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        yield lambda name: pytest.importorskip(name)


SEQUENCES = torch.eye(4)[torch.tensor([[0, 1, 2, 3, 0], [3, 3, 1, 0, 2], [1, 0, 0, 2, 3], [2, 1, 3, 3, 1]])]
BEFORE = SEQUENCES.argmax(2).roll(1, 1)  # of each step what was before it; of the first, the last
LABELS = BEFORE[:, -1]


def test_lightning(package, tmp_path):
    lightning = package("lightning")

    class Tagger(lightning.LightningModule):
        def __init__(self, input_size, hidden_size):
            super().__init__()
            self.save_hyperparameters()
            self.rnn = MemoryLayer(input_size, hidden_size, batch_first=True, output_size=hidden_size)
            self.out = nn.Linear(hidden_size, 4)

        def forward(self, x):
            return self.out(self.rnn(x)[0])

        def training_step(self, batch, number):
            loss = F.cross_entropy(self(batch[0]).flatten(0, 1), batch[1].flatten())
            self.log("loss", loss)
            return loss

        def validation_step(self, batch, number):
            self.log("accuracy", (self(batch[0]).argmax(2) == batch[1]).float().mean())

        def configure_optimizers(self):
            return torch.optim.Adam(self.parameters(), lr=1e-2)

    data = DataLoader(TensorDataset(SEQUENCES, BEFORE), batch_size=2, shuffle=True)
    options = {"accelerator": "cpu", "logger": False, "enable_progress_bar": False}
    trainer = lightning.Trainer(
        max_epochs=40,
        default_root_dir=tmp_path,
        num_sanity_val_steps=1,
        check_val_every_n_epoch=10,
        **options,
    )
    model = Tagger(4, 24)
    model.example_input_array = SEQUENCES  # the summary hooks every module to tell its sizes
    trainer.fit(model, data, DataLoader(TensorDataset(SEQUENCES, BEFORE), batch_size=4))
    assert trainer.callback_metrics["loss"] < 0.3
    assert trainer.callback_metrics["accuracy"] > 0.9
    loaded = Tagger.load_from_checkpoint(trainer.checkpoint_callback.best_model_path)
    assert torch.equal(loaded(SEQUENCES), model(SEQUENCES))
    for precision, dtype in (
        ("bf16-mixed", torch.float32),
        ("64-true", torch.float64),
        ("bf16-true", torch.bfloat16),
    ):
        trainer = lightning.Trainer(
            max_steps=1,
            precision=precision,
            enable_checkpointing=False,
            enable_model_summary=False,
            **options,
        )
        trainer.fit(loaded, data)
        assert loaded.rnn.heads.weight.dtype == dtype


def train(model, x, targets, steps=30):
    """Loss before the last of some steps with what asks for a gradient."""
    optimizer = torch.optim.Adam([p for p in model.parameters() if p.requires_grad], lr=1e-2)
    for _ in range(steps):
        loss = F.cross_entropy(model(x).flatten(0, 1), targets.flatten())
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    return loss.item()


class Tagger(nn.Module):
    def __init__(self, hidden_size):
        super().__init__()
        self.rnn = MemoryLayer(4, hidden_size, batch_first=True, output_size=hidden_size)
        self.out = nn.Linear(hidden_size, 4)

    def forward(self, x):
        return self.out(self.rnn(x)[0])


def test_peft(package, tmp_path):
    peft = package("peft")
    x = SEQUENCES.double()
    model = Tagger(24).double()
    before, kept = model(x), {name: p.clone() for name, p in model.named_parameters()}
    config = peft.LoraConfig(
        r=2,
        target_modules=["heads", "projection"],
    )
    adapted = peft.get_peft_model(model, config)
    assert worst_error(adapted(x), before) < 1e-11  # what is added starts at 0
    learning = {name.split(".lora")[0] for name, p in adapted.named_parameters() if p.requires_grad}
    assert learning == {f"base_model.model.rnn.{name}" for name in ("heads", "projection")}
    first = F.cross_entropy(before.flatten(0, 1), BEFORE.flatten())
    assert train(adapted, x, BEFORE) < first - 0.1
    after = adapted(x)

    adapted.save_pretrained(tmp_path)
    base = Tagger(24).double()
    base.load_state_dict(kept)
    assert worst_error(peft.PeftModel.from_pretrained(base, tmp_path)(x), after) < 1e-11

    merged = adapted.merge_and_unload()
    with warnings.catch_warnings():
        warnings.simplefilter("error")  # one call again
        assert worst_error(merged(x), after) < 1e-11
    assert torch.equal(merged.rnn.controller.weight_ih, kept["rnn.controller.weight_ih"])
    assert not torch.equal(merged.rnn.heads.weight, kept["rnn.heads.weight"])


def test_hub_mixin(package, tmp_path):
    hub = package("huggingface_hub")
    coders = {torch.dtype: (lambda dtype: str(dtype).split(".")[1], lambda name: getattr(torch, name))}

    class Layer(MemoryLayer, hub.PyTorchModelHubMixin, coders=coders):
        pass

    class Model(nn.Module, hub.PyTorchModelHubMixin, coders=coders):
        def __init__(self, hidden_size: int, dtype: torch.dtype | None = None):
            super().__init__()
            self.rnn = MemoryStack(4, hidden_size, 2, dtype=dtype)

        def forward(self, x):
            return self.rnn(x)

    x = torch.randn(5, 3, 4)
    for dtype in (None, torch.bfloat16, torch.float64):
        for number, model in enumerate(
            (Layer(4, 6, addressing="ntm", num_slots=9, memory_start="learned", dtype=dtype), Model(6, dtype))
        ):
            model.save_pretrained(tmp_path / f"{number}-{dtype}")
            loaded = type(model).from_pretrained(tmp_path / f"{number}-{dtype}", strict=True)
            assert repr(loaded) == repr(model)
            assert {p.dtype for p in loaded.parameters()} == {dtype or torch.float32}
            output, _ = loaded(x.to(dtype))
            assert output.dtype == (dtype or torch.float32) and torch.equal(output, model(x.to(dtype))[0])
    Model(6).bfloat16().save_pretrained(tmp_path)  # no argument says so
    loaded = Model.from_pretrained(tmp_path, dtype=torch.bfloat16)
    assert {p.dtype for p in loaded.parameters()} == {torch.bfloat16}


@pytest.mark.parametrize("kind", ["dict", "tuple"])
def test_trainer(package, tmp_path, kind):
    transformers = package("transformers")
    package("accelerate")

    class Classifier(nn.Module):
        def __init__(self, hidden_size):
            super().__init__()
            self.rnn = MemoryLayer(4, hidden_size, batch_first=True, output_size=hidden_size)
            self.out = nn.Linear(hidden_size, 4)

        def forward(self, x, labels=None):
            output, state = self.rnn(x)
            logits = self.out(output[:, -1])
            loss = None if labels is None else F.cross_entropy(logits, labels)
            if kind == "tuple":
                return (loss, logits)
            return {"loss": loss, "logits": logits}

    data = [{"x": x, "labels": label} for x, label in zip(SEQUENCES, LABELS, strict=True)]
    arguments = transformers.TrainingArguments(
        str(tmp_path),
        use_cpu=True,
        report_to="none",
        disable_tqdm=True,
        num_train_epochs=40,
        learning_rate=1e-2,
        per_device_train_batch_size=2,
        save_strategy="no",
    )
    trainer = transformers.Trainer(
        Classifier(24),
        arguments,
        train_dataset=data,
        eval_dataset=data,
        compute_metrics=lambda p: {"accuracy": (p.predictions.argmax(1) == p.label_ids).mean()},
    )
    trainer.train()
    measured = trainer.evaluate()
    assert measured["eval_loss"] < 0.3 and measured["eval_accuracy"] == 1
    trainer.save_model(str(tmp_path))
    assert (tmp_path / "model.safetensors").exists()


def test_accelerate(package):
    accelerate = package("accelerate")
    forget = accelerate.state.AcceleratorState._reset_state  # what is of the whole process
    forget(reset_partial_state=True)
    model = Tagger(24)
    expected = model(SEQUENCES)
    prepared = accelerate.Accelerator(cpu=True, mixed_precision="bf16").prepare(model)
    state = prepared.rnn(SEQUENCES)[1]
    assert 0 < (prepared(SEQUENCES) - expected).abs().max() < 0.1
    sent = accelerate.utils.send_to_device({"state": state}, "cpu")["state"]
    assert type(sent) is type(state) and prepared.rnn(SEQUENCES, sent)[0].shape == (4, 5, 24)
    forget(reset_partial_state=True)
    model = Tagger(24)
    expected = model(SEQUENCES)
    with torch.no_grad():
        offloaded = accelerate.cpu_offload(model, preload_module_classes=["MemoryLayer"])
        assert offloaded.rnn.heads.weight.is_meta and torch.equal(offloaded(SEQUENCES), expected)
