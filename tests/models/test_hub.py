"""The hub: what is uploaded is a whole directory, and what is downloaded is the same model.

A folder stands in for the service, behind the three functions of huggingface_hub that are used.
"""

import inspect
import shutil
import sys
from fnmatch import fnmatch

import pytest
import torch

import ds
from ds.methods import DenoisingStudent
from ds.models import hub
from ds.nets import UNetConfig

huggingface_hub = pytest.importorskip("huggingface_hub")
CONFIG = UNetConfig(
    image_size=4, in_channels=1, channels=4, channel_mult=(1,), num_res_blocks=1,
    attention_resolutions=(), norm_groups=2,
)  # fmt: skip


@pytest.fixture
def service(tmp_path, monkeypatch):
    """Stand in for the service; calls must fit the signatures of the real functions."""
    folder = tmp_path / "service"

    def create_repo(repo_id, private, exist_ok):
        (folder / repo_id).mkdir(parents=True, exist_ok=exist_ok)
        return f"https://hub.example/{repo_id}"

    def upload_folder(repo_id, folder_path, commit_message):
        shutil.copytree(folder_path, folder / repo_id, dirs_exist_ok=True)

    def snapshot_download(repo_id, revision, allow_patterns):
        local, there = tmp_path / "cache", folder / repo_id
        for file in (f for f in there.rglob("*") if f.is_file()):
            name = file.relative_to(there)
            if any(fnmatch(str(name), pattern) for pattern in allow_patterns):
                (local / name).parent.mkdir(parents=True, exist_ok=True)
                shutil.copy(file, local / name)
        return str(local)

    for double in (create_repo, upload_folder, snapshot_download):
        real = inspect.signature(getattr(huggingface_hub, double.__name__)).parameters
        assert set(inspect.signature(double).parameters) <= set(real)
        monkeypatch.setattr(huggingface_hub, double.__name__, double)
    return folder


def test_a_student_comes_back_from_the_hub_as_it_went(service):
    student = ds.Student(CONFIG.build(), DenoisingStudent(t=7))
    url = hub.push_to_hub(student, "somebody/student", pairs=12)
    assert url.endswith("somebody/student")
    again = hub.from_pretrained("somebody/student")
    assert again.method == student.method
    for a, b in zip(again.net.parameters(), student.net.parameters(), strict=True):
        assert torch.equal(a, b)
    assert "| pairs | 12 |" in (service / "somebody/student/README.md").read_text()


def test_a_directory_is_preferred_to_the_hub(tmp_path):
    ds.Student(CONFIG.build(), DenoisingStudent()).save_pretrained(tmp_path / "student")
    assert hub.from_pretrained(tmp_path / "student").nfe == 1


def test_what_is_missing_is_named(monkeypatch):
    monkeypatch.setitem(sys.modules, "huggingface_hub", None)
    with pytest.raises(RuntimeError, match="pip install huggingface_hub"):
        hub.from_pretrained("somebody/student")
