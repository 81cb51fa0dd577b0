"""A stand-in for RunPod's control plane, over HTTP on loopback: REST v2 for endpoints and GraphQL's `saveEndpoint`, as
RunPod's OpenAPI document of 2026-08-20 describes them. It refuses unknown keys, wrong types and everything the document
rules out with `{title, status, detail, errors[]}`; a request without the key with 401; a library's own User-Agent with
403. Endpoints take jobs, which go as `script` says. Nothing here was checked against RunPod"""
import json
import re
import socket
import threading
from collections.abc import Callable
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Annotated, Literal

from pydantic import BaseModel, ConfigDict, Field, ValidationError

KEY = 'rpa_stand_in_key'
POOLS = {
    'ADA_80_PRO': ['NVIDIA H100 80GB HBM3', 'NVIDIA H100 PCIe', 'NVIDIA H100 NVL'],
    'AMPERE_80': ['NVIDIA A100 80GB PCIe', 'NVIDIA A100-SXM4-80GB'],
    'ADA_48_PRO': ['NVIDIA L40', 'NVIDIA L40S', 'NVIDIA RTX 6000 Ada Generation'],
    'AMPERE_48': ['NVIDIA RTX A6000', 'NVIDIA A40'],
    'HOPPER_141': ['NVIDIA H200'],
}
TITLES = {
    400: 'Bad Request',
    401: 'Unauthorized',
    403: 'Forbidden',
    404: 'Not Found',
    405: 'Method Not Allowed',
    422: 'Unprocessable Entity',
    429: 'Too Many Requests',
    503: 'Service Unavailable',
}
Cuda = Annotated[str, Field(pattern=r'^\d+\.\d+$')]

class Strict(BaseModel):
    model_config = ConfigDict(extra='forbid', strict=True)

class CreateGpu(Strict):
    pools: Annotated[list[str], Field(min_length=1)]
    excludedTypes: list[str] = []
    count: Annotated[int, Field(ge=1)] = 1
    allowedCudaVersions: list[Cuda] = []
    minCudaVersion: Cuda = None # absent is fine, null is not

class UpdateGpu(CreateGpu):
    pools: Annotated[list[str], Field(min_length=1)] = None
    minCudaVersion: Annotated[str, Field(pattern=r'^$|^\d+\.\d+$')] = None

class Workers(Strict):
    min: Annotated[int, Field(ge=0)] = 0
    max: Annotated[int, Field(ge=0)] = 3
    idleTimeout: Annotated[int, Field(ge=1, le=3600)] = 10

class QueueDelay(Strict):
    type: Literal['QUEUE_DELAY']
    queueDelay: Annotated[float, Field(ge=0.5, strict=False)]

class RequestCount(Strict):
    type: Literal['REQUEST_COUNT']
    requestCount: Annotated[int, Field(ge=1)]

class JobBody(Strict):
    input: dict
    policy: dict[Literal['ttl', 'executionTimeout', 'lowPriority'], int | bool] = {}
    webhook: str = None

class Common(Strict):
    args: str = ''
    disk: Annotated[int, Field(ge=1)] = 20
    env: dict[str, str] = {}
    ports: list[str] = []
    registry: str | None = None
    dataCenterIds: list[str] = []
    networkVolumes: list[str] = []
    flashboot: Literal['OFF', 'FLASHBOOT', 'PRIORITY_FLASHBOOT'] = 'OFF'
    timeout: int = 300_000
    workers: Workers = Workers()

class Create(Common):
    name: Annotated[str, Field(min_length=3)]
    type: Literal['QUEUE', 'LOAD_BALANCER']
    image: str
    scaling: QueueDelay | RequestCount
    gpu: CreateGpu

class Update(Common):
    name: Annotated[str, Field(min_length=3)] = None
    image: str = None
    scaling: QueueDelay | RequestCount = None
    gpu: UpdateGpu = None

