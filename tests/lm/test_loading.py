"""What a model's folder must hold, and what is said when it does not."""

import hashlib
import json
import shutil
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import BertConfig, BertForMaskedLM, LlamaConfig, T5Config
from transformers.utils import logging

from knnlm.errors import InvalidRequest, ModelError, UnknownArchitecture
from knnlm.lm.loading import context_length, no_progress_bars, pick_device, pick_dtype, weights_sha256
from knnlm.lm.model import LanguageModel
from tests.lm import tiny_models
from tests.lm.conftest import Tiny


@pytest.fixture
def folder(llama: Tiny, tmp_path: Path) -> Path:
    """A copy to spoil."""
    return Path(shutil.copytree(llama.folder, tmp_path / "copy"))


def load(folder: Path, **options: Any) -> LanguageModel:
    return LanguageModel.load(str(folder), device="cpu", **options)


def change_config(folder: Path, **changed: Any) -> None:
    path = folder / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | changed))


def test_info_holds_the_facts_of_the_folder(llama: Tiny) -> None:
    info = llama.lm.info
    assert info.model_id == llama.folder.name
    assert info.architecture == "llama"
    assert info.weights_sha256 == hashlib.sha256((llama.folder / "model.safetensors").read_bytes()).hexdigest()
    assert info.tokenizer_sha256 == hashlib.sha256((llama.folder / "tokenizer.json").read_bytes()).hexdigest()
    assert info.vocab_size == 300  # the width of the logits; the tokenizer has 257
    assert len(llama.lm.tokenizer) == 257
    assert info.context_length == 64
    assert (info.key_function, info.key_dim) == ("ffn_input", 32)
    assert (info.dtype, info.device) == ("float32", "cpu")
    assert info.bos_token_id == info.eos_token_id == 256
    assert llama.lm.tokenizer.encode("a")[0] == 256


def test_the_chat_template_of_the_folder_comes_with_the_tokenizer(folder: Path) -> None:
    assert load(folder).tokenizer.chat_template is None
    config = folder / "tokenizer_config.json"
    written = json.loads(config.read_text())
    several = [{"name": "tool_use", "template": "x"}, {"name": "default", "template": "{{ messages }}"}]
    for given in ("{{ messages }}", several):
        config.write_text(json.dumps(written | {"chat_template": given}))
        assert load(folder).tokenizer.chat_template == "{{ messages }}"
    config.write_text(json.dumps(written))
    (folder / "chat_template.jinja").write_text("{{ bos_token }}")
    assert load(folder).tokenizer.chat_template == "{{ bos_token }}"
    (folder / "chat_template.jinja").write_text("x" * 300_000)
    with pytest.raises(ModelError, match=r"the chat template in .* has 300000 characters"):
        load(folder)


def test_every_architecture_tells_its_context_length(tiny: Tiny) -> None:
    assert tiny.lm.info.context_length == 64


def test_a_tokenizer_without_bos_gives_none_whatever_the_config_says(folder: Path) -> None:
    tiny_models.byte_tokenizer(bos=None).save_pretrained(folder)
    lm = load(folder)
    assert lm.info.bos_token_id is None
    assert lm.info.eos_token_id == 256
    assert lm.tokenizer.encode("ab").shape == (2,)


def test_special_tokens_a_class_only_has_names_for_are_none(tmp_path: Path) -> None:
    folder = tiny_models.save(tiny_models.random_model(tiny_models.CONFIGS["gpt2"]()), tmp_path / "m")
    (folder / "tokenizer_config.json").unlink()  # GPT-2's class then says "<|endoftext|>", which is not in the file
    assert load(folder).info.bos_token_id is None
    assert load(folder).info.eos_token_id is None


