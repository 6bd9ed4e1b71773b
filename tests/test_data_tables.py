"""Images that a CSV file or a data set in Python lists."""

import math

import numpy as np
import pytest
import torch
from PIL import Image
from torch.utils.data import ConcatDataset

from mann_fast.cli import main
from mann_fast.data import Episodes, load_csv, load_dataset, load_folder, load_pairs

pytestmark = [pytest.mark.once, pytest.mark.filterwarnings("ignore:only .* to train on")]


def picture(seed, size=(24, 16)):
    return Image.fromarray(np.random.default_rng(seed).integers(0, 256, (*size, 3), np.uint8))


@pytest.fixture
def mini(tmp_path):
    """mini-ImageNet's layout: 4, 3 and 3 classes of 4 images each, and the same images in folders of classes."""
    (tmp_path / "mini" / "images").mkdir(parents=True)
    number = 0
    for part, count in (("train", 4), ("val", 3), ("test", 3)):
        lines = ["filename,label"]
        for at in range(count):
            (tmp_path / "folders" / part / f"{part}{at}").mkdir(parents=True)
            for _ in range(4):
                name = f"n{number:04d}.png"
                picture(number).save(tmp_path / "mini" / "images" / name)
                picture(number).save(tmp_path / "folders" / part / f"{part}{at}" / name)
                lines.append(f"{name},{part}{at}")
                number += 1
        (tmp_path / "mini" / f"{part}.csv").write_text("\r\n".join(lines[:1] + lines[:0:-1]) + "\r\n")
    return tmp_path / "mini"


@pytest.mark.parametrize("colour", [False, True])
def test_lists_are_as_folders(mini, colour):
    listed, folders = (
        load_dataset(source, image_size=12, colour=colour, ways=2, shots=4)
        for source in (mini, mini.parent / "folders")
    )
    assert listed.train.names == ("train0", "train1", "train2", "train3")
    assert listed.test.names == ("test0", "test1", "test2")
    for one, other in ((listed.train, folders.train), (listed.test, folders.test)):
        assert one.names == other.names and torch.equal(one.starts, other.starts)
        for at in range(one.num_classes):  # within a class in the order of the lines
            a, b = one.select([at]).images, other.select([at]).images
            assert torch.equal(a, b.flip(0))


def test_classes_that_recur_are_put_together(mini):
    for part in ("val", "test"):
        text = (mini / f"{part}.csv").read_text()
        (mini / f"{part}.csv").write_text(text.replace(f",{part}", ",train"))
    data = load_dataset(mini, image_size=8, ways=2, shots=4)
    assert sorted([*data.train.names, *data.test.names]) == ["train0", "train1", "train2", "train3"]
    assert len(data.train.images) + len(data.test.images) == 40


def test_files_lie_where_people_put_them(mini):
    expected = load_csv(mini / "train.csv", image_size=8).images
    (mini / "images").rename(mini / "train")  # flat, so not folders of classes
    assert torch.equal(load_csv(mini / "train.csv", image_size=8).images, expected)
    for part in ("val", "test"):
        (mini / part).symlink_to(mini / "train")
    data = load_dataset(mini, image_size=8, ways=2, shots=4)
    assert torch.equal(data.train.images, expected) and data.test.names == ("test0", "test1", "test2")


def test_one_list_alone_is_split(mini):
    data = load_dataset(mini / "train.csv", image_size=8, ways=2, shots=4)
    assert data.train.num_classes == data.test.num_classes == 2


@pytest.mark.parametrize(
    ("first", "line"),
    [
        ("label,filename", "{label},{file}"),
        (",filename,label", "{at},{file},{label}"),  # as pandas writes it, with its index
        ("file;breed", "{file};{label}"),
        ("file\tbreed", "{file}\t{label}"),
        ("filename,split,class", "{file},train,{label}"),
    ],
)
def test_columns_may_be_named_in_any_order(mini, first, line):
    expected = load_csv(mini / "train.csv", image_size=8)
    rows = [row.split(",") for row in (mini / "train.csv").read_text().split()[1:]]
    lines = [line.format(at=at, file=file, label=label) for at, (file, label) in enumerate(rows)]
    (mini / "train.csv").write_text("\n".join([first, *lines]))
    found = load_csv(mini / "train.csv", image_size=8)
    assert found.names == expected.names and torch.equal(found.images, expected.images)


