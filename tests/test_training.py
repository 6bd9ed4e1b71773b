"""Training, evaluation, checkpoints and prediction, at tiny sizes."""

import errno
import json
import math
import subprocess
import sys

import pytest
import torch
from torch import nn

from mann_fast import MANN
from mann_fast.data import Dataset, Episodes, encode_inputs, generate_glyphs
from mann_fast.training import (
    InstanceAccuracy,
    TrainConfig,
    Trainer,
    TrainingDiverged,
    evaluate,
    has_learned,
    load_checkpoint,
    predict,
    restore_model,
    resume_run,
    start_run,
    summarise,
    train,
)
from mann_fast.training.checkpoint import save_checkpoint
from mann_fast.training.files import read_json_lines, replacing, write_json
from mann_fast.training.lock import only_run
from mann_fast.training.objective import is_right, label_loss, right_by_instance
from mann_fast.training.plots import ordinal
from mann_fast.training.prediction import class_log_probabilities
from mann_fast.training.trace import trace

TINY = {
    "image_size": 7,
    "ways": 3,
    "shots": 3,
    "hidden_size": 9,
    "slots": 6,
    "slot_size": 5,
    "heads": 2,
    "steps": 20,
    "batch": 3,
    "warmup": 4,
    "log_every": 4,
    "checkpoint_every": 5,
    "eval_episodes": 10,
}


@pytest.fixture(scope="module")
def dataset():
    glyphs = generate_glyphs(12, 4, image_size=7)
    return Dataset(glyphs.select(range(8)), glyphs.select(range(8, 12)), "glyphs")


def tiny(**changes):
    return TrainConfig(**{**TINY, **changes})


def stop_at(trainer, step):
    return lambda: trainer.step >= step


def metrics_without_time(out):
    return [
        {k: v for k, v in record.items() if k != "seconds"}
        for record in read_json_lines(out / "metrics.jsonl")
    ]


def assert_same_bits(a, b):
    """Two checkpoints, or parts of them, are equal to the last bit."""
    assert type(a) is type(b)
    if isinstance(a, dict):
        assert a.keys() == b.keys()
        for key in a.keys() - {"seconds"}:
            assert_same_bits(a[key], b[key])
    elif isinstance(a, (list, tuple)):
        assert len(a) == len(b)
        for x, y in zip(a, b, strict=True):
            assert_same_bits(x, y)
    elif isinstance(a, torch.Tensor):
        assert torch.equal(a, b)
    else:
        assert a == b


# Settings


@pytest.mark.parametrize(
    ("name", "value", "error"),
    [
        ("ways", 1, ValueError),
        ("shots", 1, ValueError),
        ("steps", 0, ValueError),
        ("batch", 2.0, TypeError),
        ("heads", 7, ValueError),
        ("model", "gru", ValueError),
        ("labels", "letters", ValueError),
        ("lr", 0.0, ValueError),
        ("lr", math.nan, ValueError),
        ("decay", 1.1, ValueError),
        ("seed", -1, ValueError),
        ("eval_episodes", 1, ValueError),
        ("augment", 1, TypeError),
    ],
)
def test_wrong_setting_is_named(name, value, error):
    with pytest.raises(error, match=name):
        tiny(**{name: value})


def test_config_survives_json_and_refuses_other_versions():
    config = tiny(lr=1, labels="string")
    values = json.loads(json.dumps(config.to_dict()))
    assert TrainConfig.from_dict(values) == config
    with pytest.raises(ValueError, match="momentum"):
        TrainConfig.from_dict({**values, "momentum": 0.9})
    del values["lr"]
    with pytest.raises(ValueError, match="lr"):
        TrainConfig.from_dict(values)