GRAPHQL_FIELDS = {
    'executionTimeoutMs',
    'flashBootType',
    'gpuCount',
    'gpuIds',
    'id',
    'idleTimeout',
    'instanceIds',
    'locations',
    'minCudaVersion',
    'modelReferences',
    'name',
    'networkVolumeId',
    'networkVolumeIds',
    'scalerType',
    'scalerValue',
    'template',
    'templateId',
    'workersMax',
    'workersMin',
}
GRAPHQL_DEFAULTS = {
    'gpuIds': 'AMPERE_16',
    'gpuCount': 1,
    'workersMin': 0,
    'workersMax': 3,
    'idleTimeout': 5,
    'scalerType': 'QUEUE_DELAY',
    'scalerValue': 4,
    'executionTimeoutMs': 0,
    'minCudaVersion': None,
    'flashBootType': 'OFF',
    'modelReferences': [],
}
GONE_WRONG = 'Something went wrong. Please try again later or contact support.'
STATES = ('running', 'idle', 'initializing', 'throttled', 'unhealthy')
NOW = '2026-08-20T12:00:00Z'

class Refused(Exception):
    def __init__(self, status: int, detail: str, errors: list[str] | None = None, headers: dict | None = None):
        super().__init__(detail)
        self.status = status
        self.headers = headers or {}
        self.body = {'title': TITLES[status], 'status': status, 'detail': detail}
        if errors: self.body['errors'] = errors

def parse(model, body):
    try: return model.model_validate(body)
    except ValidationError as e:
        raise Refused(400, 'request body is not valid', [finding(f) for f in e.errors()]) from None

def finding(found: dict) -> str:
    *above, name = found['loc']
    where = '$' + ''.join(f'.{p}' for p in above if not str(p).startswith(('Queue', 'Request')))
    if found['type'] == 'extra_forbidden': return f"{where}: additional properties '{name}' not allowed"
    return f"{where}.{name}: {found['msg']}, got {found['input']!r}"

def check_gpu(gpu: dict) -> None:
    if unknown := [p for p in gpu['pools'] if p not in POOLS]: raise Refused(400, f'unknown GPU pool {unknown[0]}')
    types = [t for p in gpu['pools'] for t in POOLS[p]]
    if stray := [t for t in gpu.get('excludedTypes', []) if t.strip() not in types]:
        raise Refused(400, f'excludedTypes: {stray[0]} is not a GPU type in one of pools')
    if gpu.get('minCudaVersion') and gpu.get('allowedCudaVersions'):
        raise Refused(400, 'minCudaVersion and allowedCudaVersions are mutually exclusive')

