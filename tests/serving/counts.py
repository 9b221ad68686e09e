"""What vLLM's own config classes say of a model's experts, from its config file.

Run by the interpreter of the serving environment, which has no shardsurgeon:

    python counts.py NAME,NAME FOLDER [NAME,NAME FOLDER ...]

It reads the names from the config that vLLM builds the text model of, as its models do, and prints
a line of JSON per folder.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any


def counts(names: list[str], folder: str) -> dict[str, Any]:
    """The class of the config, and what each name gives: a number, or the error."""
    from vllm.transformers_utils.config import get_config, get_hf_text_config

    kind = "mistral" if (Path(folder) / "params.json").exists() else "hf"
    config = get_hf_text_config(get_config(folder, trust_remote_code=False, config_format=kind))
    said: dict[str, Any] = {}
    for name in names:
        try:
            said[name] = getattr(config, name)
        except Exception as error:  # of any kind: it stops the engine
            said[name] = f"{type(error).__name__}: {error}"[:300]
    return {"class": f"{type(config).__module__}.{type(config).__name__}", "said": said}


def main() -> None:
    """Print what each folder's config says, or why there is none."""
    for names, folder in zip(sys.argv[1::2], sys.argv[2::2], strict=True):
        try:
            found = counts(names.split(","), folder)
        except Exception as error:  # of any kind: it is shown, and the test decides
            found = {"error": f"{type(error).__name__}: {error}"[:300]}
        print(json.dumps({"folder": folder, **found}), flush=True)


if __name__ == "__main__":
    main()
