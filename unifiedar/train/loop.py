"""What both stages share: options, ranks, the step loop, averaged weights, checkpoints that resume exactly."""

import argparse
import json
import math
import os
import sys
import time
import warnings
from collections.abc import Callable, Collection, Hashable, Iterable
from functools import partial
from pathlib import Path
from typing import Any, Generic, TypeVar, cast

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor, distribute_tensor
from tqdm import tqdm

from unifiedar.devices import DeviceError, add_device_argument, usable_device
from unifiedar.nn import Codebook
from unifiedar.train.batches import Pictures, step_seed
from unifiedar.train.captured import Recorder

__all__ = ["Loop", "add_arguments", "cosine", "fail", "lin0", "load_pictures", "sheet"]

M = TypeVar("M", bound=nn.Module)
# Step, steps of warm-up and steps of the run to a factor on the peak learning rate.
Schedule = Callable[[int, int, int], float]
# The model to modules, or groups of modules, whose parameters are gathered and let go together.
Groups = Callable[[Any], Iterable[nn.Module | list[nn.Module]]]
# The averaged model to sheets (PIL images) and figures, by name.
Validate = Callable[[M], tuple[dict[str, Any], dict[str, float]]]


def fail(message: str) -> SystemExit:
    """One-line error, exit code 1."""
    return SystemExit(f"unifiedar train: {message}")


def cosine(step: int, warmup: int, steps: int) -> float:
    """Linear warm-up, then a cosine down to a hundredth."""
    if step < warmup:
        return (step + 1) / warmup
    return 0.01 + 0.99 * 0.5 * (1 + math.cos(math.pi * (step - warmup) / max(1, steps - warmup)))


def lin0(step: int, warmup: int, steps: int, end: float = 0.1) -> float:
    """VAR's schedule: linear warm-up from 0.005, flat for a twentieth of the rest, then linear down to `end`."""
    if step < warmup:
        return 0.005 + 0.995 * step / warmup
    passed = (step - warmup) / max(1, steps - 1 - warmup)
    return 1.0 if passed < 0.05 else end + (1 - end) * (1 - passed) / 0.95


def add_arguments(
    parser: argparse.ArgumentParser, *, steps: int, batch: int, lr: float, warmup: int | None = 200, rate: str = ""
) -> None:
    """Options that every stage has.

    Args:
        parser: gets them.
        steps, batch, lr, warmup: defaults; a warm-up of None is a fiftieth of the steps, for the caller to work out.
        rate: what the learning rate is, if not the peak itself.
    """
    warms = "a fiftieth of the steps" if warmup is None else str(warmup)
    parser.add_argument("--data", type=Path, required=True, help="folder made by `unifiedar data emoji`")
    parser.add_argument("--styles", nargs="+", help="train on these styles only (default: all in the folder)")
    parser.add_argument("--out", type=Path, required=True, help="folder for checkpoints, sheets, scalars and the model")
    parser.add_argument("--steps", type=int, default=steps, help="optimizer steps (default: %(default)s)")
    parser.add_argument("--batch", type=int, default=batch, help="pictures per step and rank (default: %(default)s)")
    parser.add_argument("--accumulate", type=int, default=1, help="split a batch into this many parts (default: 1)")
    parser.add_argument("--lr", type=float, default=lr, help=f"peak learning rate{rate} (default: {lr})")
    parser.add_argument("--weight-decay", type=float, default=0.05, help="of matrices (default: %(default)s)")
    parser.add_argument("--warmup", type=int, default=warmup, help=f"steps of linear warm-up (default: {warms})")
    parser.add_argument("--ema", type=float, default=0.999, help="decay of the averaged weights (default: %(default)s)")
    parser.add_argument("--precision", choices=("bf16", "fp32"), default="bf16", help="of matmuls (default: bf16)")
    parser.add_argument("--compile", action="store_true", help="torch.compile the heavy parts")
    parser.add_argument("--graph", action="store_true", help="forward and backward as one CUDA graph (one GPU)")
    parser.add_argument("--deterministic", action="store_true", help="deterministic GPU algorithms (slower)")
    parser.add_argument("--seed", type=int, default=0, help="of everything drawn (default: 0)")
    add_device_argument(parser)
    parser.add_argument("--resume", action="store_true", help="go on from the last checkpoint in --out")
    parser.add_argument("--save-every", type=int, default=1000, help="steps between checkpoints")
    parser.add_argument("--sheet-every", type=int, default=1000, help="steps between validations")
    parser.add_argument("--minutes", type=float, help="after this long stop with a checkpoint, exit code 3")


