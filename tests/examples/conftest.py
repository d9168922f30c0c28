"""A student that is served, for plain requests and for a browser."""

import threading
from collections.abc import Iterator

import pytest
import torch

import ds
from tests.examples import load

serve = load("serve")


@pytest.fixture(scope="session")
def student() -> ds.Student:
    """A student of three classes, whose images are as random as its weights."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        config = ds.nets.UNetConfig(
            image_size=8, in_channels=1, channels=8, channel_mult=(1,), num_res_blocks=1,
            attention_resolutions=(), norm_groups=4, classes=3,
        )  # fmt: skip
        net = config.build().eval()
        for weight in net.parameters():
            torch.nn.init.normal_(weight, std=0.2)
    return ds.Student(net, ds.methods.DenoisingStudent(), provenance={"classes": ["a", "b", "c"]})


@pytest.fixture(scope="session")
def served(student) -> Iterator[str]:
    """The address of a server of that student."""
    with serve.StudentServer(student) as server:
        thread = threading.Thread(target=server.serve_forever, daemon=True)
        thread.start()
        yield "http://{}:{}".format(*server.server_address)
        server.shutdown()
        thread.join()
