#!/bin/sh
# Before a removal, for deb ("remove") and rpm (0, the number of versions that stay).
# Before an upgrade there is nothing to do.
set -e
case "$1" in
    remove | 0) ;;
    *) exit 0 ;;
esac

# The directory of the node: the one that has the FUSE mount, and the default.
roots=$(sed -n 's|^[^ ]* [^ ]* [^ ]* [^ ]* \([^ ]*\)/fuse .* - fuse\.shoal .*|\1|p' /proc/self/mountinfo)
for root in $roots /var/lib/shoal; do
    if grep -q " $root/[^ ]* .* - erofs " /proc/self/mountinfo; then
        mounted=$root
    fi
done
if [ -n "$mounted" ] || grep -rqs 'set by shoal install' /etc/containerd; then
    if [ -n "$mounted" ]; then
        echo "shoal: images of this machine are mounted below $mounted; containers on them would get I/O errors" >&2
    else
        echo "shoal: the config of containerd names shoal; containers would not start without it" >&2
    fi
    cat >&2 <<'EOF'
shoal: the package is not removed. First move the images to overlayfs, or remove them:

    shoal install containerd --uninstall --restart

Then restart or drain the containers of these images, and remove the package again.
https://github.com/shoalfs/shoal/blob/main/docs/install.md#uninstalling has all steps.
EOF
    exit 1
fi
if [ -d /run/systemd/system ]; then
    systemctl disable --now shoal-node.service shoal-supernode.service
fi
