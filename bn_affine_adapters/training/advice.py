"""What an error advises in Python, in the words of a command line."""

import re

from ..errors import BNAdapterError

_BASE = "--base=FILE.safetensors, with the weights that it was trained on"
_FILE = "pretrained_file=FILE.safetensors, or pretrained=true for timm's weights"
_ANYWHERE = {
    r"model\.save_pretrained(\(\.\.\.\))? wrote": "bn-adapters train wrote, e.g. runs/digits/adapter",
    r"save the adapter again( with model\.save_pretrained)?": "let whoever made the adapter save it again",
    r"push it with model\.push_to_hub\(\.\.\.\)": "push it: bn-adapters push FOLDER OWNER/NAME",
    r"timm\.list_models\(\)": "those of python -c 'import timm; print(*timm.list_models())'",
    r"BNOnlyConfig\(data_config=\{(.*)\}\)": r"adapter_config.json: data_config {\1}",
    r", or token=": ", or HF_TOKEN",
}
_OPTIONS = {  # of a command that takes options
    r"load_bn_only_model\(\.\.\., max_parameters=N\), or None for no limit,": "--max-parameters=N,",
    r"load_bn_only_model\(.*, model=base\)": _BASE,
    r"load the adapter with model=base": _BASE,
    r"pass the base .* as model=": _BASE,
    r"without local_files_only": "without --local-files-only",
    r"\brevision=": "--revision=",
    r"push without a card": "add --no-card",
    r'format="(\w+)", or .*': r"--format=\1",
}
_KEYS = {  # of one that takes key=value arguments
    r"load_bn_only_model\(.*, model=base\)": _FILE,
    r"load the adapter with model=base": _FILE,
    r"pass the base .* as model=": _FILE,
    r"give the creation arguments as BNOnlyConfig\(.*": "give the creation arguments as model_args.NAME=VALUE",
    r'timm\.create_model\("(\w+)"\)': r"model=\1",
    r"seed=None": "seed=null pretrained=true",
    r"get_bn_only_model\(.*lean=\.\.\.\)\)": "lean=exact",
}


def as_command_line(error: BNAdapterError, keys: bool) -> str:
    """Return an error's name and three parts, the advice as options, or as the ``keys`` of key=value arguments."""
    do = error.do
    if "your own code" in error.what:
        do = f"in Python, where its code is: {do}"
    else:
        for pattern, words in {**_ANYWHERE, **(_KEYS if keys else _OPTIONS)}.items():
            do = re.sub(pattern, words, do)
    return f"{type(error).__name__}: {type(error)(error.what, seen=error.seen, do=do)}"
