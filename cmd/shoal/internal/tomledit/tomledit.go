// Package tomledit changes a few keys of a TOML file that belongs to somebody else, and
// takes the changes back.
//
// # Invariants
//
//   - All other lines stay as they are, byte for byte, comments too.
//   - What is added carries a mark at the end of its line, and what is replaced is kept
//     there. So Undo needs nothing but the file, also after somebody has edited it.
//   - Apply after Apply changes nothing.
//   - The result means what the file meant, and what was asked for, and nothing else: it
//     is read again and compared before it is returned.
package tomledit

import (
	"bytes"
	"errors"
	"fmt"
	"reflect"
	"regexp"
	"slices"
	"strings"

	"github.com/pelletier/go-toml/v2"
	"github.com/pelletier/go-toml/v2/unstable"
)

// ErrByHand is the cause of Apply's error where the file says the same thing in a way
// that cannot be changed line by line: inline tables, dotted keys, values of several
// lines. The operator has to edit such a file.
var ErrByHand = errors.New("cannot be edited safely")

// Key is a key of a table and its value, in TOML.
type Key struct{ Name, Value string }

// Table is a table with keys that it should have. Others that it has stay.
type Table struct {
	// Path is empty for the keys before all tables.
	Path []string
	Keys []Key
	// Element says that the table is an element of the array of tables at Path: it is
	// added at the array's end unless there is one with these keys already.
	Element bool
}

// String is the table as it is written.
func (t Table) String() string { return strings.Join(t.lines(""), "\n") + "\n" }

// lines are those of the table, each with the mark.
func (t Table) lines(mark string) []string {
	if len(t.Path) == 0 {
		return t.keys(mark)
	}
	header := "[" + path(t.Path) + "]"
	if t.Element {
		header = "[" + header + "]"
	}
	return append([]string{header + mark}, t.keys(mark)...)
}

func (t Table) keys(mark string) []string {
	var lines []string
	indent := "  "
	if len(t.Path) == 0 {
		indent = ""
	}
	for _, k := range t.Keys {
		lines = append(lines, indent+key(k.Name)+" = "+k.Value+mark)
	}
	return lines
}

var bare = regexp.MustCompile(`^[A-Za-z0-9_-]+$`)

// key writes a key, in quotes if it needs them.
func key(name string) string {
	if bare.MatchString(name) {
		return name
	}
	return "'" + name + "'"
}

func path(names []string) string {
	var keys []string
	for _, n := range names {
		keys = append(keys, key(n))
	}
	return strings.Join(keys, ".")
}

// was stands between the mark and the line that was replaced.
const was = ", was: "

// Undo takes back what Apply did with this mark. A file without the mark is returned as
// it is.
func Undo(text []byte, mark string) []byte {
	return undo(text, mark, func(string) bool { return false })
}

// UndoOthers is Undo for a file in which the table at this path has to stay, and the tables
// below it. If the file has one, then keys before all tables stay, too.
func UndoOthers(text []byte, mark string, names ...string) []byte {
	begin, has := "["+path(names), false
	stays := func(header string) bool {
		rest, ok := strings.CutPrefix(header, begin)
		ok = ok && (strings.HasPrefix(rest, "]") || strings.HasPrefix(rest, "."))
		has = has || ok
		return ok
	}
	if out := undo(text, mark, stays); !has {
		return out
	}
	return undo(text, mark, func(header string) bool { return header == "" || stays(header) })
}

// undo takes back what is not in a table whose header stays; the header is empty before
// all tables.
func undo(text []byte, mark string, stays func(header string) bool) []byte {
	var out []byte
	header := ""
	for line := range bytes.Lines(text) {
		end := line[len(bytes.TrimRight(line, "\r\n")):]
		before, after, marked := strings.Cut(string(line[:len(line)-len(end)]), comment(mark))
		if h := strings.TrimSpace(before); strings.HasPrefix(h, "[") {
			header = h
		}
		switch old, replaced := strings.CutPrefix(after, was); {
		case !marked || after != "" && !replaced || stays(header):
			out = append(out, line...)
		case replaced:
			out = append(append(out, old...), end...)
		}
	}
	return out
}

func comment(mark string) string { return " # " + mark }

// Apply returns the file with these tables in it. An error wraps ErrByHand, or says where
// the file is no TOML.
func Apply(text []byte, mark string, tables ...Table) ([]byte, error) {
	text = Undo(text, mark)
	var want map[string]any
	if err := toml.Unmarshal(text, &want); err != nil {
		return nil, fmt.Errorf("not valid TOML: %w", err)
	}
	if want == nil {
		want = map[string]any{}
	}
	out := text
	for _, t := range tables {
		have := lookup(want, t.Path)
		values, err := t.values()
		if err != nil {
			return nil, err
		}
		if !t.Element && contains(have, values) || t.Element && slices.ContainsFunc(elements(have), func(e any) bool { return contains(e, values) }) {
			continue
		}
		if out, err = add(out, mark, t, have); err != nil {
			return nil, err
		}
		if err := put(want, t, values); err != nil {
			return nil, err
		}
	}
	var got map[string]any
	if err := toml.Unmarshal(out, &got); err != nil {
		return nil, fmt.Errorf("%w: with the new lines it would not be valid TOML: %w", ErrByHand, err)
	}
	if got == nil {
		got = map[string]any{}
	}
	if !reflect.DeepEqual(got, want) {
		return nil, fmt.Errorf("%w: the new lines would change more than they should", ErrByHand)
	}
	return out, nil
}

