# make quickstart            a federated run of SmolLM2-135M on this machine, with a table and a figure at its end
# make quickstart DATA=dir   the same on commonsense rows in the published layout (dir/<task>/{train,test}.json)
# make federation            a run across processes, on Flower: a SuperLink and four nodes on this machine, stopped after it
# make test                  ruff and the test suite, but for federations of real processes: make test-federation
# Both set themselves up: a virtual environment in .venv with the pinned set of constraints.txt.

PYTHON ?= python3
BIN := .venv/bin
READY := .venv/.ready

.PHONY: quickstart federation test test-federation lint format ci-real-run clean

quickstart: $(READY)
	model=$$($(BIN)/python recipes/prepare_model.py) && \
	$(BIN)/accelerate launch --config_file recipes/accelerate_configs/cpu.yaml recipes/quickstart.py \
		--model_name_or_path "$$model" $(if $(DATA),--data_dir "$(DATA)")

federation: $(READY)
	model=$$($(BIN)/python recipes/prepare_model.py) && \
	$(BIN)/python recipes/federation/local.py --recipe recipes/smollm2_135m/federation.yaml --ranks 2 4 8 16 \
		--model_name_or_path "$$model" $(FEDERATION_FLAGS)

test: lint
	$(BIN)/python -m pytest --numprocesses 2 --dist loadfile -m "not federation" $(PYTEST_FLAGS)

# Federations of real processes on loopback, beside what `make test` runs.
test-federation: $(READY)
	$(BIN)/python -m pytest --numprocesses 2 --dist loadfile -m federation $(PYTEST_FLAGS)

lint: $(READY)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

format: $(READY)
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

# A short federated run on real rows (DATA) in two processes; its output is a check, not a result, and is not kept.
ci-real-run: $(READY)
	@test -n "$(DATA)" || { echo "Expected a folder of commonsense rows, found none: name it, make ci-real-run DATA=dir" >&2; exit 1; }
	model=$$($(BIN)/python recipes/prepare_model.py) && \
	output=$$(mktemp -d) && trap 'rm -r "$$output"' EXIT && \
	OMP_NUM_THREADS=1 $(BIN)/torchrun --standalone --nproc_per_node 2 recipes/train.py \
		--config recipes/smollm2_135m/ci.yaml --model_name_or_path "$$model" \
		--data_dir "$(DATA)" --output_dir "$$output/run"

$(READY): setup.cfg pyproject.toml constraints.txt
	@command -v "$(PYTHON)" >/dev/null || { \
		echo "Expected Python 3.11 or newer, found no '$(PYTHON)': name one, for example make PYTHON=python3.12" >&2; exit 1; }
	@"$(PYTHON)" -c 'import sys; sys.exit(sys.version_info < (3, 11) and "Expected Python 3.11 or newer, found %s at %s: name \
	a newer one, for example make PYTHON=python3.12" % (sys.version.split()[0], sys.executable))'
	test -x $(BIN)/pip || "$(PYTHON)" -m venv --clear .venv
	$(BIN)/python -m pip install -c constraints.txt -e '.[test,demo,flower]'
	touch $(READY)

# Runs in outputs/ stay, and so do downloaded models.
clean:
	rm -rf .venv build dist *.egg-info .pytest_cache .ruff_cache
	find . -name __pycache__ -type d -prune -exec rm -rf {} +
