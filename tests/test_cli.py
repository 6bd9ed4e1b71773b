"""The command line, at tiny sizes: in this process where that does, in a process of its own where signals or
output count.
"""

import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time
import warnings
import zipfile
from pathlib import Path

import pytest
import torch
from PIL import Image
from safetensors.torch import save_file

import mann_fast
import mann_fast.learner
from mann_fast import cli
from mann_fast.cli import demo, doctor
from mann_fast.cli._explain import PUBLIC, _cuda
from mann_fast.cli._options import load_data
from mann_fast.cli._report import print_accuracy
from mann_fast.cli._signals import StopSignals
from mann_fast.cli._stderr import ForgivingStream
from mann_fast.data import generate_glyphs
from mann_fast.ops._register import OPS
from mann_fast.training import (
    InstanceAccuracy,
    TrainConfig,
    load_checkpoint,
    plots,
    restore_model,
    resume_run,
    start_run,
    train,
)
from mann_fast.training.checkpoint import save_checkpoint, save_weights
from mann_fast.training.files import read_json_lines
from mann_fast.training.lock import LOCK

SIZES = [
    "--image-size",
    "7",
    "--ways",
    "3",
    "--shots",
    "3",
    "--batch",
    "2",
    "--hidden-size",
    "8",
    "--slots",
    "5",
]
SIZES += ["--slot-size", "4", "--heads", "2", "--eval-episodes", "5"]
COMMANDS = ["train", "evaluate", "predict", "demo", "doctor"]

pytestmark = pytest.mark.filterwarnings("ignore:only .* classes to train on")


def write_pictures(folder, classes=8, images=4, seed=0):
    """A folder of glyph classes, black on white, as a user would scan them."""
    glyphs = generate_glyphs(classes, images, image_size=16, seed=seed)
    for index in range(classes):
        (folder / f"class{index}").mkdir(parents=True)
        for number in range(images):
            picture = 255 - glyphs.images[glyphs.starts[index] + number].numpy()
            Image.fromarray(picture).save(folder / f"class{index}" / f"{number}.png")
    return folder


@pytest.fixture(scope="module")
def pictures(tmp_path_factory):
    return write_pictures(tmp_path_factory.mktemp("shared") / "data")


@pytest.fixture(scope="module")
def run_folder(pictures):
    """A finished run of three steps, beside its data."""
    out = pictures.parent / "run"
    arguments = ["train", "--data", str(pictures), "--out", str(out), "--steps", "3", *SIZES]
    assert run_process(*arguments).returncode == 0
    return out


@pytest.fixture
def support(tmp_path):
    return write_pictures(tmp_path / "support", classes=3, images=2, seed=9)


def run_process(*arguments, **environment):
    return subprocess.run(
        [sys.executable, "-m", "mann_fast", *map(str, arguments)],
        capture_output=True,
        text=True,
        timeout=300,
        env={**os.environ, **environment},
    )


def call(capsys, *arguments):
    """Exit status, stdout, stderr of a command run in this process."""
    try:
        status = cli.main([str(argument) for argument in arguments])
    except SystemExit as stop:  # argparse
        status = stop.code
    out, err = capsys.readouterr()
    return status, out, err


def assert_one_line_error(status, err, *words):
    lines = err.strip().splitlines()
    assert status == 2, err
    assert len(lines) == 1 and "error: " in lines[0], err
    for word in words:
        assert str(word) in lines[0]


# train


def test_train_prints_a_table_and_says_where_its_files_are(capsys, tmp_path, pictures):
    out = tmp_path / "a" / "run"
    status, printed, err = call(capsys, "train", "--data", pictures, "--out", out, "--steps", 7, *SIZES)
    assert status == 0
    for instance in ("1st", "2nd", "3rd"):
        assert re.search(rf"{instance} .* \d+\.\d% .* \d+\.\d% to \d+\.\d%", printed)
    assert "4th" not in printed
    for name in ("checkpoint.pt", "curve.png", "metrics.jsonl"):
        assert f"{out / name}" in printed
    assert "3-way: 5 classes to train on (20 with those turned), 3 held out" in err
    assert re.search(r"step 7/7 +loss \d\.\d+ 1st \d+% 2nd \d+% 3rd \d+% +0:00:00 left", err)
    assert "learning did not start: the 2nd image of a class is right" in err


def test_train_json_is_the_summary_alone(tmp_path, pictures):
    out = tmp_path / "run"
    arguments = [
        "train",
        "--data",
        pictures,
        "--out",
        out,
        "--steps",
        3,
        "--model",
        "lstm",
        "--labels",
        "string",
    ]
    done = run_process(*arguments, "--seed", 5, "--no-augment", "--lr", 0.01, "--json", *SIZES)
    assert done.returncode == 0, done.stderr
    summary = json.loads(done.stdout)
    assert summary == json.loads((out / "summary.json").read_text())
    config = summary["config"]
    assert (config["model"], config["labels"], config["seed"], config["lr"]) == ("lstm", "string", 5, 0.01)
    assert config["augment"] is False
    assert summary["train_classes"] == 5
    assert summary["learned"] is False
    assert len(summary["heldout_accuracy"]["mean"]) == 3
    assert summary["heldout_accuracy"]["episodes"] == 5


def test_require_learning_makes_it_the_exit_status(capsys, tmp_path, pictures):
    arguments = ["--data", pictures, "--out", tmp_path / "run", "--steps", 1, "--require-learning", *SIZES]
    status, _, err = call(capsys, "train", *arguments)
    assert status == 1
    assert "learning did not start" in err


def interrupted(number, pictures, out):
    """Start a long run, stop it by a signal; the finished process's status, stdout and stderr."""
    arguments = ["--data", str(pictures), "--out", str(out), "--steps", "100000", *SIZES]
    process = subprocess.Popen(
        [sys.executable, "-m", "mann_fast", "train", *arguments],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env={**os.environ, "OMP_NUM_THREADS": str(torch.get_num_threads())},
    )
    try:
        lines = iter(process.stderr.readline, "")
        assert any("held out," in line for line in lines)  # it trains now
        time.sleep(1)  # for some steps, though none would do
        process.send_signal(number)
        printed, err = process.communicate(timeout=120)
    finally:
        process.kill()
    assert "Traceback" not in err
    return process.returncode, printed, err


