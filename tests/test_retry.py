"""One way to try again: what servers ask for, when the attempts end, what is raised, who uses it"""
import ast
import asyncio
import logging
from datetime import UTC, datetime

import pytest
from conftest import ROOT

from wan_avatar.retry import RetryPolicy, TransientError, retry, retry_after, retry_async

NOON = datetime(2025, 7, 1, 12, 0, tzinfo=UTC)

@pytest.mark.parametrize('text, seconds', [
    (None, 0),
    ('', 0),
    ('0', 0),
    ('7', 7),
    (' 7 ', 7),
    ('60', 60),
    ('61', 60),
    ('9' * 5000, 60),
    ('-7', 0),
    ('7.5', 0),
    ('²', 0),
    ('soon', 0),
    ('Tue, 01 Jul 2025 12:00:30 GMT', 30),
    ('Tue, 01 Jul 2025 12:00:30 -0000', 30), # no zone: GMT is meant
    ('Tue, 01 Jul 2025 14:00:30 +0200', 30),
    ('Tue, 01 Jul 2025 13:00:00 GMT', 60),
    ('Tue, 01 Jul 2025 11:59:00 GMT', 0),
    ('Tue, 99 Jul 2025 12:00:30 GMT', 0),
    ('Tue, 01 Jul 99999 12:00:30 GMT', 0),
])
def test_what_a_server_asks_for(text, seconds):
    assert retry_after({} if text is None else {'Retry-After': text}, NOON) == seconds

class Clock:
    "Moves by what is waited, and by a second for each attempt"
    def __init__(self): self.now = 0.0
    def __call__(self) -> float: return self.now
    def pause(self, seconds: float) -> None: self.now += seconds
    async def pause_async(self, seconds: float) -> None: self.pause(seconds)

CASES = { # policy, failures of the work, pause asked for, when it is asked, is it answered?
    'at once': (RetryPolicy(attempts=3), 0, 0, [0], True),
    'growing': (RetryPolicy(attempts=5, first_s=1, longest_s=3, jitter=0), 4, 0, [0, 2, 5, 9, 13], True),
    'attempts used up': (RetryPolicy(attempts=3, first_s=1, jitter=0), 9, 0, [0, 2, 5], False),
    'a single attempt': (RetryPolicy(attempts=1), 9, 0, [0], False),
    'time used up': (RetryPolicy(timeout_s=6.5, first_s=1, jitter=0), 99, 0, [0, 2, 5, 6.5], False),
    'no time': (RetryPolicy(timeout_s=0), 99, 0, [0], False),
    'both limits, time first': (RetryPolicy(attempts=9, timeout_s=4, first_s=1, jitter=0), 9, 0, [0, 2, 4], False),
    'both limits, attempts first': (RetryPolicy(attempts=2, timeout_s=99, first_s=1, jitter=0), 9, 0, [0, 2], False),
    'asked for': (RetryPolicy(attempts=2, first_s=1, jitter=0), 1, 20, [0, 21], True),
    'asked for more than there is': (RetryPolicy(timeout_s=5), 9, 20, [0, 5], False),
}

@pytest.mark.parametrize('name', CASES)
@pytest.mark.parametrize('how', ['plain', 'async'])
def test_when_it_is_tried(name, how):
    policy, failures, after_s, expected, answered = CASES[name]
    clock = Clock()
    asked_at = []
    def work() -> str:
        asked_at.append(clock.now)
        clock.now += 1
        if len(asked_at) <= failures: raise TransientError(f'failure {len(asked_at)}', after_s)
        return 'answer'
    async def work_async() -> str: return work()
    def run() -> str:
        if how == 'plain': return retry(work, policy, 'it', pause=clock.pause, clock=clock)
        return asyncio.run(retry_async(work_async, policy, 'it', pause=clock.pause_async, clock=clock))
    if answered: assert run() == 'answer'
    else:
        with pytest.raises(TransientError, match=f'^failure {len(expected)}$'): run() # the last one
    assert asked_at == expected

def test_a_fault_that_stays_is_raised_at_once():
    def work(): raise PermissionError('wrong key')
    with pytest.raises(PermissionError): retry(work, RetryPolicy(attempts=9), 'it', pause=pytest.fail)

def test_a_caller_that_stops_gets_the_last_fault():
    asked = []
    def work():
        asked.append(1)
        raise TransientError('reset')
    policy = RetryPolicy(attempts=9)
    with pytest.raises(TransientError):
        retry(work, policy, 'it', stopped=lambda: len(asked) == 2, pause=lambda seconds: None)
    assert len(asked) == 2

def test_pauses_are_spread_and_bounded():
    policy = RetryPolicy(attempts=99, first_s=1, longest_s=8, jitter=0.5)
    for failures, most in [(1, 1), (2, 2), (4, 8), (5, 8), (10_000, 8)]:
        pauses = [policy.pause(failures) for _ in range(200)]
        assert most / 2 <= min(pauses)
        assert max(pauses) <= most
        assert len(set(pauses)) > 100

def test_the_log_names_no_address(caplog):
    faults = iter([TransientError('HTTP 503'), ConnectionError('https://host/a?signature=secret')])
    def work():
        if fault := next(faults, None): raise fault
    with caplog.at_level(logging.INFO, 'wan_avatar.retry'):
        retry(work, RetryPolicy(attempts=9), 'the bucket', again=lambda e: True, pause=lambda seconds: None)
    assert [m.split(' in ')[0] for m in caplog.messages] == [
        'the bucket: HTTP 503; attempt 2', 'the bucket: ConnectionError; attempt 3']

def test_nobody_else_has_a_way_of_their_own():
    "tenacity is imported, and Retry-After is read, in one module"
    def imports(path) -> set[str]:
        tree = ast.parse(path.read_text())
        return {n.module for n in ast.walk(tree) if isinstance(n, ast.ImportFrom) and n.module}
    modules = list((ROOT / 'wan_avatar').glob('*.py'))
    assert [p.stem for p in modules if 'tenacity' in imports(p)] == ['retry']
    assert [p.stem for p in modules if "get('Retry-After'" in p.read_text()] == ['retry']
