// Package install tells a machine's containerd about the node of shoal on it, and takes
// that back.
//
// # Invariants
//
//   - Nothing is written before everything that is to be written is known: Plan reads,
//     Apply writes.
//   - The first copy of a file that was there before is kept beside it. A file that a
//     symbolic link leads to is edited, and the link stays.
//   - What cannot be changed safely is refused, with the lines to add by hand.
//   - Host.Record lists every file that has lines of this package, and no other, unless
//     it cannot be written.
package install

import (
	"bytes"
	"cmp"
	"errors"
	"fmt"
	"io/fs"
	"maps"
	"os"
	"path/filepath"
	"slices"
	"strings"

	"github.com/pelletier/go-toml/v2"
	"golang.org/x/sys/unix"

	"github.com/shoalfs/shoal/cmd/shoal/internal/tomledit"
)

const (
	// mark is at the end of each line that is shoal's.
	mark = "set by shoal install"
	// copySuffix names the copy of a file as it was before.
	copySuffix = ".before-shoal"
	// dropIn sorts after other files of its directory, so that it counts.
	dropIn = "99-shoal.toml"
	// RecordName is the name of Host.Record. Packages look for it in /etc/shoal before
	// they are removed.
	RecordName = "containerd-files"
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

// Containerd plans what containerd's config on the host needs to use the node. A config
// file that is missing or empty gets version 3 for containerd 2.x, else 2. command makes
// the same changes again; it is for the host's unit. An error wraps tomledit.ErrByHand if
// the operator has to edit a file.
func Containerd(h Host, v Version, n Node, command ...string) (Plan, error) {
	var p Plan
	err := p.containerd(h, v, n, command)
	if err == nil {
		err = p.record(h)
	}
	return p, err
}

func (p *Plan) containerd(h Host, v Version, n Node, command []string) error {
	text, c, err := read(h.Config)
	if err != nil {
		return err
	}
	head := []tomledit.Table(nil)
	switch {
	case h.Generated && text == nil:
		return fmt.Errorf("%s is not there: start %s first, it makes the file", h.Config, h.Name)
	case c.empty:
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
		return fmt.Errorf("%s is of version 1, which cannot be edited safely: replace the file by what this command prints, and install again: "+
			"%s --config %s config migrate", h.Config, cmp.Or(h.Program, "containerd"), h.Config)
	}
	if c.Version >= 3 { // no 1.x reads it
		v.Major = max(v.Major, 2)
	}
	wanted, certs := c.wanted(n, v), []string(nil)
	if n.Mirror != "" {
		var registry []tomledit.Table
		if certs, registry, err = c.registries(h, v); err != nil {
			return fmt.Errorf("%s: %w", h.Config, err)
		}
		wanted = append(wanted, registry...)
	}
	dir := c.dropIns(h.Config)
	if h.Generated && dir != h.dropIns() {
		return byHand(h.Config, fmt.Errorf("%w: %s writes this file at each start, and the file does not import %s/*.toml. "+
			"Upgrade %s, or, if you have a config-v3.toml.tmpl of your own, then add that import to it",
			tomledit.ErrByHand, h.Name, h.dropIns(), h.Name), wanted)
	}
	inMain, inDropIn := slices.Concat(head, wanted), []tomledit.Table(nil)
	if dir != "" {
		inDropIn = append([]tomledit.Table{{Keys: []tomledit.Key{{Name: "version", Value: fmt.Sprint(c.Version)}}}}, wanted...)
		inMain = nil
	}
	switch {
	case c.unpacks:
		inMain = append(inMain, unpack("shoal")) // arrays of a drop-in replace those of the file
	case c.has(transfer):
		p.Notes = append(p.Notes, fmt.Sprintf("A file that %s imports names snapshotters for ctr. If ctr should pull for shoal, then add these lines to that file:\n%s", h.Config, unpack("shoal")))
	case v.two():
		// Naming one snapshotter replaces the default, so overlayfs is named, too.
		both := []tomledit.Table{unpack("overlayfs"), unpack("shoal")}
		if dir != "" {
			inDropIn = append(inDropIn, both...)
		} else {
			inMain = append(inMain, both...)
		}
	}
	if h.Generated && len(inMain) > 0 {
		return byHand(h.Config, fmt.Errorf("%w: %s writes this file at each start. Edit its template", tomledit.ErrByHand, h.Name), inMain)
	}
	if err := p.edit(h.Config, text, inMain); err != nil {
		return err
	}
	if dir != "" {
		file := filepath.Join(dir, dropIn)
		old, err := readFile(file)
		if err != nil {
			return err
		}
		if err := p.edit(file, old, inDropIn); err != nil {
			return err
		}
	}
	if h.Unit != "" {
		old, err := readFile(h.Unit)
		if err != nil {
			return err
		}
		p.add(h.Unit, old, h.unit(command))
		p.Notes = append(p.Notes, fmt.Sprintf("%s writes %s again at each boot. By %s, each start of containerd makes the changes again.", h.Name, h.Config, h.Unit))
	}
	p.Notes = append(append(p.Notes, h.Notes...), c.handlers()...)
	if n.Mirror == "" {
		p.Notes = append(p.Notes, "The node's registry mirror is off (mirror_address): private images are not lazy, and pulls of new images wait only for prepare_timeout.")
		return nil
	}
	return p.hosts(h, certs, n)
}

// Remove plans how containerd's config on the host comes to be as it was. If containers
// still use the node, then containerd has to know it until they are removed: without it,
// they could not be.
func Remove(h Host, n Node, used bool) (Plan, error) {
	var p Plan
	err := p.remove(h, n, used)
	if err == nil {
		err = p.record(h)
	}
	if !used {
		for _, path := range p.recorded {
			p.Notes = append(p.Notes, fmt.Sprintf("%s still has lines that shoal install added: run this command again with --distribution, --config and --node-config as they were then.", path))
		}
	}
	return p, err
}

func (p *Plan) remove(h Host, n Node, used bool) error {
	text, c, err := read(h.Config)
	if err != nil {
		return err
	}
	undo := p.undo
	if used {
		undo = p.undoRest
	}
	undo(h.Config, text)
	dirs := []string{c.dropIns(h.Config)}
	if h.Generated { // also if the config has not been written since
		dirs = []string{h.dropIns()}
	}
	for _, dir := range dirs {
		if dir == "" {
			continue
		}
		file := filepath.Join(dir, dropIn)
		old, err := readFile(file)
		if err != nil {
			return err
		}
		undo(file, old)
	}
	if h.Unit != "" {
		if old, err := readFile(h.Unit); err != nil {
			return err
		} else if bytes.HasPrefix(old, []byte(wholeHeader)) {
			p.add(h.Unit, old, nil)
		}
	}
	certs, _, err := c.registries(h, Version{Major: 2, Minor: 2})
	if err != nil {
		certs = []string{h.certs()}
	}
	if err := p.undoHosts(certs, ""); err != nil {
		return err
	}
	if n.Mirror != "" {
		p.others(certs, n.Mirror, func(name string, has bool) {
			if has {
				p.Notes = append(p.Notes, fmt.Sprintf("%s names the node's mirror: remove that section by hand%s.", name, h.instead()))
			}
		})
	}
	return nil
}

// undoHosts removes what is shoal's of the hosts.toml files for all registries, but for the
// one in a directory that stays.
func (p *Plan) undoHosts(certs []string, stays string) error {
	for _, dir := range certs {
		file := filepath.Join(dir, forAll, hostsFile)
		old, err := readFile(file)
		if err != nil {
			return err
		}
		if dir != stays && old != nil {
			p.undo(file, old)
		}
	}
	return nil
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

// undoRest is undo, but for the sections that make the node known to containerd.
func (p *Plan) undoRest(path string, old []byte) {
	text := tomledit.UndoOthers(old, mark, "proxy_plugins", "shoal")
	if bytes.Equal(text, tomledit.Undo(old, mark)) {
		p.undo(path, old) // the file has no such section
		return
	}
	p.add(path, old, text)
}

// undo removes what is shoal's of a file, and a file that shoal has made. Where nothing else
// has changed, the file is what it was, byte for byte: an end of a line may have been added.
func (p *Plan) undo(path string, old []byte) {
	text := tomledit.Undo(old, mark)
	before, err := os.ReadFile(target(path) + copySuffix)
	switch {
	case !bytes.Contains(old, []byte(mark)):
		text = old
	case err == nil && bytes.Equal(bytes.TrimSpace(before), bytes.TrimSpace(text)):
		text = before
	case len(bytes.TrimSpace(text)) == 0 && !linked(path):
		text = nil
	}
	p.add(path, old, text)
}

const (
	hostsFile = "hosts.toml"
	// forAll is the directory with the hosts.toml for all registries that have none.
	forAll = "_default"
)

// hosts plans the hosts.toml that names the node's mirror for all registries. For each
// registry, containerd takes the first of the directories certs that has something for this
// registry, or for all: so ours is in the last directory that has anything, or it would hide
// directories after it, with the certificates in them.
func (p *Plan) hosts(h Host, certs []string, n Node) error {
	dir := certs[0]
	for _, other := range certs {
		single, all, err := holds(other)
		if err != nil {
			return err
		}
		if single || all {
			dir = other
		}
		if all {
			break // it hides the others already
		}
	}
	if err := p.undoHosts(certs, dir); err != nil {
		return err
	}
	file := filepath.Join(dir, forAll, hostsFile)
	old, err := readFile(file)
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
		return fmt.Errorf("%s: %w", file, err)
	}
	delete(has.Host, url)
	if len(has.Host) > 0 {
		// Their order counts, and they have none once they have been read.
		return byHand(file, fmt.Errorf("%w: it names other hosts, and the node's mirror has to be the first%s", tomledit.ErrByHand, h.instead()), []tomledit.Table{table})
	}
	if err := p.edit(file, old, []tomledit.Table{table}); err != nil {
		return err
	}
	p.others(certs, n.Mirror, func(name string, has bool) {
		if !has {
			p.Notes = append(p.Notes, fmt.Sprintf("%s is for one registry, and pulls from this registry do not ask the node's mirror. If they should, add these lines before its other [host] sections%s:\n%s", name, h.instead(), table))
		}
	})
	return nil
}

// holds says whether a directory has something for single registries, or for all of them,
// that is not shoal's.
func holds(dir string) (single, all bool, err error) {
	entries, err := readDir(dir)
	for _, e := range entries {
		single = single || e.Name() != forAll
	}
	if err != nil {
		return single, all, err
	}
	entries, err = readDir(filepath.Join(dir, forAll))
	for _, e := range entries {
		text, err := readFile(filepath.Join(dir, forAll, hostsFile))
		if err != nil {
			return single, all, err
		}
		mine := e.Name() == hostsFile && len(bytes.TrimSpace(tomledit.Undo(text, mark))) == 0
		all = all || !mine && e.Name() != hostsFile+copySuffix
	}
	return single, all, err
}

// readDir returns nothing for a directory that is not there.
func readDir(dir string) ([]os.DirEntry, error) {
	entries, err := os.ReadDir(dir)
	if errors.Is(err, fs.ErrNotExist) {
		return nil, nil
	}
	return entries, err
}

// others calls f for the hosts.toml files of single registries, and says whether they name
// the mirror.
func (p *Plan) others(certs []string, mirror string, f func(name string, has bool)) {
	for _, dir := range certs {
		files, err := filepath.Glob(filepath.Join(dir, "*", hostsFile))
		if err != nil {
			continue
		}
		for _, name := range files {
			if b, err := os.ReadFile(name); err == nil && filepath.Base(filepath.Dir(name)) != forAll {
				f(name, bytes.Contains(b, []byte("://"+mirror)))
			}
		}
	}
}

// record plans the list of all files that have lines of shoal's when this plan is applied.
// A file of the earlier list that has none is left out.
func (p *Plan) record(h Host) error {
	if h.Record == "" {
		return nil
	}
	old, err := readFile(h.Record)
	if err != nil {
		return err
	}
	after := maps.Clone(p.seen)
	for line := range strings.Lines(string(old)) {
		path := strings.TrimSpace(line)
		if _, ok := after[path]; ok || !filepath.IsAbs(path) {
			continue
		}
		if after[path], err = readFile(path); err != nil {
			return err
		}
	}
	for path, text := range after {
		if bytes.Contains(text, []byte(mark)) {
			p.recorded = append(p.recorded, path)
		}
	}
	slices.Sort(p.recorded)
	text := []byte(nil)
	if len(p.recorded) > 0 {
		text = []byte(wholeHeader + "# Files of containerd that have lines of shoal install.\n" + strings.Join(p.recorded, "\n") + "\n")
	}
	if err := unix.Access(existing(h.Record), unix.W_OK); err != nil && !same(old, text) {
		// containerd does not read it, and packages look in the usual places, too.
		if text != nil {
			p.Notes = append(p.Notes, fmt.Sprintf("%s, the list of the changed files, cannot be written (%v). Run this command with --uninstall before you remove shoal.", h.Record, err))
		}
		return nil
	}
	p.add(h.Record, old, text)
	return nil
}

// existing is the directory of a file, or the first one above it that exists.
func existing(path string) string {
	for path = filepath.Dir(path); filepath.Dir(path) != path; path = filepath.Dir(path) {
		if _, err := os.Stat(path); err == nil {
			break
		}
	}
	return path
}

// byHand says which lines the operator has to add where Apply cannot.
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
