"""Data sources and the order in which they are read."""

import itertools
import sys
import types

import numpy
import pytest
import torch
from PIL import Image

from fluvial.errors import DataError, OptionError
from fluvial.training.data import batches, open_source


def take(iterator, count):
    return list(itertools.islice(iterator, count))


def numbered(n):
    """Samples that say which row they are."""
    return {"data": torch.arange(n, dtype=torch.float32)[:, None].repeat(1, 2), "label": torch.arange(n) % 3}


def stream(n, chunk):
    rows = numbered(n)
    return [{key: values[i : i + chunk] for key, values in rows.items()} for i in range(0, n, chunk)]


SOURCES = {
    "tensors": lambda: open_source(numbered(23)),
    "stream": lambda: open_source(stream(23, 5)),
    "stream of one chunk": lambda: open_source([numbered(23)]),
}


@pytest.fixture
def folder(tmp_path):
    """Two classes of three grey images each, 12x10 pixels, every image of one value."""
    for c, name in enumerate(("cats", "dogs")):
        (tmp_path / name).mkdir()
        for i in range(3):
            Image.new("L", (12, 10), 10 * (3 * c + i)).save(tmp_path / name / f"{i}.png")
    return tmp_path


# --- order


@pytest.mark.parametrize("source", SOURCES.values(), ids=SOURCES)
@pytest.mark.parametrize("batch_size", [4, 23, 50])
def test_resumed_order_is_the_uninterrupted_one(source, batch_size):
    whole = take(batches(source(), batch_size, seed=3), 9)
    for start in (0, 1, 4, 7):
        for ours, theirs in zip(take(batches(source(), batch_size, seed=3, start=start), 2), whole[start:]):
            assert ours.keys() == theirs.keys() == {"data", "label", "index"}
            assert all(torch.equal(ours[key], theirs[key]) for key in ours)


@pytest.mark.parametrize("source", SOURCES.values(), ids=SOURCES)
def test_ranks_share_the_batch_of_one_process(source):
    alone = take(batches(source(), 12, seed=1, start=2), 4)
    ranks = [take(batches(source(), 12, seed=1, start=2, rank=rank, world=3), 4) for rank in range(3)]
    for step, whole in enumerate(alone):
        for key, values in whole.items():
            assert torch.equal(torch.cat([ranks[rank][step][key] for rank in range(3)]), values)


