"""Layers divided among ranks: heads and inner widths (tensor parallelism), and experts (expert parallelism).

`backends/torch/sharing.py` has the forward pass of it.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

from torch import nn

from backends.torch.model import Decoder
from backends.torch.modules import MLP, Block, Experts, MoE

if TYPE_CHECKING:
    from torch.distributed.device_mesh import DeviceMesh


def blocks(decoder: Decoder) -> Iterator[Block]:
    """The layers that this rank's stage has."""
    for block in decoder.layers:
        if isinstance(block, Block):
            yield block


def tensor_parallel(decoder: Decoder, mesh: DeviceMesh) -> None:
    """Divide heads and inner widths among the ranks of a mesh of one dimension, which must divide them."""
    from torch.distributed.tensor import Shard
    from torch.distributed.tensor.parallel import ColwiseParallel, ParallelStyle, RowwiseParallel, parallelize_module

    from backends.torch.sharing import Share

    decoder.share = Share(mesh)
    for block in blocks(decoder):
        readers: list[Any] = [block.attn.q, block.attn.k, block.attn.v]
        writers: list[nn.Module] = [block.attn.o]
        for mlp in block.mlp.modules():
            if isinstance(mlp, MLP):  # the shared expert of a mixture too
                readers += [mlp.gate, mlp.up] if hasattr(mlp, "gate") else [mlp.up]
                writers.append(mlp.down)
        styles: list[tuple[nn.Module, ParallelStyle]] = [(w, ColwiseParallel()) for w in readers]
        styles += [(w, RowwiseParallel(output_layouts=Shard(1))) for w in writers]
        for linear, style in styles:
            parallelize_module(linear, mesh, style, src_data_rank=None)  # nothing is there yet to send
        for linear in readers:
            linear.gathers = True


def expert_parallel(decoder: Decoder, mesh: DeviceMesh) -> None:
    """Divide the experts of every mixture among the ranks of a mesh of one dimension, whose size must divide them."""
    from torch.distributed.tensor import Shard, distribute_tensor

    from backends.torch.sharing import Exchange

    for block in blocks(decoder):
        if not isinstance(block.mlp, MoE):
            continue
        experts = block.mlp.experts
        assert isinstance(experts, Experts)
        experts.exchange = Exchange(mesh.get_group())
        for linear in experts.children():
            for name, p in list(linear.named_parameters(recurse=False)):
                part = distribute_tensor(p.detach(), mesh, [Shard(0)], src_data_rank=None)
                linear.register_parameter(name, nn.Parameter(part, requires_grad=p.requires_grad))