def test_ctrl_c_saves_and_resume_gives_what_an_unbroken_run_gives(tmp_path, pictures):
    out, unbroken = tmp_path / "broken", tmp_path / "unbroken"
    status, printed, err = interrupted(signal.SIGINT, pictures, out)
    assert status == 130
    line = err.strip().splitlines()[-1]
    message = rf"stopped at step (\d+) of 100000; .* mann-fast train --out {re.escape(str(out))} --resume"
    step = int(re.fullmatch(message, line)[1])
    assert printed == ""
    broken = load_checkpoint(out)
    assert broken["step"] == step
    assert not [p for p in out.iterdir() if p.name.startswith(".")]  # nothing half-written

    config = broken["config"]
    dataset = load_data(config)
    last = max(
        step + 3, config.log_every
    )  # on a busy machine it may be stopped before the first line of metrics
    for trainer, folder in (
        (resume_run(config, dataset, out), out),
        (start_run(config, dataset, unbroken), unbroken),
    ):
        train(trainer, folder, stop=lambda trainer=trainer: trainer.step >= last)
    first, second = load_checkpoint(out), load_checkpoint(unbroken)
    assert first["step"] == second["step"] == last
    for name, tensor in first["model"]["state"].items():
        assert torch.equal(tensor, second["model"]["state"][name]), name
    metrics = [read_json_lines(folder / "metrics.jsonl") for folder in (out, unbroken)]
    assert [{**record, "seconds": 0} for record in metrics[0]] == [
        {**record, "seconds": 0} for record in metrics[1]
    ]


def test_sigterm_saves_too(tmp_path, pictures):
    status, _, err = interrupted(signal.SIGTERM, pictures, tmp_path / "run")
    assert status == 143
    assert "to go on: mann-fast train" in err
    assert load_checkpoint(tmp_path / "run")["format"]


def test_a_terminal_that_is_closed_stops_a_run_as_sigterm_does(tmp_path, pictures):
    """SIGHUP comes, and nothing more can be said."""
    pty = pytest.importorskip("pty", reason="terminals of one's own are Unix's")
    ours, theirs = pty.openpty()
    arguments = ["--data", str(pictures), "--out", str(tmp_path), "--steps", "100000", *SIZES]
    on_terminal = 'exec <"$0" >"$0" 2>&1; exec "$@"'  # the first that a session opens is its own
    process = subprocess.Popen(
        ["sh", "-c", on_terminal, os.ttyname(theirs), sys.executable, "-m", "mann_fast", "train", *arguments],
        start_new_session=True,
        preexec_fn=lambda: signal.signal(signal.SIGHUP, signal.SIG_DFL),  # though the tests run under nohup
    )
    try:
        said = b""
        while b"loss" not in said:  # the bar: it trains now
            said += os.read(ours, 1000)
        os.close(theirs)
        os.close(ours)
        status = process.wait(timeout=120)
    finally:
        process.kill()
        process.wait()
    assert status == 128 + signal.SIGHUP
    assert load_checkpoint(tmp_path)["step"] > 0
    assert not [p for p in tmp_path.iterdir() if p.name.startswith(".")]


@pytest.mark.skipif(not hasattr(signal, "SIGHUP"), reason="Windows has no SIGHUP")
@pytest.mark.parametrize("ignored", [False, True])
def test_sighup_stops_a_run_except_under_nohup(ignored):
    before = signal.signal(signal.SIGHUP, signal.SIG_IGN if ignored else signal.SIG_DFL)
    try:
        with StopSignals() as stop:
            os.kill(os.getpid(), signal.SIGHUP)
            assert stop() == (not ignored)
            assert ignored or stop.status == 129
        assert signal.getsignal(signal.SIGHUP) == (signal.SIG_IGN if ignored else signal.SIG_DFL)
    finally:
        signal.signal(signal.SIGHUP, before)


@pytest.mark.parametrize("resume", [False, True])
def test_a_second_run_in_a_folder_is_refused_in_one_line(capsys, tmp_path, pictures, run_folder, resume):
    fcntl = pytest.importorskip("fcntl", reason="flock is Unix's")
    arguments = ["train", "--data", pictures, "--out", tmp_path, "--steps", 5, *SIZES]
    if resume:
        shutil.copy(run_folder / "checkpoint.pt", tmp_path)
        arguments = ["train", "--out", tmp_path, "--resume"]
    before = sorted(tmp_path.iterdir())
    with open(tmp_path / LOCK, "w") as held:  # a lock is of the opening, not of the process
        fcntl.flock(held, fcntl.LOCK_EX)
        status, printed, err = call(capsys, *arguments)
        assert printed == ""
        assert_one_line_error(status, err, "another process is training in", tmp_path, "--out")
    assert sorted(tmp_path.iterdir()) == [tmp_path / LOCK, *before]


def test_resume_takes_its_settings_from_the_checkpoint(capsys, tmp_path, pictures):
    out = tmp_path / "run"
    assert call(capsys, "train", "--data", pictures, "--out", out, "--steps", 2, "--lr", 0.5, *SIZES)[0] == 0
    status, _, err = call(capsys, "train", "--out", out, "--resume", "--steps", 4)
    assert status == 0
    assert "from step 2" in err
    content = load_checkpoint(out)
    assert content["step"] == 4
    assert content["config"].lr == 0.5
    assert json.loads((out / "summary.json").read_text())["step"] == 4
    status, _, err = call(capsys, "train", "--out", out, "--resume", "--heads", 1)
    assert_one_line_error(status, err, "heads = 2", "--out")


