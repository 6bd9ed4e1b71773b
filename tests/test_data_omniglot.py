"""Omniglot is read in place from archives and folders, and what is missing is named."""

import os
import tracemalloc
import warnings
import zipfile
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from mann_fast.data import load_dataset, load_omniglot
from mann_fast.data.omniglot import ALPHABETS, find_part

_BESIDE = Path(__file__).resolve().parents[1] / "../shared/omniglot"
REAL = Path(os.environ.get("MANN_FAST_TEST_DATA", _BESIDE))

SMALL = {"Angelic/character01": 3, "Angelic/character02": 2, "ULOG/character10": 2}


def write_part(root, classes=SMALL):
    """Drawings in Omniglot's layout: 105 x 105, one bit, ink 0; image i of class c has a block of its own."""
    for c, (name, count) in enumerate(classes.items()):
        folder = root / name
        folder.mkdir(parents=True)
        for i in range(count):
            pixels = np.ones((105, 105), bool)
            pixels[21 * c : 21 * c + 21, 21 * i : 21 * i + 21] = False
            Image.fromarray(pixels).save(folder / f"{c:04d}_{i + 1:02d}.png")
    return root


def zip_of(folder, archive, skip=()):
    with zipfile.ZipFile(archive, "w", zipfile.ZIP_DEFLATED) as out:
        for file in sorted(folder.rglob("*"), reverse=True):  # not in the order of names
            if file.name not in skip:
                out.write(file, file.relative_to(folder.parent))
        out.writestr("__MACOSX/images_evaluation/Angelic/character01/._0000_01.png", b"")
        out.writestr(f"{folder.name}/readme.txt", b"not an image")


def test_archive_and_folder_give_the_same_sorted_classes(tmp_path):
    folder = write_part(tmp_path / "a" / "images_evaluation")
    zip_of(folder, tmp_path / "images_evaluation.zip")
    with pytest.warns(UserWarning, match="missing"):
        loaded = [
            load_omniglot(path, "evaluation")
            for path in (folder, folder.parent, tmp_path, tmp_path / "images_evaluation.zip")
        ]
    for classes in loaded:
        assert classes.names == tuple(SMALL)
        assert classes.counts.tolist() == [3, 2, 2]
        assert torch.equal(classes.images, loaded[0].images)
    # Ink is bright, and lies where it was drawn
    images = loaded[0].images
    assert images.amax((1, 2)).eq(255).all() and images.float().mean() < 64
    assert (
        images[1, 1, 6] == 255 and images[1, 10, 10] == 0
    )  # class 0, image 1: the block at row 0, column 21


def test_places_and_names_that_are_found(tmp_path):
    assert find_part(tmp_path, "background") is None
    (tmp_path / "python").mkdir()
    half = tmp_path / "python" / "images_evaluation_half.zip"
    half.touch()
    assert find_part(tmp_path, "evaluation") == half
    whole = tmp_path / "python" / "images_evaluation.zip"
    whole.touch()
    assert find_part(tmp_path, "evaluation") == whole
    assert find_part(whole, "evaluation") == whole
    assert find_part(whole, "background") is None
    assert find_part(tmp_path / "images_evaluation.zip", "evaluation") is None


def test_what_is_missing_is_named(tmp_path):
    with pytest.warns(UserWarning, match="not all of Omniglot's evaluation part") as caught:
        load_omniglot(write_part(tmp_path / "images_evaluation"), "evaluation")
    message = str(caught[0].message)
    assert "18 alphabets (Atemayar_Qelisayer, Atlantean," in message and "Tibetan" in message
    assert "18 of 20 characters of Angelic" in message and "25 of 26 characters of ULOG" in message
    assert "17 images of Angelic/character01" in message


def test_a_complete_part_gives_no_warning(tmp_path, monkeypatch):
    monkeypatch.setitem(ALPHABETS, "evaluation", {"Angelic": 2, "ULOG": 1})
    monkeypatch.setattr("mann_fast.data.omniglot.IMAGES_PER_CLASS", 2)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        load_omniglot(write_part(tmp_path / "images_evaluation"), "evaluation")


def test_official_numbers():
    assert sum(ALPHABETS["background"].values()) == 964 and len(ALPHABETS["background"]) == 30
    assert sum(ALPHABETS["evaluation"].values()) == 659 and len(ALPHABETS["evaluation"]) == 20


