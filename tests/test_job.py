"The answer to any request is one short printable line; the rest of the contract is tested where jobs run"
import pickle

import pytest
from pydantic import BaseModel, ValidationError

from wan_avatar.job import LONGEST, JobError, check_key, first_fault, parse_job, printable

pytestmark = pytest.mark.hostile('requests')

IMAGE = {'input_image_minio_path': 'a.png'}

def deep(levels: int) -> list:
    nested: list = []
    for _ in range(levels): nested = [nested]
    return nested

HOSTILE = {
    '40,000 unknown fields': ({f'{i} ' * 30: i for i in range(40_000)}, '39995 more are not fields'),
    'one unknown field of a megabyte': ({**IMAGE, 'x' * 10**6: 1}, 'is not a field'),
    'several unknown fields': ({**IMAGE, 'stpes': 4, 'sede': 1}, "'stpes', 'sede' are not fields"),
    'a lone surrogate for a name': ({**IMAGE, '\ud800': 1}, 'unicode'),
    'a lone surrogate in a key': ({'input_image_minio_path': 'a\ud800'}, 'half of a surrogate pair'),
    'a lone surrogate in a prompt': ({**IMAGE, 'prompt': '\ud800'}, 'unicode'),
    'a lone surrogate in an address': ({'input_image_url': 'http://a/\ud800'}, 'unicode'),
    'a lone surrogate in an id': ({**IMAGE, 'user_id': '\udfff'}, 'user_id'),
    'a number of 5,000 digits': ({**IMAGE, 'seed': 10**5000}, 'more than 60 digits'),
    'a number of 5,000 digits for an address': ({'input_image_url': 10**5000}, 'more than 60 digits'),
    'lists in lists': ({**IMAGE, 'seed': deep(50_000)}, 'seed [[['),
    'lists in lists for the input': (deep(50_000), 'must be a JSON object'),
    'a number for a name': ({5: 1}, 'strings'),
    'control characters': ({**IMAGE, 'user_id': 'a\nb\x1b[31m'}, 'user_id'),
    'a megabyte of values': ({**IMAGE, 'seed': {str(i): i for i in range(100_000)}}, 'seed'),
}

@pytest.mark.parametrize('name', HOSTILE)
def test_a_hostile_request_is_refused_in_few_words(name):
    asked, words = HOSTILE[name]
    with pytest.raises(JobError) as e: parse_job(asked)
    text = str(e.value)
    assert e.value.code == 'bad_input' and words in text and len(text) <= LONGEST == 1000 and text.isprintable()

MESSAGES = {
    'short': ('as it is, in any script: портрет', 'as it is, in any script: портрет'),
    'lines': ('one\ntwo', 'one\ntwo'),
    'a terminal told what to do': ('\x1b[2J\r\a\x7f', '\\x1b[2J\\r\\x07\\x7f'),
    'half a pair': ('\ud83d', '\\ud83d'),
    'written from right to left': ('\u202egnp', '\\u202egnp'),
    'a NUL': ('a\0b', 'a\\x00b'),
}

@pytest.mark.parametrize('name', MESSAGES)
def test_messages_are_printable(name):
    said, shown = MESSAGES[name]
    assert JobError('internal', said).message == printable(said) == shown
    JobError('internal', said).answer()['error'].encode() # UTF-8 takes it

@pytest.mark.parametrize('filler', ['x', '\ud800', '\0', 'портрет '])
def test_a_long_message_keeps_beginning_and_end(filler):
    e = JobError('comfy_failed', f'begins{filler * 3_000_000}ends')
    assert len(str(e)) <= LONGEST
    assert str(e).startswith('comfy_failed: begins')
    assert str(e).endswith('ends')
    assert str(e).isprintable()

def test_an_error_survives_pickling():
    made = pickle.loads(pickle.dumps(JobError('storage_failed', 'm' * 5000, worker_unfit=True)))
    assert made.answer() == JobError('storage_failed', 'm' * 5000, worker_unfit=True).answer()
    assert (made.code, made.worker_unfit) == ('storage_failed', True)

@pytest.mark.parametrize('key', ['\ud800', 'a/\udc00.png', 'é' * 513])
def test_keys_no_bucket_takes(key):
    with pytest.raises(ValueError): check_key(key)

class Timings(BaseModel):
    timings: dict[str, float]

FAULTS = { # data that came from elsewhere, and what its error says
    'no JSON': (b'{"half": ', 'the text: Invalid JSON'),
    'a field that is missing': (b'{}', 'timings: Field required'),
    'a name that moves the cursor': (b'{"timings": {"a\\u001b[31m\\nb": "x"}}', 'timings.a\\x1b[31m\\nb: '),
    'a name of a megabyte': (b'{"timings": {"' + b'x' * 10**6 + b'": "x"}}', ' … '),
}

@pytest.mark.parametrize('name', FAULTS)
def test_what_is_wrong_with_data_is_said_in_few_words(name):
    data, words = FAULTS[name]
    with pytest.raises(ValidationError) as e: Timings.model_validate_json(data)
    text = first_fault(e.value, 'the text')
    assert words in text
    assert len(text) < 250
    assert text.isprintable()
