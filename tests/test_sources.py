"Real NYUv2 frames through store and cache, and what a kill, a full disk and two processes at once do to them"
import errno
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from partal_nb.data import store as store_module
from partal_nb.data.sources import NYU40, detect, normals_from_depth, nyuv2_folder, open_data, prepare_rooms
from partal_nb.data.store import Store, load_arrays, verify

FOLDERS = dict(rgb='.webp', seg40='.png', depth='.png', normals='.png')
TASKS = ['semseg', 'depth', 'normals']

@pytest.fixture(autouse=True)
def own_cache(tmp_path, monkeypatch): monkeypatch.setenv('PARTAL_CACHE', str(tmp_path/'cache'))

@pytest.fixture(scope='session')
def nyu(shared)->Path: return shared/'nyuv2_192x144'

def copy_some(nyu, path, n=4):
    for split in ('train', 'test'):
        ids = (nyu/f'{split}.txt').read_text().split()[::150][:n]
        path.mkdir(exist_ok=True)
        (path/f'{split}.txt').write_text('\n'.join(ids))
        for folder, suffix in FOLDERS.items():
            (path/folder).mkdir(exist_ok=True)
            for i in ids: shutil.copy(nyu/folder/(i + suffix), path/folder)
    shutil.copy(nyu/'classes.json', path)
    return path

@pytest.fixture
def some(nyu, tmp_path): return copy_some(nyu, tmp_path/'some')

def rooms(path, **kw): return prepare_rooms(path, **dict(dict(n_train=6, n_test=2, height=24, width=32, progress=False), **kw))

def test_the_sample_is_all_of_nyuv2(nyu):
    ids = {s: (nyu/f'{s}.txt').read_text().split() for s in ('train', 'test')}
    assert (len(ids['train']), len(ids['test'])) == (795, 654)
    assert sorted(ids['train'] + ids['test']) == [f'{i:04d}' for i in range(1, 1450)]
    for folder, suffix in FOLDERS.items(): assert {p.name for p in (nyu/folder).iterdir()} == {f'{i:04d}{suffix}' for i in range(1, 1450)}
    assert detect(nyu) == 'nyuv2_folder'

def test_values_of_real_frames(some, tmp_path):
    s = nyuv2_folder(some, tmp_path/'store', progress=False)
    assert {k: len(v) for k, v in s.splits.items()} == dict(train=4, test=4) and s.derived == ('normals',)
    assert len(s.tasks['semseg'].classes) == 40 and s.tasks['semseg'].classes[:23] == NYU40[:23]
    for i in s.splits['train'] + s.splits['test']:
        assert s.rgb(i).shape == (144, 192, 3) and s.rgb(i).std() > 10
        seg, depth, n = (s.label(i, t) for t in TASKS)
        raw = np.array(Image.open(some/f'seg40/{i}.png'))
        assert (seg[..., 0][raw > 0] == raw[raw > 0] - 1).all() and ((seg[..., 0] == 255) == (raw == 0)).all()
        assert .5 < depth.min() and depth.max() < 10
        assert np.allclose(np.linalg.norm(n, axis=2)[n.any(2)], 1, atol=1e-5) and n.any(2).mean() > .8
        assert n[..., 2].mean() > .2, 'normals look at the viewer'
    assert verify(s) == []

def test_partly_labelled(some, tmp_path):
    first = (some/'train.txt').read_text().split()[0]
    (some/f'depth/{first}.png').unlink()
    s = nyuv2_folder(some, tmp_path/'store', progress=False)
    arrays = load_arrays(s, s.splits['train'], TASKS, 72, 96, progress=False)
    assert not arrays.available[0, 1] and arrays.available.sum() == 4*3 - 1
    assert not arrays.labels['depth'][0].any() and arrays.labels['depth'][1].any()

def test_normals_from_depth_agree_with_those_of_the_sample(shared):
    medians = []
    for f in sorted((shared/'nyuv2_full_sample/depth').iterdir()):
        found = normals_from_depth(np.array(Image.open(f))/1000)
        stored = np.array(Image.open(f.parents[1]/'normals'/f.name))
        n = stored/127.5 - 1
        cosine = (found*n).sum(2)/np.linalg.norm(n, axis=2)
        medians.append(np.median(np.degrees(np.arccos(cosine[stored.any(2)].clip(-1, 1)))))
    assert len(medians) == 12 and max(medians) <= 6, medians

