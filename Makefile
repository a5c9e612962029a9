# shoal: `make help` lists what there is.

SHELL := /bin/bash
BIN := $(CURDIR)/bin
VERSION ?= $(shell git describe --tags --always --dirty 2>/dev/null || echo unknown)
LDFLAGS := -s -w -X main.version=$(VERSION)
GO ?= go
# Real images and built tools are kept here between runs.
SHOAL_CACHE ?= $(HOME)/.cache/shoal
export SHOAL_CACHE

.DEFAULT_GOAL := help

.PHONY: help
help: ## list the targets
	@awk 'BEGIN{FS=":.*## "} /^[a-zA-Z0-9_.-]+:.*## /{printf "  \033[1m%-18s\033[0m %s\n", $$1, $$2}' $(MAKEFILE_LIST)

##
.PHONY: build
build: ## build bin/shoal
	CGO_ENABLED=0 $(GO) build -trimpath -ldflags '$(LDFLAGS)' -o $(BIN)/shoal ./cmd/shoal

.PHONY: build-kube
build-kube: ## build bin/shoal-kube, which has Kubernetes' client in it
	cd cmd/shoal-kube && CGO_ENABLED=0 $(GO) build -trimpath -ldflags '$(LDFLAGS)' -o $(BIN)/shoal-kube .

.PHONY: demo
demo: setup build ## the whole story in one table: a real image, pulled and started lazily (DEMO_IMAGE= takes another)
	cd bench && $(GO) run ./cmd/bench demo $(if $(DEMO_IMAGE),--image '$(DEMO_IMAGE)') --bin $(BIN)

.PHONY: test
# Of the tests on a real Kubernetes those that say most in a few minutes; make k8s has all.
K8S_SHORT := ^(TestChart|TestExampleFields|TestImagePullSecrets|TestPodsWithUserNamespaces)$$
test: setup build build-kube kubernetes ## everything: unit, conformance, race detector, real containerd, real Kubernetes (as root)
	$(GO) test -race -timeout 20m ./...
	cd integration && SHOAL_BIN=$(BIN) $(GO) test -count=1 -timeout 50m ./...
	cd integration && SHOAL_BIN=$(BIN) $(GO) test -tags kubernetes -count=1 -timeout 30m -run '$(K8S_SHORT)' ./kubernetes
	cd bench && $(GO) test -count=1 ./...
	cd deploy/release && $(GO) test -count=1 ./...
	cd cmd/shoal-kube && SHOAL_BIN=$(BIN) CGO_ENABLED=0 $(GO) test -tags kubernetes -count=1 ./...
	cd deploy/helm && SHOAL_BIN=$(BIN) CGO_ENABLED=0 $(GO) test -count=1 ./...

.PHONY: test-unit
test-unit: ## the tests of the product module alone, without the race detector
	$(GO) test -timeout 15m ./...

.PHONY: test-integration
test-integration: setup build build-kube ## the tests with real containerd, runc, registry, FUSE and EROFS
	cd integration && SHOAL_BIN=$(BIN) $(GO) test -count=1 -timeout 50m ./...

.PHONY: test-images
test-images: setup build ## tree equality of all ten real images (builds those that are missing)
	cd bench && $(GO) run ./cmd/bench trees --bin $(BIN)

.PHONY: lint
# A cache per checkout: what another one left names files by that one's paths,
# and then no //nolint and no rule for a path applies to them.
lint: export GOLANGCI_LINT_CACHE = $(BIN)/lint-cache
lint: $(BIN)/golangci-lint $(BIN)/deadcode ## golangci-lint with the rules of .golangci.yml, in all modules; functions that nothing calls
	$(BIN)/golangci-lint run ./...
	cd integration && $(BIN)/golangci-lint run --config ../.golangci.yml ./...
	cd bench && $(BIN)/golangci-lint run --config ../.golangci.yml ./...
	cd deploy/release && $(BIN)/golangci-lint run --config ../../.golangci.yml ./...
	cd cmd/shoal-kube && CGO_ENABLED=0 $(BIN)/golangci-lint run --config ../../.golangci.yml ./...
	cd deploy/helm && CGO_ENABLED=0 $(BIN)/golangci-lint run --config ../../.golangci.yml ./...
	@# What lives in a ...test package is there for tests; cmd/shoal-kube, which asks a
	@# node for its State, is another module.
	dead="$$($(BIN)/deadcode ./... | grep -vE '^[^:]*test/|: Client\.State$$')"; [ -z "$$dead" ] || { echo "$$dead" >&2; exit 1; }

.PHONY: test-arm64
test-arm64: ## the arm64 program, and tests that mount nothing, under qemu, with pages of 64 KiB
	./integration/arm64.sh

