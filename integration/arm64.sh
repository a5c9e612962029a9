#!/usr/bin/env bash
# arm64.sh: the program for arm64, and tests of packages that mount nothing, under
# qemu. qemu gives processes pages of 64 KiB here (versions before 9 do), as some
# kernels of arm64 have them: what assumes 4 KiB fails. With such pages it does not
# show the part of a file that is written after the file was mapped, so tests of
# bbolt's databases cannot run so; real kernels do.
set -euo pipefail
cd "$(dirname "$0")/.."
export GOOS=linux GOARCH=arm64 CGO_ENABLED=0

tmp=$(mktemp -d)
trap 'rm -rf "$tmp"' EXIT
qemu=${SHOAL_CACHE:-$HOME/.cache/shoal}/qemu-user/qemu-aarch64-static
if [ ! -x "$qemu" ]; then
  # Unpacked and not installed: the package would have the machine's kernel start
  # programs of other architectures by itself.
  mkdir "$tmp/debian"
  apt-get update -qq
  for package in qemu-user-static qemu-user; do # Debian 12, Debian 13
    (cd "$tmp/debian" && apt-get download -qq "$package" && dpkg -x "$package"_*.deb .)
    found=$(find "$tmp/debian/usr/bin" -type f -name 'qemu-aarch64*' 2>/dev/null | head -n 1)
    [ -z "$found" ] || break
  done
  [ -n "$found" ] || { echo "arm64: Debian's qemu-user-static and qemu-user have no qemu-aarch64" >&2; exit 1; }
  mkdir -p "$(dirname "$qemu")"
  install -m 755 "$found" "$qemu"
fi
run=("$qemu" -p 65536)

go build -trimpath -o "$tmp/shoal" ./cmd/shoal
out=$("${run[@]}" "$tmp/shoal" version)
[[ $out == *linux/arm64 ]] || { echo "arm64: shoal version prints: $out" >&2; exit 1; }
for role in node supernode; do
  "${run[@]}" "$tmp/shoal" config default "$role" > "$tmp/$role.toml"
  "${run[@]}" "$tmp/shoal" config check "$role" "$tmp/$role.toml"
done
go test -count=1 -timeout 10m -exec "${run[*]}" ./p2p/wire ./blockdev/cdc ./blockdev/cache/internal/presence
