# Two commands matter: `make demo` and `make test`. Needed beforehand: cargo (rustup), a C compiler,
# python3 with pip, and make; everything else is fetched by the steps below.
.PHONY: help demo test test-cuda test-neon test-upstreams fuzz soak bench-cpu bench-gateway deny
.DEFAULT_GOAL := help

help: ## list the targets
	@grep -E '^[a-z-]+: .*## ' $(MAKEFILE_LIST) | sed -E 's/: .*## /\t/' | expand -t 12

demo: ## build, fetch the models, and run the whole product once
	@scripts/demo

test: ## everything that CI checks
	@scripts/test

test-cuda: ## the tests of the CUDA backend, on a machine with a GPU
	@scripts/test-cuda

fuzz: ## fuzz every parser; SECONDS_EACH=600 by default
	@scripts/fuzz $(or $(SECONDS_EACH),600)

soak: ## 32 clients for 5 minutes, and a verdict; ARGS="--seed 7 --clients 64" changes it
	@scripts/soak $(ARGS)

bench-cpu: ## speed, load and memory against llama.cpp, on an idle machine; ARGS="--rounds 3"
	@scripts/bench-cpu $(ARGS)

bench-gateway: ## what the gateway adds to a request, on an idle machine; ARGS="--rate 500"
	@scripts/bench-gateway $(ARGS)

test-neon: ## the kernels' tests on AArch64, under qemu on x86-64; ARGS="--test attention"
	@scripts/test-neon $(ARGS)

deny: ## licences and advisories of all dependencies (installs cargo-deny)
	@scripts/deny

test-upstreams: ## the gateway in front of llama.cpp's real server, which is installed first
	@scripts/test-upstreams
