"Reports of the committed journals, and statistics against scipy and simulation over many made-up studies"
import base64
import html
import io
import re
import shutil
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
from scipy import stats

from partal_nb.reports.compare import paired
from partal_nb.reports.headline import unplanned
from partal_nb.statistics import interval, seeds_needed, sign_flip
from partal_nb.reports.page import write_report
from partal_nb.reports.read import read_study, run_folders

RESULTS = Path(__file__).parents[1]/'nbs/runs/results'

def values(a, b, lower=False): # of two strategies, a value a seed
    rows = []
    for name, numbers in (('a', a), ('b', b)):
        rows += [(name, seed, 'depth', 'rmse', 'm', lower, v) for seed, v in enumerate(numbers)]
    return pd.DataFrame(rows, columns=['strategy', 'seed', 'task', 'metric', 'unit', 'lower_is_better', 'value'])

@pytest.mark.parametrize('lower', [False, True])
@pytest.mark.parametrize('n', [2, 3, 5, 9])
def test_paired_is_scipys(n, lower):
    rng = np.random.default_rng(n)
    a, b = rng.normal(1, 1, n), rng.normal(0, 1, n)
    found = paired(values(a, b, lower), 'a', 'b').iloc[0]
    better, worse = (b, a) if lower else (a, b)
    ref = stats.ttest_rel(better, worse)
    assert found.p_t == pytest.approx(ref.pvalue)
    assert (found.low, found.high) == pytest.approx(tuple(ref.confidence_interval(.95)))
    d = better - worse
    signs = np.array(np.meshgrid(*[[-1, 1]]*n)).reshape(n, -1).T
    means = (signs*d).mean(1)
    one_sided = min((means >= d.mean() - 1e-12).mean(), (means <= d.mean() + 1e-12).mean())
    assert found.p_flip == sign_flip(d) == pytest.approx(min(1, 2*one_sided))

def test_only_common_seeds_are_paired():
    v = values([1., 2, 3], [0., 0, 0])
    assert paired(v[(v.strategy == 'a') | (v.seed != 1)], 'a', 'b').iloc[0][['seeds', 'mean']].tolist() == [2, 2]

def test_seeds_needed_have_the_power():
    "Of many studies with so many seeds, four in five see the difference; with a third of them, far fewer do"
    n, rng = int(seeds_needed(.8, 1)), np.random.default_rng(0)
    seen = lambda n: np.mean([interval(d)[0] > 0 for d in rng.normal(.8, 1, (2000, n))])
    assert abs(seen(n) - .8) < .05 and seen(n//3) < .5

@pytest.mark.parametrize('name', [p.name for p in unplanned(RESULTS) if any(p.glob('*/config.json'))])
def test_committed_journals(name, tmp_path):
    study = read_study(run_folders([RESULTS/name]))
    page = write_report([RESULTS/name], tmp_path/'report.html').read_text('utf-8')
    assert not re.search(r'<(script|link|img)[^>]*(src|href)="http', page)
    assert all(r.command and html.escape(r.command) in page for r in study.runs)
    tables = [pd.read_csv(io.BytesIO(base64.b64decode(d))) for d in re.findall(r'data:text/csv;base64,([^"]+)', page)]
    assert len(tables) >= 3 and all(len(t) for t in tables)

def test_a_study_of_which_one_run_has_begun(tmp_path):
    "A report may be asked for while a sweep is under way: one common round has no area under the curve"
    for name in ('partal-0', 'random_pairs-0'): shutil.copytree(RESULTS/'rooms'/name, tmp_path/'study'/name)
    journal = tmp_path/'study/random_pairs-0/journal.jsonl'
    journal.write_text(journal.read_text('utf-8').splitlines()[0] + '\n', 'utf-8')
    page = write_report([tmp_path/'study'], tmp_path/'report.html').read_text('utf-8')
    assert 'Last round' in page and 'Area under the curve' not in page
