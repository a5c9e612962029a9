package gunzip

import (
	"encoding/binary"
	"errors"
	"fmt"
	"hash/crc32"
	"io"
)

const (
	inputSize = 128 << 10
	window    = 32 << 10 // how far back a match may reach (RFC 1951, 3.2.5)
	// A fill of the output ends behind outputEnd, by one step of inflate at most.
	outputEnd  = window + 256<<10
	outputSize = outputEnd + 512
	// stepInput is the most bytes of input that one step of inflate's fast loop
	// looks at.
	stepInput = 24
)

// ErrCorrupt is wrapped by errors that mean that the input is no gzip stream, or a
// damaged one. One that ends too soon is io.ErrUnexpectedEOF.
var ErrCorrupt = errors.New("damaged gzip stream")

// Reader decompresses a gzip stream. It reads ahead in its source, to the end of it.
type Reader struct {
	src    io.Reader
	srcErr error // why src gives no more
	whole  bool  // because that was all: io.EOF itself, and no broken connection that wraps it

	in       []byte // in[pos:end] has been read and is in neither bits nor output
	pos, end int
	bits     uint64 // the next nbits bits; what is above them is 0, or the right bits
	nbits    uint

	out     []byte
	w, r    int // out[r:w] is to be given out
	oldest  int // where in out the member, or what is left of it, begins
	sum     uint32
	size    uint32 // of the member so far, modulo 2^32
	state   func(*Reader) error
	junk    bool // something follows that is no member
	final   bool // the block is the member's last
	stored  int  // bytes left of a stored block
	err     error
	lengths [maxLit + maxDist]uint8
	lit     [litEntries]uint32
	dist    [distEntries]uint32
	pre     [1 << preBits]uint32
}

// NewReader reads the first header of the gzip stream in src.
func NewReader(src io.Reader) (*Reader, error) {
	z := &Reader{src: src, in: make([]byte, inputSize), out: make([]byte, outputSize)}
	if err := z.header(); err != nil {
		return nil, err
	}
	return z, nil
}

// Trailing reports, once Read has returned io.EOF, whether something follows the last
// member that is not one. It was not read.
func (z *Reader) Trailing() bool { return z.junk }

// Read implements io.Reader. Errors are those of the source, io.ErrUnexpectedEOF, or
// wrap ErrCorrupt. io.EOF means that the checksums of all members were right.
func (z *Reader) Read(p []byte) (int, error) {
	if len(p) == 0 {
		return 0, nil
	}
	for z.r == z.w {
		if z.err != nil {
			return 0, z.err
		}
		z.slide()
		from := z.w
		for z.err == nil && z.w < outputEnd && z.w-from < window {
			z.err = z.state(z)
		}
	}
	n := copy(p, z.out[z.r:z.w])
	z.r += n
	return n, nil
}

// slide makes room in out, of which everything has been given out.
func (z *Reader) slide() {
	if z.w < outputEnd {
		return
	}
	by := z.w - window
	copy(z.out, z.out[by:z.w])
	z.oldest = max(0, z.oldest-by)
	z.r, z.w = window, window
}

// fill reads some more of the source. Of what was used it keeps as much as bits may
// hold, so that unread works. Its error is the source's, or io.ErrUnexpectedEOF.
func (z *Reader) fill() error {
	if z.srcErr == nil {
		keep := max(0, z.pos-8)
		z.end = copy(z.in, z.in[keep:z.end])
		z.pos -= keep
		for empty := 0; ; empty++ {
			n, err := z.src.Read(z.in[z.end:])
			z.end += n
			if err == nil && n == 0 && empty == 100 {
				err = io.ErrNoProgress
			}
			z.srcErr, z.whole = err, err == io.EOF
			if n > 0 {
				return nil
			}
			if err != nil {
				break
			}
		}
	}
	if z.whole {
		return io.ErrUnexpectedEOF
	}
	return z.srcErr
}

// need gets n bits, of at most 48.
func (z *Reader) need(n uint) error {
	for z.nbits < n {
		if z.pos == z.end {
			if err := z.fill(); err != nil {
				return err
			}
		}
		z.bits |= uint64(z.in[z.pos]) << z.nbits
		z.pos++
		z.nbits += 8
	}
	return nil
}

// take takes n bits, which are there.
func (z *Reader) take(n uint) uint {
	v := z.bits & (1<<n - 1)
	z.bits >>= n
	z.nbits -= n
	return uint(v)
}

