"The page of errors shows every message that it lists, and every error of the modules that a user meets first"
import ast
import json
import re
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]

def plain(text): return ' '.join(text.replace('`', '').split())

PAGE = json.loads((ROOT/'nbs/errors.ipynb').read_text('utf-8'))
CELLS = [(c['cell_type'], ''.join(c['source']), c.get('outputs', [])) for c in PAGE['cells']]
SHOWN = plain(' '.join(''.join(o['text']) for _, _, outputs in CELLS for o in outputs if o.get('name') == 'stdout'))
PROSE = '\n'.join(src for kind, src, _ in CELLS if kind == 'markdown')
LISTED = [m for heads in re.findall(r'^- (`.*?`): ', PROSE, re.M) for m in re.findall(r'`([^`]+)`', heads)]

def missing(message, shown=SHOWN):
    parts = [part.strip() for part in plain(message).split('…')]
    return [part for part in parts if len(part) > 1 and part not in shown]

def raised(path): # the longest piece of text of every error that a module raises
    for node in ast.walk(ast.parse(path.read_text('utf-8'))):
        if isinstance(node, ast.Raise) and isinstance(node.exc, ast.Call):
            parts = [x for a in node.exc.args for x in ast.walk(a) if isinstance(x, ast.Constant)]
            texts = [x.value for x in parts if isinstance(x.value, str)]
            if texts and len(longest := max(texts, key=len)) > 8: yield longest

def test_what_is_listed_is_shown():
    assert len(LISTED) > 80
    assert not {m: gone for m in LISTED if (gone := missing(m))}

MODULES = ['commands/common', 'commands/runs', 'commands/project', 'core', 'tasks', 'config', 'plugins', 'data/prepare',
           'runs/journal', 'runs/folder', 'runs/checks', 'explore/run']

@pytest.mark.parametrize('module', MODULES)
def test_every_error_is_on_the_page(module):
    "The page has more than these"
    assert not [text for text in raised(ROOT/f'partal_nb/{module}.py') if plain(text) not in SHOWN]

def test_a_planted_fault_is_found(tmp_path):
    (tmp_path/'m.py').write_text("def f(x): raise ValueError(f'no {x} in this pool; make one')\nraise SystemExit(2)")
    assert list(raised(tmp_path/'m.py')) == [' in this pool; make one']
    assert missing('expected … pairs, got …', 'expected 3 pairs, came 2') == ['pairs, got']
    assert missing('a … b c', 'a d') == ['b c']
