# `make demo` and `make test` are all that a new machine needs: Python 3.11 or newer, pip, venv.
# Both can be run again, offline: what is installed is not installed twice.
PYTHON ?= python3
VENV := .venv
RUN := runs/demo
# The libtpu that this jax asks for, with which programs for TPUs are compiled and read. In a folder of
# its own: among the packages jax would take it for a TPU.
TPU_COMPILER := $(VENV)/bin/python -c "import importlib.metadata as m; \
  print(*[r.partition(';')[0] for r in m.requires('jax') if r.startswith('libtpu')])"
CUDA := $(shell nvidia-smi >/dev/null 2>&1 && echo "'jax[cuda12]'")

# Two workers halve the time; the files that take longest come first (tests/conftest.py).
PYTEST := $(VENV)/bin/python -m pytest -n auto --maxprocesses 4 --dist loadfile --no-loadscope-reorder

# Python compiles what is imported and keeps it, whatever this shell says; to compile all that is installed
# would take pip half a minute.
unexport PYTHONDONTWRITEBYTECODE
PIP := $(VENV)/bin/python -m pip install --quiet --no-compile

.PHONY: demo test test-developer faults lint clean-demo

# A small network from scratch, then ESRGAN's fine-tuning of the rrdb-psnr that comes with sr_jax.
demo: $(VENV)/.installed
	$(VENV)/bin/python -m sr_jax.main --config configs/esrgan_psnr.py:demo --workdir $(RUN)/scratch \
	  --config.total_steps=600
	$(VENV)/bin/python -m sr_jax.main --config configs/demo.py --workdir $(RUN)/gan
	$(VENV)/bin/python -m sr_jax.interpolate --psnr rrdb-psnr --gan $(RUN)/gan --alpha 0.5 \
	  --output $(RUN)/alpha_0.5.safetensors
	$(VENV)/bin/python -m sr_jax.evaluate --data skimage:test --metrics lpips_alex --output $(RUN)/evaluation \
	  --model "bicubic,from scratch=$(RUN)/scratch,PSNR=rrdb-psnr,alpha 0.5=$(RUN)/alpha_0.5.safetensors,made here=$(RUN)/gan,esrgan"

test: $(VENV)/.installed-test
	$(PYTEST)

# What only the packages of requirements-dev.txt enable. `make test` runs it too where they are installed.
test-developer: $(VENV)/.installed-dev
	$(PYTEST) -m "developer and not slow"

# Kills, damage, full disks, hostile files: full counts, an hour and a half on 2 cores; writes
# docs/reliability.md.
faults: $(VENV)/.installed-test
	$(VENV)/bin/python tests/faults/report.py

lint: $(VENV)/.installed-dev
	$(VENV)/bin/ruff check .
	$(VENV)/bin/ruff format --check .

clean-demo:
	rm -rf $(RUN)

# A stamp and not bin/python: where the system lacks pip for venvs, that one is there all the same.
$(VENV)/.created:
	@$(PYTHON) -c "import sys; sys.version_info >= (3, 11) or \
	  sys.exit(f'Python {sys.version.split()[0]} must be 3.11 or newer; try make PYTHON=python3.12')"
	$(PYTHON) -m venv $(VENV)
	$(VENV)/bin/python -m pip --version
	touch $@

# Where nvidia-smi answers, jax comes with its CUDA plugin; the same commands then use the GPU.
$(VENV)/.installed: requirements.txt | $(VENV)/.created
	$(PIP) -r requirements.txt $(CUDA)
	touch $@

$(VENV)/.installed-test: requirements-test.txt $(VENV)/.installed
	$(PIP) -r requirements-test.txt
	touch $@

# spandrel and lpips ask for torchvision, which has no build beside torch's CPU wheel; it is not needed.
$(VENV)/.installed-dev: requirements-dev.txt $(VENV)/.installed-test
	$(PIP) -r requirements-dev.txt
	$(PIP) --no-deps spandrel lpips
	$(PIP) --no-deps --target $(VENV)/tpu --upgrade "$$($(TPU_COMPILER))" \
	  || echo "no libtpu for this machine: the test of what a TPU's chips send will skip"
	if command -v npm >/dev/null; then npm install --prefix tests/browser --no-package-lock --no-audit \
	  --no-fund; else echo "no npm: the tests of pages in a browser will skip"; fi
	touch $@