def test_a_label_is_not_guessed(mini):
    (mini / "train.csv").write_text("filename,split,breed\nn0000.png,train,cat\n")
    with pytest.raises(ValueError, match="label or class, .* its columns are filename, split, breed"):
        load_csv(mini / "train.csv")


@pytest.mark.parametrize(
    ("content", "error", "message"),
    [
        (
            b"gone.png,a\nlost.png,a\n",
            FileNotFoundError,
            "gone.png in line 1 .*, nor do the 1 others",
        ),  # no names of columns
        (b"file,label\n,a\n", ValueError, "line 2 of .* must have a file and its label, got ,a"),
        (b"n0000.png,\xe4\n", ValueError, "train.csv must be text in UTF-8"),
        (b"n0000.png,a\n" + b"x" * 200_000, ValueError, "line 2 of .* cannot be read: field larger than"),
        (b"file,label\n" + b"x" * 5_000 + b",a", FileNotFoundError, "x{200} in line 2 of .* does not exist"),
    ],
)
def test_what_is_no_list_is_one_line(mini, content, error, message):
    (mini / "train.csv").write_bytes(content)
    with pytest.raises(error, match=message) as caught:
        load_csv(mini / "train.csv")
    assert len(str(caught.value)) < 700


def test_a_list_to_train_on_may_stand_alone(mini):
    for part in ("val", "test"):
        (mini / f"{part}.csv").unlink()
    data = load_dataset(mini, image_size=8, ways=2, shots=4)
    assert sorted([*data.train.names, *data.test.names]) == ["train0", "train1", "train2", "train3"]
    folders = mini.parent / "folders" / "train"
    (folders / "train.csv").write_text(
        "of something else\n"
    )  # beside folders of classes it is no list of them
    assert load_dataset(folders, image_size=8, ways=2, shots=4).train.num_classes == 2
    with pytest.raises(
        NotADirectoryError, match="n0000.png is a file; expected a folder .*, a .csv, or an .npz"
    ):
        load_dataset(mini / "images" / "n0000.png")


def test_the_command_line_trains_on_lists(mini, tmp_path, capsys):
    small = "--ways 2 --shots 4 --hidden-size 8 --slots 8 --slot-size 4 --heads 1 --steps 2 --batch 2 --eval-episodes 4"
    assert main(["train", "--data", str(mini), "--out", str(tmp_path / "run"), *small.split()]) == 0, (
        capsys.readouterr().err
    )
    assert "4 classes to train on, 3 held out" in capsys.readouterr().err


def test_what_a_list_lacks_is_said_by_its_line(mini):
    train = mini / "train.csv"
    train.write_text("label,filename\nb,gone.png\na,n0000.png\na,lost.png\n")
    said = r"skipped 2 missing image files of .*train.csv: gone.png in line 2, lost.png in line 4"
    with pytest.warns(UserWarning, match=said):
        found = load_csv(train)
    assert found.names == ("a", "b") and found.counts.tolist() == [1, 0]  # as of files that cannot be read
    train.write_text("n0000.png,a\nn0001.png\n")
    with pytest.raises(
        ValueError, match=r"line 2 of .*train.csv must have a file and its label, got n0001.png"
    ):
        load_csv(train)
    train.write_text("filename,label\n")
    with pytest.raises(ValueError, match="lists no images"):
        load_csv(train)
    train.write_text('images/n0000.png, "a b", 0.5\n\nn0001.png,a b\n', encoding="utf-8-sig")
    assert load_csv(train).names == ("a b",) and load_csv(train).counts.tolist() == [2]
    (mini / "images" / "n0001.png").write_bytes(b"no image")
    with pytest.warns(UserWarning, match="skipped 1 unreadable image file"):
        assert load_csv(train).counts.tolist() == [1]


class Pairs(torch.utils.data.Dataset):
    def __init__(self, items, classes=None):
        self.items = items
        if classes is not None:
            self.classes = classes

    def __len__(self):
        return len(self.items)

    def __getitem__(self, at):
        return self.items[at]


def pixels_of(file):
    with Image.open(file) as image:
        return np.array(image)


