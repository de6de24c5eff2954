"A run is killed before every write and at any moment, meets broken data, a full disk, a second process: what its folder then holds"
import hashlib
import json
import multiprocessing
import os
import re
import resource
import shutil
import signal
import sqlite3
import sys
import time
from collections import Counter
from dataclasses import replace
from errno import ENOSPC
from functools import partial
from itertools import chain, count, cycle
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import torch
from safetensors.torch import load_file

from partal_nb import loop
from partal_nb.core import preset, write_json
from partal_nb.data.ledger import Ledger, read_labelled
from partal_nb.data.sources import prepare_rooms
from partal_nb.data.store import INDEX, Store, png_bytes
from partal_nb.journal import is_finished, read_journal
from partal_nb.loop import load_data, run, split_images
from partal_nb.select.strategy import STRATEGIES

ROOT = Path(__file__).parents[1]
TASKS = ('semseg', 'depth', 'normals')
TINY = preset('demo', pool_images=10, test_images=4, height=48, width=64, features=8, encoder='test_efficientnet', pretrained=False,
              start_images=3, step_pairs=6, rounds=2, train_by='steps', train_for=4, passes=3, device='cpu')
FORK = multiprocessing.get_context('forkserver') # PyTorch is imported once, each child is a process of its own
FORK.set_forkserver_preload(['partal_nb.loop'])

@pytest.fixture(scope='module', autouse=True)
def own_cache(tmp_path_factory):
    with pytest.MonkeyPatch.context() as m:
        m.setenv('PARTAL_CACHE', str(tmp_path_factory.mktemp('cache')))
        yield

def refuse_pickle(event, args):
    if event == 'pickle.find_class': raise RuntimeError(f'unpickled {args}')

def child(said, config, folder, before):
    torch.set_num_threads(1)
    sys.addaudithook(refuse_pickle)
    before()
    try: run(config, folder, progress=False)
    except Exception as e: said.send(f'{type(e).__name__}: {e}')

def nothing(): pass

class Child:
    "A run in a process of its own, after `before()` there"
    def __init__(self, config, folder, before=nothing):
        self.ear, mouth = FORK.Pipe(duplex=False)
        self.process = FORK.Process(target=child, args=(mouth, config, folder, before))
        self.process.start()
        mouth.close()

    def end(self, seconds=60)->tuple: # exit code, and the error that stopped it
        "Wait so many seconds, then SIGKILL"
        self.process.join(seconds)
        if self.process.is_alive(): self.process.kill()
        self.process.join()
        try: return self.process.exitcode, self.ear.recv()
        except EOFError: return self.process.exitcode, ''

def result(folder)->dict:
    "All of a run that has to be the same when it is made again"
    keep = lambda line: {k: v for k, v in line.items() if k not in ('seconds', 'peak_memory_mb')}
    digest = lambda tensors: hashlib.sha256(b''.join(k.encode() + tensors[k].numpy().tobytes() for k in sorted(tensors))).hexdigest()
    db = sqlite3.connect(folder/'ledger.db')
    events = db.execute('SELECT image, task, round, cost, source FROM events ORDER BY rowid').fetchall()
    db.close()
    return dict(journal=[keep(line) for line in read_journal(folder)], events=events,
                scores={p.name: pd.read_parquet(p).to_dict('list') for p in folder.glob('scores-*.parquet')},
                weights={p.name: digest(load_file(p)) for p in folder.glob('*.safetensors')})

def contents(folder): return {p.name: p.read_bytes() for p in folder.iterdir() if p.name != '.lock'}

def documented()->list[str]:
    "The files of a run folder, from the table in 60_loop"
    cells = json.loads((ROOT/'nbs/60_loop.ipynb').read_text('utf-8'))['cells']
    text = next(t for c in cells if '## The run folder' in (t := ''.join(c['source'])))
    return re.findall(r'^\| `(.+?)` \|', text, re.M)

def check_whole(folder, config=TINY, scored=True):
    "Finished, and with exactly the documented files"
    assert is_finished(config, folder)
    expected = set()
    for name in documented():
        last = config.rounds + 1 if 'scores' not in name else config.rounds if scored else 0
        if name not in ('round-<round>.json', 'round-<round>.part'): expected |= {name.replace('<round>', str(r)) for r in range(last)}
    assert len(expected) > 5 and {p.name for p in folder.iterdir()} - {'.lock'} == expected

@pytest.fixture(scope='module')
def whole(tmp_path_factory, own_cache):
    "The result of a run that nothing happened to"
    folder = tmp_path_factory.mktemp('whole')/'run'
    assert Child(TINY, folder).end() == (0, '')
    check_whole(folder)
    return result(folder)

# Killed

def often(before):
    "A checkpoint after each step of the training"
    loop.train = partial(loop.train, save_every=0)
    before()

