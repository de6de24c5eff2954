"What may happen to a project: disks that can't do WAL or may not be written to, hostile files, SIGKILL at any moment"
import io
import json
import os
import random
import re
import shutil
import signal
import sqlite3
import struct
import subprocess
import sys
import tempfile
import time
import zipfile
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from typer.testing import CliRunner

from partal_nb.annotate.plan import TASKS_FILE, read_tasks
from partal_nb.annotate.project import init, open_project
from partal_nb.annotate.ask import ask, read_batch
from partal_nb.annotate.submission import Submission
from partal_nb.annotate.tell import clear_leftovers, correct, restore, tell
from partal_nb.annotate.images import add, relocate
from partal_nb.annotate.replay import PURCHASES
from partal_nb.annotate.status import log_lines, status
from partal_nb.cli import app
from partal_nb.core import write_atomic
from partal_nb.data.labels import encode_label, png_bytes
from partal_nb.data.rooms import ROOM_TASKS, render_room
from partal_nb.data.entries import ENTRY_KEYS
from partal_nb.runs.folder import load_run
from partal_nb.runs.ledger import Ledger, read_labeled, replay
from partal_nb.runs.loop import run
from partal_nb.tasks import Pair

H, W = 16, 24
ROOMS = {f'room{n}': render_room(n, H, W) for n in range(8)}
DEPTH = ROOM_TASKS['depth']
TINY = dict(height=32, width=48, pretrained=False, device='cpu')

@pytest.fixture(scope='module')
def out(tmp_path_factory):
    "A project without labels whose first batch of depth is out; nothing was trained"
    place = tmp_path_factory.mktemp('projects')
    for i, r in ROOMS.items(): write_atomic(place/f'photos/{i}.png', png_bytes(r['rgb']))
    p = init(place/'photos', place/'project', (DEPTH,), **TINY)
    ask(p.folder, budget=6, progress=False)
    return p

@pytest.fixture
def project(out, tmp_path):
    shutil.copytree(out.folder, tmp_path/'project')
    return open_project(tmp_path/'project')

def asked(p): return [q['image'] for q in read_batch(p, 1).queries]

def labels(folder, images):
    for i in images: write_atomic(folder/f'depth/labels/{i}.png', encode_label(ROOMS[i]['depth'], DEPTH))
    return folder

def counts(imported): return {k: len(v) for k, v in imported.took.items()}

# The file of tasks

PLAN = Path(__file__).parents[1]/'nbs/57_annotate.plan.ipynb'
HEAT = dict(name='heat', form='values', channels=1, loss='l1', metric='rmse')
OLD = {k: v for k, v in HEAT.items() if k != 'form'}
STATED = dict( # key of a task -> an entry that states it, and a value that is wrong
    name=(dict(name='depth'), 3), classes=(dict(name='semseg', classes=['wall', 'floor']), 'wall'),
    cost=(dict(name='depth', cost=2.5), '2'), free_with=(dict(name='normals', free_with='edges'), 'sensor'),
    format=(dict(name='depth', format='npy'), 3), weight=(dict(name='depth', weight=2), 0), form=(HEAT, 'value'),
    kind=(dict(OLD, kind='regression'), 3), channels=(HEAT, 0), loss=(HEAT, 'cross_entropy'), metric=(HEAT, 'miou'),
    unit=(dict(HEAT, unit='K'), 3), ignore=(dict(HEAT, ignore=-1), 'none'), cmap=(dict(HEAT, cmap='magma'), 'jett'),
    scale=(dict(name='depth', scale=.5), 0), offset=(dict(name='depth', offset=1), '1'),
    void=(dict(name='depth', void=[0, 'inf']), 'none'), inverse=(dict(name='depth', inverse=True), 1),
    first_class=(dict(name='semseg', classes=['wall', 'floor'], first_class=1), 2),
    yes=(dict(name='saliency', yes=255), 0), convention=(dict(name='normals', convention=['y_down']), 'up'))
OF_FILE = dict(unit=('CHF', ''), per_hour=(30, -1), open=(2.5, '2'), cap=(3, 1.5), tasks=([HEAT], 3))

def rows(): # of the notebook's table: keys, of what, what is taken where they are left out
    cells = json.loads(PLAN.read_text('utf-8'))['cells']
    text = next(''.join(c['source']) for c in cells if '| key | of what |' in ''.join(c['source']))
    split = [line.strip('| ').split(' | ') for line in text.splitlines() if line.startswith('| `')]
    return [(re.findall('`(.+?)`', keys), of, default) for keys, of, _, default in split]

