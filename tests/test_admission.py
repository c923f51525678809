"""Under load whoever can be answered in time is, and everybody else is refused at once and told when to return."""

import asyncio
import contextlib
import itertools
import threading
from types import SimpleNamespace

import pytest
from clusters import (
    CHANNELS,
    FEATURE_LIMIT,
    N_FEATURES,
    PATIENCE,
    SIZE,
    VERSIONS,
    cluster_of,
    make_image,
    plain_node,
    refusal,
    rogue_node,
    stub_of,
    until,
)
from grpc import StatusCode, aio

from nonn.runtime import node
from nonn.runtime.admission import MAX_RETRY_S, MAX_WAITING, RETRY_AFTER, SLOWER, SPACING, Admission, OverloadedError
from nonn.runtime.channel import STATED, busy_seconds
from nonn.runtime.coordinator import TOLERATED_FAILURES, BusyError, Coordinator
from nonn.runtime.guard import stated_seconds
from nonn.runtime.node import ServedStudent
from nonn.runtime.protocol import Contract, make_request
from nonn.runtime.serving import serving

CONTRACT = Contract("0", CHANNELS, SIZE, N_FEATURES[0], FEATURE_LIMIT)


class Clock:
    now = 0.0

    def __call__(self) -> float:
        return self.now


@pytest.fixture
def clock() -> Clock:
    return Clock()


def queue_of(admission: Admission, stack: contextlib.ExitStack, count: int) -> None:
    for _ in range(count):
        stack.enter_context(admission.admitted(None))


# The estimate


def test_who_can_be_answered_in_half_his_time_is_admitted(clock):
    admission = Admission(0.01, timeout=1.0, share=0.5, clock=clock)
    with contextlib.ExitStack() as stack:
        queue_of(admission, stack, 4)
        admission.check(0.1)  # 5 calls of 10 ms
        with pytest.raises(OverloadedError):
            admission.check(0.09)
        queue_of(admission, stack, 46)
        with pytest.raises(OverloadedError):  # without a deadline, or with a late one, it is the server's timeout
            admission.check(60.0)


def test_the_queue_is_bounded_however_quick_calls_are(clock):
    admission = Admission(1e-9, timeout=1.0, share=0.5, clock=clock)
    with contextlib.ExitStack() as stack:
        queue_of(admission, stack, MAX_WAITING)
        with pytest.raises(OverloadedError):
            admission.check(None)


def test_the_service_time_is_measured_while_calls_wait(clock):
    admission = Admission(0.001, timeout=10.0, share=0.5, clock=clock)
    places = [admission.admitted(None) for _ in range(101)]
    for place in places:
        place.__enter__()
    for place in places:
        clock.now += 0.02
        place.__exit__(None, None, None)
    assert admission.service_seconds == pytest.approx(0.02, rel=0.05)
    for seconds, expected in ((0.03, 0.02), (0.01, 0.01)):  # alone, each after a pause: at most that long
        for _ in range(100):
            clock.now += 1
            with admission.admitted(None):
                clock.now += seconds
        assert admission.service_seconds == pytest.approx(expected, rel=0.05)


def test_one_slow_answer_does_not_shut_the_door(clock):
    admission = Admission(100.0, timeout=0.1, share=0.5, clock=clock)
    admission.check(0.1)


def test_what_has_waited_unseen_is_told_by_what_it_has_left(clock):
    admission = Admission(0.001, timeout=10.0, share=0.5, clock=clock)
    with admission.admitted(0.1, "a"):
        admission.check(0.06, "a")
        with pytest.raises(OverloadedError):
            admission.check(0.02, "a")  # most of it is over
        admission.check(0.02, "b")  # somebody in a hurry


def test_what_a_call_says_that_it_was_given_counts_more_than_what_is_usual(clock):
    admission = Admission(0.001, timeout=10.0, share=0.5, clock=clock)
    with admission.admitted(0.1, "a"):
        admission.check(0.02, "a", stated=0.02)  # in a hurry, though others on its connection are not
        admission.check(0.02, "a", stated=0.01)  # impossible, and no reason to be kind or strict
        with pytest.raises(OverloadedError):
            admission.check(0.1, "a", stated=0.3)


def test_a_wait_that_is_claimed_while_nobody_waits_is_no_measurement(clock):
    admission = Admission(0.01, timeout=10.0, share=0.5, clock=clock)
    for _ in range(3):
        clock.now += 5.0
        with admission.admitted(0.1, stated=60.0):
            clock.now += 0.01
    assert admission.service_seconds == pytest.approx(0.01)


