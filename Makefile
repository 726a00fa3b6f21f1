# Everything a person or CI runs. `make demo` and `make test` set themselves up on a fresh machine.
PYTHON ?= python3
VENV   ?= .venv
PY     := $(VENV)/bin/python
STAMP  := $(VENV)/.installed
RUN    := $(VENV)/.installed-for-running
# processes that share out the tests of `make test`, about a GB of memory each; 0: all in one
WORKERS ?= 2

.PHONY: setup demo demo-compare test test-deploy test-slow test-gpu lint format bench fuzz faults clean

setup: $(STAMP)

$(PY):
	$(PYTHON) -m venv $(VENV)

$(STAMP): requirements.txt requirements-dev.txt requirements-export.txt | $(PY)
	$(PY) -m pip install --quiet --disable-pip-version-check -r requirements-dev.txt
	touch $(STAMP) $(RUN)

$(RUN): requirements.txt | $(PY)
	$(PY) -m pip install --quiet --disable-pip-version-check -r requirements.txt
	touch $(RUN)

test: setup lint
	$(PY) -m pytest --numprocesses $(WORKERS) --dist worksteal

test-deploy: setup
	$(PY) -m pytest -m deploy

# trainings in several processes that are lost and replaced: minutes on two cores
test-slow: setup
	$(PY) -m pytest -m processes

test-gpu: setup
	$(PY) -m pytest -m gpu

lint: setup
	$(VENV)/bin/ruff check .
	$(VENV)/bin/ruff format --check .

format: setup
	$(VENV)/bin/ruff check --fix .
	$(VENV)/bin/ruff format .

demo: $(RUN)
	PATH="$(CURDIR)/$(VENV)/bin:$$PATH" bash scripts/demo.sh

# two models, two seeds, two epochs: what a report of compare.py looks like, not which model is better
demo-compare: $(RUN)
	$(PY) compare.py --data bccd.yaml --cfg yolov5n.yaml yolov5n-dcn.yaml --weights data/demo/yolov5n-dcn-start.pt \
	    --seeds 2 --epochs 2 --img 160 --workers 1 --device cpu --project runs --name demo-compare --exist-ok \
	    -- --hyp hyp.demo.yaml

bench: setup
	$(PY) -m benchmarks.startup
	$(PY) -m benchmarks.dataloader
	$(PY) -m benchmarks.nms
	$(PY) -m benchmarks.inference_cpu

# libpng and libjpeg speak of every damaged picture: not our lines
fuzz: setup
	$(PY) -m scripts.fuzz labels --inputs 100000
	$(PY) -m scripts.fuzz checkpoint --inputs 100000
	$(PY) -m scripts.fuzz yaml --inputs 20000
	$(PY) -W ignore -m scripts.fuzz images --inputs 100000 2>/dev/null
	$(PY) -m scripts.fuzz caches --inputs 20000
	$(PY) -m scripts.fuzz wts --inputs 50000

faults: setup
	$(PY) -m scripts.faults

clean:
	rm -rf runs .pytest_cache .ruff_cache
