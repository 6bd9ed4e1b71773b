"""The programs of examples/, tiny."""

import importlib
import json
import re
import sys
from pathlib import Path

import pytest
import torch

EXAMPLES = Path(__file__).parent.parent / "examples"
pytestmark = pytest.mark.skipif(
    not EXAMPLES.exists(), reason="the tests run without the source tree's examples"
)


@pytest.fixture
def example(monkeypatch):
    monkeypatch.syspath_prepend(EXAMPLES)
    return importlib.import_module


def test_time_series_of_a_csv(example, tmp_path, capsys):
    program = example("time_series")
    a, b = (series.values[:100].tolist() for series in program.made_up(2))
    lines = ["day,a,b", *(f"day {i},{a[i]},{b[i] if i < 60 else ''}" for i in range(100))]
    (tmp_path / "data.csv").write_text("\n".join(lines))
    picture = tmp_path / "series.png"
    program.main(
        [str(tmp_path / "data.csv"), "--out", str(picture), "--steps", "2", "--longest", "20", "--ahead", "5"]
    )
    assert picture.stat().st_size > 10_000
    table = capsys.readouterr().out.splitlines()
    assert [line.split()[0] for line in table[1:3]] == ["a", "b"]

    (tmp_path / "data.csv").write_text("\n".join([*lines[:30], "day,,1", *lines[30:]]))
    with pytest.raises(SystemExit):
        program.main([str(tmp_path / "data.csv")])
    assert "a must have a number in every line to its end, but line 31 is empty" in capsys.readouterr().err
    for text, message in (
        ("a\n" + "1\nnan\n" * 20, "a must have finite numbers, but one is nan or infinite"),
        ("", "must have a column of numbers, but has none"),
    ):
        (tmp_path / "data.csv").write_text(text)
        with pytest.raises(SystemExit):
            program.main([str(tmp_path / "data.csv")])
        assert message in capsys.readouterr().err
    with pytest.raises(SystemExit):
        program.main(["--share", "1.2"])
    assert "every series must have 8 values in its first part, and one after it" in capsys.readouterr().err


def test_time_series_finds_what_is_far_off(example):
    """With a model that knows the series, which a short training does not give."""
    program = example("time_series")

    class Sine(torch.nn.Module):
        def forward(self, values, state=None):
            t = torch.arange(len(values)).unsqueeze(1) + (0 if state is None else state)
            mean = torch.sin((t + 1) / 5.0)
            return mean, torch.full_like(mean, -3.0), t[-1] + 1

    values = torch.sin(torch.arange(80) / 5.0) + 0.02 * torch.randn(80)
    values[70] += 1
    found = program.predict(Sine(), values, 60, 60)
    assert found.anomalies.nonzero().tolist() == [[10]]
    assert (found.forecast - torch.sin(torch.arange(60, 80) / 5.0)).abs().max() < 1e-4


@pytest.mark.parametrize("model", ["lrua", "gru"])
@pytest.mark.filterwarnings("ignore::UserWarning", "ignore::DeprecationWarning")  # of POPGym and Gymnasium
def test_popgym_ppo(example, model, tmp_path, monkeypatch):
    pytest.importorskip("popgym", exc_type=ImportError)
    program = example("popgym_ppo")
    arguments = f"--model {model} --steps 240 --envs 2 --rollout 60 --size 8 --slots 4 --slot-size 4 --heads 1 --minibatches 2"
    monkeypatch.setattr(
        sys, "argv", ["popgym_ppo.py", *arguments.split(), "--out", str(tmp_path / "runs.jsonl")]
    )
    program.main()
    program.main()
    first, again = map(json.loads, (tmp_path / "runs.jsonl").read_text().splitlines())
    assert first["steps"] == 240 and first["options"]["model"] == model
    assert first["curve"] == again["curve"] and len(first["curve"]) == 2
    assert -1 <= first["mmer"] <= 1


def test_popgym_ppo_cores_begin_anew_alike(example):
    """The parts of episodes that an LSTM gets against its steps."""
    pytest.importorskip("popgym", exc_type=ImportError)
    core = example("popgym_ppo").make_core("lstm", 5, {}).double()
    x, resets = torch.randn(7, 3, 5, dtype=torch.float64), torch.rand(7, 3) < 0.3
    state = tuple(torch.randn(1, 3, 5, dtype=torch.float64) for _ in range(2))
    output, last = core(x, state, resets)
    for t in range(7):
        keep = (~resets[t]).double().view(1, 3, 1)
        step, state = core.rnn(x[t : t + 1], tuple(keep * part for part in state))
        assert (step[0] - output[t]).abs().max() < 1e-12
    assert all((part - want).abs().max() < 1e-12 for part, want in zip(last, state, strict=True))


@pytest.mark.once
@pytest.mark.filterwarnings("ignore")  # of Jupyter about itself
def test_the_notebook_runs_and_shows_what_it_did():
    nbformat, nbclient = (
        pytest.importorskip(name, reason="make draw installs it") for name in ("nbformat", "nbclient")
    )
    pytest.importorskip("ipykernel", reason="make draw installs it")
    kept = nbformat.read(EXAMPLES / "few_shot.ipynb", as_version=4)
    notebook = nbformat.from_dict(kept)
    executed = nbclient.NotebookClient(
        notebook, timeout=120, resources={"metadata": {"path": str(EXAMPLES.parent)}}
    ).execute()

    def printed(of):
        cells = [cell.outputs for cell in of.cells if cell.cell_type == "code"]
        assert all(outputs for outputs in cells)
        return "".join(o.text for outputs in cells for o in outputs if o.get("name") == "stdout")

    right = [int(re.search(r"(\d+)% right", printed(of))[1]) for of in (kept, executed)]
    assert min(right) >= 80 and abs(right[0] - right[1]) <= 10
