package credentials

import (
	"bytes"
	"context"
	"encoding/base64"
	"errors"
	"fmt"
	"log/slog"
	"os"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"go.uber.org/goleak"

	"github.com/shoalfs/shoal/blockdev"
	"github.com/shoalfs/shoal/internal/image"
)

func TestMain(m *testing.M) { goleak.VerifyTestMain(m) }

func write(t *testing.T, dir, config string) {
	t.Helper()
	if err := os.WriteFile(filepath.Join(dir, "config.json"), []byte(config), 0o600); err != nil {
		t.Fatal(err)
	}
}

func basic(user, password string) string {
	return base64.StdEncoding.EncodeToString([]byte(user + ":" + password))
}

func TestDockerConfig(t *testing.T) {
	dir := t.TempDir()
	d := NewDockerConfig(t.Context(), dir, nil)
	get := func(ref string) image.Credential {
		t.Helper()
		c, err := d.Credential(t.Context(), ref)
		if err != nil {
			t.Fatal(err)
		}
		return c
	}
	if c := get("registry.test/a:1"); c != (image.Credential{}) {
		t.Errorf("without a file: %+v", c)
	}
	write(t, dir, `{"auths":{
		"registry.test":{"auth":"`+basic("u", "p")+`"},
		"registry.test:5000":{"auth":"`+basic("port", "p")+`"},
		"https://index.docker.io/v1/":{"auth":"`+basic("hub", "p")+`"},
		"token.test":{"identitytoken":"tok"}}}`)
	for ref, want := range map[string]image.Credential{
		"registry.test/a/b:1":            {Username: "u", Secret: "p"},
		"registry.test:5000/a@sha256:00": {Username: "port", Secret: "p"},
		"docker.io/library/redis:7":      {Username: "hub", Secret: "p"},
		"registry-1.docker.io/x/y:1":     {Username: "hub", Secret: "p"},
		"index.docker.io/x/y:1":          {Username: "hub", Secret: "p"},
		"token.test/a:1":                 {Secret: "tok"},
		"other.test/a:1":                 {},
	} {
		if c := get(ref); c != want {
			t.Errorf("%s: %+v, want %+v", ref, c, want)
		}
	}
	// Rotated.
	write(t, dir, `{"auths":{"registry.test":{"auth":"`+basic("u", "new")+`"}}}`)
	if c := get("registry.test/a:1"); c.Secret != "new" {
		t.Errorf("after rotation: %+v", c)
	}
	write(t, dir, `{"auths":`)
	if c := get("registry.test/a:1"); c != (image.Credential{}) {
		t.Errorf("broken file: %+v", c)
	}
	if _, err := d.Credential(t.Context(), "not a reference"); err == nil {
		t.Error("took a reference that is none")
	}
}

func TestHelper(t *testing.T) {
	dir := t.TempDir()
	t.Setenv("PATH", dir+":"+os.Getenv("PATH"))
	helper := func(script string) {
		t.Helper()
		if err := os.WriteFile(filepath.Join(dir, "docker-credential-test"), []byte("#!/bin/sh\n"+script), 0o755); err != nil {
			t.Fatal(err)
		}
	}
	d := NewDockerConfig(t.Context(), dir, nil)
	write(t, dir, `{"credHelpers":{"registry.test":"test"}}`)
	helper(`read host; echo "{\"ServerURL\":\"$host\",\"Username\":\"h\",\"Secret\":\"s\"}"`)
	c, err := d.Credential(t.Context(), "registry.test/a:1")
	if err != nil || c != (image.Credential{Username: "h", Secret: "s"}) {
		t.Errorf("%+v, %v", c, err)
	}
	helper(`echo "secret-thing is wrong"; exit 1`)
	_, err = d.Credential(t.Context(), "registry.test/a:1")
	if !errors.Is(err, errHelper) || strings.Contains(err.Error(), "secret-thing") || !strings.Contains(err.Error(), "registry.test") {
		t.Errorf("failing helper: %v", err)
	}
	// One that hangs as long as the file is there.
	hang := filepath.Join(dir, "hang")
	if err := os.WriteFile(hang, nil, 0o600); err != nil {
		t.Fatal(err)
	}
	helper(`while [ -e ` + hang + ` ]; do sleep 0.01; done; exit 1`)
	ctx, cancel := context.WithTimeout(t.Context(), 50*time.Millisecond)
	defer cancel()
	if _, err := d.Credential(ctx, "registry.test/a:1"); !errors.Is(err, context.DeadlineExceeded) {
		t.Errorf("hanging helper: %v", err)
	}
	if err := os.Remove(hang); err != nil {
		t.Fatal(err)
	}
	for range maxRunning { // until it has ended
		d.running <- struct{}{}
	}
}

// TestBroken: a config.json that does not parse counts as empty, which is said
// once in the log and wherever access is denied, without a word of the file.
func TestBroken(t *testing.T) {
	dir := t.TempDir()
	var logs bytes.Buffer
	d := NewDockerConfig(t.Context(), dir, slog.New(slog.NewTextHandler(&logs, nil)))
	denied := fmt.Errorf("an image: %w", blockdev.ErrUnauthorized)
	look := func() {
		t.Helper()
		if c, err := d.Credential(t.Context(), "registry.test/a:1"); err != nil || c != (image.Credential{}) {
			t.Errorf("%+v, %v", c, err)
		}
	}
	look()
	if err := d.Explain(denied); err.Error() != denied.Error() {
		t.Errorf("without a file: %v", err)
	}
	write(t, dir, `{"auths":{"registry.test":{"auth":"secret-thing`)
	look()
	look()
	if n := strings.Count(logs.String(), "level=ERROR"); n != 1 {
		t.Errorf("logged %d times:\n%s", n, logs.String())
	}
	err := d.Explain(denied)
	if !errors.Is(err, blockdev.ErrUnauthorized) || !strings.Contains(err.Error(), filepath.Join(dir, "config.json")) {
		t.Errorf("denied: %v", err)
	}
	if strings.Contains(err.Error()+logs.String(), "secret-thing") {
		t.Errorf("a word of the file: %v\n%s", err, logs.String())
	}
	for _, other := range []error{nil, blockdev.ErrNotFound} {
		if got := d.Explain(other); got != other { //nolint:errorlint // untouched, not wrapped
			t.Errorf("%v became %v", other, got)
		}
	}
	write(t, dir, `{}`)
	look()
	if err := d.Explain(denied); strings.Contains(err.Error(), "config.json") {
		t.Errorf("repaired: %v", err)
	}
}
