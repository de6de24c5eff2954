"`partal sweep` from outside: stopped by Ctrl-C, by kill and by SIGKILL, its processes killed, plug-ins"
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import psutil
import pytest

from partal_nb.commands.common import parse_changes
from partal_nb.config import config_hash, preset
from partal_nb.runs.folder import RunFolder, is_finished
from partal_nb.runs.journal import read_journal
from partal_nb.runs.sweep import grid, run_command

TINY = dict(pool_images=10, test_images=4, height=48, width=64, features=8,
            encoder='test_efficientnet', pretrained=False, start_images=3, step_pairs=6, rounds=1,
            train_by='steps', train_for=10, passes=3, device='cpu')
SETTINGS = [x for k, v in TINY.items() for x in ('--set', f'{k}={v if isinstance(v, str) else json.dumps(v)}')]
COMMAND = ['sweep', '--strategies', 'partal,random', '--seeds', '0', '--out', 'study', *SETTINGS]

pytestmark = pytest.mark.usefixtures('ctrl_c_arrives')

@pytest.fixture(scope='module')
def cache(tmp_path_factory): return tmp_path_factory.mktemp('cache')

def words(p)->list[str]: # of a process; none if it is gone
    try: return p.cmdline()
    except psutil.Error: return []

class Sweep:
    "The real command in a process of its own"
    def __init__(self, cwd, cache, *args):
        env = dict(os.environ, COLUMNS='200', NO_COLOR='1', TERM='dumb', PARTAL_CACHE=str(cache))
        env['FORCE_COLOR'] = '1' # a kernel of Jupyter sets it
        self.process = subprocess.Popen([sys.executable, '-m', 'partal_nb.cli', *COMMAND, *args], cwd=cwd, env=env,
                                        text=True, stdout=subprocess.PIPE, stderr=subprocess.PIPE)

    def workers(self, of='study/'):
        return [p for p in psutil.Process(self.process.pid).children() if any(w.startswith(of) for w in words(p))]

    def wait_for(self, found):
        "Until `found()` is true of a sweep that still runs"
        while not (got := found()):
            assert self.process.poll() is None, self.process.communicate()
            time.sleep(.05)
        return got

    def end(self):
        out, err = self.process.communicate(timeout=300)
        return self.process.returncode, out, err

def runs(cwd): return grid('demo', ['partal', 'random'], [0], cwd/'study', **TINY)
def finished(cwd): return [is_finished(c, f) for f, c in runs(cwd).items()]
def gone(processes): return not psutil.wait_procs(processes, timeout=30)[1]

@pytest.mark.parametrize('sent,code', [(signal.SIGINT, 130), pytest.param(signal.SIGTERM, 130, marks=pytest.mark.long)])
def test_stopped_and_resumed(tmp_path, cache, sent, code):
    s = Sweep(tmp_path, cache)
    workers = s.wait_for(lambda: any(read_journal(f) for f in runs(tmp_path)) and s.workers())
    s.process.send_signal(sent)
    got, out, err = s.end()
    assert got == code and 'Traceback' not in out + err and gone(workers)
    resumes = err.splitlines()[-1].strip()
    assert 'stopped with' in err and resumes.startswith('partal sweep --strategies partal,random --seeds 0 --out study')
    done = {f: f.joinpath('journal.jsonl').read_bytes() for f in runs(tmp_path) if read_journal(f)}
    assert Sweep(tmp_path, cache).end()[0] == 0 and finished(tmp_path) == [True, True]
    assert all(f.joinpath('journal.jsonl').read_bytes().startswith(before) for f, before in done.items())

@pytest.mark.long
def test_killed(tmp_path, cache):
    "No process is left behind that would hold a folder"
    s = Sweep(tmp_path, cache)
    workers = s.wait_for(lambda: len(w := s.workers()) == 2 and w)
    s.process.kill()
    assert s.end()[0] == -signal.SIGKILL and gone(workers)
    code, out, _ = Sweep(tmp_path, cache).end()
    assert code == 0 and finished(tmp_path) == [True, True] and out.splitlines()[-1] == 'study/sweep.csv'

