package cache

import (
	"bytes"
	"os"
	"path/filepath"
	"strings"
	"testing"

	"github.com/shoalfs/shoal/blockdev"
	"github.com/shoalfs/shoal/blockdev/layer"
)

// anotherBuilder makes an index look as if another version of the builder had made it.
func anotherBuilder(ix *blockdev.Index) {
	ix.Builder = layer.BuilderVersion + 1
	ix.Meta[1<<10] ^= 1
}

// TestProveAnotherBuilder: a layer that another version of shoal has indexed in another
// way is no lie. What this one makes of it is shown from then on; what came stays beside
// it, for mounts in use, for other nodes, and for a version that knows of none of this.
func TestProveAnotherBuilder(t *testing.T) {
	r, l := newProofRig(t, anotherBuilder)
	came := encode(t, r.ix)
	before := r.d.MetaPath()
	r.prove()
	shown := func(when string) {
		t.Helper()
		if r.d.Proof() != Proven || r.d.MetaPath() == before {
			t.Fatalf("%s: state %v, metadata image %s", when, r.d.Proof(), r.d.MetaPath())
		}
		for path, want := range map[string][]byte{
			before: r.ix.Meta, r.d.MetaPath(): l.Index.Meta, filepath.Join(r.d.dir, indexFile): came,
		} {
			if got, err := os.ReadFile(path); err != nil || !bytes.Equal(got, want) {
				t.Errorf("%s: %s is not what it should be: %v", when, path, err)
			}
		}
		if enc, err := r.EncodedIndex(r.d.id); err != nil || !bytes.Equal(enc, came) {
			t.Errorf("%s: another node is given another index than came: %v", when, err)
		}
		if ix, err := r.d.Index(); err != nil || !bytes.Equal(ix.Meta, l.Index.Meta) || ix.Builder != layer.BuilderVersion {
			t.Errorf("%s: the index has another tree than is shown: %v", when, err)
		}
		if in, err := r.d.Verify(t.Context(), false); err != nil || len(in.Findings) != 0 {
			t.Errorf("%s: check: %v, %+v", when, err, in)
		}
		r.checkRead(0, 1<<20)
	}
	shown("at once")
	if n := r.log.count("another version of shoal"); n != 1 {
		t.Errorf("%d log lines about it, want 1", n)
	}
	if r.Stats().Quarantined != 0 {
		t.Error("quarantined")
	}
	r.reopen()
	shown("after a restart")
	r.prove()

	r.close()
	in, err := Inspect(t.Context(), r.cfg.Root)
	if err != nil || len(in.Findings) != 0 || in.Proven != 1 {
		t.Errorf("check with nobody running: %v, %+v", err, in)
	}
	r.open()
	r.expect()

	// The image of the tree that is shown is damaged, then what it can be made of.
	damaged := func(path, says string) {
		t.Helper()
		flipFile(t, path, 100)
		r.close()
		in, err := Inspect(t.Context(), r.cfg.Root)
		if err != nil || len(in.Findings) != 1 || !strings.Contains(in.Findings[0].Problem, says) {
			t.Errorf("%s is damaged: %v, %+v", path, err, in)
		}
		r.open()
		r.expect()
	}
	damaged(r.d.MetaPath(), "metadata image")
	shown("its image was damaged")
	damaged(r.d.path(ownIndexFile), "this node made")
	if r.d.Proof() != Unproven || r.d.MetaPath() != before {
		t.Errorf("its index was damaged: state %v, metadata image %s", r.d.Proof(), r.d.MetaPath())
	}
	r.prove()
	shown("proven again")
}

// TestProveAnotherBuilderSameTree: most layers are the same to all builders.
func TestProveAnotherBuilderSameTree(t *testing.T) {
	r, _ := newProofRig(t, func(ix *blockdev.Index) { ix.Builder = layer.BuilderVersion + 1 })
	before := r.d.MetaPath()
	r.prove()
	r.reopen()
	if r.d.Proof() != Proven || r.d.MetaPath() != before {
		t.Errorf("state %v, metadata image %s", r.d.Proof(), r.d.MetaPath())
	}
}

// TestBuilderThereAndBack: the record of a version that has proven a layer with a tree
// of its own is a proof to the one before it as well, whose builder made the index.
func TestBuilderThereAndBack(t *testing.T) {
	r, l := newProofRig(t, nil) // of this builder: the older one
	own := l.Clone()
	own.Builder = layer.BuilderVersion + 1
	own.Meta[1<<10] ^= 1
	sum, err := r.d.takeOver(t.Context(), own) // what the newer one does
	if err != nil {
		t.Fatal(err)
	}
	if err := r.quarantine.putProven(r.d.folder, r.d.sum, sum); err != nil {
		t.Fatal(err)
	}
	for range 2 {
		r.reopen()
		if meta, err := os.ReadFile(r.d.MetaPath()); r.d.Proof() != Proven || err != nil || !bytes.Equal(meta, own.Meta) {
			t.Errorf("state %v, the newer version's tree is not shown: %v", r.d.Proof(), err)
		}
		r.prove()
	}
}
