"""Draw from a student in a browser: noise on a slider, the way between two noises, images a second.

The server is Python's own, and the page, serve.html, is one file. With the student of `make demo`:

    python examples/serve.py runs/demo/student

Then open http://127.0.0.1:8000. It starts in seconds and serves until Ctrl+C. A program asks as the
page does:

    curl -o four.png "http://127.0.0.1:8000/images.png?seed=3&to=8&share=0.5&count=4"
"""

import argparse
import io
import json
import math
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, fields
from functools import partial
from http import HTTPStatus
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Annotated, NamedTuple
from urllib.parse import parse_qsl, urlsplit

import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor

import ds
from ds.models.images import tile
from ds.system.config import Between, Natural, check

PAGE = Path(__file__).with_name("serve.html")
MOST = 64  # images in an answer


@dataclass(frozen=True)
class Asked:
    """What a request asks for: `count` images on the way from one noise to another."""

    seed: Annotated[int, Between(0, 999_999)] = 0  # of the noise where the way begins
    to: Annotated[int, Between(0, 999_999)] = 1  # of the noise where it ends
    share: Annotated[float, Between(0, 1)] = 0.0  # of the way that is gone
    count: Annotated[int, Between(1, MOST)] = 16
    label: Natural | None = None  # the class of all images; None: each has one of its own

    def __post_init__(self):
        check(self)

    @classmethod
    def of(cls, query: str) -> "Asked":
        """Read "seed=3&count=4". Raise ValueError, of one line, for anything that is not so."""
        known = {field.name: float if field.name == "share" else int for field in fields(cls)}
        values = {}
        for name, text in parse_qsl(query, keep_blank_values=True):
            if name not in known or name in values:
                raise ValueError(
                    f"{name!r:.40} is not one of {', '.join(known)}, each at most once"
                )
            try:
                values[name] = known[name](text)
            except ValueError:
                raise ValueError(f"{name} must be a number, not {text!r:.40}") from None
        return cls(**values)


class Drawn(NamedTuple):
    """A sheet of images as a PNG, and the seconds in which the student drew them."""

    png: bytes
    seconds: float


class Artist:
    """Draws for everybody, one request at a time, so that each has the whole machine."""

    def __init__(self, student: ds.Student):
        self.student = student
        self.sampler = ds.Sampler(student, batch_size=MOST)
        # One thread for all: each thread that calls PyTorch would start threads of its own.
        self.worker = ThreadPoolExecutor(max_workers=1)
        self.draw(Asked())  # what the first call sets up is no visitor's wait

    def about(self) -> dict:
        """Return what the page says of the student."""
        names = self.student.provenance.get("classes") or [*range(self.student.classes)]
        return {
            "shape": self.student.image_shape,
            "calls": self.student.nfe,
            "classes": [str(name) for name in names],
            "parameters": sum(p.numel() for p in self.student.net.parameters()),
            "method": type(self.student.method).__name__,
        }

    def draw(self, asked: Asked) -> Drawn:
        """Draw what is asked for. Raise ValueError for a class that the student does not have."""
        return self.worker.submit(self._draw, asked).result()

    def _draw(self, asked: Asked) -> Drawn:
        begin = time.perf_counter()
        images = self.sampler.draw(self._noise(asked), asked.label)
        seconds = time.perf_counter() - begin
        sheet = tile(images, columns=math.ceil(math.sqrt(asked.count)), gap=0)
        png = io.BytesIO()
        Image.fromarray(sheet.squeeze(-1).numpy()).save(png, "PNG")
        return Drawn(png.getvalue(), seconds)

    def _noise(self, asked: Asked) -> Tensor:
        """Return noise [count, *shape] on the great circle from each noise to its other.

        A straight line would leave the shell on which normal noise lies.
        """
        make = partial(ds.noise, indices=range(asked.count), shape=self.student.shape)
        a, b = make(asked.seed), make(asked.to)
        if asked.seed == asked.to:
            return a
        angle = F.cosine_similarity(a.flatten(1), b.flatten(1)).acos()
        angle = angle.view(-1, *[1] * (a.dim() - 1))
        there, back = (asked.share * angle).sin(), ((1 - asked.share) * angle).sin()
        return (back * a + there * b) / angle.sin()


class Handler(BaseHTTPRequestHandler):
    """Answers GET for three paths; nothing is read from disk, and nothing is kept."""

    protocol_version = "HTTP/1.1"  # a browser asks many times over one connection
    timeout = 30  # seconds that a connection may be silent
    server: "StudentServer"

    def do_GET(self):
        path, query = urlsplit(self.path)[2:4]
        try:
            if path == "/":
                self.answer(HTTPStatus.OK, "text/html; charset=utf-8", self.server.page)
            elif path == "/about.json":
                text = json.dumps(self.server.artist.about())
                self.answer(HTTPStatus.OK, "application/json", text.encode())
            elif path == "/images.png":
                png, seconds = self.server.artist.draw(Asked.of(query))
                took = {"Server-Timing": f"draw;dur={1000 * seconds:.3f}"}
                self.answer(HTTPStatus.OK, "image/png", png, **took)
            else:
                self.refuse(HTTPStatus.NOT_FOUND, "there are /, /about.json and /images.png")
        except ValueError as error:
            self.refuse(HTTPStatus.BAD_REQUEST, str(error))
        except RuntimeError as error:
            self.refuse(HTTPStatus.INTERNAL_SERVER_ERROR, str(error))

    def refuse(self, status: HTTPStatus, reason: str):
        self.answer(status, "text/plain; charset=utf-8", f"{' '.join(reason.split())}\n".encode())

    def answer(self, status: HTTPStatus, kind: str, content: bytes, **headers: str):
        self.send_response(status)
        more = {"Content-Type": kind, "Content-Length": str(len(content))}
        for name, value in (more | {"Cache-Control": "no-store"} | headers).items():
            self.send_header(name, value)
        self.end_headers()
        self.wfile.write(content)

    def log_message(self, *_):
        """Say nothing of each request: a slider makes hundreds."""


class StudentServer(ThreadingHTTPServer):
    """A server of one student; port 0 is any that is free."""

    def __init__(self, student: ds.Student, host: str = "127.0.0.1", port: int = 0):
        self.artist, self.page = Artist(student), PAGE.read_bytes()
        super().__init__((host, port), Handler)

    def handle_error(self, request, client_address):
        """Pass over visitors who leave before their answer."""
        if not isinstance(sys.exc_info()[1], ConnectionError):
            super().handle_error(request, client_address)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("student", help="a student's directory, or hf://owner/name")
    parser.add_argument("--host", default="127.0.0.1", help="0.0.0.0 lets other machines in")
    parser.add_argument("--port", type=int, default=8000)
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    options = parser.parse_args()
    try:
        student = ds.load_student(options.student, device=options.device)
        student.require_images("serve")
        server = StudentServer(student, options.host, options.port)
    except (ValueError, RuntimeError, OSError, OverflowError) as error:
        parser.exit(2, f"serve: {error}\n")
    print(f"serving {options.student} on http://{options.host}:{options.port}", flush=True)
    try:
        server.serve_forever()
    except KeyboardInterrupt:
        server.server_close()


if __name__ == "__main__":
    main()
