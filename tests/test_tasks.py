"""Sequence tasks: what their sequences hold, training on them, and their commands."""

import json
from dataclasses import replace

import pytest
import torch
from torch import Generator

from mann_fast import cli
from mann_fast.data.sequences import TASKS, AssociativeRecall, Copy, KeyValue, Pairs, Regression, RepeatCopy
from mann_fast.training import SequenceConfig, SequenceTrainer, load_checkpoint, restore_model
from mann_fast.training.checkpoint import build_model, save_checkpoint
from mann_fast.training.loop import resume_run, start_run, train
from mann_fast.training.sequence_plots import plot_sequence_curve
from mann_fast.training.sequences import errors, measure, sequence_loss, task_of, trace_sequence

TINY = {
    "hidden_size": 7,
    "slots": 9,
    "slot_size": 5,
    "steps": 6,
    "batch": 3,
    "log_every": 2,
    "checkpoint_every": 3,
}
OPTIONS = ["--hidden-size", "7", "--slots", "9", "--slot-size", "5", "--steps", "4", "--batch", "2"]
OPTIONS += ["--eval-episodes", "3", "--length", "3"]


def random():
    return Generator().manual_seed(3)


def test_copy_shows_the_vectors_and_asks_for_them_in_the_same_order():
    inputs, targets, answered, ideal = Copy(20).sample(4, random(), 3)
    assert inputs.shape == (8, 4, 10) and targets.shape == (8, 4, 8) and ideal is None
    assert answered.tolist() == [False] * 5 + [True] * 3
    assert torch.equal(targets[answered], inputs[1:4, :, :8]) and set(targets.unique().tolist()) == {0, 1}
    marks = inputs[:, :, 8:]
    assert marks.sum() == 8 and (marks[0, :, 0] == 1).all() and (marks[4, :, 1] == 1).all()
    assert inputs[5:].abs().sum() == 0
    assert not torch.equal(inputs[:, 0], inputs[:, 1])


def test_repeat_copy_asks_as_often_as_it_says_and_for_an_end():
    inputs, targets, answered, _ = RepeatCopy(10).sample(4, random(), 2, 3)
    assert inputs.shape == (2 + 2 + 7, 4, 10) and answered.sum() == 7
    answer = targets[answered]
    for repeat in range(3):
        assert torch.equal(answer[2 * repeat : 2 * repeat + 2, :, :8], inputs[1:3, :, :8])
    assert answer[:-1, :, 8].sum() == 0 and (answer[-1, :, 8] == 1).all() and answer[-1, :, :8].sum() == 0
    assert torch.allclose(inputs[3, :, 9], torch.tensor(0.3))


def test_recall_asks_for_the_item_after_the_one_that_is_shown_again():
    inputs, targets, answered, _ = AssociativeRecall(6).sample(20, random(), 4)
    items = inputs[: 4 * 4].view(4, 4, 20, 8)
    assert (items[:, 0, :, 6] == 1).all() and items[:, 1:, :, 6:].sum() == 0
    query = inputs[17:20, :, :6]
    assert (inputs[[16, 20], :, 7] == 1).all() and inputs[21:].abs().sum() == 0 and answered.sum() == 3
    asked = set()
    for b in range(20):
        (at,) = [i for i in range(3) if torch.equal(items[i, 1:, b, :6], query[:, b])]
        assert torch.equal(targets[answered][:, b], items[at + 1, 1:, b, :6])
        asked.add(at)
    assert asked == {0, 1, 2}


