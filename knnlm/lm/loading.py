"""From a Hugging Face folder or hub id to a model in memory, its tokenizer, and the facts about it.

Weights are safetensors and code is the installed library's: nothing in a model's folder is ever executed. What cannot
be loaded *exactly* (missing or misshapen weights, an encoder) is refused: a model that runs but is not the one that was
saved makes useless datastores.
"""

import hashlib
import json
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import tokenizers
import torch
from huggingface_hub import snapshot_download
from huggingface_hub.errors import StrictDataclassError
from safetensors import SafetensorError
from torch import nn
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer, PreTrainedModel
from transformers.models.auto.modeling_auto import (
    MODEL_FOR_CAUSAL_LM_MAPPING_NAMES,
    MODEL_FOR_MASKED_LM_MAPPING_NAMES,
)
from transformers.utils import logging

from knnlm.errors import InvalidRequest, ModelError
from knnlm.lm.architectures import find
from knnlm.tokenizer import Tokenizer

INDEX, SINGLE = "model.safetensors.index.json", "model.safetensors"
CONTEXT_LENGTH_NAMES = ("max_position_embeddings", "n_positions", "max_seq_len", "seq_length")
UNUSED = frozenset(
    ("_name_or_path", "name_or_path", "_commit_hash", "transformers_version", "architectures", "auto_map", "dtype",
     "torch_dtype", "use_cache", "output_attentions", "output_hidden_states", "return_dict", "initializer_range",
     "gradient_checkpointing", "id2label", "label2id", "num_labels", "problem_type", "task_specific_params"),
)  # fmt: skip
UNUSED_ENDINGS = ("_token_id", "dropout", "_pdrop")
MAX_TEMPLATE_CHARACTERS = 1 << 18
DTYPES = {"cpu": ("float32", "bfloat16"), "cuda": ("bfloat16", "float16", "float32")}


def resolve(path_or_id: str) -> Path:
    """The folder of a model: itself, or the local copy of a hub repository, downloaded when it is not there."""
    folder = Path(path_or_id).expanduser()
    if folder.is_dir():
        return folder
    if folder.exists() or path_or_id.startswith((".", "/", "~")) or path_or_id.count("/") > 1:
        raise ModelError(f"no model folder at {path_or_id!r}", param="model")
    try:
        folder = Path(snapshot_download(path_or_id, allow_patterns=["*.json"]))
        return Path(
            snapshot_download(path_or_id, revision=folder.name, allow_patterns=["*.json", "*.jinja", *_names(folder)])
        )
    except (OSError, ValueError) as err:  # what huggingface_hub raises, offline included, is one of these
        raise ModelError(
            f"{path_or_id!r} is no folder here and could not be had from the hub: {err}", param="model"
        ) from err


def load_config(folder: Path) -> Any:
    """The config of a decoder-only model: a transformers config, whose attributes differ per architecture.

    Raises ModelError that says what is missing or wrong, UnknownArchitecture for a decoder without a row in the table.
    """
    raw = _read_json(folder / "config.json")
    model_type = str(raw.get("model_type"))
    encoder = model_type in MODEL_FOR_MASKED_LM_MAPPING_NAMES and not raw.get("is_decoder")
    if model_type not in MODEL_FOR_CAUSAL_LM_MAPPING_NAMES or encoder or raw.get("is_encoder_decoder"):
        raise ModelError(
            f"{folder} holds model_type {model_type!r}, which is no decoder-only language model", param="model"
        )
    try:
        config: Any = AutoConfig.from_pretrained(folder, trust_remote_code=False, local_files_only=True)
    except (OSError, ValueError, StrictDataclassError) as err:
        raise ModelError(f"{folder / 'config.json'} cannot be used: {err}", param="model") from err
    if getattr(config, "use_bidirectional_attention", None):
        raise ModelError(f"{folder} is an encoder: its attention is bidirectional", param="model")
    find(config)
    return config


