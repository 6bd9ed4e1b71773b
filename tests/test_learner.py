"""FewShotLearner: pictures of any kind in, labels of any kind out, and what scikit-learn and huggingface_hub ask of it."""

import dataclasses
import json
import math
import pickle
import sys
import warnings

import numpy as np
import pytest
import torch
from PIL import Image

import mann_fast
import mann_fast.learner
from mann_fast import MANN, FewShotLearner
from mann_fast.data import encode_inputs, generate_glyphs
from mann_fast.data.episodes import distorted
from mann_fast.data.pictures import as_pixels
from mann_fast.training import TrainConfig, Trainer, load_checkpoint, predict, restore_model
from mann_fast.training.checkpoint import save_checkpoint, save_weights
from mann_fast.training.config import SequenceConfig
from mann_fast.training.prediction import draw_orders, encoded_once, examples_beside
from mann_fast.training.recall import displace
from mann_fast.training.sequences import SequenceTrainer

EACH = 12


@pytest.fixture(scope="module")
def glyphs():
    """Five characters, ink 255 on 0, twelve times each: uint8 [5, 12, 40, 40]."""
    return generate_glyphs(5, EACH, image_size=40, seed=11).images.unflatten(0, (5, EACH)).numpy()


@pytest.fixture
def learner():
    return FewShotLearner.load()


def test_it_learns_and_goes_on_learning(learner, glyphs):
    assert learner.learn(list(glyphs[0, :2]) + list(glyphs[1, :2]), ["ro", "ka", "ka", "ka"]) is learner
    learner.forget().learn(np.concatenate([glyphs[0, :2], glyphs[1, :2]]), ["ro", "ro", "ka", "ka"])
    assert learner.classes_.tolist() == ["ka", "ro"]
    assert learner.score(np.concatenate([glyphs[1, 6:], glyphs[0, 6:]]), ["ka"] * 6 + ["ro"] * 6) > 0.8
    learner.learn(glyphs[2, :2], ["mu", "mu"])
    learner.learn(glyphs[0, 2:4], ["ro", "ro"])
    assert learner.classes_.tolist() == ["ka", "mu", "ro"]
    queries = np.concatenate([glyphs[1, 6:], glyphs[2, 6:], glyphs[0, 6:]])
    assert learner.score(queries, ["ka"] * 6 + ["mu"] * 6 + ["ro"] * 6) > 0.7
    probabilities, deviation = learner.predict_proba(queries, return_std=True)
    assert (
        probabilities.shape == deviation.shape == (18, 3) and (deviation >= 0).all() and deviation.max() > 0
    )
    np.testing.assert_allclose(probabilities.sum(1), 1, atol=1e-12)
    assert learner.predict(queries).tolist() == learner.classes_[probabilities.argmax(1)].tolist()
    np.testing.assert_allclose(learner.predict_proba(queries[4:5]), probabilities[4:5], atol=1e-6)
    assert learner.fit(glyphs[3, :1], ["new"]).classes_.tolist() == ["new"]
    assert learner.predict(glyphs[0, :1]).tolist() == ["new"]


def test_what_torch_makes_by_default_changes_nothing(glyphs):
    def answers():
        new = FewShotLearner.load().learn(glyphs[:3, :2].reshape(6, 40, 40), [0, 0, 1, 1, 2, 2])
        return new.predict_proba(glyphs[:3, 2:5].reshape(9, 40, 40))

    expected = answers()
    torch.set_default_dtype(torch.float64)
    try:
        found = answers()
    finally:
        torch.set_default_dtype(torch.float32)
    np.testing.assert_array_equal(found, expected)


