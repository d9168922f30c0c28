"""Nothing is half-written, left behind, or written through a link: how ds.staging writes."""

import fcntl
import itertools
import os
import shutil
import stat
from pathlib import Path

import pytest

from ds.system.staging import (
    COMMIT,
    LOCK,
    NEW,
    check_plain,
    locked,
    open_own,
    recover,
    replacing,
    replacing_directory,
    staging,
)
from tests.system.test_outputs import forked, tree

CALLS = ("rename", "replace", "link", "fsync", "mkdir", "chmod", "unlink", "rmdir", "open")


def dying(work, call: str, number: int):
    """Return the same work, in a process that dies at one call of os, just before it."""

    def work_and_die():
        real, left = getattr(os, call), itertools.count()

        def counted(*args, **options):
            return os._exit(9) if next(left) == number else real(*args, **options)

        setattr(os, call, counted)
        work()

    return work_and_die


def write_file(out: Path) -> None:
    with replacing(out / "file") as path:
        path.write_text("new")


def write_new_file(out: Path) -> None:
    with replacing(out / "another", force=False) as path:
        path.write_text("new")


def write_directory(out: Path, old=("a", "deep/b", "c")) -> None:
    with replacing_directory(out / "folder", old) as path:
        (path / "deep").mkdir()
        for name in ("a", "deep/b", "deep/new"):
            (path / name).write_text("new")


def write_new_directory(out: Path) -> None:
    with replacing_directory(out / "other") as path:
        (path / "a").write_text("new")
        (path / "b").write_text("new")


WORKS = [write_file, write_new_file, write_directory, write_new_directory]


def before(out: Path) -> Path:
    """Make what is there before: a file, and a directory with files of ours and of somebody."""
    (out / "folder" / "deep").mkdir(parents=True)
    for name in ("file", "folder/a", "folder/deep/b", "folder/c", "folder/thesis"):
        (out / name).write_text("old")
    return out


@pytest.mark.parametrize("work", WORKS, ids=lambda work: work.__name__)
@pytest.mark.parametrize("call", CALLS)
def test_a_kill_leaves_the_old_or_the_new_and_the_next_run_no_trace(work, call, tmp_path):
    old = tree(before(tmp_path / "old"))
    work(before(tmp_path / "new"))
    new = tree(tmp_path / "new")
    for number in itertools.count():
        out = before(tmp_path / f"{number}")
        code = forked(dying(lambda out=out: work(out), call, number))
        assert code in (0, 9)
        recover(out)
        recover(out / "folder")
        assert tree(out) in (old, new)
        if tree(out) == old:
            work(out)
        assert tree(out) == new
        if code == 0:
            return


def test_a_commit_of_the_dead_is_not_stopped_by_its_second_end(tmp_path):
    """Whoever ends what a kill has left may be killed as well."""
    for number, again in itertools.product(range(3), range(5)):
        out = before(tmp_path / f"{number}-{again}")
        assert forked(dying(lambda out=out: write_directory(out), "replace", number)) == 9
        forked(dying(lambda out=out: recover(out / "folder"), "unlink", again))
        recover(out / "folder")
        assert tree(out / "folder")["deep/new"] == tree(out / "folder")["a"] == b"new"
        assert not [*out.rglob(".ds-*")]


def test_what_the_living_make_is_left_to_them(tmp_path):
    with staging(tmp_path) as mine:
        (mine / NEW).write_text("half")
        write_file(before(tmp_path / "x"))
        with replacing(tmp_path / "file") as path:
            path.write_text("other")
        assert (mine / NEW).read_text() == "half"
    assert not [*tmp_path.glob(".ds-*")]


PLANTED = {
    "a link": lambda path, aim: path.symlink_to(aim),
    "a link to nothing": lambda path, aim: path.symlink_to("nowhere"),
    "a directory": lambda path, aim: path.mkdir(),
    "a pipe": lambda path, aim: os.mkfifo(path),
    "a device": lambda path, aim: os.mknod(path, stat.S_IFCHR | 0o666, os.makedev(1, 3)),
}


@pytest.mark.parametrize("kind", PLANTED)
@pytest.mark.parametrize(
    "write",
    [
        lambda path: locked(path.parent).__enter__(),
        lambda path: open_own(path, os.O_WRONLY | os.O_CREAT),
        lambda path: replacing(path).__enter__() and check_plain(path),
        check_plain,
    ],
    ids=["lock", "open", "replace", "check"],
)
def test_what_is_planted_under_a_name_of_ours_is_refused(kind, write, tmp_path):
    aim = tmp_path / "thesis"
    aim.write_text("years")
    folder = tmp_path / "received"
    folder.mkdir()
    try:
        PLANTED[kind](folder / ".lock", aim)
    except PermissionError:
        pytest.skip("devices are made by root alone")
    there = tree(tmp_path)
    with pytest.raises(ValueError, match=r"\.lock: is .* where we keep a file; remove it"):
        write(folder / ".lock")
    assert tree(tmp_path) == there


