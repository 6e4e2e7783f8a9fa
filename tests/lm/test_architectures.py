from types import SimpleNamespace

import pytest

from knnlm.errors import InvalidRequest, ModelError, UnknownArchitecture
from knnlm.lm.architectures import KEY_FUNCTIONS, TABLE, Architecture, Refusal, find
from tests.lm.tiny_models import CONFIGS

every_row = pytest.mark.parametrize("row", TABLE, ids=lambda row: row.name)


@every_row
def test_a_row_says_where_every_key_function_is_and_what_it_means(row: Architecture) -> None:
    assert set(row.keys) == set(KEY_FUNCTIONS)
    for entry in row.keys.values():
        assert entry.reason if isinstance(entry, Refusal) else entry.means


@every_row
def test_the_default_key_function_exists_everywhere(row: Architecture) -> None:
    assert row.site("ffn_input").side == "input"


@every_row
def test_a_row_is_tested_by_a_tiny_model(row: Architecture) -> None:
    assert row.name in {find(make()).name for make in CONFIGS.values()}


@every_row
def test_a_refused_key_function_says_who_refuses_what_and_why(row: Architecture) -> None:
    for name, entry in row.keys.items():
        if isinstance(entry, Refusal):
            with pytest.raises(ModelError) as caught:
                row.site(name)
            assert row.name in caught.value.message
            assert name in caught.value.message
            assert entry.reason in caught.value.message


def test_a_name_that_is_no_key_function_is_refused_with_the_names_that_are() -> None:
    with pytest.raises(InvalidRequest, match=r"ffn_input_before_norm.*'last_hidden'") as caught:
        TABLE[0].site("last_hidden")
    assert caught.value.param == "key_function"


@pytest.mark.parametrize("layer", ["@-1", "@", "@1", "@-02", "@-2 ", "@-1000", "@-2@-2"])
def test_an_earlier_layer_is_named_in_one_way(layer: str) -> None:
    with pytest.raises(InvalidRequest, match="with @-2, @-3 and so on for an earlier layer"):
        TABLE[0].site(f"ffn_input{layer}")


def test_the_models_output_is_that_of_the_last_layer() -> None:
    with pytest.raises(InvalidRequest, match="one of the first 4"):
        TABLE[0].site("model_output@-2")


def test_an_unknown_architecture_lists_the_known_ones_and_how_to_add_one() -> None:
    with pytest.raises(UnknownArchitecture) as caught:
        find(SimpleNamespace(model_type="mamba"))
    assert "'mamba'" in caught.value.message
    assert "knnlm/lm/architectures.py" in caught.value.message
    for row in TABLE:
        assert row.model_type in caught.value.message


def test_a_variant_nobody_can_run_is_unknown() -> None:
    # transformers has no norm to call for it: the old decoder with two norms
    config = CONFIGS["falcon-parallel"]()
    config.num_ln_in_parallel_attn = 2
    with pytest.raises(UnknownArchitecture, match="falcon"):
        find(config)
