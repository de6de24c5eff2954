"The practitioner's loop: bad answers, interruptions at every write, two at once, prices, cool-downs"
import json
import multiprocessing
import os
import shutil
import signal
import subprocess
import sys
import zipfile
from itertools import count
from pathlib import Path

import numpy as np
import pytest
from typer.testing import CliRunner

from partal_nb.annotate.query import Query
from partal_nb.annotate.submission import to_npy
from partal_nb.annotate.label_studio import label_studio_task
from partal_nb.annotate.project import init, open_project
from partal_nb.annotate.ask import ask, load_labels, read_batch
from partal_nb.annotate.images import add, remove
from partal_nb.annotate.replay import as_dataset
from partal_nb.annotate.tell import tell
from partal_nb.annotate.status import curve, status
from partal_nb.cli import app
from partal_nb.core import write_atomic
from partal_nb.tasks import Pair
from partal_nb.runs.ledger import Ledger, replay
from partal_nb.data.rooms import ROOM_TASKS, render_room
from partal_nb.data.walks import prepare_rooms
from partal_nb.data.labels import encode_label, png_bytes

H, W = 32, 48
TRUTH = {f'room{n:02}': render_room(n, H, W) for n in range(16)}
TASKS = ROOM_TASKS['semseg'], ROOM_TASKS['depth'], ROOM_TASKS['normals']
TINY = dict(height=32, width=48, features=8, encoder='test_efficientnet', pretrained=False, train_by='steps',
            train_for=6, passes=3, device='cpu')
FILE = """
unit = "CHF"
per_hour = 60
tasks = [{{name = "semseg", classes = {classes}, cost = 6}},
         {{name = "depth", cost = 1}},
         {{name = "normals", cost = 2{free}}}]
"""

def called(*args): return CliRunner().invoke(app, [str(a) for a in args])

def photos(folder, labeled=6):
    "Sixteen rooms; the first few have all labels"
    for n, (i, r) in enumerate(TRUTH.items()):
        write_atomic(folder/f'{i}.png', png_bytes(r['rgb']))
        for t in TASKS if n < labeled else (): write_atomic(folder/f'{t.name}/{i}.png', encode_label(r[t.name], t))
    return folder

def tasks_file(folder, free=''):
    path = folder/'tasks.toml'
    path.write_text(FILE.format(classes=json.dumps(TASKS[0].classes), free=free))
    return path

def task_of(name): return next(t for t in TASKS if t.name == name)

def answer(folder, queries, label=lambda i, t: TRUTH[i][t], **form):
    "Put the labels of `queries` where an annotator would"
    for q in queries:
        image, name = q['image'], q['task']
        data = encode_label(label(image, name), task_of(name))
        write_atomic(Path(folder)/f"{name}/labels/{image}.png", data)
    return folder

def took(imported): return {k: len(v) for k, v in imported.took.items()} # how many of each outcome

def events(p):
    with p.ledger() as ledger: return ledger.events()

def files(folder): return {str(f.relative_to(folder)) for f in Path(folder).rglob('*') if f.is_file()}

@pytest.fixture(scope='session')
def asked(tmp_path_factory):
    "A project whose second batch is out: ten pairs of a trained network"
    place = tmp_path_factory.mktemp('asked')
    p = init(photos(place/'photos'), place/'project', tasks_file(place), val_share=.3, **TINY)
    batch = ask(p.folder, budget=10, progress=False)
    assert batch.queries[0]['why'].startswith('herd_equal')
    return p

@pytest.fixture
def project(asked, tmp_path):
    "A copy of it"
    shutil.copytree(asked.folder, tmp_path/'project')
    return open_project(tmp_path/'project')

def parts(p, number=1): # batch, its queries by task
    batch = read_batch(p, number)
    return batch, {t.name: [q for q in batch.queries if q['task'] == t.name] for t in TASKS}

# Out

def test_an_image_is_opened_and_paid_for_once(tmp_path):
    path = tasks_file(tmp_path)
    path.write_text('open = 5\n' + path.read_text())
    p = init(photos(tmp_path/'photos', labeled=0), tmp_path/'project', path, **TINY)
    queries = ask(p.folder, budget=20, progress=False).queries
    price = {Pair(q['image'], q['task']): q['price'] - q['opening'] for q in queries}
    opener = next(q for q in queries if q['opening'] and sum(o['image'] == q['image'] for o in queries) > 1)
    later = [q for q in queries if q is not opener] # the label that was to pay for opening its image comes last
    for k, some in enumerate((later, [opener])): tell(p.folder, 1, answer(tmp_path/str(k), some))
    told = events(p).query("kind == 'told'")
    assert told.cost.sum() == sum(price.values()) + 5*len({pair.image for pair in price})
    pair = Pair(opener['image'], opener['task'])
    tell(p.folder, 1, answer(tmp_path/'better', [opener], lambda i, t: next(r[t] for j, r in TRUTH.items() if j != i)))
    assert events(p).query("kind == 'corrected'").cost.tolist() == [price[pair]]

