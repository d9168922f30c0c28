"""Models on the Hugging Face hub: which paths mean one, and what of its repository is fetched.

huggingface_hub is imported on use. Its cache and its settings hold, such as HF_HUB_OFFLINE=1. The
small files come first, so that a model that is refused costs no download of its weights.
"""

import os
import re
from collections.abc import Iterable
from pathlib import Path
from typing import Any, NamedTuple

from ds.models.convert.diffusers.files import STEM
from ds.models.convert.diffusers.parts import CONFIG, locate
from ds.system.files import present, read_json, redacted

_REPOSITORY = r"(?P<id>[\w-][\w.-]*/[\w-][\w.-]*)(@(?P<revision>[^/]+))?"
_URL = re.compile(rf"hf:/{{1,2}}{_REPOSITORY}(/(?P<inside>.+))?")  # pathlib leaves one slash of two
_PLAIN = re.compile(_REPOSITORY)
_FILES = (".safetensors", ".bin", ".pt", ".pth", ".ckpt", ".pkl", ".h5", ".hdf5")
_SMALL = [f"{at}{name}" for at in ("", "*/") for name in ("*config.json", "*index*.json")]
_OURS = ("model.safetensors", "decoder/*")
_UNREACHED = {
    "LocalEntryNotFoundError", "OfflineModeIsEnabled", "IncompleteSnapshotError",
    "ConnectionError", "ConnectError", "TimeoutException", "Timeout", "TimeoutError", "ProxyError",
}  # fmt: skip


class Repository(NamedTuple):
    """A repository on the hub, and a folder or file inside; `path` is how the caller names it."""

    path: str
    id: str
    revision: str | None
    inside: str

    def fetch(self, patterns: Iterable[str]) -> Path:
        """Fetch the files that fit the patterns, and the small ones; return where they lie.

        Raises ValueError for a repository that cannot be had, RuntimeError if the hub cannot be
        reached or the package is missing.
        """
        try:
            import huggingface_hub
        except ImportError:
            raise RuntimeError(
                f"{self.path}: the hub needs huggingface_hub: pip install 'denoising-student[hub]'"
            ) from None
        patterns = [*_SMALL, *patterns]
        try:
            found = huggingface_hub.snapshot_download(
                self.id, revision=self.revision, allow_patterns=patterns
            )
        except Exception as error:
            raise self._told(error) from None
        return Path(os.path.abspath(found))

    def _told(self, error: Exception) -> Exception:
        """Return one line for an error of the hub; its own text may hold a token."""
        kinds = {cls.__name__ for cls in type(error).__mro__}
        here = "" if self.path.startswith("hf:") else "no such file or directory, and "
        if "GatedRepoError" in kinds:
            words = "its owners ask for consent on its page on the hub; then `hf auth login`"
        elif "RepositoryNotFoundError" in kinds:
            words = "the hub has no such repository, or a private one; try `hf auth login`"
        elif "RevisionNotFoundError" in kinds or "RevisionResolutionError" in kinds:
            words = f"the repository on the hub has no revision {self.revision!r}"
        elif "HFValidationError" in kinds:
            words = "no name of a repository on the hub; accepted is owner/name"
        elif kinds & _UNREACHED:
            words = "the hub was not reached, and its cache here does not hold all that is needed"
            return RuntimeError(f"{self.path}: {here}{words}")
        else:
            why = getattr(error, "strerror", None) or type(error).__name__
            return RuntimeError(f"{self.path}: {here}fetching it from the hub failed ({why})")
        return ValueError(f"{self.path}: {here}{words}")


def located(path: str | Path, *, revision: str | None = None, variant: str | None = None) -> Path:
    """Return the path of a model on this machine, after fetching it if it is on the hub.

    hf://owner/name, with @revision and /folder if need be, is on the hub. So is owner/name if
    neither it nor the folder owner exists here. Of diffusers' weights the full ones are fetched,
    safetensors first, or those of the `variant`. Raises as `Repository.fetch` does.
    """
    there = _repository(path, revision)
    if there is not None:
        return _fetched(there, variant)
    if revision is not None:
        raise ValueError(
            f"{path}: is a path here and has no revision {revision!r}; leave it out, or write "
            f"hf://owner/name for a repository on the hub"
        )
    return Path(path)


def _repository(path: str | Path, revision: str | None) -> Repository | None:
    """Return the repository that a path means, or None for a path on this machine."""
    text = str(path)
    url = text.startswith("hf:/")
    match = (_URL if url else _PLAIN).fullmatch(text)
    inside = (match["inside"] or "").strip("/") if match and url else ""
    if url and (match is None or ".." in inside.split("/")):
        raise ValueError(
            f"{redacted(path)}: no model on the hub; write hf://owner/name[@revision][/folder]"
        )
    if match is None or (not url and _is_here(Path(text))):
        return None
    text = re.sub(r"^hf:/+", "hf://", text)
    return Repository(text, match["id"], revision or match["revision"], inside)


def _is_here(path: Path) -> bool:
    """Return whether owner/name is meant as a path on this machine, be it a mistyped one."""
    return path.suffix in _FILES or present(path) or present(path.parent)


def _fetched(there: Repository, variant: str | None) -> Path:
    wanted = [there.inside] if there.inside.endswith(_FILES) else []
    root = there.fetch(wanted)
    path = root / there.inside
    if not present(path):
        what = f"no {there.inside}" if there.inside else "nothing that is read"
        raise ValueError(f"{there.path}: the repository on the hub holds {what}")
    if wanted:
        return path
    if _is_ours(path):
        there.fetch(_below(path, root, name) for name in _OURS)
        return path
    try:
        place = locate(path)
    except ValueError as error:
        raise ValueError(str(error).replace(str(path), there.path)) from None
    lacking = [place.network, *([place.decoder] if place.decoder else [])]
    for names in _forms(variant):
        there.fetch(_below(folder, root, name) for folder in lacking for name in names)
        lacking = [folder for folder in lacking if not _has_weights(folder)]
        if not lacking:
            break
    return path


def _below(folder: Path, root: Path, name: str) -> str:
    return (folder / name).relative_to(root).as_posix()


def _forms(variant: str | None) -> list[tuple[str, ...]]:
    """Return patterns for the files of weights, those that are preferred first."""
    kinds = [*([f".{variant}"] if variant else []), "", ".*"]
    return [
        (f"{STEM}{kind}.{suffix}", f"{STEM}{kind}-*.{suffix}")
        for kind in kinds
        for suffix in ("safetensors", "bin")
    ]


def _has_weights(folder: Path) -> bool:
    return any(p.suffix in (".safetensors", ".bin") for p in folder.glob(f"{STEM}*"))


def _is_ours(path: Path) -> bool:
    config: Any = read_json(path / CONFIG) if present(path / CONFIG) else None
    return isinstance(config, dict) and str(config.get("format")).startswith("denoising-student/")