def test_a_process_that_dies_is_started_again(tmp_path, cache):
    s = Sweep(tmp_path, cache)
    s.wait_for(lambda: s.workers())[0].kill()
    code, out, err = s.end()
    assert code == 0 and finished(tmp_path) == [True, True]
    assert 'running, start 2, 0 of 2 rounds done; signal SIGKILL' in out
    assert not list((tmp_path/'study').glob('*.log'))

@pytest.mark.long
def test_one_that_always_dies(tmp_path, cache):
    "The others are finished, and what is left is reported"
    s = Sweep(tmp_path, cache, '--jobs', '1', '--tries', '2')
    first = s.wait_for(lambda: s.workers('study/partal-0'))[0]
    first.kill()
    s.wait_for(lambda: [w for w in s.workers('study/partal-0') if w != first])[0].kill()
    code, out, err = s.end()
    assert (code, finished(tmp_path)) == (1, [False, True])
    assert 'failed with 1 of 2 runs unfinished' in err and 'partal-0: failed, start 2' in out
    assert (tmp_path/'study/partal-0.log').exists()

def test_the_commands_make_the_same_runs(tmp_path):
    for folder, config in runs(tmp_path).items():
        words = run_command(config, folder)
        given = {words[i]: words[i + 1] for i in range(2, 10, 2)}
        changes = parse_changes([words[i + 1] for i, w in enumerate(words) if w == '--set'])
        again = preset(given['--preset'], strategy=given['--strategy'], seed=int(given['--seed']), **changes)
        assert config_hash(again) == config_hash(config)

MINE = """
import numpy as np
from partal_nb.uncertainty.acquisition import score
from partal_nb.select.top import top_pairs
from partal_nb.select.strategy import strategy

@score('dark')
def dark(models, arrays, pool, T, seed):
    "How dark an image is"
    return np.broadcast_to(1 - arrays.rgb.mean((1, 2, 3))[:, None]/255, pool.open.shape)

@strategy('darkest', needs='dark')
def darkest(scores, pool, budget, rng):
    "The darkest images first"
    return top_pairs(scores.norm, pool, budget, rng)
"""

def test_a_plug_in(tmp_path, cache):
    "A strategy and a score of one's own, through the command; the folder remembers where they came from"
    (tmp_path/'mine.py').write_text(MINE)
    code, out, err = Sweep(tmp_path, cache, '--strategies', 'darkest', '--import', 'mine.py').end()
    assert code == 0, err
    folder = RunFolder(tmp_path/'study/darkest-0')
    assert folder.about['imports'] == [str((tmp_path/'mine.py').resolve())]
    levels = folder.journal()[0]['uncertainty']
    assert levels['depth'] == levels['normals'] and 0 < levels['depth']['pool'] < 1
    code, out, err = Sweep(tmp_path, cache, '--strategies', 'darkest').end() # without the plug-in
    assert code == 2 and "unknown strategy 'darkest'" in err

SCRIPT = """
from partal_nb.config import preset
from partal_nb.select.strategy import get_strategy, strategy
from partal_nb.runs.sweep import sweep

@strategy('of_the_script', needs=None)
def of_the_script(*args): return get_strategy('random_pairs')(*args)

sweep({'study/x': preset('demo', strategy='of_the_script')})
"""

def test_a_strategy_in_the_script_itself(tmp_path):
    (tmp_path/'script.py').write_text(SCRIPT)
    r = subprocess.run([sys.executable, 'script.py'], cwd=tmp_path, capture_output=True, text=True, timeout=120)
    assert "strategy 'of_the_script' is defined in the script or notebook that is running" in r.stderr
    assert "sweep(runs, imports=['mine.py']), or partal sweep --import mine.py" in r.stderr
    assert not (tmp_path/'study').exists()