def test_a_lock_that_is_another_name_of_a_file_leaves_its_content(tmp_path):
    (tmp_path / "thesis").write_text("years")
    os.link(tmp_path / "thesis", tmp_path / ".lock")
    with locked(tmp_path):
        assert (tmp_path / "thesis").read_text() == "years"


def plant(commit: Path, name: str, aim: Path) -> None:
    commit.mkdir()
    (commit / LOCK).touch()
    if name == "new below a link":
        (commit.parent / "deep").symlink_to(aim)
        (commit / NEW / "deep").mkdir(parents=True)
        (commit / NEW / "deep" / "thesis").write_text("none")
    elif name == "gone below a link":
        (commit.parent / "deep").symlink_to(aim)
        (commit / "gone" / "deep").mkdir(parents=True)
        (commit / "gone" / "deep" / "thesis").touch()
    elif name == "new is a link":
        (commit / NEW).symlink_to(aim)
    elif name == "something else":
        (commit / "thesis").write_text("years")
    else:
        (commit / LOCK).unlink()
        (commit / LOCK).symlink_to(aim / "thesis")


@pytest.mark.parametrize(
    "name",
    ["new below a link", "gone below a link", "new is a link", "something else", "lock is a link"],
)
def test_what_looks_like_ours_reaches_nothing_outside(name, tmp_path):
    aim, received = tmp_path / "aim", tmp_path / "received"
    aim.mkdir()
    (aim / "thesis").write_text("years")
    received.mkdir()
    plant(received / COMMIT, name, aim)
    recover(received)
    assert tree(aim) == {"thesis": b"years"}
    assert name != "something else" or (received / COMMIT / "thesis").exists()


def test_of_two_that_write_one_new_thing_the_second_is_refused(tmp_path):
    for work, name in ((write_new_file, "another"), (write_new_directory, "other")):
        with pytest.raises(ValueError, match=f"{name}: another process has written it meanwhile"):
            _overtaken(work, tmp_path)


def _overtaken(work, out: Path) -> None:
    with pytest.MonkeyPatch.context() as patch:
        real = os.fsync

        def overtaken(descriptor):
            patch.setattr(os, "fsync", real)
            work(out)

        patch.setattr(os, "fsync", overtaken)
        work(out)


def test_of_two_that_fill_one_directory_at_once_each_is_whole(tmp_path):
    """They replace files of ours at the same time, again and again, beside a reader."""
    folder = tmp_path / "folder"
    folder.mkdir()
    for name in ("a", "b"):
        (folder / name).write_text("-1")

    def write(texts):
        for text in texts:
            with replacing_directory(folder, ("a", "b")) as new:
                (new / "a").write_text(str(text))
                (new / "b").write_text(str(text))

    children = [os.fork() or _end(write, range(n, 40, 2)) for n in (0, 1)]
    while any(os.waitpid(child, os.WNOHANG)[0] == 0 for child in children[:1]):
        recover(folder)
    assert os.waitstatus_to_exitcode(os.waitpid(children[1], 0)[1]) == 0
    assert (folder / "a").read_text() == (folder / "b").read_text()
    assert {f.name for f in folder.iterdir()} == {"a", "b"}


def _end(work, *args):
    try:
        work(*args)
    except BaseException:
        os._exit(1)
    os._exit(0)


def test_a_full_disk_is_an_oserror_and_leaves_the_old_file(tmp_path):
    import resource
    import signal

    out = before(tmp_path / "x")
    there = tree(out)

    def fill():
        signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
        resource.setrlimit(resource.RLIMIT_FSIZE, (10, 10))
        with pytest.raises(OSError), replacing(out / "file") as path:
            path.write_text("x" * 100)

    assert forked(fill) == 0
    assert tree(out) == there


def test_a_file_system_without_locks_or_hard_links_is_written_to(tmp_path, monkeypatch):
    def refuse(*_):
        raise OSError(95, "Operation not supported")

    monkeypatch.setattr(fcntl, "flock", refuse)
    monkeypatch.setattr(os, "link", refuse)
    out = before(tmp_path / "x")
    for work in WORKS:
        work(out)
    with pytest.raises(ValueError, match="another: another process has written it meanwhile"):
        write_new_file(out)
    assert not [*out.rglob(".ds-*")]
    shutil.rmtree(out)


def test_what_a_library_keeps_to_itself_gets_the_permissions_of_the_umask(tmp_path):
    def closed(path: Path) -> None:
        os.close(os.open(path, os.O_WRONLY | os.O_CREAT, 0o600))

    before = os.umask(0o022)
    try:
        with replacing(tmp_path / "file") as path:
            closed(path)
        with replacing_directory(tmp_path / "folder") as path:
            closed(path / "file")
    finally:
        os.umask(before)
    for file in (tmp_path / "file", tmp_path / "folder" / "file"):
        assert stat.S_IMODE(file.stat().st_mode) == 0o644
