"The ledger under two writers, SIGKILL at every step, a limit on file size, random histories, files of version 1"
import random
import shutil
import signal
import sqlite3
import subprocess
import sys
import time

import numpy as np
import pytest

from partal_nb.tasks import Pair, semseg_task, standard_task
from partal_nb.runs.ledger import Entry, Ledger, replay
from partal_nb.runs.schema import AFTER

TASKS = semseg_task(['wall', 'floor'], cost=5), standard_task('depth', cost=.5)
IMAGES = tuple(f'{n:05d}' for n in range(4000))
HEAD = """
import os, resource, signal, sys, time
from partal_nb.tasks import Pair, semseg_task, standard_task
from partal_nb.runs.ledger import Entry, Ledger
path, first, step = sys.argv[1], int(sys.argv[2]), int(sys.argv[3])
tasks = semseg_task(['wall', 'floor'], cost=5), standard_task('depth', cost=.5)
images = tuple(f'{n:05d}' for n in range(4000))
def pairs(round, n): return [Pair(i, t.name) for i in images[round*n//2:(round+1)*n//2] for t in tasks]
"""

def start(code, path, first=0, step=1):
    command = [sys.executable, '-c', HEAD + code, str(path), str(first), str(step)]
    return subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)

def rounds(path):
    with Ledger(path, IMAGES, TASKS) as led:
        events = led.events()
        assert led.labeled().sum() == len(events) == sum(led.counts().values())
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
    with Ledger(tmp_path/'l0', IMAGES[:50], TASKS) as led: assert not led.labeled().any()

def test_race_for_a_pair(tmp_path):
    "Both want the same pairs, each in a round of its own: one gets them all, the other is told"
    code = """
with Ledger(path, images, tasks) as led:
    for n in range(20):
        try: led.reveal(pairs(n, 20), 2*n + first, f'writer {first}'); print('got', n)
        except ValueError as e: assert 'is already labeled, since round' in str(e), e; print('lost', n)
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
    "SIGKILL from within SQLite, after more and more of its steps: that round is not there, all before it is"
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
    with Ledger(tmp_path/'l.db', IMAGES, TASKS) as led:
        assert led.reveal([Pair(i, 'semseg') for i in IMAGES], 1, 'oracle') == 4000

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
    done = 1 + len(w.stdout.read().splitlines()) # `communicate` would forget lines that came with the first
    w.wait(60)
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

# Asked, told, rejected, corrected

def happen(led, rng, batch):
    "Something that may happen to a ledger, sensible or not"
    pairs = [Pair(i, t.name) for i in led.images for t in led.tasks]
    free = [p for p in pairs if led.state().get(p, ('',))[0] in AFTER['asked']]
    if rng.random() < .3 and free:
        return led.ask({p: rng.random() for p in rng.sample(free, rng.randint(1, min(4, len(free))))}, batch)
    some = rng.sample(pairs, rng.randint(1, 2))
    def label(p): return Entry(*p, sha256=rng.choice('abc'), cost=rng.random(), minutes=1.)
    made = [Entry(*p, reason='dark') if rng.random() < .3 else label(p) for p in some]
    return led.tell(made, rng.randint(0, batch), rng.choice(['Ann', 'Bob']))

@pytest.mark.parametrize('seed', range(20))
def test_replay_is_the_state(seed, tmp_path):
    "After any history the events alone lead to what the ledger says, and so they do in a backup"
    rng = random.Random(seed)
    with Ledger(tmp_path/'l.db', [f'{n}' for n in range(12)], TASKS) as led:
        for batch in range(1, 40):
            happen(led, rng, batch)
            if batch % 5 == 0: assert replay(led.events()) == led.state()
        state, events = led.state(), led.events()
        assert len(events) > 20 and {*events.kind} >= {'asked', 'told', 'corrected'}
        told = {p for p, s in state.items() if s.version}
        assert {Pair(led.images[n], TASKS[k].name) for n, k in np.argwhere(led.labeled())} == told == set(led.labels())
        assert led.spent() == pytest.approx(events[events.kind != 'asked'].cost.sum())
        with Ledger(led.backup(tmp_path/'copy.db'), led.images, TASKS) as copy:
            assert copy.state() == state and copy.events().equals(events)

def test_a_copy_of_the_files(tmp_path):
    "What a backup program finds, both files of a ledger in use"
    with Ledger(tmp_path/'l.db', IMAGES, TASKS) as led:
        led.ask({Pair(i, 'depth'): 1 for i in IMAGES[:9]}, 1)
        (tmp_path/'b').mkdir()
        for f in tmp_path.glob('l.db*'): shutil.copy(f, tmp_path/'b')
        state = led.state()
    with Ledger(tmp_path/'b/l.db', IMAGES, TASKS) as copy: assert copy.state() == state and len(state) == 9

STEPS = """
with Ledger(path, images[:30], tasks) as led:
    if step: led.db.set_progress_handler(lambda: os.kill(os.getpid(), signal.SIGKILL), step)
    print('asked', led.ask({p: 1. for p in pairs(0, 30)}, 1), flush=True)
    print('told', len(led.tell([Entry(*p, sha256='a', minutes=1.) for p in pairs(0, 20)], 1)), flush=True)
    print('rejected', len(led.tell([Entry(*p, reason='dark') for p in pairs(0, 30)[20:]], 1)), flush=True)
    print('corrected', len(led.tell([Entry(*p, sha256='b') for p in pairs(0, 10)], 1)), flush=True)
    led.db.set_progress_handler(None, 0)