@pytest.mark.parametrize("shipped", ["omniglot", "omniglot-stream"])
def test_recall_follows_the_writes_of_every_example(shipped, glyphs):
    """Beside one order at a time, step by step, of the weights that the layer returns."""
    learner = FewShotLearner.load(shipped, orders=3, views=1)
    learner.learn(glyphs[:2, :2].reshape(4, 40, 40), [0, 0, 1, 1])
    found, slots = learner.recall(glyphs[:2, 5]), learner.config.slots
    assert found.slots.shape == (2, 3, slots) and found.holds.shape == (2, 3, slots, 5)
    torch.testing.assert_close(found.slots.sum(2), torch.ones(2, 3))
    assert (found.holds >= 0).all() and found.holds.sum(3).max() < 1 + 1e-5
    model, config, examples, classes, images = learner._question(glyphs[:2, 5])
    order, _, shown = draw_orders(config, classes, 3, 0)
    shares = torch.zeros(2, 4)
    for k in range(3):
        for q in range(2):
            pictures = torch.cat([examples[order[:, k]], images[q : q + 1]]).unsqueeze(1)
            beside = torch.cat(
                [x.labels for x in examples_beside(config, pictures[:-1], shown[:, k : k + 1])]
            )
            x = encode_inputs(pictures, beside, ways=config.ways, labels="onehot")
            with torch.no_grad():
                _, _, weights = model.layer(model.encode(x), return_weights=True)
            torch.testing.assert_close(found.slots[q, k], weights.read[-1, 0].mean(0))
            held = torch.zeros(slots, 5)
            # Of support and queries a step reads before it writes, so what the image itself writes is read by nothing.
            sources = order[:, k].tolist() if config.layout == "support" else [*order[:, k].tolist(), 4]
            for step, source in enumerate(sources):
                w = weights.write[step, 0].sum(0).clamp(0, 1).unsqueeze(1)
                held = held * (1 - w)
                held[:, source] += w[:, 0]
            torch.testing.assert_close(found.holds[q, k], held)
            shares[q] += weights.read[-1, 0].mean(0) @ held[:, :4] / 3
    torch.testing.assert_close(found.examples, shares)
    alone = learner.recall(glyphs[1:2, 5])
    torch.testing.assert_close(alone.slots, found.slots[1:])


def test_a_write_takes_its_weight_of_a_slot():
    none = torch.zeros(1, 3, 3)
    once = displace(none, torch.tensor([[1.0, 0.5, 0.0]]), torch.tensor([0]))
    assert once[0].tolist() == [[1, 0, 0], [0.5, 0, 0], [0, 0, 0]]
    again = displace(
        once, torch.tensor([[0.25, 2.0, 0.0]]), torch.tensor([1])
    )  # several heads can write more than 1
    assert again[0].tolist() == [[0.75, 0.25, 0], [0, 1, 0], [0, 0, 0]]


def test_recall_says_what_it_cannot(tmp_path, learner, glyphs):
    with pytest.raises(ValueError, match="has learned nothing yet"):
        learner.recall(glyphs[0, :1])
    assert learner.learn(glyphs[0, :2], [0, 1]).recall(glyphs[0, :0]).examples.shape == (0, 2)
    classes = generate_glyphs(2, 2, image_size=20)
    config = TrainConfig(data="glyphs", model="lstm", ways=2, shots=2, batch=2, steps=1)
    save_checkpoint(
        tmp_path / "c.pt", Trainer(config, mann_fast.data.Dataset(classes, classes, "glyphs")).state_dict()
    )
    lstm = FewShotLearner.load(tmp_path / "c.pt").learn(glyphs[0, :2], [0, 1])
    with pytest.raises(ValueError, match="with a memory is needed, this is a LSTMClassifier"):
        lstm.recall(glyphs[0, :1])


@pytest.mark.parametrize("name", [None, "omniglot-stream"])
def test_of_no_images_there_are_no_answers(glyphs, name):
    learner = FewShotLearner.load(name).learn(glyphs[:2, 0], ["ka", "ro"])
    none = glyphs[0, :0]
    probabilities, deviation = learner.predict_proba(none, return_std=True)
    assert probabilities.shape == deviation.shape == (0, 2) and learner.predict(none).shape == (0,)
    assert learner.recall(none).examples.shape == (0, 2)


