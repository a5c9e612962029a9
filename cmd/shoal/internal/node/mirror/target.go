package mirror

import (
	"fmt"
	"net/http"
	"regexp"
	"strings"

	"github.com/shoalfs/shoal/blockdev"
	"github.com/shoalfs/shoal/internal/registry"
)

// what is asked for; these are values of a metric's label.
type what string

const (
	ping     what = "ping"
	manifest what = "manifest"
	blob     what = "blob"
)

// target is a request's path and namespace, taken apart.
type target struct {
	what   what
	name   string // host/repository
	tag    string // or:
	digest blockdev.Digest
}

func (t target) ref() string {
	if t.tag != "" {
		return t.name + ":" + t.tag
	}
	return t.name + "@" + t.digest.String()
}

// The grammar of the distribution specification. The supernode holds names to it
// again; here it keeps what is no name from the node's credential helpers.
var (
	hostRE = regexp.MustCompile(`^([A-Za-z0-9]([A-Za-z0-9.-]{0,252}[A-Za-z0-9])?|\[[0-9a-fA-F:.]{2,45}\])(:[0-9]{1,5})?$`)
	repoRE = regexp.MustCompile(`^[a-z0-9]+((\.|_|__|-+)[a-z0-9]+)*(/[a-z0-9]+((\.|_|__|-+)[a-z0-9]+)*)*$`)
	tagRE  = regexp.MustCompile(`^[A-Za-z0-9_][A-Za-z0-9._-]{0,127}$`)
)

const maxRepo = 255

// parse says what a request asks for. Errors are *problem.
func parse(r *http.Request) (target, error) {
	if strings.Contains(strings.Join(r.Header.Values("Via"), ","), registry.Via) {
		return target{}, &problem{http.StatusLoopDetected, codeUnsupported, "a supernode asks the mirror that asks it: the supernode leaves this host out from now on"}
	}
	if r.Method != http.MethodGet && r.Method != http.MethodHead {
		return target{}, &problem{http.StatusMethodNotAllowed, codeUnsupported, r.Method + ": this is a mirror, push to the registry itself"}
	}
	unsupported := &problem{http.StatusNotFound, codeUnsupported, "this mirror has manifests and image configs, and nothing else"}
	path, ok := strings.CutPrefix(r.URL.Path, "/v2/")
	if !ok && r.URL.Path != "/v2" {
		return target{}, unsupported
	}
	if path == "" {
		return target{what: ping}, nil
	}
	// From the right: a repository may have an element called manifests.
	head, last, _ := cutLast(path)
	repo, kind, ok := cutLast(head)
	t := target{what: manifest}
	switch {
	case !ok || kind != "manifests" && kind != "blobs":
		return target{}, unsupported
	case kind == "blobs":
		t.what = blob
	}
	host := strings.ToLower(r.URL.Query().Get("ns"))
	switch {
	case host == "":
		return target{}, &problem{http.StatusBadRequest, codeNameInvalid, "no ns parameter says which registry is meant: " +
			"this is a mirror, to be named in a [host] section of containerd's hosts.toml"}
	case !hostRE.MatchString(host):
		return target{}, &problem{http.StatusBadRequest, codeNameInvalid, fmt.Sprintf("ns %.80q is not a registry host", host)}
	case len(repo) > maxRepo || !repoRE.MatchString(repo):
		return target{}, &problem{http.StatusBadRequest, codeNameInvalid, fmt.Sprintf("%.80q is not a repository name", repo)}
	}
	t.name = host + "/" + repo
	if t.what == manifest && tagRE.MatchString(last) {
		t.tag = last
		return t, nil
	}
	var err error
	if t.digest, err = blockdev.ParseDigest(last); err != nil {
		return target{}, &problem{http.StatusBadRequest, codeDigestInvalid, err.Error()}
	}
	return t, nil
}

// cutLast cuts a path before its last element.
func cutLast(path string) (head, last string, ok bool) {
	i := strings.LastIndexByte(path, '/')
	if i < 0 {
		return "", path, false
	}
	return path[:i], path[i+1:], true
}