def test_cache_round_trip(some, tmp_path, monkeypatch):
    s = open_data(some, progress=False)
    native = load_arrays(s, s.splits['test'], TASKS, 144, 192, progress=False)
    for k, i in enumerate(native.images):
        assert (native.rgb[k] == s.rgb(i)).all()
        for t in TASKS: assert np.abs(native.labels[t][k] - s.label(i, t)).max() <= (1e-3 if t == 'normals' else 0)
    first = load_arrays(s, s.splits['train'], TASKS, 72, 96, progress=False)
    def never(*_): raise AssertionError('decoded again')
    monkeypatch.setattr(store_module, 'open_image', never)
    again = load_arrays(Store(s.path), s.splits['train'][1:3], TASKS, 72, 96, progress=False)
    assert (np.asarray(again.rgb) == first.rgb[1:3]).all() and (again.labels['normals'] == first.labels['normals'][1:3]).all()
    held_out = load_arrays(s, [s.splits['train'][k] for k in (3, 0)], TASKS, 72, 96, progress=False)
    assert (held_out.batch([0, 1])[0] == first.batch([3, 0])[0]).all()

def test_resized_labels_are_values_of_the_label(some):
    s = open_data(some, progress=False)
    arrays = load_arrays(s, s.splits['train'], TASKS, 50, 70, progress=False)
    for k, i in enumerate(arrays.images):
        for t in ('semseg', 'depth'): assert set(np.unique(arrays.labels[t][k])) <= set(np.unique(s.label(i, t)))
        length = np.linalg.norm(arrays.labels['normals'][k].astype(float), axis=2)
        assert ((length == 0) | (abs(length - 1) < 1e-3)).all()

CODE = '''
import sys
from partal_nb.data.sources import prepare_rooms
from partal_nb.data.store import load_arrays
s = prepare_rooms(sys.argv[1], int(sys.argv[2]), 1, 24, 32, progress=False)
a = load_arrays(s, s.splits['train'], list(s.tasks), 12, 16, progress=False)
print(s.fingerprint, int(a.rgb.sum()), sum(float(v.sum()) for v in a.labels.values()))
'''
def start(path, n): return subprocess.Popen([sys.executable, '-c', CODE, str(path), str(n)], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)

def test_killed_while_preparing_then_started_again(tmp_path):
    p = start(tmp_path/'killed', 200)
    end = time.time() + 120
    while len(list((tmp_path/'killed/rgb').glob('*.png'))) < 3 and p.poll() is None and time.time() < end: time.sleep(.01)
    p.send_signal(signal.SIGKILL)
    p.communicate()
    assert p.returncode == -signal.SIGKILL
    done = {f: f.stat().st_mtime_ns for f in (tmp_path/'killed/rgb').glob('[0-9]*.png')}
    assert 3 <= len(done) < 201
    with pytest.raises(FileNotFoundError, match='interrupted: run the same command again'): Store(tmp_path/'killed')
    resumed = rooms(tmp_path/'killed', n_train=200, n_test=1)
    assert all(f.stat().st_mtime_ns == t for f, t in done.items())
    assert resumed.fingerprint == rooms(tmp_path/'straight', n_train=200, n_test=1).fingerprint

def test_two_processes_at_once(tmp_path):
    both = [start(tmp_path/'shared', 12) for _ in range(2)]
    outs = [p.communicate(timeout=120) for p in both]
    assert [p.returncode for p in both] == [0, 0], outs
    assert outs[0][0] == outs[1][0]
    assert not [p for p in tmp_path.rglob('*.part')] and verify(Store(tmp_path/'shared')) == []

def test_a_full_disk_while_the_cache_is_made(tmp_path, monkeypatch):
    s = rooms(tmp_path/'rooms')
    def full(fd): raise OSError(errno.ENOSPC, 'No space left on device')
    with monkeypatch.context() as m:
        m.setattr(os, 'fsync', full)
        with pytest.raises(OSError, match='free some space or set PARTAL_CACHE to a larger disk'): load_arrays(s, s.splits['train'], ['depth'], 24, 32, progress=False)
    assert not [p for p in (tmp_path/'cache').rglob('*') if p.is_file()]
    assert load_arrays(s, s.splits['train'], ['depth'], 24, 32, progress=False).labels['depth'].any()

def test_a_broken_file_is_named(tmp_path):
    s = rooms(tmp_path/'rooms')
    f = s.file(s.splits['train'][2], 'depth')
    f.write_bytes(f.read_bytes()[:-40])
    with pytest.raises(ValueError, match=rf'{f.name} \(task depth\): not a whole image'): load_arrays(s, s.splits['train'], ['depth'], 24, 32, progress=False)
    assert verify(s) == ['depth']
