"A Label Studio of one's own, driven over its API"
import contextlib
import json
import os
import secrets
import signal
import socket
import subprocess
import time
import urllib.error
import urllib.request

import pytest

QUIET = dict(LATEST_VERSION_CHECK='false', COLLECT_ANALYTICS='false', SENTRY_DSN='', FRONTEND_SENTRY_DSN='',
             LABEL_STUDIO_ENABLE_LEGACY_API_TOKEN='true')
LEFT_OUT = ('PYTHONPATH', 'DJANGO_SETTINGS_MODULE')

class Studio:
    "A running Label Studio"
    def __init__(self, url, token): self.url, self.token = url, token

    def call(self, method, path, **body):
        data = json.dumps(body['json']).encode() if 'json' in body else None
        headers = {'Authorization': f'Token {self.token}', 'Content-Type': 'application/json'}
        request = urllib.request.Request(self.url + path, method=method, data=data, headers=headers)
        try:
            with urllib.request.urlopen(request, timeout=120) as r: return json.loads(r.read() or b'null')
        except urllib.error.HTTPError as e: raise AssertionError(f'{method} {path}: {e.code} {e.read()[:500]}') from e

    def project(self, title, folder): # as `ask` wrote it -> its id, and the ids of its tasks in their order
        settings = dict(title=title, label_config=(folder/'label_config.xml').read_text('utf-8'))
        project = self.call('POST', '/api/projects', json=settings)['id']
        tasks = json.loads((folder/'tasks.json').read_bytes())
        done = self.call('POST', f'/api/projects/{project}/import?return_task_ids=true', json=tasks)
        assert (done['task_count'], done['prediction_count']) == (len(tasks), sum('predictions' in t for t in tasks))
        return project, done['task_ids']

    def export(self, project): # of all its tasks
        return self.call('GET', f'/api/projects/{project}/export?exportType=JSON&download_all_tasks=true')

@contextlib.contextmanager
def running_studio(tools, home): # tools: the folder of its command; home: an empty folder
    token = secrets.token_hex(20)
    with socket.socket() as s:
        s.bind(('127.0.0.1', 0))
        port = s.getsockname()[1]
    env = {k: v for k, v in os.environ.items() if k not in LEFT_OUT} | QUIET
    env |= dict(LABEL_STUDIO_BASE_DATA_DIR=str(home), HOME=str(home))
    command = [str(tools/'label-studio'), 'start', '--no-browser', '--internal-host', '127.0.0.1', '--port', str(port),
               '--username', 'eva@example.org', '--password', secrets.token_urlsafe(12), '--user-token', token]
    with open(home/'log', 'wb') as log:
        streams = dict(stdin=subprocess.DEVNULL, stdout=log, stderr=log)
        process = subprocess.Popen(command, env=env, cwd=home, start_new_session=True, **streams)
    try:
        yield wait_until_up(Studio(f'http://127.0.0.1:{port}', token), process, home/'log')
    finally:
        with contextlib.suppress(ProcessLookupError): os.killpg(process.pid, signal.SIGTERM)
        process.wait(60)

def wait_until_up(studio, process, log, patience=1200): # seconds; it makes its database first, which may take minutes
    start = time.monotonic()
    while time.monotonic() - start < patience:
        if process.poll() is not None:
            pytest.fail(f'Label Studio ended with {process.returncode}:\n{log.read_text()[-3000:]}')
        try:
            studio.call('GET', '/api/projects')
            return studio
        except (OSError, AssertionError): time.sleep(1)
    pytest.fail(f'Label Studio is not up after {patience} s:\n{log.read_text()[-3000:]}')
