"""bAbI: the files as the loader takes them, the model on them, and the command."""

import io
import json
import tarfile
import zipfile

import pytest
import torch
from torch import Generator
from torch.nn import functional as F

from mann_fast import cli
from mann_fast.data.babi import NONE, TASKS, Stories, load_babi
from mann_fast.training import BabiConfig, BabiTrainer, load_checkpoint, restore_model
from mann_fast.training.babi import MEANS, PUBLISHED, answer_logits, measure_babi, wanted_answers
from mann_fast.training.loop import resume_run, start_run, train

STORY = """1 Mary moved to the {0}.
2 John went to the garden.
3 Where is Mary? \t{0}\t1
4 Mary took the milk.
5 What is Mary carrying?\tmilk,apple\t4 2
1 John went to the {0}.
2 Where is John?\t{0}\t1
"""


def write(folder, last="kitchen"):
    """The 40 files of the release, small: each task has a place of its own."""
    folder.mkdir(parents=True)
    for number in TASKS:
        for part in ("train", "test"):
            place = last if number == 20 and part == "test" else f"room{number}"
            (folder / f"qa{number}_some-name_{part}.txt").write_text(STORY.format(place))
    return folder


def text(babi, story):
    return " ".join(babi.vocabulary[word] for word in story.words)


def test_stories_are_words_with_an_answer_wanted_at_each_dash(tmp_path):
    babi = load_babi(write(tmp_path / "en-10k"))
    assert babi.vocabulary[0] == "-" and list(babi.vocabulary[1:]) == sorted(babi.vocabulary[1:])
    assert {"kitchen", "room20", "?", ".", "mary"} < set(babi.vocabulary)
    assert list(babi.train) == list(babi.test) == list(TASKS)
    first, second = babi.train[7]
    assert text(babi, first) == (
        "mary moved to the room7 . john went to the garden . where is mary ? - "
        "mary took the milk . what is mary carrying ? - -"
    )
    wanted = [babi.vocabulary[answer] for answer in first.answers if answer != NONE]
    assert wanted == ["room7", "milk", "apple"]
    assert torch.equal(first.answers != NONE, first.words == 0) and first.words.dtype == torch.int64
    assert text(babi, second) == "john went to the room7 . where is john ? -"
    assert text(babi, babi.test[20][1]).startswith("john went to the kitchen")


def test_a_batch_is_padded_and_says_how_long_each_story_is(tmp_path):
    babi = load_babi(write(tmp_path / "en-10k"))
    words, answers, lengths = Stories.of(babi.train[3])
    assert lengths.tolist() == [29, 11] and words.shape == answers.shape == (29, 2)
    assert (answers[11:, 1] == NONE).all() and torch.equal(answers[:11, 1], babi.train[3][1].answers)
    drawn = babi.sample(400, Generator().manual_seed(0))
    every = [story for stories in babi.train.values() for story in stories]
    seen = {next(at for at, story in enumerate(every) if story is found) for found in drawn}
    assert len(seen) == 40


def archives(folder, name):
    """The release as a tar.gz and a zip, with another language in it."""
    paths = folder / f"{name}.tar.gz", folder / f"{name}.zip"
    with tarfile.open(paths[0], "w:gz") as tar, zipfile.ZipFile(paths[1], "w") as packed:
        for language in ("en", "en-10k"):
            for file in sorted((folder / "en-10k").iterdir()):
                inside = f"tasks_1-20_v1-2/{language}/{file.name}"
                content = file.read_bytes() if language == "en-10k" else b"no story"
                entry = tarfile.TarInfo(inside)
                entry.size = len(content)
                tar.addfile(entry, io.BytesIO(content))
                packed.writestr(inside, content)
    return paths


