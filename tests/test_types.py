"What a type checker sees: the front door is typed, misspelled fields are caught, and the count of errors only falls"
import json
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
# How many errors pyright may find in the package; write a smaller number when they are fewer.
MOST = ROOT/'tests'/'reference'/'pyright.json'

def pyright(*paths)->list[dict]:
    "The errors that pyright finds"
    words = [sys.executable, '-m', 'pyright', '--outputjson', '--pythonpath', sys.executable, *map(str, paths)]
    done = subprocess.run(words, cwd=ROOT, capture_output=True, text=True)
    try: found = json.loads(done.stdout)
    except ValueError: pytest.fail(f'pyright printed no JSON: {done.stdout[-500:]} {done.stderr[-500:]}')
    errors = [d for d in found['generalDiagnostics'] if d['severity'] == 'error']
    return [d for d in errors if d.get('rule') != 'reportMissingImports'] # optional packages may be there or not

def test_the_count_of_errors_only_falls():
    most = json.loads(MOST.read_text())['errors']
    found = pyright('partal_nb')
    line = lambda d: d['range']['start']['line'] + 1
    where = [f"{Path(d['file']).relative_to(ROOT)}:{line(d)}: {d['message'].splitlines()[0]}" for d in found]
    assert len(found) <= most, '\n'.join([f'{len(found)} errors, at most {most}', *where])

@pytest.mark.parametrize('line,wrong', [
    ("preset('demo', rounds=1)", ''), ("preset('demo', ronds=1)", 'ronds'), ('RunConfig(ronds=1)', 'ronds'),
    ("Task('a', 'yes_no', 1, 'edge_bce', 'odsf', wight=2)", 'wight'), ("Pair('0001', 'depth').tusk", 'tusk')])
def test_a_misspelled_name_is_caught(line, wrong, tmp_path):
    script = tmp_path/'script.py'
    script.write_text(f'from partal_nb import Pair, RunConfig, Task, preset\n{line}\n')
    found = [d['message'] for d in pyright(script)]
    assert found == [] if not wrong else len(found) == 1 and f'"{wrong}"' in found[0], found