@pytest.mark.parametrize("batch_size", [5, 10, 64])
def test_every_epoch_is_a_permutation_of_its_own(batch_size):
    parts = take(batches(open_source(numbered(10)), batch_size, seed=0), 60 // batch_size + 1)
    rows = torch.cat([part["data"][:, 0] for part in parts])[:60].reshape(6, 10)
    assert torch.equal(rows.sort(dim=1).values, torch.arange(10.0).expand(6, 10))
    assert len({tuple(row) for row in rows.tolist()}) == 6
    assert torch.equal(torch.cat([part["index"] for part in parts]), torch.arange(batch_size * len(parts)))


def test_order_depends_on_the_seed_and_labels_follow_their_data():
    first, second = (take(batches(open_source(numbered(30)), 30, seed=seed), 1)[0] for seed in (0, 1))
    assert not torch.equal(first["data"], second["data"])
    assert torch.equal(first["label"], first["data"][:, 0].long() % 3)
    assert first["data"].dtype == torch.float32
    assert first["label"].dtype == torch.int64


def test_a_stream_is_read_in_its_own_order_and_skips_without_reading_it_over_and_over():
    reads = []

    class Counted:
        num_classes = 7

        def __iter__(self):
            reads.append(1)
            return iter(stream(23, 5))

    source = open_source(Counted())
    assert source.num_classes == 7
    reads.clear()
    rows = take(batches(source, 6, seed=0, start=10_000), 1)[0]
    assert torch.equal(rows["data"][:, 0], (torch.arange(60_000, 60_006) % 23).float())
    assert len(reads) <= 3
    with pytest.raises(TypeError, match="length"):
        len(source)


@pytest.mark.parametrize(
    "arguments",
    [{"batch_size": 0}, {"start": -1}, {"rank": 2, "world": 2}, {"world": 3}],
)
def test_numbers_that_make_no_batches_are_refused_at_the_call(arguments):
    with pytest.raises(OptionError, match=r"expected|equal parts"):
        batches(open_source("moons"), **{"batch_size": 8, "seed": 0, **arguments})


# --- what is built in


def test_digits():
    source = open_source("digits")
    assert (len(source), source.shape, source.num_classes, source.conditions) == (1797, (1, 8, 8), 10, ("label",))
    assert (source.normalisation.low, source.normalisation.high) == (0.0, 16.0)
    rows = source.batch(torch.arange(1797))
    path_units = source.normalisation.apply(rows["data"])
    assert (path_units.min(), path_units.max()) == (-1.0, 1.0)
    torch.testing.assert_close(source.normalisation.invert(path_units), rows["data"])
    assert source.normalisation.mean == pytest.approx(float(rows["data"].mean()), rel=1e-6)
    assert source.normalisation.std == pytest.approx(float(rows["data"].std(correction=0)), rel=1e-6)


@pytest.mark.parametrize(
    ("name", "classes"), [("moons", 2), ("checkerboard", None), ("eight_gaussians", 8), ("spiral", None)]
)
def test_toys_are_the_same_each_time_and_standardised(name, classes):
    source, again = open_source(name), open_source(name)
    points = source.batch(torch.arange(20_000))["data"]
    assert torch.equal(points, again.batch(torch.arange(20_000))["data"])
    assert (source.shape, source.num_classes, len(source)) == ((2,), classes, 20_000)
    path_units = source.normalisation.apply(points)
    torch.testing.assert_close(path_units.mean(0), torch.zeros(2), atol=1e-5, rtol=0)
    torch.testing.assert_close(path_units.std(0, correction=0), torch.ones(2), atol=1e-5, rtol=0)


def test_the_checkerboard_fills_half_its_squares():
    points = open_source("checkerboard").batch(torch.arange(20_000))["data"]
    squares = ((points + 4) / 2).floor().clamp(0, 3)
    assert torch.equal((squares.sum(1) % 2).unique(), torch.tensor([0.0]))
    assert len(squares.unique(dim=0)) == 8


# --- normalisation


def test_images_are_mapped_from_their_range_and_others_standardised_per_channel():
    images = 100 + 7 * torch.randn(40, 3, 4, 4)
    norm = open_source(images).normalisation
    mapped = norm.apply(images)
    torch.testing.assert_close(torch.stack(mapped.aminmax()), torch.tensor([-1.0, 1.0]))

    series = torch.randn(50, 2, 9) * torch.tensor([3.0, 0.1])[:, None] + torch.tensor([5.0, -2.0])[:, None]
    mapped = open_source(series).normalisation.apply(series)
    torch.testing.assert_close(mapped.mean((0, 2)), torch.zeros(2), atol=1e-5, rtol=0)
    torch.testing.assert_close(mapped.std((0, 2), correction=0), torch.ones(2), atol=1e-5, rtol=0)


def test_constant_channels_are_only_shifted():
    points = torch.randn(9000, 2)
    points[:, 1] = 0.1
    norm = open_source(points).normalisation
    assert norm.scale[1] == 1.0
    torch.testing.assert_close(norm.apply(points)[:, 1], torch.zeros(9000))
    assert open_source(torch.full((5, 1, 2, 2), 3.0)).normalisation.scale == (1.0,)


def test_uint8_images_have_the_full_scale_whatever_they_contain():
    source = open_source(torch.full((4, 6, 5), 51, dtype=torch.uint8))
    assert source.shape == (1, 6, 5)
    assert (source.normalisation.shift, source.normalisation.scale) == ((0.5,), (0.5,))
    torch.testing.assert_close(source.batch(torch.tensor([2]))["data"], torch.full((1, 1, 6, 5), 0.2))
    assert source.normalisation.mean == pytest.approx(0.2)


# --- data that is not fit


def test_nan_is_refused_with_its_row():
    points = torch.randn(5000, 3)
    points[4321, 1] = float("nan")
    points[4400, 0] = float("inf")
    with pytest.raises(DataError, match=r"data is NaN or infinite in row 4321, and in 1 more of 5000"):
        open_source(points)


def test_nan_in_a_stream_is_refused_with_its_row_when_it_comes():
    chunks = [torch.zeros(2000, 2) for _ in range(3)]
    chunks[2][7, 1] = float("nan")
    source = open_source(chunks)
    with pytest.raises(DataError, match="row 4007"):
        take(batches(source, 1000, seed=0), 7)


@pytest.mark.parametrize(
    ("rows", "message"),
    [
        ({"data": torch.zeros(4, 2), "label": torch.tensor([0, 1, -1, 0])}, "label is -1 in row 2"),
        ({"data": torch.zeros(4, 2), "label": torch.tensor([0, 0.5, 1, 0])}, "label is 0.5 in row 1"),
        ({"data": torch.zeros(4, 2), "label": torch.tensor([0, 1])}, "there are 4 samples"),
        ({"data": torch.zeros(4, 2), "label": torch.zeros(4, 10)}, "expected \\(n,\\)"),
        ({"data": torch.zeros(4, 2), "style": torch.full((4, 3), torch.nan)}, "style is NaN or infinite in row 0"),
        ({"samples": torch.zeros(4, 2)}, 'has samples; the samples are expected as "data"'),
        ({"data": torch.zeros(4)}, "one row a sample"),
        ({"data": torch.zeros(0, 2)}, "one row a sample"),
        ({"data": [1, 2]}, "data is a list"),
    ],
)
def test_unfit_tensors(rows, message):
    with pytest.raises(DataError, match=message):
        open_source(rows)


def test_unfit_streams():
    with pytest.raises(DataError, match="read only once"):
        open_source(torch.zeros(4, 2) for _ in range(3))
    with pytest.raises(DataError, match="gave no samples"):
        open_source([])
    with pytest.raises(DataError, match="chunk at row 4 has data \\(4, 3\\)"):
        open_source([torch.zeros(4, 2), torch.zeros(4, 3)])
    late = open_source([numbered(3000), {"data": torch.zeros(5, 2), "label": torch.full((5,), 3)}])
    with pytest.raises(DataError, match="label is 3, but there are 3 classes"):
        take(batches(late, 1000, seed=0), 4)
    dataset = torch.utils.data.TensorDataset(torch.zeros(4, 2))
    with pytest.raises(DataError, match="DataLoader"):
        open_source(dataset)
    pairs = torch.utils.data.TensorDataset(torch.zeros(4, 2), torch.arange(4))
    assert open_source(torch.utils.data.DataLoader(pairs, batch_size=3)).num_classes == 4


def test_names_and_paths_that_are_nothing(tmp_path):
    with pytest.raises(OptionError, match="did you mean 'moons'"):
        open_source("moonz")
    with pytest.raises(DataError, match="does not exist"):
        open_source(str(tmp_path / "nowhere.npz"))
    with pytest.raises(DataError, match="expected a name, a path"):
        open_source(3)
    with pytest.raises(OptionError, match="only image folders"):
        open_source("digits", image_size=16)
    assert open_source("digits", image_size=8).shape == (1, 8, 8)
    source = open_source("moons")
    assert open_source(source) is source


# --- numpy files


def test_arrays_become_channels_first(tmp_path):
    colours = numpy.random.default_rng(0).integers(0, 256, (6, 5, 7, 3), dtype=numpy.uint8)
    numpy.savez(tmp_path / "a.npz", images=colours, labels=numpy.array(["b", "a", "b", "c", "a", "a"]))
    source = open_source(tmp_path / "a.npz")
    assert (source.shape, source.num_classes, source.class_names) == ((3, 5, 7), 3, ("a", "b", "c"))
    rows = source.batch(torch.tensor([1, 3]))
    assert rows["label"].tolist() == [0, 2]
    expected = torch.from_numpy(colours[[1, 3]]).permute(0, 3, 1, 2) / 255
    torch.testing.assert_close(rows["data"], expected)


@pytest.mark.parametrize(
    ("shape", "expected"),
    [
        ((6, 28, 28), (1, 28, 28)),
        ((6, 3, 9, 9), (3, 9, 9)),
        ((6, 9, 9, 1), (1, 9, 9)),
        ((6, 2, 50), (2, 50)),
        ((6, 4), (4,)),
    ],
)
def test_shapes_in_numpy_files(tmp_path, shape, expected):
    numpy.save(tmp_path / "a.npy", numpy.random.default_rng(0).normal(size=shape))
    source = open_source(tmp_path / "a.npy")
    assert source.shape == expected
    assert source.batch(torch.arange(6))["data"].dtype == torch.float32


def test_npz_keys(tmp_path):
    values = numpy.zeros((4, 2))
    numpy.savez(tmp_path / "only.npz", anything=values, y=numpy.arange(4))
    assert open_source(tmp_path / "only.npz").num_classes == 4
    numpy.savez(tmp_path / "many.npz", first=values, second=values)
    with pytest.raises(DataError, match="has first, second; expected the samples as one of data, images, x, train_x"):
        open_source(tmp_path / "many.npz")
    numpy.savez(tmp_path / "pickled.npz", data=numpy.array([{}, None]))
    with pytest.raises(DataError, match="cannot be read"):
        open_source(tmp_path / "pickled.npz")
    (tmp_path / "broken.npy").write_bytes(b"not numpy")
    with pytest.raises(DataError, match="cannot be read"):
        open_source(tmp_path / "broken.npy")


# --- image folders


def test_folder_with_classes(folder):
    source = open_source(folder)
    assert (len(source), source.shape, source.num_classes) == (6, (1, 10, 12), 2)
    assert source.class_names == ("cats", "dogs")
    assert source.skipped == []
    rows = source.batch(torch.tensor([5, 0]))
    assert rows["label"].tolist() == [1, 0]
    torch.testing.assert_close(rows["data"][:, 0, 0, 0], torch.tensor([50 / 255, 0]))
    assert (source.normalisation.low, source.normalisation.high) == (0.0, 1.0)


def test_a_corrupt_image_is_named_and_skipped(folder):
    (folder / "cats" / "1.png").write_bytes(b"no image")
    whole = (folder / "dogs" / "0.png").read_bytes()
    (folder / "dogs" / "0.png").write_bytes(whole[:-30])
    source = open_source(folder)
    assert [name for name, _ in source.skipped] == ["cats/1.png", "dogs/0.png"]
    assert all(reason for _, reason in source.skipped)
    assert len(source) == 4
    rows = source.batch(torch.arange(4))
    torch.testing.assert_close(rows["data"][:, 0, 0, 0] * 255, torch.tensor([0.0, 20.0, 40.0, 50.0]))
    assert rows["label"].tolist() == [0, 0, 1, 1]


def test_an_image_that_breaks_later_is_replaced_by_the_next_and_named(folder, monkeypatch):
    monkeypatch.setattr("fluvial.training.files._KEEP", 0)
    source = open_source(folder)
    (folder / "cats" / "2.png").write_bytes(b"gone")
    rows = source.batch(torch.tensor([2, 3, 2]))
    torch.testing.assert_close(rows["data"][:, 0, 0, 0] * 255, torch.full((3,), 30.0))
    assert rows["label"].tolist() == [1, 1, 1]
    assert [name for name, _ in source.skipped] == ["cats/2.png"]


def test_folders_without_a_good_image(tmp_path):
    with pytest.raises(DataError, match="no images in"):
        open_source(tmp_path)
    (tmp_path / "a.png").write_bytes(b"")
    (tmp_path / "b.jpg").write_bytes(b"text")
    with pytest.raises(DataError, match=r"none of 2 images can be read; a\.png: "):
        open_source(tmp_path)


def test_images_beside_class_folders_are_refused(folder):
    Image.new("L", (4, 4)).save(folder / "stray.png")
    with pytest.raises(DataError, match="1 images beside its 2 folders"):
        open_source(folder)


def test_images_are_cropped_to_one_size_and_one_mode(tmp_path):
    wide = Image.new("RGB", (40, 20), "red")
    wide.paste((0, 0, 255), (10, 0, 30, 20))
    wide.save(tmp_path / "a.png")
    Image.new("RGBA", (9, 9), (0, 0, 0, 0)).save(tmp_path / "b.png")
    Image.fromarray(numpy.full((8, 8), 257 * 100, dtype=numpy.uint16)).save(tmp_path / "c.png")
    source = open_source(tmp_path, image_size=10)
    assert source.shape == (3, 10, 10)
    assert source.num_classes is None
    middle, transparent, deep = source.batch(torch.arange(3))["data"]
    torch.testing.assert_close(middle.mean((1, 2)), torch.tensor([0.0, 0.0, 1.0]), atol=0.05, rtol=0)
    assert float(transparent.min()) == 1.0
    torch.testing.assert_close(deep, torch.full((3, 10, 10), 100 / 255))
    assert open_source(tmp_path).shape == (3, 20, 40)


# --- Hugging Face


def test_without_datasets_the_error_says_what_to_install(monkeypatch):
    monkeypatch.setitem(sys.modules, "datasets", None)
    with pytest.raises(DataError, match="pip install datasets"):
        open_source("hf:ylecun/mnist")


def test_hugging_face_columns_are_found_by_their_kind(monkeypatch, folder):
    fake = types.ModuleType("datasets")

    class Column:
        def __init__(self, decode=True):
            self.decode = decode

    class ClassLabel:
        names = ["cat", "dog"]

    class Table(list):
        features = {"picture": Column(), "animal": ClassLabel()}

        def cast_column(self, name, kind):
            assert name == "picture"
            assert kind.decode is False
            return self

        def __getitem__(self, key):
            return [row[key] for row in self] if isinstance(key, str) else super().__getitem__(key)

    def load_dataset(name, split):
        assert (name, split) == ("some/pets", "test")
        cells = [{"bytes": (folder / "cats" / f"{i}.png").read_bytes(), "path": None} for i in range(3)]
        cells[1]["bytes"] = b"broken"
        return Table({"picture": cell, "animal": i % 2} for i, cell in enumerate(cells))

    fake.Image, fake.ClassLabel, fake.load_dataset = Column, ClassLabel, load_dataset
    monkeypatch.setitem(sys.modules, "datasets", fake)
    source = open_source("hf:some/pets:test", image_size=6)
    assert (source.shape, source.class_names, len(source)) == ((1, 6, 6), ("cat", "dog"), 2)
    assert [name for name, _ in source.skipped] == ["row 1"]
    assert source.batch(torch.arange(2))["label"].tolist() == [0, 0]
