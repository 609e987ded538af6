"""Sheets: the numbers as they are, and how they were made."""

import numpy
import pytest
import torch
from PIL import Image

from fluvial import sheets
from fluvial.errors import DataError, OptionError, ShapeError
from fluvial.model import Normalisation


def pixels(image):
    return torch.from_numpy(numpy.array(image)).permute(2, 0, 1)


def test_pixels_are_repeated_not_smoothed():
    images = torch.tensor([[0.0, 16.0], [8.0, 4.0]]).expand(4, 1, 2, 2)
    drawn = pixels(sheets.sheet(images, columns=2, scale=5))
    gap = 2
    tile = drawn[:, gap : gap + 10, gap : gap + 10]
    expected = torch.tensor([[0, 255], [128, 64]], dtype=torch.uint8)
    assert torch.equal(tile, expected.repeat_interleave(5, 0).repeat_interleave(5, 1).expand(3, 10, 10))
    assert drawn.shape == (3, 2 * 10 + 3 * gap, 2 * 10 + 3 * gap)
    assert torch.equal(drawn[:, 14:24, 14:24], tile)


def test_range_comes_from_the_arguments_then_the_normalisation_then_the_images():
    images = torch.full((1, 1, 4, 4), 2.0)
    images[..., 0, 0] = 0.0

    def grey(**given):
        return int(pixels(sheets.sheet(images, scale=1, **given))[0, 4, 4])

    assert grey() == 255
    assert grey(normalisation=Normalisation(low=0.0, high=8.0)) == 64
    assert grey(normalisation=Normalisation(low=0.0, high=8.0), high=4.0) == 128
    assert grey(low=2.0, high=3.0) == 0
    assert grey(low=-5.0, high=1.0) == 255


def test_colour_is_kept_and_other_channel_counts_show_the_first():
    red = torch.zeros(1, 3, 4, 4)
    red[:, 0] = 1.0
    assert pixels(sheets.sheet(red, scale=1))[:, 3, 3].tolist() == [255, 0, 0]
    latent = torch.zeros(1, 4, 4, 4)
    latent[:, 0] = 1.0
    assert pixels(sheets.sheet(latent, scale=1))[:, 3, 3].tolist() == [255, 255, 255]


def test_titles_stand_beside_their_rows():
    images = torch.zeros(6, 1, 8, 8)
    plain, titled = sheets.sheet(images, columns=3), sheets.sheet(images, columns=3, labels=["rectified", "VP"])
    assert titled.width > plain.width
    assert titled.height == plain.height
    margin = pixels(titled)[:, :, : titled.width - plain.width]
    assert (margin < 128).any()
    with pytest.raises(OptionError, match="1 labels for 2 rows"):
        sheets.sheet(images, columns=3, labels=["one"])


@pytest.mark.parametrize("side", [40, 700])
def test_sheets_beside_each_other_are_those_sheets_under_titles_that_grow_with_them(side):
    pictures = [Image.new("RGB", (side, side), shade) for shade in ("black", "red", "blue")]
    drawn = pixels(sheets.beside(pictures, ["1 step", "2 steps", "4 steps"]))
    above = drawn.shape[1] - side
    assert drawn.shape[2] == 3 * side + 2 * 16
    for k, picture in enumerate(pictures):
        left = k * (side + 16)
        assert torch.equal(drawn[:, above:, left : left + side], pixels(picture))
    # A title stands over the middle of its sheet, and is a fiftieth of the width in height, or 16 pixels at least.
    inked = (drawn[:, :above] < 128).all(0)
    rows, columns = inked.nonzero().unbind(1)
    middle = columns[(columns > side + 16) & (columns < 2 * side + 16)].double()
    assert abs(float(middle.min() + middle.max()) / 2 - (side + 16 + side / 2)) < 0.02 * side + 2
    height = int(rows.max() - rows.min())
    assert max(16, drawn.shape[2] / 56) * 0.5 < height < max(16, drawn.shape[2] / 56) * 1.3


@pytest.mark.parametrize("count", [1, 2, 3, 7, 10, 64, 100])
def test_default_grid_is_no_strip(count):
    image = sheets.sheet(torch.zeros(count, 1, 8, 8))
    assert 1 / 3 <= image.width / image.height <= 3


