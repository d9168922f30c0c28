"""What every network's configuration offers, so that a directory of weights can be read back."""

import re
from abc import ABC, abstractmethod
from collections.abc import Mapping
from os import PathLike
from pathlib import Path
from typing import Any, TypeVar

from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from ds.system.arrays import load_tensors

N = TypeVar("N", bound=nn.Module)
NO_CLASS = -1  # the label of a sample that has no class
CONTEXT = "context"  # the one condition that is no number: an image like the one that is denoised


class AbstractNetConfig(ABC):
    """A frozen dataclass that rebuilds its network; the network keeps it as `config`.

    `conditions` are the names of the numbers, beside the time, that its forward takes for each
    sample: net(x [N, *shape], t [N], h=[N]). "context" among them is no number but of the shape of
    a sample, [N, *shape], and seen beside x. One with `classes` takes `label`, int64 [N], too.
    """

    conditions: tuple[str, ...] = ()
    classes: int = 0  # labels are 0 to classes - 1, or NO_CLASS; 0: none are taken

    @abstractmethod
    def build(self) -> nn.Module:
        """Make the network with freshly drawn weights."""

    @property
    def shape(self) -> tuple[int, ...]:
        """The shape of one sample; () where a configuration does not say, and takes no context."""
        return ()

    @property
    def numbers(self) -> tuple[str, ...]:
        """The names of the conditions that are numbers: all but the context."""
        return tuple(name for name in self.conditions if name != CONTEXT)

    @property
    def inputs(self) -> int:
        """The channels of x, with those of the context where there is one."""
        return self.shape[0] * (1 + (CONTEXT in self.conditions))

    @property
    def takes(self) -> tuple[str, ...]:
        """The names of everything that forward takes beside x and t."""
        return (*self.conditions, *["label"] * (self.classes > 0))

    @property
    def may_take(self) -> dict[str, tuple[int, ...]]:
        """The names of what forward may be told besides, with the shape of each for a sample."""
        return {}

    @property
    def shapes(self) -> dict[str, tuple[int, ...]]:
        """The shape, for a sample, of all that forward takes or may be told: () of a number."""
        image = {CONTEXT: self.shape} if CONTEXT in self.conditions else {}
        return dict.fromkeys(self.takes, ()) | image | self.may_take


class Undrawn(TorchFunctionMode):
    """A context in which a network is built without its weights being drawn, for others to come.

    A parameter then holds what its memory held. Drawing takes longer than reading a file.
    """

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if func in _DRAWS:
            drawn = args[0] if args else kwargs["tensor"]
            if isinstance(drawn, nn.Parameter):
                return drawn
        return func(*args, **kwargs)


# What fills a tensor with random numbers when a network is built.
_DRAWS = {
    Tensor.normal_,
    Tensor.uniform_,
    nn.init.kaiming_uniform_,
    nn.init.normal_,
    nn.init.uniform_,
}


def told(net: nn.Module) -> tuple[tuple[str, ...], int]:
    """Return what a network takes beside x and t, and its number of classes.

    Its own attributes `takes` and `classes` say so, else those of its configuration; a network
    with neither takes nothing.
    """

    def said(name: str, otherwise: Any) -> Any:
        return getattr(net, name, getattr(getattr(net, "config", None), name, otherwise))

    return said("takes", ()), said("classes", 0)


def filled(net: N, path: str | PathLike, refusal: str, beside: str) -> N:
    """Return a network with the weights of a file, all of them under the names that they have here.

    Nothing in the file is run. Entries whose whole name matches the pattern `beside` are not read.
    Raises ValueError for a file that is not a plain dict of tensors, and for a weight that is
    missing, unknown or of another shape; `refusal` begins the sentence, {} in it being the file.
    """
    state = load_tensors(Path(path))
    if not isinstance(state, Mapping):
        said = f"it holds a {type(state).__name__}, not named weights"
        raise ValueError(f"{refusal.format(path)}: {said}")
    state = {k: v for k, v in state.items() if not re.fullmatch(beside, str(k))}
    expected = net.state_dict()
    for key in [*expected, *state]:
        needed, found = _shape(expected.get(key)), _shape(state.get(key))
        if needed != found:
            said = f"{key} is {found} in the file, and must be {needed}"
            raise ValueError(f"{refusal.format(path)}: {said}")
    net.load_state_dict(state)
    return net


def _shape(value: Any) -> str:
    """Return the shape of a state dict's entry as text, or what the entry is instead."""
    if value is None:
        return "absent"
    return str(list(value.shape)) if isinstance(value, Tensor) else f"a {type(value).__name__}"