@pytest.mark.parametrize(
    ("value", "seconds"),
    [("250.5", 0.2505), ("0", 0.0), ("1e9", 60.0), ("inf", 60.0), ("-1", None), ("nan", None), ("x", None)],
)
def test_what_a_call_says_that_it_was_given_is_a_number_or_ignored(value, seconds):
    context = SimpleNamespace(invocation_metadata=lambda: (("user-agent", "any"), (STATED, value)))
    assert stated_seconds(context) == (None if seconds is None else pytest.approx(seconds))


def test_moments_of_return_are_spaced(clock):
    admission = Admission(0.01, timeout=0.1, share=0.5, clock=clock)
    told = []
    with contextlib.ExitStack() as stack:
        queue_of(admission, stack, 5)
        for _ in range(1000):
            with pytest.raises(OverloadedError) as refused:
                admission.check(0.1)
            told.append(refused.value.retry_after_ms)
    assert told[1] - told[0] == pytest.approx(1000 * SPACING * 0.01)
    count = next(i for i, (a, b) in enumerate(itertools.pairwise(told), 1) if b < a)
    assert count > 0.9 * MAX_RETRY_S / (SPACING * 0.01)
    later = sorted(told[count:])
    assert 500 * MAX_RETRY_S <= later[0] < later[-1] <= 1000 * MAX_RETRY_S
    assert max(b - a for a, b in itertools.pairwise(later)) < 2 * 500 * MAX_RETRY_S / len(later)
    assert len(set(later)) > 0.9 * len(later)


def test_the_age_of_the_oldest_call_counts_where_nobody_is_answered(clock):
    admission = Admission(0.001, timeout=10.0, share=0.5, clock=clock)
    with admission.admitted(None) as place:
        place.keep()
        clock.now += 0.04
        admission.check(0.1)
        with admission.admitted(None) as second:
            second.keep()
            clock.now += 0.02
            with pytest.raises(OverloadedError):
                admission.check(0.1)
            place.leave()  # unanswered, for whatever reason
            admission.check(0.1)


