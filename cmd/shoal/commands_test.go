package main

import (
	"bytes"
	"context"
	"encoding/base64"
	"encoding/json"
	"errors"
	"net"
	"os"
	"path/filepath"
	"reflect"
	"strings"
	"testing"
	"time"

	"github.com/shoalfs/shoal/internal/control"
	"github.com/shoalfs/shoal/internal/image"
)

// fakeDaemon answers with what it holds.
type fakeDaemon struct {
	status *control.Status
	events []control.Event
	errs   map[string]error // of a prefetch, by reference; of a check
	report *control.CheckReport
	asked  control.CheckRequest

	prefetch control.PrefetchRequest
}

func (d *fakeDaemon) Status(context.Context) (*control.Status, error) { return d.status, nil }

func (d *fakeDaemon) Prefetch(_ context.Context, req control.PrefetchRequest, event func(control.Event)) error {
	d.prefetch = req
	for _, e := range d.events {
		event(e)
	}
	return d.errs[req.Ref]
}

func (d *fakeDaemon) Check(_ context.Context, req control.CheckRequest, event func(string)) (*control.CheckReport, error) {
	event("layer sha256:abc")
	d.asked = req
	return d.report, d.errs["check"]
}

// start serves d and returns the path of its socket.
func (d *fakeDaemon) start(t *testing.T) string {
	t.Helper()
	path := filepath.Join(t.TempDir(), "control.sock")
	ctx, cancel := context.WithCancel(context.Background())
	ended := make(chan error, 1)
	go func() { ended <- control.Serve(ctx, path, d) }()
	t.Cleanup(func() {
		cancel()
		if err := <-ended; err != nil {
			t.Errorf("serve: %v", err)
		}
	})
	for {
		if conn, err := net.Dial("unix", path); err == nil {
			conn.Close()
			return path
		}
		select {
		case err := <-ended:
			ended <- err
			t.Fatalf("serve: %v", err)
		default:
		}
	}
}

// shoal runs the command as main does, and returns its standard output.
func shoal(t *testing.T, args ...string) (string, error) {
	t.Helper()
	var out bytes.Buffer
	cmd := newCommand()
	cmd.SetOut(&out)
	cmd.SetArgs(args)
	err := cmd.ExecuteContext(t.Context())
	return out.String(), err
}

func layerOf(size, local int64, mount string) control.Layer {
	return control.Layer{DiffID: "sha256:" + strings.Repeat("ab", 32), Size: size, Local: local, Mount: mount}
}

func proof(l control.Layer, state string) control.Layer {
	l.Proof = state
	return l
}

func users(n int, l control.Layer) control.Layer {
	l.LazyUsers = n
	return l
}

func TestStatus(t *testing.T) {
	d := &fakeDaemon{status: &control.Status{
		Version: "v1.2", Role: "node", Supernodes: []string{"12D3@10.0.0.1:7700"}, NoSupernode: "connection refused\nmore", Called: time.Unix(1000, 0).UTC(),
		Images: []control.Image{
			{Ref: "docker.io/library/redis:7", Layers: []control.Layer{users(2, proof(layerOf(100e6, 100e6, "native"), "proven")), users(1, proof(layerOf(20e6, 20e6, "native"), "proven"))}},
			{Ref: "r.example.com/app:v2", Layers: []control.Layer{layerOf(2e9, 2e9-1, "lazy"), proof(layerOf(1, 1, "native"), "proven"), layerOf(0, 0, "")}},
			{Ref: "r.example.com/bad:v1", Layers: []control.Layer{proof(layerOf(10, 10, "lazy"), "quarantined"), proof(layerOf(1, 1, "native"), "proven")}},
			{Ref: "r.example.com/empty:1", Layers: []control.Layer{}},
		},
	}}
	socket := d.start(t)
	got, err := shoal(t, "status", "--control", socket)
	want := `shoal v1.2, node, supernode 12D3@10.0.0.1:7700
no supernode serves this node now: connection refused

IMAGE                      LAYERS  SIZE   LOCAL  MOUNTED                       PROVEN
docker.io/library/redis:7  2       120MB  100%   2 native (2 containers lazy)  yes
r.example.com/app:v2       3       2GB    99%    1 native, 1 lazy              1 of 3
r.example.com/bad:v1       2       11B    100%   1 native, 1 lazy              QUARANTINED
r.example.com/empty:1      0       0B     100%   -                             yes
`
	if err != nil || got != want {
		t.Errorf("%v, got:\n%s\nwant:\n%s", err, got, want)
	}

	out, err := shoal(t, "status", "--control", socket, "-o", "json")
	if err != nil {
		t.Fatal(err)
	}
	var st control.Status
	if err := json.Unmarshal([]byte(out), &st); err != nil || !reflect.DeepEqual(&st, d.status) {
		t.Errorf("%v, got %+v, want %+v", err, st, d.status)
	}
	if _, err := shoal(t, "status", "-o", "xml"); err == nil || !strings.Contains(err.Error(), "table or json") {
		t.Errorf("output xml: %v", err)
	}

	d.status = &control.Status{Version: "v1.2", Role: "supernode", Images: []control.Image{}}
	if out, err = shoal(t, "status", "--control", socket); err != nil || out != "shoal v1.2, supernode\n\nno images\n" {
		t.Errorf("%v, without images:\n%s", err, out)
	}
}

