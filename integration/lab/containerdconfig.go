package lab

import (
	"cmp"
	"fmt"
	"os"
	"path/filepath"
	"strings"
	"time"
)

// ContainerdOptions say which containerd is started, and how.
type ContainerdOptions struct {
	// Binary is the program's path; empty: the one in Lab.Bin (2.x).
	Binary string
	// ConfigVersion is 3 for containerd 2.x (the default), 2 for 1.x.
	ConfigVersion int
	// Snapshotters beside overlayfs that images are pulled for: erofs, shoal.
	Snapshotters []string
	// Shoal is the socket of a shoal node to use as a snapshotter; empty: none.
	Shoal string
	// ShoalRoot is the node's root, which containerd is told to be where the
	// snapshotter's images are; empty: it is told nothing.
	ShoalRoot string
	// NoRemap leaves out that the snapshotter can map ids.
	NoRemap bool
	// Mirror is the host:port of a node's registry mirror, which Pull asks before
	// the registry; empty: none.
	Mirror string
	// MirrorCA is the file of the authority that the mirror's certificate is from
	// (Node.MirrorCA).
	MirrorCA string
	// CRI switches its CRI plugins on; nil: they are off.
	CRI *CRIOptions
	// Extra is added to the end of the config file.
	Extra string
}

// CRIOptions say what containerd's CRI plugins do.
type CRIOptions struct {
	// Pause is the image of pods' sandboxes (Registry.PushPause).
	Pause string
	// Snapshotter is what images are pulled for and pods run with; empty: shoal.
	Snapshotter string
	// Handlers are further runtime handlers, each with a snapshotter of its own.
	Handlers map[string]string
	// NoAnnotations is CRI's default, with which a snapshotter is not told which
	// image a layer belongs to. containerd 2.x then pulls without its transfer
	// service, which tells it all the same.
	NoAnnotations bool
	// ProgressTimeout is after how long without progress a pull ends; 0: containerd's
	// own, which is 5 minutes.
	ProgressTimeout time.Duration
	// DiscardUnpacked has containerd forget layers once they have been unpacked.
	DiscardUnpacked bool
}

// ContainerdVersion is a containerd that the lab has.
type ContainerdVersion struct {
	// Name is the version as tests call it.
	Name string
	// Binary and ConfigVersion are for ContainerdOptions.
	Binary        string
	ConfigVersion int
}

// ContainerdVersions are those that shoal is tested with: the pinned one, the
// newest, and Debian 12's.
func (l *Lab) ContainerdVersions() []ContainerdVersion {
	return []ContainerdVersion{
		{"pinned", filepath.Join(l.Bin, "containerd"), 3},
		{"newest", filepath.Join(l.Bin, "containerd-newest", "containerd"), 3},
		{"1.6", "/usr/bin/containerd", 2},
	}
}

// configure writes the config file and those that it names.
func (c *Containerd) configure(name string) error {
	l, o := c.lab, c.o
	dir := l.Path(name)
	var b strings.Builder
	fmt.Fprintf(&b, "version = %d\nroot = %q\nstate = %q\n", o.ConfigVersion, c.Root, filepath.Join(dir, "state"))
	disabled := `"io.containerd.nri.v1.nri"` // its socket is one for all containerds of a machine
	if o.CRI == nil {
		disabled = `"io.containerd.grpc.v1.cri", "io.containerd.cri.v1.images", "io.containerd.cri.v1.runtime"`
	}
	fmt.Fprintf(&b, "disabled_plugins = [%s]\n[grpc]\naddress = %q\n", disabled, c.Address)
	if o.Shoal != "" {
		fmt.Fprintf(&b, "[proxy_plugins.shoal]\ntype = \"snapshot\"\naddress = %q\n", o.Shoal)
		if !o.NoRemap {
			b.WriteString("capabilities = [\"remap-ids\"]\n")
		}
		b.WriteString("[proxy_plugins.shoal.exports]\n")
		if o.ShoalRoot != "" {
			fmt.Fprintf(&b, "root = %q\n", o.ShoalRoot)
		}
		if o.ConfigVersion >= 3 {
			b.WriteString("enable_remote_snapshot_annotations = \"true\"\n")
		}
	}
	if o.ConfigVersion >= 3 {
		names := append([]string{"overlayfs"}, o.Snapshotters...)
		if o.Shoal != "" {
			names = append(names, "shoal")
		}
		for _, s := range names {
			fmt.Fprintf(&b, "[[plugins.'io.containerd.transfer.v1.local'.unpack_config]]\nplatform = \"linux/amd64\"\nsnapshotter = %q\ndiffer = \"walking\"\n", s)
		}
	}
	if o.Mirror != "" {
		hosts := fmt.Sprintf("[host.\"https://%s\"]\n  ca = %q\n  capabilities = [\"pull\", \"resolve\"]\n", o.Mirror, o.MirrorCA)
		if _, err := l.writeFile(name+"/certs.d/_default/hosts.toml", hosts); err != nil {
			return err
		}
		c.hosts = l.Path(name, "certs.d")
	}
	if o.CRI != nil {
		if err := l.fakeCNI(); err != nil {
			return err
		}
		if err := os.MkdirAll(filepath.Join(dir, "certs.d"), 0o711); err != nil {
			return err
		}
		if o.ConfigVersion >= 3 {
			c.writeCRI(&b, dir)
		} else {
			c.writeOldCRI(&b, dir)
		}
	}
	b.WriteString(o.Extra)
	_, err := l.writeFile(name+"/config.toml", b.String())
	return err
}

