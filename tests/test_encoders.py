"""Encoders between the images and the memory: every image through one module, in one call."""

import json
import math
from dataclasses import replace

import pytest
import torch
from torch import nn

from mann_fast import MANN, cli
from mann_fast.cli._options import load_data
from mann_fast.data import Dataset, Episodes, generate_glyphs
from mann_fast.data.images import ClassImages
from mann_fast.models.encoders import Conv4, make_own
from mann_fast.training import TrainConfig, Trainer, load_checkpoint, restore_model
from mann_fast.training.checkpoint import save_checkpoint, save_weights
from mann_fast.training.files import read_json_lines
from mann_fast.training.loop import resume_run, start_run, train
from mann_fast.training.prediction import (
    draw_orders,
    encoded_classes,
    log_probabilities_apart,
    predict_by_order,
)
from mann_fast.training.support import make_episodes

SMALL = {"num_slots": 7, "slot_size": 5, "num_heads": 2}


class Rows(nn.Module):
    """The mean of every row and channel; counts its calls."""

    calls = 0

    def __init__(self):
        super().__init__()
        self.scale = nn.Parameter(torch.tensor(2.0, dtype=torch.float64))

    def forward(self, images):
        self.calls += 1
        assert images.dim() == 4
        return self.scale * images.mean(3)