def test_folders_and_archives_give_the_same(tmp_path):
    write(tmp_path / "en-10k")
    expected = load_babi(tmp_path / "en-10k")
    (tmp_path / "outer").mkdir()
    write(tmp_path / "outer" / "tasks_1-20_v1-2" / "en-10k")
    for path in (tmp_path, tmp_path / "outer", *archives(tmp_path, "tasks_1-20_v1-2")):
        found = load_babi(path)
        assert found.vocabulary == expected.vocabulary
        for mine, other in zip(found.test[9], expected.test[9], strict=True):
            assert torch.equal(mine.words, other.words) and torch.equal(mine.answers, other.answers)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("Mary moved.\n", r"qa4_.*line 1 must begin with 1, a space and a sentence, got 'Mary moved.'"),
        ("1 Mary moved.\n3 John went.\n", r"line 2 must begin with 1 or 2"),
        ("1 Where is Mary?\t\t1\n", "line 1 must have a sentence, or a question, a tab, its answer"),
        ("1 Where is Mary?\ta,,b\t1\n", "line 1 must have a sentence"),
        ("1 Where is Mary?\ta\tb\tc\n", "line 1 must have a sentence"),
        ("1  \n", "line 1 must have a sentence"),
        ("\n", "holds no story"),
    ],
)
def test_a_line_of_another_form_is_named(content, message, tmp_path):
    (write(tmp_path / "en-10k") / "qa4_some-name_test.txt").write_text(content)
    with pytest.raises(ValueError, match=message):
        load_babi(tmp_path)