def test_learning_rate_rises_stays_and_falls():
    config = tiny(lr=1.0, steps=100, warmup=4, decay=0.2)
    rates = [config.learning_rate(step) for step in range(100)]
    assert rates[:5] == pytest.approx([0.2, 0.4, 0.6, 0.8, 1.0])
    assert set(rates[4:81]) == {1.0}
    assert rates[80:] == pytest.approx([1 - k / 20 for k in range(20)])
    constant = tiny(lr=0.5, steps=10, warmup=0, decay=0.0)
    assert [constant.learning_rate(step) for step in range(10)] == [0.5] * 10


# Loss and accuracy


def test_string_loss_and_accuracy_against_plain_loops():
    generator = torch.Generator().manual_seed(0)
    logits = torch.randn(4, 3, 25, generator=generator, dtype=torch.float64)
    targets = logits.view(4, 3, 5, 5).argmax(-1)
    targets[1, 2, 4] = (targets[1, 2, 4] + 1) % 5  # one letter of one label wrong
    targets[3, 0, 0] = (targets[3, 0, 0] + 2) % 5
    total = 0.0
    for t in range(4):
        for b in range(3):
            for letter in range(5):
                row = logits[t, b, 5 * letter : 5 * letter + 5].tolist()
                total -= row[targets[t, b, letter]] - math.log(sum(map(math.exp, row)))
    assert label_loss(logits, targets, "string").item() == pytest.approx(total / 12)
    wrong = ~is_right(logits, targets, "string")
    assert wrong.nonzero().tolist() == [[1, 2], [3, 0]]


def test_onehot_loss_against_plain_loops():
    logits = torch.randn(4, 3, 6, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    targets = torch.arange(12).view(4, 3) % 6
    total = sum(
        math.log(sum(map(math.exp, logits[t, b].tolist()))) - logits[t, b, targets[t, b]].item()
        for t in range(4)
        for b in range(3)
    )
    assert label_loss(logits, targets, "onehot").item() == pytest.approx(total / 12)


def test_right_answers_are_counted_by_instance():
    right = torch.tensor([[True, False], [False, True], [True, True], [True, False]])
    instance = torch.tensor([[1, 1], [1, 2], [2, 1], [2, 2]])
    assert right_by_instance(right, instance, 3).tolist() == [[1, 2, 0], [1, 1, 0]]


def test_interval_counts_episodes_not_steps():
    generator = torch.Generator().manual_seed(2)
    one_answer = (torch.rand(2000, 1, generator=generator) < 0.7).float()
    interval = InstanceAccuracy.from_episodes(one_answer)
    p = one_answer.mean().item()
    half = 1.96 * math.sqrt(p * (1 - p) / 2000)
    assert (interval.low[0], interval.high[0]) == pytest.approx((p - half, p + half), abs=1e-3)
    # Five answers per episode that are always all right or all wrong tell no more than one.
    five_alike = one_answer.expand(-1, 5).mean(1, keepdim=True)
    assert InstanceAccuracy.from_episodes(five_alike) == interval


def test_interval_covers_the_truth_about_95_times_in_100():
    generator = torch.Generator().manual_seed(3)
    answers = (
        (torch.rand(400, 100, 5, generator=generator) < 0.9).float().mean(-1)
    )  # 400 studies of 100 episodes
    found = [InstanceAccuracy.from_episodes(study.unsqueeze(1)) for study in answers]
    covered = sum(f.low[0] <= 0.9 <= f.high[0] for f in found)
    assert 365 <= covered <= 395


@pytest.mark.parametrize("value", [0.0, 1.0])
def test_interval_does_not_shrink_to_a_point(value):
    interval = InstanceAccuracy.from_episodes(torch.full((50, 1), value))
    assert interval.mean == (value,)
    assert 0 <= interval.low[0] <= value <= interval.high[0] <= 1
    assert 0.05 < interval.high[0] - interval.low[0] < 0.1
    with pytest.raises(ValueError, match="at least 2"):
        InstanceAccuracy.from_episodes(torch.zeros(1, 3))


def test_evaluation_of_models_whose_accuracy_is_known(dataset):
    from mann_fast.data import Episodes

    def evaluated(model, labels="onehot"):
        episodes = Episodes(dataset.test, ways=3, shots=3, labels=labels, seed=5)
        return evaluate(model, episodes, 150, labels=labels, shots=3, batch=64)

    for labels in ("onehot", "string"):
        accuracy = evaluated(NearestExample(3, labels), labels)
        assert accuracy.episodes == 150
        assert accuracy.mean[0] < 0.6  # not seen yet
        assert accuracy.mean[1] > 0.5  # raw pixels recognise some of these glyphs
    assert evaluated(ConstantAnswer(3)).mean == pytest.approx(
        [1 / 3] * 3
    )  # one class of three has that label


def test_learning_has_started_only_beyond_guessing():
    def accuracy(second):
        return InstanceAccuracy(10, (0.2, second), (0.0, 0.0), (1.0, 1.0))

    config = TrainConfig(ways=5)
    assert config.chance == pytest.approx(0.2)
    assert not has_learned(accuracy(0.30), config)
    assert has_learned(accuracy(0.60), config)
    assert TrainConfig(labels="string").chance == pytest.approx(1 / 3125)


# Files


def test_a_failed_write_leaves_the_old_file_and_nothing_else(tmp_path):
    path = tmp_path / "checkpoint.pt"
    save_checkpoint(path, {"step": 1})
    before = path.read_bytes()
    with pytest.raises(RuntimeError, match="disk"):
        with replacing(path) as temporary:
            temporary.write_bytes(b"half")
            raise RuntimeError("disk full")
    assert path.read_bytes() == before
    assert [p.name for p in tmp_path.iterdir()] == ["checkpoint.pt"]


def test_a_full_disk_is_named_with_the_file(tmp_path):
    """A limit on the size of files stands for the disk: the system refuses the rest of a write in the same way."""
    resource = pytest.importorskip("resource", reason="limits on the size of files are Unix's")
    path = tmp_path / "checkpoint.pt"
    save_checkpoint(path, {"step": 1})
    before = path.read_bytes()
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (50_000, limits[1]))
    try:
        with pytest.raises(OSError) as caught:
            save_checkpoint(path, {"weights": torch.zeros(100_000)})
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert caught.value.errno == errno.EFBIG
    assert caught.value.filename == str(path)
    assert path.read_bytes() == before
    assert [p.name for p in tmp_path.iterdir()] == ["checkpoint.pt"]