@pytest.mark.parametrize("colour", [False, True])
def test_a_data_set_is_as_a_folder(mini, colour):
    folder = mini.parent / "folders" / "train"
    expected = load_folder(folder, image_size=12, colour=colour)
    files = [(file, int(file.parent.name[-1])) for file in sorted(folder.rglob("*.png"))]
    of_path = Pairs(files, expected.names)
    of_array = [(pixels_of(file), expected.names[label]) for file, label in files]
    of_pil = [(Image.fromarray(pixels_of(file)), torch.tensor(label)) for file, label in files]
    of_pil = Pairs(of_pil, list(expected.names))
    of_tensor = [(torch.from_numpy(image).permute(2, 0, 1) / 255, name) for image, name in of_array]
    for dataset in (of_path, of_pil, of_array, of_tensor):
        found = load_pairs(dataset, image_size=12, colour=colour)
        assert found.names == expected.names and torch.equal(found.starts, expected.starts)
        assert torch.equal(found.images, expected.images)


def test_a_part_of_a_data_set_has_the_names_of_the_whole():
    whole = Pairs([(picture(at, (8, 8)), at % 3) for at in range(6)], np.array(["ka", "ro", "mu"]))
    part = torch.utils.data.Subset(torch.utils.data.Subset(whole, range(1, 6)), [0, 1])
    assert load_pairs(part, image_size=8).names == ("ro", "mu")


def test_parts_put_together_have_the_names_of_each():
    half = Pairs([(picture(at, (8, 8)), at) for at in range(2)], ["ka", "ro"])
    assert load_pairs(ConcatDataset([half, half]), image_size=8).names == ("ka", "ro")
    unnamed = Pairs(half.items)
    assert load_pairs(ConcatDataset([half, unnamed]), image_size=8).names == ("label00", "label01")


def test_labels_are_those_that_a_learner_takes():
    labels = [("b", 2), 0.5, "x", 3.0, ("a", 1), 2]
    found = load_pairs([(picture(at, (8, 8)), label) for at, label in enumerate(labels)], image_size=8)
    assert found.names == ("0.5", "label02", "label03", "x", "('a', 1)", "('b', 2)")


def test_episodes_of_a_data_set():
    items = [(picture(at, (8, 8)), np.int64(at % 12)) for at in range(48)]
    data = load_dataset(Pairs(items), image_size=8, colour=True, ways=3, shots=4)
    names = {*data.train.names, *data.test.names}
    assert names == {f"label{at:02d}" for at in range(12)} and data.test.num_classes == 3
    assert Episodes(data.train, ways=3, shots=4).sample(2).inputs.shape == (12, 2, 3 * 8 * 8 + 3)


def test_dark_ink_is_inverted_as_in_a_folder():
    page = np.full((10, 10), 255, np.uint8)
    page[4:6, 4:6] = 0
    found = load_pairs([(page, "a"), (page, "b")], image_size=10)
    assert found.inverted and found.images[0, 5, 5] == 255 and found.images[0, 0, 0] == 0
    assert not load_pairs([(page, "a")], image_size=10, invert=False).inverted
    fruit = np.full((10, 10, 3), 255, np.uint8)
    fruit[2:8, 2:8] = (220, 40, 30)
    assert not load_pairs([(fruit, "a"), (fruit, "b")], image_size=10).inverted


@pytest.mark.parametrize(
    ("dataset", "error", "message"),
    [
        (3, TypeError, "dataset must have a length and items, got int"),
        ([np.zeros((4, 4))], TypeError, r"dataset\[0\] must be an image and its label, got ndarray"),
        ([(np.zeros((4, 4)), [1])], TypeError, r"label of dataset\[0\] must be hashable, got list"),
        ([(np.zeros((4, 4)), math.nan)], ValueError, r"label of dataset\[0\] must be a label, got nan"),
        (
            ConcatDataset([Pairs([(np.eye(4), 0)], ["a", "b"]), Pairs([(np.eye(4), 0)], ["b", "a"])]),
            ValueError,
            "parts of the same classes",
        ),
        ([(np.zeros(3), 1)], ValueError, r"dataset\[0\] cannot be read as an image"),
        (Pairs([(np.eye(4), 0), (np.eye(4), 1)], ["a", "a"]), ValueError, "each label a name of its own"),
    ],
)
def test_what_is_no_data_set_of_images(dataset, error, message):
    with pytest.raises(error, match=message):
        load_pairs(dataset)
