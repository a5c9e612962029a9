package install

import (
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

// mainConfig is what is read of containerd's config file.
type mainConfig struct {
	Version int                       `toml:"version"`
	Imports []string                  `toml:"imports"`
	Plugins map[string]map[string]any `toml:"plugins"`

	empty   bool // nothing but comments
	unpacks bool // the file itself names snapshotters for the transfer service
}

// Version is containerd's.
type Version struct{ Major, Minor int }

// two says that it is containerd 2.x.
func (v Version) two() bool { return v.Major >= 2 }

// read reads containerd's config without the lines of shoal, and the plugins of what it
// imports.
func read(path string) (text []byte, c mainConfig, err error) {
	if text, err = readFile(path); err != nil {
		return nil, c, err
	}
	own := tomledit.Undo(text, mark)
	var all map[string]any
	if err = toml.Unmarshal(own, &c); err == nil {
		err = toml.Unmarshal(own, &all)
	}
	if err != nil {
		return nil, c, fmt.Errorf("%s is not containerd's config, or a template of it: %w. Add the lines of docs/containerd.md by hand", path, err)
	}
	c.empty, c.unpacks = len(all) == 0, c.has(transfer)
	for _, pattern := range c.Imports {
		if !filepath.IsAbs(pattern) {
			pattern = filepath.Join(filepath.Dir(path), pattern)
		}
		files, err := filepath.Glob(pattern)
		if err != nil {
			return nil, c, fmt.Errorf("%s: imports: %q: %w", path, pattern, err)
		}
		for _, file := range files {
			// Decoding into a map that has a table adds to the table.
			imported := mainConfig{Plugins: c.Plugins}
			b, err := readFile(file)
			if err == nil && toml.Unmarshal(tomledit.Undo(b, mark), &imported) == nil { // if not, then containerd says so
				c.Plugins = imported.Plugins
			}
		}
	}
	return text, c, nil
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

// registries says where containerd looks for hosts.toml files, in this order, and which
// table it needs to do so.
func (c mainConfig) registries(h Host, v Version) (dirs []string, more []tomledit.Table, err error) {
	plugin := c.images(v)
	registry := table(c.Plugins[plugin], "registry")
	for _, p := range []string{criPlugin, imagesPlugin} { // the first counts, also for containerd 2.x
		if t := table(c.Plugins[p], "registry"); t != nil && registry == nil {
			plugin, registry = p, t
		}
	}
	path, _ := registry["config_path"].(string)
	for _, dir := range filepath.SplitList(path) {
		if dir != "" && !filepath.IsAbs(dir) {
			return nil, nil, fmt.Errorf("%w: registry.config_path has %q, which is not an absolute path", tomledit.ErrByHand, dir)
		}
		if dir != "" {
			dirs = append(dirs, dir)
		}
	}
	if len(dirs) > 0 {
		return dirs, nil, nil
	}
	for _, k := range []string{"mirrors", "configs"} {
		if m, _ := registry[k].(map[string]any); len(m) > 0 {
			return nil, nil, fmt.Errorf("%w: registries are configured by registry.%s, which excludes hosts.toml files. Move them to %s (containerd's docs/hosts.md), "+
				"set registry.config_path, and install again; or set mirror_address = \"\" in the node's config to do without the mirror", tomledit.ErrByHand, k, h.certs())
		}
	}
	if v.Major > 2 || v.Major == 2 && v.Minor >= 2 { // where it looks by itself; 2.0 and 2.1 do not
		return []string{h.certs(), filepath.Join(h.certs(), "../../docker/certs.d")}, nil, nil
	}
	return []string{h.certs()}, []tomledit.Table{{Path: []string{"plugins", plugin, "registry"}, Keys: []tomledit.Key{{Name: "config_path", Value: fmt.Sprintf("%q", h.certs())}}}}, nil
}