def test_shards_are_hashed_in_the_order_of_their_names_and_strangers_are_not(folder: Path) -> None:
    single = load_file(folder / "model.safetensors")
    names = sorted(single)
    parts = {"model-2.safetensors": names[:3], "model-1.safetensors": names[3:]}
    for file, held in parts.items():
        save_file({name: single[name] for name in held}, folder / file, metadata={"format": "pt"})
    index = {"metadata": {}, "weight_map": {name: file for file, held in parts.items() for name in held}}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    (folder / "model.safetensors").rename(folder / "consolidated.safetensors")
    both = (folder / "model-1.safetensors").read_bytes() + (folder / "model-2.safetensors").read_bytes()
    assert weights_sha256(folder) == load(folder).info.weights_sha256 == hashlib.sha256(both).hexdigest()
    (folder / "model-2.safetensors").unlink()
    with pytest.raises(ModelError, match=r"no model-2\.safetensors"):
        load(folder)


@pytest.mark.parametrize("weight_map", [None, {}, {"lm_head.weight": "../model.safetensors"}])
def test_an_index_must_name_files_of_the_folder(folder: Path, weight_map: Any) -> None:
    (folder / "model.safetensors").rename(folder.parent / "model.safetensors")
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": weight_map}))
    with pytest.raises(ModelError, match="must map weights to files of the folder"):
        load(folder)


def test_a_hub_id_is_resolved_to_its_local_copy(llama: Tiny, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    repository, commit = tmp_path / "models--tiny--llama", "0" * 40
    shutil.copytree(llama.folder, repository / "snapshots" / commit)
    (repository / "refs").mkdir()
    (repository / "refs" / "main").write_text(commit)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path))
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    lm = LanguageModel.load("tiny/llama", device="cpu")
    assert lm.info.model_id == "tiny/llama"
    assert lm.info.weights_sha256 == llama.lm.info.weights_sha256
    with pytest.raises(ModelError, match="'tiny/other' is no folder here and could not be had from the hub"):
        LanguageModel.load("tiny/other", device="cpu")


@pytest.mark.parametrize("path", ["/no/such/folder", "./none", "a/b/c"])
def test_a_missing_folder_is_named(path: str) -> None:
    with pytest.raises(ModelError, match=f"no model folder at '{path}'"):
        LanguageModel.load(path, device="cpu")


def test_a_folder_without_config_is_refused(folder: Path) -> None:
    (folder / "config.json").unlink()
    with pytest.raises(ModelError, match=r"no model at .*config\.json cannot be read"):
        load(folder)


@pytest.mark.parametrize("content", ["{", "[]"])
def test_a_config_that_is_no_json_object_is_refused(folder: Path, content: str) -> None:
    (folder / "config.json").write_text(content)
    with pytest.raises(ModelError, match=r"config\.json (is not JSON|must hold an object)"):
        load(folder)


def test_a_config_with_an_impossible_value_is_refused(folder: Path) -> None:
    change_config(folder, hidden_size="wide")
    with pytest.raises(ModelError, match=r"config\.json cannot be used.*hidden_size"):
        load(folder)


def test_pickle_weights_are_refused(folder: Path) -> None:
    torch.save(load_file(folder / "model.safetensors"), folder / "pytorch_model.bin")
    (folder / "model.safetensors").unlink()
    with pytest.raises(ModelError, match=r"no model\.safetensors: weights must be safetensors, never pickle"):
        load(folder)


def test_a_cut_weight_file_is_refused(folder: Path) -> None:
    path = folder / "model.safetensors"
    path.write_bytes(path.read_bytes()[:-100])
    with pytest.raises(ModelError, match="cannot load"):
        load(folder)


def test_missing_weights_are_refused_and_named(folder: Path) -> None:
    weights = load_file(folder / "model.safetensors")
    del weights["lm_head.weight"]
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(ModelError, match=r"lacks weights of the model: lm_head\.weight"):
        load(folder)


def test_misshapen_weights_are_refused(folder: Path) -> None:
    change_config(folder, intermediate_size=40)
    with pytest.raises(ModelError, match="cannot load"):
        load(folder)


def test_an_unknown_decoder_lists_the_known_ones(folder: Path) -> None:
    change_config(folder, model_type="mamba")
    with pytest.raises(UnknownArchitecture, match=r"'mamba'.*gpt2.*llama.*knnlm/lm/architectures\.py"):
        load(folder)


