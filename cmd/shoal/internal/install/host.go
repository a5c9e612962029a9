package install

import (
	"cmp"
	"errors"
	"fmt"
	"io/fs"
	"os"
	"path/filepath"
	"slices"
	"strings"
)

// ErrUnsupported is the cause of an error on a machine whose containerd cannot be
// configured by files.
var ErrUnsupported = errors.New("not possible on this machine")

// Host says where a distribution of Kubernetes keeps containerd and its config.
type Host struct {
	// Name is the distribution's; empty: containerd as its project ships it.
	Name string
	// Config is containerd's config file, Program its program, Socket its socket.
	Config, Program, Socket string
	// Services are the units of systemd that run containerd. One of them is active.
	Services []string
	// Generated says that the distribution writes Config at each start. Only files of a
	// directory beside Config last, if Config imports this directory.
	Generated bool
	// Unit is a file with settings for containerd's unit, by which containerd's start
	// makes the changes again: the distribution writes Config at each boot. Empty: Config
	// lasts.
	Unit string
	// Notes are for the operator, after an installation.
	Notes []string
	// Certs is where containerd 2.2 looks for hosts.toml files if its config does not say;
	// empty: /etc/containerd/certs.d.
	Certs string
	// Record is a file that lists all files with lines of shoal's; empty: none does.
	Record string
	// snippet says what the config of new machines needs; nil: nothing.
	snippet *snippet
	// registries says where to configure registries, if not in hosts.toml files.
	registries string
	// refused says why nothing can be installed.
	refused string
}

// snippet is a document in YAML that has the lines for containerd in it.
type snippet struct {
	what, before, indent string
	// config is what the lines are merged with.
	config mainConfig
}

func (s snippet) String(lines string) string {
	var b strings.Builder
	b.WriteString(s.before)
	for line := range strings.Lines(lines) {
		b.WriteString(s.indent + line)
	}
	return b.String()
}

// known is a distribution and how to recognize it.
type known struct {
	Host
	// has is a file that only machines of this distribution have; empty: os is asked.
	has string
	// os is ID in os-release.
	os string
}

const (
	standardConfig = "/etc/containerd/config.toml"
	standardSocket = "/run/containerd/containerd.sock"
	standardCerts  = "/etc/containerd/certs.d"
	osRelease      = "/etc/os-release"
)

// distributions are in the order in which they are looked for.
func distributions() []known {
	rancher := func(name, program string, services ...string) known {
		agent := "/var/lib/rancher/" + name
		h := Host{
			Name: name, Config: agent + "/agent/etc/containerd/config.toml", Program: agent + program,
			Socket: "/run/k3s/containerd/containerd.sock", Services: services, Generated: true,
			registries: "/etc/rancher/" + name + "/registries.yaml",
		}
		return known{Host: h, has: h.Config}
	}
	old := mainConfig{Version: 2, Plugins: map[string]map[string]any{criPlugin: {"containerd": map[string]any{"runtimes": map[string]any{}}}}}
	unit := "/etc/systemd/system/containerd.service.d/shoal.conf"
	return []known{
		rancher("k3s", "/data/current/bin/containerd", "k3s", "k3s-agent"),
		rancher("rke2", "/bin/containerd", "rke2-server", "rke2-agent"),
		{os: "talos", Host: Host{
			Name:    "talos",
			refused: "Talos makes containerd's config from the machine config, and its disk is read-only",
			snippet: &snippet{"Talos 1.14 and later take this document beside the machine config (docs/distributions/talos.md)",
				"apiVersion: v1alpha1\nkind: CRICustomizationConfig\nname: shoal\ncontent: |\n", "  ", mainConfig{Version: 3}},
		}},
		{os: "bottlerocket", Host: Host{
			Name:    "bottlerocket",
			refused: "Bottlerocket makes containerd's config from its settings, which have no other snapshotters than its own, and its disk is read-only",
		}},
		{has: "/usr/bin/nodeadm", Host: Host{
			Name: "eks", Unit: unit,
			snippet: &snippet{"New nodes whose machine image has shoal take this document in their user data (docs/distributions/eks.md)",
				"apiVersion: node.eks.aws/v1alpha1\nkind: NodeConfig\nspec:\n  containerd:\n    config: |\n", "      ", mainConfig{Version: 3}},
		}},
		{has: "/opt/azure/containers", Host: Host{Name: "aks"}},
		{has: "/home/kubernetes/bin", Host: Host{Name: "gke", Unit: unit}},
		{has: "/kind", Host: Host{
			Name: "kind",
			snippet: &snippet{"New clusters whose node image has shoal take this config (docs/distributions/kind.md)",
				"kind: Cluster\napiVersion: kind.x-k8s.io/v1alpha4\ncontainerdConfigPatches:\n  - |-\n", "    ", old},
		}},
		{has: "/run/crio/crio.sock", Host: Host{Name: "crio", refused: "CRI-O runs the containers of this machine. shoal is a snapshotter of containerd, and CRI-O has no snapshotters"}},
	}
}

