# What a newcomer types: `make demo`, `make test`. Everything runs in .venv.
PYTHON ?= python3
BIN := .venv/bin
DATASET ?= pocket-regdb
METHOD ?= afen
PRESET ?= pocket
PROFILE ?= local
STUDIES ?=
DATASETS ?=
METHODS ?=
SEEDS ?=
ARGS ?=
DRY = $(filter -n --dry-run --dryrun,$(ARGS))
# what cells print is shown; the rest goes to a log, of which a failed run's last words are
ONE = runs/$(DATASET)-$(METHOD)
RUN = $(BIN)/papermill --no-progress-bar --stdout-file - nbs/train.ipynb
SAY = awk '/^[A-Za-z]*(Error|Exception|Interrupt): ./ {s = ""} {s = s $$0 "\n"} \
  END {printf "%s", s; exit 1}'
# gigabytes of small runs that notebooks write outside the project go with them
SCRATCH = scratch=$$(mktemp -d) && trap 'rm -rf "$$scratch"' EXIT && TMPDIR=$$scratch

.PHONY: bench demo test test-long check-gpu lab train reproduce install notebooks docs docs-serve clean

install: .venv/installed

.venv/installed: pyproject.toml constraints.txt
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || \
	  { echo "Python 3.11 or later is needed: make PYTHON=python3.11 $(MAKECMDGOALS)"; exit 1; }
	@echo "Installing into .venv (once; about 6 GB with CUDA's libraries on Linux) ..."
	$(PYTHON) -m venv .venv
	$(BIN)/python -m pip install --quiet --disable-pip-version-check \
	  -c constraints.txt -e '.[dev,docs,workflow]'
	@touch $@

demo: install  ## train and evaluate AFEN on rendered people, in minutes
	@mkdir -p runs
	@$(RUN) runs/demo.ipynb 2>runs/demo.log || $(SAY) runs/demo.log
	@echo "executed notebook: runs/demo.ipynb"

train: install  ## one run: make train DATASET=regdb METHOD=afen ARGS="-p split 2"
	@mkdir -p runs
	@$(RUN) $(ONE).ipynb -p dataset $(DATASET) -p method $(METHOD) $(ARGS) 2>$(ONE).log \
	  || $(SAY) $(ONE).log
	@echo "executed notebook: $(ONE).ipynb"

test: install  ## notebooks and modules in step, every notebook, every test
	$(BIN)/python tests/in_step.py
	$(SCRATCH) OMP_NUM_THREADS=1 \
	  $(BIN)/nbdev_test --n_workers 2 --skip_file_re '^[_.]|^train'
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n 2 --dist worksteal

test-long: install  ## an hour or two: kills, broken data, fuzz, numerics, an empty environment
	OMP_NUM_THREADS=1 $(BIN)/python -m tests.long $(ARGS)

check-gpu: install  ## on one GPU, eight minutes at most: right, resumable, how fast
	@$(BIN)/python -m tests.gpu

bench: install  ## speeds of this machine's processor: make bench NAMES='"96 views"'
	OMP_NUM_THREADS=1 $(BIN)/python tests/bench.py $(NAMES)

lab: install  ## JupyterLab on the notebooks
	$(BIN)/jupyter lab --ServerApp.root_dir='$(CURDIR)' \
	  --LabApp.default_url=/lab/tree/nbs/index.ipynb $(ARGS)

reproduce: install  ## make every missing run, then all tables and figures
	@# pages are made anew, as their figures may have been deleted; a dry run deletes nothing
	@$(if $(DRY),,rm -rf runs/reproduce)
	@$(if $(DRY),sh workflow/dry_run.sh) $(BIN)/snakemake $(ARGS) --snakefile workflow/Snakefile \
	  --profile workflow/profiles/$(PROFILE) \
	  --config preset=$(PRESET) $(if $(STUDIES),studies="$(STUDIES)") \
	  $(if $(DATASETS),datasets="$(DATASETS)") $(if $(METHODS),methods="$(METHODS)") \
	  $(if $(SEEDS),seeds="$(SEEDS)")

notebooks: install  ## export the modules, run every notebook, clean them
	$(BIN)/nbdev_export
	$(SCRATCH) $(BIN)/python tests/run_notebooks.py
	$(BIN)/nbdev_clean

docs: install  ## the site, from the committed notebooks: docs/_build/html
	$(BIN)/python docs/build_pages.py
	$(BIN)/sphinx-build -W --keep-going -n -a -q -j 2 -c docs docs/_build/source docs/_build/html
	@echo "The site is docs/_build/html/index.html; make docs-serve shows it."

docs-serve: docs  ## the site at http://localhost:8000
	$(BIN)/python -m http.server 8000 --bind localhost --directory docs/_build/html

clean:  ## forget runs, rendered and packed images; keep data that users brought
	rm -rf runs/* data/pocket docs/_build
	@# joints are kept: they may be yours
	test ! -d data/packed || find data/packed -type f ! -name joints.csv -delete
