package layer

import (
	"archive/tar"
	"bytes"
	"fmt"
	"math/rand/v2"
	"strings"
	"time"
)

// randomTar makes a tar of n entries over few names, so that they meet. If wild,
// entries may contradict each other as real tars do not.
func randomTar(r *rand.Rand, n int, wild bool) []byte {
	var kept []entry
	for len(kept) < n {
		e := randomEntry(r)
		if !wild {
			// One by one would be quadratic in long tars.
			if _, err := scanTree(makeTar(append(kept[max(0, len(kept)-40):len(kept):len(kept)], e)...), Options{}); err != nil {
				if n -= 1; n <= 0 {
					break
				}
				continue
			}
			if len(kept) >= 40 {
				e.name = fmt.Sprintf("more%d/%s", len(kept), strings.TrimLeft(e.name, "./"))
				if e.typ == tar.TypeLink || strings.Contains(e.name, whiteoutPrefix) {
					continue
				}
			}
		}
		kept = append(kept, e)
	}
	diff := makeTar(kept...)
	switch r.IntN(6) {
	case 0:
		diff = diff[:len(diff)-1024]
	case 1:
		diff = append(diff, randomBytes(byte(r.Uint32()), r.IntN(3000))...)
	}
	return diff
}

func randomName(r *rand.Rand) string {
	parts := []string{"a", "b", "c", "d", "e", "usr", strings.Repeat("l", 130)}
	var p []string
	for range 1 + r.IntN(3) {
		p = append(p, parts[r.IntN(len(parts))])
	}
	name := strings.Join(p, "/")
	switch r.IntN(12) {
	case 0:
		return "./" + name
	case 1:
		return "/" + name
	case 2:
		return strings.ReplaceAll(name, "/", "//")
	case 3:
		return "a/../" + name
	case 4:
		return name + "/"
	}
	return name
}

func randomEntry(r *rand.Rand) entry {
	e := entry{name: randomName(r), mode: int64(r.IntN(0o10000)), gnuLong: r.IntN(10) == 0}
	if r.IntN(3) == 0 {
		e.uid, e.gid = int64(r.IntN(3)), int64(r.IntN(3))
	}
	if r.IntN(10) == 0 {
		e.uid = []int64{-1, -2, 1 << 20, 1 << 31, 1<<32 - 2}[r.IntN(5)]
	}
	switch r.IntN(4) {
	case 0:
		e.mtime = time.Unix(int64(r.IntN(1<<31)), 0)
	case 1:
		e.mtime = time.Unix(int64(r.IntN(1<<33)), int64(r.IntN(1e9)))
	case 2:
		e.mtime = time.Unix(int64(r.IntN(100))-50, int64(r.IntN(2)*777))
	}
	switch r.IntN(16) {
	case 0, 1, 2, 3:
		e.typ = tar.TypeDir
	case 4:
		e.typ, e.link = tar.TypeSymlink, []string{"a", "../a", "/b", "b/c", "/usr", "nowhere", "./d", "../../e"}[r.IntN(8)]
	case 5, 6:
		e.typ, e.link = tar.TypeLink, randomName(r)
	case 7:
		e.typ, e.major, e.minor = tar.TypeChar, int64(r.IntN(300)), int64(r.IntN(1<<20))
	case 8:
		e.typ, e.major, e.minor = tar.TypeBlock, int64(r.IntN(5000)), int64(r.IntN(300))
	case 9:
		e.typ = tar.TypeFifo
	case 10:
		dir, base := "", e.name
		if i := strings.LastIndexByte(strings.TrimRight(e.name, "/"), '/'); i >= 0 {
			dir, base = e.name[:i+1], e.name[i+1:]
		}
		e.name = dir + whiteoutPrefix + []string{base, ".wh..opq", "w", ".wh.plnk"}[r.IntN(4)]
	case 11:
		sparseEntry(r, &e)
	default:
		e.data = string(randomBytes(byte(r.Uint32()), r.IntN(3000)))
		if r.IntN(20) == 0 {
			e.data = string(randomBytes(byte(r.Uint32()), r.IntN(600_000)))
		}
		if r.IntN(8) == 0 {
			e.v7 = true
		}
	}
	if r.IntN(3) == 0 {
		all := [][2]string{
			{"user.a", "1"}, {"user.empty", ""}, {"security.capability", someCap}, {"security.other", strings.Repeat("s", r.IntN(300))},
			{"trusted.t", "1"}, {"system.nothing", "1"}, {"user.big", string(randomBytes(1, r.IntN(2000)))},
			{xattrACL, someACL}, {xattrACL, minimalACL}, {xattrACL, ""},
		}
		if e.typ == tar.TypeDir {
			all = append(all, [2]string{xattrDefaultACL, someACL}, [2]string{xattrDefaultACL, minimalACL})
		}
		for range 1 + r.IntN(2) {
			kv := all[r.IntN(len(all))]
			e.pax = append(e.pax, [2]string{paxXattr + kv[0], kv[1]})
		}
	}
	if r.IntN(40) == 0 && e.format == "" {
		e = entry{typ: tar.TypeXGlobalHeader, name: e.name, data: paxRecord("comment", "x")}
	}
	return e
}

func sparseEntry(r *rand.Rand, e *entry) {
	e.format = []string{"0.0", "0.1", "1.0"}[r.IntN(3)]
	e.gnuLong = false
	unit := []int64{512, 4096, 1}[r.IntN(3)]
	pos := int64(0)
	var data bytes.Buffer
	for range r.IntN(30) {
		pos += unit * int64(r.IntN(4))
		n := unit * int64(r.IntN(4))
		e.sparse = append(e.sparse, part{pos, n})
		data.Write(randomBytes(byte(r.Uint32()), int(n)))
		pos += n
	}
	if r.IntN(2) == 0 {
		n := int64(r.IntN(5000))
		e.sparse = append(e.sparse, part{pos, n})
		data.Write(randomBytes(9, int(n)))
		pos += n
	}
	e.data = data.String()
	e.realSize = pos + int64(r.IntN(2)*r.IntN(100_000))
}
