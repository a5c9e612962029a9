package cache

import (
	"bufio"
	"context"
	"errors"
	"io"
	"log/slog"
	"math/rand/v2"
	"os"
	"os/exec"
	"testing"
	"time"

	"github.com/shoalfs/shoal/blockdev"
	"github.com/shoalfs/shoal/blockdev/blockdevtest"
	"github.com/shoalfs/shoal/blockdev/index"
)

const (
	crashChildEnv = "SHOAL_CACHE_CRASH_CHILD"
	crashSize     = 6 << 20
	crashDiffs    = 3
)

func crashConfig(dir string, src blockdev.Source, log *slog.Logger) Config {
	return Config{Root: dir, Source: src, Log: log, bootID: "first boot", SyncInterval: 5 * time.Millisecond, SyncBytes: 2 << 20}
}

// crashChild is the process that TestKill kills: it adds diffs, reads and
// prefetches them, removes one now and then, and tells when it has begun.
func crashChild(dir string) {
	log := slog.New(slog.NewTextHandler(os.Stderr, nil))
	var mem blockdevtest.Memory
	var enc [][]byte
	for i := range crashDiffs {
		ix, data := blockdevtest.Diff(uint64(i), crashSize)
		mem.PutDiff(ix, data)
		b, err := index.Encode(ix)
		if err != nil {
			log.Error(err.Error())
			os.Exit(1)
		}
		enc = append(enc, b)
	}
	c, err := Open(context.Background(), crashConfig(dir, &mem, log))
	if err != nil {
		log.Error(err.Error())
		os.Exit(1)
	}
	_, _ = os.Stdout.WriteString("ready\n")
	for i := 0; ; i++ {
		go func() {
			d, err := c.Add(context.Background(), enc[i%crashDiffs])
			if err != nil {
				return
			}
			p := make([]byte, 100_000)
			for range 20 {
				_, _ = d.ReadAt(context.Background(), p, rand.Int64N(crashSize-100_000))
			}
			_ = d.Prefetch(context.Background())
			if i%5 == 4 {
				_ = c.Remove(context.Background(), d.ID())
			}
		}()
		time.Sleep(time.Millisecond) // a bound on the goroutines of a process that will be killed
	}
}

// TestKill: a process that fills a cache is killed at any moment; the next one
// opens it, and every chunk called present has its digest.
func TestKill(t *testing.T) {
	exe, err := os.Executable()
	if err != nil {
		t.Fatal(err)
	}
	dir := t.TempDir()
	logs := new(logBuffer)
	log := slog.New(slog.NewTextHandler(logs, nil))
	rng := rand.New(rand.NewPCG(uint64(time.Now().UnixNano()), 0))
	rounds, deadline := 25, time.Now().Add(40*time.Second)
	if testing.Short() {
		rounds = 5
	}
	var seen, complete int
	for range rounds {
		if time.Now().After(deadline) {
			break
		}
		cmd := exec.Command(exe)
		cmd.Env = append(os.Environ(), crashChildEnv+"="+dir)
		cmd.Stderr = os.Stderr
		out, err := cmd.StdoutPipe()
		if err != nil {
			t.Fatal(err)
		}
		if err := cmd.Start(); err != nil {
			t.Fatal(err)
		}
		if _, err := bufio.NewReader(out).ReadString('\n'); err != nil {
			t.Fatal(err)
		}
		time.Sleep(time.Duration(rng.Int64N(int64(150 * time.Millisecond)))) // the moment of death
		_ = cmd.Process.Kill()
		_, _ = io.Copy(io.Discard, out)
		_ = cmd.Wait()

		c, err := Open(t.Context(), crashConfig(dir, new(blockdevtest.Memory), log))
		if err != nil {
			t.Fatal(err)
		}
		for _, d := range c.Diffs() {
			r := &rig{t: t, d: d}
			n := r.present()
			seen += n
			if d.Complete() {
				complete++
				if n != d.tab.Len() {
					t.Fatalf("complete with %d of %d chunks", n, d.tab.Len())
				}
			}
		}
		if err := c.Close(); err != nil {
			t.Fatal(err)
		}
	}
	for _, bad := range []string{"damaged", "cannot tell", "dropped", "damaged records"} {
		if n := logs.count(bad); n != 0 {
			t.Errorf("%d log lines with %q after kills; log:\n%s", n, bad, logs.b.String())
		}
	}
	if seen == 0 {
		t.Error("no round found a chunk present: the test says nothing")
	}
	t.Logf("%d chunks checked, %d diffs complete", seen, complete)
}

