"""The code of a model card that loads a student and lets it answer, with prompts like those it was trained on."""

import json
from typing import Any

from ..data.formats import PROMPT
from .summary import Summary

PROJECTOR_FOLDER = "projector"
"""Where the projector is in a repository."""

MOST_TOKENS = 256
"""How long an answer may be where the run sets no limit to it."""

_QUESTION = "Ben has 5 coins and finds 4 boxes with 6 coins in each. How many coins does Ben have in total?"

_PROMPTS = {
    "question": f"prompt = {json.dumps(PROMPT.format(question=_QUESTION))}",
    "prompt": 'prompt = "..."  # as in the column prompt of the data set',
    "text": 'prompt = "..."  # the beginning of a text',
}
"""By the kind of prompt (see `prompt_kind`) the line that sets it."""

_TOKENISED = 'inputs = tokenizer(prompt, return_tensors="pt")'

_CHAT = [
    f'messages = [{{"role": "user", "content": "{_QUESTION}"}}]',
    "inputs = tokenizer.apply_chat_template(",
    '    messages, add_generation_prompt=True, return_tensors="pt", return_dict=True',
    ")",
]


def exports_adapter(arguments: dict[str, Any]) -> bool:
    """Whether the finished student is an adapter alone, for which its base has to be loaded as well."""
    return arguments["use_peft"] and not arguments["merge_adapter"]


def _quoted(text: str) -> str:
    return json.dumps(text, ensure_ascii=False)


def _source(name: str, revision: str | None) -> str:
    """The arguments that say where something is loaded from."""
    return _quoted(name) + (f", revision={_quoted(revision)}" if revision else "")


def _call(loader: str, name: str, revision: str | None, trusting: bool = False) -> str:
    trust = ", trust_remote_code=True" if trusting else ""
    return f"{loader}.from_pretrained({_source(name, revision)}{trust})"


def _loading(name: str, revision: str | None, arguments: dict[str, Any]) -> str:
    """The code that loads the student."""
    trusting = arguments["trust_remote_code"]
    lines = ["from transformers import AutoModelForCausalLM, AutoTokenizer", ""]
    if exports_adapter(arguments):
        base, own = arguments["student_model_name_or_path"], arguments["student_revision"]
        lines.insert(0, "from peft import PeftModel")
        loaded = _call("AutoModelForCausalLM", base, own, trusting)
        lines.append(f"model = PeftModel.from_pretrained({loaded}, {_source(name, revision)})")
    else:
        lines.append(f"model = {_call('AutoModelForCausalLM', name, revision, trusting)}")
    return "\n".join([*lines, f"tokenizer = {_call('AutoTokenizer', name, revision, trusting)}"])


def usage_code(name: str, revision: str | None, summary: Summary) -> str:
    """Code that loads a student and prints its answer to a prompt of the kind that it was trained on.

    The student is named by its repository or folder, with the branch it is on where that is not the main one.
    """
    kind, arguments = summary.prompt_kind or "prompt", summary.arguments
    asked = _CHAT if kind == "messages" else [_PROMPTS[kind], _TOKENISED]
    length = arguments["generation_max_new_tokens"] or MOST_TOKENS
    lines = [
        _loading(name, revision, arguments),
        "",
        *asked,
        f"output = model.generate(**inputs, max_new_tokens={length})",
        'print(tokenizer.decode(output[0, inputs["input_ids"].shape[1] :], skip_special_tokens=True))',
    ]
    return "\n".join(lines)


def projector_code(name: str, revision: str | None) -> str:
    """Code that loads the projectors from a student's repository."""
    files = f'allow_patterns="{PROJECTOR_FOLDER}/*") + "/{PROJECTOR_FOLDER}"'
    return f"""from huggingface_hub import snapshot_download
from kava_trainer import load_projectors

projectors = load_projectors(snapshot_download({_source(name, revision)}, {files})"""
