// Package pattern is the language in which configs name images: an image reference
// in which an asterisk stands for any characters.
//
// A Pattern never changes, and is safe for concurrent use.
package pattern

import (
	"cmp"
	"errors"
	"fmt"
	"strings"

	"github.com/distribution/reference"
)

// parts are a reference, or a pattern, taken apart: each is matched by itself.
type parts struct{ name, tag, digest string }

// Ref is an image reference, taken apart once to be matched with many patterns.
type Ref struct{ parts }

// Pattern fits image references. An asterisk stands for any characters, slashes
// among them. Short names are completed as in docker ("redis" is
// "docker.io/library/redis"), unless they begin with an asterisk. A pattern
// without a tag fits every tag, and one without a digest every digest.
type Pattern struct {
	parts
	text string // as it was written
}

// Matches says whether the pattern fits an image.
func (p Pattern) Matches(r Ref) bool {
	return glob(p.name, r.name) && glob(p.tag, r.tag) && glob(p.digest, r.digest)
}

// Fits says whether the pattern fits a repository, for all of its tags and digests:
// name is its host and path, as in "docker.io/library/redis".
func (p Pattern) Fits(name string) bool { return glob(p.name, name) }

// Whole says whether the pattern names whole repositories, and neither a tag nor a
// digest.
func (p Pattern) Whole() bool { return p.tag == "*" && p.digest == "*" }

// String is the pattern as it was written.
func (p Pattern) String() string { return p.text }

// Same says whether two patterns name the same images.
func (p Pattern) Same(o Pattern) bool { return p.parts == o.parts }

// Parse reads a pattern, or says what is wrong with it.
func Parse(text string) (Pattern, error) {
	p, err := cutPattern(text)
	if err != nil {
		return Pattern{}, fmt.Errorf("%q is not a pattern for images: %w", text, err)
	}
	return Pattern{p, text}, nil
}

func cutPattern(text string) (p parts, err error) {
	switch {
	case text == "":
		return p, errors.New(`it is empty; "*" names every image`)
	case strings.ContainsAny(text, " \t\r\n"):
		return p, errors.New("it has white space in it; write a list of several patterns")
	case strings.Contains(text, "://"):
		return p, errors.New(`it begins with a scheme; write it as in image references, such as "registry.example.com/base/*"`)
	case strings.ContainsAny(text, "?[]{}^\\"):
		return p, errors.New(`the only wildcard is "*", which stands for any characters`)
	case strings.HasSuffix(text, "/"):
		return p, fmt.Errorf("it ends with a slash; %q names everything below", text+"*")
	case strings.Contains(text, "//"):
		return p, errors.New("it has two slashes in a row")
	}
	rest, digest, hasDigest := strings.Cut(text, "@")
	name, tag := rest, ""
	// A colon before the last slash is that of a port.
	colon := strings.LastIndexByte(rest, ':')
	hasTag := colon > strings.LastIndexByte(rest, '/')
	if hasTag {
		name, tag = rest[:colon], rest[colon+1:]
	}
	host, _, hasPath := strings.Cut(name, "/")
	if !hasPath && !hasTag && !strings.HasPrefix(name, "*") && (strings.ContainsRune(name, '.') || name == "localhost") {
		return p, fmt.Errorf("it names a registry without an image; %q names all images of a registry", name+"/*")
	}
	switch {
	case strings.HasPrefix(host, "*"): // of any registry
	case !hasPath:
		name = "docker.io/library/" + name
	case host == "index.docker.io":
		name = "docker.io" + strings.TrimPrefix(name, host)
	case !strings.ContainsAny(host, ".:") && host != "localhost":
		name = "docker.io/" + name
	}
	// The judge of what may stand in a reference: with a digit for each asterisk,
	// which may stand anywhere but in a digest.
	whole := name
	if hasTag {
		whole += ":" + tag
	}
	whole = strings.ReplaceAll(whole, "*", "1")
	if hasDigest && digest != "*" {
		whole += "@" + digest
	}
	if _, err := reference.ParseNormalizedNamed(whole); err != nil {
		return p, fmt.Errorf("%w (a pattern is an image reference with \"*\" for any characters)", err)
	}
	p = parts{name, "*", "*"}
	if hasTag {
		p.tag = tag
	}
	if hasDigest {
		p.digest = digest
	}
	return p, nil
}

// ParseRef takes an image reference apart. One that is invalid by docker's rules,
// but is by containerd's, is matched by its name.
func ParseRef(ref string) Ref {
	named, err := reference.ParseNormalizedNamed(ref)
	if err != nil {
		return Ref{parts{name: ref}}
	}
	r := parts{name: named.Name()}
	if t, ok := named.(reference.Tagged); ok {
		r.tag = t.Tag()
	}
	if d, ok := named.(reference.Digested); ok {
		r.digest = d.Digest().String()
	}
	if r.tag == "" && r.digest == "" {
		r.tag = "latest"
	}
	return Ref{r}
}

// Compare sorts the more specific pattern first: the one that says more of the
// name, then of the tag, then of the digest.
func Compare(a, b Pattern) int {
	literal := func(s string) int { return len(s) - strings.Count(s, "*") }
	return cmp.Or(
		-cmp.Compare(literal(a.name), literal(b.name)),
		-cmp.Compare(literal(a.tag), literal(b.tag)),
		-cmp.Compare(literal(a.digest), literal(b.digest)),
		cmp.Compare(a.name, b.name), cmp.Compare(a.tag, b.tag), cmp.Compare(a.digest, b.digest),
		cmp.Compare(a.text, b.text))
}

// glob matches s against a pattern in time proportional to both lengths.
func glob(pattern, s string) bool {
	head, rest, star := strings.Cut(pattern, "*")
	if !star {
		return pattern == s
	}
	if !strings.HasPrefix(s, head) {
		return false
	}
	s = s[len(head):]
	for {
		part, more, star := strings.Cut(rest, "*")
		if !star {
			return strings.HasSuffix(s, part)
		}
		i := strings.Index(s, part)
		if i < 0 {
			return false
		}
		s, rest = s[i+len(part):], more
	}
}
