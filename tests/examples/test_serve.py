"""examples/serve.py: what it answers, and what it refuses in one line."""

import http.client
import io
import json
import socket
import struct
import sys
import urllib.parse

import numpy as np
import pytest
import torch
from PIL import Image

import ds
from ds.models.interpolate import great_circle
from tests.examples.conftest import serve


def ask(served: str, path: str, method: str = "GET") -> tuple[http.client.HTTPResponse, bytes]:
    """Send a path as it stands: urllib would tidy it."""
    connection = http.client.HTTPConnection(urllib.parse.urlsplit(served).netloc, timeout=60)
    connection.request(method, path)
    answer = connection.getresponse()
    content = answer.read()
    connection.close()
    return answer, content


def sheet(served: str, query: str) -> np.ndarray:
    answer, content = ask(served, f"/images.png?{query}")
    assert answer.status == 200, content
    assert answer.getheader("Content-Type") == "image/png"
    return np.asarray(Image.open(io.BytesIO(content)))


def test_images_are_those_of_the_sampler(served, student):
    images = ds.Sampler(student)(7, range(3), 2)[..., 0].numpy()
    shown = sheet(served, "seed=7&count=3&label=2")
    assert shown.shape == (16, 16)
    for i, (top, left) in enumerate([(0, 0), (0, 8), (8, 0)]):
        assert np.abs(shown[top : top + 8, left : left + 8].astype(int) - images[i]).max() <= 1


def test_the_same_request_draws_the_same_and_another_noise_something_else(served):
    first = sheet(served, "seed=5&count=4")
    assert np.array_equal(first, sheet(served, "seed=5&count=4"))
    assert not np.array_equal(first, sheet(served, "seed=6&count=4"))
    assert not np.array_equal(first, sheet(served, "seed=5&count=4&label=0"))


def test_the_way_begins_at_one_noise_and_ends_at_the_other(served):
    whole = sheet(served, "seed=5&to=9&share=1&count=4&label=1").astype(int)
    assert np.abs(whole - sheet(served, "seed=9&count=4&label=1")).max() <= 1
    same = sheet(served, "seed=5&to=5&share=0.5&count=4&label=1")
    assert np.array_equal(same, sheet(served, "seed=5&count=4&label=1"))


def test_the_middle_of_the_way_is_on_the_great_circle(student):
    middle = serve.Artist(student)._noise(serve.Asked(seed=5, to=9, share=0.5, count=3))
    ends = [ds.noise(seed, range(3), student.shape) for seed in (5, 9)]
    for i, z in enumerate(middle):
        path = great_circle(torch.stack([end[i] for end in ends]), between=1)
        assert torch.allclose(z, path[1], atol=1e-5)


def test_the_time_on_the_server_is_told(served):
    answer, _ = ask(served, "/images.png?count=1")
    name, _, milliseconds = answer.getheader("Server-Timing").partition(";dur=")
    assert name == "draw" and float(milliseconds) > 0


def test_the_page_is_the_file_beside_the_program_and_asks_nobody_else(served):
    answer, page = ask(served, "/")
    assert answer.status == 200 and page == serve.PAGE.read_bytes()
    assert b"http://" not in page and b"https://" not in page


def test_the_student_is_told_of(served):
    about = json.loads(ask(served, "/about.json")[1])
    assert about["classes"] == ["a", "b", "c"] and about["shape"] == [1, 8, 8]
    assert about["calls"] == 1 and about["method"] == "DenoisingStudent"


@pytest.mark.parametrize(
    ("query", "said"),
    [
        ("seed=x", "seed must be a number, not 'x'"),
        ("seed=-1", "seed must be at least 0, not -1"),
        ("seed=1000000", "seed must be at most 999999, not 1000000"),
        ("seed=1.5", "seed must be a number"),
        ("seed=" + "9" * 5000, "seed must be a number"),
        ("seed=1&seed=2", "'seed' is not one of"),
        ("seed", "seed must be a number, not ''"),
        ("share=nan", "share must be at least 0, not nan"),
        ("share=1.01", "share must be at most 1, not 1.01"),
        ("count=0", "count must be at least 1, not 0"),
        ("count=65", "count must be at most 64, not 65"),
        ("label=3", "label 3 does not exist"),
        ("file=/etc/passwd", "'file' is not one of seed, to, share, count, label"),
    ],
)
def test_a_request_that_is_wrong_is_one_line(served, query, said):
    answer, content = ask(served, f"/images.png?{query}")
    assert answer.status == 400
    (line,) = content.decode().splitlines()
    assert said in line and len(line) < 200


@pytest.mark.parametrize("path", ["/serve.py", "/serve.html", "/../serve.py", "//etc/passwd", "/a"])
def test_no_other_path_exists(served, path):
    answer, content = ask(served, path)
    assert answer.status == 404 and content == b"there are /, /about.json and /images.png\n"


def test_nothing_can_be_sent(served):
    assert ask(served, "/images.png", "POST")[0].status == 501


def test_a_visitor_who_leaves_is_passed_over(served, capfd):
    place = urllib.parse.urlsplit(served)
    for _ in range(3):
        with socket.create_connection((place.hostname, place.port)) as visitor:
            # what is closed so is reset, and its answer has nowhere to go
            visitor.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
            visitor.sendall(b"GET /images.png?count=64 HTTP/1.1\r\n\r\n" * 2)
    assert ask(served, "/images.png?count=64")[0].status == 200
    assert "Traceback" not in capfd.readouterr().err


def test_only_this_machine_is_let_in_unless_it_is_asked_for(served):
    assert served.startswith("http://127.0.0.1:")


def test_what_cannot_be_served_is_one_line(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["serve.py", str(tmp_path / "none")])
    with pytest.raises(SystemExit) as end:
        serve.main()
    said = capsys.readouterr().err
    assert end.value.code == 2 and said.startswith("serve: ") and said.count("\n") == 1