def test_the_table_of_a_file_of_tasks_has_all_that_it_takes():
    of_file = {k: default for keys, of, default in rows() if of == 'the file' for k in keys}
    of_task = [k for keys, of, _ in rows() if of != 'the file' for k in keys]
    assert sorted(of_task) == sorted([*ENTRY_KEYS, 'kind']) == sorted(STATED)
    assert set(of_file) == set(TASKS_FILE) == set(OF_FILE)
    for k in set(TASKS_FILE) - {'tasks'}: assert of_file[k].strip('`').startswith(f'{TASKS_FILE[k]}'.removesuffix('.0'))

def read(path, content):
    (path/'tasks.json').write_text(json.dumps(content))
    return read_tasks(path/'tasks.json')

@pytest.mark.parametrize('key', STATED)
def test_a_key_of_a_task(key, tmp_path):
    entry, wrong = STATED[key]
    assert read(tmp_path, [dict(name='edges'), entry])['tasks'][1].name == entry['name']
    with pytest.raises(ValueError) as e: read(tmp_path, [dict(name='edges'), entry | {key: wrong}])
    assert all(text in str(e.value) for text in (str(tmp_path/'tasks.json'), key, repr(wrong))), e.value

@pytest.mark.parametrize('key', OF_FILE)
def test_a_key_of_the_file(key, tmp_path):
    good, wrong = OF_FILE[key]
    found = read(tmp_path, dict(tasks=[HEAT]) | {key: good})
    assert (found | vars(found['prices']))[key] == good or key == 'tasks'
    with pytest.raises(ValueError) as e: read(tmp_path, dict(tasks=[HEAT]) | {key: wrong})
    assert all(text in str(e.value) for text in (str(tmp_path/'tasks.json'), key)), e.value

# From a project to a run and back, by the commands

SHORT = [x for setting in ('encoder=test_efficientnet', 'features=8', 'train_by=steps', 'train_for=4', 'passes=3',
                           'device=cpu') for x in ('--set', setting)]

def called(*args):
    r = CliRunner().invoke(app, [str(a) for a in args])
    assert r.exit_code == 0, r.output
    return r.stdout

def without_notebook(configs, parameters, kernel): # the runs that `partal run` shows in one
    for out, config in configs.items(): run(config, out, progress=False)

def test_a_project_is_replayed_and_a_run_starts_a_project(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr('partal_nb.commands.runs._execute_run', without_notebook)
    for i, r in ROOMS.items():
        write_atomic(tmp_path/f'photos/{i}.png', png_bytes(r['rgb']))
        write_atomic(tmp_path/f'photos/depth/{i}.png', encode_label(r['depth'], DEPTH))
    (tmp_path/'tasks.toml').write_text('[[tasks]]\nname = "depth"\ncost = 2\n')
    size = '--set', 'height=32', '--set', 'width=48', '--set', 'pretrained=false'
    given = 'init', 'photos', '--tasks', 'tasks.toml', *size, *SHORT
    assert 'labels already: 8 depth' in called(*given, '--project', 'project')
    assert called('run', '--data', 'project', '--out', 'replay').splitlines()[-1] == 'replay'
    replayed = load_run('replay')
    swept = called('sweep', '--data', 'project', '--strategies', 'random', '--seeds', '0', '--out', 'study', '--print')
    assert f'--data {replayed.config.data} ' in swept
    assert replayed.config.encoder == 'test_efficientnet' and len(replayed.journal()) == 1 + PURCHASES
    bought = set(read_labeled(tmp_path/'replay/ledger.db'))
    assert 0 < len(bought) < 8 and {pair.task for pair in bought} == {'depth'}
    assert f'labels already: {len(bought)} depth' in called(*given, '--project', 'next', '--labels-from', 'replay')
    with open_project('next').ledger() as ledger: assert set(ledger.labels()) == bought
    (tmp_path/'photos/depth'/f'{next(iter(bought)).image}.png').unlink()
    r = CliRunner().invoke(app, [*given, '--project', 'other', '--labels-from', 'replay'])
    assert r.exit_code == 2 and 'labels that it bought' in r.stderr and not (tmp_path/'other').exists()

# Disks

class NoWal(sqlite3.Connection):
    "SQLite as on NFS: WAL needs shared memory, unless one process has the file for itself"
    def execute(self, sql, *args):
        run = super().execute
        alone = run('PRAGMA locking_mode').fetchone()[0] == 'exclusive'
        is_wal = open(run('PRAGMA database_list').fetchone()[2], 'rb').read(20)[18:19] == b'\2'
        wants = 'journal_mode=WAL' in sql or is_wal and not sql.startswith('PRAGMA')
        if wants and not alone: raise sqlite3.OperationalError('locking protocol')
        return run(sql, *args)

@pytest.mark.parametrize('before', ['new', 'wal'])
def test_a_disk_without_shared_memory(before, tmp_path, monkeypatch):
    "A new ledger, and one that was made elsewhere: a rollback journal, recorded, and nothing is lost"
    tasks, connect = (DEPTH,), sqlite3.connect
    if before == 'wal':
        with Ledger(tmp_path/'l.db', 'ab', tasks) as ledger: ledger.reveal([Pair('a', 'depth')], 0, 'start')
    monkeypatch.setattr(sqlite3, 'connect', lambda *a, **kw: connect(*a, factory=NoWal, **kw))
    for _ in range(2):
        with Ledger(tmp_path/'l.db', 'ab', tasks) as ledger:
            assert ledger.journal_mode == 'delete'
            ledger.reveal([Pair('b', 'depth')], 1, 'oracle')
            assert ledger.counts() == dict(depth=1 + (before == 'wal'))
    monkeypatch.undo()
    with Ledger(tmp_path/'l.db', 'ab', tasks) as ledger: assert ledger.journal_mode == 'delete' # it is in the file

def as_nobody(work): # its exit code; a child that may not write, even where this process is root
    pid = os.fork()
    if not pid:
        try:
            if os.getuid() == 0: os.setuid(65534)
            work()
            os._exit(0)
        except BaseException as e:
            print(repr(e), file=sys.stderr)
            os._exit(1)
    return os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])

