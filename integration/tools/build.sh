# build.sh is read by the scripts that install tools (setup.sh, kubernetes/setup.sh).
# They set here, the directory of integration.

cache=${SHOAL_CACHE:-$HOME/.cache/shoal}

# tool_version DIR MODULE prints which version of MODULE tools/DIR/go.mod pins.
tool_version() {
  (cd "$here/tools/$1" && go list -m -f '{{.Version}}' "$2")
}

# build DIR MODULE PROGRAM... builds programs of MODULE in the version that
# tools/DIR/go.mod pins, once, and sets built to their directory in the cache.
# BUILD_FLAGS and LDFLAGS are for go build; SUFFIX tells apart what other flags were
# used for; NAME is what the directory is called, else the module's last word.
build() {
  local dir=$here/tools/$1 module=$2 version program missing=; version=$(tool_version "$1" "$2"); shift 2
  built=$cache/${NAME:-$(basename "${module%/v2}")}-$version${SUFFIX:-}
  for program; do
    [ -e "$built/$(basename "${program%/v[0-9]}")" ] || missing=1
  done
  if [ -n "$missing" ]; then
    echo "setup: building ${NAME:-$(basename "$1")} $version (a few minutes, once)"
    mkdir -p "$built.$$"
    (cd "$dir" && go build -ldflags "-s -w ${LDFLAGS:-}" ${BUILD_FLAGS:-} -o "$built.$$/" "$@")
    rm -rf "$built"
    mv "$built.$$" "$built"
  fi
}
