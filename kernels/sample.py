"""Triton kernel of the family `sample`: guidance, temperature, top-k, top-p and the draw, a program a row.

Nothing is sorted. Scores become integers of the same order, and a cut is found by narrowing the range of integers: the
k-th largest by counts, the crossing entry of top-p by sums of weights. Where to look next is guessed from what is known
of the range's ends, every third or second time its middle; a guess decides nothing but the number of steps. A search
ends as soon as one entry is left in the range (or exactly k are above it), which random scores reach after nine steps
on average (halving takes 17) and the worst ones after three times 32.

What is decided is decided exactly. Counts are integers; weights, rounded to float32 as the definition's, are summed as
integers (`units` to 1), so that no order of summation shows. The search of top-p looks at float32 sums first, which are
off by at most 2^-18 of the total (chains of 64 additions at most), and adds integers where they are within 2^-16 of the
goal. The race is one correctly rounded division an entry.
"""

import struct

import torch
import triton
import triton.language as tl

__all__ = ["COMPILE_CASES", "sample_codes", "workspace_words"]

_RESIDENT = 16384  # entries that a program holds in registers: 16 a thread of 1024
_IN_MEMORY = 8192  # entries looked at at a time of rows that do not fit there
_PROGRAMS = 264  # of such rows, two a multiprocessor: each has a row of memory

_GUESSING = tl.constexpr(8192)  # entries of a block, at most: a program of more has no registers to guess with
_PAD = tl.constexpr(-(2**31))  # below every score's integer
_NAN = tl.constexpr(2**31 - 1)  # above every score's integer
_INFINITE = tl.constexpr(0x7F800000)
_ONE = tl.constexpr(0x3F800000)  # the bits of the largest weight
_LEAST = tl.constexpr(-0x7F800001)  # of minus infinity


@triton.jit
def _ordered(score):
    """Integers ordered as float32 scores are: both zeros are equal, NaN is the largest."""
    score = tl.where(score == 0, 0.0, score)
    bits = score.to(tl.int32, bitcast=True)
    return tl.where(score != score, _NAN, bits ^ ((bits >> 31) & 0x7FFFFFFF))


@triton.jit
def _score(key):
    """The inverse of `_ordered`; NaN for padding."""
    return (key ^ ((key >> 31) & 0x7FFFFFFF)).to(tl.float32, bitcast=True)


@triton.jit
def _part(held, memory, begin, BLOCK: tl.constexpr, RESIDENT: tl.constexpr):
    """Entries [begin, begin + BLOCK) of a row: those held in registers, or from memory."""
    part = held
    if not RESIDENT:
        part = tl.load(memory + begin + tl.arange(0, BLOCK))
    return part


@triton.jit
def _count(held, memory, least, end, BLOCK: tl.constexpr, RESIDENT: tl.constexpr):
    """How many integers are `least` or more."""
    found = tl.zeros([BLOCK], tl.int32)
    for begin in range(0, end, BLOCK):
        found += (_part(held, memory, begin, BLOCK, RESIDENT) >= least).to(tl.int32)
    return tl.sum(found, axis=0)


@triton.jit
def _count_equal(held, memory, one, below, end, BLOCK: tl.constexpr, RESIDENT: tl.constexpr):
    """How many integers are `one`, of the entries before `below`."""
    found = tl.zeros([BLOCK], tl.int32)
    for begin in range(0, end, BLOCK):
        equal = _part(held, memory, begin, BLOCK, RESIDENT) == one
        found += (equal & (begin + tl.arange(0, BLOCK) < below)).to(tl.int32)
    return tl.sum(found, axis=0)


@triton.jit
def _mass(held, memory, least, end, BLOCK: tl.constexpr, RESIDENT: tl.constexpr):
    """The sum of the weights of `least` (bits) or more, in float32, and how many they are."""
    mass = tl.zeros([BLOCK], tl.float32)
    found = tl.zeros([BLOCK], tl.int32)
    for begin in range(0, end, BLOCK):
        bits = _part(held, memory, begin, BLOCK, RESIDENT)
        above = bits >= least
        mass += tl.where(above, bits.to(tl.float32, bitcast=True), 0.0)
        found += above.to(tl.int32)
    return tl.sum(mass, axis=0), tl.sum(found, axis=0)


