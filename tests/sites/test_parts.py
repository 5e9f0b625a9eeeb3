"""What a part may hold, and under which names: frozen and shared tensors, formats of its own, children of
sites.
"""

from __future__ import annotations

import copy
import pickle
from collections.abc import Mapping
from typing import ClassVar, cast

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor, nn

import grafts
from grafts.lifecycle.registry import parts_of
from grafts.methods import AdapterConfig, ModulePart, Part, Place, Reference, _registry, config, method
from grafts.sites.attention import AttentionSite
from grafts.sites.input import InputSite
from grafts.sites.module import ModuleSite
from grafts.sites.setup import SITE_ATTRIBUTES, Rows, child_key
from grafts.sites.site import Site, sites_in
from helpers.attending import ARCHITECTURES
from helpers.bases import BY_NAME

LLAMA = BY_NAME["llama"]


@config
class CodebookConfig(AdapterConfig):
    peft_type = "CODEBOOK"


class CodebookPart(ModulePart):
    """One table of vectors for all layers, which the first part owns, and for each layer which row it
    adds.
    """

    frozen: ClassVar[frozenset[str]] = frozenset({"offsets"})
    own_dtypes: ClassVar[frozenset[str]] = frozenset({"offsets"})

    def __init__(self, place: Place) -> None:
        super().__init__()
        self.size = place.layer.out_features
        self.row = [other.path for other in place.others].index(place.path)
        self.scale = nn.Parameter(torch.ones(()))
        self.offsets = nn.Parameter(torch.full((1,), 0.5, dtype=torch.bfloat16), requires_grad=False)
        self.table: nn.Parameter | None = None
        if self.row == 0:
            self.table = nn.Parameter(torch.zeros(len(place.others), 64))
        self.first: Reference[CodebookPart] = Reference(self)

    def connect(self, parts: Mapping[str, Part]) -> None:
        self.first = Reference(cast("CodebookPart", next(iter(parts.values()))))

    def forward(self, x: Tensor, y: Tensor) -> Tensor:
        vector = self.first.module.table[self.row, : self.size] + self.offsets.float()
        return y + (self.scale * vector).to(y.dtype)


@pytest.fixture(autouse=True)
def codebook(monkeypatch: pytest.MonkeyPatch) -> None:
    _registry.methods()  # those that are imported later would be forgotten with the registry
    monkeypatch.setattr(_registry, "_registered", dict(_registry._registered))

    @method(
        "codebook",
        title="Codebook",
        config=CodebookConfig,
        layers={"linear"},
        default_roles=({"query", "query+key+value"},),
        inert=False,
        mergeable=False,
        source="none",
    )
    def build(config: CodebookConfig, place: Place) -> Part:
        return CodebookPart(place)


def with_codebook(dtype: torch.dtype = torch.float32) -> nn.Module:
    model = LLAMA.model(dtype)
    grafts.add(model, CodebookConfig(), name="en")
    with torch.no_grad():
        part_of(model).table.normal_()
    return model


def part_of(model: nn.Module, number: int = 0) -> CodebookPart:
    return cast("CodebookPart", parts_of(model, "en")[number][1])


def test_a_shared_tensor_is_counted_trained_and_saved_once(tmp_path) -> None:
    model = with_codebook()
    tables = [name for name, _ in model.named_parameters() if name.endswith("table")]
    assert len(tables) == 1
    planned = grafts.plan(LLAMA.model(), CodebookConfig())
    assert planned.parameters == 2 * 64 + 2  # what is frozen is not trained
    LLAMA.output(model).square().mean().backward()
    gradient = part_of(model).table.grad
    assert gradient[0].any()
    assert gradient[1].any()
    grafts.save(model, "en", tmp_path)
    saved = load_file(tmp_path / "adapter_model.safetensors")
    assert sum("table" in name for name in saved) == 1
    grafts.load(again := LLAMA.model(), tmp_path, name="en")
    assert torch.equal(part_of(again).table, part_of(model).table)
    assert part_of(again, 1).first.module is part_of(again)


@pytest.mark.parametrize("how", ["copy", "pickle"])
def test_a_reference_follows_copies_of_the_model(how: str) -> None:
    model = with_codebook()
    again = copy.deepcopy(model) if how == "copy" else pickle.loads(pickle.dumps(model))
    assert part_of(again, 1).first.module is part_of(again)
    assert part_of(again) is not part_of(model)
    with torch.no_grad():
        part_of(again).table.add_(1)
    assert not torch.equal(LLAMA.output(again), LLAMA.output(model))


