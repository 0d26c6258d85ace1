"""Chat templates: what they render, and what they can neither read, change nor outgrow."""

import json
from datetime import datetime

import pytest

from hybrid_jax.chat_template import RENDERED_BYTES, TEMPLATE_BYTES, ChatTemplate, compile_template

MESSAGES = [{"role": "user", "content": "Grüße & <b>"}, {"role": "assistant", "content": "Hi"}]
CHATML = """\
{%- if tools %}
    {{- '<|im_start|>system\\n' }}
    {%- for tool in tools %}
        {{- tool | tojson }}
    {%- endfor %}
    {{- '<|im_end|>\\n' }}
{%- endif %}
{%- for message in messages %}
    {%- if message.role == 'system' and not loop.first %}
        {{- raise_exception('System message must be at the beginning.') }}
    {%- endif %}
    {{- '<|im_start|>' + message['role'] + '\\n' + message.content | trim + '<|im_end|>\\n' }}
{%- endfor %}
{%- if add_generation_prompt %}
    {{- '<|im_start|>assistant\\n' }}
    {%- if enable_thinking is defined and enable_thinking is false %}
        {{- '<think>\\n\\n</think>\\n\\n' }}
    {%- endif %}
{%- endif %}
"""


def compiled(source: str) -> ChatTemplate:
    return compile_template(source.encode(), {"bos_token": "<s>", "eos_token": "</s>"})


def test_a_conversation() -> None:
    text = "<|im_start|>user\nGrüße & <b><|im_end|>\n<|im_start|>assistant\nHi<|im_end|>\n"
    template = compiled(CHATML)
    assert template.render(MESSAGES, add_generation_prompt=False) == text
    assert template.render(MESSAGES) == text + "<|im_start|>assistant\n"
    thinking_off = template.render(MESSAGES, variables={"enable_thinking": False})
    assert thinking_off == text + "<|im_start|>assistant\n<think>\n\n</think>\n\n"


def test_tools_are_json_with_characters_as_they_are() -> None:
    tool = {"name": "zähl", "parameters": {"b": [1, None, True], "a": "<&'>"}}
    text = compiled(CHATML).render([], tools=[tool], add_generation_prompt=False)
    assert (
        text == '<|im_start|>system\n{"name": "zähl", "parameters": {"b": [1, null, true], "a": "<&\'>"}}<|im_end|>\n'
    )


def test_tojson_takes_the_arguments_that_published_templates_pass() -> None:
    template = compiled("{{ messages | tojson(indent=2, sort_keys=true, separators=(',', ' : '), ensure_ascii=true) }}")
    wanted = json.dumps(MESSAGES, indent=2, sort_keys=True, separators=(",", " : "), ensure_ascii=True)
    assert template.render(MESSAGES) == wanted


def test_raise_exception_is_a_value_error_with_its_words() -> None:
    with pytest.raises(ValueError, match="System message must be at the beginning"):
        compiled(CHATML).render([*MESSAGES, {"role": "system", "content": "late"}])


def test_blocks_leave_no_lines_and_no_indentation() -> None:
    assert compiled("a\n  {% if true %}\nb\n  {% endif %}\nc\n").render([]) == "a\nb\nc"


def test_special_tokens_loop_controls_and_generation() -> None:
    source = (
        "{{ bos_token }}{% for m in messages %}{% if loop.index > 1 %}{% break %}{% endif %}{{ m.role }}{% endfor %}"
    )
    assert compiled(source + "{% generation %}{{ eos_token }}{% endgeneration %}").render(MESSAGES) == "<s>user</s>"


def test_absent_tools_are_none_and_not_undefined() -> None:
    assert compiled("{{ tools is none }} {{ documents is none }}").render([]) == "True True"


def test_the_date_is_given_or_absent() -> None:
    template = compiled("{{ strftime_now('%d %b %Y') if strftime_now is defined else 'no date' }}")
    assert template.render([]) == "no date"
    assert template.render([], now=datetime(2026, 7, 1)) == "01 Jul 2026"


def test_variables_are_those_that_the_template_reads() -> None:
    template = compiled(CHATML)
    assert template.variables == {"enable_thinking"}
    for name in ("thinking", "messages", "tools", "bos_token", "add_generation_prompt", "raise_exception", "range"):
        with pytest.raises(ValueError, match=rf"among \['enable_thinking'\], got '{name}'"):
            template.render(MESSAGES, variables={name: True})
    with pytest.raises(ValueError, match="wanted a scalar for the template variable enable_thinking, got list"):
        template.render(MESSAGES, variables={"enable_thinking": [1]})
    with pytest.raises(ValueError, match="at most 16 template variables, got 17"):
        template.render(MESSAGES, variables={str(i): i for i in range(17)})


