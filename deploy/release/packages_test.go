package main

import (
	"io"
	"os"
	"os/exec"
	"path/filepath"
	"testing"
)

// inBox begins a shell script in a mount namespace of its own, in which it may
// change /etc, /usr, /var and /run of the machine, and nothing of that stays.
// systemctl is a program that notes how it is called: a box has no systemd.
const inBox = `
set -e
box=$1 packages=$2
mount -t tmpfs tmpfs "$box"
for p in etc usr var; do
    mkdir "$box/$p" "$box/$p.work"
    mount -t overlay overlay -o "lowerdir=/$p,upperdir=$box/$p,workdir=$box/$p.work" /$p
done
mount -t tmpfs tmpfs /run
mkdir -p /run/systemd/system /etc/containerd
rm -f /usr/bin/systemctl
printf '#!/bin/sh\necho "$*" >> %s\n' "$box/calls" > /usr/bin/systemctl
chmod 755 /usr/bin/systemctl
export PATH=/usr/sbin:/usr/bin:/sbin:/bin
cd "$packages"

fail() { echo "FAIL: $*" >&2; exit 1; }
# called WORDS... fails if systemctl was not called so since the last time.
called() { grep -qx -- "$*" "$box/calls" || fail "systemctl was not called with $*, but with: $(cat "$box/calls")"; : > "$box/calls"; }
# refused TEXT fails if the package can be removed, or if the reason is another one.
refused() {
    if remove > "$box/out" 2>&1; then fail "the package was removed although $1"; fi
    grep -q "$1" "$box/out" && grep -q 'shoal install containerd --uninstall --restart' "$box/out" || fail "$1: the text is: $(cat "$box/out")"
    [ -x /usr/bin/shoal ] || fail "the program is gone although $1"
    if grep -q disable "$box/calls"; then fail "the daemons were stopped although $1"; fi
}
`

// lifeOfPackage installs, upgrades and removes a package, with install and remove.
const lifeOfPackage = `
install first
shoal version | grep -q '^shoal v1.2.3 ' || fail "shoal version: $(shoal version)"
[ "$(stat -c '%U:%G %a' /usr/bin/shoal)" = 'root:root 755' ] || fail "$(stat /usr/bin/shoal)"
[ "$(stat -c '%U:%G %a' /etc/shoal)" = 'root:root 755' ] || fail "$(stat /etc/shoal)"
bash -n /usr/share/bash-completion/completions/shoal
[ -s /usr/share/man/man1/shoal-node.1 ]
[ -s /usr/share/doc/shoal/THIRD-PARTY-LICENSES ]
# It says something of other units, too, and systemd before 254 does not know a key.
systemd-analyze verify /usr/lib/systemd/system/shoal-node.service /usr/lib/systemd/system/shoal-supernode.service > "$box/verify" 2>&1 || true
if grep shoal "$box/verify" | grep -v FileDescriptorStorePreserve; then fail 'systemd-analyze verify'; fi
grep -q '^ExecStart=/usr/bin/shoal node ' /usr/lib/systemd/system/shoal-node.service
called daemon-reload

echo 'version = 1' > /etc/shoal/node.toml
install second
[ "$(cat /etc/shoal/node.toml)" = 'version = 1' ] || fail "the upgrade has changed a config"
called try-restart shoal-node.service

echo '# set by shoal install' > /etc/containerd/config.toml
refused 'the config of containerd names shoal'
mkdir -p /var/lib/shoal/m/1 "$box/empty"
mkfs.erofs "$box/image" "$box/empty" > /dev/null 2>&1
mount -o loop "$box/image" /var/lib/shoal/m/1
refused 'mounted below /var/lib/shoal'
echo > /etc/containerd/config.toml
refused 'mounted below /var/lib/shoal'
umount /var/lib/shoal/m/1

# What shoal install has changed elsewhere.
mkdir -p '/var/lib/k3s data/etc' /var/lib/rancher/k3s/agent/etc/containerd/config-v3.toml.d
echo '# set by shoal install' > '/var/lib/k3s data/etc/config.toml'
printf '%s\n' '# set by shoal install' /var/lib/gone.toml '/var/lib/k3s data/etc/config.toml' > /etc/shoal/containerd-files
refused 'the config of containerd names shoal: /var/lib/k3s data/etc/config.toml'
echo > '/var/lib/k3s data/etc/config.toml'
# Lines that were added by hand.
hand=/var/lib/rancher/k3s/agent/etc/containerd/config-v3.toml.d/mine.toml
echo '  [proxy_plugins.shoal]' > $hand
refused "the config of containerd names shoal: $hand"
echo '# [proxy_plugins.shoal]' > $hand

# Another node than the package's, with images.
mkdir -p /var/lib/other/fuse /var/lib/other/m/1 /var/lib/shoal/fuse
mount -i -t fuse.shoal -o fd=4,rootmode=40000,user_id=0,group_id=0 shoal /var/lib/other/fuse
mount -o loop "$box/image" /var/lib/other/m/1

# The node has another directory.
ln -s other /var/lib/link
printf '%s\n' 'version = 1' 'root = "/var/lib/link"' '[log]' 'root = "/"' > /etc/shoal/node.toml
refused 'mounted below /var/lib/other'
echo 'version = 1' > /etc/shoal/node.toml

# The node's own mount, which stays mounted when the node ends. Nothing serves it, and this
# shell holds its connection, as systemd does.
mount -i -t fuse.shoal -o fd=3,rootmode=40000,user_id=0,group_id=0 shoal /var/lib/shoal/fuse

: > "$box/calls" # dpkg installs a package again that it could not remove
remove
[ ! -e /usr/bin/shoal ] || fail "the program is still there"
[ "$(cat /etc/shoal/node.toml)" = 'version = 1' ] || fail "the removal has changed a config"
[ "$(cat "$box/calls")" = 'disable --now shoal-node.service shoal-supernode.service
clean --what=fdstore shoal-node.service
daemon-reload' ] || fail "systemctl was called with: $(cat "$box/calls")"
if grep ' /var/lib/shoal/' /proc/self/mountinfo; then fail 'it is still mounted'; fi
[ "$(grep -c ' /var/lib/other/' /proc/self/mountinfo)" = 2 ] || fail 'a mount of another node is gone'

# A node that runs another program, here the chart's, needs nothing of the package.
install first
sed 's|^ExecStart=/usr/bin/|ExecStart=/opt/shoal/bin/|' /usr/lib/systemd/system/shoal-node.service > /etc/systemd/system/shoal-node.service
printf '%s\n' 'root = "/var/lib/other"' > /etc/shoal/node.toml
echo '# set by shoal install' > /etc/containerd/config.toml
: > "$box/calls"
remove 2> "$box/out" || fail "the package is not removed: $(cat "$box/out")"
grep -q 'shoal-node.service runs another program' "$box/out" || fail "it says: $(cat "$box/out")"
[ "$(cat "$box/calls")" = 'disable --now shoal-supernode.service
daemon-reload' ] || fail "systemctl was called with: $(cat "$box/calls")"
[ "$(grep -c ' /var/lib/other/' /proc/self/mountinfo)" = 2 ] || fail 'a mount of another node is gone'
echo PASSED
`

