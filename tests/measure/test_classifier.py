"""The classifier: accurate on real digits, reproducible, and with features that distances can stand on."""

from __future__ import annotations

import math
from collections.abc import Iterator

import pytest
import torch
import torch.nn.functional as F

from fluvial.errors import OptionError, ShapeError
from fluvial.measure import Classifier, frechet, real_floor, share_recognised, train_classifier
from fluvial.measure.classifier import _shifted, _split


@pytest.fixture(scope="module", autouse=True)
def one_thread() -> Iterator[None]:
    """Networks this small are slower on more threads, and much slower beside other work."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture(scope="module")
def digits() -> tuple[torch.Tensor, torch.Tensor]:
    from sklearn.datasets import load_digits

    pixels, target = load_digits(return_X_y=True)
    return torch.tensor(pixels).float().reshape(-1, 1, 8, 8) / 8 - 1, torch.tensor(target)


@pytest.fixture(scope="module")
def quick(digits) -> Classifier:
    return train_classifier(*digits, epochs=4)


def blobs(n: int = 60) -> tuple[torch.Tensor, torch.Tensor]:
    """Three clusters in the plane, far apart for their width, on scales that need standardising."""
    labels = torch.arange(n) % 3
    centres = torch.tensor([[0.0, 0.0], [3e3, 0.0], [0.0, 3e-3]])
    noise = torch.randn(n, 2, generator=torch.Generator().manual_seed(0))
    return centres[labels] + noise * torch.tensor([3e2, 3e-4]), labels


def test_digits_are_recognised_after_a_few_epochs(quick: Classifier):
    assert quick.accuracy > 0.96
    assert quick.description == (
        "convolutions 32-64-64 on 1x8x8, 64 features, 10 classes, seed 0: trained on 1438, recognises "
        f"{quick.accuracy:.1%} of 359 held out"
    )


@pytest.mark.slow
@pytest.mark.parametrize("seed", [0, 1, 2])
def test_digits_are_recognised_for_any_seed(digits, seed: int):
    assert train_classifier(*digits, seed=seed).accuracy > 0.985


def test_probabilities_predictions_and_the_share_agree(digits, quick: Classifier):
    data, labels = digits[0][:1100], digits[1][:1100]
    probabilities, predicted = quick.probabilities(data), quick.predict(data)
    assert torch.allclose(probabilities.sum(dim=1), torch.ones(1100), atol=1e-5)
    assert torch.equal(probabilities.argmax(dim=1), predicted)
    assert predicted.dtype == torch.int64
    share = share_recognised(quick, data, labels)
    assert share == pytest.approx(sum(int(a == b) for a, b in zip(predicted.tolist(), labels.tolist())) / 1100)
    assert share > 0.96
    assert share_recognised(quick, data, (labels + 1) % 10) < 0.02
    # The head on the unscaled features is what the probabilities come from.
    logits = quick.head(quick.features(data) / quick.scale)
    assert torch.allclose(logits.softmax(dim=1), probabilities, atol=1e-4)


def test_a_sample_is_judged_alone(digits, quick: Classifier):
    data = digits[0][:50]
    alone = torch.cat([quick.features(row[None]) for row in data])
    assert torch.allclose(alone, quick.features(data), atol=1e-4)


def test_features_tell_wrong_samples_from_the_floor(digits, quick: Classifier):
    data, labels = digits
    features = quick.features(data)
    assert float(features.var(dim=0).mean()) == pytest.approx(1.0, abs=0.1)
    floor = real_floor(frechet, features, n=898, labels=labels)
    blurred = F.avg_pool2d(F.pad(data, (1, 1, 1, 1), mode="replicate"), 3, stride=1)
    noise = torch.randn(data.shape, generator=torch.Generator().manual_seed(0))
    means = torch.stack([data[labels == c].mean(dim=0) for c in range(10)])[labels]

    def distance(samples: torch.Tensor) -> float:
        return frechet(features, quick.features(samples))

    assert floor.mean < 0.3
    assert distance(noise) > 50 * floor.mean
    assert distance(blurred) > 30 * floor.mean
    assert distance(0.5 * (data + means)) > 3 * floor.mean
    assert distance(0.5 * (data + blurred)) > 3 * floor.mean
    # Noise at a hundredth of the range is invisible, and stays below the floor.
    assert distance(data + 0.02 * noise) < 0.1 * floor.mean


def test_the_range_of_the_data_does_not_matter(digits):
    data, labels = digits[0][:200], digits[1][:200]
    a = train_classifier(data, labels, epochs=1)
    b = train_classifier(100.0 * data + 700.0, labels, epochs=1)
    assert torch.allclose(a.features(data), b.features(100.0 * data + 700.0), atol=0.02)


def test_same_seed_same_classifier_and_the_global_state_is_untouched():
    data, labels = blobs()
    before = torch.get_rng_state()
    first = train_classifier(data, labels, seed=3, epochs=2)
    assert torch.equal(torch.get_rng_state(), before)
    torch.rand(5)
    again, other = (train_classifier(data, labels, seed=seed, epochs=2) for seed in (3, 4))
    assert torch.equal(first.features(data), again.features(data))
    assert first.description == again.description
    assert not torch.allclose(first.features(data), other.features(data), atol=0.1)


@pytest.mark.parametrize("shape", [(2,), (1, 2), (2, 1)])
def test_points_of_any_shape(shape: tuple[int, ...]):
    data, labels = blobs()
    classifier = train_classifier(data.reshape(60, *shape), labels, epochs=15)
    assert classifier.accuracy == 1.0
    assert share_recognised(classifier, data.reshape(60, *shape), labels) > 0.98
    assert "MLP 128-128" in classifier.description


def test_images_of_other_sizes_and_a_constant_channel():
    # The class is a bright quadrant; 9 x 14 is halved once, 3 x 4 not at all.
    for height, width in ((9, 14), (3, 4)):
        labels = torch.arange(80) % 4
        images = 0.3 * torch.randn(80, 2, height, width, generator=torch.Generator().manual_seed(0))
        for image, label in zip(images, labels.tolist()):
            rows, columns = divmod(label, 2)
            half = (height + 1) // 2, width // 2
            image[0, rows * half[0] :, columns * half[1] :][: half[0], : half[1]] += 2.0
        images[:, 1] = 5.0
        assert train_classifier(images, labels, epochs=10).accuracy >= 0.9


def test_the_split_is_stratified_and_complete():
    labels = torch.tensor([0] * 50 + [1] * 10 + [4] * 2)
    trained_on, held_out = _split(labels, 0.2, seed=0)
    assert torch.equal(torch.cat([trained_on, held_out]).sort().values, torch.arange(62))
    assert labels[held_out].bincount().tolist() == [10, 2, 0, 0, 1]
    assert labels[_split(labels, 0.99, seed=0)[0]].bincount().tolist() == [1, 1, 0, 0, 1]
    assert not torch.equal(_split(labels, 0.2, seed=1)[1], held_out)


def test_shifts_are_whole_pixels_with_repeated_borders():
    image = torch.arange(24.0).reshape(1, 2, 3, 4).expand(3, 2, 3, 4)
    u = torch.tensor([[0.5, 0.5], [0.0, 0.5], [0.5, 0.999]])
    still, down, left = _shifted(image, u)
    assert torch.equal(still, image[0])
    assert torch.equal(down, image[0][:, [0, 0, 1]])
    assert torch.equal(left, image[0][:, :, [1, 2, 3, 3]])


def test_bad_input_is_named(quick: Classifier):
    data, labels = blobs()
    with pytest.raises(ShapeError, match=r"shapes \(60, 2\) and \(59,\)"):
        train_classifier(data, labels[:-1])
    with pytest.raises(OptionError, match=r"labels are torch\.float32"):
        train_classifier(data, labels.float())
    with pytest.raises(OptionError, match="labels go down to -1"):
        train_classifier(data, labels - 1)
    with pytest.raises(OptionError, match="labels are all 0"):
        train_classifier(data, 0 * labels)
    with pytest.raises(OptionError, match="class 7 has one sample"):
        train_classifier(data, labels.index_fill(0, torch.tensor([5]), 7))
    with pytest.raises(OptionError, match="data has NaN or infinity in 1 of 60"):
        train_classifier(data.index_fill(0, torch.tensor([5]), math.nan), labels)
    with pytest.raises(OptionError, match="epochs is 0"):
        train_classifier(data, labels, epochs=0)
    with pytest.raises(OptionError, match=r"holdout is 1\.0"):
        train_classifier(data, labels, holdout=1.0)
    with pytest.raises(ShapeError, match=r"\(5, 3, 8, 8\); the classifier was trained on \(N, 1, 8, 8\)"):
        quick.predict(torch.zeros(5, 3, 8, 8))
    with pytest.raises(OptionError, match="samples has NaN or infinity in 5 of 5"):
        quick.predict(torch.full((5, 1, 8, 8), math.nan))
    with pytest.raises(ShapeError, match="labels have shape"):
        share_recognised(quick, torch.zeros(5, 1, 8, 8), labels)
