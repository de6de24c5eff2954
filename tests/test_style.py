"The house style, as tests: one function per rule, one line per fault, and for every rule a planted fault that it finds"
import ast
import builtins
import io
import json
import re
import subprocess
import tokenize
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

def definitions(src): return [n for n in ast.parse(src).body if isinstance(n, (ast.FunctionDef, ast.ClassDef))]

def single(p):
    for i, (kind, src, _) in enumerate(cells(p)):
        if kind == 'code' and exported(src) and len(definitions(src)) > 1:
            yield f'cell {i} exports {[n.name for n in definitions(src)]}, expected one definition'

def narrow(p, most=120):
    for i, (kind, src, _) in enumerate(cells(p)):
        if kind == 'code' and (long := [len(l) for l in lines(src) if len(l) > most]):
            yield f'cell {i} has a line of {max(long)} columns, at most {most}'

def narrow_file(p, most=120):
    for i, l in enumerate(p.read_text('utf-8').splitlines(), 1):
        if len(l) > most: yield f'line {i} has {len(l)} columns, at most {most}'

def short(p, most=400):
    n = len(p.read_text('utf-8').splitlines())
    if n > most: yield f'{n} lines, at most {most}: a module of more is two'

def unprivate(p):
    for i, (kind, src, _) in enumerate(cells(p)):
        if kind != 'code' or not exported(src): continue
        for n in ast.walk(ast.parse(src)):
            if isinstance(n, ast.ImportFrom) and (n.module or '').startswith('partal_nb'):
                private = [a.name for a in n.names if a.name[0] == '_']
                yield from (f'cell {i} imports {name}, which is private to {n.module}' for name in private)

# What a task is, is asked of its form: no comparison with the name of a form, a loss, a unit or a task.
WHAT_A_TASK_IS = re.compile(
    r"""\b(?:t|task|self\.task)\.(?:(?:form|kind|loss|unit) ?(?:[!=]=|(?:not )?in\b)|name ?[!=]= ?['"])""")
FORMS_AND_TASKS = 'forms', 'tasks'

def unbranched(p):
    if module(p) in FORMS_AND_TASKS: return
    for i, (kind, src, _) in enumerate(cells(p)):
        if kind != 'code' or not exported(src): continue
        for m in WHAT_A_TASK_IS.finditer(src):
            yield f'cell {i} asks what a task is ({m[0]}); that belongs into its form'

WORDS = { # what is not said -> the word for it; see the glossary
    r'(?:un|re)?labell\w+': 'labeled', r'licenc\w+': 'license', r'colour\w*': 'color', r'\bgrey\w*': 'gray',
    r'\bmetres?\b': 'meter', r'behaviour': 'behavior', r'neighbour': 'neighbor', r'normalis\w+': 'normalize',
    r'\bby lot\b': 'at random', r'\bforet(?:ell|old)\w*': 'predicted', r'\bunsure\w*': 'uncertain',
    r'\bopening price': 'image cost', r'\bopen pairs?\b': 'unlabeled pair',
    r'\bnats as they are\b': 'unnormalized scores',
    r'\bnot for sale\b': 'unavailable', r'\bbought up\b': 'fully labeled', r'\bdearer\b|\bdear\b': 'expensive',
    r'\bmade anew\b|\bbegun anew\b': 'recreated',
    r'\bsomebody who does not look\b': 'constant baseline', r'\bwhat came out\b': 'replication results',
    r'\bparcels?\b': 'submission', r'\bSpeaker\b': 'MessageEncoder', r"train_by=.?looks": 'presentations'}
OLD_SPELLINGS = { # where files of earlier versions are read, by module
    'config': ('looks',), 'data.dataset': ('licence',), 'data.folders': ('licence',), 'data.mat': ('licence',),
    'runs.folder': ('looks',), 'training.checkpoint': ('speaker',)}

RECORDED = re.compile(r'^- `partal run .*$', re.M) # commands of committed runs, word for word

def worded(p):
    old = OLD_SPELLINGS.get(module(p) if '_' in p.stem else '', ())
    texts = [src for _, src, _ in cells(p)] if p.suffix == '.ipynb' else [RECORDED.sub('', p.read_text('utf-8'))]
    for i, src in enumerate(texts):
        for wrong, right in WORDS.items():
            for m in re.finditer(wrong, src, re.I):
                if not any(o in m[0] for o in old): yield f'cell {i} says {m[0]!r}; the word is {right!r}'

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
            if any(name in s and ('test_' in s or 'assert' in s) for s in below): continue
            yield f'{name} is not tested within {near} cells'

def once(p):
    first = {}
    for i, (_, src, _) in enumerate(cells(p)):
        if first.setdefault(src, i) != i: yield f'cell {i} is a copy of cell {first[src]}'

def quiet(p, most=100_000):
    if 'widgets' in json.loads(p.read_text('utf-8'))['metadata']:
        yield 'stores widget state; execute with store_widget_state=False'
    for i, (_, _, c) in enumerate(cells(p)):
        for o in c.get('outputs', []):
            if 'application/vnd.jupyter.widget-view+json' in o.get('data', {}): yield f'cell {i} stores a widget view'
            if len(json.dumps(o)) > most: yield f'cell {i} stores {len(json.dumps(o))//1000} kB'