def test_a_batch(asked):
    "Images at their own size, guesses in the task's format, pictures of where to look; CSV and JSON say the same"
    batch, by_task = parts(asked)
    assert len(batch.queries) == 10 and [q['rank'] for q in batch.queries] == list(range(1, 11))
    head, *rows = (batch.folder/'queries.csv').read_text().splitlines()
    assert head == 'image,task,score,rank,price,why' and len(rows) == 10
    for task, queries in by_task.items():
        names = {f"{q['image']}.png" for q in queries}
        for kind in ('images', 'guess', 'uncertainty') if queries else ():
            assert {f.name for f in (batch.folder/task/kind).iterdir()} == names
    assert not [f for f in files(batch.folder) if Path(f).name.startswith('.')]
    found = events(asked)
    assert found.kind.tolist()[-10:] == ['asked']*10
    assert found.cost.tolist()[-10:] == [q['price'] for q in batch.queries]

def test_the_guess_can_be_imported(project):
    "What goes out as a pre-annotation comes back as a label"
    batch, by_task = parts(project)
    for task, queries in by_task.items():
        if queries: shutil.copytree(batch.folder/task/'guess', batch.folder/task/'labels', dirs_exist_ok=True)
    imported = tell(project.folder, 1, batch.folder)
    assert not imported.refused and len(imported.took['told']) == 10 and imported.missing == 0, str(imported)

def test_asked_twice_and_on(project):
    "The same batch as long as nothing was imported; then another, without what is still out"
    first = ask(project.folder, budget=10, progress=False)
    assert not first.new and first.queries == read_batch(project, 1).queries
    r = called('ask', '-p', project.folder, '--budget', 9)
    assert r.exit_code == 2 and 'batch 1 was asked with --budget 10 and nothing of it was imported yet' in r.stderr
    imported = tell(project.folder, 1, answer(project.folder/'back', first.queries[:4]))
    assert len(imported.took['told']) == 4 and imported.missing == 6
    second = ask(project.folder, budget=5, progress=False)
    pairs = lambda b: {(q['image'], q['task']) for q in b.queries}
    assert (second.number, second.new) == (2, True) and not pairs(first) & pairs(second)
    late = tell(project.folder, 1, answer(project.folder/'late', first.queries[4:]))
    assert len(late.took['told']) == 6 and late.missing == 0
    assert [b['round'] for b in curve(project).to_dict('records')] == [1, 2]

def test_a_batch_folder_that_is_gone_is_made_again(project):
    before = {f: (project.folder/'batches/001'/f).read_bytes() for f in files(project.folder/'batches/001')}
    shutil.rmtree(project.folder/'batches/001')
    assert ask(project.folder, budget=10, progress=False).new
    assert {f: (project.folder/'batches/001'/f).read_bytes() for f in before} == before

# In: whatever comes back

def bad_zip(path, **members):
    with zipfile.ZipFile(path, 'w', zipfile.ZIP_DEFLATED) as z:
        for name, data in members.items(): z.writestr(name, data)
    return path

def faults(task):
    "File content of a label that is refused, and the message"
    def png(value, size=(H, W), dtype=np.uint8): return png_bytes(np.full(size, value, dtype))
    two_meters = encode_label(np.full((H, W, 1), 2.), TASKS[1])
    if task == 'depth': return [
        (two_meters[:50], 'not a whole PNG'),
        (png(2, dtype=np.uint16), 'unit off by a thousand'),
        (png(0, dtype=np.uint16), 'all of it is void'),
        (png(0, (W, H), np.uint16), f'expected {H} × {W} pixels'),
        (png(7), 'expected 16 bit gray'),
        (b'', 'not a whole PNG'),
        (b'\x89PNG\r\n\x1a\n' + b'\0'*99, 'not a whole PNG')]
    if task == 'semseg': return [
        (png(99), 'pixels of value 99, but there are'),
        (png(255), 'all of it is void'),
        (png(1, (2*H, W)), f'expected {H} × {W} pixels'),
        (b'GIF89a', 'not a whole PNG'),
        (png(9, (H, W, 3)), 'colors of no class')]
    return [
        (png(160, (H, W, 3)), 'not of length 1'),
        (png(0, (H, W, 3)), 'all of it is void'),
        (png((128, 128, 0), (H, W, 3)), 'look away from the viewer')]

