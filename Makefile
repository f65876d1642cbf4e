# make highstate   the main job, in ./demo: a machine root made as a pillar says; EXAMPLE=manual
#                  takes that pillar of pillar-examples, ARGS=test=True only says what it would do
# make test        all tests; SALT=3006 for another Salt, TESTS=tests/unit for a part, JOBS=0 for
#                  one after the other
# make torture     every step of every operation killed, failed and replayed: takes hours
# make coverage    which lines and branches of the core no test reaches: there is to be none
# make lint bench install
PYTHON ?= python3
SALT ?=
TESTS ?= tests
JOBS ?= 4
EXAMPLE ?=
DESTDIR ?= /srv/salt
VENV := .venv$(if $(SALT),-$(SALT))
BIN := $(VENV)/bin
PYTEST := $(BIN)/python -m pytest --numprocesses $(JOBS) --dist worksteal

.PHONY: highstate test torture coverage lint format bench install dist clean

highstate: $(VENV)/ready
	$(MAKE) --no-print-directory install DESTDIR=demo/srv/salt
	$(PYTHON) packaging/demo.py $(EXAMPLE)
	$(BIN)/salt-call --config-dir=demo/etc --retcode-passthrough state.highstate $(ARGS)
	@echo
	@if [ -e demo/root/etc/qubes/storage.conf ]; then \
	    echo "The machine is demo/root: see demo/root/etc/qubes/storage.conf,"; \
	    echo "demo/root/var/lib/qubes/qubes.xml, and the images in the pools' directories."; fi
	@echo "Its pillar is demo/srv/pillar/machine.sls: edit it and run 'make highstate' again."

test: $(VENV)/ready
	$(PYTEST) $(TESTS) $(ARGS)

torture: $(VENV)/ready
	TORTURE=1 $(PYTEST) tests/torture $(ARGS)

# Without tests/integration and tests/torture: the others alone have to reach each branch.
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

# What a machine gets: copied into a file_root, with no build step. A driver of the user's own in
# drivers/ stays; a driver that a version of ours no longer has is to be removed here by its name.
install: export TO := $(DESTDIR)
install:
	$(if $(filter-out 1,$(words $(DESTDIR)))$(filter ~%,$(DESTDIR)),\
	    $(error DESTDIR is '$(DESTDIR)'; name one directory, without spaces and ~))
	mkdir -p -- "$$TO/_utils/qubes_storage"
	find "$$TO/_utils/qubes_storage" -mindepth 1 -maxdepth 1 ! -name drivers -exec rm -rf {} +
	cp -R -- _modules _states _utils qubes_storage.sls "$$TO/"
	find "$$TO/_utils/qubes_storage" "$$TO/_modules" "$$TO/_states" \
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
