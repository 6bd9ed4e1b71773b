"""Image files and folders of them become classes of small grey squares."""

import io
import random
import struct
import zlib

import numpy as np
import pytest
import torch
from PIL import Image, ImageDraw

from mann_fast.data import ClassImages, image_files, load_dataset, load_folder, load_images, read_grey
from mann_fast.data import images as images_module
from mann_fast.data.images import UNREADABLE, are_drawn


def drawing(size=(40, 40), ink=0, paper=255):
    """A letter L, whose parts can be told apart after any turn."""
    image = Image.new("L", size, paper)
    draw = ImageDraw.Draw(image)
    width, height = size
    draw.rectangle((width // 4, height // 8, width // 4 + width // 10, height * 7 // 8), fill=ink)
    draw.rectangle((width // 4, height * 3 // 4, width * 3 // 4, height * 7 // 8), fill=ink)
    return image


def classes_of(counts, size=3):
    total = sum(counts)
    images = torch.arange(total * size * size).view(total, size, size).to(torch.uint8)
    starts = torch.tensor([0, *counts]).cumsum(0)
    return ClassImages(images, starts, tuple(f"class{i}" for i in range(len(counts))))


def test_select_takes_classes_in_the_order_given():
    classes = classes_of([2, 0, 3])
    chosen = classes.select([2, 1])
    assert chosen.names == ("class2", "class1")
    assert chosen.starts.tolist() == [0, 3, 3]
    assert torch.equal(chosen.images, classes.images[2:])
    assert classes.select([]).num_classes == 0


@pytest.mark.parametrize("index", [-1, 3])
def test_select_refuses_an_index_outside(index):
    with pytest.raises(IndexError, match=rf"\[0, 3\), got {index}"):
        classes_of([1, 1, 1]).select([index])


def test_rotated_has_each_class_four_times():
    classes = classes_of([2, 1])
    turned = classes.rotated()
    assert turned.names == tuple(f"class{i}{turn}" for turn in ("", "@90", "@180", "@270") for i in range(2))
    assert turned.counts.tolist() == [2, 1] * 4
    for quarter in range(4):
        expected = np.rot90(classes.images.numpy(), quarter, (1, 2))
        assert np.array_equal(turned.images[3 * quarter : 3 * quarter + 3].numpy(), expected)


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"images": torch.zeros(3, 2, 2)}, TypeError, "images must be a uint8 tensor, got torch.float32"),
        ({"images": torch.zeros(3, 2, 3, dtype=torch.uint8)}, ValueError, r"\[M, S, S\], got \[3, 2, 3\]"),
        ({"starts": torch.tensor([0, 3])}, ValueError, r"starts must have shape \[3\]"),
        ({"starts": torch.tensor([0.0, 1, 3])}, TypeError, "starts must be an int64 tensor"),
        ({"starts": torch.tensor([0, 4, 3])}, ValueError, "starts must go from 0 to 3"),
        ({"starts": torch.tensor([0, 1, 2])}, ValueError, "starts must go from 0 to 3"),
        ({"names": ("a", "a")}, ValueError, "names must all be different"),
    ],
)
def test_class_images_refuses_what_does_not_fit(change, error, message):
    fields = {
        "images": torch.zeros(3, 2, 2, dtype=torch.uint8),
        "starts": torch.tensor([0, 1, 3]),
        "names": ("a", "b"),
    }
    ClassImages(**fields)
    with pytest.raises(error, match=message):
        ClassImages(**(fields | change))


def test_read_grey_resizes_like_an_average_over_areas(tmp_path):
    pixels = np.random.RandomState(0).randint(0, 256, (60, 60)).astype(np.uint8)
    Image.fromarray(pixels).save(tmp_path / "noise.png")
    grey = read_grey(tmp_path / "noise.png", 1)
    assert grey.shape == (1, 1) and grey.item() == 0  # a single value has nothing to stretch
    ramp = np.repeat(np.arange(60, dtype=np.uint8)[None] * 4, 60, 0)
    Image.fromarray(ramp).save(tmp_path / "ramp.png")
    grey = read_grey(tmp_path / "ramp.png", 6).astype(int)
    means = ramp.reshape(6, 10, 6, 10).mean((1, 3))
    expected = (means - means.min()) / (means.max() - means.min()) * 255
    assert np.abs(grey - expected)[:, 1:-1].max() < 6  # the outer columns also average beyond the edge