def test_a_full_disk_is_named_with_the_file_in_a_new_run_too(tmp_path, dataset):
    resource = pytest.importorskip("resource", reason="limits on the size of files are Unix's")
    trainer = start_run(tiny(), dataset, tmp_path)
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (10, limits[1]))
    try:
        with pytest.raises(OSError) as caught:
            train(trainer, tmp_path)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert (caught.value.errno, caught.value.filename) == (errno.EFBIG, str(tmp_path / "metrics.jsonl"))


@pytest.mark.parametrize("what", ["a folder in the way", "a folder that is gone"])
def test_a_write_that_fails_names_the_final_file(tmp_path, what):
    path = tmp_path / "run" / "summary.json"
    if what == "a folder in the way":
        path.mkdir(parents=True)
    with pytest.raises((IsADirectoryError, FileNotFoundError)) as caught:
        write_json(path, {})
    assert caught.value.filename == str(path)
    assert str(caught.value).endswith(f": {str(path)!r}")
    assert [p.name for p in tmp_path.rglob("*")] == (["run", "summary.json"] if path.exists() else [])


def test_an_error_about_another_file_keeps_its_name(tmp_path):
    with pytest.raises(FileNotFoundError) as caught:
        with replacing(tmp_path / "picture.png"):
            (tmp_path / "example.png").read_bytes()
    assert str(caught.value.filename) == str(tmp_path / "example.png")
    with pytest.raises(OSError, match="encoder error -2: .*picture.png"):
        with replacing(tmp_path / "picture.png"):
            raise OSError("encoder error -2")


