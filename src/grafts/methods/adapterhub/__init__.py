"""How AdapterHub names the config and the tensors of each method: one file a method that it has too.

Imported where a file of that layout is read or written, and not before: it knows all of these methods.
"""

from grafts.methods.adapterhub import bottleneck, ia3, lora, prefix_tuning, prompt_tuning, reft
from grafts.methods.adapterhub._layout import (
    HubModel,
    config_from,
    joined_config,
    joined_values,
    layout_of,
    wants_module_of_embeddings,
)

__all__ = [
    "HubModel",
    "bottleneck",
    "config_from",
    "ia3",
    "joined_config",
    "joined_values",
    "layout_of",
    "lora",
    "prefix_tuning",
    "prompt_tuning",
    "reft",
    "wants_module_of_embeddings",
]