def load_model(folder: Path, config: Any, device: torch.device, dtype: torch.dtype) -> PreTrainedModel:
    """The causal LM in eval mode. Raises ModelError when its weights are not all there, or do not fit."""
    for name in _names(folder):
        if not (folder / name).is_file():
            raise ModelError(f"{folder} has no {name}: weights must be safetensors, never pickle", param="model")
    with no_progress_bars():
        try:
            # attn_implementation is left to transformers: sdpa where an architecture supports it, else eager
            loaded: Any = AutoModelForCausalLM.from_pretrained(
                folder, config=config, dtype=dtype, use_safetensors=True, trust_remote_code=False,
                local_files_only=True, output_loading_info=True,
            )  # fmt: skip
        except (OSError, ValueError, RuntimeError, ImportError, SafetensorError) as err:
            raise ModelError(f"cannot load {folder}: {err}", param="model") from err
    model: PreTrainedModel = loaded[0]
    if missing := sorted(map(str, loaded[1]["missing_keys"])):
        raise ModelError(f"{folder} lacks weights of the model: {', '.join(missing[:8])}", param="model")
    model.config.pad_token_id = None  # padding is told by position: a token that equals it is text
    module: nn.Module = model  # transformers wraps `to` in a signature of its own
    try:
        module.to(device)
    except torch.OutOfMemoryError as err:
        raise ModelError(f"{folder} does not fit on {device}: {err}", param="model") from err
    module.eval()
    return model


def output_head(model: PreTrainedModel) -> nn.Linear:
    """The language-model head; its out_features are the width of the logits, padding of the vocabulary included."""
    head = model.get_output_embeddings()  # type: ignore[no-untyped-call]
    if not isinstance(head, nn.Linear):
        raise ModelError(f"the head of {type(model).__name__} is {type(head).__name__}, expected Linear")
    return head


def load_tokenizer(folder: Path, *, vocab_size: int) -> Tokenizer:
    """tokenizer.json as it is, with the BOS, EOS and chat template that the folder's tokenizer class declares.

    A token that tokenizer.json does not hold is none: classes have default names for it that a model need not use.
    """
    path = folder / "tokenizer.json"
    if not path.is_file():
        raise ModelError(
            f"{folder} has no tokenizer.json; if its tokenizer is a slow one (Python only), convert it with "
            "transformers' AutoTokenizer and save it beside the model",
            param="model",
        )
    try:
        text = path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as err:
        raise ModelError(f"{path} cannot be read: {err}", param="model") from err
    Tokenizer(text, bos_token_id=None, eos_token_id=None)  # raises ModelError when it is malformed
    backend = tokenizers.Tokenizer.from_str(text)
    try:
        declared = AutoTokenizer.from_pretrained(folder, trust_remote_code=False, local_files_only=True)
    except (OSError, ValueError, ImportError) as err:
        raise ModelError(f"cannot load the tokenizer in {folder}: {err}", param="model") from err
    ids: dict[str, int | None] = {}
    for role in ("bos_token", "eos_token"):
        token = getattr(declared, role)
        ids[role] = None if token is None else backend.token_to_id(token)
        if (ids[role] or 0) >= vocab_size:
            raise ModelError(f"{role} is {ids[role]}, outside the model's {vocab_size} logits", param="model")
    template = declared.chat_template  # a text, or several by name
    template = template.get("default") if isinstance(template, dict) else template
    if template is not None and len(template) > MAX_TEMPLATE_CHARACTERS:
        raise ModelError(
            f"the chat template in {folder} has {len(template)} characters, at most {MAX_TEMPLATE_CHARACTERS}",
            param="model",
        )
    return Tokenizer(text, bos_token_id=ids["bos_token"], eos_token_id=ids["eos_token"], chat_template=template)


def weights_sha256(folder: Path) -> str:
    """sha256 over the bytes of the weight files, in the order of their names."""
    digest = hashlib.sha256()
    for name in _names(folder):
        with (folder / name).open("rb") as file:
            while block := file.read(1 << 22):
                digest.update(block)
    return digest.hexdigest()


