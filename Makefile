# make highstate   the main job, in ./demo: a machine root made as a pillar says
# make test        all tests; SALT=3006 for another Salt, TESTS=tests/unit for a part, JOBS=0 for
#                  one after the other
# make torture     every step of every operation killed, failed and replayed: takes hours
# make coverage    which lines and branches of the core no test reaches: there is to be none
# make lint bench install
PYTHON ?= python3
SALT ?=
TESTS ?= tests
JOBS ?= 4
EXAMPLE ?= workstation
DESTDIR ?= /srv/salt
VENV := .venv$(if $(SALT),-$(SALT))
BIN := $(VENV)/bin
PYTEST := $(BIN)/python -m pytest --numprocesses $(JOBS) --dist worksteal
DEMO := $(CURDIR)/demo

.PHONY: highstate test torture coverage lint format bench install dist clean

highstate: $(VENV)/ready
	$(MAKE) --no-print-directory install DESTDIR=demo/srv/salt
	$(PYTHON) packaging/demo.py $(EXAMPLE)
	$(BIN)/salt-call --config-dir=demo/etc --retcode-passthrough state.highstate $(ARGS)
	@echo
	@echo "The machine is demo/root: see demo/root/etc/qubes/storage.conf,"
	@echo "demo/root/var/lib/qubes/qubes.xml, and the images in the pools' directories."
	@echo "Its pillar is demo/srv/pillar/machine.sls; run 'make highstate' again: nothing changes."

test: $(VENV)/ready
	$(PYTEST) $(TESTS) $(ARGS)

torture: $(VENV)/ready
	TORTURE=1 $(PYTEST) tests/torture $(ARGS)

# Without tests/integration and tests/torture, whose processes are not measured.
coverage: $(VENV)/ready
	$(PYTEST) --cov --cov-report=term tests/unit tests/r32 tests/functional $(ARGS)

lint: $(VENV)/ready
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

format: $(VENV)/ready
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

bench: $(VENV)/ready
	$(BIN)/python -m benchmarks $(ARGS)

# What a machine gets: copied into a file_root, with no build step.
install:
	mkdir -p $(DESTDIR)
	rm -rf $(DESTDIR)/_utils/qubes_storage
	cp -R _modules _states _utils qubes_storage.sls $(DESTDIR)/
	find $(DESTDIR)/_utils/qubes_storage $(DESTDIR)/_modules $(DESTDIR)/_states \
	    -name __pycache__ -prune -exec rm -rf {} +

dist: $(VENV)/ready
	$(BIN)/pip wheel --quiet --no-deps --no-build-isolation --wheel-dir dist .

$(VENV)/ready: tests/requirements.txt
	$(PYTHON) -m venv $(VENV)
	$(BIN)/pip install --quiet --disable-pip-version-check \
	    "salt$(if $(SALT),==$(SALT).*,>=3006,<3009)" -r tests/requirements.txt
	touch $@

clean:
	rm -rf .venv* demo build dist *.egg-info