def die_at(n):
    "SIGKILL right before the n-th rename, purchase, or removal of a round's own file"
    left, reveal = count(1 - n), Ledger.reveal
    def moment():
        if next(left) == 0: os.kill(os.getpid(), signal.SIGKILL)
    def reveal_or_die(*args):
        moment()
        return reveal(*args)
    Ledger.reveal = reveal_or_die
    removed = lambda event, args: event == 'os.remove' and Path(args[0]).name.startswith('round-') and Path(args[0]).exists()
    sys.addaudithook(lambda event, args: moment() if event == 'os.rename' or removed(event, args) else None)

def written(folder): return {name: data for name, data in contents(folder).items() if name[0] != '.' and name[:6] != 'ledger'}

def test_killed_before_every_write(tmp_path, whole):
    "Each process gets one write further than the last, and leaves the one it was hit in as `.NAME.PID.part`"
    folder, hit, n, before = tmp_path/'run', [], 1, {}
    while True:
        code, error = Child(TINY, folder, partial(often, partial(die_at, n))).end()
        if code == 0: break
        assert (code, error) == (-signal.SIGKILL, '') and len(hit) < 99
        hit.append(''.join(p.name[1:].rsplit('.', 2)[0] for p in folder.glob('.*.part')))
        n, before = (n + 1 if written(folder) == before else 2), written(folder)
    assert error == '' and result(folder) == whole
    check_whole(folder)
    assert len(hit) >= 30 and set(hit) >= {'', 'config.json', 'journal.jsonl', 'scores-0.parquet', 'scores-1.parquet'} # '': between two writes
    assert set(hit) >= {f'round-{r}.{step}' for r in range(3) for step in ('part', 'safetensors', 'json')}

def test_killed_at_any_moment(tmp_path):
    "From outside, after longer and longer; other settings, with a strategy that draws lots and networks that go on from the last"
    config = replace(TINY, strategy='random_pairs', warm_start=True, dropout_at='all')
    assert Child(config, tmp_path/'whole').end() == (0, '')
    folder, states = tmp_path/'run', []
    for n in count(1):
        code, error = Child(config, folder).end(.03*n)
        if code == 0: break
        assert (code, error) == (-signal.SIGKILL, '')
        states.append(tuple(contents(folder)) if folder.exists() else ())
    assert len(states) >= 5 and len(set(states)) >= 3
    assert error == '' and result(folder) == result(tmp_path/'whole')
    check_whole(folder, config, scored=False)

# Every strategy

def test_every_strategy_spends_the_same(tmp_path):
    "Dropout everywhere, epochs, warm starts, measured on images held out of the pool"
    events = {}
    for strategy in STRATEGIES:
        config = replace(TINY, strategy=strategy, pool_images=12, val_images=2, dropout_at='all', train_by='epochs', train_for=3, warm_start=True)
        run(config, tmp_path/strategy, progress=False)
        check_whole(tmp_path/strategy, config, STRATEGIES[strategy].needs not in (None, 'features'))
        found = result(tmp_path/strategy)
        events[strategy] = found['events']
        assert [line['cost'] for line in found['journal']] == [9, 15, 21]
        assert [sum(line['bought'].values()) for line in found['journal']] == [6, 6, 0]
        assert [line['labels'] for line in found['journal']] == [{t: sum(e[1] == t and e[2] <= r for e in found['events']) for t in TASKS} for r in range(3)]
    pool, held = split_images(config, load_data(config, progress=False)[0])
    assert len(held) == 2 and {image for e in events.values() for image, *_ in e} <= set(pool)
    assert all(e[:9] == events['random'][:9] and {x[2] for x in e[:9]} == {0} for e in events.values())
    assert len({tuple(e[9:]) for e in events.values()}) > len(STRATEGIES)/2 # in a pool this small two may agree

# Broken data

@pytest.fixture(scope='module')
def rooms(tmp_path_factory)->Path:
    "Small rooms, their depth in arrays rather than PNGs, since these can hold any number"
    store = prepare_rooms(tmp_path_factory.mktemp('rooms')/'data', 12, 4, TINY.height, TINY.width, progress=False)
    for split in store.splits.values():
        for i in split: np.save(store.path/f'depth/{i}.npy', store.label(i, 'depth'))
    for p in (store.path/'depth').glob('*.png'): p.unlink()
    index = json.loads((store.path/INDEX).read_text())
    write_json(store.path/INDEX, dict(index, files=dict(index['files'], depth=dict(suffix='.npy'))))
    return store.path

@pytest.fixture
def data(rooms, tmp_path)->Path: return shutil.copytree(rooms, tmp_path/'data')

