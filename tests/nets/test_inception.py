import os
from collections import Counter

import pytest
import torch
import torch.nn.functional as F

from ds.nets.inception import Inception

# The convolutions of the public file pt_inception-2015-12-05-6726825d.pth and their shapes, as in
# the conversion script and the network of torch-fidelity 0.4.0; each has the four vectors of a
# batch normalization beside it.
LAYERS = """
Conv2d_1a_3x3 32x3x3x3, Conv2d_2a_3x3 32x32x3x3, Conv2d_2b_3x3 64x32x3x3,
Conv2d_3b_1x1 80x64x1x1, Conv2d_4a_3x3 192x80x3x3,
Mixed_5b.branch1x1 64x192x1x1, Mixed_5b.branch5x5_1 48x192x1x1, Mixed_5b.branch5x5_2 64x48x5x5,
Mixed_5b.branch3x3dbl_1 64x192x1x1, Mixed_5b.branch3x3dbl_2 96x64x3x3,
Mixed_5b.branch3x3dbl_3 96x96x3x3, Mixed_5b.branch_pool 32x192x1x1, Mixed_5c.branch1x1 64x256x1x1,
Mixed_5c.branch5x5_1 48x256x1x1, Mixed_5c.branch5x5_2 64x48x5x5,
Mixed_5c.branch3x3dbl_1 64x256x1x1, Mixed_5c.branch3x3dbl_2 96x64x3x3,
Mixed_5c.branch3x3dbl_3 96x96x3x3, Mixed_5c.branch_pool 64x256x1x1, Mixed_5d.branch1x1 64x288x1x1,
Mixed_5d.branch5x5_1 48x288x1x1, Mixed_5d.branch5x5_2 64x48x5x5,
Mixed_5d.branch3x3dbl_1 64x288x1x1, Mixed_5d.branch3x3dbl_2 96x64x3x3,
Mixed_5d.branch3x3dbl_3 96x96x3x3, Mixed_5d.branch_pool 64x288x1x1, Mixed_6a.branch3x3 384x288x3x3,
Mixed_6a.branch3x3dbl_1 64x288x1x1, Mixed_6a.branch3x3dbl_2 96x64x3x3,
Mixed_6a.branch3x3dbl_3 96x96x3x3, Mixed_6b.branch1x1 192x768x1x1,
Mixed_6b.branch7x7_1 128x768x1x1, Mixed_6b.branch7x7_2 128x128x1x7,
Mixed_6b.branch7x7_3 192x128x7x1, Mixed_6b.branch7x7dbl_1 128x768x1x1,
Mixed_6b.branch7x7dbl_2 128x128x7x1, Mixed_6b.branch7x7dbl_3 128x128x1x7,
Mixed_6b.branch7x7dbl_4 128x128x7x1, Mixed_6b.branch7x7dbl_5 192x128x1x7,
Mixed_6b.branch_pool 192x768x1x1, Mixed_6c.branch1x1 192x768x1x1, Mixed_6c.branch7x7_1 160x768x1x1,
Mixed_6c.branch7x7_2 160x160x1x7, Mixed_6c.branch7x7_3 192x160x7x1,
Mixed_6c.branch7x7dbl_1 160x768x1x1, Mixed_6c.branch7x7dbl_2 160x160x7x1,
Mixed_6c.branch7x7dbl_3 160x160x1x7, Mixed_6c.branch7x7dbl_4 160x160x7x1,
Mixed_6c.branch7x7dbl_5 192x160x1x7, Mixed_6c.branch_pool 192x768x1x1,
Mixed_6d.branch1x1 192x768x1x1, Mixed_6d.branch7x7_1 160x768x1x1, Mixed_6d.branch7x7_2 160x160x1x7,
Mixed_6d.branch7x7_3 192x160x7x1, Mixed_6d.branch7x7dbl_1 160x768x1x1,
Mixed_6d.branch7x7dbl_2 160x160x7x1, Mixed_6d.branch7x7dbl_3 160x160x1x7,
Mixed_6d.branch7x7dbl_4 160x160x7x1, Mixed_6d.branch7x7dbl_5 192x160x1x7,
Mixed_6d.branch_pool 192x768x1x1, Mixed_6e.branch1x1 192x768x1x1, Mixed_6e.branch7x7_1 192x768x1x1,
Mixed_6e.branch7x7_2 192x192x1x7, Mixed_6e.branch7x7_3 192x192x7x1,
Mixed_6e.branch7x7dbl_1 192x768x1x1, Mixed_6e.branch7x7dbl_2 192x192x7x1,
Mixed_6e.branch7x7dbl_3 192x192x1x7, Mixed_6e.branch7x7dbl_4 192x192x7x1,
Mixed_6e.branch7x7dbl_5 192x192x1x7, Mixed_6e.branch_pool 192x768x1x1,
Mixed_7a.branch3x3_1 192x768x1x1, Mixed_7a.branch3x3_2 320x192x3x3,
Mixed_7a.branch7x7x3_1 192x768x1x1, Mixed_7a.branch7x7x3_2 192x192x1x7,
Mixed_7a.branch7x7x3_3 192x192x7x1, Mixed_7a.branch7x7x3_4 192x192x3x3,
Mixed_7b.branch1x1 320x1280x1x1, Mixed_7b.branch3x3_1 384x1280x1x1,
Mixed_7b.branch3x3_2a 384x384x1x3, Mixed_7b.branch3x3_2b 384x384x3x1,
Mixed_7b.branch3x3dbl_1 448x1280x1x1, Mixed_7b.branch3x3dbl_2 384x448x3x3,
Mixed_7b.branch3x3dbl_3a 384x384x1x3, Mixed_7b.branch3x3dbl_3b 384x384x3x1,
Mixed_7b.branch_pool 192x1280x1x1, Mixed_7c.branch1x1 320x2048x1x1,
Mixed_7c.branch3x3_1 384x2048x1x1, Mixed_7c.branch3x3_2a 384x384x1x3,
Mixed_7c.branch3x3_2b 384x384x3x1, Mixed_7c.branch3x3dbl_1 448x2048x1x1,
Mixed_7c.branch3x3dbl_2 384x448x3x3, Mixed_7c.branch3x3dbl_3a 384x384x1x3,
Mixed_7c.branch3x3dbl_3b 384x384x3x1, Mixed_7c.branch_pool 192x2048x1x1
"""
VECTORS = ("bn.weight", "bn.bias", "bn.running_mean", "bn.running_var")


