"""A checkpoint as transformers reads it: its config, and its model without weights.

Imports torch and transformers inside functions only. Given a config and tensors' names and
shapes, it finds out what transformers' own loader does with them: its renaming rules, its merging
of experts into stacked parameters, its lists of tensors that it does not read. A family's
`[transformers]` table says where its published config differs from what transformers reads.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from copy import deepcopy
from dataclasses import dataclass
from typing import Any

from shardsurgeon.checkpoint.config import QUANTIZATION_KEYS, config_section
from shardsurgeon.checkpoint.quantization_schemes import Shape
from shardsurgeon.errors import UsageError, install
from shardsurgeon.families.schema import Family, TransformersView

OPTION = "--architecture"
_INSTALL = install("architecture")
_OTHERWISE = "verify without it"
_SPELLED_FLOAT = "__float__"

Known = Callable[[object], bool]


@dataclass(frozen=True, slots=True)
class LoadResult:
    """How tensors fit a model. All names but `surplus` and `unread` are the model's own.

    filled: parameters and buffers that got a tensor; missing: those that got none; mismatched:
    name → (shape given, shape expected); conversion_errors: name → why it cannot be made of its
    parts; surplus: tensors, renamed by transformers' rules, that the model has no place for;
    unread: those that the model is known not to read.
    """

    filled: frozenset[str]
    missing: frozenset[str]
    mismatched: Mapping[str, tuple[Shape, Shape]]
    conversion_errors: Mapping[str, str]
    surplus: frozenset[str]
    unread: frozenset[str]


def is_known(model_type: object) -> bool:
    """Whether transformers has a config of this model type."""
    return model_type in _engine().configs


def engine_name() -> str:
    """`transformers 5.23.0`. Raises UsageError where it is not installed."""
    return f"transformers {_engine().transformers.__version__}"


class MetaModel:
    """One model on the meta device."""

    def __init__(
        self,
        config: Mapping[str, Any],
        where: str,
        *,
        attention: str | None = "eager",
        dtype: str = "float32",
    ) -> None:
        """Build the model of a config that transformers can read.

        attention: its implementation, None for the one that transformers would choose; dtype:
        of its parameters. Raises UsageError where transformers cannot build it; where: the
        checkpoint, for that message.
        """
        self._engine = engine = _engine()
        with silence_hub():
            try:
                self._model = _build(engine, config, attention, dtype)
            # The code of a model type checks its config, and may raise anything.
            except Exception as error:
                raise _cannot(where, f"{type(error).__name__}: {error}") from error
        if self._model is None:
            raise _cannot(where, f"it has no model for model type {config.get('model_type')!r}")
        self._expected = {
            name: tuple(parameter.shape) for name, parameter in self._model.state_dict().items()
        }

    @property
    def model(self) -> Any:
        """The model itself, on the meta device."""
        return self._model

    @property
    def model_class(self) -> str:
        """Name of the class that was built."""
        return type(self._model).__name__

    @property
    def expected(self) -> Mapping[str, Shape]:
        """Name → shape of every parameter and buffer that a checkpoint must have."""
        return self._expected

    def fit(self, shapes: Mapping[str, Shape]) -> LoadResult:
        """What transformers' loader makes of tensors with these names and shapes."""
        engine, model = self._engine, self._model
        meta = {shape: _meta(engine.torch, shape) for shape in set(shapes.values())}
        with silence_hub():
            rules = self.rules()
            for rule in rules:
                if isinstance(rule, engine.WeightConverter):
                    # Very large tensors go by way of the processor; these have no numbers.
                    rule.force_cpu = False
            settings = engine.LoadStateDictConfig(
                device_map={"": "meta"}, dtype=engine.torch.bfloat16, weight_mapping=rules
            )
            info, _ = engine.convert_and_load_state_dict_in_model(
                model, {name: meta[shape] for name, shape in shapes.items()}, settings
            )
            filled = frozenset(self._expected.keys() - info.missing_keys)
            model.tie_weights(missing_keys=info.missing_keys, recompute_mapping=False)
            missing = frozenset(info.missing_keys - info.conversion_errors.keys())
            unexpected = frozenset(info.unexpected_keys)
            model._adjust_missing_and_unexpected_keys(info)
        return LoadResult(
            filled=filled,
            missing=missing,
            mismatched={
                name: (tuple(given), tuple(expected))
                for name, given, expected in info.mismatched_keys
            },
            conversion_errors={
                name: _reason(text) for name, text in info.conversion_errors.items()
            },
            surplus=frozenset(info.unexpected_keys),
            unread=unexpected - info.unexpected_keys,
        )

    def rules(self) -> list[Any]:
        """transformers' rules that turn a checkpoint's names into parameters, then our own."""
        return [*self._engine.get_model_conversion_mapping(self._model), *self._layouts()]

    def _layouts(self) -> list[Any]:
        """Rules for experts stored one by one, or with `.weight`, where the model stacks them.

        They come after the model's own rules, which win. Quantized versions of families that
        publish stacked experts are stored like this, and serving engines read both layouts.
        """
        if not any(name.endswith(".experts.gate_up_proj") for name in self._expected):
            return []
        engine = self._engine
        merge = engine.MergeModulelist(dim=0)
        # Some models hold their stacked experts input by output.
        turn = engine.Transpose(1, 2, check_dims=True)
        gate_up = [merge, engine.Concatenate(dim=1), turn]
        one_by_one = "experts.*.{}.weight".format
        return [
            engine.WeightConverter(
                [one_by_one("gate_proj"), one_by_one("up_proj")], "experts.gate_up_proj", gate_up
            ),
            engine.WeightConverter(one_by_one("down_proj"), "experts.down_proj", [merge, turn]),
            *(
                engine.WeightRenaming(rf"\.experts\.{name}\.weight$", rf".experts.{name}")
                for name in ("gate_up_proj", "down_proj")
            ),
        ]


