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

# replaced says whether a unit file that is not the package's (of the chart, or by hand) has a
# daemon run another program: that daemon needs nothing of the package.
replaced() {
    grep -qs '^ExecStart=' "/etc/systemd/system/$1" && ! grep -q '^ExecStart=[-@:+!]*/usr/bin/shoal ' "/etc/systemd/system/$1"
}

units=
for unit in shoal-node.service shoal-supernode.service; do
    if replaced "$unit"; then
        echo "shoal: /etc/systemd/system/$unit runs another program than the package's, and goes on" >&2
    else
        units="$units $unit"
    fi
done
case $units in
*shoal-node.service*)
    # Other nodes of the machine have other directories.
    root=$(sed -n '/^[[:space:]]*\[/q; s/^[[:space:]]*root[[:space:]]*=[[:space:]]*["'\'']\([^"'\'']*\).*/\1/p' /etc/shoal/node.toml 2>/dev/null || :)
    root=$(readlink -m "${root:-/var/lib/shoal}")
    if grep -q " $root/[^ ]* .* - erofs " /proc/self/mountinfo; then
        mounted=$root
    fi
    configs=$(configured | sort -u)
    ;;
esac
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
if [ -d /run/systemd/system ] && [ -n "$units" ]; then
    systemctl disable --now $units
    if [ -n "$root" ]; then
        # systemd 254 and later go on holding the FUSE connection; earlier ones know no such store.
        systemctl clean --what=fdstore shoal-node.service 2>/dev/null || :
        # The node's own mount stays when the node ends. Nothing uses it now, and programs that
        # look at all mounts would wait for a node.
        if grep -q " $root/fuse .* - fuse\.shoal " /proc/self/mountinfo; then
            timeout -s KILL 10 umount -l "$root/fuse" || :
        fi
    fi
fi
