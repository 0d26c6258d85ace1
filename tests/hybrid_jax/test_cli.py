"""The command line, run as a user runs it: output, exit codes, one clear message for bad input."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

from hybrid_jax import cli
from hybrid_jax.server import process
from tests.models.reference import FOLDER

CONFIGS = Path(__file__).parents[1] / "configs"


def run(*arguments):
    command = [sys.executable, "-m", "hybrid_jax.cli", *map(str, arguments)]
    return subprocess.run(command, capture_output=True, text=True, timeout=300, stdin=subprocess.DEVNULL)


def test_routing_of_the_demo_is_a_table():
    done = run("routing", "demo")
    assert done.returncode == 0 and "lightning" in done.stdout and "mla" in done.stdout
    assert "14,180,992 target parameters" in done.stdout


def test_routing_of_a_bare_config_as_json():
    done = run("routing", CONFIGS / "Ling-2.6-1T.json", "--json")
    data = json.loads(done.stdout)
    assert data["parameters"] == 1_025_414_405_632
    assert data["layers"][7] == {
        "role": "target", "layer": 7, "kind": "mla", "keeps": "pages", "bytes": 1152, "backend": "xla",
    }  # fmt: skip
    assert data["layers"][-1]["role"] == "draft" and len(data["layers"]) == 81


@pytest.mark.slow
def test_generate_streams_text_that_a_seed_repeats():
    first = run("generate", "demo", "--prompt", "Once upon a time", "--max-tokens", 20, "--seed", 3)
    assert first.returncode == 0, first.stderr
    assert first.stdout.startswith("Once upon a time") and len(first.stdout) > 40
    again = run("generate", "demo", "--prompt", "Once upon a time", "--max-tokens", 20, "--seed", 3)
    assert again.stdout == first.stdout


@pytest.mark.slow
def test_convert_both_ways_and_verify(tmp_path):
    source, orbax, back = FOLDER / "ling2_5_mtp", tmp_path / "orbax", tmp_path / "hf"
    assert run("convert", source, orbax, "--to", "orbax").returncode == 0
    assert run("verify", orbax).returncode == 0
    assert run("convert", orbax, back, "--to", "hf").returncode == 0
    assert (back / "model.safetensors").read_bytes() == (source / "model.safetensors").read_bytes()
    inspected = run("inspect", back)
    assert inspected.returncode == 0 and "BailingMoeV2_5ForCausalLM" in inspected.stdout
    (back / "model.safetensors").write_bytes(b"\xff" * 100)
    assert run("verify", back).returncode == 1


def test_a_loop_of_links_is_one_message(tmp_path):
    (tmp_path / "config.json").symlink_to(tmp_path / "config.json")
    done = run("routing", tmp_path)
    assert done.returncode == 2 and "Traceback" not in done.stderr


def test_verify_and_inspect_take_the_demo():
    assert run("verify", "demo").returncode == 0
    assert run("inspect", "demo").returncode == 0


@pytest.mark.parametrize(
    "arguments, message",
    [
        (["routing", "no-such-model"], "wanted a model directory"),
        (["verify"], ""),
        (["frobnicate"], ""),
        (["generate", "demo", "--prompt", "x", "--temperature", "9"], "wanted temperature from 0 to 2"),
        (["routing", FOLDER / "lfm2", "--backend", "gpu"], "has no gpu kernel"),
        (["routing", "m[/x]"], "wanted a model directory"),
        (["routing", "x" * 5000], "hybrid-jax:"),
        (["convert", FOLDER / "ling2_5", "/dev/null/x", "--to", "orbax"], "hybrid-jax:"),
    ],
)
def test_bad_input_is_one_message_and_exit_code_2(arguments, message):
    done = run(*arguments)
    assert done.returncode == 2 and message in done.stderr and "Traceback" not in done.stderr


def test_generate_hands_on_what_weights_become(monkeypatch):
    asked = {}

    def opened(*_, **settings):
        asked.update(settings)
        raise ValueError("enough")

    monkeypatch.setattr(cli, "LLM", opened)
    with pytest.raises(ValueError, match="enough"):
        cli.generate("demo", prompt="x", quantization="int8")
    assert asked["quantization"] == "int8"


def test_serve_hands_on_how_long_a_request_may_wait(monkeypatch):
    found = []
    monkeypatch.setattr(process, "serve", lambda _, config: found.append(config))
    with pytest.raises(SystemExit):
        cli.serve("demo", queue_timeout_s=7.0)
    assert found[0].queue_timeout_s == 7.0
