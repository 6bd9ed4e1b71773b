"""The models that come with the package: there, small, described, and of use on characters that nobody trained them on."""

import json

import pytest
import torch

from mann_fast import MANN, cli
from mann_fast.cli.demo import draw_new_glyphs
from mann_fast.data import generate_glyphs
from mann_fast.training import load_checkpoint, restore_model
from mann_fast.training.checkpoint import PRETRAINED, SHIPPED, checkpoint_path
from mann_fast.training.support import make_episodes, measure_accuracy

# Ways, shots and layout; and the accuracy to exceed on invented characters, four or five of each class being known.
MODELS = {"omniglot": (20, 5, "support", 0.7), "omniglot-stream": (5, 10, "stream", 0.75)}


def test_these_are_all():
    files = sorted(PRETRAINED.parent.glob("*.safetensors"))
    assert set(SHIPPED) == set(MODELS) and sorted(SHIPPED.values()) == files


@pytest.mark.parametrize("name", MODELS)
def test_it_is_small_and_says_where_it_comes_from(name):
    assert SHIPPED[name].stat().st_size < 3_000_000
    note = (PRETRAINED.parent / "README.md").read_text()
    assert f"`{name}.safetensors`" in note and "mann-fast train --data omniglot" in note and "MIT" in note
    content = load_checkpoint(name)
    config = content["config"]
    assert (config.ways, config.shots, config.layout) == MODELS[name][:3]
    assert (config.data, config.labels) == ("omniglot", "onehot")
    assert content["data"]["drawn"]
    assert isinstance(restore_model(content), MANN)


@pytest.mark.parametrize("name", MODELS)
def test_it_tells_invented_characters_apart(name):
    content = load_checkpoint(name)
    config = content["config"]
    glyphs = generate_glyphs(40, 10, image_size=config.image_size)
    episodes = make_episodes(config, glyphs, seed=1)
    accuracy = measure_accuracy(restore_model(content), config, episodes, 50)
    assert accuracy.mean[4] > MODELS[name][3]


def test_a_file_or_folder_of_that_name_goes_first(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert checkpoint_path("omniglot-stream") == SHIPPED["omniglot-stream"]
    (tmp_path / "omniglot-stream").mkdir()
    with pytest.raises(FileNotFoundError, match="there is no checkpoint omniglot-stream/checkpoint.pt"):
        load_checkpoint("omniglot-stream")


@pytest.mark.parametrize("name", MODELS)
def test_predict_and_show_need_no_training(name, capsys, tmp_path):
    support, queries = draw_new_glyphs(tmp_path)
    arguments = ["predict", "--checkpoint", name, "--support", str(support), "--json", *map(str, queries)]
    assert cli.main(arguments) == 0
    printed = capsys.readouterr()
    assert "trained on drawn characters (Omniglot) and on nothing else" in printed.err
    answers = json.loads(printed.out)["predictions"]
    right = [answer["class"] == answer["image"].rsplit("/", 1)[-1][0] for answer in answers]
    assert sum(right) >= 0.6 * len(right)
    picture = tmp_path / "episode.png"
    assert cli.main(["show", "--checkpoint", name, "--data", "glyphs", "--out", str(picture)]) == 0
    assert picture.exists() and "right" in capsys.readouterr().out


@pytest.mark.parametrize("name", MODELS)
def test_the_weights_are_finite_float32(name):
    state = load_checkpoint(name)["model"]["state"]
    assert all(
        x.dtype == torch.float32 and x.isfinite().all() for x in state.values() if x.is_floating_point()
    )
