"""Every source is split into training and test classes that never overlap."""

import dataclasses
import io
import shutil
import warnings
import zipfile
from functools import partial

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image

from mann_fast.data import ClassImages, load_dataset, load_folder, load_npz, split_classes
from mann_fast.data.datasets import TooFewClasses, heldout_glyphs


def classes_named(names, images=1):
    starts = torch.arange(len(names) + 1) * images
    return ClassImages(torch.zeros(len(names) * images, 2, 2, dtype=torch.uint8), starts, tuple(names))


def quiet_split(classes, **options):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return split_classes(classes, **options)


@given(
    names=st.sets(st.text(min_size=1), min_size=2, max_size=60),
    ways=st.integers(1, 20),
    seed=st.integers(0, 2**31),
)
def test_split_is_disjoint_whole_and_wide_enough(names, ways, seed):
    classes = classes_named(sorted(names))
    if len(names) < 2 * ways:
        with pytest.raises(ValueError, match=f"{2 * ways} in all"):
            split_classes(classes, ways=ways, seed=seed)
        return
    train, test = quiet_split(classes, ways=ways, seed=seed)
    assert set(train.names).isdisjoint(test.names)
    assert set(train.names) | set(test.names) == names
    assert train.num_classes >= ways and test.num_classes >= ways
    again = quiet_split(classes.select(reversed(range(len(names)))), ways=ways, seed=seed)
    assert set(again[1].names) == set(test.names)  # the order in which classes are listed does not matter


def test_split_is_the_same_on_every_machine():
    expected = ("class09", "class13", "class14", "class15", "class20", "class22", "class25", "class38")
    train, test = split_classes(classes_named([f"class{i:02d}" for i in range(40)]))
    assert test.names == expected
    other = split_classes(classes_named([f"class{i:02d}" for i in range(40)]), seed=1)[1]
    assert other.names != test.names


def test_few_classes_are_warned_about():
    with pytest.warns(UserWarning, match="only 20 classes to train on"):
        split_classes(classes_named([f"class{i}" for i in range(25)]))


@pytest.mark.parametrize(
    ("count", "drawn", "advice"),
    [
        (2, True, "Omniglot or the glyphs, .*mann-fast predict --support"),
        (2, False, "other photographs, .*--encoder torchvision/.*mann-fast predict --support"),
        (9, False, "--ways 4 would run, and learn little.*other photographs, .*mann-fast predict --support"),
    ],
)
def test_too_few_classes_say_what_to_do(count, drawn, advice):
    classes = dataclasses.replace(classes_named([f"class{i}" for i in range(count)]), inverted=drawn)
    with pytest.raises(ValueError, match=f"{count} classes are too few .* 10 in all.*{advice}"):
        split_classes(classes)


def test_folder_of_classes(tmp_path):
    random = np.random.RandomState(0)
    for c in range(12):
        (tmp_path / f"animal{c}").mkdir()
        for i in range(3):
            pixels = random.randint(0, 256, (10 + c, 20, 3)).astype(np.uint8)
            Image.fromarray(pixels).save(tmp_path / f"animal{c}" / f"{i}.png")
    with pytest.warns(UserWarning, match="only 7 classes to train on"):
        data = load_dataset(tmp_path, ways=5, shots=3, image_size=8)
    assert data.kind == "folder" and data.train.num_classes == 7 and data.test.num_classes == 5
    assert data.train.images.shape == (21, 8, 8)
    with pytest.raises(ValueError, match="at least 10 images: 'animal0' has 3"):
        load_dataset(tmp_path)


def test_glyphs_are_split_by_class():
    data = load_dataset("glyphs", image_size=8)
    assert data.kind == "glyphs" and data.train.num_classes == 3000 and data.test.num_classes == 200
    assert set(data.train.names).isdisjoint(data.test.names)
    data = load_dataset("glyphs", image_size=2, shots=21)
    assert data.test.counts.eq(21).all()
    alone = heldout_glyphs(image_size=2, colour=False, shots=21)
    assert torch.equal(alone.images, data.test.images) and alone.names == data.test.names
    with pytest.raises(ValueError, match="colour must be False"):
        heldout_glyphs(image_size=2, colour=True, shots=21)


def test_unknown_source():
    with pytest.raises(
        FileNotFoundError, match="glyph does not exist; expected 'glyphs', 'omniglot' or a path"
    ):
        load_dataset("glyph")


def write_classes(folder, names, images=2, value=0):
    for at, name in enumerate(names):
        (folder / name).mkdir(parents=True)
        for i in range(images):
            pixels = np.full((4, 4), value, np.uint8)
            pixels[1 + at % 2, 1 + i] = 100
            Image.fromarray(pixels).save(folder / name / f"{i}.png")