"""

def test_kill_at_every_step_of_asking_and_telling(tmp_path):
    "What was acknowledged is there after SIGKILL, the rest is there whole or not at all, and the same program ends"
    kinds = [('asked', 30), ('told', 20), ('rejected', 10), ('corrected', 10)]
    Ledger(tmp_path/'empty.db', IMAGES[:30], TASKS).close()
    seen, step, code = set(), 300, -signal.SIGKILL
    while code:
        path = tmp_path/f'{step}.db'
        shutil.copy(tmp_path/'empty.db', path)
        w = start(STEPS, path, step=step)
        out, err = w.communicate(timeout=60)
        code = w.returncode
        assert code in (0, -signal.SIGKILL), err
        said = [(a, int(n)) for a, n in (line.split() for line in out.splitlines())]
        with Ledger(path, IMAGES[:30], TASKS) as led:
            found = led.events().groupby('kind').size().to_dict()
            assert all(found.get(k) == n for k, n in said), (step, said, found)
            assert all(found.get(k, 0) in (0, n) for k, n in kinds), (step, said, found)
            assert replay(led.events()) == led.state()
            assert led.db.execute('PRAGMA integrity_check').fetchone() == ('ok',)
        assert start(STEPS, path, step=0).wait(timeout=60) == 0
        with Ledger(path, IMAGES[:30], TASKS) as led:
            assert led.events().groupby('kind').size().to_dict() == dict(kinds)
        seen.add(len(said))
        step = step*6//5
    assert seen == {0, 1, 2, 3, 4}

def test_two_tell_at_once(tmp_path):
    "Both tell 200 answers one by one, half of them of the same pairs with contents of their own: all land, none twice"
    code = """
with Ledger(path, images, tasks) as led:
    for n, p in enumerate(pairs(0, 200)):
        entry = Entry(*p, sha256=f'{first if n % 2 else 7}')
        print(led.tell([entry], 1, f'{first}')[0])
"""
    with Ledger(tmp_path/'l.db', IMAGES, TASKS) as led:
        led.ask({Pair(i, t.name): 1. for i in IMAGES[:100] for t in TASKS}, 1)
    tellers = [start(code, tmp_path/'l.db', first) for first in (0, 1)]
    said = [w.communicate(timeout=120)[0].split() for w in tellers]
    assert all(w.returncode == 0 for w in tellers)
    both = list(zip(*said))
    expected = [['same', 'told'], ['corrected', 'told']]
    assert len(both) == 200 and all(sorted(b) == expected[n % 2] for n, b in enumerate(both))
    with Ledger(tmp_path/'l.db', IMAGES, TASKS) as led:
        assert led.events().groupby('kind').size().to_dict() == dict(asked=200, told=200, corrected=100)
        assert replay(led.events()) == led.state()

# Files of an earlier version

FIRST = """CREATE TABLE pool (kind TEXT NOT NULL, position INTEGER NOT NULL, name TEXT NOT NULL, cost REAL,
                              PRIMARY KEY (kind, position), UNIQUE (kind, name));