class ControlPlane:
    "Its endpoints, the requests it received, and the faults that come next"
    def __init__(self):
        self.endpoints: dict[str, dict] = {}
        self.models: dict[str, list[str]] = {}
        self.order: dict[str, str] = {} # gpuIds as GraphQL was given them
        self.releases: dict[str, list[dict]] = {}
        self.workers: dict[str, list[dict]] = {}
        self.logs: dict[str, list[dict]] = {} # worker id -> {source, line}
        self.jobs: dict[str, dict] = {} # job id -> what `/status` answers
        self.script: list[dict] = [{'status': 'COMPLETED'}] # the answers about the next job; the last one stays
        self.told: dict[str, list[dict]] = {} # job id -> answers that are still to come
        self.sent: list[tuple[str, dict]] = [] # endpoint, body of each job
        self.on_run: Callable[[dict], object] = lambda endpoint: None # told of the endpoint that got a job
        jobs = ('completed', 'failed', 'inProgress', 'inQueue', 'retried')
        self.health = {'jobs': dict.fromkeys(jobs, 0), 'workers': {'idle': 0, 'running': 0}}
        self.asked: list[tuple[str, str, dict | None]] = []
        self.forgetful = False # does a PATCH drop the cached model? Not documented
        # (method, fault): 'lost' (done, but the answer never arrives), '503' and '429' (not done),
        # '503 done' (done, then 503)
        self.faults: list[tuple[str, str]] = []
        self.lock = threading.Lock()
        self.key = KEY
        self.url = ''
        self.count = 0

    def writes(self) -> list[tuple[str, str]]:
        "Requests that change something"
        def reads(path: str, body) -> bool: return path == '/graphql' and 'mutation' not in body['query']
        return [(m, p) for m, p, body in self.asked if m in ('POST', 'PATCH', 'DELETE') and not reads(p, body)]

    # REST
    def view(self, e: dict) -> dict:
        gpu = {k: v for k, v in e['gpu'].items() if k != 'excludedTypes' or v}
        urls = {k: f'https://api.runpod.ai/v2/{e["id"]}/{k}' for k in ('run', 'status', 'health')}
        return e | {'gpu': gpu, 'requestUrls': urls, 'createdAt': NOW}

    def get(self, id: str) -> dict:
        if id not in self.endpoints: raise Refused(404, 'endpoint not found')
        return self.endpoints[id]

    def create(self, body) -> dict:
        made = parse(Create, body).model_dump()
        check_gpu(made['gpu'])
        if made['type'] == 'LOAD_BALANCER' and made['scaling']['type'] != 'REQUEST_COUNT':
            raise Refused(422, 'a load balancer scales on REQUEST_COUNT')
        self.count += 1
        made = {'id': f'ep{self.count:04}'} | made
        self.endpoints[made['id']] = made
        self.note(made['id'], [])
        return self.view(made)

    def update(self, id: str, body) -> dict:
        now = self.get(id)
        asked = parse(Update, body).model_dump(exclude_unset=True)
        gpu = asked.pop('gpu', {}) or {}
        if 'excludedTypes' in gpu and 'pools' not in gpu: raise Refused(400, 'excludedTypes requires pools')
        if 'pools' in gpu: gpu = {'excludedTypes': []} | gpu # as documented: pools alone clears the exclusions
        if gpu.get('minCudaVersion') == '': gpu['minCudaVersion'] = None
        workers = now['workers'] | asked.get('workers', {})
        after = now | asked | {'gpu': now['gpu'] | gpu, 'workers': workers}
        check_gpu(after['gpu'])
        self.endpoints[id] = after
        if self.forgetful: self.models.pop(id, None)
        changed = [k for k in after if k != 'env' and after[k] != now.get(k)]
        self.note(id, [{'field': k, 'old': now.get(k), 'new': after[k]} for k in changed])
        return self.view(after)

    def note(self, id: str, diff: list[dict]) -> None:
        releases = self.releases.setdefault(id, [])
        number = len(releases) + 1
        releases.insert(0, {
            'id': f'r{number}',
            'version': number,
            'source': 'MANUAL',
            'buildId': None,
            'createdByUserId': None,
            'workerCount': 0,
            'createdAt': NOW,
            'diff': diff,
        })

    # jobs
    def run(self, id: str, body) -> tuple[int, object]:
        parse(JobBody, body)
        self.sent.append((self.get(id)['id'], body))
        job = f'job{len(self.sent):04}-u1'
        self.told[job] = [{'id': job, **answer} for answer in self.script]
        self.on_run(self.get(id))
        return 200, {'id': job, 'status': 'IN_QUEUE'}

    def status(self, id: str, job: str) -> tuple[int, object]:
        if self.told.get(job): self.jobs[job] = self.told[job].pop(0)
        if job not in self.jobs: raise Refused(404, 'job not found')
        return 200, self.jobs[job]

    def rest(self, method: str, path: str, body) -> tuple[int, object]:
        id, _, rest = path.removeprefix('/v2/serverless').strip('/').partition('/')
        match method, id, rest:
            case 'GET', '', '': return 200, {'endpoints': [self.view(e) for e in self.endpoints.values()]}
            case 'POST', '', '': return 201, self.create(body)
            case 'GET', _, '': return 200, self.view(self.get(id))
            case 'PATCH', _, '': return 200, self.update(id, body)
            case 'DELETE', _, '':
                self.endpoints.pop(self.get(id)['id'])
                return 204, None
            case 'GET', _, 'workers': return 200, self.worker_list(self.get(id)['id'])
            case 'GET', _, 'releases': return 200, self.release_list(self.get(id)['id'])
        raise Refused(405, f'{method} is not allowed here')

    def worker_list(self, id: str) -> dict:
        workers = self.workers.get(id, [])
        summary = {s: sum(w['status'].lower() == s for w in workers) for s in STATES}
        return {'endpointVersion': len(self.releases[id]), 'workers': workers,
                'summary': summary | {'total': len(workers)}}

    def release_list(self, id: str) -> dict:
        return {'endpointVersion': len(self.releases[id]), 'releases': self.releases[id],
                'rollout': {'inProgress': False, 'workersOnLatest': 0, 'workersTotal': 0, 'percentOnLatest': 0}}

    # GraphQL
    def record(self, id: str) -> dict:
        e = self.get(id)
        excluded = [f'-{t}' for t in e['gpu']['excludedTypes']]
        return {
            'id': id,
            'name': e['name'],
            'templateId': f't{id}',
            'gpuIds': self.order.get(id, ','.join([*sorted(e['gpu']['pools']), *excluded])),
            'gpuCount': e['gpu']['count'],
            'instanceIds': [],
            'workersMin': e['workers']['min'],
            'workersMax': e['workers']['max'],
            'locations': '',
            'networkVolumeId': None,
            'networkVolumeIds': [],
            'idleTimeout': e['workers']['idleTimeout'],
            'scalerType': e['scaling']['type'],
            'scalerValue': e['scaling'].get('queueDelay'),
            'executionTimeoutMs': e['timeout'],
            'minCudaVersion': e['gpu']['minCudaVersion'],
            'flashBootType': e['flashboot'],
            'modelReferences': self.models.get(id, []),
        }

    def graphql(self, body) -> tuple[int, object]:
        if 'saveEndpoint' not in body['query']:
            return 200, {'data': {'myself': {'endpoints': [self.record(i) for i in self.endpoints]}}}
        given = body['variables']['input']
        if unknown := sorted(set(given) - GRAPHQL_FIELDS):
            message = f'Field "{unknown[0]}" is not defined by type "EndpointInput".'
            return 400, {'errors': [{'message': message}]}
        if given.get('id') not in self.endpoints:
            return 200, {'errors': [{'message': GONE_WRONG}], 'data': {'saveEndpoint': None}}
        self.save(GRAPHQL_DEFAULTS | given) # replaces everything: a missing field goes back to its default
        return 200, {'data': {'saveEndpoint': self.record(given['id'])}}

    def save(self, full: dict) -> None:
        id = full['id']
        parts = full['gpuIds'].split(',')
        gpu = {
            'pools': [p for p in parts if not p.startswith('-')],
            'excludedTypes': [p[1:] for p in parts if p.startswith('-')],
            'count': full['gpuCount'],
            'allowedCudaVersions': [],
            'minCudaVersion': full['minCudaVersion'],
        }
        workers = {'min': full['workersMin'], 'max': full['workersMax'], 'idleTimeout': full['idleTimeout']}
        self.endpoints[id] = self.endpoints[id] | {
            'name': full['name'],
            'timeout': full['executionTimeoutMs'],
            'flashboot': full['flashBootType'],
            'workers': workers,
            'scaling': {'type': full['scalerType'], 'queueDelay': full['scalerValue']},
            'gpu': gpu,
        }
        self.models[id] = list(full['modelReferences'])
        self.order[id] = full['gpuIds']

