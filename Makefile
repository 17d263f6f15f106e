# `make` lists what there is. Everything is a thin name for ./forja or a tool of the environment control-dev.
SHELL := bash
RECIPE ?= digits
DATA ?=
ARGS ?=
CONTROL_DEV = $$(./forja setup --path control-dev)

.DEFAULT_GOAL := help
.PHONY: help setup up down status run test test-cluster cluster-up cluster-down lint types format lock clean

help: ## List the targets
	@awk -F ':.*## ' '/^[a-z-]+:.*## / { printf "  make %-12s %s\n", $$1, $$2 }' $(MAKEFILE_LIST)

setup: ## Make the environments and fetch Kafka's jars; does nothing when all is there
	@./forja setup

up: setup ## Start Kafka, MLflow, Envoy, Triton and Airflow on 127.0.0.1
	@./forja up

down: ## Stop them all
	@./forja down

status: ## Show each service: state, address, memory
	@./forja status

run: setup ## Events to a served model and a prediction [RECIPE=digits] [DATA=path]
	@./forja run $(RECIPE) $(if $(DATA),--data "$(DATA)")

test: ## All tests that need no GPU and no cluster [ARGS="-k name tests/unit"]
	@tests/run $(ARGS)

test-cluster: setup ## The tests that need Kubernetes, in a cluster of this machine's own; KEEP=1 leaves it up [ARGS=tests/cluster/test_x.py]
	@tests/cluster/run $(ARGS)

cluster-up: setup ## Build (a quarter of an hour the first time) and start the test cluster: needs Linux, root, Go
	@PYTHONPATH=tests "$(CONTROL_DEV)" -m cluster.kit up

cluster-down: ## Stop the test cluster and check that nothing of it is left
	@PYTHONPATH=tests "$(CONTROL_DEV)" -m cluster.kit down

lint: ## ruff: style, bugs, security, Airflow
	@./forja setup control-dev && python="$(CONTROL_DEV)" && "$$python" -m ruff check . && "$$python" -m ruff format --check .

format: ## Let ruff rewrite what it can
	@./forja setup control-dev && python="$(CONTROL_DEV)" && "$$python" -m ruff check --fix . ; "$$python" -m ruff format .

types: ## mypy --strict over include/ and plugins/
	@./forja setup control-dev && "$(CONTROL_DEV)" -m mypy

lock: ## Resolve uv.lock again and export it to requirements.txt and k8s/images/*.txt
	@PYTHONPATH=include "$$(./forja setup control-dev && ./forja setup --path control-dev)" -m forja.locks

clean: down ## Stop all and delete the state: events, runs, models, passwords
	@rm -rf "$${FORJA_STATE:-.forja}"