def test_points_are_drawn_where_they_are_with_equal_axes():
    corners = torch.tensor([[-1.0, -1.0], [1.0, -1.0], [1.0, 1.0]]).repeat(50, 1)
    drawn = pixels(sheets.sheet(corners))[0, 20:570, 60:600]  # without the numbers; dots have little red
    rows, columns = (drawn < 120).nonzero().unbind(1)
    low, left = rows > 275, columns < 270
    assert not (~low & left).any()
    corner = {
        name: torch.stack([columns[dots], rows[dots]]).double().mean(1)
        for name, dots in {"left": low & left, "right": low & ~left, "top": ~low & ~left}.items()
    }
    across, up = corner["right"] - corner["left"], corner["right"] - corner["top"]
    torch.testing.assert_close(across[0], up[1], atol=1.0, rtol=0)
    torch.testing.assert_close(torch.stack([across[1], up[0]]), torch.zeros(2).double(), atol=1.0, rtol=0)


def test_a_crowd_is_darker_than_one_point_and_far_outliers_do_not_shrink_the_rest():
    crowd = torch.cat([0.02 * torch.randn(5000, 2, generator=torch.Generator().manual_seed(0)), torch.eye(2)])
    drawn = pixels(sheets.sheet(torch.cat([crowd, torch.tensor([[1e6, 0.0]])])))[0].float()
    assert (drawn < 100).sum() > 500


@pytest.mark.parametrize("shape", [(500, 1), (12, 2, 40), (3, 1, 1), (10, 7), (1, 2)])
def test_other_shapes_are_drawn_too(shape):
    generator = torch.Generator().manual_seed(0)
    image = sheets.sheet(torch.randn(shape, generator=generator))
    assert len(pixels(image).flatten(1).unique(dim=1).T) > 1


@pytest.mark.parametrize("shape", [(3, 2), (4, 1, 3, 3), (4, 1), (4, 1, 5)])
def test_nan_does_not_hinder_drawing(shape):
    values = torch.rand(shape)
    whole = sheets.sheet(values)
    values[0] = float("nan")
    assert sheets.sheet(values).size == whole.size
    assert sheets.sheet(values).tobytes() != whole.tobytes()
    assert sheets.sheet(torch.full(shape, float("nan"))).size[0] > 0


def test_what_cannot_be_drawn():
    with pytest.raises(ShapeError, match="not \\(2, 3, 4, 5, 6\\)"):
        sheets.sheet(torch.zeros(2, 3, 4, 5, 6))
    with pytest.raises(ShapeError, match="not \\(0, 1, 8, 8\\)"):
        sheets.sheet(torch.zeros(0, 1, 8, 8))
    with pytest.raises(OptionError, match="columns is 0"):
        sheets.sheet(torch.zeros(1, 1, 8, 8), columns=0)


def test_the_file_says_how_it_was_made(tmp_path):
    info = {"solver": "heun", "steps": 18, "seed": 0, "note": "größer", "times": [0.0, 0.5, 1.0]}
    image = sheets.sheet(torch.rand(4, 1, 8, 8))
    path = sheets.save(image, tmp_path / "new" / "sheet.png", info)
    assert sheets.read_info(path) == info
    with Image.open(path) as again:
        assert torch.equal(pixels(again), pixels(image))
    assert [file.name for file in path.parent.iterdir()] == ["sheet.png"]


def test_a_failed_save_leaves_the_old_file_and_nothing_else(tmp_path, monkeypatch):
    path = sheets.save(sheets.sheet(torch.rand(4, 1, 8, 8)), tmp_path / "sheet.png", {"old": True})

    def full(*_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("os.replace", full)
    with pytest.raises(OSError, match="No space"):
        sheets.save(sheets.sheet(torch.rand(4, 1, 8, 8)), path, {"old": False})
    assert sheets.read_info(path) == {"old": True}
    assert [file.name for file in tmp_path.iterdir()] == ["sheet.png"]


def test_files_that_say_nothing(tmp_path):
    Image.new("L", (4, 4)).save(tmp_path / "plain.png")
    with pytest.raises(DataError, match="does not say how it was made"):
        sheets.read_info(tmp_path / "plain.png")
    (tmp_path / "text.png").write_text("text")
    with pytest.raises(DataError, match="cannot be read"):
        sheets.read_info(tmp_path / "text.png")
