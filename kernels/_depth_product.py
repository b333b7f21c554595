"""What products of few and of many rows share in the depth transformer's kernels."""

import triton
import triton.language as tl

__all__ = [
    "FEW", "activated", "case", "columns", "finished", "launch", "linear_types", "own_bias", "own_matrix",
    "shared_constants",
]  # fmt: skip

FEW = 4  # rows, at most, that are multiplied without matrix units


@triton.jit
def activated(x, KIND: tl.constexpr):
    if KIND == "gelu":
        y = 0.5 * x * (1.0 + tl.erf(x * 0.7071067811865476))
    elif KIND == "gelu_tanh":
        y = x * tl.sigmoid(1.5957691216057308 * (x + 0.044715 * x * x * x))
    else:
        y = x * tl.sigmoid(x)
    return y


@triton.jit
def own_matrix(
    tile, weight, weight2, weight3, OUTPUTS: tl.constexpr, OUTPUTS2: tl.constexpr, OUTPUTS3: tl.constexpr,
    KIND: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    """Of matrices beside each other that of a tile: its number, it, the tile in it, first column, number of outputs."""
    side = tile * 0
    column = side
    outputs = side + OUTPUTS
    if KIND == "beside":
        second = tl.cdiv(OUTPUTS, BLOCK_N)
        third = second + tl.cdiv(OUTPUTS2, BLOCK_N)
        if tile >= third:
            weight = weight3
            outputs = side + OUTPUTS3
            column = side + (OUTPUTS + OUTPUTS2)
            tile = tile - third
            side = side + 2
        elif tile >= second:
            weight = weight2
            outputs = side + OUTPUTS2
            column = side + OUTPUTS
            tile = tile - second
            side = side + 1
    return side, weight, tile, column, outputs


@triton.jit
def columns(given, near):
    """Of a vector of biases and the like, [1, BLOCK_N]; or None."""
    if given is not None:
        found = tl.load(given + near).to(tl.float32)[None, :]
    else:
        found = None
    return found


@triton.jit
def own_bias(side, bias, bias2, bias3, near, KIND: tl.constexpr):
    """Of the bias of that matrix, [1, BLOCK_N]; None if there is none."""
    if bias is not None and KIND == "beside":
        if side == 2:
            bias = bias3
        elif side == 1:
            bias = bias2
    return columns(bias, near)


@triton.jit
def finished(result, gate, added, added2, placed, kept, KIND: tl.constexpr, ACTIVATION: tl.constexpr):
    """A product with bias, gate, activation and what is added at the end; None for what there is not."""
    if added is not None:
        result += added
    if KIND == "gated":
        if added2 is not None:
            gate += added2
        result *= activated(gate, ACTIVATION)
    elif ACTIVATION != "none":
        result = activated(result, ACTIVATION)
    if placed is not None:
        result += placed
    if kept is not None:
        result += kept
    return result


def shared_constants(inputs: int, sizes: list[int], kind: str, activation: str, early: bool) -> dict:
    second, third = [*sizes[1:], 0, 0][:2] if kind == "beside" else (0, 0)
    return {
        "INPUTS": inputs,
        "OUTPUTS": sizes[0],
        "OUTPUTS2": second,
        "OUTPUTS3": third,
        "KIND": kind,
        "ACTIVATION": activation,
        "PDL": early,
    }


def launch(early: bool) -> dict[str, bool]:
    return {"launch_pdl": True} if early else {}


def case(kernel, types: dict[str, str | None], constants: dict, options: dict, divisors: tuple[str, ...]) -> tuple:
    """A case of the compile test; arguments of type None are absent."""
    given = {name: kind for name, kind in types.items() if kind is not None}
    constants = {**constants, **{name: None for name, kind in types.items() if kind is None}}
    signature = {name: given.get(name, "constexpr") for name in kernel.arg_names}
    archs = (90,) if constants["PDL"] else (80, 90)
    return kernel, signature, constants, options, dict.fromkeys(divisors, 16), archs


def linear_types(dtype: str, matrices: int, in_parts: bool = False, **how: bool) -> dict[str, str | None]:
    """Types of the arguments that kernels of both have, of a case of the compile test."""
    pointer, bias = f"*{dtype}", f"*{dtype}" if how.get("bias") else None
    return {
        "x": pointer,
        "weight": pointer,
        "weight2": pointer if matrices > 1 else None,
        "weight3": pointer if matrices > 2 else None,
        "bias": bias,
        "bias2": bias if matrices > 1 else None,
        "bias3": bias if matrices > 2 else None,
        "place": pointer if how.get("place") else None,
        "residual": pointer if how.get("residual") else None,
        "out": "*fp32" if in_parts else pointer,
        **dict.fromkeys(("rows", "residual_row", "out_row"), "i32"),
    }
