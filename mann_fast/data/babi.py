"""The 20 bAbI tasks (Weston et al. 2015, arXiv 1502.05698): stories and questions about them, word by word."""

from __future__ import annotations

import re
import tarfile
import zipfile
import zlib
from collections.abc import Iterator, Sequence
from pathlib import Path, PurePosixPath
from typing import NamedTuple

import torch
from torch import Generator, Tensor
from torch.nn.utils.rnn import pad_sequence

from .images import counted, expand_user, shortened

TASKS = {
    1: "1 supporting fact", 2: "2 supporting facts", 3: "3 supporting facts", 4: "2 argument relations",
    5: "3 argument relations", 6: "yes/no questions", 7: "counting", 8: "lists/sets", 9: "simple negation",
    10: "indefinite knowledge", 11: "basic coreference", 12: "conjunction", 13: "compound coreference",
    14: "time reasoning", 15: "basic deduction", 16: "basic induction", 17: "positional reasoning",
    18: "size reasoning", 19: "path finding", 20: "agent's motivations",
}  # fmt: skip
PARTS = ("train", "test")
FOLDER = "en-10k"  # of the release: English, 10,000 questions of each task for training
ASKED = "-"  # the word in whose place an answer is wanted (Graves et al. 2016)
NONE = -1  # where no answer is wanted

_NAME = re.compile(r"qa(\d+)_[^/]*_(train|test)\.txt")
_WORD = re.compile(r"[.?!,]|[^\s.?!,]+")
_LARGEST = 1 << 26  # bytes of a file; the largest of the release has a quarter of that
_BROKEN = (
    tarfile.TarError,
    zipfile.BadZipFile,
    zlib.error,
    EOFError,
    OSError,
    RuntimeError,
    NotImplementedError,
)


class Story(NamedTuple):
    """words: int64 [T], places in the vocabulary; answers: int64 [T], the word wanted at this step, else NONE."""

    words: Tensor
    answers: Tensor


class Stories(NamedTuple):
    """A batch: words int64 [T, B], answers int64 [T, B], NONE beyond a story's end, and lengths int64 [B]."""

    words: Tensor
    answers: Tensor
    lengths: Tensor

    @classmethod
    def of(cls, stories: Sequence[Story]) -> Stories:
        """Padded to the longest, with the vocabulary's first word."""
        words = pad_sequence([story.words for story in stories])
        answers = pad_sequence([story.answers for story in stories], padding_value=NONE)
        return cls(words, answers, torch.tensor([len(story.words) for story in stories]))


class Babi(NamedTuple):
    """vocabulary: all words of all files, the one of a wanted answer first, the others sorted. train, test: the stories of each
    task, by its number."""

    vocabulary: tuple[str, ...]
    train: dict[int, list[Story]]
    test: dict[int, list[Story]]

    def sample(self, batch: int, generator: Generator) -> list[Story]:
        """Of all tasks' stories for training, each as likely as another (Graves et al. 2016)."""
        sizes = torch.tensor([len(stories) for stories in self.train.values()])
        ends = sizes.cumsum(0)
        found = []
        for at in torch.randint(int(ends[-1]), (batch,), generator=generator):
            task = int(torch.searchsorted(ends, at, right=True))
            found.append(list(self.train.values())[task][int(at - ends[task] + sizes[task])])
        return found


def load_babi(path: str | Path) -> Babi:
    """The files qaN_NAME_train.txt and qaN_NAME_test.txt of the tasks 1 to 20.

    ``path`` is the folder that holds them, or one above it that holds en-10k/ or tasks_1-20_v1-2/en-10k/; or the archive of
    the release as it is downloaded, .tar.gz or .zip, of which en-10k is read. Words are in lower case, punctuation is words of
    its own, numbers of lines and of supporting facts are left out, and each word of an answer, several of which have commas
    between them, stands at a "-" of its own after the question (Graves et al. 2016, Methods).

    Raises FileNotFoundError where there is nothing, or where files are missing, which are named; ValueError for a damaged
    archive, two files of one kind, or a line that is not as the format has it, by file and number.
    """
    path = expand_user(path)
    files: dict[tuple[int, str], tuple[str, bytes]] = {}
    for name, content in _files(path):
        match = _NAME.fullmatch(PurePosixPath(name).name)
        if match is None or int(match[1]) not in TASKS:
            continue
        kind = int(match[1]), match[2]
        if kind in files:
            raise ValueError(
                f"{path} holds {files[kind][0]} and {name}; expected one file of each task and part"
            )
        files[kind] = name, content
    missing = [f"qa{n}_*_{part}.txt" for n in TASKS for part in PARTS if (n, part) not in files]
    if missing:
        raise FileNotFoundError(
            f"{path} lacks {counted(len(missing), 'file')} of bAbI's {FOLDER} ({shortened(missing)}); expected the folder "
            f"{FOLDER} of tasks_1-20_v1-2, or its archive .tar.gz or .zip"
        )
    read = {kind: list(_stories(name, content)) for kind, (name, content) in files.items()}
    every = {word for stories in read.values() for story in stories for pair in story for word in pair}
    vocabulary = (ASKED, *sorted(every - {ASKED, ""}))
    place = {word: at for at, word in enumerate(vocabulary)} | {"": NONE}
    found: dict[str, dict[int, list[Story]]] = {part: {} for part in PARTS}
    for (number, part), stories in sorted(read.items()):
        pairs = [torch.tensor([[place[word] for word in pair] for pair in story]) for story in stories]
        found[part][number] = [Story(*story.unbind(1)) for story in pairs]
    return Babi(vocabulary, **found)


