"""Stand-ins for RQ-Transformer, VILA-U's depth head and what they ask of a tokenizer: names and arithmetic, anew."""

import itertools
import types

import torch
from published_var import publish
from torch import nn

__all__ = ["Head", "Sampler", "Tokenizer", "head", "sampler"]


class MultiSelfAttention(nn.Module):
    def __init__(self, dim, heads):
        super().__init__()
        self.key, self.query, self.value, self.proj = (nn.Linear(dim, dim) for _ in range(4))
        self.attn_drop, self.resid_drop = nn.Dropout(0.0), nn.Dropout(0.1)
        self.n_head, self.mask = heads, True

    def forward(self, x, past=None):
        q, k, v = (
            layer(x).unflatten(-1, (self.n_head, -1)).transpose(1, 2) for layer in (self.query, self.key, self.value)
        )
        before = 0 if past is None else past[0].shape[2]
        if past is not None:
            k, v = torch.cat([past[0], k], 2), torch.cat([past[1], v], 2)
        scores = q @ (k.mT * q.shape[-1] ** -0.5)
        hidden = torch.ones(scores.shape[-2:], dtype=torch.bool, device=x.device).triu(before + 1)
        y = self.attn_drop(scores.masked_fill(hidden, -torch.inf).softmax(-1)) @ v
        return self.resid_drop(self.proj(y.transpose(1, 2).flatten(2))), (k, v)


class AttentionBlock(nn.Module):
    def __init__(self, dim, heads):
        super().__init__()
        self.ln1, self.ln2, self.attn = nn.LayerNorm(dim), nn.LayerNorm(dim), MultiSelfAttention(dim, heads)
        self.mlp = nn.Sequential(nn.Linear(dim, 4 * dim), nn.GELU(), nn.Linear(4 * dim, dim), nn.Dropout(0.1))
        self.past = None

    def forward(self, x, cached=False):
        y, past = self.attn(self.ln1(x), self.past if cached else None)
        if cached:
            self.past = past
        x = x + y
        return x + self.mlp(self.ln2(x))


class BodyBlock(AttentionBlock):
    """The same of the other file."""


class Stack(nn.Module):
    def __init__(self, kind, layers, dim, heads):
        super().__init__()
        self.blocks = nn.ModuleList(kind(dim, heads) for _ in range(layers))

    def forward(self, x, cached=False):
        for block in self.blocks:
            x = block(x, cached)
        return x

    def forget(self):
        for block in self.blocks:
            block.past = None


def cut(logits, temperature, top_k, top_p):
    """Probabilities to draw from, as both draw."""
    logits = logits.float() / temperature
    logits = logits.masked_fill(logits < logits.topk(top_k)[0][:, -1:], -torch.inf)
    if logits.isnan().any():
        print("WARNING... NaN observed")
        logits = logits.masked_fill(logits.isnan(), -torch.inf)
    p = logits.softmax(-1)
    ordered, index = p.sort(-1, descending=True)
    beyond = (ordered.cumsum(-1) >= top_p).roll(1, -1)
    beyond[:, 0] = False
    p = p.masked_fill(beyond.scatter(-1, index, beyond), 0)
    return p / p.sum(-1, keepdim=True)


def draw(*settings):
    return torch.multinomial(cut(*settings), 1)[:, 0]


def classifier(dim, count):
    layers = nn.Sequential()
    layers.add_module("layer_norm", nn.LayerNorm(dim))
    layers.add_module("linear", nn.Linear(dim, count))
    return layers


class Tokenizer(nn.Module):
    """Codebooks with a padding row each, one for all depths or one for each."""

    def __init__(self, depth=4, count=40, dim=6, shared=True):
        super().__init__()
        books = [nn.Embedding(count + 1, dim, padding_idx=count) for _ in range(1 if shared else depth)]
        self.quantizer = nn.Module()
        self.quantizer.codebooks = nn.ModuleList(books * depth if shared else books)
        self.asked = 0

    @torch.no_grad()
    def get_code_emb_with_depth(self, code):
        self.asked += 1
        return torch.stack([book(code[..., d]) for d, book in enumerate(self.quantizer.codebooks)], -2), None


