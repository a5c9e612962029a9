#!/bin/bash
# Reads a thousand files again and again; their sum must never change.
set -o pipefail
cd /tmp || exit 1
find /usr/lib/python3* /usr/share /opt -xdev -type f -print0 2>/dev/null | sort -z >all
head -z -n 1000 all >some
first=
while :; do
  sum=$(xargs -0 cat <some | sha256sum) || { echo "FAILED: cat"; continue; }
  [ -z "$first" ] && first=$sum
  if [ "$sum" = "$first" ]; then echo OK; else echo "WRONG: $sum was $first"; fi
done
