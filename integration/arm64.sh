#!/usr/bin/env bash
# arm64.sh: the program for arm64, and tests of packages that mount nothing, under
# qemu. qemu gives processes pages of 64 KiB here (versions before 9 do), as some
# kernels of arm64 have them: what assumes 4 KiB fails.
set -euo pipefail
cd "$(dirname "$0")/.."
export GOOS=linux GOARCH=arm64 CGO_ENABLED=0

qemu=${SHOAL_CACHE:-$HOME/.cache/shoal}/qemu-user/qemu-aarch64-static
if [ ! -x "$qemu" ]; then
  # Unpacked and not installed: the package would have the machine's kernel start
  # programs of other architectures by itself.
  dir=$(mktemp -d)
  trap 'rm -rf "$dir"' EXIT
  chmod 755 "$dir"
  for package in qemu-user-static qemu-user; do # Debian 12, Debian 13
    (cd "$dir" && apt-get download -qq "$package" && dpkg -x "$package"_*.deb .)
    found=$(find "$dir/usr/bin" -type f -name 'qemu-aarch64*' 2>/dev/null | head -n 1)
    [ -z "$found" ] || break
  done
  [ -n "$found" ] || { echo "arm64: Debian's qemu-user-static and qemu-user have no qemu-aarch64" >&2; exit 1; }
  mkdir -p "$(dirname "$qemu")"
  install -m 755 "$found" "$qemu"
fi
run=("$qemu" -p 65536)

dir2=$(mktemp -d)
trap 'rm -rf "${dir:-}" "$dir2"' EXIT
go build -trimpath -o "$dir2/shoal" ./cmd/shoal
out=$("${run[@]}" "$dir2/shoal" version)
[[ $out == *linux/arm64 ]] || { echo "arm64: shoal version prints: $out" >&2; exit 1; }
for role in node supernode; do
  "${run[@]}" "$dir2/shoal" config default "$role" > "$dir2/$role.toml"
  "${run[@]}" "$dir2/shoal" config check "$role" "$dir2/$role.toml"
done
go test -count=1 -timeout 10m -exec "${run[*]}" ./p2p/wire ./blockdev/cdc ./blockdev/layer ./blockdev/cache/internal/presence ./blockdev/cache ./internal/boltcheck
