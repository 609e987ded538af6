"""Pairs are what the sampler gives, wherever, however often interrupted and by however many they are made."""

from __future__ import annotations

import errno
import json
import math
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from killed_pairs import attempt
from killed_pairs import model as killed_model

from fluvial import cli, paths, random
from fluvial.errors import FluvialError, NonFiniteError, OptionError, RunError, ShapeError
from fluvial.exact import GaussianMixture
from fluvial.guidance import CFG, Autoguidance
from fluvial.model import Model, Normalisation, convert
from fluvial.objectives import Objective
from fluvial.sampling import encode, nfe, sample
from fluvial.training import (
    Mixed,
    Pairs,
    RunInterrupted,
    make_pairs,
    model_hash,
    open_pairs,
    pair_engine,
    pairs,
    save,
    train,
)
from fluvial.training.source import Tensors
from problems import mixture, odd_mixture, one_line

LAUNCH = ["-m", "torch.distributed.run", "--nproc-per-node=2", "--master-port=0", "--standalone"]
TWO = GaussianMixture(torch.tensor([[2.0, 0.0], [-1.0, 1.0]]), torch.tensor([0.5, 0.4]), torch.tensor([1.0, 2.0]))
QUIET = {"progress": False, "drop_cond": 0.0}


def net(shape: tuple[int, ...] = (2,), dtype: torch.dtype = torch.float32) -> Model:
    """A small random network with three classes, for any shape, whose data have units of their own."""

    def network(x, t, label):
        flat = x.flatten(1).to(dtype)
        weight = torch.linspace(-1.0, 1.3, flat.shape[1] ** 2, dtype=dtype).reshape(flat.shape[1], -1)
        shift = (label + 1)[:, None] * torch.cos(3 * t)[:, None].to(dtype)
        return torch.sin(flat @ weight + shift).reshape(x.shape).to(x.dtype)

    return Model(network, "rectified", null={"label": 3}, normalisation=Normalisation((1.0,), (4.0,)), shape=shape)


def labels(numbers: range | list[int], classes: int = 3) -> dict[str, torch.Tensor]:
    return {"label": torch.tensor(list(numbers)) % classes}


# Forwards.


