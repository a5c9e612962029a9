#!/bin/sh
# After a removal and after an upgrade, for deb and rpm. What the daemons have
# written below /var/lib, and the configs in /etc/shoal, stay.
set -e
if [ -d /run/systemd/system ]; then
    systemctl daemon-reload
fi
