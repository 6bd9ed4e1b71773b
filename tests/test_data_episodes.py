"""Episodes: what every batch promises, whatever the classes and options."""

import copy
import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.utils.data import DataLoader, IterableDataset

from mann_fast.data import ClassImages, Episodes, encode_inputs, generate_glyphs, num_outputs
from mann_fast.data.episodes import distorted


def numbered(counts, size=2):
    """Images whose pixels spell their own number and class, so that inputs can be traced back."""
    total = sum(counts)
    number = torch.arange(total)
    images = torch.zeros(total, size * size, dtype=torch.uint8)
    images[:, 0], images[:, 1] = number % 256, number // 256
    images[:, 2] = torch.arange(len(counts)).repeat_interleave(torch.tensor(counts)) % 256
    starts = torch.tensor([0, *counts]).cumsum(0)
    return ClassImages(images.view(total, size, size), starts, tuple(f"c{i}" for i in range(len(counts))))


def traced(episode):
    """(image number, class) [T, B] of the inputs."""
    pixels = (episode.inputs[..., :4] * 255).round().long()
    return pixels[..., 0] + 256 * pixels[..., 1], pixels[..., 2]


@st.composite
def cases(draw):
    ways = draw(st.integers(1, 7))
    shots = draw(st.integers(1, 6))
    counts = draw(st.lists(st.integers(shots, shots + 5), min_size=ways, max_size=ways + 6))
    options = {
        "ways": ways,
        "shots": shots,
        "labels": draw(st.sampled_from(["onehot", "string"])),
        "seed": draw(st.integers(0, 2**40)),
    }
    return counts, options, draw(st.integers(0, 5))


@settings(max_examples=150)
@given(cases())
def test_every_episode_is_what_it_should_be(case):
    counts, options, batch = case
    ways, shots = options["ways"], options["shots"]
    string = options["labels"] == "string"
    episodes = Episodes(numbered(counts), **options)
    episode = episodes.sample(batch)
    length = ways * shots
    assert episodes.length == length and episodes.num_outputs == (25 if string else ways)
    assert episode.inputs.shape == (length, batch, episodes.input_size)
    assert episodes.input_size == 4 + episodes.num_outputs
    assert episode.inputs.dtype == torch.float32
    assert episode.targets.shape == ((length, batch, 5) if string else (length, batch))
    assert episode.targets.dtype == episode.instance.dtype == torch.int64
    assert episode.instance.shape == (length, batch)
    numbers, classes = traced(episode)
    for b in range(batch):
        label_of = {}
        seen = {}
        for t in range(length):
            c = int(classes[t, b])
            label = tuple(episode.targets[t, b].view(-1).tolist())
            assert label_of.setdefault(c, label) == label  # one label per class
            seen[c] = seen.get(c, 0) + 1
            assert episode.instance[t, b] == seen[c]
            before = episode.inputs[t, b, 4:]
            if t == 0:
                assert before.eq(0).all()
            else:
                groups = before.view(-1, 5) if string else before.view(1, -1)
                assert groups.sum(1).eq(1).all() and set(before.tolist()) <= {0.0, 1.0}
                assert groups.argmax(1).tolist() == episode.targets[t - 1, b].view(-1).tolist()
        assert len(seen) == ways and set(seen.values()) == {shots}  # each class exactly ``shots`` times
        assert len(set(numbers[:, b].tolist())) == length  # and never the same image twice
        assert len(set(label_of.values())) == ways  # labels are distinct within the episode
        values = {letter for label in label_of.values() for letter in label}
        assert values <= set(range(5 if string else ways))
        if not string:
            assert values == set(range(ways))


def test_one_image_per_class_and_shot_uses_them_all():
    episodes = Episodes(numbered([4, 4, 4]), ways=3, shots=4)
    numbers, _ = traced(episodes.sample(50))
    assert numbers.sort(0).values.eq(torch.arange(12)[:, None]).all()


def chi_square_is_plausible(observed, expected):
    """Within six standard deviations of what chance gives."""
    freedom = observed.numel() - 1
    statistic = float(((observed - expected) ** 2 / expected).sum())
    return statistic < freedom + 6 * math.sqrt(2 * freedom)