@pytest.mark.parametrize(
    "memory",
    [
        "--addressing ntm --memory max_shift=2 order=read_first --controller gru",
        "--addressing dnc --memory masks=true link=false",
        "--addressing content --layout support",
        "--addressing sparse --memory num_reads=2 --layout support --controller lstm",
        "--memory --layout support",
    ],
)
def test_images_go_to_any_memory(capsys, tmp_path, support, memory):
    out, picture = tmp_path / "run", tmp_path / "episode.png"
    data = write_pictures(tmp_path / "data", images=9)
    arguments = ["train", "--data", data, "--out", out, *SIZES, *memory.split()]
    status, _, err = call(capsys, *arguments, "--steps", 2)
    assert status == 0, err
    assert call(capsys, "train", "--out", out, "--resume", "--steps", 3)[0] == 0
    content = load_checkpoint(out)
    config = content["config"]
    assert content["step"] == 3 and config.addressing in (*memory.split(), "lrua")
    assert " ".join(part for part in memory.split() if "=" in part) == config.memory
    layer = restore_model(content).layer
    assert {name: getattr(layer, name) for name in config.memory_options} == config.memory_options
    kinds = {"lstm": torch.nn.LSTMCell, "gru": torch.nn.GRUCell, "feedforward": torch.nn.Linear}
    assert type(layer.controller) is kinds[config.controller]
    assert call(capsys, "show", "--checkpoint", out, "--out", picture)[0] == 0
    images = support / "class0" / "0.png"
    status, printed, _ = call(capsys, "predict", "--checkpoint", out, "--support", support, images, "--json")
    assert status == 0 and len(json.loads(printed)["predictions"]) == 1
    status, _, err = call(capsys, "train", "--out", out, "--resume", "--memory", "eps=1e-3")
    assert_one_line_error(status, err, "memory = ", "--out")


# evaluate


def test_evaluate_prints_json_with_intervals_and_draws(capsys, tmp_path, run_folder):
    arguments = ["--checkpoint", run_folder / "checkpoint.pt", "--out", tmp_path / "new", "--json"]
    status, printed, _ = call(capsys, "evaluate", *arguments)
    assert status == 0
    result = json.loads(printed)
    accuracy = result["heldout_accuracy"]
    assert accuracy["episodes"] == 1000
    assert len(accuracy["mean"]) == 3
    for low, mean, high in zip(accuracy["low"], accuracy["mean"], accuracy["high"], strict=True):
        assert 0 <= low < mean < high <= 1
        assert high - low < 0.06
    assert result["step"] == 3
    assert result["heldout_classes"] == 3
    assert json.loads((tmp_path / "new" / "evaluation.json").read_text()) == result
    with Image.open(tmp_path / "new" / "evaluation.png") as picture:
        assert picture.format == "PNG" and picture.width > 500
    assert call(capsys, "evaluate", *arguments)[1] == printed


def test_exported_weights_give_the_run_s_own_answers(tmp_path, run_folder, support):
    weights, images = tmp_path / "model.safetensors", sorted(support.rglob("*.png"))[:2]
    save_weights(weights, load_checkpoint(run_folder))
    of_run, of_weights = (cli.predict.classify(file, support, images) for file in (run_folder, weights))
    assert torch.equal(of_run.probabilities, of_weights.probabilities) and of_run.names == of_weights.names
    save_file({"x": torch.zeros(1)}, weights)
    with pytest.raises(ValueError, match="model.safetensors is not a checkpoint of mann_fast"):
        load_checkpoint(weights)
    weights.write_bytes(weights.read_bytes()[:20])
    with pytest.raises(ValueError, match="model.safetensors is not a checkpoint of mann_fast, or is damaged"):
        load_checkpoint(weights)


def test_evaluate_on_other_data_beside_the_checkpoint(capsys, tmp_path, run_folder):
    other = write_pictures(tmp_path / "other", classes=7, images=3, seed=4)
    status, printed, _ = call(
        capsys, "evaluate", "--checkpoint", run_folder, "--data", other, "--episodes", 20
    )
    assert status == 0
    assert ": 7 classes, 20 episodes" in " ".join(printed.split())
    assert re.search(r"2nd .* \d+\.\d% .* \d+\.\d% to \d+\.\d%", printed)
    assert f"picture: {run_folder / 'evaluation.png'}" in printed


# show


@pytest.mark.parametrize("labels", ["onehot", "string"])
def test_show_draws_an_episode(capsys, tmp_path, pictures, labels):
    out, picture = tmp_path / "run", tmp_path / "episode.png"
    assert (
        call(capsys, "train", "--data", pictures, "--out", out, "--steps", 2, "--labels", labels, *SIZES)[0]
        == 0
    )
    status, printed, _ = call(capsys, "show", "--checkpoint", out, "--episode", 7, "--out", picture)
    assert status == 0
    assert re.search(rf"\d+ of \d+ right; picture: {re.escape(str(picture))}", printed)
    with Image.open(picture) as drawn:
        assert drawn.format == "PNG" and drawn.width > 500


def test_show_needs_a_memory(capsys, tmp_path, pictures):
    arguments = ["train", "--data", pictures, "--out", tmp_path / "run", "--steps", 1, "--model", "lstm"]
    assert call(capsys, *arguments, *SIZES)[0] == 0
    status, _, err = call(capsys, "show", "--checkpoint", tmp_path / "run", "--out", tmp_path / "x.png")
    assert_one_line_error(status, err, "a model with a memory is needed, this is a LSTMClassifier")
    assert not (tmp_path / "x.png").exists()


# predict


def test_predict_gives_each_image_a_probability_per_class(capsys, run_folder, support):
    images = [support / "class0" / "0.png", support / "class2" / "1.png"]
    arguments = ["--checkpoint", run_folder / "checkpoint.pt", "--support", support, *images]
    status, printed, _ = call(capsys, "predict", *arguments, "--json")
    assert status == 0
    result = json.loads(printed)
    assert result["classes"] == {f"class{k}": {"examples": 2} for k in range(3)}
    assert [p["image"] for p in result["predictions"]] == [str(image) for image in images]
    for prediction in result["predictions"]:
        probabilities = prediction["probabilities"]
        assert sum(probabilities.values()) == pytest.approx(1, abs=1e-5)
        assert prediction["class"] == max(probabilities, key=probabilities.get)
        assert list(prediction["deviations"]) == list(probabilities)
        assert all(0 < deviation < 0.5 for deviation in prediction["deviations"].values())
    assert call(capsys, "predict", *arguments, "--json")[1] == printed
    assert call(capsys, "predict", *arguments, "--json", "--seed", 1)[1] != printed

    status, table, _ = call(capsys, "predict", *arguments)
    assert status == 0
    assert table.count("*") == 3  # one in the title, one for each image
    first = result["predictions"][0]
    for p, deviation in zip(first["probabilities"].values(), first["deviations"].values(), strict=True):
        assert f"{p:.0%} ± {100 * deviation:.0f}" in table
    alone = json.loads(call(capsys, "predict", *arguments, "--json", "--orders", 1)[1])
    assert set(alone["predictions"][0]["deviations"].values()) == {0}
    assert "±" not in call(capsys, "predict", *arguments, "--orders", 1)[1]