def test_it_answers_as_predict_does(learner, glyphs):
    content = load_checkpoint()
    learner.set_params(orders=5, random_state=3).learn(glyphs[:2, :3].reshape(6, 40, 40), [7, 7, 7, 4, 4, 4])
    size = content["config"].image_size
    examples, queries = (
        torch.from_numpy(as_pixels(x, size)) for x in (glyphs[:2, :3].reshape(6, 40, 40), glyphs[0, 5:])
    )
    classes = torch.tensor([1, 1, 1, 0, 0, 0])
    asked = restore_model(content), content["config"], examples, classes, queries
    wanted = predict(*asked, orders=5, views=8, seed=3)
    np.testing.assert_allclose(learner.predict_proba(glyphs[0, 5:]), wanted, atol=1e-6)
    deviation = learner.set_params(orders=1).predict_proba(glyphs[0, 5:], return_std=True)[1]
    assert (deviation == 0).all()
    learner.set_params(orders=5, views=1)
    once = predict(*asked, orders=5, seed=3)
    np.testing.assert_allclose(learner.predict_proba(glyphs[0, 5:]), once, atol=1e-6)
    assert (once - wanted).abs().max() > 1e-3
    with pytest.raises(ValueError, match="views must be at least 1, got 0"):
        learner.set_params(views=0).predict(glyphs[0])


@pytest.mark.parametrize("colour", [False, True])
def test_features_are_the_mean_over_views_that_depend_on_no_other_image(colour):
    shape = (3, 16, 16) if colour else (1, 16, 16)
    torch.manual_seed(0)
    model = MANN(
        math.prod(shape) + 2, 2, 8, encoder="conv4", image_shape=shape, num_slots=8, slot_size=4
    ).eval()
    images = torch.randint(256, (4, 3, *(shape if colour else shape[1:])), dtype=torch.uint8)
    with torch.no_grad():
        _, (once,) = encoded_once(model, images)
        _, (often,) = encoded_once(model, images, views=5)
        _, (alone,) = encoded_once(model, images[1:2, 2:], views=5)
        ways = 2 * torch.rand(4, 6, generator=torch.Generator().manual_seed(0)) - 1
        flat = images.flatten(0, 1)
        seen = [flat.float(), *(distorted(flat, way.expand(12, 6)) for way in ways)]
        expected = sum(model.features(view.reshape(12, *shape) / 255) for view in seen) / 5 * 255
    torch.testing.assert_close(often.flatten(0, 1), expected)
    torch.testing.assert_close(alone[0, 0], often[1, 2])
    assert (once - often).abs().max() > 0.01 * once.abs().max()


def test_a_model_of_pixels_sees_one_view(glyphs):
    learner = FewShotLearner.load("omniglot-stream").learn(glyphs[:2, 0], ["a", "b"])
    found = learner.predict_proba(glyphs[0, 1:4])
    assert (learner.set_params(views=1).predict_proba(glyphs[0, 1:4]) == found).all()


def test_a_model_that_has_seen_nothing_distorted_sees_one_view(learner, glyphs):
    learner.learn(glyphs[:2, 0], ["a", "b"])
    content = learner._content()
    content["config"] = dataclasses.replace(content["config"], augment=False)
    found = learner.predict_proba(glyphs[0, 1:4])
    assert (learner.set_params(views=1).predict_proba(glyphs[0, 1:4]) == found).all()


def test_dark_ink_on_light_paper_is_as_good(learner, glyphs):
    bright = learner.learn(glyphs[:3, 0], [0, 1, 2]).predict_proba(glyphs[0, 1:4])
    dark = learner.fit(255 - glyphs[:3, 0], [0, 1, 2]).predict_proba(255 - glyphs[0, 1:4])
    np.testing.assert_allclose(bright, dark, atol=0.05)


