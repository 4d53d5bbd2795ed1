import os
import signal
import threading
import time

import pytest

from kava_trainer.utils import signals
from kava_trainer.utils.errors import Interrupted, exit_code
from kava_trainer.utils.signals import SIGNALS, SignalWatch, spare_worker


def send(number):
    os.kill(os.getpid(), number)
    time.sleep(0.01)  # another thread may take it, and of two that wait the lower number would come first


@pytest.fixture
def watch():
    before = {number: signal.getsignal(number) for number in SIGNALS}
    with SignalWatch() as watch:
        yield watch
    assert {number: signal.getsignal(number) for number in SIGNALS} == before


@pytest.mark.parametrize(("number", "code"), [(signal.SIGINT, 130), (signal.SIGTERM, 143), (signal.SIGUSR1, 138)])
def test_a_signal_raises_where_nothing_can_be_lost(watch, number, code):
    assert exit_code(number) == code
    with pytest.raises(Interrupted) as caught:
        send(number)
    assert caught.value.number == number
    assert not isinstance(caught.value, Exception)


@pytest.mark.parametrize("number", SIGNALS)
def test_a_deferred_signal_sets_a_flag_that_a_check_raises(watch, number):
    with watch.deferred():
        assert watch.agree() is None
        watch.check()
        send(number)
        assert watch.agree() == watch.received == number
        with pytest.raises(Interrupted):
            watch.check()


@pytest.fixture
def left(monkeypatch):
    codes = []
    monkeypatch.setattr(os, "_exit", codes.append)
    return codes


@pytest.mark.parametrize(
    ("sent", "codes"),
    [
        (("SIGINT", "SIGINT"), [130]),
        (("SIGTERM", "SIGTERM"), [143]),
        (("SIGTERM", "SIGINT"), [130]),
        (("SIGINT", "SIGTERM"), []),
        (("SIGINT", "SIGTERM", "SIGTERM"), [143]),
        (("SIGUSR1", "SIGTERM"), []),
        (("SIGUSR1", "SIGTERM", "SIGINT"), [130]),
        (("SIGUSR1", "SIGUSR1"), [138]),
    ],
)
def test_a_second_signal_leaves_at_once_but_for_the_one_that_follows_up_the_first(watch, left, sent, codes):
    with watch.deferred():
        for name in sent:
            send(getattr(signal, name))
        assert watch.received == getattr(signal, sent[0])
    assert left == codes


def test_the_first_own_signal_is_no_second_one_where_another_rank_had_it_before(watch, left, monkeypatch):
    monkeypatch.setattr(signals, "largest_over_ranks", lambda number: signal.SIGTERM)
    with watch.deferred():
        assert watch.agree() == signal.SIGTERM
        send(signal.SIGTERM)
        assert not left
        send(signal.SIGINT)
    assert left == [130]


def test_a_launcher_may_send_its_sigterm_after_the_schedulers(left, monkeypatch):
    monkeypatch.setenv("TORCHELASTIC_RUN_ID", "x")
    with SignalWatch() as watch, watch.deferred():
        send(signal.SIGTERM)
        send(signal.SIGTERM)
        assert not left
        send(signal.SIGTERM)
    assert left == [143]


def test_only_the_outermost_watch_takes_and_gives_back_the_handlers():
    before = signal.getsignal(signal.SIGTERM)
    watch = SignalWatch()
    with watch:
        handler = signal.getsignal(signal.SIGTERM)
        with watch, watch.deferred():
            send(signal.SIGTERM)
        assert signal.getsignal(signal.SIGTERM) == handler != before
        assert watch.received == signal.SIGTERM
    assert signal.getsignal(signal.SIGTERM) == before
    with watch:
        assert watch.received is None


def test_nothing_is_checked_without_a_watch_and_a_thread_takes_no_signals():
    watch = SignalWatch()
    watch.check()
    before = signal.getsignal(signal.SIGTERM)
    found = []

    def work():
        with watch:
            found.append(signal.getsignal(signal.SIGTERM))

    thread = threading.Thread(target=work)
    thread.start()
    thread.join()
    assert found == [before]


def test_a_launcher_that_is_gone_counts_as_a_sigterm(monkeypatch):
    monkeypatch.setenv("TORCHELASTIC_RUN_ID", "x")
    monkeypatch.setattr(os, "getppid", lambda: 4321)
    with SignalWatch() as watch:
        assert watch.agree() is None
        monkeypatch.setattr(os, "getppid", lambda: 1)
        assert watch.agree() == signal.SIGTERM


def test_a_data_worker_ignores_what_goes_to_the_whole_group_but_not_its_loaders_last_resort():
    before = {number: signal.getsignal(number) for number in SIGNALS}
    started = []
    try:
        spare_worker(started.append, 3)
        assert started == [3]
        for number in SIGNALS:
            send(number)
        assert signal.getsignal(signal.SIGTERM) == signal.SIG_DFL
        assert signal.getsignal(signal.SIGINT) == signal.SIG_IGN
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
