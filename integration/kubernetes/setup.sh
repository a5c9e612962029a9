#!/usr/bin/env bash
# setup.sh BIN: builds what a Kubernetes cluster needs, from the Go module proxy, in
# the versions that integration/tools pins: Kubernetes' own programs, Helm, etcd, and the
# CNI plugins; and a runc with seccomp, which kubelet's sandboxes want. It also gets the
# CRDs of OpenKruise. It takes 8 minutes on 2 idle cores, and 4 GB of disk while it lasts;
# the programs (0.5 GB) are kept in the cache, by version, and BIN/kubernetes gets links
# to them.
# integration/setup.sh comes first.
set -euo pipefail
bin=$(realpath -m "$1")/kubernetes
here=$(cd "$(dirname "$0")/.." && pwd)
. "$here/tools/build.sh"

link() {
  local program
  for program in "$built"/*; do ln -sf "$program" "$bin/${1:-$(basename "$program")}"; done
}
mkdir -p "$bin" "$cache"

# A build cache of its own: 4 GB that nothing else has a use for. It survives a build
# that was broken off.
export GOCACHE=$cache/kubernetes-build
export CGO_ENABLED=0
BUILD_FLAGS=-trimpath

k=k8s.io/kubernetes
version=$(tool_version kubernetes $k)
# kubelet and kubectl ask each other for their versions.
IFS=. read -r _ minor _ <<<"$version"
LDFLAGS="-X k8s.io/component-base/version.gitVersion=$version -X k8s.io/component-base/version.gitMajor=1 -X k8s.io/component-base/version.gitMinor=$minor" \
  build kubernetes $k $k/cmd/kubelet $k/cmd/kube-apiserver $k/cmd/kube-controller-manager $k/cmd/kube-scheduler $k/cmd/kube-proxy $k/cmd/kubectl
link

p=helm.sh/helm/v4
NAME=helm build helm $p $p/cmd/helm
link

NAME=etcd build etcd go.etcd.io/etcd/server/v3 go.etcd.io/etcd/server/v3
link etcd

p=github.com/containernetworking/plugins
NAME=cni build cni $p $p/plugins/main/bridge $p/plugins/main/loopback $p/plugins/ipam/host-local
ln -sfn "$built" "$bin/cni"

# Of OpenKruise, for its CRDs, the source alone.
kruise=$(cd "$here/tools/kruise" && go mod download && go list -m -f '{{.Dir}}' github.com/openkruise/kruise)
ln -sfn "$kruise" "$bin/kruise"

# kubelet gives each sandbox a seccomp filter. The library comes as Debian's package,
# which need not be installed for it.
seccomp=$cache/libseccomp-dev
if [ ! -e "$seccomp" ]; then
  mkdir -p "$seccomp.$$"
  (cd "$seccomp.$$" && { apt-get download -qq libseccomp-dev || { apt-get update -qq && apt-get download -qq libseccomp-dev; }; })
  dpkg -x "$seccomp.$$"/*.deb "$seccomp.$$"
  mv "$seccomp.$$" "$seccomp"
fi
libs=$(dirname "$(find "$seccomp" -name libseccomp.a)")
export CGO_ENABLED=1 PKG_CONFIG_PATH=$libs/pkgconfig PKG_CONFIG_SYSROOT_DIR=$seccomp
runc=github.com/opencontainers/runc
LDFLAGS='-extldflags=-static' BUILD_FLAGS='-trimpath -tags=seccomp,netgo,osusergo' SUFFIX=-seccomp build runc $runc $runc
link

chmod -R u+w "$GOCACHE" 2>/dev/null || true
rm -rf "$GOCACHE"
