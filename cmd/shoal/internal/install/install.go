// Package install tells a machine's containerd about the node of shoal on it, and takes
// that back.
//
// # Invariants
//
//   - Nothing is written before everything that is to be written is known: Plan reads,
//     Apply writes.
//   - The first copy of a file that was there before is kept beside it.
//   - What cannot be changed safely is refused, with the lines that somebody has to add.
package install

import (
	"bytes"
	"errors"
	"fmt"
	"io/fs"
	"maps"
	"os"
	"path/filepath"
	"slices"
	"strings"

	"github.com/pelletier/go-toml/v2"

	"github.com/shoalfs/shoal/cmd/shoal/internal/tomledit"
)

const (
	// mark is at the end of each line that is shoal's.
	mark = "set by shoal install"
	// copySuffix names the copy of a file as it was before.
	copySuffix = ".before-shoal"
	// dropIn sorts after other files of its directory, so that it counts.
	dropIn = "99-shoal.toml"
)

// Node is what containerd has to know of a node.
type Node struct {
	// Socket is the node's socket for containerd.
	Socket string
	// Root is the node's directory.
	Root string
	// Mirror is the host:port of the registry mirror; empty: it is off.
	Mirror string
	// MirrorCA is the file of the mirror's certificate authority; empty: the mirror
	// speaks plain HTTP.
	MirrorCA string
}

// mainConfig is what is read of containerd's config file.
type mainConfig struct {
	Version int                       `toml:"version"`
	Imports []string                  `toml:"imports"`
	Plugins map[string]map[string]any `toml:"plugins"`
}

// Version is containerd's.
type Version struct{ Major, Minor int }

// two says that it is containerd 2.x.
func (v Version) two() bool { return v.Major >= 2 }

// Containerd plans what containerd's config on the host needs to use the node. A config
// file that is missing or empty gets version 3 for containerd 2.x, else 2. command makes
// the same changes again; it is for the host's unit. An error wraps tomledit.ErrByHand if
// the operator has to edit a file.
func Containerd(h Host, v Version, n Node, command ...string) (Plan, error) {
	p, text, c, err := read(h.Config)
	if err != nil {
		return p, err
	}
	head := []tomledit.Table(nil)
	switch {
	case h.Generated && text == nil:
		return p, fmt.Errorf("%s is not there: start %s first, it makes the file", h.Config, h.Name)
	case c.Version == 0 && len(bytes.TrimSpace(tomledit.Undo(text, mark))) == 0:
		c.Version = 2
		if v.two() {
			c.Version = 3
		}
		keys := []tomledit.Key{{Name: "version", Value: fmt.Sprint(c.Version)}}
		if v.two() { // what containerd reads without a config file
			keys = append(keys, tomledit.Key{Name: "imports", Value: `["/etc/containerd/conf.d/*.toml"]`})
		}
		head = []tomledit.Table{{Keys: keys}}
	case c.Version < 2:
		return p, fmt.Errorf("%s is of version 1, which containerd 2.x does not read any more: "+
			"run containerd config migrate, and install again", h.Config)
	}
	if c.Version >= 3 { // no 1.x reads it
		v.Major = max(v.Major, 2)
	}
	wanted, certs := c.wanted(n, v), ""
	if n.Mirror != "" {
		var registry []tomledit.Table
		if certs, registry, err = c.registries(h, v); err != nil {
			return p, fmt.Errorf("%s: %w", h.Config, err)
		}
		wanted = append(wanted, registry...)
	}
	dir := c.dropIns(h.Config)
	if h.Generated && dir != h.dropIns() {
		return p, byHand(h.Config, fmt.Errorf("%w: %s writes this file at each start, and the file does not import %s/*.toml. "+
			"Upgrade %s, or, if you have a config-v3.toml.tmpl of your own, then add that import to it",
			tomledit.ErrByHand, h.Name, h.dropIns(), h.Name), wanted)
	}
	inMain, inDropIn := slices.Concat(head, wanted), []tomledit.Table(nil)
	if dir != "" {
		inDropIn = append([]tomledit.Table{{Keys: []tomledit.Key{{Name: "version", Value: fmt.Sprint(c.Version)}}}}, wanted...)
		inMain = nil
	}
	if c.has(transfer) {
		inMain = append(inMain, unpack("shoal")) // arrays of a drop-in replace those of the file
	} else if v.two() {
		// Naming one snapshotter replaces the default, so overlayfs is named, too.
		both := []tomledit.Table{unpack("overlayfs"), unpack("shoal")}
		if dir != "" {
			inDropIn = append(inDropIn, both...)
		} else {
			inMain = append(inMain, both...)
		}
	}
	if h.Generated && len(inMain) > 0 {
		return p, byHand(h.Config, fmt.Errorf("%w: %s writes this file at each start. Edit its template", tomledit.ErrByHand, h.Name), inMain)
	}
	if err := p.edit(h.Config, text, inMain); err != nil {
		return p, err
	}
	if dir != "" {
		target := filepath.Join(dir, dropIn)
		old, err := readFile(target)
		if err != nil {
			return p, err
		}
		if err := p.edit(target, old, inDropIn); err != nil {
			return p, err
		}
	}
	if h.Unit != "" {
		old, err := readFile(h.Unit)
		if err != nil {
			return p, err
		}
		p.add(h.Unit, old, h.unit(command))
		p.Notes = append(p.Notes, fmt.Sprintf("%s writes %s again at each boot. By %s, each start of containerd makes the changes again.", h.Name, h.Config, h.Unit))
	}
	p.Notes = append(append(p.Notes, h.Notes...), c.handlers()...)
	if n.Mirror == "" {
		p.Notes = append(p.Notes, "The node's registry mirror is off (mirror_address): private images are not lazy, and pulls of new images wait only for prepare_timeout.")
		return p, nil
	}
	return p, p.hosts(h, certs, n)
}

