"The page of errors: what it lists it shows, and it shows what the command line, the configuration and the loop say"
import ast
import json
import re
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]

def plain(text): return ' '.join(text.replace('`', '').split())

CELLS = [(c['cell_type'], ''.join(c['source']), c.get('outputs', [])) for c in json.loads((ROOT/'nbs/errors.ipynb').read_text('utf-8'))['cells']]
SHOWN = plain(' '.join(''.join(o['text']) for _, _, outputs in CELLS for o in outputs if o.get('name') == 'stdout'))
LISTED = [m for kind, src, _ in CELLS if kind == 'markdown' for heads in re.findall(r'^- (`.*?`): ', src, re.M) for m in re.findall(r'`([^`]+)`', heads)]

def missing(message, shown=SHOWN): return [part for part in map(str.strip, plain(message).split('…')) if len(part) > 1 and part not in shown]

def raised(path): # the longest piece of text of every error that a module raises
    for node in ast.walk(ast.parse(path.read_text('utf-8'))):
        if isinstance(node, ast.Raise) and isinstance(node.exc, ast.Call):
            texts = [x.value for a in node.exc.args for x in ast.walk(a) if isinstance(x, ast.Constant) and isinstance(x.value, str)]
            if texts and len(longest := max(texts, key=len)) > 8: yield longest

def test_what_is_listed_is_shown():
    assert len(LISTED) > 80
    assert not {m: gone for m in LISTED if (gone := missing(m))}

@pytest.mark.parametrize('module', ['cli', 'core', 'loop', 'journal', 'data/prepare', 'explore/view'])
def test_every_error_is_on_the_page(module):
    "Of the modules whose errors a user meets first; the page has more"
    assert not [text for text in raised(ROOT/f'partal_nb/{module}.py') if plain(text) not in SHOWN]

def test_a_planted_fault_is_found(tmp_path):
    (tmp_path/'m.py').write_text("def f(x): raise ValueError(f'no {x} in this pool; make one')\nraise SystemExit(2)")
    assert list(raised(tmp_path/'m.py')) == [' in this pool; make one']
    assert missing('expected … pairs, got …', 'expected 3 pairs, came 2') == [', got'] or missing('a … b c', 'a d') == ['b c']
