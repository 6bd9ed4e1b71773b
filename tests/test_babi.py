"""bAbI: the files as the loader takes them, the model on them, and the command."""

import io
import tarfile
import zipfile

import pytest
import torch
from torch import Generator

from mann_fast.data.babi import NONE, TASKS, Stories, load_babi

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