@pytest.mark.parametrize("mode", ["1", "L", "LA", "P", "RGB", "RGBA", "I;16"])
def test_every_png_mode_gives_the_same_grey(mode, tmp_path):
    image = drawing()
    if mode == "I;16":
        image = Image.fromarray(np.asarray(image).astype(np.uint16) * 257)
    else:
        image = image.convert(mode)
    image.save(tmp_path / "image.png")
    drawing().save(tmp_path / "plain.png")
    assert np.array_equal(read_grey(tmp_path / "image.png", 20), read_grey(tmp_path / "plain.png", 20))


def test_transparent_is_white_paper(tmp_path):
    image = Image.new("RGBA", (40, 40), (0, 0, 0, 0))
    image.paste((0, 0, 0, 255), (10, 10, 20, 30))
    image.save(tmp_path / "image.png")
    grey = read_grey(tmp_path / "image.png", 20)
    assert grey[0, 0] == 255 and grey[10, 7] == 0


def test_jpeg_of_any_size_is_close_to_the_png(tmp_path):
    for size in (40, 1200):
        image = drawing((size, size)).convert("RGB")
        image.save(tmp_path / "image.jpg", quality=95)
        image.save(tmp_path / "image.png")
        difference = read_grey(tmp_path / "image.jpg", 20).astype(int) - read_grey(tmp_path / "image.png", 20)
        assert np.abs(difference).max() < 25


@pytest.mark.parametrize("orientation", range(1, 9))
def test_exif_orientation_is_undone(orientation, tmp_path):
    upright = drawing()
    # What a camera stores for each orientation, by the standard: the inverse of what a viewer does
    stored = {
        1: upright,
        2: upright.transpose(Image.Transpose.FLIP_LEFT_RIGHT),
        3: upright.transpose(Image.Transpose.ROTATE_180),
        4: upright.transpose(Image.Transpose.FLIP_TOP_BOTTOM),
        5: upright.transpose(Image.Transpose.TRANSPOSE),
        6: upright.transpose(Image.Transpose.ROTATE_90),
        7: upright.transpose(Image.Transpose.TRANSVERSE),
        8: upright.transpose(Image.Transpose.ROTATE_270),
    }[orientation]
    exif = Image.Exif()
    exif[0x0112] = orientation
    stored.save(tmp_path / "image.jpg", exif=exif, quality=95)
    upright.save(tmp_path / "upright.jpg", quality=95)
    difference = read_grey(tmp_path / "image.jpg", 20).astype(int) - read_grey(tmp_path / "upright.jpg", 20)
    assert np.abs(difference).max() < 40


@pytest.mark.parametrize("size", [(100, 20), (20, 100), (33, 35), (1, 1), (1, 500), (3, 7)])
def test_any_shape_is_fitted_into_the_square(size, tmp_path):
    drawing(size, ink=30, paper=200).save(tmp_path / "image.png")
    grey = read_grey(tmp_path / "image.png", 20)
    assert grey.shape == (20, 20) and grey.dtype == np.uint8
    if size == (100, 20):
        assert (grey[:8] == 255).all() and (grey[12:] == 255).all() and grey.min() == 0


def test_dark_on_light_is_inverted_and_photographs_are_not(tmp_path):
    for i, (ink, paper) in enumerate([(0, 255), (60, 190), (0, 255)]):
        drawing(ink=ink, paper=paper).save(tmp_path / f"{i}.png")
    images, _, inverted = load_images(sorted(tmp_path.iterdir()))
    assert inverted and images[:, 0, 0].eq(0).all() and images.amax((1, 2)).eq(255).all()
    kept, _, inverted = load_images(sorted(tmp_path.iterdir()), invert=False)
    assert not inverted and torch.equal(kept, 255 - images)
    for path in tmp_path.iterdir():
        drawing(ink=255, paper=0).save(path)
    light, _, inverted = load_images(sorted(tmp_path.iterdir()))
    assert not inverted and (light[0].int() - images[0].int()).abs().max() <= 2
    noise = np.random.RandomState(0).randint(0, 256, (30, 30, 3)).astype(np.uint8)
    for path in tmp_path.iterdir():
        Image.fromarray(noise).save(path)
    assert load_images(tmp_path.iterdir())[2] is False
    fruit, pen = (np.full((30, 30, 3), 255, np.uint8) for _ in range(2))  # on a light ground, both
    fruit[8:22, 8:22], pen[14:16, 4:26] = (220, 40, 30), (40, 40, 220)
    for pixels, drawn in ((fruit, False), (pen, True)):
        for path in tmp_path.iterdir():
            Image.fromarray(pixels).save(path)
        assert load_images(tmp_path.iterdir())[2] is drawn
        assert load_images(tmp_path.iterdir(), colour=True)[2] is False