func TestPrefetchLines(t *testing.T) {
	a, b := "sha256:"+strings.Repeat("a1", 32), "sha256:"+strings.Repeat("b2", 32)
	d := &fakeDaemon{
		events: []control.Event{
			{Layer: a, Stage: "fetching", Done: 1, Total: 5e6},
			{Layer: b, Stage: "fetching"},
			{Layer: a, Stage: "fetching", Done: 5e6, Total: 5e6},
			{Layer: a, Stage: "verified", Done: 5e6, Total: 5e6},
			{Layer: b, Stage: "verified", Done: 1, Total: 1},
		},
		errs: map[string]error{"bad": errors.New("the registry is down")},
	}
	socket := d.start(t)
	lines := `sha256:a1a1a1a1a1a1 fetching (5MB)
REF sha256:b2b2b2b2b2b2 fetching
REF sha256:a1a1a1a1a1a1 verified (5MB)
REF sha256:b2b2b2b2b2b2 verified (1B)
`
	of := func(ref string) string { return strings.ReplaceAll("REF "+lines, "REF", ref) }
	got, err := shoal(t, "prefetch", "--control", socket, "redis:7")
	if want := of("redis:7") + "redis:7 done\n"; err != nil || got != want {
		t.Errorf("%v, got:\n%s\nwant:\n%s", err, got, want)
	}
	// The others are brought all the same; what failed is said, and the end is an error.
	got, err = shoal(t, "prefetch", "--control", socket, "bad", "good")
	if want := of("bad") + of("good") + "good done\n"; got != want {
		t.Errorf("got:\n%s\nwant:\n%s", got, want)
	}
	if err == nil || err.Error() != "bad: the registry is down" {
		t.Errorf("error %v", err)
	}
	if _, err := shoal(t, "prefetch"); err == nil || !strings.Contains(err.Error(), "no image is given") {
		t.Errorf("no image: %v", err)
	}
}

// TestPrefetchWithCredential: --docker-config names the directory of the config.json that
// has the image's credential. Without a credential in it the daemon gets no request.
func TestPrefetchWithCredential(t *testing.T) {
	d := &fakeDaemon{}
	socket, dir := d.start(t), t.TempDir()
	prefetch := func(ref string) error {
		_, err := shoal(t, "prefetch", "--local", "--control", socket, "--docker-config", dir, ref)
		return err
	}
	if err := prefetch("r.example.com/app:1"); err == nil || !strings.Contains(err.Error(), "config.json") || d.prefetch.Ref != "" {
		t.Errorf("without a file: %v, the daemon got %+v", err, d.prefetch)
	}
	auth := base64.StdEncoding.EncodeToString([]byte("ann:word"))
	if err := os.WriteFile(filepath.Join(dir, "config.json"), []byte(`{"auths":{"r.example.com":{"auth":"`+auth+`"}}}`), 0o600); err != nil {
		t.Fatal(err)
	}
	if err := prefetch("other.example.com/app:1"); err == nil || !strings.Contains(err.Error(), "no credential") || d.prefetch.Ref != "" {
		t.Errorf("another registry: %v, the daemon got %+v", err, d.prefetch)
	}
	want := control.PrefetchRequest{Ref: "r.example.com/app:1", Local: true, Credential: image.Credential{Username: "ann", Secret: "word"}}
	if err := prefetch("r.example.com/app:1"); err != nil || d.prefetch != want {
		t.Errorf("%v, the daemon got %+v, want %+v", err, d.prefetch, want)
	}
}

// TestPrefetchBars: the screen is left in order, however it ends.
func TestPrefetchBars(t *testing.T) {
	for name, err := range map[string]error{"done": nil, "failed": errors.New("the registry is down")} {
		t.Run(name, func(t *testing.T) {
			var out bytes.Buffer
			b := newBars(t.Context(), &out, "redis:7")
			b.event(control.Event{Layer: "sha256:a", Stage: "fetching", Done: 1})
			b.event(control.Event{Layer: "sha256:a", Stage: "fetching", Done: 2, Total: 3})
			b.event(control.Event{Layer: "sha256:b", Stage: "verified", Done: 3, Total: 3})
			b.done(err)
			if says := strings.Contains(out.String(), "redis:7 done"); says != (err == nil) {
				t.Errorf("error %v, says done: %t\n%s", err, says, out.String())
			}
		})
	}
}
