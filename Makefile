# The one task runner. On a fresh Debian 12 with Rust and root (or sudo):
#   make demo   the main story, with a table at the end
#   make test   every test, in its short form
#   make bench  the evaluation, in about an hour; see docs/measurements.md

BENCH   ?= --runs 3
CARGO   ?= cargo
SUITE   ?= bookworm

# Where `make install` puts things; docs/packaging.md.
DESTDIR    ?=
PREFIX     ?= /usr/local
LIBDIR     ?= $(PREFIX)/lib
INCLUDEDIR ?= $(PREFIX)/include
MANDIR     ?= $(PREFIX)/share/man
DOCDIR     ?= $(PREFIX)/share/doc/livepoint
UNITDIR    ?= $(PREFIX)/lib/systemd/system
BASHDIR    ?= $(PREFIX)/share/bash-completion/completions
ZSHDIR     ?= $(PREFIX)/share/zsh/site-functions
FISHDIR    ?= $(PREFIX)/share/fish/vendor_completions.d

VERSION   := $(shell sed -n 's/^version = "\(.*\)"/\1/p' Cargo.toml | head -n 1)
SOVERSION := 0
TARGET    := $(or $(CARGO_TARGET_DIR),target)
BUILT     ?= $(TARGET)/release
SUDO      := $(if $(filter 0,$(shell id -u)),,sudo)

# Guests are C; the C tests run under valgrind as well; abidiff compares the C ABI with what it was;
# virsh is the daemon's client, qemu-img a second opinion on qcow2 images; systemd boots in namespaces.
PACKAGES_BUILD := gcc libc6-dev binutils
# The lab emulates a machine with QEMU; it downloads a kernel and busybox without installing them.
PACKAGES_LAB   := qemu-system-x86 e2fsprogs xfsprogs xz-utils procps iproute2
# An installation is used with pkg-config and CMake, and its man pages are checked.
PACKAGES_INSTALL := make pkg-config cmake groff-base mandoc
PACKAGES_TEST  := $(PACKAGES_BUILD) g++ valgrind abigail-tools libvirt-clients python3-libvirt virtinst qemu-utils systemd $(PACKAGES_LAB) $(PACKAGES_INSTALL)

PACKAGES_DEB   := $(PACKAGES_BUILD) dpkg-dev debhelper lintian libzstd-dev pkg-config python3

.PHONY: help build demo test test-long test-packages lab fuzz lint bench header abi coverage install install-built uninstall vendor dist deb setup setup-test setup-deb clean

help:
	@sed -n 's/^\([a-z-]*\):.*## /  make \1\t/p' Makefile | expand -t 20

setup:
	@tests/need $(PACKAGES_BUILD)

setup-deb:
	@tests/need $(PACKAGES_DEB)

setup-test:
	@tests/need $(PACKAGES_TEST)

build: setup ## the library and the command, optimised
	$(CARGO) build --release

demo: build ## checkpoint a running VM, kill it, restore it; ends with a table
	$(TARGET)/release/livepoint demo

test: setup-test ## every test, in its short form
	CARGO="$(CARGO)" tests/run

test-long: setup-test ## the long forms: soaks, thousands of cases; and the packages
	@tests/need mmdebstrap debian-archive-keyring
	CARGO="$(CARGO)" LIVEPOINT_LONG=1 tests/run
	$(MAKE) --no-print-directory test-packages

test-packages: deb ## Debian packages: lintian, installation in a fresh system, programs built there
	@tests/need mmdebstrap debian-archive-keyring
	$(SUDO) env SUITE=$(SUITE) tests/packages/run $(TARGET)/deb

lab: setup-test ## stock Linux guests in an emulated machine (JOB=script: one job; see tests/lab)
ifdef JOB
	$(CARGO) build --release
	tests/lab/run $(JOB) $(TARGET)/release/livepoint
else
	$(CARGO) test --release --test lab -- --nocapture
endif

fuzz: setup-test ## one fuzz target (FUZZ=rpc or domain, FUZZ_SECONDS=60); the stable toolchain does
	fuzz/run $(or $(FUZZ),rpc) $(or $(FUZZ_SECONDS),60)

lint: setup ## formatting, clippy, and the header against the source
	$(CARGO) fmt --check
	$(CARGO) clippy --quiet --all-targets -- -D warnings
	$(CARGO) clippy --quiet --lib --no-default-features -- -D warnings

bench: build ## what checkpoints cost on this machine, with a report and plots (BENCH="options")
	$(TARGET)/release/livepoint bench --out $(TARGET)/bench $(BENCH)

header: ## copies the generated C header to include/
	$(CARGO) build --release --lib
	cp "$$(ls -t $(TARGET)/release/build/livepoint-*/out/livepoint.h | head -n 1)" include/livepoint.h

# Writes the file $(1) to the directory $(2), with the places of this installation.
define substitute
sed -e 's|@PREFIX@|$(PREFIX)|g' -e 's|@LIBDIR@|$(LIBDIR)|g' -e 's|@INCLUDEDIR@|$(INCLUDEDIR)|g' \
	-e 's|@LIBDIR_TO_INCLUDE@|'"$$(realpath -m --relative-to=$(LIBDIR) $(INCLUDEDIR))"'|g' \
	-e 's|@VERSION@|$(VERSION)|g' -e 's|@SOVERSION@|$(SOVERSION)|g' \
	$(1) > $(DESTDIR)$(2)/$(basename $(notdir $(1)))
