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
	// certsDir is where containerd 2.x looks for hosts.toml files by itself.
	certsDir = "/etc/containerd/certs.d"
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

// Containerd plans what containerd's config at path needs to use the node. A file that is
// missing or empty gets the version ifMissing: 2 for containerd 1.x, 3 for 2.x. An error
// wraps tomledit.ErrByHand if the operator has to edit a file.
func Containerd(path string, ifMissing int, n Node) (Plan, error) {
	p, text, c, err := read(path)
	if err != nil {
		return p, err
	}
	version, head := c.Version, []tomledit.Table(nil)
	switch {
	case version == 0 && len(bytes.TrimSpace(tomledit.Undo(text, mark))) == 0:
		version, c.Version = ifMissing, ifMissing
		keys := []tomledit.Key{{Name: "version", Value: fmt.Sprint(version)}}
		if version >= 3 { // what containerd reads without a config file
			keys = append(keys, tomledit.Key{Name: "imports", Value: `["/etc/containerd/conf.d/*.toml"]`})
		}
		head = []tomledit.Table{{Keys: keys}}
	case version < 2:
		return p, fmt.Errorf("%s is of version 1, which containerd 2.x does not read any more: "+
			"run containerd config migrate, and install again", path)
	}
	certs, registry, err := c.registries()
	if err != nil {
		return p, fmt.Errorf("%s: %w", path, err)
	}
	inMain, inDropIn := slices.Concat(head, c.wanted(n), registry), []tomledit.Table(nil)
	dir := c.dropIns(path)
	if dir != "" {
		inDropIn = append([]tomledit.Table{{Keys: []tomledit.Key{{Name: "version", Value: fmt.Sprint(version)}}}}, c.wanted(n)...)
		inMain = nil
	}
	if c.has(transfer) {
		inMain = append(inMain, unpack("shoal")) // arrays of a drop-in replace those of the file
	} else if version >= 3 {
		// Naming one snapshotter replaces the default, so overlayfs is named, too.
		both := []tomledit.Table{unpack("overlayfs"), unpack("shoal")}
		if dir != "" {
			inDropIn = append(inDropIn, both...)
		} else {
			inMain = append(inMain, both...)
		}
	}
	if err := p.edit(path, text, inMain); err != nil {
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
	if n.Mirror == "" {
		p.Notes = append(p.Notes, "The node's registry mirror is off (mirror_address): private images are not lazy, and pulls of new images wait only for prepare_timeout.")
		return p, nil
	}
	return p, p.hosts(certs, n)
}

// Remove plans how containerd's config at path comes to be as it was.
func Remove(path string, n Node) (Plan, error) {
	p, text, c, err := read(path)
	if err != nil {
		return p, err
	}
	p.undo(path, text)
	if dir := c.dropIns(path); dir != "" {
		target := filepath.Join(dir, dropIn)
		old, err := readFile(target)
		if err != nil {
			return p, err
		}
		p.undo(target, old)
	}
	certs, _, err := c.registries()
	if err != nil {
		certs = certsDir
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
				p.Notes = append(p.Notes, fmt.Sprintf("%s names the node's mirror: remove that section by hand.", name))
			}
		})
	}
	return p, nil
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

// images is the CRI plugin that has the settings of images.
func (c mainConfig) images() []string {
	if c.Version >= 3 {
		return []string{"plugins", "io.containerd.cri.v1.images"}
	}
	return []string{"plugins", "io.containerd.grpc.v1.cri"}
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
func (c mainConfig) wanted(n Node) []tomledit.Table {
	text := func(s string) string { return fmt.Sprintf("%q", s) }
	cri, exports := c.images(), []tomledit.Key{{Name: "root", Value: text(n.Root)}}
	if c.Version >= 3 {
		exports = append(exports, tomledit.Key{Name: "enable_remote_snapshot_annotations", Value: `"true"`})
	} else {
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
func (c mainConfig) registries() (dir string, more []tomledit.Table, err error) {
	path := append(c.images(), "registry")
	registry, _ := c.Plugins[path[1]]["registry"].(map[string]any)
	if dir, _ := registry["config_path"].(string); dir != "" {
		return filepath.SplitList(dir)[0], nil, nil
	}
	for _, k := range []string{"mirrors", "configs"} {
		if m, _ := registry[k].(map[string]any); len(m) > 0 {
			return "", nil, fmt.Errorf("%w: registries are configured by registry.%s, which excludes hosts.toml files. Move them to %s (containerd's docs/hosts.md), "+
				"set registry.config_path, and install again; or set mirror_address = \"\" in the node's config to do without the mirror", tomledit.ErrByHand, k, certsDir)
		}
	}
	if c.Version >= 3 {
		return certsDir, nil, nil // where containerd 2.x looks by itself
	}
	return certsDir, []tomledit.Table{{Path: path, Keys: []tomledit.Key{{Name: "config_path", Value: fmt.Sprintf("%q", certsDir)}}}}, nil
}

// hosts plans the hosts.toml that names the node's mirror for all registries.
func (p *Plan) hosts(certs string, n Node) error {
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
		return byHand(target, fmt.Errorf("%w: it names other hosts, and the node's mirror has to be the first", tomledit.ErrByHand), []tomledit.Table{table})
	}
	if err := p.edit(target, old, []tomledit.Table{table}); err != nil {
		return err
	}
	p.others(certs, n.Mirror, func(name string, has bool) {
		if !has {
			p.Notes = append(p.Notes, fmt.Sprintf("%s is for one registry, and pulls from this registry do not ask the node's mirror. If they should, add these lines before its other [host] sections:\n%s", name, table))
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