// align passes over the rest of a byte and has the bytes behind it be read from in.
func (z *Reader) align() {
	z.pos -= int(z.nbits >> 3)
	z.bits, z.nbits = 0, 0
}

// bytes returns the next n bytes, at most inputSize-8, aligned. They are valid until
// more is read.
func (z *Reader) bytes(n int) ([]byte, error) {
	for z.end-z.pos < n {
		if err := z.fill(); err != nil {
			return nil, err
		}
	}
	b := z.in[z.pos : z.pos+n]
	z.pos += n
	return b, nil
}

// Flags of a member's header (RFC 1952, 2.3.1). Others are passed over, as
// compress/gzip does.
const (
	flagHeaderSum = 1 << 1
	flagExtra     = 1 << 2
	flagName      = 1 << 3
	flagComment   = 1 << 4
)

// maxName bounds a member's name and comment, in bytes, as compress/gzip does.
const maxName = 512

// header reads a member's header.
func (z *Reader) header() error {
	b, err := z.bytes(10)
	if err != nil {
		return err
	}
	if b[0] != 0x1f || b[1] != 0x8b || b[2] != 8 {
		return fmt.Errorf("no gzip header: %w", ErrCorrupt)
	}
	flags := b[3]
	sum := crc32.ChecksumIEEE(b)
	if flags&flagExtra != 0 {
		if b, err = z.bytes(2); err != nil {
			return err
		}
		sum = crc32.Update(sum, crc32.IEEETable, b)
		if b, err = z.bytes(int(binary.LittleEndian.Uint16(b))); err != nil {
			return err
		}
		sum = crc32.Update(sum, crc32.IEEETable, b)
	}
	for _, f := range []byte{flagName, flagComment} {
		if flags&f == 0 {
			continue
		}
		for n := 0; ; n++ {
			if n == maxName {
				return fmt.Errorf("name or comment of more than %d bytes in a gzip header: %w", maxName, ErrCorrupt)
			}
			if b, err = z.bytes(1); err != nil {
				return err
			}
			sum = crc32.Update(sum, crc32.IEEETable, b)
			if b[0] == 0 {
				break
			}
		}
	}
	if flags&flagHeaderSum != 0 {
		if b, err = z.bytes(2); err != nil {
			return err
		}
		if binary.LittleEndian.Uint16(b) != uint16(sum) {
			return fmt.Errorf("checksum of a gzip header: %w", ErrCorrupt)
		}
	}
	z.oldest, z.sum, z.size = z.w, 0, 0
	z.state = (*Reader).block
	return nil
}

// trailer reads a member's end and the header of the next one, if there is one. What
// does not begin as a member is none, as gzip and pigz see it: padding to whole blocks of
// a tape, say, or what was appended by mistake.
func (z *Reader) trailer() error {
	b, err := z.bytes(8)
	if err != nil {
		return err
	}
	if binary.LittleEndian.Uint32(b) != z.sum || binary.LittleEndian.Uint32(b[4:]) != z.size {
		return fmt.Errorf("checksum or size of the content: %w", ErrCorrupt)
	}
	for z.end-z.pos < 2 {
		if err := z.fill(); err == nil {
			continue
		} else if !z.whole || z.pos < z.end && z.in[z.pos] == 0x1f {
			return err
		}
		z.junk = z.pos < z.end
		return io.EOF
	}
	if z.in[z.pos] != 0x1f || z.in[z.pos+1] != 0x8b {
		z.junk = true
		return io.EOF
	}
	return z.header()
}

// wrote counts what has been added to out behind from.
func (z *Reader) wrote(from int) {
	z.sum = crc32.Update(z.sum, crc32.IEEETable, z.out[from:z.w])
	z.size += uint32(z.w - from)
}

// next is what follows a block.
func (z *Reader) next() {
	z.state = (*Reader).block
	if z.final {
		z.align()
		z.state = (*Reader).trailer
	}
}

