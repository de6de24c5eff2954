"""A lead's first week, from a terminal: a start, Label Studio and CVAT, late, wrong, corrected and rejected answers,
new images, a changed photograph, a lost ledger, and where it all stands; once with exports that are made here, and once
with a Label Studio that runs, over its API"""
import base64
import io
import json
import re
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
from PIL import Image
from typer.testing import CliRunner

from partal_nb.annotate.ask import read_batch
from partal_nb.annotate.cvat import cvat_zip
from partal_nb.annotate.label_studio import label_studio_task
from partal_nb.annotate.project import open_project
from partal_nb.annotate.query import Query
from partal_nb.cli import app
from partal_nb.core import write_atomic
from partal_nb.data.labels import encode_label, png_bytes
from partal_nb.data.rooms import ROOM_TASKS, render_room
from partal_nb.tasks import Pair

H, W = 32, 48
ROOMS = {f'room{n:02}': render_room(n, H, W) for n in range(18)}
SEMSEG, DEPTH = ROOM_TASKS['semseg'], ROOM_TASKS['depth']
PLAN = f"""
unit = "CHF"
per_hour = 60
tasks = [{{name = "semseg", classes = {json.dumps(SEMSEG.classes)}, cost = 9, format = "label-studio"}},
         {{name = "depth", cost = 0.5}},
         {{name = "normals", cost = 3, free_with = "depth"}}]
"""
TINY = 'height=32 width=48 features=8 encoder=test_efficientnet pretrained=false train_by=steps train_for=6 passes=2'

@pytest.fixture(scope='module', params=['made here', pytest.param('Label Studio', marks=pytest.mark.slow)])
def week(request, tmp_path_factory):
    tool = OverApi(request.getfixturevalue('studio')) if request.param == 'Label Studio' else MadeHere()
    return Week(tmp_path_factory.mktemp('week'), tool)

class Week:
    "A terminal in a folder"
    def __init__(self, place, tool):
        self.place, self.project, self.tool = place, place/'project', tool

    def partal(self, *args, code=0): # what it printed
        r = CliRunner().invoke(app, [*map(str, args), '--project', str(self.project)])
        assert r.exit_code == code, (args, r.stdout, r.stderr, r.exception)
        return r.stdout + r.stderr

    def queries(self, number, task=''):
        found = read_batch(open_project(self.project), number).queries
        return [q for q in found if task in ('', q['task'])]

    def events(self):
        with open_project(self.project).ledger() as ledger: return ledger.events()

    def labels(self):
        with open_project(self.project).ledger() as ledger: return ledger.labels()

def painted(q, label): # a task of Label Studio whose guess is `label` of the truth
    room = ROOMS[q['image']]
    return label_studio_task(Query(q['image'], SEMSEG, room['rgb'], label(room['semseg'].reshape(H, W, 1))))

class MadeHere:
    "An export as Label Studio writes it"
    def export(self, folder, queries, label, minutes=9): # folder: of the batch's task
        def task(q):
            made = painted(q, label)
            made['annotations'] = [dict(result=made['predictions'][0]['result'], lead_time=60*minutes,
                                        completed_by=dict(email='ann@x.org'), updated_at='2026-01-02')]
            return made
        return json.dumps([task(q) for q in queries]).encode()

class OverApi:
    "A project of a running Label Studio: the tasks as `ask` wrote them, annotated and exported over its API"
    def __init__(self, studio): self.studio, self.project, self.tasks = studio, None, {}

    def export(self, folder, queries, label, minutes=9): # folder: of the batch's task
        if self.project is None:
            self.project, ids = self.studio.project('first week', folder)
            for id in ids: self.tasks[self.studio.call('GET', f'/api/tasks/{id}')['data']['image_id']] = id
        for q in queries:
            body = dict(result=painted(q, label)['predictions'][0]['result'], lead_time=60*minutes)
            there = self.studio.call('GET', f"/api/tasks/{self.tasks[q['image']]}")['annotations']
            if there: self.studio.call('PATCH', f"/api/annotations/{there[0]['id']}/", json=body)
            else: self.studio.call('POST', f"/api/tasks/{self.tasks[q['image']]}/annotations/", json=body)
        return json.dumps(self.studio.export(self.project)).encode()