class Handler(BaseHTTPRequestHandler):
    protocol_version = 'HTTP/1.1'
    wbufsize = -1 # one packet an answer
    plane: ControlPlane

    def serve(self) -> None:
        raw = self.rfile.read(int(self.headers.get('Content-Length') or 0))
        body = json.loads(raw) if raw else None
        path = self.path.partition('?')[0]
        log = re.fullmatch(r'/v2/serverless/(\w+)/workers/(\w+)/logs', path)
        try:
            with self.plane.lock:
                self.check()
                fault = self.next_fault(path, body)
                status, answer = (200, self.plane.logs.get(log[2], [])) if log else self.reply(path, body)
            if log: return self.stream(answer)
            if fault == 'lost':
                self.close_connection = True
                return self.connection.shutdown(socket.SHUT_RDWR)
            if fault == '503 done': raise Refused(503, 'upstream unavailable')
            self.answer(status, answer)
        except Refused as e: self.answer(e.status, e.body, e.headers)

    def check(self) -> None:
        "The caller's User-Agent and key"
        strange = re.match(r'python|curl|Go-http|httpx|$', self.headers.get('User-Agent', ''), re.I)
        if strange and not self.path.startswith('/jobs/'): # another host at RunPod
            raise Refused(403, 'access denied')
        if 'Authorization' not in self.headers: raise Refused(401, 'missing bearer token')
        if self.headers['Authorization'] != f'Bearer {self.plane.key}': raise Refused(401, 'invalid bearer token')

    def next_fault(self, path: str, body) -> str:
        "Note the request; the fault that was planned for it, or ''"
        method = self.command
        self.plane.asked.append((method, path, body))
        fault = next((f for f in self.plane.faults if f[0] == method), None)
        if fault is None: return ''
        self.plane.faults.remove(fault)
        if fault[1] == '503': raise Refused(503, 'upstream unavailable', headers={'Retry-After': '1'})
        if fault[1] == '429':
            raise Refused(429, 'rate limit exceeded for the minute window', headers={'Retry-After': '1'})
        return fault[1]

    def reply(self, path: str, body) -> tuple[int, object]:
        if path == '/graphql': return self.plane.graphql(body)
        if job := re.fullmatch(r'/jobs/(\w+)/status/([\w-]+)', path): return self.plane.status(*job.groups())
        if job := re.fullmatch(r'/jobs/(\w+)/run', path): return self.plane.run(job[1], body)
        if path.startswith('/jobs/'): return 200, self.plane.health
        return self.plane.rest(self.command, path, body)

    def answer(self, status: int, body, headers: dict | None = None) -> None:
        data = b'' if body is None else json.dumps(body).encode()
        self.send_response(status)
        self.send_header('Content-Type', 'application/problem+json' if status >= 400 else 'application/json')
        self.send_header('Content-Length', str(len(data)))
        for name, value in (headers or {}).items(): self.send_header(name, value)
        self.end_headers()
        self.wfile.write(data)

    def stream(self, lines: list[dict]) -> None:
        "Server-sent events that never end by themselves: a worker may always write another line"
        self.send_response(200)
        self.send_header('Content-Type', 'text/event-stream')
        self.send_header('Connection', 'close')
        self.end_headers()
        for n, line in enumerate(lines):
            event = json.dumps({'ts': NOW, **line})
            self.wfile.write(f'id: {NOW}/{n:012}\ndata: {event}\n\n'.encode())
        self.wfile.flush()
        self.close_connection = True
        threading.Event().wait(6)

    do_GET = do_POST = do_PATCH = do_DELETE = do_PUT = serve
    def log_message(self, *args): pass

@contextmanager
def control_plane():
    "A control plane for the length of a block"
    plane = ControlPlane()
    server = ThreadingHTTPServer(('127.0.0.1', 0), type('Bound', (Handler,), {'plane': plane}))
    server.daemon_threads = True
    plane.url = f'http://127.0.0.1:{server.server_port}'
    threading.Thread(target=server.serve_forever, args=(0.02,), daemon=True).start()
    try: yield plane
    finally:
        server.shutdown()
        server.server_close()
