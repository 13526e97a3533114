# The one task runner. On a fresh Debian 12 with Rust and root (or sudo):
#   make demo   the main story, with a table at the end
#   make test   every test, in its short form
#   make bench  the evaluation, in about an hour; see docs/measurements.md

PREFIX  ?= /usr/local
LIBDIR  ?= $(PREFIX)/lib
DESTDIR ?=
BENCH   ?= --runs 3
CARGO   ?= cargo

VERSION   := $(shell sed -n 's/^version = "\(.*\)"/\1/p' Cargo.toml | head -n 1)
SOVERSION := 0
TARGET    := $(or $(CARGO_TARGET_DIR),target)
SUDO      := $(if $(filter 0,$(shell id -u)),,sudo)

# Guests are C; the C tests run under valgrind as well; virsh is the daemon's client.
PACKAGES_BUILD := gcc libc6-dev binutils
# The lab emulates a machine with QEMU; it downloads a kernel and busybox without installing them.
PACKAGES_LAB   := qemu-system-x86 e2fsprogs xz-utils procps
PACKAGES_TEST  := $(PACKAGES_BUILD) g++ valgrind libvirt-clients python3-libvirt virtinst $(PACKAGES_LAB)

# Installs the Debian packages in $(1) that are missing, and says so.
define need
@missing=; for package in $(1); do \
	dpkg-query -W -f='$${Status}' "$$package" 2>/dev/null | grep -q 'ok installed' \
		|| missing="$$missing $$package"; \
done; \
if [ -n "$$missing" ]; then \
	echo "Installing Debian packages:$$missing"; \
	$(SUDO) apt-get update -qq && \
	DEBIAN_FRONTEND=noninteractive $(SUDO) apt-get install -y -qq --no-install-recommends $$missing >/dev/null; \
fi
endef

.PHONY: help build demo test test-long lab lint bench header install setup setup-test clean

help:
	@sed -n 's/^\([a-z-]*\):.*## /  make \1\t/p' Makefile | expand -t 20

setup:
	$(call need,$(PACKAGES_BUILD))

setup-test:
	$(call need,$(PACKAGES_TEST))

build: setup ## the library and the command, optimised
	$(CARGO) build --release

demo: build ## checkpoint a running VM, kill it, restore it; ends with a table
	$(TARGET)/release/livepoint demo

test: setup-test ## every test, in its short form
	CARGO="$(CARGO)" tests/run

test-long: setup-test ## the long forms: soaks, thousands of cases
	CARGO="$(CARGO)" LIVEPOINT_LONG=1 tests/run

lab: setup-test ## stock Linux guests in an emulated machine (JOB=script: one job; see tests/lab)
ifdef JOB
	$(CARGO) build --release
	tests/lab/run $(JOB) $(TARGET)/release/livepoint
else
	$(CARGO) test --release --test lab -- --nocapture
endif

lint: setup ## formatting, clippy, and the header against the source
	$(CARGO) fmt --check
	$(CARGO) clippy --quiet --all-targets -- -D warnings
	$(CARGO) clippy --quiet --lib --no-default-features -- -D warnings

bench: build ## what checkpoints cost on this machine, with a report and plots (BENCH="options")
	$(TARGET)/release/livepoint bench --out $(TARGET)/bench $(BENCH)

header: ## copies the generated C header to include/
	$(CARGO) build --release --lib
	cp "$$(ls -t $(TARGET)/release/build/livepoint-*/out/livepoint.h | head -n 1)" include/livepoint.h

# Writes $(1) to $(2), with the places of this installation.
define substitute
sed -e 's|@PREFIX@|$(PREFIX)|' -e 's|@LIBDIR@|$(LIBDIR)|' -e 's|@VERSION@|$(VERSION)|' \
	-e 's|@SOVERSION@|$(SOVERSION)|' $(1) > $(DESTDIR)$(2)
endef

install: build ## into $(DESTDIR)$(PREFIX)
	install -Dm755 $(TARGET)/release/livepoint $(DESTDIR)$(PREFIX)/bin/livepoint
	install -Dm755 $(TARGET)/release/livepointd $(DESTDIR)$(PREFIX)/bin/livepointd
	install -Dm755 $(TARGET)/release/liblivepoint.so $(DESTDIR)$(LIBDIR)/liblivepoint.so.$(VERSION)
	install -d $(DESTDIR)$(PREFIX)/lib/systemd/system
	install -m644 packaging/systemd/*.socket $(DESTDIR)$(PREFIX)/lib/systemd/system/
	sed -e 's|@PREFIX@|$(PREFIX)|g' packaging/systemd/livepointd.service.in \
		> $(DESTDIR)$(PREFIX)/lib/systemd/system/livepointd.service
	ln -sf liblivepoint.so.$(VERSION) $(DESTDIR)$(LIBDIR)/liblivepoint.so.$(SOVERSION)
	ln -sf liblivepoint.so.$(SOVERSION) $(DESTDIR)$(LIBDIR)/liblivepoint.so
	install -Dm644 include/livepoint.h $(DESTDIR)$(PREFIX)/include/livepoint.h
	install -Dm644 include/livepoint.hpp $(DESTDIR)$(PREFIX)/include/livepoint.hpp
	install -d $(DESTDIR)$(LIBDIR)/pkgconfig $(DESTDIR)$(LIBDIR)/cmake/livepoint
	$(call substitute,packaging/livepoint.pc.in,$(LIBDIR)/pkgconfig/livepoint.pc)
	$(call substitute,packaging/livepoint-config.cmake.in,$(LIBDIR)/cmake/livepoint/livepoint-config.cmake)
	$(call substitute,packaging/livepoint-config-version.cmake.in,$(LIBDIR)/cmake/livepoint/livepoint-config-version.cmake)
	install -d $(DESTDIR)$(PREFIX)/share/doc/livepoint/examples
	install -m644 README.md CHANGELOG.md LICENSE-APACHE LICENSE-MIT docs/*.md $(DESTDIR)$(PREFIX)/share/doc/livepoint/
	cp -r examples/. $(DESTDIR)$(PREFIX)/share/doc/livepoint/examples/

clean:
	$(CARGO) clean
