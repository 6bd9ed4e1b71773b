"""Episodes of support and queries: what is shown, what is asked, and that every query is judged apart."""

import json
import re
import shutil
from dataclasses import replace

import pytest
import torch
from PIL import Image
from torch.testing import assert_close

from mann_fast import FewShotLearner, cli
from mann_fast.cli._options import load_data
from mann_fast.data import Episodes, encode_inputs, generate_glyphs
from mann_fast.data.pictures import as_pixels
from mann_fast.training import TrainConfig, load_checkpoint, predict, resume_run, start_run, train
from mann_fast.training.checkpoint import build_model, save_checkpoint, save_weights
from mann_fast.training.config import config_from_dict
from mann_fast.training.plots import plot_learning_curve
from mann_fast.training.prediction import draw_orders, encoded_classes, logits_apart
from mann_fast.training.protocol import Protocol, evaluate_protocol
from mann_fast.training.recall import recall
from mann_fast.training.support import (
    make_episodes,
    measure_accuracy,
    measured_ways,
    sample_support,
    support_accuracy,
    ways_of_step,
)
from mann_fast.training.trainer import Trainer

pytestmark = [pytest.mark.once, pytest.mark.filterwarnings("ignore:only .* classes to train on")]

CONFIG = TrainConfig.of("none", "support", data="glyphs", ways=6, shots=2, hidden_size=16, image_size=8)


@pytest.fixture(scope="module")
def episodes():
    return make_episodes(CONFIG, generate_glyphs(12, 7, image_size=8), seed=0)


@pytest.fixture
def model(episodes):
    torch.manual_seed(0)
    return build_model(CONFIG, episodes.input_size, episodes.num_outputs)


def test_every_class_has_its_examples_and_queries_and_no_image_is_both(episodes):
    drawn = sample_support(episodes, 3, ways=4, shots=2, queries=5)
    for b in range(3):
        labels, counts = drawn.shown[:, b].unique(return_counts=True)
        assert counts.tolist() == [2] * 4
        assert torch.equal(labels, drawn.targets[:, b].unique())
        assert drawn.targets[:, b].bincount()[labels].tolist() == [5] * 4
        images = torch.cat([drawn.examples[:, b], drawn.queries[:, b]]).flatten(1)
        # Glyphs are drawn differently every time, so an image that came twice would be one fewer.
        assert len(images.unique(dim=0)) == 4 * 7


def test_fewer_classes_have_any_of_the_labels(episodes):
    # With always the same few, a new model learns only how many there are, and a query could not tell them apart by memory.
    drawn = sample_support(episodes, 100, ways=2, shots=1)
    assert drawn.shown.unique().tolist() == list(range(6))


@pytest.mark.parametrize("together", [False, True])
def test_a_query_is_one_step_from_the_memory_after_examples_with_their_labels(episodes, model, together):
    drawn = sample_support(episodes, 3, ways=6, shots=2)
    found = logits_apart(model, CONFIG, drawn.examples, drawn.shown, drawn.queries, together=together)
    options = {"ways": 6, "labels": "onehot"}
    _, state = model(encode_inputs(drawn.examples, drawn.shown, **options))
    for image, logits in zip(drawn.queries, found, strict=True):
        asked, _ = model(encode_inputs(image.unsqueeze(0), torch.full((1, 3), -1), **options), state)
        assert_close(logits, asked[0], atol=1e-5, rtol=1e-5)
    assert (found[0] - found[1]).abs().max() > 1e-4  # or the images would not matter


def test_examples_of_a_stream_have_their_labels_a_step_late(episodes, model):
    drawn = sample_support(episodes, 3, ways=6, shots=2)
    stream = replace(CONFIG, layout="stream")
    found = logits_apart(model, stream, drawn.examples, drawn.shown, drawn.queries[:1])
    late = torch.cat([torch.full((1, 3), -1), drawn.shown])
    images = torch.cat([drawn.examples, drawn.queries[:1]])
    logits, _ = model(encode_inputs(images, late, ways=6, labels="onehot"))
    assert_close(found[0], logits[-1], atol=1e-5, rtol=1e-5)


def test_steps_start_with_few_classes_and_come_to_all():
    config = replace(CONFIG, ways=20)
    ways = [ways_of_step(config, step) for step in range(2000)]
    assert ways[0] == 5 and ways[-1] == 20 and ways == sorted(ways)