@pytest.mark.parametrize('task', [t.name for t in TASKS])
def test_bad_labels_are_refused_by_name(task, project):
    "One bad file at a time beside good ones: they are taken, exit code and summary show it, it leaves nothing"
    batch, by_task = parts(project)
    if not by_task[task]: pytest.skip('none was asked')
    bad, good = by_task[task][0], [q for q in batch.queries if q != by_task[task][0]][:2]
    labels = files(project.folder/'labels')
    for n, (data, message) in enumerate(faults(task)):
        back = answer(project.folder/f'back{n}', good)
        write_atomic(back/f"{task}/labels/{bad['image']}.png", data)
        r = called('tell', 1, back, '-p', project.folder)
        assert r.exit_code == 1, (message, r.stdout, r.stderr)
        for text in ('1 refused:', message, f"{bad['image']}.png"): assert text in r.stdout, (text, r.stdout, r.stderr)
        assert ('2 new labels' if n == 0 else '2 known already') in r.stdout
        assert '8 pairs of the batch are still out' in r.stdout
    assert len(files(project.folder/'labels') - labels) == 2
    assert events(project).kind.tolist().count('told') == 18 + 2

def test_names_that_lead_nowhere(project, tmp_path):
    "A stranger, a path that leaves the folder, a link out of it, a zip with both"
    batch, by_task = parts(project)
    task, queries = next((t, q) for t, q in by_task.items() if len(q) > 1)
    good = encode_label(TRUTH[queries[0]['image']][task], task_of(task))
    second = queries[1]['image']
    back = answer(tmp_path/'back', queries[:1])
    write_atomic(back/f'{task}/labels/stranger.png', good)
    (tmp_path/'secret.png').write_bytes(good)
    (back/f'{task}/labels/{second}.png').symlink_to(tmp_path/'secret.png')
    imported = tell(project.folder, 1, back)
    assert len(imported.took['told']) == 1
    for text in ("no image 'stranger' was asked for", 'leaves its folder'):
        assert any(text in why for _, why in imported.refused), imported.refused
    names = f'{task}/{second}.png', f'../{task}/out.png', f'/{task}/abs.png'
    packed = bad_zip(tmp_path/'back.zip', **dict.fromkeys(names, good))
    imported = tell(project.folder, 1, packed, task=task)
    assert len(imported.refused) == 2 and len(imported.took.get('told', ())) == 1, str(imported)
    assert not (tmp_path/task).exists() and not Path(f'/{task}').exists()

def test_a_zip_that_explodes(project, tmp_path):
    "Refused before any of it is unpacked"
    bomb = tmp_path/'bomb.zip'
    with zipfile.ZipFile(bomb, 'w', zipfile.ZIP_DEFLATED) as z:
        for n in range(3): z.writestr(f'depth/labels/{n}.png', bytes(100 << 20))
    before = files(project.folder)
    r = called('tell', 1, bomb, '-p', project.folder)
    assert r.exit_code == 2 and 'times its size, expected at most' in r.stderr and 'Traceback' not in r.stderr
    assert files(project.folder) - {'ledger.db-wal', 'ledger.db-shm'} == before - {'ledger.db-wal', 'ledger.db-shm'}

@pytest.mark.parametrize('args,message', [
    (['7', 'BACK'], 'no batch 7 in'),
    (['1', 'nowhere'], 'no such file or folder'),
    (['1', 'BACK', '--task', 'edges'], '--task edges: this batch asked for'),
    (['1', 'BACK', '--format', 'gif'], "unknown format 'gif'"),
    (['first', 'BACK'], "batch 'first': expected its number"),
    (['1', 'EMPTY'], 'which task is it of?')])
def test_what_can_be_misspelled(args, message, project, tmp_path):
    answer(tmp_path/'BACK', read_batch(project, 1).queries[:1])
    (tmp_path/'EMPTY').mkdir()
    r = called('tell', *[tmp_path/a if a.isupper() else a for a in args], '-p', project.folder)
    assert r.exit_code == 2 and r.stderr.startswith('partal: ') and message in r.stderr, r.stderr
    assert 'told' not in events(project).kind.tolist()[18:]