def test_classes_images_labels_and_order_are_uniform():
    batch = 20_000
    episodes = Episodes(numbered([3, 5, 4, 6]), ways=3, shots=2, seed=5)
    episode = episodes.sample(batch)
    numbers, classes = traced(episode)
    # Class by label at every step: each pair equally often
    for t in range(6):
        pairs = torch.bincount(classes[t] * 3 + episode.targets[t], minlength=12).double()
        assert chi_square_is_plausible(pairs, batch / 12)
    # Images of one class equally often, and each of them equally often at each step
    for first, count in ((0, 3), (3, 5), (8, 4), (12, 6)):
        by_step = torch.stack(
            [torch.bincount(numbers[t], minlength=18)[first : first + count] for t in range(6)]
        )
        assert chi_square_is_plausible(by_step.double(), by_step.sum() / by_step.numel())
    # Two images of a class: each pair equally often
    chosen = numbers.t()[classes.t() == 1].view(-1, 2) - 3
    low, high = chosen.min(1).values, chosen.max(1).values
    pairs = torch.bincount(low * 5 + high, minlength=25).double()
    pairs = pairs[pairs > 0]
    assert len(pairs) == 10 and chi_square_is_plausible(pairs, pairs.sum() / 10)


def test_labels_of_different_episodes_differ():
    episode = Episodes(numbered([10] * 5)).sample(64)  # always the same five classes
    _, classes = traced(episode)
    deals = set()
    for b in range(64):
        label_of = dict(zip(classes[:, b].tolist(), episode.targets[:, b].tolist(), strict=True))
        deals.add(tuple(label_of[c] for c in range(5)))
    assert len(deals) > 40  # of 120


@pytest.mark.parametrize("options", [{}, {"augment": True}, {"labels": "string"}])
def test_a_seed_gives_the_same_episodes_and_a_state_continues(options):
    classes = generate_glyphs(12)
    first, second = (Episodes(classes, seed=3, **options) for _ in range(2))
    for batch in (2, 3):
        for a, b in zip(first.sample(batch), second.sample(batch), strict=True):
            assert torch.equal(a, b)
    state = first.state_dict()
    expected = [first.sample(2) for _ in range(2)]
    other = Episodes(classes, seed=99, **options)
    assert not torch.equal(other.sample(2).inputs, expected[0].inputs)
    other.load_state_dict(state)
    for want in expected:
        for a, b in zip(want, other.sample(2), strict=True):
            assert torch.equal(a, b)
    with pytest.raises(ValueError, match="single entry 'generator', got"):
        other.load_state_dict({"other": torch.zeros(1)})


class Batches(IterableDataset):
    def __init__(self, episodes):
        self.episodes = episodes

    def __iter__(self):
        for _ in range(2):
            yield self.episodes.sample(2)


class MadeInWorker(IterableDataset):
    def __iter__(self):
        yield Episodes(numbered([3, 3, 3]), ways=2, shots=2, seed=7).sample(2)


forking = pytest.mark.filterwarnings("ignore:.*multi-threaded, use of fork:DeprecationWarning")


def loaded(dataset, passes=1, seed=0, context="fork", **options):
    """Inputs of all batches that workers draw in as many passes over a loader."""
    generator = torch.Generator().manual_seed(seed)
    options = {"num_workers": 2, "multiprocessing_context": context, "generator": generator, **options}
    loader = DataLoader(dataset, batch_size=None, **options)
    return [episode.inputs for _ in range(passes) for episode in loader]


@forking
@pytest.mark.parametrize("persistent", [False, True])
def test_workers_of_a_loader_draw_episodes_of_their_own(persistent):
    def draw(seed, loader_seed):
        episodes = Episodes(generate_glyphs(12), ways=3, shots=2, seed=seed)
        return loaded(Batches(episodes), 2, loader_seed, persistent_workers=persistent)

    first, again = draw(3, 1), draw(3, 1)
    assert len(first) == 8 and all(torch.equal(a, b) for a, b in zip(first, again, strict=True))
    everything = torch.stack([*first, *draw(4, 1), *draw(3, 2)])
    assert len(torch.unique(everything, dim=0)) == 24


