"""The parts of the projections inside an `nn.MultiheadAttention`."""

from __future__ import annotations

from collections.abc import Mapping

from torch import Tensor, nn

from grafts.errors import ConfigError, UnsupportedTargetError
from grafts.sites.module import ModulePart
from grafts.sites.site import Part


class MultiheadPart(ModulePart):
    """A method's parts for the projections inside `nn.MultiheadAttention`, which reads its weights and calls
    no layer.

    Attributes:
        in_proj: the part for the fused projection of queries, keys and values.
        out_proj: the part for the output projection.
    """

    when = "weights"
    routable = False

    def __init__(self, in_proj: Part, out_proj: Part) -> None:
        super().__init__()
        self.in_proj = in_proj
        self.out_proj = out_proj
        for part in (in_proj, out_proj):
            if any(isinstance(module, nn.Dropout) for module in part.modules()):
                raise ConfigError(
                    "nn.MultiheadAttention is adapted through its weights, where there is no place for "
                    "dropout"
                )
            if not isinstance(part, ModulePart) or part.when != "after":
                raise ConfigError(
                    "nn.MultiheadAttention is adapted through its weights, where only what acts behind a "
                    "projection has a place"
                )

    @staticmethod
    def projections(host: nn.Module) -> tuple[nn.Linear, nn.Linear]:
        """The two projections as linears that share the host's parameters.

        Raises:
            UnsupportedTargetError: queries, keys and values have different sizes, and so separate weights.
        """
        assert isinstance(host, nn.MultiheadAttention)
        if host.in_proj_weight is None:
            raise UnsupportedTargetError(
                "nn.MultiheadAttention with other sizes of keys or values has no fused projection"
            )
        fused = nn.Linear(
            host.embed_dim, 3 * host.embed_dim, bias=host.in_proj_bias is not None, device="meta"
        )
        fused._parameters.update(weight=host.in_proj_weight, bias=host.in_proj_bias)
        return fused, host.out_proj

    def components(self) -> Mapping[str, Part]:
        """The two parts, by the prefix of their names in files."""
        return {"": self.in_proj, "base_layer.out_proj.": self.out_proj}

    def from_base(self, host: nn.Module, *, fresh: bool) -> None:
        """For each projection."""
        for part, projection in zip((self.in_proj, self.out_proj), self.projections(host), strict=True):
            part.from_base(projection, fresh=fresh)

    def file_tensors(self) -> Mapping[str, Tensor]:
        """Those of both."""
        tensors = {}
        for prefix, part in self.components().items():
            for name, tensor in part.file_tensors().items():
                tensors[prefix + name] = tensor
        return tensors

    def merged(self, tensors: Mapping[str, Tensor], base: Mapping[str, Tensor]) -> Mapping[str, Tensor]:
        """Each projection's weight and bias with its part folded in."""
        result = {}
        for part, prefix in ((self.in_proj, "in_proj_"), (self.out_proj, "out_proj.")):
            merged = part.merged(_of_projection(tensors, prefix), _of_projection(base, prefix))
            for name, tensor in merged.items():
                result[prefix + name] = tensor
        return result


def _of_projection(tensors: Mapping[str, Tensor], prefix: str) -> dict[str, Tensor]:
    """The weight and the bias of one projection, among the tensors of `nn.MultiheadAttention`."""
    of_projection = {}
    for name in ("weight", "bias"):
        if prefix + name in tensors:
            of_projection[name] = tensors[prefix + name]
    return of_projection
