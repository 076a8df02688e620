# Everything that builds, checks and tests nfsvol. `make help` lists it.

CARGO ?= cargo
TOOLS := target/tools
DENY_VERSION := 0.20.2
# Judges of file systems: programs that the tests run, nothing that nfsvol is built from.
PJDFSTEST_VERSION := 0.2.2
FSX_VERSION := 0.3.2
DESTDIR ?=
PREFIX ?= /usr/local
# cargo deny fetches the advisory database from GitHub; ADVISORIES=1 asks for that too.
DENY_CHECKS := bans licenses sources $(if $(ADVISORIES),advisories)

SHELL := bash
.SHELLFLAGS := -o pipefail -c
.DEFAULT_GOAL := help
.PHONY: help
help: ## Show this list
	@awk -F ':.*## ' '/^[a-z-]+:.*## / { printf "make %-10s %s\n", $$1, $$2 }' $(MAKEFILE_LIST)

.PHONY: build
build: ## Build the release binary, target/release/nfsvol
	$(CARGO) build --locked --release

.PHONY: check
check: $(TOOLS)/bin/cargo-deny ## Check format, lints, dependencies and documentation
	$(CARGO) fmt --all --check
	$(CARGO) clippy --locked --workspace --all-targets --all-features -- -D warnings
	$(TOOLS)/bin/cargo-deny --locked --workspace --all-features check $(DENY_CHECKS)
	RUSTDOCFLAGS='-D warnings' $(CARGO) doc --locked --workspace --no-deps --document-private-items

# Built once; a cargo-deny that is installed already is taken as it is.
$(TOOLS)/bin/cargo-deny:
	@mkdir -p $(TOOLS)/bin
	@if command -v cargo-deny >/dev/null; then ln -sf "$$(command -v cargo-deny)" $@; \
	else $(CARGO) install --locked --root $(TOOLS) --version $(DENY_VERSION) cargo-deny; fi

JUDGES := $(TOOLS)/bin/pjdfstest $(TOOLS)/bin/fsx

.PHONY: judges
judges: $(JUDGES)

$(TOOLS)/bin/pjdfstest: VERSION := $(PJDFSTEST_VERSION)
$(TOOLS)/bin/fsx: VERSION := $(FSX_VERSION)
$(JUDGES):
	$(CARGO) install --locked --root $(TOOLS) --version $(VERSION) $(@F)