def test_most_of_the_pictures_say_whether_all_are_drawn():
    def in_colour(at):
        asked.append(at)
        return np.stack([paper[0], *[paper[0] * (at % 10 == 0)] * 2])

    paper, asked = [np.full((4, 4), 250, np.uint8)] * 1001, []
    assert not are_drawn(paper, in_colour) and len(asked) == 91  # all but those of every tenth are red
    assert are_drawn(paper[:1], in_colour) and not are_drawn([], in_colour)


def folder_of_classes(path, counts):
    for name, count in counts.items():
        (path / name).mkdir(parents=True)
        for i in range(count):
            drawing((20 + i, 20 + i)).save(path / name / f"{i}.png")
    return path


def test_folder_is_read_by_suffix_in_any_case_and_by_content(tmp_path):
    folder_of_classes(tmp_path, {"b": 2, "a": 1})
    colour = Image.new("RGB", (50, 30), "white")
    colour.paste((200, 30, 30), (10, 10, 20, 20))
    colour.save(tmp_path / "a" / "photo.JPEG")
    colour.save(tmp_path / "a" / "UPPER.PNG")
    colour.save(tmp_path / "a" / "no suffix", format="PNG")
    (tmp_path / "a" / ".hidden.png").write_bytes(b"")
    (tmp_path / "__MACOSX").mkdir()
    (tmp_path / ".cache").mkdir()
    (tmp_path / "readme.md").write_text("beside the classes")
    classes = load_folder(tmp_path, image_size=16, min_images=2)
    assert classes.names == ("a", "b") and classes.counts.tolist() == [4, 2]
    assert classes.images.shape == (6, 16, 16) and classes.inverted
    names = [file.name for file in image_files(tmp_path / "a")]
    assert names == ["0.png", "UPPER.PNG", "no suffix", "photo.JPEG"]


def test_unreadable_files_are_named_and_skipped(tmp_path):
    folder_of_classes(tmp_path, {"cat": 3, "dog": 2})
    whole = (tmp_path / "cat" / "0.png").read_bytes()
    (tmp_path / "cat" / "cut.png").write_bytes(whole[: len(whole) // 2])
    (tmp_path / "dog" / "text.jpg").write_text("this is no image")
    (tmp_path / "dog" / "empty.jpg").write_bytes(b"")
    with pytest.warns(UserWarning, match=r"skipped 3 unreadable") as caught:
        classes = load_folder(tmp_path)
    for name in ("cut.png", "text.jpg (not an image)", "empty.jpg"):
        assert name in str(caught[0].message)
    assert classes.counts.tolist() == [3, 2]


def write_png(path, width, height):
    """A white PNG of one bit a pixel, never held in memory."""

    def chunk(kind, data):
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))

    deflate, row = zlib.compressobj(1), b"\0" + b"\xff" * ((width + 7) // 8)
    with open(path, "wb") as file:
        file.write(b"\x89PNG\r\n\x1a\n")
        file.write(chunk(b"IHDR", struct.pack(">IIBBBBB", width, height, 1, 0, 0, 0, 0)))
        for start in range(0, height, 1 << 20):
            file.write(chunk(b"IDAT", deflate.compress(row * min(1 << 20, height - start))))
        file.write(chunk(b"IDAT", deflate.flush()) + chunk(b"IEND", b""))


@pytest.mark.parametrize(
    ("size", "named"),
    [
        ((1, 170_000_000), "1 x 170,000,000 pixels; a side may have up to 65,535"),
        ((65_536, 1), "65,536 x 1 pixels"),
        ((20_000, 10_000), "Image size .* exceeds limit"),
    ],
)
def test_an_image_too_large_is_named_and_skipped(size, named, tmp_path):
    folder_of_classes(tmp_path, {"cat": 1, "dog": 1})
    write_png(tmp_path / "cat" / "large.png", *size)
    with pytest.warns(
        UserWarning, match=rf"skipped 1 unreadable image file: .*large.png \({named}"
    ) as caught:
        classes = load_folder(tmp_path)
    assert len(caught) == 1 and classes.counts.tolist() == [1, 1]


def test_the_longest_side_is_read(tmp_path):
    write_png(tmp_path / "line.png", 1, 65_535)
    assert read_grey(tmp_path / "line.png", 20).shape == (20, 20)


def test_a_large_image_that_pillow_takes_gives_no_warning_of_pillow(tmp_path, monkeypatch):
    drawing().save(tmp_path / "image.png")
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 1000)  # of 1,600: beyond it, and within twice as many
    assert len(load_images([tmp_path / "image.png"])[1]) == 1