def test_frozen_tensors_are_saved_and_never_trained(tmp_path) -> None:
    model = with_codebook()
    names = {name.rpartition(".")[2] for name, p in model.named_parameters() if p.requires_grad}
    assert names == {"scale", "table"}
    grafts.train_only(model, "en")
    assert not part_of(model).offsets.requires_grad
    with torch.no_grad():
        part_of(model, 1).offsets.fill_(2)
    grafts.save(model, "en", tmp_path)
    grafts.load(again := LLAMA.model(), tmp_path, name="en", train=True)
    assert part_of(again, 1).offsets.item() == 2
    assert not part_of(again, 1).offsets.requires_grad


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
def test_a_format_of_its_own_is_kept_on_every_base(dtype: torch.dtype, tmp_path) -> None:
    model = with_codebook(dtype)
    stored = torch.float64 if dtype == torch.float64 else torch.float32
    assert part_of(model).table.dtype == stored
    assert part_of(model).offsets.dtype == torch.bfloat16
    grafts.save(model, "en", tmp_path)
    grafts.load(again := LLAMA.model(dtype), tmp_path, name="en")
    assert part_of(again).offsets.dtype == torch.bfloat16
    assert LLAMA.output(again).dtype == dtype


def test_a_tensor_that_stands_twice_in_a_part_stays_one(tmp_path, monkeypatch: pytest.MonkeyPatch) -> None:
    class Twice(CodebookPart):
        def __init__(self, place: Place) -> None:
            super().__init__(place)
            self.again = nn.Module()
            self.again.scale = self.scale

    monkeypatch.setattr(f"{__name__}.CodebookPart", Twice)
    model = with_codebook()
    grafts.save(model, "en", tmp_path)
    grafts.load(again := LLAMA.model(), tmp_path, name="en")
    assert part_of(again).again.scale is part_of(again).scale
    assert not part_of(again).scale.is_meta


def public_attributes(site: Site) -> set[str]:
    known = set(dir(nn.Module())) | {"site"}
    return {name for name in {*dir(type(site)), *vars(site)} if not name.startswith("_")} - known


def test_names_of_attributes_of_sites_are_known() -> None:
    model = LLAMA.model()
    for number, text in enumerate(("lora", "prefix_tuning", "prompt_tuning")):
        grafts.add(model, text, name=f"a{number}")
    unfused = BY_NAME["sdpa"].model()
    grafts.add(unfused, "prefix_tuning", name="a")
    [bart] = [known.base.model() for known in ARCHITECTURES if known.base.name == "bart"]
    grafts.add(bart, "prompt_tuning", name="a")  # its positions come from a module of their own
    found: set[str] = set()
    kinds = set()
    for root in (model, unfused, bart):
        for _, site in sites_in(root):
            kinds.add(type(site))
            found |= public_attributes(site)
    assert kinds == {ModuleSite, AttentionSite, InputSite}
    assert found - {"a", "a0", "a1", "a2"} == SITE_ATTRIBUTES


@pytest.mark.parametrize("name", sorted(SITE_ATTRIBUTES))
def test_an_adapter_may_be_called_like_an_attribute_of_a_site(name: str) -> None:
    assert child_key(name) == f"%{name}"
    model = LLAMA.model()
    for text in ("lora", "prefix_tuning", "prompt_tuning"):
        grafts.add(model, text, name=name)
        changed = LLAMA.output(model)
        assert changed.shape == LLAMA.output(LLAMA.model()).shape
        grafts.delete(model, name)
    assert torch.equal(LLAMA.output(model), LLAMA.output(LLAMA.model()))


class Table(ModulePart):
    """Stands in place of a module, and gives a tensor that it keeps."""

    when = "instead"

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("kept", torch.ones(2, 3, 16), persistent=False)

    def forward(self, *args: Tensor) -> Tensor:
        return self.kept


class ThroughWeights(ModulePart):
    """Doubles a module's weight for each call."""

    when = "weights"

    def merged(self, tensors: Mapping[str, Tensor], base: Mapping[str, Tensor]) -> Mapping[str, Tensor]:
        return {"weight": 2 * tensors["weight"]}


def at_head(part: Part) -> nn.Linear:
    """A linear with this part of an active adapter "en", and with LoRA of a second one behind it."""
    model = nn.Sequential(nn.Linear(16, 16)).eval()
    grafts.add(model, "lora[target_modules='all-linear']", name="de")
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora_B" in name:
                parameter.normal_()
    [(host, site)] = sites_in(model)
    site.append("en", part, host)
    site.setup.set(active=("en", "de"))
    return model


def test_what_stands_in_place_of_a_module_is_not_written_into() -> None:
    part = Table()
    model = at_head(part)
    with torch.no_grad():
        output = model(torch.randn(2, 3, 16))
    assert not torch.equal(output, part.kept)
    assert torch.equal(part.kept, torch.ones(2, 3, 16))


def test_a_part_that_acts_through_weights_cannot_act_on_some_rows() -> None:
    model = at_head(ThroughWeights())
    x = torch.randn(2, 3, 16)
    site = next(site for _, site in sites_in(model))
    site.setup.rows = Rows(["en", None])
    with pytest.raises(grafts.StateError, match="acts through the weights of its module"):
        model(x)
