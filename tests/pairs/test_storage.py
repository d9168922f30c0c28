"""Stores in buckets: the same bytes as in a directory, without locks and renames.

The buckets are fsspec's in memory and, where moto and s3fs are installed, S3 as moto's server
speaks it on this machine:

    pip install s3fs 'moto[server]' && python -m pytest tests/pairs/test_storage.py
"""

import itertools
import sys
import time
from concurrent.futures import ThreadPoolExecutor

import fsspec
import pytest
import torch

import ds
from ds.cli.__main__ import main
from ds.models.images import to_uint8
from ds.pairs import generate as pairs
from ds.pairs import shards
from ds.pairs import storage as places
from ds.pairs.store import info, is_finished
from ds.system.files import redacted
from tests.pairs.test_store import GAUSSIAN, all_images, contents, make

NUMBERS = itertools.count()
SHARD = "images-00001.npy"


@pytest.fixture(scope="module")
def s3():
    """An S3 server with a bucket, and the variables by which clients find it."""
    server = pytest.importorskip("moto.server", reason="needs s3fs and moto[server]")
    pytest.importorskip("s3fs", reason="needs s3fs and moto[server]")
    running = server.ThreadedMotoServer(port=0)
    running.start()
    host, port = running.get_host_and_port()
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("AWS_ENDPOINT_URL", f"http://{host}:{port}")
        patch.setenv("AWS_ACCESS_KEY_ID", "any")
        patch.setenv("AWS_SECRET_ACCESS_KEY", "any")
        patch.setenv("AWS_DEFAULT_REGION", "us-east-1")
        fsspec.filesystem("s3").mkdir("bucket")
        yield "s3://bucket"
    running.stop()


