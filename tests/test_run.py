"A run is interrupted before every write and at any moment, meets broken data, a full disk, a second process"
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

from partal_nb.core import write_json
from partal_nb.config import preset
from partal_nb.data.walks import prepare_rooms
from partal_nb.data.labels import png_bytes
from partal_nb.data.dataset import INDEX, Dataset
from partal_nb.training.own_size import evaluate_own_size
from partal_nb.training.hooks import Checkpoint, Hook, StopAt
from partal_nb.uncertainty.acquisition import SCORES
from partal_nb.select.strategy import STRATEGIES
from partal_nb.runs.checks import load_data, pair_acquisition, split_images
from partal_nb.runs.folder import RunFolder, is_finished
from partal_nb.runs.journal import read_journal
from partal_nb.runs.ledger import read_labeled
from partal_nb.runs.loop import run

ROOT = Path(__file__).parents[1]
TASKS = ('semseg', 'depth', 'normals')
TINY = preset('demo', pool_images=10, test_images=4, height=48, width=64, features=8, encoder='test_efficientnet',
              pretrained=False, start_images=3, step_pairs=6, rounds=2, train_by='steps', train_for=4, passes=3,
              device='cpu')
FORK = multiprocessing.get_context('forkserver') # PyTorch is imported once, each child is a process of its own
FORK.set_forkserver_preload(['partal_nb.runs.loop'])

@pytest.fixture(scope='module', autouse=True)
def own_cache(tmp_path_factory):
    with pytest.MonkeyPatch.context() as m:
        m.setenv('PARTAL_CACHE', str(tmp_path_factory.mktemp('cache')))
        yield

def test_a_run_scores_at_the_photographs_own_size_on_request(tmp_path):
    config = replace(TINY, rounds=0, extra_metrics=('own_size',))
    data, *_ = load_data(config, progress=False)
    line, = read_journal(run(config, tmp_path/'run', progress=False))
    model = RunFolder(tmp_path/'run').load_model(0)
    images = split_images(config, data)[1]
    assert line['own_size'] == evaluate_own_size(model, data, images, config.height, config.width, progress=False)
    assert all(line['own_size'][t] != line['metrics'][t] for t in ('depth', 'normals')) # 96 × 128 and 48 × 64

def refuse_pickle(event, args):
    if event == 'pickle.find_class': raise RuntimeError(f'unpickled {args}')

def child(pipe, config, folder, before, hooks):
    torch.set_num_threads(1)
    sys.addaudithook(refuse_pickle)
    before()
    try: run(config, folder, progress=False, hooks=hooks)
    except Exception as e: pipe.send(f'{type(e).__name__}: {e}')

def nothing(): pass

class Child:
    "A run in a process of its own, after `before()` there"
    def __init__(self, config, folder, before=nothing, hooks=()):
        self.errors, pipe = FORK.Pipe(duplex=False)
        self.process = FORK.Process(target=child, args=(pipe, config, folder, before, hooks))
        self.process.start()
        pipe.close()

    def end(self, seconds=60)->tuple: # exit code, and the error that stopped it
        "Wait so many seconds, then SIGKILL"
        self.process.join(seconds)
        if self.process.is_alive(): self.process.kill()
        self.process.join()
        try: return self.process.exitcode, self.errors.recv()
        except EOFError: return self.process.exitcode, ''

def result(folder)->dict:
    "All of a run that has to be the same when it is made again"
    def keep(line): return {k: v for k, v in line.items() if k not in ('seconds', 'peak_memory_mb')}
    def digest(tensors):
        parts = [k.encode() + tensors[k].numpy().tobytes() for k in sorted(tensors)]
        return hashlib.sha256(b''.join(parts)).hexdigest()
    db = sqlite3.connect(folder/'ledger.db')
    events = db.execute('SELECT image, task, round, cost, source FROM events ORDER BY rowid').fetchall()
    db.close()
    return dict(journal=[keep(line) for line in read_journal(folder)], events=events,
                scores={p.name: pd.read_parquet(p).to_dict('list') for p in folder.glob('scores-*.parquet')},
                weights={p.name: digest(load_file(p)) for p in folder.glob('*.safetensors')})

def contents(folder): return {p.name: p.read_bytes() for p in folder.iterdir() if p.name != '.lock'}