def test_key_value_asks_for_each_pair_of_the_round_by_one_half_and_wants_the_other():
    inputs, targets, answered, _ = KeyValue(4).sample(30, random(), 3, 2)
    assert inputs.shape == (12, 30, 10) and targets.shape == (12, 30, 4)
    assert answered.tolist() == ([False] * 3 + [True] * 3) * 2
    orders, sides, reused = set(), set(), False
    for b in range(30):
        partners: dict[tuple, set] = {}
        for start in (0, 6):
            shown = inputs[start : start + 3, b]
            assert shown[:, 8:].sum() == 0
            halves = [[tuple(row[at : at + 4].tolist()) for row in shown] for at in (0, 4)]
            assert len(set(halves[0])) == len(set(halves[1])) == 3
            asked = []
            for t in range(start + 3, start + 6):
                (side,) = inputs[t, b, 8:].nonzero()[:, 0].tolist()
                given, hidden = inputs[t, b, :8].view(2, 4)[[side, 1 - side]]
                at = halves[side].index(tuple(given.tolist()))
                assert hidden.sum() == 0 and tuple(targets[t, b].tolist()) == halves[1 - side][at]
                asked.append(at)
                sides.add(side)
            assert sorted(asked) == [0, 1, 2]
            orders.add(tuple(asked))
            for first, second in zip(*halves, strict=True):
                partners.setdefault(first, set()).add(second)
        reused |= any(len(found) > 1 for found in partners.values())
    assert sides == {0, 1} and len(orders) == 6 and reused
    with pytest.raises(ValueError, match="length must be at most 16, got 17"):
        KeyValue(4).sample(1, random(), 17, 1)


def test_pairs_asks_for_some_by_the_first_bits_and_wants_the_others():
    inputs, targets, answered, _ = Pairs(40).sample(5, random(), 20)
    assert inputs.shape == (20 + 16, 5, 41) and targets.shape == (36, 5, 8)
    assert answered.tolist() == [False] * 20 + [True] * 16
    shown, asked = inputs[:20], inputs[20:]
    assert shown[:, :, 40].sum() == 0 and (asked[:, :, 40] == 1).all() and asked[:, :, 32:40].sum() == 0
    for b in range(5):
        at = [
            [torch.equal(pair[:32], question[:32]) for pair in shown[:, b]].index(True)
            for question in asked[:, b]
        ]
        assert len(set(at)) == 16 and torch.equal(targets[answered][:, b], shown[at, b, 32:40])
    assert not torch.equal(asked[:, 0], asked[:, 1])
    assert Pairs(40).sample(2, random(), 3).answered.tolist() == [False] * 3 + [True] * 3


def test_regression_is_a_gaussian_process_and_its_best_prediction_is_that_process_s_own():
    task = Regression(length=12)
    sequences = task.sample(400, random(), 12)
    x, before = sequences.inputs.unbind(2)
    y = sequences.targets[:, :, 0]
    assert x.abs().max() <= 1 and torch.equal(before[1:], y[:-1]) and (before[0] == 0).all()
    assert sequences.answered.all() and sequences.inputs.dtype == torch.float32
    assert y.mean().abs() < 0.1 and abs(y.var().item() - 1) < 0.15
    b = 7  # by the formula of the posterior (Rasmussen and Williams 2006, eq. 2.25)
    points, values = x[:, b].double(), y[:, b].double()
    kernel = torch.exp(-((points[:, None] - points[None]) ** 2) / (2 * 0.3**2))
    noisy = kernel + 0.05**2 * torch.eye(12, dtype=torch.float64)
    for t in (0, 1, 5, 11):
        mean = kernel[t, :t] @ torch.linalg.solve(noisy[:t, :t], values[:t])
        assert sequences.ideal[t, b].item() == pytest.approx(
            (values[t] - mean).item() ** 2, rel=1e-3, abs=1e-5
        )


