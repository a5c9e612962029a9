package erofs

import (
	"fmt"
	"io"
	"math/rand/v2"
	"testing"
)

// packageTree is about what a layer of Python packages holds: deep directories,
// a few files each, nearly all with a time of their own.
func packageTree(inodes int) (root *Inode, diffSize int64) {
	rnd := rand.New(rand.NewPCG(7, 7))
	root = dirOf()
	dirs := []*Inode{root}
	words := []string{"core", "utils", "test", "ops", "nn", "data", "io", "dist", "base", "types", "config", "include", "native", "cuda"}
	for i := range inodes - 1 {
		name := fmt.Sprintf("%s_%s%d", words[rnd.IntN(len(words))], words[rnd.IntN(len(words))], i%977)
		d := dirs[rnd.IntN(len(dirs))]
		mtime := 1700000000 + rnd.Int64N(600)
		if i%12 == 0 {
			c := &Inode{Mode: modeDir | 0o755, MtimeSec: mtime}
			dirs = append(dirs, c)
			d.Children = append(d.Children, Dirent{fmt.Sprint(name, "_", i), c})
			continue
		}
		size := int64(rnd.ExpFloat64() * 12000)
		f := &Inode{Mode: modeRegular | 0o644, MtimeSec: mtime, Size: size}
		diffSize += 512
		if size > 0 {
			f.Extents = []Extent{{0, diffSize, size}}
		}
		diffSize += alignUp(size, 512)
		d.Children = append(d.Children, Dirent{fmt.Sprint(name, "_", i, ".py"), f})
	}
	return root, diffSize
}

func BenchmarkWrite(b *testing.B) {
	root, diffSize := packageTree(60_000)
	b.SetBytes(int64(len(emit(b, root, diffSize))))
	b.ReportAllocs()
	b.ResetTimer()
	for range b.N {
		if err := Write(io.Discard, root, diffSize); err != nil {
			b.Fatal(err)
		}
	}
}
