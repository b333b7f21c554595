"""The registry: one `Op` per torch operator of the namespace `unifiedar`, and the backends that can serve it.

A call goes: public function -> `torch.ops.unifiedar.<name>` (one node for autograd, torch.compile and the profiler)
-> the first backend that fits -> its `run`. The backend asked for travels as the operator's last argument, a string, so
that `backend=` means the same thing eagerly, under torch.compile and inside a CUDA graph.

An ordinary eager call goes straight from the public function to the backend: nobody looks at the torch operator then,
and its way through the dispatcher and back into Python costs more than a small kernel runs.
"""

import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch

__all__ = ["BACKENDS", "Backend", "Op", "registry"]

BACKENDS = ("auto", "cuda", "triton", "eager")
NAMESPACE = "unifiedar"
VARIABLE = "UNIFIEDAR_BACKEND"

registry: dict[str, "Op"] = {}
"""Every operator by name, in the order of definition."""


@dataclass(frozen=True)
class Backend:
    """One implementation of an operator.

    Args:
        name: "cuda", "triton" or "eager".
        run: takes the operator's arguments, returns its outputs.
        unfit: takes the same arguments; None if `run` can serve them, else why not, in one sentence.
            It looks at dtypes, shapes, strides and devices, never at values.
        on_request: None, or why "auto" leaves it alone; whoever names it gets it.
    """

    name: str
    run: Callable[..., Any]
    unfit: Callable[..., str | None]
    on_request: str | None = None


def _fits_anything(*_args: Any) -> None:
    return None


class Op:
    """A torch operator with its backends.

    Args:
        schema: the operator's schema without the trailing `str backend`, which is added here.
        eager: the definition in plain PyTorch; the last backend, which serves whatever the public function let through.
        fake: takes the arguments, returns empty outputs of the right shape, dtype, device and strides.
        backends: the faster backends, best first.
        setup_context, backward: as `torch.library.register_autograd` takes them, without the backend argument
            (`ctx.backend` holds it). Without them every output is marked non-differentiable. An operator that fills
            its arguments (`Tensor(a!)` in the schema) has none.

    "auto" takes the first backend that fits for CUDA tensors, of those not kept for requests, and the eager one
    everywhere else: Triton's interpreter fits CPU tensors too, but only a caller who names it wants its speed.
    """

    def __init__(
        self,
        schema: str,
        *,
        eager: Callable[..., Any],
        fake: Callable[..., Any],
        backends: Sequence[Backend] = (),
        setup_context: Callable[..., None] | None = None,
        backward: Callable[..., Any] | None = None,
    ):
        self.name, rest = schema.split("(", 1)
        arguments, returns = rest.split(") ->", 1)
        self.backends = (*backends, Backend("eager", eager, _fits_anything))
        self._eager = self.backends[-1]
        self._by_name = {backend.name: backend for backend in self.backends}
        self._setup_context, self._backward = setup_context, backward

        qualified = f"{NAMESPACE}::{self.name}"
        torch.library.define(
            qualified, f'({arguments}, str backend="auto") ->{returns}', tags=torch.Tag.pt2_compliant_tag
        )
        torch.library.impl(qualified, "CompositeExplicitAutograd", self._run)
        torch.library.register_fake(qualified, lambda *args: fake(*args[: self._arity]))
        if "!" not in arguments:  # torch differentiates no operator that fills its arguments
            torch.library.register_autograd(
                qualified, self._differentiate if backward else self._no_gradient, setup_context=self._save
            )
        self.overload = getattr(getattr(torch.ops, NAMESPACE), self.name).default
        self._arity = len(self.overload._schema.arguments) - 1
        registry[self.name] = self

    def __call__(self, *args: Any) -> Any:
        """Calls the operator: its arguments in order, then the backend's name."""
        if torch.compiler.is_compiling() or _watched(args):
            return self.overload(*args)
        if torch.is_grad_enabled() and any(isinstance(arg, torch.Tensor) and arg.requires_grad for arg in args):
            return self.overload(*args) if self._backward is None else _Direct.apply(*args, self)
        return self._run(*args)

    def explain(self, *args: Any) -> dict[str, str]:
        """Says of every backend, best first, whether it can serve these arguments: "fits", or why not."""
        return {backend.name: backend.unfit(*args) or "fits" for backend in self.backends}

    def choose(self, name: str, *args: Any) -> Backend:
        """Picks the backend that serves a call.

        Args:
            name: "auto" or a backend's name; "auto" yields to the environment variable UNIFIEDAR_BACKEND. The variable
                speaks to every operator, so those that lack the backend it names go on as if it were not set.
            args: the operator's arguments.

        Returns:
            The backend.

        Raises:
            ValueError: if the name is unknown, the backend asked for cannot serve the call (with its reason), or `name`
                is one that the operator does not have.
        """
        asked = "backend"
        if name == "auto":
            name = os.environ.get(VARIABLE) or "auto"
            asked = VARIABLE
        if name == "auto":
            return self.choose_best(*args)
        if name not in BACKENDS:
            raise ValueError(f"{self.name}: {asked} must be one of {', '.join(BACKENDS)}, got {name!r}")
        if name not in self._by_name:
            if asked == VARIABLE:
                return self.choose_best(*args)
            raise ValueError(
                f"{self.name}: {asked} must be one that this operator has ({', '.join(self._by_name)}), got {name!r}"
            )
        backend = self._by_name[name]
        reason = backend.unfit(*args)
        if reason is not None:
            raise ValueError(f"{self.name}: {asked} must fit the call, got {name!r}, which {reason}")
        return backend

    def choose_best(self, *args: Any) -> Backend:
        """Picks what "auto" means where the environment says nothing."""
        if _on_cuda(args):
            for backend in self.backends:
                if backend.on_request is None and backend.unfit(*args) is None:
                    return backend
        return self._eager

    def _run(self, *args: Any) -> Any:
        # The dispatcher drops trailing arguments that equal their defaults, so "auto" may be absent.
        arity = self._arity
        name = args[arity] if len(args) > arity else "auto"
        args = args[:arity]
        return self.choose(name, *args).run(*args)

    def _save(self, ctx: Any, inputs: tuple[Any, ...], output: Any) -> None:
        if self._setup_context is None:
            ctx.mark_non_differentiable(*(output if isinstance(output, tuple) else (output,)))
            return
        ctx.backend = inputs[self._arity] if len(inputs) > self._arity else "auto"
        self._setup_context(ctx, inputs[: self._arity], output)

    def _differentiate(self, ctx: Any, *gradients: Any) -> tuple[Any, ...]:
        assert self._backward is not None
        return (*self._backward(ctx, *gradients), None)

    def _no_gradient(self, ctx: Any, *gradients: Any) -> tuple[None, ...]:
        return (None,) * (self._arity + 1)


