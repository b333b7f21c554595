"""Depth transformer: a small causal transformer that emits the D codes of one position one after another.

RQ-Transformer (arXiv:2203.01941, section 3.2) introduced it; VILA-U (arXiv:2409.04429, section 3.2) puts it on a
language model's hidden state. The keys are VILA-U's `rqtransformer.*`. RQ-Transformer's body is a stack of the same
blocks, over the positions of a picture. `DepthStyle` says what the depth transformers of other models do instead.
"""

import functools
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import accumulate
from typing import Any, cast

import torch
from torch import Tensor, nn

from unifiedar import engine
from unifiedar.ops import DepthBlock, DepthCodes, DepthForm, DepthWeights, depth_decode, residual_lookup
from unifiedar.ops.depth import (
    ACTIVATIONS,
    NORMS,
    STATES,
    Pair,
    _flatten,
    depth_block,
    depth_logits,
    depth_pack,
    depth_rope,
    depth_tokens,
    served_by,
    wants_packed,
)

__all__ = ["DepthStyle", "DepthTransformer", "require_sound"]

_SESSIONS = 4  # batches and ways of drawing whose graphs are kept

_ACTIVATIONS: dict[str, Callable[[], nn.Module]] = {
    "gelu": nn.GELU,
    "gelu_tanh": functools.partial(nn.GELU, "tanh"),
    "silu": nn.SiLU,
}


@dataclass(frozen=True)
class DepthStyle:
    """How a depth transformer is made; as it stands, like RQ-Transformer's and VILA-U's.

    Args:
        norm: "layer" or "rms", of blocks and before the head.
        eps: of these norms and those of queries and keys.
        bias: whether blocks, LayerNorms and head have biases.
        input_bias: whether the projections of hidden state and embeddings have.
        activation: "gelu" (exact), "gelu_tanh" or "silu", of the MLP, or of its gate.
        gated: down(activation(gate x) * up x) in place of down(activation(up x)).
        mlp_dim: width inside the MLP, None for 4 dim.
        head_dim: width of a head, None for dim // num_heads.
        kv_heads: heads of keys and values, None for as many as of queries.
        qk_norm: whether queries and keys of each head go through an RMSNorm.
        learned_positions: whether each token has an embedding of its place, `pos_emb_d`.
        rope: base of the rotary embedding of places, which turns neighbouring channels, or None for none.
        state: where the hidden state enters: "first" (the token of depth 0), "every" (added at each depth) or "before"
            (a token before that of depth 0). The last two take `start`, the embedding of what is before the codes.
        last_code: whether the last code's embedding enters, instead of the sum of all before.
        states_per_depth, codes_per_depth, blocks_per_depth, heads_per_depth: whether the projection of the state (with
            state "every"), that of embeddings, attention and MLP of the blocks, and the head have weights for each
            depth.
        order: for each token, which set of weights of the blocks and the state's projection is its own, where tokens
            share some; () is one for each.
        final_norm: "shared", "per_depth" or "none": before the head.
    """

    norm: str = "layer"
    eps: float = 1e-5
    bias: bool = True
    input_bias: bool = True
    activation: str = "gelu"
    gated: bool = False
    mlp_dim: int | None = None
    head_dim: int | None = None
    kv_heads: int | None = None
    qk_norm: bool = False
    learned_positions: bool = True
    rope: float | None = None
    state: str = "first"
    last_code: bool = False
    states_per_depth: bool = False
    codes_per_depth: bool = False
    blocks_per_depth: bool = False
    heads_per_depth: bool = False
    order: tuple[int, ...] = ()
    final_norm: str = "shared"

    def form(self, depth: int) -> DepthForm:
        """What `unifiedar.ops.depth_decode` is told of it, for D = depth codes."""
        return DepthForm(
            self.norm, self.eps, self.activation, self.state, self.last_code, self.kv_heads or 0, self.rope or 0.0,
            self.order, depth,
        )  # fmt: skip


class _Linears(nn.Module):
    """Linear layers side by side: weight (sets, out, in), bias (sets, out) or None."""

    def __init__(self, sets: int, in_dim: int, out_dim: int, bias: bool):
        super().__init__()
        self.weight = nn.Parameter(torch.empty(sets, out_dim, in_dim))
        self.bias = nn.Parameter(torch.empty(sets, out_dim)) if bias else None
        for parameter in self.parameters():
            nn.init.uniform_(parameter, -(in_dim**-0.5), in_dim**-0.5)