// Names are the distributions that Detect knows.
func Names() []string {
	names := []string{"containerd"}
	for _, d := range distributions() {
		names = append(names, d.Name)
	}
	return names
}

// Detect says where the machine whose file system is at root keeps containerd. name is the
// distribution; empty: by what is on the disk. An error wraps ErrUnsupported where shoal
// cannot be installed.
func Detect(root, name string) (Host, error) {
	at := func(path string) string { return filepath.Join(root, path) }
	id, err := osID(at(osRelease))
	if err != nil {
		return Host{}, err
	}
	list := distributions()
	i := slices.IndexFunc(list, func(d known) bool { return d.Name == name })
	if name == "" {
		i = slices.IndexFunc(list, func(d known) bool {
			return d.os != "" && d.os == id || d.has != "" && exists(at(d.has))
		})
		// A machine with both runs its pods by one of them, and CRI-O has to be the only one.
		if i >= 0 && list[i].Name == "crio" && exists(at(standardSocket)) {
			i = -1
		}
	}
	h := Host{}
	if i >= 0 {
		h = list[i].Host
	} else if name != "" && name != "containerd" {
		return h, fmt.Errorf("no distribution is called %q: shoal knows %s", name, strings.Join(Names(), ", "))
	}
	if h.refused != "" {
		return h, nil // the caller knows the lines that have to be added elsewhere
	}
	if h.Config == "" {
		h.Config, h.Socket, h.Program, h.Services = standardConfig, standardSocket, "containerd", []string{"containerd"}
	}
	if h.Name == "gke" && id == "cos" {
		h.Unit = "" // it would not be there after the next boot, either
		h.Notes = []string{"Container-Optimized OS and GKE write /etc again at each boot: this command has to run after each boot. " +
			"shoal's chart does so. See docs/distributions/gke.md for what happens until then."}
	}
	h.Certs = standardCerts
	for _, path := range []*string{&h.Config, &h.Unit, &h.Certs} {
		if *path != "" {
			*path = at(*path)
		}
	}
	if filepath.IsAbs(h.Program) {
		h.Program = at(h.Program)
	}
	return h, nil
}

func exists(path string) bool {
	_, err := os.Stat(path)
	return err == nil
}

// osID is ID of an os-release file; empty: there is no such file.
func osID(path string) (string, error) {
	b, err := os.ReadFile(path)
	if errors.Is(err, fs.ErrNotExist) {
		return "", nil
	}
	if err != nil {
		return "", err
	}
	for line := range strings.Lines(string(b)) {
		if v, ok := strings.CutPrefix(strings.TrimSpace(line), "ID="); ok {
			return strings.Trim(v, `"'`), nil
		}
	}
	return "", nil
}

// certs is Certs or its default.
func (h Host) certs() string { return cmp.Or(h.Certs, standardCerts) }

// dropIns is the directory beside a generated config whose files last.
func (h Host) dropIns() string { return filepath.Join(filepath.Dir(h.Config), "config-v3.toml.d") }

// Snippet is what the config of new machines needs, with the sentence that says so. It is
// empty where there is nothing but files on the machine.
func (h Host) Snippet(n Node) string {
	if h.snippet == nil {
		return ""
	}
	var b strings.Builder
	for _, t := range h.snippet.config.wanted(n, Version{Major: 2}) {
		b.WriteString(t.String())
	}
	return h.snippet.what + ":\n" + h.snippet.String(b.String())
}

// Refused is why nothing can be installed on this machine, and what to do instead; nil:
// it can. It wraps ErrUnsupported.
func (h Host) Refused(n Node) error {
	if h.refused == "" {
		return nil
	}
	err := fmt.Errorf("%w: %s", ErrUnsupported, h.refused)
	if s := h.Snippet(n); s != "" {
		err = fmt.Errorf("%w. %s", err, s)
	}
	return err
}

// wholeHeader begins a file that is shoal's as a whole.
const wholeHeader = "# " + mark + "\n"

// unit are the settings for containerd's unit.
func (h Host) unit(command []string) []byte {
	quoted := make([]string, len(command))
	for i, arg := range command {
		quoted[i] = arg
		if strings.ContainsAny(arg, " \t\"'\\$%") {
			quoted[i] = `"` + strings.NewReplacer(`\`, `\\`, `"`, `\"`, "%", "%%", "$", "$$").Replace(arg) + `"`
		}
	}
	return []byte(wholeHeader + "# " + h.Name + " writes containerd's config at each boot. If this command fails, then containerd starts without shoal.\n" +
		"[Service]\nExecStartPre=-" + strings.Join(quoted, " ") + "\n")
}
