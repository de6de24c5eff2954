"Studies written down before their first run: each plan can be read, and the committed runs are the planned ones"
from pathlib import Path

import pytest

from partal_nb.reports.read import check_one_origin, is_as_planned
from partal_nb.runs.plan import planned_runs, read_plan

NBS = Path(__file__).parents[1]/'nbs'/'runs'
PLANS = {path.stem: path for path in sorted((NBS/'plans').glob('*.toml'))}

@pytest.fixture(params=PLANS)
def study(request):
    "A plan, and where its results are committed"
    return read_plan(PLANS[request.param]), NBS/'results'/request.param

def test_a_plan_says_what_decides(study):
    plan, _ = study
    for part in (plan.question, plan.primary, plan.correction, plan.stop): assert len(part.split()) > 5, part
    assert plan.reference in plan.arms and len(plan.seeds) >= 5

def test_the_committed_runs_are_the_planned_ones(study):
    plan, out = study
    planned = planned_runs(plan, out)
    there = {p.parent for p in out.rglob('config.json')}
    assert there <= set(planned), 'a committed run that the plan does not have'
    for folder in there: is_as_planned(planned[folder], folder) # raises where it is another run
    for pool in plan.pools:
        for seed in plan.seeds: # what is compared comes from one commit and number of threads
            check_one_origin(f for f in there if planned[f].seed == seed and f.parent == out/pool)