@pytest.mark.parametrize(
    ("train", "others", "tested"),
    [
        ("train", ("val", "test"), "test"),
        ("train", ("val",), "val"),
        ("train", ("test",), "test"),
        ("Train", ("Validation", "Test"), "Test"),
        ("training", ("testing",), "testing"),
    ],
)
def test_a_split_that_others_have_made_is_kept(tmp_path, train, others, tested):
    write_classes(tmp_path / train, ["a", "b"], value=250)
    for part in others:
        write_classes(tmp_path / part, [f"{part}1", f"{part}2"], value=250)
    with pytest.warns(UserWarning, match="only 2 classes to train on"):
        data = load_dataset(tmp_path, ways=2, shots=2, image_size=4)
    assert data.train.names == ("a", "b") and data.test.names == (f"{tested}1", f"{tested}2")
    assert data.kind == "folder" and data.train.inverted and data.test.inverted


@pytest.mark.parametrize("lists", [False, True])
def test_a_part_with_too_few_classes_is_named(tmp_path, lists):
    for part, names in (("train", "abc"), ("test", "de")):
        folder = tmp_path / ("images" if lists else part)
        write_classes(folder, names)
        if lists:
            lines = [f"{name}/{i}.png,{name}\n" for name in names for i in range(2)]
            (tmp_path / f"{part}.csv").write_text("".join(lines))
    load = partial(load_dataset, tmp_path, shots=2, image_size=4)
    with warnings.catch_warnings():
        warnings.simplefilter("error")  # an error says it all
        with pytest.raises(
            TooFewClasses, match=r"test\S* has 2 classes, .* \(--ways\): add .* to 2"
        ) as found:
            load(ways=3)
    assert found.value.classes.names == tuple("abcde")
    with pytest.warns(UserWarning, match="only 3 classes to train on"):
        load(ways=2)
    if not lists:
        for name in "ab":
            shutil.rmtree(tmp_path / "train" / name)
        with pytest.raises(TooFewClasses, match=r"train has 1 class, .* \(--ways\): add classes there$"):
            load(ways=2)


def test_parts_that_share_classes_are_put_together(tmp_path):
    names = [f"class{at}" for at in range(4)]
    write_classes(tmp_path / "train", names, images=2)
    write_classes(tmp_path / "test", names, images=1)
    data = quiet(lambda: load_dataset(tmp_path, ways=2, shots=3, image_size=4))
    assert sorted(data.train.names + data.test.names) == names
    assert data.train.counts.tolist() == data.test.counts.tolist() == [3, 3]
    with pytest.raises(ValueError, match="at least 4 images: 'class"):
        quiet(lambda: load_dataset(tmp_path, ways=2, shots=4, image_size=4))


def test_alphabets_of_characters_are_classes(tmp_path):
    for alphabet in ("Greek", "Latin"):
        write_classes(tmp_path / alphabet, ["character01", "character02"])
    data = quiet(lambda: load_dataset(tmp_path, ways=2, shots=2, image_size=4))
    assert sorted(data.train.names + data.test.names) == [
        f"{alphabet}/character0{n}" for alphabet in ("Greek", "Latin") for n in (1, 2)
    ]


def test_stray_images_beside_folders_of_classes_hide_none(tmp_path):
    for alphabet in ("Greek", "Latin"):
        write_classes(tmp_path / alphabet, ["character01", "character02"], images=3)
    shutil.copy(tmp_path / "Greek" / "character01" / "0.png", tmp_path / "Greek" / "preview.png")
    names = tuple(f"{alphabet}/character0{n}" for alphabet in ("Greek", "Latin") for n in (1, 2))
    said = "passed over Greek.preview.png, which lies beside folders of classes"
    for least in (1, 3):
        with pytest.warns(UserWarning, match=said) as warned:
            assert load_folder(tmp_path, image_size=4, min_images=least).names == names
        assert len(warned) == 1
    write_classes(tmp_path, ["another"], images=3)  # a class of its own
    assert quiet(lambda: load_folder(tmp_path, image_size=4)).names == (*names, "another")
    # Folders beside enough images are no classes, nor are they where a class has too few.
    write_classes(tmp_path / "photos", ["cat", "dog"], images=3)
    write_classes(tmp_path / "photos" / "cat", ["thumbnails"], images=3)
    assert load_folder(tmp_path / "photos", image_size=4).names == ("cat", "dog")
    with pytest.raises(ValueError, match="at least 4 images: 'cat' has 3, 'dog' has 3"):
        load_folder(tmp_path / "photos", image_size=4, min_images=4)