def test_monday_a_project_starts_where_labels_are(week):
    "Six segmentations, five depth maps, no normals: what can be trained is, and normals start through depth"
    for n, (i, r) in enumerate(ROOMS.items()):
        if n < 16: write_atomic(week.place/f'photos/{i}.png', png_bytes(r['rgb']))
        if n < 6: write_atomic(week.place/f'photos/semseg/{i}.png', encode_label(r['semseg'], SEMSEG))
        if n < 5: write_atomic(week.place/f'photos/depth/{i}.png', encode_label(r['depth'], DEPTH))
    write_atomic(week.place/'tasks.toml', PLAN.encode())
    changes = [x for change in TINY.split() for x in ('--set', change)]
    said = week.partal('init', week.place/'photos', '--tasks', week.place/'tasks.toml', *changes)
    assert said.startswith('16 images to ask for, with labels already: 6 semseg, 5 depth, 0 normals')
    said = week.partal('ask', '--money', 60, '--currency', 'CHF')
    assert said.startswith('batch 1: ')
    normals = week.queries(1, 'normals')
    assert len(normals) >= 5 and all(q['price'] == 0 for q in normals) # none at 3.00
    assert {q['image'] for q in normals} >= set(list(ROOMS)[:5]) # those that have depth
    assert any(q['why'].startswith('herd_equal') for q in week.queries(1))
    assert sum(q['price'] for q in week.queries(1)) <= 60

def test_tuesday_label_studio_brings_a_part(week):
    "The first export is imported; the number to sort by is in the tasks; the rest is still out"
    sent = json.loads((week.project/'batches/001/semseg/tasks.json').read_text())
    assert all(isinstance(t['data']['uncertainty'], float) for t in sent)
    asked = week.queries(1, 'semseg')
    folder = week.project/'batches/001/semseg'
    write_atomic(week.place/'export.json', week.tool.export(folder, asked[:-1], lambda y: y))
    said = week.partal('tell', 1, week.place/'export.json')
    assert f'{len(asked) - 1} new label' in said and 'still out' in said
    assert f'{len(asked) - 1} known already' in week.partal('tell', 1, week.place/'export.json')

def test_wednesday_wrong_late_and_rejected(week):
    "A typo of minutes is asked back, a torn file costs itself, a rejection rests, the late answer comes by CVAT"
    back, depth = week.place/'back', week.queries(1, 'depth')
    for q in depth: write_atomic(back/f"depth/labels/{q['image']}.png", encode_label(ROOMS[q['image']]['depth'], DEPTH))
    rows = [f"{q['image']};{'1400' if k == 0 else '0,5'};Jörg;\r\n" for k, q in enumerate(depth)]
    form = 'image;minutes;who;rejected\r\n' + ''.join(rows)
    write_atomic(back/'depth/answers.csv', form.encode('cp1252'))
    write_atomic(back/'depth/labels/extra.gif', b'GIF89a')
    said = week.partal('tell', 1, back, code=1)
    assert '1400 minutes, but' in said and '--yes' in said and f'{len(depth) - 1} new label' in said
    write_atomic(back/'depth/answers.csv', form.replace('1400', '14').encode('cp1252'))
    (back/'depth/labels/extra.gif').unlink()
    assert '1 new label' in week.partal('tell', 1, back)
    assert set(week.events().query("task == 'depth' and kind == 'told' and round == 1").source) == {'Jörg'}
    late = week.queries(1, 'semseg')[-1]['image']
    write_atomic(week.place/'cvat.zip', cvat_zip({late: ROOMS[late]['semseg'].reshape(H, W, 1)}, SEMSEG))
    assert '1 new label' in week.partal('tell', 1, week.place/'cvat.zip', '--task', 'semseg')
    gone = week.queries(1, 'normals')[0]['image']
    write_atomic(week.place/'no/normals/answers.csv', f'image,rejected\n{gone},all of it is glass\n'.encode())
    assert '1 rejection' in week.partal('tell', 1, week.place/'no')
    write_atomic(week.place/'nothing/notes.txt', b'sorry')
    week.partal('tell', 1, week.place/'nothing', '--task', 'depth', code=2)

def test_thursday_corrections(week):
    "A label made better, and minutes, annotator and note put right by name; the log shows both"
    first = week.queries(1, 'semseg')[0]
    better = lambda y: np.where(np.arange(H)[:, None, None] < 4, SEMSEG.ignore, y).astype(np.uint8)
    write_atomic(week.place/'better.json', week.tool.export(week.project/'batches/001/semseg', [first], better))
    assert '1 corrected label' in week.partal('tell', 1, week.place/'better.json')
    image = week.queries(1, 'depth')[0]['image']
    assert 'minutes: 1.0' in week.partal('correct', image, 'depth', '--minutes', 1, '--who', 'Eva\n2026-01-01  told')
    assert 'take them with --yes' in week.partal('correct', image, 'depth', '--minutes', 1400, code=2)
    log = week.partal('log').splitlines()
    assert sum('  amended' in line for line in log) == 1 and all(re.match(r'20\d\d-', line) for line in log)
    told = week.events().query("image == @image and task == 'depth' and kind == 'told'")
    assert told.cost.tolist() == [1.] and told.minutes.tolist() == [1.]

