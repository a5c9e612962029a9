#!/bin/bash
# fio reads a file that it wrote when the image was made, and checks every block.
cd /tmp || exit 1
while :; do
  if out=$(/drill/lib/ld-linux-x86-64.so.2 --library-path /drill/lib /drill/fio --name=v --filename=/drill/fio.bin \
      --rw=randread --bs=64k --size=32m --ioengine=psync --verify=crc32c --verify_fatal=1 --readonly --output-format=terse 2>&1); then
    echo OK
  else
    echo "FAILED: fio: ${out:0:300}"
  fi
done