@pytest.mark.parametrize("name", TASKS)
def test_sizes_of_training_are_drawn_from_the_whole_range(name):
    task = TASKS[name](length=4)
    generator = random()
    drawn = {task.draw(generator, 4) for _ in range(200)}
    assert {max(task.draw(generator, 2)) for _ in range(50)} <= {1, 2, 3}
    assert task.longest in drawn and task.longest in task.tests
    assert all(max(size) <= 4 for size in drawn)
    if name != "regression":
        assert {size[0] for size in drawn} == set(range(2 if name == "recall" else 1, 5))
        assert max(max(size) for size in task.tests) >= 8
    shortest = TASKS[name](length=2)
    assert shortest.longest in shortest.tests
    for tests in (task.tests, shortest.tests):
        assert len({task.name(*size) for size in tests}) == len(tests)
    again = [task.sample(2, random(), *size).inputs for size in task.tests]
    assert all(
        torch.equal(a, task.sample(2, random(), *size).inputs)
        for a, size in zip(again, task.tests, strict=True)
    )


def test_a_part_of_a_batch_is_of_its_sequences():
    for task in (Regression(4), Copy(4)):
        batch = task.sample(5, Generator().manual_seed(0), 4)
        part = batch.part(slice(1, 3))
        assert part.inputs.shape[1] == 2 and torch.equal(part.answered, batch.answered)
        for found, whole in zip(part, batch, strict=True):
            assert whole is None or whole.dim() == 1 or torch.equal(found, whole[:, 1:3])


def test_errors_count_wrong_bits_of_answers_alone():
    sequences = Copy(20).sample(2, random(), 3)
    right = 20 * (sequences.targets - 0.5)
    right[~sequences.answered] = 99
    assert errors(right, sequences, True).tolist() == [[0, 0]] * 3
    assert sequence_loss(right, sequences, True) < 1e-4
    wrong = right.clone()
    wrong[6, 1, [2, 5]] *= -1
    assert errors(wrong, sequences, True).tolist() == [[0, 0], [0, 2], [0, 0]]
    assert sequence_loss(wrong, sequences, True).item() == pytest.approx(2 * 10 / (3 * 2 * 8), rel=1e-3)
    curve = Regression(length=3).sample(2, random(), 3)
    assert torch.allclose(errors(curve.targets + 0.5, curve, False), torch.full((3, 2), 0.25), atol=1e-5)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (
            {"task": "sort"},
            "task must be one of copy, repeat-copy, recall, key-value, pairs, regression, got 'sort'",
        ),
        ({"task": "recall", "length": 1}, "length must be at least 2, got 1"),
        ({"task": "key-value", "length": 17}, "length must be at most 16, as many as can differ, got 17"),
        ({"length": 0}, "length must be at least 1, got 0"),
        ({"curriculum": 21}, "curriculum must be 0 or from 1 to length = 20, got 21"),
        ({"curriculum": -1}, "curriculum must be 0 or from 1 to length = 20, got -1"),
        ({"task": "recall", "curriculum": 1}, "curriculum must be 0 or from 2 to length = 20, got 1"),
        ({"task": "regression", "curriculum": 2}, "curriculum must be 0 with task regression, got 2"),
        ({"addressing": "random"}, "addressing must be one of lrua, ntm, content, dnc, sparse, got 'random'"),
        ({"controller": "rnn"}, "controller must be one of lstm, gru, feedforward, got 'rnn'"),
        (
            {"memory": "masks=true"},
            "memory must be options of 'ntm', order, eps, max_shift, got 'masks=true'",
        ),
        (
            {"memory": "num_slots=4"},
            "memory must be options of 'ntm', order, eps, max_shift, got 'num_slots=4'",
        ),
        ({"memory": "max_shift=1 max_shift=2"}, "memory must be options that are given once, got"),
        ({"memory": "max_shift"}, "memory must be NAME=VALUE ..., got 'max_shift'"),
        ({"memory": "max_shift="}, "memory must be NAME=VALUE ..., got 'max_shift='"),
        ({"memory": "max_shift=one"}, "memory must be options of 'ntm': max_shift must be an int, got str"),
        ({"memory": "eps=nan"}, "memory must be options of 'ntm': eps must be .*, got nan"),
        (
            {"addressing": "dnc", "memory": "masks=2"},
            "memory must be options of 'dnc': masks must be a bool, got int",
        ),
        ({"heads": 200}, "heads must be at most slots = 128, got 200"),
    ],
)
def test_settings_out_of_range_are_named(changes, message):
    with pytest.raises(ValueError, match=message):
        SequenceConfig(**changes)
    with pytest.raises(TypeError, match="length must be of type int, got 2.5"):
        SequenceConfig(length=2.5)