def test_nothing_is_passed_over_in_silence(project, tmp_path):
    "A label as .npy among PNG files, a JPEG, and a row of the form whose image a spreadsheet renamed"
    batch, by_task = parts(project)
    task, queries = max(by_task.items(), key=lambda x: len(x[1]))
    labels = answer(tmp_path/'back', queries)/task/'labels'
    first, second = (labels/f"{q['image']}.png" for q in queries[:2])
    write_atomic(first.with_suffix('.npy'), to_npy(TRUTH[first.stem][task].reshape(H, W, -1), task_of(task)))
    first.unlink()
    second.rename(second.with_suffix('.jpg'))
    rows = [f"{q['image']},3,Ann," for q in queries]
    renamed, rows[2] = queries[2]['image'], '7,3,Ann,'
    (labels.parent/'answers.csv').write_text('\n'.join(['image,minutes,who,rejected', *rows]))
    imported = tell(project.folder, 1, tmp_path/'back')
    assert len(imported.took['told']) == len(queries) - 2
    whys = '\n'.join(why for _, why in imported.refused)
    assert f'{second.stem}.jpg (task {task}): expected .png or .npy, got .jpg' in whys
    assert f"{renamed}.png (task {task}): waits for its row in answers.csv, where '7' is no image" in whys
    assert "no image '7' was asked for" in whys and len(imported.refused) == 3

def test_the_task_is_found_in_what_came_back(project, tmp_path):
    "The folder of one task, a zip of it, and one under another name with its format.json"
    batch, by_task = parts(project)
    task, queries = next((t, q) for t, q in by_task.items() if q)
    answer(tmp_path/'back', queries)
    shutil.make_archive(tmp_path/'mail', 'zip', tmp_path/'back', task)
    shutil.copytree(tmp_path/'back'/task, tmp_path/'other')
    with pytest.raises(ValueError, match='which task is it of'): tell(project.folder, 1, tmp_path/'other')
    shutil.copy(batch.folder/task/'format.json', tmp_path/'other')
    for n, path in enumerate((tmp_path/'back'/task, tmp_path/'mail.zip', tmp_path/'other')):
        imported = tell(project.folder, 1, path)
        assert took(imported) == {'same' if n else 'told': len(queries)} and not imported.refused, path

def test_a_batch_without_a_network_speaks_of_none(tmp_path):
    formats = dict(semseg='label-studio')
    p = init(photos(tmp_path/'photos', 0), tmp_path/'project', tasks_file(tmp_path), formats=formats, **TINY)
    folder = ask(p.folder, budget=9, progress=False).folder
    for t in TASKS:
        text = (folder/t.name/'README.txt').read_text()
        assert 'uncertain' not in text and 'guess' not in text
        assert not list(folder.glob(f'{t.name}/uncertainty*')) and not (folder/t.name/'guess').exists()
    assert '$uncertainty' not in (folder/'semseg/label_config.xml').read_text()
    assert 'Classes: 0 wall' in (folder/'semseg/README.txt').read_text()

def test_answered_twice_in_one_submission(project, tmp_path):
    "Alike is fine, not alike is refused; labeled and rejected is refused too"
    batch, by_task = parts(project)
    depth = by_task['depth'] or pytest.skip('none was asked')
    back = answer(tmp_path/'back', depth[:1])
    name = depth[0]['image']
    shutil.copy(back/f'depth/labels/{name}.png', back/f'depth/labels/{name}.PNG')
    assert len(tell(project.folder, 1, back).took['told']) == 1
    write_atomic(back/f'depth/labels/{name}.PNG', encode_label(TRUTH[name]['depth'] + 1, TASKS[1]))
    assert 'was answered 2 times, not alike' in tell(project.folder, 1, back).refused[0][1]
    (back/'depth/answers.csv').write_text(f'image,minutes,who,rejected\n{name},,,too dark\n')
    (back/f'depth/labels/{name}.PNG').unlink()
    assert 'rejected' in tell(project.folder, 1, back).refused[0][1]