// block reads the head of a block (RFC 1951, 3.2.3).
func (z *Reader) block() error {
	if err := z.need(3); err != nil {
		return err
	}
	z.final = z.take(1) == 1
	switch z.take(2) {
	case 0:
		z.align()
		b, err := z.bytes(4)
		if err != nil {
			return err
		}
		n := binary.LittleEndian.Uint16(b)
		if n != ^binary.LittleEndian.Uint16(b[2:]) {
			return fmt.Errorf("length of a stored block: %w", ErrCorrupt)
		}
		z.stored = int(n)
		z.state = (*Reader).copyStored
	case 1:
		z.fixed()
		z.state = (*Reader).inflate
	case 2:
		if err := z.dynamic(); err != nil {
			return err
		}
		z.state = (*Reader).inflate
	default:
		return fmt.Errorf("type of a block: %w", ErrCorrupt)
	}
	return nil
}

// copyStored copies what there is of a stored block and room for.
func (z *Reader) copyStored() error {
	if z.stored == 0 {
		z.next()
		return nil
	}
	if z.pos == z.end {
		if err := z.fill(); err != nil {
			return err
		}
	}
	from := z.w
	n := copy(z.out[z.w:outputEnd], z.in[z.pos:min(z.end, z.pos+z.stored)])
	z.w += n
	z.pos += n
	z.stored -= n
	z.wrote(from)
	return nil
}

// fixed makes the tables of the fixed codes (RFC 1951, 3.2.6).
func (z *Reader) fixed() {
	var l [numLit + numDist]uint8
	for i := range l {
		switch {
		case i < 144:
			l[i] = 8
		case i < 256:
			l[i] = 9
		case i < 280:
			l[i] = 7
		case i < numLit:
			l[i] = 8
		default:
			l[i] = 5
		}
	}
	// Complete by definition.
	_ = makeTable(z.lit[:], litBits, l[:numLit], litValues[:])
	_ = makeTable(z.dist[:], distBits, l[numLit:], distValues[:])
}

// preOrder is the order in which the lengths of the codes for code lengths come.
var preOrder = [numPre]uint8{16, 17, 18, 0, 8, 7, 9, 6, 10, 5, 11, 4, 12, 3, 13, 2, 14, 1, 15}

// dynamic reads the codes of a block and makes their tables (RFC 1951, 3.2.7).
func (z *Reader) dynamic() error {
	if err := z.need(14); err != nil {
		return err
	}
	nlit, ndist, npre := int(z.take(5))+257, int(z.take(5))+1, int(z.take(4))+4
	if nlit > maxLit || ndist > maxDist {
		return fmt.Errorf("number of codes: %w", ErrCorrupt)
	}
	var pre [numPre]uint8
	for _, i := range preOrder[:npre] {
		if err := z.need(3); err != nil {
			return err
		}
		pre[i] = uint8(z.take(3))
	}
	if !makeTable(z.pre[:], preBits, pre[:], preValues[:]) {
		return fmt.Errorf("codes of code lengths: %w", ErrCorrupt)
	}
	l := z.lengths[:nlit+ndist]
	for i := 0; i < len(l); {
		sym, err := z.preSymbol()
		if err != nil {
			return err
		}
		if sym < 16 {
			l[i] = sym
			i++
			continue
		}
		repeat := [...]struct {
			least int
			extra uint
		}{{3, 2}, {3, 3}, {11, 7}}[sym-16]
		var v uint8
		if sym == 16 {
			if i == 0 {
				return fmt.Errorf("code lengths begin with a repetition: %w", ErrCorrupt)
			}
			v = l[i-1]
		}
		if err := z.need(repeat.extra); err != nil {
			return err
		}
		n := repeat.least + int(z.take(repeat.extra))
		if n > len(l)-i {
			return fmt.Errorf("more code lengths than codes: %w", ErrCorrupt)
		}
		for range n {
			l[i] = v
			i++
		}
	}
	if !makeTable(z.lit[:], litBits, l[:nlit], litValues[:]) || !makeTable(z.dist[:], distBits, l[nlit:], distValues[:]) {
		return fmt.Errorf("codes of a block: %w", ErrCorrupt)
	}
	return nil
}

// preSymbol reads a symbol of the code of code lengths.
func (z *Reader) preSymbol() (uint8, error) {
	for {
		e := z.pre[z.bits&(1<<preBits-1)]
		n := uint(e & 0xff)
		if n <= z.nbits && e&flagExceptional == 0 {
			z.take(n)
			return uint8(e >> 16), nil
		}
		if e&flagExceptional != 0 && z.nbits >= preBits {
			return 0, fmt.Errorf("code of a code length: %w", ErrCorrupt)
		}
		if err := z.need(z.nbits + 1); err != nil {
			return 0, err
		}
	}
}
