"Machines as they are: no git, no home folder, a locale that is not UTF-8, names of folders that are hard to spell"
import json
import os
import socket
import subprocess
import sys
import tempfile
import time
from dataclasses import asdict, replace
from pathlib import Path

import psutil
import pytest
from test_projects import as_nobody

from partal_nb.config import config_hash, preset
from partal_nb.core import cache_dir, write_atomic, write_json
from partal_nb.explore.run import open_run_view
from partal_nb.reports.page import write_report
from partal_nb.runs import loop
from partal_nb.runs.folder import RunFolder
from partal_nb.runs.journal import read_journal

TINY = dict(pool_images=10, test_images=4, height=48, width=64, features=8, encoder='test_efficientnet',
            pretrained=False, start_images=3, step_pairs=6, rounds=1, train_by='steps', train_for=2, passes=2,
            device='cpu')
SETTINGS = [x for k, v in TINY.items() for x in ('--set', f'{k}={v if isinstance(v, str) else json.dumps(v)}')]
LATIN_1 = dict(LC_ALL='C', PYTHONUTF8='0', PYTHONCOERCECLOCALE='0') # no locale is sure to be installed but this

def bare(cwd, *words, **env):
    "A command where PATH has no git and the environment hardly anything"
    python = [sys.executable, '-m', 'partal_nb.cli']
    env = dict(PATH=str(cwd/'bin'), PYTHONPATH=os.environ.get('PYTHONPATH', ''), OMP_NUM_THREADS='1') | env
    return subprocess.run([*python, *words], cwd=cwd, env=env, capture_output=True, timeout=900)

def test_a_bare_machine(tmp_path):
    "A run as a notebook, then its report, in a folder of 480 characters (SQLite ends at 512), braces, spaces, umlauts"
    deep = Path('Läufe {a} und {b:d}', *['x'*80]*4, 'Übergröße')
    deep /= 'y'*(480 - len(str((tmp_path/deep)).encode()) - 1)
    made = bare(tmp_path, 'run', '--out', str(deep), '--strategy', 'random', *SETTINGS, **LATIN_1,
                PARTAL_CACHE=str(cache_dir()), HOME=str(tmp_path))
    assert made.returncode == 0, made.stderr[-3000:]
    folder = RunFolder(tmp_path/deep)
    assert (folder.path/'al_run.ipynb').is_file() and len(str(folder.path).encode()) == 480
    assert len(folder.journal()) == 2 and folder.about['commit'].startswith('version ')
    assert 'Übergröße' in folder.about['command']
    page = bare(tmp_path, 'report', str(deep), '--out', 'Bericht ä.html', **LATIN_1, HOME=str(tmp_path))
    assert page.returncode == 0, page.stderr[-3000:]
    assert '<html' in (tmp_path/'Bericht ä.html').read_text('utf-8')

def test_a_sweep_of_such_a_folder(tmp_path):
    out = tmp_path/'Läufe {a}'
    made = bare(tmp_path, 'sweep', '--strategies', 'random', '--seeds', '0', '--out', str(out), *SETTINGS, **LATIN_1,
                PARTAL_CACHE=str(cache_dir()), HOME=str(tmp_path))
    assert made.returncode == 0 and len(read_journal(out/'random-0')) == 2, made.stderr[-3000:]

def test_nowhere_to_keep_data(tmp_path):
    "As with `docker run -u 12345`, where the user has no home folder: the cure is named, and works"
    code = 'from partal_nb.core import cache_dir; print(cache_dir())'
    with tempfile.TemporaryDirectory() as place:
        os.chmod(place, 0o777)
        def ask(**env):
            user = dict(user=12345, group=12345) if os.getuid() == 0 else {}
            env = dict(PYTHONPATH=str(Path(__file__).parents[1])) | env
            words = [sys.executable, '-c', code]
            return subprocess.run(words, env=env, cwd=place, capture_output=True, text=True, **user)
        try: found = ask(HOME='/nowhere')
        except PermissionError: pytest.skip('another user may not read this Python')
        assert found.returncode == 1
        assert 'set PARTAL_CACHE to a folder that can be written' in found.stderr, found.stderr
        assert ask(PARTAL_CACHE=f'{place}/cache').stdout == f'{place}/cache\n'

def test_two_hosts_write_beside_each_other(tmp_path, monkeypatch):
    "Two processes with one number, on two machines of one disk: neither has the other's unfinished file"
    parts = []
    monkeypatch.setattr(os, 'replace', lambda part, path: parts.append(Path(part).name))
    for host in ('node1', 'node2'):
        monkeypatch.setattr(socket, 'gethostname', lambda: host)
        write_atomic(tmp_path/'a.json', b'{}')
    assert len(set(parts)) == 2 and [name.split('-')[0] for name in parts] == ['.a.json.node1', '.a.json.node2']

