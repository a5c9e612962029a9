#!/usr/bin/env bash
# setup.sh BIN: installs what the tests, the demo and the benchmarks need beside
# Go: Debian packages (as root, only those that are missing) and a containerd of
# a pinned version, built into BIN.
set -euo pipefail
bin=$1
here=$(cd "$(dirname "$0")" && pwd)

# program:package
want=(runc:runc docker-registry:docker-registry skopeo:skopeo mmdebstrap:mmdebstrap
      mkfs.erofs:erofs-utils fio:fio mount:mount ip:iproute2 python3:python3 htpasswd:apache2-utils
      containerd-shim-runc-v1:containerd)
missing=()
for w in "${want[@]}"; do
  p=${w%%:*}
  if ! PATH=$PATH:/usr/sbin:/sbin command -v "$p" >/dev/null; then missing+=("${w##*:}"); fi
done
if [ ${#missing[@]} -gt 0 ]; then
  if [ "$(id -u)" != 0 ]; then
    echo "setup: these Debian packages are missing: ${missing[*]}" >&2
    echo "setup: run as root, or install them" >&2
    exit 1
  fi
  export DEBIAN_FRONTEND=noninteractive
  # No service of theirs is wanted: the lab starts its own on free ports.
  if [ ! -e /usr/sbin/policy-rc.d ]; then
    printf '#!/bin/sh\nexit 101\n' > /usr/sbin/policy-rc.d
    chmod 755 /usr/sbin/policy-rc.d
    trap 'rm -f /usr/sbin/policy-rc.d' EXIT
  fi
  apt-get update -qq
  apt-get install -y -qq --no-install-recommends "${missing[@]}"
fi

# The tools' go.mod pins the version; the build is kept in the cache under it.
tools=$here/tools/containerd
version=$(cd "$tools" && go list -m -f '{{.Version}}' github.com/containerd/containerd/v2)
cache=${SHOAL_CACHE:-$HOME/.cache/shoal}/containerd-$version
if [ ! -x "$cache/containerd" ]; then
  echo "setup: building containerd $version (a few minutes, once)"
  mkdir -p "$cache.new"
  (cd "$tools" && go build -ldflags '-s -w' -o "$cache.new/" \
    github.com/containerd/containerd/v2/cmd/ctr \
    github.com/containerd/containerd/v2/cmd/containerd-shim-runc-v2 \
    github.com/containerd/containerd/v2/cmd/containerd)
  rm -rf "$cache"
  mv "$cache.new" "$cache"
fi
mkdir -p "$bin"
for p in ctr containerd-shim-runc-v2 containerd; do ln -sf "$cache/$p" "$bin/$p"; done