// Remove plans how containerd's config on the host comes to be as it was.
func Remove(h Host, n Node) (Plan, error) {
	p, text, c, err := read(h.Config)
	if err != nil {
		return p, err
	}
	p.undo(h.Config, text)
	dirs := []string{c.dropIns(h.Config)}
	if h.Generated { // also if the config has not been written since
		dirs = []string{h.dropIns()}
	}
	for _, dir := range dirs {
		if dir == "" {
			continue
		}
		target := filepath.Join(dir, dropIn)
		old, err := readFile(target)
		if err != nil {
			return p, err
		}
		p.undo(target, old)
	}
	if h.Unit != "" {
		if old, err := readFile(h.Unit); err != nil {
			return p, err
		} else if bytes.HasPrefix(old, []byte(unitHeader)) {
			p.add(h.Unit, old, nil)
		}
	}
	certs, _, err := c.registries(h, Version{})
	if err != nil {
		certs = h.certs()
	}
	target := filepath.Join(certs, "_default", "hosts.toml")
	old, err := readFile(target)
	if err != nil {
		return p, err
	}
	p.undo(target, old)
	if n.Mirror != "" {
		p.others(certs, n.Mirror, func(name string, has bool) {
			if has {
				p.Notes = append(p.Notes, fmt.Sprintf("%s names the node's mirror: remove that section by hand%s.", name, h.instead()))
			}
		})
	}
	return p, nil
}

// instead says where else the operator has to change a hosts.toml.
func (h Host) instead() string {
	if h.registries == "" {
		return ""
	}
	return fmt.Sprintf(", in %s: %s writes hosts.toml files from it at each start", h.registries, h.Name)
}

// edit plans tables in a file; with none, that those of before go.
func (p *Plan) edit(path string, old []byte, tables []tomledit.Table) error {
	if len(tables) == 0 {
		p.undo(path, old)
		return nil
	}
	text, err := tomledit.Apply(old, mark, tables...)
	if err != nil {
		return byHand(path, err, tables)
	}
	p.add(path, old, text)
	return nil
}

// undo removes what is shoal's of a file, and a file that has nothing else.
func (p *Plan) undo(path string, old []byte) {
	text := tomledit.Undo(old, mark)
	if old != nil && len(bytes.TrimSpace(text)) == 0 {
		text = nil
	}
	p.add(path, old, text)
}

func read(path string) (p Plan, text []byte, c mainConfig, err error) {
	if text, err = readFile(path); err != nil {
		return p, nil, c, err
	}
	if err := toml.Unmarshal(tomledit.Undo(text, mark), &c); err != nil {
		return p, nil, c, fmt.Errorf("%s is not containerd's config, or a template of it: %w. Add the lines of docs/containerd.md by hand", path, err)
	}
	return p, text, c, nil
}

// readFile returns nil for a file that is not there.
func readFile(path string) ([]byte, error) {
	b, err := os.ReadFile(path)
	if errors.Is(err, fs.ErrNotExist) {
		return nil, nil
	}
	if err == nil && b == nil {
		b = []byte{}
	}
	return b, err
}

