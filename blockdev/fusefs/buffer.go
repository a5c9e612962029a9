package fusefs

import (
	"sync"
	"unsafe"
)

// buffer holds one answer: a header, and behind it the payload, which begins at
// a page.
type buffer struct{ page []byte } // page[pageSize-outHeaderSize:] is the answer

func newBuffer(payload int) *buffer {
	raw := make([]byte, 2*pageSize+payload)
	skip := -int(uintptr(unsafe.Pointer(unsafe.SliceData(raw)))) & (pageSize - 1)
	return &buffer{raw[skip : skip+pageSize+payload]}
}

func (b *buffer) payload(n int) []byte { return b.page[pageSize : pageSize+n] }

// answer returns header and payload of n bytes.
func (b *buffer) answer(n int) []byte { return b.page[pageSize-outHeaderSize : pageSize+n] }

func (b *buffer) size() int { return len(b.page) - pageSize }

// smallRead is what EROFS asks for at most while pages are single: the kernel's
// default read-ahead.
const smallRead = 128 << 10

// buffers keeps buffers of two sizes for later. The zero value is ready.
type buffers struct{ small, large sync.Pool }

// bufferSize is how much room for payload the buffer for n bytes has.
func bufferSize(n int) int {
	if n <= smallRead {
		return smallRead
	}
	return MaxRead
}

func (p *buffers) get(n int) *buffer {
	pool, size := &p.large, bufferSize(n)
	if size == smallRead {
		pool = &p.small
	}
	if b, ok := pool.Get().(*buffer); ok {
		return b
	}
	return newBuffer(size)
}

func (p *buffers) put(b *buffer) {
	if b.size() == smallRead {
		p.small.Put(b)
	} else {
		p.large.Put(b)
	}
}