def test_corrected_and_imported_again(project, tmp_path):
    "Any order, parts, the same file twice, a correction with the old version kept, an old file that comes once more"
    batch = read_batch(project, 1)
    q, order = batch.queries[0], np.random.default_rng(0).permutation(10)
    for some in np.split(order, 5):
        tell(project.folder, 1, answer(tmp_path/f'{some[0]}', [batch.queries[n] for n in some]))
    every = answer(tmp_path/'every', batch.queries)
    def void_above(i, t): # as somebody who leaves the top out
        label = TRUTH[i][t].reshape(H, W, -1).copy()
        label[:9] = task_of(t).ignore
        return label
    assert took(tell(project.folder, 1, every)) == dict(same=10)
    assert took(tell(project.folder, 1, answer(tmp_path/'better', [q], void_above))) == dict(corrected=1)
    assert took(tell(project.folder, 1, every)) == dict(same=9, older=1)
    versions = list((project.folder/'labels'/q['task']).glob(f"{q['image']}-*"))
    assert len(versions) == 2
    with project.ledger() as ledger:
        assert ledger.state()[Pair(q['image'], q['task'])].version == 2 and replay(ledger.events()) == ledger.state()
        pool, _, _ = load_labels(project, ledger)
    n = project.images.index(q['image'])
    label = pool.labels[q['task']][np.array([n])][0]
    assert (label[:8] == task_of(q['task']).ignore).all() # the network learns from the newest

def test_a_rejected_pair_rests(project):
    "Two batches without it, then it may come again; what is asked now is not what was rejected"
    batch = read_batch(project, 1)
    form = project.folder/'back'
    q = batch.queries[0]
    write_atomic(form/q['task']/'answers.csv', f"image,minutes,who,rejected\n{q['image']},,Ann,a mirror\n".encode())
    imported = tell(project.folder, 1, form)
    assert imported.took == dict(rejected=[Pair(q['image'], q['task'])]) and imported.missing == 9
    seen = []
    for number in (2, 3, 4):
        free = int(status(project.folder).tasks.open.sum())
        now = ask(project.folder, budget=free if number == 4 else 2, progress=False)
        seen.append((q['image'], q['task']) in [(x['image'], x['task']) for x in now.queries])
        tell(project.folder, number, answer(project.folder/f'back{number}', now.queries[-1:]))
    assert seen == [False, False, True]
    assert status(project.folder).tasks.rejected.sum() == 1

def test_label_studio(tmp_path):
    "A batch goes out as a Label Studio project; its export is imported, a later annotation corrects the earlier"
    formats = dict(semseg='label-studio')
    p = init(photos(tmp_path/'photos'), tmp_path/'project', tasks_file(tmp_path), formats=formats, **TINY)
    batch = ask(p.folder, budget=24, progress=False)
    folder = batch.folder/'semseg'
    sent = json.loads((folder/'tasks.json').read_text())
    assert len(sent) >= 2
    with pytest.raises(FileNotFoundError, match='Put the labels into labels/'): # nothing came yet
        tell(p.folder, 1, batch.folder)
    def painted(task, day, change): # an annotation
        i = task['data']['image_id']
        made = label_studio_task(Query(i, TASKS[0], TRUTH[i]['rgb'], change(TRUTH[i]['semseg'].reshape(H, W, 1))))
        by = dict(completed_by=dict(email='ann@x.org'), updated_at=f'2026-01-0{day}', lead_time=120.)
        return dict(by, result=made['predictions'][0]['result'])
    right, hasty = (lambda y: y), (lambda y: np.where(y > 2, 2, y).astype(np.uint8))
    export = [dict(sent[0], annotations=[painted(sent[0], 1, right)]),
              dict(sent[1], annotations=[painted(sent[1], 2, right), painted(sent[1], 1, hasty)])]
    write_atomic(tmp_path/'export.json', json.dumps(export).encode())
    imported = tell(p.folder, 1, tmp_path/'export.json') # the task is named in it
    assert took(imported) == dict(told=2, corrected=1) and not imported.refused, str(imported)
    found = events(p)
    assert set(found.source[found.minutes.notna()]) == {'ann@x.org'}
    assert status(p.folder).tasks.measured['semseg'] == 3
    assert took(tell(p.folder, 1, tmp_path/'export.json', task='semseg')) == dict(same=2, older=1)
    write_atomic(folder/'export.json', b'[{"data"')
    r = called('tell', 1, batch.folder, '-p', p.folder)
    assert r.exit_code in (1, 2) and 'export.json: not JSON' in r.stdout + r.stderr, (r.stdout, r.stderr)

# Interruptions

def die_at(n):
    "SIGKILL right before the n-th rename or commit"
    left, execute = count(1 - n), None
    def moment():
        if next(left) == 0: os.kill(os.getpid(), signal.SIGKILL)
    sys.addaudithook(lambda event, args: moment() if event == 'os.rename' else None)
    for name in ('ask', 'tell'):
        def die_first(self, *args, do=getattr(Ledger, name)):
            moment()
            result = do(self, *args)
            moment()
            return result
        setattr(Ledger, name, die_first)