// dropIns is the directory of which containerd reads every TOML file after this one;
// empty: there is none. containerd 1.x replaces whole sections by those of such files, so
// they are of use from version 3 on.
func (c mainConfig) dropIns(path string) string {
	if c.Version < 3 {
		return ""
	}
	for _, pattern := range c.Imports {
		if dir, name := filepath.Split(pattern); name == "*.toml" && !strings.ContainsAny(dir, "*?[") {
			if !filepath.IsAbs(dir) {
				dir = filepath.Join(filepath.Dir(path), dir)
			}
			return filepath.Clean(dir)
		}
	}
	return ""
}

// Sees says whether a config, as containerd dumps it, has CRI use shoal.
func Sees(dump []byte) bool {
	var c struct {
		mainConfig
		Proxies map[string]any `toml:"proxy_plugins"`
	}
	if err := toml.Unmarshal(dump, &c); err != nil {
		return false
	}
	t := table(c.Plugins[criPlugin], "containerd")
	if c.Version >= 3 {
		t = c.Plugins[imagesPlugin]
	}
	return c.Proxies["shoal"] != nil && t["snapshotter"] == "shoal" && t["disable_snapshot_annotations"] == false
}

const (
	imagesPlugin  = "io.containerd.cri.v1.images"
	runtimePlugin = "io.containerd.cri.v1.runtime"
	criPlugin     = "io.containerd.grpc.v1.cri" // both of them, in containerd 1.x
)

// handlers has a note for each runtime handler with a snapshotter of its own.
func (c mainConfig) handlers() (notes []string) {
	for _, plugin := range []string{criPlugin, runtimePlugin} {
		runtimes := table(c.Plugins[plugin], "containerd", "runtimes")
		for _, name := range slices.Sorted(maps.Keys(runtimes)) {
			if s, _ := table(runtimes, name)["snapshotter"].(string); s != "" && s != "shoal" {
				notes = append(notes, fmt.Sprintf("The runtime handler %s has a snapshotter of its own, %s: its pods cannot use an image that is lazy.", name, s))
			}
		}
	}
	return notes
}

// images is the plugin of CRI that has the settings of images. containerd 2.x also reads
// its own plugins in a file of version 2, but those of 1.x count before them, if there
// are runtimes; without runtimes it leaves a snapshotter of 1.x out.
func (c mainConfig) images(v Version) string {
	if c.Version >= 3 || v.two() && table(c.Plugins[criPlugin], "containerd", "runtimes") == nil {
		return imagesPlugin
	}
	return criPlugin
}

// table is the table at a path; nil: there is none.
func table(t map[string]any, names ...string) map[string]any {
	for _, name := range names {
		t, _ = t[name].(map[string]any)
	}
	return t
}

// transfer is the plugin by which ctr and others pull.
const transfer = "io.containerd.transfer.v1.local"

// has says whether the file names snapshotters for the transfer service.
func (c mainConfig) has(plugin string) bool {
	_, ok := c.Plugins[plugin]["unpack_config"]
	return ok
}

// unpack has the transfer service pull for a snapshotter.
func unpack(snapshotter string) tomledit.Table {
	return tomledit.Table{Path: []string{"plugins", transfer, "unpack_config"}, Element: true, Keys: []tomledit.Key{
		{Name: "platform", Value: `"linux"`}, {Name: "snapshotter", Value: fmt.Sprintf("%q", snapshotter)}, {Name: "differ", Value: `"walking"`},
	}}
}

// wanted are the tables that containerd has to have, without those of the transfer service.
func (c mainConfig) wanted(n Node, v Version) []tomledit.Table {
	text := func(s string) string { return fmt.Sprintf("%q", s) }
	cri, exports := []string{"plugins", c.images(v)}, []tomledit.Key{{Name: "root", Value: text(n.Root)}}
	if v.two() {
		exports = append(exports, tomledit.Key{Name: "enable_remote_snapshot_annotations", Value: `"true"`})
	}
	if cri[1] == criPlugin {
		cri = append(cri, "containerd")
	}
	return []tomledit.Table{
		{Path: []string{"proxy_plugins", "shoal"}, Keys: []tomledit.Key{
			{Name: "type", Value: `"snapshot"`}, {Name: "address", Value: text(n.Socket)}, {Name: "capabilities", Value: `["remap-ids"]`},
		}},
		{Path: []string{"proxy_plugins", "shoal", "exports"}, Keys: exports},
		{Path: cri, Keys: []tomledit.Key{{Name: "snapshotter", Value: `"shoal"`}, {Name: "disable_snapshot_annotations", Value: "false"}}},
	}
}