def _linear(sets: int, in_dim: int, out_dim: int, bias: bool) -> nn.Linear | _Linears:
    return _Linears(sets, in_dim, out_dim, bias) if sets else nn.Linear(in_dim, out_dim, bias=bias)


class _Norms(nn.Module):
    """Gains and biases (sets, dim) of a norm for each depth."""

    def __init__(self, sets: int, dim: int, bias: bool):
        super().__init__()
        self.weight = nn.Parameter(torch.ones(sets, dim))
        self.bias = nn.Parameter(torch.zeros(sets, dim)) if bias else None


def _norm(dim: int, style: DepthStyle) -> nn.Module:
    if style.norm == "rms":
        return nn.RMSNorm(dim, eps=style.eps)
    return nn.LayerNorm(dim, eps=style.eps, bias=style.bias)


def _pair(module: nn.Module) -> Pair:
    return cast(Tensor, module.weight), cast("Tensor | None", getattr(module, "bias", None))


class _Attention(nn.Module):
    """Parameters of the attention, by their published names."""

    def __init__(self, dim: int, num_heads: int, style: DepthStyle, sets: int):
        super().__init__()
        head_dim = style.head_dim or dim // num_heads
        wide, narrow = num_heads * head_dim, (style.kv_heads or num_heads) * head_dim
        self.key, self.query, self.value = (_linear(sets, dim, out, style.bias) for out in (narrow, wide, narrow))
        self.proj = _linear(sets, wide, dim, style.bias)
        if style.qk_norm:
            self.query_norm, self.key_norm = (nn.Parameter(torch.ones(head_dim)) for _ in range(2))


class _Block(nn.Module):
    def __init__(self, dim: int, num_heads: int, dropout: float, style: DepthStyle, sets: int):
        super().__init__()
        self.ln1, self.ln2 = _norm(dim, style), _norm(dim, style)
        self.attn = _Attention(dim, num_heads, style, sets)
        inner = style.mlp_dim or 4 * dim
        up, down = _linear(sets, dim, inner, style.bias), _linear(sets, inner, dim, style.bias)
        self.mlp = nn.Sequential(up, _ACTIVATIONS[style.activation](), down)
        self.gate = _linear(sets, dim, inner, style.bias) if style.gated else None
        self.num_heads, self.dropout = num_heads, dropout

    def weights(self) -> DepthBlock:
        attn, up, down = self.attn, self.mlp[0], self.mlp[2]
        return DepthBlock(
            norm1=_pair(self.ln1),
            query=_pair(attn.query),
            key=_pair(attn.key),
            value=_pair(attn.value),
            proj=_pair(attn.proj),
            norm2=_pair(self.ln2),
            up=_pair(up),
            down=_pair(down),
            gate=None if self.gate is None else _pair(self.gate),
            query_norm=getattr(attn, "query_norm", None),
            key_norm=getattr(attn, "key_norm", None),
        )

    def forward(self, x: Tensor, cache: Tensor | None, begin: int, form: DepthForm, rope: Tensor | None) -> Tensor:
        dropout = self.dropout if self.training else 0.0
        return depth_block(x, self.weights(), self.num_heads, cache, begin, dropout, form, rope)


