"""`AdapterMethod`: the kinds of method that an interface speaks of."""

from __future__ import annotations

from grafts.config import AdapterConfig
from grafts.methods._presets import config_from
from grafts.methods._registry import method_of
from grafts.methods.union import UnionConfig


class AdapterMethod:
    """The names that ``adapter_methods`` of an interface holds."""

    bottleneck = "bottleneck"
    prefix_tuning = "prefix_tuning"
    lora = "lora"
    prompt_tuning = "prompt_tuning"
    reft = "reft"
    invertible = "invertible"

    @staticmethod
    def get_from_config(config: AdapterConfig | str) -> list[str]:
        """The methods that a config needs: of a union several, and a bottleneck may have an invertible
        adapter.

        >>> AdapterMethod.get_from_config("seq_bn_inv|lora")
        ['bottleneck', 'invertible', 'lora']
        """
        made = config_from(config)
        if isinstance(made, UnionConfig):
            return list(
                dict.fromkeys(name for one in made.configs for name in AdapterMethod.get_from_config(one))
            )
        inverts = getattr(made, "inv_adapter", None) is not None
        return [method_of(made).name, *([AdapterMethod.invertible] if inverts else [])]
