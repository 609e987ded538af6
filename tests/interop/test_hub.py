"""The hub, without a network: what is uploaded, what of it is downloaded, and what a download may not do."""

from __future__ import annotations

import fnmatch
import json
import os
import pickle
import shutil
import sys
from pathlib import Path

import diffusers_pipelines as tiny
import huggingface_hub
import pytest
import torch
from diffusers import DDIMPipeline, DDIMScheduler

import fluvial as fl
from fluvial import interop, networks, training
from fluvial.convention import Clock, Normalisation
from fluvial.errors import OptionError, RunError
from fluvial.flow_maps import FlowMap
from fluvial.interop import diffusers as fd
from fluvial.model import Model
from problems import command

COMMIT = "0123456789abcdef0123456789abcdef01234567"


class Hub:
    """Repositories as folders of one folder; a download copies what the patterns name, laid out as in the cache."""

    def __init__(self, root: Path) -> None:
        self.root, self.asked, self.uploads = root, [], []

    def folder(self, repo: str) -> Path:
        return self.root / "remote" / repo.replace("/", "--")

    def snapshot_download(self, repo, *, revision=None, token=None, allow_patterns):
        self.asked.append((repo, revision, token, allow_patterns))
        if not self.folder(repo).is_dir():
            raise ConnectionError(f"no such\nrepository: {repo}")
        local = self.root / "cache" / repo.replace("/", "--") / "snapshots" / COMMIT
        for file in self.folder(repo).rglob("*"):
            below = file.relative_to(self.folder(repo))
            if (file.is_symlink() or file.is_file()) and any(
                fnmatch.fnmatch(str(below), pattern) for pattern in allow_patterns
            ):
                (local / below).parent.mkdir(parents=True, exist_ok=True)
                shutil.copy(file, local / below, follow_symlinks=False)
        local.mkdir(parents=True, exist_ok=True)
        return str(local)

    def HfApi(self, token=None, library_name=None):
        self.token = token
        return self

    def create_repo(self, repo, *, private, exist_ok):
        assert exist_ok
        self.private = private
        self.folder(repo).mkdir(parents=True, exist_ok=True)
        return f"https://huggingface.co/{repo}"

    def upload_folder(self, *, repo_id, folder_path, commit_message, delete_patterns):
        assert commit_message
        there, here = self.folder(repo_id), Path(folder_path)
        for old in there.iterdir():
            if any(fnmatch.fnmatch(old.name, pattern) for pattern in delete_patterns):
                old.unlink()
        shutil.copytree(here, there, dirs_exist_ok=True)
        self.uploads.append(sorted(path.name for path in here.iterdir()))


@pytest.fixture
def hub(tmp_path, monkeypatch):
    made = Hub(tmp_path)
    monkeypatch.setattr(huggingface_hub, "snapshot_download", made.snapshot_download)
    monkeypatch.setattr(huggingface_hub, "HfApi", made.HfApi)
    monkeypatch.chdir(tmp_path)
    return made


def own(**options):
    torch.manual_seed(0)
    net = networks.mlp(2, 3, width=8, depth=1)
    for parameter in net.parameters():
        torch.nn.init.normal_(parameter, std=0.3)
    known = {"null": {"label": 3}, "shape": (2,), "normalisation": Normalisation((1.0,), (0.5,), 0.5, 1.5)}
    return Model(net.eval(), **{"path": "rectified", "clock": Clock.noise_level(10.0), **known, **options})


def pipeline(folder, **options):
    DDIMPipeline(tiny.unet(**options), DDIMScheduler(clip_sample=False)).save_pretrained(folder)
    return folder


MODELS = {
    "own": own,
    "converted": lambda: fl.convert(own(), "vp", "noise"),
    "flow map": lambda: FlowMap(own(), "euler"),
    "imported": lambda: fd.from_diffusers(tiny.unet(), DDIMScheduler()),
}


