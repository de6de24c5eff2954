"Every template of nbs/runs is executed by papermill on tiny runs, and what it says is checked against the run folders"
import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
from PIL import Image

from partal_nb.runs.journal import read_journal
from partal_nb.reports.read import read_study, run_folders

TINY = dict(pool_images=16, test_images=6, height=48, width=64, features=8,
            encoder='test_efficientnet', pretrained=False, start_images=4, step_pairs=6, rounds=1,
            train_by='steps', train_for=8, passes=3, device='cpu')
TEMPLATES = {p.stem for p in (Path(__file__).parents[1]/'nbs/runs').glob('*.ipynb')}
TESTED_HERE = {'partial_only', 'normalization', 'supervised', 'compare', 'hardest', 'injection', 'length', 'redundancy'}

@pytest.fixture(scope='module')
def place(tmp_path_factory): return tmp_path_factory.mktemp('place')

def notebook(place, name, **parameters):
    "Execute it by the real command; its printed and shown text"
    env = dict(os.environ, PARTAL_CACHE=str(place/'cache'), COLUMNS='200', NO_COLOR='1', TERM='dumb')
    words = [w for k, v in parameters.items() for w in ('--set', f'{k}={json.dumps(v)}')]
    command = [sys.executable, '-m', 'partal_nb.cli', 'notebook', name, '--out', name, *words]
    r = subprocess.run(command, cwd=place, env=env, capture_output=True, text=True, timeout=600)
    assert r.returncode == 0 and r.stdout.splitlines()[-1] == f'{name}/{name}.ipynb', r.stderr
    cells = json.loads((place/name/f'{name}.ipynb').read_text('utf-8'))['cells']
    outputs = [o for c in cells for o in c.get('outputs', [])]
    assert not [o for o in outputs if o['output_type'] == 'error']
    return r.stdout, [kind for o in outputs for kind in o.get('data', {})]

@pytest.fixture(scope='module')
def study(place): return notebook(place, 'partial_only', changes=TINY, seeds='0-1'), run_folders([place/'partial_only'])

@pytest.fixture(scope='module')
def full(place): return notebook(place, 'supervised', changes=TINY), place/'supervised'

def test_all_are_tested(): assert TEMPLATES == TESTED_HERE | {'al_run'} # which test_cli executes

def test_partial_only(study):
    (said, kinds), folders = study
    assert len(folders) == 8 and all(len(read_journal(f)) == 2 for f in folders)
    assert '30 comparisons of 2 seeds' in said and kinds.count('application/vnd.plotly.v1+json') == 2

def test_supervised(full):
    (said, _), folder = full
    labels = {f.name: read_journal(f)[0]['labels'] for f in run_folders([folder])}
    assert labels['supervised-0'] == dict.fromkeys(('semseg', 'depth', 'normals'), 16)
    assert labels['single_depth-0'] == dict(depth=16)
    assert 'Δ_MTL of all tasks together against each alone' in said

def test_normalization(place):
    said, _ = notebook(place, 'normalization', changes=TINY)
    assert sorted(f.name for f in run_folders([place/'normalization'])) == ['min-max-0', 'raw-0'] and 'One seed' in said

def test_compare(place, study, full):
    said, kinds = notebook(place, 'compare', runs=['partial_only', 'supervised'])
    assert '8 runs of' in said and 'references: 1 with all labels, 3 of single tasks' in said
    assert kinds.count('application/vnd.plotly.v1+json') == 4 and (place/'compare/report.html').exists()
    assert read_study(run_folders([place/'partial_only', place/'supervised'])).reference('single')

def test_hardest(place, study):
    notebook(place, 'hardest', runs=['partial_only'], rounds=[0])
    found = pd.read_csv(place/'hardest/hardest.csv')
    assert len(found) == 8*12*3 and found.picked.sum() == 8*6 # 16 images, 4 of them labeled
    told = json.loads((place/'hardest/hardest.json').read_text())
    assert told['command'].startswith('partal notebook hardest') and told['runs'].keys() == {f.name for f in study[1]}
    rows = pd.DataFrame(told['rows'])
    assert (rows.picked.sum(), rows.open.sum()) == (8*6, len(found))
    assert (rows.error_open*rows.open).sum() == pytest.approx(found.error.sum(), rel=1e-6)
    for f in study[1]:
        of_run = found.strategy + '-' + found.seed.astype(str) == f.name
        bought = found[found.picked & of_run].task.value_counts().to_dict()
        assert bought == {t: n for t, n in read_journal(f)[0]['bought'].items() if n}

def test_injection(place, study):
    notebook(place, 'injection', runs=['partial_only/partal-0', 'partial_only/partal-1'])
    found = pd.read_csv(place/'injection/injection.csv')
    assert len(found) == 2*(3*2 + 3) and set(found.images) == {6} and found.se.ge(0).all()

@pytest.mark.long
def test_length(place, study):
    lengths = {'4 steps': dict(train_by='steps', train_for=4), '3 epochs': dict(train_by='epochs', train_for=3)}
    said, kinds = notebook(place, 'length', runs=['partial_only/partal-0', 'partial_only/random-0'], lengths=lengths)
    assert '2 sets of labels, 18 to 18 pairs, 1 seeds' in said and kinds.count('application/vnd.plotly.v1+json') == 1
    for f in (place/'partial_only/partal-0', place/'partial_only/random-0'):
        folders = f, place/'length/4-steps'/f.name, place/'length/3-epochs'/f.name
        (before, last), (short,), (long,) = map(read_journal, folders)
        assert short['labels'] == long['labels'] == last['labels'] != before['labels'] and short['steps'] == 4
    assert read_journal(place/'length/3-epochs/random-0')[0]['steps'] == 3 # 6 images, one batch

def test_redundancy(place):
    (place/'photos').mkdir()
    for i in range(12): # img_9 was taken before img_10
        noise = np.random.default_rng(i//2).integers(0, 256, (48, 64, 3), np.uint8)
        Image.fromarray(noise).save(place/f'photos/img_{i}.png') # each number twice the same picture
    said, _ = notebook(place, 'redundancy', photos=str(place/'photos'), images=16, height=48, width=64, views=[1, 2, 8],
                       encoder='test_efficientnet', pretrained=False)
    found = json.loads((place/'redundancy/redundancy.json').read_text())
    assert found['command'].startswith('partal notebook redundancy') and 'are in redundancy/redundancy.json' in said
    rows = {r['pool']: r for r in found['rows']}
    assert rows['photos, all']['median'] == 0 and rows['photos, all']['near'] == 1
    assert rows['rooms, 8 views each']['near'] > rows['rooms, 1 view each']['near'] == 0