def test_predict_reads_drawings_as_ink_and_photographs_as_they_are(
    monkeypatch, run_folder, support, tmp_path
):
    for picture in support.rglob("*.png"):
        negative = tmp_path / "negative" / picture.relative_to(support)
        negative.parent.mkdir(parents=True, exist_ok=True)
        with Image.open(picture) as image:
            image.point(lambda value: 255 - value).save(negative)
    content = load_checkpoint(run_folder)
    assert content["data"]["drawn"] is True
    photographs = tmp_path / "photographs.pt"
    content["data"]["drawn"] = False
    save_checkpoint(photographs, {**content, "config": content["config"].to_dict()})

    def read(checkpoint, folder):
        seen = []
        monkeypatch.setattr(
            mann_fast.learner,
            "predict_by_order",
            lambda model, config, examples, classes, images, **options: (
                seen.extend([examples.int(), images.int()]) or torch.ones(1, 1, 3) / 3
            ),
        )
        cli.predict.classify(checkpoint, folder, [folder / "class1" / "1.png"])
        return torch.cat(seen)

    ink = read(run_folder, support)
    assert ink.shape == (7, 7, 7)
    assert ink.float().mean() < 100 and ink.max() == 255  # mostly background
    assert (ink - read(run_folder, tmp_path / "negative")).abs().max() <= 2
    assert (ink - read(photographs, tmp_path / "negative")).abs().max() <= 2
    assert (ink - (255 - read(photographs, support))).abs().max() <= 2


def test_predict_skips_unreadable_examples_and_names_them(run_folder, support):
    (support / "class1" / "broken.png").write_bytes(b"no picture")
    (support / "class1" / "old.tga").write_text("of a kind that is not read")
    done = run_process(
        "predict", "--checkpoint", run_folder, "--support", support, support / "class0" / "0.png"
    )
    assert done.returncode == 0
    assert re.fullmatch(
        r"mann-fast: warning: passed over 1 file that cannot be read as images \(1 \.tga\)\n"
        r"mann-fast: warning: skipped 1 unreadable image file: .*broken\.png \(not an image\)\n",
        done.stderr,
    )


def test_predict_finds_examples_as_train_finds_classes(capsys, run_folder, support, tmp_path):
    def predict(folder, *options):
        image = support / "class0" / "0.png"
        return call(capsys, "predict", "--checkpoint", run_folder, "--support", folder, image, *options)

    for alphabet in ("A", "B"):
        shutil.copytree(support / "class0", tmp_path / "alphabets" / alphabet / "character01")
        shutil.copytree(support / "class1", tmp_path / "parts" / "train" / alphabet)
        shutil.copytree(support / "class1", tmp_path / "deep" / alphabet / "images")
    shutil.copytree(support / "class2", tmp_path / "alphabets" / "B" / "character02")
    shutil.copytree(tmp_path / "parts" / "train", tmp_path / "parts" / "test")
    for folder, names in (
        ("alphabets", ["A/character01", "B/character01", "B/character02"]),
        ("parts/train", ["A", "B"]),
        ("deep", ["A", "B"]),
    ):
        status, printed, _ = predict(tmp_path / folder, "--json")
        assert status == 0 and list(json.loads(printed)["classes"]) == names
    status, _, err = predict(tmp_path / "parts")
    assert_one_line_error(status, err, "--support", "give one of these instead (test, train)")
    for picture in (support / "class1").iterdir():
        picture.unlink()
    (support / "class1" / "1.xyz").write_text("of no kind that is read")
    with warnings.catch_warnings():
        warnings.simplefilter("always")
        status, _, err = predict(support)
    assert status == 2 and "class 'class1' has no readable image" in err.splitlines()[-1]
    assert "only 1 file that cannot be read as images (1 .xyz); put at least one" in err.splitlines()[-1]


# Mistakes


def mistakes(run_folder, support, tmp_path):
    image = support / "class0" / "0.png"
    (tmp_path / "empty").mkdir()
    (tmp_path / "text.png").write_text("text")
    (tmp_path / "file").write_text("")
    predict = ["predict", "--checkpoint", run_folder, "--support"]
    many = write_pictures(tmp_path / "many", classes=4, images=1)
    unreadable = write_pictures(tmp_path / "unreadable", classes=2, images=1)
    (unreadable / "class1" / "0.png").unlink()
    return {
        "no data": (["train", "--out", tmp_path / "x"], ["--data"]),
        "no out": (["train", "--data", "glyphs"], ["--out", "--help"]),
        "absent data": (
            ["train", "--data", tmp_path / "absent", "--out", tmp_path / "x"],
            ["absent", "does not exist"],
        ),
        "empty data": (
            ["train", "--data", tmp_path / "empty", "--out", tmp_path / "x"],
            ["empty", "sub-folder"],
        ),
        "bad number": (["train", "--data", "glyphs", "--out", "x", "--steps", "many"], ["--steps", "many"]),
        "bad setting": (["train", "--data", "glyphs", "--out", "x", "--ways", "1"], ["ways", "at least 2"]),
        "bad choice": (["train", "--data", "glyphs", "--out", "x", "--model", "gru"], ["--model", "lstm"]),
        "run exists": (["train", "--data", support, "--out", run_folder], ["--resume"]),
        "nothing to resume": (["train", "--out", tmp_path / "x", "--resume"], ["no checkpoint"]),
        "out is a file": (
            ["train", "--data", run_folder.parent / "data", "--out", tmp_path / "file" / "x", *SIZES],
            ["directory", tmp_path / "file"],
        ),
        "no command": ([], ["COMMAND", "--help"]),
        "unknown command": (["sing"], ["sing"]),
        "unknown option": (["doctor", "--fast"], ["--fast"]),
        "no checkpoint": (["evaluate", "--checkpoint", tmp_path / "none.pt"], ["none.pt", "mann-fast train"]),
        "not a checkpoint": (["evaluate", "--checkpoint", image], ["0.png", "not a checkpoint"]),
        "one episode": (
            ["evaluate", "--checkpoint", run_folder, "--episodes", "1"],
            ["--episodes", "at least 2"],
        ),
        "no images": ([*predict, support], ["IMAGE"]),
        "absent image": ([*predict, support, tmp_path / "none.png"], ["none.png"]),
        "folder for image": ([*predict, support, support], ["folder"]),
        "absent support": ([*predict, tmp_path / "none", image], ["none", "one sub-folder"]),
        "empty support": ([*predict, tmp_path / "empty", image], ["--support", "no sub-folder with images"]),
        "class without images": ([*predict, unreadable, image], ["class1", "at least one example"]),
        "too many classes": ([*predict, many, image], ["4 classes", "3 apart", "--ways 4"]),
        "no orders": ([*predict, support, image, "--orders", "0"], ["orders"]),
        "no views": ([*predict, support, image, "--views", "0"], ["views", "at least 1, got 0"]),
    }