@pytest.fixture(params=["memory", "s3"])
def url(request, tmp_path, monkeypatch) -> str:
    """A folder that nothing is in yet."""
    monkeypatch.setenv("DS_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(places.Bucket, "pause", 0.05)
    root = "memory://bucket" if request.param == "memory" else request.getfixturevalue("s3")
    return f"{root}/{next(NUMBERS)}"


def objects(url: str) -> dict[str, bytes]:
    bucket = places.place(url)
    return {name: bucket.read(name) for name in bucket.names()}


def test_a_bucket_holds_what_a_directory_would(url, tmp_path):
    store, local = make(url), make(tmp_path / "s")
    assert objects(url) == contents(tmp_path / "s")
    assert store.path == url and store.sha256 == local.sha256
    assert torch.equal(all_images(store), all_images(local))
    store.verify(GAUSSIAN)
    assert info(url) == info(tmp_path / "s")


def test_a_store_in_a_bucket_is_resumed_and_grows(url, tmp_path):
    make(url)
    bucket, before = places.place(url), objects(url)
    kept = bucket._do("modified", "images-00000.npy")
    bucket.remove(SHARD)
    with pytest.raises(ValueError, match=f"{url}: 1 of 3 shards are missing"):
        ds.PairStore(url)
    make(url)
    assert objects(url) == before
    make(url, count=60)
    make(tmp_path / "s")
    make(tmp_path / "s", count=60)
    assert objects(url) == contents(tmp_path / "s")
    assert bucket._do("modified", "images-00000.npy") == kept
    with pytest.raises(ValueError, match=f"{url}: holds a store made otherwise"):
        make(url, seed=4)


def test_writers_of_one_bucket_make_what_one_makes_and_no_shard_twice(url, tmp_path, monkeypatch):
    made, real = [], pairs._make

    def counted(manifest, sampler, shard, shown):
        made.append(shard)
        return real(manifest, sampler, shard, shown)

    monkeypatch.setattr(pairs, "_make", counted)
    with ThreadPoolExecutor(4) as pool:
        for future in [pool.submit(make, url, count=160) for _ in range(4)]:
            future.result()
    assert sorted(made) == [*range(10)]
    make(tmp_path / "s", count=160)
    assert objects(url) == contents(tmp_path / "s")


def test_a_claim_is_left_to_its_process_while_it_is_renewed(url, monkeypatch):
    stale = 1.5 if url.startswith("s3") else 0.2  # S3 tells whole seconds
    monkeypatch.setattr(places, "RENEW", 0.05)
    monkeypatch.setattr(places, "STALE", stale)
    bucket = places.place(url)
    with bucket.claim(SHARD) as mine:
        time.sleep(2 * stale)
        with bucket.claim(SHARD) as theirs:
            assert mine is not None and theirs is None
        assert mine(b"content")
    with bucket.claim(SHARD) as late:
        assert late is None
    assert objects(url) == {SHARD: b"content"}


def test_what_the_dead_have_claimed_is_taken_over_and_cleared_away(url, tmp_path, monkeypatch):
    make(url)
    bucket = places.place(url)
    bucket.remove(SHARD)
    bucket.write(places.claim_of(SHARD), b"")
    bucket.write(places.claim_of("images-00000.npy"), b"")  # it died after it had written
    monkeypatch.setattr(places, "STALE", -1)
    make(url)
    make(tmp_path / "s")
    assert objects(url) == contents(tmp_path / "s")


def test_of_two_that_make_a_shard_the_first_has_written_it(url, monkeypatch):
    """As when a process sleeps, is taken for dead, and wakes up; the machines round otherwise."""
    real, bucket = pairs._make, places.place(url)

    def overtaken(manifest, sampler, shard, shown):
        images = real(manifest, sampler, shard, shown)
        if shard == 1:
            monkeypatch.setattr(pairs, "_make", real)
            bucket.remove(places.claim_of(SHARD))
            with bucket.claim(SHARD) as put:
                shards.write(bucket, 1, put, images ^ 1)
        return images

    monkeypatch.setattr(pairs, "_make", overtaken)
    store = make(url)
    store.verify()
    expected = to_uint8(GAUSSIAN.sample(store.noise(range(16, 32))))
    assert torch.equal(store.images(range(16, 32)), expected ^ 1)


def test_what_was_read_before_is_not_fetched_again(url, monkeypatch):
    make(url)
    monkeypatch.setattr(places.Bucket, "_fetch", None)
    assert len(ds.PairStore(url)) == 40


def test_a_changed_object_is_named(url, tmp_path, monkeypatch):
    store, bucket = make(url), places.place(url)
    content = bytearray(bucket.read(SHARD))
    content[-1] ^= 1
    bucket.write(SHARD, bytes(content))
    with pytest.raises(ValueError, match=f"{url}/{SHARD}: wrong checksum"):
        store.verify()
    monkeypatch.setenv("DS_CACHE", str(tmp_path / "empty"))
    with pytest.raises(ValueError, match=f"{url}/{SHARD}: wrong checksum"):
        ds.PairStore(url)


def test_a_damaged_copy_on_this_machine_is_fetched_again(url, tmp_path):
    """Whoever comes upon it: a store that is opened, one that reads, one that is verified."""
    digest = make(url).manifest.sha256[1]
    (kept,) = (tmp_path / "cache").glob(f"{digest}.npy")
    whole = kept.read_bytes()
    for content in (b"", whole[:-1], whole[:-1] + b"?"):
        for use in (all_images, ds.PairStore.verify):
            kept.write_bytes(content)
            use(ds.PairStore(url))
            assert kept.read_bytes() == whole


def test_without_a_home_the_cache_is_where_it_was_said(url, monkeypatch):
    def no_home():
        raise RuntimeError("Could not determine home directory.")

    monkeypatch.setattr("pathlib.Path.home", no_home)
    assert len(make(url)) == 40
    monkeypatch.delenv("DS_CACHE")
    with pytest.raises(ValueError, match="there is no home directory; set DS_CACHE"):
        ds.PairStore(url)


SECRETS = {
    "s3://user:pa55@host/x": "s3://***@host/x",
    "s3://us:er:pa@55@host/x": "s3://***@host/x",
    "https://host/x?token=pa55&key=pa55": "https://host/x?***",
    "https://pa55@host/x?pa55": "https://***@host/x?***",
    "simplecache::s3://user:pa55@host/x": "simplecache::s3://***@host/x",
    '{"out": "ftp://a:pa55@b/c", "x": 1}': '{"out": "ftp://***@b/c", "x": 1}',
    "no (s3://a:pa55@b/c?d=pa55) here": "no (s3://***@b/c?***) here",
    "s3://bucket/a@b/c": "s3://bucket/a@b/c",
    "is it? user@host": "is it? user@host",
}


@pytest.mark.parametrize("text", SECRETS)
def test_passwords_and_tokens_of_urls_are_not_shown(text):
    assert redacted(text) == SECRETS[text]


@pytest.mark.parametrize(
    "args",
    [
        ["pairs", "info"],
        ["pairs", "verify"],
        ["pairs", "digits", "--dry-run", "--out"],
        ["distill", "digits", "--dry-run", "--store"],
        ["pairs", "digits", "--unknown"],
    ],
    ids=" ".join,
)
@pytest.mark.parametrize("scheme", ["nowhere", "memory"])
def test_no_verb_says_them(capsys, caplog, args, scheme):
    main([*args, f"{scheme}://user:pa55@host/x?token=pa55"])
    said = capsys.readouterr()
    assert "pa55" not in said.out + said.err + caplog.text
    assert f"{scheme}://***@host/x?***" in said.out + said.err


@pytest.mark.parametrize("call", ["cat_file", "ls"])
@pytest.mark.parametrize("error", [OSError, PermissionError, TypeError])
def test_no_error_says_them(monkeypatch, call, error):
    url = "memory://user:pa55@host/x?token=pa55"

    def fail(self, path, *_, **__):
        raise error(f"cannot get {url}")

    monkeypatch.setattr(f"fsspec.implementations.memory.MemoryFileSystem.{call}", fail)
    with pytest.raises(OSError) as said:
        is_finished(url) if call == "ls" else ds.PairStore(url)
    assert "pa55" not in str(said.value) and "memory://***@host/x" in str(said.value)


def test_an_empty_folder_is_no_store(url):
    with pytest.raises(ValueError, match=f"{url}: not a pair store"):
        ds.PairStore(url)


@pytest.mark.parametrize("error", [TypeError, PermissionError])
def test_a_bucket_that_cannot_be_reached_is_one_line(monkeypatch, error):
    def fail(*_, **__):
        raise error("no credentials")

    monkeypatch.setattr("fsspec.implementations.memory.MemoryFileSystem.cat_file", fail)
    with pytest.raises(OSError, match=r"^memory://bucket/x: no credentials$"):
        ds.PairStore("memory://bucket/x")


@pytest.mark.parametrize(
    ("url", "said"),
    [
        ("s3://b/x", r"s3://b/x: Install s3fs .*; pip install 'denoising-student\[remote\]'"),
        ("nowhere://b/x", "nowhere://b/x: Protocol not known: nowhere"),
    ],
)
def test_a_missing_package_is_one_line(url, said, monkeypatch):
    monkeypatch.setitem(sys.modules, "s3fs", None)
    monkeypatch.delitem(sys.modules["fsspec.registry"]._registry, "s3", raising=False)
    with pytest.raises(ValueError, match=said):
        places.place(url)