def test_examples_of_pairs_come_once_more_beside_their_labels(episodes):
    config = TrainConfig.of(
        "none", "stream", data="glyphs", late="pair", ways=6, hidden_size=16, image_size=8
    )
    torch.manual_seed(0)
    model = build_model(config, 2 * 64 + 6, 6)
    drawn = sample_support(episodes, 3, ways=6, shots=2)
    images = torch.cat([drawn.examples, drawn.queries[:1]])
    before = torch.cat([torch.zeros_like(images[:1]), drawn.examples])
    late = torch.cat([torch.full((1, 3), -1), drawn.shown])
    logits, _ = model(encode_inputs(images, late, ways=6, labels="onehot", before=before))
    for together in (False, True):
        found = logits_apart(model, config, drawn.examples, drawn.shown, drawn.queries[:2], together=together)
        assert_close(found[0], logits[-1], atol=1e-5, rtol=1e-5)
        assert (found[0] - found[1]).abs().max() > 1e-4


def test_what_a_pair_writes_comes_from_the_image_beside_its_label(episodes):
    config = TrainConfig.of(
        "none", "stream", data="glyphs", late="pair", ways=6, hidden_size=16, image_size=8, slots=9
    )
    torch.manual_seed(0)
    model = build_model(config, 2 * 64 + 6, 6)
    drawn = sample_support(episodes, 1, ways=3, shots=1)
    examples, classes = drawn.examples[:, 0], torch.arange(3)
    found = recall(model, config, examples, classes, drawn.queries[0], orders=2, seed=4)
    order, _, shown = draw_orders(config, classes, 2, 4)
    for k in range(2):
        pictures = torch.cat([examples[order[:, k]], drawn.queries[0]]).unsqueeze(1)
        late = torch.cat([torch.full((1, 1), -1), shown[:, k : k + 1]])
        before = torch.cat([torch.zeros_like(pictures[:1]), pictures[:-1]])
        inputs = encode_inputs(pictures, late, ways=6, labels="onehot", before=before)
        with torch.no_grad():
            _, _, weights = model.layer(inputs, return_weights=True)
        assert_close(found.slots[0, k], weights.read[-1, 0].mean(0))
        held = torch.zeros(9, 4)
        for step, source in enumerate([3, *order[:, k].tolist()]):  # the first writes of no example
            share = weights.write[step, 0].sum(0).clamp(0, 1).unsqueeze(1)
            held += share * (torch.nn.functional.one_hot(torch.tensor(source), 4) - held)
        assert_close(found.holds[0, k], held)


@pytest.mark.parametrize("layout, labels", [("support", "string"), ("stream", "onehot")])
def test_a_curriculum_has_few_classes_first_and_goes_on_in_a_resumed_run(
    tmp_path, monkeypatch, layout, labels
):
    monkeypatch.setattr("mann_fast.training.curriculum.STEPS", 2)
    sizes = {"ways": 6, "shots": 2, "hidden_size": 8, "image_size": 8, "slots": 12, "batch": 2, "steps": 9}
    config = TrainConfig.of("none", layout, data="glyphs", labels=labels, curriculum=2, **sizes)
    shares = iter([0.2, 0.7, 0.4, 0.7, 0.1, 0.6, 0.6, 0.9, 0.9])  # of right answers
    drawn = []
    descend, sample_images = Trainer.descend, Episodes.sample_images

    def with_share(self, loss, accuracy):
        loss, accuracy = descend(self, loss, accuracy)
        accuracy[~accuracy.isnan()] = next(shares)
        return loss, accuracy

    def noted(self, batch, *arguments, **options):
        drawn.append((batch, options["ways"]))
        return sample_images(self, batch, *arguments, **options)

    trainer = start_run(config, load_data(config), tmp_path)
    monkeypatch.setattr(Trainer, "descend", with_share)
    monkeypatch.setattr(Episodes, "sample_images", noted)
    # (0.2 + 0.7) / 2 is too little, (0.7 + 0.4) / 2 is not; fewer classes are as many more episodes.
    assert [trainer.train_step().ways for _ in range(4)] == [2, 2, 2, 4]
    assert drawn == [(6, 2), (6, 2), (6, 2), (2, 4)]
    state = trainer.state_dict()
    resumed = Trainer(config, load_data(config))
    resumed.load_state_dict(state)
    drawn.clear()
    assert [resumed.train_step().ways for _ in range(5)] == [4, 4, 4, 6, 6]
    assert drawn == [(2, 4), (2, 4), (2, 4), (2, 6), (2, 6)]
    monkeypatch.setattr(Episodes, "sample_images", sample_images)
    record = resumed.metrics()
    assert record["ways"] == 6
    good = {**state, "config": config.to_dict()}
    save_checkpoint(tmp_path / "good.pt", good)
    assert load_checkpoint(tmp_path / "good.pt")["curriculum"]["ways"] == 4
    for damage, message in (
        ({"ways": 7, "errors": []}, "curriculum.ways must be from 2 to 6 by its settings, got 7"),
        ({"ways": 4}, "it holds no curriculum.errors"),
    ):
        save_checkpoint(tmp_path / "damaged.pt", {**good, "curriculum": damage})
        with pytest.raises(ValueError, match=message):
            load_checkpoint(tmp_path / "damaged.pt")
    plot_learning_curve(tmp_path / "curve.png", [{**record, "step": 4, "ways": 4}, record], config, "glyphs")
    for wrong in (1, 7, -2):
        with pytest.raises(ValueError, match=f"curriculum must be 0 or from 2 to ways = 6, got {wrong}"):
            replace(config, curriculum=wrong)