def documented()->list[str]:
    "The files of a run folder, from the table in its notebook"
    cells = json.loads((ROOT/'nbs/60a_runs.paths.ipynb').read_text('utf-8'))['cells']
    text = next(t for c in cells if '| file | what it holds |' in (t := ''.join(c['source'])))
    return re.findall(r'^\| `(.+?)` \|', text, re.M)

def check_whole(folder, config=TINY, scored=True):
    "Finished, and with exactly the documented files"
    assert is_finished(config, folder)
    expected = set()
    for name in documented():
        last = config.rounds + 1 if 'scores' not in name else config.rounds if scored else 0
        if name in ('round-<round>.json', 'round-<round>.part'): continue
        expected |= {name.replace('<round>', str(r)) for r in range(last)}
    assert len(expected) > 5 and {p.name for p in folder.iterdir()} - {'.lock'} == expected

@pytest.fixture(scope='module')
def whole(tmp_path_factory, own_cache):
    "The result of a run that nothing happened to"
    folder = tmp_path_factory.mktemp('whole')/'run'
    assert Child(TINY, folder).end() == (0, '')
    check_whole(folder)
    return result(folder)

# Killed

class Often(Hook):
    "A checkpoint after each step of the training"
    def start(self, trainer):
        for hook in trainer.hooks:
            if isinstance(hook, Checkpoint): hook.save_every = -1

def die_at(n):
    "SIGKILL right before the n-th rename, commit of the ledger, or removal of a round's own file"
    left = count(1 - n)
    def moment():
        if next(left) == 0: os.kill(os.getpid(), signal.SIGKILL)
    def removes_round(event, args):
        return event == 'os.remove' and Path(args[0]).name.startswith('round-') and Path(args[0]).exists()
    opened = [] # connections that are not watched yet: while the event comes, one is only half made
    def watch(event, args):
        if event == 'sqlite3.connect/handle': return opened.append(args[0])
        while opened: opened.pop().set_trace_callback(lambda sql: moment() if sql == 'COMMIT' else None)
        if event == 'os.rename' or removes_round(event, args): moment()
    sys.addaudithook(watch)

def written(folder):
    return {name: data for name, data in contents(folder).items() if name[0] != '.' and name[:6] != 'ledger'}

def test_killed_before_every_write(tmp_path, whole):
    "Each process gets one write further than the last, and leaves the one it was hit in as `.NAME.PID.part`"
    folder, hit, n, before = tmp_path/'run', [], 1, {}
    while True:
        code, error = Child(TINY, folder, partial(die_at, n), [Often()]).end()
        if code == 0: break
        assert (code, error) == (-signal.SIGKILL, '') and len(hit) < 99
        hit.append(''.join(p.name[1:].rsplit('.', 2)[0] for p in folder.glob('.*.part')))
        n, before = (n + 1 if written(folder) == before else 2), written(folder)
    assert error == '' and result(folder) == whole
    check_whole(folder)
    assert len(hit) >= 30
    assert set(hit) >= {'', 'config.json', 'journal.jsonl', 'scores-0.parquet', 'scores-1.parquet'} # '': between writes
    assert set(hit) >= {f'round-{r}.{step}' for r in range(3) for step in ('part', 'safetensors', 'json')}

def test_killed_at_any_moment(tmp_path):
    "From outside, after longer and longer; other settings, with a random strategy and warm starts"
    config = replace(TINY, strategy='random_pairs', warm_start=True, dropout_at='all')
    assert Child(config, tmp_path/'whole').end() == (0, '')
    folder, states = tmp_path/'run', []
    for n in count(1):
        code, error = Child(config, folder).end(.06*n)
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
        config = replace(TINY, strategy=strategy, pool_images=12, val_images=2, dropout_at='all', train_by='epochs',
                         train_for=3, warm_start=True)
        run(config, tmp_path/strategy, progress=False)
        check_whole(tmp_path/strategy, config, bool(pair_acquisition(config).needs))
        found = result(tmp_path/strategy)
        events[strategy] = found['events']
        assert [line['cost'] for line in found['journal']] == [9, 15, 21]
        assert [sum(line['bought'].values()) for line in found['journal']] == [6, 6, 0]
        for r, line in enumerate(found['journal']):
            assert line['labels'] == {t: sum(e[1] == t and e[2] <= r for e in found['events']) for t in TASKS}
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