@pytest.mark.parametrize("shape", [(2,), (3, 1, 2), (1, 5, 4)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_pairs_are_the_samples_of_their_numbers(shape, dtype):
    model = net(shape, dtype)
    made = make_pairs(model, 10, steps=4, seed=7, first=5, batch_size=4, **QUIET)
    for begin, count in ((0, 4), (4, 4), (8, 2)):
        numbers = range(5 + begin, 5 + begin + count)
        expected = sample(model, count, steps=4, seed=7, first=5 + begin, cond=labels(numbers))
        assert torch.equal(made.data[begin : begin + count], expected)
    assert torch.equal(made.noise, random.normal(range(5, 15), shape, 7, stream=random.START))
    assert made.cond["label"].tolist() == [n % 3 for n in range(5, 15)]
    assert made.manifest["nfe"] == nfe(model, "heun", 4)
    assert made.states is None


@pytest.mark.parametrize("n", [1, 2, 3])
def test_few_pairs(tmp_path, n):
    made = make_pairs(net(), n, steps=2, out=tmp_path / "a", **QUIET)
    assert len(made) == n
    assert torch.equal(made.data, sample(net(), n, steps=2, seed=0, cond=labels(range(n))))
    assert made.batch(torch.arange(n - 1, -1, -1))["data"].tolist() == made.data.flip(0).tolist()


@pytest.mark.parametrize("path", ["rectified", "cosine", "vp", "edm"])
def test_data_and_states_of_a_gaussian_are_known_to_the_order_of_the_solver(path):
    """Along the ODE of data Normal(m, s²) the state is alpha m + √(alpha² s² + sigma²) z, and z stays what it was."""
    model = GaussianMixture(torch.tensor([[3.0]]), torch.tensor([0.5]), torch.ones(1)).model(paths.named(path))
    errors = []
    for steps in (50, 100):
        made = make_pairs(model, 64, steps=steps, seed=1, states=[0.0, 0.4, 0.8], **QUIET)
        z = (made.path(0.0).sigma * made.noise - made.path(0.0).alpha * 3.0) / spread_of(made.path, 0.0)
        states = [made.path(t).alpha * 3.0 + spread_of(made.path, t) * z for t in (0.0, 0.4, 0.8)]
        wrong = [made.data - (3.0 + 0.5 * z), *(made.states[:, j] - state for j, state in enumerate(states))]
        errors.append([float(error.abs().max()) for error in wrong])
    (coarse, start, *others), (fine, _, *finer) = errors
    assert start < 1e-4
    assert fine < min(6e-3, coarse / 2.8)  # VP's landing is of a lower order
    assert all(b < min(0.03, a / 3.5) for a, b in zip(others, finer))


def spread_of(path: paths.Path, t: float) -> float:
    """The standard deviation of the states, for data of 0.5."""
    return math.hypot(0.5 * path(t).alpha, path(t).sigma)


def test_noise_stored_and_drawn_again_are_the_same(tmp_path):
    options = {"steps": 2, "seed": 2**63 + 1, "first": 9, "batch_size": 4, "shard_size": 6, **QUIET}
    drawn = make_pairs(net(), 15, out=tmp_path / "a", **options)
    stored = make_pairs(net(), 15, out=tmp_path / "b", store_noise=True, **options)
    assert (drawn.manifest["noise"], stored.manifest["noise"]) == ("from seed", "stored")
    shuffled = torch.tensor([14, 3, 3, 0, 7])
    for a, b in ((drawn.noise, stored.noise), (drawn.batch(shuffled)["noise"], stored.batch(shuffled)["noise"])):
        assert torch.equal(a, b)
    assert "noise" not in pairs.read_shard(tmp_path / "a" / "shard-000000.safetensors")


@pytest.mark.parametrize("solver", ["heun", "dpmpp_2m", "dopri5"])
def test_states_are_those_of_a_run_on_the_same_nodes(solver):
    asked = [0.0, 0.3, 0.5 + 5e-10, 1.0]
    made = make_pairs(net(), 6, solver=solver, steps=4, states=asked, **QUIET)
    nodes = made.manifest["nodes"]
    assert nodes == [0.0, 0.25, 0.3, 0.5 + 5e-10, 0.75, 1.0], "half a nanounit from a node replaces it"
    run = sample(net(), 6, solver=solver, times=nodes, seed=0, cond=labels(range(6)), record=True)
    assert run.times == nodes
    for j, t in enumerate(asked):
        assert torch.equal(made.states[:, j], run.x[nodes.index(t)])
    assert made.times == tuple(asked)
    torch.testing.assert_close(made.states[:, 0], made.noise, rtol=0, atol=0)
    assert torch.equal(net().normalisation.invert(made.states[:, 3]), made.data)


def test_guided_pairs_are_guided_samples():
    model = TWO.model(paths.Rectified())
    made = make_pairs(model, 8, steps=4, guidance=CFG(2.5), batch_size=8, **QUIET)
    assert torch.equal(made.data, sample(model, 8, steps=4, seed=0, cond=labels(range(8), 2), guidance=CFG(2.5)))
    assert made.manifest["guidance"] == {"name": "CFG", "scale": 2.5, "batched": True, "interval": None, "rescale": 0.0}
    weak = killed_model().under(normalisation=model.normalisation)
    by_it = make_pairs(model, 2, steps=4, guidance=Autoguidance(2.0, weak), **QUIET)
    assert by_it.manifest["guidance"]["weak"] == model_hash(weak)


def test_conditions_are_those_the_pairs_were_made_under():
    """A share is made under the null condition, and says so; guidance then guides to nothing."""
    model = TWO.model(paths.Rectified())
    made = make_pairs(model, 400, steps=3, drop_cond=0.25, guidance=CFG(2.0), seed=4, progress=False, batch_size=400)
    dropped = random.uniform(400, (), 4, stream=random.DROP) < 0.25
    assert 80 < int(dropped.sum()) < 120
    assert torch.equal(made.cond["label"], torch.where(dropped, 2, torch.arange(400) % 2))
    under = sample(model, 400, steps=3, seed=4, cond=made.cond)
    torch.testing.assert_close(made.data[dropped], under[dropped], rtol=1e-5, atol=1e-5)
    assert float((made.data - under)[~dropped].abs().median()) > 0.01
    kept = made.cond["label"][~dropped]
    assert int((kept == 0).sum()) == pytest.approx(int((kept == 1).sum()), abs=25)


def test_conditions_of_the_user(tmp_path):
    given = {"label": torch.tensor([2, 2, 0, 1, 3, 1])}
    made = make_pairs(net(), 6, steps=2, cond=given, first=3, out=tmp_path / "a", shard_size=4, batch_size=2, **QUIET)
    assert torch.equal(made.cond["label"], given["label"])
    expected = sample(net(), 2, steps=2, seed=0, first=5, cond={"label": given["label"][2:4]})
    assert torch.equal(made.data[2:4], expected)
    other = {"label": torch.tensor([2, 2, 0, 1, 3, 0, 0])}
    options = {"steps": 2, "first": 3, "out": tmp_path / "a", "batch_size": 2, **QUIET}
    with pytest.raises(RunError, match=r"conditions.label = 'given"):
        make_pairs(net(), 7, cond=other, **options)
    more = make_pairs(net(), 7, cond={"label": torch.cat([given["label"], torch.tensor([0])])}, **options)
    assert more.cond["label"].tolist() == [2, 2, 0, 1, 3, 1, 0]


# Backwards.


def test_data_go_to_their_noise_and_back():
    model, data = mixture().model(paths.Rectified()), mixture().sample(200, seed=1).float()
    source = {"data": data, "label": torch.arange(200) % 3}
    made = make_pairs(model, data=source, steps=150, states=[0.5], batch_size=64, **QUIET)
    assert len(made) == 200
    assert torch.equal(made.data, data)
    assert torch.equal(made.cond["label"], source["label"])
    back = sample(model, made.noise, steps=150, cond=made.cond)
    assert float((back - data).abs().median()) < 1e-3
    half = sample(model, state=made.states[:, 0], times=[0.5, *torch.linspace(0.51, 1.0, 60).tolist()], cond=made.cond)
    assert float((half - data).abs().median()) < 1e-3
    expected = encode(model, data[64:128], steps=150, times=None, cond={"label": source["label"][64:128]})
    torch.testing.assert_close(made.noise[64:128], expected, rtol=1e-4, atol=1e-4)  # 0.5 is a node of both


def test_encoded_noise_of_a_gaussian_is_known():
    mixed = GaussianMixture(torch.tensor([[3.0]]), torch.tensor([0.5]), torch.ones(1))
    data = mixed.sample(50, seed=0).float()
    made = make_pairs(mixed.model(paths.Rectified()), data=data, steps=300, **QUIET)
    torch.testing.assert_close(made.noise, (data - 3.0) / 0.5, rtol=1e-3, atol=2e-3)


def test_ends_of_the_way_back_are_the_data_and_the_noise():
    model = Model(net().network, paths.EDM(), "noise", null={"label": 3}, normalisation=Normalisation((1.0,), (4.0,)))
    data = {"data": torch.rand(6, 2), "label": torch.arange(6) % 3}
    made = make_pairs(model, data=data, steps=3, states=[0.0, 1.0], **QUIET)
    assert torch.equal(made.states[:, 1], (made.data - 1.0) / 4.0)
    torch.testing.assert_close(made.states[:, 0], 80.0 * made.noise, rtol=1e-6, atol=0)


def test_backward_rows_conditions_and_dropping(tmp_path):
    data = odd_mixture().sample(30, seed=1).float()
    source = Tensors("thirty", {"data": data, "label": torch.arange(30) % 2})
    model = odd_mixture().model(paths.Cosine())
    made = make_pairs(
        model, 12, data=source, first=10, steps=4, drop_cond=0.4, seed=1, out=tmp_path / "a", batch_size=5,
        shard_size=5, progress=False,
    )  # fmt: skip
    dropped = random.uniform(range(10, 22), (), 1, stream=random.DROP) < 0.4
    assert 0 < int(dropped.sum()) < 12
    assert torch.equal(made.cond["label"], torch.where(dropped, 2, torch.arange(10, 22) % 2))
    assert torch.equal(made.data, data[10:22])
    cond = {"label": made.cond["label"][:5]}
    assert torch.equal(made.noise[:5], encode(model, data[10:15], steps=4, cond=cond))
    assert (made.manifest["noise"], made.manifest["direction"]) == ("stored", "backward")
    assert (made.manifest["data"]["name"], made.manifest["nfe"]) == ("thirty", 4 + 2 * 3)


# As a source.


def test_batches_are_rows_of_the_whole_and_are_read_from_the_file(tmp_path):
    made = make_pairs(net(), 23, steps=2, states=[0.5], out=tmp_path / "a", batch_size=3, shard_size=5, **QUIET)
    kept = make_pairs(net(), 23, steps=2, states=[0.5], batch_size=3, shard_size=5, **QUIET)
    indices = torch.tensor([22, 0, 7, 7, 19, 4, 5])
    for one in (made, kept):
        batch = one.batch(indices)
        assert tuple(batch) == ("data", *one.conditions) == ("data", "noise", "states", "label")
        whole = {"data": made.data, "noise": made.noise, "states": made.states, **made.cond}
        assert all(torch.equal(batch[name], whole[name][indices]) for name in whole)
        assert batch["data"].dtype == torch.float32
        assert batch["states"].shape == (7, 1, 2)
    assert (made.shape, made.num_classes, made.size) == ((2,), 3, 23)
    assert made.normalisation == net().normalisation
    assert made.path == net().path
    with pytest.raises(IndexError, match="pairs -1 to 23 are asked of 23"):
        made.batch(torch.tensor([23, -1]))


def test_shards_are_mapped_and_not_read(tmp_path):
    """256 MB of pairs cost no memory of their own."""
    file = tmp_path / "shard-000000.safetensors"
    pairs.write_shard(file, {"data": torch.zeros(1 << 14, 4096)})
    before = anonymous()
    read = pairs.read_shard(file)["data"]
    assert float(read[torch.arange(0, 1 << 14, 999)].sum()) == 0.0
    assert anonymous() - before < 8_000


def anonymous() -> int:
    """Kilobytes of this process's own memory: what is no file's."""
    status = Path("/proc/self/status")
    if not status.exists():
        pytest.skip("this system does not say how much memory is used")
    return next(int(line.split()[1]) for line in status.read_text().splitlines() if line.startswith("RssAnon"))


def test_pairs_train_a_model(tmp_path):
    made = make_pairs(killed_model(), 40, steps=2, out=tmp_path / "a", batch_size=8, progress=False)
    student = killed_model()
    objective = Objective(coupling="pairs")
    options = {"batch_size": 8, "precision": "fp32", "sheet_every": None, "progress": False, "drop_cond": 0.0}
    assert train(student, made, objective, steps=3, **options).step == 3
    assert not student.independent
    assert student.normalisation == made.normalisation


def test_mixed_sees_all_of_the_first_and_a_share_of_the_second():
    model = mixture().model(paths.Rectified())
    drawn = make_pairs(model, 30, steps=2, **QUIET)
    encoded = {"data": mixture().sample(7, seed=1).float(), "label": torch.arange(7) % 3}
    real = make_pairs(model, data=encoded, steps=3, **QUIET)
    both = Mixed(drawn, real, 0.25)
    assert len(both) == 40
    rows = both.batch(torch.arange(40))
    assert torch.equal(rows["data"][:30], drawn.data)
    taken = torch.tensor([j * 7 // 10 for j in range(10)])
    assert sorted(set(taken.tolist())) == list(range(7)), "all of the second, at even distances"
    for name, whole in {"data": real.data, "noise": real.noise, "label": real.cond["label"]}.items():
        assert torch.equal(rows[name][30:], whole[taken])
    order = torch.tensor([39, 2, 31, 0])
    assert torch.equal(both.batch(order)["noise"], rows["noise"][order])
    assert torch.equal(both.batch(torch.tensor([33]))["noise"], rows["noise"][33:34])
    assert (both.conditions, both.num_classes, both.times) == (drawn.conditions, 3, ())
    with_states = make_pairs(model, 5, steps=2, states=[0.5], **QUIET)
    scaled = make_pairs(model.under(normalisation=Normalisation((1.0,), (2.0,))), 5, steps=2, **QUIET)
    for first, second, share, said in [
        (drawn, with_states, 0.5, "conditions label, noise, and pairs of .* label, noise, states"),
        (drawn, scaled, 0.5, r"normalisation \(\(0.0,\), \(1.0,\)\)"),
        (drawn, real, 1.0, "share is 1.0; expected a number between 0 and 1"),
    ]:
        with pytest.raises(OptionError, match=said):
            Mixed(first, second, share)


# Killed, interrupted, gone on with, shared.


def files(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in sorted(folder.iterdir())}


@pytest.fixture(scope="module")
def untouched(tmp_path_factory) -> dict[str, bytes]:
    folder = tmp_path_factory.mktemp("never") / "pairs"
    attempt(str(folder))
    assert sorted(files(folder)) == ["manifest.json", *(f"shard-{k:06d}.safetensors" for k in range(6))]
    return files(folder)


def script(name: str, *arguments: str, launch: list[str] | None = None) -> str:
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}
    command = [sys.executable, *(launch or []), str(Path(__file__).with_name(name)), *arguments]
    done = subprocess.run(command, capture_output=True, text=True, env=environment, timeout=120)
    assert done.returncode == 0, done.stderr[-3000:]
    return done.stdout


def test_killed_set_ends_bit_identical(tmp_path, untouched):
    assert int(script("killed_pairs.py", str(tmp_path / "a"), "killed")) >= 9
    assert files(tmp_path / "a") == untouched, "and nothing unfinished is left"


def test_two_processes_make_the_files_of_one(tmp_path, untouched):
    assert script("shared_pairs.py", str(tmp_path / "a"), launch=LAUNCH).count("done") == 1
    assert files(tmp_path / "a") == untouched


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_interrupted_set_is_gone_on_with(tmp_path, untouched, number):
    before, teacher, calls = signal.getsignal(number), killed_model(), 0

    def interrupt(*_):
        nonlocal calls
        calls += 1
        if calls == 1 + 7 * 4 + 2:  # one to try it, seven in each of four batches: in the third shard
            os.kill(os.getpid(), number)

    teacher.network.register_forward_pre_hook(interrupt)  # type: ignore[union-attr]
    options = {"steps": 3, "states": [0.5], "seed": 3, "batch_size": 4, "shard_size": 8, "progress": False}
    with pytest.raises(
        RunInterrupted, match=r"interrupted with 2 of 6 shards in .*; the same command goes on"
    ) as caught:
        make_pairs(teacher, 44, out=tmp_path / "a", **options)
    assert calls == 1 + 7 * 5, "the batch at hand was finished"
    one_line(caught.value)
    assert signal.getsignal(number) == before
    with pytest.raises(RunError, match=r"lacks 4 of its 6 shards; .* -n 44") as caught:
        open_pairs(tmp_path / "a")
    one_line(caught.value)
    attempt(str(tmp_path / "a"))
    assert files(tmp_path / "a") == untouched


def test_set_may_grow_and_is_else_left_alone(tmp_path, untouched):
    attempt(str(tmp_path / "a"), 20)
    times = {path: path.stat().st_mtime_ns for path in (tmp_path / "a").iterdir()}
    attempt(str(tmp_path / "a"), 20)
    assert {path: path.stat().st_mtime_ns for path in (tmp_path / "a").iterdir()} == times
    attempt(str(tmp_path / "a"), 44)
    assert files(tmp_path / "a") == untouched
    with pytest.raises(RunError, match="is a set of 44 pairs, and n is 20; expected 44 or more"):
        attempt(str(tmp_path / "a"), 20)


def test_default_shards_are_whole_batches_that_leave_something_to_resume(tmp_path, monkeypatch):
    made = make_pairs(net(), 500, steps=1, batch_size=8, **QUIET)
    assert made.manifest["shard_size"] == 32  # 16 shards
    assert make_pairs(net(), 3, steps=1, batch_size=8, **QUIET).manifest["shard_size"] == 8
    folder = tmp_path / "a"
    make_pairs(net(), 10, steps=1, batch_size=4, out=folder, **QUIET)
    grown = make_pairs(net(), 140, steps=1, batch_size=4, out=folder, **QUIET)
    assert grown.manifest["shard_size"] == 4, "a set that grows keeps its own"
    monkeypatch.setattr(pair_engine, "SHARD_BYTES", 5 * (4 * 6 + 8))
    made = make_pairs(net(), 140, steps=1, batch_size=2, states=[0.5], store_noise=True, **QUIET)
    assert made.manifest["shard_size"] == 4, "what fits: six numbers and a label each"


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"steps": 5}, r"the number of nodes = 5, and the number of nodes = 6"),
        ({"times": "cosine"}, r"nodes\[1\] = 0.25, and nodes\[1\] = 0.146"),
        ({"solver": "ddim"}, r"solver.name = 'Heun', and solver.name = 'DDIM'"),
        ({"seed": 1}, "seed = 0, and seed = 1"),
        ({"first": 1}, "first = 0, and first = 1"),
        ({"batch_size": 2}, "batch_size = 4, and batch_size = 2"),
        ({"shard_size": 8}, "shard_size = 4, and shard_size = 8"),
        ({"drop_cond": 0.5}, "drop_cond = 0.0, and drop_cond = 0.5"),
        ({"store_noise": True}, "noise = 'from seed', and noise = 'stored'"),
        ({"guidance": CFG(2.0)}, "guidance.name = None, and guidance.name = 'CFG'"),
        ({"states": [0.25]}, "the number of states = 0, and the number of states = 1"),
        ({"data": torch.rand(9, 2)}, "direction = 'forward', and direction = 'backward'"),
        ({"model": "other"}, "model = '[0-9a-f]{12}', and model = '[0-9a-f]{12}'"),
    ],
)
def test_other_settings_in_the_same_folder_are_refused(tmp_path, options, said):
    model, asked = TWO.model(paths.Rectified()), {"steps": 4, "batch_size": 4, **QUIET}
    make_pairs(model, 6, out=tmp_path / "a", **asked)
    before = files(tmp_path / "a")
    other = model.under(independent=False) if options.pop("model", None) else model
    with pytest.raises(RunError, match=said) as caught:
        make_pairs(other, 6, out=tmp_path / "a", **{**asked, **options})
    one_line(caught.value)
    assert files(tmp_path / "a") == before