def test_settings_of_a_task_are_its_own_and_can_be_changed():
    config = SequenceConfig.of_task("regression", heads=2)
    assert (config.addressing, config.heads, config.hidden_size) == ("lrua", 2, 200)
    assert SequenceConfig.from_dict(config.to_dict()) == config
    assert SequenceConfig.of_task("copy") == SequenceConfig(clip=1.0)
    other = SequenceConfig.of_task("key-value", addressing="lrua")
    assert other.memory == "" and SequenceConfig.of_task("key-value", slots=9).memory.startswith(
        "masks=true "
    )


def test_slots_and_curriculum_of_pairs_go_by_the_length():
    for length, found in ((1024, (4, 4096)), (3, (3, 12))):
        config = SequenceConfig.of_task("pairs", length=length)
        assert (config.curriculum, config.slots) == found and config.addressing == "sparse"
    config = SequenceConfig.of_task("pairs", length=8, slots=20, curriculum=0, addressing="lrua")
    assert (config.curriculum, config.slots, config.addressing) == (0, 20, "lrua")


def test_a_curriculum_doubles_its_length_where_it_is_learned_and_goes_on_in_a_resumed_run(
    tmp_path, monkeypatch
):
    monkeypatch.setattr("mann_fast.training.curriculum.STEPS", 2)
    config = SequenceConfig(task="copy", **{**TINY, "steps": 9, "log_every": 1}, length=5, curriculum=2)
    trainer = start_run(config, None, tmp_path)
    wrong = iter([0.0, 0.5, 0.1, 0.0, 0.0, 3.0, 0.0, 0.0, 0.0])  # of 8 bits; a twentieth of a guess is 0.2
    lengths = []

    def errors_of(outputs, sequences, binary):
        lengths.append(len(sequences.answered))
        return torch.full((1, 1), next(wrong))

    def steps(trainer, count):
        for _ in range(count):
            with monkeypatch.context() as only:
                only.setattr("mann_fast.training.sequences.errors", errors_of)
                result = trainer.train_step()
            assert lengths[-1] <= 2 * result.length + 2
            yield result.length

    assert list(steps(trainer, 5)) == [2, 2, 2, 2, 4]  # (0.5 + 0.1) / 2 is too much, (0.1 + 0) / 2 is not
    assert trainer.metrics()["length"] == 4
    state = trainer.state_dict()
    resumed = SequenceTrainer(config)
    resumed.load_state_dict(state)
    assert resumed.curriculum.now == 4
    assert list(steps(resumed, 4)) == [4, 4, 4, 5]  # 3.0 counts, then two in a row; 5 is the most
    assert resumed.curriculum.now == 5
    good = {**state, "config": config.to_dict()}
    save_checkpoint(tmp_path / "good.pt", good)
    assert load_checkpoint(tmp_path / "good.pt")["curriculum"] == {"length": 4, "errors": [0.0]}
    for damage, message in (
        ({"length": 6, "errors": []}, "curriculum.length must be from 2 to 5 by its settings, got 6"),
        ({"length": 4, "errors": ["a"]}, "curriculum.errors must be numbers from 0 up"),
        ({"length": 4}, "it holds no curriculum.errors"),
    ):
        save_checkpoint(tmp_path / "damaged.pt", {**good, "curriculum": damage})
        with pytest.raises(ValueError, match=message):
            load_checkpoint(tmp_path / "damaged.pt")
    records = [
        {"step": k, "length": n, "loss": 1.0, "test_error": {"2 vectors": 1.0}} for k, n in ((1, 2), (2, 4))
    ]
    plot_sequence_curve(tmp_path / "curve.png", records, config, "copy")
    assert (tmp_path / "curve.png").stat().st_size > 0