BROKEN = [('rgb', cut, 'not a whole image'), ('semseg', cut, 'not a whole image'),
          ('semseg', emptied, 'not a whole image'), ('semseg', smaller, '(24, 32) pixels, but its image has (48, 64)'),
          ('semseg', unknown_class, '3072 pixels of value 99, but there are'),
          ('normals', not_unit, '3072 vectors are not of length 1'), ('depth', cut, 'not a whole array'),
          ('depth', with_value(np.nan), '3072 values are not finite'),
          ('depth', with_value(-1), '3072 depths are negative, the lowest -1 m')]

class StopInRound(Hook):
    "Interrupt the training of a round before its first step"
    def __init__(self, r): self.r = r
    def start(self, trainer):
        if trainer.r == self.r: raise KeyboardInterrupt

def stop_after_first_round(config, folder):
    "A run with one finished round"
    with pytest.raises(KeyboardInterrupt): run(config, folder, progress=False, hooks=[StopInRound(1)])

def test_interrupted_in_the_middle_of_a_training(tmp_path, whole):
    "At step 2 of every round, first without, then with a checkpoint of the steps before"
    folder = tmp_path/'run'
    for r in range(3):
        for hooks in ([StopAt(2)], [Often(), StopAt(2)], [StopAt(3)]):
            with pytest.raises(KeyboardInterrupt): run(TINY, folder, progress=False, hooks=hooks)
        assert len(read_journal(folder)) == r and (folder/f'round-{r}.part').is_file()
        if r == 2: break
        with pytest.raises(KeyboardInterrupt): run(TINY, folder, progress=False, hooks=[StopInRound(r + 1)])
    run(TINY, folder, progress=False)
    assert result(folder) == whole

def test_broken_file(tmp_path, data, whole):
    "Reported with file and task; a run under way is unharmed, and resumes when the file is whole again"
    config, folder, new = replace(TINY, data=str(data)), tmp_path/'run', tmp_path/'new'
    stop_after_first_round(config, folder)
    before = contents(folder)
    assert len(read_journal(folder)) == 1
    for n, (task, break_it, message) in enumerate(BROKEN):
        split = ('train', 'test')[n % 2]
        file = Dataset(data).file(Dataset(data).splits[split][3], task)
        good = file.read_bytes()
        break_it(file)
        for out in (folder, new):
            with pytest.raises(ValueError) as e: run(config, out, progress=False)
            assert f'{file} (' in str(e.value) and task in str(e.value) and message in str(e.value)
        assert contents(folder) == before and not new.exists()
        file.write_bytes(good)
    run(config, folder, progress=False)
    check_whole(folder, config)

def test_some_labels_do_not_exist(tmp_path, data):
    "They are never bought, also where all others are"
    train = Dataset(data).splits['train']
    lost = {(train[n], t) for t, ids in dict(depth=range(4), normals=range(2, 8)).items() for n in ids}
    for i, t in lost: Dataset(data).file(i, t).unlink()
    kinds = {(f.choices.pick, f.choices.unit, f.choices.shares): name for name, f in STRATEGIES.items()}
    for strategy in kinds.values(): # the score is no matter here
        config = replace(TINY, data=str(data), pool_images=0, start_images=2, step_pairs=10, strategy=strategy)
        run(config, tmp_path/strategy, progress=False)
        bought = [e[:2] for e in result(tmp_path/strategy)['events']]
        assert len(bought) == 26 == 3*12 - len(lost) and not lost & set(bought)

def test_nothing_to_measure_a_task_on(tmp_path, data):
    "Said before anything is trained; without that task all is well"
    for i in Dataset(data).splits['test']: Dataset(data).file(i, 'normals').unlink()
    config = replace(TINY, data=str(data), pool_images=0)
    message = r"none of the \d+ images to measure on has a label of \['normals'\]"
    with pytest.raises(ValueError, match=message): run(config, tmp_path/'r', progress=False)
    assert not (tmp_path/'r').exists()
    assert run(replace(config, tasks=('semseg', 'depth'), rounds=0), tmp_path/'r', progress=False).exists()

