"""Sequence parallelism (Ulysses, Jacobs et al. 2023, arXiv 2309.14509): one sample on several processes.

Each process computes all layers for its own share of the video tokens. Only attention needs all tokens.
Before attention, an all-to-all exchange gives each process some of the heads for all tokens. After attention,
a second exchange gives each process all heads for its own tokens. Text tokens in the same sequence are few,
so each process computes all of them.

Every exchange is differentiable, and its backward pass is the exact transpose. All processes of a group
compute the same loss from the whole prediction. Gradients averaged over the group therefore equal those that
a single process would compute for the whole sequence.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from copy import copy
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn


class SequenceParallel:
    """Distribution of the tokens of each sample over processes, and communication between them.

    Each process has a share of the tokens. The number of attention heads must be divisible by the number of
    processes. The number of tokens does not have to be divisible: some shares may have one more token per
    clip than the others.

    Args:
        group: processes that share each sample.
        clips: number of clips in the sequence, which have equal lengths. A share contains the same token
            positions of each clip. With two clips, the second half of a share belongs to the second clip.
    """

    def __init__(self, group: dist.ProcessGroup | None, clips: int = 1) -> None:
        self.group: Any = group
        self.clips = clips
        self.size, self.rank = (1, 0) if group is None else (dist.get_world_size(group), dist.get_rank(group))
        self._shares: list[int] = []

    def of_clips(self, clips: int) -> SequenceParallel:
        """Return a copy for sequences that consist of `clips` clips, such as color and alpha."""
        found = copy(self)
        found.clips = clips
        return found

    @property
    def tokens(self) -> int:
        """Number of video tokens in the sequence that was split last, over all clips and processes."""
        return self.clips * sum(self._shares)

    def split(self, x: Tensor, dim: int) -> Tensor:
        """Return this process's share of the tokens of `x`; the tokens are dimension `dim`.

        The share is a copy, so that the memory of `x` can be freed.
        """
        whole = x.unflatten(dim, (self.clips, -1))
        dim = dim % x.ndim + 1
        each, more = divmod(whole.shape[dim], self.size)
        self._shares = [each + (rank < more) for rank in range(self.size)]
        share = whole.split(self._shares, dim)[self.rank]
        return share.flatten(dim - 1, dim).clone()

    def gather(self, x: Tensor, dim: int) -> Tensor:
        """Return the whole sequence, joined from the shares of all processes.

        Args:
            x: this process's share.
            dim: dimension of the tokens.
        """
        share = x.unflatten(dim, (self.clips, -1)).movedim(dim + 1, 0)
        assert len(share) == self._shares[self.rank], "a share of another sequence"
        copies = share.reshape(1, -1).expand(self.size, -1)
        rest = math.prod(share.shape[1:])
        whole = self._exchange(copies, [share.numel()] * self.size, [n * rest for n in self._shares])
        return whole.view(-1, *share.shape[1:]).movedim(0, dim + 1).flatten(dim, dim + 1)

    def attention(
        self,
        compute: Callable[[Tensor, Tensor, Tensor], Tensor],
        query: Tensor,
        key: Tensor,
        value: Tensor,
        *,
        text: int = 0,
        first: bool = False,
    ) -> Tensor:
        """Compute attention over the whole sequence, for the tokens of this process.

        Args:
            compute: function that computes attention for some of the heads. Its arguments (query, key and
                value of all tokens) and its result have shape (n, heads / size, all tokens, d).
            query: (n, heads, tokens, d), with the video tokens of this process and all text tokens.
            key: same shape as `query`.
            value: same shape as `query`.
            text: number of text tokens.
            first: True if text tokens precede the video tokens, False if they follow.

        Returns:
            (n, heads, tokens, d).
        """
        out = compute(*self._to_heads(torch.stack([query, key, value]), text, first))
        return self._to_tokens(out, text, first)

    def _to_heads(self, x: Tensor, text: int, first: bool) -> Tensor:
        """Exchange all heads of this process's tokens for some heads of all tokens.

        Args:
            x: query, key and value, (3, n, heads, tokens of this process, d).
            text: number of text tokens.
            first: True if the text tokens precede the video tokens, False if they follow.

        Returns:
            (3, n, heads / size, all tokens, d).
        """
        video, words = _apart(x, text, first)
        video = video.unflatten(3, (self.clips, -1)).unflatten(2, (self.size, -1))
        sent = video.permute(2, 5, 0, 1, 3, 4, 6)  # (size, own tokens of a clip, 3, n, heads, clips, d)
        assert sent.shape[1] == self._shares[self.rank], "a share of another sequence"
        rest = math.prod(sent.shape[2:])
        own, received = sent.shape[1] * rest, [n * rest for n in self._shares]
        got = self._exchange(sent, [own] * self.size, received)
        video = got.view(-1, *sent.shape[2:]).permute(1, 2, 3, 4, 0, 5).flatten(3, 4)
        return _together(video, words.chunk(self.size, 2)[self.rank], first)

    def _to_tokens(self, x: Tensor, text: int, first: bool) -> Tensor:
        """Convert attention output from some heads of all tokens to all heads of some tokens.

        Args:
            x: output for this process's heads, (n, heads / number of processes, all tokens, d).
            text: number of text tokens.
            first: True if the text precedes the video.

        Returns:
            Output for this process's video tokens and for all text tokens, (n, heads, tokens, d).
        """
        video, words = _apart(x, text, first)
        each = video.unflatten(2, (self.clips, -1)).permute(3, 2, 0, 1, 4).split(self._shares)
        after = words.permute(2, 0, 1, 3).flatten()
        sent = torch.cat([part for share in each for part in (share.flatten(), after)])
        own, rest = self._shares[self.rank] * self.clips, math.prod(x.shape) // x.shape[2]
        sizes = [(n * self.clips + text) * rest for n in self._shares]
        got = self._exchange(sent, sizes, [(own + text) * rest] * self.size)
        got = got.view(self.size, own + text, x.shape[0], x.shape[1], x.shape[3])
        heads = got.permute(2, 0, 3, 1, 4).flatten(1, 2)
        video, words = heads.split([own, text], 2)
        video = video.unflatten(2, (-1, self.clips)).transpose(2, 3).flatten(2, 3)
        return _together(video, words, first)

    def _exchange(self, x: Tensor, sent: Sequence[int], received: Sequence[int]) -> Tensor:
        """Send one part of `x` to each process, and return the received parts in one flat tensor.

        Args:
            x: tensor of any shape; its elements are sent in order.
            sent: number of elements for each process.
            received: number of elements from each process.
        """
        from torch.distributed._functional_collectives import all_to_all_single_autograd, wait_tensor

        flat = x.reshape(-1).contiguous()
        return wait_tensor(all_to_all_single_autograd(flat, list(received), list(sent), self.group))

    def split_output(self, module: nn.Module, dim: int) -> None:
        """Add a forward hook, so that a module returns only this process's share of its output.

        The output is a tensor or a tuple of tensors; `dim` is the dimension of the tokens.
        """

        def hook(_: nn.Module, args: Any, out: Any) -> Any:
            return tuple(self.split(x, dim) for x in out) if isinstance(out, tuple) else self.split(out, dim)

        module.register_forward_hook(hook)

    def gather_output(self, module: nn.Module, dim: int) -> None:
        """Add a forward hook, so that a module returns the output of all processes, joined along `dim`."""

        def hook(_: nn.Module, args: Any, out: Tensor) -> Tensor:
            return self.gather(out, dim)

        module.register_forward_hook(hook)


class SimulatedSequence(SequenceParallel):
    """Simulation of one process of sequence parallelism, for memory estimates on the meta device.

    The process has the largest share of the sequence. It exchanges nothing with other processes, so the
    values of tensors are undefined.
    """

    def __init__(self, size: int) -> None:
        super().__init__(None)
        self.size = size

    def _exchange(self, x: Tensor, sent: Sequence[int], received: Sequence[int]) -> Tensor:
        return _Received.apply(x.reshape(-1).contiguous(), sum(received))


class _Received(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, size: int) -> Tensor:
        ctx.sent = len(x)
        return x.new_empty(size)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None]:
        return grads[0].new_empty(ctx.sent), None


def _apart(x: Tensor, text: int, first: bool) -> tuple[Tensor, Tensor]:
    """Split a sequence (..., tokens, d) into video tokens and text tokens.

    `text` is the number of text tokens; `first` is true if they precede the video tokens.
    """
    video = x.shape[-2] - text
    parts = x.split([text, video] if first else [video, text], -2)
    return (parts[1], parts[0]) if first else (parts[0], parts[1])


def _together(video: Tensor, words: Tensor, first: bool) -> Tensor:
    """Concatenate video tokens and text tokens (..., tokens, d) into one sequence.

    If `first`, the text tokens come first.
    """
    if not words.shape[-2]:
        return video
    return torch.cat([words, video] if first else [video, words], -2)
