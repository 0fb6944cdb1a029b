# make setup   a virtual environment in .venv with everything
# make demo    train on the embedded shapes, evaluate, draw: a few minutes on two cores
# make test    every test, one process per core with one thread each: five to six minutes on two cores
#              the core's alone, two minutes: .venv/bin/python -m pytest tests --ignore tests/lab
# make hostile damaged files, wrong command lines, kills and starved starts: docs/reliability.md
# make lint    ruff
PYTHON ?= python3
VENV := .venv
PY := $(VENV)/bin/python
RUN := runs/demo

.PHONY: setup demo test hostile lint clean
setup: $(VENV)/ready

$(VENV)/ready: requirements.txt requirements-dev.txt requirements-bench.txt
	$(PYTHON) -m venv $(VENV)
	$(PY) -m pip install --quiet -r requirements-dev.txt
	touch $@
	@echo "now activate the environment, in every new terminal: source $(VENV)/bin/activate"

demo: setup
	$(PY) train.py --out $(RUN) --overwrite --recipe demo
	$(PY) eval_linear.py $(RUN) --json $(RUN)/eval.json
	$(PY) figures/neighbours.py $(RUN)
	$(PY) figures/page.py $(RUN)
	@echo "open $(RUN)/page.html in a browser: what was learnt, picture by picture, and what to look for"

test: setup
	OMP_NUM_THREADS=1 $(PY) -m pytest -n auto --dist worksteal

hostile: setup
	OMP_NUM_THREADS=1 $(PY) tests/hostile/campaign.py

lint: setup
	$(PY) -m ruff check .
	$(PY) -m ruff format --check .

clean:
	rm -rf $(VENV) $(RUN) runs/decoded