def test_pictures_of_every_kind_are_the_same(glyphs, tmp_path):
    grey = glyphs[0, 0]
    Image.fromarray(grey).save(tmp_path / "a.png")
    colour = np.repeat(grey[..., None], 3, 2)
    kinds = [
        tmp_path / "a.png", str(tmp_path / "a.png"), Image.fromarray(grey), Image.fromarray(colour), grey, grey[None],
        grey[..., None], colour, colour.transpose(2, 0, 1), torch.from_numpy(grey), torch.from_numpy(grey)[None],
        grey / 255, colour / np.float32(255), grey.astype(int), grey.ravel(),
    ]  # fmt: skip
    found = as_pixels(kinds, 20).astype(int)
    assert found.shape == (15, 20, 20) and np.abs(found - found[0]).max() <= 1
    found = as_pixels(kinds, 20, colour=True).astype(int)
    assert found.shape == (15, 3, 20, 20) and np.abs(found - found[0]).max() <= 1
    ink = (grey > 127) * np.uint8(255)
    assert (as_pixels([grey > 127], 20) == as_pixels([ink], 20)).all()
    assert (as_pixels((x for x in [ink]), 20) == as_pixels([ink], 20)).all()


def test_lists_of_pictures_of_every_kind_are_the_same(glyphs, tmp_path):
    pictures = glyphs[:3, 0]
    expected = as_pixels(pictures, 20)
    files = [tmp_path / f"{at}.png" for at in range(3)]
    for file, picture in zip(files, pictures, strict=True):
        Image.fromarray(picture).save(file)
    of_objects = np.empty(3, object)
    of_objects[:] = [Image.fromarray(picture) for picture in pictures]
    lists = [
        of_objects, np.array([str(file) for file in files]), np.array(files), tuple(pictures), iter(pictures),
        torch.from_numpy(pictures), torch.from_numpy(pictures).unsqueeze(1), torch.from_numpy(pictures).bfloat16(),
    ]  # fmt: skip
    for images in lists:
        assert np.abs(as_pixels(images, 20).astype(int) - expected).max() <= 2  # bfloat16 has eight bits


class Table:
    """As much of a DataFrame of pandas as is asked of one; iterating gives names of columns."""

    def __init__(self, values):
        self.values, self.ndim = values, values.ndim

    def __iter__(self):
        return iter(f"column{at}" for at in range(self.values.shape[1]))

    def to_numpy(self):
        return self.values


def test_tables_are_their_values(learner, glyphs):
    flat, labels = glyphs[:2, :2].reshape(4, -1), np.array([["a"], ["a"], ["b"], ["b"]], object)
    wanted = learner.fit(flat, ["a", "a", "b", "b"]).predict_proba(flat)
    assert (learner.fit(Table(flat), Table(labels)).predict_proba(Table(flat)) == wanted).all()
    assert learner.classes_.tolist() == ["a", "b"]


@pytest.mark.parametrize(
    ("images", "error", "message"),
    [
        ("one.png", TypeError, r"images must be a sequence of images, got one str: give \[image\]"),
        (3, TypeError, "images must be a sequence of images, got int"),
        (["missing.png"], FileNotFoundError, "missing.png does not exist"),
        ([3.0], TypeError, r"images\[0\] must be a path, a PIL image, or an array .* got float"),
        ([np.zeros((2, 2), complex)], TypeError, "got an array of complex128"),
        (
            [np.zeros((5, 5)), np.zeros((5, 5, 2))],
            ValueError,
            r"images\[1\] cannot be read .* got \[5, 5, 2\]",
        ),
        ([np.full((4, 4), np.nan)], ValueError, "not finite"),
        ([np.full((4, 4, 3), 2.0)], ValueError, "colours must go from 0 to 1, got 2 to 2"),
        (
            [np.zeros(7)],
            ValueError,
            r"images\[0\] cannot be read as an image: its shape must be .* got \[7\]",
        ),
        (
            np.zeros((3, 7)),
            ValueError,
            r"flat squares \[M, S \* S\], got \[3, 7\]; a single image .* \[image\]",
        ),
        (np.zeros(4), ValueError, r"images must be an array \[M, H, W\]"),
        (np.zeros((9, 8, 3)), ValueError, r"\[9, 8, 3\], which looks like a single image .* give \[image\]"),
        ({"a": np.zeros((4, 4))}, TypeError, "images must be a sequence of images, got dict"),
        ({3}, TypeError, "images must be a sequence of images, got set"),
        (np.array(None), TypeError, "images must be a sequence of images, got ndarray"),
        (torch.zeros(1, 4, 4).to_sparse(), TypeError, "images must be a dense tensor"),
        ([torch.zeros(4, 4, device="meta")], TypeError, r"images\[0\] must have values, got .* meta"),
    ],
)
def test_what_is_no_image_is_named(learner, images, error, message):
    with pytest.raises(error, match=message):
        learner.learn(images, [0])
    assert not hasattr(learner, "classes_")