def test_a_read_only_project_can_be_looked_at(project, tmp_path):
    "Status and log answer, nothing is written, and whoever wants to write is told"
    labels(tmp_path/'back', asked(project)[:2])
    assert counts(tell(project.folder, 1, tmp_path/'back')) == dict(told=2)
    shutil.rmtree(project.folder/'cache', ignore_errors=True)
    for f in [project.folder, *project.folder.rglob('*')]: f.chmod(0o555 if f.is_dir() else 0o444)
    for parent in (*project.folder.parents, *Path(project.data).parents): # pytest's own are for their owner alone
        if Path(tempfile.gettempdir()) in parent.parents: parent.chmod(0o755)
    before = sorted(project.folder.rglob('*'))
    def look():
        s = status(project.folder)
        assert s.tasks.returned['depth'] == 2 and any('read-only' in n for n in s.notes), s.notes
        assert len(log_lines(project.folder)) == 6 + 2
        with pytest.raises(PermissionError, match='it can be looked at, but not written'):
            correct(project.folder, asked(project)[0], 'depth', price=2.)
        with pytest.raises(PermissionError, match='it can be looked at, but not written'):
            tell(project.folder, 1, tmp_path/'back')
        with pytest.raises(PermissionError, match='it can be looked at, but not written'):
            ask(project.folder, budget=2, progress=False)
    assert as_nobody(look) == 0
    assert sorted(project.folder.rglob('*')) == before
    for f in [project.folder, *project.folder.rglob('*')]: f.chmod(0o755 if f.is_dir() else 0o644)

# Files

def lying_zip(name, real, said):
    "A zip whose file is larger than it says, before the file and in the list at the end"
    with zipfile.ZipFile(f := io.BytesIO(), 'w', zipfile.ZIP_DEFLATED) as z: z.writestr(name, bytes(real))
    return f.getvalue().replace(struct.pack('<I', real), struct.pack('<I', said))

def structured(shape):
    np.save(f := io.BytesIO(), np.zeros(shape, [('a', 'f4'), ('b', 'f4')]))
    return f.getvalue()

def huge_header():
    np.save(f := io.BytesIO(), np.zeros((1, 1), np.float32))
    return f.getvalue().replace(b'(1, 1), }  ', b'(99999999999, 99999999999), }')

PIPE, TORN = 'pipe.png (rgb): expected a file, got a pipe', 'torn.jpg (rgb): not a whole image'

