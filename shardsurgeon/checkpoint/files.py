"""Which file of a model is what, by its name: weights, lists, the card, and what is no part of it.

config.json and the index are named in `storage.formats.index`, which storage needs as well, and
the record of earlier prunes in `provenance`.
"""

from __future__ import annotations

import re
from collections.abc import Iterable

from shardsurgeon.errors import CheckpointError
from shardsurgeon.storage.formats.index import (
    CONFIG_NAME,
    HUGGING_FACE,
    INDEX_NAME,
    MISTRAL,
    FileNames,
)

# Side files that repeat the quantization lists of config.json.
QUANTIZATION_FILES = (
    "hf_quant_config.json",  # ModelOpt
    "quantize_config.json",  # GPTQ
    "quant_config.json",  # AWQ
    "quantization_config.json",  # AutoRound
)
# Where a pruned model carries its record and the scores or keep-list that it was made with.
CALIBRATION_FOLDER = "calibration/"
RECIPE_NAME = f"{CALIBRATION_FOLDER}recipe.toml"
EVALUATION_NAME = f"{CALIBRATION_FOLDER}evaluation.json"

CARD_NAME = "README.md"
SOURCE_CARD_NAME = "README.source.md"
# Pictures in the card of a pushed model: the first, and the next where an earlier prune left some.
SALIENCY_PICTURE, DAMAGE_PICTURE = (
    f"{CALIBRATION_FOLDER}{what}.png" for what in ("saliency", "damage")
)
_CARD_PICTURE = re.compile(rf"{CALIBRATION_FOLDER}(?:saliency|damage)(?:-\d+)?\.png")
_SET_ASIDE = re.compile(r"README\.source(?:-(\d+))?\.md")
# Suffixes of weights in another format. A model with these only cannot be opened; beside
# safetensors they are left behind.
_OTHER_WEIGHTS = frozenset(
    (
        *(".bin", ".ckpt", ".distcp", ".engine", ".ggml", ".gguf", ".h5", ".hdf5", ".keras"),
        *(".mlmodel", ".msgpack", ".nemo", ".onnx", ".onnx_data", ".ot", ".pb", ".pt", ".pth"),
        ".tflite",
    )
)
# A vocabulary may have such a suffix as well, and any file that torch saved has `.pt`.
_SURELY_WEIGHTS = "|".join(sorted(suffix[1:] for suffix in _OTHER_WEIGHTS - {".pt"}))

OTHER_WEIGHTS = "other weights"
SECRET, HIDDEN = "secret", "hidden"
# Left behind whatever refers to them.
NEVER = frozenset({SECRET, HIDDEN})


# Endings of text that may be nothing but a token, and of tensors.
_PLAIN = r"(?:\.(?:txt|json|ya?ml|toml|ini|cfg))?"
_TENSORS = r"\.(?:pt|pth|bin|npz|pkl|safetensors)(?:\.index\.json)?"


def _below(folders: str) -> str:
    return rf"(?:.*/)?(?:{folders})/.*"


def _called(names: str) -> str:
    return rf"(?:.*/)?(?:{names})"


# Why a file is no part of the model it lies beside → what its path is. The first that fits counts;
# case does not.
_NO_PART = {
    SECRET: "|".join(
        (
            _called(r"\.env[^/]*|[^/]+\.env|env(?:\.(?:local|prod\w*|dev\w*))?"),
            _called(r"[^/]*\.(?:pem|key|p12|pfx|ppk|jks|kdbx)|id_(?:rsa|dsa|ecdsa|ed25519)"),
            _called(rf"(?:[^/]*(?:hf|hub|api|access|auth)[-_](?:token|key)s?|token){_PLAIN}"),
            _called(rf"secrets?{_PLAIN}|credentials?{_PLAIN}|service[-_]account[^/]*\.json"),
            _called(r"\.?netrc|\.npmrc|\.pypirc|\.git-credentials"),
            _below(r"\.ssh|\.aws|\.gnupg|\.huggingface"),
        )
    ),
    HIDDEN: r"(?:.*/)?\.[^/]+(?:/.*)?",
    "log": "|".join(
        (
            _called(r"[^/]*\.(?:log|out|err|stdout|stderr|pid)(?:\.\d+)?(?:\.gz)?|core(?:\.\d+)?"),
            _called(r"events\.out\.tfevents\.[^/]*|trainer_log\.jsonl"),
            _below(r"logs?"),
        )
    ),
    "cache": "|".join(
        (
            _below(r"(?:[a-z]+[-_])?caches?") + r"(?<!\.py)",
            _below(r"__pycache__|node_modules|site-packages|venv|__macosx"),
            _called(r"[^/]*\.py[co]|thumbs\.db|desktop\.ini"),
        )
    ),
    "experiment folder": _below(
        r"wandb|runs|mlruns|mlartifacts|lightning_logs|tb_logs|tensorboard|swanlog|multirun|outputs"
    ),
    "partial work": "|".join(
        (
            _called(r"[^/]*\.(?:te?mp|part|partial|incomplete|crdownload|download|aria2|sw[op])"),
            _called(r"[^/]*\.(?:lock|writing)|shardsurgeon\.journal"),
            _below(r"[^/]*\.(?:partial|incomplete|te?mp)|te?mp"),
        )
    ),
    "backup": "|".join(
        (
            _called(r"[^/]*(?:\.(?:bak|backup|orig|old|save|rej)(?:[-._]?\d+)?|~)"),
            _called(r"[^/]*\.(?:zip|7z|rar|tgz|tar|tar\.\w+)"),
            _below(r"backups?|bak|old"),
        )
    ),
    "training state": "|".join(
        (
            _called(rf"(?:optimizer|scheduler|scaler|rng_state|random_states)[^/]*{_TENSORS}"),
            _called(r"trainer_state\.json|training_args\.\w+|[^/]*_(?:optim|model)_states\.pt"),
            r"latest|zero_to_fp32\.py",
            _below(r"checkpoint-\d+|global_step\d+"),
        )
    ),
    "adapter": _called(rf"adapter_config\.json|adapter(?:s|_model)?(?:-[^/]*)?{_TENSORS}"),
    OTHER_WEIGHTS: "|".join(
        (
            _called(rf"(?![^/]*(?:vocab|tokeni[sz]er|tiktoken|bpe))[^/]*\.(?:{_SURELY_WEIGHTS})"),
            _called(r"[^/]*\.(?:bin|pt|pth|h5|msgpack|onnx)\.index\.json|consolidated[^/]*"),
            r"(?:[^/]*[-_])?(?:model|weights|state_dict|ema)(?:[-_.][^/]*)?\.(?:pt|npz)|openvino_[^/]*",
            # The index of shards that are not these.
            r"[^/]*\.index(?:\.\w+)?\.json",
            r"(?:original|metal|onnx|openvino|coreml|gguf)/.*",
        )
    ),
    # It would keep the old number of experts, and only Mistral's own format reads it.
    "Mistral's params.json": r"params\.json",
}
# Beside config, index and quantization lists: without one of these an engine does not start, or
# writes another text.
_NEEDED = re.compile(
    r"(?:[^/]*tokenizer[^/]*|vocab[^/]*|[^/]*\.(?:tiktoken|model|py|jinja)|merges\.txt|tekken\.json"
    r"|special_tokens_map\.json|added_tokens\.json|chat_template[^/]*|generation_config\.json"
    r"|[^/]*processor_config\.json)"
)
_RULES = {why: re.compile(rule, re.IGNORECASE) for why, rule in _NO_PART.items()}
# What an earlier prune left in calibration/ stays, whatever its format.
_KINDS_OF_DATA = frozenset({"training state", "adapter", OTHER_WEIGHTS})