def test_damaged_shard_is_named_and_made_again(tmp_path, untouched):
    folder = tmp_path / "a"
    attempt(str(folder))
    shard = folder / "shard-000002.safetensors"
    shard.write_bytes(shard.read_bytes()[:-40])
    for look in (lambda: open_pairs(folder), lambda: attempt(str(folder))):
        with pytest.raises(
            RunError, match=r"shard-000002.safetensors is damaged or cut short .* delete the file"
        ) as caught:
            look()
        one_line(caught.value)
    shard.unlink()
    attempt(str(folder))
    assert files(folder) == untouched


def test_full_disk_is_one_clear_line(tmp_path, monkeypatch):
    writes, real = 0, pairs.atomic.save_file

    def full(*arguments, **options):
        nonlocal writes
        writes += 1
        if writes == 3:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        return real(*arguments, **options)

    monkeypatch.setattr(pairs.atomic, "save_file", full)
    with pytest.raises(
        RunError, match=r"shard-000002.* no space is left .* the shards that are there are kept"
    ) as caught:
        attempt(str(tmp_path / "a"))
    one_line(caught.value)
    assert sorted(files(tmp_path / "a")) == ["manifest.json", "shard-000000.safetensors", "shard-000001.safetensors"]


def test_numbers_that_are_not_finite_name_their_samples(tmp_path):
    lost = random.normal(range(6, 8), (2,), 0, stream=random.START)

    def network(x, t):
        return torch.where((x == lost[1]).all(1, keepdim=True) & (t[:, None] == 0), torch.nan, x)

    model = Model(network, "rectified", shape=(2,))
    with pytest.raises(NonFiniteError, match=r"pairs 7 cannot be made: step 0 .* the network returned nan") as caught:
        make_pairs(model, 12, steps=3, batch_size=2, shard_size=4, out=tmp_path / "a", **QUIET)
    one_line(caught.value)
    assert sorted(files(tmp_path / "a")) == ["manifest.json", "shard-000000.safetensors"]


