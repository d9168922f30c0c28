"""The hub: what is uploaded is a whole directory, and what is downloaded is the same model.

A folder stands in for the service, behind the three functions of huggingface_hub that are used.
"""

import inspect
import json
import shutil
import sys
from fnmatch import fnmatch
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

import ds
from ds.cli.__main__ import main
from ds.diffusion.schedules import LinearBeta
from ds.methods import DenoisingStudent
from ds.models import hub
from ds.models.convert import to_diffusers
from ds.models.decoder import Decoder
from ds.models.hub import located
from ds.models.load import load
from ds.nets import UNetConfig
from tests.models.test_weights import STEM
from tests.nets.peers import change

huggingface_hub = pytest.importorskip("huggingface_hub")
CONFIG = UNetConfig(
    image_size=4, in_channels=1, channels=4, channel_mult=(1,), num_res_blocks=1,
    attention_resolutions=(), norm_groups=2,
)  # fmt: skip


@pytest.fixture
def service(tmp_path, monkeypatch):
    """Stand in for the service; calls must fit the signatures of the real functions."""
    folder = tmp_path / "service"
    monkeypatch.chdir(tmp_path)

    def create_repo(repo_id, private, exist_ok):
        (folder / repo_id).mkdir(parents=True, exist_ok=exist_ok)
        return f"https://hub.example/{repo_id}"

    def upload_folder(repo_id, folder_path, commit_message):
        shutil.copytree(folder_path, folder / repo_id, dirs_exist_ok=True)

    def snapshot_download(repo_id, revision, allow_patterns):
        local, there = tmp_path / "cache", folder / f"{repo_id}{revision or ''}"
        for name in names(there):
            if any(fnmatch(name, pattern) for pattern in allow_patterns):
                (local / name).parent.mkdir(parents=True, exist_ok=True)
                shutil.copy(there / name, local / name)
        return str(local)

    for double in (create_repo, upload_folder, snapshot_download):
        real = inspect.signature(getattr(huggingface_hub, double.__name__)).parameters
        assert set(inspect.signature(double).parameters) <= set(real)
        monkeypatch.setattr(huggingface_hub, double.__name__, double)
    return folder


def names(folder):
    """Return the names of all files below a folder."""
    return sorted(str(f.relative_to(folder)) for f in folder.rglob("*") if f.is_file())


def test_a_student_comes_back_from_the_hub_as_it_went(service):
    student = ds.Student(CONFIG.build(), DenoisingStudent(t=7))
    url = hub.push_to_hub(student, "somebody/student", pairs=12)
    assert url.endswith("somebody/student")
    again = hub.from_pretrained("somebody/student")
    assert again.method == student.method
    for a, b in zip(again.net.parameters(), student.net.parameters(), strict=True):
        assert torch.equal(a, b)
    assert "| pairs | 12 |" in (service / "somebody/student/README.md").read_text()


def test_a_decoder_goes_to_the_hub_and_comes_back(service):
    diffusers = pytest.importorskip("diffusers")
    vq = diffusers.VQModel(block_out_channels=(4,), norm_num_groups=2, latent_channels=1)
    student = ds.Student(CONFIG.build(), DenoisingStudent(), decoder=Decoder(vq))
    hub.push_to_hub(student, "somebody/latents")
    x = torch.ones(1, 1, 4, 4)
    assert torch.equal(hub.from_pretrained("somebody/latents").decoded(x), student.decoded(x))


def test_a_directory_is_preferred_to_the_hub(tmp_path):
    ds.Student(CONFIG.build(), DenoisingStudent()).save_pretrained(tmp_path / "student")
    assert hub.from_pretrained(tmp_path / "student").nfe == 1


@pytest.fixture(scope="module")
def models(tmp_path_factory):
    """Return a folder with a student of ours and a pipeline of diffusers."""
    folder = tmp_path_factory.mktemp("models")
    net = CONFIG.build()
    ds.Student(net, DenoisingStudent(t=7)).save_pretrained(folder / "student")
    to_diffusers(folder / "pipe", CONFIG, net.state_dict(), LinearBeta(500), "v")
    return folder


MEANT = ["somebody/student", "hf://somebody/student", Path("hf://somebody/student")]


@pytest.mark.parametrize("name", MEANT, ids=repr)
def test_a_hub_id_is_taken_wherever_a_path_is(service, models, name):
    shutil.copytree(models / "student", service / "somebody/student")
    for read in (load, ds.load_student, ds.from_pretrained):
        assert read(name).method.t == 7
    with pytest.raises(ValueError, match=r"expected a teacher, found a student"):
        ds.load_teacher(name)


