"""Checkpoint files: whatever is damaged or no run's is refused in one line that names the file, and older ones load."""

import copy
import gzip
import json
import math
import random
import re
import zipfile
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch.utils.serialization import config as serialization

from mann_fast import cli
from mann_fast.data import Dataset, generate_glyphs
from mann_fast.training import (
    SequenceConfig,
    SequenceTrainer,
    load_checkpoint,
    restore_model,
    resume_run,
    train,
)
from mann_fast.training.checkpoint import VERSION, save_checkpoint, save_weights

OLD = Path(__file__).parent / "checkpoints"
# Of each file that 0.1.0 wrote: what its model answered at the last of four steps.
ANSWERS = {
    "0.1.0-one-shot": [-0.6481454372406006, -0.3929227292537689],
    "0.1.0-copy": [
        *(-0.08513636142015457, 0.48733851313591003, 0.2270851731300354, 0.2545429766178131),
        *(-0.34597063064575195, 0.3312104642391205, -0.39863550662994385, -0.3861900269985199),
    ],
}


def old(name, folder):
    """The folder with the checkpoint that 0.1.0 wrote."""
    (folder / "checkpoint.pt").write_bytes(gzip.decompress((OLD / f"{name}.pt.gz").read_bytes()))
    return folder


@pytest.fixture
def run(tmp_path):
    return old("0.1.0-one-shot", tmp_path)


def same(a, b):
    if isinstance(a, dict):
        return a.keys() == b.keys() and all(same(a[key], b[key]) for key in a)
    if isinstance(a, list):
        return len(a) == len(b) and all(map(same, a, b))
    return torch.equal(a, b) if isinstance(a, torch.Tensor) else type(a) is type(b) and a == b


# Older releases


@pytest.mark.parametrize("name", ANSWERS)
def test_a_checkpoint_of_an_older_release_answers_as_it_did(tmp_path, name):
    content = load_checkpoint(old(name, tmp_path))
    assert content["mann_fast"] == "0.1.0" and content["step"] == 3
    model = restore_model(content)
    x = torch.linspace(-1, 1, 4 * model.layer.input_size).view(4, 1, -1)
    with torch.no_grad():
        torch.testing.assert_close(model(x)[0][-1, 0], torch.tensor(ANSWERS[name]))


@pytest.mark.parametrize("name", ANSWERS)
def test_a_run_of_an_older_release_goes_on(tmp_path, name):
    glyphs = generate_glyphs(12, 4, image_size=3)
    dataset = Dataset(glyphs.select(range(8)), glyphs.select(range(8, 12)), "glyphs")
    config = load_checkpoint(old(name, tmp_path))["config"]
    trainer = resume_run(config, dataset if name == "0.1.0-one-shot" else None, tmp_path)
    assert train(trainer, tmp_path)
    assert load_checkpoint(tmp_path)["step"] == 5