def child(work, n): # its exit code
    def body():
        die_at(n)
        work()
    process = multiprocessing.get_context('fork').Process(target=body)
    process.start()
    process.join(120)
    if process.exitcode is None: process.kill()
    assert process.exitcode is not None, 'the child hangs'
    return process.exitcode

def test_ask_interrupted_before_every_write(asked, tmp_path):
    "Each process gets one write further than the last; in the end the batch is the same to the byte"
    p = init(Path(asked.data), tmp_path/'project', tasks_file(tmp_path), val_share=.3, **TINY)
    done = lambda: {f for f in files(p.folder) if '/.' not in f and not f.startswith(('ledger', 'cache', '.'))}
    kills, n, before = 0, 1, done()
    while (code := child(lambda: ask(p.folder, budget=10, progress=False), n)):
        assert code == -signal.SIGKILL and kills < 150
        kills, n, before = kills + 1, (n + 1 if done() == before else 2), done()
        whole = (p.folder/'batches/001').is_dir()
        assert not whole or files(p.folder/'batches/001') == files(asked.folder/'batches/001')
        with p.ledger() as ledger: assert ledger.last() in (18, 28) and (ledger.last() == 18 or whole)
    assert kills >= 40
    here, there = p.folder/'batches/001', asked.folder/'batches/001'
    for f in files(there): assert (here/f).read_bytes() == (there/f).read_bytes(), f
    assert not [f for f in files(p.folder/'batches') if '/.' in f or f[0] == '.']
    assert events(p).kind.tolist()[18:] == ['asked']*10

def test_tell_interrupted_before_every_write(asked, project, tmp_path):
    "Nothing or all of it is imported; given again, it is there"
    back = answer(tmp_path/'back', read_batch(project, 1).queries[:6])
    for n in count(1):
        code = child(lambda: tell(project.folder, 1, back), n)
        with project.ledger() as ledger:
            told = (ledger.events().kind == 'told').sum() - 18
            assert told in (0, 6) and replay(ledger.events()) == ledger.state()
            for pair, sha in ledger.labels().items(): assert project.label_file(*pair, sha).is_file()
            if told: break
        assert code == -signal.SIGKILL and n < 40
    assert n == 8 # six labels, then the transaction: what is written is there although the summary was never printed
    assert took(tell(project.folder, 1, back)) == dict(same=6)

def test_init_interrupted_before_every_write(tmp_path):
    "A project is there whole or not at all"
    source = photos(tmp_path/'photos', 2)
    for n in count(1):
        code = child(lambda: init(source, tmp_path/'project', tasks_file(tmp_path), **TINY), n)
        if code == 0: break
        assert code == -signal.SIGKILL and n < 40 and not (tmp_path/'project').exists()
    assert n > 6 and open_project(tmp_path/'project').images == tuple(TRUTH) and not list(tmp_path.glob('.project*'))

def test_two_tell_at_once(project, tmp_path):
    "Halves that overlap, from two processes: all of it lands, none of it twice"
    queries = read_batch(project, 1).queries
    code = ("import sys; from partal_nb.annotate.tell import tell; "
            "print(tell(sys.argv[1], 1, sys.argv[2], who=sys.argv[3]))")
    def start(who, some):
        command = [sys.executable, '-c', code, project.folder, answer(tmp_path/who, some), who]
        return subprocess.Popen(command, stdout=subprocess.PIPE, text=True)
    both = [start('Ann', queries[:7]), start('Bob', queries[3:])]
    printed = [w.communicate(timeout=120)[0] for w in both]
    assert all(w.returncode == 0 for w in both)
    found = events(project)
    assert (found.kind == 'told').sum() == 18 + 10 and (found.kind == 'corrected').sum() == 0
    assert set(found.source[28:]) == {'Ann', 'Bob'}
    lines = [line for text in printed for line in text.splitlines() if 'new labels' in line]
    assert sum(int(line.split()[0]) for line in lines) == 10

def test_two_ask_at_once(project):
    import filelock
    with filelock.FileLock(project.folder/'.ask.lock'):
        with pytest.raises(ValueError, match='is in use by another process'): ask(project.folder, budget=10)

# Money

