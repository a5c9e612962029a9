#!/bin/sh
# Before a removal, for deb ("remove") and rpm (0, the number of versions that stay).
# Before an upgrade there is nothing to do.
set -e
case "$1" in
    remove | 0) ;;
    *) exit 0 ;;
esac

# configured prints the files of containerd that name shoal: of those that shoal install
# has changed, and of those where lines are added by hand.
configured() {
    if [ -e /etc/shoal/containerd-files ]; then
        while read -r file; do
            grep -ls 'set by shoal install' "$file" || :
        done < /etc/shoal/containerd-files
    fi
    grep -Erls --include='*.toml' 'set by shoal install|^[^#]*proxy_plugins.*shoal' \
        /etc/containerd /var/lib/rancher/*/agent/etc/containerd || :
}

# The directory of the node: the one that has the FUSE mount, and the default.
roots=$(sed -n 's|^[^ ]* [^ ]* [^ ]* [^ ]* \([^ ]*\)/fuse .* - fuse\.shoal .*|\1|p' /proc/self/mountinfo)
for root in $roots /var/lib/shoal; do
    if grep -q " $root/[^ ]* .* - erofs " /proc/self/mountinfo; then
        mounted=$root
    fi
done
configs=$(configured | sort -u)
if [ -n "$mounted" ] || [ -n "$configs" ]; then
    if [ -n "$mounted" ]; then
        echo "shoal: images of this machine are mounted below $mounted; containers on them would get I/O errors" >&2
    else
        echo "shoal: containers would not start without shoal, since the config of containerd names shoal:" $configs >&2
    fi
    cat >&2 <<'EOF'
shoal: the package is not removed. First move the images to overlayfs, or remove them:

    shoal install containerd --uninstall --restart

This command leaves lines that were added by hand: remove these lines, and restart
containerd. Then restart or drain the containers of these images, and remove the package again.
https://github.com/shoalfs/shoal/blob/main/docs/install.md#uninstalling has all steps.
EOF
    exit 1
fi
if [ -d /run/systemd/system ]; then
    systemctl disable --now shoal-node.service shoal-supernode.service
    # systemd 254 and later go on holding the FUSE connection; earlier ones know no such store.
    systemctl clean --what=fdstore shoal-node.service 2>/dev/null || :
fi
# The node's own mount stays when the node ends. Nothing uses it now, and programs that
# look at all mounts would wait for a node.
for root in $roots; do
    timeout -s KILL 10 umount -l "$root/fuse" || :
done