// values are the keys' values as the TOML package reads them.
func (t Table) values() (map[string]any, error) {
	var b strings.Builder
	for _, line := range t.keys("") {
		b.WriteString(line + "\n")
	}
	var v map[string]any
	if err := toml.Unmarshal([]byte(b.String()), &v); err != nil {
		return nil, fmt.Errorf("%s: %w", path(t.Path), err)
	}
	return v, nil
}

// lookup returns what lies at a path, nil if nothing does.
func lookup(root map[string]any, names []string) any {
	var v any = root
	for _, n := range names {
		m, ok := v.(map[string]any)
		if !ok {
			return nil
		}
		if v, ok = m[n]; !ok {
			return nil
		}
	}
	return v
}

func elements(v any) []any {
	list, _ := v.([]any)
	return list
}

// contains says whether a table has all of these values.
func contains(table any, values map[string]any) bool {
	m, ok := table.(map[string]any)
	for k, v := range values {
		ok = ok && reflect.DeepEqual(m[k], v)
	}
	return ok
}

// put does in values what add does in text.
func put(root map[string]any, t Table, values map[string]any) error {
	m := root
	for i, n := range t.Path {
		if t.Element && i == len(t.Path)-1 {
			list, ok := m[n].([]any)
			if m[n] != nil && !ok {
				return fmt.Errorf("%w: %s is not an array of tables", ErrByHand, path(t.Path))
			}
			m[n] = append(list, values)
			return nil
		}
		next, ok := m[n].(map[string]any)
		if m[n] != nil && !ok {
			return fmt.Errorf("%w: %s is not a table", ErrByHand, path(t.Path[:i+1]))
		}
		if next == nil {
			next = map[string]any{}
			m[n] = next
		}
		m = next
	}
	for k, v := range values {
		m[k] = v
	}
	return nil
}

// add adds the table's keys to the text: in the place of those with other values, below
// the table's header, or with a header at the end of the file.
func add(text []byte, mark string, t Table, have any) ([]byte, error) {
	lines := slices.Collect(strings.Lines(string(text)))
	if n := len(lines); n > 0 && !strings.HasSuffix(lines[n-1], "\n") {
		lines[n-1] += "\n"
	}
	end := func(list []string) string { return strings.Join(list, "\n") + "\n" }
	if t.Element {
		return []byte(strings.Join(lines, "") + end(t.lines(comment(mark)))), nil
	}
	at, err := scan(text)
	if err != nil {
		return nil, err
	}
	left := Table{Path: t.Path}
	table, _ := have.(map[string]any)
	for _, k := range t.Keys {
		if _, ok := table[k.Name]; !ok {
			left.Keys = append(left.Keys, k)
			continue
		}
		values, err := (Table{Path: t.Path, Keys: []Key{k}}).values()
		if err != nil {
			return nil, err
		}
		if contains(have, values) {
			continue
		}
		i, ok := at.keys[path(append(slices.Clone(t.Path), k.Name))]
		if !ok {
			return nil, fmt.Errorf("%w: %s stands in an inline table", ErrByHand, path(append(slices.Clone(t.Path), k.Name)))
		}
		old := strings.TrimRight(lines[i], "\r\n")
		name, _, ok := strings.Cut(old, "=")
		if v := map[string]any{}; !ok || toml.Unmarshal([]byte(old), &v) != nil {
			return nil, fmt.Errorf("%w: the value of %s has several lines", ErrByHand, k.Name)
		}
		lines[i] = name + "= " + k.Value + comment(mark) + was + old + lines[i][len(old):]
	}
	if len(left.Keys) == 0 {
		return []byte(strings.Join(lines, "")), nil
	}
	switch i, ok := at.tables[path(t.Path)]; {
	case len(t.Path) == 0: // before all tables
		lines = slices.Insert(lines, 0, end(left.keys(comment(mark))))
	case ok:
		lines[i] += end(left.keys(comment(mark)))
	default:
		lines = append(lines, end(left.lines(comment(mark))))
	}
	return []byte(strings.Join(lines, "")), nil
}

// places says on which line, from 0, headers and keys stand.
type places struct{ tables, keys map[string]int }

func scan(text []byte) (places, error) {
	at := places{tables: map[string]int{}, keys: map[string]int{}}
	var p unstable.Parser
	p.Reset(text)
	var table []string
	inArray := false // what is in an element of an array of tables has no path of its own
	for p.NextExpression() {
		e := p.Expression()
		names, line := []string(nil), 0
		for it := e.Key(); it.Next(); {
			if names == nil {
				line = p.Shape(it.Node().Raw).Start.Line - 1
			}
			names = append(names, string(it.Node().Data))
		}
		switch e.Kind {
		case unstable.Table:
			table, inArray = names, false
			at.tables[path(names)] = line
		case unstable.ArrayTable:
			inArray = true
		case unstable.KeyValue:
			if !inArray {
				at.keys[path(append(slices.Clone(table), names...))] = line
			}
		}
	}
	if err := p.Error(); err != nil {
		return at, fmt.Errorf("not valid TOML: %w", err)
	}
	return at, nil
}
