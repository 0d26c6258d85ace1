"""Templates rendered in a process of their own: the same text, and an end to those that would not end."""

import time
from concurrent.futures import ThreadPoolExecutor
from datetime import UTC, datetime

import pytest

from hybrid_jax.chat_template import compile_template
from hybrid_jax.server.template_process import IsolatedTemplate

SOURCE = """{% for m in messages %}{{ bos_token }}{{ m.content }}{% if m.content == 'loop' %}
{% for a in range(99999) %}{% for b in range(99999) %}{% endfor %}{% endfor %}{% endif %}
{% if m.content == 'grow' %}{{ 'x'.center(2 ** 3) }}{{ 'x'.center(3000000000) }}{% endif %}{% endfor %}
{% if tools %}{{ tools | tojson }}{% endif %}{% if mood %}{{ mood }}{% endif %}
{% if strftime_now is defined %}{{ strftime_now('%Y') }}{% endif %}"""


@pytest.fixture
def plain():
    return compile_template(SOURCE.replace("2 ** 3", "8").encode(), {"bos_token": "<s>"})


@pytest.fixture
def isolated(plain):
    found = IsolatedTemplate(plain, render_s=3.0)
    yield found
    found.close()


def say(text):
    return [{"role": "user", "content": text}]


@pytest.mark.parametrize("text", ["hello", "ünï\n{{ 1 }}", "\ud800", "x" * 100_000, 'a\\n"'])
def test_the_text_is_the_same(plain, isolated, text):
    tools, now = [{"name": "f", "é": [1.5, None]}], datetime(2020, 1, 2, tzinfo=UTC)
    assert isolated.render(say(text), tools, True, {"mood": "well"}, now) == plain.render(
        say(text), tools, True, {"mood": "well"}, now
    )
    assert (isolated.source, isolated.reads_tools) == (plain.source, True)


def test_refusals_are_the_same(plain, isolated):
    for variables in ({"other": 1}, {"mood": [1]}):
        with pytest.raises(ValueError) as here:
            plain.render(say("a"), variables=variables)
        with pytest.raises(ValueError) as there:
            isolated.render(say("a"), variables=variables)
        assert str(there.value) == str(here.value)


def test_one_that_loops_is_cut_and_the_next_is_served(isolated):
    assert "hello" in isolated.render(say("hello"))
    begin = time.monotonic()
    with pytest.raises(ValueError, match="took over 3 s"):
        isolated.render(say("loop"))
    assert time.monotonic() - begin < 30
    assert "hello" in isolated.render(say("hello"))


def test_one_that_takes_all_memory_is_refused(isolated):
    with pytest.raises(ValueError, match="chat template"):
        isolated.render(say("grow"))
    assert "hello" in isolated.render(say("hello"))


def test_threads_do_not_mix(isolated):
    with ThreadPoolExecutor(3) as pool:
        texts = list(pool.map(lambda i: isolated.render(say(f"text {i}.")), range(30)))
    assert all(f"text {index}." in text for index, text in enumerate(texts))