@triton.jit
def _exact_mass(held, memory, least, units, end, BLOCK: tl.constexpr, RESIDENT: tl.constexpr):
    """The sum of the weights of `least` (bits) or more as an integer: each is rounded down, `units` to 1."""
    mass = tl.zeros([BLOCK], tl.int64)
    # Loops call this: a scale that looks different each time keeps the compiler from holding all integers in registers.
    scale = units + 0.0 * least.to(tl.float32)
    for begin in range(0, end, BLOCK):
        bits = _part(held, memory, begin, BLOCK, RESIDENT)
        weight = tl.where(bits >= least, bits.to(tl.float32, bitcast=True), 0.0)
        mass += (weight * scale).to(tl.int64)
    return tl.sum(mass, axis=0)


@triton.jit
def _log_odds(count, vocabulary):
    """Close to linear in the score that so many of a row's scores reach, if these are anything like normal."""
    return tl.log2((count + 0.5) / (vocabulary - count + 0.5))


@triton.jit
def _guessed_score(least, right, holds, beyond, k, vocabulary):
    """The integer of a score that about k scores reach: `holds` reach `least`, and `beyond` reach `right`."""
    begin = _log_odds(holds, vocabulary)
    share = (begin - _log_odds(k, vocabulary)) / (begin - _log_odds(beyond, vocabulary))
    low = _score(least)
    return _ordered(low + (_score(right - 1) - low) * share)


