"""Run under torchrun by test_train.py: three steps of a toy model whose gradient differs from rank to rank."""

import argparse
import os
import sys
from pathlib import Path

import torch
import torch.distributed as dist
from torch import Tensor, nn

from unifiedar.train.loop import Loop, add_arguments


class Toy(nn.Module):
    """Nine numbers in two parameters, of which one has no gradient on rank 1."""

    def __init__(self) -> None:
        super().__init__()
        self.matrix = nn.Parameter(torch.arange(6.0).view(2, 3))
        self.vector = nn.Parameter(torch.ones(3))

    def save(self, folder: Path) -> None:
        torch.save(self.state_dict(), folder.with_suffix(".pt"))


def train(out: str, slopes: list[float]) -> Toy:
    """Train on this rank with its own slope; returns the model."""
    parser = argparse.ArgumentParser()
    add_arguments(parser, steps=3, batch=2, lr=0.1)
    args = parser.parse_args(["--data", "none", "--out", out, "--device", "cpu", "--warmup", "1"])
    loop = Loop(args, Toy)

    def losses(step: int, part: int) -> dict[str, Tensor]:
        slope = slopes[loop.rank]
        loss = (loop.model.matrix * slope).sum() * (step + 1)
        return {"loss": loss if loop.rank else loss + loop.model.vector.square().sum()}

    loop.finish(loop.train(losses, lambda model: ({}, {"figure": 1.0})))
    return loop.model


if __name__ == "__main__":
    rank = int(os.environ["RANK"])
    model = train(sys.argv[1], [1.0, 3.0])
    assert not dist.is_initialized()
    torch.save(model.state_dict(), f"{sys.argv[1]}/rank{rank}.pt")
