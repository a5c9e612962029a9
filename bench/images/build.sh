#!/bin/bash
# Builds the measurement images from Debian and npm packages and pushes them to a
# registry's storage directory, $SHOAL_CACHE/images/registry.
#   build.sh [GROUP|IMAGE ...]     groups: first rest public (default)
# Every image = base layer + package layer(s) + a small app layer with /app/start.sh, which
# prints READY once it really serves and then exits 0. Layers are built once (overlayfs
# upper dirs under $LAB/layers) and reused; remove a layer's directory to rebuild it, and
# an image that is there already is left alone (remove $LAB/images/NAME.TAG to push it again).
# Needs root and: mmdebstrap skopeo docker-registry python3, npm (node-express). A version that the
# archive no longer has (DJANGO_V1/V2): give another from `apt-cache madison python3-django`.
set -euo pipefail
LAB=${LAB:-${SHOAL_CACHE:-$HOME/.cache/shoal}/images}; HERE=$(cd "$(dirname "$0")" && pwd)
PY=${PY:-/usr/bin/python3}; STORE=$LAB/oci; LAYERS=$LAB/layers; BASETAR=${BASETAR:-$LAB/base.tar}
APTOPT=(-y -q -o Acquire::Check-Valid-Until=false -o Acquire::Check-Date=false -o Dpkg::Use-Pty=0)
mkdir -p "$STORE" "$LAYERS"
say() { echo "[$(date +%T)] $*"; }

FIRST="debian python-django node-express redis nginx torch"; REST="postgres tomcat wordpress golang"
tags() { case $1 in python-django|node-express|redis) echo v1 v2;; *) echo v1;; esac; }
todo=()
for a in "${@:-public}"; do
  case $a in first) names=$FIRST;; rest) names=$REST;; public) names="$FIRST $REST";; *) names=$a;; esac
  for n in $names; do
    for t in $(tags "$n"); do
      if [ ! -e "$LAB/images/$n.$t" ] || [ ! -d "$LAB/registry/docker/registry/v2/repositories/$n/_manifests/tags/$t" ]; then todo+=("$n"); break; fi
    done
  done
