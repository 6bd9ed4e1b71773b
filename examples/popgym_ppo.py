"""PPO on tasks of POPGym with a memory, an LSTM or a GRU: one file, in the manner of CleanRL.

    python examples/popgym_ppo.py --task RepeatPreviousEasy --model lrua --seed 0 --steps 1000000 --out runs.jsonl

Needs ``pip install gymnasium popgym``. Episodes that begin in the middle of a rollout are ``resets`` of the one call in which
a whole minibatch is learned from. Each run adds one line of JSON to ``--out``: its options, its speed, the mean return of the
episodes that ended in each iteration, and POPGym's measure, the largest of these means ("mmer").
"""

from __future__ import annotations

import argparse
import json
import time
from pathlib import Path

import gymnasium
import numpy as np
import popgym.envs
import torch
from gymnasium.vector import AutoresetMode, SyncVectorEnv
from gymnasium.wrappers import FlattenObservation
from popgym.wrappers import Antialias, PreviousAction
from torch import Tensor, nn
from torch.distributions import Categorical
from torch.nn.utils.rnn import pack_sequence, unpack_sequence

from mann_fast import MemoryLayer, MemoryState

MODELS = ("lrua", "ntm", "lstm", "gru")


class Recurrent(nn.Module):
    """nn.LSTM or nn.GRU over the parts of episodes, each part a sequence of one packed batch, as nn.LSTM has no resets."""

    def __init__(self, kind: type[nn.LSTM] | type[nn.GRU], size: int):
        super().__init__()
        self.rnn = kind(size, size)

    def initial_state(self, batch: int) -> tuple[Tensor, ...]:
        zeros = torch.zeros(1, batch, self.rnn.hidden_size)
        return (zeros, zeros) if isinstance(self.rnn, nn.LSTM) else (zeros,)

    def forward(
        self, x: Tensor, state: tuple[Tensor, ...], resets: Tensor
    ) -> tuple[Tensor, tuple[Tensor, ...]]:
        length, batch = resets.shape
        goes_on = ~resets.t()  # [B, T], as all that follows
        starts = ~goes_on
        starts[:, 0] = True
        sample, step = starts.nonzero(as_tuple=True)
        first = sample * length + step
        lengths = first.diff(append=torch.tensor([batch * length])).tolist()
        parts = x.transpose(0, 1).flatten(0, 1).split(lengths)
        # Where a part begins with no reset, the state that came in.
        kept = goes_on[sample, step].view(1, -1, 1)
        state = tuple(torch.where(kept, of[:, sample], 0.0) for of in state)
        packed, after = self.rnn(
            pack_sequence(parts, enforce_sorted=False), state if len(state) == 2 else state[0]
        )
        output = torch.cat(unpack_sequence(packed)).unflatten(0, (batch, length)).transpose(0, 1)
        last = starts.sum(1).cumsum(0) - 1  # of each sample, its last part
        return output, tuple(of[:, last] for of in (after if isinstance(after, tuple) else (after,)))


def make_core(model: str, size: int, memory: dict[str, int]) -> nn.Module:
    """``output, state = core(x, state, resets=resets)``, x and output [T, B, size], resets [T, B]."""
    if model in ("lstm", "gru"):
        return Recurrent(nn.LSTM if model == "lstm" else nn.GRU, size)
    return MemoryLayer(size, size, addressing=model, output_size=size, **memory)


def select(state: MemoryState | tuple[Tensor, ...], samples: Tensor) -> MemoryState | tuple[Tensor, ...]:
    if isinstance(state, MemoryState):
        return state.select(samples)
    return tuple(part[:, samples] for part in state)


class Agent(nn.Module):
    def __init__(self, observations: int, actions: int, core: nn.Module, size: int):
        super().__init__()
        self.encoder = nn.Sequential(nn.Linear(observations, size), nn.Tanh())
        self.core = core
        self.actor, self.critic = nn.Linear(size, actions), nn.Linear(size, 1)
        nn.init.orthogonal_(self.actor.weight, 0.01)
        nn.init.zeros_(self.actor.bias)

    def forward(self, x, state, resets):
        """Of observations [T, B, F]: the distribution of actions, values [T, B], and the state after them."""
        output, state = self.core(self.encoder(x), state, resets=resets)
        return Categorical(logits=self.actor(output)), self.critic(output).squeeze(-1), state


def make_environments(task: str, count: int) -> SyncVectorEnv:
    def make() -> gymnasium.Env:
        return FlattenObservation(Antialias(PreviousAction(getattr(popgym.envs, task)())))

    return SyncVectorEnv([make] * count, autoreset_mode=AutoresetMode.SAME_STEP)


