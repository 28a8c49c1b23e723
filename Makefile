# Tasks of the repository; `make` lists them. They use the Python of the active environment.
PYTHON ?= python
.DEFAULT_GOAL := help
.PHONY: help build test lint format types sanitize elsewhere bench report demo dist ci

help: ## list the tasks
	@grep -hE '^[a-z]+:.*##' $(MAKEFILE_LIST) | sed -E 's/^([a-z]+):.*## /\1\t/' | expand -t 12

build: ## install the package with everything that tests and benchmarks need
	$(PYTHON) -m pip install ".[test,bench]"

test: ## run the tests against the installed package
	pytest

lint: ## look for mistakes and deviations of form (needs ruff)
	ruff check klfast tests benchmarks tools examples
	ruff format --check klfast tests benchmarks tools examples

format: ## put the form right (needs ruff)
	ruff check --fix klfast tests benchmarks tools examples
	ruff format klfast tests benchmarks tools examples

types: ## check the annotations (needs mypy)
	mypy

sanitize: ## build with AddressSanitizer and UndefinedBehaviorSanitizer, run the tests
	tools/sanitize

elsewhere: ## compile the kernels with Clang, for x86-64 and arm64 (needs ziglang)
	tools/compile_elsewhere

bench: ## time klfast beside its peers, groups side by side
	pytest benchmarks

report: ## measure anew and write the README's table and figures
	$(PYTHON) benchmarks/report.py

demo: ## show the command on the data that ships with it
	klfast demo

dist: ## build sdist and wheel into dist/ (needs build)
	$(PYTHON) -m build

ci: ## do everything CI does, in fresh environments
	.ci/run