# What is refused.


@pytest.mark.parametrize(
    ("options", "kind", "said"),
    [
        ({"n": None}, OptionError, "n is missing"),
        ({"n": 0}, OptionError, "n is 0; expected a whole number, 1 or more"),
        ({"solver": "ddpm"}, OptionError, "solver DDIM is stochastic: its data are no function of the noise"),
        ({"times": [0.0, 0.5], "steps": None}, OptionError, "times end at 0.5"),
        (
            {"states": [0.5, 0.2]},
            OptionError,
            r"states is \[0.5, 0.2\]; expected times that rise strictly, from 0 to 1",
        ),
        ({"states": [0.5, 1.2]}, OptionError, "expected times that rise strictly"),
        ({"states": 0.5}, OptionError, r"states is 0.5; expected a list"),
        ({"seed": None}, OptionError, "seed is None; expected a whole number"),
        ({"first": -1}, OptionError, "first is -1"),
        ({"batch_size": 0}, OptionError, "batch_size is 0"),
        ({"shard_size": 0}, OptionError, "shard_size is 0"),
        ({"drop_cond": 2.0}, OptionError, "drop_cond is 2.0"),
        ({"cond": {"label": torch.zeros(3, dtype=torch.long)}}, ShapeError, "expected a tensor with 4 entries"),
        ({"cond": {"label": torch.full((4,), 9)}}, OptionError, "values from 9 to 9"),
        ({"cond": {"noise": torch.zeros(4)}}, OptionError, "a condition is called 'noise'"),
        ({"cond": {"text": torch.zeros(4)}, "drop_cond": 0.5}, OptionError, "no null condition for 'text'"),
        ({"cond": "some"}, OptionError, "cond is 'some'"),
        ({"guidance": 3.0}, OptionError, "guidance is 3.0"),
        ({"data": [torch.rand(4, 2)]}, OptionError, "is a stream"),
        ({"data": torch.rand(3, 2)}, OptionError, "n is 4 from row 0; tensor has 3 samples"),
        ({"data": torch.rand(4, 3)}, ShapeError, r"for samples \(2,\), and tensor has \(3,\)"),
        ({"data": torch.rand(4, 2), "cond": {}}, OptionError, "cond is given together with data"),
        ({"data": torch.rand(4, 2), "steps": 1}, OptionError, "straight to pure noise"),
    ],
)
def test_what_cannot_be_made_is_refused_before_anything_is_written(tmp_path, options, kind, said):
    given = {"n": 4, "steps": 3, "out": tmp_path / "a", **QUIET, **options}
    with pytest.raises(kind, match=said) as caught:
        make_pairs(TWO.model(paths.Rectified()), given.pop("n"), **given)
    one_line(caught.value)
    assert not (tmp_path / "a").exists()