NAMES = [
    "no data", "no out", "absent data", "empty data", "bad number", "bad setting", "bad choice", "run exists",
    "nothing to resume", "out is a file", "no command", "unknown command", "unknown option", "no checkpoint",
    "not a checkpoint", "one episode", "no images", "absent image", "folder for image", "absent support",
    "empty support", "class without images", "too many classes", "no orders", "no views",
]  # fmt: skip


@pytest.mark.parametrize("name", NAMES)
def test_a_mistake_gets_one_line_that_says_what_to_do(capsys, run_folder, support, tmp_path, name):
    all_mistakes = mistakes(run_folder, support, tmp_path)
    assert list(all_mistakes) == NAMES
    arguments, words = all_mistakes[name]
    status, printed, err = call(capsys, *arguments)
    assert printed == ""
    assert_one_line_error(status, err, *words)
    assert not (tmp_path / "x").exists()


@pytest.mark.parametrize("change", ["encrypted", "another method"])
def test_an_archive_that_cannot_be_read_is_damaged(capsys, tmp_path, change):
    place, new = {"encrypted": (8, 1), "another method": (10, 97)}[change]
    for part in ("background", "evaluation"):
        archive = tmp_path / f"images_{part}.zip"
        with zipfile.ZipFile(archive, "w") as out:
            out.writestr("Greek/character01/0001_01.png", b"")
        raw = bytearray(archive.read_bytes())
        raw[raw.index(b"PK\1\2") + place] = new
        archive.write_bytes(raw)
    status, printed, err = call(capsys, "train", "--data", tmp_path, "--out", tmp_path / "x")
    assert printed == ""
    assert_one_line_error(status, err, "images_background.zip", "0001_01.png", "is damaged")


def test_a_tilde_in_a_path_is_the_home_folder(capsys, monkeypatch, run_folder, support, tmp_path):
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.setenv("USERPROFILE", str(tmp_path))
    (tmp_path / "run").symlink_to(run_folder)
    picture = Path("~") / support.relative_to(tmp_path) / "class0" / "0.png"
    arguments = ["--checkpoint", "~/run", "--support", picture.parents[1], picture, "--json"]
    status, printed, err = call(capsys, "predict", *arguments)
    assert (status, err) == (0, "")
    assert json.loads(printed)["predictions"][0]["image"] == str(support / "class0" / "0.png")
    (tmp_path / "data").symlink_to(run_folder.parent / "data")
    status, _, err = call(capsys, "train", "--data", "~/data", "--out", "~/new", "--steps", 1, *SIZES)
    assert status == 0, err
    assert (tmp_path / "new" / "checkpoint.pt").exists()


def test_an_unreadable_image_to_classify_is_an_error(run_folder, support, tmp_path):
    (tmp_path / "text.png").write_text("text")
    done = run_process("predict", "--checkpoint", run_folder, "--support", support, tmp_path / "text.png")
    assert done.returncode == 2
    assert done.stdout == ""
    assert "text.png is not an image that can be read" in done.stderr.splitlines()[-1]
    assert "Traceback" not in done.stderr


def test_a_failure_of_our_own_says_how_to_get_the_traceback(capsys, monkeypatch):
    def fail(args):
        raise KeyError("lost")

    monkeypatch.setattr(doctor, "run", fail)
    status, _, err = call(capsys, "doctor")
    assert status == 1
    assert err == "mann-fast: error: unexpected KeyError: 'lost' (MANN_FAST_DEBUG=1 shows where)\n"
    monkeypatch.setenv("MANN_FAST_DEBUG", "1")
    assert "Traceback" in call(capsys, "doctor")[2]


# The rest


@pytest.mark.parametrize("command", COMMANDS)
def test_every_command_has_help_with_an_example(capsys, command):
    status, printed, _ = call(capsys, command, "--help")
    assert status == 0
    assert re.search(rf"examples?:\n  mann-fast {command}", printed)


@pytest.mark.parametrize("command", ["train", "evaluate", "show"])
def test_help_names_the_layouts_of_data(capsys, monkeypatch, command):
    monkeypatch.setenv("COLUMNS", "1000")  # no word is parted
    words = " ".join(call(capsys, command, "--help")[1].split())
    for layout in (
        "a sub-folder of images per class",
        "train/",
        "train.csv",
        "a .csv alone",
        ".npz of MedMNIST",
    ):
        assert layout in words


def test_the_examples_in_the_help_can_be_parsed(capsys):
    for command in COMMANDS:
        printed = call(capsys, command, "--help")[1]
        for line in re.findall(r"^  mann-fast (.*?)(?:  +\(.*)?$", printed, re.MULTILINE):
            cli.build_parser().parse_args(line.split())


def test_closed_stderr_says_nothing_elsewhere(tmp_path, pictures):
    """Neither on stdout nor in a file that got its number."""
    arguments = ["--data", str(pictures), "--out", str(tmp_path / "run"), "--steps", "2", "--json", *SIZES]
    command = [sys.executable, "-m", "mann_fast", "train", *arguments, "--require-learning"]
    done = subprocess.run(
        ["sh", "-c", 'exec "$@" 2>&-', "sh", *command], stdout=subprocess.PIPE, text=True, timeout=300
    )
    assert done.returncode == 1  # it has not learned
    assert json.loads(done.stdout) == json.loads((tmp_path / "run" / "summary.json").read_text())