def test_a_file_that_cannot_be_read_is_named(learner, tmp_path):
    (tmp_path / "broken.png").write_bytes(b"\x89PNG\r\n\x1a\n")
    with pytest.raises(ValueError, match="broken.png cannot be read as an image"):
        learner.learn([tmp_path / "broken.png"], ["a"])


def test_limits_are_said(learner, glyphs, tmp_path):
    with pytest.raises(ValueError, match="has learned nothing yet: call learn"):
        learner.predict(glyphs[0])
    learner.learn(glyphs[:2, :10].reshape(20, 40, 40), range(20))
    with pytest.raises(ValueError, match="21 classes were given, .* to tell 20 apart.*--ways 21"):
        learner.learn(glyphs[2, :1], [20])
    assert learner.classes_.tolist() == list(range(20))  # nothing of it was learned
    with pytest.raises(ValueError, match="labels must be one for each of 2 images, got 1"):
        learner.learn(glyphs[0, :2], [1])
    with pytest.raises(TypeError, match=r"labels\[0\] must be hashable, got list"):
        learner.learn(glyphs[0, :1], [[1]])
    with pytest.raises(TypeError, match="labels must be a sequence"):
        learner.learn(glyphs[0, :1], "a")
    with pytest.raises(ValueError, match="orders must be at least 1, got 0"):
        learner.set_params(orders=0).predict(glyphs[0])
    for name, value in (("orders", 2.5), ("orders", "2"), ("views", None), ("random_state", None)):
        with pytest.raises(TypeError, match=f"{name} must be an integer, got {value!r}"):
            FewShotLearner(**{name: value}).learn(glyphs[:2, 0], [0, 1]).predict(glyphs[0])
    with pytest.raises(ValueError, match="X must be at least one image"):
        learner.set_params(orders=1).score(glyphs[0, :0], [])
    with pytest.raises(ValueError, match="Invalid parameter 'order': must be one of checkpoint, orders"):
        learner.set_params(order=3)
    with pytest.raises(FileNotFoundError):
        FewShotLearner.load(tmp_path)
    config = SequenceConfig(hidden_size=4, slots=4, slot_size=4, heads=1, steps=1, length=2)
    save_checkpoint(tmp_path / "copy.pt", SequenceTrainer(config).state_dict())
    with pytest.raises(ValueError, match="is a model of the task copy, not of images"):
        FewShotLearner.load(tmp_path / "copy.pt")


@pytest.mark.parametrize("labels", [[(1, "a"), (2, "b")], [1, "a"], [None, 2], [True, False], [0.5, 0.25]])
def test_labels_of_any_kind(learner, glyphs, labels):
    answers = learner.learn(glyphs[:2, 0], labels).predict(glyphs[:2, 0]).tolist()
    assert answers == labels and set(learner.classes_.tolist()) == set(labels)


