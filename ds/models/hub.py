"""Models on the Hugging Face hub. Needs the package huggingface_hub, imported on use."""

import tempfile
from pathlib import Path
from typing import Any

from ds.models.convert.remote import located
from ds.models.load import load
from ds.models.student import Student
from ds.models.teacher import Teacher

__all__ = ["from_pretrained", "located", "push_to_hub"]


def push_to_hub(
    model: Teacher | Student, repo_id: str, *, private: bool = False, **provenance: Any
) -> str:
    """Write a model's directory into the repository `repo_id`, made if need be; return its URL.

    `provenance` goes into config.json and the model card, as with save_pretrained.
    """
    try:
        import huggingface_hub
    except ImportError:
        raise RuntimeError(
            "the hub needs huggingface_hub: pip install 'denoising-student[hub]'"
        ) from None
    url = huggingface_hub.create_repo(repo_id, private=private, exist_ok=True)
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / repo_id.rpartition("/")[2]
        model.save_pretrained(path, **provenance)
        huggingface_hub.upload_folder(
            repo_id=repo_id, folder_path=path, commit_message=f"A {model.kind}"
        )
    return str(url)


def from_pretrained(
    name: str | Path, *, revision: str | None = None, **options: Any
) -> Teacher | Student:
    """Load a teacher or a student from a path or, if there is none, from the hub.

    `name` and `options` are those of ds.models.load.load, and `revision` is a branch, a tag or a
    commit. Of a repository, only what is read is fetched. Raises as `load` does.
    """
    return load(name, revision=revision, **options)
