package layer

import (
	"archive/tar"
	"bytes"
	"encoding/binary"
	"fmt"
	"strings"
	"time"
)

// entry is a tar entry as bytes, with everything that writers of tars do and
// archive/tar's Writer does not.
type entry struct {
	typ      byte // 0 is a regular file
	v7       bool // a regular file with the type that it had before ustar: a zero byte
	name     string
	link     string
	mode     int64
	uid, gid int64
	mtime    time.Time
	major    int64
	minor    int64
	data     string
	pax      [][2]string // in this order, in a PAX header before the entry
	size     int64       // in the header, if not that of data
	gnuLong  bool        // name and link in GNU headers
	sparse   []part      // data is these parts; with realSize
	realSize int64
	format   string // of sparse: "0.0", "0.1", "1.0", "old"
}

func file(name, data string) entry { return entry{name: name, mode: 0o644, data: data} }
func dirEntry(name string) entry   { return entry{typ: tar.TypeDir, name: name, mode: 0o755} }
func symlink(name, to string) entry {
	return entry{typ: tar.TypeSymlink, name: name, link: to, mode: 0o777}
}
func hardlink(name, to string) entry {
	return entry{typ: tar.TypeLink, name: name, link: to, mode: 0o600}
}

// makeTar joins entries and ends the archive.
func makeTar(entries ...entry) []byte {
	var b bytes.Buffer
	for _, e := range entries {
		e.write(&b)
	}
	b.Write(make([]byte, 2*tarBlock))
	return b.Bytes()
}

func pad(b *bytes.Buffer) { b.Write(make([]byte, -b.Len()&(tarBlock-1))) }

// numeric puts v into a field, in base 256 if octal has no room.
func numeric(f []byte, v int64) {
	if v >= 0 && v < 1<<(3*(len(f)-1)) {
		copy(f, fmt.Sprintf("%0*o", len(f)-1, v))
		return
	}
	var n [12]byte
	binary.BigEndian.PutUint64(n[4:], uint64(v))
	if v < 0 {
		n[0], n[1], n[2], n[3] = 0xff, 0xff, 0xff, 0xff
	}
	copy(f, n[12-len(f):])
	f[0] |= 0x80
}

func (e entry) header(name, link, magic string, size int64) []byte {
	h := make([]byte, tarBlock)
	copy(h[:100], name)
	numeric(h[100:108], e.mode)
	numeric(h[108:116], e.uid)
	numeric(h[116:124], e.gid)
	numeric(h[124:136], size)
	if sec := e.mtime.Unix(); !e.mtime.IsZero() && e.mtime.Nanosecond() == 0 {
		numeric(h[136:148], sec)
	}
	h[156] = e.typ
	if e.v7 {
		h[156] = 0
	}
	copy(h[157:257], link)
	copy(h[257:265], magic)
	numeric(h[329:337], e.major)
	numeric(h[337:345], e.minor)
	return h
}

func seal(h []byte) []byte {
	copy(h[148:156], "        ")
	sum := 0
	for _, c := range h[:tarBlock] {
		sum += int(c)
	}
	copy(h[148:156], fmt.Sprintf("%06o\x00 ", sum))
	return h
}

func special(b *bytes.Buffer, typ byte, magic, data string) {
	e := entry{typ: typ}
	b.Write(seal(e.header("././@Header", "", magic, int64(len(data)))))
	b.WriteString(data)
	pad(b)
}

func paxRecord(k, v string) string {
	n := len(k) + len(v) + 3
	for n != len(fmt.Sprint(n))+len(k)+len(v)+3 {
		n = len(fmt.Sprint(n)) + len(k) + len(v) + 3
	}
	return fmt.Sprintf("%d %s=%s\n", n, k, v)
}

