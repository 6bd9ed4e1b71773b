"""The model that comes with the package: there, small, described, and of use on characters that nobody trained it on."""

import json

import torch

from mann_fast import MANN, cli
from mann_fast.cli.demo import draw_new_glyphs
from mann_fast.data import Episodes, generate_glyphs
from mann_fast.training import evaluate, load_checkpoint, restore_model
from mann_fast.training.checkpoint import PRETRAINED


def test_it_is_small_and_says_where_it_comes_from():
    assert PRETRAINED.stat().st_size < 3_000_000
    note = (PRETRAINED.parent / "README.md").read_text()
    assert "mann-fast train --data omniglot" in note and "MIT" in note
    content = load_checkpoint()
    config = content["config"]
    assert (config.data, config.ways, config.shots, config.labels) == ("omniglot", 5, 10, "onehot")
    assert content["data"]["drawn"]
    assert isinstance(restore_model(content), MANN)


def test_it_tells_invented_characters_apart():
    """Glyphs are no Omniglot characters: chance is 1 in 5."""
    content = load_checkpoint()
    episodes = Episodes(
        generate_glyphs(40, 10, image_size=content["config"].image_size), ways=5, shots=10, seed=1
    )
    accuracy = evaluate(restore_model(content), episodes, 100, labels="onehot", shots=10)
    assert accuracy.mean[1] > 0.6 and accuracy.mean[9] > 0.75


def test_predict_and_show_need_no_training(capsys, tmp_path):
    support, queries = draw_new_glyphs(tmp_path)
    arguments = ["predict", "--support", str(support), "--json", *map(str, queries)]
    assert cli.main(arguments) == 0
    printed = capsys.readouterr()
    assert "trained on drawn characters (Omniglot) and on nothing else" in printed.err
    answers = json.loads(printed.out)["predictions"]
    right = [answer["class"] == answer["image"].rsplit("/", 1)[-1][0] for answer in answers]
    assert sum(right) >= 0.6 * len(right)
    picture = tmp_path / "episode.png"
    assert cli.main(["show", "--data", "glyphs", "--out", str(picture)]) == 0
    assert picture.exists() and "right" in capsys.readouterr().out


def test_the_weights_are_finite_float32():
    state = load_checkpoint()["model"]["state"]
    assert all(x.dtype == torch.float32 and x.isfinite().all() for x in state.values())