def test_options_of_a_memory_are_read_as_what_they_look_like():
    text = "sharpness=none write_vector=key usage_decay=0.5 order=read_first"
    config = SequenceConfig(addressing="lrua", memory=text, slots=9, slot_size=5, heads=2)
    options = {"sharpness": None, "write_vector": "key", "usage_decay": 0.5, "order": "read_first"}
    assert config.memory_options == {"num_slots": 9, "slot_size": 5, "num_heads": 2, **options}
    layer = build_model(config, 8, 8).layer
    assert {name: getattr(layer, name) for name in options} == options
    masked = SequenceConfig(addressing="dnc", memory="masks=True link=FALSE").memory_options
    assert (masked["masks"], masked["link"]) == (True, False)


def test_settings_of_older_checkpoints_are_read():
    """Of 0.1, which had no options of a memory, and of when those of the DNC were letters."""
    config = SequenceConfig(addressing="dnc", memory="masks=true link_sharpening=true")
    values = {name: value for name, value in config.to_dict().items() if name != "memory"}
    assert SequenceConfig.from_dict(values) == replace(config, memory="")
    found = SequenceConfig.from_dict({**values, "repairs": "sm"})
    assert found.memory_options == config.memory_options
    with pytest.raises(ValueError, match="repairs must be some of the letters m, d, s, got 'mx'"):
        SequenceConfig.from_dict({**values, "repairs": "mx"})


@pytest.mark.parametrize("name", TASKS)
@pytest.mark.parametrize("model", ["mann", "lstm"])
def test_every_task_trains_resumes_bit_for_bit_and_is_measured(name, model, tmp_path):
    config = SequenceConfig.of_task(name, **{**TINY, "model": model, "length": 3})
    whole = start_run(config, None, tmp_path / "whole")
    assert isinstance(whole, SequenceTrainer) and train(whole, tmp_path / "whole")
    first = start_run(config, None, tmp_path / "halves")
    assert not train(first, tmp_path / "halves", stop=lambda: first.step == 3)
    second = resume_run(config, None, tmp_path / "halves")
    assert second.step == 3 and train(second, tmp_path / "halves")
    states = [load_checkpoint(tmp_path / part) for part in ("whole", "halves")]
    assert states[0]["config"] == config
    for a, b in zip(*(state["model"]["state"].values() for state in states), strict=True):
        assert torch.equal(a, b)
    lines = [(tmp_path / part / "metrics.jsonl").read_text().splitlines() for part in ("whole", "halves")]
    records = [[{**json.loads(line), "seconds": 0} for line in part] for part in lines]
    assert records[0] == records[1] and [record["step"] for record in records[0]] == [2, 4, 6]
    restored = restore_model(states[0])
    results = measure(restored, config, 3)
    assert results == measure(restored, config, 3) != measure(restored, config, 3, seed=1)
    assert all(
        result.low <= result.mean <= result.high and len(result.by_answer) == result.answers
        for result in results
    )


def test_a_copy_is_learned_far_below_a_guess():
    """Two vectors, so that a few seconds are enough; what a whole run reaches is in docs/tasks.md."""
    config = SequenceConfig(length=2, hidden_size=32, slots=8, steps=600, lr=5e-3, batch=16)
    trainer = SequenceTrainer(config)
    before = measure(trainer.model, config, 20)
    while trainer.step < config.steps:
        trainer.train_step()
    after = measure(trainer.model, config, 20)
    assert [result.name for result in after][:2] == ["1 vector", "2 vectors"]
    assert before[1].mean > 0.8 * before[1].guess and after[1].mean < 0.3 * after[1].guess