def test_an_image_that_exhausts_memory_is_named_and_skipped(tmp_path, monkeypatch):
    def exhaust(image):
        raise MemoryError

    drawing().save(tmp_path / "image.png")
    monkeypatch.setattr(images_module, "_to_grey", exhaust)
    with pytest.warns(UserWarning, match=r"image\.png \(needs more memory than there is\)"):
        assert load_images([tmp_path / "image.png"])[1] == []


@pytest.mark.parametrize(
    ("name", "mode", "options"),
    [
        ("a.tif", "L", {}),
        ("a.TIFF", "RGB", {"compression": "tiff_lzw"}),
        ("a.tif", "1", {"compression": "group4"}),
        ("a.tif", "I;16", {}),
        ("a.tif", "F", {}),
        ("a.pgm", "L", {}),
        ("a.pgm", "I;16", {"format": "PPM"}),
        ("a.ppm", "RGB", {}),
        ("a.pbm", "1", {}),
        ("a.webp", "RGB", {"lossless": True}),
        ("a.gif", "L", {}),
        ("a.bmp", "RGB", {}),
    ],
)
def test_formats_other_than_png_give_the_same_grey(name, mode, options, tmp_path):
    image = drawing()
    if mode == "I;16":
        image = Image.fromarray(np.asarray(image).astype(np.uint16) * 257)
    (tmp_path / "class").mkdir()
    image.convert(mode).save(tmp_path / "class" / name, **options)
    drawing().save(tmp_path / "plain.png")
    loaded = load_folder(tmp_path, invert=False)
    assert np.array_equal(loaded.images[0].numpy(), read_grey(tmp_path / "plain.png", 20))


def close_to_png(path):
    drawing().convert("RGB").save(path, quality=95)
    drawing().save(path.with_suffix(".png"))
    loaded, _, _ = load_images([path, path.with_suffix(".png")])
    assert loaded.shape[0] == 2 and (loaded[0].int() - loaded[1].int()).abs().max() < 30
    assert len(image_files(path.parent)) == 2


def test_avif_is_read(tmp_path):
    if "AVIF" not in images_module.readable_formats():
        pytest.skip("this Pillow has no AVIF")
    close_to_png(tmp_path / "a.avif")


def test_heic_is_read_where_pillow_heif_is_installed(tmp_path):
    pytest.importorskip("pillow_heif")
    assert "HEIF" in images_module.readable_formats()
    close_to_png(tmp_path / "a.heic")


@pytest.fixture
def no_heic(monkeypatch):
    formats = tuple(name for name in images_module.readable_formats() if name != "HEIF")
    monkeypatch.setattr(images_module, "readable_formats", lambda: formats)


def test_without_it_heic_files_are_counted_and_what_reads_them_is_named(tmp_path, no_heic):
    for name in ("cat", "dog"):
        (tmp_path / name).mkdir()
        for i in range(12):
            (tmp_path / name / f"{i}.HEIC").write_bytes(b"\0\0\0\x18ftypheic")
    install = r"24 \.heic, which needs pillow-heif \(pip install pillow-heif\)"
    with pytest.raises(ValueError, match=rf"no sub-folder with images.*found 24 files .*\({install}"):
        load_folder(tmp_path)
    for name in ("cat", "dog"):
        drawing().save(tmp_path / name / "0.png")
    with pytest.warns(UserWarning, match=rf"passed over 24 files that cannot be read as images \({install}"):
        assert load_folder(tmp_path).counts.tolist() == [1, 1]
    with pytest.warns(UserWarning, match=r"skipped 1 unreadable image file: .*0\.HEIC \(needs pillow-heif"):
        assert load_images([tmp_path / "cat" / "0.HEIC"])[1] == []