def runnable(p):
    tagged = [src for _, src, c in cells(p) if 'parameters' in c['metadata'].get('tags', [])]
    if len(tagged) != 1: yield f"{len(tagged)} cells are tagged `parameters`, papermill needs exactly one"
    for l in (l for src in tagged for l in lines(src)):
        if not re.match(r'\w+(:\w+)? ?= ?\S', l) and not l.startswith('#'): yield f'not one parameter a line: {l!r}'
    if any(c.get('outputs') or c.get('execution_count') for _, _, c in cells(p)):
        yield 'stores outputs; jupyter nbconvert --clear-output --inplace'

# Fields and methods are read through an object; a class that needs one of these names has a reason.
FIELDS = {
    'pool.Pool': ('open',), 'uncertainty.acquisition.ScoringPool': ('open',), # unlabeled pairs that can be bought
    'select.prices.Prices': ('open',),      # a key of the configuration: the image cost
    'annotate.query.Paint': ('hex',),       # a color, as `bytes.hex` writes it
    'annotate.submission.SubmissionFiles': ('bytes',), # of a file
    'explore.injection.Result': ('map',),   # of entropy
    'runs.ledger.State': ('round',)}        # a column of the ledger
OF_SITE = {'license', 'credits', 'copyright'} # which `site` adds, for people at a prompt
BUILTINS = {name for name in dir(builtins) if not name.startswith('_')} - OF_SITE

def bound(node)->list[str]: # names that a node of the tree binds in a function or module
    if isinstance(node, ast.arg): return [node.arg]
    if isinstance(node, ast.Name) and isinstance(node.ctx, ast.Store): return [node.id]
    if isinstance(node, ast.FunctionDef): return [node.name]
    if isinstance(node, (ast.Import, ast.ImportFrom)): return [a.asname or a.name for a in node.names]
    return []

def of_classes(tree)->list[tuple]: # (class, node) of every field and method, also of those that `@patch` adds
    found = []
    for n in ast.walk(tree):
        for member in getattr(n, 'body', []) if isinstance(n, ast.ClassDef) else []:
            targets = getattr(member, 'targets', None) or [getattr(member, 'target', member)]
            found += [(n.name, target) for target in targets]
        if isinstance(n, ast.FunctionDef) and any(getattr(d, 'id', '') == 'patch' for d in n.decorator_list):
            found.append((n.args.args[0].annotation.id, n))
    return found

def unshadowed(p):
    tree = ast.parse(p.read_text('utf-8'))
    place = '.'.join(p.relative_to(ROOT/'partal_nb').with_suffix('').parts) if ROOT in p.parents else p.stem
    members = of_classes(tree)
    for cls, n in members:
        taken = [name for name in bound(n) if name in BUILTINS and name not in FIELDS.get(f'{place}.{cls}', ())]
        yield from (f'{place}.{cls} has a field {name!r}, which is a built-in' for name in taken)
    fields = {id(n) for _, n in members}
    for n in (n for n in ast.walk(tree) if id(n) not in fields):
        yield from (f'line {n.lineno} shadows the built-in {name!r}' for name in bound(n) if name in BUILTINS)

def portable(p):
    found = re.search(r'(?<![\w.~$}-])/(home|root|Users|work|tmp)/\w+', p.read_bytes().decode('utf-8', 'ignore'))
    if found: yield f'names a path of one machine: {found[0]}'

def generated(p):
    made = re.search(r'File to edit: (\S+\.ipynb)', p.read_text('utf-8'))
    if made and not (p.parent/made[1]).is_file(): yield f'its notebook {made[1]} is gone: delete the module'

def in_git():
    command = ['git', 'ls-files', '-z', '--cached', '--others', '--exclude-standard']
    names = subprocess.run(command, cwd=ROOT, check=True, capture_output=True).stdout
    return [p for n in names.decode().split('\0') if n and (p := ROOT/n).is_file()]

PAGES = [p for p in EVERY if 'results' not in p.parts]
PAGES += [*sorted((ROOT/'nbs').glob('*.qmd')), ROOT/'README.md', ROOT/'CONTRIBUTING.md']
TESTS = sorted((ROOT/'tests').glob('*.py'))
MODULES = sorted(p for p in (ROOT/'partal_nb').rglob('*.py') if p.name != '_modidx.py')
RULES = [
    (opening, NBS), (small, NBS), (single, NBS), (narrow, NBS), (narrow_file, TESTS), (short, MODULES), (explicit, NBS),
    (upstream, NBS), (unprivate, NBS), (unbranched, NBS), (proved, NBS), (once, NBS), (quiet, EVERY),
    (runnable, TEMPLATES), (worded, PAGES), (portable, in_git()), (generated, MODULES),
    (unshadowed, MODULES)]

