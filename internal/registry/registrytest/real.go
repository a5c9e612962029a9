package registrytest

import (
	"bufio"
	"context"
	"fmt"
	"net"
	"net/http"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"testing"
	"time"
)

// htpasswd is "alice" with the password of RealUser.
const htpasswd = "alice:$2a$04$cl/2NygNdAFlUFlI5fzpmu//6CpmV5Tw2SirBkrO/LTetC66TPPam\n"

// RealUser and RealPassword are let in by StartReal with auth.
const (
	RealUser     = "alice"
	RealPassword = "secret-of-alice"
)

// StartReal runs Debian's docker-registry on loopback until the test ends, with
// basic authentication if auth is set. The test is skipped where it is not
// installed.
func StartReal(t testing.TB, auth bool) Target {
	t.Helper()
	bin, err := exec.LookPath("docker-registry")
	if err != nil {
		t.Skip("docker-registry is not installed (apt-get install docker-registry)")
	}
	dir := t.TempDir()
	// The registry cannot be told "any port", so one is found for it.
	l, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	r := Target{Host: l.Addr().String()}
	if err := l.Close(); err != nil {
		t.Fatal(err)
	}
	cfg := fmt.Sprintf("version: 0.1\nlog: {level: error}\nstorage: {filesystem: {rootdirectory: %s/data}}\nhttp: {addr: %q}\n", dir, r.Host)
	if auth {
		r.User, r.Password = RealUser, RealPassword
		pw := filepath.Join(dir, "htpasswd")
		if err := os.WriteFile(pw, []byte(htpasswd), 0o600); err != nil {
			t.Fatal(err)
		}
		cfg += fmt.Sprintf("auth: {htpasswd: {realm: real, path: %s}}\n", pw)
	}
	file := filepath.Join(dir, "config.yml")
	if err := os.WriteFile(file, []byte(cfg), 0o600); err != nil {
		t.Fatal(err)
	}
	ctx, cancel := context.WithCancel(context.Background())
	cmd := exec.CommandContext(ctx, bin, "serve", file)
	errs, err := cmd.StderrPipe()
	if err == nil {
		err = cmd.Start()
	}
	if err != nil {
		cancel()
		t.Fatal(err)
	}
	said := make(chan string, 1)
	go func() {
		var b strings.Builder
		for s := bufio.NewScanner(errs); s.Scan(); {
			if b.Len() < 4096 {
				b.WriteString(s.Text() + "\n")
			}
		}
		said <- b.String()
	}()
	t.Cleanup(func() {
		cancel()
		out := <-said
		if err := cmd.Wait(); err != nil && ctx.Err() == nil {
			t.Errorf("docker-registry: %v: %s", err, out)
		}
	})
	for end := time.Now().Add(20 * time.Second); ; time.Sleep(20 * time.Millisecond) {
		resp, err := http.Get("http://" + r.Host + "/v2/")
		if err == nil {
			return r.close(t, resp)
		}
		if time.Now().After(end) {
			t.Fatalf("docker-registry does not answer: %v", err)
		}
	}
}

func (r Target) close(t testing.TB, resp *http.Response) Target {
	if err := resp.Body.Close(); err != nil {
		t.Fatal(err)
	}
	return r
}
