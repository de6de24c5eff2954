"""What README.md shows works: its Python runs, its commands exist with the options that are shown

A shell block marked ```bash run is executed as it stands. In any other a line must be a `make` target, a `partal`
command or one of `PLAIN`, and nothing is executed but `make -n` and `--help`, since a demo takes minutes.
"""
import json
import os
import re
import shlex
import subprocess
import sys
from dataclasses import asdict
from pathlib import Path

import pytest

from partal_nb.tasks import standard_task
from partal_nb.config import preset
from partal_nb.reports.headline import update_headline

ROOT = Path(__file__).parents[1]
PLAIN = {'git', 'cd', '.'} # and what follows `&&` on their line
HERE = f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"
ENV = dict(os.environ, PATH=HERE, COLUMNS='200', TERM='dumb', NO_COLOR='1')

def blocks(text): return [tuple(m) for m in re.findall(r'^```(\w+)([^\n]*)\n(.*?)^```$', text, re.M | re.S)]

def sh(*command, cwd=ROOT):
    return subprocess.run(command, cwd=cwd, env=ENV, capture_output=True, text=True, timeout=600)

def faults(line):
    "What is wrong with one line of a shell block"
    words = shlex.split(line, comments=True)
    if not words or words[0] in PLAIN: return
    if words[0] == 'make':
        for target in words[1:]:
            if '=' not in target and (r := sh('make', '-n', target)).returncode: yield f'{line}: {r.stderr.strip()}'
    elif words[0] == 'partal':
        parts = list(iter_commands(words[1:]))
        r = sh('partal', *parts, '--help')
        if r.returncode: yield f'{line}: {r.stderr.strip()}'
        for option in (w.split('=')[0] for w in words if w.startswith('-')):
            if re.search(rf'(?<!\S){re.escape(option)}(?![\w-])', r.stdout): continue
            yield f'{line}: `partal {" ".join(parts)}` has no option {option}'
    else: yield f'{line}: no check for {words[0]!r}'

def iter_commands(words):
    "The sub-command words before the first option"
    for w in words:
        if w.startswith('-'): return
        yield w

README = blocks((ROOT/'README.md').read_text('utf-8'))
SHOWN = [body for kind, mark, body in README if kind == 'bash' and 'run' not in mark.split()]
LINES = [line for body in SHOWN for line in body.splitlines() if line.strip()]

@pytest.mark.parametrize('line', LINES)
def test_shell_line(line): assert not list(faults(line))

@pytest.mark.parametrize('body', [body for kind, mark, body in README if kind == 'bash' and 'run' in mark.split()])
def test_shell_block(body, tmp_path):
    r = sh('bash', '-euo', 'pipefail', '-c', body, cwd=tmp_path)
    assert r.returncode == 0, r.stderr

def made_up_run(folder, strategy, rmse):
    "A run folder with made-up numbers, as far as reports read it"
    folder.mkdir(parents=True)
    task = standard_task('depth')
    about = dict(config=asdict(preset('demo', strategy=strategy)), data=dict(name='made up'), tasks=[asdict(task)])
    (folder/'config.json').write_text(json.dumps(about))
    metrics = dict(depth=dict(rmse=rmse))
    line = dict(round=0, labels=dict(depth=12), bought={}, cost=12., metrics=metrics, seconds=dict(train=1.))
    (folder/'journal.jsonl').write_text(json.dumps(line) + '\n')

def test_python(tmp_path):
    for i, strategy in enumerate(('partal', 'random')): made_up_run(tmp_path/'runs/demo'/strategy, strategy, 1. + i)
    (tmp_path/'readme.py').write_text('\n'.join(body for kind, _, body in README if kind == 'python'))
    r = sh(sys.executable, 'readme.py', cwd=tmp_path)
    assert r.returncode == 0, r.stderr

def test_headline_is_of_the_journals(tmp_path):
    "`make readme` would change nothing"
    copy = tmp_path/'README.md'
    copy.write_text((ROOT/'README.md').read_text('utf-8'), 'utf-8')
    assert update_headline(copy, ROOT/'nbs/runs/results') == (ROOT/'README.md').read_text('utf-8')

def test_the_first_screen_has_it_all():
    "What it is, one picture, how to get it, whether it helps, and three doors"
    lines = (ROOT/'README.md').read_text('utf-8').splitlines()
    assert len(lines) <= 150
    screen = '\n'.join(lines[:26])
    parts = ('![', '## Install', 'git clone', 'pip install', '## Does it help?', '±', 'Label my images', 'on a GPU',
             'Add a task')
    assert [part for part in parts if part not in screen] == []

def test_a_package_index_gets_absolute_links():
    "Beside the package's description there are no files"
    code = 'import setup; print(setup.absolute(open("README.md").read()))'
    with_stub = f'import setuptools; setuptools.setup = lambda **kw: None; {code}'
    r = sh(sys.executable, '-c', with_stub)
    links = re.findall(r'\]\(([^)]*)\)', r.stdout)
    assert len(links) > 10 and [u for u in links if not u.startswith(('https://', '#'))] == []

def test_every_notebook_is_named():
    text = (ROOT/'CONTRIBUTING.md').read_text('utf-8')
    assert not [p.name for p in sorted((ROOT/'nbs').glob('[0-9]*.ipynb')) if f'(nbs/{p.name})' not in text]

def test_how_long_is_what_is_allowed():
    "README contains no minutes that are not measured: an hour is where CI stops"
    assert 'gives it an hour' in (ROOT/'README.md').read_text('utf-8')
    assert 'timeout-minutes: 60\n' in (ROOT/'.github/workflows/test.yml').read_text('utf-8')

def test_there_is_something_to_check():
    assert len(LINES) >= 3 and sum(kind == 'python' for kind, *_ in README) >= 1

@pytest.mark.parametrize('line,message', [
    ('make tset', "No rule to make target 'tset'"), ('curl x', "no check for 'curl'"),
    ('partal run --sed 0', 'has no option --sed'), ('partal rnu', 'rnu')])
def test_a_planted_fault_is_found(line, message): assert message in next(faults(line))