def test_minutes_become_prices(project, tmp_path):
    "60 CHF an hour: a minute is a franc; after five labels the price is halfway between that set and what they took"
    batch, by_task = parts(project)
    task, queries = max(by_task.items(), key=lambda x: len(x[1]))
    back, before = answer(tmp_path/'back', queries), project.prices.label[task]
    rows = '\n'.join(f"{q['image']},10,Ann," for q in queries)
    write_atomic(back/f'{task}/answers.csv', f'image,minutes,who,rejected\n{rows}\n'.encode())
    tell(project.folder, 1, back)
    s, n = status(project.folder), len(queries)
    assert s.tasks.loc[task, 'spent'] == 10*n and s.tasks.loc[task, 'measured'] == n
    assert s.tasks.loc[task, 'price'] == pytest.approx((5*before + 10*n)/(5 + n))
    now = ask(project.folder, money=20, currency='CHF', progress=False)
    assert 0 < sum(q['price'] for q in now.queries) <= 20
    for q in now.queries: assert q['price'] == pytest.approx(s.tasks.loc[q['task'], 'price'])
    with pytest.raises(ValueError, match='--currency EUR, but the prices of this project are in CHF'):
        ask(project.folder, money=20, currency='EUR')

def test_free_labels_are_asked_at_no_price(tmp_path):
    p = init(photos(tmp_path/'photos', 0), tmp_path/'project', tasks_file(tmp_path, ', free_with = "depth"'), **TINY)
    batch = ask(p.folder, money=14, progress=False)
    price = {(q['image'], q['task']): q['price'] for q in batch.queries}
    assert sum(price.values()) <= 14 and all(price[i, 'normals'] == 0 for i, t in price if t == 'depth')
    assert 'drawn at random' in str(batch)
    assert (batch.folder/'queries.csv').read_text().count('start batch') == len(batch.queries)

def test_a_hint_when_to_stop(project):
    "Three networks with different labels make a curve; the hint says what it rests on"
    for number in (1, 2):
        tell(project.folder, number, answer(project.folder/f'back{number}', read_batch(project, number).queries))
        ask(project.folder, budget=6, progress=False)
    s, more = status(project.folder, money=5), status(project.folder, money=500)
    assert s.points['round'].tolist() == [1, 2, 3] and s.points.worth.is_monotonic_increasing
    assert s.hint.gain is not None
    assert 'An extrapolation of 3 networks' in str(s) and 'the next 5 CHF are expected to bring' in str(s)
    left = (more.tasks.open*more.tasks.price).sum() # no more can be spent, so no more is promised
    assert 500 > more.money == pytest.approx(left)
    assert f'next: {left:g} CHF of 500, for no more is unlabeled, buy' in str(more)
    assert f'the next {left:g} CHF are expected to bring' in more.hint.text
    out = project.folder/'money.png'
    r = called('status', '-p', project.folder, '--picture', out)
    assert r.exit_code == 0 and out.stat().st_size > 3000

# From what people have

def test_test_images_spare_the_held_out(tmp_path):
    "Listed test images with labels are measured on and never asked for"
    source = photos(tmp_path/'photos', 8)
    ids = list(TRUTH)
    (source/'train.txt').write_text('\n'.join(ids[4:]))
    (source/'test.txt').write_text('\n'.join(ids[:4]))
    p = init(source, tmp_path/'project', tasks_file(tmp_path), **TINY)
    assert p.val == tuple(ids[:4]) and set(p.images) == set(ids[4:])
    batch = ask(p.folder, budget=4, progress=False)
    assert not {q['image'] for q in batch.queries} & set(p.val) and len(curve(p)) == 1
    (source/f'{ids[0]}.png').unlink()
    remove(p.folder, ids[:2]) # one that is gone and one that is there
    p = open_project(p.folder)
    with p.ledger() as ledger: assert load_labels(p, ledger)[1].images == tuple(ids[2:4])
    assert as_dataset(p).splits['test'] == ids[2:4]

def test_images_that_come_after_the_scores(tmp_path):
    "An `ask` that ended between its scores and its choice doesn't block images that come then"
    p = init(photos(tmp_path/'photos'), tmp_path/'project', tasks_file(tmp_path), **TINY)
    with pytest.raises(ValueError, match='ask for that or more'): ask(p.folder, money=.1, progress=False)
    written = p.files.scores_file(1).stat().st_mtime_ns
    with pytest.raises(ValueError, match='ask for that or more'): ask(p.folder, money=.2, progress=False)
    assert p.files.scores_file(1).stat().st_mtime_ns == written # the same images are scored once
    write_atomic(tmp_path/'photos/new.png', png_bytes(TRUTH['room00']['rgb']))
    add(p.folder)
    batch = ask(p.folder, budget=33, progress=False)
    assert sum(q['image'] == 'new' for q in batch.queries) == 3 and len(batch.queries) == 33

