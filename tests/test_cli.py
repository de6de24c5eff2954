"The command line from outside: its imports, a data set prepared, run and reported, and all that can be misspelled"
import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from typer.testing import CliRunner

from partal_nb.cli import app
from partal_nb.commands.common import template
from partal_nb.config import PRESETS, RunConfig, preset
from partal_nb.data.rooms import render_room
from partal_nb.data.prepare import open_data
from partal_nb.data.labels import png_bytes
from partal_nb.data.dataset import Dataset
from partal_nb.runs.journal import read_journal

BIN = Path(sys.executable).parent
TINY = dict(pool_images=10, test_images=4, height=48, width=64, features=8,
            encoder='test_efficientnet', pretrained=False, start_images=3, step_pairs=6, rounds=2, train_by='steps',
            train_for=6, passes=3, device='cpu')
SETTINGS = [x for k, v in TINY.items() for x in ('--set', f'{k}={v if isinstance(v, str) else json.dumps(v)}')]

def partal(*args, cwd, **env):
    "The real command in a process of its own"
    env = dict(os.environ, OMP_NUM_THREADS='1', COLUMNS='200', NO_COLOR='1', TERM='dumb', **env)
    command = [sys.executable, '-m', 'partal_nb.cli', *map(str, args)]
    return subprocess.run(command, cwd=cwd, env=env, capture_output=True, text=True, timeout=300)

def called(*args):
    "The same in this process"
    return CliRunner().invoke(app, [str(a) for a in args])

def files(folder):
    return {str(p.relative_to(folder)): p.stat().st_mtime_ns for p in Path(folder).rglob('*') if p.is_file()}

def outputs(notebook):
    cells = json.loads(notebook.read_text('utf-8'))['cells']
    return [o for c in cells for o in c.get('outputs', [])]

# Light

HEAVY = ('torch', 'timm', 'pandas', 'matplotlib', 'plotly', 'papermill', 'IPython')

@pytest.mark.parametrize('args', [['--help'], ['run', '--help'], ['config'], ['run', '--out', 'x', '--preset', 'nyu']])
def test_nothing_heavy_is_imported(args, tmp_path):
    code = f"""
import sys
from partal_nb.cli import app
try: app({args})
except SystemExit as e: print('exit', e.code)
print('heavy', [m for m in {HEAVY} if m in sys.modules])
"""
    r = subprocess.run([sys.executable, '-c', code], cwd=tmp_path, capture_output=True, text=True, timeout=60)
    assert r.stdout.splitlines()[-2:] == [f'exit {2 if "nyu" in args else 0}', 'heavy []'], (r.stdout, r.stderr)

@pytest.mark.parametrize('name', PRESETS)
def test_config(name):
    "Every field with its value and its reason"
    r = called('config', '--preset', name, '--set', 'seed=7')
    assert r.exit_code == 0
    rows = [line.partition(' = ') for line in r.stdout.splitlines()]
    found = {field.strip(): json.loads(rest.split(' # ')[0]) for field, _, rest in rows}
    assert RunConfig(**found) == preset(name, seed=7)
    assert all(rest.split(' # ', 1)[1].strip() for _, _, rest in rows)

# From a folder of pictures to a report

def nyu_folder(path)->Path:
    "Rooms in the layout that NYUv2 is often kept in"
    ids = dict(train=[str(i) for i in range(10)], test=[str(i) for i in range(100, 104)])
    for f in ('rgb', 'seg40', 'depth', 'normals'): (path/f).mkdir(parents=True)
    for split, names in ids.items():
        (path/f'{split}.txt').write_text('\n'.join(names))
        for i in names:
            s = render_room(int(i), 48, 64)
            normals = np.where(s['normals'].any(2, keepdims=True), np.round((s['normals'] + 1)*127.5), 0)
            labels = dict(rgb=s['rgb'], seg40=(s['semseg'] + 1).astype(np.uint8), normals=normals.astype(np.uint8),
                          depth=np.round(s['depth']*1000).astype(np.uint16))
            for f, a in labels.items(): (path/f'{f}/{i}.png').write_bytes(png_bytes(a.squeeze()))
    return path