done
[ ${#todo[@]} -gt 0 ] || exit 0

# A registry of our own on a free port, for as long as this script runs.
port=$($PY -c 'import socket; s=socket.socket(); s.bind(("127.0.0.1",0)); print(s.getsockname()[1])')
REG=127.0.0.1:$port
cat > "$LAB/registry.yml" <<EOT
version: 0.1
log: {level: error, accesslog: {disabled: true}}
storage: {filesystem: {rootdirectory: $LAB/registry}}
http: {addr: $REG}
EOT
OTEL_TRACES_EXPORTER=none docker-registry serve "$LAB/registry.yml" > "$LAB/registry.log" 2>&1 &
registry=$!
trap 'kill $registry' EXIT

if [ ! -s "$BASETAR" ]; then mmdebstrap --variant=minbase --include=ca-certificates bookworm "$BASETAR"; fi
base() {
  [ -s "$LAYERS/base/info" ] && return
  mkdir -p "$LAYERS/base/up"; tar -C "$LAYERS/base/up" -xpf "$BASETAR" --exclude='./dev/*'
  $PY "$HERE/mkoci.py" layer "$STORE" "$LAYERS/base/up" > "$LAYERS/base/info.t"; mv "$LAYERS/base/info.t" "$LAYERS/base/info"
}
# layer ID "PARENT IDS, lowest first" COMMAND...: run COMMAND with $M = the mounted stack
layer() {
  local id=$1 parents=$2 d=$LAYERS/$1 low="" p; shift 2
  [ -s "$d/info" ] && return
  say "layer $id"; if mountpoint -q "$d/mnt"; then umount -R "$d/mnt"; fi; rm -rf "$d"; mkdir -p "$d/up" "$d/work" "$d/mnt"
  for p in $parents; do low=$LAYERS/$p/up${low:+:$low}; done
  M=$d/mnt; mount -t overlay overlay -o "lowerdir=$low,upperdir=$d/up,workdir=$d/work,redirect_dir=off,metacopy=off" "$M"
  if ! "$@" > "$d/log" 2>&1; then umount "$M"; say "layer $id FAILED, see $d/log"; tail -3 "$d/log"; return 1; fi
  umount "$M"; rm -rf "$d/work" "$d/mnt"
  $PY "$HERE/mkoci.py" layer "$STORE" "$d/up" > "$d/info.t"; mv "$d/info.t" "$d/info"
}
apt_in() {   # apt_in PACKAGES...: install in $M as a Dockerfile RUN apt-get install would
  set -e
  cp "$M/etc/resolv.conf" "$M/../resolv.keep" 2>/dev/null || true
  cat /etc/resolv.conf > "$M/etc/resolv.conf"
  printf '#!/bin/sh\nexit 101\n' > "$M/usr/sbin/policy-rc.d"; chmod 755 "$M/usr/sbin/policy-rc.d"
  mount --bind /dev "$M/dev"; mount -t proc proc "$M/proc"
  local rc=0
  chroot "$M" env DEBIAN_FRONTEND=noninteractive LC_ALL=C apt-get "${APTOPT[@]}" update &&
  chroot "$M" env DEBIAN_FRONTEND=noninteractive LC_ALL=C apt-get "${APTOPT[@]}" install --no-install-recommends "$@" || rc=$?
  chroot "$M" apt-get clean; rm -rf "$M"/var/lib/apt/lists/* "$M/usr/sbin/policy-rc.d" "$M"/var/log/apt/* "$M"/var/log/dpkg.log
  umount "$M/proc" "$M/dev"
  if [ -f "$M/../resolv.keep" ]; then mv "$M/../resolv.keep" "$M/etc/resolv.conf"; else rm -f "$M/etc/resolv.conf"; fi
  return $rc
}
app_in() {   # app_in NAME [VERSION]: COPY apps/NAME to /app, with new mtimes
  set -e; mkdir -p "$M/app"; cp -r "$HERE/apps/common/." "$M/app/"; cp -r "$HERE/apps/$1/." "$M/app/"
  local v=${2:-v1}; echo "$v" > "$M/app/VERSION"
  if [ -d "$M/app/$v.d" ]; then cp -r "$M/app/$v.d/." "$M/app/"; fi; rm -rf "$M"/app/v?.d
  chmod 755 "$M/app/start.sh"
}
npm_in() {   # npm_in VERSION: what `npm ci` would leave in /app/node_modules
  set -e; local w=$LAB/npm-$1; rm -rf "$w"; mkdir -p "$w"; cp "$HERE/apps/node-express.npm/$1.json" "$w/package.json"
  (cd "$w" && npm install --no-audit --no-fund --ignore-scripts --loglevel=error)
  mkdir -p "$M/app"; cp -r "$w/node_modules" "$w/package.json" "$w/package-lock.json" "$M/app/"; find "$M/app" -exec touch -h {} +
}
image() {    # image NAME TAG LAYER...
  local n=$1 t=$2 l f=(); shift 2
  for l in "$@"; do f+=("$LAYERS/$l/info"); done
  $PY "$HERE/mkoci.py" image "$STORE" "$n.$t" '["/bin/sh","/app/start.sh"]' "${f[@]}" >/dev/null
  skopeo copy -q --dest-tls-verify=false "oci:$STORE:$n.$t" "docker://$REG/$n:$t"
  mkdir -p "$LAB/images"; echo "$*" > "$LAB/images/$n.$t"; say "pushed $n:$t"
}
# simple NAME "PACKAGE LIST OF LAYER 1" ["... LAYER 2" ...]: base + apt layers + app
simple() {
  local n=$1 st="base" i=0 p; shift
  for p in "$@"; do i=$((i+1)); layer "$n.apt$i" "$st" apt_in $p || return 1; st="$st $n.apt$i"; done
  layer "$n.app" "$st" app_in "$n" || return 1; image "$n" v1 $st "$n.app"
}
b_debian() { simple debian; }
b_python-django() {
  # a real upgrade: v1 has the point release's Django, v2 the security archive's; both layers rebuilt
  layer py3 base apt_in python3 ca-certificates
  local x="python3-djangorestframework python3-psycopg2 python3-pil python3-requests gunicorn" v
  layer django.v1 "base py3" apt_in $x python3-django=${DJANGO_V1:-3:3.2.25-0+deb12u3}
  layer django.v2 "base py3" apt_in $x python3-django=${DJANGO_V2:-3:3.2.25-0+deb12u7}
  for v in v1 v2; do layer django.app.$v "base py3 django.$v" app_in python-django $v; image python-django $v base py3 django.$v django.app.$v; done
}
b_node-express() {
  layer node base apt_in nodejs ca-certificates; local v
  for v in v1 v2; do layer nodemod.$v "base node" npm_in $v; layer node.app.$v "base node nodemod.$v" app_in node-express $v
    image node-express $v base node nodemod.$v node.app.$v; done
}
b_redis() { layer redis.apt1 base apt_in redis-server redis-tools; local v
  for v in v1 v2; do layer redis.app.$v "base redis.apt1" app_in redis $v; image redis $v base redis.apt1 redis.app.$v; done; }
b_nginx() { simple nginx nginx; }
b_torch() { layer py3 base apt_in python3 ca-certificates
  layer torch.apt1 "base py3" apt_in python3-numpy python3-scipy python3-pandas python3-sklearn
  layer torch.apt2 "base py3 torch.apt1" apt_in python3-torch python3-torchvision
  layer torch.app "base py3 torch.apt1 torch.apt2" app_in torch; image torch v1 base py3 torch.apt1 torch.apt2 torch.app; }
b_postgres() { simple postgres postgresql-15; }
b_tomcat() { simple tomcat "openjdk-17-jre-headless" "tomcat10-common libtomcat10-java"; }
b_wordpress() { simple wordpress "apache2 libapache2-mod-php8.2 php8.2-mysql php8.2-gd php8.2-xml php8.2-mbstring php8.2-curl" "wordpress"; }
b_golang() { simple golang "golang-go gcc libc6-dev git"; }

base
failed=0
for i in "${todo[@]}"; do "b_$i" || { say "image $i FAILED"; failed=1; }; done
exit $failed