class Stack(nn.Module):
    """Causal pre-norm blocks without a final norm, of a style; `sets` of weights for several tokens, 0 for all one."""

    def __init__(
        self,
        dim: int,
        num_layers: int,
        num_heads: int,
        dropout: float,
        style: DepthStyle | None = None,
        sets: int = 0,
    ):
        super().__init__()
        style = style or DepthStyle()
        self.blocks = nn.ModuleList(_Block(dim, num_heads, dropout, style, sets) for _ in range(num_layers))
        self.num_heads, self.form = num_heads, style.form(0)
        self._cached = (style.kv_heads or num_heads, style.head_dim or dim // num_heads)

    def cache(self, x: Tensor, length: int) -> Tensor:
        """Room for the keys and values of `length` tokens of rows like x (rows, ..., dim), not yet written."""
        heads, head_dim = self._cached
        return x.new_empty(len(self.blocks), 2, len(x), heads, length, head_dim)

    def forward(self, x: Tensor, cache: Tensor | None = None, begin: int = 0) -> Tensor:
        """States (rows, T, dim) of tokens begin .. begin + T - 1, those before them read from the cache, if any."""
        rope = None
        if self.form.rope and len(self.blocks):
            first = cast(_Block, self.blocks[0]).weights()
            rope = depth_rope(x, first, self.num_heads, self.form, begin, x.shape[1])
        for i, block in enumerate(self.blocks):
            x = block(x, None if cache is None else cache[i], begin, self.form, rope)
        return x


class Classifier(nn.Module):
    """A norm, if there is one, and a linear layer: (..., dim) to logits (..., K)."""

    def __init__(self, dim: int, num_codes: int, style: DepthStyle | None = None, depth: int = 0):
        super().__init__()
        style = style or DepthStyle()
        sets = depth if style.heads_per_depth else 0
        self.layer_norm: nn.Module | None
        if style.final_norm == "none":
            self.layer_norm = None
        elif style.final_norm == "per_depth":
            self.layer_norm = _Norms(depth, dim, style.bias and style.norm == "layer")
        else:
            self.layer_norm = _norm(dim, style)
        self.linear = _linear(sets, dim, num_codes, style.bias)

    def forward(self, x: Tensor) -> Tensor:
        return self.linear(x if self.layer_norm is None else self.layer_norm(x))


class DepthTransformer(nn.Module):
    """Predicts code d of a position from the body's hidden state and the sum of the embeddings of codes 0..d-1.

    Args:
        hidden_dim: width of the body's hidden state (`input_embed_dim_2`), or None if the state is as wide as the stack
            and enters as it is, without a projection (RQ-Transformer).
        code_dim: C, width of a code vector (`input_embed_dim_1`), or None if it is as wide as the stack and enters as
            it is.
        dim, num_layers, num_heads: of the stack; heads are dim // num_heads wide, unless the style says otherwise.
        depth: D, codes per position.
        num_codes: K.
        dropout: after the attention projection and the MLP, in training only.
        style: what differs from RQ-Transformer and VILA-U; None for nothing.

    Raises:
        ValueError: for a size below 1, heads that do not divide dim, or a style of parts that do not go together.
    """

    def __init__(
        self,
        hidden_dim: int | None,
        code_dim: int | None,
        dim: int,
        num_layers: int,
        num_heads: int,
        depth: int,
        num_codes: int,
        dropout: float = 0.1,
        style: DepthStyle | None = None,
    ):
        super().__init__()
        style = style or DepthStyle()
        for name, size in (("dim", dim), ("num_heads", num_heads), ("depth", depth), ("num_codes", num_codes)):
            if size < 1:
                raise ValueError(f"DepthTransformer: {name} must be at least 1, got {size}")
        _check_style(style, dim, num_heads, depth, hidden_dim)
        form = style.form(depth)
        length = form.length(depth)
        sets = 1 + max(style.order) if style.order else length
        self.pos_emb_d = nn.Parameter(torch.zeros(1, length, dim)) if style.learned_positions else None
        embeddings = depth - (style.state == "first") if style.codes_per_depth else 0
        self.in_mlp_1 = nn.Identity() if code_dim is None else _linear(embeddings, code_dim, dim, style.input_bias)
        states = sets if style.states_per_depth else 0
        self.in_mlp_2 = nn.Identity() if hidden_dim is None else _linear(states, hidden_dim, dim, style.input_bias)
        per_token = sets if style.blocks_per_depth else 0
        self.head_transformer = Stack(dim, num_layers, num_heads, dropout, style, per_token)
        self.classifier_mlp = Classifier(dim, num_codes, style, depth)
        self.depth, self.num_codes, self.form = depth, num_codes, form
        self._kept: _Kept | None = None
        if self.pos_emb_d is not None:
            nn.init.normal_(self.pos_emb_d, std=0.02)

    def running_sums(self, codes: Tensor, codebook: Tensor, *, exact_reference_rounding: bool = False) -> Tensor:
        """What enters after each code: sums (..., D, C) of the embeddings of codes 0..d, or that of code d alone.

        Args:
            codes: (..., D) int64.
            codebook: (K, C) or (D, K, C).
            exact_reference_rounding: True rounds each sum to the codebook's dtype before the next code is added, as the
                published models' sums on a GPU and those of `decode` are; False adds in float32 and rounds each once.

        Returns:
            (..., D, C) in the codebook's dtype, as `forward` takes them; sums, unless the style is `last_code`.
            `unifiedar.ops.residual_lookup` says what bad input raises.
        """
        if not (self.form.last or exact_reference_rounding):
            return residual_lookup(codes, codebook, cumulative=True)
        tables = [codebook if codebook.ndim == 2 else codebook[d] for d in range(codes.shape[-1])]
        entered = [residual_lookup(codes[..., d : d + 1], table) for d, table in enumerate(tables)]
        return torch.stack(entered if self.form.last else list(accumulate(entered)), dim=-2)

    def forward(self, hidden: Tensor, running_sums: Tensor, start: Tensor | None = None) -> Tensor:
        """Teacher-forced logits.

        Args:
            hidden: (N, hidden_dim), the body's state at each of N positions.
            running_sums: (N, D, C), what `running_sums` makes of the codes (the last is not used).
            start: (N, C), embedding of what is before the codes, where the state does not enter first; else None.

        Returns:
            (N, D, K) logits of every code given the ones before it.

        Raises:
            ValueError: for another shape, or a start too much or missing.
        """
        if (start is None) != (self.form.state == "first"):
            got = "None" if start is None else "a tensor"
            raise ValueError(f"DepthTransformer: start must be given unless the state enters first, got {got}")
        weights = self.weights()
        dim = weights.head[0].shape[-1]
        hidden_dim, code_dim = (dim if one is None else one[0].shape[-1] for one in (weights.hidden, weights.code))
        for argument, value, shape in (
            ("hidden", hidden, (len(hidden), hidden_dim)),
            ("running_sums", running_sums, (len(hidden), self.depth, code_dim)),
            ("start", start, (len(hidden), code_dim)),
        ):
            if value is not None and value.shape != shape:
                raise ValueError(f"DepthTransformer: {argument} must be {shape}, got {tuple(value.shape)}")
        entered = running_sums[:, :-1]
        if start is not None:
            start = start.unsqueeze(1)
            entered = torch.cat([start, entered if self.form.last else entered + start], dim=1)
        x = self.head_transformer(depth_tokens(hidden, entered, weights))
        return depth_logits(x[:, -self.depth :], weights)

    def weights(self) -> DepthWeights:
        """The parameters as `unifiedar.ops.depth_decode` takes them."""
        code, hidden = (None if isinstance(m, nn.Identity) else _pair(m) for m in (self.in_mlp_1, self.in_mlp_2))
        blocks = tuple(cast(_Block, block).weights() for block in self.head_transformer.blocks)
        head = self.classifier_mlp
        norm = None if head.layer_norm is None else _pair(head.layer_norm)
        heads = self.head_transformer.num_heads
        return DepthWeights(self.pos_emb_d, code, hidden, blocks, norm, _pair(head.linear), heads, self.form)

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_kept": None}  # a copy or a file of the module has no use for packed weights

    def _held(self) -> "_Kept":
        """The weights, gathered anew when a module or a parameter was replaced: that takes longer than a launch."""
        if self._kept is None or not self._kept.stands():
            self._kept = None  # the memory of packed weights is free while new ones are made
            self._kept = _Kept(self)
        return self._kept

    @torch.no_grad()
    def decode(
        self,
        hidden: Tensor,
        codebook: Tensor,
        *,
        guidance: float | Tensor | None = None,
        temperature: float | Sequence[float] = 1.0,
        top_k: int | Sequence[int] = 0,
        top_p: float | Sequence[float] = 0.0,
        noise: Tensor | None = None,
        generator: torch.Generator | None = None,
        forced: Tensor | None = None,
        return_logits: bool = False,
        start: Tensor | None = None,
        backend: str = "auto",
        graphs: bool = True,
    ) -> DepthCodes:
        """Emit the D codes of each position; keys and values of earlier depths are kept, so that no work is repeated.

        Args:
            hidden: (N, hidden_dim); with `guidance` (2N, hidden_dim), conditional rows first.
            codebook: (K, C) or (D, K, C), as `unifiedar.ops.residual_lookup` takes it.
            guidance, temperature, top_k, top_p, generator: as `unifiedar.ops.sample_codes`; temperature, top_k and
                top_p may be one number for each depth.
            noise: (N, D, K) ~ Exp(1) that decides the draws, drawn from `generator` if None.
            forced: (N, D) int64 codes to go through instead of drawing any, for a look at the logits.
            return_logits: whether to return the logits of every depth, too.
            start: (N or 2N, C), embedding of what is before the codes, where the state does not enter first; else None.
            backend: "auto", "cuda", "triton" or "eager". The CUDA kernel reads a packed copy of the weights, which is
                made at the first call, kept beside them and made anew when they change. "auto" takes it for up
                to 24 rows, Triton's kernels for more.
            graphs: whether the Triton kernels, hundreds of launches, are captured as a CUDA graph at the first call
                with such shapes, settings and codebook, and replayed from then on. The last few graphs are kept.

        Returns:
            `DepthCodes`: codes (N, D) int64, the sum of their embeddings (N, C) in the codebook's dtype, at which depth
            logits were NaN (`require_sound` looks), and the logits (rows, D, K) before guidance or None.

        Raises:
            TypeError, ValueError: as `unifiedar.ops.depth_decode` says.
        """
        held = self._held()
        weights = held.weights
        settings: dict[str, Any] = {"guidance": guidance, "temperature": temperature, "top_k": top_k, "top_p": top_p}
        given: dict[str, Any] = {"noise": noise, "forced": forced, "start": start}
        if graphs and hidden.is_cuda and held.may_capture(noise, generator):
            session = held.session(hidden, codebook, settings, given, return_logits, backend)
            if session is not None:
                return session.run(hidden, guidance, given, generator)
        packed = held.packed() if wants_packed(hidden, codebook, weights, backend) else None
        return depth_decode(
            hidden, codebook, weights, **settings, **given, generator=generator, return_logits=return_logits,
            packed=packed, backend=backend,
        )  # fmt: skip


class _Kept:
    """What a module's weights were when they were last looked at, and their packed copy once one was asked for."""

    def __init__(self, module: DepthTransformer):
        self.weights = module.weights()
        # Who is where; a module or a parameter that was replaced is no longer there.
        self._places: list[tuple[dict[str, Any], str, object]] = []
        for one in module.modules():
            for table in (one._modules, one._parameters):
                self._places += [(table, name, value) for name, value in table.items()]
        self._parameters = list(module.parameters())
        tensors = [t for t in _flatten(self.weights) if t is not None]
        # Weights that are computed, by a parametrization say, have to be computed again.
        self._computed = not {id(t) for t in tensors} <= {id(p) for p in self._parameters}
        self._packed: tuple[list[tuple[int, int]], Tensor] | None = None
        self._sessions = engine.Pool(_SESSIONS)

    def stands(self) -> bool:
        """Whether the weights are still these tensors, whatever was written to them."""
        return not self._computed and all(table.get(name) is value for table, name, value in self._places)

    def packed(self) -> Tensor:
        """The packed weights, made anew when a parameter was moved or written to."""
        state = [(p._version, p.data_ptr()) for p in self._parameters]
        if self._packed is None or self._packed[0] != state:
            self._packed = None  # its memory is free while the new ones are made
            self._packed = (state, depth_pack(self.weights))
        return self._packed[1]

    def may_capture(self, noise: Tensor | None, generator: torch.Generator | None) -> bool:
        """Whether nothing forbids a graph: weights that last, no capture or compiler at work, arguments that go."""
        if self._computed or torch.compiler.is_compiling() or torch.cuda.is_current_stream_capturing():
            return False
        return noise is None or generator is None

    def session(
        self,
        hidden: Tensor,
        codebook: Tensor,
        settings: dict[str, Any],
        given: dict[str, Any],
        return_logits: bool,
        backend: str,
    ) -> "_Session | None":
        """The captured decoding of such arguments; None for those that are not many launches."""

        def kind(value: Any) -> Any:
            if isinstance(value, Tensor):
                return value.shape, value.dtype, value.device
            return tuple(value) if isinstance(value, Sequence) else value

        key = (
            kind(hidden), kind(codebook), codebook.data_ptr(), codebook.stride(), *map(kind, settings.values()),
            *map(kind, given.values()), return_logits, backend, *(p.data_ptr() for p in self._parameters),
            engine.circumstances(),
        )  # fmt: skip

        def make() -> "_Session | None":
            if not len(hidden) or served_by(hidden, codebook, self.weights, backend) != "triton":
                return None
            return _Session(self.weights, hidden, codebook, settings, given, return_logits)

        try:
            hash(key)
        except TypeError:
            return None  # of settings that are no numbers, which depth_decode refuses by name
        return self._sessions.get(key, make)


class _Session:
    """Decoding by Triton kernels at fixed places, captured as a CUDA graph."""

    def __init__(
        self,
        weights: DepthWeights,
        hidden: Tensor,
        codebook: Tensor,
        settings: dict[str, Any],
        given: dict[str, Any],
        return_logits: bool,
    ):
        self.weights, self.codebook, self.return_logits = weights, codebook, return_logits
        # Tensors that last must not be inference tensors, which nobody could fill outside of that mode.
        with torch.inference_mode(False), torch.no_grad(), torch.cuda.device_of(hidden):
            self.hidden = hidden.clone()
            self.settings: dict[str, Any] = {k: v.clone() if isinstance(v, Tensor) else v for k, v in settings.items()}
            self.given: dict[str, Any] = {k: None if v is None else v.clone() for k, v in given.items()}
            self.drawn: list[Tensor] = []  # the noise of each depth, where it is drawn here
            temperature = settings["temperature"]
            each = list(temperature) if isinstance(temperature, Sequence) else [temperature] * weights.depth
            if given["noise"] is None and given["forced"] is None and any(each):
                count = len(hidden) if settings["guidance"] is None else len(hidden) // 2
                noise = torch.ones(weights.depth, count, weights.head[0].shape[-2], device=hidden.device)
                self.given["noise"] = noise.transpose(0, 1)
                self.drawn = [one for one, t in zip(noise, each, strict=False) if t]
            self.steps = engine.Steps([self._step], graphs=True)

    def _step(self) -> None:
        self.found = depth_decode(
            self.hidden, self.codebook, self.weights, **self.settings, **self.given, return_logits=self.return_logits,
            backend="triton",
        )  # fmt: skip

    def run(
        self,
        hidden: Tensor,
        guidance: float | Tensor | None,
        given: dict[str, Any],
        generator: torch.Generator | None,
    ) -> DepthCodes:
        """What `depth_decode` makes of arguments of these shapes."""
        with torch.cuda.device_of(hidden):
            self.hidden.copy_(hidden)
            if isinstance(guidance, Tensor):
                self.settings["guidance"].copy_(guidance)
            for name, value in given.items():
                if value is not None:
                    self.given[name].copy_(value)
            for one in self.drawn:
                one.exponential_(generator=generator)
            self.steps.run(0)
            # The next call writes to the same memory.
            codes, total, unsound, logits = self.found
            return DepthCodes(codes.clone(), total.clone(), unsound.clone(), None if logits is None else logits.clone())


def _check_style(style: DepthStyle, dim: int, num_heads: int, depth: int, hidden_dim: int | None) -> None:
    """Raises ValueError unless the parts of a style exist and go together."""
    for name, known in (
        ("norm", NORMS),
        ("activation", tuple(ACTIVATIONS)),
        ("state", STATES),
        ("final_norm", ("shared", "per_depth", "none")),
    ):
        value = getattr(style, name)
        if value not in known:
            raise ValueError(f"DepthTransformer: style.{name} must be one of {', '.join(known)}, got {value!r}")
    if style.head_dim is None and dim % num_heads:
        raise ValueError(f"DepthTransformer: dim must be a multiple of num_heads {num_heads}, got {dim}")
    if style.kv_heads is not None and (style.kv_heads < 1 or num_heads % style.kv_heads):
        raise ValueError(f"DepthTransformer: style.kv_heads must divide num_heads {num_heads}, got {style.kv_heads}")
    if style.rope and (style.head_dim or dim // num_heads) % 2:
        raise ValueError(f"DepthTransformer: heads must be of even width with style.rope, got {dim // num_heads}")
    if style.states_per_depth and (style.state != "every" or hidden_dim is None):
        raise ValueError(
            "DepthTransformer: style.states_per_depth needs a state that is projected and enters at every depth, got "
            f"state {style.state!r} and hidden_dim {hidden_dim}"
        )
    length = style.form(depth).length(depth)
    if style.order:
        if not (style.blocks_per_depth or style.states_per_depth):
            raise ValueError(f"DepthTransformer: style.order needs weights for each depth to choose from, got {style}")
        if len(style.order) != length or set(style.order) != set(range(1 + max(style.order))):
            raise ValueError(
                f"DepthTransformer: style.order must have {length} entries that use every set, got {style.order}"
            )


def require_sound(function: str, unsound: Sequence[Tensor], first: int = 0) -> None:
    """Raises FloatingPointError if logits of any position were NaN; waits for the GPU to look.

    Args:
        function: whose error it is.
        unsound: for each position in turn (N,), as `DepthCodes` has it.
        first: number of the first of these positions.
    """
    found = torch.stack(list(unsound)).cpu() if unsound else torch.empty(0, 0)
    if (found >= 0).any():
        position, row = (found >= 0).nonzero()[0].tolist()
        raise FloatingPointError(
            f"{function}: logits must not be NaN, got some in picture {row} at position {first + position}, "
            f"depth {int(found[position, row])}"
        )