def set_aside(name: str) -> str | None:
    """The name that a card of the source gets in a pruned model, which has a card of its own.

    README.md becomes README.source.md, that README.source-2.md, and so on; None for any other
    file.
    """
    if name == CARD_NAME:
        return SOURCE_CARD_NAME
    found = _SET_ASIDE.fullmatch(name)
    return f"README.source-{int(found[1] or 1) + 1}.md" if found else None


def is_card_picture(name: str) -> bool:
    """Whether a file is called as the pictures that `push` adds to a model."""
    return _CARD_PICTURE.fullmatch(name) is not None


def why_left_behind(name: str) -> str | None:
    """Why a file beside the weights is no part of the model, by its name; None where it is one.

    name: its path in the model. What nothing speaks against belongs: tokenizers, templates, code,
    documents, images, folders, and files of unknown kinds.
    """
    if name in (CONFIG_NAME, INDEX_NAME):
        return None
    kept = _KINDS_OF_DATA if name.startswith(CALIBRATION_FOLDER) else frozenset()
    fits = (why for why, rule in _RULES.items() if why not in kept and rule.fullmatch(name))
    return next(fits, None)


def is_needed(name: str) -> bool:
    """Whether a file beside the weights is one that a model cannot do without: its tokenizer, its
    code, how it generates."""
    return _NEEDED.fullmatch(name) is not None


def looks_like_weights(name: str) -> bool:
    """Whether a file or folder, or a folder that it lies in, is called as weights or as the index
    of some are."""
    suffixes = ("." + part.rpartition(".")[2].lower() for part in name.split("/"))
    named = any(suffix in _OTHER_WEIGHTS or suffix == ".safetensors" for suffix in suffixes)
    return named or _RULES[OTHER_WEIGHTS].fullmatch(name) is not None


def names_of(location: str, files: Iterable[str]) -> FileNames:
    """What a model's files are called: as transformers has them, or Mistral's own format.

    Raises CheckpointError where the weights are Mistral's beside a config.json: an engine would
    read the experts' count from either.
    """
    files = list(files)
    if root_safetensors(files) or not root_safetensors(files, MISTRAL):
        return HUGGING_FACE
    if CONFIG_NAME not in files:
        return MISTRAL
    problem = f"has {CONFIG_NAME}, and weights in Mistral's own format alone (consolidated*)"
    remedy = f"fetch the weights in model*.safetensors, or prune without {CONFIG_NAME}"
    raise CheckpointError(location, problem, remedy)


def root_safetensors(names: Iterable[str], of: FileNames = HUGGING_FACE) -> list[str]:
    """The safetensors files at the top, sorted; `consolidated` ones are in Mistral's own format."""
    return sorted(
        name
        for name in names
        if "/" not in name
        and name.endswith(".safetensors")
        and name.startswith(MISTRAL.stem) == (of == MISTRAL)
    )


def other_formats(names: Iterable[str]) -> list[str]:
    """The suffixes, sorted, of files that are known as weights in another format."""
    return sorted({"." + name.rpartition(".")[2] for name in names} & _OTHER_WEIGHTS)
