#!/usr/bin/env bash
# fuzz.sh FUZZTIME: runs every fuzz target of the product module for FUZZTIME, one
# after another, and stops at the first finding. The input that Go keeps of it
# belongs in a commit, with what repairs it.
set -euo pipefail
if [ $# -ne 1 ]; then
  echo "usage: $0 FUZZTIME (30s, 10m, 1000x)" >&2
  exit 2
fi
time=$1
cd "$(dirname "$0")/.."
go=${GO:-go}
out=$(mktemp)
trap 'rm -f "$out"' EXIT

# "Target package" for each; go test -list prints a package's targets, then "ok package".
list() {
  "$go" test -list '^Fuzz' ./... | awk '
    /^Fuzz/ { name[n++] = $1 }
    /^ok/   { for (i = 0; i < n; i++) print name[i], $2; n = 0 }'
}
targets=$(list)
if [ -z "$targets" ]; then
  echo "fuzz: no targets found" >&2
  exit 1
fi

count=0
while read -r target package; do
  began=$SECONDS
  if "$go" test -run '^$' -fuzz "^$target\$" -fuzztime "$time" -fuzzminimizetime 1x "$package" >"$out" 2>&1 </dev/null; then
    runs=$(sed -n 's/.*execs: \([0-9]*\).*/\1/p' "$out" | tail -1)
    echo "ok    $package $target: ${runs:-0} runs in $((SECONDS - began)) s"
    count=$((count + 1))
    continue
  fi
  cat "$out"
  dir=$("$go" list -f '{{.Dir}}' "$package")
  echo "FAIL  $package $target" >&2
  kept=$(sed -n 's/^ *Failing input written to \(.*\)$/\1/p' "$out" | tail -1)
  if [ -n "$kept" ]; then
    echo "the input is in $dir/$kept; once more: (cd $dir && go test -run '$target/${kept##*/}' .)" >&2
  else
    echo "no input was kept: a seed or an input in $dir/testdata/fuzz/$target fails, or the run itself did" >&2
  fi
  exit 1
done <<<"$targets"
echo "$count targets, no finding"
