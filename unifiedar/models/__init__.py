"""Published systems with their state_dict keys unchanged."""

from unifiedar.models.rqtransformer import RQLogits, RQTransformer, RQTransformerConfig
from unifiedar.models.rqvae import RQVAE, RQVAEConfig
from unifiedar.models.speech import CodePredictor, moshi_depformer, qwen3_tts_predictor
from unifiedar.models.var import VAR, VARConfig
from unifiedar.models.vilau import VILAU, VILAUConfig
from unifiedar.models.vqvae import VQVAE, VQVAEConfig

__all__ = [
    "RQVAE",
    "VAR",
    "VILAU",
    "VQVAE",
    "CodePredictor",
    "RQLogits",
    "RQTransformer",
    "RQTransformerConfig",
    "RQVAEConfig",
    "VARConfig",
    "VILAUConfig",
    "VQVAEConfig",
    "moshi_depformer",
    "qwen3_tts_predictor",
]