func (e entry) write(b *bytes.Buffer) {
	magic := "ustar\x0000"
	if e.typ == 0 {
		e.typ = tar.TypeReg
	}
	data, pax := e.data, e.pax
	name, link := e.name, e.link
	if e.gnuLong || e.format == "old" {
		magic = "ustar  \x00"
		if len(name) > 100 || e.gnuLong {
			special(b, tar.TypeGNULongName, magic, name+"\x00")
			name = name[:min(100, len(name))]
		}
		if len(link) > 100 {
			special(b, tar.TypeGNULongLink, magic, link+"\x00")
			link = link[:100]
		}
	} else {
		if len(name) > 100 {
			pax = append(pax, [2]string{"path", name})
			name = "long"
		}
		if len(link) > 100 {
			pax = append(pax, [2]string{"linkpath", link})
			link = "long"
		}
	}
	if e.mtime.Nanosecond() != 0 {
		s := fmt.Sprintf("%d.%09d", e.mtime.Unix(), e.mtime.Nanosecond())
		if e.mtime.Unix() < 0 {
			s = fmt.Sprintf("-%d.%09d", -e.mtime.Unix()-1, 1e9-e.mtime.Nanosecond())
		}
		pax = append(pax, [2]string{"mtime", s})
	}
	var old []part
	switch e.format {
	case "0.0", "0.1":
		pax = append(pax, [2]string{"GNU.sparse.size", fmt.Sprint(e.realSize)},
			[2]string{"GNU.sparse.numblocks", fmt.Sprint(len(e.sparse))})
		var all []string
		for _, p := range e.sparse {
			if e.format == "0.0" {
				pax = append(pax, [2]string{"GNU.sparse.offset", fmt.Sprint(p.offset)},
					[2]string{"GNU.sparse.numbytes", fmt.Sprint(p.length)})
			}
			all = append(all, fmt.Sprint(p.offset), fmt.Sprint(p.length))
		}
		if e.format == "0.1" {
			pax = append(pax, [2]string{"GNU.sparse.major", "0"}, [2]string{"GNU.sparse.minor", "1"},
				[2]string{"GNU.sparse.name", e.name}, [2]string{"GNU.sparse.map", strings.Join(all, ",")})
			name = "GNUSparseFile.0/x"
		}
	case "1.0":
		pax = append(pax, [2]string{"GNU.sparse.major", "1"}, [2]string{"GNU.sparse.minor", "0"},
			[2]string{"GNU.sparse.name", e.name}, [2]string{"GNU.sparse.realsize", fmt.Sprint(e.realSize)})
		var m bytes.Buffer
		fmt.Fprintf(&m, "%d\n", len(e.sparse))
		for _, p := range e.sparse {
			fmt.Fprintf(&m, "%d\n%d\n", p.offset, p.length)
		}
		pad(&m)
		data = m.String() + data
		name = "GNUSparseFile.0/x"
	case "old":
		e.typ = tar.TypeGNUSparse
		old = e.sparse
	}
	if len(pax) > 0 {
		var all strings.Builder
		for _, kv := range pax {
			all.WriteString(paxRecord(kv[0], kv[1]))
		}
		special(b, tar.TypeXHeader, magic, all.String())
	}
	size := int64(len(data))
	if e.size != 0 {
		size = e.size
	}
	if e.format == "old" {
		h := e.header(name, link, magic, size)
		numeric(h[483:495], e.realSize)
		at, count, more := 386, 4, 482
		for {
			for i := range min(count, len(old)) {
				numeric(h[at+24*i:][:12], old[i].offset)
				numeric(h[at+24*i+12:][:12], old[i].length)
			}
			old = old[min(count, len(old)):]
			if len(old) > 0 {
				h[more] = 1
			}
			if count == 4 {
				seal(h)
			}
			b.Write(h)
			if len(old) == 0 {
				break
			}
			h, at, count, more = make([]byte, tarBlock), 0, 21, 504
		}
	} else {
		b.Write(seal(e.header(name, link, magic, size)))
	}
	b.WriteString(data)
	pad(b)
}