@pytest.mark.parametrize("silent", [33, 500])
@pytest.mark.parametrize(("share", "timeout"), [(0.5, 10.0), (0.4, 0.1)])
def test_calls_that_are_silent_shut_nobodys_door(clock, silent, share, timeout):
    """So many a second, each for 50 ms, and twenty calls with a deadline of 100 ms that are answered in 1 ms."""
    admission = Admission(0.001, timeout, share, clock=clock)
    held, answered = [], 0
    for tick in range(20_000):  # of half a millisecond
        clock.now = tick / 2000
        held = [(call, place, until) for call, place, until in held if until > clock.now or place.leave()]
        if tick % (2000 // silent) == 0:
            with contextlib.suppress(OverloadedError):
                call = admission.admitted(None, "silent")
                held.append((call, call.__enter__(), clock.now + 0.05))
        if tick % 100 == 50:
            with admission.admitted(0.1, "honest", stated=0.1) as place:
                place.keep()
                clock.now += 0.001
                answered += 1
    assert answered == 200


def test_what_a_call_claims_to_have_waited_changes_little(clock):
    admission = Admission(0.01, timeout=100.0, share=0.5, clock=clock)
    with admission.admitted(None):
        clock.now += 0.01
    with admission.admitted(None):
        clock.now += 9.0
        with admission.admitted(30.0, stated=60.0, peer="a"):
            pass
    assert admission.service_seconds < 0.012


def test_it_slows_down_now_and_then_and_recovers(clock):
    admission = Admission(0.01, timeout=1.0, share=0.5, clock=clock)
    for _ in range(100):
        admission.slow_down()
    assert admission.service_seconds == pytest.approx(SLOWER * 0.01)
    clock.now = 1.0
    admission.slow_down()
    assert admission.service_seconds == pytest.approx(SLOWER**2 * 0.01)
    for _ in range(100):
        clock.now += 1
        with admission.admitted(0.5):
            clock.now += 0.005
    assert admission.service_seconds == pytest.approx(0.005, rel=0.05)


def test_somebody_who_is_always_busy_does_not_close_the_door(clock):
    admission = Admission(0.01, timeout=0.1, share=0.5, clock=clock)
    for _ in range(1000):
        clock.now += 0.1
        with admission.admitted(0.1):
            clock.now += 0.02
        admission.slow_down()
        admission.check(0.1)  # as another call would be
    assert admission.service_seconds <= 0.025


def test_a_place_is_taken_again_by_the_time_that_is_left(clock):
    admission = Admission(0.01, timeout=1.0, share=0.5, clock=clock)
    with admission.admitted(1.0, "a"):  # what is usual on this connection
        pass
    with admission.admitted(0.4, "a", stated=0.4) as place:
        place.leave()
        clock.now += 0.1
        admission._finished = clock.now  # somebody else was answered
        place.keep()
        place.leave()
        clock.now += 0.25
        admission._finished = clock.now
        with pytest.raises(OverloadedError):  # less than half of its time is left
            place.keep()


# At a node


def slow_student(folder, monkeypatch, released: threading.Event) -> ServedStudent:
    """A student that answers when it is released, and says that it takes 20 ms."""
    monkeypatch.setattr(node, "QUICK_S", 0.0)
    student = ServedStudent(folder / "0.onnx")
    run = student.run

    def slowly(image):
        assert released.wait(PATIENCE)
        return run(image)

    student.run = slowly
    student.admission.service_seconds = 0.02
    return student


def test_a_node_refuses_at_once_and_says_when_to_return(network_folder, monkeypatch):
    released = threading.Event()
    student = slow_student(network_folder, monkeypatch, released)

    async def scenario():
        request = make_request(CONTRACT, make_image())
        async with serving(student, "127.0.0.1:0") as (port, meters), stub_of(f"127.0.0.1:{port}") as stub:
            waiting = [asyncio.ensure_future(stub.ModelInfer(request)) for _ in range(5)]
            await until(lambda: student.admission.waiting == 5)
            student.admission.service_seconds = 2 * PATIENCE / 5  # no matter how long this takes
            with pytest.raises(aio.AioRpcError) as error:
                await stub.ModelInfer(request, timeout=PATIENCE)
            assert error.value.code() == StatusCode.RESOURCE_EXHAUSTED
            wish = dict(error.value.trailing_metadata())[RETRY_AFTER]
            assert busy_seconds(error.value) == int(wish) / 1000 > 0
            assert (student.admission.refused, meters.refusals._value.get()) == (1, 1)
            released.set()
            assert all(answer.outputs for answer in await asyncio.gather(*waiting))

    asyncio.run(scenario())


# At a coordinator


def busy_for(milliseconds: int | None):
    async def refuse(_, context):
        when = () if milliseconds is None else ((RETRY_AFTER, str(milliseconds)),)
        await context.abort(StatusCode.RESOURCE_EXHAUSTED, "busy", when)

    return refuse


@pytest.mark.parametrize("milliseconds", [None, 1, 60_000])
def test_a_node_without_time_is_absent_but_never_left_alone(network_folder, milliseconds):
    async def scenario():
        async with contextlib.AsyncExitStack() as stack:
            addresses = [(await stack.enter_async_context(plain_node(network_folder, i)))[0] for i in range(2)]
            addresses.append((await stack.enter_async_context(rogue_node(busy_for(milliseconds))))[0])
            coordinator = await stack.enter_async_context(Coordinator(cluster_of(network_folder, addresses)))
            for _ in range(2 * TOLERATED_FAILURES):
                answer = await coordinator.classify(make_image())
                assert answer.absent == {"node-2": "resource exhausted: busy"}
                assert answer.busy
            assert not coordinator.connections[2].breaker_is_open

    asyncio.run(scenario())


def test_a_node_is_asked_again_when_it_has_time(network_folder):
    async def scenario():
        async with contextlib.AsyncExitStack() as stack:
            addresses = [(await stack.enter_async_context(plain_node(network_folder, i)))[0] for i in range(3)]
            real = await stack.enter_async_context(stub_of(addresses[2]))

            async def behave(request, context):
                if rogue.asked == 1:
                    await busy_for(1)(request, context)
                return await real.ModelInfer(request)

            addresses[2], rogue = await stack.enter_async_context(rogue_node(behave))
            coordinator = await stack.enter_async_context(Coordinator(cluster_of(network_folder, addresses)))
            assert not (await coordinator.classify(make_image())).absent
            assert rogue.asked == 2

    asyncio.run(scenario())


def test_if_no_node_has_time_the_caller_hears_when(network_folder):
    async def scenario():
        async with contextlib.AsyncExitStack() as stack:
            addresses = [(await stack.enter_async_context(rogue_node(busy_for(90_000))))[0] for _ in range(3)]
            coordinator = await stack.enter_async_context(Coordinator(cluster_of(network_folder, addresses)))
            with pytest.raises(BusyError, match="no node has time") as error:
                await coordinator.classify(make_image())
            assert error.value.seconds == MAX_RETRY_S

    asyncio.run(scenario())


# Whose export it is


def test_a_node_says_which_file_it_serves(network_folder):
    async def scenario():
        async with plain_node(network_folder, 1) as (address, _), stub_of(address) as stub:
            request = make_request(Contract("1", CHANNELS, SIZE, N_FEATURES[1], FEATURE_LIMIT), make_image())
            assert (await stub.ModelInfer(request)).model_version == VERSIONS[1]
            request.model_version = VERSIONS[1]
            assert (await stub.ModelInfer(request)).outputs
            request.model_version = VERSIONS[0]
            assert (await refusal(stub.ModelInfer(request)))[0] == StatusCode.NOT_FOUND

    asyncio.run(scenario())
