"""manifest.json: how the pairs of a store were made, and how they are laid out in shards."""

from collections.abc import Iterable
from dataclasses import dataclass, field, fields, replace
from functools import cached_property
from itertools import chain, pairwise
from typing import Annotated, Any, Literal, TypedDict, cast

import ds
from ds.diffusion.conditions import Conditions
from ds.models.execution import Execution
from ds.models.images import is_picture
from ds.models.model import device_of, dtype_name
from ds.models.pretrained import describe, fingerprint
from ds.models.teacher import Teacher
from ds.pairs.quantizer import IMAGES, Quantizer, row_of
from ds.pairs.rows import Row
from ds.pairs.storage import AbstractPlace
from ds.system.config import Between, Count, Seed, Sha256, checked, difference, to_json
from ds.system.files import sealed, unsealed

Dtype = Literal["float16", "bfloat16", "float32", "float64"]  # of the teacher's weights
FORMAT = "denoising-student/pairs/1"
MANIFEST = "manifest.json"
MOST_SHARDS = 500_000  # whose hashes fit a manifest
Time = Annotated[float, Between(-1, 3.4e38, "(]")]


class _Denoiser(TypedDict):
    sha256: Sha256
    net: Any
    schedule: Any
    prediction: Any


class About(_Denoiser, total=False):
    """The teacher's denoiser; `sha256` covers all of it and the weights."""

    guidance: Any