@pytest.mark.parametrize(
    "labels",
    [
        np.array([5, 3]), [np.int64(5), np.int64(3)], torch.tensor([5, 3]), [torch.tensor(5), torch.tensor(3)],
        np.array([[5], [3]]), torch.tensor([[5], [3]]), [np.array([5]), np.array([3])], (label for label in (5, 3)),
    ],
)  # fmt: skip
def test_numbers_of_numpy_and_torch_are_labels_like_those_of_python(learner, glyphs, labels):
    learner.learn(glyphs[:2, 0], labels).learn(glyphs[:2, 1], [5, 3])  # of the same two classes
    assert learner.classes_.tolist() == [3, 5] and learner.classes_.dtype.kind == "i"
    assert learner.score(glyphs[:2, 0], [np.float64(5), torch.tensor([3])]) == 1


@pytest.mark.parametrize(
    ("labels", "error", "message"),
    [
        ([1, float("nan")], ValueError, r"labels\[1\] must be a label, got nan"),
        (np.array([np.nan, 1]), ValueError, r"labels\[0\] must be a label, got nan"),
        ([torch.tensor([1, 2]), 1], TypeError, r"labels\[0\] must be a single label, got Tensor \[2\]"),
        (np.zeros((2, 3)), TypeError, r"labels\[0\] must be a single label, got ndarray \[3\]"),
        ({"a", "b"}, TypeError, "labels must be a sequence of labels, got set"),
        ({"a": 1, "b": 2}, TypeError, "labels must be a sequence of labels, got dict"),
        (torch.tensor(3), TypeError, "labels must be a sequence of labels, got Tensor"),
    ],
)
def test_what_is_no_label_is_named(learner, glyphs, labels, error, message):
    with pytest.raises(error, match=message):
        learner.learn(glyphs[:2, 0], labels)
    assert not hasattr(learner, "classes_")


def test_another_checkpoint_of_other_images_is_said(learner, glyphs):
    learner.learn(glyphs[:2, 0], ["a", "b"]).set_params(checkpoint="omniglot-stream")
    for ask in (lambda: learner.predict(glyphs[0]), lambda: learner.learn(glyphs[2, :1], ["c"])):
        with pytest.raises(
            ValueError, match=r"images \[28, 28\], .*'omniglot-stream' reads \[20, 20\]: call forget"
        ):
            ask()
    assert learner.forget().learn(glyphs[:2, 0], ["a", "b"]).predict(glyphs[0, :1]).tolist() == ["a"]


def test_a_model_of_colour_gets_colour_and_photographs_stay_as_they_are(tmp_path, monkeypatch):
    red, white = Image.new("RGB", (30, 30), (200, 10, 10)), Image.new("RGB", (30, 30), "white")
    config = TrainConfig(
        data="x", ways=2, shots=2, hidden_size=8, slots=4, slot_size=4, heads=1, image_size=16, colour=True, encoder="conv4",
        encoder_steps=1,
    )  # fmt: skip
    images = torch.randint(256, (16, 3, 16, 16), dtype=torch.uint8)
    classes = mann_fast.data.ClassImages(images, torch.arange(5) * 4, tuple("abcd"))
    trainer = Trainer(config, mann_fast.data.Dataset(classes, classes, "folder"))
    save_checkpoint(tmp_path / "c.pt", trainer.state_dict())
    seen = []
    original = mann_fast.learner.predict_by_order

    def spy(model, config, examples, classes, images, **options):
        seen.extend([examples, images])
        return original(model, config, examples, classes, images, **options)

    monkeypatch.setattr(mann_fast.learner, "predict_by_order", spy)
    learner = FewShotLearner.load(tmp_path / "c.pt").learn([red, white], ["red", "white"])
    assert learner.predict_proba([red]).shape == (1, 2)
    assert seen[0].shape == (2, 3, 16, 16) and seen[0][0, :, 0, 0].tolist() == [200, 10, 10]
    assert seen[0][1].min() == 255 and seen[1].tolist() == seen[0][:1].tolist()