@pytest.mark.parametrize("buffering", [1, -1])
def test_messages_without_a_reader_are_lost_and_the_command_ends_as_it_would(monkeypatch, buffering):
    reader, writer = os.pipe()
    os.close(reader)
    with open(writer, "w", buffering=buffering) as stream:
        monkeypatch.setattr(sys, "stderr", stream)
        assert cli.main(["evaluate", "--checkpoint", "none.pt"]) == 2
        assert sys.stderr is stream
        stream = ForgivingStream(stream)
        stream.flush()
        print("to nobody", file=stream, flush=True)


def test_a_narrow_terminal_cuts_no_number(capsys, monkeypatch):
    monkeypatch.setenv("COLUMNS", "20")
    accuracy = InstanceAccuracy(1000, (0.2, 0.954), (0.1, 0.945), (0.3, 0.962))
    print_accuracy(accuracy, TrainConfig(), "title")
    printed = capsys.readouterr().out
    assert re.search(r"2nd . 95\.4% . 94\.5% to 96\.2%", printed)
    assert "…" not in printed


def test_doctor_says_what_runs(capsys, monkeypatch):
    status, printed, _ = call(capsys, "doctor")
    assert status == 0
    report = {line[:18].strip(): line[19:] for line in printed.splitlines()}
    assert report["mann_fast"] == mann_fast.__version__
    assert report["torch"] == torch.__version__
    assert report["threads"].startswith(str(torch.get_num_threads()))
    assert report["backend reference"] == "runs"
    reason = mann_fast.backends()["cpp"]
    assert report["backend cpp"] == ("runs" if reason is None else f"cannot run: {reason}")

    monkeypatch.setattr(doctor, "backends", lambda: {"cpp": "no compiler was found", "reference": None})
    status, printed, _ = call(capsys, "doctor")
    assert status == 0
    assert re.search(r"^backend cpp +cannot run: no compiler was found$", printed, re.MULTILINE)
    assert re.search(r"^in use +reference", printed, re.MULTILINE)
    monkeypatch.setenv("MANN_FAST_BACKEND", "cobol")
    status, printed, _ = call(capsys, "doctor")
    assert status == 1
    assert re.search(
        r"^in use +none: MANN_FAST_BACKEND must be one of auto, cpp, .* got 'cobol'$", printed, re.MULTILINE
    )


@pytest.mark.parametrize(
    "sizes, said",
    [
        (("--length", str(2**31 - 1), "--batch", str(2**31 - 1)), "bytes|Storage size"),
        (("--batch", str(2**31)), "batch must be at most"),
        (("--hidden-size", "2000000000"), r"bytes|Storage size"),
    ],
    ids=lambda x: x[0] if isinstance(x, tuple) else "",
)
def test_sizes_beyond_memory_are_a_mistake_in_the_call(sizes, said, tmp_path, capsys):
    arguments = ["train", "--task", "copy", "--out", str(tmp_path / "run"), "--steps", "1", *sizes]
    status, printed, err = call(capsys, *arguments)
    assert_one_line_error(status, err)
    assert re.search(said, err) and "unexpected" not in err and not printed


@pytest.mark.skipif(mann_fast.backends()["cpp"] is not None, reason="needs the C++ kernels")
def test_an_instruction_set_that_there_is_not_is_a_mistake_in_the_call(tmp_path):
    out = tmp_path / "run"
    result = run_process("train", "--data", "glyphs", "--out", out, MANN_FAST_CPU_ISA="sse9")
    assert_one_line_error(result.returncode, result.stderr, "MANN_FAST_CPU_ISA names", "got 'sse9'")
    assert not out.exists()
    program = "import mann_fast, torch; mann_fast.ops.least_used(torch.rand(1, 3), 1)"
    result = subprocess.run(
        [sys.executable, "-c", program],
        capture_output=True,
        text=True,
        env={**os.environ, "MANN_FAST_CPU_ISA": "sse9"},
    )
    assert result.returncode == 1
    assert "\nValueError: MANN_FAST_CPU_ISA names an instruction set that" in result.stderr


def test_doctor_explains(capsys):
    status, printed, _ = call(capsys, "doctor", "--explain", "lrua_scan", "128", "40", "4")
    assert status == 0
    assert [line.split()[0] for line in printed.splitlines()] == ["cpp", "reference", "cuda", "triton"]
    assert "20 KiB" in printed
    for op in PUBLIC:
        assert call(capsys, "doctor", "--explain", op, "20", "4", "10")[0] == 0
    _, printed, _ = call(capsys, "doctor", "--explain", "dnc_scan", "256", "4", "10")
    assert "memory and links, 4 and 256 KiB" in printed or "not built" in printed
    assert "each slot counts" in _cuda(OPS["least_used"], "least_used", 256, 1, 1)
    assert "2,048 slots" in _cuda(OPS["least_used"], "least_used", 257, 1, 1)
    for arguments, message in (
        (["lrua_scan", "1", "2", "x"], "--explain takes an op and three numbers, got lrua_scan 1 2 x"),
        (["scan", "1", "2", "3"], "op must be one of content_read, .* got 'scan'"),
        (["lrua_scan", "1", "0", "3"], "D must be at least 1, got 0"),
    ):
        status, _, err = call(capsys, "doctor", "--explain", *arguments)
        assert status == 2 and re.search(message, err)


def test_doctor_finds_a_backend_that_computes_something_else(capsys, monkeypatch):
    monkeypatch.setattr(
        doctor.ops, "content_read", lambda memory, key: (torch.zeros(2, 3, 5), torch.zeros(2, 3, 7))
    )
    status, printed, _ = call(capsys, "doctor")
    assert status == 1
    assert "its results differ" in printed


