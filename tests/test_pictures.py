"""Pictures say what they show: colour bars, marks, titles, what was right and wrong, intervals."""

from __future__ import annotations

import sys

import pytest
import torch
from matplotlib.colors import to_rgba
from matplotlib.figure import Figure
from PIL import Image

from mann_fast.cli import main
from mann_fast.training import InstanceAccuracy, SequenceConfig, TrainConfig
from mann_fast.training.loop import describe
from mann_fast.training.plots import (
    RIGHT,
    WRONG,
    draw_steps,
    plot_accuracy,
    plot_episode,
    plot_learning_curve,
    plot_predictions,
    shown_instances,
)
from mann_fast.training.sequence_plots import plot_answers, plot_sequence, plot_sequence_curve
from mann_fast.training.sequences import SequenceTrace, SizeResult, task_of
from mann_fast.training.trace import Slots, Trace


@pytest.fixture
def drawn(monkeypatch):
    """The figures that were saved, in order."""
    figures, save = [], Figure.savefig

    def kept(self, *arguments, **options):
        figures.append(self)
        save(self, *arguments, **options)

    monkeypatch.setattr(Figure, "savefig", kept)
    return figures


def bars(figure):
    """Label and bounds of each colour bar."""
    found = [axes._colorbar for axes in figure.axes if hasattr(axes, "_colorbar")]
    return [(bar.ax.get_ylabel(), bar.vmin, bar.vmax) for bar in found]


@pytest.mark.parametrize("task", ["copy", "repeat-copy", "recall", "key-value"])
def test_a_sequence_names_its_marks_and_crosses_what_is_wrong(task, drawn, tmp_path):
    config = SequenceConfig.of_task(task=task, length=3)
    sequences = task_of(config).sample(1, torch.Generator().manual_seed(0), *task_of(config).longest)
    inputs, targets = sequences.inputs[:, 0], sequences.targets[:, 0]
    outputs = targets.clone()
    step = int(sequences.answered.nonzero()[-1])
    outputs[step, 1] = 1 - outputs[step, 1]
    outputs[0, 0] = 1 - outputs[0, 0]  # where no answer is wanted
    weights = torch.rand(len(inputs), 5)
    slots = Slots(weights, 3 * weights, None, None, None)
    trace = SequenceTrace("3 of them", inputs, targets, outputs, sequences.answered, slots, 0.25)
    plot_sequence(tmp_path / "a.png", trace, config, "a model")
    (figure,) = drawn
    rows = [axes for axes in figure.axes if not hasattr(axes, "_colorbar")]
    marks = task_of(config).marks
    assert [x.get_text() for x in rows[0].get_yticklabels()] == [*marks]
    size = inputs.shape[1]
    assert rows[0].get_yticks().tolist() == [*range(size - len(marks), size)]
    assert rows[2].collections[0].get_offsets().tolist() == [[step, 1]]
    labels = ["bit", "bit", "probability of a 1", "weight written", "weight read"]
    assert [label for label, *_ in bars(figure)] == labels
    assert [bounds for _, *bounds in bars(figure)[:4]] == [[0, 1]] * 4
    assert bars(figure)[4][1:] == (0, pytest.approx(3 * weights.max().item()))
    assert figure._suptitle.get_text() == "a model\n3 of them: 0.25 wrong bits per answer"


def test_titles_say_the_model_plainly():
    config = SequenceConfig.of_task(task="copy", length=20)
    assert describe(config) == "NTM memory, LSTM controller, on copy, trained on up to 20 vectors"
    config = SequenceConfig.of_task(
        task="copy", length=20, addressing="dnc", memory="masks=true mask_min=0.1"
    )
    assert describe(config).startswith("DNC memory (masks, mask_min=0.1), LSTM controller, on copy")
    config = SequenceConfig.of_task(task="copy", length=20, addressing="content", controller="feedforward")
    assert describe(config).startswith("content memory, feedforward controller")
    config = SequenceConfig.of_task(task="copy", length=20, model="lstm")
    assert describe(config) == "LSTM without memory, on copy, trained on up to 20 vectors"
    assert describe(TrainConfig(data="glyphs")) == "MANN (LRUA memory, LSTM controller) on glyphs, 5-way"
    config = TrainConfig.of("conv4", "support", data="glyphs", addressing="ntm")
    model = "MANN (NTM memory, feedforward controller, conv4, 28 x 28)"
    assert describe(config) == f"{model} on glyphs, 5-way, support and queries"


