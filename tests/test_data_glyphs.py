"""The invented characters: seeded, hard for a nearest neighbour, and well drawn."""

import numpy as np
import pytest
import torch

from mann_fast.data import Episodes, generate_glyphs


def nearest_neighbour(classes, episodes=300):
    """Accuracy by instance of the label of the most similar image seen before in the episode."""
    sampler = Episodes(classes, seed=1)
    episode = sampler.sample(episodes)
    pixels = episode.inputs[..., : classes.image_size**2].transpose(0, 1)
    distance = torch.cdist(pixels, pixels)  # [B, T, T]
    distance.masked_fill_(torch.ones_like(distance[0], dtype=torch.bool).triu(), float("inf"))
    guess = episode.targets.t().gather(1, distance.argmin(2)).t()
    guess[0] = -1  # nothing has been seen
    right = (guess == episode.targets).float()
    return [right[episode.instance == i].mean().item() for i in range(1, sampler.shots + 1)]


@pytest.fixture(scope="module")
def glyphs():
    return generate_glyphs(300)


def test_shapes_and_names(glyphs):
    assert glyphs.images.shape == (6000, 20, 20) and glyphs.counts.eq(20).all()
    assert glyphs.names[7] == "glyph00007"
    assert generate_glyphs(1, 1, image_size=1).images.shape == (1, 1, 1)
    assert generate_glyphs(3, 5, image_size=33).images.shape == (15, 33, 33)


def test_a_seed_gives_the_same_glyphs_and_another_others(glyphs):
    again = generate_glyphs(300)
    assert torch.equal(again.images, glyphs.images)
    assert not torch.equal(generate_glyphs(300, seed=1).images, glyphs.images)


@pytest.mark.parametrize("first", [1, 95, 96, 299])  # 2,000 images are drawn at a time
def test_those_passed_over_change_nothing(first):
    whole = generate_glyphs(300, 21, image_size=4)
    rest = generate_glyphs(300 - first, 21, image_size=4, first=first)
    assert torch.equal(rest.images, whole.images[first * 21 :]) and rest.names == whole.names[first:]


def test_a_nearest_neighbour_on_pixels_does_not_solve_them(glyphs):
    accuracy = nearest_neighbour(glyphs)
    assert 0.4 < accuracy[1] < 0.6, accuracy
    assert accuracy[9] < 0.88, accuracy


def test_images_of_a_class_differ_and_are_alike(glyphs):
    pixels = glyphs.images.float()
    assert len(torch.unique(glyphs.images.flatten(1), dim=0)) == len(pixels)
    # Put on their centres of ink, images are nearer to their own class's mean than to another's
    rows = torch.arange(20.0)
    mass = pixels.sum((1, 2))
    down = (9.5 - (pixels.sum(2) @ rows) / mass).round().int().tolist()
    across = (9.5 - (pixels.sum(1) @ rows) / mass).round().int().tolist()
    shifts = zip(down, across, strict=True)
    centred = torch.stack([torch.roll(p, shift, (0, 1)) for p, shift in zip(pixels, shifts, strict=True)])
    means = centred.view(300, 20, 400).mean(1)
    nearest = torch.cdist(centred.flatten(1), means).argmin(1)
    assert (nearest == torch.arange(300).repeat_interleave(20)).float().mean() > 0.5  # of 300 classes


def test_drawn_in_full_contrast_and_inside_the_picture(glyphs):
    images = glyphs.images
    assert images.amax((1, 2)).min() > 180
    ink = (images > 127).float().mean((1, 2))
    assert 0.02 < ink.min() and ink.max() < 0.5
    edge = torch.cat([images[:, 0], images[:, -1], images[:, :, 0], images[:, :, -1]], 1)
    assert (edge > 127).float().mean() < 0.06


def test_a_known_image():
    """Guards the stream of random numbers: means over areas, since single pixels may round differently."""
    image = generate_glyphs(2, 2, seed=3).images[3].numpy()
    expected = [
        [0, 0, 0.08, 0],
        [65.76, 89.52, 145.36, 3.44],
        [2.12, 58.92, 143.64, 13.84],
        [0, 0, 0.04, 0.04],
    ]
    assert np.abs(image.reshape(4, 5, 4, 5).mean((1, 3)) - expected).max() < 0.5


@pytest.mark.parametrize("name", ["num_classes", "images_per_class", "image_size"])
@pytest.mark.parametrize("value", [0, -1, 2.0, True])
def test_sizes_are_checked(name, value):
    sizes = {"num_classes": 2, "images_per_class": 2, "image_size": 5} | {name: value}
    with pytest.raises(ValueError, match=f"{name} must be a positive integer, got {value}"):
        generate_glyphs(**sizes)


@pytest.mark.parametrize("first", [-1, 2.0, True])
def test_how_many_to_pass_over_is_checked(first):
    with pytest.raises(ValueError, match=f"first must be an integer of at least 0, got {first}"):
        generate_glyphs(2, 2, first=first)