KILLED = """
import sys, time
from mann_fast.training.files import replacing
from mann_fast.training.lock import only_run

with only_run(sys.argv[1]), replacing(sys.argv[1] + "/checkpoint.pt") as temporary:
    temporary.write_text("half")
    print(temporary.name, flush=True)
    time.sleep(600)
"""


def test_a_killed_run_gives_its_folder_back_and_the_next_removes_what_it_left(tmp_path, dataset):
    pytest.importorskip("fcntl", reason="flock is Unix's")
    old, new = tmp_path / "old", tmp_path / "new"
    process = subprocess.Popen([sys.executable, "-c", KILLED, old], stdout=subprocess.PIPE, text=True)
    try:
        left = [process.stdout.readline().strip(), ".run.lock"]
        for enter in (start_run, resume_run):
            with pytest.raises(BlockingIOError, match="another process is training in .*old"):
                enter(tiny(), dataset, old)
        with pytest.raises(BlockingIOError):
            train(Trainer(tiny(), dataset), old)
        start_run(tiny(), dataset, new)  # another folder is free
    finally:
        process.kill()
        process.communicate()
    assert sorted(p.name for p in old.iterdir()) == left
    (old / ".checkpoint.mine.pt").touch()
    trainer = start_run(tiny(steps=2), dataset, old)
    assert [p.name for p in old.iterdir()] == [".checkpoint.mine.pt"]
    assert train(trainer, old)
    (old / ".curve.123.png").touch()
    resume_run(tiny(steps=3), dataset, old)
    assert sorted(p.name for p in old.iterdir()) == [
        ".checkpoint.mine.pt", "checkpoint.pt", "curve.png", "metrics.jsonl",
    ]  # fmt: skip


def test_a_folder_is_locked_until_it_is_left_and_only_kept_if_something_came(tmp_path):
    out = tmp_path / "a" / "run"
    with only_run(out):
        with only_run(tmp_path / "a" / "." / "run"):  # the same process
            pass
        assert [p.name for p in out.iterdir()] == [".run.lock"]
    assert not (tmp_path / "a").exists()
    with pytest.raises(ValueError):
        with only_run(out):
            (out.parent / "kept").touch()
            raise ValueError
    assert [p.name for p in tmp_path.rglob("*")] == ["a", "kept"]


def test_a_lock_whose_file_was_removed_in_the_meantime_is_not_taken(tmp_path, monkeypatch):
    """The one before removes the file between our opening and locking it."""
    fcntl = pytest.importorskip("fcntl", reason="flock is Unix's")
    flock, taken = fcntl.flock, []

    def removed_first(descriptor, operation):
        if not taken:
            (tmp_path / ".run.lock").unlink()
        taken.append(descriptor)
        flock(descriptor, operation)

    monkeypatch.setattr(fcntl, "flock", removed_first)
    with only_run(tmp_path):
        assert len(taken) == 2 and (tmp_path / ".run.lock").exists()


def test_a_file_system_without_locks_is_said(tmp_path, monkeypatch):
    fcntl = pytest.importorskip("fcntl", reason="flock is Unix's")

    def refuse(descriptor, operation):
        raise OSError(errno.ENOTSUP, "not supported")

    monkeypatch.setattr(fcntl, "flock", refuse)
    with pytest.warns(UserWarning, match="has no locks"), only_run(tmp_path):
        pass