// TestPowerLoss: the page cache is lost, so what was not synced may be anything.
// Nothing of it is believed, and what was synced still is.
func TestPowerLoss(t *testing.T) {
	for round := range 6 {
		r := newRig(t, 3<<20+1, nil)
		rng := rand.New(rand.NewPCG(77, uint64(round)))
		readSome := func() {
			for range 6 {
				r.checkRead(rng.Int64N(r.d.Size()-1), 1+rng.IntN(200_000))
			}
			r.quiet()
		}
		readSome()
		if err := r.d.sync(context.Background()); err != nil {
			t.Fatal(err)
		}
		synced, syncedBytes, unsynced := r.d.pres.Counts()
		if unsynced != 0 {
			t.Fatalf("%d bytes unsynced after a sync", unsynced)
		}
		readSome()
		total := r.present()
		// Data blocks that were never synced are lost: zero, or any other bytes.
		r.crash(func() {
			f, err := os.OpenFile(r.d.DataPath(), os.O_RDWR, 0)
			if err != nil {
				t.Fatal(err)
			}
			defer f.Close()
			for i := range r.d.tab.Len() {
				if r.d.pres.SyncedAll(i, i+1) || rng.IntN(4) == 0 {
					continue
				}
				junk := make([]byte, r.d.tab.Length(i))
				if rng.IntN(2) == 0 {
					junk = blockdevtest.Bytes(uint64(i), len(junk))
				}
				if _, err := f.WriteAt(junk[rng.IntN(len(junk)/2):], r.d.tab.Start(i)); err != nil {
					t.Fatal(err)
				}
			}
			r.cfg.bootID = "second boot"
		})
		r.expect()
		if n := r.present(); n != 0 {
			t.Fatalf("%d chunks believed after a power loss, before anybody looked", n)
		}
		// A kill right after the boot brings nothing back.
		r.crash(nil)
		r.expect()
		if n := r.present(); n != 0 {
			t.Fatalf("%d chunks believed after a kill", n)
		}
		r.checkRead(0, int(r.d.Size()))
		// What was synced is not fetched again.
		if s := r.Stats(); s.CopiedBytes < syncedBytes {
			t.Fatalf("%d bytes found on disk, %d were synced (%d of %d chunks)", s.CopiedBytes, syncedBytes, synced, total)
		}
		r.prefetch()
		r.present()
		if r.Stats().DamagedChunks != 0 {
			t.Error("a synced chunk is damaged")
		}
	}
}

// TestCleanReboot: after a reboot with an orderly end before, what was synced is
// believed, as it is of any file system.
func TestCleanReboot(t *testing.T) {
	r := newRig(t, 3<<20, nil)
	r.checkRead(0, 1<<20)
	r.quiet()
	n := r.present()
	r.close()
	r.cfg.bootID = "second boot"
	r.open()
	r.expect()
	if got := r.present(); got != n || n == 0 {
		t.Errorf("%d chunks believed, %d were there", got, n)
	}
}

// TestFlippedBits: after an unclean boot, a bit that was flipped in what had been
// synced is found when it is read, and when the complete diff is scrubbed.
func TestFlippedBits(t *testing.T) {
	r := newRig(t, 3<<20, nil)
	r.checkRead(0, 2<<20)
	r.quiet()
	if err := r.d.sync(t.Context()); err != nil {
		t.Fatal(err)
	}
	r.crash(func() {
		flipFile(t, r.d.DataPath(), 1<<20)
		r.cfg.bootID = "second boot"
	})
	r.expect()
	r.checkRead(0, 3<<20)
	r.prefetch()
	if err := r.d.Scrub(t.Context()); err != nil || time.Since(r.d.Scrubbed()) > time.Minute {
		t.Errorf("scrub of what is well: %v, %v", err, r.d.Scrubbed())
	}
	scrubbed := r.d.Scrubbed()
	r.reopen()
	if !r.d.Scrubbed().Equal(scrubbed) {
		t.Errorf("scrubbed at %v, after a restart at %v", scrubbed, r.d.Scrubbed())
	}
	r.crash(func() {
		flipFile(t, r.d.DataPath(), 1<<20+5)
		r.cfg.bootID = "third boot"
	})
	r.expect()
	if !r.d.Complete() || r.d.Scrubbed().Unix() > 0 {
		t.Errorf("complete %v, scrubbed at %v", r.d.Complete(), r.d.Scrubbed())
	}
	if err := r.d.Scrub(t.Context()); !errors.Is(err, ErrDamaged) || r.d.Complete() {
		t.Errorf("scrub of what is damaged: %v", err)
	}
	r.prefetch()
	r.checkRead(0, 3<<20)
	if err := r.d.Scrub(t.Context()); err != nil {
		t.Error(err)
	}
}

