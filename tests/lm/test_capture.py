"""Keys against the last layer run by hand: its modules called one by one as the architecture's paper has it."""

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from knnlm.errors import ModelError
from knnlm.lm.architectures import KEY_FUNCTIONS, Refusal, Site
from knnlm.lm.capture import capture, capture_keys, encode, only_at
from tests.lm.conftest import Tiny
from tests.lm.tiny_models import VOCAB, WIDTH

# float32 and another order of summation (sdpa against attention written out): the largest difference seen is 4e-6 of
# values around 10; a wrong place differs by more than 0.1
RTOL, ATOL = 1e-5, 2e-5

Stage = tuple[Tensor, Tensor, Tensor, Tensor]  # what enters attention, before its norm and after; the FFN, the same
Run = Callable[[Any, Tensor, Tensor], tuple[Stage, Tensor]]  # (layer, its input, what its attention gave)


def assert_close(actual: Tensor, expected: Tensor, what: str = "") -> None:
    np.testing.assert_allclose(actual, expected, rtol=RTOL, atol=ATOL, err_msg=what)


def ids(batch: int = 3, length: int = 20) -> Tensor:
    return torch.randint(VOCAB, (batch, length), generator=torch.Generator().manual_seed(1))


def observe(model: nn.Module, module: nn.Module, input_ids: Tensor) -> tuple[Tensor, Tensor, Any]:
    """What enters and leaves a module, and the model's answer with hidden states."""
    seen: list[tuple[Tensor, Tensor]] = []

    def hook(_: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> None:
        seen.append((args[0] if args else kwargs["hidden_states"], output[0] if isinstance(output, tuple) else output))

    handle = module.register_forward_hook(hook, with_kwargs=True)
    with torch.no_grad():
        answer = model(input_ids, output_hidden_states=True, use_cache=False)
    handle.remove()
    return *seen[0], answer


def pre_norm(attention_norm: str, ffn_norm: str, *, attention_out: str = "", ffn_out: str = "") -> Run:
    """Residual stream; the branches' inputs are normalised, and their outputs too when a norm is named for them."""

    def run(layer: Any, x: Tensor, attended: Tensor) -> tuple[Stage, Tensor]:
        middle = x + (getattr(layer, attention_out)(attended) if attention_out else attended)
        entering = getattr(layer, ffn_norm)(middle)
        out = layer.mlp(entering)
        end = middle + (getattr(layer, ffn_out)(out) if ffn_out else out)
        return (x, getattr(layer, attention_norm)(x), middle, entering), end

    return run


def parallel(attention_norm: str, ffn_norm: str) -> Run:
    def run(layer: Any, x: Tensor, attended: Tensor) -> tuple[Stage, Tensor]:
        entering = getattr(layer, ffn_norm)(x)
        return (x, getattr(layer, attention_norm)(x), x, entering), x + attended + layer.mlp(entering)

    return run


def bloom(layer: Any, x: Tensor, attended: Tensor) -> tuple[Stage, Tensor]:
    entering = layer.post_attention_layernorm(attended)  # its attention adds the residual itself, and so does its FFN
    return (x, layer.input_layernorm(x), attended, entering), layer.mlp(entering, attended)


def opt_ffn(layer: Any, x: Tensor) -> Tensor:
    out: Tensor = layer.fc2(torch.relu(layer.fc1(x)))
    return out


def opt_pre_norm(layer: Any, x: Tensor, attended: Tensor) -> tuple[Stage, Tensor]:
    middle = x + attended
    entering = layer.final_layer_norm(middle)
    return (x, layer.self_attn_layer_norm(x), middle, entering), middle + opt_ffn(layer, entering)


def opt_post_norm(layer: Any, x: Tensor, attended: Tensor) -> tuple[Stage, Tensor]:
    middle = x + attended
    entering = layer.self_attn_layer_norm(middle)
    return (x, x, middle, entering), entering + opt_ffn(layer, entering)  # the end before its norm


def olmo2(layer: Any, x: Tensor, attended: Tensor) -> tuple[Stage, Tensor]:
    middle = x + layer.post_attention_layernorm(attended)
    return (x, x, middle, middle), middle + layer.post_feedforward_layernorm(layer.mlp(middle))


GPT_LAYER = pre_norm("ln_1", "ln_2")
LLAMA_LAYER = pre_norm("input_layernorm", "post_attention_layernorm")
GEMMA_LAYER = pre_norm(
    "input_layernorm", "pre_feedforward_layernorm",
    attention_out="post_attention_layernorm", ffn_out="post_feedforward_layernorm",
)  # fmt: skip

# per tiny model: the layers, the attention module in one, its and the FFN's first linear map, the last layer by hand,
# the final norm
Reference = tuple[str, str, str, str, Run, str]
LLAMA_LIKE: Reference = ("layers", "self_attn", "self_attn.q_proj", "mlp.gate_proj", LLAMA_LAYER, "norm")
GEMMA_LIKE: Reference = (*LLAMA_LIKE[:4], GEMMA_LAYER, "norm")
OPT_LIKE = ("decoder.layers", "self_attn", "self_attn.q_proj", "fc1")
NEOX_LIKE = ("layers", "attention", "attention.query_key_value", "mlp.dense_h_to_4h")
BLOOM_LIKE = ("h", "self_attention", "self_attention.query_key_value", "mlp.dense_h_to_4h")
REFERENCES: dict[str, Reference] = {
    "gpt2": ("h", "attn", "attn.c_attn", "mlp.c_fc", GPT_LAYER, "ln_f"),
    "gpt_neo": ("h", "attn", "attn.attention.q_proj", "mlp.c_fc", GPT_LAYER, "ln_f"),
    "gptj": ("h", "attn", "attn.q_proj", "mlp.fc_in", parallel("ln_1", "ln_1"), "ln_f"),
    "gpt_neox-parallel": (*NEOX_LIKE, parallel("input_layernorm", "post_attention_layernorm"), "final_layer_norm"),
    "gpt_neox-sequential": (*NEOX_LIKE, LLAMA_LAYER, "final_layer_norm"),
    "opt-pre-norm": (*OPT_LIKE, opt_pre_norm, "decoder.final_layer_norm"),
    "opt-no-final-norm": (*OPT_LIKE, opt_pre_norm, ""),
    "opt-post-norm": (*OPT_LIKE, opt_post_norm, "decoder.layers.1.final_layer_norm"),
    "llama": LLAMA_LIKE,
    "mistral": LLAMA_LIKE,
    "qwen2": LLAMA_LIKE,
    "qwen3": LLAMA_LIKE,
    "phi3": ("layers", "self_attn", "self_attn.qkv_proj", "mlp.gate_up_proj", LLAMA_LAYER, "norm"),
    "gemma2": GEMMA_LIKE,
    "gemma3_text": GEMMA_LIKE,
    "olmo2": (*LLAMA_LIKE[:4], olmo2, "norm"),
    "bloom": (*BLOOM_LIKE, bloom, "ln_f"),
    "falcon-sequential-alibi": (*BLOOM_LIKE, LLAMA_LAYER, "ln_f"),
    "falcon-parallel": (*BLOOM_LIKE, parallel("input_layernorm", "input_layernorm"), "ln_f"),
    "falcon-new-decoder": (*BLOOM_LIKE, parallel("ln_attn", "ln_mlp"), "ln_f"),
    "falcon-new-decoder-one-norm": (*BLOOM_LIKE, parallel("input_layernorm", "input_layernorm"), "ln_f"),
}


def captured(tiny: Tiny, key_function: str, input_ids: Tensor, attention_mask: Tensor | None = None) -> Tensor:
    with torch.no_grad():
        return capture(tiny.lm._model.base_model, tiny.row.site(key_function), input_ids, attention_mask)[1]


def test_keys_equal_the_last_layer_run_by_hand(tiny: Tiny) -> None:
    layers, attention, _, _, run, final_norm = REFERENCES[tiny.name]
    base, input_ids = tiny.plain.base_model, ids()
    layer = base.get_submodule(layers)[1]
    _, attended, answer = observe(tiny.plain, layer.get_submodule(attention), input_ids)
    with torch.no_grad():
        (before_attention, at_attention, before_ffn, at_ffn), end = run(layer, answer.hidden_states[1], attended)
        output = base.get_submodule(final_norm)(end) if final_norm else end
        project = getattr(getattr(base, "decoder", None), "project_out", None)  # OPT-350m's
        logits = tiny.plain.get_output_embeddings()(output if project is None else project(output))
        # the hand-run layer is the model's own: it leads to its logits
        assert_close(tiny.row.adjust_logits(logits, tiny.plain.config), answer.logits, "logits")
    expected = {
        "attention_input_before_norm": before_attention,
        "attention_input": at_attention,
        "ffn_input_before_norm": before_ffn,
        "ffn_input": at_ffn,
        "model_output_before_norm": end,
        "model_output": output,
    }
    for key_function in KEY_FUNCTIONS:
        if isinstance(tiny.row.keys[key_function], Refusal):
            continue
        keys = captured(tiny, key_function, input_ids)
        assert keys.shape == (3, 20, WIDTH)
        assert_close(keys, expected[key_function], key_function)


def test_keys_of_an_earlier_layer_equal_that_layer_run_by_hand(tiny: Tiny) -> None:
    layers, attention, _, _, run, _ = REFERENCES[tiny.name]
    base, input_ids = tiny.plain.base_model, ids()
    layer = base.get_submodule(layers)[0]
    _, attended, answer = observe(tiny.plain, layer.get_submodule(attention), input_ids)
    with torch.no_grad():
        stage, _ = run(layer, answer.hidden_states[0], attended)
    names = ("attention_input_before_norm", "attention_input", "ffn_input_before_norm", "ffn_input")
    for name, expected in zip(names, stage, strict=True):
        if not isinstance(tiny.row.keys[name], Refusal):
            assert_close(captured(tiny, f"{name}@-2", input_ids), expected, name)
            with torch.no_grad():
                alone = capture_keys(tiny.lm._model.base_model, tiny.row.site(f"{name}@-2"), input_ids)
            assert_close(alone, expected, name)
    with pytest.raises(ModelError, match=r"layers?\.-3|h\.-3") as caught:
        captured(tiny, "ffn_input@-3", input_ids)
    assert "this model has 2 layers" in caught.value.message


def test_ffn_and_attention_keys_are_what_their_first_linear_map_reads(tiny: Tiny) -> None:
    layers, _, first_of_attention, first_of_ffn, _, _ = REFERENCES[tiny.name]
    layer, input_ids = tiny.plain.base_model.get_submodule(layers)[1], ids()
    for key_function, consumer in (("attention_input", first_of_attention), ("ffn_input", first_of_ffn)):
        entering, _, _ = observe(tiny.plain, layer.get_submodule(consumer), input_ids)
        assert_close(captured(tiny, key_function, input_ids), entering.reshape(3, 20, WIDTH), key_function)


def test_hidden_states_are_what_the_head_reads(tiny: Tiny) -> None:
    entering, _, _ = observe(tiny.plain, tiny.plain.get_output_embeddings(), ids())
    with torch.no_grad():
        hidden = encode(tiny.lm._model.base_model, ids())
        also, _ = capture(tiny.lm._model.base_model, tiny.row.site("ffn_input"), ids())
    assert_close(hidden, entering)
    np.testing.assert_array_equal(also, hidden)


def test_a_pass_for_keys_alone_ends_at_the_keys(tiny: Tiny) -> None:
    base: Any = tiny.lm._model.base_model
    input_ids = ids()
    layers, _, _, first_of_ffn, _, final_norm = REFERENCES[tiny.name]
    behind = [base.get_submodule(layers)[1].get_submodule(first_of_ffn)]
    behind += [base.get_submodule(final_norm)] if final_norm else []
    ran: list[nn.Module] = []
    with torch.no_grad():
        hidden, keys = capture(base, tiny.row.site("ffn_input"), input_ids)
        handles = [module.register_forward_hook(lambda module, *_: ran.append(module)) for module in behind]
        np.testing.assert_array_equal(capture_keys(base, tiny.row.site("ffn_input"), input_ids), keys)
        assert not ran
        for handle in handles:
            handle.remove()
        for key_function in KEY_FUNCTIONS:
            if not isinstance(tiny.row.keys[key_function], Refusal):
                expected = captured(tiny, key_function, input_ids)
                found = capture_keys(base, tiny.row.site(key_function), input_ids)
                np.testing.assert_array_equal(found, expected, err_msg=key_function)
        np.testing.assert_array_equal(encode(base, input_ids), hidden)  # nothing stays behind


def test_the_last_ffn_runs_only_where_asked(tiny: Tiny) -> None:
    base: Any = tiny.lm._model.base_model
    input_ids, site = ids(), tiny.row.site("ffn_input")
    layers, _, _, first_of_ffn, _, _ = REFERENCES[tiny.name]
    rows = torch.tensor([3, 19, 20, 44])
    ran: list[int] = []
    first = base.get_submodule(layers)[1].get_submodule(first_of_ffn)
    handle = first.register_forward_hook(lambda _m, args, _o: ran.append(args[0].shape[:-1].numel()))
    with torch.no_grad():
        hidden, keys = capture(base, site, input_ids)
        ran.clear()
        with only_at(base, site, input_ids, rows):
            narrow, narrow_keys = capture(base, site, input_ids)
        assert ran == [len(rows)]
        handle.remove()
        np.testing.assert_array_equal(narrow_keys, keys)
        assert_close(narrow.flatten(0, 1)[rows], hidden.flatten(0, 1)[rows])
        np.testing.assert_array_equal(encode(base, input_ids), hidden)


@pytest.mark.parametrize(("side", "masked"), [("left", True), ("right", True), ("right", False)])
def test_padding_changes_no_key(tiny: Tiny, side: str, masked: bool) -> None:
    lengths, width, base = (20, 13, 5), 20, tiny.lm._model.base_model
    alone = [ids(1, length) for length in lengths]
    padded, mask = torch.full((3, width), 7), torch.zeros((3, width), dtype=torch.int64)
    places = [slice(width - n, width) if side == "left" else slice(n) for n in lengths]
    for row, place in enumerate(places):
        padded[row, place], mask[row, place] = alone[row][0], 1
    with torch.no_grad():
        hidden, keys = capture(base, tiny.row.site("ffn_input"), padded, mask if masked else None)
        for row, place in enumerate(places):
            hidden_alone, keys_alone = capture(base, tiny.row.site("ffn_input"), alone[row])
            assert_close(keys[row, place], keys_alone[0])
            assert_close(hidden[row, place], hidden_alone[0])


def hooks(model: nn.Module) -> int:
    return sum(len(m._forward_hooks) + len(m._forward_pre_hooks) for m in model.modules())


@pytest.mark.parametrize("key_function", ["ffn_input", "model_output"])  # one before a module, one after
def test_hooks_are_gone_after_a_call_and_after_an_error(llama: Tiny, key_function: str) -> None:
    base = llama.lm._model.base_model
    before = hooks(base)
    captured(llama, key_function, ids())
    assert hooks(base) == before
    with pytest.raises(IndexError):
        captured(llama, key_function, torch.full((1, 4), VOCAB))
    assert hooks(base) == before


def test_a_site_the_model_does_not_have_is_named(llama: Tiny) -> None:
    with pytest.raises(ModelError, match=r"LlamaModel has no module 'layers\.-1\.router'"):
        capture(llama.lm._model.base_model, Site("layers.-1.router", "input", ""), ids())


def test_a_site_without_one_vector_per_token_is_refused(llama: Tiny) -> None:
    with pytest.raises(ModelError, match=r"input of layers was nothing"):
        capture(llama.lm._model.base_model, Site("layers", "input", ""), ids())
