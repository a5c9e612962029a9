#!/usr/bin/env bash
# setup.sh BIN: installs what the tests, the demo and the benchmarks need beside
# Go: Debian packages (as root, only those that are missing), a containerd of a
# pinned version and the newest one, and a runc that knows user namespaces. What
# is built is kept in the cache, by version, and BIN gets links to it.
set -euo pipefail
bin=$(realpath -m "$1")
here=$(cd "$(dirname "$0")" && pwd)

# program:package
want=(runc:runc docker-registry:docker-registry skopeo:skopeo mmdebstrap:mmdebstrap
      mkfs.erofs:erofs-utils fio:fio mount:mount ip:iproute2 iptables:iptables python3:python3 htpasswd:apache2-utils
      containerd-shim-runc-v1:containerd gcc:gcc,libc6-dev
      rpm:rpm systemd-analyze:systemd)
missing=()
for w in "${want[@]}"; do
  p=${w%%:*}
  if ! PATH=$PATH:/usr/sbin:/sbin command -v "$p" >/dev/null; then IFS=, read -ra names <<<"${w##*:}"; missing+=("${names[@]}"); fi
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

. "$here/tools/build.sh"

mkdir -p "$bin"
c=github.com/containerd/containerd/v2
programs=("$c/cmd/containerd" "$c/cmd/containerd-shim-runc-v2" "$c/cmd/ctr")
build containerd "$c" "${programs[@]}"
for p in ctr containerd-shim-runc-v2 containerd; do ln -sf "$built/$p" "$bin/$p"; done
build containerd-newest "$c" "${programs[@]}"
ln -sfn "$built" "$bin/containerd-newest"

# Debian 12's runc is too old for pods with a user namespace. Seccomp is there if
# libseccomp-dev is; the tests need none.
runc=github.com/opencontainers/runc
if pkg-config --exists libseccomp 2>/dev/null; then
  BUILD_FLAGS='-tags=seccomp' build runc "$runc" "$runc"
else
  BUILD_FLAGS='-tags=' SUFFIX=-noseccomp build runc "$runc" "$runc"
fi
ln -sf "$built/runc" "$bin/runc-newest"

# What the lab's pods run.
(cd "$here" && CGO_ENABLED=0 go build -trimpath -ldflags '-s -w' -o "$bin/guest" ./guest)
