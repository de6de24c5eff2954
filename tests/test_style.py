"The house style, as tests: one function per rule, one line per fault, and for every rule a planted fault that it finds"
import json
import re
import subprocess
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
NBS = sorted((ROOT/'nbs').glob('[0-9]*.ipynb'))
TEMPLATES = sorted((ROOT/'nbs/runs').glob('*.ipynb'))
EVERY = sorted((ROOT/'nbs').rglob('*.ipynb'))

def cells(p): return [(c['cell_type'], ''.join(c['source']), c) for c in json.loads(p.read_text('utf-8'))['cells']]
def module(p): return p.stem.split('_', 1)[1]
def number(p): return p.stem.split('_')[0]
def exported(src): return re.match(r'#\|\s*export\b', src)
def lines(src): return [l for l in src.splitlines() if l.strip()]

def opening(p):
    kind, src, _ = cells(p)[0]
    if kind != 'markdown' or not re.match(r'# .+\n\n> .+', src): yield 'cell 0 is not "# Title" and "> one sentence"'

def small(p, most=30):
    for i, (kind, src, _) in enumerate(cells(p)):
        if kind == 'code' and len(lines(src)) > most: yield f'cell {i} has {len(lines(src))} lines, at most {most}'

def narrow(p, most=150):
    for i, (kind, src, _) in enumerate(cells(p)):
        if kind == 'code' and exported(src) and (long := [len(l) for l in lines(src) if len(l) > most]):
            yield f'cell {i} exports a line of {max(long)} columns, at most {most}'

def explicit(p):
    for i, (kind, src, _) in enumerate(cells(p)):
        if kind == 'code' and exported(src) and 'import *' in src: yield f'cell {i} exports a wildcard import'

def upstream(p):
    known = {module(q): number(q) for q in NBS}
    for kind, src, _ in cells(p):
        if kind != 'code' or not exported(src): continue
        for m in re.findall(r'from partal_nb\.([\w.]+) import', src):
            if m not in known: yield f'imports {m}, which no notebook makes'
            elif known[m] >= number(p): yield f'imports {m} ({known[m]}), which is not upstream'

def proved(p, near=4):
    code = [src for kind, src, _ in cells(p) if kind == 'code']
    for i, src in enumerate(code):
        if not exported(src): continue
        for name in re.findall(r'^(?:def|class) ([a-zA-Z]\w*)', src, re.M):
            below = [s for s in code[i+1:] if not exported(s)][:near]
            if not any(name in s and ('test_' in s or 'assert' in s) for s in below): yield f'{name} is not tested within {near} cells'

def once(p):
    first = {}
    for i, (_, src, _) in enumerate(cells(p)):
        if first.setdefault(src, i) != i: yield f'cell {i} is a copy of cell {first[src]}'

def quiet(p, most=100_000):
    if 'widgets' in json.loads(p.read_text('utf-8'))['metadata']: yield 'stores widget state; execute with store_widget_state=False'
    for i, (_, _, c) in enumerate(cells(p)):
        for o in c.get('outputs', []):
            if 'application/vnd.jupyter.widget-view+json' in o.get('data', {}): yield f'cell {i} stores a widget view'
            if len(json.dumps(o)) > most: yield f'cell {i} stores {len(json.dumps(o))//1000} kB'

def runnable(p):
    tagged = [src for _, src, c in cells(p) if 'parameters' in c['metadata'].get('tags', [])]
    if len(tagged) != 1: yield f"{len(tagged)} cells are tagged `parameters`, papermill needs exactly one"
    for l in (l for src in tagged for l in lines(src)):
        if not re.match(r'\w+(:\w+)? ?= ?\S', l) and not l.startswith('#'): yield f'not one parameter a line: {l!r}'
    if any(c.get('outputs') or c.get('execution_count') for _, _, c in cells(p)): yield 'stores outputs; jupyter nbconvert --clear-output --inplace'