def test_checkpoints_from_before_are_of_a_stream():
    old = TrainConfig.of("none", "stream", data="glyphs").to_dict()
    for name in ("layout", "addressing", "memory", "controller"):
        del old[name]
    found = config_from_dict(old)
    assert (found.layout, found.addressing, found.memory) == ("stream", "lrua", "write_target=shared")
    assert found.controller == "lstm"


def test_checkpoints_from_before_have_the_memory_of_their_layout():
    config = TrainConfig.of("none", "support", data="glyphs")
    old = {n: x for n, x in config.to_dict().items() if n not in ("addressing", "memory", "controller")}
    assert config_from_dict(old) == config and config.controller == "feedforward"
    assert config.memory == "write_vector=key write_target=per_head order=read_first"


SIZES = (
    "--layout support --image-size 8 --ways 3 --shots 2 --batch 1 --hidden-size 8 --slot-size 4 --heads 1 --eval-episodes 3"
).split()


def test_a_model_is_trained_resumed_measured_shown_and_used_as_support_says(tmp_path, capsys):
    for index, images in enumerate(generate_glyphs(12, 22, image_size=16).images.unflatten(0, (12, 22))):
        (tmp_path / "pictures" / f"class{index:02}").mkdir(parents=True)
        for k, pixels in enumerate(images):
            place = tmp_path / "pictures" / f"class{index:02}" / f"{k}.png"
            Image.fromarray(255 - pixels.numpy()).save(place)
    whole, halves = tmp_path / "whole", tmp_path / "halves"
    training = ["train", "--data", str(tmp_path / "pictures"), *SIZES]
    assert cli.main([*training, "--steps", "4", "--out", str(whole)]) == 0
    said = capsys.readouterr()
    assert "support and queries" in said.err and "after 1 example of each class is right" in said.err
    assert re.search(
        r"examples of each class.*5 queries of each of 3 classes, each judged apart", said.out, re.DOTALL
    )
    config = load_checkpoint(whole)["config"]
    assert (config.layout, config.slots) == ("support", 128)
    (record,) = [json.loads(line) for line in (whole / "metrics.jsonl").read_text().splitlines()]
    assert len(record["heldout_accuracy"]) == len(record["train_accuracy"]) == 2

    dataset = load_data(config)
    first = start_run(config, dataset, halves)
    assert train(first, halves, stop=lambda: first.step == 2) is False
    second = resume_run(config, dataset, halves)
    assert train(second, halves)
    kept = load_checkpoint(whole)["model"]["state"]
    for name, tensor in load_checkpoint(halves)["model"]["state"].items():
        assert torch.equal(tensor, kept[name]), name
    again = json.loads((halves / "metrics.jsonl").read_text().splitlines()[-1])
    assert again["train_accuracy"] == record["train_accuracy"]

    checkpoint = ["--checkpoint", str(whole)]
    assert cli.main(["evaluate", *checkpoint, "--episodes", "3", "--protocol", "2-way-2-shot", "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert len(found["heldout_accuracy"]["mean"]) == 2 and found["protocols"][0]["protocol"] == "2-way-2-shot"
    picture = tmp_path / "episode.png"
    assert cli.main(["show", *checkpoint, "--out", str(picture)]) == 0
    assert re.search(r"\d of 3 right", capsys.readouterr().out) and picture.stat().st_size > 1000

    few = tmp_path / "few"
    for name in ("class00", "class05"):
        shutil.copytree(tmp_path / "pictures" / name, few / name)
    asked = ["--data", str(few), "--protocol", "all"]
    assert cli.main(["evaluate", *checkpoint, *asked, "--episodes", "3", "--streams", "2"]) == 0
    said = capsys.readouterr()
    assert "2-way: the data has 2 classes, and the model was trained to tell up to 3 apart" in said.err
    assert "on few, 2-way, support" in said.out and "5 queries of each of 2 classes" in said.out
    found = json.loads((whole / "evaluation.json").read_text())
    assert (found["ways"], found["chance"], found["heldout_classes"]) == (2, 0.5, 2)
    assert cli.main(["show", *checkpoint, "--data", str(few), "--out", str(picture)]) == 0
    assert re.search(r"\d of 2 right", capsys.readouterr().out)
    shutil.rmtree(few / "class05")
    assert cli.main(["evaluate", *checkpoint, *asked]) == 2
    assert "takes at least 2 classes to tell apart, and there is 1" in capsys.readouterr().err


def test_fewer_classes_are_measured_with_any_of_the_labels_and_a_stream_says_what_it_takes():
    classes = generate_glyphs(4, 7, image_size=8)
    assert measured_ways(CONFIG, classes) == 4 and measured_ways(replace(CONFIG, ways=3), classes) == 3
    few = make_episodes(CONFIG, classes, seed=0, ways=4)
    drawn = sample_support(few, 30, ways=4, shots=1)
    assert {len(labels.unique()) for labels in drawn.shown.T} == {4}
    assert set(drawn.targets.unique().tolist()) == set(range(6))
    stream = replace(CONFIG, layout="stream", shots=3)
    with pytest.raises(
        ValueError, match="streams of 6 classes at a time .* at least 6 classes, and there are 4"
    ):
        measured_ways(stream, classes)


def test_a_learner_shows_examples_as_the_model_was_trained(tmp_path, episodes, model):
    content = {
        "config": CONFIG,
        "model": {"config": model.config, "state": model.state_dict()},
        "mann_fast": "0",
        "step": 0,
        "data": {"drawn": False},
    }
    save_weights(tmp_path / "model.safetensors", content)
    learner = FewShotLearner.load(tmp_path / "model.safetensors", orders=2)
    drawn = sample_support(episodes, 1, ways=3, shots=2)
    learner.learn(drawn.examples[:, 0].numpy(), drawn.shown[:, 0].tolist())
    found = learner.predict_proba(drawn.queries[:, 0].numpy())
    pixels = torch.from_numpy(learner._examples)
    asked = torch.from_numpy(as_pixels(drawn.queries[:, 0].numpy(), 8, False))
    classes = torch.tensor([learner.classes_.tolist().index(label) for label in drawn.shown[:, 0].tolist()])
    expected = predict(model.eval(), CONFIG, pixels, classes, asked, orders=2, seed=0)
    assert_close(torch.from_numpy(found).float(), expected, atol=1e-5, rtol=1e-5)
    late = predict(model, replace(CONFIG, layout="stream"), pixels, classes, asked, orders=2, seed=0)
    assert (late - expected).abs().max() > 1e-3


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"layout": "both"}, "layout must be one of stream, support"),
        ({"layout": "support", "shots": 0}, "shots must be at least 1"),
        ({"layout": "support", "model": "lstm"}, "layout must be 'stream' with model lstm"),
        ({"layout": "stream", "shots": 1}, "shots must be at least 2"),
    ],
)
def test_settings_that_do_not_fit(changes, message):
    with pytest.raises(ValueError, match=message):
        TrainConfig(**changes)