def test_friday_the_folder_lives(week):
    "New images join, a photograph that changed is set aside, one that vanished stops nobody but itself"
    for i in list(ROOMS)[16:]: write_atomic(week.place/f'walk/{i}.png', png_bytes(ROOMS[i]['rgb']))
    write_atomic(week.place/'walk/torn.png', b'torn')
    said = week.partal('add', week.place/'walk', code=1)
    assert said.startswith('2 new images') and 'torn.png' in said
    (week.place/'photos/room15.png').unlink()
    write_atomic(week.place/'photos/room14.png', png_bytes(ROOMS['room13']['rgb']))
    said = week.partal('status')
    assert 'gone, set aside: room15' in said and 'not as they were, set aside: room14' in said
    said = week.partal('ask', '--money', 30)
    assert said.startswith('batch 2: ') and 'room15' in said
    assert not {'room14', 'room15'} & {q['image'] for q in week.queries(2)}
    write_atomic(week.place/'photos/room15.png', png_bytes(ROOMS['room15']['rgb']))
    week.partal('add', '--edited')
    assert 'set aside' not in week.partal('status')
    both = 'more than one file for an image: room03.jpg and room03.png; leave one'
    twin = week.place/'photos/room03.jpg'
    Image.fromarray(ROOMS['room03']['rgb']).save(twin)
    write_atomic(week.place/'photos/room99.png', b'torn')
    assert both in week.partal('status')
    said = week.partal('add', code=1)
    assert both in said and 'room99.png' in said and said.startswith('0 new images')
    for f in (twin, week.place/'photos/room99.png'): f.unlink()
    assert 'leave one' not in week.partal('status')

def test_saturday_the_ledger_is_lost(week):
    "Nobody makes a new one in silence; restore brings all of it back, and without a backup every label"
    before, labels = week.events(), week.labels()
    for f in week.project.glob('ledger.db*'): f.unlink()
    for command in (['status'], ['log'], ['ask', '--money', '5'], ['tell', '1', week.place/'export.json']):
        said = week.partal(*command, code=2)
        assert 'the ledger is gone; its newest backup is' in said and 'partal restore' in said
    assert not week.project.joinpath('ledger.db').exists()
    assert f'ledger with {len(before)} events, from ledger-' in week.partal('restore')
    assert week.events().equals(before)
    for f in [*week.project.glob('ledger.db*'), *week.project.glob('backups/*')]: f.unlink()
    week.project.joinpath('ledger.db').touch()
    assert 'without a backup' in week.partal('restore')
    assert week.labels().keys() == labels.keys() and 'there is nothing to restore' in week.partal('restore', code=2)

def called(*args): # a command without --project
    r = CliRunner().invoke(app, [*map(str, args)])
    assert r.exit_code == 0, (args, r.stdout, r.stderr, r.exception)
    return r.stdout

def test_sunday_where_it_stands(week):
    "Money, labels and networks are there to read, by status, by the log, and by whatever reads a run"
    said = week.partal('status')
    assert 'spent:' in said and '2 batches' in said and 'next:' in said
    files = open_project(week.project).files
    lines = files.journal()
    assert [l['round'] for l in lines] == [1, 2] and lines[1]['worth'] > lines[0]['worth']
    assert set(lines[0]['metrics']) <= {'semseg', 'depth', 'normals'} and files.load_model(2).tasks == files.tasks

def test_sunday_the_page(week):
    "The report of the week: its money, every pair with its reason and answer, the curve, the uncertainty of the pool"
    page = Path(called('report', week.project, '--out', week.place/'week.html').strip()).read_text('utf-8')
    tables = [pd.read_csv(io.BytesIO(base64.b64decode(d))) for d in re.findall(r'data:text/csv;base64,([^"]+)', page)]
    standing, curve, asked, scores = tables
    assert standing.spent.sum() == pytest.approx(week.events().query("kind != 'asked'").cost.sum())
    assert curve['round'].tolist() == [1, 2] and curve.spent.is_monotonic_increasing
    assert len(asked) == len(week.queries(1)) + len(week.queries(2))
    assert {'labeled', 'corrected', 'out'} <= set(asked.answer)
    assert asked.why.str.startswith('herd_equal, by coverage: entropy').any()
    assert set(scores.batch) == {1, 2} and scores.pairs.min() > 0
    assert not re.search(r'<(script|link|img)[^>]*(src|href)="http', page)

def test_sunday_the_explorer(week):
    "Pool, image, selection and injection of the project, each opened; the note names the report"
    from partal_nb.explore.chooser import VIEWS, RunExplorer, open_view
    view = open_view(week.project)
    assert '2 trained networks' in view.note and 'partal report' in view.note
    explorer = RunExplorer(view)
    for name in VIEWS: explorer.view.value = name
    assert {name: type(v) for name, v in explorer.views.items()} == VIEWS