def test_models_and_folders_that_do_not_do_are_refused(tmp_path):
    plain = Model(lambda x, t: x, "rectified")
    for model, options, said in [
        (plain, {}, "does not know its samples' shape"),
        (plain.under(shape=(2,)), {"cond": "all"}, "the model has no classes"),
        (plain.under(shape=(2,)), {"guidance": CFG(2.0)}, "without a null condition"),
        (
            Model(lambda x, t, **c: x, "rectified", null={"text": 0}, shape=(2,)),
            {"guidance": CFG(2.0)},
            "expected cond",
        ),
        (plain.under(shape=(2,), path=paths.Affine(lambda t: t, lambda t: 1 - t)), {}, "cannot be saved"),
    ]:
        with pytest.raises(FluvialError, match=said):
            make_pairs(model, 4, steps=2, out=tmp_path / "a", progress=False, **options)
    assert not (tmp_path / "a").exists()
    (tmp_path / "b").mkdir()
    (tmp_path / "b" / "notes.txt").write_text("mine")
    for folder, said in [
        ("b", "is not empty and no set of pairs"),
        ("none", "does not exist"),
        ("b/notes.txt", "a file"),
    ]:
        with pytest.raises(RunError, match=said):
            open_pairs(tmp_path / folder)
    with pytest.raises(RunError, match=r"is not empty and no set of pairs \(it holds notes.txt\)"):
        make_pairs(net(), 4, out=tmp_path / "b", **QUIET)


