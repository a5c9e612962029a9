package registry

import (
	"fmt"
	"regexp"
	"strings"

	"github.com/containerd/containerd/v2/pkg/reference"

	"github.com/shoalfs/shoal/blockdev"
)

// Names come from nodes and end up in URLs. containerd's parser is lenient (it
// takes user:password@host and dot segments), so they are held to the grammar
// of the distribution specification first.
var (
	hostRE = regexp.MustCompile(`^([A-Za-z0-9]([A-Za-z0-9.-]{0,252}[A-Za-z0-9])?|\[[0-9a-fA-F:.]{2,45}\])(:[0-9]{1,5})?$`)
	repoRE = regexp.MustCompile(`^[a-z0-9]+((\.|_|__|-+)[a-z0-9]+)*(/[a-z0-9]+((\.|_|__|-+)[a-z0-9]+)*)*$`)
	tagRE  = regexp.MustCompile(`^[A-Za-z0-9_][A-Za-z0-9._-]{0,127}$`)
)

// Reference is an image reference taken apart.
type Reference struct {
	// Host is the registry as the reference names it ("docker.io"), in lower
	// case. A hosts.toml may send requests elsewhere.
	Host string
	// Repository is the path below Host: "library/redis".
	Repository string
	// Tag is empty if the reference has only a digest.
	Tag string
	// Digest is zero if the reference has only a tag.
	Digest blockdev.Digest
}

// ParseReference takes apart "host[:port]/repository[:tag][@sha256:...]". A
// reference without a host, or with neither tag nor digest, is an error that
// wraps blockdev.ErrNotFound: there is no such image.
func ParseReference(ref string) (Reference, error) {
	bad := func(why string) (Reference, error) {
		return Reference{}, fmt.Errorf("image reference %.300q: %s: %w", ref, why, blockdev.ErrNotFound)
	}
	if len(ref) > 1024 {
		return bad("longer than 1024 bytes")
	}
	spec, err := reference.Parse(ref)
	if err != nil {
		return bad("not of the form host/repository:tag")
	}
	host, repo, ok := strings.Cut(spec.Locator, "/")
	if !ok || !hostRE.MatchString(host) {
		return bad("does not begin with a registry host, as in docker.io/library/redis:7")
	}
	if len(repo) > 255 || !repoRE.MatchString(repo) {
		return bad("the repository is not a valid name (lower case, digits, single separators)")
	}
	// containerd has cleaned the path by now; what it cleaned was no valid name.
	if !strings.HasPrefix(ref, host+"/"+repo) {
		return bad("the repository is not a valid name (empty or dot segments)")
	}
	r := Reference{Host: strings.ToLower(host), Repository: repo}
	tag, dgst, hasDigest := strings.Cut(spec.Object, "@")
	if hasDigest {
		if r.Digest, err = blockdev.ParseDigest(dgst); err != nil {
			return bad("the digest is not sha256:<64 hexadecimal digits>")
		}
	}
	if tag != "" && !tagRE.MatchString(tag) {
		return bad("the tag is not a valid name")
	}
	r.Tag = tag
	if r.Tag == "" && !hasDigest {
		return bad("it has neither a tag nor a digest")
	}
	return r, nil
}

// Name is host and repository: "docker.io/library/redis".
func (r Reference) Name() string { return r.Host + "/" + r.Repository }

func (r Reference) withDigest(d blockdev.Digest) string { return r.Name() + "@" + d.String() }