@dataclass(frozen=True)
class _Engine:
    """The parts of torch and transformers that are used here."""

    torch: Any
    transformers: Any
    configs: Any
    auto: Any
    convert_and_load_state_dict_in_model: Any
    get_model_conversion_mapping: Any
    LoadStateDictConfig: Any
    WeightRenaming: Any
    WeightConverter: Any
    MergeModulelist: Any
    Concatenate: Any
    Transpose: Any


def _engine() -> _Engine:
    """Import it. Raises UsageError where it is not installed, or too old."""
    try:
        import torch
        import transformers
    except ImportError as error:
        problem = f"needs torch and transformers; {error.name} is not installed"
        raise UsageError(OPTION, problem, _INSTALL) from error
    try:
        from transformers import conversion_mapping, core_model_loading, modeling_utils
        from transformers.models.auto import configuration_auto, modeling_auto

        return _Engine(
            torch=torch,
            transformers=transformers,
            configs=configuration_auto.CONFIG_MAPPING,
            auto=modeling_auto,
            convert_and_load_state_dict_in_model=(
                core_model_loading.convert_and_load_state_dict_in_model
            ),
            get_model_conversion_mapping=conversion_mapping.get_model_conversion_mapping,
            LoadStateDictConfig=modeling_utils.LoadStateDictConfig,
            WeightRenaming=core_model_loading.WeightRenaming,
            WeightConverter=core_model_loading.WeightConverter,
            MergeModulelist=core_model_loading.MergeModulelist,
            Concatenate=core_model_loading.Concatenate,
            Transpose=core_model_loading.Transpose,
        )
    except (ImportError, AttributeError) as error:
        problem = f"{transformers.__version__} is installed, and 5.23 is what is known ({error})"
        raise UsageError("transformers", problem, _INSTALL) from error


def _build(engine: _Engine, config: Mapping[str, Any], attention: str | None, dtype: str) -> Any:
    """The model of a config on the meta device, None where transformers has no class for it."""
    settings = engine.configs[config["model_type"]].from_dict(_buildable(config))
    model_class = _class_of(engine, settings)
    if model_class is None:
        return None
    settings._attn_implementation = attention
    _give_dtype(settings, dtype)
    before = engine.torch.get_default_dtype()
    engine.torch.set_default_dtype(getattr(engine.torch, dtype))
    try:
        with engine.torch.device("meta"):
            return model_class(settings)
    finally:
        engine.torch.set_default_dtype(before)


