"""The bucket on this machine: real SeaweedFS, stopped, started again and disturbed"""
import socket
import threading

import psutil
import pytest

from wan_avatar.bucket import Bucket, bucket_server
from wan_avatar.job import JobError

MB = 2**20

def test_bucket_keeps_data_and_ports_over_an_outage(tmp_path):
    from wan_avatar.config import load_settings
    from wan_avatar.store import Store
    (source := tmp_path / 'a.txt').write_text('kept')
    with bucket_server(tmp_path / 'b') as bucket:
        store = Store(load_settings(bucket.environment()))
        store.upload(source, 'in/a.txt', 'text/plain')
        before = bucket.pid
        ports = bucket.ports
        bucket.stop()
        starter = threading.Thread(target=bucket.start) # a thread that ends must not take SeaweedFS with it
        starter.start()
        starter.join()
        assert bucket.pid != before
        assert bucket.ports == ports
        store.download('in/a.txt', tmp_path / 'again.txt', 'a', MB)
        assert (tmp_path / 'again.txt').read_text() == 'kept'
        assert (tmp_path / 'b/s3.json').stat().st_mode & 0o777 == 0o600
    assert not psutil.pid_exists(bucket.pid)

def test_a_port_that_is_taken_before_the_bucket_listens(tmp_path):
    bucket = Bucket(tmp_path)
    with socket.socket() as other:
        other.bind(('127.0.0.1', bucket.ports[0]))
        other.listen()
        taken = bucket.ports
        try:
            bucket.start()
            assert bucket.ports != taken
            assert str(bucket.ports[3]) in bucket.environment()['MINIO_ENDPOINT']
        finally: bucket.stop()

def test_a_bucket_that_cannot_start_says_why(tmp_path):
    bucket = Bucket(tmp_path)
    (tmp_path / 's3.json').write_text('{')
    with pytest.raises(JobError, match='weed|SeaweedFS ended'): bucket.start()
    assert bucket.child.poll() is not None
