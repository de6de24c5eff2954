"The ledger under two writers at once, `kill -9` in the middle of a round, a limit on file size, and a race for the same pair"
import signal
import subprocess
import sys
import time

import numpy as np
import pytest

from partal_nb.core import Pair, semseg_task, standard_task
from partal_nb.data.ledger import Ledger

TASKS = semseg_task(['wall', 'floor'], cost=5), standard_task('depth', cost=.5)
IMAGES = tuple(f'{n:05d}' for n in range(4000))
HEAD = """
import os, resource, signal, sys, time
from partal_nb.core import Pair, semseg_task, standard_task
from partal_nb.data.ledger import Ledger
path, first, step = sys.argv[1], int(sys.argv[2]), int(sys.argv[3])
tasks = semseg_task(['wall', 'floor'], cost=5), standard_task('depth', cost=.5)
images = tuple(f'{n:05d}' for n in range(4000))
def pairs(round, n): return [Pair(i, t.name) for i in images[round*n//2:(round+1)*n//2] for t in tasks]
"""

def start(code, path, first=0, step=1):
    return subprocess.Popen([sys.executable, '-c', HEAD + code, str(path), str(first), str(step)], stdout=subprocess.PIPE,
                            stderr=subprocess.PIPE, text=True)

def rounds(path):
    with Ledger(path, IMAGES, TASKS) as led:
        events = led.events()
        assert led.labelled().sum() == len(events) == sum(led.counts().values())
        assert led.db.execute('PRAGMA integrity_check').fetchone() == ('ok',)
    return events.groupby('round').size()

def test_two_writers(tmp_path):
    "Both make the file, then write 40 rounds each, one the even and one the odd ones"
    code = """
with Ledger(path, images, tasks) as led:
    for r in range(first, 80, 2): led.reveal(pairs(r, 50), r, f'writer {first}')
"""
    writers = [start(code, tmp_path/'l.db', first) for first in (0, 1)]
    for w in writers:
        _, err = w.communicate(timeout=120)
        assert w.returncode == 0, err
    found = rounds(tmp_path/'l.db')
    assert list(found.index) == list(range(80)) and (found == 50).all()

def test_many_make_the_file_at_once(tmp_path):
    "Six processes make thirty ledgers, each in the same moment: the switch to WAL does not wait by itself"
    code = """
for n in range(30):
    time.sleep(max(0, first + n/15 - time.time()))
    Ledger(f'{path}{n}', images[:50], tasks).close()
"""
    soon = int(time.time()) + 3
    writers = [start(code, tmp_path/'l', soon) for _ in range(6)]
    for w in writers:
        _, err = w.communicate(timeout=120)
        assert w.returncode == 0, err
    with Ledger(tmp_path/'l0', IMAGES[:50], TASKS) as led: assert not led.labelled().any()

def test_race_for_a_pair(tmp_path):
    "Both want the same pairs, each in a round of its own: one gets them all, the other is told"
    code = """
with Ledger(path, images, tasks) as led:
    for n in range(20):
        try: led.reveal(pairs(n, 20), 2*n + first, f'writer {first}'); print('got', n)
        except ValueError as e: assert 'is already labelled, since round' in str(e), e; print('lost', n)
"""
    writers = [start(code, tmp_path/'l.db', first) for first in (0, 1)]
    said = []
    for w in writers:
        out, err = w.communicate(timeout=120)
        assert w.returncode == 0, err
        said.append(np.array([line.split()[0] == 'got' for line in out.splitlines()]))
    assert (said[0] ^ said[1]).all()
    found = rounds(tmp_path/'l.db')
    assert len(found) == 20 and (found == 20).all()

def test_kill_in_the_middle_of_a_round(tmp_path):
    "SIGKILL from within SQLite, after more and more of its steps: nothing of that round is there, everything before it is"
    code = """
with Ledger(path, images, tasks) as led:
    led.db.set_progress_handler(lambda: os.kill(os.getpid(), signal.SIGKILL), step)
    led.reveal(pairs(1, 1000), 1, 'oracle')
"""
    with Ledger(tmp_path/'l.db', IMAGES, TASKS) as led:
        led.reveal([Pair(IMAGES[0], 'depth')], 0, 'start')
    for step in (500, 5_000, 20_000, 40_000):
        w = start(code, tmp_path/'l.db', step=step)
        w.communicate(timeout=60)
        assert w.returncode == -signal.SIGKILL, f'{step} steps were not reached'
        assert rounds(tmp_path/'l.db').to_dict() == {0: 1}
    with Ledger(tmp_path/'l.db', IMAGES, TASKS) as led: assert led.reveal([Pair(i, 'semseg') for i in IMAGES], 1, 'oracle') == 4000

@pytest.mark.parametrize('seconds', [.05, .2, .5])
def test_kill_at_any_moment(tmp_path, seconds):
    "Whatever was said to be done is there, and only whole rounds; the same program resumes and ends"
    code = """
with Ledger(path, images, tasks) as led:
    for r in range(80): led.reveal(pairs(r, 100), r, 'oracle'); print('done', r, flush=True)
"""
    w = start(code, tmp_path/'l.db')
    w.stdout.readline()
    time.sleep(seconds)
    w.kill()
    out, _ = w.communicate(timeout=60)
    done = 1 + len(out.splitlines())
    found = rounds(tmp_path/'l.db')
    assert (found == 100).all() and list(found.index) == list(range(len(found))) and done <= len(found) <= done + 1
    w = start(code, tmp_path/'l.db')
    _, err = w.communicate(timeout=120)
    assert w.returncode == 0, err
    assert len(rounds(tmp_path/'l.db')) == 80

def test_file_may_not_grow(tmp_path):
    "A real refusal by the operating system instead of SQLite's own limit"
    code = """
led = Ledger(path, images, tasks)
led.reveal(pairs(0, 10), 0, 'start')
signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
size = os.path.getsize(path + '-wal') + 8192
resource.setrlimit(resource.RLIMIT_FSIZE, (size, size))
try: led.reveal(pairs(1, 2000), 1, 'oracle')
except OSError as e: print(e)
"""
    w = start(code, tmp_path/'l.db')
    out, err = w.communicate(timeout=60)
    assert w.returncode == 0 and 'free some space' in out, (out, err)
    assert rounds(tmp_path/'l.db').to_dict() == {0: 10}