def test_trace_holds_the_weights_of_a_memory_and_none_of_a_model_without():
    config = SequenceConfig(**TINY)
    task = task_of(config)
    found = trace_sequence(build_model(config, task.input_size, task.output_size), config, 5, 4)
    assert found.slots.written.shape == found.slots.read.shape == (10, 9) and found.outputs.shape == (10, 8)
    assert (
        torch.allclose(found.slots.read.sum(1), torch.ones(10))
        and 0 <= found.outputs.min() <= found.outputs.max() <= 1
    )
    config = SequenceConfig(**TINY, model="lstm")
    assert trace_sequence(build_model(config, task.input_size, task.output_size), config, 5).slots is None


@pytest.mark.parametrize("task", TASKS)
def test_commands_train_evaluate_and_show(task, capsys, tmp_path):
    folder = tmp_path / task
    assert cli.main(["train", "--task", task, "--out", str(folder), *OPTIONS, "--require-learning"]) == 1
    printed, said = capsys.readouterr()
    assert "4 steps in" in printed and "a guess" in printed and "give it more --steps" in said
    for name in ("checkpoint.pt", "metrics.jsonl", "curve.png", "answers.png", "memory.png", "summary.json"):
        assert (folder / name).stat().st_size > 0
        assert str(folder / name) in printed or name == "summary.json"
    assert cli.main(["train", "--out", str(folder), "--resume", "--steps", "5", "--json"]) == 0
    summary = json.loads(capsys.readouterr().out)
    assert summary["step"] == 5 and summary["config"]["task"] == task and not summary["learned"]
    assert cli.main(["evaluate", "--checkpoint", str(folder), "--episodes", "4", "--json"]) == 0
    results = json.loads(capsys.readouterr().out)["results"]
    assert [result["name"] for result in results] == [result["name"] for result in summary["results"]]
    assert cli.main(["evaluate", "--checkpoint", str(folder), "--episodes", "4"]) == 0
    picture = tmp_path / "five.png"
    assert cli.main(["show", "--checkpoint", str(folder), "--length", "5", "--out", str(picture)]) == 0
    assert picture.stat().st_size > 0 and str(picture) in capsys.readouterr().out


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (
            ["train", "--task", "copy", "--out", "{new}", "--ways", "3"],
            "--ways does not belong to --task copy",
        ),
        (
            ["train", "--task", "copy", "--out", "{new}", "--data", "glyphs"],
            "--data does not belong to --task copy",
        ),
        (
            ["train", "--data", "glyphs", "--out", "{new}", "--length", "3"],
            "--length does not belong to --task one-shot",
        ),
        (["train", "--task", "recall", "--out", "{run}"], "already holds a run"),
        (["train", "--task", "recall", "--out", "{run}", "--resume"], "is not one of --task recall"),
        (
            ["train", "--out", "{run}", "--resume", "--length", "7"],
            "was started with length = 3 and cannot continue with 7",
        ),
        (
            ["predict", "--checkpoint", "{run}", "--support", ".", "a.png"],
            "is a model of the task copy, not of images",
        ),
        (
            ["evaluate", "--checkpoint", "{run}", "--data", "glyphs"],
            "--data does not belong to a model of the task copy",
        ),
        (["show", "--checkpoint", "{run}", "--length", "0"], "--length must be at least 1, got 0"),
        (
            ["show", "--checkpoint", "{run}", "--data", "glyphs"],
            "--data does not belong to a model of the task copy",
        ),
    ],
)
def test_a_mistake_is_named_and_writes_nothing(arguments, message, capsys, tmp_path):
    start_run(SequenceConfig(**{**TINY, "length": 3}), None, tmp_path / "run")
    trainer = SequenceTrainer(SequenceConfig(**{**TINY, "length": 3, "steps": 2}))
    train(trainer, tmp_path / "run")
    before = sorted(tmp_path.rglob("*"))
    named = [argument.format(new=tmp_path / "new", run=tmp_path / "run") for argument in arguments]
    assert cli.main(named) == 2
    said = capsys.readouterr().err
    assert message in said and "Traceback" not in said
    assert sorted(tmp_path.rglob("*")) == before
