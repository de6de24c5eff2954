"The strategies as functions, as they were before they became rows of choices: what `test_strategies.py` compares with"
import numpy as np
from scipy.stats import rankdata

from partal_nb.pool import Picks
from partal_nb.select.k_center import k_center
from partal_nb.select.top import check_values, top_images, top_pairs

def ranks(score, pool):
    check_values(score, pool)
    found = np.zeros(pool.open.shape)
    for k, rows in enumerate(pool.open.T): found[rows, k] = rankdata(score[rows, k])
    return found

def partal(scores, pool, budget, rng): return top_pairs(scores.norm, pool, budget, rng)

def partal_raw(scores, pool, budget, rng): return top_pairs(scores.raw, pool, budget, rng)

def rbal(scores, pool, budget, rng): return top_images(ranks(scores.raw, pool).sum(1), pool, budget, rng)

def random(scores, pool, budget, rng): return top_images(rng.random(len(pool.images)), pool, budget, rng)

def random_pairs(scores, pool, budget, rng): return top_pairs(rng.random(pool.open.shape), pool, budget, rng)

def best_of_each_task(value, pool, n, rng):
    best = np.zeros(pool.open.shape, bool)
    for k, rows in enumerate(pool.open.T):
        column = np.where(rows, value[:, k], -np.inf)
        order = np.lexsort((rng.random(len(column)), -column))
        best[order[:min(n, rows.sum())], k] = True
    return best

def partal_floor(scores, pool, budget, rng):
    guarded = best_of_each_task(scores.norm, pool, budget//(2*len(pool.tasks)), rng)
    lift = np.ptp(scores.norm[pool.open]) + 1
    index = top_pairs(scores.norm + lift*guarded, pool, budget, rng).index
    score = scores.norm[tuple(index.T)]
    order = np.argsort(-score, kind='stable')
    return Picks(index[order], score[order])

def learning_loss(scores, pool, budget, rng):
    predicted = np.where(pool.open, scores.raw, -np.inf)
    return top_images(predicted.max(1), pool, budget, rng)

def true_error(scores, pool, budget, rng):
    count = np.maximum(pool.open.sum(0), 1)
    return top_pairs(ranks(scores.raw, pool)/count, pool, budget, rng)

def coreset(scores, pool, budget, rng):
    counts = pool.open.sum(1)
    candidates = np.flatnonzero(counts)
    covered = np.flatnonzero(pool.labeled.any(1))
    need = 1 + np.searchsorted(np.sort(counts[candidates]).cumsum(), budget)
    rows = np.concatenate([covered, candidates])
    names = [pool.images[n] for n in rows]
    order = k_center(scores.features[rows], np.arange(len(covered)), int(need), names)
    value = np.zeros(len(counts))
    value[rows[order]] = np.arange(len(order), 0, -1)
    return top_images(value, pool, budget, rng)

OLD = dict(
    partal=partal, partal_raw=partal_raw, rbal=rbal, random=random, random_pairs=random_pairs, bald_pairs=partal,
    inconsistency=partal, partal_floor=partal_floor, learning_loss=learning_loss, true_error=true_error,
    coreset=coreset)