class Sampler(nn.Module):
    """RQ-Transformer."""

    def __init__(self, grid=(2, 3), depth=4, count=40, classes=5, length=1, dim=32, heads=2, body=3, code_dim=6):
        super().__init__()
        switches = ("input_emb_vqvae", "head_emb_vqvae", "cumsum_depth_ctx", "shared_cls_emb")
        self.config = types.SimpleNamespace(**dict.fromkeys(switches, True))
        self.block_size, self.vocab_size = torch.Size((*grid, depth)), [count] * depth
        self.vocab_size_cond, self.block_size_cond = classes, length
        self.cond_emb = nn.Embedding(classes, dim)
        self.input_mlp, self.head_mlp = nn.Linear(code_dim, dim), nn.Linear(code_dim, dim)
        self.pos_emb_cond = nn.Parameter(torch.zeros(1, length, dim))
        self.pos_emb_hw = nn.Parameter(torch.zeros(1, grid[0] * grid[1], dim))
        self.pos_emb_d = nn.Parameter(torch.zeros(1, depth, dim))
        self.embed_drop = nn.Dropout(0.0)
        self.body_transformer, self.head_transformer = (
            Stack(BodyBlock, body, dim, heads),
            Stack(BodyBlock, 2, dim, heads),
        )
        self.classifier = classifier(dim, count)
        if length > 1:
            self.cond_classifier = classifier(dim, classes)
        self._cache, self.steps = None, 0

    def embed_with_model_aux(self, xs, model_aux):
        return model_aux.get_code_emb_with_depth(xs)[0]

    def _inputs(self, xs, model_aux, cond):
        xs = xs.flatten(1, 2)
        if cond is None:
            cond = torch.zeros(len(xs), self.block_size_cond, dtype=torch.int64, device=xs.device)
        e = self.embed_with_model_aux(xs, model_aux)
        first = self.cond_emb(cond.reshape(len(xs), -1)) + self.pos_emb_cond
        body = torch.cat([first, self.input_mlp(e).sum(-2) + self.pos_emb_hw[:, : xs.shape[1]]], 1)
        return body, self.head_mlp(e.cumsum(-2))

    def forward(self, xs, model_aux=None, cond=None, amp=False):
        body, sums = self._inputs(xs, model_aux, cond)
        states = self.body_transformer(self.embed_drop(body[:, :-1]))
        begin = self.block_size_cond - 1
        x = torch.cat([states[:, begin:, None], sums[:, :, :-1]], 2) + self.pos_emb_d
        logits = self.classifier(self.head_transformer(x.flatten(0, 1))).view(*xs.shape, -1)
        return (logits, self.cond_classifier(states[:, :begin])) if begin else logits

    @torch.no_grad()
    def cached_forward(self, xs, model_aux=None, cond=None, amp=False, sample_loc=(0, 0, 0)):
        self.steps += 1
        h, w, d = sample_loc
        at = h * xs.shape[2] + w
        with torch.autocast("cuda", torch.float16, enabled=amp and xs.is_cuda):
            body, sums = self._inputs(xs, model_aux, cond)
            if d == 0:
                body = body[:, : self.block_size_cond + at]
                if self._cache["spatial_ctx_hw"] is not None:
                    body = body[:, -1:]
                self._cache["spatial_ctx_hw"] = self.body_transformer(body, True)[:, -1:]
                self.head_transformer.forget()
            x = self._cache["spatial_ctx_hw"] if d == 0 else sums[:, at, d - 1 : d]
            return self.classifier(self.head_transformer(x + self.pos_emb_d[:, d : d + 1], True)).flatten(1)

    def init_cache(self):
        self._cache = {"spatial_ctx_hw": None}
        self.body_transformer.forget()
        self.head_transformer.forget()

    @torch.no_grad()
    def sample(
        self, partial_sample, model_aux=None, cond=None, start_loc=(0, 0), temperature=1.0, top_k=None, top_p=None,
        amp=False, cached=True, is_tqdm=False, desc="Sampling", fast=True,
    ):  # fmt: skip
        assert self.block_size == partial_sample.shape[1:]
        depth = self.block_size[2]

        def each(value, single, most):
            if value is None:
                return [most] * depth
            values = [value] if isinstance(value, single) else list(value)
            return [min(one, most) for one in (values * depth if len(values) == 1 else values)]

        ks, ps = each(top_k, int, self.vocab_size[0]), each(top_p, float, 1.0)
        xs = partial_sample.clone()
        self.init_cache()
        for h, w, d in itertools.product(*map(range, self.block_size)):
            if (h, w) < tuple(start_loc):
                continue
            if cached:
                logits = self.cached_forward(xs[:, : h + 1], model_aux, cond, amp, (h, w, d))
            else:
                logits = self(xs, model_aux, cond)[:, h, w, d]
            xs[:, h, w, d] = draw(logits, temperature, ks[d], ps[d])
        self.init_cache()
        return xs


