"A batch through the real Label Studio: imported, annotated and exported over its API, and compared pixel by pixel"
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
from pathlib import Path

import numpy as np
import pytest

from partal_nb.annotate.query import Query, legend
from partal_nb.annotate.label_studio import brush_mask, brush_rle
from partal_nb.annotate.formats import FORMATS
from partal_nb.data.prepare import open_source

pytestmark = pytest.mark.slow
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

@pytest.fixture(scope='module')
def studio(shared, tools, tmp_path_factory):
    home, token = tmp_path_factory.mktemp('studio'), secrets.token_hex(20)
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

def ask(shared, sample, name, n=4):
    source, found = open_source(shared/sample), []
    for i in source.ids(name):
        rgb, label = source.rgb(i), source.label(i, name)
        if (label == 255).all(): continue
        entropy = np.hypot(*np.gradient(rgb.mean(2)))
        found.append(Query(i, source.tasks[name], rgb, label, entropy))
        if len(found) == n: return found

def regions(label, task, like): # as the interface sends them when somebody paints `label`
    def region(p): return dict(format='rle', rle=brush_rle(label[..., 0] == p.value), brushlabels=[p.name])
    there = [p for p in legend(task)[1:] if (label == p.value).any()]
    return [dict(like, id=f'drawn{p.value}', value=region(p)) for p in there]

@pytest.mark.parametrize('sample,name', [('nyuv2_192x144', 'semseg'), ('pascal_part18', 'parts')])
def test_a_batch_through_label_studio(shared, studio, tmp_path, sample, name):
    asked = ask(shared, sample, name)
    task, sizes = asked[0].task, {q.image: q.rgb.shape[:2] for q in asked}
    FORMATS['label-studio'].write(tmp_path, task, asked)
    settings = dict(title=name, label_config=(tmp_path/'label_config.xml').read_text())
    project = studio.call('POST', '/api/projects', json=settings)['id']
    tasks = json.loads((tmp_path/'tasks.json').read_bytes())
    done = studio.call('POST', f'/api/projects/{project}/import?return_task_ids=true', json=tasks)
    assert (done['task_count'], done['prediction_count']) == (len(asked), len(asked))

    truth, sent = {q.image: q.guess for q in asked}, {}
    for k, id in enumerate(done['task_ids']):
        t = studio.call('GET', f'/api/tasks/{id}')
        image, (guess,) = t['data']['image_id'], t['predictions']
        names = {p.name: p.value for p in legend(task)}
        for r in guess['result']:
            mask = brush_mask(r['value']['rle'], sizes[image])
            assert np.array_equal(mask, truth[image][..., 0] == names[r['value']['brushlabels'][0]])
        assert len(guess['result']) == sum((truth[image] == p.value).any() for p in legend(task)[1:])
        result, body = guess['result'], dict(lead_time=30*(k + 1))
        if k == 1: # corrected: everything mirrored
            sent[image] = truth[image][:, ::-1]
            result = regions(sent[image], task, {k: v for k, v in result[0].items() if k not in ('id', 'value')})
        elif k == 2:
            why = dict(type='textarea', value=dict(text=['too blurred']))
            result = [*result, dict(why, id='why', from_name='rejected', to_name='image')]
        elif k == 3: body |= dict(was_cancelled=True)
        else: sent[image] = truth[image]
        studio.call('POST', f'/api/tasks/{id}/annotations/', json=dict(body, result=result))

    export = studio.call('GET', f'/api/projects/{project}/export?exportType=JSON&download_all_tasks=true')
    (tmp_path/'export.json').write_text(json.dumps(export))
    answers = {a.image: a for a in FORMATS['label-studio'].read(tmp_path/'export.json', task, sizes)}
    assert [answers[q.image].problem for q in asked] == [None]*4
    assert [answers[q.image].rejected for q in asked] == [None, None, 'too blurred', 'skipped in Label Studio']
    assert [answers[q.image].minutes for q in asked] == [.5, 1, 1.5, 2]
    assert len({a.who for a in answers.values()}) == 1 and answers[asked[0].image].who
    assert len(sent) == 2
    for image, label in sent.items(): assert np.array_equal(answers[image].label, label), image