@triton.jit(do_not_specialize=["top_k", "top_p"])
def sample_codes_kernel(
    logits,  # [rows, vocabulary], or [2 rows, vocabulary] if GUIDED: the conditional ones first; strides logits_row, 1
    noise,  # [rows, vocabulary], strides noise_row, 1; not read if GREEDY
    guidance_rows,  # [rows / inner], if GUIDANCE_ROWS
    top_k_rows,  # [rows / inner] int64, if TOP_K_ROWS
    top_p_rows,  # [rows / inner], if TOP_P_ROWS
    memory,  # [programs, padded] int32, unless RESIDENT
    out,  # [rows] int64
    rows,
    inner,
    vocabulary,
    padded,  # a multiple of BLOCK
    logits_row,
    noise_row,
    guidance,
    inverse_temperature,
    top_k,
    top_p,  # the bits of a float64
    units,  # a power of two; vocabulary * units < 2^63
    GUIDED: tl.constexpr,
    GUIDANCE_ROWS: tl.constexpr,
    TOP_K: tl.constexpr,
    TOP_K_ROWS: tl.constexpr,
    TOP_P: tl.constexpr,
    TOP_P_ROWS: tl.constexpr,
    GREEDY: tl.constexpr,
    RESIDENT: tl.constexpr,  # a row is one block
    BLOCK: tl.constexpr,
):
    """Grid: (rows,), or programs that take every so many rows where rows are in memory. Products and sums must not be
    fused: each operation of the guidance is rounded."""
    end = BLOCK if RESIDENT else padded
    entry = tl.arange(0, BLOCK)
    memory += tl.program_id(0).to(tl.int64) * padded
    row = tl.program_id(0)
    while row < rows:
        group = row // inner
        own = logits + row.to(tl.int64) * logits_row
        other = logits + (row.to(tl.int64) + rows) * logits_row
        strength = guidance
        if GUIDANCE_ROWS:
            strength = tl.load(guidance_rows + group).to(tl.float32)

        keys = tl.full([BLOCK], _PAD, tl.int32)
        top = tl.full([], _PAD, tl.int32)
        bottom = tl.full([], _NAN, tl.int32)
        for begin in range(0, end, BLOCK):
            inside = begin + entry < vocabulary
            score = tl.load(own + begin + entry, mask=inside, other=0.0).to(tl.float32)
            if GUIDED:
                kind = logits.dtype.element_ty
                base = tl.load(other + begin + entry, mask=inside, other=0.0).to(tl.float32)
                score = (score - base).to(kind).to(tl.float32)
                score = (score * strength).to(kind).to(tl.float32)
                score = (base + score).to(kind).to(tl.float32)
            if not GREEDY:
                score = score * inverse_temperature
            key = _ordered(score)
            bottom = tl.minimum(bottom, tl.min(tl.where(inside, key, _NAN), axis=0))
            key = tl.where(inside, key, _PAD)
            top = tl.maximum(top, tl.max(key, axis=0))
            if RESIDENT:
                keys = key
            else:
                tl.store(memory + begin + entry, key)
        if not RESIDENT:
            tl.debug_barrier()

        if GREEDY:
            code = tl.full([], 0, tl.int32) + vocabulary
            for begin in range(0, end, BLOCK):
                key = _part(keys, memory, begin, BLOCK, RESIDENT)
                code = tl.minimum(code, tl.min(tl.where(key == top, begin + entry, vocabulary), axis=0))
        else:
            least = tl.minimum(bottom, _INFINITE)
            if TOP_K:
                k = top_k
                if TOP_K_ROWS:
                    k = tl.load(top_k_rows + group)
                if (k > 0) & (k < vocabulary):
                    right = tl.minimum(top, _INFINITE) + 1
                    wanted = k.to(tl.float32)
                    holds = tl.full([], 0.0, tl.float32) + vocabulary
                    beyond = tl.full([], 0.0, tl.float32)
                    steps = tl.full([], 0, tl.int32)
                    while least + 1 < right:
                        middle = (least & right) + ((least ^ right) >> 1)  # the mean, without a 33rd bit
                        if BLOCK <= _GUESSING:
                            guess = _guessed_score(least, right, holds, beyond, wanted, vocabulary)
                            middle = tl.where((steps % 3 < 2) & (guess > least) & (guess < right), guess, middle)
                        found = _count(keys, memory, middle, end, BLOCK, RESIDENT)
                        least = tl.where(found >= k, middle, least)
                        right = tl.where(found > k, right, tl.where(found == k, middle + 1, middle))
                        holds = tl.where(found >= k, found.to(tl.float32), holds)
                        beyond = tl.where(found >= k, beyond, found.to(tl.float32))
                        steps += 1

            # From here on a row is its weights, whose bits are integers of the same order; 0 is what cannot be drawn.
            peak = _score(top).to(tl.float64)
            sound = (top > _LEAST) & (top < _INFINITE)
            weights = tl.zeros([BLOCK], tl.int32)
            for begin in range(0, end, BLOCK):
                key = _part(keys, memory, begin, BLOCK, RESIDENT)
                distance = _score(key).to(tl.float64) - peak
                kept = sound & (key >= least) & (distance >= -87)
                weight = tl.where(kept, tl.exp(tl.where(kept, distance, 0.0)).to(tl.float32), 0.0)
                bits = weight.to(tl.int32, bitcast=True)
                if RESIDENT:
                    weights = bits
                else:
                    tl.store(memory + begin + entry, bits)
            if not RESIDENT:
                tl.debug_barrier()

            # Kept are weights of `low` and more; of those that equal it, the entries before `bound`. No weight above 0
            # is below that of the least score that is left, up to the exponential's last bits.
            distance = tl.maximum(_score(least).to(tl.float64) - peak, -87.0)
            low = tl.where(distance <= 0, tl.exp(distance), 0.0).to(tl.float32).to(tl.int32, bitcast=True)
            low = tl.maximum(low - 8, 1)
            bound = tl.full([], 0, tl.int32) + vocabulary
            if TOP_P:
                if TOP_P_ROWS:
                    share = tl.load(top_p_rows + group).to(tl.float64)
                else:
                    share = tl.full([], 0, tl.int64) + top_p
                    share = share.to(tl.float64, bitcast=True)
                if (share > 0) & (share < 1):
                    total = _exact_mass(weights, memory, low, units, end, BLOCK, RESIDENT)
                    product = total.to(tl.float64) * share
                    goal = product.to(tl.int64)
                    goal += (goal.to(tl.float64) < product).to(tl.int64)
                    about = goal.to(tl.float32) / units
                    slack = total.to(tl.float32) / units * 2.0**-16
                    right = tl.full([], _ONE + 1, tl.int32)
                    holds = _count(weights, memory, low, end, BLOCK, RESIDENT)
                    beyond = holds * 0
                    most = total.to(tl.float32) / units
                    rest = tl.full([], 0.0, tl.float32)
                    steps = tl.full([], 0, tl.int32)
                    while (right - low > 1) & (holds - beyond > 1):
                        middle = (low + right) >> 1
                        if BLOCK <= _GUESSING:  # weights' integers are close to linear in scores
                            guess = low + ((right - low).to(tl.float32) * ((most - about) / (most - rest))).to(tl.int32)
                            middle = tl.where((steps % 2 == 0) & (guess > low) & (guess < right), guess, middle)
                        mass, found = _mass(weights, memory, middle, end, BLOCK, RESIDENT)
                        reached = mass >= about
                        if tl.abs(mass - about) <= slack:
                            reached = _exact_mass(weights, memory, middle, units, end, BLOCK, RESIDENT) >= goal
                        low = tl.where(reached, middle, low)
                        right = tl.where(reached, right, middle)
                        holds = tl.where(reached, found, holds)
                        beyond = tl.where(reached, beyond, found)
                        most = tl.where(reached, mass, most)
                        rest = tl.where(reached, rest, mass)
                        steps += 1
                    equal = holds - beyond
                    if equal > 1:
                        above = _exact_mass(weights, memory, right, units, end, BLOCK, RESIDENT)
                        each = (low.to(tl.float32, bitcast=True) * units).to(tl.int64)
                        if above + (equal - 1).to(tl.int64) * each >= goal:
                            short = bound * 0
                            while bound - short > 1:
                                place = (short + bound) >> 1
                                found = _count_equal(weights, memory, low, place, end, BLOCK, RESIDENT)
                                enough = above + found.to(tl.int64) * each >= goal
                                short = tl.where(enough, short, place)
                                bound = tl.where(enough, place, bound)

            code = tl.full([], 0, tl.int32)
            best = tl.full([], 0.0, tl.float32)
            for begin in range(0, end, BLOCK):
                bits = _part(weights, memory, begin, BLOCK, RESIDENT)
                place = begin + entry
                at = noise + row.to(tl.int64) * noise_row + place
                exponential = tl.load(at, mask=place < vocabulary, other=1.0).to(tl.float32)
                kept = (bits > low) | ((bits == low) & (place < bound))
                race = tl.where(kept, tl.div_rn(bits.to(tl.float32, bitcast=True), exponential), 0.0)
                race = tl.where(race == race, race, 0.0)
                fastest = tl.max(race, axis=0)
                first = tl.min(tl.where(race == fastest, place, vocabulary), axis=0)
                code = tl.where(fastest > best, first, code)
                best = tl.maximum(fastest, best)
        tl.store(out + row, code.to(tl.int64))
        if not RESIDENT:
            tl.debug_barrier()
        row += tl.num_programs(0)


