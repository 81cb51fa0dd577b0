"""A stand-in for RunPod's control plane, over HTTP on loopback: REST v2 for endpoints and GraphQL's `saveEndpoint`, as RunPod's
OpenAPI document of 2026-08-20 describes them. Strict: unknown keys, wrong types and what the document rules out are refused with
`{title, status, detail, errors[]}`; 401 without the key; 403 for a library's own User-Agent. Nothing here was checked against RunPod"""
import json
import re
import socket
import threading
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Annotated, Literal

from pydantic import BaseModel, ConfigDict, Field, ValidationError

KEY = 'rpa_stand_in_key'
POOLS = {'ADA_80_PRO': ['NVIDIA H100 80GB HBM3', 'NVIDIA H100 PCIe', 'NVIDIA H100 NVL'], 'AMPERE_80': ['NVIDIA A100 80GB PCIe', 'NVIDIA A100-SXM4-80GB'],
         'ADA_48_PRO': ['NVIDIA L40', 'NVIDIA L40S', 'NVIDIA RTX 6000 Ada Generation'], 'AMPERE_48': ['NVIDIA RTX A6000', 'NVIDIA A40'], 'HOPPER_141': ['NVIDIA H200']}
TITLES = {400: 'Bad Request', 401: 'Unauthorized', 403: 'Forbidden', 404: 'Not Found', 405: 'Method Not Allowed', 422: 'Unprocessable Entity', 429: 'Too Many Requests', 503: 'Service Unavailable'}
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

GRAPHQL_FIELDS = {'id', 'name', 'templateId', 'gpuIds', 'gpuCount', 'instanceIds', 'workersMin', 'workersMax', 'locations', 'networkVolumeId', 'networkVolumeIds', 'idleTimeout',
                  'scalerType', 'scalerValue', 'executionTimeoutMs', 'minCudaVersion', 'flashBootType', 'modelReferences', 'template'}

class Refused(Exception):
    def __init__(self, status: int, detail: str, errors: list[str] | None = None, headers: dict | None = None):
        super().__init__(detail)
        self.status, self.headers, self.body = status, headers or {}, {'title': TITLES[status], 'status': status, 'detail': detail} | ({'errors': errors} if errors else {})

def parse(model, body):
    try: return model.model_validate(body)
    except ValidationError as e:
        def line(f):
            where = '$' + ''.join(f'.{p}' for p in f['loc'][:-1] if not str(p).startswith(('Queue', 'Request')))
            return f"{where}: additional properties '{f['loc'][-1]}' not allowed" if f['type'] == 'extra_forbidden' else f"{where}.{f['loc'][-1]}: {f['msg']}, got {f['input']!r}"
        raise Refused(400, 'request body is not valid', [line(f) for f in e.errors()]) from None

def check_gpu(gpu: dict) -> None:
    if unknown := [p for p in gpu['pools'] if p not in POOLS]: raise Refused(400, f'unknown GPU pool {unknown[0]}')
    types = [t for p in gpu['pools'] for t in POOLS[p]]
    if stray := [t for t in gpu.get('excludedTypes', []) if t.strip() not in types]: raise Refused(400, f'excludedTypes: {stray[0]} is not a GPU type in one of pools')
    if gpu.get('minCudaVersion') and gpu.get('allowedCudaVersions'): raise Refused(400, 'minCudaVersion and allowedCudaVersions are mutually exclusive')