def cut(p): p.write_bytes(p.read_bytes()[:p.stat().st_size//2])
def emptied(p): p.write_bytes(b'')
def smaller(p): p.write_bytes(png_bytes(np.zeros((24, 32), np.uint8)))
def unknown_class(p): p.write_bytes(png_bytes(np.full((48, 64), 99, np.uint8)))
def not_unit(p): p.write_bytes(png_bytes(np.full((48, 64, 3), 140, np.uint8)))
def with_value(v): return lambda p: np.save(p, np.full((48, 64, 1), v, np.float32))

BROKEN = [('rgb', cut, 'not a whole image'), ('semseg', cut, 'not a whole image'), ('semseg', emptied, 'not a whole image'),
          ('semseg', smaller, '(24, 32) pixels, but its image has (48, 64)'), ('semseg', unknown_class, '3072 pixels of value 99, but there are'),
          ('normals', not_unit, '3072 vectors are not of length 1'), ('depth', cut, 'not a whole array'),
          ('depth', with_value(np.nan), '3072 values are not finite'), ('depth', with_value(-1), '3072 depths are negative, the lowest -1 m')]

def stop_after_first_round(config, folder, monkeypatch):
    "A run with one finished round"
    def stop(run, r): raise KeyboardInterrupt
    with monkeypatch.context() as m:
        real = loop._round
        m.setattr(loop, '_round', lambda run, r: real(run, r) if r == 0 else stop(run, r))
        with pytest.raises(KeyboardInterrupt): run(config, folder, progress=False)

def test_broken_file(tmp_path, data, whole, monkeypatch):
    "Said with file and task; a run under way is unharmed, and goes on when the file is whole again"
    config, folder, new = replace(TINY, data=str(data)), tmp_path/'run', tmp_path/'new'
    stop_after_first_round(config, folder, monkeypatch)
    before = contents(folder)
    assert len(read_journal(folder)) == 1
    for n, (task, break_it, says) in enumerate(BROKEN):
        split = ('train', 'test')[n % 2]
        file = Store(data).file(Store(data).splits[split][3], task)
        good = file.read_bytes()
        break_it(file)
        for out in (folder, new):
            with pytest.raises(ValueError) as e: run(config, out, progress=False)
            assert f'{file} (' in str(e.value) and task in str(e.value) and says in str(e.value)
        assert contents(folder) == before and not new.exists()
        file.write_bytes(good)
    run(config, folder, progress=False)
    check_whole(folder, config)

def test_some_labels_do_not_exist(tmp_path, data):
    "They are never bought, also where all others are"
    lost = {(i, t) for t, ids in dict(depth=range(4), normals=range(2, 8)).items() for i in (Store(data).splits['train'][n] for n in ids)}
    for i, t in lost: Store(data).file(i, t).unlink()
    for strategy in STRATEGIES:
        config = replace(TINY, data=str(data), pool_images=0, start_images=2, step_pairs=10, strategy=strategy)
        run(config, tmp_path/strategy, progress=False)
        bought = [e[:2] for e in result(tmp_path/strategy)['events']]
        assert len(bought) == 26 == 3*12 - len(lost) and not lost & set(bought)

def test_nothing_to_measure_a_task_on(tmp_path, data):
    "Said before anything is trained; without that task all is well"
    for i in Store(data).splits['test']: Store(data).file(i, 'normals').unlink()
    config = replace(TINY, data=str(data), pool_images=0)
    with pytest.raises(ValueError, match=r"none of the \d+ images to measure on has a label of \['normals'\]"): run(config, tmp_path/'r', progress=False)
    assert not (tmp_path/'r').exists()
    assert run(replace(config, tasks=('semseg', 'depth'), rounds=0), tmp_path/'r', progress=False).exists()

def test_a_bought_label_is_gone(tmp_path, data, monkeypatch):
    config, folder = replace(TINY, data=str(data)), tmp_path/'run'
    stop_after_first_round(config, folder, monkeypatch)
    image, task, *_ = result(folder)['events'][0]
    Store(data).file(image, task).unlink()
    with pytest.raises(ValueError, match=f"1 labels that .*ledger.db paid for are gone, e.g. task '{task}' of image '{image}'"):
        run(config, folder, progress=False)

@pytest.mark.parametrize('changes,says', [
    (dict(rounds=4), 'the pool has 30 pairs, the run would buy 33 (3 images × 3 tasks, then 4 × 6): use fewer rounds'),
    (dict(start_images=11), 'start_images=11, but only 10 images'), (dict(start_images=10, rounds=1, step_pairs=1), 'the pool has 30 pairs'),
    (dict(val_images=10), 'none are left to train on'), (dict(tasks=('semseg', 'albedo')), "has no task ['albedo']; there are ['semseg'"),
    (dict(encoder='resnet_18'), "unknown encoder 'resnet_18'; expected 'lite0' or a timm name such as ["),
    (dict(encoder='vit_tiny_patch16_224'), 'stride'), (dict(strategy='greedy'), "unknown strategy 'greedy'; there are ['bald_pairs'"),
    (dict(device='gpu'), "unknown device 'gpu'"), (dict(data='nowhere'), 'nowhere is in no known layout, found nothing')])
def test_what_can_not_be_done_is_said_at_once(tmp_path, changes, says):
    with pytest.raises(ValueError) as e: run(replace(TINY, **changes), tmp_path/'run', progress=False)
    assert says in str(e.value) and not (tmp_path/'run').exists()

def test_nothing_to_compare_with(tmp_path, data):
    "All images that have a depth are labelled at the start"
    for i in Store(data).splits['train'][3:]: Store(data).file(i, 'depth').unlink()
    config = replace(TINY, data=str(data))
    with pytest.raises(ValueError, match=r"takes all labels of \['depth'\]"): run(config, tmp_path/'run', progress=False)
    assert not (tmp_path/'run').exists()
    run(replace(config, strategy='random_pairs'), tmp_path/'run', progress=False)

# No space

CURE = 'and run the same command again'

def full_at(n):
    "The n-th file to reach the disk does not"
    left, real = count(1 - n), os.fsync
    def fsync(fd):
        if next(left) == 0: raise OSError(ENOSPC, os.strerror(ENOSPC))
        real(fd)
    os.fsync = fsync

def files_up_to(n): resource.setrlimit(resource.RLIMIT_FSIZE, (n, n))

def test_disk_full_at_every_write(tmp_path, whole):
    folder, failed = tmp_path/'run', set()
    for n in chain([1], cycle([2, 3])):
        code, error = Child(TINY, folder, partial(often, partial(full_at, n))).end()
        if not error: break
        assert code == 0 and f'no space left to write {folder}/' in error and CURE in error
        failed.add(re.search(r'write (\S+) \(', error)[1].rsplit('/')[-1])
        assert not list(folder.glob('.*.part'))
    assert code == 0 and result(folder) == whole and len(failed) >= 10
    check_whole(folder)

def test_files_may_not_grow(tmp_path, whole):
    "The system itself refuses: the configuration, then the ledger, then a network"
    folder, failed = tmp_path/'run', []
    for limit in (1000, 5000, 20_000, 40_000, 100_000):
        code, error = Child(TINY, folder, partial(files_up_to, limit)).end()
        assert code == 0 and error.startswith('OSError') and CURE in error, error
        failed += re.findall(r'(config.json|ledger.db|[.]safetensors)', error)
    assert sorted(set(failed)) == ['.safetensors', 'config.json', 'ledger.db']
    assert Child(TINY, folder).end() == (0, '') and result(folder) == whole
    check_whole(folder)

# Who owns the folder

def stand_still():
    def wait(*args, **kw): time.sleep(60)
    loop.train = wait

def test_one_process_at_a_time(tmp_path, whole):
    "The second is refused; when the first is killed, its lock is gone with it"
    folder = tmp_path/'run'
    first = Child(TINY, folder, stand_still)
    while first.process.is_alive() and not (folder/'ledger.db').exists(): time.sleep(.01)
    with pytest.raises(ValueError, match='is in use by another process; wait for it, or choose another --out'): run(TINY, folder, progress=False)
    assert first.end(0)[0] == -signal.SIGKILL
    assert Child(TINY, folder).end() == (0, '') and result(folder) == whole

def test_the_folder_of_another_run(tmp_path, data, monkeypatch):
    folder = tmp_path/'run'
    stop_after_first_round(TINY, folder, monkeypatch)
    before = contents(folder)
    for changes, says in ((dict(seed=1), "it has {'seed': 0}: choose another --out"), (dict(data=str(data)), 'holds a run on')):
        with pytest.raises(ValueError) as e: run(replace(TINY, **changes), folder, progress=False)
        assert says in str(e.value) and contents(folder) == before

def test_labels_of_another_run_are_injected(tmp_path, monkeypatch):
    "Images that another run left labeled in part are told what is known of them while the rest is scored"
    seen, score_pool = [], loop.score_pool
    def watched(models, pool, pairs, known, *rest, **kw):
        seen.append((pairs, known))
        return score_pool(models, pool, pairs, known, *rest, **kw)
    monkeypatch.setattr(loop, 'score_pool', watched)
    run(replace(TINY, strategy='random_pairs', rounds=1), tmp_path/'first', progress=False)
    assert not seen
    run(replace(TINY, labels_from=str(tmp_path/'first'), rounds=1), tmp_path/'on', progress=False)
    had = Counter(pair.image for pair in read_labelled(tmp_path/'first/ledger.db'))
    (pairs, known), = seen
    assert sorted(known.sum(1)[known.any(1)]) == sorted(n for n in had.values() if n < 3) != [] and pairs[known.any(1)].all()
