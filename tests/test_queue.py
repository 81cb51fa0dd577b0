"""RunPod's job states, with a clock of our own"""
import json
from collections import deque

import pytest

from wan_avatar.queue import MB, JobQueue, JobRequest, RateLimit, RequestRefused, parse_request


class Clock:
    now = 100.0
    def __call__(self) -> float: return self.now

@pytest.fixture
def clock(): return Clock()

@pytest.fixture
def queue(clock): return JobQueue(clock)

def running(queue, worker='w', **request):
    "A job that this worker holds"
    job = queue.submit(JobRequest({}, **request))
    assert queue.take(worker) == [job]
    return job

def test_jobs_are_given_once_oldest_first_low_priority_last(queue):
    low = queue.submit(JobRequest({}, low_priority=True))
    a = queue.submit(JobRequest({}))
    b = queue.submit(JobRequest({}))
    assert queue.waiting() == [a, b], 'low priority starts no worker'
    assert queue.take('w1', 1) == [a]
    assert queue.take('w2', 5) == [b, low]
    assert queue.take('w1', 5) == []

def test_delay_and_execution_are_milliseconds_from_submission_and_pick_up(queue, clock):
    job = queue.submit(JobRequest({}))
    assert queue.status(job.id) == {'id': job.id, 'status': 'IN_QUEUE'}
    clock.now += 3
    queue.take('w')
    clock.now += 2
    assert queue.done('w', job.id, {'output': 1})
    assert queue.status(job.id) == {
        'id': job.id,
        'status': 'COMPLETED',
        'delayTime': 3000,
        'executionTime': 2000,
        'workerId': 'w',
        'output': 1,
    }

@pytest.mark.parametrize('body,state,output,error', [
    ({'output': {'a': 1}}, 'COMPLETED', {'a': 1}, None),
    ({}, 'COMPLETED', None, None),
    ({'output': False}, 'COMPLETED', False, None),
    ({'error': 'boom'}, 'FAILED', None, 'boom'),
    ({'error': {'x': 1}, 'output': 2, 'stopPod': True}, 'FAILED', 2, '{"x": 1}'),
])
def test_how_results_end_a_job(queue, body, state, output, error):
    job = running(queue)
    queue.done('w', job.id, body)
    status = queue.status(job.id)
    assert status['status'] == state
    assert status.get('output') == output
    assert status.get('error') == error

@pytest.mark.parametrize('passed,state', [(59.9, 'IN_QUEUE'), (60, None)])
def test_ttl_of_a_waiting_job(queue, clock, passed, state):
    job = queue.submit(JobRequest({}, ttl_s=60))
    clock.now += passed
    if state: assert queue.status(job.id)['status'] == state
    else:
        with pytest.raises(RequestRefused) as e: queue.status(job.id)
        assert e.value.status == 404
        assert queue.take('w') == []
        assert queue.kept == 0

def test_ttl_removes_a_running_job_and_tells_its_worker(queue, clock):
    job = running(queue, ttl_s=60)
    clock.now += 60
    assert queue.take('w') == []
    assert queue.stop_signals('w') == [job.id]
    assert queue.stop_signals('w') == []
    assert not queue.done('w', job.id, {'output': 1})
    assert job.id not in queue.jobs

def test_execution_timeout(queue, clock):
    job = queue.submit(JobRequest({}, execution_timeout_s=5))
    clock.now += 50 # waiting does not count
    queue.take('w')
    clock.now += 4.9
    assert queue.status(job.id)['status'] == 'IN_PROGRESS'
    clock.now += 0.2
    assert queue.status(job.id)['status'] == 'TIMED_OUT'
    assert queue.stop_signals('w') == [job.id]
    assert not queue.done('w', job.id, {'output': 1})
    assert queue.status(job.id)['status'] == 'TIMED_OUT'

@pytest.mark.parametrize('sync,kept', [(False, 1800), (True, 60)])
def test_results_are_kept_and_forgotten(queue, clock, sync, kept):
    job = running(queue, sync=sync, size=10)
    queue.done('w', job.id, {'output': 'x'}, size=5)
    clock.now += kept - 0.1
    assert queue.status(job.id)['output'] == 'x'
    assert queue.kept == 15
    clock.now += 0.1
    with pytest.raises(RequestRefused): queue.status(job.id)
    assert queue.kept == 0
    assert not queue.jobs

def test_progress_is_shown_while_running_only_and_only_from_the_holder(queue):
    job = running(queue)
    assert queue.progress('w', job.id, {'p': 1})
    assert queue.status(job.id)['output'] == {'p': 1}
    assert not queue.progress('other', job.id, 2)
    assert not queue.done('other', job.id, {'output': 2})
    queue.done('w', job.id, {'output': 'end'})
    assert not queue.progress('w', job.id, 3)
    assert not queue.done('w', job.id, {'output': 4})
    assert queue.status(job.id)['output'] == 'end'

def test_cancel(queue):
    waiting = queue.submit(JobRequest({}))
    assert queue.cancel(waiting.id) == {'id': waiting.id, 'status': 'CANCELLED'}
    assert queue.take('w') == []
    held = running(queue)
    queue.cancel(held.id)
    assert queue.stop_signals('w') == [held.id]
    assert not queue.done('w', held.id, {'output': 1})
    assert queue.cancel(held.id)['status'] == 'CANCELLED'
    assert queue.stop_signals('w') == []

