"""What is written, and where: everything that writes, at every kind of place."""

import os
import resource
import shutil
import signal
import socket
import stat
from collections.abc import Callable
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import pytest
import torch

import ds
from ds.cli.__main__ import main
from ds.evaluation.features import Pixels
from ds.evaluation.report import page
from ds.models import export, images
from ds.models.convert import to_diffusers
from ds.nets import UNet, UNetConfig
from ds.pairs import archives
from ds.system import targets

NET = UNetConfig(
    image_size=8, in_channels=1, channels=4, channel_mult=(1,), num_res_blocks=1,
    attention_resolutions=(), norm_groups=2,
)  # fmt: skip
TINY = ["--net.channels", "4", "--net.num-res-blocks", "1", "--net.norm-groups", "2"]
SHORT = ["--train.epochs", "0.01", "--train.batch-size", "8"]
PAIRS = [
    "--pairs.count", "8", "--pairs.held-out", "8", "--pairs.batch-size", "8", "--solve.steps", "2",
]  # fmt: skip
GREY = torch.zeros(4, 8, 8, 1, dtype=torch.uint8)


@pytest.fixture(scope="module")
def home(tmp_path_factory) -> Path:
    """What is read: a teacher, a student and a store."""
    home = tmp_path_factory.mktemp("inputs")
    with torch.random.fork_rng():
        torch.manual_seed(0)
        net = UNet(NET).eval()
    teacher = ds.Teacher(ds.Denoiser(net, ds.schedule.LinearBeta()), ds.solvers.DDIM(), (999, 500))
    teacher.save_pretrained(home / "teacher")
    ds.Student(net, ds.methods.DenoisingStudent()).save_pretrained(home / "student")
    ds.generate_pairs(teacher, home / "store", 16)
    return home


@pytest.fixture(autouse=True)
def quick(monkeypatch):
    """Exports that cost nothing, and no waiting for a disk."""
    monkeypatch.setattr(export, "_exported", lambda student: None)
    monkeypatch.setattr("torch.export.save", lambda program, file: file.write(b"program"))
    monkeypatch.setattr("torch.onnx.export", lambda *_, **__: Onnx())
    monkeypatch.setattr("os.fsync", lambda descriptor: None)


class Onnx:
    def save(self, path: Path) -> None:
        path.write_bytes(b"onnx")


@dataclass(frozen=True)
class Writer:
    """What writes to `out`: a line of the command line, or a call."""

    call: Callable[[Path, Path, bool], Any]  # of the inputs, out and force
    reads: str = ""  # the input whose neighbourhood is refused
    suffix: str = ""  # of the name of a file
    makes: frozenset[str] = frozenset()  # names in a directory
    goes_on: bool = False  # where it has been before
    forces: bool = True  # has such an option
    slow: bool = False

    def __call__(self, home: Path, out: Path, force: bool = False) -> None:
        self.call(home, out, force)


def verb(*line: str, **about: Any) -> Writer:
    """A verb whose words HOME and OUT stand for the inputs and the output."""

    def call(home: Path, out: Path, force: bool) -> None:
        words = [w.replace("HOME", str(home)).replace("OUT", str(out)) for w in line]
        main_or_raise([*words, *["--force"] * force])

    return Writer(call, **about)


def main_or_raise(words: list[str]) -> None:
    """Run a verb; ValueError with what it says on standard error if that is one line and exit 2."""
    from contextlib import redirect_stderr, redirect_stdout
    from io import StringIO

    said = StringIO()
    with redirect_stderr(said), redirect_stdout(StringIO()):
        code = main(words)
    if code:
        assert code == 2 and said.getvalue().splitlines()[-1].startswith("dstudent: ")
        raise ValueError(said.getvalue().splitlines()[-1])


def student(home: Path) -> ds.Student:
    return ds.load_student(home / "student")


def _trainer(home: Path, out: Path, force: bool) -> None:
    store, config = ds.PairStore(home / "store"), ds.TrainConfig(batch_size=8, epochs=1)
    pairs = ds.Pairs(store)
    teacher = ds.load_teacher(home / "teacher")
    ds.Trainer(ds.methods.DenoisingStudent(), teacher, pairs, pairs, out, config).fit()


def _diffusers(home: Path, out: Path, force: bool) -> None:
    config = replace(NET, conv_shortcut=False)
    to_diffusers(out, config, UNet(config).state_dict(), ds.schedule.LinearBeta(), force=force)


def _evaluate(home: Path, out: Path, force: bool) -> None:
    ds.evaluate(GREY, GREY, Pixels(), out=out, force=force)