def _tile(vocabulary: int) -> tuple[int, dict[str, int]]:
    """Entries of a block, and Triton's options: 16 entries a thread, 8 where rows are in memory.

    Registers are said to ptxas, which else spills a few bytes to get down to 64: two rows of 4096 are on a
    multiprocessor, or one of 16384, as 1024 threads cannot have more.
    """
    block = max(triton.next_power_of_2(vocabulary), 512) if vocabulary <= _RESIDENT else _IN_MEMORY
    warps = block // 512 if vocabulary <= _RESIDENT else 32
    return block, {
        "num_warps": warps,
        "maxnreg": 128 if warps <= 16 else 64,
        "num_stages": 1,  # what is stored for later passes must not be loaded ahead
        "enable_fp_fusion": False,
    }


def _padded(vocabulary: int) -> int:
    block = _tile(vocabulary)[0]
    return triton.cdiv(vocabulary, block) * block


def workspace_words(rows: int, vocabulary: int) -> int:
    """How many 32-bit words of memory `sample_codes` works in; 0 where a row fits in registers."""
    padded = _padded(vocabulary)
    return min(rows, _PROGRAMS) * padded if vocabulary > _RESIDENT else 0


def sample_codes(
    logits: torch.Tensor,
    noise: torch.Tensor | None,
    guidance: float | torch.Tensor | None,
    temperature: float,
    top_k: int | torch.Tensor,
    top_p: float | torch.Tensor,
    inner: int,
    units: float,
    workspace: torch.Tensor,
    out: torch.Tensor,
) -> None:
    """Fills codes (rows,) from logits (rows, V), or (2 rows, V) with guidance, and noise (rows, V).

    Rows may have any stride, entries are contiguous. Options given as tensors have one value for `inner` rows;
    workspace is int32, of `workspace_words`; `units` is what the definition counts weights in.
    """
    rows, vocabulary = out.numel(), logits.shape[-1]
    block, options = _tile(vocabulary)
    padded = _padded(vocabulary)
    resident = vocabulary <= _RESIDENT
    fixed_k = 0 if isinstance(top_k, torch.Tensor) else top_k
    fixed_p = 0.0 if isinstance(top_p, torch.Tensor) else top_p
    sample_codes_kernel[(rows if resident else min(rows, _PROGRAMS),)](
        logits,
        logits if noise is None else noise,
        guidance if isinstance(guidance, torch.Tensor) else logits,
        top_k if isinstance(top_k, torch.Tensor) else out,
        top_p if isinstance(top_p, torch.Tensor) else logits,
        out if resident else workspace,
        out,
        rows,
        inner,
        vocabulary,
        padded,
        logits.stride(0),
        0 if noise is None else noise.stride(0),
        guidance if isinstance(guidance, float) else 0.0,
        1 / temperature if temperature else 0.0,
        fixed_k,
        struct.unpack("<q", struct.pack("<d", fixed_p))[0],
        units,
        GUIDED=guidance is not None,
        GUIDANCE_ROWS=isinstance(guidance, torch.Tensor),
        TOP_K=isinstance(top_k, torch.Tensor) or 0 < fixed_k < vocabulary,
        TOP_K_ROWS=isinstance(top_k, torch.Tensor),
        TOP_P=isinstance(top_p, torch.Tensor) or 0 < fixed_p < 1,
        TOP_P_ROWS=isinstance(top_p, torch.Tensor),
        GREEDY=temperature == 0,
        RESIDENT=resident,
        BLOCK=block,
        **options,
    )