@dataclass(frozen=True, kw_only=True)
class Manifest:
    """The fields of manifest.json. The pairs of a shard follow from them and its number.

    Raises ValueError for fields that cannot be, with `file` for the place it names.
    """

    format: Literal["denoising-student/pairs/1"] = FORMAT
    version: str = ds.__version__
    teacher: About
    solver: dict[str, Any]
    grid: Annotated[list[Time], Between(1)]
    execution: Execution
    # of the teacher's weights, and of its products if precision is "float32"; left out if float32
    dtype: Dtype = "float32"
    device: str
    noise: Literal["philox4x32-10, Box-Muller"] = "philox4x32-10, Box-Muller"
    conditions: Conditions = field(
        default_factory=Conditions
    )  # of the samples; left out if there are none
    seed: Seed
    count: Count
    grown_from: list[Count] = field(default_factory=list)  # earlier counts
    shape: Annotated[list[Count], Between(1)]
    quantizer: Quantizer
    shard_size: Count
    sha256: list[Sha256 | None] = field(default_factory=list)  # of shards; None: not finished

    @classmethod
    def of(cls, teacher: Teacher, execution: Execution, **layout: Any) -> "Manifest":
        """Return the manifest of a store to be made; `layout` are seed, count and so on."""
        denoiser = teacher.denoiser
        about: About = {
            "sha256": fingerprint(denoiser),
            "net": describe(teacher.net),
            "schedule": to_json(denoiser.schedule),
            "prediction": to_json(denoiser.prediction),
        }
        if denoiser.guidance is not None:
            about["guidance"] = denoiser.guidance.about()
        manifest = cls(
            teacher=about,
            solver=to_json(teacher.solver),
            grid=list(teacher.grid),
            execution=execution,
            dtype=cast(Dtype, dtype_name(teacher.net)),
            device=device_of(teacher.net).type,
            shape=list(teacher.shape),
            **layout,
        )
        return manifest._checked("generate_pairs")

    @classmethod
    def read(cls, where: AbstractPlace) -> "Manifest":
        """Return the manifest at a place; ValueError names the file and what is wrong with it."""
        try:
            data = where.read_json(MANIFEST)
        except (FileNotFoundError, NotADirectoryError):
            raise ValueError(f"{where}: not a pair store, it has no {MANIFEST}") from None
        file = f"{where}/{MANIFEST}"
        if not isinstance(data, dict) or data.get("format") != FORMAT:
            raise ValueError(f"{file}: not the manifest of a pair store")
        data = checked(unsealed(data, file, required=True), cls, file)
        data["execution"] = Execution(**data["execution"])
        try:
            data["conditions"] = Conditions(**data.get("conditions", {}))
        except ValueError as error:
            raise ValueError(f"{file}: {error}") from None
        return cls(**data)._checked(file)

    def write(self, where: AbstractPlace, *, once: bool = False) -> None:
        """Write the manifest to a place, with its seal; `once` only if there is none."""
        where.write_json(MANIFEST, sealed(self.json), once=once)

    @property
    def json(self) -> dict[str, Any]:
        """The fields as JSON."""
        values = {f.name: getattr(self, f.name) for f in fields(self)}
        if self.dtype == "float32":
            del values["dtype"]
        if self.conditions.names:
            about = vars(self.conditions).items()
            values["conditions"] = {name: to_json(value) for name, value in about}
        else:
            del values["conditions"]
        return {**values, "execution": dict(vars(self.execution))}

    def _checked(self, file: str) -> "Manifest":
        """Return the manifest; ValueError names the first field that does not fit the others."""
        if any(t <= s for t, s in pairwise(self.grid)):
            raise ValueError(f"{file}: grid must fall, not {self.grid}")
        if any(a >= b for a, b in pairwise(self._counts)):
            raise ValueError(f"{file}: grown_from must rise to count, not {self._counts[1:]}")
        shards = sum(-(-(b - a) // self.shard_size) for a, b in pairwise(self._counts))
        if shards > MOST_SHARDS:
            raise ValueError(
                f"{file}: {self.count:,} pairs, {self.shard_size:,} a shard, are {shards:,} "
                f"shards; take larger ones or fewer pairs, for {MOST_SHARDS:,} at most"
            )
        if len(self.sha256) > shards:
            raise ValueError(f"{file}: has {len(self.sha256):,} hashes for {shards:,} shards")
        if self.quantizer in IMAGES and not is_picture(self.shape):
            raise ValueError(
                f"{file}: shape must be [C, H, W] with 1 or 3 channels for the quantizer "
                f"{self.quantizer}, not {self.shape}"
            )
        return self

    # Growth.

    def agreed(self, there: "Manifest | None", where: AbstractPlace) -> "Manifest":
        """Return this manifest grown out of the one that is there, if there is one.

        Raises ValueError if that is of another store, or has more pairs.
        """
        if there is None:
            return self
        grown = there.grown_to(self.count)
        wanted = replace(self, grown_from=grown.grown_from)
        same = {"version": self.version, "sha256": self.sha256}
        if found := difference({**grown.json, **same}, wanted.json):
            raise ValueError(f"{where}: holds a store made otherwise ({found}); use another name")
        return wanted

    def grown_to(self, count: int) -> "Manifest":
        """Return the manifest with a larger count; a smaller one changes nothing."""
        if count <= self.count:
            return self
        return replace(self, count=count, grown_from=[*self.grown_from, self.count])

    # Layout.

    @property
    def _counts(self) -> list[int]:
        return [0, *self.grown_from, self.count]

    @cached_property
    def starts(self) -> list[int]:
        """The first index of every shard, and the end of the last one.

        A shard ends where the store ended before it grew, even if it is not full.
        """
        parts = (range(a, b, self.shard_size) for a, b in pairwise(self._counts))
        return [*chain.from_iterable(parts), self.count]

    @property
    def shards(self) -> range:
        """The numbers of the shards."""
        return range(len(self.starts) - 1)

    def indices(self, shard: int) -> range:
        """Return the indices of a shard's pairs."""
        return range(self.starts[shard], self.starts[shard + 1])

    def pairs(self, shards: Iterable[int]) -> int:
        """Return how many pairs some shards have."""
        return sum(len(self.indices(shard)) for shard in shards)

    def missing(self, names: set[str]) -> list[int]:
        """Return the shards that are not among the names of files."""
        return [shard for shard in self.shards if name(shard) not in names]

    @property
    def finished(self) -> bool:
        """Whether the hash of every shard is known."""
        return len(self.sha256) == len(self.shards) and None not in self.sha256

    @property
    def row(self) -> Row:
        """The stored form of one sample."""
        return row_of(self.shape, self.quantizer)


def name(shard: int) -> str:
    """Return the name of a shard's file."""
    return f"images-{shard:05d}.npy"