def test_a_bought_label_is_gone(tmp_path, data):
    config, folder = replace(TINY, data=str(data)), tmp_path/'run'
    stop_after_first_round(config, folder)
    image, task, *_ = result(folder)['events'][0]
    Dataset(data).file(image, task).unlink()
    message = f"1 labels that .*ledger.db paid for are gone, e.g. task '{task}' of image '{image}'"
    with pytest.raises(ValueError, match=message): run(config, folder, progress=False)

@pytest.mark.parametrize('changes,message', [
    (dict(rounds=4), 'the pool has 30 pairs, the run would buy 33 (3 images × 3 tasks, then 4 × 6): use fewer'),
    (dict(start_images=11), 'start_images=11, but only 10 images'),
    (dict(start_images=10, rounds=1, step_pairs=1), 'the pool has 30 pairs'),
    (dict(val_images=10), 'none are left to train on'),
    (dict(tasks=('semseg', 'albedo')), "has no task ['albedo']; there are ['semseg'"),
    (dict(encoder='resnet_18'), "unknown encoder 'resnet_18'; expected 'lite0' or a timm name such as ["),
    (dict(encoder='vit_tiny_patch16_224'), 'stride'),
    (dict(strategy='greedy'), "unknown strategy 'greedy'; there are ['bald_pairs'"),
    (dict(device='gpu'), "unknown device 'gpu'"),
    (dict(data='nowhere'), 'nowhere is in no known layout, found nothing')])
def test_what_can_not_be_done_is_reported_at_once(tmp_path, changes, message):
    with pytest.raises(ValueError) as e: run(replace(TINY, **changes), tmp_path/'run', progress=False)
    assert message in str(e.value) and not (tmp_path/'run').exists()

def test_nothing_to_compare_with(tmp_path, data):
    "All images that have a depth are labeled at the start"
    for i in Dataset(data).splits['train'][3:]: Dataset(data).file(i, 'depth').unlink()
    config = replace(TINY, data=str(data))
    message = r"takes all labels of \['depth'\]"
    with pytest.raises(ValueError, match=message): run(config, tmp_path/'run', progress=False)
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
        code, error = Child(TINY, folder, partial(full_at, n), [Often()]).end()
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

class StandStill(Hook):
    def start(self, trainer): time.sleep(60)

def test_one_process_at_a_time(tmp_path, whole):
    "The second is refused; when the first is killed, its lock is gone with it"
    folder = tmp_path/'run'
    first = Child(TINY, folder, hooks=[StandStill()])
    while first.process.is_alive() and not (folder/'ledger.db').exists(): time.sleep(.01)
    message = 'is in use by another process; wait for it, or choose another folder'
    with pytest.raises(ValueError, match=message): run(TINY, folder, progress=False)
    assert first.end(0)[0] == -signal.SIGKILL
    assert Child(TINY, folder).end() == (0, '') and result(folder) == whole

def test_the_folder_of_another_run(tmp_path, data):
    folder = tmp_path/'run'
    stop_after_first_round(TINY, folder)
    before = contents(folder)
    for changes, message in ((dict(seed=1), "it has {'seed': 0}: choose another --out"),
                             (dict(data=str(data)), 'holds a run on')):
        with pytest.raises(ValueError) as e: run(replace(TINY, **changes), folder, progress=False)
        assert message in str(e.value) and contents(folder) == before

def test_labels_of_another_run_are_injected(tmp_path, monkeypatch):
    "Images that another run left partly labeled have these labels injected while their other pairs are scored"
    seen = []
    entropy = SCORES['entropy']
    def watched(models, arrays, pool, T, seed):
        seen.append((pool.open, pool.inject))
        return entropy(models, arrays, pool, T, seed)
    watched.finite = entropy.finite
    monkeypatch.setitem(SCORES, 'entropy', watched)
    run(replace(TINY, strategy='random_pairs', rounds=1), tmp_path/'first', progress=False)
    assert not seen
    run(replace(TINY, labels_from=str(tmp_path/'first'), rounds=1), tmp_path/'on', progress=False)
    had = Counter(pair.image for pair in read_labeled(tmp_path/'first/ledger.db'))
    (pairs, inject), = seen
    images = inject.any(1)
    assert sorted(inject.sum(1)[images]) == sorted(n for n in had.values() if n < 3) != [] and pairs[images].all()