def portable(p):
    found = re.search(r'(?<![\w.~$}-])/(home|root|Users|work|tmp)/\w+', p.read_bytes().decode('utf-8', 'ignore'))
    if found: yield f'names a path of one machine: {found[0]}'

def generated(p):
    made = re.search(r'File to edit: (\S+\.ipynb)', p.read_text('utf-8'))
    if made and not (p.parent/made[1]).is_file(): yield f'its notebook {made[1]} is gone: delete the module'

def in_git():
    names = subprocess.run(['git', 'ls-files', '-z', '--cached', '--others', '--exclude-standard'], cwd=ROOT, check=True, capture_output=True).stdout
    return [p for n in names.decode().split('\0') if n and (p := ROOT/n).is_file()]

RULES = [(opening, NBS), (small, NBS), (narrow, NBS), (explicit, NBS), (upstream, NBS), (proved, NBS), (once, NBS), (quiet, EVERY), (runnable, TEMPLATES),
         (portable, in_git()), (generated, sorted((ROOT/'partal_nb').rglob('*.py')))]

@pytest.mark.parametrize('rule,files', RULES, ids=[rule.__name__ for rule, _ in RULES])
def test_style(rule, files):
    assert not [f'{p.relative_to(ROOT)}: {m}' for p in files for m in rule(p)]

def code(*lines, tags=(), outputs=()):
    return dict(cell_type='code', source='\n'.join(lines), metadata=dict(tags=list(tags)), outputs=list(outputs), execution_count=None)

GOOD = [dict(cell_type='markdown', source='# t\n\n> s', metadata={}), code('#| export', 'def f(): pass'), code('assert f() is None')]
VIEW = dict(data={'application/vnd.jupyter.widget-view+json': {}})
SET = code('seed = 0', 'out:str = ""', tags=['parameters'])
FAULTS = [
    (opening, 'is not "# Title"', [code('1')]),
    (small, 'has 31 lines', [code(*['1']*31)]),
    (narrow, '151 columns', [code('#| export', 'x'*151)]),
    (explicit, 'wildcard', [code('#| export', 'from math import *')]),
    (upstream, 'which no notebook makes', [code('#| export', 'from partal_nb.nowhere import x')]),
    (upstream, 'not upstream', [code('#| export', 'from partal_nb.core import Task')]),
    (proved, 'g is not tested', [code('#| export', 'def g(): pass'), code('g()')]),
    (once, 'is a copy of cell 0', [code('1'), code('1')]),
    (quiet, 'widget view', [code('1', outputs=[VIEW])]),
    (quiet, 'stores 100 kB', [code('1', outputs=[dict(text='x'*100_000)])]),
    (runnable, '0 cells are tagged', [code('seed = 0')]),
    (runnable, 'not one parameter a line', [code('for a in b: pass', tags=['parameters'])]),
    (runnable, 'stores outputs', [SET, code('1', outputs=[VIEW])]),
    (portable, 'one machine', [code('open("/ho' 'me/me/x")')])]

def notebook(path, cells, **metadata):
    path.write_text(json.dumps(dict(cells=cells, metadata=metadata, nbformat=4, nbformat_minor=5)))
    return path

@pytest.mark.parametrize('rule,says,planted', FAULTS, ids=[f'{rule.__name__}-{says}' for rule, says, _ in FAULTS])
def test_a_planted_fault_is_found(rule, says, planted, tmp_path):
    assert not list(rule(notebook(tmp_path/'99_good.ipynb', GOOD + [SET])))
    found = list(rule(notebook(tmp_path/'00_bad.ipynb', planted)))
    assert len(found) == 1 and says in found[0], found

def test_widget_state_and_orphans_are_found(tmp_path):
    assert 'widget state' in next(quiet(notebook(tmp_path/'00_bad.ipynb', GOOD, widgets={})))
    (tmp_path/'old.py').write_text('# AUTOGENERATED! DO NOT EDIT! File to edit: ../nbs/00_old.ipynb.\n')
    assert 'is gone' in next(generated(tmp_path/'old.py'))