def test_intervals_are_drawn_where_a_run_has_them(drawn, tmp_path):
    config = SequenceConfig.of_task(task="copy")
    old = {"step": 1, "loss": 0.66, "test_error": {"a": 1.0}}
    new = [
        {
            "step": step,
            "loss": 0.66 - step / 100,
            "test_error": {"a": 2.0},
            "test_interval": {"a": [1.5, 2.5]},
        }
        for step in (2, 3)
    ]
    plot_sequence_curve(tmp_path / "a.png", [old, *new], config, "a model")
    top, bottom = drawn[0].axes
    corners = top.collections[0].get_paths()[0].vertices
    assert corners.min(0).tolist() == [2, 1.5]
    assert corners.max(0).tolist() == [3, 2.5]
    drawn[0].canvas.draw()
    low, high = bottom.get_ylim()
    ticks = bottom.yaxis.get_major_ticks() + bottom.yaxis.get_minor_ticks()
    texts = [tick.label1.get_text() for tick in ticks if low <= tick.get_loc() <= high]
    texts = [text for text in texts if text]
    assert len(set(texts)) == len(texts) >= 2  # 7e-01 five times is what matplotlib says by itself
    assert all(low * 0.99 <= float(text) <= high * 1.01 for text in texts)

    config = TrainConfig(shots=2, ways=2)
    line = {
        "step": 1,
        "loss": 1.0,
        "heldout_accuracy": [0.5, 0.75],
        "heldout_interval": [[0.4, 0.7], [0.6, 0.8]],
    }
    plot_learning_curve(tmp_path / "b.png", [line, {**line, "step": 2}], config, "a model")
    first, second = (band.get_paths()[0].vertices[:, 1] for band in drawn[1].axes[0].collections)
    assert (first.min(), first.max()) == (40, 60)
    assert (second.min(), second.max()) == (70, 80)

    pairs = {"step": 1, "pair_loss": 2.0, "lr": 0.1, "seconds": 1.0}
    for number, records in enumerate(([pairs], [pairs, {**line, "step": 2}]), start=2):
        plot_learning_curve(tmp_path / "c.png", records, config, "a model")
        top, bottom = drawn[number].axes
        curves = {curve.get_label(): curve.get_xydata().tolist() for curve in bottom.lines}
        assert curves["encoder, of its pairs"] == [[1, 2]]
        assert curves["training loss"] == [[2, 1]] * (number - 2)
        assert bottom.get_ylim()[1] > 2
        assert top.lines[0].get_xydata().tolist() == [[2, 50]] * (number - 2)


def labels_of(axis):
    low, high = axis.get_view_interval()
    ticks = [
        tick for tick in axis.get_major_ticks() + axis.get_minor_ticks() if low <= tick.get_loc() <= high
    ]
    return [text for tick in ticks if (text := tick.label1.get_text())]


def test_ticks_can_be_told_apart_and_steps_are_whole(drawn, tmp_path):
    config = SequenceConfig.of_task(task="copy")
    lines = [
        {"step": step, "loss": loss, "test_error": {"a": 1.0}} for step, loss in ((2, 0.69379), (7, 0.69254))
    ]
    plot_sequence_curve(tmp_path / "a.png", lines, config, "a model")
    bottom = drawn[0].axes[1]
    drawn[0].canvas.draw()
    assert len(set(labels_of(bottom.yaxis))) == len(labels_of(bottom.yaxis)) >= 2
    assert len(labels_of(bottom.xaxis)) >= 2 and all("." not in text for text in labels_of(bottom.xaxis))


def test_the_interval_of_a_single_line_is_drawn(drawn, tmp_path):
    line = {"step": 5, "loss": 1.0, "heldout_accuracy": [0.5, 1], "heldout_interval": [[0.4, 0], [0.7, 1]]}
    plot_learning_curve(tmp_path / "a.png", [line], TrainConfig(shots=2, ways=2), "a model")
    bar = drawn[0].axes[0].collections[0]
    assert bar.get_segments()[0].tolist() == [[5, 40], [5, 70]]


def test_a_slot_among_very_many_is_seen():
    """Rows of a picture that stand for several slots show the greatest weight of these, at their numbers."""
    weights = torch.zeros(3, 1000)
    weights[1, 777], weights[2, 999] = 0.5, 1.0
    for values, colours in ((weights, "Blues"), (weights.unsqueeze(2), (("kind", "#000000"),))):
        axes = Figure().subplots()
        draw_steps(axes, values, colours, "weight")
        (image,) = axes.images
        left, right, bottom, top = image.get_extent()
        assert (left, right, top) == (-0.5, 2.5, -0.5) and 999.5 <= bottom < 1004
        drawn = torch.as_tensor(image.get_array())
        if drawn.dim() == 3:
            drawn = 1 - drawn[..., 0]
        rows = drawn.shape[0]
        assert rows <= 256 and drawn.count_nonzero() == 2
        assert drawn[int(777.5 * rows / (bottom - top)), 1] == 0.5 and drawn[rows - 1, 2] == 1


