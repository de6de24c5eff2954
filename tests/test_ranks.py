"A run whose rounds two processes train: killed, resumed, the same; one that can't be made"
import json
import os
import signal
import subprocess
import sys
import time
from dataclasses import asdict, replace

import psutil
import pytest

from partal_nb.config import config_hash, preset
from partal_nb.runs.checks import check_run
from partal_nb.runs.journal import read_journal

TINY = preset(
    'demo', pool_images=10, test_images=4, height=48, width=64, features=8, encoder='test_efficientnet',
    pretrained=False, start_images=4, step_pairs=6, rounds=1, train_by='steps', train_for=12, passes=2, device='cpu',
    pseudo=.5, processes=2)

@pytest.fixture(scope='module')
def cache(tmp_path_factory): return tmp_path_factory.mktemp('cache')

def start(folder, cache):
    words = [sys.executable, '-m', 'partal_nb.runs.sweep', json.dumps(asdict(TINY)), str(folder)]
    env = dict(os.environ, OMP_NUM_THREADS='1', PARTAL_CACHE=str(cache))
    return subprocess.Popen(words, env=env, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True)

def ranks(folder):
    "The processes that train a part of each batch"
    found = []
    for p in psutil.process_iter(['cmdline']):
        words = p.info['cmdline'] or []
        if 'partal_nb.runs.ranks' in words and any(w.startswith(str(folder)) for w in words): found.append(p)
    return found

def same(folder):
    lines = read_journal(folder)
    assert [line['resolved']['processes'] for line in lines] == [2, 2]
    measured = ('seconds', 'peak_memory_mb')
    return [{k: v for k, v in line.items() if k not in measured} for line in lines]

@pytest.mark.long
def test_killed_and_resumed(tmp_path, cache):
    assert start(tmp_path/'whole', cache).wait(600) == 0
    process = start(tmp_path/'cut', cache)
    while not (tmp_path/'cut'/'round-1.ranks'/'wanted').exists() or not ranks(tmp_path/'cut'):
        assert process.poll() is None, process.communicate()
        time.sleep(.05)
    process.send_signal(signal.SIGKILL)
    process.wait()
    until = time.monotonic() + 60
    while ranks(tmp_path/'cut') and time.monotonic() < until: time.sleep(.1)
    assert not ranks(tmp_path/'cut')
    assert len(read_journal(tmp_path/'cut')) == 1
    assert start(tmp_path/'cut', cache).wait(600) == 0
    assert same(tmp_path/'cut') == same(tmp_path/'whole')
    assert not [p.name for p in (tmp_path/'cut').iterdir() if p.suffix in ('.ranks', '.part')]
    about = json.loads((tmp_path/'cut'/'config.json').read_text('utf-8'))
    assert about['config']['processes'] == 2 and about['hash'] == config_hash(replace(TINY, processes=1))

@pytest.mark.parametrize('changes, message', [
    (dict(processes=5), 'expected at most 4, an image of each batch for each, got 5'),
    (dict(strategy='learning_loss', pseudo=0.), "'learning_loss' compares the images of a batch"),
])
def test_refused_before_anything_is_made(tmp_path, monkeypatch, cache, changes, message):
    monkeypatch.setenv('PARTAL_CACHE', str(cache))
    with pytest.raises(ValueError, match=message): check_run(replace(TINY, **changes), tmp_path/'run')
    assert not (tmp_path/'run').exists()
