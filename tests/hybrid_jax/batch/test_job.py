"""A job in one process: what it writes, refuses, resumes and repeats."""

import json
import tracemalloc
from collections.abc import Callable
from pathlib import Path

import pytest

from hybrid_jax.batch.index import build_index
from hybrid_jax.batch.settings import BatchConfig
from hybrid_jax.batch.verb import merge_batch
from tests.hybrid_jax.batch.replicas import (
    FakeOpener,
    FakeReplica,
    check_output,
    config_of,
    line,
    read_lines,
    run_fake,
    write_input,
)


def keep(opener: FakeOpener, kept: list[FakeReplica]) -> Callable[[], FakeReplica]:
    def open_replica() -> FakeReplica:
        kept.append(opener())
        return kept[-1]

    return open_replica


def test_every_line_is_answered_once_and_in_order(tmp_path: Path) -> None:
    config = config_of(write_input(tmp_path, 100))
    assert run_fake(config, FakeOpener(delay_s=0.002)) == 0
    check_output(config, 100)
    first = read_lines(config.output)[0]
    assert first["response"]["status_code"] == 200 and first["response"]["request_id"] and first["id"]
    assert not config.folder.shards.exists()


def test_refused_lines_are_errors_and_the_code_says_so(tmp_path: Path) -> None:
    config = config_of(write_input(tmp_path, 40, l3="bad one", l39="bad two"))
    assert run_fake(config) == 3
    check_output(config, 40, failed=(3, 39))
    error = read_lines(config.folder.errors)[0]
    assert error["response"]["status_code"] == 400 and error["response"]["body"]["error"]["code"] == "invalid_value"


def test_a_finished_job_is_not_done_again(tmp_path: Path) -> None:
    config = config_of(write_input(tmp_path, 20, l3="bad one"))
    assert run_fake(config) == 3
    before = config.output.read_bytes()
    assert run_fake(config, lambda: pytest.fail("a model was loaded")) == 3
    assert merge_batch(config) == 3 and config.output.read_bytes() == before


def test_the_answers_of_two_runs_are_equal(tmp_path: Path) -> None:
    config = config_of(write_input(tmp_path, 50))
    run_fake(config, FakeOpener(delay_s=0.003))
    first = config.output.read_bytes()
    again = config_of(config.input, restart=True)
    assert run_fake(again, FakeOpener(window=2)) == 0
    assert config.output.read_bytes() == first
    assert config.folder.work.with_name("out.jsonl.work.1").is_dir()


def test_a_line_keeps_its_own_seed_and_id(tmp_path: Path) -> None:
    path = tmp_path / "in.jsonl"
    path.write_text(f"{line(0, seed=5, request_id='mine')}\n{line(1, seed=None)}\n")
    config = config_of(path)
    run_fake(config)
    bodies = [found["response"]["body"] for found in read_lines(config.output)]
    assert bodies[0]["seed"] == 5 and bodies[0]["id"] == "cmpl-mine"
    assert 0 <= bodies[1]["seed"] < 2**53 and len(bodies[1]["id"]) == len("cmpl-") + 32


# ------------------------------------------------------------------------------------------------------- the input

BAD_LINES = {
    "no JSON": (b"{", "invalid_line"),
    "not UTF-8": (line(5).encode().replace(b"prompt 5", b"\xff\xfe"), "utf-8"),
    "another field": (line(5).replace('"method"', '"verb": 1, "method"').encode(), "verb"),
    "another method": (line(5).replace("POST", "GET").encode(), "GET"),
    "another url": (line(5).replace("/v1/completions", "/v1/embeddings").encode(), "embeddings"),
    "a body that is no object": (b'{"custom_id":"line-5","method":"POST","url":"/v1/completions","body":[]}', "object"),
    "no id": (b'{"method":"POST","url":"/v1/completions","body":{}}', "custom_id"),
    "a long id": (line(5).replace("line-5", "x" * 513).encode(), "513"),
    "a stream": (line(5, stream=True).encode(), "stream"),
    "a list": (b"[1]", "object"),
}


@pytest.mark.parametrize("name", BAD_LINES)
def test_a_line_that_is_no_request_stops_the_job_before_a_model_is_loaded(tmp_path: Path, name: str) -> None:
    text, _ = BAD_LINES[name]
    path = tmp_path / "in.jsonl"
    path.write_bytes(b"".join([line(0).encode(), b"\n", text, b"\n", line(1).encode()]))
    with pytest.raises(ValueError, match="line 2: "):
        run_fake(config_of(path), lambda: pytest.fail("a model was loaded"))
    config = config_of(path, skip_invalid=True)
    assert run_fake(config) == 3
    assert [found["custom_id"] for found in read_lines(config.output)] == ["line-0", "line-1"]
    (error,) = read_lines(config.folder.errors)
    assert error["custom_id"] is None and error["error"]["code"] == "invalid_line"
    assert error["error"]["message"].startswith("line 2: ")


