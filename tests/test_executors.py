"One study through processes here, SLURM and Dask: interrupted, preempted, a worker lost, and the journals are the same"
import json
import os
import random
import shlex
import signal
import subprocess
import sys
import time

import psutil
import pytest

from partal_nb.config import preset
from partal_nb.runs.folder import RunFolder, is_finished
from partal_nb.runs.journal import read_journal
from partal_nb.runs.sweep import grid

TINY = dict(pool_images=10, test_images=4, height=48, width=64, features=8, encoder='test_efficientnet',
            pretrained=False, start_images=3, step_pairs=6, rounds=1, train_by='steps', train_for=4, passes=2,
            device='cpu')
SETTINGS = [x for k, v in TINY.items() for x in ('--set', f'{k}={v if isinstance(v, str) else json.dumps(v)}')]
COMMAND = [sys.executable, '-m', 'partal_nb.cli', 'sweep', '--strategies', 'partal,random', '--out', 'study', *SETTINGS]

@pytest.fixture(scope='module')
def cache(tmp_path_factory): return tmp_path_factory.mktemp('cache')

pytestmark = pytest.mark.usefixtures('ctrl_c_arrives')

def two_cores(): # so that a run has one thread wherever it is made
    if hasattr(os, 'sched_setaffinity'): os.sched_setaffinity(0, sorted(os.sched_getaffinity(0))[:2])

def start(cwd, cache, *args, **env):
    env = dict(os.environ, OMP_NUM_THREADS='1', NO_COLOR='1', TERM='dumb', PARTAL_CACHE=str(cache), **env)
    return subprocess.Popen([*COMMAND, *args], cwd=cwd, env=env, text=True, encoding='utf-8', preexec_fn=two_cores,
                            stdout=subprocess.PIPE, stderr=subprocess.PIPE)

def end(process):
    out, err = process.communicate(timeout=400)
    return process.returncode, out, err

def below(process, word):
    "Its processes that have `word` in their command"
    def words(p):
        try: return p.cmdline()
        except psutil.Error: return []
    try: found = psutil.Process(process.pid).children(recursive=True)
    except psutil.Error: return []
    return [p for p in found if any(word in w for w in words(p))]

def until(found, process):
    "Until `found()` is true of a sweep that still runs"
    while not (got := found()):
        assert process.poll() is None, process.communicate()
        time.sleep(.05)
    return got

def running(process, run=''):
    "The processes that make runs"
    return [p for p in below(process, f'study/{run}') if 'partal_nb.runs.executors' in p.cmdline()]

def runs(cwd, seeds): return grid('demo', ['partal', 'random'], seeds, cwd/'study', **TINY)

def journals(cwd, seeds):
    "Without what is measured in seconds and bytes"
    def line(l): return {k: v for k, v in l.items() if k not in ('seconds', 'peak_memory_mb')}
    return {f.name: [line(l) for l in read_journal(f)] for f in runs(cwd, seeds)}

@pytest.fixture(scope='module')
def reference(): return {}

SEEDS = int(os.environ.get('PARTAL_SWEEP_SEEDS', 1)) # 4 make the eight runs, which takes ten minutes on two cores

PLACES = dict(here=[], slurm=['--on', 'slurm:local'], dask=['--on', 'dask:local'])

@pytest.mark.parametrize('place', PLACES)
def test_runs_killed_and_resumed(place, tmp_path, cache, reference):
    "SIGKILL hits the sweep at any moment after it has begun; the same command finishes it, with the same journals"
    pytest.importorskip('submitit' if place == 'slurm' else 'distributed')
    words = ['--seeds', f'0-{SEEDS - 1}', '--jobs', '2', *PLACES[place]]
    first = start(tmp_path, cache, *words)
    until(lambda: running(first), first)
    delay = random.uniform(0, 8)
    time.sleep(delay)
    first.kill()
    first.communicate()
    code, out, err = end(start(tmp_path, cache, *words))
    assert code == 0, (delay, out, err)
    assert all(is_finished(c, f) for f, c in runs(tmp_path, range(SEEDS)).items())
    found = journals(tmp_path, range(SEEDS))
    assert len(found) == 2*SEEDS and found == reference.setdefault('journals', found), delay

@pytest.mark.long
def test_slurm_preempted_and_stopped(tmp_path, cache):
    "A preempted job is called again; Ctrl-C ends jobs and runs, and the same command resumes"
    pytest.importorskip('submitit')
    words = ['--seeds', '0', '--on', 'slurm:local', '--jobs', '1']
    sweep = start(tmp_path, cache, *words)
    before, = until(lambda: running(sweep), sweep)
    job, = below(sweep, 'submitit.core._submit')
    job.send_signal(signal.SIGUSR2) # as SLURM does before it takes the node away
    after = until(lambda: [p for p in running(sweep) if p != before], sweep)
    assert not psutil.wait_procs([before], timeout=30)[1]
    sweep.send_signal(signal.SIGINT)
    code, out, err = end(sweep)
    assert code == 130 and 'this resumes them' in err and 'start 2' not in out, (out, err)
    assert not psutil.wait_procs(after, timeout=30)[1] and not list((tmp_path/'study').glob('.sweep-*'))
    assert end(start(tmp_path, cache, *words))[0] == 0
    assert all(is_finished(c, f) for f, c in runs(tmp_path, [0]).items())