def _cases() -> list[tuple]:
    """(kernel, signature, constexprs, options, divisors) to compile, at the vocabularies of VAR, VILA-U and larger."""
    cases: list[tuple] = []
    floats = dict.fromkeys(("guidance", "inverse_temperature", "units"), "fp32")
    memory = {"memory": "*i32", "out": "*i64", "top_k_rows": "*i64", "top_p": "i64"}
    wide = ("logits", "noise", "vocabulary", "logits_row", "noise_row")
    for name, vocabulary, packed in (
        ("fp32", 4096, True),
        ("bf16", 16384, True),
        ("fp32", 16384, True),
        ("fp16", 65536, True),
        ("fp32", 1000, False),
    ):
        block, options = _tile(vocabulary)
        types = {**floats, **memory, "logits": f"*{name}", "noise": "*fp32"}
        types |= dict.fromkeys(("guidance_rows", "top_p_rows"), "*fp32")
        for guided, by_rows, cuts, greedy in (
            (True, True, True, False),
            (True, False, True, False),
            (False, False, True, False),
            (False, False, False, False),
            (True, False, False, True),
        ):
            constants = {
                "GUIDED": guided,
                "GUIDANCE_ROWS": by_rows,
                "TOP_K": cuts,
                "TOP_K_ROWS": by_rows,
                "TOP_P": cuts,
                "TOP_P_ROWS": by_rows,
                "GREEDY": greedy,
                "RESIDENT": vocabulary <= _RESIDENT,
                "BLOCK": block,
            }
            kernel = sample_codes_kernel
            names = {n: types.get(n, "i32") for n in kernel.arg_names if n not in constants}
            signature = {**names, **dict.fromkeys(constants, "constexpr")}
            divisors = dict.fromkeys(wide, 16) if packed else {}
            cases.append((kernel, signature, constants, options, divisors))
    return cases


COMPILE_CASES = _cases()