@pytest.mark.parametrize("name", MODELS)
def test_what_is_pushed_comes_back(name, hub):
    model = MODELS[name]()
    assert fl.push_to_hub(model, "me/it", private=True, token="t", license="mit") == "https://huggingface.co/me/it"
    assert (hub.private, hub.token) == (True, "t")
    assert hub.uploads == [["README.md", "config.json", "model.safetensors"]]
    back = fl.load("me/it", token="t")
    assert type(back) is type(model)
    assert back.convention == model.convention
    noise = torch.randn(4, *model.shape, generator=torch.Generator().manual_seed(0))
    assert torch.equal(fl.sample(back, noise, steps=2, seed=0), fl.sample(model, noise, steps=2, seed=0))
    repo, revision, token, patterns = hub.asked[-1]
    assert (repo, revision, token) == ("me/it", COMMIT, "t")
    assert all(pattern.endswith((".json", ".safetensors")) for pattern in patterns)


def test_averaged_weights_are_the_last_push_s(hub):
    raw, averaged = own(), own()
    with torch.no_grad():
        next(iter(averaged.parameters())).add_(1.0)
    fl.push_to_hub(raw, "me/it", ema=averaged)
    assert training.model_hash(fl.load("me/it")) == training.model_hash(averaged)
    assert training.model_hash(fl.load("me/it", weights="raw")) == training.model_hash(raw)
    fl.push_to_hub(raw, "me/it")
    shutil.rmtree(hub.root / "cache")
    assert training.model_hash(fl.load("me/it")) == training.model_hash(raw)


def test_the_card_says_what_the_weights_do_not(tmp_path):
    model = own()
    fl.save(model, tmp_path / "m")
    text = interop.write_card(model, tmp_path / "m", name="me/it", license="apache-2.0").read_text()
    front, body = text.removeprefix("---\n").split("\n---\n")
    assert front.splitlines()[:2] == ["library_name: fluvial", 'license: "apache-2.0"']
    assert '- "rectified"' in front
    for said in (
        "predicts the velocity towards the data on the path Rectified(), time: 10 at the noise, 0 at the data",
        "path units = (data - (1)) / (0.5); low 0.5, high 1.5",
        "| Samples | 2 |",
        "`label` (3 is none)",
        f"`{training.model_hash(model)}`",
        'fl.load("me/it")',
    ):
        assert said in body
    # The lines are those that a reader copies.
    lines = body.split("```python\n")[1].split("\n```")[0].replace("me/it", str(tmp_path / "m")).splitlines()
    found: dict = {}
    exec("\n".join(lines[:-1]), found)
    assert found["x"].shape == (16, 2)
    assert fl.load(tmp_path / "m").convention == model.convention
    assert fl.save(model, tmp_path / "m") == tmp_path / "m"  # a card is no stranger there
    card = interop.write_card(
        fl.convert(own(shape=None, null=None, normalisation=None), "vp"), tmp_path / "m"
    ).read_text()
    assert "Seen as | velocity on VP(" in card
    assert "license" not in card
    with pytest.raises(RunError, match="is no folder"):
        interop.write_card(model, tmp_path / "no")


def test_only_what_a_model_needs_is_downloaded(hub):
    remote = pipeline(hub.folder("them/ddim"))
    for other in ("unet/diffusion_pytorch_model.fp16.safetensors", "all.safetensors", "unet/x.bin"):
        (remote / other).write_bytes(b"much")
    for source, revision in (("them/ddim", None), ("them/ddim@v1", "v1")):
        hub.asked.clear()
        model = fl.load(source)
        assert [asked[1] for asked in hub.asked] == [revision, COMMIT]
        assert torch.equal(next(iter(model.parameters())), next(iter(fd.from_diffusers(remote).parameters())).detach())
        assert torch.equal(next(iter(fd.from_diffusers(source).parameters())), next(iter(model.parameters())))
    got = {path.name for path in (hub.root / "cache").rglob("*") if path.is_file()}
    assert got == {"config.json", "model_index.json", "scheduler_config.json", "diffusion_pytorch_model.safetensors"}
    assert fl.from_pretrained("them/ddim", revision="v1").shape == (1, 8, 8)