// registries says where containerd looks for hosts.toml files, and which table it needs
// to do so.
func (c mainConfig) registries(h Host, v Version) (dir string, more []tomledit.Table, err error) {
	plugin := c.images(v)
	registry := table(c.Plugins[plugin], "registry")
	for _, p := range []string{criPlugin, imagesPlugin} { // the first counts, also for containerd 2.x
		if t := table(c.Plugins[p], "registry"); t != nil && registry == nil {
			plugin, registry = p, t
		}
	}
	if dir, _ := registry["config_path"].(string); dir != "" {
		return filepath.SplitList(dir)[0], nil, nil
	}
	for _, k := range []string{"mirrors", "configs"} {
		if m, _ := registry[k].(map[string]any); len(m) > 0 {
			return "", nil, fmt.Errorf("%w: registries are configured by registry.%s, which excludes hosts.toml files. Move them to %s (containerd's docs/hosts.md), "+
				"set registry.config_path, and install again; or set mirror_address = \"\" in the node's config to do without the mirror", tomledit.ErrByHand, k, h.certs())
		}
	}
	if v.Major > 2 || v.Major == 2 && v.Minor >= 2 {
		return h.certs(), nil, nil // where it looks by itself; 2.0 and 2.1 do not
	}
	return h.certs(), []tomledit.Table{{Path: []string{"plugins", plugin, "registry"}, Keys: []tomledit.Key{{Name: "config_path", Value: fmt.Sprintf("%q", h.certs())}}}}, nil
}

// hosts plans the hosts.toml that names the node's mirror for all registries.
func (p *Plan) hosts(h Host, certs string, n Node) error {
	target := filepath.Join(certs, "_default", "hosts.toml")
	old, err := readFile(target)
	if err != nil {
		return err
	}
	url, keys := "http://"+n.Mirror, []tomledit.Key(nil)
	if n.MirrorCA != "" {
		if _, err := os.Stat(n.MirrorCA); err != nil {
			return fmt.Errorf("%w: containerd pulls nothing while this file is missing. Start the node first: it makes the file", err)
		}
		url, keys = "https://"+n.Mirror, []tomledit.Key{{Name: "ca", Value: fmt.Sprintf("%q", n.MirrorCA)}}
	}
	table := tomledit.Table{Path: []string{"host", url}, Keys: append(keys, tomledit.Key{Name: "capabilities", Value: `["pull", "resolve"]`})}
	var has struct {
		Host map[string]any `toml:"host"`
	}
	if err := toml.Unmarshal(tomledit.Undo(old, mark), &has); err != nil {
		return fmt.Errorf("%s: %w", target, err)
	}
	delete(has.Host, url)
	if len(has.Host) > 0 {
		// Their order counts, and they have none once they have been read.
		return byHand(target, fmt.Errorf("%w: it names other hosts, and the node's mirror has to be the first%s", tomledit.ErrByHand, h.instead()), []tomledit.Table{table})
	}
	if err := p.edit(target, old, []tomledit.Table{table}); err != nil {
		return err
	}
	p.others(certs, n.Mirror, func(name string, has bool) {
		if !has {
			p.Notes = append(p.Notes, fmt.Sprintf("%s is for one registry, and pulls from this registry do not ask the node's mirror. If they should, add these lines before its other [host] sections%s:\n%s", name, h.instead(), table))
		}
	})
	return nil
}

// others calls f for the hosts.toml files of single registries, and says whether they name
// the mirror.
func (p *Plan) others(certs, mirror string, f func(name string, has bool)) {
	files, err := filepath.Glob(filepath.Join(certs, "*", "hosts.toml"))
	if err != nil {
		return
	}
	for _, name := range files {
		if b, err := os.ReadFile(name); err == nil && filepath.Base(filepath.Dir(name)) != "_default" {
			f(name, bytes.Contains(b, []byte("://"+mirror)))
		}
	}
}

// byHand says what somebody has to add where Apply cannot.
func byHand(path string, err error, tables []tomledit.Table) error {
	if !errors.Is(err, tomledit.ErrByHand) {
		return fmt.Errorf("%s: %w", path, err)
	}
	var b strings.Builder
	for _, t := range tables {
		b.WriteString(t.String())
	}
	return fmt.Errorf("%s: %w. These lines have to be in it:\n%s", path, err, b.String())
}