class Head(nn.Module):
    """VILA-U's depth head."""

    def __init__(self, depth=4, count=920, hidden_dim=20, code_dim=6, dim=32, heads=2, layers=2):
        super().__init__()
        self.in_mlp_1, self.in_mlp_2 = nn.Linear(code_dim, dim), nn.Linear(hidden_dim, dim)
        self.head_transformer = Stack(AttentionBlock, layers, dim, heads)
        self.pos_emb_d = nn.Parameter(torch.zeros(1, depth, dim))
        self.classifier_mlp = classifier(dim, count)
        self.steps = 0

    def embed_with_model_aux(self, code, model_aux):
        return model_aux.get_code_emb_with_depth(code)[0]

    def _states(self, hidden, sums):
        x = torch.cat([self.in_mlp_2(hidden).unsqueeze(2), self.in_mlp_1(sums)], 2)
        return self.head_transformer((x + self.pos_emb_d[:, : x.shape[2]]).flatten(0, 1))

    def forward(self, embed_from_body, code, model_aux=None):
        sums = self.embed_with_model_aux(code, model_aux).cumsum(-2)
        return self.classifier_mlp(self._states(embed_from_body, sums[:, :, :-1])).view(*code.shape, -1)

    def generate(self, embed_from_body, model_aux=None, cfg=3.0):
        depth, half = self.pos_emb_d.shape[1], len(embed_from_body) // 2
        code = torch.zeros(len(embed_from_body), 1, depth, dtype=torch.int64, device=embed_from_body.device)
        for d in range(depth):
            self.steps += 1
            sums = self.embed_with_model_aux(code, model_aux).cumsum(-2)
            logits = self.classifier_mlp(self._states(embed_from_body, sums[:, :, :d])[:, -1])
            mixed = logits[half:] + cfg * (logits[:half] - logits[half:])
            code[:, 0, d] = draw(mixed, 1.0, 900, 0.96).repeat(2)
        return self.embed_with_model_aux(code, model_aux).cumsum(-2)[:, :, -1], code


publish(BodyBlock, "AttentionBlock", "rq_stand_in.attentions")
publish(Sampler, "RQTransformer", "rq_stand_in.transformers")
publish(AttentionBlock, "AttentionBlock", "vilau_stand_in.attention")
publish(Head, "RQTransformer", "vilau_stand_in.modeling_rqtransformer")


@torch.no_grad()
def _randomize(module):
    for one in module.parameters():
        one.normal_(std=one.shape[-1] ** -0.5 if one.ndim == 2 else 0.4)
    return module.eval()


def sampler(cls=Sampler, seed=0, **options):
    """With weights of a size that matters, in eval mode."""
    torch.manual_seed(seed)
    return _randomize(cls(**options))


def head(cls=Head, seed=0, **options):
    """As `sampler`."""
    torch.manual_seed(seed)
    return _randomize(cls(**options))