def test_a_prepared_data_set(tmp_path):
    "A prepared data set: its tasks, its splits; nothing is left to ask there"
    store = prepare_rooms(tmp_path/'rooms', 4, 2, H, W, progress=False)
    p = init(store.path, tmp_path/'project', **TINY)
    assert [t.name for t in p.tasks] == list(store.tasks) and len(p.val) == 2
    with pytest.raises(ValueError, match='every pair is labeled'): ask(p.folder, budget=1, progress=False)

def test_a_complete_task_needs_no_score(tmp_path):
    "A sensor measured all depth; the other tasks are asked, with depth injected"
    source = photos(tmp_path/'photos')
    for i, r in TRUTH.items(): write_atomic(source/f'depth/{i}.png', encode_label(r['depth'], TASKS[1]))
    p = init(source, tmp_path/'project', TASKS, **TINY)
    batch = ask(p.folder, budget=5, progress=False)
    assert {q['task'] for q in batch.queries} <= {'semseg', 'normals'}
    for q in batch.queries: assert 'depth' in q['why'].split('injected: ')[1], q['why']

def with_broken(task, label):
    "A function that makes a folder of photos, in which one label is `label`"
    def make(folder):
        photos(folder/'photos')
        write_atomic(folder/f'photos/{task}/room00.png', png_bytes(label))
    return make

@pytest.mark.parametrize('make,message', [
    (lambda d: (d/'photos').mkdir(), 'no image in it'),
    (lambda d: write_atomic(d/'photos/a.png', b'torn'), 'a.png (rgb): not a whole image'),
    (with_broken('depth', np.zeros((H, W), np.uint16)), 'all of it is void'),
    (with_broken('depth', np.ones((9, 9), np.uint16)), f'expected {H} × {W} pixels (height × width), got 9 × 9'),
    (with_broken('semseg', np.full((H, W), 77, np.uint8)), 'pixels of value 77')])
def test_what_init_refuses(make, message, tmp_path):
    make(tmp_path)
    r = called('init', tmp_path/'photos', '--tasks', tasks_file(tmp_path), '-p', tmp_path/'project')
    assert r.exit_code == 2 and message in r.stderr and r.stderr.startswith('partal: '), r.stderr
    assert not [f for f in tmp_path.iterdir() if 'project' in f.name]

def test_files_that_are_lost(project, asked):
    "A label whose file is gone is left out and named; images that moved away are an error before anything is trained"
    with project.ledger() as ledger: (image, task), sha = next(iter(ledger.labels().items()))
    answer(project.folder/'back', read_batch(project, 1).queries[:1])
    tell(project.folder, 1, project.folder/'back')
    project.label_file(image, task, sha).unlink()
    notes = ask(project.folder, budget=2, progress=False).notes
    assert notes == (f'imported labels gone or overwritten in labels/, left out: {task} of {image}; '
                     'bring back a copy, or tell them again',)
    file = project.files.about_file
    about = json.loads(file.read_text())
    file.write_text(json.dumps(dict(about, data=str(project.folder/'moved'))))
    with pytest.raises(FileNotFoundError, match='moved: no such folder'): ask(project.folder, budget=2)
    file.write_text(json.dumps(dict(about, cooldown='two')))
    with pytest.raises(ValueError, match="cooldown: expected a whole number from 0, got 'two'"):
        open_project(project.folder)
    file.write_text('{')
    assert called('status', '-p', project.folder).exit_code == 2

# Light

@pytest.mark.parametrize('command', ['status', 'log'])
def test_no_torch_to_look(command, asked):
    code = '\n'.join([
        "import sys",
        "from partal_nb.cli import app",
        f"try: app(['{command}', '-p', {str(asked.folder)!r}])",
        "except SystemExit as e: print('exit', e.code)",
        "print('torch' in sys.modules)"])
    r = subprocess.run([sys.executable, '-c', code], capture_output=True, text=True, timeout=60)
    assert r.stdout.splitlines()[-2:] == ['exit 0', 'False'], (r.stdout, r.stderr)

def test_log(asked):
    r = called('log', '-p', asked.folder)
    assert r.exit_code == 0 and len(r.stdout.splitlines()) == 28 and '  asked ' in r.stdout.splitlines()[-1]
