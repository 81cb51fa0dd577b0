# Everything a newcomer runs; `make help` lists it
PYTHON ?= python3
JOBS ?= 2
BIN := .venv/bin

help: ## these lines
	@grep -E '^[a-z]+:.*##' $(MAKEFILE_LIST) | sed 's/:.*##/\t/' | expand -t 12

setup: ## environments, ComfyUI and sample pictures; goes on where it was interrupted
	@$(PYTHON) nbs/tools/bootstrap.py

demo: setup ## make an avatar video here; IMAGE=me.jpg VIDEO=me.mp4 to use your own
	@$(BIN)/wan-avatar demo $(if $(IMAGE),--image "$(IMAGE)") $(if $(VIDEO),--driving "$(VIDEO)")

samples: setup ## the public set of pictures and clips into runs/samples/public, out of packages of 170 MB; goes on where it was interrupted
	@$(BIN)/python nbs/tools/samples.py

test: setup ## everything CI runs, in two processes; JOBS=1 for one, ARGS="tests/test_store.py -x" for a part, COMFY_TREE=DIR for what depends on ComfyUI, on that one
	@$(BIN)/ruff check wan_avatar tests nbs/tools
	@$(BIN)/mypy wan_avatar
	@$(BIN)/pytest -n $(JOBS) --dist loadfile --no-loadscope-reorder $(ARGS)

lab: setup ## JupyterLab on nbs/; ARGS="--no-browser --ip=0.0.0.0 --port=8889" for its own options, as in a pod
	@$(BIN)/jupyter lab --notebook-dir nbs --config nbs/tools/jupyter_server_config.py $(ARGS)

sync: setup ## notebooks -> package and README.md, outputs cleaned
	@cd $(CURDIR) && $(BIN)/nbdev_export && $(BIN)/python nbs/tools/refresh.py nbs/index.ipynb && $(BIN)/python nbs/tools/refresh.py --only 'cards_section(measured())' nbs/guide_deploy.ipynb nbs/guide_research.ipynb && $(BIN)/nbdev_clean && $(BIN)/python nbs/tools/readme.py

house: setup ## how readable the code is, in numbers
	@$(BIN)/python nbs/tools/house.py

docs: setup ## the documentation site, from the notebooks, into _docs/html
	@$(BIN)/python nbs/tools/docs.py

clean: ## remove what these made
	rm -rf .venv .comfy _docs *.egg-info build .pytest_cache .ruff_cache runs/samples runs/demo runs/local
	find wan_avatar tests nbs -name __pycache__ -type d -prune -exec rm -rf {} +

.PHONY: help setup demo samples test lab sync house docs clean