endef

coverage: setup-test ## how much of the C ABI's code the C tests reach, by line
	@tests/need llvm-$(shell rustc -vV | sed -n 's/^LLVM version: \([0-9]*\).*/\1/p')
	CARGO="$(CARGO)" ffi-tests/coverage

abi: setup-test ## writes the committed description of the C ABI anew: at a release, never to hide a break
	ffi-tests/abi-dump include ffi-tests/livepoint-0.1.abi

install: build ## into $(DESTDIR)$(PREFIX)
	$(MAKE) install-built

install-built: # what is in $(BUILT); builds nothing
	install -d $(DESTDIR)$(PREFIX)/bin $(DESTDIR)$(LIBDIR)/pkgconfig $(DESTDIR)$(INCLUDEDIR)
	install -m755 $(BUILT)/livepoint $(BUILT)/livepointd $(DESTDIR)$(PREFIX)/bin/
	install -m644 $(BUILT)/liblivepoint.so $(DESTDIR)$(LIBDIR)/liblivepoint.so.$(VERSION)
	ln -sf liblivepoint.so.$(VERSION) $(DESTDIR)$(LIBDIR)/liblivepoint.so.$(SOVERSION)
	ln -sf liblivepoint.so.$(SOVERSION) $(DESTDIR)$(LIBDIR)/liblivepoint.so
	install -m644 include/livepoint.h include/livepoint.hpp $(DESTDIR)$(INCLUDEDIR)/
	install -d $(DESTDIR)$(LIBDIR)/cmake/livepoint
	$(call substitute,packaging/livepoint.pc.in,$(LIBDIR)/pkgconfig)
	$(call substitute,packaging/livepoint-config.cmake.in,$(LIBDIR)/cmake/livepoint)
	$(call substitute,packaging/livepoint-config-version.cmake.in,$(LIBDIR)/cmake/livepoint)
	install -d $(DESTDIR)$(UNITDIR)
	install -m644 packaging/systemd/*.socket $(DESTDIR)$(UNITDIR)/
	$(call substitute,packaging/systemd/livepointd.service.in,$(UNITDIR))
	$(call substitute,packaging/systemd/livepoint-guests.service.in,$(UNITDIR))
	install -d $(DESTDIR)$(DOCDIR)
	install -m644 README.md CHANGELOG.md LICENSE-APACHE LICENSE-MIT docs/*.md $(DESTDIR)$(DOCDIR)/
	cp -r examples $(DESTDIR)$(DOCDIR)/
	set -e; manual=$$(mktemp -d); trap 'rm -rf "$$manual"' EXIT; \
	$(BUILT)/livepoint-manual "$$manual"; \
	for section in 1 3 8; do \
		install -d $(DESTDIR)$(MANDIR)/man$$section; \
		install -m644 "$$manual/man/man$$section"/* $(DESTDIR)$(MANDIR)/man$$section/; \
	done; \
	install -d $(DESTDIR)$(BASHDIR) $(DESTDIR)$(ZSHDIR) $(DESTDIR)$(FISHDIR); \
	for command in livepoint livepointd; do \
		install -m644 "$$manual/completions/$$command.bash" $(DESTDIR)$(BASHDIR)/$$command; \
		install -m644 "$$manual/completions/_$$command" $(DESTDIR)$(ZSHDIR)/; \
		install -m644 "$$manual/completions/$$command.fish" $(DESTDIR)$(FISHDIR)/; \
	done

vendor: ## every crate that a build needs, in vendor/, for builds without the network
	$(CARGO) vendor --locked --versioned-dirs vendor >/dev/null

dist: vendor ## the source and the crates as archives, in $(TARGET)/dist
	mkdir -p $(TARGET)/dist
	git archive --prefix=livepoint-$(VERSION)/ --output=$(TARGET)/dist/livepoint-$(VERSION).tar HEAD
	tar --create --file=$(TARGET)/dist/livepoint-$(VERSION)-vendor.tar --sort=name \
		--mtime=@$$(git log -1 --format=%ct) --owner=0 --group=0 --numeric-owner --mode=go=rX \
		--transform='s,^,livepoint-$(VERSION)/,' vendor
	xz --force -T0 $(TARGET)/dist/livepoint-$(VERSION).tar $(TARGET)/dist/livepoint-$(VERSION)-vendor.tar

deb: setup-deb ## Debian packages, in $(TARGET)/deb, from vendored crates
	CARGO="$(CARGO)" packaging/make-deb $(TARGET)/deb

uninstall: ## takes away what `make install` with the same options puts there
	set -e; staged=$$(mktemp -d); trap 'rm -rf "$$staged"' EXIT; \
	$(MAKE) --no-print-directory install-built DESTDIR="$$staged" >/dev/null; \
	(cd "$$staged" && find . ! -type d) | while read -r file; do rm -f "$(DESTDIR)/$$file"; done; \
	rm -rf $(DESTDIR)$(DOCDIR) $(DESTDIR)$(LIBDIR)/cmake/livepoint

clean:
	$(CARGO) clean