@pytest.fixture(scope='module')
def place(tmp_path_factory): return tmp_path_factory.mktemp('place')

@pytest.fixture(scope='module')
def prepared(place):
    source = nyu_folder(place/'nyu')
    return partal('prepare', source, 'data', cwd=place), source

@pytest.fixture(scope='module')
def command(place, prepared):
    "Two strategies on the prepared data"
    return ['run', '--preset', 'nyuv2_small', '--data', 'data', '--strategy', 'partal', '--against', 'random',
            '--out', 'runs/two', *SETTINGS]

@pytest.fixture(scope='module')
def failed(place, command):
    "The first try meets a broken label"
    label = place/'data/semseg/5.png'
    good = label.read_bytes()
    label.write_bytes(good[:100])
    r = partal(*command, cwd=place, PARTAL_CACHE=str(place/'cache'))
    left = files(place/'runs/two')
    label.write_bytes(good)
    return r, left, outputs(place/'runs/two/al_run.part.ipynb')

@pytest.fixture(scope='module')
def finished(place, command, failed): return partal(*command, cwd=place, PARTAL_CACHE=str(place/'cache'))

def test_prepare(place, prepared):
    r, source = prepared
    assert (r.returncode, r.stdout) == (0, 'NYUv2: 10 train, 4 test images, tasks semseg, depth, normals\n')
    before = files(place/'data')
    assert called('prepare', source, place/'data').exit_code == 0 and files(place/'data') == before
    assert (Dataset(place/'data').label('3', 'semseg')[..., 0] == render_room(3, 48, 64)['semseg']).all()

def test_a_notebook_that_fails(failed):
    r, left, cells = failed
    assert r.returncode == 2 and list(left) == ['al_run.part.ipynb']
    *_, said, where = r.stderr.splitlines()
    fault = 'data/semseg/5.png (task semseg): not a whole image (100 bytes)'
    assert f'partal: the notebook stopped with ValueError: {fault}' in said
    assert where.endswith('runs/two/al_run.part.ipynb')
    assert [o['ename'] for o in cells if o['output_type'] == 'error'] == ['ValueError']

def test_run(place, finished):
    "The run that failed is resumed, and ends with a notebook that shows all of it"
    r, out = finished, place/'runs/two'
    assert r.returncode == 0, r.stderr
    assert r.stdout.splitlines()[-1] == 'runs/two'
    assert [len(read_journal(f)) for f in (out, out/'random')] == [3, 3]
    assert not [f for f in files(out) if 'part' in f]
    shown = outputs(out/'al_run.ipynb')
    assert not [o for o in shown if o['output_type'] == 'error']
    kinds = [kind for o in shown for kind in o.get('data', {})]
    # two pictures of photographs, and one beside each of the three figures
    assert sum(k.startswith('image/') for k in kinds) == 2 + 3 and kinds.count('text/html') >= 3
    assert kinds.count('application/vnd.plotly.v1+json') == 3
    about = json.loads((out/'config.json').read_text())
    assert about['command'].startswith('partal run --preset nyuv2_small --data data')
    assert about['config']['strategy'] == 'partal'

def test_a_finished_run_is_left_alone(place, command, finished):
    before = files(place/'runs')
    r = partal(*command, cwd=place, PARTAL_CACHE=str(place/'cache'))
    assert (r.returncode, r.stdout, r.stderr) == (0, 'already finished\nruns/two\n', '')
    assert files(place/'runs') == before

def test_report(place, finished):
    out, page = place/'runs/two', place/'report.html'
    r = called('report', out, out/'random', '--out', page)
    assert (r.exit_code, r.stdout) == (0, f'{page}\n'), r.stderr
    page = page.read_text('utf-8')
    assert '<li>two: partal, seed 0, on NYUv2' in page and '<li>random: random, seed 0, on NYUv2' in page
    assert 'src="http' not in page