def public_shapes():
    shapes = {"fc.weight": (1008, 2048), "fc.bias": (1008,)}
    for entry in LAYERS.replace("\n", " ").split(","):
        name, size = entry.split()
        shape = tuple(map(int, size.split("x")))
        shapes[f"{name}.conv.weight"] = shape
        shapes |= {f"{name}.{vector}": shape[:1] for vector in VECTORS}
    return shapes


@pytest.fixture(scope="module")
def weights():
    generator = torch.Generator().manual_seed(0)
    state = {}
    for key, shape in public_shapes().items():
        noise = torch.randn(shape, generator=generator)
        if len(shape) == 4:  # keeps the scale of the signal through 48 layers
            state[key] = noise * (2 / noise[0].numel()) ** 0.5
        elif key.endswith("running_var"):
            state[key] = (0.2 * noise).exp()
        else:
            state[key] = 0.1 * noise + key.endswith("bn.weight")
    return state


@pytest.fixture(scope="module")
def path(weights, tmp_path_factory):
    path = tmp_path_factory.mktemp("inception") / "weights.pth"
    torch.save(weights, path)
    return path


@pytest.fixture(scope="module")
def net(path):
    return Inception.load(path)


def some_images(*shape):
    generator = torch.Generator().manual_seed(1)
    return torch.randint(256, shape, generator=generator, dtype=torch.uint8)


def resized(images, size=299):
    """Sample at i * length / size, one output pixel at a time."""

    def at(i, length):
        position = i * length / size
        low = int(position)
        return low, min(low + 1, length - 1), position - low

    def along(x, dim):
        samples = [at(i, x.shape[dim]) for i in range(size)]
        return torch.stack(
            [x.select(dim, a) * (1 - w) + x.select(dim, b) * w for a, b, w in samples], dim
        )

    return along(along(images.double(), 1), 2).permute(0, 3, 1, 2)