MODEL = frozenset({"config.json", "model.safetensors", "README.md"})
SHEETS = frozenset({targets.MARK, *(f"{i:06d}.png" for i in range(4))})
DIFFUSERS = frozenset({
    targets.MARK, "model_index.json", "scheduler/scheduler_config.json", "unet/config.json",
    "unet/diffusion_pytorch_model.safetensors",
})  # fmt: skip
STORE = frozenset({".lock", "manifest.json", "images-00000.npy"})
ARCHIVES = frozenset({".lock", "source.json", "000000.tar"})
RUN = frozenset({".lock", "run.json", "metrics.jsonl", "checkpoint.pt", "samples/step-0000002.png"})
SAMPLE = ("sample", "HOME/student", "--out", "OUT", "--indices", "0-3")
JUDGED = ("evaluate", "HOME/student", "--extractor", "pixels", "--count", "4", "--out", "OUT")
TEACH = ("teach", "digits", "--out", "OUT", *TINY, *SHORT)
DISTILL = (
    "distill", "digits", "--teacher", "HOME/teacher", "--store", "HOME/store", "--out", "OUT",
    *SHORT, "--held-out", "8",
)  # fmt: skip

WRITERS = {
    "sample a sheet": verb(*SAMPLE, suffix=".png", reads="student"),
    "sample an array": verb(*SAMPLE, suffix=".npz", reads="student"),
    "sample pictures": verb(*SAMPLE, reads="student", makes=SHEETS),
    "convert": verb("convert", "HOME/teacher", "OUT", reads="teacher", makes=MODEL),
    "convert --to diffusers": verb(
        "convert", "HOME/teacher", "OUT", "--to", "diffusers", reads="teacher", makes=DIFFUSERS
    ),
    "convert --to pt2": verb(
        "convert", "HOME/student", "OUT", "--to", "pt2", reads="student", suffix=".pt2"
    ),
    "convert --to onnx": verb(
        "convert", "HOME/student", "OUT", "--to", "onnx", reads="student", suffix=".onnx"
    ),
    "evaluate": verb(*JUDGED, reads="student", suffix=".json"),
    "pairs": verb(
        "pairs", "digits", "--teacher", "HOME/teacher", "--out", "OUT", *PAIRS,
        reads="teacher", makes=STORE, goes_on=True, forces=False,
    ),
    "pairs export": verb(
        "pairs", "export", "HOME/store", "OUT", reads="store", makes=ARCHIVES, goes_on=True
    ),
    "teach": verb(*TEACH, makes=MODEL, goes_on=True, slow=True),
    "distill": verb(*DISTILL, reads="teacher", makes=MODEL, goes_on=True, slow=True),
    "save_pretrained": Writer(
        lambda home, out, force: student(home).save_pretrained(out, force=force), makes=MODEL
    ),
    "images.save": Writer(
        lambda home, out, force: images.save(GREY, out, force=force), makes=SHEETS
    ),
    "to_program": Writer(
        lambda home, out, force: export.to_program(student(home), out, force=force), suffix=".pt2"
    ),
    "to_onnx": Writer(
        lambda home, out, force: export.to_onnx(student(home), out, force=force), suffix=".onnx"
    ),
    "to_diffusers": Writer(_diffusers, makes=DIFFUSERS),
    "archives.export": Writer(
        lambda home, out, force: archives.export(ds.PairStore(home / "store"), out, force=force),
        reads="store", makes=ARCHIVES, goes_on=True,
    ),
    "ds.evaluate": Writer(_evaluate, suffix=".json"),
    "generate_pairs": Writer(
        lambda home, out, force: ds.generate_pairs(ds.load_teacher(home / "teacher"), out, 16),
        makes=STORE, goes_on=True, forces=False,
    ),
    "Trainer": Writer(_trainer, makes=RUN, goes_on=True, forces=False, slow=True),
    "page.write": Writer(
        lambda home, out, force: page.write(out, "title", force=force), suffix=".html"
    ),
    "report": verb("report", "HOME/student", "--out", "OUT", suffix=".html"),
}  # fmt: skip
FILES = [name for name, w in WRITERS.items() if w.suffix]
QUICK = [name for name, w in WRITERS.items() if not w.slow]
every = pytest.mark.parametrize("name", WRITERS)


def forked(work: Callable[[], Any]) -> int:
    """Do something in a child; return how it ended."""
    if not (child := os.fork()):
        try:
            work()
        except BaseException:
            os._exit(1)
        os._exit(0)
    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])