# What can be wrong

def refused(r, *says):
    "Exit code 2 and one line, perhaps with an indented list"
    assert r.exit_code == 2 and not isinstance(r.exception, Exception), (r.exception, r.stdout, r.stderr)
    first, *more = r.stderr.splitlines()
    assert first.startswith('partal: ') and all(l.startswith('  ') for l in more), r.stderr
    assert 'Traceback' not in r.stdout + r.stderr
    for text in says: assert text in r.stderr, r.stderr

@pytest.fixture(scope='module')
def rooms(tmp_path_factory):
    "A cache that has the rooms of `TINY`, so that no bar comes between"
    with pytest.MonkeyPatch.context() as m:
        m.setenv('PARTAL_CACHE', str(tmp_path_factory.mktemp('cache')))
        open_data('', *(TINY[k] for k in ('pool_images', 'test_images', 'height', 'width')), progress=False)
        yield Path(os.environ['PARTAL_CACHE'])

@pytest.mark.parametrize('args,says', [
    (['--set', 'learning_rate=1'], ["unknown config keys ['learning_rate']; there are ['data', 'tasks'", "'lr'"]),
    (['--set', 'lr'], ["--set 'lr': expected field=value"]),
    (['--set', 'lr=fast'], ["config lr: expected float, got 'fast'"]),
    (['--set', 'lr=NaN'], ['config lr: expected a finite number']),
    (['--set', 'rounds=1.5'], ['config rounds: expected int, got 1.5']),
    (['--set', 'rounds=-1'], ['config rounds: expected at least 0, got -1']),
    (['--set', 'dropout=1'], ['a share in [0, 1)']),
    (['--set', 'train_by=hours'], ["there are ['epochs', 'steps', 'presentations']"]),
    (['--set', 'tasks=["depth", "depth"]'], ['named twice']),
    (['--set', 'tasks=depth'], ['config tasks: expected a list of names, e.g. ["depth"], got "depth"']),
    (['--set', 'tasks=3'], ['config tasks: expected a list of names, e.g. ["depth"], got 3']),
    (['--set', 'tasks=["albedo"]'], ["has no task ['albedo']; there are ['semseg', 'depth'"]),
    (['--set', 'encoder=resnet_18'], ["unknown encoder 'resnet_18'; expected 'lite0' or a timm name such as ["]),
    (['--set', 'start_images=11'], ['start_images=11, but only 10 images of the pool']),
    (['--set', 'rounds=9'], ['the run would buy 63']), (['--set', 'also=["x"]'], ["unknown ['x']"]),
    (['--import', 'mine.py'], ['plug-in', 'mine.py: expected a Python file', 'give its path with --import']),
    (['--import', 'no_such_module'], ['plug-in no_such_module: no such module; install it']),
    (['--set', 'device=gpu'], ["unknown device 'gpu': expected auto, cpu"]),
    (['--set', 'seed=3'], ['use --seed instead']), (['--set', 'strategy=random'], ['use --strategy instead']),
    (['--set', 'data=rooms'], ['use --data instead']), (['--set', 'preset=demo'], ['use --preset instead']),
    (['--seed', '-1'], ['config seed: expected at least 0']),
    (['--strategy', 'greedy'], ["unknown strategy 'greedy'; there are ['bald_pairs'"]),
    (['--against', 'greedy'], ["unknown strategy 'greedy'; there are ["]),
    (['--against', 'partal'], ['--against partal']), (['--preset', 'nyu'], ["unknown preset 'nyu'; there are ['demo'"]),
    (['--preset', 'nyuv2'], ['--data FOLDER']), (['--data', 'nowhere'], ['--data nowhere: no such folder']),
    (['-k', 'nosuchkernel'], ["no Jupyter kernel 'nosuchkernel'; there are [",
                              '`partal kernel install --name nosuchkernel` makes one'])])
