"""Every command of the guide, in its order and in one shell, as it stands there. Stand-ins: RunPod's control plane, and an
executable called docker that only writes down how it was called. Real: the shell, git, `wan-avatar`, the endpoint of
`wan-avatar up` under the id that `apply` printed, its worker, ComfyUI and bucket"""
import json
import os
import re
import shutil
import subprocess

import pytest
from conftest import ROOT, cut
from control_plane import control_plane
from test_endpoint_file import STUB
from typer.testing import CliRunner

from wan_avatar.cli import app
from wan_avatar.local import up
from wan_avatar.media import check_mp4

def blocks() -> list[str]:
    cells = json.loads((ROOT / 'nbs/guide_deploy.ipynb').read_text())['cells']
    return [b for c in cells if c['cell_type'] == 'markdown' for b in re.findall(r'^```sh\n(.*?)^```', ''.join(c['source']), re.M | re.S)]

def is_there(block: str) -> bool:
    "The smoke gate comes with another change; a guide without any other of its commands fails here"
    if 'wan-avatar smoke' not in block: return True
    return CliRunner().invoke(app, ['smoke', '--help']).exit_code == 0

@pytest.fixture
def checkout(tmp_path, samples):
    "A committed copy of this repository's sources, and the stand-in for docker"
    root = tmp_path / 'checkout'
    for name in ('endpoint.toml', 'settings.ini', 'Dockerfile', '.gitignore', 'wan_avatar', 'nbs/tools'):
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        if (ROOT / name).is_dir(): shutil.copytree(ROOT / name, root / name, ignore=shutil.ignore_patterns('__pycache__'))
        else: shutil.copy(ROOT / name, root / name)
    (root / 'endpoint.toml').write_text((ROOT / 'endpoint.toml').read_text().replace('job_ttl_s = 3600', 'job_ttl_s = 1900').replace('execution_timeout_s = 1200', 'execution_timeout_s = 1300'))
    for args in (['init', '-q'], ['add', '.'], ['-c', 'user.name=a', '-c', 'user.email=a@b', 'commit', '-q', '-m', 'all']): subprocess.run(['git', '-C', str(root), *args], check=True)
    (root / 'runs/samples').mkdir(parents=True)
    (root / 'runs/samples/astronaut.png').symlink_to(samples / 'astronaut.png')
    cut(samples / 'single_face.mp4', 12, tmp_path).rename(root / 'runs/samples/single_face.mp4') # half a second, to be done sooner
    (root / '.venv').symlink_to(ROOT / '.venv')
    (root / '.git/info/exclude').write_text('.venv\n') # a folder in real life
    (tmp_path / 'bin').mkdir()
    (tmp_path / 'bin/docker').write_text(STUB)
    (tmp_path / 'bin/docker').chmod(0o755)
    return root

def test_every_command_of_the_guide(checkout, tmp_path):
    script = 'set -eu\n' + ''.join(f'echo "## block {n}" >&2\n{b}' for n, b in enumerate(blocks()) if is_there(b)) + 'echo "$TAG $ENDPOINT"\n'
    with control_plane() as plane, up(tmp_path / 'local', endpoint_id='ep0001', worker_env={'COMFY_DIR': str(ROOT / '.comfy'), 'WORK_DIR': str(tmp_path / 'work'),
                                      'MODELS_DIR': str(tmp_path / 'models'), 'PROFILE': 'draft'}) as local:
        plane.key = local.endpoint.api_key
        env = os.environ | local.bucket.environment() | {'RUNPOD_API_KEY': plane.key, 'RUNPOD_API_BASE_URL': plane.url, 'RUNPOD_ENDPOINT_BASE_URL': local.endpoint.url,
            'BUNDLE': 'dexsync/bundle', 'STUB_LOG': str(tmp_path / 'docker.log'), 'PATH': f'{tmp_path}/bin:{os.environ["PATH"]}'}
        done = subprocess.run(['bash', '-c', script], cwd=checkout, env=env, capture_output=True, text=True, timeout=300)
        assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-4000:]
        secret = [v for v in (local.bucket.environment()['MINIO_SECRET_KEY'], plane.key) if v in done.stdout + done.stderr]
        requests = [job.request for job in local.endpoint.plane.queue.jobs.values()]
    assert (1900, 1300) in {(r.ttl_s, r.execution_s) for r in requests}, 'the file\'s times do not travel with the job'
    tag, endpoint = done.stdout.split()[-2:]
    docker = (tmp_path / 'docker.log').read_text()
    assert f'build --platform linux/amd64 --tag {tag} ' in docker and f'push {tag}' in docker and '\nlogin' in docker and not secret
    assert endpoint == 'ep0001' and [m for m, _ in plane.writes()] == ['POST', 'POST', 'DELETE'] and not plane.endpoints # created, given its model, destroyed
    assert plane.models[endpoint] == ['https://huggingface.co/dexsync/bundle:main'] and check_mp4(checkout / 'runs/first/avatar.mp4', 12, has_audio=True)
    assert re.search(r'completed .*\n\s*[1-9]', done.stdout), 'the queue of the very endpoint the job went to'

def test_commands_in_the_prose_exist():
    "Inline code that begins with wan-avatar names a command of ours"
    text = (ROOT / 'nbs/guide_deploy.ipynb').read_text() + (ROOT / 'endpoint.toml').read_text()
    later = {'smoke', 'bundle'} # come with other changes
    for words in sorted({tuple(found.split()) for found in re.findall(r'`wan-avatar ((?:[a-z]+ ?){1,2})', text)}):
        if words[0] in later: continue
        done = CliRunner().invoke(app, [*words[:2 if words[0] in ('image', 'endpoint') else 1], '--help'])
        assert done.exit_code == 0, (words, done.output)