def test_every_image_goes_through_the_encoder_in_one_call():
    encoder = Rows()
    model = MANN(3 * 4 * 5 + 2, 2, 8, encoder=encoder, image_shape=(3, 4, 5), dtype=torch.float64, **SMALL)
    assert model.layer.input_size == 3 * 4 + 2
    encoder.calls = 0
    images, labels = torch.rand(6, 2, 3, 4, 5, dtype=torch.float64), torch.rand(6, 2, 2, dtype=torch.float64)
    logits, _ = model(torch.cat([images.flatten(2), labels], 2))
    assert encoder.calls == 1
    output, _ = model.layer(torch.cat([2 * images.mean(4).flatten(2), labels], 2))
    torch.testing.assert_close(logits, model.classifier(output), rtol=1e-12, atol=1e-12)
    logits.sum().backward()
    assert encoder.scale.grad.abs() > 0
    alone, _ = model(torch.cat([images.flatten(2), labels], 2)[:, 1])
    torch.testing.assert_close(alone, logits[:, 1], rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("packed", [False, True])
def test_normalized_features_tell_a_direction_and_no_length(packed):
    """The label beside them stays; an image without features stays without."""
    options = {"image_shape": (2, 2, 2), "normalize_features": True, "dtype": torch.float64, **SMALL}
    model = MANN(10, 2, 8, encoder=Rows(), **options)
    images, labels = torch.rand(5, 3, 8, dtype=torch.float64), torch.rand(5, 3, 2, dtype=torch.float64)
    images[2, 1] = 0
    rows = 2 * images.unflatten(2, (2, 2, 2)).mean(4).flatten(2)
    expected = torch.cat([rows / rows.square().mean(2, keepdim=True).sqrt().clamp(min=1e-300), labels], 2)
    x = torch.cat([images, labels], 2)
    dimmed = torch.cat([images * torch.rand(5, 3, 1, dtype=torch.float64), labels], 2)
    for seen in (x, dimmed):
        if packed:
            pack = nn.utils.rnn.pack_padded_sequence(seen, torch.tensor([5, 5, 5]))
            encoded, _ = nn.utils.rnn.pad_packed_sequence(model.encode(pack))
        else:
            encoded = model.encode(seen)
        torch.testing.assert_close(encoded, expected, rtol=1e-12, atol=1e-12)
    again = MANN(**{**model.config, "encoder": Rows()}, dtype=torch.float64)
    assert again.config == model.config


def test_features_of_images_are_what_the_controller_sees_of_them():
    options = {"image_shape": (2, 2, 2), "normalize_features": True, "dtype": torch.float64, **SMALL}
    model, x = MANN(10, 2, 8, encoder=Rows(), **options), torch.rand(5, 3, 10, dtype=torch.float64)
    images = x[..., :8].unflatten(2, (2, 2, 2))
    encoded = model.encode(x)
    assert torch.equal(model.features(images), encoded[..., :4])
    views = [images, images.flip(-1), torch.rand_like(images)]
    mean = torch.stack([model.features(view) for view in views]).mean(0)
    expected = mean / mean.square().mean(2, keepdim=True).sqrt()
    torch.testing.assert_close(model.features(*views), expected, rtol=1e-12, atol=1e-12)
    as_they_are = MANN(10, 2, 8, encoder=Rows(), **{**options, "normalize_features": False})
    expected = torch.stack([as_they_are.features(view) for view in views]).mean(0)
    torch.testing.assert_close(as_they_are.features(*views), expected, rtol=1e-12, atol=1e-12)
    state = model(x[:2])[1]
    for found, expected in zip(model.answer(encoded[2:], state), model(x[2:], state), strict=True):
        torch.testing.assert_close(found, expected)
    for shape in ((2, 2), (5, 2, 2, 3)):
        with pytest.raises(ValueError, match=r"images must be \[..., \*\[2, 2, 2\]\], got"):
            model.features(torch.rand(shape))
    with pytest.raises(ValueError, match="this model has none"):
        MANN(10, 2, 8, **SMALL).features(torch.rand(5, 3, 2, 2, 2))


def test_packed_sequences_are_encoded_too():
    model = MANN(10, 2, 8, encoder=Rows(), image_shape=(2, 2, 2), dtype=torch.float64, **SMALL)
    x, lengths = torch.rand(5, 3, 10, dtype=torch.float64), torch.tensor([5, 3, 1])
    packed, _ = model(nn.utils.rnn.pack_padded_sequence(x, lengths))
    padded, _ = model(x, lengths=lengths)
    torch.testing.assert_close(nn.utils.rnn.pad_packed_sequence(packed)[0], padded, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("batch_first", [False, True])
def test_the_encoder_does_not_see_padding(batch_first):
    """Whatever it holds: no mean of a batch norm in training has it, and no gradient."""
    torch.manual_seed(0)
    options = {"encoder": "conv4", "image_shape": (1, 16, 16), "dtype": torch.float64, **SMALL}
    model = MANN(257, 1, 8, batch_first=batch_first, **options)
    x, lengths = torch.rand(4, 3, 257, dtype=torch.float64), torch.tensor([4, 0, 2])
    padding = torch.arange(4).unsqueeze(1) >= lengths

    def run(value):
        for module in model.modules():
            if isinstance(module, nn.BatchNorm2d):
                module.reset_running_stats()
        model.zero_grad()
        padded = x.masked_fill(padding.unsqueeze(2), value).requires_grad_()
        logits, _ = model(padded.transpose(0, 1) if batch_first else padded, lengths=lengths)
        logits.square().sum().backward()
        seen = [
            padded.grad,
            *(p.grad.clone() for p in model.parameters()),
            *(b.clone() for b in model.buffers()),
        ]
        return [logits, *seen]

    clean, dirty = run(0.5), run(torch.nan)
    for a, b in zip(clean, dirty, strict=True):
        assert torch.equal(a, b)
    assert not clean[1][padding].any()
    rows = model.encoder(x[~padding][:, :256].unflatten(1, (1, 16, 16))).flatten(1)
    features = model.encode(x.transpose(0, 1) if batch_first else x, lengths)
    features = features.transpose(0, 1) if batch_first else features
    torch.testing.assert_close(
        features[~padding][:, :64], rows, rtol=1e-10, atol=1e-12
    )  # summed in another order
    assert not features[padding].any()


@pytest.mark.parametrize("shape", [(0, 3), (4, 0)])
def test_no_images_at_all(shape):
    model = MANN(257, 1, 8, encoder="conv4", image_shape=(1, 16, 16), **SMALL)
    assert model(torch.rand(*shape, 257))[0].shape == (*shape, 1)
    lengths = torch.zeros(shape[1], dtype=torch.int64)
    assert model(torch.rand(*shape, 257), lengths=lengths)[0].shape == (*shape, 1)
    assert not model(torch.rand(2, 3, 257), lengths=torch.zeros(3, dtype=torch.int64))[0].any()


def test_conv4_is_the_fields():
    encoder = Conv4(1)
    assert sum(p.numel() for p in encoder.parameters()) == (9 + 3 * 9 * 64) * 64 + 4 * 2 * 64
    assert encoder(torch.rand(2, 1, 28, 28)).shape == (2, 64, 1, 1)
    model = MANN(28 * 28 + 5, 5, encoder="conv4", image_shape=(1, 28, 28))
    assert model.layer.input_size == 64 + 5
    again = MANN(**model.config)
    again.load_state_dict(model.state_dict())
    x = torch.rand(3, 2, 28 * 28 + 5)
    assert torch.equal(again.eval()(x)[0], model.eval()(x)[0])


@pytest.mark.parametrize("channels", [1, 3])
def test_conv4_in_every_transform(channels):
    model, images = Conv4(channels).double().eval(), torch.rand(2, 3, channels, 20, 20, dtype=torch.float64)
    plain = torch.stack([nn.Sequential.forward(model, x) for x in images])
    torch.testing.assert_close(torch.func.vmap(model)(images), plain)
    torch.testing.assert_close(torch.compile(model)(images[0]), plain[0])
    torch.testing.assert_close(torch.export.export(model, (images[0],)).module()(images[0]), plain[0])
    gradient = torch.func.grad(lambda x: model(x).sum())(images[0])
    x = images[0].clone().requires_grad_()
    nn.Sequential.forward(model, x).sum().backward()
    torch.testing.assert_close(gradient, x.grad)


def test_in_evaluation_an_answer_depends_on_nothing_that_comes_after_it():
    model = MANN(257, 1, 8, encoder="conv4", image_shape=(1, 16, 16), **SMALL)
    x = torch.rand(4, 3, 257)
    model(x)  # statistics of training
    model.eval()
    torch.testing.assert_close(model(x)[0][:2, :1], model(x[:2, :1])[0], rtol=1e-4, atol=1e-5)
    model.train()
    assert not torch.allclose(model(x)[0][:2, :1], model(x[:2, :1])[0], rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        (
            {"encoder": "conv5", "image_shape": (1, 16, 16)},
            ValueError,
            "encoder must be None, 'conv4' or a module",
        ),
        ({"encoder": "conv4"}, TypeError, r"image_shape must be three integers .* got None"),
        ({"encoder": "conv4", "image_shape": (1, 15, 16)}, ValueError, "sides of at least 16"),
        ({"encoder": "conv4", "image_shape": (2, 16, 16)}, ValueError, "input_size must be at least the 512"),
        ({"image_shape": (1, 16, 16)}, ValueError, "image_shape must be None without an encoder"),
        ({"num_images": 2}, ValueError, "num_images must be 1 without an encoder, got 2"),
        ({"num_images": 0}, ValueError, "num_images must be at least 1, got 0"),
        (
            {"encoder": "conv4", "image_shape": (1, 16, 16), "num_images": 2},
            ValueError,
            "input_size must be at least the 512 numbers of 2 images",
        ),
        ({"normalize_features": True}, ValueError, "normalize_features needs an encoder, got True"),
        ({"normalize_features": 1}, TypeError, "normalize_features must be a bool, got int"),
        ({"encoder": nn.Flatten(0), "image_shape": (1, 2, 2)}, ValueError, r"encoder must make \[M, ...\]"),
    ],
)
def test_refuses_what_does_not_fit(options, error, message):
    with pytest.raises(error, match=message):
        MANN(257, 1, 8, **options, **SMALL)


def test_refuses_inputs_of_another_width():
    model = MANN(10, 2, 8, encoder=Rows(), image_shape=(2, 2, 2), dtype=torch.float64, **SMALL)
    with pytest.raises(ValueError, match=r"x must have 10 numbers per step.* got \[5, 3, 9\]"):
        model(torch.rand(5, 3, 9, dtype=torch.float64))


@pytest.mark.parametrize("colour", [False, True])
def test_to_answer_an_encoder_sees_every_picture_once(colour):
    """However many orders of the examples are read, and the answers are those of the whole model."""
    torch.manual_seed(0)
    shape = (3 if colour else 1, 16, 16)
    config = TrainConfig.of("conv4", "support", image_size=16, colour=colour, ways=4, shots=2, slots=16)
    options = {"encoder": "conv4", "image_shape": shape, "normalize_features": True}
    model = MANN(math.prod(shape) + 4, 4, 8, **options, **{**SMALL, "num_slots": 16})
    pictures = torch.randint(0, 256, (11, *(shape if colour else shape[1:])), dtype=torch.uint8)
    model(torch.rand(20, 2, math.prod(shape) + 4))  # statistics of training
    model.eval()
    examples, images, classes = pictures[:6], pictures[6:], torch.tensor([0, 1, 2, 0, 1, 2])
    seen = []
    hook = model.encoder.register_forward_hook(lambda _, given, __: seen.append(len(given[0])))
    found = predict_by_order(model, config, examples, classes, images, orders=5, seed=1)
    assert sum(seen) == 11
    hook.remove()
    order, labels, shown = draw_orders(config, classes, 5, 1)
    repeated = images.unsqueeze(1).expand(-1, 5, *images.shape[1:])
    whole = log_probabilities_apart(model, config, examples[order], shown, repeated, labels).exp()
    torch.testing.assert_close(found, whole, rtol=1e-4, atol=1e-5)
    assert (found[0] - found[1]).abs().max() > 1e-4  # or the images would not matter


def dataset(colour=True):
    classes = generate_glyphs(12, 8, image_size=16, seed=3)
    coloured = [
        ClassImages(part.images.unsqueeze(1).repeat(1, 3, 1, 1), part.starts, part.names) if colour else part
        for part in (classes.select(range(8)), classes.select(range(8, 12)))
    ]
    return Dataset(*coloured, "folder")


TINY = {
    "data": "somewhere", "ways": 2, "shots": 2, "hidden_size": 8, "slots": 6, "slot_size": 4, "heads": 1, "steps": 2,
    "batch": 1, "image_size": 16, "colour": True, "encoder": "conv4",
}  # fmt: skip


def test_a_run_from_before_features_had_one_length_is_not_gone_on_with(tmp_path):
    config, data = TrainConfig(**TINY, encoder_steps=1), dataset()
    started = start_run(config, data, tmp_path)
    assert train(started, tmp_path, stop=lambda: started.step == 1) is False
    content = load_checkpoint(tmp_path)
    del content["model"]["config"]["normalize_features"]
    del content["model"]["state"]["feature_mean"]
    save_checkpoint(tmp_path / "checkpoint.pt", {**content, "config": config.to_dict()})
    assert not restore_model(load_checkpoint(tmp_path)).config[
        "normalize_features"
    ]  # but used as it was trained
    with pytest.raises(ValueError, match="go on with the version that wrote it"):
        resume_run(config, data, tmp_path)


@pytest.mark.parametrize("layout", ["stream", "support"])
@pytest.mark.parametrize("at", [1, 2, 4])
def test_a_checkpoint_keeps_the_encoder_and_a_run_goes_on_with_it_bit_for_bit(at, layout, tmp_path):
    """Stopped while the encoder learns, when it has learned, and while the memory does."""
    sizes = {**TINY, "steps": 6, "encoder_steps": 2, "layout": layout, "log_every": 3}
    config, data = TrainConfig(**sizes), dataset()
    whole = start_run(config, data, tmp_path / "whole")
    losses = []
    assert train(whole, tmp_path / "whole", on_step=lambda result: losses.append(result.loss))
    first = start_run(config, data, tmp_path)
    assert train(first, tmp_path, stop=lambda: first.step == at) is False
    content = load_checkpoint(tmp_path)
    assert (content["config"].encoder, content["config"].colour) == ("conv4", True)
    second = resume_run(config, data, tmp_path)
    again = []
    assert train(second, tmp_path, on_step=lambda result: again.append(result.loss))
    assert again == losses[at:]
    records = [read_json_lines(folder / "metrics.jsonl") for folder in (tmp_path / "whole", tmp_path)]
    for record in sum(records, []):
        del record["seconds"]
    assert records[0] == records[1] and [record["step"] for record in records[0]] == [3, 6]
    for name, tensor in whole.model.state_dict().items():
        assert torch.equal(tensor, second.model.state_dict()[name]), name
    save_weights(tmp_path / "weights.safetensors", content)
    for file in (tmp_path, tmp_path / "weights.safetensors"):
        model = restore_model(load_checkpoint(file))
        assert isinstance(model.encoder, Conv4) and not model.training
    raw = {**second.state_dict()}
    raw["config"] = {**raw["config"], "encoder": "none", "encoder_steps": 0}
    save_checkpoint(tmp_path / "other.pt", raw)
    with pytest.raises(
        ValueError, match="model.config must have encoder = None by its settings, got 'conv4'"
    ):
        load_checkpoint(tmp_path / "other.pt")


@pytest.mark.parametrize("layout", ["stream", "support"])
def test_the_encoder_of_another_run_is_taken_as_it_is(layout, tmp_path):
    """Of other labels, and without it at hand when the run goes on."""
    data = dataset()
    first = start_run(TrainConfig(**TINY, encoder_steps=1), data, tmp_path / "first")
    assert train(first, tmp_path / "first")
    sizes = {**TINY, "ways": 3, "steps": 4, "layout": layout, "seed": 1}
    config = TrainConfig.of(**sizes, encoder_from=str(tmp_path / "first"))
    assert config.encoder_steps == 0 and TrainConfig.from_dict(config.to_dict()) == config
    whole = start_run(config, data, tmp_path / "whole")
    assert train(whole, tmp_path / "whole")
    second = start_run(config, data, tmp_path / "second")
    assert train(second, tmp_path / "second", stop=lambda: second.step == 2) is False
    (tmp_path / "first" / "checkpoint.pt").rename(tmp_path / "away.pt")
    resumed = resume_run(config, data, tmp_path / "second")
    assert train(resumed, tmp_path / "second")
    for name, x in whole.model.state_dict().items():
        assert torch.equal(x, resumed.model.state_dict()[name])
    restored = restore_model(load_checkpoint(tmp_path / "whole"))
    for name, x in first.model.encoder.state_dict().items():
        assert torch.equal(x, restored.encoder.state_dict()[name])
    further = replace(config, encoder_from=str(tmp_path / "away.pt"), encoder_steps=1)
    learning = Trainer(further, data)  # the encoder goes on learning from there
    weight = learning.model.encoder.state_dict()["0.weight"]
    assert torch.equal(weight, first.model.encoder.state_dict()["0.weight"])
    learning.train_step()
    assert not torch.equal(
        learning.model.encoder.state_dict()["0.weight"], first.model.encoder.state_dict()["0.weight"]
    )
    with pytest.raises(FileNotFoundError, match="there is no checkpoint"):
        start_run(config, data, tmp_path / "third")
    assert not (tmp_path / "third").exists()


def test_an_encoder_of_another_kind_is_not_taken(tmp_path):
    data, run = dataset(), tmp_path / "first"
    config = TrainConfig(**TINY, encoder_steps=1)
    assert train(start_run(config, data, run), run)
    grey = dataset(colour=False)
    with pytest.raises(
        ValueError, match="encoder_from must be a checkpoint with colour = False, got True in"
    ):
        Trainer(TrainConfig(**{**TINY, "colour": False}, encoder_from=str(run)), grey)
    with pytest.raises(ValueError, match="encoder_from must be empty with encoder none, got 'omniglot'"):
        TrainConfig(encoder_from="omniglot")
    plain = tmp_path / "plain"
    settings = {**TINY, "colour": False, "encoder": "none"}
    assert train(start_run(TrainConfig(**settings), grey, plain), plain)
    with pytest.raises(ValueError, match="plain holds no encoder that a run has trained"):
        Trainer(TrainConfig(**TINY, encoder_from=str(plain)), data)


def test_the_command_takes_an_encoder_with_its_image_size(capsys, tmp_path):
    run = [
        "train",
        "--data",
        "glyphs",
        "--steps",
        "2",
        "--batch",
        "1",
        "--eval-episodes",
        "2",
        "--ways",
        "2",
        "--shots",
        "2",
    ]
    first = [*run, "--out", str(tmp_path / "a"), "--encoder", "conv4", "--image-size", "16"]
    assert cli.main([*first, "--hidden-size", "8", "--slots", "6"]) == 0
    capsys.readouterr()
    second = [*run, "--out", str(tmp_path / "b"), "--encoder-from", str(tmp_path / "a")]
    assert cli.main([*second, "--json"]) == 0
    config = json.loads(capsys.readouterr().out)["config"]
    assert (config["encoder"], config["image_size"], config["encoder_steps"]) == ("conv4", 16, 0)
    states = [load_checkpoint(tmp_path / name)["model"]["state"] for name in "ab"]
    assert torch.equal(*(state["encoder.0.weight"] for state in states))
    assert cli.main([*second, "--out", str(tmp_path / "c"), "--encoder", "none"]) == 2
    assert "encoder_from must be empty with encoder none" in capsys.readouterr().err


def test_episodes_of_colour_hold_every_channel():
    data = dataset()
    episode = Episodes(data.train, ways=2, shots=2, augment=True, seed=1).sample(3)
    assert episode.inputs.shape == (4, 3, 3 * 16 * 16 + 2)
    red, green, _ = episode.inputs[..., : 3 * 16 * 16].unflatten(2, (3, 256)).unbind(2)
    assert torch.equal(red, green) and red.max() > 0.5
    assert data.train.rotated().images.shape == (4 * 64, 3, 16, 16)


def test_settings_refuse_an_encoder_where_it_does_not_fit():
    assert TrainConfig.of("conv4", "stream").image_size == 28
    assert math.prod(TrainConfig.of("conv4", "stream", colour=True, image_size=32).image_shape) == 3 * 32 * 32
    with pytest.raises(
        ValueError,
        match="encoder must be one of none, conv4, torchvision/NAME, timm/NAME or MODULE:FACTORY, got 'resnet'",
    ):
        TrainConfig(encoder="resnet")
    with pytest.raises(ValueError, match="encoder must be 'none' with model lstm"):
        TrainConfig(encoder="conv4", model="lstm")
    with pytest.raises(ValueError, match="sides of at least 16"):
        TrainConfig(encoder="conv4", image_size=8)


def test_an_encoder_that_starts_from_nothing_has_to_learn():
    with pytest.raises(ValueError, match="encoder_steps must be at least 1 with encoder conv4.*got 0"):
        Trainer(TrainConfig(**TINY), dataset())


class Own(nn.Sequential):
    """With a batch norm, whose buffers are no parameters."""

    def __init__(self):
        super().__init__(nn.Conv2d(3, 4, 5, stride=4), nn.BatchNorm2d(4), nn.ReLU(), nn.Flatten())
        self[0].bias.requires_grad_(False)  # a frozen one stays as it is


def test_an_encoder_of_ones_own_in_a_checkpoint(tmp_path):
    """The file does not run it: who loads the model gives the module."""
    own = f"{__name__}:Own"
    config, data = TrainConfig(**{**TINY, "encoder": own}), dataset()
    whole = Trainer(config, data)
    losses = [whole.train_step().loss for _ in range(2)]
    first = start_run(config, data, tmp_path)
    train(first, tmp_path, stop=lambda: first.step == 1)
    assert resume_run(config, data, tmp_path).train_step().loss == losses[1]
    content = load_checkpoint(tmp_path)
    model = restore_model(content, Own())
    torch.manual_seed(config.seed)
    assert torch.equal(model.encoder[0].bias, Own()[0].bias)
    x = torch.rand(3, 1, 3 * 256 + 2)
    assert torch.equal(model(x)[0], first.model.eval()(x)[0])
    with pytest.raises(ValueError, match=f"was trained with the encoder {own}: name it again"):
        restore_model(content)
    with pytest.raises(ValueError, match="encoder must have the parameters .*encoder.0.bias"):
        restore_model(content, nn.Sequential(nn.Conv2d(3, 4, 5, stride=4, bias=False), nn.Flatten()))
    with pytest.raises(ValueError, match="was trained with the encoder conv4: leave it out"):
        restore_model(load_checkpoint(), Own())
    raw = first.state_dict()
    broken = {name: x.clone() for name, x in raw["model"]["state"].items()}
    broken["encoder.0.bias"][0] = torch.nan
    save_checkpoint(tmp_path / "nan.pt", {**raw, "model": {**raw["model"], "state": broken}})
    with pytest.raises(ValueError, match="encoder.0.bias has numbers that are not finite"):
        load_checkpoint(tmp_path / "nan.pt")
    del broken["layer.controller.weight_ih"]
    save_checkpoint(tmp_path / "less.pt", {**raw, "model": {**raw["model"], "state": broken}})
    with pytest.raises(ValueError, match="less.pt: .*(weight_ih must be a matrix|not finite)"):
        load_checkpoint(tmp_path / "less.pt")


@pytest.mark.parametrize("text", ["no_such_module:f", "math:f", ":f", "math:"])
def test_what_is_no_factory_is_said(text):
    with pytest.raises(ValueError, match=f"encoder must be MODULE:FACTORY, got '{text}'"):
        make_own(text)
    with pytest.raises(ValueError, match="must give an nn.Module, got dict"):
        make_own("builtins:dict")


def test_two_images_of_an_input_have_their_features_each_and_none_has_none():
    """Of the step before; a first image that is all 0 is an image."""
    torch.manual_seed(0)
    options = {"image_shape": (2, 2, 2), "normalize_features": True, "dtype": torch.float64, **SMALL}
    model = MANN(18, 2, 8, encoder=Rows(), num_images=2, **options)
    model.feature_mean.copy_(torch.randn(len(model.feature_mean)))
    x = torch.rand(4, 3, 18, dtype=torch.float64)
    x[0, :, 8:16] = 0
    x[1, 0, :8] = 0
    encoded = model.encode(x)
    size = len(model.feature_mean)
    assert encoded.shape == (4, 3, 2 * size + 2)
    images = x[..., :16].unflatten(2, (2, 2, 2, 2))
    expected = model.features(images)
    expected[0, :, 1] = 0
    assert torch.equal(encoded[..., : 2 * size], expected.flatten(2)) and (expected[1, 0, 0] != 0).all()
    assert torch.equal(encoded[..., 2 * size :], x[..., 16:])
    assert model.layer.input_size == 2 * size + 2
    same = MANN(**{**model.config, "encoder": Rows()}, dtype=torch.float64)
    same.load_state_dict(model.state_dict())
    for a, b in zip(same(x, lengths=torch.tensor([4, 2, 0]))[0], model(x)[0], strict=True):
        assert (a[:1] - b[:1]).abs().max() < 1e-12


def test_features_of_pairs_are_those_of_the_encoder(tmp_path):
    """What training shows of images whose features were made once, and what the model itself makes of the images."""
    config = TrainConfig.of(
        "conv4", "stream", data="glyphs", late="pair", image_size=16, steps=3, encoder_steps=1, hidden_size=8,
        shots=2, slots=8, batch=2, augment=False,
    )  # fmt: skip
    assert config.controller == "feedforward"
    trainer = start_run(config, load_data(config), tmp_path)
    for _ in range(3):
        assert 0 < trainer.train_step().loss < 10
    model = trainer.model.eval()
    answering, features = encoded_classes(model, trainer._heldout)
    of_images, of_features = (
        make_episodes(config, x, seed=3).sample(4) for x in (trainer._heldout, features)
    )
    with torch.no_grad():
        expected, found = model(of_images.inputs)[0], answering(of_features.inputs)[0]
    assert (found - expected).abs().max() < 1e-4
    with pytest.raises(ValueError, match="late must be one of label with layout support, got 'pair'"):
        TrainConfig.of("none", "support", late="pair")