def tree(folder: Path) -> dict[str, Any]:
    """Return all that is in a directory: files by content, others by their mode, links by goal."""
    found: dict[str, Any] = {}
    for path in sorted(folder.rglob("*")):
        about = path.lstat()
        name = str(path.relative_to(folder))
        if stat.S_ISLNK(about.st_mode):
            found[name] = os.readlink(path)
        elif stat.S_ISREG(about.st_mode):
            found[name] = path.read_bytes()
        elif not stat.S_ISDIR(about.st_mode) or not any(path.iterdir()):
            found[name] = about.st_mode
    return found


def listing(folder: Path) -> set[str]:
    names = {name for name in tree(folder) if "tfevents" not in name}
    return {name for name in names if not name.endswith(".npy.png")}


@contextmanager
def untouched(*folders: Path):
    before = [tree(folder) for folder in folders]
    yield
    assert [tree(folder) for folder in folders] == before


def _foreign(out: Path) -> Path:
    out.mkdir()
    (out / "thesis").write_text("years")
    return out


def _within(out: Path) -> Path:
    (out / "deep" / "er").mkdir(parents=True)
    (out / "deep" / "er" / ".thesis").write_text("years")
    return out


def _linked(out: Path) -> Path:
    _foreign(out.with_name("real"))
    out.symlink_to("real")
    return out


def _file(out: Path) -> Path:
    out.write_text("years")
    return out


def _dangling(out: Path) -> Path:
    out.symlink_to("nowhere")
    return out


def _below_dangling(out: Path) -> Path:
    out.symlink_to("nowhere")
    return out / "x.png" if out.suffix else out / "x"


def _loop(out: Path) -> Path:
    out.symlink_to(out.name)
    return out


def _pipe(out: Path) -> Path:
    os.mkfifo(out)
    return out


def _linked_pipe(out: Path) -> Path:
    os.mkfifo(out.with_name("pipe"))
    out.symlink_to("pipe")
    return out


def _socket(out: Path) -> Path:
    with socket.socket(socket.AF_UNIX) as s:
        here = os.getcwd()
        os.chdir(out.parent)
        s.bind(out.name)
        os.chdir(here)
    return out


def _null(out: Path) -> Path:
    out.symlink_to("/dev/null")
    return out


def _below_a_file(out: Path) -> Path:
    out.with_name("thesis").write_text("years")
    return out.with_name("thesis") / out.name


def _unwritable(out: Path) -> Path:
    return Path("/proc/1/fd") / out.name


def _too_long(out: Path) -> Path:
    return out.with_name("n" * (256 - len(out.suffix)) + out.suffix)


REFUSED = {
    "a directory with a file of somebody": _foreign,
    "a directory with a file of somebody, deep": _within,
    "a link to such a directory": _linked,
    "a file": _file,
    "a link to nothing": _dangling,
    "below a link to nothing": _below_dangling,
    "a link to itself": _loop,
    "a pipe": _pipe,
    "a link to a pipe": _linked_pipe,
    "a socket": _socket,
    "a link to a device": _null,
    "below a file": _below_a_file,
    "a place that cannot be written to": _unwritable,
    "a name that is too long": _too_long,
}


@pytest.mark.each_value
@every
@pytest.mark.parametrize("kind", REFUSED)
def test_what_is_not_ours_is_left_alone(name, kind, home, tmp_path):
    """Before any work, by one line that names it; a file gives way to a file, if it is forced."""
    writer = WRITERS[name]
    out = REFUSED[kind](tmp_path / f"out{writer.suffix}")
    for force in {False, writer.forces and not (kind == "a file" and writer.suffix)}:
        with untouched(tmp_path, home), pytest.raises((ValueError, OSError)) as refusal:
            writer(home, out, force)
        assert len(str(refusal.value).splitlines()) == 1
        assert out.name in str(refusal.value) or "thesis" in str(refusal.value)


def test_devices_stay_what_they_are(home):
    for writer in WRITERS.values():
        for force in {False, writer.forces}:
            with pytest.raises(ValueError, match="null: "):
                writer(home, Path("/dev/null"), force)
    assert stat.S_ISCHR(os.stat("/dev/null").st_mode)


