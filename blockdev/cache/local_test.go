package cache

import (
	"testing"

	"github.com/shoalfs/shoal/blockdev"
	"github.com/shoalfs/shoal/blockdev/blockdevtest"
)

// twin makes a diff that has the chunks of base but for every fifth, at other
// offsets.
func twin(base *blockdev.Index, data []byte) (*blockdev.Index, []byte) {
	fresh := blockdevtest.Bytes(99, 50_000)
	out := fresh[:20_000:20_000]
	chunks := []blockdev.Chunk{{Length: 20_000, Digest: blockdev.Sum(out)}}
	for i, c := range base.Chunks {
		b := data[c.Offset:][:c.Length]
		if i%5 == 4 {
			b = append([]byte{byte(i)}, fresh[20_000:]...)
		}
		chunks = append(chunks, blockdev.Chunk{Offset: int64(len(out)), Length: uint32(len(b)), Digest: blockdev.Sum(b)})
		out = append(out, b...)
	}
	return &blockdev.Index{
		DiffID: blockdev.Sum([]byte("twin")), DiffSize: int64(len(out)),
		Meta: []byte("meta of the twin"), Chunks: chunks,
	}, out
}

// upgrade makes a rig whose first diff is complete, and adds its twin.
func upgrade(t *testing.T) (*rig, *Diff, []byte) {
	r := newRig(t, 5<<20, nil)
	r.prefetch()
	ix, data := twin(r.ix, r.data)
	r.mem.PutDiff(ix, data)
	return r, r.add(ix), padded(data)
}

func TestCopyFromAnotherDiff(t *testing.T) {
	r, d, want := upgrade(t)
	r.check(d, want, 0, 700_000)
	if err := d.Prefetch(t.Context()); err != nil {
		t.Fatal(err)
	}
	r.check(d, want, 0, len(want))
	var fresh int64
	for i := range d.tab.Len() {
		digest := d.tab.Digest(i)
		if len(r.d.tab.Find(&digest)) == 0 {
			fresh += int64(d.tab.Length(i))
		}
	}
	s := r.Stats()
	if got := s.DemandBytes + s.PrefetchBytes - r.d.DiffSize(); got != fresh {
		t.Errorf("%d bytes came from the source, %d are new", got, fresh)
	}
	if s.CopiedBytes != d.DiffSize()-fresh {
		t.Errorf("%d bytes copied, %d are not new", s.CopiedBytes, d.DiffSize()-fresh)
	}
}

// TestCopyOfADamagedChunk: the other diff's bytes are wrong, so they are not
// used, and that diff fetches them again too.
func TestCopyOfADamagedChunk(t *testing.T) {
	r, d, want := upgrade(t)
	flipFile(t, r.d.DataPath(), r.d.tab.Start(3)+5)
	r.check(d, want, 0, len(want))
	if r.d.pres.Has(3) {
		t.Error("the damaged chunk is still called present")
	}
	if r.d.Complete() {
		t.Error("a diff with a damaged chunk is still called complete")
	}
	if s := r.Stats(); s.DamagedChunks != 1 {
		t.Errorf("%d damaged chunks", s.DamagedChunks)
	}
	r.checkRead(0, int(r.d.Size()))
	r.prefetch()
	r.reopen()
	if !r.d.Complete() || r.present() != r.d.tab.Len() {
		t.Error("not complete after the damaged chunk came again")
	}
}

// TestSameBytesInOneDiff: content that a diff has in many places is fetched once.
func TestSameBytesInOneDiff(t *testing.T) {
	r := newRig(t, 1000, nil)
	b := blockdevtest.Bytes(8, blockdev.MinChunk)
	ix := &blockdev.Index{DiffID: blockdev.Sum([]byte("same")), Meta: []byte("meta")}
	var data []byte
	for range 40 {
		ix.Chunks = append(ix.Chunks, blockdev.Chunk{Offset: int64(len(data)), Length: uint32(len(b)), Digest: blockdev.Sum(b)})
		data = append(data, b...)
	}
	ix.DiffSize = int64(len(data))
	r.mem.PutDiff(ix, data)
	d := r.add(ix)
	r.check(d, padded(data), 0, len(data))
	if s := r.Stats(); s.DemandBytes != int64(len(b)) {
		t.Errorf("%d bytes fetched, want one chunk's %d", s.DemandBytes, len(b))
	}
	if err := d.Prefetch(t.Context()); err != nil {
		t.Fatal(err)
	}
}
