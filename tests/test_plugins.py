"Plug-ins: what may be registered, names that are taken, and folders whose plug-in has moved"
import json
import os
import shutil
import subprocess
import sys

import pytest

from partal_nb.annotate.formats import FORMATS, Format, annotation_format
from partal_nb.core import write_json
from partal_nb.data.prepare import LAYOUTS, layout
from partal_nb.losses import register_loss
from partal_nb.metrics import register_metric
from partal_nb.runs.folder import RunFolder
from partal_nb.select.pick import PICKS, pick
from partal_nb.select.strategy import STRATEGIES, add_row, strategy
from partal_nb.uncertainty.acquisition import SCORES, score
from partal_nb.uncertainty.passes import ESTIMATORS, estimator

def mine(*args, **options): "What a plug-in would register"

REGISTRATIONS = dict(
    strategy=lambda: strategy('partal')(mine), row=lambda: add_row('random', '', pick='random'),
    score=lambda: score('entropy')(mine), estimator=lambda: estimator('mc_dropout')(mine),
    pick=lambda: pick('top', score=True)(mine), loss=lambda: register_loss('l1', 'values')(mine),
    metric=lambda: register_metric('rmse', 'values')(mine), layout=lambda: layout('own', '', mine)(mine),
    format=lambda: annotation_format(Format('png', '', mine, mine, mine)))

@pytest.mark.parametrize('what', REGISTRATIONS)
def test_no_built_in_is_overwritten(what):
    tables = STRATEGIES, SCORES, ESTIMATORS, PICKS, LAYOUTS, FORMATS
    before = [dict(table) for table in tables]
    with pytest.raises(ValueError, match=r"^\w+ '\w+' is taken, by \S+; use another name$"): REGISTRATIONS[what]()
    assert [dict(table) for table in tables] == before

MINE = """
from partal_nb.data.walks import prepare_rooms
from partal_nb.data.prepare import layout
from partal_nb.select.pick import pick
from partal_nb.select.strategy import add_row
from partal_nb.uncertainty.acquisition import score
from partal_nb.uncertainty.passes import estimate, estimator

@layout('counted', 'a folder with count.txt', lambda path: (path/'count.txt').is_file())
def read_counted(path, out, progress, **options):
    return prepare_rooms(out, int((path/'count.txt').read_text()), 4, 48, 64, progress)

@estimator('twice')
def twice(models, x, T, inject=None):
    for _ in range(2): yield from estimate('mc_dropout', models, x, T, inject)

@score('dark')
def dark(models, arrays, pool, T, seed):
    "How dark an image is"
    assert pool.estimator == 'twice'
    return (1 - arrays.rgb.mean((1, 2, 3))[:, None]/255).repeat(len(pool.tasks), 1)

@pick('lowest', score=True)
def lowest(lists, rng): return -lists.worth

add_row('brightest', 'The brightest images first', score='dark', scale='raw', pick='lowest')
"""
SETTINGS = dict(
    height=48, width=64, features=8, encoder='test_efficientnet', pretrained=False, start_images=3, step_pairs=6,
    rounds=1, train_by='steps', train_for=3, passes=2, device='cpu', estimator='twice', tasks=['semseg', 'depth'])

def partal(cwd, *words):
    env = dict(os.environ, PARTAL_CACHE=str(cwd/'cache'), COLUMNS='300', NO_COLOR='1', TERM='dumb')
    done = subprocess.run([sys.executable, '-m', 'partal_nb.cli', *map(str, words)], cwd=cwd, env=env,
                          capture_output=True, text=True, timeout=300)
    return done.returncode, done.stdout + done.stderr

@pytest.fixture(scope='module')
def place(tmp_path_factory):
    "A finished sweep of one run that needs all of a plug-in"
    place = tmp_path_factory.mktemp('plug-in')
    (place/'mine.py').write_text(MINE)
    (place/'photos').mkdir()
    (place/'photos/count.txt').write_text('9')
    changes = [x for k, v in SETTINGS.items() for x in ('--set', f'{k}={v if isinstance(v, str) else json.dumps(v)}')]
    code, out = partal(place, 'sweep', '--strategies', 'brightest', '--seeds', 0, '--data', 'photos', '--out', 'study',
                       '--import', 'mine.py', *changes)
    assert code == 0, out
    return place

def test_a_sweep_uses_all_that_a_plug_in_registers(place):
    run = RunFolder(place/'study/brightest-0')
    rounds = run.journal()
    assert len(rounds) == 2 and sum(rounds[0]['bought'].values()) == 6
    table = run.read_scores(0)
    assert table.groupby('image').raw.nunique().max() == 1 and table.image.nunique() == 6
    assert run.about['data']['name'] and run.config.estimator == 'twice'

def test_a_plug_in_that_moved(place, tmp_path):
    "Reports read what does not need it; what needs it is refused with the cure; --import says where it lies now"
    for name in ('study', 'photos', 'cache'): shutil.copytree(place/name, tmp_path/name)
    run = RunFolder(tmp_path/'study/brightest-0')
    recorded = run.about['imports']
    gone = str(tmp_path/'gone/mine.py')
    write_json(run.about_file, run.about | dict(imports=[gone]))
    missing = f'plug-in {gone}: expected a Python file, or a folder with an __init__.py, found none'
    code, out = partal(tmp_path, 'report', run.path, '--out', 'report.html')
    assert code != 0 and "config estimator: unknown 'twice'" in out and missing in out and '--import' in out
    (tmp_path/'new').mkdir()
    shutil.copy(place/'mine.py', tmp_path/'new/mine.py')
    code, out = partal(tmp_path, 'report', run.path, '--out', 'report.html', '--import', 'new/mine.py')
    assert code == 0, out
    about = run.about # without what only the plug-in knows, a report needs no plug-in
    write_json(run.about_file, about | dict(config=about['config'] | dict(estimator='mc_dropout')))
    code, out = partal(tmp_path, 'report', run.path, '--out', 'again.html')
    assert code == 0 and f'{missing}; give its path with --import; reading without it' in out
    write_json(run.about_file, about)
    assert recorded == [str(place/'mine.py')]

def test_a_moved_plug_in_is_recorded_where_it_lies_now(place, tmp_path):
    for name in ('study', 'photos', 'cache'): shutil.copytree(place/name, tmp_path/name)
    run = RunFolder(tmp_path/'study/brightest-0')
    write_json(run.about_file, run.about | dict(imports=[str(tmp_path/'gone/mine.py')]))
    resume = ("import json, sys\nfrom partal_nb.plugins import load_plugins\nload_plugins(sys.argv[1:2])\n"
              "from partal_nb.runs.folder import RunFolder\nfrom partal_nb.runs.loop import run\n"
              "folder = RunFolder(sys.argv[2])\nrun(folder.config, folder, progress=False)")
    for name, code in (('gone', 1), ('new', 0)):
        (tmp_path/'new').mkdir(exist_ok=True)
        shutil.copy(place/'mine.py', tmp_path/'new/mine.py')
        words = [sys.executable, '-c', resume, str(tmp_path/name/'mine.py'), str(run.path)]
        env = dict(os.environ, PARTAL_CACHE=str(tmp_path/'cache'), COLUMNS='300')
        done = subprocess.run(words, cwd=tmp_path, env=env, capture_output=True, text=True, timeout=300)
        assert done.returncode == code, done.stderr
        assert code == 0 or 'found none; give its path with --import' in done.stderr
    assert run.about['imports'] == [str(tmp_path/'new/mine.py')]