@pytest.mark.long
def test_a_slurm_job_that_dies(tmp_path, cache):
    "SIGKILL hits the process of SLURM's job: its run is started again by the sweep, and done"
    pytest.importorskip('submitit')
    sweep = start(tmp_path, cache, '--strategies', 'random', '--seeds', '0', '--on', 'slurm:local', '--jobs', '1')
    left = until(lambda: running(sweep), sweep)
    for job in below(sweep, 'submitit.core._submit'): job.kill()
    code, out, err = end(sweep)
    assert code == 0 and 'start 2' in out, (out, err)
    assert not psutil.wait_procs(left, timeout=30)[1]
    assert is_finished(preset('demo', strategy='random', **TINY), tmp_path/'study/random-0')

REFUSING = '#!/bin/sh\necho "sbatch: error: invalid partition specified: gpux" >&2; exit 1\n'

def test_a_queue_that_refuses(tmp_path, cache):
    "Its words reach the user, and what is done stays done"
    pytest.importorskip('submitit')
    for name in ('sbatch', 'srun'):
        program = tmp_path/'bin'/name
        program.parent.mkdir(exist_ok=True)
        program.write_text(REFUSING)
        program.chmod(0o755)
    words = ['--seeds', '0', '--on', 'slurm', '--partition', 'gpux', '--tries', '1']
    code, out, err = end(start(tmp_path, cache, *words, PATH=f"{tmp_path/'bin'}:{os.environ['PATH']}"))
    assert code == 1 and out.count('invalid partition specified: gpux') == 2, (out, err)
    assert 'failed with 2 of 2 runs unfinished; this resumes them' in err and 'Traceback' not in err
    asked = [p.read_text() for p in (tmp_path/'study/.submitit').glob('*.sh')]
    assert asked and all('--partition=gpux' in text and '--array=0-1' in text for text in asked), asked

def dask(*words, cwd):
    command = [sys.executable, '-m', 'dask', *words]
    return subprocess.Popen(command, cwd=cwd, preexec_fn=two_cores, env=dict(os.environ, OMP_NUM_THREADS='1'),
                            stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)

@pytest.fixture
def cluster(tmp_path):
    "A scheduler and two workers that offer a GPU each, in processes of their own"
    pytest.importorskip('distributed')
    where = tmp_path/'scheduler.json'
    started = [dask('scheduler', '--host', '127.0.0.1', '--port', '0', '--no-dashboard', '--scheduler-file', where,
                    cwd=tmp_path)]
    started += [dask('worker', '--scheduler-file', where, '--nthreads', '1', '--no-nanny', '--no-dashboard',
                     '--resources', 'GPU=1', cwd=tmp_path) for _ in range(2)]
    while not where.exists() or not where.read_text(): time.sleep(.1)
    yield json.loads(where.read_text())['address'], started[1:]
    for process in started: process.kill()
    for process in started: process.wait()

def test_a_dask_worker_that_dies(cluster, tmp_path, cache):
    "The run that it made goes on elsewhere, from where it was"
    address, workers = cluster
    sweep = start(tmp_path, cache, '--seeds', '0', '--on', f'dask:{address}')
    lost = until(lambda: next((w for w in workers if running(w)), None), sweep)
    left = running(lost)
    lost.kill()
    code, out, err = end(sweep)
    assert code == 0 and 'start 2' not in out, (out, err)
    assert not psutil.wait_procs(left, timeout=30)[1]
    assert all(is_finished(c, f) for f, c in runs(tmp_path, [0]).items())

def test_in_a_kernel(tmp_path, cache):
    "Each run is an executed notebook, as with `partal run -k`"
    words = ['--strategies', 'random', '--seeds', '0', '--jobs', '1', '-k', 'python3', '--set', 'rounds=0']
    code, out, err = end(start(tmp_path, cache, *words))
    assert code == 0, (out, err)
    assert (tmp_path/'study/random-0/al_run.ipynb').exists() and len(read_journal(tmp_path/'study/random-0')) == 1
    command = RunFolder(tmp_path/'study/random-0').about['command']
    assert shlex.split(command)[-2:] == ['-k', 'python3']
    assert preset('demo', strategy='random', **TINY | dict(rounds=0)) == RunFolder(tmp_path/'study/random-0').config