def config_sha256(config: Any) -> str:
    """sha256 of the canonical JSON of what the configuration says besides its class's defaults, and of the model type.

    Left out is what answers do not depend on: names, paths, versions, dtype, ids of special tokens, and what only
    training or other heads use (see UNUSED). Defaults are left out so that an option which a later release of
    transformers adds does not make the same model another.
    """
    default = type(config)().to_dict()
    used = {
        name: value
        for name, value in config.to_dict().items()
        if not (name in UNUSED or name.endswith(UNUSED_ENDINGS)) and (name not in default or default[name] != value)
    }
    canonical = json.dumps({**used, "model_type": config.model_type}, sort_keys=True, separators=(",", ":"))
    return hashlib.sha256(canonical.encode()).hexdigest()


def context_length(config: Any) -> int:
    """Tokens of the longest sequence. Raises ModelError when the config does not say.

    LongRoPE turns *all* positions differently once a sequence passes its original length, so that a key would depend on
    what follows its context: such a model is used up to that length.
    """
    for name in CONTEXT_LENGTH_NAMES:
        value = getattr(config, name, None)
        if isinstance(value, int) and value > 0:
            original = _long_rope_original(getattr(config, "rope_parameters", None))
            return min(value, original) if original else value
    raise ModelError(
        f"the config of {config.model_type} does not tell the context length: it has none of "
        f"{', '.join(CONTEXT_LENGTH_NAMES)}; add one to config.json",
        param="model",
    )


def pick_device(device: str) -> torch.device:
    """auto: CUDA when there is one. Raises InvalidRequest for another name, ModelError for a GPU that is not there."""
    if device == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    kind, _, number = device.partition(":")
    if kind not in DTYPES or (number and not (kind == "cuda" and number.isdecimal())):
        raise InvalidRequest(f"device must be auto, cpu, cuda or cuda:N, got {device!r}", param="device")
    if kind == "cuda" and int(number or 0) >= torch.cuda.device_count():
        raise ModelError(f"device {device!r} is not there: torch sees {torch.cuda.device_count()} GPUs", param="device")
    return torch.device(device)


def pick_dtype(dtype: str, device: torch.device) -> str:
    """auto: float32 on CPU, bfloat16 on CUDA."""
    if dtype == "auto":
        return "float32" if device.type == "cpu" else "bfloat16"
    if dtype not in DTYPES[device.type]:
        raise InvalidRequest(
            f"dtype on {device.type} must be auto or one of {', '.join(DTYPES[device.type])}, got {dtype!r}",
            param="dtype",
        )
    return dtype


@contextmanager
def no_progress_bars() -> Iterator[None]:
    """transformers draws bars while it reads and writes weights; inside this it does not, and afterwards as before."""
    shown = logging.is_progress_bar_enabled()
    logging.disable_progress_bar()  # type: ignore[no-untyped-call]
    try:
        yield
    finally:
        if shown:
            logging.enable_progress_bar()  # type: ignore[no-untyped-call]


def _names(folder: Path) -> list[str]:
    """The weight files that belong to the model, sorted; a folder may hold others."""
    if (folder / SINGLE).is_file() or not (folder / INDEX).is_file():
        return [SINGLE]
    weight_map = _read_json(folder / INDEX).get("weight_map")
    names = set(map(str, weight_map.values())) if isinstance(weight_map, dict) else set()
    if not names or any(Path(name).name != name for name in names):
        raise ModelError(f"{folder / INDEX} must map weights to files of the folder in its weight_map", param="model")
    return sorted(names)


def _read_json(path: Path) -> dict[str, Any]:
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except OSError as err:
        raise ModelError(f"no model at {path.parent}: {path.name} cannot be read ({err})", param="model") from err
    except ValueError as err:
        raise ModelError(f"{path} is not JSON: {err}", param="model") from err
    if not isinstance(content, dict):
        raise ModelError(f"{path} must hold an object", param="model")
    return content


def _long_rope_original(rope: Any) -> int | None:
    """original_max_position_embeddings where the type is longrope, alone or for one of several kinds of layers."""
    if not isinstance(rope, dict):
        return None
    if rope.get("rope_type") == "longrope":
        return int(rope["original_max_position_embeddings"])
    return next((found for part in rope.values() if (found := _long_rope_original(part))), None)