class _Direct(torch.autograd.Function):
    """The gradient of an operator called without the dispatcher: takes its arguments, backend's name and `Op`."""

    @staticmethod
    def forward(ctx: Any, *args: Any) -> Any:
        op = ctx.op = args[-1]
        output = op._run(*args[:-1])
        op._save(ctx, args[:-1], output)
        return output

    @staticmethod
    def backward(ctx: Any, *gradients: Any) -> tuple[Any, ...]:
        return (*ctx.op._differentiate(ctx, *gradients), None)


def _watched(args: Sequence[Any]) -> bool:
    """Whether somebody has to see the torch operator itself: a profiler, tracer, mode, transform or tensor subclass."""
    if (
        torch._C._len_torch_dispatch_stack()
        or torch._C._functorch.peek_interpreter_stack() is not None
        or torch._C._autograd._profiler_enabled()
        or torch._C._get_tracing_state() is not None
    ):
        return True
    for arg in args:
        if isinstance(arg, torch.Tensor):
            if type(arg) not in _PLAIN or arg.is_meta:
                return True
        elif isinstance(arg, (list, tuple)) and _watched(arg):
            return True
    return False


_PLAIN = (torch.Tensor, torch.nn.Parameter)


def _on_cuda(args: Sequence[Any]) -> bool:
    """Whether the first tensor among the arguments, or in a list among them, is a CUDA tensor."""
    for arg in args:
        if isinstance(arg, torch.Tensor):
            return arg.is_cuda
        if isinstance(arg, (list, tuple)) and arg and isinstance(arg[0], torch.Tensor):
            return arg[0].is_cuda
    return False
