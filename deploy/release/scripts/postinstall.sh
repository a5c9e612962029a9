#!/bin/sh
# After an installation and after an upgrade, for deb and rpm. It starts nothing
# that does not run: a node needs a config first.
set -e
if [ -d /run/systemd/system ]; then
    systemctl daemon-reload
    # A daemon that runs changes to the new program. Reads of containers wait until
    # the node is back.
    for unit in shoal-supernode.service shoal-node.service; do
        systemctl try-restart "$unit" ||
            echo "shoal: cannot restart $unit with the new program: see 'systemctl status $unit'" >&2
    done
fi