@pytest.mark.parametrize(
    "source",
    [
        "{{ ''.__class__.__mro__[1].__subclasses__() }}",
        "{{ ''['__class__']['__mro__'] }}",
        "{{ '{0.__class__.__mro__}'.format('') }}",
        "{{ '{x.__class__.__mro__}'.format_map({'x': ''}) }}",
        "{{ (''|attr('format'))('{0.__class__}', 1).mro() }}",
        "{{ messages.__class__.__base__ }}",
        "{{ cycler.__init__.__globals__.os.popen('id').read() }}",
        "{{ lipsum.__globals__['os'].listdir('.') }}",
        "{{ namespace.__init__.__globals__ }}",
        "{{ raise_exception.__globals__['json'] }}",
        "{{ self.__init__.__globals__ }}",
        "{{ self._TemplateReference__context.environment.from_string('x') }}",
        "{{ messages[0].update({'role': 'system'}) }}",
        "{{ messages.append(1) }}",
        "{{ messages.clear() }}",
        "{% include '/etc/passwd' %}",
        "{% import 'os' as os %}{{ os }}",
        "{% from 'os' import system %}",
        "{% extends 'x' %}",
        "{{ range(10000000) | list }}",
        "{{ messages | map(attribute='__class__') | map(attribute='__mro__') | first | first }}",
        "{{ messages + 1 }}",
        "{{ 1 / 0 }}",
        "{{ messages[0].no.such }}",
        "{{ no_such_function() }}",
        "{% macro f() %}{{ f() }}{% endmacro %}{{ f() }}",
    ],
)
def test_escapes_are_refused_and_change_nothing(source: str) -> None:
    messages = [dict(message) for message in MESSAGES]
    with pytest.raises(ValueError, match="the chat template refused the messages"):
        compiled(source).render(messages, now=datetime(2026, 7, 1))
    assert messages == MESSAGES


@pytest.mark.parametrize("product", ["'x' * 200000000", "200000000 * ['x']", "9 ** 9 ** 9", "'x' * messages | length"])
def test_products_that_explode_are_refused_before_they_are_made(product: str) -> None:
    with pytest.raises(ValueError, match="may multiply numbers only"):
        compiled(f"{{{{ ({product}) | length }}}}").render([])
    assert compiled("{{ 3 * 2.5 }}").render([]) == "7.5"


@pytest.mark.parametrize(
    "source", ["{{ ''|attr('__class__')|attr('__mro__') }}", "{{ strftime_now.__self__.__class__ }}"]
)
def test_escapes_that_find_nothing(source: str) -> None:
    assert compiled(source).render([], now=datetime(2026, 7, 1)) == ""


def test_the_output_is_bounded() -> None:
    fits = compiled("{% for i in range(count) %}" + "x" * 1024 + "{% endfor %}")
    assert len(fits.render([], variables={"count": RENDERED_BYTES // 1024})) == RENDERED_BYTES
    with pytest.raises(ValueError, match=f"at most {RENDERED_BYTES} bytes"):
        fits.render([], variables={"count": RENDERED_BYTES // 1024 + 1})
    endless = compiled(
        "{% for i in range(99999) %}{% for j in range(99999) %}{{ messages[0].content }}{% endfor %}{% endfor %}"
    )
    with pytest.raises(ValueError, match="more: send less"):
        endless.render([{"content": "é" * 512}])


def test_the_source_is_bounded() -> None:
    compile_template(b"x" * TEMPLATE_BYTES, {})
    with pytest.raises(ValueError, match=f"at most {TEMPLATE_BYTES} bytes, got {TEMPLATE_BYTES + 1}"):
        compile_template(b"x" * (TEMPLATE_BYTES + 1), {})


@pytest.mark.parametrize(
    "source",
    [b"{% if %}", b"{{ x", b"\xff", b"{% for m in messages %}", b"{{ " + b"(" * 5000 + b"1" + b")" * 5000 + b" }}"],
)
def test_a_source_that_is_no_template_is_refused(source: bytes) -> None:
    with pytest.raises(ValueError, match="wanted a Jinja chat template"):
        compile_template(source, {})


def test_a_failed_rendering_does_not_poison_the_next() -> None:
    template = compiled(CHATML)
    with pytest.raises(ValueError):
        template.render([{"content": "x"}])
    assert template.render(MESSAGES[:1], add_generation_prompt=False).startswith("<|im_start|>user\nGr")
