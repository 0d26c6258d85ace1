"""The engine's thread without a model: what happens to requests when the engine breaks, and to pieces on their way."""

import asyncio
import dataclasses
import socket
import types

import pytest

from hybrid_jax.answer import Answer
from hybrid_jax.engine import Engine
from hybrid_jax.pool import Pool
from hybrid_jax.prefix_cache import PrefixCache
from hybrid_jax.request import SamplingParams, make_request
from hybrid_jax.scheduler import Limits, Scheduler
from hybrid_jax.server.engine_thread import EngineThread, Mailbox, Piece
from hybrid_jax.server.errors import ApiError
from hybrid_jax.server.process import Process
from hybrid_jax.server.settings import ServerConfig, read_keys
from hybrid_jax.step import Progress


class BrokenDevice:
    """Raises in the first step."""

    compilations = compiled_after_ready = 0
    padding = types.MappingProxyType({})

    def submit(self, step):
        raise RuntimeError("out of memory")

    def reset(self):
        """There is nothing to lose."""


def make_llm():
    """As much of a model as the thread asks for, on a device that breaks."""
    pages, slots = Pool("pages", 9), Pool("slots", 5)
    cache = PrefixCache(pages, slots, 64, True, True)
    limits = Limits(2, 128, 4, 64, True, True, 64, 2, True)
    engine = Engine(Scheduler(limits, pages, slots, cache), BrokenDevice(), run_ahead=True)
    return types.SimpleNamespace(
        config=types.SimpleNamespace(max_waiting=2),
        memory=types.SimpleNamespace(max_num_seqs=2),
        engine=engine,
        stats=engine.stats,
        get_ready=lambda prompt_scores: None,
        generate=lambda prompts, params: None,
    )


def make_answers(count):
    params = SamplingParams(max_tokens=4)
    return [Answer(make_request(f"r{index}", [1, 2], params, 64), None, None) for index in range(count)]


async def serving(thread):
    thread.start()
    while thread.phase == "compiling":
        await asyncio.sleep(0.01)


def test_a_step_that_raises_ends_every_request_and_the_service():
    async def story():
        died = asyncio.Event()
        thread = EngineThread(make_llm(), asyncio.get_running_loop(), died.set)
        await serving(thread)
        answers, mailbox = make_answers(2), Mailbox()
        await thread.add(answers, mailbox)
        with pytest.raises(ApiError) as caught:
            await asyncio.wait_for(mailbox.take(), 10)
        assert (caught.value.status, caught.value.reason) == (500, "engine_dead")
        await asyncio.wait_for(died.wait(), 10)
        thread.end(answers, mailbox)
        assert thread.phase == "dead" and thread.live == 0
        with pytest.raises(ApiError) as refused:
            await thread.add(make_answers(1), Mailbox())
        assert refused.value.status == 503

    asyncio.run(story())


def by_hand(llm, **options):
    """A thread that serves but does not run: the test takes its turns."""
    thread = EngineThread(llm, asyncio.get_running_loop(), lambda: None, **options)
    thread.phase = "serving"
    return thread


async def admitted(thread, answers, mailbox):
    adding = asyncio.create_task(thread.add(answers, mailbox))
    await asyncio.sleep(0)
    thread._take_orders()
    await adding


def test_a_request_of_which_a_part_finds_no_place_leaves_nothing_behind():
    async def story():
        llm = make_llm()
        thread = by_hand(llm)
        before, *answers = make_answers(3)
        await admitted(thread, [before], Mailbox())
        with pytest.raises(ApiError) as caught:
            await admitted(thread, answers, Mailbox())  # two may wait
        assert (caught.value.status, caught.value.code, thread.live) == (503, "queue_full", 1)
        thread._take_orders()
        assert len(llm.engine.scheduler.waiting) == 1

    asyncio.run(story())


def test_more_choices_than_can_ever_wait_together_are_a_400_and_as_many_are_taken():
    async def story():
        llm = make_llm()
        thread = by_hand(llm)
        with pytest.raises(ApiError, match=r"at most max_waiting=2 .*, got 3: lower n") as never:
            await admitted(thread, make_answers(3), Mailbox())
        assert (never.value.status, never.value.param, thread.live) == (400, "n", 0)
        await admitted(thread, make_answers(2), Mailbox())
        assert len(llm.engine.scheduler.waiting) == 2

    asyncio.run(story())


def test_who_waits_too_long_for_a_turn_ends_with_503_whole():
    async def story():
        llm, mailbox, answers = make_llm(), Mailbox(), make_answers(2)
        thread = by_hand(llm, queue_timeout_s=50.0)
        await admitted(thread, answers, mailbox)
        came_s = thread._lines["r0"].came_s
        thread._end_late(came_s + 50.0)
        await asyncio.sleep(0)
        assert not mailbox._filled.is_set() and len(llm.engine.scheduler.waiting) == 2
        thread._end_late(came_s + 50.1)
        with pytest.raises(ApiError) as caught:
            await asyncio.wait_for(mailbox.take(), 5)
        assert (caught.value.status, caught.value.code, caught.value.reason) == (503, *["queue_timeout"] * 2)
        assert not llm.engine.unfinished and not thread._lines

    asyncio.run(story())