def test_bad_input(args, says, rooms, tmp_path, monkeypatch):
    "Reported before anything is made"
    monkeypatch.setenv('PARTAL_CACHE', str(rooms))
    monkeypatch.chdir(tmp_path)
    refused(called('run', '--out', 'out', *SETTINGS, *args), *says)
    assert not list(tmp_path.iterdir())

def test_bad_input_outside(tmp_path):
    "The same through the real command: one line, no traceback"
    r = partal('run', '--out', 'out', *SETTINGS, '--strategy', 'greedy', cwd=tmp_path)
    assert (r.returncode, r.stdout, r.stderr.count('\n')) == (2, '', 1)
    assert r.stderr.startswith("partal: unknown strategy 'greedy'")
    assert not list(tmp_path.iterdir())

def test_out_is_a_file(rooms, tmp_path, monkeypatch):
    monkeypatch.setenv('PARTAL_CACHE', str(rooms))
    (tmp_path/'out').write_text('mine')
    refused(called('run', '--out', tmp_path/'out', *SETTINGS), str(tmp_path/'out'))
    assert (tmp_path/'out').read_text() == 'mine'

def test_a_folder_of_another_run(place, command, finished, monkeypatch):
    "Reported before the notebook starts, and before it would take the place of the one that is there"
    before = files(place/'runs')
    monkeypatch.chdir(place)
    other = "runs/two holds a run of another configuration; it has {'lr': 0.001}: choose another --out"
    refused(called(*command, '--set', 'lr=0.5'), other)
    assert files(place/'runs') == before

def test_bad_folders(tmp_path):
    refused(called('prepare', tmp_path/'nowhere', tmp_path/'x'), 'is in no known layout, found nothing')
    refused(called('report', tmp_path/'nowhere', '--out', tmp_path/'r.html'), 'nowhere')
    assert not list(tmp_path.iterdir())

# Kernels

def test_kernel_install():
    "A kernel of this Python; afterward it is gone again"
    r = called('kernel', 'install', '--name', 'partal-test-cli', '--cuda', '1')
    assert r.exit_code == 0, r.stderr
    folder = Path(r.stdout.splitlines()[0].removeprefix('kernel partal-test-cli: '))
    try:
        spec = json.loads((folder/'kernel.json').read_text())
        assert folder == Path(sys.prefix)/'share/jupyter/kernels/partal-test-cli'
        assert Path(spec['argv'][0]).parent == BIN
        assert spec['env'] == dict(CUDA_VISIBLE_DEVICES='1', CUDA_DEVICE_ORDER='PCI_BUS_ID')
    finally: shutil.rmtree(folder)
    refused(called('kernel', 'install', '--cuda', 'first'), "--cuda 'first': expected the number of a GPU")

def test_a_kernel_that_dies(rooms, tmp_path):
    "As one does that the system kills for its memory"
    folder = tmp_path/'jupyter/kernels/mortal'
    folder.mkdir(parents=True)
    code = 'import os, threading; threading.Timer(3, os._exit, [9]).start()'
    code += '; from ipykernel import kernelapp; kernelapp.launch_new_instance()'
    spec = dict(argv=[sys.executable, '-c', code, '-f', '{connection_file}'], display_name='mortal', language='python')
    (folder/'kernel.json').write_text(json.dumps(spec))
    env = dict(JUPYTER_PATH=str(tmp_path/'jupyter'), PARTAL_CACHE=str(rooms))
    r = partal('run', '--out', 'out', *SETTINGS, '-k', 'mortal', cwd=tmp_path, **env)
    assert r.returncode == 1 and 'Traceback' not in r.stderr and 'partal: Kernel died' in r.stderr
    assert 'perhaps for lack of memory; the same command resumes from the last finished step' in r.stderr
    assert r.stderr.splitlines()[-1].endswith('out/al_run.part.ipynb')
    assert not (tmp_path/'out/al_run.ipynb').exists()

def test_the_template_belongs_to_this_checkout():
    assert template('al_run') == Path(__file__).parents[1]/'nbs/runs/al_run.ipynb'