def test_a_file_of_data_in_a_folder_is_to_be_given_itself(tmp_path):
    for name in ("pathmnist.npz", "labels.csv"):
        folder = tmp_path / name[:3]
        folder.mkdir()
        (folder / name).write_text("")
        with pytest.raises(ValueError, match=rf"has no sub-folder .*; give the file itself \({name}\)"):
            load_dataset(folder)
    write_classes(tmp_path / "lab", ["images"])
    with pytest.raises(ValueError, match=r"one folder, images, and labels.csv beside it: .* the file itself"):
        load_dataset(tmp_path / "lab", shots=2)


def test_a_folder_that_all_classes_have_is_not_in_their_names(tmp_path):
    for name in ("n01", "n02"):
        write_classes(tmp_path / name, ["images"])
        (tmp_path / name / "boxes.txt").write_text("")
    assert load_folder(tmp_path, image_size=4).names == ("n01", "n02")
    write_classes(tmp_path / "n02", ["more"])
    assert load_folder(tmp_path, image_size=4).names == ("n01/images", "n02/images", "n02/more")


def quiet(call):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return call()


def test_npz_of_medmnist(tmp_path):
    random = np.random.RandomState(0)
    arrays = {}
    for part, count in (("train", 8), ("val", 4), ("test", 4)):
        arrays[f"{part}_labels"] = (np.arange(count) % 4).astype(np.uint8)[:, None]
        arrays[f"{part}_images"] = random.randint(0, 50, (count, 6, 6, 3)).astype(np.uint8)
        arrays[f"{part}_images"][:, 0, 0] = 10 * arrays[f"{part}_labels"] + [100, 150, 200]
    np.savez(tmp_path / "m.npz", **arrays)
    data = quiet(lambda: load_dataset(tmp_path / "m.npz", ways=2, shots=4, image_size=6, colour=True))
    for part in data[:2]:
        assert part.images.shape == (8, 3, 6, 6) and part.counts.tolist() == [4, 4]
        for at, name in enumerate(part.names):
            assert (part.images[4 * at : 4 * at + 4, 0, 0, 0] == 100 + 10 * int(name[-1])).all()
    assert {*data.train.names, *data.test.names} == {f"label0{n}" for n in range(4)}
    for change, message in (
        (
            {"val_labels": np.zeros(3, int)},
            r"val_labels in .* must be integers \[4\] or \[4, 1\], got int64 \[3\]",
        ),
        ({"val_images": np.zeros((4, 6, 6))}, "val_images in .* must be uint8"),
        ({f"{part}_images": np.zeros(1, object) for part in ("train",)}, "an array of Python objects"),
    ):
        np.savez(tmp_path / "bad.npz", **(arrays | change))
        with pytest.raises(ValueError, match=message):
            load_npz(tmp_path / "bad.npz")
    np.savez(tmp_path / "other.npz", x=np.zeros(3))
    with pytest.raises(ValueError, match="has none of the arrays train_images"):
        load_npz(tmp_path / "other.npz")
    np.savez_compressed(tmp_path / "bomb.npz", train_images=np.zeros((1 << 17, 32, 32), np.uint8))
    with pytest.raises(
        ValueError,
        match=r"train_images.npy in .*bomb.npz cannot be read: [\d,]+ bytes that are to become 134,",
    ):
        load_npz(tmp_path / "bomb.npz")
    with zipfile.ZipFile(tmp_path / "lzma.npz", "w", zipfile.ZIP_LZMA) as archive:
        archive.writestr("val_images.npy", b"x" * 100)
    with pytest.raises(ValueError, match="lzma.npz cannot be read: compressed by the method lzma"):
        load_npz(tmp_path / "lzma.npz")
    locked = bytearray((tmp_path / "m.npz").read_bytes())
    for at in range(len(locked)):
        if locked[at : at + 4] == b"PK\x01\x02":
            locked[at + 8] |= 1
    (tmp_path / "locked.npz").write_bytes(locked)
    with pytest.raises(ValueError, match="locked.npz cannot be read: it is encrypted"):
        load_npz(tmp_path / "locked.npz")
    array = io.BytesIO()
    np.lib.format.write_array_header_1_0(
        array, {"descr": "|u1", "fortran_order": False, "shape": (10**7, 60, 60)}
    )
    with zipfile.ZipFile(tmp_path / "large.npz", "w") as archive:
        archive.writestr("test_images.npy", array.getvalue())
    with pytest.raises(
        ValueError, match=r"large.npz cannot be read: uint8 \[10000000, 60, 60\] takes 36,000,000,000 bytes"
    ):
        load_npz(tmp_path / "large.npz")
    (tmp_path / "cut.npz").write_bytes((tmp_path / "m.npz").read_bytes()[:-30])
    with pytest.raises(ValueError, match="cut.npz is no complete .npz file"):
        load_npz(tmp_path / "cut.npz")
    with pytest.raises(FileNotFoundError):
        load_npz(tmp_path / "none.npz")