@pytest.mark.parametrize("how", ["running", "sent"])
def test_a_request_of_which_a_choice_had_its_turn_is_not_late(how):
    async def story():
        llm, mailbox, answers = make_llm(), Mailbox(), make_answers(2)
        thread = by_hand(llm, queue_timeout_s=50.0)
        await admitted(thread, answers, mailbox)
        late_s = thread._lines["r0"].came_s + 51.0
        if how == "sent":
            thread._piece(Progress("r0", (5,), None))
        else:
            thread._engine = types.SimpleNamespace(scheduler=types.SimpleNamespace(running=[answers[0].request]))
            thread._end_late(0.0)
            thread._engine = llm.engine  # preempted before its first token: in line again
        thread._end_late(late_s)
        await asyncio.sleep(0)
        assert set(thread._lines) == {"r0", "r1"} and mailbox._error is None

    asyncio.run(story())


def test_an_order_that_is_not_taken_in_time_ends_with_503():
    async def story():
        thread = by_hand(make_llm(), queue_timeout_s=0.05)
        for waiting in (thread.add(make_answers(1), Mailbox()), thread.score([1], 0)):
            with pytest.raises(ApiError) as caught:
                await waiting
            assert (caught.value.status, caught.value.reason, thread.live) == (503, "queue_timeout", 0)
        thread._take_orders()
        assert not thread._lines

    asyncio.run(story())


def test_a_process_whose_engine_breaks_ends_with_1():
    async def story():
        process = Process(make_llm, ServerConfig(names=("m",), port=0))
        running = asyncio.create_task(process.run())
        while process._engine is None or process._engine.phase == "compiling":
            await asyncio.sleep(0.01)
        await process._engine.add(make_answers(1), Mailbox())
        return await asyncio.wait_for(running, 20)

    assert asyncio.run(story()) == 1


def test_an_address_in_use_is_said_before_anything_is_compiled():
    async def story():
        with socket.create_server(("127.0.0.1", 0)) as taken:
            process = Process(make_llm, ServerConfig(names=("m",), port=taken.getsockname()[1]))
            with pytest.raises(ValueError, match="take another port"):
                await process.run()
        assert process._engine is None

    asyncio.run(story())


def test_a_model_that_cannot_be_loaded_ends_the_process_with_its_reason():
    def refuse():
        raise ValueError("wanted weights, got none")

    async def story():
        process = Process(refuse, ServerConfig(names=("m",), port=0))
        with pytest.raises(ValueError, match="wanted weights"):
            await asyncio.wait_for(process.run(), 20)

    asyncio.run(story())


def test_what_comes_while_orders_are_taken_waits_for_a_step():
    async def story():
        llm, scored = make_llm(), []
        llm.engine.score_prompt = lambda prompt, asked: scored.append(prompt) or ()
        thread = EngineThread(llm, asyncio.get_running_loop(), lambda: None)
        thread.phase = "serving"  # and its own thread does not run: this one takes its turns
        asking = [asyncio.create_task(thread.score([token], 0)) for token in range(3)]
        await asyncio.sleep(0)
        for count in (1, 2, 3):
            thread._take_orders()
            assert len(scored) == count
        assert await asyncio.gather(*asking) == [(), (), ()]

    asyncio.run(story())


def test_pieces_for_a_slow_reader_become_one_each():
    async def story():
        mailbox = Mailbox()
        first = Piece("a", (1,), (), None, None, 3)
        mailbox.put(1, first)
        mailbox.put(0, first)
        mailbox.put(1, dataclasses.replace(first, text="b", token_ids=(2, 3), finish_reason="stop", stop_reason="x"))
        mailbox.fail(ApiError(500, "broken", "broken"))
        taken = await mailbox.take()
        assert taken == [(0, first), (1, Piece("ab", (1, 2, 3), (), "stop", "x", 3))]
        with pytest.raises(ApiError):
            await mailbox.take()

    asyncio.run(story())


@pytest.mark.parametrize(
    "changed", [{"port": 65536}, {"api_keys": (" a",)}, {"stall_timeout_s": -1.0}, {"queue_timeout_s": 0}]
)
def test_settings_out_of_range_are_refused(changed):
    with pytest.raises(ValueError, match="wanted"):
        ServerConfig(**({"names": ("m",)} | changed))


def test_keys_are_read_one_a_line(tmp_path):
    path = tmp_path / "keys"
    path.write_text("one\n\n two \n")
    assert read_keys(path) == ("one", "two") and read_keys(None) == ()
    path.write_text("\n")
    with pytest.raises(ValueError, match="a key a line"):
        read_keys(path)