@pytest.mark.parametrize("how", ["in the name", "as an option", "both"])
def test_a_revision_is_that_of_the_hub(service, models, how):
    shutil.copytree(models / "pipe", service / "somebody/teacherv1")
    name = "somebody/teacher" if how == "as an option" else "hf://somebody/teacher@v1"
    options = {} if how == "in the name" else {"revision": "v1"}
    assert ds.load_teacher(name, **options).denoiser.schedule.num_steps == 500
    with pytest.raises(ValueError, match="here and has no revision 'v1'; leave it out"):
        ds.load_teacher(models / "pipe", revision="v1")


UNET = f"unet/{STEM}"
SHARDS = [f"{UNET}-00001-of-00002.safetensors", f"{UNET}-00002-of-00002.safetensors"]
SMALL = ["model_index.json", "scheduler/scheduler_config.json", "unet/config.json"]


def sharded(pipe: Path) -> None:
    weights = load_file(pipe / f"{UNET}.safetensors")
    (pipe / f"{UNET}.safetensors").unlink()
    keys = sorted(weights)
    parts = {SHARDS[0]: keys[::2], SHARDS[1]: keys[1::2]}
    for name, part in parts.items():
        save_file({key: weights[key] for key in part}, pipe / name)
    index = {key: Path(name).name for name, part in parts.items() for key in part}
    (pipe / f"{UNET}.safetensors.index.json").write_text(json.dumps({"weight_map": index}))


def beside(*others: str):
    def edit(pipe: Path) -> None:
        for name in others:
            (pipe / name).parent.mkdir(exist_ok=True)
            (pipe / name).write_bytes(b"far too large")

    return edit


def renamed(suffix: str):
    return lambda pipe: (pipe / f"{UNET}.safetensors").rename(pipe / f"{UNET}.{suffix}")


def pickled(suffix: str):
    def edit(pipe: Path) -> None:
        torch.save(load_file(pipe / f"{UNET}.safetensors"), pipe / f"{UNET}.{suffix}")
        (pipe / f"{UNET}.safetensors").unlink()

    return edit


# What is done to a pipeline, what is asked for, and what is fetched of it beside the small files.
FETCHED = {
    "a pipeline": (beside("README.md", "sample.png"), {}, [f"{UNET}.safetensors"]),
    "with other forms": (
        beside(f"{UNET}.bin", f"{UNET}.fp16.safetensors", "unet/model.onnx", "model.ckpt"),
        {}, [f"{UNET}.safetensors"],
    ),
    "a pickle": (pickled("bin"), {}, [f"{UNET}.bin"]),
    "a variant alone": (renamed("fp16.safetensors"), {}, [f"{UNET}.fp16.safetensors"]),
    "a variant by name": (
        lambda p: shutil.copy(p / f"{UNET}.safetensors", p / f"{UNET}.ema.safetensors"),
        {"variant": "ema"}, [f"{UNET}.ema.safetensors"],
    ),
    "shards": (sharded, {}, [f"{UNET}.safetensors.index.json", *SHARDS]),
}  # fmt: skip


@pytest.mark.parametrize("kind", FETCHED)
@pytest.mark.parametrize("inside", ["", "/unet"])
def test_only_what_is_read_is_fetched(service, models, tmp_path, kind, inside):
    edit, options, fetched = FETCHED[kind]
    edit(shutil.copytree(models / "pipe", service / "somebody/pipe"))
    teacher = ds.load_teacher(f"hf://somebody/pipe{inside}", **options)
    assert teacher.denoiser.schedule.num_steps == 500  # of the scheduler beside it
    assert names(tmp_path / "cache") == sorted([*SMALL, *fetched])


def test_a_folder_or_a_file_in_a_repository_is_read(service, models, tmp_path):
    shutil.copytree(models / "student", service / "somebody/all/students/one")
    shutil.copytree(models / "pipe" / "unet", service / "somebody/all/nets")
    assert ds.load_student("hf://somebody/all/students/one").method.t == 7
    file = f"hf://somebody/all/nets/{STEM}.safetensors"
    assert ds.load_teacher(file).shape == (1, 4, 4)
    with pytest.raises(ValueError, match=r"hf://somebody/all/no: the repository .* holds no no"):
        load("hf://somebody/all/no")


def test_the_decoder_of_a_pipeline_is_fetched_too(service, models, tmp_path):
    pipe = shutil.copytree(models / "pipe", service / "somebody/pipe")
    change(pipe / "model_index.json", {"vqvae": ["diffusers", "VQModel"]})
    beside(f"vqvae/{STEM}.safetensors", f"vqvae/{STEM}.bin")(pipe)
    (pipe / "vqvae/config.json").write_text('{"_class_name": "VQModel"}')
    located("somebody/pipe")
    found = set(names(tmp_path / "cache"))
    assert f"vqvae/{STEM}.safetensors" in found and f"vqvae/{STEM}.bin" not in found


