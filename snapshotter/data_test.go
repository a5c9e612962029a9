package snapshotter

import (
	"log/slog"
	"os"
	"path/filepath"
	"testing"
	"time"

	"github.com/shoalfs/shoal/blockdev/blockdevtest"
	"github.com/shoalfs/shoal/blockdev/index"
	"github.com/shoalfs/shoal/blockdev/mount"
	"github.com/shoalfs/shoal/blockdev/volume"
	"github.com/shoalfs/shoal/snapshotter/images"
	"github.com/shoalfs/shoal/snapshotter/snapshottertest"
)

var (
	_ images.Data = (*volume.Manager)(nil)
	_ images.Data = (*fakeData)(nil)
)

func needFUSE(t *testing.T) {
	t.Helper()
	if _, err := os.Stat("/dev/fuse"); err != nil {
		t.Skip("needs FUSE: ", err)
	}
}

// TestVolumes: the data path of a node keeps the contract of Data.
func TestVolumes(t *testing.T) {
	needRoot(t)
	needFUSE(t)
	snapshottertest.TestData(t, func(t *testing.T, layers ...*blockdevtest.Layer) (images.Data, [][]byte) {
		src := &blockdevtest.Memory{}
		root := filepath.Join(t.TempDir(), "volumes")
		vols := must(volume.Open(bg, volume.Config{Root: root, ReadTimeout: time.Minute, Log: slog.New(slog.NewTextHandler(t.Output(), nil))}))(t)
		check(t, vols.Attach(volume.Upstream{Source: src}))
		t.Cleanup(func() {
			check(t, vols.Close())
			left := must(mount.List(root))(t) // what containers would go on reading
			for i := range left {
				check(t, mount.Detach(left[len(left)-1-i].Dir))
			}
		})
		var encoded [][]byte
		for _, l := range layers {
			src.PutLayer(l)
			encoded = append(encoded, must(index.Encode(l.Index))(t))
		}
		return vols, encoded
	})
}

// TestFakeData: so does the one that these tests use.
func TestFakeData(t *testing.T) {
	needRoot(t)
	snapshottertest.TestData(t, func(t *testing.T, layers ...*blockdevtest.Layer) (images.Data, [][]byte) {
		d := newFakeData(t, t.TempDir())
		d.fetches = true
		var encoded [][]byte
		for _, l := range layers {
			ix := l.Clone()
			ix.Meta = l.Tar // which it unpacks
			encoded = append(encoded, must(index.Encode(ix))(t))
		}
		return d, encoded
	})
}
