"""`AdapterMethod`: the kinds of method that an interface speaks of."""

from __future__ import annotations

from grafts.config import AdapterConfig
from grafts.methods._presets import config_from
from grafts.methods._registry import method_of
from grafts.methods.bottleneck import BnConfig
from grafts.structure.interface import InterfaceMethod


class AdapterMethod(InterfaceMethod):
    """The names that ``adapter_methods`` of an interface holds."""

    @staticmethod
    def get_from_config(config: AdapterConfig | str) -> list[str]:
        """The methods that a config needs: of a union several, and a bottleneck may have an invertible
        adapter.

        >>> AdapterMethod.get_from_config("seq_bn_inv|lora")
        ['bottleneck', 'invertible', 'lora']
        """
        config = config_from(config)
        method = method_of(config)
        if method.members is None:
            names = [method.name]
            if isinstance(config, BnConfig) and config.inv_adapter is not None:
                names.append(AdapterMethod.invertible)
            return names
        names = []
        for member in method.members(config):
            names += AdapterMethod.get_from_config(member)
        return list(dict.fromkeys(names))
