"""Chat templates: what they make of messages, and what they cannot do."""

import json
from typing import Any

import pytest

from knnlm.chat import ChatTemplate
from knnlm.errors import InvalidRequest, TooLarge

USER = {"role": "user", "content": " Is it a bird? "}
MESSAGES = [{"role": "system", "content": "Be brief."}, USER, {"role": "assistant", "content": "No."}, USER]

CHATML = """{% for message in messages %}
{{- '<|im_start|>' + message['role'] + '\\n' + message['content'] | trim + '<|im_end|>' + '\\n' }}
{%- endfor %}
{%- if add_generation_prompt %}
    {{- '<|im_start|>assistant\\n' }}
{%- endif %}"""

LLAMA = """{{ bos_token }}
{%- if messages[0]['role'] == 'system' %}
    {%- set system, rest = '<<SYS>>' ~ messages[0]['content'] ~ '<</SYS>> ', messages[1:] %}
{%- else %}
    {%- set system, rest = '', messages %}
{%- endif %}
{%- for message in rest %}
    {%- if (message.role == 'user') != (loop.index0 % 2 == 0) %}
        {{- raise_exception('roles must alternate') }}
    {%- endif %}
    {%- if message.role == 'user' %}
        {{- '[INST] ' + (system if loop.first else '') + message.content.strip() + ' [/INST]' }}
    {%- else %}
        {%- generation %}{{ message.content | trim }}{% endgeneration %}{{ eos_token }}
    {%- endif %}
{%- endfor %}"""


METHODS = (
    "{{ 'aXbX'.replace('X', 'y') }}{{ 'aXbX'.replace('X', 'y', 1) }}{{ ','.join(['a', 'b']) }}",
    "{{ ' a '.strip() }}{{ 'a b'.split() }}{{ 'ab'.startswith('a') }}{{ 'a'.ljust(3) }}{{ {'a': 1}.items() | list }}",
)
AROUND = (
    "BODY",
    "{% for m in messages %}BODY{% endfor %}",
    "{% block part %}BODY{% endblock %}",
    "{% macro part(x) %}BODY{% endmacro %}{% for m in messages %}{{ part(m) }}{% endfor %}",
    "{% macro part() %}{{ caller() }}{% endmacro %}{% call part() %}BODY{% endcall %}",
)


def rendered(source: str, messages: Any = MESSAGES, max_characters: int = 10_000) -> str:
    return ChatTemplate(source, bos_token="<s>", eos_token="</s>").render(messages, max_characters=max_characters)


def refusal(source: str, messages: Any = MESSAGES) -> str:
    with pytest.raises(InvalidRequest) as raised:
        rendered(source, messages)
    assert raised.value.param == "messages"
    assert len(raised.value.message) < 400
    return raised.value.message


def test_messages_become_a_prompt() -> None:
    asked = "<|im_start|>user\nIs it a bird?<|im_end|>\n"
    assert rendered(CHATML) == (
        f"<|im_start|>system\nBe brief.<|im_end|>\n{asked}<|im_start|>assistant\nNo.<|im_end|>\n{asked}"
        "<|im_start|>assistant\n"
    )
    assert (
        rendered(LLAMA) == "<s>[INST] <<SYS>>Be brief.<</SYS>> Is it a bird? [/INST]No.</s>[INST] Is it a bird? [/INST]"
    )
    assert refusal(LLAMA, [USER, USER]) == "the model's chat template refuses the messages: roles must alternate"


def test_they_are_what_transformers_makes_of_them() -> None:
    utils = pytest.importorskip("transformers.utils.chat_template_utils")
    others = (
        "{% for m in messages %}\n  {% if loop.last %}{{ m | tojson }}{% continue %}{% endif %}\n"
        "{{ loop.index }}\n{% endfor %}",
        "{% set ns = namespace(n=0) %}{% for m in messages %}{% set ns.n = ns.n + m.content | length %}"
        "{% endfor %}{{ ns.n }}",
        "{{ messages | map(attribute='role') | join(', ') }} {{ '<a>' | tojson }}"
        " {{ {'a': [1]} | tojson(indent=2) | indent(2) }}",
        "{{ messages | selectattr('role', 'equalto', 'user') | list | length }}"
        "{{ messages[-1].content.split('it')[1] }}",
        "{% macro tag(x) %}<{{ x }}>{% endmacro %}{{ tag('a') }}"
        "{{ 'aXbX' | replace('X', '--') }}{{ 'aXb'.replace('X', 'y') }}",
        "{{ messages[0].missing is defined }}{{ messages[0]['name'] }}{{ none }}"
        "{{ '-' * 3 }}{{ 7 // 2 }}{{ '/'.join(['a', 'b']) }}",
        "{{ '%s of %d' % ('a', 3) }}{{ '{:>4}'.format('b') }}{{ '%s' | format(1) }}{{ 'c' | center(5) }}",
        *(around.replace("BODY", body) for around in AROUND for body in METHODS),
    )  # fmt: skip
    for source in (CHATML, LLAMA, *others):
        (expected,), _ = utils.render_jinja_template(
            [MESSAGES], chat_template=source, add_generation_prompt=True, bos_token="<s>", eos_token="</s>"
        )
        assert rendered(source) == expected, source


@pytest.mark.parametrize(
    "source",
    [
        "{{ messages.__class__.__base__.__subclasses__() }}",
        "{{ raise_exception.__globals__.items() }}",
        "{{ self.__init__() }}",
        "{{ messages.append(1) }}",
        "{{ messages[0].update(role='x') }}",
        "{% include 'secret' %}",
        "{% if %}",
        "{{ messages.0.role.content.nothing }}",
    ],
)
def test_a_template_reaches_nothing_else(source: str) -> None:
    assert "the model's chat template cannot be used" in refusal(source)


@pytest.mark.parametrize(
    "name",
    [
        "''.__class__",
        "raise_exception.__globals__",
        "self.__init__",
        "messages.append",
        "'{0.__class__}'.format(messages)",
    ],
)
def test_what_is_hidden_is_nothing(name: str) -> None:
    assert rendered("{{ " + name + " }}") == ""


def test_a_template_that_recurses_for_ever_fails() -> None:
    for source in (
        "{% macro f(n) %}{{ f(n) }}{% endmacro %}{{ f(1) }}",
        "{% for m in messages recursive %}{{ loop(messages) }}{% endfor %}",
        "{{ " + "(" * 3000 + "1" + ")" * 3000 + " }}",
    ):
        assert "RecursionError" in refusal(source)


def test_half_of_a_character_is_refused() -> None:
    assert "UnicodeEncodeError" in refusal("{{ 'a\\ud800b' }}")
    assert refusal("{{ raise_exception('a\\ud800b') }}").endswith("refuses the messages: a?b")


def test_a_long_prompt_is_refused_and_long_messages_are_not() -> None:
    message = {"role": "user", "content": "a word " * 100_000}
    assert len(rendered(CHATML, [message] * 4, max_characters=1 << 24)) > 2_000_000
    with pytest.raises(TooLarge, match="more than 1000 characters"):
        rendered(CHATML, [message], max_characters=1000)


def test_one_rendering_leaves_nothing_to_the_next() -> None:
    template = ChatTemplate("{% set x = (x or 0) + 1 %}{{ x }}{{ messages | tojson }}")
    given = [dict(USER)]
    first = template.render(given, max_characters=100)
    assert first == "1" + json.dumps([USER]) == template.render(given, max_characters=100)
    for _ in range(3):  # a budget is one rendering's
        with pytest.raises(TooLarge):
            template.render(given, max_characters=3)
    assert template.render(given, max_characters=100) == first