// writeCRI writes the sections of containerd 2.x. Sandboxes cannot lower their OOM
// score where root has no CAP_SYS_RESOURCE.
func (c *Containerd) writeCRI(b *strings.Builder, dir string) {
	o := c.o.CRI
	fmt.Fprintf(b, `[plugins.'io.containerd.internal.v1.opt']
path = %q
[plugins.'io.containerd.grpc.v1.cri']
stream_server_address = "127.0.0.1"
stream_server_port = "0"
[plugins.'io.containerd.cri.v1.images']
snapshotter = %q
disable_snapshot_annotations = %v
use_local_image_pull = %v
discard_unpacked_layers = %v
image_pull_progress_timeout = %q
[plugins.'io.containerd.cri.v1.images'.pinned_images]
sandbox = %q
[plugins.'io.containerd.cri.v1.images'.registry]
config_path = %q
[plugins.'io.containerd.cri.v1.runtime']
disable_apparmor = true
restrict_oom_score_adj = true
netns_mounts_under_state_dir = true
[plugins.'io.containerd.cri.v1.runtime'.cni]
bin_dirs = [%q]
conf_dir = %q
[plugins.'io.containerd.cri.v1.runtime'.containerd]
default_runtime_name = "runc"
`, filepath.Join(dir, "opt"), o.snapshotter(), o.NoAnnotations, o.NoAnnotations, o.DiscardUnpacked, o.progressTimeout(), o.Pause, filepath.Join(dir, "certs.d"), c.lab.Path("cni", "bin"), c.lab.Path("cni", "conf"))
	runtime := func(name string) {
		fmt.Fprintf(b, "[plugins.'io.containerd.cri.v1.runtime'.containerd.runtimes.%s]\nruntime_type = \"io.containerd.runc.v2\"\n", name)
		if s := o.Handlers[name]; s != "" {
			fmt.Fprintf(b, "snapshotter = %q\n", s)
		}
		fmt.Fprintf(b, "[plugins.'io.containerd.cri.v1.runtime'.containerd.runtimes.%s.options]\nBinaryName = %q\n", name, filepath.Join(c.lab.Bin, "runc-newest"))
	}
	runtime("runc")
	for name, s := range o.Handlers {
		runtime(name)
		fmt.Fprintf(b, "[plugins.'io.containerd.cri.v1.images'.runtime_platforms.%s]\nsnapshotter = %q\n", name, s)
	}
}

// writeOldCRI writes the sections of containerd 1.x, which runs the machine's runc.
func (c *Containerd) writeOldCRI(b *strings.Builder, dir string) {
	o := c.o.CRI
	fmt.Fprintf(b, `[plugins."io.containerd.internal.v1.opt"]
path = %q
[plugins."io.containerd.grpc.v1.cri"]
stream_server_address = "127.0.0.1"
stream_server_port = "0"
sandbox_image = %q
disable_apparmor = true
restrict_oom_score_adj = true
netns_mounts_under_state_dir = true
image_pull_progress_timeout = %q
[plugins."io.containerd.grpc.v1.cri".registry]
config_path = %q
[plugins."io.containerd.grpc.v1.cri".cni]
bin_dir = %q
conf_dir = %q
[plugins."io.containerd.grpc.v1.cri".containerd]
snapshotter = %q
disable_snapshot_annotations = %v
discard_unpacked_layers = %v
[plugins."io.containerd.grpc.v1.cri".containerd.runtimes.runc]
runtime_type = "io.containerd.runc.v2"
`, filepath.Join(dir, "opt"), o.Pause, o.progressTimeout(), filepath.Join(dir, "certs.d"), c.lab.Path("cni", "bin"), c.lab.Path("cni", "conf"), o.snapshotter(), o.NoAnnotations, o.DiscardUnpacked)
}

func (o *CRIOptions) snapshotter() string { return cmp.Or(o.Snapshotter, "shoal") }

func (o *CRIOptions) progressTimeout() string {
	return cmp.Or(o.ProgressTimeout, 5*time.Minute).String()
}

// fakeCNI makes a network that gives pods nothing but an address to show: those
// with a network namespace of their own must have one.
func (l *Lab) fakeCNI() error {
	const plugin = `#!/bin/sh
cat >/dev/null
case $CNI_COMMAND in
ADD) echo '{"cniVersion":"0.3.1","interfaces":[{"name":"'"$CNI_IFNAME"'","sandbox":"'"$CNI_NETNS"'"}],"ips":[{"version":"4","address":"192.0.2.1/32","interface":0}]}' ;;
VERSION) echo '{"cniVersion":"0.3.1","supportedVersions":["0.3.1","0.4.0"]}' ;;
esac
`
	for _, name := range []string{"lab", "loopback"} {
		p, err := l.writeFile("cni/bin/"+name, plugin)
		if err == nil {
			err = os.Chmod(p, 0o700)
		}
		if err != nil {
			return err
		}
	}
	_, err := l.writeFile("cni/conf/10-lab.conflist", `{"cniVersion":"0.3.1","name":"lab","plugins":[{"type":"lab"}]}`)
	return err
}