def test_an_id_that_two_lines_have_is_refused_with_both_numbers(tmp_path: Path) -> None:
    path = tmp_path / "in.jsonl"
    path.write_text("\n".join([line(0), "", line(1), line(2), line(1)]))
    with pytest.raises(ValueError, match="'line-1' in the lines 3 and 5"):
        run_fake(config_of(path, skip_invalid=True))


def test_marks_blank_lines_and_carriage_returns_are_passed_over(tmp_path: Path) -> None:
    path = tmp_path / "in.jsonl"
    path.write_bytes(b"\xef\xbb\xbf" + f"{line(0)}\r\n\r\n  \n{line(1)}\r\n{line(2)}".encode())
    config = config_of(path)
    assert run_fake(config) == 0
    check_lines = [found["custom_id"] for found in read_lines(config.output)]
    assert check_lines == ["line-0", "line-1", "line-2"]


def test_a_huge_line_is_refused_without_being_held(tmp_path: Path) -> None:
    path = tmp_path / "in.jsonl"
    with path.open("wb") as file:
        file.write(b'{"custom_id": "')
        for _ in range(100):
            file.write(b"x" * 2**20)
        file.write(b'"}\n' + line(1).encode() + b"\n")
    tracemalloc.start()
    refused: list[tuple[int, str]] = []
    index = build_index(path, lambda number, why: refused.append((number, why)))
    peak_bytes = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert len(index) == 1 and refused[0][0] == 1 and "at most" in refused[0][1]
    assert peak_bytes < 40 * 2**20


def test_an_empty_input_is_refused(tmp_path: Path) -> None:
    (tmp_path / "in.jsonl").write_text("\n")
    with pytest.raises(ValueError, match="empty"):
        run_fake(config_of(tmp_path / "in.jsonl"))


def test_memory_does_not_grow_with_the_file(tmp_path: Path) -> None:
    peaks = []
    for count in (500, 3_000):
        path = tmp_path / str(count) / "in.jsonl"
        path.parent.mkdir()
        with path.open("w") as file:
            file.writelines(f"{line(n, f'{n} ' + 'x' * 400)}\n" for n in range(count))
        tracemalloc.start()
        assert run_fake(config_of(path, shard_lines=256), FakeOpener(remember=False)) == 0
        peaks.append(tracemalloc.get_traced_memory()[1])
        tracemalloc.stop()
    assert (peaks[1] - peaks[0]) / 2_500 < 150  # bytes a line: its place and hash, and sorting those


# ---------------------------------------------------------------------------------------------------- other job's files


def test_files_of_another_job_are_refused_and_named(tmp_path: Path) -> None:
    path = write_input(tmp_path, 20)
    config = config_of(path, engine=(("dtype", "float32"),))
    run_fake(config)
    with pytest.raises(ValueError, match="engine.dtype was float32, is bfloat16"):
        run_fake(config_of(path, engine=(("dtype", "bfloat16"),)))
    with pytest.raises(ValueError, match="seed was 7, is 8"):
        run_fake(config_of(path, engine=config.engine, seed=8))
    assert run_fake(config_of(path, engine=config.engine, seed=None)) == 0  # the manifest knows the seed
    path.write_text(path.read_text().replace("prompt 3", "prompt X"))
    with pytest.raises(ValueError, match="input_sha256"):
        run_fake(config)


def test_a_forced_start_is_recorded(tmp_path: Path) -> None:
    path = write_input(tmp_path, 20)
    run_fake(config_of(path))
    forced = config_of(path, engine=(("dtype", "float32"),), force_resume=True)
    assert run_fake(forced) == 0
    kept = json.loads(forced.folder.manifest.read_text())
    assert kept["overrides"] == ["engine.dtype was None, is float32"] and kept["engine"] == {"dtype": "float32"}
    with pytest.raises(ValueError, match="shard_lines"):
        run_fake(config_of(path, shard_lines=8, force_resume=True))


def test_a_damaged_manifest_is_refused(tmp_path: Path) -> None:
    config = config_of(write_input(tmp_path, 20))
    run_fake(config)
    config.folder.manifest.write_bytes(config.folder.manifest.read_bytes()[:40])
    with pytest.raises(ValueError, match="manifest"):
        run_fake(config)