// TestPackages: dpkg and rpm themselves install, upgrade and remove the packages.
// Configs stay as they are, and a package whose images are in use is not removed.
func TestPackages(t *testing.T) {
	if os.Geteuid() != 0 {
		t.Skip("installs packages in a mount namespace: run as root")
	}
	src, programs := buildHere(t, work)
	d, err := writeDocs(t.Context(), src, programs[0].Programs[0].File)
	noError(t, err)
	for _, f := range []struct {
		format string
		layout treeLayout
		write  func(io.Writer, *source, platform, []entry) error
		tool   string
	}{
		{"deb", debLayout, writeDeb, `
install() { dpkg --install "$1.deb"; }
remove() { dpkg --remove shoal; }
`},
		{"rpm", rpmLayout, writeRPM, `
rpm() { command rpm --dbpath /var/lib/rpm "$@"; }
rpm --initdb
install() { rpm --upgrade --nodeps "$1.rpm"; }
remove() { rpm --erase shoal; }
rpm -qp --dump first.rpm > "$box/dump"
grep -q '^/usr/bin/shoal .* 0100755 root root ' "$box/dump" || fail "$(cat "$box/dump")"
if grep -v ' root root ' "$box/dump"; then fail 'files of others'; fi
[ "$(rpm -qp --licensefiles first.rpm | grep -c ^/usr/share/doc/shoal/)" = 2 ] || fail "$(rpm -qp --licensefiles first.rpm)"
`},
	} {
		t.Run(f.format, func(t *testing.T) {
			packages := t.TempDir()
			for name, version := range map[string]string{"first": "v1.2.3", "second": "v1.2.4-rc.1"} {
				of := *src
				of.Version = version
				files, err := tree(&of, programs[0], d, f.layout)
				noError(t, err)
				noError(t, writeFile(filepath.Join(packages, name+"."+f.format), func(w io.Writer) error {
					return f.write(w, &of, programs[0].platform, files)
				}))
			}
			var connections []*os.File
			for range 2 {
				f, err := os.OpenFile("/dev/fuse", os.O_RDWR, 0)
				noError(t, err)
				defer f.Close()
				connections = append(connections, f)
			}
			cmd := exec.CommandContext(t.Context(), "unshare", "--mount", "--propagation", "private", "sh", "-c", inBox+f.tool+lifeOfPackage, "sh", t.TempDir(), packages)
			cmd.ExtraFiles = connections
			if out, err := cmd.CombinedOutput(); err != nil {
				t.Errorf("%v\n%s", err, out)
			}
		})
	}
}