class ControlPlane:
    "What is there, what was asked, and what is to go wrong next"
    def __init__(self):
        self.endpoints: dict[str, dict] = {}
        self.models: dict[str, list[str]] = {}
        self.order: dict[str, str] = {} # gpuIds as GraphQL was given them
        self.releases: dict[str, list[dict]] = {}
        self.workers: dict[str, list[dict]] = {}
        self.logs: dict[str, list[dict]] = {} # worker id -> {source, line}
        self.health = {'jobs': {'completed': 0, 'failed': 0, 'inProgress': 0, 'inQueue': 0, 'retried': 0}, 'workers': {'idle': 0, 'running': 0}}
        self.asked: list[tuple[str, str, dict | None]] = []
        self.forgetful = False # does a PATCH drop the cached model? Not documented
        self.faults: list[tuple[str, str]] = [] # (method, what): lost (done, but the answer never arrives), 503 and 429 (not done), 503 done (done, then 503)
        self.lock, self.key, self.url, self.count = threading.Lock(), KEY, '', 0

    def writes(self) -> list[tuple[str, str]]:
        "Requests that change something"
        return [(m, p) for m, p, body in self.asked if m in ('POST', 'PATCH', 'DELETE') and not (p == '/graphql' and 'mutation' not in body['query'])]

    # REST
    def view(self, e: dict) -> dict:
        gpu = {k: v for k, v in e['gpu'].items() if k != 'excludedTypes' or v}
        urls = {k: f'https://api.runpod.ai/v2/{e["id"]}/{k}' for k in ('run', 'status', 'health')}
        return e | {'gpu': gpu, 'requestUrls': urls, 'createdAt': '2026-08-20T12:00:00Z'}

    def get(self, id: str) -> dict:
        if id not in self.endpoints: raise Refused(404, 'endpoint not found')
        return self.endpoints[id]

    def create(self, body) -> dict:
        made = parse(Create, body).model_dump()
        check_gpu(made['gpu'])
        if made['type'] == 'LOAD_BALANCER' and made['scaling']['type'] != 'REQUEST_COUNT': raise Refused(422, 'a load balancer scales on REQUEST_COUNT')
        self.count += 1
        made = {'id': f'ep{self.count:04}'} | made
        self.endpoints[made['id']] = made
        self.note(made['id'], [])
        return self.view(made)

    def update(self, id: str, body) -> dict:
        now, asked = self.get(id), parse(Update, body).model_dump(exclude_unset=True)
        gpu = asked.pop('gpu', {}) or {}
        if 'excludedTypes' in gpu and 'pools' not in gpu: raise Refused(400, 'excludedTypes requires pools')
        if 'pools' in gpu: gpu = {'excludedTypes': []} | gpu # as documented: pools alone clears the exclusions
        if gpu.get('minCudaVersion') == '': gpu['minCudaVersion'] = None
        after = now | asked | {'gpu': now['gpu'] | gpu, 'workers': now['workers'] | asked.get('workers', {})}
        check_gpu(after['gpu'])
        self.endpoints[id] = after
        if self.forgetful: self.models.pop(id, None)
        self.note(id, [{'field': k, 'old': now.get(k), 'new': after[k]} for k in after if k != 'env' and after[k] != now.get(k)])
        return self.view(after)

    def note(self, id: str, diff: list[dict]) -> None:
        releases = self.releases.setdefault(id, [])
        releases.insert(0, {'id': f'r{len(releases) + 1}', 'version': len(releases) + 1, 'source': 'MANUAL', 'buildId': None, 'createdByUserId': None, 'workerCount': 0,
                            'createdAt': '2026-08-20T12:00:00Z', 'diff': diff})

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
            case 'GET', _, 'workers':
                workers = self.workers.get(self.get(id)['id'], [])
                states = ('running', 'idle', 'initializing', 'throttled', 'unhealthy')
                return 200, {'endpointVersion': len(self.releases[id]), 'workers': workers, 'summary': {s: sum(w['status'].lower() == s for w in workers) for s in states} | {'total': len(workers)}}
            case 'GET', _, 'releases':
                self.get(id)
                return 200, {'endpointVersion': len(self.releases[id]), 'releases': self.releases[id], 'rollout': {'inProgress': False, 'workersOnLatest': 0, 'workersTotal': 0, 'percentOnLatest': 0}}
        raise Refused(405, f'{method} is not allowed here')

    # GraphQL
    def record(self, id: str) -> dict:
        e = self.get(id)
        ids = self.order.get(id, ','.join([*sorted(e['gpu']['pools']), *(f'-{t}' for t in e['gpu']['excludedTypes'])]))
        return {'id': id, 'name': e['name'], 'templateId': f't{id}', 'gpuIds': ids, 'gpuCount': e['gpu']['count'], 'instanceIds': [], 'workersMin': e['workers']['min'],
                'workersMax': e['workers']['max'], 'locations': '', 'networkVolumeId': None, 'networkVolumeIds': [], 'idleTimeout': e['workers']['idleTimeout'], 'scalerType': e['scaling']['type'],
                'scalerValue': e['scaling'].get('queueDelay'), 'executionTimeoutMs': e['timeout'], 'minCudaVersion': e['gpu']['minCudaVersion'], 'flashBootType': e['flashboot'],
                'modelReferences': self.models.get(id, [])}

    def graphql(self, body) -> tuple[int, object]:
        if 'saveEndpoint' not in body['query']: return 200, {'data': {'myself': {'endpoints': [self.record(i) for i in self.endpoints]}}}
        given = body['variables']['input']
        if unknown := set(given) - GRAPHQL_FIELDS: return 400, {'errors': [{'message': f'Field "{sorted(unknown)[0]}" is not defined by type "EndpointInput".'}]}
        if given.get('id') not in self.endpoints: return 200, {'errors': [{'message': 'Something went wrong. Please try again later or contact support.'}], 'data': {'saveEndpoint': None}}
        full = {'gpuIds': 'AMPERE_16', 'gpuCount': 1, 'workersMin': 0, 'workersMax': 3, 'idleTimeout': 5, 'scalerType': 'QUEUE_DELAY', 'scalerValue': 4, 'executionTimeoutMs': 0,
                'minCudaVersion': None, 'flashBootType': 'OFF', 'modelReferences': []} | given # a full replace: what is not given goes back to its default
        parts = full['gpuIds'].split(',')
        e = self.endpoints[given['id']]
        self.endpoints[e['id']] = e | {'name': full['name'], 'timeout': full['executionTimeoutMs'], 'flashboot': full['flashBootType'],
            'workers': {'min': full['workersMin'], 'max': full['workersMax'], 'idleTimeout': full['idleTimeout']}, 'scaling': {'type': full['scalerType'], 'queueDelay': full['scalerValue']},
            'gpu': {'pools': [p for p in parts if not p.startswith('-')], 'excludedTypes': [p[1:] for p in parts if p.startswith('-')], 'count': full['gpuCount'],
                    'allowedCudaVersions': [], 'minCudaVersion': full['minCudaVersion']}}
        self.models[e['id']], self.order[e['id']] = list(full['modelReferences']), full['gpuIds']
        return 200, {'data': {'saveEndpoint': self.record(e['id'])}}