@pytest.mark.parametrize("name", FILES)
def test_a_file_that_cannot_give_way_is_known_before_the_work(name, home, tmp_path, monkeypatch):
    """One that is mounted, or another user's in a directory with the sticky bit."""
    writer, out = WRITERS[name], tmp_path / f"o ut{WRITERS[name].suffix}"
    out.write_text("years")
    with monkeypatch.context() as patch:
        place = str(out).replace(" ", "\\040")
        (tmp_path / "mounts").write_text(f"1 2 8:1 /x {place} rw - ext4 /dev/sda rw\n")
        patch.setattr(targets, "MOUNTS", tmp_path / "mounts")
        with untouched(tmp_path), pytest.raises(ValueError, match="is a mount point"):
            writer(home, out, True)
    tmp_path.chmod(0o1777)
    monkeypatch.setattr(os, "geteuid", lambda: 12345)
    with untouched(tmp_path), pytest.raises(ValueError, match="is another user's"):
        writer(home, out, True)


OVERLAPS = {
    "the input": lambda source: source,
    "the directory of the input": lambda source: source.parent,
    "within the input": lambda source: source / "x",
    "deep within the input": lambda source: source / "x" / "y",
    "the input, by detours": lambda source: source / ".." / source.name / "x",
    "the input, by a link": lambda source: linked(source),
    "within the input, by a link": lambda source: linked(source) / "x",
    "a file of the input": lambda source: next(f for f in source.iterdir() if f.is_file()),
}


def linked(source: Path) -> Path:
    link = source.parent.parent / "link"
    link.symlink_to(source)
    return link


@pytest.mark.parametrize("name", [n for n, w in WRITERS.items() if w.reads])
@pytest.mark.parametrize("kind", OVERLAPS)
def test_an_input_is_not_written_over(name, kind, home, tmp_path):
    writer = WRITERS[name]
    there = shutil.copytree(home, tmp_path / "in")
    out = OVERLAPS[kind](there / writer.reads)
    if writer.suffix and kind.startswith(("within", "deep", "the input, by detours")):
        out = out.with_suffix(writer.suffix)
    for force in {False, writer.forces}:
        with untouched(there), pytest.raises(ValueError) as refusal:
            writer(there, out, force)
        assert len(str(refusal.value).splitlines()) == 1


def test_a_run_is_not_written_over_what_it_reads(home, tmp_path):
    """It is beside its student, under a name that nobody typed."""
    there = shutil.copytree(home, tmp_path / "in")
    for read in ("teacher", "store"):
        (there / read).rename(there / "x-run")
        line = [w.replace(f"HOME/{read}", "HOME/x-run") for w in DISTILL]
        with untouched(there), pytest.raises(ValueError, match="x-run"):
            verb(*line)(there, there / "x", True)
        (there / "x-run").rename(there / read)


def test_a_student_is_not_to_be_where_its_pairs_will_be(home, tmp_path):
    """What is not there yet is found to be the same, too, before pairs are made."""
    for store, out in (("x", "x"), ("x/pairs", "x"), ("x", "x/student"), ("x-run", "x")):
        line = [w.replace("HOME/store", str(tmp_path / store)) for w in DISTILL]
        with untouched(tmp_path), pytest.raises(ValueError, match="which is read"):
            verb(*line)(home, tmp_path / out)


def _absent(out: Path) -> Path:
    return out.parent / "new" / "newer" / out.name


def _empty(out: Path) -> Path:
    if not out.suffix:
        out.mkdir()
    return out


def _link(out: Path) -> Path:
    """A link to a directory; of a file, to the one it is in."""
    link, real = out.with_name("link"), out.with_name("real")
    real.mkdir()
    link.symlink_to(real)
    return link / out.name if out.suffix else link


def _by_detours(out: Path) -> Path:
    (out.parent / "a").mkdir()
    return Path(os.path.relpath(out.parent)) / "a" / ".." / "." / out.name


def _long(out: Path) -> Path:
    return out.with_name("n" * (255 - len(out.suffix)) + out.suffix)


def _odd(out: Path) -> Path:
    return out.with_name("-a b\n\"c'$(d)\udcff*" + out.suffix)


def _elsewhere(out: Path) -> Path:
    return Path("/dev/shm") / out.parent.name / out.name


ACCEPTED = {
    "below what is not there": _absent,
    "an empty directory": _empty,
    "through a link": _link,
    "by detours": _by_detours,
    "the longest name": _long,
    "an odd name": _odd,
    "another disk": _elsewhere,
}


def made(writer: Writer, out: Path) -> None:
    """What is there is what was to be made, with the permissions of the umask, and no more."""
    (umask := os.umask(0o022), os.umask(umask))
    if writer.suffix:
        assert out.stat().st_mode == stat.S_IFREG | 0o666 & ~umask
        return
    assert listing(out) == writer.makes
    for path in out.rglob("*"):
        kind, most = (stat.S_IFDIR, 0o777) if path.is_dir() else (stat.S_IFREG, 0o666)
        assert path.lstat().st_mode == kind | most & ~umask, path
    assert out.stat().st_mode == stat.S_IFDIR | 0o777 & ~umask


