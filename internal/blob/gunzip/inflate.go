package gunzip

import (
	"encoding/binary"
	"fmt"
)

var (
	errCode     = fmt.Errorf("code without a meaning: %w", ErrCorrupt)
	errDistance = fmt.Errorf("distance to before the start: %w", ErrCorrupt)
)

// inflate decodes until the block ends, the output is full, or there is no more
// input at hand, and some more symbols then.
func (z *Reader) inflate() error {
	from := z.w
	ended, err := z.fast()
	if err == nil && !ended && z.w < outputEnd {
		ended, err = z.careful()
	}
	z.wrote(from)
	if ended {
		z.next()
	}
	return err
}

// fast decodes while there is room for whole steps in input and output. It takes in
// bytes up to three times in a step of the loop, and has 56 bits or more then: three
// literals in the first table, or two and a length (15 bits and 5) take no more, and
// neither does a distance (15 and 13). A step begins with the entry of its first
// symbol, so that the processor looks that up while it copies the match before.
func (z *Reader) fast() (ended bool, err error) {
	in, pos := z.in[:z.end], z.pos
	bits, nbits := z.bits, z.nbits
	out, w := z.out, z.w
	lit, dist := &z.lit, &z.dist
	if len(in)-pos < stepInput {
		return false, nil
	}
	bits |= binary.LittleEndian.Uint64(in[pos:]) << (nbits & 63)
	pos += int((63 - nbits) >> 3)
	nbits |= 56
	e := lit[bits&(1<<litBits-1)]
	for len(in)-pos >= stepInput && w < outputEnd {
		if e&flagLiteral != 0 {
			bits >>= e & 63
			nbits -= uint(e & 63)
			out[w] = byte(e >> 16)
			w++
			e = lit[bits&(1<<litBits-1)]
			if e&flagLiteral != 0 {
				bits >>= e & 63
				nbits -= uint(e & 63)
				out[w] = byte(e >> 16)
				w++
				e = lit[bits&(1<<litBits-1)]
				if e&flagLiteral != 0 {
					bits >>= e & 63
					nbits -= uint(e & 63)
					out[w] = byte(e >> 16)
					w++
					bits |= binary.LittleEndian.Uint64(in[pos:]) << (nbits & 63)
					pos += int((63 - nbits) >> 3)
					nbits |= 56
					e = lit[bits&(1<<litBits-1)]
					continue
				}
			}
		}
		if e&flagExceptional != 0 {
			if e&flagLink != 0 {
				bits >>= litBits
				nbits -= litBits
				e = lit[uint64(e>>16)+bits&(1<<(e>>8&15)-1)]
				if e&flagLiteral != 0 {
					bits >>= e & 63
					nbits -= uint(e & 63)
					out[w] = byte(e >> 16)
					w++
					bits |= binary.LittleEndian.Uint64(in[pos:]) << (nbits & 63)
					pos += int((63 - nbits) >> 3)
					nbits |= 56
					e = lit[bits&(1<<litBits-1)]
					continue
				}
			}
			if e&flagExceptional != 0 {
				if ended = e&flagEnd != 0; ended {
					bits >>= e & 63
					nbits -= uint(e & 63)
				} else {
					err = errCode
				}
				break
			}
		}
		saved := bits
		bits >>= e & 63
		nbits -= uint(e & 63)
		length := int(e>>16) + int(saved&(1<<(e&63)-1)>>(e>>8&15))

		bits |= binary.LittleEndian.Uint64(in[pos:]) << (nbits & 63)
		pos += int((63 - nbits) >> 3)
		nbits |= 56

		e = dist[bits&(1<<distBits-1)]
		if e&flagExceptional != 0 {
			if e&flagLink != 0 {
				bits >>= distBits
				nbits -= distBits
				e = dist[uint64(e>>16)+bits&(1<<(e>>8&15)-1)]
			}
			if e&flagExceptional != 0 {
				err = errCode
				break
			}
		}
		saved = bits
		bits >>= e & 63
		nbits -= uint(e & 63)
		distance := int(e>>16) + int(saved&(1<<(e&63)-1)>>(e>>8&15))
		if distance > w-z.oldest {
			err = errDistance
			break
		}
		bits |= binary.LittleEndian.Uint64(in[pos:]) << (nbits & 63)
		pos += int((63 - nbits) >> 3)
		nbits |= 56
		e = lit[bits&(1<<litBits-1)]

		if distance >= 16 && length <= 16 {
			*(*[16]byte)(out[w:]) = *(*[16]byte)(out[w-distance:])
		} else {
			match(out, w, distance, length)
		}
		w += length
	}
	z.pos, z.bits, z.nbits, z.w = pos, bits, nbits, w
	return ended, err
}

// match copies length bytes from distance before w to w. It may write 15 bytes more.
func match(out []byte, w, distance, length int) {
	from := w - distance
	switch {
	case distance >= 16:
		*(*[16]byte)(out[w:]) = *(*[16]byte)(out[from:])
		for n := 16; n < length; n += 16 {
			*(*[16]byte)(out[w+n:]) = *(*[16]byte)(out[from+n:])
		}
	case distance == 1:
		v := uint64(out[from]) * 0x0101010101010101
		for n := 0; n < length; n += 8 {
			binary.LittleEndian.PutUint64(out[w+n:], v)
		}
	default:
		// Eight bytes, of which as many are right as the distance: the next ones are
		// written over them.
		step := min(distance, 8)
		for n := 0; n < length; n += step {
			binary.LittleEndian.PutUint64(out[w+n:], binary.LittleEndian.Uint64(out[from+n:]))
		}
	}
}

// careful decodes one symbol, and so long as there is no more input at hand than
// that, one after the other, with no more input than they need.
func (z *Reader) careful() (ended bool, err error) {
	for z.w < outputEnd {
		e, err := z.symbol(z.lit[:], litBits)
		if err != nil {
			return false, err
		}
		if e&flagLiteral != 0 {
			z.out[z.w] = byte(e >> 16)
			z.w++
		} else if e&flagEnd != 0 && e&flagExceptional != 0 {
			return true, nil
		} else {
			length, err := z.value(e)
			if err != nil {
				return false, err
			}
			if e, err = z.symbol(z.dist[:], distBits); err != nil {
				return false, err
			}
			distance, err := z.value(e)
			if err != nil {
				return false, err
			}
			if distance > z.w-z.oldest {
				return false, errDistance
			}
			match(z.out, z.w, distance, length)
			z.w += length
		}
		if z.end-z.pos >= stepInput {
			break
		}
	}
	return false, nil
}

// symbol takes a code, of which it gets as much as it needs, and returns its entry.
func (z *Reader) symbol(table []uint32, root uint) (uint32, error) {
	for {
		e, used := table[z.bits&(1<<root-1)], uint(0)
		if e&flagLink != 0 && z.nbits >= root {
			used = root
			e = table[uint64(e>>16)+z.bits>>root&(1<<(e>>8&15)-1)]
		}
		if n := used + uint(e>>8&15); e&flagLink == 0 && n <= z.nbits {
			if e&(flagExceptional|flagEnd) == flagExceptional {
				return 0, errCode
			}
			z.take(n)
			return e, nil
		}
		if err := z.need(z.nbits + 1); err != nil {
			return 0, err
		}
	}
}

// value takes the extra bits of a length or distance.
func (z *Reader) value(e uint32) (int, error) {
	n := uint(e&0xff - e>>8&15)
	if err := z.need(n); err != nil {
		return 0, err
	}
	return int(e>>16) + int(z.take(n)), nil
}