class Handler(BaseHTTPRequestHandler):
    protocol_version = 'HTTP/1.1'
    wbufsize = -1 # one packet an answer
    plane: ControlPlane

    def serve(self) -> None:
        raw = self.rfile.read(int(self.headers.get('Content-Length') or 0))
        path, method, plane = self.path.partition('?')[0], self.command, self.plane
        try:
            with plane.lock:
                if re.match(r'python|curl|Go-http|httpx|$', self.headers.get('User-Agent', ''), re.I): raise Refused(403, 'access denied')
                if self.headers.get('Authorization') != f'Bearer {plane.key}': raise Refused(401, 'missing bearer token' if 'Authorization' not in self.headers else 'invalid bearer token')
                body = json.loads(raw) if raw else None
                plane.asked.append((method, path, body))
                fault = next((f for f in plane.faults if f[0] == method), None)
                if fault: plane.faults.remove(fault)
                if fault and fault[1] in ('503', '429'): raise Refused(int(fault[1]), 'rate limit exceeded for the minute window' if fault[1] == '429' else 'upstream unavailable', headers={'Retry-After': '1'})
                log = re.fullmatch(r'/v2/serverless/(\w+)/workers/(\w+)/logs', path)
                if log: status, answer = 200, plane.logs.get(log[2], [])
                else: status, answer = plane.graphql(body) if path == '/graphql' else (200, plane.health) if path.startswith('/jobs/') else plane.rest(method, path, body)
            if log: return self.stream(answer)
            if fault and fault[1] == 'lost':
                self.close_connection = True
                return self.connection.shutdown(socket.SHUT_RDWR)
            if fault and fault[1] == '503 done': raise Refused(503, 'upstream unavailable')
            self.answer(status, answer)
        except Refused as e: self.answer(e.status, e.body, e.headers)

    def answer(self, status: int, body, headers: dict | None = None) -> None:
        data = b'' if body is None else json.dumps(body).encode()
        self.send_response(status)
        for k, v in {'Content-Type': 'application/problem+json' if status >= 400 else 'application/json', 'Content-Length': str(len(data)), **(headers or {})}.items(): self.send_header(k, v)
        self.end_headers()
        self.wfile.write(data)

    def stream(self, lines: list[dict]) -> None:
        "Server-sent events that never end by themselves: the worker may say more"
        self.send_response(200)
        self.send_header('Content-Type', 'text/event-stream')
        self.send_header('Connection', 'close')
        self.end_headers()
        for n, line in enumerate(lines): self.wfile.write(f'id: 2026-08-20T12:00:00Z/{n:012}\ndata: {json.dumps({"ts": "2026-08-20T12:00:00Z", **line})}\n\n'.encode())
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