def load_pictures(args: argparse.Namespace, device: torch.device, size: int) -> tuple[Pictures, Pictures]:
    """Training and held-out pictures that `--data` and `--styles` name, `size` pixels wide."""
    try:
        return Pictures.load(args.data, args.styles, device, size)
    except (ValueError, OSError) as error:
        raise fail(f"--data: {error}") from error


def sheet(images: Iterable[Tensor], columns: int) -> Any:
    """PIL image of pictures (3, S, S) uint8 side by side."""
    from unifiedar.images import contact_sheet

    return contact_sheet(torch.stack(list(images)).cpu(), columns)


def _local(value: Tensor) -> Tensor:
    """This rank's share of a tensor, or the tensor if it is not shared out."""
    return value.to_local() if isinstance(value, DTensor) else value


def _whole(value: Any) -> Any:
    """Gathers tensors that the ranks have shares of, alone or in dicts, on the CPU of rank 0; None for the others.

    All ranks must ask for the same ones, in one order. What is no such tensor stays as it is.
    """
    if isinstance(value, DTensor):
        whole = cast(Any, value.detach()).full_tensor()
        return None if dist.get_rank() else whole.cpu()
    if isinstance(value, dict):
        return {key: _whole(one) for key, one in value.items()}
    return value


def _share(whole: Tensor, like: Tensor) -> Tensor:
    """This rank's share of a tensor that every rank has, as `like` is shared out."""
    if not isinstance(like, DTensor):
        return whole
    # Without a rank to send it, everyone cuts it out of his own.
    whole = whole.detach().to(like.device)
    return distribute_tensor(whole, like.device_mesh, like.placements, src_data_rank=None)


