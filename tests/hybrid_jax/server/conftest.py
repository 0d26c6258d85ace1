"""One real server for all tests of routes: the demo model with a template that knows of tools and of thinking."""

import json
import shutil
import signal
from pathlib import Path

import openai
import pytest

import hybrid_jax
from tests.hybrid_jax.server.live import KEY, start

DEMO = Path(hybrid_jax.__file__).parent / "demo"
MARKERS = ("<think>", "</think>")
TEMPLATE = """{{ eos_token }}
{%- if tools %}<tool_call> {% for tool in tools %}{{ tool.function.name }} {% endfor %}{% endif %}
{%- for message in messages %}
{%- if message.role == 'user' %}<|user|>{{ message.content }}
{%- elif message.role == 'tool' %}<|user|>{{ message.content }}
{%- elif message.role == 'assistant' %}<|assistant|>{{ message.content }}
{%- for call in message.tool_calls or [] %}
<tool_call>
{{ call.function | tojson }}
</tool_call>{% endfor %}<|end|>
{%- else %}{{ raise_exception('the roles are user, assistant and tool') }}{% endif %}
{%- if message.content == 'loop forever' %}
{%- for a in range(99999) %}{% for b in range(99999) %}{% endfor %}{% endfor %}
{%- endif %}
{%- endfor %}{% if add_generation_prompt %}<|assistant|>
{%- if enable_thinking is defined %}{{ '<think>\\n' if enable_thinking else '<think>\\n\\n</think>\\n\\n' }}{% endif %}
{%- endif %}"""


def make_checkpoint(folder: Path) -> Path:
    """The demo with this template, and with the last two tokens of its vocabulary as the markers of thinking."""
    for path in DEMO.iterdir():
        if path.is_file() and path.name not in ("tokenizer.json", "tokenizer_config.json"):
            shutil.copyfile(path, folder / path.name)
    (folder / "tokenizer_config.json").write_text(json.dumps({"eos_token": "<|endoftext|>"}))
    (folder / "chat_template.jinja").write_text(TEMPLATE)
    tokenizer = json.loads((DEMO / "tokenizer.json").read_text())
    vocabulary = tokenizer["model"]["vocab"]
    last = sorted(vocabulary, key=vocabulary.__getitem__)[-2:]
    tokenizer["model"]["merges"] = tokenizer["model"]["merges"][:-2]
    for content, token in zip(MARKERS, last, strict=True):
        added = {"id": vocabulary.pop(token), "content": content, "special": False}
        flags = dict.fromkeys(("single_word", "lstrip", "rstrip", "normalized"), False)
        tokenizer["added_tokens"].append(added | flags)
    (folder / "tokenizer.json").write_text(json.dumps(tokenizer))
    return folder


@pytest.fixture(scope="session")
def checkpoint(tmp_path_factory):
    return make_checkpoint(tmp_path_factory.mktemp("checkpoint"))


@pytest.fixture(scope="session")
def compiled(tmp_path_factory):
    return tmp_path_factory.mktemp("compiled")


@pytest.fixture(scope="session")
def live(tmp_path_factory, compiled, checkpoint):
    server = start(tmp_path_factory.mktemp("server"), compiled, "--served-model-name", "demo", model=str(checkpoint))
    yield server
    server.process.send_signal(signal.SIGTERM)
    assert server.process.wait(60) == 0, server.log_path.read_text()


@pytest.fixture(scope="session")
def client(live):
    with openai.OpenAI(base_url=live.url + "/v1", api_key=KEY, max_retries=0) as found:
        yield found
