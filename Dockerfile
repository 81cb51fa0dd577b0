# The worker's image. `wan-avatar image build` builds it: arguments come from wan_avatar/models.lock.json, there are no
# second copies of those numbers here, and a build without them fails. What runs is nbs/tools/install.py, which the tests run too.
FROM runpod/pytorch:1.0.2-cu1281-torch280-ubuntu2404 AS build
ENV COMFY_DIR=/opt/comfy WORKER_DIR=/opt/worker
WORKDIR /src
COPY nbs/tools/install.py nbs/tools/

ARG COMFYUI_REPO
ARG COMFYUI_COMMIT
ARG COMFYUI_CODE_SHA256
RUN python3.12 nbs/tools/install.py comfyui \
    "$COMFYUI_REPO" "$COMFYUI_COMMIT" "$COMFYUI_CODE_SHA256" "$COMFY_DIR/ComfyUI"
ARG CUSTOM_NODES
RUN python3.12 nbs/tools/install.py nodes "$CUSTOM_NODES" "$COMFY_DIR/custom_nodes"

# ComfyUI's environment lies on the base image's torch; the worker's has none
COPY nbs/tools/requirements-comfy.txt nbs/tools/
RUN python3.12 nbs/tools/install.py environment "$COMFY_DIR/env" nbs/tools/requirements-comfy.txt "$COMFY_DIR/ComfyUI/requirements.txt"
COPY nbs/tools/requirements-worker.txt nbs/tools/
RUN python3.12 nbs/tools/install.py environment "$WORKER_DIR" nbs/tools/requirements-worker.txt

COPY pyproject.toml setup.py settings.ini ./
COPY wan_avatar wan_avatar
RUN python3.12 nbs/tools/install.py wheel "$WORKER_DIR" . /wheel


FROM runpod/pytorch:1.0.2-cu1281-torch280-ubuntu2404
# tini reaps what ComfyUI leaves and passes signals on. Not pinned: Ubuntu's archive drops a version when it has the next
# hadolint ignore=DL3008
RUN apt-get update && apt-get install --yes --no-install-recommends tini && rm -rf /var/lib/apt/lists/* \
 && useradd --system --uid 10001 --create-home --home-dir /var/lib/wan-avatar --shell /usr/sbin/nologin avatar

# the base image's Hugging Face settings are for root, /workspace and machines with 64 GB of memory to spare
ENV COMFY_DIR=/opt/comfy WORKER_DIR=/opt/worker PATH=/opt/worker/bin:$PATH \
    MODELS_DIR=/var/lib/wan-avatar/models WORK_DIR=/var/lib/wan-avatar/work \
    HF_HOME=/var/lib/wan-avatar/huggingface HF_HUB_ENABLE_HF_TRANSFER=0 HF_XET_HIGH_PERFORMANCE=0 HF_HUB_DISABLE_TELEMETRY=1

# from what changes least to what changes most: a change of code pushes the last layers, a few megabytes
COPY --from=build /opt/comfy/env /opt/comfy/env
COPY --from=build /opt/worker /opt/worker
COPY --from=build /opt/comfy/ComfyUI /opt/comfy/ComfyUI
COPY --from=build /opt/comfy/custom_nodes /opt/comfy/custom_nodes
COPY --from=build /src/nbs/tools/install.py /wheel/
COPY --from=build /wheel /wheel
RUN python3.12 /wheel/install.py package /wheel "$WORKER_DIR" "$COMFY_DIR/env"

ARG GIT_SHA
ARG VERSION
RUN test -n "$GIT_SHA" && test -n "$VERSION" || { echo "GIT_SHA or VERSION is empty; build with: wan-avatar image build"; exit 1; }
ENV WAN_AVATAR_GIT_SHA=$GIT_SHA
LABEL org.opencontainers.image.title=wan_avatar org.opencontainers.image.version=$VERSION org.opencontainers.image.revision=$GIT_SHA

USER 10001
WORKDIR /var/lib/wan-avatar
ENTRYPOINT ["/usr/bin/tini", "--"]
CMD ["python", "-m", "wan_avatar.worker"]
