package ingest

import (
	"bufio"
	"context"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"strconv"
	"strings"
	"testing"
	"time"

	"net/http"

	"github.com/shoalfs/shoal/blockdev"
	"github.com/shoalfs/shoal/supernode/store"
)

const childEnv = "SHOAL_TEST_INGEST_CHILD"

// childMain is the process that is killed: it ingests one layer and says how far
// it is.
func childMain(args string) {
	a := strings.Split(args, "|") // dir, URL, digest, size, DiffID
	fail := func(err error) {
		if err != nil {
			fmt.Println("error", err)
			os.Exit(1)
		}
	}
	st, err := store.Open(store.Config{Dir: filepath.Join(a[0], "store")})
	fail(err)
	in, err := New(Config{Store: st, SpoolDir: filepath.Join(a[0], "spool")})
	fail(err)
	d, err := blockdev.ParseDigest(a[2])
	fail(err)
	diffID, err := blockdev.ParseDigest(a[4])
	fail(err)
	size, err := strconv.ParseInt(a[3], 10, 64)
	fail(err)
	_, err = in.Layer(context.Background(), Layer{
		Ref: "registry.example/test:1", Digest: d, Size: size, MediaType: gzipType, DiffID: diffID,
		Host: "registry.example", Origin: "registry.example/x/y", Open: opener(a[1], d),
	}, func(p Progress) { fmt.Println("progress", p.Fetched, p.Unpacked) })
	fail(err)
}

// kill -9 in the middle, more than once; then the rest is fetched, and only the
// rest, and the result is the same.
func TestKilled(t *testing.T) {
	diff := makeTar(t, 1, 8<<20)
	reg := newRegistry(t)
	l := reg.add(gzipped(t, diff), diff, gzipType)
	dir := t.TempDir()
	var arrived int64
	for round := int64(1); round <= 3; round++ {
		// Sends a quarter more each time, and then hangs.
		stop := l.Size * round / 4
		reg.mu.Lock()
		reg.fault = func(w http.ResponseWriter, r *http.Request, body []byte) (bool, int) {
			n := stop - (l.Size - int64(len(body)))
			w.Header().Set("Content-Length", fmt.Sprint(len(body)))
			if r.Header.Get("Range") != "" {
				w.WriteHeader(http.StatusPartialContent)
			}
			_, _ = w.Write(body[:n]) // the client is killed
			w.(http.Flusher).Flush()
			<-r.Context().Done()
			panic(http.ErrAbortHandler)
		}
		reg.mu.Unlock()
		arrived = kill(t, dir, reg.URL, l, arrived)
		if arrived == 0 || arrived > stop {
			t.Fatalf("round %d: %d bytes arrived of %d sent", round, arrived, stop)
		}
	}
	reg.mu.Lock()
	reg.fault = nil
	reg.mu.Unlock()
	before := reg.sent.Load()

	f := &fixture{dir: dir, reg: reg}
	f.open(t, Config{})
	if s := f.st.Stats(); s.Diffs != 0 {
		t.Errorf("the store has %d diffs before the layer is complete", s.Diffs)
	}
	packs, err := filepath.Glob(filepath.Join(dir, "store", "packs", "*"))
	if err != nil || len(packs) != 0 {
		t.Errorf("packs of killed processes are still there: %v, %v", packs, err)
	}
	if _, err := f.in.Layer(t.Context(), l, nil); err != nil {
		t.Fatal(err)
	}
	checkStored(t, f.st, l, diff)
	if sent := reg.sent.Load() - before; sent > l.Size-arrived {
		t.Errorf("%d bytes fetched after %d of %d were there", sent, arrived, l.Size)
	}
	if len(f.spoolFiles(t)) > 0 {
		t.Error("spool file left")
	}
}

// kill runs a child until it has unpacked something and stands still, kills it,
// and returns how long its spool file is.
func kill(t *testing.T, dir, url string, l Layer, had int64) int64 {
	t.Helper()
	ctx, cancel := context.WithTimeout(t.Context(), time.Minute)
	defer cancel()
	cmd := exec.CommandContext(ctx, os.Args[0])
	cmd.Env = append(os.Environ(), fmt.Sprintf("%s=%s|%s|%s|%d|%s", childEnv, dir, url, l.Digest, l.Size, l.DiffID))
	cmd.Stderr = os.Stderr
	out, err := cmd.StdoutPipe()
	if err != nil {
		t.Fatal(err)
	}
	if err := cmd.Start(); err != nil {
		t.Fatal(err)
	}
	sc := bufio.NewScanner(out)
	for sc.Scan() {
		var fetched, unpacked int64
		if _, err := fmt.Sscanf(sc.Text(), "progress %d %d", &fetched, &unpacked); err != nil {
			t.Fatalf("child says %q", sc.Text())
		}
		if fetched > had && unpacked > 0 {
			break
		}
	}
	if err := cmd.Process.Kill(); err != nil {
		t.Fatal(err)
	}
	cmd.Wait() //nolint:errcheck // it was killed
	names, err := filepath.Glob(filepath.Join(dir, "spool", "*"))
	if err != nil || len(names) != 1 {
		t.Fatalf("spool files %v, %v", names, err)
	}
	fi, err := os.Stat(names[0])
	if err != nil {
		t.Fatal(err)
	}
	return fi.Size()
}