# The command.


def run(*arguments) -> int:
    with pytest.raises(SystemExit) as ended:
        cli.main([str(argument) for argument in arguments])
    return ended.value.code


def test_command(tmp_path, capsys):
    from fluvial import networks

    torch.manual_seed(0)
    network = networks.mlp(2, 3, width=16, depth=1)
    torch.nn.init.normal_(network.leave[1].weight, std=0.3)
    model = Model(network.eval(), "rectified", null={"label": 3}, shape=(2,))
    save(model, tmp_path / "run")
    given = ["-n", 20, "--steps", 4, "--path", "vp", "--states", "0.3,0.6", "--guidance", 2, "--seed", 5]
    command = ["pairs", tmp_path / "run", *given, "--drop-cond", 0.2, "--out", tmp_path / "pairs", "--batch-size", 8]
    assert run(*command) == 0
    assert f"20 pairs in {tmp_path / 'pairs'}, 11 NFE each: made 20 at" in capsys.readouterr().out.replace("\n", "")
    expected = make_pairs(
        convert(model, path="vp"), 20, steps=4, states=[0.3, 0.6], guidance=CFG(2.0), seed=5, drop_cond=0.2,
        batch_size=8, progress=False,
    )  # fmt: skip
    made = open_pairs(tmp_path / "pairs")
    assert isinstance(made, Pairs)
    for a, b in (
        (made.data, expected.data),
        (made.states, expected.states),
        (made.cond["label"], expected.cond["label"]),
    ):
        assert torch.equal(a, b)
    assert made.path == paths.VP()
    assert json.loads((tmp_path / "pairs" / "manifest.json").read_text()) == expected.manifest
    assert run(*command) == 0
    assert "had nothing left to make" in capsys.readouterr().out
    assert run(*command, "--solver", "langevin") == 2
    assert "stochastic" in capsys.readouterr().err
    numpy_data = tmp_path / "points.npy"
    import numpy

    numpy.save(numpy_data, torch.rand(9, 2).numpy())
    assert run("pairs", tmp_path / "run", "--data", numpy_data, "--out", tmp_path / "back", "--steps", 3) == 0
    assert len(open_pairs(tmp_path / "back")) == 9
