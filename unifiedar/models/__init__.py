"""Published systems with their state_dict keys unchanged."""

from unifiedar.models.rqtransformer import RQLogits, RQTransformer, RQTransformerConfig
from unifiedar.models.vilau import VILAU, VILAUConfig

__all__ = ["VILAU", "RQLogits", "RQTransformer", "RQTransformerConfig", "VILAUConfig"]