class Loop(Generic[M]):
    """One training run on this rank.

    `train` calls `losses(step, part)` for every part of a step, adds up their "loss", steps AdamW with the learning
    rate of a schedule, keeps an exponential moving average of the weights, and writes checkpoints. All randomness of a
    step is reseeded from (seed, step, rank), so that a run resumed after a kill is the run that was not killed.

    Each rank has a whole model, or with `--shard`, for stages that give `groups`, its share of the parameters, of their
    average and of AdamW's moments (FSDP2, a successor of Zhao et al., arXiv:2304.11277): gathered group by group when a
    forward or backward comes to them. Checkpoints are whole in either case, so that a run may go on in the other way,
    or on another number of ranks.

    Args:
        args: with the options of `add_arguments`.
        make_model: builds the model, twice the same (the second is the averaged one); only parameters that require a
            gradient are trained. It has a method `save(folder)`.
        schedule: of the learning rate.
        clip: largest norm of the gradient.
        undecayed: parts of the names of matrices that weight decay leaves alone, as it does all vectors.
        groups: the parts of the model that `--shard` gathers one after the other; what they leave over is gathered
            for all of a step. The losses must call these parts, and the model, as functions, not their methods. A stage
            that gives it has the option.
        decay: step to the weight decay of matrices; None: `--weight-decay` throughout.

    Attributes:
        phase: for `--graph`, step to a key: steps of one key compute the same of other data and noise, a step of key
            None is like no other. A stage whose steps are not all alike sets it.
    """

    def __init__(
        self,
        args: argparse.Namespace,
        make_model: Callable[[], M],
        *,
        schedule: Schedule = cosine,
        clip: float = 1.0,
        undecayed: Collection[str] = (),
        groups: Groups | None = None,
        decay: Callable[[int], float] | None = None,
    ):
        for name in ("steps", "batch", "accumulate", "save_every", "sheet_every"):
            if getattr(args, name) < 1:
                raise fail(f"--{name.replace('_', '-')} must be at least 1, got {getattr(args, name)}")
        if args.batch % args.accumulate:
            raise fail(f"--accumulate must divide --batch {args.batch}, got {args.accumulate}")
        self.args, self.schedule, self.clip, self.decay = args, schedule, clip, decay
        self.rank, self.world = int(os.environ.get("RANK", 0)), int(os.environ.get("WORLD_SIZE", 1))
        try:
            self.device = torch.device(usable_device(args.device, int(os.environ.get("LOCAL_RANK", 0))))
        except DeviceError as error:
            raise fail(str(error)) from error
        if self.device.type == "cuda":
            torch.cuda.set_device(self.device)
        if self.world > 1 and not dist.is_initialized():
            dist.init_process_group("nccl" if self.device.type == "cuda" else "gloo")
        if args.deterministic:
            os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
            torch.use_deterministic_algorithms(True)
        torch.manual_seed(args.seed)
        self.sharded = groups is not None and args.shard
        if self.sharded and self.world == 1:
            raise fail(
                "--shard needs several ranks to share a model: torchrun --nproc-per-node N -m unifiedar train ..."
            )
        self.model, self.averaged = make_model(), make_model().requires_grad_(False)
        self.averaged.load_state_dict(self.model.state_dict())
        self.averaged.eval()
        if groups is not None and self.sharded:
            # Part by part from the host, where the averaged one stays until it is looked at: no GPU ever holds a whole.
            # Products of three dimensions are views; nothing is added to one in place, which is what it warns of.
            warnings.filterwarnings("ignore", "FSDP2-wrapped module .* returned a view tensor")
            mesh = init_device_mesh(self.device.type, (self.world,))
            for group in groups(self.model):
                fully_shard(group, mesh=mesh)
            fully_shard(self.model, mesh=mesh)
        else:
            # Channels last is how cuDNN computes: in the usual layout a fifth of the tower's step was transposing.
            for one in (self.model, self.averaged):
                one.to(self.device).to(memory_format=torch.channels_last)
        self.parameters = [p for p in self.model.parameters() if p.requires_grad]
        matrices: list[nn.Parameter] = []
        others: list[nn.Parameter] = []
        for name, parameter in self.model.named_parameters():
            if parameter.requires_grad:
                decays = parameter.ndim >= 2 and not any(part in name for part in undecayed)
                (matrices if decays else others).append(parameter)
        self.optimizer = torch.optim.AdamW(
            [{"params": matrices, "weight_decay": args.weight_decay}, {"params": others, "weight_decay": 0.0}],
            lr=args.lr,
            betas=(0.9, 0.95),
            fused=self.device.type == "cuda",
        )
        pairs = list(zip(self.averaged.parameters(), self.model.parameters(), strict=True))
        if self.sharded:  # a share of the average each, gathered into the averaged model by `_gather`
            pairs = [(p.detach().clone(), p) for _, p in pairs]  # type: ignore[misc]
            self.shares = [a for a, _ in pairs]
        self.moving = [(a, p) for a, p in pairs if p.requires_grad]
        # What a forward moves (codebooks and their statistics) is an average already and is copied; the rest is frozen.
        moved = {id(b.weight) for b in self.model.modules() if isinstance(b, Codebook)}
        self.copied: list[tuple[Tensor, Tensor]] = [(a, p) for a, p in pairs if id(p) in moved]
        self.copied += zip(self.averaged.buffers(), self.model.buffers(), strict=True)
        self.begin = 0
        self.generators = [torch.Generator(self.device) for _ in range(args.accumulate)]
        self.phase: Callable[[int], Hashable] = lambda step: 0
        self.recorder: Recorder | None = None
        if args.graph:
            if self.world > 1 or self.device.type != "cuda":
                where = "with several ranks" if self.world > 1 else "on the CPU"
                if self.rank == 0:
                    print(
                        f"unifiedar train: --graph: a step is no CUDA graph {where}; going on without", file=sys.stderr
                    )
            else:
                self.recorder = Recorder(self.parameters, self.generators)
        self.writer: Any = None
        if self.rank == 0:
            args.out.mkdir(parents=True, exist_ok=True)
        if args.resume:
            self._load()

    # ---- checkpoints

    @property
    def _path(self) -> Path:
        return self.args.out / "last.pt"

    def _gather(self) -> None:
        """Brings rank 0's averaged model up to date where ranks have shares of it; all of them must come here."""
        if not self.sharded:
            return
        with torch.no_grad():
            for parameter, share in zip(self.averaged.parameters(), self.shares, strict=True):
                gathered = _whole(share)
                if gathered is not None:
                    parameter.copy_(gathered)
            for mine, theirs in zip(self.averaged.buffers(), self.model.buffers(), strict=True):
                mine.copy_(theirs)

    def _save(self, step: int) -> None:
        if self.rank and not self.sharded:
            return
        self._gather()
        state = {
            "step": step,
            "model": _whole(self.model.state_dict()),
            "averaged": self.averaged.state_dict(),
            "optimizer": _whole(self.optimizer.state_dict()),
        }
        if self.rank:
            return
        partial = self._path.with_suffix(".partial")
        torch.save(state, partial)
        os.replace(partial, self._path)

    def _load(self) -> None:
        if not self._path.is_file():
            raise fail(f"--resume: no checkpoint {self._path}")
        # Of a whole model that every rank takes a share of, the file's pages in memory serve all ranks of a host.
        where = torch.device("cpu") if self.sharded else self.device
        state = torch.load(self._path, map_location=where, weights_only=True, mmap=self.sharded)
        self.averaged.load_state_dict(state["averaged"])
        if self.sharded:
            own = self.model.state_dict()
            state["model"] = {name: _share(value, own[name]) for name, value in state["model"].items()}
            order = [p for group in self.optimizer.param_groups for p in group["params"]]
            for i, moments in state["optimizer"]["state"].items():
                for name, value in moments.items():
                    moments[name] = _share(value, order[i]) if value.ndim else value
            for share, whole in zip(self.shares, self.averaged.parameters(), strict=True):
                share.copy_(_share(whole, share))
        self.model.load_state_dict(state["model"])
        self.optimizer.load_state_dict(state["optimizer"])
        self.begin = state["step"]

    # ---- steps

    def autocast(self) -> torch.autocast:
        """Context of a forward in the precision asked for."""
        return torch.autocast(self.device.type, torch.bfloat16, enabled=self.args.precision == "bf16")

    def compiled(self, function: Callable) -> Callable:
        """The function, compiled if that was asked for."""
        return torch.compile(function) if self.args.compile else function

    def generator(self, step: int, part: int) -> torch.Generator:
        """What a part of a step draws from: it begins anew each time, and in a capture where it stands."""
        found = self.generators[part]
        if self.device.type != "cuda" or not torch.cuda.is_current_stream_capturing():
            found.manual_seed(step_seed(self.args.seed, step * self.args.accumulate + part, self.rank))
        return found

    def _rate(self, step: int) -> float:
        return self.args.lr * self.schedule(step, self.args.warmup, self.args.steps)

    def _average_gradients(self) -> None:
        """Mean over the ranks in one flat all-reduce: so few parameters take less time than many buckets' launches."""
        gradients = [torch.zeros_like(p) if p.grad is None else p.grad for p in self.parameters]
        # In the order of memory, which is the parameter's: convolutions are channels last, and AdamW wants one layout.
        flat = torch.cat([g.as_strided((g.numel(),), (1,)) for g in gradients])
        dist.all_reduce(flat)
        flat /= self.world
        parts = flat.split([g.numel() for g in gradients])
        for parameter, part in zip(self.parameters, parts, strict=True):
            parameter.grad = part.as_strided(parameter.shape, parameter.stride())

    def _gradients(self, losses: Callable[[int, int], dict[str, Tensor]], step: int) -> dict[str, Tensor]:
        """Clipped gradients in place of those there are; returns what was lost, and their norm."""
        self.model.train()
        self.optimizer.zero_grad(set_to_none=True)
        seen: dict[str, Tensor] = {}
        for part in range(self.args.accumulate):
            values = losses(step, part)
            (values["loss"] / self.args.accumulate).backward()
            for name, value in values.items():
                seen[name] = seen.get(name, 0) + value.detach() / self.args.accumulate
        if self.world > 1 and not self.sharded:  # FSDP does it in the backward
            self._average_gradients()
        norm = nn.utils.clip_grad_norm_(self.parameters, self.clip)
        return {**seen, "gradient_norm": norm.full_tensor() if isinstance(norm, DTensor) else norm}

    @torch.no_grad()
    def _average_weights(self, step: int) -> None:
        decay = min(self.args.ema, (step + 1) / (step + 10))
        averages, weights = ([_local(one) for one in side] for side in zip(*self.moving, strict=True))
        torch._foreach_lerp_(averages, weights, 1 - decay)
        for mine, theirs in () if self.sharded else self.copied:
            mine.copy_(theirs)

    def train(
        self,
        losses: Callable[[int, int], dict[str, Tensor]],
        validate: Validate[M],
    ) -> bool:
        """Run to the last step.

        Args:
            losses: (step, part) to scalars, of which "loss" is minimised.
            validate: the averaged model to PIL images and figures by name, written to `--out` and TensorBoard.

        Returns:
            True if the run is complete, False if `--minutes` ended it early.
        """
        args, started = self.args, time.monotonic()
        self.reported = (self.begin, started)
        if self.rank == 0:
            self.writer = self._tensorboard()
        bar = tqdm(
            total=args.steps, initial=self.begin, unit="step", disable=bool(self.rank), file=sys.stderr, mininterval=2
        )
        complete = True
        for step in range(self.begin, args.steps):
            torch.manual_seed(step_seed(args.seed, step, self.rank))
            for group in self.optimizer.param_groups:
                group["lr"] = self._rate(step)
            if self.decay is not None:
                self.optimizer.param_groups[0]["weight_decay"] = self.decay(step)
            gradients = partial(self._gradients, losses, step)
            if self.recorder is None:
                seen = gradients()
            else:
                for part in range(args.accumulate):  # a replay does not ask for them
                    self.generator(step, part)
                seen = self.recorder.run(self.phase(step), gradients)
            self.optimizer.step()
            self._average_weights(step)
            done = step + 1
            bar.update()
            if done % 50 == 0 or done == args.steps:
                self._report(done, seen, bar)
            over = args.minutes is not None and self._over(done, time.monotonic() - started > 60 * args.minutes)
            if done % args.sheet_every == 0 or done == args.steps or over:
                self._gather()
                if self.rank == 0:
                    self._validate(done, validate)
            if done % args.save_every == 0 or done == args.steps or over:
                self._save(done)
            if over and done < args.steps:
                complete = False
                break
        bar.close()
        if self.writer is not None:
            self.writer.close()
        return complete

    def finish(self, complete: bool, save: Callable[[Path], object] | None = None) -> int:
        """Save the averaged model to `--out`/model, by its method `save` if no other way is given.

        Returns:
            The exit code: 0, or 3 if the run is to be resumed.
        """
        self._gather()
        if self.rank == 0:
            self.averaged.to(self.device)
            (save or cast(Callable[[Path], object], self.averaged.save))(self.args.out / "model")
        if self.world > 1:
            dist.barrier()
            dist.destroy_process_group()
        return 0 if complete else 3

    def _tensorboard(self) -> Any:
        try:
            from torch.utils.tensorboard import SummaryWriter
        except ImportError:
            print("unifiedar train: tensorboard is not installed; scalars go to log.jsonl alone", file=sys.stderr)
            return None
        return SummaryWriter(str(self.args.out / "tensorboard"), purge_step=self.begin)

    def _over(self, done: int, late: bool) -> bool:
        """Whether time is up, alike on every rank: clocks differ, and a rank must not leave the others waiting."""
        if self.world == 1:
            return late
        if done % 10:  # asking stalls the device, so it is done seldom
            return False
        flag = torch.tensor(float(late), device=self.device)
        dist.broadcast(flag, 0)
        return bool(flag)

    def _report(self, done: int, values: dict[str, Tensor], bar: tqdm) -> None:
        numbers = {name: float(value) for name, value in values.items()}
        if not math.isfinite(numbers["loss"]):
            raise fail(f"loss is {numbers['loss']} at step {done}; lower --lr, or --resume from {self._path}")
        if self.rank:
            return
        (before, then), self.reported = self.reported, (done, time.monotonic())
        rate = (done - before) * self.args.batch * self.world / (self.reported[1] - then)
        # The curves of single scales are for the log: a line has no room for them.
        short = " ".join(f"{k} {v:.4g}" for k, v in numbers.items() if not k.startswith("scale_"))
        bar.set_postfix_str(f"{short} {rate:.0f} pictures/s", refresh=False)
        self._log(done, {**numbers, "learning_rate": self._rate(done - 1), "pictures_per_second": rate})

    def _log(self, done: int, numbers: dict[str, float]) -> None:
        with (self.args.out / "log.jsonl").open("a") as log:
            log.write(json.dumps({"step": done, **{k: float(f"{v:.6g}") for k, v in numbers.items()}}) + "\n")
        if self.writer is not None:
            for name, value in numbers.items():
                self.writer.add_scalar(name, value, done)

    def _validate(self, done: int, validate: Validate[M]) -> None:
        images, figures = validate(self.averaged.to(self.device))
        if self.sharded:
            self.averaged.to("cpu")
        self._log(done, figures)
        tqdm.write(f"step {done}: " + ", ".join(f"{k} {v:.4g}" for k, v in figures.items()), file=sys.stderr)
        for name, image in images.items():
            image.save(self.args.out / f"{name}.png")
            if self.writer is not None:
                self.writer.add_image(name, np.asarray(image), done, dataformats="HWC")