def test_what_is_no_checkpoint_is_refused(tmp_path, dataset):
    with pytest.raises(FileNotFoundError, match="no checkpoint"):
        load_checkpoint(tmp_path / "absent.pt")
    garbage = tmp_path / "garbage.pt"
    garbage.write_bytes(b"not a zip archive")
    with pytest.raises(ValueError, match="garbage.pt is not a checkpoint"):
        load_checkpoint(garbage)
    torch.save({"weights": torch.zeros(1)}, garbage)
    with pytest.raises(ValueError, match="not a checkpoint"):
        load_checkpoint(garbage)
    save_checkpoint(garbage, {**Trainer(tiny(), dataset).state_dict()})
    content = torch.load(garbage, weights_only=True)
    torch.save({**content, "version": 999}, garbage)
    with pytest.raises(ValueError, match="999"):
        load_checkpoint(garbage)
    cut = garbage.read_bytes()
    garbage.write_bytes(cut[: len(cut) // 2])
    with pytest.raises(ValueError, match="damaged"):
        load_checkpoint(garbage)


@pytest.mark.parametrize("model", ["mann", "lstm"])
def test_checkpoint_rebuilds_the_model_from_the_file_alone(tmp_path, dataset, model):
    trainer = start_run(tiny(model=model, steps=3), dataset, tmp_path)
    assert train(trainer, tmp_path)
    content = load_checkpoint(tmp_path)  # the folder will do
    assert content["config"] == trainer.config
    restored = restore_model(content)
    x = trainer.episodes.sample(2).inputs
    with torch.no_grad():
        assert torch.equal(restored(x)[0], trainer.model.eval()(x)[0])


# Runs


@pytest.mark.parametrize("model", ["mann", "lstm"])
@pytest.mark.parametrize("labels", ["onehot", "string"])
def test_ten_steps_and_ten_resumed_are_twenty_bit_for_bit(tmp_path, dataset, model, labels):
    config = tiny(model=model, labels=labels)
    whole, halves = tmp_path / "whole", tmp_path / "halves"
    assert train(start_run(config, dataset, whole), whole)

    first = start_run(config, dataset, halves)
    assert not train(first, halves, stop=stop_at(first, 10))  # in the middle of a logging interval
    with open(halves / "metrics.jsonl", "a") as file:  # what a crash after the checkpoint would have left
        print(json.dumps({"step": 12, "loss": 0.0}), file=file)
        file.write('{"step": 16, "lo')
    torch.randn(3)  # the global generator has moved on
    second = resume_run(config, dataset, halves)
    assert second.step == 10
    assert train(second, halves)

    assert_same_bits(load_checkpoint(whole), load_checkpoint(halves))
    assert metrics_without_time(whole) == metrics_without_time(halves)
    assert [record["step"] for record in metrics_without_time(whole)] == [4, 8, 12, 16, 20]


def test_the_seed_decides_everything(tmp_path, dataset):
    for name, seed in (("a", 1), ("b", 1), ("c", 2)):
        torch.randn(7)
        train(start_run(tiny(seed=seed, steps=4), dataset, tmp_path / name), tmp_path / name)
    a, b, c = (load_checkpoint(tmp_path / name) for name in "abc")
    assert_same_bits(a, b)
    assert metrics_without_time(tmp_path / "a") == metrics_without_time(tmp_path / "b")
    weights = next(iter(a["model"]["state"]))
    assert not torch.equal(a["model"]["state"][weights], c["model"]["state"][weights])


@pytest.mark.parametrize("layout", ["stream", "support"])
def test_the_dtype_that_torch_makes_by_default_decides_nothing(tmp_path, layout):
    glyphs = generate_glyphs(12, 8, image_size=16)
    dataset = Dataset(glyphs.select(range(8)), glyphs.select(range(8, 12)), "glyphs")
    config = tiny(image_size=16, encoder="conv4", encoder_steps=2, steps=4, layout=layout)

    def run(name):
        train(Trainer(config, dataset), tmp_path / name)
        return load_checkpoint(tmp_path / name)

    expected = run("float32")
    torch.set_default_dtype(torch.float64)
    try:
        found = run("float64")
    finally:
        torch.set_default_dtype(torch.float32)
    assert_same_bits(found["model"]["state"], expected["model"]["state"])


def test_metrics_are_averages_over_their_interval(tmp_path, dataset):
    results = []
    train(start_run(tiny(steps=6), dataset, tmp_path), tmp_path, on_step=results.append)
    first, last = read_json_lines(tmp_path / "metrics.jsonl")
    assert [r.step for r in results] == [1, 2, 3, 4, 5, 6]
    assert first["loss"] == pytest.approx(sum(r.loss for r in results[:4]) / 4)
    assert last["loss"] == pytest.approx(sum(r.loss for r in results[4:]) / 2)
    mean = torch.stack([r.accuracy for r in results[4:]]).mean(0)
    assert last["train_accuracy"] == pytest.approx(mean.tolist())
    assert len(last["heldout_accuracy"]) == 3
    assert last["lr"] == pytest.approx(tiny(steps=6).learning_rate(5))


def test_a_run_is_not_overwritten_and_only_continued_with_the_same_settings(tmp_path, dataset):
    train(start_run(tiny(steps=3), dataset, tmp_path), tmp_path)
    with pytest.raises(FileExistsError, match="--resume"):
        start_run(tiny(), dataset, tmp_path)
    with pytest.raises(ValueError, match="heads = 2 .* 1"):
        resume_run(tiny(heads=1), dataset, tmp_path)
    with pytest.raises(ValueError, match="step 3 already"):
        resume_run(tiny(steps=2), dataset, tmp_path)
    other = Dataset(dataset.test, dataset.train, "glyphs")
    with pytest.raises(ValueError, match="not those that"):
        resume_run(tiny(), other, tmp_path)
    with pytest.raises(FileNotFoundError, match="no checkpoint"):
        resume_run(tiny(), dataset, tmp_path / "elsewhere")
    longer = resume_run(tiny(steps=5), dataset, tmp_path)
    assert train(longer, tmp_path)
    assert load_checkpoint(tmp_path)["step"] == 5
    assert start_run(tiny(), dataset, tmp_path, overwrite=True).step == 0
    assert list(tmp_path.iterdir()) == []


def test_a_run_is_not_continued_with_a_model_that_computes_something_else(dataset):
    trainer = Trainer(tiny(), dataset)
    state = trainer.state_dict()
    state["model"] = {**state["model"], "config": {**state["model"]["config"], "usage_decay": 0.5}}
    with pytest.raises(ValueError, match="usage_decay.*version"):
        trainer.load_state_dict(state)


@pytest.mark.parametrize("where", ["loss", "gradient"])
def test_divergence_names_the_step_and_keeps_the_last_good_checkpoint(tmp_path, dataset, where):
    trainer = start_run(tiny(), dataset, tmp_path)
    parameter = next(trainer.model.parameters())

    def sabotage(result):
        if result.step == 7 and where == "loss":
            parameter.data.fill_(math.nan)
        elif result.step == 7:
            parameter.register_hook(lambda gradient: gradient * math.inf)

    with pytest.raises(TrainingDiverged, match=r"step 8.*checkpoint\.pt.*--lr"):
        train(trainer, tmp_path, on_step=sabotage)
    content = load_checkpoint(tmp_path)
    assert content["step"] == 5
    assert all(tensor.isfinite().all() for tensor in content["model"]["state"].values())
    if where == "gradient":  # the step was not taken
        assert all(tensor.isfinite().all() for tensor in trainer.model.parameters())


def test_summary_and_pictures(tmp_path, dataset):
    from PIL import Image

    trainer = start_run(tiny(steps=8), dataset, tmp_path)
    train(trainer, tmp_path)
    summary = summarise(trainer, dataset, tmp_path, stop=lambda: False)
    assert json.loads((tmp_path / "summary.json").read_text()) == summary
    assert summary["step"] == 8
    assert summary["train_classes"] == 32  # 8 and their rotations
    assert summary["heldout_classes"] == 4
    assert summary["heldout_accuracy"]["episodes"] == 10
    assert TrainConfig.from_dict(summary["config"]) == trainer.config
    with Image.open(tmp_path / "curve.png") as picture:
        assert picture.format == "PNG" and picture.width > 500
    assert sorted(p.name for p in tmp_path.iterdir()) == [
        "checkpoint.pt",
        "curve.png",
        "metrics.jsonl",
        "summary.json",
    ]


def test_photographs_are_not_turned_into_further_classes(dataset):
    photographs = Dataset(dataset.train, dataset.test, "folder")
    assert Trainer(tiny(), dataset).num_classes == 32
    assert Trainer(tiny(augment=False), dataset).num_classes == 8
    trainer = Trainer(tiny(), photographs)
    assert trainer.num_classes == 8
    assert trainer.state_dict()["data"]["drawn"] is False


def test_too_few_classes_or_images_are_an_error(dataset):
    with pytest.raises(ValueError, match="ways"):
        Trainer(tiny(ways=5), Dataset(dataset.train, dataset.test, "glyphs"))
    with pytest.raises(ValueError, match="at least 5 images"):
        Trainer(tiny(shots=5), dataset)


@pytest.mark.parametrize(
    "number, word", [(1, "1st"), (2, "2nd"), (3, "3rd"), (4, "4th"), (11, "11th"), (22, "22nd")]
)
def test_ordinals(number, word):
    assert ordinal(number) == word


# Prediction


class NearestExample(nn.Module):
    """An oracle with the interface of a model: it answers with the label of the nearest image so far."""

    def __init__(self, ways, labels="onehot"):
        super().__init__()
        self.outputs = ways if labels == "onehot" else 25

    def forward(self, x, state=None):
        images, labels, waiting = state or ([], [], None)
        images, labels = list(images), list(labels)
        logits = []
        for step in x:
            image, label = step[:, : -self.outputs], step[:, -self.outputs :]
            if waiting is not None:
                images.append(waiting)
                labels.append(label)
            waiting = image
            if not images:
                logits.append(torch.zeros(len(image), self.outputs))
                continue
            distance = torch.stack([(image - known).square().sum(1) for known in images])
            nearest = distance.argmin(0)
            logits.append(5 * torch.stack(labels)[nearest, torch.arange(len(image))])
        return torch.stack(logits), (images, labels, waiting)


class ConstantAnswer(nn.Module):
    """Answers every image with label 0."""

    def __init__(self, ways):
        super().__init__()
        self.ways = ways

    def forward(self, x, state=None):
        logits = torch.zeros(*x.shape[:2], self.ways)
        logits[..., 0] = 9.0
        return logits, state


@pytest.mark.parametrize("labels", ["onehot", "string"])
@pytest.mark.parametrize("num_classes", [2, 3, 5])
def test_prediction_with_an_oracle_for_a_model(labels, num_classes):
    config = TrainConfig(ways=5, labels=labels, image_size=4)
    generator = torch.Generator().manual_seed(0)
    patterns = torch.randint(0, 2, (num_classes, 4, 4), generator=generator) * 200
    patterns[:, 0] = torch.nn.functional.one_hot(torch.arange(num_classes), 5)[:, :4] * 255  # all different

    def drawn(classes):
        noise = torch.randint(0, 20, (len(classes), 4, 4), generator=generator)
        return (patterns[classes] + noise).clamp(max=255).to(torch.uint8)

    classes = torch.cat(
        [torch.arange(num_classes), torch.tensor([1, 0, 1])]
    )  # from one to three examples each
    wanted = torch.tensor([1, 0, num_classes - 1, 1])
    examples, images = drawn(classes), drawn(wanted)
    probabilities = predict(NearestExample(5, labels), config, examples, classes, images, orders=9)
    assert probabilities.shape == (4, num_classes)
    assert probabilities.sum(1).tolist() == pytest.approx([1.0] * 4, abs=1e-5)
    assert probabilities.argmax(1).tolist() == wanted.tolist()
    if labels == "onehot":  # e^5 against 1 for each other class, and nothing for labels that no class has
        expected = math.exp(5) / (math.exp(5) + num_classes - 1)
        assert probabilities.max(1).values.tolist() == pytest.approx([expected] * 4, rel=1e-4)


def test_probability_of_a_string_is_the_product_over_its_letters():
    logits = torch.randn(2, 25, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    labels = torch.tensor([[[0, 1, 2, 3, 4], [0, 1, 2, 3, 3]], [[4, 4, 4, 4, 4], [1, 0, 2, 0, 1]]])
    found = class_log_probabilities(logits, labels, "string").exp()
    for k in range(2):
        weight = [
            math.exp(sum(logits[k, 5 * i + letter] for i, letter in enumerate(w))) for w in labels[k].tolist()
        ]
        assert found[k].tolist() == pytest.approx([w / sum(weight) for w in weight])


def test_prediction_judges_each_image_apart_and_the_same_each_time(dataset):
    config = tiny()
    torch.manual_seed(0)
    model = restore_model({**Trainer(config, dataset).state_dict(), "config": config})
    examples = dataset.test.images[[0, 1, 4, 5, 8]]
    classes = torch.tensor([0, 0, 1, 1, 2])
    images = dataset.test.images[[2, 6, 10]]
    together = predict(model, config, examples, classes, images, orders=5, seed=3)
    again = predict(model, config, examples, classes, images, orders=5, seed=3)
    assert torch.equal(together, again)
    apart = [predict(model, config, examples, classes, image[None], orders=5, seed=3) for image in images]
    assert torch.equal(together, torch.cat(apart))
    assert not torch.equal(together, predict(model, config, examples, classes, images, orders=5, seed=4))

    # The same by hand, for one order: the whole sequence with the image at its end.
    one = predict(
        model, config, examples[:1].expand(2, 7, 7), torch.tensor([0, 1]), images[:1], orders=1, seed=6
    )
    sequence = torch.cat([examples[:1], examples[:1], images[:1]]).unsqueeze(1)
    found = []
    for first in range(3):
        for second in {0, 1, 2} - {first}:
            with torch.no_grad():
                logits, _ = model(encode_inputs(sequence, torch.tensor([[-1], [first], [second]]), ways=3))
            for pair in ([first, second], [second, first]):
                found.append(logits[2, 0, pair].softmax(0))
    assert any(torch.allclose(one[0], candidate, atol=1e-6) for candidate in found)


def test_prediction_refuses_more_classes_than_ways(dataset):
    config = tiny()
    with pytest.raises(ValueError, match="4 classes .* 3 apart.*--ways 4"):
        predict(ConstantAnswer(3), config, dataset.test.images[:4], torch.arange(4), dataset.test.images[:1])
    with pytest.raises(ValueError, match="orders"):
        predict(
            ConstantAnswer(3),
            config,
            dataset.test.images[:2],
            torch.arange(2),
            dataset.test.images[:1],
            orders=0,
        )


def test_trace_agrees_with_the_whole_episode_at_once():
    """Step by step the same answers; weights that add up: reads to one per head, writes as many as lrua_write gives."""
    data = generate_glyphs(6, 4, image_size=8, seed=1)
    episodes = Episodes(data, ways=3, shots=3, seed=2)
    episode = episodes.sample(1)
    torch.manual_seed(0)
    model = MANN(episodes.input_size, 3, 12, num_slots=10, slot_size=5, num_heads=2).eval()
    found = trace(model, episode, "onehot")
    with torch.no_grad():
        logits = model(episode.inputs)[0][:, 0]
    torch.testing.assert_close(found.probabilities, logits.softmax(1), rtol=1e-4, atol=1e-5)
    assert torch.equal(found.right, logits.argmax(1) == episode.targets[:, 0])
    assert found.names == ["label 1", "label 2", "label 3"]
    assert torch.equal(found.classes, episode.targets[:, 0])
    torch.testing.assert_close(found.slots.read.sum(1), torch.full((9,), 2.0))
    # A head's write weights are a mean of its last read weights and one slot.
    torch.testing.assert_close(found.slots.written.sum(1), torch.full((9,), 2.0), rtol=1e-4, atol=1e-4)
    assert (found.slots.usage[1:] >= 0.95 * found.slots.usage[:-1] - 1e-6).all()