@pytest.mark.parametrize("name", QUICK)
@pytest.mark.parametrize("kind", ACCEPTED)
def test_every_place_that_cp_takes_is_taken(name, kind, home, tmp_path):
    writer = WRITERS[name]
    out = ACCEPTED[kind](tmp_path / f"out{writer.suffix}")
    try:
        writer(home, out)
        made(writer, out)
        assert {p.name for p in out.parent.iterdir()} <= {out.name, "real", "a", "link"}
    finally:
        if kind == "another disk":
            shutil.rmtree(out.parent)


@every
def test_everything_has_the_permissions_of_the_umask_and_is_made_again(name, home, tmp_path):
    """Its own output is replaced, or gone on with; what somebody has put there stays."""
    writer, out = WRITERS[name], tmp_path / "new" / f"out{WRITERS[name].suffix}"
    before = os.umask(0o027)
    try:
        writer(home, out)
        made(writer, out)
        assert (tmp_path / "new").stat().st_mode == stat.S_IFDIR | 0o750
        if writer.goes_on:
            (out / "notes").write_text("mine")
            writer(home, out)
            assert (out / "notes").read_text() == "mine"
            return
        with untouched(out.parent), pytest.raises(ValueError, match="force"):
            writer(home, out)
        writer(home, out, True)
        made(writer, out)
        if not writer.suffix:
            (out / "thesis").write_text("years")
            with untouched(out), pytest.raises(ValueError, match="thesis"):
                writer(home, out, True)
    finally:
        os.umask(before)


PLANTS = {
    "generate_pairs": (
        ".lock", "manifest.json", "images-00000.npy", "images-00000.npy.tmp", "images-00000.sha256",
    ),
    "archives.export": (".lock", "source.json", "000000.tar"),
    "Trainer": (
        ".lock", "run.json", "metrics.jsonl", "checkpoint.pt", "samples",
        "samples/step-0000002.png",
    ),
    "save_pretrained": ("config.json", "model.safetensors", "README.md", "metrics.json"),
    "images.save": (targets.MARK, "000000.png"),
    "to_diffusers": (targets.MARK, "unet", "unet/config.json"),
}  # fmt: skip


@pytest.mark.parametrize(("name", "planted"), [(n, p) for n, all in PLANTS.items() for p in all])
def test_no_link_in_a_directory_of_ours_is_written_through(name, planted, home, tmp_path):
    """To a file of ours or of somebody, or to a directory; in what is whole, and what is begun."""
    writer = WRITERS[name]
    for whole in (True, False):
        out, aim = tmp_path / f"out-{whole}", tmp_path / f"aim-{whole}"
        writer(home, out)
        if not whole:
            for file in [f for f in out.rglob("*") if f.is_file()]:
                if file.name not in ("manifest.json", "source.json", "run.json", "config.json"):
                    file.unlink()
        if (out / planted).exists():
            (out / planted).rename(aim)
        elif planted != "images-00000.npy.tmp" and whole:
            aim.write_text("years")
        else:
            (aim / "gone").mkdir(parents=True)
        (out / planted).symlink_to(aim)
        with _like(aim):
            try:
                writer(home, out, writer.forces)
            except (ValueError, OSError) as refusal:
                assert len(str(refusal).splitlines()) == 1
            else:
                assert whole and writer.goes_on  # where nothing was to be written


@contextmanager
def _like(path: Path):
    """What a path leads to is the same afterwards."""
    before = tree(path.parent)[path.name] if path.is_file() else tree(path)
    yield
    assert before == (tree(path.parent)[path.name] if path.is_file() else tree(path))


EXPORTS = [name for name in WRITERS if name.startswith(("sample", "convert", "evaluate"))]


@pytest.mark.parametrize("name", EXPORTS)
def test_a_disk_that_is_full_is_one_line_and_leaves_what_was_there(name, home, tmp_path):
    """Which names the place, not what is made beside it."""
    writer, out = WRITERS[name], tmp_path / f"out{WRITERS[name].suffix}"
    writer(home, out)

    def fill() -> None:
        signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
        resource.setrlimit(resource.RLIMIT_FSIZE, (1, 1))
        with pytest.raises(ValueError, match=rf"^dstudent: .*File too large: '{out}[^:]*'$"):
            writer(home, out, True)

    with untouched(tmp_path):
        assert forked(fill) == 0
