"""The classes that transformers has for a config: of the config itself and of the model.

As transformers' own Auto classes choose them, but for one thing: where no class is asked for, it is
the one that the config's `architectures` names, so that a model that sees stays one.
"""

from __future__ import annotations

from collections.abc import Mapping
from copy import deepcopy
from typing import Any

from shardsurgeon.errors import ConfigError

# Where the class has another name in transformers: what sees more before what sees less.
_AUTO = (
    "AutoModelForImageTextToText",
    "AutoModelForCausalLM",
    "AutoModelForSeq2SeqLM",
    "AutoModel",
)


class ModelClasses:
    """What is built of one config.

    config: the class of its config; model: the class of its model.
    """

    def __init__(
        self,
        settings: Mapping[str, Any],
        place: str,
        found: Mapping[str, Any],
        wanted: Any = None,
        trust_remote_code: bool | None = None,
    ) -> None:
        """settings: the config; place: the folder or repository with the model's own code; found:
        what transformers has to be told to find it there; wanted: a class of a model, or an Auto
        class, None for the config's own; trust_remote_code: as `from_pretrained` takes it.

        Raises ConfigError where transformers has no such class, ValueError where the model has code
        of its own that is not trusted.
        """
        self._settings, self._place, self._found = settings, place, found
        self._trusted = trust_remote_code
        self._remote: Mapping[str, Any] = settings.get("auto_map") or {}
        self.config = self._config_class()
        self.model = self._model_class(wanted)

    def make_config(
        self, settings: Mapping[str, Any], kwargs: Mapping[str, Any]
    ) -> tuple[Any, dict[str, Any]]:
        """The config of the model's class, and the keywords that are for the model itself.

        kwargs: those of them that a config has an attribute for are its values.
        """
        made, rest = self.config.from_dict(
            deepcopy(dict(settings)),
            return_unused_kwargs=True,
            name_or_path=self._place,
            **deepcopy(dict(kwargs)),
        )
        # A text model of a config that has more than text.
        text = made.sub_configs.get("text_config")
        if text is not None and getattr(self.model, "config_class", None) is text:
            quantization = getattr(made, "quantization_config", None)
            made = made.get_text_config()
            if quantization is not None:
                made.quantization_config = quantization
        return made, rest

    def _config_class(self) -> Any:
        from transformers import CONFIG_MAPPING, __version__
        from transformers.dynamic_module_utils import resolve_trust_remote_code

        kind = self._settings.get("model_type")
        own = self._remote.get("AutoConfig")
        is_known = kind in CONFIG_MAPPING
        if own is not None:
            self._trusted = resolve_trust_remote_code(self._trusted, self._place, is_known, True)
            if self._trusted:
                return self._code(own)
        if not is_known:
            problem = f"transformers {__version__} does not know model type {kind!r}"
            raise ConfigError(self._place, problem, "serve it with an engine that does")
        return CONFIG_MAPPING[kind]

    def _model_class(self, wanted: Any) -> Any:
        import transformers

        if wanted is not None and getattr(wanted, "_model_mapping", None) is None:
            return wanted
        names = self._settings.get("architectures") or ()
        own = self._own_model(wanted, names) if self._trusted else None
        if own is not None:
            return self._code(own)
        for name in () if wanted is not None else names:
            named = getattr(transformers, name, None)
            if getattr(named, "config_class", None) is self.config:
                return named
        autos = [wanted] if wanted is not None else [getattr(transformers, each) for each in _AUTO]
        found = next((a._model_mapping[self.config] for a in autos if self._has(a)), None)
        if found is None:
            asked = "" if wanted is None else f" for {wanted.__name__}"
            problem = f"transformers {transformers.__version__} has no model{asked} of its type"
            raise ConfigError(self._place, problem, "give model_class")
        several = found if isinstance(found, list | tuple) else (found,)
        return next((each for each in several if each.__name__ in names), several[0])

    def _has(self, auto: Any) -> bool:
        return self.config in auto._model_mapping

    def _own_model(self, wanted: Any, names: Any) -> str | None:
        """The model's own code for it, as its config names it."""
        if wanted is not None:
            return self._remote.get(wanted.__name__)
        models = {auto: ref for auto, ref in self._remote.items() if auto.startswith("AutoModel")}
        named = [ref for ref in models.values() if ref.rpartition(".")[2] in names]
        return next(iter(named), None) or models.get("AutoModelForCausalLM")

    def _code(self, reference: str) -> Any:
        from transformers.dynamic_module_utils import get_class_from_dynamic_module

        return get_class_from_dynamic_module(reference, self._place, **self._found)