CREATE TABLE events (image TEXT NOT NULL, task TEXT NOT NULL, round INTEGER NOT NULL, cost REAL NOT NULL,
                     source TEXT NOT NULL, at TEXT NOT NULL, UNIQUE (image, task));
CREATE TRIGGER pool_DELETE BEFORE DELETE ON pool BEGIN SELECT RAISE(ABORT, 'no'); END;
CREATE TRIGGER events_UPDATE BEFORE UPDATE ON events BEGIN SELECT RAISE(ABORT, 'no'); END;
CREATE TRIGGER events_DELETE BEFORE DELETE ON events BEGIN SELECT RAISE(ABORT, 'no'); END;
CREATE TRIGGER events_again BEFORE INSERT ON events
 WHEN EXISTS (SELECT 1 FROM events WHERE image = NEW.image AND task = NEW.task)
    BEGIN SELECT RAISE(ABORT, 'no'); END;
INSERT INTO pool VALUES ('image', 0, '00000', NULL), ('image', 1, '00001', NULL),
 ('task', 0, 'semseg', 5), ('task', 1, 'depth', .5);
INSERT INTO events VALUES ('00001', 'depth', 0, .5, 'start', '2026-01-01T00:00:00+00:00'),
 ('00000', 'semseg', 1, 5, 'oracle', '2026-01-02T00:00:00+00:00');
PRAGMA journal_mode=WAL;"""

def test_an_earlier_version_opens(tmp_path):
    with sqlite3.connect(tmp_path/'l.db') as db: db.executescript(FIRST)
    for _ in range(2):
        with Ledger(tmp_path/'l.db', IMAGES[:2], TASKS) as led:
            assert led.events()[['kind', 'image', 'task', 'round', 'cost', 'source']].values.tolist() == [
                ['told', '00001', 'depth', 0, .5, 'start'], ['told', '00000', 'semseg', 1, 5, 'oracle']]
            assert led.labeled(0).tolist() == [[False, False], [False, True]] and led.spent() == 5.5
            assert led.reveal([Pair('00000', 'semseg')], 1, 'oracle') == 0
            with pytest.raises(sqlite3.IntegrityError, match='append-only'): led.db.execute('DELETE FROM events')

def test_an_update_that_is_killed(tmp_path):
    "It is what it was, or what it is to be"
    with sqlite3.connect(tmp_path/'old.db') as db: db.executescript(FIRST)
    code = """
import sqlite3
connect = sqlite3.connect
def killing(*args, **kw):
    db = connect(*args, **kw)
    db.set_progress_handler(lambda: os.kill(os.getpid(), signal.SIGKILL), step)
    return db
sqlite3.connect = killing
Ledger(path, images[:2], tasks)
"""
    died = 0
    for step in (10, 20, 40, 60, 80, 120, 160, 200, 300, 400):
        path = tmp_path/f'{step}.db'
        shutil.copy(tmp_path/'old.db', path)
        w = start(code, path, step=step)
        _, err = w.communicate(timeout=60)
        assert w.returncode in (0, -signal.SIGKILL), err
        died += w.returncode != 0
        with Ledger(path, IMAGES[:2], TASKS) as led: assert len(led.events()) == 2
    assert died >= 5

def test_a_newer_version_is_refused(tmp_path):
    Ledger(tmp_path/'l.db', IMAGES[:2], TASKS).close()
    with sqlite3.connect(tmp_path/'l.db') as db: db.execute('PRAGMA user_version = 9')
    with pytest.raises(ValueError, match=r'was written by a newer partal_nb \(form 9'):
        Ledger(tmp_path/'l.db', IMAGES[:2], TASKS)
