"""Small VARs whose weights and inputs follow from names by the rule of `vilau_small`, for parity tests."""

from autoencoder_small import VQ, vqvae
from torch import Tensor
from vilau_small import integers, weights

from unifiedar.models import VAR, VARConfig

# One projection of the condition a block or one for all, and attention without its norm.
CONFIGS = {
    "blocks": VARConfig(3, 64, 2, (1, 2, 3), num_classes=10, num_codes=VQ.num_codes, code_dim=VQ.dim),
    "shared": VARConfig(2, 96, 3, (1, 2, 3), 10, VQ.num_codes, VQ.dim, shared_adaln=True),
    "raw": VARConfig(2, 64, 2, (1, 2, 3), 10, VQ.num_codes, VQ.dim, l2_norm=False, mlp_ratio=3.0),
}
# What the published generation was run with: cfg, top_k, top_p, seed, more_smooth, labels.
DRAWS = {
    "free": (1.5, 0, 0.0, 0, False, (3, 10)),
    "cut": (4.0, 30, 0.9, 7, False, (0, 9, 4)),
    "smooth": (3.0, 30, 0.95, 5, True, (1, 2)),
    "unguided": (0.0, 5, 0.0, 2, False, (6,)),
}
EDITS = {
    "inside": (3.0, 40, 0.95, 0, True, (10, 10)),
    "outside": (4.0, 40, 0.95, 1, False, (2, 5)),
}
BOX = (0.3, 0.3, 0.7, 1.0)


def var_weights(model: VAR) -> dict[str, Tensor]:
    """A whole state_dict: buffers as they are."""
    state, fixed = model.state_dict(), dict(model.named_buffers())
    made = weights({name: value for name, value in state.items() if name not in fixed}, True)
    return {name: made.get(name, value) for name, value in state.items()}


def var(config: VARConfig = CONFIGS["blocks"]) -> VAR:
    """In eval mode, with its tokenizer."""
    model = VAR(config, vqvae()).eval().requires_grad_(False)
    model.load_state_dict(var_weights(model))
    return model


def given_codes() -> list[Tensor]:
    """Of two pictures, for every scale."""
    return [integers(f"var.codes{n}", VQ.num_codes, 2, n * n) for n in (1, 2, 3)]