def test_weights_without_a_digest_are_those_of_0_1_0(tmp_path, run):
    path = tmp_path / "model.safetensors"
    save_weights(path, load_checkpoint(run))
    (plain := tmp_path / "plain").touch()
    assert path.stat().st_mode == plain.stat().st_mode  # as the umask says
    with safe_open(path, "pt") as file:
        metadata, state = file.metadata(), {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
    digest = metadata.pop("sha256")
    save_file(state, path, metadata)
    assert same(load_checkpoint(path)["model"], load_checkpoint(run)["model"])
    save_file(state, path, {**metadata, "sha257": digest})
    with pytest.raises(ValueError, match="model.safetensors is not a checkpoint of mann_fast, or is damaged"):
        load_checkpoint(path)


# Damage


@pytest.mark.parametrize("file", ["checkpoint.pt", "model.safetensors"])
def test_a_flipped_bit_is_refused_or_changes_nothing(tmp_path, run, file):
    whole = load_checkpoint(run)
    save_weights(tmp_path / "model.safetensors", whole)
    path = tmp_path / file
    whole, data = load_checkpoint(path), path.read_bytes()
    random_bits, refused = random.Random(0), 0
    bits = random_bits.sample(range(8 * len(data)), 200)
    bits += random_bits.sample(range(8 * len(data) - 8 * 2500, 8 * len(data)), 100)  # the archive's directory
    for bit in bits:
        damaged = bytearray(data)
        damaged[bit // 8] ^= 1 << bit % 8
        path.write_bytes(damaged)
        try:
            found = load_checkpoint(path)
        except ValueError as error:
            assert file in str(error)
            refused += 1
        else:
            assert same(found, whole), f"bit {bit}"
    assert refused > 100


def test_an_entry_marked_as_a_folder_is_read_all_the_same(run):
    """One bit of the archive's directory, of which there is no sum: torch.load alone returns memory that nobody wrote."""
    path = run / "checkpoint.pt"
    whole, data = load_checkpoint(run), bytearray(path.read_bytes())
    entry = data.index(b"PK\x01\x02")
    while entry >= 0:
        data[entry + 38] ^= 0x10
        entry = data.find(b"PK\x01\x02", entry + 1)
    path.write_bytes(data)
    assert same(load_checkpoint(run), whole)


def test_a_flipped_bit_is_found_whatever_the_program_has_set(tmp_path, run):
    content = torch.load(run / "checkpoint.pt", weights_only=True)
    with serialization.patch("save.compute_crc32", False):
        save_checkpoint(run / "checkpoint.pt", content)
    assert load_checkpoint(run)["step"] == 3


def test_a_compressed_archive_is_refused_before_it_inflates(tmp_path, monkeypatch, capsys):
    path = tmp_path / "checkpoint.pt"
    with (
        zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as archive,
        archive.open("a/data.pkl", "w") as entry,
    ):
        for _ in range(64):
            entry.write(bytes(1 << 20))
    monkeypatch.setattr(zipfile.ZipFile, "read", lambda *_: pytest.fail("was inflated"))
    monkeypatch.setattr(torch, "load", lambda *_, **__: pytest.fail("was inflated"))
    assert cli.main(["show", "--checkpoint", str(path)]) == 2
    assert_one_line(capsys, path, "not a checkpoint of mann_fast, or is damaged")


def test_entries_that_share_their_bytes_are_refused(tmp_path, run):
    """A bomb without compression: the directory names the same bytes many times."""
    path = run / "checkpoint.pt"
    data = path.read_bytes()
    end = data.rindex(b"PK\x05\x06")
    size, start = (int.from_bytes(data[end + i : end + i + 4], "little") for i in (12, 16))
    directory, times = data[start : start + size], 3
    entries = int.from_bytes(data[end + 10 : end + 12], "little") * times
    tail = bytearray(data[end:])
    tail[8:12] = entries.to_bytes(2, "little") * 2
    tail[12:16] = (size * times).to_bytes(4, "little")
    path.write_bytes(data[:start] + directory * times + tail)
    with pytest.raises(ValueError, match="damaged") as caught:
        load_checkpoint(run)
    assert "larger than the file" in str(caught.value.__cause__)


# Content


def changed(value, *keys):
    """A change of a checkpoint: the entry behind the keys becomes `value`, or goes where that is Ellipsis."""

    def change(content):
        part = content
        for key in keys[:-1]:
            part = part[key]
        if value is ...:
            del part[keys[-1]]
        else:
            part[keys[-1]] = value

    return change


def poison(*keys):
    def change(content):
        for key in keys:
            content = content[key]
        content.view(-1)[-1] = math.nan

    return change


def absurd(name, model_name, size):
    def change(content):
        content["config"][name] = content["model"]["config"][model_name] = size

    return change


WEIGHT = ("model", "state", "classifier.weight")
MOMENT = ("optimizer", "state", 0, "exp_avg")
CHANGES = {
    "no version": (changed(..., "version"), "holds no version"),
    "version of another type": (changed("1", "version"), "version must be of type int, got str"),
    "version 0": (changed(0, "version"), "from 1 to"),
    "newer": (changed(VERSION + 1, "version"), "update mann_fast"),
    "no config": (changed(..., "config"), "holds no config"),
    "config is a list": (changed([], "config"), "config must be of type dict"),
    "setting missing": (changed(..., "config", "lr"), "lr"),
    "setting of another type": (changed("3", "config", "ways"), "ways must be of type int"),
    "setting without a name": (changed(3, "config", 3), "settings must have names"),
    "no step": (changed(..., "step"), "holds no step"),
    "negative step": (changed(-1, "step"), "step must be a finite number from 0 up, got -1"),
    "step is a bool": (changed(True, "step"), "step must be of type int, got bool"),
    "step beyond the last": (changed(10**30, "step"), "at most steps"),
    "no data": (changed(..., "data"), "holds no data.drawn"),
    "no model": (changed(..., "model"), "holds no model.config"),
    "no state": (changed(..., "model", "state"), "holds no model.state"),
    "model of other sizes": (changed(3, "model", "config", "num_heads"), "num_heads = 1"),
    "model with the axes swapped": (changed(True, "model", "config", "batch_first"), "batch_first"),
    "model of an unknown option": (changed(1, "model", "config", "colour"), "makes no model.*colour"),
    "weight missing": (changed(..., *WEIGHT), "lacks classifier.weight"),
    "weight of another name": (changed(torch.zeros(1), "model", "state", "x"), "must not have x"),
    "weight is a list": (changed([1.0], *WEIGHT), "classifier.weight must be a dense tensor, got list"),
    "weight of another shape": (changed(torch.zeros(2, 3), *WEIGHT), r"\[2, 4\], got torch.float32 \[2, 3\]"),
    "weight of another dtype": (changed(torch.zeros(2, 4).double(), *WEIGHT), "got torch.float64"),
    "weight that is sparse": (changed(torch.eye(2, 4).to_sparse(), *WEIGHT), "dense"),
    "weight that repeats": (changed(torch.zeros(1).expand(2, 4), *WEIGHT), "contiguous"),
    "NaN weight": (poison(*WEIGHT), "classifier.weight has numbers that are not finite"),
    "hidden_size 10**9": (absurd("hidden_size", "hidden_size", 10**9), "model"),
    "hidden_size 10**30": (
        absurd("hidden_size", "hidden_size", 10**30),
        r"hidden_size must be at most 2\^31",
    ),
    "batch 10**30": (changed(10**30, "config", "batch"), r"batch must be at most 2\^31 - 1, got 1000"),
    "steps 10**30": (changed(10**30, "config", "steps"), r"steps must be at most 2\^31 - 1, got 1000"),
    "no moments": (changed({}, "optimizer", "state"), "optimizer.state lacks 0, layer"),
    "moments of a parameter missing": (
        changed(..., "optimizer", "state", 1),
        "optimizer.state lacks 1, layer",
    ),
    "slots 10**12": (absurd("slots", "num_slots", 10**12), "slots"),
    "image_size 10**15": (changed(10**15, "config", "image_size"), r"image_size must be at most 2\^31"),
    "shots 10**30": (changed(10**30, "config", "shots"), ""),
    "no optimizer": (changed(..., "optimizer"), "holds no optimizer.state"),
    "moment of another shape": (changed(torch.zeros(3), *MOMENT), "optimizer.state.0.exp_avg must be"),
    "moment of no parameter": (changed({}, "optimizer", "state", 99), "by the number of a parameter, got 99"),
    "NaN moment": (poison(*MOMENT), "not finite"),
    "no generator": (changed(..., "episodes"), "holds no episodes.generator"),
    "generator cut short": (changed(torch.zeros(3, dtype=torch.uint8), "rng"), "rng is no state"),
    "seconds NaN": (changed(math.nan, "seconds"), "seconds must be a finite number"),
    "interval without steps": (changed(..., "interval", "steps"), "holds no interval.steps"),
    "interval of other shots": (changed(torch.zeros(3), "interval", "accuracy"), "interval.accuracy"),
    "no fingerprint": (changed(..., "data", "fingerprint"), "holds no data.fingerprint"),
}


@pytest.mark.parametrize("name", CHANGES)
def test_what_no_run_writes_is_refused_with_one_line(run, capsys, name):
    path = run / "checkpoint.pt"
    content = torch.load(path, weights_only=True)
    change, words = CHANGES[name]
    change(content)
    torch.save(content, path)
    assert cli.main(["evaluate", "--checkpoint", str(path)]) == 2
    assert re.search(words, assert_one_line(capsys, path))


def assert_one_line(capsys, *words):
    """The one line of the error, which has these words."""
    printed = capsys.readouterr()
    assert printed.out == "" and printed.err.count("\n") == 1
    for word in words:
        assert str(word) in printed.err
    return printed.err


def test_a_task_s_checkpoint_is_checked_too(tmp_path, capsys):
    path = old("0.1.0-copy", tmp_path) / "checkpoint.pt"
    whole = torch.load(path, weights_only=True)
    for key, value, words in (
        ("generator", torch.zeros(1), "generator is no state"),
        ("interval", {"loss": 0.0, "steps": 1}, "interval.error"),
        ("config", {**whole["config"], "addressing": "lrua"}, "addressing = 'lrua'"),
        ("config", {**whole["config"], "task": "regression"}, "input_size"),
    ):
        torch.save({**whole, key: value}, path)
        assert cli.main(["train", "--out", str(tmp_path), "--resume"]) == 2
        assert_one_line(capsys, path, words)


def test_weights_with_damaged_metadata_are_refused(tmp_path, run):
    path = tmp_path / "model.safetensors"
    content = load_checkpoint(run)
    text = {"mann_fast": "0.1.0", "step": 1}
    metadata = {"format": "mann_fast checkpoint", "version": "1", "content": json.dumps(text)}
    for broken in ({"version": "one"}, {"content": "{"}, {"content": "[]"}, {}, {"version": "2"}):
        save_file(content["model"]["state"], path, {**metadata, **broken})
        with pytest.raises(ValueError, match="model.safetensors"):
            load_checkpoint(path)


def test_a_checkpoint_before_the_first_step_loads(tmp_path):
    """Its optimiser has no state yet."""
    trainer = SequenceTrainer(SequenceConfig.of_task("copy", length=1, hidden_size=2, slots=2, slot_size=2))
    state = copy.deepcopy(trainer.state_dict())
    save_checkpoint(tmp_path / "checkpoint.pt", state)
    assert load_checkpoint(tmp_path)["step"] == 0