def test_encoders_are_refused(tmp_path: Path) -> None:
    bert = BertConfig(vocab_size=20, hidden_size=8, num_hidden_layers=1, num_attention_heads=1, intermediate_size=8)
    with no_progress_bars():
        BertForMaskedLM(bert).save_pretrained(tmp_path / "bert")
    T5Config().save_pretrained(tmp_path / "t5")
    for name in ("bert", "t5"):
        with pytest.raises(ModelError, match=f"'{name}', which is no decoder-only language model"):
            load(tmp_path / name)


def test_a_decoder_whose_attention_looks_ahead_is_refused(tmp_path: Path) -> None:
    config = tiny_models.CONFIGS["gemma3_text"]()
    config.use_bidirectional_attention = True
    tiny_models.save(tiny_models.random_model(config), tmp_path / "m")
    with pytest.raises(ModelError, match="its attention is bidirectional"):
        load(tmp_path / "m")


def test_a_folder_with_a_slow_tokenizer_alone_is_refused(folder: Path) -> None:
    (folder / "tokenizer.json").rename(folder / "tokenizer.model")
    with pytest.raises(ModelError, match=r"no tokenizer\.json; if its tokenizer is a slow one"):
        load(folder)


def test_a_malformed_tokenizer_is_refused(folder: Path) -> None:
    (folder / "tokenizer.json").write_text("{}")
    with pytest.raises(ModelError, match="not a tokenizer"):
        load(folder)


def test_a_bos_beyond_the_logits_is_refused(tmp_path: Path) -> None:
    config = LlamaConfig(**(tiny_models.LLAMA | {"vocab_size": 256}))
    tiny_models.save(tiny_models.random_model(config), tmp_path / "m")
    with pytest.raises(ModelError, match="bos_token is 256, outside the model's 256 logits"):
        load(tmp_path / "m")


def test_a_context_length_that_is_not_told_is_refused(tmp_path: Path) -> None:
    config = tiny_models.CONFIGS["bloom"]()
    del config.seq_length
    tiny_models.save(tiny_models.random_model(config), tmp_path / "m")
    with pytest.raises(
        ModelError, match=r"bloom does not tell the context length.*max_position_embeddings.*seq_length"
    ):
        load(tmp_path / "m")


def test_longrope_is_used_up_to_its_original_length() -> None:
    rope = {"rope_type": "longrope", "original_max_position_embeddings": 4096}
    assert context_length(SimpleNamespace(max_position_embeddings=131_072, rope_parameters=rope)) == 4096
    per_kind = {"full_attention": rope, "sliding_attention": {"rope_type": "default"}}
    assert context_length(SimpleNamespace(max_position_embeddings=131_072, rope_parameters=per_kind)) == 4096
    yarn = rope | {"rope_type": "yarn"}
    assert context_length(SimpleNamespace(max_position_embeddings=131_072, rope_parameters=yarn)) == 131_072


@pytest.mark.parametrize("device", ["gpu", "cpu:0", "cuda:x", ""])
def test_a_device_that_is_none_is_refused(device: str) -> None:
    with pytest.raises(InvalidRequest, match=f"device must be auto, cpu, cuda or cuda:N, got '{device}'"):
        pick_device(device)


def test_a_gpu_that_is_not_there_is_refused() -> None:
    with pytest.raises(ModelError, match="'cuda:99' is not there: torch sees"):
        pick_device("cuda:99")


def test_dtypes_are_picked_by_device() -> None:
    cpu, cuda = torch.device("cpu"), torch.device("cuda", 0)
    assert (pick_dtype("auto", cpu), pick_dtype("auto", cuda)) == ("float32", "bfloat16")
    assert (pick_dtype("bfloat16", cpu), pick_dtype("float16", cuda)) == ("bfloat16", "float16")
    with pytest.raises(InvalidRequest, match="dtype on cpu must be auto or one of float32, bfloat16, got 'float16'"):
        pick_dtype("float16", cpu)


def test_loading_leaves_the_progress_bars_as_they_were(folder: Path) -> None:
    before = logging.is_progress_bar_enabled()
    load(folder)
    assert logging.is_progress_bar_enabled() == before