def test_what_is_wanted_and_answered_has_one_scale(drawn, tmp_path):
    config = SequenceConfig.of_task(task="regression", length=3)
    targets, outputs = torch.tensor([[-1.0], [3.0], [0.5]]), torch.tensor([[-2.0], [0.5], [0.5]])
    trace = SequenceTrace("3 points", targets, targets, outputs, torch.ones(3, dtype=torch.bool), None, 1.0)
    plot_sequence(tmp_path / "a.png", trace, config, "a model")
    assert [bounds for _, *bounds in bars(drawn[0])] == [[-1, 3], [-2, 3], [-2, 3]]


@pytest.mark.parametrize("steps", [10, 20, 60])
def test_an_episode_shows_whole_squares_and_a_whole_legend(steps, drawn, tmp_path):
    asked = torch.arange(steps) >= steps // 2
    weights = torch.rand(steps, 8)
    found = Trace(
        ["label 1", "label 2"], torch.arange(steps) % 2, asked, asked & (torch.arange(steps) % 3 > 0),
        torch.rand(steps, 2), Slots(weights, weights, weights, None, None),
    )  # fmt: skip
    plot_episode(tmp_path / "a.png", torch.rand(steps, 3, 9, 9), asked.long(), found, "a model " * 12)
    (figure,) = drawn
    figure.canvas.draw()
    strip, answers = figure.axes[:2]
    box = strip.get_window_extent()
    assert box.width / steps == pytest.approx(box.height, rel=0.25)
    for part in (answers.get_legend(), figure._suptitle):
        extent = part.get_window_extent()
        assert figure.bbox.x0 <= extent.x0 and extent.x1 <= figure.bbox.x1


@pytest.mark.parametrize("task, addressing", [("copy", "ntm"), ("repeat-copy", "dnc"), ("key-value", "dnc")])
def test_long_titles_are_not_cut(task, addressing, drawn, tmp_path):
    memory = "masks=true deallocate=true link_sharpening=true" if addressing == "dnc" else ""
    config = SequenceConfig.of_task(task, addressing=addressing, controller="feedforward", memory=memory)
    title = describe(config)
    results = [SizeResult("100 vectors", 2, 1.0, 0.9, 1.1, 0.0, 4.0, [1.0, 1.0], None)]
    plot_answers(tmp_path / "a.png", results, config, title)
    lines = [{"step": step, "loss": 0.6, "test_error": {"100 vectors": 1.0}} for step in (1, 2)]
    plot_sequence_curve(tmp_path / "b.png", lines, config, title)
    for figure in drawn:
        assert_whole(figure, figure.axes[0].title)


def assert_whole(figure, *texts):
    """None of them is cut off by the edge of the picture."""
    figure.canvas.draw()  # it was saved with other pixels than it has
    for text in texts:
        box, whole = text.get_window_extent(), figure.bbox
        assert whole.x0 <= box.x0 and box.x1 <= whole.x1 and box.y1 <= whole.y1, text


def test_long_titles_of_images_are_not_cut(drawn, tmp_path):
    memory = "masks=true deallocate=true link_sharpening=true"
    config = TrainConfig.of("conv4", "support", data="omniglot", addressing="dnc", memory=memory, shots=2)
    title = describe(config)
    plot_accuracy(tmp_path / "a.png", InstanceAccuracy(2, [0.1, 0.2], [0.0, 0.1], [0.2, 0.3]), config, title)
    line = {"loss": 0.6, "heldout_accuracy": [0.5, 0.5], "heldout_interval": [[0.4, 0.6]] * 2}
    plot_learning_curve(tmp_path / "b.png", [{"step": step, **line} for step in (1, 2)], config, title)
    assert_whole(drawn[0], drawn[0]._suptitle)
    assert_whole(drawn[1], drawn[1].axes[0].title)


@pytest.mark.parametrize("shots", [1, 2, 3, 4, 10, 20])
def test_a_learning_curve_has_the_last_image_too(drawn, tmp_path, shots):
    shown = shown_instances(shots)
    assert shown == (1, 2, 5, 10, 20)[: len(shown) - 1] + (shots,)
    config = TrainConfig.of("none", "support", data="omniglot", shots=shots)
    line = {
        "loss": 0.6,
        "heldout_accuracy": [0.5] * shots,
        "heldout_interval": [[0.4] * shots, [0.6] * shots],
    }
    plot_learning_curve(tmp_path / "c.png", [{"step": step, **line} for step in (1, 2)], config, "a title")
    lines = {line.get_label(): line.get_color() for line in drawn[0].axes[0].lines}
    assert list(lines)[:-1] == [f"{k}-shot" for k in shown]
    assert len(set(lines.values())) == len(lines)