@pytest.mark.parametrize('rule,files', RULES, ids=[rule.__name__ for rule, _ in RULES])
def test_style(rule, files):
    assert not [f'{p.relative_to(ROOT)}: {m}' for p in files for m in rule(p)]

def tokens(src)->list[int]: # of each line that has any
    found = {}
    for t in tokenize.generate_tokens(io.StringIO(src).readline):
        if t.type not in (tokenize.NAME, tokenize.OP, tokenize.NUMBER, tokenize.STRING): continue
        found[t.start[0]] = found.get(t.start[0], 0) + 1
    return list(found.values())

def quantile(values, share): return sorted(values)[int(share*len(values))]

def test_the_whole_is_easy_to_read():
    exports = [src for p in NBS for kind, src, _ in cells(p) if kind == 'code' and exported(src)]
    sizes = [len(lines(src)) for src in exports]
    assert (quantile(sizes, .5), quantile(sizes, .9)) <= (10, 19) and quantile(sizes, .9) <= 19
    assert quantile([n for src in exports for n in tokens(src)], .9) <= 24

def test_each_notebook_shows_what_it_talks_about():
    shown = re.compile('image/|plotly|text/html')
    kinds = {p: [k for _, _, c in cells(p) for o in c.get('outputs', []) for k in o.get('data', {})] for p in NBS}
    assert [p.name for p, found in kinds.items() if not shown.search(' '.join(found))] == []

def code(*lines, tags=(), outputs=()):
    return dict(cell_type='code', source='\n'.join(lines), metadata=dict(tags=list(tags)), outputs=list(outputs),
                execution_count=None)

GOOD = [
    dict(cell_type='markdown', source='# t\n\n> s', metadata={}),
    code('#| export', 'def f(): pass'),
    code('assert f() is None')]
VIEW = dict(data={'application/vnd.jupyter.widget-view+json': {}})
SET = code('seed = 0', 'out:str = ""', tags=['parameters'])
FAULTS = [
    (opening, 'is not "# Title"', [code('1')]),
    (small, 'has 31 lines', [code(*['1']*31)]),
    (narrow, '121 columns', [code('x'*121)]),
    (single, "['f', 'g'], expected one", [code('#| export', 'def f(): pass', 'class g: pass')]),
    (unprivate, 'imports _x, which is private to partal_nb.core', [code('#| export', 'from partal_nb.core import _x')]),
    (unbranched, 'asks what a task is (task.unit ==)', [code('#| export', "if task.unit == 'm': pass")]),
    (unbranched, "asks what a task is (t.form in)", [code('#| export', "if t.form in ('classes',): pass")]),
    (worded, "says 'by lot'; the word is 'at random'", [code('# drawn by lot')]),
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

def test_shadowed_built_ins_are_found(tmp_path):
    (tmp_path/'a.py').write_text('def f(format): pass\nclass A:\n    id:int\nfor id in (): map = max\n')
    found = ["a.A has a field 'id', which is a built-in", "line 1 shadows the built-in 'format'",
             "line 4 shadows the built-in 'id'", "line 4 shadows the built-in 'map'"]
    assert sorted(unshadowed(tmp_path/'a.py')) == found

# Names that two modules give to two things; a new one is refused, and this list only becomes shorter.
SHARED = set("""
    Batch COLUMNS DRAFTS UNREADABLE WHITE amount board log
    pick read_folder sentence write_npy""".split())

def public(p)->set[str]: # functions, classes and tables that a module makes, but for what `@patch` adds to classes
    tree = ast.parse(p.read_text('utf-8'))
    added = {id(n) for _, n in of_classes(tree)}
    found = set()
    for n in (n for n in tree.body if id(n) not in added):
        if isinstance(n, (ast.FunctionDef, ast.ClassDef)): found.add(n.name)
        targets = n.targets if isinstance(n, ast.Assign) else [n.target] if isinstance(n, ast.AnnAssign) else []
        found |= {t.id for target in targets for t in ast.walk(target) if isinstance(t, ast.Name)}
    return {name for name in found if name[0] != '_'}

def test_a_public_name_is_one_thing():
    commands = {p for p in MODULES if p.parent.name == 'commands' or p.stem == 'cli'} # named as what they call
    made = [name for p in MODULES if p.name != '__init__.py' and p not in commands for name in public(p)]
    twice = {name for name in made if made.count(name) > 1}
    assert twice <= SHARED, f'defined in two modules: {sorted(twice - SHARED)}'

def test_wide_and_long_files_are_found(tmp_path):
    (tmp_path/'a.py').write_text('x'*121 + '\n'*400)
    assert '121 columns' in next(narrow_file(tmp_path/'a.py'))
    assert '400 lines, at most 399' in next(short(tmp_path/'a.py', 399))

def test_widget_state_and_orphans_are_found(tmp_path):
    assert 'widget state' in next(quiet(notebook(tmp_path/'00_bad.ipynb', GOOD, widgets={})))
    (tmp_path/'old.py').write_text('# AUTOGENERATED! DO NOT EDIT! File to edit: ../nbs/00_old.ipynb.\n')
    assert 'is gone' in next(generated(tmp_path/'old.py'))