def run(args: argparse.Namespace) -> dict:
    """Train, and say how it went."""
    torch.manual_seed(args.seed)
    np.random.seed(args.seed)
    environments = make_environments(args.task, args.envs)
    environments.action_space.seed(args.seed)
    width, actions = environments.single_observation_space.shape[0], int(environments.single_action_space.n)
    memory = {"num_slots": args.slots, "slot_size": args.slot_size, "num_heads": args.heads}
    agent = Agent(width, actions, make_core(args.model, args.size, memory), args.size)
    optimizer = torch.optim.Adam(agent.parameters(), args.lr, eps=1e-5)

    def observe(observations: np.ndarray) -> Tensor:
        return torch.as_tensor(observations, dtype=torch.float32).unsqueeze(0)

    now = observe(environments.reset(seed=args.seed)[0])
    begins = torch.ones(1, args.envs, dtype=torch.bool)
    state = agent.core.initial_state(args.envs)
    earned, curve, began = np.zeros(args.envs), [], time.perf_counter()
    iterations = max(1, args.steps // (args.rollout * args.envs))
    for iteration in range(iterations):
        optimizer.param_groups[0]["lr"] = args.lr * (1 - iteration / iterations)
        first, steps, returns = select(state, torch.arange(args.envs)), [], []
        with torch.no_grad():
            for _ in range(args.rollout):
                policy, value, state = agent(now, state, begins)
                action = policy.sample()
                after, reward, terminated, truncated, _ = environments.step(action[0].numpy())
                ended = terminated | truncated
                earned += reward
                returns.extend(earned[ended])
                earned[ended] = 0
                reward, done = torch.as_tensor(reward, dtype=torch.float32), torch.as_tensor(ended)
                steps.append(
                    (now[0], begins[0], action[0], policy.log_prob(action)[0], value[0], reward, done)
                )
                now, begins = observe(after), done.unsqueeze(0)
            x, resets, action, old, values, rewards, dones = map(torch.stack, zip(*steps, strict=True))
            upcoming, advantage = agent(now, state, begins)[1][0], torch.zeros(args.envs)
            advantages = torch.empty_like(values)
            for t in reversed(range(args.rollout)):
                goes_on = (~dones[t]).float()
                error = rewards[t] + args.gamma * goes_on * upcoming - values[t]
                advantage = error + args.gamma * args.gae_lambda * goes_on * advantage
                advantages[t], upcoming = advantage, values[t]
            targets = advantages + values
        for _ in range(args.epochs):
            for some in torch.randperm(args.envs).chunk(args.minibatches):
                policy, value, _ = agent(x[:, some], select(first, some), resets[:, some])
                gain = advantages[:, some]
                gain = (gain - gain.mean()) / (gain.std() + 1e-8)
                ratio = (policy.log_prob(action[:, some]) - old[:, some]).exp()
                clipped = ratio.clamp(1 - args.clip, 1 + args.clip)
                loss = -torch.minimum(ratio * gain, clipped * gain).mean()
                loss = loss + args.value_weight * (value - targets[:, some]).square().mean()
                loss = loss - args.entropy_weight * policy.entropy().mean()
                optimizer.zero_grad()
                loss.backward()
                nn.utils.clip_grad_norm_(agent.parameters(), args.max_norm)
                optimizer.step()
        if returns:
            curve.append(((iteration + 1) * args.rollout * args.envs, round(float(np.mean(returns)), 4)))
            if args.verbose:
                print(*curve[-1], flush=True)
    seconds = time.perf_counter() - began
    environments.close()
    taken = iterations * args.rollout * args.envs
    means = [mean for _, mean in curve]
    return {
        "options": {name: value for name, value in vars(args).items() if name not in ("out", "verbose")},
        "parameters": sum(parameter.numel() for parameter in agent.parameters()),
        "steps": taken,
        "seconds": round(seconds, 1),
        "steps_per_second": round(taken / seconds),
        "mmer": max(means, default=None),
        "last": round(float(np.mean(means[-10:])), 4) if means else None,
        "curve": curve,
    }


def parse(arguments: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--task", default="RepeatPreviousEasy", help="a class of popgym.envs")
    parser.add_argument("--model", choices=MODELS, default="lrua")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--steps", type=int, default=1_000_000, help="of all environments together")
    parser.add_argument("--out", type=Path, help="a file to add the line to; standard output without")
    parser.add_argument(
        "--verbose", action="store_true", help="print steps and mean return of every iteration"
    )
    parser.add_argument("--threads", type=int, default=1)
    for name, value, what in (
        ("envs", 64, "environments side by side"),
        ("rollout", 128, "steps of each before it is learned from"),
        ("epochs", 4, "over each rollout"),
        ("minibatches", 8, "of whole environments"),
        ("size", 128, "of the encoder, the hidden state and the output"),
        ("slots", 32, "of the memory"),
        ("slot-size", 32, "of the memory"),
        ("heads", 2, "of the memory"),
        ("lr", 2e-3, "which falls to 0 over the run"),
        ("gamma", 0.99, "discount"),
        ("gae-lambda", 0.95, "of the advantages"),
        ("clip", 0.2, "of the ratio of probabilities"),
        ("entropy-weight", 0.01, "in the loss"),
        ("value-weight", 0.5, "in the loss"),
        ("max-norm", 0.5, "of the gradient"),
    ):
        parser.add_argument(f"--{name}", type=type(value), default=value, help=f"{what} ({value})")
    args = parser.parse_args(arguments)
    if not isinstance(getattr(popgym.envs, args.task, None), type):
        parser.error(f"--task must be a class of popgym.envs, such as RepeatPreviousEasy, got {args.task}")
    if not 1 <= args.minibatches <= args.envs:
        parser.error(f"--minibatches must be within [1, envs] = [1, {args.envs}], got {args.minibatches}")
    return args


def main() -> None:
    args = parse()
    torch.set_num_threads(args.threads)
    line = json.dumps(run(args))
    if args.out is None:
        print(line)
    else:
        with args.out.open("a", encoding="utf-8") as file:
            file.write(line + "\n")


if __name__ == "__main__":
    main()