.PHONY: test
test: ## Test everything on real parts (as root; installs Debian packages that are absent)
	crates/lab/setup
	+$(MAKE) --no-print-directory judges
	$(TEST) --no-run
	rm -rf $(RUN)
	+$(MAKE) --jobs=3 --keep-going --output-sync=target --no-print-directory $(TESTS:%=of-%); code=$$?; \
	echo 'seconds target'; sort -rn $(RUN)/*.seconds; awk '$(SUMMARY)' $(RUN)/*.log; exit $$code

# Where each target keeps its output and its seconds, and which lines of it say how it ended.
RUN := target/test
SUMMARY := /^ +(Running|Doc-tests) |^test .* FAILED$$|^test result: /

# Three at a time, because most of what they do is wait; each shows its output when it has ended. The
# longest first, so that busy ones run beside idle ones. Tests run make(1) themselves, alone.
TEST := env -u MAKEFLAGS -u MFLAGS -u MAKELEVEL $(CARGO) test --locked --workspace --features failpoints
LONGEST := fuse faults fence power unit services two_hosts cluster_simulation tutorial cost crash lab_selftest \
	simulation managed_plugin
# An upgrade needs the program of an earlier commit: make test-long.
TESTS := $(LONGEST) $(filter-out $(LONGEST) upgrade,$(basename $(notdir $(wildcard tests/*.rs crates/*/tests/*.rs))) \
	simulation cluster_simulation unit docs-of-the-code)

of-unit: WHAT = --lib --bins
of-docs-of-the-code: WHAT = --doc
of-%: WHAT = --test $*

of-%:
	@mkdir -p $(RUN); echo 'cargo test $(WHAT)'; SECONDS=0; \
	$(TEST) $(WHAT) 2>&1 | tee $(RUN)/$*.log; code=$$?; \
	printf '%7d %s\n' $$SECONDS $* >$(RUN)/$*.seconds; exit $$code

# More of what chance decides; the seeds that `make test` has tried are not tried again.
.PHONY: test-long
test-long: ## Test for an hour: 24 moves of services, 600 volumes for 5 minutes, 500 at rest, a soak of 10, 40 power failures, an upgrade from BASELINE, more simulations (as root)
	crates/lab/setup
	+$(MAKE) --no-print-directory judges baseline
	NFSVOL_TEST_LONG=1 $(CARGO) test --locked --no-fail-fast --features failpoints --test services --test churn --test soak --test power --test many --test upgrade
	NFSVOL_SIM_SEEDS=2000..22000 $(CARGO) test --locked --features failpoints --test cluster_simulation
	NFSVOL_SIM_SEEDS=200..2200 $(CARGO) test --locked --workspace --features failpoints --test simulation
	NFSVOL_SIM_SEEDS=2000..22000 $(CARGO) test --locked --features failpoints --lib nothing_is_lost_and_everything_ends
	$(CARGO) test --locked --features failpoints --lib -- --ignored driver::search::restore_create::without driver::search::claim_remove::without \
	  driver::search::claim_claim::a_host_stops driver::search::create_remove::a_host_stops driver::search::restored_claims \
	  driver::search::restore_remove::the_server_forgets_one

# The commit that the FUSE data path is measured beside, in the same run.
BASELINE ?= e88eebb
BEFORE := target/bench/baseline

.PHONY: baseline
baseline:
	[ "$$(cat $(BEFORE)/commit 2>/dev/null)" = $(BASELINE) ] || { \
	  rm -rf $(BEFORE)/tree && mkdir -p $(BEFORE)/tree && \
	  git archive $(BASELINE) | tar -xC $(BEFORE)/tree && \
	  $(CARGO) build --locked --release --manifest-path $(BEFORE)/tree/Cargo.toml --target-dir $(BEFORE) && \
	  echo $(BASELINE) >$(BEFORE)/commit; }

.PHONY: bench
bench: ## Measure beside peers and BASELINE=commit, into target/bench/summary.json (as root; ONLY=name for one trial)
	crates/lab/setup
	crates/lab/setup sshfs libnfs-utils openssh-server
	+$(MAKE) --no-print-directory baseline
	$(CARGO) bench --locked --bench figures -- --test-threads=1 $(ONLY)

.PHONY: demo
demo: build ## Show the main job on two Docker hosts (as root; installs what is absent)
	packaging/demo.sh target/release/nfsvol

.PHONY: sweep
sweep: ## Remove what a test run left that was killed with all its processes
	$(CARGO) test --locked --quiet --features failpoints --test lab_selftest -- lab-sweep

# BINARY=… takes one that is built already.
BINARY ?= target/release/nfsvol
built := $(if $(filter target/release/nfsvol,$(BINARY)),build)

.PHONY: install
install: $(built) ## Install program, units, manual and completions below $(DESTDIR)$(PREFIX)
	DESTDIR=$(DESTDIR) PREFIX=$(PREFIX) packaging/install.sh install $(BINARY)

.PHONY: uninstall
uninstall: ## Remove what `make install` put there
	DESTDIR=$(DESTDIR) PREFIX=$(PREFIX) packaging/install.sh uninstall

# glibc's own resolver needs no file but /etc/resolv.conf and /etc/hosts, which Docker brings.
HOST = $(shell rustc -vV | sed -n 's/^host: //p')
STATIC = target/$(HOST)/static/nfsvol
NAME ?= nfsvol

.PHONY: static
static: ## Build a small binary that needs no library, target/HOST/static/nfsvol
	RUSTFLAGS='-C target-feature=+crt-static' $(CARGO) build --locked --profile static --target $(HOST)
	@echo "$(STATIC): $$(stat -c %s $(STATIC)) bytes"

.PHONY: plugin
plugin: static ## Make a managed plugin of it on the local Docker, called $(NAME)
	plugin/create.sh $(STATIC) $(NAME)

.PHONY: deb
deb: static ## Build a Debian package of it, target/nfsvol_VERSION_ARCH.deb
	packaging/deb.sh $(STATIC) target