class Reference:
    """The network written out call by call over the weights of the file, in float64."""

    def __init__(self, weights):
        self.weights = {key: value.double() for key, value in weights.items()}

    def conv(self, x, name, stride=1, pad=(0, 0)):
        x = F.conv2d(x, self.weights[f"{name}.conv.weight"], stride=stride, padding=pad)
        gain, bias, mean, var = (
            self.weights[f"{name}.{vector}"].reshape(-1, 1, 1) for vector in VECTORS
        )
        return ((x - mean) / (var + 0.001).sqrt() * gain + bias).clamp(min=0)

    def average(self, x):
        """Average over the 3 x 3 neighbours inside the image."""
        ones = torch.ones_like(x[:, :1])
        inside = F.avg_pool2d(ones, 3, 1, 1)
        return F.avg_pool2d(x, 3, 1, 1) / inside

    def maximum(self, x):
        neighbours = F.unfold(F.pad(x, (1, 1, 1, 1), value=-1e9), 3).unflatten(1, (-1, 9))
        return neighbours.amax(2).reshape(x.shape)

    def __call__(self, images):
        x = (resized(images) - 128) / 128
        x = self.conv(x, "Conv2d_1a_3x3", 2)
        x = self.conv(x, "Conv2d_2a_3x3")
        x = self.conv(x, "Conv2d_2b_3x3", 1, (1, 1))
        x = F.max_pool2d(x, 3, 2)
        x = self.conv(x, "Conv2d_3b_1x1")
        x = self.conv(x, "Conv2d_4a_3x3")
        x = F.max_pool2d(x, 3, 2)
        for name in ("Mixed_5b", "Mixed_5c", "Mixed_5d"):
            x = self.block_a(x, name)
        x = self.block_b(x, "Mixed_6a")
        for name in ("Mixed_6b", "Mixed_6c", "Mixed_6d", "Mixed_6e"):
            x = self.block_c(x, name)
        x = self.block_d(x, "Mixed_7a")
        x = self.block_e(x, "Mixed_7b", self.average)
        x = self.block_e(x, "Mixed_7c", self.maximum)
        return x.flatten(2).mean(2)

    def block_a(self, x, name):
        one = self.conv(x, f"{name}.branch1x1")
        five = self.conv(x, f"{name}.branch5x5_1")
        five = self.conv(five, f"{name}.branch5x5_2", 1, (2, 2))
        three = self.conv(x, f"{name}.branch3x3dbl_1")
        three = self.conv(three, f"{name}.branch3x3dbl_2", 1, (1, 1))
        three = self.conv(three, f"{name}.branch3x3dbl_3", 1, (1, 1))
        pool = self.conv(self.average(x), f"{name}.branch_pool")
        return torch.cat([one, five, three, pool], 1)

    def block_b(self, x, name):
        three = self.conv(x, f"{name}.branch3x3", 2)
        double = self.conv(x, f"{name}.branch3x3dbl_1")
        double = self.conv(double, f"{name}.branch3x3dbl_2", 1, (1, 1))
        double = self.conv(double, f"{name}.branch3x3dbl_3", 2)
        return torch.cat([three, double, F.max_pool2d(x, 3, 2)], 1)

    def block_c(self, x, name):
        one = self.conv(x, f"{name}.branch1x1")
        seven = self.conv(x, f"{name}.branch7x7_1")
        seven = self.conv(seven, f"{name}.branch7x7_2", 1, (0, 3))
        seven = self.conv(seven, f"{name}.branch7x7_3", 1, (3, 0))
        double = self.conv(x, f"{name}.branch7x7dbl_1")
        double = self.conv(double, f"{name}.branch7x7dbl_2", 1, (3, 0))
        double = self.conv(double, f"{name}.branch7x7dbl_3", 1, (0, 3))
        double = self.conv(double, f"{name}.branch7x7dbl_4", 1, (3, 0))
        double = self.conv(double, f"{name}.branch7x7dbl_5", 1, (0, 3))
        pool = self.conv(self.average(x), f"{name}.branch_pool")
        return torch.cat([one, seven, double, pool], 1)

    def block_d(self, x, name):
        three = self.conv(x, f"{name}.branch3x3_1")
        three = self.conv(three, f"{name}.branch3x3_2", 2)
        seven = self.conv(x, f"{name}.branch7x7x3_1")
        seven = self.conv(seven, f"{name}.branch7x7x3_2", 1, (0, 3))
        seven = self.conv(seven, f"{name}.branch7x7x3_3", 1, (3, 0))
        seven = self.conv(seven, f"{name}.branch7x7x3_4", 2)
        return torch.cat([three, seven, F.max_pool2d(x, 3, 2)], 1)

    def block_e(self, x, name, pooled):
        one = self.conv(x, f"{name}.branch1x1")
        three = self.conv(x, f"{name}.branch3x3_1")
        three_wide = self.conv(three, f"{name}.branch3x3_2a", 1, (0, 1))
        three_tall = self.conv(three, f"{name}.branch3x3_2b", 1, (1, 0))
        double = self.conv(x, f"{name}.branch3x3dbl_1")
        double = self.conv(double, f"{name}.branch3x3dbl_2", 1, (1, 1))
        double_wide = self.conv(double, f"{name}.branch3x3dbl_3a", 1, (0, 1))
        double_tall = self.conv(double, f"{name}.branch3x3dbl_3b", 1, (1, 0))
        pool = self.conv(pooled(x), f"{name}.branch_pool")
        return torch.cat([one, three_wide, three_tall, double_wide, double_tall, pool], 1)


def test_keys_and_shapes_are_those_of_the_public_file():
    ours = {key: tuple(value.shape) for key, value in Inception().state_dict().items()}
    assert ours == public_shapes()


