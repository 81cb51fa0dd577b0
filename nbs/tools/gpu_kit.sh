#!/bin/bash
# The GPU bench on a machine that has a GPU, Python 3.12 with torch, and no network. In the repository's root:
#   nbs/tools/gpu_kit.sh pack [COMFY_DIR]     where the project is set up: what the other machine lacks goes into .gpu/ (42 MB)
#   nbs/tools/gpu_kit.sh run [OPTIONS]        over there, with .gpu/ beside the repository; options of `wan-avatar bench gpu`
# PYTHON: the interpreter that has torch; ROOT: a folder to work in
set -euo pipefail
kit=$PWD/.gpu

pack() {
    comfy=${1:-.comfy}/ComfyUI
    mkdir -p "$kit/whl"
    python3 -m pip download -q --no-deps --only-binary=:all: --python-version 3.12 --implementation cp \
        --platform manylinux_2_28_x86_64 --platform manylinux_2_17_x86_64 --platform manylinux2014_x86_64 -d "$kit/whl" \
        av==18.1.0 pydantic==2.14.3 pydantic-core==2.50.4 annotated-types==0.8.0 typing-inspection==0.4.5 torchsde==0.2.6 \
        trampoline==0.1.2 sageattention==1.0.6
    tar c -C "$comfy" --exclude=tests --exclude=tests-unit --exclude=__pycache__ --exclude=./models --exclude=./comfy_api_nodes . | xz -6 -T2 > "$kit/ComfyUI.tar.xz"
    git rev-parse --short=12 HEAD > "$kit/commit"
    du -sh "$kit"
}

lay_out() { # a COMFY_DIR as `make setup` makes one, of what is there
    [ -e "$root/ready" ] && return
    mkdir -p "$root/comfy/env/bin" "$root/comfy/ComfyUI/models" "$root/site/comfyui_frontend_package/static"
    "$python" -m pip install -q --no-index --no-deps --no-compile --no-cache-dir --upgrade --target "$root/site" "$kit"/whl/*.whl
    # the web page's package is 20 MB that nobody looks at here, and ComfyUI ends without it
    touch "$root/site/comfyui_frontend_package/__init__.py" "$root/site/comfyui_frontend_package/static/index.html"
    "$python" -m tarfile -e "$kit/ComfyUI.tar.xz" "$root/comfy/ComfyUI" # there may be no xz
    printf '#!/bin/sh\nexec %s "$@"\n' "$(command -v "$python")" > "$root/comfy/env/bin/python"
    chmod +x "$root/comfy/env/bin/python"
    touch "$root/ready"
}

case ${1:-} in
pack) pack "${@:2}" ;;
run)
    python=${PYTHON:-python3} root=${ROOT:-${TMPDIR:-/tmp}/wan_avatar_kit}
    lay_out
    export PYTHONPATH=$PWD:$root/site PYTHONUNBUFFERED=1 HF_HUB_OFFLINE=1 WAN_AVATAR_GIT_SHA=${WAN_AVATAR_GIT_SHA:-$(cat "$kit/commit")}
    exec "$python" -m wan_avatar.gpu --comfy-dir "$root/comfy" "${@:2}" ;;
*) sed -n '2,5p' "$0"; exit 2 ;;
esac