def test_what_is_missing_double_or_damaged_is_named(tmp_path):
    with pytest.raises(FileNotFoundError, match="nowhere does not exist"):
        load_babi(tmp_path / "nowhere")
    with pytest.raises(FileNotFoundError, match=r"lacks 40 files of bAbI's en-10k \(qa1_\*_train.txt"):
        load_babi(tmp_path)
    folder = write(tmp_path / "en-10k")
    whole = archives(tmp_path, "whole")
    (folder / "qa7_other_train.txt").write_text(STORY)
    with pytest.raises(ValueError, match="qa7_other_train.txt and .*expected one file of each task and part"):
        load_babi(folder)
    (folder / "qa7_other_train.txt").unlink()
    (folder / "qa7_some-name_train.txt").unlink()
    with pytest.raises(FileNotFoundError, match=r"lacks 1 file of bAbI's en-10k \(qa7_\*_train.txt\)"):
        load_babi(folder)
    for path in whole:
        content = path.read_bytes()
        path.write_bytes(content[: len(content) // 2])
        with pytest.raises(ValueError, match="is no complete archive"):
            load_babi(path)
    (tmp_path / "text.zip").write_text("no archive")
    with pytest.raises(ValueError, match="is no complete archive .* expected the .tar.gz or .zip"):
        load_babi(tmp_path / "text.zip")


TINY = {
    "addressing": "lrua",  # the whole sequence is one call
    "memory": "",
    "hidden_size": 7,
    "slots": 9,
    "slot_size": 5,
    "heads": 2,
    "steps": 6,
    "log_every": 2,
    "checkpoint_every": 3,
}
OPTIONS = ["--addressing", "lrua", "--hidden-size", "7", "--slots", "9", "--slot-size", "5"]
OPTIONS += ["--heads", "2", "--steps", "2"]


@pytest.fixture(scope="module")
def files(tmp_path_factory):
    return write(tmp_path_factory.mktemp("babi") / "en-10k")


@pytest.mark.parametrize("model", ["mann", "lstm"])
def test_training_resumes_bit_for_bit_and_its_errors_are_those_counted_one_story_at_a_time(
    model, files, tmp_path
):
    data = load_babi(files)
    config = BabiConfig(**{**TINY, "model": model, "data": str(files)})
    whole = start_run(config, data, tmp_path / "whole")
    assert isinstance(whole, BabiTrainer) and train(whole, tmp_path / "whole")
    first = start_run(config, data, tmp_path / "halves")
    assert not train(first, tmp_path / "halves", stop=lambda: first.step == 3)
    second = resume_run(config, data, tmp_path / "halves")
    assert second.step == 3 and train(second, tmp_path / "halves")
    states = [load_checkpoint(tmp_path / part) for part in ("whole", "halves")]
    for a, b in zip(*(state["model"]["state"].values() for state in states), strict=True):
        assert torch.equal(a, b)
    assert states[0]["config"] == config
    restored = restore_model(states[0])
    found = measure_babi(restored, data, 1000)
    for result in found[::7]:
        wrong = [
            restored(torch.eye(len(data.vocabulary))[story.words].unsqueeze(1))[0][t, 0].argmax() != answer
            for story in data.test[result.task]
            for t, answer in enumerate(story.answers)
            if answer != NONE
        ]
        assert result.error == sum(wrong) / 4 and result.guess == (0.5 if result.task != 20 else 1.0)
    other = write(tmp_path / "other", last="room1")
    with pytest.raises(ValueError, match="the stories of --data .* are not those"):
        resume_run(config, load_babi(other), tmp_path / "halves")


def test_the_loss_is_the_mean_over_the_answers_and_falls(files):
    data = load_babi(files)
    config = BabiConfig(
        **{**TINY, "data": str(files), "steps": 40, "lr": 0.03, "batch": 5, "hidden_size": 32}
    )
    trainer = BabiTrainer(config, data)
    drawn = data.sample(5, Generator().manual_seed(config.seed))
    with torch.no_grad():
        one_by_one = [answer_logits(trainer.model, Stories.of([story]), trainer.words) for story in drawn]
    logits = torch.cat(one_by_one).double()
    wanted = torch.cat([wanted_answers(Stories.of([story])) for story in drawn])
    assert logits.shape == (len(wanted), len(data.vocabulary)) and len({len(x) for x in one_by_one}) > 1
    step = trainer.train_step()
    assert step.loss == pytest.approx(F.cross_entropy(logits, wanted).item(), rel=1e-5)
    assert step.error == pytest.approx((logits.argmax(1) != wanted).double().mean().item())
    losses = [trainer.train_step().loss for _ in range(39)]
    assert sum(losses[-5:]) / 5 < 0.75 * step.loss


def test_the_papers_means_are_those_of_their_columns():
    for name, column in PUBLISHED.items():
        assert len(column) == 20
        assert sum(mean for mean, _ in column) / 20 == pytest.approx(MEANS[name][0], abs=0.051)


def test_commands_train_evaluate_and_name_mistakes(files, capsys, tmp_path):
    run = str(tmp_path / "run")
    command = ["train", "--task", "babi", "--data", str(files), "--out", run, *OPTIONS]
    assert cli.main([*command, "--require-learning"]) == 1
    printed, said = capsys.readouterr()
    assert "19: path finding" in printed and "40.7 ± 34.9" in printed and "16.9 ± 5.2" in printed
    assert "learning did not start" in said
    assert cli.main(["train", "--out", run, "--resume", "--steps", "3", "--json"]) == 0
    summary = json.loads(capsys.readouterr().out)
    assert summary["step"] == 3 and len(summary["results"]) == 20
    assert cli.main(["evaluate", "--checkpoint", run, "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["results"] == summary["results"]
    other = write(tmp_path / "other", last="cellar")
    fresh = [*command, "--out", run + "2"]
    for arguments, message in (
        (["evaluate", "--checkpoint", run, "--data", str(other)], "the words of"),
        (["show", "--checkpoint", run], "is a model of the task babi"),
        (["predict", "--checkpoint", run, "--support", ".", "a.png"], "is a model of the task babi"),
        (["train", "--task", "babi", "--out", run + "2"], "--data is needed: the path of the bAbI files"),
        ([*command, "--length", "3"], "--length does not belong to --task babi"),
        ([*fresh, "--memory", "masks=true"], "memory must be options of 'lrua', "),
    ):
        assert cli.main(arguments) == 2
        assert message in capsys.readouterr().err
