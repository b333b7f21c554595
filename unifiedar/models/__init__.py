"""Published systems with their state_dict keys unchanged."""

from unifiedar.models.vilau import VILAU, VILAUConfig

__all__ = ["VILAU", "VILAUConfig"]
