"A pool that is read from its tar shards, or by a table of paths: the same run as from a copy"
import io
import json
import tarfile
from dataclasses import replace
from functools import partial

import pandas as pd
import pytest
from typer.testing import CliRunner

from partal_nb.annotate.plan import open_images
from partal_nb.cli import app
from partal_nb.commands.sweeps import score_beside
from partal_nb.config import preset
from partal_nb.core import write_atomic
from partal_nb.data.dataset import Dataset
from partal_nb.data.labels import encode_label, png_bytes
from partal_nb.data.prepare import check
from partal_nb.data.rooms import ROOM_TASKS, render_room
from partal_nb.runs import loop
from partal_nb.runs import shards as run_shards
from partal_nb.runs.folder import RunFolder
from partal_nb.uncertainty import shards

TINY = preset('demo', pool_images=40, test_images=4, height=32, width=32, features=8, encoder='test_efficientnet',
              pretrained=False, start_images=3, step_pairs=6, rounds=1, train_by='steps', train_for=4, passes=2,
              device='cpu')
TASKS = [t for t in ROOM_TASKS.values() if t.name in ('semseg', 'depth', 'normals')]
ENTRIES = [dict(name=t.name, **(dict(classes=t.classes) if t.name == 'semseg' else {})) for t in TASKS]

def files(n):
    "What belongs to an image, larger than it is trained at"
    room = render_room(n, 36, 48)
    yield 'rgb', png_bytes(room['rgb'])
    for t in TASKS: yield t.name, encode_label(room[t.name], t)

@pytest.fixture(scope='module')
def source(tmp_path_factory):
    "The same images in shards, and all over a disk with a table"
    root = tmp_path_factory.mktemp('source')
    rows = []
    for shard, ids in dict(train0=range(20), train1=range(20, 40), test=range(40, 44)).items():
        (root/'tars').mkdir(exist_ok=True)
        with tarfile.open(root/f'tars/{shard}.tar', 'w') as tar:
            for n in ids:
                row = dict(id=f'{n:03}', split=shard.rstrip('01'))
                for name, data in files(n):
                    info = tarfile.TarInfo(f'{n:03}.{name}.png')
                    info.size = len(data)
                    tar.addfile(info, io.BytesIO(data))
                    row[name] = f'{n % 3}/{n}-{name}.png'
                    write_atomic(root/'disk'/row[name], data)
                rows.append(row)
    for folder in ('tars', 'disk'): (root/folder/'tasks.json').write_text(json.dumps(ENTRIES))
    pd.DataFrame(rows).to_parquet(root/'disk/pool.parquet')
    return root

@pytest.fixture(scope='module')
def copied(source, tmp_path_factory):
    root = tmp_path_factory.mktemp('copied')
    prepare(source/'tars', root/'data')
    return RunFolder(loop.run(replace(TINY, data=str(root/'data')), root/'run', progress=False))

def prepare(*args):
    found = CliRunner().invoke(app, ['prepare', *map(str, args)])
    assert found.exit_code == 0, found.output

def journal(folder):
    "Without what is measured in seconds and bytes"
    return [{k: v for k, v in line.items() if k not in ('seconds', 'peak_memory_mb')} for line in folder.journal()]

@pytest.mark.parametrize('which', ['tars', 'disk/pool.parquet'])
def test_the_same_run(source, copied, tmp_path, monkeypatch, which):
    "To the last digit; and no image is written anywhere"
    monkeypatch.setenv('PARTAL_CACHE', str(tmp_path/'cache'))
    prepare(source/which, tmp_path/'data', '--in-place')
    config = replace(TINY, data=str(tmp_path/'data'))
    there = RunFolder(loop.run(config, tmp_path/'run', progress=False))
    assert journal(there) == journal(copied)
    assert there.read_scores(0).equals(copied.read_scores(0))
    assert not list((tmp_path/'cache').rglob('*.npy')) and len(list((tmp_path/'data').iterdir())) <= 4
    assert check(tmp_path/'data', progress=False).faults == []

@pytest.mark.parametrize('size', [16, 32])
def test_the_same_scores_in_shards(source, copied, tmp_path, monkeypatch, size):
    "However the pool is cut, and whoever scores it"
    monkeypatch.setattr(run_shards, 'in_shards', partial(shards.in_shards, size=size))
    prepare(source/'tars', tmp_path/'data', '--in-place')
    write, written = shards.write_shard, []
    def write_one(path, *args):
        if written: raise KeyboardInterrupt
        written.append(write(path, *args))
    with monkeypatch.context() as m, pytest.raises(KeyboardInterrupt):
        m.setattr(shards, 'write_shard', write_one)
        loop.run(replace(TINY, data=str(tmp_path/'data')), tmp_path/'run', progress=False)
    folder = RunFolder(tmp_path/'run')
    assert score_beside(folder, .5) == 'scores'
    loop.run(folder.config, folder.path, progress=False)
    assert journal(folder) == journal(copied) and folder.read_scores(0).equals(copied.read_scores(0))

def test_a_changed_shard_stops_the_run(source, tmp_path):
    "At the image, with the shard's name; put back, the run goes on"
    prepare(source/'tars', tmp_path/'data', '--in-place')
    for f in (source/'tars').glob('*.tar'): write_atomic(tmp_path/'tars'/f.name, f.read_bytes())
    (tmp_path/'data/source.txt').write_text('../tars')
    file = Dataset(tmp_path/'data').file('041', 'depth')
    good = file.path.read_bytes()
    file.path.write_bytes(good[:file.offset] + b'x' + good[file.offset + 1:])
    faults = check(tmp_path/'data', progress=False).faults
    assert [(f.image, f.task) for f in faults] == [('041', 'depth')] and 'put the old one back' in faults[0].what
    config = replace(TINY, data=str(tmp_path/'data'))
    with pytest.raises(ValueError, match='test.tar: 041.depth.png: not the .* bytes that were prepared in place'):
        loop.run(config, tmp_path/'run', progress=False)
    file.path.write_bytes(good)
    assert RunFolder(loop.run(config, tmp_path/'run', progress=False)).journal()

def test_what_can_not_be_read_in_place(source, tmp_path):
    for args in (['--derive', 'edges', source/'tars'], [source/'disk']):
        found = CliRunner().invoke(app, ['prepare', '--in-place', *map(str, args), str(tmp_path/'data')])
        assert found.exit_code and 'prepare it without --in-place' in ' '.join(found.output.split())

def test_a_project_needs_files(source, tmp_path):
    prepare(source/'tars', tmp_path/'data', '--in-place')
    with pytest.raises(ValueError, match='prepare it without --in-place'): open_images(tmp_path/'data', ())
