"""Models on the Hugging Face hub. Needs the package huggingface_hub, imported on use."""

import tempfile
from pathlib import Path
from typing import Any

from ds.models.load import load
from ds.models.student import Student
from ds.models.teacher import Teacher


def push_to_hub(
    model: Teacher | Student, repo_id: str, *, private: bool = False, **provenance: Any
) -> str:
    """Write a model's directory into the repository `repo_id`, made if need be; return its URL.

    `provenance` goes into config.json and the model card, as with save_pretrained.
    """
    hub = _hub()
    url = hub.create_repo(repo_id, private=private, exist_ok=True)
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / repo_id.rpartition("/")[2]
        model.save_pretrained(path, **provenance)
        hub.upload_folder(repo_id=repo_id, folder_path=path, commit_message=f"A {model.kind}")
    return str(url)


def from_pretrained(
    name: str | Path, *, revision: str | None = None, **options: Any
) -> Teacher | Student:
    """Load a teacher or a student from a directory or, if there is none, from the hub.

    `options` are those of ds.models.load.load, such as device. Only the configuration and the
    safetensors files are fetched. Raises ValueError for a directory or repository that holds
    neither.
    """
    path = Path(name)
    if not path.exists():
        files = ["config.json", "model.safetensors", "decoder/*"]
        path = _hub().snapshot_download(str(name), revision=revision, allow_patterns=files)
    return load(path, **options)


def _hub() -> Any:
    try:
        import huggingface_hub
    except ImportError:
        raise RuntimeError("the hub needs one more package: pip install huggingface_hub") from None
    return huggingface_hub