@pytest.mark.parametrize("layout", ["stream", "support"])
@pytest.mark.parametrize("ways", [5, 3])
def test_what_else_was_measured_is_in_the_picture(drawn, tmp_path, layout, ways):
    def found(count):
        return {"episodes": 40, "mean": [0.5] * count, "low": [0.4] * count, "high": [0.7] * count}

    config = TrainConfig.of("none", layout, data="omniglot", ways=5, shots=3)
    streams = {"ways": ways, "orders": 1, "views": 1, **found(10)}
    protocols = [
        {"protocol": "5-way-1-shot", "mean": 0.6, "low": 0.5, "high": 0.8, "episodes": 40},
        {"protocol": "2-way-1-shot", "mean": 0.9, "low": 0.8, "high": 0.95, "episodes": 40},
    ]
    accuracy = InstanceAccuracy(**found(3))
    plot_accuracy(tmp_path / "plain.png", accuracy, config, "a title")
    measured = {"streams": streams, "protocols": protocols, "on": "30 classes of photos"}
    plot_accuracy(tmp_path / "one.png", accuracy, config, "a title", protocols=protocols[:1])
    plot_accuracy(tmp_path / "all.png", accuracy, config, "a title", **measured)
    plain, one, everything = drawn
    assert_whole(one, one.axes[1].title)
    assert len(plain.axes) == 1 and plain._suptitle.get_text().endswith("accuracy on held-out classes")
    assert everything._suptitle.get_text() == "a title:\naccuracy on 30 classes of photos"
    axes, beside = everything.axes
    assert_whole(everything, everything._suptitle, beside.title)
    lines = {line.get_label(): line.lines[0].get_xydata().tolist() for line in axes.containers}
    first = 1 if layout == "stream" else 0  # of a query those before it are examples
    usual = "as in training" if layout == "stream" else "support and queries"
    assert lines == {
        f"5-way, {usual}, 40 episodes": [[k, 50] for k in (1, 2, 3)],
        f"streams of {ways} classes, 40 of them": [[k, 50] for k in range(first, first + 10)],
    }
    guesses = [line.get_label() for line in axes.lines if line.get_label().startswith("chance")]
    assert guesses == (
        ["chance (20%)"] if ways == 5 else ["chance, 5 classes (20%)", "chance, 3 classes (33.3%)"]
    )
    assert [label.get_text() for label in beside.get_xticklabels()] == ["5-way\n1-shot", "2-way\n1-shot"]
    assert [bar.lines[0].get_ydata().tolist() for bar in beside.containers] == [[60], [90]]


def test_answers_are_framed_by_whether_they_are_right(drawn, tmp_path):
    files = {name: [tmp_path / f"{name}.png"] for name in "ab"}
    for (file,) in files.values():
        Image.new("L", (4, 4)).save(file)
    images = [files["a"][0], files["b"][0]]
    plot_predictions(tmp_path / "p.png", files, images, [[0.9, 0.1], [0.8, 0.2]], ["a", "b"])
    cells = drawn[0].axes
    frames = {
        (index // 3, index % 3): {spine.get_edgecolor() for spine in axes.spines.values()}
        for index, axes in enumerate(cells)
        if all(spine.get_visible() for spine in axes.spines.values())
    }
    assert frames == {(1, 1): {to_rgba(RIGHT)}, (2, 1): {to_rgba(WRONG)}}


def test_tensorboard_has_every_number_of_a_line(tmp_path):
    accumulator = pytest.importorskip("tensorboard.backend.event_processing.event_accumulator")
    from mann_fast.training.tensorboard import TensorBoardWriter

    lines = [
        {"step": step, "loss": 1 / step, "heldout_accuracy": [0.25, 0.5], "heldout_interval": [[0.0], [1.0]],
         "test_error": {"20 vectors": 4.0}}
        for step in (10, 20)
    ]  # fmt: skip
    for _ in range(2):  # the second time what the first has written is gone
        writer = TensorBoardWriter(tmp_path / "tensorboard", TrainConfig(shots=2), lines[:1])
        writer(lines[1])
        writer.close()
    found = accumulator.EventAccumulator(str(tmp_path / "tensorboard"))
    found.Reload()
    names = ["loss", "heldout_accuracy/1st image", "heldout_accuracy/2nd image", "test_error/20 vectors"]
    assert sorted(found.Tags()["scalars"]) == sorted(names)
    assert [(event.step, event.value) for event in found.Scalars("loss")] == [
        (10, pytest.approx(0.1)),
        (20, pytest.approx(0.05)),
    ]


def test_without_tensorboard_nothing_is_started(monkeypatch, tmp_path, capsys):
    monkeypatch.setitem(sys.modules, "torch.utils.tensorboard", None)
    out = tmp_path / "run"
    assert main(["train", "--task", "copy", "--steps", "1", "--out", str(out), "--tensorboard"]) == 2
    assert "pip install 'mann_fast[tensorboard]'" in capsys.readouterr().err
    assert not out.exists()