// TestForwardChecks: what goes to others is checked on its way. A damaged chunk is fetched
// again; a damaged piece of the header stream is not here.
func TestForwardChecks(t *testing.T) {
	r, l := newProofRig(t, nil)
	r.prove()
	chunk := func(digest blockdev.Digest) error {
		b, err := r.forward(blockdev.Prefetch, 0, digest).Chunk(t.Context(), 0, alloc)
		if err == nil && blockdev.Sum(b) != digest {
			t.Errorf("%d bytes that are not those of %v", len(b), digest)
		}
		return err
	}
	for i, c := range l.Index.Chunks {
		if err := chunk(c.Digest); err != nil {
			t.Fatalf("chunk %d: %v", i, err)
		}
	}
	for i, p := range l.Index.Headers {
		if err := chunk(p.Digest); err != nil {
			t.Fatalf("piece %d: %v", i, err)
		}
	}
	if err := chunk(blockdev.Sum([]byte("unknown"))); !errors.Is(err, blockdev.ErrNotFound) {
		t.Errorf("unknown chunk: %v", err)
	}
	flipFile(t, r.d.DataPath(), 5000)
	flipFile(t, r.d.path(headersFile), 10)
	if err := chunk(l.Index.Headers[0].Digest); !errors.Is(err, blockdev.ErrNotFound) {
		t.Errorf("damaged piece: %v", err)
	}
	if err := chunk(l.Index.Chunks[0].Digest); err != nil {
		t.Errorf("damaged chunk: %v", err)
	}
	if r.d.Complete() || r.Stats().DamagedChunks != 1 {
		t.Errorf("complete %v, %+v", r.d.Complete(), r.Stats())
	}
	r.prefetch()
	if !r.d.Complete() {
		t.Error("not complete after the chunk has come again")
	}
}

// TestPowerLossOfComplete: complete is said only when it is durable.
func TestPowerLossOfComplete(t *testing.T) {
	r := newRig(t, 3<<20, nil)
	r.prefetch()
	r.crash(func() { r.cfg.bootID = "second boot" })
	r.expect()
	if !r.d.Complete() {
		t.Error("complete before the power loss, not after")
	}
}

// TestPowerLossDuringAdd: whatever files of a new diff are missing or empty, the
// diff works or is gone.
func TestPowerLossDuringAdd(t *testing.T) {
	for mask := range 16 {
		r := newRig(t, 1<<20, nil)
		dir := r.d.dir
		r.crash(func() {
			for i, name := range []string{indexFile, metaFile, dataFile, bitmapFile} {
				if mask&(1<<i) != 0 {
					if err := os.Truncate(dir+"/"+name, 0); err != nil {
						t.Fatal(err)
					}
				}
			}
			r.cfg.bootID = "second boot"
		})
		d, ok := r.Get(r.ix.DiffID)
		if ok == (mask&1 != 0) {
			t.Fatalf("mask %b: the diff is there: %v", mask, ok)
		}
		if !ok {
			d = r.add(r.ix)
		}
		r.check(d, r.want, 0, len(r.want))
	}
}

// TestGarbageInTmp: what a crash left half-made or half-removed is deleted.
func TestGarbageInTmp(t *testing.T) {
	r := newRig(t, 1<<20, nil)
	left := r.cfg.Root + "/tmp/17"
	r.crash(func() {
		if err := os.MkdirAll(left+"/sub", 0o700); err != nil {
			t.Fatal(err)
		}
		if err := os.WriteFile(left+"/data", []byte("x"), 0o600); err != nil {
			t.Fatal(err)
		}
		if err := os.Mkdir(r.cfg.Root+"/diffs/not-a-diff", 0o700); err != nil {
			t.Fatal(err)
		}
	})
	// Nobody waits for it to be deleted, in the background, after the diffs are open.
	for deadline := time.Now().Add(time.Minute); ; time.Sleep(time.Millisecond) {
		_, err := os.Stat(left)
		if errors.Is(err, os.ErrNotExist) {
			break
		}
		if err != nil || time.Now().After(deadline) {
			t.Fatalf("garbage is still there: %v", err)
		}
	}
	if _, err := os.Stat(r.cfg.Root + "/diffs/not-a-diff"); err != nil {
		t.Error("what the cache did not make was deleted")
	}
	r.expect()
}