def test_an_output_of_somebody_else_is_left_alone(tmp_path: Path) -> None:
    config = config_of(write_input(tmp_path, 5))
    config.output.write_text("mine")
    with pytest.raises(ValueError, match="new output"):
        run_fake(config)
    assert config.output.read_text() == "mine"
    with pytest.raises(ValueError, match="other than the input"):
        run_fake(BatchConfig(config.input, config.input, "fake", ("fake",)))


# ------------------------------------------------------------------------------------------------- a breaking engine


def test_lines_survive_a_broken_engine(tmp_path: Path) -> None:
    kept: list[FakeReplica] = []
    config = config_of(write_input(tmp_path, 60))
    opener = FakeOpener(delay_s=0.002, breakers=("prompt 20",), deaths=2)
    assert run_fake(config, keep(opener, kept)) == 0
    check_output(config, 60)
    assert kept[0].starts == 3


def test_a_line_that_breaks_the_engine_each_time_runs_alone_and_then_is_an_error(tmp_path: Path) -> None:
    kept: list[FakeReplica] = []
    config = config_of(write_input(tmp_path, 60))
    assert run_fake(config, keep(FakeOpener(delay_s=0.002, breakers=("prompt 20",)), kept)) == 3
    check_output(config, 60, failed=(20,))
    assert read_lines(config.folder.errors)[0]["error"]["code"] == "engine_broken"
    assert kept[0].starts == 6 and kept[0].beside["prompt 20"] == 0
    assert kept[0].most == 8


def test_an_engine_that_always_breaks_ends_the_job(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    config = config_of(write_input(tmp_path, 60))
    everything = tuple(f"prompt {n}" for n in range(60))
    assert run_fake(config, FakeOpener(breakers=everything)) == 1
    assert "without one answer" in capfd.readouterr().err
    assert run_fake(config) == 0


# --------------------------------------------------------------------------------------------------- order, workers


def test_lines_that_begin_alike_run_one_after_another_longest_group_first(tmp_path: Path) -> None:
    kept: list[FakeReplica] = []
    prompts = {f"l{n}": "abc"[n % 3] * 400 * (1 + n % 3) + f" {n}" for n in range(12)}
    config = config_of(write_input(tmp_path, 12, **prompts))
    run_fake(config, keep(FakeOpener(window=1), kept))
    assert "".join(prompt[0] for prompt in kept[0].order) == "ccccbbbbaaaa"
    check_output(config, 12)


def test_workers_share_the_shards_and_the_last_one_merges(tmp_path: Path) -> None:
    path = write_input(tmp_path, 100, l7="bad")
    journals = [tmp_path / f"journal-{n}" for n in range(3)]
    for index, journal in enumerate(journals):
        worker = config_of(path, shard_index=index, num_shards=3)
        assert not worker.output.exists()
        assert run_fake(worker, FakeOpener(journal=journal)) == 0
    check_output(worker, 100, failed=(7,))
    begun = [text.split(" ", 1)[1] for journal in journals for text in journal.read_text().splitlines()]
    assert len(begun) == len(set(begun)) == 100 and all(journal.exists() for journal in journals)
    assert merge_batch(config_of(path)) == 3


def test_a_job_with_workers_left_is_not_merged(tmp_path: Path) -> None:
    path = write_input(tmp_path, 100)
    run_fake(config_of(path, shard_index=1, num_shards=2))
    with pytest.raises(ValueError, match="4 that are not, first 0"):
        merge_batch(config_of(path))
    run_fake(config_of(path, shard_index=0, num_shards=2))
    assert run_fake(config_of(path, shard_index=0, num_shards=2), lambda: pytest.fail("a model was loaded")) == 0
    check_output(config_of(path), 100)


def test_a_merge_goes_by_the_manifest(tmp_path: Path) -> None:
    config = config_of(write_input(tmp_path, 40), shard_lines=8)
    with pytest.raises(ValueError, match="got none"):
        merge_batch(config)
    assert not config.folder.work.exists()
    run_fake(config_of(config.input, shard_lines=8, num_shards=2))
    run_fake(config_of(config.input, shard_lines=8, num_shards=2, shard_index=1))
    assert config.folder.merged.exists()
    config.folder.merged.unlink()
    text = config.input.read_text()
    config.input.write_text(text.replace("prompt 3", "prompt 4"))
    with pytest.raises(ValueError, match="another one"):
        merge_batch(config_of(config.input))


@pytest.mark.parametrize(
    "changes", [{"shard_lines": 0}, {"grace_s": -1.0}, {"shard_index": 2, "num_shards": 2}, {"seed": 2**53}]
)
def test_settings_out_of_range_are_refused(tmp_path: Path, changes: dict[str, float]) -> None:
    with pytest.raises(ValueError, match="wanted"):
        config_of(tmp_path / "in.jsonl", **changes)