def _give_dtype(settings: Any, dtype: str) -> None:
    """Set the dtype in the config and in its parts: models inside it go by their own."""
    settings.dtype = dtype
    for name in settings.sub_configs:
        inner = getattr(settings, name, None)
        if inner is not None:
            _give_dtype(inner, dtype)


def _class_of(engine: _Engine, settings: Any) -> Any:
    """The class that `architectures` names, if it takes this config; else the one for text."""
    for name in settings.architectures or ():
        named = getattr(engine.transformers, name, None)
        if getattr(named, "config_class", None) is type(settings):
            return named
    for mapping in (
        engine.auto.MODEL_FOR_CAUSAL_LM_MAPPING,
        engine.auto.MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING,
    ):
        if type(settings) in mapping:
            return mapping[type(settings)]
    return None


def _buildable(node: Any) -> Any:
    """The config without quantization, remote code and the choice of attention kernels.

    Infinity is a number again: transformers writes it as an object, and reads that from files.
    """
    if isinstance(node, list):
        return [_buildable(value) for value in node]
    if not isinstance(node, Mapping):
        return node
    if node.keys() == {_SPELLED_FLOAT}:
        return float(node[_SPELLED_FLOAT])
    left_out = (*QUANTIZATION_KEYS, "auto_map")
    return {
        key: _buildable(value)
        for key, value in node.items()
        if key not in left_out and not key.endswith("attn_implementation")
    }


@contextmanager
def silence_hub() -> Iterator[None]:
    """Silence transformers' progress bars and warnings, which are about loading a whole model."""
    logging = _engine().transformers.utils.logging
    verbosity, bars = logging.get_verbosity(), logging.is_progress_bar_enabled()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        logging.set_verbosity_error()
        logging.disable_progress_bar()
        try:
            yield
        finally:
            logging.set_verbosity(verbosity)
            if bars:
                logging.enable_progress_bar()


def _meta(torch: Any, shape: Shape) -> Any:
    return torch.empty(shape, dtype=torch.bfloat16, device="meta")


def _reason(text: str) -> str:
    """The last line of the error that transformers noted for a conversion, without traceback."""
    before = text.rpartition("\nError")[0] or text
    return before.strip().splitlines()[-1]


def _cannot(where: str, reason: str) -> UsageError:
    name = engine_name()
    return UsageError(OPTION, f"{name} cannot build {where}: {reason}", _OTHERWISE)


def as_transformers_reads(
    config: Mapping[str, Any], view: TransformersView, known: Known
) -> dict[str, Any] | None:
    """The config as transformers can read it, or None where it has no such model.

    known: whether transformers has a config of a model type; it may mean another model by it.
    """
    if view.unknown:
        return None
    read: dict[str, Any] = _retyped(deepcopy(dict(config)), dict(view.model_types), known)
    for source, target in view.config_keys:
        _copy(read, source, target)
    section = config_section(read, view.text)
    if not known(read.get("model_type")) and section is not None:
        read = dict(section)
    if not known(read.get("model_type")):
        return None
    if view.within and read["model_type"] != view.within:
        return {"model_type": view.within, "text_config": read}
    return read


def name_in_transformers(name: str, view: TransformersView) -> str:
    """A published tensor name as transformers' own rules expect it."""
    for published, own in view.tensor_names:
        name = name.replace(published, own)
    return name


def identity_experts(config: Mapping[str, Any], family: Family) -> int:
    """How many experts without weights the config counts in addition to the others."""
    key = family.config.extra_rows
    for at in family.config.at:
        count = (config_section(config, at) or {}).get(key)
        if isinstance(count, int):
            return count
    return 0


def _retyped(node: Any, names: Mapping[str, str], known: Known) -> Any:
    """The config with every model type that transformers lacks replaced by the one it has."""
    if isinstance(node, dict):
        node = {key: _retyped(value, names, known) for key, value in node.items()}
        own = node.get("model_type")
        if own in names and not known(own):
            node["model_type"] = names[own]
    return node


def _copy(config: dict[str, Any], source: str, target: str) -> None:
    """Copy the value at one dotted path, if there is one, to another path."""
    outer, _, key = source.rpartition(".")
    section = config_section(config, outer)
    if section is None or key not in section:
        return
    outer, _, name = target.rpartition(".")
    place = config_section(config, outer)
    if isinstance(place, dict):
        place[name] = section[key]
