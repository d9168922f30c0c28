"""The additions and the concatenation that a norm takes in: cat(x + shift + residual, skip)."""

from typing import NamedTuple

import torch
from torch import Tensor

from ds.ops.dispatch.takes import wide
from ds.ops.dispatch.transforms import like
from ds.ops.group_norm_silu.layout import dense, in_format_of, resized


class Addends(NamedTuple):
    """What is added to x [N, C, ...] and concatenated with it, in the order of the ops' schemas."""

    shift: Tensor | None = None  # [N, C]
    residual: Tensor | None = None  # as x
    skip: Tensor | None = None  # [N, S, ...]

    def merge(self, x: Tensor) -> Tensor:
        """Return cat(x + shift + residual, skip), dense; x itself if it is that already.

        The sum is taken in the dtype of computation and rounded once. A single PyTorch addition of
        one dtype does so by itself.
        """
        x = dense(x)
        shift = self.shift
        columns = None if shift is None else shift.view(*shift.shape, *[1] * (x.dim() - 2))
        terms = [term for term in (columns, self.residual) if term is not None]
        if terms:
            rounds_once = len(terms) == 1 and terms[0].dtype == x.dtype
            total = x if rounds_once else x.to(wide(x.dtype))
            for term in terms:
                total = total + term
            x = like(total, x)
        if self.skip is not None:
            x = in_format_of(x, torch.cat([x, self.skip], 1))
        return x

    def merged_before(self, x: Tensor, grad_merged: Tensor | None) -> Tensor:
        """Return what forward normalized: x itself if forward returned it, so has its gradient."""
        return self.merge(x) if grad_merged is None else dense(x)

    def split_gradient(
        self, d_norm: Tensor, merged: Tensor, split: int, grad_merged: Tensor | None
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Return the gradients of x, shift and skip, in the memory format of the merged tensor.

        d_norm is the gradient of the merged tensor through the norm, grad_merged the one that came
        back for it directly. Channels before `split` are those of x. A gradient of what was not
        given is empty.
        """
        if grad_merged is not None:
            d_norm = d_norm + grad_merged
        d_shift = merged.new_empty(0)
        if self.shift is not None:
            sums = d_norm[:, :split, None].flatten(2).sum(2, dtype=wide(merged.dtype))
            d_shift = sums.to(self.shift.dtype)
        if split == merged.shape[1]:
            return like(d_norm, merged), d_shift, merged.new_empty(0)
        d_x, d_skip = (
            like(part, resized(merged, part.shape[1]))
            for part in (d_norm[:, :split], d_norm[:, split:])
        )
        return d_x, d_shift, d_skip