def test_it_can_be_saved_and_loaded(learner, glyphs, tmp_path):
    learner.set_params(orders=3).learn(glyphs[:3, 0], ["a", "b", "c"])
    wanted = learner.predict_proba(glyphs[0, 1:4])
    assert (pickle.loads(pickle.dumps(learner)).predict_proba(glyphs[0, 1:4]) == wanted).all()
    learner.save_pretrained(tmp_path / "saved")
    card = tmp_path / "saved" / "README.md"
    assert card.read_text().startswith("---\nlibrary_name: mann_fast")
    assert "20-way, support and queries: a model of mann_fast that learns" in card.read_text()
    card.write_text("of its owner")
    learner.save_pretrained(tmp_path / "saved")
    assert card.read_text() == "of its owner"
    assert json.loads((tmp_path / "saved" / "config.json").read_text()) == {
        "orders": 3,
        "views": 8,
        "random_state": 0,
    }
    again = FewShotLearner.from_pretrained(tmp_path / "saved")
    assert again.orders == 3 and not hasattr(again, "classes_")
    assert (again.learn(glyphs[:3, 0], ["a", "b", "c"]).predict_proba(glyphs[0, 1:4]) == wanted).all()
    assert FewShotLearner.from_pretrained(tmp_path / "saved", orders=1).orders == 1
    assert FewShotLearner.load(tmp_path / "saved").config == again.config
    content = load_checkpoint()
    content["config"] = dataclasses.replace(content["config"], data="/home/somebody/letters")
    save_weights(tmp_path / "mine.safetensors", content)
    FewShotLearner.load(tmp_path / "mine.safetensors").save_pretrained(tmp_path / "public")
    assert b"somebody" not in (tmp_path / "public" / "model.safetensors").read_bytes()