@forking
def test_workers_that_are_spawned_draw_what_forked_ones_do():
    episodes = Episodes(generate_glyphs(12), ways=3, shots=2, seed=3)
    spawned = loaded(Batches(episodes), context="spawn", num_workers=1)
    for a, b in zip(loaded(Batches(episodes), num_workers=1), spawned, strict=True):
        assert torch.equal(a, b)


@forking
def test_what_is_seeded_in_a_worker_stays_so():
    expected = Episodes(numbered([3, 3, 3]), ways=2, shots=2, seed=7).sample(2).inputs
    assert all(torch.equal(inputs, expected) for inputs in loaded(MadeInWorker()))


def test_a_copy_goes_on_as_the_original_does():
    original = Episodes(generate_glyphs(12), augment=True, seed=3)
    original.sample(2)
    copied = copy.deepcopy(original)
    assert torch.equal(original.sample(2).inputs, copied.sample(2).inputs)


@pytest.mark.parametrize("options", [{}, {"augment": True}, {"labels": "string"}])
def test_parts_of_a_batch_are_those_of_the_whole(options):
    """Processes that draw the same batch, and make a part each, stay in step."""
    classes = generate_glyphs(12)
    whole, part = (Episodes(classes, seed=3, **options) for _ in range(2))
    for chosen in (slice(0, 2), slice(2, 6), slice(5, 6)):
        for a, b in zip(whole.sample(6), part.sample(6, chosen), strict=True):
            torch.testing.assert_close(a[:, chosen], b, rtol=0, atol=1e-5)


def test_the_global_generator_is_left_alone():
    torch.manual_seed(0)
    before = torch.get_rng_state()
    Episodes(generate_glyphs(5), augment=True).sample(2)
    assert torch.equal(before, torch.get_rng_state())


def test_autocast_around_it_changes_no_episode():
    def sample():
        return Episodes(generate_glyphs(5), augment=True).sample(2).inputs

    expected = sample()
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(sample(), expected)


def test_distortion_is_the_same_whatever_the_default_dtype():
    images, random = torch.randint(0, 256, (3, 9, 9), dtype=torch.uint8), torch.rand(3, 6)
    expected = distorted(images, random)
    torch.set_default_dtype(torch.float64)
    try:
        found = distorted(images, random)
    finally:
        torch.set_default_dtype(torch.float32)
    assert found.dtype == torch.float32 and torch.equal(found, expected)


def test_augmentation_moves_images_a_little_and_anew_each_time():
    size = 21
    classes = ClassImages(
        torch.zeros(20, size, size, dtype=torch.uint8), torch.tensor([0, 10, 20]), ("a", "b")
    )
    classes.images[:, 9:12, 6:15] = 255  # a horizontal bar in the middle
    episodes = Episodes(classes, ways=2, shots=10, augment=True)
    images = torch.cat([episodes.sample(20).inputs[..., : size * size] for _ in range(2)], 1)
    assert images.min() >= 0 and images.max() <= 1
    images = images.reshape(-1, size, size)
    assert len(torch.unique(images, dim=0)) == len(images)
    mass = images.sum((1, 2))
    ink = (
        mass / 27
    ).log()  # width and height each by a factor of up to exp(0.2), and no ink is lost beyond that
    assert ink.abs().max() < 0.45 and ink.std() > 0.1
    place = torch.arange(size) - 10.0
    down, across = (images.sum(2) @ place) / mass, (images.sum(1) @ place) / mass
    for shift in (down, across):  # turn and stretch come after the shift, and change it a little
        assert 0.08 * size < shift.abs().max() < 0.1 * size * 1.6
        assert shift.std() > 0.05 * size and shift.mean().abs() < 0.2
    dy, dx = place[None, :, None] - down[:, None, None], place[None, None] - across[:, None, None]
    angle = 0.5 * torch.atan2((2 * images * dx * dy).sum((1, 2)), (images * (dx**2 - dy**2)).sum((1, 2)))
    assert angle.abs().max() < 0.32 and angle.std() > math.pi / 16 / 2.5
    plain = Episodes(classes, ways=2, shots=10).sample(3).inputs[..., : size * size].reshape(-1, size, size)
    assert torch.equal(plain[0], classes.images[0] / 255)