def test_files_passed_over_are_counted_by_suffix(tmp_path):
    folder_of_classes(tmp_path, {"cat": 2, "dog": 2})
    for name in ("1.tga", "2.TGA", "3.tga", "notes.txt", "more.txt", "README", ".hidden"):
        (tmp_path / "cat" / name).write_bytes(b"something")
    (tmp_path / "beside.txt").write_text("not in a class")
    with pytest.warns(UserWarning) as caught:
        load_folder(tmp_path)
    assert [str(one.message) for one in caught] == [
        "passed over 6 files that cannot be read as images (3 .tga, 2 .txt, 1 without a suffix)"
    ]


def test_pixels_that_are_not_finite_are_named(tmp_path):
    pixels = np.zeros((20, 20), np.float32)
    pixels[3, 4] = np.nan
    Image.fromarray(pixels).save(tmp_path / "a.tif")
    with pytest.warns(UserWarning, match=r"a\.tif \(has pixels that are not finite\)"):
        load_images([tmp_path / "a.tif"])


def test_a_tilde_is_the_home_folder(tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.setenv("USERPROFILE", str(tmp_path))
    folder_of_classes(tmp_path / "pictures", {"cat": 1, "dog": 1})
    picture = "~/pictures/cat/0.png"
    assert load_folder("~/pictures").names == ("cat", "dog")
    assert image_files("~/pictures/cat") == [tmp_path / "pictures" / "cat" / "0.png"]
    assert load_images([picture])[1] == [tmp_path / "pictures" / "cat" / "0.png"]
    assert read_grey(picture, 20).shape == (20, 20)
    with pytest.warns(UserWarning, match="only 1 class to train on"):
        assert load_dataset("~/pictures", ways=1, shots=1).kind == "folder"
    with pytest.raises(FileNotFoundError, match="~nobody-of-this-name/x does not exist"):
        load_dataset("~nobody-of-this-name/x")


def test_damaged_files_never_raise_anything_else(tmp_path):
    """Bytes changed, cut and repeated at random: the image is read, or one of UNREADABLE is raised."""
    generator = random.Random(0)
    for name in images_module.readable_formats():
        buffer = io.BytesIO()
        exif = Image.Exif()
        exif[0x0112] = 6
        extra = {"exif": exif} if name in ("PNG", "JPEG", "WEBP") else {}
        drawing().convert("RGB").save(buffer, format=name, **extra)
        for _ in range(150):
            data = bytearray(buffer.getvalue())
            for _ in range(generator.randint(1, 4)):
                place = generator.randrange(len(data))
                data[place] = generator.randrange(256)
            if generator.random() < 0.3:
                del data[generator.randrange(len(data)) :]
            try:
                grey = read_grey(io.BytesIO(data), 12)
            except UNREADABLE:
                continue
            assert grey.shape == (12, 12)


def test_too_few_images_name_the_class_and_how_many_are_needed(tmp_path):
    folder_of_classes(tmp_path, {"cat": 10, "dog": 4})
    (tmp_path / "empty").mkdir()
    with pytest.raises(ValueError, match=r"at least 10 images: 'dog' has 4, 'empty' has 0"):
        load_folder(tmp_path, min_images=10)


def test_two_classes_of_one_image_are_enough_to_load(tmp_path):
    classes = load_folder(folder_of_classes(tmp_path, {"cat": 1, "dog": 1}))
    assert classes.names == ("cat", "dog") and classes.counts.tolist() == [1, 1]


def test_a_folder_without_classes_says_what_is_wrong(tmp_path):
    with pytest.raises(FileNotFoundError, match="does not exist"):
        load_folder(tmp_path / "nowhere")
    with pytest.raises(ValueError, match="expected one sub-folder of PNG or JPEG images per class"):
        load_folder(tmp_path)
    drawing().save(tmp_path / "image.png")
    with pytest.raises(ValueError, match="the images lie in the folder itself"):
        load_folder(tmp_path)
    with pytest.raises(NotADirectoryError, match="is a file"):
        load_folder(tmp_path / "image.png")
    folder_of_classes(tmp_path / "train", {"cat": 1, "dog": 1})
    with pytest.raises(ValueError, match=r"give one of these instead \(train\)"):
        load_folder(tmp_path)