def test_errors_say_what_is_wrong(tmp_path):
    with pytest.raises(ValueError, match="part must be one of 'background', 'evaluation', got 'test'"):
        load_omniglot(tmp_path, "test")
    with pytest.raises(FileNotFoundError, match="no images_background.zip and no folder images_background"):
        load_omniglot(tmp_path, "background")
    folder = write_part(tmp_path / "images_evaluation")
    with pytest.raises(FileNotFoundError, match="both parts of Omniglot are needed"):
        load_dataset(tmp_path)  # Omniglot, but without its background part
    (folder / "Angelic" / "character01" / "0000_02.png").write_bytes(b"\x89PNG\r\n\x1a\n")
    with pytest.raises(ValueError, match="Angelic/character01/0000_02.png in .* is damaged"):
        load_omniglot(folder, "evaluation")
    zip_of(folder, tmp_path / "images_background.zip")
    data = (tmp_path / "images_background.zip").read_bytes()
    (tmp_path / "images_background.zip").write_bytes(data[: len(data) // 2])
    with pytest.raises(ValueError, match="is not a complete zip archive .*fetch it again"):
        load_omniglot(tmp_path, "background")
    middle = len(data) // 3
    (tmp_path / "images_background.zip").write_bytes(data[:middle] + b"?" * 400 + data[middle + 400 :])
    with pytest.raises(ValueError, match="is damaged|not a complete zip"):
        load_omniglot(tmp_path, "background")
    (tmp_path / "images_background.zip").unlink()
    (tmp_path / "images_background" / "Angelic").mkdir(parents=True)
    with pytest.raises(ValueError, match=r"holds no ALPHABET/characterNN/\*.png"):
        load_omniglot(tmp_path, "background")


ENTRY = "images_evaluation/Angelic/character01/0001_01.png"


def archive_of(path, data, method=zipfile.ZIP_DEFLATED, change=()):
    """An archive of one entry. change: (place in its central record, place in its local one or None, bytes)."""
    with zipfile.ZipFile(path, "w", method) as out:
        out.writestr(ENTRY, data)
    raw = bytearray(path.read_bytes())
    for central, local, new in change:
        for record, place in ((b"PK\1\2", central), (b"PK\3\4", local)):
            if place is not None:
                start = raw.index(record) + place
                raw[start : start + len(new)] = new
    path.write_bytes(raw)


@pytest.mark.parametrize(
    ("method", "change", "named"),
    [
        (zipfile.ZIP_DEFLATED, [(8, 6, b"\1")], "encrypted"),
        (zipfile.ZIP_BZIP2, [], "the method bzip2; expected deflate or none"),
        (zipfile.ZIP_LZMA, [], "the method lzma; expected deflate or none"),
        (zipfile.ZIP_DEFLATED, [(10, 8, b"\x61")], "the method wavpack"),
        (zipfile.ZIP_DEFLATED, [(10, 8, b"\x3f")], "the method 63"),
        (zipfile.ZIP_DEFLATED, [(8, 6, b"\x20")], "patched data"),
    ],
)
def test_an_archive_encrypted_or_oddly_compressed_is_damaged(method, change, named, tmp_path):
    image = write_part(tmp_path / "images_evaluation", {"Angelic/character01": 1}).rglob("*.png")
    archive = tmp_path / "images_evaluation_odd.zip"
    archive_of(archive, next(image).read_bytes(), method, change)
    with pytest.raises(
        ValueError, match=f"Angelic/character01/0001_01.png in .*_odd.zip is damaged: .*{named}"
    ):
        load_omniglot(archive, "evaluation")


def test_an_archive_newer_than_zipfile_is_named(tmp_path):
    archive_of(tmp_path / "images_evaluation.zip", b"", change=[(6, None, b"\xc8")])
    with pytest.raises(
        ValueError, match=r"images_evaluation.zip is not a complete zip archive \(zip file version"
    ):
        load_omniglot(tmp_path, "evaluation")


@pytest.mark.parametrize("size", [None, 500])
def test_entries_are_bounded_before_they_are_inflated(size, tmp_path):
    """Whether an entry says how large it is, or lies."""
    change = [] if size is None else [(24, None, size.to_bytes(4, "little"))]
    archive_of(tmp_path / "images_evaluation.zip", b"\0" * 100_000_000, change=change)
    named = "100,000,000 bytes; an image of Omniglot may have up to 1,048,576" if size is None else "CRC"
    tracemalloc.start()
    try:
        with pytest.raises(ValueError, match=f"0001_01.png in .* is damaged: .*{named}"):
            load_omniglot(tmp_path, "evaluation")
        assert tracemalloc.get_traced_memory()[1] < 20_000_000
    finally:
        tracemalloc.stop()


def test_what_is_no_image_is_named_by_its_file_alone(tmp_path):
    archive_of(tmp_path / "images_evaluation.zip", b"no image")
    with pytest.raises(ValueError, match="0001_01.png in .* is damaged: not an image$"):
        load_omniglot(tmp_path, "evaluation")


def test_a_tilde_is_the_home_folder(tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.setenv("USERPROFILE", str(tmp_path))
    write_part(tmp_path / "data" / "images_evaluation", {"Angelic/character01": 19})
    with pytest.warns(UserWarning, match="; missing: 19 alphabets .* 1 image of Angelic/character01$"):
        assert load_omniglot("~/data", "evaluation").num_classes == 1


@pytest.fixture(scope="module")
def real():
    if not (REAL / "images_background.zip").exists():
        pytest.skip(
            f"no images_background.zip in {REAL} (MANN_FAST_TEST_DATA: a folder with Omniglot's archives)"
        )
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        data = load_dataset(REAL)
    return data, [str(warning.message) for warning in caught]


def test_real_background_set(real):
    classes = real[0].train
    assert not [message for message in real[1] if "images_background" in message]
    assert classes.num_classes == 964 and classes.counts.eq(20).all()
    assert classes.images.shape == (19280, 20, 20)
    assert list(classes.names) == sorted(classes.names)
    assert classes.names[0] == "Alphabet_of_the_Magi/character01"
    assert classes.images.amax((1, 2)).eq(255).all()
    with zipfile.ZipFile(REAL / "images_background.zip") as archive:
        name = next(n for n in archive.namelist() if "Greek/character05" in n and n.endswith("_07.png"))
        with archive.open(name) as file:
            ink = 1 - np.asarray(Image.open(file), float)
    index = classes.names.index("Greek/character05")
    image = classes.images[classes.starts[index] + 6].numpy()
    means = np.kron(ink, np.ones((20, 20))).reshape(20, 105, 20, 105).mean((1, 3))  # share of ink per pixel
    assert np.corrcoef(means.ravel(), image.ravel())[0, 1] > 0.9


def test_real_dataset_is_split_officially(real):
    data = real[0]
    assert data.kind == "omniglot" and data.train.num_classes == 964 and data.test.num_classes >= 346
    assert {name.split("/")[0] for name in data.train.names} == set(ALPHABETS["background"])
    assert {name.split("/")[0] for name in data.test.names} <= set(ALPHABETS["evaluation"])