@pytest.mark.parametrize(
    ("info", "expected"),
    [
        ({"extension": False, "reason": "no C++ compiler was found"}, "not built: no C++ compiler was found"),
        (
            {"extension": True, "torch": "2.13.0", "compiler": "g++ 12", "isas": ["baseline", "avx2"]},
            "built with torch 2.13.0 and g++ 12 for baseline, avx2",
        ),
        (None, "not built"),
    ],
)
def test_doctor_tells_how_the_extension_was_built(monkeypatch, tmp_path, info, expected):
    file = tmp_path / "_build_info.json"
    if info:
        file.write_text(json.dumps(info))
    monkeypatch.setattr(doctor, "BUILD_INFO", file)
    assert expected in doctor.extension()


@pytest.mark.parametrize(
    ("info", "expected"),
    [
        ({"cuda": None, "cuda_reason": "no nvcc was found"}, "not built: no nvcc was found"),
        ({"cuda": "nvcc 13.0", "architectures": ["80", "90"]}, "built with nvcc 13.0 for sm_80, sm_90"),
        (None, "not built"),
    ],
)
def test_doctor_tells_how_the_cuda_kernels_were_built(monkeypatch, tmp_path, info, expected):
    file = tmp_path / "_build_info.json"
    if info:
        file.write_text(json.dumps(info))
    monkeypatch.setattr(doctor, "BUILD_INFO", file)
    assert doctor.cuda_kernels() == expected


def test_demo_trains_predicts_and_fails_where_nothing_was_learned(capsys, tmp_path, monkeypatch):
    small = TrainConfig(steps=2, hidden_size=8, slots=6, slot_size=4, heads=1, batch=1, eval_episodes=4)
    monkeypatch.setattr(demo, "CONFIG", small)
    (tmp_path / "demo" / "new_glyphs" / "examples" / "Z").mkdir(parents=True)  # left by an earlier demo
    (tmp_path / "demo" / "checkpoint.pt").write_bytes(b"")
    status, printed, err = call(capsys, "demo", "--out", tmp_path / "demo")
    assert status == 1
    assert "the demo has not learned: the 2nd image of a class is right" in err
    assert "the 10th image" in err
    assert "10th" in printed
    examples = tmp_path / "demo" / "new_glyphs" / "examples"
    assert sorted(p.name for p in examples.iterdir()) == ["A", "B", "C", "D"]
    assert str(examples) in printed
    with Image.open(tmp_path / "demo" / "predictions.png") as picture:
        assert picture.format == "PNG"
    # The command that it shows gives the same answers.
    command = re.search(r"^mann-fast (predict .*)/\*\.png$", printed, re.MULTILINE)[1].split()
    images = sorted((tmp_path / "demo" / "new_glyphs" / "images").iterdir())
    assert [image.name for image in images] == [
        "A1.png",
        "A2.png",
        "B1.png",
        "B2.png",
        "C1.png",
        "C2.png",
        "D1.png",
        "D2.png",
    ]
    status, table, _ = call(capsys, *command[:-1], *images)
    assert status == 0
    assert table in printed


def test_demo_is_content_with_a_model_that_has_learned(capsys):
    learned = [0.4, 0.71, 0.8, 0.85, 0.87, 0.88, 0.89, 0.9, 0.9, 0.91]
    assert demo.judge(learned) == 0
    assert demo.judge([*learned[:9], 0.90]) == 1
    assert demo.judge([0.4, float("nan"), *learned[2:]]) == 1


def test_the_package_is_light_until_a_command_runs():
    code = "import sys, mann_fast; print(sorted({'matplotlib', 'rich', 'PIL'} & set(sys.modules)))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=120)
    assert done.stdout == "[]\n", done.stderr


def test_version(capsys):
    assert call(capsys, "--version")[1] == f"mann-fast {mann_fast.__version__}\n"


# encoders and the field's protocol


def test_train_with_an_encoder_in_colour_then_show_and_predict(capsys, tmp_path, pictures, support):
    out = tmp_path / "conv"
    sizes = {**dict(zip(SIZES[::2], SIZES[1::2], strict=True)), "--image-size": 16}
    settings = [part for pair in sizes.items() for part in pair]
    arguments = ["--data", pictures, "--out", out, "--encoder", "conv4", "--colour", "--steps", 2, *settings]
    status, _, errors = call(capsys, "train", *arguments)
    assert status == 0 and "controller, conv4, 16 x 16) on" in errors
    content = load_checkpoint(out)
    assert content["model"]["config"]["image_shape"] == [3, 16, 16]
    assert call(capsys, "show", "--checkpoint", out, "--out", tmp_path / "episode.png")[0] == 0
    images = sorted((support / "class1").glob("*.png"))
    asked = ["predict", "--checkpoint", out, "--support", support, *images, "--json"]
    status, printed, _ = call(capsys, *asked)
    assert status == 0 and len(json.loads(printed)["predictions"]) == len(images)
    assert call(capsys, *asked, "--views", 8)[1] == printed != call(capsys, *asked, "--views", 1)[1]
    many = write_pictures(tmp_path / "many", classes=3, images=16, seed=9)
    measured = ["--checkpoint", out, "--data", many, "--episodes", 2, "--protocol", "2-way-1-shot"]
    status, printed, _ = call(capsys, "evaluate", *measured, "--views", 2)
    assert status == 0 and "The features of an image are the mean over 2 views of it." in printed
    (found,) = json.loads((out / "evaluation.json").read_text())["protocols"]
    assert found["views"] == 2
    status, _, errors = call(
        capsys, "train", "--data", pictures, "--out", tmp_path / "l", "--encoder", "conv4", "--model", "lstm"
    )
    assert status == 2 and "encoder must be 'none' with model lstm" in errors