def test_info_downloads_no_weights_and_a_folder_comes_first(hub, capsys):
    pipeline(hub.folder("them/ddim"))
    assert command("info", "them/ddim") == 0
    assert "predicts the noise on a table of 1000 steps" in " ".join(capsys.readouterr().out.split())
    assert not list((hub.root / "cache").rglob("*.safetensors"))
    fl.save(own(), "them/ddim")
    hub.asked.clear()
    assert fl.load("them/ddim").shape == (2,)
    assert not hub.asked


def test_what_cannot_be_had_says_what_was_tried(hub, capsys):
    for source in ("me/nothing", "me/nothing@v2"):
        with pytest.raises(
            RunError, match=r"is no folder here .* from the hub .ConnectionError: no such repo"
        ) as caught:
            fl.load(source)
        assert "\n" not in str(caught.value)
    assert command("sample", "me/nothing") == 2
    assert capsys.readouterr().err.count("\n") == 1
    hub.asked.clear()
    for source in (Path("me/nothing"), "nothing", "./me/nothing", "/me/nothing", "a/b/c", "me/it@"):
        with pytest.raises(RunError, match="does not exist; expected a folder, or a name on the hub"):
            fl.load(source)
    assert not hub.asked
    with pytest.raises(OptionError, match="expected one of them"):
        fl.load("me/it@v1", revision="v2")
    for repo in ("it", "me/it@v1", "me/it/that", "/me/it"):
        with pytest.raises(OptionError, match="expected owner/name"):
            fl.push_to_hub(own(), repo)


def test_pushing_says_what_the_hub_answered(hub, monkeypatch):
    monkeypatch.setattr(hub, "upload_folder", lambda **_: 1 / 0)
    with pytest.raises(RunError, match=r"ZeroDivisionError.*token that may write there") as caught:
        fl.push_to_hub(own(), "me/it")
    assert "\n" not in str(caught.value)
    with pytest.raises(OptionError, match="function"):
        fl.push_to_hub(own(clock=lambda t: t), "me/it")
    monkeypatch.setitem(sys.modules, "huggingface_hub", None)
    for call in (lambda: fl.load("me/it"), lambda: fl.push_to_hub(own(), "me/it")):
        with pytest.raises(OptionError, match=r'pip install "fluvial\[diffusers\]"'):
            call()


class Hostile:
    """What a pickle runs as it is read."""

    def __init__(self, mark):
        self.mark = mark

    def __reduce__(self):
        return os.system, (f"touch {self.mark}",)


def test_hostile_repositories_run_nothing_and_read_nothing_else(hub, tmp_path):
    mark, secret = tmp_path / "mark", tmp_path / "secret.json"
    evil = pickle.dumps(Hostile(mark))
    secret.write_text("{}")

    def linked(folder):
        (folder / "scheduler" / "scheduler_config.json").unlink()
        (folder / "scheduler" / "scheduler_config.json").symlink_to(secret)

    def linked_folder(folder):
        (folder / "more.json").symlink_to(tmp_path)

    def pickled(folder):
        (folder / "unet" / "diffusion_pytorch_model.safetensors").unlink()
        (folder / "unet" / "diffusion_pytorch_model.bin").write_bytes(evil)

    def checkpoint_alone(folder):
        shutil.rmtree(folder)
        folder.mkdir()
        (folder / "model.ckpt").write_bytes(evil)

    cases = {
        "linked": (linked, "leads out of the download"),
        "linked-folder": (linked_folder, "leads out of the download"),
        "pickled": (pickled, "it has no weights; expected diffusion_pytorch_model.safetensors"),
        "alone": (checkpoint_alone, "has no model_index.json or config.json"),
    }
    for name, (damage, said) in cases.items():
        damage(pipeline(hub.folder(f"evil/{name}")))
        with pytest.raises(RunError, match=said) as caught:
            fl.load(f"evil/{name}")
        assert "\n" not in str(caught.value)
    assert not mark.exists()
    assert json.loads(secret.read_text()) == {}
