"What a job takes, said before it is sent"
import json

import pytest
from conftest import SAMPLES
from typer.testing import CliRunner

from wan_avatar.cards import measured
from wan_avatar.cli import app
from wan_avatar.cli_estimate import estimate_job
from wan_avatar.prices import POOLS

H200 = [POOLS['HOPPER_141']]

def run(*arguments):
    "The command, with its exit code"
    return CliRunner().invoke(app, ['estimate', *map(str, arguments)])

SAID = [ # arguments, exit code, what stands there
    ((SAMPLES / 'pexels.mp4', '--json'), 1, '"frames": 472'), # of one pool the limit alone is longer than the timeout
    ((SAMPLES / 'pexels.mp4', '--start', 2, '--duration', 5, '--json'), 0, '"frames": 120'),
    ((5,), 0, '120 frames in 2 windows of 65'),
    ((5, '--profile', 'draft'), 0, 'not measured'),
    ((300, '--quality', 'best'), 1, 'longer than execution_timeout_s'),
    ((5, '--start', 9), 1, 'start_seconds 9: the driving video lasts 5.00 s'),
    ((5, '--start', -1), 1, 'start_seconds'),
    ((5, '--duration', 0), 1, 'duration_seconds'),
    ((5, '--quality', 'perfect'), 1, "quality 'perfect'"),
    ((5, '--profile', 'draft', '--quality', 'best'), 1, 'profile draft has none'),
    ((5, '--profile', 'oil'), 1, "profile 'oil' does not exist"),
    (('none.mp4',), 1, 'neither a file here nor a number of seconds'),
    ((SAMPLES / 'astronaut.png',), 1, 'input_unreadable'),
    ((5, '--file', 'none.toml'), 2, 'none.toml'),
]

@pytest.mark.parametrize('arguments, code, says', [pytest.param(*c, id=' '.join(map(str, c[0]))[-50:]) for c in SAID])
def test_the_command(arguments, code, says):
    said = run(*arguments)
    assert said.exit_code == code and says in ' '.join((said.stdout + said.stderr).split())

def test_json_is_alone_on_stdout(): assert json.loads(run(5, '--json').stdout)['windows'] == 2

def test_more_steps_take_longer_and_a_measured_card_says_so():
    found = [estimate_job(10, 'wan22-animate', H200, quality) for quality in ('fast', None, 'best')]
    seconds = [estimate.pools[0].render.seconds for estimate in found]
    assert seconds == sorted(seconds) and seconds[2] > 2.5 * seconds[1]
    at = estimate_job(10, 'wan22-animate', H200).pools[0].render.at
    assert at == measured()['NVIDIA H200'].at

@pytest.mark.parametrize('timeout_s, fits', [(None, None), (1, False), (10**5, True)])
def test_whether_it_is_done_in_time(timeout_s, fits):
    assert estimate_job(10, 'wan22-animate', H200, timeout_s=timeout_s).pools[0].fits is fits

def test_a_limit_never_says_that_it_is_in_time():
    limit = estimate_job(10, 'wan22-animate', [POOLS['ADA_48_PRO']], timeout_s=10**5, runs={}).pools[0]
    assert limit.fits is None and limit.render.least