def test_half_a_model_costs_no_download_of_its_weights(service, models, tmp_path):
    pipe = shutil.copytree(models / "pipe", service / "somebody/pipe")
    change(pipe / "model_index.json", {"text_encoder": ["transformers", "CLIPTextModel"]})
    with pytest.raises(
        ValueError, match=r"\Ahf://somebody/pipe/model_index.json: the part text_en"
    ):
        load("hf://somebody/pipe")
    assert names(tmp_path / "cache") == SMALL


@pytest.fixture
def unused(tmp_path, monkeypatch):
    """Make every use of the hub fail, in an empty working directory."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(huggingface_hub, "snapshot_download", None)


LOCAL = ["runs/nowhere", "./owner/name", "/owner/name", "owner", "a/b/c", "x/model.pt", "x/w.h5"]


@pytest.mark.parametrize("path", LOCAL)
def test_a_mistyped_path_never_asks_the_hub(tmp_path, unused, path):
    (tmp_path / "runs").mkdir()
    with pytest.raises(ValueError, match=f"{Path(path)}: there is no such file or directory"):
        load(path)


def test_a_directory_that_is_named_like_a_repository_is_a_directory(tmp_path, unused, models):
    shutil.copytree(models / "student", tmp_path / "somebody/student")
    assert ds.from_pretrained("somebody/student").method.t == 7


@pytest.mark.parametrize(
    "name", ["hf://one", "hf://", "hf://a/b/../c", "hf://a/b@", "hf://hf_secret@a/b"]
)
def test_what_is_no_name_on_the_hub_is_said(unused, name):
    with pytest.raises(ValueError, match=r"no model on the hub; write hf://owner/name") as error:
        load(name)
    assert "secret" not in str(error.value)


TROUBLE = {
    "RepositoryNotFoundError": (ValueError, "the hub has no such repository, or a private one"),
    "GatedRepoError": (ValueError, "its owners ask for consent"),
    "RevisionNotFoundError": (ValueError, "has no revision 'v2'"),
    "HFValidationError": (ValueError, "no name of a repository"),
    "LocalEntryNotFoundError": (RuntimeError, "the hub was not reached"),
    "OfflineModeIsEnabled": (RuntimeError, "the hub was not reached"),
    "HfHubHTTPError": (RuntimeError, r"fetching it from the hub failed \(HfHubHTTPError\)"),
}


@pytest.mark.parametrize("kind", TROUBLE)
@pytest.mark.parametrize("name", ["hf://somebody/model", "somebody/model"])
def test_what_goes_wrong_on_the_hub_is_one_line_without_a_token(monkeypatch, kind, name):
    real = getattr(huggingface_hub.errors, kind)

    class Error(real):
        def __init__(self):
            Exception.__init__(self, "401 for hf_secret\nat https://user:hf_secret@hub")

        def __str__(self):
            return "401 for hf_secret"

    def fail(*_, **__):
        raise type(kind, (Error,), {})()

    monkeypatch.setattr(huggingface_hub, "snapshot_download", fail)
    expected, message = TROUBLE[kind]
    with pytest.raises(expected, match=rf"\A{name}: [^\n]*{message}[^\n]*\Z") as error:
        load(name, revision="v2")
    assert "secret" not in str(error.value)
    assert ("no such file or directory" in str(error.value)) == (name == "somebody/model")


def test_offline_mode_reads_the_cache_and_nothing_else(monkeypatch, models, tmp_path):
    """With the real function, on a cache such as it leaves."""
    sha, repository = "0" * 40, tmp_path / "models--somebody--student"
    (repository / "refs").mkdir(parents=True)
    (repository / "refs" / "main").write_text(sha)
    shutil.copytree(models / "student", repository / "snapshots" / sha)
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(tmp_path))
    assert ds.load_student("somebody/student").method.t == 7
    with pytest.raises(RuntimeError, match="hub was not reached, and its cache here does not hold"):
        load("hf://somebody/other")


def test_verbs_take_names_on_the_hub(service, models, tmp_path, capfd):
    shutil.copytree(models / "student", service / "somebody/student")
    for name in ("hf://somebody/student", "somebody/student"):
        assert main(["sample", name, "--out", f"{len(name)}.npy", "--indices", "0-1"]) == 0
    assert main(["convert", "hf://somebody/student", "ours"]) == 0
    before = names(tmp_path / "cache")
    evaluate = ["--count", "64", "--extractor", "pixels", "--reference", "digits"]
    main(["evaluate", "hf://somebody/student", *evaluate])  # 4 x 4 pixels are no digits
    capfd.readouterr()
    assert names(tmp_path / "cache") == before
    assert main(["pairs", "digits", "--teacher", "hf://no/such", "--out", "p"]) == 2
    assert "dstudent: hf://no/such: " in capfd.readouterr().err


def test_the_package_that_is_missing_is_named(monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setitem(sys.modules, "huggingface_hub", None)
    for use in (hub.from_pretrained, lambda name: hub.push_to_hub(None, name)):
        with pytest.raises(RuntimeError, match=r"pip install .*\[hub\]"):
            use("somebody/student")