def test_counts_are_those_of_the_public_file():
    net = Inception()
    assert Counter(key.split(".")[-1] for key in net.state_dict())["running_mean"] == 94
    assert sum(parameter.numel() for parameter in net.parameters()) == 23_850_960
    assert not any(parameter.requires_grad for parameter in net.parameters())


@pytest.mark.parametrize("shape", [(2, 32, 32, 3), (1, 300, 211, 3)])
def test_features_agree_with_the_network_written_out(net, weights, shape):
    images = some_images(*shape)
    features = net(images)
    expected = Reference(weights)(images)
    assert features.dtype == torch.float32
    assert features.shape == (shape[0], 2048)
    error = (features - expected).norm() / expected.norm()
    assert error < 1e-5  # rounding of float32; any wrong pooling or padding is beyond 1e-3


def test_training_mode_changes_nothing(net):
    images = some_images(1, 8, 8, 3)
    expected = net(images)
    try:
        assert torch.equal(net.train()(images), expected)
    finally:
        net.eval()


@pytest.mark.parametrize(
    "images",
    [
        torch.zeros(1, 32, 32, 3),
        torch.zeros(1, 3, 32, 32, dtype=torch.uint8),
        torch.zeros(32, 32, 3, dtype=torch.uint8),
    ],
)
def test_other_images_are_refused(net, images):
    with pytest.raises(ValueError, match=r"must be uint8 \[N, H, W, 3\], not torch\."):
        net(images)


def test_load_takes_old_files_and_step_counters(net, weights, tmp_path):
    extra = {"Mixed_6a.branch3x3.bn.num_batches_tracked": torch.tensor(7)}
    path = tmp_path / "old.pth"
    torch.save(weights | extra, path, _use_new_zipfile_serialization=False)
    state = Inception.load(path).state_dict()
    assert all(torch.equal(state[key], value) for key, value in net.state_dict().items())


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (
            {"Mixed_6e.branch7x7_2.conv.weight": torch.zeros(192, 192, 7, 1)},
            r"Mixed_6e.branch7x7_2.conv.weight is \[192, 192, 7, 1\] in the file, and must be "
            r"\[192, 192, 1, 7\]",
        ),
        ({"fc.bias": 3}, r"fc.bias is a int in the file, and must be \[1008\]"),
        (
            {"AuxLogits.fc.bias": torch.zeros(1000)},
            r"AuxLogits.fc.bias is \[1000\] in the file, and must be absent",
        ),
    ],
)
def test_load_names_the_first_wrong_key(weights, tmp_path, change, message):
    torch.save(weights | change, tmp_path / "wrong.pth")
    with pytest.raises(ValueError, match=message):
        Inception.load(tmp_path / "wrong.pth")


def test_load_names_the_first_missing_key(weights, tmp_path):
    torch.save({k: v for k, v in weights.items() if "5c" not in k}, tmp_path / "wrong.pth")
    with pytest.raises(
        ValueError, match=r"Mixed_5c.branch1x1.conv.weight is absent .* \[64, 256, 1, 1\]"
    ):
        Inception.load(tmp_path / "wrong.pth")


@pytest.mark.parametrize(
    "content", [b"", b"not weights\n", b"hello world" * 9, b"PK\x03\x04" + bytes(99)]
)
def test_load_refuses_what_is_no_checkpoint(tmp_path, content):
    (tmp_path / "wrong.pth").write_bytes(content)
    with pytest.raises(ValueError, match=r"wrong\.pth: not a whole PyTorch file of plain tensors"):
        Inception.load(tmp_path / "wrong.pth")


def test_load_refuses_half_a_checkpoint(path, tmp_path):
    (tmp_path / "half.pth").write_bytes(path.read_bytes()[:1_000_000])
    with pytest.raises(ValueError, match=r"half\.pth: not a whole PyTorch file of plain tensors"):
        Inception.load(tmp_path / "half.pth")


def test_load_refuses_other_contents(tmp_path):
    torch.save([torch.zeros(3)], tmp_path / "list.pth")
    with pytest.raises(ValueError, match="holds a list, not named weights"):
        Inception.load(tmp_path / "list.pth")


class Bomb:
    def __init__(self, target):
        self.target = target

    def __reduce__(self):
        return os.mkdir, (self.target,)


@pytest.mark.parametrize("zipped", [True, False])
def test_load_runs_nothing_from_the_file(tmp_path, zipped):
    target, path = tmp_path / "proof", tmp_path / "bomb.pth"
    torch.save({"fc.bias": Bomb(str(target))}, path, _use_new_zipfile_serialization=zipped)
    with pytest.raises(ValueError, match=r"bomb\.pth: not a whole PyTorch file of plain tensors"):
        Inception.load(path)
    assert not target.exists()
