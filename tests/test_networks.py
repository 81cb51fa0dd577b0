"""The tracker's networks at their true size, counted on the meta device, and a dry run on toys

They run in ComfyUI's environment, which has torch."""
import json
import os
import subprocess
import time

import pytest
from conftest import ROOT

from wan_avatar.models import load_lock
from wan_avatar.networks import NETWORK_CASES, measure_networks, timed

PYTHON = ROOT / '.comfy/env/bin/python'
COUNT_THEN_RUN = """
import json
import torch
from torch.utils.flop_counter import FlopCounterMode
from wan_avatar import networks
counted = {}
with torch.device('meta'):
    for name, shape in (('vitpose', (1, 3, 256, 192)), ('yolox', (1, 3, 640, 640)), ('sam2', None)):
        net, flops, answer = networks.network(name), FlopCounterMode(display=False), None
        if shape:
            with flops: answer = list(net(torch.empty(shape)).shape)
        tensors = [t for t in net.state_dict().values() if t.is_floating_point()]
        counted[name] = sum(t.numel() * 4 for t in tensors), flops.get_total_flops(), answer
print(json.dumps(counted))

def broken(place, found):
    found['times']['before'] = {'ms': 1.0}
    raise ValueError('on purpose')
networks.NETWORK_CASES = {'broken': networks.NetworkCase('one that fails', broken, 0.5, 0)} | networks.NETWORK_CASES
networks.main()
"""

@pytest.fixture(scope='module')
def ran(tmp_path_factory) -> tuple[dict, dict]: # what was counted, what was measured
    result = tmp_path_factory.mktemp('networks') / 'networks.json'
    command = [PYTHON, '-W', 'ignore', '-c', COUNT_THEN_RUN, result, '--small', '--seconds', '60']
    env = os.environ | {'PYTHONPATH': str(ROOT)}
    said = subprocess.run(command, check=True, capture_output=True, text=True, timeout=120, env=env).stdout
    return json.loads(said.splitlines()[0]), json.loads(result.read_text())

@pytest.mark.parametrize('network, file, bytes_apart, gflop, answer', [
    ('vitpose', 'keypoints_l', 0.001, 123.3, [1, 133, 64, 48]),
    ('yolox', 'person_detector', 0.002, 155.6, [1, 8400, 85]), # its authors' figure
    ('sam2', 'sam2_weights', 0.0005, 0, None)], ids=['keypoints', 'person', 'masks'])
def test_a_network_is_as_large_as_its_file(ran, network, file, bytes_apart, gflop, answer):
    size, flops, shape = ran[0][network]
    wanted = next(f.bytes for f in load_lock().files.values() if f.name == file)
    assert abs(size / wanted - 1) < bytes_apart
    assert abs(flops / 1e9 - gflop) < 0.01 * gflop + 1
    assert shape == answer

def test_a_dry_run_times_every_network_and_a_broken_one_says_why(ran):
    found = dict(ran[1])
    broken = found.pop('broken')
    assert broken['failed'] == 'ValueError: on purpose'
    assert broken['times'] == {'before': {'ms': 1.0}}
    assert list(found) == list(NETWORK_CASES)
    assert {k: v for k, v in found.items() if 'failed' in v or 'left_out' in v} == {}
    assert all(v['times'] for v in found.values())
    assert all(t['ms'] > 0 for v in found.values() for t in v['times'].values())
    assert all('toy' in v['what'] and v['parameters'] < 1e7 for v in found.values())

def test_without_torch_each_says_so_and_without_time_it_is_left_out():
    kept = []
    least = max(t.least_s for t in NETWORK_CASES.values())
    def keep(found: dict) -> None: kept.append(len(found))
    found = measure_networks(least - 0.5, False, lambda line: None, keep) # here is no torch
    late = {k for k, t in NETWORK_CASES.items() if t.least_s == least}
    assert kept == list(range(1, len(NETWORK_CASES) + 1))
    assert late
    for name, result in found.items():
        if name in late: assert result['left_out'].endswith(f'and it may take {least:g} s')
        else:
            assert result['failed'].startswith('ModuleNotFoundError')
            assert 'torch' in result['failed']
        assert result['times'] == {}

@pytest.mark.parametrize('seconds, calls, counted', [
    (-1, 1, 1),
    (60, 7, 5),
], ids=['time is over', 'time enough'])
def test_calls_that_warm_up_do_not_count(monkeypatch, seconds, calls, counted):
    monkeypatch.setattr('wan_avatar.networks._settle', lambda: None) # here is no torch
    made = []
    found = timed(lambda: made.append(1), time.perf_counter() + seconds, 5)
    assert (len(made), found['calls']) == (calls, counted)
    assert found['ms'] >= found['least_ms'] >= 0