def test_encode_inputs():
    images = torch.randint(0, 256, (2, 3, 4, 4), dtype=torch.uint8)
    previous = torch.tensor([[-1, -1, -1], [2, 0, -1]])
    inputs = encode_inputs(images, previous, ways=3)
    assert inputs.shape == (2, 3, 19)
    assert torch.equal(inputs[..., :16], images.flatten(2) / 255)
    assert inputs[0, :, 16:].eq(0).all()
    assert inputs[1, :, 16:].tolist() == [[0, 0, 1], [1, 0, 0], [0, 0, 0]]
    assert torch.equal(encode_inputs(images.float(), previous, ways=3), inputs)
    letters = torch.tensor([0, 4, 1, 1, 3]).expand(2, 3, 5)
    inputs = encode_inputs(images, letters, ways=3, labels="string")
    assert inputs.shape == (2, 3, 41) and inputs[0, 0, 16:].nonzero().flatten().tolist() == [0, 9, 11, 16, 23]
    assert num_outputs(3, "onehot") == 3 and num_outputs(3, "string") == 25
    pairs = encode_inputs(images, previous, ways=3, before=images.flip(0))
    assert pairs.shape == (2, 3, 35) and torch.equal(pairs[..., :16], images.flatten(2) / 255)
    assert torch.equal(pairs[..., 16:32], images.flip(0).flatten(2) / 255)
    assert torch.equal(pairs[..., 32:], encode_inputs(images, previous, ways=3)[..., 16:])


@pytest.mark.parametrize("labels", ["onehot", "string"])
def test_a_pair_one_step_late_is_the_same_episode_with_every_image_once_more(labels):
    classes = generate_glyphs(8, 6, image_size=8)
    options = {"ways": 3, "shots": 4, "labels": labels, "augment": True, "seed": 5}
    alone, paired = (Episodes(classes, late=late, **options) for late in ("label", "pair"))
    assert paired.input_size == alone.input_size + 64
    for ways in (None, 2):
        a, b = alone.sample(3, ways=ways), paired.sample(3, ways=ways)
        assert b.inputs.shape[2] == paired.input_size
        for name in ("targets", "instance", "classes"):
            assert torch.equal(getattr(a, name), getattr(b, name))
        assert torch.equal(b.inputs[..., :64], a.inputs[..., :64])
        assert b.inputs[0, :, 64:128].eq(0).all()
        assert torch.equal(b.inputs[1:, :, 64:128], a.inputs[:-1, :, :64])
        assert torch.equal(b.inputs[..., 128:], a.inputs[..., 64:])
    with pytest.raises(ValueError, match="late must be one of 'label', 'pair', got 'image'"):
        Episodes(classes, late="image", **options)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"ways": 4}, "need at least 4 classes, got 3"),
        ({"num_labels": 1}, "num_labels must be an integer of at least ways = 2, got 1"),
        ({"shots": 4}, "at least 4 images: 'c1' has 3, 'c2' has 2; add images or lower shots"),
        ({"ways": 0}, "ways must be a positive integer, got 0"),
        ({"shots": 0}, "shots must be a positive integer, got 0"),
        ({"labels": "letters"}, "labels must be one of 'onehot', 'string', got 'letters'"),
        ({"labels": np.array(["onehot", "string"])}, "labels must be one of 'onehot', 'string', got array"),
        ({"labels": "string", "ways": 3126}, "ways must be at most 3125 with string labels, got 3126"),
    ],
)
def test_options_that_do_not_fit_are_refused(options, message):
    with pytest.raises(ValueError, match=message):
        Episodes(numbered([5, 3, 2]), **({"ways": 2, "shots": 2} | options))


@pytest.mark.parametrize("batch", [-1, 1.5, True])
def test_batch_is_checked(batch):
    with pytest.raises(ValueError, match=f"batch must be an integer of at least 0, got {batch}"):
        Episodes(numbered([2, 2]), ways=2, shots=2).sample(batch)