def test_folders_may_lie_in_the_home_folder_or_nowhere(learner, tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.setenv("USERPROFILE", str(tmp_path))
    learner.save_pretrained("~/saved")
    assert (tmp_path / "saved" / "model.safetensors").is_file()
    assert FewShotLearner.from_pretrained("~/saved").config == learner.config
    with pytest.raises(FileNotFoundError, match="none does not exist; expected a folder of save_pretrained$"):
        FewShotLearner.from_pretrained(tmp_path / "none")
    monkeypatch.setattr(mann_fast.learner, "HUB_MIXIN", None)
    with pytest.raises(FileNotFoundError, match="a repository with huggingface_hub"):
        FewShotLearner.from_pretrained("user/name")


ESTIMATOR_CHECKS = (
    "estimator_repr",
    "estimator_tags_renamed",
    "estimators_unfitted",
    "get_params_invariance",
    "mixin_order",
    "no_attributes_set_in_init",
    "parameters_default_constructible",
    "positive_only_tag_during_fit",
    "requires_y_none",
    "set_params",
    "valid_tag_types",
)


@pytest.mark.once
def test_it_is_an_estimator_of_scikit_learn(glyphs):
    pytest.importorskip("sklearn")
    from sklearn.base import clone, is_classifier
    from sklearn.exceptions import NotFittedError
    from sklearn.model_selection import GridSearchCV, cross_val_score
    from sklearn.utils import estimator_checks
    from sklearn.utils.validation import check_is_fitted

    with pytest.warns(Warning):  # that checks of tables are left out
        estimator_checks.check_estimator(FewShotLearner())
    for name in ESTIMATOR_CHECKS:  # left out with those of tables, though they need none
        if check := getattr(estimator_checks, f"check_{name}", None):  # some are of later releases
            check("FewShotLearner", FewShotLearner())
    learner = FewShotLearner(orders=2)
    assert is_classifier(learner) and clone(learner).get_params() == learner.get_params()
    with pytest.raises(NotFittedError):
        check_is_fitted(learner)
    with pytest.raises(NotFittedError):
        learner.predict(glyphs[0])
    X, y = glyphs[:3, :6].reshape(18, 40, 40), np.repeat(["a", "b", "c"], 6)
    assert cross_val_score(learner, X, y, cv=3).mean() > 0.6
    search = GridSearchCV(learner, {"orders": [1, 2]}, cv=2).fit(X.reshape(18, -1), y)
    assert search.best_estimator_.classes_.tolist() == ["a", "b", "c"]
    check_is_fitted(search.best_estimator_)


def test_a_lone_picture_is_not_taken_for_several(learner, glyphs):
    learner.fit(list(glyphs[:3, 0]), ["a", "b", "c"])
    assert len(learner.predict(glyphs[:3, 1])) == 3  # grey ones, as they were learned
    with pytest.raises(ValueError, match=r"\[64, 64\] would be 64 flat ones; a single image is given as"):
        learner.predict(np.zeros((64, 64)))
    flat = glyphs[:3].reshape(3, -1, 1600)
    learner.fit(flat[:, 0], ["a", "b", "c"])
    assert len(learner.predict(flat[:, 1])) == 3 and len(learner.predict(glyphs[:5, 1])) == 5
    with pytest.raises(ValueError, match=r"\[3, 40, 40\] would be 3 grey ones"):
        learner.predict(glyphs[:3, 1])
    in_colour = torch.from_numpy(glyphs[:3, :2]).unsqueeze(2).expand(-1, -1, 3, -1, -1)
    learner.fit(in_colour[:, 0], ["a", "b", "c"])
    with pytest.raises(ValueError, match="several also as a list"):
        learner.predict(in_colour[0, 1])
    assert len(learner.predict([in_colour[0, 1]])) == 1
    learner.learn(flat[:, 0], ["a", "b", "c"])  # of both kinds
    assert len(learner.predict(flat[:, 1])) == 3
    learner = pickle.loads(pickle.dumps(learner))
    with pytest.raises(ValueError, match="4 grey ones"):
        learner.recall(glyphs[:4, 0])
    del learner.__dict__["_forms"]  # as an older release has pickled it
    assert len(learner.learn(flat[:, 2], ["a", "b", "c"]).predict(glyphs[:3, 1])) == 3


def test_labels_that_numpy_would_change_are_found_again(learner, glyphs):
    for labels in ([2**63 + 1, 5], [2**64, 5], ["x\0", "y"], [2**63, 2**63 + 1]):
        learner.fit(list(glyphs[:2, 0]), labels)
        assert learner.classes_.tolist() == sorted(labels)
        assert learner.predict(list(glyphs[:2, 0])).tolist() == labels


def test_a_score_may_be_weighted(learner, glyphs):
    learner.fit(list(glyphs[:2, 0]), ["a", "b"])
    asked = list(glyphs[:2, 0])
    assert learner.score(asked, ["a", "a"], sample_weight=[3, 1]) == 0.75
    for weights, message in (
        ([1], r"must be \[2\]"),
        ([1, -1], "at least 0"),
        ([0, 0], "not all 0"),
        ([1, np.nan], "at least 0"),
    ):
        with pytest.raises(ValueError, match=f"sample_weight must be.*{message}|sample_weight.*{message}"):
            learner.score(asked, ["a", "a"], sample_weight=weights)


def test_importing_mann_fast_does_not_read_images():
    assert "mann_fast.learner" in sys.modules and mann_fast.FewShotLearner is FewShotLearner
    with pytest.raises(AttributeError, match="has no attribute 'Learner'"):
        _ = mann_fast.Learner


def test_photographs_shown_to_a_model_of_drawings_are_said():
    colours = np.random.default_rng(0).integers(0, 256, (2, 1, 1, 3), dtype=np.uint8)
    colours[:, ..., 0], colours[:, ..., 2] = 200, 40
    photographs = np.broadcast_to(colours, (2, 24, 24, 3))
    learner = FewShotLearner.load()
    with pytest.warns(UserWarning, match="in colour.*hundreds of classes of other photographs"):
        learner.learn(photographs, ["a", "b"])
    ink = np.full((2, 24, 24, 3), 255, np.uint8)
    ink[:, 8:12] = (30, 30, 200)  # a blue pen
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        learner.fit(iter(ink), ["a", "b"])  # read twice
    assert len(learner._examples) == 2