def _files(path: Path) -> Iterator[tuple[str, bytes]]:
    """(name, content) of the files at or in ``path`` that are named as those of the tasks."""
    if not path.exists():
        raise FileNotFoundError(f"{path} does not exist")
    if path.is_dir():
        folders = (path, path / FOLDER, path / "tasks_1-20_v1-2" / FOLDER)
        holding = (folder for folder in folders if any(folder.glob("qa*_*.txt")))
        for file in sorted(next(holding, path).glob("qa*_*.txt")):
            if file.stat().st_size > _LARGEST:
                raise ValueError(f"{file} has {file.stat().st_size:,} bytes; expected up to {_LARGEST:,}")
            yield str(file), file.read_bytes()
        return
    path.open("rb").close()  # OSError where it may not be read; after this, one is damage
    try:
        yield from _archived(path)
    except _BROKEN as error:
        said = next(iter(str(error).splitlines()), type(error).__name__)
        raise ValueError(
            f"{path} is no complete archive ({said}); expected the .tar.gz or .zip of "
            "tasks_1-20_v1-2, or its folder"
        ) from error


def _archived(path: Path) -> Iterator[tuple[str, bytes]]:
    """The same of an archive; one of ``_BROKEN`` where it is damaged."""
    with zipfile.ZipFile(path) if zipfile.is_zipfile(path) else tarfile.open(path) as archive:
        entries = archive.infolist() if isinstance(archive, zipfile.ZipFile) else archive
        for entry in entries:
            of_zip = isinstance(entry, zipfile.ZipInfo)
            name, size = (entry.filename, entry.file_size) if of_zip else (entry.name, entry.size)
            if PurePosixPath(name).parent.name != FOLDER or not _NAME.fullmatch(PurePosixPath(name).name):
                continue
            if size > _LARGEST:
                raise RuntimeError(f"{name} has {size:,} bytes; expected up to {_LARGEST:,}")
            opened = archive.open(entry) if of_zip else archive.extractfile(entry)
            if opened is not None:  # a link or folder of a tar
                with opened:
                    yield name, opened.read(_LARGEST)


def _stories(name: str, content: bytes) -> Iterator[list[tuple[str, str]]]:
    """Of each story the words, each with the answer wanted there or ""."""
    story: list[tuple[str, str]] = []
    before = 0
    lines = content.decode("utf-8", "replace").splitlines()
    for number, line in enumerate(lines, start=1):
        where = f"{name}, line {number}"
        if not line.strip():
            continue
        match = re.fullmatch(r"(\d+) (.*)", line)
        if match is None or int(match[1]) not in (1, before + 1):
            numbers = "1" if before == 0 else f"1 or {before + 1}"
            raise ValueError(f"{where} must begin with {numbers}, a space and a sentence, got {line[:80]!r}")
        if int(match[1]) == 1 and story:
            yield story
            story = []
        before = int(match[1])
        said, *asked = match[2].split("\t")
        words = _WORD.findall(said.lower())
        answers = [word.strip() for word in asked[0].lower().split(",")] if asked else []
        if not words or len(asked) > 2 or not all(answers):
            raise ValueError(
                f"{where} must have a sentence, or a question, a tab, its answer, a tab and the lines that tell it, "
                f"got {line[:80]!r}"
            )
        story += [(word, "") for word in words] + [(ASKED, answer) for answer in answers]
    if not story:
        raise ValueError(f"{name} holds no story")
    yield story