.PHONY: fuzz
FUZZTIME ?= 10m
fuzz: ## every fuzz target for FUZZTIME (10m)
	./integration/fuzz.sh $(FUZZTIME)

##
.PHONY: bench-start bench-read bench-upgrade bench-ingest bench-sizing
bench-start: setup build ## pull and start of the ten images against overlayfs -> bench/out/start.json
	cd bench && $(GO) run ./cmd/bench start --bin $(BIN)
bench-read: setup build ## reading a running image against overlayfs and containerd's erofs -> bench/out/read.json
	cd bench && $(GO) run ./cmd/bench read --bin $(BIN)
bench-upgrade: setup build ## new bytes from v1 to v2 -> bench/out/upgrade.json
	cd bench && $(GO) run ./cmd/bench upgrade --bin $(BIN)
bench-ingest: setup build ## ingest and memory of the biggest image -> bench/out/ingest.json
	cd bench && $(GO) run ./cmd/bench ingest --bin $(BIN)
bench-sizing: setup build ## memory and disk of a supernode for each 1,000 nodes, TB of store, GB of images -> bench/out/sizing.json
	cd bench && $(GO) run ./cmd/bench sizing --bin $(BIN)
.PHONY: benchmarks
benchmarks: ## docs/benchmarks.md and the README's table, from what the targets have left in bench/out
	cd bench && $(GO) run ./cmd/bench docs

.PHONY: sim
sim: ## 1,000 and 10,000 simulated nodes, and other designs in the same network -> bench/out/sim.json, plots
	cd bench && $(GO) run ./cmd/sim

.PHONY: swarm
swarm: setup build ## 32 real nodes in network namespaces with slow links; some die -> bench/out/swarm.json
	cd bench && $(GO) run ./cmd/bench swarm --bin $(BIN) --runs 2

.PHONY: drill
ROUNDS ?= 300
DRILLS ?= TestDrill
drill: setup build ## break one thing at a time under real containers, ROUNDS kills (300; fewer of what takes longer) -> bench/out/drill.json
	cd integration && SHOAL_BIN=$(BIN) SHOAL_ROUNDS=$(ROUNDS) SHOAL_DRILL_OUT=$(CURDIR)/bench/out $(GO) test -v -count=1 -timeout 5h -run '$(DRILLS)' .

.PHONY: k8s kubernetes
KILLS ?= 50
k8s: setup build build-kube kubernetes ## all tests on a real Kubernetes, those that measure, too, with KILLS kills (50) -> bench/out/k8s.json
	cd integration && SHOAL_BIN=$(BIN) SHOAL_ROUNDS=$(KILLS) SHOAL_K8S_OUT=$(CURDIR)/bench/out $(GO) test -tags kubernetes -v -count=1 -timeout 2h ./kubernetes
kubernetes: setup ## build Kubernetes, etcd, CNI plugins and runc from the Go module proxy, once (8 minutes, 4 GB of disk while it lasts)
	integration/kubernetes/setup.sh $(BIN)

.PHONY: images
images: setup ## build the ten real images that tests and benchmarks use
	bench/images/build.sh public

##
.PHONY: image
PLATFORMS ?= linux/amd64,linux/arm64
image: ## the container image, an OCI layout -> dist/shoal-image.tar (PLATFORMS=linux/amd64 for one alone)
	cd deploy/release && $(GO) run . image --version '$(VERSION)' --platforms '$(PLATFORMS)'

.PHONY: release
release: ## archives, packages, SBOMs, image, chart, checksums of a tag -> dist/release (SNAPSHOT=1 for any commit)
	cd deploy/release && $(GO) run . all --version '$(VERSION)' --platforms '$(PLATFORMS)' $(if $(SNAPSHOT),--snapshot)

.PHONY: changelog
changelog: ## move the changelog's fragments to CHANGELOG.md, for VERSION=vX.Y.Z
	cd deploy/release && $(GO) run . changelog --version '$(VERSION)'

##
.PHONY: setup
setup: ## install what tests, demo and benchmarks need (as root; Debian packages, two versions of containerd, runc)
	integration/setup.sh $(BIN)

$(BIN)/golangci-lint: integration/tools/lint/go.mod
	cd integration/tools/lint && $(GO) build -o $@ github.com/golangci/golangci-lint/v2/cmd/golangci-lint
$(BIN)/deadcode: integration/tools/lint/go.mod
	cd integration/tools/lint && $(GO) build -o $@ golang.org/x/tools/cmd/deadcode

.PHONY: generate
generate: ## generated code: protobuf messages
	$(GO) generate ./...

.PHONY: clean
clean: ## remove what was built (not the cache of images and tools)
	rm -rf $(BIN) dist bench/out