def awkward(folder): # photographs as a card and a phone leave them
    Image.fromarray(next(iter(ROOMS.values()))['rgb']).save(f := io.BytesIO(), 'jpeg')
    write_atomic(folder/'whole.jpg', f.getvalue())
    write_atomic(folder/'torn.jpg', f.getvalue()[:len(f.getvalue())//2])
    write_atomic(folder/'phone.heic', b'')
    os.mkfifo(folder/'pipe.png')

def test_images_that_are_none(project, tmp_path):
    "A pipe, half of a photograph, a suffix that isn't read: `init` refuses and names them, `add` takes the rest"
    awkward(tmp_path/'card')
    said = []
    with pytest.raises(ValueError, match='2 files can.t be used') as refused:
        init(tmp_path/'card', tmp_path/'new', (DEPTH,), say=said.append, pretrained=False)
    assert PIPE in str(refused.value) and TORN in str(refused.value) and not (tmp_path/'new').exists()
    assert said == ['left out: 1 files of ./, e.g. phone.heic']
    relocate(project.folder, shutil.copytree(project.data, tmp_path/'photos')) # those of the other tests stay
    found = add(project.folder, [tmp_path/'card'])
    assert found.images == ('whole',) and len(found.problems) == 3, found.problems
    for why, text in zip(found.problems, ('1 file not taken, e.g. phone.heic', PIPE, TORN)): assert text in why

def test_one_bad_file_costs_one_file(project, tmp_path):
    "A pipe, a link to itself, a structured array, an array of 10^22 numbers, nothing at all: each by its name"
    good, *bad = asked(project)
    back = labels(tmp_path/'back', [good])
    place = back/'depth/labels'
    os.mkfifo(place/f'{bad[0]}.png')
    (place/f'{bad[1]}.png').symlink_to(f'{bad[1]}.png')
    write_atomic(place/f'{bad[2]}.npy', structured((H, W)))
    write_atomic(place/f'{bad[3]}.npy', huge_header())
    write_atomic(place/f'{bad[4]}.npy', b'')
    imported = tell(project.folder, 1, back)
    assert counts(imported) == dict(told=1) and len(imported.refused) == 5, imported.refused
    for i in bad: assert sum(f'{i}.' in why for _, why in imported.refused) == 1, (i, imported.refused)

def test_a_zip_that_lies(project, tmp_path):
    "500 MB behind a size of 99 bytes: no more than that is unpacked"
    import resource
    good, bad = asked(project)[:2]
    write_atomic(tmp_path/'lie.zip', lying_zip(f'depth/labels/{bad}.png', 500_000_000, 99))
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    imported = tell(project.folder, 1, tmp_path/'lie.zip')
    assert not imported.took and imported.failed and bad in imported.refused[0][1]
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 100_000 # kB

def test_twice_in_a_zip_and_a_zip_in_a_zip(project, tmp_path):
    "A name that is there twice is refused, what nobody used is listed, and an import that used nothing has failed"
    first, second = asked(project)[:2]
    data = encode_label(ROOMS[first]['depth'], DEPTH)
    with zipfile.ZipFile(tmp_path/'b.zip', 'w') as z:
        z.writestr(f'depth/labels/{first}.png', data)
        with pytest.warns(UserWarning): z.writestr(f'depth/labels/{first}.png', data)
        z.writestr(f'depth/labels/{second}.png', encode_label(ROOMS[second]['depth'], DEPTH))
        z.writestr('other.json', '[]')
    imported = tell(project.folder, 1, tmp_path/'b.zip', file_format='png')
    assert counts(imported) == dict(told=1) and 'is in it 2 times; leave one' in imported.refused[0][1]
    assert imported.unused == ['other.json']

def test_a_hundred_thousand_names(tmp_path):
    "Names of strangers cost time in proportion, and a screen stays a screen"
    with zipfile.ZipFile(tmp_path/'many.zip', 'w') as z:
        for n in range(20_000): z.writestr(f'depth/labels/stranger{n}.png', b'')
    assert len(Submission(tmp_path/'many.zip').names) == 20_000

def test_a_form_that_can_not_be_read_keeps_its_labels_waiting(project, tmp_path):
    back = labels(tmp_path/'back', asked(project))
    write_atomic(back/'depth/answers.csv', b'picture,minutes\nroom0,3\n')
    imported = tell(project.folder, 1, back)
    assert not imported.took and 'Its 6 labels wait for it' in imported.refused[0][1]
    write_atomic(back/'depth/answers.csv', 'image\tminutes\nroom0\t3,5\n'.encode('utf-16'))
    assert counts(tell(project.folder, 1, back)) == dict(told=6)

def test_leftovers_are_cleared_by_the_next_import(project, tmp_path, monkeypatch):
    "Of the project's own file, of a batch and of a label; what somebody may be writing right now stays"
    with monkeypatch.context() as m:
        m.setattr(os, 'replace', lambda *names: (_ for _ in ()).throw(KeyboardInterrupt))
        with pytest.raises(KeyboardInterrupt): project.save()
    torn, = project.folder.glob('.project.json.*.part')
    write_atomic(project.folder/'batches/.002.part/depth/README.txt', b'torn')
    write_atomic(project.folder/'labels/depth/.room0-1.png.host-1.part', b'torn')
    left = [torn, project.folder/'batches/.002.part', project.folder/'labels/depth/.room0-1.png.host-1.part']
    for f in left: os.utime(f, (0, 0))
    now = project.folder/'.files.json.host-2.part'
    write_atomic(now, b'half')
    assert status(project.folder).batches == 1 and not ask(project.folder, budget=6, progress=False).new
    tell(project.folder, 1, labels(tmp_path/'back', asked(project)[:1]))
    assert now.is_file() and not any(f.exists() for f in left)
    assert not status(project.folder).notes

def test_told_again_with_other_minutes(project, tmp_path):
    "Minutes that come later are taken, and an old form does not bring back what was corrected"
    image = asked(project)[0]
    back = labels(tmp_path/'back', [image])
    def told(minutes):
        write_atomic(back/'depth/answers.csv', f'image,minutes\n{image},{minutes}\n'.encode())
        return counts(tell(project.folder, 1, back))
    assert [told(''), told(14), told(14), told(12), told(14)] == [
        dict(told=1), dict(amended=1), dict(same=1), dict(amended=1), dict(same=1)]
    with project.ledger() as ledger:
        assert ledger.events().minutes.dropna().tolist() == [12.]
        assert replay(ledger.events()) == ledger.state()

# SIGKILL

KILLS = int(os.environ.get('PARTAL_KILLS', 20)) # 1000 take some ten minutes

def started(work): # process id, file to read what it writes; a child that has everything imported already
    r, w = os.pipe()
    pid = os.fork()
    if pid: return os.close(w) or (pid, open(r, 'rb'))
    try:
        os.close(r)
        work(lambda: os.write(w, b'.'))
    finally: os._exit(0)

def acknowledged(project, parts, seconds): # parts; a child imports one after another and is killed meanwhile
    def work(done):
        for part in parts:
            tell(project.folder, 1, part)
            done()
    pid, pipe = started(work)
    time.sleep(seconds)
    os.kill(pid, signal.SIGKILL)
    os.waitpid(pid, 0)
    with pipe: return len(pipe.read())

def test_imports_that_are_interrupted_lose_nothing(project, tmp_path):
    "SIGKILL at a random moment, again and again; what was acknowledged is there, files and backups are whole"
    rng = random.Random(int(os.environ.get('PARTAL_SEED', 0)))
    parts = [labels(tmp_path/f'back{n}', [i]) for n, i in enumerate(asked(project))]
    empty, moments = tmp_path/'empty', []
    shutil.copytree(project.folder, empty)
    began = time.monotonic()
    for part in parts: tell(project.folder, 1, part)
    whole = time.monotonic() - began
    for _ in range(KILLS):
        shutil.rmtree(project.folder)
        shutil.copytree(empty, project.folder)
        done = acknowledged(project, parts, whole*rng.random())
        moments.append(done)
        if rng.random() < .3: # the disk goes, too
            for f in project.folder.glob('ledger.db*'): f.unlink()
            restore(project.folder)
        with project.ledger() as ledger:
            kept = ledger.labels()
            assert done <= len(kept) <= done + 1 and replay(ledger.events()) == ledger.state()
            for pair, sha256 in kept.items(): assert project.label_file(*pair, sha256).is_file()
        for part in parts: tell(project.folder, 1, part)
        with project.ledger() as ledger:
            assert len(ledger.labels()) == len(parts)
            clear_leftovers(project, ledger, -1)
        assert not [f for f in project.folder.rglob('.*.part')]
    assert len(set(moments)) > 3, f'killed in the middle of too few imports: {moments}'

# A folder that lives

def test_frames_of_a_video(project, tmp_path):
    "A walk of three seconds: a frame a second joins the pool, under its time"
    av = pytest.importorskip('av')
    with av.open(str(tmp_path/'walk.mp4'), 'w') as video:
        stream = video.add_stream('mpeg4', rate=10)
        stream.width, stream.height, stream.pix_fmt = 48, 32, 'yuv420p'
        for n in range(30):
            gray = np.full((32, 48, 3), 8*n, np.uint8)
            for packet in stream.encode(av.VideoFrame.from_ndarray(gray, format='rgb24')): video.mux(packet)
        for packet in stream.encode(): video.mux(packet)
    shutil.copytree(project.data, tmp_path/'photos')
    replace(project, data=str(tmp_path/'photos')).save()
    added = add(project.folder, [tmp_path/'walk.mp4'])
    assert added.images == ('walk-00000000', 'walk-00001000', 'walk-00002000') and not added.problems
    write_atomic(tmp_path/'torn.mp4', b'torn')
    with pytest.raises(ValueError, match='not a whole video'): add(project.folder, [tmp_path/'torn.mp4'])