def test_a_retry_waits_until_the_first_run_has_let_go(queue, clock):
    job = running(queue, execution_timeout_s=5)
    clock.now += 5
    assert queue.retry(job.id)['status'] == 'IN_QUEUE'
    assert queue.take('w2') == [], 'w may still be at it'
    queue.seen('w', {job.id})
    assert queue.take('w2') == []
    queue.seen('w', set())
    assert queue.take('w2') == [job]
    assert queue.health()['retried'] == 1

@pytest.mark.parametrize('end', ['COMPLETED', 'CANCELLED', 'IN_QUEUE', 'IN_PROGRESS'])
def test_what_cannot_be_retried(queue, end):
    job = queue.submit(JobRequest({}))
    if end in ('COMPLETED', 'IN_PROGRESS'): queue.take('w')
    if end == 'COMPLETED': queue.done('w', job.id, {'output': 1})
    if end == 'CANCELLED': queue.cancel(job.id)
    with pytest.raises(RequestRefused, match=end) as e: queue.retry(job.id)
    assert e.value.status == 400

def test_a_worker_that_dies_gives_its_job_back_twice(queue):
    job = running(queue)
    later = queue.submit(JobRequest({}))
    for n in (1, 2):
        queue.gone('w', 'exit status 3')
        assert queue.status(job.id)['status'] == 'IN_QUEUE'
        assert queue.health()['retried'] == n
        assert queue.take('w') == [job], 'at the front of the line'
    queue.gone('w', 'exit status 3')
    assert queue.status(job.id)['status'] == 'FAILED'
    assert 'exit status 3' in queue.status(job.id)['error']
    assert queue.take('w') == [later]

def test_purge_leaves_running_jobs(queue):
    held = running(queue)
    waiting = [queue.submit(JobRequest({})) for _ in range(3)]
    assert queue.purge() == {'removed': 3, 'status': 'completed'}
    assert queue.take('w', 9) == []
    assert queue.status(held.id)['status'] == 'IN_PROGRESS'
    assert {queue.status(j.id)['status'] for j in waiting} == {'CANCELLED'}

def test_memory_is_bounded(clock):
    queue = JobQueue(clock, max_bytes=100)
    queue.submit(JobRequest({}, size=60))
    with pytest.raises(RequestRefused) as e: queue.submit(JobRequest({}, size=60))
    assert e.value.status == 429
    job = queue.take('w')[0]
    for n in range(5000): queue.chunk('w', job.id, {'output': n})
    assert len(queue.stream(job.id)['stream']) == 1000
    assert queue.stream(job.id)['stream'] == []

def test_a_result_beyond_the_limit_fails_the_job(queue):
    job = running(queue)
    queue.done('w', job.id, {'output': 'x'}, size=10 * MB + 1)
    assert queue.status(job.id)['status'] == 'FAILED'
    assert '10 MB' in queue.status(job.id)['error']

def test_webhooks_are_noted_when_a_job_ends(queue):
    job = running(queue, webhook='http://h/')
    assert queue.webhooks == deque()
    queue.done('w', job.id, {'output': 1})
    assert [(u, s['status']) for u, s in queue.webhooks] == [('http://h/', 'COMPLETED')]

@pytest.mark.parametrize('body,status', [
    (b'', 400),
    (b'[]', 400),
    (b'\xff', 400),
    (b'{"input": NaN}', 400),
    (b'[' * 100_000, 400),
    (b'{}', 400),
    (b'{"input": []}', 400),
    (b'{"input": {}, "policy": 3}', 400),
    (b'{"input": {}, "policy": {"ttl": 0}}', 400),
    (b'{"input": {}, "policy": {"ttl": true}}', 400),
    (b'{"input": {}, "policy": {"executionTimeout": 604800001}}', 400),
    (b'{"input": {}, "webhook": "file:///x"}', 400),
    (b'{"input": {"x": "' + b'x' * 10 * MB + b'"}}', 413),
])
def test_bodies_that_are_refused(body, status):
    with pytest.raises(RequestRefused) as e: parse_request(body)
    assert e.value.status == status

def test_policy_and_defaults():
    assert parse_request(b'{"input": {}}') == JobRequest({}, 13)
    policy = {'ttl': 3_600_000, 'executionTimeout': 5000, 'lowPriority': True}
    body = json.dumps({'input': {'a': 1}, 'webhook': 'http://h/', 'policy': policy}).encode()
    assert parse_request(body, sync=True) == JobRequest(
        input={'a': 1},
        size=len(body),
        sync=True,
        webhook='http://h/',
        ttl_s=3600,
        execution_timeout_s=5,
        low_priority=True,
    )
    assert parse_request(b'{"input": {"x": "' + b'x' * 15 * MB + b'"}}', sync=True).size > 15 * MB

def test_rate_limit(clock):
    rate = RateLimit(3, clock)
    for _ in range(3): rate()
    with pytest.raises(RequestRefused) as e: rate()
    assert e.value.status == 429
    clock.now += 10
    rate()