def test_measuring_encodes_every_image_once_and_finds_what_one_by_one_finds():
    config = TrainConfig.of("conv4", "support", ways=3, shots=2, image_size=16, hidden_size=8, slot_size=4)
    classes = generate_glyphs(4, 20, image_size=16, seed=1)
    episodes = make_episodes(config, classes, seed=5)
    torch.manual_seed(0)
    model = build_model(config, episodes.input_size, 3).eval()
    seen = []
    hook = model.encoder.register_forward_hook(lambda _, images, __: seen.append(len(images[0])))
    found = measure_accuracy(model, config, episodes, 12)
    assert sum(seen) == len(classes.images)
    answering, encoded = encoded_classes(model, classes)
    measured = evaluate_protocol(answering, config, encoded, Protocol(3, 2), 12, orders=2)
    assert sum(seen) == 2 * len(classes.images)
    hook.remove()
    again = make_episodes(config, classes, seed=5)
    for shots in (1, 2):
        each = [
            support_accuracy(model, config, sample_support(again, n, ways=3, shots=shots)) for n in (10, 2)
        ]
        assert found.mean[shots - 1] == pytest.approx(torch.cat(each).mean().item(), abs=1e-6)
    assert 0.2 < found.mean[0] < 1  # of an untrained model: not by being always right or wrong
    assert evaluate_protocol(model, config, classes, Protocol(3, 2), 12, orders=2) == measured