def test_what_is_checked_first_needs_no_network_library():
    "`partal run` and `partal sweep` refuse bad input before PyTorch and timm are imported, which takes seconds"
    code = '''
import sys, tempfile
from partal_nb.config import preset
from partal_nb.runs.checks import check_run
check_run(preset('demo', **%r), tempfile.mkdtemp() + '/run', progress=False)
print([m for m in ('torch', 'timm', 'pandas', 'matplotlib', 'scipy.stats') if m in sys.modules])
''' % {k: v for k, v in TINY.items() if k not in ('encoder', 'pretrained')}
    found = subprocess.run([sys.executable, '-c', code], capture_output=True, text=True)
    assert found.stdout == '[]\n', found.stderr

def interrupted(cwd, *words, at): # a command, killed with its kernel as soon as a file is there
    made = subprocess.Popen([sys.executable, '-m', 'partal_nb.cli', *words], cwd=cwd,
                            stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True)
    while not at.exists():
        assert made.poll() is None, made.stderr.read()
        time.sleep(.02)
    for process in [*psutil.Process(made.pid).children(recursive=True), made]: process.kill()
    made.communicate()

def test_tracked_interrupted_and_resumed(tmp_path):
    "TensorBoard reads each number of the journal once, though the run was killed after its first round"
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
    words = ['run', '--out', 'demo', '--strategy', 'random', '--no-pictures', '--track', 'tensorboard', *SETTINGS]
    folder = RunFolder(tmp_path/'demo')
    interrupted(tmp_path, *words, at=folder.journal_file)
    assert len(folder.journal()) == 1
    made = subprocess.run([sys.executable, '-m', 'partal_nb.cli', *words], cwd=tmp_path, capture_output=True, text=True)
    assert made.returncode == 0, made.stderr[-3000:]
    events = EventAccumulator(str(folder.path/'tracking/tensorboard')).Reload()
    def seen(tag): return [(e.step, e.value) for e in events.Scalars(tag)]
    lines = folder.journal()
    assert len(lines) == 2 and seen('metrics/depth/rmse') == [
        (r, pytest.approx(line['metrics']['depth']['rmse'], rel=1e-6)) for r, line in enumerate(lines)]
    assert seen('cost') == [(r, pytest.approx(line['cost'])) for r, line in enumerate(lines)]
    assert len(seen('curve')) == sum(len(line['curve']) for line in lines) > 0

def open_to_all(folder): # pytest's own folders are for their owner alone
    for f in [folder, *folder.rglob('*')]: f.chmod(0o555 if f.is_dir() else 0o444)
    for parent in folder.parents:
        if Path(tempfile.gettempdir()) in parent.parents: parent.chmod(0o755)

def test_a_read_only_run_can_be_looked_at(tmp_path, monkeypatch):
    "A report and a view; nothing is written into its folder, and whoever would resume it is told where that goes"
    monkeypatch.setenv('PARTAL_CACHE', str(tmp_path/'cache'))
    longer = preset('demo', strategy='random', **TINY)
    folder = RunFolder(loop.run(replace(longer, rounds=0), tmp_path/'a run', progress=False))
    write_json(folder.about_file, folder.about | dict(config=asdict(longer), hash=config_hash(longer))) # one is left
    def look(page):
        assert open_run_view(folder, progress=False).rounds == folder.journal()
        assert '<html' in write_report([folder], page).read_text('utf-8')
    look(tmp_path/'mine.html')
    open_to_all(folder.path)
    (tmp_path/'out').mkdir()
    (tmp_path/'out').chmod(0o777)
    before = sorted(folder.path.rglob('*'))
    def another():
        look(tmp_path/'out/page.html')
        with pytest.raises(PermissionError, match='is read-only: it can be looked at, but not written'):
            loop.run(longer, folder, progress=False)
    assert as_nobody(another) == 0
    assert sorted(folder.path.rglob('*')) == before
    for f in [folder.path, *folder.path.rglob('*')]: f.chmod(0o755 if f.is_dir() else 0o644)

WITHOUT_FLOCK = '''
import errno, fcntl, socket, sys
def flock(*_): raise OSError(errno.ENOSYS, 'this disk has no flock')
fcntl.flock = flock
socket.gethostname = lambda: sys.argv[2]
from partal_nb.runs.folder import FolderInUse, RunFolder
try:
    with RunFolder(sys.argv[1]).locked():
        print('mine', flush=True)
        sys.stdin.read()
except FolderInUse as e: print('in use', e)
'''

def test_a_disk_without_locks(tmp_path):
    "One process at a time all the same, and what a killed one left behind stops nobody on its machine"
    def start(host='node1'):
        words = [sys.executable, '-W', 'ignore', '-c', WITHOUT_FLOCK, tmp_path, host]
        return subprocess.Popen(words, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
    first = start()
    assert first.stdout.readline() == 'mine\n'
    assert start().communicate()[0].startswith('in use')
    first.kill()
    first.communicate()
    elsewhere = start('node2').communicate()[0] # where nobody can know that it was killed
    assert f'process, {first.pid} on node1 (if that was killed, remove {tmp_path}/.lock)' in elsewhere
    assert start().communicate()[0] == 'mine\n'