def test_evaluate_by_protocol(capsys, monkeypatch, tmp_path, run_folder):
    arguments = ["--checkpoint", run_folder, "--episodes", 5, "--out", tmp_path]
    status, _, errors = call(capsys, "evaluate", *arguments, "--protocol", "2-way-1-shot")
    assert status == 2 and "2-way-1-shot cannot be measured: a class needs 16 images" in errors
    status, _, errors = call(capsys, "evaluate", *arguments, "--protocol", "often")
    assert status == 2 and "a protocol must be such as 5-way-1-shot" in errors
    status, printed, errors = call(
        capsys, "evaluate", *arguments, "--data", "glyphs", "--protocol", "3-way-2-shot"
    )
    assert status == 0 and re.search(r"3-way-2-shot .* \d+\.\d% .* \d+\.\d% to \d+\.\d%", printed)
    (found,) = json.loads((tmp_path / "evaluation.json").read_text())["protocols"]
    assert found["protocol"] == "3-way-2-shot" and found["low"] <= found["mean"] <= found["high"]
    assert found["orders"] == 1 and "orders of the examples" not in printed
    of_glyphs = [*arguments, "--data", "glyphs", "--protocol", "3-way-2-shot"]
    status, printed, errors = call(capsys, "evaluate", *of_glyphs, "--orders", 3)
    assert status == 0 and "An answer is the mean over 3 orders of the examples." in printed
    drawn = {}
    monkeypatch.setattr(plots, "plot_accuracy", lambda *arguments, **options: drawn.update(options))
    status, _, _ = call(capsys, "evaluate", *of_glyphs, "--streams", 2)
    assert status == 0 and drawn["on"] == "200 classes of glyphs"
    assert [found["protocol"] for found in drawn["protocols"]] == ["3-way-2-shot"]
    assert drawn["streams"]["ways"] == 2
    status, _, errors = call(capsys, "evaluate", *of_glyphs, "--orders", 0)
    assert status == 2 and "--orders must be at least 1, got 0" in errors
    status, _, errors = call(capsys, "evaluate", *arguments, "--orders", 2)
    assert status == 2 and "--orders 2 needs --protocol" in errors
    status, _, errors = call(capsys, "evaluate", *of_glyphs, "--views", 0)
    assert status == 2 and "--views must be at least 1, got 0" in errors
    status, printed, _ = call(capsys, "evaluate", *of_glyphs, "--streams", 3, "--orders", 3, "--views", 2)
    assert status == 0 and printed.count("is the mean over 3") == 2
    assert "An answer is the mean over 3 deals of the labels, each of 2 views of the images." in printed
    found = json.loads((tmp_path / "evaluation.json").read_text())
    assert found["streams"]["views"] == found["protocols"][0]["views"] == 2
    undistorted = shutil.copytree(run_folder, tmp_path / "undistorted") / "checkpoint.pt"
    content = torch.load(undistorted, weights_only=True)
    content["config"]["augment"] = False
    torch.save(content, undistorted)
    status, _, errors = call(
        capsys, "evaluate", *arguments, *of_glyphs[2:], "--checkpoint", undistorted, "--views", 2
    )
    assert status == 2 and "--views 2 needs a model that was trained on distorted images" in errors
    status, printed, errors = call(capsys, "evaluate", *arguments, "--protocol", "all")
    assert status == 0 and "N-way K-shot" not in printed
    assert "5-way-1-shot is left out: the model was trained to tell 3 classes apart" in errors


def test_advice_fits_what_was_learned():
    from mann_fast.cli.train import advice
    from mann_fast.training import SequenceConfig

    def said(config, found, metrics=None):
        return advice(config, found, metrics or {"loss": 1.6})

    config = TrainConfig(ways=5)
    many = {"train_classes": 400, "drawn": True}
    guessing = {"heldout_accuracy": {"mean": [0.2, 0.25, 0.45], "low": [0.15, 0.2, 0.3]}, **many}
    assert said(config, guessing).startswith(
        "learning did not start: the 2nd image of a class is right 25.0%"
    )
    later = {"heldout_accuracy": {"mean": [0.2, 0.35, 0.637], "low": [0.18, 0.33, 0.61]}, **many}
    assert "--steps" in said(config, guessing) and "--steps" in said(config, later)
    assert "has started" in said(config, guessing, {"loss": 1.4}) and "not start" in said(
        config, guessing, {"loss": 1.5}
    )
    assert "not start" in said(config, guessing, {"loss": 0.65, "ways": 2})  # a curriculum's, of two
    support = TrainConfig(ways=20, layout="support")
    slightly = {"heldout_accuracy": {"mean": [0.07, 0.072], "low": [0.06, 0.064]}, **many}
    assert "has started" in said(support, slightly, {"loss": 2.9})
    assert "not start" in said(
        support, {**slightly, "heldout_accuracy": {"mean": [0.07], "low": [0.06]}}, {"loss": 2.9}
    )
    for found in (guessing, later):  # what more steps would not mend
        assert "20 classes to train on are too few" in said(config, {**found, "train_classes": 80})
        photographs = {**found, "drawn": False}
        assert "hundreds of classes of other photographs, by a pretrained network" in said(
            config, {**photographs, "train_classes": 5}
        )
        two = "--encoder conv4 --colour --image-size 84, or a pretrained one, --encoder torchvision/resnet18"
        assert said(config, photographs).endswith(two)
        with_encoder = TrainConfig(ways=5, encoder="conv4", image_size=28)
        assert "28 x 28 shows little of a photograph" in said(with_encoder, photographs)
        large = TrainConfig(ways=5, encoder="conv4", image_size=84)
        assert "--steps" in said(large, photographs) and "photograph" not in said(large, photographs)
    of_later = said(config, later)
    assert (
        of_later.startswith("learning has started but is not far: the 2nd")
        and "the 3rd image of a class 63.7%" in of_later
    )
    assert "another --lr" not in of_later
    copy = SequenceConfig()
    assert "did not start" in said(copy, {"results": [{"mean": 3.9, "high": 3.95, "guess": 4.0}]})
    assert "did not start" in said(copy, {"results": [{"mean": 3.1, "high": 4.2, "guess": 4.0}]})  # in doubt
    assert "has started" in said(copy, {"results": [{"mean": 2.1, "high": 2.2, "guess": 4.0}]})


def test_only_training_warns_of_few_classes_to_train_on(tmp_path, capsys):
    write_pictures(tmp_path / "pictures")
    run = str(tmp_path / "run")
    few = "only 5 classes to train on"
    with warnings.catch_warnings():
        warnings.simplefilter("always")
        training = ["train", "--data", str(tmp_path / "pictures"), "--out", run, "--steps", "1", *SIZES]
        assert cli.main(training) == 0
        assert few in capsys.readouterr().err
        assert cli.main(["show", "--checkpoint", run, "--out", str(tmp_path / "episode.png")]) == 0
        assert cli.main(["evaluate", "--checkpoint", run, "--episodes", "2"]) == 0
        assert few not in capsys.readouterr().err
